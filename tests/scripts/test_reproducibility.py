"""Training through the scripts: seeds, λ = 0, and the compiler."""

import json

import torch
from conftest import TINY, fails_in_one_line, read_json, run_script, succeed

import utils


def test_the_same_seed_gives_the_same_weights_and_another_seed_another_forget_set(tmp_path):
    for runs, seed in (("first", 1), ("second", 1), ("third", 2)):
        common = [*TINY, "--runs_dir", runs, "--seed", seed, "--num_epochs", 2, "--wandb_mode", "disabled"]
        succeed("main_original_model.py", *common, cwd=tmp_path)
        succeed("main_unlearn_cpu.py", *common, "--unlearn_name", "finetune", cwd=tmp_path)

    def result(runs, seed, name):
        return tmp_path / runs / f"resnet18w8_digits_seed{seed}" / name

    for name in ("original_model.pth", "random_0.9/cpu_finetune/unlearning_model.pth"):
        first, second, third = (
            utils.read_checkpoint(result(runs, seed, name))[0]
            for runs, seed in (("first", 1), ("second", 1), ("third", 2))
        )
        assert all(first[key].equal(second[key]) for key in first)
        assert not all(first[key].equal(third[key]) for key in first)
    records = [
        read_json(result(runs, seed, "random_0.9/cpu_finetune/results.json"))
        for runs, seed in (("first", 1), ("third", 2))
    ]
    assert records[0]["forget_set"] != records[1]["forget_set"]


def test_lamda_zero_through_the_scripts(pipeline):
    succeed(
        "main_unlearn_cpu.py", *TINY, "--unlearn_name", "finetune", "retrain", "--num_epochs", 3, "--lamda", 0,
        "--runs_dir", "zero", "--model_dir", pipeline.root / "original_model.pth", "--wandb_mode", "disabled",
        cwd=pipeline.folder,
    )  # fmt: skip
    zero = pipeline.folder / "zero" / pipeline.root.name / "random_0.9"
    for method in ("finetune", "retrain"):
        base = utils.read_checkpoint(pipeline.root / "random_0.9" / method / "unlearning_model.pth")[0]
        same = utils.read_checkpoint(zero / f"cpu_{method}" / "unlearning_model.pth")[0]
        assert all(base[name].equal(same[name]) for name in base), method
        history = [json.loads(line) for line in (zero / f"cpu_{method}" / "history.jsonl").read_text().splitlines()]
        assert len(history) == 3 and all("q_hat" in record for record in history)


def test_a_compiled_network_gives_the_same_weights_within_rounding(tmp_path):
    common = [*TINY, "--num_epochs", 1, "--wandb_mode", "disabled", "--batch_size", 400]
    for runs, more in (("plain", []), ("compiled", ["--compile"])):
        succeed("main_original_model.py", *common, *more, "--runs_dir", runs, cwd=tmp_path, limit=600)
    one, two = (
        utils.read_checkpoint(tmp_path / runs / "resnet18w8_digits_seed1/original_model.pth")[0]
        for runs in ("plain", "compiled")
    )
    assert all(torch.allclose(one[name].double(), two[name].double(), atol=1e-3) for name in one)


def test_a_compiler_that_is_missing_is_an_error_of_one_line(tmp_path):
    environment = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/nowhere"}
    done = run_script(
        "main_original_model.py", *TINY, "--wandb_mode", "disabled", "--compile", cwd=tmp_path, env=environment
    )
    fails_in_one_line(done, "--compile", "leave it out")
