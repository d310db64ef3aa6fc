"""The training loop and the baseline methods.

A method is a function of a :class:`Job` that returns the unlearned model. ``@method`` registers it
with its default hyper-parameters. Most methods define the loss of a batch, choose the images of an
epoch, and leave the rest to :func:`train`.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import models
import utils
from metrics.accuracy import accuracy
from models import adversarial, checkpoint, classifier, distributed, fisher, inference
from models.errors import NotFinite, UserError

MONITORED = 2000  # the accuracies after every epoch use at most this many images of each part
MODEL_FILE = "unlearning_model.pth"
RECORD_FILE = "results.json"
MASK_FILE = "saliency_mask.pth"
FAILURE_FILE = "failure.json"
PARTS = ("retain", "forget")
MEASURED_PARTS = (*PARTS, "test")


class Diverged(UserError):
    """The loss, the weights or the outputs of a run are NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training loop.

    ``milestones`` are the epochs after which the learning rate is divided by 10. Without them it
    follows ``schedule``: a cosine to zero, or constant. ``optimizer`` is sgd, or adam or adamw,
    which have no momentum. ``precision`` is that of the forward and backward pass: fp32, tf32 or
    bf16 (autocast). Weights and losses are float32 in every case.
    """

    num_epochs: int
    learning_rate: float
    batch_size: int = 64
    milestones: list[int] | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    precision: str = "fp32"
    schedule: str = "cosine"
    optimizer: str = "sgd"


TRAINING_FLAGS = ("num_epochs", "learning_rate", "batch_size", "milestones")
RECIPE_FIELDS = {setting.name for setting in fields(Recipe)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: the model, its training data, and the settings.

    ``name`` is the name of the base method. It seeds the run, so a CPU variant draws the same
    random numbers as its base method. ``label`` is the name in the files. ``recipe`` is None for
    a method without training, and ``options`` are the method's own hyper-parameters.
    ``new_model()`` builds the network as it was before any training on this data. ``term`` is the
    conformal loss (:class:`unlearn_cpu.ConformalTerm`) or None. ``epoch_done`` is called with the
    record of every epoch. A ``quiet`` run neither measures nor prints accuracies. ``progress``
    saves the state for --resume. A method stores its additional results in ``by_products``, a
    state_dict by file name, which are saved with the model.
    """

    name: str
    label: str
    model: nn.Module
    data: utils.Data
    split: utils.Split
    recipe: Recipe | None
    seed: int
    options: dict = field(default_factory=dict)
    new_model: Callable[[], nn.Module] | None = None
    term: object = None
    epoch_done: Callable[[dict], None] = lambda record: None
    quiet: bool = False
    compile: bool = False
    progress: "Progress | None" = None
    by_products: dict[str, dict] = field(default_factory=dict)

    @property
    def device(self):
        return self.data.train.labels.device

    @property
    def adds_term(self):
        """Whether the conformal loss contributes to the loss of every step."""
        return self.term is not None and self.term.lamda > 0


@dataclass
class Batch:
    """The images of one step, retain images first.

    ``indices`` (M) are positions in the training set, ``labels`` (M) and ``logits`` (M×K) belong to
    them. The first ``num_retain`` are retain images, the others forget images. ``inputs`` are the
    augmented images of this process only.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    num_retain: int
    inputs: torch.Tensor
    logits: torch.Tensor

    @property
    def retain(self):
        """(logits, labels) of the retain images."""
        return self.logits[: self.num_retain], self.labels[: self.num_retain]

    @property
    def forget(self):
        """(logits, labels) of the forget images."""
        return self.logits[self.num_retain :], self.labels[self.num_retain :]

    def outputs_of(self, network, part):
        """Logits of another network for the ``retain`` or ``forget`` images, without gradient."""
        num_local_retain = len(distributed.local_rows(self.labels[: self.num_retain]))
        rows = slice(num_local_retain) if part == "retain" else slice(num_local_retain, None)
        logits = self.logits.new_zeros(len(self.inputs), self.logits.shape[1])
        if len(self.inputs[rows]):  # some networks reject an empty batch
            with torch.no_grad():
                logits[rows] = network(self.inputs[rows]).float()
        logits = distributed.gather_rows(logits, len(self.labels))
        return logits[: self.num_retain] if part == "retain" else logits[self.num_retain :]


# ---------------------------------------------------------------- the training loop


def train(
    job,
    batch_loss,
    passes_through=("retain",),
    *,
    schedule=None,
    separate_passes=False,
    eval_mode=False,
    replace_inputs=None,
    before_step=None,
    after_step=None,
    finished=None,
    rewind_to=None,
):
    """Train ``job.model`` with the loss ``batch_loss(batch)``, a scalar. Returns the model.

    An epoch visits every image of the parts in ``passes_through`` once, shuffled and augmented.
    Each step takes an equal share of every part. A method with another order passes
    ``schedule(epoch)``, which returns steps as :func:`index_batches` does. With
    ``separate_passes``, retain and forget images of a step pass through the network one after the
    other, so that BatchNorm does not mix them. In ``eval_mode`` BatchNorm normalises by the running
    statistics of the original model, and keeps them. ``replace_inputs(indices, num_retain,
    inputs)`` may return other images for this process's rows of a step. ``before_step(batch)`` may
    change the gradients and ``after_step()`` the weights. ``finished(record)`` may end the training
    after an epoch. ``rewind_to(records)``, called after the last epoch, returns the number of the
    epoch whose weights are the result. With a conformal term, forget images join the steps that
    have none, and λ times the term is added to the loss of every step. Raises :class:`Diverged` if
    the loss or a weight is not finite.
    """
    schedule = schedule or partial(index_batches, job, passes_through)
    objective = Objective(
        batch_loss,
        schedule,
        separate_passes=separate_passes,
        eval_mode=eval_mode,
        replace_inputs=replace_inputs,
        before_step=before_step,
        after_step=after_step,
    )
    state = initial_state(job, keeps_epochs=rewind_to is not None)
    if job.progress:
        job.progress.restore(state)
        for record in state.records:
            job.epoch_done(record)
    forward = forward_pass(job)
    with distributed.progress_bar(desc=job.label, unit="img", unit_scale=True) as bar:
        while state.epoch < job.recipe.num_epochs and not state.ended:
            record = run_epoch(job, state, objective, forward=forward, bar=bar)
            job.epoch_done(record)
            if not job.quiet:
                tqdm.write(epoch_line(job, record))
            state.records.append(record)
            state.epoch += 1
            state.ended = bool(finished and finished(record))
            if state.weights_after is not None:
                state.weights_after.append(copy.deepcopy(checkpoint.on_cpu(job.model.state_dict())))
            if job.progress:
                job.progress.update(state)
    if rewind_to:
        job.model.load_state_dict(state.weights_after[rewind_to(state.records) - 1])
    return job.model


@dataclass(frozen=True)
class Objective:
    """What a method does in every epoch and step: the arguments of :func:`train` of these names."""

    loss: Callable[[Batch], torch.Tensor]
    schedule: Callable[[int], list[tuple[torch.Tensor, int]]]
    separate_passes: bool = False
    eval_mode: bool = False
    replace_inputs: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor] | None = None
    before_step: Callable[[Batch], None] | None = None
    after_step: Callable[[], None] | None = None


@dataclass
class TrainingState:
    """Everything that an epoch changes. A resumed run restores it.

    All random numbers are drawn from the seed and the epoch, so the state holds no generator.
    ``epoch`` is the number of complete epochs, ``records`` has one record for each. ``ended`` is
    True if the method ended the training before the last epoch. ``weights_after`` are the weights
    after each epoch, for a method that may return to one of them, else None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    term: object = None
    epoch: int = 0
    records: list[dict] = field(default_factory=list)
    ended: bool = False
    weights_after: list[dict] | None = None

    def state_dict(self):
        """A copy on the CPU, which further training does not change."""
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        return copy.deepcopy(checkpoint.on_cpu(tensors)) | {
            "q_hats": list(self.term.q_hats) if self.term is not None else [],
            "epoch": self.epoch,
            "records": list(self.records),
            "ended": self.ended,
            "weights_after": self.weights_after and list(self.weights_after),
        }

    def load_state_dict(self, saved):
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.term is not None:
            self.term.q_hats[:] = saved["q_hats"]
        self.epoch, self.ended = saved["epoch"], saved["ended"]
        self.records[:] = saved["records"]
        if self.weights_after is not None:
            self.weights_after[:] = saved["weights_after"]


def initial_state(job, *, keeps_epochs=False):
    """The :class:`TrainingState` before the first epoch.

    With ``keeps_epochs`` it will hold the weights after every epoch.
    """
    optimizer = build_optimizer(job)
    scheduler = build_scheduler(job.recipe, optimizer)
    weights_after = [] if keeps_epochs else None
    return TrainingState(
        job.model, optimizer, scheduler, term=job.term, weights_after=weights_after
    )


def build_optimizer(job):
    """The optimizer of the recipe, for all parameters of the model."""
    recipe, parameters = job.recipe, job.model.parameters()
    settings = {"weight_decay": recipe.weight_decay, "fused": job.device.type == "cuda"}
    adaptive = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if recipe.optimizer in adaptive:
        return adaptive[recipe.optimizer](parameters, recipe.learning_rate, **settings)
    return torch.optim.SGD(parameters, recipe.learning_rate, momentum=recipe.momentum, **settings)


def build_scheduler(recipe, optimizer):
    """The schedule of the learning rate, with a step after every epoch."""
    if recipe.milestones:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones)
    if recipe.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.num_epochs)


def run_epoch(job, state, objective, *, forward, bar):
    """Train for one more epoch and measure it. Returns the record of the epoch.

    The record has the epoch, its learning rate, q̂ of a conformal term, the mean loss, the
    accuracies, the speed and the time.
    """
    start, cpu_start = time.perf_counter(), time.thread_time()
    epoch = state.epoch + 1
    record = {"epoch": epoch, "learning_rate": state.scheduler.get_last_lr()[0]}
    steps = objective.schedule(epoch)
    if job.term is not None:
        record |= job.term.start_epoch(job.model)
    if job.adds_term:
        steps = join_forget(job, steps, epoch)
    num_images = sum(len(indices) for indices, _ in steps)
    bar.reset(job.recipe.num_epochs * num_images)
    bar.update((epoch - 1) * num_images)

    record |= train_epoch(job, state, objective, steps=steps, forward=forward, bar=bar)
    state.scheduler.step()
    bar.set_postfix(epoch=epoch, loss=f"{record['loss']:.3f}", acc=f"{record['train_acc']:.3f}")
    training_seconds = time.perf_counter() - start
    cpu_seconds = time.thread_time() - cpu_start
    check_finite(job, record)
    if not job.quiet:
        if waits_for_busy_cores(job, training_seconds, cpu_seconds):
            print_once(BUSY_CORES)
        record |= monitored_accuracies(job, epoch)
    record["images_per_second"] = num_images / training_seconds
    record["seconds"] = time.perf_counter() - start
    return record


BUSY_CORES = (
    "the cores are busy, and the threads of the training wait for each other; a small "
    "network is faster with OMP_NUM_THREADS=1 in the environment (the results differ in rounding)"
)
print_once = cache(tqdm.write)


