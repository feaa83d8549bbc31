"""Beginnings of prompts that need not be read again: what earlier prompts left in host memory, or live sequences have in pages.

A prompt is cut into blocks. Behind each pass over it, blocks that are complete are copied to host memory. A later prompt
that begins with the same tokens *restarts*: pages of a live sequence are shared, blocks are copied in, and only its other
tokens are read. Layers with a window need the tokens that the next one sees, so these are kept for some restarts alone: the
last two of each prompt, and one every few thousand tokens. The predictor takes in the tokens before a restart, with the
routes that were true when they were read. Must not know schedules, graphs and text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import gcd
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from expertflow.execution.kv.blocks import Block, BlockStore, Routes, names_of
from expertflow.execution.kv.copies import Move, PageCopies
from expertflow.execution.kv.layout import pages_of
from expertflow.execution.kv.paged import PagedCache, Span
from expertflow.execution.kv.pages import Beginning, PageTable
from expertflow.live.predictor import LivePredictor

APART = 2048
"""Tokens between two restarts in the middle of a prompt, at least; and at least twice the widest window, which each one keeps."""


class Match(NamedTuple):
    """How a prompt may begin.

    Attributes:
        length: tokens that need not be read.
        source: a live sequence's row, or None.
        pages: its pages that are shared; the others come from host memory.
    """

    length: int
    source: int | None = None
    pages: int = 0


class Prompted(Protocol):
    """What is read of a request, and what it is given.

    Attributes:
        prompt_token_ids: its prompt.
        kept: tokens whose keys and values it needs at most.
        cached_tokens: tokens of its prompt that need not be read; set when it is admitted.
    """

    prompt_token_ids: tuple[int, ...]
    cached_tokens: int

    @property
    def kept(self) -> int:
        """See above."""

    def unscored(self, begin: int, end: int) -> range:
        """Positions whose next token's log-probability is wanted: where there are some, the prompt is read whole."""


class NothingKept:
    """Reads every prompt from its beginning.

    Attributes:
        queries: tokens of prompts that were looked up so far.
        hits: of these, tokens that were found.
    """

    queries = hits = 0

    def expect(self, sequence: int, request: Prompted) -> None:
        """Take note of a request."""

    def begin(self, sequence: int, row: int) -> int:  # noqa: ARG002 - what `PrefixCache` has
        """Let an admitted sequence begin in a row; tokens of its prompt that need not be read."""
        return 0

    def shared(self, sequence: int) -> int:  # noqa: ARG002 - likewise
        """Pages that a live sequence has in common with others, or that a waiting one would have."""
        return 0

    def leave(self, sequence: int, tokens: Sequence[int]) -> None:
        """Forget a request."""

    def close(self) -> None:
        """Free the memory."""


@dataclass(kw_only=True)
class _Prompt:
    """A waiting or live sequence.

    Attributes:
        request: whose prompt it is, or None.
        tokens: of its prompt.
        names: of the prompt's whole blocks.
        whole: whether it is read from its beginning in any case.
        row: its KV row; None while it waits.
        read: tokens whose keys and values its row has.
        routes: `[n, L, K]`, true routes of what was read; None without a predictor.
        shared: while it waits, pages that it would share, behind the number of changes after which that was found.
        members: names of its own blocks, which are not dropped for its sake.
    """

    tokens: Sequence[int]
    request: Prompted | None = None
    names: list[bytes]
    whole: bool = False
    row: int | None = None
    read: int = 0
    routes: Routes | None = None
    shared: tuple[int, int] | None = None
    members: frozenset[bytes] = field(init=False)

    def __post_init__(self) -> None:
        """Collect its blocks' names."""
        self.members = frozenset(self.names)


