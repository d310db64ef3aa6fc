"""The baseline methods of unlearning.

A method is a function of a :class:`models.training.Job` that trains or changes ``job.model``.
``@method`` registers it with its default hyper-parameters. Its options are keyword arguments, and
an argument annotated with an :class:`Option` has a flag. The docstrings name each method's paper
and the source of its defaults; measurements are in .results/recipes.md.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import models
import utils
from metrics.accuracy import accuracy
from models import adversarial, checkpoint, fisher, inference, seeds
from models.errors import NotFinite, UserError
from models.training import MONITORED, PARTS, Recipe

MASK_FILE = "saliency_mask.pth"
TRAINING_FLAGS = ("num_epochs", "learning_rate", "batch_size", "milestones")

# ---------------------------------------------------------------- the registry


class Option(NamedTuple):
    """The flag of a method's option: its argparse type, and its help. ``bool`` is a bare flag."""

    type: Callable
    help: str


TEMPERATURE = Option(utils.number(float, 0, exclusive=True), "temperature of the distillation")
RETAIN_SHARE = Option(
    utils.number(float, 0, 1, exclusive=False), "share of the retain images that are trained on"
)
STEP_SCALE = Option(utils.number(float, 0), "factor of the step on the weights")
KEEP_STATISTICS = Option(bool, "BatchNorm keeps the original's running statistics and uses them")

# Where a method has other values than for random sets of CIFAR-10 and ResNet-18: the cases that
# @method accepts, of which the last one that holds counts. Nobody published any for digits.
CASES = ("not_cifar10", "cifar100", "tiny_imagenet", "classes", "vit", "digits")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and its default hyper-parameters.

    ``run(job, **options)`` changes ``job.model``. ``training`` are the fields of :class:`Recipe`
    that the method sets. A method without ``num_epochs`` trains as the original model did, and one
    without ``learning_rate`` starts from its rate. ``options`` are the values of its options,
    ``flags`` the :class:`Option` of those that have a flag. ``cases`` has the values of both kinds
    that differ in one of ``CASES``. A method that is not ``trained`` has no recipe, and one that is
    not ``extensible`` no CPU variant.
    """

    name: str
    run: Callable
    training: dict = field(default_factory=dict)
    cases: dict[str, dict] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    flags: dict[str, Option] = field(default_factory=dict)
    trained: bool = True
    extensible: bool = True

    @property
    def flag_names(self):
        """The flags that apply to the method: those of its options and of the training loop."""
        return {*self.flags, *(TRAINING_FLAGS if self.trained else ())}


METHODS: dict[str, Method] = {}


def method(*, trained=True, extensible=True, **settings):
    """Register the decorated function under its name.

    ``settings`` are fields of Recipe, and {setting: value} for some of ``CASES``.
    """
    cases = {case: settings.pop(case) for case in CASES if case in settings}
    if unknown := settings.keys() - {setting.name for setting in fields(Recipe)}:
        raise TypeError(f"not fields of Recipe: {', '.join(unknown)}")

    def register(function):
        options = list(inspect.signature(function).parameters.values())[1:]
        METHODS[function.__name__] = Method(
            name=function.__name__,
            run=function,
            training=settings,
            cases=cases,
            options={option.name: option.default for option in options},
            flags={
                option.name: option.annotation
                for option in options
                if isinstance(option.annotation, Option)
            },
            trained=trained,
            extensible=trained and extensible,
        )
        return function

    return register


def describe_methods(methods):
    """The methods (:class:`Method` by label) with their defaults, for ``--help``."""
    lines = ["methods and their defaults:"]
    for label, entry in methods.items():
        original = "as for the original model"
        settings = {"num_epochs": original, "learning_rate": original} | entry.training
        settings = settings if entry.trained else {"no training": ""}
        settings |= {name: entry.options[name] for name in entry.flags}
        shown = [
            f"{name} {value}".strip()
            for name, value in settings.items()
            if value not in (None, False)
        ]
        for case, values in entry.cases.items():
            changed = ", ".join(f"{name} {value}" for name, value in values.items())
            shown.append(f"({case}: {changed})")
        lines.append(f"  {label:<16} {', '.join(shown)}")
    return "\n".join(lines)


def method_names(items, known, prefix=""):
    """The methods of ``--unlearn_name``, separated by blanks or commas; ``all`` is every known one.

    A name that is unknown is tried with ``prefix``. Raises UserError for unknown names.
    """
    names = [name for name in ",".join(items).split(",") if name]
    names = list(known) if "all" in names else names
    names = list(dict.fromkeys(name if name in known else prefix + name for name in names))
    if not names or not set(names) <= set(known):
        raise UserError(f"--unlearn_name {' '.join(items)}: choose from {', '.join(known)}, or all")
    return names


def add_option_flags(parser, methods):
    """Add a flag for every option that the methods (:class:`Method` by label) have."""
    group = parser.add_argument_group("options of single methods", "defaults: listed below")
    owners = {}
    for label, entry in methods.items():
        for name, option in entry.flags.items():
            owners.setdefault((name, option), []).append(label)
    for (name, option), labels in owners.items():
        text = f"{', '.join(labels)}: {option.help}"
        if option.type is bool:
            group.add_argument(f"--{name}", action="store_const", const=True, help=text)
        else:
            group.add_argument(f"--{name}", type=option.type, help=text)


def add_stop_flags(parser):
    """Flags that compare methods at an equal level of forgetting instead of their authors' ends."""
    add = parser.add_argument_group("until forgotten").add_argument
    end = "end training after the epoch in which the forget accuracy falls to --stop_accuracy; "
    end += "ssd, IU, neg_merge and FisherForgetting take the weakest setting that reaches it"
    add("--until_forgotten", action="store_true", help=end)
    target = "default: 0.03 for classes, else the accuracy on held-out images"
    add("--stop_accuracy", type=utils.number(float, 0, 1), help=target)


def check_method_flags(args, methods):
    """Raise UserError for a flag that applies to methods, but to none of the chosen ``methods``."""
    for name in set().union(*(entry.flag_names for entry in METHODS.values())):
        passed = getattr(args, name, None) is not None
        if not passed or any(name in entry.flag_names for entry in methods.values()):
            continue
        owners = ", ".join(label for label, entry in METHODS.items() if name in entry.flag_names)
        raise UserError(f"--{name} applies to {owners} and not to {', '.join(methods)}; omit it")


