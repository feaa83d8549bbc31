"""Groups of sequences whose routing paths overlap, so that each group activates few experts.

A path is a binary `[L, E]`, and a group activates the union of its sequences' paths. The sum over groups of distinct
experts is minimised (ExpertFlow, arXiv 2410.17954, section 3.3, Eq. 2). Two methods behind one signature: the paper's,
K-means-style on Hamming similarity, as the reference, and ours, farthest seeds, greedy growth and swaps. Paths are
packed into 64-bit words, so that a union is an `or` and its size a count of bits. Deterministic; never worse than the
order of arrival by its own count. Must not know requests and caches.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from expertflow.cache.shared import compiled, shared
from expertflow.config import nearest
from expertflow.errors import ConfigError

Paths = npt.NDArray[np.bool_]
Groups = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_ROUNDS = 12
"""Rounds of the K-means-style method at most."""
_PASSES = 20
"""Passes over all swaps at most; each makes the best one for every sequence."""


def group(paths: Paths, groups: int, method: str = "swaps") -> Groups:
    """Divide sequences into groups of equal size, or sizes that differ by one.

    Args:
        paths: `[N, L, E]`, what each sequence is expected to use.
        groups: how many groups.
        method: a key of `METHODS`.

    Returns:
        `[N]` the group of each sequence. Groups 0, 1, ... in the order of their first sequence; if the method found
        nothing better, sequences stay in the order of arrival.

    Raises:
        ConfigError: for an unknown method, or fewer sequences than groups.
    """
    if method not in METHODS:
        raise ConfigError(f"grouping {method!r} is unknown", nearest(method, METHODS))
    if not 1 <= groups <= len(paths):
        raise ConfigError(f"{len(paths)} sequences cannot be divided into {groups} groups", "Use fewer groups.")
    arrival = in_order(len(paths), groups)
    words = pack(paths)
    found = METHODS[method](words, groups)
    if activated(words, found, groups) >= activated(words, arrival, groups):
        return arrival
    order = np.argsort([np.flatnonzero(found == number)[0] for number in range(groups)])
    names = np.empty(groups, dtype=np.int64)
    names[order] = np.arange(groups)
    renamed: Groups = names[found]
    return renamed


def in_order(count: int, groups: int) -> Groups:
    """`[N]` groups by order of arrival; the first ones have one more if it does not divide."""
    return np.repeat(np.arange(groups), sizes(count, groups))


def sizes(count: int, groups: int) -> npt.NDArray[np.int64]:
    """`[G]` sequences of each group."""
    base, extra = divmod(count, groups)
    return base + (np.arange(groups) < extra).astype(np.int64)


def pack(paths: Paths) -> Words:
    """`[N, W]` the paths as words of 64 experts."""
    packed = np.packbits(paths.reshape(len(paths), -1), axis=1, bitorder="little")
    wide = np.zeros((len(paths), -(-packed.shape[1] // 8) * 8), dtype=np.uint8)
    wide[:, : packed.shape[1]] = packed
    words: Words = wide.view(np.uint64)
    return words


def activated(words: Words, found: Groups, groups: int) -> int:
    """Distinct experts, summed over groups."""
    total = 0
    for number in range(groups):
        total += int(np.bitwise_count(np.bitwise_or.reduce(words[found == number], axis=0)).sum())
    return total


def similar(words: Words, groups: int) -> Groups:
    """The paper's method: K-means on Hamming similarity, balanced; the best round by the number of activated experts.

    In a round every group's centre gets the bits that most of its sequences have. Then each sequence joins the most
    similar centre that has room, those with most to lose first.
    """
    count, room = len(words), sizes(len(words), groups)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(np.int64)
    found = best = in_order(count, groups)
    least = activated(words, best, groups)
    for _ in range(_ROUNDS):
        centres = np.stack([2 * bits[found == number].sum(0) >= (found == number).sum() for number in range(groups)])
        alike = (bits[:, None] == centres[None]).sum(-1)
        ranked = np.sort(alike, axis=1)
        lose = ranked[:, -1] - ranked[:, -2] if groups > 1 else ranked[:, -1]
        left, before = room.copy(), found
        found = np.full(count, -1)
        for sequence in np.argsort(-lose, kind="stable"):
            chosen = int(np.argmax(np.where(left > 0, alike[sequence], -1)))
            found[sequence] = chosen
            left[chosen] -= 1
        now = activated(words, found, groups)
        if now < least:
            best, least = found, now
        if np.array_equal(found, before):
            break
    return best


@shared
def _size(word: np.uint64) -> int:
    """Bits that are set."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@shared
