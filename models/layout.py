"""The memory layout of a network's tensors: channels last where it is faster and right."""

from functools import partial

import torch
from torch import nn

# Fewer input channels per group than this do not fill a vector register of AVX-512.
NARROW = 16


def choose_layout(model):
    """Make ``model`` convert its input to channels last. Returns ``model``.

    On a CPU, networks with a narrow convolution behind the first are faster with contiguous input.
    Narrow 1×1 convolutions get it in every network: if such a convolution has stride 2, oneDNN
    computes a wrong weight gradient for channels-last tensors and writes beyond its workspace
    (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    kinds = nn.Conv2d | nn.ConvTranspose2d
    convolutions = [layer for layer in model.modules() if isinstance(layer, kinds)]
    is_narrow = [layer.in_channels // layer.groups < NARROW for layer in convolutions]
    cpu_layout = torch.contiguous_format if any(is_narrow[1:]) else torch.channels_last
    model.register_forward_pre_hook(partial(_convert_input, cpu_layout))
    for layer, narrow in zip(convolutions, is_narrow, strict=True):
        if narrow and max(layer.kernel_size) == 1:
            layer.register_forward_pre_hook(partial(_convert_input, torch.contiguous_format))
    return model


def _convert_input(cpu_layout, layer, inputs):
    (images,) = inputs
    layouts = {"cuda": torch.channels_last, "cpu": cpu_layout}
    layout = layouts.get(images.device.type, torch.contiguous_format)
    return images.contiguous(memory_format=layout)
