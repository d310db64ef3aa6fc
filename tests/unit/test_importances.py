"""Importances of weights, and masks: every layer against autograd, one process against two."""

import pytest
import torch
from small import ByHand, SmallNet, by_definition, small_job
from torch import nn
from torch.nn import functional as F
from turns import Processes, Shares

import models
import unlearn
import utils
from models import checkpoint, distributed, fisher


def head(channels, side):
    return [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(channels * side * side, 5)]


NETWORKS = {
    "strides, dilation and padding": lambda: [
        nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        *head(8, 4)[:2],
        nn.LazyLinear(5),
    ],
    "no bias": lambda: [
        nn.Conv2d(3, 8, 1, bias=False),
        *head(8, 4)[:2],
        nn.Linear(128, 5, bias=False),
    ],
    "normalisation without a bias": lambda: [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        *head(8, 4),
    ],
    "an outer product at one position": lambda: [nn.Conv2d(3, 8, 4), *head(8, 1)],
    "two linear layers": lambda: [nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 5)],
}
OTHERS = {
    "groups": lambda: [nn.Conv2d(3, 9, 3, padding=1, groups=3), *head(9, 4)],
    "same padding": lambda: [nn.Conv2d(3, 8, 3, padding="same"), *head(8, 4)],
    "reflected padding": lambda: [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        *head(8, 4),
    ],
    "layer normalisation": lambda: [nn.LayerNorm([3, 4, 4]), *head(3, 4)],
    "BatchNorm of vectors": lambda: [nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5)],
}


def network(layers):
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    model(small_job("ssd").data.train.inputs)  # changes the initial running statistics
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("layers", [*NETWORKS, *OTHERS])
def test_importances_are_the_mean_squared_gradients_of_single_images(layers, expected):
    model, data = network((NETWORKS | OTHERS)[layers]()), small_job("ssd").data.train
    assert fisher._knows_layers(model) == (layers in NETWORKS)
    indices = torch.tensor([4, 9, 2, 17, 5, 11, 29])
    scores = fisher.expected_scores if expected else fisher.observed_score
    actual = fisher.diagonal_fisher(model.train(), data, indices, scores, chunk=3)
    reference = by_definition(model.eval(), data.inputs[indices], data.labels[indices], expected)
    assert actual.keys() == reference.keys()
    for name, square in reference.items():
        torch.testing.assert_close(actual[name], square, rtol=1e-3, atol=1e-6 * square.max().item())
    assert not any(module._forward_hooks for module in model.modules())


