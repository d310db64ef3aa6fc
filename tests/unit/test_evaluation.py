"""main_evaluate in process, on small pictures: from models or logits on disk to the tables."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import read_json, write_pictures
from matplotlib.figure import Figure
from matplotlib.text import Text
from small import BRIGHTER, ByHand, SmallNet, small_job
from torch.nn import functional as F

import main_evaluate
import models
import utils
from metrics.ensembles import PARTS, Trainings
from models import checkpoint, inference, relearning

ALPHAS = ["--alphas", "0.01,0.2"]


class Bench:
    """A run folder with the logits of three models and no model file, and a folder of images."""

    def __init__(self, monkeypatch, root, pictures):
        self._patch, self.root = monkeypatch, root
        monkeypatch.chdir(root)
        common = "--data_name image_folder --workers 0 --width 2 --device cpu --wandb_mode disabled"
        common += " --resplits 3 --cal_sizes 24 --data_dir"
        self.common = [*common.split(), str(pictures)]
        self.args = self.parse("--unlearn_name", "all")
        self.data = utils.read_data(self.args, torch.device("cpu"))
        self.args.cal_sizes = [24]
        for number, name in enumerate(["retrain", "finetune", "GA"], 1):
            self.save_logits(name, number)

    def parse(self, *arguments):
        command = ["main_evaluate.py", *self.common, *map(str, arguments)]
        self._patch.setattr(sys, "argv", command)
        return main_evaluate.parse_flags()

    def folder(self, seed=1, scenario="random_0.9"):
        name = f"resnet18w2_image_folder-pictures_seed{seed}"
        return self.root / "runs" / name / scenario

    def evaluate(self, *arguments, pictures=False):
        """Run the script. Its pictures are made, but matplotlib does not take the time to draw."""
        self.parse(*arguments, *([] if pictures else ["--no_pictures"]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"png"))
            assert main_evaluate.main() == 0

    def path(self, name, seed=1, scenario="random_0.9"):
        folder = self.folder(seed, scenario)
        path = folder / name / "unlearning_model.pth"
        if name == "original":
            path = folder.parent / "original_model.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name, number, seed=1, scenario="random_0.9", **meta):
        """Save a network with random weights that ``number`` determines."""
        torch.manual_seed(number)
        network = models.create_model("resnet18", 2, width=2)
        path = self.path(name, seed, scenario)
        checkpoint.save(path, network.state_dict(), {"seconds": float(number)} | meta)
        return path

    def logits(self, number, bias=1.5):
        """Noisy logits of all images, higher for the true label by ``bias``."""
        rng = np.random.default_rng(number)
        for images in (self.data.train, self.data.held_out):
            logits = rng.normal(size=(len(images), 2))
            logits[np.arange(len(images)), images.labels.numpy()] += bias
            yield logits.astype(np.float32)

    def save_logits(self, name, number, seed=1, scenario="random_0.9", **changes):
        """Save logits without a model, as another program would."""
        train, held_out = self.logits(number)
        arrays = {"train": train, "held_out": held_out, "weights": f"mine {number}"}
        path = self.path(name, seed, scenario).with_name("logits.npz")
        np.savez(path, **arrays | {"data": self.data.fingerprint} | changes)
        return path

    def table(self, file="results.csv", **where):
        return table_of(self.folder(**where) / file)


def table_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def methods(rows):
    return list(dict.fromkeys(row["method"] for row in rows))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of two classes, decoded once."""
    folder = tmp_path_factory.mktemp("images") / "pictures"
    write_pictures(folder, 60, 120)
    return folder


@pytest.fixture
def bench(monkeypatch, tmp_path, pictures):
    return Bench(monkeypatch, tmp_path, pictures)


@pytest.fixture(scope="module")
def evaluated_runs(tmp_path_factory, pictures):
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(patch, tmp_path_factory.mktemp("evaluated"), pictures)
        bench.evaluate("--unlearn_name", "all", *ALPHAS)
    return bench.root / "runs"


