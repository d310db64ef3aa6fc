"""Pictures of an evaluation: each function takes numbers and returns a matplotlib Figure.

The colors are those of Okabe and Ito, which color-blind readers can distinguish. Methods of the
same color differ in marker or line. Numbers that are missing (None, NaN) are left out.
"""

import math
import textwrap

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.special import logit

from .. import CR, ensembles
from . import tables
from .tables import is_missing

FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "Arial Unicode MS")
STYLE = {
    "font.family": [name for name in FONTS if name in font_manager.get_font_names()],
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a $ in a name is a dollar sign
}
styled = rc_context(STYLE)  # a decorator: the caller's settings are left unchanged
ORANGE, SKY, GREEN, BLUE, RED, PINK, BLACK, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000", "#999999",
)  # fmt: skip
PALETTE = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")  # with 6 colors: 66 looks
PARTS = {"forget": (RED, "-"), "test": (BLUE, "--"), "calibration": (BLACK, ":")}
GUIDE = {"color": GREY, "linewidth": 0.8}
POINT = {"markersize": 7, "markeredgewidth": 1.3, "linestyle": "none"}
MIDDLE = {"ha": "center", "va": "center"}
LEGEND_RIGHT = {"loc": "outside right center"}
LEGEND_BELOW = {"loc": "outside lower center", "ncols": 4}
LONGEST_NAME, LONGEST_TITLE = 24, 120  # characters
MOST_POINTS, MOST_CLASSES = 8, 12  # methods of the plane, columns of the predicted classes
MOST_LABELS = 8  # labels of a prediction set that the sheet lists
LOGIT_EDGES = np.linspace(-14, 14, 57)
NO_Q_HAT = "no finite q̂"
NOTHING_FAKE = "no misclassified image\nkeeps its label in the set"
RELEARNED = {  # what the model is trained on again, and the images that are measured
    "forget": ("a tenth of the forget images", "the other forget images"),
    "retain": ("retain images", "all forget images"),
}


# ---------------------------------------------------------------- names and looks


