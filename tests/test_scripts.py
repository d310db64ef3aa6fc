"""The four scripts as users run them, from training to the table."""

import csv
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PIPELINE_EVALUATION, TINY, fails_in_one_line, flags, read_json, run_script, succeed
from PIL import Image

import main_evaluate
import models
import unlearn
import unlearn_cpu
import utils
from metrics import comparison
from models import checkpoint

METHODS = ["original", "retrain", "finetune", "cpu_finetune"]
PUBLISHED = """
main_original_model.py --model_name resnet18 --data_name cifar10 --data_dir ./data --batch_size 64 --num_epochs 200 --learning_rate 0.1 --num_classes 10
main_unlearn.py --unlearn_name retrain --unlearn_type random --model_name resnet18 --data_name cifar10 --data_dir ./data --model_dir original_model.pth --num_epochs 200 --num_classes 10 --retain_ratio 0.9 --learning_rate 0.01
main_unlearn_cpu.py --unlearn_name finetune --unlearn_type random --model_name resnet18 --data_name cifar10 --data_dir ./data --model_dir original_model.pth --num_epochs 20 --num_classes 10 --retain_ratio 0.9 --learning_rate 0.1 --delta 0.01 --alpha 0.05 --lamda 0.5
main_evaluate.py --unlearn_name retrain --unlearn_type random --model_name resnet18 --data_name cifar10 --data_dir ./data --model_dir unlearning_model.pth --num_classes 10 --retain_ratio 0.9 --alphas 0.05
""".strip().splitlines()  # noqa: E501 - these lines are public and stay as they were published


def table_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- digits


def test_the_pipeline_leaves_every_record(pipeline):
    scenario = pipeline.root / "random_0.9"
    assert (pipeline.root / "original_model.pth").is_file()
    original = read_json(pipeline.root / "original_model.json")
    assert original["flags"]["num_epochs"] == 6 and len(original["history"]) == 6 and original["seconds"] > 0
    assert original["versions"]["torch"] == torch.__version__ and original["device"].startswith("cpu")
    for method in METHODS[1:]:
        assert {path.name for path in (scenario / method).iterdir()} == {
            "unlearning_model.pth", "history.jsonl", "results.json", "samples.csv", "fake_forgotten.png", "wandb",
            ".lock",
        }  # fmt: skip
        results = read_json(scenario / method / "results.json")
        assert results["method"] == method and results["seed"] == 1 and results["seconds"] > 0
        assert results["forget_set"] == "56d878fd8c3a6704" and results["num_forget"] == 80
        assert results["recipe"]["num_epochs"] == 3 and results["original_seconds"] == original["seconds"]
        assert len((scenario / method / "history.jsonl").read_text().splitlines()) == 3
    assert not list(pipeline.folder.rglob("*.part"))


def test_the_table_has_every_model_alpha_and_number(pipeline):
    rows = table_of(pipeline.root / "random_0.9/results.csv")
    assert [(row["cal_size"], row["alpha"], row["method"]) for row in rows] == [
        (size, alpha, method) for size in ("100", "200") for alpha in ("0.05", "0.1") for method in METHODS
    ]
    for row in rows:
        for key in ("UA", "RA", "TA", "MIA", "MIACR", "gap", "forget_coverage", "test_coverage", "test_CR"):
            assert 0 <= float(row[key]) <= 1, key
        assert float(row["test_set_size"]) <= 10
        assert float(row["forget_fake"]) <= int(row["forget_misclassified"]) <= 80
        assert float(row["UA"]) == pytest.approx(int(row["forget_misclassified"]) / 80)
        ratio = float(row["test_coverage"]) / float(row["test_set_size"])
        assert float(row["test_CR"]) == pytest.approx(ratio, rel=0.1)  # a mean of ratios
        assert 0 < float(row["test_coverage_resplit_std"]) < 0.1
    reference = next(row for row in rows if row["method"] == "retrain")
    for row in rows:
        gap = np.mean([abs(float(row[key]) - float(reference[key])) for key in ("UA", "RA", "TA", "MIA")])
        assert float(row["gap"]) == pytest.approx(gap)
        assert float(row["TA_minus_retrain"]) == pytest.approx(float(row["TA"]) - float(reference["TA"]))
        assert row["UA_word"] in comparison.WORDS and row["CR_word"] in comparison.WORDS
    said = pipeline.said["main_evaluate.py"].stdout
    assert all(heading in said for heading in ("UA %", "MIACR %", "Cov_f %", "CR_t", "fake", "gap %", "by CR", "±"))


