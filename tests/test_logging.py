"""wandb: curves, table and flags arrive in an offline run; without wandb everything else goes on."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, read_json, succeed

ORIGINAL = ["main_original_model.py", *TINY, "--num_epochs", 2]


def read_offline_run(path):
    """The records of a .wandb file: a LevelDB log of protobuf messages in blocks of 32 KiB after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def history_and_config(folder):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    history, config = [], {}
    for record in read_offline_run(path):
        if record.HasField("history"):
            rows = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(rows)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    return history, config


def test_curves_and_flags_arrive_in_wandb(pipeline):
    folder = pipeline.root / "random_0.9/cpu_finetune"
    history, config = history_and_config(folder)
    curves = [record for record in history if "epoch" in record]
    written = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in curves] == [1, 2, 3]
    for logged, kept in zip(curves, written, strict=True):
        assert {"loss", "train_acc", "retain_acc", "forget_acc", "test_acc", "q_hat", "images_per_second"} <= set(kept)
        assert all(logged[key] == pytest.approx(value) for key, value in kept.items())
    assert config["flags"]["alpha"] == 0.05 and config["forget_set"] == "56d878fd8c3a6704"
    said = [done.stdout for done in pipeline.said.values()]
    assert all("wandb sync" in text and "continuing without it" not in text for text in said)


def test_the_evaluation_table_arrives_in_wandb(pipeline):
    folder = pipeline.root / "random_0.9"
    history, _ = history_and_config(folder)
    path = next(record["evaluation/path"] for record in history if "evaluation/path" in record)
    (run,) = folder.glob("wandb/offline-run-*")
    table = json.loads((run / "files" / path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 16 and {"UA", "MIACR", "forget_CR"} <= set(rows[0])
    assert [row["method"] for row in rows[:4]] == ["original", "retrain", "finetune", "cpu_finetune"]
    assert len(list((run / "files/media/images").rglob("*.png"))) == 8


def test_a_sweep_run_logs_the_gap_to_retrain(pipeline, tmp_path):
    """The sweep file's command as wandb's agent would run it, with the narrow network of the tests."""
    yaml = pytest.importorskip("yaml")
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((ROOT / ".sweeps/learning_rate.yaml").read_text())
    assert sweep["parameters"].keys() == {"learning_rate"}
    arguments = sweeps.create_sweep_command_args({"args": {"learning_rate": {"value": 0.004}}})["args"]
    command = sweeps.create_sweep_command(sweep["command"])
    command = [part for each in command for part in (arguments if each == "${args}" else [each])]
    command[2] = command[2].replace("--data_name digits", "--data_name digits --width 8 --device cpu")
    command[2] = command[2].replace("resnet18_digits", "resnet18w8_digits")
    for name in ("main_unlearn.py", "main_evaluate.py"):
        command[2] = command[2].replace(f"python {name}", f"python {ROOT / name}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "WANDB_RUN_ID": "abc123", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shutil.copytree(pipeline.folder / "runs", tmp_path / "runs")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/sweep/abc123/resnet18w8_digits_seed1/random_0.9"
    numbers = [record for record in history_and_config(folder)[0] if sweep["metric"]["name"] in record]
    results = read_json(folder / "finetune/results.json")
    assert results["recipe"]["learning_rate"] == 0.004
    assert numbers[0]["finetune/gap"] == pytest.approx(results["metrics"]["gap"]) and numbers[0]["retrain/gap"] == 0


STUBS = {
    "missing": "raise ImportError('No module named wandb')",
    "broken": "def login(**_): return True\ndef Settings(**_): return None\ndef init(**_): raise OSError('no service')",
    "dying": (
        "class Run:\n    def log(self, *_): raise BrokenPipeError('gone')\n    def finish(self, **_): raise OSError\n"
        "def login(**_): return False\ndef Settings(**_): return None\ndef init(**_): return Run()"
    ),
}


HANGING = (
    "import atexit, threading\nhang = threading.Event().wait\n"
    "atexit.register(hang)\n"  # as wandb's own end does
    "class Run:\n    def log(self, *_): {log}\n    def finish(self): hang()\n"
    "def login(**_):\n    import utils\n    utils.WandbRun.patience = 2\n"
    "def Settings(**_): return None\ndef Table(**_): return None\ndef init(**_): {init}"
)
STUBS |= {
    "silent from the start": HANGING.format(log="hang()", init="hang()"),
    "silent in the middle": HANGING.format(log="hang()", init="return Run()"),
    "silent at the end": HANGING.format(log="pass", init="return Run()"),
}


@pytest.mark.parametrize("kind", STUBS)
def test_without_wandb_the_run_goes_on(kind, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "wandb.py").write_text(STUBS[kind])
    done = succeed(*ORIGINAL, cwd=tmp_path, python_path=stub)
    said = [line for line in done.stdout.splitlines() if "continuing without it" in line]
    assert len(said) == 1 and said[0].startswith("wandb: ")
    folder = tmp_path / "runs/resnet18w8_digits_seed1"
    assert (folder / "original_model.pth").is_file() and len((folder / "history.jsonl").read_text().splitlines()) == 2


def test_without_a_connection_an_online_run_is_logged_offline(tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "wandb.py").write_text(
        "class Run:\n"
        "    def log(self, record): open('logged', 'a').write(f'{record}\\n')\n"
        "    def finish(self): open('logged', 'a').write('finished')\n"
        "def login(**_): return True\ndef Settings(**_): return None\ndef Table(**_): return 'table'\n"
        "def init(mode, **_):\n"
        "    if mode == 'online': raise TimeoutError('no such host\\nand more lines')\n"
        "    return Run()\n"
    )
    done = succeed(*ORIGINAL, cwd=tmp_path, python_path=stub)
    assert "wandb: online failed (TimeoutError: no such host); logging offline instead" in done.stdout.splitlines()
    logged = (tmp_path / "logged").read_text()
    assert logged.count("'epoch': ") == 2 and logged.endswith("finished")


def test_wandb_can_be_switched_off(tmp_path):
    for way in ({"arguments": ["--wandb_mode", "disabled"]}, {"env": {"WANDB_MODE": "disabled"}}):
        done = succeed(*ORIGINAL, *way.get("arguments", []), "--overwrite", cwd=tmp_path, env=way.get("env"))
        assert "wandb" not in done.stdout and not list(tmp_path.rglob("wandb"))


def test_wandb_environment_variables_take_precedence(tmp_path):
    names = {"WANDB_PROJECT": "mine", "WANDB_NAME": "attempt", "WANDB_RUN_GROUP": "batch", "WANDB_MODE": "offline"}
    done = succeed(*ORIGINAL, cwd=tmp_path, env=names | {"WANDB_DIR": str(tmp_path / "logs")})
    assert not list((tmp_path / "runs").rglob("wandb")) and f"{tmp_path}/logs/wandb" in done.stdout
    (log,) = (tmp_path / "logs").rglob("*.wandb")
    content = log.read_bytes()
    assert all(name.encode() in content for name in ("mine", "attempt", "batch"))


def test_wandb_disabled_for_a_folder_or_by_the_older_variable_writes_nothing(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = disabled\n")  # what "wandb disabled" writes
    done = succeed(*ORIGINAL, cwd=tmp_path)
    assert "wandb" not in done.stdout and not list((tmp_path / "runs").rglob("wandb"))
    (tmp_path / "wandb/settings").unlink()
    done = succeed(*ORIGINAL, "--overwrite", cwd=tmp_path, env={"WANDB_DISABLED": "true"})
    assert "wandb" not in done.stdout and not list((tmp_path / "runs").rglob("wandb"))
