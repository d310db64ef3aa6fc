"""The training loop on the small problem: batches, steps, records, and resuming."""

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from small import BRIGHTER, ByHand, SmallNet, Tensors, run, small_job, training_steps
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import unlearn
import unlearn_cpu
from models import checkpoint, training
from models.errors import UserError
from models.training import Diverged, Progress, TrainingState


def train(job, *parts, after_step=lambda batch: None, after_epoch=lambda epoch: None, **options):
    """Minimize the cross-entropy of ``parts`` (default: retain). Returns the losses of all steps.

    ``options`` are those of job.epochs.
    """
    losses = []
    for epoch in job.epochs(**options):
        for batch in epoch.batches(*parts or ["retain"]):
            loss = F.cross_entropy(batch.logits, batch.labels)
            losses.append(loss.item())
            epoch.step(loss, batch)
            after_step(batch)
        after_epoch(epoch)
    return losses


def same(first, second):
    equal = all(first[name].equal(tensor) for name, tensor in second.items())
    return equal and first.keys() == second.keys()


def one_epoch(job, number=1):
    """An epoch outside of job.epochs()."""
    bar = tqdm(disable=True)
    return training.Epoch(job, number, state=TrainingState(job), network=job.model, bar=bar)


def images_of(steps):
    """The sorted indices of all retain images of the steps, and of all forget images."""
    parts = [indices.tensor_split([num_retain]) for indices, num_retain in steps]
    return [torch.cat(part).sort().values.tolist() for part in zip(*parts, strict=True)]


# ---------------------------------------------------------------- the batches of an epoch


RETAIN, FORGET, BOTH = ["retain"], ["forget"], ["retain", "forget"]


@pytest.mark.parametrize(
    ("parts", "sizes", "count"),
    [(RETAIN, (19, 11), 3), (RETAIN, (16, 11), 2), (RETAIN, (5, 30), 1), (FORGET, (5, 30), 4)]
    + [(FORGET, (19, 0), 0), (BOTH, (19, 11), 4), (BOTH, (2, 30), 4), (BOTH, (17, 0), 3)],
)
def test_epoch_has_every_image_once_and_equal_shares_in_every_step(parts, sizes, count):
    job = small_job("RL", *sizes, batch_size=8)
    steps = one_epoch(job).steps(*parts)
    assert len(steps) == count
    for part, images in zip(parts and BOTH, images_of(steps) or [[], []], strict=True):
        assert images == getattr(job.split, part).tolist() * (part in parts)
    for shares in ([n for _, n in steps], [len(indices) - n for indices, n in steps]):
        assert max(shares, default=0) - min(shares, default=0) <= 1


def test_no_step_is_empty():
    few = one_epoch(small_job("RL", retain=2, forget=2, batch_size=1))
    assert [len(indices) for indices, _ in few.steps("retain", "forget")] == [2, 2]


def test_retain_set_and_batch_size_of_a_method_replace_those_of_the_job():
    epoch, chosen = one_epoch(small_job("amun", batch_size=2)), torch.tensor([1, 3, 3, 29])
    steps = epoch.steps("retain", "forget", retain_set=chosen)
    assert images_of(steps) == [chosen.tolist(), epoch.job.split.forget.tolist()]
    indices = [batch.indices for batch in epoch.batches("retain", retain_set=chosen)]
    assert torch.cat(indices).sort().values.equal(chosen)
    for size, sizes in [(None, [2, 2, 2, 2, 2, 1]), (5, [4, 4, 3]), (64, [11])]:
        batches = [*epoch.batches("forget", batch_size=size)]
        assert [len(batch.indices) for batch in batches] == sizes


def test_order_depends_on_seed_method_part_and_epoch():
    def order(name="finetune", number=1, part="retain", **settings):
        job = small_job(name, retain=16, forget=16, batch_size=16, **settings)
        ((indices, _),) = one_epoch(job, number).steps(part)
        return indices.argsort().tolist()

    others = [order("scrub"), order(number=2), order(part="forget"), order(seed=5)]
    assert order() == order() and order() not in others


def test_cycle_passes_through_a_part_in_a_new_order_each_time():
    def batches(number):
        epoch = one_epoch(job, number)
        torch.seed()  # the order does not depend on the global generator
        return [*itertools.islice(epoch.cycle("forget"), 6)]

    job = small_job("sfron")
    first, again = batches(1), batches(1)
    assert [len(batch) for batch in first] == [8, 3] * 3
    passes = [torch.cat(first[i : i + 2]) for i in (0, 2, 4)]
    assert all(indices.sort().values.equal(job.split.forget) for indices in passes)
    assert not passes[0].equal(passes[1]) and not passes[1].equal(passes[2])
    assert all(map(torch.equal, first, again)) and not first[0].equal(batches(2)[0])


