"""The report of an evaluation: one HTML file that needs no network."""

import base64
import html
import io
import json
import re
import warnings
from pathlib import Path

from . import tables

NOTATION = {
    tables.MISSING: "no number: too few images for a finite q̂ or for an attack, or an attack on a "
    "feature that is the same for members and non-members",
    "±": "standard deviation over random calibration/test resplits, or over seeds",
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
    parts += [picture(caption, content) for caption, content in pictures.items()]
    parts += ["<h2>What the numbers mean</h2>", definition_list(meanings(shown_tables))]
    parts += [detail(heading, content) for heading, content in details.items()]
    head = (
        f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>\n{STYLE}</style>'
    )
    body = "\n".join([*parts, f"<script>\n{SCRIPT}</script>"])
    return valid_text(
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    )


def meanings(shown_tables):
    """{heading: meaning} of every column that says what it means, and of the notation."""
    columns = [column for shown in shown_tables for column in shown.columns.values()]
    described = [column for column in columns if column.meaning]
    return {tables.heading_of(column): column.meaning for column in described} | NOTATION


def definition_list(items):
    """{term: description} as HTML."""
    entries = [
        f"<dt>{html.escape(str(term))}</dt><dd>{html.escape(str(description))}</dd>"
        for term, description in items.items()
    ]
    return "\n".join(["<dl>", *entries, "</dl>"])


def picture(caption, content):
    """A PNG inside the page, under its caption."""
    text = html.escape(caption)
    encoded = base64.b64encode(content).decode()
    return f'<h2>{text}</h2><img alt="{text}" src="data:image/png;base64,{encoded}">'


def detail(heading, content):
    """An object as JSON that a click on the heading unfolds."""
    text = html.escape(json.dumps(content, indent=2, ensure_ascii=False, default=str))
    return f"<details><summary>{html.escape(heading)}</summary><pre>{text}</pre></details>"


def table(columns, rows):
    """A sortable table. The row of Retrain is marked."""
    parts = ['<div class=wide><table class="sortable"><thead><tr>']
    kinds = {key: _class_of(column) for key, column in columns.items()}
    for key, column in columns.items():
        parts.append(f"<th{kinds[key]} scope=col>{html.escape(tables.heading_of(column))}</th>")
    parts.append("</tr></thead><tbody>")
    for row in rows:
        parts.append("<tr class=reference>" if row.get("method") == "retrain" else "<tr>")
        for key, column in columns.items():
            text = html.escape(tables.format_cell(row.get(key), column.kind))
            value = tables.mean_of(row.get(key))
            value = html.escape("" if tables.is_missing(value) else str(value))
            parts.append(f'<td{kinds[key]} data-value="{value}">{text}</td>')
        parts.append("</tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def _class_of(column):
    return " class=text" if column.kind == "text" else ""


def valid_text(text):
    """Text that HTML and UTF-8 allow.

    Control codes become �, and the bytes of names that are not UTF-8 become escapes.
    """
    control = "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f]"
    return re.sub(control, "\ufffd", text).encode("utf-8", "backslashreplace").decode()


def png(figure):
    """A figure as PNG bytes. The same figure gives the same bytes: they hold no date.

    Characters that no installed font has are drawn as boxes, without a warning.
    """
    buffer = io.BytesIO()
    expected = "Glyph .* missing from|constrained_layout not applied"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", expected, UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
