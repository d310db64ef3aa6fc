"""MIACR: its images, its sets by hand, and whole reports against loops over draws."""

import math

import numpy as np
import pytest
import torch
from scored import make_outputs, report

import metrics
from metrics import CR, MIACR, scores


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("retain", [12, 90, 400])
def test_miacr_trains_on_half_of_test_images_and_as_many_retain_images(retain, forgotten):
    outputs = make_outputs(retain=retain, num_draws=3, forgotten=forgotten)
    training = MIACR.training_images(outputs, 7)
    test = set(outputs.test().tolist())
    members, non_members = (indices.tolist() for indices in training)
    calibrating = min(retain // 2, len(outputs.calibration(50)))
    assert len(members) == len(non_members) == min(retain - calibrating, len(test) // 2)
    assert len(set(members)) == len(members) and max(members) < retain
    assert len(set(non_members)) == len(members) and set(non_members) <= test
    again, other = MIACR.training_images(outputs, 7), MIACR.training_images(outputs, 8)
    assert torch.equal(again.members, training.members)
    assert torch.equal(again.non_members, training.non_members)
    assert not torch.equal(other.members, training.members)
    assert not torch.equal(other.non_members, training.non_members)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("retain", [31, 400])
def test_miacr_calibrates_each_draw_on_unused_images(retain, forgotten):
    outputs = make_outputs(retain=retain, num_draws=4, forgotten=forgotten)
    training = MIACR.training_images(outputs, 7)
    retained = set(outputs.retained().tolist())
    for size in (20, 50):
        count = min(retain - len(training.members), len(outputs.calibration(size)))
        draws = [MIACR.calibration_images(outputs, training, size, 7, draw) for draw in range(4)]
        for members, non_members in draws:
            assert len(members) == len(non_members) == count
            assert not set(members.tolist()) & set(training.members.tolist())
            assert not set(non_members.tolist()) & set(training.non_members.tolist())
            assert len(set(members.tolist())) == len(set(non_members.tolist())) == count
            assert set(non_members.tolist()) <= retained and int(members.max()) < retain
        first = outputs.calibration(size)[:count].tolist()
        assert draws[0].non_members.tolist() == first
        assert len({tuple(draw.non_members.tolist()) for draw in draws}) == 4
        assert len({tuple(draw.members.tolist()) for draw in draws}) == 4


def test_membership_scores_are_one_minus_the_probability_of_the_label():
    assert MIACR.membership_scores(torch.tensor([0.25, 1])).tolist() == [[0.25, 0.75], [1, 0]]


@pytest.mark.parametrize(("held_out", "known"), [(59, False), (60, True)])
def test_miacr_with_fewer_than_ten_test_images_is_nan(held_out, known):
    rows = report(MIACR, make_outputs(held_out=held_out), metrics.Settings((0.3,)))[1]
    assert math.isfinite(rows["thr", 20, 0.3]["MIACR"]) == known


def test_miacr_without_a_trained_attack_is_nan():
    unknown = MIACR.membership_scores(torch.full((9,), math.nan).double())
    known = torch.rand(9, 2).double()
    assert math.isnan(MIACR.miacr(unknown, unknown, unknown, 0.3))
    assert math.isnan(MIACR.miacr(known, known[:2], known[:2], 0.1))
    assert MIACR.miacr(known, known, known, 0.3) >= 0
    outputs = make_outputs()
    for output in (outputs.retain, outputs.held_out):
        output.logits[:] = 0
    rows = report(MIACR, outputs, metrics.Settings((0.3,)))[1]
    assert math.isnan(rows["thr", 20, 0.3]["MIACR"])


def test_miacr_counts_sets_that_are_exactly_non_member():
    # Scores (non-member, member). True scores of the calibration images are .1 .2 .3 .4.
    # q̂ at α = 0.4 is the 3rd smallest, 0.3.
    members = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    non_members = torch.tensor([[0.3, 0.7], [0.4, 0.6]], dtype=torch.float64)
    targets = torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.35, 0.65], [0.9, 0.1]], dtype=torch.float64)
    assert MIACR.miacr(targets, members, non_members, 0.4) == 2 / 4  # {non}, {non}, {}, {member}
    # q̂ = ∞: every set is {non-member, member}.
    assert math.isnan(MIACR.miacr(targets, members, non_members, 0.1))


@pytest.mark.parametrize(("num_draws", "forgotten"), [(1, False), (4, False), (4, True)])
def test_miacr_of_a_report_equals_loops_over_draws(num_draws, forgotten):
    outputs = make_outputs(num_draws=num_draws, forgotten=forgotten)
    training = MIACR.training_images(outputs, 5)
    scored = MIACR.score_by_attack(outputs, training)
    retain, held_out, forget = (scored[part] for part in ("retain", "held_out", "forget"))
    chosen = metrics.Settings((0.1, 0.4), (scores.Score(), scores.Score("aps")), seed=5)
    scalars, rows = report(MIACR, outputs, chosen)
    assert scalars == {} and len(rows) == 8
    for (_, size, alpha), row in rows.items():
        expected = []
        for draw in range(num_draws):
            images = MIACR.calibration_images(outputs, training, size, 5, draw)
            true_scores = [retain[images.members, 1], held_out[images.non_members, 0]]
            q_hat = CR.conformal_quantile(torch.cat(true_scores), alpha)
            is_exact = (forget[:, 0] <= q_hat) & (forget[:, 1] > q_hat)
            expected.append(is_exact.double().mean().item())
        assert row["MIACR_calibration_images"] == 2 * len(outputs.calibration(size))
        if num_draws == 1:
            assert row["MIACR"] == pytest.approx(expected[0], rel=1e-12)
        else:
            assert row["MIACR"].mean == pytest.approx(np.mean(expected), rel=1e-12)
            assert row["MIACR"].std == pytest.approx(np.std(expected, ddof=1))
