"""A mistake gives one line that names the flag or file, exit status 2, and no lost results.

The scripts run in this process. tests/scripts/test_error_messages.py starts interpreters.
"""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    QUIET,
    TINY,
    check,
    fails_in_one_line,
    read_json,
    run_in_process,
)

COMMON = [*TINY, *QUIET]
ORIGINAL = ["main_original_model.py", *COMMON]
UNLEARN_ANY = ["main_unlearn.py", *COMMON]
UNLEARN = [*UNLEARN_ANY, "--unlearn_name", "finetune"]
CPU = ["main_unlearn_cpu.py", *COMMON, "--unlearn_name", "finetune"]
EVALUATE = ["main_evaluate.py", *COMMON, "--unlearn_name", "all"]
RUN_FOLDER = "runs/resnet18w8_digits_seed1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an original, a Retrain and a fine-tuned model of one epoch.

    Tests do not change it.
    """
    folder = tmp_path_factory.mktemp("trained")
    check(run_in_process(*ORIGINAL, "--num_epochs", 1, cwd=folder))
    names = ["--unlearn_name", "retrain", "finetune"]
    check(run_in_process(*UNLEARN_ANY, *names, "--num_epochs", 1, cwd=folder))
    root = folder / RUN_FOLDER
    return SimpleNamespace(folder=folder, root=root, original=root / "original_model.pth")


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of ``trained`` that a test may change."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    root = tmp_path / RUN_FOLDER
    return SimpleNamespace(folder=tmp_path, root=root, original=root / "original_model.pth")


# ---------------------------------------------------------------- flags

IMAGES_NOWHERE = ["--data_name", "image_folder", "--data_dir", "nowhere"]
VIT = ["main_original_model.py", *QUIET, "--model_name", "vit"]
FLAG_MISTAKES = [
    ([*ORIGINAL, "--num_classes", 12], ["--num_classes 12", "10 classes"]),
    ([*ORIGINAL, "--learning_rate", "-1"], ["--learning_rate", "-1"]),
    ([*ORIGINAL, "--num_epochs", "many"], ["--num_epochs", "many"]),
    ([*ORIGINAL, "--unknown_flag", 1], ["--unknown_flag"]),
    ([*ORIGINAL, "--memory_gb", 1], ["--memory_gb"]),
    ([*UNLEARN, "--label", "a/b"], ["--label", "a/b"]),
    ([*ORIGINAL, "--model_name", "resnet19"], ["--model_name resnet19"]),
    ([*ORIGINAL, "--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
    ([*ORIGINAL, *IMAGES_NOWHERE], ["nowhere"]),
    (VIT, ["--pretrained_path FILE", "--no_pretrained"]),
    ([*VIT, "--pretrained_path", "w.pth"], ["w.pth"]),
    ([*UNLEARN, "--retain_ratio", "1.5"], ["--retain_ratio 1.5"]),
    ([*UNLEARN, "--retain_ratio", "0.9999"], ["0 of 797"]),
    ([*UNLEARN, "--unlearn_type", "list"], ["--forget_list"]),
    ([*UNLEARN, "--unlearn_type", "class", "--forget_class", "ten"], ["--forget_class ten"]),
    ([*UNLEARN, "--forget_class", "3"], ["--forget_class", "--unlearn_type class"]),
    ([*UNLEARN_ANY, "--unlearn_name", "forget"], ["--unlearn_name forget", "finetune"]),
    (
        [*UNLEARN_ANY, "--unlearn_name", "all", "--learning_rate", 0.1],
        ["--learning_rate"],
    ),
    ([*UNLEARN, "--unlearn_type", "subclass"], ["--unlearn_type subclass", "cifar20"]),
    ([*UNLEARN, "--msteps", 3], ["--msteps", "scrub", "finetune"]),
    ([*UNLEARN_ANY, "--unlearn_name", "salun", "--mask_path", "no.pth"], ["no.pth"]),
    ([*UNLEARN_ANY, "--unlearn_name", "ssd", "--num_epochs", 3], ["--num_epochs", "ssd"]),
    ([*CPU[:-1], "GA"], ["--unlearn_name GA", "cpu_scrub"]),
    ([*UNLEARN, "--seeds", "1,1"], ["--seeds", "1,1"]),
    ([*UNLEARN, "--num_epochs", 1, "--seeds", "1,9"], ["seed9"]),
    (
        [*UNLEARN, "--runs_dir", "empty"],
        ["original_model.pth", "main_original_model.py"],
    ),
    ([*CPU, "--alpha", "0"], ["--alpha", "0"]),
    ([*CPU, "--alpha", "0.005", "--num_epochs", 1], ["--alpha 0.005", "199", "100"]),
    ([*EVALUATE, "--alphas", "0.05,1"], ["--alphas", "1"]),
    ([*EVALUATE, "--cal_sizes", "900"], ["--cal_sizes 900"]),
    ([*EVALUATE, "--score", "thr,lac"], ["--score", "lac"]),
    ([*EVALUATE, "--resplits", "0"], ["--resplits", "0"]),
    ([*EVALUATE, "--seed", 7], ["seed7"]),
    ([*EVALUATE, "--alpha", "0.05"], ["--alpha"]),
    ([*EVALUATE, "--model_dir", "some/file.pth"], ["--model_dir"]),
]


@pytest.mark.parametrize(("command", "words"), FLAG_MISTAKES)
def test_mistake_in_a_flag_is_reported_in_one_line_and_changes_nothing(command, words, trained):
    before = sorted(trained.folder.rglob("*"))
    fails_in_one_line(run_in_process(*command, cwd=trained.folder), *words)
    assert sorted(trained.folder.rglob("*")) == before


def test_mistake_in_a_forget_list_names_both_lines(trained, tmp_path):
    (tmp_path / "twice.txt").write_text("4\n5\n4\n")
    chosen = ["--unlearn_type", "list", "--forget_list", tmp_path / "twice.txt"]
    done = run_in_process(*UNLEARN, *chosen, cwd=trained.folder)
    fails_in_one_line(done, "twice.txt", "line 3", "line 1")


@pytest.mark.parametrize("script", ["original_model", "unlearn", "unlearn_cpu", "evaluate"])
def test_help_shows_groups_and_defaults(script, tmp_path):
    done = check(run_in_process(f"main_{script}.py", "--help", cwd=tmp_path))
    text = " ".join(done.stdout.split())
    assert all(group in text for group in ("model:", "data:"))
    assert all(f"(default: {default})" in text for default in ("digits", "64"))
    if script.startswith("unlearn"):
        assert "finetune epochs: 20" in text and "(default: 0.9)" in text


# ---------------------------------------------------------------- checkpoints


class Trap:
    """Unpickling an object of this class creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def truncated(source, target):
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])


