"""The last layer of a network: its names, and a class that is added and removed."""

import math

import pytest
import torch
from small import CLASSES, SmallNet, run, small_job
from timm.models.levit import NormLinear
from torch import nn

from models import classifier
from models.errors import UserError
from models.resnet import ResNet18


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


def network_with(layer):
    model = nn.Sequential(nn.Flatten(), layer)
    model.get_classifier = lambda: layer
    return model


OTHERS = [nn.Conv2d(3, 5, 1), nn.Linear(3, 4), NormLinear(48, 5), nn.Linear(48, 5, bias=False)]


@pytest.mark.parametrize("layer", OTHERS, ids=lambda layer: type(layer).__name__)
def test_classifier_other_than_one_linear_layer_of_the_classes_is_refused(layer):
    model = network_with(layer)
    with pytest.raises(UserError, match=type(layer).__name__):
        classifier.widen(model, 5, torch.Generator())
    with pytest.raises(UserError, match=type(layer).__name__):
        classifier.last_layer(model, 5, required=True)
    assert classifier.last_layer(model, 5, required=False) == set()


def test_last_layer_has_the_parameters_of_the_classifier():
    for required in (False, True):
        assert classifier.last_layer(ResNet18(5, 4), 5, required=required) == {
            "fc.weight",
            "fc.bias",
        }
        assert classifier.last_layer(SmallNet(), 5, required=required) == {"4.weight", "4.bias"}


@pytest.mark.parametrize("name", ["FisherForgetting", "boundary_expand"])
def test_method_that_edits_the_classifier_of_a_class_is_refused_where_it_is_not_linear(name):
    def job_of(**settings):
        job = small_job(name, model=network_with(NormLinear(48, 5)), **settings)
        job.data.train.labels[:] = torch.arange(30) % 4
        return job

    job = job_of()
    if name == "FisherForgetting":
        run(job)  # random images: every tensor has the noise of hidden layers
    job = job_of(forget_class=4)
    job.data.train.labels[job.split.forget] = 4
    with pytest.raises(UserError, match="NormLinear"):
        run(job)
