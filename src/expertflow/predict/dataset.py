"""From a routing trace to what a predictor learns from: passages, their split, and windows of equal length.

A passage is one sequence's tokens and routes in order. Splits go by passage, never by token, so that no test token has
a neighbour in the training set. Must not know models of any kind.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.errors import TraceError
from expertflow.limits import check_room
from expertflow.trace.format import UNKNOWN_TOKEN, Trace


@dataclass(frozen=True)
class Passage:
    """One sequence.

    Attributes:
        tokens: `[n]` int64, -1 unknown.
        routes: `[n, L, K]` int64, descending router weight; E means none.
        rows: `[n]` int64, row numbers in the trace it came from.
        about: facts about the sequence from its source, such as its category.
    """

    tokens: npt.NDArray[np.int64]
    routes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    about: dict[str, Any]

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)


class Shape(NamedTuple):
    """What a predictor predicts for: L layers x E experts, of which a token uses K."""

    layers: int
    experts: int
    top_k: int


def shape_of(trace: Trace) -> Shape:
    """The trace's shape."""
    return Shape(trace.header.layers, trace.header.experts, trace.header.top_k)


def passages(trace: Trace, vocabulary: Sequence[str] = ()) -> list[Passage]:
    """The trace's sequences, in the order of their numbers; padding (sequence -1) is left out.

    Args:
        trace: any.
        vocabulary: token texts by id of an earlier trace: ids are translated into it, texts it lacks become unknown.
            Two imported traces number the same texts differently. Empty: ids stay as they are.

    Raises:
        TraceError: if no token has an id, or the trace has texts and `vocabulary` was given for one that has none.
    """
    tokens = trace.rows.tokens.astype(np.int64)
    if vocabulary:
        tokens = _translate(trace, tokens, vocabulary)
    if not np.any(tokens >= 0):
        raise TraceError(
            f"the trace of {trace.header.model or 'a model'} has no known token ids",
            "A predictor needs them: record with `expertflow trace`, or import a folder with decoded_tokens.jsonl.gz.",
        )
    order = np.lexsort((trace.rows.step, trace.rows.sequence))
    order = order[trace.rows.sequence[order] >= 0]
    if not len(order):
        raise TraceError("the trace has no sequences, only padding", "Record or import it again.")
    numbers = trace.rows.sequence[order]
    about = {int(entry["sequence"]): entry for entry in trace.sequences}
    parts = np.split(order, np.flatnonzero(np.diff(numbers)) + 1)
    return [
        Passage(
            tokens[rows],
            trace.rows.experts[rows].astype(np.int64),
            rows,
            about.get(int(trace.rows.sequence[rows[0]]), {}),
        )
        for rows in parts
    ]


def _translate(trace: Trace, tokens: npt.NDArray[np.int64], vocabulary: Sequence[str]) -> npt.NDArray[np.int64]:
    if not trace.vocabulary:
        raise TraceError(
            "the predictor knows tokens by their texts, the trace has bare ids",
            "Give a trace imported like the predictor's own.",
        )
    number = {text: token for token, text in enumerate(vocabulary)}
    table = np.array([*(number.get(text, UNKNOWN_TOKEN) for text in trace.vocabulary), UNKNOWN_TOKEN])
    return table[tokens]  # -1 finds the last entry


def mark(item: Passage) -> str:
    """Eight hexadecimal digits that identify a passage by its tokens' routes."""
    return hashlib.sha256(item.routes.astype(np.uint16).tobytes()).hexdigest()[:8]


