"""Pictures of an evaluation, as matplotlib Figures: pure functions of what the metrics found.

Colours are Okabe and Ito's, which the colour-blind tell apart; what has the same colour has another marker or line.
Names of classes and methods are drawn as plain text in any script: see :func:`printable` and :func:`font_families`.
"""

import functools
import math
import unicodedata

import matplotlib
import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression

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
    "text.parse_math": False,  # a $ in a name is a dollar
}
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
PALETTE = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "o")
PARTS = {"forget": (RED, "-"), "test": (BLUE, "--"), "calibration": (BLACK, ":")}


# Sizes in points or inches, and line widths: layout, not content.
SMALL, TINY = {"fontsize": 7.5}, {"fontsize": 6.5}
THICK, THIN = 2.2, 1.1
CURVE = {"markersize": 4.5}
POINT = {"markersize": 7, "markeredgewidth": 1.3, "linestyle": "none"}
RING = {"marker": "o", "markersize": 15, "color": "none", "markeredgecolor": BLACK, "markeredgewidth": 1.2}
GUIDE = {"color": "#999999", "linewidth": 0.8}
LEADER = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
HISTOGRAM = {"histtype": "step", "linewidth": 1.2}
Q_HAT_LINE, Q_HAT_AREA = {"color": GREEN, "linewidth": 1.6}, {"color": GREEN, "alpha": 0.08, "linewidth": 0}
BAR, SWATCH = {"height": 0.7}, {"linewidth": 6}
MIDDLE = {"ha": "center", "va": "center"}
LEGEND_BELOW = {"loc": "outside lower center", "ncols": 4}
LEGEND_RIGHT = {"loc": "outside right center"}
SIZES = {  # inches: width and height of the whole, or of each part and of what surrounds the parts
    "curves": (8.2, 5.6),
    "plane": (6.4, 4.8),
    "bars": (6.6, 1.5, 0.27),
    "histograms": (2.6, 1.7, 0.7),
    "sheet": (1.55, 2.0, 0.5),
    "relearn": (8.2, 3.4, 0.19, 0.8),
}
PER_ROW = {"histograms": 4, "sheet": 6}
MARGIN = 0.16  # of the plane around the points
BAR_MARGINS, BETWEEN_BARS = {"x": 0.2}, 0.6  # room for the text at the end of a bar, and above and below the bars
LABELS_AT, LABEL_GAP = 1.03, 0.042  # of the plane's labels: place on the x-axis, least distance in height
LONGEST_NAME, LONGEST_LINE, LONGEST_TITLE = 24, 22, 120  # characters
MOST_LABELS = 8  # of a set
LOGIT_EDGES = np.linspace(-14, 14, 57)
NO_Q_HAT = "no finite q̂"
NOTHING_FAKE = "no misclassified image\nkeeps its label in the set"
IN_SET, OUT_OF_SET = "label still in the set (fake)", "label out of the set"


def styled(function):
    """Draw with the settings of STYLE and with fonts for all text in the arguments; the caller's settings stay."""

    @functools.wraps(function)
    def draw(*arguments, **options):
        with rc_context(STYLE | {"font.family": font_families(_texts((arguments, options)))}):
            return function(*arguments, **options)

    return draw


def printable(name, longest=LONGEST_NAME):
    """A name as one line of drawable text, at most ``longest`` characters: the middle is left out of longer names.

    White space becomes a space, format characters (directions, joiners) are dropped, and what is not a character
    (control codes, the bytes of names that are not UTF-8) becomes �.
    """
    replaced = {"Cc": "\ufffd", "Cs": "\ufffd", "Cf": "", "Zs": " ", "Zl": " ", "Zp": " "}
    text = "".join(" " if c in "\t\n\r" else replaced.get(unicodedata.category(c), c) for c in str(name)).strip()
    if len(text) > longest:
        half = (longest - 1) // 2
        text = f"{text[: longest - 1 - half]}…{text[-half:]}"
    return text or "(no name)"


def _texts(nest):
    """All strings in a nest of dicts, lists and tuples."""
    if isinstance(nest, str):
        yield nest
    elif isinstance(nest, dict | list | tuple):
        for item in [*nest, *nest.values()] if isinstance(nest, dict) else nest:
            yield from _texts(item)


def font_families(texts):
    """Matplotlib's own font, and fonts of this machine for the characters that it lacks, as ``font.family``."""
    characters = {character for text in texts for character in text if not character.isascii()}
    return ["DejaVu Sans", *_fallbacks(frozenset(c for c in characters if unicodedata.category(c)[0] not in "CZ"))]


