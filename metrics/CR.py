"""The conformal metrics: Coverage, Set Size, CR and fake forgetting (arXiv 2501.19403), ECF and
EuCF (2508.03245).

Everything here is a pure function of tensors. The metrics of a group of images need two facts per
image: whether its own label is in its prediction set, and how many labels the set holds. Both may
have leading dimensions, one per q̂. Which q̂ judges which images is decided in
:mod:`metrics.conformal`.

Where too few images calibrate, q̂ is infinite and every set holds every label, whatever the model
does. :func:`finite_quantile` alone decides this. A q̂ of NaN makes every number that it judges NaN.
"""

import math
from fractions import Fraction

import torch

from . import scores
from .columns import Column, Spread

ROW_COLUMNS = {
    "forget_coverage": Column(
        "Cov_f",
        "percent",
        "low",
        "Coverage of the forget images: share with the true label in the prediction set",
    ),
    "forget_set_size": Column(
        "Size_f", "number", "high", "Set Size of the forget images: mean labels per set"
    ),
    "forget_CR": Column(
        "CR_f", "number", "low", "CR of the forget images: Coverage divided by Set Size"
    ),
    "test_coverage": Column("Cov_t", "percent", "high", "Coverage of the test images"),
    "theory_coverage": Column(
        "theory",
        "percent",
        "",
        "mean test coverage of exchangeable images: k / (n + 1), k = ⌈(n+1)(1−α)⌉",
    ),
    "test_set_size": Column("Size_t", "number", "low", "Set Size of the test images"),
    "test_CR": Column("CR_t", "number", "high", "CR of the test images"),
    "forget_misclassified": Column(
        "wrong", "count", "near Retrain", "number of misclassified forget images"
    ),
    "forget_fake": Column(
        "fake",
        "count",
        "near Retrain",
        "fake forgetting: misclassified forget images with the true label still in the set",
    ),
    "forget_fake_ratio": Column(
        "fake of wrong",
        "percent",
        "near Retrain",
        "share of the misclassified forget images that are fake-forgotten",
    ),
    "forget_wrong_CR": Column("CR_wrong", "number", "low", "CR of the misclassified forget images"),
    "forget_by_retain_coverage": Column(
        "Cov_f|r",
        "percent",
        "low",
        "Coverage of the forget images under the q̂ of the retained classes",
    ),
    "forget_by_retain_set_size": Column(
        "Size_f|r",
        "number",
        "high",
        "Set Size of the forget images under the q̂ of the retained classes",
    ),
    "forget_by_retain_CR": Column(
        "CR_f|r", "number", "low", "CR of the forget images under the q̂ of the retained classes"
    ),
}
CSV_COLUMNS = {
    "q_hat": Column(
        "",
        "number",
        "",
        "threshold q̂: the ⌈(n+1)(1−α)⌉-th smallest score of n calibration images",
    ),
    "q_hat_forget": Column(
        "",
        "number",
        "",
        "the threshold from the forgotten class's own calibration images",
    ),
    "<group>_coverage": Column(
        "", "percent", "", "share of the images with the true label in the set"
    ),
    "<group>_set_size": Column("", "number", "", "mean number of labels in the set"),
    "<group>_CR": Column(
        "", "number", "", "Coverage divided by Set Size; 0 where every set is empty"
    ),
    "<group>_CR_error": Column("", "number", "", "standard error of CR over the images"),
    "<group>_misclassified": Column("", "count", "", "number of misclassified images"),
    "<group>_fake": Column("", "count", "", "misclassified images with the true label in the set"),
    "<group>_fake_ratio": Column("", "percent", "", "fake divided by misclassified"),
    "<group>_wrong_set_size": Column("", "number", "", "Set Size of the misclassified images"),
    "<group>_wrong_CR": Column("", "number", "", "CR of the misclassified images"),
    "<group>_ECF@<c>": Column(
        "", "percent", "", "share of the images covered by a set of at most c labels"
    ),
    "<group>_EuCF@<c>": Column(
        "", "percent", "", "share of the images not covered, by a set of at most c labels"
    ),
    "coverage_outside": Column(
        "",
        "text",
        "",
        "True where the test coverage is not what exchangeable images can give",
    ),
    "calibration_images": Column("", "count", "", "images of the split that calibrate q_hat"),
    "draws_left_out": Column(
        "", "count", "low", "resplits without a finite q_hat, left out of the means"
    ),
    "forget_calibration_images": Column(
        "", "count", "", "images of the split that calibrate q_hat_forget"
    ),
    "forget_draws_left_out": Column(
        "",
        "count",
        "low",
        "resplits without a finite q_hat_forget, left out of the means",
    ),
}
THRESHOLDS_PER_CHUNK = 16  # bounds the memory of one pass over the images
ROUNDING = 1e-12  # of a mean coverage


