"""Evaluate models: accuracy, membership attacks, conformal metrics, and the gap to Retrain.

    python main_evaluate.py --data_name digits --unlearn_name all --alphas 0.01,0.02,0.05

compares the methods in the run folder with the original model and with Retrain:

    flags → split → logits of each model → metrics → results.json → tables, pictures, report

The network runs once per model: its logits are kept in logits.npz, and every later evaluation reads
them. results.json is the record of a model. results.csv, results.tex, classes.csv, the pictures and
report.html are made from the records of all models that were measured under the same settings. With
--seeds 1,2,3 there are also means and standard deviations over the seeds. With --split_seed as
well, the distributions over the trainings are compared (ensembles.csv).
"""

import utils  # before torch

# isort: split
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import merge_adapters  # noqa: F401  # merge: delete this line and the file
import metrics
import models
import unlearn
import unlearn_cpu
from metrics import classwise, comparison, conformal, ensembles, probe, samples, scores
from metrics.report import figures, latex, notes, page, tables, verdicts
from metrics.report.tables import KEYS, RESPLITS
from models import checkpoint, distributed, inference
from models.errors import NotFinite

SET_SIZES = (1, 5)  # set sizes c of ECF@c and EuCF@c, in labels
RELEARN_RATE = 0.001
MOST_FAKE = 18  # images of a fake_forgotten.png
RETAIN_SAMPLE = 1000  # retain images whose margins are compared over trainings
PICTURES = ("scores.png", "relearn.png", "q_hat.png")  # those that some evaluations do not draw


def main():
    flags = parse_flags()
    device = utils.pick_device(flags)
    data = utils.read_data(flags, device, models.input_size(flags.model_name))
    flags.cal_sizes = flags.cal_sizes or [utils.default_cal_size(data)]

    seeds = []
    for args in utils.each_seed(flags):
        evaluation = start_evaluation(args, data, device)
        paths = locate_models(args.unlearn_name, args.model_dir, evaluation.folder)
        saved_models = read_models(paths, evaluation)
        with utils.unfinished_folder(evaluation.folder) as unfinished:
            measured = measure_models(saved_models, evaluation)
            if distributed.rank():
                continue  # the first process alone makes tables
            measured |= recorded_models(measured, args.model_dir, evaluation)
            results = compare_models(measured, evaluation)
            save_results(results, measured, evaluation, unfinished)
        seeds.append(results)

    if distributed.rank():
        return 0
    rows, ensemble_rows = [row for seed in seeds for row in seed.rows], []
    if flags.seeds:
        rows = verdicts.summarise_seeds(in_order(rows))
        ensemble_rows = compare_trainings(seeds)
        save_summary(rows, ensemble_rows, flags, data, device)
    print_results(rows, seeds, flags)
    if flags.seeds:
        print_trainings(ensemble_rows, flags)
    return 0


# ---------------------------------------------------------------- flags


def parse_flags():
    parser = utils.make_parser(__doc__)
    methods = "original and the methods in the run folder"
    utils.add_scenario_flags(parser, methods, unlearn.MODEL_FILE)
    add = parser.add_argument_group("evaluation").add_argument
    size = "images per forward pass (default: chosen to fit the CPU cache or the GPU memory)"
    add("--batch_size", type=utils.number(int, 1), help=size)
    alphas = "comma-separated miscoverage levels"
    add("--alphas", type=utils.list_of(utils.ALPHA), default="0.05,0.1,0.15,0.2", help=alphas)
    default = "default: 2000, or a fifth of the held-out images if that is fewer"
    sizes = f"comma-separated numbers of calibration images ({default})"
    add("--cal_sizes", type=utils.list_of(utils.number(int, 1)), help=sizes)
    resplits = "random calibration/test resplits to average over; 1 uses the split alone"
    add("--resplits", type=utils.number(int, 1), default=100, help=f"number of {resplits}")
    relearn = "train each model for K steps, and measure relearning of the forget images"
    add("--relearn", type=utils.number(int, 0), default=0, metavar="K", help=relearn)
    sources = utils.list_of(utils.one_of(figures.RELEARNED))
    tenth = "forget (a tenth of the forget images; the others are measured)"
    kinds = (
        f"comma-separated images for --relearn: {tenth}, retain (all forget images are measured)"
    )
    add("--relearn_on", type=sources, default="forget", help=kinds)
    columns = "columns of the printed tables; results.csv and report.html always have all"
    add("--columns", choices=["short", "all"], default="short", help=columns)
    add("--no_pictures", action="store_true", help="write no figures and no report.html")
    names = ", ".join(scores.NAMES)
    score = f"comma-separated non-conformity scores: {names}"
    add("--score", type=utils.list_of(utils.one_of(scores.NAMES)), default="thr", help=score)
    return parser.parse_args()


