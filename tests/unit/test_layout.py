"""Only networks with correct channels-last weight gradients receive channels-last input."""

import pytest
import torch
from torch import nn

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
