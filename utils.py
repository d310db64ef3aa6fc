"""What the four scripts share: errors, flags, seeds, data and splits, checkpoints, run folders, logging."""

import argparse
import codecs
import csv
import errno
import hashlib
import json
import logging
import math
import os
import pickle
import platform
import posixpath
import re
import signal
import stat
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# This module is the first import of every script, so that the following precedes the import of torch.
# OpenMP's idle threads go to sleep after a moment. By default they spin, and take the cores from the very thread that
# they wait for as soon as other processes are busy.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "1000"
    )  # asleep at once, training on an idle machine is a fifth slower
if (
    Path(sys.argv[0]).name.startswith("main_")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    # While a script imports its libraries, Ctrl-C ends it at once and without a traceback. run_script() takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from models import distributed
from models.checkpoint import write_file
from models.errors import NotFinite, UserError, binary_kind, error_reason, first_line, printable  # noqa: F401 - utils.UserError

# ---------------------------------------------------------------- errors


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run whose state is saved; the message says how to go on."""


def run_script(main):
    """Run a script's ``main``. A user's mistake ends it with one line on stderr and status 2, Ctrl-C and SIGTERM end it
    with status 130, and a closed output pipe with status 141. With torchrun, only the first process prints."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if (
            signal.getsignal(number) is not signal.SIG_IGN
        ):  # as nohup and background jobs of shells set it
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal without Unicode shows "?" in place of q̂, λ and ±
    name = Path(sys.argv[0]).name
    try:
        with redirect_stdout(None) if distributed.rank() else nullcontext():
            status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as error:  # argparse ends --help this way
        status = error.code or 0
    except BrokenPipeError:
        status = 141  # what a shell reports for SIGPIPE
    except UserError as error:
        status = _ends(f"{name}: error: {error}", 2)
    except KeyboardInterrupt as error:
        status = _ends(f"{name}: interrupted; {str(error) or 'finished results are kept'}", 130)
    except (RuntimeError, ConnectionError, MemoryError) as error:
        if _out_of_memory(error):
            remedy = "lower --batch_size, --image_size, --memory_gb or --workers; --resume goes on with a training"
            status = _ends(f"{name}: error: out of memory ({first_line(error)}); {remedy}", 2)
        elif distributed.world_size() > 1 and _of_processes(error):
            why = f"another process of this run has died or hangs ({str(error).strip().splitlines()[-1][:100]})"
            status = _ends(
                f"{name}: error: {why}; nothing is lost that was done, and --resume goes on", 1
            )
        else:
            raise
    except OSError as error:  # permissions, paths that are too long, full or failing disks
        if error.filename is None:
            raise
        status = _ends(
            f"{name}: error: {printable(error.filename)}: cannot be used ({error_reason(error)})", 2
        )
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the stream once more at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 141
    if wandb_state.hung:  # wandb's exit handlers would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _ends(line, status):
    """Say why a script ends. All processes meet the same mistake: the others wait for the first one to say it, after
    which torchrun ends them, and speak only of what the first one does not know."""
    if distributed.rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        line = f"[process {distributed.rank()}] {line}"
    line = "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in line
    )  # one line, whatever it cites
    print(line, file=sys.stderr, flush=True)
    return status


def _of_processes(error):
    """Whether an error is about the connection to the other processes."""
    return isinstance(error, dist.DistError | ConnectionError) or "gloo" in str(error).lower()


def _out_of_memory(error):
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)


# ---------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in every line that has one, line breaks of description and epilog kept."""

    def _get_help_string(self, action):
        return (
            action.help
            if action.default is None or action.required
            else super()._get_help_string(action)
        )


def number(kind, minimum=None, maximum=None, *, exclusive=False):
    """An argparse type: a finite number within bounds, which ``exclusive`` leaves out themselves."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'}"
            ) from None
        low = minimum is not None and (value < minimum or (exclusive and value == minimum))
        high = maximum is not None and (value > maximum or (exclusive and value == maximum))
        if low or high or not math.isfinite(value):
            bounds = (
                [f"{'above' if exclusive else 'at least'} {minimum}"] if minimum is not None else []
            )
            bounds += (
                [f"{'below' if exclusive else 'at most'} {maximum}"] if maximum is not None else []
            )
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds) or 'finite'}")
        return value

    return parse


def list_of(parse_item):
    """An argparse type: several values with commas between, each at most once."""

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
    """An argparse type: a path, in which ``~`` is the home directory also after ``=``, where shells leave it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{text}: no such user; write ./{text} for a file of that name"
        )
    return expanded


ALPHA = number(float, 0, 1, exclusive=True)


