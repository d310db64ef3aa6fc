"""Several processes under torchrun: who holds which rows, sums over all, synchronised BatchNorm.

Without torchrun there is one process, and every function here returns what it was passed. The last
section is about other processes: those that ``--jobs`` starts, each for runs of its own.
"""

import copy
import math
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .errors import UserError

# ---------------------------------------------------------------- processes


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
    """``call()`` on every process, in turns, so that only one process per machine downloads a file.

    The first process calls first, then the first process of every other machine, then the rest.
    Returns what ``call`` returned here.
    """
    if world_size() == 1:
        return call()
    turn = 2
    if os.environ.get("LOCAL_RANK") == "0":
        turn = 1
    if rank() == 0:
        turn = 0
    for number in range(3):
        if number == turn:
            result = call()
        dist.barrier()
    return result


def progress_bar(**options):
    """A tqdm bar, shown by the first process if its output is a terminal.

    Every process of ``--jobs`` has a line of its own.
    """
    if job_number is not None:
        options["position"] = job_number
    return tqdm(disable=True if rank() else None, leave=False, **options)


# ---------------------------------------------------------------- rows of tensors


def local_rows(rows):
    """The rows that this process works on: rank, rank + world, rank + 2·world, ...

    Interleaved, so that each process gets its share of every section of ``rows``.
    """
    return rows[rank() :: world_size()]


def local_sizes(sizes):
    """How many :func:`local_rows` fall into each section of rows, for sections of ``sizes``."""
    section_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return local_rows(section_of).bincount(minlength=len(sizes)).tolist()


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


# ---------------------------------------------------------------- BatchNorm


def synchronise_batch_norm(model):
    """Replace every BatchNorm layer of ``model`` by one that normalises over all processes' images.

    On a GPU the layers are torch's SyncBatchNorm, by timm's conversion, which keeps the activation
    of timm's layers. torch's class rejects CPU tensors: there each layer becomes a
    :class:`SyncOnCPU`. Names, parameters and buffers stay the same objects. A second call changes
    nothing. A process may have no image of a batch.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if all(isinstance(layer, SyncOnCPU | nn.SyncBatchNorm) for layer in layers):
        return
    if next(model.parameters()).is_cuda:
        _convert_on_gpu(model)
    else:
        _convert_on_cpu(model, layers)


def _convert_on_gpu(model):
    convert_sync_batchnorm(model)
    for layer in model.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.register_forward_pre_hook(_no_image_in_float)


def _convert_on_cpu(model, layers):
    replacements = {layer: _on_cpu(layer) for layer in layers}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in replacements:
            model.set_submodule(name, replacements[layer])


def _no_image_in_float(layer, inputs):
    """Input without an image as float32, the type of the statistics that the other processes send.

    SyncBatchNorm sends its statistics in the type of the input if the input is empty, and
    otherwise in float32. With bfloat16 activations the two would not match.
    """
    return tuple(images if len(images) else images.float() for images in inputs)


class SyncOnCPU(nn.Module):
    """Mixed into a class of BatchNorm layers: batch statistics are those of all processes.

    The layer's own ``forward`` runs, with whatever it does besides normalising (timm's layers apply
    an activation), and only its call of ``torch.nn.functional.batch_norm`` is replaced.
    """

    @torch.compiler.disable
    def forward(self, inputs):
        if not self.training:
            return super().forward(inputs)
        with _SyncNormalisation():
            return super().forward(inputs)


@cache
def _sync_class(layer_class):
    return type(f"Sync{layer_class.__name__}", (SyncOnCPU, layer_class), {})


def _on_cpu(layer):
    """A :class:`SyncOnCPU` that holds the same parameters, buffers and settings as ``layer``."""
    replacement = copy.copy(layer)
    replacement.__class__ = _sync_class(type(layer))
    return replacement


class _SyncNormalisation(TorchFunctionMode):
    """While active, ``torch.nn.functional.batch_norm`` normalises over all processes' images."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.batch_norm:
            function = _batch_norm
        return function(*args, **(kwargs or {}))


def _batch_norm(
    inputs,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """``torch.nn.functional.batch_norm``, whose batch statistics are those of all processes.

    N×C×..., where N may be 0 on some processes. Gradients pass through the statistics.
    """
    if not training:
        return F.batch_norm(inputs, running_mean, running_var, weight=weight, bias=bias, eps=eps)
    x = inputs.float()
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    # One exchange for sums and count: processes may have different numbers of images.
    count = x.new_full((1,), x.numel() / x.shape[1])
    sums = _Sum.apply(torch.cat([x.sum(dims), count]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    # The squares are summed around the mean, in a second exchange, which avoids cancellation.
    centred = x - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims)) / count
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * count / (count - 1), momentum)
    outputs = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        outputs = outputs * weight.view(shape)
    if bias is not None:
        outputs = outputs + bias.view(shape)
    return outputs.to(inputs.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes.

    Each process's loss depends on the sum, so the gradient of a summand is the sum of the
    processes' gradients.
    """

    @staticmethod
    def forward(context, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total


# ---------------------------------------------------------------- processes of --jobs

job_number = None  # of this process among those of --jobs


def run_jobs(call, tasks, count):
    """``call(*task)`` for every task, in ``count`` processes. Yields the results in order.

    A UserError of a call is a result. The processes share this one's threads, or take the GPUs in
    turn. ``call``, tasks and results are pickled. Ctrl-C interrupts the calls in all processes and
    waits until they have saved their state. Raises UserError if a process dies.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(count):
        numbers.put(number)
    threads = max(1, torch.get_num_threads() // count)
    start = {"initializer": _start_job_process, "initargs": (numbers, threads, context.RLock())}
    executor = ProcessPoolExecutor(count, mp_context=context, **start)
    futures = []
    try:
        futures = [executor.submit(_call_in_job, call, task) for task in tasks]
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of --jobs died, perhaps for lack of memory; lower --jobs, and pass --resume "
            "to continue"
        ) from None
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        for process in multiprocessing.active_children():  # SIGTERM reaches only this process
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        raise KeyboardInterrupt(
            "runs that had completed an epoch are saved; pass --resume to continue"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_job_process(numbers, threads, lock):
    """Prepare a process of :func:`run_jobs`: its number, its threads or GPU, and its output."""
    global job_number
    job_number = numbers.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until a call begins
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tqdm.set_lock(lock)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    torch.set_num_threads(threads)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = gpus.split(",") if gpus else list(map(str, range(torch.cuda.device_count())))
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[job_number % len(gpus)]


def _call_in_job(call, task):
    """``call(*task)`` or its UserError. The first SIGINT interrupts it, later ones do nothing."""

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        return call(*task)
    except UserError as error:
        return error
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Prefixed:
    """A stream that starts every line of ``stream`` with ``prefix``."""

    def __init__(self, stream, prefix):
        self.stream, self.prefix, self.line_ended = stream, prefix, True

    def write(self, text):
        for line in text.splitlines(keepends=True):
            self.stream.write(self.prefix + line if self.line_ended else line)
            self.line_ended = line.endswith("\n")

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def prefixed_output(prefix):
    """Start every printed line with ``prefix``."""
    stream, sys.stdout = sys.stdout, _Prefixed(sys.stdout, prefix)
    try:
        yield
    finally:
        sys.stdout = stream
