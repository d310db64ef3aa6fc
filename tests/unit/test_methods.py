"""One step of every method on a tiny linear model by hand, and properties of all methods."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import flags
from small import SmallNet, by_definition, run, small_job, training_steps
from torch import nn
from torch.nn import functional as F

import unlearn
import unlearn_cpu
import utils
from models import fisher
from models.resnet import ResNet18

LN3 = math.log(3)


class Vectors:
    """Replaces utils.Images: vectors without augmentation."""

    size = 1

    def __init__(self, inputs, labels):
        self.inputs, self.labels = torch.tensor(inputs), torch.tensor(labels)

    def batches(self, index_batches, augment=None):
        return (self.inputs[indices] for indices in index_batches)


TWO_IMAGES = ((1.0, 0.0), (0.0, 1.0))


def linear_job(name, weights, *, inputs=TWO_IMAGES, labels=(0, 0), weight_decay=0.0, **settings):
    """A job on two classes, one retain and one forget image. The logits are weights · image."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor(weights)
    vectors = Vectors(inputs, labels)
    data = SimpleNamespace(train=vectors, held_out=vectors, classes=["a", "b"])
    nothing = torch.empty(0, dtype=torch.int64)
    first, second = torch.tensor([0]), torch.tensor([1])
    split = utils.Split(first, second, nothing, first, first, nothing, nothing)
    recipe = unlearn.Recipe(settings.pop("num_epochs", 1), 0.1, weight_decay=weight_decay)
    epoch_done = settings.pop("epoch_done", lambda record: None)
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
        options=unlearn.METHODS[name].options | settings,
        new_model=lambda: untrained,
        epoch_done=epoch_done,
    )


def weight_after(job):
    return run(job)["weight"]


def arguments_of_loop(job, monkeypatch):
    """The loss and the keyword arguments that the method passes to the training loop."""
    calls = []

    def train(job, loss, *image_sets, **keywords):
        calls.append((loss, keywords))

    monkeypatch.setattr(unlearn, "train", train)
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


# ---------------------------------------------------------------- one step of each method


@pytest.mark.parametrize("name", ["finetune", "retrain"])
def test_finetune_and_retrain_step_descends_on_retain_image_only(name):
    # p = (½, ½): the gradient is (p − e₀)·xᵀ with x = (1, 0)
    weights = weight_after(linear_job(name, ZERO))
    assert weights.tolist() == [pytest.approx([0.05, 0]), pytest.approx([-0.05, 0])]


def test_retrain_of_trained_model_starts_from_untrained_network():
    assert weight_after(linear_job("retrain", ((5.0, 5.0), (5.0, 5.0)))).abs().max() < 0.1


def test_random_labels_step_descends_towards_wrong_label():
    # Mean over two images. The target of the forget image (0, 1) of class 0 is class 1.
    weights = weight_after(linear_job("RL", ZERO))
    assert weights.tolist() == [pytest.approx([0.025, -0.025]), pytest.approx([-0.025, 0.025])]


def test_gradient_ascent_step_ascends_on_forget_image_only():
    weights = weight_after(linear_job("GA", ZERO))
    assert weights.tolist() == [pytest.approx([0, -0.05]), pytest.approx([0, 0.05])]


def test_gradient_ascent_at_stop_accuracy_ends_after_that_epoch():
    records = []
    weights = ((0.0, 0.12), (0.0, 0.0))
    run(linear_job("GA", weights, num_epochs=50, stop_accuracy=0.5, epoch_done=records.append))
    assert [record["forget_acc"] for record in records] == [1.0, 0.0]
    # The accuracy is low enough before the first epoch: that epoch takes place.
    before = ((0.0, 9.0), (0.0, 0.0))
    after = weight_after(linear_job("GA", before, num_epochs=3, stop_accuracy=1.0))
    assert (after - torch.tensor(before)).abs().max() > 0


def test_neggrad_plus_step_descends_on_retain_and_ascends_on_forget_image():
    weights = weight_after(linear_job("ga_plus", ZERO, forget_weight=0.5))
    assert weights.tolist() == [pytest.approx([0.05, -0.025]), pytest.approx([-0.05, 0.025])]


@pytest.mark.parametrize(("limit", "ascends"), [(2.01, True), (1.99, False), (0.0, True)])
def test_neggrad_plus_leaves_forget_image_above_limit_alone(limit, ascends):
    # The forget image has p = (¼, ¾): a loss of ln 4, twice that of a guess.
    weights = ((0.0, 0.0), (0.0, LN3))
    job = linear_job("ga_plus", weights, forget_weight=0.5, ascent_limit=limit)
    step = (weight_after(job) - torch.tensor(weights)).tolist()
    ascent = 0.1 * 0.5 * 0.75 * ascends
    assert step == [pytest.approx([0.05, -ascent]), pytest.approx([-0.05, ascent])]


