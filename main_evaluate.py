"""Evaluate models: accuracy, membership attacks, conformal metrics, and the gap to Retrain.

    python main_evaluate.py --data_name digits --unlearn_name all --alphas 0.01,0.02,0.05

compares the methods in the run folder with the original model and with Retrain:

    flags → split → logits of each model → metrics → results.json → tables, pictures, report

The network runs once per model: later evaluations read its logits.npz. results.json is the record
of a model. Everything else is made from the records of all models that were measured under the same
settings. --seeds 1,2,3 adds means and standard deviations over the seeds. With --split_seed as
well, the distributions over the trainings are compared (ensembles.csv).
"""

import utils  # before torch

# isort: split
import itertools
import json
import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

import metrics
import models
import unlearn
import unlearn_cpu
from metrics import classwise, comparison, conformal, ensembles, intervals, probe, samples, scores
from metrics.report import differences, figures, latex, notes, page, tables
from metrics.report.tables import KEYS, RESPLITS, block_of
from models import checkpoint, distributed, inference, relearning
from models.errors import NotFinite

MOST_FAKE = 18  # images of a fake_forgotten.png
RETAIN_SAMPLE = 1000  # retain images whose margins are compared over trainings
LOGITS, ORIGINAL_LOGITS = "logits.npz", "original_logits.npz"  # the latter is in the run folder
CURVES = {"forget": "relearn", "retain": "relearn_retain"}  # --relearn_on, and names in the record
PICTURES = ("scores.png", "relearn.png", "q_hat.png", "compute.png")  # not of every evaluation


def main():
    flags = parse_flags()
    device = utils.pick_device(flags)
    data = utils.read_data(flags, device, models.input_size(flags.model_name))
    flags.cal_sizes = flags.cal_sizes or [utils.default_cal_size(data)]

    seeds = []
    for args in utils.each_seed(flags):
        evaluation = start_evaluation(args, data, device)
        paths = locate_models(args.unlearn_name, args.model_dir, evaluation.folder)
        requested = read_models(paths, evaluation)
        measure_models(requested, evaluation)
        if not distributed.rank():  # the first process alone makes tables
            recorded = recorded_models(requested, evaluation)
            seeds.append(make_views(requested + recorded, evaluation))
            save_seed(seeds[-1], requested, evaluation)
    if distributed.rank():
        return 0

    rows, ensemble_rows = [row for views in seeds for row in views.rows], []
    if flags.seeds:
        blocks = [*dict.fromkeys(map(block_of, rows))]  # in the order of the first seed
        rows.sort(key=lambda row: (blocks.index(block_of(row)), *position(row["method"])))
        rows = differences.summarise_seeds(rows)
        ensemble_rows = compare_trainings(seeds) if flags.split_seed is not None else []
        save_summary(rows, ensemble_rows, flags, data, device)
    print_results(rows, seeds, flags)
    print_trainings(ensemble_rows, flags)
    return 0


# ---------------------------------------------------------------- flags


