"""The conformal metrics: Coverage, Set Size, CR and fake forgetting (arXiv 2501.19403).

Everything here is a pure function of logits and labels. The representation between predictor and metrics
is the boolean matrix of prediction sets, N images × K labels. Scores are float64.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch

COLUMNS = {
    "forget_coverage": ("Cov_f %", "percent"),
    "forget_set_size": ("Size_f", "number"),
    "forget_CR": ("CR_f", "number"),
    "test_coverage": ("Cov_t %", "percent"),
    "test_set_size": ("Size_t", "number"),
    "test_CR": ("CR_t", "number"),
    "forget_misclassified": ("wrong", "count"),
    "forget_fake": ("fake", "count"),
    "forget_fake_ratio": ("fake %", "percent"),
    "forget_by_retain_coverage": ("Cov_f|r %", "percent"),
    "forget_by_retain_set_size": ("Size_f|r", "number"),
    "forget_by_retain_CR": ("CR_f|r", "number"),
}


def non_conformity_scores(logits):
    """S(x, y) = 1 − p_y(x) of every label. Logits N×K (any float type) → scores N×K, float64 in [0, 1].

    The score of the top label is summed from the other labels' probabilities: 1 − p rounds to 0 for a
    confident model, and the order of the confident scores, which is all that q̂ looks at, would be lost.
    """
    probabilities = torch.softmax(logits.double(), dim=1)
    top = probabilities.argmax(dim=1, keepdim=True)
    others = probabilities.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
    return (1 - probabilities).scatter(1, top, others)


def true_label_scores(logits, labels):
    """S(x, y) of each image's own label. Logits N×K, labels N → scores N, float64."""
    return non_conformity_scores(logits).gather(1, labels[:, None]).squeeze(1)


def conformal_quantile(scores, alpha):
    """q̂: the k-th smallest of n calibration scores, k = ⌈(n+1)(1−α)⌉; infinity where k > n.

    ``scores`` is a tensor of n values, α lies in (0, 1). An exact order statistic: α is read as the decimal
    number that was typed, so (n+1)(1−α) has no rounding error. Raises ValueError for an α outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, found {alpha}")
    k = math.ceil((scores.numel() + 1) * (1 - Fraction(str(float(alpha)))))
    if k > scores.numel():
        return math.inf
    return scores.kthvalue(k).values.item()


def at_most_one_label(q_hat):
    """Whether no set can hold two labels: q̂ < 1/2, which is where α lies above the model's error rate.

    S ≤ q̂ then means a probability above 1/2. Coverage and Set Size fall together and CR tends to 1 on
    forgotten and other images alike: such an α says nothing about forgetting.
    """
    return q_hat < 0.5


def prediction_sets(scores, q_hat):
    """C(x) = {y : S(x, y) ≤ q̂} as booleans. Scores N×K → sets N×K."""
    return scores <= q_hat


def in_set(sets, labels):
    """Whether each image's own label is in its set. Sets N×K, labels N → booleans N."""
    return sets.gather(1, labels[:, None]).squeeze(1)


def coverage(sets, labels):
    """Share of images with their own label in the set (the paper's Coverage). Sets N×K, labels N → float in [0, 1]."""
    return in_set(sets, labels).double().mean().item()


def set_size(sets):
    """Mean number of labels in a set (the paper's Set Size). Sets N×K → float in [0, K]."""
    return sets.sum(dim=1).double().mean().item()


def conformal_ratio(sets, labels):
    """The paper's CR = Coverage / Set Size; 0 where every set is empty. Low on forgotten images, high on test."""
    size = set_size(sets)
    return coverage(sets, labels) / size if size else 0.0


class FakeForgetting(NamedTuple):
    misclassified: int
    in_set: int

    @property
    def ratio(self):
        """Share of the misclassified images that keep their label in the set; NaN where none is misclassified."""
        return self.in_set / self.misclassified if self.misclassified else math.nan


def fake_forgetting(logits, sets, labels):
    """Of the images whose argmax is wrong, how many still have their label in the set (the paper's fake forgetting).

    Logits N×K, sets N×K, labels N.
    """
    wrong = logits.argmax(dim=1) != labels
    return FakeForgetting(int(wrong.sum()), int((wrong & in_set(sets, labels)).sum()))


def report(outputs, alphas, seed=0):
    """All conformal numbers of one model, per (calibration size, α).

    Returns ``({}, rows)``. Each part of the data (forget, retain, test) is judged with the q̂ of the
    calibration images. Where classes are forgotten, ``outputs.forget_calibration`` holds the forgotten class's
    own held-out images: forget and forget_test are judged with its q̂ as the paper does, and the keys
    ``…_by_retain`` judge them with the q̂ of the retained classes.
    """
    by_retain = {"retain": outputs.retain, "test": outputs.test}
    by_forget = {"forget": outputs.forget}
    if outputs.forget_calibration:
        by_forget["forget_test"] = outputs.forget_test
        by_retain |= {f"{name}_by_retain": part for name, part in by_forget.items()}
    else:
        by_retain |= by_forget
        by_forget = {}
    scores = {id(part): non_conformity_scores(part.logits) for part in (*by_retain.values(), *by_forget.values())}

    rows = {}
    for size, calibration in outputs.calibration.items():
        for alpha in alphas:
            q_hat = conformal_quantile(true_label_scores(*calibration), alpha)
            row = rows[size, alpha] = {"q_hat": q_hat}
            judged = [(name, part, q_hat) for name, part in by_retain.items()]
            if by_forget:
                row["q_hat_forget"] = conformal_quantile(true_label_scores(*outputs.forget_calibration[size]), alpha)
                judged += [(name, part, row["q_hat_forget"]) for name, part in by_forget.items()]
            for name, part, threshold in judged:
                row |= _describe(name, part, prediction_sets(scores[id(part)], threshold))
    return {}, rows


def _describe(name, part, sets):
    fake = fake_forgetting(part.logits, sets, part.labels)
    return {
        f"{name}_coverage": coverage(sets, part.labels),
        f"{name}_set_size": set_size(sets),
        f"{name}_CR": conformal_ratio(sets, part.labels),
        f"{name}_misclassified": fake.misclassified,
        f"{name}_fake": fake.in_set,
        f"{name}_fake_ratio": fake.ratio,
    }
