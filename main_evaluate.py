"""Score models: UA, RA, TA, membership attacks, and Coverage, Set Size, CR, fake forgetting and MIACR at each α.

    python main_evaluate.py --data_name digits --unlearn_name all --alphas 0.01,0.02,0.05

compares the methods whose models lie in the run folder, beside the original, and measures how far they are from
Retrain. Each image goes through a model once. Writes results.json and samples.csv beside each model; results.csv,
classes.csv, pictures and report.html for all of them; with --seeds 1,2,3 a table of mean±standard deviation too.
"""

import utils  # before torch

# isort: split
import csv
import io
import json
import math
import time

import numpy as np
import torch

import metrics
import unlearn
import unlearn_cpu
from metrics import CR, classwise, comparison, figures, html_report, probe, samples, scores

KEYS = ("score", "cal_size", "alpha", "method")
MODEL_COLUMNS = {"method": ("method", "text")} | metrics.columns("COLUMNS")
MODEL_COLUMNS |= {"gap": ("gap %", "percent"), "UA_word": ("by UA", "text")} | probe.COLUMNS
MODEL_COLUMNS |= {"seconds": ("time s", "seconds"), "RTE": ("RTE", "number"), "note": ("note", "text")}
SET_COLUMNS = {"score": ("score", "text"), "cal_size": ("n_cal", "text"), "alpha": ("alpha", "text")}
SET_COLUMNS |= {"method": ("method", "text")} | metrics.columns("ROW_COLUMNS") | {"CR_word": ("by CR", "text")}


def main():
    parser = utils.make_parser(__doc__)
    utils.add_scenario_flags(parser, "original and the methods in the run folder", unlearn.MODEL_FILE)
    add_evaluation_flags(parser)
    args = parser.parse_args()

    device = utils.pick_device(args)
    data = utils.load_data(args, device)
    tables = [evaluate_seed(seed_args, data, device) for seed_args in utils.each_seed(args)]
    rows = [row for table in tables for row in table]
    if args.seeds:
        rows = summarise(rows)
        save_summary(args, data, device, rows)
    print_tables(rows)
    for line in advice(tables):
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


def evaluate_seed(args, data, device):
    """Score the models of one seed and save what was found. Returns the rows of the table."""
    args.cal_sizes = args.cal_sizes or [utils.default_cal_size(data)]
    split = utils.make_split(data, args, max(args.cal_sizes))
    root = utils.run_folder(args, data)
    folder = root / split.folder
    checkpoints = read_models(locate_models(args, root, folder), args, data, split)
    model = utils.build_model(args, len(data.classes), data.train.size, device, pretrained=False)
    settings = settings_of(args)

    utils.prepare_folder(folder, 2**24)
    evaluated, histograms, class_rows, pictures = {}, {}, [], {}
    for name, (path, state, meta) in checkpoints.items():
        start = time.perf_counter()
        utils.load_weights(model, state, path)
        outputs, scalars = collect_outputs(model, data, split, args)
        try:
            more, rows = metrics.evaluate(outputs, settings)
        except ValueError as error:
            raise utils.UserError(f"{path}: too few images to score: {error}") from error
        scalars |= more | {"seconds": meta.get("seconds"), "num_forget": len(split.forget)}
        if args.relearn:
            scalars["relearn"] = relearn(model, outputs, data, split, settings, args)
        evaluated[name] = (scalars, rows, time.perf_counter() - start)

        class_rows += [{"method": name} | row for row in classwise.class_rows(outputs, settings, data.classes)]
        names = data.train.names and [data.train.names[index] for index in split.forget.tolist()]
        utils.prepare_folder(beside(path, name, folder, "samples.csv").parent, 2**20)
        audit = [
            row | {"label": data.classes[row["label"]], "prediction": data.classes[row["prediction"]]}
            for row in samples.sample_rows(outputs, settings, split.forget, names)
        ]
        utils.save_text(beside(path, name, folder, "samples.csv"), as_csv(audit))
        if not args.no_pictures:
            histograms[name] = figures.histogram_data(outputs, settings)
            pictures[beside(path, name, folder, "fake_forgotten.png")] = fake_sheet(
                outputs, settings, data, split, name
            )

    compare_to_retrain(evaluated)
    rows = table_rows(evaluated, failures(args, folder, split, evaluated))
    utils.save_text(folder / "classes.csv", as_csv(class_rows))
    if not args.no_pictures:
        shown = figures.overview(rows, args.score[0], max(args.cal_sizes))
        if args.score[0] == "thr":
            histogram = figures.score_histograms(histograms, args.alphas[0])
            shown["scores.png"] = ("Non-conformity scores", histogram)
        if args.relearn:
            curves = {name: scalars["relearn"] for name, (scalars, *_) in evaluated.items()}
            shown["relearn.png"] = ("Do they come back?", figures.relearn_curves(curves, args.alphas[0]))
        pictures = {folder / file: found for file, found in shown.items()} | pictures
    save(args, data, split, device, checkpoints, evaluated, rows, pictures)
    return rows


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
        state, meta = utils.read_checkpoint(path, "make it first with the same flags")
        utils.check_meta(path, meta, args, data)
        if meta.get("forget_set") not in (None, split.fingerprint):
            raise utils.UserError(
                f"{path}: unlearned another forget set ({meta['forget_set']}) than the flags say "
                f"({split.fingerprint}); give the --seed and unlearning flags that made it"
            )
        source = utils.weights_hash(state) if name == "original" else meta.get("identity", {}).get("original")
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
            found[part] = metrics.Output(*utils.compute_logits(model, images, indices, args.batch_size))
        else:
            *logits_labels, features[part] = utils.compute_features(model, images, indices, args.batch_size)
            found[part] = metrics.Output(*logits_labels)
    draws = metrics.draw_splits(len(found["held_out"].labels), args.resplits, args.seed)
    outputs = metrics.Outputs(**found, cal_sizes=args.cal_sizes, draws=draws, forgotten=forgotten)
    if split.forget_class is None:
        return outputs, {}
    features = {part: tensor.numpy() for part, tensor in features.items()}
    labels = {part: output.labels.numpy() for part, output in found.items()}
    tests = {"probe_forget": outputs.forget_test(), "probe_retain": outputs.test()}
    return outputs, probe.linear_probe(
        np.concatenate([features["retain"], features["forget"]]),
        np.concatenate([labels["retain"], labels["forget"]]),
        {key: (features["held_out"][chosen], labels["held_out"][chosen]) for key, chosen in tests.items()},
        args.seed,
    )


