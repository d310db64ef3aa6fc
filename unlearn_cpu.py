"""Conformal Prediction Unlearning (CPU, arXiv 2501.19403): a conformal loss for trainable methods.

    L = L_method + λ · mean over the forget images in the batch of max(q̂ − S(x, y) + Δ, 0)

S(x, y) = 1 − p_y(x) is the non-conformity score of the image's own label. The term is zero once the
score exceeds q̂ by Δ. The label is then outside the prediction set.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F

import unlearn
import utils
from metrics import CR, scores
from models import inference
from models.errors import UserError

# Every method of unlearn.py that is trained by gradient steps on a bounded loss.
METHODS = {f"cpu_{name}": method for name, method in unlearn.METHODS.items() if method.extensible}


def conformal_loss(logits, labels, q_hat, delta):
    """mean(max(q̂ − S + Δ, 0)) with S = 1 − p_y of each image's own label y (arXiv 2501.19403).

    Logits M×K and labels M of the forget images → a scalar with gradient. 0 for M = 0.
    """
    # gather takes column y of each row, M numbers; p[:, labels] would be an M×M matrix.
    scores = 1 - torch.softmax(logits.float(), dim=1).gather(1, labels[:, None]).squeeze(1)
    return (q_hat - scores + delta).clamp(min=0).sum() / max(len(labels), 1)


def all_pairs_loss(logits, labels, q_hat, delta):
    """mean(max(q̂ − S(xᵢ, yⱼ) + Δ, 0)) over all pairs of an image xᵢ and a label yⱼ of the batch.

    The loss of the code released with arXiv 2501.19403. Most pairs have the label of another image,
    which is hardly ever in the set, so its λ acts like a much smaller one of
    :func:`conformal_loss`. Logits M×K and labels M of the forget images → a scalar with gradient.
    0 for M = 0.
    """
    scores = 1 - torch.softmax(logits.float(), dim=1)[:, labels]
    return (q_hat - scores + delta).clamp(min=0).sum() / max(len(labels), 1) ** 2


def ascent_loss(logits, labels, q_hat, delta):
    """−mean(cross-entropy): plain gradient ascent, the control for the conformal loss.

    It uses neither q̂ nor Δ, and has no bound. Logits M×K and labels M of the forget images → a
    scalar with gradient. 0 for M = 0.
    """
    return -F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)


class Loss(NamedTuple):
    """A form of the term of the forget images, and the default weight λ that suits it."""

    function: Callable
    lamda: float


LOSSES = {
    "own": Loss(conformal_loss, lamda=0.05),
    "pairs": Loss(all_pairs_loss, lamda=0.5),
    "ascent": Loss(ascent_loss, lamda=0.01),
}


def add_flags(parser):
    """The flags of the conformal loss."""
    add = parser.add_argument_group("conformal prediction unlearning").add_argument
    add("--alpha", type=utils.ALPHA, default=0.05, help="miscoverage level of q̂ in the loss")
    add("--delta", type=utils.number(float, 0), default=0.01, help="margin Δ beyond q̂")
    forms = "term: scores of each image's true label, of all pairs of images and labels in a batch"
    forms = f"{forms} (the released code), or ascent of the cross-entropy without a score (control)"
    add("--loss", choices=LOSSES, default="own", help=forms)
    defaults = ", ".join(f"{loss.lamda:g} for {name}" for name, loss in LOSSES.items())
    lamda = f"weight λ of the conformal loss; 0 gives the base method; default: {defaults}"
    add("--lamda", type=utils.number(float, 0), help=lamda)


@dataclass
class ConformalTerm:
    """The conformal loss. Its q̂ is recomputed at the start of each epoch and constant within it.

    ``calibration`` are indices into the held-out ``images``. ``form`` is a name in ``LOSSES``.
    ``q_hats`` has the q̂ of every epoch. Raises UserError if there are too few calibration images
    for a finite q̂.
    """

    images: utils.Images
    calibration: torch.Tensor
    alpha: float
    delta: float
    lamda: float
    form: str = "own"
    q_hat: float | None = None
    q_hats: list[float] = field(default_factory=list)

    def __post_init__(self):
        # q̂ is the ⌈(n+1)(1−α)⌉-th smallest of n scores, so it is finite from n ≥ 1/α − 1 on.
        count, minimum = len(self.calibration), math.ceil(1 / self.alpha) - 1
        if count >= minimum:
            return
        smallest_alpha = math.ceil(1000 / (count + 1)) / 1000
        remedy = (
            f"choose --alpha {smallest_alpha:g} or larger"
            if count
            else "add held-out images of the retained classes"
        )
        raise UserError(
            f"--alpha {self.alpha}: a finite q̂ needs at least {minimum} training calibration "
            f"images, and this data gives {count} (a tenth of the held-out images, without "
            f"forgotten classes); {remedy}"
        )

    def start_epoch(self, model):
        """Compute q̂ on the calibration images, without gradient. Returns {"q_hat": q̂}.

        The model is in eval mode meanwhile, and afterwards in its previous mode.
        """
        logits, labels = inference.compute_logits(model, self.images, self.calibration)
        self.q_hat = CR.conformal_quantile(scores.true_label_scores(logits, labels), self.alpha)
        self.q_hats.append(self.q_hat)
        return {"q_hat": self.q_hat}

    def loss(self, logits, labels):
        """The loss of the forget images of a step, M×K and M → a scalar, with this epoch's q̂."""
        return LOSSES[self.form].function(logits, labels, self.q_hat, self.delta)

    def advice(self):
        """A line for a complete run whose α was too large for the term to matter, else None."""
        typical = statistics.median(self.q_hats)
        if CR.at_most_one_label(typical) and self.form != "ascent":
            return (
                f"--alpha {self.alpha} is above the model's error rate: the median q̂ was "
                f"{typical:.3f}, so prediction sets held at most one label and the conformal term "
                "had little effect; a smaller --alpha has more"
            )
        return None