@pytest.mark.parametrize(("limit", "first"), [(2.01, 2.0), (1.5, 1.5), (0.0, 2.0)])
def test_sfron_leaves_forget_image_above_limit_alone(limit, first, monkeypatch):
    job = linear_job("sfron", ZERO, ascent=3.0, adaptivity=1.0, ascent_limit=limit)
    loss, _ = arguments_of_loop(job, monkeypatch)
    ascent = batch(job, [[0.0, LN3], [0.0, 0.0]], [1, 1], 0)  # losses of 2 ln 2 and ln 2
    ascent.logits.requires_grad_()
    value = loss(ascent)
    shares = [1 / (first + 1), first / (first + 1)]  # inverse to the losses
    expected = -3 * (shares[0] * first + shares[1]) * math.log(2)
    assert value.item() == pytest.approx(expected)
    value.backward()
    gradient = [3 * shares[0] * 0.75 * (first == 2), 3 * shares[1] * 0.5]
    assert ascent.logits.grad[:, 0].tolist() == pytest.approx(gradient)


def test_teacher_loss_is_kl_to_original_or_untrained_network(monkeypatch):
    job = linear_job("teacher", ((LN3, 0.0), (0.0, 0.0)))
    loss, _ = arguments_of_loop(job, monkeypatch)
    # Original on the retained image: (¾, ¼). Untrained network on the forget image: (½, ½).
    both_images = [0, 1]

    def loss_of(retain_logits, forget_logits):
        return loss(batch(job, [retain_logits, forget_logits], both_images, num_retain=1)).item()

    assert loss_of([LN3, 0.0], [0.0, 0.0]) == pytest.approx(0, abs=1e-7)
    to_half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss_of([LN3, 0.0], [LN3, 0.0]) == pytest.approx(to_half / 2)
    to_original = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss_of([0.0, 0.0], [0.0, 0.0]) == pytest.approx(to_original / 2)


def test_teacher_step_moves_forget_logits_towards_untrained_network():
    # Forget image: the student's (¾, ¼) minus its target (½, ½) is (¼, −¼), over two images.
    weights = weight_after(linear_job("teacher", ((0.0, LN3), (0.0, 0.0))))
    assert weights.tolist() == [pytest.approx([0, LN3 - 0.0125]), pytest.approx([0, 0.0125])]


def test_distance_at_temperature_two_is_softened_kl_times_four():
    actual = unlearn.distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * LN3, 0.0]]), 2.0)
    softened = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert actual.item() == pytest.approx(4 * softened)


def test_scrub_in_first_epochs_maximises_on_forget_then_minimises_on_retain(monkeypatch):
    job = linear_job("scrub", ((LN3, LN3), (0.0, 0.0)), msteps=2, kd_T=1.0, beta=0.5, gamma=2.0)
    loss, keywords = arguments_of_loop(job, monkeypatch)
    first, second, third = (
        [(indices.tolist(), num_retain) for indices, num_retain in keywords["schedule"](epoch)]
        for epoch in (1, 2, 3)
    )
    assert first == second == [([1], 0), ([0], 1)]
    assert third == [([0], 1)]
    to_original = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss(batch(job, [[0.0, 0.0]], [1], 0)).item() == pytest.approx(-to_original)
    expected = 0.5 * to_original + 2 * math.log(2)
    assert loss(batch(job, [[0.0, 0.0]], [0], 1)).item() == pytest.approx(expected)


def test_salun_changes_salient_weights_and_keeps_other_weights_exactly():
    weights = ((0.3, -0.2), (0.1, 0.7))
    # The forget image (2, 1) has gradients twice as large on the first column.
    inputs = ((1.0, 1.0), (2.0, 1.0))
    job = linear_job("salun", weights, inputs=inputs, num_epochs=3, weight_decay=0.1)
    after, before = weight_after(job), torch.tensor(weights)
    assert job.by_products["saliency_mask.pth"]["weight"].tolist() == [[True, False], [True, False]]
    assert after[:, 1].equal(before[:, 1])
    assert not (after[:, 0] == before[:, 0]).any()


def test_salun_step_is_random_labels_step_on_salient_weights():
    job = linear_job("salun", ZERO, inputs=((1.0, 1.0), (2.0, 1.0)))
    # Gradients of class 0: retain −½·(1, 1), forget ½·(2, 1), mean (¼, 0). The mask keeps (¼, –).
    assert weight_after(job).tolist() == [pytest.approx([-0.025, 0]), pytest.approx([0.025, 0])]