def relearn(model, outputs, data, split, settings, args):
    """How accuracy and coverage of forget images come back while a tenth of them is learnt again (--relearn K).

    Coverage is at the first α, under the first score, with q̂ taken anew from the retained classes' calibration images.
    """
    score, size = settings.scores[0], max(args.cal_sizes)
    calibration = split.calibration[:size][~split.is_forgotten[:size].to(split.calibration.device)]
    curve = {"step": [], "accuracy": [], "coverage": []}

    def measure(step, others):
        if step:
            held_out, forget = (
                metrics.Output(*utils.compute_logits(model, images, indices, args.batch_size))
                for images, indices in ((data.held_out, calibration), (data.train, others))
            )
        else:  # these have passed through the model
            held_out = outputs.held_out.of(outputs.calibration(size))
            forget = outputs.forget.of(torch.searchsorted(split.forget, others).cpu())
        held_out, forget = CR.score_part(held_out, score, "held_out"), CR.score_part(forget, score, "forget")
        q_hat = CR.conformal_quantile(held_out.own, settings.alphas[0])
        curve["step"].append(step)
        curve["accuracy"].append(1 - forget.wrong.double().mean().item())
        curve["coverage"].append((forget.own <= q_hat).double().mean().item())

    unlearn.relearn(model, data, split, args.seed, args.relearn, args.relearn_rate, measure)
    return curve


def compare_to_retrain(evaluated):
    """Where Retrain was scored too: the gap, signed differences, a plain word for them, and RTE, the ratio of running
    times.

    The words' tolerance is two standard errors over the images; several seeds have Retrain's spread
    (:func:`summarise`).
    """
    if "retrain" not in evaluated:
        return
    reference, reference_rows, _ = evaluated["retrain"]
    shown = {*MODEL_COLUMNS, *SET_COLUMNS}
    for name, (scalars, rows, _) in evaluated.items():
        scalars |= comparison.differences({key: scalars[key] for key in scalars if key in shown}, reference)
        for at, row in rows.items():
            row |= comparison.differences({key: row[key] for key in row if key in shown}, reference_rows[at])
            key = f"{CR.judged_forget_images(row)}_CR"
            error = math.hypot(row[f"{key}_error"], reference_rows[at][f"{key}_error"])
            tolerance = max(2 * error, 1 / scalars["num_forget"])
            row["CR_word"] = comparison.verdict(reference_rows[at][key] - row[key], tolerance)
        scalars["gap"] = comparison.gap(scalars, reference)
        tolerance = comparison.share_tolerance(reference["UA"], scalars["num_forget"])
        scalars["UA_word"] = comparison.verdict(scalars["UA"] - reference["UA"], tolerance)
        if name != "original" and scalars["seconds"] and reference["seconds"]:
            scalars["RTE"] = scalars["seconds"] / reference["seconds"]