@dataclass(frozen=True)
class Evaluation:
    """What one seed's evaluation measures: the flags as values.

    ``folder`` is the scenario's folder. ``draws`` (R×P) order the held-out images of ``held_out``
    (indices P), see :class:`metrics.Outputs`. ``network`` builds the network on its first call.
    ``model_facts`` are what a checkpoint must agree with, ``description`` is the record of this run.
    """

    data: utils.Data
    split: utils.Split
    folder: Path
    settings: metrics.Settings
    cal_sizes: list[int]
    held_out: torch.Tensor
    draws: torch.Tensor
    seed: int
    split_seed: int
    batch_size: int | None
    relearn_steps: int
    relearn_on: list[str]
    has_pictures: bool
    compares_trainings: bool
    forget_class: str
    network: Callable
    model_facts: dict
    wandb_mode: str
    description: dict

    @property
    def class_wise(self):
        """Whether whole classes or subclasses are forgotten."""
        return bool(self.split.forget_classes)

    @property
    def keys(self):
        """(score, calibration size, α) of every row of a model, in the order of the table."""
        return [
            (score.name, size, alpha)
            for score in self.settings.scores
            for size in self.cal_sizes
            for alpha in self.settings.alphas
        ]

    def settings_of(self, weights):
        """What a model's numbers depend on beside a row's key. Equal settings share a table."""
        return {
            "cal_size": max(self.cal_sizes),
            "resplits": len(self.draws),
            "seed": self.seed,
            "split_seed": self.split_seed,
            "forget_set": self.split.fingerprint,
            "data": self.data.fingerprint,
            "weights": weights,
        }


def start_evaluation(args, data, device):
    """The :class:`Evaluation` that the flags of one seed ask for."""
    scenario = utils.scenario_of(args)
    split = utils.make_split(data, scenario, max(args.cal_sizes))
    held_out = torch.cat([split.calibration, split.test, split.forget_test]).cpu()
    names = data.subclass_names if scenario.unlearn_type == "subclass" else data.classes

    @cache
    def network():
        size = len(data.classes), data.train.size, device
        return models.build_model(args, *size, pretrained=False)

    chosen = tuple(scores.Score(name, seed=args.seed) for name in args.score)
    return Evaluation(
        data,
        split,
        folder=utils.run_folder(args, data) / split.folder,
        settings=metrics.Settings(tuple(args.alphas), chosen, SET_SIZES, seed=args.seed),
        cal_sizes=args.cal_sizes,
        held_out=held_out,
        draws=metrics.draw_splits(len(held_out), args.resplits, utils.split_seed(args)),
        seed=args.seed,
        split_seed=utils.split_seed(args),
        batch_size=args.batch_size,
        relearn_steps=args.relearn,
        relearn_on=args.relearn_on,
        has_pictures=not args.no_pictures,
        compares_trainings=bool(args.seeds) and args.split_seed is not None,
        forget_class=", ".join(names[number] for number in split.forget_classes),
        network=network,
        model_facts=utils.model_facts(args, data),
        wandb_mode=args.wandb_mode,
        description=utils.describe_run(args, data, device) | {"forget_set": split.fingerprint},
    )


# ---------------------------------------------------------------- models on disk


@dataclass
class SavedModel:
    """A model on disk, of which the model file may be missing if its logits are kept.

    Files about the model go to ``folder``, their names begin with ``prefix``. ``meta`` records how
    it was made, ``weights`` is the hash of its weights.
    """

    name: str
    path: Path
    folder: Path
    prefix: str
    logits_path: Path
    meta: dict = field(default_factory=dict)
    weights: str = ""

    def path_of(self, file):
        """The path of a file about the model, such as samples.csv."""
        return self.folder / f"{self.prefix}{file}"

    @property
    def original(self):
        """The hash of the original model's weights, None if it is unknown."""
        if self.name == "original":
            return self.weights
        return self.meta.get("identity", {}).get("original")


def locate_models(items, model_dir, folder):
    """{method: model file} of the models of ``--unlearn_name``, the original model first.

    ``folder`` is the scenario's folder. A bare name in ``model_dir`` is a file of each method's
    folder, and a path is the file of one method. Raises UserError where there is no model.
    """
    known = ["original", *unlearn.METHODS, *unlearn_cpu.METHODS]
    in_folder = names_in(folder, model_dir)
    path = utils.locate(model_dir, folder.parent)
    if path != folder.parent / model_dir:
        names = utils.method_names(items, known + in_folder)
        if len(names) > 1:
            reason = "is one file; name one method with --unlearn_name"
            raise utils.UserError(f"--model_dir {model_dir} {reason}")
        paths = {names[0]: path}
    else:
        names = in_folder
        if "all" not in items:
            names = utils.method_names(items, dict.fromkeys(known + in_folder))
        if not names:
            remedy = "run main_unlearn.py with the same flags first"
            raise utils.UserError(f"{folder}: no method with a {model_dir}; {remedy}")
        paths = {name: folder / name / model_dir for name in names if name != "original"}
    original = folder.parent / "original_model.pth"
    if original.exists() or logits_beside(original).exists() or "original" in names:
        paths = {"original": paths.get("original", original)} | paths
    return paths


def names_in(folder, model_dir):
    """The methods that left a model or logits in the scenario's folder, in the table's order."""
    files = [*folder.glob(f"*/{model_dir}"), *folder.glob("*/logits.npz")]
    return sorted({path.parent.name for path in files}, key=position)


def position(name):
    """Sorts methods: the original model, Retrain, the methods, their CPU variants, all others."""
    known = ["original", "retrain", *unlearn.METHODS, *unlearn_cpu.METHODS]
    return known.index(name) if name in known else len(known), name


def logits_beside(original):
    """Where the logits of the run folder's original model are, for all of its scenarios."""
    return original.with_name("original_logits.npz")


