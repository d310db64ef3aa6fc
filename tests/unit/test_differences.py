"""Rows compared with Retrain's: the gap, differences, and their words or intervals."""

import math

import pytest
import torch
from scipy import stats

from metrics import Interval
from metrics.intervals import Influences
from metrics.report import differences


def influences(*keys, values=(0.1, -0.1)):
    on_number = {key: Influences(torch.tensor(values), 2) for key in keys}
    none = {key: Influences(torch.zeros(2), 2) for key in keys}
    return on_number, none


def comparable(**numbers):
    scalars = {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4, "seconds": 10.0, "num_forget": 100}
    return scalars | numbers


def test_comparison_of_a_model_with_retrain_by_hand():
    model, retrain = comparable(UA=0.3, TA=0.7, seconds=0.5, weights="x"), comparable()
    actual = differences.compare_model("GA", model, retrain)
    assert actual["gap"] == pytest.approx((0.2 + 0 + 0.1 + 0) / 4)
    assert actual["ToW"] == pytest.approx(0.8 * 0.9)
    half = stats.t.ppf(0.975, 99) * math.sqrt(2 * 0.24 / 99)
    assert actual["MIA_minus_retrain"] == pytest.approx((0, -half, half))
    actual = differences.compare(model, retrain, influences("UA", "RA"))
    assert actual["TA_minus_retrain"] == pytest.approx(-0.1)
    assert "weights_minus_retrain" not in actual
    half = stats.t.ppf(0.975, 1) * math.sqrt(0.02 * 2 / 1)
    assert actual["UA_minus_retrain"] == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert "MIA_minus_retrain" not in differences.compare_model("retrain", retrain, retrain)


@pytest.mark.parametrize("key", ["forget_CR", "forget_by_retain_CR"])
def test_words_and_intervals_have_the_sign_of_forgetting(key):
    def cells(UA, CR, method="GA"):
        row = {"method": method, "forget_CR": 0.5, key: 0.5, "UA_minus_retrain": UA}
        row = differences.with_words(row | {f"{key}_minus_retrain": CR})
        return row.get("by_UA"), row.get("by_CR")

    above, below = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)
    around, unknown = Interval(0.1, -0.0125, 0.3), Interval(0.1, math.nan, math.nan)
    assert cells(above, above) == ("over-forgets", "under-forgets")
    assert cells(below, below) == ("under-forgets", "over-forgets")
    assert cells(around, around) == ("[-1.2, 30.0]", "[-0.300, 0.013]")
    assert cells(unknown, 0.2) == (None, None)
    assert cells(0.0, 0.0, "retrain") == ("reference", "reference")


def seeds_of(method, UA, CR_f, num_forget=1000):
    columns = {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": method}
    columns |= {"num_forget": num_forget, "q_hat": 0.9, "by_UA": "one seed", "by_CR": "one seed"}
    names = ("UA", "forget_CR", "UA_minus_retrain", "forget_CR_minus_retrain")
    pairs = zip(UA, CR_f, strict=True)
    return [columns | dict(zip(names, (0.5, 0.5, *pair), strict=True)) for pair in pairs]


def test_seeds_have_paired_intervals_of_the_known_differences():
    UA, CR_f = [0.1, 0.2, 0.3], [-0.1, math.nan, -0.1]
    rows = seeds_of("GA", UA, CR_f) + seeds_of("RL", [Interval(0.1, 0.05, 0.15)], [math.nan])
    GA, RL, retrain = differences.summarise_seeds(rows + seeds_of("retrain", [0, 0], [0, 0]))
    expected = stats.ttest_1samp(UA, 0).confidence_interval(0.95)
    assert GA["UA_minus_retrain"] == pytest.approx((0.2, *expected))
    # Two equal differences of 1000 images have the deviation of rounding.
    half = stats.t.ppf(0.975, 1) / 1000 / math.sqrt(6 * 2)
    assert GA["forget_CR_minus_retrain"] == pytest.approx((-0.1, -0.1 - half, -0.1 + half))
    assert (GA["by_UA"], GA["by_CR"]) == ("[-4.8, 44.8]", "over-forgets")
    assert RL["by_UA"] is None and RL["UA_minus_retrain"] == 0.1
    assert retrain["by_UA"] == retrain["by_CR"] == "reference"