def failures(args, scenario, split, evaluated):
    """{method: why} of the methods asked for that failed on this forget set and left no model."""
    wanted = utils.given_names(args.unlearn_name)
    found = {}
    for path in sorted(scenario.glob(f"*/{unlearn.FAILURE_FILE}")):
        name = path.parent.name
        try:
            record = json.loads(path.read_text())
            record["forget_set"], record["error"]  # noqa: B018 - are they there?
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{path}: damaged, and left out")
            continue
        if record["forget_set"] == split.fingerprint and name not in evaluated and {"all", name} & set(wanted):
            found[name] = f"seed {args.seed}: {record['error']}" if args.seeds else record["error"]
    return found


def table_rows(evaluated, failed):
    """One flat row per score, calibration size, α and model; the methods that failed at the end of each block."""
    rows = []
    for key in next(iter(evaluated.values()))[1]:
        at = dict(zip(KEYS, key, strict=False))
        for name, (scalars, per_key, _) in evaluated.items():
            flat = {name: value for name, value in scalars.items() if not isinstance(value, dict)}
            rows.append(at | {"method": name} | flat | per_key[key])
        rows += [at | {"method": name, "note": why} for name, why in failed.items()]
    return rows


def summarise(rows):
    """The rows of several seeds as one for each (score, calibration size, α, method), with :class:`utils.Spread` of
    each number, and words that take Retrain's spread over the seeds (two standard deviations) for the tolerance."""
    found = utils.summarise(rows, MODEL_COLUMNS | SET_COLUMNS, KEYS)
    retrain = {tuple(row[key] for key in KEYS[:-1]): row for row in found if row["method"] == "retrain"}
    for row in found:
        reference = retrain.get(tuple(row[key] for key in KEYS[:-1]), {})
        if "UA" in row and isinstance(reference.get("UA"), utils.Spread):
            key = f"{CR.judged_forget_images(row)}_CR"
            row["UA_word"] = comparison.verdict(row["UA"].mean - reference["UA"].mean, 2 * reference["UA"].std)
            row["CR_word"] = comparison.verdict(reference[key].mean - row[key].mean, 2 * reference[key].std)
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
    entries = []
    for place, prediction, inside in samples.most_fake(outputs, settings, 18):
        index = split.forget[place]
        pixels = data.train.pixels[int(index)].permute(1, 2, 0).cpu().numpy()
        entries.append((pixels, int(outputs.forget.labels[place]), prediction, inside))
    title = f"{name}: misclassified forget images nearest to their label (label → answer, {{set}})"
    return f"Most fake-forgotten images of {name}", figures.fake_sheet(entries, data.classes, title)


def save(args, data, split, device, checkpoints, evaluated, rows, pictures):
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
    paths = save_report(args, data, folder, split.folder, evaluation, rows, pictures)
    with utils.RunLog(folder, "evaluation", evaluation, args) as log:
        log.table("evaluation", rows)
        log.numbers(
            {
                f"{name}/{key}": value
                for name, (scalars, *_) in evaluated.items()
                for key, value in scalars.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
        )
        log.pictures(paths)
    print(f"{folder / 'results.csv'}: {len(evaluated)} models, forget {split.describe()}")


def save_report(args, data, folder, scenario, evaluation, rows, pictures):
    """The pictures ({path: (caption, Figure)}) as PNG files, and report.html with all. Returns {caption: path}."""
    if not pictures:
        return {}
    paths, shown = {}, {}
    for path, (caption, figure) in pictures.items():
        shown[caption] = html_report.png(figure)
        paths[caption] = path
        utils.save_bytes(path, shown[caption])
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
    utils.prepare_folder(folder, 2**20)
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
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    utils.run_script(main)
