"""Membership attacks: against scikit-learn on ordinary, wide and degenerate features, and against numbers worked out by
hand on whole reports."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from scipy.optimize import minimize
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC

import metrics
from metrics import CR, MIA, MIACR, accuracy, probe, scores, svm


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


@pytest.mark.parametrize("kind", ["1", "-5", "9", "100", "1e3", "1e4", "1e6", "outliers", "heavy tails", "both signs"])
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


@pytest.mark.parametrize("width", [2, 3])
def test_attack_on_several_features_decides_as_scikit_learn(width):
    rng = np.random.default_rng(0)
    members, non_members = rng.normal(0, 1, (60, width)), rng.normal(0.5, 2, (60, width))
    points = rng.normal(0, 2, (200, width))
    trained, membership = np.concatenate([members, non_members]), np.repeat([1, 0], 60)
    expected = SVC(C=3, gamma="auto", tol=1e-8).fit(trained, membership).decision_function(points)
    attack = MIA.Attack(members, non_members)
    assert np.abs(attack._system.decision(points, attack._weights)[0].numpy() - expected).max() < 1e-3


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


@settings(max_examples=40, deadline=None, derandomize=True)
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


# ---------------------------------------------------------------- features of an attack


def test_attack_features_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]], dtype=torch.float64).log()
    found = MIA.attack_features(logits, torch.tensor([0, 1]))
    assert list(found) == ["correctness", "confidence", "entropy", "modified entropy", "probabilities"]
    assert found["correctness"].tolist() == [[1], [0]]
    assert found["confidence"].ravel().tolist() == pytest.approx([0.5, 0.2])
    entropies = [1.5 * math.log(2), -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))]
    assert found["entropy"].ravel().tolist() == pytest.approx(entropies)
    modified = [
        0.5 * math.log(2) - 0.5 * math.log(0.75),
        -0.8 * math.log(0.2) - 0.7 * math.log(0.3) - 0.1 * math.log(0.9),
    ]
    assert found["modified entropy"].ravel().tolist() == pytest.approx(modified)
    assert found["probabilities"] == pytest.approx(np.array([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]))
    assert {values.dtype for values in found.values()} == {np.dtype("float64")}


@pytest.mark.parametrize("sure", [30.0, 800.0, 1e5, 1e30])
def test_features_of_sure_answers_are_numbers(sure):
    found = MIA.attack_features(torch.tensor([[sure, 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    assert all(np.isfinite(values).all() for values in found.values())
    right, wrong = found["modified entropy"].ravel()
    assert right == pytest.approx(0, abs=1e-9) and wrong == pytest.approx(2 * sure - math.log(2))
    rng = np.random.default_rng(0)
    members = column([*rng.random(9), right, wrong, wrong])
    attack = MIA.Attack(members, column(rng.random(12)))
    assert attack.tells_apart and attack._system.decision(members, attack._weights).isfinite().all()


def test_modified_entropy_of_impossible_answers_is_infinite():
    logits = torch.tensor([[0.0, -math.inf, -math.inf]] * 2)
    assert MIA.modified_entropy(logits, torch.tensor([0, 1])).tolist() == [0, math.inf]


# ---------------------------------------------------------------- which images an attack sees


def output(n, generator, margin=0.0):
    labels = torch.randint(4, (n,), generator=generator)
    logits = 2 * torch.randn(n, 4, generator=generator)
    logits[torch.arange(n), labels] += margin
    return metrics.Output(logits, labels)


def make_outputs(retain=160, held_out=150, forget=40, cal_sizes=(20, 50), num_draws=1, forgotten=False):
    generator = torch.Generator().manual_seed(0)
    parts = [output(forget, generator, 1.5), output(retain, generator, 3.0), output(held_out, generator, 1.0)]
    of_class = parts[2].labels == 2 if forgotten else None
    return metrics.Outputs(*parts, list(cal_sizes), metrics.draw_splits(held_out, num_draws, seed=3), of_class)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("retain", [12, 90, 400])
def test_no_image_trains_an_attack_and_calibrates_or_tests_it(retain, forgotten):
    outputs = make_outputs(retain=retain, num_draws=3, forgotten=forgotten)
    for draw in range(3):
        held_members, members, held_non_members, non_members = MIA.divide(outputs, 7, draw)
        order = outputs.draws[draw]
        calibration, test = order[:50], order[50:]
        if forgotten:
            calibration, test = (part[outputs.held_out.labels[part] != 2] for part in (calibration, test))
        assert held_non_members.tolist() == calibration.tolist()
        assert len(non_members) == len(members) and set(non_members.tolist()) <= set(test.tolist())
        assert len(set(members.tolist()) | set(held_members.tolist())) == len(members) + len(held_members)
        assert len(held_members) == min(retain // 2, len(calibration))
        assert len(members) == min(retain - len(held_members), len(test))
        assert max(max(members.tolist()), max(held_members.tolist())) < retain


def test_attack_is_trained_on_random_images_of_the_seed_and_the_draw():
    outputs = make_outputs(num_draws=2)
    parts = [MIA.divide(outputs, seed, draw) for seed, draw in ((1, 0), (1, 0), (2, 0), (1, 1))]
    for number in (0, 1, 3):
        first, again, other_seed, other_draw = (part[number].tolist() for part in parts)
        assert first == again and first != other_seed and first != other_draw
    few = make_outputs(retain=60)
    chosen = MIA.divide(few, 1)[3]
    assert len(chosen) == 30 and sorted(chosen.tolist()) != few.draws[0, 50:80].tolist()  # not the first 30


def expected_shares(members, non_members, held_members, held_non_members, targets):
    trained, membership = np.concatenate([members, non_members]), np.repeat([1, 0], len(members))
    machine = SVC(C=3, gamma="auto", tol=1e-8).fit(trained, membership)
    right = [(machine.predict(part) == wanted).mean() for part, wanted in ((held_members, 1), (held_non_members, 0))]
    return (machine.predict(targets) == 0).mean(), np.mean(right)


@pytest.mark.parametrize("forgotten", [False, True])
def test_report_of_attacks_is_that_of_scikit_learn_on_the_same_images(forgotten):
    outputs = make_outputs(num_draws=2, forgotten=forgotten)
    found, rows = MIA.report(outputs, metrics.Settings((0.1,), seed=5))
    held_members, members, held_non_members, non_members = (part.numpy() for part in MIA.divide(outputs, 5, 0))
    parts = [MIA.attack_features(*part) for part in (outputs.retain, outputs.held_out, outputs.forget)]
    expected = {}
    for name, key in {
        "correctness": "MIA_correctness", "confidence": "MIA", "entropy": "MIA_entropy",
        "modified entropy": "MIA_modified_entropy", "probabilities": "MIA_probabilities",
    }.items():  # fmt: skip
        retain, held_out, forget = (part[name] for part in parts)
        expected[key], expected[f"{key}_privacy"] = expected_shares(
            retain[members], held_out[non_members], retain[held_members], held_out[held_non_members], forget
        )
    test = outputs.held_out.of(outputs.test())
    confidence = np.concatenate([-scores.true_label_log_odds(*part).numpy() for part in (outputs.forget, test)])
    membership = np.repeat([1, 0], [40, len(test.labels)])
    expected["AUC"] = roc_auc_score(membership, confidence)
    false_positives, true_positives, _ = roc_curve(membership, confidence, drop_intermediate=False)
    expected["TPR@1%"] = true_positives[false_positives <= 0.01].max()
    expected["TPR@0.1%"] = true_positives[false_positives <= 0.001].max()
    assert rows == {} and found == {key: pytest.approx(value, abs=1e-9) for key, value in expected.items()}
    assert len({found[key] for key in found if key.startswith("MIA")}) > 7  # they differ, so that none is another's


def test_report_without_test_images_has_no_attacks():
    outputs = make_outputs(held_out=50)
    assert all(math.isnan(value) for value in MIA.report(outputs, metrics.Settings((0.1,)))[0].values())
    outputs = make_outputs(held_out=54)  # four test images: enough for a ranking, too few for an attack
    found = MIA.report(outputs, metrics.Settings((0.1,)))[0]
    assert math.isnan(found["MIA"]) and math.isnan(found["MIA_entropy_privacy"]) and 0 < found["AUC"] <= 1


def test_report_where_all_answers_are_right_has_no_correctness_attack():
    outputs = make_outputs()
    for part in (outputs.retain, outputs.held_out):
        part.labels[:] = part.logits.argmax(dim=1)
    found = MIA.report(outputs, metrics.Settings((0.1,)))[0]
    assert math.isnan(found["MIA_correctness"]) and math.isnan(found["MIA_correctness_privacy"])
    assert 0 <= found["MIA"] <= 1 and 0 <= found["MIA_privacy"] <= 1


def test_rates_at_few_false_positives_by_hand():
    """200 non-members with scores 0.5 and more, two of them below 0.1: members below these are found."""
    non_members = torch.cat([torch.tensor([0.02, 0.06]), 0.5 + torch.arange(198) / 1000]).double()
    members = torch.tensor([0.01, 0.015, 0.04, 0.05, 0.055, 0.3, 0.9, 0.95]).double()
    area, rates = MIA.ranking_attack(members, non_members)
    assert rates == [6 / 8, 2 / 8]  # two of 200 false positives are 1 %; none is allowed at 0.1 %
    assert area == pytest.approx((2 * 200 + 3 * 199 + 198 + 0 + 0) / (8 * 200))


def test_rates_take_every_point_of_a_straight_part_of_the_curve():
    """Three scores are each one member's and one non-member's: the second is on the others' line."""
    tied = torch.tensor([0.01, 0.02, 0.03]).double()
    non_members = torch.cat([tied, 0.5 + torch.arange(197) / 1000])
    _, rates = MIA.ranking_attack(torch.cat([tied, torch.ones(1)]), non_members)
    assert rates == [2 / 4, 0]


