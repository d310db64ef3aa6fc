"""What became of each forget image: the rows of an audit.

Where a class is forgotten its images are judged as a user of the model would, by the q̂ of the retained classes.
"""

import math

import torch

from . import CR, scores


def sample_rows(outputs, settings, indices, names=None):
    """One row (dict) per forget image, under the first score and the largest calibration size.

    ``indices`` are the images' places among the training images, ``names`` their file names where they have some. For
    each α: the set size, whether the label is in the set, whether the image is fake-forgotten (misclassified with its
    label in the set), by the split's own calibration images; and in what share of the draws with a finite q̂ the label
    was in the set. None where the split has no finite q̂.
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
        "score": scores.from_log_odds(forget.own).tolist(),
    }
    for alpha in settings.alphas:
        q_hats = CR.split_q_hats(held_out, outputs, size, [alpha]).flatten()
        inside, sizes = CR.apply_thresholds(forget, [q_hats[0]])
        often = (forget.own[:, None] <= q_hats[~q_hats.isnan()]).double().mean(dim=1)
        found = {
            "set_size": sizes[0],
            "in_set": inside[0].int(),
            "fake": (inside[0] & forget.wrong).int(),
            "in_set_share": often,
        }
        unknown = [None] * len(forget.own) if q_hats[0].isnan() else None
        columns |= {f"{key}@{alpha:g}": unknown or values.tolist() for key, values in found.items()}
    return [{key: values[place] for key, values in columns.items()} for place in range(len(forget.own))]


def most_fake(outputs, settings, count):
    """The forget images that the sets contradict most at the first α: misclassified, label in the set, and the label's
    score the smallest. → up to ``count`` tuples (place in the forget set, prediction, labels in the set by score), or
    None where the split has no finite q̂."""
    score, size, alpha = settings.scores[0], max(outputs.cal_sizes), settings.alphas[0]
    forget = CR.score_part(outputs.forget, score, "forget")
    held_out = CR.score_part(outputs.held_out, score, "held_out")
    q_hat = CR.split_q_hats(held_out, outputs, size, [alpha])[0].item()
    if math.isnan(q_hat):
        return None
    fake = torch.where(forget.wrong & (forget.own <= q_hat), forget.own, math.inf)
    found = []
    for place in fake.argsort()[:count].tolist():
        if math.isinf(fake[place]):
            break
        order = outputs.forget.logits[place].argsort(descending=True, stable=True).tolist()
        size_of_set = int((forget.ranked[place] <= q_hat).sum())
        found.append((place, order[0], order[:size_of_set]))
    return found
