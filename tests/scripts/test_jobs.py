"""--jobs: several runs at a time, with the results of one process."""

import csv
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


def without_time(table):
    """The cells of a printed table without the last column, which has running times."""
    return [line.split()[:-1] for line in table]


def read_results(folder):
    """The rows of results.csv over both seeds, without running times and peak memory."""
    (path,) = folder.glob("runs/*seeds1,2*/random_0.9/results.csv")
    costs = ("seconds", "RTE", "time_ratio", "peak_memory", "memory_ratio")
    rows = csv.DictReader(path.read_text().splitlines())
    return [{key: row[key] for key in row if not key.startswith(costs)} for row in rows]


def test_jobs_give_the_weights_and_tables_of_one_process(originals, tmp_path):
    check(run_forked("main_original_model.py", *COMMON, *EPOCHS, cwd=tmp_path))
    alone = ["main_unlearn.py", *COMMON, *METHODS, "--num_epochs", 1]
    alone = check(run_forked(*alone, cwd=tmp_path)).stdout.splitlines()
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
    assert without_time(table[1:]) == without_time(alone[-3:])
    evaluate = ["main_evaluate.py", *COMMON, "--unlearn_name", "all", "--resplits", 2]
    evaluate += ["--no_pictures", "--alphas", 0.1, "--columns", "all"]
    scored = [check(run_forked(*evaluate, cwd=folder)) for folder in (tmp_path, originals.folder)]
    one, two = (read_results(folder) for folder in (tmp_path, originals.folder))
    assert one == two and len(one) == 4
    assert [len(done.stdout.splitlines()) for done in scored] == [
        len(scored[0].stdout.splitlines())
    ] * 2
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
