"""Score models: UA, RA, TA, membership attacks, and Coverage, Set Size, CR, fake forgetting and MIACR at each α.

    python main_evaluate.py --data_name digits --unlearn_name all --alphas 0.01,0.02,0.05

compares the methods whose models lie in the run folder, beside the original, and measures how far they are from
Retrain. Each image goes through a model once. Writes results.json and samples.csv beside each model; results.csv,
classes.csv, pictures and report.html for all of them; with --seeds 1,2,3 a table of mean±standard deviation too.
"""

import utils  # before torch

# isort: split
import csv
import hashlib
import io
import itertools
import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import metrics
import models
import unlearn
import unlearn_cpu
from metrics import CR, classwise, comparison, figures, html_report, probe, samples, scores
from models import checkpoint, inference

KEYS = ("score", "cal_size", "alpha", "method")
MODEL_COLUMNS = {"method": ("method", "text")} | metrics.columns("COLUMNS")
MODEL_COLUMNS |= {"gap": ("gap %", "percent"), "UA_word": ("by UA", "text")} | probe.COLUMNS
MODEL_COLUMNS |= {"seconds": ("time s", "seconds"), "RTE": ("RTE", "number"), "note": ("note", "text")}
SET_COLUMNS = {"score": ("score", "text"), "cal_size": ("n_cal", "text"), "alpha": ("alpha", "text")}
SET_COLUMNS |= {"method": ("method", "text")} | metrics.columns("ROW_COLUMNS") | {"CR_word": ("by CR", "text")}
COMPARED = ("gap", "UA_word", "CR_word", "RTE", "compared_to")  # and the differences, …_minus_retrain


def main():
    parser = utils.make_parser(__doc__)
    utils.add_scenario_flags(parser, "original and the methods in the run folder", unlearn.MODEL_FILE)
    add_evaluation_flags(parser)
    args = parser.parse_args()

    device = utils.pick_device(args)
    data = utils.load_data(args, device, models.input_size(args.model_name))
    evaluations = [evaluate_seed(seed_args, data, device) for seed_args in utils.each_seed(args)]
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    if args.seeds:
        scored = {row["method"] for row in rows}
        every = summarise([row for evaluation in evaluations for row in evaluation.every])
        save_summary(args, data, device, every)
        rows = [row for row in every if row["method"] in scored]
    print_tables(rows)
    for line in [*missing_q_hats(evaluations), *advice([evaluation.rows for evaluation in evaluations])]:
        print(line)
    return 0


def add_evaluation_flags(parser):
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--batch_size",
        type=utils.number(int, 1),
        help="images a forward pass; when left out what fits a CPU's cache or a GPU's memory",
    )
    group.add_argument(
        "--alphas", type=utils.list_of(utils.ALPHA), default="0.05,0.1,0.15,0.2", help="miscoverage levels"
    )
    group.add_argument(
        "--cal_sizes",
        type=utils.list_of(utils.number(int, 1)),
        help="calibration images; when left out 2000, or a fifth of the held-out images where that is less",
    )
    group.add_argument(
        "--resplits",
        type=utils.number(int, 1),
        default=100,
        help="how often calibration and test images are divided anew for mean±standard deviation; 1: the split alone",
    )
    group.add_argument(
        "--score",
        type=utils.list_of(utils.one_of(scores.NAMES)),
        default="thr",
        help=f"one or more of {', '.join(scores.NAMES)}",
    )
    group.add_argument("--not_randomized", action="store_true", help="aps, raps, saps without their random part")
    group.add_argument(
        "--raps_penalty", type=utils.number(float, 0), default=0.01, help="raps: added for each rank beyond"
    )
    group.add_argument("--raps_k", type=utils.number(int, 0), default=5, help="raps: ranks that cost nothing")
    group.add_argument(
        "--saps_weight", type=utils.number(float, 0, exclusive=True), default=0.2, help="saps: cost of a rank"
    )
    group.add_argument(
        "--set_sizes",
        type=utils.list_of(utils.number(int, 0)),
        default="1,5",
        help="c of ECF@c and d of EuCF@d, in labels",
    )
    group.add_argument(
        "--relearn",
        type=utils.number(int, 0),
        default=0,
        metavar="K",
        help="train each model K steps on a tenth of the forget images, and score the other nine tenths",
    )
    group.add_argument(
        "--relearn_rate",
        type=utils.number(float, 0, exclusive=True),
        default=0.001,
        help="learning rate of those steps",
    )
    group.add_argument("--no_pictures", action="store_true", help="numbers only: no PNGs and no report.html")


