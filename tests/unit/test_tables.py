"""Tables: summaries over seeds, what is printed, and CSV files that are read back."""

import math

import pytest

from metrics import Column, Spread
from metrics.report import tables

NAN = math.nan
COLUMNS = {
    "method": Column("method", "text"),
    "UA": Column("UA", "percent"),
    "wrong": Column("wrong", "count"),
}

# ---------------------------------------------------------------- cells


def test_cells_by_hand():
    expected = {
        (0.1234, "percent"): "12.3",
        (0.12345, "number"): "0.123",
        (12, "count"): "12",
        (12.25, "count"): "12.2",
        (3.21, "seconds"): "3.2",
        ("cat", "text"): "cat",
        (None, "text"): "–",
        (Spread(0.5, 0.012), "percent"): "50.0±1.2",
        (Spread(2.5, 0.5), "count"): "2.5±0.5",
        (Spread(3, 0.0), "count"): "3±0.0",
    }
    assert {key: tables.format_cell(*key) for key in expected} == expected


def test_cell_without_a_known_mean_or_deviation_shows_what_is_known():
    assert (
        tables.format_cell(NAN, "percent") == tables.format_cell(Spread(NAN, NAN), "number") == "–"
    )
    assert tables.format_cell(Spread(0.25, NAN), "percent") == "25.0"
    assert tables.format_cell(Spread(7, NAN), "count") == "7"


def test_counts_are_whole_or_have_one_decimal():
    expected = {5: "5", 6.0: "6", 0: "0", 2.25: "2.2", 99.96: "100.0", 100.4: "100", 1234.5: "1234"}
    expected |= {NAN: "–", None: "–", math.inf: "–"}
    assert {count: tables.short_count(count) for count in expected} == expected


def test_heading_has_a_percent_sign_once():
    headings = {
        Column("UA", "percent"): "UA %",
        Column("TPR@1%", "percent"): "TPR@1%",
        Column("gap %", "percent"): "gap %",
        Column("CR", "number"): "CR",
    }
    assert {column: tables.heading_of(column) for column in headings} == headings


# ---------------------------------------------------------------- summaries over seeds


def test_summary_over_seeds_by_hand():
    rows = [
        {"method": "GA", "alpha": 0.1, "UA": 0.2, "word": "under", "wrong": 4, "hash": "x"},
        {"method": "GA", "alpha": 0.1, "UA": 0.4, "word": "over", "wrong": 4, "hash": "x"},
        {"method": "GA", "alpha": 0.2, "UA": 0.2, "wrong": 4},
        {"method": "GA", "alpha": 0.2, "UA": NAN, "wrong": 5, "note": "diverged"},
    ]
    first, second = tables.summarise(rows, COLUMNS, ("method", "alpha"))
    assert first.pop("UA") == (pytest.approx(0.3), pytest.approx(0.02**0.5))
    texts = {"word": "under; over", "hash": "x"}
    assert first == {"method": "GA", "alpha": 0.1, "wrong": 4} | texts
    assert second["UA"] == Spread(0.2, 0.0) and second["note"] == "diverged"
    assert second["wrong"] == (4.5, pytest.approx(0.5**0.5))


def test_summary_takes_the_mean_of_a_number_with_a_spread_over_resplits():
    seeds = [
        {"method": "GA", "CR": Spread(mean, 9.0), "wrong": Spread(0.0, 7.0)} for mean in (1, 3)
    ]
    (row,) = tables.summarise(seeds, COLUMNS, ("method",))
    assert row["CR"] == (2.0, pytest.approx(2**0.5))
    assert row["wrong"] == 0.0  # a count on which all seeds agree
    (alone,) = tables.summarise(seeds[:1], COLUMNS, ("method",))
    assert alone == {"method": "GA", "CR": 1, "wrong": 0.0}


def test_summary_of_unknown_numbers_keeps_the_first_value():
    rows = [{"method": "GA", "UA": NAN, "word": None}] * 2
    (row,) = tables.summarise(rows, COLUMNS, ("method",))
    assert math.isnan(row["UA"]) and row["word"] is None


# ---------------------------------------------------------------- full tables


def set_row(alpha, method, **numbers):
    row = {"score": "thr", "cal_size": 20, "alpha": alpha, "method": method, "q_hat": 0.9}
    row |= {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4, "gap": 0.1, "UA_word": "under-forgets"}
    row |= {"seconds": 3.0, "forget_coverage": Spread(0.7, 0.1), "forget_set_size": 2.5}
    row |= {"forget_CR": 0.28, "test_coverage": 0.9, "test_CR": 0.6, "CR_word": "over-forgets"}
    return row | {"forget_misclassified": 10, "forget_fake": Spread(4, 1.0)} | numbers


