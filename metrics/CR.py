"""The conformal metrics: Coverage, Set Size, CR and fake forgetting (arXiv 2501.19403).

Pure functions of tensors. The metrics of a group of images need two facts per image: whether its
true label is in its prediction set (``inside``, booleans …×N) and how many labels the set contains
(``sizes``, …×N). Results have the leading dimensions, e.g. one per q̂: float64, or int64 for counts.
:mod:`metrics.conformal` decides which q̂ applies to which images.

With too few calibration images q̂ is infinite, and every set contains every label for any model.
:func:`finite_quantile` then returns NaN, and so is every number that depends on this q̂.
"""

import math
from fractions import Fraction

import torch

from . import scores
from .columns import Column, Spread, csv_only

ROW_COLUMNS = {
    "forget_coverage": Column(
        "Cov_f", "percent", "low", "Coverage of the forget images (true label in the set)"
    ),
    "forget_set_size": Column(
        "Size_f", "number", "high", "Set Size of the forget images (mean labels per set)"
    ),
    "forget_CR": Column(
        "CR_f", "number", "low", "CR of the forget images: Coverage divided by Set Size"
    ),
    "forget_empty": Column("empty_f", "percent", "", "share of empty sets of forget images"),
    "test_coverage": Column("Cov_t", "percent", "high", "Coverage of the test images"),
    "test_set_size": Column("Size_t", "number", "low", "Set Size of the test images"),
    "test_CR": Column("CR_t", "number", "high", "CR of the test images"),
    "test_empty": Column("empty_t", "percent", "low", "share of empty sets of test images"),
    "forget_misclassified": Column(
        "wrong", "count", "near Retrain", "number of misclassified forget images"
    ),
    "forget_fake": Column(
        "fake", "count", "near Retrain", "fake forgetting: wrong, but the true label is in the set"
    ),
    "forget_fake_ratio": Column(
        "fake of wrong", "percent", "near Retrain", "forget_fake divided by forget_misclassified"
    ),
    "forget_wrong_CR": Column("CR_wrong", "number", "low", "CR of the misclassified forget images"),
    "forget_by_retain_coverage": Column(
        "Cov_f|r", "percent", "low", "Coverage of the forget images under the retained classes' q̂"
    ),
    "forget_by_retain_set_size": Column(
        "Size_f|r", "number", "high", "Set Size of the forget images under the retained classes' q̂"
    ),
    "forget_by_retain_CR": Column(
        "CR_f|r", "number", "low", "CR of the forget images under the retained classes' q̂"
    ),
    "forget_by_retain_empty": Column("empty_f|r", "percent", "", "forget_empty under that q̂"),
    "forget_by_retain_fake_ratio": Column(
        "fake|r", "percent", "near Retrain", "fake share of wrong under the retained classes' q̂"
    ),
}
CSV_COLUMNS = {
    "q_hat": csv_only(
        "number", "threshold q̂: the ⌈(n+1)(1−α)⌉-th smallest of n calibration scores"
    ),
    "q_hat_forget": csv_only("number", "q̂ of the forgotten class's calibration images"),
    "<group>_coverage": csv_only("percent", "share of images with the true label in the set"),
    "<group>_set_size": csv_only("number", "mean number of labels in the set"),
    "<group>_CR": csv_only("number", "Coverage divided by Set Size; 0 if all sets are empty"),
    "<group>_empty": csv_only("percent", "share of empty sets; CR counts their size as 0"),
    "<group>_misclassified": csv_only("count", "number of misclassified images"),
    "<group>_fake": csv_only("count", "misclassified images with the true label in the set"),
    "<group>_fake_ratio": csv_only("percent", "fake divided by misclassified"),
    "<group>_wrong_set_size": csv_only("number", "Set Size of the misclassified images"),
    "<group>_wrong_CR": csv_only("number", "CR of the misclassified images"),
    "calibration_images": csv_only("count", "calibration images of q_hat in the split"),
    "draws_left_out": csv_only(
        "count", "resplits without a finite q_hat, left out of the means", "low"
    ),
    "forget_calibration_images": csv_only(
        "count", "calibration images of q_hat_forget in the split"
    ),
    "forget_draws_left_out": csv_only(
        "count", "resplits without a finite q_hat_forget, left out of the means", "low"
    ),
}
THRESHOLDS_PER_CHUNK = 16  # limits the memory of one pass over the images