def beside(path, name, folder, file):
    """Where ``file`` about the model at ``path`` goes: the method's folder, or next to a model from elsewhere."""
    return folder / name / file if path.parent in (folder / name, folder.parent) else path.with_suffix(f".{file}")


def settings_of(args):
    """What the metrics are computed for, from the flags."""
    chosen = [
        scores.Score(name, not args.not_randomized, args.raps_penalty, args.raps_k, args.saps_weight, args.seed)
        for name in args.score
    ]
    return metrics.Settings(tuple(args.alphas), tuple(chosen), tuple(args.set_sizes), args.seed)


@dataclass
class Evaluation:
    """What was found about the models of one seed: the rows scored now, every row of results.csv, and the rows of
    the models scored now in classes.csv."""

    rows: list[dict]
    every: list[dict]
    class_rows: list[dict]


def evaluate_seed(args, data, device):
    """Score the models of one seed, then save what was found. Returns an :class:`Evaluation`.

    Nothing is written before all models are scored."""
    args.cal_sizes = args.cal_sizes or [utils.default_cal_size(data)]
    split = utils.make_split(data, args, max(args.cal_sizes))
    root = utils.run_folder(args, data)
    folder = root / split.folder
    checkpoints = read_models(locate_models(args, root, folder), args, data, split)
    model = models.build_model(args, len(data.classes), data.train.size, device, pretrained=False)
    settings = settings_of(args)

    folder.mkdir(parents=True, exist_ok=True)
    evaluated, histograms, class_rows, audits, pictures = {}, {}, [], {}, {}
    for name, (path, state, meta) in checkpoints.items():
        start = time.perf_counter()
        checkpoint.load_weights(model, state, path, data.train.spec)
        with naming(path):
            outputs, scalars = collect_outputs(model, data, split, args)
        more, rows = metrics.evaluate(outputs, settings)
        scalars |= more | {"seconds": meta.get("seconds"), "num_forget": len(split.forget)}
        if args.relearn:
            with naming(f"--relearn {args.relearn} of {path}"):
                scalars["relearn"] = relearn(model, outputs, data, split, settings, args)
        evaluated[name] = (scalars, rows, time.perf_counter() - start)

        class_rows += [{"method": name} | row for row in classwise.class_rows(outputs, settings, data.classes)]
        names = data.train.names and [data.train.names[index] for index in split.forget.tolist()]
        audits[beside(path, name, folder, "samples.csv")] = [
            row | {"label": data.classes[row["label"]], "prediction": data.classes[row["prediction"]]}
            for row in samples.sample_rows(outputs, settings, split.forget, names)
        ]
        if not args.no_pictures:
            histograms[name] = figures.histogram_data(outputs, settings)
            pictures[beside(path, name, folder, "fake_forgotten.png")] = fake_sheet(
                outputs, settings, data, split, name
            )

    origins = {name: origin(name, entry, args, data, split) for name, entry in checkpoints.items()}
    failed = failures(folder, split.fingerprint)
    tables = EarlierTables(folder)
    kept = tables.kept(evaluated, split.fingerprint, failed)
    compare_to_retrain(evaluated, kept, origins)
    rows = table_rows(evaluated, asked_failures(args, failed, evaluated), origins)
    every = merge_rows(rows, kept)
    if not args.no_pictures:
        shown = figures.overview(every, args.score[0], max(args.cal_sizes))
        alone = {row["method"] for row in every} == {row["method"] for row in rows}
        shown |= pictures_of_outputs(args, folder, evaluated, histograms, alone)
        pictures = {folder / file: found for file, found in shown.items()} | pictures
    kept_classes = tables.kept_classes({row["method"] for row in kept})
    ordered = sorted(class_rows + kept_classes, key=_place) if kept_classes else class_rows
    utils.save_text(folder / "classes.csv", as_csv(ordered))
    for path, audit in audits.items():
        utils.save_text(path, as_csv(audit))
    earlier = earlier_pictures(folder, {row["method"] for row in kept} if pictures else ())
    save(args, data, split, device, checkpoints, evaluated, every, pictures, earlier)
    return Evaluation(rows, every, class_rows)


@contextmanager
def naming(what):
    """Put ``what`` in front of the error about outputs that are not finite."""
    try:
        yield
    except utils.NotFinite as error:
        raise utils.NotFinite(f"{what}: {error}") from error