def printable(name, longest=LONGEST_NAME):
    """A name on one line of at most ``longest`` characters. Longer names lose their middle."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(name).split()))
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[1 - longest // 2 :]}"
    return text


def looks(names):
    """{method: keywords of a plot}. A CPU variant looks like its base, but hollow and dashed."""
    styles = {"original": (BLACK, "*"), "retrain": (BLACK, "o")}
    bases = dict.fromkeys(name.removeprefix("cpu_") for name in names)
    for number, base in enumerate(base for base in bases if base not in styles):
        styles[base] = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    drawn = {}
    for name in names:
        color, marker = styles[name.removeprefix("cpu_")]
        is_cpu = name.startswith("cpu_")
        face, line = ("white", "--") if is_cpu else (color, "-")
        drawn[name] = {"color": color, "markerfacecolor": face, "marker": marker, "linestyle": line}
    return drawn


def _say_if_nothing(axis, values):
    """Where all of ``values`` are missing, the axes give the reason."""
    if all(map(is_missing, values)):
        axis.text(0.5, 0.5, NO_Q_HAT, transform=axis.transAxes, **MIDDLE)


# ---------------------------------------------------------------- all models in one picture


def overview(rows, score, cal_size, ensemble_rows=()):
    """The pictures that compare all models: {file name: (caption, Figure)}.

    ``rows`` are those of results.csv. The rows of ``score`` and ``cal_size`` are drawn. The bars
    and the plane show the smallest α at which most methods have a finite q̂. {} without such rows.
    """
    rows = [tables.means_of(row) for row in tables.rows_of_sets(rows)]
    rows = [row for row in rows if (row["score"], row["cal_size"]) == (score, cal_size)]
    if not rows:
        return {}
    known = [row["alpha"] for row in rows if not is_missing(row["test_CR"])]
    alpha = max(sorted({row["alpha"] for row in rows}), key=known.count)
    at_alpha = [row for row in rows if row["alpha"] == alpha]
    drawn = {
        "fake_forgetting.png": ("Fake forgetting", fake_bars(at_alpha)),
        "cr_plane.png": ("CR on forget against CR on test images", cr_plane(at_alpha)),
        "against_alpha.png": ("Coverage and CR against α", against_alpha(rows)),
    }
    if compute := gap_against_time(at_alpha, ensemble_rows):
        drawn["compute.png"] = "Gap to Retrain against running time", compute
    return drawn


@styled
def fake_bars(rows):
    """Bars: how many of the misclassified forget images keep their label in the set.

    ``rows`` have one α and no standard deviations.
    """
    forget = CR.forget_group(rows[0])
    figure, (axis,) = _rows_of_methods([row["method"] for row in rows], (6.6, 1.5, 0.27))
    for position, row in enumerate(reversed(rows)):
        wrong, fake = row[f"{forget}_misclassified"], row[f"{forget}_fake"]
        end, text = 0, tables.fake_of_wrong(row)
        if not is_missing(fake):
            inside, end = fake / row["num_forget"], wrong / row["num_forget"]
            axis.barh(position, inside, color=RED, height=0.7)
            axis.barh(position, end - inside, left=inside, color=SKY, height=0.7)
            text += f" ({fake / wrong:.0%})" if wrong else ""
        axis.text(end, position, f" {text}", va="center", fontsize=7.5)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share of the forget images that are misclassified")
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.2)  # for the text to the right of a bar
    axis.set_title(f"Fake forgetting (α = {rows[0]['alpha']:g}): misclassified, label in the set")
    swatches = [Line2D([], [], color=color, linewidth=6) for color in (RED, SKY)]
    figure.legend(swatches, ["label in the set (fake)", "label out of the set"], **LEGEND_BELOW)
    return figure


def _rows_of_methods(names, size, columns=1):
    """A figure (width, height around, height per method; inches) with the names on the y axis."""
    width, around, height = size
    figure = Figure(figsize=(width, around + height * len(names)))
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.set_yticks(range(len(names)), map(printable, reversed(names)))
        axis.set_ylim(-0.6, len(names) - 0.4)
    return figure, axes


@styled
def cr_plane(rows):
    """CR on forget images against CR on test images: a point per method, Retrain marked.

    ``rows`` have one α and no standard deviations. At most eight methods are drawn: the original
    model, Retrain, and those nearest to Retrain in this plane.
    """
    forget = CR.forget_group(rows[0])
    known = {row["method"]: (row["test_CR"], row.get(f"{forget}_CR")) for row in rows}
    known = {name: point for name, point in known.items() if not any(map(is_missing, point))}
    center = known.get("retrain", (1, 0))
    order = sorted(known, key=lambda name: (name != "original", math.dist(known[name], center)))
    points = {name: known[name] for name in known if name in order[:MOST_POINTS]}
    figure = Figure(figsize=(7.2, 4.8))
    axis = figure.subplots()
    _say_if_nothing(axis, [x for x, _ in points.values()])
    title = f"Forgetting against usefulness (α = {rows[0]['alpha']:g})"
    if "retrain" in points:
        x, y = points["retrain"]
        axis.axvline(x, linestyle=":", **GUIDE)
        axis.axhline(y, linestyle=":", **GUIDE)
        title += ": the dotted lines meet at Retrain"
    if left_out := len(known) - len(points):
        title += f"\n{left_out} methods farther away are left out"
    style = looks(points)
    marks = [axis.plot(*point, **(style[name] | POINT))[0] for name, point in points.items()]
    figure.legend(marks, map(printable, points), **LEGEND_RIGHT)
    axis.margins(0.16)
    axis.set_xlabel("CR on test images (right: useful)")
    axis.set_ylabel("CR on forget images (down: forgotten)")
    axis.set_title(title)
    return figure


@styled
def gap_against_time(rows, ensemble_rows=()):
    """Gap to Retrain against running time: a line of Retrain's runs, a point per other method.

    The line joins the runs whose ``base_method`` is retrain. The original model and models without
    a time are dashed levels. ``rows`` have one α and no standard deviations. ``ensemble_rows`` add
    KLOM, with Retrain at its mean by chance. None without gaps or times.
    """
    seconds = {row["method"]: row["seconds"] for row in rows if not is_missing(row.get("seconds"))}
    seconds.pop("original", None)
    if not seconds or "gap" not in rows[0]:
        return None
    panels = {"gap in percentage points": {row["method"]: 100 * row["gap"] for row in rows}}
    if ensemble_rows:
        klom = {row["method"]: row.get("KLOM_forget") for row in ensemble_rows}
        klom["retrain"] = np.mean([row["KLOM_forget_chance"] for row in ensemble_rows])
        panels["median KLOM of forget images"] = klom
    base = {row["method"]: row["base_method"] for row in rows}
    retrained = [name for name in sorted(seconds, key=seconds.get) if base[name] == "retrain"]
    others = [name for name in base if name not in retrained]
    figure = Figure(figsize=(1.8 + 3.9 * len(panels), 4))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        line = [(seconds[name], values.get(name)) for name in retrained]
        curves = {name: [(seconds.get(name), values.get(name))] for name in others}
        lines = _draw_curves(axis, {"retrain": line} | curves)
        for name in sorted(curves.keys() - seconds.keys()):
            lines[name].set(linestyle="--", marker="")  # for the legend
            axis.axhline(values.get(name, math.nan), color=lines[name].get_color(), linestyle="--")
        axis.set(xlabel="running time in seconds", ylabel=label)
        axis.set_ylim(bottom=0)
        if max(seconds.values()) > 8 * min(seconds.values()):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(lines.values(), map(printable, lines), **LEGEND_RIGHT)
    figure.suptitle("Above the line, retraining for the same time is better")
    return figure


@styled
def destination_tables(rows):
    """Predicted classes of a forgotten class's images, in %: a row per method, a panel per part.

    ``rows`` are those of destinations.csv. The classes with the largest shares are shown.
    """
    keys = ("method", "part", "predicted_class")
    methods, parts, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in keys)
    figure, axes = _rows_of_methods(methods, (8.6, 1.6, 0.27), len(parts))
    shares = np.reshape([100 * row["share"] for row in rows], (len(methods), len(parts), -1))
    shown = np.sort(np.argsort(-np.nanmax(shares, axis=(0, 1)), kind="stable")[:MOST_CLASSES])
    for axis, part, values in zip(axes, parts, shares[::-1, :, shown].swapaxes(0, 1), strict=True):
        axis.imshow(values, cmap="Blues", vmin=0, vmax=150, aspect="auto", origin="lower")
        for row, column in np.argwhere(values >= 0.5):
            axis.text(column, row, f"{values[row, column]:.0f}", fontsize=7, **MIDDLE)
        axis.set_xticks(range(len(shown)), [printable(classes[i], 12) for i in shown], rotation=90)
        axis.set_title(f"{part.replace('_', ' ')} images")
        axis.grid(False)
    figure.suptitle("Predicted classes of the forgotten class's images, in %")
    return figure


# ---------------------------------------------------------------- curves


@styled
def against_alpha(rows):
    """Coverage and CR of forget and test images against α, for all models.

    ``rows`` are those of all α, without standard deviations.
    """
    forget = CR.forget_group(rows[0])
    figure = Figure(figsize=(8.2, 5.6))
    panels = {
        f"{forget}_coverage": "Coverage of forget images (low: forgotten)",
        "test_coverage": "Coverage of test images (1 − α, by construction)",
        f"{forget}_CR": "CR of forget images (low: forgotten)",
        "test_CR": "CR of test images (high: useful)",
    }
    levels = sorted({row["alpha"] for row in rows})
    axes = figure.subplots(2, 2, sharex=True)
    axes[0, 1].plot(levels, [1 - alpha for alpha in levels], zorder=1, **GUIDE)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        curves = {}
        for row in rows:
            curves.setdefault(row["method"], []).append((row["alpha"], row.get(key)))
        lines = _draw_curves(axis, curves)
        axis.set(title=title, xlabel="miscoverage level α" if axis in axes[1] else "")
    figure.legend(lines.values(), map(printable, lines), **LEGEND_RIGHT)
    return figure


def _draw_curves(axis, curves):
    """A line for {method: [(x, y), …]} each, Retrain's thick and in front. → {method: line}"""
    lines = {}
    for name, look in looks(curves).items():
        x, y = np.array(curves[name], dtype=float).reshape(-1, 2).T
        (lines[name],) = axis.plot(x, y, zorder=2, **look)
        if name == "retrain":
            lines[name].set(zorder=3, linewidth=2.2)
    _say_if_nothing(axis, [y for curve in curves.values() for _, y in curve])
    return lines


