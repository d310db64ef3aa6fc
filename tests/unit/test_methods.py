"""One step of every method on a tiny linear model, worked out by hand, and common properties."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import flags
from small import by_definition, run, small_job, training_steps
from torch import nn
from torch.nn import functional as F

import unlearn
import unlearn_cpu
import utils
from models import fisher
from models.resnet import ResNet18

LN3 = math.log(3)


class Vectors:
    """Stands for Images: plain vectors that nothing augments."""

    size = 1

    def __init__(self, inputs, labels):
        self.inputs, self.labels = torch.tensor(inputs), torch.tensor(labels)

    def batches(self, parts, augment=None):
        return (self.inputs[part] for part in parts)


def linear_job(
    name, weights, *, inputs=((1.0, 0.0), (0.0, 1.0)), labels=(0, 0), weight_decay=0.0, **given
):
    """A job on two classes, one retain and one forget image. The logits are weights · image."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor(weights)
    vectors = Vectors(inputs, labels)
    data = SimpleNamespace(train=vectors, held_out=vectors, classes=["a", "b"])
    nothing = torch.empty(0, dtype=torch.int64)
    split = utils.Split(
        torch.tensor([0]),
        torch.tensor([1]),
        nothing,
        torch.tensor([0]),
        torch.tensor([0]),
        nothing,
        nothing,
    )
    recipe = unlearn.Recipe(given.pop("num_epochs", 1), 0.1, weight_decay=weight_decay)
    epoch_done = given.pop("epoch_done", lambda record: None)
    untrained = nn.Linear(2, 2, bias=False)
    untrained.weight.data.zero_()
    return unlearn.Job(
        name=name,
        label=name,
        model=model,
        data=data,
        split=split,
        recipe=recipe,
        seed=1,
        options=unlearn.METHODS[name].options | given,
        new_model=lambda: untrained,
        epoch_done=epoch_done,
    )


def weight_after(job):
    return run(job)["weight"]


def caught(job, monkeypatch):
    """What the method hands to the loop, without running it: (loss, keyword arguments)."""
    calls = []
    monkeypatch.setattr(
        unlearn, "train", lambda job, loss, *parts, **keywords: calls.append((loss, keywords))
    )
    unlearn.METHODS[job.name].run(job)
    return calls[0]


def batch(job, logits, indices, num_retain):
    indices = torch.tensor(indices)
    return unlearn.Batch(
        indices,
        job.data.train.labels[indices],
        num_retain=num_retain,
        inputs=job.data.train.inputs[indices],
        logits=torch.tensor(logits),
    )


ZERO = ((0.0, 0.0), (0.0, 0.0))


# ---------------------------------------------------------------- one step of each


@pytest.mark.parametrize("name", ["finetune", "retrain"])
def test_finetune_and_retrain_descend_on_the_retained_image_alone(name):
    # p = (½, ½): the gradient is (p − e₀)·xᵀ with x = (1, 0)
    assert weight_after(linear_job(name, ZERO)).tolist() == [
        pytest.approx([0.05, 0]),
        pytest.approx([-0.05, 0]),
    ]


def test_retrain_starts_from_the_untrained_network():
    assert weight_after(linear_job("retrain", ((5.0, 5.0), (5.0, 5.0)))).abs().max() < 0.1


def test_random_labels_descend_towards_the_wrong_label():
    # Mean over two images. The target of the forget image (0, 1) of class 0 is class 1.
    assert weight_after(linear_job("RL", ZERO)).tolist() == [
        pytest.approx([0.025, -0.025]),
        pytest.approx([-0.025, 0.025]),
    ]


def test_gradient_ascent_ascends():
    assert weight_after(linear_job("GA", ZERO)).tolist() == [
        pytest.approx([0, -0.05]),
        pytest.approx([0, 0.05]),
    ]


def test_gradient_ascent_ends_when_the_images_are_forgotten():
    records = []
    weights = ((0.0, 0.12), (0.0, 0.0))
    run(linear_job("GA", weights, num_epochs=50, stop_accuracy=0.5, epoch_done=records.append))
    assert [record["forget_acc"] for record in records] == [1.0, 0.0]
    weights = torch.tensor(((0.0, 9.0), (0.0, 0.0)))
    assert (
        weight_after(linear_job("GA", weights.tolist(), num_epochs=3, stop_accuracy=1.0))
        .sub(weights)
        .abs()
        .max()
        > 0
    )


