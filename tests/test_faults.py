"""Killed runs go on; damaged files are refused; nothing is lost and nothing is executed."""

import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY, fails_in_one_line, read_json, run_script, succeed

import utils
from models import checkpoint

COMMON = [*TINY, "--wandb_mode", "disabled", "--save_every", "0"]
FOLDER = "runs/resnet18w8_digits_seed1"
EVALUATE = ["--unlearn_name", "all", "--resplits", "2", "--alphas", "0.1", "--no_pictures"]


def weights(path):
    return checkpoint.weights_hash(checkpoint.read(path)[0])


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
    assert "after epoch" in done.stdout
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
    assert "after epoch 3" in done.stdout
    assert weights(folder / "unlearning_model.pth") == weights(whole / "random_0.9" / label / "unlearning_model.pth")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(sent, whole, tmp_path):
    command = ["main_original_model.py", *TINY, "--wandb_mode", "disabled", "--num_epochs", 6]  # saves every 30 s only
    process = start(*command, cwd=tmp_path)
    for line in process.stdout:
        if "epoch 2/6" in line:
            break
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert "after epoch" in succeed(*command, "--resume", cwd=tmp_path).stdout
    assert weights(tmp_path / FOLDER / "original_model.pth") == weights(whole / "original_model.pth")


def test_another_runs_state_is_not_resumed(tmp_path):
    command = ["main_original_model.py", *COMMON, "--num_epochs", 3]
    run_script(*command, cwd=tmp_path, python_path=dies_in_fsync(tmp_path, 2))
    other = run_script(*command, "--resume", "--learning_rate", 0.02, cwd=tmp_path)
    fails_in_one_line(other, "--resume", "resume.pth", "other flags")
    assert "after epoch 1" in succeed(*command, "--resume", cwd=tmp_path).stdout


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
            checkpoint.read(path)


# ---------------------------------------------------------------- the disk, and other runs


def fsync_says(tmp_path, number, code):
    """A Python path on which the disk refuses a process's ``number``-th file and all that follow."""
    path = tmp_path / f"refuses{number}"
    path.mkdir()
    (path / "sitecustomize.py").write_text(
        "import errno, os\n"
        f"left = [{number}]\n"
        "plain = os.fsync\n"
        "def fsync(file):\n"
        "    left[0] -= 1\n"
        "    if left[0] <= 0:\n"
        f"        raise OSError(errno.{code}, os.strerror(errno.{code}))\n"
        "    plain(file)\n"
        "os.fsync = fsync\n"
    )
    return path


def test_a_disk_that_fills_up_loses_nothing(whole, tmp_path):
    """While a state is saved, and again while the model is: what was there stays, and --resume goes on."""
    command = ["main_original_model.py", *COMMON, "--num_epochs", 6]
    folder = tmp_path / FOLDER
    died = run_script(*command, cwd=tmp_path, python_path=fsync_says(tmp_path, 3, "ENOSPC"))
    fails_in_one_line(died, "resume.pth", "No space left on device", "unchanged")
    assert checkpoint.read_state(folder / "resume.pth")["epoch"] == 2
    died = run_script(*command, "--resume", cwd=tmp_path, python_path=fsync_says(tmp_path, 5, "ENOSPC"))
    fails_in_one_line(died, "original_model.pth", "No space left on device")
    assert not (folder / "original_model.pth").exists() and not list(folder.glob("*.part"))
    succeed(*command, "--resume", cwd=tmp_path)
    assert weights(folder / "original_model.pth") == weights(whole / "original_model.pth")


