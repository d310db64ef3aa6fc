"""The baseline methods and the one training loop they share.

A method is a function of a :class:`Job`, registered with its default hyper-parameters by ``@method``. Most say
only which images an epoch passes through and what the loss of a batch is, and leave the rest to :func:`train`.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import models
import utils
from models import batch_norm, checkpoint, distributed, fisher, inference

MONITORED = 2000  # images of each part whose accuracy is measured after every epoch
MODEL_FILE = "unlearning_model.pth"
MASK_FILE = "saliency_mask.pth"
FAILURE_FILE = "failure.json"
PARTS = ("retain", "forget")
RUN_COLUMNS = {
    "method": ("method", "text"),
    "num_epochs": ("epochs", "text"),
    "learning_rate": ("rate", "text"),
    "retain": ("retain %", "percent"),
    "forget": ("forget %", "percent"),
    "test": ("test %", "percent"),
    "seconds": ("time s", "seconds"),
}


class Diverged(utils.UserError):
    """The loss or the weights of a run are no longer finite."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training loop; SGD with momentum 0.9 and weight decay 5e-4 throughout.

    ``precision`` is that of the network's forward and backward pass: fp32, tf32 or bf16 (autocast; the weights and
    what is computed from the logits are float32).
    """

    num_epochs: int
    learning_rate: float
    batch_size: int = 64
    milestones: list[int] | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    precision: str = "fp32"


@dataclass
class Job:
    """One run: a model, what it trains on, and how.

    ``name`` is the base method's and seeds the run, so that a CPU variant draws its base's random numbers; ``label``
    is what people read. ``options`` are the method's own hyper-parameters. ``term`` is the conformal loss of
    :mod:`unlearn_cpu`, or None. ``new_model`` builds the network as it was before any training on this data.
    ``epoch_done`` receives a dict of numbers after every epoch; a ``quiet`` run measures and prints no accuracies.
    What a method puts into ``by_products`` (a state_dict by file name) is saved beside the model.
    """

    name: str
    label: str
    model: torch.nn.Module
    data: utils.Data
    split: utils.Split
    recipe: Recipe | None
    seed: int
    options: dict = field(default_factory=dict)
    new_model: Callable[[], torch.nn.Module] | None = None
    term: object = None
    epoch_done: Callable[[dict], None] = lambda record: None
    quiet: bool = False
    compile: bool = False
    progress: "Progress | None" = None
    by_products: dict[str, dict] = field(default_factory=dict)

    @property
    def device(self):
        return self.data.train.labels.device


class Progress:
    """Where a run stands after each epoch, so that a killed one goes on (``--resume``).

    The state lies in ``path`` until the run is done. All that is random is drawn from the seed and the epoch, so that
    model, optimiser, schedule and records are the whole state. Raises UserError where ``resume`` finds the state of
    another run.
    """

    def __init__(self, path, identity, resume, save_every):
        self.path, self.identity, self.found, self._every = path, identity, None, save_every
        self._state, self._saved, self._started = None, time.perf_counter(), time.perf_counter()
        if resume and path.exists():
            self.found = checkpoint.read_state(path)
            if not isinstance(self.found, dict) or self.found.get("identity") != identity:
                raise utils.UserError(
                    f"--resume: {path} is of a run with other flags; leave it out to begin anew"
                )

    @property
    def seconds(self):
        """What the run has taken so far, before it was killed and since."""
        return time.perf_counter() - self._started + (self.found["seconds"] if self.found else 0)

    def restore(self, model, optimizer, scheduler, term):
        """Bring everything to the state that was saved. Returns (epochs done, records, whether the run had ended)."""
        if not self.found:
            return 0, [], False
        model.load_state_dict(self.found["model"])
        optimizer.load_state_dict(self.found["optimizer"])
        scheduler.load_state_dict(self.found["scheduler"])
        if term is not None:
            term.q_hats[:] = self.found["q_hats"]
        return self.found["epoch"], self.found["records"], self.found["ended"]

    def epoch_done(self, model, optimizer, scheduler, term, epoch, records, ended):
        """Remember the state after an epoch, and save it when the last saving is ``save_every`` seconds ago."""
        if distributed.rank():
            return
        copied = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        copied = copy.deepcopy(checkpoint.on_cpu(copied))
        copied |= {
            "identity": self.identity,
            "epoch": epoch,
            "records": list(records),
            "ended": ended,
        }
        self._state = copied | {
            "q_hats": list(term.q_hats) if term is not None else [],
            "seconds": self.seconds,
        }
        if time.perf_counter() - self._saved >= self._every:
            self.save()

    def save(self):
        """Write the last epoch's state; returns whether there is one."""
        if self._state is not None:
            checkpoint.save_state(self.path, self._state)
            self._saved = time.perf_counter()
        return self._state is not None or self.found is not None


@dataclass
class Batch:
    """One step's images, first the retained ones, then the forgotten ones: where they stand among the training
    images, their labels, and the model's logits for them. ``inputs`` are the augmented images of this process alone."""

    indices: torch.Tensor
    labels: torch.Tensor
    num_retain: int
    inputs: torch.Tensor
    logits: torch.Tensor

    @property
    def retain(self):
        return self.logits[: self.num_retain], self.labels[: self.num_retain]

    @property
    def forget(self):
        return self.logits[self.num_retain :], self.labels[self.num_retain :]

    def answers(self, network, part):
        """Logits of another network, without gradient, for the ``retain`` or the ``forget`` images."""
        retained = len(distributed.local_rows(self.labels[: self.num_retain]))
        places = slice(retained) if part == "retain" else slice(retained, None)
        own = self.logits.new_zeros(len(self.inputs), self.logits.shape[1])
        if len(self.inputs[places]):  # not every network takes a batch of no images
            with torch.no_grad():
                own[places] = network(self.inputs[places]).float()
        every = distributed.gather_rows(own, len(self.labels))
        return every[: self.num_retain] if part == "retain" else every[self.num_retain :]


