"""The report of an evaluation: one HTML file with everything in it, no network needed."""

import base64
import html
import io
import json
import math
import re
import warnings

DEFINITIONS = {
    "UA": "unlearning accuracy: share of the forget images that are misclassified",
    "RA": "retain accuracy: share of the retained training images that are classified as labelled",
    "TA": "test accuracy: the same on test images that nothing else used",
    "MIA": "share of the forget images that a membership attack (SVM on the label's confidence) calls non-members",
    "MIA_…": "the same attack on another feature: correctness, entropy, modified entropy, probabilities",
    "…_privacy": "accuracy of an attack on retained and held-out images that it was not trained on; 50 % is a coin",
    "AUC": "area under the ROC curve of telling forget images from test images by confidence; 0.5 cannot tell",
    "TPR@1%": "forget images recognised as training images while 1 % of the test images are taken for such",
    "q_hat": "threshold: the ⌈(n+1)(1−α)⌉-th smallest score of n calibration images",
    "Coverage": "share of images whose true label is in the prediction set",
    "Set Size": "mean number of labels in the prediction set",
    "CR": "Coverage divided by Set Size; low on forget images and high on test images is good",
    "theory": "mean coverage of exchangeable images by split conformal prediction, k / (n + 1), beta-binomial",
    "wrong, fake": "misclassified forget images; those of them whose true label is still in the set: fake forgetting",
    "CR_wrong": "CR over the misclassified forget images alone",
    "ECF@c, EuCF@d": "share of images covered by a set of at most c labels; share not covered by a set of at most d",
    "MIACR": "share of the forget images whose conformal set over {member, non-member} is exactly {non-member}",
    "gap": "mean absolute difference to Retrain over UA, RA, TA, MIA",
    "by UA, by CR": "whether a method forgets less than Retrain, as much, or more; as much is within Retrain's spread "
    "over seeds, or within two standard errors where there is one seed",
    "RTE": "running time as a share of Retrain's",
    "–": "not a number: too few images for a finite q̂ or for an attack, or an attack on a feature that does not differ",
    "±": "standard deviation over random divisions of the held-out images into calibration and test, or over seeds",
}
CSS = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#111;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .55rem;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap}
th{cursor:pointer;position:sticky;top:0;background:#f5f5f5}th:focus{outline:2px solid #0072B2}
th[aria-sort=ascending]::after{content:" ▲"}th[aria-sort=descending]::after{content:" ▼"}
tr.reference td{background:#eef5fb}td.text,th.text{text-align:left}.wide{overflow-x:auto;max-height:75vh}
img{max-width:100%;height:auto}dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}
dt{font-weight:600}dd{margin:0}.note{color:#555}
@media print{th{position:static}.wide{overflow:visible;max-height:none}}
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  const sort = (head, column) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = row => { const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
      const number = Number(text); return text === "" || Number.isNaN(number) ? text : number; };
    const rows = [...body.rows].sort((a, b) => { const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order; });
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column));
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head, column); });
  });
}
"""


def page(title, facts, tables, pictures, details):
    """The whole file as text, which is valid in UTF-8 whatever the names in it.

    ``facts`` is {name: value}, ``tables`` a list of (heading, columns {key: (heading, kind)}, rows, cell) where
    ``cell(row, key, kind)`` gives (text, value to sort by), ``pictures`` {caption: PNG bytes}, ``details`` {heading:
    object shown as JSON}.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", "<dl>"]
    parts += [f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()]
    parts.append("</dl>")
    for heading, columns, rows, cell in tables:
        parts.append(f"<h2>{html.escape(heading)}</h2><p class=note>Click a heading to sort.</p>")
        parts.append(table(columns, rows, cell))
    for caption, png in pictures.items():
        encoded = base64.b64encode(png).decode()
        text = html.escape(caption)
        parts.append(f'<h2>{text}</h2><img alt="{text}" src="data:image/png;base64,{encoded}">')
    parts += ["<h2>What the numbers mean</h2><dl>"]
    parts += [f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in DEFINITIONS.items()]
    parts.append("</dl>")
    for heading, content in details.items():
        shown = html.escape(json.dumps(content, indent=2, ensure_ascii=False, default=str))
        parts.append(f"<details><summary>{html.escape(heading)}</summary><pre>{shown}</pre></details>")
    return valid_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n<body>'
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def valid_text(text):
    """Text that HTML and UTF-8 allow: control codes become �, and the bytes of names that are not UTF-8 escapes."""
    control = "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f]"
    return re.sub(control, "\ufffd", text).encode("utf-8", "backslashreplace").decode()


def table(columns, rows, cell):
    """A sortable table; the row of Retrain is marked."""
    parts = ['<div class=wide><table class="sortable"><thead><tr>']
    kinds = {key: " class=text" if kind == "text" else "" for key, (_, kind) in columns.items()}
    parts += [f"<th{kinds[key]} scope=col>{html.escape(heading)}</th>" for key, (heading, _) in columns.items()]
    parts.append("</tr></thead><tbody>")
    for row in rows:
        parts.append("<tr class=reference>" if row.get("method") == "retrain" else "<tr>")
        for key, (_, kind) in columns.items():
            text, value = cell(row, key, kind)
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            shown = html.escape("" if missing else str(value))
            parts.append(f'<td{kinds[key]} data-value="{shown}">{html.escape(text)}</td>')
        parts.append("</tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def png(figure):
    """A figure as PNG bytes. The same figure gives the same bytes: no date is written into it.

    Characters that no font on this machine has are boxes, without warnings.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from|constrained_layout not applied", UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
