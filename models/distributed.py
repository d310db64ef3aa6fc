"""Several processes (torchrun): which rows are whose."""

import math
import os

import torch
import torch.distributed as dist
from tqdm import tqdm


def rank():
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world_size():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join_processes(device):
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def local_rows(rows):
    """The rows that are this process's: every world-th from its rank on, so that all get alike of every part."""
    return rows[rank() :: world_size()]


def gather_rows(rows, count):
    """From the :func:`local_rows` rows of each process all ``count`` of them in order, on every process; no gradient."""
    if world_size() == 1:
        return rows
    padded = rows.new_zeros(math.ceil(count / world_size()), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


def add_up(tensors):
    """Replace each tensor by its sum over the processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def first_process_first(call):
    """``call()`` on the first process alone, then on the first of every other machine, then on the others: what one
    has downloaded the next ones find."""
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for number in range(3 if world_size() > 1 else 1):
        if number == turn:
            found = call()
        if world_size() > 1:
            dist.barrier()
    return found


def progress_bar(**options):
    """tqdm's, where the first process has a terminal."""
    return tqdm(disable=True if rank() else None, leave=False, **options)
