"""Figures of an evaluation: pure functions from numbers to matplotlib Figures.

The colors are those of Okabe and Ito, which color-blind readers can distinguish. Methods of one
color differ in marker or line. Names of classes and methods are drawn as plain text in any script:
see :func:`printable` and :func:`font_families`.
"""

import functools
import math
import unicodedata
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression

from .. import CR, ensembles, scores
from ..comparison import SECOND_RETRAIN
from . import tables

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
    "text.parse_math": False,  # a $ in a name is a dollar sign
}
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
PALETTE = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "o")
PARTS = {"forget": (RED, "-"), "test": (BLUE, "--"), "calibration": (BLACK, ":")}


# Layout: sizes in points or inches, and line widths.
SMALL, TINY = {"fontsize": 7.5}, {"fontsize": 6.5}
THICK, THIN = 2.2, 1.1
CURVE = {"markersize": 4.5}
POINT = {"markersize": 7, "markeredgewidth": 1.3, "linestyle": "none"}
RING = {
    "marker": "o",
    "markersize": 15,
    "color": "none",
    "markeredgecolor": BLACK,
    "markeredgewidth": 1.2,
}
GUIDE = {"color": "#999999", "linewidth": 0.8}
LEADER = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
HISTOGRAM = {"histtype": "step", "linewidth": 1.2}
Q_HAT_LINE = {"color": GREEN, "linewidth": 1.6}
Q_HAT_AREA = {"color": GREEN, "alpha": 0.08, "linewidth": 0}
BAR, SWATCH = {"height": 0.7}, {"linewidth": 6}
MIDDLE = {"ha": "center", "va": "center"}
LEGEND_BELOW = {"loc": "outside lower center", "ncols": 4}
LEGEND_RIGHT = {"loc": "outside right center"}
SIZES = {  # inches: width and height of the figure, or of each panel and of the frame around all
    "curves": (8.2, 5.6),
    "plane": (6.4, 4.8),
    "bars": (6.6, 1.5, 0.27),
    "histograms": (2.6, 1.7, 0.7),
    "sheet": (1.55, 2.0, 0.5),
    "relearn": (8.2, 3.4, 0.19, 0.8),
    "q_hat": (7.2, 3.2),
    "distances": (8.2, 1.3, 0.25),
}
PER_ROW = {"histograms": 4, "sheet": 6}
MARGIN = 0.16  # around the points of the plane, as a share of its side
BAR_MARGINS, BETWEEN_BARS = {"x": 0.2}, 0.6  # room for the text after a bar, and around all bars
LABELS_AT, LABEL_GAP = 1.03, 0.042  # labels of the plane: x position, least vertical distance
LONGEST_NAME, LONGEST_LINE, LONGEST_TITLE = 24, 22, 120  # characters
MOST_LABELS = 8  # labels of a prediction set that the sheet lists
LOGIT_EDGES = np.linspace(-14, 14, 57)
NO_Q_HAT = "no finite q̂"
NOTHING_FAKE = "no misclassified image\nkeeps its label in the set"
IN_SET, OUT_OF_SET = "label still in the set (fake)", "label out of the set"


class Look(NamedTuple):
    """How a method is drawn."""

    color: str
    marker: str
    line: str

    @property
    def face(self):
        """The inside of a marker. The markers of CPU variants are hollow."""
        return "white" if self.line == "--" else self.color


class Relearned(NamedTuple):
    """What a model learns again, and which images are then measured, in words."""

    trained: str
    measured: str


RELEARNED = {
    "forget": Relearned("a tenth of the forget images", "the others"),
    "retain": Relearned("retain images", "all forget images"),
}


class FakeCounts(NamedTuple):
    """Numbers of forget images: misclassified, fake-forgotten among these, and all."""

    misclassified: float | None
    fake: float | None
    num_forget: int | None


class SheetImage(NamedTuple):
    """A forget image H×W×3 (uint8), its label, the prediction, and its prediction set by score."""

    pixels: np.ndarray
    label: int
    prediction: int
    prediction_set: list[int]


# ---------------------------------------------------------------- style and names


def styled(function):
    """Draw with STYLE and with fonts for all text in the arguments.

    The caller's matplotlib settings are left unchanged.
    """

    @functools.wraps(function)
    def draw(*arguments, **options):
        with rc_context(STYLE | {"font.family": font_families(_texts((arguments, options)))}):
            return function(*arguments, **options)

    return draw