@pytest.fixture
def evaluated(bench, evaluated_runs):
    """A bench whose three models are evaluated at both α."""
    shutil.copytree(evaluated_runs, bench.root / "runs", dirs_exist_ok=True)
    return bench


@pytest.mark.parametrize(
    ("flag", "default", "refused"),
    [("alphas", [0.05, 0.1, 0.15, 0.2], "1"), ("score", ["thr"], "lac"), ("batch_size", None, "0")]
    + [("cal_sizes", None, "0"), ("columns", "short", "few"), ("relearn_on", ["forget"], "test")]
    + [("relearn", 0, "-1"), ("resplits", 100, "0"), ("no_pictures", False, "1")],
)
def test_flag_has_a_default_and_bounds(flag, default, refused, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main_evaluate.py", "--unlearn_name=all"])
    assert getattr(main_evaluate.parse_flags(), flag) == default
    sys.argv.append(f"--{flag}={refused}")
    with pytest.raises(utils.UserError, match=f"--{flag}"):
        main_evaluate.parse_flags()


# ---------------------------------------------------------------- logits


def test_network_of_another_program_is_in_every_table_and_picture(bench):
    where = {"scenario": "class_0"}
    for number, name in enumerate(["original", "retrain", "ga"], 1):
        bench.save(name, number, **where)
    bench.save("quick", 4, **where, base_method="retrain")
    torch.manual_seed(0)  # the network and its loop know nothing of this project
    network, labels = torch.nn.Linear(3 * 8 * 8, 2), bench.data.train.labels
    inputs = [images.pixels.flatten(1) / 255 for images in (bench.data.train, bench.data.held_out)]
    for _ in range(20):
        F.cross_entropy(network(inputs[0]), labels).backward()
        network.weight.data -= 0.01 * network.weight.grad
    train, held_out = (network(images).detach().numpy() for images in inputs)
    path = bench.save_logits("mine", 0, **where, train=train, held_out=held_out)
    flags = ["--unlearn_type", "class", "--forget_class", "0", "--unlearn_name", "all"]
    args = bench.parse(*flags, "--alphas", "0.2")
    evaluation = main_evaluate.start_evaluation(args, bench.data, torch.device("cpu"))
    paths = main_evaluate.locate_models(["all"], utils.MODEL_FILE, evaluation.folder)
    saved_models = main_evaluate.read_models(paths, evaluation)
    main_evaluate.measure_models(saved_models, evaluation)
    views = main_evaluate.make_views(saved_models, evaluation)
    drawn = main_evaluate.draw_models(views, evaluation)
    assert {"destinations.png", "compute.png", "cr_plane.png", "scores.png"} < drawn.keys()
    for file, (_, figure) in drawn.items():
        assert "mine" in {text.get_text() for text in figure.findobj(Text)}, file
    main_evaluate.save_seed(views, saved_models, evaluation)
    for file in ("results.csv", "classes.csv", "destinations.csv"):
        assert methods(bench.table(file, **where)) == ["original", "retrain", "ga", "mine", "quick"]
    for file in ("results.tex", "report.html"):
        assert "mine" in (bench.folder(**where) / file).read_text()
    assert {"samples.csv", "fake_forgotten.png"} < {each.name for each in path.parent.iterdir()}
    rows = {row["method"]: row for row in bench.table(**where)}
    assert rows["quick"]["base_method"] == "retrain" and rows["mine"]["base_method"] == "mine"
    ants = [row for row in bench.table("destinations.csv", **where) if "ant" in row.values()]
    shares = {row["method"]: float(row["share"]) for row in ants if row["part"] == "forget"}
    assert shares["mine"] == pytest.approx((train[labels == 0].argmax(1) == 0).mean())
    distance = abs(shares["mine"] - shares["retrain"])  # ½ of twice this, for two classes
    assert float(rows["mine"]["TV_forget"]) == pytest.approx(distance) and distance > 0
    trained, held = train.argmax(1) == labels.numpy(), bench.data.held_out.labels.numpy()
    split, tested = evaluation.split, held_out.argmax(1) == held
    expected = {"UA": ~trained[split.forget], "RA": trained[split.retain], "TA": tested[split.test]}
    for key, correct in expected.items():
        assert float(rows["mine"][key]) == pytest.approx(correct.mean()), key
    assert read_json(path.with_name("results.json"))["weights"] == "mine 0"


def test_other_alpha_needs_no_model_file(bench):
    for name in ("original", "retrain", "GA"):
        bench.save(name, 7 + len(name))
    bench.evaluate("--unlearn_name", "retrain", "GA", "--alphas", "0.2")
    before = bench.table()
    for path in bench.root.rglob("*.pth"):
        path.unlink()
    bench.evaluate("--unlearn_name", "retrain", "GA", "--alphas", "0.2,0.3", "--score", "thr,aps")
    after = [row for row in bench.table() if (row["score"], row["alpha"]) == ("thr", "0.2")]
    assert after == before and methods(after) == ["original", "retrain", "GA"]
    assert (bench.folder().parent / "original_logits.npz").is_file()
    assert float(after[2]["seconds"]) == 9  # how it was made is kept in the record


def test_changed_model_file_runs_the_network_again(bench):
    bench.save("GA", 1)
    bench.evaluate("--unlearn_name", "GA", *ALPHAS)
    first = np.load(bench.folder() / "GA/logits.npz")
    path = bench.save("GA", 2)
    bench.evaluate("--unlearn_name", "GA", *ALPHAS)
    second = np.load(bench.folder() / "GA/logits.npz")
    assert str(second["weights"]) == checkpoint.weights_hash(checkpoint.read(path)[0])
    assert not np.array_equal(first["train"], second["train"])
    network = models.create_model("resnet18", 2, width=2)
    network.load_state_dict(checkpoint.read(path)[0])
    expected, _ = inference.compute_logits(network, bench.data.train, torch.arange(60))
    np.testing.assert_allclose(second["train"], expected, atol=1e-5)


def test_original_logits_are_computed_once_for_all_scenarios(bench):
    bench.save("original", 1)
    bench.evaluate("--unlearn_name", "original", *ALPHAS)
    path = bench.folder().parent / "original_logits.npz"
    before = path.stat().st_mtime_ns
    bench.evaluate("--unlearn_name", "original", *ALPHAS, "--retain_ratio", "0.5")
    assert path.stat().st_mtime_ns == before
    assert methods(bench.table(scenario="random_0.5")) == ["original"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"train": np.zeros((59, 2), np.float32)}, "train"),
        ({"held_out": np.zeros((120, 3), np.float32)}, "held_out"),
        ({"train": np.zeros((60, 2))}, "float64"),
        ({"train": np.full((60, 2), np.nan, np.float32)}, "train"),
        ({"data": "0123"}, "0123"),
    ],
)
def test_logits_that_do_not_fit_the_data_name_the_file(bench, changes, word):
    path = bench.save_logits("GA", 3, **changes)
    with pytest.raises(utils.UserError, match=f"GA/{path.name}.*{word}"):
        bench.evaluate("--unlearn_name", "GA", *ALPHAS)


