"""Metrics against numbers worked out by hand, and against the theory of split conformal prediction."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta

import metrics
from metrics import CR, MIACR, accuracy


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_scores_are_one_minus_the_probability():
    scores = CR.non_conformity_scores(logits_of([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    expected = torch.tensor([[0.3, 0.8, 0.9], [0.75, 0.75, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_each_image_is_scored_by_its_own_label():
    logits = logits_of([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    found = CR.true_label_scores(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([0.8, 0.4], dtype=torch.float64))


def test_scores_keep_the_order_of_very_confident_images():
    logits = torch.tensor([[40.0, 0.0], [50.0, 0.0], [60.0, 0.0]])  # in float32, 1 − p is 0 for all three
    scores = CR.true_label_scores(logits, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(scores.log(), torch.tensor([-40.0, -50.0, -60.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [(9, 0.1, 9), (9, 0.2, 8), (10, 0.1, 10), (19, 0.05, 19), (99, 0.01, 99), (199, 0.05, 190), (2000, 0.05, 1901)],
)
def test_q_hat_is_the_kth_smallest_score(n, alpha, k):
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    scores = torch.arange(1, n + 1, dtype=torch.float64)[order] / n
    assert CR.conformal_quantile(scores, alpha) == k / n


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (8, 0.1), (18, 0.05), (98, 0.01)])
def test_too_few_scores_give_an_infinite_q_hat_and_full_sets(n, alpha):
    q_hat = CR.conformal_quantile(torch.rand(n, dtype=torch.float64), alpha)
    assert q_hat == math.inf
    sets = CR.prediction_sets(CR.non_conformity_scores(torch.randn(5, 4)), q_hat)
    assert CR.set_size(sets) == 4 and CR.coverage(sets, torch.arange(4).repeat(2)[:5]) == 1


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_alpha_outside_the_open_interval_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        CR.conformal_quantile(torch.rand(10), alpha)


def test_sets_coverage_size_and_ratio_by_hand():
    logits = logits_of([[0.70, 0.20, 0.10], [0.45, 0.40, 0.15], [0.25, 0.25, 0.50], [0.90, 0.05, 0.05]])
    labels = torch.tensor([0, 1, 0, 2])
    sets = CR.prediction_sets(CR.non_conformity_scores(logits), 0.75)  # p ≥ 0.25, and a tie counts as inside
    assert sets.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert CR.coverage(sets, labels) == 3 / 4
    assert CR.set_size(sets) == 7 / 4
    assert CR.conformal_ratio(sets, labels) == pytest.approx(3 / 7)
    # Images 1, 2 and 3 are misclassified; the labels of 1 and 2 are in their sets.
    assert CR.fake_forgetting(logits, sets, labels) == (3, 2)
    assert CR.fake_forgetting(logits, sets, labels).ratio == pytest.approx(2 / 3)


def test_empty_sets():
    sets = CR.prediction_sets(CR.non_conformity_scores(torch.zeros(3, 4)), 0.1)
    labels = torch.zeros(3, dtype=torch.int64)
    assert (CR.coverage(sets, labels), CR.set_size(sets), CR.conformal_ratio(sets, labels)) == (0, 0, 0)
    assert math.isnan(CR.fake_forgetting(torch.zeros(3, 4), sets, labels).ratio)  # argmax of a tie is label 0


def test_tied_scores_are_all_inside():
    scores = torch.tensor([0.2, 0.5, 0.5, 0.5, 0.9], dtype=torch.float64)
    q_hat = CR.conformal_quantile(scores, 0.5)  # k = 3
    assert q_hat == 0.5 and (scores <= q_hat).sum() == 4


def test_coverage_over_random_splits_follows_the_theory():
    """Coverage given the calibration set is Beta(k, n+1−k): its mean over many splits is k/(n+1)."""
    rng, n, tested, alpha, trials = np.random.default_rng(1), 50, 200, 0.1, 2000
    k = math.ceil((n + 1) * (1 - alpha))
    covered = []
    for _ in range(trials):
        scores = torch.from_numpy(rng.standard_normal(n + tested))
        covered.append((scores[n:] <= CR.conformal_quantile(scores[:n], alpha)).double().mean().item())
    law = beta(k, n + 1 - k)
    variance = law.var() + law.expect(lambda c: c * (1 - c)) / tested
    error = math.sqrt(variance / trials)
    assert 1 - alpha <= k / (n + 1)
    assert abs(np.mean(covered) - k / (n + 1)) < 4 * error
    assert np.var(covered) == pytest.approx(variance, rel=0.15)


def test_sets_grow_as_alpha_falls():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 10, generator=generator), torch.randint(10, (500,), generator=generator)
    scores = CR.non_conformity_scores(logits)
    alphas = [0.4, 0.2, 0.1, 0.05, 0.01]
    sets = [CR.prediction_sets(scores, CR.conformal_quantile(CR.true_label_scores(logits, labels), a)) for a in alphas]
    assert all((small <= large).all() for small, large in zip(sets, sets[1:], strict=False))


def test_accuracies_by_hand():
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])
    assert accuracy.accuracy(logits, labels) == pytest.approx(2 / 3)
    assert accuracy.unlearning_accuracy(logits, labels) == pytest.approx(1 / 3)


def test_membership_attack_on_separable_confidences():
    """Members above 0.9, non-members below 0.5: the SVM separates them, and the targets' share is known."""
    generator = torch.Generator().manual_seed(0)
    members = 0.9 + 0.1 * torch.rand(200, dtype=torch.float64, generator=generator)
    non_members = 0.5 * torch.rand(200, dtype=torch.float64, generator=generator)
    attack = MIACR.fit_attack(members[:100], non_members[:100])
    targets = torch.tensor([0.95, 0.97, 0.2, 0.3, 0.1], dtype=torch.float64)
    assert MIACR.mia_efficacy(attack, targets) == 3 / 5
    held_out = [MIACR.membership_scores(attack, part[100:]) for part in (members, non_members)]
    assert MIACR.miacr(MIACR.membership_scores(attack, targets), *held_out, 0.05) == 3 / 5


