"""What the four scripts share: errors, flags, seeds, data sets, splits, run folders and records."""

from __future__ import annotations

import os
import signal
import sys

# Ctrl-C during a script's imports ends it without a traceback.
if (
    os.path.basename(sys.argv[0]).startswith("main_")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# isort: split
import argparse
import codecs
import csv
import errno
import hashlib
import json
import logging
import math
import pickle
import platform
import posixpath
import re
import stat
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# ---------------------------------------------------------------- start-up

# Every script imports this module first, because these settings must precede the import of torch.
# OpenMP's idle threads spin by default. On a busy machine they take the cores from the thread that
# they wait for. With no spin at all, training on an idle machine would be 20 % slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

import models
from models import checkpoint, distributed
from models.checkpoint import write_file
from models.errors import (
    NotFinite,
    UserError,
    binary_kind,
    error_reason,
    first_line,
    printable,
)
from models.seeds import generator, permutation, seed_everything
from models.training import Diverged, Progress, Recipe, weights_are_finite

__all__ = ["generator", "permutation", "seed_everything"]  # imported from here, too

# ---------------------------------------------------------------- errors


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. The message explains what is saved, and how to resume an interrupted run."""


class Terminated(KeyboardInterrupt):
    """SIGTERM under torchrun, which sends it to all other processes when one has failed."""


def _interrupt(number, frame):
    if number == signal.SIGTERM and distributed.world_size() > 1:
        raise Terminated
    raise KeyboardInterrupt


def run_script(main):
    """Run a script's ``main`` and exit with its status.

    A UserError is one line on stderr and status 2. Ctrl-C and SIGTERM give status 130, a closed
    output pipe 141. With torchrun only the first process prints.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs ignore them
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # "?" for q̂, λ and ± on a terminal without Unicode
            stream.reconfigure(errors="replace")
    try:
        status = _exit_status(main)
        if distributed.world_size() > 1:  # torchrun's signal can come after the reason is printed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except KeyboardInterrupt as error:  # it came while another failure was being explained
        status = _report_interruption(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # Python flushes once more at exit, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 141
    if wandb_state.hung:  # wandb's exit handlers would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _exit_status(main):
    """The exit status of ``main()``. Errors that are not the program's fault are reported here."""
    try:
        with redirect_stdout(None) if distributed.rank() else nullcontext():
            status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except SystemExit as error:  # argparse ends --help this way
        return error.code or 0
    except BrokenPipeError:
        return 141  # what a shell reports for SIGPIPE
    except UserError as error:
        return _report(f"error: {error}", 2)
    except KeyboardInterrupt as error:
        return _report_interruption(error)
    except (RuntimeError, ConnectionError, MemoryError) as error:
        if _is_out_of_memory(error):
            remedy = "lower --batch_size, --image_size, --memory_gb or --workers"
            reason = f"out of memory ({first_line(error)}); {remedy}"
            return _report(f"error: {reason}; --resume continues an interrupted training", 2)
        if distributed.world_size() > 1 and _is_from_another_rank(error):
            reason = str(error).strip().splitlines()[-1][:100]
            failure = f"another rank failed or stopped responding ({reason})"
            return _report(f"error: {failure}; continue with --resume", 1)
        raise
    except OSError as error:  # permissions, paths that are too long, full or failing disks
        if error.filename is None:
            raise
        path = printable(error.filename)
        return _report(f"error: {path}: cannot be used ({error_reason(error)})", 2)


def _report(message, status):
    """Print the one line that a script ends with, and return the status.

    A mistake in the flags occurs on every rank. The other ranks wait until the first one has
    reported it and torchrun stops them, so that it is printed once.
    """
    line = f"{Path(sys.argv[0]).name}: {message}"
    if distributed.rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        line = f"[process {distributed.rank()}] {line}"
    elif distributed.world_size() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until the line is printed
    characters = (char if char.isprintable() else ascii(char)[1:-1] for char in line)
    print("".join(characters), file=sys.stderr, flush=True)
    return status


def _report_interruption(error):
    if _was_terminated(error):
        remedy = str(error) or "pass --resume to continue"
        return _report(f"error: another rank failed, or torchrun was ended; {remedy}", 1)
    return _report(f"interrupted; {str(error) or 'finished results are kept'}", 130)


def _was_terminated(error):
    """Whether an exception is :class:`Terminated`, or was raised while one was handled."""
    while error is not None and not isinstance(error, Terminated):
        error = error.__context__
    return error is not None


def _is_from_another_rank(error):
    return isinstance(error, dist.DistError | ConnectionError) or "gloo" in str(error).lower()


def _is_out_of_memory(error):
    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


# ---------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults of flags with a value, and keeps the line breaks of description and epilog."""

    def _get_help_string(self, action):
        if action.default in (None, False) or action.required:
            return action.help
        return super()._get_help_string(action)


def number(kind, minimum=None, maximum=None, *, exclusive=False):
    """An argparse type: a finite number within bounds. ``exclusive`` excludes the bounds."""
    bounds = []
    if minimum is not None:
        bounds.append(f"{'above' if exclusive else 'at least'} {minimum}")
    if maximum is not None:
        bounds.append(f"{'below' if exclusive else 'at most'} {maximum}")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        low = minimum is not None and (value < minimum or (exclusive and value == minimum))
        high = maximum is not None and (value > maximum or (exclusive and value == maximum))
        if low or high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds) or 'finite'}")
        return value

    return parse


def list_of(parse_item):
    """An argparse type: comma-separated values without duplicates."""

    def parse(text):
        items = [parse_item(item) for item in text.split(",") if item.strip()]
        if not items:
            raise argparse.ArgumentTypeError("the list is empty")
        if len(set(items)) < len(items):
            raise argparse.ArgumentTypeError(f"{text} names a value twice")
        return items

    return parse


def one_of(names):
    """An argparse type: one of ``names``."""

    def parse(text):
        if text.strip() not in names:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(names)}")
        return text.strip()

    return parse


