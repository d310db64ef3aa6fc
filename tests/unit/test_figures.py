"""Figures: lines, bars and texts show the given numbers, for any names and missing numbers."""

import io
import math
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from hypothesis import given, settings, strategies
from matplotlib import colors, font_manager
from matplotlib.text import Annotation, Text
from PIL import Image
from scipy.optimize import minimize

import metrics
from metrics import CR, Spread, ensembles, scores
from metrics.report import figures, page

STRANGE = {
    "mathematics": "$x$ costs $5_{^\\frac",
    "unbalanced dollar": "1$",
    "TeX": "\\alpha^2_3{%&~#",
    "newline": "two\nlines\r\n",
    "not UTF-8": "caf\udce9",
    "control codes": "a\x00b\x1b[31m\x7f\x85",
    "directions": "\u202egnp.exe\u202c\u200f",
    "Arabic": "قطة",
    "Chinese": "猫",
    "Thai": "แมว",
    "emoji": "😀👩\u200d👩\ufe0f",
    "long": "n" * 300,
    "empty": "",
    "white": " \t\u3000 ",
    "underscore": "_hidden",
    "percent": "%s {0}",
    "HTML": "<b>&amp;\"'",
}


def legend(figure):
    (actual,) = figure.legends
    return [text.get_text() for text in actual.get_texts()]


def rgb(color):
    return colors.to_hex(color)


def shares_x(axis, other):
    return axis.get_shared_x_axes().joined(axis, other)


def curve_numbers(values, alphas=(0.05, 0.1)):
    keys = ("forget_coverage", "test_coverage", "forget_CR", "test_CR")
    return {"alpha": list(alphas), **{key: list(values) for key in keys}}


def histogram_numbers(q_hat=0.5):
    rng = np.random.default_rng(0)
    return {
        "forget": rng.random(5),
        "test": rng.random(4),
        "calibration": rng.random(3),
        "q_hat": q_hat,
    }


IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)


def figure_of(kind, names):
    """One of the figures, with ``names`` as those of methods or classes."""
    if kind == "fake_sheet":
        numbers = range(len(names))
        images = [figures.SheetImage(IMAGE, number, number, [number]) for number in numbers]
        return figures.fake_sheet(images, names, "".join(names))
    numbers = {
        "against_alpha": curve_numbers([0.1, 0.2]),
        "ratio_plane": (0.1, 0.2),
        "fake_bars": figures.FakeCounts(10, 5, 20),
        "score_histograms": histogram_numbers(),
        "relearn_curves": {"step": [0, 1], "accuracy": [0, 1], "coverage": [0, 1]},
        "q_hat_curves": [0.9, 0.8],
        "margin_histograms": [ensembles.ImageMargins(0, 0.1, torch.zeros(2), torch.ones(2))],
        "klom_dots": None,
    }[kind]
    if kind == "klom_dots":
        return figures.klom_dots([{"method": name, "KLOM_test": 0.1} for name in names])
    arguments = () if kind in ("against_alpha", "q_hat_curves") else (0.1,)
    if kind == "margin_histograms":
        arguments = (names[:1],)
    methods = dict.fromkeys(names, numbers)
    drawn = {"forget": methods} if kind == "relearn_curves" else methods
    return getattr(figures, kind)(drawn, *arguments)


KINDS = (
    "against_alpha",
    "ratio_plane",
    "fake_bars",
    "score_histograms",
    "fake_sheet",
    "relearn_curves",
    "q_hat_curves",
    "margin_histograms",
    "klom_dots",
)


# ---------------------------------------------------------------- names


def test_printable_names_by_hand():
    expected = {
        "cat": "cat",
        " cat\tand\ndog ": "cat and dog",
        "a\u00a0b\u2028c": "a b c",
        "caf\udce9": "caf\ufffd",
        "\x00\x85": "\ufffd\ufffd",
        "\u202eevil\u200d": "evil",
        "": "(no name)",
        " \n": "(no name)",
        "$_^{\\": "$_^{\\",
        "a" * 24: "a" * 24,
        "a" * 12 + "b" * 13: "a" * 12 + "…" + "b" * 11,
    }
    assert {name: figures.printable(name) for name in expected} == expected
    assert figures.printable(3) == "3" and figures.printable("abcdef", longest=5) == "ab…ef"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strategies.text(strategies.characters(exclude_categories=()), max_size=60))
def test_printable_name_is_one_short_line_of_utf8(name):
    shown = figures.printable(name)
    assert 0 < len(shown) <= figures.LONGEST_NAME and len(shown.splitlines()) == 1
    assert shown == shown.strip() and shown.encode()


@pytest.fixture
def font_of_one_character(tmp_path):
    """A font of this machine that can draw 猫 (a square) and nothing else."""
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    (
        pen.moveTo((100, 0)),
        pen.lineTo((100, 700)),
        pen.lineTo((800, 700)),
        pen.lineTo((800, 0)),
        pen.closePath(),
    )
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": empty, "cat": square})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "cat": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Only A Cat", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    path = tmp_path / "cat.ttf"
    builder.save(path)
    fonts = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(path)
    figures._fallbacks.cache_clear()
    yield "Only A Cat"
    font_manager.fontManager.ttflist[:] = fonts
    figures._fallbacks.cache_clear()


