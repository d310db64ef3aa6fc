"""Pictures of an evaluation, as matplotlib Figures: pure functions of what the metrics found.

Colours are Okabe and Ito's, which the colour-blind tell apart; what has the same colour has another marker or line.
"""

import math

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import CR, scores

STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.3,
}
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
PALETTE = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
PARTS = {"forget": (RED, "-"), "test": (BLUE, "--"), "calibration": (BLACK, ":")}


def styled(function):
    """Draw with the settings of STYLE, and leave the caller's as they are."""

    def draw(*arguments, **options):
        with rc_context(STYLE):
            return function(*arguments, **options)

    draw.__doc__ = function.__doc__
    return draw


def looks(names):
    """{method: (colour, marker, line)}: a CPU variant has its base's colour and marker, hollow and dashed."""
    bases = list(dict.fromkeys(name.removeprefix("cpu_") for name in names if name not in ("original", "retrain")))
    found = {"original": (BLACK, "*", ":"), "retrain": (BLACK, "o", "-")}
    for number, base in enumerate(base for base in bases if base != "retrain"):
        found[base] = (PALETTE[number % len(PALETTE)], MARKERS[(number + 1) % len(MARKERS)], "-")
    for name in names:
        if name not in found:
            colour, marker, _ = found.get(name.removeprefix("cpu_"), (BLACK, "o", "-"))
            found[name] = (colour, marker, "--")
    return {name: found[name] for name in names}


def overview(rows, score, cal_size):
    """The pictures that compare all models: {file name: (caption, Figure)}, from the flat rows of a table.

    ``rows`` are dicts with method, alpha, score, cal_size and the metrics; those of ``score`` and ``cal_size`` are
    drawn, the bars and the plane at the smallest α at which most methods have a finite q̂. {} without such rows.
    """
    rows = [row for row in rows if (row["score"], row["cal_size"]) == (score, cal_size) and "test_CR" in row]
    if not rows:
        return {}
    known = [row["alpha"] for row in rows if not math.isnan(row["test_CR"])] or [row["alpha"] for row in rows]
    alpha = max(sorted(known), key=known.count)
    at_alpha = {row["method"]: row for row in rows if row["alpha"] == alpha}
    forget = CR.judged_forget_images(rows[0])
    keys = {"alpha": "alpha", "test_coverage": "test_coverage", "test_CR": "test_CR"}
    keys |= {"forget_coverage": f"{forget}_coverage", "forget_CR": f"{forget}_CR"}
    curves = {
        name: {key: [row[at] for row in rows if row["method"] == name] for key, at in keys.items()}
        for name in dict.fromkeys(row["method"] for row in rows)
    }
    points = {name: (row["test_CR"], row[f"{forget}_CR"]) for name, row in at_alpha.items()}
    counts = {
        name: (row[f"{forget}_misclassified"], row[f"{forget}_fake"], row["num_forget"])
        for name, row in at_alpha.items()
    }
    return {
        "fake_forgetting.png": ("Fake forgetting", fake_bars(counts, alpha)),
        "cr_plane.png": ("CR on forget against CR on test images", ratio_plane(points, alpha)),
        "against_alpha.png": ("Coverage and CR against α", against_alpha(curves)),
    }


def histogram_data(outputs, settings):
    """What :func:`score_histograms` draws of one model: thr scores of the split's own parts, and q̂ at the first α."""
    size, held_out = max(outputs.cal_sizes), scores.true_label_scores(*outputs.held_out)
    scored = CR.score_part(outputs.held_out, scores.Score(), "held_out")
    q_hat = CR.split_q_hats(scored, outputs, size, settings.alphas[:1], draws=1)
    return {
        "forget": scores.true_label_scores(*outputs.forget).numpy(),
        "test": held_out[outputs.test()].numpy(),
        "calibration": held_out[outputs.calibration(size)].numpy(),
        "q_hat": scores.from_log_odds(q_hat).item(),
    }


@styled
def score_histograms(samples, alpha):
    """Histograms of the own label's score for forget, test and calibration images, one model a row, q̂ drawn in.

    ``samples`` is {method: {"forget": N, "test": N, "calibration": N, "q_hat": float}} of scores in numpy arrays, q̂ NaN
    where it is infinite. Scores crowd at both ends, so the axis is the logit of the score.
    """
    columns = min(4, len(samples))
    rows = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(2.6 * columns, 1.7 * rows + 0.7))
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    edges = np.linspace(-14, 14, 57)
    for axis, (name, found) in zip(axes, samples.items(), strict=False):
        for part, (colour, line) in PARTS.items():
            values = np.clip(_logit(found[part]), edges[0], edges[-1])
            axis.hist(
                values, edges, weights=np.full(len(values), 1 / max(len(values), 1)),
                histtype="step", color=colour, linestyle=line, linewidth=1.2,
            )  # fmt: skip
        if math.isfinite(found["q_hat"]):
            place = float(np.clip(_logit(np.array([found["q_hat"]])), edges[0], edges[-1])[0])
            axis.axvline(place, color=GREEN, linewidth=1.6)
            axis.axvspan(edges[0], place, color=GREEN, alpha=0.08, linewidth=0)
        axis.set_title(name if math.isfinite(found["q_hat"]) else f"{name} ({NO_Q_HAT})")
        axis.set_yticks([])
        axis.grid(False)
        ticks = [1e-6, 1e-3, 0.5, 1 - 1e-3]
        axis.set_xticks(_logit(np.array(ticks)), ["10⁻⁶", "10⁻³", "½", ".999"])
    for axis in axes[len(samples) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=colour, linestyle=line) for colour, line in PARTS.values()]
    figure.legend(
        [*handles, Line2D([], [], color=GREEN, linewidth=1.6)], [*PARTS, "q̂: what is left of it is in the set"],
        loc="outside lower center", ncols=4,
    )  # fmt: skip
    figure.suptitle(
        f"Score 1 − p of the true label: where forget images lie left of q̂, their label is in the set (α = {alpha:g})"
    )
    return figure