def expand_path(text):
    """An argparse type: a path. A leading ``~`` is the home directory, also in ``--flag=~/x``."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        remedy = f"write ./{text} for a file of that name"
        raise argparse.ArgumentTypeError(f"{text}: no such user; {remedy}")
    return expanded


ALPHA = number(float, 0, 1, exclusive=True)
SEED = number(int, 0, 2**32 - 1)


def make_parser(description, epilog=None):
    """A parser with the flags that all four scripts share: model, data, run."""
    options = {"epilog": epilog, "formatter_class": _HelpFormatter, "allow_abbrev": False}
    parser = _Parser(description=description, **options)
    _add_model_flags(parser.add_argument_group("model"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_run_flags(parser.add_argument_group("run"))
    return parser


def _add_model_flags(group):
    add = group.add_argument
    names = "resnet18 (for small images), vit, or the name of a timm model"
    add("--model_name", default="resnet18", help=names)
    width = "number of channels in resnet18's first stage"
    add("--width", type=number(int, 1, 512), default=64, help=width)
    size = "resize images to this side length in pixels; default: the data's own (resnet18)"
    add("--image_size", type=number(int, 1, 4096), help=f"{size} or 224 (vit)")
    path = "file with ImageNet weights for vit or a timm model, instead of a download"
    add("--pretrained_path", type=expand_path, help=path)
    random = "start vit or a timm model from random weights"
    add("--no_pretrained", action="store_true", help=random)


def _add_data_flags(group):
    add = group.add_argument
    add("--data_name", choices=DATA_NAMES, default="digits", help="data set")
    folder = "folder of the data set; downloads go there"
    add("--data_dir", type=expand_path, default="./data", help=folder)
    classes = "number of classes, checked against the data; default: inferred from the data"
    add("--num_classes", type=number(int, 2), help=classes)
    files = "image_folder, tiny_imagenet:"
    memory = f"{files} stream data sets larger than this from disk"
    add("--memory_gb", type=number(float, 0), default=8.0, metavar="GB", help=memory)
    workers = "number of processes that read image files; results do not depend on it"
    add("--workers", type=number(int, 0, 1024), default=os.cpu_count(), help=workers)
    add("--skip_corrupt", action="store_true", help=f"{files} skip images that cannot be read")


def _add_run_flags(group):
    add = group.add_argument
    add("--seed", type=SEED, default=1, help="random seed for the split and for training")
    split_seed = "seed of the split: the forget set and the division of the held-out images"
    add("--split_seed", type=SEED, help=f"{split_seed}; default: the seed")
    seeds = "comma-separated seeds, e.g. 1,2,3 (overrides --seed)"
    add("--seeds", type=list_of(SEED), help=seeds)
    device = "auto (CUDA if there is a GPU, else CPU), cpu, cuda, cuda:1, ..., mps"
    add("--device", default="auto", help=device)
    add("--runs_dir", type=expand_path, default="./runs", help="folder for all results")
    wandb = "default: online if logged in to wandb, else offline"
    add("--wandb_mode", choices=["online", "offline", "disabled"], help=wandb)


def add_training_flags(parser, defaults):
    """Flags of the training loop. ``defaults`` describes the default recipe."""
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=number(int, 3), help=f"images per step; {defaults}")
    add("--num_epochs", type=number(int, 1), help=f"number of epochs; {defaults}")
    rate = f"initial learning rate; {defaults}"
    add("--learning_rate", type=number(float, 0, exclusive=True), help=rate)
    schedule = (
        "epochs at which the rate is divided by 10, e.g. 91,136; default: cosine decay to zero"
    )
    add("--milestones", type=list_of(number(int, 1)), help=schedule)
    precision = "precision of the network in training; auto: bf16 on a GPU that supports it, else"
    choices = ["auto", "fp32", "tf32", "bf16"]
    text = f"{precision} fp32; losses and scores are always fp32"
    add("--precision", choices=choices, default="auto", help=text)
    compiled = "compile the network with torch.compile, with CUDA graphs on a GPU"
    add("--compile", action="store_true", help=compiled)
    add("--overwrite", action="store_true", help="replace results that already exist")
    jobs = "number of runs (methods and seeds) at a time, in processes that share the CPU cores"
    add("--jobs", type=number(int, 1, 1024), default=1, metavar="N", help=f"{jobs} or GPUs")
    resume = "resume an interrupted run; the result is identical to an uninterrupted one"
    add("--resume", action="store_true", help=resume)
    seconds = "minimum seconds between resume checkpoints"
    add("--save_every", type=number(float, 0), default=30.0, metavar="SECONDS", help=seconds)


def describe_recipes():
    """Epochs and learning rate of each data set, for --help."""
    lines = []
    for name, spec in SPECS.items():
        lines.append(f"  {name:16}  {spec.num_epochs} epochs at {spec.learning_rate:g}")
    return "\n".join(lines)


def add_scenario_flags(parser, methods, model_dir):
    """Flags that define what is forgotten and with which methods."""
    add = parser.add_argument_group("unlearning").add_argument
    names = f"one or more of {methods}, or all"
    add("--unlearn_name", nargs="+", required=True, metavar="METHOD", help=names)
    add("--unlearn_type", choices=SCENARIOS, default="random", help="what to forget")
    ratio = "random: fraction of the training images to retain"
    add("--retain_ratio", type=float, default=0.9, help=ratio)
    classes = "class, subclass: names or numbers, e.g. 3 or cat,dog; default: drawn from the seed"
    add("--forget_class", help=classes)
    lines = "list: text file with one training index per line, or for image_folder one file name"
    add("--forget_list", type=expand_path, help=f"{lines} (class/image.jpg) per line")
    path = "model file: a bare name is in the run folder that the other flags imply, anything with"
    add("--model_dir", type=expand_path, default=model_dir, help=f"{path} a slash is a path")


def split_names(items):
    """The names in ``--unlearn_name``, separated by blanks or commas."""
    return [name for item in items for name in item.split(",") if name]


def method_names(items, known, prefix=""):
    """The methods of ``--unlearn_name``, of which ``all`` is every known one.

    A name that is unknown is tried with ``prefix``. Raises UserError for unknown names.
    """
    names = split_names(items)
    if "all" in names:
        names = list(known)
    names = list(dict.fromkeys(name if name in known else prefix + name for name in names))
    if not names or not set(names) <= set(known):
        choices = ", ".join(known) or "nothing yet"
        raise UserError(f"--unlearn_name {' '.join(items)}: choose from {choices}, or all")
    return names


# ---------------------------------------------------------------- seeds and device


def each_seed(args):
    """The flags once per seed of --seeds, or once with --seed."""
    for seed in args.seeds or [args.seed]:
        yield argparse.Namespace(**vars(args) | {"seed": seed})


def check_jobs(args):
    """Raise UserError for --jobs under torchrun, where several processes make one run."""
    if args.jobs > 1 and distributed.world_size() > 1:
        raise UserError("--jobs under torchrun: omit one of them; torchrun divides every run")


def job_title(args):
    """How the lines of a run start that shares the output with others: by its seed, if several."""
    return f"seed {args.seed}: " if args.seeds else ""


def split_seed(args):
    """The seed of the split: --split_seed, else the seed."""
    return args.seed if args.split_seed is None else args.split_seed


def pick_device(args):
    """The device of ``--device``, prepared for ``--precision``. Joins the ranks under torchrun.

    Raises UserError for a device that does not exist.
    """
    device = _find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        tf32 = getattr(args, "precision", None) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    distributed.join_processes(device)
    return device


def _find_device(flag):
    name = flag
    if flag == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            remedy = "torchrun assigns each process its own GPU; use --device cuda"
            raise UserError(f"--device {name}: {remedy}")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not one of cpu, cuda and mps")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("this machine has no Apple GPU, or this torch does not support it")
        return torch.empty(1, device=device).device  # "cuda" with the number of the GPU
    except Exception as error:  # each backend raises its own kind
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"--device {name}: {reason}; use --device cpu or auto") from error


def pick_precision(args, device):
    """``--precision``. ``auto`` is bf16 on a GPU that supports it, else fp32."""
    if args.precision != "auto":
        return args.precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


# ---------------------------------------------------------------- data sets


@dataclass(frozen=True)
class DataSpec:
    """Constants of a data set: normalisation, augmentation, and training from scratch."""

    mean: tuple
    std: tuple
    crop_padding: int = 4
    flip: bool = True
    grayscale: float = 0.1
    num_epochs: int = 200
    learning_rate: float = 0.1


# A mirrored digit is another symbol. Of 8 pixels, 1 is the share that 4 is of CIFAR's 32. In 20
# epochs of 13 steps a learning rate of 0.1 does not converge (test accuracy 91 %, at 0.01 98.7 %).
_DIGITS = {"crop_padding": 1, "flip": False, "grayscale": 0.0}
_DIGITS |= {"num_epochs": 20, "learning_rate": 0.01}
SPECS = {
    "digits": DataSpec((0.3053,) * 3, (0.3759,) * 3, **_DIGITS),
    "cifar10": DataSpec((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DataSpec((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar20": DataSpec((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": DataSpec((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    # ImageNet's constants: statistics of the folder would remember the images to be forgotten.
    "image_folder": DataSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DATA_NAMES = tuple(SPECS)
SCENARIOS = ("random", "class", "subclass", "list")
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass
class Data:
    """A data set: training images, held-out images, class names, and a tag for folder names.

    ``subclass_names`` are the fine classes inside the classes, if there are any. ``train_folder``
    is the folder that the training images' names are relative to, if they are files. The
    fingerprint has three parts: labels and names of the training images, contents of the training
    images, and labels, names and contents of the held-out images.
    """

    train: Images
    held_out: Images
    classes: list[str]
    tag: str
    subclass_names: list[str] | None = None
    train_folder: str | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self):
        held_out = f"{_hash_labels(self.held_out)} {_hash_contents(self.held_out)}"
        hashes = [_hash_labels(self.train), _hash_contents(self.train)]
        hashes.append(hashlib.sha256(held_out.encode()).hexdigest())
        self.fingerprint = "-".join(digest[:16] for digest in hashes)

    def difference(self, fingerprint):
        """Which images differ from those of another fingerprint, in words; None if all are equal.

        Old fingerprints have only the first part. The other parts are then not compared.
        """
        names = ["other training images", "training images of other content"]
        names.append("other held-out images")
        if not isinstance(fingerprint, str) or fingerprint.count("-") not in (0, 2):
            return names[0]
        theirs, ours = fingerprint.split("-"), self.fingerprint.split("-")
        for name, their_hash, our_hash in zip(names, theirs, ours, strict=False):
            if their_hash != our_hash:
                return name
        return None


def _hash_labels(images):
    digest = hashlib.sha256(images.labels.cpu().numpy().astype("<i8").tobytes())
    digest.update("\n".join(images.names or ()).encode())
    return digest.hexdigest()


def _hash_contents(images):
    """A hash of the image files, else of all bytes of the pixels."""
    if images.contents:
        return images.contents
    return hashlib.sha256(images.pixels.detach().cpu().contiguous().numpy()).hexdigest()


_loaded_data = []


def load_data_once(args, device, model_side=None):
    """:func:`load_data` for a process of --jobs, all calls of which have the flags of one command.

    Its messages are those of the process that started it, and are not printed again.
    """
    if not _loaded_data:
        with redirect_stdout(None):
            _loaded_data.append(load_data(args, device, model_side))
    return _loaded_data[0]


def load_data(args, device, model_side=None):
    """The data set that the flags name, on ``device``.

    ``model_side`` is the side length in pixels that the model was made for, None if it takes any.
    Raises UserError for missing or contradictory data.
    """
    loaders = {"digits": _load_digits, "image_folder": _load_folder}
    load = (loaders | {"tiny_imagenet": _load_tiny_imagenet}).get(args.data_name, _load_cifar)
    data = distributed.first_process_first(lambda: load(args, model_side))
    if args.num_classes not in (None, len(data.classes)):
        reason = f"{args.data_name} has {len(data.classes)} classes; leave the flag out"
        raise UserError(f"--num_classes {args.num_classes}: {reason}")
    size = args.image_size or model_side or data.train.pixels.shape[-1]
    try:
        data.train.prepare(device, size)
        data.held_out.prepare(device, size)
    except torch.OutOfMemoryError as error:
        resizable = args.data_name == "image_folder" and not args.image_size
        remedy = "lower it, or set --image_size" if resizable else "lower it"
        reason = f"the images do not fit on {device}; {remedy}"
        raise UserError(f"--memory_gb {args.memory_gb:g}: {reason}") from error
    return data


def _load_digits(args, model_side):
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = torch.from_numpy((scans.images * 255 / 16).round().astype(np.uint8))
    pixels = pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(scans.target.astype(np.int64))
    # The scans are ordered by writer and have no test set: a fixed permutation holds out 1,000.
    order = torch.from_numpy(permutation(0, "digits", len(labels)))

    train, held_out = (
        Images(pixels[indices], labels[indices], SPECS["digits"], size=8)
        for indices in (order[1000:].sort().values, order[:1000].sort().values)
    )
    return Data(train, held_out, [str(digit) for digit in range(10)], tag="digits")


def _load_cifar(args, model_side):
    from torchvision import datasets

    kind = datasets.CIFAR10 if args.data_name == "cifar10" else datasets.CIFAR100
    try:
        train, held_out = (kind(args.data_dir, train=flag, download=True) for flag in (True, False))
    except (OSError, RuntimeError) as error:
        folder = Path(args.data_dir) / kind.base_folder
        state = "incomplete or damaged" if os.path.lexists(folder) else "missing"
        problem = f"{printable(folder)} is {state}"
        raise _download_error(args, problem, kind.filename, error=error) from error

    def images(dataset):
        pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(dataset.targets)
        return Images(pixels, labels, SPECS[args.data_name], size=32)

    classes, train, held_out = list(train.classes), images(train), images(held_out)
    if args.data_name != "cifar20":
        return Data(train, held_out, classes, tag=args.data_name)
    superclasses = _group_by_superclass(train, held_out, args)
    return Data(train, held_out, superclasses, tag="cifar20", subclass_names=classes)


def _download_error(args, problem, file, *, error):
    reason, folder = printable(error_reason(error)), printable(args.data_dir)
    remedy = f"put {file} into {folder} by hand, or check the network and the folder's permissions"
    failure = f"{problem}, and the download failed ({reason})"
    return UserError(f"--data_name {args.data_name}: {failure}; {remedy}")


def _group_by_superclass(train, held_out, args):
    """Turn CIFAR-100 into CIFAR-20: the archive's coarse labels become the labels.

    Returns the names of the superclasses. torchvision has just checked the files' checksums.
    """
    folder = Path(args.data_dir) / "cifar-100-python"

    def read(name):
        with open(folder / name, "rb") as file:
            return pickle.load(file, encoding="latin1")

    for images, name in ((train, "train"), (held_out, "test")):
        images.subclasses, images.labels = images.labels, torch.tensor(read(name)["coarse_labels"])
    return read("meta")["coarse_label_names"]


def _load_tiny_imagenet(args, model_side):
    root = Path(args.data_dir) / "tiny-imagenet-200"
    if not os.path.isdir(root):
        _download_tiny_imagenet(args, root)
    try:
        classes, train, held_out = _list_tiny_imagenet(root)
    except (OSError, ValueError) as error:
        path = printable(getattr(error, "filename", None) or root)
        if isinstance(error, PermissionError):
            reason = f"cannot be read ({error_reason(error)}); check its permissions"
            raise UserError(f"{path}: {reason}") from error
        reason = f"incomplete ({printable(str(error))}); remove the folder to extract it again"
        raise UserError(f"{printable(root)}: {reason}") from error
    train, held_out = _read_images(train, held_out, 64, args)
    folder = str(root / "train")
    return Data(train, held_out, classes, tag="tiny_imagenet", train_folder=folder)


def _download_tiny_imagenet(args, root):
    """Extract the archive to a temporary folder, so that ``root`` is complete or does not exist."""
    from torchvision.datasets.utils import download_and_extract_archive as download

    try:
        Path(args.data_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.data_dir, suffix=".part") as folder:
            download(TINY_IMAGENET_URL, args.data_dir, folder, md5=TINY_IMAGENET_MD5)
            (Path(folder) / root.name).rename(root)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        problem = f"not in {printable(args.data_dir)}"
        raise _download_error(args, problem, "tiny-imagenet-200.zip", error=error) from error


def _list_tiny_imagenet(root):
    """Class names, and lists of training samples (train/<wnid>/images/) and validation samples.

    Raises OSError or ValueError for an incomplete folder.
    """

    def lines(name):
        return (root / name).read_text(encoding="utf-8").splitlines()

    wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    words = dict(line.split("\t")[:2] for line in lines("words.txt") if "\t" in line)
    rows = [line.split("\t")[:2] for line in lines("val/val_annotations.txt")]
    names = sorted((f"val/images/{name}", wnids.index(wnid)) for name, wnid in rows)
    held_out = [Sample(root / name, name, label) for name, label in names]
    train = []
    for label, wnid in enumerate(wnids):
        folder = f"{wnid}/images"
        files = [name for name in os.listdir(root / "train" / folder) if name.endswith(".JPEG")]
        if not files:
            raise ValueError(f"no images in train/{folder}")
        for name in sorted(name for name in files if not name.startswith(".")):
            train.append(Sample(root / "train" / folder / name, f"{folder}/{name}", label))
    if not train or not held_out:
        raise ValueError("no images")
    first_words = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    classes = [
        word if first_words.count(word) == 1 else f"{word} ({wnid})"
        for word, wnid in zip(first_words, wnids, strict=True)
    ]
    return classes, train, held_out


# ---------------------------------------------------------------- images in memory and on disk


class ReadBatch(NamedTuple):
    """Pixels uint8 M×3×side×side, and the UserErrors of images that cannot be read, by their index.

    Those images are black.
    """

    pixels: np.ndarray
    errors: dict


class ImageFiles(torch.utils.data.Dataset):
    """Images in files, read as uint8 3×side×side by ``workers`` processes."""

    def __init__(self, paths, side, workers):
        self.paths, self.side, self.workers = paths, side, workers

    @property
    def shape(self):
        return len(self.paths), 3, self.side, self.side

    def __getitem__(self, index):
        return _read_image(self.paths[index], self.side)

    def __getitems__(self, indices):
        """A :class:`ReadBatch`, in a worker.

        The pixels are a NumPy array because tensors would need shared memory, which containers
        often lack. Errors are values because a worker would put theirs into a traceback.
        """
        pixels = np.zeros((len(indices), *self.shape[1:]), np.uint8)
        errors = {}
        for row, index in enumerate(indices):
            try:
                pixels[row] = self[index]
            except UserError as error:
                errors[index] = error
        return ReadBatch(pixels, errors)

    def batches(self, index_batches):
        """The pixels of each of ``index_batches`` (tensors), read ahead by worker processes.

        Raises UserError for an image that cannot be read.
        """
        with closing(self._read([indices.tolist() for indices in index_batches])) as read:
            for pixels, errors in read:
                for error in errors.values():
                    raise error
                yield torch.from_numpy(pixels)

    def read_all(self, *, into=None, skip_corrupt=False):
        """Read every image, and write its pixels to the tensor ``into`` if there is one.

        Returns {index: UnreadableImage}. Raises the first error unless ``skip_corrupt``.
        """
        count = max(1, min(64, 2**24 // (3 * self.side**2)))  # at most 16 MB wait in each worker
        batches = torch.arange(len(self.paths)).split(count)
        unreadable = {}
        with closing(self._read([indices.tolist() for indices in batches])) as read:
            for indices, (pixels, errors) in zip(batches, read, strict=True):
                for error in errors.values():
                    if not skip_corrupt or not isinstance(error, UnreadableImage):
                        raise error
                unreadable |= errors
                if into is not None:
                    into[indices] = torch.from_numpy(pixels)
        return unreadable

    def _read(self, index_batches):
        workers = min(self.workers, len(index_batches))
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=index_batches,
            num_workers=workers if len(index_batches) > 1 else 0,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # the default is the global one, which dropout draws from
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = f"a data-loading worker died ({first_line(error)}); try fewer --workers"
            raise UserError(reason) from error


def _unchanged(batch):
    return batch


@dataclass
class Images:
    """Images as one uint8 tensor N×3×H×W on the training device or as :class:`ImageFiles`.

    ``labels`` are int64 N, ``names`` file names, ``subclasses`` the int64 numbers N of the fine
    classes inside the labels, if the data has any. Batches have ``size``×``size`` pixels.
    ``contents`` is a hash of the image files, if they are files.
    """

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor
    spec: DataSpec
    size: int
    names: list[str] | None = None
    subclasses: torch.Tensor | None = None
    contents: str | None = None

    def __len__(self):
        return len(self.labels)

    def prepare(self, device, size):
        """Move the tensors to ``device`` and set the size of the batches."""
        self.size = size
        for name in ("pixels", "labels", "subclasses"):
            if torch.is_tensor(tensor := getattr(self, name)):
                setattr(self, name, tensor.to(device))

    def batches(self, index_batches, augment=None):
        """Normalised float images B×3×size×size for each of ``index_batches`` (int64 tensors B).

        Each process gets its :func:`distributed.local_rows`. Images are augmented only with a
        generator in ``augment``.
        """
        index_batches, device = list(index_batches), self.labels.device
        source = self._pixels([distributed.local_rows(indices) for indices in index_batches])
        # On a GPU, augmenting 64 small images takes as long as 4,096: several batches share a call.
        together = 1
        if augment is not None and device.type == "cuda":
            together = max(1, 2**22 // (self.size**2 * max(1, len(index_batches[0]))))
        for start in range(0, len(index_batches), together):
            group = index_batches[start : start + together]
            pixels = torch.cat([next(source) for _ in group]) if together > 1 else next(source)
            if pixels.shape[-2:] != (self.size, self.size):
                pixels = transforms.resize(pixels, [self.size, self.size], antialias=True)
            if augment is not None:
                sizes = [len(indices) for indices in group]
                pixels = random_augment(pixels, self.spec, augment, batch_sizes=sizes)
            mean, std = _constants(self.spec, device)
            images = pixels.float().mul_(1 / 255).sub_(mean).div_(std)
            yield from images.split([len(distributed.local_rows(indices)) for indices in group])

    def batch(self, indices, augment=None):
        """The one batch of :meth:`batches` for ``indices``."""
        return next(self.batches([indices], augment))

    def _pixels(self, index_batches):
        if torch.is_tensor(self.pixels):
            return (self.pixels.index_select(0, indices) for indices in index_batches)
        device = self.labels.device
        read = self.pixels.batches(index_batches)
        return (pixels.to(device, non_blocking=True) for pixels in read)


@cache
def _constants(spec, device):
    """Mean and standard deviation on the device, copied once: each copy would wait for the GPU."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std)]


