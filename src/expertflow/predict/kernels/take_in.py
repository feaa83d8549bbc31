"""The first launch of a predictor's step: tokens and routes go to the state, and each head looks back at past positions.

Must not know files and sequences. Shapes as in `predict.model`, with B state rows and R decays.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from expertflow.predict.artifact import Artifact
from expertflow.predict.kernels.shared import embed, fade, power_of_two, project
from expertflow.predict.model import FIXED, NEVER, PathPredictor
from expertflow.predict.state import State

_NEVER, _FIXED = tl.constexpr(NEVER), tl.constexpr(float(FIXED))
_FAN = tl.constexpr(256)
"""Keys a round of a search looks at."""


class TakenIn(NamedTuple):
    """What the later launches of a step need.

    Attributes:
        used: float32 `[B, L E]`, 1 for the experts of the last step.
        sources: float32 `[B, R + 2 A, L E]`: the faded averages; room for what is copied.
        embedded: float32 `[B, 3 D]`, embeddings of the token and the two before it.
        amounts: int32 `[B, 2 A, M]`, shares of the positions that are copied, in multiples of 1 / `FIXED`.
        places: int32 `[B, 2 A, M]`, their places in the ring.
        recalled: int32 `[B, 2]`, entries of the token's and of the pair's counts.
    """

    used: Tensor
    sources: Tensor
    embedded: Tensor
    amounts: Tensor
    places: Tensor
    recalled: Tensor


@triton.jit
def _remember(
    routes, rates, held_routes, faded, used, sources, b, row, last, layer,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, window: tl.constexpr,
    decays: tl.constexpr, rp: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """One layer of one row: write its last routing to the ring, and update the faded averages with it."""
    lane = tl.arange(0, ep)
    mask = lane < experts
    hot = lane < 0
    for k in tl.static_range(top_k):
        route = tl.load(routes + (b * layers + layer) * top_k + k)
        hot = hot | (lane == route)
        place = ((row * window + last) * layers + layer) * top_k + k
        tl.store(held_routes + place, route.to(held_routes.dtype.element_ty))
    mark = hot.to(tl.float32)
    tl.store(used + (b * layers + layer) * experts + lane, mark, mask=mask)
    decay = tl.arange(0, rp)
    rate = tl.load(rates + decay, mask=decay < decays, other=0.0)[:, None]
    where = (decay[:, None] * layers + layer) * experts + lane[None, :]
    both = (decay < decays)[:, None] & mask[None, :]
    at = faded + row * (decays * layers * experts) + where
    old = tl.load(at, mask=both, other=0.0)
    tl.debug_barrier()  # small tiles are loaded by several threads and stored by one
    new = fade(old, mark[None, :], rate)
    tl.store(at, new, mask=both)
    tl.store(sources + b * (count * layers * experts) + where, new, mask=both)


@triton.jit
def _choose(
    score, place, none, here, amounts, places, at,
    matches: tl.constexpr, mp: tl.constexpr, window: tl.constexpr, further: tl.constexpr,
):  # fmt: skip
    """Choose the best places of a ring, the lower one of two equals first, and their shares in multiples of 1 / `FIXED`.

    Writes both to `at`, and `further` behind it the places that follow them, with a share of 0 where none does.
    """
    slot = tl.arange(0, mp)
    chosen = tl.full([mp], float("-inf"), tl.float32)
    found = tl.zeros([mp], tl.int32)
    for match in tl.static_range(matches):
        best, index = tl.max(score, 0, return_indices=True)
        chosen = tl.where(slot == match, best, chosen)
        found = tl.where(slot == match, tl.minimum(index, window - 1), found)
        score = tl.where(place == index, float("-inf"), score)
    top = tl.maximum(tl.max(chosen, 0), none)
    weight = tl.exp(chosen - top)
    share = weight / (tl.sum(weight, 0) + tl.exp(none - top))
    amount = (share * _FIXED).to(tl.int32)
    since = here - found
    followed = tl.where(since < 0, since + window, since) >= 2
    mask = slot < matches
    tl.store(amounts + at + slot, amount, mask=mask)
    tl.store(places + at + slot, found, mask=mask)
    tl.store(amounts + at + further + slot, tl.where(followed, amount, 0), mask=mask)
    tl.store(places + at + further + slot, (found + 1) % window, mask=mask)


@triton.jit
def _look_back(
    seen, table, query, key, bonus, held_tokens, held_before, held_keys, embedded, amounts, places,
    b, row, taken, token, head,
    vocabulary: tl.constexpr, table_rows: tl.constexpr, hashed: tl.constexpr, emb: tl.constexpr, embp: tl.constexpr,
    heads: tl.constexpr, matches: tl.constexpr, mp: tl.constexpr, window: tl.constexpr, wp: tl.constexpr,
    depth: tl.constexpr, dp: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """One head of one row: write its key to the ring; choose which past positions to copy, and how much of each.

    Other programs write to the ring at the place of this token, which no program reads.
    """
    here = (taken % window).to(tl.int32)
    last = (here + window - 1) % window
    ring, own = row * window, (row * heads + head) * window
    before = tl.load(held_tokens + ring + last)
    cell, deep, place = tl.arange(0, embp), tl.arange(0, dp), tl.arange(0, wp)
    inside = place < window
    keys = tl.load(
        held_keys + (own + place[:, None]) * depth + deep[None, :],
        mask=inside[:, None] & (deep < depth)[None, :],
        other=0.0,
    )
    tokens = tl.load(held_tokens + ring + place, mask=inside, other=-1)
    befores = tl.load(held_before + ring + place, mask=inside, other=-1)
    alike, twice = tl.load(bonus + head), tl.load(bonus + heads + head)
    distance, none = tl.load(bonus + 2 * heads + head), tl.load(bonus + 3 * heads + head)
    one = embed(seen, table, token, cell, vocabulary, table_rows, hashed, emb)
    two = embed(seen, table, before, cell, vocabulary, table_rows, hashed, emb)
    line = head * depth + deep
    wanted = project(query, line, deep < depth, one, two, cell, emb)
    own_key = project(key, line, deep < depth, one, two, cell, emb)
    tl.store(held_keys + (own + here) * depth + deep, own_key, mask=deep < depth)
    if head == 0:
        second = tl.load(held_before + ring + last)
        three = embed(seen, table, second, cell, vocabulary, table_rows, hashed, emb)
        at = embedded + b * (3 * emb) + cell
        tl.store(at, one, mask=cell < emb)
        tl.store(at + emb, two, mask=cell < emb)
        tl.store(at + 2 * emb, three, mask=cell < emb)
        tl.store(held_tokens + ring + here, token)
        tl.store(held_before + ring + here, before)
    age = here - place
    age = tl.where(age < 0, age + window, age)
    same = (tokens == token) & (token >= 0)
    score = tl.sum(keys * wanted[None, :], axis=1) / scale
    score = score + tl.where(same, alike, 0.0) + tl.where(same & (befores == before), twice, 0.0)
    score = score + distance * age.to(tl.float32)
    score = tl.where((age < 1) | (age > taken), _NEVER, score)
    score = tl.where(inside, score, float("-inf"))
    at = (b * 2 * heads + head) * matches
    _choose(score, place, none, here, amounts, places, at, matches, mp, window, heads * matches)


@triton.jit
def recall(
    token_row, pair_key, recalled, b, token, before, vocabulary: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """Find the counts of one row's token and pair: their entry numbers, the last entry where there is none."""
    known = (token >= 0) & (token < vocabulary)
    tl.store(recalled + 2 * b, tl.load(token_row + tl.where(known, token, vocabulary)))
    wanted = tl.where(known & (before >= 0), before * vocabulary + token, -1)
    lane = tl.arange(0, _FAN)
    low = tl.zeros([], tl.int32)
    length = low + pairs
    while length > 0:  # the first key that is not less is `low` to `low + length`
        step = tl.cdiv(length, _FAN)
        inside = lane * step < length
        less = inside & (tl.load(pair_key + low + lane * step, mask=inside, other=0) < wanted)
        count = tl.sum(less.to(tl.int32), 0)
        passed = tl.where(count > 0, (count - 1) * step + 1, 0)
        length = tl.where(count > 0, tl.minimum(step - 1, length - passed), 0)
        low += passed
    place = tl.minimum(low, pairs - 1)
    tl.store(recalled + 2 * b + 1, tl.where(tl.load(pair_key + place) == wanted, place, pairs - 1))