# ---------------------------------------------------------------- probabilities and MIACR


def test_probabilities_are_those_of_scikit_learn_for_each_attack():
    rng = np.random.default_rng(3)
    pairs = [(rng.beta(5, 1, n), rng.beta(b, 1, n)) for n, b in ((53, 2), (200, 4), (5, 1))]
    points = np.linspace(0, 1, 101)
    found = MIACR.attack_probabilities(
        *([torch.from_numpy(pair[side]) for pair in pairs] for side in (0, 1)), torch.from_numpy(points)
    )
    for (members, non_members), probabilities in zip(pairs, found, strict=True):
        every, membership = np.concatenate([members, non_members]), np.repeat([1, 0], len(members))
        # Scikit-learn's folds of a sorted training set are ours: blocks of each class.
        model = CalibratedClassifierCV(SVC(C=3, gamma="auto", tol=1e-8), ensemble=False)
        expected = model.fit(column(every), membership).predict_proba(column(points))[:, 1]
        assert np.abs(probabilities.numpy() - expected).max() < 5e-3


def test_many_attacks_are_those_of_each_alone(monkeypatch):
    rng = np.random.default_rng(0)
    members, non_members = ([torch.from_numpy(rng.beta(b, 1, 30)) for _ in range(4)] for b in (5, 2))
    members[2] = non_members[2] = torch.full((30,), 0.5).double()
    points = torch.linspace(0, 1, 11).double()
    monkeypatch.setattr(svm, "TOGETHER", 5)
    together = MIACR.attack_probabilities(members, non_members, points, step=1 / 32)
    assert together.isnan().all(dim=1).nonzero().flatten().tolist() == [2] and together.isnan().sum() == 11
    for number in (0, 1, 3):
        alone = MIACR.attack_probabilities([members[number]], [non_members[number]], points, step=1 / 32)
        torch.testing.assert_close(alone[0], together[number], atol=1e-6, rtol=0)