@pytest.mark.parametrize("name", ["finetune", "scrub", "sfron"])
def test_conformal_term_joins_forget_images_to_steps_without_any(name):
    """The retain images of a step, and the steps that have forget images, are the base method's."""
    base, variant = small_job(name), small_job(f"cpu_{name}", lamda=0.5)
    run(base), run(variant)
    shares = {1: [], 2: [], 3: []}
    for plain, joined in zip(training_steps(base), training_steps(variant), strict=True):
        assert joined[1].equal(plain[1])
        if len(plain[2]):
            assert joined[2].equal(plain[2])
        else:
            shares[joined[0]].append(joined[2])
    for epoch_shares in shares.values():
        assert torch.cat(epoch_shares).sort().values.equal(base.split.forget)
        assert {len(share) for share in epoch_shares} == {3, 4}
    assert not torch.cat(shares[1]).equal(torch.cat(shares[2]))
    order = torch.cat([indices for indices, _ in one_epoch(base).steps("forget")])
    assert torch.cat(shares[1]).equal(order)


def test_rows_of_a_batch_are_retain_images_then_forget_images():
    job = small_job("RL")
    batch = next(one_epoch(job).batches("retain", "forget"))
    assert batch.inputs.equal(BRIGHTER * job.data.train.inputs[batch.indices])
    assert batch.labels.equal(job.data.train.labels[batch.indices])
    retain, forget = batch.indices.split([batch.num_retain, len(batch.indices) - batch.num_retain])
    assert torch.isin(retain, job.split.retain).all()
    assert torch.isin(forget, job.split.forget).all() and batch.forget_indices.equal(forget)
    logits, labels = map(torch.cat, zip(batch.retain, batch.forget, strict=True))
    assert logits.equal(batch.logits) and labels.equal(batch.labels)
    assert len(batch.retain[0]) == len(batch.retain[1]) == len(retain) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_has_the_precision_of_training_and_no_gradient(precision):
    job, teacher, types = small_job("teacher", precision=precision), SmallNet(3).eval(), set()
    teacher[0].register_forward_hook(lambda _, inputs, outputs: types.add(outputs.dtype))
    batch = next(one_epoch(job).batches("retain", "forget"))
    logits = torch.cat([batch.outputs_of(teacher, part) for part in ("retain", "forget")])
    assert logits.dtype == torch.float32 and not logits.requires_grad
    tolerance = 0.1 if precision == "bf16" else 1e-4
    expected = ByHand(teacher).logits(batch.inputs).detach()
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}
    retain_only = next(one_epoch(job).batches("retain"))
    assert retain_only.outputs_of(nn.Identity(), "forget").shape == (0, 5)


def test_under_torchrun_a_batch_has_every_second_row_of_each_step(torchrun):
    job = small_job("finetune")
    steps = one_epoch(job).steps("retain", "forget")
    torchrun(rank=1)
    for (indices, num_retain), batch in zip(steps, one_epoch(job).visit(steps), strict=True):
        assert batch.indices.equal(indices[1::2])
        assert batch.num_retain == len(indices[:num_retain][1::2])
    assert len([*one_epoch(job).visit([(torch.tensor([4, 5]), 1)])]) == 1
    with pytest.raises(UserError, match="finetune.* 1 images.* 2 processes"):
        next(one_epoch(job).visit([(torch.tensor([4]), 1)]))


# ---------------------------------------------------------------- augmentation and modes


def test_only_batches_in_training_are_augmented_and_differently_in_every_epoch():
    job = small_job("finetune")
    train(job)
    seeds = [seed for _, seed in job.data.train.uses]
    # Three steps of each epoch with one generator, then the accuracies on retain and forget images.
    assert [seed is not None for seed in seeds] == 3 * [True, True, True, False, False]
    first, second, third = (set(seeds[start : start + 3]) for start in (0, 5, 10))
    assert len(first) == len(second) == len(third) == 1 and len(first | second | third) == 3
    assert not any(seed for _, seed in job.data.held_out.uses)


