"""ResNet-18 for small images (He et al. 2016, arXiv 1512.03385, with the CIFAR stem)."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock


class ResNet18(nn.Module):
    """ResNet-18 whose stem keeps the resolution: a 3×3 convolution of stride 1 and no max-pool.

    Input N×3×H×W (any H, W ≥ 1), output N×num_classes logits. ``width`` is the number of channels
    of the first stage. Each of the next three stages doubles it. 64 is the paper's network, of 11.2
    million parameters. 16 has a sixteenth of its parameters, for experiments on a CPU.
    """

    def __init__(self, num_classes, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def _stage(in_channels, out_channels, stride):
    """Two basic blocks; the first changes the resolution and the number of channels."""
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, shortcut),
        BasicBlock(out_channels, out_channels),
    )
