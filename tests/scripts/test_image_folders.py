"""Scripts on image folders: decoded once, with the same weights each time; errors are one line."""

import os

import pytest
from faults import worker_dies
from helpers import (
    QUIET,
    TINY,
    check,
    fails_in_one_line,
    run_forked,
    run_in_process,
    same_weights,
    write_pictures,
)

import main_original_model  # noqa: F401 - forks start faster when everything is imported

ORIGINAL = ["main_original_model.py", *TINY, *QUIET, "--data_name", "image_folder"]
ORIGINAL += ["--data_dir", "pictures", "--num_epochs", 1]
MODEL = "runs/resnet18w8_image_folder-pictures_seed1/original_model.pth"


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures", 90, 60)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_array_and_any_number_of_workers_give_same_weights(workers, folder):
    check(run_in_process(*ORIGINAL, "--workers", workers, cwd=folder))
    (array,) = (folder / "pictures/.decoded").glob("*.npy")
    decoded_at = array.stat().st_mtime_ns
    first = (folder / MODEL).rename(folder / "first.pth")
    check(run_in_process(*ORIGINAL, "--overwrite", cwd=folder))
    assert same_weights(folder / MODEL, first) and array.stat().st_mtime_ns == decoded_at


def test_unreadable_image_is_named_in_one_line(folder):
    (folder / "pictures/test/ant/0004.png").write_text("not a picture")
    fails_in_one_line(run_in_process(*ORIGINAL, cwd=folder), "test/ant/0004.png")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers inherit the fault")
def test_dead_worker_is_reported_in_one_line(folder):
    """The kernel kills a worker when memory runs out."""
    command = [*ORIGINAL, "--image_size", 8, "--workers", 2]
    done = run_forked(*command, cwd=folder, before=worker_dies.install)
    fails_in_one_line(done, "--workers")