def random_augment(pixels, spec, rng, batch_sizes=None):
    """Random crop after zero padding, horizontal flip (p = 0.5) and grayscale, for each image.

    Pixels B×3×S×S, uint8 in and float32 out (0 to 255). ``rng`` is a generator on their device.
    With ``batch_sizes``, the pixels are this process's :func:`distributed.local_rows` of batches of
    these sizes: every process draws for all images, so that the number of processes is irrelevant.
    """
    (count, channels, side, _), device = pixels.shape, pixels.device
    sizes = [count] if batch_sizes is None else batch_sizes
    padded_side = side + 2 * spec.crop_padding

    def draw(distribution, *bounds):
        numbers = distribution(*bounds, (sum(sizes), 1), generator=rng, device=device)
        if batch_sizes is None:
            return numbers
        return torch.cat([distributed.local_rows(rows) for rows in numbers.split(sizes)])

    def crop():
        return draw(torch.randint, 2 * spec.crop_padding + 1) + torch.arange(side, device=device)

    rows, columns = crop(), crop()
    if spec.flip:
        columns = torch.where(draw(torch.rand) < 0.5, columns.flip(1), columns)
    # Crop and flip in one gather: the position of each output pixel in the flattened padded image.
    positions = (rows[:, :, None] * padded_side + columns[:, None, :]).flatten(1)
    positions = positions[:, None].expand(-1, channels, -1)
    padded = F.pad(pixels, [spec.crop_padding] * 4).flatten(2)
    pixels = padded.gather(2, positions).unflatten(2, (side, side)).float()
    if spec.grayscale:
        gray = (draw(torch.rand)[:, :, None, None] < spec.grayscale).float()
        # Exact for whole numbers and weights of 0 and 1, and several times as fast as torch.where.
        pixels.lerp_(transforms.rgb_to_grayscale(pixels).floor_(), gray)
    return pixels


class Sample(NamedTuple):
    """An image file, its name in messages and forget lists, and its class."""

    path: str
    name: str
    label: int


def _read_images(train, held_out, side, args):
    """:class:`Images` of two lists of samples: in memory, or as files beyond --memory_gb.

    Raises UserError for an image that cannot be read, unless --skip_corrupt leaves it out.
    """
    samples = train + held_out
    files = ImageFiles([sample.path for sample in samples], side, args.workers)
    gigabytes = math.prod(files.shape) / 1e9
    pixels, unreadable = None, {}
    if gigabytes > args.memory_gb:
        limit = f"more than --memory_gb {args.memory_gb:g}"
        reason = f"{gigabytes:.2f} GB of pixels, {limit}; images are streamed from disk"
        print(f"{printable(args.data_dir)}: {reason}")
    else:
        pixels = _allocate(files, args)
    if pixels is not None or args.skip_corrupt:
        unreadable = files.read_all(into=pixels, skip_corrupt=args.skip_corrupt)

    def loaded(indices):
        readable = [index for index in indices if index not in unreadable]
        _check_readable(samples, indices, readable, args)
        subset = ImageFiles([samples[index].path for index in readable], side, args.workers)
        contents = _hash_files(subset.paths)
        if pixels is not None:
            whole = len(readable) == len(indices)  # no copy is needed
            subset = pixels[indices.start : indices.stop] if whole else pixels[readable]
        labels = torch.tensor([samples[index].label for index in readable])
        names = [samples[index].name for index in readable]
        spec = SPECS[args.data_name]
        return Images(subset, labels, spec, size=side, names=names, contents=contents)

    divided = loaded(range(len(train))), loaded(range(len(train), len(samples)))
    if unreadable:
        count = f"{len(unreadable)} unreadable image{'s' if len(unreadable) > 1 else ''}"
        names = [samples[index].name for index in unreadable]
        print(f"--skip_corrupt: skipping {count}: {_some(names)}")
    return divided


def _allocate(files, args):
    try:
        return torch.zeros(files.shape, dtype=torch.uint8)
    except RuntimeError as error:
        size = f"{len(files.paths)} images of {files.side}×{files.side} pixels"
        reason = f"not enough memory for {size}; lower it, or --image_size"
        raise UserError(f"--memory_gb {args.memory_gb:g}: {reason}") from error


def _check_readable(samples, indices, readable, args):
    """Raise UserError if a class has images, but no readable one."""
    folder = printable(args.data_dir)
    if not readable:
        raise UserError(f"--skip_corrupt: none of {len(indices)} images in {folder} can be read")
    labels = {samples[index].label for index in readable}
    for index in indices:
        if samples[index].label not in labels:
            reason = f"no image of the class of {samples[index].name} in {folder} can be read"
            raise UserError(f"--skip_corrupt: {reason}")