def test_results_json_holds_the_same_numbers(pipeline):
    results = read_json(pipeline.root / "random_0.9/cpu_finetune/results.json")
    row = next(row for row in table_of(pipeline.root / "random_0.9/results.csv") if row["method"] == "cpu_finetune")
    assert results["metrics"]["UA"] == float(row["UA"])
    conformal = results["metrics"]["conformal"][0]
    assert (conformal["alpha"], conformal["cal_size"]) == (0.05, 100)
    assert conformal["forget_coverage"] == float(row["forget_coverage"])
    assert results["evaluation"]["flags"]["alphas"] == [0.05, 0.1] and results["identity"]["alpha"] == 0.05


def test_test_coverage_is_near_its_level(pipeline):
    for row in table_of(pipeline.root / "random_0.9/results.csv"):
        n, tested, level = int(row["cal_size"]), 700, 1 - float(row["alpha"])
        spread = (level * (1 - level) * (1 / n + 1 / tested)) ** 0.5
        assert abs(float(row["test_coverage"]) - level) < 4 * spread + 1 / n


def test_what_is_done_is_not_done_again(pipeline):
    path = pipeline.root / "random_0.9/finetune/unlearning_model.pth"
    before = path.stat().st_mtime_ns
    again = succeed(
        "main_unlearn.py", *TINY, "--unlearn_name", "finetune", "--num_epochs", 3, "--wandb_mode", "disabled",
        cwd=pipeline.folder,
    )  # fmt: skip
    assert "already done" in again.stdout and path.stat().st_mtime_ns == before


def test_evaluating_twice_gives_the_same_numbers(pipeline):
    command = ["main_evaluate.py", *TINY, "--unlearn_name", "all", *PIPELINE_EVALUATION]
    scenario = pipeline.root / "random_0.9"
    files = [scenario / name for name in ("results.csv", "classes.csv", "finetune/samples.csv", "cr_plane.png")]
    before = [path.read_bytes() for path in files]
    succeed(*command, "--batch_size", 512, "--wandb_mode", "disabled", cwd=pipeline.folder)
    assert [path.read_bytes() for path in files] == before


def test_a_model_at_a_path_and_a_bare_state_dict_are_scored(pipeline, tmp_path):
    state, _ = checkpoint.read(pipeline.root / "random_0.9/retrain/unlearning_model.pth")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "other.pth")
    arguments = [*TINY, "--unlearn_name", "retrain", "--alphas", "0.05", "--cal_sizes", "200"]
    succeed("main_evaluate.py", *arguments, "--model_dir", tmp_path / "other.pth", cwd=tmp_path)
    found = read_json(tmp_path / "other.results.json")["metrics"]
    known = read_json(pipeline.root / "random_0.9/retrain/results.json")["metrics"]
    assert {key: found[key] for key in ("UA", "RA", "TA", "MIA")} == {
        key: known[key] for key in ("UA", "RA", "TA", "MIA")
    }


def test_a_count_that_seeds_agree_in_is_shown_as_it_is():
    """No image is fake-forgotten in any seed, though the draws differ: easy data, such as digits at full width."""
    keys = {"score": "thr", "cal_size": 200, "alpha": 0.1, "method": "retrain", "q_hat": 0.9}
    seeds = [
        keys
        | {"forget_fake": 0.0, "forget_CR": number, "forget_fake_resplit_std": number, "forget_CR_resplit_std": 0.1}
        for number in (0.5, 0.7)
    ]
    rows = utils.summarise(seeds, main_evaluate.MODEL_COLUMNS | main_evaluate.SET_COLUMNS, main_evaluate.KEYS)
    *_, (_, columns, (shown,)) = main_evaluate.shown_tables(rows)
    assert shown["forget_fake"] == 0.0 and shown["forget_CR"] == pytest.approx((0.6, 0.02**0.5))
    utils.print_table(columns, [shown])
    *_, (_, _, (alone,)) = main_evaluate.shown_tables(seeds[:1])
    assert alone["forget_fake"] == (0.0, 0.5) and alone["forget_CR"] == (0.5, 0.1)


