"""--jobs and --dry_run: several runs in parallel, with the results of one process."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import (
    QUIET,
    ROOT,
    TINY,
    check,
    run_in_process,
    run_script,
    same_weights,
    script_command,
    script_environment,
)

import utils
from models.errors import UserError

ORIGINAL = ["main_original_model.py", *TINY, *QUIET]
ECHO = "import os, sys; print(os.environ.get({!r})); print('end', file=sys.stderr)"


def echo(variable):
    """A command that prints an environment variable on stdout and "end" on stderr."""
    return [sys.executable, "-c", ECHO.format(variable)]


def test_output_has_titles_and_statuses_have_the_order_of_the_commands(capfd, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    fail = [sys.executable, "-c", "import time, sys; time.sleep(0.2); sys.exit(3)"]
    die = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    commands = [fail, echo("WANDB_RUN_ID"), die, echo("OMP_NUM_THREADS")]
    assert utils.run_commands(commands, 2, ["a", "b", "c", "d"]) == [3, 0, -9, 0]
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["b: None", "b: end", "d: 1", "d: end"]


def test_runs_in_parallel_take_the_gpus_in_turn(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    wait = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1)"
    assert utils.run_commands([[sys.executable, "-c", wait]] * 2, 2) == [0, 0]
    assert sorted(capfd.readouterr().out.split()) == ["4", "6"]


def test_interruption_reaches_all_commands_and_starts_no_other(tmp_path):
    wait = f"""
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path)!r}, "begun" + sys.argv[1]).touch()
time.sleep(20)
"""
    commands = [[sys.executable, "-c", wait, name] for name in "abc"]

    def interrupt():
        while len(list(tmp_path.glob("begun*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        utils.run_commands(commands, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "beguna", "begunb"}


def test_jobs_under_torchrun_are_refused(monkeypatch):
    monkeypatch.setattr("models.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="--jobs"):
        utils.run_commands([echo("HOME")], 2)


def test_dry_run_prints_commands_that_give_the_results_of_jobs(tmp_path):
    """The script is named by a relative path, as in a notebook's %run."""
    seeds = [*ORIGINAL, "--num_epochs", 2, "--seeds", "1,2"]
    done = check(run_in_process(*seeds, "--dry_run", cwd=tmp_path))
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 2 and not list(tmp_path.iterdir())
    assert all("--num_epochs" in words and "--seeds" not in words for words in commands)
    (tmp_path / "alone").mkdir()
    for words in commands:
        assert words[:2] == [sys.executable, str(ROOT / "main_original_model.py")]
        check(run_in_process(seeds[0], *words[2:], cwd=tmp_path / "alone"))
    command = script_command(*seeds[:1], [*seeds[1:], "--jobs", 2])
    command[1] = os.path.relpath(ROOT / seeds[0], tmp_path)
    done = subprocess.run(
        command, cwd=tmp_path, env=script_environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"seed {seed}: original epoch 2/2" in done.stdout for seed in (1, 2))
    for seed in (1, 2):
        path = Path(f"runs/resnet18w8_digits_seed{seed}/original_model.pth")
        assert same_weights(tmp_path / path, tmp_path / "alone" / path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_jobs_save_their_states_and_resume(sent, tmp_path):
    command = [*ORIGINAL, "--seeds", "1,2", "--num_epochs", 30, "--jobs", 2]
    process = subprocess.Popen(
        script_command(command[0], command[1:]),
        cwd=tmp_path,
        env=script_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = set()
    while seen != {"seed 1", "seed 2"}:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        seen |= {line[:6]} if " epoch 2/" in line else set()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.count("\n") == 1 and "--resume" in errors
    assert len(list(tmp_path.glob("runs/*/.unfinished/resume.pth"))) == 2
    done = check(run_script(*command, "--resume", cwd=tmp_path))
    assert done.stdout.count("resuming after epoch") == 2


def test_failed_run_gives_a_status_and_the_others_finish(tmp_path):
    diverge = [*ORIGINAL, "--num_epochs", 1, "--learning_rate", 1e30, "--seeds", "1,2"]
    done = run_script(*diverge, "--jobs", 2, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.count("learning rate") == 2
    assert "Traceback" not in done.stdout + done.stderr
