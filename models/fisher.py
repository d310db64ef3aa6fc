"""Importances of weights: the diagonal of the Fisher information.

The Fisher information of a weight w measures how much the network's predictions depend on w:

    F(w) = mean over images x of  E_y [(∂ log p_y(x) / ∂ w)²]

In the expected Fisher information, y is drawn from the network's own prediction p(x) (Golatkar et
al. 2020, arXiv 1911.04933). In the empirical Fisher information, y is the image's label (Foster et
al. 2024, arXiv 2308.07707). Both are computed from scores: rows R of one number per class, with

    F(w) = mean over images of  Σ_r (R_r · ∂ logits / ∂ w)²

The square is inside the sum over images, so every image's own gradient is needed
(:func:`diagonal_fisher`). There are two ways to compute it:

* layer by layer: one backward pass per row gives the gradient at every layer's output for a chunk
  of images. Together with the layer's input it gives each image's weight gradient. This works for
  networks of plain convolutions, linear layers and BatchNorm2d.
* by torch.func: the gradients of one image after the other. This works for every network.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import distributed
from .inference import classifier_layers

# ---------------------------------------------------------------- scores


def observed_score(logits, label):
    """∂ log p_y / ∂ logits = onehot(y) − p for the label y, as one row. K → 1×K.

    With this score :func:`diagonal_fisher` computes the empirical Fisher information.
    """
    return F.one_hot(label, len(logits))[None] - logits.softmax(0)


def expected_scores(logits, label):
    """Rows R with RᵀR = diag(p) − ppᵀ, the Fisher information of the logits. K → (K−1)×K.

    With these scores :func:`diagonal_fisher` computes the expected Fisher information. ``label`` is
    not used.
    """
    # The definition gives K rows √p_c · (onehot(c) − p). As a matrix they are (I − s sᵀ) diag(s),
    # where s = √p is a unit vector. An orthogonal matrix H in front does not change RᵀR. Take the
    # Householder reflection H = I − n nᵀ / n₀ with n = s + e₀. It maps s to −e₀, so H (I − s sᵀ)
    # is H with its row 0 set to zero: one row, and one backward pass, fewer.
    # Index 0 is the likeliest class. All other s_i² are then at most ½, and the diagonal of H,
    # 1 − s_i² / n₀, does not cancel.
    order = logits.argsort(descending=True)
    root = logits.softmax(0).sqrt()[order]
    normal = root.clone()
    normal[0] += 1
    reflection = torch.eye(len(root), device=root.device) - normal[:, None] * normal / normal[0]
    return (reflection[1:] * root)[:, order.argsort()]


# ---------------------------------------------------------------- importances


def diagonal_fisher(model, images, indices, scores, chunk=32):
    """The diagonal of the Fisher information: a tensor for each parameter, by name.

    ``scores`` is :func:`expected_scores` or :func:`observed_score`. The model is left in eval mode.
    Images are not augmented. ``chunk`` is the number of images per pass and process. Several
    processes divide the images, and each returns the result of all.
    """
    model.eval()
    squares_of = _layer_squares if _knows_layers(model) else _functional_squares
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    chunks = indices.split(chunk * distributed.world_size())
    with distributed.progress_bar(total=len(indices), desc="importances", unit="img") as bar:
        for chunk_indices, inputs in zip(chunks, images.batches(chunks), strict=True):
            labels = images.labels[distributed.local_rows(chunk_indices)]
            # The last chunk may have fewer images than there are processes.
            if len(inputs):
                for name, square in squares_of(model, inputs, labels=labels, scores=scores):
                    total[name] += square
            bar.update(len(chunk_indices))
    distributed.add_up(total.values())
    return {name: tensor / len(indices) for name, tensor in total.items()}


def batch_fisher(model, images, batches, augment=None):
    """Mean over batches of (∂ mean cross-entropy of the batch / ∂ w)²: a tensor per parameter.

    The importances of Foster et al. 2024 (arXiv 2308.07707) as their code computes them. The
    gradients of the images of a batch are added before the square, so gradients that point in
    different directions cancel. ``batches`` are tensors of indices into ``images``, and ``augment``
    is the generator of their augmentation, or None. The model is left in eval mode. Several
    processes divide every batch, and each returns the result of all.
    """
    model.eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    num_images = sum(len(indices) for indices in batches)
    with distributed.progress_bar(total=num_images, desc="importances", unit="img") as bar:
        for indices, inputs in zip(batches, images.batches(batches, augment), strict=True):
            gradients = _batch_gradient(model, inputs, images.labels[indices])
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.square()
            bar.update(len(indices))
    return {name: tensor / len(batches) for name, tensor in total.items()}


def _batch_gradient(model, inputs, labels):
    """The gradients of the mean cross-entropy of a batch, in the order of the parameters.

    ``inputs`` are the images of this process, ``labels`` those of the whole batch.
    """
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    if len(inputs):
        local_labels = distributed.local_rows(labels)
        loss = F.cross_entropy(model(inputs), local_labels, reduction="sum") / len(labels)
        gradients = torch.autograd.grad(loss, parameters)
    distributed.add_up(gradients)
    return gradients


def mean_gradient(model, images, indices, augment=None, chunk=64):
    """∂ mean cross-entropy / ∂ w of images, a tensor per parameter. The model is left in eval mode.

    ``augment`` is the generator of the augmentation, or None. It draws for one chunk of images
    after the other. Several processes divide each chunk, so that they augment as one process does.
    """
    model.eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    chunks = indices.split(chunk)
    for chunk_indices, inputs in zip(chunks, images.batches(chunks, augment), strict=True):
        gradients = _batch_gradient(model, inputs, images.labels[chunk_indices])
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += len(chunk_indices) / len(indices) * gradient
    return total


def inverse_product(
    model, images, indices, vector, *, damping, augmentation=None, max_steps=20, tolerance=1e-3
):
    """(F + damping·I)⁻¹ v for the empirical Fisher information F, a tensor per parameter.

    F is the mean over images of g gᵀ, where g is the gradient of an image's cross-entropy. It is
    not formed: conjugate gradients (Hestenes & Stiefel 1952) need its products with vectors only.
    They end when the residual is ``tolerance`` times the vector v, or after ``max_steps`` passes
    over the images. ``vector`` is {parameter: tensor}. ``augmentation()`` returns the generator of
    the augmentation, the same for every pass. Without it images are not augmented. The model is
    left in eval mode.
    """
    model.eval()
    solution = {name: torch.zeros_like(tensor) for name, tensor in vector.items()}
    residual = {name: tensor.clone() for name, tensor in vector.items()}
    direction = {name: tensor.clone() for name, tensor in vector.items()}
    squared = start = _dot(residual, residual)
    with distributed.progress_bar(total=max_steps, desc="inverse Fisher", unit="pass") as bar:
        for _ in range(max_steps):
            if squared <= tolerance**2 * start:
                break
            augment = augmentation() if augmentation else None
            product = fisher_product(model, images, indices, direction, augment)
            for name in product:
                product[name] += damping * direction[name]
            length = squared / _dot(direction, product)
            for name in solution:
                solution[name] += length * direction[name]
                residual[name] -= length * product[name]
            previous, squared = squared, _dot(residual, residual)
            for name in direction:
                direction[name] = residual[name] + squared / previous * direction[name]
            bar.update()
    return solution


def fisher_product(model, images, indices, vector, augment=None, chunk=64):
    """F v for the empirical Fisher information F of images, a tensor per parameter.

    F v is the mean of g (gᵀ v). A forward-mode derivative gives gᵀ v of every image of a chunk, and
    one backward pass the sum of the g with these weights. ``augment`` is the generator of the
    augmentation, or None. Several processes divide each chunk, as in :func:`mean_gradient`.
    """
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    total = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    chunks = indices.split(chunk)
    for chunk_indices, inputs in zip(chunks, images.batches(chunks, augment), strict=True):
        if not len(inputs):
            continue
        labels = images.labels[distributed.local_rows(chunk_indices)]

        def losses(parameters, inputs=inputs, labels=labels):
            logits = torch.func.functional_call(model, parameters, (inputs,))
            return F.cross_entropy(logits, labels, reduction="none")

        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # torch's own forward-mode rules still use torch.jit.
            _, projections = torch.func.jvp(losses, (parameters,), (vector,))
        _, gradients_of = torch.func.vjp(losses, parameters)
        (gradients,) = gradients_of(projections)
        for name, gradient in gradients.items():
            total[name] += gradient / len(indices)
    distributed.add_up(total.values())
    return total


def _dot(first, second):
    """The inner product of two {name: tensor}, in float64."""
    products = [(first[name].double() * second[name].double()).sum() for name in first]
    return torch.stack(products).sum().item()


def last_layer(model):
    """Names of the parameters of the layers that turn features into logits."""
    last = {parameter for layer in classifier_layers(model) for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if parameter in last}


def _functional_squares(model, inputs, *, labels, scores):
    """Pairs of a parameter's name and an image's squared gradients, summed over the rows."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for image, label in zip(inputs, labels, strict=True):

        def image_logits(parameters, image=image):
            return torch.func.functional_call(model, parameters, (image[None],))[0]

        logits, gradients_of = torch.func.vjp(image_logits, parameters)
        (gradients,) = torch.func.vmap(gradients_of)(scores(logits, label))
        for name, gradient in gradients.items():
            yield name, gradient.square().sum(0)


