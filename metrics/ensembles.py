"""Distances between the trainings of a method and those of Retrain, image by image.

One model cannot show that an image is forgotten, because Retrain itself varies from training to
training. These functions compare distributions over trainings with one forget set. Their inputs
are margins n×M of n trainings on M images: the logit of the image's label minus the logsumexp of
the other logits.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from .columns import RUN_COLUMNS, Column

BINS = 20
FLOOR = 1e-5  # the least probability of a bin
FALSE_POSITIVES = 0.01
DELTA = 1e-5  # of (ε, δ)-unlearning, as in the competition
FEWEST = {"U-LiRA": 3, "epsilon": 64}  # trainings of each kind that the numbers need
FEW = 8  # with fewer trainings the numbers show little
PARTS = ("forget", "retain", "test")
NOISE_FLOOR = "retrain (halves)"

COLUMNS = {
    "method": RUN_COLUMNS["method"],
    "trainings": Column("n", "count", "", "number of trainings"),
    **{
        f"KLOM_{part}": Column(
            f"KLOM_{part[0]}",
            "number",
            "low",
            f"median over {part} images of the KL divergence of their margins from Retrain's",
        )
        for part in PARTS
    },
    "KLOM_forget_95": Column(
        "95 %", "number", "low", "95th percentile over forget images of that divergence"
    ),
    "ULiRA_accuracy": Column(
        "U-LiRA",
        "percent",
        "near 50 %",
        "balanced accuracy of a likelihood-ratio attack that tells the method from Retrain",
    ),
    "ULiRA_AUC": Column("AUC", "number", "near 0.5", "area under its ROC curve"),
    "ULiRA_TPR@1%": Column("TPR@1%", "percent", "near 1 %", "its true positives at 1 % false"),
    "epsilon": Column("ε", "number", "low", "median over forget images of the attack's ε"),
    "in_set_difference": Column(
        "|Δ in set|",
        "percent",
        "low",
        "mean over forget images of the difference to Retrain in the share of trainings whose "
        "prediction set holds the label",
    ),
    "within_noise": Column("noise", "text", "", "numbers no larger than between halves of Retrain"),
}


def margins(logits, labels):
    """Logit of the label minus the logsumexp of the others, float64. N×K and N → N."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    return own[:, 0] - others.logsumexp(dim=1)


def klom(unlearned, retrained):
    """KL divergence of margins, KLOM (Georgiev et al. 2024, 2410.23232), for each image.

    Both margins are binned into 20 bins over their joint range, with a probability of at least
    1e-5 in every bin. n×M and m×M → KL(unlearned ‖ retrained), M.
    """
    both = torch.cat([unlearned, retrained])
    low, high = both.min(dim=0).values, both.max(dim=0).values

    def histogram(values):
        position = (values - low) / (high - low) * BINS
        bins = position.nan_to_num().long().clamp(0, BINS - 1)  # NaN: all margins are equal
        shares = torch.full_like(values, 1 / len(values))
        counts = values.new_zeros(BINS, values.shape[1]).scatter_add(0, bins, shares)
        return counts.clamp(min=FLOOR)

    p, q = histogram(unlearned), histogram(retrained)
    return (p * (p / q).log()).sum(dim=0)


class ULiRA(NamedTuple):
    """The success of the attack: balanced accuracy, AUC and TPR at 1 % false positives."""

    accuracy: float
    auc: float
    tpr: float


def u_lira(unlearned, retrained):
    """The per-image attack U-LiRA (Hayes et al. 2024, 2403.01218). n×M and m×M → :class:`ULiRA`.

    For each image, a Gaussian is fitted to the margins of the unlearned models and one to those of
    the retrained models. A model is called unlearned where the likelihood ratio is above 1. Both
    Gaussians leave out the model itself and the model of the other kind with the same number, so
    that no kind has an advantage. Pooled over images and models. Raises ValueError for fewer than
    three models of a kind.
    """
    if min(len(unlearned), len(retrained)) < FEWEST["U-LiRA"]:
        raise ValueError(f"U-LiRA needs at least {FEWEST['U-LiRA']} models of each kind")
    positive = _log_ratios(unlearned, unlearned, retrained).flatten()
    negative = _log_ratios(retrained, unlearned, retrained).flatten()
    accuracy = ((positive > 0).double().mean() + (negative <= 0).double().mean()) / 2
    score = torch.cat([positive, negative]).numpy()
    is_unlearned = np.repeat([1, 0], [len(positive), len(negative)])
    false_positives, true_positives, _ = roc_curve(is_unlearned, score, drop_intermediate=False)
    tpr = float(true_positives[false_positives <= FALSE_POSITIVES].max())
    return ULiRA(accuracy.item(), float(roc_auc_score(is_unlearned, score)), tpr)


