"""Two torchrun processes (gloo, CPU) give the results of one. A dead process ends both."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    QUIET,
    ROOT,
    TINY,
    check,
    read_json,
    run_forked,
    script_environment,
    succeed,
    visible_files,
)

import main_evaluate  # noqa: F401 - forks start faster when everything is imported
import unlearn
import unlearn_cpu

FOLDER = "runs/resnet18w8_digits_seed1"
COMMON = [*TINY, *QUIET]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(script, *arguments, cwd):
    """Run a script on two processes, which connect through a free port."""
    return subprocess.Popen(
        [*TORCHRUN, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=script_environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two(script, *arguments, cwd):
    process = start(script, *arguments, cwd=cwd)
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def test_every_method_gives_same_weights_with_one_process_and_two(tmp_path):
    """In float64 to 1e-12: losses, augmentation, BatchNorm, importances, masks and q̂."""
    succeed("tests/scripts/train_every_method.py", tmp_path / "one.pt", cwd=tmp_path)
    check(run_two("tests/scripts/train_every_method.py", tmp_path / "two.pt", cwd=tmp_path))
    alone = torch.load(tmp_path / "one.pt", weights_only=True)
    together = torch.load(tmp_path / "two.pt", weights_only=True)
    assert alone.keys() == together.keys()
    assert {name.split()[0] for name in alone} >= {*unlearn.METHODS, *unlearn_cpu.METHODS}
    differences = {
        name: (tensor.double() - together[name].double()).abs().max().item()
        for name, tensor in alone.items()
    }
    # Conjugate gradients magnify rounding.
    of_iu = [differences.pop(name) for name in list(differences) if name.startswith("IU ")]
    assert max(of_iu) < 1e-8
    assert max(differences.values()) < 1e-12, max(differences, key=differences.get)
    assert together["passed"] == 400  # two passes over 200 images, each image once


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Original, CPU variant and evaluation by two processes."""
    folder = tmp_path_factory.mktemp("two")
    output = check(run_two("main_original_model.py", *COMMON, "--num_epochs", 2, cwd=folder)).stdout
    scrub = ["main_unlearn_cpu.py", *COMMON, "--unlearn_name", "scrub", "--num_epochs", 1]
    check(run_two(*scrub, cwd=folder))
    evaluate = ["main_evaluate.py", *COMMON, "--unlearn_name", "cpu_scrub"]
    evaluate += ["--resplits", 2, "--alphas", "0.1"]
    check(run_two(*evaluate, cwd=folder))
    return SimpleNamespace(folder=folder, output=output, evaluate=evaluate)


def test_two_processes_train_as_one_does(two, tmp_path):
    check(run_forked("main_original_model.py", *COMMON, "--num_epochs", 2, cwd=tmp_path))
    by_one, by_two = (
        read_json(folder / FOLDER / "original_model.json")["history"]
        for folder in (tmp_path, two.folder)
    )
    losses = [record["loss"] for record in by_two]
    assert [record["loss"] for record in by_one] == pytest.approx(losses, rel=1e-2)


def test_two_processes_score_exactly_as_one_does(two):
    results = two.folder / FOLDER / "random_0.9/cpu_scrub/results.json"
    by_two = read_json(results)
    check(run_forked(*two.evaluate, cwd=two.folder))
    by_one = read_json(results)
    assert by_one["metrics"] == by_two["metrics"]
    assert by_one["evaluation"]["processes"] == 1 and by_two["evaluation"]["processes"] == 2


def test_only_the_first_process_writes_and_prints(two):
    assert two.output.count("original epoch 1/2") == 1
    assert two.output.count("test accuracy") == 1
    history = (two.folder / FOLDER / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2]
    expected = {"original_model.pth", "original_model.json", "history.jsonl", "random_0.9"}
    assert visible_files(two.folder / FOLDER) == expected
    assert not list(two.folder.rglob("resume.pth"))


def test_dead_process_ends_both_and_one_process_resumes(tmp_path):
    common = ["main_original_model.py", *COMMON, "--num_epochs", 30]
    process = start(*common, "--save_every", 0, cwd=tmp_path)
    for line in process.stdout:
        if "epoch 2/" in line:
            break
    parent = ["pgrep", "-P", str(process.pid)]
    children = subprocess.run(parent, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 90
    lines = [line for line in errors.splitlines() if line.startswith("main_original_model.py:")]
    assert len(lines) == 1, errors
    (line,) = lines
    assert "another rank failed" in line and "--resume" in line
    path = tmp_path / FOLDER / "original_model.pth"
    assert not path.exists()
    done = check(run_forked(*common, "--resume", cwd=tmp_path))
    assert "resuming after epoch" in done.stdout
    assert torch.load(path, weights_only=True)["meta"]["processes"] == 1


def test_mistake_is_printed_once(tmp_path):
    done = run_two("main_unlearn.py", *COMMON, "--unlearn_name", "nothing", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("--unlearn_name nothing: choose from") == 1
    assert not (tmp_path / "runs").exists()
