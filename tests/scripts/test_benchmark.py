"""The benchmark for GPUs runs on a CPU as well, with few images."""

import math
import subprocess
import sys

from helpers import ROOT, check, read_json, script_environment

import unlearn
import unlearn_cpu

SPEEDS = {"batches of 64", "batches of 256", "batches of 512"}
METHODS = {"original", *unlearn.METHODS, *unlearn_cpu.METHODS, "evaluation"}


def test_gpu_benchmark_without_a_gpu_saves_positive_numbers_of_every_section(tmp_path):
    command = [sys.executable, str(ROOT / "tests/benchmark.py"), "gpu", "--out", "new/out.json"]
    environment = script_environment(tmp_path) | {"TORCH_COMPILE_DISABLE": "1"}  # it takes minutes
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = check(subprocess.run(command, check=False, **options))
    saved = read_json(tmp_path / "new/out.json")
    assert saved["device"].startswith("CPU") and "CPU" in done.stdout.splitlines()[-1]
    sections = {name: numbers.keys() for name, numbers in saved["gpu"].items()}
    assert sections == {
        "speed": {"total seconds", *SPEEDS},
        "methods": {"total seconds", *METHODS},
        "jobs": {"total seconds", "images/s", "one run"},
        "torchrun": {"total seconds", "images/s", "processes"},
        "compiled": {"total seconds", *SPEEDS},
    }
    rows = [row for section in saved["gpu"].values() for row in section.values()]
    numbers = [n for row in rows for n in (row.values() if isinstance(row, dict) else [row])]
    assert all(0 < number < math.inf for number in numbers), done.stdout