def test_attack_that_only_one_fold_can_train_has_an_answer():
    """Members and non-members differ in one fold: the machine that is trained without it has no answer."""
    members = [torch.full((10,), 0.5).double() for _ in range(MIA.FOLDS)]
    for fold, confidences in enumerate(members):
        confidences[2 * fold : 2 * fold + 2] = 0.9
    non_members = [torch.full((10,), 0.5).double()] * MIA.FOLDS
    points = torch.tensor([0.4, 0.9]).double()
    assert not MIACR.attack_probabilities(members, non_members, points, step=1 / 32).isnan().any()


@pytest.mark.parametrize(("held_out", "known"), [(54, False), (55, True)])
def test_miacr_needs_five_images_to_train_on(held_out, known):
    rows = MIACR.report(make_outputs(held_out=held_out), metrics.Settings((0.3,)))[1]
    assert math.isfinite(rows["thr", 20, 0.3]["MIACR"]) == known


@pytest.mark.parametrize("retain", [31, 160])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_calibration_images_of_miacr_are_counted_on_the_first_draw(retain, order):
    outputs = make_outputs(retain=retain, num_draws=2, forgotten=True)
    outputs.draws = outputs.draws[order]
    rows = MIACR.report(outputs, metrics.Settings((0.3,)))[1]
    for size in (20, 50):
        retained = int((outputs.held_out.labels[outputs.draws[0, :size]] != 2).sum())
        held_members = min(retain // 2, int((outputs.held_out.labels[outputs.draws[0, :50]] != 2).sum()))
        assert rows["thr", size, 0.3]["MIACR_calibration_images"] == 2 * min(retained, held_members)


def test_miacr_without_an_answer_is_not_a_number():
    unknown, known = MIACR.membership_scores(torch.full((9,), math.nan).double()), torch.rand(9, 2).double()
    assert math.isnan(MIACR.miacr(unknown, unknown, unknown, 0.3))
    assert math.isnan(MIACR.miacr(known, known[:2], known[:2], 0.1)) and MIACR.miacr(known, known, known, 0.3) >= 0
    outputs = make_outputs()
    for part in (outputs.retain, outputs.held_out):
        part.logits[:] = 0
    assert math.isnan(MIACR.report(outputs, metrics.Settings((0.3,)))[1]["thr", 20, 0.3]["MIACR"])


def test_membership_scores_are_one_minus_the_probability_of_each_answer():
    assert MIACR.membership_scores(torch.tensor([0.25]).double()).tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize(("num_draws", "forgotten"), [(1, False), (4, False), (4, True)])
def test_miacr_trains_and_calibrates_each_draw_on_its_own_images(monkeypatch, num_draws, forgotten):
    """The attack's probability is replaced by the confidence, so that MIACR can be worked out."""
    outputs = make_outputs(num_draws=num_draws, forgotten=forgotten)
    trained = []

    def probabilities(members, non_members, points, step):
        trained.extend(zip(members, non_members, strict=True))
        assert step == (1 / 1024 if num_draws == 1 else 1 / 256)
        return points.expand(len(members), -1).clone()

    monkeypatch.setattr(MIACR, "attack_probabilities", probabilities)
    chosen = metrics.Settings((0.1, 0.4), (scores.Score(), scores.Score("aps")), seed=5)
    scalars, rows = MIACR.report(outputs, chosen)
    names = ("retain", "held_out", "forget")
    retain, held_out, forget = (MIA.confidences(*getattr(outputs, name)) for name in names)
    assert scalars == {} and set(rows) == {
        (name, n, a) for name in ("thr", "aps") for n in (20, 50) for a in (0.1, 0.4)
    }
    for (_, size, alpha), row in rows.items():
        expected = []
        for draw in range(num_draws):
            held_members, members, _, non_members = MIA.divide(outputs, 5, draw)
            assert torch.equal(trained[draw][0], retain[members]) and torch.equal(
                trained[draw][1], held_out[non_members]
            )
            calibration = outputs.calibration(size, draw)
            n = min(len(held_members), len(calibration))
            true = torch.cat([1 - retain[held_members[:n]], held_out[calibration[:n]]])
            q_hat = CR.conformal_quantile(true, alpha)
            expected.append(((forget <= q_hat) & (1 - forget > q_hat)).double().mean().item())
        assert row["MIACR"] == pytest.approx(np.mean(expected), rel=1e-12)
        assert ("MIACR_resplit_std" in row) == (num_draws > 1)
        if num_draws > 1:
            assert row["MIACR_resplit_std"] == pytest.approx(np.std(expected, ddof=1))
            assert len(set(expected)) > 1


# ---------------------------------------------------------------- the machine itself


def dual_optimum(signed_kernel, signs, bounds):
    """The largest value of Σ a − ½ aᵀKa with 0 ≤ a ≤ bounds and signs · a = 0, by a general minimizer."""
    found = minimize(
        lambda a: a @ signed_kernel @ a / 2 - a.sum(), np.zeros(len(bounds)), jac=lambda a: signed_kernel @ a - 1,
        bounds=[(0, bound) for bound in bounds], constraints={"type": "eq", "fun": lambda a: a @ signs},
        options={"maxiter": 500, "ftol": 1e-10},
    )  # fmt: skip
    return -found.fun


def test_dense_machines_minimize_their_objectives():
    """Several weighted problems at a time, against a general minimizer."""
    rng = np.random.default_rng(0)
    points, signs = rng.random((40, 1)), torch.from_numpy(np.where(rng.random(40) < 0.5, 1.0, -1.0))
    system = svm.system_of(points)
    bounds = torch.from_numpy(3 * rng.random((3, 40)) * (rng.random((3, 40)) < 0.7))
    weights, tells_apart = svm.solve(system, signs, bounds)
    assert tells_apart.all()
    kernel = np.exp(-((points - points.T) ** 2)) + 1e-9 * np.eye(40)
    for row, found in zip(bounds, weights, strict=True):
        dual = dual_optimum(signs.numpy()[:, None] * kernel * signs.numpy(), signs.numpy(), row.numpy())
        hinge = (1 - signs * system.forward(found[None])[0]).clamp(min=0)
        primal = (system.penalty(found[None])[0] @ found / 2 + (row * hinge).sum()).item()
        assert primal == pytest.approx(dual, rel=1e-5)
        assert system.decision(points, found[None])[0].tolist() == pytest.approx(
            system.forward(found[None])[0].tolist()
        )


@pytest.mark.parametrize("scale", [1, 100])
def test_interior_point_needs_few_iterations(monkeypatch, scale):
    rng = np.random.default_rng(0)
    members, non_members = scale * rng.random((300, 1)), scale * rng.random((300, 1)) ** 1.2
    system = svm.system_of(np.concatenate([members, non_members]))
    iterations, factor = [], system.factor
    monkeypatch.setattr(system, "factor", lambda diagonal: iterations.append(1) or factor(diagonal))
    svm.solve(system, torch.from_numpy(np.repeat([1.0, -1.0], 300)), torch.full((1, 600), 3.0).double())
    assert len(iterations) == pytest.approx(11, abs=1)  # one more or less by the rounding of a machine


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e5])
def test_attack_does_not_depend_on_where_the_feature_is(shift):
    rng = np.random.default_rng(1)
    members, non_members, targets = rng.random(40), 1.5 * rng.random(40), 2 * rng.random(60)
    expected = scikit_learn_decisions(members, non_members, targets)
    attack = MIA.Attack(column(members + shift), column(non_members + shift))
    found = attack._system.decision(column(targets + shift), attack._weights)[0].numpy()
    assert np.abs(found - expected).max() < 1e-3


