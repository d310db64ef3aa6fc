"""The registry with its flags, the mathematics that methods share, and the searches."""

import argparse
import math
from dataclasses import replace

import pytest
import torch
from small import CLASSES, SmallNet, arguments, run, small_job
from timm.models.levit import NormLinear
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import unlearn
import unlearn_cpu
import utils
from models import checkpoint
from models.errors import NotFinite, UserError
from models.training import Recipe

# ---------------------------------------------------------------- losses and factors


def test_adaptive_mean_gives_images_of_small_loss_more_weight():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = unlearn.adaptive_mean(losses, 1.0)
    assert mean.item() == pytest.approx((4 / 3 * 1 + 2 / 3 * 2) / 2)  # weights ∝ 1, ½, of mean 1
    mean.backward()
    assert losses.grad.tolist() == pytest.approx([4 / 3 / 2, 2 / 3 / 2])
    assert unlearn.adaptive_mean(losses, 0.0).item() == pytest.approx(1.5)
    assert unlearn.adaptive_mean(torch.tensor([0.0, 1.0]), 500.0).isfinite()


def test_conjugate_gradients_solve_the_system_and_end_at_their_limits():
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    matrix = root @ root.T + 0.3 * torch.eye(6)
    vector = {"a": torch.ones(2, 2).double(), "b": torch.tensor([-3.0, 1.0]).double()}
    flat = lambda tensors: torch.cat([tensors["a"].flatten(), tensors["b"]])  # noqa: E731
    calls, v = [], flat(vector)

    def solve(**limits):
        calls.clear()
        return flat(unlearn.conjugate_gradients(product, vector, **limits))

    def product(tensors):
        calls.append(matrix @ flat(tensors))
        return {"a": calls[-1][:4].view(2, 2), "b": calls[-1][4:]}

    torch.testing.assert_close(solve(tolerance=1e-10), torch.linalg.solve(matrix, v))
    assert vector["a"].eq(1).all() and len(calls) <= 7
    # The best point of the space that three products span, in the norm of the matrix.
    basis = torch.stack([v, matrix @ v, matrix @ matrix @ v]).T
    best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ v)
    torch.testing.assert_close(solve(max_steps=3), best)
    assert len(calls) == 3
    residual = (matrix @ solve(tolerance=0.5) - v).norm() / v.norm()
    assert 1e-3 < residual <= 0.5 and len(calls) < 6


