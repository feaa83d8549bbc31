"""The later launches of a predictor's step: sum copies up, read, two residual blocks, judge, decide.

A program holds a tile of weights in registers and goes through rows one by one, so a row's bits depend on no other row.
`each` is the number of rows a program goes through. Must not know files and sequences. Shapes as in `predict.model`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.predict.counts import LARGEST_ODDS
from expertflow.predict.model import FIXED, FLOOR

_FLOOR, _FIXED = tl.constexpr(FLOOR), tl.constexpr(float(FIXED))
_STEP = tl.constexpr(LARGEST_ODDS / 127)
PARTS = 4
"""Vectors the first block's input is the sum of: tokens, last step, slow average, copies."""
_PARTS = tl.constexpr(PARTS)


@triton.jit
def _begin(early: tl.constexpr):
    """Wait for the kernel before; let the one behind be put on the device."""
    if early:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit(do_not_specialize_on_alignment=["rows"])
def pour(
    rows, held_routes, amounts, places, sources,
    layers: tl.constexpr, experts: tl.constexpr, ep: tl.constexpr, top_k: tl.constexpr, decays: tl.constexpr,
    groups: tl.constexpr, matches: tl.constexpr, window: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One layer of one group of one row: sum the found positions' shares up, expert by expert, as whole numbers."""
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
    """Lines `line` of a weight `[n, k]` times the mean of `copies` vectors of k elements, one behind the other."""
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


@triton.jit(do_not_specialize=["count", "each"])
def read(
    embedded, used, sources, tokens_weight, tokens_bias, last_weight, slow_weight, copied_weight, parts, count, each,
    flat: tl.constexpr, decays: tl.constexpr, heads: tl.constexpr, slow: tl.constexpr, emb: tl.constexpr,
    width: tl.constexpr, block: tl.constexpr, block_emb: tl.constexpr, block_flat: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """A block of the elements of one of the `PARTS` vectors whose sum is the input of the first residual block."""
    part = tl.program_id(2)
    line = tl.program_id(1) * block + tl.arange(0, block)
    bias = tl.load(tokens_bias + line, mask=line < width, other=0.0)
    _begin(early)
    b = tl.program_id(0) * each
    end = tl.minimum(b + each, count)
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
    """Lines `line` of a weight `[n, k]`, zeros behind its edges."""
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


@triton.jit(do_not_specialize=["count", "each"])
def up(
    x, scale, shift, weight, bias, inner, count, each,
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
    b = tl.program_id(0) * each
    end = tl.minimum(b + each, count)
    while b < end:
        z = _norm(_total(x + b * parts * width, cell, parts, width), scales, shifts, cell, width, eps)
        out = tl.sum(tile * z[None, :], axis=1) + plus
        out = 0.5 * out * (1 + tl.math.erf(out * 0.7071067811865476))
        tl.store(inner + b * (2 * width) + line, out, mask=line < 2 * width)
        b += 1


@triton.jit(do_not_specialize=["count", "each"])
def down(
    x, inner, weight, bias, out, count, each,
    parts: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Second half: linear, added to the block's input."""
    cell = tl.arange(0, 2 * padded)
    line = tl.program_id(1) * block + tl.arange(0, block)
    tile = _tile(weight, line, cell, width, 2 * width)
    plus = tl.load(bias + line, mask=line < width, other=0.0)
    _begin(early)
    b = tl.program_id(0) * each
    end = tl.minimum(b + each, count)
    while b < end:
        value = tl.load(inner + b * (2 * width) + cell, mask=cell < 2 * width, other=0.0)
        change = tl.sum(tile * value[None, :], axis=1) + plus
        whole = _total(x + b * parts * width, line, parts, width) + change
        tl.store(out + b * width + line, whole, mask=line < width)
        b += 1


@triton.jit
def _apply(
    z, scales, shifts, weight, bias, out, block_number, count, each,
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
    b = tl.program_id(0) * each
    end = tl.minimum(b + each, count)
    while b < end:
        value = _norm(_total(z + b * width, cell, 1, width), scales, shifts, cell, width, eps)
        tl.store(out + b * n + line, tl.sum(tile * value[None, :], axis=1) + plus, mask=line < n)
        b += 1


@triton.jit(do_not_specialize=["count", "each"])
def judge(
    z, scale, shift, trust_weight, trust_bias, now_weight, later_weight, later_bias, trust, now, later, count, each,
    trusts: tl.constexpr, flat: tl.constexpr, laters: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, eps: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """From the refined vector: the weight of each source, this step's logits, a summary for each later output."""
    cell = tl.arange(0, padded)
    scales = tl.load(scale + cell, mask=cell < width, other=0.0)
    shifts = tl.load(shift + cell, mask=cell < width, other=0.0)
    number = tl.program_id(1)
    first: tl.constexpr = (trusts + block - 1) // block
    second: tl.constexpr = first + (flat + block - 1) // block
    if number < first:
        _apply(
            z, scales, shifts, trust_weight, trust_bias, trust, number, count, each,
            trusts, True, width, padded, block, eps, early,
        )  # fmt: skip
    elif number < second:
        _apply(
            z, scales, shifts, now_weight, now_weight, now, number - first, count, each,
            flat, False, width, padded, block, eps, early,
        )  # fmt: skip
    else:
        _apply(
            z, scales, shifts, later_weight, later_bias, later, number - second, count, each,
            laters, True, width, padded, block, eps, early,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "each"], do_not_specialize_on_alignment=["rows"])
def decide(
    rows, taken, sources, trust, now, later, recalled, habit, base, spread, calibration, token_odds, pair_odds, out,
    count, each,
    layers: tl.constexpr, experts: tl.constexpr, block: tl.constexpr, outputs: tl.constexpr, many: tl.constexpr,
    many_padded: tl.constexpr, depth: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Probabilities of a block of one layer's experts for one output; count the tokens as taken."""
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
    b = tl.program_id(0) * each
    end = tl.minimum(b + each, count)
    while b < end:
        summary = tl.load(later + (b * (outputs - 1) + output - 1) * depth + deep, mask=output > 0, other=0.0)
        own_logit = tl.load(now + b * flat + at, mask=mask & (output == 0), other=0.0) + tl.sum(
            tile * summary[None, :], axis=1
        )
        where = (b * many + source)[:, None] * flat + at[None, :]
        share = tl.load(sources + where, mask=both, other=0.0)
        own_trust = tl.load(
            trust + ((b * layers + layer) * outputs + output) * many + source, mask=source < many, other=0.0
        )
        weighed = tl.sum(tl.log(1 + share / _FLOOR) * habits * own_trust[:, None], axis=0)
        logit = weighed + own_logit + shift
        token, pair = tl.load(recalled + 2 * b).to(tl.int64), tl.load(recalled + 2 * b + 1).to(tl.int64)
        result = plus + logit * own
        result += tl.load(token_odds + token * flat + at, mask=mask, other=0).to(tl.float32) * _STEP * by_token
        result += tl.load(pair_odds + pair * flat + at, mask=mask, other=0).to(tl.float32) * _STEP * by_pair
        tl.store(out + (b * outputs + output) * flat + at, tl.sigmoid(result), mask=mask)
        if (tl.program_id(1) == 0) & (output == 0):
            row = tl.load(rows + b).to(tl.int64)
            tl.store(taken + row, tl.load(taken + row) + 1)
        b += 1
