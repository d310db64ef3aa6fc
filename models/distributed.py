"""Several processes under torchrun: who holds which rows, sums over all, synchronised BatchNorm.

Without torchrun there is one process, and every function here returns what it was passed.
"""

import copy
import math
import os
from functools import cache

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

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
    """A tqdm bar, shown by the first process if its output is a terminal."""
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
