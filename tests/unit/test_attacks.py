"""Membership attacks: against scikit-learn on all images, on ordinary, wide and degenerate
features, and against numbers worked out by hand on whole reports."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC

import metrics
from metrics import CR, MIA, MIACR, accuracy, attack, probe, scores


def report(module, outputs, settings):
    """The report of a metric's module: (scalars, rows)."""
    return module.report(outputs, metrics.ConformalScores(outputs, settings), settings)


def column(values):
    return np.asarray(values, dtype=np.float64)[:, None]


def plain_svm(members, non_members):
    """Scikit-learn's SVM on all images. Features N×d."""
    membership = np.repeat([1, 0], [len(members), len(non_members)])
    machine = SVC(C=3, gamma=1 / members.shape[1], tol=1e-5)
    return machine.fit(np.concatenate([members, non_members]), membership)


# ---------------------------------------------------------------- one feature of any range


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


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e5])
def test_attack_on_shifted_feature_gives_same_decisions(shift):
    rng = np.random.default_rng(1)
    members, non_members = rng.random((40, 1)), 1.5 * rng.random((40, 1))
    points = 2 * rng.random((60, 1))
    expected = plain_svm(members, non_members).decision_function(points)
    trained = attack.Attack(members + shift, non_members + shift)
    assert np.abs(trained.decide(points + shift) - expected).max() < 5e-3


def test_attack_on_infinite_features_equals_svm_on_far_features():
    rng = np.random.default_rng(0)
    members, non_members = rng.random((50, 1)), 3 * rng.random((50, 1))
    members[0], non_members[:3, 0] = -math.inf, [math.inf, math.inf, 1e300]
    points = column([*np.linspace(-1, 4, 50), math.inf, -math.inf, 1e300])
    far = [np.clip(values, -1e6, 1e6) for values in (members, non_members, points)]
    expected = plain_svm(far[0], far[1]).decision_function(far[2])
    trained = attack.Attack(members, non_members)
    assert np.abs(trained.decide(points) - expected).max() < 5e-3


def test_infinite_features_without_a_histogram_are_clipped(monkeypatch):
    monkeypatch.setattr(attack, "MOST_NODES", 10)
    members, non_members = column([0, 1, 2, 3, -math.inf]), column([9, 8, 7, 6, math.inf])
    decisions = attack.Attack(members, non_members).decide(column([math.inf, -math.inf, 1]))
    assert decisions[0] < 0 < decisions[1] and decisions[2] > 0


@pytest.mark.parametrize("width", [1, 2])
def test_attack_without_a_histogram_trains_on_first_images(monkeypatch, width):
    monkeypatch.setattr(attack, "MOST_NODES" if width == 1 else "MOST_POINTS", 40)
    rng = np.random.default_rng(0)
    members, non_members = rng.normal(0, 9, (60, width)), rng.normal(2, 9, (60, width))
    points = rng.normal(0, 9, (80, width))
    expected = plain_svm(members[:20], non_members[:20]).decision_function(points)
    assert np.abs(attack.Attack(members, non_members).decide(points) - expected).max() < 5e-3


def test_grid_is_the_finest_with_few_nodes(monkeypatch):
    points = np.array([0.0, 0.01, 0.02, 0.5])
    assert attack.choose_grid(points).step == 1 / 1024
    monkeypatch.setattr(attack, "MOST_NODES", 6)  # 0, 0.01 and 0.02 share nodes at 1/64
    assert attack.choose_grid(points).step == 1 / 64
    monkeypatch.setattr(attack, "MOST_NODES", 3)
    assert attack.choose_grid(points) is None


