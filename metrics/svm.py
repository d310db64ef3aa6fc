"""Support vector machines of the membership attacks: an RBF kernel of low rank.

The Gaussian kernel is smooth, so a few explicit features represent it to rounding error, and the quadratic program is
solved in these features by the primal-dual interior-point method for low-rank kernels (Fine & Scheinberg 2001, JMLR
2:243; Mehrotra's predictor and corrector). scikit-learn's ``SVC(C=3, gamma="auto")`` iterates towards this result.
There are two kinds of features: :class:`Dense` for bounded points (all folds of all resplits together), and
:class:`Line` for one feature of any range, where each point sees only the landmarks near it.
"""

import math

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.polynomial.chebyshev import chebpts1
from numpy.polynomial.polyutils import mapdomain
from scipy import sparse
from scipy.linalg import cho_solve_banded, cholesky_banded
from sklearn.kernel_approximation import Nystroem

FINE, COARSE = 1 / 1024, 1 / 256  # steps of the grid on one feature; the kernel's width is 0.7
SEED = 0
LANDMARKS = 192  # for several features
CHEBYSHEV, CHEBYSHEV_PER_UNIT = 12, 4  # landmarks for one feature, and how many more for each unit of its range
ITERATIONS, TOLERANCE = 60, 1e-8
LEAST_BOUND = 1e-9  # of the largest; a point that is left out has this bound, so that there is an interior
START = 0.5  # of the bounds
OF_STEP = 0.995  # of the longest step that keeps all positive
FLAT = 1e-9  # slopes of less, as a share of all bounds, are zero
PLATT_ITERATIONS, PLATT_HALVINGS, PLATT_TOLERANCE = 50, 30, 1e-5
DAMPING = 1e-12 * torch.eye(2).double()
TOGETHER = 100  # rows solved at a time
PRODUCTS = 2**20  # numbers; up to so many, products of features are kept for all rows
NARROW = 8.0  # the largest absolute value that Chebyshev's landmarks cover
LARGEST = np.finfo(np.float64).max / 4  # differences stay finite
ROUNDING = 1e-6  # decisions that differ by less are equal; the two margins are 2 apart


class FeatureMap:
    """Explicit features of the kernel exp(−γ|x − x'|²) with γ = 1 / d, exact on the ``landmarks`` r×d, float64.

    Calling it maps M×d points, float64, to M×r features, float64.
    """

    def __init__(self, landmarks):
        self._nystroem = Nystroem(gamma=1 / landmarks.shape[1], n_components=len(landmarks), random_state=SEED)
        self._nystroem.fit(landmarks)

    def __call__(self, points):
        return torch.from_numpy(self._nystroem.transform(points))


def chebyshev_landmarks(low, high):
    """Landmarks on [low, high], dense at the ends, where interpolation is least exact. → count×1."""
    count = CHEBYSHEV + math.ceil(CHEBYSHEV_PER_UNIT * (high - low))
    return mapdomain(chebpts1(count), (-1, 1), (low, high))[:, None]


class Grid:
    """A grid on [0, 1]. Each point becomes weights on its two neighbors that keep its place: the grid's
    histograms replace the points up to the curvature of the decision over a step, about 10⁻⁶ for the fine grid."""

    ENDS = 0.0, 1.0

    def __init__(self, step):
        self.size = round(1 / step) + 1
        self.nodes = np.linspace(*self.ENDS, self.size)

    def histogram(self, points):
        """Weights of the nodes that replace ``points`` (N) → size, float64; they sum to N."""
        place = np.asarray(points) * (self.size - 1)
        left = np.clip(place.astype(np.int64), 0, self.size - 2)
        share = place - left
        return np.bincount(left, 1 - share, self.size) + np.bincount(left + 1, share, self.size)


def system_of(points):
    """The :class:`Dense` or :class:`Line` whose features are exact on ``points`` N×d."""
    if points.shape[1] > 1:
        distinct = np.unique(points, axis=0)
        return Dense(FeatureMap(np.random.default_rng(SEED).permutation(distinct)[:LANDMARKS]), points)
    points = _finite(points)
    if np.abs(points).max() > NARROW:
        return Line(points)
    low, high = points.min() - 1, points.max() + 1  # beyond the points, so that near-equal points are no special case
    return Dense(FeatureMap(chebyshev_landmarks(low, high)), points)


