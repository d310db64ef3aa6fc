"""Coverage of each class, and the predicted classes of a forgotten class's images.

Coverage is under the common q̂ and under the q̂ of the class. The latter is class-conditional
(Mondrian) conformal prediction (Vovk et al. 2005). The common q̂ covers 1 − α of all images on
average, but its coverage of a single class can be far lower.
"""

import itertools
import math

import torch
from torch.nn import functional as F

from . import CR, scores
from .columns import Column

TV = "total variation distance to Retrain's predicted classes, {} images; positive even by chance"
COLUMNS = {
    "TV_forget": Column("TV_f", "percent", "low", TV.format("forget")),
    "TV_forget_test": Column("TV_f_test", "percent", "low", TV.format("the class's test")),
}
WORST = "least coverage of a class's test images, all resplits together"
ROW_COLUMNS = {"worst_class_coverage": Column("worst class", "percent", "high", WORST)}


def report(outputs, conformal_scores, settings):
    """The coverage of the worst class, per (score, calibration size, α). Returns ``({}, rows)``.

    Pools the draws with a finite q̂, because one draw has few images of a class.
    """
    rows, of_class = {}, F.one_hot(outputs.held_out.labels).double()  # P×K
    for score, size in itertools.product(settings.scores, outputs.cal_sizes):
        part, tests, q_hats = conformal_scores.groups(score, size)["test"]
        # A product with the one-hot labels sums over the images of each class.
        inside = tested = 0  # images, alphas×K
        for images, q_hat in zip(tests, q_hats, strict=True):
            inside = inside + part.in_set(q_hat)[:, images].double() @ of_class[images]
            tested = tested + (~q_hat.isnan()).double()[:, None] * of_class[images].sum(dim=0)
        worst = (inside / tested).nan_to_num(math.inf).amin(dim=1)  # classes without images: 0/0
        worst = worst.where(~q_hats[0].isnan(), math.nan).tolist()
        for alpha, coverage in zip(settings.alphas, worst, strict=True):
            rows[score.name, size, alpha] = {"worst_class_coverage": coverage}
    return {}, rows


def destination_rows(outputs, classes):
    """The predicted classes of a forgotten class's images: a row (dict) per part and class.

    ``share`` is a fraction of the part's images, NaN without images. [] if no class is forgotten.
    """
    if outputs.forgotten is None:
        return []
    forget_test, rows = outputs.held_out.select(outputs.forget_test()), []
    for part, (logits, labels) in {"forget": outputs.forget, "forget_test": forget_test}.items():
        counts = logits.argmax(dim=1).bincount(minlength=len(classes))
        shares = (counts.double() / len(labels)).tolist()
        pairs = zip(classes, shares, strict=True)
        rows += [{"part": part, "predicted_class": name, "share": share} for name, share in pairs]
    return rows


def total_variation(rows, reference):
    """{"TV_<part>": ½ Σ |p − q| in [0, 1]} between two results of :func:`destination_rows`."""
    distances = {}
    for row, other in zip(rows, reference, strict=True):
        key = f"TV_{row['part']}"
        distances[key] = distances.get(key, 0) + abs(row["share"] - other["share"]) / 2
    return distances


def class_rows(conformal_scores, classes):
    """One row (dict) per score, α and class, for the largest calibration size and the split itself.

    ``classes`` are the K names. ``q_hat`` is from all retained classes, ``own_q_hat`` from the
    class. Numbers are floats, NaN if the class has no test or forget image or no finite q̂.
    """
    settings = conformal_scores.settings
    rows = []
    for score in settings.scores:
        common, own = conformal_scores.q_hats(score)[0], conformal_scores.class_q_hats(score)
        groups = _class_groups(conformal_scores, score, len(classes))
        for column, alpha in enumerate(settings.alphas):
            for label, name in enumerate(classes):
                q_hats = torch.stack([common[column], own[label, column]])
                row = {"score": score.name, "alpha": alpha, "class": name}
                row["calibration_images"] = len(conformal_scores.class_calibration()[label])
                row["q_hat"], row["own_q_hat"] = scores.from_log_odds(q_hats).tolist()
                for group, images in groups.items():
                    row[f"{group}_images"] = len(images[label].true_label)
                    numbers = CR.set_metrics(images[label], q_hats)
                    for key in ("coverage", "set_size"):
                        row[f"{group}_{key}"], row[f"own_{group}_{key}"] = numbers[key].tolist()
                rows.append(row)
    return rows


def _class_groups(conformal_scores, score, num_classes):
    """The test and forget images of each class: {"test", "forget": K ImageScores}."""
    outputs = conformal_scores.outputs
    # Unlike outputs.test(), this includes the forgotten class's images.
    test = outputs.draws[0, conformal_scores.largest_size :]
    scored_test = conformal_scores.part("held_out", score).select(test)
    images = {
        "test": (scored_test, outputs.held_out.labels[test]),
        "forget": (conformal_scores.part("forget", score), outputs.forget.labels),
    }
    return {
        group: [part.select(labels == label) for label in range(num_classes)]
        for group, (part, labels) in images.items()
    }
