"""The columns that compare rows with Retrain's: differences, the gap, and verdicts.

Rows are those of results.csv (dicts).
"""

import math

from .. import CR, Spread, comparison
from . import tables
from .tables import KEYS, MODEL_COLUMNS, SET_COLUMNS


def compare_model(name, numbers, reference):
    """The columns that compare a model as a whole with Retrain. Both are {key: number}."""
    tolerance = comparison.share_tolerance(numbers["UA"], reference["UA"], numbers["num_forget"])
    shown = {key: numbers[key] for key in MODEL_COLUMNS if key in numbers}
    compared = comparison.differences(shown, reference)
    compared["gap"] = comparison.gap(numbers, reference)
    compared["ToW"] = comparison.tug_of_war(numbers, reference)
    compared["UA_word"] = comparison.verdict(numbers["UA"] - reference["UA"], tolerance)
    seconds, reference_seconds = numbers["seconds"] or 0, reference["seconds"] or 0
    if name != "original" and seconds > 0 and reference_seconds > 0:
        compared["RTE"] = seconds / reference_seconds
    return compared


def compare_sets(row, reference, num_forget):
    """The columns that compare a model's prediction sets with Retrain's. Both are {key: number}."""
    row, reference = tables.means_of(row), tables.means_of(reference)
    key = f"{CR.judged_forget_images(row)}_CR"
    shown = {key: row[key] for key in SET_COLUMNS if key in row}
    compared = comparison.differences(shown, reference)
    error = math.hypot(row[f"{key}_error"], reference[f"{key}_error"])
    tolerance = comparison.at_least_one_image(2 * error, num_forget)
    compared["CR_word"] = comparison.verdict(reference[key] - row[key], tolerance)
    return compared


def summarise_seeds(rows):
    """One row per (score, calibration size, α, method), with a Spread over the seeds.

    The verdicts' tolerance is two standard deviations of Retrain over the seeds, or one image of
    the smallest forget set if that is larger.
    """
    summary = tables.summarise(rows, MODEL_COLUMNS | SET_COLUMNS, KEYS)
    retrain = {block_of(row): row for row in summary if row["method"] == "retrain"}
    fewest = min((row["num_forget"] for row in rows if row.get("num_forget")), default=1)
    for row in summary:
        reference = retrain.get(block_of(row), {})
        if row["method"] == comparison.SECOND_RETRAIN:
            continue  # it has the verdicts of the pairs of seeds
        if has_spread(row, "UA") and has_spread(reference, "UA"):
            key = f"{CR.judged_forget_images(row)}_CR"
            row["UA_word"] = verdict_over_seeds(row, reference, key="UA", fewest=fewest)
            row["CR_word"] = verdict_over_seeds(row, reference, key=key, fewest=fewest)
    return summary


def has_spread(row, key):
    return isinstance(row.get(key), Spread)


def verdict_over_seeds(row, reference, *, key, fewest):
    """The verdict by UA or a CR. A higher UA and a lower CR mean more forgetting."""
    if not has_spread(row, key) or not has_spread(reference, key):
        return None
    difference = row[key].mean - reference[key].mean
    tolerance = comparison.at_least_one_image(2 * reference[key].std, fewest)
    return comparison.verdict(difference if key == "UA" else -difference, tolerance)


def block_of(row):
    """The (score, calibration size, α) of a row."""
    return tuple(row[key] for key in KEYS[:-1])
