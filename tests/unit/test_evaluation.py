"""main_evaluate in process, with a linear network on tiny images."""

import contextlib
import copy
import csv
import io
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flags
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small import BRIGHTER, ByHand, SmallNet, small_job
from torch.nn import functional as F

import main_evaluate
import metrics
import models
import utils
from metrics import CR, Spread, ensembles, scores
from metrics.report import figures, page
from models import checkpoint, inference

COMMON = ["--wandb_mode", "disabled", "--device", "cpu", "--resplits", "3", "--cal_sizes", "24"]


class Bench:
    """Tiny data, a linear network, and a run folder with its models."""

    def __init__(self, monkeypatch, root, counts=((20, 20, 20), (40, 40, 40))):
        self._patch, self.root = monkeypatch, root
        rng = np.random.default_rng(0)
        image_sets = []
        for numbers in counts:
            labels = rng.permutation(np.repeat(np.arange(3), numbers))
            pixels = rng.integers(0, 230, (len(labels), 3, 4, 4))
            pixels[np.arange(len(labels)), labels] += 25
            pixels, labels = torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)
            image_sets.append(utils.Images(pixels, labels, utils.SPECS["cifar10"], 4))
        self.data = utils.Data(*image_sets, ["ant", "bee", "cat"], "tiny")
        monkeypatch.setattr(utils, "load_data", lambda args, device, model_side=None: self.data)
        monkeypatch.setattr(models, "build_model", lambda *_, **__: self.network())
        monkeypatch.chdir(root)

    @staticmethod
    def network():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))

    def folder(self, seed=1, scenario="random_0.9"):
        return self.root / f"runs/resnet18_tiny_seed{seed}/{scenario}"

    def save(self, name, number, seed=1, scenario="random_0.9", state=None, **meta):
        """Save a model whose weights depend on ``number``: a higher number is more confident."""
        network = self.network()
        torch.manual_seed(number)
        with torch.no_grad():
            network[1].bias.zero_()
            network[1].weight.normal_(std=0.02).view(3, 3, 16).add_(
                0.04 * number * torch.eye(3)[:, :, None]
            )
        path = self.folder(seed, scenario) / name / "unlearning_model.pth"
        if name == "original":
            path = self.folder(seed, scenario).parent / "original_model.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, state or network.state_dict(), {"seconds": float(number)} | meta)
        return path

    def evaluate(self, *arguments, pictures=False):
        """Run the script and return its output."""
        command = [
            "main_evaluate.py",
            *COMMON,
            *([] if pictures else ["--no_pictures"]),
            *map(str, arguments),
        ]
        self._patch.setattr(sys, "argv", command)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main_evaluate.main() == 0
        return output.getvalue()

    def table(self, file="results.csv", **where):
        return table_of(self.folder(**where) / file)


def evaluation_of(data, *arguments, runs_dir="runs"):
    """An evaluation before any model is scored."""
    command = ["main_evaluate.py", "--device", "cpu", "--runs_dir", runs_dir, "--cal_sizes", "24"]
    if "--unlearn_name" not in arguments:
        command += ["--unlearn_name", "all"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, [*command, *arguments])])
        args = main_evaluate.parse_flags()
    return main_evaluate.start_evaluation(args, data, torch.device("cpu"))


def printed_sets(output, alpha):
    """{method: {heading: text}} of the short table of prediction sets at an α."""
    block = output.split(f"\nalpha {alpha:g} (")[1].split("\n\n")[0].splitlines()[1:]
    headings, *lines = (re.split(r"\s{2,}", line.strip()) for line in block)
    rows = [dict(zip(headings, line, strict=True)) for line in lines]
    return {row["method"]: row for row in rows}


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Three models of random forgetting, and the original."""
    bench = Bench(monkeypatch, tmp_path)
    for number, name in enumerate(["original", "retrain", "finetune", "GA"], 1):
        bench.save(name, number)
    return bench


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The folder after an evaluation at α = 0.01 and 0.2, and the printed output."""
    root = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(monkeypatch, root)
        for number, name in enumerate(["original", "retrain", "finetune", "GA"], 1):
            bench.save(name, number)
        return root, bench.evaluate("--unlearn_name", "all", *ALPHAS)


@pytest.fixture
def scored(bench, evaluated):
    """The bench after the evaluation in ``evaluated``."""
    shutil.copytree(evaluated[0] / "runs", bench.root / "runs", dirs_exist_ok=True)
    return bench


ALPHAS = ["--alphas", "0.01,0.2"]


# ---------------------------------------------------------------- an infinite q̂


def test_numbers_under_an_infinite_q_hat_are_empty_in_every_file(scored, evaluated):
    bench, output = scored, evaluated[1]
    judged = (
        "forget_coverage",
        "test_set_size",
        "forget_CR",
        "forget_fake",
        "q_hat",
        "MIACR",
        "theory_coverage",
    )
    for row in bench.table():
        known = row["alpha"] == "0.2"
        assert {key: row[key] != "" for key in judged} == dict.fromkeys(judged, known)
        assert (row["CR_word"] != "") == known and row["UA_word"] != "" and row["gap"] != ""
        assert row["forget_misclassified"] != "" and row["coverage_outside"] == "False"
    assert "\nalpha 0.01 (score thr, 24 calibration images): no finite q̂\n" in output
    assert len(printed_sets(output, 0.2)) == 4
    actual = json.loads((bench.folder() / "GA/results.json").read_text())["metrics"]["conformal"]
    assert actual[0]["forget_coverage"] is None
    assert actual[0]["CR_word"] is None
    assert actual[1]["forget_coverage"] > 0
    sample = bench.table("GA/samples.csv")[0]
    assert [sample[f"{key}@0.01"] for key in ("set_size", "in_set", "fake", "in_set_share")] == [
        ""
    ] * 4
    assert sample["set_size@0.2"] in {"0", "1", "2", "3"}
    for row in bench.table("classes.csv"):
        assert (
            (row["test_coverage"] != "") == (row["alpha"] == "0.2")
            and row["own_q_hat"] == ""
            or row["alpha"] == "0.2"
        )


def test_infinite_q_hats_are_reported_in_one_line_per_kind(bench):
    output = bench.evaluate("--unlearn_name", "GA", "--alphas", "0.01,0.02,0.2").splitlines()
    lines = [line for line in output if line.startswith("no finite ")]
    assert len(lines) == 3
    need = "(shown as –): alpha 0.01 needs 99, alpha 0.02 needs 49, and --cal_sizes 24 gives "
    members = "members and non-members (MIACR)"
    assert lines[0].startswith(f"no finite q̂ for all classes {need}24 calibration images; ")
    assert lines[1].startswith(f"no finite q̂ for {members} {need}48 calibration images; ")
    assert lines[2].startswith(
        "no finite class-conditional q̂ (classes.csv): 3 classes at alpha 0.01 (99 calibration"
    )
    assert all("choose a larger --alphas or more --cal_sizes" in line for line in lines)
    assert "no finite" not in bench.evaluate("--unlearn_name", "original", "--alphas", "0.3")