def test_character_missing_in_default_font_is_drawn_with_another_font(
    font_of_one_character,
):
    assert figures.font_families(["cat", "猫 é α →"]) == ["DejaVu Sans", font_of_one_character]
    assert figures.font_families(["cat é α →"]) == ["DejaVu Sans"]
    assert figures.font_families(["\udce9\x00"]) == ["DejaVu Sans"]
    figure = figures.fake_bars({"猫": figures.FakeCounts(1, 1, 2)}, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that it cannot draw
        figure.draw_without_rendering()


def test_upright_regular_sans_fonts_come_first_and_only_as_many_as_needed(monkeypatch):
    inside = f"{matplotlib.get_data_path()}/fonts/ttf/boxes.ttf"
    entries = [
        ("sans bold", "A Sans", "normal", 700, "猫"), ("italic", "B Sans", "italic", 400, "猫"),
        (inside, "Boxes Sans", "normal", 400, "猫ไ"), ("serif", "C Serif", "normal", 400, "猫"),
        ("sans", "D Sans", "normal", 400, "猫"), ("again", "D Sans", "normal", 400, "ไ"),
        ("thai", "E Sans", "normal", 400, "ไ"), ("more", "F Sans", "normal", 400, "猫ไ"),
    ]  # fmt: skip
    covered = {fname: characters for fname, *_, characters in entries}
    fonts = [
        font_manager.FontEntry(fname=fname, name=name, style=style, weight=weight)
        for fname, name, style, weight, _ in entries
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(
        figures, "_has_glyph", lambda path, character: character in covered.get(path, "é")
    )
    figures._fallbacks.cache_clear()
    assert figures.font_families(["猫"]) == ["DejaVu Sans", "D Sans"]
    assert figures.font_families(["猫ไé"]) == ["DejaVu Sans", "D Sans", "E Sans"]
    for left_out, expected in (
        (("D Sans", "F Sans"), "C Serif"),
        (("C Serif", "D Sans", "F Sans"), "A Sans"),
    ):
        font_manager.fontManager.ttflist = [font for font in fonts if font.name not in left_out]
        figures._fallbacks.cache_clear()
        assert figures.font_families(["猫"]) == ["DejaVu Sans", expected]
    figures._fallbacks.cache_clear()


def test_damaged_font_is_not_used(font_of_one_character):
    entry = next(
        font for font in font_manager.fontManager.ttflist if font.name == font_of_one_character
    )
    with open(entry.fname, "wb") as file:
        file.write(b"damaged")
    font_manager._get_font.cache_clear() if hasattr(font_manager, "_get_font") else None
    figures._fallbacks.cache_clear()
    assert figures.font_families(["猫"]) == ["DejaVu Sans"]


def test_drawing_leaves_the_callers_settings():
    before = dict(matplotlib.rcParams)
    for kind in KINDS:
        figure_of(kind, ["猫"])
    assert dict(matplotlib.rcParams) == before


# ---------------------------------------------------------------- appearance


def test_methods_differ_in_color_marker_or_line():
    methods = ["original", "retrain", *(f"method{number}" for number in range(12))]
    names = methods + [f"cpu_{name}" for name in methods[1:]]
    actual = figures.looks(names)
    assert list(actual) == names and len(set(actual.values())) == len(names)
    assert actual["original"][0] == actual["retrain"][0] == figures.BLACK
    assert actual["original"][2] == ":" and actual["retrain"][2] == "-"
    for name in methods[1:]:
        assert actual[f"cpu_{name}"] == (*actual[name][:2], "--")
        assert actual[name].face == actual[name].color and actual[f"cpu_{name}"].face == "white"
    assert [actual[f"method{number}"][0] for number in range(6)] == list(figures.PALETTE)
    assert [actual[f"method{number}"][1] for number in range(12)] == list(figures.MARKERS)


def test_cpu_variant_without_its_base_keeps_its_bases_look():
    assert figures.looks(["cpu_ga", "scrub"])["cpu_ga"] == (
        *figures.looks(["ga", "scrub"])["ga"][:2],
        "--",
    )
    assert figures.looks(["cpu_retrain"])["cpu_retrain"] == (figures.BLACK, "o", "--")


# ---------------------------------------------------------------- curves


def curves():
    return {
        "retrain": curve_numbers([0.9, 0.8]),
        "cpu_ga": {
            "alpha": [0.05, 0.1, 0.2],
            "forget_coverage": [math.nan, 0.5, 0.4],
            "test_coverage": [None, None, None],
            "forget_CR": [0.1, math.nan, 0.3],
            "test_CR": [math.inf, 0.2, 0.1],
        },
    }


def method_lines(axis):
    return [line for line in axis.lines if line.get_marker() != "None"]


def assert_looks(line, name, names):
    color, marker, dashes = figures.looks(names)[name]
    assert (rgb(line.get_color()), line.get_marker(), line.get_linestyle()) == (
        rgb(color),
        marker,
        dashes,
    )
    assert rgb(line.get_markerfacecolor()) == rgb("white" if name.startswith("cpu_") else color)


def test_curves_against_alpha_show_every_known_number():
    figure = figures.against_alpha(curves())
    titles = {axis.get_title().split(" (")[0]: axis for axis in figure.axes}
    places = {
        "Coverage of forget images": "forget_coverage",
        "Coverage of test images": "test_coverage",
        "CR of forget images": "forget_CR",
        "CR of test images": "test_CR",
    }
    assert list(titles) == list(places)
    for title, key in places.items():
        lines = method_lines(titles[title])
        for line, (name, curve) in zip(lines, curves().items(), strict=True):
            pairs = zip(curve["alpha"], curve[key], strict=True)
            known = [pair for pair in pairs if pair[1] is not None and math.isfinite(pair[1])]
            assert line.get_xydata().tolist() == [list(pair) for pair in known]
            assert_looks(line, name, curves())
        assert lines[0].get_linewidth() > lines[1].get_linewidth()
        assert lines[0].zorder > lines[1].zorder
    assert all(shares_x(figure.axes[0], axis) for axis in figure.axes)
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", *["miscoverage level α"] * 2]
    assert legend(figure) == ["retrain", "cpu_ga"]
    for handle, name in zip(figure.legends[0].legend_handles, curves(), strict=True):
        assert_looks(handle, name, curves())


def test_coverage_of_test_images_is_shown_with_the_line_that_theory_gives():
    guides = [
        [line for line in axis.lines if line.get_marker() == "None"]
        for axis in figures.against_alpha(curves()).axes
    ]
    assert [len(lines) for lines in guides] == [0, 1, 0, 0]
    assert guides[1][0].get_xydata().tolist() == [[0.05, 0.95], [0.1, 0.9], [0.2, 0.8]]
    assert guides[1][0].zorder < 2


def test_panel_without_any_number_has_a_note():
    nothing = {"ga": curve_numbers([math.nan, None]), "retrain": curve_numbers([None, math.inf])}
    nothing["ga"]["test_CR"] = [0.5, math.nan]
    figure = figures.against_alpha(nothing)
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts == [["no finite q̂"]] * 3 + [[]]
    assert legend(figure) == ["ga", "retrain"]
    text = figure.axes[0].texts[0]
    assert text.get_position() == (0.5, 0.5) and text.get_transform() == figure.axes[0].transAxes


def test_relearning_curves_show_every_known_number():
    actual = {
        "retrain": {"step": [0, 5, 10], "accuracy": [0.1, 0.2, 0.3], "coverage": [math.nan] * 3},
        "ga": {"step": [0, 5, 10], "accuracy": [0.0, 0.5, 0.9], "coverage": [None, 0.7, 0.8]},
    }
    figure = figures.relearn_curves({"retain": actual}, 0.05)
    accuracy, coverage = figure.axes
    assert shares_x(accuracy, coverage)
    assert accuracy.get_title() == "Accuracy of all forget images"
    assert coverage.get_title() == "Coverage (α = 0.05) of all forget images"
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [
        [[0, 0.1], [5, 0.2], [10, 0.3]], [[0, 0], [5, 0.5], [10, 0.9]],
    ]  # fmt: skip
    assert [line.get_xydata().tolist() for line in coverage.lines] == [[], [[5, 0.7], [10, 0.8]]]
    for line, name in zip(accuracy.lines, actual, strict=True):
        assert_looks(line, name, actual)
    assert legend(figure) == ["retrain", "ga"] and not coverage.texts
    assert all(axis.get_xlabel() == "training steps on retain images" for axis in figure.axes)
    methods = {f"m{number}": actual["ga"] for number in range(40)}
    assert figures.relearn_curves({"forget": methods}, 0.1).get_figheight() > 7
    figure = figures.relearn_curves({"forget": {"ga": actual["retrain"]}}, 0.1)
    assert [len(axis.texts) for axis in figure.axes] == [0, 1]


def test_relearning_on_both_kinds_of_images_has_two_rows_of_panels():
    curve = {"step": [0, 1], "accuracy": [0.1, 0.2], "coverage": [0.3, 0.4]}
    other = {"step": [0, 1], "accuracy": [0.5, 0.6], "coverage": [0.7, 0.8]}
    figure = figures.relearn_curves({"forget": {"ga": curve}, "retain": {"ga": other}}, 0.1)
    drawn = [axis.lines[0].get_ydata().tolist() for axis in figure.axes]
    assert drawn == [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]
    labels = [axis.get_xlabel() for axis in figure.axes]
    trained = ["a tenth of the forget images"] * 2 + ["retain images"] * 2
    assert labels == [f"training steps on {images}" for images in trained]
    assert legend(figure) == ["ga"]
    one_row = figures.relearn_curves({"forget": {"ga": curve}}, 0.1)
    assert figure.get_figheight() == 2 * one_row.get_figheight()


def test_q_hat_curves_show_every_epoch_of_every_variant():
    q_hats = {"cpu_finetune": [0.9, 0.95, 0.97], "cpu_scrub": [0.9, 0.8]}
    figure = figures.q_hat_curves(q_hats)
    (axis,) = figure.axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[1, 0.9], [2, 0.95], [3, 0.97]], [[1, 0.9], [2, 0.8]],
    ]  # fmt: skip
    for line, name in zip(axis.lines, q_hats, strict=True):
        assert_looks(line, name, q_hats)
    assert legend(figure) == [*q_hats] and axis.get_xlabel() == "epoch"
    assert "q̂" in axis.get_ylabel() and "q̂" in axis.get_title()
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