def _log_ratios(points, unlearned, retrained):
    """log N(point | unlearned) − log N(point | retrained), each without the model's own number."""
    ratios = []
    for number, point in enumerate(points):
        likelihoods = []
        for kind in (unlearned, retrained):
            others = torch.arange(len(kind)) != number % len(kind)
            deviation, mean = torch.std_mean(kind[others], dim=0)
            # Equal margins have no deviation, and any distance from them is then decisive.
            normal = torch.distributions.Normal(mean, deviation.clamp(min=1e-9))
            likelihoods.append(normal.log_prob(point))
        ratios.append(likelihoods[0] - likelihoods[1])
    return torch.stack(ratios)


def epsilon(unlearned, retrained):
    """ε of (ε, δ)-unlearning for each image (2406.09073, appendix). n×M and m×M → M.

    The attacks are all thresholds on the margin, in both directions. With false-positive rate p and
    false-negative rate n, an attack shows ε ≥ log((1 − δ − p) / n) and log((1 − δ − n) / p). An
    attack with only one rate of 0 does not count, and one with both shows ε = ∞. The largest
    counts, at least 0.
    """
    ordered, order = torch.cat([unlearned, retrained]).sort(dim=0)
    is_unlearned = order < len(unlearned)
    unlearned_below = is_unlearned.cumsum(dim=0)
    retrained_below = (~is_unlearned).cumsum(dim=0)
    last = torch.ones_like(is_unlearned[:1])
    is_threshold = torch.cat([ordered[1:] > ordered[:-1], last])  # not between equal margins
    unlearned_above = len(unlearned) - unlearned_below
    retrained_above = len(retrained) - retrained_below
    bounds = [torch.zeros(1, ordered.shape[1], dtype=torch.double)]
    for false_positives, false_negatives in (
        (retrained_above, unlearned_below),  # models above the threshold are called unlearned
        (retrained_below, unlearned_above),
    ):
        p = false_positives.double() / len(retrained)
        n = false_negatives.double() / len(unlearned)
        bound = torch.maximum(_log_quotient(1 - DELTA - p, n), _log_quotient(1 - DELTA - n, p))
        bound = bound.where((p > 0) == (n > 0), -math.inf)
        bounds.append(bound.where(is_threshold, -math.inf))
    return torch.cat(bounds).max(dim=0).values


def _log_quotient(numerator, denominator):
    return (numerator.clamp(min=0) / denominator).log()


# ---------------------------------------------------------------- the table


class Training(NamedTuple):
    """One model: its margins {part: M} for ``PARTS``, and which sets hold the label.

    ``in_set`` (booleans, one per forget image) is None where no q̂ is finite.
    """

    margins: dict[str, torch.Tensor]
    in_set: torch.Tensor | None


def describe(conformal_scores, retain_sample):
    """The :class:`Training` of one model, under its first score and α and the split's own q̂.

    ``retain_sample`` are the positions of the retain images to compare.
    """
    outputs = conformal_scores.outputs
    images = {
        "forget": outputs.forget,
        "retain": outputs.retain.select(retain_sample),
        "test": outputs.held_out.select(outputs.test()),
    }
    q_hat = conformal_scores.q_hats()[:1, 0]
    inside = conformal_scores.part("forget").in_set(q_hat)[0]
    return Training(
        {part: margins(*output) for part, output in images.items()},
        None if q_hat.isnan() else inside,
    )


class Trainings(NamedTuple):
    """All trainings of a method: margins {part: n×M} for ``PARTS``, and sets that hold the label.

    ``in_set`` (booleans, n×M forget images) is None where no q̂ is finite.
    """

    margins: dict[str, torch.Tensor]
    in_set: torch.Tensor | None

    @classmethod
    def stack(cls, trainings):
        """All :class:`Training` of a method."""
        in_sets = [training.in_set for training in trainings]
        return cls(
            {part: torch.stack([each.margins[part] for each in trainings]) for part in PARTS},
            None if any(inside is None for inside in in_sets) else torch.stack(in_sets),
        )

    @property
    def count(self):
        """The number of trainings n."""
        return len(self.margins["forget"])

    def select(self, trainings):
        """Some of the trainings, by a slice."""
        chosen = {part: values[trainings] for part, values in self.margins.items()}
        return Trainings(chosen, None if self.in_set is None else self.in_set[trainings])


def compare(unlearned, retrained):
    """The numbers of ``COLUMNS`` for two :class:`Trainings`, as far as there are enough of them."""
    row = {"trainings": unlearned.count}
    for part in PARTS:
        if unlearned.margins[part].shape[1]:
            divergence = klom(unlearned.margins[part], retrained.margins[part])
            row[f"KLOM_{part}"] = divergence.median().item()
            if part == "forget":
                row["KLOM_forget_95"] = divergence.quantile(0.95).item()
    pair = unlearned.margins["forget"], retrained.margins["forget"]
    fewest = min(unlearned.count, retrained.count)
    if fewest >= FEWEST["U-LiRA"]:
        attack = u_lira(*pair)
        row |= {"ULiRA_accuracy": attack.accuracy, "ULiRA_AUC": attack.auc}
        row["ULiRA_TPR@1%"] = attack.tpr
    if fewest >= FEWEST["epsilon"]:
        row["epsilon"] = epsilon(*pair).median().item()
    if unlearned.in_set is not None and retrained.in_set is not None:
        row["in_set_difference"] = in_set_differences(unlearned, retrained).abs().mean().item()
    return row


