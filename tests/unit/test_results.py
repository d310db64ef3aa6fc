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