def pictures_of_outputs(args, folder, evaluated, histograms, alone):
    """{file name: (caption, Figure)} of what only the models scored now can show: their scores, and relearning.

    Unless they are ``alone`` in results.csv, a picture of more models keeps its name: theirs gets another."""
    shown = {}
    if args.score[0] == "thr":
        histogram = figures.score_histograms(histograms, args.alphas[0])
        shown["scores.png"] = ("Non-conformity scores", histogram)
    if args.relearn:
        curves = {name: scalars["relearn"] for name, (scalars, *_) in evaluated.items()}
        shown["relearn.png"] = ("Do they come back?", figures.relearn_curves(curves, args.alphas[0]))
    for file in list(shown):
        partial = file.replace(".png", "_partial.png")
        if alone:
            (folder / partial).unlink(missing_ok=True)
        elif (folder / file).is_file():
            caption, figure = shown.pop(file)
            shown[partial] = (f"{caption} ({', '.join(evaluated)} alone)", figure)
    return shown


def earlier_pictures(folder, methods):
    """{caption: path} of the pictures of ``methods``, whose rows are kept, for the report."""
    found = {f"Most fake-forgotten images of {name}": folder / name / "fake_forgotten.png" for name in methods}
    if methods:
        found["Non-conformity scores (earlier evaluation)"] = folder / "scores.png"
        found["Do they come back? (earlier evaluation)"] = folder / "relearn.png"
    return {caption: path for caption, path in found.items() if path.is_file()}


def origin(name, entry, args, data, split):
    """The columns of results.csv that say what a model's rows are about: which weights, forget set and settings."""
    path, state, _ = entry
    folder = utils.run_folder(args, data) / split.folder
    chosen = ("seed", "resplits", "not_randomized", "raps_penalty", "raps_k", "saps_weight", "set_sizes")
    settings = [data.fingerprint, max(args.cal_sizes), *(getattr(args, flag) for flag in chosen)]
    known = {
        "forget_set": split.fingerprint,
        "weights": checkpoint.weights_hash(state),
        "model": os.path.relpath(path, folder)
        if path.parent in (folder / name, folder.parent)
        else str(path.resolve()),
        "settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8],
    }
    return known | ({"forget_class": forgotten_name(args, data, split)} if split.forget_class is not None else {})


def forgotten_name(args, data, split):
    return (data.subclass_names if args.unlearn_type == "subclass" else data.classes)[split.forget_class]


def locate_models(args, root, scenario):
    """{name: path} of the models to score, in the order of the table; the original first, where it is at hand."""
    known = ["original", *unlearn.METHODS, *unlearn_cpu.METHODS]
    path = utils.locate(args.model_dir, root)
    if path != root / args.model_dir:  # one file anywhere, not a name to look for in every method's folder
        names = utils.method_names(args.unlearn_name, known)
        if len(names) > 1:
            raise utils.UserError(f"--model_dir {args.model_dir} is one file; name one method with --unlearn_name")
        paths = {names[0]: path}
    else:
        on_disk = {found.parent.name for found in scenario.glob(f"*/{args.model_dir}")}
        every = [*(name for name in known if name in on_disk), *sorted(on_disk.difference(known))]
        names = every if "all" in args.unlearn_name else utils.method_names(args.unlearn_name, known)
        if not names:
            raise utils.UserError(f"{scenario}: no method with a {args.model_dir}; unlearn with the same flags first")
        paths = {name: scenario / name / args.model_dir for name in names if name != "original"}
    original = root / "original_model.pth"
    if original.exists() or "original" in names:
        paths = {"original": paths.get("original", original)} | paths
    return paths


def read_models(paths, args, data, split):
    """{name: (path, state_dict, meta)}, all read and checked before any is scored.

    Raises UserError for a model of another forget set, another original, other data or another network.
    """
    found, originals = {}, {}
    for name, path in paths.items():
        state, meta = checkpoint.read(path, "make it first with the same flags")
        checkpoint.check_meta(path, meta, args, data)
        if meta.get("forget_set") not in (None, split.fingerprint):
            raise utils.UserError(
                f"{path}: unlearned another forget set ({meta['forget_set']}) than the flags say "
                f"({split.fingerprint}); give the --seed and unlearning flags that made it"
            )
        source = checkpoint.weights_hash(state) if name == "original" else meta.get("identity", {}).get("original")
        if source:
            originals.setdefault(source, path)
        found[name] = (path, state, meta)
    if len(originals) > 1:
        first, second, *_ = originals.values()
        raise utils.UserError(f"{first} and {second}: not from one original model; unlearn again with --overwrite")
    return found


