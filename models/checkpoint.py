"""Reading, checking, saving and hashing of tensors and checkpoints.

A checkpoint is ``{"model": state_dict, "meta": {...}}``. Only tensors and plain values are unpickled.
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
from .errors import UserError, error_reason, printable


def size(model):
    """About how many bytes a checkpoint of ``model``, its records and the state for --resume take."""
    return 3 * sum(tensor.nbytes for tensor in model.state_dict().values()) + 2**20


def write_file(path, write):
    """``write(file)`` to a temporary file beside ``path``, synced, then renamed over it; the first process alone."""
    if rank():
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    content = io.BytesIO()
    write(content)  # in memory first: torch reports a full disk in words of its own
    try:
        with open(part, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the previous file is unchanged"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def save(path, state, meta):
    """``{"model": state_dict, "meta": meta}``; a file that is already there is replaced whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    meta = meta | {"weights": weights_hash(state)}
    write_file(path, lambda file: torch.save({"model": state, "meta": meta}, file))


def save_state(path, state):
    """Any nest of dicts, lists, plain values and tensors; a file that is there is replaced whole or not at all."""
    write_file(path, lambda file: torch.save(state, file))


def read_state(path):
    """What :func:`save_state` wrote. Only tensors and plain values are unpickled, and every byte's checksum is tested.

    Raises UserError for a file that is truncated, damaged or something else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch reads an entry that is marked as a folder as whatever the memory holds.
                folders = [
                    entry.filename for entry in archive.infolist() if entry.external_attr & 0x10
                ]
                if folders or archive.testzip():
                    raise UserError(f"{path}: damaged: a checksum in it is wrong")
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
            return torch.load(
                path, map_location="cpu", weights_only=True
            )  # a foreign file is an error, not a warning
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a truncated, foreign or unsafe file
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: not a checkpoint: {_kind_of_file(Path(path), error)}") from error


# What other training code stores beside the weights, and what unpickling builds without running code.
HARMLESS = [
    argparse.Namespace,
    type(Path()),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
    *(
        (np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct")
        for core in ("core", "_core")
    ),
]


def _kind_of_file(path, error):
    """What a file is that torch does not load as tensors, and what to do, for the end of an error message."""
    save = "save its weights with torch.save(model.state_dict(), FILE)"
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n").lower()
    if not head:
        return "the file is empty"
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with git lfs pull"
    if text.startswith(("<!doctype", "<html", "<?xml", "<head")):
        return "a web page, such as an error message or a login form in place of a download; download the file again"
    for start, kind in FILE_STARTS.items():
        if head.startswith(start):
            return f"{kind}; unpack or convert it, or {save}"
    if zipfile.is_zipfile(path):
        try:
            kind = _kind_of_archive(path)
        except Exception:  # zipfile raises many kinds for damaged headers
            kind = "a damaged zip archive"
        return f"{kind}; {save}"
    if head[:1] == b"\x80":
        with open(path, "rb") as file:
            return f"{_pickled_kind(file)}; load it where it was made and {save}"
    return f"truncated, or a file of another kind ({type(error).__name__}); {save}"


FILE_STARTS = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
}


def _kind_of_archive(path):
    """What a zip archive is that torch does not load."""
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in names:
            return "a TorchScript archive; load it with torch.jit.load"
        if "data.pkl" not in names:
            return "a zip archive without a torch checkpoint at its top; unpack it"
        with archive.open(names["data.pkl"]) as file:
            return f"{_pickled_kind(file)}; load it where it was made"


def _pickled_kind(file):
    """Which Python objects a pickle holds, found without loading any."""
    named, strings = [], []
    with suppress(Exception):  # the end of the file, or a truncated pickle
        for _ in range(
            5
        ):  # older checkpoints are a sequence of pickles, the fourth of which holds the objects
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    named.append(argument.replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    named.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    plain = (
        "torch._utils.",
        "torch.storage.",
        "collections.OrderedDict",
        "numpy.",
        "_codecs.",
        "argparse.Namespace",
    )
    foreign = [
        name
        for name in dict.fromkeys(named)
        if not name.startswith(plain) and not name.endswith("Storage")
    ]
    if not foreign:
        return "truncated, or a pickle that torch does not load"
    kind = (
        "a whole pickled model"
        if any("torch.nn" in name or "timm" in name for name in foreign)
        else "a pickle"
    )
    return f"{kind} with Python objects ({', '.join(foreign[:3])}), which are not loaded since that would run their code"


def on_cpu(nest):
    """The same nest of dicts and lists with every tensor on the CPU."""
    if torch.is_tensor(nest):
        return nest.detach().cpu()
    if isinstance(nest, dict):
        return {key: on_cpu(value) for key, value in nest.items()}
    return [on_cpu(value) for value in nest] if isinstance(nest, list) else nest


def weights_hash(state):
    """A hash of a state_dict's names, shapes and bytes: which weights these are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else repr(tensor.item()).encode()
        )
    return digest.hexdigest()[:16]


