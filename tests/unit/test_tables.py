"""Tables: summaries over seeds, what is printed, and the text of CSV files."""

import math

import pytest

from metrics import Column, Interval, Spread
from metrics.report import tables

NAN = math.nan
COLUMNS = {
    "method": Column("method", "text"),
    "UA": Column("UA", "percent"),
    "wrong": Column("wrong", "count"),
}


def test_cells_and_headings_by_hand():
    expected = {
        (0.1234, "percent"): "12.3", (0.12345, "number"): "0.123", (12, "count"): "12",
        (12.25, "count"): "12.2", (3.21, "seconds"): "3.2", ("cat", "text"): "cat",
        (None, "text"): "–", (NAN, "percent"): "–", (math.inf, "number"): "–",
        (Spread(NAN, NAN), "number"): "–", (Spread(0.25, NAN), "percent"): "25.0",
        (Spread(0.5, 0.012), "percent"): "50.0±1.2", (Spread(3, 0.0), "count"): "3±0.0",
        (Interval(0.1, -0.2, 0.4), "percent"): "10.0 [-20.0, 40.0]",
        (Interval(0.1, NAN, NAN), "number"): "0.100",
    }  # fmt: skip
    assert {key: tables.format_cell(*key) for key in expected} == expected
    headings = {Column("UA", "percent"): "UA %", Column("TPR@1%", "percent"): "TPR@1%"}
    headings[Column("CR", "number")] = "CR"
    assert {column: tables.heading_of(column) for column in headings} == headings
    counts = {5: "5", 6.0: "6", 2.25: "2.2", 99.96: "100.0", 100.4: "100", NAN: "–", None: "–"}
    assert {count: tables.short_count(count) for count in counts} == counts


def test_summary_over_seeds_by_hand():
    rows = [
        {"method": "GA", "alpha": 0.1, "UA": 0.2, "word": "under", "wrong": 4, "hash": "x"},
        {"method": "GA", "alpha": 0.1, "UA": 0.4, "word": "over", "wrong": 4, "hash": "x"},
        {"method": "GA", "alpha": 0.2, "UA": 0.2, "wrong": 4, "word": None},
        {"method": "GA", "alpha": 0.2, "UA": NAN, "wrong": 5, "note": "diverged"},
    ]
    first, second = tables.summarise(rows, COLUMNS, ("method", "alpha"))
    assert first.pop("UA") == (pytest.approx(0.3), pytest.approx(0.02**0.5))
    texts = {"word": "under; over", "hash": "x"}
    assert first == {"method": "GA", "alpha": 0.1, "wrong": 4} | texts
    assert second["UA"] == Spread(0.2, 0.0) and second["note"] == "diverged"
    assert second["wrong"] == (4.5, pytest.approx(0.5**0.5)) and second["word"] is None


def set_row(alpha, method, **numbers):
    row = {"score": "thr", "cal_size": 20, "alpha": alpha, "method": method, "q_hat": 0.9}
    row |= {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4, "gap": 0.1, "by_UA": "under-forgets"}
    row |= {"seconds": 3.0, "forget_coverage": Spread(0.7, 0.1), "forget_set_size": 2.5}
    row |= {"forget_CR": 0.28, "test_coverage": 0.9, "test_CR": 0.6, "by_CR": "over-forgets"}
    return row | {"forget_misclassified": 10, "forget_fake": Spread(4, 1.0)} | numbers


