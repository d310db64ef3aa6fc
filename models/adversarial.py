"""Adversarial examples: images that are changed as little as possible to change the prediction.

``model`` is used in eval mode. Images pass through it in chunks, without augmentation, and several
processes divide every chunk. The ``spec`` of ``images`` has the mean and deviation of the
normalization.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from . import distributed

MAX_DOUBLINGS = 12  # of the radius of the attack
STEPS = 50  # per radius, as in the authors' code


class Examples(NamedTuple):
    """Adversarial examples: normalized images N×3×H×W and their wrong labels N (int64)."""

    inputs: torch.Tensor
    labels: torch.Tensor


def adversarial_examples(model, images, indices, radius, chunk):
    """The :class:`Examples` of :func:`nearest` for the images at ``indices``, in their order."""
    model.eval()
    parts, chunks = [], indices.split(chunk * distributed.world_size())
    for chunk_indices, inputs in zip(chunks, images.batches(chunks), strict=True):
        labels = images.labels[distributed.local_rows(chunk_indices)]
        examples = nearest(model, inputs, labels, images.spec, radius=radius)
        parts.append([distributed.gather_rows(rows, len(chunk_indices)) for rows in examples])
    return Examples(*map(torch.cat, zip(*parts, strict=True)))


def fgsm(model, inputs, labels, size, spec):
    """One step along the sign of the gradient of the loss (Goodfellow et al. 2015, 1412.6572).

    ``inputs`` are normalized images N×3×H×W with ``labels`` N. ``size`` is the step of every pixel
    in units of the pixels' range. Pixels stay in their range and are rounded to 1/255. Returns
    normalized images.
    """
    inputs = inputs.detach().requires_grad_()
    loss = F.cross_entropy(model(inputs), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    mean, std = _normalization(inputs, spec)
    pixels = (inputs.detach() * std + mean + size * gradient.sign()).clamp(0, 1)
    return ((255 * pixels).round() / 255 - mean) / std


def nearest(model, inputs, labels, spec, *, radius):
    """The :class:`Examples` nearest to images, by projected gradient ascent in balls (PGD-L2; Madry
    et al. 2018, 1706.06083), as AMUN (2503.00917) searches them.

    ``inputs`` are normalized images N×3×H×W with ``labels`` N, ``radius`` is the L2 norm of the
    first ball in pixels of range 0 to 1. A step is a tenth of the radius. The first image that is
    classified wrongly is the example. After ``STEPS`` steps the radius doubles, and the search goes
    on from the last image. An image that never changes its prediction gets the last image and its
    likeliest wrong class.
    """
    mean, std = _normalization(inputs, spec)
    examples = Examples(inputs.clone(), labels.clone())
    rows = torch.arange(len(inputs), device=inputs.device)  # the images without an example so far
    centre = inputs * std + mean
    pixels = centre
    for _ in range(MAX_DOUBLINGS):
        for _ in range(STEPS):
            if not len(rows):
                return examples
            gradient, wrong, is_wrong = _ascent(model, (pixels - mean) / std, labels[rows])
            examples.inputs[rows] = (pixels - mean) / std
            examples.labels[rows] = wrong
            rows, centre = rows[~is_wrong], centre[~is_wrong]
            pixels, gradient = pixels[~is_wrong], gradient[~is_wrong]
            # A step of a tenth of the radius, then back into the ball and the range of pixels.
            tiny = torch.finfo(pixels.dtype).tiny
            direction = F.normalize((gradient / std).flatten(1), eps=tiny).view_as(pixels)
            moved = pixels + radius / 10 * direction - centre
            # The factor is 1 inside the ball, and moves images outside it to its surface.
            shrink = radius / moved.flatten(1).norm(dim=1).clamp(min=radius)
            pixels = (centre + moved * shrink[:, None, None, None]).clamp(0, 1)
        radius *= 2
    return examples


def _ascent(model, inputs, labels):
    """The gradient of the loss at each image, its likeliest wrong class, and whether that wins.

    The loss is log Σ exp of the other logits less the label's logit. Its gradient has the direction
    of the cross-entropy's, and does not vanish where the model is certain.
    """
    inputs = inputs.detach().requires_grad_()
    logits = model(inputs).float()
    others = logits.scatter(1, labels[:, None], -torch.inf)
    loss = others.logsumexp(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs)
    return gradient, others.argmax(dim=1), logits.argmax(dim=1) != labels


def _normalization(inputs, spec):
    """The mean and deviation 3×1×1 of the normalization of ``inputs``."""
    return (
        torch.tensor(numbers, dtype=inputs.dtype, device=inputs.device)[:, None, None]
        for numbers in (spec.mean, spec.std)
    )
