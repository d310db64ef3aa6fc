"""Coverage class by class, under the common calibration and under each class's own (class-conditional, Mondrian
conformal prediction: Vovk et al. 2005). The common q̂ covers 1 − α on average and may leave a class far below."""

import torch

from . import CR, scores


def class_rows(outputs, settings, classes):
    """One row (dict) per score, α and class, for the largest calibration size and the split itself.

    ``classes`` are the K names. The common q̂ is that of the calibration images of all retained classes, the own one
    that of the class's calibration images. Images are the test images of the class and its forgotten training images.
    Numbers are floats, NaN where the class has no image or too few images calibrate.
    """
    size = max(outputs.cal_sizes)
    labels = outputs.held_out.labels
    # All images of the held-out parts: those of a forgotten class too.
    calibration, test = outputs.draws[0, :size], outputs.draws[0, size:]
    rows = []
    for score in settings.scores:
        held_out = CR.score_part(outputs.held_out, score, "held_out")
        forget = CR.score_part(outputs.forget, score, "forget")
        q_hats = CR.split_q_hats(held_out, outputs, size, settings.alphas)[0].tolist()
        for alpha_number, alpha in enumerate(settings.alphas):
            for number, name in enumerate(classes):
                own_images = calibration[labels[calibration] == number]
                own = CR.finite_quantile(held_out.own[own_images], alpha)
                thresholds = torch.tensor([q_hats[alpha_number], own], dtype=torch.float64)
                row = {"score": score.name, "alpha": alpha, "class": name, "calibration_images": len(own_images)}
                row["q_hat"], row["own_q_hat"] = scores.from_log_odds(thresholds).tolist()
                parts = {
                    "test": held_out.of(test[labels[test] == number]),
                    "forget": forget.of(outputs.forget.labels == number),
                }
                for part, scored in parts.items():
                    row[f"{part}_images"] = len(scored.own)
                    found = CR.describe(scored, thresholds)
                    for key in ("coverage", "set_size"):
                        row[f"{part}_{key}"], row[f"own_{part}_{key}"] = found[key].tolist()
                rows.append(row)
    return rows
