"""Differences to Retrain, the model trained without the forget images: the reference of unlearning.

Both under-forgetting and over-forgetting are errors.
"""

import math

import torch

from .columns import Column, csv_only

COLUMNS = {
    "gap": Column(
        "gap", "percent", "low", "mean absolute difference to Retrain over UA, RA, TA and MIA"
    ),
    "by_UA": Column(
        "by UA",
        "text",
        "",
        "under-forgets or over-forgets if the 95 % interval of the difference to Retrain excludes "
        "zero, else this interval in points (positive: forgets more)",
    ),
    "ToW": Column(
        "ToW", "number", "high", "tug of war: product of 1 − distance to Retrain in UA, RA, TA"
    ),
    "JSD_forget": Column(
        "JSD_f", "number", "low", "Jensen-Shannon divergence from Retrain, forget images, in bits"
    ),
    "JSD_test": Column("JSD_t", "number", "low", "the same on the test images"),
}
ROW_COLUMNS = {
    "by_CR": Column(
        "by CR",
        "text",
        "",
        "the same by −forget_CR (or −forget_by_retain_CR); needs about 4/α calibration images for "
        "one seed",
    ),
}
CSV_COLUMNS = {
    "<column>_minus_retrain": csv_only("number", "the model's number minus Retrain's", "near 0"),
    "<column>_minus_retrain_low": csv_only("number", "lower end of the difference's 95 % interval"),
    "<column>_minus_retrain_high": csv_only("number", "its upper end"),
}
GAP_OVER = ("UA", "RA", "TA", "MIA")


def gap(scalars, reference):
    """The mean absolute difference to Retrain over UA, RA, TA and MIA, as a fraction.

    Both are {key: number}. Numbers that only one of them has are left out. NaN if none remains.
    """
    distances = differences({key: scalars.get(key) for key in GAP_OVER}, reference)
    return sum(map(abs, distances.values())) / len(distances) if distances else math.nan


def differences(numbers, reference):
    """{key_minus_retrain: signed difference} of every finite number that both have."""
    return {
        f"{key}_minus_retrain": value - reference[key]
        for key, value in numbers.items()
        if _is_number(value) and _is_number(reference.get(key))
    }


def changed_share(predictions, original):
    """The share of the images whose predicted class changed. Twice N → a float. NaN for N = 0."""
    return (predictions != original).float().mean().item()


def tug_of_war(numbers, reference):
    """ToW (Zhao et al. 2024, 2406.01257): Π (1 − |difference to Retrain|) over UA, RA and TA.

    Both are {key: fraction}. NaN if a number is missing.
    """
    distances = differences({key: numbers.get(key) for key in ("UA", "RA", "TA")}, reference)
    if len(distances) < 3:
        return math.nan
    return math.prod(1 - abs(distance) for distance in distances.values())


def prediction_distances(outputs, reference):
    """The columns that compare a model with Retrain image by image. Both are metrics.Outputs."""
    forget = jensen_shannon(outputs.forget.logits, reference.forget.logits)
    test = jensen_shannon(*(each.held_out.logits[each.test()] for each in (outputs, reference)))
    return {"JSD_forget": forget, "JSD_test": test}


def jensen_shannon(logits, reference_logits):
    """Mean Jensen-Shannon divergence in bits. Twice N×K → a float in [0, 1], NaN for N = 0."""
    log_p, log_q = (x.double().log_softmax(dim=1) for x in (logits, reference_logits))
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)  # of (p + q) / 2
    divergences = (log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)).sum(dim=1)
    return (divergences.clamp(min=0).mean() / 2 / math.log(2)).item()  # nats to bits


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
