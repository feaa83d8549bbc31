"""A step of the routing path predictor in nine launches: the device twin of `predict.model` and what it is weighed with.

A step is some 130 small tensor operations whose launches take longer than their work. Here each stage is one launch:
take tokens and routes in and look back, pour what was found, read, two residual blocks, judge, decide. A program holds
a tile of weights in registers and goes through rows one by one, so a row's bits depend on no other row. Reads weights
where they are. Knows tensors; refuses to know files, sequences and training. Shapes as in `predict.model`: B rows,
L layers, E experts, K experts a token, O outputs, A heads, M matches, W window, D key width, R decays, S = R + 2 A.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.predict.kernels.absorb import absorb, embed, fade, power_of_two, project

FLOOR, NEVER, FIXED, RANGE = 0.02, -1e4, 1 << 20, 8.0
"""As `predict.model._FLOOR`, `_NEVER`, `_FIXED` and `predict.counts._RANGE` say."""
_FLOOR, _NEVER, _FIXED = tl.constexpr(FLOOR), tl.constexpr(NEVER), tl.constexpr(float(FIXED))
_STEP = tl.constexpr(RANGE / 127)
_FAN = tl.constexpr(256)
"""Keys a round of a search looks at."""
_PARTS = tl.constexpr(4)
"""Vectors the first block's input is the sum of: tokens, last step, slow average, copies."""
_TURNS = 4
"""Programs that load the same tile of weights at most, each for its share of the rows."""
_MOST = {
    "experts": 512, "window": 1024, "width": 512, "embedding": 256, "heads": 16, "matches": 32, "key": 32, "top_k": 32,
}  # fmt: skip
"""The largest sizes whose tiles fit in registers."""
_MOST_MARKS = 128
"""Matches times experts a token."""


