"""Run folders: files appear when all are complete, and interrupted runs damage nothing."""

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import flags

import utils
from models import distributed
from models.errors import UserError


class Killed(BaseException):
    """Ends a run immediately. No handler of the program catches it."""


def files(folder):
    """{relative path: content} of all files but the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def write(folder, text, names=("model.pth", "history.jsonl", "masks/mask.pth")):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def finish_run(folder, text="new"):
    with utils.unfinished_folder(folder) as unfinished:
        write(unfinished, text)
        utils.move_up(unfinished, last="model.pth")


def stop_moves_at(target, monkeypatch):
    """A list of the names that os.replace moves. Moves from ``target`` on never happen."""
    moved, replace = [], os.replace

    def recorded(source, destination):
        if Path(destination).name == target:
            raise Killed
        moved.append(Path(destination).name)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", recorded)
    return moved


# ---------------------------------------------------------------- a run that ends


def test_finished_run_leaves_its_files_and_no_unfinished_folder(tmp_path):
    write(tmp_path / "a/b", "old", names=["model.pth", "results.json"])
    finish_run(tmp_path / "a/b")
    expected = {"model.pth": "new", "history.jsonl": "new", "masks/mask.pth": "new"}
    assert files(tmp_path / "a/b") == expected | {"results.json": "old"}
    assert not (tmp_path / "a/b/.unfinished").exists()


def test_files_appear_only_when_they_are_moved(tmp_path):
    with utils.unfinished_folder(tmp_path) as unfinished:
        write(unfinished, "new", names=["model.pth", utils.RESUME_FILE])
        assert not (tmp_path / "model.pth").exists()
        utils.move_up(unfinished)
        assert (tmp_path / "model.pth").read_text() == "new"
    assert files(tmp_path) == {"model.pth": "new"}


@pytest.mark.parametrize("last", ["a.txt", "m.txt", "z.txt"])
def test_chosen_file_is_moved_last(last, tmp_path, monkeypatch):
    moved = stop_moves_at(None, monkeypatch)
    with utils.unfinished_folder(tmp_path) as unfinished:
        write(unfinished, "new", names=["z.txt", "a.txt", "m.txt"])
        utils.move_up(unfinished, last=last)
    assert moved[-1] == last and sorted(moved) == ["a.txt", "m.txt", "z.txt"]


# ---------------------------------------------------------------- a run that fails or is killed


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt(), OSError("x")])
def test_failed_run_leaves_earlier_files_and_its_resume_checkpoint(error, tmp_path):
    write(tmp_path, "old", names=["model.pth"])
    with pytest.raises(type(error)), utils.unfinished_folder(tmp_path) as unfinished:
        write(unfinished, "new", names=["model.pth", "masks/mask.pth", utils.RESUME_FILE])
        raise error
    assert files(tmp_path) == {"model.pth": "old", ".unfinished/resume.pth": "new"}
    finish_run(tmp_path)  # the lock is released


def test_files_of_a_killed_run_are_removed_except_its_resume_checkpoint(tmp_path):
    write(tmp_path / ".unfinished", "killed", names=["model.pth", "masks/mask.pth"])
    write(tmp_path / ".unfinished", "killed", names=["resume.pth", "resume.pth.7.part"])
    with utils.unfinished_folder(tmp_path) as unfinished:
        assert files(unfinished) == {"resume.pth": "killed"}
        utils.move_up(unfinished)
    assert not files(tmp_path)


@pytest.mark.parametrize("target", ["history.jsonl", "mask.pth", "model.pth"])
def test_run_killed_while_moving_keeps_the_earlier_model_and_its_state(
    target, tmp_path, monkeypatch
):
    write(tmp_path, "old")
    with monkeypatch.context() as patch:
        stop_moves_at(target, patch)
        with pytest.raises(Killed), utils.unfinished_folder(tmp_path) as unfinished:
            write(unfinished, "new")
            write(unfinished, "state", names=[utils.RESUME_FILE])
            utils.move_up(unfinished, last="model.pth")
    left = files(tmp_path)
    assert left["model.pth"] == "old" and left[".unfinished/resume.pth"] == "state"
    finish_run(tmp_path, "resumed")
    assert set(files(tmp_path).values()) == {"resumed"} and len(files(tmp_path)) == 3


def test_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path):
    with utils.unfinished_folder(tmp_path) as unfinished:
        write(unfinished, "first")
        with pytest.raises(UserError, match=f"{tmp_path}.*--runs_dir"):
            finish_run(tmp_path, "second")
        assert set(files(unfinished).values()) == {"first"}
        utils.move_up(unfinished)
    finish_run(tmp_path, "third")
    assert set(files(tmp_path).values()) == {"third"}


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(errno.ENOLCK, "no locks")])
def test_folder_without_locks_is_used_and_keeps_files_of_other_runs(
    error, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise error

    write(tmp_path / ".unfinished", "other run", names=["other.pth"])
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with utils.unfinished_folder(tmp_path) as unfinished:
        assert files(unfinished) == {"other.pth": "other run"}
    assert capsys.readouterr().out.count(str(tmp_path)) == 1


def test_other_ranks_create_move_and_remove_nothing(tmp_path, monkeypatch):
    write(tmp_path / ".unfinished", "rank 0", names=["model.pth"])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with utils.unfinished_folder(tmp_path) as unfinished:
        assert unfinished == tmp_path / ".unfinished"
        utils.move_up(unfinished)
    assert files(tmp_path) == {".unfinished/model.pth": "rank 0"}
    with utils.unfinished_folder(tmp_path / "new"):
        assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- records


def test_history_is_a_list_and_a_line_of_json_per_epoch(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("an earlier history\n")
    history = utils.History(path)
    assert path.read_text() == ""
    history.add({"epoch": 1, "loss": 0.5})
    history.add({"epoch": 2, "loss": 0.25})
    assert path.read_text() == '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.25}\n'
    assert history.records == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]


def test_record_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="none/history.jsonl"):
        utils.History(tmp_path / "none/history.jsonl")


def test_json_has_null_for_nan_and_text_for_infinity(tmp_path):
    content = {"a": math.nan, 1: [math.inf, -math.inf, (0.5, None)], "é": "q̂\udce9"}
    utils.save_json(tmp_path / "x.json", content)
    expected = {"a": None, "1": ["inf", "-inf", [0.5, None]], "é": "q̂\udce9"}
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == expected


def test_record_of_a_run_has_flags_facts_and_versions():
    train = SimpleNamespace(size=8)
    data = SimpleNamespace(classes=["a", "b"], train=train, fingerprint="f", tag="few")
    args = flags(seed=3, split_seed=5, data_dir="caf\udce9")
    record = utils.describe_run(args, data, torch.device("cpu"))
    facts = utils.model_facts(args, data)
    assert facts == {
        "model_name": "resnet18",
        "width": 8,
        "num_classes": 2,
        "image_size": 8,
        "data_name": "digits",
        "data_fingerprint": "f",
    }
    assert facts.items() <= record.items()
    assert (record["seed"], record["split_seed"], record["processes"]) == (3, 5, 1)
    assert record["flags"]["data_dir"] == r"caf\xe9" and record["flags"]["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__ and "timm" in record["versions"]


# ---------------------------------------------------------------- names of folders


@pytest.mark.parametrize(
    ("values", "tag"),
    [
        ({"width": 64}, "resnet18"),
        ({"width": 8}, "resnet18w8"),
        ({"width": 64, "image_size": 32}, "resnet18i32"),
        ({"model_name": "vit"}, "vit"),
        ({"model_name": "vit", "no_pretrained": True}, "vit-random"),
        ({"model_name": "vit", "pretrained_path": "a/b.pth"}, "vit-b"),
        ({"model_name": "test_resnet.r160_in1k", "image_size": 96}, "test-resnet.r160-in1ki96"),
    ],
)
def test_folder_names_the_flags_that_change_the_original_model(values, tag):
    data, args = SimpleNamespace(tag="few"), flags(runs_dir="r", seed=3, **values)
    assert utils.run_folder(args, data) == Path(f"r/{tag}_few_seed3")
    assert utils.run_folder(args, data, "1,2") == Path(f"r/{tag}_few_seeds1,2")


def test_bare_name_is_in_the_run_folder_and_a_slash_makes_a_path():
    folder = Path("runs/x")
    assert utils.locate("model.pth", folder) == folder / "model.pth"
    assert utils.locate("./model.pth", folder) == Path("model.pth")
    assert utils.locate("/a/model.pth", folder) == Path("/a/model.pth")


@pytest.mark.parametrize(
    ("chosen", "folder", "folder_over_seeds"),
    [
        ({}, "random_0.9", "random_0.9"),
        ({"split_seed": 5}, "random_0.9_split5", "random_0.9_split5"),
        ({"split_seed": 3}, "random_0.9", "random_0.9_split3"),
        ({"unlearn_type": "class", "forget_class": "4"}, "class_4", "class_4"),
        ({"unlearn_type": "class"}, None, "class"),
    ],
)
def test_scenario_folder_names_split_seed_and_chosen_class(
    chosen, folder, folder_over_seeds, digits
):
    args = flags(seed=3, **chosen)
    split = utils.make_split(digits, utils.scenario_of(args))
    assert folder is None or split.folder == folder
    assert utils.scenario_folder(args, digits) == folder_over_seeds


def test_script_without_scenario_flags_forgets_nothing(digits):
    args = utils.make_parser("").parse_args([])
    split = utils.make_split(digits, utils.scenario_of(args))
    assert len(split.forget) == 0 and len(split.retain) == len(digits.train)