def conformal_quantile(scores, alpha):
    """q̂: the k-th smallest of n calibration scores, k = ⌈(n+1)(1−α)⌉; infinity where k > n.

    ``scores`` is a tensor of n values. Exact: an order statistic, not an interpolated quantile.
    Raises ValueError for an α outside (0, 1).
    """
    k = quantile_rank(scores.numel(), alpha)
    if k > scores.numel():
        return math.inf
    return scores.kthvalue(k).values.item()  # k counts from 1


def finite_quantile(scores, alpha):
    """:func:`conformal_quantile`, with NaN in place of infinity."""
    return conformal_quantile(scores, alpha) if scores.numel() >= least_images(alpha) else math.nan


def least_images(alpha):
    """The least number of calibration images with a finite q̂: ⌈1/α⌉ − 1."""
    return math.ceil(1 / Fraction(str(float(alpha)))) - 1


def quantile_rank(n, alpha):
    """k = ⌈(n+1)(1−α)⌉, without rounding errors: α is the decimal number that was typed.

    Raises ValueError for an α outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1 (exclusive), got {alpha}")
    # In floats, 10 · (1 − 0.7) = 3.0000000000000004, and its ceiling would be 4.
    return math.ceil((n + 1) * (1 - Fraction(str(float(alpha)))))


def at_most_one_label(q_hat):
    """Whether no set of the score 1 − p can contain two labels: q̂ < 1/2, i.e. α is above the
    model's error rate.

    S ≤ q̂ then means a probability above 1/2. Coverage and Set Size fall together, and CR tends to 1
    on forget and test images alike, so this α is uninformative.
    """
    return q_hat < 0.5


def forget_group(row):
    """The group that measures forgetting: ``forget``, or ``forget_by_retain`` for a forgotten class
    (calibrated on that class itself, a model that has forgotten it gets sets with every label).
    """
    return "forget_by_retain" if "forget_by_retain_CR" in row else "forget"


def prediction_sets(scores, q_hat):
    """C(x) = {y : S(x, y) ≤ q̂} as booleans. Scores N×K → sets N×K."""
    return scores <= q_hat


def coverage(inside):
    """The paper's Coverage: share of images with the true label in the set."""
    return inside.double().mean(dim=-1)


def set_size(sizes):
    """The paper's Set Size: mean number of labels in a set."""
    return sizes.double().mean(dim=-1)


def conformal_ratio(inside, sizes):
    """The paper's CR = Coverage / Set Size; 0 if every set is empty."""
    return coverage(inside) / set_size(sizes).where(sizes.sum(dim=-1) > 0, math.inf)


def fake_forgetting(inside, misclassified):
    """The paper's fake forgetting: number of misclassified images (N) with the label in the set."""
    return (inside & misclassified).sum(dim=-1)


def set_metrics(part, q_hats):
    """Every metric of one group of images under each of Q thresholds: {key: tensor Q, float64}.

    ``part`` is a :class:`metrics.conformal.ImageScores`, ``q_hats`` are Q log-odds. Under a q̂ of
    NaN only ``misclassified`` is not NaN.
    """
    chunks = torch.as_tensor(q_hats, dtype=torch.float64).split(THRESHOLDS_PER_CHUNK)
    numbers = [_chunk_metrics(part, chunk) for chunk in chunks]
    return {key: torch.cat([chunk[key] for chunk in numbers]) for key in numbers[0]}


