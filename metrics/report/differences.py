"""The columns that compare rows with Retrain's: differences with their intervals, and the gap.

Rows are those of results.csv (dicts). ``influences`` are those of the model and of Retrain, as
:mod:`metrics.intervals` makes them.
"""

from .. import CR, comparison, intervals
from ..columns import Interval
from . import tables
from .tables import KEYS, MODEL_COLUMNS, SET_COLUMNS, is_missing


def compare(numbers, reference, influences):
    """The differences of a model's or its sets' numbers to Retrain's: {key_minus_retrain: number}.

    Those whose ``influences`` are known are Intervals.
    """
    shown = {key: numbers[key] for key in MODEL_COLUMNS | SET_COLUMNS if key in numbers}
    compared = comparison.differences(tables.means_of(shown), tables.means_of(reference))
    for key, influence in influences[0].items():
        column = f"{key}_minus_retrain"
        if column in compared:
            pair = influence, influences[1][key]
            compared[column] = intervals.over_images(compared[column], *pair)
    return compared


def compare_model(name, numbers, reference):
    """The other columns that compare a model as a whole with Retrain. Both are {key: number}."""
    compared = {"gap": comparison.gap(numbers, reference)}
    compared["ToW"] = comparison.tug_of_war(numbers, reference)
    shares = numbers["MIA"], reference["MIA"]
    if name != "retrain" and not any(map(is_missing, shares)):
        compared["MIA_minus_retrain"] = intervals.over_shares(*shares, numbers["num_forget"])
    return compared


def with_words(row):
    """A row with ``by_UA`` and ``by_CR``: a word or an interval, positive if more is forgotten."""
    cells = {}
    for cell, key in (("by_UA", "UA"), ("by_CR", f"{CR.forget_group(row)}_CR")):
        difference = row.get(f"{key}_minus_retrain")
        if row["method"] == "retrain" and difference is not None:
            cells[cell] = "reference"
        elif isinstance(difference, Interval) and not is_missing(difference.low):
            if key != "UA":  # a lower CR means more forgetting
                difference = Interval(-difference.mean, -difference.high, -difference.low)
            text = tables.format_ends(difference, "percent" if key == "UA" else "number")
            cells[cell] = intervals.word(difference) or text
    return row | cells


def summarise_seeds(rows):
    """One row per (score, calibration size, α, method): Spreads and Intervals over the seeds."""
    summary = tables.summarise(rows, MODEL_COLUMNS | SET_COLUMNS, KEYS)
    return [with_words(row | dict.fromkeys(("by_UA", "by_CR"))) for row in summary]
