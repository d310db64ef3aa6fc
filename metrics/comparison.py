"""How far a method is from Retrain, the model that never saw the forget images: the reference of
unlearning.

Forgetting too little is a fault, and so is forgetting too much.
"""

import math

from .columns import Column

COLUMNS = {
    "gap": Column(
        "gap", "percent", "low", "mean absolute difference to Retrain over UA, RA, TA and MIA"
    ),
    "UA_word": Column(
        "by UA",
        "text",
        "matches",
        "whether the model under-forgets, matches or over-forgets Retrain, judged by UA; a match "
        "is within two standard errors over the images, or within two standard deviations of "
        "Retrain over several seeds",
    ),
    "RTE": Column(
        "RTE",
        "number",
        "low",
        "running-time efficiency: running time divided by Retrain's running time",
    ),
}
ROW_COLUMNS = {
    "CR_word": Column(
        "by CR",
        "text",
        "matches",
        "the same verdict, judged by the CR of the forget images (under the q̂ of the retained "
        "classes where a class is forgotten)",
    ),
}
CSV_COLUMNS = {
    "<column>_minus_retrain": Column("", "number", "near 0", "the model's number minus Retrain's"),
    "compared_to": Column(
        "", "text", "", "hash of the weights of the Retrain model that the row is compared to"
    ),
}
GAP_OVER = ("UA", "RA", "TA", "MIA")
WORDS = UNDER, MATCHES, OVER = "under-forgets", "matches", "over-forgets"


def gap(scalars, reference):
    """The mean absolute difference to Retrain over UA, RA, TA and MIA, as a fraction.

    Both are {key: number}. Numbers that one of them lacks are left out. NaN where nothing remains.
    """
    distances = differences({key: scalars.get(key) for key in GAP_OVER}, reference)
    return sum(map(abs, distances.values())) / len(distances) if distances else math.nan


def differences(numbers, reference):
    """{key_minus_retrain: signed difference} of every finite number that both have."""
    signed = {}
    for key, value in numbers.items():
        other = reference.get(key)
        if _is_number(value) and _is_number(other):
            signed[f"{key}_minus_retrain"] = value - other
    return signed


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def verdict(difference, tolerance):
    """A word for a difference to Retrain (positive: the method forgets more). None for NaN."""
    if math.isnan(difference) or math.isnan(tolerance):
        return None
    if abs(difference) <= tolerance:
        return MATCHES
    return OVER if difference > 0 else UNDER


def share_tolerance(share, n):
    """Two standard errors of the difference between two shares of n images, both near ``share``.

    At least one image. → a fraction.
    """
    return at_least_one_image(2 * math.sqrt(2 * share * (1 - share) / n), n)


def at_least_one_image(tolerance, n):
    """``tolerance``, but at least 1/n, the smallest difference between shares of n images."""
    return max(tolerance, 1 / n)