def test_neggrad_plus_descends_on_one_and_ascends_on_the_other():
    weights = weight_after(linear_job("ga_plus", ZERO, forget_weight=0.5))
    assert weights.tolist() == [pytest.approx([0.05, -0.025]), pytest.approx([-0.05, 0.025])]


def test_the_teacher_has_two_targets(monkeypatch):
    job = linear_job("teacher", ((LN3, 0.0), (0.0, 0.0)))
    loss, _ = caught(job, monkeypatch)
    # Original on the retained image: (¾, ¼). Untrained network on the forget image: (½, ½).
    assert loss(batch(job, [[LN3, 0.0], [0.0, 0.0]], [0, 1], 1)).item() == pytest.approx(
        0, abs=1e-7
    )
    to_half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss(batch(job, [[LN3, 0.0], [LN3, 0.0]], [0, 1], 1)).item() == pytest.approx(
        to_half / 2
    )
    to_original = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss(batch(job, [[0.0, 0.0], [0.0, 0.0]], [0, 1], 1)).item() == pytest.approx(
        to_original / 2
    )


def test_one_step_of_the_teacher():
    # Forget image: the student's (¾, ¼) minus its target (½, ½) is (¼, −¼), over two images.
    weights = weight_after(linear_job("teacher", ((0.0, LN3), (0.0, 0.0))))
    assert weights.tolist() == [pytest.approx([0, LN3 - 0.0125]), pytest.approx([0, 0.0125])]


def test_distance_is_softened_by_the_temperature():
    actual = unlearn.distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * LN3, 0.0]]), 2.0)
    assert actual.item() == pytest.approx(
        4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    )


def test_scrub_maximises_first_and_minimises_after(monkeypatch):
    job = linear_job("scrub", ((LN3, LN3), (0.0, 0.0)), msteps=2, kd_T=1.0, beta=0.5, gamma=2.0)
    loss, keywords = caught(job, monkeypatch)
    steps = {
        epoch: [(i.tolist(), n) for i, n in keywords["schedule"](epoch)] for epoch in (1, 2, 3)
    }
    assert steps[1] == steps[2] == [([1], 0), ([0], 1)] and steps[3] == [([0], 1)]
    to_original = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss(batch(job, [[0.0, 0.0]], [1], 0)).item() == pytest.approx(-to_original)
    expected = 0.5 * to_original + 2 * math.log(2)
    assert loss(batch(job, [[0.0, 0.0]], [0], 1)).item() == pytest.approx(expected)


def test_salun_moves_the_salient_weights_and_no_bit_of_the_others():
    weights = ((0.3, -0.2), (0.1, 0.7))
    # The forget image (2, 1) has gradients twice as large on the first column.
    job = linear_job(
        "salun", weights, inputs=((1.0, 1.0), (2.0, 1.0)), num_epochs=3, weight_decay=0.1
    )
    after, before = weight_after(job), torch.tensor(weights)
    assert job.by_products["saliency_mask.pth"]["weight"].tolist() == [[True, False], [True, False]]
    assert after[:, 1].equal(before[:, 1]) and not (after[:, 0] == before[:, 0]).any()


def test_one_step_of_salun_is_one_of_random_labels_on_its_weights():
    job = linear_job("salun", ZERO, inputs=((1.0, 1.0), (2.0, 1.0)))
    # Gradients of class 0: retain −½·(1, 1), forget ½·(2, 1), mean (¼, 0). The mask leaves (¼, –).
    assert weight_after(job).tolist() == [pytest.approx([-0.025, 0]), pytest.approx([0.025, 0])]