# ---------------------------------------------------------------- layer by layer


@dataclass
class _LayerCall:
    """A layer's name, the factors of its weights (image × weight × position) and its output."""

    name: str
    layer: nn.Module
    columns: torch.Tensor
    output: torch.Tensor


def _layers_with_weights(model):
    layers = dict(model.named_modules())
    return {name: layer for name, layer in layers.items() if list(layer.parameters(recurse=False))}


def _knows_layers(model):
    """Whether :func:`_layer_squares` applies to every layer that has weights."""
    return all(map(_knows, _layers_with_weights(model).values()))


def _knows(layer):
    # The exact type: a subclass may compute something else.
    if type(layer) is nn.Conv2d:
        plain_padding = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return layer.groups == 1 and plain_padding
    if type(layer) is nn.BatchNorm2d:
        return layer.track_running_stats
    return type(layer) is nn.Linear


def _layer_squares(model, inputs, *, labels, scores):
    """Pairs of a parameter's name and sums over images of squared gradients.

    A weight gradient is the product of what the layer multiplies the weight by and of the gradient
    at the layer's output, summed over positions. In eval mode images do not interact, so one
    backward pass of a row summed over images gives each image's own gradient at every output.
    """
    logits, calls = _call_layers(model, inputs)
    if sorted(call.name for call in calls) != sorted(_layers_with_weights(model)):
        # A layer that is called twice sums the gradients of both calls before the square.
        yield from _functional_squares(model, inputs, labels=labels, scores=scores)
        return
    image_scores = [scores(*pair) for pair in zip(logits.detach(), labels, strict=True)]
    weight_squares = {  # weight × output channel
        call.name: call.layer.weight.new_zeros(call.layer.weight.flatten(1).shape[::-1])
        for call in calls
        if not isinstance(call.layer, nn.BatchNorm2d)
    }
    for row in torch.stack(image_scores, dim=1):  # image × class
        outputs = [call.output for call in calls]
        gradients = torch.autograd.grad(logits, outputs, row, retain_graph=True)
        for call, gradient in zip(calls, gradients, strict=True):
            # image × channel × position; a linear layer has one position
            gradient = gradient.flatten(2) if gradient.ndim > 2 else gradient[:, :, None]
            if call.name in weight_squares:
                _add_squared_products(weight_squares[call.name], call.columns, gradient)
            else:
                scale_gradient = (gradient * call.columns).sum(2)
                yield _parameter_name(call, "weight"), scale_gradient.square().sum(0)
            if call.layer.bias is not None:
                yield _parameter_name(call, "bias"), gradient.sum(2).square().sum(0)
    for call in calls:
        if call.name in weight_squares:
            square = weight_squares[call.name].T.reshape(call.layer.weight.shape)
            yield _parameter_name(call, "weight"), square


