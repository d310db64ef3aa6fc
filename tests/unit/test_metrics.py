"""Metrics against numbers worked out by hand, the theory of split conformal prediction, MAPIE,
torchcp and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

import metrics
from metrics import (
    CR,
    MIA,
    MIACR,
    accuracy,
    attack,
    classwise,
    comparison,
    conformal,
    probe,
    samples,
    scores,
)


def report(module, outputs, settings):
    """The report of a metric's module: (scalars, rows)."""
    return module.report(outputs, metrics.ConformalScores(outputs, settings), settings)


def evaluate(outputs, settings):
    return metrics.evaluate(metrics.ConformalScores(outputs, settings))


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def plain(log_odds):
    return scores.from_log_odds(log_odds).flatten().tolist()


# ---------------------------------------------------------------- scores


def test_thr_scores_are_one_minus_the_probability():
    actual = scores.thr(logits_of([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    expected = torch.tensor([[0.3, 0.8, 0.9], [0.75, 0.75, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(actual, expected)


def test_true_label_scores_are_those_of_each_true_label():
    logits = logits_of([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    actual = scores.true_label_scores(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(actual, torch.tensor([0.8, 0.4], dtype=torch.float64))


def test_scores_of_very_confident_images_keep_their_order():
    # In float32, 1 − p is 0 for all three.
    logits = torch.tensor([[40.0, 0.0], [50.0, 0.0], [60.0, 0.0]])
    actual = scores.true_label_scores(logits, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(
        actual.log(), torch.tensor([-40.0, -50.0, -60.0], dtype=torch.float64)
    )


def test_adaptive_scores_by_hand():
    logits, u = logits_of([[0.2, 0.5, 0.3], [0.9, 0.04, 0.06]]), torch.tensor([0.4, 1.0]).double()
    # First image: ranks 1, 2, 3 are labels 1, 2, 0.
    expected = [[0.8 + 0.4 * 0.2, 0.4 * 0.5, 0.5 + 0.4 * 0.3], [0.9, 1.0, 0.96]]
    assert plain(scores.aps_log_odds(logits, u)) == pytest.approx(sum(expected, []))
    penalties = [[0.2, 0.0, 0.1], [0.0, 0.2, 0.1]]  # 0.1 for each rank beyond the first
    assert plain(scores.raps_log_odds(logits, u, 0.1, 1)) == pytest.approx(
        [
            score + penalty
            for score, penalty in zip(sum(expected, []), sum(penalties, []), strict=True)
        ]
    )
    # p_max + (rank − 2 + u) · weight, and u · p_max for the top label
    expected = [[0.5 + 1.4 * 0.2, 0.4 * 0.5, 0.5 + 0.4 * 0.2], [0.9, 0.9 + 2 * 0.2, 0.9 + 1 * 0.2]]
    assert plain(scores.saps_log_odds(logits, u, 0.2)) == pytest.approx(sum(expected, []))


def test_randomised_scores_depend_on_seed_and_image_set():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    for name in ("aps", "raps", "saps"):
        first = scores.Score(name, seed=1)
        again = scores.Score(name, seed=1)
        other = scores.Score(name, seed=2)
        assert torch.equal(first(logits), again(logits))
        assert not torch.equal(first(logits), other(logits))
        assert not torch.equal(first(logits, "forget"), first(logits, "held_out"))
        assert torch.equal(
            scores.Score(name, False, seed=1)(logits), scores.Score(name, False, seed=2)(logits)
        )


# ---------------------------------------------------------------- sets


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [
        (9, 0.1, 9),
        (9, 0.2, 8),
        (10, 0.1, 10),
        (19, 0.05, 19),
        (99, 0.01, 99),
        (199, 0.05, 190),
        (2000, 0.05, 1901),
    ],
)
def test_q_hat_is_the_kth_smallest_score(n, alpha, k):
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    assert (
        CR.conformal_quantile(torch.arange(1, n + 1, dtype=torch.float64)[order] / n, alpha)
        == k / n
    )


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (8, 0.1), (18, 0.05), (98, 0.01)])
def test_too_few_scores_give_an_infinite_q_hat_and_full_sets(n, alpha):
    q_hat = CR.conformal_quantile(torch.rand(n, dtype=torch.float64), alpha)
    assert q_hat == math.inf
    sets = CR.prediction_sets(scores.thr(torch.randn(5, 4)), q_hat)
    assert sets.all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_alpha_outside_the_open_interval_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        CR.conformal_quantile(torch.rand(10), alpha)


def test_sets_coverage_size_and_ratio_by_hand():
    logits = logits_of(
        [[0.70, 0.20, 0.10], [0.45, 0.40, 0.15], [0.25, 0.25, 0.50], [0.90, 0.05, 0.05]]
    )
    labels = torch.tensor([0, 1, 0, 2])
    sets = CR.prediction_sets(scores.thr(logits), 0.75)  # p ≥ 0.25, and a tie counts as inside
    assert sets.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    inside, sizes = CR.in_set(sets, labels), sets.sum(dim=1)
    assert CR.coverage(inside) == 3 / 4
    assert CR.set_size(sizes) == 7 / 4
    assert CR.conformal_ratio(inside, sizes).item() == pytest.approx(3 / 7)
    # Images 1, 2 and 3 are misclassified; the labels of 1 and 2 are in their sets.
    wrong = logits.argmax(dim=1) != labels
    assert wrong.sum() == 3 and CR.fake_forgetting(inside, wrong) == 2
    assert CR.efficient_coverage(inside, sizes, 1) == 1 / 4
    assert CR.efficient_coverage(inside, sizes, 2) == 2 / 4
    assert CR.efficient_miscoverage(inside, sizes, 0) == 0
    assert CR.efficient_miscoverage(inside, sizes, 1) == 1 / 4
    thresholds = [math.log(3), 50.0, math.nan]  # log-odds of 0.75 and of almost 1; no finite q̂
    actual = CR.describe(
        conformal.score_images(metrics.Output(logits, labels), scores.Score(), ""), thresholds, [1]
    )
    assert actual.pop("misclassified").tolist() == [3, 3, 3]
    assert all(math.isnan(values[2]) for values in actual.values())
    actual = {key: values[:2] for key, values in actual.items()}
    assert actual["coverage"].tolist() == [3 / 4, 1] and actual["set_size"].tolist() == [7 / 4, 3]
    assert actual["fake"].tolist() == [2, 3]
    assert actual["fake_ratio"].tolist() == pytest.approx([2 / 3, 1])
    assert actual["wrong_set_size"].tolist() == [2, 3]
    assert actual["wrong_CR"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert actual["ECF@1"].tolist() == [1 / 4, 0] and actual["EuCF@1"].tolist() == [1 / 4, 0]


def test_coverage_and_sizes_from_thresholds_equal_those_of_the_sets():
    generator = torch.Generator().manual_seed(0)
    output = metrics.Output(
        torch.randn(300, 7, generator=generator), torch.randint(7, (300,), generator=generator)
    )
    for name in scores.NAMES:
        score = scores.Score(name, seed=3)
        image_scores = conformal.score_images(output, score, "test")
        ties = image_scores.true_label[:20]
        q_hats = torch.cat([ties, torch.tensor([0.0, math.inf])])
        inside, sizes = image_scores.in_set(q_hats), image_scores.set_sizes(q_hats)
        for number, q_hat in enumerate(q_hats):
            sets = CR.prediction_sets(score.log_odds(output.logits, "test"), q_hat)
            assert torch.equal(inside[number], CR.in_set(sets, output.labels))
            assert torch.equal(sizes[number], sets.sum(dim=1))


def test_error_of_CR_equals_spread_over_many_samples():
    rng = np.random.default_rng(0)
    inside = torch.from_numpy(rng.random((4000, 200)) < 0.8)
    sizes = torch.from_numpy(rng.integers(1, 4, (4000, 200)))
    spread = CR.conformal_ratio(inside, sizes).std()
    assert CR.ratio_error(inside, sizes).mean().item() == pytest.approx(spread.item(), rel=0.05)


def test_empty_sets_have_zero_coverage_size_and_CR():
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    actual = CR.describe(
        conformal.score_images(metrics.Output(logits, labels), scores.Score(), ""), [-2.0]
    )
    assert [actual[key].item() for key in ("coverage", "set_size", "CR", "CR_error")] == [
        0,
        0,
        0,
        0,
    ]
    assert math.isnan(actual["fake_ratio"].item())  # argmax of a tie is label 0: none is wrong


def test_tied_scores_are_all_inside():
    tied = torch.tensor([0.2, 0.5, 0.5, 0.5, 0.9], dtype=torch.float64)
    q_hat = CR.conformal_quantile(tied, 0.5)  # k = 3
    assert q_hat == 0.5 and (tied <= q_hat).sum() == 4


def test_coverage_over_random_splits_follows_the_theory():
    """Coverage given the calibration set is Beta(k, n+1−k), with the mean k/(n+1)."""
    rng, n, tested, alpha, trials = np.random.default_rng(1), 50, 200, 0.1, 2000
    k = math.ceil((n + 1) * (1 - alpha))
    covered = []
    for _ in range(trials):
        drawn = torch.from_numpy(rng.standard_normal(n + tested))
        covered.append(
            (drawn[n:] <= CR.conformal_quantile(drawn[:n], alpha)).double().mean().item()
        )
    law = beta(k, n + 1 - k)
    variance = law.var() + law.expect(lambda c: c * (1 - c)) / tested
    error = math.sqrt(variance / trials)
    assert 1 - alpha <= k / (n + 1)
    assert abs(np.mean(covered) - k / (n + 1)) < 4 * error
    assert np.var(covered) == pytest.approx(variance, rel=0.15)


def test_sets_grow_as_alpha_falls():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator)
    labels = torch.randint(10, (500,), generator=generator)
    alphas = [0.4, 0.2, 0.1, 0.05, 0.01]
    for name in scores.NAMES:
        actual = scores.Score(name)(logits)
        label_scores = actual.gather(1, labels[:, None]).squeeze(1)
        sets = [
            CR.prediction_sets(actual, CR.conformal_quantile(label_scores, alpha))
            for alpha in alphas
        ]
        assert all((small <= large).all() for small, large in zip(sets, sets[1:], strict=False))


def test_accuracies_by_hand():
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])
    assert accuracy.accuracy(logits, labels) == pytest.approx(2 / 3)
    assert accuracy.unlearning_accuracy(logits, labels) == pytest.approx(1 / 3)


# ---------------------------------------------------------------- membership


def column(values):
    return np.asarray(values, dtype=np.float64)[:, None]


def test_membership_attack_on_separable_confidences():
    """The SVM separates members above 0.9 from non-members below 0.5."""
    rng = np.random.default_rng(0)
    members, non_members = 0.9 + 0.1 * rng.random(200), 0.5 * rng.random(200)
    targets = np.array([0.95, 0.97, 0.2, 0.3, 0.1])
    membership = attack.Attack(column(members[:100]), column(non_members[:100]))
    assert membership.says_member(column(targets)).tolist() == [True, True, False, False, False]
    points = np.concatenate([targets, members[100:], non_members[100:]])
    actual = attack.membership_probabilities(members[:100], non_members[:100], points)
    split = torch.from_numpy(actual).split([5, 100, 100])
    scored = [MIACR.membership_scores(probabilities) for probabilities in split]
    assert MIACR.miacr(*scored, 0.05) == 3 / 5


CONFIDENCES = {
    "one is surer": lambda rng, n: (rng.beta(5, 1, n), rng.beta(2, 1, n), rng.beta(3, 1, 3000)),
    "nearly certain": lambda rng, n: tuple(
        1 - 10 ** -rng.exponential(s, m) for s, m in ((5, n), (2, n), (3, 3000))
    ),
    "no difference": lambda rng, n: (rng.beta(5, 1, n), rng.beta(5, 1, n), rng.beta(5, 1, 3000)),
    "few": lambda rng, n: (rng.beta(5, 1, 40), rng.beta(2, 1, 40), rng.beta(3, 1, 3000)),
}


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_attack_decides_like_scikit_learn(kind):
    members, non_members, targets = (
        column(confidences) for confidences in CONFIDENCES[kind](np.random.default_rng(1), 1000)
    )
    points = np.concatenate([members, non_members])
    membership = np.repeat([1, 0], [len(members), len(non_members)])
    expected = SVC(C=3, gamma="auto", tol=1e-6).fit(points, membership).predict(targets)
    assert np.mean(attack.Attack(members, non_members).says_member(targets) == expected) >= 0.999


def test_attack_on_several_features_decides_like_scikit_learn():
    rng = np.random.default_rng(2)
    members, non_members, targets = (rng.dirichlet(np.full(10, a), 1000) for a in (0.1, 0.14, 0.12))
    points, membership = np.concatenate([members, non_members]), np.repeat([1, 0], 1000)
    expected = SVC(C=3, gamma="auto", tol=1e-6).fit(points, membership).predict(targets)
    assert np.mean(attack.Attack(members, non_members).says_member(targets) == expected) >= 0.999


@pytest.mark.parametrize("b", [2, 3])
def test_attack_probabilities_equal_those_of_scikit_learn(b):
    rng = np.random.default_rng(3)
    members, non_members, targets = rng.beta(5, 1, 500), rng.beta(b, 1, 500), rng.beta(3, 1, 1000)
    actual = attack.membership_probabilities(members, non_members, targets)
    # Unshuffled folds of scikit-learn are blocks of each class, as here.
    model = CalibratedClassifierCV(SVC(C=3, gamma="auto", tol=1e-6), ensemble=False)
    model.fit(column(np.concatenate([members, non_members])), np.repeat([1, 0], 500))
    expected = model.predict_proba(column(targets))[:, 1]
    assert np.abs(actual - expected).max() < 4e-3


def test_entropies_by_hand():
    logits, labels = logits_of([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), torch.tensor([0, 1])
    expected = [0.5 * math.log(2) + 0.5 * math.log(4), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    assert MIA.entropy(logits).tolist() == pytest.approx(expected)
    # −(1 − p_y) log p_y − Σ p_i log(1 − p_i), each image with its own label.
    expected = [
        0.5 * math.log(2) - 2 * 0.25 * math.log(0.75),
        -0.9 * math.log(0.1) - 0.8 * math.log(0.2) - 0.1 * math.log(0.9),
    ]
    assert MIA.modified_entropy(logits, labels).tolist() == pytest.approx(expected)
    sure = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    assert MIA.modified_entropy(sure, torch.tensor([0, 1])).tolist() == pytest.approx(
        [0, 400], abs=1e-6
    )


def test_ranking_attack_by_hand():
    # Scores 1 − p: members .1 .2 .6, non-members .3 .5 .7 .9: of 12 pairs 10 are in order.
    members = torch.tensor([0.1, 0.2, 0.6]).double()
    non_members = torch.tensor([0.3, 0.5, 0.7, 0.9]).double()
    area, rates = MIA.ranking_attack(members, non_members)
    assert area == pytest.approx(10 / 12) and rates == pytest.approx([2 / 3, 2 / 3])
    sure = torch.tensor([1e-30, 1e-25]).double()  # p rounds to 1 for both: the order is still known
    assert MIA.ranking_attack(sure[:1], sure[1:])[0] == 1


def test_miacr_counts_sets_that_are_exactly_non_member():
    # Scores (non-member, member). True scores of the calibration images are .1 .2 .3 .4.
    # q̂ at α = 0.4 is the 3rd smallest, 0.3.
    members = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    non_members = torch.tensor([[0.3, 0.7], [0.4, 0.6]], dtype=torch.float64)
    targets = torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.35, 0.65], [0.9, 0.1]], dtype=torch.float64)
    assert MIACR.miacr(targets, members, non_members, 0.4) == 2 / 4  # {non}, {non}, {}, {member}
    # q̂ = ∞: every set is {non-member, member}.
    assert math.isnan(MIACR.miacr(targets, members, non_members, 0.1))


# ---------------------------------------------------------------- whole reports


def random_outputs(generator, forget_class=None, num_draws=1, cal_sizes=(50, 100)):
    def output(n, wanted=lambda labels: torch.ones(len(labels), dtype=torch.bool)):
        labels = torch.randint(4, (n,), generator=generator)
        logits = torch.randn(n, 4, generator=generator)
        logits[torch.arange(n), labels] += 2
        keep = wanted(labels)
        return metrics.Output(logits[keep], labels[keep])

    held_out = output(300)
    draws = metrics.draw_splits(300, num_draws, seed=1)
    if forget_class is None:
        return metrics.Outputs(output(60), output(300), held_out, list(cal_sizes), draws)
    forget = output(200, lambda labels: labels == forget_class)
    retain = output(300, lambda labels: labels != forget_class)
    return metrics.Outputs(
        forget, retain, held_out, list(cal_sizes), draws, held_out.labels == forget_class
    )


def settings(*alphas, **values):
    return metrics.Settings(alphas, **values)


def test_attack_is_evaluated_on_forget_images_only():
    """Retain images are confident and all others are not. MIA is 1 if forget images are not."""
    generator = torch.Generator().manual_seed(0)

    def output(n, margin):
        logits = torch.randn(n, 4, generator=generator)
        logits[:, 0] += margin
        return metrics.Output(logits, torch.zeros(n, dtype=torch.int64))

    outputs = metrics.Outputs(
        output(30, 0), output(300, 12), output(250, 0), [50], metrics.draw_splits(250, 1)
    )
    actual = report(MIA, outputs, settings(0.2))[0]
    assert actual["MIA"] == 1
    assert actual["MIA_privacy"] > 0.95
    assert actual["AUC"] == pytest.approx(0.5, abs=0.15)
    outputs.forget = output(30, 12)
    actual = report(MIA, outputs, settings(0.2))[0]
    assert actual["MIA"] == 0 and actual["AUC"] > 0.95 and actual["TPR@1%"] > 0.9
    confidence = torch.cat(
        [
            MIA.confidences(*outputs.forget),
            MIA.confidences(*outputs.held_out.select(outputs.test())),
        ]
    )
    expected = roc_auc_score([1] * 30 + [0] * 200, confidence)
    assert actual["AUC"] == pytest.approx(expected, abs=1e-3)


def test_report_is_reproducible_and_complete():
    outputs = random_outputs(torch.Generator().manual_seed(0))
    chosen = settings(0.1, 0.2, scores=tuple(scores.Score(name) for name in ("thr", "aps")))
    scalars, rows = evaluate(outputs, chosen)
    assert (scalars, rows) == evaluate(outputs, chosen)
    assert set(rows) == {
        (name, size, alpha) for name in ("thr", "aps") for size in (50, 100) for alpha in (0.1, 0.2)
    }
    calibration = outputs.held_out.select(torch.arange(50))
    q_hat = CR.conformal_quantile(scores.true_label_scores(*calibration), 0.2)
    sets = CR.prediction_sets(scores.thr(outputs.forget.logits), q_hat)
    row = rows["thr", 50, 0.2]
    assert row["q_hat"] == q_hat
    assert row["forget_coverage"] == CR.coverage(CR.in_set(sets, outputs.forget.labels))
    test = outputs.held_out.select(torch.arange(100, 300))  # images outside every calibration set
    sets = CR.prediction_sets(scores.thr(test.logits), q_hat)
    assert row["test_coverage"] == CR.coverage(CR.in_set(sets, test.labels))
    assert {"UA", "RA", "TA", "MIA", "AUC"} <= set(scalars)
    assert all("MIACR" in row for row in rows.values())
    assert row != rows["aps", 50, 0.2] and row["MIACR"] == rows["aps", 50, 0.2]["MIACR"]


def test_resplits_give_the_mean_and_spread_over_draws():
    outputs = random_outputs(torch.Generator().manual_seed(0), num_draws=30, cal_sizes=(100,))
    assert outputs.draws[0].tolist() == list(range(300))
    assert len({tuple(draw.tolist()) for draw in outputs.draws}) == 30
    scalars, rows = evaluate(outputs, settings(0.1))
    row = rows["thr", 100, 0.1]
    label_scores = scores.true_label_scores(*outputs.held_out)
    actual = {"test": [], "forget": [], "q_hat": []}
    for draw in outputs.draws:
        q_hat = CR.conformal_quantile(label_scores[draw[:100]], 0.1)
        actual["q_hat"].append(q_hat)
        actual["test"].append((label_scores[draw[100:]] <= q_hat).double().mean().item())
        actual["forget"].append(
            (scores.true_label_scores(*outputs.forget) <= q_hat).double().mean().item()
        )
    assert row["q_hat"].mean == pytest.approx(np.mean(actual["q_hat"]))
    for image_set in ("test", "forget"):
        assert row[f"{image_set}_coverage"].mean == pytest.approx(np.mean(actual[image_set]))
        assert row[f"{image_set}_coverage"].std == pytest.approx(np.std(actual[image_set], ddof=1))
    law = CR.coverage_law(100, 200, 0.1)
    assert row["theory_coverage"].mean == pytest.approx(law.mean() / 200)
    assert row["theory_coverage"].mean == pytest.approx(91 / 101)
    assert row["theory_coverage"].std == pytest.approx(law.std() / 200)
    assert not row["coverage_outside"]
    assert 0 < row["MIACR"].std < 0.5 and isinstance(row["forget_misclassified"], int)
    item = evaluate(random_outputs(torch.Generator().manual_seed(0)), settings(0.1))
    assert item[0] == scalars
    spreads = [key for key, value in item[1]["thr", 100, 0.1].items() if isinstance(value, tuple)]
    assert spreads == ["theory_coverage"]


@pytest.mark.parametrize("forget_class", [None, 2])
def test_coverage_over_500_random_splits_has_mean_and_spread_of_theory(forget_class):
    outputs = random_outputs(
        torch.Generator().manual_seed(1), forget_class, num_draws=500, cal_sizes=(100,)
    )
    row = report(CR, outputs, settings(0.1))[1]["thr", 100, 0.1]
    measured, theory = row["test_coverage"], row["theory_coverage"]
    assert abs(measured.mean - theory.mean) < 4 * theory.std / math.sqrt(500)
    assert not row["coverage_outside"]
    assert measured.std == pytest.approx(theory.std, rel=0.1)


@pytest.mark.parametrize("num_draws", [1, 50])
def test_coverage_outside_the_theory_is_reported(num_draws):
    """A constant model ties all scores: either all sets contain the label or none does."""
    outputs = random_outputs(torch.Generator().manual_seed(0), num_draws=num_draws)
    outputs.held_out.logits[:] = 0
    assert report(CR, outputs, settings(0.1))[1]["thr", 100, 0.1]["coverage_outside"]


def test_class_forgetting_reports_both_calibrations():
    outputs = random_outputs(torch.Generator().manual_seed(0), forget_class=2)
    scalars, rows = evaluate(outputs, settings(0.1))
    row = rows["thr", 100, 0.1]
    first, labels = torch.arange(100), outputs.held_out.labels[:100]
    label_scores, retained = (
        CR.conformal_quantile(scores.true_label_scores(*outputs.held_out.select(first[mask])), 0.1)
        for mask in (labels == 2, labels != 2)
    )
    assert (row["q_hat_forget"], row["q_hat"]) == (label_scores, retained)
    actual = scores.thr(outputs.forget.logits)
    assert row["forget_set_size"] == CR.set_size(
        CR.prediction_sets(actual, label_scores).sum(dim=1)
    )
    assert row["forget_by_retain_set_size"] == CR.set_size(
        CR.prediction_sets(actual, retained).sum(dim=1)
    )
    assert row["forget_test_coverage"] >= 0 and "UA_test" in scalars
    assert (outputs.held_out.labels[outputs.test()] != 2).all()
    assert (outputs.held_out.labels[outputs.forget_test()] == 2).all()


def test_class_rows_have_coverage_under_common_and_class_calibration():
    outputs = random_outputs(torch.Generator().manual_seed(0), cal_sizes=(200,))
    rows = classwise.class_rows(metrics.ConformalScores(outputs, settings(0.1)), [*"abcd"])
    assert [row["class"] for row in rows] == ["a", "b", "c", "d"]
    label_scores, labels = scores.true_label_scores(*outputs.held_out), outputs.held_out.labels
    for number, row in enumerate(rows):
        mine = torch.arange(300)[labels == number]
        expected = CR.conformal_quantile(label_scores[mine[mine < 200]], 0.1)
        tested = label_scores[mine[mine >= 200]]
        assert row["own_q_hat"] == expected and row["test_images"] == len(tested)
        assert row["own_test_coverage"] == (tested <= expected).double().mean()
        assert row["test_coverage"] == (tested <= row["q_hat"]).double().mean()
    assert sum(row["forget_images"] for row in rows) == 60
    assert sum(row["test_images"] * row["test_coverage"] for row in rows) / 100 == pytest.approx(
        report(CR, outputs, settings(0.1))[1]["thr", 200, 0.1]["test_coverage"]
    )


def test_sample_rows_add_up_to_the_metrics():
    outputs = random_outputs(torch.Generator().manual_seed(0), num_draws=20)
    indices = torch.arange(1000, 1060)
    conformal_scores = metrics.ConformalScores(outputs, settings(0.1))
    rows = samples.sample_rows(conformal_scores, indices, [f"{i}.png" for i in range(60)])
    assert [row["index"] for row in rows] == indices.tolist() and rows[3]["file"] == "3.png"
    alone = random_outputs(torch.Generator().manual_seed(0))
    row = report(CR, alone, settings(0.1))[1]["thr", 100, 0.1]
    assert np.mean([item["in_set@0.1"] for item in rows]) == row["forget_coverage"]
    assert np.mean([item["set_size@0.1"] for item in rows]) == row["forget_set_size"]
    assert sum(item["fake@0.1"] for item in rows) == row["forget_fake"]
    assert sum(item["label"] != item["prediction"] for item in rows) == row["forget_misclassified"]
    every = report(CR, outputs, settings(0.1))[1]["thr", 100, 0.1]
    assert np.mean([item["in_set_share@0.1"] for item in rows]) == pytest.approx(
        every["forget_coverage"].mean
    )
    fake = samples.most_fake(conformal_scores, 3)
    assert 0 < len(fake) <= 3
    for place, prediction, inside in fake:
        assert rows[place]["fake@0.1"] and rows[place]["prediction"] == prediction == inside[0]
        assert len(inside) == rows[place]["set_size@0.1"] and rows[place]["label"] in inside


def test_linear_probe_on_separable_features_detects_the_class():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = rng.standard_normal((600, 5)) + 8 * np.eye(5)[labels]
    mixed = np.where((labels == 2)[:, None], rng.standard_normal((600, 5)), features)
    mixed[labels == 1] -= 8 * np.eye(5)[1]  # classes 1 and 2 are now identical
    masks = {"probe_forget": labels > 0, "probe_retain": labels == 0}
    # Between two identical classes, chance is one half.
    for seen, expected in ((features, 1.0), (mixed, 0.5)):
        tests = {key: (seen[mask], labels[mask]) for key, mask in masks.items()}
        actual = probe.linear_probe(seen, labels, tests)
        assert actual["probe_forget"] == pytest.approx(expected, abs=0.1)
        assert actual["probe_retain"] > 0.95


def test_comparison_with_retrain_by_hand():
    reference = {"UA": 0.30, "RA": 1.0, "TA": 0.70, "MIA": 0.40, "q": math.inf, "word": "x"}
    actual = {"UA": 0.10, "RA": 1.0, "TA": 0.72, "MIA": 0.36, "q": 1.0, "word": "y"}
    assert comparison.gap(actual, reference) == pytest.approx((0.2 + 0 + 0.02 + 0.04) / 4)
    signed = comparison.differences(actual, reference)
    assert signed == {
        f"{key}_minus_retrain": pytest.approx(actual[key] - reference[key])
        for key in ("UA", "RA", "TA", "MIA")
    }
    tolerance = comparison.share_tolerance(0.2, 0.4, 500)
    assert tolerance == pytest.approx(2 * math.sqrt(2 * 0.3 * 0.7 / 500))
    words = [comparison.verdict(difference, tolerance) for difference in (-0.2, 0.01, 0.2)]
    assert words == ["under-forgets", "matches", "over-forgets"]
    assert comparison.share_tolerance(0.0, 0.0, 80) == 1 / 80
    assert comparison.share_tolerance(3 / 80, 0.0, 80) > 3 / 80  # no image wrong under Retrain
    assert comparison.share_tolerance(4 / 80, 0.0, 80) < 4 / 80


# ---------------------------------------------------------------- other implementations


def conformal_data():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(2 * rng.standard_normal((600, 8)))
    probabilities = torch.softmax(logits, dim=1).numpy()
    return (
        logits,
        torch.from_numpy(np.array([rng.choice(8, p=p) for p in probabilities])),
        probabilities,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["thr", "aps", "raps"])
def test_q_hat_and_sets_equal_those_of_mapie(name):
    """Compared image by image with equal random numbers (MAPIE uses 1 − u for our u).

    MAPIE chooses the parameters of raps from calibration images. Our score uses these parameters.
    """
    from mapie.classification import SplitConformalClassifier

    logits, labels, probabilities = conformal_data()

    class Answers(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(8)

        def fit(self, images, labels):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def predict_proba(self, images):
            return probabilities[images[:, 0]]

        def predict(self, images):
            return self.predict_proba(images).argmax(axis=1)

    images, kind = np.arange(600)[:, None], {"thr": "lac"}.get(name, name)
    other = SplitConformalClassifier(Answers(), 0.9, conformity_score=kind, random_state=7)
    other.conformalize(images[:300], labels[:300].numpy())
    options = (
        {} if name == "thr" else {"conformity_score_params": {"include_last_label": "randomized"}}
    )
    expected = other.predict_set(images[300:], **options)[1][:, :, 0]
    u = 1 - torch.from_numpy(np.random.RandomState(7).uniform(size=300))
    if name == "raps":
        chosen = other._mapie_classifier.conformity_score_function_
        actual = scores.from_log_odds(
            scores.raps_log_odds(logits[300:], u, float(chosen.lambda_star), int(chosen.k_star[0]))
        )
        q_hat = chosen.quantiles_[0]
    else:

        def score(logits):
            return scores.thr_log_odds(logits) if name == "thr" else scores.aps_log_odds(logits, u)

        label_scores = score(logits[:300]).gather(1, labels[:300, None]).squeeze(1)
        actual, q_hat = score(logits[300:]), CR.conformal_quantile(label_scores, 0.1)
    sets = CR.prediction_sets(actual, q_hat)
    assert (sets.numpy() == expected).all() and 0 < expected.mean() < 1
    label_scores = sets.gather(1, labels[300:, None]).double().mean().item()
    assert CR.coverage(CR.in_set(sets, labels[300:])) == label_scores
    assert abs(label_scores - 0.9) < 0.08


@pytest.mark.parametrize("name", scores.NAMES)
def test_scores_and_sets_equal_those_of_torchcp(name):
    """Without randomisation, where torchcp uses u = 1. torchcp is not a requirement."""
    pytest.importorskip("torchcp")
    from torchcp.classification import score as theirs
    from torchcp.classification.predictor import SplitPredictor

    logits, labels, _ = conformal_data()
    made = {
        "thr": lambda: theirs.LAC(),
        "aps": lambda: theirs.APS(randomized=False),
        "raps": lambda: theirs.RAPS(randomized=False, penalty=0.1, kreg=2),
        "saps": lambda: theirs.SAPS(randomized=False, weight=0.2),
    }[name]()
    score = scores.Score(name, randomized=False, penalty=0.1, k_reg=2, weight=0.2)
    torch.testing.assert_close(made(logits), score(logits))
    predictor = SplitPredictor(made)
    predictor.calculate_threshold(logits[:300], labels[:300], 0.1)
    q_hat = CR.conformal_quantile(score(logits[:300]).gather(1, labels[:300, None]).squeeze(1), 0.1)
    assert float(predictor.q_hat) == pytest.approx(q_hat)
    expected = predictor.predict_with_logits(logits[300:])
    assert (
        CR.prediction_sets(score(logits[300:]), q_hat) == expected.bool()
    ).double().mean() > 0.9995