def _chunk_metrics(part, q_hats):
    inside, sizes = part.in_set(q_hats), part.set_sizes(q_hats)  # both Q×N
    wrong = part.misclassified
    fake = fake_forgetting(inside, wrong).double()
    numbers = {
        "coverage": coverage(inside),
        "set_size": set_size(sizes),
        "CR": conformal_ratio(inside, sizes),
        "empty": (sizes == 0).double().mean(dim=-1),
        "fake": fake,
        "fake_ratio": fake / wrong.sum(),
        "wrong_set_size": set_size(sizes[:, wrong]),  # NaN if no image is misclassified
        "wrong_CR": conformal_ratio(inside[:, wrong], sizes[:, wrong]),
    }
    # Comparisons with a q̂ of NaN mean nothing, so all numbers that need one are unknown.
    numbers = {key: values.where(~q_hats.isnan(), math.nan) for key, values in numbers.items()}
    return {"misclassified": wrong.sum().double().expand(len(q_hats))} | numbers


def over_draws(values):
    """A number over R draws (float64, NaN where unknown) → :class:`Spread`; a float for one draw.

    NaN if it is unknown in the first draw, the split itself. Other draws without it are left out.
    """
    known = values[:1] if values[0].isnan() else values[~values.isnan()]
    agree = bool((known == known[0]).all())
    # A mean of equal numbers is rounded; the number itself is not.
    mean = known[0].item() if agree else known.mean().item()
    if len(values) == 1:
        return mean
    if len(known) == 1:
        return Spread(mean, math.nan)
    return Spread(mean, 0.0 if agree else known.std().item())


def report(outputs, conformal_scores, settings):
    """All conformal numbers of one model, per (score, calibration size, α). Returns ``({}, rows)``.

    A number that varies over the draws is a :class:`Spread`. The groups of images are those of
    :meth:`metrics.conformal.ConformalScores.groups`.
    """
    rows = {}
    for score in settings.scores:
        for size in outputs.cal_sizes:
            numbers = _numbers_per_draw(conformal_scores, score, size)
            for column, alpha in enumerate(settings.alphas):
                at_alpha = {key: values[:, column] for key, values in numbers.items()}  # R each
                row = {key: _reported(key, values) for key, values in at_alpha.items()}
                row |= _calibration_facts(outputs, size, at_alpha)
                rows[score.name, size, alpha] = row
    return {}, rows


def _numbers_per_draw(conformal_scores, score, size):
    """{key: draws×alphas} for one score and calibration size."""
    groups = conformal_scores.groups(score, size)
    numbers = {"q_hat": scores.from_log_odds(groups["retain"].q_hats)}
    if "forget_by_retain" in groups:
        numbers["q_hat_forget"] = scores.from_log_odds(groups["forget"].q_hats)
    for name, group in groups.items():
        metrics = _group_metrics(group).items()
        numbers |= {f"{name}_{key}": values for key, values in metrics}
    return numbers


def _group_metrics(group):
    """Every metric of a :class:`metrics.conformal.Group`: {key: draws×alphas}."""
    part, images, q_hats = group
    if images is None:  # the same images in every draw: all thresholds together
        numbers = set_metrics(part, q_hats.flatten())
        return {key: values.view(q_hats.shape) for key, values in numbers.items()}
    draws = zip(images, q_hats, strict=True)
    # Every draw has test images and a q̂ of its own: one pass per draw.
    numbers = [set_metrics(part.select(chosen), q_hat) for chosen, q_hat in draws]
    return {key: torch.stack([draw[key] for draw in numbers]) for key in numbers[0]}


def _reported(key, values):
    """A number over R draws. ``misclassified`` has no spread. Counts equal in all are integers."""
    number = over_draws(values)
    if key.endswith("misclassified"):
        mean = number.mean if isinstance(number, Spread) else number
        return int(mean) if bool((values == values[0]).all()) else mean
    if key.endswith("_fake") and len(values) == 1 and not math.isnan(number):
        return int(number)
    return number


def _calibration_facts(outputs, size, numbers):
    """The number of calibration images of each q̂ in ``numbers``, and of the draws left out."""
    calibrations = {
        "q_hat": ("", outputs.calibration),
        "q_hat_forget": ("forget_", outputs.forget_calibration),
    }
    facts = {}
    for key, (prefix, indices_of) in calibrations.items():
        if key in numbers:
            missing = numbers[key].isnan()
            facts[f"{prefix}calibration_images"] = len(indices_of(size))
            facts[f"{prefix}draws_left_out"] = 0 if missing[0] else int(missing.sum())
    return facts
