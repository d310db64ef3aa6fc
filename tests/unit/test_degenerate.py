"""Degenerate problems (one image, no calibration image, one class): finite weights or an error."""

import pytest
from small import SmallNet, run, small_job

import unlearn
import unlearn_cpu

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
    job = small_job(label, num_epochs=2, log=records.append, **SIZES[sizes], **settings)
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
