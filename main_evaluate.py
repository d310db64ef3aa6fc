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
import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
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
LOGITS_FILE = "logits.npz"
CURVES = {"forget": "relearn", "retain": "relearn_retain"}  # sources and names in the record
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
        measure_models(saved_models, evaluation)
        if distributed.rank():
            continue  # the first process alone makes tables
        saved_models |= recorded_models(saved_models, args.model_dir, evaluation)
        seeds.append(compare_models(saved_models, evaluation))
        save_seed(seeds[-1], paths, evaluation)

    if distributed.rank():
        return 0
    rows, ensemble_rows = [row for seed in seeds for row in seed.rows], []
    if flags.seeds:
        rows = verdicts.summarise_seeds(in_order(rows))
        ensemble_rows = compare_trainings(seeds) if flags.split_seed is not None else []
        save_summary(rows, ensemble_rows, flags, data, device)
    print_results(rows, seeds, flags)
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
    """What the evaluation of one seed measures: the flags as values.

    ``folder`` is the scenario's folder. ``draws`` (R×P) are orders of the held-out images, see
    :class:`metrics.Outputs`. ``relearn_steps`` are {source: steps} of --relearn. ``network`` builds
    the network on its first call. A checkpoint must agree with ``model_facts``. ``description`` is
    the record of this run.
    """

    data: utils.Data
    split: utils.Split
    folder: Path
    settings: metrics.Settings
    cal_sizes: list[int]
    draws: torch.Tensor
    batch_size: int | None
    relearn_steps: dict[str, int]
    has_pictures: bool
    network: Callable
    model_facts: dict
    description: dict

    @property
    def held_out(self):
        """Indices P of the held-out images that calibrate and test, those of the split first."""
        return torch.cat([self.split.calibration, self.split.test, self.split.forget_test]).cpu()

    @property
    def keys(self):
        """(score, calibration size, α) of every row of a model, in the order of the table."""
        names = [score.name for score in self.settings.scores]
        return [*itertools.product(names, self.cal_sizes, self.settings.alphas)]

    def settings_of(self, weights):
        """What a model's numbers depend on, besides the key of a row."""
        return {
            "cal_size": max(self.cal_sizes),
            "resplits": len(self.draws),
            "seed": self.settings.seed,
            "split_seed": self.description["split_seed"],
            "forget_set": self.split.fingerprint,
            "data": self.data.fingerprint,
            "weights": weights,
        }


def start_evaluation(args, data, device):
    """The :class:`Evaluation` that the flags of one seed ask for."""
    scenario = utils.scenario_of(args)
    split = utils.make_split(data, scenario, max(args.cal_sizes))
    names = data.subclass_names if scenario.unlearn_type == "subclass" else data.classes
    description = utils.describe_run(args, data, device) | {"forget_set": split.fingerprint}
    if split.forget_classes:
        description["forget_class"] = ", ".join(names[number] for number in split.forget_classes)
    num_images = len(split.calibration) + len(split.test) + len(split.forget_test)
    size = len(data.classes), data.train.size, device
    chosen = tuple(scores.Score(name, seed=args.seed) for name in args.score)
    return Evaluation(
        data,
        split,
        folder=utils.run_folder(args, data) / split.folder,
        settings=metrics.Settings(tuple(args.alphas), chosen, SET_SIZES, seed=args.seed),
        cal_sizes=args.cal_sizes,
        draws=metrics.draw_splits(num_images, args.resplits, utils.split_seed(args)),
        batch_size=args.batch_size,
        relearn_steps=dict.fromkeys(args.relearn_on if args.relearn else (), args.relearn),
        has_pictures=not args.no_pictures,
        network=cache(partial(models.build_model, args, *size, pretrained=False)),
        model_facts=utils.model_facts(args, data),
        description=description,
    )


# ---------------------------------------------------------------- models on disk