def test_ssd_dampening_of_selected_weights_is_ratio_of_importances():
    forget, overall = torch.tensor([4.0, 1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = unlearn.dampening(forget, overall, 2.0, 1.0)
    assert factors.tolist() == pytest.approx([1 / 4, 1, 1 / 3, 1])
    factors = unlearn.dampening(forget, overall, 3.5, 0.5)
    assert factors.tolist() == pytest.approx([1 / 8, 1, 1, 1])
    assert unlearn.dampening(forget, overall, 2.0, 8.0).tolist() == [1, 1, 1, 1]


def test_ssd_on_linear_model_dampens_weights_of_forget_image():
    # p = (½, ½) on both images. I_f = ¼ on the second column, I_D = ⅛ on each: a ratio of 2.
    job = linear_job("ssd", ZERO, selection_weighting=1.5, importances="image")
    job.model.weight.data += 1
    assert weight_after(job).tolist() == [[1, 0.5], [1, 0.5]]
    # The mean gradient of both images is half of either's: I_f = ¼, I_D = 1/16, a ratio of 4.
    job = linear_job("ssd", ZERO, selection_weighting=3.5)
    job.model.weight.data += 1
    assert weight_after(job).tolist() == [[1, 0.25], [1, 0.25]]


def test_sfron_loss_gives_images_of_small_loss_more_weight():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = unlearn.adaptive_mean(losses, 1.0)
    assert mean.item() == pytest.approx((4 / 3 * 1 + 2 / 3 * 2) / 2)  # weights ∝ 1, ½, of mean 1
    mean.backward()
    assert losses.grad.tolist() == pytest.approx([4 / 3 / 2, 2 / 3 / 2])
    assert unlearn.adaptive_mean(losses, 0.0).item() == pytest.approx(1.5)
    assert unlearn.adaptive_mean(torch.tensor([0.0, 1.0]), 0.5).isfinite()


def test_sfron_alternates_steps_and_ascends_on_salient_weights_only(monkeypatch):
    job = linear_job("sfron", ZERO, ascent=3.0, num_epochs=2)
    loss, keywords = arguments_of_loop(job, monkeypatch)
    assert [(i.tolist(), n) for i, n in keywords["schedule"](1)] == [([1], 0), ([0], 1)]
    ascent = batch(job, [[0.0, 0.0]], [1], 0)
    # Full weight before the first repair step; half after one of two.
    assert loss(ascent).item() == pytest.approx(-3 * math.log(2))
    assert loss(batch(job, [[0.0, 0.0]], [0], 1)).item() == pytest.approx(math.log(2))
    assert loss(ascent).item() == pytest.approx(-1.5 * math.log(2))
    job.model.weight.grad = torch.full((2, 2), 10.0)
    keywords["before_step"](ascent)
    # Only the second column matters more for the forget image; the norm √200 is clipped to 7.
    assert job.model.weight.grad.tolist() == [pytest.approx([0, 7 / 2**0.5])] * 2
    job.model.weight.grad = torch.full((2, 2), 10.0)
    keywords["before_step"](batch(job, [[0.0, 0.0]], [0], 1))
    assert job.model.weight.grad.eq(10).all()


def test_sfron_weights_of_equal_importance_are_salient(monkeypatch):
    job = linear_job("sfron", ((0.3, 0.0), (0.0, 0.2)), inputs=((1.0, 0.0), (1.0, 0.0)))
    _, keywords = arguments_of_loop(job, monkeypatch)
    job.model.weight.grad = torch.full((2, 2), 1.0)
    keywords["before_step"](batch(job, [[0.0, 0.0]], [1], 0))
    assert job.model.weight.grad.eq(1).all()


def test_fisher_noise_variance_is_larger_where_retain_information_is_smaller():
    fisher = torch.tensor([1.0, 0.25, 0.0])  # one-dimensional: ten times the variance
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
    """A network with a layer that only torch.func supports."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 10)

    def forward(self, images):
        return self.last(self.norm(self.first(images.mean(1).flatten(1))))


class ActivatedNorm(nn.BatchNorm2d):
    """A subclass of BatchNorm with an activation, like timm's."""

    def forward(self, images):
        return super().forward(images).relu() ** 2


class Activated(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), ActivatedNorm(4), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("network", [partial(ResNet18, 10, 8), Tokens, Activated])
@pytest.mark.parametrize("expected", [False, True])
def test_diagonal_fisher_equals_per_sample_autograd(network, expected, digits):
    torch.manual_seed(0)
    model = network().train()
    model(digits.train.batch(torch.arange(100)))  # changes the initial running statistics
    scores = fisher.expected_scores if expected else fisher.observed_score
    indices = torch.arange(10)
    actual = fisher.diagonal_fisher(model, digits.train, indices, scores, chunk=4)
    images, labels = digits.train.batch(indices), digits.train.labels[:10]
    reference = by_definition(model.eval(), images, labels, expected)
    assert actual.keys() == reference.keys()
    for name, square in reference.items():
        torch.testing.assert_close(actual[name], square, rtol=1e-3, atol=1e-6 * square.max().item())


@pytest.mark.parametrize(
    "logits", [[1.0, 0.0, -2.0], [0.0, 0.0], [-9.0, 1.0, 12.0, -30.0], [16.0, 0.0, 0.0, -3.0]]
)
def test_expected_scores_give_fisher_matrix_of_logits(logits):
    """The matrix is exact even where one class is nearly certain, as for most training images."""
    rows = fisher.expected_scores(torch.tensor(logits), torch.tensor(0))
    p = torch.tensor(logits).double().softmax(0)
    assert rows.shape == (len(logits), len(logits))
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(rows.double().T @ rows.double(), expected, rtol=2e-6, atol=1e-12)


# ---------------------------------------------------------------- properties of all methods


def same(first, second):
    return all(first[name].equal(tensor) for name, tensor in second.items())


@pytest.mark.parametrize("label", unlearn_cpu.METHODS)
def test_lamda_zero_gives_exactly_the_weights_of_the_base_method(label):
    base, zero, half = (run(small_job(label, lamda=lamda)) for lamda in (None, 0.0, 0.5))
    assert same(base, zero)
    assert not same(base, half)


def test_cpu_variants_exist_for_methods_that_descend_on_a_bounded_loss():
    without = set(unlearn.METHODS) - {name.removeprefix("cpu_") for name in unlearn_cpu.METHODS}
    assert without == {"GA", "FisherForgetting", "ssd", "IU", "neg_merge"}


@pytest.mark.parametrize("name", ["scrub", "sfron"])
def test_conformal_term_acts_in_every_step_of_scrub_and_sfron(name, monkeypatch):
    job, batch_sizes = small_job(name, lamda=0.5), []
    plain = job.term.loss

    def counting_loss(logits, labels):
        batch_sizes.append(len(labels))
        return plain(logits, labels)

    monkeypatch.setattr(job.term, "loss", counting_loss)
    run(job)
    assert min(batch_sizes) > 0
    assert len(batch_sizes) == len(training_steps(job)) > 9


@pytest.mark.parametrize("name", unlearn.METHODS)
def test_same_seed_gives_same_weights_and_another_seed_others(name, monkeypatch):
    monkeypatch.setattr(unlearn, "FISHER_IMAGES", 5)  # less than all, else only the order differs
    options = {"selection_weighting": 1.0} if name == "ssd" else {}
    first, second, other = (run(small_job(name, seed=seed, **options)) for seed in (4, 4, 5))
    assert same(first, second)
    assert not same(first, other)


def test_random_labels_are_wrong_constant_and_uniform(digits):
    split = utils.make_split(digits, flags(retain_ratio=0.1))
    fields = {"name": "RL", "label": "RL", "model": None, "recipe": None, "seed": 1}
    job = unlearn.Job(data=digits, split=split, **fields)
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
    retain_set = job.split.retain
    correct = 100 * F.one_hot(digits.train.labels[retain_set], 10).float()
    batch = unlearn.Batch(retain_set, None, len(retain_set), inputs=None, logits=correct)
    assert loss(batch).item() == pytest.approx(0)


@pytest.mark.parametrize("label", [*unlearn.METHODS, *unlearn_cpu.METHODS])
def test_passes_with_gradient_have_the_size_of_a_step_whatever_the_forget_set(label):
    """The images of a pass determine the memory."""
    sizes = []

    class Counting(SmallNet):
        def forward(self, inputs):
            if torch.is_grad_enabled() or inputs.requires_grad:
                sizes.append(len(inputs))
            return super().forward(inputs)

    settings = {"model": Counting(), "new_model": lambda: Counting(7), "num_epochs": 1}
    if label.startswith("cpu_"):
        settings["lamda"] = 0.5
    run(small_job(label, retain=190, forget=150, **settings))
    # Steps have 8 images, and the same share of forget images with a conformal term. Fisher
    # information is computed in chunks of 32 or 64, and ssd has batches of 128.
    trained = unlearn.METHODS[label.removeprefix("cpu_")].trained
    assert max(sizes) <= (32 if trained else 128)
