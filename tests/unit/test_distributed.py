"""Rows, sums and BatchNorm on several processes equal those on one process."""

import itertools
import signal

import pytest
import torch
from test_layout import stem_and
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from turns import Processes

import utils
from models import distributed

SHAPES = {
    "vectors": (lambda: nn.BatchNorm1d(8), (8,)),
    "sequences": (lambda: nn.BatchNorm1d(8), (8, 3)),
    "images": (lambda: nn.BatchNorm2d(8, eps=0.1, momentum=0.3), (8, 2, 3)),
    "volumes": (lambda: nn.BatchNorm3d(8), (8, 2, 1, 2)),
    "no weight": (lambda: nn.BatchNorm2d(8, affine=False), (8, 2, 2)),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), (8, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(8, momentum=None), (8, 2, 2)),
    "no momentum": (lambda: nn.BatchNorm2d(8, momentum=0.0), (8, 2, 2)),
    "activation of timm": (lambda: BatchNormAct2d(8, act_layer=nn.SiLU), (8, 2, 2)),
}


def network(make_layer):
    """A normalisation and an activation with random statistics and weights."""
    model = nn.Sequential(make_layer(), nn.PReLU(8)).double()
    rng = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
    return model


def trained(model, images, factors):
    """Outputs, gradients and statistics after one step of Σ factors · outputs²."""
    images = images.clone().requires_grad_()
    outputs = model(images)
    model.zero_grad()
    (factors * outputs**2).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return outputs.detach(), images.grad, gradients, [b.clone() for b in model.buffers()]


@pytest.fixture
def float_is_double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.usefixtures("float_is_double")
@pytest.mark.parametrize(("world", "count"), [(2, 7), (3, 8), (3, 2)])
@pytest.mark.parametrize("kind", SHAPES)
def test_batch_norm_on_several_processes_equals_that_on_one(kind, world, count, monkeypatch):
    make_layer, shape = SHAPES[kind]
    rng = torch.Generator().manual_seed(0)
    images = 3 + 2 * torch.randn(count, *shape, generator=rng, dtype=torch.float64)
    factors = torch.rand(count, *shape, generator=rng, dtype=torch.float64)
    expected = trained(network(make_layer), images, factors)

    def step():
        model = network(make_layer)
        distributed.synchronise_batch_norm(model)
        return trained(model, *map(distributed.local_rows, (images, factors)))

    # Two exchanges forward and two backward.
    results = Processes(monkeypatch, world, rounds=5).run(step)
    for rank, (outputs, gradient, _, buffers) in enumerate(results):
        torch.testing.assert_close(outputs, expected[0][rank::world])
        torch.testing.assert_close(gradient, expected[1][rank::world])
        for buffer, of_one in zip(buffers, expected[3], strict=True):
            torch.testing.assert_close(buffer, of_one)
    for number, of_one in enumerate(expected[2]):
        torch.testing.assert_close(sum(gradients[number] for _, _, gradients, _ in results), of_one)


def test_synchronised_batch_norm_keeps_the_type_of_its_input(monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(8))
    distributed.synchronise_batch_norm(model)
    images = torch.randn(4, 8, 2, 2).bfloat16()
    outputs = Processes(monkeypatch, 2, rounds=4).run(lambda: model(images))
    assert outputs[0].dtype == torch.bfloat16


class Frozen(nn.BatchNorm2d):
    """Normalises by its running statistics in training, too."""

    def forward(self, images):
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias)


class Plain(nn.BatchNorm2d):
    """Normalises by the batch, with torch's defaults."""

    def forward(self, images):
        return F.batch_norm(images, self.running_mean, self.running_var, training=True)


@pytest.mark.usefixtures("float_is_double")
@pytest.mark.parametrize("layer", [Frozen, Plain])
def test_synchronised_layer_without_some_batch_norm_arguments_works(layer, monkeypatch):
    images = 0.01 * torch.randn(6, 8, 2, 2, dtype=torch.float64)
    expected = network(lambda: layer(8))
    outputs = expected(images)

    def step():
        model = network(lambda: layer(8))
        distributed.synchronise_batch_norm(model)
        return model(distributed.local_rows(images)), model[0].running_var

    for rank, (results, variance) in enumerate(Processes(monkeypatch, 2, rounds=4).run(step)):
        torch.testing.assert_close(results, outputs[rank::2])
        torch.testing.assert_close(variance, expected[0].running_var)


