"""Evaluate models: accuracy, membership attacks, conformal metrics, and the gap to Retrain.

    python main_evaluate.py --data_name digits --unlearn_name all --alphas 0.01,0.02,0.05

compares the methods in the run folder with the original model and with Retrain. Each image passes
through a model once. Writes results.json and samples.csv for each model, and results.csv,
results.tex, classes.csv, figures and report.html for all models together. With --seeds 1,2,3 it
also writes the means and standard deviations over the seeds. With --split_seed as well, it compares
the distributions over the trainings (ensembles.csv).
"""

import utils  # before torch

# isort: split
import argparse
import hashlib
import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import metrics
import models
import unlearn
import unlearn_cpu
from metrics import classwise, comparison, conformal, ensembles, probe, samples, scores
from metrics.report import figures, latex, notes, page, tables, verdicts
from metrics.report.tables import KEYS
from models import checkpoint, distributed, inference
from models.errors import NotFinite

COMPARED = (*comparison.COLUMNS, *comparison.ROW_COLUMNS, "compared_to")  # and …_minus_retrain
TEXT_COLUMNS = ("method", "score", "class", "note", "UA_word", "CR_word", "forget_set", "weights")
TEXT_COLUMNS += ("model", "settings", "forget_class", "compared_to")
SCORES, RELEARNING, Q_HATS = "scores.png", "relearn.png", "q_hat.png"
CAPTIONS = {
    SCORES: "Non-conformity scores",
    RELEARNING: "Relearning",
    Q_HATS: "q̂ of the conformal loss by epoch",
}
MOST_FAKE = 18  # images of a fake_forgotten.png
RETAIN_SAMPLE = 1000  # retain images whose margins are compared over trainings


def main():
    flags = parse_flags()
    device = utils.pick_device(flags)
    data = utils.read_data(flags, device, models.input_size(flags.model_name))
    flags.cal_sizes = flags.cal_sizes or [utils.default_cal_size(data)]

    seeds = []
    for args in utils.each_seed(flags):
        evaluation = start_evaluation(args, data, device)
        saved_models = read_models(locate_models(evaluation), evaluation)
        with utils.unfinished_folder(evaluation.folder) as unfinished:
            network = (len(data.classes), data.train.size, device)
            model = models.build_model(args, *network, pretrained=False)
            evaluation.models = evaluate_models(model, saved_models, evaluation)
            add_earlier_results(evaluation)
            compare_with_original(evaluation)
            compare_with_retrain(evaluation, model)
            compare_costs(evaluation)
            save_evaluation(evaluation, unfinished)
        seeds.append(SeedRows(evaluation))

    rows = [row for seed in seeds for row in seed.rows]
    trainings = TrainingComparison()
    if flags.seeds:
        scored_methods = {row["method"] for row in rows} | {comparison.SECOND_RETRAIN}
        trainings = compare_trainings(seeds)
        seed_rows = [row for seed in seeds for row in seed.all_rows]
        summary = verdicts.summarise_seeds(merge_rows(seed_rows, trainings.second_retrain))
        save_summary(summary, trainings, flags, data=data, device=device)
        rows = [row for row in summary if row["method"] in scored_methods]
    print_results(rows, seeds, flags)
    print_trainings(trainings, flags)
    return 0


def evaluate_models(model, saved_models, evaluation):
    """Score one model after the other. → {method: :class:`ScoredModel`}"""
    scored = {}
    try:
        for saved in saved_models:
            scored[saved.name] = evaluate_model(model, saved, evaluation)
            seconds, progress = scored[saved.name].seconds, f"{len(scored)} of {len(saved_models)}"
            print(f"{saved.name}: scored in {seconds:.0f} s ({progress})", flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{evaluation.folder}: this evaluation is not saved; earlier results are kept"
        ) from None
    return scored


def evaluate_model(model, saved, evaluation):
    """Load the weights of one model, compute its logits, and score them. → :class:`ScoredModel`"""
    args = evaluation.args
    start = time.perf_counter()
    checkpoint.load_weights(model, saved.state, saved.path, evaluation.data.train.spec)
    with naming(saved.path):
        outputs, probe_accuracy = compute_outputs(model, evaluation)
    scored = score_outputs(outputs, saved, evaluation, probe_accuracy=probe_accuracy)
    for source in args.relearn_on if args.relearn else []:
        checkpoint.load_weights(model, saved.state, saved.path, evaluation.data.train.spec)
        with naming(f"--relearn {args.relearn} of {saved.path}"):
            scored.relearning[source] = relearn(model, outputs, evaluation, source)
    scored.seconds = time.perf_counter() - start
    saved.state.clear()  # all models together may not fit the memory
    return scored


# ---------------------------------------------------------------- flags


def parse_flags():
    parser = utils.make_parser(__doc__)
    methods = "original and the methods in the run folder"
    utils.add_scenario_flags(parser, methods, unlearn.MODEL_FILE)
    add_evaluation_flags(parser)
    return parser.parse_args()


def add_evaluation_flags(parser):
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--batch_size",
        type=utils.number(int, 1),
        help="images per forward pass (default: chosen to fit the CPU cache or the GPU memory)",
    )
    group.add_argument(
        "--alphas",
        type=utils.list_of(utils.ALPHA),
        default="0.05,0.1,0.15,0.2",
        help="comma-separated miscoverage levels",
    )
    group.add_argument(
        "--cal_sizes",
        type=utils.list_of(utils.number(int, 1)),
        help="comma-separated numbers of calibration images "
        "(default: 2000, or a fifth of the held-out images if that is fewer)",
    )
    group.add_argument(
        "--resplits",
        type=utils.number(int, 1),
        default=100,
        help="number of random calibration/test resplits to average over; 1 uses the split alone",
    )
    group.add_argument(
        "--relearn",
        type=utils.number(int, 0),
        default=0,
        metavar="K",
        help="train each model for K steps, and see whether the forget images come back",
    )
    group.add_argument(
        "--relearn_on",
        type=utils.list_of(utils.one_of(figures.RELEARNED)),
        default="forget",
        help="comma-separated images that --relearn trains on: forget (a tenth of the forget "
        "images; the others are scored), retain (the retain images; all forget images are scored)",
    )
    group.add_argument(
        "--relearn_rate",
        type=utils.number(float, 0, exclusive=True),
        default=0.001,
        help="learning rate for --relearn",
    )
    group.add_argument(
        "--columns",
        choices=["short", "all"],
        default="short",
        help="columns of the printed tables; results.csv and report.html always have all",
    )
    group.add_argument(
        "--no_pictures", action="store_true", help="write no figures and no report.html"
    )
    add_score_flags(group)


