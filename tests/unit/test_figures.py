"""Pictures: points, bars and texts show the given numbers, also where some are missing."""

import io
import math
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

import metrics
from metrics import Spread
from metrics.report import figures, page
from metrics.samples import FakeForgotten

NAN = math.nan
BLACK_PIXELS = np.zeros((1, 4, 4, 3), np.uint8)


def row(method, alpha=0.1, value=0.5, **numbers):
    """A row of results.csv. Its numbers differ from ``value`` by a few 64ths."""
    defaults = {
        "method": method, "score": "thr", "cal_size": 20, "alpha": alpha, "q_hat": 0.5,
        "num_forget": 80,
        "test_coverage": value, "test_CR": value + 1 / 64, "forget_coverage": value + 2 / 64,
        "forget_CR": value + 3 / 64, "forget_misclassified": 40, "forget_fake": 10,
    }  # fmt: skip
    return defaults | numbers


def points(line):
    """The points of a line without those that are missing."""
    rounded = [tuple(point) for point in line.get_xydata().round(6).tolist()]
    return [point for point in rounded if not math.isnan(point[1])]


def texts(items):
    return [item.get_text().strip() for item in items]


def legend(figure):
    """{label: color} of the figure's legend."""
    (box,) = figure.legends
    colors = [to_hex(handle.get_color()) for handle in box.legend_handles]
    return dict(zip(texts(box.get_texts()), colors, strict=True))


def test_printable_name_is_one_short_line():
    expected = {" cat\tand\ndog ": "cat and dog", "caf\udce9\x00": "caf\ufffd\ufffd", 3: "3"}
    expected |= {"$_^{\\猫": "$_^{\\猫", "a" * 24: "a" * 24}
    expected["a" * 12 + "b" * 13] = "a" * 12 + "…" + "b" * 11
    assert {name: figures.printable(name) for name in expected} == expected


def test_methods_differ_in_color_or_marker_and_cpu_variants_are_hollow():
    methods = ["original", "retrain", *(f"method{number}" for number in range(30))]
    actual = figures.looks([*methods, *(f"cpu_{name}" for name in methods[1:])])
    assert len({tuple(style.values()) for style in actual.values()}) == len(actual)
    for name in methods[1:]:
        variant = {"markerfacecolor": "white", "linestyle": "--"}
        assert actual[f"cpu_{name}"] == actual[name] | variant
        assert actual[name]["markerfacecolor"] == actual[name]["color"]
    assert actual["retrain"]["color"] == figures.BLACK != actual["method0"]["color"]
    assert figures.looks(["cpu_method0"])["cpu_method0"] == actual["cpu_method0"]