class CalledTwice(nn.Module):
    """A network that calls one convolution twice and another never."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.never, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, images):
        features = self.twice(self.twice(self.first(images)).relu())
        return self.last(features.mean(dim=(2, 3)))


def test_importances_of_layer_called_twice_or_never_equal_autograd():
    torch.manual_seed(0)
    model, data = CalledTwice().eval(), small_job("ssd").data.train
    indices = torch.tensor([4, 9, 2])
    fisher_information = fisher.diagonal_fisher(model, data, indices, fisher.observed_score)
    expected = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for index in indices:
        logits = model(data.inputs[index][None])
        model.zero_grad()
        F.cross_entropy(logits, data.labels[index][None]).backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                expected[name] += weight.grad**2 / 3
    assert expected["twice.weight"].any() and not expected["never.weight"].any()
    for name, square in expected.items():
        torch.testing.assert_close(fisher_information[name], square, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_known_layers_take_one_backward_pass_for_all_images(name, monkeypatch):
    """One backward pass per image would take several times as long for ResNet-18."""

    def image_by_image(*arguments, **options):
        raise AssertionError("the layers are known")

    monkeypatch.setattr(fisher, "_functional_squares", image_by_image)
    model = SmallNet() if name == "small" else models.create_model("resnet18", 5, width=8)
    indices = torch.tensor([4, 9, 2])
    data = small_job("ssd").data.train
    information = fisher.diagonal_fisher(model, data, indices, fisher.expected_scores)
    assert all(square.any() for square in information.values())


def test_batch_norm_without_running_statistics_is_not_a_known_layer():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *head(3, 4))
    assert not fisher._knows_layers(model)
    assert fisher._knows_layers(nn.Sequential(nn.BatchNorm2d(3), *head(3, 4)))


def test_scores_of_two_classes_by_hand():
    logits = torch.tensor([1.0, 3.0]).log()  # p = ¼ and ¾
    for label, expected in ((0, [0.75, -0.75]), (1, [-0.25, 0.25])):
        score = fisher.observed_score(logits, torch.tensor(label))
        torch.testing.assert_close(score, torch.tensor([expected]))
    # diag(p) − ppᵀ = [[3, −3], [−3, 3]] / 16, of rank one
    (row,) = fisher.expected_scores(logits, torch.tensor(0))
    torch.testing.assert_close(row[:, None] * row, torch.tensor([[3.0, -3.0], [-3.0, 3.0]]) / 16)


def test_expected_scores_of_a_certain_network_keep_their_digits():
    logits = torch.tensor([0.0, 60.0, 0.0, 0.0, 0.0])
    rows, p = fisher.expected_scores(logits, None), logits.double().softmax(0)
    assert rows.shape == (4, 5)
    # 1 − p of the likeliest class is 4e-26, far below the precision of float32 around one.
    product, expected = rows.double().T @ rows.double(), torch.diag(p) - p[:, None] * p
    expected[1, 1] = p[1] * p[[0, 2, 3, 4]].sum()
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-40)


def test_model_after_importances_is_in_eval_mode_without_hooks():
    job = small_job("ssd")
    job.model.train()
    fisher.diagonal_fisher(job.model, job.data.train, torch.arange(5), fisher.observed_score, 2)
    assert not any(module.training for module in job.model.modules())
    assert [len(indices) for indices, _ in job.data.train.uses] == [2, 2, 1]


def test_importances_on_gpu_are_the_same_sums(monkeypatch):
    class OnGPU(torch.Tensor):
        """A CPU tensor whose is_cuda is true."""

        is_cuda = True

    rng = torch.Generator().manual_seed(0)
    columns, gradient = torch.randn(6, 4, 9, generator=rng), torch.randn(6, 3, 9, generator=rng)
    expected = torch.einsum("bwp,bcp->bwc", columns, gradient).square().sum(0)
    for kind in (torch.Tensor, OnGPU):
        total = torch.ones(4, 3)
        fisher._add_squared_products(total, columns, gradient.as_subclass(kind))
        torch.testing.assert_close(total, 1 + expected)


@pytest.mark.parametrize("positions", [1, 2, 3])
def test_importances_of_few_positions_are_squared_sums_of_each_image(positions):
    rng = torch.Generator().manual_seed(0)
    columns = torch.randn(6, 4, positions, generator=rng)
    gradient = torch.randn(6, 3, positions, generator=rng)
    total = torch.ones(4, 3)
    fisher._add_squared_products(total, columns, gradient)
    expected = torch.einsum("bwp,bcp->bwc", columns, gradient).square().sum(0)
    torch.testing.assert_close(total, 1 + expected)


# ---------------------------------------------------------------- simulated processes


@pytest.mark.parametrize("world", [2, 3])
def test_importances_on_several_processes_equal_those_on_one(world, monkeypatch):
    model, data = SmallNet(), small_job("ssd").data.train
    indices = torch.arange(3, 28)
    alone = fisher.diagonal_fisher(model, data, indices, fisher.observed_score)
    shares = Shares(data)
    together = Processes(monkeypatch, world).run(
        lambda: fisher.diagonal_fisher(model, shares, indices, fisher.observed_score, chunk=4)
    )
    assert set(shares.seen) <= {4 * world, len(indices) % (4 * world)}
    for actual in together:
        for name, square in alone.items():
            torch.testing.assert_close(actual[name], square, rtol=1e-4, atol=1e-7)


def test_mask_on_two_processes_equals_that_on_one(monkeypatch):
    job = small_job("salun", forget=25, mask_ratio=0.21)
    alone = unlearn.saliency_mask(job)
    job.data.train = Shares(job.data.train)
    for masks in Processes(monkeypatch, 2).run(lambda: unlearn.saliency_mask(job)):
        assert all(mask.equal(alone[name]) for name, mask in masks.items())


@pytest.mark.parametrize("world", [2, 3])
def test_fisher_gradients_on_several_processes_equal_those_on_one(world, monkeypatch):
    """With 19 images in chunks of 3, the last chunk has fewer images than there are processes."""
    job, vector = small_job("IU"), dict(SmallNet(3).named_parameters())
    vector = {name: tensor.detach() for name, tensor in vector.items()}
    arguments = job.model.eval(), Shares(job.data.train), job.split.retain

    def products():
        gradient = fisher.mean_gradient(*arguments, torch.Generator(), chunk=3)
        product = fisher.fisher_product(*arguments, vector, torch.Generator(), chunk=3)
        batches = job.split.retain.split(6)
        importances = fisher.batch_fisher(*arguments[:2], batches, torch.Generator())
        return (
            gradient
            | {f"product {name}": tensor for name, tensor in product.items()}
            | {f"importance {name}": tensor for name, tensor in importances.items()}
        )

    alone = products()
    for together in Processes(monkeypatch, world).run(products):
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_retain", [0, 1, 4, 5, 6])
def test_outputs_of_another_network_are_those_of_the_named_set(world, num_retain, monkeypatch):
    job, network = small_job("teacher"), SmallNet(7).eval()
    indices = torch.tensor([4, 9, 2, 17, 5, 11])
    inputs = job.data.train.inputs[indices]
    expected = ByHand(network).logits(inputs).detach().float()

    def answers():
        batch = unlearn.Batch(
            indices,
            job.data.train.labels[indices],
            num_retain,
            distributed.local_rows(inputs),
            torch.zeros(6, 5),
        )
        return batch.outputs_of(network, "retain"), batch.outputs_of(network, "forget")

    for retain, forget in Processes(monkeypatch, world).run(answers):
        torch.testing.assert_close(retain, expected[:num_retain])
        torch.testing.assert_close(forget, expected[num_retain:])
        assert not retain.requires_grad and not forget.requires_grad


@pytest.mark.parametrize("world", [2, 3])
def test_mean_gradient_on_several_processes_equals_that_on_one(world, monkeypatch):
    def gradients():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        job = small_job("ga_plus", num_epochs=1, batch_size=64, model=model, quiet=True)
        job.data.train = Shares(job.data.train)
        step_gradients = []

        def loss(batch):
            return unlearn.cross_entropy(*batch.retain) - 0.3 * unlearn.cross_entropy(*batch.forget)

        def before_step(batch):
            parameters = job.model.parameters()
            step_gradients.append([parameter.grad.clone() for parameter in parameters])

        unlearn.train(job, loss, unlearn.PARTS, before_step=before_step)
        return step_gradients[0]

    alone, wrapped, synchronised = gradients(), [], []

    def wrap(network, **options):
        wrapped.append(options)
        return network

    monkeypatch.setattr(unlearn, "DistributedDataParallel", wrap)
    monkeypatch.setattr(distributed, "synchronise_batch_norm", synchronised.append)
    together = Processes(monkeypatch, world).run(gradients)
    for tensors, gradient in zip(zip(*together, strict=True), alone, strict=True):
        torch.testing.assert_close(sum(tensors) / world, gradient)
    # Each process has the running statistics of all images, so none are sent.
    assert {str(options) for options in wrapped} == {"{'broadcast_buffers': False}"}
    assert len(synchronised) == len(wrapped)


def test_network_is_not_called_without_images():
    def network(inputs):
        raise AssertionError("called")

    batch = unlearn.Batch(
        torch.arange(2), torch.zeros(2).long(), 2, torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)
    )
    assert batch.outputs_of(network, "forget").shape == (0, 5)


# ---------------------------------------------------------------- masks


def test_mask_selects_largest_gradients_over_all_layers():
    for ratio, count in ((0.0, 0), (0.1, 88), (1.0, 885)):
        job = small_job("salun", mask_ratio=ratio)
        masks = unlearn.saliency_mask(job)
        assert sum(mask.sum().item() for mask in masks.values()) == count
        shapes = {name: weight.shape for name, weight in job.model.named_parameters()}
        assert all(mask.shape == shapes[name] for name, mask in masks.items())


def test_mask_with_several_passes_equals_mask_of_mean_gradient(monkeypatch):
    job = small_job("salun", forget=1100, batch_size=512, mask_ratio=0.3)
    masks = unlearn.saliency_mask(job)
    forget, train = job.split.forget, job.data.train
    assert [len(indices) for indices, _ in train.uses] == [512, 512, 76]
    net = ByHand(job.model)
    loss = -net.log_p(train.inputs[forget])[range(1100), train.labels[forget]].mean()
    sizes = {name: gradient.abs() for name, gradient in net.gradients(loss).items()}
    all_sizes = torch.cat([size.flatten() for size in sizes.values()])
    least = all_sizes.sort(descending=True).values[264]
    differences = [(masks[name] != (size >= least)).sum().item() for name, size in sizes.items()]
    assert sum(differences) <= 2  # float32 may swap two nearly equal gradients


@pytest.mark.parametrize("change", [lambda mask: mask.pop("4.bias"), dict.clear])
def test_mask_of_fewer_weights_is_refused(change, tmp_path):
    mask = unlearn.saliency_mask(small_job("salun", mask_ratio=0.3))
    change(mask)
    checkpoint.save(tmp_path / "mask.pth", mask, {})
    with pytest.raises(utils.UserError, match="mask"):
        unlearn.read_mask(tmp_path / "mask.pth", SmallNet())


def test_mask_of_more_weights_is_refused(tmp_path):
    mask = unlearn.saliency_mask(small_job("salun", mask_ratio=0.3))
    mask["5.weight"] = mask["4.weight"]
    checkpoint.save(tmp_path / "mask.pth", mask, {})
    with pytest.raises(utils.UserError, match="not a mask of this network: 5.weight"):
        unlearn.read_mask(tmp_path / "mask.pth", SmallNet())