def test_forgotten_class_without_a_finite_q_hat_is_named(bench):
    for number, name in enumerate(["retrain", "finetune"], 1):
        bench.save(name, number, scenario="class_1")
    arguments = [
        "--unlearn_type",
        "class",
        "--forget_class",
        "bee",
        "--unlearn_name",
        "all",
        "--alphas",
        "0.06,0.3",
    ]
    output = bench.evaluate(*arguments, "--resplits", 1)
    split = utils.make_split(bench.data, flags(unlearn_type="class", forget_class="bee"), 24)
    count = int(split.is_forgotten.sum())
    assert 3 <= count < 12
    lines = output.splitlines()
    line = next(line for line in lines if line.startswith("no finite q̂ for class bee"))
    assert f"alpha 0.06 needs 16, and --cal_sizes 24 gives {count} calibration images" in line
    assert "no finite q̂ for all retained classes" not in output or 24 - count < 16
    for row in table_of(bench.folder(scenario="class_1") / "results.csv"):
        known = row["alpha"] == "0.3"
        assert (row["forget_coverage"] != "") == known and row["forget_class"] == "bee"
        assert (row["forget_by_retain_coverage"] != "") == (known or 24 - count >= 16)


def test_several_forgotten_classes_are_judged_together(bench):
    for number, name in enumerate(["retrain", "finetune"], 1):
        bench.save(name, number, scenario="class_0_1")
    arguments = ["--unlearn_type", "class", "--forget_class", "bee,ant"]
    output = bench.evaluate(*arguments, "--unlearn_name", "all", "--alphas", "0.01,0.3")
    assert "classes ant, bee" in output
    split = utils.make_split(bench.data, flags(unlearn_type="class", forget_class="0,1"), 24)
    line = next(line for line in output.splitlines() if "no finite q̂ for classes ant, bee" in line)
    assert f"gives {int(split.is_forgotten.sum())} calibration images" in line
    for row in bench.table(scenario="class_0_1"):
        assert row["forget_class"] == "ant, bee" and row["num_forget"] == "40"
        assert row["UA_test"] != "" and row["probe_forget"] != ""
    classes = bench.table("classes.csv", scenario="class_0_1")
    assert {row["class"] for row in classes} == {"ant", "bee", "cat"}


def test_resplits_without_a_finite_q_hat_are_counted(bench):
    """The class with most calibration images in the split has fewer in other draws."""

    def count(number):
        split = utils.make_split(
            bench.data, flags(unlearn_type="class", forget_class=str(number)), 24
        )
        return int(split.is_forgotten.sum())

    number = max(range(3), key=count)
    alpha = math.ceil(1000 / (count(number) - 1)) / 1000  # finite with two calibration images fewer
    bench.save("retrain", 1, scenario=f"class_{number}")
    arguments = [
        "--unlearn_type",
        "class",
        "--forget_class",
        number,
        "--unlearn_name",
        "retrain",
        "--alphas",
        alpha,
    ]
    output = bench.evaluate(*arguments, "--resplits", 40)
    row = table_of(bench.folder(scenario=f"class_{number}") / "results.csv")[0]
    left_out, name = int(row["forget_draws_left_out"]), bench.data.classes[number]
    assert 0 < left_out < 39 and row["forget_coverage"] != ""
    line = f"resplits without a finite q̂ for class {name}, left out of the means"
    assert f"{line}: {left_out} at alpha {alpha:g}" in output


def test_class_with_few_calibration_images_is_reported(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, counts=((20, 20, 20), (40, 1, 40)))
    bench.save("retrain", 1, scenario="class_1")
    output = bench.evaluate(
        "--unlearn_type", "class", "--forget_class", "1", "--unlearn_name", "all", "--alphas", "0.3"
    )
    split = utils.make_split(bench.data, flags(unlearn_type="class", forget_class="1"), 24)
    count = int(split.is_forgotten.sum())
    actual = "1 calibration image;" if count else "0 calibration images;"
    line = "no finite q̂ for class bee (shown as –): alpha 0.3 needs 3, and --cal_sizes 24 gives"
    assert f"{line} {actual}" in output


# ---------------------------------------------------------------- rows of other methods


def test_partial_evaluation_keeps_the_other_methods_rows(scored):
    bench = scored
    files = [bench.folder() / name for name in ("results.csv", "classes.csv")]
    before = [path.read_bytes() for path in files]
    output = bench.evaluate("--unlearn_name", "finetune", *ALPHAS)
    assert [path.read_bytes() for path in files] == before
    assert "2 models and 2 from earlier evaluations" in output
    assert list(printed_sets(output, 0.2)) == ["original", "finetune"]
    # Compared with the Retrain of the earlier evaluation.
    assert json.loads((bench.folder() / "finetune/results.json").read_text())["metrics"]["gap"] > 0
    bench.save("finetune", 9)
    bench.evaluate("--unlearn_name", "finetune", "--alphas", "0.01,0.2,0.3")
    after = bench.table()
    assert [(row["alpha"], row["method"]) for row in after] == [
        (alpha, name)
        for alpha in ("0.01", "0.2", "0.3")
        for name in ("original", "retrain", "finetune", "GA")
        if alpha != "0.3" or name in ("original", "finetune")
    ]
    old = list(csv.DictReader(before[0].decode().splitlines()))
    for row, earlier in zip([row for row in after if row["alpha"] != "0.3"], old, strict=True):
        row.pop("time_ratio"), earlier.pop("time_ratio")  # finetune's time is another
        assert ({**row} == earlier) == (row["method"] != "finetune")
    assert (
        next(row for row in after if row["alpha"] == "0.3" and row["method"] == "finetune")[
            "CR_word"
        ]
        == ""
    )