def defaults_of(entry, cases):
    """(Recipe fields, options) of a method where the ``cases``, names of CASES, hold."""
    settings = entry.training | entry.options
    for case in CASES:
        if case in cases:
            settings |= entry.cases.get(case, {})
    options = {name: settings.pop(name) for name in entry.options}
    return settings, options


def cases_of(args):
    """Which of ``CASES`` hold for the flags: where a method's published values differ."""
    from_scratch = args.model_name in models.FROM_SCRATCH
    cases = {
        "not_cifar10": args.data_name != "cifar10",
        "cifar100": args.data_name == "cifar100",
        "tiny_imagenet": args.data_name == "tiny_imagenet",
        "classes": args.unlearn_type in ("class", "subclass"),
        "vit": "vit" in args.model_name,
        "digits": args.data_name == "digits" and from_scratch,
    }
    return {case for case, holds in cases.items() if holds}


def options_of(entry, args):
    """The options of a method: the flags that were passed, else its defaults."""
    passed = {name: getattr(args, name, None) for name in entry.flags}
    passed = {name: value for name, value in passed.items() if value is not None}
    if args.num_epochs and "num_steps" in entry.options:
        passed["num_steps"] = None
    return defaults_of(entry, cases_of(args))[1] | passed


def original_recipe(args, device):
    """The recipe of the original model: flags, else the defaults of the data set.

    A network that starts from ImageNet weights trains for at most 20 epochs at 0.01.
    """
    spec = utils.SPECS[args.data_name]
    num_epochs, learning_rate = spec.num_epochs, spec.learning_rate
    if args.model_name not in models.FROM_SCRATCH:
        num_epochs, learning_rate = min(num_epochs, 20), 0.01
    return Recipe(
        num_epochs=args.num_epochs or num_epochs,
        learning_rate=args.learning_rate or learning_rate,
        batch_size=args.batch_size or Recipe.batch_size,
        milestones=args.milestones,
        precision=pick_precision(args, device),
    )


def recipe_of(entry, args, original, device):
    """The :class:`Recipe` of a method: flags, else its defaults, else the recipe of the original.

    None for a method without training. ``original`` is a dict; without one, as for a model of other
    code, it is the recipe that the flags give an original model.
    """
    if not entry.trained:
        return None
    original = original or asdict(original_recipe(args, device))
    defaults, _ = defaults_of(entry, cases_of(args))
    inherited = ["learning_rate"] if "num_epochs" in defaults else TRAINING_FLAGS
    settings = {name: original[name] for name in inherited} | defaults
    for name in TRAINING_FLAGS:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return Recipe(**settings, precision=pick_precision(args, device))


def target_of(args, model, data, split):
    """The forget accuracy of --until_forgotten, else None: --stop_accuracy, else 3 % for classes,
    and the original ``model``'s accuracy on held-out images for other images.
    """
    if not args.until_forgotten or args.stop_accuracy is not None:
        return args.stop_accuracy
    return 0.03 if split.forget_classes else unseen_accuracy(model, data, split)


def pick_precision(args, device):
    """``--precision``. ``auto`` is bf16 on a GPU that supports it, else fp32."""
    if args.precision != "auto":
        return args.precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


# ---------------------------------------------------------------- training on the retain set


def train_on_retain_set(job):
    """Minimize the cross-entropy of the retain images."""
    for epoch in job.epochs():
        for batch in epoch.batches("retain"):
            epoch.step(F.cross_entropy(*batch.retain), batch)


@method()
def retrain(job):
    """Retrain, the reference: train from scratch on the retain set with the original's recipe.

    It ignores --until_forgotten: a network that has just been initialised recognises nothing.
    """
    job.model, job.stop_at = job.new_model(), None
    train_on_retain_set(job)


@method(num_epochs=20, digits={"learning_rate": 0.02})
def finetune(job):
    """Fine-tuning: train the original model on the retain set (Warnecke et al. 2021, 2108.11577).

    Defaults: 20 epochs at the learning rate of the original model, as the command line published
    with arXiv 2501.19403 has them for CIFAR-10 (20 epochs at 0.1). Unlearn-Sparse (2304.04934) has
    10 epochs at 0.01 in batches of 256.
    """
    train_on_retain_set(job)


@method(
    num_epochs=10,
    learning_rate=0.01,
    batch_size=256,
    schedule="constant",
    digits={"num_epochs": 20, "learning_rate": 0.02, "batch_size": 64, "schedule": "cosine"},
)
def l1_sparse(
    job, l1_weight: Option(utils.number(float, 0), "weight of the L1 penalty in epoch 1") = 5e-4
):
    """Fine-tuning on the retain set with an L1 penalty on all weights, which prunes what they do
    not need (Jia et al. 2023, 2304.04934).

    The weight of the penalty falls linearly over the epochs, to zero after the last. Defaults:
    Unlearn-Sparse, the authors' code (arg_parser.py, README).
    """
    for epoch in job.epochs():
        weight = l1_weight * (1 - (epoch.number - 1) / job.recipe.num_epochs)
        for batch in epoch.batches("retain"):
            penalty = sum(parameter.abs().sum() for parameter in job.model.parameters())
            epoch.step(F.cross_entropy(*batch.retain) + weight * penalty, batch)


# ---------------------------------------------------------------- wrong labels


@method(
    num_epochs=10,
    learning_rate=0.013,
    batch_size=256,
    schedule="constant",
    digits={"batch_size": 64, "schedule": "cosine"},
)
def RL(job):
    """Random labels: train the original model on the retain images, and on the forget images with
    wrong labels, drawn once (Golatkar et al. 2020, 1911.04933; the code of arXiv 2501.19403).

    Defaults: those published with SalUn (2310.12508). SFRon (2409.19732) has a rate of 0.003. The
    code of SalUn draws a label among all classes, the true one included, in every batch.
    """
    targets = wrong_labels(job)
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget"):
            epoch.step(F.cross_entropy(batch.logits, targets[batch.indices]), batch)


def wrong_labels(job):
    """The labels of all training images, with uniformly drawn wrong ones for the forget images."""
    labels = job.data.train.labels
    rng = seeds.generator(job.seed, "random labels")
    # A shift of 0 would be the true label.
    shift = torch.randint(1, job.num_classes, (len(labels),), generator=rng).to(job.device)
    targets = labels.clone()
    targets[job.split.forget] = (labels + shift)[job.split.forget] % job.num_classes
    return targets