def pickle_in_archive(source, target):
    torch.save({"model": {"a": Trap()}, "meta": {}}, target)


@pytest.mark.parametrize("damage", [truncated, pickle_in_archive])
def test_damaged_or_foreign_checkpoint_is_refused_and_runs_no_code(damage, trained, tmp_path):
    path = tmp_path / "model.pth"
    damage(trained.original, path)
    done = run_in_process(*UNLEARN, "--model_dir", path, "--runs_dir", "new", cwd=tmp_path)
    fails_in_one_line(done, str(path))
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "new").exists()


def test_model_of_another_width_is_named(trained, tmp_path):
    arguments = ["--width", 16, "--model_dir", trained.original]
    fails_in_one_line(run_in_process(*UNLEARN, *arguments, cwd=tmp_path), "--width 8", "16")


def test_model_of_another_forget_set_is_not_scored(trained, tmp_path):
    path = trained.root / "random_0.9/retrain/unlearning_model.pth"
    forget_set = read_json(path.with_name("results.json"))["forget_set"]
    arguments = ["--unlearn_name", "retrain", "--model_dir", path, "--retain_ratio", 0.5]
    done = run_in_process("main_evaluate.py", *COMMON, *arguments, cwd=tmp_path)
    fails_in_one_line(done, str(path), forget_set)


def test_models_of_two_originals_are_not_compared(copy):
    other = ["--num_epochs", 1, "--learning_rate", 0.02, "--overwrite"]
    check(run_in_process(*ORIGINAL, *other, cwd=copy.folder))
    fails_in_one_line(run_in_process(*EVALUATE, cwd=copy.folder), "--overwrite")


def test_unlearned_model_is_not_a_mask(trained, tmp_path):
    path = trained.root / "random_0.9/finetune/unlearning_model.pth"
    arguments = ["--unlearn_name", "salun", "--mask_path", path, "--runs_dir", tmp_path / "runs"]
    done = run_in_process(*UNLEARN_ANY, *arguments, "--model_dir", trained.original, cwd=tmp_path)
    fails_in_one_line(done, "--mask_path")


# ---------------------------------------------------------------- earlier results


def test_result_with_other_settings_is_not_overwritten(trained):
    path = trained.root / "random_0.9/finetune/unlearning_model.pth"
    before = path.read_bytes(), trained.original.read_bytes()
    for command in (UNLEARN, ORIGINAL):
        done = run_in_process(*command, "--num_epochs", 2, cwd=trained.folder)
        fails_in_one_line(done, "num_epochs", "1", "2", "--overwrite")
    assert (path.read_bytes(), trained.original.read_bytes()) == before


def test_diverging_run_leaves_earlier_files(trained):
    folder = trained.root / "random_0.9/finetune"
    before = {path: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    arguments = ["--learning_rate", "1e9", "--num_epochs", 1, "--overwrite"]
    done = run_in_process(*UNLEARN, *arguments, cwd=trained.folder)
    fails_in_one_line(done, "finetune", "1e+09")
    assert {path: path.read_bytes() for path in before} == before


def test_read_only_folder_is_named(tmp_path):
    """Root can write everywhere except to /proc. A folder's mode keeps other users out."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    where = "/proc/runs" if os.access(closed, os.W_OK) else closed / "runs"
    done = run_in_process(*ORIGINAL, "--runs_dir", where, cwd=tmp_path)
    fails_in_one_line(done, str(where))
