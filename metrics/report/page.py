"""The report of an evaluation: one HTML file that needs no network."""

import base64
import html
import io
import json
import warnings
from pathlib import Path

from . import tables

NOTATION = {
    tables.MISSING: "no number: too few images for a finite q̂ or for an attack, or an attack on a "
    "feature that is the same for members and non-members",
    "±": "standard deviation over random calibration/test resplits, or over seeds",
    "Δ": "the method's number minus Retrain's [95 % interval]",
}
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def page(title, *, facts, shown_tables, pictures, details):
    """The report as text. It is valid UTF-8 for any names in it.

    ``facts`` is {name: value}, ``shown_tables`` a list of :class:`metrics.report.tables.Table`,
    ``pictures`` {caption: PNG bytes}, and ``details`` {heading: object to show as JSON}. A list
    below the pictures defines each column.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", definition_list(facts)]
    for shown in shown_tables:
        parts.append(f"<h2>{html.escape(shown.heading)}</h2>")
        parts.append("<p class=note>Click a heading to sort.</p>")
        parts.append(table(shown.columns, shown.rows))
    for caption, content in pictures.items():
        text, encoded = html.escape(caption), base64.b64encode(content).decode()
        parts.append(f'<h2>{text}</h2><img alt="{text}" src="data:image/png;base64,{encoded}">')
    parts += ["<h2>What the numbers mean</h2>", definition_list(meanings(shown_tables))]
    for heading, content in details.items():
        text = html.escape(json.dumps(content, indent=2, ensure_ascii=False, default=str))
        summary = f"<summary>{html.escape(heading)}</summary>"
        parts.append(f"<details>{summary}<pre>{text}</pre></details>")
    head = (
        f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>\n{STYLE}</style>'
    )
    body = "\n".join([*parts, f"<script>\n{SCRIPT}</script>"])
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    return text.encode("utf-8", "backslashreplace").decode()


def meanings(shown_tables):
    """{heading: meaning} of every column that says what it means, and of the notation."""
    columns = [column for shown in shown_tables for column in shown.columns.values()]
    described = {tables.heading_of(column): column.meaning for column in columns if column.meaning}
    return described | NOTATION


def definition_list(items):
    """{term: description} as HTML."""
    entries = [
        f"<dt>{html.escape(str(term))}</dt><dd>{html.escape(str(description))}</dd>"
        for term, description in items.items()
    ]
    return "\n".join(["<dl>", *entries, "</dl>"])


def table(columns, rows):
    """A sortable table. The row of Retrain is marked. Cells carry the values to sort by."""
    classes = {key: " class=text" * (column.kind == "text") for key, column in columns.items()}
    headings = [
        f"<th{classes[key]} scope=col>{html.escape(tables.heading_of(column))}</th>"
        for key, column in columns.items()
    ]
    parts = ['<table class="sortable"><thead><tr>', *headings, "</tr></thead><tbody>"]
    for row in rows:
        parts.append("<tr class=reference>" if row.get("method") == "retrain" else "<tr>")
        for key, column in columns.items():
            text = html.escape(tables.format_cell(row.get(key), column.kind))
            mean = tables.mean_of(row.get(key))
            value = html.escape("" if tables.is_missing(mean) else str(mean))
            parts.append(f'<td{classes[key]} data-value="{value}">{text}</td>')
        parts.append("</tr>")
    return f"<div class=wide>{''.join(parts)}</tbody></table></div>"


def png(figure):
    """A figure as PNG bytes, without a date. Characters that no font has are drawn as boxes."""
    buffer = io.BytesIO()
    expected = "Glyph .* missing from|constrained_layout not applied"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", expected, UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
