"""Which q̂ judges which images: computed once per model, used by every metric, figure and file.

    conformal_scores = ConformalScores(outputs, settings)
    conformal_scores.part("forget")     # the forget images, scored for every label
    conformal_scores.q_hats()           # q̂ of every draw and α from all retained classes
    conformal_scores.class_q_hats()     # q̂ of every class and α from the class's own images
    conformal_scores.judgements()       # {group of images: its scores and the q̂ that judges it}
    accuracy_and_coverage(images, calibration, settings)   # for images that are not in outputs

Methods take a :class:`metrics.scores.Score` and a calibration size. The defaults are the first
score of the settings and the largest calibration size. Results are cached.

Which images calibrate:

* Each draw divides the held-out images. Its first ``size`` images calibrate. The images behind the
  largest calibration size are its test images. The first draw is the split itself.
* Random forgetting: all calibration images give one q̂, which judges every group.
* Class-wise forgetting: the calibration images of the retained classes give the q̂ of ``retain``,
  ``test`` and every group ``…_by_retain``. The forgotten class's own calibration images give the q̂
  of ``forget`` and ``forget_test``.

All scores and q̂ here are log-odds of S in float64 (see :mod:`metrics.scores`). q̂ is an exact
order statistic. It is NaN where too few images calibrate for a finite one.
"""

from typing import NamedTuple

import torch

from . import CR

PARTS = ("forget", "retain", "held_out")


class PartScores(NamedTuple):
    """Images scored for every label. Scores are log-odds, float64.

    ``true_label`` N: the score of each image's own label. ``ranked`` N×K: the scores of all labels,
    ascending. ``misclassified`` N: whether the argmax is another label.
    """

    true_label: torch.Tensor
    ranked: torch.Tensor
    misclassified: torch.Tensor

    def select(self, indices):
        """The same for some of the images (indices or booleans)."""
        return PartScores(*(values[indices] for values in self))

    def in_set(self, q_hats):
        """Whether the set under each q̂ holds the image's own label. Q log-odds → booleans Q×N."""
        return self.true_label <= q_hats[:, None]

    def set_sizes(self, q_hats):
        """How many labels the prediction set under each q̂ holds. Q log-odds → Q×N, int64.

        Scores are sorted, so a binary search per image counts those up to q̂. A q̂ of NaN gives a
        meaningless count.
        """
        columns = q_hats.expand(len(self.ranked), -1).contiguous()
        return torch.searchsorted(self.ranked, columns, right=True).T.contiguous()


class Judgement(NamedTuple):
    """A group of images and the q̂ that judges it.

    ``images`` holds one index tensor per draw, or None where every draw judges all images of
    ``part``. ``q_hats`` are draws×alphas log-odds.
    """

    part: PartScores
    images: list[torch.Tensor] | None
    q_hats: torch.Tensor


def score_images(output, score, part):
    """:class:`PartScores` of an Output (logits N×K, labels N).

    ``part`` ("forget", "retain" or "held_out") selects the random numbers of a randomised score.
    """
    log_odds = score.log_odds(output.logits, part)
    true_label = log_odds.gather(1, output.labels[:, None]).squeeze(1)
    misclassified = output.logits.argmax(dim=1) != output.labels
    return PartScores(true_label, log_odds.sort().values, misclassified)


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
        """The :class:`PartScores` of the ``forget``, ``retain`` or ``held_out`` images."""
        score = score or self.first_score
        if (name, score) not in self._parts:
            self._parts[name, score] = score_images(getattr(self.outputs, name), score, name)
        return self._parts[name, score]

    def q_hats(self, score=None, size=None, *, forgotten_class=False):
        """q̂ of each draw and α → draws×alphas, log-odds; NaN where too few images calibrate.

        Calibrated on the retained classes' images, or on the forgotten class's own.
        """
        key = (score or self.first_score, size or self.largest_size, forgotten_class)
        if key not in self._q_hats:
            self._q_hats[key] = self._compute_q_hats(*key)
        return self._q_hats[key]

    def class_q_hats(self, score=None):
        """q̂ of each class and α, from the class's own calibration images of the split → K×alphas,
        log-odds.

        The calibration size is the largest one. NaN where too few images of the class calibrate.
        """
        return torch.stack(
            [self._finite_quantiles(images, score) for images in self.class_calibration()]
        )

    def class_calibration(self):
        """The calibration images of each class in the split: K tensors of indices into held_out."""
        calibration = self.outputs.draws[0, : self.largest_size]
        labels = self.outputs.held_out.labels[calibration]
        num_classes = self.outputs.held_out.logits.shape[1]
        return [calibration[labels == number] for number in range(num_classes)]

    def judgements(self, score=None, size=None):
        """{group: :class:`Judgement`} of every group of images that the metrics report."""
        outputs = self.outputs
        forget, held_out = self.part("forget", score), self.part("held_out", score)
        draws = range(outputs.num_draws)
        retained = self.q_hats(score, size)
        groups = {
            "retain": Judgement(self.part("retain", score), None, retained),
            "test": Judgement(held_out, [outputs.test(draw) for draw in draws], retained),
        }
        if outputs.forgotten is None:
            return groups | {"forget": Judgement(forget, None, retained)}
        forget_test = [outputs.forget_test(draw) for draw in draws]
        own = self.q_hats(score, size, forgotten_class=True)
        return groups | {
            "forget": Judgement(forget, None, own),
            "forget_test": Judgement(held_out, forget_test, own),
            "forget_by_retain": Judgement(forget, None, retained),
            "forget_test_by_retain": Judgement(held_out, forget_test, retained),
        }

    def _compute_q_hats(self, score, size, forgotten_class):
        outputs = self.outputs
        indices_of = outputs.forget_calibration if forgotten_class else outputs.calibration
        draws = range(outputs.num_draws)
        return torch.stack(
            [self._finite_quantiles(indices_of(size, draw), score) for draw in draws]
        )

    def _finite_quantiles(self, images, score):
        """q̂ of some held-out images at each α, NaN for infinity → alphas."""
        true_label = self.part("held_out", score).true_label[images]
        q_hats = [CR.finite_quantile(true_label, alpha) for alpha in self.settings.alphas]
        return torch.tensor(q_hats, dtype=torch.float64)


class AccuracyAndCoverage(NamedTuple):
    """Two shares of the same images, floats in [0, 1]; the coverage is NaN where no q̂ is finite."""

    accuracy: float
    coverage: float


def accuracy_and_coverage(images, calibration, settings):
    """Accuracy of forget images, and their coverage under the q̂ of calibration images.

    ``images`` and ``calibration`` are Outputs of one model (logits N×K, labels N). Uses the first
    score and the first α of the settings.
    """
    score, alpha = settings.scores[0], settings.alphas[0]
    forget = score_images(images, score, "forget")
    q_hat = CR.finite_quantile(score_images(calibration, score, "held_out").true_label, alpha)
    accuracy = 1 - forget.misclassified.double().mean().item()
    return AccuracyAndCoverage(accuracy, CR.describe(forget, [q_hat])["coverage"].item())