@pytest.mark.parametrize("eval_mode", [False, True])
def test_step_of_one_image_normalizes_by_running_statistics(eval_mode):
    job, modes = small_job("finetune", retain=5, batch_size=2, num_epochs=2, quiet=True), []
    hook = lambda norm, inputs: modes.append((len(inputs[0]), norm.training))  # noqa: E731
    job.model[1].register_forward_pre_hook(hook)
    train(job, eval_mode=eval_mode)
    assert sorted(modes) == 2 * [(1, False)] + 4 * [(2, not eval_mode)]


@pytest.mark.parametrize("lamda", [None, 0.5])
@pytest.mark.parametrize("retain", [17, 1])
def test_training_stays_in_train_mode_and_changes_statistics_in_every_epoch(retain, lamda):
    """q̂ and the accuracies, which are computed in eval mode, leave the model in train mode."""
    job, means = small_job("finetune", retain=retain, lamda=lamda), [torch.zeros(8)]
    for epoch in job.epochs():
        assert all(module.training for module in job.model.modules())
        for batch in epoch.batches("retain"):
            epoch.step(F.cross_entropy(*batch.retain), batch)
        means.append(job.model[1].running_mean.clone())
        one_image = retain == 1 and not lamda and epoch.number > 1
        assert means[-1].equal(means[-2]) == one_image


def test_dropout_depends_on_seed_and_epoch_only():
    def masks(seed, global_seed=0):
        torch.manual_seed(global_seed)
        job, drawn = small_job("finetune", seed=seed), []
        train(job, after_epoch=lambda epoch: drawn.append(torch.rand(9)))
        return torch.stack(drawn)

    assert masks(4).equal(masks(4, global_seed=99))
    assert not masks(4).equal(masks(5)) and len(masks(4).unique(dim=0)) == 3


# ---------------------------------------------------------------- steps of the optimizer


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_network_has_the_precision_of_the_recipe_and_weights_and_logits_float32(
    precision, expected
):
    job, types, logits = small_job("finetune", precision=precision), set(), set()
    job.model[0].register_forward_hook(lambda _, inputs, outputs: types.add(outputs.dtype))
    train(job, after_step=lambda batch: logits.add(batch.logits.dtype))
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32} == logits
    # The accuracies of an epoch's record have the precision of training, the final ones do not.
    assert types == {getattr(torch, expected)} and "test_acc" in job.records[0]
    job.accuracies()
    assert torch.float32 in types


def test_optimizer_is_not_fused_on_a_cpu_and_the_network_compiled_if_asked(monkeypatch):
    expected, sgd, marks, options = run(small_job("ga_plus")), torch.optim.SGD, [], []
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **o: options.append(o) or sgd(*a, **o))
    monkeypatch.setattr(torch, "compile", lambda model, **o: options.append(o) or model)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    assert same(run(small_job("ga_plus", compile=True)), expected)
    settings = {"momentum": 0.8, "weight_decay": 0.03, "fused": False}
    assert options == [settings, {"dynamic": False, "mode": "default"}]
    assert len(marks) == 9  # of the steps, which have two forward passes


def test_every_training_is_compiled_although_torch_compiles_eight_sizes_only(monkeypatch):
    graphs, torch_compile = [], torch.compile
    options = {"dynamic": False, "backend": lambda graph, _: graphs.append(graph) or graph.forward}
    monkeypatch.setattr(torch, "compile", lambda model, **_: torch_compile(model, **options))
    for size in range(4, 14):
        run(small_job("finetune", size, batch_size=20, num_epochs=1, quiet=True, compile=True))
    assert len(graphs) == 10


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in self.NAMES
        return function(*arguments, **(keywords or {}))


TRAINED = [name for name, entry in unlearn.METHODS.items() if entry.trained and name != "neg_merge"]


def job_of_all_epochs(label, **settings):
    """A quiet job of a method or variant that no accuracy ends."""
    name, options = label.removeprefix("cpu_"), {"quiet": True}
    if name == "lotus":
        options["forget_class"] = 0
    if name == "neg_merge":
        options["step_scale"] = 1.0
    return small_job(label, lamda=None if label == name else 0.5, **options | settings)


@pytest.mark.parametrize("label", [*TRAINED, "neg_merge", "cpu_finetune"])
def test_number_of_waits_for_the_device_does_not_depend_on_the_number_of_steps(label):
    counts = []
    for size in (24, 4):
        with Waits() as counter:
            run(job_of_all_epochs(label, retain=16, forget=8, num_epochs=1, batch_size=size))
        counts.append(counter.count)
    assert counts[0] == counts[1] > 0


# ---------------------------------------------------------------- records


