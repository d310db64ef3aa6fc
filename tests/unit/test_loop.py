"""The training loop on the small problem: records, progress bar, train mode, resuming."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small import ByHand, run, small_job, training_steps
from torch import nn

import unlearn
import utils
from models import checkpoint, distributed


class Bar:
    """Replaces tqdm and records its updates."""

    def __init__(self, **options):
        self.options, self.n, self.total = options, 0, options.get("total")
        self.history, self.closed = [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def reset(self, total):
        self.n, self.total = 0, total

    def update(self, count):
        self.n += count
        self.history.append(self.n / self.total)

    def set_postfix(self, **shown):
        self.shown = shown

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    made = []
    monkeypatch.setattr(
        distributed, "progress_bar", lambda **options: made.append(Bar(**options)) or made[-1]
    )
    return made


@pytest.fixture
def clock(monkeypatch):
    """Every reading of the clock is half a second after the previous reading."""
    ticks = itertools.count(100.0, 0.5)
    stopped = {"thread_time": lambda: 0.0}
    clocks = SimpleNamespace(perf_counter=lambda: next(ticks), **stopped)
    monkeypatch.setattr(unlearn, "time", clocks)


def same(first, second):
    equal = all(first[name].equal(tensor) for name, tensor in second.items())
    return equal and first.keys() == second.keys()


# ---------------------------------------------------------------- records


def test_record_has_means_over_steps_and_images_of_its_epoch(clock, bars):
    records, losses, correct = [], [], []
    job = small_job("finetune", epoch_done=records.append)

    def loss(batch):
        losses.append(unlearn.retain_cross_entropy(batch))
        correct.append((batch.logits.argmax(1) == batch.labels).tolist())
        return losses[-1]

    unlearn.train(job, loss)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert len(losses) == 9
    for number, record in enumerate(records):
        steps = slice(3 * number, 3 * number + 3)
        assert record["loss"] == pytest.approx(sum(loss.item() for loss in losses[steps]) / 3)
        correct_images = sum(correct[steps], [])
        assert len(correct_images) == 19
        assert record["train_acc"] == pytest.approx(sum(correct_images) / 19)
        assert record["images_per_second"] == pytest.approx(38)
        assert record["seconds"] == pytest.approx(1)
    assert bars[0].shown == {
        "epoch": 3,
        "loss": f"{records[-1]['loss']:.3f}",
        "acc": f"{records[-1]['train_acc']:.3f}",
    }


def test_quiet_run_measures_and_prints_no_accuracy(capsys):
    records = []
    job = small_job("finetune", quiet=True, epoch_done=records.append)
    run(job)
    measured = {key for record in records for key in record}
    assert not measured & {"retain_acc", "forget_acc", "test_acc"}
    assert capsys.readouterr().out == ""
    assert not any(seed is None for _, seed in job.data.train.uses)


def test_epoch_line_shows_loss_accuracies_and_speed(capsys):
    job = small_job("cpu_finetune", lamda=0.5)
    record = {"epoch": 2, "loss": 1.23456, "train_acc": 0.5, "test_acc": 0.25, "q_hat": 0.87654}
    line = unlearn.epoch_line(job, record | {"images_per_second": 1234.4})
    assert line.split("  ") == [
        "cpu_finetune epoch 2/3",
        "loss 1.2346",
        "train 50.0 %",
        "test 25.0 %",
        "q̂ 0.8765",
        "1234 img/s",
    ]
    run(replace(job, term=None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("retain" in line and "forget" in line for line in lines)
    assert not any("q̂" in line for line in lines)


def one_thread(job, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return job


def two_processes(job, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    return job


def images_in_files(job, monkeypatch):
    monkeypatch.setattr(job.data.train, "pixels", utils.ImageFiles([], 8, 0))
    return job


def on_another_device(job, monkeypatch):
    monkeypatch.setattr(unlearn.Job, "device", torch.device("meta"))
    return job


def with_the_compiler(job, monkeypatch):
    return replace(job, compile=True)


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds", "waits"),
    [(2.0, 1.3, True), (2.0, 1.5, False), (0.6, 0.0, True), (0.4, 0.0, False)],
)
def test_training_waits_if_it_had_a_core_for_less_than_seven_tenths(
    seconds, cpu_seconds, waits, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert unlearn.waits_for_busy_cores(small_job("finetune"), seconds, cpu_seconds) is waits


@pytest.mark.parametrize(
    "change", [one_thread, two_processes, images_in_files, on_another_device, with_the_compiler]
)
def test_training_that_waits_for_another_reason_is_not_said_to_wait_for_cores(change, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    job = small_job("finetune")
    assert unlearn.waits_for_busy_cores(job, 2.0, 0.1)
    assert not unlearn.waits_for_busy_cores(change(job, monkeypatch), 2.0, 0.1)


def test_busy_cores_are_reported_once(monkeypatch, capsys):
    """The clock shows that each epoch took two seconds, and that its thread had a core for one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clocks = {"perf_counter": itertools.count(0.0, 2.0), "thread_time": itertools.count(0.0, 1.0)}
    readings = {name: partial(next, clock) for name, clock in clocks.items()}
    monkeypatch.setattr(unlearn, "time", SimpleNamespace(**readings))
    unlearn.print_once.cache_clear()
    run(small_job("finetune", quiet=True))
    assert not capsys.readouterr().out
    for _ in range(2):
        run(small_job("finetune"))
    unlearn.print_once.cache_clear()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "epoch" not in line)
    assert "OMP_NUM_THREADS=1" in line