@dataclass
class SavedModel:
    """A model on disk. Its file ``path`` may be missing if its logits are kept.

    Files about the model go to ``folder``, and their names begin with ``prefix``. ``meta`` records
    how it was made, ``weights`` is their hash, ``numbers`` is everything measured of it.
    """

    name: str
    path: Path
    folder: Path
    prefix: str = ""
    meta: dict = field(default_factory=dict)
    weights: str = ""
    numbers: dict = field(default_factory=dict)

    def path_of(self, file):
        """The path of a file about the model, such as samples.csv."""
        if self.name == "original" and file == LOGITS_FILE and not self.prefix:
            return logits_beside(self.path)
        return self.folder / f"{self.prefix}{file}"

    @property
    def original(self):
        """The hash of the original model's weights, None if it is unknown."""
        if self.name == "original":
            return self.weights
        return self.meta.get("identity", {}).get("original")


def logits_beside(original):
    """Where the logits of the run folder's original model are kept, for all scenarios."""
    return original.with_name("original_logits.npz")


def locate_models(items, model_dir, folder):
    """{method: model file} of the models of ``--unlearn_name``, the original model first.

    ``folder`` is the scenario's folder. A bare name in ``model_dir`` is a file of each method's
    folder, and a path is the file of one method. Raises UserError where there is no model.
    """
    names = in_folder = names_in(folder, model_dir)
    if "all" not in items:
        known = dict.fromkeys(["original", *unlearn.METHODS, *unlearn_cpu.METHODS, *in_folder])
        names = utils.method_names(items, known)
    path = utils.locate(model_dir, folder)
    is_one_file = path != folder / model_dir
    if is_one_file and len(names) != 1:
        reason = "is one file; name one method with --unlearn_name"
        raise utils.UserError(f"--model_dir {model_dir} {reason}")
    if not names:
        remedy = "run main_unlearn.py with the same flags first"
        raise utils.UserError(f"{folder}: no method with a {model_dir}; {remedy}")
    original, paths = folder.parent / "original_model.pth", {}
    if original.exists() or logits_beside(original).exists() or "original" in names:
        paths["original"] = original
    for name in names:
        if is_one_file or name != "original":
            paths[name] = path if is_one_file else folder / name / model_dir
    return paths


def names_in(folder, model_dir):
    """The methods that left a model or logits in the scenario's folder, in the table's order."""
    files = [*folder.glob(f"*/{model_dir}"), *folder.glob(f"*/{LOGITS_FILE}")]
    return sorted({path.parent.name for path in files}, key=position)


def position(name):
    """Sorts methods: the original model, Retrain, the methods, their CPU variants, all others."""
    known = ["original", "retrain", *unlearn.METHODS, *unlearn_cpu.METHODS]
    return known.index(name) if name in known else len(known), name


def read_models(paths, evaluation):
    """{method: :class:`SavedModel`} of {method: path}, all checked before any is measured.

    Raises UserError for a model of another forget set, original model, data set or network.
    """
    saved_models = {name: read_model(name, path, evaluation) for name, path in paths.items()}
    paths = {saved.original: saved.path for saved in saved_models.values() if saved.original}
    if len(paths) > 1:
        listed = " and ".join(map(str, paths.values()))
        reason = "not from one original model; unlearn again with --overwrite"
        raise utils.UserError(f"{listed}: {reason}")
    return saved_models


def read_model(name, path, evaluation):
    """The :class:`SavedModel` of one method, checked. Its weights are not kept in memory."""
    saved = SavedModel(name, path, evaluation.folder / name)
    if path.parent not in (saved.folder, evaluation.folder.parent):  # the path of --model_dir
        saved.folder, saved.prefix = path.parent, f"{path.stem}."
    if path.exists() or not saved.path_of(LOGITS_FILE).exists():
        state, saved.meta = checkpoint.read(path, "make it first with the same flags")
        saved.weights = saved.meta.get("weights") or checkpoint.weights_hash(state)
    else:
        saved.weights = read_logits(saved, evaluation).weights
        record = read_json(saved.path_of("results.json"))
        if record.get("weights") == saved.weights:
            made = record.keys() - {"metrics", "evaluation"}
            saved.meta = {key: record[key] for key in record if key in made}
    check_model(saved, evaluation)
    return saved


def check_model(saved, evaluation):
    """Raise UserError for a model of another network, data set, forget set or split.

    With another split its training calibration images would be scored.
    """
    meta, split_seed = saved.meta, evaluation.description["split_seed"]
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
    path = saved.path_of(LOGITS_FILE)
    if not path.exists():
        return None
    data = evaluation.data
    logits = inference.read_logits(
        path,
        num_train=len(data.train),
        num_held_out=len(data.held_out),
        num_classes=len(data.classes),
        data=data.fingerprint,
        weights=saved.weights if saved.path.exists() else None,
    )
    if logits is not None and not logits.data:
        print(f"{path}: it does not name its data; to have it checked, add data={data.fingerprint}")
    return logits


