"""Spreads over seeds in the printed tables."""

import pytest

import main_evaluate
import utils


def test_count_that_seeds_agree_in_is_shown_without_spread():
    """No image is fake-forgotten in any seed, though the draws differ: easy data, such as digits at
    full width.
    """
    keys = {"score": "thr", "cal_size": 200, "alpha": 0.1, "method": "retrain", "q_hat": 0.9}
    seeds = [
        keys
        | {
            "forget_fake": 0.0,
            "forget_CR": number,
            "forget_fake_resplit_std": number,
            "forget_CR_resplit_std": 0.1,
        }
        for number in (0.5, 0.7)
    ]
    rows = utils.summarise(
        seeds, main_evaluate.MODEL_COLUMNS | main_evaluate.SET_COLUMNS, main_evaluate.KEYS
    )
    *_, (_, columns, (shown,)) = main_evaluate.shown_tables(rows)
    assert shown["forget_fake"] == 0.0 and shown["forget_CR"] == pytest.approx((0.6, 0.02**0.5))
    utils.print_table(columns, [shown])
    *_, (_, _, (alone,)) = main_evaluate.shown_tables(seeds[:1])
    assert alone["forget_fake"] == (0.0, 0.5) and alone["forget_CR"] == (0.5, 0.1)
