"""The training loop: a job, its epochs, their batches and steps, its records and resuming.

for epoch in job.epochs():
    for batch in epoch.batches("retain", "forget"):
        epoch.step(F.cross_entropy(batch.logits, batch.labels), batch)
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint, distributed, inference, seeds
from .errors import NotFinite, UserError

MONITORED = 2000  # the accuracies after every epoch use at most this many images of each part
PARTS = ("retain", "forget")


class Diverged(UserError):
    """The loss, the weights or the outputs of a run are NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training loop.

    The learning rate is divided by 10 after the epochs in ``milestones``, else it follows
    ``schedule``: cosine (to zero) or constant. ``optimizer`` is sgd, adam or adamw, the last two
    without ``momentum``. ``precision`` is that of the forward and backward pass: fp32, tf32 or bf16
    (autocast). Weights and losses are always float32.
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


@dataclass(kw_only=True)
class Job:
    """One run: the model, its training data and its recipe (None for a method without training).

    ``name``, the base method, seeds the run, so a CPU variant draws the numbers of its base method.
    ``label`` is the name in the files. ``new_model()`` builds the network before any training on
    this data. ``term`` is a conformal loss (:class:`unlearn_cpu.ConformalTerm`). ``log`` gets the
    record of every epoch. A ``quiet`` run measures and prints no accuracies. ``stop_at`` is the
    forget accuracy at which training ends. ``by_products`` are additional state_dicts by file name.
    """

    name: str
    label: str
    model: nn.Module
    data: object
    split: object
    recipe: Recipe | None
    seed: int
    new_model: Callable[[], nn.Module] | None = None
    term: object = None
    log: Callable[[dict], None] = lambda record: None
    quiet: bool = False
    compile: bool = False
    progress: "Progress | None" = None
    stop_at: float | None = None
    by_products: dict[str, dict] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    weights_after: list[dict] = field(default_factory=list)

    @property
    def device(self):
        return self.data.train.labels.device

    @property
    def num_classes(self):
        return len(self.data.classes)

    @property
    def adds_term(self):
        """Whether the conformal loss contributes to the loss of every step."""
        return self.term is not None and self.term.lamda > 0

    def epochs(self, stop_at=None, *, eval_mode=False, keep_weights=False):
        """Yield an :class:`Epoch` for each epoch of the recipe, and complete it afterwards.

        Training ends early once the accuracy on (at most 2,000) forget images falls to ``stop_at``
        or to the job's, or the method sets ``is_last``. In ``eval_mode`` BatchNorm uses and keeps
        its running statistics. ``keep_weights`` copies the weights after every epoch to
        ``weights_after``. Raises :class:`Diverged` if the loss, a weight or a logit is not finite.
        """
        state = TrainingState(self)
        if self.progress and self.progress.restored:
            state.load_state_dict(self.progress.restored)
            for record in self.records:
                self.log(record)
        network = self._training_network()  # shares its weights with self.model
        with distributed.progress_bar(total=0, unit="img", unit_scale=True) as bar:
            for number in range(len(self.records) + 1, self.recipe.num_epochs + 1):
                if state.ended:  # before an interruption
                    break
                epoch = Epoch(self, number, state=state, network=network, bar=bar)
                epoch.eval_mode = eval_mode
                self.model.train(not eval_mode)
                yield epoch
                record = epoch.finish()
                self.records.append(record)
                self.log(record)
                state.ended = epoch.is_last
                targets = [target for target in (stop_at, self.stop_at) if target is not None]
                if targets:
                    measured = record if "forget_acc" in record else self.monitor(["forget"])
                    state.ended |= measured["forget_acc"] <= max(targets)  # the first one reached
                # On the CPU, so that an epoch costs no GPU memory.
                if keep_weights:
                    weights = self.model.state_dict()
                    self.weights_after.append({k: weights[k].to("cpu", copy=True) for k in weights})
                if self.progress:
                    self.progress.update(state)

    def autocast(self):
        """bfloat16 autocast if the recipe asks for it."""
        enabled = self.recipe is not None and self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def accuracies(self, parts=(*PARTS, "test"), limit=None):
        """Accuracies {part: fraction} without augmentation on retain, forget and test images.

        ``limit`` is the size of a fixed random sample of each part. Parts without images are left
        out, and so are logits of a class that a method adds. Raises NotFinite for NaN logits.
        """
        measured = {}
        for part in parts:
            images = self.data.held_out if part == "test" else self.data.train
            indices = getattr(self.split, part)
            if limit is not None and len(indices) > limit:  # the same sample after every epoch
                sample = seeds.permutation(self.seed, "monitored", len(indices))[:limit]
                indices = indices[torch.from_numpy(sample).to(indices.device)]
            if len(indices):
                logits, labels = inference.compute_logits(self.model, images, indices)
                predictions = logits[:, : self.num_classes].argmax(dim=1)
                measured[part] = (predictions == labels).double().mean().item()
        return measured

    def monitor(self, parts=(*PARTS, "test")):
        """:meth:`accuracies` of samples in the precision of training, as {"retain_acc": …}.

        Raises :class:`Diverged` if a logit is not finite.
        """
        try:
            with self.autocast():
                measured = self.accuracies(parts, MONITORED)
        except NotFinite as error:
            epoch = f" in epoch {len(self.records) + 1}" if self.recipe else ""
            raise Diverged(f"{self.label}{epoch}: {error}") from error
        return {f"{part}_acc": value for part, value in measured.items()}

    def _training_network(self):
        """The network that a step calls: under torchrun DistributedDataParallel, compiled if asked.

        CUDA graphs are compiled for each batch size that occurs. Those of earlier trainings are
        released: they hold memory, and torch compiles at most eight sizes.
        """
        network = distributed.data_parallel(self.model)
        if self.compile:
            torch.compiler.reset()
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            network = torch.compile(network, dynamic=False, mode=mode)
        return network


