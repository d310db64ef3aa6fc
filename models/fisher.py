"""Importances of weights: the diagonal of the Fisher information, and products with its inverse.

The Fisher information of a weight w measures how much the network's predictions depend on w:

    F(w) = mean over images x of  E_y [(∂ log p_y(x) / ∂ w)²]

In the expected Fisher information, y is drawn from the network's own prediction p(x) (Golatkar et
al. 2020, arXiv 1911.04933). In the empirical Fisher information, y is the image's label (Foster et
al. 2024, arXiv 2308.07707). Both are computed from scores: rows R of one number per class, with

    F(w) = mean over images of  Σ_r (R_r · ∂ logits / ∂ w)²
"""

import warnings

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import distributed

# How many numbers the gradients of the images in one backward pass have at most. On CPUs, small
# networks are faster with several images per pass, and large ones with a single image.
CPU_NUMBERS, GPU_NUMBERS = 12_000_000, 500_000_000


def observed_score(logits, label):
    """onehot(y) − p = ∂ log p_y / ∂ logits for the label y: the empirical Fisher. K → 1×K."""
    return F.one_hot(label, len(logits))[None] - logits.softmax(0)


def expected_scores(logits, label):
    """√p_c · (onehot(c) − p) for every class c: the expected Fisher, of any label. K → K×K."""
    p = logits.softmax(0)
    return p.sqrt()[:, None] * (torch.eye(len(p), dtype=p.dtype, device=p.device) - p)


def diagonal_fisher(model, images, indices, scores, chunk=32):
    """The diagonal of the Fisher information: a tensor for each parameter, by name.

    ``scores`` is :func:`expected_scores` or :func:`observed_score`. The model is left in eval mode.
    Images are not augmented. Several processes divide each chunk, and return the same result.
    """
    model.eval()
    total = _zeros(model)
    budget = GPU_NUMBERS if images.labels.is_cuda else CPU_NUMBERS
    chunk = max(1, min(chunk, budget // sum(square.numel() for square in total.values())))
    chunks = indices.split(chunk * distributed.world_size())
    warnings.filterwarnings("ignore", "There is a performance drop")  # attention has no vmap rule
    with distributed.progress_bar(total=len(indices), desc="importances", unit="img") as bar:
        for inputs, labels in _labelled_batches(images, chunks):
            if len(inputs):  # the last chunk may have fewer images than there are processes
                _add_squares(total, model, inputs, labels, scores)
            bar.update(len(inputs) * distributed.world_size())
    distributed.add_up(total.values())
    return {name: tensor / len(indices) for name, tensor in total.items()}


class _OneImage(nn.Module):
    """C×H×W → K logits, without the input hook of the network, which vmap does not support."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        return self.network.forward(image[None])[0]


def _add_squares(total, model, inputs, labels, scores):
    """Add the squared gradients of B images, summed over images and rows, to ``total``."""
    network = _OneImage(model)
    # A view of the weights for every image: vjp then returns a gradient per image. The loop over
    # the rows keeps B gradients in memory instead of B·K.
    weights = dict(network.named_parameters())
    views = {name: w.detach().expand(len(inputs), *w.shape) for name, w in weights.items()}
    logits_of = vmap(lambda view, image: functional_call(network, view, (image,)))
    logits, gradients_of = vjp(lambda views: logits_of(views, inputs), views)
    rows = [scores(*pair) for pair in zip(logits.detach(), labels, strict=True)]
    for row in torch.stack(rows, dim=1):  # B×K
        (gradients,) = gradients_of(row)
        for square, gradient in zip(total.values(), gradients.values(), strict=True):
            square += gradient.square().sum(0)


def _labelled_batches(images, batches):
    """(inputs, labels) of each of ``batches`` of indices, the share of this process."""
    for indices, inputs in zip(batches, images.batches(batches), strict=True):
        yield inputs, images.labels[distributed.local_rows(indices)]


def _zeros(model):
    return {name: torch.zeros_like(weight.detach()) for name, weight in model.named_parameters()}


def batch_fisher(model, images, batches):
    """Mean over batches of (∂ mean cross-entropy of the batch / ∂ w)²: a tensor per parameter.

    The code of Foster et al. 2024 (arXiv 2308.07707) computes importances this way: directions that
    differ between the images of a batch cancel. ``batches`` are tensors of indices into ``images``,
    which are not augmented. The model is left in eval mode.
    """
    total = _zeros(model)
    for indices, gradients in zip(batches, _gradients(model, images, batches), strict=True):
        distributed.add_up(gradients)  # before it is squared
        for square, gradient in zip(total.values(), gradients, strict=True):
            square += (gradient / len(indices)).square()
    return {name: tensor / len(batches) for name, tensor in total.items()}


def mean_gradient(model, images, indices, chunk=64):
    """∂ mean cross-entropy / ∂ w of images, a tensor per parameter. The model is left in eval mode.

    Images are not augmented. Several processes divide each chunk.
    """
    total = _zeros(model)
    for gradients in _gradients(model, images, indices.split(chunk)):
        for summed, gradient in zip(total.values(), gradients, strict=True):
            summed += gradient
    distributed.add_up(total.values())
    return {name: tensor / len(indices) for name, tensor in total.items()}


def _gradients(model, images, batches):
    """Yields ∂ summed cross-entropy / ∂ w of this process's share of each batch, by parameter."""
    model.eval()
    with distributed.progress_bar(total=len(batches), desc="gradients", unit="batch") as bar:
        for inputs, labels in _labelled_batches(images, batches):
            if len(inputs):
                loss = F.cross_entropy(model(inputs), labels, reduction="sum")
                yield torch.autograd.grad(loss, list(model.parameters()))
            else:  # this process has no image of a small batch
                yield [torch.zeros_like(parameter) for parameter in model.parameters()]
            bar.update()


def fisher_product(model, images, indices, vector, chunk=64):
    """F v for the empirical Fisher information F of images, a tensor per parameter.

    F is the mean over images of g gᵀ, where g is the gradient of an image's cross-entropy. Images
    are not augmented. Several processes divide each chunk. The model is left in eval mode.
    """
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    total = _zeros(model.eval())
    for inputs, labels in _labelled_batches(images, indices.split(chunk)):
        if not len(inputs):
            continue

        def losses(parameters, inputs=inputs, labels=labels):
            logits = functional_call(model, parameters, (inputs,))
            return F.cross_entropy(logits, labels, reduction="none")

        # F v is the mean of g (gᵀ v). Forward mode gives gᵀ v of every image, and one backward pass
        # the sum of the g with these weights. torch's own rules for it still use torch.jit.
        ignored = warnings.catch_warnings(action="ignore", category=FutureWarning)
        with ignored, plain_attention():
            _, projections = torch.func.jvp(losses, (parameters,), (vector,))
        _, gradients_of = vjp(losses, parameters)
        (gradients,) = gradients_of(projections)
        for name, gradient in gradients.items():
            total[name] += gradient / len(indices)
    distributed.add_up(total.values())
    return total


def plain_attention():
    """Attention in its plain form, as a context: fused kernels have no second derivatives."""
    return sdpa_kernel(SDPBackend.MATH)