def test_all_methods_and_variants_in_one_table_over_seeds(tmp_path):
    """One command for each table; Retrain starts from NaN, and is a row that says so while the others go on."""
    common = [*TINY, "--seeds", "1,2", "--wandb_mode", "disabled", "--runs_dir", "r"]
    succeed("main_original_model.py", *common, "--num_epochs", 4, cwd=tmp_path)
    every = [*common, "--unlearn_name", "all"]
    done = run_script("main_unlearn.py", *every, "--num_epochs", 1, cwd=tmp_path, python_path=diverging(tmp_path))
    assert done.returncode == 2 and "seed 1: retrain diverged in epoch 1" in done.stdout, done.stdout + done.stderr
    table = done.stdout[done.stdout.index(" method ") :]
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(unlearn.METHODS)
    assert "±" in table and "seed 2: retrain diverged" in table
    succeed("main_unlearn_cpu.py", *every, "--num_epochs", 1, "--alpha", "0.1", cwd=tmp_path)

    evaluate = ["main_evaluate.py", *every, "--alphas", "0.2", "--resplits", 3]
    failing = succeed(*evaluate, "--no_pictures", cwd=tmp_path).stdout
    row = next(line for line in failing.splitlines() if " retrain " in line)
    assert "seed 1: retrain diverged in epoch 1" in row and "seed 2: retrain" in row
    again = succeed("main_unlearn.py", *every, "--num_epochs", 1, cwd=tmp_path)
    assert again.stdout.count("already done") == 2 * (len(unlearn.METHODS) - 1)

    said = succeed(*evaluate, cwd=tmp_path).stdout
    assert "RTE" in said and "±" in said and "diverged" not in said
    seeds = [table_of(tmp_path / f"r/resnet18w8_digits_seed{seed}/random_0.9/results.csv") for seed in (1, 2)]
    summary = table_of(tmp_path / "r/resnet18w8_digits_seeds1,2/random_0.9/results.csv")
    assert [row["method"] for row in summary] == ["original", *unlearn.METHODS, *unlearn_cpu.METHODS]
    for first, second, both in zip(*seeds, summary, strict=True):
        for key in ("UA", "TA", "gap", "forget_CR", "seconds", "q_hat"):
            pair = [float(first[key]), float(second[key])]
            assert float(both[key]) == pytest.approx(np.mean(pair)), key
            assert float(both[f"{key}_std"]) == pytest.approx(np.std(pair, ddof=1)), key
    reference = next(row for row in summary if row["method"] == "retrain")
    for row in summary:
        tolerance = 2 * float(reference["UA_std"])
        assert row["UA_word"] == comparison.verdict(float(row["UA"]) - float(reference["UA"]), tolerance)
    assert (tmp_path / "r/resnet18w8_digits_seeds1,2/random_0.9/report.html").is_file()
    retrain = next(row for row in seeds[0] if row["method"] == "retrain")
    for row in seeds[0][1:]:
        assert float(row["RTE"]) == pytest.approx(float(row["seconds"]) / float(retrain["seconds"]))


def test_a_saved_mask_is_reused(pipeline, tmp_path):
    common = [*TINY, "--runs_dir", "m", "--model_dir", pipeline.root / "original_model.pth"]
    common += ["--wandb_mode", "disabled", "--num_epochs", 1, "--unlearn_name", "salun"]
    scenario = tmp_path / "m" / pipeline.root.name / "random_0.9"
    succeed("main_unlearn.py", *common, "--mask_ratio", "0.25", cwd=tmp_path)
    mask, _ = checkpoint.read(scenario / "salun/saliency_mask.pth")
    share = sum(part.sum().item() for part in mask.values()) / sum(part.numel() for part in mask.values())
    assert share == pytest.approx(0.25, abs=1e-4)
    saved = scenario / "salun/saliency_mask.pth"
    first = checkpoint.read(scenario / "salun/unlearning_model.pth")[0]
    (tmp_path / "mask.pth").write_bytes(saved.read_bytes())
    succeed("main_unlearn.py", *common, "--mask_path", "mask.pth", "--overwrite", cwd=tmp_path)
    second = checkpoint.read(scenario / "salun/unlearning_model.pth")[0]
    assert all(first[name].equal(second[name]) for name in first)
    other = run_script("main_unlearn.py", *common, "--mask_path", scenario / "salun/unlearning_model.pth", cwd=tmp_path)
    fails_in_one_line(other, "--mask_path", "not a mask")


