"""The HTML report: what a browser shows is what was given, for any text."""

import base64
import io
import json
import math
import warnings
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings, strategies
from matplotlib.figure import Figure
from PIL import Image

from metrics import html_report

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


COLUMNS = {"method": ("method", "text"), "UA": ("UA <%>", "percent")}
ROWS = [{"method": "original", "UA": 0.25}, {"method": "retrain", "UA": math.nan}, {"method": "ga"}]


def cell(row, key, kind):
    value = row.get(key)
    return f"{value} ({kind})", value


def make_page(title="title", facts=None, rows=ROWS, pictures=None, details=None):
    return html_report.page(title, facts or {}, [("Models", COLUMNS, rows, cell)], pictures or {}, details or {})


def test_page_shows_everything_that_it_is_given():
    png = b"\x89PNG not a picture"
    details = {"Flags": {"alpha": 0.1, "path": io}, "Versions": {"torch": "猫"}}
    page = Page(make_page("A & B", {"data": "digits", "images": 5}, pictures={"Caption <1>": png}, details=details))
    assert page.texts("title") == page.texts("h1") == ["A & B"]
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert list(facts.items())[:2] == [("data", "digits"), ("images", "5")]
    assert {key: facts[key] for key in html_report.DEFINITIONS} == html_report.DEFINITIONS and len(facts) == 2 + len(
        html_report.DEFINITIONS
    )
    assert page.texts("h2") == ["Models", "Caption <1>", "What the numbers mean"]
    assert "sort" in page.texts("p")[0]
    (image,) = page.all("img")
    assert image["alt"] == "Caption <1>"
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == png
    assert page.texts("summary") == ["Flags", "Versions"]
    first, second = map(json.loads, page.texts("pre"))
    assert first == {"alpha": 0.1, "path": str(io)} and second == {"torch": "猫"}
    assert page.texts("pre")[1] == '{\n  "torch": "猫"\n}'
    assert page.all("meta")[0]["charset"] == "utf-8" and page.all("html")[0]["lang"] == "en"
    assert html_report.SCRIPT in page.texts("script")[0] and page.texts("style") == [html_report.CSS]
    assert make_page().startswith("<!DOCTYPE html>\n<html")


def test_table_marks_retrain_and_carries_the_values_to_sort_by():
    page = Page(html_report.table(COLUMNS, ROWS, cell))
    heads, rows, cells = page.all("th"), page.all("tr")[1:], page.all("td")
    assert [head["text"] for head in heads] == ["method", "UA <%>"]
    assert [head.get("class") for head in heads] == ["text", None] and all(head["scope"] == "col" for head in heads)
    assert [row.get("class") for row in rows] == [None, "reference", None]
    assert [one["text"] for one in cells] == [
        "original (text)", "0.25 (percent)", "retrain (text)", "nan (percent)", "ga (text)", "None (percent)",
    ]  # fmt: skip
    assert [one["data-value"] for one in cells] == ["original", "0.25", "retrain", "", "ga", ""]
    assert [one.get("class") for one in cells] == ["text", None] * 3
    assert all("thead" in head["inside"] for head in heads) and all("tbody" in one["inside"] for one in cells)
    assert page.all("table")[0]["class"] == "sortable" and page.all("div")[0]["class"] == "wide"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ANY_TEXT)
@example("caf\udce9 \x00\x1b\x7f\x85 & <b> \"quoted\" '猫'")
@example("</pre></table><script>alert(1)</script>")
@example("two\nlines\ttab")
def test_text_of_any_characters_is_shown_and_nothing_else(text):
    rows = [{"method": text, "UA": text}]
    made = make_page(text, {text: text}, rows, {text: b""}, {text: {text: text}})
    assert made.encode()
    page, ordinary = Page(made), Page(make_page("t", {"t": "t"}, [{"method": "t", "UA": "t"}], {"t": b""}, {"t": {}}))
    assert [element["tag"] for element in page.elements] == [element["tag"] for element in ordinary.elements]
    # A parser of HTML makes one character of each line end; the rest is as it was given.
    shown = html_report.valid_text(text).replace("\r\n", "\n").replace("\r", "\n")
    for element in (
        *page.texts("h1"),
        page.texts("h2")[1],
        page.texts("dt")[0],
        page.texts("dd")[0],
        page.texts("td")[0],
    ):
        assert element.replace(" (text)", "").replace("\r\n", "\n").replace("\r", "\n") == shown
    assert page.all("td")[1]["data-value"].replace("\r\n", "\n").replace("\r", "\n") == shown


def test_valid_text_by_hand():
    expected = {
        "é猫\t\n\r ~\u00a0": "é猫\t\n\r ~\u00a0",
        "\x00\x08\x0b\x0c\x0e\x1f\x7f\x80\x9f": "\ufffd" * 9,
        "caf\udce9": "caf\\udce9",
    }
    assert {text: html_report.valid_text(text) for text in expected} == expected


# ---------------------------------------------------------------- pictures


def one_figure(text=""):
    figure = Figure(figsize=(1, 1), dpi=50)
    figure.text(0.5, 0.5, text)
    return figure


def test_png_is_the_figure_and_the_same_each_time():
    first, again = (html_report.png(one_figure("a")) for _ in range(2))
    assert first == again and first != html_report.png(one_figure("b"))
    image = Image.open(io.BytesIO(first))
    assert image.format == "PNG" and image.size == (50, 50) and "Software" not in image.info


def test_missing_glyphs_do_not_warn_but_other_faults_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html_report.png(one_figure("猫"))
        cramped = Figure(figsize=(0.1, 0.1), dpi=50, layout="constrained")
        cramped.subplots(3, 3)
        html_report.png(cramped)

    class Warns(Figure):
        def savefig(self, *arguments, **options):
            warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        html_report.png(Warns())
