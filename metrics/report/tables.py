"""Tables: summaries over seeds, what is printed, and the text of CSV files.

A row is a dict from column keys to values. A value is a number, a :class:`metrics.columns.Spread`
(a number and its standard deviation), an :class:`metrics.columns.Interval`, a text, or None.
``columns`` is a dict from column keys to :class:`metrics.columns.Column`, in the order in which a
table shows them.
"""

import csv
import io
import math
from dataclasses import dataclass, replace

import numpy as np

from .. import CR, columns_of, ensembles, intervals
from ..columns import RUN_COLUMNS, Column, Interval, Spread

KEYS = ("score", "cal_size", "alpha", "method")  # together they identify a row of results.csv
WIDTH = 100  # characters of a printed line, where no method's name is longer than 16
MISSING = "–"
RESPLITS, SEEDS = "_resplit_std", "_std"  # endings of the columns of standard deviations in a file

FORMATS = {
    "percent": lambda value: f"{100 * value:.1f}",
    "number": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:.1f}" if isinstance(value, float) else f"{value:d}",
    "seconds": lambda value: f"{value:.1f}",
    "text": str,
}


@dataclass(frozen=True)
class Table:
    """Rows under a heading, with the columns to show."""

    heading: str
    columns: dict[str, Column]
    rows: list[dict]


SHORT_MODEL_KEYS = ("method", "UA", "RA", "TA", "MIA", "gap", "by_UA", "seconds")  # as printed
MODEL_COLUMNS = dict.fromkeys(SHORT_MODEL_KEYS) | columns_of("COLUMNS")
for key in ("method", "seconds", "changed", "peak_memory", "note"):
    MODEL_COLUMNS[key] = RUN_COLUMNS[key]
SET_COLUMNS = {key: RUN_COLUMNS[key] for key in ("method", *KEYS)} | columns_of("ROW_COLUMNS")
REPORT_ONLY = {"KLOM_retain", "KLOM_retain_chance", "KLOM_test_chance", "ULiRA_excess_error"}
FAKE_OF_WRONG = Column("fake of wrong", "text", "near Retrain", "fake-forgotten of misclassified")
COMPARED = ("UA", "RA", "TA", "MIA", "forget_CR", "forget_by_retain_CR", "test_CR")
COMPARED += ("forget_fake_ratio", "forget_by_retain_fake_ratio")
DIFFERENCES = {
    f"{key}_minus_retrain": Column(f"Δ{column.heading}", column.kind)
    for key, column in (MODEL_COLUMNS | SET_COLUMNS).items()
    if key in COMPARED
}


# ---------------------------------------------------------------- values


