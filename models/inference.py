"""Logits and features of images: eval mode, no augmentation, one pass per image."""

import torch

from .distributed import gather_rows, local_rows, world_size
from .errors import NotFinite


@torch.no_grad()
def compute_logits(model, images, indices, batch_size=None):
    """Logits (float32, on the CPU) and labels of the images at ``indices``: eval mode, no augmentation, one pass.

    Every process passes its :func:`local_rows` images and gets the logits of all. ``batch_size`` left out is what fits in a
    GPU's memory, or in a CPU's cache: 64 of 32×32 (twice as fast as 512 there). Every module's mode is left as it was
    found. Returns (M×K, M). Raises NotFinite where a logit is NaN or infinite.
    """
    device = images.labels.device
    size = batch_size or (
        16_384 if device.type == "cuda" else min(512, max(4, 2**16 // images.size**2))
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        while True:
            try:
                found = [
                    model(inputs).float()
                    for inputs in images.batches(indices.split(size * world_size()))
                ]
                break
            except torch.OutOfMemoryError:
                if batch_size or size == 1:
                    raise
            size = max(1, size // 4)  # outside the handler, which keeps what filled the memory
    finally:
        for module, mode in modes:
            module.training = mode
    logits = gather_rows(torch.cat(found), len(indices)).cpu()
    if not logits.isfinite().all():
        count = (~logits.isfinite().all(dim=1)).sum().item()
        raise NotFinite(
            f"the network's outputs are NaN or infinite for {count} of {len(logits)} images: its training diverged, or "
            "its BatchNorm statistics are damaged; train it again, with a lower --learning_rate if it diverged"
        )
    return logits, images.labels[indices].cpu()


@torch.no_grad()
def compute_features(model, images, indices, batch_size=None):
    """:func:`compute_logits`, and what enters the model's classifier on the way: (M×K, M, M×F float32).

    Features with places or tokens are averaged over them; those of several classifiers are joined. The logits take
    their place in a network whose classifier is never called as a module.
    """
    seen = [[] for _ in classifier_layers(model)]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, parts=parts: parts.append(_pooled(inputs[0].float()))
        )
        for layer, parts in zip(classifier_layers(model), seen, strict=True)
    ]
    try:
        logits, labels = compute_logits(model, images, indices, batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    found = [torch.cat(parts)[-len(local_rows(indices)) :] for parts in seen if parts]
    return (
        logits,
        labels,
        gather_rows(torch.cat(found, dim=1), len(indices)).cpu() if found else logits,
    )


def classifier_layers(model):
    """The layers that turn features into logits: those that timm names, else the last linear layer."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
    else:
        found = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1:]
    return list(found) if isinstance(found, tuple | list | torch.nn.ModuleList) else [found]


def _pooled(features):
    """N×F from N×F, N×F×H×W or N×tokens×F."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features