class Dense:
    """The linear algebra of the program for a :class:`FeatureMap` at n points; the last coefficient is the offset."""

    def __init__(self, feature_map, points):
        self._map = feature_map
        self._extended = self._extend(points)
        self.rank = self._extended.shape[1]
        self._ridge = torch.ones(self.rank).double()
        self._ridge[-1] = 0.0
        self._products = None
        if self._extended.numel() * self.rank <= PRODUCTS:
            self._products = (self._extended[:, :, None] * self._extended[:, None, :]).flatten(1)

    def _extend(self, points):
        features = self._map(points)
        return torch.cat([features, torch.ones(len(features), 1).double()], dim=1)

    def decision(self, points, weights):
        """Which side: w · features + b. Points M×d, coefficients B×rank → B×M."""
        return weights @ self._extend(points).T

    def forward(self, weights):
        """Decisions …×n of the coefficients …×rank."""
        return weights @ self._extended.T

    def adjoint(self, values):
        """Sums of the features, weighted by ``values`` B×n → B×rank."""
        return values @ self._extended

    def penalty(self, weights):
        """Gradient of ½|w|² → B×rank."""
        return self._ridge * weights

    def factor(self, diagonal):
        """A function that solves (penalty + featuresᵀ diagonal features) x = right, for ``right`` B×rank."""
        if self._products is not None:
            gram = (diagonal @ self._products).view(-1, self.rank, self.rank)
        else:
            gram = torch.stack([(self._extended * row[:, None]).T @ self._extended for row in diagonal])
        factors = torch.linalg.lu_factor(gram + torch.diag(self._ridge))
        return lambda right: torch.linalg.lu_solve(*factors, right[:, :, None]).squeeze(2)


class Line:
    """The kernel exp(−(x − x')²) on one feature of any range, infinite values included: kernels at landmarks.

    ``points`` are N×1. The landmarks are the nodes of a lattice near some point. A point has features only at the
    landmarks within REACH steps, so the systems are banded and their cost grows with the number of landmarks, which the
    range and the number of distinct points both bound. A gap without points is shortened to GAP, across which the
    kernel is zero: far outliers cost nothing. Offers what :class:`Dense` does, for one row (B = 1).
    """

    STEP, REACH, AROUND = 0.35, 13, 7
    GAP, HALF_GAP = 12.0, 6.0
    JITTER = 1 + 1e-12  # keeps the Cholesky factorization positive
    FAR = 2**40  # steps: the kernel of landmarks so far apart is zero

    def __init__(self, points):
        points = points[:, 0]
        self._distinct = np.unique(_finite(points))
        self._places = np.concatenate([[0.0], np.minimum(np.diff(self._distinct), self.GAP).cumsum()])
        occupied = np.unique(np.rint(self._places / self.STEP).astype(np.int64))
        self._ids = np.unique((occupied[:, None] + np.arange(-self.AROUND, self.AROUND + 1)).ravel())
        self.rank = len(self._ids) + 1
        width = 2 * self.REACH + 1
        # Row o, column j of a band is the element in row j + o of column j: the kernel of landmarks j and j + o.
        later = sliding_window_view(np.pad(self._ids, (0, width - 1), constant_values=self.FAR), len(self._ids))
        self._kernel_band = np.exp(-((self.STEP * (later - self._ids)) ** 2))
        lower = sparse.dia_matrix((self._kernel_band, -np.arange(width)), (len(self._ids), len(self._ids)))
        self._kernel = (lower + sparse.tril(lower, -1).T).tocsr()
        columns, values = self._sparse_features(points)
        starts = np.arange(len(columns) + 1) * width
        shape = (len(columns), self.rank - 1)
        self._features = sparse.csr_matrix((values.ravel(), columns.ravel(), starts), shape)
        self._transposed = self._features.T.tocsr()
        # Row o, column j of the band of featuresᵀ D features is a sum over the points: one sparse product with D.
        one, other = np.triu_indices(width)
        products = values[:, one] * values[:, other]
        places = (columns[:, other] - columns[:, one]) * shape[1] + columns[:, one]
        starts = np.arange(len(columns) + 1) * products.shape[1]
        shape = (self._kernel_band.size, len(columns))
        self._products = sparse.csc_matrix((products.ravel(), places.ravel(), starts), shape)

    def _folded(self, points):
        """Places on the line with shortened gaps; a point within a gap keeps its distance to the nearer end."""
        points = _finite(points)
        right = np.searchsorted(self._distinct, points).clip(max=len(self._distinct) - 1)
        left = (right - 1).clip(min=0)
        nearest = np.where(points - self._distinct[left] < self._distinct[right] - points, left, right)
        return self._places[nearest] + np.clip(points - self._distinct[nearest], -self.HALF_GAP, self.HALF_GAP)

    def _sparse_features(self, points):
        """Which landmarks each point sees, and the kernel there (0 where there is none). → two N×width arrays."""
        folded = self._folded(points)
        ids = np.rint(folded / self.STEP).astype(np.int64)[:, None] + np.arange(-self.REACH, self.REACH + 1)
        columns = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1).astype(np.int32)
        kernel = np.exp(-((folded[:, None] - self.STEP * ids) ** 2))
        return columns, np.where(self._ids[columns] == ids, kernel, 0.0)

    def decision(self, points, weights):
        """Decisions of the coefficients 1×rank at ``points`` M×1 → 1×M."""
        columns, values = self._sparse_features(points[:, 0])
        coefficients = weights[0].numpy()
        return torch.from_numpy((values * coefficients[columns]).sum(axis=1) + coefficients[-1])[None]

    def forward(self, weights):
        coefficients = weights[0].numpy()
        return torch.from_numpy(self._features @ coefficients[:-1] + coefficients[-1])[None]

    def adjoint(self, values):
        row = values[0].numpy()
        return torch.from_numpy(np.append(self._transposed @ row, row.sum()))[None]

    def penalty(self, weights):
        return torch.from_numpy(np.append(self._kernel @ weights[0, :-1].numpy(), 0.0))[None]

    def factor(self, diagonal):
        row = diagonal[0].numpy()
        gram = (self._products @ row).reshape(self._kernel_band.shape)
        band = gram + self._kernel_band
        band[0] *= self.JITTER
        triangle = cholesky_banded(band, lower=True)
        # The offset borders the banded system: its row is eliminated last.
        border = self._transposed @ row
        through = cho_solve_banded((triangle, True), border)
        corner = row.sum() - border @ through

        def solve_for(right):
            inner = cho_solve_banded((triangle, True), right[0, :-1].numpy())
            offset = (right[0, -1].item() - border @ inner) / corner
            return torch.from_numpy(np.append(inner - through * offset, offset))[None]

        return solve_for


