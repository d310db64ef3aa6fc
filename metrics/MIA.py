"""Membership inference: the SVM attacks on five features, and the ranking attack on confidence.

An attack is trained on equally many retain images (members) and test images (non-members); its target is the forget
images. The features are those of Song & Mittal 2021 (2003.10595), the SVM (RBF, C = 3, γ = 1 / number of features)
that of the unlearning literature.
"""

import math

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from . import scores, svm
from .columns import Column

COLUMNS = {
    "MIA": Column("MIA", "percent"),
    "MIA_privacy": Column("privacy", "percent"),
    "AUC": Column("AUC", "number"),
    "TPR@1%": Column("TPR@1%", "percent"),
    "TPR@0.1%": Column("TPR@.1%", "percent"),
}
C = 3.0
FOLDS = 5
FALSE_POSITIVES = (0.01, 0.001)


def confidences(logits, labels):
    """p_y(x) of each image's own label. Logits N×K, labels N → N, float64."""
    return 1 - scores.true_label_scores(logits, labels)


def entropy(logits):
    """−Σ p log p of the model's answer. Logits N×K → N, float64 in [0, log K]."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    return torch.special.entr(log_p.exp()).sum(dim=1)


def modified_entropy(logits, labels):
    """−(1 − p_y) log p_y − Σ over the other labels i of p_i log(1 − p_i) (Song & Mittal 2021, eq. 8): 0 for a model
    that is right and sure, unbounded for one that is wrong and sure. Each image with its own label. → N, float64."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    # log(1 − p): of the top label summed from the others, since 1 − p rounds to 0 where the model is sure.
    top = log_p.argmax(dim=1, keepdim=True)
    log_others = log_p.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp()).scatter(1, top, log_others)
    terms = -log_p.exp() * log_rest
    own = labels[:, None]
    terms = terms.scatter(1, own, -log_rest.gather(1, own).exp() * log_p.gather(1, own))
    return terms.sum(dim=1)


def attack_features(logits, labels):
    """What each attack looks at. Logits N×K, labels N → a dict of N×d arrays, float64."""
    found = {
        "correctness": (logits.argmax(dim=1) == labels).double(),
        "confidence": confidences(logits, labels),
        "entropy": entropy(logits),
        "modified entropy": modified_entropy(logits, labels),
        "probabilities": torch.softmax(logits.double(), dim=1),
    }
    return {name: values.reshape(len(labels), -1).numpy() for name, values in found.items()}


def check_sizes(members, non_members):
    """Raises ValueError for unequal numbers of members and non-members, or fewer than five."""
    if members != non_members or members < FOLDS:
        raise ValueError(
            f"the attack trains on equally many, at least {FOLDS}, members and non-members; "
            f"found {members} and {non_members}"
        )


class Attack:
    """An RBF SVM that tells members from non-members by features N×d (equally many of each, at least five).

    Decides what scikit-learn's ``SVC(C=3, gamma="auto")`` decides, and is trained by :mod:`metrics.svm`. Where members
    and non-members have the same features, e.g. one constant, no decision means anything, and ``tells_apart`` is False.
    Raises ValueError as :func:`check_sizes` does.
    """

    def __init__(self, members, non_members):
        check_sizes(len(members), len(non_members))
        points = np.concatenate([members, non_members])
        signs = torch.from_numpy(np.repeat([1.0, -1.0], len(members)))
        self._system = svm.system_of(points)
        self._weights, tells_apart = svm.solve(
            self._system, signs, torch.full((1, len(points)), C).double()
        )
        self.tells_apart = tells_apart.item()

    def decide(self, points):
        """+1 (member), −1 (non-member) or 0 (a decision of zero to rounding) for features N×d → N, numpy."""
        decisions = self._system.decision(points, self._weights)[0].numpy()
        return np.sign(np.trunc(decisions / svm.ROUNDING))

    def says_member(self, points):
        """Booleans N for features N×d. A decision of zero says non-member, as in scikit-learn."""
        return self.decide(points) > 0


