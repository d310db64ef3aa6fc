"""An interrupted run resumes to the same weights, a full disk loses nothing, a folder has one
writer.

Most runs are forks of this process with 40 small pictures, so that every moment of a run can be
tried.
"""

import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from faults import another_run_finishes, moments
from helpers import (
    QUIET,
    TINY,
    check,
    fails_in_one_line,
    fork_script,
    read_json,
    run_forked,
    run_in_process,
    same_weights,
    start_script,
    visible_files,
    write_pictures,
)

import main_evaluate  # noqa: F401 - forks start faster when everything is imported
import main_unlearn_cpu  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

MANY_EPOCHS = 16
RUN_FOLDER = "runs/resnet18w8_image_folder-pictures_seed1"
SCRIPTS = {
    "original": ["main_original_model.py"],
    "salun": ["main_unlearn.py", "--unlearn_name", "salun"],  # writes a mask too
    "sfron": ["main_unlearn.py", "--unlearn_name", "sfron"],  # alternates between two kinds of step
    "cpu_scrub": ["main_unlearn_cpu.py", "--unlearn_name", "scrub", "--alpha", 0.3],
}


def model_path(name):
    if name == "original":
        return f"{RUN_FOLDER}/original_model.pth"
    return f"{RUN_FOLDER}/random_0.9/{name}/unlearning_model.pth"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Every run without a fault. ``command`` gives a run's command, ``moments`` the number of its
    moments.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    write_pictures(folder / "pictures", 40, 40)
    data = [*TINY, *QUIET, "--data_name", "image_folder", "--data_dir", folder / "pictures"]
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


def copy_original(undisturbed, folder):
    (folder / RUN_FOLDER).mkdir(parents=True)
    for path in (undisturbed.folder / RUN_FOLDER).glob("original_model.*"):
        shutil.copy(path, folder / RUN_FOLDER)


def contents(folder):
    """{name: bytes} of the files that a run leaves to its user."""
    return {name: (folder / name).read_bytes() for name in visible_files(folder) if "." in name}


def resume_states(folder):
    return list(folder.rglob("resume.pth"))


def finish_after_kill(name, undisturbed, folder, *more):
    """Resume a killed run and compare everything that it leaves with the undisturbed run."""
    target, expected = folder / model_path(name), undisturbed.folder / model_path(name)
    continues = resume_states(folder) and not target.exists()
    done = check(run_forked(*undisturbed.command(name), "--resume", *more, cwd=folder))
    assert "resuming after epoch" in done.stdout or not continues
    assert same_weights(target, expected)
    assert visible_files(target.parent) >= visible_files(expected.parent) - {"random_0.9"}
    assert len((target.parent / "history.jsonl").read_text().splitlines()) == 2
    assert not resume_states(folder) or "already done" in done.stdout


def moments_of(name, undisturbed, step):
    """Every ``step``-th moment of a run, and the last one."""
    last = undisturbed.moments[name]
    return sorted({*range(1, last + 1, step), last})


@pytest.mark.parametrize(
    ("name", "step"), [("original", 1), ("salun", 3), ("sfron", 6), ("cpu_scrub", 4)]
)
def test_run_killed_at_any_moment_resumes_to_same_weights(name, step, undisturbed, tmp_path):
    for moment in moments_of(name, undisturbed, step):
        folder = tmp_path / str(moment)
        folder.mkdir()
        if name != "original":
            copy_original(undisturbed, folder)
        fault = lambda folder=folder, moment=moment: moments.kill(folder / "runs", moment)  # noqa: E731
        killed = run_forked(*undisturbed.command(name), cwd=folder, before=fault)
        assert killed.returncode == -signal.SIGKILL, (moment, killed)
        target = folder / model_path(name)
        assert not target.exists() or same_weights(target, undisturbed.folder / model_path(name))
        finish_after_kill(name, undisturbed, folder)


