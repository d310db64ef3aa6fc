"""The memory layout of a network's input: channels last where that is fast and its gradients are right."""

import torch
from torch import nn

NARROW = 16  # input channels per group


def choose_layout(model):
    """Let ``model`` convert its own input to the layout that :func:`input_layout` chooses. Returns ``model``.

    On the CPU, 1×1 convolutions with few input channels also convert theirs to contiguous: networks such as ConvNeXt
    permute dimensions inside, which makes an inner tensor channels last whatever the network's input is.
    """
    for layer in _convolutions(model):
        if _is_narrow(layer) and max(layer.kernel_size) == 1:
            layer.register_forward_pre_hook(_contiguous_on_cpu)
    model.register_forward_pre_hook(_convert_input)
    return model


def input_layout(model, device):
    """``torch.channels_last`` or ``torch.contiguous_format`` for the input of ``model`` on ``device``.

    With channels-last tensors, oneDNN computes a wrong weight gradient for a 1×1 convolution of stride 2, and
    writes past its workspace, if the convolution has fewer input channels than a vector register holds: 8, or 16 with
    AVX-512 (https://github.com/uxlfoundation/oneDNN/issues/6035). On the CPU, channels last is therefore used only if
    all convolutions have at least 16 input channels per group. The first convolution has three, and its gradient is
    right unless it is a 1×1 convolution.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return torch.channels_last if kind == "cuda" else torch.contiguous_format
    first, *others = _convolutions(model) or [None]
    risky = any(map(_is_narrow, others)) or (
        first is not None and _is_narrow(first) and max(first.kernel_size) == 1
    )
    return torch.contiguous_format if risky else torch.channels_last


def _convolutions(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]


def _is_narrow(layer):
    return layer.in_channels // layer.groups < NARROW


def _convert_input(model, inputs):
    images, *others = inputs
    return images.contiguous(memory_format=input_layout(model, images.device)), *others


def _contiguous_on_cpu(layer, inputs):
    images, *others = inputs
    return (images if images.is_cuda else images.contiguous()), *others
