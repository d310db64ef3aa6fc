"""Unlearn with one or several baseline methods.

    python main_unlearn.py --data_name digits --unlearn_name retrain finetune

reads the original model from its run folder and writes the unlearned models to
<type>_<detail>/<method>/unlearning_model.pth in the same folder.
"""

import utils  # before torch

# isort: split
import argparse
import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn

import models
import unlearn
from metrics.columns import Column
from metrics.report import tables
from models import checkpoint, distributed, inference
from models.errors import NotFinite, UserError

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
    utils.add_scenario_flags(parser, ", ".join(unlearn.METHODS), "original_model.pth")
    utils.add_training_flags(parser, "default: depends on the method, listed below")
    unlearn.add_option_flags(parser, unlearn.METHODS)
    args = parser.parse_args()
    names = utils.method_names(args.unlearn_name, unlearn.METHODS)
    return unlearn_all(args, {name: unlearn.METHODS[name] for name in names})


def unlearn_all(args, methods, make_term=None):
    """Unlearn with every method for every seed, and print one table. Returns the exit status.

    ``methods`` are :class:`unlearn.Method` by label. ``make_term(args, data, split)`` builds the
    conformal loss of a run. Results of an earlier identical command are kept. Failures are
    reported in the table; the remaining methods still run.
    """
    unlearn.check_flags(args, methods)
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))

    # Every original model and all settings are checked before the first run starts.
    runs = []
    for seed_args in utils.each_seed(args):
        original = read_original(seed_args, data, device)
        print(f"{original.path}: forget {original.split.describe()}")
        for label, method in methods.items():
            term = make_term(seed_args, data, original.split) if make_term else None
            runs.append(plan_run(label, method, original, term=term, device=device))

    is_only_run = len(runs) == 1 and not args.seeds
    rows = []
    results = run_all(runs, data, device, make_term=make_term)
    for run, result in zip(runs, results, strict=True):
        if not isinstance(result, UserError):
            rows.append(table_row(run, result))
        elif is_only_run or not other_runs_can_continue(result):
            raise result
        else:
            rows.append(record_failure(run, result))

    failures = [row for row in rows if "note" in row]
    columns = RUN_COLUMNS | {"note": Column("note", "text")} if failures else RUN_COLUMNS
    tables.print_table(columns, tables.summarise(rows, columns, ["method"]))
    return 2 if failures else 0


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
    model: nn.Module
    meta: dict
    weights: str
    folder: Path


@dataclass(frozen=True)
class Run:
    """One method for one seed, with its settings.

    ``identity`` is everything that determines the weights. ``earlier_meta`` is the meta of an
    earlier run with this identity, or None.
    """

    label: str
    method: unlearn.Method
    original: Original
    recipe: unlearn.Recipe | None
    options: dict
    term: object
    identity: dict
    files: unlearn.RunFiles
    earlier_meta: dict | None


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
    checkpoint.check_meta(path, meta, args, data)
    model = build_network(args, data, device, pretrained=False)
    checkpoint.load_weights(model, state, path, data.train.spec)
    try:
        inference.compute_logits(model, data.train, split.retain[:64])
    except NotFinite as error:
        raise UserError(f"{path}: {error}") from error
    return Original(
        args,
        path,
        split,
        model=model,
        meta=meta,
        weights=checkpoint.weights_hash(state),
        folder=root / split.folder,
    )


def build_network(args, data, device, *, pretrained):
    """A new network for the classes and the image size of the data."""
    size = data.train.size
    return models.build_model(args, len(data.classes), size, device, pretrained=pretrained)


def plan_run(label, method, original, *, term, device):
    """The :class:`Run` of one method. Raises UserError if its folder has another run's result."""
    args = original.args
    options = unlearn.method_options(method, args)
    recipe = unlearn.method_recipe(method, args, original.meta, device)
    recipe = unlearn.fit_epochs(recipe, options, len(original.split.retain))
    identity = run_identity(original, recipe, options, term=term)
    files = unlearn.RunFiles(original.folder / label)
    earlier_meta = unlearn.already_done(files.model_path, identity, args)
    if earlier_meta:
        print(f"{files.model_path}: already done; pass --overwrite to run it again")
    return Run(
        label=label,
        method=method,
        original=original,
        recipe=recipe,
        options=options,
        term=term,
        identity=identity,
        files=files,
        earlier_meta=earlier_meta,
    )