def waits_for_busy_cores(job, seconds, cpu_seconds):
    """Whether an epoch had a core for less than 0.7 of its time because the cores are busy.

    On an idle machine its main thread has one for 0.98 of the time. Images in files, other
    processes and the compiler are further reasons to wait: False for trainings that have them.
    """
    has_one_reason = (
        job.device.type == "cpu"
        and torch.get_num_threads() > 1
        and distributed.world_size() == 1
        and not job.compile
        and torch.is_tensor(job.data.train.pixels)
    )
    return has_one_reason and seconds > 0.5 and cpu_seconds < 0.7 * seconds


def train_epoch(job, state, objective, *, steps, forward, bar):
    """Train on every step of one epoch. Returns {"loss", "train_acc"}.

    The loss is the mean over the steps, the accuracy the mean over the augmented images. The model
    is in train mode, except with ``eval_mode`` and in a step with a pass of one image: BatchNorm
    then uses its running statistics, since one image has no batch statistics. No step waits for the
    device.
    """
    epoch = state.epoch + 1
    utils.seed_everything(job.seed, job.name, "dropout", epoch)
    augmentation = utils.generator(job.seed, job.name, "augmentation", epoch, device=job.device)
    step_inputs = job.data.train.batches((indices for indices, _ in steps), augmentation)
    loss_sum = torch.zeros((), device=job.device)
    num_correct = torch.zeros((), device=job.device)
    num_images = 0
    for (indices, num_retain), inputs in zip(steps, step_inputs, strict=True):
        passes = [len(indices)]
        if objective.separate_passes and 0 < num_retain < len(indices):
            passes = [num_retain, len(indices) - num_retain]
        job.model.train(min(passes) > 1 and not objective.eval_mode)
        if objective.replace_inputs:
            inputs = objective.replace_inputs(indices, num_retain, inputs)
        batch = Batch(
            indices=indices,
            labels=job.data.train.labels[indices],
            num_retain=num_retain,
            inputs=inputs,
            logits=forward(inputs, passes),
        )
        loss_sum += optimizer_step(job, objective, batch, optimizer=state.optimizer)
        num_correct += (batch.logits.detach().argmax(dim=1) == batch.labels).sum()
        num_images += len(indices)
        bar.update(len(indices))
    job.model.train()
    return {"loss": loss_sum.item() / len(steps), "train_acc": num_correct.item() / num_images}


def optimizer_step(job, objective, batch, *, optimizer):
    """One step of the optimizer on a batch. Returns the detached loss, with the conformal term."""
    loss = objective.loss(batch)
    if job.adds_term:
        loss = loss + job.term.lamda * job.term.loss(*batch.forget)
    optimizer.zero_grad(set_to_none=True)
    # Every process computes the loss of the whole step, but has the gradient of its own images
    # only. DDP takes the mean over the processes, and the step needs the sum.
    with compiler_errors(job):
        (loss * distributed.world_size()).backward()
    if objective.before_step:
        objective.before_step(batch)
    optimizer.step()
    if objective.after_step:
        objective.after_step()
    return loss.detach()


def check_finite(job, record):
    """Raise :class:`Diverged` if the loss of an epoch or a weight after it is not finite."""
    if math.isfinite(record["loss"]) and weights_are_finite(job.model):
        return
    raise Diverged(
        f"{job.label} diverged in epoch {record['epoch']} at learning rate "
        f"{job.recipe.learning_rate:g}: the loss is {record['loss']}; lower --learning_rate "
        "(earlier results are unchanged)"
    )


def weights_are_finite(model):
    """Whether every parameter and every running statistic of BatchNorm is finite."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def forward_pass(job):
    """The function ``forward(inputs, passes)`` that :func:`train` calls in every step.

    ``inputs`` are the augmented images of this process, ``passes`` the numbers of images of all
    processes that pass through the network together. It returns the float32 logits of all images of
    the step, in order. The rows of this process have a gradient. With several processes, every
    process therefore computes the loss of the whole step.
    """
    network = job.model
    if distributed.world_size() > 1:
        network = data_parallel(network)
    if job.compile:
        network = compiled(network, job.device)

    def forward(inputs, passes):
        if job.compile:
            torch.compiler.cudagraph_mark_step_begin()
        sections = [inputs]
        if len(passes) > 1:
            sections = inputs.split(distributed.local_sizes(passes))
        with autocast(job), compiler_errors(job):
            logits = torch.cat([network(images) for images in sections]).float()
        return with_gradient(logits, sum(passes))

    return forward


def with_gradient(rows, count):
    """All ``count`` rows of a step on every process. Those of this process have their gradient."""
    if distributed.world_size() == 1:
        return rows
    all_rows = distributed.gather_rows(rows, count)
    distributed.local_rows(all_rows).copy_(rows)
    return all_rows


def data_parallel(network):
    """DistributedDataParallel around a network with synchronised BatchNorm."""
    distributed.synchronise_batch_norm(network)
    # 1×1 convolutions have gradients with other strides, which only costs speed.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    with warnings.catch_warnings(action="ignore"):  # newer torch renamed broadcast_buffers
        return DistributedDataParallel(network, broadcast_buffers=False)


def autocast(job):
    """bfloat16 autocast if the recipe asks for it."""
    return torch.autocast(job.device.type, torch.bfloat16, enabled=job.recipe.precision == "bf16")


def compiled(network, device):
    """A network compiled for every batch size, with CUDA graphs on a GPU."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(network, dynamic=False, mode=mode)


@contextmanager
def compiler_errors(job):
    """Turn an error of the compiler into a UserError.

    It compiles each pass when it first runs. A torn file in its cache is an ImportError.
    """
    try:
        yield
    except Exception as error:
        if not job.compile:
            raise
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException | ImportError):
            raise
        reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
        raise UserError(f"--compile: {reason}; leave it out") from error


# ---------------------------------------------------------------- the steps of an epoch


def index_batches(job, parts, epoch, batch_size=None):
    """The steps of one pass through ``parts``, a list of pairs (indices, num_retain).

    The indices point into the training images, the first ``num_retain`` are retain images. There
    are as many steps as full batches of ``batch_size`` images need, by default that of the recipe.
    Each step takes an equal share of every part, and none is empty. Steps of near-equal size avoid
    a last batch of one image, which BatchNorm could not train on.
    """
    num_images = sum(len(getattr(job.split, part)) for part in parts)
    num_steps = math.ceil(num_images / (batch_size or job.recipe.batch_size))
    shares = {part: no_images(job, num_steps) for part in PARTS}
    shares |= {part: shuffled_shares(job, part, epoch, num_steps=num_steps) for part in parts}
    return [
        (torch.cat([retain, forget]), len(retain))
        for retain, forget in zip(shares["retain"], shares["forget"], strict=True)
        if len(retain) + len(forget)
    ]


def forget_batches(job, epoch, batch_size=None):
    """The steps on forget images alone of an epoch: at most ``pass_steps`` of one pass.

    A method that trains on them alone measures after each epoch whether they are forgotten. With
    2,500 random CIFAR-10 images, ``delete`` and ``boundary_shrink`` go 12 points of accuracy past
    that point in passes of 39 steps, and 4 in epochs of 8 steps.
    """
    steps = index_batches(job, ("forget",), epoch, batch_size)
    return steps[: job.options["pass_steps"] or None]


def join_forget(job, steps, epoch):
    """The steps with an equal share of the forget images added to every step that has none."""
    without = [
        number for number, (indices, num_retain) in enumerate(steps) if len(indices) == num_retain
    ]
    joined = list(steps)
    shares = shuffled_shares(job, "forget", epoch, num_steps=len(without))
    for number, share in zip(without, shares, strict=True):
        indices, num_retain = steps[number]
        joined[number] = (torch.cat([indices, share]), num_retain)
    return joined


def shuffled_shares(job, part, epoch, *, num_steps):
    """The shuffled images of a part, divided into ``num_steps`` near-equal shares."""
    indices = getattr(job.split, part)
    rng = utils.generator(job.seed, job.name, "order", part, epoch)
    order = torch.randperm(len(indices), generator=rng).to(job.device)
    return indices[order].tensor_split(num_steps) if num_steps else ()


def endless_batches(job, part, epoch):
    """Full batches of the images of a part without end, shuffled again for every pass over them."""
    indices, pass_number = getattr(job.split, part), 0
    while True:
        rng = utils.generator(job.seed, job.name, "order", "ascent", epoch, pass_number)
        order = torch.randperm(len(indices), generator=rng).to(job.device)
        yield from indices[order].split(job.recipe.batch_size)
        pass_number += 1


def no_images(job, num_steps):
    """``num_steps`` shares without images."""
    return [torch.empty(0, dtype=torch.int64, device=job.device)] * num_steps


# ---------------------------------------------------------------- records and resuming


def accuracies(job, limit=None, parts=MEASURED_PARTS, num_classes=None):
    """Accuracies {part: fraction} without augmentation on the retain, forget and test images.

    ``limit`` restricts each part to a fixed random sample of that size. Parts without images are
    left out. Of a model with more classes, the first ``num_classes`` count. Raises NotFinite if a
    logit is not finite, which finite weights can cause too.
    """
    measured = {}
    for part in parts:
        images = job.data.held_out if part == "test" else job.data.train
        indices = getattr(job.split, part)
        if limit is not None and len(indices) > limit:
            sample = utils.permutation(job.seed, "monitored", len(indices))[:limit]
            indices = indices[torch.from_numpy(sample).to(indices.device)]
        if len(indices):
            logits, labels = inference.compute_logits(job.model, images, indices)
            measured[part] = accuracy(logits[:, :num_classes], labels)
    return measured


def monitored_accuracies(job, epoch, parts=MEASURED_PARTS, num_classes=None):
    """:func:`accuracies` of a sample in the precision of the training, as {"retain_acc": …}.

    Raises :class:`Diverged` if a logit is not finite.
    """
    try:
        with autocast(job):
            measured = accuracies(job, MONITORED, parts, num_classes)
    except NotFinite as error:
        raise Diverged(f"{job.label} in epoch {epoch}: {error}") from error
    return {f"{part}_acc": value for part, value in measured.items()}


def epoch_line(job, record):
    """The line that is printed after an epoch."""
    cells = [f"{job.label} epoch {record['epoch']}/{job.recipe.num_epochs}"]
    cells.append(f"loss {record['loss']:.4f}")
    for key, value in record.items():
        if key.endswith("_acc"):
            cells.append(f"{key.removesuffix('_acc')} {100 * value:.1f} %")
    if "q_hat" in record:
        cells.append(f"q̂ {record['q_hat']:.4f}")
    return "  ".join([*cells, f"{record['images_per_second']:.0f} img/s"])


