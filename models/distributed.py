"""Several processes: those of torchrun, and the commands that --jobs runs in parallel.

Without torchrun, its functions return what they were passed.
"""

import math
import os
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .errors import UserError


def rank():
    """This process's number among those that torchrun started; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world_size():
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join_processes(device):
    """Connect the processes: gloo for CPU tensors, nccl for tensors on a GPU."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def first_process_first(call):
    """``call()`` on the first process, then on the others, so that only one downloads a file."""
    if rank():
        dist.barrier()
    result = call()
    if world_size() > 1 and not rank():
        dist.barrier()
    return result


def progress_bar(**options):
    """A tqdm bar, shown by the first process if its output is a terminal."""
    return tqdm(disable=True if rank() else None, leave=False, **options)


def local_rows(rows):
    """The rows that this process works on: rank, rank + world, rank + 2·world, ...

    Interleaved, so that each process gets a share of every section of ``rows``.
    """
    return rows[rank() :: world_size()]


def gather_rows(rows, count):
    """All ``count`` rows in order, on every process, from each process's :func:`local_rows`.

    No gradient passes through.
    """
    if world_size() == 1:
        return rows
    # all_gather needs equal shapes: the last processes may have one row fewer.
    padded = rows.new_zeros(math.ceil(count / world_size()), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    shares = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(shares, padded)
    # Row i of process r is row i·world + r of the whole, so the process is the inner dimension.
    return torch.stack(shares, dim=1).flatten(0, 1)[:count]


def add_up(tensors):
    """Replace each tensor by its sum over the processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def equalise_buffers(model):
    """Give the buffers of ``model``, e.g. BatchNorm's statistics, the first process's values."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def data_parallel(model):
    """DistributedDataParallel around a network: it averages the gradients of the processes.

    On GPUs, BatchNorm normalises over the images of all processes (torch's SyncBatchNorm, timm's
    conversion). On CPUs, each process has its own batch statistics, and a printed line says so.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    # 1×1 convolutions have gradients with other strides, which only costs speed.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    if device.type == "cuda":
        return DistributedDataParallel(convert_sync_batchnorm(model), device_ids=[device])
    if any(isinstance(layer, _BatchNorm) for layer in model.modules()) and not rank():
        tqdm.write("BatchNorm on CPUs: every process normalises with the statistics of its images")
    return DistributedDataParallel(model)


def run_commands(commands, jobs, titles=None):
    """Run commands (lists of words), ``jobs`` at a time. → their exit statuses, in order.

    They share the CPU cores, or take the GPUs in turn. Lines are printed after ``title: ``. An
    interruption ends all of them with saved states. Raises UserError under torchrun.
    """
    if world_size() > 1:
        raise UserError("--jobs: torchrun divides every run over its processes; omit one of them")
    prefixes = [f"{title}: " for title in titles] if titles else [""] * len(commands)
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options |= {"start_new_session": True, "text": True, "errors": "replace"}  # Ctrl-C: from here
    running = []

    def run(number):
        environment = _environment(number, min(jobs, len(commands)))
        with subprocess.Popen(commands[number], env=environment, **options) as child:
            running.append(child)
            for line in child.stdout:
                print(f"{prefixes[number]}{line}", end="", flush=True)
        return child.returncode

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(run, range(len(commands))))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.terminate()
            raise KeyboardInterrupt("pass --resume to continue the runs") from None


def _environment(number, jobs):
    """The environment of the command with this number, of ``jobs`` at a time: threads and GPU."""
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    environment |= dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    environment.pop("WANDB_RUN_ID", None)  # each is a run of its own in wandb
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(",")
    return environment | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