@triton.jit
def _begin(early: tl.constexpr):
    """Wait for the kernel before; let the one behind be put on the device."""
    if early:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _remember(
    routes, rates, held_routes, faded, used, sources, b, row, last, layer,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, window: tl.constexpr,
    decays: tl.constexpr, rp: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """One layer of one row: its last routing goes to the ring and the faded averages."""
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
    turn = tl.arange(0, rp)
    rate = tl.load(rates + turn, mask=turn < decays, other=0.0)[:, None]
    where = (turn[:, None] * layers + layer) * experts + lane[None, :]
    both = (turn < decays)[:, None] & mask[None, :]
    at = faded + row * (decays * layers * experts) + where
    old = tl.load(at, mask=both, other=0.0)
    tl.debug_barrier()  # small tiles are loaded by several threads and stored by one
    new = fade(old, mark[None, :], rate)
    tl.store(at, new, mask=both)
    tl.store(sources + b * (count * layers * experts) + where, new, mask=both)


@triton.jit
def _choose(
    score, place, nobody, here, amounts, places, at,
    matches: tl.constexpr, mp: tl.constexpr, window: tl.constexpr, further: tl.constexpr,
):  # fmt: skip
    """The best places of a ring, the lowest first where two are alike, and their shares in multiples of 1 / `FIXED`.

    Both are written to `at`, and `further` behind it the places that follow them, without a share where none does.
    """
    slot = tl.arange(0, mp)
    chosen = tl.full([mp], float("-inf"), tl.float32)
    found = tl.zeros([mp], tl.int32)
    for turn in tl.static_range(matches):
        best, index = tl.max(score, 0, return_indices=True)
        chosen = tl.where(slot == turn, best, chosen)
        found = tl.where(slot == turn, tl.minimum(index, window - 1), found)
        score = tl.where(place == index, float("-inf"), score)
    top = tl.maximum(tl.max(chosen, 0), nobody)
    weight = tl.exp(chosen - top)
    share = weight / (tl.sum(weight, 0) + tl.exp(nobody - top))
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
    """One head of one row: its key goes to the ring; which past positions it copies, and how much of each.

    What other programs write to the ring meanwhile is the place of this token, which is not asked for.
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
    distance, nobody = tl.load(bonus + 2 * heads + head), tl.load(bonus + 3 * heads + head)
    one = embed(seen, table, token, cell, vocabulary, table_rows, hashed, emb)
    two = embed(seen, table, before, cell, vocabulary, table_rows, hashed, emb)
    line = head * depth + deep
    asked = project(query, line, deep < depth, one, two, cell, emb)
    told = project(key, line, deep < depth, one, two, cell, emb)
    tl.store(held_keys + (own + here) * depth + deep, told, mask=deep < depth)
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
    score = tl.sum(keys * asked[None, :], axis=1) / scale
    score = score + tl.where(same, alike, 0.0) + tl.where(same & (befores == before), twice, 0.0)
    score = score + distance * age.to(tl.float32)
    score = tl.where((age < 1) | (age > taken), _NEVER, score)
    score = tl.where(inside, score, float("-inf"))
    at = (b * 2 * heads + head) * matches
    _choose(score, place, nobody, here, amounts, places, at, matches, mp, window, heads * matches)


@triton.jit
def _recall(
    token_row, pair_key, recalled, b, token, before, vocabulary: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """The memory's row numbers of one row's token and pair, the last ones where there is none."""
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
    """Everything of one row that needs only the state: program 0 recalls, then come the heads, then the layers.

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
            _recall(token_row, pair_key, recalled, b, token, before, vocabulary, pairs)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _pour(
    rows, held_routes, amounts, places, sources,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, decays: tl.constexpr,
    groups: tl.constexpr, matches: tl.constexpr, window: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One layer of one group of one row: the found positions' shares, summed expert by expert as whole numbers."""
    b, group, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + b).to(tl.int64)
    _begin(early)
    lane = tl.arange(0, ep)
    total = tl.zeros([ep], tl.int32)
    for match in tl.static_range(matches):
        at = (b * groups + group) * matches + match
        amount = tl.load(amounts + at)
        place = ((row * window + tl.load(places + at)) * layers + layer) * top_k
        for k in tl.static_range(top_k):
            total += tl.where(lane == tl.load(held_routes + place + k).to(tl.int32), amount, 0)
    out = sources + ((b * (decays + groups) + decays + group) * layers + layer) * experts + lane
    tl.store(out, total.to(tl.float32) / _FIXED, mask=lane < experts)


@triton.jit
def _matvec(weight, x, line, n: tl.constexpr, k: tl.constexpr, copies: tl.constexpr, block: tl.constexpr):
    """Rows `line` of a weight `[n, k]` times the mean of `copies` vectors of k elements, one behind the other."""
    acc = tl.zeros([line.shape[0], block], tl.float32)
    for begin in range(0, k, block):
        cell = begin + tl.arange(0, block)
        mask = (line < n)[:, None] & (cell < k)[None, :]
        tile = tl.load(weight + line[:, None] * k + cell[None, :], mask=mask, other=0.0)
        value = tl.load(x + cell, mask=cell < k, other=0.0)
        for more in tl.static_range(1, copies):
            value += tl.load(x + more * k + cell, mask=cell < k, other=0.0)
        acc += tile * (value / copies)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=["count", "turn"])