def parse_flags():
    parser = utils.make_parser(__doc__)
    utils.add_scenario_flags(parser, "original and the methods in the run folder", utils.MODEL_FILE)
    add = parser.add_argument_group("evaluation").add_argument
    size = "images per forward pass (default for 32×32: 64 on a CPU, 1,024 on a GPU)"
    add("--batch_size", type=utils.number(int, 1), help=size)
    alphas = "comma-separated miscoverage levels"
    add("--alphas", type=utils.list_of(utils.ALPHA), default="0.05,0.1,0.15,0.2", help=alphas)
    sizes = "comma-separated numbers of calibration images (default: 2000, at most 1/5 of held-out)"
    add("--cal_sizes", type=utils.list_of(utils.number(int, 1)), help=sizes)
    draws = "number of random calibration/test resplits to average over; 1 uses the split alone"
    add("--resplits", type=utils.number(int, 1), default=100, help=draws)
    relearn = "train each model for K steps, and measure relearning of the forget images"
    add("--relearn", type=utils.number(int, 0), default=0, metavar="K", help=relearn)
    kinds = "comma-separated: forget (train a tenth, measure the rest), retain (measure all)"
    add("--relearn_on", type=utils.list_of(str, figures.RELEARNED), default="forget", help=kinds)
    columns = "columns of the printed tables; results.csv and report.html always have all"
    add("--columns", choices=["short", "all"], default="short", help=columns)
    add("--no_pictures", action="store_true", help="write no figures and no report.html")
    score = f"comma-separated non-conformity scores: {', '.join(scores.NAMES)}"
    add("--score", type=utils.list_of(str, scores.NAMES), default="thr", help=score)
    return parser.parse_args()


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation of one seed measures: the flags ``args`` and what follows from them.

    ``folder`` is the scenario's folder. ``keys`` are the (score, calibration size, α) of a model's
    rows. ``draws`` (R×P) are orders of the P images ``held_out``, see :class:`metrics.Outputs`.
    ``network`` builds the network on its first call.
    ``description`` records this run. Models with equal ``description["settings"]`` share a table.
    """

    data: utils.Data
    split: utils.Split
    folder: Path
    settings: metrics.Settings
    args: Namespace
    keys: list[tuple]
    held_out: torch.Tensor
    draws: torch.Tensor
    network: Callable
    description: dict


def start_evaluation(args, data, device):
    """The :class:`Evaluation` that the flags of one seed ask for."""
    scenario, split_seed = utils.scenario_of(args), utils.split_seed(args)
    split = utils.make_split(data, scenario, max(args.cal_sizes))
    # In this order: the first row of draws is the split itself.
    held_out = torch.cat([split.calibration, split.test, split.forget_test]).cpu()
    names = data.subclass_names if scenario.unlearn_type == "subclass" else data.classes
    description = utils.describe_run(args, data, device) | {"forget_set": split.fingerprint}
    description["forget_class"] = ", ".join(names[number] for number in split.forget_classes)
    settings = {"cal_size": max(args.cal_sizes), "resplits": args.resplits, "seed": args.seed}
    settings |= {"split_seed": split_seed, "forget_set": split.fingerprint}
    description["settings"] = settings | {"data": data.fingerprint}
    chosen = tuple(scores.Score(name, seed=args.seed) for name in args.score)
    size = len(data.classes), data.train.size, device
    return Evaluation(
        data,
        split,
        folder=utils.run_folder(args, data) / split.folder,
        settings=metrics.Settings(tuple(args.alphas), chosen, seed=args.seed),
        args=args,
        keys=[*itertools.product(args.score, args.cal_sizes, args.alphas)],
        held_out=held_out,
        draws=metrics.draw_splits(len(held_out), args.resplits, split_seed),
        network=cache(partial(models.build_model, args, *size, pretrained=False)),
        description=description,
    )


# ---------------------------------------------------------------- models on disk


@dataclass
class SavedModel:
    """A model on disk. Its file ``path`` may be missing if its logits are kept in ``logits_path``.

    Files about the model go to ``folder``, and their names begin with ``prefix``. ``meta`` records
    how the model was made, ``weights`` is their hash, ``numbers`` is everything measured of it.
    """

    name: str
    path: Path
    folder: Path
    prefix: str
    logits_path: Path
    meta: dict = field(default_factory=dict)
    weights: str = ""
    numbers: dict = field(default_factory=dict)

    def path_of(self, file):
        """The path of a file about the model, such as samples.csv."""
        return self.folder / f"{self.prefix}{file}"

    @property
    def original(self):
        """The hash of the original model's weights, None if it is unknown."""
        identity = self.meta.get("identity", {})
        return self.weights if self.name == "original" else identity.get("original")


def locate_models(items, model_dir, folder):
    """{method: model file} of the models of ``--unlearn_name``, the original model first.

    ``folder`` is the scenario's folder. A bare name in ``model_dir`` is a file of each method's
    folder, and a path is the file of one method. Raises UserError where there is no model.
    """
    names = in_folder = names_in(folder, model_dir)
    if "all" not in items:
        known = dict.fromkeys(["original", *unlearn.METHODS, *unlearn_cpu.METHODS, *in_folder])
        names = unlearn.method_names(items, known)
    if not names:
        remedy = "run main_unlearn.py with the same flags first"
        raise utils.UserError(f"{folder}: no method with a {model_dir}; {remedy}")
    path = utils.locate(model_dir, folder)
    paths = {name: folder / name / model_dir for name in names if name != "original"}
    if path != folder / model_dir:
        if len(names) > 1:
            reason = "is one file; name one method with --unlearn_name"
            raise utils.UserError(f"--model_dir {model_dir} {reason}")
        paths = {names[0]: path}
    original = folder.parent / "original_model.pth"
    if original.exists() or (folder.parent / ORIGINAL_LOGITS).exists() or "original" in names:
        paths = {"original": paths.get("original", original)} | paths
    return paths


def names_in(folder, model_dir):
    """The methods that left a model or logits in the scenario's folder, in the table's order."""
    files = [*folder.glob(f"*/{Path(model_dir).name}"), *folder.glob(f"*/{LOGITS}")]
    return sorted({path.parent.name for path in files}, key=position)