def test_grid_of_few_points_by_hand():
    points = np.array([0.0, 0.1, 0.5, 1.0, 1.0])
    grid = attack.Grid(points, 1 / 4)
    assert grid.nodes.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    weights = grid.histogram(points)
    assert weights.tolist() == pytest.approx([1.6, 0.4, 1, 0, 2, 0])
    assert weights @ grid.nodes == pytest.approx(points.sum())
    values = np.array([0.0, 1.0, 3.0, 0.0, 5.0, 0.0])
    between = grid.interpolate(np.array([0.05, 0.4, 1.0]), values)
    assert between.tolist() == pytest.approx([0.2, 1 + 0.6 * 2, 5])


def test_grid_has_nodes_near_points_only():
    grid = attack.Grid(np.array([-0.1, 1000.3]), 1 / 2)
    assert grid.nodes.tolist() == [-0.5, 0, 1000, 1000.5]
    assert grid.histogram(np.array([-0.1, 1000.3])).tolist() == pytest.approx([0.2, 0.8, 0.4, 0.6])


# ---------------------------------------------------------------- several features


@pytest.mark.parametrize("width", [2, 3])
def test_attack_on_several_features_decides_as_svm_on_all_images(width):
    rng = np.random.default_rng(0)
    members, non_members = rng.normal(0, 1, (60, width)), rng.normal(0.5, 2, (60, width))
    points = rng.normal(0, 2, (200, width))
    expected = plain_svm(members, non_members).decision_function(points)
    assert np.abs(attack.Attack(members, non_members).decide(points) - expected).max() < 5e-3


# ---------------------------------------------------------------- uninformative features


SMALL_SETS = strategies.integers(5, 20).flatmap(
    lambda n: strategies.tuples(
        strategies.sampled_from([1e-2, 0.1, 1.0, 50.0]),
        strategies.lists(strategies.integers(0, 5), min_size=n, max_size=n),
        strategies.lists(strategies.integers(0, 5), min_size=n, max_size=n),
    )
)


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(SMALL_SETS)
def test_attack_on_few_tied_values_decides_as_svm_or_has_no_answer(drawn):
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


def test_decision_of_zero_is_non_member_and_no_image_gives_no_decision():
    trained = attack.Attack(column([0, 1, 2, 3, 4]), column([5, 6, 7, 8, 9]))
    trained.decide = lambda points: np.array([-1.0, 0.0, 1.0])
    assert trained.says_member(column([0, 0, 0])).tolist() == [False, False, True]
    del trained.decide
    assert trained.decide(column([])).shape == (0,)


def test_attack_with_constant_member_feature_gives_shares_by_hand():
    """All members and 15 of 20 non-members are correct, so "correct" means "member"."""
    members, non_members = column(np.ones(20)), column([1] * 15 + [0] * 5)
    features = MIA.AttackImages(members, non_members, members, non_members)
    efficacy, privacy = MIA.attack_shares(features, column([1, 0, 0, 0, 1]))
    assert efficacy == pytest.approx(3 / 5) and privacy == pytest.approx((1 + 5 / 20) / 2)


def test_shares_without_enough_images_are_nan():
    some, none = column([0, 1, 2, 3, 4]), column([])

    def shares(*features, targets):
        return MIA.attack_shares(MIA.AttackImages(*features), targets)

    too_few = shares(some[:4], some[:4] + 9, some, some, targets=some)
    assert all(math.isnan(share) for share in too_few)
    no_held_members = shares(some, some + 9, none, some + 9, targets=some)
    assert no_held_members.efficacy == 0 and math.isnan(no_held_members.privacy)
    no_targets = shares(some, some + 9, some, some + 9, targets=none)
    assert math.isnan(no_targets.efficacy) and no_targets.privacy == 1
    assert math.isnan(MIA.ranking_attack(torch.zeros(0), torch.zeros(3))[0])
    assert all(math.isnan(rate) for rate in MIA.ranking_attack(torch.zeros(3), torch.zeros(0))[1])


