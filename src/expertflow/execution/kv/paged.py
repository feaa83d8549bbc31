"""A transformers cache whose keys and values lie in pages.

All layers of a kind are one tensor of keys and one of values, so that clearing pages is one launch each. Page
tables are device buffers at fixed addresses: captured steps stay valid while pages change hands. Where a pass writes is
worked out on the host and comes with its tokens. Must not know requests, experts and graphs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from expertflow.execution.kv.layout import WASTE, Layout
from expertflow.execution.kv.pages import Beginning, PageTable
from expertflow.kernels.blocks.given import Cells, Heads, LatentHeads
from expertflow.models.context import ForwardContext


class Span(NamedTuple):
    """Tokens `begin .. end - 1` of the sequence in a row, which a pass writes."""

    row: int
    begin: int
    end: int


class PageWatcher(Protocol):
    """Learns what happens to pages."""

    def written(self, spans: Sequence[Span]) -> None:
        """A pass that wrote these tokens is queued; what no later token sees has not been given back yet."""

    def taken(self, kind: int, pages: Sequence[int]) -> None:
        """Another sequence had these pages, and they are about to be cleared."""


class Stack:
    """Keys and values of all layers of one kind, `[layers, pages, heads, page, width]`; made when the first keys come."""

    def __init__(self, layers: int, pages: int, page: int) -> None:
        """Remember the sizes."""
        self._size = layers, pages, page
        self.keys = self.values = torch.zeros(0)

    @property
    def made(self) -> bool:
        """Whether there are tensors."""
        return self.keys.ndim > 1

    def make(self, keys: Tensor, values: Tensor) -> None:
        """Allocate for keys and values like these, `[B, heads, C, width]`; zeros, because what is masked must still be finite."""
        layers, pages, page = self._size
        if not self.made:
            shape = layers, pages, keys.shape[1], page
            self.keys, self.values = keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3])
        assert self.keys.shape[2] == keys.shape[1], "layers of one kind have heads of one number"
        assert (self.keys.shape[4], self.values.shape[4]) == (keys.shape[3], values.shape[3]), "and of one width"

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages that another sequence had: NaN, times a weight of zero, would still be NaN."""
        if self.made and pages:
            where = torch.tensor(pages, device=self.keys.device)
            self.keys.index_fill_(1, where, 0)
            self.values.index_fill_(1, where, 0)


