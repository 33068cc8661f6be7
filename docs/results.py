"""Puts the tables of the result files into the pages, so that no number of theirs is typed.

A page says where a table is from, and `make results` writes it between the two marks:

    <!-- from results/fit/table.md -->
    <!-- end -->
"""

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "RESULTS.md", DOCS / "coding.md", *sorted((DOCS / "results").glob("*.md")))
_MARKED = re.compile(r"<!-- from (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def refreshed(page: str) -> str:
    """Returns the text of a page with its tables as the files have them now."""
    return _MARKED.sub(lambda m: f"<!-- from {m[1]} -->\n\n{table(m[1])}\n\n<!-- end -->", page)


def table(name: str) -> str:
    """Returns the table of a file of the repository: a page's as it is, a CSV file's as one."""
    text = (ROOT / name).read_text()
    if not name.endswith(".csv"):
        return text.strip()
    head, *rows = csv.reader(text.splitlines())
    return "\n".join(map(_line, [head, ["---"] * len(head), *rows]))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
    print(f"{len(PAGES)} pages", file=sys.stderr)