@styled
def relearn_curves(curves, alpha):
    """Accuracy and coverage of forget images while the model is trained on other images.

    A row of panels for each kind of these images. ``curves`` is {"forget" or "retain": {method:
    {"step": [...], "accuracy": [...], "coverage": [...]}}}.
    """
    most = max(map(len, curves.values()))
    figure = Figure(figsize=(8.2, max(3.4 * len(curves), 0.19 * most + 0.8)))
    axes = figure.subplots(len(curves), 2, sharex="row", squeeze=False)
    titles = {"accuracy": "Accuracy", "coverage": f"Coverage (α = {alpha:g})"}
    lines = {}
    for row, (source, methods) in zip(axes, curves.items(), strict=True):
        trained, images = RELEARNED[source]
        for axis, (key, title) in zip(row, titles.items(), strict=True):
            measured = {name: [*zip(c["step"], c[key], strict=True)] for name, c in methods.items()}
            lines |= _draw_curves(axis, measured)
            axis.set(title=f"{title} of {images}", xlabel=f"steps on {trained}")
    figure.legend(lines.values(), map(printable, lines), **LEGEND_RIGHT)
    figure.suptitle("Relearning of the forget images")
    return figure


@styled
def q_hat_curves(q_hats):
    """q̂ at the start of each epoch of the conformal loss. ``q_hats`` is {method: list of q̂}."""
    figure = Figure(figsize=(7.2, 3.2))
    axis = figure.subplots()
    lines = _draw_curves(axis, {name: [*enumerate(q_hats[name], 1)] for name in q_hats})
    figure.legend(lines.values(), map(printable, lines), **LEGEND_RIGHT)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="q̂ (score 1 − p)")
    axis.set_title("q̂ of the conformal loss, recomputed at the start of every epoch")
    return figure


