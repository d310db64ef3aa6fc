"""Importances of weights: the diagonal of the Fisher information."""

import torch
from torch import nn
from torch.nn import functional as F

from . import distributed
from .inference import classifier_layers


def observed_score(logits, label):
    """∂ log p_y / ∂ logits of the true label: one row, for the empirical Fisher information. K → 1×K."""
    return F.one_hot(label, len(logits))[None] - logits.softmax(0)


def expected_scores(logits, label):
    """Rows whose squares sum to the expected Fisher information: RᵀR = diag(p) − ppᵀ. K → (K−1)×K.

    √p_c · ∂ log p_c / ∂ logits of every class c would be K such rows. Reflected so that √p becomes an axis
    (Householder), one of them is zero: with the likeliest class's axis without cancellation.
    """
    order = logits.argsort(descending=True)
    root = logits.softmax(0).sqrt()[order]
    normal = root.clone()
    normal[0] += 1
    reflection = torch.eye(len(root), device=root.device) - normal[:, None] * normal / normal[0]
    return (reflection[1:] * root)[:, order.argsort()]


def diagonal_fisher(model, images, indices, scores, chunk=32):
    """The diagonal of the Fisher information of each weight: mean over images of Σ_c (scores_c · ∂ logits / ∂ w)².

    Eval mode, without augmentation, per image exactly. ``scores`` is :func:`expected_scores` (expectation over the
    model's own answers, as in Golatkar et al. 2020) or :func:`observed_score` (the true labels, as in Foster et al.
    2024). Returns tensors like the parameters, by name. Networks of convolutions, linear layers and BatchNorm take
    one backward pass a row for a whole chunk of images; others go through torch.func, image by image.
    """
    model.eval()
    squares = _layer_squares if _covers(model) else _functional_squares
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    parts = indices.split(chunk * distributed.world_size())
    with distributed.progress_bar(total=len(indices), desc="importances", unit="img") as bar:
        for part, inputs in zip(parts, images.batches(parts), strict=True):
            if len(inputs):  # one of several processes may have none of a small part
                for name, square in squares(
                    model, inputs, images.labels[distributed.local_rows(part)], scores
                ):
                    total[name] += square
            bar.update(len(part))
    distributed.add_up(total.values())
    return {name: tensor / len(indices) for name, tensor in total.items()}


def _covers(model):
    """Whether :func:`_layer_squares` knows every layer that has weights, by its exact type: subclasses do more."""
    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    convolutions = [layer for layer in layers if type(layer) is nn.Conv2d]
    return all(type(layer) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d) for layer in layers) and all(
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        for layer in convolutions
    )


def _functional_squares(model, inputs, labels, scores):
    """Pairs of (name, sum over images of the squared gradients), one image at a time, for any network."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for image, label in zip(inputs, labels, strict=True):
        logits, pull = torch.func.vjp(
            lambda p, x=image[None]: torch.func.functional_call(model, p, (x,))[0], parameters
        )
        (gradients,) = torch.func.vmap(pull)(scores(logits, label))
        for name, gradient in gradients.items():
            yield name, gradient.square().sum(0)


def _layer_squares(model, inputs, labels, scores):
    """Pairs of (name, sum over images of the squared gradients), from each layer's inputs and output gradients.

    In eval mode images do not meet, so one backward pass gives each image's own gradients at every layer's output.
    """
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    layers = [(f"{name}." if name else "", module) for name, module in modules]
    taken, given, handles = {}, {}, []
    for name, layer in layers:

        def keep(_, arguments, output, name=name):
            taken[name], given[name] = arguments[0].detach(), output
            return output.clone()  # what follows may work in place

        handles.append(layer.register_forward_hook(keep))
    try:
        logits = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    rows = torch.stack([scores(*pair) for pair in zip(logits.detach(), labels, strict=True)], dim=1)
    inner = {name: _as_columns(layer, taken[name]) for name, layer in layers}
    squares = {  # of weights × channels
        name: layer.weight.new_zeros(layer.weight.flatten(1).shape[::-1])
        for name, layer in layers
        if not isinstance(layer, nn.BatchNorm2d)
    }
    for row in rows:
        outer = torch.autograd.grad(
            logits, [given[name] for name, _ in layers], row, retain_graph=True
        )
        for (name, layer), gradient in zip(layers, outer, strict=True):
            gradient = (
                gradient.flatten(2) if gradient.ndim > 2 else gradient[:, :, None]
            )  # image × channel × position
            if isinstance(layer, nn.BatchNorm2d):
                yield f"{name}weight", (gradient * inner[name]).sum(2).square().sum(0)
            else:
                _add_squared_products(squares[name], inner[name], gradient)
            if layer.bias is not None:
                yield f"{name}bias", gradient.sum(2).square().sum(0)
    for name, square in squares.items():
        yield f"{name}weight", square.T.reshape(model.get_parameter(f"{name}weight").shape)


def _add_squared_products(total, columns, gradient):
    """Add Σ over images of (columns · gradientᵀ)², element by element, to ``total``. W×C, B×W×P, B×C×P."""
    if gradient.shape[2] == 1:  # one position: the square of an outer product is one of squares
        total.addmm_(columns.flatten(1).square().T, gradient.flatten(1).square())
    elif gradient.is_cuda:
        total += torch.bmm(columns, gradient.mT).square_().sum(0)
    else:
        # One image after the other, in one buffer: a product fits a CPU's cache, those of a chunk do not. The longer
        # side comes first, which matrix products on CPUs prefer.
        product = torch.empty_like(total)
        for pair in zip(columns, gradient.mT, strict=True):
            torch.mm(*pair, out=product)
            total.addcmul_(product, product)


def _as_columns(layer, inputs):
    """What each weight of a layer is multiplied with: image × weight × position."""
    if isinstance(layer, nn.Conv2d):
        return F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    if isinstance(layer, nn.BatchNorm2d):
        spread = (layer.running_var + layer.eps).sqrt()
        return ((inputs - layer.running_mean[:, None, None]) / spread[:, None, None]).flatten(2)
    return inputs[:, :, None]


def last_layer(model):
    """Names of the parameters of the layers that turn features into logits."""
    found = {parameter for layer in classifier_layers(model) for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if parameter in found}
