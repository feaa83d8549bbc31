"""What frequent tokens and pairs of tokens used, by plain counting: a memory beside the network.

An embedding of a few dozen numbers cannot hold what a token that was seen a thousand times does in every layer; an
entry of its own can. Tokens and pairs get entries in the order of their frequency, as far as there is room. An entry
holds log odds against what is expected otherwise, in eight bits. Its weight beside the network's logit is fitted on
passages that were not counted (`calibration.calibrate`). Must not know networks.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expertflow.predict.dataset import Passage, Shape, used

SOURCES = 2
"""Entries looked up for a token: its own, and that of the pair with the token before it."""
_PRIOR = 1.0
"""Weight of what is expected otherwise, in tokens."""
_LEAST = 2
"""Occurrences from which a token or a pair may have an entry."""
LARGEST_ODDS = 8.0
"""Log odds are kept between minus and plus this."""


class Memory(nn.Module):
    """Entries of tokens and of pairs, found by id; others have an entry of zeros.

    Args:
        shape: of the routes.
        vocabulary: token ids.
        tokens: entries of tokens.
        pairs: entries of pairs.
    """

    def __init__(self, shape: Shape, vocabulary: int, tokens: int, pairs: int) -> None:
        """Allocate entries of zeros."""
        super().__init__()
        self.vocabulary = vocabulary
        self.token_row: Tensor
        self.token_odds: Tensor
        self.pair_key: Tensor
        self.pair_odds: Tensor
        self.register_buffer("token_row", torch.full((vocabulary + 1,), tokens, dtype=torch.int32))
        self.register_buffer("token_odds", torch.zeros(tokens + 1, shape.layers, shape.experts, dtype=torch.int8))
        self.register_buffer("pair_key", torch.full((pairs + 1,), torch.iinfo(torch.int64).max))
        self.register_buffer("pair_odds", torch.zeros(pairs + 1, shape.layers, shape.experts, dtype=torch.int8))

    def forward(self, tokens: Int[Tensor, "*T"], before: Int[Tensor, "*T"]) -> Float[Tensor, "*T S L E"]:
        """Log odds of the token's entry and of the pair's; zeros where there is none.

        Args:
            tokens: ids, -1 unknown.
            before: the token before each.
        """
        known = (tokens >= 0) & (tokens < self.vocabulary)
        inside = torch.where(known, tokens, self.vocabulary)
        key = torch.where(known & (before >= 0), before * self.vocabulary + tokens, -1)
        place = torch.searchsorted(self.pair_key, key)
        last = self.pair_key.shape[0] - 1
        pair = torch.where(self.pair_key[place.clamp(max=last)] == key, place, last)
        odds = torch.stack([self.token_odds[self.token_row[inside].long()], self.pair_odds[pair]], dim=-3)
        return odds.float() * (LARGEST_ODDS / 127)


def remember(items: Sequence[Passage], shape: Shape, vocabulary: int, room: int) -> Memory:
    """Count what tokens and pairs of passages used.

    Args:
        items: what is learned from.
        shape: of their routes.
        vocabulary: token ids.
        room: bytes of all entries, one a layer and expert; too few for two entries: none.
    """
    entries = room // (shape.layers * shape.experts)
    if entries < 2:
        return Memory(shape, vocabulary, 0, 0)
    tokens = np.concatenate([item.tokens for item in items])
    pairs = np.concatenate([_pairs(item.tokens, vocabulary) for item in items])
    marks = np.concatenate([used(item.routes, shape.experts) for item in items])
    ids, counts = _most_used(tokens, entries // 2)
    keys, pair_counts = _most_used(pairs, entries - len(ids))
    memory = Memory(shape, vocabulary, len(ids), len(keys))
    base = (marks.mean(axis=0, dtype=np.float64) * len(marks) + shape.top_k / shape.experts) / (len(marks) + 1)
    likely = (_sums(tokens, ids, marks) + _PRIOR * base) / (counts + _PRIOR)[:, None, None]
    memory.token_row[torch.from_numpy(ids)] = torch.arange(len(ids), dtype=torch.int32)
    memory.token_odds[:-1] = _packed(_odds(likely) - _odds(base))
    entry = memory.token_row[torch.from_numpy(keys % vocabulary)].numpy()
    otherwise = np.concatenate([likely, base[None]])[entry]
    paired = (_sums(pairs, keys, marks) + _PRIOR * otherwise) / (pair_counts + _PRIOR)[:, None, None]
    memory.pair_key[:-1] = torch.from_numpy(keys)
    memory.pair_odds[:-1] = _packed(_odds(paired) - _odds(otherwise))
    return memory


def _pairs(tokens: npt.NDArray[np.int64], vocabulary: int) -> npt.NDArray[np.int64]:
    """A number for each token and the one before it, -1 if one is unknown."""
    before = np.concatenate([[-1], tokens[:-1]])
    return np.where((tokens >= 0) & (before >= 0), before * vocabulary + tokens, -1)


def _most_used(keys: npt.NDArray[np.int64], entries: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The most frequent keys, in ascending order, and how often each occurs."""
    found, counts = np.unique(keys[keys >= 0], return_counts=True)
    chosen = np.argsort(-counts, kind="stable")[:entries]
    chosen = np.sort(chosen[counts[chosen] >= _LEAST])
    return found[chosen], counts[chosen]


def _sums(
    keys: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """`[R, L, E]` how often each wanted key's tokens used each expert."""
    place = np.searchsorted(wanted, keys)
    place[place == len(wanted)] = 0
    known = np.flatnonzero(wanted[place] == keys) if len(wanted) else np.empty(0, dtype=np.int64)
    order = known[np.argsort(place[known], kind="stable")]
    total = np.zeros((len(wanted), *marks.shape[1:]))
    if len(order):
        starts = np.flatnonzero(np.diff(place[order], prepend=-1))
        total[place[order[starts]]] = np.add.reduceat(marks[order], starts, axis=0, dtype=np.float64)
    return total


def _odds(chance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    safe = np.clip(chance, 1e-4, 1 - 1e-4)
    logit: npt.NDArray[np.float64] = np.log(safe / (1 - safe))
    return logit


def _packed(odds: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.round(np.clip(odds, -LARGEST_ODDS, LARGEST_ODDS) * (127 / LARGEST_ODDS)).astype(np.int8))
