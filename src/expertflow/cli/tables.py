"""Tables of numbers that stay whole in 80 columns: thin lines, headings in two lines, cells folded and never cut.

Must not know what the numbers are.
"""

from rich.box import SIMPLE_HEAD
from rich.table import Table


def figures_table(title: str, first: str, *heads: str) -> Table:
    """A table whose first column names things and whose others hold numbers.

    Args:
        title: above it.
        first: heading of the first column.
        heads: of the others; a newline keeps a column narrow.
    """
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        collapse_padding=True,
    )  # fmt: skip
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    return table


def facts_table() -> Table:
    """Names and values, a line each, without headings."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    return table


def megabytes(size: float) -> str:
    """Bytes as MB (10^6) with about three digits, without a unit."""
    value = size / 1e6
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"
