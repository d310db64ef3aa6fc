"""The baseline methods and the one training loop they share.

A method is a function of a :class:`Job`, registered with its default hyper-parameters by ``@method``. Most say
only which images an epoch passes through and what the loss of a batch is, and leave the rest to :func:`train`.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn import functional as F
from tqdm import tqdm

import utils

MONITORED = 2000  # images of each part whose accuracy is measured after every epoch
MODEL_FILE = "unlearning_model.pth"
RUN_COLUMNS = {
    "method": ("method", "text"),
    "num_epochs": ("epochs", "count"),
    "learning_rate": ("rate", "number"),
    "retain": ("retain %", "percent"),
    "forget": ("forget %", "percent"),
    "test": ("test %", "percent"),
    "seconds": ("seconds", "number"),
}


class Diverged(utils.UserError):
    """The loss or the weights of a run are no longer finite."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training loop; SGD with momentum 0.9 and weight decay 5e-4 throughout."""

    num_epochs: int
    learning_rate: float
    batch_size: int = 64
    milestones: list[int] | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass
class Job:
    """One run: a model, what it trains on, and how.

    ``name`` is the base method's and seeds the run, so that a CPU variant draws its base's random numbers; ``label``
    is what people read. ``term`` is the conformal loss of :mod:`unlearn_cpu`, or None. ``new_model`` builds the
    network as it was before any training on this data. ``epoch_done`` receives a dict of numbers after every epoch.
    """

    name: str
    label: str
    model: torch.nn.Module
    data: utils.Data
    split: utils.Split
    recipe: Recipe
    seed: int
    new_model: Callable[[], torch.nn.Module] | None = None
    term: object = None
    epoch_done: Callable[[dict], None] = lambda record: None

    @property
    def device(self):
        return self.data.train.labels.device


@dataclass
class Batch:
    """One step's images: first the retained ones, then the forgotten ones, with the logits for all of them."""

    labels: torch.Tensor
    num_retain: int
    logits: torch.Tensor | None = None

    @property
    def retain(self):
        return self.logits[: self.num_retain], self.labels[: self.num_retain]

    @property
    def forget(self):
        return self.logits[self.num_retain :], self.labels[self.num_retain :]


# ---------------------------------------------------------------- the training loop


def train(job, batch_loss, passes_through=("retain",)):
    """Train ``job.model`` by ``batch_loss(batch)``, a scalar, over epochs through the named parts of the split.

    An epoch visits every image of each part once, freshly shuffled and augmented; each step takes the same share
    of every part. With a conformal term, the forget images join the steps of a method that would not see them,
    and λ times the term is added to the loss. The model, BatchNorm included, trains in train mode, which every
    evaluation leaves as it was. Raises :class:`Diverged` when the loss or a weight is not finite.
    """
    model, recipe, term = job.model, job.recipe, job.term
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    if recipe.milestones:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.num_epochs)
    joined = term is not None and term.lamda > 0 and "forget" not in passes_through
    images_an_epoch = sum(len(getattr(job.split, part)) for part in (*passes_through, *["forget"] * joined))
    num_images = recipe.num_epochs * images_an_epoch
    bar = tqdm(total=num_images, desc=job.label, unit="img", unit_scale=True, disable=None, leave=False)
    model.train()
    for epoch in range(1, recipe.num_epochs + 1):
        start = time.perf_counter()
        record = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
        if term is not None:
            record |= term.start_epoch(model)
        utils.seed_everything(job.seed, job.name, "dropout", epoch)
        augmentation = utils.generator(job.seed, job.name, "augmentation", epoch, device=job.device)
        loss_sum = torch.zeros((), device=job.device)
        correct = torch.zeros((), device=job.device)
        seen = 0
        batches = index_batches(job, passes_through, joined, epoch)
        for step, (indices, num_retain) in enumerate(batches):
            batch = Batch(job.data.train.labels[indices], num_retain)
            batch.logits = model(job.data.train.batch(indices, augmentation))
            loss = batch_loss(batch)
            if term is not None and term.lamda > 0:
                loss = loss + term.lamda * term.loss(*batch.forget)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            correct += (batch.logits.detach().argmax(dim=1) == batch.labels).sum()
            seen += len(indices)
            bar.update(len(indices))
            if not bar.disable and step % 20 == 0:
                bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", acc=f"{correct.item() / seen:.3f}")
        scheduler.step()

        record |= {"loss": loss_sum.item() / len(batches), "train_acc": correct.item() / seen}
        seconds = time.perf_counter() - start
        if not math.isfinite(record["loss"]) or not all(p.isfinite().all() for p in model.parameters()):
            bar.close()
            raise Diverged(
                f"{job.label} diverged in epoch {epoch} at learning rate {recipe.learning_rate:g}: the loss is "
                f"{record['loss']}; lower --learning_rate. What was saved before is unchanged"
            )
        record |= {f"{part}_acc": accuracy for part, accuracy in accuracies(job, MONITORED).items()}
        record |= {"images_per_second": seen / seconds, "seconds": time.perf_counter() - start}
        job.epoch_done(record)
        tqdm.write(_line(job, record))
    bar.close()


