"""Notes below the tables: the α, methods and numbers that they name."""

import math

from metrics import Interval, Spread
from metrics.report import notes

NAN = math.nan


def advised(**values):
    row = {"score": "thr", "alpha": 0.1, "method": "GA", "q_hat": 0.9} | values
    return row | {"q_hat": Spread(row["q_hat"], 0.1)}


def test_alpha_above_the_error_rate_names_its_methods():
    seed = [advised(q_hat=0.3), advised(method="salun"), advised(alpha=0.2, q_hat=0.4)]
    seed += [advised(method="salun", alpha=0.2, q_hat=0.1), advised(q_hat=NAN, alpha=0.4)]
    seed += [advised(score="aps", q_hat=0.1, alpha=0.3), {"method": "sfron", "note": "diverged"}]
    for tables in ([seed], [seed, [advised()]]):
        (line,) = notes.advice(tables)
        assert "(0.1 for GA; 0.2 for all)" in line and "--alphas" in line
    assert notes.advice([[advised()]]) == []


def test_methods_that_change_no_prediction_are_named():
    shares = {"ssd": [0.0], "GA": [0.0, Spread(0.01, 0.0)], "RL": [0.2], "sfron": [None, NAN]}
    rows = [{"method": name, "changed": share} for name, many in shares.items() for share in many]
    (line,) = notes.unchanged([{"method": "original"}, *rows])
    assert ": ssd;" in line
    assert notes.unchanged(rows[1:]) == []


def test_methods_that_destroy_the_network_are_named():
    """The retain accuracy is below half of the original's in some seed."""
    accuracies = {"original": [0.8, 0.6], "GA": [0.41, 0.39], "RL": [0.41, Spread(0.4, 0.3)]}
    rows = [{"method": name, "RA": value} for name, many in accuracies.items() for value in many]
    (line,) = notes.destroyed([*rows, {"method": "ssd", "RA": NAN}, {"method": "failed"}])
    assert ": GA;" in line
    assert notes.destroyed(rows[:2] + rows[4:]) == notes.destroyed(rows[2:]) == []


def test_words_by_chance_are_counted_and_one_seed_is_noted():
    known, unknown = Interval(0.1, -0.1, 0.3), Interval(0.1, NAN, NAN)
    rows = [
        {"method": name, "UA": 0.5, "UA_minus_retrain": known, "forget_CR_minus_retrain": CR_f}
        for CR_f in (known, unknown)
        for name in ("GA", "RL")
    ]
    zero = Interval(0.0, 0.0, 0.0)
    rows.append({"method": "retrain", "UA_minus_retrain": zero, "forget_CR_minus_retrain": zero})
    chance, one_seed = notes.intervals(rows)
    assert chance.startswith("4 ") and " 0.2 " in chance and "--seeds" in one_seed
    assert notes.intervals([row | {"UA": Spread(0.5, 0.1)} for row in rows]) == [chance]
    assert notes.intervals(rows[-1:]) == []


def q_hat_row(alpha, **values):
    row = {"alpha": alpha, "q_hat": 0.9, "calibration_images": 30, "draws_left_out": 0}
    return row | {"MIACR_calibration_images": 1000} | values


def test_missing_q_hats_have_one_line_per_calibrated_group():
    cat = {"q_hat_forget": Spread(NAN, NAN), "forget_calibration_images": 1, "forget_class": "cat"}
    cat |= {"forget_draws_left_out": 0}
    rows = [q_hat_row(0.2, **cat), q_hat_row(0.1, **cat | {"forget_calibration_images": 2})]
    rows += [q_hat_row(0.1, **cat), {"alpha": 0.1, "note": "failed"}]
    rows += [q_hat_row(0.01, q_hat=NAN, MIACR_calibration_images=98)]
    known = cat | {"q_hat_forget": 0.5, "forget_draws_left_out": 7, "forget_calibration_images": 3}
    class_rows = [{"alpha": 0.3, "own_q_hat": NAN, "calibration_images": n} for n in (1, 2)]
    class_rows.append({"alpha": 0.3, "own_q_hat": 0.1, "calibration_images": 3})
    lines = notes.missing_q_hats([*rows, q_hat_row(0.3, **known)], class_rows)
    expected = {
        "class cat": ["0.1 needs 9 ", "(2 available)", "0.2 needs 4 ", "(1 available)"],
        "all classes": ["0.01 needs 99 ", "(30 available)"],
        "MIACR": ["0.01 needs 99 ", "(98 available)"],
        "class cat in some resplits": ["0.3 needs 3 ", "(3 available)"],
        "single classes": ["0.3 needs 3 ", "(2 available)"],
    }
    for line, (group, parts) in zip(lines, expected.items(), strict=True):
        assert f"q̂ for {group}" in line and all(part in line for part in parts)
        assert line.count("available") == len(parts) / 2 and "--cal_sizes" in line
    assert notes.missing_q_hats([q_hat_row(0.01, MIACR_calibration_images=99)]) == []


def test_empty_sets_name_each_alpha_and_its_largest_share():
    rows = [advised(forget_empty=Spread(0.125, 0.1), test_empty=0.25), advised(test_empty=0.06)]
    rows += [advised(alpha=0.2, forget_by_retain_empty=0.5, forget_empty=0.0), {"note": "failed"}]
    (line,) = notes.empty_sets(rows)
    assert "25.0 % at alpha 0.1" in line and "50.0 % at alpha 0.2" in line and "12.5" not in line
    assert notes.empty_sets([advised(forget_empty=0.0, test_empty=NAN)]) == []
