"""Whole scripts as users run them: subprocesses on digits, without network, GPU or wandb account."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
TINY = ["--width", "4", "--device", "cpu"]


def run_script(script, *arguments, cwd, python_path=None, env=None, limit=300):
    """Run a script of the project as a user would; returns the completed process with its text output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PYTHONPATH"))}
    environment |= {
        "HOME": str(cwd),
        "NETRC": str(Path(cwd) / "none"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    if python_path:
        environment["PYTHONPATH"] = str(python_path)
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment | (env or {}), capture_output=True, text=True, timeout=limit, check=False
    )


def succeed(script, *arguments, cwd, **options):
    done = run_script(script, *arguments, cwd=cwd, **options)
    assert done.returncode == 0, f"{script} {arguments}\n{done.stdout}\n{done.stderr}"
    return done


def fails_in_one_line(done, *words):
    """The process ended with status 2 and one line on stderr that holds all ``words``."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1, done.stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


def read_json(path):
    return json.loads(Path(path).read_text())


def flags(**given):
    """Parsed flags with every default, for the functions that take them."""
    defaults = dict(
        data_name="digits", data_dir="./data", num_classes=None, model_name="resnet18", width=4, image_size=None,
        pretrained_path=None, no_pretrained=False, seed=1, unlearn_type="random", retain_ratio=0.9,
        forget_class=None, forget_list=None, runs_dir="./runs", wandb_mode="disabled",
    )  # fmt: skip
    return Namespace(**defaults | given)


@pytest.fixture(scope="session")
def digits():
    import torch

    import utils

    return utils.load_data(flags(), torch.device("cpu"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The README's four scripts on digits, with a narrow network; nothing said about wandb. The folder they ran in."""
    folder = tmp_path_factory.mktemp("pipeline")
    said = {}
    for script, *arguments in [
        ("main_original_model.py", "--num_epochs", 6),
        ("main_unlearn.py", "--unlearn_name", "retrain", "finetune", "--num_epochs", 3),
        ("main_unlearn_cpu.py", "--unlearn_name", "finetune", "--num_epochs", 3, "--alpha", 0.05),
        ("main_evaluate.py", "--unlearn_name", "all", "--alphas", "0.05,0.1", "--cal_sizes", "100,200"),
    ]:
        said[script] = succeed(script, *TINY, *arguments, cwd=folder)
    return Namespace(folder=folder, root=folder / "runs/resnet18w4_digits_seed1", said=said)