def printable(name, longest=LONGEST_NAME):
    """A name as one line of drawable text of at most ``longest`` characters.

    Longer names lose their middle. White space becomes a space, and format characters (directions,
    joiners) are dropped. Control codes and bytes that are not UTF-8 become �.
    """
    replaced = {"Cc": "\ufffd", "Cs": "\ufffd", "Cf": "", "Zs": " ", "Zl": " ", "Zp": " "}
    characters = (
        " " if c in "\t\n\r" else replaced.get(unicodedata.category(c), c) for c in str(name)
    )
    text = "".join(characters).strip()
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
    """``font.family``: matplotlib's font, and installed fonts for the characters that it lacks."""
    characters = {character for text in texts for character in text if not character.isascii()}
    drawn = frozenset(c for c in characters if unicodedata.category(c)[0] not in "CZ")
    return ["DejaVu Sans", *_fallbacks(drawn)]


@functools.cache
def _fallbacks(characters):
    default = font_manager.findfont("DejaVu Sans")
    missing = {character for character in characters if not _has_glyph(default, character)}
    # Matplotlib's other fonts are mathematical, and one has boxes for every character.
    bundled = matplotlib.get_data_path()
    installed = font_manager.fontManager.ttflist
    fonts = [font for font in installed if not font.fname.startswith(bundled)]

    def preference(font):
        return font.style != "normal", font.weight != 400, "Sans" not in font.name

    families = []
    for font in sorted(fonts, key=preference):
        if not missing:
            break
        covered = {character for character in missing if _has_glyph(font.fname, character)}
        if covered and font.name not in families:
            families.append(font.name)
            missing -= covered
    return families


def _has_glyph(path, character):
    """Whether a font can draw a character. Bitmap fonts (color emoji) and damaged files cannot."""
    try:
        font = font_manager.get_font(path)
        return bool(font.scalable and font.get_char_index(ord(character)))
    except (OSError, RuntimeError):
        return False


def looks(names):
    """{method: :class:`Look`}. A CPU variant has its base's color and marker, hollow and dashed."""
    reserved = {"original": Look(BLACK, "*", ":"), "retrain": Look(BLACK, "o", "-")}
    reserved[SECOND_RETRAIN] = reserved["retrain"]._replace(line="--")
    bases = [name.removeprefix("cpu_") for name in names if name not in reserved]
    known = dict(reserved)
    for number, base in enumerate(dict.fromkeys(base for base in bases if base != "retrain")):
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        known[base] = Look(color, marker, "-")
    for name in names:
        if name not in known:
            base = known.get(name.removeprefix("cpu_"), reserved["retrain"])
            known[name] = base._replace(line="--")
    return {name: known[name] for name in names}


# ---------------------------------------------------------------- all models in one figure


def overview(rows, score, cal_size):
    """The figures that compare all models: {file name: (caption, Figure)}.

    ``rows`` are those of results.csv. The rows of ``score`` and ``cal_size`` are drawn. The bars
    and the plane show the smallest α at which most methods have a finite q̂. {} without such rows.
    """
    rows = [
        tables.means_of(row)
        for row in rows
        if (row["score"], row["cal_size"]) == (score, cal_size) and "test_CR" in row
    ]
    if not rows:
        return {}
    alpha = _most_known_alpha(rows)
    at_alpha = {row["method"]: row for row in rows if row["alpha"] == alpha}
    forget = CR.judged_forget_images(rows[0])
    points = {name: (row["test_CR"], row.get(f"{forget}_CR")) for name, row in at_alpha.items()}
    counts = {
        name: FakeCounts(
            row.get(f"{forget}_misclassified"), row.get(f"{forget}_fake"), row.get("num_forget")
        )
        for name, row in at_alpha.items()
    }
    curves = against_alpha(_curves(rows, forget))
    return {
        "fake_forgetting.png": ("Fake forgetting", fake_bars(counts, alpha)),
        "cr_plane.png": ("CR on forget against CR on test images", ratio_plane(points, alpha)),
        "against_alpha.png": ("Coverage and CR against α", curves),
    }


def _most_known_alpha(rows):
    """The smallest α of those at which most rows have a finite q̂."""
    known = [row["alpha"] for row in rows if not _missing(row["test_CR"])]
    known = known or [row["alpha"] for row in rows]
    return max(sorted(known), key=known.count)