# ---------------------------------------------------------------- the training loop


def train(
    job,
    batch_loss,
    passes_through=("retain",),
    *,
    schedule=None,
    before_step=None,
    after_step=None,
    finished=None,
):
    """Train ``job.model`` by ``batch_loss(batch)``, a scalar, over epochs through the named parts of the split.

    An epoch visits every image of each part once, freshly shuffled and augmented; each step takes the same share
    of every part. Where that is not the method's order, ``schedule(epoch)`` gives the steps as :func:`index_batches`
    does. ``before_step(batch)`` may change the gradients, ``after_step()`` the weights, and ``finished(record)`` end
    the training after an epoch. With a conformal term, forget
    images join the steps that have none, and λ times the term is added to the loss of every step. The model,
    BatchNorm included, trains in train mode, which every evaluation leaves as it was; a step of one image, which
    has no batch statistics, takes the running ones. Nothing in an epoch waits for the device. Raises
    :class:`Diverged` when the loss or a weight is not finite.

    Several processes divide each step's images: the logits of all come together on every process, which takes the
    loss of the whole step, so that any loss of a method gives the gradient that one process would give.
    """
    model, recipe, term = job.model, job.recipe, job.term
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=job.device.type == "cuda",
    )
    if recipe.milestones:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.num_epochs)
    schedule = schedule or partial(index_batches, job, passes_through)
    done, records, ended = 0, [], False
    if job.progress:
        done, records, ended = job.progress.restore(model, optimizer, scheduler, term)
        for record in records:
            job.epoch_done(record)
    forward = _forward_pass(job)
    adds_term = term is not None and term.lamda > 0
    bar = distributed.progress_bar(desc=job.label, unit="img", unit_scale=True)
    for epoch in () if ended else range(done + 1, recipe.num_epochs + 1):
        start = time.perf_counter()
        record = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
        steps = schedule(epoch)
        if term is not None:
            record |= term.start_epoch(model)
        if adds_term:
            steps = join_forget(job, steps, epoch)
        bar.reset(recipe.num_epochs * sum(len(indices) for indices, _ in steps))
        utils.seed_everything(job.seed, job.name, "dropout", epoch)
        augmentation = utils.generator(job.seed, job.name, "augmentation", epoch, device=job.device)
        loss_sum = torch.zeros((), device=job.device)
        correct = torch.zeros((), device=job.device)
        seen = 0
        bar.update((epoch - 1) * bar.total // recipe.num_epochs)
        batches = job.data.train.batches((indices for indices, _ in steps), augmentation)
        for (indices, num_retain), inputs in zip(steps, batches, strict=True):
            model.train(len(indices) > 1)
            logits = forward(inputs, len(indices))
            batch = Batch(indices, job.data.train.labels[indices], num_retain, inputs, logits)
            loss = batch_loss(batch)
            if adds_term:
                loss = loss + term.lamda * term.loss(*batch.forget)
            optimizer.zero_grad(set_to_none=True)
            (
                loss * distributed.world_size()
            ).backward()  # of which each process has its images' part, and the mean is taken
            if before_step:
                before_step(batch)
            optimizer.step()
            if after_step:
                after_step()
            loss_sum += loss.detach()
            correct += (batch.logits.detach().argmax(dim=1) == batch.labels).sum()
            seen += len(indices)
            bar.update(len(indices))
        scheduler.step()
        model.train()

        record |= {"loss": loss_sum.item() / len(steps), "train_acc": correct.item() / seen}
        bar.set_postfix(epoch=epoch, loss=f"{record['loss']:.3f}", acc=f"{record['train_acc']:.3f}")
        seconds = time.perf_counter() - start
        if not math.isfinite(record["loss"]) or not weights_are_finite(model):
            bar.close()
            raise Diverged(
                f"{job.label} diverged in epoch {epoch} at learning rate {recipe.learning_rate:g}: the loss is "
                f"{record['loss']}; lower --learning_rate. What was saved before is unchanged"
            )
        if not job.quiet:
            try:
                with _autocast(job):
                    record |= {
                        f"{part}_acc": accuracy
                        for part, accuracy in accuracies(job, MONITORED).items()
                    }
            except utils.NotFinite as error:
                bar.close()
                raise Diverged(f"{job.label} in epoch {epoch}: {error}") from error
        record |= {"images_per_second": seen / seconds, "seconds": time.perf_counter() - start}
        job.epoch_done(record)
        if not job.quiet:
            tqdm.write(_line(job, record))
        records.append(record)
        ended = bool(finished and finished(record))
        if job.progress:
            job.progress.epoch_done(model, optimizer, scheduler, term, epoch, records, ended)
        if ended:
            break
    bar.close()


def weights_are_finite(model):
    """Whether every parameter and every running statistic of BatchNorm is finite."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def _forward_pass(job):
    """``forward(inputs, count)`` of :func:`train`: from a process's own augmented images the float32 logits of all
    ``count`` images of the step, with the gradient of its own."""
    device, network = job.device, job.model
    if distributed.world_size() > 1:
        batch_norm.synchronise(network)
        warnings.filterwarnings(
            "ignore", "Grad strides do not match"
        )  # of 1×1 convolutions; only speed is at stake
        with warnings.catch_warnings(
            action="ignore"
        ):  # newer torch has another name for this argument
            network = DistributedDataParallel(network, broadcast_buffers=False)
    if job.compile:
        network = _compiled(network, device)

    def forward(inputs, count):
        with _autocast(job):
            logits = network(inputs).float()
        if distributed.world_size() == 1:
            return logits
        every = distributed.gather_rows(logits, count)
        distributed.local_rows(every).copy_(logits)
        return every

    return forward


def _autocast(job):
    return torch.autocast(job.device.type, torch.bfloat16, enabled=job.recipe.precision == "bf16")


def _compiled(network, device):
    """``torch.compile``, anew for each batch size, with CUDA graphs on a GPU. Raises UserError where it cannot."""
    compiled = torch.compile(
        network, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default"
    )

    def forward(inputs):
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return compiled(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise utils.UserError(
                f"--compile: {str(error).strip().splitlines()[0]}; leave it out"
            ) from error

    return forward


def relearn(model, data, split, seed, num_steps, learning_rate, measure):
    """Train ``model`` on a tenth of the forget images and see whether the others come back.

    SGD at a constant rate, batches of at most 64 images of the tenth, which every step augments anew. ``measure(step,
    others)`` is called before the first step and after 1, 2, 4, ... and ``num_steps`` of them, with the indices of
    the nine tenths that are not trained on. Raises UserError for fewer than two forget images, and :class:`Diverged`
    as :func:`train` does.
    """
    if len(split.forget) < 2:
        raise utils.UserError(
            "--relearn: one forget image cannot be divided; leave it out, or forget more"
        )
    shuffled = torch.from_numpy(utils.permutation(seed, "relearn", len(split.forget)))
    order, tenth = split.forget[shuffled.to(split.forget.device)], max(1, len(split.forget) // 10)
    again, others = order[:tenth], order[tenth:]
    stops = sorted(
        {2**power for power in range(num_steps.bit_length()) if 2**power < num_steps} | {num_steps}
    )
    batches = _endless_batches(again, utils.generator(seed, "relearn", "order"))
    recipe = Recipe(len(stops), learning_rate, milestones=[len(stops)])
    job = Job("relearn", "relearn", model, data, split, recipe, seed, quiet=True)
    job.epoch_done = lambda record: measure(stops[record["epoch"] - 1], others)

    def schedule(epoch):
        before = stops[epoch - 2] if epoch > 1 else 0
        return [(next(batches), 0) for _ in range(stops[epoch - 1] - before)]

    measure(0, others)
    train(job, lambda batch: F.cross_entropy(*batch.forget), schedule=schedule)


def _endless_batches(indices, rng):
    while True:
        order = indices[torch.randperm(len(indices), generator=rng).to(indices.device)]
        yield from order.tensor_split(math.ceil(len(order) / Recipe.batch_size))


def index_batches(job, parts, epoch):
    """The steps of one pass through ``parts``: pairs of (indices into the training images, how many are retained).

    As many steps as the parts fill; each takes an equal share of every part, and no step is empty. Near-equal steps
    leave no last batch of one image, which BatchNorm could not train on.
    """
    own = {part: getattr(job.split, part) for part in parts}
    steps = math.ceil(sum(len(indices) for indices in own.values()) / job.recipe.batch_size)
    shares = [
        _shares(job, part, epoch, steps) if part in own else _nothing(job, steps) for part in PARTS
    ]
    return [(torch.cat([r, f]), len(r)) for r, f in zip(*shares, strict=True) if len(r) + len(f)]


def join_forget(job, steps, epoch):
    """The same steps, with an equal share of the forget images in each that had none."""
    without = [
        number for number, (indices, num_retain) in enumerate(steps) if len(indices) == num_retain
    ]
    joined = list(steps)
    for number, share in zip(without, _shares(job, "forget", epoch, len(without)), strict=True):
        joined[number] = torch.cat([steps[number][0], share]), steps[number][1]
    return joined


def _shares(job, part, epoch, steps):
    """The images of a part, freshly shuffled and divided over ``steps``."""
    indices = getattr(job.split, part)
    rng = utils.generator(job.seed, job.name, "order", part, epoch)
    return (
        indices[torch.randperm(len(indices), generator=rng).to(job.device)].tensor_split(steps)
        if steps
        else ()
    )


def _nothing(job, steps):
    return [torch.empty(0, dtype=torch.int64, device=job.device)] * steps


def accuracies(job, limit=None):
    """Accuracy on the retain, forget and test images without augmentation: of all, or of ``limit`` fixed ones each.

    Finite weights can still overflow inside the network. Raises utils.NotFinite where a logit is not finite.
    """
    found = {}
    for part, images in (
        ("retain", job.data.train),
        ("forget", job.data.train),
        ("test", job.data.held_out),
    ):
        indices = getattr(job.split, part)
        if limit is not None and len(indices) > limit:
            sample = utils.permutation(job.seed, "monitored", len(indices))[:limit]
            indices = indices[torch.from_numpy(sample).to(indices.device)]
        if len(indices):
            logits, labels = inference.compute_logits(job.model, images, indices)
            found[part] = (logits.argmax(dim=1) == labels).double().mean().item()
    return found


def _line(job, record):
    parts = [
        f"{job.label} epoch {record['epoch']}/{job.recipe.num_epochs}",
        f"loss {record['loss']:.4f}",
    ]
    parts += [
        f"{key[:-4]} {100 * value:.1f} %" for key, value in record.items() if key.endswith("_acc")
    ]
    if "q_hat" in record:
        parts.append(f"q̂ {record['q_hat']:.4f}")
    return "  ".join([*parts, f"{record['images_per_second']:.0f} img/s"])


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A method and its default hyper-parameters; None stands for the original model's own.

    ``options`` are the hyper-parameters that only some methods have, ``vit`` the defaults that differ for transformers.
    A method that is not ``trained`` has no epochs and no rate; one that is not ``extensible`` has no CPU variant.
    """

    run: Callable[[Job], None]
    num_epochs: int | None
    learning_rate: float | None
    momentum: float
    options: dict
    vit: dict
    trained: bool
    extensible: bool


METHODS: dict[str, Method] = {}

# Hyper-parameters of single methods: how a flag is read, and what it means. The defaults stand at the methods.
OPTIONS = {
    "stop_accuracy": (
        utils.number(float, 0, 1),
        "accuracy on the forget images at which the ascent ends",
    ),
    "forget_weight": (utils.number(float, 0), "weight of the ascent on the forget images"),
    "kd_T": (utils.number(float, 0, exclusive=True), "temperature of the distillation"),
    "msteps": (
        utils.number(int, 0),
        "epochs that begin with a pass of maximisation on the forget images",
    ),
    "beta": (utils.number(float, 0), "weight of the distance to the original on the retain images"),
    "gamma": (utils.number(float, 0), "weight of the cross-entropy on the retain images"),
    "mask_ratio": (utils.number(float, 0, 1), "share of the weights that are salient"),
    "mask_path": (
        utils.expand_path,
        "a saved mask (saliency_mask.pth of an earlier run) instead of one computed on the fly",
    ),
    "noise": (utils.number(float, 0), "scale of the noise's variance"),
    "selection_weighting": (
        utils.number(float, 0),
        "weights this many times more important for D_f than for D dampen",
    ),
    "dampening_constant": (utils.number(float, 0), "factor of the dampening"),
    "ascent": (
        utils.number(float, 0),
        "weight of the ascent at the start; it falls to zero as a cosine",
    ),
    "ascent_every": (utils.number(int, 1), "repair steps from one ascent step to the next"),
    "adaptivity": (utils.number(float, 0), "exponent of the loss in the weight of a forget image"),
    "saliency_threshold": (
        utils.number(float, 0),
        "weights whose importance ratio D_f / D_r is above are salient",
    ),
    "max_norm": (
        utils.number(float, 0, exclusive=True),
        "largest norm of an ascent step's gradient",
    ),
}


def method(
    num_epochs=None,
    learning_rate=None,
    momentum=0.9,
    *,
    vit=None,
    trained=True,
    extensible=True,
    **options,
):
    """Register the decorated function under its own name, with its default hyper-parameters."""

    def register(function):
        entry = Method(
            function,
            num_epochs,
            learning_rate,
            momentum,
            options,
            vit or {},
            trained,
            trained and extensible,
        )
        METHODS[function.__name__] = entry
        return function

    return register


def cross_entropy(logits, labels):
    """Mean cross-entropy, logits M×K and labels M → a scalar with gradient; 0 where M = 0, as in a step without
    retained images."""
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum()


def retain_cross_entropy(batch):
    """Cross-entropy on the retained images of a batch."""
    return cross_entropy(*batch.retain)


@method()
def retrain(job):
    """The reference: the original's own recipe from scratch, on the retain set alone."""
    job.model = job.new_model()
    train(job, retain_cross_entropy)


@method(num_epochs=20)
def finetune(job):
    """Fine-tuning the original on the retain set, so that it forgets the rest (Warnecke et al. 2021, 2108.11577).

    Defaults: 20 epochs at the rate that the original was trained with, which is what the command line published
    with arXiv 2501.19403 says for CIFAR-10 (20 epochs at 0.1).
    """
    train(job, retain_cross_entropy)


@method(num_epochs=10, learning_rate=0.013)
def RL(job):
    """Random labels: the forget images get wrong labels, and the original trains on them and the retain images
    (Golatkar et al. 2020, 1911.04933).

    The labels are drawn once; augmentation is drawn anew for each batch. Defaults: those published for random
    labels with SalUn on CIFAR-10 (10 epochs at 0.013).
    """
    train(job, random_label_loss(job), PARTS)


def random_label_loss(job):
    """Cross-entropy with the true labels of the retain images and wrong labels, drawn once, of the forget images."""
    labels, classes = job.data.train.labels, len(job.data.classes)
    rng = utils.generator(job.seed, "random labels")
    shift = torch.randint(1, classes, (len(labels),), generator=rng).to(
        job.device
    )  # never 0: never the true label
    targets = labels.clone()
    targets[job.split.forget] = (labels + shift)[job.split.forget] % classes
    return lambda batch: F.cross_entropy(batch.logits, targets[batch.indices])


@method(num_epochs=50, learning_rate=3e-4, extensible=False, stop_accuracy=None)
def GA(job):
    """Gradient ascent on the cross-entropy of the forget images (Thudi et al. 2022, 2109.13398).

    Ascent has no end of its own: it stops after the epoch in which accuracy on the forget images has come down to
    ``stop_accuracy``; when that is left out, to :func:`ascent_end`. BatchNorm normalises by the batch, and keeps the
    original's running statistics: those of forget images alone would replace the retained classes' (digits, class 9,
    five epochs at 0.003: 93 % of the retained training images stay right, with the original's 99 %). Defaults: found
    on digits; the epochs are the most that are run.
    """
    stop = ascent_end(job) if job.options["stop_accuracy"] is None else job.options["stop_accuracy"]
    for module in job.model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.0

    def finished(record):
        return record["forget_acc"] <= stop

    train(job, lambda batch: -F.cross_entropy(*batch.forget), ("forget",), finished=finished)


def ascent_end(job):
    """The accuracy at which forget images are forgotten: 1 % for a class, else the original's on images it never saw.

    Those are the training-calibration images, which no metric scores. Raises UserError where there are none.
    """
    if job.split.forget_class is not None:
        return 0.01
    if not len(job.split.train_calibration):
        raise utils.UserError(
            f"{job.label}: none of the {len(job.data.held_out)} held-out images is left to measure the accuracy at "
            "which the ascent should stop; pass --stop_accuracy"
        )
    logits, labels = inference.compute_logits(
        job.model, job.data.held_out, job.split.train_calibration
    )
    return (logits.argmax(dim=1) == labels).double().mean().item()


@method(num_epochs=5, learning_rate=0.01, forget_weight=0.02)
def ga_plus(job):
    """NegGrad+: descent on the retain images and ascent on the forget images in each step
    (Kurmanji et al. 2023, 2302.09880).

    The weight is relative to 1 for the retain images. Defaults: found on digits and 5,000 CIFAR-10 images. A weight of
    0.05, about what that paper's 0.95 : 0.05 comes to, leaves the retained classes of the latter at 31 % when one is
    forgotten.
    """
    weight = job.options["forget_weight"]

    def loss(batch):
        return cross_entropy(*batch.retain) - weight * cross_entropy(*batch.forget)

    train(job, loss, PARTS)


@method(trained=False, noise=1e-7)
def FisherForgetting(job):
    """Gaussian noise on every weight, of variance noise / F with F the diagonal Fisher information of the retain
    images (Golatkar et al. 2020, 1911.04933).

    The information is exact: expected over the model's own answers, image by image. 1 / F is bounded as usual, by 1000,
    and by 100 in the last layer. Default: ten times as much noise leaves 10 % accuracy on digits, chance.
    """
    information = fisher.diagonal_fisher(
        job.model, job.data.train, job.split.retain, fisher.expected_scores
    )
    rng = utils.generator(job.seed, job.name, "noise", device=job.device)
    last = fisher.last_layer(job.model)
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            largest = 1e2 if name in last else 1e3
            deviation = fisher_noise_deviation(information[name], job.options["noise"], largest)
            parameter += deviation * torch.randn(parameter.shape, generator=rng, device=job.device)


def fisher_noise_deviation(fisher, noise, largest):
    """Standard deviation of the noise of each weight, from its diagonal Fisher information F: √(noise / F), with 1 / F
    at most ``largest``."""
    return (noise / fisher.clamp(min=1 / largest)).sqrt()


@method(num_epochs=5, learning_rate=0.01, kd_T=1.0)
def teacher(job):
    """Bad teaching: the student follows the original on the retain images and a network that was never trained
    on the forget images (Chundawat et al. 2023, 2205.08096).

    Departs from the paper in the optimiser (theirs is Adam at 1e-4), and takes all retain images, not a share. A
    pre-trained network starts from its pre-trained weights with a new head. Default temperature: the authors'.
    """
    competent, incompetent = frozen_copy(job.model), job.new_model().eval().requires_grad_(False)
    temperature = job.options["kd_T"]

    def loss(batch):
        targets = torch.cat(
            [batch.answers(competent, "retain"), batch.answers(incompetent, "forget")]
        )
        return distance(batch.logits, targets, temperature)

    train(job, loss, PARTS)


def frozen_copy(model):
    """A copy in eval mode without gradients, to be distilled from."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def distance(logits, targets, temperature):
    """KL(teacher ‖ student) of two sets of logits N×K, softened by the temperature T: mean over images, times T²."""
    student, tutor = (F.log_softmax(answers / temperature, dim=1) for answers in (logits, targets))
    return F.kl_div(student, tutor, log_target=True, reduction="batchmean") * temperature**2


@method(
    trained=False, selection_weighting=8.0, dampening_constant=1.0, vit={"selection_weighting": 4.0}
)
def ssd(job):
    """Selective synaptic dampening: weights that matter more for the forget images than for all training images
    shrink in proportion (Foster et al. 2024, 2308.07707).

    Importances are the mean squared gradients of single images, the empirical Fisher information; the authors' code
    squares the gradients of whole batches, whose ratios are larger. As D holds D_f, I_f / I_D cannot exceed
    |D| / |D_f|, which is 10 for a tenth of the images: their α of 10 would then never select a weight. Defaults:
    λ theirs; α = 8 is where digits models stay whole; half of it for transformers, as the authors do. 4 forgets a
    class of 5,000 CIFAR-10 images, 8 leaves it.
    """
    images, parts = job.data.train, (job.split.retain, job.split.forget)
    retain, forget = (
        fisher.diagonal_fisher(job.model, images, part, fisher.observed_score) for part in parts
    )
    share = len(job.split.forget) / sum(map(len, parts))
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            overall = (1 - share) * retain[name] + share * forget[name]
            parameter *= dampening(forget[name], overall, **job.options)


def dampening(forget, overall, selection_weighting, dampening_constant):
    """The factor of each weight: min(λ·I_D / I_f, 1) where I_f > α·I_D, else 1. Importances in, same shape out."""
    factor = (dampening_constant * overall / forget).clamp(max=1)
    return torch.where(forget > selection_weighting * overall, factor, 1.0)


@method(num_epochs=10, learning_rate=2e-3, msteps=2, kd_T=4.0, beta=0.001, gamma=0.99)
def scrub(job):
    """SCRUB: away from the original on the forget images, back to it and to the labels on the retain images, in turns
    (Kurmanji et al. 2023, 2302.09880).

    The first ``msteps`` epochs begin with a pass through the forget images. Defaults: weights and temperature are
    those of the authors' code; its rate of 5e-4 leaves two thirds of a class of 5,000 CIFAR-10 images
    remembered after 5 epochs, 2e-3 none after 4.
    """
    original = frozen_copy(job.model)
    temperature, beta, gamma = (job.options[key] for key in ("kd_T", "beta", "gamma"))

    def schedule(epoch):
        maximise = index_batches(job, ("forget",), epoch) if epoch <= job.options["msteps"] else []
        return maximise + index_batches(job, ("retain",), epoch)

    def loss(batch):
        if not batch.num_retain:
            return -distance(batch.logits, batch.answers(original, "forget"), temperature)
        logits, labels = batch.retain
        from_original = distance(logits, batch.answers(original, "retain"), temperature)
        return beta * from_original + gamma * F.cross_entropy(logits, labels)

    train(job, loss, schedule=schedule)


@method(num_epochs=10, learning_rate=0.013, mask_ratio=0.5, mask_path=None)
def salun(job):
    """SalUn: random labels on the weights with the largest gradient of the forget loss; the others keep the
    original's values (Fan et al. 2024, 2310.12508).

    Defaults: those published with it for 10 % of CIFAR-10 (10 epochs at 0.013, half of the weights).
    """
    path = job.options["mask_path"]
    masks = read_mask(path, job.model) if path else saliency_mask(job)
    job.by_products[MASK_FILE] = masks
    pairs = [
        (p, p.detach().clone(), masks[name].to(job.device))
        for name, p in job.model.named_parameters()
    ]

    @torch.no_grad()
    def restore():  # weight decay and momentum would move them too
        for parameter, original, mask in pairs:
            parameter.copy_(torch.where(mask, parameter, original))

    train(job, random_label_loss(job), PARTS, after_step=restore)


def saliency_mask(job):
    """The ``mask_ratio`` of all weights with the largest |∇ cross-entropy of D_f|: booleans by parameter name."""
    job.model.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in job.model.named_parameters()}
    parts = job.split.forget.split(512 * distributed.world_size())
    for indices, inputs in zip(parts, job.data.train.batches(parts), strict=True):
        loss = F.cross_entropy(
            job.model(inputs),
            job.data.train.labels[distributed.local_rows(indices)],
            reduction="sum",
        )
        gradients = torch.autograd.grad(loss, list(job.model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient
    distributed.add_up(total.values())
    sizes = torch.cat([gradient.abs().flatten() for gradient in total.values()])
    chosen = torch.zeros(len(sizes), dtype=torch.bool, device=job.device)
    chosen[sizes.topk(round(job.options["mask_ratio"] * len(sizes))).indices] = True
    parts = chosen.split([gradient.numel() for gradient in total.values()])
    return {name: part.view_as(total[name]) for name, part in zip(total, parts, strict=True)}


def read_mask(path, model):
    """A saved mask, booleans by parameter name. Raises UserError for a file that is none, or another network's."""
    masks, _ = checkpoint.read(
        path, f"salun saves the mask that it used as {MASK_FILE} beside its model"
    )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = checkpoint.match_names(masks, shapes, path)
    odd = [
        name
        for name in shapes.keys() | masks.keys()
        if getattr(masks.get(name), "shape", None) != shapes.get(name)
    ]
    if odd:
        raise utils.UserError(
            f"--mask_path {path}: not a mask of this network: {min(odd)} differs or is missing"
        )
    if not all(((mask == 0) | (mask == 1)).all() for mask in masks.values()):
        raise utils.UserError(f"--mask_path {path}: not a mask: it holds other values than 0 and 1")
    return {name: masks[name].bool() for name in shapes}


@method(
    num_epochs=5,
    learning_rate=0.01,
    ascent=25.0,
    ascent_every=5,
    adaptivity=0.5,
    saliency_threshold=1.0,
    max_norm=7.0,
)
def sfron(job):
    """SFRon: ascent on the forget images, weighted by image and confined to salient weights, and repair on the retain
    images, in turns (Huang et al. 2024, 2409.19732).

    Defaults: the authors' for 10 % of CIFAR-10; their 1,500 steps of 128 images are five epochs. BatchNorm is in train
    mode in both turns, as theirs. A weight is salient where its empirical Fisher information, image by image, is
    at least ``saliency_threshold`` times as large on the forget as on the retain images.
    """
    options = job.options
    images, split = job.data.train, job.split
    forget, retain = (
        fisher.diagonal_fisher(job.model, images, part, fisher.observed_score)
        for part in (split.forget, split.retain)
    )
    masks = {name: forget[name] >= options["saliency_threshold"] * retain[name] for name in forget}
    steps = job.recipe.num_epochs * len(index_batches(job, ("retain",), 1))
    progress = [0]

    def schedule(epoch):
        progress[0] = (epoch - 1) * steps // job.recipe.num_epochs
        turns, ascents = [], endless_passes(epoch)
        for number, repair in enumerate(index_batches(job, ("retain",), epoch)):
            if number % options["ascent_every"] == 0:
                turns.append((next(ascents), 0))
            turns.append(repair)
        return turns

    def endless_passes(epoch):
        pass_number = 0
        while True:
            rng = utils.generator(job.seed, job.name, "order", "ascent", epoch, pass_number)
            order = torch.randperm(len(split.forget), generator=rng).to(job.device)
            yield from split.forget[order].split(job.recipe.batch_size)
            pass_number += 1

    def loss(batch):
        if batch.num_retain:
            progress[0] += 1
            return F.cross_entropy(*batch.retain)
        strength = options["ascent"] * (1 + math.cos(math.pi * progress[0] / steps)) / 2
        return -strength * adaptive_cross_entropy(*batch.forget, options["adaptivity"])

    def confine(batch):
        if not batch.num_retain:
            for name, parameter in job.model.named_parameters():
                parameter.grad *= masks[name]
            nn.utils.clip_grad_norm_(job.model.parameters(), options["max_norm"])

    train(job, loss, schedule=schedule, before_step=confine)


def adaptive_cross_entropy(logits, labels, adaptivity):
    """Mean over images of w·ℓ with w ∝ ℓ^−λ of mean 1: images forgotten already, of large loss, count less.

    Logits M×K, labels M, λ a float → a scalar; the weights have no gradient (Huang et al. 2024).
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    log_losses = losses.detach().clamp(min=torch.finfo(losses.dtype).eps).log()
    weights = (-adaptivity * log_losses).softmax(
        dim=0
    )  # of sum 1; powers would overflow at a large λ
    return (weights * losses).sum()


# ---------------------------------------------------------------- importances of weights


def describe_methods(names=None):
    """The methods with their defaults, for ``--help``."""
    lines = ["methods and their defaults:"]
    for name in names or METHODS:
        entry = METHODS[name.removeprefix("cpu_")]
        epochs, rate = entry.num_epochs or "the original's", entry.learning_rate or "the original's"
        parts = (
            [f"epochs: {epochs}", f"learning rate: {rate}"] if entry.trained else ["not trained"]
        )
        parts += [f"{key}: {value}" for key, value in entry.options.items() if value is not None]
        parts += [f"{key} of vit: {value}" for key, value in entry.vit.items()]
        lines.append(f"  {name:<16} {', '.join(parts)}")
    return "\n".join(lines)


def add_option_flags(parser, names):
    """The flags of ``OPTIONS`` that the named methods have."""
    group = parser.add_argument_group("single methods", "when left out: the method's own, below")
    for option, (kind, text) in OPTIONS.items():
        owners = [name for name in names if option in METHODS[name.removeprefix("cpu_")].options]
        if owners:
            group.add_argument(f"--{option}", type=kind, help=f"{', '.join(owners)}: {text}")


def method_options(entry, args):
    """A method's own hyper-parameters: flags where given, else its defaults."""
    defaults = entry.options | {
        key: value for key, value in _vit(entry, args).items() if key in entry.options
    }
    given = {key: getattr(args, key, None) for key in entry.options}
    return defaults | {key: value for key, value in given.items() if value is not None}


def _vit(entry, args):
    return entry.vit if args.model_name != "resnet18" else {}


# ---------------------------------------------------------------- runs


def original_recipe(args, device):
    """The recipe of an original model where flags are left out: from scratch, or from ImageNet weights."""
    spec, from_scratch = utils.SPECS[args.data_name], args.model_name == "resnet18"
    return Recipe(
        num_epochs=args.num_epochs
        or (spec.num_epochs if from_scratch else min(spec.num_epochs, 20)),
        learning_rate=args.learning_rate or (spec.learning_rate if from_scratch else 0.01),
        batch_size=args.batch_size or Recipe.batch_size,
        milestones=args.milestones,
        precision=utils.pick_precision(args, device),
    )


def method_recipe(entry, args, original_meta, device):
    """A method's recipe: flags where given, else its own defaults, else the original model's recipe.

    None for a method that is not trained.
    """
    if not entry.trained:
        return None
    original = original_meta.get("recipe") or asdict(original_recipe(args, device))
    follows_original = entry.num_epochs is None
    defaults = {"num_epochs": entry.num_epochs, "learning_rate": entry.learning_rate} | _vit(
        entry, args
    )
    return Recipe(
        num_epochs=args.num_epochs or defaults["num_epochs"] or original["num_epochs"],
        learning_rate=args.learning_rate or defaults["learning_rate"] or original["learning_rate"],
        batch_size=args.batch_size
        or (original["batch_size"] if follows_original else Recipe.batch_size),
        milestones=args.milestones or (original["milestones"] if follows_original else None),
        momentum=entry.momentum,
        precision=utils.pick_precision(args, device),
    )


def already_done(path, identity, args):
    """The meta of an equal run at ``path``, or None where there is none (or --overwrite redoes it).

    ``identity`` is everything that determines the weights. A precision that no flag asks for may be another device's.
    Raises UserError where another run's result is there.
    """
    if args.overwrite or not path.exists():
        return None
    try:
        meta = checkpoint.read(path)[1]
    except utils.UserError as error:
        raise utils.UserError(f"{error}; --overwrite replaces it") from error
    found = meta.get("identity", {})
    different = [key for key in identity | found if found.get(key) != identity.get(key)]
    if args.precision == "auto" and "precision" in different:
        different.remove("precision")
    if not different:
        return meta
    differences = ", ".join(
        f"{key} {found.get(key)} there, {identity.get(key)} now" for key in different
    )
    raise utils.UserError(
        f"{path} exists and is another run's ({differences}); --overwrite replaces it"
    )


def execute(job, run, folder, file_name, record_name, meta, args):
    """Run ``run(job)``, record it, and save the model with its ``meta`` as ``folder/file_name``.

    Returns the meta with the wall time in seconds and the final accuracies added. A run that fails saves nothing. The
    model is moved to its place last, so that an interrupted run is either done or can be resumed.
    """
    with utils.unfinished_folder(folder, checkpoint.size(job.model)) as unfinished:
        if done := already_done(
            folder / file_name, meta["identity"], args
        ):  # since the flags were checked
            return done
        job.compile = args.compile
        job.progress = Progress(
            unfinished / utils.RESUME_FILE, meta["identity"], args.resume, args.save_every
        )
        if job.progress.found:
            print(
                f"{job.label}: goes on after epoch {job.progress.found['epoch']} ({job.progress.path})"
            )
        history = utils.History(unfinished / "history.jsonl")
        with utils.WandbRun(folder, job.label, meta, args) as wandb_run:

            def epoch_done(record):
                history.add(record)
                wandb_run.log(record)

            job.epoch_done = epoch_done
            _run_and_keep_what_is_done(run, job)
            meta = meta | {"seconds": job.progress.seconds, "accuracies": final_accuracies(job)}
            for name, state in job.by_products.items():
                checkpoint.save(unfinished / name, state, meta)
            curves = {"history": history.records} if record_name == "original_model.json" else {}
            utils.save_json(unfinished / record_name, meta | curves)
            checkpoint.save(unfinished / file_name, job.model.state_dict(), meta)
            utils.move_up(unfinished, last=file_name)
            wandb_run.log_table(
                "run", [{"method": job.label, "seconds": meta["seconds"]} | meta["accuracies"]]
            )
    return meta


def final_accuracies(job):
    """:func:`accuracies` on all images. Raises :class:`Diverged` where a weight or a logit is not finite, which a
    method without training can cause too."""
    found = None
    with suppress(utils.NotFinite):
        found = accuracies(job)
    if found is None or not weights_are_finite(job.model):
        flags = " or ".join(
            f"--{option}" for option in (["learning_rate"] if job.recipe else job.options)
        )
        raise Diverged(
            f"{job.label} diverged: some of its weights or outputs are NaN or infinite; lower {flags}. "
            "What was saved before is unchanged"
        )
    return found


def _run_and_keep_what_is_done(run, job):
    """``run(job)``; where something stops it, the state of the last epoch is saved for --resume."""
    try:
        run(job)
    except Diverged:
        raise
    except KeyboardInterrupt:
        if job.progress.save():
            raise utils.Interrupted(
                f"{job.label} is saved; the same command with --resume goes on"
            ) from None
        raise
    except BrokenPipeError:  # such as main_unlearn.py | head
        if job.progress.save():
            raise utils.Interrupted(
                f"the output pipe was closed; {job.label} is saved; the same command with --resume continues it"
            ) from None
        raise
    except Exception:  # a full disk, an unreadable image, a process that died
        with suppress(utils.UserError):
            job.progress.save()
        raise


def run_methods(args, methods, term_of=lambda args, data, split: None, prefix=""):
    """Unlearn with each of ``args.unlearn_name``, for each seed, and print one table. Returns the exit status.

    ``term_of(args, data, split)`` makes the conformal term; ``prefix`` is what its variants' names have before the
    base method's. What is already done is not done again; a method that fails is a row that says why, and the
    others go on.
    """
    names = utils.method_names(args.unlearn_name, methods, prefix)
    check_flags(args, [methods[name] for name in names], names)
    device = utils.pick_device(args)
    data = utils.load_data(args, device, models.input_size(args.model_name))
    plans = [
        plan_runs(seed_args, names, methods, data, device, term_of)
        for seed_args in utils.each_seed(args)
    ]
    rows = [row for plan in plans for row in run_plan(plan, methods, data, device, prefix)]
    failures = [row for row in rows if "note" in row]
    columns = RUN_COLUMNS | {"note": ("note", "text")} if failures else RUN_COLUMNS
    utils.print_table(columns, utils.summarise(rows, columns, ["method"]))
    return 2 if failures else 0


def check_flags(args, entries, names):
    """Raise UserError for a flag that the chosen methods have no use for, or that cannot be right for all of them."""
    if len(names) > 1 and args.learning_rate:
        raise utils.UserError(
            "--learning_rate with several methods: no rate is right for all; leave it out, or run one"
        )
    if not any(entry.trained for entry in entries):
        for flag in ("num_epochs", "learning_rate", "batch_size", "milestones"):
            if getattr(args, flag) is not None:
                raise utils.UserError(f"--{flag}: {', '.join(names)} is not trained; leave it out")
    for option in OPTIONS:
        if getattr(args, option, None) is not None and not any(
            option in entry.options for entry in entries
        ):
            owners = ", ".join(name for name, entry in METHODS.items() if option in entry.options)
            raise utils.UserError(
                f"--{option} belongs to {owners}, not to {', '.join(names)}; leave it out"
            )


@dataclass
class Plan:
    """What is to be done for one seed: the original model, the split, and one entry for each method."""

    args: object
    split: utils.Split
    state: dict
    original: dict
    folder: object
    runs: list[tuple]


def plan_runs(args, names, methods, data, device, term_of):
    """Read and check everything that the runs of one seed need, before any of them begins."""
    split = utils.make_split(data, args)
    root = utils.run_folder(args, data)
    path = utils.locate(args.model_dir, root)
    state, original = checkpoint.read(
        path, "train it first with main_original_model.py and the same flags"
    )
    checkpoint.check_meta(path, original, args, data)
    model = models.build_model(args, len(data.classes), data.train.size, device, pretrained=False)
    checkpoint.load_weights(model, state, path, data.train.spec)
    try:
        inference.compute_logits(model, data.train, split.retain[:64])
    except utils.NotFinite as error:
        raise utils.UserError(f"{path}: {error}") from error
    print(f"{path}: forget {split.describe()}")

    runs, origin = [], {"original": checkpoint.weights_hash(state), "forget_set": split.fingerprint}
    for label in names:
        entry, term = methods[label], term_of(args, data, split)
        recipe, options = method_recipe(entry, args, original, device), method_options(entry, args)
        identity = (asdict(recipe) if recipe else {}) | options | origin
        if options.get("mask_path"):
            identity["mask_path"] = checkpoint.weights_hash(read_mask(options["mask_path"], model))
        if term is not None:
            identity |= {"alpha": term.alpha, "delta": term.delta, "lamda": term.lamda}
        done = already_done(root / split.folder / label / MODEL_FILE, identity, args)
        runs.append((label, recipe, options, term, identity, done))
    return Plan(args, split, copy.deepcopy(model.state_dict()), original, root / split.folder, runs)


def run_plan(plan, methods, data, device, prefix):
    """The runs of one seed, one after the other. Yields a row of the table for each."""
    args, split = plan.args, plan.split

    def build(pretrained):
        return models.build_model(
            args, len(data.classes), data.train.size, device, pretrained=pretrained
        )

    def new_model(purpose):
        utils.seed_everything(args.seed, purpose, "initialisation")
        return build(pretrained=True)

    for label, recipe, options, term, identity, meta in plan.runs:
        folder, name = plan.folder / label, label.removeprefix(prefix)
        if meta:
            print(f"{folder / MODEL_FILE}: already done; --overwrite redoes it")
        else:
            model = build(pretrained=False)
            model.load_state_dict(plan.state)
            job = Job(
                name,
                label,
                model,
                data,
                split,
                recipe,
                args.seed,
                options,
                partial(new_model, name),
                term,
            )
            meta = utils.describe_run(args, data, device) | {
                "method": label,
                "identity": identity,
                "recipe": asdict(recipe) if recipe else None,
                "options": options,
                "unlearn_type": args.unlearn_type,
                "forget_set": split.fingerprint,
                "num_forget": len(split.forget),
                "original_seconds": plan.original.get("seconds"),
            }
            try:
                meta = execute(
                    job, methods[label].run, folder, MODEL_FILE, "results.json", meta, args
                )
            except utils.UserError as error:
                alone = len(plan.runs) == 1 and not args.seeds
                if alone or (distributed.world_size() > 1 and not isinstance(error, Diverged)):
                    raise  # of several processes, perhaps one alone has met it: they would not go on together
                utils.save_json(
                    folder / FAILURE_FILE, {"forget_set": split.fingerprint, "error": str(error)}
                )
                print(f"{label} (seed {args.seed}) failed: {error}")
                yield {
                    "method": label,
                    "note": f"seed {args.seed}: {error}" if args.seeds else str(error),
                }
                continue
            if not distributed.rank():
                (folder / FAILURE_FILE).unlink(missing_ok=True)
            if term is not None and (advice := term.advice()):
                print(f"{label}: {advice}")
        yield (
            {"method": label, "seconds": meta["seconds"]}
            | (meta["recipe"] or {})
            | meta["accuracies"]
        )
