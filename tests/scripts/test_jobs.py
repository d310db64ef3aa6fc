"""--jobs: several runs at a time, with the results of one process."""

import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
from helpers import QUIET, TINY, check, run_forked, run_script, script_command, script_environment

import main_evaluate  # noqa: F401 - forks start faster when everything is imported
import utils
from models import checkpoint
from models.errors import UserError

COMMON = [*TINY, *QUIET, "--seeds", "1,2"]
METHODS = ["--unlearn_name", "RL", "ssd", "ga_plus"]
LONG = [*TINY, *QUIET, "--seeds", "1,2", "--num_epochs", 30]


def weights(root):
    """{file: hash of its weights} of all models."""
    return {
        str(path.relative_to(root)): checkpoint.weights_hash(checkpoint.read(path)[0])
        for path in sorted(root.glob("runs/*/**/*_model.pth"))
    }


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two original models by two processes at a time."""
    folder = tmp_path_factory.mktemp("jobs")
    output = run_script("main_original_model.py", *COMMON, *EPOCHS, "--jobs", 2, cwd=folder)
    return SimpleNamespace(folder=folder, output=check(output).stdout)


EPOCHS = ["--num_epochs", 2]


def test_jobs_give_the_weights_of_one_process(originals, tmp_path):
    check(run_forked("main_original_model.py", *COMMON, *EPOCHS, cwd=tmp_path))
    check(run_forked("main_unlearn.py", *COMMON, *METHODS, "--num_epochs", 1, cwd=tmp_path))
    command = ["main_unlearn.py", *COMMON, *METHODS, "--num_epochs", 1, "--jobs", 2]
    output = check(run_script(*command, cwd=originals.folder)).stdout
    assert weights(originals.folder) == weights(tmp_path) and len(weights(tmp_path)) == 8
    assert "seed 1: original epoch 2/2" in originals.output
    assert "seed 2: original epoch 2/2" in originals.output
    lines = output.splitlines()
    assert sum(line.startswith("seed 2: ga_plus epoch 1/1") for line in lines) == 1
    assert sum("random_0.9" in line for line in lines) == 2  # what each seed forgets, once
    table = lines[-4:]
    assert [line.split()[0] for line in table] == ["method", "RL", "ssd", "ga_plus"]
    again = check(run_script(*command, cwd=originals.folder)).stdout
    assert again.count("already done") == 6 and again.splitlines()[-3:] == table[1:]


def test_failed_jobs_are_reported_and_the_others_run(originals):
    diverge = ["--unlearn_name", "finetune", "--num_epochs", 1, "--learning_rate", 1e30]
    done = run_script("main_unlearn.py", *COMMON, *diverge, "--jobs", 2, cwd=originals.folder)
    assert done.returncode == 2 and done.stderr == ""
    for seed in (1, 2):
        assert f"finetune (seed {seed}) failed: finetune diverged" in done.stdout
    single = [*TINY, *QUIET, *diverge, "--jobs", 2]
    done = run_script("main_unlearn.py", *single, cwd=originals.folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "finetune diverged" in done.stderr


def start(*arguments, cwd):
    """A script with --jobs 2 as the leader of a process group."""
    return subprocess.Popen(
        script_command("main_original_model.py", [*arguments, "--jobs", 2]),
        cwd=cwd,
        env=script_environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_both(process):
    """Wait until both seeds have finished two epochs, and so have a state to save."""
    seen = set()
    for line in process.stdout:
        seen |= {line[:7]} if " epoch 2/" in line else set()
        if seen == {"seed 1:", "seed 2:"}:
            return
    pytest.fail(process.stderr.read())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of both seeds after all epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    check(run_forked("main_original_model.py", *LONG, cwd=folder))
    return weights(folder)


@pytest.mark.parametrize("to_group", [True, False])
def test_interrupted_jobs_resume_with_the_same_weights(to_group, tmp_path, uninterrupted):
    """Ctrl-C reaches the process group, and SIGTERM of a scheduler the script alone."""
    process = start(*LONG, cwd=tmp_path)
    wait_for_both(process)
    if to_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.count("\n") == 1, errors
    assert "interrupted" in errors and "--resume" in errors
    assert len(list(tmp_path.glob("runs/*/.unfinished/*"))) >= 2
    resumed = run_script("main_original_model.py", *LONG, "--jobs", 2, "--resume", cwd=tmp_path)
    assert check(resumed).stdout.count("resuming after epoch") == 2
    assert weights(tmp_path) == uninterrupted


def test_killed_job_ends_all_with_one_line(tmp_path):
    process = start(*LONG, "--num_epochs", 300, cwd=tmp_path)
    wait_for_both(process)
    children = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
    )
    worker = next(line for line in children.stdout.splitlines() if "spawn_main" in line)
    os.kill(int(worker.split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert "a process of --jobs died" in errors and "--resume" in errors


def test_jobs_under_torchrun_are_an_error(monkeypatch):
    utils.check_jobs(SimpleNamespace(jobs=1))
    utils.check_jobs(SimpleNamespace(jobs=2))
    monkeypatch.setattr("models.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="--jobs under torchrun"):
        utils.check_jobs(SimpleNamespace(jobs=2))
    utils.check_jobs(SimpleNamespace(jobs=1))
