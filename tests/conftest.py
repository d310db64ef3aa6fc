"""Settings and fixtures of all tests. They need no network, no GPU and no wandb account."""

import os
from argparse import Namespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; forks need it too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before timm is imported

import pytest
from helpers import PIPELINE_EVALUATION, TINY, flags, readme_block, succeed


@pytest.fixture(scope="session")
def digits():
    import torch

    import utils

    return utils.read_data(flags(), torch.device("cpu"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The README's first command with a narrow network and fewer epochs, and without flags for
    wandb.

    ``folder`` is where it ran, ``root`` the run folder, ``output`` the CompletedProcess of each
    script.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    fewer = {
        "main_original_model.py": ["--num_epochs", 6],
        "main_unlearn.py": ["--num_epochs", 3],
        "main_unlearn_cpu.py": ["--num_epochs", 3, "--alpha", 0.05],
        "main_evaluate.py": PIPELINE_EVALUATION,
    }
    chain = readme_block("main job").split("&&")
    commands = [command.split()[1:] for command in chain if "main_" in command]
    assert [script for script, *_ in commands] == list(fewer)
    output = {}
    for script, *arguments in commands:
        output[script] = succeed(script, *arguments, *TINY, *fewer[script], cwd=folder)
    return Namespace(folder=folder, root=folder / "runs/resnet18w8_digits_seed1", output=output)