def collect_outputs(model, data, split, args):
    """One pass of every scored image through the model. Returns (Outputs, numbers of the linear probe).

    The probe sees the input of the last layer, caught on the way, where a class is forgotten."""
    held_out = [split.calibration, split.test]
    forgotten = None
    if split.forget_class is not None:
        held_out.append(split.forget_test)
        is_forgotten = [split.is_forgotten, torch.zeros(len(split.test)), torch.ones(len(split.forget_test))]
        forgotten = torch.cat([part.bool() for part in is_forgotten])
    parts = {
        "retain": (data.train, split.retain),
        "forget": (data.train, split.forget),
        "held_out": (data.held_out, torch.cat(held_out)),
    }
    found, features = {}, {}
    for part, (images, indices) in parts.items():
        if split.forget_class is None:
            found[part] = metrics.Output(*inference.compute_logits(model, images, indices, args.batch_size))
        else:
            *logits_labels, features[part] = inference.compute_features(model, images, indices, args.batch_size)
            found[part] = metrics.Output(*logits_labels)
    draws = metrics.draw_splits(len(found["held_out"].labels), args.resplits, args.seed)
    outputs = metrics.Outputs(**found, cal_sizes=args.cal_sizes, draws=draws, forgotten=forgotten)
    if split.forget_class is None:
        return outputs, {}
    features = {part: tensor.numpy() for part, tensor in features.items()}
    labels = {part: output.labels.numpy() for part, output in found.items()}
    tests = {"probe_forget": outputs.forget_test().numpy(), "probe_retain": outputs.test().numpy()}
    return outputs, probe.linear_probe(
        np.concatenate([features["retain"], features["forget"]]),
        np.concatenate([labels["retain"], labels["forget"]]),
        {key: (features["held_out"][chosen], labels["held_out"][chosen]) for key, chosen in tests.items()},
        args.seed,
    )


def relearn(model, outputs, data, split, settings, args):
    """How accuracy and coverage of forget images come back while a tenth of them is learnt again (--relearn K).

    Coverage is at the first α, under the first score, with each step's q̂ from the retained classes' calibration images;
    NaN where these are too few.
    """
    score, size = settings.scores[0], max(args.cal_sizes)
    calibration = split.calibration[:size][~split.is_forgotten[:size].to(split.calibration.device)]
    curve = {"step": [], "accuracy": [], "coverage": []}

    def measure(step, others):
        if step:
            held_out, forget = (
                metrics.Output(*inference.compute_logits(model, images, indices, args.batch_size))
                for images, indices in ((data.held_out, calibration), (data.train, others))
            )
        else:  # these have passed through the model
            held_out = outputs.held_out.of(outputs.calibration(size))
            forget = outputs.forget.of(torch.searchsorted(split.forget, others).cpu())
        held_out, forget = CR.score_part(held_out, score, "held_out"), CR.score_part(forget, score, "forget")
        q_hat = CR.finite_quantile(held_out.own, settings.alphas[0])
        curve["step"].append(step)
        curve["accuracy"].append(1 - forget.wrong.double().mean().item())
        curve["coverage"].append(CR.describe(forget, [q_hat])["coverage"].item())

    unlearn.relearn(model, data, split, args.seed, args.relearn, args.relearn_rate, measure)
    return curve


def compare_to_retrain(evaluated, kept, origins):
    """Where Retrain was scored too: the gap, signed differences, a plain word for them, and RTE, the ratio of running
    times. Added to the numbers in ``evaluated`` and to the ``kept`` rows whose Retrain is another now.

    Retrain is the one scored now, or the one in the kept rows of the same settings (:func:`origin`). The words'
    tolerance is two standard errors over the images; several seeds have Retrain's spread (:func:`summarise`).
    """
    settings = {source["settings"] for source in origins.values()}
    if "retrain" in evaluated:
        reference, reference_rows, _ = evaluated["retrain"]
    else:
        same = [row for row in kept if row["method"] == "retrain" and "UA" in row and row["settings"] in settings]
        reference_rows = {tuple(row[key] for key in KEYS[:-1]): row for row in same}
        reference = same[0] if same else None
    if reference is None:
        return
    weights = origins["retrain"]["weights"] if "retrain" in evaluated else reference["weights"]
    for name, (scalars, rows, _) in evaluated.items():
        for at, row in rows.items():
            if at in reference_rows:
                row |= compare_sets(row, reference_rows[at], scalars["num_forget"])
        scalars |= compare_model(name, scalars, reference) | {"compared_to": weights}
    if "retrain" in evaluated:
        for row in kept:
            at = tuple(row[key] for key in KEYS[:-1])
            if "UA" not in row or row.get("compared_to") == weights:
                continue
            for key in [key for key in row if key in COMPARED or key.endswith("_minus_retrain")]:
                row[key] = None
            if row["settings"] in settings:
                row |= compare_model(row["method"], row, reference) | {"compared_to": weights}
                row |= compare_sets(row, reference_rows[at], row["num_forget"]) if at in reference_rows else {}


