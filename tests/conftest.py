"""Settings and fixtures of all tests. They need no network, no GPU and no wandb account."""

import os
from argparse import Namespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; forks need it too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before timm is imported

import pytest
from helpers import PIPELINE_EVALUATION, TINY, check, flags, readme_block, run_forked


@pytest.fixture
def torchrun(monkeypatch):
    """Call it with a rank to be that process of two, as torchrun would start it."""

    def start(rank, world_size=2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    return start


@pytest.fixture(scope="session")
def digits():
    import torch

    import utils

    return utils.read_data(flags(), torch.device("cpu"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The README's first command with a narrow network, fewer epochs, one baseline and a tenth of
    the images to forget, and without flags for wandb.

    ``folder`` is where it ran, ``root`` the run folder, ``output`` the CompletedProcess of each
    script.
    """

    folder = tmp_path_factory.mktemp("pipeline")
    tenth = ["--retain_ratio", 0.9]
    fewer = {
        "main_original_model.py": ["--num_epochs", 6],
        "main_unlearn.py": ["--num_epochs", 3, "--unlearn_name", "retrain", "finetune", *tenth],
        "main_unlearn_cpu.py": ["--num_epochs", 3, "--alpha", 0.05, *tenth],
        "main_evaluate.py": [*PIPELINE_EVALUATION, *tenth],
    }
    chain = readme_block("main job").split("&&")
    commands = [command.split()[1:] for command in chain if "main_" in command]
    assert [script for script, *_ in commands] == list(fewer)
    output = {}
    for script, *arguments in commands:
        output[script] = check(run_forked(script, *arguments, *TINY, *fewer[script], cwd=folder))
    return Namespace(folder=folder, root=folder / "runs/resnet18w8_digits_seed1", output=output)
