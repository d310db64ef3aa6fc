"""Known faults of unlearning code: in data on the device, the loop and the conformal loss."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags
from small import arguments
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import main_unlearn_cpu
import unlearn
import unlearn_cpu
import utils
from metrics import CR, scores
from models import inference
from models.resnet import ResNet18


@pytest.fixture(scope="module")
def digits(digits):
    """200 training and 200 held-out digits."""
    train, held_out = (
        replace(images, pixels=images.pixels[:200], labels=images.labels[:200])
        for images in (digits.train, digits.held_out)
    )
    return utils.Data(train, held_out, digits.classes, "few")


def job(digits, term=None, *, name="finetune", new_model=None, quiet=False, **recipe):
    torch.manual_seed(0)
    split = utils.make_split(digits, flags())
    recipe = {"num_epochs": 2, "learning_rate": 0.01} | recipe
    return unlearn.Job(
        name=name,
        label=name,
        model=ResNet18(10, 8),
        data=digits,
        split=split,
        recipe=unlearn.Recipe(**recipe),
        seed=1,
        options=unlearn.METHODS[name].options,
        new_model=new_model,
        term=term,
        quiet=quiet,
    )


def conformal_term(digits, lamda=0.5):
    calibration = utils.make_split(digits, flags()).train_calibration
    return unlearn_cpu.ConformalTerm(
        digits.held_out, calibration, alpha=0.05, delta=0.01, lamda=lamda
    )


def term_of(num_calibration, alpha):
    """A conformal term with ``num_calibration`` calibration images."""
    calibration = torch.arange(num_calibration)
    return unlearn_cpu.ConformalTerm(None, calibration, alpha=alpha, delta=0.01, lamda=0.5)


# ---------------------------------------------------------------- images


def test_evaluation_images_are_never_augmented(digits):
    indices = torch.arange(50)
    first, second = digits.train.batch(indices), digits.train.batch(indices)
    assert first.equal(second)
    expected = (digits.train.pixels[:50].float() / 255 - 0.3053) / 0.3759
    torch.testing.assert_close(first, expected)


def test_augmentation_differs_between_images_and_batches(digits):
    rng = utils.generator(1, "test")
    same = torch.zeros(64, dtype=torch.int64)
    first, second = digits.train.batch(same, rng), digits.train.batch(same, rng)
    assert not first.equal(second)
    # 3 × 3 crops with padding 1. Digits are never flipped.
    assert len({image.numpy().tobytes() for image in first}) == 9
    assert digits.train.batch(same, utils.generator(1, "test")).equal(first)


def test_crop_flip_and_grayscale_equal_torchvision():
    from torchvision.transforms.v2 import functional as transforms

    image = torch.randint(
        256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    augmented = utils.random_augment(
        image.expand(3000, -1, -1, -1), utils.SPECS["cifar10"], utils.generator(1, "crops")
    )
    padded = transforms.pad(image, [4])
    crops = [transforms.crop(padded, top, left, 32, 32) for top in range(9) for left in range(9)]
    possible = {}
    for crop in crops:
        for flipped in (False, True):
            for gray in (False, True):
                made = transforms.horizontal_flip(crop) if flipped else crop
                made = transforms.rgb_to_grayscale(made, num_output_channels=3) if gray else made
                possible[made.float().numpy().tobytes()] = (flipped, gray)
    actual = [possible[made.contiguous().numpy().tobytes()] for made in augmented]
    flips, grays = (sum(kind[i] for kind in actual) / 3000 for i in (0, 1))
    assert abs(flips - 0.5) < 0.04 and abs(grays - 0.1) < 0.03
    assert len({made.contiguous().numpy().tobytes() for made in augmented}) > 150


def test_images_are_resized_to_the_input_size_of_the_model(digits):
    images = utils.Images(digits.train.pixels, digits.train.labels, digits.train.spec, 16)
    assert images.batch(torch.arange(4)).shape == (4, 3, 16, 16)


# ---------------------------------------------------------------- evaluation


def test_evaluation_leaves_modes_and_statistics_unchanged(digits):
    model = ResNet18(10, 8).train()
    model.bn1.eval()  # a method may freeze one layer
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inference.compute_logits(model, digits.train, torch.arange(20))
    assert [module.training for module in model.modules()] == modes
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_batch_norm_statistics_change_in_every_epoch(digits):
    seen = []
    run = job(digits, conformal_term(digits), num_epochs=3)

    def epoch_done(record):
        seen.append((run.model.bn1.running_mean.clone(), run.model.training))

    unlearn.train(replace(run, epoch_done=epoch_done), unlearn.retain_cross_entropy)
    assert all(training for _, training in seen)
    assert not seen[0][0].equal(seen[1][0]) and not seen[1][0].equal(seen[2][0])


def test_logits_do_not_depend_on_the_batch_size(digits):
    model = ResNet18(10, 8)
    torch.testing.assert_close(
        inference.compute_logits(model, digits.train, torch.arange(30), 7)[0],
        inference.compute_logits(model, digits.train, torch.arange(30), 30)[0],
    )


# ---------------------------------------------------------------- the loop


def test_epoch_visits_every_image_once_in_a_new_order(digits):
    run = job(digits)
    epochs = [unlearn.index_batches(run, ("retain",), epoch) for epoch in (1, 2)]
    orders = [torch.cat([indices for indices, _ in steps]).tolist() for steps in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == run.split.retain.tolist()
    assert orders[0] != orders[1]
    assert all(2 < len(indices) <= 64 and count == len(indices) for indices, count in epochs[0])


def test_joined_forget_images_are_spread_over_unchanged_steps(digits):
    run = job(digits)
    plain = unlearn.index_batches(run, ("retain",), 1)
    joined = unlearn.join_forget(run, plain, 1)
    assert len(plain) == len(joined)
    for (alone, _), (together, num_retain) in zip(plain, joined, strict=True):
        assert together[:num_retain].equal(alone)  # the batches of the base method are unchanged
        assert 6 <= len(together) - num_retain <= 7  # 20 forget images over 3 steps
    forgotten = torch.cat([indices[count:] for indices, count in joined]).sort().values
    assert forgotten.equal(run.split.forget)


# ---------------------------------------------------------------- the conformal loss


def test_conformal_loss_by_hand():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]).log()
    labels = torch.tensor([0, 1, 0])
    # S = 0.3, 0.7, 0.9; max(0.75 − S + 0.05, 0) = 0.5, 0.1, 0
    assert unlearn_cpu.conformal_loss(logits, labels, 0.75, 0.05).item() == pytest.approx(0.6 / 3)


def test_all_pairs_loss_by_hand():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]).log()
    labels = torch.tensor([0, 1, 0])
    # S(x, y) with the labels 0, 1, 0 of the batch: 0.3, 0.8, 0.3; 0.4, 0.7, 0.4; 0.9, 0.9, 0.9.
    # max(0.75 − S + 0.05, 0) = 0.5, 0, 0.5; 0.4, 0.1, 0.4; 0, 0, 0: 1.9 of 9 pairs
    loss = unlearn_cpu.all_pairs_loss(logits, labels, 0.75, 0.05)
    assert loss.item() == pytest.approx(1.9 / 9)
    single = unlearn_cpu.all_pairs_loss(logits[:1], labels[:1], 0.75, 0.05)
    assert single.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("form", "function", "lamda"),
    [("own", unlearn_cpu.conformal_loss, 0.05), ("pairs", unlearn_cpu.all_pairs_loss, 0.5)],
)
def test_loss_flag_selects_the_loss_and_its_default_weight(form, function, lamda):
    held_out = SimpleNamespace()
    data, split = SimpleNamespace(held_out=held_out), SimpleNamespace(train_calibration=range(50))
    flags = ["--loss", form] if form == "pairs" else []
    term = main_unlearn_cpu.conformal_term(arguments(*flags), data, split)
    assert (term.form, term.lamda, term.alpha, term.delta) == (form, lamda, 0.05, 0.01)
    assert main_unlearn_cpu.conformal_term(arguments(*flags, "--lamda", 0), data, split).lamda == 0
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels, term.q_hat = torch.tensor([0, 1, 2, 2]), 0.9
    assert term.loss(logits, labels).equal(function(logits, labels, 0.9, 0.01))


def test_conformal_loss_of_an_image_depends_on_its_label_only():
    """A B×B matrix of probabilities would spread the gradient over other images' labels."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3])
    together = unlearn_cpu.conformal_loss(logits, labels, 0.9, 0.1)
    alone = [
        unlearn_cpu.conformal_loss(logits[i : i + 1], labels[i : i + 1], 0.9, 0.1) for i in range(4)
    ]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item())


