"""Conformal Prediction Unlearning (CPU, arXiv 2501.19403): the conformal loss, added to any trainable method.

    L = L_method + λ · mean over the forget images in the batch of max(q̂ − S(x, y) + Δ, 0)

S(x, y) = 1 − p_y(x) is the non-conformity score of the image's own label. The term is zero once the label
lies Δ beyond q̂, outside the prediction set.
"""

import math
import statistics
from dataclasses import dataclass, field

import torch

import unlearn
import utils
from metrics import CR, scores
from models import inference

# Every method of unlearn.py that is trained by gradient steps.
METHODS = {f"cpu_{name}": entry for name, entry in unlearn.METHODS.items() if entry.extensible}


def conformal_loss(logits, labels, q_hat, delta):
    """mean(max(q̂ − S + Δ, 0)), S = 1 − the probability of each image's own label (arXiv 2501.19403, the CPU loss).

    Logits M×K of the forget images, labels M, q̂ and Δ floats → a scalar with gradient; 0 where M = 0.
    """
    scores = 1 - torch.softmax(logits.float(), dim=1).gather(1, labels[:, None]).squeeze(1)
    return (q_hat - scores + delta).clamp(min=0).sum() / max(len(labels), 1)


@dataclass
class ConformalTerm:
    """The conformal loss with its q̂, taken anew at the start of each epoch and constant within it."""

    images: utils.Images
    calibration: torch.Tensor
    alpha: float
    delta: float
    lamda: float
    q_hat: float | None = None
    q_hats: list[float] = field(default_factory=list)

    def __post_init__(self):
        count, least = len(self.calibration), math.ceil(1 / self.alpha) - 1
        if count < least:
            enough = math.ceil(1000 / (count + 1)) / 1000
            remedy = (
                f"choose --alpha {enough:g} or more"
                if count
                else "add held-out images of the retained classes"
            )
            raise utils.UserError(
                f"--alpha {self.alpha}: a finite q̂ needs at least {least} training-calibration images, and this data "
                f"gives {count} (of a tenth of the held-out images, the retained classes'); {remedy}"
            )

    def start_epoch(self, model):
        """q̂ on the training-calibration images: eval mode, no gradient, the model's mode left as it was."""
        logits, labels = inference.compute_logits(model, self.images, self.calibration)
        self.q_hat = CR.conformal_quantile(scores.true_label_scores(logits, labels), self.alpha)
        self.q_hats.append(self.q_hat)
        return {"q_hat": self.q_hat}

    def loss(self, logits, labels):
        return conformal_loss(logits, labels, self.q_hat, self.delta)

    def advice(self):
        """A line for a finished run in which the term had little to push against, else None."""
        typical = statistics.median(self.q_hats)
        if CR.at_most_one_label(typical):
            return (
                f"--alpha {self.alpha} is above the model's error rate: q̂ was {typical:.3f} in the median epoch, so "
                "sets held one label at most and the conformal term hardly pushed; a smaller --alpha pushes more"
            )
        return None
