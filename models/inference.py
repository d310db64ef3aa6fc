"""Logits and features of images: eval mode, no augmentation, one forward pass per image.

A model's logits of all images are kept in a ``logits.npz``, so that no metric needs the network
twice.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from . import checkpoint, distributed
from .errors import NotFinite, UserError, first_line


class Logits(NamedTuple):
    """A model's logits of all training images N×K and all held-out images P×K, in their order.

    ``weights`` is the hash of the model's weights, ``data`` the fingerprint of the data.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    weights: str
    data: str


def save_logits(path, *, train, held_out, weights, data):
    """Save the fields of :class:`Logits` as a NumPy archive. Atomic."""
    arrays = {"train": train.numpy(), "held_out": held_out.numpy(), "weights": weights}
    checkpoint.write_file(path, lambda file: np.savez(file, **arrays, data=data))


def read_logits(path, *, num_train, num_held_out, num_classes, data, weights=None):
    """The :class:`Logits` in a file, float32 on the CPU.

    Where ``weights`` is given, None if the file belongs to other weights or other data. Raises
    UserError for other data, a wrong shape or type, and logits that are not finite. A file of
    another program may lack weights and data, which are then "".
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
    ``batch_size`` is the number of images per forward pass and process. By default it is 64 images
    of 32×32 on a CPU, 2,048 on a GPU, and a quarter of that whenever the memory is full. Every
    module keeps its training mode. Raises NotFinite where a logit is NaN or infinite.
    """
    logits, _ = _forward_images(model, images, indices, batch_size=batch_size)
    return logits, images.labels[indices].cpu()


def compute_features(model, images, indices, batch_size=None):
    """:func:`compute_logits` and the input of the classifier: N×K, N and N×F float32, on the CPU.

    Features with positions (N×F×H×W) or tokens (N×T×F) are averaged over them. Features of several
    classifiers, or of several calls of a classifier, are concatenated. If the network never calls
    its classifier as a module, the logits serve as features.
    """
    options = {"batch_size": batch_size, "classifiers": classifier_layers(model)}
    logits, features = _forward_images(model, images, indices, **options)
    return logits, images.labels[indices].cpu(), logits if features is None else features


def classifier_layers(model):
    """The layers that turn features into logits: timm's ``get_classifier()``, else the last Linear.

    An empty list if the network has neither.
    """
    if hasattr(model, "get_classifier"):
        classifier = model.get_classifier()
    else:
        classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    several = isinstance(classifier, tuple | list | nn.ModuleList)
    return list(classifier) if several else [classifier]


@torch.no_grad()
def _forward_images(model, images, indices, *, batch_size, classifiers=()):
    """Logits and features of all images, gathered from the processes; None for no features."""
    size = batch_size or _default_batch_size(images)
    with _eval_mode(model), _recorded(classifiers) as calls:
        while True:
            try:
                batches = images.batches(indices.split(size * distributed.world_size()))
                outputs = [_forward_batch(model, inputs, calls) for inputs in batches]
                break
            except torch.OutOfMemoryError:
                if batch_size or size == 1:
                    raise
            # Outside the handler, whose traceback keeps the tensors that filled the memory.
            size = max(1, size // 4)
    logits, features = zip(*outputs, strict=True)
    logits = distributed.gather_rows(torch.cat(logits), len(indices)).cpu()
    num_finite = int(logits.isfinite().all(dim=1).sum())
    if num_finite < len(logits):
        counts = f"{len(logits) - num_finite} of {len(logits)} images"
        remedy = "train the network again, with a lower --learning_rate if it diverged"
        raise NotFinite(f"the network's outputs are NaN or infinite for {counts}; {remedy}")
    if features[0] is None:
        return logits, None
    return logits, distributed.gather_rows(torch.cat(features), len(indices)).cpu()


def _default_batch_size(images):
    if images.labels.is_cuda:
        return max(4, 2**21 // images.size**2)
    return min(512, max(4, 2**16 // images.size**2))


def _forward_batch(model, inputs, calls):
    """Float32 logits of a batch, and its features or None. ``calls`` comes from _recorded."""
    # A forward pass that ran out of memory has left its calls behind.
    for features in calls:
        features.clear()
    logits = model(inputs).float()
    features = [features for layer_calls in calls for features in layer_calls]
    return logits, torch.cat(features, dim=1) if features else None


@contextmanager
def _recorded(layers):
    """Lists, one per layer, to which each call of a layer appends its pooled input."""
    calls = [[] for _ in layers]
    handles = []
    for layer, layer_calls in zip(layers, calls, strict=True):

        def record(_, inputs, layer_calls=layer_calls):
            layer_calls.append(_pooled(inputs[0].float()))

        handles.append(layer.register_forward_pre_hook(record))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model):
    """The model in eval mode; afterwards every module has the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _pooled(features):
    """N×F from N×F, N×F×H×W or N×T×F: the mean over positions or tokens."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features