class Progress:
    """Saves the state of a training after its epochs, and restores it with --resume.

    The state is in the file ``path`` until the run is complete. ``identity`` is everything that
    determines the weights. ``restored`` is the saved state, or None if the run starts from the
    beginning. Raises UserError if ``resume`` finds the state of a run with another identity.
    """

    def __init__(self, path, identity, *, resume, save_every):
        self.path, self.identity, self.save_every = path, identity, save_every
        self.restored, self._latest = None, None
        self._started = self._saved_at = time.perf_counter()
        if resume and path.exists():
            self.restored = checkpoint.read_state(path)
            if not isinstance(self.restored, dict) or self.restored.get("identity") != identity:
                raise UserError(
                    f"--resume: {path} was saved by a run with other flags; "
                    "pass the same flags, or omit --resume to start from the beginning"
                )

    @property
    def seconds(self):
        """Wall time of the run so far, including the time before an interruption."""
        earlier = self.restored["seconds"] if self.restored else 0
        return time.perf_counter() - self._started + earlier

    def restore(self, state):
        """Load the saved state, if there is one, into a :class:`TrainingState`."""
        if self.restored:
            state.load_state_dict(self.restored)

    def update(self, state):
        """Keep a copy of the state, and save it at most every ``save_every`` seconds."""
        if distributed.rank():
            return
        run = {"identity": self.identity, "seconds": self.seconds}
        self._latest = state.state_dict() | run
        if time.perf_counter() - self._saved_at >= self.save_every:
            self.save()

    def save(self):
        """Save the state after the last complete epoch. Returns whether there is one."""
        if self._latest is not None:
            checkpoint.save_state(self.path, self._latest)
            self._saved_at = time.perf_counter()
        return self._latest is not None or self.restored is not None


# ---------------------------------------------------------------- methods


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and its default hyper-parameters.

    ``run(job)`` returns the unlearned model. ``training`` are the fields of :class:`Recipe` that
    the method sets. One without ``num_epochs`` trains as the original model did, and one without
    ``learning_rate`` starts from its rate. ``options`` are hyper-parameters that only some methods
    have. ``transformer``, ``digits`` and ``authors`` hold values of both kinds that differ for
    transformers, for networks trained from scratch on digits, and with ``--recipe authors``. A
    method that is not ``trained`` has no epochs and no learning rate. A method that is not
    ``extensible`` has no CPU variant.
    """

    name: str
    run: Callable[[Job], nn.Module]
    training: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    authors: dict = field(default_factory=dict)
    transformer: dict = field(default_factory=dict)
    digits: dict = field(default_factory=dict)
    trained: bool = True
    extensible: bool = True


METHODS: dict[str, Method] = {}

# The options of single methods: the type of the flag and its help. Defaults are at the methods.
OPTIONS = {
    "stop_accuracy": (utils.number(float, 0, 1), "forget accuracy at which the method ends"),
    "forget_weight": (utils.number(float, 0), "weight of the ascent on the forget images"),
    "kd_T": (utils.number(float, 0, exclusive=True), "temperature of the distillation"),
    "retain_share": (
        utils.number(float, 0, 1, exclusive=True),
        "share of the retain images that the training uses",
    ),
    "forget_batch_size": (
        utils.number(int, 3),
        "images per step of a maximization pass; default: --batch_size",
    ),
    "ascent_limit": (
        utils.number(float, 0),
        "cross-entropy above which a forget image is left alone, in multiples of that of a guess "
        "(the logarithm of the number of classes); 0: no limit",
    ),
    "pass_steps": (
        utils.number(int, 0),
        "largest number of steps on forget images alone in an epoch; 0: a pass over all of them",
    ),
    "msteps": (
        utils.number(int, 0),
        "number of epochs that start with a maximization pass over the forget images",
    ),
    "beta": (
        utils.number(float, 0),
        "weight of the distance to the original model on the retain images (α in the paper)",
    ),
    "gamma": (utils.number(float, 0), "weight of the cross-entropy on the retain images"),
    "rewind": (
        bool,
        "SCRUB+R: return to the epoch whose forget error is that of held-out images",
    ),
    "step_scale": (
        utils.number(float, 0),
        "factor of the step; default: the smallest at which the forget images are forgotten",
    ),
    "damping": (
        utils.number(float, 0, exclusive=True),
        "multiple of the identity that is added to the Fisher information",
    ),
    "radius": (
        utils.number(float, 0, exclusive=True),
        "first radius of the attack in pixels of range 0 to 1; it doubles until the answer changes",
    ),
    "forget_images": (
        utils.one_of(("leave", "keep")),
        "keep: train with the true labels of the forget images, too; leave: leave them out; "
        "default: leave for forgotten classes, else keep",
    ),
    "mask_ratio": (utils.number(float, 0, 1), "fraction of the weights that are salient"),
    "mask_path": (
        utils.expand_path,
        "saved mask to use instead of a new one (saliency_mask.pth of an earlier run)",
    ),
    "l1_weight": (utils.number(float, 0), "weight of the L1 penalty in the first epoch"),
    "step_size": (
        utils.number(float, 0, exclusive=True),
        "step of FGSM towards the nearest wrong class, from 0 to 1 (the range of the pixels)",
    ),
    "sensitivity": (
        utils.one_of(("norm", "squared")),
        "norm of the derivative of a logit by the pixels, or its square",
    ),
    "smoothing": (
        utils.number(float, 0),
        "growth of the temperature with the forget accuracy above the bound",
    ),
    "passes": (
        utils.number(int, 1, 2),
        "2: a pass of the retain images and one of as many forget images per step; 1: one pass",
    ),
    "noise": (utils.number(float, 0), "scale of the variance of the noise"),
    "importances": (
        utils.one_of(("image", "batch")),
        "gradients that are squared: of single images, or of the means of batches",
    ),
    "importance_batches": (
        utils.number(int, 0),
        "--importances batch: number of batches of augmented images, at least one pass over all; "
        "0: one pass over the images as they are",
    ),
    "selection_weighting": (
        utils.number(float, 0),
        "importance ratio D_f / D above which a weight is dampened; default: the largest at which "
        "the forget images are forgotten, at least 1 for classes and 10 for other images",
    ),
    "dampening_constant": (utils.number(float, 0), "factor of the dampening"),
    "ascent": (
        utils.number(float, 0),
        "initial weight of the ascent, which follows a cosine to zero",
    ),
    "ascent_every": (utils.number(int, 1), "number of repair steps per ascent step"),
    "num_steps": (
        utils.number(int, 1),
        "number of repair steps in all, instead of --num_epochs",
    ),
    "adaptivity": (utils.number(float, 0), "exponent of the loss in the weight of a forget image"),
    "saliency_threshold": (
        utils.number(float, 0),
        "importance ratio D_f / D_r from which a weight is salient",
    ),
    "max_norm": (
        utils.number(float, 0, exclusive=True),
        "maximum norm of the gradient of an ascent step",
    ),
}


def method(
    *, authors=None, transformer=None, digits=None, trained=True, extensible=True, **settings
):
    """Register the decorated function under its name.

    ``settings`` are its default hyper-parameters: fields of :class:`Recipe`, and options.
    """
    training = {name: value for name, value in settings.items() if name in RECIPE_FIELDS}
    options = {name: value for name, value in settings.items() if name not in RECIPE_FIELDS}

    def register(function):
        METHODS[function.__name__] = Method(
            name=function.__name__,
            run=function,
            training=training,
            options=options,
            authors=authors or {},
            transformer=transformer or {},
            digits=digits or {},
            trained=trained,
            extensible=trained and extensible,
        )
        return function

    return register


def cross_entropy(logits, labels):
    """Mean cross-entropy of M images, M×K and M → a scalar. 0, with a gradient, for M = 0."""
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum()


def ascent_losses(job, logits, labels):
    """The cross-entropy of M images that are ascended, M×K and M → M.

    It ends at the option ``ascent_limit``, times ln K: an image above it has no gradient. Without a
    limit, the steps on images that are long forgotten never shrink, and destroy the network. The
    default of 4 is the smallest power of two at which no prediction set of a forgotten class of
    digits or CIFAR-10 holds the label.
    """
    limit = job.options["ascent_limit"] or math.inf
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.clamp(max=limit * math.log(logits.shape[1]))


def retain_cross_entropy(batch):
    """Cross-entropy on the retain images of a batch."""
    return cross_entropy(*batch.retain)


@method()
def retrain(job):
    """Retrain, the reference: train from scratch on the retain set with the original's recipe."""
    return train(replace(job, model=job.new_model()), retain_cross_entropy)


@method(
    num_epochs=20,
    digits={"learning_rate": 0.02},
    authors={
        "num_epochs": 10,
        "learning_rate": 0.01,
        "batch_size": 256,
        "schedule": "constant",
    },
)
def finetune(job):
    """Fine-tuning: train the original model on the retain set (Warnecke et al. 2021, 2108.11577).

    Defaults: 20 epochs at the learning rate of the original model. The command line published with
    arXiv 2501.19403 uses them for CIFAR-10 (20 epochs at 0.1). On digits, where the original model
    trains at 0.01, twice that rate: with 0.01, 10 to 41 % of a class stay. The authors' values are
    those of Unlearn-Sparse (2304.04934).
    """
    return train(job, retain_cross_entropy)


@method(
    num_epochs=10,
    learning_rate=0.013,
    authors={"learning_rate": 0.003, "batch_size": 256, "schedule": "constant"},
)
def RL(job):
    """Random labels: train the original model on the retain images, and on the forget images with
    wrong labels (Golatkar et al. 2020, 1911.04933).

    The labels are drawn once. Defaults: 10 epochs at 0.013, the published rate of SalUn, with a
    cosine. The authors' values are those that SFRon (2409.19732) found for this method.
    """
    return train(job, random_label_loss(job), PARTS)


def random_label_loss(job):
    """The cross-entropy of a batch with the true labels of the retain images and wrong labels of
    the forget images. The wrong labels are drawn once, uniformly.
    """
    labels, num_classes = job.data.train.labels, len(job.data.classes)
    rng = utils.generator(job.seed, "random labels")
    # A shift of 0 would be the true label.
    shift = torch.randint(1, num_classes, (len(labels),), generator=rng).to(job.device)
    targets = labels.clone()
    targets[job.split.forget] = (labels + shift)[job.split.forget] % num_classes
    return lambda batch: F.cross_entropy(batch.logits, targets[batch.indices])


@method(
    num_epochs=100,
    learning_rate=1e-4,
    schedule="constant",
    stop_accuracy=None,
    extensible=False,
    authors={"num_epochs": 5, "batch_size": 256, "stop_accuracy": 0.0},
)
def GA(job):
    """Gradient ascent on the cross-entropy of the forget images (Thudi et al. 2022, 2109.13398).

    Ascent does not converge, so it stops after the epoch in which the accuracy on (at most 2,000)
    forget images falls to :func:`stop_accuracy`. BatchNorm normalizes by the batch and keeps the
    running statistics of the original model. Statistics of forget images would replace those of the
    retained classes. On digits (class 9, five epochs at 0.003), 93 % of the retain images are then
    classified correctly, and 99 % with the original statistics. Defaults: the authors' rate, with
    batches of 64 and a stop. ``num_epochs`` is the maximum. The authors' values are those of
    Unlearn-Sparse (2304.04934).
    """
    finished = forgotten(job)
    keep_running_statistics(job.model)

    def loss(batch):
        return -F.cross_entropy(*batch.forget)

    return train(job, loss, ("forget",), finished=finished)


