"""An interrupted run resumes to the same weights, a full disk loses nothing, a folder has one
writer.

Runs are forks of this process on 40 small pictures, so that many moments of a run can be tried.
"""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from faults import moments
from helpers import (
    COMMON,
    check,
    fails_in_one_line,
    fork_script,
    forks,
    read_json,
    run_forked,
    run_in_process,
    same_weights,
    visible_files,
    write_pictures,
)

pytestmark = forks

MANY_EPOCHS = 120
RUN_FOLDER = "runs/resnet18w8_image_folder-pictures_seed1"
SCRIPTS = {
    "original": ["main_original_model.py"],
    "salun": ["main_unlearn.py", "--unlearn_name", "salun"],  # writes a mask too
    "cpu_scrub": ["main_unlearn_cpu.py", "--unlearn_name", "scrub", "--alpha", 0.3],
}
ORIGINAL = f"{RUN_FOLDER}/original_model.pth"


def model_path(name):
    return (
        ORIGINAL if name == "original" else f"{RUN_FOLDER}/random_0.9/{name}/unlearning_model.pth"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Every run without a fault. ``command`` gives a run's command, ``moments`` the number of its
    moments.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    write_pictures(folder / "pictures", 40, 40)
    data = [*COMMON, "--data_name", "image_folder", "--data_dir", folder / "pictures"]
    data += ["--batch_size", 16, "--save_every", 0]

    def command(name, epochs=2):
        return [*SCRIPTS[name], *data, "--num_epochs", epochs]

    counts = {}
    for name in SCRIPTS:
        log = folder / f"{name}.log"
        watch = lambda log=log: moments.record(folder / "runs", log)  # noqa: E731
        check(run_forked(*command(name), cwd=folder, before=watch))
        counts[name] = len(log.read_text().splitlines())
        assert counts[name] > 5 and "fsync" in log.read_text()
    return SimpleNamespace(folder=folder, command=command, moments=counts)


def contents(folder):
    """{name: bytes} of the files that a run leaves to its user."""
    return {name: (folder / name).read_bytes() for name in visible_files(folder) if "." in name}


def resume_states(folder):
    return list(folder.rglob(".resume.pth"))


def finish_after_fault(name, undisturbed, folder, *more):
    """Resume a run and compare everything that it leaves with the undisturbed run."""
    target, expected = folder / model_path(name), undisturbed.folder / model_path(name)
    continues = resume_states(folder) and not target.exists()
    done = check(run_forked(*undisturbed.command(name), "--resume", *more, cwd=folder))
    assert "resuming after epoch" in done.stdout or not continues
    assert same_weights(target, expected)
    assert visible_files(target.parent) >= visible_files(expected.parent) - {"random_0.9"}
    assert len((target.parent / "history.jsonl").read_text().splitlines()) == 2
    assert not resume_states(folder) or "already done" in done.stdout


def disturbed(fault, name, undisturbed, source, folder, step):
    """Start ``name`` in copies of ``source`` with the fault at every ``step``-th moment and the
    last one. Yields each folder and the CompletedProcess.
    """
    last = undisturbed.moments[name]
    for moment in sorted({*range(1, last + 1, step), last}):
        copy = folder / str(moment)
        shutil.copytree(source, copy)
        command = [*undisturbed.command(name), *(["--overwrite"] if name == "original" else [])]
        before = lambda copy=copy, moment=moment: fault(copy / "runs", moment)  # noqa: E731
        yield copy, run_forked(*command, cwd=copy, before=before)


@pytest.fixture
def earlier(undisturbed, tmp_path):
    """A folder with the original of another command, which trained for one epoch."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    check(run_forked(*undisturbed.command("original", epochs=1), cwd=folder))
    return folder


@pytest.mark.parametrize(("name", "step"), [("salun", 9), ("cpu_scrub", 11)])
def test_run_killed_at_any_moment_resumes_to_same_weights(name, step, undisturbed, tmp_path):
    source = tmp_path / "source"
    (source / RUN_FOLDER).mkdir(parents=True)
    for path in (undisturbed.folder / RUN_FOLDER).glob("original_model.*"):
        shutil.copy(path, source / RUN_FOLDER)
    for folder, killed in disturbed(moments.kill, name, undisturbed, source, tmp_path, step):
        assert killed.returncode == -signal.SIGKILL, killed
        target = folder / model_path(name)
        assert not target.exists() or same_weights(target, undisturbed.folder / model_path(name))
        finish_after_fault(name, undisturbed, folder)


def test_run_killed_while_it_replaces_a_result_leaves_earlier_or_new_model(
    undisturbed, earlier, tmp_path
):
    versions = [earlier / ORIGINAL, undisturbed.folder / ORIGINAL]
    runs = disturbed(moments.kill, "original", undisturbed, earlier, tmp_path, step=7)
    for folder, killed in runs:
        assert killed.returncode in (0, -signal.SIGKILL), killed
        assert any(same_weights(folder / ORIGINAL, version) for version in versions), folder
        read_json((folder / ORIGINAL).with_suffix(".json"))
        finish_after_fault("original", undisturbed, folder, "--overwrite")


def test_disk_that_fills_at_any_moment_leaves_earlier_result_and_resumes(
    undisturbed, earlier, tmp_path
):
    runs = disturbed(moments.fill, "original", undisturbed, earlier, tmp_path, step=7)
    failed = []
    for folder, done in runs:
        failed.append(done.returncode != 0)
        if done.returncode:
            fails_in_one_line(done, RUN_FOLDER)
            assert contents(earlier / RUN_FOLDER).items() <= contents(folder / RUN_FOLDER).items()
        else:
            assert same_weights(folder / ORIGINAL, undisturbed.folder / ORIGINAL)
        finish_after_fault("original", undisturbed, folder, "--overwrite")
    assert sum(failed) > len(failed) // 2


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_running_folder_has_one_writer_and_killed_run_leaves_no_lock(undisturbed, tmp_path):
    command = undisturbed.command("original", MANY_EPOCHS)
    process = fork_script(*command, cwd=tmp_path)
    try:
        wait_until(lambda: resume_states(tmp_path))
        os.kill(process, signal.SIGSTOP)  # otherwise a fast machine could finish first
        (state,) = resume_states(tmp_path)
        before = state.read_bytes()
        fails_in_one_line(run_in_process(*command, cwd=tmp_path), RUN_FOLDER, "--runs_dir")
        assert state.read_bytes() == before
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    other = [*command, "--resume", "--learning_rate", 0.02]
    fails_in_one_line(run_in_process(*other, cwd=tmp_path), "--resume", "resume.pth")
    done = check(run_in_process(*command, "--resume", cwd=tmp_path))
    assert "after epoch" in done.stdout and f"epoch {MANY_EPOCHS}/{MANY_EPOCHS}" in done.stdout
    assert "already done" in check(run_in_process(*command, "--resume", cwd=tmp_path)).stdout


@pytest.fixture(scope="module")
def many_epochs(undisturbed, tmp_path_factory):
    """The original model of an uninterrupted run of many epochs."""
    folder = tmp_path_factory.mktemp("many")
    check(run_forked(*undisturbed.command("original", MANY_EPOCHS), cwd=folder))
    return folder / ORIGINAL


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_script_saves_its_state_and_names_resume(
    sent, undisturbed, many_epochs, tmp_path
):
    command = [*undisturbed.command("original", MANY_EPOCHS), "--save_every", 1000]
    interruptible = lambda: signal.signal(sent, signal.SIG_DFL)  # noqa: E731
    process = fork_script(*command, cwd=tmp_path, before=interruptible)
    output = tmp_path / "stdout.txt"
    wait_until(lambda: output.exists() and "epoch 2/" in output.read_text())
    os.kill(process, sent)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    errors = (tmp_path / "stderr.txt").read_text()
    assert "--resume" in errors and errors.count("\n") == 1
    assert "after epoch" in check(run_forked(*command, "--resume", cwd=tmp_path)).stdout
    assert same_weights(tmp_path / ORIGINAL, many_epochs)
