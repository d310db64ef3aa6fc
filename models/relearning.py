"""Relearning: train an unlearned model for a few steps, which may bring forget images back."""

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from .errors import UserError
from .seeds import permutation
from .training import Job, Recipe


def relearn(model, data, split, *, trained, num_steps, seed, source):
    """Train on the images ``trained``. Yields (steps so far, model) after 1, 2, 4, … and the last.

    SGD at a constant rate of 0.001, in batches of at most 64 augmented images in an order of
    ``seed``. The caller may measure the model. Raises UserError on divergence.
    """
    stops = sorted({2**power for power in range(num_steps.bit_length())} | {num_steps})
    recipe = Recipe(len(stops), learning_rate=0.001, milestones=[len(stops)])
    about = {"name": "relearn", "label": f"relearn {source}", "seed": seed, "quiet": True}
    split = replace(split, forget=trained)
    job = Job(model=model, data=data, split=split, recipe=recipe, **about)
    # An epoch of this job ends at each stop.
    for epoch, stop, count in zip(job.epochs(), stops, np.diff([0, *stops]), strict=True):
        batches = epoch.cycle("forget")
        for batch in epoch.visit((next(batches), 0) for _ in range(count)):
            epoch.step(F.cross_entropy(batch.logits, batch.labels), batch)
        yield stop, job.model


def divide(split, seed, source):
    """What is trained on (indices), and which forget images are measured (positions).

    From the ``source`` "forget", a tenth of the forget images are trained on, and the others are
    measured. From "retain", the retain images are trained on, and all forget images are measured
    (2505.22310). Raises UserError for "forget" with fewer than two forget images.
    """
    device, count = split.forget.device, len(split.forget)
    if source == "retain":
        return split.retain, torch.arange(count, device=device)
    if count < 2:
        raise UserError("--relearn: one forget image cannot be divided; forget more images")
    order = torch.from_numpy(permutation(seed, "relearn", count)).to(device)
    trained, measured = order.tensor_split([max(1, count // 10)])
    return split.forget[trained], measured
