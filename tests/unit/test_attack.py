"""The membership SVM against scikit-learn on all images, for features of any range."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from scored import column, plain_svm
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from metrics import MIA, attack


def wide(kind, rng, n):
    if kind == "heavy tails":
        return rng.pareto(1, n), rng.pareto(0.8, n)
    if kind == "both signs":
        return rng.standard_cauchy(n), 0.3 + rng.standard_cauchy(n)
    members, non_members = rng.beta(1, 9, n), rng.beta(1, 6, n)
    if kind == "outliers":
        members[:3], non_members[:4] = [40, 1e3, 4e3], [900, 1e4, 2e5, 39]
        return members, non_members
    scale = float(kind)
    return scale * rng.random(n), scale * rng.random(n) ** 1.2


RANGES = ["1", "-5", "9", "100", "1e3", "1e5", "outliers", "heavy tails", "both signs"]


@pytest.mark.parametrize(("point", "value"), [(0.0004, 0.4e-6), (-0.0007, 0.7e-6), (2, 4)])
def test_interpolation_is_linear_between_multiples_of_a_thousandth(point, value):
    assert attack.interpolate(lambda x: x[:, 0] ** 2, np.array([point])) == pytest.approx(value)


def test_roc_by_hand():
    positives, negatives = torch.tensor([3.0, 2, 1, 0]), torch.tensor([2.5, 1.5, 0.5, -1])
    assert attack.roc(positives, negatives, (0.1, 0.25, 0.5)) == (10 / 16, [0.25, 0.5, 0.75])
    assert attack.roc(torch.tensor([2.0, 1]), torch.tensor([2.0, 1]), (0.5,)) == (0.5, [0.5])


@pytest.mark.parametrize("kind", RANGES)
def test_attack_on_feature_of_any_range_decides_as_svm_on_all_images(kind):
    rng = np.random.default_rng(0)
    members, non_members = (column(side) for side in wide(kind, rng, 250))
    every = np.concatenate([members, non_members])
    # Training points, points near them and between them, and points beyond the ends.
    nearby = every + rng.normal(0, 1, every.shape)
    between = every.min() + np.ptp(every) * column(np.linspace(-0.1, 1.1, 200))
    points = np.concatenate([every, nearby, between])
    expected = plain_svm(members, non_members).decision_function(points)
    trained = attack.Attack(members, non_members)
    assert np.abs(trained.decide(points) - expected).max() < 0.03
    clear = np.abs(expected) > 0.01
    assert clear.mean() > 0.5
    assert (trained.says_member(points) == (expected > 0))[clear].all()


CONFIDENCES = {
    "one is surer": lambda rng, n: (rng.beta(5, 1, n), rng.beta(2, 1, n), rng.beta(3, 1, 3000)),
    "nearly certain": lambda rng, n: tuple(
        1 - 10 ** -rng.exponential(s, m) for s, m in ((5, n), (2, n), (3, 3000))
    ),
    "no difference": lambda rng, n: (rng.beta(5, 1, n), rng.beta(5, 1, n), rng.beta(5, 1, 3000)),
    "ten features": lambda rng, n: tuple(
        rng.dirichlet(np.full(10, a), 700) for a in (0.1, 0.14, 0.12)
    ),
    "few": lambda rng, n: (rng.beta(5, 1, 40), rng.beta(2, 1, 40), rng.beta(3, 1, 3000)),
}


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_attack_decides_like_scikit_learn(kind):
    features = CONFIDENCES[kind](np.random.default_rng(1), 1000)
    members, non_members, targets = (values.reshape(len(values), -1) for values in features)
    expected = plain_svm(members, non_members).predict(targets)
    says_member = attack.Attack(members, non_members).says_member(targets)
    assert abs(says_member.sum() - expected.sum()) <= 1  # the share agrees within one image


SMALL_SETS = strategies.integers(5, 20).flatmap(
    lambda n: strategies.tuples(
        strategies.sampled_from([1e-2, 0.1, 1.0, 50.0]),
        strategies.lists(strategies.integers(0, 5), min_size=n, max_size=n),
        strategies.lists(strategies.integers(0, 5), min_size=n, max_size=n),
    )
)


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(SMALL_SETS)
def test_attack_on_few_tied_values_decides_as_svm_or_tells_nothing_apart(drawn):
    scale, members, non_members = drawn
    sides = [scale * column(values) for values in (members, non_members)]
    trained = attack.Attack(*sides)
    assert trained.tells_apart != (sorted(members) == sorted(non_members))
    if trained.tells_apart:
        points = scale * column(np.arange(-1, 7, 0.5))
        expected = plain_svm(*sides).decision_function(points)
        assert np.abs(trained.decide(points) - expected).max() < 0.03
        clear = np.abs(expected) > 0.03
        assert (trained.says_member(points) == (expected > 0))[clear].all()


CONSTANT = {
    "one constant": (np.ones(20), np.ones(20)),
    "nearly constant": (1 - np.geomspace(1e-15, 1e-9, 20), 1 - np.geomspace(1e-14, 1e-10, 20)),
    "same values in another order": (np.arange(20.0), np.arange(20.0)[::-1]),
    "constant in several features": (np.full((20, 3), 0.1), np.full((20, 3), 0.1)),
    "one infinite value": (np.full(20, math.inf), np.full(20, math.inf)),
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_attack_on_constant_feature_has_shares_of_nan(kind):
    members, non_members = (features.reshape(20, -1) for features in CONSTANT[kind])
    assert not attack.Attack(members, non_members).tells_apart
    features = MIA.AttackImages(members, non_members, members, non_members)
    assert all(math.isnan(share) for share in MIA.attack_shares(features, members[:3]))


@pytest.mark.parametrize(("members", "non_members"), [(10, 9), (9, 10), (4, 4), (4, 9), (9, 4)])
def test_attack_on_unequal_or_too_few_images_is_refused(members, non_members):
    with pytest.raises(ValueError, match=f"{members} members and {non_members} "):
        attack.Attack(column(range(members)), column(range(non_members)))
    with pytest.raises(ValueError, match=f"{members} members and {non_members} "):
        attack.membership_probabilities(np.ones(members), np.ones(non_members), np.ones(2))


@pytest.mark.parametrize(("n", "b"), [(53, 2), (500, 3), (5, 1)])
def test_probabilities_are_those_of_scikit_learn_on_all_images(n, b):
    rng = np.random.default_rng(3)
    members, non_members = rng.beta(5, 1, n), rng.beta(b, 1, n)
    points = np.linspace(0, 1, 101)
    actual = attack.membership_probabilities(members, non_members, points)
    # Unshuffled folds of scikit-learn are blocks of each class, as here.
    model = CalibratedClassifierCV(SVC(C=3, gamma=1, tol=1e-6), ensemble=False)
    model.fit(column(np.concatenate([members, non_members])), np.repeat([1, 0], n))
    assert np.abs(actual - model.predict_proba(column(points))[:, 1]).max() < 6e-3


def test_probabilities_of_constant_confidences_are_nan():
    actual = attack.membership_probabilities(np.full(9, 0.5), np.full(9, 0.5), np.ones(3))
    assert np.isnan(actual).all()


def test_attack_that_only_one_fold_can_train_has_probabilities():
    """Members and non-members differ in one fold only. The SVM without it is constant."""
    members, non_members = np.full(10, 0.5), np.full(10, 0.5)
    members[2:4] = 0.9
    actual = attack.membership_probabilities(members, non_members, np.array([0.4, 0.9]))
    assert not np.isnan(actual).any()


@pytest.mark.parametrize("width", [1, 2])
def test_attack_on_very_many_different_images_trains_on_the_first(monkeypatch, width):
    monkeypatch.setattr(attack, "MOST_POINTS", 40)
    monkeypatch.setattr(attack, "FEW_IMAGES", 20)
    rng = np.random.default_rng(0)
    members, non_members = rng.normal(0, 9, (60, width)), rng.normal(2, 9, (60, width))
    points = rng.normal(0, 9, (80, width))
    expected = plain_svm(members[:20], non_members[:20]).decision_function(points)
    assert np.abs(attack.Attack(members, non_members).decide(points) - expected).max() < 5e-3


def test_points_of_rounded_images_have_their_numbers_as_weights():
    features, kinds = column([0.1, 0.1004, 0.1, 0.2, 0.2]), np.array([1, 1, 0, 0, 0])
    points, weights = attack.weighted_points([features.round(3), kinds])
    assert points.tolist() == [[0.1, 0], [0.1, 1], [0.2, 0]] and weights.tolist() == [1, 2, 2]
    points, weights = attack.weighted_points([column([3, 1, 3]), np.zeros(3)], [0.5, 2, 4])
    assert points[:, 0].tolist() == [1, 3] and weights.tolist() == [2, 4.5]


def test_decision_of_zero_is_non_member():
    trained = attack.Attack(column([0, 1, 2, 3, 4]), column([5, 6, 7, 8, 9]))
    trained.decide = lambda points: np.array([-1.0, 0.0, 1.0])
    assert trained.says_member(column([0, 0, 0])).tolist() == [False, False, True]
