"""The last layer of a network: adding a class, and keeping only the first classes."""

import math

import torch
from torch import nn

from .errors import UserError
from .inference import classifier_layers


def linear_layers(model, num_classes):
    """The layers that turn features into logits, each nn.Linear with a row and a bias per class.

    Raises UserError for a network whose classifier is anything else.
    """
    layers = classifier_layers(model)
    for layer in layers:
        is_linear = isinstance(layer, nn.Linear) and layer.bias is not None
        if not is_linear or layer.out_features != num_classes:
            raise UserError(
                f"the classifier of this network ends in {type(layer).__name__}, and this method "
                f"needs nn.Linear with a row and a bias for each of the {num_classes} classes"
            )
    return layers


def last_layer(model, num_classes, *, required):
    """Names of the parameters of :func:`linear_layers`; none for another classifier.

    Raises UserError for another classifier if one is ``required``.
    """
    try:
        layers = linear_layers(model, num_classes)
    except UserError:
        if required:
            raise
        layers = []
    last = {parameter for layer in layers for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if parameter in last}


def widen(model, num_classes, rng):
    """Add one class after the ``num_classes`` of a network, with weights drawn as by nn.Linear.

    ``rng`` is a generator on the CPU. Raises UserError as :func:`linear_layers` does.
    """
    for layer in linear_layers(model, num_classes):
        limit = 1 / math.sqrt(layer.in_features)
        row = torch.empty(1, layer.in_features).uniform_(-limit, limit, generator=rng)
        bias = torch.empty(1).uniform_(-limit, limit, generator=rng)
        weight = torch.cat([layer.weight, row.to(layer.weight)])
        _set_rows(layer, weight, torch.cat([layer.bias, bias.to(layer.bias)]))


def narrow(model, num_classes):
    """Keep the first ``num_classes`` classes of a network. Returns it."""
    for layer in classifier_layers(model):
        _set_rows(layer, layer.weight[:num_classes], layer.bias[:num_classes])
    return model


def _set_rows(layer, weight, bias):
    """Replace the weight and the bias of a linear layer."""
    layer.out_features = len(weight)
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = nn.Parameter(bias.detach().clone())