class PassPages:
    """Where one pass writes and reads; what it looks up is looked up once for all layers of a kind.

    Args:
        layout: of the cache.
        tables: int32 `[rows, columns]` on the device, of each kind.
        cells: int64 `[kinds + 1, B, C]`: the page of each token in each kind, then its place in the page.
        rows: int64 `[B]`, of the pass.
        end: columns that are looked at.
    """

    def __init__(self, layout: Layout, tables: Sequence[Tensor], cells: Tensor, rows: Tensor, end: int) -> None:
        """Look up nothing yet."""
        self._layout, self._tables, self._cells, self._rows, self._end = layout, tables, cells, rows, end
        self._seen: dict[tuple[int, int], Tensor] = {}

    def table(self, layer: int) -> Tensor:
        """The page table of a layer, as far as the pass looks: `[rows, m]`."""
        return self._tables[self._layout.layers[layer]][:, : -(-self._end // self._layout.page)]

    def written(self, kind: int) -> tuple[Tensor, Tensor]:
        """Where each token's keys and values go: pages and places, `[B, C]` each."""
        return self._cells[kind], self._cells[-1]

    def seen(self, kind: int, kept: Tensor) -> Tensor:
        """Copy what the pass's rows have, `[pages, heads, page, width]`, to `[B, heads, end, width]`."""
        heads, page, width = kept.shape[1:]
        if (kind, heads) not in self._seen:
            column = torch.arange(self._end, device=kept.device)
            pages = self._tables[kind][self._rows][:, column // page].long()
            head = torch.arange(heads, device=kept.device)[:, None]
            self._seen[kind, heads] = ((pages[:, None] * heads + head) * page + column % page).flatten()
        copy = kept.view(-1, width).index_select(0, self._seen[kind, heads])
        return copy.view(len(self._rows), heads, self._end, width)


class PagedLayer(CacheLayerMixin):
    """One attention layer's pages. Which of them a pass works on is in the pass's context."""

    is_sliding = False

    def __init__(self, stack: Stack, place: int, kind: int, context: ForwardContext) -> None:
        """A layer of a stack, whose memory is taken when the first keys come."""
        super().__init__()
        self._stack, self._place, self._kind, self._context = stack, place, kind, context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all layers of the kind."""
        self._stack.make(key_states, value_states)
        self.keys, self.values = self._stack.keys[self._place], self._stack.values[self._place]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values, `[B, heads, C, width]`; what attention looks at comes back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self._context.now
        assert now.pages is not None
        pages, places = now.pages.written(self._kind)
        self.keys[pages, :, places] = key_states.transpose(1, 2)
        self.values[pages, :, places] = value_states.transpose(1, 2)
        if now.all_rows:
            return self.keys, self.values
        return now.pages.seen(self._kind, self.keys), now.pages.seen(self._kind, self.values)

    def cells(self, states: Tensor, heads: Heads | LatentHeads) -> Cells:
        """Where keys and values of a pass of one token a sequence go, or of one over prompts without padding.

        Args:
            states: of the number type that keys have.
            heads: of the layer.
        """
        if not self.is_initialized:
            keys, values = (states.new_zeros(0, count, 0, width) for count, width in heads.kept)
            self.lazy_initialization(keys, values)
        now = self._context.now
        assert now.pages is not None
        pages, places = now.pages.written(self._kind)
        return Cells(self.keys, self.values, pages.flatten(), places.flatten())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        """Columns a pass looks at, and where they begin."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Columns a pass looks at: every sequence has a length of its own."""
        return self._context.now.end

    def get_max_length(self) -> int:
        """No bound of the layer's own."""
        return -1


class PagedCache(Cache):
    """All layers' pages, and who has them.

    Args:
        layout: sizes.
        context: what the model's passes carry.
        device: where keys and values are.

    Attributes:
        layout: sizes.
        tables: int32 `[rows, columns]` on the device, of each kind; they never move.
        books: the same on the host, with who has which page.
        stacks: keys and values of each kind.
        watcher: learns what happens to pages, or None.
    """

    def __init__(self, layout: Layout, context: ForwardContext, device: torch.device) -> None:
        """Start with no row open."""
        self.layout = layout
        self.watcher: PageWatcher | None = None
        self.books = [PageTable(layout, kind) for kind in layout.kinds]
        self.tables = [torch.from_numpy(book.entries).to(device, copy=True) for book in self.books]
        self.stacks = [
            Stack(layout.layers.count(number), kind.pages, layout.page) for number, kind in enumerate(layout.kinds)
        ]
        counts = [0] * len(layout.kinds)
        layers = []
        for kind in layout.layers:
            layers.append(PagedLayer(self.stacks[kind], counts[kind], kind, context))
            counts[kind] += 1
        super().__init__(layers=layers)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept on the device."""
        return [*self.tables, *(part for stack in self.stacks if stack.made for part in (stack.keys, stack.values))]

    def drop(self) -> None:
        """Free keys and values; nothing can be run afterwards."""
        self.layers.clear()
        self.stacks.clear()
        self.tables.clear()

    def open(self, row: int, tokens: int, beginning: Beginning | None = None) -> None:
        """Begin a sequence of so many tokens at most in a row.

        Args:
            row: whose pages go back.
            tokens: at most.
            beginning: pages that it shares with another sequence, in layers without a window.

        Raises:
            ConfigError: if there are too few free pages.
        """
        for book in self.books:
            book.open(row, tokens, beginning)

    def leave(self, row: int) -> None:
        """Give all pages of a row back."""
        for book in self.books:
            book.leave(row)

    @contextmanager
    def passing(self, spans: Sequence[Span], columns: npt.NDArray[np.int64]) -> Iterator[Int[Tensor, "K B C"]]:
        """Have pages for a pass, which is queued inside; behind it, give back what no later token sees.

        Args:
            spans: what it writes, a row each.
            columns: `[B, C]`, each token's column in the row of its span; padding has -1. Lines behind the spans are padding.
                Or `[1, T]` of several spans, one behind the other.

        Returns:
            Where each token's keys and values go, in host memory; see `PassPages`.
        """
        for book in self.books:
            for span in spans:
                book.advance(*span)
        try:
            self.synchronise()
            yield self._cells(spans, columns)
        except BaseException:
            for book in self.books:
                for span in spans:
                    book.retreat(span.row, span.begin)
            raise
        if self.watcher is not None:
            self.watcher.written(spans)
        for book in self.books:
            for span in spans:
                book.trim(span.row, span.end)

    def step_cells(self, rows: Sequence[int], positions: Sequence[int], out: npt.NDArray[np.int64]) -> None:
        """Have room for one token of each row, and write where it goes to `out`, `[kinds + 1, B]`.

        Windows give pages back when they need another one: then they have as many as a token's window takes.
        """
        page = self.layout.page
        for kind, book in enumerate(self.books):
            out[kind] = [book.page_for(row, position) for row, position in zip(rows, positions, strict=True)]
        out[-1] = [position % page for position in positions]
        if any(book.changed for book in self.books):
            self.synchronise()

    def of_pass(self, cells: Tensor, rows: Tensor, end: int) -> PassPages:
        """What a pass looks up; `cells` from `passing`, on the device."""
        return PassPages(self.layout, self.tables, cells, rows, end)

    @torch.inference_mode()
    def synchronise(self) -> None:
        """Clear pages that change hands, and copy to the device what changed in the tables."""
        for number, (book, table, stack) in enumerate(zip(self.books, self.tables, self.stacks, strict=True)):
            if book.stale:
                if self.watcher is not None:
                    self.watcher.taken(number, book.stale)
                stack.clear(book.stale)
                book.stale = []
            if book.changed:
                entries = torch.from_numpy(book.entries)
                if len(book.changed) == 1:
                    row = next(iter(book.changed))
                    table[row].copy_(entries[row])
                else:
                    table.copy_(entries)
                book.changed.clear()

    def _cells(self, spans: Sequence[Span], columns: npt.NDArray[np.int64]) -> Tensor:
        rows = np.zeros((len(columns), 1), dtype=np.int64)
        if len(spans) > len(columns):
            rows = np.repeat([span.row for span in spans], [span.end - span.begin for span in spans])[None]
        else:
            rows[: len(spans), 0] = [span.row for span in spans]
        padding, page = columns < 0, self.layout.page
        cells = np.zeros((len(self.books) + 1, *columns.shape), dtype=np.int64)
        for kind, book in enumerate(self.books):
            cells[kind] = np.where(padding, WASTE, book.entries[rows, columns // page])
        cells[-1] = np.where(padding, 0, columns % page)
        return torch.from_numpy(cells)
