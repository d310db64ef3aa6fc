"""The conformal metrics: scores against 60-digit arithmetic, and every number of a report against a
plain recomputation with loops and sorted lists."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from scipy import stats

import metrics
from metrics import CR, Spread, classwise, comparison, conformal, probe, samples, scores


def report(module, outputs, settings):
    """The report of a metric's module: (scalars, rows)."""
    return module.report(outputs, metrics.ConformalScores(outputs, settings), settings)


def evaluate(outputs, settings):
    return metrics.evaluate(metrics.ConformalScores(outputs, settings))


def mean(number):
    return number.mean if isinstance(number, metrics.Spread) else number


# ---------------------------------------------------------------- scores


def exact_log_odds(name, logits, u, penalty=0.01, k_reg=2, weight=0.2):
    """log S − log(1 − S) of one image's labels (FROM_ONE_ON · S where S ≥ 1), 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(700):
        powers = [mpmath.exp(mpmath.mpf(float(logit))) for logit in logits]
        p, u = [power / sum(powers) for power in powers], mpmath.mpf(float(u))
        # sorted() is stable, so ties are in the order of the labels.
        order = sorted(range(len(p)), key=lambda label: -p[label])
        actual = [None] * len(p)
        for rank, label in enumerate(order, 1):
            adaptive = sum(p[other] for other in order[: rank - 1]) + u * p[label]
            actual[label] = {
                "thr": 1 - p[label],
                "aps": adaptive,
                "raps": adaptive + mpmath.mpf(penalty) * max(rank - k_reg, 0),
                "saps": u * p[label]
                if rank == 1
                else p[order[0]] + (rank - 2 + u) * mpmath.mpf(weight),
            }[name]
        return [
            float(mpmath.log(score / (1 - score)))
            if score < 1
            else float(scores.FROM_ONE_ON * score)
            for score in actual
        ]


@pytest.mark.parametrize("name", scores.NAMES)
@pytest.mark.parametrize("spread", [1, 30, 300])
def test_log_odds_are_exact_for_any_confidence(name, spread):
    rng = np.random.default_rng(spread)
    logits = torch.from_numpy(spread * rng.standard_normal((8, 5)))
    score = scores.Score(name, penalty=0.01, k_reg=2, weight=0.2, seed=3)
    actual = score.log_odds(logits, "test")
    u = np.random.default_rng([3, *b"test"]).random(8)
    expected = torch.tensor(
        [exact_log_odds(name, *image) for image in zip(logits, u, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(actual.argsort(dim=1), expected.argsort(dim=1))


@pytest.mark.parametrize("name", ["aps", "raps", "saps"])
def test_scores_without_randomisation_use_u_of_one(name):
    logits = torch.tensor([[2.0, 45.0, 0.0], [0.0, 0.0, 0.0]]).double()
    actual = scores.Score(name, randomized=False, penalty=0.01, k_reg=2, weight=0.2).log_odds(
        logits, "test"
    )
    expected = torch.tensor(
        [exact_log_odds(name, image, 1.0) for image in logits], dtype=torch.float64
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_raps_within_k_reg_equals_aps_exactly():
    logits = torch.tensor([[900.0, 0.0, -1.0], [0.0, -900.0, -1000.0]])
    u = torch.tensor([0.5, 0.25]).double()
    raps, aps = scores.raps_log_odds(logits, u, 0.1, 2), scores.aps_log_odds(logits, u)
    assert torch.equal(raps[:, :2], aps[:, :2]) and not (raps[:, 2] == aps[:, 2]).any()


def test_scores_by_hand_are_reported_as_S():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).double().log()
    assert scores.thr(logits)[0].tolist() == pytest.approx([0.3, 0.8, 0.9])
    assert scores.Score()(logits)[0].tolist() == pytest.approx([0.3, 0.8, 0.9])
    # 0.7 + (rank − 2 + 1) · 0.4 passes 1 at the third rank
    assert scores.Score("saps", False, weight=0.4)(logits)[0].tolist() == pytest.approx(
        [0.7, 1.1, 1.5]
    )
    assert scores.Score("raps", False, penalty=0.25, k_reg=1)(logits)[0].tolist() == pytest.approx(
        [0.7, 1.15, 1.5]
    )
    # 0.5 + 0.5 is exactly 1.
    assert scores.Score("saps", False, weight=0.5)(torch.zeros(1, 2)).tolist() == [[0.5, 1.0]]
    adaptive = scores.Score("aps", seed=4)
    assert torch.equal(adaptive(logits), scores.from_log_odds(adaptive.log_odds(logits, "forget")))
    assert torch.equal(
        adaptive(logits, "test"), scores.from_log_odds(adaptive.log_odds(logits, "test"))
    )
    assert math.isnan(scores.from_log_odds(torch.tensor(math.nan).double()))


def test_labels_with_tied_1_minus_p_are_ordered_by_log_odds():
    """p of 1e-22 to 1e-30: 1 − p is 1 for all, and q̂ = 1 would put every label into every set."""
    margins = torch.arange(50.0, 70.0)
    logits = torch.stack([torch.zeros(20), -margins, torch.full((20,), -60.5)], dim=1)
    output = metrics.Output(logits, torch.ones(20, dtype=torch.int64))
    assert (scores.true_label_scores(*output) == 1).all()
    assert scores.true_label_log_odds(*output).tolist() == pytest.approx(margins.tolist())
    image_scores = conformal.score_images(output, scores.Score(), "forget")
    q_hat = CR.finite_quantile(image_scores.true_label, 0.5)  # the 11th of 20
    assert q_hat == pytest.approx(60)
    q_hats = torch.tensor([q_hat]).double()
    assert image_scores.in_set(q_hats).sum() == 11
    assert image_scores.set_sizes(q_hats).sum() == 20 + 11  # label 2 at 60.5 is outside


def test_labels_of_equal_logits_have_equal_scores():
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, -2.0, -2.0]])
    actual = scores.thr_log_odds(logits)
    assert actual[0].unique().numel() == 1 and actual[1].unique().numel() == 2
    aps = scores.aps_log_odds(logits, torch.ones(2).double())
    # Tied labels are ranked by number.
    assert scores.from_log_odds(aps)[0].tolist() == pytest.approx([0.25, 0.5, 0.75, 1])


def test_two_labels_of_one_half_each_have_equal_scores():
    """The third label has p ≈ e⁻³⁶: the other p round to ½, but 1 − p of one of them does not."""
    rest = torch.linspace(-36.7, -36.1, 50)
    actual = scores.thr_log_odds(torch.stack([torch.zeros(50), torch.zeros(50), rest], dim=1))
    assert torch.equal(actual[:, 0], actual[:, 1])


@pytest.mark.parametrize("name", ["aps", "raps", "saps"])
def test_many_labels_of_equal_probability_rank_by_number(name):
    score = scores.Score(name, randomized=False, penalty=0.01, k_reg=2, weight=0.2)
    actual = score.log_odds(torch.zeros(1, 40), "test")[0]
    assert (actual.diff() > 0).all()


# ---------------------------------------------------------------- q̂


@hypothesis_settings(max_examples=200, deadline=None)
@given(strategies.integers(0, 60), strategies.integers(1, 999))
def test_q_hat_is_finite_exactly_where_enough_images_calibrate(n, thousandths):
    alpha, values = thousandths / 1000, torch.arange(n).double()
    exact = Fraction(thousandths, 1000)
    k = math.ceil((n + 1) * (1 - exact))
    assert CR.quantile_rank(n, alpha) == k
    assert CR.least_images(alpha) == next(
        least for least in range(1000) if (least + 1) * exact >= 1
    )
    if k > n:
        assert math.isnan(CR.finite_quantile(values, alpha))
        assert CR.conformal_quantile(values, alpha) == math.inf
    else:
        assert CR.finite_quantile(values, alpha) == CR.conformal_quantile(values, alpha) == k - 1


def test_mean_over_draws_omits_draws_without_a_number():
    nan = math.nan
    values = {
        "coverage": [0.2, nan, 0.4],
        "unknown": [nan, 0.5, 0.6],
        "alone": [0.3, nan, nan],
        "same": [0.5, 0.5, nan],
    }
    spreads = {
        key: CR.over_draws(torch.tensor(row, dtype=torch.float64)) for key, row in values.items()
    }
    assert spreads["coverage"] == pytest.approx(Spread(0.3, 0.02**0.5))
    assert all(math.isnan(number) for number in spreads["unknown"])
    assert spreads["alone"].mean == 0.3 and math.isnan(spreads["alone"].std)
    assert spreads["same"] == Spread(0.5, 0.0)
    assert all(isinstance(spread, Spread) for spread in spreads.values())


def test_number_of_one_draw_has_no_spread():
    assert CR.over_draws(torch.tensor([0.5]).double()) == 0.5
    unknown = CR.over_draws(torch.tensor([math.nan]).double())
    assert isinstance(unknown, float) and math.isnan(unknown)


def test_equal_counts_over_draws_stay_integers():
    def reported(key, *values):
        return CR._reported(key, torch.tensor(values).double())

    assert repr(reported("test_misclassified", 3, 3, 3)) == "3"
    assert repr(reported("test_misclassified", 3, 4, 5)) == "4.0"
    assert repr(reported("test_misclassified", 3)) == "3"
    assert reported("forget_fake", 1, 2, math.nan) == pytest.approx(Spread(1.5, 0.5**0.5))
    assert reported("forget_fake", 2, 2) == Spread(2.0, 0.0)
    assert repr(reported("forget_fake", 2)) == "2"
    assert math.isnan(reported("forget_fake", math.nan))
    assert repr(reported("forget_fake_ratio", 1)) == "1.0"


# ---------------------------------------------------------------- recomputed reports


def some_outputs(num_draws, forgotten_class=None, counts=(40, 50, 90), cal_sizes=(20, 45), seed=0):
    """Random answers for 4 classes. Class 3 is rare: a ninth of the images."""
    rng = np.random.default_rng(seed)

    def output(n, keep=lambda labels: labels >= 0):
        labels = rng.choice(4, n, p=[0.3, 0.3, 0.3, 0.1])
        logits = rng.standard_normal((n, 4)) + 1.5 * np.eye(4)[labels]
        return metrics.Output(
            torch.from_numpy(logits)[keep(labels)], torch.from_numpy(labels)[keep(labels)]
        )

    held_out = output(counts[2])
    draws = metrics.draw_splits(counts[2], num_draws, seed)
    if forgotten_class is None:
        return metrics.Outputs(
            output(counts[0]), output(counts[1]), held_out, list(cal_sizes), draws
        )
    forget = output(6 * counts[0], lambda labels: labels == forgotten_class)
    retain = output(counts[1], lambda labels: labels != forgotten_class)
    return metrics.Outputs(
        forget, retain, held_out, list(cal_sizes), draws, held_out.labels == forgotten_class
    )


def plain_q_hat(values, alpha):
    k = math.ceil((len(values) + 1) * (1 - Fraction(str(alpha))))
    return sorted(values)[k - 1] if k <= len(values) else None


def plain_numbers(output, chosen, q_hat, set_sizes, score, drawn=""):
    """Every number of :func:`CR.describe`, image by image. None without a q̂ or an image."""
    numbers = score.log_odds(output.logits, drawn).tolist()
    inside, sizes, wrong = [], [], []
    for image in chosen:
        label = int(output.labels[image])
        wrong.append(int(output.logits[image].argmax()) != label)
        if q_hat is not None:
            inside.append(numbers[image][label] <= q_hat)
            sizes.append(sum(item <= q_hat for item in numbers[image]))
    actual = {"misclassified": sum(wrong)}
    keys = [
        "coverage",
        "set_size",
        "CR",
        "CR_error",
        "fake",
        "fake_ratio",
        "wrong_set_size",
        "wrong_CR",
    ]
    keys += [f"{name}@{size}" for name in ("ECF", "EuCF") for size in set_sizes]
    if q_hat is None:
        return actual | dict.fromkeys(keys)

    def ratio(inside, sizes):
        if not sizes:
            return None
        return sum(inside) / sum(sizes) if sum(sizes) else 0.0

    wrong_in_set = [item for item, is_wrong in zip(inside, wrong, strict=True) if is_wrong]
    wrong_sizes = [item for item, is_wrong in zip(sizes, wrong, strict=True) if is_wrong]
    actual["fake"] = sum(wrong_in_set)
    actual["fake_ratio"] = sum(wrong_in_set) / sum(wrong) if any(wrong) else None
    actual["wrong_set_size"] = sum(wrong_sizes) / len(wrong_sizes) if wrong_in_set else None
    actual["wrong_CR"] = ratio(wrong_in_set, wrong_sizes)
    n = len(chosen)
    actual["coverage"], actual["set_size"] = (
        (sum(inside) / n, sum(sizes) / n) if n else (None, None)
    )
    actual["CR"], actual["CR_error"] = ratio(inside, sizes), None
    if n:
        squares = [
            (item - actual["CR"] * size) ** 2 for item, size in zip(inside, sizes, strict=True)
        ]
        error = math.sqrt(sum(squares) / n / n)
        actual["CR_error"] = error / actual["set_size"] if sum(sizes) else 0.0
    for size in set_sizes:
        pairs = list(zip(inside, sizes, strict=True))
        actual[f"ECF@{size}"] = (
            sum(item and count <= size for item, count in pairs) / n if n else None
        )
        actual[f"EuCF@{size}"] = (
            sum(not item and count <= size for item, count in pairs) / n if n else None
        )
    return actual


def mean_of(values):
    known = [value for value in values if value is not None]
    return math.nan if values[0] is None else sum(known) / len(known)


@pytest.mark.parametrize(
    ("num_draws", "forgotten_class"),
    [(1, None), (4, None), (1, 3), (4, 3)],
    ids=["one", "four", "class", "classes"],
)
def test_report_equals_loops_over_draws_and_images(num_draws, forgotten_class):
    outputs = some_outputs(num_draws, forgotten_class)
    score, alphas, set_sizes = scores.Score(), (0.04, 0.2, 0.25), (0, 1, 2)
    scalars, rows = report(CR, outputs, metrics.Settings(alphas, (score,), set_sizes))
    assert scalars == {}
    assert set(rows) == {("thr", size, alpha) for size in (20, 45) for alpha in alphas}
    held_out = outputs.held_out
    label_scores = [
        row[label]
        for row, label in zip(
            scores.thr_log_odds(held_out.logits).tolist(), held_out.labels, strict=True
        )
    ]
    is_forgotten = [
        forgotten_class is not None and int(label) == forgotten_class for label in held_out.labels
    ]
    for (_, size, alpha), row in rows.items():
        values_of, q_hats, own_q_hats, sizes = {}, [], [], []
        for draw in outputs.draws.tolist():
            calibration = [image for image in draw[:size] if not is_forgotten[image]]
            forget_calibration = [image for image in draw[:size] if is_forgotten[image]]
            test = [image for image in draw[45:] if not is_forgotten[image]]
            forget_test = [image for image in draw[45:] if is_forgotten[image]]
            q_hat = plain_q_hat([label_scores[image] for image in calibration], alpha)
            own_q_hat = plain_q_hat([label_scores[image] for image in forget_calibration], alpha)
            q_hats.append(q_hat)
            own_q_hats.append(own_q_hat)
            sizes.append((len(calibration), len(forget_calibration), len(test)))
            judged = {"retain": (outputs.retain, range(len(outputs.retain.labels)), q_hat)}
            every = range(len(outputs.forget.labels))
            judged["test"] = held_out, test, q_hat
            judged["forget"] = (
                outputs.forget,
                every,
                q_hat if forgotten_class is None else own_q_hat,
            )
            if forgotten_class is not None:
                judged["forget_test"] = held_out, forget_test, own_q_hat
                judged["forget_by_retain"] = outputs.forget, every, q_hat
                judged["forget_test_by_retain"] = held_out, forget_test, q_hat
            for name, (output, chosen, threshold) in judged.items():
                for key, value in plain_numbers(
                    output, chosen, threshold, set_sizes, score
                ).items():
                    values_of.setdefault(f"{name}_{key}", []).append(value)
        values_of["q_hat"] = [None if q is None else 1 / (1 + math.exp(-q)) for q in q_hats]
        if forgotten_class is not None:
            values_of["q_hat_forget"] = [
                None if q is None else 1 / (1 + math.exp(-q)) for q in own_q_hats
            ]
        for key, values in values_of.items():
            assert mean(row[key]) == pytest.approx(mean_of(values), nan_ok=True), (key, values)
            known = [value for value in values if value is not None]
            has_spread = not key.endswith("misclassified") and num_draws > 1
            assert isinstance(row[key], Spread) == has_spread
            if has_spread:
                std = math.nan if values[0] is None or len(known) < 2 else np.std(known, ddof=1)
                assert row[key].std == pytest.approx(std, nan_ok=True, abs=1e-12), (key, values)
        facts = {
            "calibration_images": sizes[0][0],
            "draws_left_out": sum(q is None for q in q_hats if q_hats[0]),
        }
        if forgotten_class is not None:
            facts["forget_calibration_images"] = sizes[0][1]
            facts["forget_draws_left_out"] = (
                sum(q is None for q in own_q_hats) if own_q_hats[0] is not None else 0
            )
        assert {key: row[key] for key in facts} == facts
        laws = [
            stats.betabinom(m, k := math.ceil((n + 1) * (1 - Fraction(str(alpha)))), n + 1 - k)
            for (n, _, m), q in zip(sizes, q_hats, strict=True) if q is not None
        ]  # fmt: skip
        means = [law.mean() / m for law, (*_, m) in zip(laws, sizes, strict=False)]
        if q_hats[0] is None:
            assert all(math.isnan(number) for number in row["theory_coverage"])
        elif None not in q_hats:
            variance = np.mean(
                [law.var() / m**2 for law, (*_, m) in zip(laws, sizes, strict=True)]
            ) + np.var(means)
            assert row["theory_coverage"].mean == pytest.approx(np.mean(means), rel=1e-12)
            assert row["theory_coverage"].std == pytest.approx(math.sqrt(variance))
        assert row["coverage_outside"] is False
        assert set(row) == {*values_of, *facts, "theory_coverage", "coverage_outside"}


def test_report_omits_draws_without_a_finite_q_hat():
    """Some draws have too few calibration images of the forgotten class for this alpha."""
    outputs = some_outputs(30, 3, cal_sizes=(20,))
    counts = [len(outputs.forget_calibration(20, draw)) for draw in range(30)]
    alpha = math.ceil(1000 / (counts[0] + 1)) / 1000
    row = report(CR, outputs, metrics.Settings((alpha,)))[1]["thr", 20, alpha]
    fewer = sum(count < counts[0] for count in counts)
    assert 0 < fewer == row["forget_draws_left_out"] < 29 and row["draws_left_out"] == 0
    assert row["forget_calibration_images"] == counts[0]
    assert row["calibration_images"] == 20 - counts[0]
    assert 0 <= row["forget_coverage"].mean <= 1 and 0 < row["q_hat_forget"].mean < 1


def test_theory_with_omitted_draws_is_that_of_the_other_draws():
    outputs = some_outputs(12, 3, cal_sizes=(20,))
    counts = [len(outputs.calibration(20, draw)) for draw in range(12)]
    alpha = math.ceil(1000 / (counts[0] + 1)) / 1000
    row = report(CR, outputs, metrics.Settings((alpha,)))[1]["thr", 20, alpha]
    chosen = [draw for draw in range(12) if counts[draw] >= counts[0]]
    assert row["draws_left_out"] == 12 - len(chosen) > 0
    k = [math.ceil((counts[draw] + 1) * (1 - Fraction(str(alpha)))) for draw in chosen]
    assert row["theory_coverage"].mean == pytest.approx(
        np.mean([a / (counts[d] + 1) for a, d in zip(k, chosen, strict=True)])
    )


@pytest.mark.parametrize("num_draws", [1, 40])
@pytest.mark.parametrize("covered", ["none", "as it should", "all"])
def test_coverage_outside_the_theory_is_flagged_on_both_sides(num_draws, covered):
    """All test scores are above, equal to, or below those of calibration images."""
    outputs = some_outputs(num_draws, counts=(10, 10, 200), cal_sizes=(100,))
    generator, labels = torch.Generator().manual_seed(0), torch.zeros(200, dtype=torch.int64)
    margins = torch.rand(200, generator=generator)
    margins[100:] += {"none": -9, "as it should": 0, "all": 9}[covered]
    outputs.held_out = metrics.Output(
        torch.stack([margins, *3 * [torch.zeros(200)]], dim=1), labels
    )
    if covered != "as it should":
        outputs.draws = torch.arange(200).expand(num_draws, -1)
    row = report(CR, outputs, metrics.Settings((0.3,)))[1]["thr", 100, 0.3]
    assert row["coverage_outside"] is (covered != "as it should")


def test_coverage_bounds_of_one_draw_are_the_central_999_in_1000():
    outputs = some_outputs(1, counts=(10, 10, 60), cal_sizes=(30,))
    law = stats.betabinom(30, 25, 6)  # k = ⌈31 · 0.8⌉ of 30 + 1
    low, high = law.ppf(0.0005), law.ppf(0.9995)
    assert 0 < low < high <= 30
    flags = [
        CR._against_theory(outputs, 30, 0.2, torch.tensor([c / 30], dtype=torch.float64))[
            "coverage_outside"
        ]
        for c in range(31)
    ]
    assert flags == [not low <= count <= high for count in range(31)]


def test_coverage_bounds_of_mean_over_draws_are_four_standard_errors():
    outputs = some_outputs(9, counts=(10, 10, 60), cal_sizes=(30,))
    law = stats.betabinom(30, 25, 6)
    error = law.std() / 30 / 3
    for distance, outside in ((3.9, False), (4.1, True), (-3.9, False), (-4.1, True)):
        coverage = torch.full((9,), 25 / 31 + distance * error, dtype=torch.float64)
        assert CR._against_theory(outputs, 30, 0.2, coverage)["coverage_outside"] is outside


def test_q_hat_below_one_half_means_at_most_one_label():
    assert CR.at_most_one_label(0.49)
    assert not CR.at_most_one_label(0.5)
    assert not CR.at_most_one_label(math.nan)


def test_coverage_law_of_too_few_calibration_images_is_none():
    assert CR.coverage_law(8, 5, 0.1) is None and CR.coverage_law(9, 5, 0.1) is not None


def test_metrics_of_many_thresholds_equal_those_of_each_threshold():
    outputs = some_outputs(1)
    scored = conformal.score_images(outputs.retain, scores.Score(), "retain")
    q_hats = torch.linspace(-3, 3, 2 * CR.THRESHOLDS_PER_CHUNK + 5).double()
    together = CR.describe(scored, q_hats, (1,))
    for number in (0, CR.THRESHOLDS_PER_CHUNK - 1, CR.THRESHOLDS_PER_CHUNK, len(q_hats) - 1):
        for key, values in CR.describe(scored, q_hats[number : number + 1], (1,)).items():
            assert values.tolist() == pytest.approx(
                together[key][number : number + 1].tolist(), nan_ok=True
            ), key


# ---------------------------------------------------------------- q̂ of each image set


def test_judgements_of_random_forgetting_share_one_q_hat():
    outputs = some_outputs(3)
    chosen = metrics.Settings((0.1, 0.2))
    judgements = metrics.ConformalScores(outputs, chosen).judgements(size=20)
    assert set(judgements) == {"forget", "retain", "test"}
    true_label = scores.true_label_log_odds(*outputs.held_out)
    for draw in range(3):
        calibration = true_label[outputs.draws[draw, :20]]
        expected = [CR.conformal_quantile(calibration, alpha) for alpha in (0.1, 0.2)]
        assert all(item.q_hats[draw].tolist() == expected for item in judgements.values())
        assert judgements["test"].images[draw].tolist() == outputs.draws[draw, 45:].tolist()
    assert judgements["forget"].images is None and judgements["retain"].images is None


def test_judgements_of_class_forgetting_have_two_q_hats():
    outputs = some_outputs(3, forgotten_class=3)
    judgements = metrics.ConformalScores(outputs, metrics.Settings((0.3,))).judgements(size=45)
    true_label, labels = scores.true_label_log_odds(*outputs.held_out), outputs.held_out.labels
    own_groups, retained_groups = ["forget", "forget_test"], ["retain", "test"]
    retained_groups += ["forget_by_retain", "forget_test_by_retain"]
    assert set(judgements) == {*own_groups, *retained_groups}
    for draw in range(3):
        first, last = outputs.draws[draw, :45], outputs.draws[draw, 45:]
        for groups, mask in ((own_groups, labels == 3), (retained_groups, labels != 3)):
            calibration = true_label[first[mask[first]]]
            expected = CR.finite_quantile(calibration, 0.3)
            for group in groups:
                actual = judgements[group].q_hats[draw].item()
                assert actual == pytest.approx(expected, rel=0, abs=0, nan_ok=True), group
        for group in ("forget_test", "forget_test_by_retain"):
            assert judgements[group].images[draw].tolist() == last[labels[last] == 3].tolist()
        assert judgements["test"].images[draw].tolist() == last[labels[last] != 3].tolist()


def test_conformal_scores_default_to_first_score_and_largest_size():
    outputs = some_outputs(2, forgotten_class=3)
    first, second = scores.Score("aps", seed=1), scores.Score()
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.3,), (first, second)))
    for forgotten_class in (False, True):
        actual = conformal_scores.q_hats(forgotten_class=forgotten_class)
        expected = conformal_scores.q_hats(first, 45, forgotten_class=forgotten_class)
        assert torch.equal(actual, expected)
    other = [conformal_scores.q_hats(second), conformal_scores.q_hats(size=20)]
    assert not any(torch.equal(conformal_scores.q_hats(), q_hats) for q_hats in other)
    forget_scores = conformal_scores.part("forget")
    expected = first.log_odds(outputs.forget.logits, "forget").sort().values
    assert torch.equal(forget_scores.ranked, expected)
    assert not torch.equal(forget_scores.ranked, conformal_scores.part("forget", second).ranked)


def test_conformal_scores_are_computed_once(monkeypatch):
    calls = []
    plain = scores.Score.log_odds

    def log_odds(self, logits, image_set):
        calls.append((self.name, image_set))
        return plain(self, logits, image_set)

    monkeypatch.setattr(scores.Score, "log_odds", log_odds)
    outputs = some_outputs(2, forgotten_class=3)
    chosen = metrics.Settings((0.1, 0.3), (scores.Score(), scores.Score("aps")))
    conformal_scores = metrics.ConformalScores(outputs, chosen)
    metrics.evaluate(conformal_scores)
    classwise.class_rows(conformal_scores, [*"abcd"])
    samples.sample_rows(conformal_scores, torch.arange(len(outputs.forget.labels)))
    samples.most_fake(conformal_scores, 3)
    image_sets = ("forget", "held_out", "retain")
    assert sorted(calls) == [(name, images) for name in ("aps", "thr") for images in image_sets]


def test_class_q_hats_are_those_of_each_class_alone():
    outputs = some_outputs(2)
    conformal_scores = metrics.ConformalScores(outputs, metrics.Settings((0.05, 0.3)))
    true_label, labels = scores.true_label_log_odds(*outputs.held_out), outputs.held_out.labels
    actual = conformal_scores.class_q_hats()
    assert actual.shape == (4, 2)
    for number in range(4):
        images = [image for image in range(45) if labels[image] == number]
        assert conformal_scores.class_calibration()[number].tolist() == images
        for column, alpha in enumerate((0.05, 0.3)):
            expected = plain_q_hat(true_label[images].tolist(), alpha)
            expected = math.nan if expected is None else expected
            assert actual[number, column].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", ["thr", "aps"])
def test_accuracy_and_coverage_of_images_equal_loops(name):
    outputs = some_outputs(1)
    score = scores.Score(name, seed=3)
    chosen = metrics.Settings((0.2, 0.1), (score, scores.Score("saps")))
    calibration = outputs.held_out.select(torch.arange(30))
    actual = conformal.accuracy_and_coverage(outputs.forget, calibration, chosen)
    labels = calibration.labels.tolist()
    rows = score.log_odds(calibration.logits, "held_out").tolist()
    q_hat = plain_q_hat([row[label] for row, label in zip(rows, labels, strict=True)], 0.2)
    numbers = plain_numbers(outputs.forget, range(40), q_hat, (), score, "forget")
    assert actual.coverage == pytest.approx(numbers["coverage"])
    assert actual.accuracy == pytest.approx(1 - numbers["misclassified"] / 40)
    few = conformal.accuracy_and_coverage(outputs.forget, calibration.select([0, 1, 2]), chosen)
    assert math.isnan(few.coverage) and few.accuracy == actual.accuracy


# ---------------------------------------------------------------- classes, samples


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
    label_scores = [
        row[label]
        for row, label in zip(
            score.log_odds(held_out.logits, "held_out").tolist(), labels, strict=True
        )
    ]
    for row in rows:
        number = "abcd".index(row["class"])
        common = plain_q_hat(
            [label_scores[image] for image in range(45) if labels[image] != forgotten_class],
            row["alpha"],
        )
        calibration = [image for image in range(45) if labels[image] == number]
        mine = plain_q_hat([label_scores[image] for image in calibration], row["alpha"])
        groups = {
            "test": (
                held_out,
                "held_out",
                [image for image in range(45, 90) if labels[image] == number],
            ),
            "forget": (
                outputs.forget,
                "forget",
                (outputs.forget.labels == number).nonzero().flatten().tolist(),
            ),
        }
        expected = {
            "score": name,
            "alpha": row["alpha"],
            "class": row["class"],
            "calibration_images": len(calibration),
        }
        for key, q_hat in (("q_hat", common), ("own_q_hat", mine)):
            expected[key] = math.nan if q_hat is None else 1 / (1 + math.exp(-q_hat))
        for group, (output, drawn, chosen) in groups.items():
            expected[f"{group}_images"] = len(chosen)
            for prefix, q_hat in (("", common), ("own_", mine)):
                numbers = plain_numbers(output, chosen, q_hat, (), score, drawn)
                for key in ("coverage", "set_size"):
                    expected[f"{prefix}{group}_{key}"] = (
                        math.nan if numbers[key] is None else numbers[key]
                    )
        texts = {key: expected.pop(key) for key in ("score", "class")}
        assert {key: row.pop(key) for key in texts} == texts
        assert row == pytest.approx(expected, rel=1e-12, nan_ok=True)


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
    held_out = outputs.held_out
    label_scores = (
        score.log_odds(held_out.logits, "held_out")
        .gather(1, held_out.labels[:, None])
        .flatten()
        .tolist()
    )
    labels = outputs.held_out.labels.tolist()
    q_hats = [
        plain_q_hat(
            [label_scores[image] for image in draw[:20] if labels[image] != forgotten_class], 0.2
        )
        for draw in outputs.draws.tolist()
    ]
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
                "score": 1 / (1 + math.exp(-log_odds[number][label])),
                "set_size@0.01": None,
                "in_set@0.01": None,
                "fake@0.01": None,
                "in_set_share@0.01": None,
                "set_size@0.2": sum(item <= q_hats[0] for item in log_odds[number]),
                "in_set@0.2": int(inside),
                "fake@0.2": int(inside and label != prediction),
                "in_set_share@0.2": sum(log_odds[number][label] <= q_hat for q_hat in q_hats) / 5,
            }
        )
    assert len(rows) == count and "file" not in samples.sample_rows(conformal_scores, indices)[0]


def test_share_of_draws_counts_those_with_a_finite_q_hat():
    outputs = some_outputs(12, 3, cal_sizes=(20,))
    order = sorted(range(12), key=lambda draw: len(outputs.calibration(20, draw)))
    # Some draws have fewer calibration images than the first draw and some have more.
    outputs.draws = outputs.draws[[*order[4:], *order[:4]]]
    counts = [len(outputs.calibration(20, draw)) for draw in range(12)]
    # q̂ is finite with as many calibration images as the first draw has.
    alpha = math.ceil(1000 / (counts[0] + 1)) / 1000
    rows = samples.sample_rows(
        metrics.ConformalScores(outputs, metrics.Settings((alpha,))),
        torch.arange(len(outputs.forget.labels)),
    )
    finite = sum(count >= counts[0] for count in counts)
    more = math.ceil(1000 / (counts[0] + 2)) / 1000  # needs one image more than the split has
    chosen = metrics.Settings((more,))
    assert counts[0] < CR.least_images(more) <= max(counts)
    unknown = samples.sample_rows(
        metrics.ConformalScores(outputs, chosen), torch.arange(len(outputs.forget.labels))
    )
    assert all(row[f"in_set_share@{more:g}"] is None for row in unknown)
    label_scores = scores.true_label_log_odds(*outputs.held_out)
    q_hats = [
        label_scores[outputs.calibration(20, d)].max() for d in range(12) if counts[d] >= counts[0]
    ]
    forget = scores.true_label_log_odds(*outputs.forget)
    assert finite < 12
    for row, score in zip(rows, forget, strict=True):
        assert row[f"in_set_share@{alpha:g}"] == pytest.approx(
            sum(bool(score <= q) for q in q_hats) / finite
        )


@pytest.mark.parametrize(("forgotten_class", "kind"), [(None, "thr"), (3, "thr"), (None, "aps")])
def test_most_fake_images_are_in_the_order_of_their_scores(forgotten_class, kind):
    outputs = some_outputs(2, forgotten_class, cal_sizes=(10, 20))
    if forgotten_class is None:  # one label's score is q̂ itself
        outputs.forget = outputs.held_out.select(torch.arange(40))
    score = scores.Score(kind, seed=5)
    chosen = metrics.Settings((0.2, 0.04), (score,))
    label_scores = score.log_odds(outputs.held_out.logits, "held_out")
    label_scores = label_scores.gather(1, outputs.held_out.labels[:, None]).flatten().tolist()
    labels = outputs.held_out.labels.tolist()
    q_hat = plain_q_hat(
        [label_scores[image] for image in range(20) if labels[image] != forgotten_class], 0.2
    )
    log_odds = score.log_odds(outputs.forget.logits, "forget").tolist()
    expected = []
    for place, (row, label) in enumerate(
        zip(log_odds, outputs.forget.labels.tolist(), strict=True)
    ):
        order = sorted(range(4), key=row.__getitem__)
        if order[0] != label and row[label] <= q_hat:
            inside = [item for item in order if row[item] <= q_hat]
            expected.append((row[label], (place, order[0], inside)))
    expected = [entry for _, entry in sorted(expected)]
    assert expected
    conformal_scores = metrics.ConformalScores(outputs, chosen)
    assert samples.most_fake(conformal_scores, 100) == expected
    assert samples.most_fake(conformal_scores, 2) == expected[:2]
    too_few = metrics.ConformalScores(outputs, metrics.Settings((0.01,)))
    assert samples.most_fake(too_few, 3) is None


def test_tied_labels_of_a_most_fake_image_are_listed_by_number():
    same = metrics.Output(torch.zeros(30, 100), torch.full((30,), 7))
    outputs = metrics.Outputs(same.select([0]), same, same, [20], metrics.draw_splits(30, 1))
    assert samples.most_fake(metrics.ConformalScores(outputs, metrics.Settings((0.2,))), 1) == [
        (0, 0, list(range(100)))
    ]


# ---------------------------------------------------------------- outputs


def test_draws_are_the_split_then_random_orders():
    draws = metrics.draw_splits(50, 4, seed=7)
    assert draws.shape == (4, 50) and draws.dtype == torch.int64
    assert draws[0].tolist() == list(range(50))
    assert all(sorted(draw.tolist()) == list(range(50)) for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws, metrics.draw_splits(50, 4, seed=7))
    assert torch.equal(draws[:2], metrics.draw_splits(50, 2, 7))
    assert not torch.equal(draws, metrics.draw_splits(50, 4, seed=8))
    assert metrics.draw_splits(50, 1).shape == (1, 50)
    assert torch.equal(metrics.draw_splits(50, 3), metrics.draw_splits(50, 3, seed=0))


def test_image_sets_of_a_draw_are_disjoint_and_divided_by_class():
    outputs = some_outputs(3, 3)
    for draw in range(3):
        order, rare = outputs.draws[draw].tolist(), (outputs.held_out.labels == 3).tolist()
        assert outputs.calibration(20, draw).tolist() == [
            image for image in order[:20] if not rare[image]
        ]
        assert outputs.forget_calibration(20, draw).tolist() == [
            image for image in order[:20] if rare[image]
        ]
        assert outputs.test(draw).tolist() == [image for image in order[45:] if not rare[image]]
        assert outputs.forget_test(draw).tolist() == [image for image in order[45:] if rare[image]]
    assert torch.equal(outputs.calibration(20), outputs.calibration(20, 0))
    assert outputs.num_draws == 3
    assert torch.equal(outputs.test(), outputs.test(0))
    assert torch.equal(outputs.forget_test(), outputs.forget_test(0))
    assert torch.equal(outputs.forget_calibration(20), outputs.forget_calibration(20, 0))


def test_evaluate_joins_the_numbers_of_all_modules(monkeypatch):
    class First:
        @staticmethod
        def report(outputs, conformal_scores, settings):
            return {"one": 1}, {("thr", 20, 0.1): {"a": 1}, ("thr", 45, 0.1): {"a": 2}}

    class Second:
        ROW_COLUMNS = {"b": metrics.Column("B", "number")}

        @staticmethod
        def report(outputs, conformal_scores, settings):
            return {"two": 2}, {("thr", 20, 0.1): {"b": 3}}

    monkeypatch.setattr(metrics, "MODULES", (First, Second))
    scalars, rows = evaluate(some_outputs(1), metrics.Settings((0.1,)))
    assert scalars == {"one": 1, "two": 2}
    assert rows == {("thr", 20, 0.1): {"a": 1, "b": 3}, ("thr", 45, 0.1): {"a": 2}}
    assert metrics.columns_of("ROW_COLUMNS") == Second.ROW_COLUMNS | comparison.ROW_COLUMNS
    assert metrics.columns_of("COLUMNS") == comparison.COLUMNS | probe.COLUMNS


# ---------------------------------------------------------------- comparison


def test_gap_is_the_mean_over_numbers_that_both_models_have():
    reference = {"UA": 0.5, "RA": 0.9, "TA": 0.8, "MIA": 0.4}
    actual = {"UA": 0.1, "RA": 1.0, "TA": 0.7, "MIA": math.nan, "AUC": 0.0}
    assert comparison.gap(actual, reference) == pytest.approx((0.4 + 0.1 + 0.1) / 3)
    assert comparison.gap(actual | {"MIA": 0.6}, reference) == pytest.approx(0.8 / 4)
    assert comparison.gap({"UA": 0.1}, {"UA": None, "RA": 1}) != comparison.gap(
        {"UA": 0.1}, {"UA": 0.1}
    )
    assert math.isnan(comparison.gap({}, reference)) and comparison.gap(reference, reference) == 0


def test_differences_are_between_finite_numbers_that_both_models_have():
    actual = {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": "x",
        "e": math.nan,
        "f": math.inf,
        "g": 2,
        "h": None,
        "i": 3,
        "j": 1,
    }
    other = {
        "a": 3,
        "b": 0.25,
        "c": False,
        "d": "y",
        "e": 1,
        "f": 1,
        "h": 1,
        "i": math.nan,
        "j": True,
    }
    assert comparison.differences(actual, other) == {"a_minus_retrain": -2, "b_minus_retrain": 0.25}


def test_verdict_of_difference_within_tolerance_is_matches():
    assert comparison.verdict(0.1, 0.1) == comparison.verdict(-0.1, 0.1) == "matches"
    assert comparison.verdict(0.11, 0.1) == "over-forgets"
    assert comparison.verdict(-0.11, 0.1) == "under-forgets"
    assert comparison.verdict(math.nan, 0.1) is None and comparison.verdict(0.1, math.nan) is None
    assert comparison.at_least_one_image(0, 80) == 1 / 80
    assert comparison.at_least_one_image(0.5, 80) == 0.5
    assert comparison.share_tolerance(0.25, 0.25, 300) == pytest.approx(
        2 * math.sqrt(2 * 0.25 * 0.75 / 300)
    )
    assert comparison.share_tolerance(1, 1, 10) == 0.1


@pytest.mark.parametrize("n", [80, 500])
@pytest.mark.parametrize("wrong", [0, 1, 40])
def test_verdict_on_one_seed_is_the_two_proportion_test(n, wrong):
    for other in range(n + 1):
        tolerance = comparison.share_tolerance(other / n, wrong / n, n)
        assert tolerance == comparison.share_tolerance(wrong / n, other / n, n)
        table = [[wrong, n - wrong], [other, n - other]]
        statistic = 0  # z², of which 4 is two standard errors
        if 0 < wrong + other < 2 * n:
            statistic = stats.chi2_contingency(table, correction=False).statistic
        if abs(other - wrong) > 1:
            is_match = abs(other - wrong) / n <= tolerance
            assert is_match == (statistic <= 4) or statistic == pytest.approx(4)


def test_sets_of_one_and_several_thresholds_by_hand():
    sets, labels = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool(), torch.tensor([1, 0, 1])
    inside, sizes = CR.in_set(sets, labels), sets.sum(dim=1)
    assert inside.tolist() == [True, False, False]
    assert CR.prediction_sets(torch.tensor([0.1, 0.2]), 0.2).all()
    assert CR.fake_forgetting(inside, torch.tensor([True, True, False])) == 1
    assert CR.fake_forgetting(
        torch.stack([inside, ~inside]), torch.tensor([True, True, False])
    ).tolist() == [1, 1]
    assert CR.conformal_ratio(inside, sizes).item() == pytest.approx(1 / 4)
    nothing = torch.zeros(3).long()
    assert (
        CR.conformal_ratio(nothing.bool(), nothing) == CR.ratio_error(nothing.bool(), nothing) == 0
    )
    assert CR.judged_forget_images({"forget_by_retain_CR": math.nan}) == "forget_by_retain"
    assert CR.judged_forget_images({"forget_CR": 1, "retain_CR": 1}) == "forget"


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_of_zero_or_one_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        CR.quantile_rank(5, alpha)


def test_plain_number_thresholds_keep_their_digits():
    outputs = some_outputs(1)
    scored = conformal.score_images(outputs.forget, scores.Score(), "forget")
    q_hats = scored.true_label.sort().values.tolist()
    assert CR.describe(scored, q_hats)["coverage"].tolist() == [
        number / 40 for number in range(1, 41)
    ]