def test_logits_without_a_fingerprint_are_used_and_the_fingerprint_is_printed(bench, capsys):
    bench.save_logits("GA", 3, data="")
    bench.evaluate("--unlearn_name", "GA", *ALPHAS)
    output = capsys.readouterr().out
    assert f"data={bench.data.fingerprint}" in output and "GA: measured" in output
    assert methods(bench.table()) == ["GA"]


def test_class_probe_is_kept_with_the_record(bench):
    where = {"scenario": "class_1"}
    arguments = ["--unlearn_type", "class", "--forget_class", "bee", "--unlearn_name", "GA"]
    path = bench.save("GA", 3, **where)
    bench.save_logits("mine", 3, **where)
    bench.evaluate(*arguments, "--alphas", "0.3")
    (row,) = bench.table(**where)
    assert 0 <= float(row["probe_forget"]) <= 1 and 0 <= float(row["probe_retain"]) <= 1
    path.unlink()
    bench.evaluate(*arguments, "mine", "--alphas", "0.2", "--resplits", "5")
    after, mine = bench.table(**where)
    assert after["probe_forget"] == row["probe_forget"] and mine["probe_forget"] == ""
    assert after["forget_class"] == "bee" and after["num_forget"] == "30"


# ---------------------------------------------------------------- records and tables


