"""A mistake gives one line that names the flag or file, exit status 2, and no lost results."""

from types import SimpleNamespace

import pytest
from helpers import COMMON, QUIET, check, fails_in_one_line, run_in_process

import utils

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


# ---------------------------------------------------------------- flags

IMAGES_NOWHERE = ["--data_name", "image_folder", "--data_dir", "nowhere"]
VIT = ["main_original_model.py", *QUIET, "--model_name", "vit"]
FLAG_MISTAKES = [
    ([*ORIGINAL, "--num_classes", 12], ["--num_classes 12", "10 classes"]),
    ([*ORIGINAL, "--num_epochs", "many"], ["--num_epochs", "many"]),
    ([*ORIGINAL, "--unknown_flag", 1], ["--unknown_flag"]),
    ([*UNLEARN, "--label", "a/b"], ["--label", "a/b"]),
    (UNLEARN_ANY, ["--unlearn_name"]),
    ([*ORIGINAL, "--model_name", "resnet19"], ["--model_name resnet19"]),
    ([*ORIGINAL, "--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
    ([*ORIGINAL, *IMAGES_NOWHERE], ["nowhere"]),
    (VIT, ["--pretrained_path FILE", "--no_pretrained"]),
    ([*VIT, "--pretrained_path", "w.pth"], ["w.pth"]),
    ([*UNLEARN, "--unlearn_type", "class", "--forget_class", "ten"], ["--forget_class ten"]),
    ([*UNLEARN_ANY, "--unlearn_name", "forget"], ["--unlearn_name forget", "finetune"]),
    ([*UNLEARN, "--msteps", 3], ["--msteps", "scrub", "finetune"]),
    ([*UNLEARN_ANY, "--unlearn_name", "salun", "--mask_path", "no.pth"], ["no.pth"]),
    ([*UNLEARN_ANY, "--unlearn_name", "ssd", "--num_epochs", 3], ["--num_epochs", "ssd"]),
    ([*CPU[:-1], "GA"], ["--unlearn_name GA", "cpu_scrub"]),
    ([*UNLEARN, "--num_epochs", 1, "--seeds", "1,9"], ["seed9"]),
    ([*UNLEARN, "--runs_dir", "empty"], ["original_model.pth", "main_original_model.py"]),
    ([*CPU, "--alpha", "0"], ["--alpha", "0"]),
    ([*CPU, "--alpha", "0.005", "--num_epochs", 1], ["--alpha 0.005", "199", "100"]),
    ([*EVALUATE, "--cal_sizes", "900"], ["--cal_sizes 900"]),
    ([*EVALUATE, "--seed", 7], ["seed7"]),
    ([*EVALUATE, "--model_dir", "some/file.pth"], ["some/file.pth"]),
]


@pytest.mark.parametrize(("command", "words"), FLAG_MISTAKES)
def test_mistake_in_a_flag_is_reported_in_one_line_and_changes_nothing(command, words, trained):
    before = sorted(trained.folder.rglob("*"))
    fails_in_one_line(run_in_process(*command, cwd=trained.folder), *words)
    assert sorted(trained.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(KeyboardInterrupt(), 130, "results are kept"), (MemoryError(), 2, "error: out of memory")]
    + [(KeyboardInterrupt("--resume"), 130, "interrupted; --resume"), (SystemExit(3), 3, "")]
    + [(FileNotFoundError(2, "", "a.png"), 2, "a.png"), (BrokenPipeError(), 141, "")]
    + [(utils.UserError("cat\x1b[31m\né猫"), 2, r"error: cat\x1b[31m\né猫")],
)
def test_script_ends_with_a_status_and_at_most_one_line(error, status, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        utils.run_script(main)
    line = capsys.readouterr().err
    assert end.value.code == status and words in line and line.count("\n") == bool(words)


# ---------------------------------------------------------------- checkpoints


def test_truncated_model_or_model_of_another_width_is_named(trained, tmp_path):
    arguments = ["--width", 16, "--model_dir", trained.original]
    fails_in_one_line(run_in_process(*UNLEARN, *arguments, cwd=tmp_path), "--width 8", "16")
    path, content = tmp_path / "model.pth", trained.original.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails_in_one_line(run_in_process(*UNLEARN, "--model_dir", path, cwd=tmp_path), str(path))


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
