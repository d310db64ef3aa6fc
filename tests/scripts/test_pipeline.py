"""The four scripts from training to the table and the report, on digits."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from faults import nan_initialisation
from helpers import (
    COMMON,
    PIPELINE_EVALUATION,
    QUIET,
    check,
    read_json,
    run_forked,
    run_in_process,
    visible_files,
    write_pictures,
)
from PIL import Image

import unlearn
import unlearn_cpu

METHODS = ["original", "retrain", "finetune", "cpu_finetune"]


def read_table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("method", METHODS[1:])
def test_method_is_recorded_and_leaves_nothing_else(method, pipeline):
    folder = pipeline.root / "random_0.9" / method
    documented = {"unlearning_model.pth", "history.jsonl", "results.json", "samples.csv"}
    assert visible_files(folder) == documented | {"fake_forgotten.png", "logits.npz", "wandb"}
    assert not list(pipeline.folder.rglob(".resume.pth"))
    results = read_json(folder / "results.json")
    original = read_json(pipeline.root / "original_model.json")
    assert results["method"] == method and results["seed"] == 1 and results["seconds"] > 0
    assert results["forget_set"] == "56d878fd8c3a6704" and results["num_forget"] == 80
    assert results["recipe"]["num_epochs"] == 3
    assert results["original_seconds"] == original["seconds"] > 0
    assert original["flags"]["num_epochs"] == 6 and len(original["history"]) == 6
    assert results["evaluation"]["flags"]["alphas"] == [0.05, 0.1]
    assert len((folder / "history.jsonl").read_text().splitlines()) == 3


SHARES = ("UA", "RA", "TA", "MIA", "MIACR", "gap", "forget_coverage", "test_coverage", "test_CR")


def test_numbers_of_the_table_are_consistent(pipeline):
    rows = read_table(pipeline.root / "random_0.9/results.csv")
    assert [(row["cal_size"], row["alpha"], row["method"]) for row in rows] == [
        (size, alpha, method)
        for size in ("100", "200")
        for alpha in ("0.05", "0.1")
        for method in METHODS
    ]
    reference = next(row for row in rows if row["method"] == "retrain")
    for row in rows:
        assert all(0 <= float(row[key]) <= 1 for key in SHARES), row
        assert float(row["test_set_size"]) <= 10
        assert float(row["forget_fake"]) <= int(row["forget_misclassified"]) <= 80
        assert float(row["UA"]) == pytest.approx(int(row["forget_misclassified"]) / 80)
        ratio = float(row["test_coverage"]) / float(row["test_set_size"])
        assert float(row["test_CR"]) == pytest.approx(ratio, rel=0.1)  # a mean of ratios
        assert 0 < float(row["test_coverage_resplit_std"]) < 0.1
        differences = [float(row[key]) - float(reference[key]) for key in ("UA", "RA", "TA", "MIA")]
        assert float(row["gap"]) == pytest.approx(np.mean(np.abs(differences)))
        assert float(row["TA_minus_retrain"]) == pytest.approx(differences[2])
        for cell in (row["by_UA"], row["by_CR"]) if row["method"] != "retrain" else ():
            assert cell.startswith("[") or cell.endswith("forgets")


def test_coverage_of_test_images_is_near_its_level(pipeline):
    for row in read_table(pipeline.root / "random_0.9/results.csv"):
        n, tested, level = int(row["cal_size"]), 700, 1 - float(row["alpha"])
        spread = (level * (1 - level) * (1 / n + 1 / tested)) ** 0.5
        assert abs(float(row["test_coverage"]) - level) < 4 * spread + 1 / n


# ---------------------------------------------------------------- a second run


def test_second_evaluation_writes_the_same_bytes(pipeline):
    command = ["main_evaluate.py", *COMMON, "--unlearn_name", "all", *PIPELINE_EVALUATION]
    scenario = pipeline.root / "random_0.9"
    names = ("results.csv", "classes.csv", "finetune/samples.csv", "cr_plane.png")
    before = [(scenario / name).read_bytes() for name in names]
    check(run_in_process(*command, "--batch_size", 512, cwd=pipeline.folder))
    assert [(scenario / name).read_bytes() for name in names] == before


# ---------------------------------------------------------------- all methods, several seeds

TWO_SEEDS = [*COMMON, "--seeds", "1,2", "--runs_dir", "r"]
TWO_SEEDS += ["--data_name", "image_folder", "--data_dir", "pictures"]
FROM_NEW_WEIGHTS = {"retrain", "teacher"}


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """All methods over two seeds, with small pictures of two classes.

    The first time, networks start from NaN. ``failing``, ``scored_failing``, ``again`` and
    ``scored`` are what the commands printed, in their order.
    """
    folder = tmp_path_factory.mktemp("seeds")
    write_pictures(folder / "pictures", 100, 300)
    every = [*TWO_SEEDS, "--unlearn_name", "all"]
    unlearn_all = ["main_unlearn.py", *every, "--num_epochs", 1]
    evaluate = ["main_evaluate.py", *every, "--alphas", "0.2", "--resplits", 3]

    def run(*command):
        return check(run_forked(*command, cwd=folder))

    run("main_original_model.py", *TWO_SEEDS, "--num_epochs", 4, "--learning_rate", 0.01)
    failing = run_forked(*unlearn_all, cwd=folder, before=nan_initialisation.install)
    run("main_unlearn_cpu.py", *every, "--num_epochs", 1, "--alpha", "0.1")
    scored_failing = run(*evaluate, "--no_pictures")
    again = run(*unlearn_all)
    scored = run(*evaluate)
    return SimpleNamespace(
        folder=folder / "r",
        failing=failing,
        scored_failing=scored_failing.stdout,
        again=again.stdout,
        scored=scored.stdout,
    )


def test_diverging_methods_are_rows_and_the_others_still_run(two_seeds):
    output = two_seeds.failing.stdout
    assert two_seeds.failing.returncode == 2, output + two_seeds.failing.stderr
    table = output[output.index(" method ") :].splitlines()[1:]
    assert [line.split()[0] for line in table] == list(unlearn.METHODS)
    diverged = {line.split()[0]: line for line in table if "diverged in epoch 1" in line}
    assert diverged.keys() == FROM_NEW_WEIGHTS
    assert all("seed 1: " in line and "seed 2: " in line for line in diverged.values())
    assert all("±" in line for line in table if line.split()[0] not in diverged)


def test_failures_are_rows_until_the_command_is_repeated_which_runs_them_alone(two_seeds):
    lines = two_seeds.scored_failing.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["retrain"])
    assert set(row.split()[1:]) == {"–"}
    (reason,) = (line for line in lines if line.startswith("retrain: "))
    assert "seed 1: retrain diverged in epoch 1" in reason and "seed 2: retrain" in reason
    assert "diverged" not in two_seeds.scored
    finished = len(unlearn.METHODS) - len(FROM_NEW_WEIGHTS)
    assert two_seeds.again.count("already done") == 2 * finished


def test_summary_has_mean_and_deviation_over_seeds(two_seeds):
    folders = [
        two_seeds.folder / f"resnet18w8_image_folder-pictures_seed{seed}/random_0.9"
        for seed in (1, 2)
    ]
    first, second = (read_table(folder / "results.csv") for folder in folders)
    summary_folder = two_seeds.folder / "resnet18w8_image_folder-pictures_seeds1,2/random_0.9"
    summary = read_table(summary_folder / "results.csv")
    every = ["original", *unlearn.METHODS, *unlearn_cpu.METHODS]
    assert [row["method"] for row in summary] == every
    for rows in zip(first, second, summary, strict=True):
        for key in ("UA", "TA", "gap", "forget_CR", "seconds", "q_hat"):
            pair = [float(row[key]) for row in rows[:2]]
            assert float(rows[2][key]) == pytest.approx(np.mean(pair)), key
            assert float(rows[2][f"{key}_std"]) == pytest.approx(np.std(pair, ddof=1)), key
    reference = next(row for row in summary if row["method"] == "retrain")
    for row in summary:
        if row is not reference:
            low, high = (float(row[f"UA_minus_retrain_{end}"]) for end in ("low", "high"))
            assert low + high == pytest.approx(2 * (float(row["UA"]) - float(reference["UA"])))
            assert row["by_UA"].endswith("forgets") == (low > 0 or high < 0)
    assert (summary_folder / "report.html").is_file()


# ---------------------------------------------------------------- scenarios and options


def test_default_class_forgetting_keeps_the_other_classes(tmp_path):
    """Accuracy is below 5 % on the class and within 3 points of the original on other classes."""
    common = ["--width", 16, "--device", "cpu", *QUIET]
    methods = ["retrain", "delete", "salun", "sfron"]
    forget = [*common, "--unlearn_type", "class", "--unlearn_name", *methods]
    check(run_forked("main_original_model.py", *common, cwd=tmp_path))
    check(run_forked("main_unlearn.py", *forget, cwd=tmp_path))
    root = tmp_path / "runs/resnet18_digits_seed1"
    original = read_json(root / "original_model.json")["accuracies"]["retain"]
    for method in methods:
        accuracies = read_json(root / "class_9" / method / "results.json")["accuracies"]
        assert accuracies["forget"] < 0.05, (method, accuracies)
        assert accuracies["retain"] > original - 0.03, (method, accuracies)


def test_class_forgetting_is_scored_by_both_calibrations_and_a_probe(pipeline):
    common = [*COMMON, "--unlearn_type", "class", "--forget_class", 3]

    def run(script, *arguments):
        return check(run_in_process(script, *common, *arguments, cwd=pipeline.folder))

    run("main_unlearn.py", "--unlearn_name", "finetune", "--num_epochs", 2)
    run("main_unlearn_cpu.py", "--unlearn_name", "retrain", "--num_epochs", 1)
    evaluate = ["--unlearn_name", "all", "--alphas", "0.1", "--resplits", 5, "--relearn", 2]
    done = run("main_evaluate.py", *evaluate, "--columns", "all")
    rows = read_table(pipeline.root / "class_3/results.csv")
    assert [row["method"] for row in rows] == ["original", "finetune", "cpu_retrain"]
    headings = ("Cov_f|r %", "MIACR %", "probe_f %", "±")
    assert all(heading in done.stdout for heading in headings)
    assert all(row["forget_by_retain_coverage"] for row in rows)
    assert float(rows[1]["UA"]) > 0.9  # two epochs without the class
    assert all(0 <= float(row["probe_forget"]) <= 1 for row in rows)
    assert float(rows[0]["probe_retain"]) > 0.5
    classes = read_table(pipeline.root / "class_3/classes.csv")
    forgotten = {row["class"] for row in classes if row["forget_images"] != "0"}
    assert len(classes) == 10 * len(rows) and forgotten == {"3"}


# ---------------------------------------------------------------- scores, pictures, the report

SCORES = ("thr", "aps", "raps")


def test_every_score_and_relearning_are_in_tables_and_pictures(pipeline, tmp_path):
    names = ["retrain", "cpu_finetune"]
    scenario = tmp_path / "runs" / pipeline.root.name / "random_0.9"
    for name in names:
        (scenario / name).mkdir(parents=True)
        model = pipeline.root / "random_0.9" / name / "unlearning_model.pth"
        (scenario / name / "unlearning_model.pth").symlink_to(model)
    command = ["main_evaluate.py", *COMMON, "--unlearn_name", *names, "--alphas", "0.1,0.2"]
    more = ["--score", ",".join(SCORES), "--resplits", 4, "--relearn", 5]
    check(run_in_process(*command, *more, cwd=tmp_path))
    rows = read_table(scenario / "results.csv")
    assert [(row["score"], row["alpha"], row["method"]) for row in rows] == [
        (score, alpha, name) for score in SCORES for alpha in ("0.1", "0.2") for name in names
    ]
    for row in rows:
        assert abs(float(row["test_coverage"]) - 1 + float(row["alpha"])) < 0.05
    for name in names:
        assert len(read_table(scenario / name / "samples.csv")) == 80
    pictures = {path.name for path in scenario.glob("*.png")}
    assert {"cr_plane.png", "against_alpha.png", "scores.png", "relearn.png"} <= pictures
    for path in scenario.rglob("*.png"):  # nothing is logged to wandb
        with Image.open(path) as image:
            assert min(image.size) > 150, path
            assert len(image.getcolors(2**20) or range(9)) > 4, path
