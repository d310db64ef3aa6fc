"""95 % intervals of differences to Retrain: over several seeds, or over the images of one seed.

Over seeds, the interval is the paired t interval. For one seed, the two models are fixed and the
images are random: the interval covers the sampling of images, not the variation over trainings.

The influence of an image on a number is its contribution to the number's sampling error, to first
order (delta method). Influences are independent, so their squares sum to the variance. Both models
are measured on the same images: the influences on a difference are differences of influences.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import special

from . import CR
from .columns import Interval

UNDER, OVER = "under-forgets", "over-forgets"
LEVEL = 0.95


def word(interval):
    """*over-forgets* above zero, *under-forgets* below, None if the interval contains zero or NaN.

    A positive difference means that the method forgets more than Retrain.
    """
    if interval.low > 0:
        return OVER
    return UNDER if interval.high < 0 else None


def over_seeds(differences, resolution=0.0):
    """The paired t interval of the differences of n seeds → :class:`Interval`, NaN for n = 1.

    ``resolution`` is the step of the numbers, e.g. 1/N for a share of N images. The deviation is at
    least that of rounding two numbers to it: two equal differences are otherwise a sure difference.
    """
    n = len(differences)
    deviation = np.std(differences, ddof=1) if n > 1 else math.nan
    error = max(deviation, resolution / math.sqrt(6)) / math.sqrt(n)
    return _t_interval(float(np.mean(differences)), error, n - 1)


def over_shares(share, reference, n):
    """The interval of the difference of two shares of n images, as if they were independent.

    It is too wide for models that are wrong on the same images.
    """
    variance = (share * (1 - share) + reference * (1 - reference)) / max(n - 1, 1)
    return _t_interval(share - reference, math.sqrt(variance), n - 1)


class Influences(NamedTuple):
    """The influence of each image on a number that is a mean over ``num_images`` of them."""

    values: torch.Tensor
    num_images: int


def over_images(difference, influences, reference):
    """The interval of the difference of two numbers with these :class:`Influences`."""
    n = min(influences.num_images, reference.num_images)
    variance = (influences.values - reference.values).square().sum().item() * n / max(n - 1, 1)
    return _t_interval(difference, math.sqrt(variance), n - 1)


def influences(conformal_scores, keys):
    """{key: influences} on the numbers of (score name, calibration size, α), and of the model: None.

    ``keys`` are such triples.
    """
    score_of = {score.name: score for score in conformal_scores.settings.scores}
    by_key = {None: model_influences(conformal_scores.outputs)}
    for name, size, alpha in keys:
        by_key[name, size, alpha] = set_influences(
            conformal_scores, score_of[name], size=size, alpha=alpha
        )
    return by_key


def model_influences(outputs):
    """{key: :class:`Influences`} on UA, RA and TA."""
    images = {"UA": outputs.forget, "RA": outputs.retain}
    images["TA"] = outputs.held_out.select(outputs.test())
    on_number = {}
    for key, (logits, labels) in images.items():
        correct = (logits.argmax(dim=1) == labels).double()
        values = (correct - correct.mean()) / len(labels)
        on_number[key] = Influences(-values if key == "UA" else values, len(labels))
    return on_number


def set_influences(conformal_scores, score, *, size, alpha):
    """{key: :class:`Influences`} on CR_f, the fake share and CR_t under the retained classes' q̂.

    An image acts directly in the draws in which it is measured, and through q̂ in the draws in which
    it calibrates. NaN if q̂ varies too much for a linear approximation.
    """
    outputs, held_out = conformal_scores.outputs, conformal_scores.part("held_out", score)
    calibrates, tests = _roles(outputs, size)
    used = (calibrates | tests).any(dim=0)
    # The population's coverage under q̂ is 1 − α plus the mean of (1 − α) − 1[score ≤ q̂] over the
    # calibration images (Bahadur 1966). Slopes are per this coverage, over ± two deviations of it.
    deviation = math.sqrt(alpha * (1 - alpha) / (len(outputs.calibration(size)) + 2))
    levels = 1 - alpha + 2 * deviation * torch.tensor([-1, 1], dtype=torch.float64)
    around = held_out.true_label[used].quantile(levels.clamp(0, 1), interpolation="higher")
    change = levels.diff() if 0 < levels[0] and levels[1] < 1 else math.nan
    near = _terms(conformal_scores, score, used, around)

    column = conformal_scores.settings.alphas.index(alpha)
    q_hats = conformal_scores.q_hats(score, size)[:, column]
    known = ~q_hats.isnan()
    errors = (1 - alpha - held_out.in_set(q_hats).double()) * calibrates
    errors /= calibrates.sum(dim=1, keepdim=True).clamp(min=1)
    on_number = {}
    for key, terms in _terms(conformal_scores, score, tests, q_hats).items():
        numerators, denominators = terms
        residuals = numerators.double() - CR.conformal_ratio(*terms)[:, None] * denominators
        residuals /= denominators.sum(dim=1, keepdim=True).clamp(min=1)
        direct = residuals[known].mean(dim=0)
        through_q_hat = CR.conformal_ratio(*near[key]).diff() / change * errors[known].mean(dim=0)
        parts = [direct + through_q_hat] if key == "test_CR" else [direct, through_q_hat]
        num_images = int((denominators > 0).any(dim=0).sum())
        on_number[key] = Influences(torch.cat(parts), num_images)
    return on_number


def _terms(conformal_scores, score, tests, q_hats):
    """{key: (numerators, denominators)} of the numbers, which are ratios of sums, under R q̂: R×N.

    ``tests`` are booleans (R×P or P): which held-out images are measured.
    """
    forget, held_out = (conformal_scores.part(name, score) for name in ("forget", "held_out"))
    group = "forget" if conformal_scores.outputs.forgotten is None else "forget_by_retain"
    inside, wrong = forget.in_set(q_hats), forget.misclassified.expand(len(q_hats), -1)
    return {
        f"{group}_CR": (inside, forget.set_sizes(q_hats)),
        f"{group}_fake_ratio": (inside & wrong, wrong),
        "test_CR": (held_out.in_set(q_hats) & tests, held_out.set_sizes(q_hats) * tests),
    }


def _roles(outputs, size):
    """Which held-out images calibrate, and which are test images, in each draw: twice R×P."""
    roles = torch.zeros(2, *outputs.draws.shape, dtype=torch.bool)
    for draw in range(outputs.num_draws):
        roles[0, draw, outputs.calibration(size, draw)] = True
        roles[1, draw, outputs.test(draw)] = True
    return roles


def _t_interval(mean, error, degrees):
    half = float(special.stdtrit(degrees, (1 + LEVEL) / 2)) * error
    return Interval(mean, mean - half, mean + half)
