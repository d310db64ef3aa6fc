"""The networks of the paper."""

import torch

import models


def test_resnet18_is_the_cifar_variant():
    model = models.create_model("resnet18", 10)
    # ResNet-18 for CIFAR
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