def test_costs_and_changed_predictions_are_columns_and_an_unchanged_model_is_named(bench):
    bench.save("ssd", 1, peak_memory=300)
    bench.save("finetune", 3, peak_memory=200)
    output = bench.evaluate("--unlearn_name", "all", *ALPHAS)
    assert "no prediction of the original model changed: ssd; " in output
    rows = {row["method"]: row for row in bench.table()}
    assert rows["original"]["changed"] == rows["original"]["time_ratio"] == ""
    assert float(rows["ssd"]["changed"]) == 0 and float(rows["ssd"]["memory_ratio"]) == 1.5
    assert float(rows["GA"]["time_ratio"]) == pytest.approx(4 / 3)
    assert rows["GA"]["memory_ratio"] == rows["GA"]["peak_memory"] == ""
    model, other = bench.network(), bench.network()
    changed = num_images = 0
    split = utils.make_split(bench.data, flags())
    for number, network in ((1, model), (4, other)):
        state = checkpoint.read(
            bench.folder().parent / "original_model.pth"
            if number == 1
            else bench.folder() / "GA/unlearning_model.pth"
        )[0]
        network.load_state_dict(state)
    for images, sets in (
        (bench.data.train, [split.retain, split.forget]),
        (bench.data.held_out, [split.calibration, split.test]),
    ):
        for indices in sets:
            inputs = images.batch(indices)
            changed += (model(inputs).argmax(1) != other(inputs).argmax(1)).sum().item()
            num_images += len(indices)
    assert float(rows["GA"]["changed"]) == pytest.approx(changed / num_images) and changed
    # A part of the models, compared with the earlier row of finetune.
    bench.save("GA", 6, peak_memory=500)
    bench.evaluate("--unlearn_name", "GA", *ALPHAS)
    rows = {row["method"]: row for row in bench.table()}
    assert float(rows["GA"]["time_ratio"]) == 2 and float(rows["GA"]["memory_ratio"]) == 2.5
    assert float(rows["ssd"]["memory_ratio"]) == 1.5


@pytest.mark.parametrize("change", ["other weights", "gone", "damaged"])
def test_rows_of_a_changed_or_deleted_model_are_dropped(scored, change):
    bench = scored
    path = bench.folder() / "GA/unlearning_model.pth"
    if change == "other weights":
        bench.save("GA", 8)
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    output = bench.evaluate("--unlearn_name", "finetune", "--alphas", "0.2")
    assert {row["method"] for row in bench.table()} == {"original", "retrain", "finetune"}
    assert {row["method"] for row in bench.table("classes.csv")} == {
        "original",
        "retrain",
        "finetune",
    }
    assert "dropped the rows of GA: the model was deleted or changed" in output


def test_rows_of_another_forget_set_are_dropped(scored):
    bench = scored
    path = bench.folder() / "results.csv"
    path.write_text(path.read_text().replace(bench.table()[0]["forget_set"], "0123456789abcdef"))
    output = bench.evaluate("--unlearn_name", "finetune", "--alphas", "0.2")
    assert {row["method"] for row in bench.table()} == {
        "original",
        "finetune",
    }
    assert "dropped the rows of retrain, GA:" in output


def test_kept_rows_are_compared_with_a_new_retrain(scored):
    bench = scored
    bench.save("retrain", 7)
    bench.evaluate("--unlearn_name", "retrain", *ALPHAS)
    partial = (bench.folder() / "results.csv").read_bytes()
    bench.evaluate("--unlearn_name", "all", *ALPHAS)
    assert (bench.folder() / "results.csv").read_bytes() == partial
    bench.save("retrain", 6)
    # Results with other settings are not compared.
    bench.evaluate("--unlearn_name", "retrain", "--alphas", "0.2", "--resplits", 2)
    rows = {row["method"]: row for row in bench.table()}
    assert rows["GA"]["gap"] == rows["GA"]["CR_word"] == rows["GA"]["TA_minus_retrain"] == ""
    assert rows["GA"]["UA"] != ""
    assert float(rows["retrain"]["gap"]) == 0


def test_failed_method_keeps_its_row_while_it_fails(bench):
    record = {
        "forget_set": utils.make_split(bench.data, flags()).fingerprint,
        "error": "sfron diverged",
    }
    (bench.folder() / "sfron").mkdir()
    failure = bench.folder() / "sfron" / main_evaluate.unlearn.FAILURE_FILE
    failure.write_text(json.dumps(record))
    for _ in range(2):
        output = bench.evaluate("--unlearn_name", "all", "--alphas", "0.2")
        assert "\nsfron: sfron diverged\n" in output
        assert [row["method"] for row in bench.table()].count("sfron") == 1
    output = bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    rows = {row["method"]: row for row in bench.table()}
    assert list(rows) == ["original", "retrain", "finetune", "GA", "sfron"]
    assert rows["sfron"]["note"] == "sfron diverged"
    assert "sfron" not in output
    failure.unlink()
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert "sfron" not in {row["method"] for row in bench.table()}


FOREIGN = {
    "text": b"my notes\nwith 3 lines\n,,\n",
    "binary": bytes(range(256)),
    "cut": None,
    "no number": None,
    "older": b"score,cal_size,alpha,method,UA\nthr,24,0.2,retrain,0.5\n",
    "spreadsheet": "a;b\n1,5;2,5\n".encode("utf-16"),
}


def add_earlier_results(bench, *scored):
    """Add earlier results to an evaluation that has just scored the methods ``scored``."""
    evaluation = evaluation_of(bench.data, runs_dir=bench.root / "runs")
    evaluation.models = dict.fromkeys(scored)
    main_evaluate.add_earlier_results(evaluation)
    return evaluation


