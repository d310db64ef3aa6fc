"""Coverage of each class, against loops over images; predicted classes by hand."""

import math

import pytest
import torch
from scored import plain_log_odds, plain_numbers, plain_q_hat, plain_score, report, some_outputs

import metrics
from metrics import classwise, scores


@pytest.mark.parametrize(("forgotten_class", "name"), [(None, "thr"), (3, "thr"), (3, "aps")])
def test_class_rows_equal_loops(forgotten_class, name):
    outputs = some_outputs(3, forgotten_class)
    score, alphas = scores.Score(name, seed=5), (0.04, 0.2)
    rows = classwise.class_rows(
        metrics.ConformalScores(outputs, metrics.Settings(alphas, (score,))), ["a", "b", "c", "d"]
    )
    assert [(row["alpha"], row["class"]) for row in rows] == [
        (alpha, name) for alpha in alphas for name in "abcd"
    ]
    held_out = outputs.held_out
    labels = held_out.labels.tolist()
    label_scores = plain_log_odds(held_out, score, "held_out")
    retained = [label_scores[image] for image in range(45) if labels[image] != forgotten_class]
    for row in rows:
        number = "abcd".index(row["class"])
        common = plain_q_hat(retained, row["alpha"])
        calibration = [image for image in range(45) if labels[image] == number]
        mine = plain_q_hat([label_scores[image] for image in calibration], row["alpha"])
        test = [image for image in range(45, 90) if labels[image] == number]
        forget = (outputs.forget.labels == number).nonzero().flatten().tolist()
        groups = {
            "test": (held_out, "held_out", test),
            "forget": (outputs.forget, "forget", forget),
        }
        expected = {"alpha": row["alpha"], "calibration_images": len(calibration)}
        expected |= {"q_hat": plain_score(common), "own_q_hat": plain_score(mine)}
        for group, (output, drawn, chosen) in groups.items():
            expected[f"{group}_images"] = len(chosen)
            for prefix, q_hat in (("", common), ("own_", mine)):
                numbers = plain_numbers(output, chosen, q_hat, score, drawn)
                for key in ("coverage", "set_size"):
                    value = numbers[key]
                    expected[f"{prefix}{group}_{key}"] = math.nan if value is None else value
        assert row.pop("score") == name and row.pop("class") in "abcd"
        assert row == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("forgotten_class", [None, 3])
def test_worst_class_has_the_least_coverage_over_the_images_of_all_draws(forgotten_class):
    """With 20 images, 0.03 has no finite q̂, and 0.053 has none in the last draw of a class."""
    outputs, alphas = some_outputs(4, forgotten_class), (0.03, 0.053, 0.2)
    score = scores.Score("aps", seed=5)
    scalars, rows = report(classwise, outputs, metrics.Settings(alphas, (score,)))
    assert scalars == {} and len(rows) == 6
    labels = outputs.held_out.labels.tolist()
    label_scores = plain_log_odds(outputs.held_out, score, "held_out")
    for (_, size, alpha), row in rows.items():
        covered = {label: [] for label in range(4)}
        for draw in outputs.draws.tolist():
            calibration, test = (
                [image for image in images if labels[image] != forgotten_class]
                for images in (draw[:size], draw[45:])
            )
            q_hat = plain_q_hat([label_scores[image] for image in calibration], alpha)
            for image in test if q_hat is not None else ():
                covered[labels[image]].append(label_scores[image] <= q_hat)
        shares = [sum(inside) / len(inside) for inside in covered.values() if inside]
        worst = min(shares, default=math.nan)
        assert row == {"worst_class_coverage": pytest.approx(worst, nan_ok=True)}
        assert math.isnan(worst) == ((size, alpha) == (20, 0.03))


def test_predicted_classes_of_a_forgotten_class_and_their_distance_by_hand():
    def rows_of(*forget, held_out=(0, 2, 2, 1), forgotten=(True, True, True, False)):
        """The first two of the ``held_out`` images, which are predicted as these, calibrate."""
        parts = [
            metrics.Output(torch.eye(3)[list(each)], torch.ones(len(each), dtype=torch.int64))
            for each in (forget, (0,), held_out)
        ]
        marks = None if forgotten is None else torch.tensor(forgotten)
        outputs = metrics.Outputs(*parts, [2], metrics.draw_splits(4, 1), marks)
        return classwise.destination_rows(outputs, ["ant", "bee", "cat"])

    rows = rows_of(0, 0, 2, 1)
    assert [tuple(row.values()) for row in rows] == [
        ("forget", "ant", 0.5), ("forget", "bee", 0.25), ("forget", "cat", 0.25),
        ("forget_test", "ant", 0), ("forget_test", "bee", 0), ("forget_test", "cat", 1),
    ]  # fmt: skip
    # ½ (|0.5 − 0| + |0.25 − 0.5| + |0.25 − 0.5|)
    assert classwise.total_variation(rows, rows_of(1, 2)) == {"TV_forget": 0.5, "TV_forget_test": 0}
    assert rows_of(1, forgotten=None) == []
    without_test = rows_of(1, forgotten=[True, True, False, False])
    assert math.isnan(classwise.total_variation(without_test, without_test)["TV_forget_test"])
