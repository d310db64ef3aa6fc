"""Several processes under torchrun (gloo, on the CPU) do what one does; one dead process ends all."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, read_json, run_script, succeed

from models import checkpoint

FOLDER = "runs/resnet18w8_digits_seed1"
COMMON = [*TINY, "--wandb_mode", "disabled"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(script, *arguments, cwd):
    """Two processes of a script. They find each other through a port of the kernel's choice."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(cwd), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    command = [*TORCHRUN, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_two(script, *arguments, cwd):
    process = start(script, *arguments, cwd=cwd)
    try:
        out, said = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def succeed_two(*arguments, cwd):
    done = run_two(*arguments, cwd=cwd)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def test_every_method_gives_the_same_weights_with_one_process_and_two(tmp_path):
    """In float64 to 1e-12: the loss of the whole step, augmentation, BatchNorm, importances, masks, q̂ and noise."""
    succeed("tests/processes.py", tmp_path / "one.pt", cwd=tmp_path)
    succeed_two("tests/processes.py", tmp_path / "two.pt", cwd=tmp_path)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys() and len(one) > 1000
    apart = {name: (one[name].double() - two[name].double()).abs().max().item() for name in one}
    assert max(apart.values()) < 1e-12, max(apart, key=apart.get)
    assert two["passed"] == 400  # two passes over 200 images, each image once


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Original, CPU variant and evaluation by two processes, and what the first script said."""
    folder = tmp_path_factory.mktemp("two")
    said = succeed_two("main_original_model.py", *COMMON, "--num_epochs", 2, cwd=folder).stdout
    succeed_two("main_unlearn_cpu.py", *COMMON, "--unlearn_name", "scrub", "--num_epochs", 1, cwd=folder)
    arguments = ["--unlearn_name", "cpu_scrub", "--resplits", 2, "--alphas", "0.1"]
    succeed_two("main_evaluate.py", *COMMON, *arguments, cwd=folder)
    return folder, said, arguments


def test_the_scripts_agree_with_one_process(two, tmp_path):
    folder, _, arguments = two
    succeed("main_original_model.py", *COMMON, "--num_epochs", 2, cwd=tmp_path)
    first, second = (read_json(path / FOLDER / "original_model.json")["history"] for path in (tmp_path, folder))
    assert [record["loss"] for record in first] == pytest.approx([record["loss"] for record in second], rel=1e-2)
    # What is scored is the same to the last digit: logits do not depend on who computes them.
    results = folder / FOLDER / "random_0.9/cpu_scrub/results.json"
    by_two = read_json(results)
    succeed("main_evaluate.py", *COMMON, *arguments, cwd=folder)
    by_one = read_json(results)
    assert by_one["metrics"] == by_two["metrics"]
    assert (by_one["evaluation"]["processes"], by_two["evaluation"]["processes"]) == (1, 2)


def test_only_the_first_process_writes_and_speaks(two):
    folder, said, _ = two
    assert said.count("original epoch 1/2") == 1 and said.count("test accuracy") == 1
    history = (folder / FOLDER / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2]
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("resume.pth"))


def test_a_dead_process_ends_all_with_an_error(tmp_path):
    command = ["main_original_model.py", *COMMON, "--num_epochs", 60, "--save_every", 0]
    process = start(*command, cwd=tmp_path)
    for line in process.stdout:
        if "epoch 2/60" in line:
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 90
    (line,) = (line for line in said.splitlines() if line.startswith("main_original_model.py: error"))
    assert "another rank" in line and "--resume" in line
    assert not (tmp_path / FOLDER / "original_model.pth").exists()
    # What the two have done one goes on with, and the other way round.
    done = run_script(*command[:-4], "--num_epochs", 60, "--resume", cwd=tmp_path)
    assert "after epoch" in done.stdout and done.returncode == 0, done.stderr
    assert checkpoint.read(tmp_path / FOLDER / "original_model.pth")[1]["processes"] == 1


def test_a_mistake_is_said_once(tmp_path):
    done = run_two("main_unlearn.py", *COMMON, "--unlearn_name", "nothing", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("--unlearn_name nothing: choose from") == 1
    assert not (tmp_path / "runs").exists()