@method(
    num_epochs=10,
    learning_rate=0.013,
    batch_size=256,
    schedule="constant",
    digits={"batch_size": 64, "schedule": "cosine"},
)
def salun(
    job,
    mask_ratio: Option(utils.number(float, 0, 1), "fraction of the weights that are salient") = 0.5,
    mask_path: Option(
        utils.expand_path, f"use a saved mask ({MASK_FILE} of an earlier run) instead of a new one"
    ) = None,
):
    """SalUn: random labels, applied only to the weights with the largest gradient of the forget
    loss (Fan et al. 2024, 2310.12508).

    The other weights keep the values of the original model. Retain and forget images are mixed in
    every batch and the labels drawn once, as in the code of arXiv 2501.19403. SalUn's code passes
    the forget set with labels that are drawn again in every batch, then the retain set. Defaults:
    SalUn's README for 10 % of CIFAR-10.
    """
    masks = read_mask(mask_path, job.model) if mask_path else saliency_mask(job, mask_ratio)
    job.by_products[MASK_FILE] = masks
    masks = {name: mask.to(job.device) for name, mask in masks.items()}
    originals, targets = copies(job.model), wrong_labels(job)
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget"):
            epoch.step(F.cross_entropy(batch.logits, targets[batch.indices]), batch)
            restore_unmasked(job.model, masks, originals)