def test_classes_are_forgotten(tmp_path):
    """The defaults, on a narrower network: the class below 5 %, the others within 3 points of the original."""
    common = ["--width", 16, "--device", "cpu", "--wandb_mode", "disabled"]
    succeed("main_original_model.py", *common, cwd=tmp_path)
    methods = ["retrain", "GA", "salun", "sfron"]
    succeed("main_unlearn.py", *common, "--unlearn_type", "class", "--unlearn_name", *methods, cwd=tmp_path)
    root = tmp_path / "runs/resnet18w16_digits_seed1"
    original = read_json(root / "original_model.json")["accuracies"]["retain"]
    for method in methods:
        found = read_json(root / "class_9" / method / "results.json")["accuracies"]
        assert found["forget"] < 0.05 and found["retain"] > original - 0.03, (method, found)


def diverging(folder):
    """A Python path on which the network that retrain starts from, of seeds 1 and 2, is full of NaN."""
    path = folder / "diverging"
    path.mkdir()
    seeds = [utils.generator(seed, "retrain", "initialisation").initial_seed() for seed in (1, 2)]
    (path / "sitecustomize.py").write_text(
        "import torch\n"
        "plain, seed, last = torch.nn.init.kaiming_normal_, torch.manual_seed, []\n"
        "def remember(number):\n"
        "    last[:] = [number]\n"
        "    return seed(number)\n"
        "def broken(tensor, *a, **k):\n"
        f"    return tensor.data.fill_(float('nan')) if last and last[0] in {seeds} else plain(tensor, *a, **k)\n"
        "torch.manual_seed, torch.nn.init.kaiming_normal_ = remember, broken\n"
    )
    return path


def test_class_forgetting_end_to_end(pipeline):
    scenario = ["--unlearn_type", "class", "--forget_class", 3, "--wandb_mode", "disabled"]
    succeed("main_unlearn.py", *TINY, *scenario, "--unlearn_name", "finetune", "--num_epochs", 2, cwd=pipeline.folder)
    cpu = ["main_unlearn_cpu.py", *TINY, *scenario, "--unlearn_name", "retrain", "--num_epochs", 1]
    succeed(*cpu, cwd=pipeline.folder)
    command = ["main_evaluate.py", *TINY, *scenario, "--unlearn_name", "all", "--alphas", "0.1", "--resplits", 5]
    done = succeed(*command, "--relearn", 2, cwd=pipeline.folder)
    rows = table_of(pipeline.root / "class_3/results.csv")
    assert [row["method"] for row in rows] == ["original", "finetune", "cpu_retrain"]
    assert "Cov_f|r %" in done.stdout and all(row["forget_by_retain_coverage"] for row in rows)
    assert float(rows[1]["UA"]) > 0.9  # two epochs without the class
    assert "probe_f %" in done.stdout and all(0 <= float(row["probe_forget"]) <= 1 for row in rows)
    assert float(rows[0]["probe_retain"]) > 0.5
    classes = table_of(pipeline.root / "class_3/classes.csv")
    assert len(classes) == 30 and {row["class"] for row in classes if row["forget_images"] != "0"} == {"3"}


def test_coverage_that_ties_drive_off_its_level_is_said(pipeline, tmp_path):
    state, _ = checkpoint.read(pipeline.root / "random_0.9/retrain/unlearning_model.pth")
    state["fc.weight"].zero_()  # every image gets the same logits, those of the bias
    torch.save(state, tmp_path / "same.pth")
    arguments = [
        *TINY,
        "--unlearn_name",
        "retrain",
        "--alphas",
        "0.05",
        "--cal_sizes",
        "200",
        "--wandb_mode",
        "disabled",
    ]
    said = succeed("main_evaluate.py", *arguments, "--model_dir", tmp_path / "same.pth", cwd=tmp_path).stdout
    line = next(line for line in said.splitlines() if line.startswith("test coverage outside"))
    found, theory = (float(number) for number in line.split("(thr: ")[1].split(")")[0].split(", "))
    assert "retrain at 0.05" in line and found > 0.98 and theory == pytest.approx(0.95, abs=0.01)
    assert "test coverage outside" not in pipeline.said["main_evaluate.py"].stdout