@styled
def klom_dots(rows):
    """KLOM of forget, retain and test images: a dot per method, and its chance as a grey line.

    ``rows`` are those of :func:`metrics.ensembles.rows`. Dots are medians over the images. The
    chance is the mean over random relabelings of the same trainings.
    """
    names = [row["method"] for row in rows]
    look_of = looks(names)
    figure, axes = _rows_of_methods(names, (8.2, 1.3, 0.25), len(ensembles.PARTS))
    for axis, part in zip(axes, ensembles.PARTS, strict=True):
        key = f"KLOM_{part}"
        for position, row in enumerate(reversed(rows)):
            if not is_missing(row.get(key)):
                by_chance, ends = row[f"{key}_chance"], [position - 0.4, position + 0.4]
                axis.plot([by_chance] * 2, ends, color=GREY, linewidth=3)
                axis.plot(row[key], position, **(look_of[row["method"]] | POINT))
        axis.set(title=f"{part} images", xlabel="KLOM (grey: no difference)")
        axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
    figure.suptitle("Distance to retrained models; grey: the same trainings, randomly relabeled")
    return figure


# ---------------------------------------------------------------- a panel for each model or image


def _panels(count, per_row, size):
    """A figure of ``count`` panels (width, height, height around all; inches), and their axes."""
    width, height, around = size
    columns = min(per_row, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(6.2, width * columns), height * rows + around))  # title: 6.2
    return figure, [figure.add_subplot(rows, columns, 1 + number) for number in range(count)]


