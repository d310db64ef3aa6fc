"""How a number is reported: its column in the tables, and its spread over resplits.

A metric describes each of its columns once, as a :class:`Column` in its ``COLUMNS`` (numbers of the
model as a whole), ``ROW_COLUMNS`` (numbers per score, calibration size and α) or ``CSV_COLUMNS``
(numbers that only results.csv has). The printed tables, the report and the tables of
metrics/README.md are made from these.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Spread(NamedTuple):
    """A number that varies: its mean and standard deviation over random calibration/test resplits.

    ``std`` is the sample standard deviation (n − 1). It is NaN where fewer than two resplits know
    the number.
    """

    mean: float
    std: float


@dataclass(frozen=True)
class Column:
    """A column of the tables.

    ``heading`` is shown by the printed tables and the report; "" where only results.csv has the
    column. ``kind`` is the format of its values: percent (stored as a fraction), number, count,
    seconds or text. ``better`` names the good values: "high", "low", "near Retrain", … or ""
    where none is better. ``meaning`` is a clause that explains the number.
    """

    heading: str
    kind: str
    better: str = ""
    meaning: str = ""


# What a row is about. The scripts fill these in; they are not metrics.
RUN_COLUMNS = {
    "method": Column("method", "text", "", "unlearning method; a CPU variant starts with cpu_"),
    "score": Column("score", "text", "", "non-conformity score: thr, aps, raps or saps"),
    "cal_size": Column("n_cal", "text", "", "calibration size: held-out images that calibrate"),
    "alpha": Column("alpha", "text", "", "miscoverage level α"),
    "seconds": Column("time s", "seconds", "low", "running time of the method"),
    "peak_memory": Column(
        "memory MB",
        "count",
        "low",
        "peak memory of the method: of the GPU, or of the process on a CPU (Linux), where it "
        "includes the libraries and the data",
    ),
    "time_ratio": Column(
        "time/ft", "number", "low", "running time divided by finetune's running time"
    ),
    "memory_ratio": Column(
        "mem/ft", "number", "low", "peak memory divided by finetune's peak memory"
    ),
    "changed": Column(
        "changed",
        "percent",
        "",
        "predictions on retain, forget and held-out images that differ from the original model's",
    ),
    "note": Column("note", "text", "", "why a method failed; the row has no numbers"),
    "num_forget": Column("", "count", "", "number of forget images"),
    "forget_set": Column("", "text", "", "fingerprint of the forget set"),
    "forget_class": Column("", "text", "", "the forgotten classes"),
    "weights": Column("", "text", "", "hash of the model's weights"),
    "model": Column("", "text", "", "file of the model, relative to the folder of results.csv"),
    "settings": Column("", "text", "", "hash of the data set and of the evaluation's settings"),
}


def markdown(columns):
    """{key: :class:`Column`} as a Markdown table."""
    lines = ["| column | heading | kind | better | meaning |", "|---|---|---|---|---|"]
    for key, column in columns.items():
        heading = column.heading.replace("|", "\\|")
        lines.append(
            f"| `{key}` | {heading} | {column.kind} | {column.better} | {column.meaning} |"
        )
    return "\n".join(lines)
