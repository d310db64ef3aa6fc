"""Adversarial examples: images that are changed as little as possible to change the answer."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

MAX_DOUBLINGS = 12  # of the radius of the attack
STEPS = 20  # per radius


class Examples(NamedTuple):
    """Adversarial examples: normalised images N×3×H×W and their wrong labels N (int64)."""

    inputs: torch.Tensor
    labels: torch.Tensor


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
    mean, std = _normalisation(inputs, spec)
    moved = inputs.detach() + size / std * gradient.sign()
    return moved.clamp(min=-mean / std, max=(1 - mean) / std)


def nearest(model, inputs, labels, spec, *, radius):
    """The :class:`Examples` nearest to images, by projected gradient ascent in balls (PGD-L2; Madry
    et al. 2018, 1706.06083), as AMUN (2503.00917) searches them.

    ``inputs`` are normalised images N×3×H×W with ``labels`` N, ``radius`` is the L2 norm of the
    first ball in pixels of range 0 to 1. A step is a tenth of the radius. The first image that is
    classified wrongly is the example; an image that is wrong itself is its own. The radius doubles
    for images without one after ``STEPS`` steps. An image that never changes its answer gets the
    last image and its likeliest wrong class. The model stays in its mode.
    """
    mean, std = _normalisation(inputs, spec)
    examples = Examples(inputs.clone(), labels.clone())
    rows = torch.arange(len(inputs), device=inputs.device)  # those without an example
    for _ in range(MAX_DOUBLINGS):
        if not len(rows):
            break
        centre = inputs[rows] * std + mean
        pixels = centre
        for _ in range(STEPS + 1):
            gradient, wrong, is_wrong = _ascent(model, (pixels - mean) / std, labels[rows])
            examples.inputs[rows] = (pixels - mean) / std
            examples.labels[rows] = wrong
            rows, centre = rows[~is_wrong], centre[~is_wrong]
            pixels, gradient = pixels[~is_wrong], gradient[~is_wrong]
            if not len(rows):
                break
            moved = pixels + radius / 10 * _unit(gradient / std) - centre
            pixels = (centre + _into_ball(moved, radius)).clamp(0, 1)
        radius *= 2
    return examples


def _ascent(model, inputs, labels):
    """The gradient of the loss at each image, its likeliest wrong class, and whether that wins.

    The gradient is that of log Σ exp of the other logits less the label's logit. It has the
    direction of the cross-entropy's gradient, and does not vanish where the model is certain.
    """
    inputs = inputs.detach().requires_grad_()
    logits = model(inputs).float()
    others = logits.scatter(1, labels[:, None], -torch.inf)
    loss = others.logsumexp(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs)
    return gradient, others.argmax(dim=1), logits.argmax(dim=1) != labels


def _unit(images):
    """Images divided by their L2 norms; images of zeros stay zeros."""
    return images / _norms(images).clamp(min=torch.finfo(images.dtype).tiny)


def _into_ball(images, radius):
    """Images shortened to an L2 norm of at most ``radius``."""
    return images * (radius / _norms(images).clamp(min=radius))


def _norms(images):
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def _normalisation(inputs, spec):
    """The mean and deviation 3×1×1 of the normalisation of ``inputs``."""
    return (
        torch.tensor(numbers, dtype=inputs.dtype, device=inputs.device)[:, None, None]
        for numbers in (spec.mean, spec.std)
    )
