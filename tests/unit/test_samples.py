"""The rows of the forget images and the clearest fake forgetting, against loops over images."""

import pytest
import torch
from scored import plain_log_odds, plain_q_hat, plain_score, some_outputs

import metrics
from metrics import samples, scores


@pytest.mark.parametrize(("forgotten_class", "kind"), [(None, "thr"), (3, "thr"), (None, "aps")])
def test_sample_rows_equal_loops(forgotten_class, kind):
    outputs = some_outputs(5, forgotten_class, cal_sizes=(10, 20))
    score, alphas = scores.Score(kind, seed=5), (0.01, 0.2)
    if forgotten_class is None:  # some forget images tie with calibration images
        outputs.forget = outputs.held_out.select(torch.arange(40))
    count = len(outputs.forget.labels)
    indices, names = torch.arange(count) + 100, [f"{number}.png" for number in range(count)]
    chosen = metrics.Settings(alphas, (score, scores.Score("aps")))
    conformal_scores = metrics.ConformalScores(outputs, chosen)
    rows = samples.sample_rows(conformal_scores, indices, names)
    label_scores = plain_log_odds(outputs.held_out, score, "held_out")
    labels = outputs.held_out.labels.tolist()
    q_hats = []
    for draw in outputs.draws.tolist():
        calibration = [image for image in draw[:20] if labels[image] != forgotten_class]
        q_hats.append(plain_q_hat([label_scores[image] for image in calibration], 0.2))
    log_odds = score.log_odds(outputs.forget.logits, "forget").tolist()
    p = torch.softmax(outputs.forget.logits, dim=1)
    for number, row in enumerate(rows):
        label = int(outputs.forget.labels[number])
        prediction = int(outputs.forget.logits[number].argmax())
        inside = log_odds[number][label] <= q_hats[0]
        assert row == pytest.approx(
            {
                "index": 100 + number,
                "file": f"{number}.png",
                "label": label,
                "prediction": prediction,
                "p_true": p[number, label].item(),
                "score": plain_score(log_odds[number][label]),
                **dict.fromkeys(
                    f"{k}@0.01" for k in ("set_size", "in_set", "fake", "in_set_share")
                ),
                "set_size@0.2": sum(item <= q_hats[0] for item in log_odds[number]),
                "in_set@0.2": int(inside),
                "fake@0.2": int(inside and label != prediction),
                "in_set_share@0.2": sum(log_odds[number][label] <= q_hat for q_hat in q_hats) / 5,
            }
        )
    assert len(rows) == count and "file" not in samples.sample_rows(conformal_scores, indices)[0]


@pytest.mark.parametrize(("forgotten_class", "kind"), [(None, "thr"), (3, "thr"), (None, "aps")])
def test_most_fake_images_are_in_the_order_of_their_scores(forgotten_class, kind):
    outputs = some_outputs(2, forgotten_class, cal_sizes=(10, 20))
    if forgotten_class is None:  # one label's score is q̂ itself
        outputs.forget = outputs.held_out.select(torch.arange(40))
    score = scores.Score(kind, seed=5)
    chosen = metrics.Settings((0.2, 0.04), (score,))
    label_scores = plain_log_odds(outputs.held_out, score, "held_out")
    labels = outputs.held_out.labels.tolist()
    calibration = [image for image in range(20) if labels[image] != forgotten_class]
    q_hat = plain_q_hat([label_scores[image] for image in calibration], 0.2)
    log_odds = score.log_odds(outputs.forget.logits, "forget").tolist()
    expected = []
    for place, row in enumerate(log_odds):
        label = int(outputs.forget.labels[place])
        order = sorted(range(4), key=row.__getitem__)
        if order[0] != label and row[label] <= q_hat:
            inside = [item for item in order if row[item] <= q_hat]
            expected.append((row[label], (place, label, order[0], inside)))
    expected = [entry for _, entry in sorted(expected)]
    assert expected
    conformal_scores = metrics.ConformalScores(outputs, chosen)
    assert samples.most_fake(conformal_scores, 100) == expected
    assert samples.most_fake(conformal_scores, 2) == expected[:2]
    too_few = metrics.ConformalScores(outputs, metrics.Settings((0.01,)))
    assert samples.most_fake(too_few, 3) is None