def test_any_name_is_drawn_as_plain_text_without_warnings():
    before = dict(matplotlib.rcParams)
    names = ["$x$ costs $5_{^\\frac", "\\alpha^2_3{%&~#", "caf\udce9\x1b[31m\n", "猫", "n" * 99]
    image = FakeForgotten(0, 1, 0, [*range(len(names))])
    sheet = figures.fake_sheet([image], BLACK_PIXELS, classes=names, title="".join(names))
    curve = {"step": [0, 1], "accuracy": [0.5, 0.75], "coverage": [0.5, NAN]}
    curves = figures.relearn_curves({"forget": dict.fromkeys(names, curve)}, 0.1)
    q_hats = figures.q_hat_curves(dict.fromkeys(names, [0.5, 0.25]))
    klom = {"KLOM_forget": 1, "KLOM_forget_chance": 1}
    dots = figures.klom_dots([{"method": name} | klom for name in names])
    for figure in [*pictures([row(name) for name in names]), sheet, curves, q_hats, dots]:
        figure.set_dpi(20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Image.open(io.BytesIO(page.png(figure))).size[0] > 50
        shown = [text for text in figure.findobj(Text) if "costs" in text.get_text()]
        assert shown and not any(text.get_parse_math() for text in shown)
    assert dict(matplotlib.rcParams) == before


def pictures(rows):
    """The figures of the bars, the plane and the curves."""
    drawn = figures.overview(rows, "thr", 20)
    return [drawn[name][1] for name in ("fake_forgetting.png", "cr_plane.png", "against_alpha.png")]


def test_overview_draws_the_smallest_alpha_at_which_most_methods_have_a_finite_q_hat():
    rows = [row("retrain", 0.1), row("ga", 0.1), row("retrain", 0.05), row("ga", 0.05)]
    others = [row("ga", 0.01, score="aps"), row("ga", 0.01, cal_size=10)]
    others += [row("ga", 0.01), row("retrain", 0.01, test_CR=NAN)]  # fewer with a finite q̂
    failed = {"method": "x", "score": "thr", "cal_size": 20, "alpha": 0.1, "note": "diverged"}
    bars, plane, curves = pictures([*rows, *others, failed])
    assert "α = 0.05" in bars.axes[0].get_title() and "α = 0.05" in plane.axes[0].get_title()
    assert list(legend(plane)) == list(legend(curves)) == ["retrain", "ga"]
    assert figures.overview(rows, "aps", 20) == figures.overview(rows, "thr", 9) == {}


def test_overview_of_class_forgetting_draws_means_under_the_q_hat_of_the_retained_classes():
    under_retain = {"coverage": 0.2, "CR": Spread(0.1, 1.0), "misclassified": 8, "fake": 4}
    numbers = {f"forget_by_retain_{key}": value for key, value in under_retain.items()}
    bars, plane, curves = pictures([row("ga", **numbers)])
    assert texts(bars.axes[0].texts) == ["4 of 8 (50%)"]
    assert points(plane.axes[0].lines[0]) == [(0.515625, 0.1)]
    assert [axis.lines[0].get_ydata() for axis in curves.axes[::2]] == [[0.2], [0.1]]


def test_bars_show_shares_of_the_forget_images():
    numbers = {"retrain": (40, 10, 80), "ga": (20, 20, 80), "none wrong": (0, 0, 80)}
    numbers |= {"means": (12.5, 2.25, 80), "unknown": (30, NAN, 80)}
    keys = ("forget_misclassified", "forget_fake", "num_forget")
    rows = [row(name, **dict(zip(keys, values, strict=True))) for name, values in numbers.items()]
    figure = figures.fake_bars(rows)
    (axis,) = figure.axes
    bars = [(round(bar.get_y() + 0.35), bar.get_x(), bar.get_width()) for bar in axis.patches]
    assert bars == [
        (1, 0, 2.25 / 80), (1, 2.25 / 80, 10.25 / 80), (2, 0, 0), (2, 0, 0),
        (3, 0, 20 / 80), (3, 20 / 80, 0), (4, 0, 10 / 80), (4, 10 / 80, 30 / 80),
    ]  # fmt: skip
    labels = {text.get_text().strip(): text.get_position() for text in axis.texts}
    assert labels == {
        "10 of 40 (25%)": (0.5, 4), "20 of 20 (100%)": (0.25, 3), "0 of 0": (0, 2),
        "2.2 of 12.5 (18%)": (12.5 / 80, 1), "– of 30": (0, 0),
    }  # fmt: skip
    assert texts(axis.get_yticklabels()) == list(reversed(numbers))
    assert axis.get_ylim()[0] < -0.35 and axis.get_ylim()[1] > 4.35
    assert figures.fake_bars(rows * 6).get_figheight() > 2 * figure.get_figheight()
    assert axis.get_xlim()[1] > 0.55 and axis.xaxis.get_major_formatter()(0.25, 0) == "25%"
    colors = [to_hex(bar.get_facecolor()) for bar in axis.patches]
    assert colors == 4 * list(legend(figure).values()) and colors[0] != colors[1]
    assert list(legend(figure)) == ["label in the set (fake)", "label out of the set"]


def test_plane_has_a_point_for_every_method_with_numbers():
    rows = [row("retrain", test_CR=0.4, forget_CR=0.1), row("ga", test_CR=0.3, forget_CR=0.2)]
    rows += [row("cpu_ga", test_CR=0.35, forget_CR=0.3), row("ssd", test_CR=None)]
    rows += [row("scrub", forget_CR=NAN)]
    figure = figures.cr_plane(rows)
    (axis,) = figure.axes
    known = {"retrain": (0.4, 0.1), "ga": (0.3, 0.2), "cpu_ga": (0.35, 0.3)}
    marks = [line for line in axis.lines if line.get_linestyle() == "None"]
    assert [tuple(line.get_xydata()[0]) for line in marks] == list(known.values())
    assert [line.get_marker() for line in marks] == ["o", "s", "s"]
    colors = [to_hex(line.get_color()) for line in marks]
    assert colors[0] != colors[1] == colors[2] != to_hex(marks[2].get_markerfacecolor())
    assert legend(figure) == dict(zip(known, colors, strict=True)) and not axis.texts
    guides = [line.get_xydata().tolist() for line in axis.lines if line.get_linestyle() == ":"]
    assert guides == [[[0.4, 0], [0.4, 1]], [[0, 0.1], [1, 0.1]]]
    assert "test" in axis.get_xlabel() and "forget" in axis.get_ylabel()
    assert "Retrain" in axis.get_title()
    (alone,) = figures.cr_plane([row("ga")]).axes
    assert len(alone.lines) == 1 and "Retrain" not in alone.get_title()


def test_plane_shows_the_original_retrain_and_the_six_methods_nearest_to_retrain():
    rows = [row(name, test_CR=0.4, forget_CR=y) for name, y in (("far", 0.9), ("retrain", 0.2))]
    rows += [row(f"m{number}", test_CR=0.5 + number / 64, forget_CR=0.2) for number in range(8)]
    figure = figures.cr_plane([*rows, row("original", test_CR=0.9, forget_CR=0.9)])
    names = ["retrain", "m0", "m1", "m2", "m3", "m4", "m5", "original"]
    assert list(legend(figure)) == names and "\n3 methods" in figure.axes[0].get_title()
    assert "\n" not in figures.cr_plane(rows[:8]).axes[0].get_title()


def test_gap_against_time_has_a_line_of_retrains_runs_and_points_and_levels_of_others():
    def timed(method, gap, seconds, base_method=None):
        return row(method, gap=gap, seconds=seconds, base_method=base_method or method)

    rows = [timed("original", 0.25, 50.0), timed("retrain", 0.0, 24.0), timed("ga", 0.125, 5.0)]
    rows += [timed("mine", 0.5, None), timed("r10", 0.375, 4.0, "retrain")]
    rows += [timed("r50", 0.0625, 20.0, "retrain"), timed("cpu_ga", 0.1875, NAN)]
    klom = {"ga": (2, 0.3), "r10": (6, 0.7), "r50": (1, 0.5), "original": (8, 0.5)}
    klom["mine"] = 3, 0.5
    keys = ("KLOM_forget", "KLOM_forget_chance")
    klom = [{"method": name} | dict(zip(keys, pair, strict=True)) for name, pair in klom.items()]
    figure = figures.gap_against_time(rows, klom)
    places = {"retrain": [(4, 37.5, 6), (20, 6.25, 1), (24, 0, 0.5)], "ga": [(5, 12.5, 2)]}
    assert list(legend(figure)) == ["retrain", "original", "ga", "mine", "cpu_ga"]
    for axis, number, levels in zip(figure.axes, (1, 2), ([18.75, 50, 25], [3, 8]), strict=True):
        drawn = [points(line) for line in axis.lines if line.get_marker() not in ("", "None")]
        assert drawn == [[(point[0], point[number]) for point in line] for line in places.values()]
        dashed = [points(line) for line in axis.lines if line.get_linestyle() == "--"]
        drawn = [line for line in dashed if len(line) == 2]  # the others are for the legend
        assert drawn == [[(0, y), (1, y)] for y in levels]
        assert not axis.texts and axis.get_ylim()[0] == 0 and axis.get_xscale() == "linear"
    assert len(figures.overview(rows, "thr", 20)["compute.png"][1].axes) == 1
    assert figures.gap_against_time([*rows, timed("ssd", 0.1, 0.25)]).axes[0].get_xscale() == "log"
    for without in ([row("ga", seconds=3.0)], [rows[0], rows[3]]):  # no gap, no time
        assert figures.gap_against_time(without) is None


def test_predicted_classes_are_a_row_for_each_method_in_percent():
    classes = [f"class {number:02}" for number in range(14)]
    shares = {"retrain": {2: 0.75, 13: 0.25}, "ga": {0: 0.996, 5: 0.004}}
    rows = [
        {"method": name, "part": part, "predicted_class": text, "share": each.get(number, 0) / more}
        for name, each in shares.items()
        for more, part in enumerate(("forget", "forget_test"), 1)
        for number, text in enumerate(classes)
    ]
    figure = figures.destination_tables(rows)
    assert [axis.get_title() for axis in figure.axes] == ["forget images", "forget test images"]
    assert texts(figure.axes[0].get_yticklabels()) == ["ga", "retrain"]
    for axis, cells in zip(figure.axes, (("100", "75", "25"), ("50", "38", "12")), strict=True):
        assert texts(axis.get_xticklabels()) == [*classes[:11], classes[13]]
        numbers = {text.get_text(): text.get_position() for text in axis.texts}
        assert numbers == dict(zip(cells, [(0, 0), (2, 1), (11, 1)], strict=True))


def test_curves_against_alpha_show_every_known_number():
    rows = [row("retrain", 0.1, 0.875), row("ga", 0.1, 0.5), row("retrain", 0.2, 0.75)]
    rows += [row("ga", 0.2, 0.375, forget_coverage=None), row("cpu_ga", 0.2, 0.25)]
    figure = figures.against_alpha(rows)
    titles = [" ".join(axis.get_title().split()[:3]) for axis in figure.axes]
    assert titles == ["Coverage of forget", "Coverage of test", "CR of forget", "CR of test"]
    for axis, shift in zip(figure.axes, (2 / 64, 0, 3 / 64, 1 / 64), strict=True):
        retrain, ga, cpu = (line for line in axis.lines if line.get_marker() != "None")
        assert points(retrain) == [(0.1, 0.875 + shift), (0.2, 0.75 + shift)]
        known = 1 if shift == 2 / 64 else 2
        assert points(ga) == [(0.1, 0.5 + shift), (0.2, 0.375 + shift)][:known]
        assert points(cpu) == [(0.2, 0.25 + shift)]
        assert cpu.get_color() == ga.get_color() and cpu.get_linestyle() == "--"
        assert retrain.get_linewidth() > ga.get_linewidth() and retrain.zorder > ga.zorder
        assert len(axis.lines) == (4 if shift == 0 else 3)
    (theory,) = (line for line in figure.axes[1].lines if line.get_marker() == "None")
    assert points(theory) == [(0.1, 0.9), (0.2, 0.8)]
    assert [bool(axis.get_xlabel()) for axis in figure.axes] == [False, False, True, True]
    colors = [to_hex(line.get_color()) for line in (retrain, ga, cpu)]
    assert [*legend(figure).items()] == [*zip(("retrain", "ga", "cpu_ga"), colors, strict=True)]


def test_klom_dots_have_their_chance_as_a_grey_line():
    rows = [{"method": "ga", "KLOM_forget": 1, "KLOM_retain": 2}]
    rows += [{"method": "cpu_ga", "KLOM_forget": 3, "KLOM_test": 0.5}]
    rows = [row | {f"{key}_chance": row[key] / 4 for key in row if key != "method"} for row in rows]
    figure = figures.klom_dots(rows)
    assert [axis.get_title().split()[0] for axis in figure.axes] == ["forget", "retain", "test"]
    drawn = [[list(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert drawn == [[[0.75] * 2, [3], [0.25] * 2, [1]], [[0.5] * 2, [2]], [[0.125] * 2, [0.5]]]
    assert [line.get_ydata().mean() for line in figure.axes[0].lines] == [0, 0, 1, 1]
    assert texts(figure.axes[0].get_yticklabels()) == ["cpu_ga", "ga"]


def test_histogram_data_are_scores_of_the_image_sets_of_the_split():
    generator = torch.Generator().manual_seed(0)

    def output(n):
        logits = torch.randn(n, 3, generator=generator)
        return metrics.Output(logits, torch.randint(3, (n,), generator=generator))

    forget, retain, held_out = output(5), output(9), output(40)
    draws = metrics.draw_splits(40, 3, seed=1)
    outputs = metrics.Outputs(forget, retain, held_out, [10, 20], draws)
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.1, 0.4)))
    actual = figures.histogram_data(conformal_scores)
    log_odds = -held_out.logits.double().softmax(dim=1)[range(40), held_out.labels].logit()
    of_forget = -forget.logits.double().softmax(dim=1)[range(5), forget.labels].logit()
    expected = {"forget": of_forget, "calibration": log_odds[:20], "test": log_odds[20:]}
    for part, values in expected.items():
        assert actual[part] == pytest.approx(values.numpy())
    # k = ⌈21 · 0.9⌉ = 19
    q_hat = log_odds[:20].sort().values[18].item()
    assert actual["q_hat"] == pytest.approx(q_hat)
    figure = figures.score_histograms({"ga": actual, "ssd": actual | {"q_hat": NAN}}, 0.1)
    (ga, unknown), edges = figure.axes, np.linspace(-14, 14, 57)
    assert points(ga.lines[0]) == [(pytest.approx(q_hat), y) for y in (0, 1)]
    assert np.isnan(unknown.lines[0].get_xdata()).all() and "ssd (" in unknown.get_title()
    colors = list(legend(figure).values())
    for part, color in zip(("forget", "test", "calibration"), colors, strict=False):
        (steps,) = (p for p in ga.patches if to_hex(p.get_edgecolor()) == color)
        shares = np.histogram(expected[part], edges)[0] / len(expected[part])
        assert steps.get_xy()[1:-1:2, 1] == pytest.approx(shares), part


def test_sheet_shows_each_image_with_its_prediction_and_set():
    classes = ["cat", "dog", "eel", *(f"class number {number}" for number in range(3, 12))]
    pixels = BLACK_PIXELS + np.array([10, 20, 30], np.uint8)[:, None, None, None]
    entries = [(0, 0, 1, [1, 0]), (1, 2, 0, [*range(9)]), (2, 1, 2, [])]
    images = [FakeForgotten(*entry) for entry in entries]
    figure = figures.fake_sheet(images, pixels, classes=classes, title="t" * 121)
    assert [axis.images[0].get_array()[0, 0, 0] for axis in figure.axes] == [10, 20, 30]
    first, second, third = (axis.get_title() for axis in figure.axes)
    assert first == "cat → dog\n{dog, [cat]}" and third == "dog → eel\n{}"
    label, *lines = second.splitlines()
    assert label == "eel → cat" and max(map(len, lines)) <= 26
    assert " ".join(lines) == f"{{cat, dog, [eel], {', '.join(classes[3:8])}, …}}"
    assert figure.get_suptitle() == "t" * 60 + "…" + "t" * 59
    (width, height), pixels = figure.get_size_inches(), np.repeat(pixels, 3, axis=0)
    many = figures.fake_sheet(images * 3, pixels, classes=classes, title="")
    assert many.get_figwidth() > width and many.get_figheight() > 1.5 * height