def index_batches(job, passes_through, joined, epoch):
    """The steps of one epoch: pairs of (indices into the training images, how many of them are retained).

    As many steps as the method's own parts fill; each takes an equal share of every part, and of the forget
    images too where they are ``joined`` by the conformal term. Near-equal steps leave no last batch of one
    image, which BatchNorm could not train on.
    """
    own = {part: getattr(job.split, part) for part in passes_through}
    steps = math.ceil(sum(len(indices) for indices in own.values()) / job.recipe.batch_size)
    if joined:
        own["forget"] = job.split.forget

    def shares(part):
        if part not in own:
            return [torch.empty(0, dtype=torch.int64, device=job.device)] * steps
        rng = utils.generator(job.seed, job.name, "order", part, epoch)
        order = torch.randperm(len(own[part]), generator=rng).to(job.device)
        return own[part][order].tensor_split(steps)

    return [(torch.cat([r, f]), len(r)) for r, f in zip(shares("retain"), shares("forget"), strict=True)]


def accuracies(job, limit=None):
    """Accuracy on the retain, forget and test images without augmentation: of all, or of ``limit`` fixed ones each."""
    found = {}
    for part, images in (("retain", job.data.train), ("forget", job.data.train), ("test", job.data.held_out)):
        indices = getattr(job.split, part)
        if limit is not None and len(indices) > limit:
            sample = utils.permutation(job.seed, "monitored", len(indices))[:limit]
            indices = indices[torch.from_numpy(sample).to(indices.device)]
        if len(indices):
            logits, labels = utils.compute_logits(job.model, images, indices)
            found[part] = (logits.argmax(dim=1) == labels).double().mean().item()
    return found


def _line(job, record):
    parts = [f"{job.label} epoch {record['epoch']}/{job.recipe.num_epochs}", f"loss {record['loss']:.4f}"]
    parts += [f"{key[:-4]} {100 * value:.1f} %" for key, value in record.items() if key.endswith("_acc")]
    if "q_hat" in record:
        parts.append(f"q̂ {record['q_hat']:.4f}")
    return "  ".join([*parts, f"{record['images_per_second']:.0f} img/s"])


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A method and its default hyper-parameters; None stands for the original model's own."""

    run: Callable[[Job], None]
    num_epochs: int | None
    learning_rate: float | None


METHODS: dict[str, Method] = {}


def method(num_epochs=None, learning_rate=None):
    """Register the decorated function under its own name, with its default hyper-parameters."""

    def register(function):
        METHODS[function.__name__] = Method(function, num_epochs, learning_rate)
        return function

    return register


def retain_cross_entropy(batch):
    """Cross-entropy on the retained images of a batch."""
    return F.cross_entropy(*batch.retain)


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


def describe_methods(names=None):
    """The methods with their defaults, for ``--help``."""
    lines = ["methods and their defaults:"]
    for name in names or METHODS:
        entry = METHODS[name.removeprefix("cpu_")]
        epochs, rate = entry.num_epochs or "the original's", entry.learning_rate or "the original's"
        lines.append(f"  {name:<14} epochs: {epochs}, learning rate: {rate}")
    return "\n".join(lines)


# ---------------------------------------------------------------- runs


def original_recipe(args):
    """The recipe of an original model where flags are left out: from scratch, or from ImageNet weights."""
    spec, from_scratch = utils.SPECS[args.data_name], args.model_name == "resnet18"
    return Recipe(
        num_epochs=args.num_epochs or (spec.num_epochs if from_scratch else min(spec.num_epochs, 20)),
        learning_rate=args.learning_rate or (spec.learning_rate if from_scratch else 0.01),
        batch_size=args.batch_size or Recipe.batch_size,
        milestones=args.milestones,
    )


def method_recipe(entry, args, original_meta):
    """A method's recipe: flags where given, else its own defaults, else the original model's recipe."""
    original = original_meta.get("recipe") or asdict(original_recipe(args))
    follows_original = entry.num_epochs is None
    return Recipe(
        num_epochs=args.num_epochs or entry.num_epochs or original["num_epochs"],
        learning_rate=args.learning_rate or entry.learning_rate or original["learning_rate"],
        batch_size=args.batch_size or (original["batch_size"] if follows_original else Recipe.batch_size),
        milestones=args.milestones or (original["milestones"] if follows_original else None),
    )