def test_ssd_dampens_by_the_ratio_of_the_importances():
    forget, overall = torch.tensor([4.0, 1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert unlearn.dampening(forget, overall, 2.0, 1.0).tolist() == pytest.approx(
        [1 / 4, 1, 1 / 3, 1]
    )
    assert unlearn.dampening(forget, overall, 3.5, 0.5).tolist() == pytest.approx([1 / 8, 1, 1, 1])
    assert unlearn.dampening(forget, overall, 2.0, 8.0).tolist() == [1, 1, 1, 1]


def test_ssd_on_the_linear_model():
    # p = (½, ½) on both images. I_f = ¼ on the second column, I_D = ⅛ on each: a ratio of 2.
    job = linear_job("ssd", ZERO, selection_weighting=1.5, importances="image")
    job.model.weight.data += 1
    assert weight_after(job).tolist() == [[1, 0.5], [1, 0.5]]
    # The mean gradient of both images is half of each one's: I_f = ¼, I_D = 1/16, a ratio of 4.
    job = linear_job("ssd", ZERO, selection_weighting=3.5)
    job.model.weight.data += 1
    assert weight_after(job).tolist() == [[1, 0.25], [1, 0.25]]


def test_sfron_weighs_the_remembered_images_more():
    logits = torch.tensor(
        [[0.0, 0.0], [0.0, LN3]], requires_grad=True
    )  # losses ln 2 and ln 4 of label 0
    loss = unlearn.adaptive_cross_entropy(logits, torch.tensor([0, 0]), 1.0)
    # Weights ∝ 1, ½, of mean 1: 4/3 and 2/3.
    assert loss.item() == pytest.approx((4 / 3 * math.log(2) + 2 / 3 * math.log(4)) / 2)
    loss.backward()
    assert logits.grad[:, 0].tolist() == pytest.approx([4 / 3 * -0.5 / 2, 2 / 3 * -0.75 / 2])
    assert unlearn.adaptive_cross_entropy(
        logits, torch.tensor([0, 0]), 0.0
    ).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    sure = torch.tensor([[200.0, 0.0], [0.0, 0.0]])
    assert unlearn.adaptive_cross_entropy(sure, torch.tensor([0, 0]), 0.5).isfinite()


def test_sfron_takes_turns_and_confines_the_ascent_to_salient_weights(monkeypatch):
    job = linear_job("sfron", ZERO, ascent=3.0, num_epochs=2)
    loss, keywords = caught(job, monkeypatch)
    assert [(i.tolist(), n) for i, n in keywords["schedule"](1)] == [([1], 0), ([0], 1)]
    ascent = batch(job, [[0.0, 0.0]], [1], 0)
    assert loss(ascent).item() == pytest.approx(
        -3 * math.log(2)
    )  # before the first repair: the full weight
    assert loss(batch(job, [[0.0, 0.0]], [0], 1)).item() == pytest.approx(math.log(2))
    assert loss(ascent).item() == pytest.approx(
        -1.5 * math.log(2)
    )  # half-way: the cosine has halved it
    job.model.weight.grad = torch.full((2, 2), 10.0)
    keywords["before_step"](ascent)
    # Only the second column matters more for the forget image; the norm √200 is clipped to 7.
    assert job.model.weight.grad.tolist() == [pytest.approx([0, 7 / 2**0.5])] * 2
    job.model.weight.grad = torch.full((2, 2), 10.0)
    keywords["before_step"](batch(job, [[0.0, 0.0]], [0], 1))
    assert job.model.weight.grad.eq(10).all()


def test_sfron_takes_weights_of_equal_importance_for_salient(monkeypatch):
    job = linear_job("sfron", ((0.3, 0.0), (0.0, 0.2)), inputs=((1.0, 0.0), (1.0, 0.0)))
    _, keywords = caught(job, monkeypatch)
    job.model.weight.grad = torch.full((2, 2), 1.0)
    keywords["before_step"](batch(job, [[0.0, 0.0]], [1], 0))
    assert job.model.weight.grad.eq(1).all()


def test_fisher_noise_is_larger_where_the_retain_images_care_less():
    fisher = torch.tensor([1.0, 0.25, 0.0])  # of one dimension: ten times the variance
    variance = unlearn.fisher_noise_variance(fisher, 1e-4, is_last=False)
    assert variance.tolist() == pytest.approx([1e-3, 4e-3, 1], rel=1e-5)
    last = unlearn.fisher_noise_variance(fisher, 1e-4, is_last=True)
    assert last.tolist() == pytest.approx([1e-3, 4e-3, 0.1], rel=1e-5)
    # Means over the inputs of each output: (1 + 4) / 2 and (1000 + 2) / 2.
    weights = torch.tensor([[1.0, 0.25], [0.0, 0.5]])
    variance = unlearn.fisher_noise_variance(weights, 1e-4, is_last=False)
    expected = [pytest.approx([2.5e-4] * 2, rel=1e-5), pytest.approx([5.01e-2] * 2, rel=1e-5)]
    assert variance.tolist() == expected
    last = unlearn.fisher_noise_variance(weights, 1e-4, is_last=True)
    assert last.tolist() == [pytest.approx([2.5e-3] * 2), pytest.approx([5.1e-2] * 2)]


# ---------------------------------------------------------------- importances


class Tokens(nn.Module):
    """A network with a layer that only torch.func knows."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 10)

    def forward(self, images):
        return self.last(self.norm(self.first(images.mean(1).flatten(1))))


class ActivatedNorm(nn.BatchNorm2d):
    """A BatchNorm that does more than its class says, as timm has them."""

    def forward(self, images):
        return super().forward(images).relu() ** 2


class Activated(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), ActivatedNorm(4), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("network", [partial(ResNet18, 10, 8), Tokens, Activated])
@pytest.mark.parametrize("expected", [False, True])
def test_the_diagonal_of_fisher_is_that_of_autograd_per_sample(network, expected, digits):
    torch.manual_seed(0)
    model = network().train()
    model(digits.train.batch(torch.arange(100)))  # running statistics other than those at the start
    scores = fisher.expected_scores if expected else fisher.observed_score
    actual = fisher.diagonal_fisher(model, digits.train, torch.arange(10), scores, chunk=4)
    reference = by_definition(
        model.eval(), digits.train.batch(torch.arange(10)), digits.train.labels[:10], expected
    )
    assert actual.keys() == reference.keys()
    for name, square in reference.items():
        torch.testing.assert_close(actual[name], square, rtol=1e-3, atol=1e-6 * square.max().item())


@pytest.mark.parametrize(
    "logits", [[1.0, 0.0, -2.0], [0.0, 0.0], [-9.0, 1.0, 12.0, -30.0], [16.0, 0.0, 0.0, -3.0]]
)
def test_rows_of_the_expected_scores_make_the_fisher_of_the_logits(logits):
    """Also to the last digits where a class is nearly certain, as for most training images."""
    rows, p = (
        fisher.expected_scores(torch.tensor(logits), torch.tensor(0)),
        torch.tensor(logits).double().softmax(0),
    )
    assert rows.shape == (len(logits) - 1, len(logits))
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(rows.double().T @ rows.double(), expected, rtol=2e-6, atol=1e-12)


# ---------------------------------------------------------------- all of them


def same(first, second):
    return all(first[name].equal(tensor) for name, tensor in second.items())


@pytest.mark.parametrize("label", unlearn_cpu.METHODS)
def test_lamda_zero_is_exactly_the_base_method(label):
    base, zero, half = (run(small_job(label, lamda=lamda)) for lamda in (None, 0.0, 0.5))
    assert same(base, zero) and not same(base, half)


def test_cpu_variants_are_those_trained_by_gradient_steps_on_a_bounded_loss():
    without = set(unlearn.METHODS) - {name.removeprefix("cpu_") for name in unlearn_cpu.METHODS}
    assert without == {"GA", "FisherForgetting", "ssd"}


@pytest.mark.parametrize("name", ["scrub", "sfron"])
def test_the_term_acts_in_every_step_of_methods_in_turns(name, monkeypatch):
    job, seen = small_job(name, lamda=0.5), []
    plain = job.term.loss
    monkeypatch.setattr(
        job.term, "loss", lambda logits, labels: seen.append(len(labels)) or plain(logits, labels)
    )
    run(job)
    assert min(seen) > 0 and len(seen) == len(training_steps(job)) > 9


@pytest.mark.parametrize("name", unlearn.METHODS)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name):
    first, second, other = (run(small_job(name, seed=seed)) for seed in (4, 4, 5))
    assert same(first, second) and not same(first, other)


def test_random_labels_are_wrong_drawn_once_and_even(digits):
    split = utils.make_split(digits, flags(retain_ratio=0.1))
    job = unlearn.Job(
        name="RL", label="RL", model=None, data=digits, split=split, recipe=None, seed=1
    )
    loss, indices = unlearn.random_label_loss(job), job.split.forget
    targets = torch.empty(len(indices), dtype=torch.int64)
    for number in range(10):
        logits = torch.full((len(indices), 10), -50.0)
        logits[:, number] = 50
        each = [
            loss(unlearn.Batch(indices[i : i + 1], None, 0, inputs=None, logits=logits[i : i + 1]))
            for i in range(len(indices))
        ]
        targets[torch.stack(each) < 1] = number
    labels = digits.train.labels[indices]
    assert not (targets == labels).any()
    shifts = ((targets - labels) % 10).bincount(minlength=10)
    assert shifts[0] == 0 and shifts[1:].min() > 50  # 717 images over nine wrong labels
    retained = job.split.retain
    sure = 100 * F.one_hot(digits.train.labels[retained], 10).float()
    batch = unlearn.Batch(retained, None, len(retained), inputs=None, logits=sure)
    assert loss(batch).item() == pytest.approx(0)
