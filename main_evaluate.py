"""Score models: UA, RA, TA, MIA, MIACR, and Coverage, Set Size, CR and fake forgetting at each α.

    python main_evaluate.py --data_name digits --unlearn_name all --alphas 0.01,0.02,0.05

compares the methods whose models lie in the run folder, beside the original, and measures the gap to Retrain. Each
image goes through a model once. Writes results.json beside each model, and results.csv for all of them; with
--seeds 1,2,3 a table of mean±standard deviation too.
"""

import csv
import io
import json
import time

import metrics
import unlearn
import unlearn_cpu
import utils
from metrics import CR

COLUMNS = {"alpha": ("alpha", "text"), "method": ("method", "text")}
COLUMNS |= {key: column for module in metrics.MODULES for key, column in module.COLUMNS.items()}
COLUMNS |= {"gap": ("gap %", "percent"), "seconds": ("time s", "seconds"), "RTE": ("RTE", "number")}
COLUMNS["note"] = ("note", "text")
GAP_OVER = ("UA", "RA", "TA", "MIA")


def main():
    parser = utils.make_parser(__doc__)
    utils.add_scenario_flags(parser, "original and the methods in the run folder", unlearn.MODEL_FILE)
    utils.add_evaluation_flags(parser)
    args = parser.parse_args()

    device = utils.pick_device(args.device)
    data = utils.load_data(args, device)
    tables = [evaluate_seed(seed_args, data, device) for seed_args in utils.each_seed(args)]
    rows = [row for table in tables for row in table]
    if args.seeds:
        rows = utils.summarise(rows, COLUMNS, ["cal_size", "alpha", "method"])
        save_summary(args, data, rows)
    utils.print_table(shown_columns(rows), rows)
    if line := advice(tables):
        print(line)
    return 0


def evaluate_seed(args, data, device):
    """Score the models of one seed and save what was found. Returns the rows of the table."""
    cal_sizes = args.cal_sizes or [utils.default_cal_size(data)]
    split = utils.make_split(data, args, max(cal_sizes))
    root = utils.run_folder(args, data)
    checkpoints = read_models(locate_models(args, root, root / split.folder), args, data, split)
    model = utils.build_model(args, len(data.classes), data.train.size, device, pretrained=False)

    utils.prepare_folder(root / split.folder, 2**20)
    evaluated = {}
    for name, (path, state, meta) in checkpoints.items():
        start = time.perf_counter()
        utils.load_weights(model, state, path)
        outputs = collect_outputs(model, data, split, cal_sizes, args)
        try:
            scalars, rows = metrics.evaluate(outputs, args.alphas, args.seed)
        except ValueError as error:
            raise utils.UserError(f"{path}: too few images to score: {error}") from error
        scalars["seconds"] = meta.get("seconds")
        evaluated[name] = (scalars, rows, time.perf_counter() - start)
    compare_to_retrain(evaluated)
    rows = table_rows(evaluated, failures(args, root / split.folder, split, evaluated))
    save(args, data, split, device, checkpoints, evaluated, rows)
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


def collect_outputs(model, data, split, cal_sizes, args):
    """One pass of every scored image through the model, divided into the parts that the metrics ask for."""
    parts = {
        "retain": (data.train, split.retain),
        "forget": (data.train, split.forget),
        "test": (data.held_out, split.test),
        "calibration": (data.held_out, split.calibration),
    }
    if split.forget_class is not None:
        parts["forget_test"] = (data.held_out, split.forget_test)
    found = {
        part: metrics.Output(*utils.compute_logits(model, images, indices, args.batch_size))
        for part, (images, indices) in parts.items()
    }
    calibration, forgotten = found.pop("calibration"), split.is_forgotten

    def of_size(wanted):
        return {
            size: metrics.Output(calibration.logits[:size][wanted[:size]], calibration.labels[:size][wanted[:size]])
            for size in cal_sizes
        }

    found["forget_calibration"] = of_size(forgotten) if split.forget_class is not None else None
    return metrics.Outputs(calibration=of_size(~forgotten), **found)


def compare_to_retrain(evaluated):
    """Where Retrain was scored too: the mean absolute difference over UA, RA, TA and MIA, and RTE, the ratio of the
    methods' running times."""
    if "retrain" in evaluated:
        reference = evaluated["retrain"][0]
        for name, (scalars, _, _) in evaluated.items():
            scalars["gap"] = sum(abs(scalars[key] - reference[key]) for key in GAP_OVER) / len(GAP_OVER)
            if name != "original" and scalars["seconds"] and reference["seconds"]:
                scalars["RTE"] = scalars["seconds"] / reference["seconds"]


