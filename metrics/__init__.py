"""Metrics: pure functions on logits and labels; no model, no loader, no printing.

A metric is one file, named in ``MODULES``, with

* ``report(outputs, conformal_scores, settings)``, which returns ``(scalars, rows)``: numbers of the
  model, and numbers per (score, calibration size, α). A number that varies over resplits is a
  :class:`~metrics.columns.Spread`.
* ``COLUMNS`` (scalars), ``ROW_COLUMNS`` (rows) and ``CSV_COLUMNS`` (numbers that only results.csv
  has): {key: :class:`~metrics.columns.Column`}, the heading, kind, direction and meaning of each
  number.

The numbers are explained in metrics/README.md, which is made from these columns.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from . import CR, MIA, MIACR, accuracy, classwise, comparison, ensembles, probe
from .columns import RUN_COLUMNS, Column, Interval, Spread, markdown
from .conformal import ConformalScores
from .scores import Score

MODULES = (accuracy, MIA, CR, MIACR, classwise)


def columns_of(kind):
    """{key: Column} of all metrics, of the comparison with Retrain and of the linear probe.

    ``kind`` is ``"COLUMNS"``, ``"ROW_COLUMNS"`` or ``"CSV_COLUMNS"``.
    """
    merged = {}
    for module in (*MODULES, comparison, probe):
        merged |= getattr(module, kind, {})
    return merged


def readme_tables():
    """The tables of metrics/README.md, made from the columns, as Markdown.

    To update the file, run ``python -c "import metrics; print(metrics.readme_tables())"`` and
    replace everything after its line ``<!-- columns -->``.
    """
    sections = {
        "Numbers of a model": columns_of("COLUMNS"),
        "Numbers per score, calibration size and α": columns_of("ROW_COLUMNS"),
        "Numbers in results.csv only": columns_of("CSV_COLUMNS"),
        "Numbers over several trainings of one forget set (ensembles.csv)": ensembles.COLUMNS,
        "What a row is about": RUN_COLUMNS,
    }
    return "\n\n".join(
        f"### {heading}\n\n{markdown(columns)}" for heading, columns in sections.items()
    )


class Output(NamedTuple):
    """A model's outputs on one part of the data: logits N×K and labels N, on the CPU."""

    logits: torch.Tensor
    labels: torch.Tensor

    def select(self, indices):
        """The outputs on some of the images (indices or booleans)."""
        return Output(self.logits[indices], self.labels[indices])


@dataclass
class Outputs:
    """One model's outputs on every part of the data.

    ``held_out`` are the P calibration and test images. Each row of ``draws`` (R×P, int64) orders
    them, calibration images first. The first row is the split itself. For class-wise forgetting,
    ``forgotten`` (booleans P) marks the forgotten class's images, and the calibration and test
    images are those of the retained classes.
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
        """Indices into ``held_out`` of the first ``size`` images, without the forgotten class's."""
        return self._retained(self.draws[draw, :size])

    def test(self, draw=0):
        """Indices into ``held_out`` of those after the largest size, also without that class's."""
        return self._retained(self.draws[draw, max(self.cal_sizes) :])

    def forget_calibration(self, size, draw=0):
        """Indices into ``held_out`` of the forgotten class's images among the first ``size``."""
        return self._forgotten(self.draws[draw, :size])

    def forget_test(self, draw=0):
        """Indices into ``held_out`` of the forgotten class's images among the test images."""
        return self._forgotten(self.draws[draw, max(self.cal_sizes) :])

    def retained(self, draw=0):
        """Indices into ``held_out`` of all retained classes' images, in the order of a draw."""
        return self._retained(self.draws[draw])

    def _retained(self, indices):
        return indices if self.forgotten is None else indices[~self.forgotten[indices]]

    def _forgotten(self, indices):
        return indices[self.forgotten[indices]]


@dataclass(frozen=True)
class Settings:
    """Miscoverage levels α, scores, and the seed of the attacks."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...] = (Score(),)
    seed: int = 0


def draw_splits(num_images, num_draws, seed=0):
    """``num_draws`` orders of ``num_images``: first 0, 1, 2, …, then random. → R×P, int64."""
    rng = np.random.default_rng([seed, num_images])
    # The seed and the number of images decide alone, so all models of a table have equal draws.
    orders = [np.arange(num_images), *(rng.permutation(num_images) for _ in range(num_draws - 1))]
    return torch.from_numpy(np.stack(orders))


def evaluate(conformal_scores):
    """Every metric of one model's :class:`~metrics.conformal.ConformalScores`.

    Returns ``(scalars, rows)`` with rows keyed by (score name, calibration size, α).
    """
    outputs, settings = conformal_scores.outputs, conformal_scores.settings
    scalars, rows = {}, {}
    for module in MODULES:
        more_scalars, more_rows = module.report(outputs, conformal_scores, settings)
        scalars |= more_scalars
        for key, row in more_rows.items():
            rows.setdefault(key, {}).update(row)
    return scalars, rows


__all__ = ["Column", "ConformalScores", "Interval", "Output", "Outputs", "Settings", "Spread"]
__all__ += ["columns_of", "draw_splits", "evaluate", "readme_tables"]