class PrefixCache(NothingKept):
    """Keeps beginnings of prompts, and lets later ones restart there.

    Args:
        cache: keys and values of the live sequences.
        copies: moves pages to host memory and back.
        store: what is kept there.
        piece: tokens of a block.
        generated: whether keys and values of generated tokens are kept as well.
        predictor: of the model, or None.
        aside: entered while host memory is used, so that it does not count as the device's.
        watched: whether every prompt has to be read now, because its routing is observed.
    """

    def __init__(  # noqa: PLR0913 - the last ones by keyword
        self,
        cache: PagedCache,
        copies: PageCopies,
        store: BlockStore,
        *,
        piece: int,
        generated: bool = False,
        predictor: LivePredictor | None = None,
        aside: Callable[[], AbstractContextManager[object]] = nullcontext,
        watched: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start with nothing kept."""
        self._cache, self._copies, self._store = cache, copies, store
        self._piece, self._generated, self._predictor = piece, generated, predictor
        self._aside, self._watched = aside, watched
        self._page = cache.layout.page
        self._full = [number for number, book in enumerate(cache.books) if book.kind.window is None]
        self._windows = {number: book for number, book in enumerate(cache.books) if book.kind.window is not None}
        self._apart = max([APART, *(2 * (kind.window or 0) for kind in cache.layout.kinds)])
        self._prompts: dict[int, _Prompt] = {}
        self._rows: dict[int, _Prompt] = {}
        self._changes = 0
        self.queries = self.hits = 0
        cache.watcher = self
        if predictor is not None:
            predictor.listener = self._learned

    def expect(self, sequence: int, request: Prompted) -> None:
        """Take note of a request."""
        tokens = request.prompt_token_ids
        names, whole = names_of(tokens, self._piece), len(request.unscored(0, len(tokens))) > 0
        self._prompts[sequence] = _Prompt(tokens=tokens, names=names, whole=whole, request=request)

    def shared(self, sequence: int) -> int:
        """Pages that a live sequence has in common with others, or that a waiting one would have."""
        prompt = self._prompts[sequence]
        if not self._full:
            return 0
        if prompt.row is not None:
            return self._cache.books[self._full[0]].common(prompt.row)
        if prompt.shared is None or prompt.shared[0] != self._changes:
            prompt.shared = self._changes, self._match(prompt).pages
        return prompt.shared[1]

    def match(self, tokens: Sequence[int]) -> Match:
        """How a prompt would begin if it were admitted now; changes nothing."""
        return self._match(_Prompt(tokens=tokens, names=names_of(tokens, self._piece)))

    def begin(self, sequence: int, row: int) -> int:
        """Let an admitted sequence begin in a row.

        Returns:
            Tokens of its prompt that need not be read. If they are none, its first pass opens the row.
        """
        prompt = self._prompts[sequence]
        match = self._match(prompt)
        self.queries += len(prompt.tokens)
        if match.length:
            with self._aside():
                self._restart(prompt, row, match)
            self._recall(sequence, row, prompt, match.length)
        self.hits += match.length
        prompt.row, prompt.read = row, match.length
        assert prompt.request is not None, "it is a request's"
        prompt.request.cached_tokens = match.length
        self._rows[row] = prompt
        self._changes += 1
        return match.length

    def leave(self, sequence: int, tokens: Sequence[int]) -> None:
        """Forget a request; it may have waited. Call it before its row's pages go back.

        Args:
            sequence: its number.
            tokens: of its prompt, then those generated whose keys and values its row has.
        """
        prompt = self._prompts.pop(sequence)
        if prompt.row is None:
            return
        if self._generated and prompt.read == len(prompt.tokens) < len(tokens):
            names, before = names_of(tokens, self._piece), prompt.read
            longer = _Prompt(tokens=tokens, names=names, row=prompt.row, read=len(tokens))
            self.keep(longer, before)
        del self._rows[prompt.row]
        self._changes += 1

    def written(self, spans: Sequence[Span]) -> None:
        """A pass is queued: keep what it completed of prompts. See `PageWatcher`."""
        for span in spans:
            prompt = self._rows.get(span.row)
            if prompt is None or span.begin != prompt.read or span.begin >= len(prompt.tokens):
                continue  # a decode step, or a pass that runs again
            prompt.read, self._changes = span.end, self._changes + 1
            if not self._watched():
                self.keep(prompt, span.begin)

    def taken(self, kind: int, pages: Sequence[int]) -> None:
        """Pages change hands: copies that read them go first. See `PageWatcher`."""
        self._copies.before_writing(kind, pages)

    def keep(self, prompt: _Prompt, begin: int) -> None:
        """Copy to host memory what is complete of a live sequence, from token `begin` to those that are read.

        Nothing is kept of what does not fit beside the sequence's own beginning, and nothing behind a block that was dropped.
        """
        first, last, names = begin // self._piece, prompt.read // self._piece, prompt.names
        moves: list[Move] = []
        with self._aside():
            for number in range(first, last):
                if number and names[number - 1] not in self._store:
                    break
                if not self._keep_block(prompt, number, moves):
                    break
                if self._restarts_at((number + 1) * self._piece, len(prompt.tokens)):
                    self._keep_windows(prompt, (number + 1) * self._piece, moves)
            self._copies.out(moves)
        self._store.use(names[:last])

    def evict(self) -> bool:
        """Drop the block that is worth least; False if there is none."""
        self._changes += 1
        return self._store.drop()

    def close(self) -> None:
        """Forget everything and free the host memory, once no copy is under way."""
        self._cache.watcher = None
        self._store.close()

    def _match(self, prompt: _Prompt) -> Match:
        """The longest beginning that is kept, but for the last token, whose logits are wanted."""
        if prompt.whole or self._watched():
            return Match(0)
        most = min(len(prompt.names), (len(prompt.tokens) - 1) // self._piece)
        names, step = prompt.names[:most], self._page // gcd(self._page, self._piece)
        source, common = max(
            ((row, self._common(names, other)) for row, other in self._rows.items()),
            key=lambda one: one[1],
            default=(0, 0),
        )
        count = common = common // step * step  # whole pages are shared
        while count < most and names[count] in self._store:
            count += 1
        while count and not self._sees(names, count):
            count -= 1
        length = count * self._piece
        pages = min(common * self._piece, length) // self._page if self._full else 0
        return Match(length, source if pages else None, pages)

    def _common(self, names: Sequence[bytes], other: _Prompt) -> int:
        """Blocks that a live sequence has read and begins with as well; found by halves, because names cover what is before."""
        low, high = 0, min(len(names), other.read // self._piece, len(other.names))
        while low < high:
            middle = (low + high + 1) // 2
            if names[middle - 1] == other.names[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _sees(self, names: Sequence[bytes], count: int) -> bool:
        """Whether layers with a window have what the token behind `count` blocks sees."""
        return all(
            (block := self._store.get(names[number])) is not None
            and (part := block.parts.get(kind)) is not None
            and part.first <= max(first, number * self._piece)
            for kind, book in self._windows.items()
            for number, first in self._seen(book, count * self._piece)
        )

    def _seen(self, book: PageTable, token: int) -> Iterator[tuple[int, int]]:
        """Blocks that token number `token` sees through a window, and the first token it sees of all."""
        first = book.needed(token)
        return ((number, first) for number in range(first // self._piece, token // self._piece))

    def _restart(self, prompt: _Prompt, row: int, match: Match) -> None:
        """Open a row, share pages and queue copies into the others."""
        length, cache = match.length, self._cache
        beginning = None if match.source is None else Beginning(match.source, match.pages)
        assert prompt.request is not None, "it is a request's"
        cache.open(row, prompt.request.kept, beginning)
        for book in self._windows.values():
            book.advance(row, length, length)
        cache.synchronise()
        moves: list[Move] = []
        for kind, book in enumerate(cache.books):
            begin = book.needed(length) if kind in self._windows else match.pages * self._page
            for number in range(begin // self._piece, length // self._piece):
                block = self._store.get(prompt.names[number])
                assert block is not None, "a block that was matched is kept"
                moves += self._moves(row, kind, block, (max(begin, number * self._piece), (number + 1) * self._piece))
        self._copies.into(moves)
        self._store.use(prompt.names[: length // self._piece])

    def _recall(self, sequence: int, row: int, prompt: _Prompt, length: int) -> None:
        """Let the predictor take in the last tokens before a restart."""
        if self._predictor is None:
            return
        begin = max(0, length - self._predictor.recalled) // self._piece
        blocks = [self._store.get(name) for name in prompt.names[begin : length // self._piece]]
        unknown = self._predictor.unknown(self._piece)
        routes = [unknown if block is None or block.routes is None else block.routes for block in blocks]
        self._predictor.recall(sequence, row, prompt.tokens[begin * self._piece : length], np.concatenate(routes))

    def _learned(self, row: int, begin: int, routes: npt.NDArray[np.uint16]) -> None:
        """Keep the true routes of a pass's tokens, from `begin` on, of the prompt in a row."""
        prompt, predictor = self._rows.get(row), self._predictor
        if prompt is None or predictor is None or not len(routes):
            return
        if prompt.routes is None:
            prompt.routes = predictor.unknown(len(prompt.tokens))
        end = begin + len(routes)
        prompt.routes[begin:end] = routes
        self._changes += 1
        for number in range(begin // self._piece, end // self._piece):
            block = self._store.get(prompt.names[number])
            if block is not None and block.routes is None:
                own = prompt.routes[number * self._piece : (number + 1) * self._piece].copy()
                self._store.note(block, own, prompt.members)

    def _keep_block(self, prompt: _Prompt, number: int, moves: list[Move]) -> bool:
        """Keep what layers without a window have of a block; False if there is no room."""
        name, span = prompt.names[number], (number * self._piece, (number + 1) * self._piece)
        if name in self._store:
            return True
        block = self._store.add(name)
        if all(self._put(prompt, block, kind, span, moves) for kind in self._full):
            return True
        self._store.remove(name)
        return False

    def _keep_windows(self, prompt: _Prompt, token: int, moves: list[Move]) -> None:
        """Keep what layers with a window need for a restart at a token, as far as blocks and pages are there."""
        for kind, book in self._windows.items():
            assert prompt.row is not None
            if not book.keeps(prompt.row, book.needed(token), token):
                continue
            for number, first in self._seen(book, token):
                begin, block = max(first, number * self._piece), self._store.get(prompt.names[number])
                known = None if block is None else block.parts.get(kind)
                if block is None or (known is not None and known.first <= begin):
                    continue
                self._put(prompt, block, kind, (begin, (number + 1) * self._piece), moves)

    def _restarts_at(self, token: int, tokens: int) -> bool:
        """Whether layers with a window keep what a restart at a token needs."""
        behind = token - self._piece
        return (
            token // self._apart != behind // self._apart
            or token > tokens // self._piece * self._piece - 2 * self._piece
        )

    def _put(self, prompt: _Prompt, block: Block, kind: int, span: tuple[int, int], moves: list[Move]) -> bool:
        """Have room for the pages of a range of tokens, and add their copies to `moves`."""
        count = pages_of(span[1], self._page) - span[0] // self._page
        size = count * self._copies.record_bytes(kind)
        if self._store.put(block, kind, span[0], size, prompt.members) is None:
            return False
        assert prompt.row is not None
        moves += self._moves(prompt.row, kind, block, span)
        return True

    def _moves(self, row: int, kind: int, block: Block, span: tuple[int, int]) -> Iterator[Move]:
        """Copies of a row's pages that hold a range of tokens, to or from a block's part, which may begin before it."""
        part, page, size = block.parts[kind], self._page, self._copies.record_bytes(kind)
        entries, first = self._cache.books[kind].entries[row], part.first // page
        for number in range(span[0] // page, pages_of(span[1], page)):
            begin, end = max(0, span[0] - number * page), min(page, span[1] - number * page)
            places = None if (begin, end) == (0, page) else slice(begin, end)  # whole pages move several at once
            yield Move(kind, int(entries[number]), part.begin + (number - first) * size, places)