def test_record_has_means_over_steps_and_images_of_its_epoch(monkeypatch):
    """Every reading of the clock is half a second after the previous reading."""
    ticks, correct, logged = itertools.count(100.0, 0.5), [], []
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    job = small_job("finetune", log=logged.append)
    losses = train(
        job, after_step=lambda batch: correct.append(batch.logits.argmax(1) == batch.labels)
    )
    assert logged == job.records and [record["epoch"] for record in logged] == [1, 2, 3]
    for number, record in enumerate(logged):
        steps = slice(3 * number, 3 * number + 3)
        assert record["loss"] == pytest.approx(sum(losses[steps]) / 3)
        assert record["train_acc"] == pytest.approx(torch.cat(correct[steps]).sum().item() / 19)
        assert record["images_per_second"] == pytest.approx(38)
        assert record["seconds"] == pytest.approx(1)
    measured = {part: logged[-1][f"{part}_acc"] for part in ("retain", "forget", "test")}
    assert measured == job.accuracies()


def test_quiet_run_measures_and_prints_no_accuracy(capsys):
    job = small_job("finetune", quiet=True)
    train(job)
    keys = {"epoch", "learning_rate", "loss", "train_acc", "images_per_second", "seconds"}
    assert job.records[0].keys() == keys and not capsys.readouterr().out
    assert all(seed for _, seed in job.data.train.uses)


def test_line_of_an_epoch_has_its_loss_accuracies_q_hat_and_speed():
    record = {"epoch": 2, "loss": 1.23456, "train_acc": 0.5, "test_acc": 0.25, "seconds": 3}
    record |= {"q_hat": 0.87654, "images_per_second": 1234.4}
    cells = ["RL epoch 2/3", "loss 1.2346", "train 50.0 %", "test 25.0 %", "q̂ 0.8765", "1234 img/s"]
    assert training.epoch_line(small_job("RL"), record).split("  ") == cells
    del record["q_hat"]
    assert "q̂" not in training.epoch_line(small_job("RL"), record)


def test_accuracies_are_those_of_each_set_by_the_logits_of_the_classes_of_the_data():
    job = small_job("finetune")
    split, train_set, held_out = job.split, job.data.train, job.data.held_out
    for images in (train_set, held_out):
        images.labels = (ByHand(job.model).logits(images.inputs).argmax(1) + 1) % 5
    # All predictions are wrong except 7, 2 and 5.
    right = [(train_set, split.retain[:7]), (train_set, split.forget[:2])]
    for images, indices in [*right, (held_out, split.test[:5])]:
        images.labels[indices] = (images.labels[indices] - 1) % 5
    expected = pytest.approx({"retain": 7 / 19, "forget": 2 / 11, "test": 5 / 12})
    assert job.accuracies() == expected and job.accuracies(limit=100) == expected
    assert job.accuracies(["forget"]) == pytest.approx({"forget": 2 / 11})

    linear, job.model[4] = job.model[4], nn.Linear(128, 6)
    with torch.no_grad():
        job.model[4].weight[:5], job.model[4].bias[:5] = linear.weight, linear.bias
        job.model[4].bias[5] = 1e3  # the additional class is the likeliest for every image
    assert job.accuracies() == expected
    assert small_job("finetune", forget=0).accuracies().keys() == {"retain", "test"}


def test_monitored_accuracies_are_those_of_a_fixed_random_sample():
    limit = training.MONITORED
    job = small_job("finetune", retain=limit + 100, batch_size=1000, num_epochs=2)
    train(job)
    monitored = sum((indices for indices, seed in job.data.train.uses if not seed), [])
    retain, forget = monitored[:limit], monitored[limit : limit + 11]
    assert monitored == 2 * (retain + forget) and forget == job.split.forget.tolist()
    assert len({*retain}) == limit and {*retain} < {*job.split.retain.tolist()}
    assert retain != job.split.retain.tolist()[:limit]
    expected = {f"{part}_acc": value for part, value in job.accuracies(limit=limit).items()}
    assert job.monitor() == expected


# ---------------------------------------------------------------- the end of training


