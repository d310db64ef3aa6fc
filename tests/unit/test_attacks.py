"""Membership attacks: against scikit-learn on ordinary, wide and degenerate features, and against numbers worked out by
hand on whole reports."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from sklearn.svm import SVC

from metrics import MIA, svm


def column(values):
    return np.asarray(values, dtype=np.float64)[:, None]


def scikit_learn_decisions(members, non_members, points):
    """Decisions of scikit-learn's SVM on one feature; positive says member."""
    trained = np.concatenate([members, non_members])
    membership = np.repeat([1, 0], [len(members), len(non_members)])
    return SVC(C=3, gamma="auto", tol=1e-8).fit(column(trained), membership).decision_function(column(points))


def assert_decides_as_scikit_learn(members, non_members, points, tolerance=1e-3):
    attack = MIA.Attack(column(members), column(non_members))
    expected = scikit_learn_decisions(members, non_members, points)
    clear = np.abs(expected) > tolerance
    assert clear.mean() > 0.5
    found = attack._system.decision(column(points), attack._weights)[0].numpy()
    assert np.abs(found - expected).max() < tolerance
    assert (attack.says_member(column(points)) == (expected > 0))[clear].all()


# ---------------------------------------------------------------- features of any range


def wide(kind, rng, n):
    if kind == "heavy tails":
        return rng.pareto(1, n), rng.pareto(0.8, n)
    if kind == "both signs":
        return rng.standard_cauchy(n), 0.3 + rng.standard_cauchy(n)
    members, non_members = rng.beta(1, 9, n), rng.beta(1, 6, n)
    if kind == "outliers":
        members[:3], non_members[:4] = [40, 1e3, 4e3], [900, 1e6, 1e12, 39]
        return members, non_members
    scale = float(kind)
    return scale * rng.random(n), scale * rng.random(n) ** 1.2


@pytest.mark.parametrize("kind", ["1", "5", "9", "100", "1e3", "1e4", "1e6", "outliers", "heavy tails", "both signs"])
def test_attack_on_feature_of_any_range_decides_as_scikit_learn(kind):
    rng = np.random.default_rng(0)
    members, non_members = wide(kind, rng, 250)
    every = np.concatenate([members, non_members])
    # Training points, points near them and between them, and points beyond the ends.
    nearby = every + rng.normal(0, 1, len(every))
    between = every.min() + np.ptp(every) * np.linspace(-0.1, 1.1, 200)
    assert_decides_as_scikit_learn(members, non_members, np.concatenate([every, nearby, between]))


@pytest.mark.parametrize("kind", ["100", "1e4", "heavy tails"])
def test_cost_of_attack_does_not_grow_with_range(kind):
    members, non_members = (column(part) for part in wide(kind, np.random.default_rng(0), 1500))
    start = time.process_time()
    MIA.Attack(members, non_members).says_member(members)
    assert time.process_time() - start < 1


def test_attack_takes_infinite_features():
    rng = np.random.default_rng(0)
    members, non_members = rng.random(50), 3 * rng.random(50)
    members[0], non_members[:3] = -math.inf, [math.inf, math.inf, 1e300]
    far = np.where(np.isinf(members), -1e9, members), np.where(non_members > 100, 1e9, non_members)
    far[1][2] = 1e7
    attack = MIA.Attack(column(members), column(non_members))
    points = np.linspace(-1, 4, 50)
    found = attack._system.decision(column([*points, math.inf, -math.inf, 1e300]), attack._weights)[0].numpy()
    expected = scikit_learn_decisions(*far, [*points, 1e9, -1e9, 1e7])
    assert np.abs(found - expected).max() < 1e-3


# ---------------------------------------------------------------- features that say little


SMALL_SETS = strategies.integers(5, 20).flatmap(
    lambda n: strategies.tuples(
        strategies.sampled_from([1e-3, 0.1, 1.0, 50.0]),
        strategies.lists(strategies.integers(0, 5), min_size=n, max_size=n),
        strategies.lists(strategies.integers(0, 5), min_size=n, max_size=n),
    )
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SMALL_SETS)
def test_attack_on_few_tied_values_decides_as_scikit_learn_or_has_no_answer(drawn):
    scale, members, non_members = drawn
    attack = MIA.Attack(column(members) * scale, column(non_members) * scale)
    same = sorted(members) == sorted(non_members)
    assert attack.tells_apart != same
    points = scale * np.arange(-1, 7, 0.5)
    found = attack._system.decision(column(points), attack._weights)[0].numpy()
    if same:
        assert np.abs(found).max() < svm.ROUNDING and not attack.decide(column(points)).any()
    else:
        expected = scikit_learn_decisions(scale * np.array(members), scale * np.array(non_members), points)
        assert np.abs(found - expected).max() < 1e-3
        clear = np.abs(expected) > 1e-5
        assert (attack.says_member(column(points)) == (expected > 0))[clear].all()
        assert not attack.says_member(column(points))[np.abs(expected) < 1e-8].any()


CONSTANT = {
    "one constant": (np.ones(20), np.ones(20)),
    "nearly constant": (1 - np.geomspace(1e-15, 1e-9, 20), 1 - np.geomspace(1e-14, 1e-10, 20)),
    "same values in another order": (np.arange(20.0), np.arange(20.0)[::-1]),
    "constant in several features": (np.full((20, 3), 0.1), np.full((20, 3), 0.1)),
    "one infinite value": (np.full(20, math.inf), np.full(20, math.inf)),
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_attack_on_feature_that_does_not_differ_is_not_a_number(kind):
    members, non_members = (part.reshape(20, -1) for part in CONSTANT[kind])
    assert not MIA.Attack(members, non_members).tells_apart
    shares = MIA.attack_shares(members, non_members, members, non_members, targets=members[:3])
    assert all(math.isnan(share) for share in shares)


def test_attack_with_one_value_on_one_side_is_a_number():
    """Members all right, three quarters of the non-members right: right says member, wrong says non-member."""
    members, non_members = column(np.ones(20)), column([1] * 15 + [0] * 5)
    efficacy, privacy = MIA.attack_shares(members, non_members, members, non_members, column([1, 0, 0, 0, 1]))
    assert efficacy == pytest.approx(3 / 5) and privacy == pytest.approx((1 + 5 / 20) / 2)


def test_share_of_targets_that_are_all_undecided_is_not_a_number():
    """Far from all training points of a balanced attack the decision is zero."""
    members, non_members = column([0, 1, 2, 3, 4]), column([10, 11, 12, 13, 14])
    held = column([0, 1, 2]), column([11, 12, 3])
    efficacy, privacy = MIA.attack_shares(members, non_members, *held, column([1000, 2000]))
    assert math.isnan(efficacy) and privacy == pytest.approx(5 / 6)
    assert MIA.attack_shares(members, non_members, *held, column([1000, 2000, 1]))[0] == pytest.approx(2 / 3)


def test_shares_without_enough_images_are_not_numbers():
    some, none = column([0, 1, 2, 3, 4]), column([])
    assert all(math.isnan(share) for share in MIA.attack_shares(some[:4], some[:4] + 9, some, some, some))
    efficacy, privacy = MIA.attack_shares(some, some + 9, none, some + 9, some)
    assert efficacy == 0 and math.isnan(privacy)
    efficacy, privacy = MIA.attack_shares(some, some + 9, some, some + 9, none)
    assert math.isnan(efficacy) and privacy == 1
    assert math.isnan(MIA.ranking_attack(torch.zeros(0), torch.zeros(3))[0])
    assert all(math.isnan(rate) for rate in MIA.ranking_attack(torch.zeros(3), torch.zeros(0))[1])
