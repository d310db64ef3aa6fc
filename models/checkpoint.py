"""Reading, checking, saving and hashing of checkpoints.

A checkpoint is ``{"model": state_dict, "meta": {...}}``. Checkpoints of other training code are
read too. Unpickling is restricted to tensors and plain values, so a file cannot run code.
"""

import argparse
import hashlib
import io
import os
import pickletools
import stat
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from .distributed import rank
from .errors import UserError, binary_kind, error_reason, printable

# The keys under which training code stores a state_dict.
WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "net")

# What wrappers (DataParallel, torch.compile, Lightning) put in front of a parameter's name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")

# Counters that profilers add to a state_dict.
PROFILER_COUNTERS = ("total_ops", "total_params")


def _numpy_functions():
    """The functions that rebuild NumPy values, under their names in NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    for core in ("core", "_core"):
        yield scalar, f"numpy.{core}.multiarray.scalar"
        yield array, f"numpy.{core}.multiarray._reconstruct"


# What other training code stores along with the weights, and what unpickles without running code.
HARMLESS = [
    argparse.Namespace,
    type(Path()),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    *_numpy_functions(),
]

SAVE_WEIGHTS = "save its weights with torch.save(model.state_dict(), FILE)"

# ---------------------------------------------------------------- writing


def size(model):
    """Approximate bytes of a run folder: the checkpoint, its records and the state for --resume."""
    return 3 * sum(tensor.nbytes for tensor in model.state_dict().values()) + 2**20


def write_file(path, write):
    """Write a file atomically, on the first process only: ``write(file)``, then a rename.

    A file that is already at ``path`` is replaced as a whole or not at all. Raises UserError if the
    file cannot be written.
    """
    if rank():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    content = io.BytesIO()
    # To memory first: torch.save hides the reason if the disk is full.
    write(content)
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the previous file is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state, meta):
    """Save a checkpoint of a state_dict. ``meta`` gets the :func:`weights_hash` as ``weights``.

    Atomic, as :func:`write_file`.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    meta = meta | {"weights": weights_hash(state)}
    write_file(path, lambda file: torch.save({"model": state, "meta": meta}, file))


def save_state(path, state):
    """Save nested dicts and lists of tensors and plain values. Atomic, as :func:`write_file`."""
    write_file(path, lambda file: torch.save(state, file))


def on_cpu(nest):
    """A copy of nested dicts and lists with every tensor detached and on the CPU."""
    if torch.is_tensor(nest):
        return nest.detach().cpu()
    if isinstance(nest, dict):
        return {key: on_cpu(value) for key, value in nest.items()}
    return [on_cpu(value) for value in nest] if isinstance(nest, list) else nest


def weights_hash(state):
    """16 hexadecimal digits that identify a state_dict: a hash of its names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.ndim:
            values = tensor.detach().cpu().contiguous()
            digest.update(values.flatten().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(tensor.item()).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- reading


def read(path, hint=""):
    """``(state_dict, meta)`` of a checkpoint, on the CPU. ``meta`` is empty for a bare state_dict.

    Raises UserError if the file is missing, unreadable, damaged or not a checkpoint. ``hint`` is
    what to do about a missing file.
    """
    path = Path(path)
    _check_file(path, hint)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_state(path)
    meta = _meta_of(content, path)
    state = _state_dict_of(content, path)
    if "weights" in meta and meta["weights"] != weights_hash(state):
        raise UserError(f"{path}: damaged: its weights differ from those that were saved")
    return state, meta


def read_state(path):
    """Read what :func:`save_state` or ``torch.save`` wrote. Every checksum is tested.

    Raises UserError if the file is unreadable, damaged, of another kind, or holds Python objects.
    """
    try:
        _check_archive(path)
        # torch warns about some foreign files before it raises an error.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for a truncated, foreign or unsafe file
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: not a checkpoint: {_foreign_kind(path, error)}") from error


def _check_file(path, hint):
    """Raise UserError unless ``path`` is a regular file that may be read."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        if regular:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file{hint and '; ' + hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error_reason(error)})") from error
    if not regular:
        raise UserError(f"{path}: a folder or device, not a file; pass the checkpoint in it")


