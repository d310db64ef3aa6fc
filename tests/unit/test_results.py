"""The measured results: tables in .results that parse, and pages whose links exist."""

import csv
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".results"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.csv")), ids=lambda path: path.name)
def test_csv_rows_have_a_method_seeds_and_as_many_cells_as_the_header(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert None not in row and None not in row.values(), row
        assert row["method"] and row["seeds"], row


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.name)
def test_markdown_links_to_existing_files_only(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (FOLDER / link).exists()] == []


def test_results_table_of_the_readme_has_the_numbers_of_its_csv():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\w+) \| (\d.*) \|$", text.split("## Results")[1], re.MULTILINE)
    with (FOLDER / "cifar10_5000_control.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["alpha"] == "0.05"}

    def cell(row, key, digits=1):
        scale = 100 if digits == 1 else 1
        pair = (f"{scale * float(row[name]):.{digits}f}" for name in (key, f"{key}_std"))
        return "±".join(pair)

    assert len(shown) == 5
    for method, cells in shown:
        row = rows[method]
        counts = (float(row[f"forget_{key}"]) for key in ("fake", "misclassified"))
        fake = " of ".join(f"{count:.0f}" for count in counts)
        expected = [cell(row, key) for key in ("UA", "TA", "MIA")]
        expected += [fake, cell(row, "forget_CR", 3), cell(row, "gap")]
        assert cells.split(" | ") == expected
