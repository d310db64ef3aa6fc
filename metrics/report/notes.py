"""Notes that an evaluation prints below its tables: which numbers are uninformative, and remedies.

``rows`` are those of results.csv, ``class_rows`` those of classes.csv (dicts).
"""

from .. import CR
from ..columns import Interval, Spread
from .tables import is_missing, mean_of, one_per_method


def missing_q_hats(rows, class_rows=()):
    """A line for each group of calibration images that gives no finite q̂ at some α.

    A line names the α, how many images each needs, and the largest number available in a split.
    """
    needs = {}  # {calibrated group: {α: number of calibration images}}

    def collect(group, alpha, images):
        alphas = needs.setdefault(group, {})
        alphas[alpha] = max(images, alphas.get(alpha, 0))

    for row in (row for row in rows if "q_hat" in row):
        groups = {"all classes": ""}
        if "q_hat_forget" in row:
            groups = {"all retained classes": "", f"class {row['forget_class']}": "forget_"}
        for group, prefix in groups.items():
            images = row[f"{prefix}calibration_images"]
            if is_missing(mean_of(row["q_hat_forget" if prefix else "q_hat"])):
                collect(group, row["alpha"], images)
            elif row[f"{prefix}draws_left_out"]:
                collect(f"{group} in some resplits, left out of the means", row["alpha"], images)
        if row["MIACR_calibration_images"] < CR.least_images(row["alpha"]):
            collect("MIACR", row["alpha"], row["MIACR_calibration_images"])
    for row in class_rows:
        if is_missing(row["own_q_hat"]):
            collect("single classes (classes.csv)", row["alpha"], row["calibration_images"])
    return [_too_few(group, alphas) for group, alphas in needs.items()]


def _too_few(group, alphas):
    needed = ", ".join(
        f"alpha {alpha:g} needs {CR.least_images(alpha)} calibration images ({images} available)"
        for alpha, images in sorted(alphas.items())
    )
    return f"no finite q̂ for {group}: {needed}; choose a larger --alphas or more --cal_sizes"


def advice(tables):
    """A line on the α above the error rate, at which no set of ``thr`` can contain two labels.

    ``tables`` contains the rows of each seed.
    """
    rows = [row for table in tables for row in table if "q_hat" in row]
    methods = {}  # {α: methods}
    for row in rows:
        if row["score"] == "thr" and CR.at_most_one_label(mean_of(row["q_hat"])):
            methods.setdefault(row["alpha"], {})[row["method"]] = None
    if not methods:
        return []
    everyone = {row["method"] for row in rows}
    where = "; ".join(
        f"{alpha:g} for {'all' if names.keys() == everyone else ', '.join(names)}"
        for alpha, names in methods.items()
    )
    return [
        f"alpha above the error rate ({where}): q̂ < 0.5, so the sets contain at most one label "
        "and CR is close to 1 on forget and test images; use a smaller --alphas"
    ]


def intervals(rows):
    """Lines on the intervals of differences: how many words are chance, and what they cover."""
    rows = [row for row in rows if row["method"] != "retrain"]
    compared = [row.get("UA_minus_retrain") for row in one_per_method(rows)]
    compared += [row.get(f"{CR.forget_group(row)}_CR_minus_retrain") for row in rows]
    count = sum(isinstance(item, Interval) and not is_missing(item.low) for item in compared)
    if not count:
        return []
    chance = f"about {0.05 * count:.1f} would get a word by chance if all methods equaled Retrain"
    lines = [f"{count} comparisons with Retrain by UA or CR: {chance}"]
    if not any(isinstance(row.get("UA"), Spread) for row in rows):
        reason = "not the variation over trainings; use --seeds"
        lines.append(f"intervals cover the sampling of images only, {reason}")
    return lines


def unchanged(rows):
    """A line on the methods that change no prediction of the original model in any seed."""
    changed = {}
    for row in rows:
        if not is_missing(mean_of(row.get("changed"))):
            changed.setdefault(row["method"], []).append(mean_of(row["changed"]))
    methods = ", ".join(method for method, shares in changed.items() if not any(shares))
    if not methods:
        return []
    remedy = "try another --learning_rate, or --until_forgotten"
    return [f"no prediction of the original model changed: {methods}; {remedy}"]


def destroyed(rows):
    """A line on the methods with less than half of the original's retain accuracy in some seed."""
    accuracies = {}
    for row in rows:
        if not is_missing(mean_of(row.get("RA"))):
            accuracies.setdefault(row["method"], []).append(mean_of(row["RA"]))
    least = max(accuracies.pop("original", [0])) / 2
    methods = ", ".join(method for method, values in accuracies.items() if min(values) < least)
    remedy = "try another --learning_rate, or --until_forgotten"
    return [f"retain accuracy below half of the original's: {methods}; {remedy}"] if methods else []


def empty_sets(rows):
    """A line on the α at which some sets are empty, with the largest share of any model."""
    keys = ("forget_empty", "forget_by_retain_empty", "test_empty")
    shares = [(mean_of(row[key]), row["alpha"]) for row in rows for key in keys if key in row]
    largest = {alpha: share for share, alpha in sorted(pair for pair in shares if pair[0] > 0)}
    listed = ", ".join(f"{100 * share:.1f} % at alpha {a:g}" for a, share in largest.items())
    note = f"CR counts an empty set as size 0; largest shares of empty sets: {listed}"
    return [note] if largest else []