def _curves(rows, forget):
    """What :func:`against_alpha` draws, with ``forget`` as the name of the forget images' keys."""
    keys = {"alpha": "alpha", "test_coverage": "test_coverage", "test_CR": "test_CR"}
    keys |= {"forget_coverage": f"{forget}_coverage", "forget_CR": f"{forget}_CR"}
    curves = {row["method"]: {key: [] for key in keys} for row in rows}
    for row in rows:
        for key, column in keys.items():
            curves[row["method"]][key].append(row.get(column))
    return curves


# ---------------------------------------------------------------- scores of each model


def histogram_data(conformal_scores):
    """What :func:`score_histograms` draws of a model: its scores by part, and q̂ at the first α.

    Both belong to the split itself and the first score. See
    :class:`metrics.conformal.ConformalScores`.
    """
    outputs = conformal_scores.outputs
    held_out = scores.from_log_odds(conformal_scores.part("held_out").true_label)
    forget = scores.from_log_odds(conformal_scores.part("forget").true_label)
    calibration = held_out[outputs.calibration(conformal_scores.largest_size)]
    return {
        "forget": forget.numpy(),
        "test": held_out[outputs.test()].numpy(),
        "calibration": calibration.numpy(),
        "q_hat": scores.from_log_odds(conformal_scores.q_hats()[0, 0]).item(),
    }


@styled
def score_histograms(samples, alpha):
    """Histograms of the true label's score for forget, test and calibration images, with q̂.

    Each model has a panel. ``samples`` is {method: {"forget": N, "test": N, "calibration": N,
    "q_hat": float}} with scores in numpy arrays. q̂ is NaN where it is infinite. Scores crowd at
    both ends, so the axis is the logit of the score.
    """
    figure, axes = _panels("histograms", len(samples), sharex=True)
    for axis, (name, sample) in zip(axes, samples.items(), strict=False):
        _draw_histograms(axis, name, sample)
    for number, axis in enumerate(axes):
        axis.set_visible(number < len(samples))
        # Panels of a column share their ticks. The lowest one shows the labels.
        axis.tick_params(labelbottom=number + PER_ROW["histograms"] >= len(samples))
    handles = [Line2D([], [], color=color, linestyle=line) for color, line in PARTS.values()]
    handles.append(Line2D([], [], **Q_HAT_LINE))
    labels = [*PARTS, "q̂: labels to its left are in the set"]
    figure.legend(handles, labels, **LEGEND_BELOW)
    figure.suptitle(
        "Score 1 − p of the true label. The prediction set holds the label of every image to the "
        f"left of q̂ (α = {alpha:g})"
    )
    return figure


def _draw_histograms(axis, name, sample):
    """The panel of one model."""
    low, high = LOGIT_EDGES[0], LOGIT_EDGES[-1]
    for part, (color, line) in PARTS.items():
        values = np.clip(logit(sample[part]), low, high)
        shares = np.ones_like(values) / len(values)
        style = {"color": color, "linestyle": line} | HISTOGRAM
        axis.hist(values, LOGIT_EDGES, weights=shares, **style)
    has_q_hat = not _missing(sample["q_hat"])
    if has_q_hat:
        position = np.clip(logit(sample["q_hat"]), low, high)
        axis.axvline(position, **Q_HAT_LINE)
        axis.axvspan(low, position, **Q_HAT_AREA)
    axis.set_title(printable(name) if has_q_hat else f"{printable(name)} ({NO_Q_HAT})")
    axis.set_yticks([])
    axis.grid(False)
    axis.set_xticks(logit([1e-6, 1e-3, 0.5, 1 - 1e-3]), ["10⁻⁶", "10⁻³", "½", ".999"])


def _panels(kind, count, **options):
    """A figure of at least ``count`` equal panels in full rows, and their axes."""
    columns = min(PER_ROW[kind], max(1, count))
    rows = max(1, math.ceil(count / columns))
    width, height, around = SIZES[kind]
    figure = Figure(figsize=(width * columns, height * rows + around))
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def _missing(value):
    """Whether a number is unknown: None, NaN or infinite."""
    return value is None or not math.isfinite(value)


# ---------------------------------------------------------------- curves


