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
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import nn

import models
import unlearn
from metrics.columns import Column
from metrics.report import tables
from models import checkpoint, distributed, seeds
from models.errors import UserError, first_line
from models.training import Diverged, Job

RUN_COLUMNS = {
    "method": Column("method", "text"),
    "num_epochs": Column("epochs", "text"),
    "learning_rate": Column("rate", "text"),
    **{name: Column(name, "percent") for name in ("retain", "forget", "test")},
    "seconds": Column("time", "seconds"),
}


def main():
    parser = make_parser(__doc__, unlearn.METHODS)
    args = parser.parse_args()
    names = unlearn.method_names(args.unlearn_name, unlearn.METHODS)
    return unlearn_all(parser, args, {name: unlearn.METHODS[name] for name in names})


def make_parser(description, methods):
    """The parser of both unlearning scripts. ``methods`` are :class:`unlearn.Method` by label."""
    parser = utils.make_parser(description, epilog=unlearn.describe_methods(methods))
    utils.add_scenario_flags(parser, ", ".join(methods), "original_model.pth", label=True)
    utils.add_training_flags(parser, "default: depends on the method, listed below")
    unlearn.add_stop_flags(parser)
    unlearn.add_option_flags(parser, methods)
    return parser


def unlearn_all(parser, args, methods, make_term=None):
    """Unlearn with every method for every seed, and print one table. Returns the exit status.

    ``methods`` are :class:`unlearn.Method` by name. ``make_term(args, data, split)`` builds the
    conformal loss of a run. All settings are checked before the first run. The table has a row for
    every failure.
    """
    check_flags(args, methods)
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))

    runs = []
    for seed_args in utils.each_seed(args):
        original = read_original(seed_args, data, device)
        for name, method in methods.items():
            term = make_term(seed_args, data, original.split) if make_term else None
            runs.append(Run(name, method, original, term=term, device=device))

    for run in runs:
        if run.is_done:
            print(f"{run.files.model_path}: already done; pass --overwrite to run it again")
    pending = [run for run in runs if not run.is_done]
    commands = [utils.command_line(parser, run.args, unlearn_name=[run.name]) for run in pending]
    if args.dry_run:
        for command in commands:
            print(shlex.join(command))
        return 0
    if args.jobs > 1:
        titles = [f"seed {run.args.seed}" for run in pending] if args.seeds else None
        distributed.run_commands(commands, args.jobs, titles)
    else:
        for run in pending:
            try:
                unlearn_and_save(run, device)
            except Exception as error:
                record_failure(run, error, is_only_run=len(runs) == 1)

    rows = [record_row(run) for run in runs]
    failed = any("note" in row for row in rows)
    columns = RUN_COLUMNS | {"note": Column("note", "text")} if failed else RUN_COLUMNS
    tables.print_table(columns, tables.summarise(rows, columns, ["method"]))
    return 2 if failed else 0


def record_row(run):
    """The row of a run, from its failure or else from its record."""
    record = {"error": "ended without a result"}
    for name in (run.files.record, utils.FAILURE_FILE):
        if (path := run.files.folder / name).exists():
            record = json.loads(path.read_text(encoding="utf-8"))
    if "error" in record:
        return {"method": run.label, "note": f"seed {run.args.seed}: {record['error']}"}
    numbers = record | record["accuracies"] | (record["recipe"] or {})
    return {key: numbers[key] for key in RUN_COLUMNS if key in numbers}


# ---------------------------------------------------------------- before the first run


@dataclass(frozen=True)
class Original:
    """The original model of one seed, and what all runs of this seed share.

    ``args`` are the flags with this seed, ``weights`` is the hash of the model's weights. The
    scenario's results go to ``folder``.
    """

    args: argparse.Namespace
    data: utils.Data
    split: utils.Split
    model: nn.Module
    meta: dict
    weights: str
    folder: Path


