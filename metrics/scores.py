"""Non-conformity scores S(x, y): how badly a label fits an image.

The paper's score is ``thr``. A prediction set contains the labels with S ≤ q̂.

Scores are *compared* as log-odds, log S − log(1 − S), in float64, and *reported* as S. S is a sum
of probabilities. It rounds to 1 where the label's probability is below 10⁻¹⁶, which unlearning
reaches for forgotten labels, and 1 − S rounds to 1 for confident models. The log-odds increase with
S and distinguish all of these, so sets, q̂ and coverage are exact.

The adaptive scores (aps, raps) take u, one number in [0, 1] per image. A uniform u makes the
coverage exact, and u = 1 is the version without randomisation. Labels of equal probability rank in
the order of their numbers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

NAMES = ("thr", "aps", "raps")
# S ≥ 1 has no log-odds: FROM_ONE_ON · S replaces them, above all differences of float32 logits.
FROM_ONE_ON = 1e40


def thr(logits):
    """S(x, y) = 1 − p_y(x) (2501.19403; Sadinle et al. 2019). Logits N×K → N×K, float64."""
    return from_log_odds(thr_log_odds(logits))


def true_label_scores(logits, labels):
    """1 − p_y(x) of each image's true label. Logits N×K, labels N → N, float64."""
    return thr(logits).gather(1, labels[:, None]).squeeze(1)


def true_label_log_odds(logits, labels):
    """The log-odds of :func:`true_label_scores`, which rounds to 0 or 1. → N, float64."""
    return thr_log_odds(logits).gather(1, labels[:, None]).squeeze(1)


def thr_log_odds(logits):
    """log(1 − p) − log p of every label. Logits N×K → N×K, float64."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    top = log_p.argmax(dim=1, keepdim=True)
    # 1 − p of the top label is the sum of the other probabilities where p is near 1.
    # Only one label can have p > 1/2, so ties stay ties.
    log_others = log_p.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_top = log_p.gather(1, top)
    log_others = torch.where(log_top > math.log(0.5), log_others, torch.log1p(-log_top.exp()))
    return torch.log1p(-log_p.exp()).scatter(1, top, log_others) - log_p


def aps_log_odds(logits, u):
    """Log-odds of aps (Romano et al. 2020, 2006.02544).

    S is the probability of all labels ranked before y plus u · p_y. 1 − S is (1 − u) · p_y plus the
    probability of all labels ranked after y. Logits N×K, u N → N×K, float64.
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
    ranks = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    added = penalty * (ranks.double() - k_reg).clamp(min=0)
    # S and 1 − S are computed separately, so neither has the other's rounding error.
    score, rest = log_score.exp() + added, log_rest.exp() - added
    penalised = torch.where(rest > 0, score.log() - rest.log(), FROM_ONE_ON * score)
    return _unranked(torch.where(added > 0, penalised, _log_odds(log_score, log_rest)), order)


def from_log_odds(values):
    """The scores S of log-odds (a float64 tensor of any shape; NaN stays NaN)."""
    return torch.maximum(torch.sigmoid(values), values / FROM_ONE_ON)


def _adaptive(ranked, u):
    """log S and log(1 − S) of aps, from log p in descending order N×K."""
    nothing = torch.full_like(ranked[:, :1], -math.inf)
    # Cumulative sums from both ends, each without the label itself.
    before = torch.cat([nothing, ranked.logcumsumexp(dim=1)[:, :-1]], dim=1)
    after = torch.cat([ranked.flip(1).logcumsumexp(dim=1).flip(1)[:, 1:], nothing], dim=1)
    log_u, log_rest = u.log()[:, None], torch.log1p(-u)[:, None]
    return torch.logaddexp(before, log_u + ranked), torch.logaddexp(after, log_rest + ranked)


def _log_odds(log_score, log_rest):
    """log S − log(1 − S); FROM_ONE_ON where S = 1."""
    return torch.where(log_rest.isneginf(), FROM_ONE_ON, log_score - log_rest)


def _ranked(logits):
    """log p in descending order and the label of each rank. Logits N×K → twice N×K."""
    return torch.log_softmax(logits.double(), dim=1).sort(descending=True, stable=True)


def _unranked(ranked, order):
    """Values by rank as values by label. Twice N×K → N×K."""
    return torch.empty_like(ranked).scatter(1, order, ranked)


@dataclass(frozen=True)
class Score:
    """A score with its parameters. ``score(logits, part)`` → S, N×K, float64.

    ``seed`` and ``part`` (forget, retain or held_out) determine the u of aps and raps.
    """

    name: str = "thr"
    randomized: bool = True
    penalty: float = 0.01
    k_reg: int = 5
    seed: int = 0

    def __call__(self, logits, part="forget"):
        return from_log_odds(self.log_odds(logits, part))

    def log_odds(self, logits, part):
        """The log-odds that sets and q̂ compare. Logits N×K → N×K, float64."""
        if self.name == "thr":
            return thr_log_odds(logits)
        u = np.ones(len(logits))
        if self.randomized:
            u = np.random.default_rng([self.seed, *part.encode()]).random(len(logits))
        u = torch.from_numpy(u).to(logits.device)
        if self.name == "aps":
            return aps_log_odds(logits, u)
        return raps_log_odds(logits, u, self.penalty, self.k_reg)