# ---------------------------------------------------------------- several trainings


def test_margins_have_a_row_of_panels_for_each_method():
    def image(position, klom, shift):
        retrained = torch.tensor([0.0, 1.0, 2.0, 2.0])
        return ensembles.ImageMargins(position, klom, retrained[:2] + shift, retrained)

    images = {"ga": [image(1, 0.1, 0), image(0, 2.5, 8)], "scrub": [image(0, 0, 0)]}
    figure = figures.margin_histograms(images, ["a.png", "b.png"])
    shown = [axis for axis in figure.axes if axis.get_visible()]
    titles = [axis.get_title() for axis in shown]
    assert titles == ["ga: b.png\nKLOM 0.10", "ga: a.png\nKLOM 2.50", "scrub: a.png\nKLOM 0.00"]
    assert len(figure.axes) == 8
    drawn = dict(zip(("unlearned", "retrained"), shown[1].patches, strict=True))
    heights = {kind: patch.get_xy()[:, 1] for kind, patch in drawn.items()}
    assert sorted(set(heights["unlearned"].round(6))) == [0, 0.5]
    assert sorted(set(heights["retrained"].round(6))) == [0, 0.25, 0.5]
    # 20 bins from the least margin of both to the largest.
    assert drawn["unlearned"].get_xy()[:, 0].min() == drawn["retrained"].get_xy()[:, 0].min() == 0
    assert drawn["retrained"].get_xy()[:, 0].max() == 9
    assert legend(figure) == ["trainings of the method", "trainings of Retrain"]
    for handle, patch in zip(figure.legends[0].legend_handles, shown[1].patches, strict=True):
        assert rgb(handle.get_color()) == rgb(patch.get_edgecolor())


