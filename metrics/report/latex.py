"""The printed tables as LaTeX, with the rules of the booktabs package."""

from . import tables
from .tables import block_of, format_cell, heading_of, is_missing, mean_of

REFERENCES = ("original", "retrain")  # never marked as best
ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "±": r" $\pm$ ",
    tables.MISSING: "--",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}


def document(rows):
    """results.tex: the table of the models, and that of the prediction sets at the first α.

    ``rows`` are those of results.csv. In each column, the method nearest to Retrain is bold.
    """
    first = [row for row in rows if block_of(row) == block_of(rows[0])]
    shown = {
        "Models": tables.short_model_table(rows),
        f"Prediction sets, α = {rows[0]['alpha']:g}": tables.short_set_table(first),
    }
    parts = ["% requires \\usepackage{booktabs}"]
    parts += [f"% {name}\n{tabular(table)}" for name, table in shown.items() if table is not None]
    return "\n\n".join(parts) + "\n"


def tabular(table):
    """A :class:`metrics.report.tables.Table` as a tabular environment."""
    columns = table.columns
    nearest = {key: nearest_to_retrain(table.rows, key) for key in columns}
    alignment = "".join("l" if column.kind == "text" else "r" for column in columns.values())
    lines = [f"\\begin{{tabular}}{{{alignment}}}", "\\toprule"]
    lines += [_row(escape(heading_of(column)) for column in columns.values()), "\\midrule"]
    for row in table.rows:
        cells = []
        for key, column in columns.items():
            cell = escape(format_cell(row.get(key), column.kind))
            cells.append(f"\\textbf{{{cell}}}" if row["method"] in nearest[key] else cell)
        lines.append(_row(cells))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _row(cells):
    return f"{' & '.join(cells)} \\\\"


def nearest_to_retrain(rows, key):
    """The methods whose number is nearest to Retrain's, without original and Retrain.

    Empty for a column of texts and where Retrain has no number.
    """
    values = {row["method"]: mean_of(row.get(key)) for row in rows}
    target = values.get("retrain")
    if is_missing(target) or isinstance(target, str) or key == "seconds":
        return []
    known = [name for name in values if name not in REFERENCES and not is_missing(values[name])]
    distances = {name: abs(values[name] - target) for name in known}
    return [name for name in known if distances[name] == min(distances.values())]


def escape(text):
    """Escape the characters that LaTeX treats specially."""
    return "".join(ESCAPES.get(character, character) for character in text)
