"""The last layer of a network: adding a class, and keeping only the first classes."""

import math

import torch
from torch import nn

from .errors import UserError
from .inference import classifier_layers


def widen(model, num_classes, rng):
    """Add one class after the ``num_classes`` of a network, with weights drawn as by nn.Linear.

    ``rng`` is a generator on the CPU. Raises UserError for a last layer that is not linear.
    """
    for layer in classifier_layers(model):
        if not isinstance(layer, nn.Linear) or layer.out_features != num_classes:
            raise UserError(
                f"the last layer of this network is {type(layer).__name__}, and only nn.Linear "
                "can get another class"
            )
        limit = 1 / math.sqrt(layer.in_features)
        row = torch.empty(1, layer.in_features).uniform_(-limit, limit, generator=rng)
        bias = torch.empty(1).uniform_(-limit, limit, generator=rng)
        _set_rows(layer, torch.cat([layer.weight, row.to(layer.weight)]), bias)


def narrow(model, num_classes):
    """Keep the first ``num_classes`` classes of a network. Returns it."""
    for layer in classifier_layers(model):
        _set_rows(layer, layer.weight[:num_classes])
    return model


def _set_rows(layer, weight, more_bias=None):
    """Replace the weight of a linear layer, and cut or extend its bias to as many rows."""
    layer.out_features = len(weight)
    layer.weight = nn.Parameter(weight.detach().clone())
    if layer.bias is not None:
        bias = layer.bias.detach()
        if more_bias is not None:
            bias = torch.cat([bias, more_bias.to(bias)])
        layer.bias = nn.Parameter(bias[: len(weight)].clone())
