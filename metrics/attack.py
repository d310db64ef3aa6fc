"""The membership attack: scikit-learn's RBF SVM with C = 3 and γ = 1 / number of features.

The SVM is trained on as many members (retain images) as non-members (test images). Its targets are
the forget images. :mod:`metrics.MIA` and :mod:`metrics.MIACR` choose the images of their attacks.

Training takes minutes on tens of thousands of images. Features are therefore rounded, and images
with equal features become one training point. Its weight, the number of these images, multiplies C:
the SVM is the same as one trained on every rounded image.
"""

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

C = 3.0
FOLDS = 5  # of Platt scaling; an attack needs at least one member and non-member per fold
DECIMALS = 3  # of the features; the RBF kernel of one feature is about 0.7 wide
FINE_DECIMALS, FINE_POINTS = 4, 2000  # where at most 2,000 points remain with 4 decimals
MOST_POINTS = 10_000
TOLERANCE = 1e-4  # libsvm's default of 1e-3 moves decisions near 0
FARTHEST = 1e6  # beyond, libsvm loses the distance of neighbouring points to rounding
ROUNDING = 1e-6  # decisions that differ by less are equal; the margins are 2 apart


def check_sizes(members, non_members):
    """Raise ValueError for unequal numbers of members and non-members, or fewer than five."""
    if members != non_members or members < FOLDS:
        raise ValueError(
            f"the attack needs equally many members and non-members, at least {FOLDS} of each; "
            f"got {members} members and {non_members} non-members"
        )


def weighted_points(features, is_member, decimals):
    """Rounded features N×d and kinds N → (points n×d, kinds n, number of images n)."""
    rows = np.column_stack([features.round(decimals), is_member])
    rows, weights = np.unique(rows, axis=0, return_counts=True)
    return rows[:, :-1], rows[:, -1], weights


class RoundedSVC(SVC):
    """scikit-learn's SVC, trained on rounded features: equal images are one weighted point."""

    def fit(self, features, is_member):
        """Features N×d and N times 1 (member) or 0.

        Features are rounded to 4 decimals, or to 3 if more than 2,000 points remain. If then more
        than 10,000 remain, only the first 5,000 images of each kind are used.
        """
        points = weighted_points(features, is_member, FINE_DECIMALS)
        if len(points[0]) > FINE_POINTS:
            points = weighted_points(features, is_member, DECIMALS)
        if len(points[0]) > MOST_POINTS:
            kinds = [np.flatnonzero(is_member == kind)[: MOST_POINTS // 2] for kind in (1, 0)]
            first = np.concatenate(kinds)
            points = weighted_points(features[first], is_member[first], DECIMALS)
        return super().fit(*points)

    def tells_apart(self):
        """Whether decisions differ; not if features are constant or equal for both kinds."""
        return bool(np.ptp(self.decision_function(self.support_vectors_)) > ROUNDING)


def _svm(num_features):
    return RoundedSVC(C=C, gamma=1 / num_features, tol=TOLERANCE)


def _near(points):
    return np.clip(points, -FARTHEST, FARTHEST)


def _training_set(members, non_members):
    """Features 2N×d and membership 2N. Features N×d of each kind."""
    check_sizes(len(members), len(non_members))
    return _near(np.concatenate([members, non_members])), np.repeat([1, 0], len(members))


class Attack:
    """An RBF SVM that tells members from non-members by their features N×d.

    ``members`` and ``non_members`` are equally many, at least five, in random order (else
    ValueError). ``tells_apart`` is False if the decisions are the same for all training images.
    """

    def __init__(self, members, non_members):
        training_set = _training_set(members, non_members)
        self._svm = _svm(members.shape[1]).fit(*training_set)
        self.tells_apart = self._svm.tells_apart()

    def decide(self, points):
        """Decisions of the SVM for features N×d → N, float64; positive for members."""
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
    training_set = _training_set(members[:, None], non_members[:, None])
    calibrated = CalibratedClassifierCV(_svm(1), cv=FOLDS, ensemble=False).fit(*training_set)
    if not calibrated.calibrated_classifiers_[0].estimator.tells_apart():
        return np.full(len(points), np.nan)
    return calibrated.predict_proba(_near(points)[:, None])[:, 1]