def test_ssd_dampening_of_selected_weights_is_ratio_of_importances():
    forget, overall = torch.tensor([4.0, 1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = unlearn.dampening(forget, overall, 2.0, 1.0)
    assert factors.tolist() == pytest.approx([1 / 4, 1, 1 / 3, 1])
    factors = unlearn.dampening(forget, overall, 3.5, 0.5)
    assert factors.tolist() == pytest.approx([1 / 8, 1, 1, 1])
    assert unlearn.dampening(forget, overall, 2.0, 8.0).tolist() == [1, 1, 1, 1]
    assert unlearn.dampening(forget, overall, 3.0, 1.0)[2] == 1  # not above the weighting


def test_wrong_labels_are_wrong_and_uniform_on_forget_images_alone():
    job = small_job("RL", retain=50, forget=900)
    labels, targets = job.data.train.labels, unlearn.wrong_labels(job)
    assert targets[job.split.retain].equal(labels[job.split.retain])
    shifts = ((targets - labels)[job.split.forget] % CLASSES).bincount(minlength=CLASSES)
    assert shifts[0] == 0 and shifts[1:].min() > 180  # 225 expected
    assert unlearn.wrong_labels(job).equal(targets)


def class_job(name, **settings):
    """A job whose forget images are all images of class 3."""
    job = small_job(name, forget_class=3, **settings)
    labels = job.data.train.labels
    labels[labels == 3] = 1
    labels[job.split.forget] = 3
    return job


# ---------------------------------------------------------------- masks


def test_sfron_weights_of_equal_importance_are_salient():
    def weight(threshold):
        job = small_job("sfron", saliency_threshold=threshold)
        job.split = replace(job.split, forget=job.split.retain)
        return run(job)["4.weight"]

    assert not weight(1.0).equal(weight(1.01))


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


# ---------------------------------------------------------------- the classifier


def test_added_class_has_small_random_weights_and_is_removed_again():
    model, before, last = SmallNet().eval(), SmallNet().state_dict(), {}
    for seed in (1, 2, 3, 4):
        other = SmallNet()
        unlearn.widen(other, CLASSES, torch.Generator().manual_seed(seed))
        last[seed] = other[4].weight[CLASSES], other[4].bias[CLASSES]
    unlearn.widen(model, CLASSES, torch.Generator().manual_seed(1))
    wide, limit = model.state_dict(), 1 / math.sqrt(128)
    row, biases = wide["4.weight"][CLASSES], torch.stack([bias for _, bias in last.values()])
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, CLASSES + 1)
    assert wide["4.weight"][:CLASSES].equal(before["4.weight"])
    assert wide["4.bias"][:CLASSES].equal(before["4.bias"])
    assert limit / 2 < row.abs().max() <= limit and row.std() == pytest.approx(0.577 * limit, 0.2)
    assert last[1][0].equal(row) and last[1][1] == wide["4.bias"][CLASSES]
    assert not last[2][0].equal(row)
    assert biases.abs().max() <= limit and biases.min() < 0 < biases.max()
    unlearn.narrow(model, CLASSES)
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
        unlearn.widen(model, 5, torch.Generator())


@pytest.mark.parametrize("name", ["FisherForgetting", "boundary_expand"])
def test_method_that_edits_the_classifier_of_a_class_is_refused_where_it_is_not_linear(name):
    def job_of(**settings):
        job = small_job(name, model=network_with(NormLinear(48, 5)), **settings)
        job.data.train.labels[:] = torch.arange(30) % 4
        return job

    job = job_of()
    if name == "FisherForgetting":
        run(job)  # random images: no row of the classifier is replaced
    job = job_of(forget_class=4)
    job.data.train.labels[job.split.forget] = 4
    with pytest.raises(UserError, match="NormLinear"):
        run(job)


# ---------------------------------------------------------------- searches


class SearchJob:
    """A job whose model is a number, and whose accuracies are a function of it."""

    label, value = "search", 0.0

    def __init__(self, accuracy, stop_at=None):
        self.accuracy, self.stop_at, self.measured = accuracy, stop_at, []

    def accuracies(self, parts, limit):
        assert limit == 2000
        self.measured += parts
        return {part: self.accuracy(self.value) for part in parts}

    def move(self, value):
        self.value = value


def diverging(limit, accuracy):
    """Accuracies of a network whose logits are not finite beyond the limit."""

    def at(value):
        if value > limit:
            raise NotFinite("inf")
        return accuracy(value)

    return at


@pytest.mark.parametrize(
    ("weakest", "strongest", "needed"),
    [(1e-4, 1e3, 0.37), (1e-4, 1e3, 2e-4), (1e4, 0.01, 57.0), (1e4, 0.01, 1.0)],
)
def test_apply_strength_finds_the_weakest_that_forgets(weakest, strongest, needed):
    sign = math.copysign(1, strongest - weakest)
    accuracy = lambda value: 0.2 if sign * value >= sign * needed else 0.9  # noqa: E731
    for accuracies in (accuracy, diverging(3.0, accuracy) if sign > 0 else accuracy):
        job = SearchJob(accuracies, stop_at=0.2)
        unlearn.apply_strength(job, job.move, 5.0, weakest=weakest, strongest=strongest)
        # 1/1024 of seven or six powers of ten
        assert 1 <= (job.value / needed) ** sign < (strongest / weakest) ** (sign / 1000)
        assert job.measured == ["forget"] * 12
    job.stop_at = None
    unlearn.apply_strength(job, job.move, 5.0, weakest=weakest, strongest=strongest)
    assert job.value == 5 and len(job.measured) == 12


def test_apply_strength_that_never_forgets_ends_at_the_strongest():
    job = SearchJob(lambda value: 0.21, stop_at=0.2)
    unlearn.apply_strength(job, job.move, 5.0, weakest=1.0, strongest=100.0)
    assert job.value == 100


@pytest.mark.parametrize(
    ("accuracy", "scale"),
    [
        (lambda value: 0.8 - 0.04 * (value >= 0.3), 20.0),  # 95 % of 80 %
        (lambda value: 0.8 - 0.041 * (value >= 0.28), 0.25),
        (lambda value: 0.8 - 0.041 * (value > 0), 0.0),
        (lambda value: 0.8 - 0.041 * (0.28 < value < 9), 0.25),  # the first loss counts
        (diverging(1.7, lambda value: 0.8), 1.7),
    ],
)
def test_harmless_scale_is_the_largest_before_five_percent_of_the_retain_accuracy_are_lost(
    accuracy, scale
):
    job = SearchJob(accuracy)
    job.move(7.0)  # the original is at 0
    assert unlearn.largest_harmless_scale(job, job.move) == scale
    assert {*job.measured} == {"retain"}


def accuracies_of(name, part, **settings):
    job = class_job(name, **settings)
    job.data.train.labels = SmallNet().eval()(job.data.train.inputs).argmax(1)
    run(job)
    return job.accuracies([part])[part], {n: w.detach() for n, w in job.model.named_parameters()}


@pytest.mark.parametrize("name", ["ssd", "IU", "neg_merge", "FisherForgetting"])
def test_method_without_training_forgets_until_the_target(name):
    accuracy, weights = accuracies_of(name, "forget", stop_at=0.6)
    assert 0 < accuracy <= 0.6
    assert all(weight.isfinite().all() for weight in weights.values())


def test_neg_merge_without_a_scale_keeps_retain_accuracy_and_with_zero_the_weights():
    accuracy, weights = accuracies_of("neg_merge", "retain", learning_rate=0.02)
    assert accuracy >= 0.95  # of one
    _, unchanged = accuracies_of("neg_merge", "retain", learning_rate=0.02, step_scale=0.0)
    _, unit = accuracies_of("neg_merge", "retain", learning_rate=0.02, step_scale=1.0)
    name, original = "4.weight", SmallNet()[4].weight
    assert unchanged[name].equal(original)
    scale = ((weights[name] - original).norm() / (unit[name] - original).norm()).item()
    assert scale > 0.04 and 20 * scale == pytest.approx(round(20 * scale), abs=1e-3)


# ---------------------------------------------------------------- the registry and its flags


def test_help_lists_every_method_with_its_defaults():
    _, *lines = unlearn.describe_methods(unlearn.METHODS).splitlines()
    assert [line.split()[0] for line in lines] == [*unlearn.METHODS]
    texts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert "learning_rate 0.013" in texts["salun"] and "mask_ratio 0.5" in texts["salun"]
    assert "(classes: smoothing 32.0)" in texts["lotus"]
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


# The values of the papers for random sets of CIFAR-10, without options that are not set. The
# learning rate is constant except in DECREASING.
DEFAULTS = {
    "retrain": {},
    "finetune": {"num_epochs": 20},
    "amun": {"num_epochs": 10, "learning_rate": 0.01, "batch_size": 128, "radius": 0.04}
    | {"milestones": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
    "scrub": {"num_epochs": 5, "learning_rate": 5e-4, "batch_size": 32, "milestones": [3]}
    | {"msteps": 3, "kd_T": 4, "beta": 0.5, "gamma": 1, "forget_batch_size": 16},
    "l1_sparse": {"num_epochs": 10, "learning_rate": 0.01, "batch_size": 256, "l1_weight": 5e-4},
    "RL": {"num_epochs": 10, "learning_rate": 0.013, "batch_size": 256},
    "salun": {"num_epochs": 10, "learning_rate": 0.013, "batch_size": 256, "mask_ratio": 0.5},
    "GA": {"num_epochs": 5, "learning_rate": 1e-4, "batch_size": 256},
    "ga_plus": {"num_epochs": 10, "learning_rate": 0.01, "momentum": 0, "weight_decay": 0}
    | {"forget_weight": 0.05},
    "sfron": {"num_steps": 1500, "num_epochs": 5, "learning_rate": 0.01, "batch_size": 128}
    | {"ascent": 25, "ascent_every": 5, "adaptivity": 0.5, "saliency_threshold": 1, "max_norm": 7},
    "teacher": {"num_epochs": 1, "learning_rate": 1e-4, "batch_size": 256, "weight_decay": 0}
    | {"optimizer": "adam", "kd_T": 1, "retain_share": 0.3},
    "lotus": {"num_epochs": 10, "learning_rate": 1e-4, "batch_size": 128, "optimizer": "adamw"}
    | {"smoothing": 8, "retain_share": 0.3},
    "delete": {"num_epochs": 20, "learning_rate": 1e-3, "batch_size": 128, "weight_decay": 0},
    "boundary_shrink": {"num_epochs": 10, "learning_rate": 1e-5, "weight_decay": 0}
    | {"step_size": 0.1},
    "boundary_expand": {"num_epochs": 10, "learning_rate": 1e-5, "weight_decay": 0},
    "mu_mis": {"num_epochs": 50, "learning_rate": 2e-3, "recovery": 0.1},
    "neg_merge": {"num_epochs": 5, "learning_rate": 3e-3},
    "FisherForgetting": {"noise": 1e-7},
    "ssd": {"selection_weighting": 10, "dampening_constant": 1, "importance_batch": 128},
    "IU": {"step_scale": 0.2, "damping": 1},
}
DECREASING = ("retrain", "finetune", "amun", "scrub", "neg_merge", "FisherForgetting", "ssd", "IU")
for name in {*DEFAULTS} - {*DECREASING}:
    DEFAULTS[name]["schedule"] = "constant"
# What other scenarios, data sets and networks change.
SLOW = {"learning_rate": 5e-5}
OF_CLASSES = {"num_epochs": 3, "batch_size": 128, "msteps": 2, "beta": 0.001, "gamma": 0.99}
OF_VIT = {"num_epochs": 3, "learning_rate": 1e-6, "batch_size": 32, "smoothing": 2}
CHANGES = [
    ("delete", {"not_cifar10", "cifar100"}, SLOW),
    ("delete", {"not_cifar10", "tiny_imagenet"}, SLOW),
    ("delete", {"vit"}, SLOW),
    ("lotus", {"not_cifar10"}, {"smoothing": 2}),
    ("lotus", {"not_cifar10", "cifar100", "classes"}, {"smoothing": 32}),
    ("lotus", {"classes"}, {"smoothing": 32}),
    ("lotus", {"classes", "vit"}, OF_VIT),
    ("scrub", {"classes"}, OF_CLASSES | {"forget_batch_size": 512}),
    ("ssd", {"classes"}, {"importance_batch": 64}),
    ("ssd", {"vit"}, {"selection_weighting": 5}),
]


def defaults(name, cases):
    recipe, options = unlearn.defaults_of(unlearn.METHODS[name], cases)
    assert options.keys() == unlearn.METHODS[name].options.keys()
    return {k: v for k, v in (recipe | options).items() if v is not None and v is not False}


def test_methods_have_the_published_defaults():
    assert {name: defaults(name, set()) for name in unlearn.METHODS} == DEFAULTS
    changing = {name for name, cases, _ in CHANGES}
    everything = set(unlearn.CASES) - {"digits"}
    for name in unlearn.METHODS:
        assert (defaults(name, everything) == DEFAULTS[name]) == (name not in changing), name
    for name, cases, changes in CHANGES:
        assert defaults(name, cases) == DEFAULTS[name] | changes, (name, cases)
    assert unlearn.NEG_MERGE_RATES == (0.25, 0.5, 1, 2, 4) and unlearn.FISHER_IMAGES == 1000


def test_digits_have_values_of_their_own_in_all_scenarios():
    for name, entry in unlearn.METHODS.items():
        values = defaults(name, {"not_cifar10", "classes", "digits"})
        digits = {key: v for key, v in entry.cases.get("digits", {}).items() if v is not None}
        assert values | digits == values
        assert name in ("retrain", "neg_merge", "mu_mis") or not entry.trained or digits
        assert "num_steps" not in values and values.get("batch_size", 64) == 64


def test_option_without_a_method_has_no_flag():
    assert arguments("--kd_T", 2, methods=unlearn_cpu.METHODS).kd_T == 2
    assert not hasattr(arguments(methods=unlearn_cpu.METHODS), "noise")
    assert not hasattr(arguments(), "max_norm")  # an option without an annotation


def test_options_of_a_method_are_its_flags_or_else_its_defaults():
    def options(name, *flags):
        return unlearn.options_of(unlearn.METHODS[name], arguments(*flags, data="cifar10"))

    flags = ["--kd_T", 3, "--beta", 0, "--rewind"]
    assert options("teacher", *flags) == {"kd_T": 3.0, "retain_share": 0.3}
    scrub = {"msteps": 2, "kd_T": 3.0, "beta": 0, "gamma": 0.99, "forget_batch_size": 512}
    assert options("scrub", *flags, "--unlearn_type", "class") == scrub | {"rewind": True}
    assert options("finetune", *flags) == {} and options("amun", *flags) == {"radius": 0.04}
    assert options("GA", "--keep_statistics") == {"keep_statistics": True}
    # --num_epochs replaces the number of steps.
    assert options("sfron", "--ascent", 2)["num_steps"] == 1500
    assert options("sfron", "--num_epochs", 2)["num_steps"] is None


NOT_NEGATIVE = "msteps ascent forget_weight l1_weight beta gamma noise step_scale smoothing"
NOT_NEGATIVE += " selection_weighting dampening_constant"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("stop_accuracy", -0.1), ("stop_accuracy", 1.1), ("mask_ratio", -0.1), ("mask_ratio", 1.5)]
    + [("kd_T", 0), ("ascent_every", 0), ("forget_weight", 1.1)]
    + [(flag, -1) for flag in NOT_NEGATIVE.split()],
)
def test_option_out_of_bounds_is_refused(flag, value):
    assert getattr(arguments(f"--{flag}", 0 if value == -1 else 1), flag) in (0, 1)
    with pytest.raises(UserError, match=f"--{flag}"):
        arguments(f"--{flag}", value)