def read_models(paths, evaluation):
    """The :class:`SavedModel` of each {method: path}, all of them checked before any is measured.

    Raises UserError for a model of another forget set, original model, data set or network.
    """
    saved_models = [read_model(name, path, evaluation) for name, path in paths.items()]
    first = {saved.original: saved.path for saved in reversed(saved_models) if saved.original}
    if len(first) > 1:
        one, other, *_ = first.values()
        remedy = "unlearn again with --overwrite"
        raise utils.UserError(f"{other} and {one}: not from one original model; {remedy}")
    return saved_models


def read_model(name, path, evaluation):
    """The :class:`SavedModel` of one method, checked. Its weights are not kept in memory."""
    folder, prefix = evaluation.folder / name, ""
    if path.parent not in (folder, evaluation.folder.parent):  # the path of --model_dir
        folder, prefix = path.parent, f"{path.stem}."
    logits_path = folder / f"{prefix}logits.npz"
    if name == "original" and not prefix:
        logits_path = logits_beside(path)
    saved = SavedModel(name, path, folder, prefix, logits_path)
    if path.exists() or not logits_path.exists():
        state, saved.meta = checkpoint.read(path, "make it first with the same flags")
        saved.weights = saved.meta.get("weights") or checkpoint.weights_hash(state)
    else:
        saved.weights = read_logits(saved, evaluation).weights
        record = read_json(saved.path_of("results.json"))
        if record.get("weights") == saved.weights:
            made = record.keys() - {"metrics", "evaluation"}
            saved.meta = {key: value for key, value in record.items() if key in made}
    check_model(saved, evaluation)
    return saved


def check_model(saved, evaluation):
    """Raise UserError for a model of another network, data set, forget set or split.

    With another split its training calibration images would be scored.
    """
    meta, split_seed = saved.meta, evaluation.split_seed
    checkpoint.check_meta(saved.path, meta, evaluation.model_facts)
    forget_set, made_with = meta.get("forget_set"), meta.get("split_seed")
    if forget_set not in (None, evaluation.split.fingerprint):
        difference = f"({forget_set}) than the flags select ({evaluation.split.fingerprint})"
        remedy = "pass the --seed, --split_seed and unlearning flags that made it"
        raise utils.UserError(f"{saved.path}: unlearned another forget set {difference}; {remedy}")
    if forget_set is not None and made_with not in (None, split_seed):
        difference = f"unlearned with split seed {made_with}, and the flags select {split_seed}"
        raise utils.UserError(f"{saved.path}: {difference}; pass --split_seed {made_with}")


def read_json(path):
    """A record, empty if there is none or it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# ---------------------------------------------------------------- logits


def read_logits(saved, evaluation):
    """The kept :class:`inference.Logits` of a model. None where the network has to run.

    Without a model file the logits are those of any program, and have to fit the data: raises
    UserError as :func:`inference.read_logits` does.
    """
    if not saved.logits_path.exists():
        return None
    data = evaluation.data
    logits = inference.read_logits(
        saved.logits_path,
        num_train=len(data.train),
        num_held_out=len(data.held_out),
        num_classes=len(data.classes),
        data=data.fingerprint,
        weights=saved.weights if saved.path.exists() else None,
    )
    if logits is not None and not logits.data:
        print(f"{saved.logits_path}: data not named, so only shapes are checked; add the text")
        print(f"  data={data.fingerprint}")
    return logits


def run_network(saved, evaluation):
    """One pass over all images. Saves logits.npz. → (:class:`inference.Logits`, probe accuracies)

    The accuracies are those of a linear probe of the features, for class-wise forgetting only.
    """
    data, size = evaluation.data, evaluation.batch_size
    model = load_network(saved, evaluation)
    compute = inference.compute_features if evaluation.class_wise else inference.compute_logits
    with naming(saved.path):
        train, held_out = (
            compute(model, images, torch.arange(len(images), device=images.labels.device), size)
            for images in (data.train, data.held_out)
        )
    logits = inference.Logits(train[0], held_out[0], saved.weights, data.fingerprint)
    inference.save_logits(saved.logits_path, **logits._asdict())
    if not evaluation.class_wise:
        return logits, {}
    features = train[-1].numpy(), held_out[-1].numpy()
    return logits, probe_features(*features, outputs_of(logits, evaluation), evaluation)


def load_network(saved, evaluation):
    """The network with the weights of a model file."""
    state, _ = checkpoint.read(saved.path)
    model = evaluation.network()
    checkpoint.load_weights(model, state, saved.path)
    return model


@contextmanager
def naming(subject):
    """Put ``subject`` in front of the error that a network's outputs are not finite."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{subject}: {error}") from error


def probe_features(train, held_out, outputs, evaluation):
    """Accuracies of a linear probe of the features of all images (NumPy, train N×F, held-out P×F).

    It is fitted to training images, and tested on the test images.
    """
    data, split = evaluation.data, evaluation.split
    fitted = torch.cat([split.retain, split.forget]).cpu().numpy()
    labels, held_out_labels = (
        images.labels.cpu().numpy() for images in (data.train, data.held_out)
    )
    tests = {"probe_forget": outputs.forget_test(), "probe_retain": outputs.test()}
    tests = {key: evaluation.held_out[rows].numpy() for key, rows in tests.items()}
    return probe.linear_probe(
        train[fitted],
        labels[fitted],
        tests={key: (held_out[rows], held_out_labels[rows]) for key, rows in tests.items()},
        seed=evaluation.seed,
    )


