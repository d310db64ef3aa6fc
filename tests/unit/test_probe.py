"""The linear probe of a forgotten class."""

import numpy as np
import pytest

from metrics import probe


def test_linear_probe_on_separable_features_detects_the_class():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = rng.standard_normal((600, 5)) + 8 * np.eye(5)[labels]
    mixed = np.where((labels == 2)[:, None], rng.standard_normal((600, 5)), features)
    mixed[labels == 1] -= 8 * np.eye(5)[1]  # classes 1 and 2 are now identical
    masks = {"probe_forget": labels > 0, "probe_retain": labels == 0}
    # Between two identical classes, chance is one half.
    for seen, expected in ((features, 1.0), (mixed, 0.5)):
        tests = {key: (seen[mask], labels[mask]) for key, mask in masks.items()}
        actual = probe.linear_probe(seen, labels, tests)
        assert actual["probe_forget"] == pytest.approx(expected, abs=0.1)
        assert actual["probe_retain"] > 0.95