def compare_model(name, scalars, reference):
    """The columns that compare a model as a whole with Retrain."""
    tolerance = comparison.share_tolerance(reference["UA"], scalars["num_forget"])
    found = comparison.differences({key: scalars[key] for key in MODEL_COLUMNS if key in scalars}, reference)
    found["gap"] = comparison.gap(scalars, reference)
    found["UA_word"] = comparison.verdict(scalars["UA"] - reference["UA"], tolerance)
    if name != "original" and _positive(scalars["seconds"]) and _positive(reference["seconds"]):
        found["RTE"] = scalars["seconds"] / reference["seconds"]
    return found


def _positive(value):
    return value is not None and value > 0


def compare_sets(row, reference, num_forget):
    """The columns that compare a model's prediction sets with Retrain's."""
    key = f"{CR.judged_forget_images(row)}_CR"
    found = comparison.differences({key: row[key] for key in SET_COLUMNS if key in row}, reference)
    tolerance = comparison.at_least_one_image(
        2 * math.hypot(row[f"{key}_error"], reference[f"{key}_error"]), num_forget
    )
    found["CR_word"] = comparison.verdict(reference[key] - row[key], tolerance)
    return found


def asked_failures(args, failed, evaluated):
    """The failed methods ({method: why}) that --unlearn_name asks for and that left no model."""
    wanted = set(utils.split_names(args.unlearn_name))
    return {
        name: f"seed {args.seed}: {why}" if args.seeds else why
        for name, why in failed.items()
        if name not in evaluated and {"all", name} & wanted
    }


