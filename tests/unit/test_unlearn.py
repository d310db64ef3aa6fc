"""The registry, one step of every method on a tiny linear model by hand, and the searches."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from small import CLASSES, SmallNet, arguments, run, small_job
from torch import nn

import unlearn
import unlearn_cpu
import utils
from models import checkpoint
from models.errors import UserError
from models.training import Job, Recipe

LN3 = math.log(3)
ZERO = ((0.0, 0.0), (0.0, 0.0))


class Vectors:
    """Replaces utils.Images: vectors without augmentation."""

    size = 1

    def __init__(self, inputs, labels):
        self.inputs, self.labels = torch.tensor(inputs), torch.tensor(labels)

    def batches(self, index_batches, augment=None):
        return (self.inputs[indices].clone() for indices in index_batches)


def linear_job(
    name, weights, *, inputs=((1.0, 0.0), (0.0, 1.0)), num_epochs=1, weight_decay=0.0, **options
):
    """A job on two classes, one retain and one forget image of class 0 each. The logits are
    weights · image.
    """
    model, untrained = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.weight.data, untrained.weight.data = torch.tensor(weights), torch.zeros(2, 2)
    vectors, nothing = Vectors(inputs, (0, 0)), torch.empty(0, dtype=torch.int64)
    first, second = torch.tensor([0]), torch.tensor([1])
    job = Job(
        name=name,
        label=name,
        model=model,
        data=SimpleNamespace(train=vectors, held_out=vectors, classes=["a", "b"]),
        split=utils.Split(first, second, nothing, first, first, nothing, nothing),
        recipe=Recipe(num_epochs, 0.1, weight_decay=weight_decay),
        seed=1,
        new_model=lambda: untrained,
    )
    job.options = unlearn.METHODS[name].options | options
    return job


def weight_after(job):
    return run(job)["weight"]


# ---------------------------------------------------------------- one step of a method


@pytest.mark.parametrize(
    ("name", "options", "first", "second"),
    [
        # p = (½, ½): the gradient is (p − e₀)·xᵀ with the retain image x = (1, 0) of class 0.
        ("finetune", {}, [0.05, 0], [-0.05, 0]),
        ("retrain", {}, [0.05, 0], [-0.05, 0]),
        # Mean over two images. The target of the forget image (0, 1) of class 0 is class 1.
        ("RL", {}, [0.025, -0.025], [-0.025, 0.025]),
        ("GA", {}, [0, -0.05], [0, 0.05]),
        ("ga_plus", {"forget_weight": 0.5}, [0.05, -0.025], [-0.05, 0.025]),
        # Student and teacher are equal at first, so their distance has no gradient.
        ("scrub", {"beta": 9.0, "gamma": 2.0}, [0.1, 0], [-0.1, 0]),
        # Only the second column matters more for the forget image. The norm of its gradient
        # ascent·(½, −½) is at most 7. A step on the retain image follows with a momentum of 0.9.
        ("sfron", {"ascent": 3.0}, [0.05, -0.15 * 1.9], [-0.05, 0.15 * 1.9]),
        ("sfron", {"ascent": 30.0}, [0.05, -0.7 * 0.5**0.5 * 1.9], [-0.05, 0.7 * 0.5**0.5 * 1.9]),
    ],
)
def test_step_from_zero_weights_is_that_worked_by_hand(name, options, first, second):
    weights = weight_after(linear_job(name, ZERO, **options)).tolist()
    assert weights == [pytest.approx(first, abs=1e-6), pytest.approx(second, abs=1e-6)]


def test_teacher_step_moves_forget_logits_towards_untrained_network():
    # Forget image: the student's (¾, ¼) minus its target (½, ½) is (¼, −¼), over two images.
    weights = weight_after(linear_job("teacher", ((0.0, LN3), (0.0, 0.0))))
    torch.testing.assert_close(weights, torch.tensor([[0.0, LN3 - 0.0125], [0.0, 0.0125]]))


def test_sfron_weights_of_equal_importance_are_salient():
    job = linear_job("sfron", ((0.3, 0.0), (0.0, 0.2)), inputs=((1.0, 0.0), (1.0, 0.0)), ascent=3.0)
    assert weight_after(job)[0, 0] < 0.2


def test_salun_changes_salient_weights_and_keeps_other_weights_exactly():
    weights = ((0.3, -0.2), (0.1, 0.7))
    # The forget image (2, 1) has gradients twice as large on the first column.
    inputs = ((1.0, 1.0), (2.0, 1.0))
    job = linear_job("salun", weights, inputs=inputs, num_epochs=3, weight_decay=0.1)
    after, before = weight_after(job), torch.tensor(weights)
    assert job.by_products["saliency_mask.pth"]["weight"].tolist() == [[True, False], [True, False]]
    assert after[:, 1].equal(before[:, 1])
    assert not (after[:, 0] == before[:, 0]).any()


def test_ssd_on_linear_model_dampens_weights_of_forget_image():
    # p = (½, ½) on both images. I_f = ¼ on the second column. The mean gradient of both images is
    # half of either's: I_D = 1/16, a ratio of 4.
    job = linear_job("ssd", ((1.0, 1.0), (1.0, 1.0)), selection_weighting=3.5)
    assert weight_after(job).tolist() == [[1, 0.25], [1, 0.25]]


# ---------------------------------------------------------------- losses and factors


def test_cross_entropy_of_no_image_is_zero_with_a_gradient():
    logits = torch.randn(0, 3, requires_grad=True)
    loss = unlearn.cross_entropy(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)


@pytest.mark.parametrize(("limit", "first"), [(2.01, 2.0), (1.5, 1.5), (0.0, 2.0)])
def test_ascent_losses_above_limit_have_no_gradient(limit, first):
    logits = torch.tensor([[0.0, LN3], [0.0, 0.0]], requires_grad=True)  # of 2 ln 2 and ln 2
    losses = unlearn.ascent_losses(logits, torch.tensor([0, 0]), limit)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([first * math.log(2), math.log(2)])
    assert logits.grad[:, 0].tolist() == pytest.approx([-0.75 * (first == 2), -0.5])


def test_adaptive_mean_gives_images_of_small_loss_more_weight():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = unlearn.adaptive_mean(losses, 1.0)
    assert mean.item() == pytest.approx((4 / 3 * 1 + 2 / 3 * 2) / 2)  # weights ∝ 1, ½, of mean 1
    mean.backward()
    assert losses.grad.tolist() == pytest.approx([4 / 3 / 2, 2 / 3 / 2])
    assert unlearn.adaptive_mean(losses, 0.0).item() == pytest.approx(1.5)
    assert unlearn.adaptive_mean(torch.tensor([0.0, 1.0]), 500.0).isfinite()


def test_sensitivity_norm_of_a_constant_logit_has_gradient_zero():
    inputs = torch.randn(2, 3, 2, 2, requires_grad=True)
    scale = torch.tensor([0.0, 2.0], requires_grad=True)
    logits = inputs.sum((1, 2, 3))[:, None] * scale
    norms = unlearn.sensitivity_norms(logits, torch.tensor([0, 1]), inputs)
    assert norms.tolist() == pytest.approx([0, 2 * 12**0.5])
    norms.sum().backward()
    assert scale.grad.tolist() == pytest.approx([0, 12**0.5])


def test_ssd_dampening_of_selected_weights_is_ratio_of_importances():
    forget, overall = torch.tensor([4.0, 1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = unlearn.dampening(forget, overall, 2.0, 1.0)
    assert factors.tolist() == pytest.approx([1 / 4, 1, 1 / 3, 1])
    factors = unlearn.dampening(forget, overall, 3.5, 0.5)
    assert factors.tolist() == pytest.approx([1 / 8, 1, 1, 1])
    assert unlearn.dampening(forget, overall, 2.0, 8.0).tolist() == [1, 1, 1, 1]
    assert unlearn.dampening(forget, overall, 3.0, 1.0)[2] == 1  # not above the weighting


def test_fisher_noise_variance_is_larger_where_retain_information_is_smaller():
    information = torch.tensor([1.0, 0.25, 0.0])  # one-dimensional: ten times the variance
    variance = unlearn.fisher_noise_variance(information, 1e-4, is_last=False)
    assert variance.tolist() == pytest.approx([1e-3, 4e-3, 1], rel=1e-5)
    last = unlearn.fisher_noise_variance(information, 1e-4, is_last=True)
    assert last.tolist() == pytest.approx([1e-3, 4e-3, 0.1], rel=1e-5)


def test_wrong_labels_are_wrong_and_uniform_on_forget_images_alone():
    job = small_job("RL", retain=50, forget=900)
    labels, targets = job.data.train.labels, unlearn.wrong_labels(job)
    assert targets[job.split.retain].equal(labels[job.split.retain])
    shifts = ((targets - labels)[job.split.forget] % CLASSES).bincount(minlength=CLASSES)
    assert shifts[0] == 0 and shifts[1:].min() > 180  # 225 expected
    assert unlearn.wrong_labels(job).equal(targets)


# ---------------------------------------------------------------- teachers


def test_frozen_network_is_in_eval_mode_without_gradients():
    network = unlearn.frozen(SmallNet().train())
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


def class_job(name, **settings):
    """A job whose forget images are all images of class 3."""
    job = small_job(name, forget_class=3, **settings)
    labels = job.data.train.labels
    labels[labels == 3] = 1
    labels[job.split.forget] = 3
    return job


@pytest.mark.parametrize(
    ("probabilities", "shift"),
    [
        ([0.1, 0.2, 0.3, 0.2, 0.2], 3),  # class 0 moves to 3
        ([0.3, 0.05, 0.3, 0.25, 0.1], 2),
        ([0.3, 0.2, 0.2, 0.1, 0.2], 0),
    ],
)
def test_untrained_teacher_is_shifted_until_the_forgotten_class_is_least_likely(
    probabilities, shift
):
    class Constant(nn.Module):
        def forward(self, inputs):
            return torch.tensor(probabilities).log().expand(len(inputs), -1)

    assert unlearn.harmless_shift(class_job("teacher"), Constant()) == shift
    assert unlearn.harmless_shift(small_job("teacher"), Constant()) == 0


def test_teacher_of_a_class_learns_the_shifted_outputs():
    job = class_job("teacher")
    shift = unlearn.harmless_shift(job, job.new_model().eval())
    shifted = SmallNet(7)
    with torch.no_grad():
        for parameter in shifted[4].parameters():
            parameter.copy_(parameter.roll(shift, dims=0))
    expected = run(class_job("teacher", new_model=lambda: shifted))
    assert shift > 0
    for name, tensor in run(job).items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.1, 88), (1.0, 885)])
def test_mask_selects_the_ratio_of_all_weights(ratio, count):
    job = small_job("salun")
    masks = unlearn.saliency_mask(job, ratio)
    assert sum(mask.sum().item() for mask in masks.values()) == count
    shapes = {name: weight.shape for name, weight in job.model.named_parameters()}
    assert {name: mask.shape for name, mask in masks.items()} == shapes
    assert [len(indices) for indices, _ in job.data.train.uses] == [8, 3]  # as large as a step


def test_salun_with_saved_mask_uses_it(tmp_path):
    masks = unlearn.saliency_mask(small_job("salun"), 0.1)
    checkpoint.save(tmp_path / "mask.pth", masks, {})
    read = run(small_job("salun", mask_ratio=0.7, mask_path=tmp_path / "mask.pth"))
    expected = run(small_job("salun", mask_ratio=0.1))
    assert all(tensor.equal(expected[name]) for name, tensor in read.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda masks: masks.pop("4.bias"),
        lambda masks: masks.clear(),
        lambda masks: masks.update({"5.weight": masks["4.weight"]}),
        lambda masks: masks.update({"4.bias": masks["4.bias"][:3]}),
        lambda masks: masks.update({"4.bias": torch.tensor([0, 1, 2, 1, 0])}),
    ],
)
def test_mask_of_another_network_or_kind_is_refused(change, tmp_path):
    masks = unlearn.saliency_mask(small_job("salun"), 0.3)
    change(masks)
    checkpoint.save(tmp_path / "mask.pth", masks, {})
    with pytest.raises(UserError, match="mask.pth"):
        unlearn.read_mask(tmp_path / "mask.pth", SmallNet())


# ---------------------------------------------------------------- searches


class SearchJob:
    """A job whose forget images are all recognised while ``recognises(job)``, else half of them."""

    label = "search"

    def __init__(self, recognises, forget_classes=()):
        self.recognises, self.split = recognises, SimpleNamespace(forget_classes=forget_classes)
        self.model, self.tried = nn.Linear(2, 1, bias=False), []
        self.model.weight.data = torch.tensor([[1.0, 0.0]])
        self.num_measured = 0

    def accuracies(self, parts, limit):
        assert (parts, limit) == (["forget"], 2000)
        self.num_measured += 1
        return {"forget": 1.0 if self.recognises(self) else 0.5}

    @property
    def moved(self):
        """The second weight, which is 0 at first."""
        return self.model.weight[0, 1].item()


def test_shortest_is_the_end_of_the_last_of_six_halves():
    assert unlearn.shortest(lambda value: value >= 0.37, 0.0, 1.0) == 24 / 64
    assert unlearn.shortest(lambda value: value >= 2.0, 1.0, 5.0) == 2.0
    assert unlearn.shortest(lambda value: False, 1.0, 5.0) == 5.0


@pytest.mark.parametrize(
    ("forget_class", "largest", "highest", "halvings"),
    [
        (None, 57, 80.0, [80, 40]),
        (None, 11, 80.0, [80, 40, 20, 10]),
        (None, 90, 80.0, [80]),
        (None, 0, 80.0, [80, 40, 20, 10]),
        (None, 0, 0.0, [10]),
        (0, 3, 20.0, [20, 10, 5, 2.5]),
        (0, 0, 3.0, [3, 1.5, 1]),
    ],
)
def test_ssd_search_finds_the_largest_selection_weighting_that_forgets(
    forget_class, largest, highest, halvings
):
    """The images are forgotten with a weighting of at most ``largest``."""
    classes = () if forget_class is None else (forget_class,)
    job = SearchJob(lambda job: job.tried[-1] > largest, classes)
    result = unlearn.largest_selection_weighting(job, job.tried.append, highest, 0.5)
    assert job.tried[: len(halvings)] == halvings
    if largest == 0:
        assert result == halvings[-1] and len(job.tried) == len(halvings)
    elif largest > highest:
        assert result == highest
    else:
        assert len(job.tried) == len(halvings) + 6
        assert result <= largest < result * 2 ** (1 / 64)


@pytest.mark.parametrize(
    ("needed", "length"),
    [
        (0.0, 0.001 / 64),  # the first step is a thousandth of the weights
        (0.0101, 0.008 + 17 * 0.000125),
        (0.99, 1 - 0.488 / 64),  # at most as long as the weights
    ],
)
def test_step_is_the_shortest_that_forgets(needed, length):
    job = SearchJob(lambda job: job.moved < needed)
    unlearn.move_until_forgotten(job, {"weight": torch.tensor([[0.0, 5.0]])}, None, 0.5)
    assert job.moved == pytest.approx(length, rel=1e-5) and job.model.weight[0, 0] == 1


def test_step_of_given_scale_is_that_multiple_of_the_direction():
    job = SearchJob(None)
    unlearn.move_until_forgotten(job, {"weight": torch.tensor([[3.0, -4.0]])}, 0.3, None)
    assert job.model.weight.tolist() == [pytest.approx([1.9, -1.2])]


def test_step_without_stop_accuracy_ends_at_the_accuracy_of_the_scenario():
    job = SearchJob(lambda job: job.moved < 0.01, forget_classes=(2,))  # 3 % are never reached
    unlearn.move_until_forgotten(job, {"weight": torch.tensor([[0.0, 5.0]])}, None, None)
    assert job.moved == pytest.approx(1)


def test_step_without_end_or_direction_is_reported(capsys):
    job = SearchJob(lambda job: True)
    unlearn.move_until_forgotten(job, {"weight": torch.tensor([[0.0, 5.0]])}, None, 0.5)
    assert job.moved == 1 and job.num_measured == 11  # 1/1000, doubled ten times
    assert "50 %" in (output := capsys.readouterr().out) and "--step_scale" in output
    job = SearchJob(lambda job: True)
    unlearn.move_until_forgotten(job, {"weight": torch.zeros(1, 2)}, None, 0.5)
    assert job.moved == 0 and job.num_measured == 0
    assert capsys.readouterr().out.startswith("search: ")


@pytest.mark.parametrize(
    ("needed", "stop_at", "share"),
    [(0.37, 0.5, 24 / 64), (2.0, 0.5, 1.0), (0.37, 0.0, 1.0), (0.37, 1.0, 1 / 64)],
)
def test_step_back_is_the_shortest_step_from_the_start_that_forgets(needed, stop_at, share):
    job, start = SearchJob(lambda job: job.moved < needed), {"weight": torch.tensor([[5.0, 0.0]])}
    job.model.weight.data[0, 1] = 1.0
    unlearn.step_back(job, start, stop_at)
    assert job.model.weight.tolist() == [[5 - 4 * share, share]]


def test_norm_is_that_of_all_tensors_together():
    assert unlearn.norm({"a": torch.tensor([[2.0, 4.0]]), "b": torch.tensor([4.0])}) == 6.0


# ---------------------------------------------------------------- the registry and its flags


def test_help_lists_every_method_with_its_defaults():
    _, *lines = unlearn.describe_methods(unlearn.METHODS).splitlines()
    assert [line.split()[0] for line in lines] == [*unlearn.METHODS]
    texts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert texts["salun"] == "num_epochs 10, learning_rate 0.013, mask_ratio 0.5"
    assert texts["finetune"].endswith("(digits: learning_rate 0.02)")
    assert "num_epochs 20" in texts["finetune"] and not any(map(str.isdigit, texts["retrain"]))
    assert texts["ssd"].startswith("no training, ") and "epochs" not in texts["ssd"]
    variants = unlearn.describe_methods(unlearn_cpu.METHODS).splitlines()[1:]
    assert [line.split()[0] for line in variants] == [*unlearn_cpu.METHODS]
    assert variants[0].split(maxsplit=1)[1] == texts["retrain"]


def test_flag_of_an_option_names_its_methods_in_the_help():
    parser = argparse.ArgumentParser()
    unlearn.add_option_flags(parser, unlearn.METHODS)
    help_text = " ".join(parser.format_help().split())
    assert "--kd_T KD_T teacher, scrub: temperature" in help_text
    assert "--rewind scrub: " in help_text
    args = parser.parse_args(["--kd_T", "3"])
    assert args.kd_T == 3.0 and args.beta is None and args.rewind is None


# The values of the papers and of .results/recipes.md, without options that are not set.
DEFAULTS = {
    "retrain": {},
    "finetune": {"num_epochs": 20},
    "l1_sparse": {"num_epochs": 20, "learning_rate": 0.02, "l1_weight": 5e-4},
    "RL": {"num_epochs": 10, "learning_rate": 0.013},
    "salun": {"num_epochs": 10, "learning_rate": 0.013, "mask_ratio": 0.5},
    "amun": {"num_epochs": 10, "learning_rate": 0.01, "radius": 0.04},
    "GA": {"num_epochs": 100, "learning_rate": 1e-4},
    "ga_plus": {"num_epochs": 5, "learning_rate": 0.01, "forget_weight": 0.02, "ascent_limit": 4},
    "sfron": {"num_epochs": 5, "learning_rate": 0.01, "ascent": 25, "ascent_every": 5}
    | {"ascent_limit": 4, "adaptivity": 0.5, "saliency_threshold": 1, "max_norm": 7},
    "teacher": {"num_epochs": 5, "learning_rate": 0.01, "kd_T": 1},
    "scrub": {"num_epochs": 10, "learning_rate": 2e-3, "msteps": 2, "kd_T": 4, "beta": 0.001}
    | {"gamma": 0.99, "pass_steps": 8},
    "lotus": {"num_epochs": 10, "learning_rate": 0.01, "smoothing": 1},
    "delete": {"num_epochs": 50, "learning_rate": 6e-5, "pass_steps": 8},
    "boundary_shrink": {"num_epochs": 50, "learning_rate": 3e-5, "pass_steps": 8}
    | {"step_size": 0.1},
    "boundary_expand": {"num_epochs": 50, "learning_rate": 2e-4, "pass_steps": 8},
    "mu_mis": {"num_epochs": 50, "learning_rate": 1e-3, "pass_steps": 8},
    "FisherForgetting": {"noise": 1e-7},
    "ssd": {"dampening_constant": 1},
    "IU": {"damping": 0.1},
    "neg_merge": {"num_epochs": 5, "learning_rate": 3e-3},
}


def test_methods_have_the_documented_defaults():
    for name, entry in unlearn.METHODS.items():
        values = {key: v for key, v in entry.options.items() if v is not None and v is not False}
        values |= entry.training
        forgets_alone = name in ("GA", "delete", "boundary_shrink", "boundary_expand", "mu_mis")
        assert values.pop("schedule", None) == ("constant" if forgets_alone else None)
        assert values == DEFAULTS[name], name
    assert unlearn.NEG_MERGE_RATES == (0.25, 0.5, 1, 2, 4)
    assert (unlearn.SSD_BATCH_SIZE, unlearn.SSD_BATCHES) == (128, 100)
    assert (unlearn.FISHER_IMAGES, unlearn.AUGMENTATIONS) == (2048, 10)


def test_option_without_a_method_has_no_flag():
    assert arguments("--kd_T", 2, methods=unlearn_cpu.METHODS).kd_T == 2
    assert not hasattr(arguments(methods=unlearn_cpu.METHODS), "noise")
    assert not hasattr(arguments(), "max_norm")  # an option without an annotation


def test_options_of_a_method_are_its_flags_or_else_its_defaults():
    args = arguments("--kd_T", 3, "--beta", 0, "--rewind")
    assert unlearn.options_of(unlearn.METHODS["teacher"], args) == {"kd_T": 3.0}
    scrub = {"msteps": 2, "kd_T": 3.0, "beta": 0, "gamma": 0.99, "pass_steps": 8, "rewind": True}
    assert unlearn.options_of(unlearn.METHODS["scrub"], args) == scrub
    assert unlearn.options_of(unlearn.METHODS["finetune"], args) == {}
    assert unlearn.options_of(unlearn.METHODS["amun"], args) == {"radius": 0.04}


NOT_NEGATIVE = "msteps pass_steps ascent ascent_limit forget_weight l1_weight beta gamma noise"
NOT_NEGATIVE += " step_scale smoothing selection_weighting dampening_constant"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("stop_accuracy", -0.1), ("stop_accuracy", 1.1), ("mask_ratio", -0.1), ("mask_ratio", 1.5)]
    + [("kd_T", 0), ("damping", 0), ("ascent_every", 0)]
    + [(flag, -1) for flag in NOT_NEGATIVE.split()],
)
def test_option_out_of_bounds_is_refused(flag, value):
    assert getattr(arguments(f"--{flag}", 0 if value == -1 else 1), flag) in (0, 1)
    with pytest.raises(UserError, match=f"--{flag}"):
        arguments(f"--{flag}", value)


def test_option_of_no_chosen_method_is_refused():
    def check(names, *flags):
        methods = {name: unlearn.METHODS[name] for name in names}
        unlearn.check_option_flags(arguments(*flags), methods)

    check(["scrub", "salun"], "--kd_T", 2, "--mask_ratio", 0.1)
    with pytest.raises(UserError, match="--kd_T .* teacher, scrub .* salun, RL;"):
        check(["salun", "RL"], "--kd_T", 2)
    with pytest.raises(UserError, match="--beta"):
        check(["salun"], "--beta", 0)


def test_registered_method_has_the_options_of_its_signature(monkeypatch):
    monkeypatch.setattr(unlearn, "METHODS", dict(unlearn.METHODS))
    weight = unlearn.Option(float, "a weight")

    def nothing(job, weight: weight = 0.3, other=2):
        """A method for this test."""

    for trained, extensible in [(True, True), (False, True), (True, False)]:
        register = unlearn.method(trained=trained, extensible=extensible, num_epochs=2)
        assert register(nothing) is nothing
        assert unlearn.METHODS["nothing"] == unlearn.Method(
            name="nothing",
            run=nothing,
            training={"num_epochs": 2},
            options={"weight": 0.3, "other": 2},
            flags={"weight": weight},
            trained=trained,
            extensible=trained and extensible,
        )
    with pytest.raises(TypeError, match="epochs"):
        unlearn.method(epochs=3)


# ---------------------------------------------------------------- properties of all methods


def test_cpu_variants_exist_for_methods_that_descend_on_a_bounded_loss():
    without = set(unlearn.METHODS) - {name.removeprefix("cpu_") for name in unlearn_cpu.METHODS}
    assert without == {"GA", "FisherForgetting", "ssd", "IU", "neg_merge"}


@pytest.mark.parametrize("name", unlearn.METHODS)
def test_same_seed_gives_same_weights_and_another_seed_others(name, monkeypatch):
    monkeypatch.setattr(unlearn, "FISHER_IMAGES", 5)  # less than all, else only the order differs
    monkeypatch.setattr(unlearn, "SSD_BATCHES", 2)
    options = {"selection_weighting": 1.0} if name == "ssd" else {}
    first, second, other = (run(small_job(name, seed=seed, **options)) for seed in (4, 4, 5))
    assert all(first[key].equal(tensor) for key, tensor in second.items())
    assert not all(first[key].equal(tensor) for key, tensor in other.items())