def test_method_not_asked_for_is_a_row_from_its_record(evaluated):
    before = evaluated.table()
    evaluated.evaluate("--unlearn_name", "finetune", *ALPHAS)
    assert evaluated.table() == before
    evaluated.evaluate("--unlearn_name", "finetune", "--alphas", "0.2,0.3")
    rows = [(row["alpha"], row["method"]) for row in evaluated.table()]
    assert rows == [*(("0.2", name) for name in methods(before)), ("0.3", "finetune")]
    evaluated.evaluate("--unlearn_name", "GA", *ALPHAS)  # the record still has the first α
    assert evaluated.table() == before


@pytest.mark.parametrize(
    "change", ["resplits", "cal_sizes", "logits", "gone", "damaged record", "model file"]
)
def test_record_of_other_settings_or_weights_is_no_row(evaluated, change):
    arguments = [f"--{change}", "20"] if change in ("resplits", "cal_sizes") else []
    if change == "logits":
        evaluated.save_logits("GA", 9)
    elif change == "gone":
        (evaluated.folder() / "GA/logits.npz").unlink()
    elif change == "damaged record":
        (evaluated.folder() / "GA/results.json").write_text("{")
    elif change == "model file":
        evaluated.save("GA", 9)
    evaluated.evaluate("--unlearn_name", "finetune", *ALPHAS, *arguments)
    expected = ["finetune"] if arguments else ["retrain", "finetune"]
    assert methods(evaluated.table()) == methods(evaluated.table("classes.csv")) == expected


def test_comparison_is_with_the_retrain_of_the_table(evaluated):
    evaluated.save_logits("retrain", 8)
    evaluated.evaluate("--unlearn_name", "retrain", *ALPHAS)
    partial = evaluated.table()
    evaluated.evaluate("--unlearn_name", "all", *ALPHAS)
    assert evaluated.table() == partial
    retrain, _, GA = partial[:3]
    pairs = [(float(GA[key]), float(retrain[key])) for key in ("UA", "RA", "TA", "MIA")]
    assert float(GA["gap"]) == pytest.approx(np.mean([abs(a - b) for a, b in pairs]))
    assert float(GA["TA_minus_retrain"]) == pytest.approx(pairs[2][0] - pairs[2][1])
    assert float(retrain["gap"]) == 0 and float(GA["JSD_forget"]) > 0.01
    assert retrain["by_UA"] == "reference" and "UA_minus_retrain_low" in GA
    for key in ("UA", "RA", "TA", "MIA", "forget_CR", "test_CR"):
        row, column = evaluated.table()[-1], f"{key}_minus_retrain"
        low, mean, high = (float(row[column + end]) for end in ("_low", "", "_high"))
        assert low < mean < high and mean == pytest.approx((low + high) / 2), key
    record = read_json(evaluated.folder() / "GA/results.json")["metrics"]
    assert not {"gap", "JSD_forget", "by_UA"} & record.keys()


def test_changed_predictions_are_compared(bench, capsys):
    for name, number in (("original", 1), ("finetune", 2), ("GA", 3)):
        bench.save(name, number)
    bench.save("ssd", 1)
    bench.evaluate("--unlearn_name", "all", *ALPHAS)
    rows = {row["method"]: row for row in bench.table()}
    assert rows["original"]["changed"] == "" and float(rows["ssd"]["changed"]) == 0
    assert "ssd" in capsys.readouterr().out.split("no prediction of the original model changed")[1]
    split = utils.make_split(bench.data, utils.scenario_of(bench.args), 24)
    files = "../original_logits.npz", "GA/logits.npz"
    first, other = (np.load(bench.folder() / file) for file in files)
    held_out = torch.cat([split.calibration, split.test])
    changed = [first["train"].argmax(1) != other["train"].argmax(1)]
    changed.append((first["held_out"].argmax(1) != other["held_out"].argmax(1))[held_out])
    assert float(rows["GA"]["changed"]) == pytest.approx(np.concatenate(changed).mean())