def _recount(words: Words, found: Groups, number: int, any_: Words, twice: Words) -> None:
    """What a group's sequences use, and what more than one of them does."""
    any_[number], twice[number] = 0, 0
    for sequence in range(len(found)):
        if found[sequence] == number:
            for place in range(words.shape[1]):
                twice[number, place] |= any_[number, place] & words[sequence, place]
                any_[number, place] |= words[sequence, place]


@shared
def _added(path: Words, union: Words) -> int:
    """Experts that a path adds to a union; `[W]` both."""
    more = 0
    for place in range(len(path)):
        more += _size(path[place] & ~union[place])
    return more


@shared
def _seed(words: Words, union: Words, seeds: int, found: Groups) -> int:
    """The sequence that overlaps least with the nearest of the seeds so far."""
    best, chosen = -1, -1
    for sequence in range(len(words)):
        if found[sequence] < 0:
            far = 1 << 30
            for number in range(seeds):
                far = min(far, _added(words[sequence], union[number]))
            if far > best:
                best, chosen = far, sequence
    return chosen


@compiled
def _grow(words: Words, room: npt.NDArray[np.int64], found: Groups) -> None:
    """Seeds that overlap least, then always the sequence and group that add fewest experts."""
    count, groups = len(words), len(room)
    union, left = np.zeros((groups, words.shape[1]), dtype=np.uint64), room.copy()
    cost = np.full((count, groups), -1, dtype=np.int64)
    for place in range(count):
        chosen, where, least = -1, place, 1 << 30
        if place < groups:
            chosen = _seed(words, union, place, found)
        else:
            for cell in range(count * groups):
                sequence, number = divmod(cell, groups)
                if found[sequence] < 0 and left[number] > 0:
                    if cost[sequence, number] < 0:
                        cost[sequence, number] = _added(words[sequence], union[number])
                    if cost[sequence, number] < least:
                        least, chosen, where = cost[sequence, number], sequence, number
        found[chosen] = where
        union[where] |= words[chosen]
        left[where] -= 1
        cost[:, where] = -1


@compiled
def _swap(words: Words, groups: int, passes: int, found: Groups) -> None:
    """Swap pairs of sequences as long as one saves experts: for one sequence after the other the best partner."""
    count, width = words.shape
    any_, twice = np.zeros((groups, width), dtype=np.uint64), np.zeros((groups, width), dtype=np.uint64)
    for number in range(groups):
        _recount(words, found, number, any_, twice)
    for _ in range(passes):
        changed = False
        for first in range(count):
            mine = found[first]
            best, partner = 0, -1
            for second in range(count):
                theirs = found[second]
                if theirs == mine:
                    continue
                saved = 0
                for place in range(width):
                    a, b = words[first, place], words[second, place]
                    # without its leaver a group has what others of it use, and what it uses twice
                    rest_a = (any_[mine, place] & ~a) | twice[mine, place]
                    rest_b = (any_[theirs, place] & ~b) | twice[theirs, place]
                    saved += _size(any_[mine, place]) + _size(any_[theirs, place])
                    saved -= _size(rest_a | b) + _size(rest_b | a)
                if saved > best:
                    best, partner = saved, second
            if partner >= 0:
                theirs = found[partner]
                found[first], found[partner] = theirs, mine
                _recount(words, found, mine, any_, twice)
                _recount(words, found, theirs, any_, twice)
                changed = True
        if not changed:
            return


def swaps(words: Words, groups: int) -> Groups:
    """Ours: farthest seeds, greedy growth, then swaps; from the order of arrival too, and the better of both."""
    grown = np.full(len(words), -1, dtype=np.int64)
    _grow(words, sizes(len(words), groups), grown)
    starts = [grown, in_order(len(words), groups)]
    for found in starts:
        _swap(words, groups, _PASSES, found)
    return min(starts, key=lambda found: activated(words, found, groups))


METHODS: Mapping[str, Callable[[Words, int], Groups]] = MappingProxyType({"similar": similar, "swaps": swaps})
"""How sequences are grouped, by name."""