def run_network(saved, evaluation):
    """One pass over all images. Saves logits.npz. → (:class:`inference.Logits`, probe accuracies)

    The accuracies are those of a linear probe of the features, for class-wise forgetting only.
    """
    data, size = evaluation.data, evaluation.batch_size
    model = load_network(saved, evaluation)
    class_wise = bool(evaluation.split.forget_classes)
    compute = inference.compute_features if class_wise else inference.compute_logits
    with naming(saved.path):
        train, held_out = (
            compute(model, images, torch.arange(len(images), device=images.labels.device), size)
            for images in (data.train, data.held_out)
        )
    logits = inference.Logits(train[0], held_out[0], saved.weights, data.fingerprint)
    inference.save_logits(saved.path_of(LOGITS_FILE), **logits._asdict())
    if not class_wise:
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

    It is fitted to training images and tested on test images.
    """
    data, split = evaluation.data, evaluation.split
    fitted = torch.cat([split.retain, split.forget]).cpu().numpy()
    labels, held_out_labels = (
        images.labels.cpu().numpy() for images in (data.train, data.held_out)
    )
    tests = {"probe_forget": outputs.forget_test(), "probe_retain": outputs.test()}
    tests = {key: evaluation.held_out[rows].numpy() for key, rows in tests.items()}
    tests = {key: (held_out[rows], held_out_labels[rows]) for key, rows in tests.items()}
    seed = evaluation.settings.seed
    return probe.linear_probe(train[fitted], labels[fitted], tests=tests, seed=seed)


def outputs_of(logits, evaluation):
    """The :class:`metrics.Outputs` of a model: its logits by the sets of the split."""
    data, split, held_out = evaluation.data, evaluation.split, evaluation.held_out
    train = metrics.Output(logits.train, data.train.labels.cpu())
    forgotten = None
    if split.forget_classes:
        forgotten = torch.isin(held_out, split.forget_test.cpu())
        forgotten[: len(split.calibration)] = split.is_forgotten
    return metrics.Outputs(
        forget=train.select(split.forget.cpu()),
        retain=train.select(split.retain.cpu()),
        held_out=metrics.Output(logits.held_out, data.held_out.labels.cpu()).select(held_out),
        cal_sizes=evaluation.cal_sizes,
        draws=evaluation.draws,
        forgotten=forgotten,
    )


# ---------------------------------------------------------------- records


def measure_models(saved_models, evaluation):
    """Measure the ``numbers`` of one model after the other."""
    for number, saved in enumerate(saved_models.values(), 1):
        start = time.perf_counter()
        saved.numbers = measure_model(saved, evaluation)
        seconds, progress = time.perf_counter() - start, f"{number} of {len(saved_models)}"
        print(f"{saved.name}: measured in {seconds:.1f} s ({progress})", flush=True)


def measure_model(saved, evaluation):
    """Every number measured of a model, as in its results.json.

    Rows and curves of an earlier record with the same settings and weights are kept.
    """
    probed = recorded_numbers(saved, evaluation, but="resplits")
    probe_accuracy = {key: probed[key] for key in probe.COLUMNS if key in probed}
    logits = read_logits(saved, evaluation)
    needs_probe = evaluation.split.forget_classes and not probe_accuracy and saved.path.exists()
    if logits is None or needs_probe:
        logits, probe_accuracy = run_network(saved, evaluation)
    outputs = outputs_of(logits, evaluation)
    scalars, set_rows = metrics.evaluate(metrics.ConformalScores(outputs, evaluation.settings))
    earlier = recorded_numbers(saved, evaluation)
    rows = {row_key(row): row for row in earlier.get("conformal", ())}
    rows |= {key: block_of(key) | tables.flat(row) for key, row in set_rows.items()}
    curves = {key: earlier[key] for key in CURVES.values() if key in earlier}
    for source, num_steps in evaluation.relearn_steps.items():
        if saved.path.exists():
            model = load_network(saved, evaluation)
            with naming(f"--relearn {num_steps} of {saved.path}"):
                curves[CURVES[source]] = relearn(model, outputs, evaluation, source)
        else:
            print(f"{saved.path}: --relearn needs the model file; {saved.name} is left out")
    facts = {"num_forget": len(evaluation.split.forget)}
    facts |= {key: saved.meta.get(key) for key in ("seconds", "peak_memory")}
    return probe_accuracy | scalars | facts | {"conformal": list(rows.values())} | curves


def recorded_numbers(saved, evaluation, but=None):
    """The numbers in a model's results.json. {} if they are of other weights or settings.

    The setting ``but`` may differ.
    """
    record = read_json(saved.path_of("results.json"))
    recorded = record.get("evaluation", {}).get("settings", {})
    settings = evaluation.settings_of(saved.weights)
    if any(recorded.get(key) != value for key, value in settings.items() if key != but):
        return {}
    return record["metrics"]


def recorded_models(saved_models, model_dir, evaluation):
    """{method: :class:`SavedModel`} of the models of earlier evaluations that join the tables.

    They were measured with the same settings, are unchanged, and come from the same original model
    as ``saved_models``.
    """
    originals = {saved.original for saved in saved_models.values()} - {None}
    recorded = {}
    for name in names_in(evaluation.folder, model_dir):
        if name in saved_models:
            continue
        try:
            saved = read_model(name, evaluation.folder / name / Path(model_dir).name, evaluation)
            saved.numbers = recorded_numbers(saved, evaluation)
            has_logits = read_logits(saved, evaluation) is not None
        except utils.UserError:
            continue  # this model was not asked for
        if saved.numbers and has_logits and originals <= {saved.original or min(originals)}:
            recorded[name] = saved
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
    row = {key: value for key, value in row.items() if key not in KEYS}
    for key in [key for key in row if key + RESPLITS in row]:
        row[key] = metrics.Spread(row[key], row.pop(key + RESPLITS))
    return row


# ---------------------------------------------------------------- relearning


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
    trained, measured = relearning_images(split, settings.seed, source)
    calibration = outputs.calibration(max(evaluation.cal_sizes))  # positions in split.calibration
    forget, held_out = outputs.forget.select(measured.cpu()), outputs.held_out.select(calibration)
    points = [conformal.accuracy_and_coverage(forget, held_out, settings)]
    stops = relearning_stops(evaluation.relearn_steps[source])
    counts = np.diff([0, *stops]).tolist()
    purpose = ("order",) if source == "forget" else ("order", source)
    batches = shuffled_batches(trained, utils.generator(settings.seed, "relearn", *purpose))
    job = Job(
        name="relearn",
        label="relearn",
        model=model,
        data=data,
        split=split,
        recipe=Recipe(len(stops), RELEARN_RATE, milestones=[len(stops)]),
        seed=settings.seed,
        quiet=True,
    )
    images_of = {
        "forget": (data.train, split.forget[measured]),
        "held_out": (data.held_out, split.calibration[calibration.to(split.calibration.device)]),
    }
    for epoch, count in zip(job.epochs(), counts, strict=True):
        for batch in epoch.visit((next(batches), 0) for _ in range(count)):
            epoch.step(F.cross_entropy(batch.logits, batch.labels), batch)
        forget, held_out = (
            metrics.Output(*inference.compute_logits(job.model, *images, evaluation.batch_size))
            for images in images_of.values()
        )
        points.append(conformal.accuracy_and_coverage(forget, held_out, settings))
    accuracy, coverage = ([*values] for values in zip(*points, strict=True))
    curve = {"step": [0, *stops], "accuracy": accuracy, "coverage": coverage}
    return {"score": settings.scores[0].name, "alpha": settings.alphas[0]} | curve


def relearning_images(split, seed, source):
    """What :func:`relearn` trains on (indices), and which forget images it measures (positions)."""
    device, count = split.forget.device, len(split.forget)
    if source == "retain":
        return split.retain, torch.arange(count, device=device)
    if count < 2:
        raise utils.UserError("--relearn: one forget image cannot be divided; forget more images")
    order = torch.from_numpy(utils.permutation(seed, "relearn", count)).to(device)
    trained, measured = order.tensor_split([max(1, count // 10)])
    return split.forget[trained], measured


def relearning_stops(num_steps):
    """1, 2, 4, … and ``num_steps``: the numbers of steps after which relearning is measured."""
    return sorted({2**power for power in range(num_steps.bit_length())} | {num_steps})


def shuffled_batches(indices, rng, batch_size=64):
    """Endless near-equal batches of all ``indices``, shuffled again for each pass."""
    num_batches = math.ceil(len(indices) / batch_size)
    while True:
        order = torch.randperm(len(indices), generator=rng).to(indices.device)
        yield from indices[order].tensor_split(num_batches)


# ---------------------------------------------------------------- views of the records


@dataclass
class ModelResult:
    """Everything that tables and pictures show of one model.

    ``numbers`` are those of the model as a whole, ``set_rows`` those of its prediction sets by
    (score, calibration size, α), ``distances`` those to Retrain's outputs. ``curves`` are those of
    :func:`relearn` by source. ``training`` is what trainings of one split are compared by.
    """

    saved: SavedModel
    numbers: dict
    set_rows: dict[tuple, dict]
    curves: dict[str, dict]
    distances: dict
    class_rows: list[dict]
    sample_rows: list[dict]
    training: ensembles.Training
    histogram: dict | None = None
    fake_sheet: bytes | None = None


class SeedResults(NamedTuple):
    """The :class:`ModelResult` of each method of one seed, and its rows of two tables."""

    models: dict[str, ModelResult]
    rows: list[dict]
    class_rows: list[dict]


def compare_models(saved_models, evaluation):
    """The :class:`SeedResults` of all models, compared with the original, Retrain and finetune."""
    outputs = {
        name: outputs_of(read_logits(saved_models[name], evaluation), evaluation)
        for name in ("original", "retrain")
        if name in saved_models
    }
    results = {}
    for name in sorted(saved_models, key=position):
        results[name] = view_model(saved_models[name], outputs, evaluation)
    if "retrain" in results:
        for name, model in results.items():
            compare_with_retrain(name, model, results["retrain"])
    if "finetune" in results:
        for name in results.keys() - {"original"}:
            finetune = results["finetune"].numbers
            results[name].numbers |= comparison.costs(results[name].numbers, finetune)
    class_rows = [row for model in results.values() for row in model.class_rows]
    return SeedResults(results, rows_of(results, evaluation), class_rows)


def view_model(saved, reference_outputs, evaluation):
    """The :class:`ModelResult` of one model, not yet compared with the numbers of others.

    ``reference_outputs`` are those of the original model and of Retrain, if there are any.
    """
    settings, numbers = evaluation.settings, dict(saved.numbers)
    score, alpha = settings.scores[0].name, settings.alphas[0]
    rows = {row_key(row): row for row in numbers.pop("conformal")}
    curves = {source: numbers.pop(key) for source, key in CURVES.items() if key in numbers}
    numbers, distances = from_record(numbers), {}
    outputs = outputs_of(read_logits(saved, evaluation), evaluation)
    conformal_scores = metrics.ConformalScores(outputs, settings)
    if saved.name != "original" and "original" in reference_outputs:
        original = predictions_of(reference_outputs["original"])
        numbers["changed"] = comparison.changed_share(predictions_of(outputs), original)
    if "retrain" in reference_outputs:
        answers = (answers_of(each) for each in (outputs, reference_outputs["retrain"]))
        distances = comparison.answer_distances(*answers)
    retain_order = utils.permutation(
        evaluation.description["split_seed"], "ensembles", len(evaluation.split.retain)
    )
    retain_sample = torch.from_numpy(retain_order[:RETAIN_SAMPLE])
    class_rows = classwise.class_rows(conformal_scores, evaluation.data.classes)
    result = ModelResult(
        saved,
        numbers,
        set_rows={key: from_record(rows[key]) for key in evaluation.keys if key in rows},
        curves={
            source: curve
            for source, curve in curves.items()
            if (curve["score"], curve["alpha"]) == (score, alpha)
        },
        distances=distances,
        class_rows=[{"method": saved.name} | row for row in class_rows],
        sample_rows=name_samples(conformal_scores, evaluation),
        training=ensembles.describe(conformal_scores, retain_sample),
    )
    if evaluation.has_pictures:
        result.fake_sheet = draw_fake_sheet(conformal_scores, saved.name, evaluation)
        if score == "thr":
            result.histogram = figures.histogram_data(conformal_scores)
    return result


def predictions_of(outputs):
    """The predicted classes of the retain, forget and held-out images, one after the other."""
    image_sets = (outputs.retain, outputs.forget, outputs.held_out)
    return torch.cat([images.logits.argmax(dim=1) for images in image_sets])


def answers_of(outputs):
    return comparison.Answers(outputs.forget, outputs.held_out.select(outputs.test()))


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


def rows_of(results, evaluation):
    """The rows of results.csv: one per (score, calibration size, α) and model, failures last."""
    known = ("forget_set", "forget_class")
    origin = {key: evaluation.description[key] for key in known if key in evaluation.description}
    failed = failures(evaluation.folder, evaluation.split.fingerprint)
    rows = []
    for key in evaluation.keys:
        for name, model in results.items():
            if key in model.set_rows:
                row = block_of(key) | {"method": name} | model.numbers | model.set_rows[key]
                rows.append(row | origin | {"weights": model.saved.weights})
        for name, reason in failed.items():
            note = f"seed {evaluation.settings.seed}: {reason}"
            rows.append(block_of(key) | {"method": name, "note": note})
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
    """The rows of ensembles.csv: the trainings of each method with one split."""
    trainings = {}
    for seed in seeds:
        for name, model in seed.models.items():
            trainings.setdefault(name, []).append(model.training)
    stacked = {name: ensembles.Trainings.stack(models) for name, models in trainings.items()}
    return ensembles.rows(stacked)


# ---------------------------------------------------------------- files


def save_seed(results, requested, evaluation):
    """Save the files of one seed: tables and pictures of all models, records of the ``requested``."""
    folder, description = evaluation.folder, evaluation.description
    drawn, files = {}, {folder / "classes.csv": tables.as_csv(results.class_rows)}
    for name, model in results.models.items():
        saved = model.saved
        files[saved.path_of("samples.csv")] = tables.as_csv(model.sample_rows)
        if model.fake_sheet:
            caption = f"Most fake-forgotten images of {name}"
            drawn[saved.path_of("fake_forgotten.png")] = caption, model.fake_sheet
        if name in requested:
            made = saved.meta | {"method": name, "weights": saved.weights}
            measured = description | {"settings": evaluation.settings_of(saved.weights)}
            files[saved.path_of("results.json")] = made | {
                "metrics": saved.numbers,
                "evaluation": measured,
            }
    if evaluation.has_pictures:
        drawn = as_pictures(folder, draw_models(results, evaluation)) | drawn
    save_views(folder, results.rows, files, drawn, evaluation.data, description)
    for path in (folder / file for file in PICTURES):
        if drawn and path not in drawn:
            path.unlink(missing_ok=True)  # a picture of other settings
    forgotten = f"forget {evaluation.split.describe()}"
    print(f"{folder / 'results.csv'}: {len(results.models)} models, {forgotten}")


def save_summary(rows, ensemble_rows, flags, data, device):
    """Save the tables and pictures over the seeds."""
    seeds = ",".join(map(str, flags.seeds))
    folder = utils.run_folder(flags, data, seeds) / utils.scenario_folder(flags, data)
    forget_sets = dict.fromkeys(row["forget_set"] for row in rows if row.get("forget_set"))
    description = utils.describe_run(flags, data, device)
    description["forget_set"] = "; ".join(forget_sets) or "a different one for each seed"
    figures_of = {}
    if not flags.no_pictures:
        figures_of = figures.overview(rows, flags.score[0], max(flags.cal_sizes))
    if figures_of and ensemble_rows:
        dots = figures.klom_dots(ensemble_rows)
        figures_of["klom.png"] = ("Distance to retrained models (KLOM)", dots)
    drawn = as_pictures(folder, figures_of)
    save_views(folder, rows, {}, drawn, data, description, ensemble_rows)
    print(f"{folder / 'results.csv'}: mean and standard deviation over seeds {seeds}")


def save_views(folder, rows, files, drawn, data, description, ensemble_rows=()):
    """Save ``files`` {path: text, bytes or record}, the tables of ``rows`` and the pictures.

    ``drawn`` is {path: (caption, PNG)}. Logs tables and pictures to wandb as well.
    """
    ending = tables.SEEDS if description["flags"]["seeds"] and not files else RESPLITS
    files |= {folder / "results.csv": tables.as_csv(rows, ending=ending)}
    files |= {folder / "results.tex": latex.document(rows)}
    files |= {path: png for path, (_, png) in drawn.items()}
    if ensemble_rows:
        files[folder / "ensembles.csv"] = tables.as_csv(ensemble_rows)
    if drawn:
        pictures = dict(drawn.values())
        report = report_page(folder.name, rows, pictures, data, description, ensemble_rows)
        files[folder / "report.html"] = report
    with utils.unfinished_folder(folder) as unfinished:
        write_files(files, unfinished)
    with utils.WandbRun(
        folder, "evaluation", description, description["flags"]["wandb_mode"]
    ) as run:
        run.log_table("evaluation", [tables.without_nan(tables.flat(row)) for row in rows])
        if ensemble_rows:
            run.log_table("ensembles", [tables.without_nan(row) for row in ensemble_rows])
        run.log_pictures({caption: path for path, (caption, _) in drawn.items()})


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


# ---------------------------------------------------------------- pictures and report


def draw_models(results, evaluation):
    """{file name: (caption, Figure)} of all models of a seed together."""
    score, alpha = evaluation.settings.scores[0].name, evaluation.settings.alphas[0]
    drawn = figures.overview(results.rows, score, max(evaluation.cal_sizes))
    histograms, q_hats = {}, {}
    curves = {source: {} for source in CURVES}
    for name, model in results.models.items():
        histograms[name] = model.histogram
        q_hats[name] = model.saved.meta.get("q_hats")
        for source, curve in model.curves.items():
            curves[source][name] = curve
    curves = {source: methods for source, methods in curves.items() if methods}
    q_hats = {name: values for name, values in q_hats.items() if values}
    if score == "thr":
        drawn["scores.png"] = "Non-conformity scores", figures.score_histograms(histograms, alpha)
    if curves:
        drawn["relearn.png"] = "Relearning", figures.relearn_curves(curves, alpha)
    if q_hats:
        drawn["q_hat.png"] = "q̂ of the conformal loss by epoch", figures.q_hat_curves(q_hats)
    return drawn


def as_pictures(folder, drawn):
    """{path: (caption, PNG)} of {file name: (caption, Figure)}."""
    return {folder / file: (caption, page.png(figure)) for file, (caption, figure) in drawn.items()}


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


def report_page(scenario, rows, pictures, data, description, ensemble_rows=()):
    """report.html with all tables and ``pictures`` {caption: PNG}, as text."""
    seeds = description["flags"]["seeds"] if ensemble_rows else [description["seed"]]
    facts = {
        "model": description["model_name"],
        "data": f"{data.tag}: {len(data.train)} training images, {len(data.classes)} classes",
        "forgotten": f"{scenario}, forget set {description['forget_set']}",
        "seed": ", ".join(map(str, seeds)),
        "device": description["device"],
        "date": description["date"],
    }
    shown_tables = tables.full_tables(rows)
    if ensemble_rows:
        heading = tables.ensemble_heading(len(seeds), description["split_seed"])
        shown_tables.append(tables.ensemble_table(ensemble_rows, heading))
    return page.page(
        f"Unlearning on {data.tag}: {scenario}",
        facts=facts,
        shown_tables=shown_tables,
        pictures=pictures,
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
    count = len(flags.seeds or ())
    if count < 2:
        return
    if ensemble_rows:
        heading = tables.ensemble_heading(count, flags.split_seed)
        for line in ["", *tables.ensemble_lines(ensemble_rows, heading)]:
            print(line)
        if count < ensembles.FEW:
            print(f"only {count} trainings: too few to compare distributions; train more seeds")
    elif flags.split_seed is None:
        remedy = "pass --split_seed to all four scripts to compare distributions over trainings"
        print(f"each seed forgets other images; {remedy}")
    else:
        print("distributions over trainings are not compared; evaluate retrain too")


if __name__ == "__main__":
    utils.run_script(main)
