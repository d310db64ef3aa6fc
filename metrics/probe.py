"""Does a forgotten class survive in the features? A linear probe on the input of the last layer."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .columns import Column

COLUMNS = {
    "probe_forget": Column(
        "probe_f",
        "percent",
        "near Retrain",
        "accuracy of a linear probe of the features on the forgotten class's test images",
    ),
    "probe_retain": Column(
        "probe_r",
        "percent",
        "high",
        "accuracy of the same probe on the test images of the retained classes",
    ),
}
MOST_IMAGES = 5000  # training images that the probe is fitted to
MOST_ITERATIONS = 300
SEED = 0


def linear_probe(features, labels, tests, seed=SEED):
    """Accuracies of a logistic regression on frozen features (Alain & Bengio 2017, 1610.01644), one
    per test.

    Features N×F and labels N (numpy) are those of training images, the forget images included. At
    most 5,000 of them are used, drawn by the seed. ``tests`` is {key: (features, labels)}. Returns
    {key: accuracy}, without the tests that have no images. A model that answers another class may
    still hold all that it takes to recognise the forgotten class. The probe then finds it.
    """
    chosen = np.random.default_rng(seed).permutation(len(labels))[:MOST_IMAGES]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
    probe.fit(features[chosen], labels[chosen])
    return {key: float(probe.score(*test)) for key, test in tests.items() if len(test[1])}