@pytest.mark.parametrize("file", ["results.csv", "classes.csv"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_file_that_is_not_a_table_is_renamed(scored, capsys, kind, file):
    folder = scored.folder()
    path = folder / file
    content = path.read_bytes()
    if kind == "cut":
        content = content[:-30]
    elif kind == "no number":
        content = content.replace(b",0.2,", b",x0.2,", 1)
    path.write_bytes(FOREIGN[kind] or content)
    (folder / f"{file}.old").write_text("another")
    evaluation = add_earlier_results(scored, "GA")
    assert evaluation.earlier_class_rows == []
    assert (evaluation.earlier_rows == []) == (file == "results.csv")
    assert (folder / f"{file}.old2").read_bytes() == (FOREIGN[kind] or content)
    assert (folder / f"{file}.old").read_text() == "another" and not path.exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: not a table of this version")
    assert line.endswith(f"renamed to {file}.old2")


def test_older_table_whose_methods_are_all_scored_is_replaced(bench, capsys):
    path = bench.folder() / "results.csv"
    path.write_bytes(FOREIGN["older"])
    assert add_earlier_results(bench, "retrain", "GA").earlier_rows == []
    assert path.exists() and capsys.readouterr().out == ""
    assert add_earlier_results(bench, "GA").earlier_rows == [] and not path.exists()


def test_folder_with_the_name_of_the_table_is_renamed(bench):
    (bench.folder() / "results.csv").mkdir()
    assert "renamed to results.csv.old" in bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert len(bench.table()) == 2


def test_rows_of_a_model_elsewhere_are_kept_while_it_exists(bench, tmp_path):
    path = bench.save("retrain", 5)
    os.makedirs(tmp_path / "elsewhere")
    path.rename(tmp_path / "elsewhere/mine.pth")
    bench.evaluate(
        "--unlearn_name",
        "retrain",
        "--model_dir",
        tmp_path / "elsewhere/mine.pth",
        "--alphas",
        "0.2",
    )
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert [row["method"] for row in bench.table()] == ["original", "retrain", "GA"]
    (tmp_path / "elsewhere/mine.pth").unlink()
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert [row["method"] for row in bench.table()] == ["original", "GA"]


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures are one pixel and the figure's texts: drawing takes half of an evaluation."""

    def png(figure):
        texts, buffer = PngInfo(), io.BytesIO()
        texts.add_itxt("texts", repr([text.get_text() for text in figure.findobj(Text)]))
        Image.new("L", (1, 1)).save(buffer, "PNG", pnginfo=texts)
        return buffer.getvalue()

    monkeypatch.setattr(page, "png", png)


def test_pictures_after_partial_evaluation_show_all_methods(bench, quick_pictures):
    bench.evaluate("--unlearn_name", "all", "--alphas", "0.01,0.2", "--relearn", 1, pictures=True)
    folder = bench.folder()
    names = {
        "scores.png",
        "relearn.png",
        "fake_forgetting.png",
        "cr_plane.png",
        "against_alpha.png",
    }
    assert {path.name for path in folder.glob("*.png")} == names
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    bench.evaluate(
        "--unlearn_name", "finetune", "--alphas", "0.01,0.2", "--relearn", 1, pictures=True
    )
    assert {path.name for path in folder.glob("*.png")} == names | {
        "scores_partial.png",
        "relearn_partial.png",
    }
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    report = (folder / "report.html").read_text()
    # Five pictures, four fake sheets, and two pictures of the earlier evaluation.
    assert report.count("data:image/png;base64,") == 5 + 4 + 2
    assert '<td class=text data-value="GA">' in report.replace("'", '"')


def test_q_hat_of_the_epochs_is_drawn_for_variants_that_recorded_it(
    bench, quick_pictures, monkeypatch
):
    drawn = []
    draw = figures.q_hat_curves
    monkeypatch.setattr(
        figures, "q_hat_curves", lambda q_hats: drawn.append(q_hats) or draw(q_hats)
    )
    bench.save("cpu_finetune", 5, q_hats=[0.9, 0.8])
    bench.save("cpu_RL", 6, q_hats=[0.7])
    for name, record in (("cpu_salun", "0.9"), ("cpu_scrub", [0.9, None]), ("cpu_sfron", [])):
        bench.save(name, 7, q_hats=record)
    bench.evaluate("--unlearn_name", "all", *ALPHAS, pictures=True)
    assert drawn == [{"cpu_finetune": [0.9, 0.8], "cpu_RL": [0.7]}]
    picture = bench.folder() / "q_hat.png"
    content = picture.read_bytes()
    assert "q̂ of the conformal loss by epoch" in (bench.folder() / "report.html").read_text()
    bench.evaluate("--unlearn_name", "GA", *ALPHAS, pictures=True)
    assert len(drawn) == 1 and picture.read_bytes() == content
    report = (bench.folder() / "report.html").read_text()
    assert "q̂ of the conformal loss by epoch (earlier evaluation)" in report
    bench.evaluate("--unlearn_name", "cpu_RL", *ALPHAS, pictures=True)
    assert drawn[1:] == [{"cpu_RL": [0.7]}] and picture.read_bytes() == content
    assert (bench.folder() / "q_hat_partial.png").is_file()


def test_pictures_of_an_alpha_without_any_finite_q_hat_are_drawn(bench):
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.01", "--relearn", 1, pictures=True)
    assert len(list(bench.folder().glob("*.png"))) == 5


def test_summary_over_seeds_keeps_the_other_methods(bench):
    shutil.rmtree(bench.folder() / "finetune")
    for number, name in enumerate(["original", "retrain", "GA"], 5):
        bench.save(name, number, seed=2)
    arguments = ["--seeds", "1,2", "--alphas", "0.01,0.2"]
    bench.evaluate("--unlearn_name", "all", *arguments)
    summary = bench.root / "runs/resnet18_tiny_seeds1,2/random_0.9/results.csv"

    def filled():
        return [{key: value for key, value in row.items() if value} for row in table_of(summary)]

    before = filled()
    output = bench.evaluate("--unlearn_name", "GA", *arguments)
    assert "pass --split_seed to all four scripts" in output
    assert filled() == before
    rows = table_of(summary)
    assert [row["method"] for row in rows if row["alpha"] == "0.2"] == ["original", "retrain", "GA"]
    assert list(printed_sets(output, 0.2)) == ["original", "GA"]
    seeds = [bench.table(seed=seed) for seed in (1, 2)]
    for row, first, second in zip(rows, *seeds, strict=True):
        for key in ("UA", "TA", "forget_CR", "gap"):
            pair = [first[key], second[key]]
            if "" in pair:
                assert row[key] == "" and row["alpha"] == "0.01"
            else:
                assert float(row[key]) == pytest.approx(np.mean([float(value) for value in pair]))
                assert float(row[f"{key}_std"]) == pytest.approx(
                    np.std([float(value) for value in pair], ddof=1)
                )


def test_seeds_of_one_split_are_compared_as_distributions(bench, quick_pictures):
    seeds = "1,2,3,4"
    for seed in range(1, 5):
        scenario = "random_0.9" if seed == 1 else "random_0.9_split1"
        for number, name in enumerate(["original", "retrain", "GA"], 1):
            bench.save(name, 10 * seed + number, seed=seed, scenario=scenario)
    shared = ["--split_seed", 1, "--seeds", seeds, *ALPHAS]
    output = bench.evaluate("--unlearn_name", "retrain", "GA", *shared, pictures=True)
    block = output.split("Over 4 trainings of one forget set (split seed 1):\n")[1].splitlines()
    headings = block[0].split()
    assert headings[:3] == ["method", "n", "KLOM_f"] and max(map(len, block)) <= 100
    assert [line.split("  ")[0].strip() for line in map(str.strip, block[1:4])] == [
        "retrain (halves)", "original", "GA",
    ]  # fmt: skip
    assert "4 trainings show little about distributions" in block[-1]
    folder = bench.root / "runs/resnet18_tiny_seeds1,2,3,4/random_0.9_split1"
    rows = table_of(folder / "ensembles.csv")
    assert [(row["method"], row["trainings"]) for row in rows] == [
        ("retrain (halves)", "2"), ("original", "4"), ("GA", "4"),
    ]  # fmt: skip
    assert float(rows[2]["KLOM_forget"]) > 0 and 0 <= float(rows[2]["ULiRA_accuracy"]) <= 1
    report = (folder / "report.html").read_text()
    assert "Over 4 trainings of one forget set" in report
    assert all(caption in report for caption in ("(KLOM)", "Margins over the trainings"))
    assert {"klom.png", "margins.png"} < {path.name for path in folder.glob("*.png")}
    images = table_of(folder / "samples.csv")
    assert [row["method"] for row in images] == ["original"] * 6 + ["GA"] * 6
    own = table_of(bench.folder() / "GA/samples.csv")
    assert {(row["index"], row["label"]) for row in images} == {
        (row["index"], row["label"]) for row in own
    }
    divergences = [float(row["KLOM"]) for row in images[6:]]  # no q̂ is finite at the first α
    assert divergences == sorted(divergences, reverse=True)
    (folder / "ensembles.csv").unlink()
    output = bench.evaluate("--unlearn_name", "GA", *shared)
    assert "are not compared; evaluate retrain too" in output
    assert not (folder / "ensembles.csv").exists()
    output = bench.evaluate("--unlearn_name", "GA", "--seeds", "1", *ALPHAS)
    assert "distributions" not in output


def test_second_retrain_is_the_next_seeds_retrain_compared_with_each_seeds(bench):
    for seed in (1, 2, 3):
        scenario = "random_0.9" if seed == 1 else "random_0.9_split1"
        for number, name in enumerate(["original", "retrain", "GA"], 1):
            bench.save(name, 2 * seed + number, seed=seed, scenario=scenario)
    seeds = ["--split_seed", 1, "--seeds", "1,2,3"]
    bench.evaluate("--unlearn_name", "retrain", "GA", *seeds, *ALPHAS)
    rows = bench.table(seed="s1,2,3", scenario="random_0.9_split1")
    assert [row["method"] for row in rows] == ["original", "retrain", "retrain′", "GA"] * 2
    retrain, second = rows[5:7]
    assert float(second["UA"]) == pytest.approx(float(retrain["UA"]))
    assert float(retrain["gap"]) == 0 and float(retrain["JSD_forget"]) < 1e-12
    assert float(second["gap"]) > 0 and float(second["JSD_forget"]) > 1e-3
    single = [
        bench.table(seed=seed, scenario="random_0.9" if seed == 1 else "random_0.9_split1")
        for seed in (1, 2, 3)
    ]
    numbers = [next(row for row in table if row["method"] == "retrain") for table in single]
    gaps = [
        np.mean([abs(float(a[key]) - float(b[key])) for key in ("UA", "RA", "TA", "MIA")])
        for a, b in zip(numbers, [*numbers[1:], numbers[0]], strict=True)
    ]
    assert float(second["gap"]) == pytest.approx(np.mean(gaps))
    assert set(second["UA_word"].split("; ")) <= {"matches", "under-forgets", "over-forgets"}


def test_verdicts_that_tell_two_retrained_models_apart_are_reported(bench):
    for seed, number in ((1, 30), (2, -30)):
        scenario = "random_0.9" if seed == 1 else "random_0.9_split1"
        bench.save("retrain", number, seed=seed, scenario=scenario)
    arguments = ["--split_seed", 1, "--seeds", "1,2", "--alphas", "0.2"]
    output = bench.evaluate("--unlearn_name", "retrain", *arguments)
    (line,) = [line for line in output.splitlines() if line.startswith("retrain′: of 2")]
    row = next(
        row
        for row in bench.table(seed="s1,2", scenario="random_0.9_split1")
        if row["method"] == "retrain′"
    )
    assert set(row["UA_word"].split("; ")) == {"under-forgets", "over-forgets"}
    assert "2 by UA" in line


def test_trainings_hold_margins_and_sets_of_the_first_alpha():
    torch.manual_seed(0)
    counts = {"forget": 4, "retain": 6, "held_out": 40}
    outputs = {
        image_set: metrics.Output(torch.randn(count, 3), torch.arange(count) % 3)
        for image_set, count in counts.items()
    }
    draws = metrics.draw_splits(40, 3)
    outputs = metrics.Outputs(**outputs, cal_sizes=[24], draws=draws)
    conformal_scores = metrics.ConformalScores(
        outputs, metrics.Settings((0.2, 0.5), (scores.Score(),))
    )
    training = ensembles.describe(conformal_scores, torch.tensor([5, 0]))
    for image_set, output in (
        ("forget", outputs.forget),
        ("retain", outputs.retain.select([5, 0])),
        ("test", outputs.held_out.select(outputs.test())),
    ):
        p = output.logits.double().softmax(1)[range(len(output.labels)), output.labels]
        torch.testing.assert_close(
            training.margins[image_set], (p / (1 - p)).log(), rtol=1e-5, atol=1e-6
        )
    true_label = [
        scores.true_label_scores(*answers) for answers in (outputs.held_out, outputs.forget)
    ]
    q_hat = CR.conformal_quantile(true_label[0][draws[0, :24]], 0.2)
    assert training.in_set.equal(true_label[1] <= q_hat)
    strict = metrics.ConformalScores(outputs, metrics.Settings((0.01,), (scores.Score(),)))
    assert ensembles.describe(strict, torch.tensor([0])).in_set is None


# ---------------------------------------------------------------- printed and written output


def test_columns_all_prints_every_column_with_deviations(scored):
    output = scored.evaluate("--unlearn_name", "all", *ALPHAS, "--columns", "all")
    headings = [line for line in output.splitlines() if " method " in f" {line} "]
    assert len(headings) == 2 and "privacy %" in headings[0] and "RTE" in headings[0]
    assert headings[1].split()[:2] == ["alpha", "method"] and "MIACR %" in headings[1]
    assert output.count("±") > 10


def test_printed_tables_are_means_in_at_most_100_characters(evaluated):
    lines = evaluated[1].split("\n\n")
    models, sets = lines[0].splitlines()[5:], lines[2].splitlines()
    assert models[0].split() == [
        "method", "UA", "%", "RA", "%", "TA", "%", "MIA", "%", "gap", "%", "by", "UA", "time", "s",
    ]  # fmt: skip
    assert len(models) == 5 and len(sets) == 6
    assert max(map(len, models + sets)) <= 100 and "±" not in "".join(models + sets)


def test_every_scored_model_is_reported_with_its_number(evaluated):
    names, lines = ["original", "retrain", "finetune", "GA"], evaluated[1].splitlines()[:4]
    for number, (name, line) in enumerate(zip(names, lines, strict=True), 1):
        assert re.fullmatch(rf"{name}: scored in \d+ s \({number} of 4\)", line)


def test_samples_name_files_and_classes(bench):
    bench.data.train.names = [f"train/{index}.png" for index in range(60)]
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    rows = bench.table("GA/samples.csv")
    labels = bench.data.train.labels
    assert len(rows) == 6
    for row in rows:
        assert row["file"] == f"train/{row['index']}.png"
        assert row["label"] == bench.data.classes[labels[int(row["index"])]]
        assert row["prediction"] in bench.data.classes


def test_interrupted_saving_leaves_the_earlier_files(scored, monkeypatch):
    files = {path: path.read_bytes() for path in scored.folder().rglob("*.*") if path.is_file()}

    def save_json(path, content):
        raise utils.UserError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(utils, "save_json", save_json)
    with pytest.raises(utils.UserError, match="No space left"):
        scored.evaluate("--unlearn_name", "all", "--alphas", "0.3")
    after = {path: path.read_bytes() for path in scored.folder().rglob("*.*") if path.is_file()}
    assert after == files


def test_interrupted_scoring_leaves_the_earlier_files_and_says_so(scored, monkeypatch):
    files = {path: path.read_bytes() for path in scored.folder().rglob("*.*") if path.is_file()}
    plain, calls = main_evaluate.score_outputs, []

    def score_outputs(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(main_evaluate, "score_outputs", score_outputs)
    with pytest.raises(utils.Interrupted, match="this evaluation is not saved; earlier results"):
        scored.evaluate("--unlearn_name", "all", "--alphas", "0.3")
    after = {path: path.read_bytes() for path in scored.folder().rglob("*.*") if path.is_file()}
    assert after == files


# ---------------------------------------------------------------- models


def test_infinite_outputs_end_the_evaluation_before_anything_is_written(scored):
    bench = scored
    files = {path: path.read_bytes() for path in bench.folder().rglob("*") if path.is_file()}
    state = bench.network().state_dict()
    state["1.weight"] = torch.full_like(state["1.weight"], 3e38)
    path = bench.save("GA", 1, state=state)
    files[path] = path.read_bytes()
    with pytest.raises(
        utils.UserError, match="GA/unlearning_model.pth: .*NaN or infinite"
    ) as caught:
        bench.evaluate("--unlearn_name", "all", "--alphas", "0.3")
    assert len(str(caught.value).splitlines()) == 1
    assert {
        path: path.read_bytes() for path in bench.folder().rglob("*") if path.is_file()
    } == files


def test_models_are_read_in_the_order_of_the_table(bench):
    (bench.folder() / "mine").mkdir()
    bench.save("mine", 3)
    root, folder = bench.folder().parent, bench.folder()

    def locate(*names, model_dir="unlearning_model.pth"):
        arguments = ["--unlearn_name", *names, "--model_dir", model_dir]
        evaluation = evaluation_of(bench.data, *arguments, runs_dir=bench.root / "runs")
        return main_evaluate.locate_models(evaluation)

    paths = locate("all")
    assert list(paths) == ["original", "retrain", "finetune", "GA", "mine"]
    assert paths["original"] == root / "original_model.pth"
    assert paths["GA"] == folder / "GA/unlearning_model.pth"
    assert list(locate("GA")) == ["original", "GA"]
    assert locate("original") == {"original": root / "original_model.pth"}
    elsewhere = {name: str(path) for name, path in locate("GA", model_dir="a/b.pth").items()}
    assert elsewhere == {"original": str(root / "original_model.pth"), "GA": "a/b.pth"}
    with pytest.raises(utils.UserError, match="is one file; name one method"):
        locate("GA", "retrain", model_dir="a/b.pth")
    with pytest.raises(utils.UserError, match="no method with a other.pth"):
        locate("all", model_dir="other.pth")
    (root / "original_model.pth").unlink()
    assert list(locate("all")) == ["retrain", "finetune", "GA", "mine"]


def test_models_of_another_forget_set_or_original_are_refused(bench):
    evaluation = evaluation_of(bench.data, runs_dir=bench.root / "runs")
    split, original_path = evaluation.split, bench.folder().parent / "original_model.pth"
    original = checkpoint.weights_hash(checkpoint.read(original_path)[0])
    right = bench.save("GA", 4, forget_set=split.fingerprint, identity={"original": original})
    paths = {"original": original_path, "GA": right}
    saved = main_evaluate.read_models(paths, evaluation)
    assert [model.name for model in saved] == ["original", "GA"]
    assert saved[1].path == right and saved[1].meta["seconds"] == 4
    bench.save("GA", 4, forget_set="0" * 16)
    with pytest.raises(utils.UserError, match="unlearned another forget set"):
        main_evaluate.read_models(paths, evaluation)
    record = {"forget_set": split.fingerprint, "identity": {"original": original}}
    bench.save("GA", 4, split_seed=2, **record)
    with pytest.raises(utils.UserError, match="split seed 2, and the flags select 1; pass"):
        main_evaluate.read_models(paths, evaluation)
    evaluation.args.split_seed = 2
    main_evaluate.read_models(paths, evaluation)
    evaluation.args.split_seed = None
    bench.save("original", 1, split_seed=2)
    bench.save("GA", 4, split_seed=1, **record)
    main_evaluate.read_models(paths, evaluation)
    other = bench.save("GA", 4, identity={"original": "f" * 16})
    with pytest.raises(utils.UserError, match="not from one original model") as caught:
        main_evaluate.read_models(paths, evaluation)
    assert str(other) in str(caught.value) and str(original_path) in str(caught.value)


def test_files_of_a_model_elsewhere_are_written_next_to_it(bench, tmp_path):
    evaluation = evaluation_of(bench.data, runs_dir=bench.root / "runs")
    folder = bench.folder()

    def path_of(path, name, file):
        saved = main_evaluate.SavedModel(name, path, state={}, meta={})
        return evaluation.path_of(saved, file)

    inside = folder / "GA/unlearning_model.pth"
    assert path_of(inside, "GA", "samples.csv") == folder / "GA/samples.csv"
    original = folder.parent / "original_model.pth"
    assert path_of(original, "original", "results.json") == folder / "original/results.json"
    elsewhere = tmp_path / "a/b.pth"
    assert path_of(elsewhere, "GA", "results.json") == tmp_path / "a/b.results.json"


@pytest.mark.parametrize("cal_sizes", ["1", "1,2", "5"])
@pytest.mark.parametrize(
    "scenario", [["--retain_ratio", "0.5"], ["--unlearn_type", "class", "--forget_class", "ant"]]
)
def test_evaluation_of_few_images_has_accuracies_and_no_attack(
    monkeypatch, tmp_path, scenario, cal_sizes
):
    bench = Bench(monkeypatch, tmp_path, counts=((2, 2, 2), (1, 3, 4)))
    folder = "class_0" if "class" in scenario else "random_0.5"
    bench.save("retrain", 2, scenario=folder)
    bench.evaluate(
        *scenario, "--unlearn_name", "retrain", "--cal_sizes", cal_sizes, "--alphas", "0.1,0.6"
    )
    (_, row) = [
        row for row in bench.table(scenario=folder) if row["cal_size"] == cal_sizes.split(",")[-1]
    ]
    assert row["MIA"] == row["MIACR"] == "" and 0 <= float(row["UA"]) <= 1
    assert row["gap"] == "0.0"


# ---------------------------------------------------------------- decisions and arithmetic


def scored_model(name, numbers, set_rows, **origin):
    saved = main_evaluate.SavedModel(name, None, state={}, meta={})
    empty = {"class_rows": [], "sample_rows": []}
    return main_evaluate.ScoredModel(saved, origin, numbers, set_rows=set_rows, **empty)


def test_rows_are_one_per_key_and_model_and_failures_come_last(bench):
    evaluation = evaluation_of(bench.data)
    keys = [("thr", 20, 0.1), ("thr", 20, 0.2)]
    rows = {key: {"forget_CR": Spread(key[2], 0.3)} for key in keys}
    evaluation.models["retrain"] = scored_model("retrain", {"UA": 0.5}, rows, weights="a")
    rows = {key: {"forget_CR": 2 * key[2]} for key in keys}
    evaluation.models["GA"] = scored_model("GA", {"UA": 0.4}, rows, weights="b")
    evaluation.failed["salun"] = "diverged"
    columns = {"score": "thr", "cal_size": 20}
    retrain, GA = columns | {"method": "retrain", "UA": 0.5}, columns | {"method": "GA", "UA": 0.4}
    assert evaluation.rows() == [
        retrain | {"alpha": 0.1, "forget_CR": Spread(0.1, 0.3), "weights": "a"},
        GA | {"alpha": 0.1, "forget_CR": 0.2, "weights": "b"},
        columns | {"alpha": 0.1, "method": "salun", "note": "diverged"},
        retrain | {"alpha": 0.2, "forget_CR": Spread(0.2, 0.3), "weights": "a"},
        GA | {"alpha": 0.2, "forget_CR": 0.4, "weights": "b"},
        columns | {"alpha": 0.2, "method": "salun", "note": "diverged"},
    ]


def test_merged_rows_are_in_the_order_of_the_methods_in_each_block():
    def rows(names, alpha, **numbers):
        return [
            {"score": "thr", "cal_size": 9, "alpha": alpha, "method": name} | numbers
            for name in names
        ]

    scored = rows(["original", "GA"], 0.1)
    kept = rows(["retrain", "mine"], 0.1) + rows(["retrain"], 0.2)
    failed = rows(["finetune"], 0.1, note="diverged")
    actual = main_evaluate.merge_rows(scored + failed, kept)
    assert [(row["alpha"], row["method"]) for row in actual] == [
        (0.1, "original"), (0.1, "retrain"), (0.1, "GA"), (0.1, "mine"), (0.1, "finetune"),
        (0.2, "retrain"),
    ]  # fmt: skip
    unordered = rows(["GA", "original"], 0.1)
    assert main_evaluate.merge_rows(unordered, []) == unordered


def test_failures_of_requested_methods_are_shown():
    failed = {"GA": "a", "salun": "b"}

    def requested(names, scored=(), seeds=None):
        args = flags(unlearn_name=names, seeds=seeds, seed=3)
        return main_evaluate.requested_failures(failed, scored, args)

    assert requested(["all"]) == failed and requested(["GA"]) == {"GA": "a"}
    assert requested(["retrain"]) == {} and requested(["all"], ["GA"]) == {"salun": "b"}
    assert requested(["GA,salun"], seeds=[3, 4])["GA"] == "seed 3: a"


def test_failures_are_those_of_this_forget_set(tmp_path, capsys):
    for name, text in {
        "GA": '{"forget_set": "x", "error": "diverged"}',
        "salun": '{"forget_set": "y", "error": "diverged"}',
        "sfron": "{", "scrub": "[]",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / main_evaluate.unlearn.FAILURE_FILE).write_text(text)
    assert main_evaluate.failures(tmp_path, "x") == {"GA": "diverged"}
    assert capsys.readouterr().out.count("damaged record, ignored") == 2


# ---------------------------------------------------------------- relearning


def relearning(job, num_steps, *, rate=0.02, cal_size=8):
    """An evaluation of a job's model with --relearn, its outputs, and no image used so far."""
    args = flags(seed=3, relearn=num_steps, relearn_rate=rate, resplits=1, batch_size=None)
    args.cal_sizes = [cal_size]
    settings = metrics.Settings((0.2,))
    evaluation = SimpleNamespace(args=args, data=job.data, split=job.split, settings=settings)
    outputs, _ = main_evaluate.compute_outputs(job.model, evaluation)
    job.data.train.uses.clear()
    return outputs, evaluation


def relearning_steps(job):
    """The training images of each step."""
    return [indices for indices, seed in job.data.train.uses if seed is not None]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 11])
def test_relearning_measures_at_powers_of_two_and_trains_a_tenth(num_steps):
    job = small_job("finetune", forget=41)
    curve = main_evaluate.relearn(job.model, *relearning(job, num_steps), "forget")
    stops = [0, *sorted({1, 2, 4, 8, num_steps} & set(range(num_steps + 1)))]
    assert curve["step"] == stops and len(curve["accuracy"]) == len(curve["coverage"]) == len(stops)
    steps, measured, others = 0, [0], None
    for indices, seed in job.data.train.uses:
        if seed is not None:
            steps += 1
            continue
        measured.append(steps)
        others = others or indices
        assert indices == others
    assert measured == stops
    tenth = set(job.split.forget.tolist()) - set(others)
    assert len(others) == 37 and len(tenth) == 4
    assert all(sorted(indices) == sorted(tenth) for indices in relearning_steps(job))
    assert tenth != set(job.split.forget[:4].tolist())  # drawn, not the first


def test_relearning_is_sgd_at_a_constant_rate_on_the_forgotten_labels():
    job = small_job("finetune", forget=41)
    main_evaluate.relearn(job.model, *relearning(job, 6), "forget")
    net, train = ByHand(SmallNet()), job.data.train
    assert len(relearning_steps(job)) == 6
    for indices in relearning_steps(job):
        logits = net.logits(BRIGHTER * train.inputs[indices], training=True)
        loss = F.cross_entropy(logits, train.labels[indices])
        net.descend(net.gradients(loss), rate=0.02, momentum=0.9, weight_decay=5e-4)
    net.assert_equal(job.model.state_dict())


def test_relearning_visits_a_large_tenth_in_near_equal_shuffled_batches():
    job = small_job("finetune", forget=655)
    main_evaluate.relearn(job.model, *relearning(job, 4, rate=0.001), "forget")
    steps = relearning_steps(job)
    assert [len(step) for step in steps] == [33, 32, 33, 32]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) and steps[0] != steps[2]
    assert len(set(steps[0] + steps[1])) == 65


