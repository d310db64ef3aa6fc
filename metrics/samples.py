"""The forget images one by one: the rows of samples.csv and the clearest fake forgetting.

For class-wise forgetting, the q̂ is that of the retained classes.
"""

import math
from typing import NamedTuple

import torch

from . import scores


def sample_rows(conformal_scores, indices, names=None):
    """One row (dict) per forget image, under the first score and the largest calibration size.

    ``indices`` are the images' indices in the training set, ``names`` their file names if any. For
    each α, a row has the set size, whether the label is in the set and whether the image is
    fake-forgotten, under the split's own q̂, and ``in_set_share``, the share of the draws with a
    finite q̂ whose set contains the label. These are None if the split has no finite q̂.
    """
    forget, output = conformal_scores.part("forget"), conformal_scores.outputs.forget
    probabilities = torch.softmax(output.logits.double(), dim=1)
    columns = {
        "index": indices.tolist(),
        **({"file": names} if names else {}),
        "label": output.labels.tolist(),
        "prediction": output.logits.argmax(dim=1).tolist(),
        "p_true": probabilities.gather(1, output.labels[:, None]).squeeze(1).tolist(),
        "score": scores.from_log_odds(forget.true_label).tolist(),
    }
    alphas = conformal_scores.settings.alphas
    for alpha, q_hats in zip(alphas, conformal_scores.q_hats().T, strict=True):
        numbers = _set_columns(forget, q_hats)
        columns |= {f"{key}@{alpha:g}": values for key, values in numbers.items()}
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _set_columns(forget, q_hats):
    """The columns of one α: lists of N numbers, or of None. ``q_hats`` are those of the draws."""
    # The first q̂ is the split's own. The share is over all draws with a finite one.
    split_q_hat, finite = q_hats[:1], q_hats[~q_hats.isnan()]
    inside = forget.in_set(split_q_hat)[0]
    columns = {
        "set_size": forget.set_sizes(split_q_hat)[0],
        "in_set": inside.int(),
        "fake": (inside & forget.misclassified).int(),
        "in_set_share": forget.in_set(finite).double().mean(dim=0),
    }
    if split_q_hat.isnan():
        return dict.fromkeys(columns, [None] * len(inside))
    return {key: values.tolist() for key, values in columns.items()}


class FakeForgotten(NamedTuple):
    """A forget image: position in the forget set, labels, and set (most probable label first)."""

    position: int
    label: int
    prediction: int
    prediction_set: list[int]


def most_fake(conformal_scores, count):
    """The ``count`` fake-forgotten images with the smallest scores of their labels, at the first α.

    Returns a list of :class:`FakeForgotten`, or None if the split has no finite q̂.
    """
    forget, (logits, labels) = conformal_scores.part("forget"), conformal_scores.outputs.forget
    q_hat = conformal_scores.q_hats()[:1, 0]
    if q_hat.isnan():
        return None
    is_fake = forget.in_set(q_hat)[0] & forget.misclassified
    by_score = torch.where(is_fake, forget.true_label, math.inf).argsort()
    set_sizes = forget.set_sizes(q_hat)[0]
    images = []
    for position in by_score[: min(count, int(is_fake.sum()))].tolist():
        ranked = logits[position].argsort(descending=True, stable=True).tolist()
        prediction_set = ranked[: int(set_sizes[position])]
        images.append(FakeForgotten(position, int(labels[position]), ranked[0], prediction_set))
    return images
