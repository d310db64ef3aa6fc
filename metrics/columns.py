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

    ``kind`` says how its numbers are printed: percent (stored as a fraction), number, count,
    seconds or text. ``better`` says which values are good: "high", "low", "near Retrain", ... or ""
    where the question makes no sense.
    """

    heading: str
    kind: str
    better: str = ""
    meaning: str = ""