def forgotten(job):
    """The function ``finished(record)`` that ends a training once the forget images are forgotten.

    That is after the epoch in which the accuracy on (at most 2,000) of them falls to
    :func:`stop_accuracy`. An epoch is that of :func:`forget_batches`, except in ``GA``, which
    passes through all forget images: its rate is so low that few steps change little.
    """
    target = stop_accuracy(job)

    def finished(record):
        return monitored_forget_accuracy(job, record) <= target

    return finished


def stop_accuracy(job):
    """The forget accuracy at which a method ends: the option ``stop_accuracy``, by default
    :func:`unseen_accuracy`, and 3 % for classes.

    With 1 % a single one of the 73 images of a digits class can keep a method in training.
    """
    if job.options["stop_accuracy"] is not None:
        return job.options["stop_accuracy"]
    return 0.03 if job.split.forget_classes else unseen_accuracy(job, "pass --stop_accuracy")


def unseen_accuracy(job, remedy):
    """The model's accuracy on the training calibration images, which no metric uses.

    Raises UserError with ``remedy`` if there are none.
    """
    if not len(job.split.train_calibration):
        raise UserError(
            f"{job.label}: its target is the accuracy on held-out images, and none of the "
            f"{len(job.data.held_out)} is available; {remedy}"
        )
    return accuracy(
        *inference.compute_logits(job.model, job.data.held_out, job.split.train_calibration)
    )


def monitored_forget_accuracy(job, record, num_classes=None):
    """The accuracy on (a sample of) the forget images after an epoch, which a quiet run lacks.

    Of a model with more classes, the first ``num_classes`` count.
    """
    if num_classes is not None or "forget_acc" not in record:
        record = monitored_accuracies(job, record["epoch"], ["forget"], num_classes)
    return record["forget_acc"]