class Epoch:
    """One epoch: its number (from 1), its batches, its steps, and its record.

    All random numbers are drawn from the seed and the epoch, so a resumed run repeats it.
    """

    eval_mode = is_last = False

    def __init__(self, job, number, *, state, network, bar):
        self.job, self.number, self._bar = job, number, bar
        self._state, self._network = state, network
        self._start = time.perf_counter()
        self._record = {"epoch": number, "learning_rate": state.scheduler.get_last_lr()[0]}
        if job.term is not None:
            self._record |= job.term.start_epoch(job.model)
        seeds.seed_everything(job.seed, job.name, "dropout", number)
        self._augmentation = self.generator("augmentation")
        self._loss = torch.zeros((), device=job.device)
        self._num_correct = torch.zeros((), device=job.device)
        self._num_images = self._num_steps = 0
        bar.set_description(f"{job.label} {number}/{job.recipe.num_epochs}", refresh=False)
        bar.reset(total=0)

    def generator(self, *purpose):
        """A torch.Generator on the training device for a purpose in this epoch."""
        job = self.job
        return seeds.generator(job.seed, job.name, *purpose, self.number, device=job.device)

    def record_mean(self, name, total, count):
        """Record a mean over ``count`` images, and return it. ``total`` is this process's sum."""
        total = total.double()
        distributed.add_up([total])
        self._record[name] = total.item() / count
        return self._record[name]

    def set_learning_rate(self, learning_rate):
        """The learning rate of the next steps, for a schedule that changes it within an epoch."""
        for group in self._state.optimizer.param_groups:
            group["lr"] = learning_rate

    # ------------------------------------------------------------ batches

    def batches(self, *parts, batch_size=None, retain_set=None):
        """Yield the :class:`Batch` of every step of one pass through ``parts``, in random order.

        See :meth:`steps` and :meth:`visit`.
        """
        yield from self.visit(self.steps(*parts, batch_size=batch_size, retain_set=retain_set))

    def steps(self, *parts, batch_size=None, retain_set=None):
        """The steps of one pass through ``parts``: pairs (indices of training images, num_retain).

        The first ``num_retain`` images are retain images, of ``retain_set`` (default: the split's).
        There are as many steps as batches of ``batch_size`` (default: the recipe's), each with an
        equal share of every part: BatchNorm cannot train on a last batch of one image.
        """
        split = self.job.split
        retain_set = split.retain if retain_set is None else retain_set
        sets = [
            indices if part in parts else indices[:0]
            for part, indices in zip(PARTS, (retain_set, split.forget), strict=True)
        ]
        # Equal shares, not full batches and a rest: 129 images in batches of 64 are 3 × 43.
        num_steps = math.ceil(sum(map(len, sets)) / (batch_size or self.job.recipe.batch_size))
        shares = map(self._shuffled_shares, PARTS, sets, [num_steps] * 2)
        pairs = [pair for pair in zip(*shares, strict=True) if any(map(len, pair))]
        return [(torch.cat(pair), len(pair[0])) for pair in pairs]

    def cycle(self, part):
        """Full batches of indices of a part without end, shuffled for every pass."""
        indices, pass_number = getattr(self.job.split, part), 0
        while True:
            rng = seeds.generator(
                self.job.seed, self.job.name, "order", "ascent", self.number, pass_number
            )
            order = torch.randperm(len(indices), generator=rng).to(self.job.device)
            yield from indices[order].split(self.job.recipe.batch_size)
            pass_number += 1

    def visit(self, steps, *, separate_passes=False):
        """Yield a :class:`Batch` of augmented images for each of ``steps`` (see :meth:`steps`).

        With a conformal term, equal shares of the forget images join the steps that have none. With
        ``separate_passes``, retain and forget images pass through the network one after the other.
        Raises UserError for a step with fewer images than there are processes.
        """
        steps = list(steps)
        if self.job.adds_term:
            steps = self._join_forget(steps)
        self._bar.total += sum(len(indices) for indices, _ in steps)
        all_inputs = self.job.data.train.batches(
            (indices for indices, _ in steps), self._augmentation
        )
        for (indices, num_retain), inputs in zip(steps, all_inputs, strict=True):
            if len(indices) < (count := distributed.world_size()):
                reason = f"a step has {len(indices)} images for torchrun's {count} processes"
                raise UserError(f"{self.job.label}: {reason}; start fewer")
            # Interleaved rows: this process has its share of the retain images first as well.
            num_retain = len(distributed.local_rows(indices[:num_retain]))
            batch = Batch(self, distributed.local_rows(indices), num_retain, inputs)
            batch.separate_passes = separate_passes
            # Once per step: a second forward pass must not overwrite what the first one saved.
            if self.job.compile:
                torch.compiler.cudagraph_mark_step_begin()
            yield batch
            self._bar.update(len(indices))

    def _shuffled_shares(self, part, indices, num_steps):
        """The shuffled images of a part, divided into ``num_steps`` near-equal shares."""
        job = self.job
        rng = seeds.generator(job.seed, job.name, "order", part, self.number)
        order = torch.randperm(len(indices), generator=rng).to(job.device)
        return indices[order].tensor_split(num_steps) if num_steps else ()

    def _join_forget(self, steps):
        """The steps with a share of the forget images added to every step that has none."""
        without = [i for i, (indices, num_retain) in enumerate(steps) if len(indices) == num_retain]
        shares = self._shuffled_shares("forget", self.job.split.forget, len(without))
        for i, share in zip(without, shares, strict=True):
            indices, num_retain = steps[i]
            steps[i] = torch.cat([indices, share]), num_retain
        return steps

    # ------------------------------------------------------------ steps

    def forward(self, inputs):
        """Float32 logits of images, with a gradient. A single image passes in eval mode."""
        self.job.model.train(len(inputs) > 1 and not self.eval_mode)
        with self.job.autocast():
            return self._network(inputs).float()

    def step(self, loss, batch):
        """One step of the optimizer: :meth:`backward`, then :meth:`update`."""
        self.backward(loss, batch)
        self.update()

    def backward(self, loss, batch):
        """Replace the gradients by those of a batch's scalar loss plus λ · conformal term.

        Under torchrun they are the mean over the processes.
        """
        # A term of weight 0 is left out, so that λ = 0 is the base method bit for bit.
        if self.job.adds_term:
            loss = loss + self.job.term.lamda * self.job.term.loss(*batch.forget)
        self._state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._loss += loss.detach()
        self._num_correct += (batch.logits.detach().argmax(dim=1) == batch.labels).sum()
        self._num_images += len(batch.indices)
        self._num_steps += 1

    def update(self):
        """Update the weights by the optimizer, from the present gradients."""
        self._state.optimizer.step()

    def finish(self):
        """Complete the epoch: next learning rate, checks, accuracies. Returns its record.

        The loss is the mean over steps, ``train_acc`` the accuracy on augmented images.
        """
        job = self.job
        self._state.scheduler.step()
        distributed.equalise_buffers(job.model)
        # One transfer from the GPU per epoch: the sums stayed there.
        sums = torch.stack([self._loss, self._num_correct]).double()
        counts = sums.new_tensor([self._num_steps, self._num_images])
        distributed.add_up([sums, counts])
        loss, accuracy = (sums / counts).tolist()
        record = self._record | {"loss": loss, "train_acc": accuracy}
        self._bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", refresh=False)
        training_seconds = time.perf_counter() - self._start  # without the accuracies below
        if not math.isfinite(loss) or not weights_are_finite(job.model):
            rate = f"learning rate {job.recipe.learning_rate:g}"
            reason = f"diverged in epoch {self.number} at {rate}: the loss is {loss}"
            raise Diverged(f"{job.label} {reason}; lower --learning_rate")
        if not job.quiet:
            record |= job.monitor()
        record["images_per_second"] = counts[1].item() / training_seconds
        record["seconds"] = time.perf_counter() - self._start
        if not job.quiet:
            tqdm.write(epoch_line(job, record))
        return record


