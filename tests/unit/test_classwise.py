"""Coverage of each class, against loops over images."""

import math

import pytest
from scored import plain_log_odds, plain_numbers, plain_q_hat, plain_score, some_outputs

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