def test_klom_dots_show_medians_beside_the_noise_floor():
    rows = [
        {"method": "retrain (halves)", "KLOM_forget": 0.2, "KLOM_retain": 0.3, "KLOM_test": 0.1},
        {"method": "ga", "KLOM_forget": 1, "KLOM_forget_95": 4, "KLOM_retain": 2},
        {"method": "cpu_ga", "KLOM_forget": 3, "KLOM_forget_95": 5, "KLOM_test": 0.5},
    ]
    figure = figures.klom_dots(rows)
    assert [axis.get_title() for axis in figure.axes] == [
        "forget images", "retain images", "test images",
    ]  # fmt: skip
    dots = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert dots[0] == [[[3, 0]], [[3, 0], [5, 0]], [[1, 1]], [[1, 1], [4, 1]]]
    assert dots[1:] == [[[[2, 1]]], [[[0.5, 0]]]]
    bands = [
        axis.patches[0].get_extents().transformed(axis.transData.inverted()) for axis in figure.axes
    ]
    assert [(band.x0, band.x1) for band in bands] == [
        pytest.approx((0, noise)) for noise in (0.2, 0.3, 0.1)
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cpu_ga", "ga"]
    dot, look = figure.axes[0].lines[0], figures.looks(["ga", "cpu_ga"])["cpu_ga"]
    assert (rgb(dot.get_color()), dot.get_marker()) == (rgb(look.color), look.marker)
    assert rgb(dot.get_markerfacecolor()) == rgb(look.face)
    assert "grey: half of Retrain's trainings" in figure.get_suptitle()
    without = figures.klom_dots(rows[1:])
    assert "grey" not in without.get_suptitle()
    assert not any(axis.patches for axis in without.axes)


def test_second_retrain_is_drawn_like_retrain_but_hollow():
    looks = figures.looks(["retrain", "retrain′", "ga"])
    assert looks["retrain′"].color == looks["retrain"].color != looks["ga"].color
    assert looks["retrain′"].marker == looks["retrain"].marker
    assert looks["retrain′"].face == "white" != looks["retrain"].face


# ---------------------------------------------------------------- plane


def test_plane_shows_a_labeled_point_for_every_method_with_numbers():
    points = {
        "retrain": (0.4, 0.1),
        "ga": (0.3, 0.2),
        "cpu_ga": (0.35, 0.3),
        "scrub": (None, 0.1),
        "ssd": (0.2, math.nan),
    }
    known = {name: points[name] for name in ("retrain", "ga", "cpu_ga")}
    figure = figures.ratio_plane(points, 0.05)
    (axis,) = figure.axes
    marks = [line for line in axis.lines if line.get_linestyle() == "None"]
    assert [tuple(line.get_xydata()[0]) for line in marks] == list(known.values())
    for line, (name, (color, marker, _)) in zip(marks, figures.looks(known).items(), strict=True):
        assert (rgb(line.get_color()), line.get_marker()) == (rgb(color), marker)
        assert rgb(line.get_markerfacecolor()) == rgb("white" if name == "cpu_ga" else color)
    labels = [text for text in axis.texts if isinstance(text, Annotation)]
    assert {label.get_text(): label.xy for label in labels} == known
    assert {label.get_text(): label.get_weight() for label in labels} == {
        "retrain": "bold",
        "ga": "normal",
        "cpu_ga": "normal",
    }
    low, high = axis.get_ylim()
    for label in labels:  # far apart, so that each is level with its point
        assert label.xyann[1] == pytest.approx((label.xy[1] - low) / (high - low))
        assert label.xyann[0] > 1
        assert label.anncoords == "axes fraction"
        assert label.get_va() == "center"
        assert label.arrow_patch is not None
    ring = [
        line
        for line in axis.lines
        if rgb(line.get_markeredgecolor()) == "#000000" and line.get_markersize() > 10
    ]
    assert [tuple(line.get_xydata()[0]) for line in ring] == [points["retrain"]]
    dotted = [line.get_xydata().tolist() for line in axis.lines if line.get_linestyle() == ":"]
    assert dotted == [[[0.4, 0], [0.4, 1]], [[0, 0.1], [1, 0.1]]]
    assert (
        axis.get_title()
        == "Forgetting against usefulness (α = 0.05): the dotted lines meet at Retrain"
    )
    assert axis.get_xlabel().startswith("CR on test")
    assert axis.get_ylabel().startswith("CR on forget")
    assert low + 0.05 * (high - low) < 0.1 < 0.3 < high - 0.05 * (high - low)
    assert axis.get_xlim()[0] < 0.3 < 0.4 < axis.get_xlim()[1]


def test_plane_without_retrain_has_no_reference():
    figure = figures.ratio_plane({"ga": (0.3, 0.2)}, 0.1)
    assert len(figure.axes[0].lines) == 1
    assert figure.axes[0].get_title() == "Forgetting against usefulness (α = 0.1)"


def test_plane_without_any_number_has_a_note():
    figure = figures.ratio_plane({"ga": (math.nan, 0.2), "retrain": (0.3, None)}, 0.1)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finite q̂"]
    assert not figure.axes[0].lines


def test_labels_of_crowded_plane_do_not_overlap():
    points = {f"method{number}": (0.5, 0.5 + 1e-6 * number) for number in range(12)}
    figure = figures.ratio_plane(points | {"far": (0, 0)}, 0.1)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in figure.axes[0].texts]
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert all(above[0] >= below[1] - 1 for below, above in zip(heights, heights[1:], strict=False))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(strategies.lists(strategies.floats(0, 1), min_size=1, max_size=8))
def test_spread_heights_are_the_nearest_heights_without_overlap(heights):
    actual = figures.spread_heights(heights, 0.1)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(actual)[order]) >= 0.1 - 1e-9).all()
    assert min(actual) >= -1e-9
    assert max(actual) <= 1 + 1e-9
    wanted = np.array(heights)[order]
    best = minimize(
        lambda y: ((y - wanted) ** 2).sum(),
        np.linspace(0, 1, len(wanted)) if len(wanted) > 1 else wanted,
        constraints=[{"type": "ineq", "fun": lambda y: np.diff(y) - 0.1}],
        bounds=[(0, 1)] * len(wanted),
    )  # fmt: skip
    assert ((np.array(actual) - heights) ** 2).sum() <= best.fun + 1e-5


