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
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import utils
from models import adversarial, checkpoint, classifier, fisher, inference, seeds
from models.errors import UserError
from models.training import MONITORED, PARTS, Recipe

MASK_FILE = "saliency_mask.pth"

# ---------------------------------------------------------------- the registry


class Option(NamedTuple):
    """The flag of a method's option: its argparse type, and its help. ``bool`` is a bare flag."""

    type: Callable
    help: str


STOP_ACCURACY = Option(
    utils.number(float, 0, 1), "forget accuracy at which the method ends; default: see unlearn.py"
)
PASS_STEPS = Option(
    utils.number(int, 0),
    "largest number of steps on forget images alone in an epoch; 0: a pass over all of them",
)
ASCENT_LIMIT = Option(
    utils.number(float, 0),
    "cross-entropy above which a forget image has no gradient, in multiples of ln(number of "
    "classes); 0: no limit",
)
TEMPERATURE = Option(utils.number(float, 0, exclusive=True), "temperature of the distillation")
STEP_SCALE = Option(
    utils.number(float, 0), "factor of the step; default: the smallest that forgets"
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and its default hyper-parameters.

    ``run(job, **options)`` changes ``job.model``. ``training`` are the fields of :class:`Recipe`
    that the method sets. A method without ``num_epochs`` trains as the original model did, and one
    without ``learning_rate`` starts from its rate. ``digits`` are values of both kinds for networks
    trained from scratch on digits. ``options`` are the values of its options, ``flags`` the
    :class:`Option` of those that have a flag. A method that is not ``trained`` has no recipe, and
    one that is not ``extensible`` no CPU variant.
    """

    name: str
    run: Callable
    training: dict = field(default_factory=dict)
    digits: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    flags: dict[str, Option] = field(default_factory=dict)
    trained: bool = True
    extensible: bool = True


METHODS: dict[str, Method] = {}


def method(*, digits=None, trained=True, extensible=True, **training):
    """Register the decorated function under its name. ``training`` are fields of Recipe."""
    unknown = training.keys() - {setting.name for setting in fields(Recipe)}
    if unknown:
        raise TypeError(f"not fields of Recipe: {', '.join(unknown)}")

    def register(function):
        options = list(inspect.signature(function).parameters.values())[1:]
        METHODS[function.__name__] = Method(
            name=function.__name__,
            run=function,
            training=training,
            digits=digits or {},
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
        digits = ", ".join(f"{name} {value}" for name, value in entry.digits.items())
        shown += [f"(digits: {digits})"] if digits else []
        lines.append(f"  {label:<16} {', '.join(shown)}")
    return "\n".join(lines)


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


def check_option_flags(args, methods):
    """Raise UserError for the flag of an option that none of the chosen ``methods`` has."""
    for name in {name for entry in METHODS.values() for name in entry.flags}:
        if getattr(args, name, None) is None or any(name in m.flags for m in methods.values()):
            continue
        owners = ", ".join(label for label, entry in METHODS.items() if name in entry.flags)
        raise UserError(f"--{name} applies to {owners} and not to {', '.join(methods)}; omit it")


def options_of(entry, args):
    """The options of a method: the flags that were passed, else its defaults."""
    passed = {name: getattr(args, name, None) for name in entry.flags}
    return entry.options | {name: value for name, value in passed.items() if value is not None}


# ---------------------------------------------------------------- training on the retain set


def cross_entropy(logits, labels):
    """Mean cross-entropy of M images, M×K and M → a scalar. 0, with a gradient, for M = 0."""
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum()


def train_on_retain_set(job):
    """Minimize the cross-entropy of the retain images."""
    for epoch in job.epochs():
        for batch in epoch.batches("retain"):
            epoch.step(F.cross_entropy(*batch.retain), batch)


@method()
def retrain(job):
    """Retrain, the reference: train from scratch on the retain set with the original's recipe."""
    job.model = job.new_model()
    train_on_retain_set(job)


@method(num_epochs=20, digits={"learning_rate": 0.02})
def finetune(job):
    """Fine-tuning: train the original model on the retain set (Warnecke et al. 2021, 2108.11577).

    Defaults: 20 epochs at the learning rate of the original model, as the command line published
    with arXiv 2501.19403 has them for CIFAR-10 (20 epochs at 0.1).
    """
    train_on_retain_set(job)


@method(num_epochs=20, learning_rate=0.02)
def l1_sparse(
    job, l1_weight: Option(utils.number(float, 0), "weight of the L1 penalty in epoch 1") = 5e-4
):
    """Fine-tuning on the retain set with an L1 penalty on all weights, which prunes what they do
    not need (Jia et al. 2023, 2304.04934).

    The weight of the penalty falls linearly over the epochs to zero after the last. Defaults: the
    authors' weight, with twice their epochs and rate.
    """
    for epoch in job.epochs():
        weight = l1_weight * (1 - (epoch.number - 1) / job.recipe.num_epochs)
        for batch in epoch.batches("retain"):
            penalty = sum(parameter.abs().sum() for parameter in job.model.parameters())
            epoch.step(F.cross_entropy(*batch.retain) + weight * penalty, batch)


# ---------------------------------------------------------------- wrong labels


@method(num_epochs=10, learning_rate=0.013)
def RL(job):
    """Random labels: train the original model on the retain images, and on the forget images with
    wrong labels, drawn once (Golatkar et al. 2020, 1911.04933).

    Defaults: 10 epochs at 0.013, the published values of SalUn.
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


@method(num_epochs=10, learning_rate=0.013)
def salun(
    job,
    mask_ratio: Option(utils.number(float, 0, 1), "fraction of the weights that are salient") = 0.5,
    mask_path: Option(
        utils.expand_path, f"use a saved mask ({MASK_FILE} of an earlier run) instead of a new one"
    ) = None,
):
    """SalUn: random labels, applied only to the weights with the largest gradient of the forget
    loss (Fan et al. 2024, 2310.12508).

    The other weights keep the values of the original model. Defaults: those published with the
    method for 10 % of CIFAR-10. The authors draw the labels again in every epoch, true labels
    included, and train on the forget images first.
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


@method(num_epochs=10, learning_rate=0.01)
def amun(job, radius=0.04):
    """AMUN: train the retain images, and the nearest adversarial example of every forget image with
    the wrong label that the original model gives it (Ebrahimpour-Boroojeny et al. 2025,
    2503.00917).

    The adversarial examples are not augmented. ``radius`` is the first radius of the attack in
    pixels of range 0 to 1. As in the authors' code, the forget images with their true labels are
    trained on, too, except where classes are forgotten. Rate and epochs are the authors'. In
    cpu_amun the conformal loss is that of the adversarial examples under the true labels.
    """
    forget_set, targets = job.split.forget, job.data.train.labels.clone()
    examples = adversarial.adversarial_examples(
        job.model, job.data.train, forget_set, radius, job.recipe.batch_size
    )
    targets[forget_set] = examples.labels
    position = torch.zeros_like(targets)  # of a forget image among the examples
    position[forget_set] = torch.arange(len(forget_set), device=job.device)
    retain_set = job.split.retain
    if not job.split.forget_classes:
        retain_set = torch.cat([retain_set, forget_set])
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget", retain_set=retain_set):
            batch.inputs[batch.num_retain :] = examples.inputs[position[batch.forget_indices]]
            labels = batch.labels.clone()
            labels[batch.num_retain :] = targets[batch.forget_indices]
            epoch.step(F.cross_entropy(batch.logits, labels), batch)


# ---------------------------------------------------------------- gradient ascent


@method(num_epochs=100, learning_rate=1e-4, schedule="constant", extensible=False)
def GA(job, stop_accuracy: STOP_ACCURACY = None):
    """Gradient ascent on the cross-entropy of the forget images (Thudi et al. 2022, 2109.13398).

    Ascent does not converge, so training ends at :func:`forgotten_accuracy`, after at most
    ``num_epochs``. BatchNorm normalizes by the batch and keeps the running statistics of the
    original model, since those of forget images would replace those of the retained classes.
    Defaults: the authors' rate (Unlearn-Sparse, 2304.04934).
    """
    stop_at = forgotten_accuracy(job, stop_accuracy)
    keep_running_statistics(job.model)
    for epoch in job.epochs(stop_at):
        for batch in epoch.batches("forget"):
            epoch.step(-F.cross_entropy(*batch.forget), batch)


def keep_running_statistics(model):
    """Keep BatchNorm's running statistics in training, which then normalizes by the batch."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.0


def forgotten_accuracy(job, stop_accuracy):
    """The forget accuracy at which a method ends: ``stop_accuracy``, by default
    :func:`unseen_accuracy`, and 3 % for classes.
    """
    if stop_accuracy is not None:
        return stop_accuracy
    return 0.03 if job.split.forget_classes else unseen_accuracy(job, "pass --stop_accuracy")


def unseen_accuracy(job, remedy):
    """The model's accuracy on the training calibration images, which no metric uses.

    Raises UserError with ``remedy`` if there are none.
    """
    calibration = job.split.train_calibration
    if not len(calibration):
        raise UserError(f"{job.label}: no held-out image calibrates training; {remedy}")
    logits, labels = inference.compute_logits(job.model, job.data.held_out, calibration)
    return (logits.argmax(dim=1) == labels).double().mean().item()


@method(num_epochs=5, learning_rate=0.01)
def ga_plus(
    job,
    forget_weight: Option(utils.number(float, 0), "weight of the ascent on forget images") = 0.02,
    ascent_limit: ASCENT_LIMIT = 4.0,
):
    """NegGrad+: descent on the retain images and ascent on the forget images in every step
    (Kurmanji et al. 2023, 2302.09880).

    ``forget_weight`` is relative to 1 for the descent. Defaults: found on digits and 5,000 CIFAR-10
    images. The authors weight 0.95 : 0.05.
    """
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget"):
            losses = ascent_losses(*batch.forget, ascent_limit)
            ascent = forget_weight * losses.sum() / max(1, len(losses))
            epoch.step(cross_entropy(*batch.retain) - ascent, batch)


def ascent_losses(logits, labels, ascent_limit):
    """The cross-entropy of M images that are ascended, M×K and M → M.

    It is at most ``ascent_limit`` times ln K, where its gradient ends. Without a limit (0),
    gradients of already forgotten images do not vanish, and the network collapses.
    """
    limit = (ascent_limit or math.inf) * math.log(logits.shape[1])
    return F.cross_entropy(logits, labels, reduction="none").clamp(max=limit)


@method(num_epochs=5, learning_rate=0.01)
def sfron(
    job,
    ascent: Option(
        utils.number(float, 0), "initial weight of the ascent, which follows a cosine to zero"
    ) = 25.0,
    ascent_every: Option(utils.number(int, 1), "number of repair steps per ascent step") = 5,
    ascent_limit: ASCENT_LIMIT = 4.0,
    adaptivity=0.5,
    saliency_threshold=1.0,
    max_norm=7.0,
):
    """SFRon: alternate between weighted ascent on the forget images, restricted to salient weights,
    and repair on the retain images (Huang et al. 2024, 2409.19732).

    A weight is salient if its empirical Fisher information, image by image, is at least
    ``saliency_threshold`` times as large on the forget as on the retain images. ``adaptivity`` is
    the exponent of :func:`adaptive_mean`, ``max_norm`` the largest norm of an ascent's gradient.
    BatchNorm is in train mode in all steps. Defaults: the authors' for 10 % of CIFAR-10, but five
    epochs in batches of 64 instead of 1,500 steps of 128 images, and with an ``ascent_limit``.
    """
    forget, retain = (
        fisher.diagonal_fisher(job.model, job.data.train, indices, fisher.observed_score)
        for indices in (job.split.forget, job.split.retain)
    )
    salient = {name: forget[name] >= saliency_threshold * retain[name] for name in forget}
    for epoch in job.epochs():
        repairs, ascents, steps = epoch.steps("retain"), epoch.cycle("forget"), []
        num_repairs = len(repairs) * job.recipe.num_epochs
        repairs_done = len(repairs) * (epoch.number - 1)
        for number, repair in enumerate(repairs):
            if number % ascent_every == 0:
                steps.append((next(ascents), 0))
            steps.append(repair)
        for batch in epoch.visit(steps):
            if batch.num_retain:
                repairs_done += 1
                epoch.step(F.cross_entropy(*batch.retain), batch)
                continue
            strength = ascent * (1 + math.cos(math.pi * repairs_done / num_repairs)) / 2
            losses = ascent_losses(*batch.forget, ascent_limit)
            epoch.backward(-strength * adaptive_mean(losses, adaptivity), batch)
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


@method(num_epochs=5, learning_rate=0.01)
def teacher(job, kd_T: TEMPERATURE = 1.0):
    """Bad teaching: distill the original model on the retain images and an untrained network on the
    forget images (Chundawat et al. 2023, 2205.08096).

    If the network is pre-trained, the untrained one is the pre-trained network with a new head.
    Where classes are forgotten, its outputs are shifted (:func:`harmless_shift`). Defaults: the
    authors' temperature; the others were found on digits.
    """
    competent, incompetent = frozen(copy.deepcopy(job.model)), frozen(job.new_model())
    shift = harmless_shift(job, incompetent)
    for epoch in job.epochs():
        for batch in epoch.batches("retain", "forget"):
            retain_targets = batch.outputs_of(competent, "retain")
            forget_targets = batch.outputs_of(incompetent, "forget").roll(shift, dims=1)
            targets = torch.cat([retain_targets, forget_targets])
            epoch.step(distance(batch.logits, targets, kd_T), batch)


def harmless_shift(job, network):
    """By how many classes to shift the outputs of an untrained network on the forget images.

    Its outputs are similar for all images, so a forgotten class that is likely by chance would
    still be recognised. The result is the shift at which the forgotten labels are least likely, and
    0 where no class is forgotten.
    """
    forget_set = job.split.forget
    is_forgotten = torch.isin(job.data.train.labels[forget_set], forgotten_classes(job))
    forget_set = forget_set[is_forgotten]
    if not len(forget_set):
        return 0
    logits, labels = inference.compute_logits(network, job.data.train, forget_set)
    shifts = torch.arange(logits.shape[1])
    # Entry (i, s) is the probability of image i's label after a shift of s classes.
    likelihoods = logits.softmax(dim=1).gather(1, (labels[:, None] - shifts) % len(shifts))
    return int(likelihoods.sum(dim=0).argmin())


def forgotten_classes(job):
    """The classes of which every training image is forgotten, an int64 tensor."""
    labels, split = job.data.train.labels, job.split
    classes = labels[split.forget].unique()
    return classes[~torch.isin(classes, labels[split.retain])]


@method(num_epochs=10, learning_rate=2e-3)
def scrub(
    job,
    msteps: Option(
        utils.number(int, 0), "epochs that start with a maximization pass over the forget images"
    ) = 2,
    kd_T: TEMPERATURE = 4.0,
    beta: Option(
        utils.number(float, 0), "weight of the distance on retain images (α in the paper)"
    ) = 0.001,
    gamma: Option(utils.number(float, 0), "weight of the cross-entropy on retain images") = 0.99,
    pass_steps: PASS_STEPS = 8,
    rewind: Option(
        bool, "SCRUB+R: return to the epoch with the forget error of held-out images"
    ) = False,
):
    """SCRUB: alternate between moving away from the original model on the forget images, and back
    to it and to the labels on the retain images (Kurmanji et al. 2023, 2302.09880).

    The first ``msteps`` epochs start with a pass over the forget images, of at most ``pass_steps``
    steps. ``beta`` and ``gamma`` are α and γ of the paper. Defaults: weights and temperature of the
    authors' code. With ``rewind`` (SCRUB+R) the result is the epoch whose forget accuracy is
    nearest to the last epoch's accuracy on held-out images of the same classes.
    """
    if rewind and not len(matched_images(job)):
        raise UserError(f"{job.label}: no held-out image of the forgotten classes for --rewind")
    original = frozen(copy.deepcopy(job.model))
    for epoch in job.epochs(keep_weights=rewind):
        if epoch.number <= msteps:
            for batch in epoch.batches("forget", limit=pass_steps or None):
                targets = batch.outputs_of(original, "forget")
                epoch.step(-distance(batch.logits, targets, kd_T), batch)
        for batch in epoch.batches("retain"):
            logits, labels = batch.retain
            to_original = distance(logits, batch.outputs_of(original, "retain"), kd_T)
            epoch.step(beta * to_original + gamma * F.cross_entropy(logits, labels), batch)
    if rewind:
        reference = matched_accuracy(job)
        forget_accuracies = [record["forget_acc"] for record in job.records]
        distances = [abs(accuracy - reference) for accuracy in forget_accuracies]
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
    shares = forget_labels.bincount(minlength=job.num_classes).double()
    weights = (shares / labels.bincount(minlength=job.num_classes))[labels]
    is_right = (logits.argmax(dim=1) == labels).double()
    return ((weights * is_right).sum() / weights.sum()).item()


@method(num_epochs=10, learning_rate=0.01)
def lotus(
    job,
    smoothing: Option(
        utils.number(float, 0), "growth of the temperature with forget accuracy above the bound"
    ) = 1.0,
):
    """LoTUS: smooth the original model's outputs on the forget images until the model knows them no
    better than unseen images (Spartalis et al. 2025, 2503.18314).

    The targets are the original model's logits with Gumbel noise: for forget images their softmax
    at the temperature exp(``smoothing`` · (forget accuracy − accuracy on unseen images)), computed
    again in every epoch, for retain images the likeliest class. Classes have no unseen images, and
    their bound is 0. Training ends once the forget accuracy is 1 % below the bound. Defaults: the
    smoothing of the authors' code; the rate was found on digits.
    """
    original, bound = frozen(copy.deepcopy(job.model)), 0.0
    if not job.split.forget_classes:
        bound = unseen_accuracy(job, "add held-out images")
    for epoch in job.epochs(stop_at=bound - 0.01):
        forget_accuracy = job.monitor(["forget"])["forget_acc"]
        temperature = math.exp(smoothing * (forget_accuracy - bound))
        rng = epoch.generator("gumbel")
        for batch in epoch.batches("retain", "forget"):
            logits = torch.cat([batch.outputs_of(original, part) for part in PARTS])
            noisy = logits - torch.empty_like(logits).exponential_(generator=rng).log()
            hard = F.one_hot(noisy[: batch.num_retain].argmax(dim=1), noisy.shape[1])
            soft = (noisy[batch.num_retain :] / temperature).softmax(dim=1)
            epoch.step(F.cross_entropy(batch.logits, torch.cat([hard, soft])), batch)


# ---------------------------------------------------------------- forget images alone


@method(num_epochs=50, learning_rate=6e-5, schedule="constant")
def delete(job, stop_accuracy: STOP_ACCURACY = None, pass_steps: PASS_STEPS = 8):
    """DELETE: distill the original model on the forget images, with the logit of the true label
    masked (Zhou et al. 2025, 2503.23751).

    The target is the original model's softmax over the other classes. BatchNorm keeps the
    original's running statistics. Training ends at :func:`forgotten_accuracy`. Defaults: found on
    digits.
    """
    original, stop_at = frozen(copy.deepcopy(job.model)), forgotten_accuracy(job, stop_accuracy)
    for epoch in job.epochs(stop_at, eval_mode=True):
        for batch in epoch.batches("forget", limit=pass_steps or None):
            logits, labels = batch.forget
            masked = batch.outputs_of(original, "forget").scatter(1, labels[:, None], -math.inf)
            loss = F.kl_div(logits.log_softmax(1), masked.softmax(1), reduction="batchmean")
            epoch.step(loss, batch)


@method(num_epochs=50, learning_rate=3e-5, schedule="constant")
def boundary_shrink(
    job, stop_accuracy: STOP_ACCURACY = None, pass_steps: PASS_STEPS = 8, step_size=0.1
):
    """Boundary shrink: train the forget images with the label of the nearest wrong class (Chen et
    al. 2023, 2303.11570).

    The nearest class is the likeliest wrong one after one step of FGSM from the image, of
    ``step_size`` in units of the pixels' range, under the original model. BatchNorm keeps the
    original's running statistics. Training ends at :func:`forgotten_accuracy`. Defaults: the
    authors' step size; the rate was found on digits.
    """
    stop_at, targets = forgotten_accuracy(job, stop_accuracy), job.data.train.labels.clone()
    targets[job.split.forget] = adversarial.nearest_wrong_classes(
        job.model, job.data.train, job.split.forget, step_size, job.recipe.batch_size
    )
    for epoch in job.epochs(stop_at, eval_mode=True):
        for batch in epoch.batches("forget", limit=pass_steps or None):
            epoch.step(F.cross_entropy(batch.logits, targets[batch.indices]), batch)


@method(num_epochs=50, learning_rate=2e-4, schedule="constant")
def boundary_expand(job, stop_accuracy: STOP_ACCURACY = None, pass_steps: PASS_STEPS = 8):
    """Boundary expanding: train the forget images with the label of an additional class, which is
    removed in the end (Chen et al. 2023, 2303.11570).

    BatchNorm keeps the original's running statistics. Training ends at :func:`forgotten_accuracy`,
    by the logits of the original classes. The last epoch can go too far, so :func:`step_back`
    follows. Defaults: the rate was found on digits.
    """
    stop_at, start = forgotten_accuracy(job, stop_accuracy), copies(job.model)
    new_class = job.num_classes
    classifier.widen(job.model, new_class, seeds.generator(job.seed, job.name, "new class"))
    for epoch in job.epochs(stop_at, eval_mode=True):
        for batch in epoch.batches("forget", limit=pass_steps or None):
            targets = torch.full_like(batch.labels, new_class)
            epoch.step(F.cross_entropy(batch.logits, targets), batch)
    classifier.narrow(job.model, new_class)
    step_back(job, start, stop_at)


@method(num_epochs=50, learning_rate=1e-3, schedule="constant")
def mu_mis(job, stop_accuracy: STOP_ACCURACY = None, pass_steps: PASS_STEPS = 8):
    """MU-Mis: reduce how much the logit of the label depends on the pixels of a forget image,
    relative to the logit of another class (Cheng et al. 2024, 2402.15109).

    The loss is the mean of ‖∂ logit_label / ∂ x‖ − ‖∂ logit_other / ∂ x‖, with another wrong class
    for each image in every epoch. The authors square both norms. BatchNorm keeps the original's
    running statistics. Training ends at :func:`forgotten_accuracy`. Defaults: found on digits.
    """
    labels = job.data.train.labels
    for epoch in job.epochs(forgotten_accuracy(job, stop_accuracy), eval_mode=True):
        rng = seeds.generator(job.seed, job.name, "other classes", epoch.number)
        shift = torch.randint(1, job.num_classes, (len(labels),), generator=rng).to(job.device)
        others = (labels + shift) % job.num_classes
        for batch in epoch.batches("forget", limit=pass_steps or None):
            inputs = batch.inputs.detach().requires_grad_()
            with job.autocast():
                logits = job.model(inputs).float()
            norms = [
                sensitivity_norms(logits, classes, inputs)
                for classes in (batch.labels, others[batch.indices])
            ]
            # The last bias has no influence on the norms, and every weight needs a gradient.
            epoch.step((norms[0] - norms[1]).mean() + 0 * batch.logits.sum(), batch)


def sensitivity_norms(logits, classes, inputs):
    """‖∂ logit of a class / ∂ image‖ of every image, with a gradient, which is 0 where the norm is.

    Logits M×K of the images M×3×H×W, classes M → M.
    """
    chosen = logits.gather(1, classes[:, None]).sum()
    (gradients,) = torch.autograd.grad(chosen, inputs, create_graph=True)
    return torch.linalg.vector_norm(gradients.float().flatten(1), dim=1)


# ---------------------------------------------------------------- one step on the weights


@method(trained=False)
def FisherForgetting(
    job, noise: Option(utils.number(float, 0), "scale of the variance of the noise") = 1e-7
):
    """Gaussian noise on every weight, of a variance that decreases with its Fisher information on
    the retain images (Golatkar et al. 2020, 1911.04933).

    F is exact: the expectation over the model's own predictions, image by image. The formula is the
    authors' (:func:`fisher_noise_variance`). The last layer's weights of a fully forgotten class
    are replaced by noise. Default: a tenth of the authors' 1e-6, as in the code of 2302.09880.
    """
    model = job.model
    information = fisher.diagonal_fisher(
        model, job.data.train, job.split.retain, fisher.expected_scores
    )
    rng = seeds.generator(job.seed, job.name, "noise", device=job.device)
    last_layer, forgotten = fisher.last_layer(model), forgotten_classes(job)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_last = name in last_layer
            variance = fisher_noise_variance(information[name], noise, is_last)
            if is_last:
                parameter[forgotten] = 0
                variance[forgotten] = FORGOTTEN_CLASS_VARIANCE
            draws = torch.randn(parameter.shape, generator=rng, device=job.device)
            parameter += variance.sqrt() * draws


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


SSD_BATCH_SIZE, SSD_BATCHES = 128, 100  # the authors' batch size; the least number of batches


@method(trained=False)
def ssd(
    job,
    selection_weighting: Option(
        utils.number(float, 0),
        "importance ratio D_f / D above which a weight is dampened; default: the largest that "
        "forgets, at least 1 for classes and 10 for other images",
    ) = None,
    dampening_constant: Option(utils.number(float, 0), "factor of the dampening") = 1.0,
    stop_accuracy: STOP_ACCURACY = None,
):
    """Selective synaptic dampening: weights that are more important for the forget images D_f than
    for all training images D shrink in proportion (Foster et al. 2024, 2308.07707).

    The importance of a weight is the mean over batches of its squared gradient, as in the authors'
    code. Small sets are passed until there are 100 batches of augmented images. The default
    selection weighting α is :func:`largest_selection_weighting`; the authors' is 10.
    """
    split = job.split
    everything = torch.cat([split.retain, split.forget])
    overall, forget = (ssd_importances(job, indices) for indices in (everything, split.forget))
    original = copies(job.model)

    @torch.no_grad()
    def dampen(selection_weighting):
        num_dampened = 0
        for name, parameter in job.model.named_parameters():
            factors = dampening(
                forget[name], overall[name], selection_weighting, dampening_constant
            )
            num_dampened += int((factors < 1).sum())
            parameter.copy_(original[name] * factors)
        return num_dampened

    if selection_weighting is None:
        ratios = [forget[name] / overall[name] for name in original]
        ratios = torch.cat([ratio[ratio.isfinite()] for ratio in ratios])
        highest = ratios.max().item() if len(ratios) else 0.0
        stop_at = forgotten_accuracy(job, stop_accuracy)
        selection_weighting = largest_selection_weighting(job, dampen, highest, stop_at)
    if not dampen(selection_weighting):
        print(
            f"{job.label}: no weight is {selection_weighting:.4g} times as important for the "
            "forget images as for all images, so the model is unchanged; "
            "lower --selection_weighting"
        )


def ssd_importances(job, indices):
    """The importance of every weight for training images, by parameter name."""
    augment = seeds.generator(job.seed, job.name, "augmentation", device=job.device)
    passes = math.ceil(SSD_BATCHES / math.ceil(len(indices) / SSD_BATCH_SIZE))
    batches = []
    for number in range(passes):
        rng = seeds.generator(job.seed, job.name, "order", len(indices), number)
        order = torch.randperm(len(indices), generator=rng).to(job.device)
        batches += indices[order].split(SSD_BATCH_SIZE)
    return fisher.batch_fisher(job.model, job.data.train, batches, augment)


def dampening(forget, overall, selection_weighting, dampening_constant):
    """The factor of every weight: min(λ·I_D / I_f, 1) where I_f > α·I_D, else 1.

    ``forget`` and ``overall`` are the importances I_f and I_D of one tensor, α is
    ``selection_weighting`` and λ ``dampening_constant``. Returns the same shape.
    """
    factor = (dampening_constant * overall / forget).clamp(max=1)
    return torch.where(forget > selection_weighting * overall, factor, 1.0)


def largest_selection_weighting(job, dampen, highest, stop_at):
    """The largest α at which ``dampen(α)`` reduces the accuracy on (at most 2,000) forget images to
    ``stop_at``.

    It is halved from the ratio ``highest``, and six bisections of its logarithm follow. Where the
    search fails, the lowest α is the result: 1 where classes are forgotten, else the authors' 10.
    """
    lowest = 1.0 if job.split.forget_classes else 10.0

    def reached(selection_weighting):
        dampen(selection_weighting)
        return forget_accuracy(job) <= stop_at

    high = low = max(highest, lowest)
    while not reached(low):
        if low == lowest:
            return low
        high, low = low, max(low / 2, lowest)
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) else (low, middle)
    return low


FISHER_IMAGES = 2048  # retain images of the Fisher information of IU
AUGMENTATIONS = 10  # of every forget image, for the gradient of IU


@method(trained=False)
def IU(
    job,
    damping: Option(
        utils.number(float, 0, exclusive=True), "multiple of I added to the Fisher information"
    ) = 0.1,
    step_scale: STEP_SCALE = None,
    stop_accuracy: STOP_ACCURACY = None,
):
    """Influence unlearning: one step along F⁻¹ v, where v is the mean gradient of the forget images
    and F the empirical Fisher information of the retain images (Izzo et al. 2021, 2002.10077; Koh
    and Liang 2017, 1703.04730).

    F replaces the Hessian, as in WoodFisher (Singh and Alistarh 2020, 2004.14340). It is the mean
    of g gᵀ over the gradients g of (at most 2,048) images, plus ``damping``·I. F⁻¹ v comes from
    conjugate gradients (:func:`models.fisher.inverse_product`). The images are augmented as in
    training. The default length is that of :func:`move_until_forgotten`; in theory it is
    |D_f| / |D_r|. The default damping was found on digits.
    """
    retain, images = job.split.retain, job.data.train
    sample = seeds.permutation(job.seed, "IU", len(retain))[:FISHER_IMAGES]
    sample = retain[torch.from_numpy(sample).to(retain.device)]
    augmentation = partial(seeds.generator, job.seed, job.name, "augmentation", device=job.device)
    forget = job.split.forget.repeat(AUGMENTATIONS)
    gradient = fisher.mean_gradient(job.model, images, forget, augmentation())
    direction = fisher.inverse_product(
        job.model, images, sample, gradient, damping=damping, augmentation=augmentation
    )
    move_until_forgotten(job, direction, step_scale, stop_accuracy)


NEG_MERGE_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of the learning rate


@method(num_epochs=5, learning_rate=3e-3, extensible=False)
def neg_merge(job, step_scale: STEP_SCALE = None, stop_accuracy: STOP_ACCURACY = None):
    """NegMerge: subtract the weight changes that several fine-tunings on the forget images share
    (Kim et al. 2025, 2410.05583).

    Five fine-tunings have 1/4 to 4 times the learning rate, and an order and augmentations of their
    own. The mean of their changes of a weight is subtracted if all have one sign, else nothing. The
    authors choose the largest multiple that keeps 95 % of the retain accuracy; the default multiple
    is that of :func:`move_until_forgotten`. BatchNorm keeps the original's running statistics.
    """
    original, model = copies(job.model), job.model
    merged = {name: torch.zeros_like(weight) for name, weight in original.items()}
    signs = {name: torch.zeros_like(weight) for name, weight in original.items()}
    count = len(NEG_MERGE_RATES)
    for number, factor in enumerate(NEG_MERGE_RATES):
        model.load_state_dict(original, strict=False)
        training = job.part(number, count, factor * job.recipe.learning_rate)
        for epoch in training.epochs(eval_mode=True):
            for batch in epoch.batches("forget"):
                epoch.step(F.cross_entropy(*batch.forget), batch)
        for name, weight in model.named_parameters():
            change = weight.detach() - original[name]
            merged[name] += change / count
            signs[name] += change.sign()
    model.load_state_dict(original, strict=False)
    direction = {name: -merged[name] * (signs[name].abs() == count) for name in merged}
    move_until_forgotten(job, direction, step_scale, stop_accuracy)


def move_until_forgotten(job, direction, step_scale, stop_accuracy):
    """Add a multiple of ``direction`` ({parameter: tensor}) to the weights.

    The multiple is ``step_scale``. By default it is the smallest that forgets
    (:func:`forgotten_accuracy`): the step begins at a thousandth of the norm of the weights,
    doubles until the accuracy is reached, and six bisections follow. It is at most as long as the
    weights.
    """
    size, original = norm(direction), copies(job.model)
    if not size:
        print(f"{job.label}: the step is zero, so the model is unchanged")
        return
    unit = {name: tensor / size for name, tensor in direction.items()}

    def move(length):
        with torch.no_grad():
            for name, weight in job.model.named_parameters():
                weight.copy_(original[name] + length * unit[name])

    if step_scale is not None:
        move(step_scale * size)
        return
    stop_at = forgotten_accuracy(job, stop_accuracy)

    def reached(length):
        move(length)
        return forget_accuracy(job) <= stop_at

    longest = norm(original)
    low, high = 0.0, longest / 1000
    while not reached(high):
        if high == longest:
            print(
                f"{job.label}: more than {100 * stop_at:g} % of the forget images are still "
                "recognised after a step as long as the weights; pass --step_scale"
            )
            return
        low, high = high, min(2 * high, longest)
    move(shortest(reached, low, high))


def step_back(job, start, stop_at):
    """Move from the weights at the end of a training towards those at its start ({name: tensor}).

    The result is the shortest step from ``start``, in 64ths of the way, at which the accuracy on
    (at most 2,000) forget images is at most ``stop_at``. If that accuracy is not reached at the
    end, or ``stop_at`` is 0, the weights stay those of the end.
    """
    end = copies(job.model)

    def move(share):
        with torch.no_grad():
            for name, weight in job.model.named_parameters():
                weight.copy_(torch.lerp(start[name], end[name], share))

    def reached(share):
        move(share)
        return forget_accuracy(job) <= stop_at

    if stop_at > 0 and reached(1.0):
        move(shortest(reached, 0.0, 1.0))


def shortest(reached, low, high):
    """Where between ``low`` and ``high`` ``reached(value)`` becomes true, by six bisections."""
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def forget_accuracy(job):
    """The accuracy on (at most 2,000) forget images."""
    return job.accuracies(["forget"], MONITORED)["forget"]


def copies(model):
    """Copies of the parameters of a model, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def norm(tensors):
    """The Euclidean norm of {name: tensor} as one vector."""
    squares = [tensor.double().square().sum() for tensor in tensors.values()]
    return torch.stack(squares).sum().sqrt().item()
