"""The columns of the metrics and the tables of metrics/README.md describe every number once."""

import re
from pathlib import Path

import pytest
import torch

import metrics

README = Path(metrics.__file__).with_name("README.md")
KINDS = ("percent", "number", "count", "seconds", "text")
DICTIONARIES = ("COLUMNS", "ROW_COLUMNS", "CSV_COLUMNS")
PLACEHOLDERS = {
    "<group>": "(forget|retain|test|forget_test|forget_by_retain|forget_test_by_retain)",
    "<feature>": "(correctness|entropy|modified_entropy|probabilities)",
}


def described(key, keys):
    """Whether a key, or a pattern with placeholders that fits it, is among ``keys``."""
    patterns = []
    for pattern in keys:
        for placeholder, choices in PLACEHOLDERS.items():
            pattern = pattern.replace(placeholder, choices)
        patterns.append(pattern)
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def outputs_of_class_forgetting():
    generator = torch.Generator().manual_seed(0)

    def output(count):
        labels = torch.arange(count) % 4
        return metrics.Output(torch.randn(count, 4, generator=generator), labels)

    held_out, retain = output(120), output(80)
    forget = retain.select(retain.labels == 1)
    retain = retain.select(retain.labels != 1)
    draws = metrics.draw_splits(120, 3)
    return metrics.Outputs(forget, retain, held_out, [40], draws, held_out.labels == 1)


def test_readme_contains_the_tables_of_all_columns():
    text = README.read_text(encoding="utf-8")
    assert text.partition("<!-- columns -->\n")[2] == metrics.readme_tables() + "\n"


def test_every_number_of_an_evaluation_is_described():
    settings = metrics.Settings((0.2,))
    outputs = outputs_of_class_forgetting()
    scalars, rows = metrics.evaluate(metrics.ConformalScores(outputs, settings))
    keys = [key for kind in DICTIONARIES for key in metrics.columns_of(kind)]
    numbers = [*scalars, *rows["thr", 40, 0.2]]
    assert len(numbers) > 60
    assert [key for key in numbers if not described(key, keys)] == []


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_columns_have_a_kind_a_heading_and_a_meaning(kind):
    for key, column in metrics.columns_of(kind).items():
        assert column.kind in KINDS, key
        assert column.meaning and "|" not in column.meaning, key
        assert bool(column.heading) == (kind != "CSV_COLUMNS"), key
        assert "%" not in column.heading or key.startswith("TPR"), key  # the kind says percent