def test_a_full_tmpfs(whole, tmp_path):
    """A real disk of 1 MB, where the system lets a test mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs; the tests above and below have their disks fill without it")
    try:
        command = ["main_original_model.py", *COMMON, "--num_epochs", 1, "--runs_dir", small / "runs"]
        fails_in_one_line(run_script(*command, cwd=tmp_path), str(small), "cannot hold")
        assert not [path for path in small.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_run_killed_between_its_last_files_is_finished_by_resume(whole, tmp_path):
    """The record and the history are there, the model is not: it takes its name last."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(
        "import os, signal\n"
        "plain = os.replace\n"
        "def replace(source, target):\n"
        "    if str(target).endswith('original_model.pth'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(source, target)\n"
        "os.replace = replace\n"
    )
    command = ["main_original_model.py", *COMMON, "--num_epochs", 6]
    folder = tmp_path / FOLDER
    assert run_script(*command, cwd=tmp_path, python_path=stub).returncode == -signal.SIGKILL
    assert (folder / "original_model.json").exists() and not (folder / "original_model.pth").exists()
    assert list(folder.glob("original_model.pth.*.part"))
    assert "after epoch 6" in succeed(*command, "--resume", cwd=tmp_path).stdout
    assert weights(folder / "original_model.pth") == weights(whole / "original_model.pth")
    assert not list(folder.glob("*.part")) and not (folder / "resume.pth").exists()


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused while the first is at work, which goes on undisturbed; a killed one leaves no lock."""
    command = ["main_original_model.py", *COMMON, "--num_epochs", 40]
    first = start(*command, cwd=tmp_path)
    wait_for(tmp_path / FOLDER / "resume.pth", first)
    first.send_signal(signal.SIGSTOP)  # else a fast machine may be done before the second has begun
    before = (tmp_path / FOLDER / "resume.pth").read_bytes()
    fails_in_one_line(run_script(*command, cwd=tmp_path), FOLDER, "another run", "--runs_dir")
    assert first.poll() is None and (tmp_path / FOLDER / "resume.pth").read_bytes() == before
    first.kill()
    first.communicate()
    assert "after epoch" in succeed(*command, "--resume", cwd=tmp_path).stdout


def test_what_another_run_finished_meanwhile_is_not_overwritten(whole, tmp_path):
    """Its result appears after the flags were checked and before the work begins."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(
        "import shutil\n"
        f"target = {str(tmp_path / FOLDER / 'original_model.pth')!r}\n"
        "import filelock\n"
        "acquire = filelock.FileLock.acquire\n"
        "def late(*arguments, **keywords):\n"
        f"    shutil.copy({str(whole / 'original_model.pth')!r}, target)\n"
        "    return acquire(*arguments, **keywords)\n"
        "filelock.FileLock.acquire = late\n"
    )
    other = run_script("main_original_model.py", *COMMON, "--num_epochs", 2, cwd=tmp_path, python_path=stub)
    fails_in_one_line(other, "different settings", "num_epochs: 6", "--overwrite")
    assert weights(tmp_path / FOLDER / "original_model.pth") == weights(whole / "original_model.pth")


def test_half_written_records_are_replaced_or_left_out(whole, tmp_path):
    shutil.copytree(whole, tmp_path / FOLDER)
    scenario = tmp_path / FOLDER / "random_0.9"
    results = scenario / "salun/results.json"
    results.write_text(results.read_text()[:100])
    (scenario / "GA").mkdir()
    for text in ('{"forget_set": "5', "[]", '{"error": 1}'):
        (scenario / "GA/failure.json").write_text(text)
        done = succeed("main_evaluate.py", *TINY, "--wandb_mode", "disabled", *EVALUATE, cwd=tmp_path)
        assert "GA/failure.json: damaged, and left out" in done.stdout
    assert read_json(results)["method"] == "salun" and "conformal" in read_json(results)["metrics"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    """Root may write anywhere but to /proc; others are held by the folder's mode."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    where = "/proc/runs" if os.access(closed, os.W_OK) else closed / "runs"
    done = run_script("main_original_model.py", *COMMON, "--runs_dir", where, cwd=tmp_path)
    fails_in_one_line(done, str(where), "cannot hold")


# ---------------------------------------------------------------- downloads


@pytest.fixture
def broken_download(tmp_path):
    """A server on this machine that breaks off in the middle of every file, and a Python path that leads there."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0].endswith('main_original_model.py'):\n"
        "    from torchvision import datasets\n"
        f"    datasets.CIFAR10.url = 'http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz'\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    import utils\n"
        f"    utils.TINY_IMAGENET_URL = 'http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip'\n"
    )
    yield stub
    server.shutdown()


class BreaksOff(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"0" * 1000)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet"])
def test_a_download_that_breaks_off(name, broken_download, tmp_path):
    """The error names the data and the folder; nothing that looks complete is left; the next try downloads again."""
    command = ["main_original_model.py", *COMMON, "--data_name", name, "--data_dir", "data"]
    for _ in range(2):
        done = run_script(*command, cwd=tmp_path, python_path=broken_download)
        lines = [line for line in done.stderr.strip().splitlines() if "%|" not in line]  # the download's own bar
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert f"--data_name {name}" in lines[0] and "download failed" in lines[0] and "data" in lines[0]
        assert not list((tmp_path / "data").glob("*/")) and not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_locked_is_used_and_said_so(tmp_path, monkeypatch, capsys):
    """Some network file systems have no locks; what another run may be writing there stays."""

    def no_locks(*_, **__):
        raise NotImplementedError("flock")

    part = tmp_path / "original_model.pth.1.part"
    part.touch()
    with monkeypatch.context() as patch:
        patch.setattr(utils.FileLock, "acquire", no_locks)
        with utils.sole_writer(tmp_path):
            assert part.exists() and "cannot be locked" in capsys.readouterr().out
    with utils.sole_writer(tmp_path):
        assert not part.exists()