def _common_side(paths, args, model_side):
    """The side length that all images share, else what the model was made for, else 64."""

    def size(path):
        try:
            return _upright_size(path)
        except UnreadableImage:
            if not args.skip_corrupt:
                raise

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = set(pool.map(size, paths)) - {None}
    if len(sizes) == 1 and len(set(*sizes)) == 1:
        return sizes.pop()[0]
    side = model_side or 64
    change = f"resizing and centre-cropping images of {len(sizes)} sizes to {side}×{side}"
    print(f"{printable(args.data_dir)}: {change} (--image_size)")
    return side


def _some(names, count=5):
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# ---------------------------------------------------------------- image folders


# Files and folders that programs create for themselves, besides all names that begin with a dot.
SYSTEM_NAMES = {"@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "__pycache__",
                "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
                "system volume information"}  # fmt: skip
BACKUP_ENDINGS = ("~", ".bak", ".old", ".orig", ".part", ".crdownload", ".swp", ".tmp")
# What people call the folders train/ and test/.
SUBSET_NAMES = {
    "train": {"train", "training", "trn", "train_set", "trainset", "training_set", "train_images",
              "images_train"},
    "test": {"test", "testing", "tst", "test_set", "testset", "test_images", "images_test", "val",
             "valid", "validation", "val_set", "validation_set", "dev", "eval", "evaluation",
             "holdout", "held_out"},
}  # fmt: skip


class Picture(NamedTuple):
    path: str
    class_name: str
    name: str


class FolderReader:
    """The pictures of an image folder ``root``, and why other files in it are left out.

    A real file counts once, however many links lead to it.
    """

    def __init__(self, root):
        self.root, self.left_out, self._first_uses = root, {}, {}

    def read(self, subset):
        """Class names and the list of pictures in root/subset/<class>/..., ordered as ImageFolder.

        Raises UserError for an unreadable folder, a class without pictures, and a file that is
        used twice.
        """
        pictures, classes = [], []
        folder = os.path.join(self.root, subset)
        for entry in _entries(folder):
            if self._is_system(entry):
                continue
            if not _is_folder(entry):
                self._leave_out("not in a class folder", entry.path)
                continue
            classes.append(entry.name)
            for identity, path in self._pictures(entry.path).items():
                self._check_first_use(path, identity, (subset, entry.name))
                pictures.append(Picture(path, entry.name, os.path.relpath(path, folder)))
        if empty := sorted(set(classes) - {picture.class_name for picture in pictures}):
            reason = f"no pictures in {subset}/{_some(list(map(printable, empty)))}"
            if self.left_out:
                reason += f" (left out: {self.summary()})"
            remedy = "remove an empty class from train/ and test/, or put its pictures there"
            raise UserError(f"--data_dir {printable(self.root)}: {reason}; {remedy}")
        return classes, pictures

    def summary(self):
        """What was left out, why and how many, with examples; "" for nothing."""
        reasons = []
        for reason, paths in self.left_out.items():
            names = [printable(os.path.relpath(path, self.root)) for path in paths]
            reasons.append(f"{len(names)} {reason} ({_some(names, 3)})")
        return "; ".join(reasons)

    def _pictures(self, folder):
        """{identity: path} of all pictures in a class folder and its subfolders."""
        files, pending, visited = [], [folder], {_identity(folder)}
        while pending:
            folder = pending.pop()
            for entry in _entries(folder):
                if self._is_system(entry):
                    continue
                if not _is_folder(entry):
                    if self._is_picture(entry):
                        files.append((folder, entry.name))
                elif (identity := _identity(entry.path)) in visited:
                    self._leave_out("links to folders that are read already", entry.path)
                else:
                    visited.add(identity)
                    pending.append(entry.path)
        pictures = {}
        for folder, name in sorted(files):
            path = os.path.join(folder, name)
            if pictures.setdefault(_identity(path), path) != path:
                self._leave_out("links to pictures that are read already", path)
        return pictures

    def _is_system(self, entry):
        name = entry.name.casefold()
        if name in SYSTEM_NAMES or name.startswith(".") or name.endswith(BACKUP_ENDINGS):
            self._leave_out("hidden, system or backup files or folders", entry.path)
            return True
        return False

    def _is_picture(self, entry):
        """Whether a file is a picture: by its extension, or by its content if Pillow does not know
        the extension. A file with a known extension that cannot be read is an error later.
        """
        if os.path.splitext(entry.name)[1].lower() in _pillow().extensions:
            return True
        if _is_kind(entry.path, stat.S_ISREG) and _has_picture_content(entry.path):
            return True
        reason = "files that are not pictures, or of a format that Pillow cannot read"
        self._leave_out(reason, entry.path)
        return False

    def _leave_out(self, reason, path):
        self.left_out.setdefault(reason, []).append(path)

    def _check_first_use(self, path, identity, use):
        """Raise UserError if a file is already used in another class or subset, by any name."""
        first_path, first_use = self._first_uses.setdefault(identity, (path, use))
        if first_use == use:
            return
        first, second = (printable(os.path.relpath(p, self.root)) for p in (first_path, path))
        both = "training and test image" if first_use[0] != use[0] else "image of two classes"
        reason = f"{first} and {second} are the same file (a link), which cannot be {both}"
        raise UserError(f"--data_dir {printable(self.root)}: {reason}; remove one of them")


def _entries(folder):
    """What is in a folder, sorted by name. Raises UserError if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{printable(folder)}: cannot be read ({error_reason(error)})") from error


def _is_folder(entry):
    """Whether a folder's entry is a folder or a link to a folder."""
    if entry.is_symlink():
        return _is_kind(entry.path, stat.S_ISDIR)
    return entry.is_dir(follow_symlinks=False)


