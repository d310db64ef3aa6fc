"""Tables: summaries over seeds, printing, and CSV files that a later evaluation reads back.

A row is a dict from column keys to values. A value is a number, a :class:`metrics.columns.Spread`
(a number and its standard deviation), a text, or None. ``columns`` is a dict from column keys to
:class:`metrics.columns.Column`, in the order in which a table shows them.
"""

import csv
import io
import itertools
import math
import os
from dataclasses import dataclass

import numpy as np

from .. import CR, columns_of, ensembles
from ..columns import RUN_COLUMNS, Column, Spread

KEYS = ("score", "cal_size", "alpha", "method")  # what one row of results.csv is about
WIDTH = 100  # characters of a printed line, where no method's name is longer than 16
MISSING = "–"
RESPLITS, SEEDS = "_resplit_std", "_std"  # how a file names the column of a standard deviation

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


def _model_columns():
    """{key: Column} of the numbers of a model as a whole, in the order of the table."""
    columns = {"method": RUN_COLUMNS["method"]} | columns_of("COLUMNS")
    efficiency = {"RTE": columns.pop("RTE")}
    last = ("changed", "seconds", "time_ratio", "peak_memory", "memory_ratio", "note")
    return columns | efficiency | {key: RUN_COLUMNS[key] for key in last}


def _set_columns():
    """{key: Column} of the numbers of prediction sets, in the order of the table."""
    return {key: RUN_COLUMNS[key] for key in KEYS} | columns_of("ROW_COLUMNS")


MODEL_COLUMNS = _model_columns()
SET_COLUMNS = _set_columns()
SHORT_MODEL_KEYS = ("method", "UA", "RA", "TA", "MIA", "gap", "UA_word", "seconds")
FAKE_OF_WRONG = Column("fake of wrong", "text", "near Retrain", "fake-forgotten of misclassified")


# ---------------------------------------------------------------- values


