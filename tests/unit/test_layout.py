"""Networks get channels-last input only where their weight gradients are right."""

import pytest
import torch
from torch import nn

import models
from models.layout import choose_layout

LAST = torch.channels_last


def layouts_seen(model, layer):
    """Whether the inputs of a layer are channels last, for model inputs of both layouts."""
    seen = []
    layer.register_forward_hook(
        lambda layer, inputs, output: seen.append(inputs[0].is_contiguous(memory_format=LAST))
    )
    for layout in (LAST, torch.contiguous_format):
        model(torch.randn(2, 3, 8, 8).contiguous(memory_format=layout))
    return seen


def stem_and(*layers):
    return nn.Sequential(nn.Conv2d(3, 16, 3), *layers)


@pytest.mark.parametrize(
    ("network", "last"),
    [
        (stem_and(nn.Conv2d(16, 32, 1, stride=2)), True),
        (stem_and(nn.Conv2d(16, 15, 1), nn.Conv2d(15, 32, 3)), False),
        (stem_and(nn.Conv2d(16, 16, 3, groups=16)), False),
        (stem_and(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=2)), True),
        (stem_and(nn.Conv2d(16, 8, 1), nn.ConvTranspose2d(8, 32, 1)), False),
        (nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.Conv2d(16, 16, 3)), False),
    ],
)
def test_layout_on_a_cpu_depends_on_the_narrowest_convolution(network, last):
    assert layouts_seen(choose_layout(network), network[0]) == [last, last]


@pytest.mark.parametrize(("width", "last"), [(8, False), (15, False), (16, True), (64, True)])
def test_resnet18_receives_its_layout_for_input_of_any_layout(width, last):
    model = models.create_model("resnet18", 10, width=width)
    assert layouts_seen(model, model.conv1) == [last, last]


def test_narrow_1x1_convolution_in_a_permuting_network_gets_contiguous_input():
    class Permuting(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, stride=2)

        def forward(self, images):
            return self.narrow(self.wide(images).contiguous(memory_format=LAST))

    model = choose_layout(Permuting())
    assert layouts_seen(model, model.narrow) == [False, False]