def _read(
    embedded, used, sources, tokens_weight, tokens_bias, last_weight, slow_weight, copied_weight, parts, count, turn,
    flat: tl.constexpr, decays: tl.constexpr, heads: tl.constexpr, slow: tl.constexpr, emb: tl.constexpr,
    width: tl.constexpr, block: tl.constexpr, block_emb: tl.constexpr, block_flat: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """A block of the elements of one of the `_PARTS` vectors whose sum is everything that is known."""
    part = tl.program_id(2)
    line = tl.program_id(1) * block + tl.arange(0, block)
    bias = tl.load(tokens_bias + line, mask=line < width, other=0.0)
    _begin(early)
    b = tl.program_id(0) * turn
    end = tl.minimum(b + turn, count)
    while b < end:
        source = sources + b * (decays + 2 * heads) * flat
        if part == 0:
            out = _matvec(tokens_weight, embedded + b * (3 * emb), line, width, 3 * emb, 1, block_emb) + bias
        elif part == 1:
            out = _matvec(last_weight, used + b * flat, line, width, flat, 1, block_flat)
        elif part == 2:
            out = _matvec(slow_weight, source + slow * flat, line, width, flat, 1, block_flat)
        else:
            out = _matvec(copied_weight, source + decays * flat, line, width, flat, heads, block_flat)
        tl.store(parts + (b * _PARTS + part) * width + line, out, mask=line < width)
        b += 1


@triton.jit
def _tile(weight, line, cell, n: tl.constexpr, k: tl.constexpr):
    """Rows `line` of a weight `[n, k]`, zeros behind its edges."""
    mask = (line < n)[:, None] & (cell < k)[None, :]
    return tl.load(weight + line[:, None] * k + cell[None, :], mask=mask, other=0.0)


@triton.jit
def _total(x, cell, parts: tl.constexpr, width: tl.constexpr):
    """The sum of the vectors `[parts, width]`, in their order."""
    result = tl.load(x + cell, mask=cell < width, other=0.0)
    for part in tl.static_range(1, parts):
        result += tl.load(x + part * width + cell, mask=cell < width, other=0.0)
    return result


@triton.jit
def _norm(x, scale, shift, cell, width: tl.constexpr, eps: tl.constexpr):
    """LayerNorm; zeros behind the edge."""
    away = tl.where(cell < width, x - tl.sum(x, 0) / width, 0.0)
    return away * tl.rsqrt(tl.sum(away * away, 0) / width + eps) * scale + shift


@triton.jit(do_not_specialize=["count", "turn"])
def _up(
    x, scale, shift, weight, bias, inner, count, turn,
    parts: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, eps: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """First half of a residual block, `[B, parts, width]` to `[B, 2 width]`: norm, linear, GELU."""
    cell = tl.arange(0, padded)
    line = tl.program_id(1) * block + tl.arange(0, block)
    tile = _tile(weight, line, cell, 2 * width, width)
    plus = tl.load(bias + line, mask=line < 2 * width, other=0.0)
    scales = tl.load(scale + cell, mask=cell < width, other=0.0)
    shifts = tl.load(shift + cell, mask=cell < width, other=0.0)
    _begin(early)
    b = tl.program_id(0) * turn
    end = tl.minimum(b + turn, count)
    while b < end:
        z = _norm(_total(x + b * parts * width, cell, parts, width), scales, shifts, cell, width, eps)
        out = tl.sum(tile * z[None, :], axis=1) + plus
        out = 0.5 * out * (1 + tl.math.erf(out * 0.7071067811865476))
        tl.store(inner + b * (2 * width) + line, out, mask=line < 2 * width)
        b += 1


@triton.jit(do_not_specialize=["count", "turn"])
def _down(
    x, inner, weight, bias, out, count, turn,
    parts: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Second half: linear, added to the block's input."""
    cell = tl.arange(0, 2 * padded)
    line = tl.program_id(1) * block + tl.arange(0, block)
    tile = _tile(weight, line, cell, width, 2 * width)
    plus = tl.load(bias + line, mask=line < width, other=0.0)
    _begin(early)
    b = tl.program_id(0) * turn
    end = tl.minimum(b + turn, count)
    while b < end:
        value = tl.load(inner + b * (2 * width) + cell, mask=cell < 2 * width, other=0.0)
        change = tl.sum(tile * value[None, :], axis=1) + plus
        whole = _total(x + b * parts * width, line, parts, width) + change
        tl.store(out + b * width + line, whole, mask=line < width)
        b += 1


@triton.jit
def _apply(
    z, scales, shifts, weight, bias, out, block_number, count, turn,
    n: tl.constexpr, biased: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
    eps: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """A block of the n outputs of one linear layer of the normed vectors `[B, width]`."""
    cell = tl.arange(0, padded)
    line = block_number * block + tl.arange(0, block)
    tile = _tile(weight, line, cell, n, width)
    plus = tl.zeros([block], tl.float32)
    if biased:
        plus += tl.load(bias + line, mask=line < n, other=0.0)
    _begin(early)
    b = tl.program_id(0) * turn
    end = tl.minimum(b + turn, count)
    while b < end:
        value = _norm(_total(z + b * width, cell, 1, width), scales, shifts, cell, width, eps)
        tl.store(out + b * n + line, tl.sum(tile * value[None, :], axis=1) + plus, mask=line < n)
        b += 1


@triton.jit(do_not_specialize=["count", "turn"])
def _judge(
    z, scale, shift, trust_weight, trust_bias, now_weight, later_weight, later_bias, trust, now, later, count, turn,
    trusts: tl.constexpr, flat: tl.constexpr, laters: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, eps: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """What is made of the refined vector: trust in each source, this step's logits, a summary for each later output."""
    cell = tl.arange(0, padded)
    scales = tl.load(scale + cell, mask=cell < width, other=0.0)
    shifts = tl.load(shift + cell, mask=cell < width, other=0.0)
    number = tl.program_id(1)
    first: tl.constexpr = (trusts + block - 1) // block
    second: tl.constexpr = first + (flat + block - 1) // block
    if number < first:
        _apply(
            z, scales, shifts, trust_weight, trust_bias, trust, number, count, turn,
            trusts, True, width, padded, block, eps, early,
        )  # fmt: skip
    elif number < second:
        _apply(
            z, scales, shifts, now_weight, now_weight, now, number - first, count, turn,
            flat, False, width, padded, block, eps, early,
        )  # fmt: skip
    else:
        _apply(
            z, scales, shifts, later_weight, later_bias, later, number - second, count, turn,
            laters, True, width, padded, block, eps, early,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "turn"], do_not_specialize_on_alignment=["rows"])
def _decide(
    rows, taken, sources, trust, now, later, recalled, habit, base, spread, calibration, token_odds, pair_odds, out,
    count, turn,
    layers: tl.constexpr, experts: tl.constexpr, block: tl.constexpr, outputs: tl.constexpr, many: tl.constexpr,
    many_padded: tl.constexpr, depth: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Chances of a block of one layer's experts for one output; the tokens count as taken."""
    blocks: tl.constexpr = (experts + block - 1) // block
    layer, output = tl.program_id(1) // blocks, tl.program_id(2)
    lane = tl.program_id(1) % blocks * block + tl.arange(0, block)
    mask = lane < experts
    flat: tl.constexpr = layers * experts
    at, deep = layer * experts + lane, tl.arange(0, depth)
    tile = tl.load(spread + at[:, None] * depth + deep[None, :], mask=mask[:, None] & (output > 0), other=0.0)
    source = tl.arange(0, many_padded)
    both = (source < many)[:, None] & mask[None, :]
    habits = tl.load(habit + source[:, None] * flat + at[None, :], mask=both, other=0.0)
    shift = tl.load(base + output * flat + at, mask=mask, other=0.0)
    weights = calibration + output * layers + layer
    own, by_token = tl.load(weights), tl.load(weights + outputs * layers)
    by_pair, plus = tl.load(weights + 2 * outputs * layers), tl.load(weights + 3 * outputs * layers)
    _begin(early)
    b = tl.program_id(0) * turn
    end = tl.minimum(b + turn, count)
    while b < end:
        summary = tl.load(later + (b * (outputs - 1) + output - 1) * depth + deep, mask=output > 0, other=0.0)
        said = tl.load(now + b * flat + at, mask=mask & (output == 0), other=0.0) + tl.sum(
            tile * summary[None, :], axis=1
        )
        where = (b * many + source)[:, None] * flat + at[None, :]
        share = tl.load(sources + where, mask=both, other=0.0)
        own_trust = tl.load(
            trust + ((b * layers + layer) * outputs + output) * many + source, mask=source < many, other=0.0
        )
        weighed = tl.sum(tl.log(1 + share / _FLOOR) * habits * own_trust[:, None], axis=0)
        logit = weighed + said + shift
        token, pair = tl.load(recalled + 2 * b).to(tl.int64), tl.load(recalled + 2 * b + 1).to(tl.int64)
        result = plus + logit * own
        result += tl.load(token_odds + token * flat + at, mask=mask, other=0).to(tl.float32) * _STEP * by_token
        result += tl.load(pair_odds + pair * flat + at, mask=mask, other=0).to(tl.float32) * _STEP * by_pair
        tl.store(out + (b * outputs + output) * flat + at, tl.sigmoid(result), mask=mask)
        if (tl.program_id(1) == 0) & (output == 0):
            row = tl.load(rows + b).to(tl.int64)
            tl.store(taken + row, tl.load(taken + row) + 1)
        b += 1


def serves(artifact: Any) -> bool:
    """Whether a `predict.artifact.Artifact` is a path predictor of sizes whose tiles fit."""
    config = artifact.config
    if config.kind != "path":
        return False
    tensors = [*artifact.model.state_dict().values(), *artifact.memory.state_dict().values(), artifact.calibration]
    return (
        all(getattr(config, name) <= most for name, most in _MOST.items())
        and config.matches * config.top_k <= _MOST_MARKS
        and all(tensor.is_contiguous() for tensor in tensors)
        and all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())
    )


def path_step(artifact: Any) -> "PathStep | None":
    """The step of an artifact, on its device; None if it is not served."""
    return PathStep(artifact) if serves(artifact) else None


class PathStep:
    """`PathPredictor.feed` and `Artifact.probabilities` of a `predict.artifact.Artifact` that is served.

    Nine launches on the current stream, capturable. Weights are read where they are, also after they change in place.
    """

    def __init__(self, artifact: Any) -> None:
        """Nothing is copied or computed."""
        self._artifact = artifact
        self._early = _early(artifact.calibration)

    def __call__(self, state: Any, rows: Tensor, tokens: Tensor, routes: Tensor) -> Tensor:
        """One step.

        Args:
            state: a `predict.model.State`, changed in place.
            rows: integer `[B]`, which sequences, each at most once, but for one whose content is nobody's.
            tokens: int64 `[B]`, the tokens just sampled; -1 unknown.
            routes: integer `[B, L, K]`, the true routing of each sequence's token before; E where there is none.

        Returns:
            `[B, O, L, E]` float32, chances.
        """
        model, c = self._artifact.model, self._artifact.config
        memory, early, batch = self._artifact.memory, self._early, len(rows)
        rows = rows.contiguous()
        flat, outputs, decays = c.layers * c.experts, model.base.shape[0], len(c.decays)
        groups, trusts, laters = 2 * c.heads, model.trust.out_features, model.later.out_features
        like = model.base
        used, sources, embedded, amounts, places, recalled = self._take_in(state, rows, tokens, routes)
        now = like.new_empty(batch, flat)
        _pour[(batch, groups, c.layers)](
            rows, state.routes, amounts, places, sources,
            layers=c.layers, experts=c.experts, ep=power_of_two(c.experts), top_k=c.top_k, decays=decays, groups=groups,
            matches=c.matches, window=c.window, early=early, num_warps=1 if c.experts <= 128 else 4, launch_pdl=early,
        )  # fmt: skip
        turn = max(1, triton.cdiv(batch, _TURNS))
        turns = triton.cdiv(batch, turn)
        parts = like.new_empty(batch, _PARTS.value, c.width)
        _read[(turns, triton.cdiv(c.width, 4), _PARTS.value)](
            embedded, used, sources, model.read_tokens.weight, model.read_tokens.bias,
            *(read.weight for read in model.read_routes), parts, batch, turn,
            flat=flat, decays=decays, heads=c.heads, slow=min(2, decays - 1), emb=c.embedding, width=c.width, block=4,
            block_emb=min(1024, power_of_two(3 * c.embedding)), block_flat=min(1024, power_of_two(flat)), early=early,
            num_warps=4, launch_pdl=early,
        )  # fmt: skip
        z, padded = parts, power_of_two(c.width)
        for norm, up, _, _, down in model.blocks:
            inner, refined = like.new_empty(batch, 2 * c.width), like.new_empty(batch, 1, c.width)
            _up[(turns, triton.cdiv(2 * c.width, 8))](
                z, norm.weight, norm.bias, up.weight, up.bias, inner, batch, turn, parts=z.shape[1], width=c.width,
                padded=padded, block=8, eps=norm.eps, early=early, num_warps=4, launch_pdl=early,
            )  # fmt: skip
            _down[(turns, triton.cdiv(c.width, 4))](
                z, inner, down.weight, down.bias, refined, batch, turn, parts=z.shape[1], width=c.width,
                padded=padded, block=4, early=early, num_warps=4, launch_pdl=early,
            )  # fmt: skip
            z = refined
        trust, later = like.new_empty(batch, trusts), like.new_empty(batch, laters)
        block = 32
        blocks = sum(triton.cdiv(size, block) for size in (trusts, flat, laters))
        _judge[(turns, blocks)](
            z, model.norm.weight, model.norm.bias, model.trust.weight, model.trust.bias, model.now.weight,
            model.later.weight, model.later.bias, trust, now, later, batch, turn,
            trusts=trusts, flat=flat, laters=laters, width=c.width, padded=padded, block=block, eps=model.norm.eps,
            early=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
        out: Tensor = like.new_empty(batch, outputs, c.layers, c.experts)
        block = min(128, power_of_two(c.experts))
        _decide[(turns, c.layers * triton.cdiv(c.experts, block), outputs)](
            rows, state.taken, sources, trust, now, later, recalled, model.habit, model.base, model.spread.weight,
            self._artifact.calibration, memory.token_odds, memory.pair_odds, out, batch, turn,
            layers=c.layers, experts=c.experts, block=block, outputs=outputs, many=decays + groups,
            many_padded=power_of_two(decays + groups), depth=model.spread.in_features, early=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
        return out

    def note(self, state: Any, rows: Tensor, tokens: Tensor, routes: Tensor) -> None:
        """What a step does to the state, without an answer: one launch, and the tokens count as taken."""
        self._take_in(state, rows.contiguous(), tokens, routes)
        state.taken.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int64))

    def absorb(self, state: Any, pieces: Any, tokens: Tensor, routes: Tensor) -> None:
        """`PathPredictor.absorb`: what notes of token by token would leave, in three launches."""
        absorb(self._artifact, state, pieces, tokens, routes)

    def _take_in(self, state: Any, rows: Tensor, tokens: Tensor, routes: Tensor) -> tuple[Tensor, ...]:
        """The first launch: what was used `[B, L E]`, sources, embeddings, what is copied, whence, what is recalled."""
        model, memory, c = self._artifact.model, self._artifact.memory, self._artifact.config
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
            rp=power_of_two(decays), count=decays + groups, vocabulary=c.vocabulary, table_rows=model.table.rows,
            hashed=model.table.hashed, emb=c.embedding, embp=power_of_two(c.embedding), heads=c.heads, matches=c.matches,
            mp=power_of_two(c.matches), window=c.window, wp=power_of_two(c.window), depth=c.key, dp=power_of_two(c.key), scale=c.key**0.5,
            pairs=len(memory.pair_key), early=self._early, num_warps=8 if power_of_two(c.window) * power_of_two(c.key) > 8192 else 4,
        )  # fmt: skip
        return used, sources, embedded, amounts, places, recalled


def _early(tensor: Tensor) -> bool:
    """Whether a kernel may be put on the device while the one before it ends (Hopper's programmatic launch)."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9
