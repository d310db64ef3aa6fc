"""How far a method is from Retrain, the model that never saw the forget images: the reference of unlearning.

Too little forgetting is a fault, and too much is one as well.
"""

import math

GAP_OVER = ("UA", "RA", "TA", "MIA")
WORDS = UNDER, MATCHES, OVER = "under-forgets", "matches", "over-forgets"


def gap(scalars, reference):
    """The mean absolute difference to Retrain over those of UA, RA, TA and MIA that both know (as a fraction); NaN
    where they know none."""
    found = differences({key: scalars.get(key) for key in GAP_OVER}, reference)
    return sum(map(abs, found.values())) / len(found) if found else math.nan


def differences(numbers, reference):
    """{key_minus_retrain: signed difference} of every finite number that both have."""
    found = {}
    for key, value in numbers.items():
        other = reference.get(key)
        if _is_number(value) and _is_number(other):
            found[f"{key}_minus_retrain"] = value - other
    return found


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def verdict(difference, tolerance):
    """A plain word for a difference to Retrain that is positive where the method forgets more; None for NaN."""
    if math.isnan(difference) or math.isnan(tolerance):
        return None
    if abs(difference) <= tolerance:
        return MATCHES
    return OVER if difference > 0 else UNDER


def share_tolerance(share, n):
    """Two standard errors of the difference between two shares of n images, both near ``share``; one image at least."""
    return at_least_one_image(2 * math.sqrt(2 * share * (1 - share) / n), n)


def at_least_one_image(tolerance, n):
    """``tolerance``, or the least difference that shares of n images can have where that is larger."""
    return max(tolerance, 1 / n)