def make_parser(description, epilog=None):
    """A parser with the flags that all four scripts share: model, data, run."""
    parser = _Parser(
        description=description, epilog=epilog, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name", default="resnet18", help="resnet18 (for small images), vit, or a timm model"
    )
    group.add_argument(
        "--width", type=number(int, 1, 512), default=64, help="channels of resnet18's first stage"
    )
    group.add_argument(
        "--image_size",
        type=number(int, 1, 4096),
        help="side in pixels that images are resized to; when left out, the data's own (resnet18) or 224 (vit)",
    )
    group.add_argument(
        "--pretrained_path",
        type=expand_path,
        help="ImageNet weights of vit or a timm model on disk, not downloaded",
    )
    group.add_argument(
        "--no_pretrained", action="store_true", help="start vit or a timm model from random weights"
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data_name", choices=DATA_NAMES, default="digits", help="which images")
    group.add_argument(
        "--data_dir",
        type=expand_path,
        default="./data",
        help="where the data lies or is downloaded to",
    )
    group.add_argument(
        "--num_classes",
        type=number(int, 2),
        help="checked against the data; inferred when left out",
    )
    group.add_argument(
        "--memory_gb",
        type=number(float, 0),
        default=8.0,
        metavar="GB",
        help="image_folder, tiny_imagenet: more pixels than this stay on disk and are read anew for every batch",
    )
    group.add_argument(
        "--workers",
        type=number(int, 0, 1024),
        default=os.cpu_count(),
        help="processes that read images which stay on disk; any number gives the same results",
    )
    group.add_argument(
        "--skip_corrupt",
        action="store_true",
        help="image_folder, tiny_imagenet: leave out images that cannot be read",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=1, help="of the split and the training"
    )
    group.add_argument(
        "--seeds",
        type=list_of(number(int, 0, 2**32 - 1)),
        help="several, as 1,2,3, in the place of --seed",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="auto (CUDA if there is a GPU, else cpu), cpu, cuda, cuda:1, ..., mps",
    )
    group.add_argument(
        "--runs_dir", type=expand_path, default="./runs", help="where all results go"
    )
    group.add_argument(
        "--wandb_mode",
        choices=["online", "offline", "disabled"],
        help="when left out: online if logged in, else offline",
    )
    return parser


def add_training_flags(parser, defaults):
    """Flags of the training loop. ``defaults`` says in words what a flag left out means."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=number(int, 3), help=f"images a step; {defaults}")
    group.add_argument("--num_epochs", type=number(int, 1), help=defaults)
    group.add_argument("--learning_rate", type=number(float, 0, exclusive=True), help=defaults)
    group.add_argument(
        "--milestones",
        type=list_of(number(int, 1)),
        help="epochs at which the rate falls to a tenth, as 91,136; when left out a cosine falls to zero",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="of the network while it trains; auto: bf16 on a GPU that has it, else fp32; losses and scores are fp32",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network, with CUDA graphs on a GPU",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="redo what the run folder already holds"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was killed; the weights are as if it had not been",
    )
    group.add_argument(
        "--save_every",
        type=number(float, 0),
        default=30.0,
        metavar="SECONDS",
        help="how often at most the state that --resume needs is saved, after an epoch",
    )


def add_scenario_flags(parser, methods, model_dir):
    """Flags that say what is forgotten and with which methods."""
    group = parser.add_argument_group("unlearning")
    group.add_argument(
        "--unlearn_name",
        nargs="+",
        required=True,
        metavar="METHOD",
        help=f"one or more of {methods}, or all",
    )
    group.add_argument("--unlearn_type", choices=SCENARIOS, default="random", help="what to forget")
    group.add_argument(
        "--retain_ratio",
        type=float,
        default=0.9,
        help="random: share of the training images that stays",
    )
    group.add_argument(
        "--forget_class",
        help="class, subclass: its name or number; drawn from the seed when left out",
    )
    group.add_argument(
        "--forget_list",
        type=expand_path,
        help="list: a text file with one training index a line, or one file name (class/image.jpg) for image_folder",
    )
    group.add_argument(
        "--model_dir",
        type=expand_path,
        default=model_dir,
        help="a bare name is a file in the run folder that the other flags imply; anything with a slash is a path",
    )


def add_conformal_flags(parser):
    """Flags of the CPU loss (arXiv 2501.19403)."""
    group = parser.add_argument_group("conformal prediction unlearning")
    group.add_argument(
        "--alpha", type=ALPHA, default=0.05, help="miscoverage level of the q̂ in the loss"
    )
    group.add_argument("--delta", type=number(float, 0), default=0.01, help="margin Δ beyond q̂")
    group.add_argument(
        "--lamda", type=number(float, 0), default=0.5, help="weight λ; 0 is the base method"
    )


def given_names(given):
    """The names in ``--unlearn_name``, which blanks or commas divide."""
    return [name for item in given for name in item.split(",") if name]


def method_names(given, known, prefix=""):
    """``--unlearn_name``: several names, with blanks or commas, and ``all``. Raises UserError for unknown ones."""
    names = given_names(given)
    if "all" in names:
        names = list(known)
    names = list(dict.fromkeys(name if name in known else prefix + name for name in names))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(
            f"--unlearn_name {' '.join(given)}: choose from {', '.join(known) or 'nothing yet'}, or all"
        )
    return names


# ---------------------------------------------------------------- seeds and device


def _derive(seed, purpose):
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed, *purpose, device="cpu"):
    """A generator of its own for one purpose: what one part of a run draws never shifts another part's numbers."""
    return torch.Generator(device=device).manual_seed(_derive(seed, purpose))


def seed_everything(seed, *purpose):
    """Seed torch's global state, which initialisation and dropout draw from."""
    torch.manual_seed(_derive(seed, purpose))


def each_seed(args):
    """The flags once for every seed: those of --seeds, else --seed."""
    for seed in args.seeds or [args.seed]:
        yield argparse.Namespace(**vars(args) | {"seed": seed})


def permutation(seed, purpose, n):
    """A permutation of range(n) from NumPy's legacy generator, whose stream is frozen across versions."""
    return np.random.RandomState(_derive(seed, (purpose,)) % 2**32).permutation(n)


def pick_device(args):
    """The device of ``--device``, set to ``--precision``; joins the processes where torchrun started several.

    Raises UserError for a device that is not there.
    """
    name = (
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    )
    if distributed.world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(
                f"--device {name}: torchrun gives each process a GPU of its own; say --device cuda"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not one of cpu, cuda and mps")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("this machine has no Apple GPU, or this torch does not support it")
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kind
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"--device {name}: {reason}; use --device cpu or auto") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        tf32 = getattr(args, "precision", None) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    distributed.join_processes(device)
    return device


def pick_precision(args, device):
    """``--precision``, of which ``auto`` is bf16 on a GPU that has it, else fp32."""
    if args.precision != "auto":
        return args.precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class DataSpec:
    """What is fixed about a data set: normalisation, which augmentations make sense, training from scratch."""

    mean: tuple
    std: tuple
    crop_padding: int = 4
    flip: bool = True
    grayscale: float = 0.1
    num_epochs: int = 200
    learning_rate: float = 0.1


SPECS = {
    # A digit mirrored is another sign, and 4 pixels would be half of it: 1 of 8 is 4 of 32. In 20 epochs of 13 steps
    # a rate of 0.1 does not settle (test accuracy 91 %, at 0.01 98.7 %).
    "digits": DataSpec(
        (0.3053,) * 3,
        (0.3759,) * 3,
        crop_padding=1,
        flip=False,
        grayscale=0.0,
        num_epochs=20,
        learning_rate=0.01,
    ),
    "cifar10": DataSpec((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DataSpec((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar20": DataSpec((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": DataSpec((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    # Constants, not statistics of the folder: a statistic would remember the images to be forgotten.
    "image_folder": DataSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DATA_NAMES = tuple(SPECS)
SCENARIOS = ("random", "class", "subclass", "list")
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class ImageFiles(torch.utils.data.Dataset):
    """Images on disk: ``files[indices]`` reads them, as uint8 M×3×side×side."""

    def __init__(self, paths, side, workers):
        self.paths, self.side, self.workers = paths, side, workers

    @property
    def shape(self):
        return len(self.paths), 3, self.side, self.side

    def __getitem__(self, index):
        return _read_image(self.paths[index], self.side)

    def __getitems__(self, indices):
        """A NumPy array: unlike tensors, it needs no shared memory, of which containers have little. An error comes
        as a value, since a worker would bury its line in a traceback."""
        try:
            found = [self[index].numpy() for index in indices]
        except UserError as error:
            return error
        return np.stack(found) if found else np.empty((0, *self.shape[1:]), np.uint8)

    def batches(self, parts):
        """The images of each of ``parts`` (index tensors), read ahead by worker processes. Raises UserError for an
        image that cannot be read."""
        for found in self._read([part.tolist() for part in parts]):
            if isinstance(found, UserError):
                raise found
            yield torch.from_numpy(found)

    def unreadable(self):
        """{number: UserError} of the files that cannot be read, found by reading them all."""
        found = enumerate(self._read([[number] for number in range(len(self.paths))]))
        errors = {number: error for number, error in found if isinstance(error, UserError)}
        for error in errors.values():
            if not isinstance(error, UnreadableImage):  # not the image's fault
                raise error
        return errors

    def _read(self, parts):
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=parts,
            num_workers=min(self.workers, len(parts)),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws from the global state, which dropout draws from
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads images has died ({first_line(error)}); try fewer --workers"
            ) from error


def _as_it_is(found):
    return found


@dataclass
class Images:
    """Images as one uint8 tensor N×3×H×W with int64 labels N, on the training device, or :class:`ImageFiles`.

    ``names`` are file names, ``subclasses`` the int64 numbers N of the fine classes inside the labels, where
    the data has such.
    """

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor
    spec: DataSpec
    size: int
    names: list[str] | None = None
    subclasses: torch.Tensor | None = None

    def __len__(self):
        return len(self.labels)

    def batches(self, parts, augment=None):
        """For each of ``parts`` (indices) normalised float images B×3×size×size, of which each process gets
        its :func:`distributed.local_rows`; random augmentation only with a generator in ``augment``."""
        parts, device = list(parts), self.labels.device
        source = self._pixels([distributed.local_rows(part) for part in parts])
        # A GPU takes as long to start the work on 64 small images as on 4,096.
        together = 1
        if augment is not None and device.type == "cuda":
            together = max(1, 2**22 // (self.size**2 * max(1, len(parts[0]))))
        for start in range(0, len(parts), together):
            group = parts[start : start + together]
            pixels = torch.cat([next(source) for _ in group]) if together > 1 else next(source)
            if pixels.shape[-2:] != (self.size, self.size):
                pixels = transforms.resize(pixels, [self.size, self.size], antialias=True)
            if augment is not None:
                pixels = random_augment(pixels, self.spec, augment, [len(part) for part in group])
            mean, std = _constants(self.spec, device)
            images = pixels.float().mul_(1 / 255).sub_(mean).div_(std)
            yield from images.split([len(distributed.local_rows(part)) for part in group])

    def batch(self, indices, augment=None):
        """:meth:`batches` of one part."""
        return next(self.batches([indices], augment))

    def _pixels(self, parts):
        if torch.is_tensor(self.pixels):
            return (self.pixels.index_select(0, part) for part in parts)
        return (
            pixels.to(self.labels.device, non_blocking=True)
            for pixels in self.pixels.batches(parts)
        )


@cache
def _constants(spec, device):
    """Mean and standard deviation, brought to the device once: doing so for every batch would wait for it."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std)]


def random_augment(pixels, spec, rng, parts=None):
    """Random crop after zero padding, horizontal flip (p = 0.5) and grayscale, drawn anew for each image.

    Pixels B×3×S×S, uint8 in and float32 out (0 to 255); ``rng`` is a generator on their device. Where they are this
    process's :func:`distributed.local_rows` of several parts, of the sizes in ``parts``, every process draws for all. Crop and flip are
    one gather.
    """
    (count, channels, side, _), device = pixels.shape, pixels.device
    sizes = [count] if parts is None else parts
    padded_side = side + 2 * spec.crop_padding

    def drawn(draw, *bounds):
        numbers = draw(*bounds, (sum(sizes), 1), generator=rng, device=device)
        return (
            numbers
            if parts is None
            else torch.cat([distributed.local_rows(part) for part in numbers.split(sizes)])
        )

    def offsets():
        return drawn(torch.randint, 2 * spec.crop_padding + 1) + torch.arange(side, device=device)

    rows, columns = offsets(), offsets()
    if spec.flip:
        columns = torch.where(drawn(torch.rand) < 0.5, columns.flip(1), columns)
    places = (
        (rows[:, :, None] * padded_side + columns[:, None, :])
        .flatten(1)[:, None]
        .expand(-1, channels, -1)
    )
    padded = F.pad(pixels, [spec.crop_padding] * 4).flatten(2)
    pixels = padded.gather(2, places).unflatten(2, (side, side)).float()
    if spec.grayscale:
        gray = (drawn(torch.rand)[:, :, None, None] < spec.grayscale).float()
        # Exact for whole numbers and weights of 0 and 1, and several times as fast as torch.where.
        pixels.lerp_(transforms.rgb_to_grayscale(pixels).floor_(), gray)
    return pixels


@dataclass
class Data:
    """A data set: training images, held-out images, class names, a tag for folder names, a fingerprint.

    ``subclass_names`` name the fine classes inside the classes, where there are any. ``train_folder`` is where the
    training images' names begin, where they are files. ``contents`` are hashes of the training and the held-out images
    (of the pixels, where it is left out). The fingerprint has three parts: labels and names of the training images,
    contents of the training images, and all of this of the held-out images.
    """

    train: Images
    held_out: Images
    classes: list[str]
    tag: str
    subclass_names: list[str] | None = None
    train_folder: str | None = None
    contents: tuple[str, str] | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self):
        train, held_out = self.contents or [
            _hash_contents(part.pixels) for part in (self.train, self.held_out)
        ]
        held_out = hashlib.sha256(f"{_hash_labels(self.held_out)} {held_out}".encode()).hexdigest()
        self.fingerprint = "-".join(
            part[:16] for part in (_hash_labels(self.train), train, held_out)
        )

    def difference(self, fingerprint):
        """Which images differ from those of another fingerprint, in words; None where none do.

        Earlier versions' fingerprints are the first part alone, and only it can be compared.
        """
        names = (
            "other training images",
            "training images of other content",
            "other held-out images",
        )
        if not isinstance(fingerprint, str) or fingerprint.count("-") not in (0, 2):
            return names[0]
        pairs = zip(names, fingerprint.split("-"), self.fingerprint.split("-"), strict=False)
        return next((name for name, found, wanted in pairs if found != wanted), None)


def _hash_labels(images):
    digest = hashlib.sha256(images.labels.cpu().numpy().astype("<i8").tobytes())
    digest.update("\n".join(images.names or ()).encode())
    return digest.hexdigest()


class LoadedParts(NamedTuple):
    """What a loader returns: (pixels, labels, names, hash of the contents) of the training and the held-out images,
    class names, a tag for folder names, and the folder of the training images where they are files."""

    parts: list[tuple]
    classes: list[str]
    tag: str
    train_folder: str | None = None


def load_data(args, device, model_side=None):
    """The data set that the flags name, on ``device``. Raises UserError for missing or contradictory data.

    ``model_side`` is the side in pixels that the model was made for, None for a model that takes any.
    """
    loaders = {
        "digits": _load_digits,
        "image_folder": _load_folder,
        "tiny_imagenet": _load_tiny_imagenet,
    }
    parts, classes, tag, train_folder = distributed.first_process_first(
        lambda: loaders.get(args.data_name, _load_cifar)(args, model_side)
    )
    num_classes = 20 if args.data_name == "cifar20" else len(classes)
    if args.num_classes not in (None, num_classes):
        raise UserError(
            f"--num_classes {args.num_classes}: {args.data_name} has {num_classes} classes; leave it out"
        )
    native, spec = parts[0][0].shape[-1], SPECS[args.data_name]
    size = args.image_size or model_side or native
    try:
        train, held_out = (
            Images(
                pixels.to(device) if torch.is_tensor(pixels) else pixels,
                labels.to(device),
                spec,
                size,
                names,
            )
            for pixels, labels, names, _ in parts
        )
    except torch.OutOfMemoryError as error:
        remedy = (
            "lower it"
            if args.image_size or args.data_name != "image_folder"
            else "lower it, or set --image_size"
        )
        raise UserError(
            f"--memory_gb {args.memory_gb:g}: the images do not fit on {device}; {remedy}"
        ) from error
    subclass_names = None
    if args.data_name == "cifar20":
        subclass_names, classes = classes, _group_by_superclass((train, held_out), args)
    contents = tuple(contents for *_, contents in parts)
    return Data(train, held_out, classes, tag, subclass_names, train_folder, contents)


def _load_digits(args, model_side):
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = torch.from_numpy((scans.images * 255 / 16).round().astype(np.uint8))
    pixels = pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(scans.target.astype(np.int64))
    # The file has no test part and is ordered by writer: a fixed shuffle holds 1,000 of the 1,797 scans out.
    order = torch.from_numpy(permutation(0, "digits", len(labels)))
    parts = []
    for chosen in (order[1000:].sort().values, order[:1000].sort().values):
        parts.append((pixels[chosen], labels[chosen], None, _hash_contents(pixels[chosen])))
    return LoadedParts(parts, [str(digit) for digit in range(10)], "digits")


def _load_cifar(args, model_side):
    from torchvision import datasets

    kind = datasets.CIFAR10 if args.data_name == "cifar10" else datasets.CIFAR100
    try:
        found = [kind(args.data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        where = Path(args.data_dir) / kind.base_folder
        state = "incomplete or damaged" if os.path.lexists(where) else "missing"
        raise UserError(
            f"--data_name {args.data_name}: {printable(where)} is {state}, and the download failed "
            f"({printable(error_reason(error))}); put {kind.filename} into {printable(args.data_dir)} by hand, or check "
            "the network and the folder's permissions"
        ) from error
    parts = []
    for part in found:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append((pixels, torch.tensor(part.targets), None, _hash_contents(pixels)))
    return LoadedParts(parts, list(found[0].classes), args.data_name)


def _group_by_superclass(parts, args):
    """Turn CIFAR-100 into CIFAR-20: the archive's coarse labels become the labels. Returns their names.

    The files are those whose checksums torchvision has just tested.
    """
    folder = Path(args.data_dir) / "cifar-100-python"
    for images, name in zip(parts, ("train", "test"), strict=True):
        with open(folder / name, "rb") as file:
            coarse = pickle.load(file, encoding="latin1")["coarse_labels"]
        images.subclasses, images.labels = (
            images.labels,
            torch.tensor(coarse).to(images.labels.device),
        )
    with open(folder / "meta", "rb") as file:
        return pickle.load(file, encoding="latin1")["coarse_label_names"]


def _load_tiny_imagenet(args, model_side):
    """Tiny ImageNet as published: train/<wnid>/images/, and val/images/ with the labels in val_annotations.txt."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = Path(args.data_dir) / "tiny-imagenet-200"
    if not os.path.isdir(root):
        try:
            Path(args.data_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=args.data_dir, suffix=".part"
            ) as part:  # whole, or not at all
                download_and_extract_archive(
                    TINY_IMAGENET_URL, args.data_dir, part, md5=TINY_IMAGENET_MD5
                )
                (Path(part) / root.name).rename(root)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"--data_name tiny_imagenet: not in {printable(args.data_dir)}, and the download failed "
                f"({printable(error_reason(error))}); put tiny-imagenet-200.zip there by hand, or check the network and the "
                "folder's permissions"
            ) from error
    remedy = "remove the folder, so that it is unpacked again"
    try:
        wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
        words = dict(
            line.split("\t")[:2]
            for line in (root / "words.txt").read_text(encoding="utf-8").splitlines()
            if "\t" in line
        )
        rows = [
            line.split("\t")[:2]
            for line in (root / "val" / "val_annotations.txt")
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        held_out = sorted((f"val/images/{name}", wnids.index(wnid)) for name, wnid in rows)
        train = []
        for number, wnid in enumerate(wnids):
            names = sorted(
                name
                for name in os.listdir(root / "train" / wnid / "images")
                if name.endswith(".JPEG")
            )
            if not names:
                raise ValueError(f"no images in train/{wnid}/images")
            train += [
                (f"train/{wnid}/images/{name}", number)
                for name in names
                if not name.startswith(".")
            ]
        if not train or not held_out:
            raise ValueError("no images")
    except (OSError, ValueError) as error:
        unreadable = isinstance(error, PermissionError)
        path = printable(getattr(error, "filename", None) or root)
        raise UserError(
            f"{path}: cannot be read ({error_reason(error)}); check its permissions" if unreadable
            else f"{printable(root)}: incomplete ({printable(str(error))}); {remedy}"
        ) from error  # fmt: skip
    first = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    classes = [
        name if first.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(first, wnids, strict=True)
    ]
    parts = [
        [(root / name, name.removeprefix("train/"), number) for name, number in samples]
        for samples in (train, held_out)
    ]
    return LoadedParts(_read_parts(parts, 64, args), classes, "tiny_imagenet", str(root / "train"))


def _read_parts(parts, side, args):
    """[(pixels, labels, names, hash of the files)] of parts, each a list of (path, name, label): in memory, or as
    :class:`ImageFiles` where they are more than --memory_gb. Raises UserError for an image that cannot be read, unless
    --skip_corrupt."""
    gigabytes = sum(map(len, parts)) * 3 * side**2 / 1e9
    streamed = gigabytes > args.memory_gb
    where = printable(args.data_dir)
    if streamed:
        print(
            f"{where}: {gigabytes:.2f} GB of pixels, more than --memory_gb {args.memory_gb:g}, stay on disk"
        )
    found, corrupt = [], []
    for samples in parts:
        files = ImageFiles([path for path, *_ in samples], side, args.workers)
        if streamed:
            bad = files.unreadable() if args.skip_corrupt else {}
        else:
            pixels, bad = _read_all(files, args)
        if bad and not args.skip_corrupt:
            raise next(iter(bad.values()))
        good = [number for number in range(len(samples)) if number not in bad]
        if not good:
            raise UserError(f"--skip_corrupt: none of {len(samples)} images in {where} can be read")
        remaining = {samples[number][2] for number in good}
        for _, name, label in samples:
            if label not in remaining:
                raise UserError(
                    f"--skip_corrupt: no image of the class of {name} in {where} can be read"
                )
        corrupt += [samples[number][1] for number in bad]
        if bad:
            files.paths = [files.paths[number] for number in good]
            pixels = None if streamed else pixels[good]
        labels = torch.tensor([samples[number][2] for number in good])
        names = [samples[number][1] for number in good]
        found.append((files if streamed else pixels, labels, names, _hash_files(files.paths)))
    if corrupt:
        what = (
            f"{len(corrupt)} images cannot be read and are"
            if len(corrupt) > 1
            else "1 image cannot be read and is"
        )
        print(f"--skip_corrupt: {what} left out: {_some(corrupt)}")
    return found


def _read_all(files, args):
    """All pixels in memory, and {number: UserError} of those that cannot be read, which are black."""
    try:
        pixels = torch.zeros(files.shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"--memory_gb {args.memory_gb:g}: {len(files.paths)} images of {files.side}×{files.side} pixels are more "
            f"than this machine has to spare; lower it, or --image_size"
        ) from error
    bad = {}

    def read(number):
        try:
            pixels[number] = files[number]
        except UnreadableImage as error:
            bad[number] = error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, range(len(files.paths))))
    return pixels, dict(sorted(bad.items()))


def _common_side(paths, args, model_side):
    """The side that all images share, else what the model was made for: 64 for resnet18."""

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
    print(
        f"{printable(args.data_dir)}: images of {len(sizes)} sizes are resized and centre-cropped to {side}×{side} "
        "(--image_size)"
    )
    return side


def _some(names, count=5):
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# ---------------------------------------------------------------- image folders


# Files and folders that programs create for themselves (in addition to all names that begin with a dot).
SYSTEM_NAMES = {"@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db",
                "desktop.ini", "icon\r", "system volume information"}  # fmt: skip
BACKUP_ENDINGS = ("~", ".bak", ".old", ".orig", ".part", ".crdownload", ".swp", ".tmp")
PART_NAMES = {
    "train": {"train", "training", "trn", "train_set", "trainset", "training_set", "train_images", "images_train"},
    "test": {"test", "testing", "tst", "test_set", "testset", "test_images", "images_test", "val", "valid",
             "validation", "val_set", "validation_set", "dev", "eval", "evaluation", "holdout", "held_out"},
}  # fmt: skip


class FolderReader:
    """The pictures of an image folder ``root`` and why other files in it are left out.

    Each real file counts once, however many links lead to it.
    """

    def __init__(self, root):
        self.root, self.left_out, self._places = root, {}, {}

    def read(self, part):
        """(class names, [(path, class, name)]) of root/part/<class>/…, in the order of torchvision's ImageFolder.

        Raises UserError for a folder that cannot be read, a class without pictures, and a file in two places.
        """
        samples, classes = [], []
        for entry in _entries(os.path.join(self.root, part)):
            if self._is_system(entry):
                continue
            if not _is_folder(entry):
                self._leave_out("not in a class folder", entry.path)
                continue
            classes.append(entry.name)
            for identity, path in self._pictures(entry.path).items():
                self._check_place(path, identity, (part, entry.name))
                samples.append((path, entry.name))
        if empty := sorted(set(classes) - {class_name for _, class_name in samples}):
            hint = f" (left out: {self.summary()})" if self.left_out else ""
            raise UserError(
                f"--data_dir {printable(self.root)}: no pictures in {part}/{_some(list(map(printable, empty)))}{hint}; "
                "remove an empty class from train/ and test/, or put its pictures there"
            )
        folder = os.path.join(self.root, part)
        return classes, [
            (path, class_name, os.path.relpath(path, folder)) for path, class_name in samples
        ]

    def summary(self):
        """What was left out, why and how many, with examples; "" for nothing."""
        reasons = []
        for reason, paths in self.left_out.items():
            names = [printable(os.path.relpath(path, self.root)) for path in paths]
            reasons.append(f"{len(names)} {reason} ({_some(names, 3)})")
        return "; ".join(reasons)

    def _pictures(self, folder):
        """{identity: path} of all pictures in a class folder and the folders inside it."""
        found, pending, visited = [], [folder], {_identity(folder)}
        while pending:
            folder = pending.pop()
            for entry in _entries(folder):
                if self._is_system(entry):
                    continue
                if _is_folder(entry):
                    if (identity := _identity(entry.path)) in visited:
                        self._leave_out("links to folders that are read already", entry.path)
                    else:
                        visited.add(identity)
                        pending.append(entry.path)
                elif self._is_wanted(entry):
                    found.append((folder, entry.name))
        paths = {}
        for folder, name in sorted(found):
            path = os.path.join(folder, name)
            identity = _identity(path)
            if paths.setdefault(identity, path) != path:
                self._leave_out("links to pictures that are read already", path)
        return paths

    def _is_system(self, entry):
        name = entry.name
        if (
            name.startswith(".")
            or name.casefold() in SYSTEM_NAMES
            or name.casefold().endswith(BACKUP_ENDINGS)
        ):
            self._leave_out("hidden, system or backup files or folders", entry.path)
            return True
        return False

    def _is_wanted(self, entry):
        """Whether a file is a picture: by its extension, or by its content where Pillow does not know the extension.
        A file with a picture's extension that cannot be read is an error later."""
        extension = os.path.splitext(entry.name)[1].lower()
        if extension in _pillow()[1] or (
            _is_kind(entry.path, stat.S_ISREG) and _is_picture(entry.path)
        ):
            return True
        self._leave_out(
            "files that are not pictures, or of a format that Pillow cannot read", entry.path
        )
        return False

    def _leave_out(self, reason, path):
        self.left_out.setdefault(reason, []).append(path)

    def _check_place(self, path, identity, place):
        """Raise UserError for a file that is in another class or part already, under whatever name."""
        first_path, first_place = self._places.setdefault(identity, (path, place))
        if first_place != place:
            first, second = (
                printable(os.path.relpath(name, self.root)) for name in (first_path, path)
            )
            what = (
                "training and test image" if first_place[0] != place[0] else "image of two classes"
            )
            raise UserError(
                f"--data_dir {printable(self.root)}: {first} and {second} are the same file (a link), which cannot be "
                f"{what}; remove one of them"
            )


def _entries(folder):
    """What is in a folder, sorted by name. Raises UserError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{printable(folder)}: cannot be read ({error_reason(error)})") from error


def _is_folder(entry):
    """Whether an entry of a folder is a folder or a link to one."""
    return (
        _is_kind(entry.path, stat.S_ISDIR)
        if entry.is_symlink()
        else entry.is_dir(follow_symlinks=False)
    )


def _is_kind(path, test):
    """Whether ``path`` (or what it links to) is there and of the kind that ``test``, as stat.S_ISDIR, is for."""
    try:
        return test(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise UserError(f"{printable(path)}: cannot be read ({error_reason(error)})") from error


def _identity(path):
    """Which file or folder a path leads to, whatever links are on the way; the path itself for a broken link."""
    with suppress(OSError):
        found = os.stat(path)
        if found.st_ino:
            return found.st_dev, found.st_ino
    return os.path.realpath(path)


def _load_folder(args, model_side):
    root = Path(args.data_dir)
    _check_layout(root)
    reader = FolderReader(root)
    (classes, train), (test_classes, test) = reader.read("train"), reader.read("test")
    if reader.left_out:
        print(f"{printable(root)}: left out {reader.summary()}")
    _check_classes(root, classes, test_classes)
    paths = [path for samples in (train, test) for path, *_ in samples]
    side = args.image_size or _common_side(paths, args, model_side)
    numbers = {class_name: number for number, class_name in enumerate(classes)}
    parts = [
        [
            (path, printable(name).replace(os.sep, "/"), numbers[class_name])
            for path, class_name, name in samples
        ]
        for samples in (train, test)
    ]
    tag = printable(root.resolve().name).replace("\\", "-")
    folder = os.path.join(root, "train")
    return LoadedParts(
        _read_parts(parts, side, args), list(map(printable, classes)), f"image_folder-{tag}", folder
    )


def _check_layout(root):
    """Raise UserError for a folder without train/ and test/, with what was found instead and what to do."""
    wanted = "image_folder reads train/<class>/ and test/<class>/"
    where = f"--data_dir {printable(root)}"
    if not _is_kind(root, stat.S_ISDIR):
        what = (
            "is a file or a broken link, not a folder"
            if os.path.lexists(root)
            else "no such folder"
        )
        raise UserError(f"{where}: {what}; {wanted}")
    missing = [part for part in ("train", "test") if not _is_kind(root / part, stat.S_ISDIR)]
    if not missing:
        return
    entries = [entry for entry in _entries(root) if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if _is_kind(entry.path, stat.S_ISDIR)]
    folders = [name for name in folders if name.casefold() not in SYSTEM_NAMES]
    absent = " and ".join(f"{part}/" for part in missing)
    if files := [part for part in missing if os.path.lexists(root / part)]:
        raise UserError(f"{where}: {files[0]} is a file or a broken link, not a folder; {wanted}")
    remedies = []
    for part in missing:
        if similar := [
            name
            for name in folders
            if name.casefold().strip() in PART_NAMES[part] and name not in PART_NAMES
        ]:
            shown = " and ".join(f"{printable(name)}/" for name in similar)
            remedies.append(
                f"found {shown}: rename {'it' if len(similar) == 1 else 'one of them'} to {part}/"
            )
    if remedies:
        raise UserError(f"{where}: no folder {absent} in it; {'; '.join(remedies)}")
    shown = _some([f"{printable(name)}/" for name in folders])
    if len(missing) < 2:
        advice = ": put held-out images of every class there" if missing == ["test"] else ""
        raise UserError(f"{where}: no folder {absent} in it (found {shown}); {wanted}{advice}")
    for name in folders:
        if all(_is_kind(root / name / part, stat.S_ISDIR) for part in PART_NAMES):
            inside = printable(root / name)
            raise UserError(
                f"{where}: train/ and test/ are inside {printable(name)}/; use --data_dir {inside}"
            )
    above = root.resolve().parent
    if root.resolve().name in PART_NAMES and _is_kind(above / "train", stat.S_ISDIR):
        raise UserError(
            f"{where}: train/ and test/ are in the folder above; use --data_dir {printable(above)}"
        )
    if folders:
        raise UserError(
            f"{where}: no folder {absent} in it, only {shown}; {wanted}: if these are the classes, move most images of "
            "each to train/<class>/ and the others to test/<class>/"
        )
    held = f"{len(entries)} files but no folders in it" if entries else "the folder is empty"
    raise UserError(f"{where}: {held}; {wanted}: each class needs a folder of its own in both")


def _check_classes(root, train, test):
    """Raise UserError where training and test images are not of the same two or more classes."""
    where = f"--data_dir {printable(root)}"
    if train != test:
        extra = {"train": sorted(set(train) - set(test)), "test": sorted(set(test) - set(train))}
        by_key = {_loose(name): name for name in extra["test"]}
        for name in extra["train"]:
            if other := by_key.get(_loose(name)):
                raise UserError(
                    f"{where}: train/ and test/ have different classes: {printable(name)!r} and {printable(other)!r} "
                    f"differ only in {_name_difference(name, other)}; rename one of them"
                )
        only = [
            f"only {part}/ has {_some(list(map(printable, names)))}"
            for part, names in extra.items()
            if names
        ]
        raise UserError(
            f"{where}: train/ and test/ have different classes: {'; '.join(only)}; both need pictures of every class"
        )
    if len(train) < 2:
        found = f"one class ({printable(train[0])})" if train else "no class folders"
        raise UserError(
            f"{where}: train/ has {found}; a classifier needs at least two classes, each a folder in train/"
        )


def _loose(name):
    """A name without what is easily mistaken: case, Unicode form, blanks around it."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _name_difference(name, other):
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other):
        return "their Unicode form (NFC and NFD: accents are single characters in one of them)"
    return (
        "blanks around the name"
        if name.strip() == other.strip()
        else "upper and lower case or blanks"
    )


# ---------------------------------------------------------------- pictures


class UnreadableImage(UserError):
    """An image file that cannot be read, or not rightly; --skip_corrupt leaves it out."""


# Formats that Pillow names but reads only with another program or library (Ghostscript, ...), or not at all.
UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Formats that the first bytes of a file show beyond doubt, and that are no raw camera file.
SIGNED_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "WEBP")
# Formats whose greyscale of more than 8 bits always has 65,535 as white when Pillow has opened it.
SIXTEEN_BIT_FORMATS = {"ICNS", "ICO", "IM", "JPEG2000", "PNG", "PPM"}
# Formats whose fourth channel is often unused, which means 0 everywhere.
OPTIONAL_ALPHA_FORMATS = {"BMP", "DIB", "TGA"}
COLOUR_MODES = {
    "1",
    "L",
    "P",
    "PA",
    "LA",
    "La",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
}
ALPHA_MODES = {"PA", "LA", "La", "RGBA", "RGBa"}
LONGEST_SHAPE = 8  # ratio of the sides beyond which a picture is cropped before it is resized
SAMPLED_PIECES, SAMPLED_BYTES = 4, 8192


@cache
def _pillow():
    """(formats that Pillow can read, their file extensions). Pillow's warnings are turned off: an image that cannot be
    read is an error, and the others are read rightly."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    extensions = Image.registered_extensions()  # loads every reader
    formats = tuple(name for name in Image.OPEN if name not in UNREADABLE_FORMATS)
    return formats, {
        extension for extension, name in extensions.items() if name in (*formats, "MPO")
    }


@contextmanager
def _opened(path, formats=None):
    """Pillow's image of a file. Whatever goes wrong within is an :class:`UnreadableImage` that says what."""
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise ValueError("not a regular file")
        with Image.open(path, formats=formats or _pillow()[0]) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        reason = error_reason(error)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise UserError(
                f"{printable(path)}: cannot be opened ({reason})"
            ) from error  # not the image's fault
        if isinstance(error, Image.UnidentifiedImageError):
            empty = os.path.getsize(path) == 0
            reason = (
                "the file is empty" if empty else "its content is in no format that Pillow reads"
            )
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = "a link to a file that does not exist"
        raise UnreadableImage(
            f"{printable(path)}: not a readable image ({reason}); repair or remove it, or leave it out with "
            "--skip_corrupt"
        ) from error


def _read_image(path, side):
    """One image as uint8 3×side×side: the shorter side resized, the centre kept."""
    with _opened(path) as image:
        image = _as_viewed(image)
        longest = LONGEST_SHAPE * min(image.size)
        left, top = (
            max(0, length - longest) // 2 for length in image.size
        )  # the same on both sides
        if left or top:
            image = image.crop((left, top, image.width - left, image.height - top))
        pixels = transforms.pil_to_tensor(image)
    if pixels.shape[-2:] != (side, side):
        pixels = transforms.center_crop(transforms.resize(pixels, [side], antialias=True), [side])
    return pixels


def _as_viewed(image):
    """An opened picture as a viewer shows it: the first frame, upright, 8-bit RGB, white where it is transparent.

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
    """The fourth channel of a 32-bit BMP, which Pillow ignores and other programs use for opacity; None elsewhere."""
    from PIL import Image

    if image.format not in ("BMP", "DIB") or not image.tile or image.tile[0][3][0] != "BGRX":
        return None
    _, _, offset, (_, stride, order) = image.tile[0]
    image.fp.seek(offset)
    rows = image.fp.read(stride * image.height)
    return Image.frombytes("RGBA", image.size, rows, "raw", "BGRA", stride, order).getchannel("A")


def _scale_transparent_colour(image):
    """Bring the colour that a PNG's tRNS chunk makes transparent to the scale of Pillow's pixels: the chunk has that
    of the file, whose pixels may have 2, 4 or 16 bits."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    layout = image.tile[0][3]
    if layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif layout in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[layout]


def _eight_bits(image):
    """A greyscale picture of more than 8 bits in mode L, or LA where the file names a transparent value. Raises
    ValueError where the file does not say which value is white."""
    from PIL import Image

    white, inverted = 65535 if image.format in SIXTEEN_BIT_FORMATS else None, False
    if image.format == "TIFF":
        bits, kind = (
            image.tag_v2.get(tag, (1,))[0] for tag in (258, 339)
        )  # BitsPerSample, SampleFormat
        white = 2**bits - 1 if kind == 1 and bits <= 16 else None
        inverted = image.tag_v2.get(262) == 0  # PhotometricInterpretation: MinIsWhite
    integer = image.mode.startswith("I;16") or (image.mode == "I" and image.format != "IM")
    if white is None or not integer:
        raise ValueError(
            f"mode {image.mode} of {image.format}: the file does not say which value is white; "
            "save it as an 8-bit or 16-bit PNG"
        )
    values = np.asarray(image).astype(np.int64)
    grey = (values.clip(0, white) * 255 + white // 2) // white
    grey = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255)
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return grey


def _orientation(image):
    """The EXIF orientation, 1 to 8; 1 where there is none or what there is cannot be read."""
    with suppress(
        Exception
    ):  # of a damaged EXIF block, without which viewers show the picture as it is
        if (orientation := image.getexif().get(0x0112)) in _turns():
            return orientation
    return 1


@cache
def _turns():
    """How to turn a picture upright, by EXIF orientation; ImageOps.exif_transpose would fail on damaged EXIF."""
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
    """(width, height) of the picture that :func:`_as_viewed` gives, from the file's header."""
    with _opened(path) as image:
        width, height = image.size
        if width == height or _orientation(image) < 5:
            return width, height
        if image.format == "TIFF":  # which Pillow itself turns, at opening or at loading
            image.load()
            width, height = image.size
            return (width, height) if _orientation(image) < 5 else (height, width)
        return height, width


def _is_picture(path):
    """Whether a file of unknown or no extension is a picture, by its content."""
    tiff = (
        () if os.path.splitext(path)[1] else ("TIFF",)
    )  # .dng, .nef, ...: TIFF with a thumbnail that Pillow reads
    with suppress(UnreadableImage), _opened(path, SIGNED_FORMATS + tiff):
        return True
    return False


def _hash_files(paths):
    """A hash of the files' sizes and of a sample of each one's bytes: all of a file of at most 32 KiB, else four
    pieces of 8 KiB at equal distances, the first and last bytes among them."""

    def sample(path):
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                whole = size <= SAMPLED_PIECES * SAMPLED_BYTES
                digest = hashlib.sha256(size.to_bytes(8, "little"))
                for piece in range(1 if whole else SAMPLED_PIECES):
                    file.seek(
                        piece * (size - SAMPLED_BYTES) // (SAMPLED_PIECES - 1) if piece else 0
                    )
                    digest.update(
                        file.read(SAMPLED_PIECES * SAMPLED_BYTES if whole else SAMPLED_BYTES)
                    )
        except OSError as error:
            raise UserError(f"{printable(path)}: cannot be read ({error_reason(error)})") from error
        return digest.digest()

    def samples(start):
        return b"".join(map(sample, paths[start : start + 256]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(samples, range(0, len(paths), 256)))).hexdigest()


def _hash_contents(pixels):
    """A hash of all bytes of an image tensor, or of the files of :class:`ImageFiles`."""
    if isinstance(pixels, ImageFiles):
        return _hash_files(pixels.paths)
    return hashlib.sha256(pixels.detach().cpu().contiguous().numpy()).hexdigest()


# ---------------------------------------------------------------- splits


@dataclass(frozen=True)
class Split:
    """Which images are what: int64 indices into the training images and into the held-out images.

    ``train_calibration`` is for the CPU loss alone. Where a class or subclass is forgotten it and ``test`` hold the
    retained ones, and ``forget_test`` the forgotten one's test images. ``calibration`` holds all; ``is_forgotten``
    says of each of its images whether it is of the forgotten class. ``forget_class`` is its number, or None, and
    ``forget_name`` says in words what is forgotten.
    """

    retain: torch.Tensor
    forget: torch.Tensor
    calibration: torch.Tensor
    train_calibration: torch.Tensor
    test: torch.Tensor
    forget_test: torch.Tensor
    is_forgotten: torch.Tensor
    folder: str = ""
    forget_class: int | None = None
    forget_name: str = ""

    def describe(self):
        """What is forgotten, by name and count, with the scenario's folder and the fingerprint."""
        count, total = len(self.forget), len(self.forget) + len(self.retain)
        return f"{self.forget_name}: {count} of {total} training images ({self.folder}, {self.fingerprint})"

    @property
    def fingerprint(self):
        """A hash of the sorted forget indices: the same forget set, the same fingerprint."""
        return hashlib.sha256(
            np.sort(self.forget.cpu().numpy()).astype("<i8").tobytes()
        ).hexdigest()[:16]


def default_cal_size(data):
    return min(2000, max(1, len(data.held_out) // 5))


def make_split(data, args, cal_size=None, *, scenario=True):
    """The split that data set, seed and scenario flags imply: a pure function, the same in all four scripts.

    The held-out images are permuted by the seed; the first tenth (at least 1, at most 1000) calibrates the CPU loss,
    the next ``cal_size`` the metrics, the rest is the test set. Without ``scenario`` nothing is forgotten.
    Raises UserError for scenario flags that the data contradicts.
    """
    labels = data.train.labels.cpu().numpy()
    forgotten, folder, forget_class, forget_name = np.zeros(len(labels), bool), "", None, ""
    if scenario:
        forgotten, folder, forget_class, forget_name = _forget_set(data, args, labels)
        if not 0 < forgotten.sum() < len(labels):
            raise UserError(
                f"--unlearn_type {args.unlearn_type} ({forget_name}): {forgotten.sum()} of {len(labels)} training "
                "images would be forgotten; there must be some of both"
            )

    order = permutation(args.seed, "held-out", len(data.held_out))
    if len(order) < 3:
        raise UserError(
            f"{args.data_name}: {len(order)} held-out images; at least 3 are needed, one each for training "
            "calibration, calibration and test"
        )
    first = min(1000, max(1, len(order) // 10))
    cal_size = cal_size or default_cal_size(data)
    if first + cal_size >= len(order):
        raise UserError(
            f"--cal_sizes {cal_size}: {len(order)} held-out images less {first} for training calibration leave no "
            f"test image; choose at most {len(order) - first - 1}"
        )
    train_calibration, calibration, test = np.split(order, [first, first + cal_size])
    groups = (
        data.held_out.subclasses
        if scenario and args.unlearn_type == "subclass"
        else data.held_out.labels
    )
    of_forget_class = groups.cpu().numpy() == (-1 if forget_class is None else forget_class)

    if of_forget_class[test].all():
        raise UserError(
            f"--unlearn_type {args.unlearn_type} ({forget_name}): none of the {len(test)} test images is of a retained "
            "class; add held-out images, or choose a smaller --cal_sizes"
        )

    def indices(array):
        return torch.from_numpy(array).to(data.train.labels.device)

    return Split(
        retain=indices(np.flatnonzero(~forgotten)),
        forget=indices(np.flatnonzero(forgotten)),
        calibration=indices(calibration),
        train_calibration=indices(train_calibration[~of_forget_class[train_calibration]]),
        test=indices(test[~of_forget_class[test]]),
        forget_test=indices(test[of_forget_class[test]]),
        is_forgotten=torch.from_numpy(of_forget_class[calibration]),
        folder=folder,
        forget_class=forget_class,
        forget_name=forget_name,
    )


def _forget_set(data, args, labels):
    """Which training images are forgotten, the scenario's folder name, the class if it is one, and its name."""
    if args.forget_list and args.unlearn_type != "list":
        raise UserError(f"--forget_list goes with --unlearn_type list, not {args.unlearn_type}")
    if args.forget_class is not None and args.unlearn_type not in ("class", "subclass"):
        raise UserError(
            f"--forget_class goes with --unlearn_type class or subclass, not {args.unlearn_type}"
        )
    forgotten = np.zeros(len(labels), bool)
    if args.unlearn_type == "random":
        if not 0 < args.retain_ratio < 1:
            raise UserError(
                f"--retain_ratio {args.retain_ratio}: must lie between 0 and 1, such as 0.9 to forget 10 %"
            )
        order = permutation(args.seed, "forget", len(labels))
        forgotten[order[round(len(labels) * args.retain_ratio) :]] = True
        return (
            forgotten,
            f"random_{args.retain_ratio:g}",
            None,
            f"a random share drawn from seed {args.seed}",
        )
    if args.unlearn_type == "class":
        number = _class_number(args, data.classes)
        return (
            labels == number,
            f"class_{number}",
            number,
            _class_name(args, "class", data.classes[number]),
        )
    if args.unlearn_type == "subclass":
        if data.subclass_names is None:
            raise UserError(
                f"--unlearn_type subclass: {args.data_name} has no subclasses; use --data_name cifar20"
            )
        number = _class_number(args, data.subclass_names)
        forgotten = data.train.subclasses.cpu().numpy() == number
        inside = ", ".join(data.classes[label] for label in np.unique(labels[forgotten]))
        name = _class_name(args, "subclass", data.subclass_names[number])
        return forgotten, f"subclass_{number}", number, f"{name} of class {inside}"
    if not args.forget_list:
        raise UserError(
            "--unlearn_type list: name the file of the images to forget with --forget_list FILE"
        )
    chosen = read_forget_list(Path(args.forget_list), data)
    forgotten[chosen] = True
    digest = hashlib.sha256(np.sort(chosen).astype("<i8").tobytes()).hexdigest()[:8]
    stem = printable(Path(args.forget_list).stem).replace("\\", "-")[:100]
    return forgotten, f"list_{stem}_{digest}", None, f"the images in {printable(args.forget_list)}"


def scenario_folder(args, data):
    """The scenario's folder for several seeds together: a class that each seed draws for itself has no number."""
    if args.unlearn_type in ("class", "subclass") and args.forget_class is None:
        return args.unlearn_type
    return _forget_set(data, args, data.train.labels.cpu().numpy())[1]


def _class_name(args, kind, name):
    drawn = f" (drawn from seed {args.seed})" if args.forget_class is None else ""
    return f"{kind} {name}{drawn}"


def _class_number(args, classes):
    """The position of --forget_class among the classes. A name comes first; a number is a position only where no
    class is named by a number. Raises UserError for what is no class, or could be two."""
    if args.forget_class is None:
        return int(permutation(args.seed, "forget class", len(classes))[0])
    text = printable(args.forget_class)
    if text in classes:
        return classes.index(text)
    flag, shown = f"--forget_class {text}", _some(classes, 10)
    similar = [name for name in classes if _loose(name) == _loose(text)]
    composed = [name for name in similar if _composed(name) == _composed(text)]
    if len(composed) == 1:
        return classes.index(composed[0])
    if similar:
        raise UserError(
            f"{flag}: no class has exactly this name; did you mean {' or '.join(map(repr, similar))}?"
        )
    number = int(text) if text.strip().isdecimal() else None
    numbered = [name for name in classes if name.strip().isdecimal()]
    if number is not None and numbered:
        meanings = [f"class {name}" for name in numbered if int(name) == number]
        if number < len(classes):
            meanings.append(
                f"class {classes[number]}, which is number {number} of {shown} counted from 0"
            )
        if meanings:
            raise UserError(
                f"{flag}: no class has exactly this name; it could mean {' or '.join(meanings)}; give the class's name"
            )
    elif number is not None and number < len(classes):
        return number
    numbers = "" if numbered else f", nor a number below {len(classes)}"
    raise UserError(f"{flag}: not one of {shown}{numbers}")


def _composed(name):
    """A name in one Unicode form (NFC), without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


# ---------------------------------------------------------------- forget lists


LIST_HEADINGS = {"", "file", "files", "filename", "filenames", "file_name", "name", "path", "filepath", "file_path",
                 "image", "images", "image_path", "img", "index", "indices", "idx", "id", "image_id"}  # fmt: skip
LIST_WANTED = "wanted is a text file with one training index or file name (class/image.png) a line"


class ListEntry(NamedTuple):
    """One item of a forget list: where it is (for messages) and its text."""

    place: str
    text: str


def read_forget_list(path, data):
    """Training indices from a list of indices or, for images in files, of file names.

    The list is a text file (one item a line), a CSV file with one column of file names, or a JSON list. What
    resolves to exactly one training image is taken; UserError names the line of everything else.
    """
    where = f"--forget_list {printable(path)}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error_reason(error)})") from error
    if kind := binary_kind(content):
        raise UserError(f"{where}: looks like {kind}; {LIST_WANTED}")
    text = _decode(content)
    if "\0" in text:
        raise UserError(f"{where}: looks like a binary file; {LIST_WANTED}")
    finder = TrainingImageFinder(data)
    entries = _json_entries(text, where) or _line_entries(text, finder)
    if not entries:
        raise UserError(f"{where}: names no image")
    entries = _table_column(entries, finder, where) or entries
    first_place = {}
    for place, item in entries:
        try:
            index = finder.find(item)
        except ValueError as error:
            raise UserError(f"{where}, {place}: {printable(item.strip())!r}: {error}") from error
        if index in first_place:
            raise UserError(
                f"{where}, {place}: {printable(item.strip())} is the same image as {first_place[index]}; "
                "list every image once"
            )
        first_place[index] = place
    return np.array(list(first_place), dtype=np.int64)


def _decode(content):
    """Text from bytes: by the byte order mark, as UTF-16 where every other byte is 0, else UTF-8, in which other bytes
    stand for themselves as in file names."""
    for mark, encoding in [
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ]:
        if content.startswith(mark):
            return content.decode(
                encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace"
            )
    even, odd = content[::2].count(0), content[1::2].count(0)
    if max(even, odd) > len(content) // 4 and len(content) % 2 == 0:
        return content.decode("utf-16-be" if even > odd else "utf-16-le", "replace")
    return content.decode("utf-8", "surrogateescape")


def _json_entries(text, where):
    """The items of a JSON list, [] for text that is no JSON. Raises UserError for other JSON."""
    if not text.lstrip().startswith(("[", "{")):
        return []
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return []
    plain = isinstance(items, list) and all(
        isinstance(item, str) or type(item) is int for item in items
    )
    if not plain:
        raise UserError(
            f"{where}: looks like JSON, but not a list of indices or file names; {LIST_WANTED}"
        )
    return [ListEntry(f"item {number}", str(item)) for number, item in enumerate(items, 1)]


def _line_entries(text, finder):
    """The lines of a text file that hold something, without comments (unless they name an image) and a heading."""
    entries = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        comment = line.lstrip().startswith("#") and not finder.is_in_class(line.strip())
        if line.strip() and not comment:
            entries.append(ListEntry(f"line {number}", line))
    if (
        len(entries) > 1
        and _unquoted(entries[0].text).casefold() in LIST_HEADINGS
        and not finder.knows(entries[0].text)
    ):
        entries = entries[1:]
    return entries


def _table_column(entries, finder, where):
    """Of lines that are a table, the entries of the one column that names images; [] for lines that are no table.

    Raises UserError where no column, or more than one, does.
    """
    for delimiter in ",;\t":
        if not all(delimiter in entry.text for entry in entries) or any(
            finder.knows(entry.text) for entry in entries
        ):
            continue
        rows = [
            next(csv.reader([entry.text], delimiter=delimiter, skipinitialspace=True))
            for entry in entries
        ]
        width = len(rows[0])
        if width < 2 or any(len(row) != width for row in rows):
            continue
        headings = (
            []
            if len(rows) == 1 or any(map(finder.knows, rows[0]))
            else [_loose(cell) for cell in rows[0]]
        )
        body = rows[1:] if headings else rows
        columns = [
            number for number in range(width) if all(finder.names(row[number]) for row in body)
        ]
        if len(columns) != 1:
            columns = [
                number
                for number, heading in enumerate(headings)
                if heading and heading in LIST_HEADINGS
            ]
        if len(columns) == 1:
            places = [entry.place for entry in entries][len(rows) - len(body) :]
            return [
                ListEntry(place, row[columns[0]]) for place, row in zip(places, body, strict=True)
            ]
        raise UserError(
            f"{where}, {entries[0].place}: {printable(entries[0].text.strip())[:60]!r}: looks like a table of {width} "
            f"columns, or several items in a line; {LIST_WANTED}"
        )
    return []


def _unquoted(text):
    """Text without blanks, a trailing comma or semicolon, and quotes around it."""
    text = text.strip().rstrip(",;").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].replace(text[0] * 2, text[0])
    return text.strip()


class TrainingImageFinder:
    """Which training image a text means: a file name in one of several spellings, or an index."""

    def __init__(self, data):
        self._count, self._folder = len(data.train), data.train_folder
        self._names = data.train.names or []
        self._by_name = {name: index for index, name in enumerate(self._names)}
        self._by_form, self._by_file, self._by_case = {}, {}, {}
        for index, name in enumerate(self._names):
            self._by_form.setdefault(unicodedata.normalize("NFC", name), []).append(index)
            self._by_file.setdefault(
                unicodedata.normalize("NFC", name.rpartition("/")[2]), []
            ).append(index)
            self._by_case.setdefault(_loose(name), []).append(index)
        self._classes = {name.partition("/")[0] for name in self._names}

    def find(self, text):
        """The index. Raises ValueError, with the reason, for what is no training image or could be several."""
        found = self._by_path(text) or self._by_file_name(text)
        number = self._number(text)
        if number is not None:
            found = found | {number} if number < self._count or not found else found
        if len(found) > 1:
            meanings = [self._describe(index, index == number) for index in sorted(found)]
            raise ValueError(f"could mean {' or '.join(meanings)}; {self._how_to_name()}")
        if not found:
            raise ValueError(self._why_not(text))
        (index,) = found
        if index >= self._count:
            raise ValueError(f"there are {self._count} training images, numbered from 0")
        return index

    def knows(self, text):
        """Whether the text is a file name or a number."""
        return self.names(text) or self._number(text) is not None

    def names(self, text):
        """Whether the text is a file name, in whatever spelling."""
        return bool(self._by_path(text) or self._by_file_name(text))

    def is_in_class(self, text):
        """Whether a text begins with a class and a slash."""
        parts = re.split(r"[/\\]", printable(_unquoted(text)))
        return len(parts) > 1 and parts[0] in self._classes

    def _by_path(self, text):
        """Indices of the images that a text names with class and file, most often one."""
        for spelling in dict.fromkeys((text, text.strip(), _unquoted(text))):
            if (index := self._by_name.get(printable(spelling))) is not None:
                # A class may be called train: train/1.png is then in it, unless the folder train/ is meant.
                return {index} | set(self._below("train", spelling))
        spelling = _unquoted(text)
        candidates = [spelling]
        if "\\" in spelling:
            candidates.append(re.sub(r"^[A-Za-z]:", "", spelling).replace("\\", "/"))
        with suppress(UnicodeError):  # a list in the Windows encoding of western Europe
            candidates.append(spelling.encode("utf-8", "surrogateescape").decode("cp1252"))
        for candidate in filter(None, candidates):
            tidy = posixpath.normpath(candidate)
            found = set(self._by_form.get(self._form(tidy), ())) | set(self._below("train", tidy))
            if not found and self._folder and "/" in tidy:
                found = set(self._on_disk(tidy))
            if found:
                return found
        return set()

    def _form(self, text):
        return unicodedata.normalize("NFC", printable(text))

    def _below(self, folder, text):
        """Images that a text names by a path from a folder's parent."""
        head, _, rest = text.partition("/")
        return self._by_form.get(self._form(rest), []) if head == folder else []

    def _on_disk(self, text):
        """Images that a text names by a path: absolute, from the working directory, or from where --data_dir is;
        perhaps by way of links."""
        folder = os.path.abspath(self._folder)
        parent = os.path.dirname(os.path.dirname(folder))
        for path in (
            os.path.abspath(os.path.expanduser(text)),
            os.path.abspath(os.path.join(parent, text)),
        ):
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            if found := self._by_form.get(self._form(inside)):
                return found
            if os.path.isfile(path):
                return self._identities.get(_identity(path), [])
        return []

    @cached_property
    def _identities(self):
        """Indices by file, which a path may reach through a link."""
        return {
            _identity(os.path.join(self._folder, name)): [index]
            for index, name in enumerate(self._names)
        }

    def _by_file_name(self, text):
        """Images with this file name in any class: the text has no folder."""
        spelling = _unquoted(text)
        return set() if "/" in spelling else set(self._by_file.get(self._form(spelling), ()))

    def _number(self, text):
        spelling = _unquoted(text)
        return int(spelling) if spelling.isdecimal() and len(spelling) < 20 else None

    def _describe(self, index, is_number):
        name = self._names[index] if self._names else ""
        return f"training image number {index} ({name})" if is_number else name

    def _how_to_name(self):
        return "give the class and the file name, as in class/image.png"

    def _why_not(self, text):
        spelling = _unquoted(text)
        if not spelling:
            return "names nothing"
        if self._number(text) is not None or (spelling.isdecimal() and len(spelling) >= 20):
            return f"there are {self._count} training images, numbered from 0"
        if re.fullmatch(r"[\d,;\s]+", spelling):
            return "several numbers in a line; write one a line"
        if not self._names:
            return f"not a training index (0 to {self._count - 1})"
        tidy = posixpath.normpath(spelling.replace("\\", "/"))
        if tidy.partition("/")[0] == "test":
            return "a test image: only training images can be forgotten"
        if similar := self._by_case.get(_loose(printable(tidy.removeprefix("train/")))):
            return f"no such file in train/; did you mean {self._names[similar[0]]}?"
        if spelling[0] in "[{":
            return f"looks like JSON or Python code; {LIST_WANTED}"
        if posixpath.isabs(tidy) and self._folder:
            return f"no such file in {printable(os.path.abspath(self._folder))}"
        return "no such file in train/"


# ---------------------------------------------------------------- run folders


def model_tag(args):
    """The model's part of a folder name: everything about it that changes the original model."""
    tag = args.model_name.replace("/", "-").replace("_", "-")
    if args.model_name == "resnet18":
        tag += f"w{args.width}" if args.width != 64 else ""
    elif args.no_pretrained:
        tag += "-random"
    elif args.pretrained_path:
        tag += f"-{Path(args.pretrained_path).stem}"
    return tag + (f"i{args.image_size}" if args.image_size else "")


def run_folder(args, data, seeds=None):
    """Where the results of one seed go; with ``seeds`` (as 1,2,3) what is said of several together."""
    return (
        Path(args.runs_dir)
        / f"{model_tag(args)}_{data.tag}_{f'seeds{seeds}' if seeds else f'seed{args.seed}'}"
    )


def locate(model_dir, folder):
    """The file behind --model_dir: a bare name lies in ``folder``, anything with a slash is a path."""
    return Path(model_dir) if "/" in model_dir or os.sep in model_dir else folder / model_dir


UNFINISHED = ".unfinished"
RESUME_FILE = "resume.pth"


@contextmanager
def unfinished_folder(folder, num_bytes):
    """``folder/.unfinished``, where one run at a time writes its files; :func:`move_up` ends it.

    Checks that ``num_bytes`` can be written. Files of an interrupted run are removed, except the state that --resume
    needs. Raises UserError if the folder cannot be created or written to, if the disk is full, or if another run
    writes to it. The lock ends with the process.
    """
    unfinished = folder / UNFINISHED
    if distributed.rank():
        yield unfinished
        return
    with _creating(folder, num_bytes):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: another run is writing there; wait until it ends, or choose another --runs_dir"
        ) from None
    except (
        OSError,
        NotImplementedError,
    ) as error:  # filelock raises it on file systems without locks
        print(
            f"{folder}: cannot be locked ({first_line(error)}); make sure that no other run writes there"
        )
    try:
        if lock.is_locked:  # without the lock these files may be another run's
            _remove_files(unfinished)
        with _creating(folder, num_bytes):
            unfinished.mkdir(exist_ok=True)
            space = unfinished / "space"
            try:
                space.write_bytes(bytes(num_bytes))
            finally:
                space.unlink(missing_ok=True)
        yield unfinished
    finally:
        _remove_files(unfinished)
        lock.release()


@contextmanager
def _creating(folder, num_bytes):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot hold {num_bytes / 1e6:.0f} MB of results ({error.strerror})"
        ) from error


def _remove_files(unfinished):
    """Remove what a run left unfinished, except the state that --resume needs, and folders without files."""
    for path in sorted(unfinished.rglob("*"), reverse=True):  # files before their folders
        if path.is_dir():
            path.rmdir()
        elif path != unfinished / RESUME_FILE:
            path.unlink()
    with suppress(OSError):  # the state for --resume remains, or there is no such folder
        unfinished.rmdir()


def move_up(unfinished, last=None):
    """Move all files of an :func:`unfinished_folder` to the folder above, the one named ``last`` at the end.

    A file that is already there is replaced. The state that --resume needs is removed. Only the first process moves.
    """
    if distributed.rank():
        return
    files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
    state = unfinished / RESUME_FILE
    for path in sorted(
        (path for path in files if path != state), key=lambda path: path.name == last
    ):
        target = unfinished.parent / path.relative_to(unfinished)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        except OSError as error:
            raise UserError(f"{target}: cannot be replaced ({error.strerror})") from error
    state.unlink(missing_ok=True)


def save_json(path, content):
    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):  # JSON has neither
            return None if math.isnan(value) else str(value)
        return value

    save_text(
        path, json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    )


def save_text(path, text):
    """Text as UTF-8; bytes of file names that are not UTF-8 become escapes, which JSON reads back."""
    save_bytes(path, text.encode(errors="backslashreplace"))


def save_bytes(path, content):
    write_file(path, lambda file: file.write(content))


# ---------------------------------------------------------------- records


def describe_run(args, data, device):
    """What every record carries: flags, seed, data, versions, machine."""
    packages = ("torchvision", "timm", "numpy", "scikit-learn", "wandb")
    threads = torch.get_num_threads()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "flags": {
            name: printable(value) if isinstance(value, str) else value
            for name, value in vars(args).items()
        },
        "seed": args.seed,
        "model_name": args.model_name,
        "width": args.width,
        "num_classes": len(data.classes),
        "image_size": data.train.size,
        "data_name": args.data_name,
        "data_fingerprint": data.fingerprint,
        "versions": versions,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {threads} threads",
        "processes": distributed.world_size(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


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
    """Numbers, tables and pictures of one run in wandb, e.g. ``with WandbRun(...) as run: run.log({"loss": 1.0})``.

    wandb is optional: if it is missing, broken or does not respond, one line says so and the run
    continues without it. Only the first process logs.
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
        """``action()``, abandoned after ``patience`` seconds; after a failure this run is not logged.

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
                print(f"wandb: {reason}, records are in {self._folder}")
            wandb_state.failure_announced = True

    def _choose_mode(self, args):
        """Set the process's mode: from the flag, wandb's variables and settings files, or its login."""
        disabled = os.environ.get("WANDB_DISABLED", "").lower() not in (
            "",
            "0",
            "false",
            "no",
            "off",
        )
        environment = os.environ.get("WANDB_MODE") or ("disabled" if disabled else None)
        wandb_state.mode = wandb_state.mode or args.wandb_mode or environment
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


class Spread(NamedTuple):
    """Mean and standard deviation (of a sample) over seeds."""

    mean: float
    std: float


def summarise(rows, columns, keys):
    """One row for all those that agree in ``keys``: a :class:`Spread` of each number; texts joined.

    Rows that are alone in this stay as they are, and so do counts and texts that all agree in.
    """
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary = []
    for group in groups.values():
        merged = dict(group[0])
        for name in {
            name: None for row in group for name in row if len(group) > 1 and name not in keys
        }:
            found = [row[name] for row in group if not _missing(row.get(name))]
            numeric = all(isinstance(value, int | float) for value in found)
            kind = columns[name][1] if name in columns else "number" if numeric else "text"
            if kind == "text" or (kind == "count" and len(set(found)) == 1):
                merged[name] = (
                    "; ".join(dict.fromkeys(map(str, found)))
                    if len(set(found)) > 1
                    else (found or [None])[0]
                )
            elif found:
                merged[name] = Spread(
                    float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
                )
        summary.append(merged)
    return summary


def _missing(value):
    return value is None or (isinstance(value, float) and math.isnan(value))


FORMATS = {
    "percent": lambda value: f"{100 * value:.1f}",
    "number": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:.1f}" if isinstance(value, float) else f"{value:d}",
    "seconds": lambda value: f"{value:.1f}",
    "text": str,
}


def format_cell(value, kind):
    """A value as tables show it; the kind is percent, number, count, seconds or text, and a :class:`Spread` is
    mean±standard deviation."""
    if isinstance(value, Spread):
        return "±".join(FORMATS[kind](part) for part in value)
    return "–" if _missing(value) else FORMATS[kind](value)


def print_table(columns, rows):
    """Rows (dicts) under their headings; ``columns`` maps a key to (heading, kind), as :func:`format_cell` has them."""
    lines = [[heading for heading, _ in columns.values()]]
    lines += [
        [format_cell(row.get(key), kind) for key, (_, kind) in columns.items()] for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
