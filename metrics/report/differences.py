"""The columns that compare rows with Retrain's: differences with their intervals, and the gap.

Rows are those of results.csv (dicts).
"""

from .. import CR, comparison, intervals
from ..columns import Interval
from . import tables
from .tables import DIFFERENCES, KEYS, MODEL_COLUMNS, SET_COLUMNS, is_missing

REFERENCE = "reference"  # the cell of Retrain


def compare_model(name, numbers, reference, *, influences):
    """The columns that compare a model as a whole with Retrain. Both are {key: number}.

    ``influences`` are the two results of :func:`metrics.intervals.model_influences`.
    """
    shown = {key: numbers[key] for key in MODEL_COLUMNS if key in numbers}
    compared = comparison.differences(shown, reference)
    compared["gap"] = comparison.gap(numbers, reference)
    compared["ToW"] = comparison.tug_of_war(numbers, reference)
    if name == "retrain":
        compared["by_UA"] = REFERENCE
    else:
        compared |= _image_intervals(compared, *influences)
        if "MIA_minus_retrain" in compared:
            shares = numbers["MIA"], reference["MIA"]
            interval = intervals.over_shares(*shares, numbers["num_forget"])
            compared["MIA_minus_retrain"] = interval
        compared["by_UA"] = _cell(compared, "UA")
    seconds, reference_seconds = (row.get("seconds") or 0 for row in (numbers, reference))
    if name != "original" and seconds > 0 and reference_seconds > 0:
        compared["RTE"] = seconds / reference_seconds
    return compared


def compare_sets(name, row, reference, *, influences):
    """The columns that compare a model's prediction sets with Retrain's. Both are {key: number}.

    ``influences`` are the two results of :func:`metrics.intervals.set_influences`.
    """
    row, reference = tables.means_of(row), tables.means_of(reference)
    shown = {key: row[key] for key in SET_COLUMNS if key in row}
    compared = comparison.differences(shown, reference)
    if name == "retrain":
        return compared | {"by_CR": REFERENCE}
    compared |= _image_intervals(compared, *influences)
    return compared | {"by_CR": _cell(compared, f"{CR.forget_group(row)}_CR")}


def _image_intervals(compared, influences, reference):
    """The differences that have influences, as Intervals."""
    found = {}
    for key in influences:
        column = f"{key}_minus_retrain"
        if column in compared:
            both = influences[key], reference[key]
            found[column] = intervals.over_images(compared[column], *both)
    return found


def summarise_seeds(rows):
    """One row per (score, calibration size, α, method), with a Spread over the seeds.

    Several seeds have paired t intervals, a single seed keeps those over its images.
    """
    seeds = {}
    for row in rows:
        seeds.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    summary = tables.summarise(rows, MODEL_COLUMNS | SET_COLUMNS, KEYS)
    if len(summary) == len(rows):
        return summary
    for row, group in zip(summary, seeds.values(), strict=True):
        num_forget = min((seed["num_forget"] for seed in group if seed.get("num_forget")), default=1)
        for column in DIFFERENCES.keys() & row.keys():
            values = [tables.mean_of(seed.get(column)) for seed in group]
            known = [value for value in values if not is_missing(value)]
            on_forget = not column.startswith(("RA", "TA", "test"))
            resolution = 1 / num_forget if on_forget else 0
            row[column] = intervals.over_seeds(known, resolution)
        if row["method"] != "retrain":
            cells = {"by_UA": "UA", "by_CR": f"{CR.forget_group(row)}_CR"}
            row |= {cell: _cell(row, key) for cell, key in cells.items() if cell in row}
    return summary


def _cell(row, key):
    """The cell of ``by UA`` or ``by CR``: a word or an interval, positive where more is forgotten.

    None without an interval.
    """
    difference = row.get(f"{key}_minus_retrain")
    if not isinstance(difference, Interval) or is_missing(difference.low):
        return None
    if key != "UA":  # a lower CR means more forgetting
        difference = Interval(-difference.mean, -difference.high, -difference.low)
    kind = "percent" if key == "UA" else "number"
    return intervals.word(difference) or tables.format_interval(difference, kind)