def failed_row(method="sfron", reason="sfron diverged"):
    return {"score": "thr", "cal_size": 20, "alpha": 0.1, "method": method, "note": reason}


def test_full_tables_omit_empty_and_constant_columns():
    numbers = {"score": "thr", "cal_size": 20, "UA": 0.5, "q_hat": 0.9}
    numbers |= {"forget_CR": Spread(0.4, 0.1)}
    row, other = ({"alpha": 0.1, "method": name} | numbers for name in ("GA", "salun"))
    models, sets = tables.full_tables([row, other | {"alpha": 0.2}, failed_row()])
    assert (models.heading, sets.heading) == ("Models", "Prediction sets")
    assert list(models.columns) == ["method", "UA", "note"]
    assert [item["method"] for item in models.rows] == ["GA", "salun", "sfron"]
    assert list(sets.columns) == ["alpha", "method", "forget_CR"]
    assert [item["method"] for item in sets.rows] == ["GA", "salun"]
    assert sets.rows[0]["forget_CR"] == Spread(0.4, 0.1)
    _, sets = tables.full_tables([row, other | {"score": "aps", "cal_size": 40}])
    assert list(sets.columns)[:4] == ["score", "cal_size", "alpha", "method"]


@pytest.mark.parametrize("rows", [[], [failed_row()], [{"method": "GA", "UA": NAN}]])
def test_table_without_numbers_is_not_shown(rows):
    assert tables.full_tables(rows) == []
    numbers = {"method": "GA", "UA": Spread(0.0, NAN)}
    assert [table.heading for table in tables.full_tables([*rows, numbers])] == ["Models"]


def test_printed_table_aligns_its_columns_to_the_right(capsys):
    rows = [{"method": "GA", "UA": 0.5}, {"method": "retrain", "UA": Spread(1.0, 0.25), "wrong": 3}]
    tables.print_table(COLUMNS, rows)
    assert capsys.readouterr().out.splitlines() == [
        " method        UA %  wrong",
        "     GA        50.0      –",
        "retrain  100.0±25.0      3",
    ]


# ---------------------------------------------------------------- short tables


def test_short_lines_are_models_failures_and_a_block_per_alpha():
    rows = [set_row(0.1, "GA"), set_row(0.1, "retrain", UA=0.6), failed_row(), set_row(0.2, "GA")]
    assert tables.short_lines(rows) == [
        " method  UA %  RA %  TA %  MIA %  gap %          by UA  time s",
        "     GA  50.0  90.0  80.0   40.0   10.0  under-forgets     3.0",
        "retrain  60.0  90.0  80.0   40.0   10.0  under-forgets     3.0",
        "  sfron     –     –     –      –      –              –       –",
        "",
        "sfron: sfron diverged",
        "",
        "alpha 0.1 (score thr, 20 calibration images)",
        " method  Cov_f %  Size_f   CR_f  Cov_t %   CR_t  fake of wrong         by CR",
        "     GA     70.0   2.500  0.280     90.0  0.600        4 of 10  over-forgets",
        "retrain     70.0   2.500  0.280     90.0  0.600        4 of 10  over-forgets",
        "",
        "alpha 0.2 (score thr, 20 calibration images)",
        " method  Cov_f %  Size_f   CR_f  Cov_t %   CR_t  fake of wrong         by CR",
        "     GA     70.0   2.500  0.280     90.0  0.600        4 of 10  over-forgets",
        "",
    ]


def test_short_tables_of_class_forgetting_use_retained_class_calibration():
    judged = {"coverage": 0.1, "set_size": 3.0, "CR": 0.033, "misclassified": 9, "fake": 2.25}
    row = set_row(0.1, "GA", **{f"forget_by_retain_{key}": value for key, value in judged.items()})
    lines = tables.short_lines([row])
    assert lines[-3].split() == [
        "method", "Cov_f|r", "%", "Size_f|r", "CR_f|r", "Cov_t", "%", "CR_t", "fake", "of", "wrong",
        "by", "CR",
    ]  # fmt: skip
    assert lines[-2].split() == [
        "GA", "10.0", "3.000", "0.033", "90.0", "0.600", "2.2", "of", "9", "over-forgets",
    ]  # fmt: skip


