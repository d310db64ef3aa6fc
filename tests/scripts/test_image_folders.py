"""Images beyond --memory_gb stay on disk, with the same results; images that cannot be read are
named or left out.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from faults import worker_dies
from helpers import (
    QUIET,
    TINY,
    check,
    fails_in_one_line,
    flags,
    read_json,
    run_forked,
    run_in_process,
    run_script,
    same_weights,
    succeed,
    write_pictures,
)

import utils

COMMON = ["--data_name", "image_folder", *QUIET]
ORIGINAL = ["main_original_model.py", *COMMON]
FOLDER = "resnet18w8_image_folder-pictures_seed1"
TIMES = {
    "seconds",
    "images_per_second",
    "date",
    "original_seconds",
    "RTE",
    "time_ratio",
    "peak_memory",
    "memory_ratio",
    "minus_retrain",
    "flags",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pictures"
    write_pictures(root, 90, 60)
    return root


def run_all(pictures, where, *more):
    """Original, fine-tuning and evaluation in the folder ``where``."""
    common = [*TINY, *COMMON, "--data_dir", pictures, *more]
    finetune = ["--unlearn_name", "finetune"]

    def run(script, *arguments):
        return check(run_in_process(script, *common, *arguments, cwd=where))

    run("main_original_model.py", "--num_epochs", 2)
    run("main_unlearn.py", *finetune, "--num_epochs", 2)
    done = run("main_evaluate.py", *finetune, "--resplits", 2, "--alphas", 0.2)
    folder = where / "runs" / FOLDER / "random_0.9/finetune"
    results = without_times(read_json(folder / "results.json"))
    return SimpleNamespace(
        model=folder / "unlearning_model.pth", results=results, output=done.stdout
    )


def without_times(record):
    """A record without times, peak memory, dates and the flags themselves."""
    if isinstance(record, dict):
        return {key: without_times(value) for key, value in record.items() if key not in TIMES}
    return [without_times(item) for item in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def in_memory(pictures, tmp_path_factory):
    return run_all(pictures, tmp_path_factory.mktemp("memory"))


def test_second_run_gives_same_weights_and_results(pictures, in_memory, tmp_path):
    again = run_all(pictures, tmp_path)
    assert same_weights(again.model, in_memory.model)
    assert again.results == in_memory.results and len(json.dumps(again.results)) > 2000


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_on_disk_give_same_results_with_any_number_of_workers(
    workers, pictures, in_memory, tmp_path
):
    on_disk = run_all(pictures, tmp_path, "--memory_gb", 0, "--workers", workers)
    assert same_weights(on_disk.model, in_memory.model)
    assert on_disk.results == in_memory.results


def test_images_beyond_memory_are_read_from_disk(tmp_path):
    """350 MB of pixels (160×160 from small files), and 300 MB of memory.

    The script has a process of its own, as a fork could use what its parent has freed. One arena
    of malloc, as each takes 64 MB of addresses.
    """
    write_pictures(tmp_path / "pictures", 40, 4500)
    network = ["--model_name", "test_vit.r160_in1k", "--no_pretrained", "--image_size", 160]
    command = [*ORIGINAL, "--data_dir", "pictures", "--device", "cpu", *network]
    command += ["--num_epochs", 1, "--batch_size", 16, "--workers", 2]
    little = {"cwd": tmp_path, "fault": ["little_memory"], "env": {"MALLOC_ARENA_MAX": "1"}}
    fails_in_one_line(run_script(*command, **little), "--memory_gb")
    done = succeed(*command, "--memory_gb", 0.1, **little)
    assert "0.35 GB" in done.stdout and "--memory_gb 0.1" in done.stdout


@pytest.fixture
def damaged(pictures, tmp_path):
    """A truncated training image, and a held-out image that is text."""
    shutil.copytree(pictures, tmp_path / "pictures")
    path = tmp_path / "pictures/train/bee/0041.png"
    path.write_bytes(path.read_bytes()[:120])
    (tmp_path / "pictures/test/ant/0004.png").write_text("not a picture")
    return tmp_path


IN_MEMORY, ON_DISK = [], ["--image_size", 8, "--memory_gb", 0]


@pytest.mark.parametrize("more", [IN_MEMORY, ON_DISK], ids=["in memory", "on disk"])
def test_unreadable_image_is_named_or_skipped(more, damaged):
    command = [*ORIGINAL, *TINY, "--data_dir", "pictures", "--num_epochs", 1, *more]
    fails_in_one_line(run_in_process(*command, cwd=damaged), ".png: ", "--skip_corrupt")
    done = check(run_in_process(*command, "--skip_corrupt", cwd=damaged))
    (line,) = (line for line in done.stdout.splitlines() if "2 unreadable images" in line)
    assert "bee/0041.png" in line and "ant/0004.png" in line
    assert "89 images" in done.stdout


def test_folder_without_a_readable_image_is_reported_in_one_line(damaged):
    for path in (damaged / "pictures/test").rglob("*.png"):
        path.write_text("nothing")
    command = [*ORIGINAL, *TINY, "--data_dir", "pictures", "--skip_corrupt"]
    fails_in_one_line(run_in_process(*command, cwd=damaged), "none of 60 images")


@pytest.mark.parametrize("more", [[], ["--skip_corrupt"]])
def test_dead_worker_is_reported_in_one_line(more, pictures, tmp_path):
    """The kernel kills a worker when memory runs out."""
    command = [*ORIGINAL, *TINY, "--data_dir", pictures, "--memory_gb", 0, "--num_epochs", 1]
    done = run_forked(*command, *more, cwd=tmp_path, before=worker_dies.install)
    fails_in_one_line(done, "--workers")


def test_image_on_disk_equals_image_in_memory(pictures):
    in_memory, on_disk = (
        utils.load_data(
            flags(data_name="image_folder", data_dir=str(pictures), memory_gb=size),
            torch.device("cpu"),
        )
        for size in (8, 0)
    )
    assert in_memory.fingerprint == on_disk.fingerprint
    assert on_disk.train.pixels[7].equal(in_memory.train.pixels[7])
    state = torch.get_rng_state()
    chosen = torch.tensor([3, 1])
    assert on_disk.train.batch(chosen).equal(in_memory.train.batch(chosen))
    assert torch.get_rng_state().equal(state)  # dropout draws from it