# many parameters: one launch in place of three, because a launch takes longer than this work
@triton.jit(do_not_specialize_on_alignment=["rows", "tokens", "routes"])
def _take_in(
    rows, tokens, routes, taken, held_tokens, held_before, held_keys, held_routes, faded,
    rates, seen, table, query, key, bonus, token_row, pair_key,
    used, sources, embedded, amounts, places, recalled,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, decays: tl.constexpr,
    rp: tl.constexpr, count: tl.constexpr, vocabulary: tl.constexpr, table_rows: tl.constexpr, hashed: tl.constexpr, emb: tl.constexpr,
    embp: tl.constexpr, heads: tl.constexpr, matches: tl.constexpr, mp: tl.constexpr, window: tl.constexpr,
    wp: tl.constexpr, depth: tl.constexpr, dp: tl.constexpr, scale: tl.constexpr, pairs: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """All work on one row that needs only the state: program 0 finds the counts, then come the heads, then the layers.

    `taken` stays as it is until the last kernel, because all programs read it.
    """
    if early:
        gdc_launch_dependents()
    b, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b).to(tl.int64)
    now = tl.load(taken + row)
    if part > heads:
        last = (now + window - 1) % window
        _remember(
            routes, rates, held_routes, faded, used, sources, b, row, last, part - heads - 1,
            layers, experts, ep, top_k, window, decays, rp, count,
        )  # fmt: skip
    else:
        token = tl.load(tokens + b).to(tl.int64)
        if part > 0:
            _look_back(
                seen, table, query, key, bonus, held_tokens, held_before, held_keys, embedded, amounts, places,
                b, row, now, token, part - 1, vocabulary, table_rows, hashed, emb, embp, heads, matches, mp, window, wp,
                depth, dp, scale,
            )  # fmt: skip
        else:
            before = tl.load(held_tokens + row * window + (now + window - 1) % window)
            recall(token_row, pair_key, recalled, b, token, before, vocabulary, pairs)