@functools.cache
def _fallbacks(characters):
    missing = {character for character in characters if not _has_glyph(font_manager.findfont("DejaVu Sans"), character)}
    own = (
        matplotlib.get_data_path()
    )  # beside DejaVu these are mathematical fonts, and one that has boxes for everything
    fonts = [font for font in font_manager.fontManager.ttflist if not font.fname.startswith(own)]
    found = []
    for font in sorted(fonts, key=lambda font: (font.style != "normal", font.weight != 400, "Sans" not in font.name)):
        if not missing:
            break
        covered = {character for character in missing if _has_glyph(font.fname, character)}
        if covered and font.name not in found:
            found.append(font.name)
            missing -= covered
    return found


def _has_glyph(path, character):
    """Whether a font can draw a character; bitmap fonts (color emoji) and damaged files cannot."""
    try:
        font = font_manager.get_font(path)
        return bool(font.scalable and font.get_char_index(ord(character)))
    except (OSError, RuntimeError):
        return False


def looks(names):
    """{method: (colour, marker, line)}: a CPU variant has its base's colour and marker, hollow and dashed."""
    bases = list(dict.fromkeys(name.removeprefix("cpu_") for name in names if name not in ("original", "retrain")))
    found = {"original": (BLACK, "*", ":"), "retrain": (BLACK, "o", "-")}
    for number, base in enumerate(base for base in bases if base != "retrain"):
        found[base] = (PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], "-")
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
    known = [row["alpha"] for row in rows if not _missing(row["test_CR"])] or [row["alpha"] for row in rows]
    alpha = max(sorted(known), key=known.count)
    at_alpha = {row["method"]: row for row in rows if row["alpha"] == alpha}
    forget = CR.judged_forget_images(rows[0])
    keys = {"alpha": "alpha", "test_coverage": "test_coverage", "test_CR": "test_CR"}
    keys |= {"forget_coverage": f"{forget}_coverage", "forget_CR": f"{forget}_CR"}
    curves = {
        name: {key: [row.get(column) for row in rows if row["method"] == name] for key, column in keys.items()}
        for name in dict.fromkeys(row["method"] for row in rows)
    }
    points = {name: (row["test_CR"], row.get(f"{forget}_CR")) for name, row in at_alpha.items()}
    counts = {
        name: (row.get(f"{forget}_misclassified"), row.get(f"{forget}_fake"), row.get("num_forget"))
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
    q_hats = CR.split_q_hats(scored, outputs, size, settings.alphas)
    return {
        "forget": scores.true_label_scores(*outputs.forget).numpy(),
        "test": held_out[outputs.test()].numpy(),
        "calibration": held_out[outputs.calibration(size)].numpy(),
        "q_hat": scores.from_log_odds(q_hats[0, 0]).item(),
    }


@styled
def score_histograms(samples, alpha):
    """Histograms of the own label's score for forget, test and calibration images, a panel per model, q̂ drawn in.

    ``samples`` is {method: {"forget": N, "test": N, "calibration": N, "q_hat": float}} of scores in numpy arrays, q̂ NaN
    where it is infinite. Scores crowd at both ends, so the axis is the logit of the score.
    """
    figure, axes = _panels("histograms", len(samples), sharex=True)
    low, high = LOGIT_EDGES[0], LOGIT_EDGES[-1]
    for number, (name, sample) in enumerate(samples.items()):
        axis = axes[number]
        for part, (colour, line) in PARTS.items():
            values = np.clip(logit(sample[part]), low, high)
            shares = np.ones_like(values) / len(values)
            axis.hist(values, LOGIT_EDGES, weights=shares, color=colour, linestyle=line, **HISTOGRAM)
        has_q_hat = not _missing(sample["q_hat"])
        if has_q_hat:
            place = np.clip(logit(sample["q_hat"]), low, high)
            axis.axvline(place, **Q_HAT_LINE)
            axis.axvspan(low, place, **Q_HAT_AREA)
        axis.set_title(printable(name) if has_q_hat else f"{printable(name)} ({NO_Q_HAT})")
        axis.set_yticks([])
        axis.grid(False)
        axis.set_xticks(logit([1e-6, 1e-3, 0.5, 1 - 1e-3]), ["10⁻⁶", "10⁻³", "½", ".999"])
    for number, axis in enumerate(axes):
        axis.set_visible(number < len(samples))
        # Panels of a column share their ticks; the lowest one shows the labels.
        axis.tick_params(labelbottom=number + PER_ROW["histograms"] >= len(samples))
    handles = [Line2D([], [], color=colour, linestyle=line) for colour, line in PARTS.values()]
    handles.append(Line2D([], [], **Q_HAT_LINE))
    labels = [*PARTS, "q̂: what is left of it is in the set"]
    figure.legend(handles, labels, **LEGEND_BELOW)
    figure.suptitle(
        f"Score 1 − p of the true label: where forget images lie left of q̂, their label is in the set (α = {alpha:g})"
    )
    return figure


def _panels(kind, count, **options):
    """A figure of ``count`` equal panels in rows, and their axes (the last row filled up)."""
    columns = min(PER_ROW[kind], max(1, count))
    rows = max(1, math.ceil(count / columns))
    width, height, around = SIZES[kind]
    figure = Figure(figsize=(width * columns, height * rows + around))
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def _missing(value):
    """Whether a number is unknown: None, NaN or infinite."""
    return value is None or not math.isfinite(value)


@styled
def against_alpha(curves):
    """Coverage and CR of forget and test images against α, all models in one picture.

    ``curves`` is {method: {"alpha": [...], "forget_coverage": [...], "test_coverage", "forget_CR", "test_CR"}}; missing
    numbers (None, NaN) are left out.
    """
    figure = Figure(figsize=SIZES["curves"])
    rows = [["forget_coverage", "test_coverage"], ["forget_CR", "test_CR"]]
    axes = figure.subplot_mosaic(rows, sharex=True)
    titles = {
        "forget_coverage": "Coverage of forget images (low: forgotten)",
        "test_coverage": "Coverage of test images (1 − α, by construction)",
        "forget_CR": "CR of forget images (low: forgotten)",
        "test_CR": "CR of test images (high: useful)",
    }
    for key, axis in axes.items():
        handles = _draw_curves(axis, {name: (curve["alpha"], curve[key]) for name, curve in curves.items()})
        if key == "test_coverage":
            alphas = sorted({alpha for curve in curves.values() for alpha in curve["alpha"]})
            axis.plot(alphas, [1 - alpha for alpha in alphas], zorder=1, **GUIDE)
        axis.set_title(titles[key])
        if key.endswith("_CR"):  # the lower row
            axis.set_xlabel("miscoverage level α")
    _name_curves(figure, handles, curves)
    return figure


def _draw_curves(axis, curves):
    """A line for each of {method: (x, y)}, Retrain's thick and in front. Returns the lines."""
    looked, lines = looks(curves), []
    for name, (x, y) in curves.items():
        colour, marker, line = looked[name]
        known = [number for number, value in enumerate(y) if not _missing(value)]
        lines += axis.plot(
            [x[number] for number in known], [y[number] for number in known],
            color=colour, marker=marker, linestyle=line, markerfacecolor=_face(colour, line),
            zorder=3 if name == "retrain" else 2, linewidth=THICK if name == "retrain" else THIN, **CURVE,
        )  # fmt: skip
    _say_if_nothing(axis, [value for _, y in curves.values() for value in y])
    return lines


def _face(colour, line):
    """The inside of a marker: a CPU variant's is hollow."""
    return "white" if line == "--" else colour


def _name_curves(figure, handles, names):
    # matplotlib leaves a label that starts with _ out of a legend
    labels = [" " + printable(name) if printable(name).startswith("_") else printable(name) for name in names]
    figure.legend(handles, labels, **LEGEND_RIGHT)


@styled
def ratio_plane(points, alpha):
    """CR on forget images against CR on test images, every method a labelled point, Retrain marked.

    ``points`` is {method: (test_CR, forget_CR)}; those with a missing number are left out.
    """
    figure = Figure(figsize=SIZES["plane"])
    axis = figure.subplots()
    points = {name: point for name, point in points.items() if not any(map(_missing, point))}
    _say_if_nothing(axis, [x for x, _ in points.values()])
    if "retrain" in points:
        x, y = points["retrain"]
        axis.axvline(x, linestyle=":", **GUIDE)
        axis.axhline(y, linestyle=":", **GUIDE)
        axis.plot(x, y, **RING)
    for name, (colour, marker, line) in looks(points).items():
        axis.plot(*points[name], marker=marker, color=colour, markerfacecolor=_face(colour, line), **POINT)
    axis.margins(MARGIN)
    low, high = axis.get_ylim()
    heights = spread_heights([(y - low) / (high - low) for _, y in points.values()], LABEL_GAP)
    for number, (name, point) in enumerate(points.items()):
        axis.annotate(
            printable(name), point, xytext=(LABELS_AT, heights[number]), textcoords="axes fraction", va="center",
            arrowprops=LEADER, weight="bold" if name == "retrain" else "normal", **SMALL,
        )  # fmt: skip
    axis.set_xlabel("CR on test images (right: useful)")
    axis.set_ylabel("CR on forget images (down: forgotten)")
    reference = ": the dotted lines meet at Retrain" if "retrain" in points else ""
    axis.set_title(f"Forgetting against usefulness (α = {alpha:g}){reference}")
    return figure


def spread_heights(heights, gap):
    """Heights in [0, 1] at least ``gap`` apart, in the same order, as near as possible to ``heights`` (least squares).

    Less than ``gap`` apart where there is no room for more.
    """
    order = np.argsort(heights, kind="stable")
    if not len(order):
        return []
    steps = min(gap, 1 / len(order)) * np.arange(len(order))
    regression = IsotonicRegression(y_min=0, y_max=1 - steps[-1])
    spread = np.empty(len(order))
    spread[order] = steps + regression.fit_transform(np.arange(len(order)), np.array(heights)[order] - steps)
    return spread.tolist()


@styled
def fake_bars(counts, alpha):
    """Of the misclassified forget images, how many keep their label in the set: bars, all models.

    ``counts`` is {method: (misclassified, fake, number of forget images)}, fake NaN where no q̂ is finite. A method
    with a missing number has no bar.
    """
    width, around, height = SIZES["bars"]
    figure = Figure(figsize=(width, height * len(counts) + around))
    axis = figure.subplots()
    places = {name: place for place, name in enumerate(reversed(counts))}
    _say_if_nothing(axis, [fake for _, fake, _ in counts.values()])
    for name, (wrong, fake, total) in counts.items():
        place = places[name]
        if _missing(wrong) or _missing(fake) or not total:
            axis.text(0, place, f" – of {_short(wrong)}", va="center", **SMALL)
            continue
        axis.barh(place, fake / total, color=RED, **BAR)
        axis.barh(place, (wrong - fake) / total, left=fake / total, color=SKY, **BAR)
        text = f"{_short(fake)} of {_short(wrong)}" + (f" ({fake / wrong:.0%})" if wrong else "")
        axis.text(wrong / total, place, f" {text}", va="center", **SMALL)
    axis.set_yticks(list(places.values()), map(printable, places))
    axis.set_ylim(-BETWEEN_BARS, len(counts) - 1 + BETWEEN_BARS)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share of the forget images that are misclassified")
    axis.grid(axis="y", visible=False)
    axis.margins(**BAR_MARGINS)
    axis.set_title(f"Fake forgetting (α = {alpha:g}): misclassified, and the label is still in the set")
    swatches = [Line2D([], [], color=colour, **SWATCH) for colour in (RED, SKY)]
    figure.legend(swatches, [IN_SET, OUT_OF_SET], **LEGEND_BELOW)
    return figure


def _say_if_nothing(axis, values):
    """Where all of ``values`` are missing, the axes say why."""
    if all(map(_missing, values)):
        axis.text(0.5, 0.5, NO_Q_HAT, transform=axis.transAxes, **MIDDLE)


def _short(count):
    if _missing(count):
        return "–"
    return f"{count:.0f}" if count == round(count) or count >= 100 else f"{count:.1f}"


@styled
def fake_sheet(entries, classes, title):
    """The most fake-forgotten images with their sets.

    ``entries`` are (image H×W×3 uint8, true label, prediction, labels in the set by probability); None where no q̂ is
    finite.
    """
    figure, axes = _panels("sheet", len(entries or []))
    for axis in axes:
        axis.set_axis_off()
    for number, (image, label, prediction, inside) in enumerate(entries or []):
        axis = axes[number]
        axis.imshow(image, interpolation="nearest")
        names = [
            f"[{printable(classes[chosen])}]" if chosen == label else printable(classes[chosen]) for chosen in inside
        ]
        shown = names[:MOST_LABELS] + ["…"] * (len(names) > MOST_LABELS)
        answer = f"{printable(classes[label])} → {printable(classes[prediction])}"
        axis.set_title("\n".join([answer, f"{{{_wrapped(shown)}}}"]), **TINY)
    if not entries:
        axes[0].text(0.5, 0.5, NO_Q_HAT if entries is None else NOTHING_FAKE, **MIDDLE)
    figure.suptitle(printable(title, LONGEST_TITLE))
    return figure


def _wrapped(names):
    """Names with commas, in lines of at most LONGEST_LINE characters where the names allow it."""
    lines = []
    for name in names:
        if lines and len(lines[-1]) + len(name) <= LONGEST_LINE:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    return ",\n".join(lines)


@styled
def relearn_curves(curves, alpha):
    """Accuracy and coverage of forget images that are not trained on while the others are learnt again, step by step.

    ``curves`` is {method: {"step": [...], "accuracy": [...], "coverage": [...]}}; missing numbers (None, NaN) are left
    out.
    """
    width, least, height, around = SIZES["relearn"]
    figure = Figure(figsize=(width, max(least, height * len(curves) + around)))
    axes = figure.subplot_mosaic([["accuracy", "coverage"]], sharex=True)
    titles = {"accuracy": "Accuracy", "coverage": f"Coverage (α = {alpha:g})"}
    for key, axis in axes.items():
        handles = _draw_curves(axis, {name: (curve["step"], curve[key]) for name, curve in curves.items()})
        axis.set_title(titles[key])
        axis.set_xlabel("steps of training on a tenth")
    _name_curves(figure, handles, curves)
    figure.suptitle("Do they come back? Nine tenths of the forget images while the other tenth is learnt again")
    return figure