def test_relearning_two_images_trains_on_one_and_one_is_an_error():
    job = small_job("finetune", forget=2)
    main_evaluate.relearn(job.model, *relearning(job, 1), "forget")
    assert [len(indices) for indices, _ in job.data.train.uses] == [1, 1]
    job = small_job("finetune", forget=1)
    with pytest.raises(utils.UserError, match="--relearn"):
        main_evaluate.relearn(job.model, *relearning(job, 1), "forget")


def test_relearning_on_the_retain_set_never_sees_a_forget_image():
    job = small_job("finetune", forget=41)
    curve = main_evaluate.relearn(job.model, *relearning(job, 4, rate=0.5), "retain")
    steps = relearning_steps(job)
    assert [len(step) for step in steps] == [len(steps[0])] * 4 and curve["step"] == [0, 1, 2, 4]
    assert set().union(*steps) <= set(job.split.retain.tolist())
    measured = [indices for indices, seed in job.data.train.uses if seed is None]
    assert measured == [job.split.forget.tolist()] * 3
    again = small_job("finetune", forget=41)
    main_evaluate.relearn(again.model, *relearning(again, 4, rate=0.5), "forget")
    assert not set().union(*relearning_steps(again)) & set(job.split.retain.tolist())
    job = small_job("finetune", forget=1)
    assert main_evaluate.relearn(job.model, *relearning(job, 1), "retain")["step"] == [0, 1]


