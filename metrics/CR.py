"""The conformal metrics: Coverage, Set Size, CR and fake forgetting (arXiv 2501.19403), ECF and EuCF (2508.03245).

Everything here is a pure function of logits and labels. Prediction sets are booleans N×K; what the metrics need of them
is for each image whether its own label is inside, and how many labels are. Both may have leading dimensions, one for
each q̂. Scores are float64 and compared as log-odds (see :mod:`metrics.scores`).

Where too few images calibrate, q̂ is infinite and every set holds every label, whatever the model does.
:func:`finite_quantile` alone decides this; a q̂ of NaN makes every number that it judges NaN.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch

from . import scores

ROW_COLUMNS = {
    "forget_coverage": ("Cov_f %", "percent"),
    "forget_set_size": ("Size_f", "number"),
    "forget_CR": ("CR_f", "number"),
    "test_coverage": ("Cov_t %", "percent"),
    "theory_coverage": ("theory %", "percent"),
    "test_set_size": ("Size_t", "number"),
    "test_CR": ("CR_t", "number"),
    "forget_misclassified": ("wrong", "count"),
    "forget_fake": ("fake", "count"),
    "forget_fake_ratio": ("fake %", "percent"),
    "forget_wrong_CR": ("CR_wrong", "number"),
    "forget_by_retain_coverage": ("Cov_f|r %", "percent"),
    "forget_by_retain_set_size": ("Size_f|r", "number"),
    "forget_by_retain_CR": ("CR_f|r", "number"),
}
SPREAD = "_resplit_std"  # ending of the keys that hold the standard deviation over the draws of calibration and test
TOGETHER = 16  # thresholds that are applied to a part at a time
ROUNDING = 1e-12  # of a mean coverage


def conformal_quantile(scores, alpha):
    """q̂: the k-th smallest of n calibration scores, k = ⌈(n+1)(1−α)⌉; infinity where k > n.

    ``scores`` is a tensor of n values, α lies in (0, 1). An exact order statistic. Raises ValueError for an α outside
    (0, 1).
    """
    k = quantile_rank(scores.numel(), alpha)
    if k > scores.numel():
        return math.inf
    return scores.kthvalue(k).values.item()


def finite_quantile(scores, alpha):
    """:func:`conformal_quantile`, and NaN where that is infinite."""
    return conformal_quantile(scores, alpha) if scores.numel() >= least_images(alpha) else math.nan


def least_images(alpha):
    """How many calibration images a finite q̂ needs: ⌈1/α⌉ − 1, with α as :func:`quantile_rank` reads it."""
    return math.ceil(1 / Fraction(str(float(alpha)))) - 1


def quantile_rank(n, alpha):
    """k = ⌈(n+1)(1−α)⌉, with α read as the decimal number that was typed, so that nothing is rounded."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, found {alpha}")
    return math.ceil((n + 1) * (1 - Fraction(str(float(alpha)))))


def at_most_one_label(q_hat):
    """Whether no set of 1 − p can hold two labels: q̂ < 1/2, which is where α lies above the model's error rate.

    S ≤ q̂ then means a probability above 1/2. Coverage and Set Size fall together and CR tends to 1 on
    forgotten and other images alike: such an α says nothing about forgetting.
    """
    return q_hat < 0.5


def judged_forget_images(row):
    """Under which name a row says how much was forgotten: where a class is, by the retained classes' calibration. The
    forgotten class's own images make a model that has forgotten it answer with every label."""
    return "forget_by_retain" if "forget_by_retain_CR" in row else "forget"


def prediction_sets(scores, q_hat):
    """C(x) = {y : S(x, y) ≤ q̂} as booleans. Scores N×K → sets N×K."""
    return scores <= q_hat


def in_set(sets, labels):
    """Whether each image's own label is in its set. Sets N×K, labels N → booleans N."""
    return sets.gather(1, labels[:, None]).squeeze(1)


def coverage(inside):
    """Share of images with their own label in the set (the paper's Coverage). Booleans …×N → …, float64 in [0, 1]."""
    return inside.double().mean(dim=-1)


def set_size(sizes):
    """Mean number of labels in a set (the paper's Set Size). Numbers …×N → …, float64 in [0, K]."""
    return sizes.double().mean(dim=-1)


def conformal_ratio(inside, sizes):
    """The paper's CR = Coverage / Set Size; 0 where every set is empty. Low on forgotten images, high on test.

    Booleans and numbers …×N → …, float64.
    """
    return coverage(inside) / set_size(sizes).where(sizes.sum(dim=-1) > 0, math.inf)


def ratio_error(inside, sizes):
    """Standard error of CR over the images, to first order in the two means. Booleans and numbers …×N → …, float64."""
    residuals = inside.double() - conformal_ratio(inside, sizes)[..., None] * sizes
    error = residuals.square().mean(dim=-1).sqrt() / math.sqrt(max(sizes.shape[-1], 1))
    return error / set_size(sizes).where(sizes.sum(dim=-1) > 0, math.inf)


