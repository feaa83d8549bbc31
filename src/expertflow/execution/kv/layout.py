"""How keys and values lie in pages: the numbers that a plan counts, a cache allocates and an allocator goes by.

A layer's keys lie in `[pages, heads, PAGE, width]`, its values likewise. Layers that see the same tokens are of one *kind*
and share page tables: one kind keeps every token, each sliding window keeps its own last ones. Pure: numbers in,
numbers out. Must not know tensors, rows in use and models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PAGE = 64
"""Tokens of a page; a multiple of the columns that attention kernels take in at once, so that one page holds them all."""
ZEROS, WASTE = 0, 1
"""Pages of no sequence: zeros, which stand where nothing is kept and are never written; and where padding writes, never read."""
SPARE = 2
"""How many of these there are."""


class Kind(NamedTuple):
    """Layers that keep the same tokens.

    Attributes:
        window: tokens they see, the current one included; None: all.
        pages: pages of each of them, spare ones included.
    """

    window: int | None
    pages: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of everything that keeps keys and values in pages.

    Attributes:
        rows: sequences that may live at once.
        length: tokens of a sequence at most.
        page: tokens of a page.
        pages: pages for all tokens that may be kept at once.
        kinds: of layers, each once.
        layers: kind of each layer, by its place in `kinds`.
    """

    rows: int
    length: int
    page: int
    pages: int
    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, windows: Sequence[int | None], *, rows: int, length: int, tokens: int, chunk: int) -> "Layout":
        """The layout of a model.

        Args:
            windows: tokens each layer sees, the current one included; None: all.
            rows: sequences that may live at once.
            length: tokens of a sequence at most.
            tokens: of all live sequences together at most, each rounded up to pages.
            chunk: tokens of a pass over prompts at most.
        """
        seen = [None if window is None or window >= length else window for window in windows]
        pages, found = pages_of(tokens, PAGE), list(dict.fromkeys(seen))
        kinds = tuple(
            Kind(window, SPARE + min(pages, window_pages(window, rows, length, chunk, PAGE))) for window in found
        )
        return cls(
            rows=rows,
            length=length,
            page=PAGE,
            pages=pages,
            kinds=kinds,
            layers=tuple(found.index(window) for window in seen),
        )

    @property
    def columns(self) -> int:
        """Pages of the longest sequence: entries of a row of a page table."""
        return pages_of(self.length, self.page)

    def nbytes(self, layers: Sequence[int]) -> int:
        """Bytes of keys, values and page tables.

        Args:
            layers: bytes of one token's keys and values in each layer.
        """
        kept = [self.kinds[kind].pages * self.page * size for kind, size in zip(self.layers, layers, strict=True)]
        return sum(kept) + len(self.kinds) * self.rows * self.columns * 4


def pages_of(tokens: int, page: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // page)


def window_pages(window: int | None, rows: int, length: int, chunk: int, page: int) -> int:
    """Pages that suffice for all rows of layers with a window; None: no window.

    A token's window reaches into `(window - 2) // page + 2` pages at most. During a pass the tokens behind the first of each
    piece need further pages: most where many short pieces each begin one.
    """
    whole = rows * pages_of(length, page)
    if window is None:
        return whole
    of_token = (window - 2) // page + 2 if window > 1 else 1
    pieces = min(rows, chunk)
    return min(whole, rows * of_token + (chunk + pieces * (page - 2)) // page)
