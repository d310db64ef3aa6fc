"""Complete runs of main_original_model.py, main_unlearn.py and main_unlearn_cpu.py on digits."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import COMMON, check, flags, read_json, read_weights, run_in_process, same_weights

import utils
from models import checkpoint
from models.resnet import ResNet18

RUN_FOLDER = "runs/resnet18w8_digits_seed1"


def unlearn(folder, *arguments):
    return run_in_process("main_unlearn.py", *COMMON, *arguments, cwd=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with originals of seeds 1 and 2 and a fine-tuned model of seed 1, one epoch each."""
    folder = tmp_path_factory.mktemp("runs")
    original = ["main_original_model.py", *COMMON, "--num_epochs", 1, "--seeds", "1,2"]
    check(run_in_process(*original, cwd=folder))
    done = check(unlearn(folder, "--unlearn_name", "finetune", "GA", "--num_epochs", 1))
    root = folder / RUN_FOLDER
    return SimpleNamespace(
        folder=folder, root=root, output=done.stdout, finetune=root / "random_0.9/finetune"
    )


@pytest.fixture
def original(trained, tmp_path):
    """A folder with a copy of the original model of seed 1."""
    (tmp_path / RUN_FOLDER).mkdir(parents=True)
    for name in ("original_model.pth", "original_model.json"):
        shutil.copy(trained.root / name, tmp_path / RUN_FOLDER)
    return tmp_path


def accuracy(path, images, indices):
    """The accuracy of a saved model in evaluation mode."""
    model = ResNet18(10, 8).eval()
    model.load_state_dict(read_weights(path))
    (inputs,) = images.batches([indices])
    with torch.no_grad():
        return (model(inputs).argmax(1) == images.labels[indices]).float().mean().item()


def test_finished_run_leaves_model_history_and_accuracies_of_that_model(trained, digits):
    record = read_json(trained.finetune / "results.json")
    split = utils.make_split(digits, utils.scenario_of(flags()))
    path = trained.finetune / "unlearning_model.pth"
    for name, images, indices in (
        ("retain", digits.train, split.retain),
        ("forget", digits.train, split.forget),
        ("test", digits.held_out, split.test),
    ):
        assert record["accuracies"][name] == pytest.approx(accuracy(path, images, indices))
    assert record["method"] == "finetune" and record["forget_set"] == split.fingerprint
    assert record["seconds"] > 0 and record["recipe"]["num_epochs"] == 1
    original, _ = checkpoint.read(trained.root / "original_model.pth")
    assert record["identity"]["original"] == checkpoint.weights_hash(original)
    lines = (trained.finetune / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]
    assert not (trained.finetune / ".unfinished").exists()


def test_original_is_trained_on_all_images_and_differs_between_seeds(trained, digits):
    record = read_json(trained.root / "original_model.json")
    path = trained.root / "original_model.pth"
    everything = torch.arange(len(digits.train))
    assert record["accuracies"]["retain"] == pytest.approx(accuracy(path, digits.train, everything))
    other = trained.folder / "runs/resnet18w8_digits_seed2/original_model.pth"
    assert not same_weights(path, other)


def test_printed_table_has_a_row_for_every_method(trained):
    record = read_json(trained.finetune / "results.json")
    finetune, ascent = (line.split() for line in trained.output.splitlines()[-2:])
    accuracies = [f"{100 * record['accuracies'][key]:.1f}" for key in ("retain", "forget", "test")]
    assert finetune[0] == "finetune" and finetune[3:6] == accuracies and ascent[0] == "GA"


def test_finished_run_is_not_repeated(trained):
    path = trained.finetune / "unlearning_model.pth"
    before = path.stat().st_mtime_ns
    done = check(unlearn(trained.folder, "--unlearn_name", "finetune", "--num_epochs", 1))
    assert "already done" in done.stdout and "epoch 1/" not in done.stdout
    assert done.stdout.splitlines()[-1].split()[0] == "finetune"
    assert path.stat().st_mtime_ns == before


def test_several_seeds_share_one_row_of_means(trained):
    seeds = ["--unlearn_name", "GA", "--num_epochs", 1, "--seeds", "1,2"]
    done = check(unlearn(trained.folder, *seeds))
    paths = trained.folder.glob("runs/*_seed[12]/random_0.9/GA/results.json")
    accuracies = [read_json(path)["accuracies"]["test"] for path in paths]
    row = done.stdout.splitlines()[-1]
    assert len(accuracies) == 2 and row.split()[0] == "GA"
    assert f"{50 * sum(accuracies):.1f}±" in row


def test_failed_method_is_a_row_and_the_other_methods_still_run(original, monkeypatch):
    """Retrain starts from new weights, which are NaN here."""
    fill = lambda tensor, *_, **__: tensor.data.fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr("torch.nn.init.kaiming_normal_", fill)
    done = unlearn(original, "--unlearn_name", "retrain", "finetune", "--num_epochs", 1)
    root = original / RUN_FOLDER / "random_0.9"
    assert done.returncode == 2 and (root / "finetune/unlearning_model.pth").exists()
    assert not (root / "retrain/unlearning_model.pth").exists()
    rows = [line.split()[0] for line in done.stdout.splitlines()[-2:]]
    assert rows == ["retrain", "finetune"]