def fake_forgetting(inside, wrong):
    """Of the images whose argmax is ``wrong`` (booleans N), how many still have their label in the set (the paper's
    fake forgetting). Booleans …×N → …, int64."""
    return (inside & wrong).sum(dim=-1)


def efficient_coverage(inside, sizes, c):
    """ECF@c (Alkhatib & Tay 2025, 2508.03245): share of the images covered by a set of at most c labels. …×N → …"""
    return coverage(inside & (sizes <= c))


def efficient_miscoverage(inside, sizes, d):
    """EuCF@d (the same paper): share of the images not covered by a set of at most d labels. …×N → …"""
    return coverage(~inside & (sizes <= d))


def coverage_law(n, m, alpha):
    """The exact law of how many of m test images n calibration images cover, for exchangeable scores without ties:
    beta-binomial(m; k, n + 1 − k), the beta law of split conformal prediction seen through m images (Vovk 2012,
    1209.2673). Returns a frozen scipy distribution, or None where q̂ is infinite and all are covered."""
    from scipy import stats  # takes a second

    k = quantile_rank(n, alpha)
    return stats.betabinom(m, k, n + 1 - k) if k <= n else None


class Scored(NamedTuple):
    """A part of the data, ready for any number of thresholds: its own labels' scores N, every label's scores N×K in
    ascending order, both as log-odds, and whether the argmax is wrong N."""

    own: torch.Tensor
    ranked: torch.Tensor
    wrong: torch.Tensor

    def of(self, indices):
        return Scored(*(values[indices] for values in self))


def score_part(output, score, part):
    """:class:`Scored` for logits N×K and labels N; ``part`` names which random numbers a randomised score takes."""
    found = score.log_odds(output.logits, part)
    own = found.gather(1, output.labels[:, None]).squeeze(1)
    return Scored(own, found.sort().values, output.logits.argmax(dim=1) != output.labels)


def split_q_hats(held_out, outputs, size, alphas, *, forgotten=False):
    """The q̂ that judge images, one per draw and α, as log-odds; NaN where too few images calibrate. → draws×alphas.

    ``held_out`` is the :class:`Scored` of the held-out images. Calibrated on the first ``size`` images of each draw:
    those of the retained classes, or of the forgotten class.
    """
    indices_of = outputs.forget_calibration if forgotten else outputs.calibration
    calibration = [held_out.own[indices_of(size, draw)] for draw in range(outputs.num_draws)]
    q_hats = [[finite_quantile(own, alpha) for alpha in alphas] for own in calibration]
    return torch.tensor(q_hats, dtype=torch.float64)


def apply_thresholds(scored, q_hats):
    """For each q̂ and image: is the own label in the set, and how many labels are? Q thresholds → Q×N booleans, Q×N.

    What a q̂ of NaN gives means nothing; :func:`describe` makes it NaN.
    """
    q_hats = torch.as_tensor(q_hats, dtype=torch.float64)
    sizes = torch.searchsorted(scored.ranked, q_hats.expand(len(scored.own), -1).contiguous(), right=True)
    return scored.own <= q_hats[:, None], sizes.T.contiguous()


