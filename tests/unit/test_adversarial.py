"""Nearest adversarial examples: against the distance to the boundary of a linear classifier."""

import pytest
import torch
from torch import nn

import utils
from models import adversarial

SPEC = utils.DataSpec(mean=(0.5, 0.4, 0.6), std=(0.2, 0.1, 0.15))


class Linear(nn.Module):
    """Two classes of 3×2×2 images; the boundary is a plane in the space of the pixels."""

    def __init__(self, offset=0.0):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.normal = torch.randn(3, 2, 2, generator=rng).double()
        self.normal /= self.normal.norm()
        self.offset, self.calls = offset, 0

    def side(self, inputs):
        mean, std = (
            torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (SPEC.mean, SPEC.std)
        )
        pixels = inputs * std + mean
        return ((pixels - 0.5) * self.normal).sum((1, 2, 3)) + self.offset

    def forward(self, inputs):
        self.calls += 1
        side = self.side(inputs)
        return torch.stack([4 * side, torch.zeros_like(side)], dim=1)


def images(count):
    rng = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (SPEC.mean, SPEC.std))
    pixels = 0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=rng).double()
    return (pixels - mean) / std, std


@pytest.mark.parametrize("radius", [0.01, 0.04])
def test_nearest_example_is_just_beyond_the_boundary(radius):
    model, (inputs, std) = Linear(), images(40)
    sides = model.side(inputs)
    labels = (sides < 0).long()
    examples = adversarial.nearest(model, inputs, labels, SPEC, radius=radius)
    assert examples.labels.equal(1 - labels)
    assert examples.inputs.dtype == inputs.dtype and len(set(sides.sign().tolist())) == 2
    moved = ((examples.inputs - inputs) * std).flatten(1).norm(dim=1)
    for distance, found in zip(sides.abs().tolist(), moved.tolist(), strict=True):
        ball = radius
        while ball < distance:
            ball *= 2
        assert distance <= found <= distance + ball / 10 + 1e-9
    assert ((model.side(examples.inputs) < 0).long() == examples.labels).all()


def test_image_that_is_wrong_already_is_its_own_example():
    model, (inputs, _) = Linear(), images(6)
    labels = (model.side(inputs) >= 0).long()
    examples = adversarial.nearest(model, inputs, labels, SPEC, radius=0.04)
    assert examples.inputs.allclose(inputs, atol=1e-12)
    assert examples.labels.equal(1 - labels)
    assert model.calls == 1


def test_image_that_never_changes_its_answer_gets_its_likeliest_wrong_class(monkeypatch):
    monkeypatch.setattr(adversarial, "MAX_DOUBLINGS", 2)
    model, (inputs, std) = Linear(offset=100.0), images(3)
    examples = adversarial.nearest(
        model, inputs, torch.zeros(3, dtype=torch.int64), SPEC, radius=0.04
    )
    assert examples.labels.tolist() == [1, 1, 1]
    moved = ((examples.inputs - inputs) * std).flatten(1).norm(dim=1)
    assert moved.allclose(torch.full_like(moved, 0.08))


def test_pixels_of_examples_stay_in_their_range():
    model, (inputs, _) = Linear(offset=0.6), images(10)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (SPEC.mean, SPEC.std))
    labels = torch.zeros(10, dtype=torch.int64)
    pixels = adversarial.nearest(model, inputs, labels, SPEC, radius=0.5).inputs * std + mean
    assert pixels.min() >= -1e-9 and pixels.max() <= 1 + 1e-9
    assert (pixels < 1e-9).any() or (pixels > 1 - 1e-9).any()


def test_no_image_has_no_example():
    examples = adversarial.nearest(
        Linear(), torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.int64), SPEC, radius=0.1
    )
    assert len(examples.inputs) == len(examples.labels) == 0


def test_every_step_is_a_tenth_of_the_radius(monkeypatch):
    monkeypatch.setattr(adversarial, "MAX_DOUBLINGS", 1)
    monkeypatch.setattr(adversarial, "STEPS", 3)
    model, (inputs, std) = Linear(offset=100.0), images(3)
    examples = adversarial.nearest(
        model, inputs, torch.zeros(3, dtype=torch.int64), SPEC, radius=0.1
    )
    moved = ((examples.inputs - inputs) * std).flatten(1).norm(dim=1)
    assert moved.allclose(torch.full_like(moved, 0.03)) and model.calls == 4
