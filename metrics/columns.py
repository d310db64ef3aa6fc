"""How a number is reported: its column in the tables, and its spread over resplits.

The printed tables, the report and the tables of metrics/README.md are made from these columns.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Spread(NamedTuple):
    """A number's mean and sample standard deviation (n − 1) over random calibration/test resplits.

    ``std`` is NaN where the number exists in fewer than two resplits.
    """

    mean: float
    std: float


class Interval(NamedTuple):
    """A difference to Retrain with the ends of its 95 % interval, NaN if these are unknown."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """A column of the tables.

    ``heading`` is shown by the printed tables and the report; "" if only results.csv has the
    column. ``kind`` is the format of its values: percent (stored as a fraction), number, count,
    seconds or text. ``better`` names the good values: "high", "low", "near Retrain", … or "".
    ``meaning`` is a clause that explains the number.
    """

    heading: str
    kind: str
    better: str = ""
    meaning: str = ""


def csv_only(kind, meaning, better=""):
    """A :class:`Column` that only results.csv has."""
    return Column("", kind, better, meaning)


# What a row is about. The scripts fill these in; they are not metrics.
RUN_COLUMNS = {
    "method": Column("method", "text", "", "unlearning method; a CPU variant starts with cpu_"),
    "score": Column("score", "text", "", "non-conformity score: thr, aps or raps"),
    "cal_size": Column("n_cal", "text", "", "calibration size: number of calibration images"),
    "alpha": Column("alpha", "text", "", "miscoverage level α"),
    "seconds": Column("time s", "seconds", "low", "running time of the method"),
    "peak_memory": Column("memory MB", "count", "low", "peak GPU memory of the method"),
    "changed": Column(
        "changed", "percent", "", "predictions on all images that differ from the original model's"
    ),
    "note": Column("note", "text", "", "why a method failed; the row has no numbers"),
    "base_method": csv_only("text", "the method of a row that --label names"),
    "num_forget": csv_only("count", "number of forget images"),
    "forget_set": csv_only("text", "fingerprint of the forget set"),
    "forget_class": csv_only("text", "the forgotten classes"),
    "weights": csv_only("text", "hash of the model's weights"),
}


def markdown(columns):
    """{key: :class:`Column`} as a Markdown table."""
    lines = ["| column | heading | kind | better | meaning |", "|---|---|---|---|---|"]
    for key, column in columns.items():
        heading = column.heading.replace("|", "\\|")
        cells = f"`{key}`", heading, column.kind, column.better, column.meaning
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