def _logit(values):
    values = np.clip(values, 1e-300, 1 - 1e-16)
    return np.log(values) - np.log1p(-values)


@styled
def against_alpha(curves):
    """Coverage and CR of forget and test images against α, all models in one picture.

    ``curves`` is {method: {"alpha": [...], "forget_coverage": [...], "test_coverage", "forget_CR", "test_CR"}}.
    """
    figure = Figure(figsize=(8.2, 5.6))
    axes = figure.subplots(2, 2, sharex=True)
    titles = {
        "forget_coverage": "Coverage of forget images (low: forgotten)",
        "test_coverage": "Coverage of test images (1 − α, by construction)",
        "forget_CR": "CR of forget images (low: forgotten)",
        "test_CR": "CR of test images (high: useful)",
    }
    style = looks(curves)
    for axis, (key, title) in zip(axes.ravel(), titles.items(), strict=True):
        for name, curve in curves.items():
            colour, marker, line = style[name]
            axis.plot(
                curve["alpha"], curve[key], color=colour, marker=marker, linestyle=line, markersize=4.5,
                markerfacecolor="white" if line == "--" else colour, label=name, zorder=3 if name == "retrain" else 2,
                linewidth=2.2 if name == "retrain" else 1.1,
            )  # fmt: skip
        if key == "test_coverage":
            alphas = sorted({alpha for curve in curves.values() for alpha in curve["alpha"]})
            axis.plot(alphas, [1 - alpha for alpha in alphas], color="#999999", linewidth=0.8, zorder=1)
        axis.set_title(title)
        _say_if_nothing(axis, [value for curve in curves.values() for value in curve[key]])
    for axis in axes[1]:
        axis.set_xlabel("miscoverage level α")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


@styled
def ratio_plane(points, alpha):
    """CR on forget images against CR on test images, every method a labelled point, Retrain marked.

    ``points`` is {method: (test_CR, forget_CR)}; those with a NaN are left out.
    """
    figure = Figure(figsize=(5.8, 4.8))
    axis = figure.subplots()
    points = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    _say_if_nothing(axis, [1.0] * len(points))
    style = looks(points)
    if "retrain" in points:
        x, y = points["retrain"]
        axis.axvline(x, color="#999999", linewidth=0.8, linestyle=":")
        axis.axhline(y, color="#999999", linewidth=0.8, linestyle=":")
        axis.plot(x, y, marker="o", markersize=15, color="none", markeredgecolor=BLACK, markeredgewidth=1.2)
    for name, (x, y) in points.items():
        colour, marker, line = style[name]
        axis.plot(
            x, y, marker=marker, color=colour, linestyle="none", markersize=7,
            markerfacecolor="white" if line == "--" else colour, markeredgewidth=1.3,
        )  # fmt: skip
    axis.margins(0.16)
    for name, place in _spread_labels(axis, points).items():
        axis.annotate(
            name, points[name], xytext=place, textcoords="offset points", fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            weight="bold" if name == "retrain" else "normal",
        )  # fmt: skip
    axis.set_xlabel("CR on test images (right: useful)")
    axis.set_ylabel("CR on forget images (down: forgotten)")
    reference = ": the dotted lines meet at Retrain" if "retrain" in points else ""
    axis.set_title(f"Forgetting against usefulness (α = {alpha:g}){reference}")
    return figure


def _spread_labels(axis, points):
    """Offsets in points for the labels: each as near to its point as it is clear of the points and of the labels placed
    before it, within the axes where it can be."""
    axis.figure.draw_without_rendering()
    scale = 72 / axis.figure.dpi
    window = axis.get_window_extent()
    low, high = (np.array(corner) * scale for corner in ((window.x0, window.y0), (window.x1, window.y1)))
    at = {name: axis.transData.transform(point) * scale for name, point in points.items()}
    height, placed, found = 9, [], {}

    def crowding(box, width):
        left, bottom = box
        labels = sum(
            left < x + w and x < left + width and bottom < y + height and y < bottom + height for x, y, w in placed
        )
        marks = sum(left - 4 < x < left + width + 4 and bottom - 3 < y < bottom + height + 3 for x, y in at.values())
        outside = left < low[0] or left + width > high[0] or bottom < low[1] or bottom + height > high[1]
        return labels + marks + outside

    for name in sorted(points, key=lambda name: points[name][1]):
        width = 4.3 * len(name) + 2
        boxes = [
            (at[name][0] + (8 if right else -8 - width), at[name][1] - 3 + sign * 5.5 * ring)
            for ring in range(16)
            for right in (True, False)
            for sign in ((1, -1) if ring else (1,))
        ]
        best = min(boxes, key=lambda box: crowding(box, width))
        placed.append((*best, width))
        found[name] = (best[0] - at[name][0], best[1] - at[name][1])
    return found


