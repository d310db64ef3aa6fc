"""Weight gradients of convolutions on CPUs with and without AVX-512 equal those in float64.

Run as a program with the names of networks, it prints the layers whose gradient differs. oneDNN
reads its environment variables at import, and a wrong kernel may end the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIDTHS = [f"resnet18:{width}" for width in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16)]
TIMM = ["test_resnet.r160_in1k", "mobilenetv3_small_050", "convnext_atto", "ghostnet_050"]
NARROW = ((8, 4), (7, 3), (13, 5), (33, 2), (32, 64))  # side in pixels, images in the batch
WIDE = ((64, 4), (96, 3))


@pytest.mark.parametrize("names", [WIDTHS, TIMM], ids=["resnet18", "timm"])
@pytest.mark.parametrize("instructions", ["AVX2", "DEFAULT"])
def test_weight_gradients_equal_those_in_float64(instructions, names):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "2"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def print_wrong_gradients(model, name, side, count):
    """Compare every convolution's weight gradient with that of its own inputs in float64."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    expected = {}

    def watch(layer, inputs, output):
        images = inputs[0].detach().double().contiguous()
        options = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}

        def add(gradient):
            exact = torch.nn.grad.conv2d_weight(
                images, layer.weight.shape, gradient.double().contiguous(), **options
            )
            expected[layer] = expected.get(layer, 0) + exact

        output.register_hook(add)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
            layer.register_forward_hook(watch)
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(side))
    F.cross_entropy(model.train()(images), torch.arange(count) % 10).backward()
    assert expected, f"{name} has no convolution"
    for layer, exact in expected.items():
        error = ((layer.weight.grad - exact).norm() / (exact.norm() + 1e-12)).item()
        if not error < 1e-4:
            print(f"{name}, {count} images of {side}×{side}: {layer} is off by {error:.1%}")


if __name__ == "__main__":
    import models

    for name in sys.argv[1:]:
        model_name, _, width = name.partition(":")
        for side, count in NARROW if width else WIDE:
            model = models.create_model(model_name, 10, width=int(width or 64), pretrained=False)
            print_wrong_gradients(model, name, side, count)
