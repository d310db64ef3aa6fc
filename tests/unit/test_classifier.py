"""A class is added to the last layer of a network, and removed."""

import math

import pytest
import torch
from small import CLASSES, SmallNet
from torch import nn

from models import classifier
from models.errors import UserError


def test_added_class_has_small_random_weights_and_is_removed_again():
    model, before, last = SmallNet().eval(), SmallNet().state_dict(), {}
    for seed in (1, 2, 3, 4):
        other = SmallNet()
        classifier.widen(other, CLASSES, torch.Generator().manual_seed(seed))
        last[seed] = other[4].weight[CLASSES], other[4].bias[CLASSES]
    classifier.widen(model, CLASSES, torch.Generator().manual_seed(1))
    wide, limit = model.state_dict(), 1 / math.sqrt(128)
    row, biases = wide["4.weight"][CLASSES], torch.stack([bias for _, bias in last.values()])
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, CLASSES + 1)
    assert wide["4.weight"][:CLASSES].equal(before["4.weight"])
    assert wide["4.bias"][:CLASSES].equal(before["4.bias"])
    assert limit / 2 < row.abs().max() <= limit and row.std() == pytest.approx(0.577 * limit, 0.2)
    assert last[1][0].equal(row) and last[1][1] == wide["4.bias"][CLASSES]
    assert not last[2][0].equal(row)
    assert biases.abs().max() <= limit and biases.min() < 0 < biases.max()
    classifier.narrow(model, CLASSES)
    assert model[4].out_features == CLASSES
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_layer_without_bias_gets_none():
    layer = nn.Linear(2, 3, bias=False)
    classifier.widen(layer, 3, torch.Generator())
    assert layer.weight.shape == (4, 2) and layer.bias is None


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 1), nn.Linear(3, 4)])
def test_network_without_a_linear_layer_of_its_classes_gets_no_class(layer):
    model = nn.Sequential(layer)
    model.get_classifier = lambda: layer
    with pytest.raises(UserError, match=type(layer).__name__):
        classifier.widen(model, 5, torch.Generator())