@styled
def fake_bars(counts, alpha):
    """Of the misclassified forget images, how many keep their label in the set: bars, all models.

    ``counts`` is {method: (misclassified, fake, number of forget images)}, fake NaN where no q̂ is finite.
    """
    figure = Figure(figsize=(6.6, 0.27 * len(counts) + 1.5))
    axis = figure.subplots()
    places = np.arange(len(counts))[::-1]
    _say_if_nothing(axis, [fake for _, fake, _ in counts.values()])
    for place, (wrong, fake, total) in zip(places, counts.values(), strict=True):
        if math.isnan(fake):
            axis.text(0, place, f" – of {_short(wrong)}", va="center", fontsize=7.5)
            continue
        axis.barh(place, fake / total, color=RED, height=0.7)
        axis.barh(place, (wrong - fake) / total, left=fake / total, color=SKY, height=0.7)
        text = f"{_short(fake)} of {_short(wrong)}" + (f" ({fake / wrong:.0%})" if wrong else "")
        axis.text(wrong / total, place, f" {text}", va="center", fontsize=7.5)
    axis.set_yticks(places, list(counts))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share of the forget images that are misclassified")
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.2)
    axis.set_title(f"Fake forgetting (α = {alpha:g}): misclassified, and the label is still in the set")
    figure.legend(
        [Line2D([], [], color=RED, linewidth=6), Line2D([], [], color=SKY, linewidth=6)],
        ["label still in the set (fake)", "label out of the set"], loc="outside lower center", ncols=2,
    )  # fmt: skip
    return figure


NO_Q_HAT = "no finite q̂"


def _say_if_nothing(axis, values):
    """Where none of ``values`` is a number, the axes say why."""
    if all(map(math.isnan, values)):
        axis.text(0.5, 0.5, NO_Q_HAT, ha="center", va="center", transform=axis.transAxes)


def _short(count):
    return f"{count:.0f}" if count == round(count) or count >= 100 else f"{count:.1f}"


@styled
def fake_sheet(entries, classes, title):
    """The most fake-forgotten images with their sets.

    ``entries`` are (image H×W×3 uint8, true label, prediction, labels in the set by probability); None where no q̂ is
    finite.
    """
    nothing = NO_Q_HAT if entries is None else "no misclassified image\nkeeps its label in the set"
    entries = entries or []
    columns = min(6, max(1, len(entries)))
    rows = max(1, math.ceil(len(entries) / columns))
    figure = Figure(figsize=(1.55 * columns + 0.2, 2.0 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (image, label, prediction, inside) in zip(axes, entries, strict=False):
        axis.imshow(image, interpolation="nearest")
        names = [f"[{classes[number]}]" if number == label else classes[number] for number in inside]
        lines, line = [], ""
        for name in names[:8] + (["…"] if len(names) > 8 else []):
            if line and len(line) + len(name) > 22:
                lines.append(line)
                line = ""
            line += (", " if line else "") + name
        axis.set_title(f"{classes[label]} → {classes[prediction]}\n{{{chr(10).join([*lines, line])}}}", fontsize=6.5)
    if not entries:
        axes[0].text(0.5, 0.5, nothing, ha="center", va="center")
    figure.suptitle(title)
    return figure


@styled
def relearn_curves(curves, alpha):
    """Accuracy and coverage of forget images that are not trained on while the others are learnt again, step by step.

    ``curves`` is {method: {"step": [...], "accuracy": [...], "coverage": [...]}}.
    """
    figure = Figure(figsize=(8.2, max(3.4, 0.19 * len(curves) + 0.8)))
    axes = figure.subplots(1, 2, sharex=True)
    style = looks(curves)
    for axis, (key, title) in zip(
        axes, {"accuracy": "Accuracy", "coverage": f"Coverage (α = {alpha:g})"}.items(), strict=True
    ):
        for name, curve in curves.items():
            colour, marker, line = style[name]
            axis.plot(
                curve["step"], curve[key], color=colour, marker=marker, linestyle=line, markersize=4, label=name,
                markerfacecolor="white" if line == "--" else colour, linewidth=2.2 if name == "retrain" else 1.1,
            )  # fmt: skip
        axis.set_title(title)
        _say_if_nothing(axis, [value for curve in curves.values() for value in curve[key]])
        axis.set_xlabel("steps of training on a tenth")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.suptitle("Do they come back? Nine tenths of the forget images while the other tenth is learnt again")
    return figure
