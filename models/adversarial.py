"""Adversarial examples: images that are changed as little as possible to change the answer."""

import torch
from torch.nn import functional as F


def fgsm(model, inputs, labels, size, spec):
    """One step along the sign of the gradient of the loss (Goodfellow et al. 2015, 1412.6572).

    ``inputs`` are normalised images N×3×H×W with ``labels`` N. ``size`` is the step of every pixel
    in units of the pixels' range, and ``spec`` (:class:`utils.DataSpec`) has the mean and deviation
    of the normalisation. Pixels stay in their range. Returns normalised images.
    """
    if not len(inputs):
        return inputs
    inputs = inputs.detach().requires_grad_()
    loss = F.cross_entropy(model(inputs), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    mean, std = (
        torch.tensor(numbers, dtype=inputs.dtype, device=inputs.device)[:, None, None]
        for numbers in (spec.mean, spec.std)
    )
    moved = inputs.detach() + size / std * gradient.sign()
    return moved.clamp(min=-mean / std, max=(1 - mean) / std)