def _is_kind(path, test):
    """Whether ``path`` or its link's target exists and passes ``test``, e.g. stat.S_ISDIR."""
    try:
        return test(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise UserError(f"{printable(path)}: cannot be read ({error_reason(error)})") from error


def _identity(path):
    """Which file or folder a path leads to through any links; the path itself for a broken link."""
    with suppress(OSError):
        status = os.stat(path)
        if status.st_ino:
            return status.st_dev, status.st_ino
    return os.path.realpath(path)


def _load_folder(args, model_side):
    root = Path(args.data_dir)
    _check_layout(root)
    reader = FolderReader(root)
    (classes, train), (test_classes, test) = reader.read("train"), reader.read("test")
    if reader.left_out:
        print(f"{printable(root)}: left out {reader.summary()}")
    _check_classes(root, classes, test_classes)
    side = args.image_size or _common_side([p.path for p in train + test], args, model_side)
    labels = {class_name: label for label, class_name in enumerate(classes)}

    def samples(pictures):
        for path, class_name, name in pictures:
            yield Sample(path, printable(name).replace(os.sep, "/"), labels[class_name])

    train, held_out = _read_images(list(samples(train)), list(samples(test)), side, args)
    tag = f"image_folder-{printable(root.resolve().name)}".replace("\\", "-")
    names, folder = list(map(printable, classes)), os.path.join(root, "train")
    return Data(train, held_out, names, tag=tag, train_folder=folder)


FOLDER_LAYOUT = "image_folder reads train/<class>/ and test/<class>/"


def _check_layout(root):
    """Raise UserError for a folder without train/ and test/, with its content and a remedy."""
    flag = f"--data_dir {printable(root)}"
    if not _is_kind(root, stat.S_ISDIR):
        exists = os.path.lexists(root)
        reason = "is a file or a broken link, not a folder" if exists else "no such folder"
        raise UserError(f"{flag}: {reason}; {FOLDER_LAYOUT}")
    missing = [name for name in ("train", "test") if not _is_kind(root / name, stat.S_ISDIR)]
    for name in missing:
        if os.path.lexists(root / name):
            reason = f"{name} is a file or a broken link, not a folder"
            raise UserError(f"{flag}: {reason}; {FOLDER_LAYOUT}")
    if missing:
        raise UserError(f"{flag}: {_layout_problem(root, missing)}")


def _layout_problem(root, missing):
    """Why ``root`` has no folders ``missing`` (train, test or both) in it, and the remedy."""
    entries = [entry for entry in _entries(root) if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if _is_kind(entry.path, stat.S_ISDIR)]
    folders = [name for name in folders if name.casefold() not in SYSTEM_NAMES]
    problem = f"no folder {' and '.join(f'{name}/' for name in missing)} in it"
    if remedies := list(_renaming(folders, missing)):
        return f"{problem}; {'; '.join(remedies)}"
    shown = _some([f"{printable(name)}/" for name in folders])
    if len(missing) < 2:
        advice = ": put held-out images of every class there" if missing == ["test"] else ""
        return f"{problem} (found {shown}); {FOLDER_LAYOUT}{advice}"
    for name in folders:
        if all(_is_kind(root / name / subset, stat.S_ISDIR) for subset in SUBSET_NAMES):
            inside = printable(root / name)
            return f"train/ and test/ are inside {printable(name)}/; use --data_dir {inside}"
    above = root.resolve().parent
    if root.resolve().name in SUBSET_NAMES and _is_kind(above / "train", stat.S_ISDIR):
        return f"train/ and test/ are in the folder above; use --data_dir {printable(above)}"
    if folders:
        advice = "move most images of each to train/<class>/ and the others to test/<class>/"
        return f"{problem}, only {shown}; {FOLDER_LAYOUT}: if these are the classes, {advice}"
    content = f"{len(entries)} files but no folders in it" if entries else "the folder is empty"
    return f"{content}; {FOLDER_LAYOUT}: each class needs its own folder in both"


def _renaming(folders, missing):
    for subset in missing:
        names = [name for name in folders if name.casefold().strip() in SUBSET_NAMES[subset]]
        if names := [printable(name) for name in names if name not in SUBSET_NAMES]:
            which = "it" if len(names) == 1 else "one of them"
            shown = " and ".join(f"{name}/" for name in names)
            yield f"found {shown}: rename {which} to {subset}/"


def _check_classes(root, train, test):
    """Raise UserError unless training and test images have the same two or more classes."""
    flag = f"--data_dir {printable(root)}"
    if train != test:
        raise UserError(
            f"{flag}: train/ and test/ have different classes: {_difference(train, test)}"
        )
    if len(train) < 2:
        classes = f"one class ({printable(train[0])})" if train else "no class folders"
        remedy = "a classifier needs at least two classes, each a folder in train/"
        raise UserError(f"{flag}: train/ has {classes}; {remedy}")


def _difference(train, test):
    """How the class names in train/ and test/ differ."""
    extra = {"train": sorted(set(train) - set(test)), "test": sorted(set(test) - set(train))}
    similar = {_loose(name): name for name in extra["test"]}
    for name in extra["train"]:
        if other := similar.get(_loose(name)):
            names = f"{printable(name)!r} and {printable(other)!r}"
            return f"{names} differ only in {_name_difference(name, other)}; rename one of them"
    only = [
        f"only {subset}/ has {_some(list(map(printable, names)))}"
        for subset, names in extra.items()
        if names
    ]
    return f"{'; '.join(only)}; both need pictures of every class"


def _loose(name):
    """A name without what is easily confused: case, Unicode form, surrounding blanks."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _name_difference(name, other):
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other):
        return "their Unicode form (NFC and NFD: accents are single characters in one of them)"
    if name.strip() == other.strip():
        return "blanks around the name"
    return "upper and lower case or blanks"


# ---------------------------------------------------------------- reading pictures


class UnreadableImage(UserError):
    """An image file that cannot be read, or not correctly. --skip_corrupt leaves it out."""


# Formats that Pillow registers but reads only with another program or library, or not at all.
UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Formats that the first bytes of a file identify reliably, and that are not raw camera files.
SIGNED_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "WEBP")
# Formats whose greyscale of more than 8 bits is scaled to a white of 65,535 when Pillow opens it.
SIXTEEN_BIT_FORMATS = {"ICNS", "ICO", "IM", "JPEG2000", "PNG", "PPM"}
# Formats whose fourth channel is often unused, which means 0 everywhere.
OPTIONAL_ALPHA_FORMATS = {"BMP", "DIB", "TGA"}
COLOUR_MODES = {"1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                "LAB", "HSV"}  # fmt: skip
ALPHA_MODES = {"PA", "LA", "La", "RGBA", "RGBa"}
LONGEST_SHAPE = 8  # ratio of the sides beyond which a picture is cropped before it is resized
SAMPLED_PIECES, SAMPLED_BYTES = 4, 8192


class Pillow(NamedTuple):
    """What Pillow can read: formats, e.g. PNG, and file extensions, e.g. .png."""

    formats: tuple
    extensions: set


@cache
def _pillow():
    """What Pillow can read. Turns its warnings off: an image is either read or an error."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    extensions = Image.registered_extensions()  # loads every reader
    formats = tuple(name for name in Image.OPEN if name not in UNREADABLE_FORMATS)
    readable = {ending for ending, name in extensions.items() if name in (*formats, "MPO")}
    return Pillow(formats, readable)


@contextmanager
def _opened(path, formats=None):
    """Pillow's image of a file. Any error inside the block becomes an :class:`UnreadableImage`."""
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise ValueError("not a regular file")
        with Image.open(path, formats=formats or _pillow().formats) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        reason = error_reason(error)
        # The system's limits are not the image's fault.
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise UserError(f"{printable(path)}: cannot be opened ({reason})") from error
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its content is in no format that Pillow reads"
            if os.path.getsize(path) == 0:
                reason = "the file is empty"
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = "a link to a file that does not exist"
        remedy = "fix or delete it, or pass --skip_corrupt"
        raise UnreadableImage(
            f"{printable(path)}: cannot read image ({reason}); {remedy}"
        ) from error


def _read_image(path, side):
    """One image as uint8 3×side×side: the shorter side resized, the centre kept."""
    with _opened(path) as image:
        image = _as_viewed(image)
        longest = LONGEST_SHAPE * min(image.size)
        # Equal margins, because the centre is kept later.
        left, top = (max(0, length - longest) // 2 for length in image.size)
        if left or top:
            image = image.crop((left, top, image.width - left, image.height - top))
        pixels = transforms.pil_to_tensor(image)
    if pixels.shape[-2:] != (side, side):
        pixels = transforms.center_crop(transforms.resize(pixels, [side], antialias=True), [side])
    return pixels


def _as_viewed(image):
    """An opened picture as viewers show it: first frame, upright, 8-bit RGB on a white background.

    Raises ValueError for a picture whose values have no known range.
    """
    from PIL import Image

    _scale_transparent_colour(image)
    bmp_alpha = _bmp_alpha(image)
    image.load()
    orientation = _orientation(image)
    alpha_is_optional = image.format in OPTIONAL_ALPHA_FORMATS
    if bmp_alpha is not None:
        image.putalpha(bmp_alpha)
    if image.mode not in COLOUR_MODES:
        image = _eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        if not (alpha_is_optional and image.getchannel("A").getextrema() == (0, 0)):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.transpose(_turns()[orientation]) if orientation > 1 else image


def _bmp_alpha(image):
    """The fourth channel of a 32-bit BMP, which viewers use as opacity but Pillow ignores."""
    from PIL import Image

    if image.format not in ("BMP", "DIB") or not image.tile or image.tile[0][3][0] != "BGRX":
        return None
    _, _, offset, (_, stride, order) = image.tile[0]
    image.fp.seek(offset)
    rows = image.fp.read(stride * image.height)
    return Image.frombytes("RGBA", image.size, rows, "raw", "BGRA", stride, order).getchannel("A")


def _scale_transparent_colour(image):
    """Scale the transparent colour in a PNG's tRNS chunk from the file's 2, 4 or 16 bits to 8."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    layout = image.tile[0][3]
    if layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif layout in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[layout]


def _eight_bits(image):
    """A greyscale picture of more than 8 bits in mode L, or LA if it has a transparent value.

    Raises ValueError if the file does not define which value is white.
    """
    from PIL import Image

    white, inverted = 65535 if image.format in SIXTEEN_BIT_FORMATS else None, False
    if image.format == "TIFF":
        bits, kind = (image.tag_v2.get(tag, (1,))[0] for tag in (258, 339))  # BitsPerSample, Format
        white = 2**bits - 1 if kind == 1 and bits <= 16 else None
        inverted = image.tag_v2.get(262) == 0  # PhotometricInterpretation: MinIsWhite
    integer = image.mode.startswith("I;16") or (image.mode == "I" and image.format != "IM")
    if white is None or not integer:
        problem = f"mode {image.mode} of {image.format}: the file does not define which value"
        raise ValueError(f"{problem} is white; save it as an 8-bit or 16-bit PNG")
    values = np.asarray(image).astype(np.int64)
    grey = (values.clip(0, white) * 255 + white // 2) // white
    grey = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255)
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return grey


def _orientation(image):
    """The EXIF orientation, 1 to 8; 1 if it is missing or unreadable."""
    with suppress(Exception):  # viewers show a picture with damaged EXIF as it is stored
        if (orientation := image.getexif().get(0x0112)) in _turns():
            return orientation
    return 1


@cache
def _turns():
    """How to turn a picture upright, by EXIF orientation.

    ImageOps.exif_transpose() would do it too, but fails on damaged EXIF.
    """
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _upright_size(path):
    """(width, height) of the picture that :func:`_as_viewed` returns, from the file's header."""
    with _opened(path) as image:
        width, height = image.size
        if width == height or _orientation(image) < 5:
            return width, height
        if image.format == "TIFF":  # Pillow itself turns these, when it opens or loads them
            image.load()
            width, height = image.size
            return (width, height) if _orientation(image) < 5 else (height, width)
        return height, width


def _has_picture_content(path):
    """Whether the content of a file with an unknown or no extension is a picture."""
    # .dng, .nef and other raw camera files are TIFF files with a thumbnail that Pillow would read.
    formats = SIGNED_FORMATS if os.path.splitext(path)[1] else (*SIGNED_FORMATS, "TIFF")
    with suppress(UnreadableImage), _opened(path, formats):
        return True
    return False


def _hash_files(paths):
    """A hash of the files' sizes and samples of their bytes, in order.

    Files of at most 32 KiB are hashed completely, of others four pieces of 8 KiB at equal
    distances, including the first and last bytes.
    """

    def digest(path):
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                sampled = hashlib.sha256(size.to_bytes(8, "little"))
                if size <= SAMPLED_PIECES * SAMPLED_BYTES:
                    sampled.update(file.read(SAMPLED_PIECES * SAMPLED_BYTES))
                else:
                    for piece in range(SAMPLED_PIECES):
                        file.seek(piece * (size - SAMPLED_BYTES) // (SAMPLED_PIECES - 1))
                        sampled.update(file.read(SAMPLED_BYTES))
        except OSError as error:
            raise UserError(f"{printable(path)}: cannot be read ({error_reason(error)})") from error
        return sampled.digest()

    def digests(start):
        return b"".join(map(digest, paths[start : start + 256]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(paths), 256)
        return hashlib.sha256(b"".join(pool.map(digests, starts))).hexdigest()


# ---------------------------------------------------------------- splits


@dataclass(frozen=True)
class Split:
    """Which images are used for what: int64 indices of training images and of held-out images.

    ``retain`` and ``forget`` are training images, the others are held-out images.
    ``train_calibration`` is for the CPU loss alone. If classes or subclasses are forgotten,
    ``train_calibration`` and ``test`` contain the retained classes only, and ``forget_test`` the
    test images of the forgotten ones. ``calibration`` contains all classes, and the bool mask
    ``is_forgotten`` marks its images of the forgotten ones. ``forget_classes`` are the numbers of
    the forgotten classes or subclasses, and ``forget_name`` describes what is forgotten.
    """

    retain: torch.Tensor
    forget: torch.Tensor
    calibration: torch.Tensor
    train_calibration: torch.Tensor
    test: torch.Tensor
    forget_test: torch.Tensor
    is_forgotten: torch.Tensor
    folder: str = ""
    forget_classes: tuple[int, ...] = ()
    forget_name: str = ""

    def describe(self):
        """What is forgotten, by name and count, with the scenario's folder and the fingerprint."""
        count, total = len(self.forget), len(self.forget) + len(self.retain)
        place = f"({self.folder}, {self.fingerprint})"
        return f"{self.forget_name}: {count} of {total} training images {place}"

    @property
    def fingerprint(self):
        """A hash of the sorted forget indices: equal forget sets have equal fingerprints."""
        return _hash_indices(self.forget.cpu().numpy())[:16]


def _hash_indices(indices):
    return hashlib.sha256(np.sort(indices).astype("<i8").tobytes()).hexdigest()


def default_cal_size(data):
    return min(2000, max(1, len(data.held_out) // 5))


def make_split(data, args, cal_size=None, *, scenario=True):
    """The split that data set, split seed and scenario flags imply.

    It is a pure function, so all scripts agree. The split seed permutes the held-out images. The
    first tenth (at least 1, at most 1000) calibrates the CPU loss, the next ``cal_size`` the
    metrics, and the rest is the test set. Without ``scenario`` nothing is forgotten. Raises
    UserError for scenario flags that contradict the data.
    """
    labels = data.train.labels.cpu().numpy()
    forget_set = ForgetSet(np.zeros(len(labels), bool), folder="", name="")
    if scenario:
        forget_set = _forget_set(data, args, labels)
        if not 0 < forget_set.mask.sum() < len(labels):
            counts = f"{forget_set.mask.sum()} of {len(labels)} training images would be forgotten"
            reason = f"{counts}; some must be forgotten and some retained"
            raise UserError(f"--unlearn_type {args.unlearn_type} ({forget_set.name}): {reason}")

    train_calibration, calibration, test = _divide_held_out(data, args, cal_size)
    by_subclass = scenario and args.unlearn_type == "subclass"
    groups = data.held_out.subclasses if by_subclass else data.held_out.labels
    is_forgotten = np.isin(groups.cpu().numpy(), forget_set.classes)
    if is_forgotten[test].all():
        reason = f"none of the {len(test)} test images is of a retained class"
        remedy = "add held-out images, or choose a smaller --cal_sizes"
        flag = f"--unlearn_type {args.unlearn_type} ({forget_set.name})"
        raise UserError(f"{flag}: {reason}; {remedy}")

    def indices(array):
        return torch.from_numpy(array).to(data.train.labels.device)

    return Split(
        retain=indices(np.flatnonzero(~forget_set.mask)),
        forget=indices(np.flatnonzero(forget_set.mask)),
        calibration=indices(calibration),
        train_calibration=indices(train_calibration[~is_forgotten[train_calibration]]),
        test=indices(test[~is_forgotten[test]]),
        forget_test=indices(test[is_forgotten[test]]),
        is_forgotten=torch.from_numpy(is_forgotten[calibration]),
        folder=forget_set.folder + (_split_suffix(args) if scenario else ""),
        forget_classes=forget_set.classes,
        forget_name=forget_set.name,
    )


def _divide_held_out(data, args, cal_size):
    """Indices of the held-out images for training calibration, calibration and test."""
    order = permutation(split_seed(args), "held-out", len(data.held_out))
    if len(order) < 3:
        needed = "at least 3 are needed, one each for training calibration, calibration and test"
        raise UserError(f"{args.data_name}: {len(order)} held-out images; {needed}")
    first = min(1000, max(1, len(order) // 10))
    cal_size = cal_size or default_cal_size(data)
    if first + cal_size >= len(order):
        counts = f"{len(order)} held-out images, of which {first} are for training calibration"
        limit = f"no test image would remain; choose at most {len(order) - first - 1}"
        raise UserError(f"--cal_sizes {cal_size}: there are {counts}; {limit}")
    return np.split(order, [first, first + cal_size])


@dataclass(frozen=True)
class ForgetSet:
    """Which training images are forgotten (a bool mask), under which folder name, and why.

    ``name`` describes the set in words; ``classes`` are the forgotten classes or subclasses.
    """

    mask: np.ndarray
    folder: str
    name: str
    classes: tuple[int, ...] = ()


def _forget_set(data, args, labels):
    """The :class:`ForgetSet` of the scenario flags."""
    scenario = args.unlearn_type
    if args.forget_list and scenario != "list":
        raise UserError(f"--forget_list requires --unlearn_type list, not {scenario}")
    if args.forget_class is not None and scenario not in ("class", "subclass"):
        raise UserError(f"--forget_class requires --unlearn_type class or subclass, not {scenario}")
    if scenario == "random":
        return _random_forget_set(args, len(labels))
    if scenario == "list":
        return _listed_forget_set(data, args, len(labels))
    if scenario == "class":
        return _class_forget_set(args, labels, data.classes)
    if data.subclass_names is None:
        reason = f"{args.data_name} has no subclasses; use --data_name cifar20"
        raise UserError(f"--unlearn_type subclass: {reason}")
    forget_set = _class_forget_set(args, data.train.subclasses.cpu().numpy(), data.subclass_names)
    superclasses = [data.classes[label] for label in np.unique(labels[forget_set.mask])]
    noun = "class" if len(superclasses) == 1 else "classes"
    return replace(forget_set, name=f"{forget_set.name} of {noun} {', '.join(superclasses)}")


LONGEST_CLASSES = 40  # characters of a folder's name that list the forgotten classes


def _class_forget_set(args, groups, names):
    """All images of the classes (or subclasses) of --forget_class. ``groups`` are their numbers."""
    numbers = _class_numbers(args, names)
    noun = args.unlearn_type if len(numbers) == 1 else f"{args.unlearn_type}es"
    drawn = f" (drawn from seed {split_seed(args)})" if args.forget_class is None else ""
    listed = "_".join(map(str, numbers))
    if len(listed) > LONGEST_CLASSES:
        listed = f"{len(numbers)}_classes_{_hash_indices(np.array(numbers))[:8]}"
    return ForgetSet(
        np.isin(groups, numbers),
        folder=f"{args.unlearn_type}_{listed}",
        name=f"{noun} {', '.join(names[number] for number in numbers)}{drawn}",
        classes=numbers,
    )


def _random_forget_set(args, count):
    ratio = args.retain_ratio
    if not 0 < ratio < 1:
        raise UserError(f"--retain_ratio {ratio}: must be between 0 and 1, e.g. 0.9 to forget 10 %")
    mask = np.zeros(count, bool)
    seed = split_seed(args)
    order = permutation(seed, "forget", count)
    mask[order[round(count * ratio) :]] = True
    return ForgetSet(mask, f"random_{ratio:g}", f"a random share drawn from seed {seed}")


def _listed_forget_set(data, args, count):
    if not args.forget_list:
        raise UserError("--unlearn_type list: name a file with the images in --forget_list FILE")
    path = Path(args.forget_list)
    indices = read_forget_list(path, data)
    mask = np.zeros(count, bool)
    mask[indices] = True
    stem = printable(path.stem).replace("\\", "-")[:100]
    folder = f"list_{stem}_{_hash_indices(indices)[:8]}"
    return ForgetSet(mask, folder, f"the images in {printable(args.forget_list)}")


def scenario_folder(args, data):
    """The scenario's folder for several seeds; it has no number if each seed draws its class."""
    draws_class = args.unlearn_type in ("class", "subclass") and args.forget_class is None
    if draws_class and args.split_seed is None:
        return args.unlearn_type
    folder = _forget_set(data, args, data.train.labels.cpu().numpy()).folder
    return folder if args.split_seed is None else f"{folder}_split{args.split_seed}"


def _split_suffix(args):
    """The part of the scenario's folder that names a split seed other than the seed."""
    return "" if split_seed(args) == args.seed else f"_split{split_seed(args)}"


def _class_numbers(args, classes):
    """The positions of --forget_class among the classes, in ascending order.

    Several are separated by commas, unless a class has the whole text as its name. Without the
    flag, one is drawn from the seed. Raises UserError as :func:`_class_number` does.
    """
    if args.forget_class is None:
        return (int(permutation(split_seed(args), "forget class", len(classes))[0]),)
    text = printable(args.forget_class)
    is_one_name = _loose(text) in map(_loose, classes)
    parts = [text] if is_one_name else text.split(",")
    if len(parts) > 1 and not all(map(str.strip, parts)):
        raise UserError(f"--forget_class {text}: a name is missing before or after a comma")
    return tuple(sorted({_class_number(part, classes) for part in parts}))


def _class_number(text, classes):
    """The position of one class of --forget_class among the classes.

    Names come first. A number is a position only if no class has a number as its name. Raises
    UserError for an unknown class or an ambiguous number.
    """
    if text in classes:
        return classes.index(text)
    flag, shown = f"--forget_class {text}", _some(classes, 10)
    similar = [name for name in classes if _loose(name) == _loose(text)]
    composed = [name for name in similar if _composed(name) == _composed(text)]
    if len(composed) == 1:
        return classes.index(composed[0])
    if similar:
        names = " or ".join(map(repr, similar))
        raise UserError(f"{flag}: no class has exactly this name; did you mean {names}?")
    number = int(text) if text.strip().isdecimal() else None
    numbered = [name for name in classes if name.strip().isdecimal()]
    if number is not None and number < len(classes) and not numbered:
        return number
    if number is not None and numbered:
        meanings = [f"class {name}" for name in numbered if int(name) == number]
        if number < len(classes):
            position = f"number {number} of {shown} counted from 0"
            meanings.append(f"class {classes[number]}, which is {position}")
        if meanings:
            reason = f"no class has exactly this name; it could mean {' or '.join(meanings)}"
            raise UserError(f"{flag}: {reason}; give the class's name")
    numbers = "" if numbered else f", nor a number below {len(classes)}"
    raise UserError(f"{flag}: not one of {shown}{numbers}")


def _composed(name):
    """A name in Unicode's composed form (NFC), without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


# ---------------------------------------------------------------- forget lists


LIST_HEADINGS = {"", "file", "files", "filename", "filenames", "file_name", "name", "path",
                 "filepath", "file_path", "image", "images", "image_path", "img", "index",
                 "indices", "idx", "id", "image_id"}  # fmt: skip
LIST_FORMAT = "expected a text file with one training index or file name (class/image.png) per line"


class ListEntry(NamedTuple):
    """One item of a forget list: its place, for messages, and its text."""

    place: str
    text: str


def read_forget_list(path, data):
    """Training indices (int64) from a list of indices or, for images in files, of file names.

    The list is a text file (one item per line), a CSV file with one column of file names, or a JSON
    list. Raises UserError with the line of any item that is not exactly one training image.
    """
    flag = f"--forget_list {printable(path)}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error_reason(error)})") from error
    if kind := binary_kind(content):
        raise UserError(f"{flag}: looks like {kind}; {LIST_FORMAT}")
    text = _decode(content)
    if "\0" in text:
        raise UserError(f"{flag}: looks like a binary file; {LIST_FORMAT}")
    finder = TrainingImageFinder(data)
    entries = _json_entries(text, flag) or _line_entries(text, finder)
    if not entries:
        raise UserError(f"{flag}: names no image")
    first_places = {}
    for place, item in _table_column(entries, finder, flag) or entries:
        shown = printable(item.strip())
        try:
            index = finder.find(item)
        except ValueError as error:
            raise UserError(f"{flag}, {place}: {shown!r}: {error}") from error
        if index in first_places:
            reason = f"{shown} is the same image as {first_places[index]}; list every image once"
            raise UserError(f"{flag}, {place}: {reason}")
        first_places[index] = place
    return np.array(list(first_places), dtype=np.int64)


def _decode(content):
    """Text from bytes: by the byte order mark, as UTF-16 if every other byte is 0, else as UTF-8.

    Bytes that are not UTF-8 become surrogate escapes, as in file names.
    """
    if content.startswith(codecs.BOM_UTF8):
        return content.decode("utf-8-sig", "surrogateescape")
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    even, odd = content[::2].count(0), content[1::2].count(0)
    if max(even, odd) > len(content) // 4 and len(content) % 2 == 0:
        return content.decode("utf-16-be" if even > odd else "utf-16-le", "replace")
    return content.decode("utf-8", "surrogateescape")


def _json_entries(text, flag):
    """The items of a JSON list, [] for text that is not JSON. Raises UserError for other JSON."""
    if not text.lstrip().startswith(("[", "{")):
        return []
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(items, list) or any(type(item) not in (str, int) for item in items):
        reason = "looks like JSON, but not a list of indices or file names"
        raise UserError(f"{flag}: {reason}; {LIST_FORMAT}")
    return [ListEntry(f"item {number}", str(item)) for number, item in enumerate(items, 1)]


def _line_entries(text, finder):
    """The lines of a text file without blank lines, comments and a heading.

    A comment or heading that names an image is an entry.
    """
    entries = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        comment = line.lstrip().startswith("#") and not finder.is_in_class(line.strip())
        if line.strip() and not comment:
            entries.append(ListEntry(f"line {number}", line))
    if len(entries) > 1:
        first = entries[0].text
        if _unquoted(first).casefold() in LIST_HEADINGS and not finder.knows(first):
            return entries[1:]
    return entries


def _table_column(entries, finder, flag):
    """The entries of the only column that names images, if the lines are a table; else [].

    Raises UserError if no column, or more than one, names images.
    """
    for delimiter in ",;\t":
        rows = _table_rows(entries, finder, delimiter)
        if not rows:
            continue
        has_headings = len(rows) > 1 and not any(map(finder.knows, rows[0]))
        headings = [_loose(cell) for cell in rows[0]] if has_headings else []
        body = rows[1:] if has_headings else rows
        columns = [
            number
            for number in range(len(rows[0]))
            if all(finder.names(row[number]) for row in body)
        ]
        if len(columns) != 1:
            known = LIST_HEADINGS - {""}
            columns = [number for number, heading in enumerate(headings) if heading in known]
        if len(columns) != 1:
            line = printable(entries[0].text.strip())[:60]
            kind = f"a table of {len(rows[0])} columns, or several items in a line"
            raise UserError(
                f"{flag}, {entries[0].place}: {line!r}: looks like {kind}; {LIST_FORMAT}"
            )
        places = [entry.place for entry in entries][len(rows) - len(body) :]
        cells = [row[columns[0]] for row in body]
        return [ListEntry(place, cell) for place, cell in zip(places, cells, strict=True)]
    return []


def _table_rows(entries, finder, delimiter):
    """The cells of each line, if the lines are a table with this delimiter; else []."""
    lines = [entry.text for entry in entries]
    if not all(delimiter in line for line in lines) or any(map(finder.knows, lines)):
        return []
    options = {"delimiter": delimiter, "skipinitialspace": True}
    rows = [next(csv.reader([line], **options)) for line in lines]
    return rows if len(rows[0]) > 1 and len(set(map(len, rows))) == 1 else []


def _unquoted(text):
    """Text without surrounding blanks and quotes, and without a final comma or semicolon."""
    text = text.strip().rstrip(",;").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].replace(text[0] * 2, text[0])
    return text.strip()


def _normal(text):
    return unicodedata.normalize("NFC", printable(text))


class TrainingImageFinder:
    """Which training image a text means: a file name in any of several spellings, or an index."""

    def __init__(self, data):
        self._count, self._folder = len(data.train), data.train_folder
        self._names = data.train.names or []
        self._by_name = {name: index for index, name in enumerate(self._names)}
        self._by_form, self._by_file, self._by_case = {}, {}, {}
        for index, name in enumerate(self._names):
            form = unicodedata.normalize("NFC", name)
            file = unicodedata.normalize("NFC", name.rpartition("/")[2])
            self._by_form.setdefault(form, []).append(index)
            self._by_file.setdefault(file, []).append(index)
            self._by_case.setdefault(_loose(name), []).append(index)
        self._classes = {name.partition("/")[0] for name in self._names}

    def find(self, text):
        """The index. Raises ValueError if no training image, or more than one, is meant."""
        matches = self._by_path(text) or self._by_file_name(text)
        number = self._number(text)
        if number is not None and (number < self._count or not matches):
            matches = matches | {number}
        if len(matches) > 1:
            meanings = [self._describe(index, index == number) for index in sorted(matches)]
            remedy = "give the class and the file name, as in class/image.png"
            raise ValueError(f"could mean {' or '.join(meanings)}; {remedy}")
        if not matches or max(matches) >= self._count:
            raise ValueError(self._why_not(text))
        return matches.pop()

    def knows(self, text):
        """Whether the text is a file name or a number."""
        return self.names(text) or self._number(text) is not None

    def names(self, text):
        """Whether the text is a file name in any spelling."""
        return bool(self._by_path(text) or self._by_file_name(text))

    def is_in_class(self, text):
        """Whether a text begins with a class and a slash."""
        head, *rest = re.split(r"[/\\]", printable(_unquoted(text)))
        return bool(rest) and head in self._classes

    def _by_path(self, text):
        """Indices of the images that a text names by class and file, usually one."""
        for spelling in dict.fromkeys((text, text.strip(), _unquoted(text))):
            if (index := self._by_name.get(printable(spelling))) is not None:
                # train/1.png may be in the folder train/, and also in a class called train.
                return {index} | self._below_train(spelling)
        for spelling in filter(None, self._spellings(_unquoted(text))):
            path = posixpath.normpath(spelling)
            matches = set(self._by_form.get(_normal(path), ())) | self._below_train(path)
            if not matches and self._folder and "/" in path:
                matches = set(self._on_disk(path))
            if matches:
                return matches
        return set()

    @staticmethod
    def _spellings(text):
        """The text itself, and with slashes if it is a Windows path or decoded from cp1252."""
        yield text
        if "\\" in text:
            yield re.sub(r"^[A-Za-z]:", "", text).replace("\\", "/")
        with suppress(UnicodeError):
            yield text.encode("utf-8", "surrogateescape").decode("cp1252")

    def _below_train(self, text):
        """Images that a text names by a path that begins with train/."""
        head, _, rest = text.partition("/")
        return set(self._by_form.get(_normal(rest), ())) if head == "train" else set()

    def _on_disk(self, text):
        """Images that a text names by a path, perhaps through links.

        The path is absolute, or relative to the working directory or to the parent of --data_dir.
        """
        folder = os.path.abspath(self._folder)
        parent = os.path.dirname(os.path.dirname(folder))
        for path in (os.path.expanduser(text), os.path.join(parent, text)):
            path = os.path.abspath(path)
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            if matches := self._by_form.get(_normal(inside)):
                return matches
            if os.path.isfile(path):
                return self._by_identity.get(_identity(path), [])
        return []

    @cached_property
    def _by_identity(self):
        """Indices by file, which a path may lead to through a link."""
        paths = [os.path.join(self._folder, name) for name in self._names]
        return {_identity(path): [index] for index, path in enumerate(paths)}

    def _by_file_name(self, text):
        """Images in any class whose file name is the text."""
        spelling = _unquoted(text)
        return set() if "/" in spelling else set(self._by_file.get(_normal(spelling), ()))

    def _number(self, text):
        spelling = _unquoted(text)
        return int(spelling) if spelling.isdecimal() and len(spelling) < 20 else None

    def _describe(self, index, is_number):
        name = self._names[index] if self._names else ""
        return f"training image number {index} ({name})" if is_number else name

    def _why_not(self, text):
        spelling = _unquoted(text)
        if not spelling:
            return "names nothing"
        if spelling.isdecimal():
            return f"there are {self._count} training images, numbered from 0"
        if re.fullmatch(r"[\d,;\s]+", spelling):
            return "several numbers in a line; write one per line"
        if not self._names:
            return f"not a training index (0 to {self._count - 1})"
        path = posixpath.normpath(spelling.replace("\\", "/"))
        if path.partition("/")[0] == "test":
            return "a test image: only training images can be forgotten"
        if similar := self._by_case.get(_loose(printable(path.removeprefix("train/")))):
            return f"no such file in train/; did you mean {self._names[similar[0]]}?"
        if spelling[0] in "[{":
            return f"looks like JSON or Python code; {LIST_FORMAT}"
        if posixpath.isabs(path) and self._folder:
            return f"no such file in {printable(os.path.abspath(self._folder))}"
        return "no such file in train/"


# ---------------------------------------------------------------- run folders


UNFINISHED = ".unfinished"
RESUME_FILE = "resume.pth"


def model_tag(args):
    """The model's part of a folder name: every flag that changes the original model."""
    tag = args.model_name.replace("/", "-").replace("_", "-")
    if models.describe(args.model_name).has_width:
        tag += f"w{args.width}" if args.width != 64 else ""
    elif args.no_pretrained:
        tag += "-random"
    elif args.pretrained_path:
        tag += f"-{Path(args.pretrained_path).stem}"
    return tag + (f"i{args.image_size}" if args.image_size else "")


def run_folder(args, data, seeds=None):
    """The folder of one seed's results, or with ``seeds`` (e.g. "1,2,3") of their summary."""
    seed = f"seeds{seeds}" if seeds else f"seed{args.seed}"
    return Path(args.runs_dir) / f"{model_tag(args)}_{data.tag}_{seed}"


def locate(model_dir, folder):
    """The file of --model_dir: a bare name is in ``folder``, anything with a slash is a path."""
    return Path(model_dir) if "/" in model_dir or os.sep in model_dir else folder / model_dir


@contextmanager
def unfinished_folder(folder, num_bytes):
    """``folder/.unfinished``, in which one run at a time writes its files, until :func:`move_up`.

    Checks that ``num_bytes`` can be written. Files of an interrupted run are removed, except the
    resume checkpoint. Raises UserError if the folder cannot be created, if the disk is full, or if
    another run is writing there. On ranks other than 0 nothing is checked, created or removed.
    """
    unfinished = folder / UNFINISHED
    if distributed.rank():
        yield unfinished
        return
    with _storage_errors(folder, num_bytes):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as is_locked:
        try:
            with _storage_errors(folder, num_bytes):
                if is_locked:  # else these files may be another run's
                    _remove_files(unfinished)
                unfinished.mkdir(exist_ok=True)
                space = unfinished / "space"
                try:
                    space.write_bytes(bytes(num_bytes))
                finally:
                    space.unlink(missing_ok=True)
            yield unfinished
        finally:
            with suppress(OSError):  # the next run removes them
                _remove_files(unfinished)


@contextmanager
def _storage_errors(folder, num_bytes):
    try:
        yield
    except OSError as error:
        reason = f"cannot hold {num_bytes / 1e6:.0f} MB of results ({error.strerror})"
        raise UserError(f"{folder}: {reason}") from error


@contextmanager
def _locked(folder):
    """Lock a folder; the lock ends with the process. Yields whether the file system has locks.

    Raises UserError if another run holds the lock.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        reason = "another run is writing here; wait for it, or choose another --runs_dir"
        raise UserError(f"{folder}: {reason}") from None
    # filelock raises NotImplementedError on a file system without locks.
    except (OSError, NotImplementedError) as error:
        reason = f"cannot be locked ({first_line(error)})"
        print(f"{folder}: {reason}; make sure that no other run writes to it")
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _remove_files(unfinished):
    """Remove what a run left behind: all files but the resume checkpoint, and empty folders."""
    for path in sorted(unfinished.rglob("*"), reverse=True):  # files before their folders
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path != unfinished / RESUME_FILE:
            path.unlink()
    with suppress(OSError):  # it does not exist, or the resume checkpoint remains
        unfinished.rmdir()


def move_up(unfinished, last=None):
    """Move all files of an :func:`unfinished_folder` to its parent, those named ``last`` last.

    Existing files are replaced. The resume checkpoint is removed afterwards: a run killed before
    the last move can be resumed, and one killed after it leaves a checkpoint that nothing reads.
    Only the first process moves files.
    """
    if distributed.rank():
        return
    state = unfinished / RESUME_FILE
    files = [path for path in sorted(unfinished.rglob("*")) if path.is_file() and path != state]
    for path in sorted(files, key=lambda path: path.name == last):
        target = unfinished.parent / path.relative_to(unfinished)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        except OSError as error:
            raise UserError(f"{target}: cannot be replaced ({error.strerror})") from error
    state.unlink(missing_ok=True)


# ---------------------------------------------------------------- records


def save_json(path, content):
    """JSON, in which NaN is null and infinity is "inf"."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):  # JSON has neither
            return None if math.isnan(value) else str(value)
        return value

    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    save_text(path, text + "\n")


def save_text(path, text):
    """Text as UTF-8. Bytes of file names that are not UTF-8 become escapes, as in JSON."""
    save_bytes(path, text.encode(errors="backslashreplace"))


def save_bytes(path, content):
    write_file(path, lambda file: file.write(content))


def describe_run(args, data, device):
    """What every record contains: flags, seed, data, versions, machine."""
    flags = vars(args).items()
    machine = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {
        "flags": {name: printable(flag) if isinstance(flag, str) else flag for name, flag in flags},
        "seed": args.seed,
        "split_seed": split_seed(args),
        "model_name": args.model_name,
        "width": args.width,
        "num_classes": len(data.classes),
        "image_size": data.train.size,
        "data_name": args.data_name,
        "data_fingerprint": data.fingerprint,
        "versions": _versions(),
        "device": machine,
        "processes": distributed.world_size(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _versions():
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "timm", "numpy", "scikit-learn", "wandb"):
        versions[package] = None
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


# ---------------------------------------------------------------- logging


class History:
    """The numbers of every epoch: ``records``, and a line of JSON each in the file ``path``.

    Only the first process writes. Raises UserError if the file cannot be written.
    """

    def __init__(self, path):
        self.path, self.records = path, []
        self._write("", mode="w")

    def add(self, record):
        self.records.append(record)
        self._write(json.dumps(record) + "\n", mode="a")

    def _write(self, text, mode):
        if distributed.rank():
            return
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error


@dataclass
class WandbState:
    """What all wandb runs of this process share."""

    mode: str | None = None  # online, offline or disabled, once it is known
    offline_announced: bool = False
    failure_announced: bool = False
    hung: bool = False  # a call did not return; wandb's exit handlers would not return either


wandb_state = WandbState()


class WandbRun:
    """Numbers, tables and pictures of one run in wandb: ``with WandbRun(...) as run``.

    wandb is optional: if it is missing, broken or does not respond, one line reports it and the
    run continues without it. Only the first process logs.
    """

    patience = 60.0  # seconds that a call may take

    def __init__(self, folder, name, config, args):
        self._folder, self._wandb, self._settings, self._run = folder, None, None, None
        if not distributed.rank():
            self._call(lambda: self._choose_mode(args))
            if self._wandb:
                self._call(lambda: self._start(name, config))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._run:
            self._call(lambda: self._run.finish())

    def log(self, numbers):
        """Numbers by name."""
        if self._run:
            self._call(lambda: self._run.log(numbers))

    def log_table(self, title, rows):
        """A table from rows (dicts)."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(key) for key in columns] for row in rows]

        def log():
            table = self._wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
            self._run.log({title: table})

        if self._run:
            self._call(log)

    def log_pictures(self, paths):
        """Pictures from {name: file}."""

        def log():
            images = {name: self._wandb.Image(str(path)) for name, path in paths.items()}
            self._run.log(images)

        if self._run:
            self._call(log)

    def _call(self, action):
        """``action()`` for at most ``patience`` seconds. After a failure the run is not logged.

        wandb writes and uploads in a process of its own, and any call can still block: init() and
        finish() wait for that process to answer, finish() without a limit. log() waits for room in
        the socket between them, which fills up once the other process no longer reads.
        """
        if wandb_state.hung:
            return
        try:
            _call_within(self.patience, action)
        except Exception as error:  # training is worth more than its log, whatever wandb raises
            self._run = self._wandb = None
            wandb_state.hung = isinstance(error, NoResponse)
            if not wandb_state.failure_announced:
                reason = f"{first_line(error)}; continuing without it"
                print(f"wandb: {reason}, records are in {printable(self._folder)}")
            wandb_state.failure_announced = True

    def _choose_mode(self, args):
        """Set the mode of the process from the flag, wandb's own settings, or its login."""
        older = os.environ.get("WANDB_DISABLED", "").lower() not in ("", "0", "false", "no", "off")
        variable = os.environ.get("WANDB_MODE") or ("disabled" if older else None)
        wandb_state.mode = wandb_state.mode or args.wandb_mode or variable
        if wandb_state.mode == "disabled":
            return
        os.fspath(self._folder).encode()  # a UnicodeEncodeError here; wandb would print tracebacks
        import wandb  # half a second, and it may be missing

        with suppress(Exception):  # old releases have other settings
            self._settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
        saved_mode = getattr(self._settings, "mode", None)  # of `wandb offline` or `wandb disabled`
        if wandb_state.mode is None and saved_mode != "online":
            wandb_state.mode = saved_mode
        if wandb_state.mode is None:
            wandb_state.mode = "online" if _logged_in(wandb) else "offline"
        if wandb_state.mode != "disabled":
            self._wandb = wandb

    def _start(self, name, config):
        """Start the run: offline where online fails, so that it can be uploaded later."""
        directory = Path(os.environ.get("WANDB_DIR") or self._folder)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._init(directory, name, config)
        except Exception as error:  # e.g. no connection, an expired key
            if wandb_state.mode == "offline":
                raise
            print(f"wandb: online failed ({first_line(error)}); logging offline instead")
            wandb_state.mode = "offline"
            self._init(directory, name, config)
        if wandb_state.mode == "offline" and not wandb_state.offline_announced:
            files = directory / "wandb"
            upload = f"upload: wandb sync {files}/offline-run-*"
            print(f"wandb: logging offline; view: wandb leet {files}; {upload}")
            wandb_state.offline_announced = True

    def _init(self, directory, name, config):
        settings = self._settings
        self._run = self._wandb.init(
            project=getattr(settings, "project", None) or "conformal-prediction-unlearning",
            name=getattr(settings, "run_name", None) or name,
            group=getattr(settings, "run_group", None) or self._folder.parent.name,
            config=config,
            dir=directory,
            mode=wandb_state.mode,
            reinit="finish_previous",
            settings=self._wandb.Settings(silent=True, console="off", init_timeout=30),
        )


class NoResponse(Exception):
    """A call took too long and was abandoned."""


def _call_within(seconds, action):
    """``action()`` in a thread of its own. Raises NoResponse after ``seconds``."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise NoResponse(f"no response for {seconds:g} s")
    return outcome.result()


def _logged_in(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # older releases, e.g. 0.20, have no argument prompt
        return bool(wandb.api.api_key)


# ---------------------------------------------------------------- one run

FAILURE_FILE = "failure.json"


class RunFiles(NamedTuple):
    """The files of a run in ``folder``: the names of its model and of its record."""

    folder: Path
    model: str = "unlearning_model.pth"
    record: str = "results.json"

    @property
    def model_path(self):
        return self.folder / self.model


def original_recipe(args, device):
    """The recipe of the original model: flags, else the defaults of the data set.

    A network that starts from ImageNet weights trains for at most 20 epochs at 0.01.
    """
    spec = SPECS[args.data_name]
    num_epochs, learning_rate = spec.num_epochs, spec.learning_rate
    if not models.describe(args.model_name).trained_from_scratch:
        num_epochs, learning_rate = min(num_epochs, 20), 0.01
    return Recipe(
        num_epochs=args.num_epochs or num_epochs,
        learning_rate=args.learning_rate or learning_rate,
        batch_size=args.batch_size or Recipe.batch_size,
        milestones=args.milestones,
        precision=pick_precision(args, device),
    )


def already_done(path, identity, args):
    """The meta of an earlier run with the same ``identity`` that saved its model at ``path``.

    ``identity`` is everything that determines the weights. Returns None if there is no file, or if
    --overwrite is set. Raises UserError if the file cannot be read or comes from other settings.
    With --precision auto the precision may differ, since it depends on the device.
    """
    if args.overwrite or not path.exists():
        return None
    try:
        meta = checkpoint.read(path)[1]
    except UserError as error:
        raise UserError(f"{error}; pass --overwrite to replace it") from error
    saved = meta.get("identity", {})
    different = [key for key in identity | saved if saved.get(key) != identity.get(key)]
    if args.precision == "auto" and "precision" in different:
        different.remove("precision")
    if not different:
        return meta
    differences = ", ".join(
        f"{key}: {saved.get(key)} on disk, {identity.get(key)} requested" for key in different
    )
    raise UserError(
        f"{path} already exists with different settings ({differences}); "
        "pass --overwrite to replace it"
    )


def run_and_save(train, job, files, *, meta, args):
    """Run a job and save its model and records, or return the meta of an equal earlier run.

    ``train(job)`` changes ``job.model``. ``meta`` is saved with it and contains the "identity" (see
    :func:`already_done`). Returns it with "seconds", the wall time, and the final "accuracies". All
    files are written to an unfinished folder and moved up at the end, the model last: a failed run
    saves nothing, and an interrupted one is either complete or can be resumed. Raises UserError.
    """
    with unfinished_folder(files.folder) as unfinished:
        # Another run may have finished here since the flags were checked.
        if earlier := already_done(files.model_path, meta["identity"], args):
            return earlier
        job.progress = Progress(
            unfinished / RESUME_FILE,
            meta["identity"],
            resume=args.resume,
            save_every=args.save_every,
        )
        if job.progress.restored:
            print(f"{job.label}: resuming after epoch {len(job.progress.restored['records'])}")
        history = History(unfinished / "history.jsonl")
        with WandbRun(files.folder, job.label, meta, args.wandb_mode) as wandb_run:

            def log(record):
                history.add(record)
                wandb_run.log(record)

            job.log = log
            if job.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(job.device)
            with resumable(job):
                train(job)
            meta = meta | {"seconds": job.progress.seconds}
            if job.device.type == "cuda":
                meta["peak_memory"] = round(torch.cuda.max_memory_allocated(job.device) / 1e6)  # MB
            meta["accuracies"] = final_accuracies(job)
            if job.term is not None:
                meta["q_hats"] = job.term.q_hats
            for file_name, state in job.by_products.items():
                checkpoint.save(unfinished / file_name, state, meta)
            save_json(unfinished / files.record, meta | {"history": history.records})
            checkpoint.save(unfinished / files.model, job.model.state_dict(), meta)
            move_up(unfinished, last=files.model)
            if not distributed.rank():
                (files.folder / FAILURE_FILE).unlink(missing_ok=True)
            row = {"method": job.label, "seconds": meta["seconds"]} | meta["accuracies"]
            wandb_run.log_table("run", [row])
    return meta


@contextmanager
def resumable(job):
    """Save the state of the last epoch for --resume if an error or a signal ends the block."""
    try:
        yield
    except Diverged:
        raise
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if job.progress.save():
            reason = f"the state of {job.label} is saved; pass --resume to continue"
            raise KeyboardInterrupt(reason) from error
        raise
    except Exception:  # e.g. a full disk, a failed rank
        with suppress(UserError):
            job.progress.save()
        raise


def final_accuracies(job):
    """The accuracies on all images. Raises :class:`Diverged` for weights or logits that are not
    finite, which methods without training can cause, too.
    """
    with suppress(NotFinite):
        if weights_are_finite(job.model):
            return job.accuracies()
    raise Diverged(
        f"{job.label} diverged: some of its weights or outputs are NaN or infinite; choose "
        "a lower --learning_rate or a weaker setting (earlier results are unchanged)"
    )
