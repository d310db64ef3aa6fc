"""Calibration: the q̂ of every group of images and of every class."""

import math

import pytest
import torch
from scored import plain_log_odds, plain_numbers, plain_q_hat, some_outputs

import metrics
from metrics import CR, conformal, scores


def test_a_set_contains_the_labels_up_to_and_including_q_hat():
    ranked = torch.tensor([[0.0, 1.0, 2.0], [2.0, 2.0, 5.0], [-1.0, 3.0, 3.0]])
    part = conformal.ImageScores(torch.tensor([1.0, 2.0, 3.0]), ranked, torch.zeros(3).bool())
    q_hats = torch.tensor([2.0, 1.5, -2.0])
    assert part.in_set(q_hats).int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert part.set_sizes(q_hats).tolist() == [[3, 2, 1], [2, 0, 1], [0, 0, 0]]


def test_q_hats_are_those_of_the_score_and_the_size_that_are_asked_for():
    outputs, both = some_outputs(1), (scores.Score("thr"), scores.Score("aps", seed=3))
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.2,), both))
    expected = {}
    for score in both:
        values = plain_log_odds(outputs.held_out, score, "held_out")
        for size in (20, 45):
            expected[score.name, size] = plain_q_hat(values[:size], 0.2)
            actual = conformal_scores.q_hats(score, size).item()
            assert actual == pytest.approx(expected[score.name, size])
    assert len(set(expected.values())) == 4
    assert conformal_scores.q_hats().item() == pytest.approx(expected["thr", 45])


def test_groups_of_random_forgetting_share_one_q_hat():
    outputs = some_outputs(3)
    chosen = metrics.Settings((0.1, 0.2))
    groups = metrics.ConformalScores(outputs, chosen).groups(size=20)
    assert set(groups) == {"forget", "retain", "test"}
    true_label = scores.true_label_log_odds(*outputs.held_out)
    for draw in range(3):
        calibration = true_label[outputs.draws[draw, :20]]
        expected = [CR.conformal_quantile(calibration, alpha) for alpha in (0.1, 0.2)]
        assert all(item.q_hats[draw].tolist() == expected for item in groups.values())
        assert groups["test"].images[draw].tolist() == outputs.draws[draw, 45:].tolist()
    assert groups["forget"].images is None and groups["retain"].images is None


def test_groups_of_class_forgetting_have_two_q_hats():
    outputs = some_outputs(3, forgotten_class=3)
    groups = metrics.ConformalScores(outputs, metrics.Settings((0.3,))).groups(size=45)
    true_label, labels = scores.true_label_log_odds(*outputs.held_out), outputs.held_out.labels
    own_groups, retained_groups = ["forget", "forget_test"], ["retain", "test"]
    retained_groups += ["forget_by_retain", "forget_test_by_retain"]
    assert set(groups) == {*own_groups, *retained_groups}
    for draw in range(3):
        first, last = outputs.draws[draw, :45], outputs.draws[draw, 45:]
        for names, mask in ((own_groups, labels == 3), (retained_groups, labels != 3)):
            calibration = true_label[first[mask[first]]]
            expected = CR.finite_quantile(calibration, 0.3)
            for group in names:
                actual = groups[group].q_hats[draw].item()
                assert actual == pytest.approx(expected, rel=0, abs=0, nan_ok=True), group
        for group in ("forget_test", "forget_test_by_retain"):
            assert groups[group].images[draw].tolist() == last[labels[last] == 3].tolist()
        assert groups["test"].images[draw].tolist() == last[labels[last] != 3].tolist()


def test_class_q_hats_are_those_of_each_class_alone():
    outputs = some_outputs(2)
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.05, 0.3)))
    true_label, labels = scores.true_label_log_odds(*outputs.held_out), outputs.held_out.labels
    actual = conformal_scores.class_q_hats()
    assert actual.shape == (4, 2)
    for number in range(4):
        images = [image for image in range(45) if labels[image] == number]
        assert conformal_scores.class_calibration()[number].tolist() == images
        for column, alpha in enumerate((0.05, 0.3)):
            expected = plain_q_hat(true_label[images].tolist(), alpha)
            expected = math.nan if expected is None else expected
            assert actual[number, column].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", ["thr", "aps"])
def test_accuracy_and_coverage_of_images_equal_loops(name):
    outputs = some_outputs(1)
    score = scores.Score(name, seed=3)
    chosen = metrics.Settings((0.2, 0.1), (score, scores.Score("raps")))
    calibration = outputs.held_out.select(torch.arange(30))
    accuracy, coverage = conformal.accuracy_and_coverage(outputs.forget, calibration, chosen)
    q_hat = plain_q_hat(plain_log_odds(calibration, score, "held_out"), 0.2)
    numbers = plain_numbers(outputs.forget, range(40), q_hat, score, "forget")
    assert coverage == pytest.approx(numbers["coverage"])
    assert accuracy == pytest.approx(1 - numbers["misclassified"] / 40)
    few = conformal.accuracy_and_coverage(outputs.forget, calibration.select([0, 1, 2]), chosen)
    assert few[0] == accuracy and math.isnan(few[1])