def test_failed_method_is_a_row_with_a_note(bench):
    fingerprint = utils.make_split(bench.data, utils.scenario_of(bench.args), 24).fingerprint
    for name, forget_set in (("sfron", fingerprint), ("scrub", "another")):
        failure = bench.path(name).with_name(utils.FAILURE_FILE)
        failure.write_text(json.dumps({"forget_set": forget_set, "error": "diverged"}))
    bench.evaluate("--unlearn_name", "all", "--alphas", "0.2")
    rows = bench.table()
    assert methods(rows) == ["retrain", "finetune", "GA", "sfron"]
    assert rows[3]["note"] == "seed 1: diverged" and rows[3]["UA"] == ""
    bench.save("sfron", 1)
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2")
    assert methods(bench.table()) == ["retrain", "finetune", "GA"]


def test_numbers_under_an_infinite_q_hat_are_empty(evaluated):
    for row in evaluated.table():
        known = row["alpha"] == "0.2"
        for key in ("forget_coverage", "test_set_size", "forget_CR", "q_hat", "MIACR", "by_CR"):
            assert (row[key] != "") == known, key
        assert row["by_UA"] and row["gap"] and row["forget_misclassified"]
    record = read_json(evaluated.folder() / "GA/results.json")["metrics"]["conformal"]
    assert record[0]["forget_coverage"] is None and record[1]["forget_coverage"] > 0
    sample = evaluated.table("GA/samples.csv")[0]
    assert sample["set_size@0.01"] == "" and sample["set_size@0.2"] in {"0", "1", "2"}
    assert sample["label"] in {"ant", "bee"} and sample["file"].endswith(".png")


def test_settings_are_in_the_record(bench):
    bench.evaluate("--unlearn_name", "GA", *ALPHAS, "--seed", "1", "--split_seed", "1")
    split = utils.make_split(bench.data, utils.scenario_of(bench.args), 24)
    settings = {"cal_size": 24, "resplits": 3, "seed": 1, "split_seed": 1}
    settings |= {"forget_set": split.fingerprint, "data": bench.data.fingerprint}
    record = read_json(bench.folder() / "GA/results.json")
    assert record["evaluation"]["settings"] == settings and record["method"] == "GA"


def test_pictures_and_report_show_all_methods_of_the_table(bench):
    bench.save("cpu_RL", 5, q_hats=[0.9, 0.8])
    bench.evaluate("--unlearn_name", "all", "--alphas", "0.2", pictures=True)
    names = {path.name for path in bench.folder().glob("*.png")}
    drawn = {"scores.png", "q_hat.png", "fake_forgetting.png", "cr_plane.png", "against_alpha.png"}
    assert names == drawn | {"compute.png"}
    bench.evaluate("--unlearn_name", "GA", "--alphas", "0.2", "--score", "aps", pictures=True)
    assert not [name for name in ("scores.png", "compute.png") if (bench.folder() / name).exists()]
    report = (bench.folder() / "report.html").read_text()
    assert methods(bench.table()) == ["GA"] and "cpu_RL" not in report
    names = {path.name for path in bench.folder().glob("*.png")}
    assert "http" not in report.replace("http-equiv", "")
    assert report.count("data:image/png;base64,") == len(names - {"q_hat.png"}) + 1


# ---------------------------------------------------------------- models


def test_names_of_models_are_in_the_order_of_the_table(bench):
    folder = bench.folder()

    def located(*names, model_dir="unlearning_model.pth"):
        return main_evaluate.locate_models(names, model_dir, folder)

    assert list(located("all")) == ["retrain", "finetune", "GA"]
    original = bench.save("original", 1)
    assert located("GA") == {"original": original, "GA": folder / "GA/unlearning_model.pth"}
    assert str(located("GA", model_dir="a/b.pth")["GA"]) == "a/b.pth"
    with pytest.raises(utils.UserError, match="--model_dir a/b.pth"):
        located("GA", "retrain", model_dir="a/b.pth")
    with pytest.raises(utils.UserError, match="other.pth"):
        main_evaluate.locate_models(["all"], "other.pth", bench.folder(seed=5))


