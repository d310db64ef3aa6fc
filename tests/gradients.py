"""Compares every weight gradient of a network's convolutions with float64 on contiguous tensors.

    ONEDNN_MAX_CPU_ISA=AVX2 python tests/gradients.py resnet18:2 resnet18:7 convnext_atto

Exits with status 1 if a gradient differs. The name resnet18 may be followed by a width. oneDNN
reads its environment variables when torch is imported, and a wrong kernel may crash the process.
Tests therefore run this file in a separate process.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import nn
from torch.nn import functional as F

import models

CASES = ((8, 4), (7, 3), (13, 5), (33, 2), (32, 64))  # side in pixels, images in the batch


def errors(model, side, count):
    """The relative error of each convolution's weight gradient, by name.

    One backward pass runs through the whole network. The exact gradient is computed from each
    layer's own float32 input and output gradient, so that only the weight gradient is compared.
    """
    exact, handles = defaultdict(lambda: 0), []
    for name, layer in model.named_modules():
        if _can_be_compared(layer):

            def watch(layer, inputs, output, name=name):
                images = inputs[0].detach()

                def add(gradient):
                    exact[name] += _weight_gradient(layer, images, gradient)

                output.register_hook(add)

            handles.append(layer.register_forward_hook(watch))
    generator = torch.Generator().manual_seed(side)
    images = torch.randn(count, 3, side, side, generator=generator)
    model.train().zero_grad()
    F.cross_entropy(model(images), torch.arange(count) % 10).backward()
    for handle in handles:
        handle.remove()
    result = {}
    for name, gradient in exact.items():
        difference = model.get_parameter(f"{name}.weight").grad - gradient
        result[name] = (difference.norm() / (gradient.norm() + 1e-12)).item()
    return result


def _can_be_compared(layer):
    return (
        isinstance(layer, nn.Conv2d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _weight_gradient(layer, images, gradient):
    """The gradient of a convolution's weight in float64, on contiguous tensors."""
    return torch.nn.grad.conv2d_weight(
        images.double().contiguous(),
        layer.weight.shape,
        gradient.double().contiguous(),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def main(names):
    failed = False
    for name in names:
        model_name, _, width = name.partition(":")
        torch.manual_seed(0)
        model = models.create_model(model_name, 10, width=int(width or 64), pretrained=False)
        for side, count in CASES if width else [(64, 4), (96, 3)]:
            layer_errors = errors(model, side, count)
            assert layer_errors, f"{name} has no convolution"
            for layer, error in layer_errors.items():
                if not error < 1e-4:
                    images = f"{count} images of {side}×{side}"
                    print(f"{name}, {images}: {layer}.weight.grad is off by {error:.1%}")
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
