"""Calibration: the scores of all images and the threshold q̂ of every group, computed once per
model.

    conformal_scores = ConformalScores(outputs, settings)
    conformal_scores.part("forget")     # the forget images, scored for every label
    conformal_scores.q_hats()           # q̂ of every draw and α from all retained classes
    conformal_scores.class_q_hats()     # q̂ of every class and α from this class's images
    conformal_scores.groups()           # {group of images: its scores and q̂}
    accuracy_and_coverage(images, calibration, settings)   # for images that are not in outputs

Methods take a :class:`metrics.scores.Score` and a calibration size. The defaults are the first
score of the settings and the largest calibration size. Results are cached.

Each draw orders the held-out images: the first ``size`` are its calibration images, those after the
largest size its test images. The first draw is the split itself. Random forgetting has one q̂, from
all calibration images. Class-wise forgetting has two: that of the retained classes, for ``retain``,
``test`` and every group ``…_by_retain``, and that of the forgotten class, for ``forget`` and
``forget_test``.

All scores and q̂ here are log-odds of S in float64 (see :mod:`metrics.scores`). q̂ is an exact
order statistic. It is NaN if there are too few calibration images for a finite one.
"""

from typing import NamedTuple

import torch

from . import CR


class ImageScores(NamedTuple):
    """N images scored for every label. Scores are log-odds, float64.

    ``true_label`` N: the score of each image's true label. ``ranked`` N×K: the scores of all
    labels, ascending. ``misclassified`` N: whether the argmax is another label.
    """

    true_label: torch.Tensor
    ranked: torch.Tensor
    misclassified: torch.Tensor

    def select(self, indices):
        """The scores of some of the images (indices or booleans)."""
        return ImageScores(*(values[indices] for values in self))

    def in_set(self, q_hats):
        """Whether the set under each q̂ contains the true label. Q log-odds → booleans Q×N."""
        return self.true_label <= q_hats[:, None]

    def set_sizes(self, q_hats):
        """The number of labels in the set under each q̂ (meaningless for NaN). Q log-odds → Q×N."""
        # Scores are sorted, so a binary search per image counts those up to q̂.
        columns = q_hats.expand(len(self.ranked), -1).contiguous()
        return torch.searchsorted(self.ranked, columns, right=True).T.contiguous()


class Group(NamedTuple):
    """A group of images and its thresholds.

    ``images`` has one index tensor into ``part`` per draw, or is None if every draw uses all images
    of ``part``. ``q_hats`` are draws×alphas log-odds.
    """

    part: ImageScores
    images: list[torch.Tensor] | None
    q_hats: torch.Tensor


def score_images(output, score, part):
    """:class:`ImageScores` of an Output (logits N×K, labels N).

    ``part`` ("forget", "retain" or "held_out") selects the random numbers of a randomised score.
    """
    log_odds = score.log_odds(output.logits, part)
    true_label = log_odds.gather(1, output.labels[:, None]).squeeze(1)
    misclassified = output.logits.argmax(dim=1) != output.labels  # not by score: ties, raps
    return ImageScores(true_label, log_odds.sort().values, misclassified)


class ConformalScores:
    """The scores of one model's ``outputs`` and every q̂. See the module's docstring."""

    def __init__(self, outputs, settings):
        self.outputs = outputs
        self.settings = settings
        self.first_score = settings.scores[0]
        self.largest_size = max(outputs.cal_sizes)
        self._parts = {}
        self._q_hats = {}

    def part(self, name, score=None):
        """The :class:`ImageScores` of the ``forget``, ``retain`` or ``held_out`` images."""
        score = score or self.first_score
        if (name, score) not in self._parts:
            self._parts[name, score] = score_images(getattr(self.outputs, name), score, name)
        return self._parts[name, score]

    def q_hats(self, score=None, size=None, *, forgotten_class=False):
        """q̂ of each draw and α → draws×alphas, log-odds; NaN without a finite q̂.

        Calibrated on the retained classes or, if ``forgotten_class``, on the forgotten class.
        """
        key = (score or self.first_score, size or self.largest_size, forgotten_class)
        if key not in self._q_hats:
            score, size, _ = key
            outputs = self.outputs
            indices_of = outputs.forget_calibration if forgotten_class else outputs.calibration
            calibrations = [indices_of(size, draw) for draw in range(outputs.num_draws)]
            self._q_hats[key] = self._finite_quantiles(calibrations, score)
        return self._q_hats[key]

    def class_q_hats(self, score=None):
        """q̂ of each class and α in the split → K×alphas, as :meth:`q_hats` of the largest size."""
        return self._finite_quantiles(self.class_calibration(), score)

    def class_calibration(self):
        """The calibration images of each class in the split: K tensors of indices into held_out."""
        calibration = self.outputs.draws[0, : self.largest_size]
        labels = self.outputs.held_out.labels[calibration]
        num_classes = self.outputs.held_out.logits.shape[1]
        return [calibration[labels == number] for number in range(num_classes)]

    def groups(self, score=None, size=None):
        """{name: :class:`Group`} of every group of images that the metrics report."""
        outputs = self.outputs
        retain, forget = self.part("retain", score), self.part("forget", score)
        held_out, draws = self.part("held_out", score), range(outputs.num_draws)
        test = [outputs.test(draw) for draw in draws]
        q_hats = self.q_hats(score, size)
        groups = {"retain": Group(retain, None, q_hats), "test": Group(held_out, test, q_hats)}
        if outputs.forgotten is None:
            return groups | {"forget": Group(forget, None, q_hats)}
        forget_test = [outputs.forget_test(draw) for draw in draws]
        forget_q_hats = self.q_hats(score, size, forgotten_class=True)
        return groups | {
            "forget": Group(forget, None, forget_q_hats),
            "forget_test": Group(held_out, forget_test, forget_q_hats),
            "forget_by_retain": Group(forget, None, q_hats),
            "forget_test_by_retain": Group(held_out, forget_test, q_hats),
        }

    def _finite_quantiles(self, calibrations, score):
        """q̂ of each of n sets of held-out images at each α, NaN for infinity → n×alphas."""
        true_label, alphas = self.part("held_out", score).true_label, self.settings.alphas
        q_hats = [
            [CR.finite_quantile(true_label[images], a) for a in alphas] for images in calibrations
        ]
        return torch.tensor(q_hats, dtype=torch.float64)


def accuracy_and_coverage(images, calibration, settings):
    """Accuracy of forget images, and their coverage under the q̂ of calibration images.

    Both are Outputs of one model. Uses the first score and the first α of the settings. Returns two
    floats in [0, 1]. Coverage is NaN without a finite q̂.
    """
    score, alpha = settings.scores[0], settings.alphas[0]
    forget = score_images(images, score, "forget")
    q_hat = CR.finite_quantile(score_images(calibration, score, "held_out").true_label, alpha)
    accuracy = 1 - forget.misclassified.double().mean().item()
    return accuracy, CR.set_metrics(forget, [q_hat])["coverage"].item()
