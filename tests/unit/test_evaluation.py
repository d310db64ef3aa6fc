"""main_evaluate in process: a linear network on tiny images, so that a whole evaluation takes a tenth of a second."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import flags

import main_evaluate
import metrics
import models
import utils
from metrics import CR, MIA, MIACR, scores
from models import checkpoint, inference

COMMON = ["--wandb_mode", "disabled", "--device", "cpu", "--resplits", "3", "--cal_sizes", "24"]


def attack_shares(members, non_members, held_members, held_non_members, targets):
    """An attack in the place of the SVM, which takes a hundred times as long: members lie beyond the midpoint."""
    if len(members) < MIA.FOLDS:
        return math.nan, math.nan
    middle = (members.mean() + non_members.mean()) / 2
    shares = [(points.mean(axis=1) > middle).mean() for points in (held_members, held_non_members, targets)]
    return 1 - shares[2], (shares[0] + 1 - shares[1]) / 2


def probabilities(members, non_members, points, step=None):
    assert all(len(part) >= MIA.FOLDS for part in [*members, *non_members])
    middles = torch.stack([(one.mean() + other.mean()) / 2 for one, other in zip(members, non_members, strict=True)])
    return torch.sigmoid(9 * (points - middles[:, None]))


class Bench:
    """Tiny data, a linear network, and a run folder with models of it."""

    def __init__(self, monkeypatch, root, counts=((20, 20, 20), (40, 40, 40))):
        self._patch, self.root = monkeypatch, root
        rng = np.random.default_rng(0)
        parts = []
        for numbers in counts:
            labels = rng.permutation(np.repeat(np.arange(3), numbers))
            pixels = rng.integers(0, 230, (len(labels), 3, 4, 4))
            pixels[np.arange(len(labels)), labels] += 25
            pixels, labels = torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)
            parts.append(utils.Images(pixels, labels, utils.SPECS["cifar10"], 4))
        self.data = utils.Data(*parts, ["ant", "bee", "cat"], "tiny")
        monkeypatch.setattr(utils, "load_data", lambda args, device, model_side=None: self.data)
        monkeypatch.setattr(models, "build_model", lambda *_, **__: self.network())
        monkeypatch.setattr(MIA, "attack_shares", attack_shares)
        monkeypatch.setattr(MIACR, "attack_probabilities", probabilities)
        monkeypatch.chdir(root)

    @staticmethod
    def network():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))

    def folder(self, seed=1, scenario="random_0.9"):
        return self.root / f"runs/resnet18_tiny_seed{seed}/{scenario}"

    def save(self, name, number, seed=1, scenario="random_0.9", state=None, **meta):
        """A model whose weights ``number`` determines: the higher, the surer."""
        network = self.network()
        torch.manual_seed(number)
        with torch.no_grad():
            network[1].bias.zero_()
            network[1].weight.normal_(std=0.02).view(3, 3, 16).add_(0.04 * number * torch.eye(3)[:, :, None])
        path = self.folder(seed, scenario) / name / "unlearning_model.pth"
        if name == "original":
            path = self.folder(seed, scenario).parent / "original_model.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, state or network.state_dict(), {"seconds": float(number)} | meta)
        return path

    def evaluate(self, *arguments, pictures=False):
        """What the script prints."""
        command = ["main_evaluate.py", *COMMON, *([] if pictures else ["--no_pictures"]), *map(str, arguments)]
        self._patch.setattr(sys, "argv", command)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main_evaluate.main() == 0
        return said.getvalue()

    def table(self, file="results.csv", **where):
        return table_of(self.folder(**where) / file)


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
    """Where these models were evaluated at α = 0.01 and 0.2, and what was printed."""
    root = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(monkeypatch, root)
        for number, name in enumerate(["original", "retrain", "finetune", "GA"], 1):
            bench.save(name, number)
        return root, bench.evaluate("--unlearn_name", "all", *ALPHAS)


@pytest.fixture
def scored(bench, evaluated):
    """The bench after that evaluation."""
    shutil.copytree(evaluated[0] / "runs", bench.root / "runs", dirs_exist_ok=True)
    return bench


ALPHAS = ["--alphas", "0.01,0.2"]


# ---------------------------------------------------------------- an infinite q̂


def test_what_an_infinite_q_hat_judges_is_empty_in_every_file(scored, evaluated):
    bench, said = scored, evaluated[1]
    judged = ("forget_coverage", "test_set_size", "forget_CR", "forget_fake", "q_hat", "MIACR", "theory_coverage")
    for row in bench.table():
        known = row["alpha"] == "0.2"
        assert {key: row[key] != "" for key in judged} == dict.fromkeys(judged, known)
        assert (row["CR_word"] != "") == known and row["UA_word"] != "" and row["gap"] != ""
        assert row["forget_misclassified"] != "" and row["coverage_outside"] == "False"
    lines = [line.split() for line in said.splitlines() if line.strip().startswith("0.01 ")]
    headings = next(line.split() for line in said.splitlines() if line.startswith("alpha "))
    assert len(lines) == 4 and all(line.count("–") == len(line) - 3 for line in lines), lines  # alpha, method, wrong
    assert "wrong" in headings
    found = json.loads((bench.folder() / "GA/results.json").read_text())["metrics"]["conformal"]
    assert found[0]["forget_coverage"] is None and found[0]["CR_word"] is None and found[1]["forget_coverage"] > 0
    sample = bench.table("GA/samples.csv")[0]
    assert [sample[f"{key}@0.01"] for key in ("set_size", "in_set", "fake", "in_set_share")] == [""] * 4
    assert sample["set_size@0.2"] in {"0", "1", "2", "3"}
    for row in bench.table("classes.csv"):
        assert (
            (row["test_coverage"] != "") == (row["alpha"] == "0.2") and row["own_q_hat"] == "" or row["alpha"] == "0.2"
        )


def test_an_infinite_q_hat_is_said_in_one_line_per_kind(bench):
    said = bench.evaluate("--unlearn_name", "GA", "--alphas", "0.01,0.02,0.2").splitlines()
    lines = [line for line in said if line.startswith("no finite q̂")]
    assert len(lines) == 3
    need = "alpha 0.01 needs 99, alpha 0.02 needs 49 and --cal_sizes 24 gives "
    assert lines[0].startswith(f"no finite q̂ for all classes: {need}24 calibration images; ")
    assert lines[1].startswith(f"no finite q̂ for members and non-members (MIACR): {need}48 calibration images; ")
    assert lines[2].startswith("no finite q̂ of a class's own, in classes.csv: 3 classes at alpha 0.01 (99 calibration")
    assert all("choose a larger --alphas or more --cal_sizes" in line for line in lines)
    assert "no finite" not in bench.evaluate("--unlearn_name", "original", "--alphas", "0.3")


def test_the_forgotten_class_without_a_finite_q_hat_is_named(bench):
    for number, name in enumerate(["retrain", "finetune"], 1):
        bench.save(name, number, scenario="class_1")
    arguments = ["--unlearn_type", "class", "--forget_class", "bee", "--unlearn_name", "all", "--alphas", "0.06,0.3"]
    said = bench.evaluate(*arguments, "--resplits", 1)
    split = utils.make_split(bench.data, flags(unlearn_type="class", forget_class="bee"), 24)
    count = int(split.is_forgotten.sum())
    assert 3 <= count < 12
    line = next(line for line in said.splitlines() if line.startswith("no finite q̂ for class bee"))
    assert f"alpha 0.06 needs 16 and --cal_sizes 24 gives {count} calibration images" in line
    assert "no finite q̂ for all retained classes" not in said or 24 - count < 16
    for row in table_of(bench.folder(scenario="class_1") / "results.csv"):
        known = row["alpha"] == "0.3"
        assert (row["forget_coverage"] != "") == known and row["forget_class"] == "bee"
        assert (row["forget_by_retain_coverage"] != "") == (known or 24 - count >= 16)


def test_draws_without_a_finite_q_hat_are_counted_in_a_line(bench):
    """The class with most calibration images in the split: in other draws it has fewer."""

    def count(number):
        split = utils.make_split(bench.data, flags(unlearn_type="class", forget_class=str(number)), 24)
        return int(split.is_forgotten.sum())

    number = max(range(3), key=count)
    alpha = math.ceil(1000 / (count(number) - 1)) / 1000  # finite with two calibration images fewer
    bench.save("retrain", 1, scenario=f"class_{number}")
    arguments = ["--unlearn_type", "class", "--forget_class", number, "--unlearn_name", "retrain", "--alphas", alpha]
    said = bench.evaluate(*arguments, "--resplits", 40)
    row = table_of(bench.folder(scenario=f"class_{number}") / "results.csv")[0]
    left_out, name = int(row["forget_draws_left_out"]), bench.data.classes[number]
    assert 0 < left_out < 39 and row["forget_coverage"] != ""
    assert f"draws without a finite q̂ for class {name} are left out of the means: {left_out} at alpha {alpha:g}" in said


def test_a_class_without_calibration_image_is_said(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, counts=((20, 20, 20), (40, 1, 40)))
    bench.save("retrain", 1, scenario="class_1")
    said = bench.evaluate("--unlearn_type", "class", "--forget_class", "1", "--unlearn_name", "all", "--alphas", "0.3")
    split = utils.make_split(bench.data, flags(unlearn_type="class", forget_class="1"), 24)
    count = int(split.is_forgotten.sum())
    found = "1 calibration image;" if count else "no calibration images;"
    assert f"no finite q̂ for class bee: alpha 0.3 needs 3 and --cal_sizes 24 gives {found}" in said


# ---------------------------------------------------------------- rows of other methods


def test_a_partial_evaluation_keeps_the_other_methods_rows(scored):
    bench = scored
    files = [bench.folder() / name for name in ("results.csv", "classes.csv")]
    before = [path.read_bytes() for path in files]
    said = bench.evaluate("--unlearn_name", "finetune", *ALPHAS)
    assert [path.read_bytes() for path in files] == before
    assert "2 models and 2 more from earlier" in said
    assert [line.split()[1] for line in said.splitlines() if line.strip().startswith("0.2 ")] == [
        "original",
        "finetune",
    ]
    # Compared with the Retrain that was scored before.
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
        assert ({**row} == earlier) == (row["method"] != "finetune")
    assert next(row for row in after if row["alpha"] == "0.3" and row["method"] == "finetune")["CR_word"] == ""


@pytest.mark.parametrize("change", ["other weights", "gone", "damaged"])
def test_rows_of_a_model_that_is_no_longer_there_are_left_out(scored, change):
    bench = scored
    path = bench.folder() / "GA/unlearning_model.pth"
    if change == "other weights":
        bench.save("GA", 8)
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    said = bench.evaluate("--unlearn_name", "finetune", "--alphas", "0.2")
    assert {row["method"] for row in bench.table()} == {"original", "retrain", "finetune"}
    assert {row["method"] for row in bench.table("classes.csv")} == {"original", "retrain", "finetune"}
    assert "the rows of GA are left out: the model is gone or has changed since" in said


def test_rows_of_another_forget_set_are_left_out(scored):
    bench = scored
    path = bench.folder() / "results.csv"
    path.write_text(path.read_text().replace(bench.table()[0]["forget_set"], "0123456789abcdef"))
    said = bench.evaluate("--unlearn_name", "finetune", "--alphas", "0.2")
    assert {row["method"] for row in bench.table()} == {"original", "finetune"} and "retrain, GA are left out" in said


def test_kept_rows_are_compared_with_a_new_retrain(scored):
    bench = scored
    bench.save("retrain", 7)
    bench.evaluate("--unlearn_name", "retrain", *ALPHAS)
    partial = (bench.folder() / "results.csv").read_bytes()
    bench.evaluate("--unlearn_name", "all", *ALPHAS)
    assert (bench.folder() / "results.csv").read_bytes() == partial
    bench.save("retrain", 6)
    bench.evaluate("--unlearn_name", "retrain", "--alphas", "0.2", "--resplits", 2)  # other settings: no comparison
    rows = {row["method"]: row for row in bench.table()}
    assert rows["GA"]["gap"] == rows["GA"]["CR_word"] == rows["GA"]["TA_minus_retrain"] == "" and rows["GA"]["UA"] != ""
    assert float(rows["retrain"]["gap"]) == 0


def test_a_failed_method_keeps_its_row_while_it_fails(bench):
    record = {"forget_set": utils.make_split(bench.data, flags()).fingerprint, "error": "sfron diverged"}
    (bench.folder() / "sfron").mkdir()
    failure = bench.folder() / "sfron" / main_evaluate.unlearn.FAILURE_FILE
    failure.write_text(json.dumps(record))
    said = bench.evaluate("--unlearn_name", "all", "--alphas", "0.2")
    assert "sfron diverged" in said
    said = bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    rows = {row["method"]: row for row in bench.table()}
    assert (
        list(rows) == ["original", "retrain", "finetune", "GA", "sfron"] and rows["sfron"]["note"] == "sfron diverged"
    )
    assert "sfron" not in said
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


@pytest.mark.parametrize("file", ["results.csv", "classes.csv"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_such_a_table_is_renamed(scored, capsys, kind, file):
    folder = scored.folder()
    path = folder / file
    content = path.read_bytes()
    if kind == "cut":
        content = content[:-30]
    elif kind == "no number":
        content = content.replace(b",0.2,", b",x0.2,", 1)
    path.write_bytes(FOREIGN[kind] or content)
    (folder / f"{file}.old").write_text("another")
    tables = main_evaluate.EarlierTables(folder)
    found = tables.kept({"GA"}, "f", {}) if file == "results.csv" else tables.kept_classes({"retrain"})
    assert found == [] and (folder / f"{file}.old2").read_bytes() == FOREIGN[kind] or content
    assert (folder / f"{file}.old").read_text() == "another" and not path.exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: not a table of this version") and line.endswith(f"renamed to {file}.old2")


def test_an_older_table_whose_methods_are_all_scored_is_replaced(bench, capsys):
    path = bench.folder() / "results.csv"
    path.write_bytes(FOREIGN["older"])
    assert main_evaluate.EarlierTables(path.parent).kept({"retrain", "GA"}, "f", {}) == []
    assert path.exists() and capsys.readouterr().out == ""
    assert main_evaluate.EarlierTables(path.parent).kept({"GA"}, "f", {}) == [] and not path.exists()


def test_a_folder_in_the_place_of_the_table_is_renamed(bench):
    (bench.folder() / "results.csv").mkdir()
    assert "renamed to results.csv.old" in bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert len(bench.table()) == 2


def test_rows_of_a_model_elsewhere_are_kept_while_it_is_there(bench, tmp_path):
    path = bench.save("retrain", 5)
    os.makedirs(tmp_path / "elsewhere")
    path.rename(tmp_path / "elsewhere/mine.pth")
    bench.evaluate("--unlearn_name", "retrain", "--model_dir", tmp_path / "elsewhere/mine.pth", "--alphas", "0.2")
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert [row["method"] for row in bench.table()] == ["original", "retrain", "GA"]
    (tmp_path / "elsewhere/mine.pth").unlink()
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert [row["method"] for row in bench.table()] == ["original", "GA"]


def test_pictures_of_all_methods_outlive_a_partial_evaluation(bench):
    bench.evaluate("--unlearn_name", "all", "--alphas", "0.01,0.2", "--relearn", 1, pictures=True)
    folder = bench.folder()
    names = {"scores.png", "relearn.png", "fake_forgetting.png", "cr_plane.png", "against_alpha.png"}
    assert {path.name for path in folder.glob("*.png")} == names
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    bench.evaluate("--unlearn_name", "finetune", "--alphas", "0.01,0.2", "--relearn", 1, pictures=True)
    assert {path.name for path in folder.glob("*.png")} == names | {"scores_partial.png", "relearn_partial.png"}
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 5 + 4 + 2  # pictures, fake sheets, and the earlier two
    assert '<td class=text data-value="GA">' in report.replace("'", '"')


def test_pictures_of_an_alpha_without_any_finite_q_hat_are_drawn(bench):
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.01", "--relearn", 1, pictures=True)
    assert len(list(bench.folder().glob("*.png"))) == 5


def test_a_summary_over_seeds_keeps_the_other_methods(bench):
    shutil.rmtree(bench.folder() / "finetune")
    for number, name in enumerate(["original", "retrain", "GA"], 5):
        bench.save(name, number, seed=2)
    arguments = ["--seeds", "1,2", "--alphas", "0.01,0.2"]
    bench.evaluate("--unlearn_name", "all", *arguments)
    summary = bench.root / "runs/resnet18_tiny_seeds1,2/random_0.9/results.csv"

    def filled():
        return [{key: value for key, value in row.items() if value} for row in table_of(summary)]

    before = filled()
    said = bench.evaluate("--unlearn_name", "GA", *arguments)
    assert filled() == before
    rows = table_of(summary)
    assert [row["method"] for row in rows if row["alpha"] == "0.2"] == ["original", "retrain", "GA"]
    assert [line.split()[1] for line in said.splitlines() if line.strip().startswith("0.2 ")] == ["original", "GA"]
    seeds = [bench.table(seed=seed) for seed in (1, 2)]
    for row, first, second in zip(rows, *seeds, strict=True):
        for key in ("UA", "TA", "forget_CR", "gap"):
            pair = [first[key], second[key]]
            if "" in pair:
                assert row[key] == "" and row["alpha"] == "0.01"
            else:
                assert float(row[key]) == pytest.approx(np.mean([float(value) for value in pair]))
                assert float(row[f"{key}_std"]) == pytest.approx(np.std([float(value) for value in pair], ddof=1))


# ---------------------------------------------------------------- models


def test_outputs_that_are_not_finite_end_the_evaluation_before_anything_is_written(scored):
    bench = scored
    files = {path: path.read_bytes() for path in bench.folder().rglob("*") if path.is_file()}
    state = bench.network().state_dict()
    state["1.weight"] = torch.full_like(state["1.weight"], 3e38)
    path = bench.save("GA", 1, state=state)
    files[path] = path.read_bytes()
    with pytest.raises(utils.UserError, match="GA/unlearning_model.pth: .*NaN or infinite") as caught:
        bench.evaluate("--unlearn_name", "all", "--alphas", "0.3")
    assert len(str(caught.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in bench.folder().rglob("*") if path.is_file()} == files


def test_models_are_found_in_the_order_of_the_table(bench):
    (bench.folder() / "mine").mkdir()
    bench.save("mine", 3)
    args = flags(unlearn_name=["all"], model_dir="unlearning_model.pth", runs_dir=str(bench.root / "runs"))
    root = bench.folder().parent
    paths = main_evaluate.locate_models(args, root, bench.folder())
    assert list(paths) == ["original", "retrain", "finetune", "GA", "mine"]
    assert (
        paths["original"] == root / "original_model.pth" and paths["GA"] == bench.folder() / "GA/unlearning_model.pth"
    )
    args.unlearn_name = ["GA"]
    assert list(main_evaluate.locate_models(args, root, bench.folder())) == ["original", "GA"]
    args.unlearn_name = ["original"]
    assert main_evaluate.locate_models(args, root, bench.folder()) == {"original": root / "original_model.pth"}
    args.unlearn_name, args.model_dir = ["GA"], "some/where.pth"
    found = main_evaluate.locate_models(args, root, bench.folder())
    assert {name: str(path) for name, path in found.items()} == {
        "original": str(root / "original_model.pth"),
        "GA": "some/where.pth",
    }
    args.unlearn_name = ["GA", "retrain"]
    with pytest.raises(utils.UserError, match="is one file; name one method"):
        main_evaluate.locate_models(args, root, bench.folder())
    args.unlearn_name, args.model_dir = ["all"], "other.pth"
    with pytest.raises(utils.UserError, match="no method with a other.pth"):
        main_evaluate.locate_models(args, root, bench.folder())
    (root / "original_model.pth").unlink()
    args.model_dir = "unlearning_model.pth"
    assert list(main_evaluate.locate_models(args, root, bench.folder())) == ["retrain", "finetune", "GA", "mine"]


def test_models_of_another_forget_set_or_original_are_refused(bench):
    args = flags(unlearn_name=["all"], runs_dir=str(bench.root / "runs"))
    split = utils.make_split(bench.data, args, 24)
    state, _ = checkpoint.read(bench.folder().parent / "original_model.pth")
    original = checkpoint.weights_hash(state)
    right = bench.save("GA", 4, forget_set=split.fingerprint, identity={"original": original})
    paths = {"original": bench.folder().parent / "original_model.pth", "GA": right}
    found = main_evaluate.read_models(paths, args, bench.data, split)
    assert list(found) == ["original", "GA"] and found["GA"][0] == right and found["GA"][2]["seconds"] == 4
    bench.save("GA", 4, forget_set="0" * 16)
    with pytest.raises(utils.UserError, match="unlearned another forget set"):
        main_evaluate.read_models(paths, args, bench.data, split)
    other = bench.save("GA", 4, identity={"original": "f" * 16})
    with pytest.raises(utils.UserError, match="not from one original model") as caught:
        main_evaluate.read_models(paths, args, bench.data, split)
    assert str(other) in str(caught.value) and str(paths["original"]) in str(caught.value)


def test_files_of_a_model_elsewhere_are_written_next_to_it(tmp_path):
    scenario = tmp_path / "run/random_0.9"
    inside = scenario / "GA/unlearning_model.pth"
    assert main_evaluate.beside(inside, "GA", scenario, "samples.csv") == scenario / "GA/samples.csv"
    original = tmp_path / "run/original_model.pth"
    assert main_evaluate.beside(original, "original", scenario, "results.json") == scenario / "original/results.json"
    assert main_evaluate.beside(tmp_path / "a/b.pth", "GA", scenario, "results.json") == tmp_path / "a/b.results.json"


@pytest.mark.parametrize("cal_sizes", ["1", "1,2", "5"])
@pytest.mark.parametrize("scenario", [["--retain_ratio", "0.5"], ["--unlearn_type", "class", "--forget_class", "ant"]])
def test_a_handful_of_images_is_scored(monkeypatch, tmp_path, scenario, cal_sizes):
    bench = Bench(monkeypatch, tmp_path, counts=((2, 2, 2), (1, 3, 4)))
    folder = "class_0" if "class" in scenario else "random_0.5"
    bench.save("retrain", 2, scenario=folder)
    bench.evaluate(*scenario, "--unlearn_name", "retrain", "--cal_sizes", cal_sizes, "--alphas", "0.1,0.6")
    (_, row) = [row for row in bench.table(scenario=folder) if row["cal_size"] == cal_sizes.split(",")[-1]]
    assert row["MIA"] == row["MIACR"] == "" and 0 <= float(row["UA"]) <= 1
    assert row["gap"] == "0.0"


# ---------------------------------------------------------------- decisions and arithmetic


def comparable(**given):
    scalars = {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4, "seconds": 10.0, "num_forget": 100}
    return scalars | given


def test_a_model_is_compared_with_retrain():
    found = main_evaluate.compare_model("GA", comparable(UA=0.3, TA=0.7, seconds=2.5), comparable())
    assert found["gap"] == pytest.approx((0.2 + 0 + 0.1 + 0) / 4)
    assert found["UA_minus_retrain"] == pytest.approx(-0.2) and found["TA_minus_retrain"] == pytest.approx(-0.1)
    assert found["RTE"] == 0.25 and found["UA_word"] == "under-forgets"  # beyond 2·√(2 · 0.25 / 100) = 0.141
    words = [main_evaluate.compare_model("GA", comparable(UA=ua), comparable())["UA_word"] for ua in (0.37, 0.63, 0.65)]
    assert words == ["matches", "matches", "over-forgets"]
    for name, seconds in (("original", 3.0), ("GA", None), ("GA", 0.0)):
        assert "RTE" not in main_evaluate.compare_model(name, comparable(seconds=seconds), comparable())
    assert "RTE" not in main_evaluate.compare_model("GA", comparable(), comparable(seconds=math.nan))
    assert main_evaluate.compare_model("GA", comparable(UA=math.nan), comparable())["UA_word"] is None


@pytest.mark.parametrize("key", ["forget_CR", "forget_by_retain_CR"])
def test_sets_are_compared_with_retrain_and_a_higher_CR_is_less_forgetting(key):
    reference = {"forget_CR": 0.9, "test_CR": 0.6, key: 0.5, f"{key}_error": 0.03}

    def compare(value, error=0.04, num_forget=100):
        row = {"forget_CR": 0.1, "test_CR": 0.7, key: value, f"{key}_error": error}
        return main_evaluate.compare_sets(row, reference, num_forget)

    assert compare(0.61)["CR_word"] == "under-forgets" and compare(0.39)["CR_word"] == "over-forgets"  # beyond 2 · 0.05
    assert compare(0.59)["CR_word"] == compare(0.41)["CR_word"] == "matches"
    assert compare(0.61, num_forget=5)["CR_word"] == "matches"  # one image is 0.2
    assert compare(math.nan)["CR_word"] is None and compare(0.5, math.nan)["CR_word"] is None
    assert compare(0.6)["test_CR_minus_retrain"] == pytest.approx(0.1)
    assert compare(0.6)[f"{key}_minus_retrain"] == pytest.approx(0.1)


def seeds_of(method, UA, CR_f, num_forget=50, **given):
    at = {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": method}
    pairs = zip(UA, CR_f, strict=True)
    return [at | {"UA": ua, "forget_CR": cr, "num_forget": num_forget, "q_hat": 0.9} | given for ua, cr in pairs]


def test_words_over_seeds_have_one_image_as_the_least_difference():
    reference = seeds_of("retrain", [1.0, 1.0], [0.1, 0.1])
    near, far = seeds_of("GA", [1 - 1e-10] * 2, [0.119] * 2), seeds_of("finetune", [0.97] * 2, [0.0, 0.15])
    high = seeds_of("salun", [0.97] * 2, [0.12, 0.13])
    found = {row["method"]: row for row in main_evaluate.summarise(reference + near + far + high)}
    assert (found["GA"]["UA_word"], found["GA"]["CR_word"]) == ("matches", "matches")  # one image is 0.02
    assert found["finetune"]["UA_word"] == "under-forgets" and found["finetune"]["CR_word"] == "over-forgets"
    assert found["salun"]["CR_word"] == "under-forgets" and found["retrain"]["UA_word"] == "matches"
    # The smallest forget set of all rows counts.
    few = [row | {"num_forget": 10} for row in far[:1]] + far[1:]
    found = {row["method"]: row for row in main_evaluate.summarise(reference + few)}
    assert found["finetune"]["UA_word"] == "matches"


def test_words_over_seeds_take_twice_retrains_deviation():
    reference = seeds_of("retrain", [0.4, 0.6], [0.2, 0.4], num_forget=1000)  # deviations of 0.1414
    row = seeds_of("GA", [0.79, 0.79], [0.02, 0.02], num_forget=1000)
    found = {row["method"]: row for row in main_evaluate.summarise(reference + row)}
    assert found["GA"]["UA_word"] == "over-forgets" and found["GA"]["CR_word"] == "matches"
    assert found["GA"]["UA"] == (pytest.approx(0.79), pytest.approx(0))
    found = main_evaluate.summarise(reference + seeds_of("GA", [0.77, 0.77], [0.01, 0.01], num_forget=1000))
    assert found[1]["UA_word"] == "matches" and found[1]["CR_word"] == "over-forgets"


def test_there_is_no_word_over_seeds_without_numbers():
    nan = [math.nan, math.nan]
    found = main_evaluate.summarise(seeds_of("retrain", [0.4, 0.5], nan) + seeds_of("GA", [0.4, 0.5], [0.1, 0.2]))
    assert [row["CR_word"] for row in found] == [None, None] and found[1]["UA_word"] == "matches"
    alone = main_evaluate.summarise(seeds_of("retrain", [0.4, 0.5], [0.1, 0.2]) + seeds_of("GA", [0.4], [0.1]))
    assert "UA_word" not in alone[1]
    without = main_evaluate.summarise(seeds_of("GA", [0.4, 0.5], [0.1, 0.2]))
    assert "UA_word" not in without[0]


def test_rows_are_one_per_key_and_model_and_failures_come_last():
    keys = [("thr", 20, 0.1), ("thr", 20, 0.2)]
    evaluated = {
        "retrain": ({"UA": 0.5, "relearn": {"step": [0]}}, {key: {"forget_CR": key[2]} for key in keys}, 1.0),
        "GA": ({"UA": 0.4}, {key: {"forget_CR": 2 * key[2]} for key in keys}, 1.0),
    }
    origins = {"retrain": {"weights": "a"}, "GA": {"weights": "b"}}
    rows = main_evaluate.table_rows(evaluated, {"salun": "diverged"}, origins)
    at = {"score": "thr", "cal_size": 20}
    assert rows == [
        {**at, "alpha": 0.1, "method": "retrain", "UA": 0.5, "forget_CR": 0.1, "weights": "a"},
        {**at, "alpha": 0.1, "method": "GA", "UA": 0.4, "forget_CR": 0.2, "weights": "b"},
        {**at, "alpha": 0.1, "method": "salun", "note": "diverged"},
        {**at, "alpha": 0.2, "method": "retrain", "UA": 0.5, "forget_CR": 0.2, "weights": "a"},
        {**at, "alpha": 0.2, "method": "GA", "UA": 0.4, "forget_CR": 0.4, "weights": "b"},
        {**at, "alpha": 0.2, "method": "salun", "note": "diverged"},
    ]


def test_merged_rows_are_in_the_order_of_the_methods_in_each_block():
    def rows(names, alpha, **given):
        return [{"score": "thr", "cal_size": 9, "alpha": alpha, "method": name} | given for name in names]

    scored, kept = rows(["original", "GA"], 0.1), rows(["retrain", "mine"], 0.1) + rows(["retrain"], 0.2)
    failed = rows(["finetune"], 0.1, note="diverged")
    found = main_evaluate.merge_rows(scored + failed, kept)
    assert [(row["alpha"], row["method"]) for row in found] == [
        (0.1, "original"), (0.1, "retrain"), (0.1, "GA"), (0.1, "mine"), (0.1, "finetune"), (0.2, "retrain"),
    ]  # fmt: skip
    unordered = rows(["GA", "original"], 0.1)
    assert main_evaluate.merge_rows(unordered, []) == unordered


def test_only_the_failures_asked_for_are_shown():
    failed = {"GA": "a", "salun": "b"}
    names = lambda given, evaluated=(), seeds=None: main_evaluate.asked_failures(  # noqa: E731
        flags(unlearn_name=given, seeds=seeds, seed=3), failed, evaluated
    )
    assert names(["all"]) == failed and names(["GA"]) == {"GA": "a"} and names(["retrain"]) == {}
    assert names(["all"], ["GA"]) == {"salun": "b"} and names(["GA,salun"], seeds=[3, 4])["GA"] == "seed 3: a"


def test_failures_are_those_of_this_forget_set(tmp_path, capsys):
    for name, text in {
        "GA": '{"forget_set": "x", "error": "diverged"}', "salun": '{"forget_set": "y", "error": "diverged"}',
        "sfron": "{", "scrub": "[]",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / main_evaluate.unlearn.FAILURE_FILE).write_text(text)
    assert main_evaluate.failures(tmp_path, "x") == {"GA": "diverged"}
    assert capsys.readouterr().out.count("damaged, and left out") == 2


def advised(**given):
    row = {"score": "thr", "alpha": 0.1, "method": "GA", "q_hat": 0.9, "coverage_outside": False}
    return row | {"test_coverage": 0.9, "theory_coverage": 0.95} | given


def test_an_alpha_above_the_error_rate_is_said():
    tables = [[advised(q_hat=0.3), advised(method="salun"), advised(method="salun", alpha=0.2, q_hat=0.1)]]
    tables[0] += [advised(alpha=0.2, q_hat=0.4), advised(score="aps", q_hat=0.1, alpha=0.3), advised(q_hat=math.nan)]
    (line,) = main_evaluate.advice(tables)
    assert line.startswith("alpha above the error rate (0.1 for GA; 0.2 for all): q̂ < 0.5 there")
    (line,) = main_evaluate.advice([*tables, [advised()]])
    assert "(0.1 for GA; 0.2 for all; in a seed at least)" in line
    assert main_evaluate.advice([[advised(), {"method": "sfron", "note": "diverged"}]]) == []


def test_coverage_outside_the_theory_is_said():
    tables = [[advised(coverage_outside=True, test_coverage=0.99, alpha=0.05), advised()]]
    (line,) = main_evaluate.advice(tables)
    assert "GA at 0.05 (thr: 0.990, 0.950)" in line and "GA at 0.1" not in line


def missing(rows, class_rows=()):
    return main_evaluate.missing_q_hats([main_evaluate.Evaluation(rows, rows, list(class_rows))])


def q_hat_row(alpha, **given):
    row = {"alpha": alpha, "cal_size": 30, "q_hat": 0.9, "calibration_images": 30, "draws_left_out": 0}
    return row | {"MIACR_calibration_images": 1000} | given


def test_lines_on_infinite_q_hats_join_what_is_of_one_kind():
    nan = math.nan
    of_class = {"q_hat_forget": nan, "forget_calibration_images": 1, "forget_draws_left_out": 0, "forget_class": "cat"}
    rows = [q_hat_row(0.2, **of_class), q_hat_row(0.1, **of_class), q_hat_row(0.1, **of_class)]
    rows += [{"alpha": 0.1, "note": "failed"}]
    rows.append(q_hat_row(0.01, **of_class | {"q_hat": nan, "MIACR_calibration_images": 98}))
    rows.append(q_hat_row(0.3, **of_class | {"q_hat_forget": 0.5, "forget_draws_left_out": 7, "draws_left_out": 2}))
    class_rows = [
        {"alpha": 0.3, "class": name, "own_q_hat": q, "calibration_images": n}
        for name, q, n in (("cat", nan, 1), ("dog", nan, 2), ("cow", 0.1, 3), ("cat", nan, 1))
    ]
    lines = missing(rows, class_rows)
    assert [line.split(";")[0] for line in lines] == [
        "no finite q̂ for class cat: alpha 0.01 needs 99, alpha 0.1 needs 9, alpha 0.2 needs 4 and --cal_sizes 30 gives "
        "1 calibration image",
        "no finite q̂ for all retained classes: alpha 0.01 needs 99 and --cal_sizes 30 gives 30 calibration images",
        "no finite q̂ for members and non-members (MIACR): alpha 0.01 needs 99 and --cal_sizes 30 gives 98 calibration "
        "images",
        "draws without a finite q̂ for all retained classes are left out of the means: 2 at alpha 0.3",
        "draws without a finite q̂ for class cat are left out of the means: 7 at alpha 0.3",
        "no finite q̂ of a class's own, in classes.csv: 2 classes at alpha 0.3 (3 calibration images needed, at most 2 "
        "found)",
    ]
    assert missing([q_hat_row(0.01, MIACR_calibration_images=99), q_hat_row(0.2)]) == []
    (line,) = missing([], [{"alpha": 0.3, "class": "cow", "own_q_hat": nan, "calibration_images": 0}])
    assert "1 class at alpha 0.3 (3 calibration images needed, at most 0 found)" in line
    (line,) = missing([q_hat_row(0.1, q_hat=nan, calibration_images=0), q_hat_row(0.1, q_hat=nan, cal_size=8)])
    assert "gives no calibration images; alpha 0.1 needs 9 and --cal_sizes 8 gives" in line


def test_tables_show_spreads_over_draws_and_leave_out_empty_and_constant_columns():
    at = {"score": "thr", "cal_size": 20, "UA": 0.5}
    row = at | {"alpha": 0.1, "method": "GA", "q_hat": 0.9, "forget_CR": 0.4, "forget_CR_resplit_std": 0.1}
    row |= {"forget_coverage": 0.7, "forget_coverage_resplit_std": math.nan, "forget_misclassified": 3}
    other = row | {"alpha": 0.2, "method": "salun"}
    failed = {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": "sfron", "note": "diverged"}
    (_, columns, models), (_, set_columns, sets) = main_evaluate.shown_tables([row, other, failed])
    assert list(columns) == ["method", "UA", "note"] and [one["method"] for one in models] == ["GA", "salun", "sfron"]
    assert list(set_columns) == ["alpha", "method", "forget_coverage", "forget_CR", "forget_misclassified"]
    assert [one["method"] for one in sets] == ["GA", "salun"]
    assert sets[0]["forget_CR"] == utils.Spread(0.4, 0.1)
    assert sets[0]["forget_coverage"] == 0.7 and sets[0]["forget_misclassified"] == 3
    several = main_evaluate.shown_tables([row, other | {"score": "aps", "cal_size": 40}])[1][1]
    assert list(several)[:4] == ["score", "cal_size", "alpha", "method"]
    assert [heading for heading, *_ in main_evaluate.shown_tables([failed])] == ["Models"]


def test_cells_of_csv_are_empty_for_nan_and_none():
    text = main_evaluate.as_csv([{"a": 1, "b": math.nan}, {"a": None, "c": 0.5}, {"b": 0.0, "c": "x,y"}])
    assert text.splitlines() == ["a,b,c", "1,,", ",,0.5", ',0.0,"x,y"']


@pytest.mark.parametrize("name", ["thr", "aps"])
def test_relearning_is_measured_on_the_other_images_with_each_steps_q_hat(bench, monkeypatch, name):
    """Coverage at each step is under the q̂ of the retained classes at that step."""
    args = flags(unlearn_type="class", forget_class="bee", cal_sizes=[24], resplits=1, batch_size=None)
    args.relearn, args.relearn_rate = 2, 0.05
    split = utils.make_split(bench.data, args, 24)
    model = bench.network()
    outputs, _ = main_evaluate.collect_outputs(model, bench.data, split, args)
    steps = []

    def relearn(model, data, split, seed, steps_to_do, rate, measure):
        assert (seed, steps_to_do, rate) == (1, 2, 0.05)
        others = split.forget[torch.tensor([7, 3, 5, 11])]
        for step in range(3):
            if step:
                with torch.no_grad():
                    model[1].weight.mul_(-1.5)
            steps.append((step, others, {name: value.clone() for name, value in model.state_dict().items()}))
            measure(step, others)

    monkeypatch.setattr(main_evaluate.unlearn, "relearn", relearn)
    score = scores.Score(name, seed=3)
    chosen = metrics.Settings((0.2, 0.1), (score, scores.Score("saps")))
    curve = main_evaluate.relearn(model, outputs, bench.data, split, chosen, args)
    assert curve["step"] == [0, 1, 2]
    for number, (_, others, state) in enumerate(steps):
        model.load_state_dict(state)
        calibration = split.calibration[~split.is_forgotten]
        logits, labels = inference.compute_logits(model, bench.data.held_out, calibration)
        q_hat = CR.conformal_quantile(score.log_odds(logits, "held_out").gather(1, labels[:, None]).flatten(), 0.2)
        logits, labels = inference.compute_logits(model, bench.data.train, others)
        assert curve["accuracy"][number] == (logits.argmax(dim=1) == labels).double().mean()
        inside = score.log_odds(logits, "forget").gather(1, labels[:, None]) <= q_hat
        assert curve["coverage"][number] == inside.double().mean()
    too_small = metrics.Settings((0.001,))
    assert all(map(math.isnan, main_evaluate.relearn(model, outputs, bench.data, split, too_small, args)["coverage"]))


@pytest.mark.parametrize("unlearn_type", ["random", "class"])
def test_outputs_hold_each_part_of_the_split(bench, unlearn_type):
    args = flags(unlearn_type=unlearn_type, cal_sizes=[10, 24], resplits=4, batch_size=7, seed=2)
    split, model = utils.make_split(bench.data, args, 24), bench.network()
    outputs, scalars = main_evaluate.collect_outputs(model, bench.data, split, args)
    for part, images, indices in (
        ("retain", bench.data.train, split.retain),
        ("forget", bench.data.train, split.forget),
        ("held_out", bench.data.held_out, torch.cat([split.calibration, split.test, split.forget_test])),
    ):
        logits, labels = inference.compute_logits(model, images, indices)
        torch.testing.assert_close(getattr(outputs, part).logits, logits)
        assert torch.equal(getattr(outputs, part).labels, labels)
    assert torch.equal(outputs.draws, metrics.draw_splits(len(outputs.held_out.labels), 4, 2))
    assert outputs.cal_sizes == [10, 24]
    if unlearn_type == "random":
        assert outputs.forgotten is None and scalars == {}
    else:
        assert torch.equal(outputs.forgotten, outputs.held_out.labels == split.forget_class)
        assert set(scalars) == {"probe_forget", "probe_retain"}


def test_features_enter_the_last_layer_of_any_network(bench):
    class Convolutional(torch.nn.Module):
        """A network whose classifier is a 1×1 convolution before the pooling, as timm's dla34 nearly is."""

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


def test_settings_hold_the_flags():
    args = flags(alphas=[0.1], score=["thr", "raps"], set_sizes=[2], not_randomized=True, raps_penalty=0.3, raps_k=4)
    args.saps_weight, args.seed = 0.7, 9
    found = main_evaluate.settings_of(args)
    assert found == metrics.Settings(
        (0.1,), tuple(scores.Score(name, False, 0.3, 4, 0.7, 9) for name in ("thr", "raps")), (2,), 9
    )