def test_spread_heights_in_too_little_space_share_it_evenly():
    assert figures.spread_heights([], 0.1) == []
    actual = figures.spread_heights([0.5] * 20, 0.1)
    assert np.diff(actual) == pytest.approx([0.05] * 19) and min(actual) >= 0 and max(actual) <= 1


# ---------------------------------------------------------------- bars


def test_bars_show_shares_of_the_forget_images():
    counts = {
        "retrain": (40, 10, 80),
        "ga": (20, 20, 80),
        "none wrong": (0, 0, 80),
        "means": (12.5, 2.25, 80),
        "unknown": (30, math.nan, 80),
        "nothing": (None, None, 80),
        "no images": (3, 1, None),
    }
    counts = {name: figures.FakeCounts(*numbers) for name, numbers in counts.items()}
    figure = figures.fake_bars(counts, 0.05)
    (axis,) = figure.axes
    bars = [
        (bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width(), rgb(bar.get_facecolor()))
        for bar in axis.patches
    ]
    expected = []
    for place, (wrong, fake, total) in zip(range(6, 2, -1), counts.values(), strict=False):
        expected += [(place, 0, fake / total, rgb(figures.RED))]
        expected += [(place, fake / total, (wrong - fake) / total, rgb(figures.SKY))]
    assert [bar[:3] for bar in bars] == [pytest.approx(bar[:3]) for bar in expected]
    assert [bar[3] for bar in bars] == [bar[3] for bar in expected]
    texts = {
        text.get_position()[1]: (text.get_position()[0], text.get_text().strip())
        for text in axis.texts
    }
    assert texts == {
        6: (0.5, "10 of 40 (25%)"),
        5: (0.25, "20 of 20 (100%)"),
        4: (0, "0 of 0"),
        3: (12.5 / 80, "2.2 of 12.5 (18%)"),
        2: (0, "– of 30"),
        1: (0, "– of –"),
        0: (0, "– of 3"),
    }
    assert axis.get_yticks().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(reversed(counts))
    low, high = axis.get_ylim()
    assert low < -axis.patches[0].get_height() / 2 and low == pytest.approx(6 - high)
    assert axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 0.55
    assert axis.xaxis.get_major_formatter()(0.25, 0) == "25%"
    assert legend(figure) == ["label still in the set (fake)", "label out of the set"]
    assert [rgb(handle.get_color()) for handle in figure.legends[0].legend_handles] == [
        rgb(figures.RED),
        rgb(figures.SKY),
    ]
    assert axis.get_title().startswith("Fake forgetting (α = 0.05)")
    assert "share of the forget images" in axis.get_xlabel()
    assert not any(line.get_visible() for line in axis.get_ygridlines())
    assert axis.get_xgridlines()[0].get_visible()


