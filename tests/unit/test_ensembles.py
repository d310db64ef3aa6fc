"""Distributions over trainings: against plain loops, and tests in simulations."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import energy_distance, norm
from scored import make_outputs

import metrics
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


def test_klom_clips_margins_at_100():
    unlearned, retrained = gaussian((4, 3), 60), gaussian((4, 3), seed=1)
    unlearned[0], retrained[1] = 1e6, -250
    clipped = torch.cat([torch.full((1, 3), 100.0), unlearned[1:]]), retrained.clamp(min=-100)
    expected = klom_by_loop(*clipped)
    assert ensembles.klom(unlearned, retrained).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("compare", [ensembles.klom, ensembles.u_lira, ensembles.permutation_test])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_margins_that_are_not_finite_are_an_error(compare, value):
    margins, infinite = gaussian((4, 3)), gaussian((4, 3))
    infinite[2, 1] = value
    for pair in ((infinite, margins), (margins, infinite)):
        with pytest.raises(ValueError):
            compare(*pair)


def u_lira_by_loop(unlearned, retrained):
    """The balanced accuracy of each image, model by model."""
    kinds, correct = (unlearned.numpy(), retrained.numpy()), np.zeros(unlearned.shape[1])
    for number, image in np.ndindex(*unlearned.shape):
        others = [np.delete(kind[:, image], number) for kind in kinds]
        laws = [norm(values.mean(), values.std(ddof=1)) for values in others]
        for is_retrained, kind in enumerate(kinds):
            likelihoods = [law.pdf(kind[number, image]) for law in laws]
            correct[image] += np.argmax(likelihoods) == is_retrained
    return correct / (2 * len(unlearned))


@pytest.mark.parametrize("count", [3, 6])
def test_u_lira_equals_a_plain_loop_over_models_and_images(count):
    unlearned, retrained = gaussian((count, 12), 0.8), 2 * gaussian((count, 12), seed=1)
    accuracy = ensembles.u_lira(unlearned, retrained)
    assert accuracy.tolist() == pytest.approx(u_lira_by_loop(unlearned, retrained))


def test_u_lira_of_margins_without_deviation_is_finite_and_of_two_models_an_error():
    same = torch.ones(4, 3).double()
    assert ensembles.u_lira(same, same).tolist() == [0.5] * 3
    assert ensembles.u_lira(same + 1, same).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="at least 3 models of each kind"):
        ensembles.u_lira(same[:2], same[:2])


def models(count, seed, shift=0.0, images=40):
    """Margins with mean ``shift`` and deviation 1. Images of a training have correlation 0.3."""
    common = gaussian((count, 1), seed=2 * seed)
    return shift + 0.3**0.5 * common + 0.7**0.5 * gaussian((count, images), seed=2 * seed + 1)


@pytest.mark.parametrize(
    ("count", "shift", "least", "most"),
    [(8, 0, 0.02, 0.09), (8, 0.5, 0.2, 1), (8, 1, 0.75, 1), (8, 1.5, 0.95, 1)]
    + [(16, 0, 0.02, 0.09), (16, 0.5, 0.5, 1), (16, 1, 0.95, 1), (16, 1.5, 0.99, 1)],
)
def test_permutation_test_has_level_5_percent_and_power(count, shift, least, most):
    p_values = [
        ensembles.permutation_test(models(count, 2 * k, shift), models(count, 2 * k + 1))
        for k in range(80 if shift else 300)
    ]
    assert least <= np.mean(np.array(p_values) <= 0.05) <= most


def test_permutation_test_counts_relabelings_with_scipys_energy_distance():
    pair = models(4, 1, 0.9)[:, :4], models(4, 2)[:, :4]
    both = torch.cat(pair)
    both = (both / both.std(dim=0)).T.numpy()  # images × models

    def energy(order):
        kinds = order[:4], order[4:]
        return np.mean([energy_distance(*(image[kind] for kind in kinds)) ** 2 for image in both])

    energies = np.array([energy(order.numpy()) for order in ensembles.relabelings(4)])
    as_large = np.sum(energies >= energy(np.arange(8)) - 1e-9)
    assert 10 < as_large < 600
    assert ensembles.permutation_test(*pair) == pytest.approx((1 + as_large) / 1000)


def test_permutation_test_sees_variation_and_is_limited_by_the_number_of_trainings():
    retrained = gaussian((16, 40), seed=1)
    assert ensembles.permutation_test(2 * gaussian((16, 40)), retrained) == 0.001
    assert ensembles.permutation_test(retrained, retrained) == 1
    # Two of the six labelings of 2 + 2 trainings are the observed one.
    assert ensembles.permutation_test(retrained[:2] + 9, retrained[2:4]) >= 0.25


def test_permutation_test_does_not_depend_on_the_units_of_an_image():
    pair, units = (models(8, 1, 0.4), models(8, 2)), torch.logspace(-3, 3, 40)
    p_value = ensembles.permutation_test(*pair)
    assert 0.01 < p_value == ensembles.permutation_test(*(kind * units for kind in pair)) < 0.9


def test_chance_is_the_distance_without_a_difference_and_halves_are_farther():
    numbers = []
    for seed in range(20):
        pair = models(16, 2 * seed), models(16, 2 * seed + 1)
        by_chance = ensembles.chance(ensembles.median_klom, *pair)
        halves = ensembles.median_klom(pair[1][:8], pair[1][8:])
        numbers.append([ensembles.median_klom(*pair), by_chance, halves])
    distances, chances, halves = np.transpose(numbers)
    error = np.std(distances - chances) / math.sqrt(20)
    assert abs(np.mean(distances) - np.mean(chances)) < 3 * error
    assert np.mean(halves) > np.mean(chances) + 1  # with fewer trainings, KLOM is larger


def trainings(count, shift=0.0, seed=0, in_set=0.5, control=0.0):
    means = {"forget": shift, "retain": 0.0, "test": 0.0, "control": control}
    margins = {
        part: gaussian((count, 50), mean, seed + k) for k, (part, mean) in enumerate(means.items())
    }
    drawn = torch.rand(count, 50, generator=torch.Generator().manual_seed(seed))
    return ensembles.Trainings(margins, drawn < in_set)


def test_rows_compare_every_method_with_as_many_trainings_of_retrain():
    methods = {"original": trainings(16, 4, 1, 1.0), "retrain": trainings(16)}
    methods["GA"] = trainings(9, 0, 5)
    original, ascent = ensembles.rows(methods)
    assert (original["trainings"], ascent["trainings"]) == (16, 9)
    for name, row in {"original": original, "GA": ascent}.items():
        assert row["method"] == name and row.keys() == ensembles.COLUMNS.keys()
        pair = methods[name], methods["retrain"].select(slice(row["trainings"]))
        for part in ensembles.PARTS:
            margins = [kind.margins[part] for kind in pair]
            assert row[f"KLOM_{part}"] == pytest.approx(sorted(klom_by_loop(*margins))[24])
            by_chance = ensembles.chance(ensembles.median_klom, *margins)
            assert row[f"KLOM_{part}_chance"] == by_chance
        shares = [kind.in_set.double().mean(0) for kind in pair]
        assert row["in_set_difference"] == pytest.approx((shares[0] - shares[1]).abs().mean())
    assert original["p_value"] == 0.001 < 0.01 < ascent["p_value"]
    assert original["in_set_difference"] > 3 * original["in_set_difference_chance"]
    for key in ("KLOM_forget", "KLOM_retain", "KLOM_test", "in_set_difference"):
        assert ascent[key] == pytest.approx(ascent[f"{key}_chance"], rel=0.3)


def test_excess_of_u_lira_is_near_0_for_another_procedure_and_large_for_a_trace():
    methods = {"retrain": trainings(16), "procedure": trainings(16, 1, 10, control=1)}
    procedure, trace = ensembles.rows(methods | {"trace": trainings(16, 2, 30, control=1)})
    assert procedure["ULiRA_accuracy"] > 0.6 and trace["ULiRA_excess"] > 0.1
    assert abs(procedure["ULiRA_excess"]) < 2 * procedure["ULiRA_excess_error"] < 0.05


def test_one_training_has_the_margins_of_every_part_and_the_splits_sets_of_forget_images():
    outputs = make_outputs(num_draws=3)
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.3, 0.1)))
    one = ensembles.describe(conformal_scores, torch.tensor([4, 2]))
    test = outputs.held_out.select(outputs.test())
    parts = {"forget": outputs.forget, "retain": outputs.retain.select([4, 2]), "test": test}
    for part, images in (parts | {"control": test}).items():
        assert one.margins[part].tolist() == [ensembles.margins(*images).tolist()]
    q_hat = conformal_scores.q_hats()[0, 0]
    expected = conformal_scores.part("forget").true_label <= q_hat
    assert one.in_set.tolist() == [expected.tolist()] and 0 < expected.sum() < 40


def test_control_of_a_forgotten_class_is_its_test_images():
    outputs = make_outputs(forgotten=True)
    scores = metrics.ConformalScores(outputs, metrics.Settings((0.1,)))
    control = ensembles.describe(scores, torch.arange(5)).margins["control"]
    expected = ensembles.margins(*outputs.held_out.select(outputs.forget_test()))
    assert control.tolist() == [expected.tolist()] != [[]]


def test_numbers_need_enough_trainings_and_finite_q_hats():
    assert ensembles.rows({"GA": trainings(4)}) == []
    assert ensembles.rows({"retrain": trainings(1), "GA": trainings(4)}) == []
    (row,) = ensembles.rows({"retrain": trainings(2), "GA": trainings(3)})
    assert "KLOM_forget" in row and "ULiRA_excess" not in row and row["trainings"] == 2
    unknown = ensembles.Trainings(trainings(4).margins, None)
    (row,) = ensembles.rows({"retrain": trainings(4), "GA": unknown})
    assert "ULiRA_excess" in row and "in_set_difference" not in row
