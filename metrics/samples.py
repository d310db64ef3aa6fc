"""What became of each forget image: the rows of an audit.

Where a class is forgotten its images are judged by the q̂ of the retained classes, like any image
that a user submits.
"""

import math
from typing import NamedTuple

import torch

from . import scores


def sample_rows(conformal_scores, indices, names=None):
    """One row (dict) per forget image, under the first score and the largest calibration size.

    ``indices`` are the images' indices in the training set, ``names`` their file names if there are
    any. Each row has, for each α under the split's own q̂: the set size, whether the label is in
    the set, and whether the image is fake-forgotten (misclassified with its label in the set).
    ``in_set_share`` is the share of the draws with a finite q̂ that have the label in the set.
    These are None where the split has no finite q̂.
    """
    forget, logits_labels = conformal_scores.part("forget"), conformal_scores.outputs.forget
    probabilities = torch.softmax(logits_labels.logits.double(), dim=1)
    columns = {
        "index": indices.tolist(),
        **({"file": names} if names else {}),
        "label": logits_labels.labels.tolist(),
        "prediction": logits_labels.logits.argmax(dim=1).tolist(),
        "p_true": probabilities.gather(1, logits_labels.labels[:, None]).squeeze(1).tolist(),
        "score": scores.from_log_odds(forget.true_label).tolist(),
    }
    alphas = conformal_scores.settings.alphas
    for alpha, q_hats in zip(alphas, conformal_scores.q_hats().T, strict=True):
        columns |= {f"{key}@{alpha:g}": values for key, values in _under(forget, q_hats).items()}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _under(forget, q_hats):
    """The columns of one α: lists of N numbers (None without a finite q̂ of the split).

    ``q_hats`` are those of the draws.
    """
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
    """A fake-forgotten image: position in the forget set, prediction, its set by score."""

    position: int
    prediction: int
    labels: list[int]


def most_fake(conformal_scores, count):
    """The clearest fake-forgotten images at the first α: misclassified, label in the set, smallest
    score of the label.

    Returns up to ``count`` :class:`FakeForgotten`, or None where the split has no finite q̂.
    """
    forget, logits = conformal_scores.part("forget"), conformal_scores.outputs.forget.logits
    q_hat = conformal_scores.q_hats()[:1, 0]
    if q_hat.isnan():
        return None
    is_fake = forget.in_set(q_hat)[0] & forget.misclassified
    by_score = torch.where(is_fake, forget.true_label, math.inf).argsort()
    set_sizes = forget.set_sizes(q_hat)[0]
    images = []
    for position in by_score[: min(count, int(is_fake.sum()))].tolist():
        labels = logits[position].argsort(descending=True, stable=True).tolist()
        images.append(FakeForgotten(position, labels[0], labels[: int(set_sizes[position])]))
    return images
