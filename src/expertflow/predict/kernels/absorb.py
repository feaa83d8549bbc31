"""How a routing path predictor takes prompts in: many tokens of several sequences, in two kernels.

In torch these are some seventy small operations, whose launches delay a pass over prompts, and memory for every token's
marks. Here one program per piece and layer goes through the piece's tokens, as steps would; one per token and head
makes its key. Must not know files and sequences. Shapes as in `predict.state`: B pieces, N tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertflow.predict.artifact import Artifact
from expertflow.predict.kernels.shared import embed, fade, power_of_two, project
from expertflow.predict.model import PathPredictor
from expertflow.predict.state import Pieces, State


# buffers of inputs begin at any address, and sequences come in any number: no kernel is compiled anew for them
@triton.jit(do_not_specialize_on_alignment=["rows", "counts", "begins", "routes", "firsts"])
def _fade(
    rows, counts, begins, routes, rates, taken, held_tokens, held_routes, faded, firsts,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, window: tl.constexpr,
    decays: tl.constexpr, rp: tl.constexpr,
):  # fmt: skip
    """One layer of one piece: update the faded averages with its routing, token by token, and write the newest to the ring.

    The first layer's program also writes to `firsts` which token comes before the piece, because the next kernel overwrites it.
    """
    b, layer = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b).to(tl.int64)
    now = tl.load(taken + row)
    if layer == 0:
        tl.store(firsts + b, tl.load(held_tokens + row * window + (now + window - 1) % window))
    begin, count = tl.load(begins + b), tl.load(counts + b)
    lane, decay = tl.arange(0, ep), tl.arange(0, rp)
    rate = tl.load(rates + decay, mask=decay < decays, other=0.0)[:, None]
    both = (decay < decays)[:, None] & (lane < experts)[None, :]
    at = faded + row * (decays * layers * experts) + (decay[:, None] * layers + layer) * experts + lane[None, :]
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
    """One head of one token: write its key to the ring, if the ring keeps the token."""
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
        own = project(key, head * depth + deep, deep < depth, one, two, cell, emb)
        tl.store(held_keys + ((row * heads + head) * window + here) * depth + deep, own, mask=deep < depth)
        if head == 0:
            tl.store(held_tokens + row * window + here, token)
            tl.store(held_before + row * window + here, before)


def absorb(artifact: Artifact, state: State, pieces: Pieces, tokens: Tensor, routes: Tensor) -> None:
    """`PathPredictor.absorb` as kernels: update the state as `PathStep.update` would, token by token.

    Args:
        artifact: one that `predict.kernels.path` serves.
        state: changed in place.
        pieces: which sequence each token belongs to.
        tokens: int64 `[N]`, the next tokens of each sequence; -1 unknown.
        routes: integer `[N, L, K]`, the true routing of the token before each of them; E where there is none.
    """
    model, c = artifact.model, artifact.config
    assert isinstance(model, PathPredictor)
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
        vocabulary=c.vocabulary, table_rows=model.table.entries, hashed=model.table.hashed, emb=c.embedding,
        embp=power_of_two(c.embedding), heads=c.heads, window=c.window, depth=c.key, dp=power_of_two(c.key),
    )  # fmt: skip
    state.taken.index_add_(0, pieces.rows, pieces.counts)
