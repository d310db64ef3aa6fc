"""wandb is optional: when it fails, a run continues and prints one line."""

import sys
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

import utils
from models import distributed

ARGS = Namespace(wandb_mode=None)


class Wandb:
    """A module wandb that records what it receives. ``fails`` maps a function to its exception."""

    Table = staticmethod(lambda **options: options)
    Image = staticmethod(lambda path: f"picture {path}")
    Settings = staticmethod(lambda **options: options)

    def __init__(self, logged_in=False, saved_mode=None, **fails):
        self.calls, self.fails, self.logged_in = [], fails, logged_in
        self.saved = SimpleNamespace(mode=saved_mode, project=None, run_name=None, run_group=None)

    def call(self, name, value=None):
        self.calls.append((name, value))
        failure = self.fails.get(name)
        if failure == "hang":
            threading.Event().wait()
        if failure:
            raise failure

    def setup(self, settings):
        return SimpleNamespace(settings=self.saved)

    def login(self, **_):
        return self.logged_in

    def init(self, **options):
        self.call(f"init {options['mode']}", options)
        return SimpleNamespace(
            log=lambda numbers: self.call("log", numbers), finish=lambda: self.call("finish")
        )

    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Reset the state of wandb and unset its environment variables."""
    monkeypatch.setattr(utils, "wandb_state", utils.WandbState())
    monkeypatch.setattr(utils.WandbRun, "patience", 0.3)
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def install(monkeypatch):
    def install(**options):
        wandb = Wandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return install


def run(folder, args=ARGS):
    with utils.WandbRun(Path(folder), "finetune", {"seed": 1}, args) as wandb_run:
        wandb_run.log({"loss": 1.0})
        wandb_run.log_table("run", [{"a": 1, "b": 2}, {"b": 3, "c": 4}])
        wandb_run.log_pictures({"caption": "a.png"})


def test_numbers_tables_and_pictures_are_logged_in_this_order(install, tmp_path, capsys):
    wandb = install()
    run(tmp_path / "seed1/finetune")
    assert wandb.names() == ["init offline", "log", "log", "log", "finish"]
    options = wandb.calls[0][1]
    assert (options["name"], options["group"]) == ("finetune", "seed1")
    assert options["config"] == {"seed": 1} and options["dir"] == tmp_path / "seed1/finetune"
    assert options["project"] == "conformal-prediction-unlearning"
    table = {"columns": ["a", "b", "c"], "data": [[1, 2, None], [None, 3, 4]]}
    logged = [value for name, value in wandb.calls if name == "log"]
    assert logged[0] == {"loss": 1.0} and logged[2] == {"caption": "picture a.png"}
    assert logged[1] == {"run": table | {"allow_mixed_types": True}}
    run(tmp_path)
    assert capsys.readouterr().out.count("wandb sync") == 1  # printed once per process


@pytest.mark.parametrize(
    ("flag", "variable", "saved", "logged_in", "expected"),
    [
        ("offline", "online", "online", True, "offline"),
        (None, "offline", "online", True, "offline"),
        (None, None, "offline", True, "offline"),
        (None, None, "online", True, "online"),
        (None, None, "online", False, "offline"),
        (None, None, None, True, "online"),
    ],
)
def test_wandb_mode_comes_from_flag_then_variable_then_settings_then_login(
    flag, variable, saved, logged_in, expected, install, tmp_path, monkeypatch
):
    wandb = install(saved_mode=saved, logged_in=logged_in)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    run(tmp_path, Namespace(wandb_mode=flag))
    assert wandb.names()[0] == f"init {expected}"


@pytest.mark.parametrize("way", ["flag", "WANDB_MODE", "WANDB_DISABLED", "settings", "rank"])
def test_disabled_wandb_is_not_called(way, install, tmp_path, monkeypatch, capsys):
    wandb = install(saved_mode="disabled" if way == "settings" else None)
    if way.startswith("WANDB"):
        monkeypatch.setenv(way, {"WANDB_MODE": "disabled", "WANDB_DISABLED": "true"}[way])
    if way == "rank":
        monkeypatch.setattr(distributed, "rank", lambda: 1)
    run(tmp_path / "runs", Namespace(wandb_mode="disabled" if way == "flag" else None))
    assert not wandb.calls and not capsys.readouterr().out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", ["", "0", "false", "no", "off"])
def test_variable_other_than_disabled_leaves_wandb_enabled(value, install, tmp_path, monkeypatch):
    wandb = install()
    monkeypatch.setenv("WANDB_DISABLED", value)
    run(tmp_path)
    assert wandb.names()[0] == "init offline"


def test_online_run_without_a_connection_is_logged_offline(install, tmp_path, capsys):
    wandb = install(logged_in=True, **{"init online": TimeoutError("no host\nmore")})
    run(tmp_path)
    assert wandb.names() == ["init online", "init offline", "log", "log", "log", "finish"]
    line = "wandb: online failed (TimeoutError: no host); logging offline instead"
    assert line in capsys.readouterr().out.splitlines()
    run(tmp_path)
    assert wandb.names()[6] == "init offline"  # the next run does not try again


@pytest.mark.parametrize("moment", ["init offline", "log", "finish"])
def test_failing_wandb_is_reported_once_and_the_next_run_tries_again(
    moment, install, tmp_path, capsys
):
    wandb = install(**{moment: OSError("gone")})
    run(tmp_path)
    calls = len(wandb.calls)
    assert wandb.names()[-1] == moment and not utils.wandb_state.hung
    run(tmp_path)
    assert len(wandb.calls) == 2 * calls
    output = capsys.readouterr().out
    assert output.count("continuing without it") == 1
    assert f"wandb: OSError: gone; continuing without it, records are in {tmp_path}" in output


@pytest.mark.parametrize("moment", ["init offline", "log", "finish"])
def test_hanging_wandb_is_abandoned_and_never_called_again(moment, install, tmp_path, capsys):
    wandb = install(**{moment: "hang"})
    run(tmp_path)
    calls = len(wandb.calls)
    assert wandb.names()[-1] == moment and utils.wandb_state.hung
    run(tmp_path)
    assert len(wandb.calls) == calls
    assert capsys.readouterr().out.count("no response for 0.3 s; continuing without it") == 1


def test_missing_wandb_is_reported_and_the_run_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import fails
    run(tmp_path)
    assert capsys.readouterr().out.count("continuing without it") == 1


def test_folder_name_that_is_not_utf8_is_reported_in_one_line(install, capsys):
    wandb = install()
    run("caf\udce9")
    output = capsys.readouterr().out
    assert not wandb.calls and output.count("\n") == 1 and output.endswith("caf\\xe9\n")
