"""Weight gradients on CPUs with and without AVX-512, for narrow and wide networks."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

WIDTHS = [f"resnet18:{width}" for width in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16)]
TIMM = [
    "test_resnet.r160_in1k",
    "mobilenetv3_small_050",
    "convnext_atto",
    "ghostnet_050",
    "regnetx_002",
]


@pytest.mark.parametrize("names", [WIDTHS, TIMM], ids=["resnet18", "timm"])
@pytest.mark.parametrize("instructions", ["AVX2", "DEFAULT"])
def test_weight_gradients_equal_those_in_float64(instructions, names):
    environment = os.environ | {
        "ONEDNN_MAX_CPU_ISA": instructions,
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, str(ROOT / "tests/scripts/compare_gradients.py"), *names]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
