"""Distances from one model to one Retrain."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scored import some_outputs

from metrics import comparison


def logits(count, seed=0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_changed_share_counts_other_predictions():
    original = torch.tensor([0, 1, 2, 3, 0])
    assert comparison.changed_share(torch.tensor([0, 2, 2, 1, 0]), original) == pytest.approx(0.4)
    assert comparison.changed_share(original, original) == 0


def test_tug_of_war_is_the_product_of_three_agreements():
    retrain = {"UA": 0.3, "RA": 0.9, "TA": 0.8, "MIA": 0.5}
    model = {"UA": 0.1, "RA": 1.0, "TA": 0.7, "MIA": 0.0}
    assert comparison.tug_of_war(model, retrain) == pytest.approx(0.8 * 0.9 * 0.9)
    assert comparison.tug_of_war(retrain, retrain) == 1
    for key in ("UA", "RA", "TA"):
        assert math.isnan(comparison.tug_of_war(model | {key: math.nan}, retrain))


def test_jensen_shannon_equals_scipys_and_is_between_zero_and_one():
    model, retrain = (logits(30, seed) for seed in (0, 1))
    expected = jensenshannon(model.double().softmax(1), retrain.double().softmax(1), 2, axis=1) ** 2
    assert comparison.jensen_shannon(model, retrain) == pytest.approx(expected.mean())
    assert comparison.jensen_shannon(model, model) == pytest.approx(0, abs=1e-12)
    opposite = torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])
    assert comparison.jensen_shannon(*opposite) == pytest.approx(1)
    assert math.isnan(comparison.jensen_shannon(model[:0], model[:0]))


def test_gap_is_the_mean_over_numbers_that_both_models_have():
    reference = {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4}
    actual = {"UA": 0.1, "RA": 1.0, "TA": 0.7, "MIA": math.nan, "AUC": 0.0}
    assert comparison.gap(actual, reference) == pytest.approx((0.4 + 0.1 + 0.1) / 3)
    assert comparison.gap(actual | {"MIA": 0.6}, reference) == pytest.approx(0.8 / 4)
    assert math.isnan(comparison.gap({"UA": 0.1}, {"UA": None, "RA": 1}))
    assert math.isnan(comparison.gap({}, reference)) and comparison.gap(reference, reference) == 0


def test_differences_are_between_finite_numbers_that_both_models_have():
    actual = {"a": 1, "b": 0.5, "c": True, "d": "x", "e": math.nan, "f": math.inf, "g": 2}
    other = {"a": 3, "b": 0.25, "c": False, "d": "y", "e": 1, "f": 1}
    assert comparison.differences(actual, other) == {"a_minus_retrain": -2, "b_minus_retrain": 0.25}


def test_distances_of_predictions_are_those_of_forget_and_test_images():
    model, retrain = some_outputs(2), some_outputs(2, seed=1)
    test = [each.held_out.select(torch.arange(45, 90)) for each in (model, retrain)]
    assert comparison.prediction_distances(model, retrain) == {
        "JSD_forget": comparison.jensen_shannon(model.forget.logits, retrain.forget.logits),
        "JSD_test": comparison.jensen_shannon(test[0].logits, test[1].logits),
    }