@styled
def against_alpha(curves):
    """Coverage and CR of forget and test images against α, for all models.

    ``curves`` is {method: {"alpha": [...], "forget_coverage": [...], "test_coverage": [...],
    "forget_CR": [...], "test_CR": [...]}}. Missing numbers (None, NaN) are left out.
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
        lines = {name: (curve["alpha"], curve[key]) for name, curve in curves.items()}
        handles = _draw_curves(axis, lines)
        if key == "test_coverage":
            alphas = sorted({alpha for curve in curves.values() for alpha in curve["alpha"]})
            axis.plot(alphas, [1 - alpha for alpha in alphas], zorder=1, **GUIDE)
        axis.set_title(titles[key])
        if key.endswith("_CR"):  # the lower row
            axis.set_xlabel("miscoverage level α")
    _name_curves(figure, handles, curves)
    return figure


def _draw_curves(axis, curves):
    """A line for each of {method: (x, y)}, with Retrain's thick and in front. Returns the lines."""
    look_of, lines = looks(curves), []
    for name, (x, y) in curves.items():
        look = look_of[name]
        is_retrain = name == "retrain"
        known = [number for number, value in enumerate(y) if not _missing(value)]
        lines += axis.plot(
            [x[number] for number in known],
            [y[number] for number in known],
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            markerfacecolor=look.face,
            zorder=3 if is_retrain else 2,
            linewidth=THICK if is_retrain else THIN,
            **CURVE,
        )
    _say_if_nothing(axis, [value for _, y in curves.values() for value in y])
    return lines


def _name_curves(figure, handles, names):
    """The legend. Matplotlib omits a label that starts with an underscore, so it gets a space."""
    labels = [printable(name) for name in names]
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    figure.legend(handles, labels, **LEGEND_RIGHT)


@styled
def relearn_curves(curves, alpha):
    """Accuracy and coverage of forget images while the model learns other images.

    A row of panels for each kind of these images. ``curves`` is {"forget" or "retain": {method:
    {"step": [...], "accuracy": [...], "coverage": [...]}}}. Missing numbers (None, NaN) are left
    out.
    """
    names = dict.fromkeys(name for methods in curves.values() for name in methods)
    width, least, height, around = SIZES["relearn"]
    size = width, max(least * len(curves), height * len(names) + around)
    figure = Figure(figsize=size)
    axes = figure.subplots(len(curves), 2, sharex="row", squeeze=False)
    titles = {"accuracy": "Accuracy", "coverage": f"Coverage (α = {alpha:g})"}
    for row, (source, methods) in zip(axes, curves.items(), strict=True):
        for axis, (key, title) in zip(row, titles.items(), strict=True):
            lines = {name: (curve["step"], curve[key]) for name, curve in methods.items()}
            handles = _draw_curves(axis, lines)
            axis.set_title(f"{title} of {RELEARNED[source].measured}")
            axis.set_xlabel(f"training steps on {RELEARNED[source].trained}")
    _name_curves(figure, handles, names)
    figure.suptitle("Relearning: do the forget images come back?")
    return figure


@styled
def q_hat_curves(q_hats):
    """q̂ at the start of each epoch of the conformal loss. ``q_hats`` is {method: list of q̂}."""
    figure = Figure(figsize=SIZES["q_hat"])
    axis = figure.subplots()
    lines = {name: (range(1, len(values) + 1), values) for name, values in q_hats.items()}
    handles = _draw_curves(axis, lines)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel("q̂ (score 1 − p)")
    axis.set_title("q̂ of the conformal loss, recomputed at the start of every epoch")
    _name_curves(figure, handles, q_hats)
    return figure


# ---------------------------------------------------------------- several trainings


