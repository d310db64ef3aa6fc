"""Compares every weight gradient of a network's convolutions with float64 on contiguous tensors.

    ONEDNN_MAX_CPU_ISA=AVX2 python tests/gradients.py resnet18:2 resnet18:7 convnext_atto

Exits with status 1 where a gradient differs. A name may carry the width of resnet18. oneDNN reads its environment
variables when torch is imported, and a wrong kernel may end the process: tests run this file in a process of its own.
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
    """{layer name: relative error of its weight gradient}, from one backward pass through the whole network.

    Each layer's own float32 input and output gradient are taken, so that only its weight gradient is compared.
    """
    expected, handles = defaultdict(lambda: 0), []
    for name, layer in model.named_modules():
        if (
            isinstance(layer, nn.Conv2d)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):

            def watch(layer, inputs, output, name=name):
                images = inputs[0].detach()

                def add(gradient):
                    expected[name] += torch.nn.grad.conv2d_weight(
                        images.double().contiguous(), layer.weight.shape, gradient.double().contiguous(),
                        layer.stride, layer.padding, layer.dilation, layer.groups,
                    )  # fmt: skip

                output.register_hook(add)

            handles.append(layer.register_forward_hook(watch))
    generator = torch.Generator().manual_seed(side)
    images = torch.randn(count, 3, side, side, generator=generator)
    model.train().zero_grad()
    F.cross_entropy(model(images), torch.arange(count) % 10).backward()
    for handle in handles:
        handle.remove()
    found = {name: model.get_parameter(f"{name}.weight").grad for name in expected}
    return {
        name: ((found[name] - exact).norm() / (exact.norm() + 1e-12)).item()
        for name, exact in expected.items()
    }


def main(names):
    failed = False
    for name in names:
        model_name, _, width = name.partition(":")
        torch.manual_seed(0)
        model = models.create_model(model_name, 10, width=int(width or 64), pretrained=False)
        for side, count in CASES if width else [(64, 4), (96, 3)]:
            found = errors(model, side, count)
            assert found, f"{name} has no convolution"
            for layer, error in found.items():
                if not error < 1e-4:
                    print(
                        f"{name}, {count} images of {side}×{side}: {layer}.weight.grad is off by {error:.1%}"
                    )
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