class Batch:
    """The M images of one step, under torchrun the share of this process.

    ``indices`` are positions in the training set, with ``labels`` and augmented ``inputs``
    (M×3×H×W). The first ``num_retain`` are retain images, the others forget images.
    """

    separate_passes = False

    def __init__(self, epoch, indices, num_retain, inputs):
        self._epoch, self.indices, self.num_retain = epoch, indices, num_retain
        self.inputs, self.labels = inputs, epoch.job.data.train.labels[indices]

    @cached_property
    def logits(self):
        """M×K float32, with a gradient, computed from ``inputs`` when first used."""
        if self.separate_passes:
            sections = self.inputs.tensor_split([self.num_retain])
            return torch.cat([self._epoch.forward(inputs) for inputs in sections])
        return self._epoch.forward(self.inputs)

    @property
    def retain(self):
        """(logits, labels) of the retain images."""
        return self.logits[: self.num_retain], self.labels[: self.num_retain]

    @property
    def forget(self):
        """(logits, labels) of the forget images."""
        return self.logits[self.num_retain :], self.labels[self.num_retain :]

    @property
    def forget_indices(self):
        """Positions of the forget images in the training set."""
        return self.indices[self.num_retain :]

    def outputs_of(self, network, part):
        """Logits of another network for the ``retain`` or ``forget`` images, without gradient."""
        rows = slice(self.num_retain) if part == "retain" else slice(self.num_retain, None)
        inputs = self.inputs[rows]
        if not len(inputs):  # some networks reject an empty batch
            return self.logits.new_zeros(0, self.logits.shape[1])
        with torch.no_grad(), self._epoch.job.autocast():
            return network(inputs).float()


