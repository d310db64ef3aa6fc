"""The networks of the paper."""

import timm
import torch

import models


def test_resnet18_is_the_cifar_variant():
    model = models.create_model("resnet18", 10)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    )  # the CIFAR ResNet-18
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_vit_is_the_papers_network_with_weights_from_disk(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch16_224")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "weights.pth"
    model = models.create_model("vit", 10, image_size=32, pretrained_path=path)
    assert model.blocks[11].mlp.fc2.weight.equal(source.blocks[11].mlp.fc2.weight)
    assert model.head.out_features == 10
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert models.input_size("vit") == 224 and models.input_size("resnet18") is None
