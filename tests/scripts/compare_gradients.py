"""Compares every weight gradient of a network's convolutions with float64 on contiguous tensors.

    ONEDNN_MAX_CPU_ISA=AVX2 python tests/scripts/compare_gradients.py resnet18:2 convnext_atto

Exits with status 1 where a gradient differs. A name may carry the width of resnet18. oneDNN reads
its environment variables when torch is imported, and a wrong kernel may end the process: the tests
run this file in its own process.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from torch import nn
from torch.nn import functional as F

import models

NARROW = ((8, 4), (7, 3), (13, 5), (33, 2), (32, 64))  # side in pixels, images in the batch
WIDE = ((64, 4), (96, 3))


def is_compared(layer):
    zero_padded = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
    return zero_padded and not isinstance(layer.padding, str)


def exact_gradient(layer, images, gradient):
    """The weight gradient of a convolution in float64, from its input and its output gradient."""
    return torch.nn.grad.conv2d_weight(
        images.double().contiguous(),
        layer.weight.shape,
        gradient.double().contiguous(),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def relative_errors(model, side, count):
    """{layer name: relative error of its weight gradient}, from one backward pass.

    Each layer's own float32 input and output gradient are taken, so that only its weight gradient
    is compared.
    """
    expected, handles = defaultdict(lambda: 0), []

    def watch(name):
        def on_forward(layer, inputs, output):
            images = inputs[0].detach()

            def on_gradient(gradient):
                expected[name] += exact_gradient(layer, images, gradient)

            output.register_hook(on_gradient)

        return on_forward

    for name, layer in model.named_modules():
        if is_compared(layer):
            handles.append(layer.register_forward_hook(watch(name)))
    generator = torch.Generator().manual_seed(side)
    images = torch.randn(count, 3, side, side, generator=generator)
    model.train().zero_grad()
    F.cross_entropy(model(images), torch.arange(count) % 10).backward()
    for handle in handles:
        handle.remove()
    errors = {}
    for name, exact in expected.items():
        difference = model.get_parameter(f"{name}.weight").grad - exact
        errors[name] = (difference.norm() / (exact.norm() + 1e-12)).item()
    return errors


def main(names):
    failed = False
    for name in names:
        model_name, _, width = name.partition(":")
        torch.manual_seed(0)
        model = models.create_model(model_name, 10, width=int(width or 64), pretrained=False)
        for side, count in NARROW if width else WIDE:
            errors = relative_errors(model, side, count)
            assert errors, f"{name} has no convolution"
            for layer, error in errors.items():
                if not error < 1e-4:
                    batch = f"{count} images of {side}×{side}"
                    print(f"{name}, {batch}: {layer}.weight.grad is off by {error:.1%}")
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
