"""Small files, written whole or not at all: to a scratch file first, then renamed."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_bytes(content)
    scratch.rename(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as readable JSON."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal columns as CSV, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    """Returns rows of equal columns as a Markdown table, aligned.

    Example:
        >>> print(markdown([{"row": "a", "T = 1": "90.0"}]))
        | row | T = 1 |
        | --- | ----- |
        | a   | 90.0  |
    """
    cells = [list(table[0]), *([*row.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    rows = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