@pytest.mark.parametrize(("members", "non_members"), [(10, 9), (9, 10), (4, 4), (4, 9), (9, 4)])
def test_attack_on_unequal_or_too_few_images_is_refused(members, non_members):
    message = f"at least 5 of each; got {members} members and {non_members} non-members"
    with pytest.raises(ValueError, match=message):
        attack.Attack(column(range(members)), column(range(non_members)))
    with pytest.raises(ValueError, match=message):
        attack.membership_probabilities(np.ones(members), np.ones(non_members), np.ones(2))


# ---------------------------------------------------------------- features of an attack


def test_attack_features_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]], dtype=torch.float64).log()
    actual = MIA.attack_features(logits, torch.tensor([0, 1]))
    assert list(actual) == [
        "correctness",
        "confidence",
        "entropy",
        "modified entropy",
        "probabilities",
    ]
    assert actual["correctness"].tolist() == [[1], [0]]
    assert actual["confidence"].ravel().tolist() == pytest.approx([0.5, 0.2])
    entropies = [1.5 * math.log(2), -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))]
    assert actual["entropy"].ravel().tolist() == pytest.approx(entropies)
    modified = [
        0.5 * math.log(2) - 0.5 * math.log(0.75),
        -0.8 * math.log(0.2) - 0.7 * math.log(0.3) - 0.1 * math.log(0.9),
    ]
    assert actual["modified entropy"].ravel().tolist() == pytest.approx(modified)
    assert actual["probabilities"] == pytest.approx(np.array([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]))
    assert {values.dtype for values in actual.values()} == {np.dtype("float64")}


