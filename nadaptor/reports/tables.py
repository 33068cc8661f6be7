"""Tables as text, and numbers as they are printed everywhere."""

from collections.abc import Mapping, Sequence


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


def percent(fraction: float) -> str:
    """Returns a fraction of 1 as it is printed everywhere.

    Example:
        >>> percent(0.9173)
        '91.73 %'
    """
    return f"{100 * fraction:.2f} %"
