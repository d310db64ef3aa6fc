"""Outputs of a model, its draws, and the evaluation by all metrics."""

import pytest
import torch
from scored import some_outputs

import metrics
from metrics import CR, scores


def test_draws_are_the_split_then_random_orders():
    draws = metrics.draw_splits(50, 4, seed=7)
    assert draws.shape == (4, 50) and draws.dtype == torch.int64
    assert draws[0].tolist() == list(range(50))
    assert all(sorted(draw.tolist()) == list(range(50)) for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws, metrics.draw_splits(50, 4, seed=7))
    assert torch.equal(draws[:2], metrics.draw_splits(50, 2, 7))
    assert not torch.equal(draws, metrics.draw_splits(50, 4, seed=8))
    assert metrics.draw_splits(50, 1).shape == (1, 50)
    assert torch.equal(metrics.draw_splits(50, 3), metrics.draw_splits(50, 3, seed=0))


def test_image_sets_of_a_draw_are_disjoint_and_divided_by_class():
    outputs = some_outputs(3, 3)
    for draw in range(3):
        order, rare = outputs.draws[draw].tolist(), (outputs.held_out.labels == 3).tolist()
        first = order[:20]
        assert outputs.calibration(20, draw).tolist() == [i for i in first if not rare[i]]
        assert outputs.forget_calibration(20, draw).tolist() == [i for i in first if rare[i]]
        assert outputs.test(draw).tolist() == [image for image in order[45:] if not rare[image]]
        assert outputs.forget_test(draw).tolist() == [image for image in order[45:] if rare[image]]
    assert torch.equal(outputs.calibration(20), outputs.calibration(20, 0))
    assert outputs.num_draws == 3
    assert torch.equal(outputs.test(), outputs.test(0))
    assert torch.equal(outputs.forget_test(), outputs.forget_test(0))
    assert torch.equal(outputs.forget_calibration(20), outputs.forget_calibration(20, 0))


def test_evaluation_of_all_metrics_is_reproducible_and_by_hand():
    outputs = some_outputs(1, counts=(60, 300, 300), cal_sizes=(50, 100))
    chosen = metrics.Settings((0.1, 0.2), (scores.Score(), scores.Score("aps")))
    scalars, rows = metrics.evaluate(metrics.ConformalScores(outputs, chosen))
    assert (scalars, rows) == metrics.evaluate(metrics.ConformalScores(outputs, chosen))
    assert set(rows) == {(s, n, a) for s in ("thr", "aps") for n in (50, 100) for a in (0.1, 0.2)}
    calibration = outputs.held_out.select(torch.arange(50))
    q_hat = CR.conformal_quantile(scores.true_label_scores(*calibration), 0.2)
    row = rows["thr", 50, 0.2]
    assert row["q_hat"] == pytest.approx(q_hat)
    test = outputs.held_out.select(torch.arange(100, 300))  # images outside every calibration set
    for group, output in (("forget", outputs.forget), ("test", test)):
        sets = CR.prediction_sets(scores.thr(output.logits), q_hat)
        assert row[f"{group}_coverage"] == CR.coverage(sets[range(len(sets)), output.labels])
    assert {"UA", "RA", "TA", "MIA", "AUC"} <= set(scalars)
    assert row != rows["aps", 50, 0.2] and row["MIACR"] == rows["aps", 50, 0.2]["MIACR"]
