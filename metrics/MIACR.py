"""MIACR: the conformal version of the membership attack (arXiv 2501.19403).

The attack is an SVM on the confidence in the true label. Its probabilities give a score for each of
the two labels, {non-member, member}, which is calibrated on held-out members and non-members.

One attack is trained per model, on half of the split's test images (non-members) and as many retain
images (members). All other retain and held-out images can be calibration images. The split itself
has its own calibration images as non-members; every other draw redraws as many.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from . import CR, MIA, attack
from .columns import Column, csv_only

ROW_COLUMNS = {
    "MIACR": Column(
        "MIACR", "percent", "near Retrain", "forget images with the membership set {non-member}"
    ),
}
CSV_COLUMNS = {
    "MIACR_calibration_images": csv_only(
        "count", "calibration images of MIACR: members and non-members, one half each"
    ),
}
NON_MEMBER, MEMBER = 0, 1


class Images(NamedTuple):
    """Images of the attack, equally many: indices into retain and into held_out."""

    members: torch.Tensor
    non_members: torch.Tensor


def training_images(outputs, seed):
    """The training :class:`Images` of one model's attack, drawn by the seed, for every draw."""
    rng = np.random.default_rng(seed)
    members = _shuffled(torch.arange(len(outputs.retain.labels)), rng)
    test = _shuffled(outputs.test(), rng)
    # Retain images that are left for calibration: at most half of all.
    calibration = min(len(members) // 2, len(outputs.calibration(max(outputs.cal_sizes))))
    count = min(len(members) - calibration, len(test) // 2)
    return Images(members[:count], test[:count])


def calibration_images(outputs, training, size, seed, draw):
    """The calibration :class:`Images` of one draw, without the ``training`` images.

    As many of each kind as the split has calibration images of the retained classes among the first
    ``size``, or as there are other retain images.
    """
    rng = np.random.default_rng([seed, draw])
    unused = torch.ones(len(outputs.retain.labels), dtype=torch.bool)
    unused[training.members] = False  # calibration is on images that did not train the attack
    members = _shuffled(unused.nonzero().flatten(), rng)
    held_out = outputs.retained(draw)
    non_members = held_out[~torch.isin(held_out, training.non_members)]
    # A draw has its calibration images first. In draw 0 none of them trained the attack: the slice
    # is the split's own calibration set.
    count = min(len(members), len(outputs.calibration(size)))
    return Images(members[:count], non_members[:count])


def _shuffled(indices, rng):
    return indices[torch.from_numpy(rng.permutation(len(indices)))]


def membership_scores(probabilities):
    """S(x, {non-member, member}) = 1 − probability. P(member) N → N×2, float64."""
    return torch.stack([probabilities, 1 - probabilities], dim=1)  # columns NON_MEMBER, MEMBER


def miacr(target_scores, member_scores, non_member_scores, alpha):
    """Share of the targets whose conformal set is exactly {non-member}.

    All scores are M×2 from :func:`membership_scores`. q̂ is the conformal quantile of the scores of
    the true membership on held-out members and non-members. NaN without a finite q̂, or if the
    attack has no probabilities (scores of NaN).
    """
    if target_scores.isnan().any():
        return math.nan
    true_scores = torch.cat([member_scores[:, MEMBER], non_member_scores[:, NON_MEMBER]])
    q_hat = CR.finite_quantile(true_scores, alpha)
    if math.isnan(q_hat):
        return math.nan
    sets = CR.prediction_sets(target_scores, q_hat)  # M×2: none, one or both of the labels
    return (sets[:, NON_MEMBER] & ~sets[:, MEMBER]).double().mean().item()


def score_by_attack(outputs, training):
    """The membership scores of every image: {"retain", "held_out", "forget": N×2, float64}.

    NaN with fewer than five training images of a kind, or if the attack does not tell them apart.
    """
    parts = ("retain", "held_out", "forget")
    confidence = {part: MIA.confidences(*getattr(outputs, part)) for part in parts}
    points = torch.cat(list(confidence.values())).numpy()
    probabilities = np.full(len(points), math.nan)
    if len(training.members) >= attack.FOLDS:
        members = confidence["retain"][training.members].numpy()
        non_members = confidence["held_out"][training.non_members].numpy()
        probabilities = attack.membership_probabilities(members, non_members, points)
    # One call of the attack for all parts, split afterwards.
    sizes = [len(values) for values in confidence.values()]
    all_scores = membership_scores(torch.from_numpy(probabilities))
    return dict(zip(parts, all_scores.split(sizes), strict=True))


def report(outputs, conformal_scores, settings):
    """MIACR per (score, calibration size, α), equal for every score. Returns ``({}, rows)``.

    NaN if there are too few training or calibration images.
    """
    training = training_images(outputs, settings.seed)
    scores = score_by_attack(outputs, training)
    rows = {}
    for size in outputs.cal_sizes:
        draws = [
            calibration_images(outputs, training, size, settings.seed, draw)
            for draw in range(outputs.num_draws)
        ]
        for alpha in settings.alphas:
            shares = []
            for images in draws:
                members = scores["retain"][images.members]
                non_members = scores["held_out"][images.non_members]
                shares.append(miacr(scores["forget"], members, non_members, alpha))
            row = {
                "MIACR": CR.over_draws(torch.tensor(shares, dtype=torch.float64)),
                "MIACR_calibration_images": 2 * len(draws[0].members),
            }
            rows |= {(score.name, size, alpha): dict(row) for score in settings.scores}
    return {}, rows
