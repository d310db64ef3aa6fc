"""A small unlearning problem, and the same network and optimizer from their formulas in float64."""

import dataclasses
import math
from types import SimpleNamespace

import torch
from torch import nn

import main_unlearn
import unlearn
import unlearn_cpu
import utils
from models.training import Job, Recipe

CLASSES = 5
BRIGHTER = 1.25  # augmentation multiplies the small images by this
JOB_FIELDS = ("seed", "model", "new_model", "log", "quiet", "compile", "progress", "stop_at")


def arguments(*flags, methods=unlearn.METHODS, data="cifar10"):
    """The flags of main_unlearn.py."""
    parser = main_unlearn.make_parser("", methods)
    unlearn_cpu.add_flags(parser)
    return parser.parse_args(["--unlearn_name", "all", "--data_name", data, *map(str, flags)])


class SmallNet(nn.Sequential):
    """Two layers with weights and a BatchNorm between them; 3×4×4 images."""

    def __init__(self, seed=0):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, CLASSES),
        )
        rng = torch.Generator().manual_seed(seed)
        for name, tensor in self.state_dict().items():
            if "running_var" in name or "1.weight" in name:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
            elif tensor.is_floating_point():
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=rng))


class Tensors:
    """Replaces utils.Images: augmented images are brighter.

    ``uses`` has one pair per batch: its indices, and the seed of its augmentation or None.
    """

    size = 4
    spec = utils.DataSpec(mean=(0.5, 0.4, 0.6), std=(0.2, 0.1, 0.15))

    def __init__(self, inputs, labels):
        self.inputs = self.pixels = inputs
        self.labels, self.uses = labels, []

    def __len__(self):
        return len(self.labels)

    def batches(self, index_batches, augment=None):
        for indices in index_batches:
            self.uses.append((indices.tolist(), augment and augment.initial_seed()))
            yield self.inputs[indices] * (BRIGHTER if augment else 1)