def test_training_ends_at_the_higher_target_of_method_and_job_or_when_the_method_says_so():
    def num_epochs(stop_at=None, job_target=None, last=None, quiet=False):
        job = small_job("RL", num_epochs=4, stop_at=job_target, quiet=quiet)
        for epoch in job.epochs(stop_at):
            for batch in epoch.batches("forget"):
                epoch.step(0 * batch.logits.sum(), batch)
            epoch.is_last = epoch.number == last
        return len(job.records)

    assert num_epochs() == num_epochs(-1.0, -1.0) == 4
    assert num_epochs(1.0, -1.0) == num_epochs(-1.0, 1.0) == num_epochs(None, 1.0) == 1
    assert num_epochs(1.0, quiet=True) == 1
    assert num_epochs(last=2) == num_epochs(-1.0, last=2) == 2


@pytest.mark.parametrize(
    ("name", "value", "quiet"),
    [("1.running_var", math.nan, True), ("4.weight", math.nan, True)]
    + [("1.running_var", -1.0, False), ("4.weight", 3e38, False)],  # whose logits are not finite
)
def test_weight_statistic_or_logit_that_is_not_finite_is_divergence(name, value, quiet):
    def spoil(epoch):
        if epoch.number == 2:
            job.model.state_dict()[name].view(-1)[0] = value

    job = small_job("finetune", quiet=quiet)
    with pytest.raises(Diverged, match="finetune.* epoch 2"):
        train(job, after_epoch=spoil)
    assert len(job.records) == 1 and training.weights_are_finite(job.model) != quiet


def test_divergence_names_epoch_learning_rate_and_loss():
    job = small_job("finetune")
    with pytest.raises(Diverged, match="epoch 1 .*0.05.*inf"):
        for epoch in job.epochs():
            for batch in epoch.batches("retain"):
                epoch.step(F.cross_entropy(*batch.retain) + math.inf, batch)
    assert training.weights_are_finite(job.model)


# ---------------------------------------------------------------- resuming


class Interrupting(Tensors):
    """Raises InterruptedError in the second step of an epoch of training, counted from 1."""

    stop_in = None

    def batches(self, index_batches, augment=None):
        for number, inputs in enumerate(super().batches(index_batches, augment)):
            if augment and number == 1 and num_epochs_seen(self) == self.stop_in:
                raise InterruptedError
            yield inputs


def num_epochs_seen(images):
    return len({seed for _, seed in images.uses if seed})


def resumable(folder, label, *, resume=False, identity=1, stop_in=None, **settings):
    """A job of three epochs, interrupted in epoch ``stop_in``, and the records that it logs."""
    progress = Progress(folder / "resume.pth", identity, resume=resume, save_every=math.inf)
    settings = {"num_epochs": 3} | settings
    job, logged = job_of_all_epochs(label, progress=progress, **settings), []
    job.log = logged.append
    job.data.train = Interrupting(job.data.train.inputs, job.data.train.labels)
    job.data.train.stop_in = stop_in
    return job, logged


def interrupt(folder, label, stop_in, **settings):
    """Interrupt a job and save its state, if it has any."""
    job, _ = resumable(folder, label, stop_in=stop_in, **settings)
    with pytest.raises(InterruptedError):
        run(job)
    job.progress.save()


def interrupt_and_resume(folder, label, stop_in, **settings):
    """A resumed job and its log. Its weights and records are those of an uninterrupted one."""
    whole, expected_log = resumable(folder, label, **settings)
    expected = run(whole)
    interrupt(folder, label, stop_in, **settings)
    resumed, logged = resumable(folder, label, resume=True, **settings)
    assert same(run(resumed), expected)
    assert without_times(logged) == without_times(expected_log)
    assert resumed.by_products.keys() == whole.by_products.keys()
    assert not whole.term or resumed.term.q_hats == whole.term.q_hats
    return resumed, logged


def without_times(records):
    times = ("seconds", "images_per_second")
    return [{key: v for key, v in record.items() if key not in times} for record in records]


@pytest.mark.parametrize("label", [*TRAINED, *unlearn_cpu.METHODS])
def test_resumed_run_has_weights_and_records_of_an_uninterrupted_run(label, tmp_path):
    resumed, logged = interrupt_and_resume(tmp_path, label, 2)
    assert len(logged) == 3 and resumed.records == logged
    assert num_epochs_seen(resumed.data.train) == 2


def test_resumed_sfron_of_a_number_of_steps_ends_in_the_same_step(tmp_path):
    resumed, logged = interrupt_and_resume(tmp_path, "sfron", 2, num_steps=7)
    assert len(logged) == 3 and resumed.recipe.num_epochs == 3


def test_resumed_mu_mis_ends_by_the_sensitivities_before_the_interruption(tmp_path):
    settings = {"recovery": 0.1, "learning_rate": 0.002, "num_epochs": 30}
    resumed, logged = interrupt_and_resume(tmp_path, "mu_mis", 4, **settings)
    assert len(logged) == 5 and not resumed.progress.restored["ended"]


