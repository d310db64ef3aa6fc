"""Membership attacks: features by hand, and whole reports against scikit-learn on all images."""

import math

import numpy as np
import pytest
import torch
from scored import column, make_outputs, plain_svm, report
from sklearn.metrics import roc_auc_score, roc_curve

import metrics
from metrics import MIA, attack, scores


def test_attack_features_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]], dtype=torch.float64).log()
    actual = MIA.attack_features(logits, torch.tensor([0, 1]))
    assert list(actual) == list(MIA.KEYS)
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
def test_features_of_confident_predictions_are_finite(sure):
    actual = MIA.attack_features(torch.tensor([[sure, 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    assert all(np.isfinite(values).all() for values in actual.values())
    right, wrong = actual["modified entropy"].ravel()
    assert right == pytest.approx(0, abs=1e-9) and wrong == pytest.approx(2 * sure - math.log(2))
    rng = np.random.default_rng(0)
    members = column([*rng.random(9), right, wrong, wrong])
    trained = attack.Attack(members, column(rng.random(12)))
    assert trained.tells_apart and np.isfinite(trained.decide(members)).all()


def test_shares_without_enough_images_are_nan():
    some, none = column([0, 1, 2, 3, 4]), column([])

    def shares(*features, targets):
        return MIA.attack_shares(MIA.AttackImages(*features), targets)

    too_few = shares(some[:4], some[:4] + 9, some, some, targets=some)
    assert all(math.isnan(share) for share in too_few)
    no_held_members = shares(some, some + 9, none, some + 9, targets=some)
    assert no_held_members[0] == 0 and math.isnan(no_held_members[1])
    no_targets = shares(some, some + 9, some, some + 9, targets=none)
    assert math.isnan(no_targets[0]) and no_targets[1] == 1
    assert math.isnan(attack.roc(torch.zeros(0), torch.zeros(3))[0])
    rates = attack.roc(torch.zeros(3), torch.zeros(0), MIA.FALSE_POSITIVES)[1]
    assert len(rates) == 2 and all(map(math.isnan, rates))


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
    assert actual == {key: pytest.approx(value, abs=0.5 / 40) for key, value in expected.items()}
    # The numbers differ, so a swapped pair would be noticed.
    assert len({actual[key] for key in actual if key.startswith("MIA")}) > 7


def test_report_without_test_images_has_no_attacks():
    outputs = make_outputs(held_out=50)
    actual = report(MIA, outputs, metrics.Settings((0.1,)))[0]
    assert all(math.isnan(value) for value in actual.values())
    # Four test images are enough for a ranking but too few for an attack.
    outputs = make_outputs(held_out=54)
    actual = report(MIA, outputs, metrics.Settings((0.1,)))[0]
    assert math.isnan(actual["MIA"])
    assert math.isnan(actual["MIA_entropy_privacy"])
    assert 0 < actual["AUC"] <= 1


def test_roc_by_hand():
    # Of 12 pairs of a positive and a negative, 10 are in order.
    positives = -torch.tensor([0.1, 0.2, 0.6]).double()
    negatives = -torch.tensor([0.3, 0.5, 0.7, 0.9]).double()
    area, rates = attack.roc(positives, negatives, MIA.FALSE_POSITIVES)
    assert area == pytest.approx(10 / 12) and rates == pytest.approx([2 / 3, 2 / 3])
    sure = -torch.tensor([1e-30, 1e-25]).double()
    assert attack.roc(sure[:1], sure[1:])[0] == 1
