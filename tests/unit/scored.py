"""Random outputs of a model, and its numbers computed image by image, for tests of metrics."""

import math
from fractions import Fraction

import numpy as np
import torch
from sklearn.svm import SVC

import metrics


def report(module, outputs, settings):
    """The report of a metric's module: (scalars, rows)."""
    return module.report(outputs, metrics.ConformalScores(outputs, settings), settings)


def column(values):
    return np.asarray(values, dtype=np.float64)[:, None]


def plain_svm(members, non_members):
    """Scikit-learn's SVM on all images. Features N×d."""
    membership = np.repeat([1, 0], [len(members), len(non_members)])
    machine = SVC(C=3, gamma=1 / members.shape[1], tol=1e-5)
    return machine.fit(np.concatenate([members, non_members]), membership)


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def output(n, generator, margin=0.0):
    labels = torch.randint(4, (n,), generator=generator)
    logits = 2 * torch.randn(n, 4, generator=generator)
    logits[torch.arange(n), labels] += margin
    return metrics.Output(logits, labels)


def make_outputs(
    retain=160, held_out=150, forget=40, cal_sizes=(20, 50), num_draws=1, forgotten=False
):
    generator = torch.Generator().manual_seed(0)
    sizes_and_margins = ((forget, 1.5), (retain, 3.0), (held_out, 1.0))
    images = [output(n, generator, margin) for n, margin in sizes_and_margins]
    of_class = images[2].labels == 2 if forgotten else None
    draws = metrics.draw_splits(held_out, num_draws, seed=3)
    return metrics.Outputs(*images, list(cal_sizes), draws, of_class)


def some_outputs(num_draws, forgotten_class=None, counts=(40, 50, 90), cal_sizes=(20, 45), seed=0):
    """Random outputs for 4 classes. Class 3 is rare: a ninth of the images."""
    rng = np.random.default_rng(seed)

    def output(n, keep=lambda labels: labels >= 0):
        labels = rng.choice(4, n, p=[0.3, 0.3, 0.3, 0.1])
        logits = rng.standard_normal((n, 4)) + 1.5 * np.eye(4)[labels]
        every = metrics.Output(torch.from_numpy(logits), torch.from_numpy(labels))
        return every.select(keep(every.labels))

    held_out = output(counts[2])
    draws = metrics.draw_splits(counts[2], num_draws, seed)
    sizes = list(cal_sizes)
    if forgotten_class is None:
        return metrics.Outputs(output(counts[0]), output(counts[1]), held_out, sizes, draws)
    forget = output(6 * counts[0], lambda labels: labels == forgotten_class)
    retain = output(counts[1], lambda labels: labels != forgotten_class)
    forgotten = held_out.labels == forgotten_class
    return metrics.Outputs(forget, retain, held_out, sizes, draws, forgotten)


def plain_log_odds(output, score, part):
    """The log-odds of each image's true label, as a list."""
    rows = score.log_odds(output.logits, part).tolist()
    return [row[label] for row, label in zip(rows, output.labels.tolist(), strict=True)]


def plain_score(q_hat):
    """The score S of log-odds; NaN for None."""
    return math.nan if q_hat is None else 1 / (1 + math.exp(-q_hat))


def plain_q_hat(values, alpha):
    k = math.ceil((len(values) + 1) * (1 - Fraction(str(alpha))))
    return sorted(values)[k - 1] if k <= len(values) else None


def plain_numbers(output, chosen, q_hat, score, drawn=""):
    """Every number of :func:`CR.set_metrics`, image by image. None without a q̂ or an image."""
    log_odds = score.log_odds(output.logits, drawn).tolist()
    labels, predictions = output.labels.tolist(), output.logits.argmax(dim=1).tolist()
    wrong = [labels[image] != predictions[image] for image in chosen]
    inside, sizes = [], []
    if q_hat is not None:
        inside = [log_odds[image][labels[image]] <= q_hat for image in chosen]
        sizes = [sum(value <= q_hat for value in log_odds[image]) for image in chosen]

    def mean(values):
        return sum(values) / len(values) if values else None

    def ratio(inside, sizes):
        return (sum(inside) / sum(sizes) if sum(sizes) else 0.0) if sizes else None

    wrong_in_set = [item for item, is_wrong in zip(inside, wrong, strict=False) if is_wrong]
    wrong_sizes = [size for size, is_wrong in zip(sizes, wrong, strict=False) if is_wrong]
    numbers = {"misclassified": sum(wrong), "coverage": mean(inside), "set_size": mean(sizes)}
    numbers["CR"] = ratio(inside, sizes)
    numbers["empty"] = mean([size == 0 for size in sizes])
    numbers["fake"] = None if q_hat is None else sum(wrong_in_set)
    numbers |= {"fake_ratio": mean(wrong_in_set), "wrong_set_size": mean(wrong_sizes)}
    numbers["wrong_CR"] = ratio(wrong_in_set, wrong_sizes)
    return numbers