def add_score_flags(group):
    group.add_argument(
        "--score",
        type=utils.list_of(utils.one_of(scores.NAMES)),
        default="thr",
        help=f"comma-separated non-conformity scores: {', '.join(scores.NAMES)}",
    )
    group.add_argument(
        "--not_randomized",
        action="store_true",
        help="use aps, raps and saps without their random term",
    )
    group.add_argument(
        "--raps_penalty",
        type=utils.number(float, 0),
        default=0.01,
        help="raps: penalty for each rank beyond --raps_k",
    )
    group.add_argument(
        "--raps_k",
        type=utils.number(int, 0),
        default=5,
        help="raps: number of ranks without penalty",
    )
    group.add_argument(
        "--saps_weight",
        type=utils.number(float, 0, exclusive=True),
        default=0.2,
        help="saps: score added per rank",
    )
    group.add_argument(
        "--set_sizes",
        type=utils.list_of(utils.number(int, 0)),
        default="1,5",
        help="set sizes c of ECF@c and EuCF@c, in labels",
    )


def settings_of(args):
    """The :class:`metrics.Settings` that the flags ask for."""
    chosen = [
        scores.Score(
            name,
            randomized=not args.not_randomized,
            penalty=args.raps_penalty,
            k_reg=args.raps_k,
            weight=args.saps_weight,
            seed=args.seed,
        )
        for name in args.score
    ]
    alphas, set_sizes = tuple(args.alphas), tuple(args.set_sizes)
    return metrics.Settings(alphas, tuple(chosen), set_sizes, seed=args.seed)


# ---------------------------------------------------------------- the evaluation of one seed


@dataclass
class SavedModel:
    """A model on disk: its method, its file, its weights and the record saved with them."""

    name: str
    path: Path
    state: dict[str, torch.Tensor]
    meta: dict


@dataclass
class ScoredModel:
    """One model and everything that was measured of it.

    ``numbers`` are those of the model as a whole, ``set_rows`` those of its prediction sets by
    (score, calibration size, α). ``origin`` identifies the weights and the settings.
    ``predictions`` are the predicted classes of all retain, forget and held-out images.
    ``class_rows`` and ``sample_rows`` are its rows of classes.csv and samples.csv, ``relearning``
    its curve for each of --relearn_on. ``answers`` and ``training`` are what the comparisons with
    Retrain need, on each image and over several trainings of one split.
    """

    saved: SavedModel
    origin: dict
    numbers: dict
    set_rows: dict[tuple, dict]
    class_rows: list[dict]
    sample_rows: list[dict]
    predictions: torch.Tensor | None = None
    score_histogram: dict | None = None
    fake_sheet: bytes | None = None
    relearning: dict[str, dict] = field(default_factory=dict)
    answers: comparison.Answers | None = None
    training: ensembles.Training | None = None
    seconds: float = math.nan

    def row(self, key):
        """The model's row of results.csv for a (score, calibration size, α)."""
        block = dict(zip(KEYS, key, strict=False)) | {"method": self.saved.name}
        return block | self.numbers | self.set_rows[key] | self.origin


@dataclass
class Evaluation:
    """The models of one seed, their numbers, and the results of earlier evaluations.

    ``failed`` is {method: reason} for the requested methods that left no model. ``earlier_rows``
    and ``earlier_class_rows`` are the rows of results.csv and classes.csv about models that are not
    scored now.
    """

    args: argparse.Namespace
    data: utils.Data
    device: torch.device
    split: utils.Split
    folder: Path
    settings: metrics.Settings
    models: dict[str, ScoredModel] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    earlier_rows: list[dict] = field(default_factory=list)
    earlier_class_rows: list[dict] = field(default_factory=list)

    def rows(self):
        """A row per score, calibration size, α and model scored now. Failed methods come last."""
        keys = next(iter(self.models.values())).set_rows
        rows = []
        for key in keys:
            rows += [model.row(key) for model in self.models.values()]
            block = dict(zip(KEYS, key, strict=False))
            rows += [block | {"method": name, "note": why} for name, why in self.failed.items()]
        return rows

    def all_rows(self):
        """The rows of results.csv: of the models scored now and of earlier evaluations."""
        return merge_rows(self.rows(), self.earlier_rows)

    def class_rows(self):
        """The rows of classes.csv about the models scored now."""
        return [row for model in self.models.values() for row in model.class_rows]

    def all_class_rows(self):
        if not self.earlier_class_rows:
            return self.class_rows()
        return sorted([*self.class_rows(), *self.earlier_class_rows], key=table_position)

    def has_own_folder(self, saved):
        """Whether a model belongs to this run folder. Its files then go to its method's folder."""
        return saved.path.parent in (self.folder / saved.name, self.folder.parent)

    def path_of(self, saved, file):
        """Where ``file`` about a model goes: its method's folder, or next to a model elsewhere."""
        if self.has_own_folder(saved):
            return self.folder / saved.name / file
        return saved.path.with_suffix(f".{file}")


class SeedRows:
    """What remains of an evaluation when the next seed begins: its rows, for tables and notes."""

    def __init__(self, evaluation):
        self.rows = evaluation.rows()
        self.all_rows = evaluation.all_rows()
        self.class_rows = evaluation.class_rows()
        self.trainings = {name: model.training for name, model in evaluation.models.items()}
        self.retrain = evaluation.models.get("retrain")
        sample_rows = next(iter(evaluation.models.values())).sample_rows
        self.forget_images = [
            {key: row[key] for key in ("index", "file", "label") if key in row}
            for row in sample_rows
        ]