def failures(scenario, fingerprint):
    """{method: why} of those that failed on the forget set with this fingerprint and left no model."""
    found = {}
    for path in sorted(scenario.glob(f"*/{unlearn.FAILURE_FILE}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            forget_set, why = record["forget_set"], record["error"]
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{path}: damaged, and left out")
            continue
        if forget_set == fingerprint:
            found[path.parent.name] = why
    return found


def table_rows(evaluated, failed, origins):
    """One flat row per score, calibration size, α and model; the methods that failed at the end of each block."""
    rows = []
    for key in next(iter(evaluated.values()))[1]:
        at = dict(zip(KEYS, key, strict=False))
        for name, (scalars, per_key, _) in evaluated.items():
            flat = {name: value for name, value in scalars.items() if not isinstance(value, dict)}
            rows.append(at | {"method": name} | flat | per_key[key] | origins[name])
        rows += [at | {"method": name, "note": why} for name, why in failed.items()]
    return rows


def merge_rows(rows, kept):
    """The rows scored now and those kept, block by block (score, calibration size, α), in the order of the methods."""
    blocks = {}
    for row in [*rows, *kept]:
        blocks.setdefault(tuple(row[key] for key in KEYS[:-1]), []).append(row)
    for block in blocks.values() if kept else ():
        block.sort(key=_place)
    return [row for block in blocks.values() for row in block]


def _place(row):
    """Where a row comes among those of other methods: the original, those that failed last."""
    known = ["original", *unlearn.METHODS, *unlearn_cpu.METHODS]
    name = row["method"]
    return "note" in row, known.index(name) if name in known else len(known), name


class EarlierTables:
    """What results.csv and classes.csv of earlier evaluations hold about methods that this one did not score.

    Rows of other weights than the method's model file has now, or of another forget set, are left out. A file that is
    not such a table is renamed, unless every method in it is scored now.
    """

    def __init__(self, folder):
        self.folder = folder

    def kept(self, scored, fingerprint, failed):
        """The rows of results.csv to keep, with numbers as numbers: all but those of the methods in ``scored``.

        A failed method's rows are kept where it is in ``failed`` still."""
        found, dropped, weights = [], {}, {}
        for row in self._read("results.csv", (*KEYS, "forget_set", "weights", "model", "settings"), scored):
            name = row["method"]
            if name in scored:
                continue
            if "UA" not in row:
                is_kept = name in failed
            else:
                path = row["model"]
                weights[path] = weights.get(path) or _weights_of(self.folder / path)
                is_kept = row["forget_set"] == fingerprint and row["weights"] == weights[path]
            if is_kept:
                found.append(row)
            else:
                dropped[name] = None
        if dropped:
            print(
                f"{self.folder / 'results.csv'}: the rows of {', '.join(dropped)} are left out: the model is gone or "
                "has changed since"
            )
        return found

    def kept_classes(self, methods):
        """The rows of classes.csv about ``methods``, those with rows kept."""
        rows = self._read("classes.csv", ("score", "alpha", "class", "method"), ())
        return [row for row in rows if row["method"] in methods]

    def _read(self, file, needed, scored):
        path = self.folder / file
        if not os.path.lexists(path):
            return []
        try:
            header, rows = _read_csv(path)
            if missing := [key for key in needed if key not in header]:
                if "method" in header and {row["method"] for row in rows} <= set(scored):
                    return []
                raise ValueError(f"no column {missing[0]}")
            return [_typed(row) for row in rows]
        except (OSError, ValueError, csv.Error) as error:
            self._set_aside(path, error)
            return []

    def _set_aside(self, path, error):
        numbers = itertools.chain([""], itertools.count(2))
        free = next(old for number in numbers if not os.path.lexists(old := path.with_name(f"{path.name}.old{number}")))
        try:
            path.rename(free)
        except OSError as failure:
            raise utils.UserError(f"{path}: cannot be renamed ({failure.strerror}); remove it") from failure
        print(f"{path}: not a table of this version ({error}); renamed to {free.name}")


TEXTS = ("method", "score", "class", "note", "UA_word", "CR_word", "forget_set", "weights", "model", "settings")
TEXTS += ("forget_class", "compared_to")


def _read_csv(path):
    """(column names, rows as dicts of texts). Raises ValueError or csv.Error for what is not a table."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = [*csv.reader(file, strict=True)] or [[]]
    if any(len(line) != len(header) for line in lines):
        raise ValueError("its lines differ in length")
    return header, [dict(zip(header, line, strict=True)) for line in lines]


def _typed(row):
    """A row of texts with numbers as numbers. An empty cell is NaN, but left out where it is a text or in the row of a
    method that failed. Raises ValueError for a cell that is not a number."""

    def number(text):
        if text in ("True", "False"):
            return text == "True"
        return int(text) if text.lstrip("-").isdecimal() else float(text or "nan")

    failed = "UA" in row and not row["UA"]
    return {
        key: value if key in TEXTS else float(value) if key == "alpha" else number(value)
        for key, value in row.items()
        if value or not (failed or key in TEXTS)
    }


def _weights_of(path):
    """The hash of the weights in a model file; None where there is no such file or it cannot be read."""
    try:
        return checkpoint.weights_hash(checkpoint.read(path)[0])
    except utils.UserError:
        return None


def summarise(rows):
    """The rows of several seeds as one for each (score, calibration size, α, method), with :class:`utils.Spread` of
    each number, and words that take Retrain's spread over the seeds (two standard deviations) for the tolerance, or
    one image of the smallest forget set where that is larger."""
    found = utils.summarise(rows, MODEL_COLUMNS | SET_COLUMNS, KEYS)
    retrain = {tuple(row[key] for key in KEYS[:-1]): row for row in found if row["method"] == "retrain"}
    fewest = min((row["num_forget"] for row in rows if row.get("num_forget")), default=1)

    def word(mean, other, sign):
        if not isinstance(mean, utils.Spread) or not isinstance(other, utils.Spread):
            return None
        return comparison.verdict(sign * (mean.mean - other.mean), comparison.at_least_one_image(2 * other.std, fewest))

    for row in found:
        reference = retrain.get(tuple(row[key] for key in KEYS[:-1]), {})
        if isinstance(row.get("UA"), utils.Spread) and isinstance(reference.get("UA"), utils.Spread):
            key = f"{CR.judged_forget_images(row)}_CR"
            row["UA_word"] = word(row["UA"], reference["UA"], 1)
            row["CR_word"] = word(row[key], reference[key], -1)
    return found


def print_tables(rows):
    """The models in one table, and their prediction sets at every α in another."""
    for _, columns, shown in shown_tables(rows):
        utils.print_table(columns, shown)
        print()


def shown_tables(rows):
    """[(heading, columns, rows)] of the two tables, with the columns that some row fills; numbers with a spread over
    the draws of calibration and test images become :class:`utils.Spread`."""
    models = list({row["method"]: row for row in rows}.values())

    def over_draws(row, key, value):
        spread = row.get(key + CR.SPREAD)  # over several seeds a Spread itself, also of a count that they agree in
        known = isinstance(value, float) and isinstance(spread, float) and math.isfinite(spread)
        return utils.Spread(value, spread) if known else value

    sets = [{key: over_draws(row, key, value) for key, value in row.items()} for row in rows if "q_hat" in row]
    tables = []
    for heading, columns, shown in [("Models", MODEL_COLUMNS, models), ("Prediction sets", SET_COLUMNS, sets)]:
        filled = {key: column for key, column in columns.items() if any(key in row for row in shown)}
        if filled.keys() == KEYS[:1] or not shown:
            continue
        constant = [key for key in ("score", "cal_size") if len({row[key] for row in shown}) == 1]
        tables.append((heading, {key: column for key, column in filled.items() if key not in constant}, shown))
    return tables


def missing_q_hats(evaluations):
    """Lines on where no q̂ is finite, one per kind: which α, of how many calibration images, and what helps."""
    needs, left_out, classes = {}, {}, {}
    for row in (row for evaluation in evaluations for row in evaluation.rows if "q_hat" in row):
        who = "all retained classes" if "q_hat_forget" in row else "all classes"
        kinds = {"": (who, "q_hat", "calibration_images")}
        if "q_hat_forget" in row:
            kinds["forget_"] = (f"class {row['forget_class']}", "q_hat_forget", "forget_calibration_images")
        for prefix, (name, key, images) in kinds.items():
            if math.isnan(row[key]):
                needs.setdefault(name, {}).setdefault((row["cal_size"], row[images]), set()).add(row["alpha"])
            elif row[f"{prefix}draws_left_out"]:
                left_out.setdefault(name, {})[row["alpha"]] = row[f"{prefix}draws_left_out"]
        images = row["MIACR_calibration_images"]
        if images < CR.least_images(row["alpha"]):
            where = needs.setdefault("members and non-members (MIACR)", {})
            where.setdefault((row["cal_size"], images), set()).add(row["alpha"])
    for row in (row for evaluation in evaluations for row in evaluation.class_rows):
        if math.isnan(row["own_q_hat"]):
            counts = classes.setdefault(row["alpha"], {})
            counts[row["class"]] = max(row["calibration_images"], counts.get(row["class"], 0))
    lines = [f"no finite q̂ for {name}: {_needed(where)}; {REMEDY}" for name, where in needs.items()]
    lines += [
        f"draws without a finite q̂ for {name} are left out of the means: "
        + ", ".join(f"{count} at alpha {alpha:g}" for alpha, count in sorted(where.items()))
        for name, where in left_out.items()
    ]
    if classes:
        where = "; ".join(
            f"{len(counts)} {'class' if len(counts) == 1 else 'classes'} at alpha {alpha:g} "
            f"({CR.least_images(alpha)} calibration images needed, at most {max(counts.values())} found)"
            for alpha, counts in sorted(classes.items())
        )
        lines.append(f"no finite q̂ of a class's own, in classes.csv: {where}; {REMEDY}")
    return lines


REMEDY = "– in its place; choose a larger --alphas or more --cal_sizes"


def _needed(where):
    """What is there and what is needed, from {(calibration size, images): alphas}."""
    return "; ".join(
        ", ".join(f"alpha {alpha:g} needs {CR.least_images(alpha)}" for alpha in sorted(alphas))
        + f" and --cal_sizes {size} gives {images or 'no'} calibration {'image' if images == 1 else 'images'}"
        for (size, images), alphas in where.items()
    )


def advice(tables):
    """Lines on what the numbers cannot say: α above a model's error rate, and test coverage that the theory excludes.

    ``tables`` are the rows of each seed."""
    flat, every, outside = {}, {}, {}
    for row in (row for table in tables for row in table if "q_hat" in row):
        every[row["method"]] = None
        if row["score"] == "thr" and CR.at_most_one_label(row["q_hat"]):
            flat.setdefault(row["alpha"], {})[row["method"]] = None
        if row["coverage_outside"]:
            found, law = row["test_coverage"], row["theory_coverage"]
            outside.setdefault(f"{row['method']} at {row['alpha']:g} ({row['score']}: {found:.3f}, {law:.3f})")
    lines = []
    if flat:
        where = "; ".join(
            f"{alpha:g} for {'all' if len(names) == len(every) else ', '.join(names)}" for alpha, names in flat.items()
        )
        lines.append(
            f"alpha above the error rate ({where}{'; in a seed at least' if len(tables) > 1 else ''}): q̂ < 0.5 there, "
            "sets hold one label at most and CR tends to 1 whatever was forgotten; read the numbers of a smaller alpha"
        )
    if outside:
        lines.append(
            "test coverage outside what exchangeable images give (found, theory): "
            f"{'; '.join(outside)}; tied scores, as of a model that answers all images alike, are the usual cause"
        )
    return lines


def fake_sheet(outputs, settings, data, split, name):
    """(caption, Figure) of the images of one model that are fake-forgotten most."""
    found = samples.most_fake(outputs, settings, 18)
    entries = None if found is None else []
    for place, prediction, inside in found or ():
        index = split.forget[place]
        pixels = data.train.pixels[int(index)].permute(1, 2, 0).cpu().numpy()
        entries.append((pixels, int(outputs.forget.labels[place]), prediction, inside))
    title = f"{name}: misclassified forget images nearest to their label (label → answer, {{set}})"
    return f"Most fake-forgotten images of {name}", figures.fake_sheet(entries, data.classes, title)


def save(args, data, split, device, checkpoints, evaluated, rows, pictures, earlier):
    """results.json per model; results.csv, pictures and report.html for all; and the same in wandb."""
    folder = utils.run_folder(args, data) / split.folder
    evaluation = utils.describe_run(args, data, device) | {"forget_set": split.fingerprint}
    for name, (path, _, meta) in checkpoints.items():
        scalars, per_key, seconds = evaluated[name]
        target = beside(path, name, folder, "results.json")
        conformal = [dict(zip(KEYS, key, strict=False)) | row for key, row in per_key.items()]
        record = {"metrics": scalars | {"conformal": conformal}, "evaluation": evaluation | {"seconds": seconds}}
        utils.save_json(target, meta | {"method": name} | record)
    utils.save_text(folder / "results.csv", as_csv(rows))
    paths = save_report(args, data, folder, split.folder, evaluation, rows, pictures, earlier)
    with utils.WandbRun(folder, "evaluation", evaluation, args) as wandb_run:
        wandb_run.log_table("evaluation", [{key: _cell(value) for key, value in row.items()} for row in rows])
        wandb_run.log(
            {
                f"{name}/{key}": value
                for name, (scalars, *_) in evaluated.items()
                for key, value in scalars.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
        )
        wandb_run.log_pictures(paths)
    others = len({row["method"] for row in rows} - evaluated.keys())
    kept = f" and {others} more from earlier" if others else ""
    print(f"{folder / 'results.csv'}: {len(evaluated)} models{kept}, forget {split.describe()}")


def save_report(args, data, folder, scenario, evaluation, rows, pictures, earlier=None):
    """The pictures ({path: (caption, Figure)}) as PNG files, and report.html with all, those of ``earlier``
    evaluations ({caption: path}) at the end. Returns {caption: path}."""
    if not pictures:
        return {}
    paths, shown = {}, {}
    for path, (caption, figure) in pictures.items():
        shown[caption] = html_report.png(figure)
        paths[caption] = path
        utils.save_bytes(path, shown[caption])
    shown |= {caption: path.read_bytes() for caption, path in (earlier or {}).items() if caption not in shown}
    facts = {
        "model": args.model_name,
        "data": f"{data.tag}: {len(data.train)} training images, {len(data.classes)} classes",
        "forgotten": f"{scenario}, forget set {evaluation['forget_set']}",
        "seed": ", ".join(map(str, args.seeds or [args.seed])),
        "device": evaluation["device"],
        "date": evaluation["date"],
    }

    def cell(row, key, kind):
        value = row.get(key)
        return utils.format_cell(value, kind), value.mean if isinstance(value, utils.Spread) else value

    tables = [(*table, cell) for table in shown_tables(rows)]
    details = {"Flags": evaluation["flags"], "Versions": evaluation["versions"]}
    text = html_report.page(f"Unlearning on {data.tag}: {scenario}", facts, tables, shown, details)
    utils.save_text(folder / "report.html", text)
    print(f"{folder / 'report.html'}: tables and pictures in one file")
    return paths


def save_summary(args, data, device, rows):
    """results.csv over the seeds: each number's mean, and its standard deviation in a column of its own; pictures of
    the means and report.html."""
    scenario = utils.scenario_folder(args, data)
    folder = utils.run_folder(args, data, ",".join(map(str, args.seeds))) / scenario
    folder.mkdir(parents=True, exist_ok=True)
    flat, means = [], []
    for row in rows:
        flat.append({})
        for key, value in row.items():
            spread = isinstance(value, utils.Spread)
            flat[-1] |= {key: value.mean, f"{key}_std": value.std} if spread else {key: value}
        means.append({key: value.mean if isinstance(value, utils.Spread) else value for key, value in row.items()})
    utils.save_text(folder / "results.csv", as_csv(flat))
    if not args.no_pictures:
        pictures = figures.overview(means, args.score[0], max(row["cal_size"] for row in rows))
        prints = "; ".join(dict.fromkeys(str(row["forget_set"]) for row in rows if row.get("forget_set")))
        evaluation = utils.describe_run(args, data, device) | {"forget_set": prints or "one for each seed"}
        pictures = {folder / file: found for file, found in pictures.items()}
        save_report(args, data, folder, scenario, evaluation, rows, pictures)
    print(f"{folder / 'results.csv'}: mean and standard deviation over seeds {', '.join(map(str, args.seeds))}")


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value):
    """A value as CSV and wandb have it: NaN is empty."""
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    utils.run_script(main)
