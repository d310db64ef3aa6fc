"""Terminals without Unicode, closed pipes, and Ctrl-C while a script starts."""

import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import QUIET, TINY, check, run_forked, start_script, succeed

import main_evaluate  # noqa: F401 - forks start faster when everything is imported
import main_unlearn_cpu  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
ORIGINAL = ["main_original_model.py", *TINY, *QUIET]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_terminal_cannot_show_are_replaced(encoding, tmp_path):
    def run(script, *arguments):
        command = [script, *TINY, *QUIET, *arguments]
        return check(run_forked(*command, cwd=tmp_path, encoding=encoding)).stdout

    assert "epoch 1/1" in run("main_original_model.py", "--num_epochs", 1)
    finetune = ["--unlearn_name", "finetune", "--num_epochs", 1]
    assert "epoch 1/1" in run("main_unlearn_cpu.py", *finetune)
    arguments = ["--unlearn_name", "cpu_finetune", "--resplits", 2, "--alphas", 0.001]
    output = run("main_evaluate.py", *arguments, "--no_pictures")
    assert "?" in output and "cpu_finetune" in output  # q̂


def test_help_is_shown_on_a_terminal_without_unicode(tmp_path):
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = succeed("main_unlearn_cpu.py", "--help", cwd=tmp_path, env=environment)
    assert "--lamda" in done.stdout and "?" in done.stdout


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
    assert process.wait(60) == 130
    assert "Traceback" not in errors and "--resume" in errors.splitlines()[-1]
    assert next(tmp_path.rglob("resume.pth")).stat().st_size > 100_000


@pytest.mark.parametrize("library", ["numpy", "libtorch_cpu", "sklearn"])
def test_ctrl_c_while_a_script_imports_prints_no_traceback(library, tmp_path):
    """The script is in the middle of its imports when it has mapped the library."""
    interruptible = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    command = ["main_evaluate.py", *TINY, *QUIET, "--unlearn_name", "all"]
    process = start_script(*command, cwd=tmp_path, preexec_fn=interruptible)
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    # Status 2: the script had already ended, because there is no model.
    assert process.returncode in (-signal.SIGINT, 130, 2)
    assert len(errors.splitlines()) <= 1, errors