def test_alpha_above_the_error_rate_is_said(tmp_path):
    common = [*TINY, "--wandb_mode", "disabled"]
    succeed("main_original_model.py", *common, "--width", 8, "--num_epochs", 20, cwd=tmp_path)
    unlearned = succeed(
        "main_unlearn_cpu.py", *common, "--width", 8, "--unlearn_name", "finetune", "--num_epochs", 2, "--alpha", 0.4,
        cwd=tmp_path,
    )  # fmt: skip
    assert "--alpha 0.4 is above the model's error rate" in unlearned.stdout
    scored = succeed(
        "main_evaluate.py", *common, "--width", 8, "--unlearn_name", "all", "--alphas", "0.4,0.01", cwd=tmp_path
    )
    line = next(line for line in scored.stdout.splitlines() if line.startswith("alpha above the error rate"))
    assert "0.4 for all" in line


def test_scores_relearning_and_pictures_end_to_end(pipeline, tmp_path):
    """Every score in one run, with relearning; all that is promised is written, and the numbers hang together."""
    names = ["retrain", "cpu_finetune"]
    for name in names:
        folder = tmp_path / "runs" / pipeline.root.name / "random_0.9" / name
        folder.mkdir(parents=True)
        (folder / "unlearning_model.pth").symlink_to(pipeline.root / f"random_0.9/{name}/unlearning_model.pth")
    common = ["--unlearn_name", *names, "--wandb_mode", "disabled", "--alphas", "0.1,0.2"]
    done = succeed(
        "main_evaluate.py", *TINY, *common, "--score", "thr,aps,raps,saps", "--resplits", 4, "--set_sizes", "2",
        "--relearn", 5, cwd=tmp_path,
    )  # fmt: skip
    scenario = folder.parent
    rows = table_of(scenario / "results.csv")
    assert [(row["score"], row["alpha"], row["method"]) for row in rows] == [
        (score, alpha, name) for score in ("thr", "aps", "raps", "saps") for alpha in ("0.1", "0.2") for name in names
    ]
    assert "score" in done.stdout.split("by CR")[0].splitlines()[-1]
    for row in rows:
        assert abs(float(row["test_coverage"]) - 1 + float(row["alpha"])) < 0.05
        assert float(row["test_ECF@2"]) <= float(row["test_coverage"])
        assert float(row["test_EuCF@2"]) <= 1 - float(row["test_coverage"]) + 1e-9
    for name in names:
        curve = read_json(scenario / name / "results.json")["metrics"]["relearn"]
        assert curve["step"] == [0, 1, 2, 4, 5]
        assert all(0 <= value <= 1 for key in ("accuracy", "coverage") for value in curve[key])
        assert len(table_of(scenario / name / "samples.csv")) == 80
    pictures = {"fake_forgetting.png", "cr_plane.png", "against_alpha.png", "scores.png", "relearn.png"}
    assert {path.name for path in scenario.glob("*.png")} == pictures
    for path in scenario.rglob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 150 and len(image.getcolors(2**20) or range(9)) > 4, path
    again = succeed("main_evaluate.py", *TINY, *common, "--no_pictures", "--not_randomized", cwd=tmp_path)
    assert "report.html" not in again.stdout


def test_the_report_is_one_file(pipeline):
    text = (pipeline.root / "random_0.9/report.html").read_text()
    assert text.count("data:image/png;base64,") == 4 + len(METHODS)
    assert "http" not in text.replace("http-equiv", "") and "56d878fd8c3a6704" in text and "cpu_finetune" in text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="what runs the report's script is no Python package; chromium in Debian")
def test_the_reports_tables_sort(pipeline, tmp_path):
    text = (pipeline.root / "random_0.9/report.html").read_text()
    clicked = tmp_path / "clicked.html"
    click = (
        "<script>addEventListener('load', () => { const heads = document.querySelectorAll('th');"
        "heads[1].click(); heads[1].click(); document.title = [...document.querySelector('tbody').rows]"
        ".map(row => row.cells[1].dataset.value).join(); })</script></body>"
    )
    clicked.write_text(text.replace("</body>", click))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", f"file://{clicked}"], capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    ).stdout  # fmt: skip
    order = [float(value) for value in shown.split("<title>")[1].split("</title>")[0].split(",")]
    assert len(order) == len(METHODS) and order == sorted(order, reverse=True)
    assert "aria-sort" in shown and shown.count("<img") == 4 + len(METHODS)


# ---------------------------------------------------------------- other data