def widest(keys, mean, std):
    return {key: Spread(mean, std) for key in keys}


@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("over_seeds", [False, True])
def test_short_tables_fit_100_characters(class_wise, over_seeds):
    """Names of 16 characters, percentages of 100, sets of 1,000 labels and large forget sets."""
    prefix = "forget_by_retain" if class_wise else "forget"
    row = set_row(0.005, "FisherForgetting", gap=Spread(1.0, 0.1), seconds=Spread(9999.9, 999.9))
    row |= widest(("UA", "RA", "TA", "MIA", "test_coverage", f"{prefix}_coverage"), 1.0, 0.1)
    row |= widest(("test_CR", f"{prefix}_CR"), 0.999, 0.111)
    row |= widest((f"{prefix}_set_size",), 1000.0, 99.0)
    row |= widest((f"{prefix}_misclassified", f"{prefix}_fake"), 44444.4, 9.0)
    row |= {"CR_word": "under-forgets", "score": "saps", "cal_size": 2000}
    lines = tables.short_lines([row, failed_row()], over_seeds=over_seeds)
    assert max(map(len, lines)) <= 100
    assert any("±" in line for line in lines[:3]) == over_seeds


def test_short_tables_over_seeds_show_all_deviations_where_they_fit():
    spread = {"UA": Spread(0.5, 0.1), "test_CR": Spread(0.5, 0.1), "forget_CR": Spread(0.2, 0.1)}
    small = set_row(0.1, "GA", **spread)
    text = "\n".join(tables.short_lines([small], over_seeds=True))
    assert text.count("±") == 4 and "50.0±10.0" in text and "70.0±10.0" in text
    assert "±" not in "\n".join(tables.short_lines([small]))
    wide = {key: Spread(0.5, 0.1) for key in ("test_coverage", "test_CR", "forget_CR")}
    wide |= {"forget_set_size": Spread(100.0, 10.0)}
    lines = tables.short_lines([set_row(0.1, "FisherForgetting", **wide)], over_seeds=True)
    assert lines[-2].count("±") == 1 and "0.500±0.100" in lines[-2]  # CR_f, which decides


def test_short_tables_without_finite_q_hat_show_no_sets():
    unknown = dict.fromkeys(("forget_coverage", "forget_set_size", "forget_CR"), NAN)
    unknown |= {"test_coverage": NAN, "test_CR": NAN, "forget_fake": NAN}
    assert not any("alpha" in line for line in tables.short_lines([set_row(0.01, "GA", **unknown)]))
    rows = [set_row(0.01, "GA", **unknown), set_row(0.1, "GA"), set_row(0.1, "mine", **unknown)]
    lines = tables.short_lines(rows)[4:]
    assert lines[:2] == ["alpha 0.01 (score thr, 20 calibration images): no finite q̂", ""]
    assert lines[2] == "alpha 0.1 (score thr, 20 calibration images)" and len(lines) == 7
    assert lines[5].split() == ["mine", *"–––––", *"–", "of", "10", "over-forgets"]


def test_deviations_in_a_narrow_table_are_kept_for_deciding_columns_only():
    row = {"method": "GA", "UA": Spread(0.5, 0.1), "wrong": Spread(2.0, 1.0)}
    table = tables.Table("", COLUMNS, [row])
    kept = {}
    for width in (26, 25, 24, 23, 1):
        (fitted,) = tables.fit(table, ("UA",), width=width).rows
        kept[width] = [key for key, value in fitted.items() if isinstance(value, Spread)]
    assert kept == {26: ["UA", "wrong"], 25: ["UA"], 24: ["UA"], 23: [], 1: []}


# ---------------------------------------------------------------- files


def test_cells_of_csv_are_empty_for_nan_and_none():
    text = tables.as_csv([{"a": 1, "b": NAN}, {"a": None, "c": 0.5}, {"b": 0.0, "c": "x,y"}])
    assert text.splitlines() == ["a,b,c", "1,,", ",,0.5", ',0.0,"x,y"']


def test_spread_takes_two_columns_named_after_what_varies():
    rows = [{"a": Spread(1.5, 0.5), "b": 2}, {"a": Spread(2.5, NAN), "c": Spread(NAN, NAN)}]
    over_resplits = ["a,a_resplit_std,b,c,c_resplit_std", "1.5,0.5,2,,", "2.5,,,,"]
    assert tables.as_csv(rows).splitlines() == over_resplits
    over_seeds = tables.as_csv(rows, ending=tables.SEEDS).splitlines()
    assert over_seeds[0] == "a,a_std,b,c,c_std" and over_seeds[1:] == over_resplits[1:]


