"""Notes that an evaluation prints below its tables: what the numbers cannot say, and what helps.

``rows`` are those of results.csv, ``class_rows`` those of classes.csv (dicts).
"""

import math

from .. import CR, comparison
from .tables import is_missing, mean_of

REMEDY = "choose a larger --alphas or more --cal_sizes"


def missing_q_hats(rows, class_rows=()):
    """Lines on the q̂ that are not finite, one per kind: which α, how many images are needed."""
    needs, left_out = {}, {}
    for row in rows:
        if "q_hat" in row:
            _collect(row, needs, left_out)
    lines = [
        f"no finite q̂ for {name} (shown as –): {_needed(where)}; {REMEDY}"
        for name, where in needs.items()
    ]
    for name, where in left_out.items():
        counts = ", ".join(f"{count} at alpha {alpha:g}" for alpha, count in sorted(where.items()))
        lines.append(f"resplits without a finite q̂ for {name}, left out of the means: {counts}")
    return lines + _missing_class_q_hats(class_rows)


def _collect(row, needs, left_out):
    """Add one row to ``needs`` {name: {(calibration size, images): alphas}} and ``left_out``."""
    calibrated = {"all classes": ""}
    if "q_hat_forget" in row:
        noun = "classes" if ", " in row["forget_class"] else "class"
        calibrated = {"all retained classes": "", f"{noun} {row['forget_class']}": "forget"}
    for name, group in calibrated.items():
        q_hat = row[f"q_hat_{group}" if group else "q_hat"]
        prefix = f"{group}_" if group else ""
        if math.isnan(mean_of(q_hat)):
            _add(needs, name, row, row[f"{prefix}calibration_images"])
        elif row[f"{prefix}draws_left_out"]:
            left_out.setdefault(name, {})[row["alpha"]] = row[f"{prefix}draws_left_out"]
    if row["MIACR_calibration_images"] < CR.least_images(row["alpha"]):
        name = "members and non-members (MIACR)"
        _add(needs, name, row, row["MIACR_calibration_images"])


def _add(needs, name, row, images):
    where = needs.setdefault(name, {})
    where.setdefault((row["cal_size"], images), set()).add(row["alpha"])


def _needed(where):
    """What each α needs and what there is, from {(calibration size, images): alphas}."""
    parts = []
    for (size, images), alphas in where.items():
        needed = ", ".join(
            f"alpha {alpha:g} needs {CR.least_images(alpha)}" for alpha in sorted(alphas)
        )
        noun = "image" if images == 1 else "images"
        parts.append(f"{needed}, and --cal_sizes {size} gives {images} calibration {noun}")
    return "; ".join(parts)


def _missing_class_q_hats(class_rows):
    """A line on the classes whose own calibration images are too few."""
    images_of = {}
    for row in class_rows:
        if math.isnan(row["own_q_hat"]):
            counts = images_of.setdefault(row["alpha"], {})
            counts[row["class"]] = max(row["calibration_images"], counts.get(row["class"], 0))
    parts = []
    for alpha, counts in sorted(images_of.items()):
        noun = "class" if len(counts) == 1 else "classes"
        needed, most = CR.least_images(alpha), max(counts.values())
        parts.append(
            f"{len(counts)} {noun} at alpha {alpha:g} "
            f"({needed} calibration images needed, at most {most} available)"
        )
    if not parts:
        return []
    return [f"no finite class-conditional q̂ (classes.csv): {'; '.join(parts)}; {REMEDY}"]


def advice(tables):
    """Lines on numbers that say little: an α above the error rate, or coverage off its level.

    ``tables`` holds the rows of each seed.
    """
    rows = [row for table in tables for row in table if "q_hat" in row]
    return [*_alpha_above_error_rate(rows, len(tables)), *_coverage_outside(rows)]


def _alpha_above_error_rate(rows, num_seeds):
    """A line on the α at which no set of ``thr`` can hold two labels."""
    methods = {row["method"] for row in rows}
    flat = {}
    for row in rows:
        if row["score"] == "thr" and CR.at_most_one_label(mean_of(row["q_hat"])):
            flat.setdefault(row["alpha"], {})[row["method"]] = None
    if not flat:
        return []
    where = "; ".join(
        f"{alpha:g} for {'all' if len(names) == len(methods) else ', '.join(names)}"
        for alpha, names in flat.items()
    )
    seeds = ", in at least one seed" if num_seeds > 1 else ""
    return [
        f"alpha above the error rate ({where}{seeds}): q̂ < 0.5, so sets hold at most one label "
        "and CR approaches 1 on forget and test images alike; read the numbers of a smaller alpha"
    ]


def _coverage_outside(rows):
    """A line on test coverage that exchangeable images cannot give."""
    outside = {}
    for row in rows:
        if row["coverage_outside"]:
            measured, expected = mean_of(row["test_coverage"]), mean_of(row["theory_coverage"])
            where = f"{row['method']} at {row['alpha']:g}"
            outside.setdefault(f"{where} ({row['score']}: {measured:.3f}, {expected:.3f})")
    if not outside:
        return []
    return [
        "test coverage outside the range for exchangeable images (measured, expected): "
        f"{'; '.join(outside)}; the usual cause are tied scores, e.g. of a model that gives all "
        "images the same output"
    ]


def unchanged(rows):
    """A line on the methods that change no prediction of the original model in any seed."""
    changed = {}
    for row in rows:
        if not is_missing(row.get("changed")):
            changed[row["method"]] = max(changed.get(row["method"], 0), mean_of(row["changed"]))
    methods = [method for method, share in changed.items() if not share]
    if not methods:
        return []
    return [
        f"no prediction of the original model changed: {', '.join(methods)}; "
        "the method has no visible effect on these images at its settings"
    ]


def wrong_verdicts(rows):
    """A line on the verdicts that call one Retrain different from another.

    ``rows`` compare the Retrain of a seed with that of another seed.
    """
    wrong = {}  # {verdict: hashes of the models that got it}
    for row in rows:
        for key, name in (("UA_word", "by UA"), ("CR_word", f"by CR at alpha {row['alpha']:g}")):
            if row.get(key) not in (None, comparison.MATCHES):
                wrong.setdefault(name, set()).add(row["weights"])
    if not wrong:
        return []
    pairs = len({row["weights"] for row in rows})
    found = ", ".join(f"{len(models)} {name}" for name, models in wrong.items())
    return [
        f"{comparison.SECOND_RETRAIN}: of {pairs} comparisons of one retrained model with another, "
        f"these do not match: {found}; a verdict on a single seed can be wrong"
    ]
