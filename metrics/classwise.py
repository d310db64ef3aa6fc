"""Coverage class by class, under the common q̂ and under each class's own.

A class's own q̂ is class-conditional (Mondrian) conformal prediction (Vovk et al. 2005). The common
q̂ covers 1 − α on average and may leave a class far below.
"""

import torch

from . import CR, scores


def class_rows(conformal_scores, classes):
    """One row (dict) per score, α and class, for the largest calibration size and the split itself.

    ``classes`` are the K names. The common q̂ comes from the calibration images of all retained
    classes, the own q̂ from those of the class. The images are the class's test images and its
    forget images. Numbers are floats, NaN where the class has no image or too few images calibrate.
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
                for group, parts in groups.items():
                    row[f"{group}_images"] = len(parts[label].true_label)
                    described = CR.describe(parts[label], q_hats)
                    for key in ("coverage", "set_size"):
                        row[f"{group}_{key}"], row[f"own_{group}_{key}"] = described[key].tolist()
                rows.append(row)
    return rows


def _class_groups(conformal_scores, score, num_classes):
    """The test and forget images of each class: {"test", "forget": K PartScores}."""
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
