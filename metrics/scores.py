"""Non-conformity scores: how badly a label fits an image. The paper's is ``thr``; a set holds the labels with S ≤ q̂.

Each turns logits N×K (any float type) into scores N×K, float64. The adaptive ones (aps, raps, saps) take u, one number
in [0, 1] for each image: drawn uniformly it makes coverage exact, and u = 1 is the version that is not randomised.
Labels of equal probability rank in the order of their numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch

NAMES = ("thr", "aps", "raps", "saps")


def thr(logits):
    """S(x, y) = 1 − p_y(x) (arXiv 2501.19403; Sadinle et al. 2019). Scores lie in [0, 1].

    The score of the top label is summed from the other labels' probabilities: 1 − p rounds to 0 for a
    confident model, and the order of the confident scores, which is all that q̂ looks at, would be lost.
    """
    probabilities = torch.softmax(logits.double(), dim=1)
    top = probabilities.argmax(dim=1, keepdim=True)
    others = probabilities.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
    return (1 - probabilities).scatter(1, top, others)


def true_label_scores(logits, labels):
    """1 − p_y(x) of each image's own label. Logits N×K, labels N → N, float64."""
    return thr(logits).gather(1, labels[:, None]).squeeze(1)


def aps(logits, u):
    """The probability of all labels ranked before y, and u of y's own (Romano et al. 2020, 2006.02544). Scores in [0,
    1]."""
    probabilities, order = _ranked(logits)
    return _unranked(probabilities.cumsum(dim=1) - (1 - u[:, None]) * probabilities, order)


def raps(logits, u, penalty, k_reg):
    """``aps`` plus ``penalty`` for each rank beyond ``k_reg`` (Angelopoulos et al. 2021, 2009.14193)."""
    probabilities, order = _ranked(logits)
    beyond = (torch.arange(1, logits.shape[1] + 1, device=logits.device) - k_reg).clamp(min=0)
    return _unranked(probabilities.cumsum(dim=1) - (1 - u[:, None]) * probabilities + penalty * beyond, order)


def saps(logits, u, weight):
    """u · p_max for the top label; p_max + (rank − 2 + u) · ``weight`` for the others (Huang et al. 2024,
    2310.06430)."""
    probabilities, order = _ranked(logits)
    top = probabilities[:, :1]
    ranks = torch.arange(2, logits.shape[1] + 1, device=logits.device)
    return _unranked(torch.cat([u[:, None] * top, top + (ranks - 2 + u[:, None]) * weight], dim=1), order)


def _ranked(logits):
    return torch.softmax(logits.double(), dim=1).sort(dim=1, descending=True, stable=True)


def _unranked(ranked, order):
    return torch.empty_like(ranked).scatter(1, order, ranked)


@dataclass(frozen=True)
class Score:
    """A score with its parameters. ``score(logits, part)`` → N×K; ``part`` and the seed say which u are drawn."""

    name: str = "thr"
    randomized: bool = True
    penalty: float = 0.01
    k_reg: int = 5
    weight: float = 0.2
    seed: int = 0

    def __call__(self, logits, part="forget"):
        if self.name == "thr":
            return thr(logits)
        u = torch.ones(len(logits), dtype=torch.float64)
        if self.randomized:
            u = torch.from_numpy(np.random.default_rng([self.seed, *part.encode()]).random(len(logits)))
        u = u.to(logits.device)
        if self.name == "aps":
            return aps(logits, u)
        return raps(logits, u, self.penalty, self.k_reg) if self.name == "raps" else saps(logits, u, self.weight)
