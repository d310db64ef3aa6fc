"""Unlearn with one or several baseline methods.

    python main_unlearn.py --data_name digits --unlearn_name retrain finetune

reads the original model from its run folder and writes the unlearned models to
<type>_<detail>/<method>/unlearning_model.pth in the same folder.
"""

import utils  # before torch

# isort: split
import argparse
import copy
import json
import re
import shlex
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn

import models
import unlearn
from metrics.columns import Column
from metrics.report import tables
from models import checkpoint, distributed, inference, seeds
from models.errors import NotFinite, UserError, first_line
from models.training import Diverged, Job, Recipe

TRAINING_FLAGS = ("num_epochs", "learning_rate", "batch_size", "milestones")
RUN_COLUMNS = {
    "method": Column("method", "text"),
    "num_epochs": Column("epochs", "text"),
    "learning_rate": Column("rate", "text"),
    "retain": Column("retain", "percent"),
    "forget": Column("forget", "percent"),
    "test": Column("test", "percent"),
    "seconds": Column("time", "seconds"),
}


def main():
    parser = utils.make_parser(__doc__, epilog=unlearn.describe_methods(unlearn.METHODS))
    names = ", ".join(unlearn.METHODS)
    utils.add_scenario_flags(parser, names, "original_model.pth", label=True)
    utils.add_training_flags(parser, "default: depends on the method, listed below")
    add_stop_flags(parser)
    unlearn.add_option_flags(parser, unlearn.METHODS)
    args = parser.parse_args()
    names = utils.method_names(args.unlearn_name, unlearn.METHODS)
    return unlearn_all(parser, args, {name: unlearn.METHODS[name] for name in names})


def add_stop_flags(parser):
    """Flags that compare methods at an equal level of forgetting instead of their authors' ends."""
    group = parser.add_argument_group("until forgotten")
    group.add_argument(
        "--until_forgotten",
        action="store_true",
        help="end training after the epoch in which the forget accuracy falls to --stop_accuracy, "
        "within --num_epochs; ssd, IU, neg_merge and FisherForgetting take the weakest setting "
        "that reaches it",
    )
    group.add_argument(
        "--stop_accuracy",
        type=utils.number(float, 0, 1),
        help="forget accuracy of --until_forgotten; default: 0.03 for classes, else the accuracy "
        "on held-out images",
    )


def unlearn_all(parser, args, methods, make_term=None):
    """Unlearn with every method for every seed, and print one table. Returns the exit status.

    ``methods`` are :class:`unlearn.Method` by name. ``make_term(args, data, split)`` builds the
    conformal loss of a run. All settings are checked before the first run starts. Failures are
    reported in the table; the remaining methods still run.
    """
    check_flags(args, methods)
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))

    runs = []
    for seed_args in utils.each_seed(args):
        original = read_original(seed_args, data, device)
        print(f"{original.path}: forget {original.split.describe()}")
        for name, method in methods.items():
            term = make_term(seed_args, data, original.split) if make_term else None
            runs.append(plan_run(name, method, original, term=term, device=device))

    pending = [run for run in runs if not run.is_done]
    commands = [
        utils.command_line(parser, args, seed=run.original.args.seed, unlearn_name=[run.name])
        for run in pending
    ]
    if args.dry_run:
        for command in commands:
            print(shlex.join(command))
        return 0
    if args.jobs > 1:
        titles = [f"seed {run.original.args.seed}" for run in pending] if args.seeds else None
        distributed.run_commands(commands, args.jobs, titles)
    else:
        for run in pending:
            with failure_recorded(run, is_only_run=len(runs) == 1):
                unlearn_and_save(run, data, device)
    return print_rows([record_row(run) for run in runs])


def print_rows(rows):
    """Print the table of all runs, with means over the seeds. Returns the exit status."""
    failed = any("note" in row for row in rows)
    columns = RUN_COLUMNS | {"note": Column("note", "text")} if failed else RUN_COLUMNS
    tables.print_table(columns, tables.summarise(rows, columns, ["method"]))
    return 2 if failed else 0


def record_row(run):
    """The row of a run, from the record that it left."""
    path = run.files.folder / utils.FAILURE_FILE
    if path.exists():
        note = json.loads(path.read_text(encoding="utf-8"))["error"]
        seed = run.original.args.seed
        return {
            "method": run.label,
            "note": f"seed {seed}: {note}" if run.original.args.seeds else note,
        }
    try:
        record = json.loads((run.files.folder / run.files.record).read_text(encoding="utf-8"))
        numbers = {"seconds": record["seconds"]} | (record["recipe"] or {}) | record["accuracies"]
    except (OSError, ValueError, KeyError):
        return {"method": run.label, "note": "ended without a result"}
    return {"method": run.label} | numbers