def test_accuracies_are_measured_on_each_set_without_augmentation():
    job = small_job("finetune")
    split, train, held_out = job.split, job.data.train, job.data.held_out
    for images in (train, held_out):
        predictions = ByHand(job.model).logits(images.inputs).argmax(1)
        images.labels = (predictions + 1) % 5
    # All predictions are wrong except 7, 2 and 5.
    for images, indices in (
        (train, split.retain[:7]),
        (train, split.forget[:2]),
        (held_out, split.test[:5]),
    ):
        images.labels[indices] = (images.labels[indices] - 1) % 5
    assert unlearn.accuracies(job) == pytest.approx(
        {"retain": 7 / 19, "forget": 2 / 11, "test": 5 / 12}
    )
    assert unlearn.accuracies(job, 100) == unlearn.accuracies(job)


def test_monitored_accuracies_are_measured_on_a_fixed_sample():
    job = small_job("finetune")
    job.data.train.uses.clear()
    first, second = unlearn.accuracies(job, 11), unlearn.accuracies(job, 11)
    (retain, _), (forget, _), (again, _), _ = job.data.train.uses
    assert first == second
    assert retain == again
    assert len(set(retain)) == 11
    assert set(retain) < set(job.split.retain.tolist())
    assert forget == job.split.forget.tolist()
    assert retain != job.split.retain.tolist()[:11]


# ---------------------------------------------------------------- progress bar


@pytest.mark.parametrize("label", ["finetune", "cpu_finetune"])
def test_progress_bar_after_each_epoch_shows_share_of_finished_epochs(label, bars):
    shares = []

    def epoch_done(record):
        shares.append(bars[0].n / bars[0].total)

    lamda, num_images = (None, 19) if label == "finetune" else (0.5, 30)
    run(small_job(label, lamda=lamda, quiet=True, epoch_done=epoch_done))
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    assert bars[0].total == 3 * num_images
    assert bars[0].history == sorted(bars[0].history) and bars[0].closed
    assert bars[0].options == {"desc": label, "unit": "img", "unit_scale": True}


def test_progress_bar_of_importances_counts_images(bars):
    for importances in ("image", "batch"):
        run(small_job("ssd", retain=140, importances=importances, importance_batches=0))
    assert [bar.n for bar in bars] == [151, 11] * 2
    assert [bar.options for bar in bars] == [
        {"total": n, "desc": "importances", "unit": "img"} for n in (151, 11, 151, 11)
    ]


# ---------------------------------------------------------------- modes


def test_step_of_one_image_normalises_by_running_statistics():
    job, passes = small_job("finetune", retain=5, batch_size=2, num_epochs=1, quiet=True), []
    job.model[1].register_forward_pre_hook(
        lambda norm, inputs: passes.append((len(inputs[0]), norm.training))
    )
    run(job)
    assert sorted(passes) == [(1, False), (2, True), (2, True)]