def outputs_of(logits, evaluation):
    """The :class:`metrics.Outputs` of a model: its logits by the sets of the split."""
    data, split = evaluation.data, evaluation.split

    def output(images, values, indices):
        return metrics.Output(values, images.labels.cpu()).select(indices.cpu())

    return metrics.Outputs(
        forget=output(data.train, logits.train, split.forget),
        retain=output(data.train, logits.train, split.retain),
        held_out=output(data.held_out, logits.held_out, evaluation.held_out),
        cal_sizes=evaluation.cal_sizes,
        draws=evaluation.draws,
        forgotten=held_out_forgotten(split) if evaluation.class_wise else None,
    )


def held_out_forgotten(split):
    """Which held-out images are of the forgotten class: calibration, test, then forget_test."""
    retained = torch.zeros(len(split.test), dtype=torch.bool)
    forgotten = torch.ones(len(split.forget_test), dtype=torch.bool)
    return torch.cat([split.is_forgotten.bool(), retained, forgotten])


# ---------------------------------------------------------------- records


class Measured(NamedTuple):
    """A model and its record, the content of results.json."""

    saved: SavedModel
    record: dict


def measure_models(saved_models, evaluation):
    """Measure one model after the other. → {method: :class:`Measured`}"""
    measured = {}
    for number, saved in enumerate(saved_models, 1):
        start = time.perf_counter()
        record = measure_model(saved, evaluation)
        record["evaluation"]["seconds"] = seconds = time.perf_counter() - start
        measured[saved.name] = Measured(saved, record)
        progress = f"{number} of {len(saved_models)}"
        print(f"{saved.name}: measured in {seconds:.1f} s ({progress})", flush=True)
    return measured


def measure_model(saved, evaluation):
    """The record of a model: how it was made, and every number measured of it.

    Numbers of an earlier record with the same settings and weights are kept beside the new ones.
    """
    earlier = earlier_metrics(saved, evaluation, but=("resplits",))
    probe_accuracy = {key: earlier[key] for key in probe.COLUMNS if key in earlier}
    logits = read_logits(saved, evaluation)
    needs_probe = evaluation.class_wise and not probe_accuracy and saved.path.exists()
    if logits is None or needs_probe:
        logits, probe_accuracy = run_network(saved, evaluation)
    outputs = outputs_of(logits, evaluation)
    scalars, set_rows = metrics.evaluate(metrics.ConformalScores(outputs, evaluation.settings))
    curves = {key: curve for key, curve in earlier.items() if key in CURVES.values()}
    curves |= relearn_all(saved, outputs, evaluation)

    earlier = earlier_metrics(saved, evaluation)
    rows = {row_key(row): row for row in earlier.get("conformal", [])}
    rows |= {key: block_of(key) | tables.flat(row) for key, row in set_rows.items()}
    numbers = probe_accuracy | scalars | {"num_forget": len(evaluation.split.forget)}
    numbers |= {key: saved.meta.get(key) for key in ("seconds", "peak_memory")}
    return saved.meta | {
        "method": saved.name,
        "weights": saved.weights,
        "metrics": numbers | {"conformal": list(rows.values())} | curves,
        "evaluation": evaluation.description | {"settings": evaluation.settings_of(saved.weights)},
    }


def earlier_metrics(saved, evaluation, but=()):
    """The numbers in a model's results.json. {} if they are of other weights or settings.

    The settings named in ``but`` may differ.
    """
    record = read_json(saved.path_of("results.json"))
    measured = record.get("evaluation", {}).get("settings", {})
    settings = evaluation.settings_of(saved.weights)
    if any(measured.get(key) != settings[key] for key in settings if key not in but):
        return {}
    return record["metrics"]


def recorded_models(measured, model_dir, evaluation):
    """{method: :class:`Measured`} of models that earlier evaluations measured with the same
    settings, have not changed since, and come from the same original model.
    """
    originals = {model.saved.original for model in measured.values()} - {None}
    recorded = {}
    for name in names_in(evaluation.folder, model_dir):
        if name in measured:
            continue
        try:
            saved = read_model(name, evaluation.folder / name / Path(model_dir).name, evaluation)
            has_logits = read_logits(saved, evaluation) is not None
        except utils.UserError:
            continue  # nobody asked for this model
        numbers = earlier_metrics(saved, evaluation)
        is_related = saved.original is None or {saved.original} >= originals
        if numbers and has_logits and is_related:
            recorded[name] = Measured(saved, saved.meta | {"metrics": numbers})
    return recorded


def block_of(key):
    """The columns of a (score, calibration size, α)."""
    return dict(zip(KEYS, key, strict=False))


def row_key(row):
    """The (score, calibration size, α) of a row."""
    return tuple(row[name] for name in KEYS[:-1])


def from_record(cells):
    """Numbers as they were before :func:`metrics.report.tables.flat` and JSON: null is NaN."""
    row = {key: math.nan if value is None else value for key, value in cells.items()}
    for key in [key for key in row if key + RESPLITS in row]:
        row[key] = metrics.Spread(row[key], row.pop(key + RESPLITS))
    return row


# ---------------------------------------------------------------- relearning