def start_evaluation(args, data, device):
    """The :class:`Evaluation` of one seed, with its split and before any model is scored."""
    split = utils.make_split(data, utils.scenario_of(args), max(args.cal_sizes))
    folder = utils.run_folder(args, data) / split.folder
    return Evaluation(args, data, device, split=split, folder=folder, settings=settings_of(args))


@contextmanager
def naming(subject):
    """Put ``subject`` in front of the error that a network's outputs are not finite."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{subject}: {error}") from error


# ---------------------------------------------------------------- models


def locate_models(evaluation):
    """{method: path} of the models to score, in the order of the table, the original first."""
    args, folder = evaluation.args, evaluation.folder
    known = ["original", *unlearn.METHODS, *unlearn_cpu.METHODS]
    path = utils.locate(args.model_dir, folder.parent)
    if path != folder.parent / args.model_dir:  # a path to one file, not a name in each folder
        names = utils.method_names(args.unlearn_name, known)
        if len(names) > 1:
            raise utils.UserError(
                f"--model_dir {args.model_dir} is one file; name one method with --unlearn_name"
            )
        paths = {names[0]: path}
    else:
        on_disk = {path.parent.name for path in folder.glob(f"*/{args.model_dir}")}
        names = [name for name in known if name in on_disk] + sorted(on_disk.difference(known))
        if "all" not in args.unlearn_name:
            names = utils.method_names(args.unlearn_name, known)
        if not names:
            raise utils.UserError(
                f"{folder}: no method with a {args.model_dir}; run main_unlearn.py with the same "
                "flags first"
            )
        paths = {name: folder / name / args.model_dir for name in names if name != "original"}
    original = folder.parent / "original_model.pth"
    if original.exists() or "original" in names:
        paths = {"original": paths.get("original", original)} | paths
    return paths


def read_models(paths, evaluation):
    """The :class:`SavedModel` of each method, all of them checked before any is scored.

    Raises UserError for a model of another forget set, original model, data set or network.
    """
    split = evaluation.split
    saved_models, originals = [], {}
    for name, path in paths.items():
        state, meta = checkpoint.read(path, "make it first with the same flags")
        checkpoint.check_meta(path, meta, evaluation.args, evaluation.data)
        if meta.get("forget_set") not in (None, split.fingerprint):
            raise utils.UserError(
                f"{path}: unlearned another forget set ({meta['forget_set']}) than the flags "
                f"select ({split.fingerprint}); pass the --seed, --split_seed and unlearning flags "
                "that made it"
            )
        check_division(path, meta, evaluation.args)
        identity = meta.get("identity", {}).get("original")
        original = checkpoint.weights_hash(state) if name == "original" else identity
        if original:
            originals.setdefault(original, path)
        saved_models.append(SavedModel(name, path, state=state, meta=meta))
    if len(originals) > 1:
        first, second, *_ = originals.values()
        raise utils.UserError(
            f"{first} and {second}: not from one original model; unlearn again with --overwrite"
        )
    return saved_models


def check_division(path, meta, args):
    """Raise UserError if a model was unlearned with another division of the held-out images.

    Its training calibration images would be scored.
    """
    seed = meta.get("split_seed")
    if "forget_set" in meta and seed not in (None, utils.split_seed(args)):
        raise utils.UserError(
            f"{path}: unlearned with split seed {seed}, and the flags select "
            f"{utils.split_seed(args)}; pass --split_seed {seed}"
        )


def origin_of(saved, evaluation):
    """The columns of results.csv that identify a row's weights, forget set and settings."""
    args, split = evaluation.args, evaluation.split
    names = ("seed", "resplits", "not_randomized", "raps_penalty", "raps_k", "saps_weight")
    flags = [getattr(args, name) for name in (*names, "set_sizes")]
    settings = [evaluation.data.fingerprint, max(args.cal_sizes), *flags]
    path = str(saved.path.resolve())
    if evaluation.has_own_folder(saved):
        path = os.path.relpath(saved.path, evaluation.folder)
    origin = {
        "forget_set": split.fingerprint,
        "weights": checkpoint.weights_hash(saved.state),
        "model": path,
        "settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8],
    }
    if split.forget_classes:
        origin["forget_class"] = forget_class_names(evaluation)
    return origin


def forget_class_names(evaluation):
    data = evaluation.data
    names = data.subclass_names if evaluation.args.unlearn_type == "subclass" else data.classes
    return ", ".join(names[number] for number in evaluation.split.forget_classes)


# ---------------------------------------------------------------- logits and metrics


def compute_outputs(model, evaluation):
    """Pass every image through the model once. → (:class:`metrics.Outputs`, probe accuracies)

    The accuracies are those of a linear probe of the features, for class-wise forgetting only.
    """
    args, data, split = evaluation.args, evaluation.data, evaluation.split
    class_wise = bool(split.forget_classes)
    held_out = [split.calibration, split.test] + [split.forget_test] * class_wise
    images_of = {
        "retain": (data.train, split.retain),
        "forget": (data.train, split.forget),
        "held_out": (data.held_out, torch.cat(held_out)),
    }
    outputs, features = {}, {}
    for part, (images, indices) in images_of.items():
        if class_wise:
            logits, labels, inner = inference.compute_features(
                model, images, indices, args.batch_size
            )
            features[part] = inner.numpy()
        else:
            logits, labels = inference.compute_logits(model, images, indices, args.batch_size)
        outputs[part] = metrics.Output(logits, labels)
    seed = utils.split_seed(args)
    draws = metrics.draw_splits(len(outputs["held_out"].labels), args.resplits, seed)
    forgotten = held_out_forgotten(split) if class_wise else None
    held_out = {"cal_sizes": args.cal_sizes, "draws": draws, "forgotten": forgotten}
    outputs = metrics.Outputs(**outputs, **held_out)
    return outputs, probe_features(features, outputs, args.seed) if class_wise else {}


