"""Logits and features: batch sizes, modes and classifiers of every kind."""

import numpy as np
import pytest
import torch
from helpers import Shares, forks, run_two_processes
from small import SmallNet, images
from torch import nn

from models import inference


@pytest.fixture
def data():
    return images(23, seed=1)


INDICES = torch.tensor([5, 1, 8, 2, 22, 9, 0, 13, 4, 17, 3])


class TwoHeads(nn.Module):
    """A network with two classifiers, one of which sees doubled features."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(48, 5), nn.Linear(48, 5)])

    def get_classifier(self):
        return self.heads

    def forward(self, inputs):
        features = inputs.flatten(1)
        return self.heads[0](features) + self.heads[1](2 * features)


class Tokens(nn.Sequential):
    """A classifier that sees 3 tokens (N×T×F), whose logits are averaged afterwards."""

    def forward(self, inputs):
        return super().forward(inputs.flatten(2)).mean(dim=1)


class Positions(nn.Sequential):
    """A 1×1 convolution as the classifier, whose logits are averaged over the positions."""

    def get_classifier(self):
        return self[0]

    def forward(self, inputs):
        return super().forward(inputs).mean(dim=(2, 3))


class NeverCalls(nn.Linear):
    """A network that never calls its classifier, which it is itself, as a module."""

    def __call__(self, inputs):
        return inputs.flatten(1) @ self.weight.T


@forks
def test_features_on_two_processes_equal_those_on_one(data, tmp_path):
    network = TwoHeads()
    expected = inference.compute_features(network, data, INDICES)
    compute = lambda: inference.compute_features(network, Shares(data), INDICES, 2)  # noqa: E731
    for logits, labels, features in run_two_processes(compute, tmp_path):
        torch.testing.assert_close(logits, expected[0])
        torch.testing.assert_close(features, expected[2])
        assert labels.equal(data.labels[INDICES])


def test_features_of_two_classifiers_are_both_inputs(data):
    network = TwoHeads()
    logits, labels, features = inference.compute_features(network, data, INDICES, 4)
    assert not any(module._forward_pre_hooks for module in network.modules())
    flat = data.inputs[INDICES].flatten(1)
    assert features.equal(torch.cat([flat, 2 * flat], dim=1)) and logits.shape == (11, 5)
    assert labels.equal(data.labels[INDICES])


def test_features_of_tokens_and_positions_are_their_means(data):
    inputs = data.inputs[INDICES]
    _, _, features = inference.compute_features(Tokens(nn.Linear(16, 5)), data, INDICES, 4)
    torch.testing.assert_close(features, inputs.flatten(2).mean(dim=1))
    _, _, features = inference.compute_features(Positions(nn.Conv2d(3, 5, 1)), data, INDICES, 4)
    torch.testing.assert_close(features, inputs.mean(dim=(2, 3)))


@pytest.mark.parametrize(("side", "first"), [(64, 16), (100, 6), (200, 4)])
def test_default_batch_has_a_fixed_number_of_pixels_and_at_least_four_images(data, side, first):
    data.size = side
    inference.compute_logits(SmallNet(), data, torch.arange(23))
    assert len(data.uses[0][0]) == first


def test_logits_are_the_features_of_a_classifier_that_is_never_called(data):
    logits, _, features = inference.compute_features(NeverCalls(48, 5), data, INDICES, 4)
    assert features is logits


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_eval_mode_and_the_mode_is_restored(training, data):
    network = SmallNet().train(training)
    logits, labels = inference.compute_logits(network, data, INDICES, 4)
    assert {module.training for module in network.modules()} == {training}
    assert not logits.requires_grad and labels.equal(data.labels[INDICES])
    expected = network.eval()(data.inputs[INDICES])
    torch.testing.assert_close(logits, expected.detach())
    assert [indices for indices, _ in data.uses] == [
        INDICES[start : start + 4].tolist() for start in (0, 4, 8)
    ]


def test_logits_of_bf16_network_are_float32_on_the_cpu(data):
    network = SmallNet().bfloat16()
    data.inputs = data.inputs.bfloat16()
    logits, _, features = inference.compute_features(network, data, INDICES)
    assert logits.dtype == features.dtype == torch.float32 and logits.device.type == "cpu"


def test_nan_logits_name_the_number_of_images(data):
    network = SmallNet()
    data.inputs[INDICES[:3]] = torch.nan
    with pytest.raises(inference.NotFinite, match="NaN or infinite for 3 of 11 images"):
        inference.compute_logits(network, data, INDICES)


def test_classifier_is_that_of_timm_or_the_last_linear_layer():
    linear, other = nn.Linear(8, 3), nn.Linear(8, 3)
    network = nn.Sequential(nn.Linear(8, 8), linear, nn.ReLU())
    assert inference.classifier_layers(network) == [linear]
    for several in ([linear, other], (linear, other), nn.ModuleList([linear, other])):
        network.get_classifier = lambda several=several: several
        assert inference.classifier_layers(network) == [linear, other]
    network.get_classifier = lambda: other
    assert inference.classifier_layers(network) == [other]
    assert inference.classifier_layers(nn.Conv2d(3, 8, 1)) == []


# ---------------------------------------------------------------- logits.npz

LOGITS = {"train": torch.randn(7, 3), "held_out": torch.randn(4, 3), "weights": "w", "data": "d"}
SIZES = {"num_train": 7, "num_held_out": 4, "num_classes": 3}


def test_saved_logits_are_read_bit_for_bit(tmp_path):
    path = tmp_path / "logits.npz"
    inference.save_logits(path, **LOGITS)
    for weights in ("w", None):
        logits = inference.read_logits(path, **SIZES, data="d", weights=weights)
        assert logits.train.equal(LOGITS["train"]) and logits.held_out.equal(LOGITS["held_out"])
        assert (logits.weights, logits.data) == ("w", "d")
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npz"]


@pytest.mark.parametrize("other", [{"weights": "v", "data": "d"}, {"weights": "w", "data": "e"}])
def test_logits_of_other_weights_or_data_are_none(tmp_path, other):
    inference.save_logits(tmp_path / "logits.npz", **LOGITS)
    assert inference.read_logits(tmp_path / "logits.npz", **SIZES, **other) is None


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", None])
def test_unreadable_logits_name_the_file(tmp_path, content):
    path = tmp_path / "logits.npz"
    inference.save_logits(path, **LOGITS)
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(inference.UserError, match="logits.npz"):
        inference.read_logits(path, **SIZES, data="d")


def test_pickled_objects_are_refused(tmp_path):
    objects = np.array([None, "x"], object)
    np.savez(tmp_path / "logits.npz", train=objects, held_out=objects)
    with pytest.raises(inference.UserError, match="logits.npz: cannot be read .*pickle"):
        inference.read_logits(tmp_path / "logits.npz", **SIZES, data="d")


@pytest.mark.parametrize("name", SIZES)
def test_logits_of_other_sizes_name_file_and_array(tmp_path, name):
    inference.save_logits(tmp_path / "logits.npz", **LOGITS)
    with pytest.raises(inference.UserError, match=r"logits.npz: (train|held_out) .*5"):
        inference.read_logits(tmp_path / "logits.npz", **SIZES | {name: 5}, data="d")