@pytest.fixture
def earlier(undisturbed, tmp_path):
    """A folder with the original of another command, which trained for one epoch."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    check(run_forked(*undisturbed.command("original", epochs=1), cwd=folder))
    return folder


def test_run_killed_while_it_replaces_a_result_leaves_earlier_or_new_model(
    undisturbed, earlier, tmp_path
):
    command, path = undisturbed.command("original"), model_path("original")
    for moment in moments_of("original", undisturbed, 3):
        folder = tmp_path / str(moment)
        shutil.copytree(earlier, folder)
        fault = lambda folder=folder, moment=moment: moments.kill(folder / "runs", moment)  # noqa: E731
        killed = run_forked(*command, "--overwrite", cwd=folder, before=fault)
        assert killed.returncode in (0, -signal.SIGKILL), (moment, killed)
        versions = [earlier / path, undisturbed.folder / path]
        assert any(same_weights(folder / path, version) for version in versions), moment
        read_json((folder / path).with_suffix(".json"))
        finish_after_kill("original", undisturbed, folder, "--overwrite")


def test_disk_that_fills_at_any_moment_leaves_earlier_result_and_resumes(
    undisturbed, earlier, tmp_path
):
    command, path = undisturbed.command("original"), model_path("original")
    tried, failures = moments_of("original", undisturbed, 2), 0
    for moment in tried:
        folder = tmp_path / str(moment)
        shutil.copytree(earlier, folder)
        fault = lambda folder=folder, moment=moment: moments.fill(folder / "runs", moment)  # noqa: E731
        done = run_forked(*command, "--overwrite", cwd=folder, before=fault)
        if done.returncode:
            failures += 1
            fails_in_one_line(done, RUN_FOLDER)
            assert contents(earlier / RUN_FOLDER).items() <= contents(folder / RUN_FOLDER).items()
        else:
            assert same_weights(folder / path, undisturbed.folder / path)
        finish_after_kill("original", undisturbed, folder, "--overwrite")
    assert failures > len(tried) // 2


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def at_work(undisturbed, tmp_path):
    """A run of many epochs that has saved a state and is stopped, not ended, in ``tmp_path``."""
    command = undisturbed.command("original", MANY_EPOCHS)
    process = fork_script(*command, cwd=tmp_path)
    try:
        wait_until(lambda: resume_states(tmp_path))
        os.kill(process, signal.SIGSTOP)  # otherwise a fast machine could finish first
        yield SimpleNamespace(process=process, command=command)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_second_run_in_a_folder_is_refused_and_first_is_undisturbed(at_work, tmp_path):
    (state,) = resume_states(tmp_path)
    before = state.read_bytes()
    fails_in_one_line(run_in_process(*at_work.command, cwd=tmp_path), RUN_FOLDER, "--runs_dir")
    assert state.read_bytes() == before
    os.kill(at_work.process, signal.SIGCONT)
    wait_until(lambda: "epoch 5/" in (tmp_path / "stdout.txt").read_text())


def test_killed_run_leaves_no_lock_and_other_flags_do_not_resume_its_state(at_work, tmp_path):
    os.kill(at_work.process, signal.SIGKILL)
    wait_until(lambda: os.waitid(os.P_PID, at_work.process, os.WEXITED | os.WNOWAIT))
    other = [*at_work.command, "--resume", "--learning_rate", 0.02]
    fails_in_one_line(run_in_process(*other, cwd=tmp_path), "--resume", "resume.pth")
    done = check(run_in_process(*at_work.command, "--resume", cwd=tmp_path))
    assert "after epoch" in done.stdout and f"epoch {MANY_EPOCHS}/{MANY_EPOCHS}" in done.stdout
    done = check(run_in_process(*at_work.command, "--resume", cwd=tmp_path))
    assert "already done" in done.stdout and "epoch 1/" not in done.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_script_saves_its_state_and_names_resume(sent, undisturbed, tmp_path):
    command = [*undisturbed.command("original", MANY_EPOCHS), "--save_every", 1000]
    interruptible = lambda: signal.signal(sent, signal.SIG_DFL)  # noqa: E731
    process = start_script(*command, cwd=tmp_path, preexec_fn=interruptible)
    for line in process.stdout:
        if "epoch 2/" in line:
            break
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert "after epoch" in check(run_forked(*command, "--resume", cwd=tmp_path)).stdout
    (tmp_path / "whole").mkdir()
    check(run_forked(*command, cwd=tmp_path / "whole"))
    path = model_path("original")
    assert same_weights(tmp_path / path, tmp_path / "whole" / path)


def test_result_that_another_run_finished_meanwhile_is_not_overwritten(undisturbed, tmp_path):
    """The result appears after the flags were checked and before training begins."""
    model, target = undisturbed.folder / model_path("original"), tmp_path / model_path("original")
    fault = lambda: another_run_finishes.install(model, target)  # noqa: E731
    done = run_forked(*undisturbed.command("original", 3), cwd=tmp_path, before=fault)
    fails_in_one_line(done, "original_model.pth", "num_epochs", "--overwrite")
    assert same_weights(target, model)
