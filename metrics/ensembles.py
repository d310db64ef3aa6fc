"""Distances between several trainings of a method and of Retrain, image by image.

One model cannot show that an image is forgotten, because Retrain itself varies from training to
training. These functions compare distributions over trainings with one forget set. Their inputs
are margins n×M of n trainings on M images: the logit of the image's label minus the logsumexp of
the other logits.

Most distances between two samples of n trainings are above 0 without a difference, and the more so
the smaller n is. A distance is therefore reported with its chance, the mean over random relabelings
of the 2n trainings, which has n trainings on each side as well.
"""

import math
from typing import NamedTuple

import torch

from .columns import RUN_COLUMNS, Column

BINS = 20
FLOOR = 1e-5  # the least probability of a bin
FARTHEST = 100  # KLOM clips margins beyond
FEWEST_U_LIRA = 3  # trainings of each kind
FEW = 8  # with fewer trainings, distributions can hardly be compared
PARTS = ("forget", "retain", "test")
RELABELINGS = 999  # of the permutation test
CHANCE_RELABELINGS = 99  # that a chance is the mean over

COLUMNS = {
    "method": RUN_COLUMNS["method"],
    "trainings": Column("n", "count", "", "number of trainings of the method, and of Retrain"),
    "KLOM_forget": Column("KLOM_f", "number", "low", "median KL of forget margins from Retrain's"),
    "KLOM_forget_chance": Column("chance", "number", "", "its mean over relabelings"),
    "p_value": Column("p", "number", "", "permutation test of forget margins against Retrain's"),
    "KLOM_retain": Column("KLOM_r", "number", "low", "median KL of retain margins"),
    "KLOM_retain_chance": Column("chance_r", "number", "", "its mean over relabelings"),
    "KLOM_test": Column("KLOM_t", "number", "low", "median KL of test margins"),
    "KLOM_test_chance": Column("chance_t", "number", "", "its mean over relabelings"),
    "ULiRA_accuracy": Column("U-LiRA", "percent", "", "accuracy of telling it from Retrain"),
    "ULiRA_control": Column("test", "percent", "", "the same attack on unseen (test) images"),
    "ULiRA_excess": Column("excess", "percent", "near 0", "U-LiRA minus its accuracy on test"),
    "ULiRA_excess_error": Column("±", "percent", "", "standard error of excess over the images"),
    "in_set_difference": Column(
        "Δ set", "percent", "low", "difference to Retrain in in-set trainings, forget images"
    ),
    "in_set_difference_chance": Column("chance", "percent", "", "its mean over relabelings"),
}


def margins(logits, labels):
    """Logit of the label minus the logsumexp of the others. N×K and N → N, float64."""
    logits = logits.double()
    true_label = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    return true_label[:, 0] - others.logsumexp(dim=1)


def klom(unlearned, retrained):
    """KL divergence of margins, KLOM (Georgiev et al. 2024, 2410.23232), for each image.

    Margins are clipped to ±100, as in the authors' benchmark (2602.16400). Both are binned into 20
    bins over their joint range, with a probability of at least 1e-5 in every bin.
    n×M and m×M → KL(unlearned ‖ retrained), M. ValueError for margins that are not finite.
    """
    _check_finite(unlearned, retrained)
    unlearned, retrained = (kind.clamp(-FARTHEST, FARTHEST) for kind in (unlearned, retrained))
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


