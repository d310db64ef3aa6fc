"""Importances of weights against autograd, one process against two."""

import pytest
import timm
import torch
from helpers import Shares, forks, run_two_processes
from small import ByHand, SmallNet, by_definition, images
from torch import nn
from torch.nn import functional as F

import models
from models import fisher

INDICES = torch.tensor([4, 29, 2, 17])


def head(channels):
    return [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(channels * 16, 5)]


class CalledTwice(nn.Sequential):
    """Calls its second layer twice."""

    def forward(self, images):
        return super().forward(self[1](self[0](images)))


def small_vit():
    return timm.create_model("test_vit", num_classes=5, img_size=4, patch_size=2)


NETWORKS = {
    "small": lambda: SmallNet(),
    # Its input hook has no batching rule; 16 channels get channels last.
    "resnet18": lambda: models.create_model("resnet18", 5, width=16),
    "vit": small_vit,
    "groups": lambda: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1, groups=3), *head(9)),
    "called twice": lambda: CalledTwice(
        nn.Identity(), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), *head(8)
    ),
}


def network(name):
    """A network in float64 with weights and statistics other than the initial ones."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    model(images(30, 1).inputs.double())  # changes the initial running statistics
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def double_images():
    data = images(30, 1)
    data.inputs = data.inputs.double()
    return data


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_diagonal_fisher_is_the_mean_squared_gradient_of_single_images(name, expected):
    model, data = network(name), double_images()
    scores = fisher.expected_scores if expected else fisher.observed_score
    actual = fisher.diagonal_fisher(model.train(), data, INDICES, scores, chunk=3)
    assert not any(module.training for module in model.modules())
    log_p, weights = lambda x: model(x).log_softmax(1), dict(model.named_parameters())
    labels = None if expected else data.labels[INDICES]
    reference = by_definition(log_p, weights, data.inputs[INDICES], labels)
    torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-12)


def test_scores_of_two_classes_by_hand():
    logits = torch.tensor([1.0, 3.0]).log()  # p = ¼ and ¾
    for label, expected in ((0, [0.75, -0.75]), (1, [-0.25, 0.25])):
        score = fisher.observed_score(logits, torch.tensor(label))
        torch.testing.assert_close(score, torch.tensor([expected]))
    rows = fisher.expected_scores(logits, torch.tensor(0))
    expected = torch.tensor([[0.375, -0.375], [-(0.75**0.5) / 4, 0.75**0.5 / 4]])
    torch.testing.assert_close(rows, expected)


def test_expected_scores_of_a_certain_network_keep_their_digits():
    logits = torch.tensor([0.0, 60.0, 0.0, 0.0, 0.0])
    rows, p = fisher.expected_scores(logits, None).double(), logits.double().softmax(0)
    expected = torch.diag(p) - p[:, None] * p
    # 1 − p of the likeliest class is 4e-26, far below the precision of float32 around one.
    expected[1, 1] = p[1] * p[[0, 2, 3, 4]].sum()
    torch.testing.assert_close(rows.T @ rows, expected, rtol=1e-4, atol=1e-40)


def test_batch_fisher_squares_the_mean_gradient_of_every_batch():
    data, model = images(30, 1), SmallNet().train()
    batches = torch.arange(30).split(12)
    actual = fisher.batch_fisher(model, data, batches)
    expected = ByHand(model).batch_fisher(data.inputs, data.labels, batches)
    assert not model.training and data.uses[-1] == ([*range(24, 30)], None)
    for name, square in expected.items():
        torch.testing.assert_close(actual[name].double(), square, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("chunk", [7, 64])
def test_mean_gradient_of_chunks_is_the_gradient_of_the_mean_loss(chunk):
    data, model = double_images(), SmallNet().double()
    actual = fisher.mean_gradient(model.train(), data, torch.arange(3, 30), chunk=chunk)
    assert not model.training
    loss = F.cross_entropy(model(data.inputs[3:]), data.labels[3:])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, tensor in zip(expected, actual.values(), strict=True):
        torch.testing.assert_close(tensor, gradient)


def dense_fisher(model, data):
    """The mean of g gᵀ over images as a matrix, from one backward pass per image."""
    rows = []
    for image, label in zip(data.inputs, data.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows).T @ torch.stack(rows) / len(rows)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def random_vector():
    return {name: w.detach().double() for name, w in SmallNet(3).named_parameters()}


@pytest.mark.parametrize("chunk", [7, 64])
def test_fisher_product_is_that_with_the_matrix(chunk):
    data, model, vector = double_images(), SmallNet().double(), random_vector()
    product = fisher.fisher_product(model.train(), data, torch.arange(30), vector, chunk=chunk)
    assert not model.training and all(labels is None for _, labels in data.uses)
    torch.testing.assert_close(flat(product), dense_fisher(model, data) @ flat(vector))


@forks
def test_results_on_two_processes_equal_those_on_one(tmp_path):
    """19 images in chunks of 3: the second process gets no image of the last chunk."""
    model, vector = SmallNet().double().eval(), random_vector()
    indices, batches = torch.arange(3, 22), torch.arange(3, 22).split(6)

    def results():
        shares = Shares(double_images())
        return [
            fisher.diagonal_fisher(model, shares, indices, fisher.observed_score, chunk=4),
            fisher.batch_fisher(model, shares, batches),
            fisher.mean_gradient(model, shares, indices, chunk=3),
            fisher.fisher_product(model, shares, indices, vector, chunk=3),
        ]

    alone = results()
    for together in run_two_processes(results, tmp_path):
        for of_two, of_one in zip(together, alone, strict=True):
            torch.testing.assert_close(flat(of_two), flat(of_one))
