"""Notes below the tables: limits of the numbers and remedies."""

import math

from metrics import Spread
from metrics.report import notes


def advised(**values):
    row = {"score": "thr", "alpha": 0.1, "method": "GA", "q_hat": 0.9, "coverage_outside": False}
    row |= {"test_coverage": 0.9, "theory_coverage": 0.95} | values
    varied = ("q_hat", "test_coverage", "theory_coverage")
    return row | {key: Spread(row[key], 0.1) for key in varied}


def test_alpha_above_the_error_rate_is_reported():
    tables = [
        [advised(q_hat=0.3), advised(method="salun"), advised(method="salun", alpha=0.2, q_hat=0.1)]
    ]
    tables[0] += [
        advised(alpha=0.2, q_hat=0.4),
        advised(score="aps", q_hat=0.1, alpha=0.3),
        advised(q_hat=math.nan),
    ]
    (line,) = notes.advice(tables)
    assert line.startswith("alpha above the error rate (0.1 for GA; 0.2 for all): q̂ < 0.5,")
    (line,) = notes.advice([*tables, [advised()]])
    assert "(0.1 for GA; 0.2 for all, in at least one seed)" in line
    assert notes.advice([[advised(), {"method": "sfron", "note": "diverged"}]]) == []


def test_coverage_outside_the_theory_is_reported():
    tables = [[advised(coverage_outside=True, test_coverage=0.99, alpha=0.05), advised()]]
    (line,) = notes.advice(tables)
    assert "GA at 0.05 (thr: 0.990, 0.950)" in line and "GA at 0.1" not in line


def test_methods_that_change_no_prediction_are_named():
    rows = [
        {"method": "original"},
        {"method": "ssd", "changed": 0.0},
        {"method": "GA", "changed": 0.0},
        {"method": "GA", "changed": Spread(0.01, 0.0)},
        {"method": "RL", "changed": 0.2},
        {"method": "sfron", "note": "diverged", "changed": None},
    ]
    (line,) = notes.unchanged(rows)
    assert line.startswith("no prediction of the original model changed: ssd; ")
    assert notes.unchanged([row for row in rows if row["method"] != "ssd"]) == []


def missing(rows, class_rows=()):
    return notes.missing_q_hats(rows, class_rows)


def q_hat_row(alpha, **values):
    row = {
        "alpha": alpha,
        "cal_size": 30,
        "q_hat": 0.9,
        "calibration_images": 30,
        "draws_left_out": 0,
    }
    return row | {"MIACR_calibration_images": 1000} | values


def test_infinite_q_hats_of_one_kind_share_one_line():
    nan = math.nan
    of_class = {
        "q_hat_forget": nan,
        "forget_calibration_images": 1,
        "forget_draws_left_out": 0,
        "forget_class": "cat",
    }
    rows = [q_hat_row(0.2, **of_class), q_hat_row(0.1, **of_class), q_hat_row(0.1, **of_class)]
    rows += [{"alpha": 0.1, "note": "failed"}]
    rows.append(q_hat_row(0.01, **of_class | {"q_hat": nan, "MIACR_calibration_images": 98}))
    rows.append(
        q_hat_row(
            0.3, **of_class | {"q_hat_forget": 0.5, "forget_draws_left_out": 7, "draws_left_out": 2}
        )
    )
    class_rows = [
        {"alpha": 0.3, "class": name, "own_q_hat": q, "calibration_images": n}
        for name, q, n in (("cat", nan, 1), ("dog", nan, 2), ("cow", 0.1, 3), ("cat", nan, 1))
    ]
    lines = missing(rows, class_rows)
    shown = "(shown as –): alpha 0.01 needs 99"
    left_out = "left out of the means"
    assert [line.split(";")[0] for line in lines] == [
        f"no finite q̂ for class cat {shown}, alpha 0.1 needs 9, alpha 0.2 needs 4, "
        "and --cal_sizes 30 gives 1 calibration image",
        f"no finite q̂ for all retained classes {shown}, "
        "and --cal_sizes 30 gives 30 calibration images",
        f"no finite q̂ for members and non-members (MIACR) {shown}, "
        "and --cal_sizes 30 gives 98 calibration images",
        f"resplits without a finite q̂ for all retained classes, {left_out}: 2 at alpha 0.3",
        f"resplits without a finite q̂ for class cat, {left_out}: 7 at alpha 0.3",
        "no finite class-conditional q̂ (classes.csv): 2 classes at alpha 0.3 "
        "(3 calibration images needed, at most 2 available)",
    ]
    assert missing([q_hat_row(0.01, MIACR_calibration_images=99), q_hat_row(0.2)]) == []
    (line,) = missing(
        [], [{"alpha": 0.3, "class": "cow", "own_q_hat": nan, "calibration_images": 0}]
    )
    assert "1 class at alpha 0.3 (3 calibration images needed, at most 0 available)" in line
    (line,) = missing(
        [q_hat_row(0.1, q_hat=nan, calibration_images=0), q_hat_row(0.1, q_hat=nan, cal_size=8)]
    )
    assert "gives 0 calibration images; alpha 0.1 needs 9, and --cal_sizes 8 gives" in line


def test_verdicts_between_retrained_models_are_reported_unless_they_match():
    def pair(weights, alpha, by_ua, by_cr):
        return {"weights": weights, "alpha": alpha, "UA_word": by_ua, "CR_word": by_cr}

    rows = [pair(each, alpha, "matches", "matches") for each in "abc" for alpha in (0.1, 0.2)]
    assert notes.wrong_verdicts(rows) == notes.wrong_verdicts([]) == []
    rows += [pair("a", 0.1, "over-forgets", None), pair("a", 0.2, "over-forgets", "under-forgets")]
    (line,) = notes.wrong_verdicts(rows)
    assert line.startswith("retrain′: of 3 comparisons of one retrained model with another, these")
    assert "do not match: 1 by UA, 1 by CR at alpha 0.2; a verdict on a single seed" in line