def test_option_of_no_chosen_method_is_refused():
    def check(names, *flags):
        methods = {name: unlearn.METHODS[name] for name in names}
        unlearn.check_method_flags(arguments(*flags), methods)

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
        register = unlearn.method(
            trained=trained, extensible=extensible, num_epochs=2, vit={"weight": 1.0}
        )
        assert register(nothing) is nothing
        assert unlearn.METHODS["nothing"] == unlearn.Method(
            name="nothing",
            run=nothing,
            training={"num_epochs": 2},
            cases={"vit": {"weight": 1.0}},
            options={"weight": 0.3, "other": 2},
            flags={"weight": weight},
            trained=trained,
            extensible=trained and extensible,
        )
    with pytest.raises(TypeError, match="epochs"):
        unlearn.method(epochs=3)


# ---------------------------------------------------------------- recipes

CPU = torch.device("cpu")
ORIGINAL = {"num_epochs": 33, "learning_rate": 0.07, "batch_size": 17, "milestones": [9, 21]}
TRAINING = ["--num_epochs", 3, "--learning_rate", 0.5, "--batch_size", 5, "--milestones", "1,2"]


def recipe(name, *flags, original=ORIGINAL, data="cifar10"):
    return unlearn.recipe_of(unlearn.METHODS[name], arguments(*flags, data=data), original, CPU)