def ranking_attack(member_scores, non_member_scores):
    """How well confidence ranks members before non-members: area under the ROC curve, and the true-positive rates at
    1 % and 0.1 % false positives (Carlini et al. 2022, 2112.03570).

    Both are scores, 1 − p_y or what increases with it: log-odds distinguish what is nearly certain.
    → (AUC, [TPR, ...]), NaN where one of the two is empty.
    """
    if not len(member_scores) or not len(non_member_scores):
        return math.nan, [math.nan] * len(FALSE_POSITIVES)
    confidence = -torch.cat([member_scores, non_member_scores]).numpy()
    membership = np.repeat([1, 0], [len(member_scores), len(non_member_scores)])
    false_positives, true_positives, _ = roc_curve(membership, confidence, drop_intermediate=False)
    rates = [float(true_positives[false_positives <= most].max()) for most in FALSE_POSITIVES]
    return float(roc_auc_score(membership, confidence)), rates


def divide(outputs, seed, draw=0):
    """The images of an attack: members held out and trained on (indices into retain), non-members held out and
    trained on (indices into held_out), for one draw of the held-out images.

    As many retain images as the largest calibration set (at most half) are held out, and as many as there are test
    images of the rest train the attack.
    """
    rng = np.random.default_rng([seed, draw])
    members = torch.from_numpy(rng.permutation(len(outputs.retain.labels)))
    calibration, test = outputs.calibration(max(outputs.cal_sizes), draw), outputs.test(draw)
    held_out = min(len(members) // 2, len(calibration))
    trained = min(len(members) - held_out, len(test))
    test = test[torch.from_numpy(rng.permutation(len(test)))]
    return members[:held_out], members[held_out : held_out + trained], calibration, test[:trained]


def attack_shares(members, non_members, held_members, held_non_members, targets):
    """An attack's efficacy, the share of ``targets`` that it calls non-members, and its privacy: its accuracy on
    members and non-members that it was not trained on. Arrays of features N×d → two floats in [0, 1].

    Both are NaN where the attack has no answer: fewer than five images to train on, or features that do not differ
    between members and non-members. A share of no images is NaN too, and so is one of images that are all undecided.
    """
    if len(members) < FOLDS:
        return math.nan, math.nan
    attack = Attack(members, non_members)
    if not attack.tells_apart:
        return math.nan, math.nan

    def member_share(points):
        decided = attack.decide(points)
        return float((decided > 0).mean()) if decided.any() else math.nan

    privacy = (member_share(held_members) + 1 - member_share(held_non_members)) / 2
    return 1 - member_share(targets), privacy


def report(outputs, conformal_scores, settings):
    """For each attack its efficacy on the forget images (``MIA`` is the attack on confidence) and its accuracy on
    members and non-members that it was not trained on (privacy: a half is best); AUC and true-positive rates of
    telling the forget images from test images by confidence. NaN where there is nothing to say. Returns
    ``(scalars, {})``."""
    # As NumPy: an array that a tensor of one element indexes loses a dimension.
    held_members, members, held_non_members, non_members = (
        part.numpy() for part in divide(outputs, settings.seed)
    )
    retain = attack_features(*outputs.retain)
    held_out = attack_features(*outputs.held_out)
    forget = attack_features(*outputs.forget)
    scalars = {}
    for name, features in retain.items():
        key = "MIA" if name == "confidence" else f"MIA_{name.replace(' ', '_')}"
        scalars[key], scalars[f"{key}_privacy"] = attack_shares(
            members=features[members],
            non_members=held_out[name][non_members],
            held_members=features[held_members],
            held_non_members=held_out[name][held_non_members],
            targets=forget[name],
        )
    scalars["AUC"], (scalars["TPR@1%"], scalars["TPR@0.1%"]) = ranking_attack(
        scores.true_label_log_odds(*outputs.forget),
        scores.true_label_log_odds(*outputs.held_out.select(outputs.test())),
    )
    return scalars, {}