def keep_running_statistics(model):
    """Keep the running statistics of BatchNorm in training, which then normalises by the batch.

    Statistics of forget images alone would replace those of the retained images.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.0


@method(
    num_epochs=5,
    learning_rate=0.01,
    forget_weight=0.02,
    ascent_limit=4.0,
    passes=1,
    authors={
        "num_epochs": 10,
        "learning_rate": 0.0095,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "forget_weight": 0.05 / 0.95,
        "ascent_limit": 0.0,
        "passes": 2,
    },
)
def ga_plus(job):
    """NegGrad+: descent on the retain images and ascent on the forget images in every step
    (Kurmanji et al. 2023, 2302.09880).

    The weight of the ascent is relative to 1 for the descent. Defaults: found on digits and 5,000
    CIFAR-10 images, with one pass per step through retain and forget images together. The authors
    weight 0.95 : 0.05 at a rate of 0.01, which is a weight of 0.0526 at 0.0095, and their steps
    have ``passes`` = 2: first the retain images, then as many forget images. They have no
    ``ascent_limit``. Without one, forgetting a class of 2,500 CIFAR-10 images leaves a retain
    accuracy of 20 %, and with the default 91 %.
    """
    forget_weight = job.options["forget_weight"]

    def loss(batch):
        ascent = ascent_losses(job, *batch.forget)
        return cross_entropy(*batch.retain) - forget_weight * ascent.sum() / max(1, len(ascent))

    if job.options["passes"] == 1:
        return train(job, loss, PARTS)

    def schedule(epoch):
        forget_batches = endless_batches(job, "forget", epoch)
        return [
            (torch.cat([retain, next(forget_batches)]), len(retain))
            for retain, _ in index_batches(job, ("retain",), epoch)
        ]

    return train(job, loss, schedule=schedule, separate_passes=True)


@method(trained=False, noise=1e-7, authors={"noise": 1e-6})
def FisherForgetting(job):
    """Gaussian noise on every weight, of a variance that decreases with its Fisher information on
    the retain images (Golatkar et al. 2020, 1911.04933).

    F is exact: the expectation over the model's own predictions, image by image. The formula is the
    authors' (:func:`fisher_noise_variance`). Of a class that is forgotten entirely, the last
    layer's weights are replaced by noise. Default: a tenth of the authors' 1e-6, as in the code of
    2302.09880. With 1e-6 the accuracy on the other classes falls to 78 % on 5,000 CIFAR-10 images
    (1e-7: 92 %, original: 93 %), and to 25 % on digits with 32 channels.
    """
    model = job.model
    information = fisher.diagonal_fisher(
        model, job.data.train, job.split.retain, fisher.expected_scores
    )
    rng = utils.generator(job.seed, job.name, "noise", device=job.device)
    last_layer = fisher.last_layer(model)
    forgotten = forgotten_classes(job)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_last = name in last_layer
            variance = fisher_noise_variance(information[name], job.options["noise"], is_last)
            if is_last:
                parameter[forgotten] = 0
                variance[forgotten] = FORGOTTEN_CLASS_VARIANCE
            noise = torch.randn(parameter.shape, generator=rng, device=job.device)
            parameter += variance.sqrt() * noise
    return model


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


@method(
    num_epochs=5,
    learning_rate=0.01,
    kd_T=1.0,
    retain_share=1.0,
    authors={
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "batch_size": 256,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "schedule": "constant",
        "retain_share": 0.3,
    },
)
def teacher(job):
    """Bad teaching: distill the original model on the retain images and an untrained network on the
    forget images (Chundawat et al. 2023, 2205.08096).

    A pre-trained network serves as untrained with a new head. Where classes are forgotten, its
    answers are shifted (:func:`harmless_shift`). The divergence is the mean over images of its sum
    over classes; the authors' is the mean over both, which Adam does not notice. Default
    temperature: the authors'. The other defaults were found on digits. The authors train on a fixed
    random share of the retain images, ``retain_share``.
    """
    competent = frozen(job, copy.deepcopy(job.model))
    incompetent = frozen(job, job.new_model())
    temperature, shift = job.options["kd_T"], harmless_shift(job, incompetent)

    def loss(batch):
        retain_targets = batch.outputs_of(competent, "retain")
        forget_targets = batch.outputs_of(incompetent, "forget").roll(shift, dims=1)
        return distance(batch.logits, torch.cat([retain_targets, forget_targets]), temperature)

    sampled = replace(job, split=replace(job.split, retain=sampled_retain_set(job)))
    return train(job, loss, schedule=partial(index_batches, sampled, PARTS))


def harmless_shift(job, network):
    """By how many classes to shift the answers of an untrained network on the forget images.

    It gives similar answers to all images. Where the label of a forgotten class is likely by
    chance, that class would stay. The result is the shift at which these labels are least likely,
    and 0 where no class is forgotten.
    """
    forget = job.split.forget
    forget = forget[torch.isin(job.data.train.labels[forget], forgotten_classes(job))]
    if not len(forget):
        return 0
    logits, labels = inference.compute_logits(network, job.data.train, forget)
    shifts = torch.arange(logits.shape[1])
    likelihoods = logits.softmax(dim=1).gather(1, (labels[:, None] - shifts) % len(shifts))
    return int(likelihoods.sum(dim=0).argmin())


def sampled_retain_set(job):
    """The share ``retain_share`` of the retain images, at least one: indices in ascending order."""
    retain = job.split.retain
    count = max(1, round(job.options["retain_share"] * len(retain)))
    rng = utils.generator(job.seed, job.name, "sample")
    chosen = torch.randperm(len(retain), generator=rng)[:count].sort().values
    return retain[chosen.to(retain.device)]


def frozen(job, network):
    """A network in eval mode without gradients, as a teacher. It runs in the training's precision.

    With a teacher in float32, SCRUB took 3.4 times as long as fine-tuning on an H200.
    """
    network.eval().requires_grad_(False)
    network.forward = autocast(job)(network.forward)
    return network


def distance(logits, targets, temperature):
    """T² · mean over images of KL(teacher ‖ student), both softened by the temperature T.

    ``logits`` are the student's and ``targets`` the teacher's, both N×K → a scalar.
    """
    student, teacher = (F.log_softmax(x / temperature, dim=1) for x in (logits, targets))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


SSD_BATCH_SIZE = 128  # the authors'


@method(
    trained=False,
    selection_weighting=None,
    dampening_constant=1.0,
    importances="batch",
    importance_batches=100,
    stop_accuracy=None,
    authors={"selection_weighting": 10.0, "importance_batches": 0},
)
def ssd(job):
    """Selective synaptic dampening: weights that are more important for the forget images D_f than
    for all training images D shrink in proportion (Foster et al. 2024, 2308.07707).

    The importance I of a weight is its mean squared gradient, of single images (the paper's
    equation, the empirical Fisher information) or of batches of 128 (the authors' code, the
    default). With single images, I_f / I_D is at most |D| / |D_f|, since D contains D_f. That is 10
    for a tenth of the images, so α = 10 selects no weight. With batches the ratio has no bound: the
    gradients of a mixed batch cancel, and those of one class do not. The ratios depend on the data
    and the network, so no α works everywhere: the authors' 10 leaves 32 % of the other classes of
    5,000 CIFAR-10 images and 12 % of digits. The default is :func:`largest_selection_weighting`.
    The authors take one pass over images without augmentation. Digits have one batch of forget
    images then, and all weights are compared by one noisy gradient: forgetting a class cost the
    others 0 to 67 points. By default small sets are passed until there are 100 batches, of
    augmented images, and it costs 0 to 3 points.
    """
    split = job.split
    everything = torch.cat([split.retain, split.forget])
    overall, forget = (ssd_importances(job, part) for part in (everything, split.forget))
    original = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}

    @torch.no_grad()
    def dampen(selection_weighting):
        num_dampened = 0
        for name, parameter in job.model.named_parameters():
            factors = dampening(
                forget[name],
                overall[name],
                selection_weighting,
                job.options["dampening_constant"],
            )
            num_dampened += int((factors < 1).sum())
            parameter.copy_(original[name] * factors)
        return num_dampened

    selection_weighting = job.options["selection_weighting"]
    if selection_weighting is None:
        ratios = [forget[name] / overall[name] for name in original]
        ratios = torch.cat([ratio[ratio.isfinite()] for ratio in ratios])
        highest = ratios.max().item() if len(ratios) else 0.0
        selection_weighting = largest_selection_weighting(job, dampen, highest)
    if not dampen(selection_weighting):
        print(
            f"{job.label}: no weight is {selection_weighting:.4g} times as important for the "
            "forget images as for all images, so the model is unchanged; "
            "lower --selection_weighting"
        )
    return job.model


def largest_selection_weighting(job, dampen, highest):
    """The largest α at which ``dampen(α)`` reduces the accuracy on (at most 2,000) forget images to
    :func:`stop_accuracy`. It is halved from the ratio ``highest``, and six bisections of its
    logarithm follow. Where the search ends without success, the lowest α is the result: 1 where
    classes are forgotten, and else the authors' 10, since lower values cost 20 points of retain
    accuracy on 5,000 CIFAR-10 images.
    """
    target = stop_accuracy(job)
    lowest = 1.0 if job.split.forget_classes else 10.0

    def reached(selection_weighting):
        dampen(selection_weighting)
        return accuracies(job, MONITORED, ["forget"])["forget"] <= target

    high = low = max(highest, lowest)
    while not reached(low):
        if low == lowest:
            return low
        high, low = low, max(low / 2, lowest)
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) else (low, middle)
    return low


def ssd_importances(job, indices):
    """The importance of every weight for training images, by parameter name."""
    images = job.data.train
    if job.options["importances"] == "image":
        return fisher.diagonal_fisher(job.model, images, indices, fisher.observed_score)
    augment, passes = None, 1
    if job.options["importance_batches"]:
        augment = utils.generator(job.seed, job.name, "augmentation", device=job.device)
        per_pass = math.ceil(len(indices) / SSD_BATCH_SIZE)
        passes = math.ceil(job.options["importance_batches"] / per_pass)
    batches = []
    for number in range(passes):
        rng = utils.generator(job.seed, job.name, "order", len(indices), number)
        order = torch.randperm(len(indices), generator=rng).to(job.device)
        batches += indices[order].split(SSD_BATCH_SIZE)
    return fisher.batch_fisher(job.model, images, batches, augment)


def dampening(forget, overall, selection_weighting, dampening_constant):
    """The factor of every weight: min(λ·I_D / I_f, 1) where I_f > α·I_D, else 1.

    ``forget`` and ``overall`` are the importances I_f and I_D of one tensor, α is
    ``selection_weighting`` and λ ``dampening_constant``. Returns the same shape.
    """
    factor = (dampening_constant * overall / forget).clamp(max=1)
    return torch.where(forget > selection_weighting * overall, factor, 1.0)


@method(
    num_epochs=10,
    learning_rate=2e-3,
    msteps=2,
    kd_T=4.0,
    beta=0.001,
    gamma=0.99,
    forget_batch_size=None,
    pass_steps=8,
    rewind=False,
    authors={
        "num_epochs": 3,
        "learning_rate": 5e-4,
        "schedule": "constant",
        "forget_batch_size": 512,
        "pass_steps": 0,
    },
)
def scrub(job):
    """SCRUB: alternate between moving away from the original model on the forget images, and back
    to it and to the labels on the retain images (Kurmanji et al. 2023, 2302.09880).

    The first ``msteps`` epochs start with a pass over the forget images. The options ``beta`` and
    ``gamma`` are the weights α and γ of the paper. Defaults: weights and temperature of the
    authors' code. Its learning rate of 5e-4 leaves two thirds of a class of 5,000 CIFAR-10 images
    remembered after 5 epochs, and 2e-3 none after 4. A pass has at most ``pass_steps`` steps, as
    the distance has no bound: the 39 steps of a class of 2,500 images left a retain accuracy of
    18 % after the second epoch. The authors' 5,000 images are 10 steps. Their values are those for
    a class of CIFAR-10. For user privacy (a membership attack on few images) they use 5 epochs,
    ``msteps`` 3, ``beta`` 0.5 and ``gamma`` 1. With ``rewind`` (SCRUB+R) the result is the epoch
    whose forget accuracy is nearest to the accuracy of the last epoch on held-out images of the
    same classes.
    """
    turns = ScrubTurns(job)
    if not job.options["rewind"]:
        return train(job, turns.loss, schedule=turns.schedule)
    check_rewind(job)

    def finished(record):
        record["forget_acc"] = monitored_forget_accuracy(job, record)
        return False

    def rewind_to(records):
        reference = matched_accuracy(job)
        distances = [abs(record["forget_acc"] - reference) for record in records]
        return 1 + distances.index(min(distances))

    return train(job, turns.loss, schedule=turns.schedule, finished=finished, rewind_to=rewind_to)


def check_rewind(job):
    """Raise UserError if no held-out image shows the error that SCRUB+R returns to."""
    if not len(matched_images(job)):
        raise UserError(
            f"{job.label}: --rewind compares with held-out images of the forgotten classes that no "
            "metric uses, and there are none; leave it out"
        )


def matched_images(job):
    """The training calibration images of classes that the forget images have."""
    calibration = job.split.train_calibration
    classes = job.data.train.labels[job.split.forget].unique()
    return calibration[torch.isin(job.data.held_out.labels[calibration], classes)]


def matched_accuracy(job):
    """The accuracy on :func:`matched_images`, with the classes weighted as in the forget set."""
    logits, labels = inference.compute_logits(job.model, job.data.held_out, matched_images(job))
    num_classes = len(job.data.classes)
    forget_labels = job.data.train.labels[job.split.forget].to(labels.device)
    shares = forget_labels.bincount(minlength=num_classes).double()
    weights = (shares / labels.bincount(minlength=num_classes))[labels]
    right = (logits.argmax(dim=1) == labels).double()
    return ((weights * right).sum() / weights.sum()).item()


class ScrubTurns:
    """The maximization and minimization steps of SCRUB, and their losses."""

    def __init__(self, job):
        self.job, self.original = job, frozen(job, copy.deepcopy(job.model))

    def schedule(self, epoch):
        """The steps of an epoch: a maximization pass in the first epochs, then minimization."""
        minimize = index_batches(self.job, ("retain",), epoch)
        if epoch > self.job.options["msteps"]:
            return minimize
        maximize = forget_batches(self.job, epoch, self.job.options["forget_batch_size"])
        return maximize + minimize

    def loss(self, batch):
        """−distance on forget images; β · distance + γ · cross-entropy on retain images."""
        options = self.job.options
        if not batch.num_retain:
            targets = batch.outputs_of(self.original, "forget")
            return -distance(batch.logits, targets, options["kd_T"])
        logits, labels = batch.retain
        targets = batch.outputs_of(self.original, "retain")
        from_original = distance(logits, targets, options["kd_T"])
        return options["beta"] * from_original + options["gamma"] * F.cross_entropy(logits, labels)


@method(
    num_epochs=10,
    learning_rate=0.013,
    mask_ratio=0.5,
    mask_path=None,
    authors={"batch_size": 256, "schedule": "constant"},
)
def salun(job):
    """SalUn: random labels, applied only to the weights with the largest gradient of the forget
    loss (Fan et al. 2024, 2310.12508).

    The other weights keep the values of the original model. Defaults: those published with the
    method for 10 % of CIFAR-10 (10 epochs at 0.013, half of the weights), with batches of 64 and a
    cosine. The authors have batches of 256 and a constant rate. They draw the labels again in every
    epoch, true labels included, and train on the forget images first.
    """
    path = job.options["mask_path"]
    masks = read_mask(path, job.model) if path else saliency_mask(job)
    job.by_products[MASK_FILE] = masks
    masks = {name: mask.to(job.device) for name, mask in masks.items()}
    originals = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}

    @torch.no_grad()
    def restore_unmasked():
        # A gradient of zero is not enough: weight decay and momentum move the weights too.
        for name, parameter in job.model.named_parameters():
            parameter.copy_(torch.where(masks[name], parameter, originals[name]))

    return train(job, random_label_loss(job), PARTS, after_step=restore_unmasked)


def saliency_mask(job):
    """The fraction ``mask_ratio`` of all weights with the largest |∇ cross-entropy of D_f|.

    Returns booleans by parameter name.
    """
    gradients = forget_gradients(job)
    magnitudes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    num_salient = round(job.options["mask_ratio"] * len(magnitudes))
    salient = torch.zeros(len(magnitudes), dtype=torch.bool, device=job.device)
    salient[magnitudes.topk(num_salient).indices] = True
    flat_masks = salient.split([gradient.numel() for gradient in gradients.values()])
    return {
        name: mask.view_as(gradients[name])
        for name, mask in zip(gradients, flat_masks, strict=True)
    }


def forget_gradients(job):
    """Gradients of the summed cross-entropy of the forget images, by parameter name."""
    total = {name: torch.zeros_like(parameter) for name, parameter in job.model.named_parameters()}
    for _, inputs, labels in forget_chunks(job):
        loss = F.cross_entropy(job.model(inputs), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(job.model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient
    distributed.add_up(total.values())
    return total


def forget_chunks(job):
    """(indices, inputs, labels) of the forget images in eval mode, as many as in a training step.

    The indices are those of all processes, inputs and labels the rows of this one.
    """
    job.model.eval()
    chunks = job.split.forget.split(job.recipe.batch_size * distributed.world_size())
    for indices, inputs in zip(chunks, job.data.train.batches(chunks), strict=True):
        yield indices, inputs, job.data.train.labels[distributed.local_rows(indices)]


def read_mask(path, model):
    """A saved mask, booleans by parameter name.

    Raises UserError for a file that is not a mask, or is the mask of another network.
    """
    masks, _ = checkpoint.read(path, f"salun saves its mask with its model, as {MASK_FILE}")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = checkpoint.match_names(masks, shapes, path)
    mismatches = [
        name
        for name in shapes.keys() | masks.keys()
        if name not in shapes or name not in masks or masks[name].shape != shapes[name]
    ]
    if mismatches:
        raise UserError(
            f"--mask_path {path}: not a mask of this network: "
            f"{min(mismatches)} differs or is missing"
        )
    if not all(((mask == 0) | (mask == 1)).all() for mask in masks.values()):
        raise UserError(f"--mask_path {path}: not a mask: it has values other than 0 and 1")
    return {name: masks[name].bool() for name in shapes}


@method(
    num_epochs=5,
    learning_rate=0.01,
    ascent=25.0,
    ascent_every=5,
    ascent_limit=4.0,
    adaptivity=0.5,
    saliency_threshold=1.0,
    max_norm=7.0,
    num_steps=None,
    authors={"batch_size": 128, "num_steps": 1500, "ascent_limit": 0.0},
)
def sfron(job):
    """SFRon: alternate between weighted ascent on the forget images, restricted to salient weights,
    and repair on the retain images (Huang et al. 2024, 2409.19732).

    A weight is salient if its empirical Fisher information, image by image, is at least
    ``saliency_threshold`` times as large on the forget as on the retain images. BatchNorm is in
    train mode in both kinds of steps, as in the authors' code. Defaults: the authors' for 10 % of
    CIFAR-10, but five epochs in batches of 64 instead of 1,500 steps of 128 images, which are 4.3
    epochs of CIFAR-10 and 140 of digits, and with an ``ascent_limit``. Without one, forgetting a
    class of 2,500 CIFAR-10 images leaves a retain accuracy of 76 %, and with the default 90 %.
    """
    forget, retain = (
        fisher.diagonal_fisher(job.model, job.data.train, indices, fisher.observed_score)
        for indices in (job.split.forget, job.split.retain)
    )
    threshold = job.options["saliency_threshold"]
    salient = {name: forget[name] >= threshold * retain[name] for name in forget}
    turns = SFRonTurns(job, salient)
    return train(
        job, turns.loss, schedule=turns.schedule, before_step=turns.restrict_ascent_gradient
    )


class SFRonTurns:
    """The ascent and repair steps of SFRon.

    ``salient`` are booleans by parameter name. The strength of the ascent follows a cosine from
    the option ``ascent`` to zero over the repair steps of all epochs.
    """

    def __init__(self, job, salient):
        self.job, self.salient = job, salient
        self.repairs_per_epoch = len(index_batches(job, ("retain",), 1))
        self.num_repairs = job.recipe.num_epochs * self.repairs_per_epoch
        if job.options["num_steps"]:
            self.num_repairs = job.options["num_steps"]
        self.repairs_done = 0

    def schedule(self, epoch):
        """The steps of an epoch: an ascent step before every ``ascent_every``-th repair step."""
        self.repairs_done = (epoch - 1) * self.repairs_per_epoch
        ascents, steps = endless_batches(self.job, "forget", epoch), []
        repairs = index_batches(self.job, ("retain",), epoch)
        for number, repair in enumerate(repairs[: self.num_repairs - self.repairs_done]):
            if number % self.job.options["ascent_every"] == 0:
                steps.append((next(ascents), 0))
            steps.append(repair)
        return steps

    def loss(self, batch):
        """Cross-entropy on retain images; −strength · adaptive cross-entropy on forget images."""
        if batch.num_retain:
            self.repairs_done += 1
            return F.cross_entropy(*batch.retain)
        cosine = math.cos(math.pi * self.repairs_done / self.num_repairs)
        strength = self.job.options["ascent"] * (1 + cosine) / 2
        losses = ascent_losses(self.job, *batch.forget)
        return -strength * adaptive_mean(losses, self.job.options["adaptivity"])

    def restrict_ascent_gradient(self, batch):
        """In an ascent step, set the gradients of other weights to zero and clip their norm."""
        if not batch.num_retain:
            for name, parameter in self.job.model.named_parameters():
                parameter.grad *= self.salient[name]
            nn.utils.clip_grad_norm_(self.job.model.parameters(), self.job.options["max_norm"])


def adaptive_mean(losses, adaptivity):
    """Mean over images of w·ℓ with w ∝ ℓ^−λ of mean 1 (Huang et al. 2024).

    Images with a large loss ℓ, which are already forgotten, have a small weight w. The weights
    have no gradient. M losses, λ = ``adaptivity`` → a scalar.
    """
    log_losses = losses.detach().clamp(min=torch.finfo(losses.dtype).eps).log()
    # softmax(−λ·log ℓ) is ℓ^−λ normalized to a sum of 1. The power itself overflows for a large λ.
    weights = (-adaptivity * log_losses).softmax(dim=0)
    return (weights * losses).sum()


@method(
    num_epochs=20,
    learning_rate=0.02,
    l1_weight=5e-4,
    authors={"num_epochs": 10, "learning_rate": 0.01, "batch_size": 256, "schedule": "constant"},
)
def l1_sparse(job):
    """Fine-tuning on the retain set with an L1 penalty on all weights, which prunes what they do
    not need (Jia et al. 2023, 2304.04934).

    The weight of the penalty falls linearly over the epochs, from ``l1_weight`` to zero after the
    last. Defaults: the authors' weight, with twice their epochs and rate, batches of 64 and a
    cosine. With their rate, 20 epochs leave 4 to 25 % of a digits class, and with twice the rate
    nothing. The loss that is shown leaves out the penalty.
    """
    weight = 0.0

    def schedule(epoch):
        nonlocal weight
        weight = job.options["l1_weight"] * (1 - (epoch - 1) / job.recipe.num_epochs)
        return index_batches(job, ("retain",), epoch)

    @torch.no_grad()
    def add_penalty(batch):
        for parameter in job.model.parameters():
            parameter.grad += weight * parameter.sign()

    return train(job, retain_cross_entropy, schedule=schedule, before_step=add_penalty)


@method(num_epochs=50, learning_rate=6e-5, schedule="constant", stop_accuracy=None, pass_steps=8)
def delete(job):
    """DELETE: distill the original model on the forget images, with the logit of the image's own
    label masked (Zhou et al. 2025, 2503.23751).

    The target is the original model's softmax over the other classes. Needs no retain images, so
    BatchNorm keeps the original's running statistics. The training ends as :func:`forgotten` says.
    Defaults: found on digits, where forgetting a class costs the others 0.4 to 2.4 points.
    """
    original = frozen(job, copy.deepcopy(job.model))

    def loss(batch):
        logits, labels = batch.forget
        masked = batch.outputs_of(original, "forget").scatter(1, labels[:, None], -math.inf)
        targets = masked.softmax(dim=1)
        return F.kl_div(logits.log_softmax(dim=1), targets, reduction="batchmean")

    steps = partial(forget_batches, job)
    return train(job, loss, schedule=steps, eval_mode=True, finished=forgotten(job))


BOUNDARY_AUTHORS = {
    "num_epochs": 10,
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
    "stop_accuracy": 0.0,
    "pass_steps": 0,
}


@method(
    num_epochs=50,
    learning_rate=3e-5,
    schedule="constant",
    stop_accuracy=None,
    pass_steps=8,
    step_size=0.1,
    authors=BOUNDARY_AUTHORS,
)
def boundary_shrink(job):
    """Boundary shrink: train the forget images with the label of the nearest wrong class (Chen et
    al. 2023, 2303.11570).

    The nearest class is the likeliest wrong one after one step of FGSM from the image, of
    ``step_size`` in units of the pixels' range, under the original model. Needs no retain images,
    so BatchNorm keeps the original's running statistics. The training ends as :func:`forgotten`
    says. Defaults: the authors' step size; the rate was found on digits. The authors train for ten
    epochs at 1e-5.
    """
    targets = job.data.train.labels.clone()
    targets[job.split.forget] = nearest_wrong_classes(job)

    def loss(batch):
        return F.cross_entropy(batch.logits, targets[batch.indices])

    steps = partial(forget_batches, job)
    return train(job, loss, schedule=steps, eval_mode=True, finished=forgotten(job))


def nearest_wrong_classes(job):
    """The class of each forget image (int64, N) that :func:`boundary_shrink` trains it with."""
    step_size, spec, nearest = job.options["step_size"], job.data.train.spec, []
    for indices, inputs, labels in forget_chunks(job):
        moved = adversarial.fgsm(job.model, inputs, labels, step_size, spec)
        wrong = inputs.new_zeros(0, len(job.data.classes))  # more processes than images
        if len(moved):
            with torch.no_grad():
                wrong = job.model(moved).scatter(1, labels[:, None], -math.inf)
        nearest.append(distributed.gather_rows(wrong, len(indices)).argmax(dim=1))
    return torch.cat(nearest)


@method(
    num_epochs=50,
    learning_rate=2e-4,
    schedule="constant",
    stop_accuracy=None,
    pass_steps=8,
    authors=BOUNDARY_AUTHORS,
)
def boundary_expand(job):
    """Boundary expanding: train the forget images with the label of an additional class, which is
    removed in the end (Chen et al. 2023, 2303.11570).

    Needs no retain images, so BatchNorm keeps the original's running statistics. The training ends
    as :func:`forgotten` says, by the original classes alone. The last epoch can go too far, so
    :func:`step_back` follows. Defaults: the rate was found on digits, where forgetting a class
    costs the others 1 (64 channels) to 8 points (16 channels). With lower rates the loss vanishes
    while a third of the class is remembered.
    """
    num_classes = len(job.data.classes)
    target, start = stop_accuracy(job), copies(job.model)
    classifier.widen(job.model, num_classes, utils.generator(job.seed, job.name, "new class"))

    def loss(batch):
        return F.cross_entropy(batch.logits, torch.full_like(batch.labels, num_classes))

    def finished(record):
        return monitored_forget_accuracy(job, record, num_classes) <= target

    steps = partial(forget_batches, job)
    widened = train(job, loss, schedule=steps, eval_mode=True, finished=finished)
    classifier.narrow(widened, num_classes)
    return step_back(job, start, target)


def step_back(job, start, target):
    """Move from the weights at the end of a training towards those at its start ({name: tensor}).

    The result is the shortest step from ``start``, in 64ths of the way, at which the accuracy on
    (at most 2,000) forget images is at most ``target``. If that accuracy is not reached at the end,
    or the target is 0, the weights stay those of the end. Returns the model.
    """
    end = copies(job.model)

    def move(share):
        with torch.no_grad():
            for name, weight in job.model.named_parameters():
                weight.copy_(torch.lerp(start[name], end[name], share))

    def reached(share):
        move(share)
        return accuracies(job, MONITORED, ["forget"])["forget"] <= target

    if target > 0 and reached(1.0):
        move(shortest(reached, 0.0, 1.0))
    return job.model


def copies(model):
    """Copies of the parameters of a model, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def shortest(reached, low, high):
    """Where between ``low`` and ``high`` ``reached(value)`` becomes true, by six bisections."""
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@method(
    num_epochs=10,
    learning_rate=0.01,
    smoothing=1.0,
    retain_share=1.0,
    authors={
        "learning_rate": 1e-4,
        "batch_size": 128,
        "optimizer": "adamw",
        "schedule": "constant",
        "retain_share": 0.3,
    },
)
def lotus(job):
    """LoTUS: smooth the original model's answers on the forget images until the model knows them no
    better than unseen images (Spartalis et al. 2025, 2503.18314).

    The targets are the original model's logits with Gumbel noise: for forget images their softmax
    at the temperature exp(``smoothing`` · (forget accuracy − accuracy on unseen images)), computed
    again in every epoch, for retain images the likeliest class. Classes have no unseen images, and
    their bound is 0. The training ends once the forget accuracy is 1 % below the bound. Defaults:
    the smoothing of the authors' code; the rate was found on digits. The authors use AdamW on a
    share of D_r. Made for random forget sets: of a digits class it leaves 88 to 99 %, since the own
    label stays the likeliest in a smoothed answer.
    """
    original, bound = frozen(job, copy.deepcopy(job.model)), 0.0
    if not job.split.forget_classes:
        bound = unseen_accuracy(job, "add held-out images")
    sampled = replace(job, split=replace(job.split, retain=sampled_retain_set(job)))
    temperature = rng = None

    def schedule(epoch):
        nonlocal temperature, rng
        forget = monitored_accuracies(job, epoch, ["forget"])["forget_acc"]
        temperature = math.exp(job.options["smoothing"] * (forget - bound))
        rng = utils.generator(job.seed, job.name, "gumbel", epoch, device=job.device)
        return index_batches(sampled, PARTS, epoch)

    def loss(batch):
        logits = torch.cat([batch.outputs_of(original, part) for part in PARTS])
        noisy = logits - torch.empty_like(logits).exponential_(generator=rng).log()
        hard = F.one_hot(noisy[: batch.num_retain].argmax(dim=1), noisy.shape[1])
        soft = (noisy[batch.num_retain :] / temperature).softmax(dim=1)
        return F.cross_entropy(batch.logits, torch.cat([hard, soft]))

    def finished(record):
        return monitored_forget_accuracy(job, record) <= bound - 0.01

    return train(job, loss, schedule=schedule, finished=finished)