def test_conformal_loss_lowers_the_label_until_it_is_outside_the_set():
    logits = torch.zeros(1, 3, requires_grad=True)
    unlearn_cpu.conformal_loss(logits, torch.tensor([1]), 0.9, 0.01).backward()
    assert logits.grad[0, 1] > 0 and logits.grad[0, 0] < 0
    out = torch.tensor([[9.0, -9.0, 0.0]], requires_grad=True)
    unlearn_cpu.conformal_loss(out, torch.tensor([1]), 0.9, 0.01).backward()
    assert not out.grad.any()


def test_conformal_loss_without_images_is_zero():
    loss = unlearn_cpu.conformal_loss(
        torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64), 0.9, 0.1
    )
    assert loss.item() == 0


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.25, 0.1, 0.07, 0.05, 0.021])
def test_conformal_term_with_too_few_images_for_finite_q_hat_is_refused(alpha):
    least = next(n for n in range(100) if CR.quantile_rank(n, alpha) <= n)
    term_of(least, alpha)
    with pytest.raises(
        utils.UserError, match=f"--alpha {alpha}: .* at least {least} .* gives {least - 1} "
    ):
        term_of(least - 1, alpha)


@pytest.mark.parametrize("count", [1, 2, 6, 18, 98, 600])
def test_suggested_alpha_is_large_enough_and_little_larger(count):
    with pytest.raises(utils.UserError) as caught:
        term_of(count, 0.001)
    suggested = float(str(caught.value).split("choose --alpha ")[1].split()[0])
    term_of(count, suggested)
    assert suggested < 1 / (count + 1) + 0.001


