"""How a routing path predictor takes prompts in: many tokens of several sequences, in two kernels.

In torch it is some seventy small operations whose launches a pass over prompts waits for, and room for every token's marks. Here one
program goes through a sequence's tokens for each layer, as steps would, and one a token and head makes its key. Knows tensors; refuses to
know files and sequences. Shapes as in `predict.model`: B pieces, N tokens, L layers, E experts, K experts a token, A heads, W window, D key
width, R decays.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def embed(
    seen, table, token, cell, vocabulary: tl.constexpr, rows: tl.constexpr, hashed: tl.constexpr, emb: tl.constexpr
):
    """`TokenTable.forward` of one token."""
    inside = (token >= 0) & (token < vocabulary)
    known = inside & (tl.load(seen + tl.where(inside, token, vocabulary)) != 0)
    first = (token * 2654435761 >> 8) % rows if hashed else token
    first = tl.where(known, first, rows)
    result = tl.load(table + first * emb + cell, mask=cell < emb, other=0.0)
    if hashed:
        second = tl.where(known, (token * 40503 + 12345 >> 3) % rows, rows)
        result += tl.load(table + second * emb + cell, mask=cell < emb, other=0.0)
    return result


@triton.jit
def project(weight, line, inside, one, two, cell, emb: tl.constexpr):
    """Rows `line` of a weight `[*, 2 emb]` times two embeddings."""
    mask = inside[:, None] & (cell < emb)[None, :]
    at = weight + line[:, None] * (2 * emb) + cell[None, :]
    left = tl.load(at, mask=mask, other=0.0)
    right = tl.load(at + emb, mask=mask, other=0.0)
    return tl.sum(left * one[None, :] + right * two[None, :], axis=1)


@triton.jit
def fade(old, mark, rate):
    """`torch.lerp(mark, old, rate)`."""
    return tl.where(rate < 0.5, mark + rate * (old - mark), old - (old - mark) * (1.0 - rate))


# the parts of a slip start anywhere, and sequences come in any number: no kernel is compiled anew for them
@triton.jit(do_not_specialize_on_alignment=["rows", "counts", "begins", "routes", "firsts"])
def _fade(
    rows, counts, begins, routes, rates, taken, held_tokens, held_routes, faded, firsts,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, window: tl.constexpr,
    decays: tl.constexpr, rp: tl.constexpr,
):  # fmt: skip
    """One layer of one piece: its routings, token by token, go to the faded averages, and the newest ones to the ring.

    The first layer's program also says which token comes before the piece: keys that are made next write over it.
    """
    b, layer = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b).to(tl.int64)
    now = tl.load(taken + row)
    if layer == 0:
        tl.store(firsts + b, tl.load(held_tokens + row * window + (now + window - 1) % window))
    begin, count = tl.load(begins + b), tl.load(counts + b)
    lane, turn = tl.arange(0, ep), tl.arange(0, rp)
    rate = tl.load(rates + turn, mask=turn < decays, other=0.0)[:, None]
    both = (turn < decays)[:, None] & (lane < experts)[None, :]
    at = faded + row * (decays * layers * experts) + (turn[:, None] * layers + layer) * experts + lane[None, :]
    average = tl.load(at, mask=both, other=0.0)
    tl.debug_barrier()  # small tiles are loaded by several threads and stored by one
    step = tl.zeros([], tl.int64)
    while step < count:
        hot = lane < 0
        place = ((row * window + (now + step + window - 1) % window) * layers + layer) * top_k
        newest = count - step <= window
        for k in tl.static_range(top_k):
            route = tl.load(routes + ((begin + step) * layers + layer) * top_k + k)
            hot = hot | (lane == route)
            tl.store(held_routes + place + k, route.to(held_routes.dtype.element_ty), mask=newest)
        mark = hot.to(tl.float32)[None, :]
        average = fade(average, mark, rate)
        step += 1
    tl.store(at, average, mask=both)


@triton.jit(do_not_specialize_on_alignment=["rows", "owner", "place", "left", "tokens", "firsts"])
def _key(
    rows, owner, place, left, tokens, taken, held_tokens, held_before, held_keys, firsts, seen, table, key,
    vocabulary: tl.constexpr, table_rows: tl.constexpr, hashed: tl.constexpr, emb: tl.constexpr, embp: tl.constexpr,
    heads: tl.constexpr, window: tl.constexpr, depth: tl.constexpr, dp: tl.constexpr,
):  # fmt: skip
    """One head of one token: its key goes to the ring, if the ring keeps it."""
    n, head = tl.program_id(0), tl.program_id(1)
    if tl.load(left + n) < window:
        b, step = tl.load(owner + n), tl.load(place + n)
        row = tl.load(rows + b).to(tl.int64)
        here = (tl.load(taken + row) + step) % window
        token = tl.load(tokens + n).to(tl.int64)
        before = tl.load(firsts + b)
        if step > 0:
            before = tl.load(tokens + n - 1).to(tl.int64)
        cell, deep = tl.arange(0, embp), tl.arange(0, dp)
        one = embed(seen, table, token, cell, vocabulary, table_rows, hashed, emb)
        two = embed(seen, table, before, cell, vocabulary, table_rows, hashed, emb)
        told = project(key, head * depth + deep, deep < depth, one, two, cell, emb)
        tl.store(held_keys + ((row * heads + head) * window + here) * depth + deep, told, mask=deep < depth)
        if head == 0:
            tl.store(held_tokens + row * window + here, token)
            tl.store(held_before + row * window + here, before)


def absorb(artifact: Any, state: Any, pieces: Any, tokens: Tensor, routes: Tensor) -> None:
    """`PathPredictor.absorb` of an artifact that `predict.kernels.path` serves: the state that notes, token by token, would leave.

    Args:
        artifact: a `predict.artifact.Artifact`.
        state: a `predict.model.State`, changed in place.
        pieces: a `predict.model.Pieces`, whose the tokens are.
        tokens: int64 `[N]`, the next tokens of each sequence; -1 unknown.
        routes: integer `[N, L, K]`, the true routing of the token before each of them; E where there is none.
    """
    model, c = artifact.model, artifact.config
    if not len(tokens):
        return
    tokens, routes = tokens.contiguous(), routes.contiguous()
    firsts = torch.empty_like(pieces.rows)
    _fade[(len(pieces.rows), c.layers)](
        pieces.rows, pieces.counts, pieces.begins, routes, model.rates, state.taken, state.tokens, state.routes, state.faded,
        firsts, layers=c.layers, experts=c.experts, ep=power_of_two(c.experts), top_k=c.top_k, window=c.window,
        decays=len(c.decays), rp=power_of_two(len(c.decays)),
    )  # fmt: skip
    _key[(len(tokens), c.heads)](
        pieces.rows, pieces.owner, pieces.place, pieces.left, tokens, state.taken, state.tokens, state.before, state.keys,
        firsts, model.table.vocabulary.seen.view(torch.uint8), model.table.table.weight, model.key.weight,
        vocabulary=c.vocabulary, table_rows=model.table.rows, hashed=model.table.hashed, emb=c.embedding,
        embp=power_of_two(c.embedding), heads=c.heads, window=c.window, depth=c.key, dp=power_of_two(c.key),
    )  # fmt: skip
    state.taken.index_add_(0, pieces.rows, pieces.counts)


def power_of_two(size: int) -> int:
    """The next power of two."""
    return int(triton.next_power_of_2(size))