def histogram_data(conformal_scores):
    """What :func:`score_histograms` draws of a model: its scores by part, and q̂ at the first α.

    Both are log-odds, and those of the split itself and the first score.
    """
    held_out, outputs = conformal_scores.part("held_out").true_label, conformal_scores.outputs
    return {
        "forget": conformal_scores.part("forget").true_label.numpy(),
        "test": held_out[outputs.test()].numpy(),
        "calibration": held_out[outputs.calibration(conformal_scores.largest_size)].numpy(),
        "q_hat": conformal_scores.q_hats()[0, 0].item(),
    }


@styled
def score_histograms(samples, alpha):
    """Histograms of the true label's score for forget, test and calibration images, with q̂.

    A panel for each model. ``samples`` is {method: {"forget": N, "test": N, "calibration": N,
    "q_hat": float}} with log-odds of scores in arrays. q̂ is NaN where it is infinite. Most scores
    are near 0 or 1, so the axis shows log-odds.
    """
    figure, axes = _panels(len(samples), 4, (2.6, 1.8, 0.7))
    low, high = LOGIT_EDGES[0], LOGIT_EDGES[-1]
    for axis, (name, sample) in zip(axes, samples.items(), strict=True):
        for part, (color, line) in PARTS.items():
            values = np.clip(sample[part], low, high)
            style = {"color": color, "linestyle": line, "histtype": "step"}
            axis.hist(values, LOGIT_EDGES, weights=np.ones(len(values)) / len(values), **style)
        position = np.clip(sample["q_hat"], low, high)  # nothing is drawn at NaN
        axis.axvline(position, color=GREEN, linewidth=1.6)
        axis.axvspan(low, position, color=GREEN, alpha=0.08, linewidth=0)
        axis.set_title(printable(name) + f" ({NO_Q_HAT})" * is_missing(sample["q_hat"]))
        axis.set_xticks(logit([1e-6, 1e-3, 0.5, 1 - 1e-3]), ["10⁻⁶", "10⁻³", "½", ".999"])
        axis.set(xlim=(low - 1, high + 1), yticks=[])
        axis.grid(False)
    legend = PARTS | {"q̂: labels to its left are in the set": (GREEN, "-")}
    handles = [Line2D([], [], color=color, linestyle=line) for color, line in legend.values()]
    figure.legend(handles, legend, **LEGEND_BELOW)
    figure.suptitle(f"Score 1 − p of the true label, and q̂ at α = {alpha:g}")
    return figure


@styled
def fake_sheet(images, pixels, *, classes, title):
    """The most fake-forgotten images with their prediction sets.

    ``images`` are :class:`metrics.samples.FakeForgotten`, or None where no q̂ is finite, ``pixels``
    N×H×W×3 (uint8).
    """
    figure, axes = _panels(max(1, len(images or [])), 6, (1.55, 2.0, 0.5))
    for axis in axes:
        axis.set_axis_off()
    for axis, image, shown in zip(axes, images or [], pixels, strict=False):
        axis.imshow(shown, interpolation="nearest")
        axis.set_title(_sheet_title(image, classes), fontsize=6.5)
    if not images:
        axes[0].text(0.5, 0.5, NO_Q_HAT if images is None else NOTHING_FAKE, **MIDDLE)
    figure.suptitle(printable(title, LONGEST_TITLE))
    return figure


def _sheet_title(image, classes):
    """``label → prediction`` and the prediction set, in which brackets mark the label."""
    label, prediction = (printable(classes[number]) for number in (image.label, image.prediction))
    shown = image.prediction_set[:MOST_LABELS]
    names = [f"[{label}]" if each == image.label else printable(classes[each]) for each in shown]
    names += ["…"] * (len(image.prediction_set) > MOST_LABELS)
    lines = f"{label} → {prediction}", f"{{{', '.join(names)}}}"
    return "\n".join(textwrap.fill(line, 26, break_long_words=False) for line in lines)
