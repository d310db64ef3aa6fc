"""Rows compared with Retrain's: the gap, differences, and verdicts on one and several seeds."""

import math

import pytest

from metrics.report import verdicts


def comparable(**numbers):
    scalars = {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4, "seconds": 10.0, "num_forget": 100}
    return scalars | numbers


def test_comparison_of_a_model_with_retrain_has_gap_and_verdict():
    actual = verdicts.compare_model("GA", comparable(UA=0.3, TA=0.7, seconds=2.5), comparable())
    assert actual["gap"] == pytest.approx((0.2 + 0 + 0.1 + 0) / 4)
    assert actual["ToW"] == pytest.approx(0.8 * 0.9)
    assert actual["UA_minus_retrain"] == pytest.approx(-0.2) and actual[
        "TA_minus_retrain"
    ] == pytest.approx(-0.1)
    assert (
        actual["RTE"] == 0.25 and actual["UA_word"] == "under-forgets"
    )  # beyond 2·√(2 · 0.24 / 100) = 0.139
    words = [
        verdicts.compare_model("GA", comparable(UA=ua), comparable())["UA_word"]
        for ua in (0.37, 0.63, 0.65)
    ]
    assert words == ["matches", "matches", "over-forgets"]
    for name, seconds in (("original", 3.0), ("GA", None), ("GA", 0.0)):
        assert "RTE" not in verdicts.compare_model(name, comparable(seconds=seconds), comparable())
    assert "RTE" not in verdicts.compare_model("GA", comparable(), comparable(seconds=math.nan))
    assert verdicts.compare_model("GA", comparable(UA=math.nan), comparable())["UA_word"] is None


@pytest.mark.parametrize("reference_seconds", [None, 0.0])
def test_running_time_has_no_ratio_to_an_unknown_time(reference_seconds):
    reference = comparable(seconds=reference_seconds)
    assert "RTE" not in verdicts.compare_model("GA", comparable(), reference)
    short = verdicts.compare_model("GA", comparable(seconds=0.2), comparable(seconds=0.5))
    assert short["RTE"] == pytest.approx(0.4)


@pytest.mark.parametrize("key", ["forget_CR", "forget_by_retain_CR"])
def test_sets_with_higher_CR_than_retrain_under_forget(key):
    reference = {"forget_CR": 0.9, "test_CR": 0.6, key: 0.5, f"{key}_error": 0.03}

    def compare(value, error=0.04, num_forget=100):
        row = {"forget_CR": 0.1, "test_CR": 0.7, key: value, f"{key}_error": error}
        return verdicts.compare_sets(row, reference, num_forget)

    # The tolerance is 2 · 0.05.
    assert compare(0.61)["CR_word"] == "under-forgets"
    assert compare(0.39)["CR_word"] == "over-forgets"
    assert compare(0.59)["CR_word"] == compare(0.41)["CR_word"] == "matches"
    assert compare(0.61, num_forget=5)["CR_word"] == "matches"  # one image is 0.2
    assert compare(math.nan)["CR_word"] is None and compare(0.5, math.nan)["CR_word"] is None
    assert compare(0.6)["test_CR_minus_retrain"] == pytest.approx(0.1)
    assert compare(0.6)[f"{key}_minus_retrain"] == pytest.approx(0.1)


def seeds_of(method, UA, CR_f, num_forget=50, **numbers):
    columns = {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": method}
    pairs = zip(UA, CR_f, strict=True)
    return [
        columns | {"UA": ua, "forget_CR": cr, "num_forget": num_forget, "q_hat": 0.9} | numbers
        for ua, cr in pairs
    ]


def test_verdicts_over_seeds_tolerate_one_image():
    reference = seeds_of("retrain", [1.0, 1.0], [0.1, 0.1])
    near = seeds_of("GA", [1 - 1e-10] * 2, [0.119] * 2)
    far = seeds_of("finetune", [0.97] * 2, [0.0, 0.15])
    high = seeds_of("salun", [0.97] * 2, [0.12, 0.13])
    actual = {row["method"]: row for row in verdicts.summarise_seeds(reference + near + far + high)}
    # The tolerance is one image: 0.02.
    assert (actual["GA"]["UA_word"], actual["GA"]["CR_word"]) == (
        "matches",
        "matches",
    )
    assert actual["finetune"]["UA_word"] == "under-forgets"
    assert actual["finetune"]["CR_word"] == "over-forgets"
    assert actual["salun"]["CR_word"] == "under-forgets"
    assert actual["retrain"]["UA_word"] == "matches"
    # The smallest forget set of all rows counts.
    few = [row | {"num_forget": 10} for row in far[:1]] + far[1:]
    actual = {row["method"]: row for row in verdicts.summarise_seeds(reference + few)}
    assert actual["finetune"]["UA_word"] == "matches"


def test_verdicts_over_seeds_tolerate_two_deviations_of_retrain():
    reference = seeds_of("retrain", [0.4, 0.6], [0.2, 0.4], num_forget=1000)  # deviations of 0.1414
    row = seeds_of("GA", [0.79, 0.79], [0.02, 0.02], num_forget=1000)
    actual = {row["method"]: row for row in verdicts.summarise_seeds(reference + row)}
    assert actual["GA"]["UA_word"] == "over-forgets" and actual["GA"]["CR_word"] == "matches"
    assert actual["GA"]["UA"] == (pytest.approx(0.79), pytest.approx(0))
    actual = verdicts.summarise_seeds(
        reference + seeds_of("GA", [0.77, 0.77], [0.01, 0.01], num_forget=1000)
    )
    assert actual[1]["UA_word"] == "matches" and actual[1]["CR_word"] == "over-forgets"


def test_verdicts_over_seeds_without_numbers_are_none():
    nan = [math.nan, math.nan]
    actual = verdicts.summarise_seeds(
        seeds_of("retrain", [0.4, 0.5], nan) + seeds_of("GA", [0.4, 0.5], [0.1, 0.2])
    )
    assert [row["CR_word"] for row in actual] == [None, None] and actual[1]["UA_word"] == "matches"
    alone = verdicts.summarise_seeds(
        seeds_of("retrain", [0.4, 0.5], [0.1, 0.2]) + seeds_of("GA", [0.4], [0.1])
    )
    assert "UA_word" not in alone[1]
    without = verdicts.summarise_seeds(seeds_of("GA", [0.4, 0.5], [0.1, 0.2]))
    assert "UA_word" not in without[0]
    failed = [{"score": "thr", "cal_size": 20, "alpha": 0.1, "method": "GA", "note": "diverged"}]
    assert verdicts.summarise_seeds(failed) == failed
