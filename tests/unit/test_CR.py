"""q̂, Coverage, Set Size, CR and fake forgetting: by hand, by loops and by theory."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from scipy import stats
from scored import (
    logits_of,
    plain_log_odds,
    plain_numbers,
    plain_q_hat,
    plain_score,
    report,
    some_outputs,
)

import metrics
from metrics import CR, Spread, conformal, scores


@hypothesis_settings(max_examples=200, deadline=None)
@given(strategies.integers(0, 60), strategies.integers(1, 999))
def test_q_hat_is_finite_exactly_where_enough_images_calibrate(n, thousandths):
    alpha, values = thousandths / 1000, torch.arange(n).double()
    exact = Fraction(thousandths, 1000)
    k = math.ceil((n + 1) * (1 - exact))
    assert CR.quantile_rank(n, alpha) == k
    assert CR.least_images(alpha) == next(n for n in range(1000) if (n + 1) * exact >= 1)
    if k > n:
        assert math.isnan(CR.finite_quantile(values, alpha))
        assert CR.conformal_quantile(values, alpha) == math.inf
    else:
        assert CR.finite_quantile(values, alpha) == CR.conformal_quantile(values, alpha) == k - 1


def test_sets_coverage_size_and_ratio_by_hand():
    logits = logits_of(
        [[0.70, 0.20, 0.10], [0.45, 0.40, 0.15], [0.25, 0.25, 0.50], [0.90, 0.05, 0.05]]
    )
    labels = torch.tensor([0, 1, 0, 2])
    assert CR.prediction_sets(torch.tensor([0.2, 0.5, 0.6]), 0.5).tolist() == [1, 1, 0]
    sets = CR.prediction_sets(scores.thr(logits), 0.75)  # p ≥ 0.25
    assert sets.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    inside, sizes = sets[range(4), labels], sets.sum(dim=1)
    assert CR.coverage(inside) == 3 / 4
    assert CR.set_size(sizes) == 7 / 4
    assert CR.conformal_ratio(inside, sizes).item() == pytest.approx(3 / 7)
    # Images 1, 2 and 3 are misclassified; the labels of 1 and 2 are in their sets.
    wrong = logits.argmax(dim=1) != labels
    assert wrong.sum() == 3 and CR.fake_forgetting(inside, wrong) == 2
    thresholds = [math.log(3), 50.0, math.nan]  # log-odds of 0.75 and of almost 1; no finite q̂
    part = conformal.score_images(metrics.Output(logits, labels), scores.Score(), "")
    actual = CR.set_metrics(part, thresholds)
    assert actual.pop("misclassified").tolist() == [3, 3, 3]
    assert all(math.isnan(values[2]) for values in actual.values())
    actual = {key: values[:2] for key, values in actual.items()}
    assert actual["coverage"].tolist() == [3 / 4, 1] and actual["set_size"].tolist() == [7 / 4, 3]
    assert actual["fake"].tolist() == [2, 3] and actual["empty"].tolist() == [0, 0]
    # At q̂ = 0.28, labels need a probability of 0.72: only the last image has one.
    assert CR.set_metrics(part, [math.log(0.28 / 0.72)])["empty"].item() == 3 / 4
    assert actual["fake_ratio"].tolist() == pytest.approx([2 / 3, 1])
    assert actual["wrong_set_size"].tolist() == [2, 3]
    assert actual["wrong_CR"].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_mean_over_draws_omits_draws_without_a_number():
    nan = math.nan
    values = {
        "coverage": [0.2, nan, 0.4],
        "unknown": [nan, 0.5, 0.6],
        "alone": [0.3, nan, nan],
        "same": [0.5, 0.5, nan],
    }
    spreads = {
        key: CR.over_draws(torch.tensor(row, dtype=torch.float64)) for key, row in values.items()
    }
    assert spreads["coverage"] == pytest.approx(Spread(0.3, 0.02**0.5))
    assert all(math.isnan(number) for number in spreads["unknown"])
    assert spreads["alone"].mean == 0.3 and math.isnan(spreads["alone"].std)
    assert spreads["same"] == Spread(0.5, 0.0)
    assert all(isinstance(spread, Spread) for spread in spreads.values())


def mean(number):
    return number.mean if isinstance(number, metrics.Spread) else number


def mean_of(values):
    known = [value for value in values if value is not None]
    return math.nan if values[0] is None else sum(known) / len(known)


@pytest.mark.parametrize(
    ("num_draws", "forgotten_class"),
    [(1, None), (4, None), (1, 3), (4, 3)],
    ids=["one", "four", "class", "classes"],
)
def test_report_equals_loops_over_draws_and_images(num_draws, forgotten_class):
    outputs = some_outputs(num_draws, forgotten_class)
    score, alphas = scores.Score(), (0.04, 0.2, 0.25)
    scalars, rows = report(CR, outputs, metrics.Settings(alphas, (score,)))
    assert scalars == {}
    assert set(rows) == {("thr", size, alpha) for size in (20, 45) for alpha in alphas}
    held_out = outputs.held_out
    label_scores = plain_log_odds(held_out, score, "held_out")
    is_forgotten = [label == forgotten_class for label in held_out.labels.tolist()]
    for (_, size, alpha), row in rows.items():
        values_of, q_hats, forget_q_hats, sizes = {}, [], [], []
        for draw in outputs.draws.tolist():
            calibration = [image for image in draw[:size] if not is_forgotten[image]]
            forget_calibration = [image for image in draw[:size] if is_forgotten[image]]
            test = [image for image in draw[45:] if not is_forgotten[image]]
            forget_test = [image for image in draw[45:] if is_forgotten[image]]
            q_hat = plain_q_hat([label_scores[image] for image in calibration], alpha)
            forget_q_hat = plain_q_hat([label_scores[image] for image in forget_calibration], alpha)
            q_hats.append(q_hat)
            forget_q_hats.append(forget_q_hat)
            sizes.append((len(calibration), len(forget_calibration), len(test)))
            images_of = {"retain": (outputs.retain, range(len(outputs.retain.labels)), q_hat)}
            every = range(len(outputs.forget.labels))
            images_of["test"] = held_out, test, q_hat
            images_of["forget"] = outputs.forget, every, q_hat
            if forgotten_class is not None:
                images_of["forget"] = outputs.forget, every, forget_q_hat
                images_of["forget_test"] = held_out, forget_test, forget_q_hat
                images_of["forget_by_retain"] = outputs.forget, every, q_hat
                images_of["forget_test_by_retain"] = held_out, forget_test, q_hat
            for name, (output, chosen, threshold) in images_of.items():
                numbers = plain_numbers(output, chosen, threshold, score)
                for key, value in numbers.items():
                    values_of.setdefault(f"{name}_{key}", []).append(value)
        values_of["q_hat"] = [None if q is None else plain_score(q) for q in q_hats]
        if forgotten_class is not None:
            values_of["q_hat_forget"] = [
                None if q is None else plain_score(q) for q in forget_q_hats
            ]
        for key, values in values_of.items():
            assert mean(row[key]) == pytest.approx(mean_of(values), nan_ok=True), (key, values)
            known = [value for value in values if value is not None]
            has_spread = not key.endswith("misclassified") and num_draws > 1
            assert isinstance(row[key], Spread) == has_spread
            if has_spread:
                std = math.nan if values[0] is None or len(known) < 2 else np.std(known, ddof=1)
                assert row[key].std == pytest.approx(std, nan_ok=True, abs=1e-12), (key, values)
        facts = {
            "calibration_images": sizes[0][0],
            "draws_left_out": sum(q is None for q in q_hats if q_hats[0]),
        }
        if forgotten_class is not None:
            facts["forget_calibration_images"] = sizes[0][1]
            facts["forget_draws_left_out"] = (
                sum(q is None for q in forget_q_hats) if forget_q_hats[0] is not None else 0
            )
        assert {key: row[key] for key in facts} == facts
        assert set(row) == {*values_of, *facts}


def test_coverage_over_500_random_splits_has_mean_and_spread_of_theory():
    """That of split conformal prediction (Vovk 2012, 1209.2673): a beta-binomial distribution."""
    outputs = some_outputs(500, counts=(40, 50, 300), cal_sizes=(100,))
    measured = report(CR, outputs, metrics.Settings((0.1,)))[1]["thr", 100, 0.1]["test_coverage"]
    k = math.ceil(101 * 0.9)
    law = stats.betabinom(200, k, 101 - k)
    assert abs(measured.mean - law.mean() / 200) < 4 * law.std() / 200 / math.sqrt(500)
    assert measured.std == pytest.approx(law.std() / 200, rel=0.1)


def test_small_functions_at_their_limits():
    assert CR.at_most_one_label(0.49) and not CR.at_most_one_label(0.5)
    assert not CR.at_most_one_label(math.nan)
    assert CR.forget_group({"forget_by_retain_CR": math.nan}) == "forget_by_retain"
    assert CR.forget_group({"forget_CR": 1, "retain_CR": 1}) == "forget"
    assert CR.over_draws(torch.tensor([0.5]).double()) == 0.5
    unknown = CR.over_draws(torch.tensor([math.nan]).double())
    assert isinstance(unknown, float) and math.isnan(unknown)


@pytest.mark.parametrize(("n", "alpha", "k"), [(9, 0.1, 9), (9, 0.2, 8), (199, 0.05, 190)])
def test_q_hat_is_the_kth_smallest_score(n, alpha, k):
    values = torch.from_numpy(np.random.default_rng(0).permutation(n) + 1.0)
    assert CR.conformal_quantile(values, alpha) == k
    for impossible in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            CR.conformal_quantile(values, impossible)