def test_csv_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "results.csv"
    row = {"method": "007", "alpha": 1.0, "n": 3, "x": -2, "flag": True, "other": False}
    row |= {"CR": Spread(0.5, 0.25), "fake": Spread(22, NAN), "tiny": 1e-300}
    failed = {"method": "GA", "alpha": 0.1, "note": "diverged, at once"}
    path.write_bytes(tables.as_csv([row, failed]).encode())
    header, (read, read_failed) = tables.read_csv(path, texts=("method", "note"))
    assert header[:2] == ["method", "alpha"] and "CR_resplit_std" in header
    assert math.isnan(read["fake"].std) and read["fake"].mean == 22
    assert isinstance(read["fake"].mean, int) and isinstance(read["alpha"], float)
    expected = {key: value for key, value in row.items() if key != "fake"}
    assert {key: value for key, value in read.items() if key != "fake"} == expected
    assert read_failed == failed
    assert tables.as_csv([read, read_failed]).encode() == path.read_bytes()


def test_empty_cell_of_a_number_is_nan_and_of_a_text_is_omitted(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("method,note,UA,CR,CR_resplit_std\nGA,,,,\n")
    _, (row,) = tables.read_csv(path, texts=("method", "note"))
    assert list(row) == ["method", "UA", "CR"] and math.isnan(row["UA"])
    assert isinstance(row["CR"], Spread) and all(map(math.isnan, row["CR"]))


@pytest.mark.parametrize("text", ["a,b\n1\n", 'a\n"open\n', "a\nx1\n"])
def test_text_that_is_not_a_table_raises_an_error(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises((ValueError, tables.csv.Error)):
        tables.read_csv(tmp_path / "results.csv", texts=())


def test_text_with_line_ends_and_quotes_is_read_back(tmp_path):
    row = {"note": 'two\r\nlines, "quoted"\n', "n": 1}
    (tmp_path / "a.csv").write_bytes(tables.as_csv([row]).encode())
    assert tables.read_csv(tmp_path / "a.csv", texts=("note",))[1][0]["note"] == row["note"]


def test_quote_that_is_not_closed_raises_an_error(tmp_path):
    (tmp_path / "a.csv").write_text('note\n"open\n')
    with pytest.raises(tables.csv.Error):
        tables.read_csv(tmp_path / "a.csv", texts=("note",))


def read_earlier(path, replaced=()):
    return tables.read_earlier(path, ("method", "UA"), texts=("method",), replaced=replaced)


def test_earlier_table_is_read_and_kept(tmp_path, capsys):
    path = tmp_path / "results.csv"
    assert read_earlier(path) == []
    path.write_text("method,UA\nGA,0.5\n")
    assert read_earlier(path) == [{"method": "GA", "UA": 0.5}]
    assert path.exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content", ["method,n\nGA,1\n", "UA\n0.5\n", "method,UA\nGA,x\n", "a\n1,2\n"]
)
def test_earlier_file_that_is_not_a_table_gets_a_free_name(tmp_path, capsys, content):
    path = tmp_path / "results.csv"
    for name in ("results.csv.old", "results.csv.old2", "results.csv.old3"):
        path.write_text(content)
        assert read_earlier(path, replaced=["retrain"]) == []
        assert (tmp_path / name).read_text() == content and not path.exists()
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{path}: not a table of this version (")
        assert line.endswith(f"renamed to {name}")
    assert ("no column UA" in line) == (content == "method,n\nGA,1\n")


def test_earlier_table_of_replaced_methods_alone_stays_in_place(tmp_path, capsys):
    path = tmp_path / "results.csv"
    path.write_text("method,n\nGA,1\nretrain,2\n")
    assert read_earlier(path, replaced={"GA": 1, "retrain": 2}) == []
    assert path.exists() and capsys.readouterr().out == ""
    assert read_earlier(path, replaced=["GA"]) == [] and not path.exists()


def test_earlier_link_to_nothing_is_renamed(tmp_path):
    (tmp_path / "results.csv").symlink_to(tmp_path / "nothing")
    assert read_earlier(tmp_path / "results.csv") == []
    assert (tmp_path / "results.csv.old").is_symlink()
