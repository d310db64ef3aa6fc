"""Closed output pipes."""

import sys

import pytest
from helpers import QUIET, TINY, start_script

import main_evaluate  # noqa: F401 - forks start faster when everything is imported
import main_unlearn_cpu  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
ORIGINAL = ["main_original_model.py", *TINY, *QUIET]


def test_closed_pipe_ends_help_without_a_traceback(tmp_path):
    process = start_script("main_unlearn.py", "--help", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(120) in (0, 141)  # argparse ignores the error


def test_closed_pipe_ends_a_training_that_can_be_resumed(tmp_path):
    process = start_script(*ORIGINAL, "--num_epochs", 500, cwd=tmp_path)
    while "epoch 2/500" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 141 and errors == ""
    assert next(tmp_path.rglob("resume.pth")).stat().st_size > 100_000