def test_conformal_term_without_calibration_images_suggests_no_alpha():
    with pytest.raises(
        utils.UserError, match="gives 0 .* add held-out images of the retained classes$"
    ):
        term_of(0, 0.9)


def test_finished_run_with_sets_of_one_label_gets_advice():
    term = term_of(9, 0.1)
    term.q_hats[:] = [0.9, 0.9, 0.2]
    assert term.advice() is None
    term.q_hats[:] = [0.9, 0.31, 0.2]
    assert "--alpha 0.1 is above" in term.advice() and "0.310" in term.advice()


def test_q_hat_has_no_gradient_and_is_recomputed_every_epoch(digits):
    term, records = conformal_term(digits), []
    run = job(digits, term, num_epochs=3)
    expected = [inference.compute_logits(run.model, digits.held_out, term.calibration)]

    def epoch_done(record):
        records.append(record)
        expected.append(inference.compute_logits(run.model, digits.held_out, term.calibration))

    unlearn.train(replace(run, epoch_done=epoch_done), unlearn.retain_cross_entropy)
    q_hats = [
        CR.conformal_quantile(scores.true_label_scores(*answers), 0.05) for answers in expected
    ]
    assert [record["q_hat"] for record in records] == q_hats[:3] and len(set(q_hats[:3])) == 3
    assert type(term.q_hat) is float


