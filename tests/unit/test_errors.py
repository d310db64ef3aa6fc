"""A user's mistake is one line that names the flag or file, status 2, and nothing lost."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import TINY, fails_in_one_line, read_json, run_script, succeed
from PIL import Image

UNLEARN = ["main_unlearn.py", *TINY, "--unlearn_name", "finetune"]
CPU = ["main_unlearn_cpu.py", *TINY, "--unlearn_name", "finetune"]
EVALUATE = ["main_evaluate.py", *TINY, "--unlearn_name", "all"]
ORIGINAL = ["main_original_model.py", *TINY]


FLAG_MISTAKES = [
    ([*ORIGINAL, "--num_classes", 12], ["--num_classes 12", "10 classes"]),
    ([*ORIGINAL, "--learning_rate", "-1"], ["--learning_rate", "above 0"]),
    ([*ORIGINAL, "--num_epochs", "many"], ["--num_epochs", "many"]),
    ([*ORIGINAL, "--unknown_flag", 1], ["--unknown_flag"]),
    ([*ORIGINAL, "--model_name", "resnet19"], ["--model_name resnet19"]),
    ([*ORIGINAL, "--device", "cuda:0"], ["--device cuda:0", "--device cpu"]),
    ([*ORIGINAL, "--data_name", "image_folder", "--data_dir", "nowhere"], ["--data_dir nowhere", "train/"]),
    ([*ORIGINAL, "--data_name", "cifar10", "--data_dir", "nowhere"], ["cifar-10-python.tar.gz", "nowhere"]),
    ([*ORIGINAL, "--runs_dir", "/proc/none"], ["/proc/none", "cannot hold"]),
    (["main_original_model.py", "--model_name", "vit"], ["--pretrained_path FILE", "--no_pretrained"]),
    (["main_original_model.py", "--model_name", "vit", "--pretrained_path", "w.pth"], ["w.pth: no such file"]),
    ([*UNLEARN, "--retain_ratio", "1.5"], ["--retain_ratio 1.5"]),
    ([*UNLEARN, "--retain_ratio", "0.9999"], ["0 of 797"]),
    ([*UNLEARN, "--unlearn_type", "list"], ["--forget_list FILE"]),
    ([*UNLEARN, "--unlearn_type", "class", "--forget_class", "ten"], ["--forget_class ten"]),
    ([*UNLEARN, "--forget_class", "3"], ["--forget_class", "--unlearn_type class"]),
    (["main_unlearn.py", *TINY, "--unlearn_name", "forget"], ["--unlearn_name forget", "finetune"]),
    (["main_unlearn.py", *TINY, "--unlearn_name", "all", "--learning_rate", 0.1], ["--learning_rate", "several"]),
    ([*UNLEARN, "--unlearn_type", "subclass"], ["--unlearn_type subclass", "cifar20"]),
    ([*UNLEARN, "--msteps", 3], ["--msteps", "scrub", "finetune"]),
    (["main_unlearn.py", *TINY, "--unlearn_name", "salun", "--mask_path", "no.pth"], ["no.pth: no such file"]),
    (["main_unlearn.py", *TINY, "--unlearn_name", "ssd", "--num_epochs", 3], ["--num_epochs", "ssd is not trained"]),
    (["main_unlearn_cpu.py", *TINY, "--unlearn_name", "GA"], ["--unlearn_name GA", "cpu_scrub"]),
    ([*UNLEARN, "--seeds", "1,1"], ["--seeds", "twice"]),
    ([*UNLEARN, "--num_epochs", 3, "--seeds", "1,9"], ["seed9", "no such file"]),
    ([*UNLEARN, "--runs_dir", "empty"], ["original_model.pth: no such file", "main_original_model.py"]),
    ([*CPU, "--alpha", "0"], ["--alpha", "above 0"]),
    ([*CPU, "--alpha", "0.005", "--num_epochs", 1], ["--alpha 0.005", "199", "100"]),
    ([*EVALUATE, "--alphas", "0.05,1"], ["--alphas", "below 1"]),
    ([*EVALUATE, "--cal_sizes", "900"], ["--cal_sizes 900", "899"]),
    ([*EVALUATE, "--score", "thr,lac"], ["--score", "'lac'", "saps"]),
    ([*EVALUATE, "--resplits", "0"], ["--resplits", "at least 1"]),
    ([*EVALUATE, "--relearn_rate", "0"], ["--relearn_rate", "above 0"]),
    ([*EVALUATE, "--seed", 7], ["no method"]),
    ([*EVALUATE, "--alpha", "0.05"], ["--alpha"]),
    ([*EVALUATE, "--model_dir", "some/file.pth"], ["one file"]),
]


@pytest.fixture(scope="module")
def refused(pipeline):
    """All commands of FLAG_MISTAKES, two at a time: most of their time is spent importing torch."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda mistake: run_script(*mistake[0], cwd=pipeline.folder), FLAG_MISTAKES))


@pytest.mark.parametrize("number", range(len(FLAG_MISTAKES)))
def test_mistakes_in_flags(number, refused):
    fails_in_one_line(refused[number], *FLAG_MISTAKES[number][1])


def test_a_mistake_in_a_forget_list_names_the_lines(pipeline):
    (pipeline.folder / "twice.txt").write_text("4\n5\n4\n")
    done = run_script(*UNLEARN, "--unlearn_type", "list", "--forget_list", "twice.txt", cwd=pipeline.folder)
    fails_in_one_line(done, "twice.txt, line 3", "line 1")


