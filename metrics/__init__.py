"""Metrics: pure functions on logits and labels; no model, no loader, no printing.

A metric is a file with ``report(outputs, settings)``, which returns ``(scalars, rows)``: numbers of the
model as a whole, and numbers per (score, calibration size, α); and ``COLUMNS`` or ``ROW_COLUMNS``, the heading and kind
(percent, number, count) of those of either sort that the printed tables show. To add one, write the file and name it in
``MODULES``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from . import CR, MIA, MIACR, accuracy
from .scores import Score

MODULES = (accuracy, MIA, CR, MIACR)


def columns(kind):
    """The headings that the modules have under the name ``kind``, in one dict."""
    return {key: column for module in MODULES for key, column in getattr(module, kind, {}).items()}


class Output(NamedTuple):
    """A model's answers for one part of the data: logits N×K and labels N, on the CPU."""

    logits: torch.Tensor
    labels: torch.Tensor

    def of(self, indices):
        return Output(self.logits[indices], self.labels[indices])


@dataclass
class Outputs:
    """One model's answers for every part of the data.

    ``held_out`` are the P images that calibrate and test. Each row of ``draws`` (R×P) divides them once, the
    calibration images first; the first row is the split itself. Where a class is forgotten, ``forgotten`` says of
    each of them whether it is of that class: calibration and test then are the retained classes' images.
    """

    forget: Output
    retain: Output
    held_out: Output
    cal_sizes: list[int]
    draws: torch.Tensor
    forgotten: torch.Tensor | None = None

    @property
    def num_draws(self):
        return len(self.draws)

    def calibration(self, size, draw=0):
        """Indices into ``held_out`` of the first ``size`` calibration images, less the forgotten class's."""
        return self._retained(self.draws[draw, :size])

    def test(self, draw=0):
        """Indices into ``held_out`` of the images that no calibration size uses, less the forgotten class's."""
        return self._retained(self.draws[draw, max(self.cal_sizes) :])

    def forget_calibration(self, size, draw=0):
        """The forgotten class's images among the first ``size``."""
        return self._forgotten(self.draws[draw, :size])

    def forget_test(self, draw=0):
        """The forgotten class's images among the test images."""
        return self._forgotten(self.draws[draw, max(self.cal_sizes) :])

    def _retained(self, indices):
        return indices if self.forgotten is None else indices[~self.forgotten[indices]]

    def _forgotten(self, indices):
        return indices[self.forgotten[indices]]


@dataclass(frozen=True)
class Settings:
    """What the metrics are computed for: miscoverage levels α, scores, the set sizes of ECF and EuCF, a seed."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...] = (Score(),)
    set_sizes: tuple[int, ...] = (1, 5)
    seed: int = 0


def draw_splits(num_images, num_draws, seed=0):
    """``num_draws`` orders of ``num_images``: the given one first, then random ones. → R×P, int64."""
    rng = np.random.default_rng([seed, num_images])
    orders = [np.arange(num_images), *(rng.permutation(num_images) for _ in range(num_draws - 1))]
    return torch.from_numpy(np.stack(orders))


def evaluate(outputs, settings):
    """Every metric of every module: ``(scalars, rows)`` with rows keyed by (score, calibration size, α)."""
    keys = [
        (score.name, size, alpha)
        for score in settings.scores
        for size in outputs.cal_sizes
        for alpha in settings.alphas
    ]
    scalars, rows = {}, {key: {} for key in keys}
    for module in MODULES:
        more_scalars, more_rows = module.report(outputs, settings)
        scalars |= more_scalars
        for key, row in more_rows.items():
            rows[key] |= row
    return scalars, rows
