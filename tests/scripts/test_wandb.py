"""An offline wandb run receives curves, table and flags. Without wandb the rest still works."""

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from faults import wandb_missing
from helpers import (
    ROOT,
    TINY,
    check,
    read_json,
    run_forked,
    script_environment,
    succeed,
)

import main_original_model  # noqa: F401 - forks start faster when everything is imported

ORIGINAL = ["main_original_model.py", *TINY, "--num_epochs", 2]


def read_offline_run(path):
    """The records of a .wandb file: a LevelDB log of protobuf messages in blocks of 32 KiB after a
    7-byte header.
    """
    from wandb.proto import wandb_internal_pb2

    data, position, fragments = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        fragments.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a complete record or its last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(fragments))
            fragments = []
            yield record


def history_and_config(folder):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    history, config = [], {}
    for record in read_offline_run(path):
        if record.HasField("history"):
            rows = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history.append(rows)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    return history, config


def test_curves_and_flags_are_logged(pipeline):
    folder = pipeline.root / "random_0.9/cpu_finetune"
    history, config = history_and_config(folder)
    curves = [record for record in history if "epoch" in record]
    written = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in curves] == [1, 2, 3]
    for logged, kept in zip(curves, written, strict=True):
        assert {
            "loss",
            "train_acc",
            "retain_acc",
            "forget_acc",
            "test_acc",
            "q_hat",
            "images_per_second",
        } <= set(kept)
        assert all(logged[key] == pytest.approx(value) for key, value in kept.items())
    assert config["flags"]["alpha"] == 0.05 and config["forget_set"] == "56d878fd8c3a6704"
    for done in pipeline.output.values():
        assert "wandb sync" in done.stdout and "records are in" not in done.stdout


def test_evaluation_table_and_pictures_are_logged(pipeline):
    folder = pipeline.root / "random_0.9"
    history, _ = history_and_config(folder)
    path = next(record["evaluation/path"] for record in history if "evaluation/path" in record)
    (run,) = folder.glob("wandb/offline-run-*")
    table = json.loads((run / "files" / path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    with open(folder / "results.csv") as file:
        expected = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row["method"] for row in expected]
    assert {"UA", "MIACR", "forget_CR"} <= set(rows[0])
    written = [path for path in folder.rglob("*.png") if "wandb" not in path.parts]
    logged = list((run / "files/media/images").rglob("*.png"))
    assert written and len(logged) == len(written)


def test_sweep_run_logs_the_gap_to_retrain(pipeline, tmp_path):
    """The command of the sweep file as wandb's agent runs it, with a narrow network."""
    yaml = pytest.importorskip("yaml")
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((ROOT / ".sweeps/learning_rate.yaml").read_text())
    assert sweep["parameters"].keys() == {"learning_rate"}
    arguments = sweeps.create_sweep_command_args({"args": {"learning_rate": {"value": 0.004}}})[
        "args"
    ]
    command = sweeps.create_sweep_command(sweep["command"])
    command = [word for each in command for word in (arguments if each == "${args}" else [each])]
    command[2] = command[2].replace(
        "--data_name digits", "--data_name digits --width 8 --device cpu"
    )
    command[2] = command[2].replace("resnet18_digits", "resnet18w8_digits")
    for name in ("main_unlearn.py", "main_evaluate.py"):
        command[2] = command[2].replace(f"python {name}", f"python {ROOT / name}")
    environment = script_environment(tmp_path)
    environment |= {"WANDB_MODE": "offline", "WANDB_RUN_ID": "abc123"}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shutil.copytree(pipeline.folder / "runs", tmp_path / "runs")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/sweep/abc123/resnet18w8_digits_seed1/random_0.9"
    numbers = [
        record for record in history_and_config(folder)[0] if sweep["metric"]["name"] in record
    ]
    results = read_json(folder / "finetune/results.json")
    assert results["recipe"]["learning_rate"] == 0.004
    assert numbers[0]["finetune/gap"] == pytest.approx(results["metrics"]["gap"])
    assert numbers[0]["retrain/gap"] == 0


def test_run_without_a_working_wandb_ends_with_its_model_and_one_line(tmp_path):
    done = check(run_forked(*ORIGINAL, cwd=tmp_path, before=wandb_missing.install))
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("wandb: "))
    assert "runs/resnet18w8_digits_seed1" in line
    folder = tmp_path / "runs/resnet18w8_digits_seed1"
    assert (folder / "original_model.pth").is_file()
    assert len((folder / "history.jsonl").read_text().splitlines()) == 2


def test_environment_variables_of_wandb_take_precedence(tmp_path):
    names = {
        "WANDB_PROJECT": "mine",
        "WANDB_NAME": "attempt",
        "WANDB_RUN_GROUP": "batch",
        "WANDB_MODE": "OFFLINE",
        "WANDB_RUN_ID": "abc123",
    }
    names |= {"WANDB_DIR": str(tmp_path / "logs")}
    done = succeed(*ORIGINAL, "--seeds", "1,2", cwd=tmp_path, env=names)
    assert not list((tmp_path / "runs").rglob("wandb")) and f"{tmp_path}/logs/wandb" in done.stdout
    logs = list((tmp_path / "logs").rglob("*.wandb"))
    assert len(logs) == 2 and sum("abc123" in log.name for log in logs) == 1
    for log in logs:
        content = log.read_bytes()
        assert all(name.encode() in content for name in ("mine", "attempt", "batch"))


@pytest.mark.parametrize("way", ["variable", "settings file"])
def test_disabled_wandb_writes_and_prints_nothing(way, tmp_path):
    if way == "settings file":  # what `wandb disabled` writes
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb/settings").write_text("[default]\nmode = disabled\n")
    environment = {"WANDB_MODE": "Disabled"} if way == "variable" else {}
    done = check(run_forked(*ORIGINAL, cwd=tmp_path, env=environment))
    assert "wandb" not in done.stdout and not list((tmp_path / "runs").rglob("wandb"))