def _parameter_name(call, parameter):
    return f"{call.name}.{parameter}" if call.name else parameter


def _call_layers(model, inputs):
    """The logits and a :class:`_LayerCall` per call of a layer with weights."""
    calls, handles = [], []
    for name, layer in _layers_with_weights(model).items():

        def record(layer, arguments, output, name=name):
            columns = _as_columns(layer, arguments[0].detach())
            calls.append(_LayerCall(name, layer, columns=columns, output=output))
            # The next layer may work in place, on a copy instead of the recorded output.
            return output.clone()

        handles.append(layer.register_forward_hook(record))
    try:
        return model(inputs), calls
    finally:
        for handle in handles:
            handle.remove()


def _as_columns(layer, inputs):
    """What a layer multiplies each weight of an output channel by: image × weight × position."""
    if isinstance(layer, nn.Conv2d):
        return F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    if isinstance(layer, nn.BatchNorm2d):
        deviation = (layer.running_var + layer.eps).sqrt()
        normalised = (inputs - layer.running_mean[:, None, None]) / deviation[:, None, None]
        return normalised.flatten(2)
    return inputs[:, :, None]


def _add_squared_products(total, columns, gradient):
    """Add Σ over images of (columns · gradientᵀ)², squared elementwise, to ``total``.

    Shapes: total W×C, columns B×W×P, gradient B×C×P, for W weights per output channel, C output
    channels, B images and P positions.
    """
    if gradient.shape[2] == 1:
        # The square of an outer product is the outer product of the squares: one matrix product.
        total.addmm_(columns.flatten(1).square().T, gradient.flatten(1).square())
    elif gradient.is_cuda:
        total += torch.bmm(columns, gradient.mT).square_().sum(0)
    else:
        # One image after the other: a single product fits in a CPU's cache, and a chunk's does not.
        # Columns come first because matrix products on CPUs are faster with the longer side first.
        product = torch.empty_like(total)
        for image_columns, image_gradient in zip(columns, gradient.mT, strict=True):
            torch.mm(image_columns, image_gradient, out=product)
            total.addcmul_(product, product)