def _finite(points):
    return np.nan_to_num(np.clip(points, -LARGEST, LARGEST))


def solve(system, signs, bounds):
    """The SVMs min ½|w|² + Σ bounds_i · max(0, 1 − signs_i (w · features_i + b)), one for each row of ``bounds``.

    ``system`` is a :class:`Dense` or a :class:`Line` of n points, signs n (±1), bounds B×n (C times the weight of each
    point; 0 leaves a point out), float64. Returns the coefficients B×(r+1), b the last of them, and which machines tell
    the two apart (booleans B): where members and non-members have the same points, every decision is b. Raises
    ValueError where a row has one sign only.
    """
    if any((bounds[:, signs == sign].sum(dim=1) == 0).any() for sign in (1, -1)):
        raise ValueError("the attack trains on members and non-members; one of the two is missing")
    weights = torch.cat([_interior_point(system, signs, rows) for rows in bounds.split(TOGETHER)])
    values = system.forward(weights) - weights[:, -1:]
    weights[:, -1] = _offset(values, signs, bounds)
    inside = bounds > 0
    highest = values.where(inside, -torch.inf).amax(dim=1)
    lowest = values.where(inside, torch.inf).amin(dim=1)
    return weights, ((highest - lowest) / ROUNDING).trunc() != 0


def _offset(values, signs, bounds):
    """The b that minimizes Σ bounds_i · max(0, 1 − signs_i (values_i + b)): B×n → B.

    The sum is convex and piecewise linear with a kink at b = signs_i − values_i. Where it is flat between two kinks (no
    point is exactly on a margin), b is the middle, as libsvm has it.
    """
    kinks, order = (signs - values).sort()
    slopes = bounds.gather(1, order).cumsum(dim=1) - bounds[:, signs == 1].sum(dim=1, keepdim=True)
    rounding = FLAT * bounds.sum(dim=1, keepdim=True)
    ends = torch.searchsorted(slopes, torch.cat([-rounding, rounding], dim=1))
    return kinks.gather(1, ends).mean(dim=1)