def conformal_quantile(scores, alpha):
    """q̂: the k-th smallest of n calibration scores, k = ⌈(n+1)(1−α)⌉; infinity where k > n.

    ``scores`` is a tensor of n values. An exact order statistic. Raises ValueError for an α outside
    (0, 1).
    """
    k = quantile_rank(scores.numel(), alpha)
    if k > scores.numel():
        return math.inf
    return scores.kthvalue(k).values.item()


def finite_quantile(scores, alpha):
    """:func:`conformal_quantile`, with NaN in place of infinity."""
    return conformal_quantile(scores, alpha) if scores.numel() >= least_images(alpha) else math.nan


def least_images(alpha):
    """How many calibration images a finite q̂ needs: ⌈1/α⌉ − 1."""
    return math.ceil(1 / Fraction(str(float(alpha)))) - 1


def quantile_rank(n, alpha):
    """k = ⌈(n+1)(1−α)⌉. α is read as the decimal number that was typed, so that nothing is rounded.

    Raises ValueError for an α outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1 (exclusive), got {alpha}")
    return math.ceil((n + 1) * (1 - Fraction(str(float(alpha)))))


def at_most_one_label(q_hat):
    """Whether no set of the score 1 − p can hold two labels: q̂ < 1/2, i.e. α is above the model's
    error rate.

    S ≤ q̂ then means a probability above 1/2. Coverage and Set Size fall together and CR tends to 1
    on forget and test images alike, so such an α says nothing about forgetting.
    """
    return q_hat < 0.5


def judged_forget_images(row):
    """The group of a row that tells how much was forgotten: ``forget``, or ``forget_by_retain`` for
    a forgotten class.

    Calibrated on the forgotten class's own images, a model that has forgotten the class answers
    with every label.
    """
    return "forget_by_retain" if "forget_by_retain_CR" in row else "forget"


def prediction_sets(scores, q_hat):
    """C(x) = {y : S(x, y) ≤ q̂} as booleans. Scores N×K → sets N×K."""
    return scores <= q_hat


def in_set(sets, labels):
    """Whether each image's own label is in its set. Sets N×K, labels N → booleans N."""
    return sets.gather(1, labels[:, None]).squeeze(1)


def coverage(inside):
    """The paper's Coverage: share of images with their own label in the set.

    Booleans …×N → …, float64 in [0, 1].
    """
    return inside.double().mean(dim=-1)


def set_size(sizes):
    """The paper's Set Size: mean number of labels in a set. Numbers …×N → …, float64 in [0, K]."""
    return sizes.double().mean(dim=-1)


def conformal_ratio(inside, sizes):
    """The paper's CR = Coverage / Set Size; 0 where every set is empty. Low on forget images, high
    on test images.

    Booleans and numbers …×N → …, float64.
    """
    return coverage(inside) / set_size(sizes).where(sizes.sum(dim=-1) > 0, math.inf)


def ratio_error(inside, sizes):
    """Standard error of CR over the images, to first order in the two means.

    Booleans and numbers …×N → …, float64.
    """
    residuals = inside.double() - conformal_ratio(inside, sizes)[..., None] * sizes
    error = residuals.square().mean(dim=-1).sqrt() / math.sqrt(max(sizes.shape[-1], 1))
    return error / set_size(sizes).where(sizes.sum(dim=-1) > 0, math.inf)


def fake_forgetting(inside, misclassified):
    """How many misclassified images still have their own label in the set (the paper's fake
    forgetting).

    Booleans …×N and N → …, int64.
    """
    return (inside & misclassified).sum(dim=-1)