def in_set_differences(unlearned, retrained):
    """Per forget image: the share of trainings whose set holds its label, less Retrain's share."""
    shares = [trainings.in_set.double().mean(dim=0) for trainings in (unlearned, retrained)]
    return shares[0] - shares[1]


def rows(trainings):
    """The table: a row for every method but Retrain, and the noise floor. {method: Trainings}.

    The noise floor compares the first half of Retrain's trainings with the second. It needs four.
    Empty where there are fewer than two trainings of Retrain.
    """
    retrained = trainings.get("retrain")
    if retrained is None or retrained.count < 2:
        return []
    floor = {}
    if retrained.count >= 4:
        half = retrained.count // 2
        floor = compare(retrained.select(slice(half)), retrained.select(slice(half, 2 * half)))
    table = [{"method": NOISE_FLOOR} | floor] if floor else []
    for name, unlearned in compared_with_retrain(trainings).items():
        row = compare(unlearned, retrained)
        table.append({"method": name} | row | {"within_noise": within(row, floor)})
    return table


def image_rows(trainings, images):
    """What the trainings of each method do with each forget image, the farthest from Retrain first.

    ``trainings`` is {method: :class:`Trainings`}, ``images`` one dict per forget image, which names
    it. Each row has the share of trainings whose set holds the label, that share less Retrain's
    (both None without a finite q̂), and the image's KLOM. Empty without two trainings of Retrain.
    """
    table = []
    for name, unlearned in compared_with_retrain(trainings).items():
        retrained = trainings["retrain"]
        divergences = klom(unlearned.margins["forget"], retrained.margins["forget"]).tolist()
        shares = differences = [None] * len(divergences)
        if unlearned.in_set is not None and retrained.in_set is not None:
            shares = unlearned.in_set.double().mean(dim=0).tolist()
            differences = in_set_differences(unlearned, retrained).tolist()
        rows_of_method = [
            {
                "method": name,
                **image,
                "in_set_trainings": share,
                "in_set_trainings_minus_retrain": difference,
                "KLOM": divergence,
            }
            for image, share, difference, divergence in zip(
                images, shares, differences, divergences, strict=True
            )
        ]
        table += sorted(
            rows_of_method,
            key=lambda row: (-abs(row["in_set_trainings_minus_retrain"] or 0), -row["KLOM"]),
        )
    return table


class ImageMargins(NamedTuple):
    """The margins of one forget image over the trainings of a method and of Retrain.

    ``position`` is that in the forget set, ``klom`` the divergence, the margins are n and m.
    """

    position: int
    klom: float
    unlearned: torch.Tensor
    retrained: torch.Tensor


def extreme_images(trainings, count=2):
    """{method: :class:`ImageMargins` of the forget images nearest to and farthest from Retrain}.

    By KLOM, ``count`` of each, the nearest first; fewer where the forget set is smaller.
    """
    extremes = {}
    for name, unlearned in compared_with_retrain(trainings).items():
        own, others = unlearned.margins["forget"], trainings["retrain"].margins["forget"]
        divergences = klom(own, others)
        order = divergences.argsort(stable=True).tolist()
        chosen = order if len(order) <= 2 * count else order[:count] + order[-count:]
        extremes[name] = [
            ImageMargins(image, divergences[image].item(), own[:, image], others[:, image])
            for image in chosen
        ]
    return extremes


def compared_with_retrain(trainings):
    """The methods of {method: :class:`Trainings`} that :func:`rows` compares with Retrain."""
    retrained = trainings.get("retrain")
    if retrained is None or retrained.count < 2:
        return {}
    return {
        name: unlearned
        for name, unlearned in trainings.items()
        if name != "retrain" and unlearned.count >= 2
    }


def within(row, floor):
    """The headings of the numbers that are no farther from their best value than the floor's."""
    best = {"ULiRA_accuracy": 0.5, "ULiRA_AUC": 0.5, "ULiRA_TPR@1%": FALSE_POSITIVES}
    keys = [key for key in row if key in floor and key != "trainings"]
    near = [
        COLUMNS[key].heading
        for key in keys
        if abs(row[key] - best.get(key, 0)) <= abs(floor[key] - best.get(key, 0))
    ]
    return "all" if near and len(near) == len(keys) else ", ".join(near) or "–"