def describe(scored, q_hats, set_sizes=()):
    """Every metric of one part of the data under each of Q thresholds: a dict of tensors Q, float64.

    NaN under a q̂ of NaN, except the number of misclassified images, which no q̂ judges.
    """
    parts = [
        _describe(scored, part, set_sizes) for part in torch.as_tensor(q_hats, dtype=torch.float64).split(TOGETHER)
    ]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _describe(scored, q_hats, set_sizes):
    inside, sizes = apply_thresholds(scored, q_hats)
    wrong = scored.wrong
    fake = fake_forgetting(inside, wrong).double()
    found = {
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
        found[f"ECF@{size}"] = efficient_coverage(inside, sizes, size)
        found[f"EuCF@{size}"] = efficient_miscoverage(inside, sizes, size)
    found = {key: values.where(~q_hats.isnan(), math.nan) for key, values in found.items()}
    return {"misclassified": wrong.sum().double().expand(len(q_hats))} | found


def over_draws(found):
    """Mean and standard deviation over the draws: {key: tensor R} → {key: mean, key_resplit_std: std}, floats.

    The first draw is the split itself: what it does not know (NaN) is NaN. Other draws that do not know a number are
    left out of its mean. One draw has no spread. Counts that no draw changes stay whole numbers.
    """
    row = {}
    for key, values in found.items():
        known = values[~values.isnan()] if not values[0].isnan() else values[:1]
        same = bool((known == known[0]).all())
        row[key] = known[0].item() if same else known.mean().item()
        if key.endswith("misclassified") or (key.endswith("_fake") and len(values) == 1):
            row[key] = int(row[key]) if same else row[key]
        elif len(values) > 1:
            row[key + SPREAD] = math.nan if len(known) == 1 else 0.0 if same else known.std().item()
    return row


def report(outputs, settings):
    """All conformal numbers of one model, per (score, calibration size, α), each the mean over the draws of
    calibration and test images, with its standard deviation.

    Returns ``({}, rows)``. Each part of the data (forget, retain, test) is judged with the q̂ of the calibration
    images. Where classes are forgotten, forget and forget_test are judged with the q̂ of the forgotten class's own
    held-out images as the paper does, and the keys ``…_by_retain`` judge them with that of the retained classes.
    ``theory_coverage`` is the mean that exchangeability gives, and ``coverage_outside`` says that test coverage is
    not what the theory allows. ``calibration_images`` counts the split's own, ``draws_left_out`` the draws without a
    finite q̂ where the split has one; both also with ``forget_`` in front where classes are forgotten.
    """
    rows = {}
    for score in settings.scores:
        parts = {name: score_part(getattr(outputs, name), score, name) for name in ("forget", "retain", "held_out")}
        for size in outputs.cal_sizes:
            found = _over_thresholds(outputs, parts, size, settings)
            for number, alpha in enumerate(settings.alphas):
                row = over_draws({key: values[:, number] for key, values in found.items()})
                row |= _against_theory(outputs, size, alpha, found["test_coverage"][:, number])
                row |= _calibration_facts(
                    outputs, size, {key: found[key][:, number] for key in found if "q_hat" in key}
                )
                rows[score.name, size, alpha] = row
    return {}, rows


def _over_thresholds(outputs, parts, size, settings):
    """{key: draws × alphas} for one score and calibration size."""
    draws = range(outputs.num_draws)
    classes = outputs.forgotten is not None

    def fixed(name, thresholds):
        found = describe(parts[name], thresholds.flatten(), settings.set_sizes)
        return {key: values.view(thresholds.shape) for key, values in found.items()}

    def drawn(indices_of, thresholds):
        found = [
            describe(parts["held_out"].of(indices_of(draw)), thresholds[draw], settings.set_sizes) for draw in draws
        ]
        return {key: torch.stack([one[key] for one in found]) for key in found[0]}

    retained = split_q_hats(parts["held_out"], outputs, size, settings.alphas)
    judged = {"retain": fixed("retain", retained), "test": drawn(outputs.test, retained)}
    own = split_q_hats(parts["held_out"], outputs, size, settings.alphas, forgotten=True) if classes else retained
    judged["forget"] = fixed("forget", own)
    if classes:
        judged["forget_test"] = drawn(outputs.forget_test, own)
        judged["forget_by_retain"] = fixed("forget", retained)
        judged["forget_test_by_retain"] = drawn(outputs.forget_test, retained)
    found = {"q_hat": retained} | ({"q_hat_forget": own} if classes else {})
    found = {key: scores.from_log_odds(values) for key, values in found.items()}
    return found | {f"{name}_{key}": values for name, part in judged.items() for key, values in part.items()}


def _calibration_facts(outputs, size, q_hats):
    """How many images calibrate each of ``q_hats`` ({"q_hat": R, "q_hat_forget": R where classes are forgotten}), and
    how many draws have no finite q̂ where the split has one."""
    facts = {}
    for key, values in q_hats.items():
        prefix, indices_of = ("", outputs.calibration) if key == "q_hat" else ("forget_", outputs.forget_calibration)
        facts[f"{prefix}calibration_images"] = len(indices_of(size))
        facts[f"{prefix}draws_left_out"] = 0 if values[0].isnan() else int(values.isnan().sum())
    return facts


def _against_theory(outputs, size, alpha, found):
    """Mean and standard deviation of test coverage by the theory, and whether what was found lies outside.

    One draw lies outside when it is not among the central 99.9 %, many when their mean is four standard errors off.
    Where classes are forgotten the draws differ in how many retained images they calibrate on, and the theory is the
    mixture. Draws without a finite q̂ are left out, and a split without one has no theory.
    """
    known = [] if found[0].isnan() else (~found.isnan()).nonzero().flatten().tolist()
    if not known:
        return {"theory_coverage": math.nan, "theory_coverage" + SPREAD: math.nan, "coverage_outside": False}
    sizes = [(len(outputs.calibration(size, draw)), len(outputs.test(draw))) for draw in known]
    laws = {(n, m): coverage_law(n, m, alpha) for n, m in set(sizes)}
    moments = {(n, m): (law.mean() / m, law.var() / m**2) for (n, m), law in laws.items()}
    means, variances = torch.tensor([moments[one] for one in sizes]).unbind(dim=1)  # float64, as SciPy's numbers are
    mean, std = means.mean().item(), math.sqrt(variances.mean().item() + means.var(correction=0).item())
    if len(known) == 1:
        m = sizes[0][1]
        low, high = laws[sizes[0]].interval(0.999)
        outside = not low <= round(found[0].item() * m) <= high
    else:
        outside = abs(found[known].mean().item() - mean) > 4 * std / math.sqrt(len(known)) + ROUNDING
    return {"theory_coverage": mean, "theory_coverage" + SPREAD: std, "coverage_outside": outside}