@pytest.mark.parametrize("sure", [30.0, 800.0, 1e5, 1e30])
def test_features_of_confident_answers_are_finite(sure):
    actual = MIA.attack_features(torch.tensor([[sure, 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    assert all(np.isfinite(values).all() for values in actual.values())
    right, wrong = actual["modified entropy"].ravel()
    assert right == pytest.approx(0, abs=1e-9) and wrong == pytest.approx(2 * sure - math.log(2))
    rng = np.random.default_rng(0)
    members = column([*rng.random(9), right, wrong, wrong])
    trained = attack.Attack(members, column(rng.random(12)))
    assert trained.tells_apart and np.isfinite(trained.decide(members)).all()


def test_modified_entropy_of_impossible_answers_is_infinite():
    logits = torch.tensor([[0.0, -math.inf, -math.inf]] * 2)
    assert MIA.modified_entropy(logits, torch.tensor([0, 1])).tolist() == [0, math.inf]


# ---------------------------------------------------------------- images of an attack


def output(n, generator, margin=0.0):
    labels = torch.randint(4, (n,), generator=generator)
    logits = 2 * torch.randn(n, 4, generator=generator)
    logits[torch.arange(n), labels] += margin
    return metrics.Output(logits, labels)


def make_outputs(
    retain=160, held_out=150, forget=40, cal_sizes=(20, 50), num_draws=1, forgotten=False
):
    generator = torch.Generator().manual_seed(0)
    answers = [
        output(forget, generator, 1.5),
        output(retain, generator, 3.0),
        output(held_out, generator, 1.0),
    ]
    of_class = answers[2].labels == 2 if forgotten else None
    return metrics.Outputs(
        *answers, list(cal_sizes), metrics.draw_splits(held_out, num_draws, seed=3), of_class
    )


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("retain", [12, 90, 400])
def test_images_of_attacks_are_disjoint_and_as_many_as_documented(retain, forgotten):
    outputs = make_outputs(retain=retain, num_draws=3, forgotten=forgotten)
    images = MIA.attack_images(outputs, 7)
    calibration, test = outputs.draws[0, :50], outputs.draws[0, 50:]
    if forgotten:
        labels = outputs.held_out.labels
        calibration, test = (indices[labels[indices] != 2] for indices in (calibration, test))
    assert images.held_non_members.tolist() == calibration.tolist()
    assert set(images.non_members.tolist()) <= set(test.tolist())
    members = [*images.members.tolist(), *images.held_members.tolist()]
    assert len(set(members)) == len(members) and max(members) < retain
    assert len(images.held_members) == min(retain // 2, len(calibration))
    assert len(images.members) == min(retain - len(images.held_members), len(test))
    assert len(images.non_members) == len(set(images.non_members.tolist())) == len(images.members)


def test_images_of_attacks_are_drawn_by_the_seed():
    outputs = make_outputs()
    first, again, other = (MIA.attack_images(outputs, seed) for seed in (1, 1, 2))
    for name in ("members", "non_members", "held_members"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    few = make_outputs(retain=60)
    chosen = MIA.attack_images(few, 1).non_members.tolist()
    assert len(chosen) == 30 and sorted(chosen) != few.draws[0, 50:80].tolist()  # not the first 30


def expected_shares(members, non_members, held_members, held_non_members, targets):
    machine = plain_svm(members, non_members)
    right = [
        (machine.predict(features) == wanted).mean()
        for features, wanted in ((held_members, 1), (held_non_members, 0))
    ]
    return (machine.predict(targets) == 0).mean(), np.mean(right)


@pytest.mark.parametrize("forgotten", [False, True])
def test_report_of_attacks_is_that_of_scikit_learn_on_the_same_images(forgotten):
    outputs = make_outputs(num_draws=2, forgotten=forgotten)
    actual, rows = report(MIA, outputs, metrics.Settings((0.1,), seed=5))
    images = MIA.attack_images(outputs, 5)
    attacked = (outputs.retain, outputs.held_out, outputs.forget)
    features_of_sets = [MIA.attack_features(*output) for output in attacked]
    expected = {}
    for name, key in {
        "correctness": "MIA_correctness", "confidence": "MIA", "entropy": "MIA_entropy",
        "modified entropy": "MIA_modified_entropy", "probabilities": "MIA_probabilities",
    }.items():  # fmt: skip
        retain, held_out, forget = (features[name] for features in features_of_sets)
        expected[key], expected[f"{key}_privacy"] = expected_shares(
            retain[images.members],
            held_out[images.non_members],
            retain[images.held_members],
            held_out[images.held_non_members],
            forget,
        )
    test = outputs.held_out.select(outputs.test())
    confidence = np.concatenate(
        [-scores.true_label_log_odds(*output).numpy() for output in (outputs.forget, test)]
    )
    membership = np.repeat([1, 0], [40, len(test.labels)])
    expected["AUC"] = roc_auc_score(membership, confidence)
    false_positives, true_positives, _ = roc_curve(membership, confidence, drop_intermediate=False)
    expected["TPR@1%"] = true_positives[false_positives <= 0.01].max()
    expected["TPR@0.1%"] = true_positives[false_positives <= 0.001].max()
    assert rows == {}
    assert actual == {key: pytest.approx(value, abs=1e-9) for key, value in expected.items()}
    # The numbers differ, so a swapped pair would be noticed.
    assert len({actual[key] for key in actual if key.startswith("MIA")}) > 7


def test_report_without_test_images_has_no_attacks():
    outputs = make_outputs(held_out=50)
    assert all(
        math.isnan(value) for value in report(MIA, outputs, metrics.Settings((0.1,)))[0].values()
    )
    # Four test images are enough for a ranking but too few for an attack.
    outputs = make_outputs(held_out=54)
    actual = report(MIA, outputs, metrics.Settings((0.1,)))[0]
    assert math.isnan(actual["MIA"])
    assert math.isnan(actual["MIA_entropy_privacy"])
    assert 0 < actual["AUC"] <= 1


def test_report_where_all_answers_are_right_has_no_correctness_attack():
    outputs = make_outputs()
    for output in (outputs.retain, outputs.held_out):
        output.labels[:] = output.logits.argmax(dim=1)
    actual = report(MIA, outputs, metrics.Settings((0.1,)))[0]
    assert math.isnan(actual["MIA_correctness"]) and math.isnan(actual["MIA_correctness_privacy"])
    assert 0 <= actual["MIA"] <= 1 and 0 <= actual["MIA_privacy"] <= 1


def test_rates_at_few_false_positives_by_hand():
    """Two of 200 non-members score below 0.1. Members with lower scores are detected."""
    non_members = torch.cat([torch.tensor([0.02, 0.06]), 0.5 + torch.arange(198) / 1000]).double()
    members = torch.tensor([0.01, 0.015, 0.04, 0.05, 0.055, 0.3, 0.9, 0.95]).double()
    area, rates = MIA.ranking_attack(members, non_members)
    assert rates == [6 / 8, 2 / 8]  # 1 % allows two of 200 false positives, 0.1 % none
    assert area == pytest.approx((2 * 200 + 3 * 199 + 198 + 0 + 0) / (8 * 200))


def test_rates_take_every_point_of_a_straight_curve_segment():
    """Each of three scores has one member and one non-member. The second score is in the middle."""
    tied = torch.tensor([0.01, 0.02, 0.03]).double()
    non_members = torch.cat([tied, 0.5 + torch.arange(197) / 1000])
    _, rates = MIA.ranking_attack(torch.cat([tied, torch.ones(1)]), non_members)
    assert rates == [2 / 4, 0]


# ---------------------------------------------------------------- probabilities and MIACR


@pytest.mark.parametrize(("n", "b"), [(53, 2), (200, 4), (5, 1)])
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


def test_attack_that_only_one_fold_can_train_has_an_answer():
    """Members and non-members differ in one fold only. The SVM trained without it has no answer."""
    members, non_members = np.full(10, 0.5), np.full(10, 0.5)
    members[2:4] = 0.9
    actual = attack.membership_probabilities(members, non_members, np.array([0.4, 0.9]))
    assert not np.isnan(actual).any()


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


def test_miacr_redraws_from_all_unused_held_out_images():
    outputs = make_outputs(num_draws=40)
    training = MIACR.training_images(outputs, 7)
    drawn = [MIACR.calibration_images(outputs, training, 20, 7, draw) for draw in range(40)]
    non_members = set(torch.cat([images.non_members for images in drawn]).tolist())
    members = set(torch.cat([images.members for images in drawn]).tolist())
    assert non_members == set(range(150)) - set(training.non_members.tolist())
    assert members == set(range(160)) - set(training.members.tolist())


@pytest.mark.parametrize(("held_out", "known"), [(59, False), (60, True)])
def test_miacr_with_fewer_than_ten_test_images_is_nan(held_out, known):
    rows = report(MIACR, make_outputs(held_out=held_out), metrics.Settings((0.3,)))[1]
    assert math.isfinite(rows["thr", 20, 0.3]["MIACR"]) == known


def test_miacr_without_an_answer_is_nan():
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


def test_membership_scores_are_one_minus_the_probability_of_each_answer():
    assert MIACR.membership_scores(torch.tensor([0.25]).double()).tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize(("num_draws", "forgotten"), [(1, False), (4, False), (4, True)])
def test_miacr_of_confidence_as_probability_is_what_each_draw_gives(
    monkeypatch, num_draws, forgotten
):
    """Confidence replaces the attack probability, so that MIACR can be computed by hand."""
    outputs = make_outputs(num_draws=num_draws, forgotten=forgotten)
    answers = (outputs.retain, outputs.held_out, outputs.forget)
    retain, held_out, forget = (MIA.confidences(*output) for output in answers)
    training = MIACR.training_images(outputs, 5)
    trained = []

    def probabilities(members, non_members, points):
        trained.append((members.tolist(), non_members.tolist()))
        return points

    monkeypatch.setattr(attack, "membership_probabilities", probabilities)
    chosen = metrics.Settings((0.1, 0.4), (scores.Score(), scores.Score("aps")), seed=5)
    scalars, rows = report(MIACR, outputs, chosen)
    assert trained == [(retain[training.members].tolist(), held_out[training.non_members].tolist())]
    assert scalars == {}
    assert set(rows) == {
        (name, n, a) for name in ("thr", "aps") for n in (20, 50) for a in (0.1, 0.4)
    }
    differ = False
    for (_, size, alpha), row in rows.items():
        expected = []
        for draw in range(num_draws):
            images = MIACR.calibration_images(outputs, training, size, 5, draw)
            true_scores = [1 - retain[images.members], held_out[images.non_members]]
            q_hat = CR.conformal_quantile(torch.cat(true_scores), alpha)
            is_exact = (forget <= q_hat) & (1 - forget > q_hat)
            expected.append(is_exact.double().mean().item())
        assert row["MIACR_calibration_images"] == 2 * len(outputs.calibration(size))
        if num_draws == 1:
            assert row["MIACR"] == pytest.approx(expected[0], rel=1e-12)
        else:
            assert row["MIACR"].mean == pytest.approx(np.mean(expected), rel=1e-12)
            assert row["MIACR"].std == pytest.approx(np.std(expected, ddof=1))
            differ |= len(set(expected)) > 1
    assert differ == (num_draws > 1)


# ---------------------------------------------------------------- accuracies and the probe


@pytest.mark.parametrize("forgotten", [False, True])
def test_accuracies_of_a_report_are_measured_on_their_images(forgotten):
    outputs = make_outputs(num_draws=2, forgotten=forgotten)
    actual, rows = report(accuracy, outputs, metrics.Settings((0.1,)))
    right = [
        (output.logits.argmax(dim=1) == output.labels).double()
        for output in (outputs.forget, outputs.retain, outputs.held_out)
    ]
    tested = [
        number
        for number in range(50, 150)
        if not (forgotten and outputs.held_out.labels[number] == 2)
    ]
    expected = {"UA": 1 - right[0].mean(), "RA": right[1].mean(), "TA": right[2][tested].mean()}
    if forgotten:
        of_class = [number for number in range(50, 150) if outputs.held_out.labels[number] == 2]
        expected["UA_test"] = 1 - right[2][of_class].mean()
    assert rows == {}
    assert actual == {key: pytest.approx(value.item()) for key, value in expected.items()}
    assert len(set(actual.values())) == len(actual)


def test_accuracy_of_forgotten_class_without_test_images_is_omitted():
    outputs = make_outputs(forgotten=True)
    outputs.forgotten[outputs.draws[0, 50:]] = False
    assert "UA_test" not in report(accuracy, outputs, metrics.Settings((0.1,)))[0]


def test_probe_on_many_images_trains_on_a_random_sample(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    features = rng.normal(0, 1, (200, 2)) + 30 * labels[:, None]
    monkeypatch.setattr(probe, "MOST_IMAGES", 20)
    fitted = []
    fit = probe.LogisticRegression.fit

    def watch(self, features, labels):
        assert self.max_iter == probe.MOST_ITERATIONS
        fitted.append((features, labels))
        return fit(self, features, labels)

    monkeypatch.setattr(probe.LogisticRegression, "fit", watch)
    tests = {
        "all": (features, labels),
        "none": (features[:0], labels[:0]),
        "wrong": (features, 1 - labels),
    }
    actual = [probe.linear_probe(features, labels, tests, seed) for seed in (1, 1, 2)]
    assert all(result == {"all": 1.0, "wrong": 0.0} for result in actual)
    assert all(len(seen) == 20 and set(seen) == {0, 1} for _, seen in fitted)
    first, again, other = (seen.tolist() for seen, _ in fitted)
    assert first == again != other
    assert np.abs(np.mean(first, axis=0)).max() < 1e-9
    assert np.std(first, axis=0) == pytest.approx([1, 1])
