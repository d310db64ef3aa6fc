"""What the four scripts share: errors, flags, seeds, data sets, splits, run folders and records."""

from __future__ import annotations

import os

# Before the import of torch: idle threads of OpenMP spin and take the cores of a busy machine from
# the thread that they wait for. With no spin at all, an idle machine would be 20 % slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# isort: split
import argparse
import hashlib
import json
import math
import pickle
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms

from models import checkpoint, distributed
from models.errors import NotFinite, UserError, first_line
from models.seeds import permutation
from models.training import Diverged, Progress, weights_are_finite

# ---------------------------------------------------------------- errors


def run_script(main):
    """Run a script's ``main`` and exit with its status.

    A UserError or OSError is one line on stderr and status 2. Ctrl-C, SIGTERM and SIGHUP raise
    KeyboardInterrupt; status 130. A closed output pipe gives 141.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs do
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # "?" for q̂, λ and ± on a terminal without Unicode
            stream.reconfigure(errors="replace")
    status, message = 0, None
    try:
        with redirect_stdout(None if distributed.rank() else sys.stdout):
            status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as error:  # argparse ends --help this way
        status = error.code
    except BrokenPipeError:
        status = 141  # what a shell reports for SIGPIPE
    except KeyboardInterrupt as error:
        status, message = 130, f"interrupted; {str(error) or 'finished results are kept'}"
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        status, message = 2, f"error: {str(error) or 'out of memory'}"
    if message:
        if distributed.rank():  # torchrun stops the other ranks when the first one has printed it
            time.sleep(5)
        line = f"{Path(sys.argv[0]).name}: {message}"
        characters = (char if char.isprintable() else ascii(char)[1:-1] for char in line)
        print("".join(characters), file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # Python flushes once more at exit, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


# ---------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *given):
        args = super().parse_args(*given)
        args.width = args.width or SPECS[args.data_name].width
        return args

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults of flags with a value, and keeps the line breaks of description and epilog."""

    def _get_help_string(self, action):
        hidden = action.default in (None, False) or action.required
        return action.help if hidden else super()._get_help_string(action)


def number(kind, minimum=-math.inf, maximum=math.inf, *, exclusive=False):
    """An argparse type: a finite number within bounds. ``exclusive`` excludes the bounds."""

    def number(text):  # argparse prints the name: invalid number value
        value = kind(text)
        within = minimum < value < maximum if exclusive else minimum <= value <= maximum
        if not within or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value

    return number


def list_of(parse_item, choices=None):
    """An argparse type: comma-separated values without duplicates, all of them in ``choices``."""

    def parse(text):
        items = [parse_item(item.strip()) for item in text.split(",") if item.strip()]
        if not items or len(set(items)) < len(items) or not set(items) <= set(choices or items):
            expected = f"different values of {', '.join(choices or ['this kind'])}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {expected}")
        return items

    return parse


expand_path = os.path.expanduser  # an argparse type: shells leave the ~ in --flag=~/x
ALPHA = SHARE = number(float, 0, 1, exclusive=True)
POSITIVE = number(float, 0, exclusive=True)
SEED = number(int, 0, 2**32 - 1)


def make_parser(description, epilog=None):
    """A parser with the flags that all four scripts share: model, data, run."""
    options = {"epilog": epilog, "formatter_class": _HelpFormatter, "allow_abbrev": False}
    parser = _Parser(description=description, **options)

    add = parser.add_argument_group("model").add_argument
    add("--model_name", default="resnet18", help="resnet18, vit, or the name of a timm model")
    width = "channels in resnet18's first stage; default: 16 for digits, else 64"
    add("--width", type=number(int, 1, 512), help=width)
    add("--image_size", type=number(int, 1, 4096), help="pixels per side; default: unchanged")
    add("--pretrained_path", type=expand_path, help="file with ImageNet weights (no download)")
    add("--no_pretrained", action="store_true", help="start vit or a timm model untrained")

    add = parser.add_argument_group("data").add_argument
    add("--data_name", choices=list(SPECS), default="digits", help="data set")
    add("--data_dir", type=expand_path, default="./data", help="folder of the data set")
    add("--num_classes", type=number(int, 2), help="checked against the data; default: inferred")
    workers = {"default": os.cpu_count(), "help": "number of processes that read image files"}
    add("--workers", type=number(int, 0, 1024), **workers)

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=SEED, default=1, help="random seed for the split and for training")
    add("--split_seed", type=SEED, help="random seed for the split; default: the seed")
    add("--seeds", type=list_of(SEED), help="comma-separated seeds, e.g. 1,2,3 (overrides --seed)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps")
    add("--runs_dir", type=expand_path, default="./runs", help="folder for all results")
    modes = {"choices": ["online", "offline", "disabled"]}
    add("--wandb_mode", **modes, help="default: wandb's setting, else online if logged in")
    return parser