@pytest.fixture
def cifar_files(tmp_path):
    """Files in the format of the CIFAR-10 archive, and a Python path on which their checksums pass."""
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{i}", 30) for i in range(1, 6)), ("test_batch", 200)]:
        labels = rng.integers(10, size=count)
        pixels = rng.integers(0, 80, size=(count, 3072)) + 17 * labels[:, None]
        batch = {"data": pixels.astype(np.uint8), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    path = tmp_path / "checksums"
    path.mkdir()
    (path / "sitecustomize.py").write_text(
        "import torchvision.datasets.cifar as cifar\n"
        "cifar.check_integrity = lambda *a, **k: True\n"
    )  # fmt: skip
    return tmp_path, path


def test_the_published_command_lines_run(cifar_files):
    folder, python_path = cifar_files
    for line in PUBLISHED:
        fewer = [] if line.startswith("main_evaluate") else ["--num_epochs", "1"]
        succeed(*line.split(), *fewer, cwd=folder, python_path=python_path)
    root = folder / "runs/resnet18_cifar10_seed1"
    assert [row["method"] for row in table_of(root / "random_0.9/results.csv")] == ["original", "retrain"]
    assert read_json(root / "random_0.9/retrain/results.json")["recipe"]["learning_rate"] == 0.01
    cpu = read_json(root / "random_0.9/cpu_finetune/results.json")
    assert (cpu["identity"]["alpha"], cpu["identity"]["delta"], cpu["identity"]["lamda"]) == (0.05, 0.01, 0.5)


def test_cifar_images_are_read_as_published(cifar_files, monkeypatch):
    import torchvision.datasets.cifar

    folder, _ = cifar_files
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = utils.load_data(flags(data_name="cifar10", data_dir=str(folder / "data")), torch.device("cpu"))
    batch = pickle.loads((folder / "data/cifar-10-batches-py/data_batch_1").read_bytes())
    assert data.train.pixels.shape == (150, 3, 32, 32) and data.train.pixels.dtype == torch.uint8
    assert data.train.pixels[3].flatten().tolist() == batch["data"][3].tolist()
    assert data.train.labels[:30].tolist() == batch["labels"] and data.classes[9] == "truck"

    (folder / "data/cifar-100-python").mkdir()
    labels = [0, 99, 42, 7] * 10
    pixels = np.arange(40 * 3072).reshape(40, 3072).astype(np.uint8)
    for name in ("train", "test"):
        batch = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * 40}
        (folder / "data/cifar-100-python" / name).write_bytes(pickle.dumps(batch))
    meta = {"fine_label_names": [f"class {number}" for number in range(100)]}
    (folder / "data/cifar-100-python/meta").write_bytes(pickle.dumps(meta))
    data = utils.load_data(flags(data_name="cifar100", data_dir=str(folder / "data")), torch.device("cpu"))
    assert data.train.labels.tolist() == labels and len(data.classes) == 100
    assert data.held_out.pixels[5].flatten().tolist() == pixels[5].tolist()