def run_identity(original, recipe, options, *, term):
    """Everything that determines the weights of a run."""
    identity = asdict(recipe) if recipe else {}
    identity |= options
    identity |= {"original": original.weights, "forget_set": original.split.fingerprint}
    if options.get("mask_path"):
        mask = unlearn.read_mask(options["mask_path"], original.model)
        identity["mask_path"] = checkpoint.weights_hash(mask)
    if term is not None:
        identity |= {"alpha": term.alpha, "delta": term.delta, "lamda": term.lamda}
        identity["loss"] = term.form
    return identity


# ---------------------------------------------------------------- the runs


def run_all(runs, data, device, *, make_term):
    """The meta of every run, or its UserError, in order. Runs that are done are not repeated."""
    args = runs[0].original.args
    pending = [run for run in runs if not run.earlier_meta]
    if args.jobs > 1:
        tasks = [(run.original.args, run.label, run.method, make_term) for run in pending]
        results = distributed.run_jobs(unlearn_in_job, tasks, args.jobs)
    else:
        results = (unlearn_or_fail(run, data, device) for run in pending)
    for run in runs:
        yield run.earlier_meta or next(results)


def unlearn_or_fail(run, data, device):
    """:func:`unlearn_and_save`, or the UserError that ended it."""
    try:
        return unlearn_and_save(run, data, device)
    except UserError as error:
        return error


def unlearn_in_job(args, label, method, make_term):
    """One run in a process of ``--jobs``, from its flags. Returns its meta."""
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))
    original = read_original(args, data, device)
    term = make_term(args, data, original.split) if make_term else None
    run = plan_run(label, method, original, term=term, device=device)
    with distributed.prefixed_output(utils.job_title(args)):
        return run.earlier_meta or unlearn_and_save(run, data, device)


def unlearn_and_save(run, data, device):
    """Unlearn with one method and save the model. Returns its meta, with time and accuracies."""
    args, split = run.original.args, run.original.split
    job = unlearn.Job(
        name=run.method.name,
        label=run.label,
        model=copy.deepcopy(run.original.model),
        data=data,
        split=split,
        recipe=run.recipe,
        seed=args.seed,
        options=run.options,
        new_model=partial(initial_network, run, data, device),
        term=run.term,
        compile=args.compile,
    )
    meta = utils.describe_run(args, data, device) | {
        "method": run.label,
        "identity": run.identity,
        "recipe": asdict(run.recipe) if run.recipe else None,
        "options": run.options,
        "unlearn_type": args.unlearn_type,
        "forget_set": split.fingerprint,
        "num_forget": len(split.forget),
        "original_seconds": run.original.meta.get("seconds"),
    }
    meta = unlearn.run_and_save(job, run.method.run, run.files, meta=meta, args=args)
    if not distributed.rank():
        (run.files.folder / unlearn.FAILURE_FILE).unlink(missing_ok=True)
    if run.term is not None and (advice := run.term.advice()):
        print(f"{run.label}: {advice}")
    return meta


def initial_network(run, data, device):
    """A network as it was before any training on this data, with pre-trained weights if any."""
    args = run.original.args
    utils.seed_everything(args.seed, run.method.name, "initialisation")
    return build_network(args, data, device, pretrained=True)


def table_row(run, meta):
    """The row of a complete run."""
    row = {"method": run.label, "seconds": meta["seconds"]}
    return row | (meta["recipe"] or {}) | meta["accuracies"]


def other_runs_can_continue(error):
    """Whether the remaining runs can start after an error.

    With several processes, an error other than divergence may have reached only one of them, and
    the others would wait for it.
    """
    return distributed.world_size() == 1 or isinstance(error, unlearn.Diverged)


def record_failure(run, error):
    """Print an error and save it in the folder of the run. Returns the row of the table."""
    seed = run.original.args.seed
    failure = {"forget_set": run.original.split.fingerprint, "error": str(error)}
    utils.save_json(run.files.folder / unlearn.FAILURE_FILE, failure)
    print(f"{run.label} (seed {seed}) failed: {error}")
    note = f"seed {seed}: {error}" if run.original.args.seeds else str(error)
    return {"method": run.label, "note": note}


if __name__ == "__main__":
    utils.run_script(main)