FAILED = {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": "sfron", "note": "diverged"}


def test_full_tables_omit_empty_and_constant_columns():
    numbers = {"score": "thr", "cal_size": 20, "UA": 0.5, "q_hat": 0.9, "forget_CR": 0.4}
    row, other = ({"alpha": 0.1, "method": name} | numbers for name in ("GA", "salun"))
    models, sets = tables.full_tables([row, other | {"alpha": 0.2}, FAILED])
    assert (models.heading, sets.heading) == ("Models", "Prediction sets")
    assert list(models.columns) == ["method", "UA", "note"]
    assert [item["method"] for item in models.rows] == ["GA", "salun", "sfron"]
    assert list(sets.columns) == ["method", "alpha", "forget_CR"]
    assert [item["method"] for item in sets.rows] == ["GA", "salun"]
    assert tables.full_tables([FAILED]) == []
    assert tables.full_tables([row | {"UA": NAN, "forget_CR": Spread(NAN, NAN)}]) == []
    compared = {"UA_minus_retrain": Interval(0.1, 0.0, 0.2), "TA_minus_retrain": 0.1}
    reference = row | {"method": "retrain", "UA_minus_retrain": 0.0}
    *_, differences = tables.full_tables([reference, row | compared])
    assert list(differences.columns) == ["method", "alpha", "UA_minus_retrain", "TA_minus_retrain"]
    assert [item["method"] for item in differences.rows] == ["GA"]
    assert differences.columns["UA_minus_retrain"] == Column("ΔUA", "percent")
    _, sets = tables.full_tables([row, other | {"score": "aps", "cal_size": 40}])
    assert list(sets.columns) == ["method", "score", "cal_size", "alpha", "forget_CR"]


def test_short_lines_are_models_failures_and_a_block_per_alpha():
    missing = dict.fromkeys(("forget_coverage", "forget_set_size", "forget_CR", "forget_fake"), NAN)
    missing |= {"test_coverage": NAN, "test_CR": NAN}
    rows = [set_row(0.1, "GA"), set_row(0.1, "retrain", UA=0.6), FAILED, set_row(0.2, "GA")]
    assert tables.short_lines([*rows, set_row(0.01, "GA", **missing)]) == [
        " method  UA %  RA %  TA %  MIA %  gap %          by UA  time s",
        "     GA  50.0  90.0  80.0   40.0   10.0  under-forgets     3.0",
        "retrain  60.0  90.0  80.0   40.0   10.0  under-forgets     3.0",
        "  sfron     –     –     –      –      –              –       –",
        "",
        "sfron: diverged",
        "",
        "alpha 0.1 (score thr, 20 calibration images)",
        " method  Cov_f %  Size_f   CR_f  Cov_t %   CR_t  fake of wrong         by CR",
        "     GA     70.0   2.500  0.280     90.0  0.600        4 of 10  over-forgets",
        "retrain     70.0   2.500  0.280     90.0  0.600        4 of 10  over-forgets",
        "",
        "alpha 0.2 (score thr, 20 calibration images)",
        "method  Cov_f %  Size_f   CR_f  Cov_t %   CR_t  fake of wrong         by CR",
        "    GA     70.0   2.500  0.280     90.0  0.600        4 of 10  over-forgets",
        "",
        "alpha 0.01 (score thr, 20 calibration images): no finite q̂",
        "",
    ]


def test_short_tables_of_class_forgetting_use_the_calibration_of_the_retained_classes():
    under_retain = {"coverage": 0.1, "set_size": 3.0, "CR": 0.033, "misclassified": 9, "fake": 2.25}
    numbers = {f"forget_by_retain_{key}": value for key, value in under_retain.items()}
    headings, row = tables.short_lines([set_row(0.1, "GA", **numbers)])[-3:-1]
    assert " ".join(headings.split()).startswith("method Cov_f|r % Size_f|r CR_f|r Cov_t % CR_t")
    assert " ".join(row.split()) == "GA 10.0 3.000 0.033 90.0 0.600 2.2 of 9 over-forgets"


def test_table_over_trainings_has_the_error_of_the_excess_and_the_level_for_p():
    rows = [
        {"method": "GA", "trainings": 4, "KLOM_forget": 0.1, "KLOM_retain": 3.0, "p_value": 0.2},
        {"method": "RL", "trainings": 3, "KLOM_forget": 9.0, "p_value": 0.001},
    ]
    rows[1] |= {"ULiRA_accuracy": 0.9, "ULiRA_excess": 0.07, "ULiRA_excess_error": 0.02}
    heading, headings, *lines, note = tables.ensemble_lines(rows, "Over 4 trainings")
    assert headings.split() == ["method", "n", "KLOM_f", "p", "U-LiRA", "%", "excess", "%"]
    assert [" ".join(line.split()) for line in lines] == [
        "GA 4 0.100 0.200 – –", "RL 3 9.000 0.001 90.0 7.0±2.0",
    ]  # fmt: skip
    assert heading == "Over 4 trainings:" and "0.025" in note


def test_csv_has_empty_cells_for_missing_numbers_and_two_columns_for_a_spread():
    rows = [{"a": Spread(1.5, 0.5), "b": 0.0}, {"a": Spread(2.5, NAN), "c": "x,y"}, {"b": NAN}]
    lines = ["1.5,0.5,0.0,", '2.5,,,"x,y"', ",,,"]
    assert tables.as_csv(rows).splitlines() == ["a,a_resplit_std,b,c", *lines]
    interval = {"a": Interval(1, -0.5, 2.5)}
    assert tables.as_csv([interval]).split() == ["a,a_low,a_high", "1,-0.5,2.5"]
    assert tables.as_csv(rows, ending=tables.SEEDS).splitlines() == ["a,a_std,b,c", *lines]
