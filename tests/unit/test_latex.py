"""The printed tables as LaTeX."""

import math

from metrics.columns import Column, Spread
from metrics.report import latex, tables

COLUMNS = {
    "method": Column("method", "text"),
    "UA": Column("UA", "percent"),
    "CR": Column("CR_f", "number"),
    "seconds": Column("time s", "seconds"),
}


def rows():
    return [
        {"method": "original", "UA": 0.3, "CR": 0.5, "seconds": 1.0},
        {"method": "retrain", "UA": 0.3, "CR": 0.4, "seconds": 1.0},
        {"method": "cpu_GA", "UA": Spread(0.25, 0.01), "CR": math.nan, "seconds": 1.0},
        {"method": "scrub", "UA": 0.45, "CR": 0.1, "seconds": 2.0},
    ]


def test_tabular_by_hand():
    assert latex.tabular(tables.Table("", COLUMNS, rows())).splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & UA \% & CR\_f & time s \\",
        r"\midrule",
        r"original & 30.0 & 0.500 & 1.0 \\",
        r"retrain & 30.0 & 0.400 & 1.0 \\",
        r"cpu\_GA & \textbf{25.0 $\pm$ 1.0} & -- & 1.0 \\",
        r"scrub & 45.0 & \textbf{0.100} & 2.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_best_is_nearest_to_retrain_and_never_a_reference():
    assert latex.nearest_to_retrain(rows(), "UA") == ["cpu_GA"]
    assert latex.nearest_to_retrain(rows()[:2], "UA") == []
    tied = [{"method": "retrain", "UA": 2}, {"method": "a", "UA": 1}, {"method": "b", "UA": 3}]
    assert latex.nearest_to_retrain(tied, "UA") == ["a", "b"]
    assert latex.nearest_to_retrain(tied[1:], "UA") == []
    assert latex.nearest_to_retrain(rows(), "seconds") == []
    assert latex.nearest_to_retrain(rows(), "method") == []


def test_characters_of_latex_stand_for_themselves():
    assert latex.escape("a_b%&#${}~^\\|α q̂ –") == (
        r"a\_b\%\&\#\$\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}"
        r"$\alpha$ $\hat{q}$ --"
    )
    spread = latex.cell(Spread(0.5, math.nan), "percent")
    assert (spread, latex.cell(None, "number"), latex.cell(3, "count")) == ("50.0", "--", "3")
