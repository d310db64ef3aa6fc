"""Run folders: files appear when all are complete, and interrupted runs damage nothing."""

import errno
import os
from pathlib import Path

import pytest
from conftest import flags

import utils
from models import distributed

MB = 2**20


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
    with utils.unfinished_folder(folder, MB) as unfinished:
        write(unfinished, text)
        utils.move_up(unfinished, last="model.pth")


def record_replacements(monkeypatch, killed_at=None):
    """A list of the targets of os.replace. Moves from ``killed_at`` on never happen."""
    targets, replace = [], os.replace

    def recorded(source, target):
        if Path(target).name == killed_at:
            raise Killed
        targets.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", recorded)
    return targets


# ---------------------------------------------------------------- a run that ends


def test_finished_run_leaves_its_files_and_no_unfinished_folder(tmp_path):
    folder = tmp_path / "a/b"
    finish_run(folder)
    expected = {"model.pth": "new", "history.jsonl": "new", "masks/mask.pth": "new"}
    assert files(folder) == expected and not (folder / ".unfinished").exists()


def test_folders_inside_the_unfinished_folder_are_created_in_the_parent(tmp_path):
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        write(unfinished, "new", names=["a/b/c.txt", "a/d.txt"])
        utils.move_up(unfinished)
    assert files(tmp_path) == {"a/b/c.txt": "new", "a/d.txt": "new"}
    assert not (tmp_path / ".unfinished").exists()


def test_files_appear_only_when_they_are_moved(tmp_path):
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        write(unfinished, "new")
        assert not (tmp_path / "model.pth").exists()
        utils.move_up(unfinished)
        assert (tmp_path / "model.pth").read_text() == "new"


@pytest.mark.parametrize("last", ["a.txt", "m.txt", "z.txt"])
def test_chosen_file_is_moved_last(last, tmp_path, monkeypatch):
    moved = record_replacements(monkeypatch)
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        write(unfinished, "new", names=["z.txt", "a.txt", "m.txt"])
        utils.move_up(unfinished, last=last)
    assert moved[-1] == last and sorted(moved) == ["a.txt", "m.txt", "z.txt"]


def test_new_files_replace_old_ones_and_others_stay(tmp_path):
    write(tmp_path, "old")
    write(tmp_path, "other", names=["results.json"])
    finish_run(tmp_path)
    assert files(tmp_path)["model.pth"] == files(tmp_path)["masks/mask.pth"] == "new"
    assert files(tmp_path)["results.json"] == "other"


def test_finished_run_has_no_resume_checkpoint(tmp_path):
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        write(unfinished, "new", names=["model.pth", utils.RESUME_FILE])
        utils.move_up(unfinished, last="model.pth")
    assert files(tmp_path) == {"model.pth": "new"} and not (tmp_path / ".unfinished").exists()


# ---------------------------------------------------------------- a run that fails or is killed


@pytest.mark.parametrize("error", [utils.UserError("x"), KeyboardInterrupt(), OSError("x")])
def test_failed_run_leaves_earlier_files_and_its_resume_checkpoint(error, tmp_path):
    write(tmp_path, "old", names=["model.pth"])
    with (
        pytest.raises(type(error)),
        utils.unfinished_folder(tmp_path, MB) as unfinished,
    ):
        write(unfinished, "new", names=["model.pth", "masks/mask.pth", utils.RESUME_FILE])
        raise error
    assert files(tmp_path) == {"model.pth": "old", ".unfinished/resume.pth": "new"}


def test_files_of_a_killed_run_are_removed_except_its_resume_checkpoint(tmp_path):
    write(tmp_path / ".unfinished", "killed", names=["model.pth", "masks/mask.pth"])
    write(tmp_path / ".unfinished", "killed", names=["resume.pth", "resume.pth.7.part"])
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        assert files(unfinished) == {"resume.pth": "killed"}
        utils.move_up(unfinished)
    assert not files(tmp_path)


@pytest.mark.parametrize("target", ["history.jsonl", "mask.pth", "model.pth"])
def test_run_killed_while_moving_keeps_the_earlier_model_and_can_be_resumed(
    target, tmp_path, monkeypatch
):
    write(tmp_path, "old")
    monkeypatch.setattr(utils, "_remove_files", lambda unfinished: None)  # a kill runs no clean-up
    with monkeypatch.context() as patch:
        record_replacements(patch, killed_at=target)
        with pytest.raises(Killed), utils.unfinished_folder(tmp_path, MB) as unfinished:
            write(unfinished, "new")
            write(unfinished, "state", names=[utils.RESUME_FILE])
            utils.move_up(unfinished, last="model.pth")
    left = files(tmp_path)
    assert left["model.pth"] == "old" and left[".unfinished/resume.pth"] == "state"
    monkeypatch.undo()
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        assert files(unfinished) == {"resume.pth": "state"}
        write(unfinished, "resumed")
        utils.move_up(unfinished, last="model.pth")
    assert set(files(tmp_path).values()) == {"resumed"} and len(files(tmp_path)) == 3