MU_MIS_CHUNKS = 8  # per step: the second derivatives need three times the memory of a plain step


@method(
    num_epochs=50,
    learning_rate=1e-3,
    schedule="constant",
    stop_accuracy=None,
    pass_steps=8,
    sensitivity="norm",
    authors={"sensitivity": "squared", "pass_steps": 0},
)
def mu_mis(job):
    """MU-Mis: reduce how much the logit of the label depends on the pixels of a forget image,
    relative to the logit of another class (Cheng et al. 2024, 2402.15109).

    The loss is the mean of ‖∂ logit_label / ∂ x‖ − ‖∂ logit_other / ∂ x‖, with another wrong class
    for each image in every epoch. The authors square both norms. The gradient of a square grows
    with the norm, so their loss runs away: forgetting a digits class costs the others 5 to 14
    points with squares, and 0 to 4.4 without. Needs no retain images, so BatchNorm keeps the
    original's running statistics. The training ends as :func:`forgotten` says; the authors' rule
    for the end is not known here, nor is their rate. The default rate was found on digits.
    """
    num_classes, others = len(job.data.classes), None

    def schedule(epoch):
        nonlocal others
        labels = job.data.train.labels
        rng = utils.generator(job.seed, job.name, "other classes", epoch)
        shift = torch.randint(1, num_classes, (len(labels),), generator=rng).to(job.device)
        others = (labels + shift) % num_classes
        return forget_batches(job, epoch)

    def loss(batch):
        local = [batch.inputs, *map(distributed.local_rows, (batch.labels, others[batch.indices]))]
        parameters = list(job.model.parameters())
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        differences = []
        for chunk in zip(*(rows.chunk(MU_MIS_CHUNKS) for rows in local), strict=True):
            if len(chunk[0]):  # more processes than images
                differences.append(sensitivity_difference(job, *chunk))
                mean = differences[-1].sum() / len(batch.labels)
                chunk_gradients = torch.autograd.grad(mean, parameters, materialize_grads=True)
                for total, gradient in zip(gradients, chunk_gradients, strict=True):
                    total += gradient
        differences = torch.cat([batch.labels.new_zeros(0).float(), *differences]).detach()
        # A linear function of the weights with the gradients of all chunks, and a value of 0.
        linear = sum((w * g).sum() for w, g in zip(parameters, gradients, strict=True))
        value = distributed.gather_rows(differences, len(batch.labels)).mean()
        # Only a loss that depends on the logits is added up over the processes.
        return value + linear - linear.detach() + 0 * batch.logits.sum()

    return train(job, loss, schedule=schedule, eval_mode=True, finished=forgotten(job))


