"""Degenerate problems (one image, no calibration image, one class): finite weights or an error."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small import SmallNet, run, small_job

import unlearn
import unlearn_cpu
import utils

SIZES = {
    "fewer retain than forget images": {"retain": 3, "forget": 27},
    "one retain image": {"retain": 1, "forget": 29},
    "one forget image": {"retain": 29, "forget": 1},
    "one image of each": {"retain": 1, "forget": 1},
    "fewer images than a batch": {"retain": 4, "forget": 2, "batch_size": 64},
    "steps of one image": {"retain": 4, "forget": 3, "batch_size": 1},
    "two retain images in batches of three": {"retain": 2, "forget": 9, "batch_size": 3},
}


@pytest.mark.parametrize("label", [*unlearn.METHODS, *unlearn_cpu.METHODS])
@pytest.mark.parametrize("sizes", SIZES)
def test_method_on_few_images_gives_finite_weights_and_records(label, sizes):
    settings = {"lamda": 0.5} if label.startswith("cpu_") else {}
    if label == "neg_merge":
        settings = {"learning_rate": 0.01}  # it trains with up to four times the rate
    records = []
    job = small_job(label, num_epochs=2, epoch_done=records.append, **SIZES[sizes], **settings)
    after = run(job)
    assert all(tensor.isfinite().all() for tensor in after.values())
    values = [value for record in records for value in record.values()]
    assert all(value == value and abs(value) < 1e6 for value in values)
    before = SmallNet().state_dict()
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    # No weight need be eight times as important for the few images as for all.
    assert changed or label == "ssd"
    if job.recipe:
        accuracies = {"train_acc", "retain_acc", "forget_acc", "test_acc"}
        assert records and set(records[-1]) >= {"loss"} | accuracies


@pytest.mark.parametrize("label", [*unlearn.METHODS, *unlearn_cpu.METHODS])
def test_method_with_one_retained_class_gives_finite_weights(label):
    job = small_job(label, num_epochs=2, **({"lamda": 0.5} if label.startswith("cpu_") else {}))
    job.data.train.labels[job.split.retain] = 2
    assert all(tensor.isfinite().all() for tensor in run(job).values())


@pytest.mark.parametrize("label", [*unlearn.METHODS, *unlearn_cpu.METHODS])
def test_method_without_training_calibration_works_or_is_refused(label):
    def assert_finite(**settings):
        after = run(small_job(label, train_calibration=0, **settings))
        assert all(tensor.isfinite().all() for tensor in after.values())

    if label in unlearn.METHODS and "stop_accuracy" in unlearn.METHODS[label].options:
        message = rf"{label}: .* held-out images, and none of the 40 .* --stop_accuracy"
        with pytest.raises(utils.UserError, match=message):
            run(small_job(label, train_calibration=0))
        assert_finite(stop_accuracy=0.1)
        assert_finite(forget_class=1)
    elif label == "lotus":
        with pytest.raises(utils.UserError, match="lotus: .* none of the 40 .* add held-out"):
            run(small_job(label, train_calibration=0))
        assert_finite(forget_class=1)
    elif label.startswith("cpu_"):
        message = "--alpha 0.1: a finite q̂ needs at least 9 .* gives 0 "
        with pytest.raises(utils.UserError, match=message):
            small_job(label, train_calibration=0, lamda=0.5)
    else:
        assert_finite()


@pytest.mark.parametrize(("retain", "forget"), [(1, 8), (8, 1)])
def test_ga_plus_step_without_images_of_a_part_has_zero_loss_of_that_part(retain, forget):
    settings = {"batch_size": 3, "num_epochs": 1, "forget_weight": 0.5}
    job = small_job("ga_plus", retain=retain, forget=forget, **settings)
    names = ["cross_entropy", "ascent_losses"]
    losses = {name: [] for name in names}

    def recorded(name, function, *arguments):
        value = function(*arguments)
        losses[name].append((len(arguments[-1]), value.sum().item()))
        return value

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(unlearn, name, partial(recorded, name, getattr(unlearn, name)))
        run(job)
    for name, count in zip(names, (retain, forget), strict=True):
        counts = [number for number, _ in losses[name]]
        assert counts == ([3, 3, 2] if count == 8 else [1, 0, 0])
        assert all((loss == 0) == (number == 0) for number, loss in losses[name])


def test_cross_entropy_without_images_is_zero_and_has_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = unlearn.cross_entropy(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 5)


def test_accuracies_without_test_images_have_no_test_accuracy():
    job = small_job("finetune")
    split = replace(job.split, test=torch.empty(0, dtype=torch.int64))
    assert set(unlearn.accuracies(replace(job, split=split))) == {"retain", "forget"}


@pytest.mark.parametrize("adaptivity", [0.0, 0.5, 3.0, 50.0])
def test_adaptive_weights_are_finite_for_any_exponent(adaptivity):
    logits = torch.tensor([[300.0, 0.0], [0.0, 0.0], [0.0, 80.0]], requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = unlearn.adaptive_mean(losses, adaptivity)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


# ---------------------------------------------------------------- infinite numbers


def test_result_with_infinite_outputs_or_weights_is_divergence():
    job = small_job("FisherForgetting", noise=1e35)
    run(job)
    with pytest.raises(unlearn.Diverged, match="FisherForgetting diverged: .*; lower --noise "):
        unlearn.final_accuracies(job)
    job = small_job("finetune")
    with torch.no_grad():
        job.model[4].weight *= 1e30
        job.model[0].weight *= 1e30
    assert unlearn.weights_are_finite(job.model)
    with pytest.raises(unlearn.Diverged, match="finetune diverged: .*; lower --learning_rate "):
        unlearn.final_accuracies(job)
    job = small_job("ssd")
    job.model[1].running_var[0] = float("inf")  # the outputs remain finite
    message = "lower --selection_weighting or --dampening_constant "
    with pytest.raises(unlearn.Diverged, match=message):
        unlearn.final_accuracies(job)
    job = small_job("ssd")
    assert unlearn.final_accuracies(job) == unlearn.accuracies(job)


@pytest.mark.parametrize("name", ["1.running_var", "4.bias"])
def test_infinite_weight_or_running_statistic_is_divergence(name):
    model = SmallNet()
    assert unlearn.weights_are_finite(model)
    model.state_dict()[name][0] = float("inf")
    assert not unlearn.weights_are_finite(model)
    job = small_job("finetune", learning_rate=1e-9, model=model)
    with pytest.raises(unlearn.Diverged, match="finetune diverged in epoch 1"):
        unlearn.train(job, unlearn.retain_cross_entropy)
