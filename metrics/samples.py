"""What became of each forget image: the rows of an audit.

Where a class is forgotten its images are judged as a user of the model would, by the q̂ of the retained classes.
"""

import math

import torch

from . import CR


def sample_rows(outputs, settings, indices, names=None):
    """One row (dict) per forget image, under the first score and the largest calibration size.

    ``indices`` are the images' places among the training images, ``names`` their file names where they have some. For
    each α: the set size, whether the label is in the set, whether the image is fake-forgotten (misclassified with its
    label in the set), by the split's own calibration images; and in how many of the draws of those the label was in
    the set.
    """
    score, size = settings.scores[0], max(outputs.cal_sizes)
    forget = CR.score_part(outputs.forget, score, "forget")
    held_out = CR.score_part(outputs.held_out, score, "held_out")
    probabilities = torch.softmax(outputs.forget.logits.double(), dim=1)
    own = probabilities.gather(1, outputs.forget.labels[:, None]).squeeze(1)
    columns = {
        "index": indices.tolist(),
        **({"file": names} if names else {}),
        "label": outputs.forget.labels.tolist(),
        "prediction": outputs.forget.logits.argmax(dim=1).tolist(),
        "p_true": own.tolist(),
        "score": forget.own.tolist(),
    }
    for alpha in settings.alphas:
        q_hats = [
            CR.conformal_quantile(held_out.own[outputs.calibration(size, draw)], alpha)
            for draw in range(outputs.num_draws)
        ]
        inside, sizes = CR.apply_thresholds(forget, q_hats[:1])
        often = (forget.own[:, None] <= torch.tensor(q_hats, dtype=torch.float64)).double().mean(dim=1)
        columns |= {
            f"set_size@{alpha:g}": sizes[0].tolist(),
            f"in_set@{alpha:g}": inside[0].int().tolist(),
            f"fake@{alpha:g}": (inside[0] & forget.wrong).int().tolist(),
            f"in_set_share@{alpha:g}": often.tolist(),
        }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def most_fake(outputs, settings, count):
    """The forget images that the sets contradict most at the first α: misclassified, label in the set, and the label's
    score the smallest. → up to ``count`` tuples (place in the forget set, prediction, labels in the set by score)."""
    score, size, alpha = settings.scores[0], max(outputs.cal_sizes), settings.alphas[0]
    forget = CR.score_part(outputs.forget, score, "forget")
    held_out = CR.score_part(outputs.held_out, score, "held_out")
    q_hat = CR.conformal_quantile(held_out.own[outputs.calibration(size)], alpha)
    fake = torch.where(forget.wrong & (forget.own <= q_hat), forget.own, math.inf)
    found = []
    for place in fake.argsort()[:count].tolist():
        if math.isinf(fake[place]):
            break
        logits = outputs.forget.logits[place : place + 1]
        sizes = int((forget.ranked[place] <= q_hat).sum())
        order = logits[0].argsort(descending=True).tolist()
        found.append((place, order[0], order[:sizes]))
    return found