def test_files_of_a_model_elsewhere_are_next_to_it(evaluated):
    (evaluated.root / "a").mkdir()
    shutil.move(evaluated.save("GA", 3), evaluated.root / "a/b.pth")
    evaluated.evaluate("--unlearn_name", "GA", "--model_dir", "a/b.pth", "--alphas", "0.2")
    files = {path.name for path in (evaluated.root / "a").iterdir()}
    assert files == {"b.pth", "b.logits.npz", "b.results.json", "b.samples.csv"}
    assert methods(evaluated.table()) == ["retrain", "finetune", "GA"]


@pytest.mark.parametrize(
    ("meta", "word"),
    [
        ({"forget_set": "0" * 16}, "0" * 16),
        ({"forget_set": None, "split_seed": 2}, "split_seed 2"),
        ({"identity": {"original": "f" * 16}}, "original_model.pth"),
        ({"width": 4}, "width"),
    ],
)
def test_model_of_another_run_is_refused(bench, meta, word):
    fingerprint = utils.make_split(bench.data, utils.scenario_of(bench.args), 24).fingerprint
    meta = {key: value or fingerprint for key, value in meta.items()}
    bench.save("original", 1)
    bench.save("GA", 4, **meta)
    with pytest.raises(utils.UserError, match=word) as caught:
        bench.evaluate("--unlearn_name", "GA", *ALPHAS)
    assert "GA/unlearning_model.pth" in str(caught.value)


def test_infinite_outputs_name_the_model_and_write_nothing(bench):
    path = bench.save("GA", 1)
    state, _ = checkpoint.read(path)
    state["fc.weight"] = torch.full_like(state["fc.weight"], 3e38)
    checkpoint.save(path, state, {})
    (bench.folder() / "GA/logits.npz").unlink()
    with pytest.raises(utils.UserError, match="GA/unlearning_model.pth"):
        bench.evaluate("--unlearn_name", "all", "--alphas", "0.3")
    assert not (bench.folder() / "results.csv").exists()
    assert not (bench.folder() / "GA/logits.npz").exists()


# ---------------------------------------------------------------- seeds


def test_seeds_have_means_deviations_and_with_one_split_distributions(bench, capsys):
    for seed in range(1, 3):
        scenario = "random_0.9" if seed == 1 else "random_0.9_split1"
        for number, name in enumerate(["retrain", "GA"], 1):
            bench.save_logits(name, 10 * seed + number, seed=seed, scenario=scenario)
    seeds = ["--seeds", "1,2", "--split_seed", "1"]
    bench.evaluate("--unlearn_name", "retrain", "GA", *seeds, "--alphas", "0.2", pictures=True)
    summary = bench.folder(seed="s1,2", scenario="random_0.9_split1")
    rows = table_of(summary / "results.csv")
    assert methods(rows) == ["retrain", "GA"]
    single = [bench.table(), bench.table(seed=2, scenario="random_0.9_split1")]
    values = [float(row["UA"]) for table in single for row in table if row["method"] == "GA"]
    assert float(rows[1]["UA"]) == pytest.approx(np.mean(values))
    assert float(rows[1]["UA_std"]) == pytest.approx(np.std(values, ddof=1))
    ensembles = table_of(summary / "ensembles.csv")
    assert [(row["method"], row["trainings"]) for row in ensembles] == [("GA", "2")]
    assert float(ensembles[0]["KLOM_forget"]) > 0 and (summary / "klom.png").is_file()
    assert "Over 2 trainings" in (summary / "report.html").read_text()
    assert "only 2 trainings" in capsys.readouterr().out