# ---------------------------------------------------------------- before the first run


@dataclass(frozen=True)
class Original:
    """The original model of one seed, and what all runs of this seed share.

    ``args`` are the flags with this seed, ``path`` is its file, ``meta`` that of the checkpoint,
    ``weights`` the hash of its weights. ``folder`` is where the scenario's results go.
    """

    args: argparse.Namespace
    path: Path
    split: utils.Split
    held_out: utils.Images
    model: nn.Module
    meta: dict
    weights: str
    folder: Path


@dataclass(frozen=True)
class Run:
    """One method for one seed, with its settings.

    ``name`` is that of the method, ``label`` that of the folder and the row. ``stop_at`` is
    the forget accuracy of --until_forgotten, else None. ``identity`` is everything that determines
    the weights. ``is_done`` is True if an earlier run with this identity
    left its model.
    """

    name: str
    label: str
    method: unlearn.Method
    original: Original
    recipe: Recipe | None
    options: dict
    term: object
    stop_at: float | None
    identity: dict
    files: utils.RunFiles
    is_done: bool


def check_flags(args, methods):
    """Raise UserError for a flag that cannot apply to the chosen methods (Method by name)."""
    names = ", ".join(methods)
    if args.jobs > 1 and distributed.world_size() > 1:
        raise UserError("--jobs: torchrun divides every run over its processes; omit one of them")
    if len(methods) > 1 and args.learning_rate:
        raise UserError(
            "--learning_rate with several methods: no single rate suits all of them; "
            "omit it or choose one method"
        )
    reserved = {"original", *unlearn.METHODS, *(f"cpu_{name}" for name in unlearn.METHODS)}
    is_name = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", args.label or "_")
    if args.label and (len(methods) > 1 or args.label in reserved or not is_name):
        raise UserError(f"--label {args.label}: needs one method, and a name that no method has")
    if args.stop_accuracy is not None and not args.until_forgotten:
        raise UserError("--stop_accuracy: it is the target of --until_forgotten; pass both")
    if not any(method.trained for method in methods.values()):
        for flag in TRAINING_FLAGS:
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} does not apply to {names} (no training); omit it")
    unlearn.check_option_flags(args, methods)


def read_original(args, data, device):
    """Read and check the original model for the seed and the scenario of the flags.

    Raises UserError if it is missing, belongs to other data or another network, or has outputs
    that are not finite.
    """
    split = utils.make_split(data, utils.scenario_of(args))
    root = utils.run_folder(args, data)
    path = utils.locate(args.model_dir, root)
    state, meta = checkpoint.read(
        path, "train it first with main_original_model.py and the same flags"
    )
    checkpoint.check_meta(path, meta, utils.model_facts(args, data))
    model = build_network(args, data, device, pretrained=False)
    checkpoint.load_weights(model, state, path)
    try:
        inference.compute_logits(model, data.train, split.retain[:64])
    except NotFinite as error:
        raise UserError(f"{path}: {error}") from error
    return Original(
        args,
        path,
        split,
        data.held_out,
        model=model,
        meta=meta,
        weights=checkpoint.weights_hash(state),
        folder=root / split.folder,
    )


def build_network(args, data, device, *, pretrained):
    """A new network for the classes and the image size of the data."""
    size = data.train.size
    return models.build_model(args, len(data.classes), size, device, pretrained=pretrained)


def plan_run(name, method, original, *, term, device):
    """The :class:`Run` of one method. Raises UserError if its folder has another run's result."""
    args, label = original.args, original.args.label or name
    options = unlearn.options_of(method, args, cases_of(args))
    recipe = method_recipe(method, args, original.meta, device)
    identity = run_identity(original, recipe, options, term=term)
    stop_at = None
    if args.until_forgotten:
        stop_at = identity["stop_at"] = target_accuracy(original)
    files = utils.RunFiles(original.folder / label)
    is_done = utils.already_done(files.model_path, identity, args) is not None
    if is_done:
        print(f"{files.model_path}: already done; pass --overwrite to run it again")
    return Run(
        name=name,
        label=label,
        method=method,
        original=original,
        recipe=recipe,
        options=options,
        term=term,
        stop_at=stop_at,
        identity=identity,
        files=files,
        is_done=is_done,
    )