def add_training_flags(parser, defaults):
    """Flags of the training loop. ``defaults`` describes the default recipe."""
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=number(int, 3), help=f"images per step; {defaults}")
    add("--num_epochs", type=number(int, 1), help=f"number of epochs; {defaults}")
    add("--learning_rate", type=POSITIVE, help=f"initial learning rate; {defaults}")
    schedule = "epochs that divide the rate by 10, e.g. 91,136; default: cosine decay to zero"
    add("--milestones", type=list_of(number(int, 1)), help=schedule)
    precision = {"choices": ["auto", "fp32", "tf32", "bf16"], "default": "auto"}
    add("--precision", **precision, help="auto: bf16 on a GPU that supports it, else fp32")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--overwrite", action="store_true", help="replace results that already exist")
    add("--jobs", type=number(int, 1, 1024), default=1, help="number of runs in parallel")
    add("--dry_run", action="store_true", help="only print the command of every run")
    add("--resume", action="store_true", help="resume an interrupted run, with the same result")
    seconds = {"default": 30.0, "help": "minimum seconds between resume checkpoints"}
    add("--save_every", type=number(float, 0), **seconds)


def add_scenario_flags(parser, methods, model_dir, *, label=False):
    """Flags that define what is forgotten and with which methods. ``label`` adds ``--label``."""
    add = parser.add_argument_group("unlearning").add_argument
    names = {"metavar": "METHOD", "help": f"one or more of {methods}, or all"}
    add("--unlearn_name", nargs="+", required=True, **names)
    if label:
        add("--label", help="folder and row of the run; default: the method's name")
    add("--unlearn_type", choices=SCENARIOS, default="random", help="what to forget")
    add("--retain_ratio", type=SHARE, default=0.9, help="random: fraction of images to retain")
    classes = "class, subclass: names or numbers, e.g. 3 or cat,dog; default: drawn from the seed"
    add("--forget_class", help=classes)
    add("--forget_list", type=expand_path, help="list: file of training indices or image names")
    path = "model file: a name in the implied run folder, or a path with a slash"
    add("--model_dir", type=expand_path, default=model_dir, help=path)


def each_seed(args):
    """The flags once per seed of --seeds, or once with --seed."""
    for seed in args.seeds or [args.seed]:
        yield argparse.Namespace(**vars(args) | {"seed": seed})


def split_seed(args):
    """The seed of the split: --split_seed, else the seed."""
    return args.seed if args.split_seed is None else args.split_seed