@torch.no_grad()
def restore_unmasked(model, masks, originals):
    """Set the weights outside of the masks back to their original values.

    A gradient of zero is not enough: weight decay and momentum move the weights too.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.where(masks[name], parameter, originals[name]))


def saliency_mask(job, mask_ratio):
    """The fraction ``mask_ratio`` of all weights with the largest |∇ cross-entropy of D_f|.

    Returns booleans by parameter name.
    """
    images, chunk = job.data.train, job.recipe.batch_size
    gradients = fisher.mean_gradient(job.model, images, job.split.forget, chunk=chunk)
    # One ranking over all tensors: a layer may be salient as a whole, or not at all.
    magnitudes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    salient = torch.zeros(len(magnitudes), dtype=torch.bool, device=job.device)
    salient[magnitudes.topk(round(mask_ratio * len(magnitudes))).indices] = True
    flat_masks = salient.split([gradient.numel() for gradient in gradients.values()])
    return {
        name: mask.view_as(gradients[name])
        for name, mask in zip(gradients, flat_masks, strict=True)
    }


def read_mask(path, model):
    """A saved mask, booleans by parameter name. Raises UserError unless it fits the network."""
    masks, _ = checkpoint.read(path, f"salun saves its mask with its model, as {MASK_FILE}")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = checkpoint.match_names(masks, shapes, path)
    if {name: mask.shape for name, mask in masks.items()} != shapes:
        raise UserError(f"--mask_path {path}: not a mask of this network")
    if not all(((mask == 0) | (mask == 1)).all() for mask in masks.values()):
        raise UserError(f"--mask_path {path}: not a mask: it has values other than 0 and 1")
    return {name: masks[name].bool() for name in shapes}


@method(
    num_epochs=10,
    learning_rate=0.01,
    batch_size=128,
    milestones=list(range(1, 10)),
    digits={"batch_size": 64, "milestones": None},
)
def amun(job, radius=0.04):
    """AMUN: train all images with their true labels, and the nearest adversarial example of every
    forget image with the wrong label that the original model gives it (Ebrahimpour-Boroojeny et al.
    2025, 2503.00917).

    The adversarial examples are not augmented. ``radius`` is the first radius of the attack in
    pixels of range 0 to 1 (:func:`models.adversarial.nearest`). Defaults: the authors' code
    (hyperparam_tune.py, pgdl2_modified.py), in which the rate is divided by 10 after every epoch.
    In cpu_amun the conformal loss is that of the adversarial examples under the true labels.
    """
    forget_set, targets = job.split.forget, job.data.train.labels.clone()
    examples = adversarial.adversarial_examples(
        job.model, job.data.train, forget_set, radius, job.recipe.batch_size
    )
    targets[forget_set] = examples.labels
    position = torch.zeros_like(targets)  # of a forget image among the examples
    position[forget_set] = torch.arange(len(forget_set), device=job.device)
    # D, with true labels, takes the place of the retain set, and the adversarial examples that of
    # the forget set.
    everything = torch.cat([job.split.retain, forget_set])
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget", retain_set=everything):
            batch.inputs[batch.num_retain :] = examples.inputs[position[batch.forget_indices]]
            labels = batch.labels.clone()
            labels[batch.num_retain :] = targets[batch.forget_indices]
            epoch.step(F.cross_entropy(batch.logits, labels), batch)


# ---------------------------------------------------------------- gradient ascent


@method(
    num_epochs=5,
    learning_rate=1e-4,
    batch_size=256,
    schedule="constant",
    extensible=False,
    digits={"num_epochs": 20, "learning_rate": 5e-5, "batch_size": 64, "keep_statistics": True},
)
def GA(job, keep_statistics: KEEP_STATISTICS = False):
    """Gradient ascent on the cross-entropy of the forget images (Thudi et al. 2022, 2109.13398).

    Defaults: Unlearn-Sparse (2304.04934). BatchNorm is in train mode, as there: its statistics
    become those of the forget images.
    """
    for epoch in job.epochs(eval_mode=keep_statistics):
        for batch in epoch.batches("forget"):
            epoch.step(-F.cross_entropy(*batch.forget), batch)  # the optimizer descends


@method(
    num_epochs=10,
    learning_rate=0.01,
    momentum=0.0,
    weight_decay=0.0,
    schedule="constant",
    digits={"forget_weight": 0.005, "momentum": 0.9},
)
def ga_plus(
    job,
    forget_weight: Option(
        utils.number(float, 0, 1), "weight of the ascent; 1 less it is that of the descent"
    ) = 0.05,
):
    """NegGrad+: descent on the retain images and ascent on the forget images in every step
    (Kurmanji et al. 2023, 2302.09880).

    A step has a batch of retain images and a batch of forget images, which pass through the network
    one after the other, so that BatchNorm does not mix them. The forget set is repeated within an
    epoch. Defaults: the notebooks of the authors' code, whose SGD has no momentum and no decay.
    """
    for epoch in job.epochs():
        forget_batches = epoch.cycle("forget")
        steps = [
            (torch.cat([retain, next(forget_batches)]), len(retain))
            for retain, _ in epoch.steps("retain")
        ]
        for batch in epoch.visit(steps, separate_passes=True):
            descent, ascent = F.cross_entropy(*batch.retain), F.cross_entropy(*batch.forget)
            epoch.step((1 - forget_weight) * descent - forget_weight * ascent, batch)


@method(
    num_epochs=5,
    learning_rate=0.01,
    batch_size=128,
    schedule="constant",
    digits={"num_steps": None, "batch_size": 64},
)
def sfron(
    job,
    ascent: Option(
        utils.number(float, 0), "initial weight of the ascent, which follows a cosine to zero"
    ) = 25.0,
    ascent_every: Option(utils.number(int, 1), "number of repair steps per ascent step") = 5,
    num_steps=1500,
    adaptivity=0.5,
    saliency_threshold=1.0,
    max_norm=7.0,
):
    """SFRon: alternate between weighted ascent on the forget images, restricted to salient weights,
    and repair on the retain images (Huang et al. 2024, 2409.19732).

    A weight is salient if its empirical Fisher information, image by image, is at least
    ``saliency_threshold`` times as large on the forget as on the retain images. ``adaptivity`` is
    the exponent of :func:`adaptive_mean`, ``max_norm`` the largest norm of an ascent's gradient.
    There are ``num_steps`` repair steps, or --num_epochs passes, over which ascent and learning
    rate follow a cosine. Defaults: the authors' code for 10 % of CIFAR-10 (unlearn/sfron.py).
    """
    forget, retain = (
        fisher.diagonal_fisher(job.model, job.data.train, indices, fisher.observed_score)
        for indices in (job.split.forget, job.split.retain)
    )
    salient = {name: forget[name] >= saliency_threshold * retain[name] for name in forget}
    steps_per_epoch = math.ceil(len(job.split.retain) / job.recipe.batch_size)
    if num_steps is not None:
        job.recipe = replace(job.recipe, num_epochs=math.ceil(num_steps / steps_per_epoch))
    num_steps = num_steps or steps_per_epoch * job.recipe.num_epochs
    for epoch in job.epochs():
        steps_done = steps_per_epoch * (epoch.number - 1)  # repair steps, also after resuming
        ascents, steps = epoch.cycle("forget"), []
        for number, repair in enumerate(epoch.steps("retain")[: num_steps - steps_done]):
            if number % ascent_every == 0:
                steps.append((next(ascents), 0))
            steps.append(repair)
        for batch in epoch.visit(steps):
            cosine = (1 + math.cos(math.pi * steps_done / num_steps)) / 2
            epoch.set_learning_rate(cosine * job.recipe.learning_rate)
            if batch.num_retain:
                steps_done += 1
                epoch.step(F.cross_entropy(*batch.retain), batch)
                continue
            losses = F.cross_entropy(*batch.forget, reduction="none")
            epoch.backward(-ascent * cosine * adaptive_mean(losses, adaptivity), batch)
            # The ascent moves salient weights only; the norm is that of what is left.
            for name, parameter in job.model.named_parameters():
                parameter.grad *= salient[name]
            nn.utils.clip_grad_norm_(job.model.parameters(), max_norm)
            epoch.update()


def adaptive_mean(losses, adaptivity):
    """Mean over images of w·ℓ with w ∝ ℓ^−λ of mean 1 (Huang et al. 2024).

    Images with a large loss ℓ, which are already forgotten, have a small weight w. The weights
    have no gradient. M losses, λ = ``adaptivity`` → a scalar.
    """
    log_losses = losses.detach().clamp(min=torch.finfo(losses.dtype).eps).log()
    # softmax(−λ·log ℓ) is ℓ^−λ normalized to a sum of 1. The power itself overflows for a large λ.
    weights = (-adaptivity * log_losses).softmax(dim=0)
    return (weights * losses).sum()


# ---------------------------------------------------------------- distillation


def frozen(network):
    """A network in eval mode without gradients, as a teacher."""
    return network.eval().requires_grad_(False)


def distance(logits, targets, temperature):
    """T² · mean over images of KL(teacher ‖ student), both softened by the temperature T.

    ``logits`` are the student's and ``targets`` the teacher's, both N×K → a scalar.
    """
    student, teacher = (F.log_softmax(x / temperature, dim=1) for x in (logits, targets))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def retain_sample(job, share):
    """A random share of the retain images, at least one: indices in ascending order."""
    retain = job.split.retain
    count = max(1, round(share * len(retain)))
    rng = seeds.generator(job.seed, job.name, "sample")
    chosen = torch.randperm(len(retain), generator=rng)[:count].sort().values
    return retain[chosen.to(retain.device)]


@method(
    num_epochs=1,
    learning_rate=1e-4,
    batch_size=256,
    weight_decay=0.0,
    optimizer="adam",
    schedule="constant",
    digits={"num_epochs": 20, "learning_rate": 1e-3, "batch_size": 64, "retain_share": 1.0},
)
def teacher(job, kd_T: TEMPERATURE = 1.0, retain_share: RETAIN_SHARE = 0.3):
    """Bad teaching: distill the original model on the retain images and an untrained network on the
    forget images (Chundawat et al. 2023, 2205.08096).

    If the network is pre-trained, the untrained one is the pre-trained network with a new head. The
    divergence is the mean over images of its sum over classes. The authors' is the mean over both,
    which Adam does not notice. Defaults: the bad-teaching repository, which samples D_r once.
    """
    competent, incompetent = frozen(copy.deepcopy(job.model)), frozen(job.new_model())
    retain_set = retain_sample(job, retain_share)
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget", retain_set=retain_set):
            retain_targets = batch.outputs_of(competent, "retain")
            forget_targets = batch.outputs_of(incompetent, "forget")
            targets = torch.cat([retain_targets, forget_targets])  # in the order of batch.logits
            epoch.step(distance(batch.logits, targets, kd_T), batch)


@method(
    num_epochs=5,
    learning_rate=5e-4,
    batch_size=32,
    milestones=[3],
    classes={"num_epochs": 3, "batch_size": 128, "msteps": 2, "beta": 0.001, "gamma": 0.99,
             "forget_batch_size": 512},
    digits={"num_epochs": 10, "learning_rate": 2e-3, "batch_size": 64, "milestones": None,
            "msteps": 2, "beta": 0.001, "gamma": 0.99, "forget_batch_size": None},
)  # fmt: skip
def scrub(
    job,
    msteps: Option(
        utils.number(int, 0), "epochs that start with a maximization pass over the forget images"
    ) = 3,
    kd_T: TEMPERATURE = 4.0,
    beta: Option(
        utils.number(float, 0), "weight of the distance on retain images (α in the paper)"
    ) = 0.5,
    gamma: Option(utils.number(float, 0), "weight of the cross-entropy on retain images") = 1.0,
    forget_batch_size=16,
    rewind: Option(
        bool, "SCRUB+R: return to the epoch with the forget error of held-out images"
    ) = False,
):
    """SCRUB: alternate between moving away from the original model on the forget images, and back
    to it and to the labels on the retain images (Kurmanji et al. 2023, 2302.09880).

    The first ``msteps`` epochs start with a pass over the forget images. ``beta`` and ``gamma`` are
    α and γ of the paper. Defaults: the notebooks of the authors' code, for random sets those of
    user privacy (MIA_experiments), for classes those of CIFAR-10 (BadT_experiments). RUM
    (2406.01257) has 5 epochs at 5e-3, ``msteps`` 4. With ``rewind`` (SCRUB+R) the result is the
    epoch whose forget accuracy is nearest to the last epoch's accuracy on held-out images of the
    same classes.
    """
    if rewind and not len(matched_images(job)):
        raise UserError(f"{job.label}: no held-out image of the forgotten classes for --rewind")
    original = frozen(copy.deepcopy(job.model))
    for epoch in job.epochs(keep_weights=rewind):
        if epoch.number <= msteps:
            for batch in epoch.batches("forget", batch_size=forget_batch_size):
                targets = batch.outputs_of(original, "forget")
                epoch.step(-distance(batch.logits, targets, kd_T), batch)
        for batch in epoch.batches("retain"):
            logits, labels = batch.retain
            to_original = distance(logits, batch.outputs_of(original, "retain"), kd_T)
            epoch.step(beta * to_original + gamma * F.cross_entropy(logits, labels), batch)
    if rewind:
        reference = matched_accuracy(job)
        distances = [abs(record["forget_acc"] - reference) for record in job.records]
        job.model.load_state_dict(job.weights_after[distances.index(min(distances))])


def matched_images(job):
    """The training calibration images of classes that the forget images have."""
    calibration = job.split.train_calibration
    classes = job.data.train.labels[job.split.forget].unique()
    return calibration[torch.isin(job.data.held_out.labels[calibration], classes)]


def matched_accuracy(job):
    """The accuracy on :func:`matched_images`, with the classes weighted as in the forget set."""
    logits, labels = inference.compute_logits(job.model, job.data.held_out, matched_images(job))
    forget_labels = job.data.train.labels[job.split.forget].to(labels.device)
    # Every image of a class has an equal part of the share that the class has in the forget set.
    shares = forget_labels.bincount(minlength=job.num_classes).double()
    weights = (shares / labels.bincount(minlength=job.num_classes))[labels]
    is_right = (logits.argmax(dim=1) == labels).double()
    return ((weights * is_right).sum() / weights.sum()).item()


@method(
    num_epochs=10,
    learning_rate=1e-4,
    batch_size=128,
    optimizer="adamw",
    schedule="constant",
    not_cifar10={"smoothing": 2.0},
    classes={"smoothing": 32.0},
    vit={"num_epochs": 3, "learning_rate": 1e-6, "batch_size": 32, "smoothing": 2.0},
    digits={"learning_rate": 1e-3, "batch_size": 64, "retain_share": 1.0},
)
def lotus(
    job,
    smoothing: Option(
        utils.number(float, 0), "growth of the temperature with forget accuracy above the bound"
    ) = 8.0,
    retain_share: RETAIN_SHARE = 0.3,
):
    """LoTUS: smooth the original model's outputs on the forget images until the model knows them no
    better than unseen images (Spartalis et al. 2025, 2503.18314).

    The targets are the original model's logits with Gumbel noise: for forget images their softmax
    at the temperature exp(``smoothing`` · (forget accuracy − accuracy on unseen images)), computed
    again in every epoch, for retain images the likeliest class. Classes have no unseen images, and
    their bound is 0. Training ends once the forget accuracy is 1 % below the bound. Defaults: the
    authors' code (src/bash_scripts/reproduce_results.sh, class_reproduce_results.sh).
    """
    original, bound = frozen(copy.deepcopy(job.model)), 0.0
    if not job.split.forget_classes:
        bound = unseen_accuracy(job.model, job.data, job.split)
    retain_set = retain_sample(job, retain_share)
    for epoch in job.epochs(stop_at=bound - 0.01):
        forget_accuracy = job.monitor(["forget"])["forget_acc"]
        # Above 1 while the forget images are recognised better than unseen ones.
        temperature = math.exp(smoothing * (forget_accuracy - bound))
        rng = epoch.generator("gumbel")
        for batch in epoch.batches("retain", "forget", retain_set=retain_set):
            # −log of an exponential draw is a Gumbel draw, and a Gumbel draw on every logit makes
            # the argmax a draw from the softmax.
            logits = torch.cat([batch.outputs_of(original, part) for part in PARTS])
            noisy = logits - torch.empty_like(logits).exponential_(generator=rng).log()
            retain, forget = noisy.tensor_split([batch.num_retain])
            hard = torch.zeros_like(retain).scatter(1, retain.argmax(dim=1, keepdim=True), 1.0)
            soft = (forget / temperature).softmax(dim=1)
            epoch.step(F.cross_entropy(batch.logits, torch.cat([hard, soft])), batch)


def unseen_accuracy(model, data, split):
    """The accuracy on the training calibration images, which no metric uses.

    Raises UserError if there are none.
    """
    if not len(split.train_calibration):
        remedy = "add some; --until_forgotten can take --stop_accuracy instead"
        raise UserError(f"no held-out images of retained classes calibrate training; {remedy}")
    return accuracy(*inference.compute_logits(model, data.held_out, split.train_calibration))


# ---------------------------------------------------------------- the classifier


def linear_layers(model, num_classes):
    """The layers that turn features into logits, each nn.Linear with a row and a bias per class.

    Raises UserError for a network whose classifier is anything else.
    """
    layers = inference.classifier_layers(model)
    for layer in layers:
        is_linear = isinstance(layer, nn.Linear) and layer.bias is not None
        if not is_linear or layer.out_features != num_classes:
            raise UserError(
                f"the classifier of this network ends in {type(layer).__name__}, and this method "
                f"needs nn.Linear with a row and a bias for each of the {num_classes} classes"
            )
    return layers


def widen(model, num_classes, rng):
    """Add one class after the ``num_classes`` of a network, with weights drawn as by nn.Linear.

    ``rng`` is a generator on the CPU. Raises UserError as :func:`linear_layers` does.
    """
    for layer in linear_layers(model, num_classes):
        limit = 1 / math.sqrt(layer.in_features)
        row = torch.empty(1, layer.in_features).uniform_(-limit, limit, generator=rng)
        bias = torch.empty(1).uniform_(-limit, limit, generator=rng)
        weight = torch.cat([layer.weight, row.to(layer.weight)])
        set_rows(layer, weight, torch.cat([layer.bias, bias.to(layer.bias)]))


def narrow(model, num_classes):
    """Keep the first ``num_classes`` classes of a network that :func:`widen` has widened."""
    for layer in inference.classifier_layers(model):
        set_rows(layer, layer.weight[:num_classes], layer.bias[:num_classes])


def set_rows(layer, weight, bias):
    """Replace the weight and the bias of a linear layer."""
    layer.out_features = len(weight)
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = nn.Parameter(bias.detach().clone())


# ---------------------------------------------------------------- forget images alone


@method(
    num_epochs=20,
    learning_rate=1e-3,
    batch_size=128,
    weight_decay=0.0,
    schedule="constant",
    cifar100={"learning_rate": 5e-5},
    tiny_imagenet={"learning_rate": 5e-5},
    vit={"learning_rate": 5e-5},
    digits={"learning_rate": 2e-4, "batch_size": 64, "keep_statistics": True},
)
def delete(job, keep_statistics: KEEP_STATISTICS = False):
    """DELETE: distill the original model on the forget images, with the logit of the true label
    masked (Zhou et al. 2025, 2503.23751).

    The target is the original model's softmax over the other classes. Defaults: the authors' code
    (scripts.sh, method/delete.py). BatchNorm is in train mode, as there.
    """
    original = frozen(copy.deepcopy(job.model))
    for epoch in job.epochs(eval_mode=keep_statistics):
        for batch in epoch.batches("forget"):
            logits, labels = batch.forget
            # exp(−∞) is 0: the softmax renormalises over the other classes.
            masked = batch.outputs_of(original, "forget").scatter(1, labels[:, None], -math.inf)
            loss = F.kl_div(logits.log_softmax(1), masked.softmax(1), reduction="batchmean")
            epoch.step(loss, batch)


BOUNDARY = {"num_epochs": 10, "learning_rate": 1e-5, "weight_decay": 0.0, "schedule": "constant"}


@method(**BOUNDARY, digits={"num_epochs": 20, "learning_rate": 5e-4})
def boundary_shrink(job, step_size=0.1, keep_statistics: KEEP_STATISTICS = False):
    """Boundary shrink: train the forget images with the label of the nearest class (Chen et al.
    2023, 2303.11570).

    The nearest class is the original model's prediction after one step of FGSM from the augmented
    image, of ``step_size`` in units of the pixels' range, even where it is the true label.
    Defaults: the authors' code (boundary_unlearning.py). DELETE (2503.23751) has 20 epochs at 5e-5,
    Scissorhands a rate of 1e-6. BatchNorm is in train mode, as in the authors' code.
    """
    original, spec = frozen(copy.deepcopy(job.model)), job.data.train.spec
    for epoch in job.epochs(eval_mode=keep_statistics):
        for batch in epoch.batches("forget"):
            moved = adversarial.fgsm(original, batch.inputs, batch.labels, step_size, spec)
            with torch.no_grad():
                nearest = original(moved).argmax(dim=1)
            epoch.step(F.cross_entropy(batch.logits, nearest), batch)


@method(**BOUNDARY, digits={"num_epochs": 20, "learning_rate": 1e-3})
def boundary_expand(job, keep_statistics: KEEP_STATISTICS = False):
    """Boundary expanding: train the forget images with the label of an additional class, which is
    removed in the end (Chen et al. 2023, 2303.11570).

    Defaults: the authors' code (boundary_unlearning.py). DELETE (2503.23751) has 20 epochs at 8e-4.
    BatchNorm is in train mode, as in the authors' code. Raises UserError for a network whose
    classifier is not one nn.Linear.
    """
    new_class = job.num_classes
    widen(job.model, new_class, seeds.generator(job.seed, job.name, "new class"))
    for epoch in job.epochs(eval_mode=keep_statistics):
        for batch in epoch.batches("forget"):
            targets = torch.full_like(batch.labels, new_class)
            epoch.step(F.cross_entropy(batch.logits, targets), batch)
    narrow(job.model, new_class)


@method(num_epochs=50, learning_rate=2e-3, schedule="constant")
def mu_mis(job, recovery=0.1):
    """MU-Mis: reduce how much the logit of the label depends on the pixels of a forget image,
    relative to the logit of another class (Cheng et al. 2024, 2402.15109).

    The loss is the mean of ‖∂ logit_label / ∂ x‖² − ‖∂ logit_other / ∂ x‖², with another class
    drawn for every loss. The sensitivity of the other class falls at first. Training ends once it
    is above its minimum and has recovered by ``recovery`` times its first value. The authors'
    values of this share and of the rate are not published; these were chosen on digits. BatchNorm
    keeps the original's running statistics.
    """
    for epoch in job.epochs(eval_mode=True):
        rng, total = epoch.generator("other classes"), torch.zeros((), device=job.device)
        for batch in epoch.batches("forget"):
            shift = torch.randint(
                1, job.num_classes, batch.labels.shape, generator=rng, device=job.device
            )
            inputs = batch.inputs.requires_grad_()
            # Compiled networks have no second derivatives either.
            with fisher.plain_attention(), torch.compiler.set_stance("force_eager"):
                label_square, other_square = (
                    squared_sensitivity(batch.logits, classes, inputs)
                    for classes in (batch.labels, (batch.labels + shift) % job.num_classes)
                )
            # The last bias has no influence on these, and every weight needs a gradient.
            epoch.step((label_square - other_square).mean() + 0 * batch.logits.sum(), batch)
            total += other_square.detach().sum()
        other = epoch.record_mean("other_sensitivity", total, len(job.split.forget))
        history = [record["other_sensitivity"] for record in job.records] + [other]
        lowest = min(history)
        epoch.is_last = other > lowest and other - lowest >= recovery * history[0]


def squared_sensitivity(logits, classes, inputs):
    """‖∂ logit of a class / ∂ image‖² of every image, with a gradient.

    Logits M×K of the images M×3×H×W, classes M → M.
    """
    # BatchNorm uses its running statistics, so a logit depends on its own image alone: the gradient
    # of the sum has the gradient of every image.
    chosen = logits.gather(1, classes[:, None]).sum()
    (gradients,) = torch.autograd.grad(chosen, inputs, create_graph=True)
    return gradients.float().flatten(1).square().sum(dim=1)


# ---------------------------------------------------------------- one step on the weights


@method(trained=False)
def FisherForgetting(
    job, noise: Option(utils.number(float, 0), "scale of the variance of the noise") = 1e-7
):
    """Gaussian noise on every weight, of a variance that decreases with its Fisher information on
    the retain images (Golatkar et al. 2020, 1911.04933).

    F is exact: the expectation over the model's own predictions, image by image. The formula is the
    authors' (:func:`fisher_noise_variance`). The last layer's weights of a fully forgotten class
    are replaced by noise. Default: the code of SCRUB and of DELETE. Golatkar and the code of arXiv
    2501.19403 have 1e-6. Raises UserError for a fully forgotten class of a network whose classifier
    is not one nn.Linear.
    """
    forgotten = forgotten_classes(job)
    layers = inference.classifier_layers(job.model)
    if len(forgotten):
        layers = linear_layers(job.model, job.num_classes)
    last = {parameter for layer in layers for parameter in layer.parameters()}
    information = fisher.diagonal_fisher(
        job.model, job.data.train, job.split.retain, fisher.expected_scores
    )
    original = copies(job.model)

    @torch.no_grad()
    def add_noise(noise):
        rng = seeds.generator(job.seed, job.name, "noise", device=job.device)
        for name, parameter in job.model.named_parameters():
            is_last = parameter in last
            variance = fisher_noise_variance(information[name], noise, is_last)
            parameter.copy_(original[name])
            if is_last:
                # Noise alone: the row of a class that no retain image has.
                parameter[forgotten] = 0
                variance[forgotten] = FORGOTTEN_CLASS_VARIANCE
            # Equal draws for every noise: the search compares scales of one direction.
            draws = torch.randn(parameter.shape, generator=rng, device=job.device)
            parameter += variance.sqrt() * draws

    apply_strength(job, add_noise, noise, weakest=1e-10, strongest=1e-4)


FORGOTTEN_CLASS_VARIANCE = 1e-3  # of the last layer's weights of a forgotten class


def fisher_noise_variance(information, noise, is_last):
    """The variance of the noise of every weight, from the Fisher information F of one tensor.

    It is noise / F, with 1 / F at most 1000, or 100 in the last layer. The variances of a weight
    are averaged over its second dimension, the input channels. In the last layer and in tensors of
    one dimension, e.g. of BatchNorm, they are ten times as large. Returns the shape of F.
    """
    variance = noise * (1 / (information + 1e-8)).clamp(max=1e2 if is_last else 1e3)
    if variance.ndim > 1:
        variance = variance.mean(dim=1, keepdim=True).expand_as(variance).clone()
    return 10 * variance if is_last or variance.ndim == 1 else variance


def forgotten_classes(job):
    """The classes of which every training image is forgotten, an int64 tensor."""
    labels, split = job.data.train.labels, job.split
    classes = labels[split.forget].unique()
    return classes[~torch.isin(classes, labels[split.retain])]


@method(trained=False, classes={"importance_batch": 64}, vit={"selection_weighting": 5.0})
def ssd(
    job,
    selection_weighting: Option(
        utils.number(float, 0), "importance ratio D_f / D above which a weight is dampened"
    ) = 10.0,
    dampening_constant: Option(utils.number(float, 0), "factor of the dampening") = 1.0,
    importance_batch=128,
):
    """Selective synaptic dampening: weights that are more important for the forget images D_f than
    for all training images D shrink in proportion (Foster et al. 2024, 2308.07707).

    The importance of a weight is the mean over batches of its squared gradient, of images without
    augmentation, in eval mode. The batches of D are in the order of the authors' code, retain then
    forget, not shuffled, and for a class the retain images come class by class. Defaults: the
    authors' code (forget_full_class_main.py, forget_random_main.py).
    """
    retain, forget_set, labels = job.split.retain, job.split.forget, job.data.train.labels
    if job.split.forget_classes:
        retain = retain[labels[retain].argsort(stable=True)]
    overall, forget = (
        fisher.batch_fisher(job.model, job.data.train, indices.split(importance_batch))
        for indices in (torch.cat([retain, forget_set]), forget_set)
    )
    original = copies(job.model)

    @torch.no_grad()
    def dampen(selection_weighting):
        for name, parameter in job.model.named_parameters():
            factors = dampening(
                forget[name], overall[name], selection_weighting, dampening_constant
            )
            parameter.copy_(original[name] * factors)

    apply_strength(job, dampen, selection_weighting, weakest=1e4, strongest=0.01)


def dampening(forget, overall, selection_weighting, dampening_constant):
    """The factor of every weight: min(λ·I_D / I_f, 1) where I_f > α·I_D, else 1.

    ``forget`` and ``overall`` are the importances I_f and I_D of one tensor, α is
    ``selection_weighting`` and λ ``dampening_constant``. Returns the same shape.
    """
    # Where forget is 0 the factor is infinite or NaN, but such a weight is never selected.
    factor = (dampening_constant * overall / forget).clamp(max=1)
    return torch.where(forget > selection_weighting * overall, factor, 1.0)


FISHER_IMAGES = 1000  # retain images of the Fisher information of IU


@method(trained=False)
def IU(job, step_scale: STEP_SCALE = 0.2, damping=1.0):
    """Influence unlearning: one step along F⁻¹ v, v = (N_f / N) (ḡ_f − ḡ_r), where ḡ_f and ḡ_r are
    the mean gradients of forget and retain images (Izzo et al. 2021, 2002.10077; Koh and Liang
    2017, 1703.04730).

    F replaces the Hessian, as in WoodFisher (Singh and Alistarh 2020, 2004.14340): the mean of g gᵀ
    over the gradients g of the first 1,000 retain images, in eval mode, plus I. F⁻¹ v comes from
    :func:`conjugate_gradients`. Unlearn-Sparse (2304.04934) approximates it in one pass whose
    vector is the first gradient. Default: the scale of its code. DELETE's scripts have 1,
    Scissorhands 10, 20 and 15 (CIFAR-10, CIFAR-100, SVHN).
    """
    images, retain, forget_set = job.data.train, job.split.retain, job.split.forget
    forget_gradient, retain_gradient = (
        fisher.mean_gradient(job.model, images, indices) for indices in (forget_set, retain)
    )
    share = len(forget_set) / (len(forget_set) + len(retain))  # N_f / N
    vector = {
        name: share * (forget_gradient[name] - retain_gradient[name]) for name in forget_gradient
    }

    def damped_fisher(tensors):
        product = fisher.fisher_product(job.model, images, retain[:FISHER_IMAGES], tensors)
        return {name: product[name] + damping * tensors[name] for name in tensors}

    direction = conjugate_gradients(damped_fisher, vector)
    move = partial(move_weights, job.model, copies(job.model), direction)
    apply_strength(job, move, step_scale, weakest=1e-4, strongest=1e3)


def conjugate_gradients(product, vector, *, max_steps=20, tolerance=1e-3):
    """The solution x of A x = v for a symmetric positive A (Hestenes and Stiefel 1952).

    ``vector`` v and x are {name: tensor}, and ``product(x)`` is A x. The steps end when the
    residual is ``tolerance`` times as long as v, or after ``max_steps``.
    """
    solution = {name: torch.zeros_like(tensor) for name, tensor in vector.items()}
    residual, direction = dict(vector), dict(vector)
    squared = start = inner_product(vector, vector)
    for _ in range(max_steps):
        if squared <= tolerance**2 * start:
            break
        image = product(direction)
        # The minimum along the direction, then a new direction that is conjugate to the others.
        length = squared / inner_product(direction, image)
        solution = {name: x + length * direction[name] for name, x in solution.items()}
        residual = {name: r - length * image[name] for name, r in residual.items()}
        previous, squared = squared, inner_product(residual, residual)
        ratio = squared / previous
        direction = {name: r + ratio * direction[name] for name, r in residual.items()}
    return solution


def inner_product(first, second):
    """The inner product of two {name: tensor}, in float64."""
    products = [(first[name].double() * second[name].double()).sum() for name in first]
    return torch.stack(products).sum().item()


NEG_MERGE_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of the learning rate
NEG_MERGE_SCALES = 400  # multiples of 0.05
KEPT_ACCURACY = 0.95  # of the retain accuracy


@method(num_epochs=5, learning_rate=3e-3, extensible=False)
def neg_merge(job, step_scale: STEP_SCALE = None):
    """NegMerge: subtract the weight changes that several fine-tunings on the forget images share
    (Kim et al. 2025, 2410.05583).

    Of the changes of a weight the mean is subtracted if all have one sign, else nothing, times
    ``step_scale`` (default: :func:`largest_harmless_scale`). The authors' code is for CLIP; the
    fine-tunings here have 1/4 to 4 times the learning rate, an order and augmentations of their
    own. BatchNorm keeps the original's running statistics.
    """
    original, model = copies(job.model), job.model
    merged = {name: torch.zeros_like(weight) for name, weight in original.items()}
    signs = {name: torch.zeros_like(weight) for name, weight in original.items()}
    count = len(NEG_MERGE_RATES)
    for number, factor in enumerate(NEG_MERGE_RATES):
        model.load_state_dict(original, strict=False)  # parameters; the buffers never change
        training = fine_tuning(job, number, factor * job.recipe.learning_rate)
        for epoch in training.epochs(eval_mode=True):
            for batch in epoch.batches("forget"):
                epoch.step(F.cross_entropy(*batch.forget), batch)
        for name, weight in model.named_parameters():
            change = weight.detach() - original[name]
            merged[name] += change / count
            signs[name] += change.sign()
    # The signs add up to ± their number only where all fine-tunings agree.
    direction = {name: -merged[name] * (signs[name].abs() == count) for name in merged}
    move = partial(move_weights, model, original, direction)
    if step_scale is None and job.stop_at is None:
        step_scale = largest_harmless_scale(job, move)
    apply_strength(job, move, step_scale, weakest=1e-4, strongest=100.0)


def fine_tuning(job, number, learning_rate):
    """The job of one of the fine-tunings of :func:`neg_merge`, numbered from 0, with its own seed.

    It continues the count of epochs and saves no state.
    """

    def log(record):
        job.log(record | {"epoch": record["epoch"] + number * job.recipe.num_epochs})

    return replace(
        job,
        name=f"{job.name} {number + 1}",
        label=f"{job.label} {number + 1}/{len(NEG_MERGE_RATES)}",
        recipe=replace(job.recipe, learning_rate=learning_rate),
        log=log,
        progress=None,
        stop_at=None,
        records=[],
    )


def largest_harmless_scale(job, move):
    """The largest multiple of 0.05 up to 20 before ``move(scale)`` costs more than 5 % of the
    accuracy on (at most 2,000) retain images; 0 if already 0.05 does.
    """
    move(0.0)
    least = KEPT_ACCURACY * monitored_accuracy(job, "retain")
    for multiple in range(1, NEG_MERGE_SCALES + 1):
        move(multiple / 20)
        if monitored_accuracy(job, "retain") < least:
            return (multiple - 1) / 20
    return NEG_MERGE_SCALES / 20


@torch.no_grad()
def move_weights(model, original, direction, scale):
    """Set the weights to ``original`` + ``scale`` · ``direction``, both {parameter: tensor}."""
    for name, weight in model.named_parameters():
        weight.copy_(original[name] + scale * direction[name])


def apply_strength(job, apply, strength, *, weakest, strongest):
    """``apply(strength)``, or with --until_forgotten the weakest strength that forgets.

    ``apply`` sets the weights from a strength, a number that forgets more towards ``strongest``.
    Ten bisections of the logarithm between ``weakest`` and ``strongest`` find the strength at which
    the accuracy on (at most 2,000) forget images falls to ``job.stop_at``.
    """
    if job.stop_at is None:
        apply(strength)
        return

    # Position 0 is the weakest and 1 the strongest: equal steps are equal ratios of the strength.
    def forgets(position):
        apply(weakest * (strongest / weakest) ** position)
        return monitored_accuracy(job, "forget") <= job.stop_at

    if not forgets(1.0):
        return
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if forgets(middle) else (middle, high)
    forgets(high)


def monitored_accuracy(job, part):
    """The accuracy on (at most 2,000) images of a part; 0 if a logit is not finite."""
    try:
        return job.accuracies([part], MONITORED)[part]
    except NotFinite:
        return 0.0


def copies(model):
    """Copies of the parameters of a model, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}
