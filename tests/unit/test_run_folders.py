"""Run folders: files appear when all are complete, and interrupted runs damage nothing."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import flags

import utils
from models import checkpoint
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


# ---------------------------------------------------------------- a run that ends


def test_files_appear_only_when_they_are_moved(tmp_path):
    with utils.unfinished_folder(tmp_path) as unfinished:
        write(unfinished, "new", names=["model.pth"])
        assert not (tmp_path / "model.pth").exists()
        utils.move_up(unfinished)
        assert (tmp_path / "model.pth").read_text() == "new"
    assert files(tmp_path) == {"model.pth": "new"}


# ---------------------------------------------------------------- a run that fails or is killed


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt()])
def test_failed_run_leaves_earlier_files(error, tmp_path):
    write(tmp_path, "old", names=["model.pth"])
    with pytest.raises(type(error)), utils.unfinished_folder(tmp_path) as unfinished:
        write(unfinished, "new", names=["model.pth", "masks/mask.pth"])
        raise error
    assert files(tmp_path) == {"model.pth": "old"}
    finish_run(tmp_path)  # the lock is released


def test_files_of_a_killed_run_are_removed(tmp_path):
    write(tmp_path / ".unfinished", "killed")
    with utils.unfinished_folder(tmp_path) as unfinished:
        assert not files(unfinished)
        utils.move_up(unfinished)
    assert not files(tmp_path)


@pytest.mark.parametrize("target", ["history.jsonl", "model.pth"])
def test_run_killed_while_moving_keeps_the_earlier_model(target, tmp_path, monkeypatch):
    write(tmp_path, "old")
    move = os.replace

    def move_until_target(source, destination):
        if Path(destination).name == target:
            raise Killed
        move(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move_until_target)
        with pytest.raises(Killed), utils.unfinished_folder(tmp_path) as unfinished:
            write(unfinished, "new")
            utils.move_up(unfinished, last="model.pth")
    assert files(tmp_path)["model.pth"] == "old"
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


def test_other_ranks_create_move_and_remove_nothing(tmp_path, torchrun):
    write(tmp_path / ".unfinished", "rank 0", names=["model.pth"])
    torchrun(rank=1)
    with utils.unfinished_folder(tmp_path) as unfinished:
        assert unfinished == tmp_path / ".unfinished"
        utils.move_up(unfinished)
    assert files(tmp_path) == {".unfinished/model.pth": "rank 0"}
    with utils.unfinished_folder(tmp_path / "new"):
        assert not (tmp_path / "new").exists()


def test_run_that_another_process_finished_meanwhile_is_kept(tmp_path):
    """Its model appears after the flags were checked and before the folder is locked."""
    files, meta = utils.RunFiles(tmp_path), {"identity": {"a": 1}}
    job = SimpleNamespace(label="finetune")
    checkpoint.save(files.model_path, {"w": torch.zeros(1)}, meta | {"seconds": 2})
    earlier = utils.run_and_save(None, job, files, meta=meta, args=flags())
    assert earlier["seconds"] == 2
    with pytest.raises(UserError, match="--overwrite"):
        utils.run_and_save(None, job, files, meta={"identity": {"a": 2}}, args=flags())


# ---------------------------------------------------------------- records


def test_record_of_a_run_has_flags_facts_and_versions():
    train = SimpleNamespace(size=8)
    data = SimpleNamespace(classes=["a", "b"], train=train, fingerprint="f", tag="few")
    args = flags(seed=3, split_seed=5)
    record = utils.describe_run(args, data, torch.device("cpu"))
    facts = {"model_name": "resnet18", "width": 8, "num_classes": 2, "image_size": 8}
    facts |= {"data_name": "digits", "data_fingerprint": "f"}
    assert utils.model_facts(args, data) == facts
    assert facts.items() <= record.items()
    assert (record["seed"], record["split_seed"], record["processes"]) == (3, 5, 1)
    assert record["flags"]["data_dir"] == "./data" and record["flags"]["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__ and "timm" in record["versions"]


# ---------------------------------------------------------------- names of folders


@pytest.mark.parametrize(
    ("values", "tag"),
    [
        ({"width": 8}, "resnet18w8"),
        ({"width": 64, "image_size": 32}, "resnet18w64i32"),
        ({"width": 16}, "resnet18"),
        ({"width": 64, "data_name": "cifar10"}, "resnet18"),
        ({"model_name": "vit", "no_pretrained": True}, "vit-random"),
        ({"model_name": "vit", "pretrained_path": "a/b.pth"}, "vit-b"),
        ({"model_name": "test_resnet.r160_in1k", "image_size": 96}, "test-resnet.r160-in1ki96"),
    ],
)
def test_folder_names_the_flags_that_change_the_original_model(values, tag):
    data, args = SimpleNamespace(tag="few"), flags(runs_dir="r", seed=3, **values)
    assert utils.run_folder(args, data) == Path(f"r/{tag}_few_seed3")
    assert utils.run_folder(args, data, "1,2") == Path(f"r/{tag}_few_seeds1,2")


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
