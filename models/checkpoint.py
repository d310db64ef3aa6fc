"""Reading, checking, saving and hashing of checkpoints.

A checkpoint is ``{"model": state_dict, "meta": {...}}``. The state_dicts of other training code are
read too. Files are read with ``weights_only=True``, so they cannot run code.
"""

import hashlib
import io
import os
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .distributed import rank
from .errors import UserError

# The keys under which training code stores a state_dict.
WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "net")

# What DistributedDataParallel and torch.compile put in front of a parameter's name.
WRAPPERS = ("module.", "_orig_mod.")


def write_file(path, write):
    """Write a file on the first process only: ``write(file)``, then a rename, which is atomic.

    Raises UserError if the file cannot be written.
    """
    if rank():
        return
    content = io.BytesIO()
    write(content)  # to memory first: torch.save hides the reason if the disk is full
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); the previous file is unchanged"
        raise UserError(f"{path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state, meta):
    """Save a checkpoint (atomic). ``meta`` gets the :func:`weights_hash` of ``state``."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = {"model": state, "meta": meta | {"weights": weights_hash(state)}}
    write_file(path, lambda file: torch.save(content, file))


def weights_hash(state):
    """16 hexadecimal digits that identify a state_dict: a hash of its names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.ndim:
            values = tensor.detach().cpu().flatten().contiguous()
            digest.update(values.view(torch.uint8).numpy())
        else:
            digest.update(repr(tensor.item()).encode())
    return digest.hexdigest()[:16]


def read(path, hint=""):
    """``(state_dict, meta)`` of a checkpoint, on the CPU. ``meta`` is empty for a bare state_dict.

    Raises UserError if the file is missing (with the ``hint``), damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file{hint and '; ' + hint}")
    content = read_state(path)
    state = content if isinstance(content, dict) else {}
    meta = (state.get("meta") if "model" in state else None) or {}
    for key in WEIGHTS_KEYS:
        state = state[key] if isinstance(state.get(key), dict) else state
    if not (state and all(map(torch.is_tensor, state.values())) and isinstance(meta, dict)):
        raise UserError(f"{path}: not a checkpoint: it contains no state_dict")
    if meta.get("weights") not in (None, weights_hash(state)):
        raise UserError(f"{path}: damaged: its weights differ from those that were saved")
    return state, meta


def read_state(path):
    """Read what ``torch.save`` wrote, or a .safetensors file.

    Raises UserError with torch's reason if the file is damaged, or contains other Python objects.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch tests no checksums
                    raise ValueError("damaged: wrong checksum")
        with warnings.catch_warnings(action="ignore"):  # torch warns before it raises an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many types for foreign or damaged files
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or repr(error)
        raise UserError(f"{path}: not a checkpoint: {reason.splitlines()[0][:200]}") from error


def check_meta(path, meta, requested):
    """Raise UserError if a checkpoint was made for another model or data set than requested.

    ``requested`` contains model_name, width, num_classes, image_size, data_name and
    data_fingerprint. Values that ``meta`` does not record are accepted.
    """
    for key, value in requested.items():
        if meta.get(key) not in (None, value):
            raise UserError(f"{path}: made with --{key} {meta[key]}, but the flags ask for {value}")


def load_weights(model, state, path):
    """Load a state_dict of any float type into ``model``. Missing BatchNorm counters are accepted.

    Raises UserError, naming ``path``, if names, shapes or kinds of numbers (float, integer) do not
    fit, or if a weight is not finite.
    """
    expected = model.state_dict()
    state = match_names(state, expected, path)
    for name in state.keys() & expected.keys():  # torch would cast them without a word
        if state[name].is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{path}: {name} is {state[name].dtype}, not {expected[name].dtype}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not weights of this network: {reason}") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{path}: its weights are not finite: the training that made it diverged")


def match_names(state, names, path):
    """A state_dict without the prefixes of wrappers, in any order, on names not in ``names``.

    Raises UserError if two entries get the same name.
    """
    matched = {}
    for name, tensor in state.items():
        while name not in names and name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if name in matched:
            raise UserError(f"{path}: two of its tensors are {name}, with and without a prefix")
        matched[name] = tensor
    return matched
