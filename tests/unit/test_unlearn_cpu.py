"""The conformal loss: its formula, its q̂ and its place in the loss of a step."""

from types import SimpleNamespace

import pytest
import torch
from small import ByHand, arguments, run, small_job
from torch.nn import functional as F

import main_unlearn_cpu
import unlearn_cpu
from metrics import CR, scores
from models import inference
from models.errors import UserError
from unlearn_cpu import ConformalTerm, all_pairs_loss, ascent_loss, conformal_loss

LOGITS = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]).log()
LABELS = torch.tensor([0, 1, 0])


def term_of(num_calibration, alpha):
    """A conformal term with ``num_calibration`` calibration images."""
    calibration = torch.arange(num_calibration)
    return ConformalTerm(None, calibration, alpha=alpha, delta=0.01, lamda=0.5)


# ---------------------------------------------------------------- the loss


def test_conformal_loss_by_hand():
    # S = 0.3, 0.7, 0.9; max(0.75 − S + 0.05, 0) = 0.5, 0.1, 0
    assert conformal_loss(LOGITS, LABELS, 0.75, 0.05).item() == pytest.approx(0.6 / 3)


def test_all_pairs_loss_by_hand():
    # S(x, y) with the labels 0, 1, 0 of the batch: 0.3, 0.8, 0.3; 0.4, 0.7, 0.4; 0.9, 0.9, 0.9.
    # max(0.75 − S + 0.05, 0) = 0.5, 0, 0.5; 0.4, 0.1, 0.4; 0, 0, 0: 1.9 of 9 pairs
    assert all_pairs_loss(LOGITS, LABELS, 0.75, 0.05).item() == pytest.approx(1.9 / 9)
    single = all_pairs_loss(LOGITS[:1], LABELS[:1], 0.75, 0.05)
    assert single.item() == pytest.approx(0.5)


def test_ascent_loss_by_hand():
    # The probabilities of the true labels are 0.7, 0.3, 0.1: −mean(−log p)
    expected = torch.tensor([0.7, 0.3, 0.1]).log().mean().item()
    assert ascent_loss(LOGITS, LABELS, 0.75, 0.05).item() == pytest.approx(expected)