def position(name):
    """Sorts methods: the original model, Retrain, the methods, their CPU variants, all others."""
    known = ["original", "retrain", *unlearn.METHODS, *unlearn_cpu.METHODS]
    return known.index(name) if name in known else len(known), name


def read_models(paths, evaluation):
    """The :class:`SavedModel` of each {method: path}, all checked before any is measured.

    Raises UserError for a model of another forget set, original model, data set or network.
    """
    saved_models = [read_model(name, path, evaluation) for name, path in paths.items()]
    originals = {saved.original: saved.path for saved in saved_models if saved.original}
    if len(originals) > 1:  # differences between their methods would mean nothing
        listed = " and ".join(map(str, originals.values()))
        reason = "not from one original model; unlearn again with --overwrite"
        raise utils.UserError(f"{listed}: {reason}")
    return saved_models


def read_model(name, path, evaluation):
    """The :class:`SavedModel` of one method. Its weights are not kept in memory.

    Raises UserError for a model of another network, data set, forget set or split.
    """
    folder, prefix = evaluation.folder / name, ""
    if path.parent not in (folder, evaluation.folder.parent):  # the path of --model_dir
        folder, prefix = path.parent, f"{path.stem}."
    logits_path = folder / f"{prefix}{LOGITS}"
    if name == "original" and not prefix:
        logits_path = path.with_name(ORIGINAL_LOGITS)
    saved = SavedModel(name, path, folder, prefix, logits_path)
    if path.exists() or not logits_path.exists():
        state, saved.meta = checkpoint.read(path, "make it first with the same flags")
        saved.weights = saved.meta.get("weights") or checkpoint.weights_hash(state)
    else:
        logits = read_logits(saved, evaluation)
        if not logits.data:
            print(f"{logits_path}: no fingerprint; data={evaluation.data.fingerprint} is assumed")
        tensors = {"train": logits.train, "held_out": logits.held_out}
        saved.weights = logits.weights or checkpoint.weights_hash(tensors)
        record = read_json(saved.path_of("results.json"))
        if record.get("weights") == saved.weights:
            saved.meta = {k: record[k] for k in record if k not in ("metrics", "evaluation")}
    # With another split, calibration images that the model was trained on would be scored.
    facts = utils.model_facts(evaluation.args, evaluation.data)
    checkpoint.check_meta(saved.path, saved.meta, facts)
    for key in ("forget_set", "split_seed") if "forget_set" in saved.meta else ():
        made_with, asked_for = saved.meta.get(key), evaluation.description[key]
        if made_with not in (None, asked_for):
            difference = f"{key} {made_with}, and the flags select {asked_for}"
            remedy = "pass the --seed, --split_seed and unlearning flags that made it"
            raise utils.UserError(f"{saved.path}: unlearned with {difference}; {remedy}")
    return saved