def _interior_point(system, signs, bounds):
    upper = bounds.clamp(min=LEAST_BOUND * bounds.max())
    alpha = START * upper  # multipliers of the margins; upper − alpha are those of xi ≥ 0
    weights = torch.zeros(len(bounds), system.rank, dtype=torch.float64)
    total = upper.sum(dim=1, keepdim=True)
    xi = torch.ones_like(upper)
    slack = torch.ones_like(upper)
    for _ in range(ITERATIONS):
        nu = upper - alpha
        margins = signs * system.forward(weights)
        r_weights = system.penalty(weights) - system.adjoint(signs * alpha)
        r_slack = margins + xi - 1 - slack
        gap = (alpha * slack + nu * xi).sum(dim=1, keepdim=True)
        wrong = torch.cat([gap / total, r_slack.abs(), r_weights.abs() / total], dim=1)
        active = wrong.amax(dim=1, keepdim=True) > TOLERANCE
        if not active.any():
            break
        inverse = 1 / (slack / alpha + xi / nu)
        solve_for = system.factor(inverse)

        def direction(target_slack, target_xi):
            g = target_slack / alpha - target_xi / nu - r_slack  # noqa: B023 - used within the iteration
            d_weights = solve_for(system.adjoint(signs * inverse * g) - r_weights)  # noqa: B023
            d_alpha = inverse * (g - signs * system.forward(d_weights))  # noqa: B023
            d_slack = (target_slack - slack * d_alpha) / alpha  # noqa: B023
            d_xi = (target_xi + xi * d_alpha) / nu  # noqa: B023
            return d_weights, d_alpha, d_slack, d_xi

        def longest(d_alpha, d_slack, d_xi):
            """The largest step in [0, 1] that keeps everything positive."""
            decreases = torch.cat([-d_alpha / alpha, d_alpha / nu, -d_slack / slack, -d_xi / xi], dim=1)  # noqa: B023
            return 1 / decreases.amax(dim=1, keepdim=True).clamp(min=1)

        _, d_alpha, d_slack, d_xi = direction(-alpha * slack, -nu * xi)
        step = longest(d_alpha, d_slack, d_xi)
        after = (alpha + step * d_alpha) * (slack + step * d_slack) + (nu - step * d_alpha) * (xi + step * d_xi)
        centre = (after.sum(dim=1, keepdim=True) / gap) ** 3 * gap / (2 * upper.shape[1])
        d_weights, d_alpha, d_slack, d_xi = direction(
            centre - alpha * slack - d_alpha * d_slack, centre - nu * xi + d_alpha * d_xi
        )
        step = active * OF_STEP * longest(d_alpha, d_slack, d_xi)
        weights = weights + step * d_weights
        alpha, slack, xi = alpha + step * d_alpha, slack + step * d_slack, xi + step * d_xi
    if not weights.isfinite().all():
        raise ArithmeticError("the SVM of a membership attack has no finite solution")
    return weights


def platt(decisions, signs, counts):
    """Slope A and offset B of P(sign = 1) = 1 / (1 + exp(A·decision + B)) (Platt 1999), by Newton's method.

    Decisions and counts (how many points each stands for) B×n, signs n (±1) → B×2, float64.
    """
    is_positive = signs == 1
    positive = (counts * is_positive).sum(dim=1, keepdim=True)
    negative = counts.sum(dim=1, keepdim=True) - positive
    targets = torch.where(is_positive, (positive + 1) / (positive + 2), 1 / (negative + 2))
    offset = ((negative + 1) / (positive + 1)).log()
    found = torch.cat([torch.zeros_like(offset), offset], dim=1)

    def loss(at):
        z = at[:, :1] * decisions + at[:, 1:]
        return (counts * (targets * z + torch.nn.functional.softplus(-z))).sum(dim=1)

    value = loss(found)
    for _ in range(PLATT_ITERATIONS):
        p = torch.sigmoid(-(found[:, :1] * decisions + found[:, 1:]))
        gradient = counts * (targets - p)
        curvature = counts * (p * (1 - p))
        g = torch.stack([(gradient * decisions).sum(dim=1), gradient.sum(dim=1)], 1)
        h12 = (curvature * decisions).sum(dim=1)
        h = torch.stack([(curvature * decisions**2).sum(dim=1), h12, h12, curvature.sum(dim=1)], 1).view(-1, 2, 2)
        if g.abs().max() < PLATT_TOLERANCE:
            break
        move = torch.linalg.solve(h + DAMPING, -g)
        size = torch.ones(len(found), 1).double()
        for _ in range(PLATT_HALVINGS):
            tried = loss(found + size * move)
            worse = tried > value
            if not worse.any():
                break
            size[worse] /= 2
        found, value = found + size * move, tried
    return found
