"""The membership attack: scikit-learn's RBF SVM (C = 3, γ = 1 / number of features), and its
probabilities.

The SVM is trained on as many members (retain images) as non-members (test images). The targets of
an attack are the forget images. Which images train which attack is decided by :mod:`metrics.MIA`
and :mod:`metrics.MIACR`.

An SVM on tens of thousands of images takes minutes. One feature needs only a few hundred points: a
histogram replaces the images, and its nodes are weighted training points. See :class:`Grid`.
"""

from typing import NamedTuple

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import PredefinedSplit
from sklearn.svm import SVC

C = 3.0
FOLDS = 5  # of Platt scaling; fewer images of a kind train no attack
STEPS = (1 / 1024, 1 / 256, 1 / 64, 1 / 16)  # between nodes; the RBF kernel is about 0.7 wide
MOST_NODES = 3000
PROBABILITY_STEP = 1 / 128
MOST_POINTS = 10_000  # of a training set with several features
FARTHEST = 1e6  # beyond, libsvm loses the distance of neighbouring points to rounding
ROUNDING = 1e-6  # decisions that differ by less are equal; the two margins are 2 apart


def check_sizes(members, non_members):
    """Raise ValueError for unequal numbers of members and non-members, or fewer than five."""
    if members != non_members or members < FOLDS:
        raise ValueError(
            f"the attack needs equally many members and non-members, at least {FOLDS} of each; "
            f"got {members} members and {non_members} non-members"
        )


class Grid:
    """Nodes ``step`` apart on one feature, near ``points`` (N) only.

    A point between two nodes is shared between them in proportion to its distance, which keeps the
    mean. A function that is smooth over a step is interpolated linearly.
    """

    def __init__(self, points, step):
        left = np.floor(_near(points) / step)
        self.step = step
        self.nodes = np.unique(np.concatenate([left, left + 1])) * step

    def histogram(self, points):
        """Weights of the nodes that replace ``points`` N, all of them near nodes. They sum to N."""
        points = _near(points)
        left = np.searchsorted(self.nodes, points, side="right") - 1
        right_share = (points - self.nodes[left]) / self.step
        weights = np.bincount(left, 1 - right_share, len(self.nodes))
        return weights + np.bincount(left + 1, right_share, len(self.nodes))

    def interpolate(self, points, values):
        """The function with ``values`` at the nodes, at ``points`` N near nodes → N."""
        return np.interp(_near(points), self.nodes, values)


def _near(points):
    return np.clip(points, -FARTHEST, FARTHEST)


def choose_grid(points):
    """The first :class:`Grid` of STEPS that has at most MOST_NODES nodes.

    None where ``points`` (N) are too far apart.
    """
    grids = (Grid(points, step) for step in STEPS)
    return next((grid for grid in grids if len(grid.nodes) <= MOST_NODES), None)


class TrainingSet(NamedTuple):
    """Points n×d, booleans n for members, and the number of images behind each point (n)."""

    points: np.ndarray
    is_member: np.ndarray
    weights: np.ndarray


def _images(members, non_members):
    """Every image is one point. Features N×d."""
    points = np.concatenate([members, non_members])
    is_member = np.repeat([True, False], [len(members), len(non_members)])
    return TrainingSet(points, is_member, np.ones(len(points)))


def _weighted_nodes(grid, members, non_members):
    """The nodes of both histograms that have a weight. Features N."""
    nodes = _images(grid.nodes[:, None], grid.nodes[:, None])
    weights = np.concatenate([grid.histogram(members), grid.histogram(non_members)])
    occupied = weights > 0
    return TrainingSet(nodes.points[occupied], nodes.is_member[occupied], weights[occupied])


def _tells_apart(svm, points):
    return bool(np.ptp(svm.decision_function(points)) > ROUNDING)


class Attack:
    """An RBF SVM that tells members from non-members by their features N×d.

    ``members`` and ``non_members`` are equally many, at least five, in random order. One feature is
    replaced by a weighted histogram. Where its values are too far apart for a histogram of 3,000
    nodes, the first 3,000 images train, half of them members. With several features the first
    10,000 images train.
    ``tells_apart`` is False where the decisions are the same for all training points, e.g. because
    the feature is constant. Raises ValueError as :func:`check_sizes` does.
    """

    def __init__(self, members, non_members):
        check_sizes(len(members), len(non_members))
        width = members.shape[1]
        grid = choose_grid(np.concatenate([members, non_members])[:, 0]) if width == 1 else None
        self._step = grid and grid.step
        if grid:
            training = _weighted_nodes(grid, members[:, 0], non_members[:, 0])
        else:
            half = (MOST_NODES if width == 1 else MOST_POINTS) // 2
            training = _images(_near(members[:half]), _near(non_members[:half]))
        self._svm = SVC(C=C, kernel="rbf", gamma=1 / width)
        self._svm.fit(training.points, training.is_member, training.weights)
        self.tells_apart = _tells_apart(self._svm, training.points)

    def decide(self, points):
        """Decisions of the SVM for features N×d → N, float64; positive for members."""
        if not len(points):
            return np.zeros(0)
        if self._step is None:
            return self._svm.decision_function(_near(points))
        grid = Grid(points[:, 0], self._step)
        return grid.interpolate(points[:, 0], self._svm.decision_function(grid.nodes[:, None]))

    def says_member(self, points):
        """Booleans N for features N×d."""
        return self.decide(points) > 0


def membership_probabilities(members, non_members, points):
    """P(member) at ``points`` by an attack on one feature in [0, 1].

    NumPy arrays: ``members`` N, ``non_members`` N, ``points`` M → M, float64.

    ``members`` and ``non_members`` are equally many, at least five, in random order. The
    probabilities are Platt-scaled (Platt 1999): a sigmoid is fitted to the decisions of five SVMs,
    each trained without the fifth of the images that it decides on, and applied to the SVM trained
    on all. NaN where that SVM does not tell members from non-members. Raises ValueError as
    :func:`check_sizes` does.
    """
    check_sizes(len(members), len(non_members))
    grid = Grid(np.concatenate([members, non_members, points]), PROBABILITY_STEP)
    sides = (np.array_split(side, FOLDS) for side in (members, non_members))
    # Each fold has a histogram of its own, so that its images train no SVM that decides on them.
    folds = [_weighted_nodes(grid, *fold) for fold in zip(*sides, strict=True)]
    training = TrainingSet(*(np.concatenate(values) for values in zip(*folds, strict=True)))
    fold_of_node = np.repeat(range(FOLDS), [len(fold.points) for fold in folds])
    calibrated = CalibratedClassifierCV(
        SVC(C=C, kernel="rbf", gamma=1), cv=PredefinedSplit(fold_of_node), ensemble=False
    )
    calibrated.fit(training.points, training.is_member, sample_weight=training.weights)
    if not _tells_apart(calibrated.calibrated_classifiers_[0].estimator, training.points):
        return np.full(len(points), np.nan)
    return grid.interpolate(points, calibrated.predict_proba(grid.nodes[:, None])[:, 1])