def test_conformal_loss_of_an_image_depends_on_its_true_label_only():
    """A B×B matrix of probabilities would spread the gradient over other images' labels."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    alone = [conformal_loss(logits[[i]], labels[[i]], 0.9, 0.1) for i in range(4)]
    together = conformal_loss(logits, labels, 0.9, 0.1)
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.mark.parametrize("loss", [conformal_loss, all_pairs_loss])
def test_loss_lowers_the_true_label_until_it_is_outside_the_set(loss):
    inside = torch.zeros(1, 3, requires_grad=True)
    loss(inside, torch.tensor([1]), 0.9, 0.01).backward()
    assert inside.grad[0, 1] > 0 > inside.grad[0, 0]
    outside = torch.tensor([[9.0, -9.0, 0.0]], requires_grad=True)
    loss(outside, torch.tensor([1]), 0.9, 0.01).backward()
    assert not outside.grad.any()


@pytest.mark.parametrize("loss", [conformal_loss, all_pairs_loss, ascent_loss])
def test_loss_of_no_images_is_zero_with_a_gradient(loss):
    logits = torch.zeros(0, 3, requires_grad=True)
    value = loss(logits, torch.zeros(0, dtype=torch.int64), 0.9, 0.1)
    value.backward()
    assert value.item() == 0


def test_unknown_loss_is_refused():
    with pytest.raises(UserError, match="--loss"):
        arguments("--loss", "none")


@pytest.mark.parametrize(
    ("flags", "function", "expected"),
    [
        ([], conformal_loss, ("own", 0.05, 0.05, 0.01)),
        (["--loss", "pairs"], all_pairs_loss, ("pairs", 0.5, 0.05, 0.01)),
        (["--loss", "ascent"], ascent_loss, ("ascent", 0.01, 0.05, 0.01)),
        (["--lamda", 0, "--alpha", 0.2, "--delta", 0.3], conformal_loss, ("own", 0.0, 0.2, 0.3)),
    ],
)
def test_flags_select_the_loss_and_its_settings(flags, function, expected):
    data, split = SimpleNamespace(held_out="images"), SimpleNamespace(train_calibration=range(50))
    term = main_unlearn_cpu.conformal_term(arguments(*flags), data, split)
    assert (term.form, term.lamda, term.alpha, term.delta) == expected
    assert (term.images, term.calibration) == ("images", range(50))
    term.q_hat = 0.75
    assert term.loss(LOGITS, LABELS).equal(function(LOGITS, LABELS, 0.75, expected[-1]))


# ---------------------------------------------------------------- q̂


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.25, 0.1, 0.07, 0.05, 0.021])
def test_too_few_calibration_images_for_a_finite_q_hat_are_refused(alpha):
    least = next(n for n in range(100) if CR.quantile_rank(n, alpha) <= n)
    term_of(least, alpha)
    with pytest.raises(UserError, match=rf"--alpha {alpha}\b.* {least} .* {least - 1} "):
        term_of(least - 1, alpha)


@pytest.mark.parametrize("count", [1, 2, 6, 18, 98, 600])
def test_suggested_alpha_is_large_enough_and_little_larger(count):
    with pytest.raises(UserError) as caught:
        term_of(count, 0.001)
    suggested = float(str(caught.value).split("--alpha ")[2].split()[0])
    term_of(count, suggested)
    assert suggested < 1 / (count + 1) + 0.001


def test_no_alpha_is_suggested_without_calibration_images():
    with pytest.raises(UserError) as caught:
        term_of(0, 0.9)
    assert str(caught.value).count("--alpha") == 1


def test_advice_is_given_where_most_epochs_had_sets_of_one_label():
    term = term_of(9, 0.1)
    term.q_hats[:] = [0.9, 0.9, 0.2]
    assert term.advice() is None
    term.q_hats[:] = [0.9, 0.31, 0.2]
    assert "--alpha 0.1" in term.advice() and "0.310" in term.advice()


def test_q_hat_is_that_of_the_weights_at_the_start_of_every_epoch_in_eval_mode():
    job, expected = small_job("cpu_finetune", lamda=0.5, alpha=0.2), []
    calibration = job.split.train_calibration
    for epoch in job.epochs():
        # Training is in train mode again, and evaluation does not change the statistics.
        assert all(module.training for module in job.model.modules())
        outputs = inference.compute_logits(job.model, job.data.held_out, calibration)
        expected.append(CR.conformal_quantile(scores.true_label_scores(*outputs), 0.2))
        probabilities = ByHand(job.model).log_p(job.data.held_out.inputs[calibration]).exp()
        labels = job.data.held_out.labels[calibration]
        by_hand = (1 - probabilities[range(20), labels]).sort().values[16]  # ⌈21 · 0.8⌉ = 17
        assert job.term.q_hat == pytest.approx(by_hand.item(), abs=1e-5)
        for batch in epoch.batches("retain"):
            epoch.step(F.cross_entropy(*batch.retain), batch)
            assert job.term.q_hat == expected[-1]
    assert job.term.q_hats == [record["q_hat"] for record in job.records] == expected
    assert len(set(expected)) == 3 and all(type(q_hat) is float for q_hat in expected)
    assert not any(seed for _, seed in job.data.held_out.uses)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("variant_name", unlearn_cpu.METHODS)
def test_lamda_zero_gives_exactly_the_weights_of_the_base_method(variant_name):
    name, settings = variant_name.removeprefix("cpu_"), {"quiet": True, "forget_class": 0}
    expected = run(small_job(name, **settings))
    variant = small_job(variant_name, lamda=0, **settings)
    actual, other = run(variant), run(small_job(variant_name, lamda=0.5, **settings))
    assert all(actual[key].equal(tensor) for key, tensor in expected.items())
    assert not other["4.weight"].equal(expected["4.weight"]) and len(variant.term.q_hats) == 3
