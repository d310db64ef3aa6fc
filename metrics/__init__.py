"""Metrics: pure functions on logits and labels; no model, no loader, no printing.

A metric is a file with ``report(outputs, alphas, seed)``, which returns ``(scalars, rows)``: numbers of the
model as a whole, and numbers per (calibration size, α); and ``COLUMNS``, the heading and kind (percent, number,
count) of those that the printed table shows. To add one, write the file and name it in ``MODULES``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import CR, MIACR, accuracy

MODULES = (accuracy, MIACR, CR)


class Output(NamedTuple):
    """A model's answers for one part of the data: logits N×K and labels N, on the CPU."""

    logits: torch.Tensor
    labels: torch.Tensor


@dataclass
class Outputs:
    """One model's answers for every part; the calibration sets by their size.

    The last two are set where a class is forgotten: test and calibration then hold the retained classes,
    these the forgotten class's held-out images.
    """

    forget: Output
    retain: Output
    test: Output
    calibration: dict[int, Output]
    forget_test: Output | None = None
    forget_calibration: dict[int, Output] | None = None


def evaluate(outputs, alphas, seed=0):
    """Every metric of every module: ``(scalars, rows)`` with rows keyed by (calibration size, α)."""
    scalars, rows = {}, {(size, alpha): {} for size in outputs.calibration for alpha in alphas}
    for module in MODULES:
        more_scalars, more_rows = module.report(outputs, alphas, seed)
        scalars |= more_scalars
        for key, row in more_rows.items():
            rows[key] |= row
    return scalars, rows