def test_infinite_margins_name_the_method_and_the_training():
    margins = {part: torch.zeros(1, 3) for part in (*PARTS, "control")}
    infinite = margins | {"test": torch.tensor([[0, torch.inf, 0]])}
    trained = [SimpleNamespace(training=Trainings(m, None)) for m in (margins, infinite)]
    seeds = [SimpleNamespace(models={"GA": each}) for each in trained]
    with pytest.raises(utils.UserError, match=r"GA.*2 of 2.*test"):
        main_evaluate.compare_trainings(seeds)


def test_seeds_of_other_splits_are_not_compared(bench, capsys):
    for name in ("retrain", "GA"):
        bench.save_logits(name, 20 + len(name), seed=2)
    bench.evaluate("--unlearn_name", "retrain", "GA", "--seeds", "1,2", "--alphas", "0.2")
    assert "--split_seed" in capsys.readouterr().out
    assert not list(bench.root.rglob("ensembles.csv"))


# ---------------------------------------------------------------- relearning


def relearned(job, num_steps, source="forget"):
    """The steps of relearning a job's model, and the positions of the measured images."""
    trained, measured = relearning.divide(job.split, 3, source)
    about = {"trained": trained, "num_steps": num_steps, "seed": 3, "source": source}
    return [step for step, _ in relearning.relearn(job.model, job.data, job.split, **about)]


def used(job):
    """The training images of each step."""
    return [indices for indices, seed in job.data.train.uses if seed is not None]


def test_relearning_divides_the_forget_set_at_random():
    split = small_job("finetune", forget=41).split
    trained, measured = relearning.divide(split, 3, "forget")
    assert len(trained) == 4 and len(measured) == 37
    assert sorted([*trained.tolist(), *split.forget[measured].tolist()]) == split.forget.tolist()
    assert set(trained.tolist()) != set(split.forget[:4].tolist())
    trained, measured = relearning.divide(split, 3, "retain")
    assert trained.equal(split.retain) and measured.tolist() == list(range(41))
    with pytest.raises(utils.UserError, match="--relearn"):
        relearning.divide(small_job("finetune", forget=1).split, 3, "forget")


@pytest.mark.parametrize(("num_steps", "stops"), [(1, [1]), (4, [1, 2, 4]), (11, [1, 2, 4, 8, 11])])
def test_relearning_stops_at_powers_of_two(num_steps, stops):
    job = small_job("finetune", forget=41)
    assert relearned(job, num_steps) == stops
    assert [len(indices) for indices in used(job)] == [4] * num_steps


def test_relearning_is_sgd_at_a_constant_rate_on_the_true_labels():
    job = small_job("finetune", forget=41)
    relearned(job, 6)
    net, train = ByHand(SmallNet()), job.data.train
    for indices in used(job):
        logits = net.logits(BRIGHTER * train.inputs[indices], training=True)
        loss = F.cross_entropy(logits, train.labels[indices])
        net.descend(net.gradients(loss), rate=0.001, momentum=0.9, weight_decay=5e-4)
    net.assert_equal(job.model.state_dict())


def test_relearning_curves_are_in_the_record_and_need_the_model_file(bench, capsys):
    for name in ("original", "GA"):
        bench.save(name, 3)
    arguments = ["--unlearn_name", "GA", "mine", "--alphas", "0.2", "--relearn", "2"]
    bench.save_logits("mine", 4)
    bench.evaluate(*arguments, "--relearn_on", "forget,retain", pictures=True)
    record = read_json(bench.folder() / "GA/results.json")["metrics"]
    for name in ("relearn", "relearn_retain"):
        assert record[name]["step"] == [0, 1, 2] and record[name]["alpha"] == 0.2
        assert all(0 <= value <= 1 for value in record[name]["accuracy"])
    assert record["relearn_retain"]["accuracy"][0] == pytest.approx(1 - record["UA"])
    assert "mine" in capsys.readouterr().out.split("--relearn needs the model file")[1]
    assert (bench.folder() / "relearn.png").is_file()
    # Both start from the saved weights.
    bench.evaluate(*arguments, "--relearn_on", "retain")
    again = read_json(bench.folder() / "GA/results.json")["metrics"]
    assert again["relearn_retain"] == record["relearn_retain"]
    assert again["relearn"] == record["relearn"]
