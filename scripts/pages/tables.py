"""Tables and cells in Markdown."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from pages.records import Record
from pages.statements import Interval, Rate


def table(rows: Any, columns: Sequence[str] | None = None, digits: int = 3) -> str:
    """A Markdown table of a data frame, or of rows and the names of their columns.

    Fractions have so many digits, missing numbers are empty, and a bar is escaped, since it would end its cell.

    Example:
        >>> print(table([["a|b", 0.25, 3, None]], ["what", "share", "n", "p"]))
        | what | share | n | p |
        |--------|---------|-----|-----|
        | a\\|b | 0.250 | 3 |  |
    """

    def cell(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value).replace("|", "\\|")

    cells = pd.DataFrame(rows, columns=columns, dtype=object).map(cell)
    return cells.rename(columns=cell).to_markdown(index=False, tablefmt="github", disable_numparse=True, stralign=None)


def marked(share: float, good: bool) -> str:
    """A share with one decimal; bold where it is not as it should be."""
    return f"{share:.1%}" if good else f"**{share:.1%}**"


def interval(row: Record, name: str, spec: str = ".2f", missing: str = "") -> str:
    """A value with its interval; alone where the interval has no end, ``missing`` where it was not measured."""
    if row[name] is None:
        return missing
    found = Interval.of(row, name)
    known = [end for end in (found.low, found.high) if end is not None and math.isfinite(end)]
    return f"{found:{spec}}" if len(known) == 2 else f"{found.value:{spec}} (no interval)"


def rate_of(kinds: Record, kind: str) -> Rate:
    """Replies of a kind among all replies."""
    return Rate(kinds[kind], sum(kinds.values()))


def reply_cells(row: Record, kinds: Sequence[str]) -> list[str]:
    """Shares of these kinds of reply, and the replies' perplexity."""
    perplexity = row["perplexity"]
    return [*(f"{rate_of(row['kinds'], kind)}" for kind in kinds), "" if perplexity is None else f"{perplexity:.3g}"]
