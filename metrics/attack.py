"""The membership attack: scikit-learn's RBF SVM with C = 3 and γ = 1 / number of features.

Members are retain images, non-members as many test images, targets the forget images.
:mod:`metrics.MIA` and :mod:`metrics.MIACR` choose them.

Training takes minutes on tens of thousands of images. Features of more than 2,000 images are
therefore rounded, and images with equal features become one training point. Its weight, the number
of these images, multiplies C: the SVM is the same as one trained on every rounded image.
"""

import math

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import PredefinedSplit
from sklearn.svm import SVC

C = 3.0
FOLDS = 5  # of Platt scaling; an attack needs at least one member and non-member per fold
DECIMALS = 3  # of the features; the RBF kernel of one feature is about 0.7 wide
FEW_IMAGES = 2000  # train the SVM as they are
MOST_POINTS = 10_000
TOLERANCE = 1e-4  # libsvm's default of 1e-3 moves decisions near 0
FARTHEST = 1e6  # beyond, libsvm loses the distance of neighbouring points to rounding
ROUNDING = 1e-6  # decisions that differ by less are equal; the margins are 2 apart


def roc(positives, negatives, false_positives=()):
    """(area under the ROC curve, [true-positive rate at each of the false-positive rates]).

    Scores of positives and negatives: tensors N and M. NaN if one of them is empty.
    """
    if not len(positives) or not len(negatives):
        return math.nan, [math.nan] * len(false_positives)
    values = torch.cat([positives, negatives]).numpy()
    is_positive = np.repeat([1, 0], [len(positives), len(negatives)])
    false_rates, true_rates, _ = roc_curve(is_positive, values, drop_intermediate=False)
    rates = [float(true_rates[false_rates <= most].max()) for most in false_positives]
    return float(roc_auc_score(is_positive, values)), rates


def weighted_points(columns, weights=None):
    """Equal rows of ``columns`` (N or N×d each) as one → (rows n×D, their total weights n).

    Each row has the weight 1 by default, so that a total is a number of images.
    """
    rows, inverse = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
    return rows, np.bincount(inverse.ravel(), weights, len(rows))


def rounded(features):
    """Features N×d, rounded to 3 decimals if there are more than 2,000 images."""
    return features if len(features) <= FEW_IMAGES else features.round(DECIMALS)


class MergingSVC(SVC):
    """scikit-learn's SVC, trained on equal points of a kind as one point of their total weight."""

    def fit(self, points, is_member, sample_weight=None):
        # libsvm's C is per point times its weight, so m equal points and one of weight m have the
        # same dual problem. Membership is a column, so that members and non-members stay apart.
        rows, weights = weighted_points([points, is_member], sample_weight)
        return super().fit(rows[:, :-1], rows[:, -1], weights)

    def tells_apart(self):
        """Whether decisions differ; not if features are constant or equal for both kinds."""
        return bool(np.ptp(self.decision_function(self.support_vectors_)) > ROUNDING)


def interpolate(function, points):
    """A smooth function (n×1 → n) at ``points`` N → N, interpolated between multiples of 0.001."""
    # Many points share a cell of the grid: the function is called for the ends of used cells only.
    below = np.floor(points * 10**DECIMALS)
    nodes = np.unique([below, below + 1]) / 10**DECIMALS
    return np.interp(points, nodes, function(nodes[:, None]))


def _svm(num_features):
    return MergingSVC(C=C, gamma=1 / num_features, tol=TOLERANCE)


def _near(points):
    return np.clip(points, -FARTHEST, FARTHEST)


def _training_set(members, non_members):
    """Features N×d of each kind → features 2N×d and membership 2N."""
    if len(members) != len(non_members) or len(members) < FOLDS:
        raise ValueError(
            f"the attack needs equally many members and non-members, at least {FOLDS} of each; "
            f"got {len(members)} members and {len(non_members)} non-members"
        )
    return _near(np.concatenate([members, non_members])), np.repeat([1, 0], len(members))


class Attack:
    """An RBF SVM that tells members from non-members by their features N×d.

    ``members`` and ``non_members`` are equally many, at least five, in random order (else
    ValueError). If more than 10,000 rounded points remain, only the first 5,000 images of each kind
    train. ``tells_apart`` is False if the decisions are the same for all training images.
    """

    def __init__(self, members, non_members):
        features, is_member = _training_set(members, non_members)
        features = rounded(features)
        if len(weighted_points([features, is_member])[0]) > MOST_POINTS:
            kinds = [np.flatnonzero(is_member == kind)[: MOST_POINTS // 2] for kind in (1, 0)]
            first = np.concatenate(kinds)
            features, is_member = features[first], is_member[first]
        self._svm = _svm(members.shape[1]).fit(features, is_member)
        self.tells_apart = self._svm.tells_apart()

    def decide(self, points):
        """Decisions of the SVM for features N×d → N, float64; positive for members."""
        if points.shape[1] == 1:
            return interpolate(self._svm.decision_function, _near(points[:, 0]))
        return self._svm.decision_function(_near(points))

    def says_member(self, points):
        """Booleans N for features N×d."""
        return self.decide(points) > 0


def membership_probabilities(members, non_members, points):
    """P(member) at ``points`` M by an attack on one feature → M, float64.

    NumPy arrays. ``members`` N and ``non_members`` N are as in :class:`Attack`. The probabilities
    are Platt-scaled (Platt 1999): a sigmoid is fitted to the decisions of five SVMs, each trained
    without the fifth of the images that it decides on, and applied to the SVM trained on all. NaN
    if that SVM does not tell members from non-members.
    """
    features, is_member = _training_set(members[:, None], non_members[:, None])
    # Equal images of different folds stay apart: no image trains an SVM that decides on it.
    fold_of = np.concatenate([np.arange(N) * FOLDS // N for N in (len(members), len(non_members))])
    rows, weights = weighted_points([rounded(features), is_member, fold_of])
    folds = PredefinedSplit(rows[:, -1])
    # ensemble=False: the sigmoid is fitted to out-of-fold decisions, and one SVM on all images is
    # scaled by it. The default would average five SVMs.
    calibrated = CalibratedClassifierCV(_svm(1), cv=folds, ensemble=False)
    calibrated.fit(rows[:, :1], rows[:, 1], sample_weight=weights)
    if not calibrated.calibrated_classifiers_[0].estimator.tells_apart():
        return np.full(len(points), np.nan)
    return interpolate(lambda nodes: calibrated.predict_proba(nodes)[:, 1], _near(points))
