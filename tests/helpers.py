"""What the tests share: ways to run a script, and what it leaves."""

import contextlib
import importlib
import io
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import distributed

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests/faults"
TINY = ["--width", "8", "--device", "cpu"]
QUIET = ["--wandb_mode", "disabled"]
COMMON = [*TINY, *QUIET]
PIPELINE_EVALUATION = ["--alphas", "0.05,0.1", "--cal_sizes", "100,200", "--resplits", "10"]

# A fork has all modules loaded. Windows cannot fork, and torch is not safe in forks on macOS.
forks = pytest.mark.skipif(sys.platform != "linux", reason="forks the test process; Linux only")


# ---------------------------------------------------------------- running scripts


def script_environment(cwd, fault=()):
    """The environment of a script: one thread, no GPU, no network, no wandb account.

    ``fault`` is the name of a file in tests/faults/ and the arguments of its ``install``.
    """
    private = ("WANDB", "PYTHONPATH", "FAULT")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(private)}
    environment |= {
        "HOME": str(cwd),
        "NETRC": str(Path(cwd) / "none"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if fault:
        arguments = json.dumps([str(argument) for argument in fault])
        environment |= {"PYTHONPATH": str(FAULTS), "FAULT": arguments}
    return environment


def start_script(script, *arguments, cwd, fault=(), program=(sys.executable,)):
    """Start a script in its own process. Returns the Popen object with pipes for its output."""
    return subprocess.Popen(
        [*program, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=script_environment(cwd, fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(script, *arguments, limit=300, **options):
    """:func:`start_script`, waited for. Returns the CompletedProcess with its output as text."""
    process = start_script(script, *arguments, **options)
    try:
        output = process.communicate(timeout=limit)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def run_in_process(script, *arguments, cwd):
    """Run a script as ``__main__`` in this process. Returns a CompletedProcess."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([script, *arguments], status, out.getvalue(), err.getvalue())


def fork_script(script, *arguments, cwd, before=None, env=None, encoding=None, root=ROOT):
    """Start :func:`run_in_process` in a fork of this process. Returns the process id.

    The fork has the environment of :func:`start_script`, calls ``before()`` first and writes to
    ``stdout.txt`` and ``stderr.txt`` in ``cwd``, in ``encoding``. Its start takes milliseconds,
    because everything is already imported.
    """
    for name in ("main_evaluate", "main_unlearn_cpu"):
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        environment = script_environment(cwd) | (env or {})
        os.environ.clear()
        os.environ.update(environment)
        with (
            open(cwd / "stdout.txt", "w", buffering=1, encoding=encoding) as out,
            open(cwd / "stderr.txt", "w", buffering=1, encoding=encoding) as err,
        ):
            try:
                with (
                    contextlib.redirect_stdout(out),
                    contextlib.redirect_stderr(err),
                    contextlib.chdir(cwd),
                ):
                    if before:
                        before()
                    sys.argv = [script, *map(str, arguments)]
                    runpy.run_path(str(root / script), run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc(file=err)
    finally:
        os._exit(status)  # the fork must not return to pytest


def run_forked(script, *arguments, cwd, encoding=None, **options):
    """:func:`fork_script`, waited for. A negative return code is the signal that ended the fork."""
    process = fork_script(script, *arguments, cwd=cwd, encoding=encoding, **options)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    out, err = (cwd / f"{name}.txt" for name in ("stdout", "stderr"))
    texts = [path.read_text(encoding) if path.exists() else "" for path in (out, err)]
    return subprocess.CompletedProcess([script, *arguments], status, *texts)


# ---------------------------------------------------------------- two processes


def _process(rank, function, folder, port):
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.join_processes(torch.device("cpu"))
    torch.save(function(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run_two_processes(function, folder):
    """What ``function()`` returns in each of two forks that gloo connects, as torchrun does.

    The results are tensors in lists and dicts, and are saved in ``folder``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"nprocs": 2, "start_method": "fork"}
    torch.multiprocessing.start_processes(_process, (function, folder, port), **options)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


class Shares:
    """Images of a test that give each process its share of a batch, as ``utils.Images`` do."""

    def __init__(self, images):
        self.images, self.labels, self.size = images, images.labels, images.size

    def batches(self, batches, augment=None):
        for indices in batches:
            yield from self.images.batches([distributed.local_rows(indices)], augment)


# ---------------------------------------------------------------- what a script did


def check(done):
    """``done``, after an assertion that its exit status is 0."""
    output = f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"{done.args}\n{output}"
    return done


def fails_in_one_line(done, *words):
    """Assert that a script ended with status 2 and one line on stderr with all of ``words``."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and ": error: " in lines[0], done.stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


def read_json(path):
    return json.loads(Path(path).read_text())


def read_weights(path):
    """The state_dict of a checkpoint, read by torch.load alone."""
    return torch.load(path, weights_only=True)["model"]


def same_weights(path, other):
    """Whether two checkpoints have bit-identical tensors."""
    first, second = read_weights(path), read_weights(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def visible_files(folder):
    """Names in a folder without those that begin with a dot."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# ---------------------------------------------------------------- flags and data


def training_parser():
    """A parser with the flags of the unlearning scripts but for the methods' options."""
    import utils

    parser = utils.make_parser("")
    utils.add_scenario_flags(parser, "", "original_model.pth", label=True)
    utils.add_training_flags(parser, "")
    return parser


def flags(**chosen):
    """Parsed flags: ``chosen``, and the default of every other flag."""
    args = training_parser().parse_args(["--unlearn_name", "all", *TINY])
    return Namespace(**vars(args) | chosen)


def write_pictures(root, train, test, side=8):
    """An image folder of two classes, the second one brighter, as PNG files of noise."""
    rng = np.random.default_rng(0)
    for subfolder, count in (("train", train), ("test", test)):
        for number in range(count):
            name = ("ant", "bee")[number % 2]
            path = root / subfolder / name / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 60 * (number % 2)
            pixels = rng.integers(low, low + 150, (side, side, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path)


def write_cifar10(folder, images_per_batch=30):
    """Small files in the format of the CIFAR-10 archive: five training batches, 200 test images."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        count = 200 if name == "test_batch" else images_per_batch
        labels = rng.integers(10, size=count)
        pixels = rng.integers(0, 80, size=(count, 3072)) + 17 * labels[:, None]
        batch = {"data": pixels.astype(np.uint8), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


# ---------------------------------------------------------------- the README


def read_markdown(name):
    """A Markdown file with every command that backslashes break over several lines on one line."""
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    joined = [" ".join(line.split()) if line.startswith("python") else line for line in lines]
    return "\n".join(joined) + "\n"


def readme_block(marker):
    """The code block that follows the comment ``marker`` in README.md or metrics/README.md."""
    for path in ("README.md", "metrics/README.md"):
        if (ROOT / path).exists() and f"<!-- {marker} -->" in (text := read_markdown(path)):
            return text.split(f"<!-- {marker} -->")[1].split("```")[1].partition("\n")[2]
    raise LookupError(f"no <!-- {marker} --> in README.md or metrics/README.md")
