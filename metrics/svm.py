"""Support vector machines of the membership attacks, many at a time: an RBF kernel of tiny numerical rank.

On one bounded feature the Gaussian kernel has a rank of about ten: a handful of explicit features stand for it to
rounding error, and the training points enter only through their histogram on a fine grid. What is left of the quadratic
program is so small that all folds of all resplits are solved together, by the primal-dual interior-point method for
low-rank kernels (Fine & Scheinberg 2001, JMLR 2:243; Mehrotra's predictor and corrector). The result is what
scikit-learn's ``SVC(C=3, gamma="auto")`` iterates towards.
"""

import numpy as np
import torch
from sklearn.kernel_approximation import Nystroem

FINE, COARSE = 1 / 1024, 1 / 256  # steps of the grid on one feature; the kernel's width is 0.7
LANDMARKS = 192  # for several features
ITERATIONS, TOLERANCE = 60, 1e-8
TOGETHER = 100  # rows solved at a time


class FeatureMap:
    """Explicit features of the kernel exp(−γ|x − x'|²) with γ = 1 / number of features.

    ``points`` N×d are those that it has to be exact on. Calling it maps M×d points to M×r features, float64.
    """

    def __init__(self, points, seed=0):
        points = np.asarray(points, dtype=np.float64)
        if points.shape[1] == 1:
            low, high = points.min(), points.max()
            count = min(len(np.unique(points)), max(12, int(4 * (high - low)) + 12))
            # Chebyshev's nodes: dense at the ends, where interpolation from within would err most.
            nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
            landmarks = (
                (low + high) / 2 + (high - low) / 2 * nodes[:, None] if count > 2 else np.unique(points)[:, None]
            )
        else:
            landmarks = np.unique(points, axis=0)
            chosen = np.random.default_rng(seed).permutation(len(landmarks))[:LANDMARKS]
            landmarks = landmarks[chosen]
        self._nystroem = Nystroem(gamma=1 / points.shape[1], n_components=len(landmarks), random_state=0)
        self._nystroem.fit(landmarks)

    def __call__(self, points):
        return torch.from_numpy(self._nystroem.transform(np.asarray(points, dtype=np.float64)))


class Grid:
    """A grid on one feature. A point becomes weights on its two neighbours that keep its place: the grid's
    histograms stand for the points up to the curvature of the decision over a step, about 10⁻⁶ for the fine one."""

    def __init__(self, low, high, step=FINE):
        self.size = max(2, round((high - low) / step) + 1)
        self.nodes = low + (max(high - low, step) / (self.size - 1)) * np.arange(self.size)
        self._low, self._step = low, self.nodes[1] - low

    def histogram(self, points):
        """Weights of the nodes that stand for ``points`` (N) → size, float64; they sum to N."""
        place = (np.asarray(points) - self._low) / self._step
        left = np.clip(place.astype(np.int64), 0, self.size - 2)
        share = place - left
        return np.bincount(left, 1 - share, self.size) + np.bincount(left + 1, share, self.size)


def solve(features, signs, bounds):
    """The SVMs min ½|w|² + Σ bounds_i · max(0, 1 − signs_i (w · features_i + b)), one for each row of ``bounds``.

    Features n×r, signs n (±1), bounds B×n (C times the weight of each point; 0 leaves a point out), float64.
    Returns the coefficients B×(r+1), b the last of them. Raises ValueError where a row has one sign only.
    """
    if any((bounds[:, signs == sign].sum(dim=1) == 0).any() for sign in (1, -1)):
        raise ValueError("the attack trains on members and non-members; one of the two is missing")
    extended = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    return torch.cat([_interior_point(extended, signs, rows) for rows in bounds.split(TOGETHER)])