def test_both_kinds_of_relearning_start_from_the_saved_weights(bench):
    def curves(*sources):
        arguments = ["--relearn", 2, "--relearn_rate", 5, "--relearn_on", ",".join(sources)]
        bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2", *arguments)
        record = json.loads((bench.folder() / "GA/results.json").read_text())
        return record["metrics"]

    both = curves("forget", "retain")
    assert both["relearn"] == curves("forget")["relearn"]
    assert both["relearn_retain"] == curves("retain")["relearn_retain"]
    assert "relearn" not in curves("retain") and "relearn_retain" not in curves("forget")
    assert len(set(both["relearn_retain"]["accuracy"])) > 1


@pytest.mark.parametrize("name", ["thr", "aps"])
def test_relearning_measures_the_other_images_under_each_steps_q_hat(bench, monkeypatch, name):
    """The forget set is not sorted, and q̂ is that of the retained classes."""
    arguments = ["--unlearn_type", "class", "--forget_class", "bee", "--relearn", 2]
    evaluation = evaluation_of(bench.data, *arguments, "--resplits", 1)
    split = replace(evaluation.split, forget=evaluation.split.forget.flip(0))
    score = scores.Score(name, seed=3)
    evaluation.split = split
    evaluation.settings = metrics.Settings((0.2, 0.1), (score, scores.Score("saps")))
    model = bench.network()
    outputs, _ = main_evaluate.compute_outputs(model, evaluation)
    states = [copy.deepcopy(model.state_dict())]

    def train(job, batch_loss, schedule):
        assert job.model is model and job.seed == 1
        for epoch in (1, 2):
            with torch.no_grad():
                model[1].weight.mul_(-1.5)
            states.append(copy.deepcopy(model.state_dict()))
            job.epoch_done({"epoch": epoch})

    monkeypatch.setattr(main_evaluate.unlearn, "train", train)
    curve = main_evaluate.relearn(model, outputs, evaluation, "forget")
    others = split.forget[utils.permutation(1, "relearn", 20)[2:]]
    calibration = split.calibration[~split.is_forgotten]
    assert curve["step"] == [0, 1, 2]
    for number, state in enumerate(states):
        model.load_state_dict(state)
        logits, labels = inference.compute_logits(model, bench.data.held_out, calibration)
        label_scores = score.log_odds(logits, "held_out").gather(1, labels[:, None]).flatten()
        q_hat = CR.conformal_quantile(label_scores, 0.2)
        logits, labels = inference.compute_logits(model, bench.data.train, others)
        assert curve["accuracy"][number] == (logits.argmax(dim=1) == labels).double().mean()
        inside = score.log_odds(logits, "forget").gather(1, labels[:, None]) <= q_hat
        assert curve["coverage"][number] == inside.double().mean()
    evaluation.settings = metrics.Settings((0.001,))
    coverage = main_evaluate.relearn(model, outputs, evaluation, "forget")["coverage"]
    assert all(map(math.isnan, coverage))


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("unlearn_type", ["random", "class"])
def test_outputs_have_every_image_set_of_the_split(bench, unlearn_type):
    arguments = ["--unlearn_type", unlearn_type, "--seed", 2, "--cal_sizes", "10,24"]
    arguments += ["--resplits", 4, "--batch_size", 7]
    evaluation, model = evaluation_of(bench.data, *arguments), bench.network()
    split = evaluation.split
    outputs, probe_accuracy = main_evaluate.compute_outputs(model, evaluation)
    held_out = torch.cat([split.calibration, split.test, split.forget_test])
    for image_set, images, indices in (
        ("retain", bench.data.train, split.retain),
        ("forget", bench.data.train, split.forget),
        ("held_out", bench.data.held_out, held_out),
    ):
        logits, labels = inference.compute_logits(model, images, indices)
        torch.testing.assert_close(getattr(outputs, image_set).logits, logits)
        assert torch.equal(getattr(outputs, image_set).labels, labels)
    draws = metrics.draw_splits(len(outputs.held_out.labels), 4, 2)
    assert torch.equal(outputs.draws, draws) and outputs.cal_sizes == [10, 24]
    if unlearn_type == "random":
        assert outputs.forgotten is None and probe_accuracy == {}
    else:
        assert torch.equal(outputs.forgotten, outputs.held_out.labels == split.forget_classes[0])
        assert set(probe_accuracy) == {"probe_forget", "probe_retain"}