def test_method_without_flags_has_its_defaults_or_the_recipe_of_the_original():
    assert recipe("retrain") == Recipe(33, 0.07, 17, [9, 21])
    assert recipe("finetune") == Recipe(20, 0.07)
    assert recipe("salun") == Recipe(10, 0.013, 256, schedule="constant")
    assert recipe("teacher").optimizer == "adam" and recipe("ga_plus").momentum == 0
    assert recipe("scrub") == Recipe(5, 5e-4, 32, [3])
    assert recipe("scrub", "--unlearn_type", "class") == Recipe(3, 5e-4, 128, [3])
    assert recipe("ssd") is None


@pytest.mark.parametrize("name", ["retrain", "finetune", "salun"])
def test_flags_override_defaults_and_the_recipe_of_the_original(name):
    flags = [*TRAINING, "--precision", "bf16"]
    expected = Recipe(3, 0.5, 5, [1, 2], precision="bf16")
    assert unlearn.original_recipe(arguments(*flags), CPU) == expected
    expected = replace(expected, schedule="constant" if name == "salun" else "cosine")
    assert recipe(name, *flags) == recipe(name, *flags, original={}) == expected


def test_original_has_the_recipe_of_its_data_set_or_of_a_pretrained_network():
    def original(*flags, data="cifar10"):
        expected = unlearn.original_recipe(arguments(*flags, data=data), CPU)
        assert recipe("retrain", *flags, original={}, data=data) == expected
        return expected

    assert original() == Recipe(utils.SPECS["cifar10"].num_epochs, 0.1)
    assert original(data="digits") == Recipe(utils.SPECS["digits"].num_epochs, 0.01)
    assert original("--model_name", "resnet50") == Recipe(20, 0.01)
    assert original("--model_name", "resnet50", "--num_epochs", 33) == Recipe(33, 0.01)