def already_done(path, identity, args):
    """The meta of an equal run at ``path``, or None where there is none (or --overwrite redoes it).

    ``identity`` is everything that determines the weights. Raises UserError where another run's result is there.
    """
    if args.overwrite or not path.exists():
        return None
    try:
        meta = utils.read_checkpoint(path)[1]
    except utils.UserError as error:
        raise utils.UserError(f"{error}; --overwrite replaces it") from error
    found = meta.get("identity", {})
    if found == identity:
        return meta
    different = [key for key in identity if found.get(key) != identity[key]]
    differences = ", ".join(f"{key} {found.get(key)} there, {identity[key]} now" for key in different)
    raise utils.UserError(f"{path} exists and is another run's ({differences}); --overwrite replaces it")


def execute(job, run, folder, file_name, meta, args):
    """Run ``run(job)``, record it, and save the model with its ``meta`` as ``folder/file_name``.

    Returns the meta with the wall time in seconds and the final accuracies added. A run that fails saves nothing.
    """
    utils.prepare_folder(folder, utils.checkpoint_size(job.model))
    with utils.RunLog(folder, job.label, meta, args) as log:
        job.epoch_done = log.epoch
        start = time.perf_counter()
        run(job)
        meta = meta | {"seconds": time.perf_counter() - start, "accuracies": accuracies(job)}
        utils.save_checkpoint(folder / file_name, job.model, meta)
        log.keep()
        log.table("run", [{"method": job.label, "seconds": meta["seconds"]} | meta["accuracies"]])
    return meta | {"history": log.history}


def run_methods(args, methods, term_of=lambda data, split: None, prefix=""):
    """Unlearn with each of ``args.unlearn_name``, from one original model; print one table. Returns the exit status.

    ``term_of(data, split)`` makes the conformal term; ``prefix`` is what its variants' names have before the base
    method's. What is already done is not done again; a method that diverges is a row that says so, and the
    others go on.
    """
    names = utils.method_names(args.unlearn_name, methods, prefix)
    if len(names) > 1 and args.learning_rate:
        raise utils.UserError(
            "--learning_rate with several methods: no rate is right for all; leave it out, or run one"
        )
    device = utils.pick_device(args.device)
    data = utils.load_data(args, device)
    split = utils.make_split(data, args)
    root = utils.run_folder(args, data)

    path = utils.locate(args.model_dir, root)
    state, original = utils.read_checkpoint(path, "train it first with main_original_model.py and the same flags")
    utils.check_meta(path, original, args, data)
    model = utils.build_model(args, len(data.classes), data.train.size, device, pretrained=False)
    utils.load_weights(model, state, path)
    print(f"{path}: forget {len(split.forget)} of {len(data.train)} images ({split.folder}, {split.fingerprint})")

    def new_model(purpose):
        utils.seed_everything(args.seed, purpose, "initialisation")
        return utils.build_model(args, len(data.classes), data.train.size, device, pretrained=True)

    plan, origin = [], {"original": utils.weights_hash(state), "forget_set": split.fingerprint}
    for label in names:
        recipe, term = method_recipe(methods[label], args, original), term_of(data, split)
        identity = asdict(recipe) | origin
        if term is not None:
            identity |= {"alpha": term.alpha, "delta": term.delta, "lamda": term.lamda}
        folder = root / split.folder / label
        plan.append((label, recipe, term, identity, folder, already_done(folder / MODEL_FILE, identity, args)))

    rows, failures = [], 0
    for label, recipe, term, identity, folder, meta in plan:
        if meta:
            print(f"{folder / MODEL_FILE}: already done; --overwrite redoes it")
        else:
            model.load_state_dict(state)
            name = label.removeprefix(prefix)
            job = Job(name, label, copy.deepcopy(model), data, split, recipe, args.seed, partial(new_model, name), term)
            meta = utils.describe_run(args, data, device) | {
                "method": label,
                "identity": identity,
                "recipe": asdict(recipe),
                "unlearn_type": args.unlearn_type,
                "forget_set": split.fingerprint,
                "num_forget": len(split.forget),
                "original_seconds": original.get("seconds"),
            }
            try:
                meta = execute(job, methods[label].run, folder, MODEL_FILE, meta, args)
            except Diverged as error:
                if len(plan) == 1:
                    raise
                rows.append({"method": label, "note": str(error)})
                failures += 1
                continue
            if term is not None and (advice := term.advice()):
                print(f"{label}: {advice}")
            utils.save_json(folder / "results.json", {key: meta[key] for key in meta if key != "history"})
        rows.append({"method": label, "seconds": meta["seconds"]} | meta["recipe"] | meta["accuracies"])
    utils.print_table(RUN_COLUMNS if not failures else RUN_COLUMNS | {"note": ("note", "text")}, rows)
    return 2 if failures else 0