CURVES = {"forget": "relearn", "retain": "relearn_retain"}  # names in the record


def relearn_all(saved, outputs, evaluation):
    """{name in the record: curve} of :func:`relearn` for each of --relearn_on."""
    curves = {}
    for source in evaluation.relearn_on if evaluation.relearn_steps else []:
        if not saved.path.exists():
            print(f"{saved.path}: no model file, so --relearn leaves {saved.name} out")
            continue
        model = load_network(saved, evaluation)
        with naming(f"--relearn {evaluation.relearn_steps} of {saved.path}"):
            curves[CURVES[source]] = relearn(model, outputs, evaluation, source)
    return curves


def relearn(model, outputs, evaluation, source):
    """Train for a few steps, and measure whether the forget images are relearned.

    From the ``source`` "forget", a tenth of the forget images are trained on, and the other nine
    tenths are measured. From "retain", the retain images are trained on, and all forget images are
    measured (2505.22310). SGD at a constant rate, in batches of at most 64 augmented images.

    Returns {"score", "alpha"} and {"step", "accuracy", "coverage"}, lists over 0, 1, 2, 4, … and
    the last step. Coverage is that of the first score and α, under the q̂ of the same model from
    the retained classes' calibration images, NaN where these are too few. Raises UserError for
    "forget" with fewer than two forget images, and where training diverges.
    """
    from models.training import Job, Recipe  # merge: to the top

    data, split, settings = evaluation.data, evaluation.split, evaluation.settings
    trained, measured = relearning_images(split, evaluation.seed, source)
    calibration = outputs.calibration(max(evaluation.cal_sizes))  # positions in split.calibration
    curve = {"score": settings.scores[0].name, "alpha": settings.alphas[0]}
    curve |= {"step": [], "accuracy": [], "coverage": []}

    def measure(step, forget, held_out):
        numbers = conformal.accuracy_and_coverage(forget, held_out, settings)
        curve["step"].append(step)
        curve["accuracy"].append(numbers.accuracy)
        curve["coverage"].append(numbers.coverage)

    measure(0, outputs.forget.select(measured), outputs.held_out.select(calibration))
    stops = relearning_stops(evaluation.relearn_steps)
    counts = np.diff([0, *stops]).tolist()
    purpose = ("order",) if source == "forget" else ("order", source)
    batches = shuffled_batches(trained, utils.generator(evaluation.seed, "relearn", *purpose))
    job = Job(
        name="relearn",
        label="relearn",
        model=model,
        data=data,
        split=split,
        recipe=Recipe(len(stops), RELEARN_RATE, milestones=[len(stops)]),
        seed=evaluation.seed,
        quiet=True,
    )
    for epoch, stop, count in zip(job.epochs(), stops, counts, strict=True):
        for batch in epoch.visit((next(batches), 0) for _ in range(count)):
            epoch.step(F.cross_entropy(batch.logits, batch.labels), batch)
        forget = take(split.forget, measured)
        held_out = take(split.calibration, calibration)
        size = evaluation.batch_size
        measure(
            stop,
            metrics.Output(*inference.compute_logits(job.model, data.train, forget, size)),
            metrics.Output(*inference.compute_logits(job.model, data.held_out, held_out, size)),
        )
    return curve


