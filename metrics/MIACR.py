"""MIACR: the conformal version of the membership attack (arXiv 2501.19403).

The attack is an SVM on the confidence in the own label. Its probabilities give a score for each of
the two answers, {non-member, member}, which held-out members and non-members calibrate.

One attack is trained per model: non-members are half of the test images of the split, members as
many retain images (fewer where half of the retain images are not enough). All other retain images
and all other held-out images may calibrate. The split itself calibrates on its calibration images.
Every other draw redraws as many of them.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from . import CR, MIA, attack
from .columns import Column

ROW_COLUMNS = {
    "MIACR": Column(
        "MIACR",
        "percent",
        "near Retrain",
        "share of the forget images whose conformal set over {member, non-member} is exactly "
        "{non-member}",
    ),
}
CSV_COLUMNS = {
    "MIACR_calibration_images": Column(
        "", "count", "", "members and non-members that calibrate MIACR, one half each"
    ),
}
NON_MEMBER, MEMBER = 0, 1


class Images(NamedTuple):
    """Images of the attack, equally many: indices into retain and into held_out."""

    members: torch.Tensor
    non_members: torch.Tensor


def training_images(outputs, seed):
    """The :class:`Images` that train the attack of one model, drawn by the seed.

    They are the same for every draw and calibration size.
    """
    rng = np.random.default_rng(seed)
    members = _shuffled(torch.arange(len(outputs.retain.labels)), rng)
    test = _shuffled(outputs.test(), rng)
    calibrating = min(len(members) // 2, len(outputs.calibration(max(outputs.cal_sizes))))
    count = min(len(members) - calibrating, len(test) // 2)
    return Images(members[:count], test[:count])


def calibration_images(outputs, training, size, seed, draw):
    """The :class:`Images` that calibrate one draw, none of which trains the attack.

    As many of each kind as the split has calibration images of the retained classes among the first
    ``size``, or as there are retain images left. The first draw takes the split's own non-members.
    """
    rng = np.random.default_rng([seed, draw])
    left = torch.ones(len(outputs.retain.labels), dtype=torch.bool)
    left[training.members] = False
    members = _shuffled(left.nonzero().flatten(), rng)
    held_out = outputs.retained(draw)
    non_members = held_out[~torch.isin(held_out, training.non_members)]
    count = min(len(members), len(outputs.calibration(size)))
    return Images(members[:count], non_members[:count])


def _shuffled(indices, rng):
    return indices[torch.from_numpy(rng.permutation(len(indices)))]


def membership_scores(probabilities):
    """S(x, {non-member, member}) = 1 − probability. P(member) N → N×2, float64."""
    return torch.stack([probabilities, 1 - probabilities], dim=1)


def miacr(target_scores, member_scores, non_member_scores, alpha):
    """Share of the targets whose conformal set is exactly {non-member}.

    All scores are M×2 from :func:`membership_scores`. q̂ is the conformal quantile of the scores of
    the true membership on held-out members and non-members, which did not train the attack. NaN
    where these are too few for a finite q̂, or where the attack has no answer (its scores are NaN).
    """
    if target_scores.isnan().any():
        return math.nan
    true_scores = torch.cat([member_scores[:, MEMBER], non_member_scores[:, NON_MEMBER]])
    q_hat = CR.finite_quantile(true_scores, alpha)
    if math.isnan(q_hat):
        return math.nan
    sets = CR.prediction_sets(target_scores, q_hat)
    return (sets[:, NON_MEMBER] & ~sets[:, MEMBER]).double().mean().item()


def score_by_attack(outputs, training):
    """The membership scores of every image: {"retain", "held_out", "forget": N×2, float64}.

    NaN where fewer than five members and non-members train the attack, or where it does not tell
    them apart.
    """
    parts = ("retain", "held_out", "forget")
    confidence = {part: MIA.confidences(*getattr(outputs, part)) for part in parts}
    points = torch.cat(list(confidence.values()))
    probabilities = torch.full_like(points, math.nan)
    if len(training.members) >= attack.FOLDS:
        probabilities = torch.from_numpy(
            attack.membership_probabilities(
                members=confidence["retain"][training.members].numpy(),
                non_members=confidence["held_out"][training.non_members].numpy(),
                points=points.numpy(),
            )
        )
    sizes = [len(values) for values in confidence.values()]
    return dict(zip(parts, membership_scores(probabilities).split(sizes), strict=True))


def report(outputs, conformal_scores, settings):
    """MIACR per (score, calibration size, α), which is the same for every score. Returns ``({},
    rows)``.

    ``MIACR_calibration_images`` counts the members and non-members that calibrate. MIACR is NaN
    where too few images train or calibrate the attack.
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
            shares = [
                miacr(
                    scores["forget"],
                    scores["retain"][images.members],
                    scores["held_out"][images.non_members],
                    alpha,
                )
                for images in draws
            ]
            row = {
                "MIACR": CR.over_draws(torch.tensor(shares, dtype=torch.float64)),
                "MIACR_calibration_images": 2 * len(draws[0].members),
            }
            rows |= {(score.name, size, alpha): dict(row) for score in settings.scores}
    return {}, rows
