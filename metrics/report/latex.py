"""The printed tables as LaTeX, with the rules of the booktabs package."""

import math

from ..columns import Spread
from ..comparison import SECOND_RETRAIN
from .tables import FORMATS, MISSING, heading_of, is_missing, mean_of, short_model_table
from .tables import short_set_table as set_table

REFERENCES = ("original", "retrain", SECOND_RETRAIN)  # never marked as best
ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "q̂": r"$\hat{q}$",
    "α": r"$\alpha$",
    "′": "$'$",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}


def document(rows):
    """results.tex: the table of the models, and that of the prediction sets at the first α.

    ``rows`` are those of results.csv. Of each column, the method nearest to Retrain is bold.
    """
    first = [row for row in rows if row["alpha"] == rows[0]["alpha"]]
    first = [row for row in first if row["score"] == rows[0]["score"]]
    first = [row for row in first if row["cal_size"] == rows[0]["cal_size"]]
    parts = ["% requires \\usepackage{booktabs}"]
    shown = (("Models", short_model_table(rows)), ("Prediction sets", set_table(first)))
    for name, table in shown:
        if table is not None:
            details = f", α = {first[0]['alpha']:g}" if name == "Prediction sets" else ""
            parts.append(f"% {name}{details}\n{tabular(table)}")
    return "\n\n".join(parts) + "\n"


def tabular(table):
    """A :class:`metrics.report.tables.Table` as a tabular environment."""
    best = {key: nearest_to_retrain(table.rows, key) for key in table.columns}
    lines = [
        f"\\begin{{tabular}}{{{''.join(_alignment(column) for column in table.columns.values())}}}",
        "\\toprule",
        _row(escape(heading_of(column)) for column in table.columns.values()),
        "\\midrule",
    ]
    for row in table.rows:
        cells = []
        for key, column in table.columns.items():
            text = cell(row.get(key), column.kind)
            cells.append(f"\\textbf{{{text}}}" if row["method"] in best[key] else text)
        lines.append(_row(cells))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def nearest_to_retrain(rows, key):
    """The methods whose number is nearest to Retrain's, without original and Retrain.

    Empty for a column of texts and where Retrain has no number.
    """
    numbers = {row["method"]: mean_of(row.get(key)) for row in rows}
    numbers = {
        method: value
        for method, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    if "retrain" not in numbers or key == "seconds":
        return []
    distances = {
        method: abs(value - numbers["retrain"])
        for method, value in numbers.items()
        if method not in REFERENCES
    }
    return [method for method, value in distances.items() if value == min(distances.values())]


def cell(value, kind):
    """A value as LaTeX; a :class:`metrics.columns.Spread` with its deviation behind ±."""
    mean = mean_of(value)
    if is_missing(mean):
        return escape(MISSING)
    text = escape(FORMATS[kind](mean))
    if isinstance(value, Spread) and not is_missing(value.std):
        text += f" $\\pm$ {FORMATS[kind](value.std)}"
    return text


def escape(text):
    """Escape the characters that LaTeX treats specially."""
    text = text.replace("q̂", "\0")  # two characters, of which the second is an accent
    return "".join(ESCAPES.get(character, character) for character in text).replace(
        "\0", ESCAPES["q̂"]
    )


def _alignment(column):
    return "l" if column.kind == "text" else "r"


def _row(cells):
    return f"{' & '.join(cells)} \\\\"
