"""Terminals without Unicode, closed pipes and Ctrl-C at any moment."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, run_script, succeed

QUIET = ["--wandb_mode", "disabled"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_the_terminal_cannot_show_is_replaced(encoding, pipeline, tmp_path):
    environment = {"PYTHONIOENCODING": encoding}
    model = ["--model_dir", pipeline.root / "original_model.pth"]
    command = [*TINY, *QUIET, "--unlearn_name", "finetune", "--num_epochs", 1, "--runs_dir", tmp_path / "runs", *model]
    done = run_script("main_unlearn_cpu.py", *command, cwd=tmp_path, env=environment | {"PYTHONUTF8": "0"})
    assert done.returncode == 0 and "epoch 1/1" in done.stdout, done.stderr
    if encoding == "ascii":
        succeed("main_unlearn_cpu.py", "--help", cwd=tmp_path, env=environment)
        done = succeed(
            "main_evaluate.py", *TINY, *QUIET, "--unlearn_name", "cpu_finetune", "--resplits", 2, "--no_pictures",
            cwd=pipeline.folder, env=environment,
        )  # fmt: skip
        assert "?" in done.stdout and "cpu_finetune" in done.stdout


def start(script, *arguments, cwd, **options):
    environment = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_closed_pipe_ends_help_without_a_traceback(tmp_path):
    process = start("main_unlearn.py", "--help", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) in (0, 141)  # argparse ignores the error


def test_a_closed_pipe_ends_a_training_that_can_be_resumed(tmp_path):
    command = ["main_original_model.py", *TINY, "--num_epochs", 500]
    process = start(*command, cwd=tmp_path)
    while "epoch 2/500" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read().splitlines()
    errors = [line for line in errors if not line.startswith("original:")]  # the progress bar
    assert process.wait(60) == 130
    assert "Traceback" not in "".join(errors) and "pipe was closed" in errors[-1] and "--resume" in errors[-1]
    assert next(tmp_path.rglob("resume.pth")).stat().st_size > 100_000


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c_while_a_script_starts_prints_no_traceback(seconds, tmp_path):
    process = start("main_evaluate.py", *TINY, "--unlearn_name", "all", cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130, 2)  # 2: it had ended before, since there is no model
    assert len(errors.splitlines()) <= 1, errors