@pytest.mark.parametrize(
    ("label", "retain"), [("finetune", 17), ("cpu_finetune", 17), ("finetune", 1)]
)
def test_model_after_every_epoch_is_in_train_mode(label, retain):
    job, modes = small_job(label, retain=retain, lamda=0.5 if label != "finetune" else None), []

    def epoch_done(record):
        modes.append([module.training for module in job.model.modules()])

    run(replace(job, epoch_done=epoch_done))
    assert all(all(training) for training in modes) and len(modes) == 3


def test_dropout_depends_on_seed_and_epoch_only():
    def weights(seed, before=lambda: None):
        job = small_job("finetune", seed=seed)
        job.model.insert(4, nn.Dropout(0.5))
        before()
        return run(job)

    first = weights(4)
    assert same(weights(4, lambda: torch.manual_seed(99)), first)
    assert not same(weights(5), first)


def test_autocast_is_on_for_bf16_only():
    seen = []
    for precision in ("fp32", "bf16"):
        job = small_job("finetune", precision=precision, num_epochs=1)
        job.model[0].register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        run(job)
        assert all(parameter.dtype == torch.float32 for parameter in job.model.parameters())
        assert set(seen) == {torch.float32 if precision == "fp32" else torch.bfloat16}
        seen.clear()


@pytest.mark.parametrize("name", ["teacher", "scrub", "delete", "lotus"])
def test_a_teacher_runs_in_the_precision_of_the_training(name, monkeypatch):
    job, seen = small_job(name, precision="bf16", num_epochs=1), []

    def outputs_of(batch, network, part, original=unlearn.Batch.outputs_of):
        layer = network[0]
        hook = layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        outputs = original(batch, network, part)
        hook.remove()
        assert outputs.dtype == torch.float32 and not outputs.requires_grad
        return outputs

    monkeypatch.setattr(unlearn.Batch, "outputs_of", outputs_of)
    run(job)
    assert set(seen) == {torch.bfloat16}


def test_optimizer_on_cpu_is_not_fused(monkeypatch):
    plain, optimizer_options = torch.optim.SGD, []

    def recording_sgd(*arguments, **options):
        optimizer_options.append(options)
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.optim, "SGD", recording_sgd)
    run(small_job("finetune"))
    assert optimizer_options == [{"momentum": 0.8, "weight_decay": 0.03, "fused": False}]


def test_compiled_network_has_static_shapes_and_marks_every_step(monkeypatch):
    compilations, marks = [], []

    def compile(network, **options):
        compilations.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    job, plain = small_job("finetune", compile=True), small_job("finetune")
    assert same(run(job), run(plain))
    assert compilations == [{"dynamic": False, "mode": "default"}]
    assert len(marks) == 9
    unlearn.compiled(job.model, torch.device("cuda"))
    assert compilations[1] == {"dynamic": False, "mode": "reduce-overhead"}


class CompilerFails(Exception):
    """Replaces the exception of torch._dynamo, which takes two seconds to import."""

    def __init__(self, reason):
        super().__init__("backend raised:\n" + reason)
        self.inner_exception = ValueError(reason)


class Failing(torch.autograd.Function):
    """The identity, whose forward or backward pass raises an error."""

    @staticmethod
    def forward(context, inputs, error, fails_in):
        context.error = error
        if fails_in == "forward":
            raise error
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        raise context.error


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize("kind", [CompilerFails, ImportError, RuntimeError])
def test_failing_compiler_is_reported_in_one_line(kind, fails_in, monkeypatch):
    def compile(network, **options):
        return lambda inputs: Failing.apply(network(inputs), kind("no C++\nmore"), fails_in)

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    exceptions = SimpleNamespace(TorchDynamoException=CompilerFails)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "_dynamo", SimpleNamespace(exc=exceptions), raising=False)
    error, text = utils.UserError, "^--compile: no C\\+\\+; leave it out$"
    if kind is RuntimeError:  # not of the compiler
        error, text = RuntimeError, "^no C\\+\\+\nmore$"
    with pytest.raises(error, match=text):
        run(small_job("finetune", compile=True))


def test_import_error_without_the_compiler_is_not_the_compilers():
    def loss(batch):
        return Failing.apply(unlearn.retain_cross_entropy(batch), ImportError("own"), "backward")

    with pytest.raises(ImportError, match="own"):
        unlearn.train(small_job("finetune"), loss)