def relearning_images(split, seed, source):
    """What :func:`relearn` trains on (indices), and which forget images it measures (positions)."""
    if source == "retain":
        return split.retain, torch.arange(len(split.forget))
    if len(split.forget) < 2:
        raise utils.UserError("--relearn: one forget image cannot be divided; forget more images")
    order = torch.from_numpy(utils.permutation(seed, "relearn", len(split.forget)))
    count = max(1, len(order) // 10)
    return take(split.forget, order[:count]), order[count:]


def relearning_stops(num_steps):
    """1, 2, 4, … and ``num_steps``: the numbers of steps after which relearning is measured."""
    powers = [2**power for power in range(num_steps.bit_length()) if 2**power < num_steps]
    return [*powers, num_steps]


def shuffled_batches(indices, rng, batch_size=64):
    """Endless near-equal batches of all ``indices``, shuffled again for each pass."""
    num_batches = math.ceil(len(indices) / batch_size)
    while True:
        order = torch.randperm(len(indices), generator=rng)
        yield from take(indices, order).tensor_split(num_batches)


def take(indices, positions):
    """``indices[positions]`` on the device of ``indices``."""
    return indices[positions.to(indices.device)]


# ---------------------------------------------------------------- views of the records


@dataclass
class ModelResult:
    """Everything that tables and pictures show of one model.

    ``numbers`` are those of the model as a whole, ``set_rows`` those of its prediction sets by
    (score, calibration size, α), ``distances`` those to Retrain's outputs. ``training`` is what
    several trainings of one split are compared by.
    """

    saved: SavedModel
    numbers: dict
    set_rows: dict[tuple, dict]
    distances: dict
    class_rows: list[dict]
    sample_rows: list[dict]
    curves: dict[str, dict]
    training: ensembles.Training | None = None
    histogram: dict | None = None
    fake_sheet: bytes | None = None


class SeedResults(NamedTuple):
    """The :class:`ModelResult` of each method of one seed, and its rows of results.csv."""

    models: dict[str, ModelResult]
    rows: list[dict]

    @property
    def class_rows(self):
        return [row for model in self.models.values() for row in model.class_rows]


def compare_models(measured, evaluation):
    """The :class:`SeedResults` of {method: :class:`Measured`}, compared with the original model,
    Retrain and finetune.
    """
    measured = {name: measured[name] for name in sorted(measured, key=position)}
    references = {
        name: outputs_of(read_logits(measured[name].saved, evaluation), evaluation)
        for name in ("original", "retrain")
        if name in measured
    }
    models = {name: view(model, references, evaluation) for name, model in measured.items()}
    for name, model in models.items():
        if "retrain" in models:
            compare_with_retrain(name, model, models["retrain"])
    for name, model in models.items():
        if "finetune" in models and name != "original":
            model.numbers |= comparison.costs(model.numbers, models["finetune"].numbers)
    return SeedResults(models, rows_of(models, evaluation))


def view(measured, references, evaluation):
    """The :class:`ModelResult` of one model, not yet compared with Retrain's numbers.

    ``references`` are the outputs of the original model and of Retrain, if there are any.
    """
    saved, settings = measured.saved, evaluation.settings
    outputs = outputs_of(read_logits(saved, evaluation), evaluation)
    conformal_scores = metrics.ConformalScores(outputs, settings)
    numbers = dict(measured.record["metrics"])
    rows = {row_key(row): from_record(row) for row in numbers.pop("conformal")}
    curves = {source: numbers.pop(key) for source, key in CURVES.items() if key in numbers}
    numbers, distances = from_record(numbers), {}
    if "original" in references and saved.name != "original":
        original = predictions_of(references["original"])
        numbers["changed"] = comparison.changed_share(predictions_of(outputs), original)
    if "retrain" in references:
        answers = answers_of(outputs), answers_of(references["retrain"])
        distances = comparison.answer_distances(*answers)
    class_rows = classwise.class_rows(conformal_scores, evaluation.data.classes)
    first = {"score": settings.scores[0].name, "alpha": settings.alphas[0]}
    result = ModelResult(
        saved,
        numbers,
        set_rows={key: rows[key] for key in evaluation.keys if key in rows},
        distances=distances,
        class_rows=[{"method": saved.name} | row for row in class_rows],
        sample_rows=name_samples(conformal_scores, evaluation),
        curves={
            source: curve for source, curve in curves.items() if first.items() <= curve.items()
        },
    )
    if evaluation.compares_trainings:
        result.training = ensembles.describe(conformal_scores, retain_sample(evaluation))
    if evaluation.has_pictures:
        result.fake_sheet = draw_fake_sheet(conformal_scores, saved.name, evaluation)
        if first["score"] == "thr":
            result.histogram = figures.histogram_data(conformal_scores)
    return result


def predictions_of(outputs):
    """The predicted classes of the retain, forget and held-out images, one after the other."""
    image_sets = (outputs.retain, outputs.forget, outputs.held_out)
    return torch.cat([images.logits.argmax(dim=1) for images in image_sets])


def answers_of(outputs):
    return comparison.Answers(outputs.forget, outputs.held_out.select(outputs.test()))


def retain_sample(evaluation):
    """Positions of the retain images whose margins are compared over trainings of one split."""
    count = len(evaluation.split.retain)
    order = utils.permutation(evaluation.split_seed, "ensembles", count)
    return torch.from_numpy(order[:RETAIN_SAMPLE])


def name_samples(conformal_scores, evaluation):
    """The rows of samples.csv, with the names of files and classes."""
    data, forget = evaluation.data, evaluation.split.forget
    names = data.train.names and [data.train.names[index] for index in forget.tolist()]
    rows = samples.sample_rows(conformal_scores, forget, names)
    for row in rows:
        row["label"] = data.classes[row["label"]]
        row["prediction"] = data.classes[row["prediction"]]
    return rows


def compare_with_retrain(name, model, retrain):
    """Add the gap, signed differences, verdicts and RTE to a model's numbers.

    The verdicts' tolerance is two standard errors over the images. Over several seeds it is
    Retrain's spread (:func:`metrics.report.verdicts.summarise_seeds`).
    """
    for key, row in model.set_rows.items():
        if key in retrain.set_rows:
            reference = retrain.set_rows[key]
            row |= verdicts.compare_sets(row, reference, model.numbers["num_forget"])
    model.numbers |= verdicts.compare_model(name, model.numbers, retrain.numbers)
    model.numbers |= model.distances


def rows_of(models, evaluation):
    """The rows of results.csv: one per (score, calibration size, α) and model, failures last."""
    origin = {"forget_set": evaluation.split.fingerprint}
    if evaluation.class_wise:
        origin["forget_class"] = evaluation.forget_class
    failed = failures(evaluation.folder, evaluation.split.fingerprint)
    rows = []
    for key in evaluation.keys:
        for name, model in models.items():
            if key in model.set_rows:
                row = block_of(key) | {"method": name} | model.numbers | model.set_rows[key]
                rows.append(row | origin | {"weights": model.saved.weights})
        for name, reason in failed.items():
            rows.append(
                block_of(key) | {"method": name, "note": f"seed {evaluation.seed}: {reason}"}
            )
    return rows


def failures(folder, fingerprint):
    """{method: reason} of the methods that failed on the forget set and left no model."""
    reasons = {}
    for path in sorted(folder.glob(f"*/{unlearn.FAILURE_FILE}")):
        record = read_json(path)
        if (
            record.get("forget_set") == fingerprint
            and not (path.parent / unlearn.MODEL_FILE).exists()
        ):
            reasons[path.parent.name] = record.get("error")
    return {name: reasons[name] for name in sorted(reasons, key=position)}


def in_order(rows):
    """The rows of several seeds by block, each block in the order of the methods."""
    blocks = {}
    for row in rows:
        blocks.setdefault(row_key(row), []).append(row)
    for block in blocks.values():
        block.sort(key=lambda row: ("note" in row, position(row["method"])))
    return [row for block in blocks.values() for row in block]


def compare_trainings(seeds):
    """The rows of ensembles.csv: the models of several seeds with one split. Else []."""
    trainings = {}
    for seed in seeds:
        for name, model in seed.models.items():
            if model.training is not None:
                trainings.setdefault(name, []).append(model.training)
    stacked = {name: ensembles.Trainings.stack(models) for name, models in trainings.items()}
    return ensembles.rows(stacked)


# ---------------------------------------------------------------- files


class Picture(NamedTuple):
    """A PNG with its caption."""

    caption: str
    png: bytes


def save_results(results, measured, evaluation, unfinished):
    """Write the files of one seed, and log the same to wandb."""
    folder, description = evaluation.folder, evaluation.description
    pictures = draw_pictures(results, evaluation) if evaluation.has_pictures else {}
    files = {path: picture.png for path, picture in pictures.items()}
    files |= table_files(folder, results.rows)
    files[folder / "classes.csv"] = tables.as_csv(results.class_rows)
    for model in results.models.values():
        files[model.saved.path_of("samples.csv")] = tables.as_csv(model.sample_rows)
    for model in measured.values():
        if "evaluation" in model.record:  # measured now
            files[model.saved.path_of("results.json")] = model.record
    if pictures:
        scope = Scope(evaluation.data, folder.name, description, [evaluation.seed])
        files[folder / "report.html"] = report_page(results.rows, pictures, scope)
    write_files(files, unfinished)
    if pictures:
        remove_outdated(folder, pictures)
    numbers = {
        f"{name}/{key}": value
        for name, model in results.models.items()
        for key, value in model.numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    with utils.WandbRun(folder, "evaluation", description, evaluation.wandb_mode) as run:
        log_tables(run, results.rows, pictures)
        run.log(numbers)
    forgotten = f"forget {evaluation.split.describe()}"
    print(f"{folder / 'results.csv'}: {len(results.models)} models, {forgotten}")


def save_summary(rows, ensemble_rows, flags, data, device):
    """Write the files over the seeds, and log the same to wandb."""
    seeds = ",".join(map(str, flags.seeds))
    folder = utils.run_folder(flags, data, seeds) / utils.scenario_folder(flags, data)
    forget_sets = dict.fromkeys(row["forget_set"] for row in rows if row.get("forget_set"))
    description = utils.describe_run(flags, data, device)
    description["forget_set"] = "; ".join(forget_sets) or "a different one for each seed"
    drawn = {}
    if not flags.no_pictures:
        drawn = figures.overview(rows, flags.score[0], max(flags.cal_sizes))
        if ensemble_rows:
            dots = figures.klom_dots(ensemble_rows)
            drawn["klom.png"] = ("Distance to retrained models (KLOM)", dots)
    pictures = as_pictures(folder, drawn)
    files = {path: picture.png for path, picture in pictures.items()}
    files |= table_files(folder, rows, ending=tables.SEEDS)
    if ensemble_rows:
        files[folder / "ensembles.csv"] = tables.as_csv(ensemble_rows)
    if pictures:
        scope = Scope(data, folder.name, description, flags.seeds, flags.split_seed)
        files[folder / "report.html"] = report_page(rows, pictures, scope, ensemble_rows)
    with utils.unfinished_folder(folder) as unfinished:
        write_files(files, unfinished)
    with utils.WandbRun(folder, "evaluation", description, flags.wandb_mode) as run:
        log_tables(run, rows, pictures)
        if ensemble_rows:
            run.log_table("ensembles", [tables.without_nan(row) for row in ensemble_rows])
    print(f"{folder / 'results.csv'}: mean and standard deviation over seeds {seeds}")


def table_files(folder, rows, **options):
    """{path: text} of results.csv and results.tex."""
    csv = tables.as_csv(rows, **options)
    return {folder / "results.csv": csv, folder / "results.tex": latex.document(rows)}


def log_tables(run, rows, pictures):
    """Log the rows of results.csv and the pictures to wandb."""
    run.log_table("evaluation", [tables.without_nan(tables.flat(row)) for row in rows])
    run.log_pictures({picture.caption: path for path, picture in pictures.items()})


def write_files(files, unfinished):
    """Write {path: text, bytes or JSON record}.

    The files below the folder of ``unfinished`` replace earlier ones when all of them are written.
    """
    save = {str: utils.save_text, bytes: utils.save_bytes, dict: utils.save_json}
    for path, content in files.items():
        target = path
        if path.is_relative_to(unfinished.parent):
            target = unfinished / path.relative_to(unfinished.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
        save[type(content)](target, content)
    utils.move_up(unfinished)
    for report in (path for path in files if path.name == "report.html"):
        print(f"{report}: tables and figures in one file")


# ---------------------------------------------------------------- pictures and report


def draw_pictures(results, evaluation):
    """{path: :class:`Picture`} of all models together, and the fake sheet of each."""
    alpha, cal_size = evaluation.settings.alphas[0], max(evaluation.cal_sizes)
    models, drawn = results.models, {}
    drawn |= figures.overview(results.rows, evaluation.settings.scores[0].name, cal_size)
    if histograms := {name: model.histogram for name, model in models.items() if model.histogram}:
        drawn["scores.png"] = "Scores", figures.score_histograms(histograms, alpha)
    curves = {
        source: {
            name: model.curves[source] for name, model in models.items() if source in model.curves
        }
        for source in CURVES
    }
    if curves := {source: of_models for source, of_models in curves.items() if of_models}:
        drawn["relearn.png"] = "Relearning", figures.relearn_curves(curves, alpha)
    q_hats = {name: model.saved.meta.get("q_hats") for name, model in models.items()}
    if q_hats := {name: values for name, values in q_hats.items() if values}:
        drawn["q_hat.png"] = "q̂ of the conformal loss by epoch", figures.q_hat_curves(q_hats)
    pictures = as_pictures(evaluation.folder, drawn)
    for name, model in models.items():
        path = model.saved.path_of("fake_forgotten.png")
        pictures[path] = Picture(f"Most fake-forgotten images of {name}", model.fake_sheet)
    return pictures


def as_pictures(folder, drawn):
    """{path: :class:`Picture`} of {file name: (caption, Figure)}."""
    return {
        folder / file: Picture(caption, page.png(figure))
        for file, (caption, figure) in drawn.items()
    }


def draw_fake_sheet(conformal_scores, name, evaluation):
    """The PNG of the forget images of one model that are fake-forgotten most clearly."""
    data, forget = evaluation.data, evaluation.split.forget
    most_fake = samples.most_fake(conformal_scores, MOST_FAKE)
    images = None if most_fake is None else []
    for fake in most_fake or ():
        pixels = data.train.pixels[int(forget[fake.position])].permute(1, 2, 0).cpu().numpy()
        label = int(conformal_scores.outputs.forget.labels[fake.position])
        images.append(figures.SheetImage(pixels, label, fake.prediction, fake.labels))
    title = f"{name}: misclassified forget images nearest to their label (label → answer, {{set}})"
    return page.png(figures.fake_sheet(images, data.classes, title))


def remove_outdated(folder, pictures):
    """Remove pictures of earlier evaluations that this one did not draw."""
    for path in (folder / file for file in PICTURES):
        if path not in pictures:
            path.unlink(missing_ok=True)


class Scope(NamedTuple):
    """What a report is about: data, the scenario's folder, the record of the run, and the seeds."""

    data: utils.Data
    scenario: str
    description: dict
    seeds: list[int]
    split_seed: int | None = None


def report_page(rows, pictures, scope, ensemble_rows=()):
    """report.html with all tables and ``pictures`` {path: :class:`Picture`}, as text."""
    data, description = scope.data, scope.description
    facts = {
        "model": description["model_name"],
        "data": f"{data.tag}: {len(data.train)} training images, {len(data.classes)} classes",
        "forgotten": f"{scope.scenario}, forget set {description['forget_set']}",
        "seed": ", ".join(map(str, scope.seeds)),
        "device": description["device"],
        "date": description["date"],
    }
    shown_tables = tables.full_tables(rows)
    if ensemble_rows:
        heading = tables.ensemble_heading(len(scope.seeds), scope.split_seed)
        shown_tables.append(tables.ensemble_table(ensemble_rows, heading))
    return page.page(
        f"Unlearning on {data.tag}: {scope.scenario}",
        facts=facts,
        shown_tables=shown_tables,
        pictures={picture.caption: picture.png for picture in pictures.values()},
        details={"Flags": description["flags"], "Versions": description["versions"]},
    )


# ---------------------------------------------------------------- the terminal


def print_results(rows, seeds, flags):
    """Print the tables, and notes on the numbers that need them."""
    if flags.columns == "all":
        for table in tables.full_tables(rows):
            tables.print_table(table.columns, table.rows)
            print()
    else:
        for line in tables.short_lines(rows, over_seeds=bool(flags.seeds)):
            print(line)
    seed_rows = [row for seed in seeds for row in seed.rows]
    class_rows = [row for seed in seeds for row in seed.class_rows]
    lines = notes.missing_q_hats(seed_rows, class_rows)
    lines += [*notes.advice([seed.rows for seed in seeds]), *notes.unchanged(seed_rows)]
    for line in lines:
        print(line)


def print_trainings(ensemble_rows, flags):
    """Print the comparison over trainings of one forget set, or what it needs."""
    count = len(flags.seeds)
    if ensemble_rows:
        heading = tables.ensemble_heading(count, flags.split_seed)
        for line in ["", *tables.ensemble_lines(ensemble_rows, heading)]:
            print(line)
        if count < ensembles.FEW:
            print(f"only {count} trainings: too few to compare distributions; train more seeds")
    elif flags.split_seed is None and count > 1:
        print(
            "each seed forgets other images, so distributions over trainings are not compared; "
            "pass --split_seed to all four scripts"
        )
    elif count > 1:
        print("distributions over trainings are not compared; evaluate retrain of every seed too")


if __name__ == "__main__":
    utils.run_script(main)
