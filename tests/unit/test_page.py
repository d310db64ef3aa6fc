"""The HTML report: a browser shows its input unchanged, for any text."""

import base64
import io
import json
import math
from html.parser import HTMLParser

from hypothesis import example, given, settings, strategies
from matplotlib.figure import Figure
from PIL import Image

from metrics import Column, Spread
from metrics.report import page
from metrics.report.tables import Table

COLUMNS = {
    "method": Column("method", "text"),
    "UA": Column("UA <x>", "percent", meaning="share of <b>wrong</b> predictions"),
}
ROWS = [
    {"method": "original", "UA": Spread(0.25, 0.1)},
    {"method": "retrain", "UA": math.nan},
    {"method": "ga"},
]


class Page(HTMLParser):
    """The elements of a page in order: tag, attributes and the text directly inside."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": ""} | dict(attributes))
        if tag not in ("meta", "img"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1]["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def texts(self, tag):
        return [element["text"] for element in self.all(tag)]


def make_page(title="title", facts=(), rows=ROWS, pictures=(), details=()):
    shown = {"facts": dict(facts), "pictures": dict(pictures), "details": dict(details)}
    return page.page(title, shown_tables=[Table("Models", COLUMNS, rows)], **shown)


def test_page_shows_all_tables_facts_and_pictures():
    details = {"Flags": {"alpha": 0.1, "path": io}, "Versions": {"torch": "猫"}}
    facts, pictures = {"data": "digits", "images": 5}, {"Caption <1>": b"\x89PNG not a picture"}
    parsed = Page(make_page("A & B", facts, pictures=pictures, details=details))
    assert parsed.texts("title") == parsed.texts("h1") == ["A & B"]
    defined = dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=True))
    assert defined["data"] == "digits" and defined["images"] == "5"
    assert defined["UA <x> %"] == "share of <b>wrong</b> predictions" and "method" not in defined
    assert "±" in defined and "–" in defined
    assert parsed.texts("h2") == ["Models", "Caption <1>", "What the numbers mean"]
    (image,) = parsed.all("img")
    kind, _, data = image["src"].partition(",")
    assert (image["alt"], kind) == ("Caption <1>", "data:image/png;base64")
    assert base64.b64decode(data) == pictures["Caption <1>"]
    assert parsed.texts("summary") == ["Flags", "Versions"]
    assert json.loads(parsed.texts("pre")[0]) == {"alpha": 0.1, "path": str(io)}
    assert parsed.texts("pre")[1] == '{\n  "torch": "猫"\n}'
    assert "table.sortable" in parsed.texts("script")[0] and "body {" in parsed.texts("style")[0]


def test_table_marks_retrain_and_carries_the_values_to_sort_by():
    parsed = Page(page.table(COLUMNS, ROWS))
    heads, rows, cells = parsed.all("th"), parsed.all("tr")[1:], parsed.all("td")
    assert [head["text"] for head in heads] == ["method", "UA <x> %"]
    assert [row.get("class") for row in rows] == [None, "reference", None]
    assert [item["text"] for item in cells] == ["original", "25.0±10.0", "retrain", "–", "ga", "–"]
    assert [item["data-value"] for item in cells] == ["original", "0.25", "retrain", "", "ga", ""]
    assert [item.get("class") for item in [*heads, *cells]] == ["text", None] * 4
    assert parsed.all("table")[0]["class"] == "sortable"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(strategies.text(strategies.characters(exclude_categories=("Cc",)), max_size=20))
@example("caf\udce9 & <b> \"quoted\" '猫'")
@example("</pre></table><script>alert(1)</script>")
def test_text_of_any_characters_is_shown_and_nothing_else(text):
    def parsed(text):
        rows = [{"method": text, "UA": 0.5}]
        made = make_page(text, {text: text}, rows, {text: b""}, {text: {text: text}})
        assert made.encode()
        return Page(made)

    actual, ordinary = parsed(text), parsed("t")
    tags = [element["tag"] for element in actual.elements]
    assert tags == [element["tag"] for element in ordinary.elements]
    shown = [actual.texts(tag)[0] for tag in ("h1", "td", "dt", "dd", "summary")]
    shown += [actual.texts("h2")[1], actual.all("td")[0]["data-value"]]
    assert set(shown) == {text.encode("utf-8", "backslashreplace").decode()}


def test_png_shows_the_figure_and_is_reproducible():
    def draw(text):
        figure = Figure(figsize=(1, 1), dpi=50)
        figure.text(0.5, 0.5, text)
        return page.png(figure)

    assert draw("a") == draw("a") != draw("b")
    image = Image.open(io.BytesIO(draw("a")))
    assert image.format == "PNG" and image.size == (50, 50)