class Shared(nn.Module):
    """A BatchNorm layer under two names, and a BatchNorm with activation from timm."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(8)
        self.inner = nn.ModuleDict({"again": self.first, "activated": BatchNormAct2d(8)})

    def forward(self, images):
        return self.inner["activated"](self.inner["again"](self.first(images)))


@pytest.mark.parametrize("convert", ["cpu", "gpu"])
def test_conversion_keeps_names_tensors_settings_and_outputs(convert):
    model = Shared().eval()
    model.first.momentum = 0.0
    model.first.running_mean.fill_(0.3)
    images = torch.randn(2, 8, 3, 3)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    names, outputs = list(model.state_dict()), model(images)
    if convert == "gpu":
        distributed._convert_on_gpu(model)
    else:
        distributed.synchronise_batch_norm(model)
    converted = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(model.state_dict()) == names and converted.keys() == tensors.keys()
    assert all(converted[name] is tensor for name, tensor in tensors.items())
    assert model.first.momentum == 0.0 and not model.first.training
    torch.testing.assert_close(model(images), outputs)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    kind = nn.SyncBatchNorm if convert == "gpu" else distributed.SyncOnCPU
    assert layers and all(isinstance(layer, kind) for layer in layers)


def test_layer_under_two_names_stays_one_layer():
    model = Shared()
    distributed.synchronise_batch_norm(model)
    assert model.first is model.inner["again"] and isinstance(model.first, distributed.SyncOnCPU)


@pytest.mark.parametrize("convert", ["cpu", "gpu"])
def test_second_conversion_changes_nothing(convert):
    model = Shared()
    if convert == "gpu":
        distributed._convert_on_gpu(model)
    distributed.synchronise_batch_norm(model)
    layers = list(model.modules())
    distributed.synchronise_batch_norm(model)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


def test_network_without_batch_norm_is_unchanged():
    model = stem_and(nn.ReLU())
    layers = list(model)
    distributed.synchronise_batch_norm(model)
    assert list(model) == layers


def test_empty_input_of_sync_batch_norm_is_float32():
    model = Shared()
    distributed._convert_on_gpu(model)
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    for count in (0, 2):
        model.eval()(torch.randn(count, 8, 2, 2).bfloat16())
    assert seen[0] == torch.float32 and seen[-1] == torch.bfloat16


def test_model_on_gpu_gets_layers_of_torch(monkeypatch):
    class OnGPU(nn.Parameter):
        is_cuda = True

    model = nn.Sequential(nn.BatchNorm1d(8))
    model[0].weight = OnGPU(torch.ones(8))
    distributed.synchronise_batch_norm(model)
    assert type(model[0]) is nn.SyncBatchNorm


# ---------------------------------------------------------------- processes


@pytest.fixture
def torchrun(monkeypatch):
    def start(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return start


def test_rank_and_world_size_are_those_of_torchrun(torchrun):
    torchrun(RANK="3", WORLD_SIZE="5")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    torchrun(TORCHELASTIC_RUN_ID="none")
    assert (distributed.rank(), distributed.world_size()) == (3, 5)


@pytest.mark.parametrize(
    ("world", "device", "joined", "backends"),
    [
        ("1", "cpu", False, []),
        ("2", "cpu", False, ["gloo"]),
        ("2", "cuda", False, ["cpu:gloo,cuda:nccl"]),
        ("2", "cpu", True, []),
    ],
)
def test_processes_join_once_with_the_backend_of_the_device(
    world, device, joined, backends, torchrun, monkeypatch
):
    torchrun(TORCHELASTIC_RUN_ID="none", RANK="0", WORLD_SIZE=world)
    used = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: joined)
    monkeypatch.setattr(distributed.dist, "init_process_group", used.append)
    distributed.join_processes(torch.device(device))
    assert used == backends


@pytest.mark.parametrize(
    ("rank", "local_rank", "turn"), [("0", "0", 0), ("4", "0", 1), ("1", "1", 2), ("5", "1", 2)]
)
def test_first_process_of_a_machine_calls_before_the_others(
    rank, local_rank, turn, torchrun, monkeypatch
):
    torchrun(TORCHELASTIC_RUN_ID="none", RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE="8")
    events = []
    monkeypatch.setattr(distributed.dist, "barrier", lambda: events.append("barrier"))
    result = distributed.first_process_first(lambda: events.append("call") or 7)
    assert result == 7 and events.count("barrier") == 3 and events.index("call") == turn
    assert events.count("call") == 1


def test_one_process_calls_without_waiting(torchrun, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.first_process_first(itertools.count(7).__next__) == 7


def test_progress_bar_on_second_process_is_disabled(torchrun, monkeypatch):
    assert distributed.progress_bar(total=1).disable in (True, False)
    shown = []
    monkeypatch.setattr(distributed, "tqdm", lambda **options: shown.append(options))
    distributed.progress_bar(total=5)
    torchrun(TORCHELASTIC_RUN_ID="none", RANK="1", WORLD_SIZE="2")
    distributed.progress_bar(total=5)
    assert shown == [{"disable": disable, "leave": False, "total": 5} for disable in (None, True)]


@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 3), (3, 2), (4, 9)])
def test_gathered_rows_are_all_rows_in_order(world, count, monkeypatch):
    rows = torch.arange(2.0 * count, requires_grad=True).view(count, 2)
    results = Processes(monkeypatch, world).run(
        lambda: distributed.gather_rows(distributed.local_rows(rows), count)
    )
    assert all(result.equal(rows) and not result.requires_grad for result in results)


def test_sums_replace_tensors_on_every_process(monkeypatch):
    processes = Processes(monkeypatch, 3)

    def total():
        tensors = [torch.tensor([1.0 + processes.rank]), torch.tensor(10.0 * processes.rank)]
        distributed.add_up(tensors)
        return [tensor.item() for tensor in tensors]

    assert processes.run(total) == [[6.0, 30.0]] * 3


def test_one_process_keeps_its_rows_and_sums(torchrun):
    rows = torch.arange(3)
    assert distributed.gather_rows(rows, 3) is rows and distributed.local_rows(rows).equal(rows)
    distributed.add_up([rows])
    assert rows.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- the end of a process


def end_of(main, monkeypatch, capsys, processes=2):
    """(status, stderr) of a script that is the first of several processes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    # Programs in the background ignore SIGINT, and scripts leave that so.
    handlers = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with pytest.raises(SystemExit) as ended:
            utils.run_script(main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ended.value.code, capsys.readouterr().err


def lost_connection():
    raise RuntimeError("[gloo] Connection closed by peer")


def stopped_by_torchrun():
    signal.raise_signal(signal.SIGTERM)


def stopped_while_saving():
    try:
        lost_connection()
    except RuntimeError:
        stopped_by_torchrun()


def stopped_in_a_run():
    try:
        stopped_by_torchrun()
    except KeyboardInterrupt:
        raise utils.Interrupted("the state of GA is saved; pass --resume to continue") from None


class StoppedWhileRead(RuntimeError):
    """A signal comes while the reason of another failure is being found."""

    def __str__(self):
        signal.raise_signal(self.args[0])
        return "[gloo] Connection closed by peer"


def stopped_while_reporting():
    raise StoppedWhileRead(signal.SIGTERM)


def interrupted_while_reporting():
    raise StoppedWhileRead(signal.SIGINT)


@pytest.mark.parametrize(
    "main",
    [
        lost_connection,
        stopped_by_torchrun,
        stopped_while_saving,
        stopped_in_a_run,
        stopped_while_reporting,
    ],
)
def test_dead_process_is_reported_in_one_line_whoever_notices_it_first(main, monkeypatch, capsys):
    status, output = end_of(main, monkeypatch, capsys)
    assert status == 1 and output.count("\n") == 1
    assert ": error: another rank failed" in output and "--resume" in output


@pytest.mark.parametrize("main", [stopped_by_torchrun, stopped_in_a_run])
def test_sigterm_to_a_single_process_is_an_interruption(main, monkeypatch, capsys):
    status, output = end_of(main, monkeypatch, capsys, processes=1)
    assert status == 130 and ": interrupted; " in output and "rank" not in output


def pressed_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("main", [pressed_ctrl_c, interrupted_while_reporting])
def test_ctrl_c_under_torchrun_is_an_interruption(main, monkeypatch, capsys):
    status, output = end_of(main, monkeypatch, capsys)
    assert status == 130 and ": interrupted; " in output