def test_run_interrupted_twice_has_the_weights_of_an_uninterrupted_run(tmp_path):
    interrupt(tmp_path, "cpu_scrub", 2)
    interrupt(tmp_path, "cpu_scrub", 2, resume=True)  # in the third of all epochs
    resumed, _ = resumable(tmp_path, "cpu_scrub", resume=True)
    assert len(resumed.progress.restored["records"]) == 2
    assert same(run(resumed), run(resumable(tmp_path, "cpu_scrub")[0]))


def test_resumed_neg_merge_begins_again_with_its_first_training(tmp_path):
    """Its trainings do not save a state: the next one would continue after the end of the last."""
    resumed, logged = interrupt_and_resume(tmp_path, "neg_merge", 5)
    assert [record["epoch"] for record in logged] == [*range(1, 16)]
    assert not (tmp_path / "resume.pth").exists()
    part = unlearn.fine_tuning(resumed, 2, 0.125)
    assert (part.name, part.label) == ("neg_merge 3", "neg_merge 3/5")
    assert part.recipe == replace(resumed.recipe, learning_rate=0.125)


def test_resumed_scrub_with_rewind_returns_to_an_epoch_before_the_interruption(tmp_path):
    options = {"rewind": True, "beta": 0.001, "learning_rate": 0.2, "quiet": False}
    resumed, _ = interrupt_and_resume(tmp_path, "scrub", 3, **options)
    assert len(resumed.weights_after) == 3 and not same(*resumed.weights_after[:2])
    assert any(same(resumed.weights_after[i], resumed.model.state_dict()) for i in range(2))


def test_resumed_run_that_had_ended_early_is_not_trained_further(tmp_path):
    first, expected_log = resumable(tmp_path, "GA", stop_at=1.0)
    expected = run(first)
    assert len(first.records) == 1 and first.progress.save()
    again, logged = resumable(tmp_path, "GA", resume=True, stop_at=1.0)
    assert same(run(again), expected)
    assert not training_steps(again) and logged == expected_log


@pytest.mark.parametrize("content", [None, [], {"records": []}])
def test_state_is_read_with_resume_only_and_that_of_another_run_is_refused(content, tmp_path):
    if content is None:
        interrupt(tmp_path, "finetune", 3, identity=2)
    else:
        torch.save(content, tmp_path / "resume.pth")
    assert resumable(tmp_path, "finetune")[0].progress.restored is None
    assert resumable(tmp_path / "none", "finetune", resume=True)[0].progress.restored is None
    with pytest.raises(UserError, match=r"--resume.*resume\.pth"):
        resumable(tmp_path, "finetune", resume=True)


class Interrupts:
    """Raises KeyboardInterrupt when it is saved."""

    def __reduce__(self):
        raise KeyboardInterrupt


def test_interruption_while_the_state_is_copied_keeps_the_previous_state(tmp_path):
    job = small_job("finetune")
    progress = Progress(tmp_path / "resume.pth", {}, resume=False, save_every=math.inf)
    state = TrainingState(job)
    progress.update(state)
    job.records.append(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        progress.update(state)
    assert progress.save() and not checkpoint.read_state(progress.path)["records"]


def test_state_is_saved_every_save_every_seconds_and_on_demand(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    path, job = tmp_path / "resume.pth", small_job("finetune")
    progress = Progress(path, {}, resume=False, save_every=10.0)
    assert not progress.save() and not path.exists()  # no epoch is complete
    state, saved = TrainingState(job), []
    for epoch, seconds in enumerate([3, 9.9, 10, 12, 19.9, 20, 25], 1):
        now[0] = seconds
        job.records.append({"epoch": epoch})
        progress.update(state)
        saved.append(len(checkpoint.read_state(path)["records"]) if path.exists() else 0)
    assert saved == [0, 0, 3, 3, 3, 6, 6] and progress.seconds == 25
    job.records.append({"epoch": 8})  # further training does not change the state
    job.model[4].bias.data += 1
    assert progress.save()
    kept = checkpoint.read_state(path)
    assert len(kept["records"]) == 7 and same(kept["model"], SmallNet().state_dict())
    now[0] = 100.0
    resumed = Progress(path, {}, resume=True, save_every=10.0)
    now[0] = 104.0
    assert resumed.seconds == 29 and resumed.save()  # 25 before it stopped, 4 since
