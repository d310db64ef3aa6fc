"""Spreads over seeds in the printed tables."""

import pytest

from metrics.columns import Spread
from metrics.report import tables


def test_count_that_seeds_agree_in_is_shown_without_spread():
    """No image is fake-forgotten in any seed, though the draws differ: easy data, such as digits at
    full width.
    """
    keys = {"score": "thr", "cal_size": 200, "alpha": 0.1, "method": "retrain", "q_hat": 0.9}
    seeds = [
        keys | {"forget_fake": Spread(0.0, number), "forget_CR": Spread(number, 0.1)}
        for number in (0.5, 0.7)
    ]
    (row,) = tables.summarise(seeds, tables.MODEL_COLUMNS | tables.SET_COLUMNS, tables.KEYS)
    assert row["forget_fake"] == 0.0 and row["forget_CR"] == pytest.approx((0.6, 0.02**0.5))