def u_lira(unlearned, retrained):
    """The per-image attack U-LiRA (Hayes et al. 2024, 2403.01218): its balanced accuracy.

    For each image, one Gaussian is fitted to the margins of each kind of model. A likelihood ratio
    above 1 means unlearned. Both Gaussians leave out the model itself and the other kind's model of
    the same number, so that no kind has an advantage. n×M and n×M → accuracy for each image, M.
    ValueError for fewer than three models of a kind and for margins that are not finite.

    The attack also succeeds if the method trains differently from Retrain, without a trace of the
    forget images. Its accuracy on images that no model has seen is therefore the control. Other
    attacks have such images as their null: deepunlearn (2410.01276) compares models of one method
    that forgot an image with models of that method in which it is a test image. So does the privacy
    attack of RULI (2506.13009). RULI's efficacy attack has models trained without the image.
    """
    _check_finite(unlearned, retrained)
    count = len(unlearned)
    if count < FEWEST_U_LIRA:
        raise ValueError(f"U-LiRA needs at least {FEWEST_U_LIRA} models of each kind")
    correct = torch.zeros(unlearned.shape[1], dtype=torch.float64)
    for number in range(count):
        others, laws = torch.arange(count) != number, []
        for kind in (unlearned, retrained):
            deviation, mean = torch.std_mean(kind[others], dim=0)
            # Equal margins have no deviation, and any distance from them is then decisive.
            laws.append(torch.distributions.Normal(mean, deviation.clamp(min=1e-9)))
        positive, negative = (
            laws[0].log_prob(kind[number]) - laws[1].log_prob(kind[number])
            for kind in (unlearned, retrained)
        )
        correct += (positive > 0).double() + (negative <= 0).double()
    return correct / (2 * count)


def permutation_test(unlearned, retrained):
    """The p-value of a permutation test that margins n×M and n×M follow one law.

    The statistic is the energy distance between the two kinds of models (Székely & Rizzo 2004), the
    mean over images of E|U − R| − E|U − U'|/2 − E|R − R'|/2 in units of each image's standard
    deviation. Models are relabeled and not images, because all images of a training vary together.
    """
    _check_finite(unlearned, retrained)
    both, count = torch.cat([unlearned, retrained]), len(unlearned)
    deviations = both.std(dim=0).clamp(min=1e-9)
    distances = torch.cdist(both / deviations, both / deviations, p=1) / both.shape[1]
    # A row of signs is a labeling, +1 for one kind of model. Row 0 is the true one.
    signs = torch.full((1 + RELABELINGS, 2 * count), -1.0, dtype=distances.dtype)
    signs[0, :count] = 1
    signs[1:].scatter_(1, relabelings(count)[:, :count], 1.0)
    energies = -((signs @ distances) * signs).sum(dim=1) / (2 * count**2)
    # The true labeling counts as one of the relabelings, so p is never 0 (Phipson & Smyth 2010).
    as_large = (energies[1:] >= energies[0] - 1e-9).sum().item()
    return (1 + as_large) / (1 + RELABELINGS)