def target_accuracy(original):
    """The forget accuracy of --until_forgotten: --stop_accuracy, else 3 % for classes, and the
    original model's accuracy on held-out images, which no metric uses, for other images.
    """
    args, split, images = original.args, original.split, original.held_out
    if args.stop_accuracy is not None:
        return args.stop_accuracy
    if split.forget_classes:
        return 0.03
    if not len(split.train_calibration):
        raise UserError("--until_forgotten: there are no held-out images; pass --stop_accuracy")
    logits, labels = inference.compute_logits(original.model, images, split.train_calibration)
    return (logits.argmax(dim=1) == labels).double().mean().item()


def cases_of(args):
    """Which of ``unlearn.CASES`` hold: where a method's published values differ."""
    from_scratch = models.describe(args.model_name).trained_from_scratch
    cases = {
        "not_cifar10": args.data_name != "cifar10",
        "cifar100": args.data_name == "cifar100",
        "tiny_imagenet": args.data_name == "tiny_imagenet",
        "classes": args.unlearn_type in ("class", "subclass"),
        "vit": "vit" in args.model_name,
        "digits": args.data_name == "digits" and from_scratch,
    }
    return {case for case, holds in cases.items() if holds}


def method_recipe(method, args, original_meta, device):
    """The recipe of a method: flags, else its defaults, else the recipe of the original model.

    None for a method without training. An original model without a recorded recipe counts as
    trained with the recipe of the flags.
    """
    if not method.trained:
        return None
    original = original_meta.get("recipe") or asdict(utils.original_recipe(args, device))
    defaults, _ = unlearn.defaults_of(method, cases_of(args))
    inherited = ["learning_rate"]
    if "num_epochs" not in defaults:
        inherited += ["num_epochs", "batch_size", "milestones"]
    settings = {name: original[name] for name in inherited} | defaults
    passed = {name: getattr(args, name) for name in TRAINING_FLAGS}
    settings |= {name: value for name, value in passed.items() if value is not None}
    return Recipe(**settings, precision=utils.pick_precision(args, device))


def run_identity(original, recipe, options, *, term):
    """Everything that determines the weights of a run."""
    identity = (asdict(recipe) if recipe else {}) | options
    identity |= {"original": original.weights, "forget_set": original.split.fingerprint}
    if options.get("mask_path"):
        mask = unlearn.read_mask(options["mask_path"], original.model)
        identity["mask_path"] = checkpoint.weights_hash(mask)
    if term is not None:
        identity |= {"alpha": term.alpha, "delta": term.delta, "lamda": term.lamda}
        identity["loss"] = term.form
    return identity


# ---------------------------------------------------------------- the runs


@contextmanager
def failure_recorded(run, *, is_only_run):
    """Save the error that ends a run in its folder, for the table, and let the next run start.

    The error of the only run is raised. So is, under torchrun, an error other than divergence,
    since it may have reached only one process, and the others would wait for it.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        failure = {"forget_set": run.original.split.fingerprint, "error": reason}
        utils.save_json(run.files.folder / utils.FAILURE_FILE, failure)
        others_wait = distributed.world_size() > 1 and not isinstance(error, Diverged)
        if is_only_run or others_wait:
            raise
        print(f"{run.label} (seed {run.original.args.seed}) failed: {reason}")


def unlearn_and_save(run, data, device):
    """Unlearn with one method and save the model and its records."""
    args, split = run.original.args, run.original.split
    job = Job(
        name=run.method.name,
        label=run.label,
        model=copy.deepcopy(run.original.model),
        data=data,
        split=split,
        recipe=run.recipe,
        seed=args.seed,
        new_model=partial(initial_network, run, data, device),
        term=run.term,
        stop_at=run.stop_at,
        compile=args.compile,
    )
    meta = utils.describe_run(args, data, device) | {
        "method": run.label,
        "base_method": run.method.name,
        "identity": run.identity,
        "recipe": asdict(run.recipe) if run.recipe else None,
        "options": run.options,
        "unlearn_type": args.unlearn_type,
        "forget_set": split.fingerprint,
        "num_forget": len(split.forget),
        "original_seconds": run.original.meta.get("seconds"),
    }
    unlearn_with_options = partial(run.method.run, **run.options)
    utils.run_and_save(unlearn_with_options, job, run.files, meta=meta, args=args)
    if run.term is not None and (advice := run.term.advice()):
        print(f"{run.label}: {advice}")


def initial_network(run, data, device):
    """A network as it was before any training on this data, with pre-trained weights if any."""
    args = run.original.args
    seeds.seed_everything(args.seed, run.method.name, "initialisation")
    return build_network(args, data, device, pretrained=True)


if __name__ == "__main__":
    utils.run_script(main)