def failures(args, scenario, split, evaluated):
    """{method: why} of the methods asked for that failed on this forget set and left no model."""
    wanted = utils.given_names(args.unlearn_name)
    found = {}
    for path in sorted(scenario.glob(f"*/{unlearn.FAILURE_FILE}")):
        record = json.loads(path.read_text())
        name = path.parent.name
        if record["forget_set"] == split.fingerprint and name not in evaluated and {"all", name} & set(wanted):
            found[name] = f"seed {args.seed}: {record['error']}" if args.seeds else record["error"]
    return found


def table_rows(evaluated, failed):
    """One flat row per calibration size, α and model; the methods that failed at the end of each block."""
    rows = []
    for size, alpha in next(iter(evaluated.values()))[1]:
        for name, (scalars, per_alpha, _) in evaluated.items():
            rows.append({"alpha": alpha, "cal_size": size, "method": name} | scalars | per_alpha[size, alpha])
        rows += [{"alpha": alpha, "cal_size": size, "method": name, "note": why} for name, why in failed.items()]
    return rows


def shown_columns(rows):
    """The columns that some row fills; the calibration size where there are several."""
    columns = {"cal_size": ("n_cal", "text")} | COLUMNS if len({row["cal_size"] for row in rows}) > 1 else COLUMNS
    return {key: column for key, column in columns.items() if any(key in row for row in rows)}


def advice(tables):
    """A line on the α that are above a model's error rate, where the conformal numbers say nothing; else None.

    ``tables`` are the rows of each seed."""
    flat, every = {}, {}
    for row in (row for table in tables for row in table if "q_hat" in row):
        every[row["method"]] = None
        if CR.at_most_one_label(row["q_hat"]):
            flat.setdefault(row["alpha"], {})[row["method"]] = None
    if not flat:
        return None
    where = "; ".join(
        f"{alpha:g} for {'all' if len(names) == len(every) else ', '.join(names)}" for alpha, names in flat.items()
    )
    return (
        f"alpha above the error rate ({where}{'; in a seed at least' if len(tables) > 1 else ''}): q̂ < 0.5 there, sets "
        "hold one label at most and CR tends to 1 whatever was forgotten; read the numbers of a smaller alpha"
    )


def save(args, data, split, device, checkpoints, evaluated, rows):
    """results.json per model and results.csv for all, and the same table in wandb."""
    root = utils.run_folder(args, data)
    evaluation = utils.describe_run(args, data, device) | {"forget_set": split.fingerprint}
    for name, (path, _, meta) in checkpoints.items():
        scalars, per_alpha, seconds = evaluated[name]
        folder = root / split.folder / name
        target = folder / "results.json" if path.parent in (folder, root) else path.with_suffix(".results.json")
        utils.prepare_folder(target.parent, 2**20)
        conformal = [{"cal_size": size, "alpha": alpha} | row for (size, alpha), row in per_alpha.items()]
        record = {"metrics": scalars | {"conformal": conformal}, "evaluation": evaluation | {"seconds": seconds}}
        utils.save_json(target, meta | {"method": name} | record)
    folder = root / split.folder
    utils.save_text(folder / "results.csv", as_csv(rows))
    with utils.RunLog(folder, "evaluation", evaluation, args) as log:
        log.table("evaluation", rows)
    print(f"{folder / 'results.csv'}: {len(evaluated)} models, forget set {split.fingerprint}")


def save_summary(args, data, rows):
    """results.csv over the seeds: each number's mean, and its standard deviation in a column of its own."""
    scenario = utils.scenario_folder(args, data)
    folder = utils.run_folder(args, data, ",".join(map(str, args.seeds))) / scenario
    utils.prepare_folder(folder, 2**20)
    flat = []
    for row in rows:
        flat.append({})
        for key, value in row.items():
            spread = isinstance(value, utils.Spread)
            flat[-1] |= {key: value.mean, f"{key}_std": value.std} if spread else {key: value}
    utils.save_text(folder / "results.csv", as_csv(flat))
    print(f"{folder / 'results.csv'}: mean and standard deviation over seeds {', '.join(map(str, args.seeds))}")


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    utils.run_script(main)