def test_divergence_closes_progress_bar_and_names_method_epoch_and_rate(bars):
    job = small_job("finetune", learning_rate=1e12)
    message = r"^finetune diverged in epoch 1 at learning rate 1e\+12: the loss is"
    with pytest.raises(unlearn.Diverged, match=message):
        run(job)
    assert bars[0].closed

    job = small_job("finetune")
    with pytest.raises(unlearn.Diverged, match="the loss is inf"):
        unlearn.train(job, lambda batch: unlearn.retain_cross_entropy(batch) + math.inf)
    assert unlearn.weights_are_finite(job.model)


@pytest.mark.parametrize(
    ("name", "action"), [("finetune", run), ("salun", unlearn.saliency_mask), ("ssd", run)]
)
def test_missing_batch_is_an_error(name, action):
    job = small_job(name)
    plain = job.data.train.batches

    def all_but_one(index_batches, augment=None):
        return list(plain(index_batches, augment))[:-1]

    job.data.train.batches = all_but_one
    with pytest.raises(ValueError, match="shorter"):
        action(job)


# ---------------------------------------------------------------- resuming


class Stop(Exception):
    pass


def resumable(tmp_path, label, resume=False, stop_in=None, identity=None, **settings):
    """(job, records) of a job that saves its state after every epoch.

    The job stops in the second step of epoch ``stop_in``.
    """
    records, path = [], tmp_path / "resume.pth"
    progress = unlearn.Progress(path, identity or {"a": 1}, resume=resume, save_every=0.0)
    job = small_job(
        label,
        lamda=0.5 if label.startswith("cpu_") else None,
        num_epochs=5,
        progress=progress,
        epoch_done=records.append,
        **settings,
    )
    if stop_in:
        plain, count = job.data.train.batches, itertools.count()

        def batches(index_batches, augment=None):
            training = augment is not None and len(records) + 1 == stop_in
            for number, inputs in enumerate(plain(index_batches, augment)):
                if training and number == 1 and next(count) == 0:
                    raise Stop
                yield inputs

        job.data.train.batches = batches
    return job, records


def interrupt_and_resume(tmp_path, label, stop_in, **options):
    """Two pairs (job, records): of an uninterrupted run and of a resumed one with equal weights."""
    whole, expected_records = resumable(tmp_path / "none", label, **options)
    expected = run(replace(whole, progress=None))
    with pytest.raises(Stop):
        run(resumable(tmp_path, label, stop_in=stop_in, **options)[0])
    resumed, records = resumable(tmp_path, label, resume=True, **options)
    assert same(run(resumed), expected)
    return (whole, expected_records), (resumed, records)


def without_times(records):
    times = ("seconds", "images_per_second")
    return [{key: v for key, v in record.items() if key not in times} for record in records]


@pytest.mark.parametrize(
    "label",
    [
        "finetune",
        "scrub",
        "sfron",
        "salun",
        "teacher",
        "cpu_finetune",
        "retrain",
        "l1_sparse",
        "lotus",
        "amun",
        "mu_mis",
        "cpu_amun",
    ],
)
@pytest.mark.parametrize("stop_in", [2, 4])
def test_resumed_run_has_weights_and_records_of_uninterrupted_run(label, stop_in, tmp_path):
    options = {
        "mu_mis": {"stop_accuracy": -1.0, "learning_rate": 1e-3},
        "lotus": {"forget_class": 0},
        "amun": {"forget_images": "leave"},
    }.get(label.removeprefix("cpu_"), {})
    (whole, expected_records), (resumed, records) = interrupt_and_resume(
        tmp_path, label, stop_in, **options
    )
    assert without_times(records) == without_times(expected_records)
    assert {epoch for epoch, *_ in training_steps(resumed)} == set(range(1, 5 - (stop_in - 1) + 1))
    if whole.term:
        assert resumed.term.q_hats == whole.term.q_hats
        assert len(set(whole.term.q_hats)) == 5


def test_resumed_neg_merge_begins_again_with_its_first_training(tmp_path):
    """Its trainings do not save a state: the next one would go on from the end of the last."""
    _, (_, records) = interrupt_and_resume(tmp_path, "neg_merge", 8, step_scale=1.0)
    assert [record["epoch"] for record in records] == [*range(1, 26)]