@styled
def margin_histograms(images, names):
    """Margins over the trainings of a method and of Retrain: four forget images of each method.

    ``images`` is {method: list of :class:`metrics.ensembles.ImageMargins`}, ``names`` the names of
    the forget images. A row of panels for each method, from the image nearest to Retrain to the
    farthest.
    """
    figure, axes = _panels("histograms", PER_ROW["histograms"] * len(images))
    look_of = {"unlearned": (RED, "-"), "retrained": (BLACK, "--")}
    for row, (method, chosen) in enumerate(images.items()):
        panels = axes[row * PER_ROW["histograms"] :][: PER_ROW["histograms"]]
        for axis, image in zip(panels, chosen, strict=False):
            both = np.concatenate([image.unlearned, image.retrained])
            edges = np.histogram_bin_edges(both, ensembles.BINS)
            for kind, (color, line) in look_of.items():
                values = getattr(image, kind).numpy()
                style = {"color": color, "linestyle": line} | HISTOGRAM
                axis.hist(values, edges, weights=np.full(len(values), 1 / len(values)), **style)
            name = printable(names[image.position], LONGEST_NAME // 2)
            axis.set_title(f"{printable(method)}: {name}\nKLOM {image.klom:.2f}", **SMALL)
            axis.set_yticks([])
            axis.grid(False)
        for axis in panels[len(chosen) :]:
            axis.set_visible(False)
    handles = [Line2D([], [], color=color, linestyle=line) for color, line in look_of.values()]
    figure.legend(handles, ["trainings of the method", "trainings of Retrain"], **LEGEND_BELOW)
    figure.suptitle("Margins of the forget images nearest to Retrain (left) and farthest (right)")
    return figure


@styled
def klom_dots(rows):
    """KLOM of forget, retain and test images: a dot per method, with the noise floor as a band.

    ``rows`` are those of :func:`metrics.ensembles.rows`. Dots are medians over the images. The
    line of the forget images ends at the 95th percentile. Missing numbers are left out.
    """
    floor = next((row for row in rows if row["method"] == ensembles.NOISE_FLOOR), {})
    shown = [row for row in rows if row is not floor]
    look_of = looks([row["method"] for row in shown])
    width, around, height = SIZES["distances"]
    figure = Figure(figsize=(width, height * len(shown) + around))
    axes = figure.subplots(1, len(ensembles.PARTS))
    names = [printable(row["method"]) for row in reversed(shown)]
    for axis, part in zip(axes, ensembles.PARTS, strict=True):
        noise = floor.get(f"KLOM_{part}")
        if not _missing(noise):
            axis.axvspan(0, noise, color=GUIDE["color"], alpha=0.3, linewidth=0)
        for position, row in enumerate(reversed(shown)):
            look, median = look_of[row["method"]], row.get(f"KLOM_{part}")
            if _missing(median):
                continue
            style = {"marker": look.marker, "color": look.color, "markerfacecolor": look.face}
            axis.plot(median, position, **style, **POINT)
            if part == "forget":
                end = row["KLOM_forget_95"]
                axis.plot([median, end], [position] * 2, color=look.color, linewidth=THIN)
        axis.set_title(f"{part} images")
        axis.set_xlabel("KLOM (0: like Retrain)")
        axis.set_xlim(left=0)
        axis.set_yticks(range(len(shown)), names if axis is axes[0] else [""] * len(shown))
        axis.set_ylim(-BETWEEN_BARS, len(shown) - 1 + BETWEEN_BARS)
    band = "; grey: half of Retrain's trainings against the other half" if floor else ""
    figure.suptitle(f"Distance to retrained models{band}")
    return figure


# ---------------------------------------------------------------- plane


@styled
def ratio_plane(points, alpha):
    """CR on forget images against CR on test images: a labeled point per method, Retrain marked.

    ``points`` is {method: (test_CR, forget_CR)}. Methods with a missing number are left out.
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
    for name, look in looks(points).items():
        style = {"marker": look.marker, "color": look.color, "markerfacecolor": look.face}
        axis.plot(*points[name], **style, **POINT)
    axis.margins(MARGIN)
    _label_points(axis, points)
    axis.set_xlabel("CR on test images (right: useful)")
    axis.set_ylabel("CR on forget images (down: forgotten)")
    reference = ": the dotted lines meet at Retrain" if "retrain" in points else ""
    axis.set_title(f"Forgetting against usefulness (α = {alpha:g}){reference}")
    return figure


def _label_points(axis, points):
    """Names to the right of the axes, far enough apart, with a line to each point."""
    low, high = axis.get_ylim()
    heights = spread_heights([(y - low) / (high - low) for _, y in points.values()], LABEL_GAP)
    for (name, point), height in zip(points.items(), heights, strict=True):
        axis.annotate(
            printable(name),
            point,
            xytext=(LABELS_AT, height),
            textcoords="axes fraction",
            va="center",
            arrowprops=LEADER,
            weight="bold" if name == "retrain" else "normal",
            **SMALL,
        )


def spread_heights(heights, gap):
    """The heights in [0, 1] nearest to ``heights`` (least squares) that are ``gap`` apart.

    The order is kept. The gap is smaller where there is no room for it.
    """
    order = np.argsort(heights, kind="stable")
    if not len(order):
        return []
    # Less the steps, heights that are apart are a non-decreasing sequence: isotonic regression.
    steps = min(gap, 1 / len(order)) * np.arange(len(order))
    regression = IsotonicRegression(y_min=0, y_max=1 - steps[-1])
    spread = np.empty(len(order))
    targets = np.array(heights)[order] - steps
    spread[order] = steps + regression.fit_transform(np.arange(len(order)), targets)
    return spread.tolist()


# ---------------------------------------------------------------- fake forgetting


@styled
def fake_bars(counts, alpha):
    """Bars: of the misclassified forget images, how many keep their label in the set.

    ``counts`` is {method: :class:`FakeCounts`}, with NaN as ``fake`` where no q̂ is finite. A method
    with a missing number has no bar.
    """
    width, around, height = SIZES["bars"]
    figure = Figure(figsize=(width, height * len(counts) + around))
    axis = figure.subplots()
    positions = {name: position for position, name in enumerate(reversed(counts))}
    _say_if_nothing(axis, [count.fake for count in counts.values()])
    for name, count in counts.items():
        _draw_bar(axis, positions[name], count)
    axis.set_yticks(list(positions.values()), map(printable, positions))
    axis.set_ylim(-BETWEEN_BARS, len(counts) - 1 + BETWEEN_BARS)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share of the forget images that are misclassified")
    axis.grid(axis="y", visible=False)
    axis.margins(**BAR_MARGINS)
    axis.set_title(f"Fake forgetting (α = {alpha:g}): misclassified, but the label is in the set")
    swatches = [Line2D([], [], color=color, **SWATCH) for color in (RED, SKY)]
    figure.legend(swatches, [IN_SET, OUT_OF_SET], **LEGEND_BELOW)
    return figure


def _draw_bar(axis, position, count):
    """The bar of one method, with its numbers as text."""
    wrong, fake, total = count
    if _missing(wrong) or _missing(fake) or not total:
        axis.text(0, position, f" – of {tables.short_count(wrong)}", va="center", **SMALL)
        return
    axis.barh(position, fake / total, color=RED, **BAR)
    axis.barh(position, (wrong - fake) / total, left=fake / total, color=SKY, **BAR)
    text = f"{tables.short_count(fake)} of {tables.short_count(wrong)}"
    if wrong:
        text += f" ({fake / wrong:.0%})"
    axis.text(wrong / total, position, f" {text}", va="center", **SMALL)


def _say_if_nothing(axis, values):
    """Where all of ``values`` are missing, the axes give the reason."""
    if all(map(_missing, values)):
        axis.text(0.5, 0.5, NO_Q_HAT, transform=axis.transAxes, **MIDDLE)


@styled
def fake_sheet(images, classes, title):
    """The most fake-forgotten images with their prediction sets.

    ``images`` are :class:`SheetImage`, or None where no q̂ is finite.
    """
    figure, axes = _panels("sheet", len(images or []))
    for axis in axes:
        axis.set_axis_off()
    for axis, image in zip(axes, images or [], strict=False):
        axis.imshow(image.pixels, interpolation="nearest")
        axis.set_title(_sheet_title(image, classes), **TINY)
    if not images:
        axes[0].text(0.5, 0.5, NO_Q_HAT if images is None else NOTHING_FAKE, **MIDDLE)
    figure.suptitle(printable(title, LONGEST_TITLE))
    return figure


def _sheet_title(image, classes):
    """``label → prediction`` and the prediction set, in which brackets mark the label."""
    names = []
    for chosen in image.prediction_set:
        name = printable(classes[chosen])
        names.append(f"[{name}]" if chosen == image.label else name)
    shown = names[:MOST_LABELS] + ["…"] * (len(names) > MOST_LABELS)
    answer = f"{printable(classes[image.label])} → {printable(classes[image.prediction])}"
    return f"{answer}\n{{{_wrapped(shown)}}}"


def _wrapped(names):
    """Names with commas, in lines of about LONGEST_LINE characters."""
    lines = []
    for name in names:
        if lines and len(lines[-1]) + len(name) <= LONGEST_LINE:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    return ",\n".join(lines)