@pytest.mark.parametrize(
    ("data", "flags", "cases"),
    [
        ("cifar10", [], ""),
        ("cifar10", ["--unlearn_type", "list"], ""),
        ("cifar10", ["--unlearn_type", "class"], "classes"),
        ("cifar100", ["--unlearn_type", "random"], "not_cifar10 cifar100"),
        ("cifar20", ["--unlearn_type", "subclass"], "not_cifar10 classes"),
        ("tiny_imagenet", ["--model_name", "vit"], "not_cifar10 tiny_imagenet vit"),
        ("digits", [], "not_cifar10 digits"),
        ("digits", ["--model_name", "vit"], "not_cifar10 vit"),  # pre-trained
    ],
)
def test_cases_of_published_values(data, flags, cases):
    assert unlearn.cases_of(arguments(*flags, data=data)) == {*cases.split()}


# ---------------------------------------------------------------- properties of all methods


def test_cpu_variants_exist_for_methods_that_descend_on_a_bounded_loss():
    without = set(unlearn.METHODS) - {name.removeprefix("cpu_") for name in unlearn_cpu.METHODS}
    assert without == {"GA", "FisherForgetting", "ssd", "IU", "neg_merge"}


@pytest.mark.parametrize("name", unlearn.METHODS)
def test_same_seed_gives_same_weights_and_another_seed_others(name):
    first, second, other = (run(small_job(name, seed=seed)) for seed in (4, 4, 5))
    assert all(first[key].equal(tensor) for key, tensor in second.items())
    is_equal = all(first[key].equal(tensor) for key, tensor in other.items())
    assert is_equal == (name in ("ssd", "IU"))  # which draw no random numbers


@pytest.mark.parametrize("name", unlearn.METHODS)
def test_method_changes_weights_that_are_channels_last(name):
    """They are on a GPU, where a view of them fails."""
    before = SmallNet()
    after = run(small_job(name, model=SmallNet().to(memory_format=torch.channels_last)))
    assert not all(after[key].equal(tensor) for key, tensor in before.state_dict().items())


def tiny_vit():
    torch.manual_seed(0)
    size = {"img_size": 4, "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return VisionTransformer(num_classes=CLASSES, **size)


@pytest.mark.parametrize("make_job", [small_job, class_job])
@pytest.mark.parametrize("label", [*unlearn.METHODS, *unlearn_cpu.METHODS])
def test_method_changes_a_transformer_and_keeps_its_weights_finite(label, make_job):
    """Attention has no second derivative in its fused form."""
    settings = {"num_epochs": 1, "lamda": 0.5 if label.startswith("cpu_") else None}
    after = run(make_job(label, model=tiny_vit(), new_model=tiny_vit, **settings))
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not all(after[name].equal(tensor) for name, tensor in tiny_vit().state_dict().items())