def is_missing(value):
    """Whether a value is unknown: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def mean_of(value):
    """The mean of a :class:`Spread`. Any other value is returned unchanged."""
    return value.mean if isinstance(value, Spread) else value


def means_of(row):
    """A row without standard deviations."""
    return {key: mean_of(value) for key, value in row.items()}


def format_cell(value, kind):
    """A value as a table shows it: ``mean±std`` for a :class:`Spread` with a known deviation.

    ``kind`` is percent, number, count, seconds or text.
    """
    mean = mean_of(value)
    if is_missing(mean):
        return MISSING
    if isinstance(value, Spread) and not is_missing(value.std):
        return f"{FORMATS[kind](mean)}±{FORMATS[kind](value.std)}"
    return FORMATS[kind](mean)


def short_count(count):
    """A count, or the mean of counts, in few characters: 5, 2.2, 1234."""
    if count is None or not math.isfinite(count):
        return MISSING
    return f"{count:.0f}" if count == round(count) or count >= 100 else f"{count:.1f}"


def summarise(rows, columns, keys):
    """One row for all rows that agree in ``keys``, with the mean and deviation over these rows.

    A number becomes a :class:`Spread`. A number that already has a spread over resplits enters
    with its mean. Different texts are joined. A count or text that all rows agree on is kept, and
    a single row keeps its means.
    """
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(means_of(row))
    summary = []
    for group in groups.values():
        merged = dict(group[0])
        names = dict.fromkeys(name for row in group for name in row if name not in keys)
        for name in names if len(group) > 1 else ():
            known = [row[name] for row in group if not is_missing(row.get(name))]
            numeric = all(isinstance(value, int | float) for value in known)
            default = "number" if numeric else "text"
            kind = columns[name].kind if name in columns else default
            if kind == "text" or (kind == "count" and len(set(known)) == 1):
                merged[name] = _joined(known)
            elif known:
                merged[name] = _spread(known)
        summary.append(merged)
    return summary


def _joined(values):
    """The value that all agree on, or the different ones as one text. None without values."""
    different = dict.fromkeys(values)
    if len(different) <= 1:
        return next(iter(different), None)
    return "; ".join(dict.fromkeys(map(str, different)))


def _spread(values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), deviation)


# ---------------------------------------------------------------- the tables of an evaluation


def full_tables(rows):
    """The :class:`Table` of the models and that of their prediction sets, with every column.

    ``rows`` are those of results.csv. A table in which no row has a number is left out, as is a
    column that no row fills, and a score or calibration size that all rows share.
    """
    models = filled_table("Models", MODEL_COLUMNS, one_per_method(rows))
    sets = filled_table("Prediction sets", SET_COLUMNS, rows_of_sets(rows))
    if sets is not None:
        sets = without_constant(sets, ("score", "cal_size"))
    return [table for table in (models, sets) if table is not None]


def one_per_method(rows):
    """The last row of each method."""
    return list({row["method"]: row for row in rows}.values())


def rows_of_sets(rows):
    """The rows with prediction sets: those of methods that did not fail."""
    return [row for row in rows if "q_hat" in row]


def short_lines(rows, *, over_seeds=False):
    """The lines that an evaluation prints, of at most WIDTH characters.

    A table of the models, the reasons of failures, and a table of the prediction sets for each
    score, calibration size and α. Numbers are means. ``over_seeds`` adds the standard deviations
    over seeds: of all columns where they fit, else of the columns that decide the verdicts.
    """
    rows = rows if over_seeds else [means_of(row) for row in rows]
    lines = []
    models = short_model_table(rows)
    if models is not None:
        lines += [*lines_of(fit(models, ("UA", "gap"))), ""]
    lines += failure_lines(rows)
    return lines + _short_set_lines(rows_of_sets(rows))


def failure_lines(rows):
    """One line per failed method, and an empty line after them."""
    notes = {row["method"]: row["note"] for row in rows if row.get("note")}
    lines = [f"{method}: {note}" for method, note in notes.items()]
    return [*lines, ""] if lines else []


def _short_set_lines(rows):
    """A block of lines for each score, calibration size and α, with common column widths."""
    table = short_set_table(rows)
    if table is None:
        return []
    judged = CR.judged_forget_images(table.rows[0])
    headings, *lines = lines_of(fit(table, (f"{judged}_CR",)))
    blocks, known = {}, set()
    for row, line in zip(table.rows, lines, strict=True):
        key = tuple(row[key] for key in KEYS[:-1])
        blocks.setdefault(key, []).append(line)
        if has_number(table.columns, row):
            known.add(key)
    printed = []
    for key, block in blocks.items():
        score, cal_size, alpha = key
        title = f"alpha {alpha:g} (score {score}, {cal_size} calibration images)"
        printed += [title, headings, *block, ""] if key in known else [f"{title}: no finite q̂", ""]
    return printed


def short_model_table(rows):
    """The :class:`Table` of the models with the columns that an evaluation prints, or None."""
    columns = {key: MODEL_COLUMNS[key] for key in SHORT_MODEL_KEYS}
    return filled_table("Models", columns, one_per_method(rows))


def short_set_table(rows):
    """The :class:`Table` of the prediction sets with the columns that an evaluation prints."""
    rows = [row | {"fake_of_wrong": _fake_of_wrong(row)} for row in rows_of_sets(rows)]
    judged = CR.judged_forget_images(rows[0]) if rows else "forget"
    columns = {key: SET_COLUMNS[key] for key in _short_set_keys(judged)}
    columns |= {"fake_of_wrong": FAKE_OF_WRONG, "CR_word": SET_COLUMNS["CR_word"]}
    return filled_table("Prediction sets", columns, rows)


def _short_set_keys(judged):
    forget = (f"{judged}_coverage", f"{judged}_set_size", f"{judged}_CR")
    return ("method", *forget, "test_coverage", "test_CR")


def _fake_of_wrong(row):
    """E.g. "4 of 10": misclassified forget images, and how many of them keep their label."""
    judged = CR.judged_forget_images(row)
    fake, wrong = (mean_of(row.get(f"{judged}_{key}")) for key in ("fake", "misclassified"))
    return f"{short_count(fake)} of {short_count(wrong)}"


# ---------------------------------------------------------------- distributions over trainings


def ensemble_heading(count, seed):
    """The heading of the table of ``count`` trainings with one split seed."""
    return f"Over {count} trainings of one forget set (split seed {seed})"


def ensemble_table(rows, heading):
    """The :class:`Table` of the rows of :func:`metrics.ensembles.rows`."""
    return filled_table(heading, ensembles.COLUMNS, rows)


def ensemble_lines(rows, heading):
    """The printed table of :func:`metrics.ensembles.rows`. Numbers within the noise have a star."""
    table = ensemble_table(rows, heading)
    columns = {key: table.columns[key] for key in table.columns if key != "within_noise"}
    shown = []
    for row in rows:
        near = row.get("within_noise", "–").split(", ")
        cells = {}
        for key, column in columns.items():
            star = "*" if near == ["all"] or column.heading in near else ""
            known = key not in ("method", "trainings") and not is_missing(row.get(key))
            cells[key] = format_cell(row.get(key), column.kind) + star * known
        shown.append(cells)
    texts = {key: Column(heading_of(column), "text") for key, column in columns.items()}
    lines = [f"{heading}:", *lines_of(Table(heading, texts, shown))]
    if any("*" in text for cells in shown for text in cells.values()):
        lines.append("* no farther than the first half of Retrain's trainings from the second")
    return lines


# ---------------------------------------------------------------- tables


def heading_of(column):
    """The heading of a column, with % where its numbers are shown as percentages."""
    is_percent = column.kind == "percent" and not column.heading.endswith("%")
    return f"{column.heading} %" if is_percent else column.heading


def filled_table(heading, columns, rows):
    """The :class:`Table` of the columns that some row fills. None where no row has a number."""
    filled = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    if not any(has_number(filled, row) for row in rows):
        return None
    return Table(heading, filled, rows)


def has_number(columns, row):
    """Whether a row has a number in one of the columns."""
    numeric = [key for key, column in columns.items() if column.kind != "text"]
    return any(not is_missing(mean_of(row.get(key))) for key in numeric)


def without_constant(table, keys):
    """The table without those columns of ``keys`` that have one value in all rows."""
    constant = [key for key in keys if len({row.get(key) for row in table.rows}) == 1]
    columns = {key: column for key, column in table.columns.items() if key not in constant}
    return Table(table.heading, columns, table.rows)


def fit(table, deciding, width=WIDTH):
    """The table with as many standard deviations as ``width`` characters hold.

    All columns show their deviations, or only those of ``deciding``, or none.
    """
    for kept in (table.columns, deciding, ()):
        rows = [
            {key: value if key in kept else mean_of(value) for key, value in row.items()}
            for row in table.rows
        ]
        fitted = Table(table.heading, table.columns, rows)
        if len(lines_of(fitted)[0]) <= width:
            break
    return fitted


def lines_of(table):
    """The table as lines of text of equal length: the headings, then one line per row."""
    cells = [[heading_of(column) for column in table.columns.values()]]
    for row in table.rows:
        cells.append(
            [format_cell(row.get(key), column.kind) for key, column in table.columns.items()]
        )
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
    """A row with plain values for files. A :class:`Spread` becomes ``key`` and ``key`` + ending."""
    cells = {}
    for key, value in row.items():
        cells[key] = mean_of(value)
        if isinstance(value, Spread):
            cells[key + ending] = value.std
    return cells


def without_nan(row):
    """A row as CSV and wandb have it: NaN is an empty cell."""
    return {key: None if is_missing(value) else value for key, value in row.items()}


def as_csv(rows, ending=RESPLITS):
    """Rows as the text of a CSV file, with the columns in the order of their first appearance."""
    cells = [without_nan(flat(row, ending)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in cells for key in row)))
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def read_csv(path, texts):
    """The rows of a file that :func:`as_csv` wrote, with numbers as numbers. → (column keys, rows)

    ``texts`` names the columns that hold text. Where a row has a text in its column ``note``, the
    method has failed, and the empty cells of its row are left out. Other empty cells are NaN.
    Raises OSError, and ValueError or csv.Error for a file that is not such a table.
    """
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = [*csv.reader(file, strict=True)] or [[]]
    if any(len(line) != len(header) for line in lines):
        raise ValueError("its lines differ in length")
    return header, [_typed(dict(zip(header, line, strict=True)), texts) for line in lines]


def _typed(cells, texts):
    """A row from texts. Raises ValueError for a cell that is not a number."""
    failed = bool(cells.get("note"))
    row = {}
    for key, text in cells.items():
        if not text and (failed or key in texts):
            continue
        row[key] = text if key in texts else _number(text, key)
    for key in [key for key in row if key + RESPLITS in row]:
        row[key] = Spread(row[key], row.pop(key + RESPLITS))
    return row


def _number(text, key):
    if text in ("True", "False"):
        return text == "True"
    if text.lstrip("-").isdecimal() and key != "alpha":
        return int(text)
    return float(text or "nan")


def read_earlier(path, needed, texts, replaced=()):
    """The rows of the table that an earlier evaluation left at ``path``. [] where there is none.

    A file that lacks a column of ``needed``, or is not a table, is renamed and reported. It stays
    where it is if all of its methods are in ``replaced``, since the new table overwrites it.
    """
    if not os.path.lexists(path):
        return []
    try:
        header, rows = read_csv(path, texts)
        absent = [key for key in needed if key not in header]
        if not absent:
            return rows
        if "method" in header and {row["method"] for row in rows} <= set(replaced):
            return []
        _set_aside(path, f"no column {absent[0]}")
    except (OSError, ValueError, csv.Error) as error:
        _set_aside(path, error)
    return []


def _set_aside(path, reason):
    """Rename a file that is not a table of this version to a free name."""
    numbers = itertools.chain([""], itertools.count(2))
    names = (path.with_name(f"{path.name}.old{number}") for number in numbers)
    free = next(name for name in names if not os.path.lexists(name))
    path.rename(free)
    print(f"{path}: not a table of this version ({reason}); renamed to {free.name}")
