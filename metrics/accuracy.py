"""The scores that every unlearning paper reports: UA, RA, TA."""

COLUMNS = {
    "UA": ("UA %", "percent"),
    "RA": ("RA %", "percent"),
    "TA": ("TA %", "percent"),
    "UA_test": ("UA_test %", "percent"),
}


def accuracy(logits, labels):
    """Share of the images whose argmax is the label. Logits N×K, labels N → float in [0, 1]."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def unlearning_accuracy(logits, labels):
    """UA = 1 − accuracy on the forget set. Logits N×K, labels N → float in [0, 1]."""
    return 1 - accuracy(logits, labels)


def report(outputs, settings):
    """UA on the forget set, RA on the retain set, TA on the split's own test images. Returns ``(scalars, {})``."""
    scalars = {
        "UA": unlearning_accuracy(*outputs.forget),
        "RA": accuracy(*outputs.retain),
        "TA": accuracy(*outputs.held_out.of(outputs.test())),
    }
    if outputs.forgotten is not None and len(outputs.forget_test()):
        scalars["UA_test"] = unlearning_accuracy(*outputs.held_out.of(outputs.forget_test()))
    return scalars, {}
