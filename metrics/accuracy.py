"""The accuracies that every unlearning paper reports: UA, RA, TA."""

from .columns import Column

COLUMNS = {
    "UA": Column(
        "UA", "percent", "near Retrain", "unlearning accuracy: misclassified share of forget images"
    ),
    "RA": Column(
        "RA", "percent", "high", "retain accuracy: correctly classified share of retain images"
    ),
    "TA": Column(
        "TA", "percent", "high", "test accuracy: correctly classified share of test images"
    ),
    "UA_test": Column(
        "UA_test", "percent", "near Retrain", "the same of the forgotten class's test images"
    ),
}


def accuracy(logits, labels):
    """Share of the images whose argmax is the label. Logits N×K, labels N → float in [0, 1]."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def unlearning_accuracy(logits, labels):
    """UA = 1 − accuracy on the forget set. Logits N×K, labels N → float in [0, 1]."""
    return 1 - accuracy(logits, labels)


def report(outputs, conformal_scores, settings):
    """UA, RA, TA and, if a forgotten class has test images, UA_test. Returns ``(scalars, {})``."""
    scalars = {
        "UA": unlearning_accuracy(*outputs.forget),
        "RA": accuracy(*outputs.retain),
        "TA": accuracy(*outputs.held_out.select(outputs.test())),
    }
    if outputs.forgotten is not None and len(outputs.forget_test()):
        forget_test = outputs.held_out.select(outputs.forget_test())
        scalars["UA_test"] = unlearning_accuracy(*forget_test)
    return scalars, {}
