"""Distributions over trainings: KLOM, U-LiRA and labels in sets against plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from metrics import ensembles


def gaussian(shape, mean=0.0, seed=0):
    return mean + torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_margin_is_the_labels_logit_minus_the_logsumexp_of_the_others():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 500.0, 400.0]])
    margins = ensembles.margins(logits, torch.tensor([0, 2]))
    assert margins.tolist() == pytest.approx([3 - math.log(math.e + 1), -100])
    assert margins.dtype == torch.float64
    p = logits[0].softmax(0)[0].item()
    assert margins[0].item() == pytest.approx(math.log(p / (1 - p)), rel=1e-5)  # the log-odds


def klom_by_loop(unlearned, retrained):
    divergences = []
    for u, r in zip(unlearned.T.tolist(), retrained.T.tolist(), strict=True):
        edges = np.linspace(min(u + r), max(u + r), 21)
        p, q = (np.histogram(values, edges)[0] / len(values) for values in (u, r))
        p, q = np.maximum(p, 1e-5), np.maximum(q, 1e-5)
        divergences.append(sum(p * np.log(p / q)))
    return divergences


def test_klom_equals_a_plain_loop_over_images():
    unlearned, retrained = gaussian((16, 30), 0.7), gaussian((9, 30), seed=1)
    expected = klom_by_loop(unlearned, retrained)
    assert ensembles.klom(unlearned, retrained).tolist() == pytest.approx(expected)
    expected = klom_by_loop(retrained, unlearned)
    assert ensembles.klom(retrained, unlearned).tolist() == pytest.approx(expected)


def test_klom_by_hand():
    unlearned = torch.tensor([[0.0, 1.0], [20.0, 1.0]]).double()
    retrained = torch.tensor([[0.0, 1.0], [0.5, 1.0]]).double()
    # First image: bins of width 1; ½ and ½ against 1 and 1e-5, and 18 equal bins. Second: equal.
    first = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-5)
    assert ensembles.klom(unlearned, retrained).tolist() == pytest.approx([first, 0])
    assert ensembles.klom(retrained, retrained).tolist() == [0, 0]


def u_lira_by_loop(unlearned, retrained):
    """Scores of unlearned and of retrained models, model by model and image by image."""
    scores = ([], [])
    for kind, models in enumerate((unlearned.tolist(), retrained.tolist())):
        for number, model in enumerate(models):
            for image, margin in enumerate(model):
                likelihoods = []
                for others in (unlearned, retrained):
                    values = others[:, image].tolist()
                    values.pop(number % len(values))
                    law = norm(np.mean(values), np.std(values, ddof=1))
                    likelihoods.append(law.logpdf(margin))
                scores[kind].append(likelihoods[0] - likelihoods[1])
    return scores


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 6), (7, 4)])
def test_u_lira_equals_a_plain_loop_over_models_and_images(n, m):
    unlearned, retrained = gaussian((n, 12), 0.8), gaussian((m, 12), seed=1)
    positive, negative = u_lira_by_loop(unlearned, retrained)
    attack = ensembles.u_lira(unlearned, retrained)
    accuracy = (np.mean(np.array(positive) > 0) + np.mean(np.array(negative) <= 0)) / 2
    assert attack.accuracy == pytest.approx(accuracy)
    wins = [(p > q) + (p == q) / 2 for p in positive for q in negative]
    assert attack.auc == pytest.approx(np.mean(wins))
    allowed = int(0.01 * len(negative))
    threshold = sorted(negative, reverse=True)[allowed]
    assert attack.tpr == pytest.approx(np.mean(np.array(positive) > threshold))


@pytest.mark.parametrize("shift", [0.5, 2])
def test_u_lira_of_known_gaussians_has_the_auc_of_theory(shift):
    attack = ensembles.u_lira(gaussian((200, 400), shift), gaussian((200, 400), seed=1))
    assert attack.auc == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=0.005)
    assert attack.accuracy == pytest.approx(norm.cdf(shift / 2), abs=0.005)
    assert attack.tpr == pytest.approx(norm.sf(norm.isf(0.01) - shift), abs=0.01)


def test_u_lira_of_margins_without_deviation_is_finite_and_of_two_models_an_error():
    same = torch.ones(4, 3).double()
    assert ensembles.u_lira(same, same) == (0.5, 0.5, 0.0)
    assert ensembles.u_lira(same + 1, same) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least 3 models of each kind"):
        ensembles.u_lira(same, same[:2])


def trainings(count, mean=0.0, seed=0, in_set=0.5):
    margins = {
        part: gaussian((count, 50), mean, seed + k) for k, part in enumerate(ensembles.PARTS)
    }
    drawn = torch.rand(count, 50, generator=torch.Generator().manual_seed(seed))
    return ensembles.Trainings(margins, drawn < in_set)


def test_table_has_the_noise_floor_and_every_method_but_retrain():
    retrained = trainings(16)
    methods = {"original": trainings(16, 4, 1, 1.0), "retrain": retrained, "GA": trainings(9, 0, 5)}
    floor, original, ascent = ensembles.rows(methods)
    assert [row["method"] for row in (floor, original, ascent)] == [
        "retrain (halves)", "original", "GA",
    ]  # fmt: skip
    assert (floor["trainings"], original["trainings"], ascent["trainings"]) == (8, 16, 9)
    assert original["ULiRA_accuracy"] > 0.95 > floor["ULiRA_accuracy"]
    for part in ensembles.PARTS:
        expected = klom_by_loop(methods["original"].margins[part], retrained.margins[part])
        assert original[f"KLOM_{part}"] == pytest.approx(sorted(expected)[24])
    expected = klom_by_loop(methods["original"].margins["forget"], retrained.margins["forget"])
    assert original["KLOM_forget_95"] == pytest.approx(np.quantile(expected, 0.95))
    shares = [kind.in_set.double().mean(0) for kind in (methods["original"], retrained)]
    assert original["in_set_difference"] == pytest.approx((shares[0] - shares[1]).abs().mean())
    assert original["within_noise"] == "–" and floor.keys() == original.keys() - {"within_noise"}
    halves = ensembles.rows({"retrain": retrained, "again": retrained.select(slice(8))})
    assert halves[1]["within_noise"] == "all"


def test_numbers_need_enough_trainings_and_finite_q_hats():
    assert ensembles.rows({"GA": trainings(4)}) == []
    assert ensembles.rows({"retrain": trainings(1), "GA": trainings(4)}) == []
    assert ensembles.rows({"retrain": trainings(3), "GA": trainings(1)}) == []
    (row,) = ensembles.rows({"retrain": trainings(2), "GA": trainings(3)})
    assert "KLOM_forget" in row and "ULiRA_AUC" not in row and row["within_noise"] == "–"
    unknown = ensembles.Trainings(trainings(4).margins, None)
    floor, row = ensembles.rows({"retrain": trainings(4), "GA": unknown})
    assert "in_set_difference" in floor and "in_set_difference" not in row
    row = {"KLOM_forget": 0.3, "ULiRA_accuracy": 0.45, "ULiRA_AUC": 0.7, "trainings": 4}
    floor = {"KLOM_forget": 0.2, "ULiRA_accuracy": 0.55, "ULiRA_AUC": 0.5, "trainings": 2}
    assert ensembles.within(row, floor) == "U-LiRA"