def test_bars_without_any_number_have_a_note():
    counts = {"ga": (3, math.nan, 8), "retrain": (2, None, 8)}
    counts = {name: figures.FakeCounts(*numbers) for name, numbers in counts.items()}
    figure = figures.fake_bars(counts, 0.1)
    assert [text.get_text().strip() for text in figure.axes[0].texts] == [
        "no finite q̂",
        "– of 3",
        "– of 2",
    ]
    assert not figure.axes[0].patches
    known = figures.fake_bars({"ga": figures.FakeCounts(3, 1, 8)}, 0.1)
    assert known.axes[0].texts[0].get_text() == " 1 of 3 (33%)"


def test_figure_of_bars_grows_with_the_methods():
    few, many = (
        figures.fake_bars({f"m{i}": figures.FakeCounts(1, 1, 2) for i in range(count)}, 0.1)
        for count in (2, 22)
    )
    assert many.get_figheight() - few.get_figheight() == pytest.approx(
        20 * figures.SIZES["bars"][2]
    )


# ---------------------------------------------------------------- histograms


def test_histograms_show_the_share_of_each_part_by_score():
    sample = {
        "forget": np.array([0.5, 0.5, 0.5, 1.0]),
        "test": np.array([0.0, 0.25]),
        "calibration": np.array([]),
        "q_hat": 0.75,
    }
    figure = figures.score_histograms({"ga": sample, "retrain": histogram_numbers(math.nan)}, 0.05)
    axis, other = figure.axes
    assert shares_x(axis, other)
    colors = {image_set: rgb(color) for image_set, (color, _) in figures.PARTS.items()}
    # Solid, dashed and dotted, as matplotlib stores the patterns.
    outlines = {
        rgb(patch.get_edgecolor()): patch
        for patch in axis.patches
        if len(patch.get_path().vertices) > 10
    }
    drawn = [outlines[colors[image_set]] for image_set in ("forget", "test", "calibration")]
    dashes = [outline.get_linestyle()[1] for outline in drawn]
    assert len(outlines) == 3 and dashes[0] is None and dashes[1][0] > 2 * dashes[2][0]

    def heights(image_set):
        """{position on the logit axis: height} of the steps of the outline."""
        corners = outlines[colors[image_set]].get_xy()
        pairs = zip(corners, corners[1:], strict=False)
        return {(x0 + x1) / 2: y0 for (x0, y0), (x1, y1) in pairs if y0 == y1 and y0 > 0}

    width = figures.LOGIT_EDGES[1] - figures.LOGIT_EDGES[0]
    forget = heights("forget")
    assert sorted(forget.values()) == [0.25, 0.75]
    assert min(forget, key=lambda place: abs(place)) == pytest.approx(width / 2)
    assert max(forget) == pytest.approx(14 - width / 2)
    test = heights("test")
    assert list(test.values()) == [0.5, 0.5]
    assert min(test) == pytest.approx(-14 + width / 2)
    assert abs(max(test) - math.log(0.25 / 0.75)) <= width / 2
    assert heights("calibration") == {}
    (line,) = axis.lines
    assert line.get_xdata()[0] == pytest.approx(math.log(3))
    assert rgb(line.get_color()) == rgb(figures.GREEN)
    (area,) = [patch for patch in axis.patches if patch.get_alpha()]
    box = area.get_extents().transformed(axis.transData.inverted())
    assert (box.x0, box.x1) == (pytest.approx(-14), pytest.approx(math.log(3)))
    assert axis.get_title() == "ga"
    assert other.get_title() == "retrain (no finite q̂)"
    assert not other.lines
    assert legend(figure) == [*figures.PARTS, "q̂: labels to its left are in the set"]
    handles = figure.legends[0].legend_handles
    assert [(rgb(h.get_color()), h.get_linestyle()) for h in handles] == [
        *((rgb(color), line) for color, line in figures.PARTS.values()),
        (rgb(figures.GREEN), "-"),
    ]  # fmt: skip
    assert "α = 0.05" in figure.get_suptitle()
    ticks = dict(
        zip([label.get_text() for label in axis.get_xticklabels()], axis.get_xticks(), strict=True)
    )
    odds = {"10⁻⁶": 1e-6 / (1 - 1e-6), "10⁻³": 1e-3 / 0.999, "½": 1, ".999": 999}
    assert ticks == {label: pytest.approx(math.log(value)) for label, value in odds.items()}
    assert not axis.get_yticks().size
    assert not any(line.get_visible() for line in axis.get_xgridlines())


