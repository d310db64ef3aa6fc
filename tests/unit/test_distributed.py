"""Rows, sums and gradients of several processes equal those of one process."""

import contextlib
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from turns import Processes

from models import distributed

# ---------------------------------------------------------------- simulated processes


@pytest.fixture
def torchrun(monkeypatch):
    """A function that sets the environment variables of torchrun."""

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
    monkeypatch.setattr(dist, "is_initialized", lambda: joined)
    monkeypatch.setattr(dist, "init_process_group", used.append)
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
    monkeypatch.setattr(dist, "barrier", lambda: events.append("barrier"))
    result = distributed.first_process_first(lambda: events.append("call") or 7)
    assert result == 7 and events.count("barrier") == 3 and events.index("call") == turn
    assert events.count("call") == 1


def test_one_process_calls_without_waiting(torchrun):
    assert distributed.first_process_first(lambda: 7) == 7


def test_progress_bar_on_second_process_is_disabled(torchrun, capfd):
    torchrun(TORCHELASTIC_RUN_ID="none", RANK="1", WORLD_SIZE="2")
    assert distributed.progress_bar(total=5).disable is True


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


# ---------------------------------------------------------------- two real processes


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 1))


def gradients(model, images, run=None):
    """The gradients of the mean output. ``run`` is ``model`` in a wrapper, if it has one."""
    (run or model)(images).mean().backward()
    return [parameter.grad for parameter in model.parameters()]


IMAGES = torch.arange(24.0).view(8, 3).sin()
LAYERS = {"LayerNorm": lambda: nn.LayerNorm(4), "BatchNorm": lambda: nn.BatchNorm1d(4)}


def process(number, folder, port):
    """One of two processes: saves its results in ``folder``, with what it prints."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(number)}
    torch.set_num_threads(1)
    distributed.join_processes(torch.device("cpu"))
    rows = distributed.gather_rows(distributed.local_rows(IMAGES[:5]), 5)
    total = [torch.tensor([1.0 + number])]
    distributed.add_up(total)
    results = {"rows": rows, "total": total[0]}
    with (
        open(folder / f"{number}.txt", "w") as file,
        contextlib.redirect_stdout(None if number else file),
    ):
        for name in [*LAYERS, "BatchNorm"]:
            model = network(LAYERS[name]())
            run = distributed.data_parallel(model)
            results[name] = gradients(model, distributed.local_rows(IMAGES), run)
    distributed.equalise_buffers(model)
    results["mean"] = model[1].running_mean
    torch.save(results, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks the test process")
def test_two_processes_average_the_gradients_of_their_shares(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(process, (tmp_path, port), 2, start_method="fork")
    results = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    whole = gradients(network(LAYERS["LayerNorm"]()), IMAGES)
    shares = [gradients(network(LAYERS["BatchNorm"]()), IMAGES[number::2]) for number in range(2)]
    averaged = [sum(pair) / 2 for pair in zip(*shares, strict=True)]
    for result in results:
        assert result["rows"].equal(IMAGES[:5]) and result["total"].item() == 3
        torch.testing.assert_close(result["LayerNorm"], whole)
        torch.testing.assert_close(result["BatchNorm"], averaged)
    first_share = network(LAYERS["BatchNorm"]())
    first_share(IMAGES[::2])
    assert all(result["mean"].allclose(first_share[1].running_mean) for result in results)
    printed = [(tmp_path / f"{number}.txt").read_text() for number in range(2)]
    assert printed[0].count("\n") == printed[0].count("BatchNorm") == 1 and not printed[1]
