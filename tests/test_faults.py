"""Killed runs go on; damaged files are refused; nothing is lost and nothing is executed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, fails_in_one_line, run_script, succeed

import utils

COMMON = [*TINY, "--wandb_mode", "disabled", "--save_every", "0"]
FOLDER = "runs/resnet18w4_digits_seed1"


def weights(path):
    return utils.weights_hash(utils.read_checkpoint(path)[0])


def start(*arguments, cwd):
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(cwd), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def dies_in_fsync(tmp_path, number):
    """A Python path on which a process kills itself in the middle of its ``number``-th file."""
    path = tmp_path / f"dies{number}"
    path.mkdir()
    (path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "left, plain = [" + str(number) + "], os.fsync\n"
        "def fsync(file):\n"
        "    left[0] -= 1\n"
        "    if not left[0]:\n"
        "        os.ftruncate(file, os.fstat(file).st_size // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(file)\n"
        "os.fsync = fsync\n"
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed: the original and what the tests below interrupt."""
    folder = tmp_path_factory.mktemp("whole")
    succeed("main_original_model.py", *COMMON, "--num_epochs", 6, cwd=folder)
    succeed("main_unlearn.py", *COMMON, "--unlearn_name", "salun", "sfron", "--num_epochs", 5, cwd=folder)
    succeed("main_unlearn_cpu.py", *COMMON, "--unlearn_name", "scrub", "--num_epochs", 5, cwd=folder)
    return folder / FOLDER


def test_a_training_killed_at_any_moment_goes_on_to_the_same_weights(whole, tmp_path):
    command = ["main_original_model.py", *COMMON, "--num_epochs", 6]
    target = tmp_path / FOLDER
    process = start(*command, cwd=tmp_path)
    wait_for(target / "resume.pth", process)
    process.kill()
    process.communicate()
    assert not (target / "original_model.pth").exists()
    # Killed again, in the middle of saving a state: the one before is still whole.
    before = (target / "resume.pth").read_bytes()
    died = run_script(*command, "--resume", cwd=tmp_path, python_path=dies_in_fsync(tmp_path, 1))
    assert died.returncode == -signal.SIGKILL and (target / "resume.pth").read_bytes() == before
    done = succeed(*command, "--resume", cwd=tmp_path)
    assert "goes on after epoch" in done.stdout
    assert weights(target / "original_model.pth") == weights(whole / "original_model.pth")
    history = (target / "history.jsonl").read_text().splitlines()
    assert len(history) == 6 and not (target / "resume.pth").exists() and "already done" in succeed(
        *command, "--resume", cwd=tmp_path
    ).stdout  # fmt: skip


@pytest.mark.parametrize(("script", "name"), [("unlearn", "salun"), ("unlearn", "sfron"), ("unlearn_cpu", "scrub")])
def test_an_unlearning_killed_while_saving_goes_on_to_the_same_weights(script, name, whole, tmp_path):
    original = whole / "original_model.pth"
    command = [f"main_{script}.py", *COMMON, "--unlearn_name", name, "--num_epochs", 5, "--model_dir", original]
    died = run_script(*command, cwd=tmp_path, python_path=dies_in_fsync(tmp_path, 4))
    assert died.returncode == -signal.SIGKILL
    label = f"cpu_{name}" if script.endswith("cpu") else name
    folder = tmp_path / FOLDER / "random_0.9" / label
    assert (folder / "resume.pth").exists() and not (folder / "unlearning_model.pth").exists()
    done = succeed(*command, "--resume", cwd=tmp_path)
    assert "goes on after epoch 3" in done.stdout
    assert weights(folder / "unlearning_model.pth") == weights(whole / "random_0.9" / label / "unlearning_model.pth")


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path):
    command = ["main_original_model.py", *TINY, "--wandb_mode", "disabled", "--num_epochs", 6]  # saves every 30 s only
    process = start(*command, cwd=tmp_path)
    for line in process.stdout:
        if "epoch 2/6" in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert "goes on after epoch" in succeed(*command, "--resume", cwd=tmp_path).stdout
    assert weights(tmp_path / FOLDER / "original_model.pth") == weights(whole / "original_model.pth")


def test_another_runs_state_is_not_resumed(tmp_path):
    command = ["main_original_model.py", *COMMON, "--num_epochs", 3]
    run_script(*command, cwd=tmp_path, python_path=dies_in_fsync(tmp_path, 2))
    other = run_script(*command, "--resume", "--learning_rate", 0.02, cwd=tmp_path)
    fails_in_one_line(other, "--resume", "resume.pth", "other flags")
    assert "goes on after epoch 1" in succeed(*command, "--resume", cwd=tmp_path).stdout


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(whole, tmp_path):
    """Whatever byte is damaged: the file is refused, or holds the very same weights."""
    content = (whole / "original_model.pth").read_bytes()
    expected = weights(whole / "original_model.pth")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (150,), generator=generator).tolist()
    path, refused = tmp_path / "damaged.pth", 0
    for place in [0, 1, 30, len(content) - 1, len(content) - 20, *places]:
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert weights(path) == expected, f"bit {bit} of byte {place}"
            except utils.UserError as error:
                refused += 1
                assert "damaged.pth" in str(error) and "\n" not in str(error)
    assert refused > 200


def test_a_checkpoint_cut_off_anywhere_is_refused(whole, tmp_path):
    content = (whole / "original_model.pth").read_bytes()
    path = tmp_path / "cut.pth"
    for length in [0, 1, 10, 100, len(content) // 3, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(utils.UserError, match="cut.pth"):
            utils.read_checkpoint(path)
