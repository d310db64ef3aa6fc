"""Is a forgotten class still there in the features? A linear probe on the layer before the classifier."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

COLUMNS = {"probe_forget": ("probe_f %", "percent"), "probe_retain": ("probe_r %", "percent")}
MOST = 5000  # training images that the probe is fitted to
MOST_ITERATIONS = 300
SEED = 0


def linear_probe(features, labels, tests, seed=SEED):
    """Accuracies of a logistic regression on frozen features (Alain & Bengio 2017, 1610.01644), for each of ``tests``.

    Features N×F and labels N (numpy) of training images, the forgotten ones among them, of which 5,000 at most are
    taken; ``tests`` is {key: (features, labels)}. A classifier that answers another class may still hold all that it
    takes to recognise the forgotten one: then the probe finds it.
    """
    chosen = np.random.default_rng(seed).permutation(len(labels))[:MOST]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
    probe.fit(features[chosen], labels[chosen])
    return {key: float(probe.score(*test)) for key, test in tests.items() if len(test[1])}
