"""Distances between several trainings of a method and of Retrain, image by image.

One model cannot show that an image is forgotten, because Retrain itself varies from training to
training. These functions compare distributions over trainings with one forget set. Their inputs
are margins n×M of n trainings on M images: the logit of the image's label minus the logsumexp of
the other logits.
"""

import math
from typing import NamedTuple

import torch

from .attack import roc
from .columns import RUN_COLUMNS, Column

BINS = 20
FLOOR = 1e-5  # the least probability of a bin
FALSE_POSITIVES = 0.01
FEWEST_U_LIRA = 3  # trainings of each kind
FEW = 8  # with fewer trainings, distributions can hardly be compared
PARTS = ("forget", "retain", "test")
NOISE_FLOOR = "retrain (halves)"

COLUMNS = {
    "method": RUN_COLUMNS["method"],
    "trainings": Column("n", "count", "", "number of trainings"),
    **{
        f"KLOM_{part}": Column(
            f"KLOM_{part[0]}", "number", "low", f"median KL of {part} margins from Retrain's"
        )
        for part in PARTS
    },
    "KLOM_forget_95": Column(
        "95 %", "number", "low", "95th percentile over forget images of that divergence"
    ),
    "ULiRA_accuracy": Column(
        "U-LiRA", "percent", "near 50 %", "accuracy of an attack that tells the method from Retrain"
    ),
    "ULiRA_AUC": Column("AUC", "number", "near 0.5", "area under its ROC curve"),
    "ULiRA_TPR@1%": Column("TPR@1%", "percent", "near 1 %", "its true positives at 1 % false"),
    "in_set_difference": Column(
        "|Δ in set|", "percent", "low", "difference to Retrain in in-set trainings, forget images"
    ),
    "within_noise": Column("noise", "text", "", "numbers no larger than between halves of Retrain"),
}


def margins(logits, labels):
    """Logit of the label minus the logsumexp of the others. N×K and N → N, float64."""
    logits = logits.double()
    true_label = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    return true_label[:, 0] - others.logsumexp(dim=1)


def klom(unlearned, retrained):
    """KL divergence of margins, KLOM (Georgiev et al. 2024, 2410.23232), for each image.

    Both margins are binned into 20 bins over their joint range, with a probability of at least
    1e-5 in every bin. n×M and m×M → KL(unlearned ‖ retrained), M.
    """
    both = torch.cat([unlearned, retrained])
    low, high = both.min(dim=0).values, both.max(dim=0).values

    def histogram(values):
        # The largest margin is at position 20 and belongs to the last bin, 19. If all margins of an
        # image are equal, 0/0 = NaN puts them into bin 0.
        position = (values - low) / (high - low) * BINS
        bins = position.nan_to_num().long().clamp(0, BINS - 1)
        # Each training adds 1/n to its bin of each image (column).
        shares = torch.full_like(values, 1 / len(values))
        probabilities = values.new_zeros(BINS, values.shape[1]).scatter_add(0, bins, shares)
        return probabilities.clamp(min=FLOOR)

    p, q = histogram(unlearned), histogram(retrained)
    return (p * (p / q).log()).sum(dim=0)


class ULiRA(NamedTuple):
    """The success of the attack: balanced accuracy, AUC and TPR at 1 % false positives."""

    accuracy: float
    auc: float
    tpr: float


def u_lira(unlearned, retrained):
    """The per-image attack U-LiRA (Hayes et al. 2024, 2403.01218). n×M and m×M → :class:`ULiRA`.

    For each image, one Gaussian is fitted to the margins of each kind of model. A likelihood ratio
    above 1 means unlearned. Both Gaussians leave out the model itself and the other kind's model of
    the same number, so that no kind has an advantage. Pooled over images and models. ValueError for
    fewer than three models of a kind.
    """
    if min(len(unlearned), len(retrained)) < FEWEST_U_LIRA:
        raise ValueError(f"U-LiRA needs at least {FEWEST_U_LIRA} models of each kind")
    positive = _log_ratios(unlearned, unlearned, retrained).flatten()
    negative = _log_ratios(retrained, unlearned, retrained).flatten()
    accuracy = ((positive > 0).double().mean() + (negative <= 0).double().mean()) / 2
    area, (tpr,) = roc(positive, negative, [FALSE_POSITIVES])
    return ULiRA(accuracy.item(), area, tpr)


def _log_ratios(points, unlearned, retrained):
    """log N(point | unlearned) − log N(point | retrained), leaving out each model's own number."""
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


# ---------------------------------------------------------------- the table


class Training(NamedTuple):
    """One model: its margins {part: M} for ``PARTS``, and whether the set of each forget image
    contains the label (booleans; None without a finite q̂).
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
    all_margins = {part: margins(*output) for part, output in images.items()}
    q_hat = conformal_scores.q_hats()[:1, 0]
    inside = conformal_scores.part("forget").in_set(q_hat)[0]
    return Training(all_margins, None if q_hat.isnan() else inside)


class Trainings(NamedTuple):
    """All n trainings of a method: the fields of :class:`Training`, stacked to n×M."""

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
    """The numbers of ``COLUMNS`` for two :class:`Trainings`, without those that need more."""
    row = {"trainings": unlearned.count}
    for part in PARTS:
        if unlearned.margins[part].shape[1]:
            divergence = klom(unlearned.margins[part], retrained.margins[part])
            row[f"KLOM_{part}"] = divergence.median().item()
            if part == "forget":
                row["KLOM_forget_95"] = divergence.quantile(0.95).item()
    if min(unlearned.count, retrained.count) >= FEWEST_U_LIRA:
        attack = u_lira(unlearned.margins["forget"], retrained.margins["forget"])
        row |= {"ULiRA_accuracy": attack.accuracy, "ULiRA_AUC": attack.auc}
        row["ULiRA_TPR@1%"] = attack.tpr
    if unlearned.in_set is not None and retrained.in_set is not None:
        shares = [trainings.in_set.double().mean(dim=0) for trainings in (unlearned, retrained)]
        row["in_set_difference"] = (shares[0] - shares[1]).abs().mean().item()
    return row


def rows(trainings):
    """A row for every method but Retrain of {method: :class:`Trainings`}, after the noise floor.

    The noise floor compares the first half of Retrain's trainings with the second, if there are
    four. A row needs two trainings of the method and two of Retrain.
    """
    retrained = trainings.get("retrain")
    if retrained is None or retrained.count < 2:
        return []
    floor = {}
    if retrained.count >= 4:
        half = retrained.count // 2
        floor = compare(retrained.select(slice(half)), retrained.select(slice(half, 2 * half)))
    table = [{"method": NOISE_FLOOR} | floor] if floor else []
    for name, unlearned in trainings.items():
        if name != "retrain" and unlearned.count >= 2:
            row = compare(unlearned, retrained)
            table.append({"method": name} | row | {"within_noise": within(row, floor)})
    return table


def within(row, floor):
    """Headings of the numbers at most as far from their best value as the floor's."""
    best = {"ULiRA_accuracy": 0.5, "ULiRA_AUC": 0.5, "ULiRA_TPR@1%": FALSE_POSITIVES}
    keys = [key for key in row if key in floor and key != "trainings"]

    def distance(numbers, key):
        return abs(numbers[key] - best.get(key, 0))

    near = [COLUMNS[key].heading for key in keys if distance(row, key) <= distance(floor, key)]
    return "all" if near and len(near) == len(keys) else ", ".join(near) or "–"
