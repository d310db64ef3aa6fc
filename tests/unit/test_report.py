"""The HTML report: a browser shows its input unchanged, for any text."""

import base64
import io
import json
import math
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies
from matplotlib.figure import Figure
from PIL import Image

from metrics import Column, Spread
from metrics.report import page
from metrics.report.tables import Table

ANY_TEXT = strategies.text(strategies.characters(exclude_categories=()), max_size=20)


class Page(HTMLParser):
    """The elements of a page in order: tag, attributes and the text directly inside."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "inside": list(self._open)} | dict(attributes)
        self.elements.append(element)
        if tag not in ("meta", "img"):
            self._open.append(tag)
            self._last = element

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._last = {"text": ""}

    def handle_data(self, data):
        if self._open:
            self._last["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def texts(self, tag):
        return [element["text"] for element in self.all(tag)]


COLUMNS = {
    "method": Column("method", "text"),
    "UA": Column("UA <x>", "percent", meaning="share of <b>wrong</b> answers"),
}
ROWS = [
    {"method": "original", "UA": Spread(0.25, 0.1)},
    {"method": "retrain", "UA": math.nan},
    {"method": "ga"},
]


def make_page(title="title", facts=None, rows=ROWS, pictures=None, details=None):
    return page.page(
        title,
        facts=facts or {},
        shown_tables=[Table("Models", COLUMNS, rows)],
        pictures=pictures or {},
        details=details or {},
    )


def test_page_shows_all_tables_facts_and_pictures():
    png = b"\x89PNG not a picture"
    details = {"Flags": {"alpha": 0.1, "path": io}, "Versions": {"torch": "猫"}}
    facts = {"data": "digits", "images": 5}
    made = make_page("A & B", facts, pictures={"Caption <1>": png}, details=details)
    parsed = Page(made)
    assert parsed.texts("title") == parsed.texts("h1") == ["A & B"]
    defined = dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=True))
    meanings = {"UA <x> %": "share of <b>wrong</b> answers"} | page.NOTATION
    assert defined == {"data": "digits", "images": "5"} | meanings and "±" in meanings
    assert parsed.texts("h2") == ["Models", "Caption <1>", "What the numbers mean"]
    assert "sort" in parsed.texts("p")[0]
    (image,) = parsed.all("img")
    assert image["alt"] == "Caption <1>"
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == png
    assert parsed.texts("summary") == ["Flags", "Versions"]
    first, second = map(json.loads, parsed.texts("pre"))
    assert first == {"alpha": 0.1, "path": str(io)} and second == {"torch": "猫"}
    assert parsed.texts("pre")[1] == '{\n  "torch": "猫"\n}'
    assert parsed.all("meta")[0]["charset"] == "utf-8" and parsed.all("html")[0]["lang"] == "en"
    assert made.startswith("<!DOCTYPE html>\n<html")


def test_page_contains_its_style_and_script():
    parsed, folder = Page(make_page()), Path(page.__file__).parent
    assert parsed.texts("style")[0].strip() == (folder / "page.css").read_text().strip()
    assert parsed.texts("script")[0].strip() == (folder / "page.js").read_text().strip()
    assert "table.sortable" in parsed.texts("script")[0]


def test_columns_without_a_meaning_are_not_defined():
    assert list(page.meanings([Table("", COLUMNS, [])])) == ["UA <x> %", *page.NOTATION]
    assert page.meanings([]) == page.NOTATION


def test_table_marks_retrain_and_carries_the_values_to_sort_by():
    parsed = Page(page.table(COLUMNS, ROWS))
    heads, rows, cells = parsed.all("th"), parsed.all("tr")[1:], parsed.all("td")
    assert [head["text"] for head in heads] == ["method", "UA <x> %"]
    assert [head.get("class") for head in heads] == ["text", None]
    assert all(head["scope"] == "col" for head in heads)
    assert [row.get("class") for row in rows] == [None, "reference", None]
    assert [item["text"] for item in cells] == ["original", "25.0±10.0", "retrain", "–", "ga", "–"]
    assert [item["data-value"] for item in cells] == ["original", "0.25", "retrain", "", "ga", ""]
    assert [item.get("class") for item in cells] == ["text", None] * 3
    assert all("thead" in head["inside"] for head in heads)
    assert all("tbody" in item["inside"] for item in cells)
    assert parsed.all("table")[0]["class"] == "sortable" and parsed.all("div")[0]["class"] == "wide"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ANY_TEXT)
@example("caf\udce9 \x00\x1b\x7f\x85 & <b> \"quoted\" '猫'")
@example("</pre></table><script>alert(1)</script>")
@example("two\nlines\ttab")
def test_text_of_any_characters_is_shown_and_nothing_else(text):
    def made(text, details):
        rows = [{"method": text, "UA": 0.5}, {"method": text, "UA": None}]
        return make_page(text, {text: text}, rows, {text: b""}, {text: details})

    assert made(text, {text: text}).encode()
    parsed, ordinary = Page(made(text, {text: text})), Page(made("t", {}))
    tags = [element["tag"] for element in parsed.elements]
    assert tags == [element["tag"] for element in ordinary.elements]

    # An HTML parser turns each line end into one character and keeps the rest.
    def one_line_end(text):
        return text.replace("\r\n", "\n").replace("\r", "\n")

    shown = one_line_end(page.valid_text(text))
    elements = [parsed.texts("h1")[0], parsed.texts("h2")[1], parsed.texts("td")[0]]
    elements += [parsed.texts("dt")[0], parsed.texts("dd")[0], parsed.all("td")[0]["data-value"]]
    assert [one_line_end(element) for element in elements] == [shown] * 6


def test_valid_text_by_hand():
    expected = {
        "é猫\t\n\r ~\u00a0": "é猫\t\n\r ~\u00a0",
        "\x00\x08\x0b\x0c\x0e\x1f\x7f\x80\x9f": "\ufffd" * 9,
        "caf\udce9": "caf\\udce9",
    }
    assert {text: page.valid_text(text) for text in expected} == expected


# ---------------------------------------------------------------- pictures


def one_figure(text=""):
    figure = Figure(figsize=(1, 1), dpi=50)
    figure.text(0.5, 0.5, text)
    return figure


def test_png_shows_the_figure_and_is_reproducible():
    first, again = (page.png(one_figure("a")) for _ in range(2))
    assert first == again and first != page.png(one_figure("b"))
    image = Image.open(io.BytesIO(first))
    assert image.format == "PNG" and image.size == (50, 50) and "Software" not in image.info


def test_missing_glyphs_do_not_warn_but_other_faults_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page.png(one_figure("猫"))
        cramped = Figure(figsize=(0.1, 0.1), dpi=50, layout="constrained")
        cramped.subplots(3, 3)
        page.png(cramped)

    class Warns(Figure):
        def savefig(self, *arguments, **options):
            warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        page.png(Warns())