def sensitivity_difference(job, inputs, labels, others):
    """‖∂ logit_label / ∂ x‖ − ‖∂ logit_other / ∂ x‖ of images M×3×H×W → M, with a gradient.

    With the option ``sensitivity`` = squared, both norms are squared.
    """
    inputs = inputs.detach().requires_grad_()
    with autocast(job):
        logits = job.model(inputs).float()
    norms = [sensitivity_norms(logits, classes, inputs) for classes in (labels, others)]
    if job.options["sensitivity"] == "squared":
        norms = [norm.square() for norm in norms]
    label_norms, other_norms = norms
    return label_norms - other_norms


def sensitivity_norms(logits, classes, inputs):
    """‖∂ logit of a class / ∂ image‖ of every image, with a gradient, which is 0 where the norm is.

    Logits M×K of the images M×3×H×W, classes M → M.
    """
    chosen = logits.gather(1, classes[:, None]).sum()
    (gradients,) = torch.autograd.grad(chosen, inputs, create_graph=True)
    return torch.linalg.vector_norm(gradients.float().flatten(1), dim=1)


@method(
    num_epochs=10,
    learning_rate=0.01,
    radius=0.04,
    forget_images=None,
    authors={"batch_size": 128, "schedule": "constant", "forget_images": "keep"},
)
def amun(job):
    """AMUN: train the retain images, and the nearest adversarial example of every forget image with
    the wrong label that the original model gives it (Ebrahimpour-Boroojeny et al. 2025,
    2503.00917).

    The adversarial examples are not augmented (:func:`models.adversarial.nearest`). The authors'
    code also trains with the true labels of the forget images (``forget_images`` = keep). This
    cannot forget a class (55 % of a digits class stay), so they are left out where classes are
    forgotten. The rate and the epochs are the authors'. On random digits they forget more than
    Retrain. In cpu_amun the conformal loss is that of the adversarial examples under the true
    labels.
    """
    examples = adversarial_examples(job)
    forget, targets = job.split.forget, job.data.train.labels.clone()
    targets[forget] = examples.labels
    position = torch.zeros_like(targets)
    position[forget] = torch.arange(len(forget), device=job.device)

    def replace_inputs(indices, num_retain, inputs):
        num_local_retain = len(distributed.local_rows(indices[:num_retain]))
        forget_indices = distributed.local_rows(indices)[num_local_retain:]
        return torch.cat([inputs[:num_local_retain], examples.inputs[position[forget_indices]]])

    def loss(batch):
        _, retain_labels = batch.retain
        example_labels = targets[batch.indices[batch.num_retain :]]
        return F.cross_entropy(batch.logits, torch.cat([retain_labels, example_labels]))

    split, forget_images = job.split, job.options["forget_images"]
    if forget_images == "keep" or (forget_images is None and not split.forget_classes):
        split = replace(split, retain=torch.cat([split.retain, split.forget]))
    schedule = partial(index_batches, replace(job, split=split), PARTS)
    return train(job, loss, schedule=schedule, replace_inputs=replace_inputs)


def adversarial_examples(job):
    """The :class:`models.adversarial.Examples` of the forget images, in their order."""
    radius, spec, parts = job.options["radius"], job.data.train.spec, []
    for indices, inputs, labels in forget_chunks(job):
        examples = adversarial.nearest(job.model, inputs, labels, spec, radius=radius)
        parts.append([distributed.gather_rows(rows, len(indices)) for rows in examples])
    return adversarial.Examples(*map(torch.cat, zip(*parts, strict=True)))


FISHER_IMAGES = 2048  # retain images of the Fisher information of IU
AUGMENTATIONS = 10  # of every forget image, for the gradient of IU


@method(trained=False, damping=0.1, step_scale=None, stop_accuracy=None)
def IU(job):
    """Influence unlearning: one step along F⁻¹ v, where v is the mean gradient of the forget images
    and F the empirical Fisher information of the retain images (Izzo et al. 2021, 2002.10077; Koh
    and Liang 2017, 1703.04730).

    F replaces the Hessian, as in WoodFisher (Singh and Alistarh 2020, 2004.14340). It is the mean
    of g gᵀ over the gradients g of (at most 2,048) images, plus ``damping``·I. WoodFisher's inverse
    needs all gradients in memory, so F⁻¹ v comes from conjugate gradients
    (:func:`models.fisher.inverse_product`). The images are augmented as in training, the forget
    images in ten ways each. Without augmentation, 1 to 3 of the 73 images of a digits class had
    half of the gradient, as the model fits the others. In theory the step has the length
    |D_f| / |D_r|, which forgets next to nothing. The default length is that of
    :func:`move_until_forgotten`. The default damping was found on digits, where forgetting a class
    costs the others 0 to 3 points, depending on the seed.
    """
    retain = job.split.retain
    sample = utils.permutation(job.seed, "IU", len(retain))[:FISHER_IMAGES]
    sample = retain[torch.from_numpy(sample).to(retain.device)]
    images, forget = job.data.train, job.split.forget.repeat(AUGMENTATIONS)
    augmentation = partial(utils.generator, job.seed, job.name, "augmentation", device=job.device)
    gradient = fisher.mean_gradient(job.model, images, forget, augmentation())
    settings = {"damping": job.options["damping"], "augmentation": augmentation}
    direction = fisher.inverse_product(job.model, images, sample, gradient, **settings)
    return move_until_forgotten(job, direction)


NEG_MERGE_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of the learning rate


@method(
    num_epochs=5,
    learning_rate=3e-3,
    step_scale=None,
    stop_accuracy=None,
    extensible=False,
)
def neg_merge(job):
    """NegMerge: subtract what several fine-tunings on the forget images agree on (Kim et al. 2025,
    2410.05583).

    Five fine-tunings have 1/4 to 4 times the learning rate, and an order and augmentations of their
    own. Of their changes of a weight the mean is subtracted if all have one sign, else nothing. The
    authors merge fine-tunings that differ in the kind of augmentation, too, and choose the largest
    multiple that keeps 95 % of the retain accuracy. The default multiple is that of
    :func:`move_until_forgotten`. BatchNorm keeps the original's running statistics. Default: the
    rate was found on digits, where forgetting a class costs the others 1 to 3 points.
    """
    original = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}
    merged = {name: torch.zeros_like(weight) for name, weight in original.items()}
    signs = {name: torch.zeros_like(weight) for name, weight in original.items()}

    def loss(batch):
        return F.cross_entropy(*batch.forget)

    for number, factor in enumerate(NEG_MERGE_RATES):
        one_run = job_of_part(job, number, factor * job.recipe.learning_rate)
        one_run.model.load_state_dict(original, strict=False)
        tuned = train(one_run, loss, ("forget",), eval_mode=True)
        for name, weight in tuned.named_parameters():
            change = weight.detach() - original[name]
            merged[name] += change / len(NEG_MERGE_RATES)
            signs[name] += change.sign()
    agreed = {name: sign.abs() == len(NEG_MERGE_RATES) for name, sign in signs.items()}
    job.model.load_state_dict(original, strict=False)
    return move_until_forgotten(job, {name: -merged[name] * agreed[name] for name in merged})


def job_of_part(job, number, learning_rate):
    """The job of one of several trainings of a method, from 0.

    It draws random numbers of its own. Its records count on.
    """

    def epoch_done(record):
        epoch = record["epoch"] + number * job.recipe.num_epochs
        job.epoch_done(record | {"epoch": epoch})

    settings = {
        "name": f"{job.name} {number + 1}",
        "label": f"{job.label} {number + 1}/{len(NEG_MERGE_RATES)}",
        "recipe": replace(job.recipe, learning_rate=learning_rate),
    }
    return replace(job, **settings, epoch_done=epoch_done, progress=None)


def move_until_forgotten(job, direction):
    """Add a multiple of ``direction`` ({parameter: tensor}) to the weights. Returns the model.

    The multiple is the option ``step_scale``. By default it is the smallest at which (at most
    2,000) forget images have the accuracy at which :func:`forgotten` ends a training. The step
    begins at a thousandth of the norm of the weights, doubles until the accuracy is reached, and
    six bisections follow. It is at most as long as the weights.
    """
    size = norm(direction)
    if not size:
        print(f"{job.label}: the step is zero, so the model is unchanged")
        return job.model
    unit = {name: tensor / size for name, tensor in direction.items()}
    original = copies(job.model)

    def move(length):
        with torch.no_grad():
            for name, weight in job.model.named_parameters():
                weight.copy_(original[name] + length * unit[name])

    if job.options["step_scale"] is not None:
        move(job.options["step_scale"] * size)
        return job.model
    target = stop_accuracy(job)

    def reached(length):
        move(length)
        return accuracies(job, MONITORED, ["forget"])["forget"] <= target

    longest = norm(original)
    low, high = 0.0, longest / 1000
    while not reached(high):
        if high == longest:
            print(
                f"{job.label}: more than {100 * target:g} % of the forget images are still "
                "remembered after a step as long as the weights; pass --step_scale"
            )
            return job.model
        low, high = high, min(2 * high, longest)
    move(shortest(reached, low, high))
    return job.model


def norm(tensors):
    """The Euclidean norm of {name: tensor} as one vector."""
    squares = [tensor.double().square().sum() for tensor in tensors.values()]
    return torch.stack(squares).sum().sqrt().item()