def efficient_coverage(inside, sizes, c):
    """ECF@c (Alkhatib & Tay 2025, 2508.03245): share covered by a set of at most c labels.

    Booleans and numbers …×N → …, float64.
    """
    return coverage(inside & (sizes <= c))


def efficient_miscoverage(inside, sizes, d):
    """EuCF@d (the same paper): share not covered, by a set of at most d labels.

    Booleans and numbers …×N → …, float64.
    """
    return coverage(~inside & (sizes <= d))


def coverage_law(n, m, alpha):
    """The exact law of how many of m test images n calibration images cover, for exchangeable
    scores without ties.

    beta-binomial(m; k, n + 1 − k), the beta law of split conformal prediction seen through m images
    (Vovk 2012, 1209.2673). Returns a frozen scipy distribution, or None where q̂ is infinite and
    all images are covered.
    """
    from scipy import stats  # imports slowly (one second)

    k = quantile_rank(n, alpha)
    return stats.betabinom(m, k, n + 1 - k) if k <= n else None


def describe(part, q_hats, set_sizes=()):
    """Every metric of one group of images under each of Q thresholds: a dict of tensors Q, float64.

    ``part`` is a :class:`metrics.conformal.PartScores`, ``q_hats`` are Q log-odds, ``set_sizes``
    the c of ECF@c and EuCF@c. Numbers under a q̂ of NaN are NaN, except the number of misclassified
    images, which no q̂ judges.
    """
    chunks = torch.as_tensor(q_hats, dtype=torch.float64).split(THRESHOLDS_PER_CHUNK)
    described = [_describe_chunk(part, chunk, set_sizes) for chunk in chunks]
    return {key: torch.cat([numbers[key] for numbers in described]) for key in described[0]}


def _describe_chunk(part, q_hats, set_sizes):
    inside, sizes = part.in_set(q_hats), part.set_sizes(q_hats)
    wrong = part.misclassified
    fake = fake_forgetting(inside, wrong).double()
    numbers = {
        "coverage": coverage(inside),
        "set_size": set_size(sizes),
        "CR": conformal_ratio(inside, sizes),
        "CR_error": ratio_error(inside, sizes),
        "fake": fake,
        "fake_ratio": fake / wrong.sum(),
        "wrong_set_size": set_size(sizes[:, wrong]),
        "wrong_CR": conformal_ratio(inside[:, wrong], sizes[:, wrong]),
    }
    for size in set_sizes:
        numbers[f"ECF@{size}"] = efficient_coverage(inside, sizes, size)
        numbers[f"EuCF@{size}"] = efficient_miscoverage(inside, sizes, size)
    numbers = {key: values.where(~q_hats.isnan(), math.nan) for key, values in numbers.items()}
    return {"misclassified": wrong.sum().double().expand(len(q_hats))} | numbers


def over_draws(values):
    """A number over the draws as :class:`Spread`. Values R, float64 → Spread, or a float for one
    draw.

    The first draw is the split itself: where it does not know the number (NaN), the result is NaN.
    Other draws that do not know it are left out.
    """
    known = values[:1] if values[0].isnan() else values[~values.isnan()]
    agree = bool((known == known[0]).all())
    mean = known[0].item() if agree else known.mean().item()
    if len(values) == 1:
        return mean
    if len(known) == 1:
        return Spread(mean, math.nan)
    return Spread(mean, 0.0 if agree else known.std().item())


def report(outputs, conformal_scores, settings):
    """All conformal numbers of one model, per (score, calibration size, α). Returns ``({}, rows)``.

    A number that varies over the draws is a :class:`Spread`. The groups of images and the q̂ that
    judges each are those of :meth:`metrics.conformal.ConformalScores.judgements`.
    ``theory_coverage`` is the mean test coverage that exchangeability gives, and
    ``coverage_outside`` is True if the test coverage contradicts it. ``calibration_images`` counts
    those of the split itself. ``draws_left_out`` counts the draws without a finite q̂ where the
    split has one. Where classes are forgotten both are also given with the prefix ``forget_``.
    """
    rows = {}
    for score in settings.scores:
        for size in outputs.cal_sizes:
            numbers = _numbers_per_draw(conformal_scores, score, size)
            for column, alpha in enumerate(settings.alphas):
                at_alpha = {key: values[:, column] for key, values in numbers.items()}
                row = {key: _reported(key, values) for key, values in at_alpha.items()}
                row |= _against_theory(outputs, size, alpha, at_alpha["test_coverage"])
                row |= _calibration_facts(outputs, size, at_alpha)
                rows[score.name, size, alpha] = row
    return {}, rows