def is_missing(value):
    """Whether a value is unknown: None, NaN or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def mean_of(value):
    """The mean of a :class:`Spread` or :class:`Interval`. Any other value is returned unchanged."""
    return value.mean if isinstance(value, Spread | Interval) else value


def means_of(row):
    """A row without standard deviations and intervals."""
    return {key: mean_of(value) for key, value in row.items()}


def block_of(row):
    """The (score, calibration size, α) of a row."""
    return tuple(row[key] for key in KEYS[:-1])


def format_cell(value, kind):
    """A value as a table shows it: ``mean±std`` for a :class:`Spread` with a known deviation,
    ``mean [low, high]`` for a known :class:`Interval`.

    ``kind`` is percent, number, count, seconds or text.
    """
    mean = mean_of(value)
    if is_missing(mean):
        return MISSING
    if isinstance(value, Spread) and not is_missing(value.std):
        return f"{FORMATS[kind](mean)}±{FORMATS[kind](value.std)}"
    if isinstance(value, Interval) and not is_missing(value.low):
        return f"{FORMATS[kind](mean)} {format_ends(value, kind)}"
    return FORMATS[kind](mean)


def format_ends(interval, kind):
    """The ends of an :class:`Interval`: ``[low, high]``."""
    return f"[{FORMATS[kind](interval.low)}, {FORMATS[kind](interval.high)}]"


def short_count(count):
    """A count, or the mean of counts, in few characters: 5, 2.2, 1234."""
    if is_missing(count):
        return MISSING
    return f"{count:.0f}" if count == round(count) or count >= 100 else f"{count:.1f}"


# ---------------------------------------------------------------- summaries over seeds


def summarise(rows, columns, keys):
    """One row for all rows that agree in ``keys``, with the mean and deviation over these rows.

    A number becomes a :class:`Spread`, a difference to Retrain an :class:`Interval`. A number that
    already has a spread over resplits enters with its mean. Different texts are joined. A count or
    text that all rows agree on is kept, and a single row keeps its means.
    """
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(means_of(row))
    return [_merged(group, columns, keys) for group in groups.values()]


def _merged(group, columns, keys):
    merged = dict(group[0])
    if len(group) == 1:
        return merged
    for name in dict.fromkeys(name for row in group for name in row if name not in keys):
        known = [row[name] for row in group if not is_missing(row.get(name))]
        if not known:
            continue
        numeric = all(isinstance(value, int | float) for value in known)
        kind = columns[name].kind if name in columns else ("number" if numeric else "text")
        if len(set(known)) == 1 and kind in ("text", "count"):
            merged[name] = known[0]
        elif kind == "text":
            merged[name] = "; ".join(dict.fromkeys(map(str, known)))
        elif name in DIFFERENCES and merged["method"] != "retrain":
            is_forget = not name.startswith(("RA", "TA", "test"))
            resolution = 1 / min(row.get("num_forget") or 1 for row in group) if is_forget else 0
            merged[name] = intervals.over_seeds(known, resolution)
        else:
            deviation = np.std(known, ddof=1) if len(known) > 1 else 0
            merged[name] = Spread(float(np.mean(known)), float(deviation))
    return merged


# ---------------------------------------------------------------- the tables of an evaluation


def full_tables(rows):
    """The :class:`Table` of the models, of their prediction sets, and of differences to Retrain.

    ``rows`` are those of results.csv. A table in which no row has a number is left out, as is a
    column that no row fills, and a score or calibration size that all rows share.
    """
    sets, columns = rows_of_sets(rows), dict(SET_COLUMNS)
    for key in ("score", "cal_size"):
        if len({row[key] for row in sets}) == 1:
            del columns[key]
    about = {key: columns[key] for key in SET_COLUMNS if key in KEYS and key in columns}
    others = [row for row in sets if row["method"] != "retrain"]
    made = [
        filled_table("Models", MODEL_COLUMNS, one_per_method(rows)),
        filled_table("Prediction sets", columns, sets),
        filled_table("Differences to Retrain", about | DIFFERENCES, others),
    ]
    return [table for table in made if table is not None]


def one_per_method(rows):
    """The last row of each method."""
    return list({row["method"]: row for row in rows}.values())


def rows_of_sets(rows):
    """The rows with prediction sets. A failed method has none."""
    return [row for row in rows if "q_hat" in row]


def short_model_table(rows):
    """The :class:`Table` of the models with the columns that an evaluation prints, or None."""
    columns = {key: MODEL_COLUMNS[key] for key in SHORT_MODEL_KEYS}
    return filled_table("Models", columns, one_per_method(rows))


def short_set_table(rows):
    """The :class:`Table` of the prediction sets with the columns that an evaluation prints."""
    rows = rows_of_sets(rows)
    forget = CR.forget_group(rows[0]) if rows else "forget"
    shown = ("method", f"{forget}_coverage", f"{forget}_set_size", f"{forget}_CR")
    columns = {key: SET_COLUMNS[key] for key in (*shown, "test_coverage", "test_CR")}
    columns |= {"fake_of_wrong": FAKE_OF_WRONG, "by_CR": SET_COLUMNS["by_CR"]}
    rows = [row | {"fake_of_wrong": fake_of_wrong(row)} for row in rows]
    return filled_table("Prediction sets", columns, rows)


def fake_of_wrong(row):
    """E.g. "4 of 10": 10 forget images are misclassified, and 4 of these keep their label."""
    forget = CR.forget_group(row)
    fake, wrong = (mean_of(row.get(f"{forget}_{key}")) for key in ("fake", "misclassified"))
    return f"{short_count(fake)} of {short_count(wrong)}"


def short_lines(rows, *, over_seeds=False):
    """The lines that an evaluation prints, of at most WIDTH characters.

    A table of the models, the reasons of failures, and a table of the prediction sets for each
    score, calibration size and α. Numbers are means. ``over_seeds`` adds the standard deviations
    over seeds: of all columns where they fit, else of UA, the gap and CR.
    """
    rows = rows if over_seeds else [means_of(row) for row in rows]
    lines = []
    models = short_model_table(rows)
    if models is not None:
        lines += [*lines_of(fit(models, ("UA", "gap"))), ""]
    notes = {row["method"]: row["note"] for row in rows if row.get("note")}
    if notes:
        lines += [*(f"{method}: {note}" for method, note in notes.items()), ""]
    for block in dict.fromkeys(map(block_of, rows_of_sets(rows))):
        score, cal_size, alpha = block
        title = f"alpha {alpha:g} (score {score}, {cal_size} calibration images)"
        table = short_set_table([row for row in rows if block_of(row) == block])
        if table is None:
            lines += [f"{title}: no finite q̂", ""]
        else:
            deciding = f"{CR.forget_group(table.rows[0])}_CR"
            lines += [title, *lines_of(fit(table, (deciding,))), ""]
    return lines


# ---------------------------------------------------------------- distributions over trainings


def ensemble_heading(count, seed):
    """The heading of the table of ``count`` trainings with one split seed."""
    return f"Over {count} trainings of one forget set (split seed {seed})"


def ensemble_lines(rows, heading):
    """The printed table of :func:`metrics.ensembles.rows`, with how small a p has to be."""
    columns = {key: column for key, column in ensembles.COLUMNS.items() if key not in REPORT_ONLY}
    key = "ULiRA_excess"
    rows = [row | {key: Spread(row.get(key), row.get(f"{key}_error"))} for row in rows]
    level = f"{0.05 / len(rows):.2g} (0.05 / {len(rows)} rows)"
    note = f"A method differs from Retrain if p is below {level}. ± is a standard error."
    return [f"{heading}:", *lines_of(filled_table(heading, columns, rows)), note]


# ---------------------------------------------------------------- tables as text


def heading_of(column):
    """The heading of a column, with % where its numbers are shown as percentages."""
    is_percent = column.kind == "percent" and not column.heading.endswith("%")
    return f"{column.heading} %" if is_percent else column.heading


def filled_table(heading, columns, rows):
    """The :class:`Table` of the columns that some row fills. None where no row has a number."""
    filled = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    numeric = [key for key, column in filled.items() if column.kind != "text"]
    if all(is_missing(mean_of(row.get(key))) for key in numeric for row in rows):
        return None
    return Table(heading, filled, rows)


def fit(table, deciding, width=WIDTH):
    """The table with as many standard deviations as fit into ``width`` characters.

    All columns show their deviations, or only those of ``deciding``, or none.
    """
    for kept in (table.columns, deciding, ()):
        rows = [
            {key: value if key in kept else mean_of(value) for key, value in row.items()}
            for row in table.rows
        ]
        fitted = replace(table, rows=rows)
        if len(lines_of(fitted)[0]) <= width:
            break
    return fitted


def lines_of(table):
    """The table as lines of text of equal length: the headings, then one line per row."""
    columns = table.columns
    cells = [[heading_of(column) for column in columns.values()]]
    for row in table.rows:
        cells.append([format_cell(row.get(key), columns[key].kind) for key in columns])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in cells
    ]


def print_table(columns, rows):
    """Print rows under their headings."""
    print("\n".join(lines_of(Table("", columns, rows))))


# ---------------------------------------------------------------- files


def flat(row, ending=RESPLITS):
    """A row with plain values for files, in which NaN is None. A :class:`Spread` becomes ``key``
    and ``key`` + ending, an :class:`Interval` becomes ``key``, ``key_low`` and ``key_high``.
    """
    cells = {}
    for key, value in row.items():
        cells[key] = mean_of(value)
        if isinstance(value, Spread):
            cells[key + ending] = value.std
        elif isinstance(value, Interval):
            cells |= {f"{key}_low": value.low, f"{key}_high": value.high}
    return {key: None if is_missing(value) else value for key, value in cells.items()}


def as_csv(rows, ending=RESPLITS):
    """Rows as the text of a CSV file, with the columns in the order of their first appearance."""
    cells = [flat(row, ending) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in cells for key in row)))
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()
