"""Membership inference with an SVM on confidences, and its conformal version MIACR (arXiv 2501.19403).

The attack is trained on the confidence in the own label of equally many retain images (members) and test
images (non-members); the forget images are its target.
"""

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from . import CR

COLUMNS = {"MIA": ("MIA %", "percent"), "MIACR": ("MIACR %", "percent")}
NON_MEMBER, MEMBER = 0, 1


def confidences(logits, labels):
    """p_y(x) of each image's own label. Logits N×K, labels N → N, float64."""
    return 1 - CR.true_label_scores(logits, labels)


def fit_attack(members, non_members):
    """The attack: an RBF SVM (C = 3, γ = 1) on one feature, with Platt-scaled probabilities (5-fold).

    ``members`` and ``non_members`` are equally long tensors of at least five confidences each. Raises
    ValueError for fewer, or for unequal numbers.
    """
    if len(members) != len(non_members) or len(members) < 5:
        raise ValueError(
            f"the attack trains on equally many, at least 5, members and non-members; "
            f"found {len(members)} and {len(non_members)}"
        )
    features = torch.cat([members, non_members])[:, None].numpy()
    membership = np.repeat([MEMBER, NON_MEMBER], [len(members), len(non_members)])
    return CalibratedClassifierCV(SVC(C=3, gamma="auto"), ensemble=False).fit(features, membership)


def mia_efficacy(attack, targets):
    """Share of the targets that the SVM itself calls non-members. Confidences N → float in [0, 1]."""
    svm = attack.calibrated_classifiers_[0].estimator
    return float(np.mean(svm.predict(targets[:, None].numpy()) == NON_MEMBER))


def membership_scores(attack, targets):
    """S(x, {non-member, member}) = 1 − probability. Confidences N → N×2, float64."""
    return 1 - torch.from_numpy(attack.predict_proba(targets[:, None].numpy()))


def miacr(target_scores, member_scores, non_member_scores, alpha):
    """Share of the targets whose conformal set is exactly {non-member}.

    All scores are M×2 as :func:`membership_scores` gives them. q̂ is the conformal quantile of the scores of
    the true membership on held-out members and non-members, which the attack was not trained on.
    """
    q_hat = CR.conformal_quantile(torch.cat([member_scores[:, MEMBER], non_member_scores[:, NON_MEMBER]]), alpha)
    sets = CR.prediction_sets(target_scores, q_hat)
    return (sets[:, NON_MEMBER] & ~sets[:, MEMBER]).double().mean().item()


def report(outputs, alphas, seed=0):
    """MIA efficacy once, MIACR per (calibration size, α). Returns ``(scalars, rows)``.

    The retain images are shuffled with ``seed``: as many as the largest calibration set (at most half) are held
    out as calibration members, and as many as there are test images of the rest train the attack.
    """
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(outputs.retain.labels)))
    members = confidences(*outputs.retain)[shuffled]
    non_members = confidences(*outputs.test)
    held_out = min(len(members) // 2, max(len(part.labels) for part in outputs.calibration.values()))
    trained = min(len(members) - held_out, len(non_members))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(non_members)))
    attack = fit_attack(members[held_out : held_out + trained], non_members[order[:trained]])

    targets = confidences(*outputs.forget)
    target_scores = membership_scores(attack, targets)
    rows = {}
    for size, calibration in outputs.calibration.items():
        n = min(held_out, len(calibration.labels))
        member_scores = membership_scores(attack, members[:n])
        non_member_scores = membership_scores(attack, confidences(*calibration)[:n])
        for alpha in alphas:
            rows[size, alpha] = {"MIACR": miacr(target_scores, member_scores, non_member_scores, alpha)}
    return {"MIA": mia_efficacy(attack, targets)}, rows
