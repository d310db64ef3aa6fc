"""What must not change the weights: a second run, λ = 0, and the compiler."""

import json
from functools import partial

import pytest
import torch
from helpers import COMMON, check, read_json, run_forked, run_in_process, run_script, same_weights

ORIGINAL = "resnet18w8_digits_seed1/original_model.pth"


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """Folders of an original and a CPU variant: two with seed 1, then one with seed 2.

    The first original has an interpreter of its own, the others are forks.
    """
    folder = tmp_path_factory.mktemp("seeds")
    seeds = {"first": 1, "second": 1, "third": 2}
    for runs, seed in seeds.items():
        run = run_script if runs == "first" else run_forked
        common = [*COMMON, "--runs_dir", runs, "--seed", seed, "--num_epochs", 1]
        check(run("main_original_model.py", *common, cwd=folder))
        cpu = ["main_unlearn_cpu.py", *common, "--unlearn_name", "finetune"]
        check(run_forked(*cpu, cwd=folder))
    return [folder / runs / f"resnet18w8_digits_seed{seed}" for runs, seed in seeds.items()]


def test_same_seed_gives_same_weights_and_another_seed_others(three_runs):
    for name in ("original_model.pth", "random_0.9/cpu_finetune/unlearning_model.pth"):
        first, second, third = (folder / name for folder in three_runs)
        assert same_weights(first, second) and not same_weights(first, third)
    name = "random_0.9/cpu_finetune/results.json"
    first, second, third = (read_json(folder / name)["forget_set"] for folder in three_runs)
    assert first == second != third


def test_lamda_zero_gives_the_weights_of_the_base_method(three_runs, tmp_path):
    methods = ("finetune", "retrain")
    original = three_runs[0] / "original_model.pth"
    common = [*COMMON, "--num_epochs", 2, "--model_dir", original, "--unlearn_name", *methods]
    check(run_in_process("main_unlearn.py", *common, cwd=tmp_path))
    check(run_in_process("main_unlearn_cpu.py", *common, "--lamda", 0, cwd=tmp_path))
    root = tmp_path / "runs/resnet18w8_digits_seed1/random_0.9"
    for method in methods:
        folder = root / f"cpu_{method}"
        base = root / method / "unlearning_model.pth"
        assert same_weights(base, folder / "unlearning_model.pth"), method
        lines = (folder / "history.jsonl").read_text().splitlines()
        assert len(lines) == 2 and all("q_hat" in json.loads(line) for line in lines)


def test_compiled_network_gives_same_weights(tmp_path, monkeypatch):
    """torch's backend "eager" captures the graphs and compiles no kernels, which takes minutes."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    common = ["main_original_model.py", *COMMON, "--num_epochs", 1, "--batch_size", 400]
    for runs, more in (("plain", []), ("compiled", ["--compile"])):
        check(run_in_process(*common, *more, "--runs_dir", runs, cwd=tmp_path))
    assert same_weights(*(tmp_path / runs / ORIGINAL for runs in ("plain", "compiled")))
