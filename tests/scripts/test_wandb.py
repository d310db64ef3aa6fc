"""An offline wandb run receives curves, table and flags. Without wandb the rest still works."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import COMMON, PIPELINE_EVALUATION, ROOT, TINY, check, run_forked, script_environment
from test_pipeline import read_table


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


def history_and_config(folder, run=""):
    (path,) = folder.glob(f"wandb/offline-run-*{run}/*.wandb")
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
    curves = [record for record in history if "loss" in record]
    written = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in curves] == [1, 2, 3]
    for logged, kept in zip(curves, written, strict=True):
        accuracies = {f"{part}_acc" for part in ("train", "retain", "forget", "test")}
        assert accuracies | {"loss", "q_hat", "images_per_second"} <= set(kept)
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
    expected = read_table(folder / "results.csv")
    assert [row["method"] for row in rows] == [row["method"] for row in expected]
    assert {"UA", "MIACR", "forget_CR"} <= set(rows[0])
    written = [path for path in folder.rglob("*.png") if "wandb" not in path.parts]
    logged = list((run / "files/media/images").rglob("*.png"))
    assert written and len(logged) == len(written)


def test_parallel_runs_of_the_sweep_log_their_own_gap(pipeline, tmp_path):
    """The command of the sweep file as two of wandb's agents run it, with a narrow network."""
    yaml = pytest.importorskip("yaml")
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((ROOT / ".sweeps/sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "gap", "goal": "minimize"}
    shutil.copytree(pipeline.folder / "runs", tmp_path / "runs")
    started = {}
    for name, learning_rate in (("abc1", 0.004), ("abc2", 0.00001)):
        flags = {"unlearn_name": "finetune", "learning_rate": learning_rate, "num_epochs": 2}
        flags |= {"until_forgotten": True, "compile": False}
        values = sweeps.create_sweep_command_args({"args": {k: {"value": flags[k]} for k in flags}})
        macros = {f"${{{key}}}": value for key, value in values.items()}
        macros["${program}"] = [str(ROOT / sweep["program"])]
        command = [word for each in sweep["command"] for word in macros.get(each, [each])]
        command[2] = command[2].replace("'--data_name digits'", f"'{' '.join(TINY)}'")
        evaluate = f"{ROOT / 'main_evaluate.py'} {' '.join(map(str, PIPELINE_EVALUATION))}"
        command[2] = command[2].replace("main_evaluate.py", evaluate)
        environment = script_environment(tmp_path)
        environment |= {"WANDB_MODE": "offline", "WANDB_RUN_ID": name}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        started[name] = subprocess.Popen(command, cwd=tmp_path, env=environment)
    assert [process.wait(timeout=300) for process in started.values()] == [0, 0]
    evaluate = ["--unlearn_name", "all", *COMMON, *PIPELINE_EVALUATION, "--no_pictures"]
    check(run_forked("main_evaluate.py", *evaluate, cwd=tmp_path))
    folder = tmp_path / "runs/resnet18w8_digits_seed1/random_0.9"
    gaps = {row["method"]: float(row["gap"] or 0) for row in read_table(folder / "results.csv")}
    for name in started:
        history, _ = history_and_config(folder, name)
        (logged,) = (record["gap"] for record in history if "gap" in record)
        assert logged == pytest.approx(gaps[f"sweep_{name}"]) != 0
    assert gaps["sweep_abc1"] != gaps["sweep_abc2"]


def test_disabled_wandb_writes_and_prints_nothing(tmp_path):
    (tmp_path / "wandb").mkdir()  # what `wandb disabled` writes
    (tmp_path / "wandb/settings").write_text("[default]\nmode = disabled\n")
    done = check(run_forked("main_original_model.py", *TINY, "--num_epochs", 1, cwd=tmp_path))
    assert "wandb" not in done.stdout and not list((tmp_path / "runs").rglob("wandb"))
