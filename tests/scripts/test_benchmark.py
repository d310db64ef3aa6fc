"""The benchmark for GPUs runs on a CPU as well, with few images."""

import math

from helpers import check, read_json, run_forked


def test_gpu_benchmark_without_a_gpu_saves_positive_numbers_of_every_section(tmp_path):
    command = ["tests/benchmark.py", "gpu", "--short", "--out", "new/out.json"]
    environment = {"TORCH_COMPILE_DISABLE": "1"}  # it takes minutes
    done = check(run_forked(*command, cwd=tmp_path, env=environment))
    saved = read_json(tmp_path / "new/out.json")
    assert saved["device"].startswith("CPU") and "CPU" in done.stdout.splitlines()[-1]
    sections = {name: numbers.keys() for name, numbers in saved["gpu"].items()}
    assert sections == {
        "methods": {"total seconds", "original", "retrain", "ssd", "cpu_scrub", "evaluation"},
        "torchrun": {"total seconds", "images/s", "processes"},
        "compiled": {"total seconds", "batches of 64"},
    }
    rows = [row for section in saved["gpu"].values() for row in section.values()]
    numbers = [n for row in rows for n in (row.values() if isinstance(row, dict) else [row])]
    assert all(0 < number < math.inf for number in numbers), done.stdout
