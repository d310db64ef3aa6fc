"""Coverage of each class, under the common q̂ and under the q̂ of this class.

The latter is class-conditional (Mondrian) conformal prediction (Vovk et al. 2005). The common q̂
covers 1 − α of all images on average, but its coverage of a single class can be far lower.
"""

import torch

from . import CR, scores


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