def weights_are_finite(model):
    """Whether every parameter and every running statistic of BatchNorm is finite."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


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


# ---------------------------------------------------------------- the state and resuming


class TrainingState:
    """Everything that an epoch changes: model, optimizer, learning rate, records, q̂.

    Random numbers depend on the seed and the epoch only. ``ended`` is True once training has ended.
    """

    def __init__(self, job):
        recipe, parameters = job.recipe, job.model.parameters()
        settings = {"weight_decay": recipe.weight_decay, "fused": job.device.type == "cuda"}
        if recipe.optimizer == "sgd":
            settings["momentum"] = recipe.momentum
        optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.optimizer = optimizers[recipe.optimizer](parameters, recipe.learning_rate, **settings)
        schedules = torch.optim.lr_scheduler
        if recipe.milestones:
            self.scheduler = schedules.MultiStepLR(self.optimizer, recipe.milestones)
        elif recipe.schedule == "constant":
            self.scheduler = schedules.ConstantLR(self.optimizer, factor=1.0)
        else:
            self.scheduler = schedules.CosineAnnealingLR(self.optimizer, recipe.num_epochs)
        self.job, self.ended = job, False

    def state_dict(self):
        """Tensors and plain values, which further training changes."""
        return {
            "model": self.job.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "q_hats": self.job.term.q_hats if self.job.term is not None else [],
            "records": self.job.records,
            "weights_after": self.job.weights_after,
            "ended": self.ended,
        }

    def load_state_dict(self, saved):
        """Restore what :meth:`state_dict` returned."""
        self.job.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.job.term is not None:
            self.job.term.q_hats[:] = saved["q_hats"]
        self.job.records[:] = saved["records"]
        self.job.weights_after[:] = saved["weights_after"]
        self.ended = saved["ended"]


class Progress:
    """Saves the state of a training after its epochs to the file ``path``, for --resume.

    ``identity`` is everything that determines the weights. ``restored`` is the saved state, None
    without one. Raises UserError if ``resume`` finds the state of a run with another identity.
    """

    def __init__(self, path, identity, *, resume, save_every):
        self.path, self.identity, self.save_every = path, identity, save_every
        self.restored, self._latest = None, None
        self._started = self._saved_at = time.perf_counter()
        if resume and path.exists():
            self.restored = checkpoint.read_state(path)
            if not isinstance(self.restored, dict) or self.restored.get("identity") != identity:
                reason = "is of a run with other flags; pass the same flags, or omit --resume"
                raise UserError(f"--resume: {path} {reason}")

    @property
    def seconds(self):
        """Wall time of the run so far, including the time before an interruption."""
        earlier = self.restored["seconds"] if self.restored else 0
        return time.perf_counter() - self._started + earlier

    def update(self, state):
        """Keep a copy of the state, and save it at most every ``save_every`` seconds."""
        if distributed.rank():
            return
        content, saved = io.BytesIO(), {"identity": self.identity, "seconds": self.seconds}
        torch.save(state.state_dict() | saved, content)
        self._latest = content  # only now: an interruption may come while the copy is made
        if time.perf_counter() - self._saved_at >= self.save_every:
            self.save()

    def save(self):
        """Save the state after the last complete epoch. Returns whether there is one."""
        if self._latest is not None:
            checkpoint.write_file(self.path, lambda file: file.write(self._latest.getbuffer()))
            self._saved_at = time.perf_counter()
        return self._latest is not None or self.restored is not None