def read_json(path):
    """A record. {} where there is none or it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# ---------------------------------------------------------------- logits


def read_logits(saved, evaluation):
    """The kept :class:`inference.Logits` of a model. None where the network has to run.

    Logits without a model file are those of any program. Raises UserError if they do not fit the
    data, as :func:`inference.read_logits` does.
    """
    if not saved.logits_path.exists():
        return None
    data = evaluation.data
    sizes = {"num_train": len(data.train), "num_held_out": len(data.held_out)}
    weights = saved.weights if saved.path.exists() else None
    about = {"num_classes": len(data.classes), "data": data.fingerprint, "weights": weights}
    return inference.read_logits(saved.logits_path, **sizes, **about)


def run_network(saved, evaluation):
    """One pass over all images. Saves logits.npz. → (:class:`inference.Logits`, probe accuracies)

    The accuracies are those of a linear probe of the features, for class-wise forgetting only. It
    is fitted to training images and tested on test images.
    """
    data, split, size = evaluation.data, evaluation.split, evaluation.args.batch_size
    model, class_wise = load_network(saved, evaluation), bool(split.forget_classes)
    compute = inference.compute_features if class_wise else inference.compute_logits
    train, held_out = (
        compute(model, images, torch.arange(len(images)).to(images.labels.device), size)
        for images in (data.train, data.held_out)
    )
    logits = inference.Logits(train[0], held_out[0], saved.weights, data.fingerprint)
    inference.save_logits(saved.logits_path, **logits._asdict())
    if not class_wise:
        return logits, {}
    outputs = outputs_of(logits, evaluation)
    tests = {"probe_forget": outputs.forget_test(), "probe_retain": outputs.test()}
    for key, positions in tests.items():
        tested = evaluation.held_out[positions]
        tests[key] = held_out[2][tested].numpy(), held_out[1][tested].numpy()
    fitted = torch.cat([split.retain, split.forget]).cpu()
    features, labels = train[2][fitted].numpy(), train[1][fitted].numpy()
    seed = evaluation.settings.seed
    return logits, probe.linear_probe(features, labels, tests=tests, seed=seed)


def load_network(saved, evaluation):
    """The network with the weights of a model file."""
    model = evaluation.network()
    checkpoint.load_weights(model, checkpoint.read(saved.path)[0], saved.path)
    return model


def outputs_of(logits, evaluation):
    """The :class:`metrics.Outputs` of a model: its logits by the sets of the split."""
    data, split = evaluation.data, evaluation.split
    train = metrics.Output(logits.train, data.train.labels.cpu())
    held_out = metrics.Output(logits.held_out, data.held_out.labels.cpu())
    forgotten = None
    if split.forget_classes:
        forgotten = torch.isin(evaluation.held_out, split.forget_test.cpu())
        forgotten[: len(split.calibration)] = split.is_forgotten
    return metrics.Outputs(
        forget=train.select(split.forget.cpu()),
        retain=train.select(split.retain.cpu()),
        held_out=held_out.select(evaluation.held_out),
        cal_sizes=evaluation.args.cal_sizes,
        draws=evaluation.draws,
        forgotten=forgotten,
    )


# ---------------------------------------------------------------- numbers and records


def measure_models(saved_models, evaluation):
    """Measure the ``numbers`` of one model after the other."""
    for number, saved in enumerate(saved_models, 1):
        start = time.perf_counter()
        try:
            saved.numbers = measure_model(saved, evaluation)
        except NotFinite as error:
            raise NotFinite(f"{saved.path}: {error}") from error
        seconds, progress = time.perf_counter() - start, f"{number} of {len(saved_models)}"
        print(f"{saved.name}: measured in {seconds:.1f} s ({progress})", flush=True)


def measure_model(saved, evaluation):
    """Every number measured of a model, as its results.json has them under ``metrics``.

    Rows and curves of an earlier record with the same settings and weights are kept.
    """
    logits = read_logits(saved, evaluation)
    probed = recorded_numbers(saved, evaluation, but="resplits")
    probe_accuracy = {key: probed[key] for key in probe.COLUMNS if key in probed}
    needs_probe = evaluation.split.forget_classes and not probe_accuracy and saved.path.exists()
    if logits is None or needs_probe:
        logits, probe_accuracy = run_network(saved, evaluation)
    outputs = outputs_of(logits, evaluation)
    scalars, set_rows = metrics.evaluate(metrics.ConformalScores(outputs, evaluation.settings))
    earlier = recorded_numbers(saved, evaluation)
    rows = {block_of(row): row for row in earlier.get("conformal", ())}
    for key, row in set_rows.items():
        rows[key] = dict(zip(KEYS, key, strict=False)) | tables.flat(row)
    numbers = probe_accuracy | scalars | {"num_forget": len(evaluation.split.forget)}
    numbers |= {key: saved.meta.get(key) for key in ("seconds", "peak_memory")}
    numbers |= {key: earlier[key] for key in CURVES.values() if key in earlier}
    for source in evaluation.args.relearn_on if evaluation.args.relearn else ():
        if saved.path.exists():
            numbers[CURVES[source]] = measure_relearning(saved, outputs, evaluation, source)
        else:
            print(f"{saved.path}: --relearn needs the model file; {saved.name} is left out")
    return numbers | {"conformal": list(rows.values())}


def recorded_numbers(saved, evaluation, but=None):
    """The numbers in a model's results.json. {} if they are of other weights or settings.

    The setting ``but`` may differ.
    """
    record = read_json(saved.path_of("results.json"))
    recorded = record.get("evaluation", {}).get("settings", {})
    settings = evaluation.description["settings"]
    same = all(recorded.get(key) == settings[key] for key in settings if key != but)
    return record["metrics"] if same and record.get("weights") == saved.weights else {}


def recorded_models(requested, evaluation):
    """The :class:`SavedModel` of the models of earlier evaluations that join the tables.

    They were measured with the same settings, are unchanged, and come from the same original model
    as the ``requested`` ones.
    """
    names, originals = {saved.name for saved in requested}, {saved.original for saved in requested}
    recorded = []
    for name in names_in(evaluation.folder, utils.MODEL_FILE):
        if name in names:
            continue
        try:
            saved = read_model(name, evaluation.folder / name / utils.MODEL_FILE, evaluation)
            has_logits = read_logits(saved, evaluation) is not None
        except utils.UserError:
            continue  # this model was not asked for
        saved.numbers = recorded_numbers(saved, evaluation)
        shown = set(evaluation.keys) & set(map(block_of, saved.numbers.get("conformal", ())))
        is_related = originals <= {None} or saved.original in originals | {None}
        if shown and has_logits and is_related:
            recorded.append(saved)
    return recorded


def from_record(cells):
    """Numbers as they were before :func:`metrics.report.tables.flat` and JSON: null is NaN."""
    known = {key: value for key, value in cells.items() if key not in KEYS}
    row = {key: math.nan if value is None else value for key, value in known.items()}
    for key in [key for key in row if key + RESPLITS in row]:
        row[key] = metrics.Spread(row[key], row.pop(key + RESPLITS))
    return row


def measure_relearning(saved, outputs, evaluation, source):
    """The record of a model that learns images of ``source`` again, see :mod:`models.relearning`.

    {"score", "alpha"} (the first ones) and lists over the steps 0, 1, 2, 4, … and the last: "step",
    and "accuracy" and "coverage" of forget images. Coverage is under the q̂ of the same model from
    the retained classes' calibration images, and NaN where these are too few.
    """
    data, split, settings = evaluation.data, evaluation.split, evaluation.settings
    trained, measured = relearning.divide(split, settings.seed, source)
    positions = outputs.calibration(max(evaluation.args.cal_sizes))  # in split.calibration
    forget, held_out = outputs.forget.select(measured.cpu()), outputs.held_out.select(positions)
    points = [(0, *conformal.accuracy_and_coverage(forget, held_out, settings))]
    held_out = split.calibration[positions.to(measured.device)]
    image_sets = (data.train, split.forget[measured]), (data.held_out, held_out)
    network, num_steps = load_network(saved, evaluation), evaluation.args.relearn
    about = {"trained": trained, "source": source, "seed": settings.seed}
    for step, model in relearning.relearn(network, data, split, num_steps=num_steps, **about):
        forget, held_out = (
            metrics.Output(*inference.compute_logits(model, *images, evaluation.args.batch_size))
            for images in image_sets
        )
        points.append((step, *conformal.accuracy_and_coverage(forget, held_out, settings)))
    steps, accuracy, coverage = map(list, zip(*points, strict=True))
    curve = {"score": settings.scores[0].name, "alpha": settings.alphas[0], "step": steps}
    return curve | {"accuracy": accuracy, "coverage": coverage}


# ---------------------------------------------------------------- views of records and logits


@dataclass
class ModelView:
    """Everything that tables and pictures show of one model.

    ``numbers`` are those of the model as a whole, ``set_rows`` those of its prediction sets by
    (score, calibration size, α), ``distances`` those to Retrain's outputs. ``curves`` are those of
    :func:`relearn` by source. ``training`` is what trainings of one split are compared by.
    ``influences`` are those of images on ``set_rows`` and, under None, on ``numbers``.
    """

    saved: SavedModel
    numbers: dict
    set_rows: dict[tuple, dict]
    class_rows: list[dict]
    sample_rows: list[dict]
    training: ensembles.Trainings
    curves: dict[str, dict]
    distances: dict
    destination_rows: list[dict]
    influences: dict
    histogram: dict | None = None
    fake_sheet: Figure | None = None


@dataclass
class Views:
    """The :class:`ModelView` of each method of one seed, and the rows of the tables."""

    models: dict[str, ModelView]
    rows: list[dict]
    class_rows: list[dict]
    destination_rows: list[dict]


def make_views(saved_models, evaluation):
    """The :class:`Views` of all models, compared with the original model and Retrain."""
    saved_of = {saved.name: saved for saved in sorted(saved_models, key=lambda s: position(s.name))}
    present = [name for name in ("original", "retrain") if name in saved_of]
    references = {name: read_logits(saved_of[name], evaluation) for name in present}
    views = {name: view_model(saved, references, evaluation) for name, saved in saved_of.items()}
    bare, retrain = {name: dict(view.numbers) for name, view in views.items()}, views.get("retrain")
    for name, view in views.items():
        if retrain:
            for key in view.set_rows.keys() & retrain.set_rows.keys():
                row, both = view.set_rows[key], (view.influences[key], retrain.influences[key])
                row |= differences.compare(row, retrain.set_rows[key], both)
            both = view.influences[None], retrain.influences[None]
            view.numbers |= differences.compare(bare[name], bare["retrain"], both)
            view.numbers |= differences.compare_model(name, bare[name], bare["retrain"])
            view.numbers |= view.distances
    class_rows = [row for view in views.values() for row in view.class_rows]
    destination_rows = [row for view in views.values() for row in view.destination_rows]
    return Views(views, rows_of(views, evaluation), class_rows, destination_rows)


def view_model(saved, references, evaluation):
    """The :class:`ModelView` of one model, not yet compared with the numbers of others.

    ``references`` are the logits of the original model and of Retrain, if there are any.
    """
    data, forget, settings = evaluation.data, evaluation.split.forget, evaluation.settings
    numbers, distances = dict(saved.numbers), {}
    first = settings.scores[0].name, settings.alphas[0]
    set_rows = {block_of(row): from_record(row) for row in numbers.pop("conformal")}
    curves = {source: numbers.pop(key) for source, key in CURVES.items() if key in numbers}
    numbers = from_record(numbers)
    logits = read_logits(saved, evaluation)
    outputs = outputs_of(logits, evaluation)
    if saved.name != "original" and "original" in references:
        both = logits, references["original"]
        both = [torch.cat([each.train, each.held_out[evaluation.held_out]]) for each in both]
        numbers["changed"] = comparison.changed_share(*(each.argmax(dim=1) for each in both))
    destination_rows = classwise.destination_rows(outputs, data.classes)
    if "retrain" in references:
        reference = outputs_of(references["retrain"], evaluation)
        expected = classwise.destination_rows(reference, data.classes)
        distances = classwise.total_variation(destination_rows, expected)
        distances |= comparison.prediction_distances(outputs, reference)
    conformal_scores = metrics.ConformalScores(outputs, settings)
    set_rows = {key: set_rows[key] for key in evaluation.keys if key in set_rows}
    influences = {None: intervals.model_influences(outputs)}
    for key in set_rows if distances else ():
        influences[key] = intervals.set_influences(conformal_scores, *key)
    class_rows = classwise.class_rows(conformal_scores, data.classes)
    file_names = data.train.names and [data.train.names[index] for index in forget.tolist()]
    sample_rows = samples.sample_rows(conformal_scores, forget, file_names)
    for row in sample_rows:  # numbers of classes → names
        row |= {key: data.classes[row[key]] for key in ("label", "prediction")}
    split_seed, num_retain = evaluation.description["split_seed"], len(evaluation.split.retain)
    retain_sample = utils.permutation(split_seed, "ensembles", num_retain)[:RETAIN_SAMPLE]
    view = ModelView(
        saved,
        numbers,
        set_rows=set_rows,
        class_rows=[{"method": saved.name} | row for row in class_rows],
        sample_rows=sample_rows,
        training=ensembles.describe(conformal_scores, torch.from_numpy(retain_sample)),
        curves={key: c for key, c in curves.items() if (c["score"], c["alpha"]) == first},
        distances=distances,
        destination_rows=[{"method": saved.name} | row for row in destination_rows],
        influences=influences,
    )
    if not evaluation.args.no_pictures:
        view.fake_sheet = draw_fake_sheet(conformal_scores, saved.name, evaluation)
        view.histogram = figures.histogram_data(conformal_scores)
    return view


def rows_of(views, evaluation):
    """The rows of results.csv: one per (score, calibration size, α) and model, failures last.

    Failures are the methods that failed on the forget set and left no model.
    """
    description, rows, failures = evaluation.description, [], []
    for path in evaluation.folder.glob(f"*/{utils.FAILURE_FILE}"):
        record, has_model = read_json(path), path.with_name(utils.MODEL_FILE).exists()
        if record.get("forget_set") == description["forget_set"] and not has_model:
            note = f"seed {description['seed']}: {record.get('error')}"
            failures.append({"method": path.parent.name, "note": note})
    failures.sort(key=lambda failure: position(failure["method"]))
    origin = {key: description[key] for key in ("forget_set", "forget_class") if description[key]}
    for key in evaluation.keys:
        block = dict(zip(KEYS, key, strict=False))
        for name, view in views.items():
            if key in view.set_rows:
                row = block | {"method": name} | view.numbers | view.set_rows[key] | origin
                base_method = view.saved.meta.get("base_method") or name
                row |= {"base_method": base_method, "weights": view.saved.weights}
                rows.append(differences.with_words(row))
        rows += [block | failure for failure in failures]
    return rows


def compare_trainings(seeds):
    """The rows of ensembles.csv: the trainings of each method with one split. Or NotFinite."""
    trainings = {}
    for name, view in itertools.chain.from_iterable(views.models.items() for views in seeds):
        trainings.setdefault(name, []).append(view.training)
    joined = {name: ensembles.Trainings.join(models) for name, models in trainings.items()}
    try:
        return ensembles.rows(joined)
    except ValueError as error:
        raise NotFinite(str(error)) from error


# ---------------------------------------------------------------- files


def save_seed(views, requested, evaluation):
    """Save the files of one seed: the views of all models, the records of the requested ones."""
    folder, description = evaluation.folder, evaluation.description
    drawn, files = {}, {folder / "classes.csv": tables.as_csv(views.class_rows)}
    for saved in requested:
        record = {"method": saved.name, "weights": saved.weights, "metrics": saved.numbers}
        files[saved.path_of("results.json")] = saved.meta | record | {"evaluation": description}
    if views.destination_rows:
        files[folder / "destinations.csv"] = tables.as_csv(views.destination_rows)
    if not evaluation.args.no_pictures:
        drawn = draw_models(views, evaluation)
        for file in set(PICTURES) - drawn.keys():
            (folder / file).unlink(missing_ok=True)  # of an earlier evaluation
        drawn = {folder / file: figure for file, figure in drawn.items()}
    for name, view in views.models.items():
        files[view.saved.path_of("samples.csv")] = tables.as_csv(view.sample_rows)
        if drawn:
            caption = f"Most fake-forgotten images of {name}"
            drawn[view.saved.path_of("fake_forgotten.png")] = caption, view.fake_sheet
    about = {"data": evaluation.data, "description": description}
    save_views(folder, views.rows, files, drawn=drawn, **about)
    forgotten = f"forget {evaluation.split.describe()}"
    print(f"{folder / 'results.csv'}: {len(views.models)} models, {forgotten}")
    print(f"data={evaluation.data.fingerprint}")


def save_summary(rows, ensemble_rows, flags, data, device):
    """Save the tables and pictures over the seeds."""
    seeds = ",".join(map(str, flags.seeds))
    folder = utils.run_folder(flags, data, seeds) / utils.scenario_folder(flags, data)
    forget_sets = dict.fromkeys(row["forget_set"] for row in rows if row.get("forget_set"))
    description = utils.describe_run(flags, data, device)
    description["forget_set"] = "; ".join(forget_sets) or "a different one for each seed"
    description["seed"], drawn = seeds, {}
    if not flags.no_pictures:
        drawn = figures.overview(rows, flags.score[0], max(flags.cal_sizes), ensemble_rows)
    if drawn and ensemble_rows:
        drawn["klom.png"] = "Distance to retrained models (KLOM)", figures.klom_dots(ensemble_rows)
    about = {"data": data, "description": description, "ensemble_rows": ensemble_rows}
    paths = {folder / file: figure for file, figure in drawn.items()}
    save_views(folder, rows, {}, drawn=paths, **about, ending=tables.SEEDS)
    print(f"{folder / 'results.csv'}: mean and standard deviation over seeds {seeds}")


def save_views(folder, rows, files, *, drawn, data, description, ensemble_rows=(), **options):
    """Save ``files`` {path: text, bytes or record}, the tables of ``rows`` and the pictures.

    ``drawn`` is {path: (caption, Figure)}. The files in ``folder`` replace earlier ones when all of
    them are written. Logs tables and pictures to wandb as well.
    """
    pictures = {path: (caption, page.png(figure)) for path, (caption, figure) in drawn.items()}
    files[folder / "results.csv"] = tables.as_csv(rows, **options)
    files[folder / "results.tex"] = latex.document(rows)
    files |= {path: png for path, (_, png) in pictures.items()}
    if ensemble_rows:
        files[folder / "ensembles.csv"] = tables.as_csv(ensemble_rows)
    if pictures:
        embedded = dict(pictures.values())
        report = report_page(folder.name, rows, embedded, data, description, ensemble_rows)
        files[folder / "report.html"] = report
    with utils.unfinished_folder(folder, wait=60) as unfinished:  # sweep agents share it
        for path, content in files.items():
            if path.is_relative_to(folder):
                path = unfinished / path.relative_to(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
            utils.save(path, content)
        utils.move_up(unfinished)
    flags = description["flags"]
    about = {"mode": flags["wandb_mode"], "continued": True}
    with utils.WandbRun(folder, "evaluation", description, **about) as run:
        run.log_table("evaluation", [tables.flat(row) for row in rows])
        if ensemble_rows:
            run.log_table("ensembles", [tables.flat(row) for row in ensemble_rows])
        shown = itertools.product(rows, tables.SHORT_MODEL_KEYS)
        numbers = {f"{row['method']}/{key}": row[key] for row, key in shown if key in row}
        if len(flags["unlearn_name"]) == 1:  # a sweep's metric needs one name for all labels
            prefix = f"{flags['unlearn_name'][0]}/"
            numbers |= {key.removeprefix(prefix): value for key, value in numbers.items()}
        run.log({key: value for key, value in numbers.items() if isinstance(value, float)})
        run.log_pictures({caption: path for path, (caption, _) in pictures.items()})


def draw_models(views, evaluation):
    """{file name: (caption, Figure)} of all models of a seed together."""
    models, settings = views.models, evaluation.settings
    score, alpha = settings.scores[0].name, settings.alphas[0]
    drawn = figures.overview(views.rows, score, max(evaluation.args.cal_sizes))
    if score == "thr":
        histograms = {name: view.histogram for name, view in models.items()}
        drawn["scores.png"] = "Non-conformity scores", figures.score_histograms(histograms, alpha)
    curves = {}
    for name, view in models.items():
        for source, curve in view.curves.items():
            curves.setdefault(source, {})[name] = curve
    if curves:
        drawn["relearn.png"] = "Relearning", figures.relearn_curves(curves, alpha)
    q_hats = {name: view.saved.meta.get("q_hats") for name, view in models.items()}
    if views.destination_rows:
        figure = figures.destination_tables(views.destination_rows)
        drawn["destinations.png"] = "Predicted classes of the forgotten class's images", figure
    if q_hats := {name: values for name, values in q_hats.items() if values}:
        drawn["q_hat.png"] = "q̂ of the conformal loss by epoch", figures.q_hat_curves(q_hats)
    return drawn


def draw_fake_sheet(conformal_scores, name, evaluation):
    """The Figure of the forget images of one model that are fake-forgotten most clearly."""
    data, forget = evaluation.data, evaluation.split.forget
    most_fake = samples.most_fake(conformal_scores, MOST_FAKE)
    indices = forget.cpu()[[fake.position for fake in most_fake or ()]]
    pixels = data.train.pixels[indices].permute(0, 2, 3, 1).cpu().numpy()
    title = f"{name}: the clearest fake forgetting (label → prediction, {{set}})"
    return figures.fake_sheet(most_fake, pixels, classes=data.classes, title=title)


def report_page(scenario, rows, pictures, data, description, ensemble_rows=()):
    """report.html with all tables and ``pictures`` {caption: PNG}, as text."""
    flags, shown_tables = description["flags"], tables.full_tables(rows)
    facts = {
        "model": description["model_name"],
        "data": f"{data.tag}: {len(data.train)} training images, {len(data.classes)} classes",
        "forgotten": f"{scenario}, forget set {description['forget_set']}",
        "seed": str(description["seed"]),
        "device": description["device"],
        "date": description["date"],
        "intervals": "; ".join(notes.intervals(rows)) or "none",
    }
    if ensemble_rows:
        heading = tables.ensemble_heading(len(flags["seeds"]), flags["split_seed"])
        shown_tables.append(tables.filled_table(heading, ensembles.COLUMNS, ensemble_rows))
    details = {"Flags": flags, "Versions": description["versions"]}
    content = {"shown_tables": shown_tables, "pictures": pictures, "details": details}
    return page.page(f"Unlearning on {data.tag}: {scenario}", facts=facts, **content)


def print_results(rows, seeds, flags):
    """Print the tables, and notes on the numbers that need them."""
    if flags.columns == "all":
        for table in tables.full_tables(rows):
            tables.print_table(table.columns, table.rows)
            print()
    else:
        print("\n".join(tables.short_lines(rows, over_seeds=bool(flags.seeds))))
    seed_rows = [row for views in seeds for row in views.rows]
    class_rows = [row for views in seeds for row in views.class_rows]
    lines = notes.missing_q_hats(seed_rows, class_rows)
    lines += notes.unchanged(seed_rows) + notes.destroyed(seed_rows) + notes.intervals(rows)
    lines += notes.advice([views.rows for views in seeds]) + notes.empty_sets(seed_rows)
    for line in lines:
        print(line)


def print_trainings(ensemble_rows, flags):
    """Print the comparison over trainings of one forget set, or what it needs."""
    count = len(flags.seeds or ())
    if ensemble_rows:
        heading = tables.ensemble_heading(count, flags.split_seed)
        print("\n".join(["", *tables.ensemble_lines(ensemble_rows, heading)]))
        if count < ensembles.FEW:
            print(f"only {count} trainings: too few to compare distributions; train more seeds")
    elif count > 1:
        reason = "evaluate retrain too"
        if flags.split_seed is None:
            reason = "each seed forgets other images; pass --split_seed to all four scripts"
        print(f"distributions over trainings are not compared: {reason}")


if __name__ == "__main__":
    utils.run_script(main)