def test_features_enter_the_last_layer_of_any_network(bench):
    class Convolutional(torch.nn.Module):
        """A network whose classifier is a 1×1 convolution before the pooling, like timm's dla34."""

        def __init__(self):
            super().__init__()
            self.stem, self.unused = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)
            self.head = torch.nn.Conv2d(8, 3, 1)

        def get_classifier(self):
            return self.head

        def forward(self, images):
            return self.head(self.stem(images)).mean(dim=(2, 3))

    class Distilled(Convolutional):
        """Two heads on tokens."""

        def get_classifier(self):
            return self.unused, self.unused

        def forward(self, images):
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            return self.unused(tokens).mean(dim=1)[:, :3]

    indices = torch.tensor([5, 1, 8, 2, 9])
    images = bench.data.train.batch(indices)
    for network in (Convolutional(), Distilled()):
        pooled = network.stem(images).mean(dim=(2, 3))
        expected = pooled if type(network) is Convolutional else torch.cat([pooled, pooled], dim=1)
        logits, labels, features = inference.compute_features(network, bench.data.train, indices, 2)
        torch.testing.assert_close(features, expected)
        assert logits.shape == (5, 3) and torch.equal(labels, bench.data.train.labels[indices])
    linear = bench.network()
    features = inference.compute_features(linear, bench.data.train, indices)[2]
    torch.testing.assert_close(features, images.flatten(1))


def test_settings_have_the_values_of_the_flags(bench):
    arguments = ["--alphas", "0.1", "--score", "thr,raps", "--set_sizes", "2", "--not_randomized"]
    arguments += ["--raps_penalty", 0.3, "--raps_k", 4, "--saps_weight", 0.7, "--seed", 9]
    chosen = tuple(scores.Score(name, False, 0.3, 4, 0.7, 9) for name in ("thr", "raps"))
    expected = metrics.Settings((0.1,), chosen, (2,), 9)
    assert evaluation_of(bench.data, *arguments).settings == expected