def _numbers_per_draw(conformal_scores, score, size):
    """{key: draws × alphas} for one score and calibration size."""
    judgements = conformal_scores.judgements(score, size)
    numbers = {"q_hat": scores.from_log_odds(judgements["retain"].q_hats)}
    if "forget_by_retain" in judgements:
        numbers["q_hat_forget"] = scores.from_log_odds(judgements["forget"].q_hats)
    for group, judgement in judgements.items():
        described = _describe_draws(judgement, conformal_scores.settings.set_sizes)
        numbers |= {f"{group}_{key}": values for key, values in described.items()}
    return numbers


def _describe_draws(judgement, set_sizes):
    """Every metric of one group of images: {key: draws × alphas}."""
    part, images, q_hats = judgement
    if images is None:  # the same images in every draw: all thresholds together
        described = describe(part, q_hats.flatten(), set_sizes)
        return {key: values.view(q_hats.shape) for key, values in described.items()}
    draws = zip(images, q_hats, strict=True)
    described = [
        describe(part.select(chosen), thresholds, set_sizes) for chosen, thresholds in draws
    ]
    return {key: torch.stack([numbers[key] for numbers in described]) for key in described[0]}


def _reported(key, values):
    """A number over the draws. No q̂ judges ``misclassified``, which has no spread.

    Counts that no draw changes are integers.
    """
    number = over_draws(values)
    if key.endswith("misclassified"):
        mean = number.mean if isinstance(number, Spread) else number
        return int(mean) if bool((values == values[0]).all()) else mean
    if key.endswith("_fake") and len(values) == 1 and not math.isnan(number):
        return int(number)
    return number


def _calibration_facts(outputs, size, numbers):
    """How many images calibrate each q̂, and how many draws have no finite q̂ where the split has
    one.

    ``numbers`` holds ``q_hat`` R and, where classes are forgotten, ``q_hat_forget`` R.
    """
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


def _against_theory(outputs, size, alpha, test_coverage):
    """The test coverage that the theory expects (a :class:`Spread`), and whether the measured one
    (R) contradicts it.

    One draw contradicts the theory outside its central 99.9 %, many draws where their mean is four
    standard errors off. Where classes are forgotten the draws differ in how many retained images
    calibrate, and the theory is the mixture. Draws without a finite q̂ are left out. A split
    without one has no theory.
    """
    if test_coverage[0].isnan():
        return {"theory_coverage": Spread(math.nan, math.nan), "coverage_outside": False}
    known = (~test_coverage.isnan()).nonzero().flatten().tolist()
    sizes = [(len(outputs.calibration(size, draw)), len(outputs.test(draw))) for draw in known]
    laws = {(n, m): coverage_law(n, m, alpha) for n, m in set(sizes)}
    moments = {(n, m): (law.mean() / m, law.var() / m**2) for (n, m), law in laws.items()}
    means, variances = torch.tensor([moments[pair] for pair in sizes]).unbind(
        dim=1
    )  # float64, like SciPy's numbers
    # Law of total variance: the mean of the variances plus the variance of the means.
    theory = Spread(
        means.mean().item(), math.sqrt(variances.mean().item() + means.var(correction=0).item())
    )
    if len(known) == 1:
        m = sizes[0][1]
        low, high = laws[sizes[0]].interval(0.999)
        outside = not low <= round(test_coverage[0].item() * m) <= high
    else:
        distance = abs(test_coverage[known].mean().item() - theory.mean)
        outside = distance > 4 * theory.std / math.sqrt(len(known)) + ROUNDING
    return {"theory_coverage": theory, "coverage_outside": outside}