def held_out_forgotten(split):
    """Which held-out images are of the forgotten class: calibration, test, then forget_test."""
    is_forgotten = [
        split.is_forgotten.bool(),
        torch.zeros(len(split.test), dtype=torch.bool),
        torch.ones(len(split.forget_test), dtype=torch.bool),
    ]
    return torch.cat(is_forgotten)


def probe_features(features, outputs, seed):
    """Accuracies of a linear probe that is fitted to the features of the training images."""
    labels = {part: getattr(outputs, part).labels.numpy() for part in features}
    test_images = {"probe_forget": outputs.forget_test(), "probe_retain": outputs.test()}
    return probe.linear_probe(
        np.concatenate([features["retain"], features["forget"]]),
        np.concatenate([labels["retain"], labels["forget"]]),
        tests={
            key: (features["held_out"][images.numpy()], labels["held_out"][images.numpy()])
            for key, images in test_images.items()
        },
        seed=seed,
    )


def score_outputs(outputs, saved, evaluation, *, probe_accuracy):
    """Every number of one model, from its outputs. → :class:`ScoredModel`"""
    data, split = evaluation.data, evaluation.split
    conformal_scores = metrics.ConformalScores(outputs, evaluation.settings)
    numbers, set_rows = metrics.evaluate(conformal_scores)
    facts = {"num_forget": len(split.forget)}
    facts |= {key: saved.meta.get(key) for key in ("seconds", "peak_memory")}
    class_rows = classwise.class_rows(conformal_scores, data.classes)
    scored = ScoredModel(
        saved=saved,
        origin=origin_of(saved, evaluation),
        numbers=probe_accuracy | numbers | facts,
        set_rows=set_rows,
        class_rows=[{"method": saved.name} | row for row in class_rows],
        sample_rows=name_samples(conformal_scores, evaluation),
        predictions=predictions_of(outputs),
        answers=answers_of(outputs),
    )
    if evaluation.args.seeds and evaluation.args.split_seed is not None:
        scored.training = ensembles.describe(conformal_scores, retain_sample(evaluation))
    if not evaluation.args.no_pictures:
        scored.fake_sheet = draw_fake_sheet(conformal_scores, saved.name, evaluation)
        if conformal_scores.first_score.name == "thr":
            scored.score_histogram = figures.histogram_data(conformal_scores)
    return scored


def retain_sample(evaluation):
    """Positions of the retain images whose margins are compared over trainings of one split."""
    count = len(evaluation.split.retain)
    seed = utils.split_seed(evaluation.args)
    return torch.from_numpy(utils.permutation(seed, "ensembles", count)[:RETAIN_SAMPLE])


def name_samples(conformal_scores, evaluation):
    """The rows of samples.csv, with the names of files and classes."""
    data, forget = evaluation.data, evaluation.split.forget
    names = data.train.names and [data.train.names[index] for index in forget.tolist()]
    rows = samples.sample_rows(conformal_scores, forget, names)
    for row in rows:
        row["label"] = data.classes[row["label"]]
        row["prediction"] = data.classes[row["prediction"]]
    return rows


def draw_fake_sheet(conformal_scores, name, evaluation):
    """The PNG of the forget images of one model that are fake-forgotten most clearly."""
    data, forget = evaluation.data, evaluation.split.forget
    most_fake = samples.most_fake(conformal_scores, MOST_FAKE)
    images = None if most_fake is None else []
    for fake in most_fake or ():
        index = int(forget[fake.position])
        pixels = data.train.pixels[index].permute(1, 2, 0).cpu().numpy()
        label = int(conformal_scores.outputs.forget.labels[fake.position])
        images.append(figures.SheetImage(pixels, label, fake.prediction, fake.labels))
    title = f"{name}: misclassified forget images nearest to their label (label → answer, {{set}})"
    return page.png(figures.fake_sheet(images, data.classes, title))


# ---------------------------------------------------------------- relearning


def relearn(model, outputs, evaluation, source):
    """Train for a few steps, and measure whether the forget images come back.

    From the ``source`` "forget", a tenth of the forget images are trained on, and the other nine
    tenths are measured. From "retain", the retain images are trained on, and all forget images are
    measured (2505.22310: forget images can come back without being seen). SGD at a constant rate,
    in batches of at most 64 images with fresh augmentation.

    Returns {"step", "accuracy", "coverage"}, lists of the same length: the accuracy and coverage
    of the measured images before the first step and after 1, 2, 4, ... and ``--relearn`` steps.
    Coverage is that of the first α and score, under the q̂ of the same model from the retained
    classes' calibration images. It is NaN where these are too few. Raises UserError for "forget"
    with fewer than two forget images, and Diverged as :func:`unlearn.train` does.
    """
    args, data, split = evaluation.args, evaluation.data, evaluation.split
    trained, measured = relearning_images(split, args, source)
    calibration = outputs.calibration(max(args.cal_sizes))  # positions in split.calibration
    stops = relearning_stops(args.relearn)
    purpose = ("order",) if source == "forget" else ("order", source)
    batches = shuffled_batches(trained, utils.generator(args.seed, "relearn", *purpose))
    curve = {"step": [], "accuracy": [], "coverage": []}

    def measure(step, forget, held_out):
        numbers = conformal.accuracy_and_coverage(forget, held_out, evaluation.settings)
        curve["step"].append(step)
        curve["accuracy"].append(numbers.accuracy)
        curve["coverage"].append(numbers.coverage)

    def measure_trained(record):
        forget = compute_output(model, data.train, take(split.forget, measured), args)
        held_out = compute_output(model, data.held_out, take(split.calibration, calibration), args)
        measure(stops[record["epoch"] - 1], forget, held_out)

    def steps_of(epoch):
        num_steps = stops[epoch - 1] - (stops[epoch - 2] if epoch > 1 else 0)
        return [(next(batches), 0) for _ in range(num_steps)]  # no retain images besides these

    measure(0, outputs.forget.select(measured), outputs.held_out.select(calibration))
    recipe = unlearn.Recipe(len(stops), args.relearn_rate, milestones=[len(stops)])
    job = unlearn.Job(
        name="relearn",
        label="relearn",
        model=model,
        data=data,
        split=split,
        recipe=recipe,
        seed=args.seed,
        epoch_done=measure_trained,
        quiet=True,
    )
    unlearn.train(job, lambda batch: F.cross_entropy(*batch.forget), schedule=steps_of)
    return curve