def test_resume_checkpoint_left_after_the_last_move_is_harmless(tmp_path, monkeypatch):
    """The run is killed between the move of the model and the removal of the checkpoint."""

    def killed(path, **_):
        raise Killed

    with monkeypatch.context() as patch:
        with pytest.raises(Killed), utils.unfinished_folder(tmp_path, MB) as unfinished:
            write(unfinished, "first")
            write(unfinished, "state", names=[utils.RESUME_FILE])
            patch.setattr(Path, "unlink", killed)
            utils.move_up(unfinished, last="model.pth")
    left = files(tmp_path)
    assert left.pop(".unfinished/resume.pth") == "state" and set(left.values()) == {"first"}
    finish_run(tmp_path, "second")
    assert set(files(tmp_path).values()) == {"second"} and not (tmp_path / ".unfinished").exists()


def test_file_that_cannot_be_replaced_is_named(tmp_path):
    (tmp_path / "model.pth/inside").mkdir(parents=True)
    with pytest.raises(utils.UserError, match="model.pth: cannot be replaced"):
        finish_run(tmp_path)
    assert not files(tmp_path / "model.pth") and not (tmp_path / ".unfinished").exists()


def test_error_of_the_run_is_not_hidden_by_an_error_of_the_clean_up(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(ValueError, match="the run's own"):
        with utils.unfinished_folder(tmp_path, MB):
            monkeypatch.setattr(utils, "_remove_files", refuse)
            raise ValueError("the run's own")
    monkeypatch.undo()
    finish_run(tmp_path)  # the lock is released


# ---------------------------------------------------------------- folders that cannot be used


def test_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path):
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        write(unfinished, "first")
        with pytest.raises(utils.UserError, match="another run is writing .*--runs_dir"):
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
    monkeypatch.setattr(utils.FileLock, "acquire", refuse)
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        assert files(unfinished) == {"other.pth": "other run"}
    output = capsys.readouterr().out
    assert f"{tmp_path}: cannot be locked ({type(error).__name__}" in output
    finish_run(tmp_path / "a/b")
    assert (tmp_path / "a/b/model.pth").read_text() == "new"


@pytest.mark.parametrize("is_created", [True, False])
def test_full_disk_is_noticed_before_the_run_and_leaves_no_file(is_created, tmp_path, monkeypatch):
    written = []

    def fill(path, content):
        written.append(len(content))
        if is_created:
            path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(utils.UserError, match=r"cannot hold 3 MB of results \(No space left"):
        with utils.unfinished_folder(tmp_path, 3_000_000):
            pytest.fail("the run has begun")
    assert written == [3_000_000]
    assert not files(tmp_path)
    assert not (tmp_path / ".unfinished").exists()


def test_space_for_the_files_is_free_again_when_the_run_begins(tmp_path):
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        assert unfinished.is_dir() and not files(unfinished)


def test_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(utils.UserError, match=r"file/runs: cannot hold 1 MB .*Not a directory"):
        finish_run(tmp_path / "file/runs")


def test_folder_without_write_permission_is_named(tmp_path, monkeypatch):
    """Both mkdir and the lock are replaced, because root can write everywhere."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    write(tmp_path, "old")
    mkdir = Path.mkdir
    monkeypatch.setattr(utils.FileLock, "acquire", refuse)
    monkeypatch.setattr(
        Path,
        "mkdir",
        lambda path, *a, **k: refuse() if path.name[0] == "." else mkdir(path, *a, **k),
    )
    with pytest.raises(utils.UserError, match=r"cannot hold 1 MB .*Permission denied"):
        finish_run(tmp_path)
    assert set(files(tmp_path).values()) == {"old"}


def test_other_ranks_create_move_and_remove_nothing(tmp_path, monkeypatch):
    write(tmp_path / ".unfinished", "rank 0", names=["model.pth"])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with utils.unfinished_folder(tmp_path, MB) as unfinished:
        assert unfinished == tmp_path / ".unfinished"
        history = utils.History(unfinished / "history.jsonl")
        history.add({"epoch": 1})
        utils.move_up(unfinished)
    assert files(tmp_path) == {".unfinished/model.pth": "rank 0"}
    with utils.unfinished_folder(tmp_path / "new", MB):
        assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- histories


def test_history_is_a_list_and_a_line_of_json_per_epoch(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("an earlier history\n")
    history = utils.History(path)
    assert path.read_text() == ""
    history.add({"epoch": 1, "loss": 0.5})
    assert path.read_text() == '{"epoch": 1, "loss": 0.5}\n'
    history.add({"epoch": 2, "loss": 0.25})
    assert path.read_text() == '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.25}\n'
    assert history.records == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]


def test_history_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(utils.UserError, match=r"none/history.jsonl: cannot be written \(No such"):
        utils.History(tmp_path / "none/history.jsonl")


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
    assert utils.model_tag(flags(**values)) == tag


def test_folder_names_model_data_and_seed(digits):
    args = flags(seed=3, runs_dir="r")
    assert utils.run_folder(args, digits) == Path("r/resnet18w8_digits_seed3")
    assert utils.run_folder(args, digits, "1,2") == Path("r/resnet18w8_digits_seeds1,2")


def test_bare_name_is_in_the_run_folder_and_a_slash_makes_a_path():
    folder = Path("runs/x")
    assert utils.locate("model.pth", folder) == folder / "model.pth"
    assert utils.locate("./model.pth", folder) == Path("model.pth")
    assert utils.locate("/a/model.pth", folder) == Path("/a/model.pth")