@pytest.mark.parametrize(("q_hat", "place"), [(0.0, -14), (1.0, 14)])
def test_q_hat_beyond_the_histogram_is_at_its_end(q_hat, place):
    figure = figures.score_histograms({"ga": histogram_numbers(q_hat)}, 0.1)
    assert figure.axes[0].lines[0].get_xdata()[0] == place


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_every_model_has_a_panel_with_tick_labels_below_the_lowest(count):
    figure = figures.score_histograms(
        {f"m{number}": histogram_numbers() for number in range(count)}, 0.1
    )
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [f"m{number}" for number in range(count)]
    columns = min(4, count)
    assert len(figure.axes) == math.ceil(count / columns) * columns
    labels = [axis.xaxis.get_major_ticks()[0].label1.get_visible() for axis in shown]
    assert labels == [number + columns >= count for number in range(count)]


def test_histogram_data_are_scores_of_the_image_sets_of_the_split():
    generator = torch.Generator().manual_seed(0)

    def output(n):
        return metrics.Output(
            torch.randn(n, 3, generator=generator), torch.randint(3, (n,), generator=generator)
        )

    forget, retain, held_out = output(5), output(9), output(40)
    draws = metrics.draw_splits(40, 3, seed=1)
    outputs = metrics.Outputs(forget, retain, held_out, [10, 20], draws)
    settings = metrics.Settings((0.1, 0.4))
    actual = figures.histogram_data(metrics.ConformalScores(outputs, settings))
    label_scores = scores.true_label_scores(*held_out)
    assert actual["forget"].tolist() == scores.true_label_scores(*forget).tolist()
    assert actual["calibration"].tolist() == label_scores[:20].tolist()
    assert actual["test"].tolist() == label_scores[20:].tolist()
    assert actual["q_hat"] == pytest.approx(CR.conformal_quantile(label_scores[:20], 0.1))
    too_few = metrics.ConformalScores(outputs, metrics.Settings((0.01,)))
    assert math.isnan(figures.histogram_data(too_few)["q_hat"])


# ---------------------------------------------------------------- sheet


def sheet(*images):
    return [figures.SheetImage(*image) for image in images]


def test_sheet_shows_each_image_with_its_answer_and_set():
    classes = ["cat", "dog", "eel", *(f"class number {number}" for number in range(3, 12))]
    images = [np.full((4, 4, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    entries = [(images[0], 0, 1, [1, 0]), (images[1], 2, 0, list(range(12))), (images[2], 1, 2, [])]
    figure = figures.fake_sheet(sheet(*entries), classes, "the title")
    assert len(figure.axes) == 3 and not any(axis.axison for axis in figure.axes)
    assert [axis.images[0].get_array()[0, 0, 0] for axis in figure.axes] == [10, 20, 30]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "cat → dog\n{dog, [cat]}" and titles[2] == "dog → eel\n{}"
    # Eight labels, then an ellipsis. A line has at most 22 characters before its last name.
    assert titles[1] == (
        "eel → cat\n{cat, dog, [eel],\nclass number 3,\nclass number 4,\nclass number 5,\n"
        "class number 6,\nclass number 7, …}"
    )
    assert figure.get_suptitle() == "the title"
    assert {axis.images[0].get_interpolation() for axis in figure.axes} == {"nearest"}
    eight = figures.fake_sheet(sheet((images[0], 0, 1, list(range(8)))), classes, "")
    assert eight.axes[0].get_title().endswith("number 7}")


def test_long_title_of_sheet_is_shortened():
    assert figures.fake_sheet([], ["cat"], "t" * 120).get_suptitle() == "t" * 120
    assert figures.fake_sheet([], ["cat"], "t" * 121).get_suptitle() == "t" * 60 + "…" + "t" * 59


def test_sheet_without_images_names_the_reason():
    for entries, texts in (
        ([], "no misclassified image\nkeeps its label in the set"),
        (None, "no finite q̂"),
    ):
        figure = figures.fake_sheet(entries, ["cat"], "title")
        (axis,) = figure.axes
        assert [text.get_text() for text in axis.texts] == [texts]
        assert axis.texts[0].get_position() == (0.5, 0.5)


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (6, 6), (7, 12), (18, 18)])
def test_sheet_has_rows_of_six(count, panels):
    figure = figures.fake_sheet(sheet(*[(IMAGE, 0, 0, [0])] * count), ["cat"], "title")
    assert len(figure.axes) == panels and sum(bool(axis.images) for axis in figure.axes) == count


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(0, 1, 1), (1, 1, 1), (5, 5, 1), (6, 6, 1), (7, 6, 2)]
)
def test_figure_of_panels_grows_with_its_rows_and_columns(count, columns, rows):
    figure = figures.fake_sheet(sheet(*[(IMAGE, 0, 0, [0])] * count), ["cat"], "title")
    width, height, around = figures.SIZES["sheet"]
    assert figure.get_size_inches().tolist() == pytest.approx(
        [columns * width, rows * height + around]
    )


# ---------------------------------------------------------------- overview


def row(method, alpha, value, **more):
    return {
        "method": method, "score": "thr", "cal_size": 20, "alpha": alpha, "num_forget": 10,
        "test_coverage": value, "test_CR": value + 0.01, "forget_coverage": value + 0.02,
        "forget_CR": value + 0.03, "forget_misclassified": 5, "forget_fake": 2,
    } | more  # fmt: skip