def split(items: Sequence[Passage], share: float, seed: int) -> tuple[list[Passage], list[Passage]]:
    """Training and validation passages.

    Args:
        items: all of them; at least two.
        share: of the passages that go to validation, at least one.
        seed: of the choice.

    Raises:
        TraceError: if there are fewer than two.
    """
    if len(items) < 2:
        raise TraceError(
            f"the trace has {len(items)} sequence", "Training needs two at least: one is kept to validate."
        )
    order = np.random.default_rng(seed).permutation(len(items))
    count = min(max(1, round(share * len(items))), len(items) - 1)
    chosen = set(order[:count].tolist())
    kept = [item for number, item in enumerate(items) if number not in chosen]
    return kept, [items[number] for number in sorted(chosen)]


def read_condition(condition: str) -> tuple[str, str]:
    """Key and text of `key=text`.

    Raises:
        TraceError: if the condition is malformed.
    """
    key, equals, text = condition.partition("=")
    if not equals or not key or not text:
        raise TraceError(f"{condition!r} is no condition", "Write it like category=physics.")
    return key, text


def leave_out(items: Sequence[Passage], condition: str) -> tuple[list[Passage], list[Passage]]:
    """Divide passages by a condition on their sequences: the others, and those that fulfil it.

    Args:
        items: passages.
        condition: `key=text`: fulfilled where `key` contains `text`, such as `category=physics`.

    Raises:
        TraceError: if the condition is malformed, or one side is empty.
    """
    key, text = read_condition(condition)
    chosen = [text in str(item.about.get(key, "")) for item in items]
    if not any(chosen) or all(chosen):
        keys = sorted({name for item in items for name in item.about})
        raise TraceError(
            f"{condition!r} fits {sum(chosen)} of {len(items)} sequences",
            f"Sequences have: {', '.join(keys) or 'nothing'}.",
        )
    others = [item for item, fits in zip(items, chosen, strict=True) if not fits]
    return others, [item for item, fits in zip(items, chosen, strict=True) if fits]


class Windows(NamedTuple):
    """Passages cut into pieces of equal length T, padded at the end.

    Attributes:
        tokens: `[N, T]` int64, -1 unknown or padding.
        routes: `[N, T, L, K]` int64, E for none or padding.
        counts: `[N, T]` bool, positions that are trained or measured: real, and not the overlap with the piece before.
    """

    tokens: npt.NDArray[np.int64]
    routes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.bool_]


def windows(items: Sequence[Passage], length: int, experts: int) -> Windows:
    """Cut passages into windows; longer ones overlap by half, so that every counted token has a past.

    Args:
        items: passages, none empty.
        length: tokens a window, even.
        experts: E, the mark for none.
    """
    half = length // 2
    pieces: list[tuple[Passage, int]] = []
    for item in items:
        pieces += [(item, 0)] + [(item, begin) for begin in range(half, len(item) - half, half)]
    _, layers, top_k = items[0].routes.shape
    room = 8 * len(pieces) * length * (layers * top_k + 2)
    check_room(room, f"{len(pieces)} windows of {length} tokens", "Use fewer sequences, or free memory.")
    tokens = np.full((len(pieces), length), UNKNOWN_TOKEN, dtype=np.int64)
    routes = np.full((len(pieces), length, layers, top_k), experts, dtype=np.int64)
    counts = np.zeros((len(pieces), length), dtype=np.bool_)
    for number, (item, begin) in enumerate(pieces):
        count = min(len(item) - begin, length)
        tokens[number, :count] = item.tokens[begin : begin + count]
        routes[number, :count] = item.routes[begin : begin + count]
        counts[number, half if begin else 0 : count] = True
    return Windows(tokens, routes, counts)


def used(routes: npt.NDArray[np.integer[Any]], experts: int) -> npt.NDArray[np.bool_]:
    """Marks of the experts that tokens use.

    Args:
        routes: `[n, L, K]`, E for none.
        experts: E.

    Returns:
        `[n, L, E]`.
    """
    count, layers, _ = routes.shape
    marks = np.zeros((count, layers, experts + 1), dtype=np.bool_)
    np.put_along_axis(marks, routes.astype(np.int64), True, axis=2)
    return np.ascontiguousarray(marks[..., :experts])