def images(count, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    shift = labels[:, None, None, None] / CLASSES
    return Tensors(torch.randn(count, 3, 4, 4, generator=rng) + shift, labels)


def small_job(
    label,
    retain=19,
    forget=11,
    *,
    lamda=None,
    alpha=0.1,
    delta=0.03,
    train_calibration=20,
    forget_class=None,
    **settings,
):
    """A job of ``retain`` and ``forget`` images, with the options of its method in ``options``.

    ``settings`` are fields of the job, fields of its recipe, or options of the method.
    """
    train, held_out = images(retain + forget, 1), images(40, 2)
    name = label.removeprefix("cpu_")
    recipe = Recipe(3, 0.05, batch_size=8, momentum=0.8, weight_decay=0.03)
    chosen = [field.name for field in dataclasses.fields(Recipe) if field.name in settings]
    recipe = dataclasses.replace(recipe, **{key: settings.pop(key) for key in chosen})
    order = torch.randperm(retain + forget, generator=torch.Generator().manual_seed(3))
    held_out_sets = torch.arange(40).split([train_calibration, 32 - train_calibration, 8])
    nothing = torch.empty(0, dtype=torch.int64)
    split = utils.Split(
        retain=order[:retain].sort().values,
        forget=order[retain:].sort().values,
        train_calibration=held_out_sets[0],
        test=held_out_sets[1],
        calibration=held_out_sets[2],
        forget_test=nothing,
        is_forgotten=nothing,
        forget_classes=() if forget_class is None else (forget_class,),
    )
    term = None
    if lamda is not None:
        term = unlearn_cpu.ConformalTerm(
            held_out, split.train_calibration, alpha=alpha, delta=delta, lamda=lamda
        )
    defaults = {"seed": 4, "model": SmallNet(), "new_model": lambda: SmallNet(7), "split": split}
    fields = defaults | {key: settings.pop(key) for key in JOB_FIELDS if key in settings}
    method, data = unlearn.METHODS[name], SimpleNamespace(train=train, held_out=held_out)
    data.classes = [*"abcde"]
    job = Job(
        name=name,
        label=label,
        data=data,
        recipe=recipe if method.trained else None,
        term=term,
        **fields,
    )
    # All epochs of the recipe, and steps of equal size.
    small = {"num_steps": None, "recovery": math.inf, "forget_batch_size": None}
    job.options = method.options | {key: small[key] for key in small if key in method.options}
    job.options |= settings
    return job


def run(job):
    """The weights and statistics after the method, by name."""
    unlearn.METHODS[job.name].run(job, **job.options)
    return {name: tensor.detach().clone() for name, tensor in job.model.state_dict().items()}


def training_steps(job):
    """(epoch, retain indices, forget indices) of every step of a finished job, in order."""
    retain_set, steps, seeds = set(job.split.retain.tolist()), [], {}
    for indices, seed in job.data.train.uses:
        if seed is not None:
            epoch = seeds.setdefault(seed, len(seeds) + 1)
            num_retain = sum(index in retain_set for index in indices)
            assert set(indices[:num_retain]) <= retain_set  # the retain images come first
            indices = torch.tensor(indices).long()
            steps.append((epoch, indices[:num_retain], indices[num_retain:]))
    return steps


class ByHand:
    """The network and SGD with momentum m by hand: v ← m·v + g + wd·w, w ← w − rate·v."""

    def __init__(self, model):
        state = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
        self.mean, self.var = state.pop("1.running_mean"), state.pop("1.running_var")
        state.pop("1.num_batches_tracked")
        self.weights = {name: tensor.requires_grad_() for name, tensor in state.items()}
        self.velocity = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.squares = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.keeps_statistics = True

    def logits(self, inputs, training=False):
        w = self.weights
        x = torch.nn.functional.conv2d(inputs.double(), w["0.weight"], w["0.bias"], padding=1)
        mean, var = self.mean, self.var
        if training and len(inputs) > 1:
            count = x.numel() / x.shape[1]
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if self.keeps_statistics:
                self.mean = 0.9 * self.mean + 0.1 * mean.detach()
                self.var = 0.9 * self.var + 0.1 * var.detach() * count / (count - 1)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = (x * w["1.weight"][:, None, None] + w["1.bias"][:, None, None]).clamp(min=0)
        return x.flatten(1) @ w["4.weight"].T + w["4.bias"]

    def log_p(self, inputs):
        return self.logits(inputs).log_softmax(1)

    def gradients(self, loss):
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        return dict(zip(self.weights, gradients, strict=True))

    def descend(self, gradients, rate, momentum, weight_decay, masks=None):
        with torch.no_grad():
            for name, weight in self.weights.items():
                gradient = gradients[name] + weight_decay * weight
                self.velocity[name] = momentum * self.velocity[name] + gradient
                weight -= rate * self.velocity[name] * (1 if masks is None else masks[name])

    def adapt(self, gradients, rate, weight_decay, step):
        """Adam's step number ``step``, with β = 0.9 and 0.999 (Kingma & Ba 2015, algorithm 1)."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                gradient = gradients[name] + weight_decay * weight
                self.velocity[name] = 0.9 * self.velocity[name] + 0.1 * gradient
                self.squares[name] = 0.999 * self.squares[name] + 0.001 * gradient.square()
                mean = self.velocity[name] / (1 - 0.9**step)
                square = self.squares[name] / (1 - 0.999**step)
                weight -= rate * mean / (square.sqrt() + 1e-8)

    def batch_fisher(self, inputs, labels, batches):
        """Mean over batches of (∂ mean of log p_label over the batch / ∂ w)²."""
        squares = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for batch in batches:
            log_p = self.log_p(inputs[batch])[range(len(batch)), labels[batch]].mean()
            for name, gradient in self.gradients(log_p).items():
                squares[name] += gradient.square() / len(batches)
        return squares

    def empirical_fisher(self, inputs, labels):
        """Mean over images of (∂ log p_label / ∂ w)²."""
        return self.batch_fisher(inputs, labels, torch.arange(len(labels)).split(1))

    def expected_fisher(self, inputs):
        """Mean over images of Σ_c p_c·(∂ log p_c / ∂ w)²."""
        return by_definition(self.log_p, self.weights, inputs)

    def state(self):
        statistics = {"1.running_mean": self.mean, "1.running_var": self.var}
        return {name: weight.detach() for name, weight in self.weights.items()} | statistics

    def assert_equal(self, state, rtol=1e-4, atol=1e-6):
        for name, tensor in self.state().items():
            torch.testing.assert_close(
                state[name].double(), tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m
            )


def rates(recipe):
    """The learning rate of each epoch: constant, a cosine, or divided by 10 at milestones."""
    for epoch in range(recipe.num_epochs):
        factor = 0.1 ** sum(epoch >= milestone for milestone in recipe.milestones or ())
        if not recipe.milestones and recipe.schedule == "cosine":
            factor = (1 + math.cos(math.pi * epoch / recipe.num_epochs)) / 2
        yield recipe.learning_rate * factor


def by_definition(log_p, weights, images, labels=None):
    """Importances of weights by one backward pass per image and, without labels, per class."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number, image in enumerate(images):
        row = log_p(image[None])[0]
        for c in range(len(row)) if labels is None else [labels[number]]:
            gradients = torch.autograd.grad(row[c], list(weights.values()), retain_graph=True)
            share = row[c].exp().detach() if labels is None else 1
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += gradient**2 * share / len(images)
    return total