def test_offset_is_the_middle_of_the_best():
    """The sum of the hinge losses is flat between kinks; b = 0.3 + 0.5 ± is found on a fine grid of b."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = 2 * rng.integers(1, 6)
        values, bounds = (
            torch.from_numpy(rng.normal(0, 0.5, (1, n))),
            torch.from_numpy(rng.integers(1, 4, (1, n)).astype(float)),
        )
        signs = torch.tensor([1.0, -1.0]).double().repeat(n // 2)
        at = torch.linspace(-4, 4, 8001).double()
        loss = (bounds[0] * (1 - signs * (values[0] + at[:, None])).clamp(min=0)).sum(dim=1)
        best = at[loss <= loss.min() + 1e-9]
        middle = (best.min() + best.max()) / 2
        assert svm._offset(values, signs, bounds).item() == pytest.approx(middle.item(), abs=5e-3)


@pytest.mark.parametrize(("members", "non_members"), [(10, 9), (9, 10), (4, 4), (4, 9), (9, 4)])
def test_attack_refuses_unequal_or_too_few_images(members, non_members):
    with pytest.raises(ValueError, match=f"equally many, at least 5, .* found {members} and {non_members}"):
        MIA.Attack(column(range(members)), column(range(non_members)))
    with pytest.raises(ValueError, match=f"found {members} and {non_members}"):
        MIACR.attack_probabilities([torch.rand(members)], [torch.rand(non_members)], torch.rand(2))


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_machine_tells_apart_only_by_points_that_count(weight):
    """Points 0 and 1 on both sides; another point has no weight in the first row, and a small one in the second."""
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]).double()
    bounds = torch.full((2, 5), weight).double()
    bounds[0, 4], bounds[1, 4] = 0, 0.1 * weight
    _, tells_apart = svm.solve(svm.system_of(column([0, 1, 0, 1, 3])), signs, bounds)
    assert tells_apart.tolist() == [False, True]


def test_machine_refuses_one_side_only():
    system = svm.system_of(column([0, 1, 2]))
    signs, bounds = torch.tensor([1.0, 1.0, -1.0]).double(), torch.ones(2, 3).double()
    bounds[1, 2] = 0
    with pytest.raises(ValueError, match="one of the two is missing"):
        svm.solve(system, signs, bounds)


def test_grid_keeps_number_mean_and_ends():
    grid = svm.Grid(1 / 4)
    assert grid.nodes.tolist() == [0, 0.25, 0.5, 0.75, 1] and grid.size == 5
    counts = grid.histogram(np.array([0.0, 0.1, 0.5, 1.0, 1.0]))
    assert counts.tolist() == pytest.approx([1.6, 0.4, 1, 0, 2])
    assert counts @ grid.nodes == pytest.approx(0.1 + 0.5 + 2)
    assert svm.Grid(svm.FINE).size == 1025 and svm.Grid(svm.COARSE).size == 257


@pytest.mark.parametrize(("low", "high", "count"), [(0, 1, 16), (-2, 0.6, 23), (3, 5, 20)])
def test_landmarks_are_the_zeros_of_a_chebyshev_polynomial_on_the_range(low, high, count):
    zeros = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    expected = sorted(low + (high - low) * (zeros + 1) / 2)
    assert svm.chebyshev_landmarks(low, high).shape == (count, 1)
    assert sorted(svm.chebyshev_landmarks(low, high)[:, 0]) == pytest.approx(expected)


@pytest.mark.parametrize("count", [7, 150])
def test_features_are_exact_on_the_landmarks_and_the_same_each_time(count):
    landmarks = np.random.default_rng(0).normal(0, 3, (count, 4))
    features = svm.FeatureMap(landmarks)(landmarks).numpy()
    kernel = np.exp(-((landmarks[:, None] - landmarks) ** 2).sum(axis=2) / 4)
    assert np.abs(features @ features.T - kernel).max() < 1e-8 and features.dtype == np.float64
    assert np.array_equal(svm.FeatureMap(landmarks)(landmarks).numpy(), features)


def test_platt_scaling_maximizes_the_likelihood():
    rng = np.random.default_rng(0)
    decisions = torch.from_numpy(rng.normal(0, [[1], [5], [0.01]], (3, 60)))
    signs = torch.from_numpy(np.where(rng.random(60) < 0.5, 1.0, -1.0))
    counts = torch.from_numpy(rng.integers(0, 4, (3, 60)).astype(float))
    found = svm.platt(decisions + 0.5 * signs, signs, counts)
    for row, weight, (slope, offset) in zip(
        (decisions + 0.5 * signs).numpy(), counts.numpy(), found.tolist(), strict=True
    ):
        loss = platt_loss(row, signs.numpy(), weight)
        assert loss((slope, offset)) <= minimize(loss, [0.0, 0.0], options={"gtol": 1e-8}).fun + 1e-6
        assert slope < 0


def platt_loss(decisions, signs, counts):
    """Minus the log-likelihood of Platt's smoothed targets, as a function of slope and offset."""
    positive, negative = counts[signs > 0].sum(), counts[signs < 0].sum()
    target = np.where(signs > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(at):
        z = at[0] * decisions + at[1]
        return (counts * (target * z + np.logaddexp(0, -z))).sum()

    return loss


# ---------------------------------------------------------------- accuracies and the probe


@pytest.mark.parametrize("forgotten", [False, True])
def test_accuracies_are_of_the_right_images(forgotten):
    outputs = make_outputs(num_draws=2, forgotten=forgotten)
    found, rows = accuracy.report(outputs, metrics.Settings((0.1,)))
    right = [
        (part.logits.argmax(dim=1) == part.labels).double()
        for part in (outputs.forget, outputs.retain, outputs.held_out)
    ]
    tested = [number for number in range(50, 150) if not (forgotten and outputs.held_out.labels[number] == 2)]
    expected = {"UA": 1 - right[0].mean(), "RA": right[1].mean(), "TA": right[2][tested].mean()}
    if forgotten:
        of_class = [number for number in range(50, 150) if outputs.held_out.labels[number] == 2]
        expected["UA_test"] = 1 - right[2][of_class].mean()
    assert rows == {} and found == {key: pytest.approx(value.item()) for key, value in expected.items()}
    assert len(set(found.values())) == len(found)


def test_accuracy_of_forgotten_class_without_test_images_is_left_out():
    outputs = make_outputs(forgotten=True)
    outputs.forgotten[outputs.draws[0, 50:]] = False
    assert "UA_test" not in accuracy.report(outputs, metrics.Settings((0.1,)))[0]


def test_probe_takes_a_random_part_of_many_images(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    features = rng.normal(0, 1, (200, 2)) + 30 * labels[:, None]
    monkeypatch.setattr(probe, "MOST", 20)
    fitted = []
    fit = probe.LogisticRegression.fit

    def watch(self, features, labels):
        assert self.max_iter == probe.MOST_ITERATIONS
        fitted.append((features, labels))
        return fit(self, features, labels)

    monkeypatch.setattr(probe.LogisticRegression, "fit", watch)
    tests = {"all": (features, labels), "none": (features[:0], labels[:0]), "wrong": (features, 1 - labels)}
    found = [probe.linear_probe(features, labels, tests, seed) for seed in (1, 1, 2)]
    assert all(result == {"all": 1.0, "wrong": 0.0} for result in found)
    assert all(len(seen) == 20 and set(seen) == {0, 1} for _, seen in fitted)
    first, again, other = (seen.tolist() for seen, _ in fitted)
    assert first == again != other
    assert np.abs(np.mean(first, axis=0)).max() < 1e-9 and np.std(first, axis=0) == pytest.approx([1, 1])
