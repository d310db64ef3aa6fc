"""The membership attack: scikit-learn's RBF SVM with C = 3 and γ = 1 / number of features.

The SVM is trained on as many members (retain images) as non-members (test images). Its targets are
the forget images. :mod:`metrics.MIA` and :mod:`metrics.MIACR` choose the images of their attacks.

Training takes minutes on tens of thousands of images. Features are therefore rounded, and images
with equal features become one training point. Its weight, the number of these images, multiplies C.
That is the same SVM as one trained on every rounded image.
"""

from typing import NamedTuple

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import PredefinedSplit
from sklearn.svm import SVC

C = 3.0
FOLDS = 5  # of Platt scaling; an attack needs at least one member and non-member per fold
DECIMALS = 3  # of the features; the RBF kernel is about 0.7 wide
MOST_POINTS = 10_000
TOLERANCE = 1e-4  # of libsvm; with its default 1e-3, decisions near 0 depend on the order of points
FARTHEST = 1e6  # libsvm rounds away the distances of neighbouring points beyond
ROUNDING = 1e-6  # decisions that differ by less are equal; the margins are 2 apart


def check_sizes(members, non_members):
    """Raise ValueError for unequal numbers of members and non-members, or fewer than five."""
    if members != non_members or members < FOLDS:
        raise ValueError(
            f"the attack needs equally many members and non-members, at least {FOLDS} of each; "
            f"got {members} members and {non_members} non-members"
        )


class TrainingSet(NamedTuple):
    """Points n×d, booleans n for members, and the number of images of each point (n)."""

    points: np.ndarray
    is_member: np.ndarray
    weights: np.ndarray


def training_set(members, non_members):
    """The :class:`TrainingSet` of all images. Features N×d of each kind."""
    features = _near(np.concatenate([members, non_members])).round(DECIMALS)
    is_member = np.repeat([1, 0], [len(members), len(non_members)])
    rows, weights = np.unique(np.column_stack([features, is_member]), axis=0, return_counts=True)
    return TrainingSet(rows[:, :-1], rows[:, -1] == 1, weights)


def _near(points):
    return np.clip(points, -FARTHEST, FARTHEST)


def _svm(num_features):
    return SVC(C=C, kernel="rbf", gamma=1 / num_features, tol=TOLERANCE)


def _tells_apart(svm, points):
    return bool(np.ptp(svm.decision_function(points)) > ROUNDING)


class Attack:
    """An RBF SVM that tells members from non-members by their features N×d.

    ``members`` and ``non_members`` are equally many, at least five, in random order (else
    ValueError). If their features have more than 10,000 different values, only the first 5,000 of
    each kind train the SVM. ``tells_apart`` is False if the decisions are the same for all training
    points, e.g. because the feature is constant.
    """

    def __init__(self, members, non_members):
        check_sizes(len(members), len(non_members))
        training = training_set(members, non_members)
        if len(training.points) > MOST_POINTS:
            half = MOST_POINTS // 2
            training = training_set(members[:half], non_members[:half])
        self._svm = _svm(members.shape[1])
        self._svm.fit(training.points, training.is_member, training.weights)
        self.tells_apart = _tells_apart(self._svm, training.points)

    def decide(self, points):
        """Decisions of the SVM for features N×d → N, float64; positive for members."""
        return self._svm.decision_function(_near(points))

    def says_member(self, points):
        """Booleans N for features N×d."""
        return self.decide(points) > 0


def membership_probabilities(members, non_members, points):
    """P(member) at ``points`` M by an attack on one feature in [0, 1] → M, float64.

    NumPy arrays. ``members`` N and ``non_members`` N are as in :class:`Attack`. The probabilities
    are Platt-scaled (Platt 1999): a sigmoid is fitted to the decisions of five SVMs, each trained
    without the fifth of the images that it decides on, and applied to the SVM trained on all. NaN
    if that SVM does not tell members from non-members.
    """
    check_sizes(len(members), len(non_members))
    sides = (np.array_split(side[:, None], FOLDS) for side in (members, non_members))
    # Each fold has its own points, so that none of its images trains the SVM that decides on it.
    folds = [training_set(*fold) for fold in zip(*sides, strict=True)]
    training = TrainingSet(*(np.concatenate(values) for values in zip(*folds, strict=True)))
    fold_of_point = np.repeat(range(FOLDS), [len(fold.points) for fold in folds])
    calibrated = CalibratedClassifierCV(_svm(1), cv=PredefinedSplit(fold_of_point), ensemble=False)
    calibrated.fit(training.points, training.is_member, sample_weight=training.weights)
    if not _tells_apart(calibrated.calibrated_classifiers_[0].estimator, training.points):
        return np.full(len(points), np.nan)
    # The probability is a smooth function of one feature: linear interpolation is exact to 1e-5.
    nodes = np.linspace(0, 1, 1001)
    return np.interp(points, nodes, calibrated.predict_proba(nodes[:, None])[:, 1])