def _check_archive(path):
    """Raise UserError if ``path`` is a zip archive with a wrong checksum; torch tests none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        # For an entry that is marked as a folder, torch returns uninitialised memory.
        folders = [entry for entry in archive.infolist() if entry.external_attr & 0x10]
        if folders or archive.testzip():
            raise UserError(f"{path}: damaged: it contains a wrong checksum")


def _read_safetensors(path):
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint: truncated, or not a safetensors file ({error})"
        ) from error


def _meta_of(content, path):
    """The metadata of a checkpoint of this project, else an empty dict."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return {}
    meta = content.get("meta") or {}
    if isinstance(meta, dict):
        records = [meta.get(key) or {} for key in ("identity", "recipe")]
        if all(isinstance(record, dict) for record in records):
            return meta
    raise UserError(f"{path}: not a checkpoint of this project: malformed metadata")


def _state_dict_of(content, path):
    """The state_dict in the content of a file, under any of the usual keys, nested or not."""
    while keys := [key for key in WEIGHTS_KEYS if _holds_dict(content, key)]:
        content = content[keys[0]]
    tensors = list(content.values()) if isinstance(content, dict) else []
    if not tensors or not all(map(torch.is_tensor, tensors)):
        raise UserError(f"{path}: not a checkpoint: it contains no state_dict of tensors")
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{path}: not a checkpoint: {name} is not a dense tensor")
    return dict(content)


def _holds_dict(content, key):
    return isinstance(content, dict) and isinstance(content.get(key), dict)


# ---------------------------------------------------------------- files of another kind


def _foreign_kind(path, error):
    """What a file is that torch does not load, and what to do about it: the end of a message."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty"
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch the file with git lfs pull"
    if text.startswith(("<!doctype", "<html", "<?xml", "<head")):
        return "a web page, e.g. a login form instead of a download; download the file again"
    if zipfile.is_zipfile(path):
        return f"{_archive_kind(path)}; {SAVE_WEIGHTS}"
    if head.startswith(b"PK\x03\x04"):
        return "a truncated zip archive, e.g. of an interrupted download; copy the file again"
    if head.startswith(b"\x80"):
        with open(path, "rb") as file:
            return f"{_pickle_kind(file)}; load it where it was made and {SAVE_WEIGHTS}"
    if kind := binary_kind(head):
        return f"{kind}; unpack or convert it, or {SAVE_WEIGHTS}"
    return f"truncated, or a file of another kind ({type(error).__name__}); {SAVE_WEIGHTS}"


def _archive_kind(path):
    """What a zip archive is that torch does not load."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2]: name for name in archive.namelist()}
            if "constants.pkl" in names:
                return "a TorchScript archive; load it with torch.jit.load"
            if "data.pkl" not in names:
                return "a zip archive without a torch checkpoint at its top; unpack it"
            with archive.open(names["data.pkl"]) as file:
                return f"{_pickle_kind(file)}; load it where it was made"
    except Exception:  # zipfile raises many types for damaged headers
        return "a damaged zip archive"


# Names in a pickle that say nothing about what it holds.
PLAIN_NAMES = (
    "torch._utils.",
    "torch.storage.",
    "collections.OrderedDict",
    "numpy.",
    "_codecs.",
    "argparse.Namespace",
)


def _pickle_kind(file):
    """Which Python objects a pickle holds, read from its opcodes without running them."""
    foreign = [
        name
        for name in dict.fromkeys(_pickled_names(file))
        if not name.startswith(PLAIN_NAMES) and not name.endswith("Storage")
    ]
    if not foreign:
        return "truncated, or a pickle that torch does not load"
    whole_model = any("torch.nn" in name or "timm" in name for name in foreign)
    kind = "a whole pickled model" if whole_model else "a pickle"
    objects = ", ".join(foreign[:3])
    return f"{kind} with Python objects ({objects}), which are not loaded because they can run code"