def test_overview_draws_the_rows_of_the_score_and_size_at_the_smallest_alpha():
    rows = [
        row("retrain", 0.1, 0.5),
        row("ga", 0.1, 0.6),
        row("retrain", 0.05, 0.7),
        row("ga", 0.05, 0.8),
    ]
    other = [
        row("ga", 0.01, 0.9, score="aps"),
        row("ga", 0.01, 0.9, cal_size=10),
        {"method": "failed", **KEYS},
    ]
    pictures = figures.overview([*rows, *other], "thr", 20)
    assert list(pictures) == ["fake_forgetting.png", "cr_plane.png", "against_alpha.png"]
    assert [caption for caption, _ in pictures.values()] == [
        "Fake forgetting", "CR on forget against CR on test images", "Coverage and CR against α",
    ]  # fmt: skip
    bars, plane, curves = (figure for _, figure in pictures.values())
    assert "α = 0.05" in bars.axes[0].get_title() and "α = 0.05" in plane.axes[0].get_title()
    assert [text.get_text() for text in bars.axes[0].texts] == [" 2 of 5 (40%)"] * 2
    assert bars.axes[0].patches[0].get_width() == pytest.approx(0.2)
    labels = {text.get_text(): text.xy for text in plane.axes[0].texts}
    assert labels == {
        "retrain": (0.71, pytest.approx(0.73)),
        "ga": (pytest.approx(0.81), pytest.approx(0.83)),
    }
    for axis, added in zip(curves.axes, (0.02, 0, 0.03, 0.01), strict=True):
        assert method_lines(axis)[1].get_xydata().tolist() == [
            pytest.approx([0.1, 0.6 + added]),
            pytest.approx([0.05, 0.8 + added]),
        ]
    assert legend(curves) == ["retrain", "ga"]


KEYS = {"score": "thr", "cal_size": 20, "alpha": 0.05, "note": "it failed"}


def test_overview_draws_the_means_of_numbers_with_a_spread():
    plain = row("ga", 0.1, 0.5)
    keys = ("test_coverage", "test_CR", "forget_coverage", "forget_CR", "forget_fake")
    varied = plain | {key: Spread(plain[key], 0.1) for key in keys}
    expected = figures.overview([plain], "thr", 20)
    for name, (_, figure) in figures.overview([varied], "thr", 20).items():
        for each in (figure, expected[name][1]):
            each.set_dpi(20)
        assert page.png(figure) == page.png(expected[name][1])


def test_overview_of_class_forgetting_uses_retained_class_calibration():
    more = {"forget_by_retain_coverage": 0.2, "forget_by_retain_CR": 0.1}
    more |= {"forget_by_retain_misclassified": 8, "forget_by_retain_fake": 4}
    pictures = figures.overview([row("ga", 0.1, 0.5, **more)], "thr", 20)
    assert pictures["fake_forgetting.png"][1].axes[0].texts[0].get_text() == " 4 of 8 (50%)"
    assert pictures["cr_plane.png"][1].axes[0].texts[0].xy == (0.51, 0.1)
    forget_coverage, _, forget_CR, _ = pictures["against_alpha.png"][1].axes
    assert method_lines(forget_coverage)[0].get_ydata() == [0.2]
    assert method_lines(forget_CR)[0].get_ydata() == [0.1]


def test_overview_takes_the_smallest_alpha_with_most_numbers():
    missing = dict.fromkeys(
        ("test_coverage", "test_CR", "forget_coverage", "forget_CR", "forget_fake"), math.nan
    )
    rows = [
        row("a", 0.01, 0.5, **missing),
        row("b", 0.01, 0.5),
        row("a", 0.2, 0.5),
        row("b", 0.2, 0.5),
    ]
    rows += [row("a", 0.1, 0.5), row("b", 0.1, 0.5)]
    assert (
        "α = 0.1)"
        in figures.overview(rows, "thr", 20)["fake_forgetting.png"][1].axes[0].get_title()
    )


@pytest.mark.parametrize("missing", [math.nan, None])
def test_overview_without_any_finite_q_hat_has_a_note_in_every_picture(missing):
    keys = ("test_coverage", "test_CR", "forget_coverage", "forget_CR", "forget_fake")
    rows = [row(name, 0.01, 0.5, **dict.fromkeys(keys, missing)) for name in ("retrain", "ga")]
    for _, figure in figures.overview(rows, "thr", 20).values():
        assert all(
            "no finite q̂" in [text.get_text() for text in axis.texts] for axis in figure.axes
        )


def test_overview_without_rows_has_no_pictures():
    assert figures.overview([], "thr", 20) == {}
    assert (
        figures.overview([row("ga", 0.1, 0.5)], "aps", 20)
        == figures.overview([row("ga", 0.1, 0.5)], "thr", 9)
        == {}
    )


# ---------------------------------------------------------------- names in pictures


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_any_characters_are_drawn_as_plain_text_without_warnings(kind):
    # Figures with a panel for each name are slow.
    every = {"score_histograms": 4, "margin_histograms": 8, "fake_sheet": 2}.get(kind, 1)
    names = list(STRANGE.values())[::every]
    figure = figure_of(kind, names)
    figure.set_dpi(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Image.open(io.BytesIO(page.png(figure))).size[0] > 50
    shown = [text for text in figure.findobj(Text) if text.get_text()]
    for name in names:
        named = [text for text in shown if figures.printable(name) in text.get_text()]
        assert named and not any(text.get_parse_math() for text in named)
