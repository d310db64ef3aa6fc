"""Two torchrun processes (gloo, CPU) train as one does. A dead process ends both."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from helpers import (
    COMMON,
    QUIET,
    check,
    forks,
    read_json,
    read_weights,
    run_forked,
    run_script,
    start_script,
)

FOLDER = "runs/resnet18w8_digits_seed1"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# A network without BatchNorm: 300,000 weights, 4 patches.
VIT = ["--model_name", "test_vit", "--image_size", 32, "--no_pretrained", "--device", "cpu", *QUIET]

pytestmark = forks

# On two processes, which connect through a free port.
run_two = partial(run_script, program=TORCHRUN)


# ---------------------------------------------------------------- a network without BatchNorm


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    check(run_forked("main_original_model.py", *VIT, "--num_epochs", 1, cwd=folder))
    return folder


@pytest.mark.parametrize(("method", "forget", "batch_size"), [("finetune", 5, 72), ("GA", 64, 32)])
def test_two_processes_with_equal_shares_give_one_process_weights(method, forget, batch_size, vit):
    """Of the 797 training images, the 792 retain or the 64 forget images make even batches."""
    forget_list = vit / f"{forget}.txt"
    forget_list.write_text("\n".join(map(str, range(0, 10 * forget, 10))))
    command = ["main_unlearn.py", *VIT, "--unlearn_name", method, "--unlearn_type", "list"]
    command += ["--forget_list", forget_list, "--batch_size", batch_size, "--num_epochs", 2]
    command += ["--learning_rate", 0.003, "--overwrite"]
    weights = []
    for run in (run_forked, run_two):
        check(run(*command, cwd=vit))
        (path,) = vit.glob(f"runs/*/*/{method}/unlearning_model.pth")
        weights.append(read_weights(path))
        path.unlink()
    (original,) = vit.glob("runs/*/original_model.pth")
    before = read_weights(original)
    for name, alone in weights[0].items():
        torch.testing.assert_close(weights[1][name], alone, rtol=1e-5, atol=1e-5)
    assert max((weights[0][name] - before[name]).abs().max() for name in before) > 1e-3


# ---------------------------------------------------------------- a network with BatchNorm


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder and the output of an original model that two processes trained."""
    folder = tmp_path_factory.mktemp("two")
    done = check(run_two("main_original_model.py", *COMMON, "--num_epochs", 2, cwd=folder))
    return folder, done.stdout


def test_only_the_first_process_prints_and_writes(two):
    folder, output = two
    assert output.count("BatchNorm") == 1
    history = (folder / FOLDER / "history.jsonl").read_text().splitlines()
    assert len(history) == 2
    assert (folder / FOLDER / "original_model.pth").exists()
    assert not list(folder.rglob(".resume.pth"))


def test_two_processes_evaluate_as_one_does(two):
    folder, _ = two
    unlearn = ["main_unlearn_cpu.py", *COMMON, "--unlearn_name", "scrub", "--num_epochs", 1]
    check(run_two(*unlearn, cwd=folder))
    evaluate = ["main_evaluate.py", *COMMON, "--unlearn_name", "cpu_scrub", "--alphas", "0.1"]
    results = folder / FOLDER / "random_0.9/cpu_scrub/results.json"
    metrics = []
    for run in (run_two, run_forked):
        check(run(*evaluate, cwd=folder))
        metrics.append(read_json(results)["metrics"])
        for path in folder.rglob("logits.npz"):
            path.unlink()
    assert metrics[0] == metrics[1]


def test_dead_process_ends_both_and_two_processes_resume(tmp_path):
    common = ["main_original_model.py", *COMMON, "--num_epochs", 30]
    process = start_script(*common, "--save_every", 0, cwd=tmp_path, program=TORCHRUN)
    for line in process.stdout:
        if "epoch 2/" in line:
            break
    parent = ["pgrep", "-P", str(process.pid)]
    children = subprocess.run(parent, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 90
    assert not (tmp_path / FOLDER / "original_model.pth").exists()
    done = check(run_two(*common, "--resume", cwd=tmp_path))
    assert "epoch 2/" not in done.stdout
    assert len((tmp_path / FOLDER / "history.jsonl").read_text().splitlines()) == 30
