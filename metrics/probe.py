"""A linear probe on the input of the last layer: is a forgotten class still separable there?"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .columns import Column

COLUMNS = {
    "probe_forget": Column(
        "probe_f", "percent", "near Retrain", "linear probe: accuracy on the forgotten class"
    ),
    "probe_retain": Column(
        "probe_r", "percent", "high", "accuracy of the same probe on the retained classes"
    ),
}
MOST_IMAGES = 5000  # training images of the probe
MOST_ITERATIONS = 300
SEED = 0


def linear_probe(features, labels, tests, seed=SEED):
    """Test accuracies of a logistic regression on features (Alain & Bengio 2017, 1610.01644).

    Features N×F and labels N (numpy) are those of training images, including forget images. At most
    5,000 of them, drawn by the seed, train the probe. ``tests`` is {key: (features, labels)}.
    Returns {key: accuracy} of the tests with images. A model can mispredict a forgotten class while
    its features still separate it; the probe detects this.
    """
    chosen = np.random.default_rng(seed).permutation(len(labels))[:MOST_IMAGES]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
    probe.fit(features[chosen], labels[chosen])
    return {key: float(probe.score(*test)) for key, test in tests.items() if len(test[1])}
