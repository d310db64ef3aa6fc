"""Rows, sums and gradients of two processes equal those of one process."""

import io
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import forks, run_two_processes
from torch import nn

from models import distributed
from models.errors import UserError


def test_rank_and_world_size_are_those_of_torchrun(torchrun, monkeypatch):
    torchrun(3, world_size=5)
    assert (distributed.rank(), distributed.world_size()) == (3, 5)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize(("rank", "turn"), [(0, 0), (1, 1), (4, 1)])
def test_first_process_calls_before_the_others(rank, turn, torchrun, monkeypatch):
    torchrun(rank, world_size=8)
    events = []
    monkeypatch.setattr(dist, "barrier", lambda: events.append("barrier"))
    result = distributed.first_process_first(lambda: events.append("call") or 7)
    assert result == 7 and len(events) == 2 and events.index("call") == turn


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_only_first_process_shows_progress_on_a_terminal(rank, shown, torchrun, monkeypatch):
    torchrun(rank)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with distributed.progress_bar(total=2, desc="images", file=terminal) as bar:
        bar.update()
    assert ("images" in terminal.getvalue()) == shown and not bar.leave
    with distributed.progress_bar(total=2, file=io.StringIO()) as bar:
        assert bar.disable


def test_jobs_under_torchrun_are_refused(torchrun):
    torchrun(rank=0)
    with pytest.raises(UserError, match="--jobs"):
        distributed.run_commands([["true"]], jobs=2)


# ---------------------------------------------------------------- commands in parallel

SHOW = """
import os, sys
names = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_RUN_ID", "OTHER", "PYTHONUNBUFFERED"
print(*(os.environ.get(name, "unset") for name in names), os.getsid(0) == os.getpid())
print("reason", sys.argv[1], repr(sys.stdin.read()), file=sys.stderr)
sys.stdout.buffer.write(bytes([255, 10]))
os.kill(os.getpid(), 9) if sys.argv[1] == "9" else sys.exit(int(sys.argv[1]))
"""


def run_three(capfd, jobs, titles=None):
    """The statuses of three commands, and what they print: sorted, for they run in parallel."""
    commands = [[sys.executable, "-c", SHOW, status] for status in "309"]
    statuses = distributed.run_commands(commands, jobs, titles)
    return statuses, sorted(capfd.readouterr().out.splitlines())


def test_commands_share_threads_take_gpus_in_turn_and_print_after_titles(capfd, monkeypatch):
    for pair in (("CUDA_VISIBLE_DEVICES", "4,6"), ("WANDB_RUN_ID", "x"), ("OTHER", "kept")):
        monkeypatch.setenv(*pair)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    statuses, lines = run_three(capfd, 3, ["a", "b", "c"])
    assert statuses == [3, 0, -9]
    assert lines == [
        "a: 2 4 unset kept 1 True", "a: reason 3 ''", "a: \ufffd",
        "b: 2 6 unset kept 1 True", "b: reason 0 ''", "b: \ufffd",
        "c: 2 4 unset kept 1 True", "c: reason 9 ''", "c: \ufffd",
    ]  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    _, lines = run_three(capfd, 1)
    assert lines[:3] == ["5 4 unset kept 1 True"] * 2 + ["5 6 unset kept 1 True"]


def test_commands_use_all_threads_if_there_are_more_than_commands(capfd, monkeypatch):
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for num_threads, jobs, expected in ((8, 6, "2"), (1, 2, "1")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        _, lines = run_three(capfd, jobs)
        assert {line.split()[0] for line in lines if line.endswith("True")} == {expected}


def test_one_process_keeps_its_rows_and_sums_and_does_not_wait():
    rows = torch.arange(3)
    assert distributed.gather_rows(rows, 3) is rows and distributed.local_rows(rows).equal(rows)
    distributed.add_up([rows])
    assert rows.tolist() == [0, 1, 2] and distributed.first_process_first(lambda: 7) == 7


# ---------------------------------------------------------------- two processes


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 1))


def gradients(model, images, run=None):
    """The gradients of the mean output. ``run`` is ``model`` in a wrapper, if it has one."""
    (run or model)(images).mean().backward()
    return [parameter.grad for parameter in model.parameters()]


IMAGES = torch.arange(24.0).view(8, 3).sin()
LAYERS = {"LayerNorm": lambda: nn.LayerNorm(4), "BatchNorm": lambda: nn.BatchNorm1d(4)}


def share():
    """What one of two processes computes."""
    rows = IMAGES[:5].requires_grad_()
    total = [torch.tensor([1.0 + distributed.rank()]), torch.tensor(10.0)]
    distributed.add_up(total)
    results = {"rows": distributed.gather_rows(distributed.local_rows(rows), 5), "total": total}
    for name in LAYERS:
        model = network(LAYERS[name]())
        run = distributed.data_parallel(model)
        results[name] = gradients(model, distributed.local_rows(IMAGES.detach()), run)
    distributed.equalise_buffers(model)
    return results | {"mean": model[1].running_mean}


@forks
def test_two_processes_average_the_gradients_of_their_shares(tmp_path, capfd):
    results = run_two_processes(share, tmp_path)
    whole = gradients(network(LAYERS["LayerNorm"]()), IMAGES)
    shares = [gradients(network(LAYERS["BatchNorm"]()), IMAGES[number::2]) for number in range(2)]
    averaged = [sum(pair) / 2 for pair in zip(*shares, strict=True)]
    first_share = network(LAYERS["BatchNorm"]())
    first_share(IMAGES[::2])
    for result in results:
        assert result["rows"].equal(IMAGES[:5]) and not result["rows"].requires_grad
        assert [tensor.item() for tensor in result["total"]] == [3, 20]
        torch.testing.assert_close(result["LayerNorm"], whole)
        torch.testing.assert_close(result["BatchNorm"], averaged)
        torch.testing.assert_close(result["mean"], first_share[1].running_mean)
    assert capfd.readouterr().out.count("BatchNorm") == 1  # a note of the first process
