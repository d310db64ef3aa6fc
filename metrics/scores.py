"""Non-conformity scores S(x, y): how badly a label fits an image.

The paper's score is ``thr``. A prediction set holds the labels with S ≤ q̂.

Scores are *compared* as log-odds, log S − log(1 − S), in float64, and *reported* as S. S is a sum
of probabilities. It rounds to 1 where the label's probability is below 10⁻¹⁶, which unlearning
reaches for forgotten labels, and 1 − S rounds to 1 for confident models. The log-odds increase with
S and distinguish all of these, so sets, q̂ and coverage are exact.

The adaptive scores (aps, raps, saps) take u, one number in [0, 1] per image. A uniform u makes the
coverage exact, and u = 1 is the version without randomisation. Labels of equal probability rank in
the order of their numbers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

NAMES = ("thr", "aps", "raps", "saps")
# S ≥ 1 has no log-odds: FROM_ONE_ON · S replaces them, above all differences of float32 logits.
FROM_ONE_ON = 1e40


def thr(logits):
    """S(x, y) = 1 − p_y(x) (arXiv 2501.19403; Sadinle et al. 2019).

    Logits N×K → scores N×K in [0, 1], float64.
    """
    return from_log_odds(thr_log_odds(logits))


def true_label_scores(logits, labels):
    """1 − p_y(x) of each image's own label. Logits N×K, labels N → N, float64."""
    return thr(logits).gather(1, labels[:, None]).squeeze(1)


def true_label_log_odds(logits, labels):
    """The log-odds of :func:`true_label_scores`, which rounds to 0 or 1. → N, float64."""
    return thr_log_odds(logits).gather(1, labels[:, None]).squeeze(1)


def thr_log_odds(logits):
    """log(1 − p) − log p of every label. Logits N×K → N×K, float64."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    top = log_p.argmax(dim=1, keepdim=True)
    # 1 − p is summed from the other labels where p is near 1.
    # Only one label can have p > 1/2, so ties stay ties.
    log_others = log_p.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_top = log_p.gather(1, top)
    log_others = torch.where(log_top > math.log(0.5), log_others, torch.log1p(-log_top.exp()))
    return torch.log1p(-log_p.exp()).scatter(1, top, log_others) - log_p


def aps_log_odds(logits, u):
    """Log-odds of aps (Romano et al. 2020, 2006.02544).

    S is the probability of all labels ranked before y plus u times y's own. 1 − S is (1 − u) times
    y's own plus the probability of all labels ranked after it. Logits N×K, u N → N×K, float64.
    """
    ranked, order = _ranked(logits)
    return _unranked(_log_odds(*_adaptive(ranked, u)), order)


def raps_log_odds(logits, u, penalty, k_reg):
    """Log-odds of raps (Angelopoulos et al. 2021, 2009.14193).

    S is that of aps plus ``penalty`` for each rank beyond ``k_reg``. Where S ≥ 1, scores of the
    same rank that differ by less than 10⁻¹⁶ are tied. Logits N×K, u N → N×K, float64.
    """
    ranked, order = _ranked(logits)
    log_score, log_rest = _adaptive(ranked, u)
    added = penalty * (_ranks(ranked) - k_reg).clamp(min=0)
    regularised = _from_both_ends(log_score.exp() + added, log_rest.exp() - added)
    return _unranked(torch.where(added > 0, regularised, _log_odds(log_score, log_rest)), order)


def saps_log_odds(logits, u, weight):
    """Log-odds of saps (Huang et al. 2024, 2310.06430).

    S is u · p_max for the top label and p_max + (rank − 2 + u) · ``weight`` for the others. Where
    S ≥ 1, scores of the same rank that differ by less than 10⁻¹⁶ are tied. Logits N×K, u N → N×K,
    float64.
    """
    ranked, order = _ranked(logits)
    log_top, log_others = ranked[:, :1], ranked[:, 1:].logsumexp(dim=1, keepdim=True)
    log_u, log_rest = u.log()[:, None], torch.log1p(-u)[:, None]
    top = _log_odds(log_u + log_top, torch.logaddexp(log_rest, log_u + log_others))
    added = (_ranks(ranked)[:, 1:] - 2 + u[:, None]) * weight
    others = _from_both_ends(log_top.exp() + added, log_others.exp() - added)
    return _unranked(torch.cat([top, others], dim=1), order)


def from_log_odds(values):
    """The scores S behind log-odds (a float64 tensor of any shape, NaN included)."""
    return torch.maximum(torch.sigmoid(values), values / FROM_ONE_ON)


def _adaptive(ranked, u):
    """log S and log(1 − S) of aps, from log p in descending order N×K."""
    nothing = torch.full_like(ranked[:, :1], -math.inf)
    before = torch.cat([nothing, ranked.logcumsumexp(dim=1)[:, :-1]], dim=1)
    after = torch.cat([ranked.flip(1).logcumsumexp(dim=1).flip(1)[:, 1:], nothing], dim=1)
    log_u, log_rest = u.log()[:, None], torch.log1p(-u)[:, None]
    return torch.logaddexp(before, log_u + ranked), torch.logaddexp(after, log_rest + ranked)


def _log_odds(log_score, log_rest):
    """log S − log(1 − S); FROM_ONE_ON where S = 1."""
    return torch.where(log_rest.isneginf(), FROM_ONE_ON, log_score - log_rest)


def _from_both_ends(score, rest):
    """The same from S and 1 − S, each without the rounding error of the other; S may exceed 1."""
    return torch.where(rest > 0, score.log() - rest.log(), FROM_ONE_ON * score)


def _ranked(logits):
    return torch.log_softmax(logits.double(), dim=1).sort(descending=True, stable=True)


def _ranks(ranked):
    """1, 2, …, K as 1×K."""
    return torch.ones_like(ranked[:1]).cumsum(dim=1)


def _unranked(ranked, order):
    return torch.empty_like(ranked).scatter(1, order, ranked)


@dataclass(frozen=True)
class Score:
    """A score with its parameters. ``score(logits, part)`` → S, N×K.

    ``part`` (the name of a part of the data) and the seed determine u.
    """

    name: str = "thr"
    randomized: bool = True
    penalty: float = 0.01
    k_reg: int = 5
    weight: float = 0.2
    seed: int = 0

    def __call__(self, logits, part="forget"):
        return from_log_odds(self.log_odds(logits, part))

    def log_odds(self, logits, part):
        """What sets and q̂ compare; see the head of the module. Logits N×K → N×K, float64."""
        if self.name == "thr":
            return thr_log_odds(logits)
        u = np.ones(len(logits))
        if self.randomized:
            u = np.random.default_rng([self.seed, *part.encode()]).random(len(logits))
        u = torch.from_numpy(u).to(logits.device)
        if self.name == "aps":
            return aps_log_odds(logits, u)
        if self.name == "raps":
            return raps_log_odds(logits, u, self.penalty, self.k_reg)
        return saps_log_odds(logits, u, self.weight)
