"""BatchNorm over the images of all processes together, on any device (torch's SyncBatchNorm runs on GPUs alone)."""

from functools import partial

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(model):
    """Let every BatchNorm layer of ``model`` normalise, in train mode, by the batch of all processes.

    Layers, parameters and buffers stay the same objects; a process may have no image of a batch.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.forward = partial(_forward, layer)


def _forward(layer, inputs):
    if not layer.training:
        return type(layer).forward(layer, inputs)
    x = inputs.float()
    dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    count = x.new_full((1,), x.numel() / x.shape[1])
    sums = _Sum.apply(torch.cat([x.sum(dims), count]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    centred = x - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims)) / count
    _remember(layer, mean.detach(), (variance * count / (count - 1)).detach())
    found = centred * (variance + layer.eps).rsqrt().view(shape)
    if layer.affine:
        found = found * layer.weight.view(shape) + layer.bias.view(shape)
    for then in ("drop", "act"):  # timm's layers go on with these
        if hasattr(layer, then):
            found = getattr(layer, then)(found)
    return found.to(inputs.dtype)


@torch.no_grad()
def _remember(layer, mean, unbiased_variance):
    """The running statistics, as torch's BatchNorm keeps them."""
    if not layer.track_running_stats:
        return
    layer.num_batches_tracked += 1
    share = layer.momentum if layer.momentum is not None else 1 / layer.num_batches_tracked.item()
    layer.running_mean.lerp_(mean, share)
    layer.running_var.lerp_(unbiased_variance, share)


class _Sum(torch.autograd.Function):
    """The sum over the processes; each gradient is the sum of theirs."""

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
