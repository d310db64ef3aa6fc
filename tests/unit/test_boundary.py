"""Boundary unlearning and its parts: adversarial steps, an additional class, and the end."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from small import CLASSES, SmallNet, run, small_job
from torch import nn

import unlearn
import utils
from models import adversarial, classifier

SPEC = utils.DataSpec(mean=(0.5, 0.25, 0.5), std=(0.5, 0.25, 1.0))


def linear(weights):
    """A network whose logits are ``weights`` times the three pixels of an image."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, len(weights), bias=False))
    network[1].weight.data = torch.tensor(weights)
    return network


def test_adversarial_step_is_one_pixel_step_against_the_label():
    # The loss of label 0 grows with the first pixel, falls with the second, ignores the third.
    network = linear([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    inputs = torch.zeros(1, 3, 1, 1)  # pixels ½, ¼, ½
    moved = adversarial.fgsm(network, inputs, torch.tensor([0]), 0.2, SPEC)
    assert moved.flatten().tolist() == pytest.approx([0.2 / 0.5, -0.2 / 0.25, 0])
    far = adversarial.fgsm(network, inputs, torch.tensor([0]), 0.9, SPEC)  # pixels 1, 0, ½
    assert far.flatten().tolist() == pytest.approx([1, -1, 0])
    back = adversarial.fgsm(network, inputs, torch.tensor([1]), 0.2, SPEC)
    assert back.equal(-moved) and not inputs.any()
    assert adversarial.fgsm(network, inputs[:0], torch.tensor([]).long(), 0.2, SPEC).shape[0] == 0


def test_added_class_has_small_random_weights_and_is_removed_again():
    model, before = SmallNet().eval(), SmallNet().state_dict()
    classifier.widen(model, CLASSES, torch.Generator().manual_seed(1))
    inputs = torch.randn(2, 3, 4, 4)
    assert model(inputs).shape == (2, CLASSES + 1)
    wide = model.state_dict()
    assert wide["4.weight"][:CLASSES].equal(before["4.weight"])
    assert wide["4.bias"][:CLASSES].equal(before["4.bias"])
    limit = 1 / math.sqrt(128)
    row = wide["4.weight"][CLASSES]
    assert limit / 2 < row.abs().max() <= limit and row.std() == pytest.approx(0.577 * limit, 0.2)
    assert wide["4.bias"].shape == (CLASSES + 1,)
    last = {}
    for seed in (1, 2, 3, 4):
        other = SmallNet()
        classifier.widen(other, CLASSES, torch.Generator().manual_seed(seed))
        last[seed] = other[4].weight[CLASSES], other[4].bias[CLASSES]
    assert last[1][0].equal(row) and last[1][1] == wide["4.bias"][CLASSES]
    assert not last[2][0].equal(row)
    biases = torch.stack([bias for _, bias in last.values()])
    assert biases.abs().max() <= limit and biases.min() < 0 < biases.max()
    assert classifier.narrow(model, CLASSES) is model and model[4].out_features == CLASSES
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    without_bias = nn.Sequential(nn.Linear(2, 3, bias=False))
    classifier.widen(without_bias, 3, torch.Generator())
    assert without_bias[0].weight.shape == (4, 2) and without_bias[0].bias is None


def test_network_without_a_linear_last_layer_gets_no_class():
    class Convolutional(nn.Sequential):
        def get_classifier(self):
            return self[0]

    for network in (Convolutional(nn.Conv2d(3, 5, 1)), nn.Sequential(nn.Linear(3, 4))):
        with pytest.raises(utils.UserError, match="the last layer of this network is "):
            classifier.widen(network, 5, torch.Generator())


def test_nearest_wrong_class_is_never_the_label():
    job = small_job("boundary_shrink", retain=9, forget=40, step_size=0.001)
    labels = job.data.train.labels[job.split.forget]
    assert unlearn.nearest_wrong_classes(job).ne(labels).all()


@pytest.mark.parametrize("name", ["delete", "boundary_shrink", "boundary_expand"])
def test_training_on_forget_images_alone_ends_when_they_are_forgotten(name):
    def epochs(stop_accuracy):
        records = []
        job = small_job(name, num_epochs=8, learning_rate=0.01, stop_accuracy=stop_accuracy)
        weights = run(replace(job, epoch_done=records.append))
        model = copy.deepcopy(job.model)
        model.load_state_dict(weights)
        forget = job.split.forget
        logits = model.eval()(job.data.train.inputs[forget])
        assert logits.shape[1] == CLASSES
        right = (logits.argmax(dim=1) == job.data.train.labels[forget]).float().mean().item()
        return len(records), right

    free, least = epochs(-1.0)
    assert free == 8
    count, right = epochs(max(least, 0.1))
    assert count <= 8 and least <= right <= max(least, 0.1)
    assert epochs(1.0)[0] == 1


def remembering_job(**settings):
    """A job whose forget images have the labels that the model gives them."""
    job = small_job("boundary_expand", retain=9, forget=40, num_epochs=8, **settings)
    forget = job.split.forget
    with torch.no_grad():
        answers = SmallNet().eval()(job.data.train.inputs[forget]).argmax(dim=1)
    job.data.train.labels[forget] = answers
    return job


def test_boundary_expanding_ends_with_the_shortest_step_that_forgets(monkeypatch):
    start, target = unlearn.copies(SmallNet()), 0.5

    def weights():
        return run(remembering_job(learning_rate=0.05, stop_accuracy=target))

    short = weights()
    monkeypatch.setattr(unlearn, "step_back", lambda job, *_: job.model)
    end = weights()
    job = remembering_job()

    def accuracy(share):
        between = {name: torch.lerp(start[name], end[name], share) for name in start}
        job.model.load_state_dict(between, strict=False)
        return unlearn.accuracies(job)["forget"]

    share = ((short["4.weight"] - start["4.weight"]) / (end["4.weight"] - start["4.weight"])).mean()
    steps = round(64 * share.item())
    assert steps == pytest.approx(64 * share.item(), abs=0.01) and 1 < steps < 64
    assert accuracy(steps / 64) <= target < accuracy((steps - 1) / 64)
    for name, weight in start.items():
        torch.testing.assert_close(short[name], torch.lerp(weight, end[name], steps / 64))


def test_boundary_expanding_ends_where_the_accuracy_is_the_target():
    records = []
    settings = {"learning_rate": 1e-9, "stop_accuracy": 1.0, "epoch_done": records.append}
    run(remembering_job(**settings))  # all forget images stay remembered
    assert len(records) == 1


@pytest.mark.parametrize("target", [0.0, -1.0])
def test_training_without_a_stop_is_not_stepped_back(target):
    job = remembering_job()
    start = unlearn.copies(job.model)
    forget = job.split.forget
    with torch.no_grad():
        for weight in job.model.parameters():
            weight.neg_()
        answers = job.model.eval()(job.data.train.inputs[forget]).argmax(dim=1)
    if target == 0:  # the end has forgotten every image, but may be the recipe of the authors
        job.data.train.labels[forget] = (answers + 1) % CLASSES
    end = unlearn.copies(job.model)
    assert unlearn.step_back(job, start, target) is job.model
    assert all(weight.equal(end[name]) for name, weight in job.model.named_parameters())