def _interior_point(extended, signs, bounds):
    n, rank = extended.shape
    ridge = torch.ones(rank, dtype=torch.float64)
    ridge[-1] = 0.0
    products = (extended[:, :, None] * extended[:, None, :]).flatten(1) if rank <= 40 else None

    def gram(diagonal):
        if products is not None:
            return (diagonal @ products).view(-1, rank, rank)
        return torch.stack([(extended * row[:, None]).T @ extended for row in diagonal])

    upper = bounds.clamp(min=1e-9 * bounds.max())
    alpha = upper / 2  # multipliers of the margins; upper − alpha are those of xi ≥ 0
    weights = torch.zeros(len(bounds), rank, dtype=torch.float64)
    xi = torch.ones_like(upper)
    slack = torch.ones_like(upper)
    for _ in range(ITERATIONS):
        nu = upper - alpha
        margins = signs * (weights @ extended.T)
        r_weights = ridge * weights - (signs * alpha) @ extended
        r_slack = margins + xi - 1 - slack
        gap = ((alpha * slack).sum(dim=1) + (nu * xi).sum(dim=1)) / upper.sum(dim=1)
        infeasible = torch.maximum(r_slack.abs().amax(dim=1), r_weights.abs().amax(dim=1) / upper.sum(dim=1))
        going_on = (torch.maximum(gap, infeasible) > TOLERANCE)[:, None]
        if not going_on.any():
            break
        inverse = 1 / (slack / alpha + xi / nu)
        system = gram(inverse) + torch.diag(ridge)
        factor = torch.linalg.lu_factor(system)

        def direction(target_slack, target_xi):
            g = target_slack / alpha - target_xi / nu - r_slack  # noqa: B023 - used within the iteration
            right = (signs * inverse * g) @ extended - r_weights  # noqa: B023
            d_weights = torch.linalg.lu_solve(*factor, right[:, :, None]).squeeze(2)  # noqa: B023
            d_alpha = inverse * (g - signs * (d_weights @ extended.T))  # noqa: B023
            d_slack = (target_slack - slack * d_alpha) / alpha  # noqa: B023
            d_xi = (target_xi + xi * d_alpha) / nu  # noqa: B023
            return d_weights, d_alpha, d_slack, d_xi

        def longest(d_alpha, d_slack, d_xi):
            """The largest step in [0, 1] that keeps everything positive."""
            ratios = [
                torch.where(d < 0, -v / d, torch.inf).amin(dim=1)
                for v, d in ((alpha, d_alpha), (nu, -d_alpha), (slack, d_slack), (xi, d_xi))  # noqa: B023
            ]
            return torch.stack(ratios).amin(dim=0).clamp(max=1)[:, None]

        _, d_alpha, d_slack, d_xi = direction(-alpha * slack, -nu * xi)
        step = longest(d_alpha, d_slack, d_xi)
        before = (alpha * slack + nu * xi).sum(dim=1, keepdim=True)
        after = (alpha + step * d_alpha) * (slack + step * d_slack) + (nu - step * d_alpha) * (xi + step * d_xi)
        centre = (after.sum(dim=1, keepdim=True) / before) ** 3 * before / (2 * n)
        d_weights, d_alpha, d_slack, d_xi = direction(
            centre - alpha * slack - d_alpha * d_slack, centre - nu * xi + d_alpha * d_xi
        )
        step = torch.where(going_on, 0.995 * longest(d_alpha, d_slack, d_xi), 0.0)
        weights = weights + step * d_weights
        alpha, slack, xi = alpha + step * d_alpha, slack + step * d_slack, xi + step * d_xi
    if not weights.isfinite().all():
        raise ArithmeticError("the SVM of a membership attack has no finite solution")
    return weights


def decision(features, weights):
    """Which side: w · features + b. Features M×r, weights B×(r+1) → B×M."""
    return weights[:, :-1] @ features.T + weights[:, -1:]


def platt(decisions, signs, counts):
    """Slope A and offset B of P(sign = 1) = 1 / (1 + exp(A·decision + B)) (Platt 1999), by Newton's method.

    Decisions and counts (how many points each stands for) B×n, signs n (±1) → B×2, float64.
    """
    positive = (counts * (signs > 0)).sum(dim=1, keepdim=True)
    negative = (counts * (signs < 0)).sum(dim=1, keepdim=True)
    targets = torch.where(signs > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    found = torch.stack(
        [torch.zeros(len(decisions), dtype=torch.float64), ((negative + 1) / (positive + 1)).log()[:, 0]], 1
    )

    def loss(at):
        z = at[:, :1] * decisions + at[:, 1:]
        return (counts * (targets * z + torch.nn.functional.softplus(-z))).sum(dim=1)

    value = loss(found)
    for _ in range(50):
        p = torch.sigmoid(-(found[:, :1] * decisions + found[:, 1:]))
        gradient = counts * (targets - p)
        curvature = counts * (p * (1 - p))
        g = torch.stack([(gradient * decisions).sum(dim=1), gradient.sum(dim=1)], 1)
        h12 = (curvature * decisions).sum(dim=1)
        h = torch.stack([(curvature * decisions**2).sum(dim=1), h12, h12, curvature.sum(dim=1)], 1).view(-1, 2, 2)
        if g.abs().max() < 1e-5:
            break
        move = torch.linalg.solve(h + 1e-12 * torch.eye(2, dtype=torch.float64), -g)
        size = torch.ones(len(found), 1, dtype=torch.float64)
        expected = (g * move).sum(dim=1)
        for _ in range(30):
            tried = loss(found + size * move)
            worse = tried > value + 1e-4 * size[:, 0] * expected
            if not worse.any():
                break
            size[worse] /= 2
        found, value = found + size * move, tried
    return found