def relearning_images(split, args, source):
    """What :func:`relearn` trains on (indices), and which forget images it measures (positions)."""
    if source == "retain":
        return split.retain, torch.arange(len(split.forget))
    if len(split.forget) < 2:
        raise utils.UserError("--relearn: one forget image cannot be divided; forget more images")
    order = torch.from_numpy(utils.permutation(args.seed, "relearn", len(split.forget)))
    count = max(1, len(order) // 10)
    return take(split.forget, order[:count]), order[count:]


def relearning_stops(num_steps):
    """1, 2, 4, ... and ``num_steps``: the numbers of steps after which relearning is measured."""
    powers = [2**power for power in range(num_steps.bit_length()) if 2**power < num_steps]
    return [*powers, num_steps]


def shuffled_batches(indices, rng):
    """Endless near-equal batches of all ``indices``, shuffled again for each pass."""
    num_batches = math.ceil(len(indices) / unlearn.Recipe.batch_size)
    while True:
        order = torch.randperm(len(indices), generator=rng)
        yield from take(indices, order).tensor_split(num_batches)


def take(indices, positions):
    """``indices[positions]`` on the device of ``indices``."""
    return indices[positions.to(indices.device)]


def compute_output(model, images, indices, args):
    """The :class:`metrics.Output` of the images at ``indices``."""
    logits, labels = inference.compute_logits(model, images, indices, args.batch_size)
    return metrics.Output(logits, labels)


# ---------------------------------------------------------------- earlier results


def add_earlier_results(evaluation):
    """Add the failures of requested methods, and the rows about models that are not scored now."""
    args, folder, scored = evaluation.args, evaluation.folder, evaluation.models
    failed = failures(folder, evaluation.split.fingerprint)
    evaluation.failed = requested_failures(failed, scored, args)
    evaluation.earlier_rows = earlier_rows(evaluation, failed)
    methods = {row["method"] for row in evaluation.earlier_rows}
    needed = ("score", "alpha", "class", "method")
    rows = tables.read_earlier(folder / "classes.csv", needed, texts=TEXT_COLUMNS)
    evaluation.earlier_class_rows = [row for row in rows if row["method"] in methods]


def failures(folder, fingerprint):
    """{method: reason} of the methods that failed on the forget set and left no model."""
    reasons = {}
    for path in sorted(folder.glob(f"*/{unlearn.FAILURE_FILE}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            forget_set, reason = record["forget_set"], record["error"]
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{path}: damaged record, ignored")
            continue
        if forget_set == fingerprint:
            reasons[path.parent.name] = reason
    return reasons


def requested_failures(failed, scored, args):
    """The failures ({method: reason}) that --unlearn_name asks for, without the scored models."""
    requested = set(utils.split_names(args.unlearn_name))
    return {
        name: f"seed {args.seed}: {reason}" if args.seeds else reason
        for name, reason in failed.items()
        if name not in scored and {"all", name} & requested
    }


def earlier_rows(evaluation, failed):
    """The rows of results.csv about methods that are not scored now and have not changed since.

    A row is kept if its model file still holds the same weights and it is about the same forget
    set. The row of a failed method is kept while the method is in ``failed``.
    """
    path, scored = evaluation.folder / "results.csv", evaluation.models
    needed = (*KEYS, "forget_set", "weights", "model", "settings")
    kept, dropped, weights = [], {}, {}
    for row in tables.read_earlier(path, needed, texts=TEXT_COLUMNS, replaced=scored):
        name = row["method"]
        if name in scored or name in evaluation.failed:
            continue
        if "UA" not in row:
            is_current = name in failed
        else:
            file = row["model"]
            weights[file] = weights.get(file) or weights_of(evaluation.folder / file)
            same_forget_set = row["forget_set"] == evaluation.split.fingerprint
            is_current = same_forget_set and row["weights"] == weights[file]
        if is_current:
            kept.append(row)
        else:
            dropped[name] = None
    if dropped:
        print(f"{path}: dropped the rows of {', '.join(dropped)}: the model was deleted or changed")
    return kept


def weights_of(path):
    """The hash of the weights in a model file, or None where it cannot be read."""
    try:
        return checkpoint.weights_hash(checkpoint.read(path)[0])
    except utils.UserError:
        return None


def merge_rows(rows, earlier):
    """All rows by block (score, calibration size, α), each block in the order of the methods."""
    blocks = {}
    for row in [*rows, *earlier]:
        blocks.setdefault(verdicts.block_of(row), []).append(row)
    if earlier:
        blocks = {key: sorted(block, key=table_position) for key, block in blocks.items()}
    return [row for block in blocks.values() for row in block]


def table_position(row):
    """Sorts rows by method: the original first, the order of the methods, failed ones last."""
    known = ["original", "retrain", comparison.SECOND_RETRAIN]
    known += [name for name in (*unlearn.METHODS, *unlearn_cpu.METHODS) if name != "retrain"]
    name = row["method"]
    return "note" in row, known.index(name) if name in known else len(known), name


# ---------------------------------------------------------------- comparison with other models


def predictions_of(outputs):
    """The predicted classes of the retain, forget and held-out images, one after the other."""
    parts = (outputs.retain, outputs.forget, outputs.held_out)
    return torch.cat([part.logits.argmax(dim=1) for part in parts])


def compare_with_original(evaluation):
    """Add the share of the predictions that changed to every other model scored now."""
    original = evaluation.models.get("original")
    for name, model in evaluation.models.items():
        if original is not None and name != "original":
            changed = comparison.changed_share(model.predictions, original.predictions)
            model.numbers["changed"] = changed


def compare_costs(evaluation):
    """Add time and memory relative to finetune to every row, if there is a finetune."""
    rows = [(name, model.numbers) for name, model in evaluation.models.items()]
    rows += [(row["method"], row) for row in evaluation.earlier_rows]
    finetune = next((row for name, row in rows if name == "finetune"), {})
    for name, row in rows:
        if name != "original":
            row |= comparison.costs(row, finetune)


@dataclass
class Reference:
    """Retrain: the hash of its weights, its numbers, and those of its prediction sets by block."""

    weights: str
    numbers: dict
    set_rows: dict[tuple, dict]


def compare_with_retrain(evaluation, model):
    """Add the gap, signed differences, verdicts and RTE to every row that has a Retrain.

    ``model`` is a network for Retrain's weights. Retrain is the one that is scored now, else the
    one of an earlier evaluation with the same settings. Earlier rows are compared again if Retrain
    has changed. The verdicts' tolerance is two standard errors over the images. Several seeds have
    Retrain's spread (:func:`metrics.report.verdicts.summarise_seeds`).
    """
    scored = evaluation.models
    reference = find_reference(evaluation)
    if reference is None:
        return
    answers = reference_answers(evaluation, reference, model)
    for name, scored_model in scored.items():
        numbers = scored_model.numbers
        for key, row in scored_model.set_rows.items():
            if key in reference.set_rows:
                row |= verdicts.compare_sets(row, reference.set_rows[key], numbers["num_forget"])
        numbers |= verdicts.compare_model(name, numbers, reference.numbers)
        if answers:
            numbers |= comparison.answer_distances(scored_model.answers, answers)
        numbers["compared_to"] = reference.weights
    if "retrain" in scored:
        compare_earlier_rows(evaluation, reference, model)


def find_reference(evaluation):
    """The :class:`Reference` for the models scored now, or None."""
    retrain = evaluation.models.get("retrain")
    if retrain:
        return Reference(retrain.origin["weights"], retrain.numbers, retrain.set_rows)
    rows = [
        row
        for row in evaluation.earlier_rows
        if row["method"] == "retrain" and "UA" in row and has_settings(row, evaluation)
    ]
    if not rows:
        return None
    return Reference(rows[0]["weights"], rows[0], {verdicts.block_of(row): row for row in rows})


def reference_answers(evaluation, reference, model):
    """Retrain's :class:`metrics.comparison.Answers`, from a pass of its model if it is not scored.

    ``model`` is a network for its weights. None if the weights on disk are not the reference's.
    """
    if "retrain" in evaluation.models:
        return evaluation.models["retrain"].answers
    path = evaluation.folder / "retrain" / unlearn.MODEL_FILE
    return saved_answers(evaluation, model, path, weights=reference.weights)


def saved_answers(evaluation, model, path, *, weights):
    """The answers of the model saved at ``path``. None if its weights have another hash."""
    if not path.exists():
        return None
    state, _ = checkpoint.read(path)
    if checkpoint.weights_hash(state) != weights:
        return None
    checkpoint.load_weights(model, state, path, evaluation.data.train.spec)
    return answers_of(compute_outputs(model, evaluation)[0])


def answers_of(outputs):
    return comparison.Answers(outputs.forget, outputs.held_out.select(outputs.test()))


def has_settings(row, evaluation):
    """Whether a row was computed with the settings of this evaluation."""
    return any(row["settings"] == model.origin["settings"] for model in evaluation.models.values())


def compare_earlier_rows(evaluation, reference, model):
    """Compare the earlier rows with the Retrain that is scored now, where it is another."""
    retrain, distances = evaluation.models["retrain"], {}
    for row in evaluation.earlier_rows:
        if "UA" not in row or row.get("compared_to") == reference.weights:
            continue
        outdated = [key for key in row if key in COMPARED or key.endswith("_minus_retrain")]
        row |= dict.fromkeys(outdated)  # empty cells
        if not has_settings(row, evaluation):
            continue
        row |= verdicts.compare_model(row["method"], row, reference.numbers)
        if row["method"] not in distances:
            path = evaluation.folder / row["model"]
            answers = saved_answers(evaluation, model, path, weights=row["weights"])
            distances[row["method"]] = (
                comparison.answer_distances(answers, retrain.answers) if answers else {}
            )
        row |= distances[row["method"]]
        row["compared_to"] = reference.weights
        key = verdicts.block_of(row)
        if key in reference.set_rows:
            row |= verdicts.compare_sets(row, reference.set_rows[key], row["num_forget"])


@dataclass
class TrainingComparison:
    """Comparisons of several trainings with one forget set. Empty for seeds of other splits.

    ``distributions`` are the rows of :func:`metrics.ensembles.rows`, ``images`` those of
    :func:`metrics.ensembles.image_rows`, ``extremes`` what :func:`metrics.ensembles.extreme_images`
    returns, ``image_names`` the names of the forget images, and ``second_retrain`` the rows of
    :func:`second_retrain_rows`.
    """

    distributions: list[dict] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    extremes: dict[str, list] = field(default_factory=dict)
    image_names: list[str] = field(default_factory=list)
    second_retrain: list[dict] = field(default_factory=list)


def compare_trainings(seeds):
    """The :class:`TrainingComparison` of the models of several seeds with one split."""
    trainings = {}
    for seed in seeds:
        for name, training in seed.trainings.items():
            if training is not None:
                trainings.setdefault(name, []).append(training)
    if not trainings:
        return TrainingComparison()
    stacked = {name: ensembles.Trainings.stack(models) for name, models in trainings.items()}
    images = seeds[0].forget_images
    return TrainingComparison(
        distributions=ensembles.rows(stacked),
        images=ensembles.image_rows(stacked, images),
        extremes=ensembles.extreme_images(stacked),
        image_names=[os.path.basename(str(row.get("file", row["index"]))) for row in images],
        second_retrain=second_retrain_rows(seeds),
    )


def second_retrain_rows(seeds):
    """Rows of the Retrain of the next seed, compared with the Retrain of each seed.

    They show how far two retrained models are apart in every column. A verdict that does not
    "match" is wrong.
    """
    retrained = [seed.retrain for seed in seeds if seed.retrain is not None]
    if len(retrained) < 2:
        return []
    rows = []
    for first, second in zip(retrained, [*retrained[1:], retrained[0]], strict=True):
        name, numbers = comparison.SECOND_RETRAIN, dict(second.numbers)
        numbers |= verdicts.compare_model(name, numbers, first.numbers)
        numbers |= comparison.answer_distances(second.answers, first.answers)
        for key, row in second.set_rows.items():
            compared = verdicts.compare_sets(row, first.set_rows[key], numbers["num_forget"])
            block = dict(zip(KEYS, key, strict=False)) | {"method": name}
            rows.append(block | numbers | row | compared | second.origin)
    return rows


# ---------------------------------------------------------------- files


class Picture(NamedTuple):
    """A PNG with its caption."""

    caption: str
    png: bytes


def save_evaluation(evaluation, unfinished):
    """Write the files of one seed, and log the same to wandb."""
    folder, scored = evaluation.folder, evaluation.models
    description = utils.describe_run(evaluation.args, evaluation.data, evaluation.device)
    description["forget_set"] = evaluation.split.fingerprint
    rows = evaluation.all_rows()
    pictures = {} if evaluation.args.no_pictures else draw_pictures(evaluation)
    files = {path: picture.png for path, picture in pictures.items()}
    files[folder / "results.csv"] = tables.as_csv(rows)
    files[folder / "results.tex"] = latex.document(rows)
    files[folder / "classes.csv"] = tables.as_csv(evaluation.all_class_rows())
    for model in scored.values():
        record = result_record(model, description)
        files[evaluation.path_of(model.saved, "results.json")] = record
        files[evaluation.path_of(model.saved, "samples.csv")] = tables.as_csv(model.sample_rows)
    if pictures:
        embedded = {picture.caption: picture.png for picture in pictures.values()}
        for caption, png in earlier_pictures(evaluation).items():
            embedded.setdefault(caption, png)
        scenario = evaluation.split.folder
        scope = ReportScope(evaluation.args, evaluation.data, scenario, description)
        files[folder / "report.html"] = report_page(rows, embedded, scope)
    write_files(files, unfinished)
    remove_outdated_pictures(folder, pictures)
    log_to_wandb(evaluation, description=description, pictures=pictures)
    earlier = len({row["method"] for row in rows} - scored.keys())
    kept = f" and {earlier} from earlier evaluations" if earlier else ""
    forgotten = f"forget {evaluation.split.describe()}"
    print(f"{folder / 'results.csv'}: {len(scored)} models{kept}, {forgotten}")


def write_files(files, unfinished):
    """Write {path: text, bytes or JSON record}. The first process alone writes.

    The files below the folder of ``unfinished`` replace earlier ones when all of them are written.
    """
    if distributed.rank():
        return
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


def result_record(model, description):
    """The content of results.json: the record of the model file, and all numbers."""
    conformal_rows = [
        dict(zip(KEYS, key, strict=False)) | tables.flat(row) for key, row in model.set_rows.items()
    ]
    numbers = model.numbers | {"conformal": conformal_rows}
    for source, curve in model.relearning.items():
        numbers["relearn" if source == "forget" else f"relearn_{source}"] = curve
    record = {"method": model.saved.name, "metrics": numbers}
    return model.saved.meta | record | {"evaluation": description | {"seconds": model.seconds}}


def log_to_wandb(evaluation, *, description, pictures):
    """The table, the numbers of each model and the pictures, as the files have them."""
    args, folder = evaluation.args, evaluation.folder
    numbers = {
        f"{name}/{key}": value
        for name, model in evaluation.models.items()
        for key, value in model.numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    rows = [tables.without_nan(tables.flat(row)) for row in evaluation.all_rows()]
    with utils.WandbRun(folder, "evaluation", description, args.wandb_mode) as wandb_run:
        wandb_run.log_table("evaluation", rows)
        wandb_run.log(numbers)
        wandb_run.log_pictures({picture.caption: path for path, picture in pictures.items()})


def save_summary(rows, trainings, flags, *, data, device):
    """Write the files over the seeds, and log the same to wandb.

    ``trainings`` (:class:`TrainingComparison`) become ensembles.csv, samples.csv and pictures.
    """
    scenario = utils.scenario_folder(flags, data)
    folder = utils.run_folder(flags, data, ",".join(map(str, flags.seeds))) / scenario
    files = {folder / "results.csv": tables.as_csv(rows, ending=tables.SEEDS)}
    files[folder / "results.tex"] = latex.document(rows)
    if trainings.distributions:
        files[folder / "ensembles.csv"] = tables.as_csv(trainings.distributions)
        files[folder / "samples.csv"] = tables.as_csv(trainings.images)
    forget_sets = dict.fromkeys(row["forget_set"] for row in rows if row.get("forget_set"))
    description = utils.describe_run(flags, data, device)
    description["forget_set"] = "; ".join(forget_sets) or "a different one for each seed"
    pictures = {} if flags.no_pictures else draw_summary(rows, trainings, folder, flags)
    files |= {path: picture.png for path, picture in pictures.items()}
    if pictures:
        embedded = {picture.caption: picture.png for picture in pictures.values()}
        scope = ReportScope(flags, data, scenario, description)
        distributions = trainings.distributions
        files[folder / "report.html"] = report_page(rows, embedded, scope, distributions)
    with utils.unfinished_folder(folder) as unfinished:
        write_files(files, unfinished)
    with utils.WandbRun(folder, "evaluation", description, flags.wandb_mode) as wandb_run:
        wandb_run.log_table("evaluation", [tables.without_nan(tables.flat(row)) for row in rows])
        if trainings.distributions:
            distributions = [tables.without_nan(row) for row in trainings.distributions]
            wandb_run.log_table("ensembles", distributions)
        wandb_run.log_pictures({picture.caption: path for path, picture in pictures.items()})
    seeds = ", ".join(map(str, flags.seeds))
    print(f"{folder / 'results.csv'}: mean and standard deviation over seeds {seeds}")


# ---------------------------------------------------------------- pictures and report


def draw_pictures(evaluation):
    """{path: :class:`Picture`} of all models, of the models scored now, and of each of these."""
    args, folder = evaluation.args, evaluation.folder
    rows = evaluation.all_rows()
    drawn = figures.overview(rows, args.score[0], max(args.cal_sizes))
    drawn |= draw_scored_models(evaluation)
    pictures = {
        folder / file: Picture(caption, page.png(figure))
        for file, (caption, figure) in drawn.items()
    }
    for name, model in evaluation.models.items():
        path = evaluation.path_of(model.saved, "fake_forgotten.png")
        pictures[path] = Picture(fake_sheet_caption(name), model.fake_sheet)
    return pictures


def draw_summary(rows, trainings, folder, flags):
    """{path: :class:`Picture`} of the means over the seeds and of the trainings of one split."""
    drawn = figures.overview(rows, flags.score[0], max(row["cal_size"] for row in rows))
    if trainings.distributions:
        dots = figures.klom_dots(trainings.distributions)
        drawn["klom.png"] = ("Distance to retrained models (KLOM)", dots)
        histograms = figures.margin_histograms(trainings.extremes, trainings.image_names)
        drawn["margins.png"] = ("Margins over the trainings", histograms)
    return {
        folder / file: Picture(caption, page.png(figure))
        for file, (caption, figure) in drawn.items()
    }


def draw_scored_models(evaluation):
    """{file name: (caption, Figure)} of the scores, of relearning and of q̂ in training.

    Earlier evaluations left no data for these. If the picture on disk shows models that are not
    scored now, it is kept, and the new picture gets another name.
    """
    args, scored = evaluation.args, evaluation.models
    alpha, drawn = args.alphas[0], {}
    if args.score[0] == "thr":
        histograms = {name: model.score_histogram for name, model in scored.items()}
        drawn[SCORES] = figures.score_histograms(histograms, alpha)
    if args.relearn:
        curves = {
            source: {name: model.relearning[source] for name, model in scored.items()}
            for source in args.relearn_on
        }
        drawn[RELEARNING] = figures.relearn_curves(curves, alpha)
    q_hats = {name: q_hat_history(model.saved) for name, model in scored.items()}
    if q_hats := {name: values for name, values in q_hats.items() if values}:
        drawn[Q_HATS] = figures.q_hat_curves(q_hats)
    drawn = {file: (CAPTIONS[file], figure) for file, figure in drawn.items()}
    if not evaluation.earlier_rows:
        return drawn
    kept = [file for file in drawn if (evaluation.folder / file).is_file()]
    for file in kept:
        caption, figure = drawn.pop(file)
        drawn[partial_name(file)] = (f"{caption} ({', '.join(scored)} only)", figure)
    return drawn


def q_hat_history(saved):
    """q̂ of every epoch from the record of a CPU variant. Empty for other models and records."""
    q_hats = saved.meta.get("q_hats")
    if not isinstance(q_hats, list) or not all(isinstance(q_hat, float) for q_hat in q_hats):
        return []
    return q_hats


def partial_name(file):
    return file.replace(".png", "_partial.png")


def remove_outdated_pictures(folder, pictures):
    """Remove a picture of some of the models where the new one shows all of them."""
    for file in CAPTIONS:
        if folder / file in pictures:
            (folder / partial_name(file)).unlink(missing_ok=True)


def fake_sheet_caption(method):
    return f"Most fake-forgotten images of {method}"


def earlier_pictures(evaluation):
    """{caption: PNG bytes} of the pictures of the methods whose earlier rows are kept."""
    folder = evaluation.folder
    methods = dict.fromkeys(row["method"] for row in evaluation.earlier_rows)
    paths = {fake_sheet_caption(name): folder / name / "fake_forgotten.png" for name in methods}
    if methods:
        for file, caption in CAPTIONS.items():
            paths[f"{caption} (earlier evaluation)"] = folder / file
    return {caption: path.read_bytes() for caption, path in paths.items() if path.is_file()}


class ReportScope(NamedTuple):
    """What a report is about. ``description`` is the record of the run with the forget set."""

    args: argparse.Namespace
    data: utils.Data
    scenario: str
    description: dict


def report_page(rows, pictures, scope, ensemble_rows=()):
    """report.html with all tables and ``pictures`` {caption: PNG bytes}, as text."""
    args, data, description = scope.args, scope.data, scope.description
    facts = {
        "model": args.model_name,
        "data": f"{data.tag}: {len(data.train)} training images, {len(data.classes)} classes",
        "forgotten": f"{scope.scenario}, forget set {description['forget_set']}",
        "seed": ", ".join(map(str, args.seeds or [args.seed])),
        "device": description["device"],
        "date": description["date"],
    }
    shown_tables = tables.full_tables(rows)
    if ensemble_rows:
        heading = tables.ensemble_heading(len(args.seeds), args.split_seed)
        shown_tables.append(tables.ensemble_table(ensemble_rows, heading))
    return page.page(
        f"Unlearning on {data.tag}: {scope.scenario}",
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
    for line in notes.missing_q_hats(seed_rows, class_rows):
        print(line)
    for line in [*notes.advice([seed.rows for seed in seeds]), *notes.unchanged(seed_rows)]:
        print(line)


def print_trainings(trainings, flags):
    """Print the comparison over trainings of one forget set, or what it needs."""
    if not flags.seeds or len(flags.seeds) == 1:
        return
    if trainings.distributions:
        heading = tables.ensemble_heading(len(flags.seeds), flags.split_seed)
        for line in ["", *tables.ensemble_lines(trainings.distributions, heading)]:
            print(line)
        if len(flags.seeds) < ensembles.FEW:
            print(f"{len(flags.seeds)} trainings show little about distributions; train more seeds")
    elif flags.split_seed is None:
        print(
            "each seed forgets other images, so distributions over trainings are not compared; "
            "pass --split_seed to all four scripts"
        )
    elif not trainings.second_retrain:
        print("distributions over trainings are not compared; evaluate retrain too")
    for line in notes.wrong_verdicts(trainings.second_retrain):
        print(line)


if __name__ == "__main__":
    utils.run_script(main)
