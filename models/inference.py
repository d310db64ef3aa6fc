"""Logits and features of images: eval mode, no augmentation, one forward pass per image.

A model's logits are kept in a ``logits.npz``, so that no metric needs the network twice.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from . import checkpoint, distributed
from .errors import NotFinite, UserError, first_line

CPU_PIXELS, GPU_PIXELS = 2**16, 2**20  # of a batch


class Logits(NamedTuple):
    """A model's logits of all training images N×K and all held-out images P×K, in their order.

    ``weights`` is the hash of the model's weights, ``data`` the fingerprint of the data.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    weights: str
    data: str


def save_logits(path, **fields):
    """Save the ``fields`` of :class:`Logits` as a NumPy archive. Atomic."""
    checkpoint.write_file(path, lambda file: np.savez(file, **fields))


def read_logits(path, *, num_train, num_held_out, num_classes, data, weights=None):
    """The :class:`Logits` in a file, float32 on the CPU. None if it is not of given ``weights``.

    Raises UserError for other data, a wrong shape or type, and logits that are not finite. A file
    of another program may lack weights and data, which are then "".
    """
    shapes = {"train": (num_train, num_classes), "held_out": (num_held_out, num_classes)}
    try:
        with np.load(path, allow_pickle=False) as file:
            texts = {key: str(file[key]) if key in file else "" for key in ("weights", "data")}
            if weights is not None and texts != {"weights": weights, "data": data}:
                return None
            arrays = {key: file[key] for key in shapes}
    except Exception as error:  # NumPy and zipfile raise their own kinds
        reason = f"cannot be read ({first_line(error)})"
        raise UserError(f"{path}: {reason}; it needs the arrays train and held_out") from error
    if texts["data"] not in ("", data):
        raise UserError(f"{path}: logits of other data ({texts['data']}; this data is {data})")
    for key, shape in shapes.items():
        if arrays[key].dtype != np.float32 or arrays[key].shape != shape:
            actual = f"{arrays[key].dtype} {arrays[key].shape}"
            raise UserError(f"{path}: {key} is {actual}; float32 {shape} is needed")
        if not np.isfinite(arrays[key]).all():
            raise UserError(f"{path}: {key} contains logits that are NaN or infinite")
    return Logits(**{key: torch.from_numpy(array) for key, array in arrays.items()}, **texts)


def compute_logits(model, images, indices, batch_size=None):
    """Logits and labels of the images at ``indices``: N×K float32 and N int64, on the CPU.

    Every process runs the model on its :func:`distributed.local_rows` and gets all rows.
    ``batch_size`` is that of a process, by default 64 images of 32×32 on a CPU, 1,024 on a GPU. The
    model keeps its training mode. Raises NotFinite where a logit is NaN or infinite.
    """
    return _forward_images(model, images, indices, batch_size)


def compute_features(model, images, indices, batch_size=None):
    """:func:`compute_logits` and the input of the classifier: N×K, N and N×F float32, on the CPU.

    Features with positions (N×F×H×W) or tokens (N×T×F) are averaged over them. Features of several
    classifiers are concatenated. If the network never calls its classifier as a module, the logits
    serve as features.
    """
    classifiers = classifier_layers(model)
    logits, labels, *features = _forward_images(model, images, indices, batch_size, classifiers)
    return logits, labels, *(features or [logits])


def classifier_layers(model):
    """Layers from features to logits: timm's ``get_classifier()``, the last Linear, or []."""
    if not hasattr(model, "get_classifier"):
        return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    layers = model.get_classifier()
    return list(layers) if isinstance(layers, tuple | list | nn.ModuleList) else [layers]


@torch.no_grad()
def _forward_images(model, images, indices, batch_size, classifiers=()):
    """Logits, labels and, if there are any, features: all rows, gathered from the processes.

    Features are the pooled inputs of the ``classifiers``. The model is in eval mode meanwhile.
    """
    pixels = GPU_PIXELS if images.labels.is_cuda else CPU_PIXELS
    size = batch_size or max(4, pixels // images.size**2)
    was_training, features, outputs = model.training, [], []

    # The hooks run before the classifier of every forward pass; a network may have several.
    def record(layer, inputs):
        values = inputs[0].float()
        axes = {3: 1, 4: (2, 3)}.get(values.ndim)  # tokens, or positions
        features.append(values if axes is None else values.mean(dim=axes))

    hooks = [layer.register_forward_pre_hook(record) for layer in classifiers]
    model.eval()
    try:
        for inputs in images.batches(indices.split(size * distributed.world_size())):
            features.clear()
            logits = model(inputs).float()
            outputs.append((logits, torch.cat(features, dim=1)) if features else (logits,))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    local_rows = [torch.cat(batches) for batches in zip(*outputs, strict=True)]
    logits, *features = (distributed.gather_rows(r, len(indices)).cpu() for r in local_rows)
    if infinite := len(logits) - int(logits.isfinite().all(dim=1).sum()):
        counts = f"NaN or infinite for {infinite} of {len(logits)} images"
        remedy = "train the network again, with a lower --learning_rate if it diverged"
        raise NotFinite(f"the network's outputs are {counts}; {remedy}")
    return logits, images.labels[indices].cpu(), *features
