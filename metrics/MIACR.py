"""MIACR: the conformal version of the membership attack (arXiv 2501.19403).

The attack is the SVM on the confidence in the own label; its probabilities make a score over {non-member, member},
which held-out members and non-members calibrate.
"""

import math

import numpy as np
import torch

from . import CR, MIA, svm
from .columns import Column

ROW_COLUMNS = {"MIACR": Column("MIACR", "percent")}
NON_MEMBER, MEMBER = 0, 1


def attack_probabilities(members, non_members, points, step=svm.FINE):
    """P(member) by attacks on confidence, one for each pair of training sets, all at the same ``points``.

    ``members`` and ``non_members`` are lists of equally long tensors of confidences, ``points`` a tensor of M
    → (number of attacks)×M, float64. Each is an RBF SVM (C = 3, γ = 1) with Platt-scaled probabilities: the sigmoid is
    fitted to decisions of five SVMs, each trained without the fifth of the images that it decides on, as scikit-learn's
    ``CalibratedClassifierCV(SVC(...), ensemble=False)`` does. NaN where an attack has no answer, because members and
    non-members have the same confidences. Raises ValueError for unequal or too few images.
    """
    for number, confidences in enumerate(members):
        MIA.check_sizes(len(confidences), len(non_members[number]))
    grid = svm.Grid(step)
    feature_map = svm.FeatureMap(svm.chebyshev_landmarks(*svm.Grid.ENDS))
    system = svm.Dense(feature_map, np.tile(grid.nodes, 2)[:, None])
    signs = torch.cat([torch.ones(grid.size), -torch.ones(grid.size)]).double()
    counts = torch.cat(
        [_fold_histograms(grid, members), _fold_histograms(grid, non_members)], dim=2
    )
    whole = counts.sum(dim=1, keepdim=True)
    trained = torch.cat([whole - counts, whole], dim=1)
    weights, tells_apart = svm.solve(system, signs, MIA.C * trained.flatten(0, 1))
    weights = weights.view(len(members), MIA.FOLDS + 1, -1)
    crossed = system.forward(weights[:, :-1])  # attacks × folds × nodes
    sigmoids = svm.platt(crossed.flatten(1), signs.repeat(MIA.FOLDS), counts.flatten(1))
    decisions = system.decision(points[:, None].numpy(), weights[:, -1])
    probabilities = torch.sigmoid(-(sigmoids[:, :1] * decisions + sigmoids[:, 1:]))
    probabilities[~tells_apart.view(len(members), -1)[:, -1]] = torch.nan
    return probabilities


def _fold_histograms(grid, confidences):
    """Histograms of each fold of each of the tensors of confidences → (number of tensors)×folds×nodes, float64."""
    return torch.from_numpy(
        np.stack(
            [[grid.histogram(fold) for fold in one.tensor_split(MIA.FOLDS)] for one in confidences]
        )
    )


def membership_scores(probabilities):
    """S(x, {non-member, member}) = 1 − probability. P(member) N → N×2, float64."""
    return torch.stack([probabilities, 1 - probabilities], dim=1)


def miacr(target_scores, member_scores, non_member_scores, alpha):
    """Share of the targets whose conformal set is exactly {non-member}.

    All scores are M×2 as :func:`membership_scores` gives them. q̂ is the conformal quantile of the scores of
    the true membership on held-out members and non-members, which the attack was not trained on. NaN where these
    are too few for a finite q̂, or the attack has no answer (its scores are NaN).
    """
    if target_scores.isnan().any():
        return math.nan
    q_hat = CR.finite_quantile(
        torch.cat([member_scores[:, MEMBER], non_member_scores[:, NON_MEMBER]]), alpha
    )
    if math.isnan(q_hat):
        return math.nan
    sets = CR.prediction_sets(target_scores, q_hat)
    return (sets[:, NON_MEMBER] & ~sets[:, MEMBER]).double().mean().item()


def report(outputs, conformal_scores, settings):
    """MIACR per (score, calibration size, α): the same for every score. Returns ``({}, rows)``.

    Each draw of the held-out images trains an attack of its own, so that no image trains and calibrates one.
    ``MIACR_calibration_images`` counts the members and non-members that calibrate the split's own. NaN where too few
    images train or calibrate the attack.
    """
    confidence = {
        name: MIA.confidences(*getattr(outputs, name)) for name in ("retain", "held_out", "forget")
    }
    parts = [MIA.divide(outputs, settings.seed, draw) for draw in range(outputs.num_draws)]
    points = torch.cat(list(confidence.values()))
    trainable = [draw for draw, (_, members, *_) in enumerate(parts) if len(members) >= MIA.FOLDS]
    probabilities = torch.full((len(parts), len(points)), math.nan, dtype=torch.float64)
    if trainable:
        probabilities[trainable] = attack_probabilities(
            [confidence["retain"][parts[draw][1]] for draw in trainable],
            [confidence["held_out"][parts[draw][3]] for draw in trainable],
            points,
            svm.FINE if len(parts) == 1 else svm.COARSE,
        )
    rows = {}
    for size in outputs.cal_sizes:
        found = {alpha: [] for alpha in settings.alphas}
        for draw, (held_members, *_) in enumerate(parts):
            retain, held_out, forget = probabilities[draw].split(
                [len(part) for part in confidence.values()]
            )
            non_members = outputs.calibration(size, draw)
            n = min(len(held_members), len(non_members))
            targets = membership_scores(forget)
            members, non_members = (
                membership_scores(part)
                for part in (retain[held_members[:n]], held_out[non_members[:n]])
            )
            for alpha, values in found.items():
                values.append(miacr(targets, members, non_members, alpha))
        calibrated = 2 * min(len(parts[0][0]), len(outputs.calibration(size)))
        for alpha, values in found.items():
            number = CR.over_draws(torch.tensor(values, dtype=torch.float64))
            row = {"MIACR": number, "MIACR_calibration_images": calibrated}
            rows |= {(score.name, size, alpha): dict(row) for score in settings.scores}
    return {}, rows
