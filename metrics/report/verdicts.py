"""The columns that compare rows with Retrain's: differences, the gap, and verdicts.

Rows are those of results.csv (dicts).
"""

import math

from .. import CR, Spread, comparison
from . import tables
from .tables import KEYS, MODEL_COLUMNS, SET_COLUMNS, block_of


def compare_model(name, numbers, reference):
    """The columns that compare a model as a whole with Retrain. Both are {key: number}."""
    tolerance = comparison.share_tolerance(numbers["UA"], reference["UA"], numbers["num_forget"])
    shown = {key: numbers[key] for key in MODEL_COLUMNS if key in numbers}
    compared = comparison.differences(shown, reference)
    compared["gap"] = comparison.gap(numbers, reference)
    compared["ToW"] = comparison.tug_of_war(numbers, reference)
    compared["UA_word"] = comparison.verdict(numbers["UA"] - reference["UA"], tolerance)
    seconds, reference_seconds = (row.get("seconds") or 0 for row in (numbers, reference))
    if name != "original" and seconds > 0 and reference_seconds > 0:
        compared["RTE"] = seconds / reference_seconds
    return compared


def compare_sets(row, reference, num_forget):
    """The columns that compare a model's prediction sets with Retrain's. Both are {key: number}.

    A CR within twice the standard error of the difference matches, as does one within one image.
    """
    row, reference = tables.means_of(row), tables.means_of(reference)
    key = _deciding_ratio(row)
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
        if not isinstance(row.get("UA"), Spread) or not isinstance(reference.get("UA"), Spread):
            continue
        # A higher UA and a lower CR mean more forgetting.
        for key, word, sign in (("UA", "UA_word", 1), (_deciding_ratio(row), "CR_word", -1)):
            value, expected = row.get(key), reference.get(key)
            row[word] = None
            if isinstance(value, Spread) and isinstance(expected, Spread):
                difference = sign * (value.mean - expected.mean)
                tolerance = comparison.at_least_one_image(2 * expected.std, fewest)
                row[word] = comparison.verdict(difference, tolerance)
    return summary


def _deciding_ratio(row):
    """The key of the CR that decides the verdict."""
    return f"{CR.judged_forget_images(row)}_CR"