class Run:
    """One method for one seed, with its settings.

    ``name`` is that of the method, ``label`` that of the folder and the row. ``stop_at`` is the
    target of --until_forgotten, else None. ``is_done`` says whether the folder has a model with
    this identity. Raises UserError if it has another one.
    """

    def __init__(self, name, method, original, *, term, device):
        self.name, self.method, self.original, self.term = name, method, original, term
        self.args = args = original.args
        self.label = args.label or name
        self.files = utils.RunFiles(original.folder / self.label)
        self.options = unlearn.options_of(method, args)
        self.recipe = unlearn.recipe_of(method, args, original.meta.get("recipe"), device)
        images = {"data": original.data, "split": original.split}
        self.stop_at = unlearn.target_of(args, original.model, **images)
        self.is_done = utils.already_done(self.files.model_path, self.identity, args) is not None

    @cached_property
    def identity(self):
        """Everything that determines the weights of the run."""
        original, options, term = self.original, self.options, self.term
        identity = (asdict(self.recipe) if self.recipe else {}) | options
        identity |= {"original": original.weights, "forget_set": original.split.fingerprint}
        if options.get("mask_path"):
            mask = unlearn.read_mask(options["mask_path"], original.model)
            identity["mask_path"] = checkpoint.weights_hash(mask)
        if term is not None:
            identity |= {"alpha": term.alpha, "delta": term.delta, "lamda": term.lamda}
            identity["loss"] = term.form
        return identity | ({"stop_at": self.stop_at} if self.args.until_forgotten else {})


def check_flags(args, methods):
    """Raise UserError for a flag that cannot apply to the chosen methods (Method by name)."""
    if len(methods) > 1 and args.learning_rate:
        raise UserError("--learning_rate: no rate suits several methods; omit it or choose one")
    reserved = {"original", *unlearn.METHODS, *(f"cpu_{name}" for name in unlearn.METHODS)}
    is_name = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", args.label or "_")
    if args.label and (len(methods) > 1 or args.label in reserved or not is_name):
        raise UserError(f"--label {args.label}: needs one method, and a name that no method has")
    if args.stop_accuracy is not None and not args.until_forgotten:
        raise UserError("--stop_accuracy: it is the target of --until_forgotten; pass both")
    unlearn.check_method_flags(args, methods)


def read_original(args, data, device):
    """Read and check the original model for the seed and the scenario of the flags.

    Raises UserError if it is missing or belongs to other data or another network.
    """
    split = utils.make_split(data, utils.scenario_of(args))
    root = utils.run_folder(args, data)
    path = utils.locate(args.model_dir, root)
    remedy = "train it first with main_original_model.py and the same flags"
    state, meta = checkpoint.read(path, remedy)
    checkpoint.check_meta(path, meta, utils.model_facts(args, data))
    model = models.build_model(args, len(data.classes), data.train.size, device, pretrained=False)
    checkpoint.load_weights(model, state, path)
    about = {"meta": meta, "weights": checkpoint.weights_hash(state), "folder": root / split.folder}
    print(f"{path}: forget {split.describe()}")
    return Original(args, data, split=split, model=model, **about)


# ---------------------------------------------------------------- the runs


def record_failure(run, error, *, is_only_run):
    """Save the error that ended a run in its folder, for the table.

    Raises the error of the only run, and under torchrun every error but divergence: the other
    processes may not have it, and would wait for this one.
    """
    reason = str(error) if isinstance(error, UserError) else first_line(error)
    failure = {"forget_set": run.original.split.fingerprint, "error": reason}
    utils.save(run.files.folder / utils.FAILURE_FILE, failure)
    if is_only_run or (distributed.world_size() > 1 and not isinstance(error, Diverged)):
        raise error
    print(f"{run.label} (seed {run.args.seed}) failed: {reason}")


def unlearn_and_save(run, device):
    """Unlearn with one method and save the model and its records."""
    args, data, split = run.args, run.original.data, run.original.split

    def new_model():
        """The network before any training on this data, with pre-trained weights if any."""
        seeds.seed_everything(args.seed, run.method.name, "initialisation")
        return models.build_model(args, len(data.classes), data.train.size, device, pretrained=True)

    about = {"name": run.method.name, "label": run.label, "new_model": new_model}
    settings = {"seed": args.seed, "recipe": run.recipe, "term": run.term, "stop_at": run.stop_at}
    model = copy.deepcopy(run.original.model)
    job = Job(model=model, data=data, split=split, compile=args.compile, **about, **settings)
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
    train = partial(run.method.run, **run.options)
    meta = utils.run_and_save(train, job, run.files, meta=meta, args=args)
    left = meta["accuracies"]["forget"]
    if job.stop_at is not None and left > job.stop_at + 0.01:
        target, remedy = f"{100 * job.stop_at:.1f} %", "raise --num_epochs or --learning_rate"
        print(f"{run.label}: forget accuracy {100 * left:.1f} %, not {target}; {remedy}")
    if run.term is not None and (advice := run.term.advice()):
        print(f"{run.label}: {advice}")


if __name__ == "__main__":
    utils.run_script(main)