def _pickled_names(file):
    """The qualified names of the classes and functions in a pickle."""
    names, strings = [], []
    # The end of the file or a truncated pickle ends the search.
    with suppress(Exception):
        # Older checkpoints are several pickles in a row, the fourth of which holds the objects.
        for _ in range(5):
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    names.append(argument.replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    # Takes module and name from the stack; they are the latest strings.
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


# ---------------------------------------------------------------- checking and loading


def check_meta(path, meta, args, data):
    """Raise UserError if a checkpoint is of another model or data set than the flags ask for."""
    requested = {
        "model_name": args.model_name,
        "width": args.width,
        "num_classes": len(data.classes),
        "image_size": data.train.size,
        "data_name": args.data_name,
    }
    for key, value in requested.items():
        if meta.get(key) not in (None, value):
            raise UserError(f"{path}: made with --{key} {meta[key]}, but the flags ask for {value}")
    fingerprint = meta.get("data_fingerprint")
    if fingerprint is None:
        return
    if fingerprint != data.fingerprint:
        raise UserError(f"{path}: made on other images than those in {printable(args.data_dir)}")
    # Earlier versions hashed names and labels only; now a hash of the pixels follows a hyphen.
    if isinstance(fingerprint, str) and "-" not in fingerprint:
        print(f"{path}: saved by an earlier version; only image names and labels were compared")


def load_weights(model, state, path, spec=None):
    """Load a state_dict into ``model``, also one of other training code.

    ``spec`` is the data's DataSpec, whose ``mean`` and ``std`` a normalisation layer in the
    state_dict must match. Raises UserError, naming ``path``, if names, shapes or types do not fit
    or a weight is NaN or infinite.
    """
    expected = model.state_dict()
    state = match_names(state, expected, path)
    _check_normalisation(state, expected, path=path, spec=spec)
    state = _with_counters(_without_extras(state, expected), expected)
    _check_fit(state, expected, path)
    model.load_state_dict(state)


def match_names(state, names, path):
    """A state_dict without the prefixes of wrappers, in any order, on names not in ``names``.

    Raises UserError if two entries get the same name.
    """
    matched = {}
    for name, tensor in state.items():
        short = name
        while short not in names and (prefix := _wrapper_of(short)):
            short = short.removeprefix(prefix)
        if short in matched:
            raise UserError(f"{path}: two of its tensors are {short}, with and without a prefix")
        matched[short] = tensor
    return matched


def _wrapper_of(name):
    return next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None)


def _check_normalisation(state, expected, *, path, spec):
    """Raise UserError if the network normalised images inside with constants other than ``spec``'s.

    Some training code has a layer ``normalize`` for it. Here images are normalised outside.
    """
    for key in ("mean", "std"):
        name, constants = f"normalize.{key}", getattr(spec, key, None)
        if name in expected or name not in state or constants is None:
            continue
        values = state[name].flatten().double()
        if not np.allclose(values.numpy(), constants, atol=2e-3):
            raise UserError(
                f"{path}: its network normalises images with {key} {values.tolist()}, while this "
                f"data is normalised with {list(constants)}; train the original model here, "
                "or change SPECS in utils.py"
            )


def _without_extras(state, expected):
    """A state_dict without entries that need no place in the network."""

    def is_extra(name):
        counter = name.rpartition(".")[2] in PROFILER_COUNTERS
        return counter or name in ("normalize.mean", "normalize.std")

    return {name: state[name] for name in state if name in expected or not is_extra(name)}


def _with_counters(state, expected):
    """A state_dict with BatchNorm's ``num_batches_tracked``, which older torch did not save."""
    counters = [name for name in expected if name.endswith(".num_batches_tracked")]
    return {name: expected[name].cpu() for name in counters} | state


def _check_fit(state, expected, path):
    """Raise UserError unless names, shapes and types are as expected and all values finite."""
    if expected.keys() != state.keys():
        raise UserError(f"{path}: another architecture: {_name_differences(state, expected)}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path}: another width or number of classes: {name} is {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
    for name, tensor in state.items():
        real = not tensor.is_quantized and not tensor.is_complex()
        if not real or tensor.is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, not {expected[name].dtype}")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path}: its weights are not finite: the training that made it diverged")


def _name_differences(state, expected):
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    differences = [f"{len(missing)} are missing, e.g. {missing[0]}"] if missing else []
    differences += [f"{len(unknown)} are unknown, e.g. {unknown[0]}"] if unknown else []
    return f"of its tensors {' and '.join(differences)}"