def test_resumed_scrub_with_rewind_returns_to_an_epoch_before_the_interruption(tmp_path):
    options = {"rewind": True, "msteps": 4, "learning_rate": 0.2}
    (whole, records), _ = interrupt_and_resume(tmp_path, "scrub", 4, **options)
    reference = unlearn.matched_accuracy(replace(whole, model=unrewound(options)))
    distances = [abs(record["forget_acc"] - reference) for record in records]
    assert distances.index(min(distances)) < 3  # before the interruption


def unrewound(options):
    job = small_job("scrub", num_epochs=5, **(options | {"rewind": False}))
    return unlearn.METHODS["scrub"].run(job)


def test_resumed_run_that_had_stopped_early_is_not_trained_further(tmp_path):
    first, records = resumable(tmp_path, "GA", stop_accuracy=1.0)
    expected = run(first)
    assert len(records) == 1
    again, repeated = resumable(tmp_path, "GA", resume=True, stop_accuracy=1.0)
    assert same(run(again), expected)
    assert not training_steps(again)
    assert repeated == records


def test_progress_bar_of_resumed_run_starts_at_finished_epochs(tmp_path, bars):
    with pytest.raises(Stop):
        run(resumable(tmp_path, "finetune", stop_in=4)[0])
    run(resumable(tmp_path, "finetune", resume=True)[0])
    assert bars[1].history[0] == 3 / 5 and bars[1].history[-1] == 1


def test_saved_state_without_resume_is_not_read(tmp_path):
    with pytest.raises(Stop):
        run(resumable(tmp_path, "finetune", stop_in=3)[0])
    assert resumable(tmp_path, "finetune")[0].progress.restored is None
    elsewhere, _ = resumable(tmp_path / "elsewhere", "finetune", resume=True)
    assert elsewhere.progress.restored is None


@pytest.mark.parametrize("content", [None, [], {"epoch": 3}])
def test_resume_from_state_of_another_run_is_refused(content, tmp_path):
    if content is None:
        with pytest.raises(Stop):
            run(resumable(tmp_path, "finetune", stop_in=3, identity={"a": 2})[0])
    else:
        checkpoint.save_state(tmp_path / "resume.pth", content)
    with pytest.raises(utils.UserError, match=r"--resume: .*resume.pth .* other flags"):
        resumable(tmp_path, "finetune", resume=True)


def test_state_is_saved_every_save_every_seconds_and_on_demand(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(unlearn, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    path, job = tmp_path / "resume.pth", small_job("finetune")
    progress = unlearn.Progress(path, {}, resume=False, save_every=10.0)
    assert not progress.save() and not path.exists()  # no epoch is finished
    optimizer = torch.optim.SGD(job.model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    state, saved = unlearn.TrainingState(job.model, optimizer, scheduler), []
    for epoch, seconds in enumerate([3, 9.9, 10, 12, 19.9, 20, 25], 1):
        now[0] = seconds
        state.epoch = epoch
        progress.update(state)
        saved.append(checkpoint.read_state(path)["epoch"] if path.exists() else 0)
    assert saved == [0, 0, 3, 3, 3, 6, 6] and progress.seconds == 25
    assert progress.save() and checkpoint.read_state(path)["epoch"] == 7
    now[0] = 100.0
    resumed = unlearn.Progress(path, {}, resume=True, save_every=10.0)
    now[0] = 104.0
    assert resumed.seconds == 29 and resumed.save()  # 25 before it stopped, 4 since


def test_state_on_second_process_is_not_saved(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(resumable(tmp_path, "finetune", stop_in=3)[0])
    before = (tmp_path / "resume.pth").read_bytes()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    run(resumable(tmp_path, "finetune", resume=True)[0])
    assert (tmp_path / "resume.pth").read_bytes() == before


def test_saved_state_is_not_changed_by_further_training(tmp_path):
    job, _ = resumable(tmp_path, "finetune", stop_in=3)
    job.progress.save_every = math.inf
    with pytest.raises(Stop):
        run(job)
    uninterrupted, snapshots = small_job("finetune", num_epochs=5), []

    def epoch_done(record):
        snapshots.append(copy.deepcopy(uninterrupted.model.state_dict()))

    run(replace(uninterrupted, epoch_done=epoch_done))
    assert job.progress.save()
    state = checkpoint.read_state(tmp_path / "resume.pth")
    assert state["epoch"] == len(state["records"]) == 2
    assert same(state["model"], snapshots[1])