class Trap:
    """Unpickling this would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def truncate(source, target):
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])


def other_classes(source, target):
    state = torch.load(source, weights_only=True)["model"]
    state["fc.weight"], state["fc.bias"] = torch.zeros(7, 64), torch.zeros(7)
    torch.save(state, target)


def other_network(source, target):
    torch.save(torch.nn.Linear(3, 3).state_dict(), target)


def not_finite(source, target):
    state = torch.load(source, weights_only=True)["model"]
    state["fc.bias"][0] = float("nan")
    torch.save(state, target)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["truncated"]),
        (lambda source, target: target.write_bytes(b""), ["not a checkpoint"]),
        (lambda source, target: target.write_text("hello"), ["not a checkpoint"]),
        (lambda source, target: target.write_bytes(pickle.dumps({"model": Trap()})), ["not a checkpoint"]),
        (lambda source, target: torch.save({"model": {"a": Trap()}, "meta": {}}, target), ["not a checkpoint"]),
        (lambda source, target: torch.save({"model": {"a": 1}, "meta": {}}, target), ["no state_dict"]),
        (other_classes, ["fc.weight", "(7, 64)", "(10, 64)"]),
        (other_network, ["another architecture"]),
        (not_finite, ["not finite"]),
    ],
)
def test_damaged_and_foreign_checkpoints(damage, words, pipeline, tmp_path):
    path = tmp_path / "model.pth"
    damage(pipeline.root / "original_model.pth", path)
    fails_in_one_line(run_script(*UNLEARN, "--model_dir", path, "--runs_dir", "new", cwd=tmp_path), str(path), *words)
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "new").exists()


def test_a_model_of_another_width_is_named(pipeline, tmp_path):
    path = pipeline.root / "original_model.pth"
    done = run_script(*UNLEARN, "--width", 16, "--model_dir", path, cwd=tmp_path)
    fails_in_one_line(done, "--width 8", "16")


def test_a_model_of_another_forget_set_is_not_scored(pipeline, tmp_path):
    path = pipeline.root / "random_0.9/retrain/unlearning_model.pth"
    arguments = ["main_evaluate.py", *TINY, "--unlearn_name", "retrain", "--model_dir", path, "--retain_ratio", 0.5]
    fails_in_one_line(run_script(*arguments, cwd=tmp_path), "another forget set", "56d878fd8c3a6704")


def test_another_run_in_the_same_folder_is_not_overwritten(pipeline):
    path = pipeline.root / "random_0.9/finetune/unlearning_model.pth"
    before = path.read_bytes()
    fails_in_one_line(run_script(*UNLEARN, "--num_epochs", 2, cwd=pipeline.folder), "num_epochs 3", "--overwrite")
    original = run_script(*ORIGINAL, "--num_epochs", 2, cwd=pipeline.folder)
    fails_in_one_line(original, "num_epochs 6", "--overwrite")
    assert path.read_bytes() == before


def test_a_diverging_run_leaves_the_last_good_files(pipeline):
    folder = pipeline.root / "random_0.9/finetune"
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    arguments = ["--learning_rate", "1e9", "--overwrite", "--wandb_mode", "disabled"]
    fails_in_one_line(
        run_script(*UNLEARN, *arguments, cwd=pipeline.folder),
        "finetune diverged in epoch 1", "learning rate 1e+09", "nan",
    )  # fmt: skip
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_a_full_disk_is_found_before_training(tmp_path):
    """A limit on the size of a file is the disk that a test can fill."""
    path = tmp_path / "limit"
    path.mkdir()
    (path / "sitecustomize.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
    )
    done = run_script(*ORIGINAL, "--wandb_mode", "disabled", cwd=tmp_path, python_path=path)
    fails_in_one_line(done, "cannot hold 3 MB", "runs/resnet18w8_digits_seed1")
    assert "epoch" not in done.stdout and not list(tmp_path.rglob("*.p*th"))


def test_models_of_two_originals_are_not_compared(tmp_path):
    common = [*TINY, "--wandb_mode", "disabled"]
    succeed(*ORIGINAL, *common, "--num_epochs", 1, cwd=tmp_path)
    succeed(*UNLEARN, *common, "--num_epochs", 1, cwd=tmp_path)
    succeed(*ORIGINAL, *common, "--num_epochs", 2, "--overwrite", cwd=tmp_path)
    fails_in_one_line(run_script(*EVALUATE, cwd=tmp_path), "not from one original", "--overwrite")


def picture(path, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(path)


def test_a_mistake_in_an_image_folder_names_what_to_do(tmp_path):
    for part in ("train", "val"):
        picture(tmp_path / "pictures" / part / "ant/1.png")
    done = run_script(*ORIGINAL, "--data_name", "image_folder", "--data_dir", "pictures", cwd=tmp_path)
    fails_in_one_line(done, "--data_dir pictures", "found val/: rename it to test/")


def test_training_images_that_changed_are_noticed(tmp_path):
    command = ["--data_name", "image_folder", "--data_dir", "pictures", "--wandb_mode", "disabled"]
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            for index in range(20):
                picture(tmp_path / f"pictures/{part}/{name}/{index}.png")
    succeed(*ORIGINAL, *command, "--num_epochs", 1, cwd=tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures/train/ant/3.png")
    done = run_script(*ORIGINAL, *command, "--num_epochs", 1, cwd=tmp_path)
    fails_in_one_line(done, "training_images", "--overwrite")
    fails_in_one_line(run_script(*UNLEARN, *command, cwd=tmp_path), "training images of other content")
    assert read_json(next(tmp_path.glob("runs/*/original_model.json")))["num_classes"] == 2