def take_in(artifact: Artifact, state: State, rows: Tensor, tokens: Tensor, routes: Tensor, *, early: bool) -> TakenIn:
    """Update the state with a step's tokens, but for `state.taken`, and look back. Arguments as in `PathStep`.

    Args:
        artifact: one that `predict.kernels.path` serves.
        state: changed in place.
        rows: `[B]`, contiguous.
        tokens: `[B]`.
        routes: `[B, L, K]`.
        early: whether the kernel behind may be put on the device while this one runs.
    """
    model, memory, c = artifact.model, artifact.memory, artifact.config
    assert isinstance(model, PathPredictor)
    tokens, routes, like = tokens.contiguous(), routes.contiguous(), model.base
    batch, flat, decays, groups = len(rows), c.layers * c.experts, len(c.decays), 2 * c.heads
    used = like.new_empty(batch, flat)
    sources, embedded = like.new_empty(batch, decays + groups, flat), like.new_empty(batch, 3 * c.embedding)
    amounts, places, recalled = (
        like.new_empty(size, dtype=torch.int32)
        for size in ((batch, groups, c.matches), (batch, groups, c.matches), (batch, 2))
    )
    _take_in[(batch, 1 + c.heads + c.layers)](
        rows, tokens, routes, state.taken, state.tokens, state.before, state.keys, state.routes, state.faded,
        model.rates, model.table.vocabulary.seen.view(torch.uint8), model.table.table.weight, model.query.weight,
        model.key.weight, model.bonus, memory.token_row, memory.pair_key,
        used, sources, embedded, amounts, places, recalled,
        layers=c.layers, experts=c.experts, ep=power_of_two(c.experts), top_k=c.top_k, decays=decays,
        rp=power_of_two(decays), count=decays + groups, vocabulary=c.vocabulary, table_rows=model.table.entries,
        hashed=model.table.hashed, emb=c.embedding, embp=power_of_two(c.embedding), heads=c.heads, matches=c.matches,
        mp=power_of_two(c.matches), window=c.window, wp=power_of_two(c.window), depth=c.key, dp=power_of_two(c.key), scale=c.key**0.5,
        pairs=len(memory.pair_key), early=early, num_warps=8 if power_of_two(c.window) * power_of_two(c.key) > 8192 else 4,
    )  # fmt: skip
    return TakenIn(used, sources, embedded, amounts, places, recalled)
