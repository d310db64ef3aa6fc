"""Rows compared with Retrain's: the gap, differences, and verdicts on one and several seeds."""

import math

import pytest

from metrics.report import verdicts


def comparable(**numbers):
    scalars = {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4, "seconds": 10.0, "num_forget": 100}
    return scalars | numbers


def test_comparison_of_a_model_with_retrain_has_gap_and_verdict():
    actual = verdicts.compare_model("GA", comparable(UA=0.3, TA=0.7, seconds=0.5), comparable())
    assert actual["gap"] == pytest.approx((0.2 + 0 + 0.1 + 0) / 4)
    assert actual["ToW"] == pytest.approx(0.8 * 0.9) and actual["RTE"] == 0.05
    assert actual["UA_minus_retrain"] == pytest.approx(-0.2)
    assert actual["TA_minus_retrain"] == pytest.approx(-0.1)
    # The tolerance is that of the two-proportion z-test, e.g. 2·√(2 · 0.24 / 100) = 0.139 at 0.3.
    words = {0.3: "under-forgets", 0.37: "matches", 0.63: "matches", 0.65: "over-forgets"}
    words[math.nan] = None
    for ua, word in words.items():
        assert verdicts.compare_model("GA", comparable(UA=ua), comparable())["UA_word"] == word


@pytest.mark.parametrize("key", ["forget_CR", "forget_by_retain_CR"])
def test_sets_with_higher_CR_than_retrain_under_forget(key):
    reference = {"forget_CR": 0.9, "test_CR": 0.6, key: 0.5, f"{key}_error": 0.03}

    def compare(value, error=0.04, num_forget=100):
        row = {"forget_CR": 0.1, "test_CR": 0.7, key: value, f"{key}_error": error}
        return verdicts.compare_sets(row, reference, num_forget)

    # The tolerance is 2 · √(0.03² + 0.04²) = 0.1.
    words = {0.61: "under-forgets", 0.59: "matches", 0.41: "matches", 0.39: "over-forgets"}
    assert {value: compare(value)["CR_word"] for value in words} == words
    assert compare(0.61, num_forget=5)["CR_word"] == "matches"  # one image is 0.2
    assert compare(math.nan)["CR_word"] is None and compare(0.5, math.nan)["CR_word"] is None
    assert compare(0.6)["test_CR_minus_retrain"] == pytest.approx(0.1)
    assert compare(0.6)[f"{key}_minus_retrain"] == pytest.approx(0.1)


def seeds_of(method, UA, CR_f, num_forget=50):
    columns = {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": method}
    columns |= {"num_forget": num_forget, "q_hat": 0.9}
    return [columns | {"UA": ua, "forget_CR": r} for ua, r in zip(UA, CR_f, strict=True)]


def words(*rows):
    """{method: (verdict by UA, verdict by CR)} of a summary over seeds."""
    summary = verdicts.summarise_seeds([row for seeds in rows for row in seeds])
    return {row["method"]: (row.get("UA_word"), row.get("CR_word")) for row in summary}


def test_verdicts_over_seeds_tolerate_one_image_of_the_smallest_forget_set():
    reference = seeds_of("retrain", [1.0, 1.0], [0.1, 0.1])
    far = seeds_of("finetune", [0.97] * 2, [0.0, 0.15])
    methods = seeds_of("GA", [0.999] * 2, [0.119] * 2), seeds_of("salun", [0.97] * 2, [0.12, 0.13])
    assert words(reference, far, *methods) == {
        "retrain": ("matches", "matches"),
        "GA": ("matches", "matches"),
        "finetune": ("under-forgets", "over-forgets"),
        "salun": ("under-forgets", "under-forgets"),
    }
    assert words(reference, [far[0] | {"num_forget": 10}, far[1]])["finetune"][0] == "matches"


def test_verdicts_over_seeds_tolerate_two_deviations_of_retrain():
    reference = seeds_of("retrain", [0.4, 0.6], [0.2, 0.4], 1000)  # deviations of 0.1414
    actual = words(reference, seeds_of("GA", [0.79] * 2, [0.02] * 2, 1000))
    assert actual["GA"] == ("over-forgets", "matches")
    actual = words(reference, seeds_of("GA", [0.77] * 2, [0.01] * 2, 1000))
    assert actual["GA"] == ("matches", "over-forgets")