def pick_device(args):
    """The device of ``--device``, prepared for ``--precision``. Joins the ranks under torchrun."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(1, device=name).device  # "cuda" with the number of the GPU
    except Exception as error:  # each backend raises its own kind
        raise UserError(f"--device {name}: {first_line(error)[:200]}; try --device cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        tf32 = getattr(args, "precision", None) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    distributed.join_processes(device)
    return device


# ---------------------------------------------------------------- data sets


@dataclass(frozen=True)
class DataSpec:
    """Constants of a data set: normalization, augmentation, and training from scratch."""

    mean: tuple
    std: tuple
    crop_padding: int = 4
    flip: bool = True
    grayscale: float = 0.1
    num_epochs: int = 200
    learning_rate: float = 0.1
    width: int = 64


# No flips: a mirrored digit is not a digit. Padding 1 on 8 pixels equals CIFAR's 4 on 32. A
# learning rate of 0.1 does not converge in 20 epochs of 13 steps.
_DIGITS = {"crop_padding": 1, "flip": False, "grayscale": 0.0}
_DIGITS |= {"num_epochs": 20, "learning_rate": 0.01, "width": 16}
SPECS = {
    "digits": DataSpec((0.3053,) * 3, (0.3759,) * 3, **_DIGITS),
    "cifar10": DataSpec((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DataSpec((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar20": DataSpec((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": DataSpec((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    # ImageNet's constants: statistics of the folder would leak the forget images.
    "image_folder": DataSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SCENARIOS = ("random", "class", "subclass", "list")
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass
class Data:
    """A data set: training images, held-out images, class names, and a tag for folder names.

    ``subclass_names`` are the fine classes inside the classes, if there are any. ``fingerprint`` is
    a hash of all images, labels and file names, by default of the pixels.
    """

    train: Images
    held_out: Images
    classes: list[str]
    tag: str
    subclass_names: list[str] | None = None
    fingerprint: str = ""

    def __post_init__(self):
        if self.fingerprint:
            return
        digest = hashlib.sha256()
        for images in (self.train, self.held_out):
            digest.update(f"{list(images.pixels.shape)}\n{images.names}\n".encode())
            digest.update(images.labels.cpu().numpy().astype("<i8").tobytes())
            digest.update(images.pixels.cpu().contiguous().numpy())
        self.fingerprint = digest.hexdigest()[:32]


def load_data(
    name, folder="./data", *, device, image_size=None, native_side=None, num_classes=None, workers=0
):
    """The data set ``name``, a key of SPECS, in ``folder``; its tensors are on ``device``.

    Batches have ``image_size`` pixels per side, else ``native_side``, else as many as the images.
    Raises UserError for data that is missing, unreadable or not of ``num_classes`` classes.
    """
    loaders = {
        "digits": _load_digits,
        "tiny_imagenet": lambda: _load_tiny_imagenet(folder, workers),
        "image_folder": lambda: _load_image_folder(folder, image_size, native_side or 64, workers),
    }
    load = loaders.get(name, lambda: _load_cifar(name, folder))
    try:
        data = distributed.first_process_first(load)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        flags = f"--data_name {name} --data_dir {folder} --workers {workers}"
        raise UserError(f"{flags}: {error}") from error
    if num_classes not in (None, len(data.classes)):
        raise UserError(f"--num_classes {num_classes}: {name} has {len(data.classes)} classes")
    size = image_size or native_side or data.train.pixels.shape[-1]
    data.train.prepare(device, size)
    data.held_out.prepare(device, size)
    return data


def _load_digits():
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = torch.from_numpy((scans.images * 255 / 16).round().astype(np.uint8))
    pixels = pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(scans.target.astype(np.int64))
    # The scans are ordered by writer and have no test set: a fixed permutation holds out 1,000.
    order = torch.from_numpy(permutation(0, "digits", len(labels)))
    indices = order[1000:].sort().values, order[:1000].sort().values
    image_sets = [Images(pixels[i], labels[i], SPECS["digits"], size=8) for i in indices]
    return Data(*image_sets, [str(digit) for digit in range(10)], tag="digits")


def _load_cifar(name, folder):
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    subsets = [kind(folder, train=is_train, download=True) for is_train in (True, False)]
    image_sets, classes = [], subsets[0].classes
    for subset in subsets:
        pixels = torch.from_numpy(subset.data).permute(0, 3, 1, 2).contiguous()
        image_sets.append(Images(pixels, torch.tensor(subset.targets), SPECS[name], size=32))
    if name != "cifar20":
        return Data(*image_sets, classes, tag=name)

    def read(file):  # torchvision has just checked the checksums
        return pickle.loads((Path(folder, kind.base_folder) / file).read_bytes(), encoding="latin1")

    for images, file in zip(image_sets, ("train", "test"), strict=True):
        images.subclasses, images.labels = images.labels, torch.tensor(read(file)["coarse_labels"])
    return Data(*image_sets, read("meta")["coarse_label_names"], name, subclass_names=classes)


def _load_tiny_imagenet(folder, workers):
    root = Path(folder) / "tiny-imagenet-200"
    if not root.is_dir():  # to a temporary folder, so that root is complete or does not exist
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix=".part") as part:
            download_and_extract_archive(TINY_IMAGENET_URL, folder, part, md5=TINY_IMAGENET_MD5)
            (Path(part) / root.name).rename(root)

    def read_table(file):
        lines = (root / file).read_text("utf-8").splitlines()
        return dict(line.split("\t")[:2] for line in sorted(lines))

    wnids, train = _list_folder(root, "train", ending=".JPEG")
    held_out = [
        Sample(str(root / f"val/images/{file}"), f"val/images/{file}", wnids.index(wnid))
        for file, wnid in read_table("val/val_annotations.txt").items()
    ]
    words = read_table("words.txt")
    names = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    classes = [  # two are "crane"
        name if names.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(names, wnids, strict=True)
    ]
    options = {"side": 64, "workers": workers}
    return _read_pictures(root, train, held_out, classes, tag="tiny_imagenet", **options)


@dataclass
class Images:
    """Images as one uint8 tensor N×3×H×W: on the training device, or a memory-mapped file.

    ``labels`` and ``subclasses`` (the fine classes, if there are any) are int64 N, ``names`` file
    names. Batches have ``size``×``size`` pixels.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    spec: DataSpec
    size: int
    names: list[str] | None = None
    subclasses: torch.Tensor | None = None

    def __len__(self):
        return len(self.labels)

    def prepare(self, device, size):
        """Move the tensors to ``device`` and set the size of the batches.

        Pixels of more than half of the GPU's free memory are moved batch by batch instead.
        """
        self.size, self.labels = size, self.labels.to(device)
        if self.subclasses is not None:
            self.subclasses = self.subclasses.to(device)
        if device.type != "cuda" or self.pixels.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
            self.pixels = self.pixels.to(device)

    def batches(self, index_batches, augment=None):
        """Normalized float images B×3×size×size for each of ``index_batches`` (int64 tensors B).

        Each process gets its :func:`distributed.local_rows`. Images are augmented only with a
        generator in ``augment``.
        """
        index_batches, device = list(index_batches), self.labels.device
        # On a GPU, augmenting 64 small images takes as long as 4,096: several batches share a call.
        together = 1
        if augment is not None and device.type == "cuda":
            together = max(1, 2**22 // (self.size**2 * max(1, len(index_batches[0]))))
        for start in range(0, len(index_batches), together):
            group = index_batches[start : start + together]
            local = [distributed.local_rows(indices) for indices in group]
            pixels = self.pixels.index_select(0, torch.cat(local).to(self.pixels.device)).to(device)
            pixels = transforms.resize(pixels, [self.size, self.size], antialias=True)
            if augment is not None:
                sizes = [len(indices) for indices in group]
                pixels = random_augment(pixels, self.spec, augment, batch_sizes=sizes)
            mean, std = _constants(self.spec, device)
            images = pixels.float().mul_(1 / 255).sub_(mean).div_(std)
            yield from images.split([len(indices) for indices in local])


@cache
def _constants(spec, device):
    """Mean and standard deviation on the device, copied once: each copy would wait for the GPU."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std)]


def random_augment(pixels, spec, rng, batch_sizes=None):
    """Random crop after zero padding, horizontal flip (p = 0.5) and grayscale, for each image.

    Pixels B×3×S×S, uint8 in and float32 out (0 to 255). ``rng`` is a generator on their device.
    With ``batch_sizes``, the pixels are the :func:`distributed.local_rows` of batches of these
    sizes: every process draws for all images, so that the number of processes is irrelevant.
    """
    (count, channels, side, _), device = pixels.shape, pixels.device
    sizes = [count] if batch_sizes is None else batch_sizes
    padded_side = side + 2 * spec.crop_padding

    def draw(distribution, *bounds):
        numbers = distribution(*bounds, (sum(sizes), 1), generator=rng, device=device)
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


# ---------------------------------------------------------------- image files

DECODER_VERSION = 1  # part of the arrays' key: raise it when decoded pixels change
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


class Sample(NamedTuple):
    """An image file, its name relative to the data set's folder, and its class."""

    path: str
    name: str
    label: int


def _load_image_folder(root, image_size, default_side, workers):
    """train/<class>/... and test/<class>/..., with the classes and order of ImageFolder."""
    classes, train = _list_folder(root, "train")
    test_classes, held_out = _list_folder(root, "test")
    if len(classes) < 2 or classes != test_classes:
        differing = sorted(set(classes) ^ set(test_classes))[:5] or classes
        raise ValueError(f"train/ and test/ need the same classes, two or more: {differing}")
    tag = f"image_folder-{Path(root).resolve().name}"
    options = {"tag": tag, "side": image_size, "default_side": default_side, "workers": workers}
    return _read_pictures(root, train, held_out, classes, **options)


def _list_folder(root, subset, ending=""):
    """Class names and samples of root/subset/<class>/..., without names that begin with a dot."""
    folder = os.path.join(os.path.abspath(root), subset)

    def is_picture(path):
        return "/." not in path[len(folder) :] and path.endswith(ending)

    classes = [name for name in datasets.folder.find_classes(folder)[0] if not name.startswith(".")]
    labels = {name: label for label, name in enumerate(classes)}
    files = datasets.folder.make_dataset(folder, labels, is_valid_file=is_picture)
    start = len(folder) - len(subset)
    return classes, [Sample(path, path[start:], label) for path, label in files]


def _read_pictures(root, train, held_out, classes, *, tag, side, workers, default_side=None):
    """The :class:`Data` of image files: decoded once, into a memory-mapped array N×3×side×side.

    ``side`` defaults to that of the images if all are squares of one size, else ``default_side``.
    Arrays are in ``root``/.decoded, or in torch's cache folder if ``root`` is read-only. A change
    that preserves a file's name, size and modification time is not noticed.
    """
    samples, digest = train + held_out, hashlib.sha256(b"%d" % DECODER_VERSION)
    for path, name, label in samples:
        status = os.stat(path)
        digest.update(f"{name}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    key, folder = digest.hexdigest()[:32], Path(root, ".decoded")
    if not os.access(root, os.W_OK):
        folder = Path(torch.hub.get_dir(), "decoded", key)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{key}-{side or f'auto{default_side}'}-"
    with FileLock(folder / ".lock"):  # one process decodes while others wait
        if not (paths := list(folder.glob(f"{prefix}*.npy"))):
            side = side or _common_side(samples) or default_side
            paths = [_decode_files(samples, side, workers, folder / prefix)]
        for stale in folder.glob("*.npy"):
            if not stale.name.startswith(key):
                stale.unlink()
        # Copy on write, because torch warns of read-only arrays. Nothing writes to it.
        pixels = torch.from_numpy(np.load(paths[0], mmap_mode="c"))
    labels = torch.tensor([sample.label for sample in samples])
    names = [sample.name.partition("/")[2] for sample in samples]
    spec = SPECS[tag.partition("-")[0]]
    image_sets = [
        Images(pixels[part], labels[part], spec, size=pixels.shape[-1], names=names[part])
        for part in (slice(len(train)), slice(len(train), None))
    ]
    return Data(*image_sets, classes, tag=tag, fingerprint=paths[0].stem.rpartition("-")[2])


def _common_side(samples):
    """The side length in pixels of images that are all squares of one size, else None."""
    sides = set()
    for sample in samples:
        with Image.open(sample.path) as image:
            sides.update(image.size)
        if len(sides) > 1:
            return None
    return sides.pop()


def _decode_files(samples, side, workers, prefix):
    """Write the array of all images. Its path is ``prefix`` and the fingerprint of the data.

    The fingerprint is a hash of every file's name, class and bytes, the same on every machine.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), 3, side, side)}
    unfinished, digest = prefix.with_name("unfinished"), hashlib.sha256()
    # A generator of its own, since the default is the global one, which dropout draws from.
    options = {"batch_size": None, "num_workers": workers, "generator": torch.Generator()}
    decode = partial(decode_file, side=side)
    images = torch.utils.data.DataLoader(samples, collate_fn=decode, **options)
    with open(unfinished, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for image in distributed.progress_bar(iterable=images, desc="decoding images"):
            if isinstance(image, Exception):
                raise image
            pixels, image_hash = image
            file.write(pixels.numpy())
            digest.update(image_hash)
        file.flush()
        os.fsync(file.fileno())
    return unfinished.rename(f"{prefix}{digest.hexdigest()[:32]}.npy")


def decode_file(sample, side):
    """(pixels uint8 3×side×side, hash of name, class and bytes) of the image file of a Sample.

    The shorter side is resized, and the center is kept. A file that cannot be read is a ValueError,
    returned because workers raise tracebacks.
    """
    try:
        with open(sample.path, "rb") as file:
            image_hash = hashlib.file_digest(file, "sha256")
            image_hash.update(f"{sample.name}\0{sample.label}".encode())
            pixels = transforms.pil_to_tensor(decode_image(file))
    except Exception as error:  # Pillow's readers raise many kinds
        return ValueError(f"{sample.path}: {first_line(error)}")
    pixels = transforms.resize(pixels, [side], antialias=True)
    return transforms.center_crop(pixels, [side] * 2).contiguous(), image_hash.digest()


def decode_image(file):
    """A picture as viewers show it: first frame, upright by EXIF, 8-bit RGB on white.

    16-bit greyscale PNG is divided by 257. Raises ValueError for every other picture that does not
    have 8 bits per channel, and one of Pillow's errors for a file that it cannot read.
    """
    image = Image.open(file)
    is_grey_16 = image.format == "PNG" and image.mode in ("I", "I;16")
    # TIFF tags 258 and 339: bits per sample, and its format (1 is unsigned). Pillow opens some
    # files of 16 or of signed bits as if they had 8, and raw photographs as their thumbnail (254).
    tags = getattr(image, "tag_v2", {})
    is_plain = set(tags.get(258, (8,))) <= {1, 8} and set(tags.get(339, (1,))) == {1}
    is_plain = is_plain and not tags.get(254, 0) & 1
    if image.format == "PNG" and "transparency" in image.info:  # it is not scaled to 8 bits
        is_plain = image.mode == "P" or image.tile[0][3] == image.mode
    if not is_plain or not (is_grey_16 or image.mode in EIGHT_BIT_MODES):
        raise ValueError(f"{image.format} of mode {image.mode} without plain 8 bits per channel")
    image = ImageOps.exif_transpose(image)
    if is_grey_16:
        grey = (np.asarray(image).astype(np.int64) * 255 + 32767) // 65535  # rounded
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------- splits


@dataclass(frozen=True)
class Scenario:
    """What is forgotten: an unlearn_type of SCENARIOS, or None for nothing.

    ``forget_class`` names classes or subclasses (default: one is drawn), ``forget_list`` a file.
    ``suffix`` ends the folder's name.
    """

    unlearn_type: str | None
    retain_ratio: float = 0.9
    forget_class: str | None = None
    forget_list: str | None = None
    split_seed: int = 1
    suffix: str = ""


@dataclass(frozen=True)
class Split:
    """Which images are used for what: int64 indices of training images and of held-out images.

    ``retain`` and ``forget`` are training images, the others are held-out images. If classes (or
    subclasses) are forgotten, ``train_calibration`` (for the CPU loss) and ``test`` have retained
    classes only, ``forget_test`` has the forgotten ones. ``calibration`` has both, and the bool
    mask ``is_forgotten`` marks the forgotten ones.
    """

    retain: torch.Tensor
    forget: torch.Tensor
    calibration: torch.Tensor
    train_calibration: torch.Tensor
    test: torch.Tensor
    forget_test: torch.Tensor
    is_forgotten: torch.Tensor
    folder: str = ""
    forget_classes: tuple[int, ...] = ()  # the numbers of forgotten classes or subclasses
    forget_name: str = ""  # what is forgotten, in words

    def describe(self):
        """What is forgotten, by name and count, with the scenario's folder and the fingerprint."""
        counts = f"{len(self.forget)} of {len(self.forget) + len(self.retain)} training images"
        return f"{self.forget_name}: {counts} ({self.folder}, {self.fingerprint})"

    @property
    def fingerprint(self):
        """A hash of the sorted forget indices: equal forget sets have equal fingerprints."""
        return _hash_indices(self.forget.cpu().numpy())[:16]


def _hash_indices(indices):
    return hashlib.sha256(np.sort(indices).astype("<i8").tobytes()).hexdigest()


def default_cal_size(data):
    """A fifth of the held-out images, at most 2,000."""
    return min(2000, max(1, len(data.held_out) // 5))


def make_split(data, scenario, cal_size=None):
    """The split that data set and :class:`Scenario` define: a pure function, so all scripts agree.

    The split seed permutes the held-out images. The first tenth (1 to 1000) calibrates the CPU
    loss, the next ``cal_size`` the metrics, and the rest is the test set. Raises UserError for a
    scenario that contradicts the data.
    """
    forget_set = _make_forget_set(data, scenario)
    flag = f"--unlearn_type {scenario.unlearn_type} ({forget_set.name})"
    num_forget, num_train = forget_set.mask.sum(), len(data.train)
    if scenario.unlearn_type and not 0 < num_forget < num_train:
        raise UserError(f"{flag}: {num_forget} of {num_train} training images would be forgotten")

    order = permutation(scenario.split_seed, "held-out", len(data.held_out))
    first = min(1000, max(1, len(order) // 10))
    last = first + (cal_size or default_cal_size(data))
    if last >= len(order):
        raise UserError(f"--cal_sizes {last - first}: {len(order)} held-out images are too few")
    train_calibration, calibration, test = np.split(order, [first, last])
    by_subclass = scenario.unlearn_type == "subclass"
    groups = data.held_out.subclasses if by_subclass else data.held_out.labels
    is_forgotten = np.isin(groups.cpu().numpy(), forget_set.classes)
    if is_forgotten[test].all():
        raise UserError(f"{flag}: none of the {len(test)} test images is of a retained class")

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
        folder=forget_set.folder + scenario.suffix,
        forget_classes=forget_set.classes,
        forget_name=forget_set.name,
    )


class ForgetSet(NamedTuple):
    """A bool mask of training images, the scenario's folder and name, and the class numbers."""

    mask: np.ndarray
    folder: str = ""
    name: str = ""
    classes: tuple[int, ...] = ()


def _make_forget_set(data, scenario):
    """The :class:`ForgetSet` of a scenario. Raises UserError for contradictory settings."""
    kind, seed, ratio = scenario.unlearn_type, scenario.split_seed, scenario.retain_ratio
    mask = np.zeros(len(data.train), bool)
    if kind is None:
        return ForgetSet(mask)
    if (scenario.forget_list is not None) != (kind == "list"):
        raise UserError(f"--unlearn_type {kind} --forget_list: list needs a file, others do not")
    if scenario.forget_class is not None and kind not in ("class", "subclass"):
        raise UserError(f"--forget_class goes with --unlearn_type class or subclass, not {kind}")
    if kind == "random":
        mask[permutation(seed, "forget", len(mask))[round(len(mask) * ratio) :]] = True
        return ForgetSet(mask, f"random_{ratio:g}", f"a random share drawn from seed {seed}")
    if kind == "list":
        path = Path(scenario.forget_list)
        mask[read_forget_list(path, data)] = True
        folder = f"list_{path.stem}_{_hash_indices(np.flatnonzero(mask))[:8]}"
        return ForgetSet(mask, folder, f"the images in {path}")
    groups, names = data.train.labels, data.classes
    if kind == "subclass":
        groups, names = data.train.subclasses, data.subclass_names
        if names is None:
            raise UserError(f"--unlearn_type subclass: {data.tag} has no subclasses; cifar20 has")
    numbers = _class_numbers(scenario, names)
    folder = "_".join(map(str, (kind, *numbers)))
    if len(folder) > len(kind) + 41:
        folder = f"{kind}_{len(numbers)}_classes_{_hash_indices(np.array(numbers))[:8]}"
    name = f"{kind} {', '.join(names[number] for number in numbers)}"
    return ForgetSet(np.isin(groups.cpu().numpy(), numbers), folder, name, numbers)


def _class_numbers(scenario, names):
    """The positions of --forget_class among the class names, ascending; default: one is drawn.

    Items between commas are names, or positions from 0 if no name is a number.
    """
    if scenario.forget_class is None:
        return (int(permutation(scenario.split_seed, "forget class", len(names))[0]),)
    text = scenario.forget_class
    numbers = {name: number for number, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        numbers = {str(number): number for number in range(len(names))} | numbers
    items = [text] if text in numbers else [item.strip() for item in text.split(",")]
    if unknown := [item for item in items if item not in numbers]:
        choices = ", ".join(names[:10])
        raise UserError(f"--forget_class {text}: {unknown[0]!r} is not one of {choices}, ...")
    return tuple(sorted({numbers[item] for item in items}))


def read_forget_list(path, data):
    """Training indices (int64) from a UTF-8 text file: one index or ``class/file.png`` per line.

    Blank lines and lines that begin with # are skipped. Raises UserError with the line number of
    an entry that is unknown or repeated.
    """
    # A file of another encoding has names that no image has.
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    by_name = {name: index for index, name in enumerate(data.train.names or ())}
    indices = {}
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        index = int(entry) if entry.isdecimal() else by_name.get(entry, -1)
        if not 0 <= index < len(data.train) or index in indices:
            reason = f"not another index below {len(data.train)} or class/file.png"
            raise UserError(f"--forget_list {path}, line {number}: {entry}: {reason}")
        indices[index] = None
    return np.array(list(indices), dtype=np.int64)


def scenario_of(args):
    """The :class:`Scenario` of the flags."""
    names, seed = ("unlearn_type", "retain_ratio", "forget_class", "forget_list"), split_seed(args)
    suffix = "" if seed == args.seed else f"_split{seed}"
    options = {name: getattr(args, name) for name in names}
    return Scenario(**options, split_seed=seed, suffix=suffix)


def read_data(args, device, native_side=None):
    """:func:`load_data` with the flags. ``native_side`` is the image size of the network."""
    sizes = {"image_size": args.image_size, "native_side": native_side}
    options = sizes | {"num_classes": args.num_classes, "workers": args.workers}
    return load_data(args.data_name, args.data_dir, device=device, **options)


def model_facts(args, data):
    """What the metadata of a checkpoint must agree with: see ``models.checkpoint.check_meta``."""
    facts = {name: getattr(args, name) for name in ("model_name", "width", "data_name")}
    facts |= {"num_classes": len(data.classes), "image_size": data.train.size}
    return facts | {"data_fingerprint": data.fingerprint}


def describe_run(args, data, device):
    """What every record contains: flags, seed, model and data, versions, machine."""
    is_gpu, threads = device.type == "cuda", torch.get_num_threads()
    packages = ("torchvision", "timm", "numpy", "scikit-learn")
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return model_facts(args, data) | {
        "flags": vars(args),
        "seed": args.seed,
        "split_seed": split_seed(args),
        "versions": versions | {package: metadata.version(package) for package in packages},
        "device": torch.cuda.get_device_name(device) if is_gpu else f"cpu, {threads} threads",
        "processes": distributed.world_size(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# ---------------------------------------------------------------- run folders

MODEL_FILE, FAILURE_FILE = "unlearning_model.pth", "failure.json"
RESUME_FILE = ".resume.pth"


def run_folder(args, data, seeds=None):
    """The folder of one seed's results, or with ``seeds`` (e.g. "1,2,3") of their summary.

    Every flag that changes the original model changes its name.
    """
    tag = args.model_name.replace("/", "-").replace("_", "-")
    if args.model_name == "resnet18":
        tag += f"w{args.width}" if args.width != SPECS[args.data_name].width else ""
    elif args.no_pretrained:
        tag += "-random"
    elif args.pretrained_path:
        tag += f"-{Path(args.pretrained_path).stem}"
    tag += f"i{args.image_size}" if args.image_size else ""
    seed = f"seeds{seeds}" if seeds else f"seed{args.seed}"
    return Path(args.runs_dir) / f"{tag}_{data.tag}_{seed}"


def scenario_folder(args, data):
    """The scenario's folder for several seeds; it has no number if each seed draws its class."""
    draws_class = args.unlearn_type in ("class", "subclass") and args.forget_class is None
    if draws_class and args.split_seed is None:
        return args.unlearn_type
    suffix = "" if args.split_seed is None else f"_split{args.split_seed}"
    return make_split(data, replace(scenario_of(args), suffix=suffix)).folder


def locate(model_dir, folder):
    """The file of --model_dir: a bare name is in ``folder``, anything with a slash is a path."""
    return Path(model_dir) if "/" in model_dir else folder / model_dir


@contextmanager
def unfinished_folder(folder, wait=0):
    """``folder/.unfinished``, in which one run at a time writes its files, until :func:`move_up`.

    Rank 0 removes the files of an interrupted run. Raises UserError if another run is still writing
    after ``wait`` seconds.
    """
    unfinished = folder / ".unfinished"
    if distributed.rank():
        yield unfinished
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=wait):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                yield unfinished
            finally:
                shutil.rmtree(unfinished)
    except Timeout:
        raise UserError(f"{folder}: in use by another run; choose another --runs_dir") from None


def move_up(unfinished, last=None):
    """Move all files of an :func:`unfinished_folder` to its parent, those named ``last`` last.

    Existing files are replaced by rank 0.
    """
    if distributed.rank():
        return
    files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == last):
        target = unfinished.parent / path.relative_to(unfinished)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def save(path, content):
    """Save bytes, text (UTF-8) or a dict (JSON, in which NaN is null and infinity is "inf").

    Bytes of file names that are not UTF-8 become escapes.
    """

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):  # JSON has neither
            return None if math.isnan(value) else str(value)
        return value

    if isinstance(content, dict):
        content = json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n"
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    checkpoint.write_file(path, lambda file: file.write(content))


def without_empty(config):
    """A nested dict of settings without those that are not set: None, False and empty ones."""
    cleaned = {key: without_empty(v) if isinstance(v, dict) else v for key, v in config.items()}
    return {key: v for key, v in cleaned.items() if v or (v == 0 and v is not False)}


class WandbRun(AbstractContextManager):
    """Numbers, tables and pictures of one run in wandb: ``with WandbRun(...) as run``.

    ``mode`` None is wandb's setting. Without a login, online becomes offline. If wandb is missing
    or fails, a line is printed and the run continues without it. Only rank 0 logs. ``curves_over``
    is the x axis of all numbers. ``continued`` logs to the run that this folder had before.
    """

    def __init__(self, folder, name, config, mode=None, *, curves_over=None, continued=False):
        self._folder, self._active = folder, mode != "disabled" and not distributed.rank()
        self._id_file = folder / "wandb/run_id" if continued else None
        self._try(lambda: self._start(name, config, mode))
        if curves_over:
            self._try(lambda: self._run.define_metric(curves_over))
            self._try(lambda: self._run.define_metric("*", step_metric=curves_over))

    def __exit__(self, *_):
        self._try(lambda: self._run.finish())

    def log(self, numbers):
        """Numbers by name."""
        self._try(lambda: self._run.log(numbers))

    def log_table(self, title, rows):
        """A table from rows (dicts)."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(key) for key in columns] for row in rows]
        options = {"columns": columns, "data": cells, "allow_mixed_types": True}
        self._try(lambda: self._run.log({title: self._wandb.Table(**options)}))

    def log_pictures(self, paths):
        """Pictures from {name: file}."""
        image = lambda name: self._wandb.Image(str(paths[name]))  # noqa: E731
        self._try(lambda: self._run.log({name: image(name) for name in paths}))

    def _try(self, action):
        if self._active:
            try:
                action()
            except Exception as error:  # training is worth more than its log
                self._active = False
                print(f"wandb: {first_line(error)}; continuing without it, see {self._folder}")

    def _start(self, name, config, mode):
        import wandb  # half a second, and it may be missing

        self._wandb, options = wandb, wandb.Settings(silent=True, console="off", init_timeout=30)
        saved = wandb.setup(settings=options).settings
        mode = mode or saved.mode
        folder, self._active = Path(os.environ.get("WANDB_DIR", self._folder)), mode != "disabled"
        if not self._active:
            return
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        if mode == "offline":
            print(f"wandb: logging offline; upload: wandb sync {folder}/wandb/offline-run-*")
        folder.mkdir(parents=True, exist_ok=True)
        run_id = os.environ.pop("WANDB_RUN_ID", None)  # a sweep's, only once
        if self._id_file and not run_id:
            run_id = self._id_file.read_text() if self._id_file.exists() else secrets.token_hex(4)
            self._id_file.parent.mkdir(parents=True, exist_ok=True)
            self._id_file.write_text(run_id)
        self._run = wandb.init(
            project=saved.project or "conformal-prediction-unlearning",
            name=saved.run_name or name,
            group=saved.run_group or self._folder.parent.name,
            id=run_id or secrets.token_hex(4),
            resume="allow" if self._id_file else None,
            config=without_empty(config),
            dir=folder,
            mode=mode,
            reinit="finish_previous",
            settings=options,
        )


# ---------------------------------------------------------------- runs


def command_line(parser, args, **changes):
    """The words of the command of one run: this script, and the flags that are not at a default.

    ``changes`` replaces values of flags; None leaves a flag out.
    """
    words = [sys.executable, sys.argv[0]]
    for name, value in (vars(args) | changes).items():
        is_default = value is None or value is False or value == parser.get_default(name)
        if is_default or name in ("seeds", "jobs", "dry_run"):
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words.append(f"--{name}" if value is True else f"--{name}={text}")
    return words


class RunFiles(NamedTuple):
    """The files of a run in ``folder``: the names of its model and of its record."""

    folder: Path
    model: str = MODEL_FILE
    record: str = "results.json"

    @property
    def model_path(self):
        return self.folder / self.model


def already_done(path, identity, args):
    """The meta of an earlier run with the same ``identity`` that saved its model at ``path``.

    With --precision auto the precision may differ. None if there is no file, or with --overwrite.
    Raises UserError for a file that is unreadable or from other settings.
    """
    if args.overwrite or not path.exists():
        return None
    meta = checkpoint.read(path)[1]
    saved = meta.get("identity", {})
    differences = [
        f"{key}: {saved.get(key)} on disk, {identity.get(key)} requested"
        for key in identity | saved
        if saved.get(key) != identity.get(key) and (key, args.precision) != ("precision", "auto")
    ]
    if differences:
        reason = f"already exists with different settings ({', '.join(differences)})"
        raise UserError(f"{path} {reason}; pass --overwrite to replace it")
    return meta


def run_and_save(train, job, files, *, meta, args):
    """Run a job and save its model and records, or return the meta of an equal earlier run.

    ``train(job)`` changes ``job.model``. ``meta`` contains the "identity" (:func:`already_done`).
    Returns it with "seconds" and the final "accuracies". All files are moved up together, the model
    last: a failed run saves nothing, and an interrupted one is complete or can be resumed.
    """
    identity, history = meta["identity"], []
    with (
        unfinished_folder(files.folder) as unfinished,
        WandbRun(files.folder, job.label, meta, args.wandb_mode, curves_over="epoch") as wandb_run,
    ):
        # Another run may have finished here since the flags were checked.
        if earlier := already_done(files.model_path, identity, args):
            return earlier
        is_gpu = job.device.type == "cuda"
        saving = {"resume": args.resume, "save_every": args.save_every}
        job.progress = Progress(files.folder / RESUME_FILE, identity, **saving)
        if job.progress.restored:
            print(f"{job.label}: resuming after epoch {len(job.progress.restored['records'])}")

        def log(record):
            history.append(record)
            wandb_run.log(record)

        job.log = log
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(job.device)
        try:
            train(job)
        except Diverged:
            raise
        except BaseException as error:  # e.g. Ctrl-C, a closed pipe, a full disk, a failed rank
            with suppress(UserError):
                if job.progress.save() and isinstance(error, KeyboardInterrupt):
                    error.args = (f"{job.label} is saved after its last epoch; pass --resume",)
            raise
        meta = meta | {"seconds": job.progress.seconds}
        if is_gpu:
            meta["peak_memory"] = round(torch.cuda.max_memory_allocated(job.device) / 1e6)  # MB
        meta["accuracies"] = final_accuracies(job)
        if job.term is not None:
            meta["q_hats"] = job.term.q_hats
        for file_name, state in job.by_products.items():
            checkpoint.save(unfinished / file_name, state, meta)
        lines = "".join(json.dumps(record) + "\n" for record in history)
        save(unfinished / "history.jsonl", lines)
        save(unfinished / files.record, meta | {"history": history})
        checkpoint.save(unfinished / files.model, job.model.state_dict(), meta)
        move_up(unfinished, last=files.model)
        if not distributed.rank():
            (files.folder / FAILURE_FILE).unlink(missing_ok=True)
            # A run that was killed before its last file was moved could still be resumed.
            for path in files.folder.glob(f"{RESUME_FILE}*"):
                path.unlink()
        row = {"method": job.label, "seconds": meta["seconds"]} | meta["accuracies"]
        wandb_run.log_table("run", [row])
    if distributed.world_size() > 1:
        dist.barrier()  # the other ranks read the records that the first one has written
    return meta


def final_accuracies(job):
    """The accuracies on all images. Raises :class:`Diverged` for a model that is not finite."""
    with suppress(NotFinite):
        if weights_are_finite(job.model):
            return job.accuracies()
    raise Diverged(f"{job.label}: weights or outputs are NaN or infinite; lower --learning_rate")
