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


def word(interval):
    """A word if the interval excludes zero, else None. Positive: it forgets more than Retrain."""
    return OVER if interval.low > 0 else UNDER if interval.high < 0 else None


def over_seeds(differences, resolution=0.0):
    """The paired t interval of the differences of n seeds → :class:`Interval`, NaN for n = 1.

    ``resolution`` is the step of the numbers, e.g. 1/N for a share of N images. The deviation is at
    least that of rounding two numbers to it: two equal differences are otherwise a sure difference.
    """
    n = len(differences)
    deviation = np.std(differences, ddof=1) if n > 1 else 0.0
    error = max(deviation, resolution / math.sqrt(6)) / math.sqrt(n)
    return _t_interval(float(np.mean(differences)), error, n - 1)


def over_shares(share, reference, n):
    """That of two shares of n images as if independent: too wide if both err on the same images."""
    # The variances of two binomial shares, with Bessel's correction.
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


def model_influences(outputs):
    """{key: :class:`Influences`} on UA, RA and TA. The signs of UA's are reversed."""
    images = {"UA": outputs.forget, "RA": outputs.retain}
    images["TA"] = outputs.held_out.select(outputs.test())
    correct = {key: (x.logits.argmax(dim=1) == x.labels).double() for key, x in images.items()}
    return {key: Influences((x - x.mean()) / len(x), len(x)) for key, x in correct.items()}


def set_influences(conformal_scores, name, size, alpha):
    """{key: :class:`Influences`} on CR_f, the fake share and CR_t under the retained classes' q̂.

    An image acts directly in the draws in which it is measured, and through q̂ in the draws in which
    it calibrates. NaN with fewer than about 4/α calibration images: q̂ varies too much.
    """
    outputs, settings = conformal_scores.outputs, conformal_scores.settings
    score = next(score for score in settings.scores if score.name == name)
    held_out = conformal_scores.part("held_out", score)
    calibrates, tests = torch.zeros(2, *outputs.draws.shape, dtype=torch.bool)
    for draw in range(outputs.num_draws):
        calibrates[draw, outputs.calibration(size, draw)] = True
        tests[draw, outputs.test(draw)] = True
    # The population's coverage under q̂ is 1 − α plus the mean of (1 − α) − 1[score ≤ q̂] over the
    # calibration images (Bahadur 1966). Slopes are per this coverage, over ± two deviations of it.
    deviation = math.sqrt(alpha * (1 - alpha) / (len(outputs.calibration(size)) + 2))
    levels = 1 - alpha + 2 * deviation * torch.tensor([-1, 1], dtype=torch.float64)
    change = levels.diff() if levels[0] > 0 and levels[1] < 1 else math.nan
    used = (calibrates | tests).any(dim=0)
    around = held_out.true_label[used].quantile(levels.clamp(0, 1), interpolation="higher")
    near = _terms(conformal_scores, score, used, around)  # at q̂ a little lower and higher
    q_hats = conformal_scores.q_hats(score, size)[:, settings.alphas.index(alpha)]
    # R×P: the influence of each image on the coverage of each draw, 0 where it does not calibrate.
    errors = (1 - alpha - held_out.in_set(q_hats).double()) * calibrates
    errors /= calibrates.sum(dim=1, keepdim=True).clamp(min=1)
    influences, known = {}, ~q_hats.isnan()
    for key, terms in _terms(conformal_scores, score, tests, q_hats).items():
        numerators, denominators = terms
        residuals = numerators.double() - CR.conformal_ratio(*terms)[:, None] * denominators
        # d(A/B) = (dA − A/B · dB) / B for a ratio of sums over images.
        residuals /= denominators.sum(dim=1, keepdim=True).clamp(min=1)
        direct = residuals[known].mean(dim=0)
        through_q_hat = CR.conformal_ratio(*near[key]).diff() / change * errors[known].mean(dim=0)
        parts = [direct + through_q_hat] if key == "test_CR" else [direct, through_q_hat]
        num_images = int((denominators > 0).any(dim=0).sum())
        influences[key] = Influences(torch.cat(parts), num_images)
    return influences


def _terms(conformal_scores, score, tests, q_hats):
    """{key: (numerators, denominators)} of ratios of sums over images, under R q̂: R×N.

    ``tests`` (booleans R×P or P) are the test images.
    """
    forget, held_out = (conformal_scores.part(part, score) for part in ("forget", "held_out"))
    group = "forget" if conformal_scores.outputs.forgotten is None else "forget_by_retain"
    inside, wrong = forget.in_set(q_hats), forget.misclassified.expand(len(q_hats), -1)
    return {
        f"{group}_CR": (inside, forget.set_sizes(q_hats)),
        f"{group}_fake_ratio": (inside & wrong, wrong),
        "test_CR": (held_out.in_set(q_hats) & tests, held_out.set_sizes(q_hats) * tests),
    }


def _t_interval(mean, error, degrees):
    # stdtrit is the quantile of Student's t distribution.
    half = float(special.stdtrit(degrees, 0.975)) * error
    return Interval(mean, mean - half, mean + half)
