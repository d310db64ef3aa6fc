"""Fills the convolutions of every new network with NaN. Methods that start from new weights
diverge.
"""

import torch


def install():
    torch.nn.init.kaiming_normal_ = lambda tensor, *_, **__: tensor.data.fill_(float("nan"))