def test_loop_adds_lamda_times_conformal_loss_to_the_loss(digits):
    """One step by hand: cross-entropy of retain images plus λ · conformal loss of forget images."""
    term = conformal_term(digits, lamda=0.7)
    run = job(digits, term, num_epochs=1, batch_size=1000, learning_rate=0.1)
    reference = job(digits).model
    reference.load_state_dict(run.model.state_dict())
    indices, num_retain = unlearn.join_forget(run, unlearn.index_batches(run, ("retain",), 1), 1)[0]
    term.start_epoch(reference)
    reference.train()
    augmentation = utils.generator(run.seed, run.name, "augmentation", 1)
    logits = reference(digits.train.batch(indices, augmentation))
    labels = digits.train.labels[indices]
    loss = F.cross_entropy(logits[:num_retain], labels[:num_retain])
    loss = loss + 0.7 * unlearn_cpu.conformal_loss(
        logits[num_retain:], labels[num_retain:], term.q_hat, 0.01
    )
    loss.backward()
    expected = reference.fc.weight - 0.1 * (reference.fc.weight.grad + 5e-4 * reference.fc.weight)
    unlearn.train(run, unlearn.retain_cross_entropy)
    torch.testing.assert_close(run.model.fc.weight, expected)


# ---------------------------------------------------------------- speed and precision


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
        )
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    "name",
    [
        "finetune",
        "RL",
        "ga_plus",
        "teacher",
        "scrub",
        "salun",
        "sfron",
        "l1_sparse",
        "delete",
        "mu_mis",
        "amun",
        "cpu_finetune",
    ],
)
def test_training_step_does_not_wait_for_the_device(name, digits):
    """The number of waits does not depend on the number of steps."""

    def waits(batch_size):
        run = job(
            digits,
            conformal_term(digits) if name.startswith("cpu_") else None,
            name=name.removeprefix("cpu_"),
            new_model=lambda: ResNet18(10, 8),
            quiet=True,
            batch_size=batch_size,
            num_epochs=1,
        )
        if "stop_accuracy" in run.options:
            run = replace(run, options=run.options | {"stop_accuracy": 0.0})
        few = {"retain": run.split.retain[:40], "forget": run.split.forget[:10]}
        run = replace(run, split=utils.Split(**vars(run.split) | few))
        with Waits() as counter:
            unlearn.METHODS[run.name].run(run)
        return counter.count

    assert waits(40) == waits(14) > 0


def test_bf16_trains_float32_weights_by_a_float32_loss(digits):
    losses = []

    def loss(batch):
        losses.append((batch.logits.dtype, unlearn.retain_cross_entropy(batch)))
        return losses[-1][1]

    half, full = job(digits, precision="bf16"), job(digits)
    unlearn.train(half, loss)
    unlearn.train(full, unlearn.retain_cross_entropy)
    assert all(dtype == loss.dtype == torch.float32 for dtype, loss in losses)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())
    apart = (half.model.fc.weight - full.model.fc.weight).abs().max().item()
    assert 0 < apart < 0.05


# ---------------------------------------------------------------- peak memory


def test_peak_memory_is_that_of_the_time_since_its_start():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("only Linux can reset the peak memory of a process")
    before = bytearray(300_000_000)
    before[::4096] = b"1" * len(before[::4096])
    del before
    memory = unlearn.PeakMemory(torch.device("cpu"))
    assert memory.known
    start = memory.megabytes()
    held = bytearray(200_000_000)
    held[::4096] = b"1" * len(held[::4096])
    del held
    assert 180 < memory.megabytes() - start < 260


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    def refused(path, text):
        raise PermissionError

    monkeypatch.setattr(unlearn.Path, "write_text", refused)
    assert unlearn.PeakMemory(torch.device("cpu")).megabytes() is None


def test_peak_memory_of_a_gpu_is_torchs(monkeypatch):
    resets = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", resets.append)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 1_234_567_890)
    memory = unlearn.PeakMemory(torch.device("cuda", 1))
    assert memory.megabytes() == 1235 and resets == [torch.device("cuda", 1)]
