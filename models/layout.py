"""The memory layout of a network's input: channels last where its gradients are right."""

import torch
from torch import nn

# Fewer input channels per group than this do not fill a vector register of AVX-512.
NARROW = 16


def choose_layout(model):
    """Make ``model`` convert its input to the layout of :func:`input_layout`. Returns ``model``.

    On the CPU, narrow 1×1 convolutions also convert their input to contiguous: networks that
    permute dimensions inside, e.g. ConvNeXt, produce channels-last tensors whatever their input is.
    """
    for layer in _convolutions(model):
        if _is_narrow(layer) and max(layer.kernel_size) == 1:
            layer.register_forward_pre_hook(_contiguous_on_cpu)
    model.register_forward_pre_hook(_convert_input)
    return model


def input_layout(model, device):
    """``torch.channels_last`` or ``torch.contiguous_format`` for ``model``'s input on ``device``.

    Channels last is faster. On the CPU it is used only if every convolution but the first has at
    least 16 input channels per group: for a 1×1 convolution of stride 2 on channels-last tensors,
    oneDNN computes a wrong weight gradient and writes beyond its workspace if it has fewer input
    channels than a vector register holds, 8 or 16 (github.com/uxlfoundation/oneDNN/issues/6035).
    The first convolution has three input channels; its gradient is right unless it is 1×1.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.channels_last
    if kind != "cpu":
        return torch.contiguous_format
    convolutions = _convolutions(model)
    first_at_risk = any(max(layer.kernel_size) == 1 for layer in convolutions[:1])
    at_risk = convolutions if first_at_risk else convolutions[1:]
    return torch.contiguous_format if any(map(_is_narrow, at_risk)) else torch.channels_last


def _convolutions(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]


def _is_narrow(layer):
    return layer.in_channels // layer.groups < NARROW


def _convert_input(model, inputs):
    (images,) = inputs
    return images.contiguous(memory_format=input_layout(model, images.device))


def _contiguous_on_cpu(layer, inputs):
    (images,) = inputs
    return images if images.is_cuda else images.contiguous()
