"""Membership inference: SVM attacks on five features, and the ranking attack on confidence.

Five attacks are trained per model, one per feature, on retain images (members) and as many test
images of the split (non-members). Their targets are the forget images. The features are those of
Song & Mittal 2021 (2003.10595), the SVM is that of the unlearning literature
(:mod:`metrics.attack`).
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from . import attack, scores
from .columns import Column, csv_only

COLUMNS = {
    "MIA": Column(
        "MIA", "percent", "near Retrain", "MIA efficacy: share of forget images called non-members"
    ),
    "MIA_privacy": Column(
        "privacy", "percent", "near 50", "its accuracy on other retain and held-out images"
    ),
    "AUC": Column(
        "AUC", "number", "near Retrain", "ROC area of confidence: forget images against test images"
    ),
    "TPR@1%": Column(
        "TPR@1%", "percent", "near Retrain", "forget images surer than 99 % of the test images"
    ),
    "TPR@0.1%": Column(
        "TPR@.1%", "percent", "near Retrain", "the same for 0.1 % of the test images"
    ),
}
CSV_COLUMNS = {
    "MIA_<feature>": csv_only(
        "percent", "MIA efficacy of the attack on another feature", "near Retrain"
    ),
    "MIA_<feature>_privacy": csv_only(
        "percent", "accuracy of that attack, like MIA_privacy", "near 50"
    ),
}
KEYS = {  # of each feature's attack
    "correctness": "MIA_correctness",
    "confidence": "MIA",
    "entropy": "MIA_entropy",
    "modified entropy": "MIA_modified_entropy",
    "probabilities": "MIA_probabilities",
}
FALSE_POSITIVES = (0.01, 0.001)


def confidences(logits, labels):
    """p_y(x) of each image's true label. Logits N×K, labels N → N, float64."""
    return 1 - scores.true_label_scores(logits, labels)


def entropy(logits):
    """−Σ p log p of the predicted probabilities. Logits N×K → N, float64 in [0, log K]."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    return torch.special.entr(log_p.exp()).sum(dim=1)  # entr(0) is 0


def modified_entropy(logits, labels):
    """−(1 − p_y) log p_y − Σ p_i log(1 − p_i) over the other labels i (Song & Mittal 2021, eq. 8).

    0 for a confident correct prediction, unbounded for a confident wrong one. → N, float64.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    # log(1 − p) of the top label is summed from the other labels: 1 − p would round to 0.
    top = log_p.argmax(dim=1, keepdim=True)
    log_others = log_p.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp()).scatter(1, top, log_others)
    terms = -log_p.exp() * log_rest  # N×K: of every label as if it were a wrong one
    true = labels[:, None]
    terms = terms.scatter(1, true, -log_rest.gather(1, true).exp() * log_p.gather(1, true))
    return terms.sum(dim=1)


def attack_features(logits, labels):
    """The features of each attack. Logits N×K, labels N → {name: N×d array, float64}."""
    features = {
        "correctness": (logits.argmax(dim=1) == labels).double(),
        "confidence": confidences(logits, labels),
        "entropy": entropy(logits),
        "modified entropy": modified_entropy(logits, labels),
        "probabilities": torch.softmax(logits.double(), dim=1),
    }
    return {name: values.reshape(len(labels), -1).numpy() for name, values in features.items()}


class AttackImages(NamedTuple):
    """Indices into retain (members) and into held_out (non-members).

    Equally many ``members`` and ``non_members`` train the attacks. The others measure privacy.
    """

    members: torch.Tensor
    non_members: torch.Tensor
    held_members: torch.Tensor
    held_non_members: torch.Tensor


def attack_images(outputs, seed):
    """The :class:`AttackImages` of the split itself, in an order drawn by the seed.

    As many retain images are held out as there are calibration images (at most half of them). Of
    the others, as many train the attacks as there are test images.
    """
    rng = np.random.default_rng([seed, 0])
    members = torch.from_numpy(rng.permutation(len(outputs.retain.labels)))
    calibration, test = outputs.calibration(max(outputs.cal_sizes)), outputs.test()
    # Disjoint slices of one random order: the first members measure privacy, the next ones train.
    held_out = min(len(members) // 2, len(calibration))
    trained = min(len(members) - held_out, len(test))
    test = test[torch.from_numpy(rng.permutation(len(test)))]
    return AttackImages(
        members=members[held_out : held_out + trained],
        non_members=test[:trained],
        held_members=members[:held_out],
        held_non_members=calibration,
    )


def attack_shares(features, forget_features):
    """(efficacy, privacy) of an attack on one kind of feature, floats in [0, 1].

    Efficacy is the share of the targets called non-members, privacy the balanced accuracy on the
    held members and non-members. ``features`` are the :class:`AttackImages`' N×d features,
    ``forget_features`` the targets' M×d.
    Both are NaN with fewer than five training images of a kind, or if the features do not differ
    between members and non-members. A share of no images is NaN too.
    """
    if len(features.members) < attack.FOLDS:
        return math.nan, math.nan
    trained = attack.Attack(features.members, features.non_members)
    if not trained.tells_apart:
        return math.nan, math.nan

    def member_share(points):
        return float(trained.says_member(points).mean()) if len(points) else math.nan

    held_members = member_share(features.held_members)
    held_non_members = member_share(features.held_non_members)
    privacy = (held_members + 1 - held_non_members) / 2  # mean accuracy of the two kinds
    return 1 - member_share(forget_features), privacy


def report(outputs, conformal_scores, settings):
    """The shares of each attack and the ranking of forget before test images: ``(scalars, {})``."""
    images = attack_images(outputs, settings.seed)
    retain = attack_features(*outputs.retain)
    held_out = attack_features(*outputs.held_out)
    forget = attack_features(*outputs.forget)
    scalars = {}
    for name, key in KEYS.items():
        features = AttackImages(
            members=retain[name][images.members.numpy()],
            non_members=held_out[name][images.non_members.numpy()],
            held_members=retain[name][images.held_members.numpy()],
            held_non_members=held_out[name][images.held_non_members.numpy()],
        )
        scalars[key], scalars[f"{key}_privacy"] = attack_shares(features, forget[name])
    # Confidence ranks forget before test images (Carlini et al. 2022, 2112.03570). Log-odds also
    # order images whose confidence rounds to 1.
    members = -scores.true_label_log_odds(*outputs.forget)
    non_members = -scores.true_label_log_odds(*outputs.held_out.select(outputs.test()))
    scalars["AUC"], rates = attack.roc(members, non_members, FALSE_POSITIVES)
    scalars["TPR@1%"], scalars["TPR@0.1%"] = rates
    return scalars, {}
