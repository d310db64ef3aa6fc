"""Adversarial images, by hand and against the distance to the boundary of a linear classifier."""

import pytest
import torch
from small import SmallNet, images
from torch import nn

import utils
from models import adversarial

SPEC = utils.DataSpec(mean=(0.5, 0.4, 0.6), std=(0.2, 0.1, 0.15))
MEAN, STD = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (SPEC.mean, SPEC.std))


class Linear(nn.Module):
    """Two classes of 3×2×2 images; the boundary is a plane in the space of the pixels."""

    def __init__(self, offset=0.0):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.normal = torch.randn(3, 2, 2, generator=rng).double()
        self.normal /= self.normal.norm()
        self.offset, self.calls = offset, 0

    def side(self, inputs):
        return ((inputs * STD + MEAN - 0.5) * self.normal).sum((1, 2, 3)) + self.offset

    def forward(self, inputs):
        self.calls += 1
        side = self.side(inputs)
        return torch.stack([4 * side, torch.zeros_like(side)], dim=1)


def random_inputs(count):
    rng = torch.Generator().manual_seed(1)
    return (0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=rng).double() - MEAN) / STD


def nearest(model, inputs, labels, radius=0.04):
    """The nearest examples, and how far their pixels are from those of the images."""
    examples = adversarial.nearest(model, inputs, labels, SPEC, radius=radius)
    return examples, ((examples.inputs - inputs) * STD).flatten(1).norm(dim=1)


def test_fgsm_step_is_one_rounded_pixel_step_against_the_label():
    # The loss of label 0 grows with the first pixel, falls with the second, ignores the third.
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    network[1].weight.data = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    spec = utils.DataSpec(mean=(0.5, 0.25, 0.5), std=(0.5, 0.25, 1.0))
    inputs = torch.tensor([-0.2, -0.2, 0.1])[None, :, None, None]

    def moved_pixels(size, label):
        """In units of 1/255."""
        moved = adversarial.fgsm(network, inputs, torch.tensor([label]), size, spec).flatten()
        return (255 * (moved * torch.tensor(spec.std) + torch.tensor(spec.mean))).tolist()

    # The pixels are 102, 51 and 153 of 255, and 0.2 is 51. They stay in their range.
    assert moved_pixels(0.2, 0) == pytest.approx([153, 0, 153], abs=1e-3)
    assert moved_pixels(0.2, 1) == pytest.approx([51, 102, 153], abs=1e-3)
    assert moved_pixels(0.9, 0) == pytest.approx([255, 0, 153], abs=1e-3)
    assert moved_pixels(0.1, 0) == pytest.approx([128, 26, 153], abs=0.51)  # 127.5 and 25.5
    assert moved_pixels(0.101, 0) == pytest.approx([128, 25, 153], abs=1e-3)  # rounded
    assert inputs.flatten().tolist() == pytest.approx([-0.2, -0.2, 0.1])


@pytest.mark.parametrize("radius", [0.01, 0.04])
def test_nearest_example_is_just_beyond_the_boundary(radius):
    model, inputs = Linear(), random_inputs(40)
    sides = model.side(inputs)
    labels = (sides < 0).long()
    examples, moved = nearest(model, inputs, labels, radius)
    assert len(labels.unique()) == 2
    assert examples.labels.equal(1 - labels)
    for distance, length in zip(sides.abs().tolist(), moved.tolist(), strict=True):
        ball = radius
        while ball < distance:
            ball *= 2
        assert distance <= length <= distance + ball / 10 + 1e-9
    assert ((model.side(examples.inputs) < 0).long() == examples.labels).all()


def test_image_that_is_wrong_already_is_its_own_example():
    model, inputs = Linear(), random_inputs(6)
    labels = (model.side(inputs) >= 0).long()
    examples, moved = nearest(model, inputs, labels)
    assert moved.max() < 1e-12 and examples.labels.equal(1 - labels) and model.calls == 1


def test_image_that_is_never_wrong_ends_on_the_last_ball(monkeypatch):
    """Steps are a tenth of the radius 0.04, which doubles, and the search goes on where it was. The
    label is the likeliest wrong one. The example is the last image that passed the network.
    """
    assert adversarial.STEPS == 50
    rows = ((2, 20, 0.08, 40), (1, 3, 0.008, 3), (2, 3, 0.012 + 2 * 0.008, 6), (3, 1, 0.012, 3))
    for doublings, steps, length, calls in rows:
        monkeypatch.setattr(adversarial, "MAX_DOUBLINGS", doublings)
        monkeypatch.setattr(adversarial, "STEPS", steps)
        model = Linear(offset=100.0)
        examples, moved = nearest(model, random_inputs(3), torch.tensor([0, 0, 0]))
        assert examples.labels.tolist() == [1, 1, 1] and model.calls == calls
        assert moved.allclose(torch.full_like(moved, length))


def test_pixels_of_examples_stay_in_their_range():
    examples, _ = nearest(Linear(0.6), random_inputs(10), torch.zeros(10).long(), radius=0.5)
    pixels = examples.inputs * STD + MEAN
    assert pixels.min() > -1e-9 and pixels.max() < 1 + 1e-9
    assert (pixels < 1e-9).any() or (pixels > 1 - 1e-9).any()


def test_examples_of_a_data_set_are_computed_in_chunks_in_eval_mode():
    model, data, indices = SmallNet().train(), images(30, 1), torch.tensor([4, 17, 2, 29, 8])
    all_images = data.inputs[indices], data.labels[indices], data.spec
    whole = adversarial.nearest(SmallNet().eval(), *all_images, radius=0.3)
    chunks = adversarial.adversarial_examples(model, data, indices, 0.3, chunk=2)
    torch.testing.assert_close(chunks.inputs, whole.inputs)
    assert chunks.labels.equal(whole.labels) and not model.training
    assert [len(batch) for batch, _ in data.uses] == [2, 2, 1]
