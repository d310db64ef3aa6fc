"""Only networks with correct channels-last weight gradients receive channels-last input.

oneDNN chooses its kernels by ONEDNN_MAX_CPU_ISA (AVX2, AVX512_CORE, ...), read at import.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from models.layout import choose_layout, input_layout

LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def stem_and(*layers):
    return nn.Sequential(nn.Conv2d(3, 16, 3), *layers)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (stem_and(nn.Conv2d(16, 32, 1, stride=2)), LAST),
        (stem_and(nn.Conv2d(15, 32, 1, stride=2)), CONTIGUOUS),
        (stem_and(nn.Conv2d(16, 16, 3, groups=16)), CONTIGUOUS),
        (stem_and(nn.Conv2d(32, 32, 3, groups=2)), LAST),
        (stem_and(nn.ConvTranspose2d(8, 32, 1)), CONTIGUOUS),
        (nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.Conv2d(16, 16, 3)), CONTIGUOUS),
        (nn.Linear(3, 3), LAST),
    ],
)
def test_layout_on_the_cpu_depends_on_the_narrowest_convolution(network, expected):
    assert input_layout(network, "cpu") == expected


def test_layout_on_cuda_is_channels_last_and_on_mps_contiguous():
    narrow = nn.Conv2d(2, 2, 1)
    assert input_layout(narrow, "cuda") == LAST and input_layout(narrow, "mps") == CONTIGUOUS


@pytest.mark.parametrize(("width", "last"), [(8, False), (15, False), (16, True), (64, True)])
def test_resnet18_receives_its_layout_for_input_of_any_layout(width, last):
    model, seen = models.create_model("resnet18", 10, width=width), []
    model.conv1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    for layout in (LAST, CONTIGUOUS):
        model(torch.randn(2, 3, 8, 8).contiguous(memory_format=layout))
    assert [images.is_contiguous(memory_format=LAST) for images in seen] == [last, last]
    assert [images.is_contiguous() for images in seen] == [not last, not last]


def test_narrow_1x1_convolution_in_a_permuting_network_gets_contiguous_input():
    class Permuting(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, stride=2)

        def forward(self, images):
            return self.narrow(self.wide(images).contiguous(memory_format=LAST))

    model, seen = choose_layout(Permuting()), []
    model.narrow.register_forward_hook(
        lambda layer, inputs, output: seen.append(inputs[0].is_contiguous())
    )
    model(torch.randn(2, 3, 8, 8))
    assert seen == [True]


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "convnext_atto", *range(2, 17, 2)])
def test_weight_gradients_equal_those_in_float64(name):
    """Of networks by name, or of resnet18 by width. A wrong kernel is off by more than 10 %."""
    torch.manual_seed(0)
    model_name, width = (name, 64) if isinstance(name, str) else ("resnet18", name)
    model = models.create_model(model_name, 10, width=width, pretrained=False)
    exact = copy.deepcopy(model).double()
    images = torch.randn(4, 3, 33, 33)
    F.cross_entropy(model(images), torch.arange(4)).backward()
    F.cross_entropy(exact(images.double()), torch.arange(4)).backward()
    for (layer, weight), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (weight.grad - expected.grad).norm() / (expected.grad.norm() + 1e-6)
        assert error < 0.01, (layer, error.item())
