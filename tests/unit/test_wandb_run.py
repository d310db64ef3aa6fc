"""wandb is optional: when it fails, a run continues and prints one line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import utils


class Wandb:
    """A module wandb that records what it receives. ``fails`` maps a function to its exception."""

    Table = staticmethod(lambda **options: options)
    Image = staticmethod(lambda path: f"picture {path}")
    Settings = staticmethod(lambda **options: options)

    def __init__(self, logged_in=False, fails=None, **saved):
        self.calls, self.fails, self.logged_in = [], fails or {}, logged_in
        names = {"mode": "online", "project": None, "run_name": None, "run_group": None}
        self.saved = SimpleNamespace(**names | saved)

    def call(self, name, value=None):
        self.calls.append((name, value))
        if name in self.fails:
            raise self.fails[name]

    def setup(self, settings):
        return SimpleNamespace(settings=self.saved)

    def login(self, **_):
        return self.logged_in

    def init(self, **options):
        self.call("init", options)
        return SimpleNamespace(
            log=lambda numbers: self.call("log", numbers),
            finish=lambda: self.call("finish"),
            define_metric=lambda name, step_metric=None: self.call("axis", (name, step_metric)),
        )

    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """No run has been started, and no variable of wandb is set."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "")  # restored even if the run sets it
        monkeypatch.delenv(name)


@pytest.fixture
def install(monkeypatch):
    def install(**options):
        wandb = Wandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return install


def run(folder, mode=None, config=None, **options):
    config = config or {"seed": 1}
    with utils.WandbRun(Path(folder), "finetune", config, mode, **options) as wandb_run:
        wandb_run.log({"loss": 1.0})
        wandb_run.log_table("run", [{"a": 1, "b": 2}, {"b": 3, "c": 4}])
        wandb_run.log_pictures({"caption": "a.png"})


def test_numbers_tables_and_pictures_are_logged_in_this_order(install, tmp_path, capsys):
    wandb = install()
    run(tmp_path / "seed1/finetune")
    assert wandb.names() == ["init", "log", "log", "log", "finish"]
    options = wandb.calls[0][1]
    assert (options["name"], options["group"]) == ("finetune", "seed1")
    assert options["config"] == {"seed": 1} and options["dir"] == tmp_path / "seed1/finetune"
    assert options["project"] == "conformal-prediction-unlearning"
    table = {"columns": ["a", "b", "c"], "data": [[1, 2, None], [None, 3, 4]]}
    logged = [value for name, value in wandb.calls if name == "log"]
    assert logged[0] == {"loss": 1.0} and logged[2] == {"caption": "picture a.png"}
    assert logged[1] == {"run": table | {"allow_mixed_types": True}}
    assert capsys.readouterr().out.count("wandb sync") == 1


@pytest.mark.parametrize(
    ("flag", "saved", "logged_in", "expected"),
    [
        ("online", "offline", True, ["online"]),
        ("online", "online", False, ["offline"]),
        (None, "offline", True, ["offline"]),
        (None, "online", True, ["online"]),
        ("disabled", "online", True, []),
        (None, "disabled", True, []),
    ],
)
def test_wandb_mode_comes_from_flag_then_settings_then_login(
    flag, saved, logged_in, expected, install, tmp_path
):
    wandb = install(mode=saved, logged_in=logged_in)
    run(tmp_path, flag)
    assert [options["mode"] for name, options in wandb.calls if name == "init"] == expected


def test_only_the_first_rank_logs(install, tmp_path, torchrun):
    torchrun(rank=1)
    wandb = install()
    run(tmp_path)
    assert not wandb.calls


def test_names_and_folder_of_wandb_take_precedence(install, tmp_path, monkeypatch):
    wandb = install(project="mine", run_name="attempt", run_group="batch")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "logs"))
    run(tmp_path / "runs")
    options = wandb.calls[0][1]
    assert [options[name] for name in ("project", "name", "group")] == ["mine", "attempt", "batch"]
    assert options["dir"] == tmp_path / "logs" and not (tmp_path / "runs").exists()


def test_only_the_first_run_of_a_process_has_the_run_id_of_a_sweep(install, tmp_path, monkeypatch):
    wandb = install()
    monkeypatch.setenv("WANDB_RUN_ID", "sweeps")
    for _ in range(3):
        run(tmp_path)
    ids = [options["id"] for name, options in wandb.calls if name == "init"]
    assert ids[0] == "sweeps" and len({*ids}) == 3


def test_curves_have_epochs_as_their_axis_and_the_config_has_what_is_set(install, tmp_path):
    wandb = install()
    flags = {"alpha": None, "resume": False, "label": "", "relearn": 0, "lamda": 0.5}
    run(tmp_path, config={"flags": flags, "recipe": None}, curves_over="epoch")
    assert wandb.names()[:3] == ["init", "axis", "axis"]
    assert [value for _, value in wandb.calls[1:3]] == [("epoch", None), ("*", "epoch")]
    assert wandb.calls[0][1]["config"] == {"flags": {"relearn": 0, "lamda": 0.5}}


def test_evaluations_of_one_folder_are_one_run(install, tmp_path):
    wandb = install()
    for folder in ("a", "a", "b"):
        run(tmp_path / folder, continued=True)
    run(tmp_path / "a")
    started = [(v["id"], v["resume"]) for name, v in wandb.calls if name == "init"]
    assert started[0] == started[1] and len({*started}) == 3
    assert [resume for _, resume in started] == ["allow", "allow", "allow", None]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_failing_wandb_is_reported_once_per_run(moment, install, tmp_path, capsys):
    wandb = install(fails={moment: OSError("gone\nmore")})
    run(tmp_path)
    assert wandb.names()[-1] == moment
    lines = [line for line in capsys.readouterr().out.splitlines() if "OSError" in line]
    assert len(lines) == 1 and "gone" in lines[0] and str(tmp_path) in lines[0]
    run(tmp_path)
    assert wandb.names().count("init") == 2  # the next run tries again


def test_missing_wandb_is_reported_and_the_run_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import fails
    run(tmp_path)
    assert capsys.readouterr().out.count("\n") == 1