# ---------------------------------------------------------------- flags and recipes


def describe_methods(methods):
    """The methods (:class:`Method` by label) with their defaults, for ``--help``."""
    lines = ["methods and their defaults:"]
    lines += [f"  {label:<16} {describe_defaults(entry)}" for label, entry in methods.items()]
    lines += ["", "values of --recipe authors, where they differ:"]
    for label, entry in methods.items():
        if entry.authors:
            lines.append(f"  {label:<16} {describe_settings(entry.authors)}")
    return "\n".join(lines)


def describe_defaults(entry):
    """The defaults of a :class:`Method` in one line."""
    settings = ["no training"]
    if entry.trained:
        original = "as for the original model"
        training = {"num_epochs": original, "learning_rate": original} | entry.training
        settings = [describe_settings(training)]
    options = {name: value for name, value in entry.options.items() if value is not None}
    settings += [describe_settings(options)] if options else []
    for kind, values in (("transformers", entry.transformer), ("digits", entry.digits)):
        settings += [f"({kind}: {describe_settings(values)})"] if values else []
    return ", ".join(settings)


def describe_settings(settings):
    """Hyper-parameters in one line, e.g. ``epochs: 10, learning rate: 0.01``."""
    headings = {"num_epochs": "epochs", "learning_rate": "learning rate"}
    return ", ".join(f"{headings.get(name, name)}: {value}" for name, value in settings.items())


def add_option_flags(parser, methods):
    """Add the flags of ``OPTIONS`` that the methods (:class:`Method` by label) have."""
    recipe = "hyper-parameters: the defaults or the authors' values, both listed below"
    parser.add_argument("--recipe", choices=["default", "authors"], default="default", help=recipe)
    group = parser.add_argument_group("options of single methods", "defaults: listed below")
    for option, (kind, text) in OPTIONS.items():
        owners = [label for label, entry in methods.items() if option in entry.options]
        if owners and kind is bool:
            text = f"{', '.join(owners)}: {text}"
            group.add_argument(f"--{option}", action="store_const", const=True, help=text)
        elif owners:
            group.add_argument(f"--{option}", type=kind, help=f"{', '.join(owners)}: {text}")


def check_flags(args, methods):
    """Raise UserError for a flag that cannot apply to the chosen methods (Method by label)."""
    labels = ", ".join(methods)
    if len(methods) > 1 and args.learning_rate:
        raise UserError(
            "--learning_rate with several methods: no single rate suits all of them; "
            "omit it or choose one method"
        )
    if args.num_epochs and getattr(args, "num_steps", None):
        raise UserError("--num_epochs and --num_steps: both set the length of the run; omit one")
    if not any(entry.trained for entry in methods.values()):
        for flag in TRAINING_FLAGS:
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} does not apply to {labels} (no training); omit it")
    for option in OPTIONS:
        applies = any(option in entry.options for entry in methods.values())
        if getattr(args, option, None) is not None and not applies:
            owners = ", ".join(name for name, entry in METHODS.items() if option in entry.options)
            raise UserError(f"--{option} applies to {owners} and not to {labels}; omit it")


def method_options(entry, args):
    """The options of a method: the flags that were passed, else its defaults."""
    options = {name: default_settings(entry, args)[name] for name in entry.options}
    if args.num_epochs and "num_steps" in options:
        options["num_steps"] = None
    flags = {name: getattr(args, name, None) for name in options}
    return options | {name: value for name, value in flags.items() if value is not None}


def default_settings(entry, args):
    """The default hyper-parameters of a method for the network, the data and ``--recipe``."""
    settings = entry.training | entry.options
    network = models.describe(args.model_name)
    if args.data_name == "digits" and network.trained_from_scratch:
        settings |= entry.digits
    if args.recipe == "authors":
        settings |= entry.authors
    return settings


def original_recipe(args, device):
    """The recipe of the original model: flags, else the defaults of the data set.

    A network that starts from ImageNet weights trains for at most 20 epochs at 0.01.
    """
    spec = utils.SPECS[args.data_name]
    if models.describe(args.model_name).trained_from_scratch:
        num_epochs, learning_rate = spec.num_epochs, spec.learning_rate
    else:
        num_epochs, learning_rate = min(spec.num_epochs, 20), 0.01
    return Recipe(
        num_epochs=args.num_epochs or num_epochs,
        learning_rate=args.learning_rate or learning_rate,
        batch_size=args.batch_size or Recipe.batch_size,
        milestones=args.milestones,
        precision=utils.pick_precision(args, device),
    )


def method_recipe(entry, args, original_meta, device):
    """The recipe of a method: flags, else its defaults, else the recipe of the original model.

    None for a method without training. An original model without a recorded recipe counts as
    trained with the recipe of the flags.
    """
    if not entry.trained:
        return None
    original = original_meta.get("recipe") or asdict(original_recipe(args, device))
    defaults = default_settings(entry, args)
    inherited = ["learning_rate"]
    if "num_epochs" not in defaults:
        inherited += ["num_epochs", "batch_size", "milestones"]
    settings = {name: original[name] for name in inherited}
    settings |= {name: value for name, value in defaults.items() if name in RECIPE_FIELDS}
    for name in TRAINING_FLAGS:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return Recipe(**settings, precision=utils.pick_precision(args, device))


def fit_epochs(recipe, options, num_retain):
    """The recipe with as many epochs as the option ``num_steps`` needs, if a method has it.

    ``num_retain`` is the number of retain images, which every epoch visits once.
    """
    if not options.get("num_steps"):
        return recipe
    steps_per_epoch = math.ceil(num_retain / recipe.batch_size)
    return replace(recipe, num_epochs=math.ceil(options["num_steps"] / steps_per_epoch))


# ---------------------------------------------------------------- running and saving


@dataclass(frozen=True)
class RunFiles:
    """The files of a run: ``model_file`` and ``record_file`` in ``folder``.

    ``record_has_history`` adds the records of all epochs to the record.
    """

    folder: Path
    model_file: str = MODEL_FILE
    record_file: str = RECORD_FILE
    record_has_history: bool = False

    @property
    def model_path(self):
        return self.folder / self.model_file


def already_done(path, identity, args):
    """The meta of an earlier run with the same ``identity`` that saved its model at ``path``.

    ``identity`` is everything that determines the weights. Returns None if there is no file, or if
    --overwrite is set. Raises UserError if the file cannot be read or comes from other settings.
    With --precision auto the precision may differ, since it depends on the device.
    """
    if args.overwrite or not path.exists():
        return None
    try:
        meta = checkpoint.read(path)[1]
    except UserError as error:
        raise UserError(f"{error}; pass --overwrite to replace it") from error
    saved = meta.get("identity", {})
    different = [key for key in identity | saved if saved.get(key) != identity.get(key)]
    if args.precision == "auto" and "precision" in different:
        different.remove("precision")
    if not different:
        return meta
    differences = ", ".join(
        f"{key}: {saved.get(key)} on disk, {identity.get(key)} requested" for key in different
    )
    raise UserError(
        f"{path} already exists with different settings ({differences}); "
        "pass --overwrite to replace it"
    )


def run_and_save(job, run, files, *, meta, args):
    """Run a job and save its model and records, or return the meta of an equal earlier run.

    ``run(job)`` returns the trained model. ``meta`` is saved with it, and must hold the
    "identity" (see :func:`already_done`). Returns it with "seconds", the wall time, and the final
    "accuracies" added. All files are written to an unfinished folder and moved up at the end, the
    model last. So a failed run saves nothing, and an interrupted one is either complete or can be
    resumed. Raises UserError, e.g. :class:`Diverged`.
    """
    with utils.unfinished_folder(files.folder, checkpoint.size(job.model)) as unfinished:
        # Another run may have finished here since the flags were checked.
        if earlier := already_done(files.model_path, meta["identity"], args):
            return earlier
        progress = Progress(
            unfinished / utils.RESUME_FILE,
            meta["identity"],
            resume=args.resume,
            save_every=args.save_every,
        )
        if progress.restored:
            print(f"{job.label}: resuming after epoch {progress.restored['epoch']}")
        history = utils.History(unfinished / "history.jsonl")
        with utils.WandbRun(files.folder, job.label, meta, args) as wandb_run:

            def epoch_done(record):
                history.add(record)
                wandb_run.log(record)

            job = replace(job, progress=progress, epoch_done=epoch_done)
            memory = PeakMemory(job.device)
            model = run_resumably(run, job)
            if model is None:
                raise TypeError(f"{job.label} returned no model; end it with return train(…)")
            job = replace(job, model=model)
            meta = meta | {"seconds": progress.seconds, "peak_memory": memory.megabytes()}
            meta["accuracies"] = final_accuracies(job)
            if job.term is not None:
                meta["q_hats"] = job.term.q_hats
            save_files(job, files, unfinished, meta=meta, records=history.records)
            row = {"method": job.label, "seconds": meta["seconds"]} | meta["accuracies"]
            wandb_run.log_table("run", [row])
    return meta


class PeakMemory:
    """The largest memory in use from now on: of the GPU, or of this process on Linux.

    Of an interrupted run it is the peak after the interruption.
    """

    def __init__(self, device):
        self.device, self.known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            self.known = False

    def megabytes(self):
        """Whole MB (10⁶ bytes), or None where the system does not tell."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e6)
        if not self.known:
            return None
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)


def save_files(job, files, unfinished, *, meta, records):
    """Save the by-products, the record and the model, and move them up, the model last."""
    for file_name, state in job.by_products.items():
        checkpoint.save(unfinished / file_name, state, meta)
    history = {"history": records} if files.record_has_history else {}
    utils.save_json(unfinished / files.record_file, meta | history)
    checkpoint.save(unfinished / files.model_file, job.model.state_dict(), meta)
    utils.move_up(unfinished, last=files.model_file)


def run_resumably(run, job):
    """``run(job)``. Saves the state of the last epoch for --resume if the run is interrupted."""
    try:
        return run(job)
    except Diverged:
        raise
    except KeyboardInterrupt:
        if job.progress.save():
            raise utils.Interrupted(
                f"the state of {job.label} is saved; pass --resume to continue"
            ) from None
        raise
    except BrokenPipeError:  # e.g. main_unlearn.py | head
        if job.progress.save():
            raise utils.Interrupted(
                f"the output pipe was closed; the state of {job.label} is saved; "
                "pass --resume to continue"
            ) from None
        raise
    except Exception:  # e.g. a full disk, an unreadable image, a failed rank
        with suppress(UserError):
            job.progress.save()
        raise


def final_accuracies(job):
    """:func:`accuracies` on all images.

    Raises :class:`Diverged` if a weight or a logit is not finite. This also happens to methods
    without training.
    """
    measured = None
    with suppress(NotFinite):
        measured = accuracies(job)
    if measured is None or not weights_are_finite(job.model):
        options = ["learning_rate"] if job.recipe else job.options
        flags = " or ".join(f"--{option}" for option in options)
        raise Diverged(
            f"{job.label} diverged: some of its weights or outputs are NaN or infinite; "
            f"lower {flags} (earlier results are unchanged)"
        )
    return measured