def read(path, hint=""):
    """``(state_dict, meta)`` of a checkpoint, or of a bare state_dict (meta is then empty), on the CPU.

    Only tensors and plain values are unpickled. Raises UserError for a file that is missing or something else.
    """
    path = Path(path)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        if regular:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file{hint and '; ' + hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error_reason(error)})") from error
    if not regular:
        raise UserError(f"{path}: a folder or device, not a file; name the checkpoint in it")
    content = read_state(path) if path.suffix != ".safetensors" else _read_safetensors(path)
    meta = {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        meta = content.get("meta") or {}
        if not isinstance(meta, dict) or not all(
            isinstance(meta.get(key) or {}, dict) for key in ("identity", "recipe")
        ):
            raise UserError(f"{path}: not a checkpoint of this project: malformed metadata")
    while isinstance(content, dict) and (
        inner := [key for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)]
    ):
        content = content[inner[0]]
    if (
        not isinstance(content, dict)
        or not content
        or not all(torch.is_tensor(item) for item in content.values())
    ):
        raise UserError(f"{path}: not a checkpoint: no state_dict of tensors in it")
    if odd := [
        name for name, tensor in content.items() if tensor.layout != torch.strided or tensor.is_meta
    ]:
        raise UserError(f"{path}: not a checkpoint: {odd[0]} is no plain tensor")
    if "weights" in meta and meta["weights"] != weights_hash(content):
        raise UserError(f"{path}: damaged: its weights are not those that were saved")
    return dict(content), meta


# The keys under which training code stores a state_dict.
WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "net")


# What wrappers (DataParallel, torch.compile, Lightning) put in front of a parameter's name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")


def _read_safetensors(path):
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint: truncated, or not a safetensors file ({error})"
        ) from error


def match_names(state, names, path):
    """A state_dict without the wrappers' prefixes, in any order, that its entries have beyond ``names``.

    Raises UserError where two entries would have one name.
    """
    found = {}
    for name, tensor in state.items():
        short = name
        while short not in names and (
            wrapper := next((w for w in WRAPPERS if short.startswith(w)), None)
        ):
            short = short.removeprefix(wrapper)
        if short in found:
            raise UserError(f"{path}: two of its tensors are {short}, with and without a prefix")
        found[short] = tensor
    return found


def _same_network(state, own, path, spec):
    """A state_dict from other training code without what does not belong to the network whose entries are ``own``.

    Profilers add the counters ``total_ops`` and ``total_params``. Older releases of torch lack ``num_batches_tracked``.
    A layer ``normalize`` normalises images inside the network, which this project does outside: raises UserError where
    its constants are not those of ``spec``, a :class:`DataSpec`.
    """
    state = match_names(state, own, path)
    for name in ("mean", "std"):
        tensor, constants = state.get(f"normalize.{name}"), getattr(spec, name, None)
        if f"normalize.{name}" in own or tensor is None or constants is None:
            continue
        if not np.allclose(tensor.flatten().double().numpy(), constants, atol=2e-3):
            raise UserError(
                f"{path}: its network normalises images with {name} {tensor.flatten().tolist()}, while this data is "
                f"normalised with {list(constants)}; train the original model here, or change SPECS in utils.py"
            )
    extra = ("total_ops", "total_params")
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name in own
        or not (name.rpartition(".")[2] in extra or name in ("normalize.mean", "normalize.std"))
    }
    counters = {
        name: tensor.cpu() for name, tensor in own.items() if name.endswith(".num_batches_tracked")
    }
    return counters | kept


def check_meta(path, meta, args, data):
    """Raise UserError where a checkpoint says that it is of another model or data set than the flags."""
    for flag, found, wanted in [
        ("--model_name", meta.get("model_name"), args.model_name),
        ("--width", meta.get("width"), args.width),
        ("--num_classes", meta.get("num_classes"), len(data.classes)),
        ("--image_size", meta.get("image_size"), data.train.size),
        ("--data_name", meta.get("data_name"), args.data_name),
    ]:
        if found not in (None, wanted):
            raise UserError(f"{path}: made with {flag} {found}, and the flags say {wanted}")
    found = meta.get("data_fingerprint")
    if found is not None and (difference := data.difference(found)):
        raise UserError(f"{path}: made on {difference} than those in {printable(args.data_dir)}")
    if isinstance(found, str) and "-" not in found:
        print(
            f"{path}: saved by an earlier version: only the images' names and labels could be checked"
        )


def load_weights(model, state, path, spec=None):
    """Load a state_dict into ``model``, also one from other training code; ``spec`` is the data's normalisation.

    Raises UserError where the weights are those of another architecture, or not finite.
    """
    own = model.state_dict()
    state = _same_network(state, own, path, spec)
    misshapen = [name for name in own if name in state and own[name].shape != state[name].shape]
    if own.keys() != state.keys():
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        parts = [f"{len(missing)} are missing, e.g. {missing[0]}"] if missing else []
        parts += [f"{len(extra)} are unknown, e.g. {extra[0]}"] if extra else []
        raise UserError(f"{path}: of another architecture: of its tensors {' and '.join(parts)}")
    if misshapen:
        name = misshapen[0]
        raise UserError(
            f"{path}: of another width or number of classes: {name} is {tuple(state[name].shape)}, "
            f"not {tuple(own[name].shape)}"
        )
    odd = [
        name for name, tensor in state.items()
        if tensor.is_quantized or tensor.is_complex() or tensor.is_floating_point() != own[name].is_floating_point()
    ]  # fmt: skip
    if odd:
        raise UserError(
            f"{path}: {odd[0]} is no plain tensor of numbers such as {own[odd[0]].dtype}"
        )
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path}: its weights are not finite: the training that made it diverged")
    model.load_state_dict(state)