def test_miacr_counts_sets_that_are_exactly_non_member():
    # Scores (non-member, member). Calibration: true scores .1 .2 .3 .4, so q̂ at α = 0.4 is the 3rd smallest, 0.3.
    members = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    non_members = torch.tensor([[0.3, 0.7], [0.4, 0.6]], dtype=torch.float64)
    targets = torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.35, 0.65], [0.9, 0.1]], dtype=torch.float64)
    assert MIACR.miacr(targets, members, non_members, 0.4) == 2 / 4  # {non}, {non}, {}, {member}
    assert MIACR.miacr(targets, members, non_members, 0.1) == 0  # q̂ = ∞: every set is {non, member}


def test_attack_refuses_unequal_or_too_few_images():
    with pytest.raises(ValueError, match="equally many"):
        MIACR.fit_attack(torch.rand(10), torch.rand(9))
    with pytest.raises(ValueError, match="at least 5"):
        MIACR.fit_attack(torch.rand(3), torch.rand(3))


def random_outputs(generator, forget_class=None):
    def output(n, wanted=lambda labels: torch.ones(len(labels), dtype=torch.bool)):
        labels = torch.randint(4, (n,), generator=generator)
        logits = torch.randn(n, 4, generator=generator)
        logits[torch.arange(n), labels] += 2
        keep = wanted(labels)
        return metrics.Output(logits[keep], labels[keep])

    if forget_class is None:
        return metrics.Outputs(output(60), output(300), output(200), {50: output(50), 100: output(100)})

    def of_class(labels):
        return labels == forget_class

    def others(labels):
        return labels != forget_class

    return metrics.Outputs(
        output(200, of_class), output(300, others), output(200, others), {100: output(100, others)},
        output(200, of_class), {100: output(100, of_class)},
    )  # fmt: skip


def test_the_attack_is_judged_on_the_forget_images_alone():
    """Confident retain and calibration members, unconfident rest: with the forget images unconfident, MIA is 1."""
    generator = torch.Generator().manual_seed(0)

    def output(n, margin):
        logits = torch.randn(n, 4, generator=generator)
        logits[:, 0] += margin
        return metrics.Output(logits, torch.zeros(n, dtype=torch.int64))

    outputs = metrics.Outputs(output(30, 0), output(300, 12), output(200, 0), {50: output(50, 0)})
    assert MIACR.report(outputs, [0.2])[0]["MIA"] == 1
    outputs.forget = output(30, 12)
    assert MIACR.report(outputs, [0.2])[0]["MIA"] == 0


def test_report_is_pure_and_complete():
    outputs = random_outputs(torch.Generator().manual_seed(0))
    scalars, rows = metrics.evaluate(outputs, [0.1, 0.2])
    assert (scalars, rows) == metrics.evaluate(outputs, [0.1, 0.2])
    assert set(rows) == {(50, 0.1), (50, 0.2), (100, 0.1), (100, 0.2)}
    q_hat = CR.conformal_quantile(CR.true_label_scores(*outputs.calibration[50]), 0.2)
    sets = CR.prediction_sets(CR.non_conformity_scores(outputs.forget.logits), q_hat)
    assert rows[50, 0.2]["q_hat"] == q_hat
    assert rows[50, 0.2]["forget_coverage"] == CR.coverage(sets, outputs.forget.labels)
    assert {"UA", "RA", "TA", "MIA"} <= set(scalars) and all("MIACR" in row for row in rows.values())


def test_class_forgetting_reports_both_calibrations():
    outputs = random_outputs(torch.Generator().manual_seed(0), forget_class=2)
    scalars, rows = metrics.evaluate(outputs, [0.1])
    row = rows[100, 0.1]
    own = CR.conformal_quantile(CR.true_label_scores(*outputs.forget_calibration[100]), 0.1)
    retained = CR.conformal_quantile(CR.true_label_scores(*outputs.calibration[100]), 0.1)
    scores = CR.non_conformity_scores(outputs.forget.logits)
    assert (row["q_hat_forget"], row["q_hat"]) == (own, retained)
    assert row["forget_set_size"] == CR.set_size(CR.prediction_sets(scores, own))
    assert row["forget_by_retain_set_size"] == CR.set_size(CR.prediction_sets(scores, retained))
    assert row["forget_test_coverage"] >= 0 and "UA_test" in scalars
