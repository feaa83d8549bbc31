"""Which row has which pages: reference counts of pages, and the page tables of one kind of layer.

A row's pages are taken when it opens (layers that keep every token) or as its passes come (windows, whose pages go
back as soon as no later token sees them). Several rows may share full pages: a page is free once its last row gave it
back. Pure numbers. Must not know keys, values and devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertflow.errors import ConfigError
from expertflow.execution.kv.layout import SPARE, ZEROS, Kind, Layout, pages_of


class PagePool:
    """Pages of one kind of layer.

    Args:
        pages: how many, spare ones included.

    Attributes:
        users: int32 `[pages]`, the rows that have each.
    """

    def __init__(self, pages: int) -> None:
        """Start with every page free."""
        self._free = list(range(pages - 1, SPARE - 1, -1))
        self._used = np.zeros(pages, dtype=bool)
        self.users = np.zeros(pages, dtype=np.int32)

    @property
    def free(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Give pages to one row.

        Returns:
            The pages, and those of them that another sequence had before, so that they have to be cleared.

        Raises:
            ConfigError: if fewer are free; admission by need prevents it.
        """
        if count > len(self._free):
            raise ConfigError(
                f"{count} pages of keys and values are needed, {len(self._free)} are free",
                "Admit fewer sequences at once, or raise kv_tokens.",
            )
        taken = [self._free.pop() for _ in range(count)]
        self.users[taken] = 1
        return taken, [page for page in taken if self._used[page]]

    def share(self, pages: Sequence[int]) -> None:
        """Let one more row have these pages."""
        self.users[list(pages)] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Take these pages from one row."""
        for page in pages:
            assert self.users[page] > 0, "a page is given back that no row has"
            self.users[page] -= 1
            if not self.users[page]:
                self._used[page] = True
                self._free.append(page)


class Beginning(NamedTuple):
    """Pages that a sequence shares: the first ones of the sequence in row `source`."""

    source: int
    pages: int


class PageTable:
    """Pages of every row, of one kind of layer.

    Args:
        layout: of the cache.
        kind: of the layers.

    Attributes:
        kind: of the layers.
        pool: their pages.
        entries: int32 `[rows, columns]`, the page of each run of `page` tokens; ZEROS where none is kept.
        changed: rows whose entries changed since they were last copied to the device.
        stale: pages to clear before they are used.
    """

    def __init__(self, layout: Layout, kind: Kind) -> None:
        """Start with no row open."""
        self.kind, self._page = kind, layout.page
        self.pool = PagePool(kind.pages)
        self.entries = np.full((layout.rows, layout.columns), ZEROS, dtype=np.int32)
        self.changed: set[int] = set()
        self.stale: list[int] = []
        self._begin, self._end = [0] * layout.rows, [0] * layout.rows  # pages a row has, by their places in its entries

    def open(self, row: int, tokens: int, beginning: Beginning | None = None) -> None:
        """Begin a sequence of so many tokens at most; what the row had goes back.

        Args:
            row: to begin in.
            tokens: at most.
            beginning: pages that it shares; layers with a window share none.
        """
        self.leave(row)
        if self.kind.window is not None:
            return
        if beginning is not None and beginning.pages:
            common = self.entries[beginning.source, : beginning.pages]
            self.pool.share(common.tolist())
            self.entries[row, : beginning.pages] = common
            self._end[row] = beginning.pages
            self.changed.add(row)
        self._extend(row, pages_of(tokens, self._page))

    def leave(self, row: int) -> None:
        """Take all pages from a row."""
        self._drop(row, self._begin[row], self._end[row])
        self._begin[row] = self._end[row] = 0

    def advance(self, row: int, begin: int, end: int) -> None:
        """Have pages for a pass over tokens `begin .. end - 1`, and for those before it that the first one sees."""
        self.trim(row, begin)
        self._extend(row, pages_of(end, self._page))

    def page_for(self, row: int, token: int) -> int:
        """The page of a row's next token, taken if there is none yet; then what that token does not see goes back."""
        place = token // self._page
        if place >= self._end[row]:
            self.advance(row, token, token + 1)
        return self.entries.item(row, place)

    def trim(self, row: int, token: int) -> None:
        """Give back what no token from `token` on sees."""
        window = self.kind.window
        if window is None:
            return
        first = max(0, token - window + 1) // self._page
        if first > self._begin[row]:
            self._drop(row, self._begin[row], min(first, self._end[row]))
            self._begin[row] = first
            self._end[row] = max(first, self._end[row])

    def retreat(self, row: int, token: int) -> None:
        """Give back what only tokens from `token` on would need, because their pass failed."""
        last = max(pages_of(token, self._page), self._begin[row])
        if self.kind.window is not None and last < self._end[row]:
            self._drop(row, last, self._end[row])
            self._end[row] = last

    def keeps(self, row: int, begin: int, end: int) -> bool:
        """Whether a row has pages for tokens `begin .. end - 1`."""
        return self._begin[row] * self._page <= begin and end <= self._end[row] * self._page

    def needed(self, token: int) -> int:
        """The first token before `token` that it sees."""
        return 0 if self.kind.window is None else max(0, token - self.kind.window + 1)

    def common(self, row: int) -> int:
        """Pages of a row that other rows have as well."""
        mine = self.entries[row, self._begin[row] : self._end[row]]
        return int((self.pool.users[mine] > 1).sum())

    def _extend(self, row: int, last: int) -> None:
        count = last - self._end[row]
        if count <= 0:
            return
        pages, used = self.pool.take(count)
        self.entries[row, self._end[row] : last] = pages
        self._end[row] = last
        self.stale += used
        self.changed.add(row)

    def _drop(self, row: int, begin: int, end: int) -> None:
        if begin < end:
            self.pool.give_back(self.entries[row, begin:end].tolist())
            self.entries[row, begin:end] = ZEROS
            self.changed.add(row)
