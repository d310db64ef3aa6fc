"""Non-conformity scores: against numbers by hand, 60-digit arithmetic, MAPIE and torchcp."""

import math

import numpy as np
import pytest
import torch
from scored import logits_of
from sklearn.base import BaseEstimator, ClassifierMixin

import metrics
from metrics import CR, conformal, scores


def exact_log_odds(name, logits, u, penalty=0.01, k_reg=2):
    """log S − log(1 − S) of one image's labels (FROM_ONE_ON · S where S ≥ 1), 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(700):
        powers = [mpmath.exp(mpmath.mpf(float(logit))) for logit in logits]
        p, u = [power / sum(powers) for power in powers], mpmath.mpf(float(u))
        # sorted() is stable, so ties are in the order of the labels.
        order = sorted(range(len(p)), key=lambda label: -p[label])
        actual = [None] * len(p)
        for rank, label in enumerate(order, 1):
            adaptive = sum(p[other] for other in order[: rank - 1]) + u * p[label]
            actual[label] = {
                "thr": 1 - p[label],
                "aps": adaptive,
                "raps": adaptive + mpmath.mpf(penalty) * max(rank - k_reg, 0),
            }[name]
        return [float(mpmath.log(s / (1 - s)) if s < 1 else scores.FROM_ONE_ON * s) for s in actual]


@pytest.mark.parametrize("name", scores.NAMES)
@pytest.mark.parametrize("spread", [1, 30, 300])
def test_log_odds_are_exact_for_any_confidence(name, spread):
    rng = np.random.default_rng(spread)
    logits = torch.from_numpy(spread * rng.standard_normal((8, 5)))
    score = scores.Score(name, penalty=0.01, k_reg=2, seed=3)
    actual = score.log_odds(logits, "test")
    u = np.random.default_rng([3, *b"test"]).random(8)
    expected = torch.tensor(
        [exact_log_odds(name, *image) for image in zip(logits, u, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(actual.argsort(dim=1), expected.argsort(dim=1))


@pytest.mark.parametrize("name", ["aps", "raps"])
def test_scores_without_randomisation_use_u_of_one(name):
    logits = torch.tensor([[2.0, 45.0, 0.0], [0.0, 0.0, 0.0]]).double()
    actual = scores.Score(name, randomized=False, penalty=0.01, k_reg=2).log_odds(logits, "test")
    expected = torch.tensor(
        [exact_log_odds(name, image, 1.0) for image in logits], dtype=torch.float64
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_labels_with_tied_1_minus_p_are_ordered_by_log_odds():
    """p of 1e-22 to 1e-30: 1 − p is 1 for all, and q̂ = 1 would put every label into every set."""
    margins = torch.arange(50.0, 70.0)
    logits = torch.stack([torch.zeros(20), -margins, torch.full((20,), -60.5)], dim=1)
    output = metrics.Output(logits, torch.ones(20, dtype=torch.int64))
    assert (scores.true_label_scores(*output) == 1).all()
    assert scores.true_label_log_odds(*output).tolist() == pytest.approx(margins.tolist())
    image_scores = conformal.score_images(output, scores.Score(), "forget")
    q_hat = CR.finite_quantile(image_scores.true_label, 0.5)  # the 11th of 20
    assert q_hat == pytest.approx(60)
    q_hats = torch.tensor([q_hat]).double()
    assert image_scores.in_set(q_hats).sum() == 11
    assert image_scores.set_sizes(q_hats).sum() == 20 + 11  # label 2 at 60.5 is outside


def plain(log_odds):
    return scores.from_log_odds(log_odds).flatten().tolist()


def test_adaptive_scores_by_hand():
    logits, u = logits_of([[0.2, 0.5, 0.3], [0.9, 0.04, 0.06]]), torch.tensor([0.4, 1.0]).double()
    # First image: ranks 1, 2, 3 are labels 1, 2, 0.
    expected = [[0.8 + 0.4 * 0.2, 0.4 * 0.5, 0.5 + 0.4 * 0.3], [0.9, 1.0, 0.96]]
    assert plain(scores.aps_log_odds(logits, u)) == pytest.approx(sum(expected, []))
    penalised = np.ravel(expected) + [0.2, 0.0, 0.1, 0.0, 0.2, 0.1]  # 0.1 for each rank beyond 1
    assert plain(scores.raps_log_odds(logits, u, 0.1, 1)) == pytest.approx(penalised)


def test_randomised_scores_depend_on_seed_and_image_set():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    for name in ("aps", "raps"):
        first, again, other = (scores.Score(name, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first(logits), again(logits))
        assert not torch.equal(first(logits), other(logits))
        assert not torch.equal(first(logits, "forget"), first(logits, "held_out"))
        assert torch.equal(
            scores.Score(name, False, seed=1)(logits), scores.Score(name, False, seed=2)(logits)
        )


def conformal_data():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(2 * rng.standard_normal((600, 8)))
    probabilities = torch.softmax(logits, dim=1).numpy()
    labels = torch.from_numpy(np.array([rng.choice(8, p=p) for p in probabilities]))
    return logits, labels, probabilities


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["thr", "aps", "raps"])
def test_q_hat_and_sets_equal_those_of_mapie(name):
    """Compared image by image with equal random numbers (MAPIE uses 1 − u for our u).

    MAPIE chooses the parameters of raps from calibration images. Our score uses these parameters.
    """
    from mapie.classification import SplitConformalClassifier

    logits, labels, probabilities = conformal_data()

    class Model(ClassifierMixin, BaseEstimator):
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
    other = SplitConformalClassifier(Model(), 0.9, conformity_score=kind, random_state=7)
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
    assert CR.coverage(sets[range(len(sets)), labels[300:]]) == label_scores
    assert abs(label_scores - 0.9) < 0.08


def test_scores_by_hand_are_reported_as_S():
    logits = logits_of([[0.7, 0.2, 0.1]])
    assert torch.equal(scores.thr(logits), scores.Score()(logits))
    assert scores.Score()(logits)[0].tolist() == pytest.approx([0.3, 0.8, 0.9])
    assert scores.true_label_scores(logits, torch.tensor([1])).tolist() == pytest.approx([0.8])
    raps = scores.Score("raps", False, penalty=0.25, k_reg=1)  # passes 1 at the second rank
    assert raps(logits)[0].tolist() == pytest.approx([0.7, 1.15, 1.5])
    assert scores.Score("aps", False)(torch.zeros(1, 2)).tolist() == [[0.5, 1.0]]
    assert math.isnan(scores.from_log_odds(torch.tensor(math.nan).double()))