def test_cifar20_has_the_archives_own_superclasses_and_forgets_a_subclass(tmp_path, monkeypatch):
    import torchvision.datasets.cifar

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    fine = np.arange(400) % 100
    coarse = (fine * 7) % 20
    pixels = np.arange(400 * 3072).reshape(400, 3072).astype(np.uint8)
    for name in ("train", "test"):
        batch = {"data": pixels, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {key: [f"{key[:4]} {number}" for number in range(count)] for key, count in
             (("fine_label_names", 100), ("coarse_label_names", 20))}  # fmt: skip
    (folder / "meta").write_bytes(pickle.dumps(names))
    args = flags(data_name="cifar20", data_dir=str(tmp_path), unlearn_type="subclass", forget_class="fine 42")
    data = utils.load_data(args, torch.device("cpu"))
    assert data.classes == names["coarse_label_names"] and data.train.labels.tolist() == coarse.tolist()
    split = utils.make_split(data, args)
    assert split.folder == "subclass_42" and split.forget.tolist() == np.flatnonzero(fine == 42).tolist()
    assert data.held_out.subclasses[split.forget_test].eq(42).all()
    assert (
        data.held_out.subclasses[split.test].ne(42).all() and data.held_out.subclasses[split.calibration].numel() == 80
    )
    assert split.is_forgotten.equal(data.held_out.subclasses[split.calibration] == 42)
    by_number = utils.make_split(data, flags(**vars(args) | {"forget_class": "42"}))
    assert by_number.fingerprint == split.fingerprint
    with pytest.raises(utils.UserError, match="--num_classes 100: cifar20 has 20"):
        utils.load_data(flags(**vars(args) | {"num_classes": 100}), torch.device("cpu"))


@pytest.fixture
def tiny_imagenet(tmp_path, monkeypatch):
    """An archive like Tiny ImageNet's: three classes, the validation labels in val_annotations.txt alone.

    It lies in --data_dir already, and nothing answers at the address that it comes from.
    """
    wnids, rng = ["n03", "n01", "n02"], np.random.default_rng(0)
    published = tmp_path / "data/tiny-imagenet-200.zip"
    published.parent.mkdir()
    with zipfile.ZipFile(published, "w") as archive:
        root = "tiny-imagenet-200"
        archive.writestr(f"{root}/wnids.txt", "\n".join(wnids))
        archive.writestr(f"{root}/words.txt", "n01\tcrane, a bird\nn02\tcrane, a machine\nn03\tgoldfish\nn09\tnone")
        rows = []
        for index in range(90):
            wnid, part = wnids[index % 3], "train" if index < 60 else "val"
            picture = io.BytesIO()
            pixels = rng.integers(0, 99, size=(64, 64, 3)) + 70 * int(wnid[-1]) - 70
            Image.fromarray(pixels.astype(np.uint8)).convert("L" if index == 3 else "RGB").save(picture, "JPEG")
            name = f"{wnid}_{index}.JPEG" if part == "train" else f"val_{index}.JPEG"
            where = f"{root}/train/{wnid}/images/{name}" if part == "train" else f"{root}/val/images/{name}"
            archive.writestr(where, picture.getvalue())
            if part == "val":
                rows.append(f"{name}\t{wnid}\t0\t0\t62\t62")
        archive.writestr(f"{root}/val/val_annotations.txt", "\n".join(rows))
    monkeypatch.setattr(utils, "TINY_IMAGENET_URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    monkeypatch.setattr(utils, "TINY_IMAGENET_MD5", hashlib.md5(published.read_bytes()).hexdigest())
    return flags(data_name="tiny_imagenet", data_dir=str(tmp_path / "data"))


def test_tiny_imagenet_is_unpacked_and_read_as_published(tiny_imagenet):
    data = utils.load_data(tiny_imagenet, torch.device("cpu"))
    assert data.classes == ["crane (n01)", "crane (n02)", "goldfish"]
    assert data.train.pixels.shape == (60, 3, 64, 64) and len(data.held_out) == 30 and data.train.size == 64
    brightness = data.held_out.pixels.float().mean((1, 2, 3))
    for number in range(3):  # brighter pictures in each class: the labels are those of the annotations
        assert (brightness[data.held_out.labels == number] - (50 + 70 * number)).abs().max() < 10
    assert data.train.names[0] == "n01/images/n01_1.JPEG"
    listed = Path(tiny_imagenet.data_dir) / "request.txt"
    listed.write_text("train/n03/images/n03_6.JPEG\nn02/images/n02_5.JPEG\n")
    split = utils.make_split(data, flags(unlearn_type="list", forget_list=str(listed)))
    assert {data.train.names[index] for index in split.forget} == {"n03/images/n03_6.JPEG", "n02/images/n02_5.JPEG"}


def test_tiny_imagenet_beyond_memory_is_read_from_disk(tiny_imagenet, capsys):
    in_memory = utils.load_data(tiny_imagenet, torch.device("cpu"))
    assert "streamed from disk" not in capsys.readouterr().out
    on_disk = utils.load_data(flags(**vars(tiny_imagenet) | {"memory_gb": 0, "workers": 2}), torch.device("cpu"))
    assert "streamed from disk" in capsys.readouterr().out and not torch.is_tensor(on_disk.train.pixels)
    assert (on_disk.fingerprint, on_disk.train.names) == (in_memory.fingerprint, in_memory.train.names)
    for part in ("train", "held_out"):
        from_disk, kept = getattr(on_disk, part), getattr(in_memory, part)
        orders = torch.randperm(len(kept), generator=utils.generator(1, "order")).split(16)
        augmented = (images.batches(orders, utils.generator(1, "augmentation")) for images in (from_disk, kept))
        assert from_disk.labels.equal(kept.labels)
        assert all(one.equal(other) for one, other in zip(*augmented, strict=True))


def test_a_broken_picture_of_tiny_imagenet_is_left_out(tiny_imagenet, capsys):
    whole = utils.load_data(tiny_imagenet, torch.device("cpu"))
    broken = Path(tiny_imagenet.data_dir) / "tiny-imagenet-200/val/images/val_61.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    for memory_gb in (8, 0):
        found = flags(**vars(tiny_imagenet) | {"memory_gb": memory_gb, "skip_corrupt": True})
        data = utils.load_data(found, torch.device("cpu"))
        assert "skipping 1 unreadable image: val/images/val_61.JPEG" in capsys.readouterr().out
        left = [name for name in whole.held_out.names if not name.endswith("val_61.JPEG")]
        assert data.held_out.names == left and len(data.held_out.labels) == 29


def test_a_wrong_tiny_imagenet_archive_is_refused(tiny_imagenet, monkeypatch):
    monkeypatch.setattr(utils, "TINY_IMAGENET_MD5", "0" * 32)
    with pytest.raises(utils.UserError, match="tiny_imagenet: not in .* the download failed"):
        utils.load_data(tiny_imagenet, torch.device("cpu"))


def write_folder(root, train=30, test=40, classes=("ant", "bee", "cat")):
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, size=(20, 16 + 4 * (index % 2), 3)).astype(np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(root / part / name / f"{index:03}.png")


def test_an_image_folder_and_a_list_of_file_names(tmp_path):
    write_folder(tmp_path / "insects")
    (tmp_path / "request.txt").write_text("ant/003.png\ntrain/bee/007.png\ncat/011.png\n")
    data = [
        *TINY,
        "--data_name",
        "image_folder",
        "--data_dir",
        "insects",
        "--image_size",
        12,
        "--wandb_mode",
        "disabled",
    ]
    scenario = ["--unlearn_type", "list", "--forget_list", "request.txt"]
    succeed("main_original_model.py", *data, "--num_epochs", 3, "--num_classes", 3, cwd=tmp_path)
    succeed("main_unlearn.py", *data, *scenario, "--unlearn_name", "retrain", cwd=tmp_path)
    succeed("main_evaluate.py", *data, *scenario, "--unlearn_name", "all", "--alphas", "0.2", cwd=tmp_path)
    root = tmp_path / "runs/resnet18w8i12_image_folder-insects_seed1"
    results = read_json(next(root.glob("list_request_*/retrain/results.json")))
    assert results["num_forget"] == 3 and results["recipe"]["num_epochs"] == 3  # the original's own recipe
    assert results["image_size"] == 12 and results["num_classes"] == 3
    audited = table_of(next(root.glob("list_request_*/retrain/samples.csv")))
    assert [row["file"] for row in audited] == ["ant/003.png", "bee/007.png", "cat/011.png"]


# ---------------------------------------------------------------- models


def test_resnet18_keeps_resolution_in_the_stem():
    model = models.create_model("resnet18", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962  # the CIFAR ResNet-18
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_vit_trains_and_is_scored(tmp_path):
    """timm's test_vit is a ViT of 0.4 million parameters: the same code path as vit, in seconds."""
    common = ["--model_name", "test_vit", "--image_size", 32, "--no_pretrained", "--wandb_mode", "disabled"]
    succeed("main_original_model.py", *common, "--num_epochs", 1, cwd=tmp_path)
    succeed("main_unlearn_cpu.py", *common, "--unlearn_name", "finetune", "--num_epochs", 1, cwd=tmp_path)
    succeed("main_evaluate.py", *common, "--unlearn_name", "all", cwd=tmp_path)
    assert (tmp_path / "runs/test-vit-randomi32_digits_seed1/random_0.9/results.csv").is_file()


def test_vit_is_the_papers_network_with_weights_from_disk(tmp_path):
    import timm

    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch16_224")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = models.create_model("vit", 10, image_size=32, pretrained_path=tmp_path / "weights.pth")
    assert model.blocks[11].mlp.fc2.weight.equal(source.blocks[11].mlp.fc2.weight)
    assert model.head.out_features == 10 and model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert models.input_size("vit", 32) == 224 and models.input_size("resnet18", 32) == 32


@pytest.mark.parametrize("script", ["original_model", "unlearn", "unlearn_cpu", "evaluate"])
def test_help_shows_groups_and_defaults(script, tmp_path):
    text = " ".join(succeed(f"main_{script}.py", "--help", cwd=tmp_path).stdout.split())
    assert "model:" in text and "data:" in text and "(default: digits)" in text and "(default: 64)" in text
    if script.startswith("unlearn"):
        assert "finetune epochs: 20, learning rate: the original's" in text and "(default: 0.9)" in text
