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


def test_tabular_by_hand():
    rows = [
        {"method": "original", "UA": 0.5, "CR": 0.5, "seconds": 1.0},
        {"method": "retrain", "UA": 0.5, "CR": 0.4, "seconds": 1.0},
        {"method": "cpu_GA", "UA": Spread(0.25, 0.01), "CR": math.nan, "seconds": 1.0},
        {"method": "scrub", "UA": 1.0, "CR": 0.1, "seconds": 2.0},
        {"method": "GA", "UA": 0.75, "CR": 0.1, "seconds": 2.0},
    ]
    assert latex.tabular(tables.Table("", COLUMNS, rows)).splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & UA \% & CR\_f & time s \\",
        r"\midrule",
        r"original & 50.0 & 0.500 & 1.0 \\",
        r"retrain & 50.0 & 0.400 & 1.0 \\",
        r"cpu\_GA & \textbf{25.0 $\pm$ 1.0} & -- & 1.0 \\",
        r"scrub & 100.0 & \textbf{0.100} & 2.0 \\",
        r"GA & \textbf{75.0} & \textbf{0.100} & 2.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_document_has_the_models_and_the_sets_of_the_first_block():
    keys = {"score": "thr", "cal_size": 20, "q_hat": 0.9, "UA": 0.5, "test_CR": 0.25}
    rows = [{"method": "GA", "alpha": 0.1} | keys, {"method": "RL", "alpha": 0.1} | keys]
    others = [rows[0] | {"alpha": 0.2, "method": "x"}, rows[0] | {"score": "aps", "method": "y"}]
    models, sets = latex.document([rows[0], *others, rows[1]]).split(r"\end{tabular}")[:2]
    assert models.count("& 50.0") == 4 and "α = 0.1\n" in sets
    assert sets.count("& 0.250") == 2 and "GA" in sets and "RL" in sets


def test_special_characters_are_escaped():
    assert latex.escape("a_b%&#${}~^\\|–") == (
        r"a\_b\%\&\#\$\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}--"
    )