def relabelings(count):
    """Random orders of ``count`` models of each kind, 999×2·count. The first half is one kind."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(RELABELINGS, 2 * count, generator=generator).argsort(dim=1)


def chance(distance, unlearned, retrained):
    """The mean over random relabelings of ``distance``, a function of n×M and n×M."""
    both, count = torch.cat([unlearned, retrained]), len(unlearned)
    orders = relabelings(count)[:CHANCE_RELABELINGS]
    distances = [distance(both[order[:count]], both[order[count:]]) for order in orders]
    return sum(distances) / len(distances)


def median_klom(unlearned, retrained):
    """The median over images of :func:`klom`."""
    return klom(unlearned, retrained).median().item()


def in_set_difference(unlearned, retrained):
    """Mean absolute difference in the share of trainings. Booleans n×M and m×M → a number."""
    shares = [in_set.double().mean(dim=0) for in_set in (unlearned, retrained)]
    return (shares[0] - shares[1]).abs().mean().item()


def _check_finite(*all_margins):
    if not all(margins.isfinite().all() for margins in all_margins):
        raise ValueError("margins are NaN or infinite")


# ---------------------------------------------------------------- the table


class Trainings(NamedTuple):
    """n trainings of a method: their margins {part: n×M} for ``PARTS`` and "control", and whether
    the set of each forget image contains the label (booleans n×M; None without a finite q̂).
    """

    margins: dict[str, torch.Tensor]
    in_set: torch.Tensor | None

    @classmethod
    def join(cls, items):
        """All :class:`Trainings` of a method as one."""
        in_sets, parts = [item.in_set for item in items], items[0].margins
        return cls(
            {part: torch.cat([item.margins[part] for item in items]) for part in parts},
            None if any(inside is None for inside in in_sets) else torch.cat(in_sets),
        )

    @property
    def count(self):
        """The number of trainings n."""
        return len(self.margins["forget"])

    def select(self, trainings):
        """Some of the trainings, by a slice."""
        chosen = {part: values[trainings] for part, values in self.margins.items()}
        return Trainings(chosen, None if self.in_set is None else self.in_set[trainings])


def describe(conformal_scores, retain_sample):
    """One model as :class:`Trainings` with n = 1, by its first score and α and the split's own q̂.

    ``retain_sample`` are the positions of the retain images to compare. The control of the forget
    images are test images, of the forgotten class if there is one.
    """
    outputs = conformal_scores.outputs
    images = {
        "forget": outputs.forget,
        "retain": outputs.retain.select(retain_sample),
        "test": outputs.held_out.select(outputs.test()),
    }
    images["control"] = images["test"]
    if outputs.forgotten is not None:
        images["control"] = outputs.held_out.select(outputs.forget_test())
    all_margins = {part: margins(*output)[None] for part, output in images.items()}
    q_hat = conformal_scores.q_hats()[:1, 0]
    inside = conformal_scores.part("forget").in_set(q_hat)
    return Trainings(all_margins, None if q_hat.isnan() else inside)


def compare(unlearned, retrained):
    """The numbers of ``COLUMNS`` for n trainings of each kind, without those that need more."""
    row = {"trainings": unlearned.count}
    pairs = {part: (unlearned.margins[part], retrained.margins[part]) for part in unlearned.margins}
    for part in PARTS:
        if pairs[part][0].shape[1]:
            row[f"KLOM_{part}"] = median_klom(*pairs[part])
            row[f"KLOM_{part}_chance"] = chance(median_klom, *pairs[part])
    row["p_value"] = permutation_test(*pairs["forget"])
    if unlearned.count >= FEWEST_U_LIRA:
        accuracy, control = u_lira(*pairs["forget"]), u_lira(*pairs["control"])
        variance = accuracy.var() / len(accuracy) + control.var() / len(control)
        row |= {"ULiRA_accuracy": accuracy.mean().item(), "ULiRA_control": control.mean().item()}
        row["ULiRA_excess"] = row["ULiRA_accuracy"] - row["ULiRA_control"]
        row["ULiRA_excess_error"] = variance.sqrt().item()
    if unlearned.in_set is not None and retrained.in_set is not None:
        row["in_set_difference"] = in_set_difference(unlearned.in_set, retrained.in_set)
        by_chance = chance(in_set_difference, unlearned.in_set, retrained.in_set)
        row["in_set_difference_chance"] = by_chance
    return row


def rows(trainings):
    """A row for every method but Retrain of {method: :class:`Trainings`}.

    A method and Retrain enter with their first n trainings, where n is the smaller number. A row
    needs two of each. ValueError that names the method for margins that are not finite.
    """
    for name, kind in trainings.items():
        for part, values in kind.margins.items():
            if infinite := (~values.isfinite()).any(dim=1).nonzero().flatten().tolist():
                number = f"training {infinite[0] + 1} of {kind.count}"
                raise ValueError(f"{name}, {number}: {part} margins are NaN or infinite")
    retrained, table = trainings.get("retrain"), []
    for name, unlearned in trainings.items():
        count = min(unlearned.count, retrained.count) if retrained else 0
        if name != "retrain" and count >= 2:
            same = (kind.select(slice(count)) for kind in (unlearned, retrained))
            table.append({"method": name} | compare(*same))
    return table
