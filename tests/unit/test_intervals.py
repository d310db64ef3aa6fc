"""Intervals of differences to Retrain: how often equal laws get a word, and the README's power."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scored import some_outputs

import metrics
from metrics import CR, accuracy, intervals

README = Path(metrics.__file__).with_name("README.md")
FORGET, HELD_OUT, CALIBRATION, SEED = 300, 1000, 300, 0
SEEDS = (2, 3, 5, 8, 16)


def share_of_words(found):
    return np.mean([intervals.word(interval) is not None for interval in found])


@pytest.mark.parametrize("n", SEEDS)
def test_equal_laws_over_seeds_get_a_word_in_five_percent(n):
    pairs = np.random.default_rng(n).standard_normal((2, 3000, n))
    found = [intervals.over_seeds(differences) for differences in pairs[0] - pairs[1]]
    assert share_of_words(found) == pytest.approx(0.05, abs=0.015)
    # Two deviations of Retrain, the rule of many tables, are no test.
    two_deviations = abs((pairs[0] - pairs[1]).mean(axis=1)) > 2 * pairs[1].std(axis=1, ddof=1)
    assert n > 3 or two_deviations.mean() > 0.1


def test_few_images_in_two_seeds_get_no_more_words():
    """Shares of 80 images: both differences are often equal, and their deviation is zero."""
    shares = np.random.default_rng(0).binomial(80, 0.02, (2, 3000, 2)) / 80
    differences = shares[0] - shares[1]
    assert share_of_words([intervals.over_seeds(d) for d in differences]) > 0.08
    assert share_of_words([intervals.over_seeds(d, 1 / 80) for d in differences]) < 0.05


def test_intervals_by_hand():
    for low, high, word in ((0, 1, None), (-1, 0, None), (0.1, 1, "over"), (-1, -0.1, "under")):
        found = intervals.word(metrics.Interval(0, low, high))
        assert found == (word and f"{word}-forgets")
    t = stats.t(10).ppf(0.975)
    shares = intervals.over_shares(0.3, 0.5, 11)
    assert shares == pytest.approx((-0.2, -0.2 - t * 0.046**0.5, -0.2 + t * 0.046**0.5))
    first = intervals.Influences(torch.tensor([0.1, -0.1, 0.3]).double(), 12)
    second = intervals.Influences(torch.tensor([0.0, 0.1, 0.1]).double(), 11)
    half = t * (0.09 * 11 / 10) ** 0.5
    assert intervals.over_images(1, first, second) == pytest.approx((1, 1 - half, 1 + half))
    # Two equal differences: the deviation is that of rounding two numbers to 0.06.
    half = stats.t(1).ppf(0.975) * 0.06 / 12**0.5
    assert intervals.over_seeds([0.5, 0.5], 0.06) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_influences_on_accuracies_are_those_of_their_images():
    outputs = some_outputs(1)
    images = {"UA": outputs.forget, "RA": outputs.retain}
    images["TA"] = outputs.held_out.select(outputs.test())
    for key, found in intervals.model_influences(outputs).items():
        correct = (images[key].logits.argmax(dim=1) == images[key].labels).double()
        assert found.num_images == len(correct)
        torch.testing.assert_close(found.values, (correct - correct.mean()) / len(correct))


def two_models(rng, num_draws=1, forgotten=False):
    """The Outputs of two models of one law on the same random images of four classes."""
    outputs, of_class = ([], []), None
    for count in (FORGET, 2, HELD_OUT):
        labels = torch.randint(4, (count,), generator=rng)
        if forgotten:
            labels, of_class = (labels if count > FORGET else labels * 0), labels == 0
        common = torch.randn(count, 4, generator=rng) + 2.5 * torch.eye(4)[labels]
        for parts in outputs:
            parts.append(metrics.Output(common + torch.randn(count, 4, generator=rng), labels))
    draws = metrics.draw_splits(HELD_OUT, num_draws)
    return [metrics.Outputs(*parts, [CALIBRATION], draws, of_class) for parts in outputs]


def measured(outputs):
    """{key: number} and {key: influences} of a model."""
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.1,)))
    influences = intervals.set_influences(conformal_scores, "thr", CALIBRATION, 0.1)
    forget, held_out = map(conformal_scores.part, ("forget", "held_out"))
    values = []
    for draw, q_hat in enumerate(conformal_scores.q_hats()):
        on_forget = CR.set_metrics(forget, q_hat)
        on_test = CR.set_metrics(held_out.select(outputs.test(draw)), q_hat)
        values.append([on_forget["CR"], on_forget["fake_ratio"], on_test["CR"]])
    numbers = dict(zip(influences, np.mean(values, axis=0).flatten().tolist(), strict=True))
    numbers |= accuracy.report(outputs, None, None)[0]
    return numbers, intervals.model_influences(outputs) | influences


SIMULATIONS = {"one draw": (300, {}), "draws": (100, {"num_draws": 5})}
SIMULATIONS |= {"class": (100, {"forgotten": True})}


@pytest.mark.parametrize("case", SIMULATIONS)
def test_equal_laws_on_one_seed_get_a_word_in_five_percent(case):
    count, options = SIMULATIONS[case]
    rng, found = torch.Generator().manual_seed(SEED), {}
    for _ in range(count):
        (numbers, influences), (other, others) = map(measured, two_models(rng, **options))
        for key in influences.keys() - {"RA"}:
            both = influences[key], others[key]
            interval = intervals.over_images(numbers[key] - other[key], *both)
            found.setdefault(key, []).append(interval)
    group = "forget_by_retain" if case == "class" else "forget"
    assert found.keys() == {"UA", "TA", f"{group}_CR", f"{group}_fake_ratio", "test_CR"}
    for key, many in found.items():
        # The length of the intervals is that of the spread over samples of images.
        half = np.mean([interval.high - interval.mean for interval in many])
        spread = np.std([interval.mean for interval in many])
        assert half == pytest.approx(1.96 * spread, rel=0.1 if count > 200 else 0.2), key
        tolerance = 0.015 if count > 200 else 0.045
        assert share_of_words(many) == pytest.approx(0.05, abs=tolerance), key


def test_equal_predictions_have_the_interval_zero_and_one_image_has_none():
    numbers, influences = measured(two_models(torch.Generator().manual_seed(0), num_draws=3)[0])
    for key, on_number in influences.items():
        assert intervals.over_images(0.0, on_number, on_number) == (0, 0, 0), key
        assert on_number.values.abs().sum() > 0
    other = on_number._replace(values=on_number.values * 2, num_images=1)
    assert math.isnan(intervals.over_images(0.1, on_number, other).low)
    assert math.isnan(intervals.over_seeds([0.1], 0.01).low)
    assert intervals.word(intervals.over_shares(1, 0, 1)) is None


@pytest.mark.parametrize(("size", "is_known"), [(30, False), (45, True)])
def test_sets_of_few_calibration_images_have_no_interval(size, is_known):
    """At α = 0.1, two deviations of the coverage under q̂ are 0.1 for 34 images."""
    conformal_scores = metrics.ConformalScores(
        some_outputs(2, cal_sizes=(30, 45)), metrics.Settings((0.2, 0.1))
    )
    influences = intervals.set_influences(conformal_scores, "thr", size, 0.1)
    assert all(values.isfinite().all() == is_known for values, _ in influences.values())


def test_readme_has_the_power_of_the_paired_t_test():
    """A difference of k standard deviations of one training is k/√2 of a paired difference."""
    text = README.read_text(encoding="utf-8").partition("<!-- power -->")[2]
    rows = re.findall(r"^\| (\d+) \| (\d+) % \| (\d+) % \| (\d+) % \|$", text, re.MULTILINE)
    expected = []
    for n in SEEDS:
        limit = stats.t.ppf(0.975, n - 1)
        laws = [stats.nct(n - 1, k * math.sqrt(n / 2)) for k in (1, 2, 3)]
        powers = [law.sf(limit) + law.cdf(-limit) for law in laws]
        expected.append((str(n), *(f"{100 * power:.0f}" for power in powers)))
    assert rows == expected
