"""Whole scripts as users run them: subprocesses on digits, without network, GPU or wandb account."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the networks are tiny
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
TINY = ["--width", "8", "--device", "cpu"]
PIPELINE_EVALUATION = ["--alphas", "0.05,0.1", "--cal_sizes", "100,200", "--resplits", "10"]


def run_script(script, *arguments, cwd, python_path=None, env=None, limit=300):
    """Run a script of the project as a user would; returns the completed process with its text output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PYTHONPATH"))}
    environment |= {
        "HOME": str(cwd),
        "NETRC": str(Path(cwd) / "none"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
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
    """Parsed flags with every default but those given, for the functions that take them."""
    import utils

    parser = utils.make_parser("")
    utils.add_scenario_flags(parser, "", "original_model.pth")
    args = parser.parse_args(["--unlearn_name", "all", "--width", "8", "--device", "cpu"])
    return Namespace(**vars(args) | given)


@pytest.fixture(scope="session")
def digits():
    import torch

    import utils

    return utils.load_data(flags(), torch.device("cpu"))


def readme_block(marker):
    """The code block of the README that follows the comment ``marker``."""
    return (ROOT / "README.md").read_text().split(f"<!-- {marker} -->")[1].split("```")[1].partition("\n")[2]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The README's main job with a narrow network and fewer epochs; nothing said about wandb. Where it ran."""
    folder = tmp_path_factory.mktemp("pipeline")
    fewer = {
        "main_original_model.py": ["--num_epochs", 6],
        "main_unlearn.py": ["--num_epochs", 3],
        "main_unlearn_cpu.py": ["--num_epochs", 3, "--alpha", 0.05],
        "main_evaluate.py": PIPELINE_EVALUATION,
    }
    commands = [part.split()[1:] for part in readme_block("main job").split("&&") if "main_" in part]
    assert [script for script, *_ in commands] == list(fewer)
    said = {}
    for script, *arguments in commands:
        said[script] = succeed(script, *arguments, *TINY, *fewer[script], cwd=folder)
    return Namespace(folder=folder, root=folder / "runs/resnet18w8_digits_seed1", said=said)
