"""Twin of `kernels.sampling.reference` for a GPU: no sort of the vocabulary, no wait, the same kernels for any parameters.

The last token that is kept is found from its bits, four at a time, from the highest on. Each pass counts or weighs, for
16 digits, the tokens that agree with the bits found so far; programs take a piece of the vocabulary each, and each adds up the
pieces of the pass before. All sums are of whole numbers. On Hopper a kernel starts while the one before it ends. Must not know requests
and options.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.device import starts_early
from expertflow.kernels.sampling.reference import FRACTION_BITS, LOWEST, NO_TOKEN, POWERS, RULES, WEIGHT_BITS

PIECE, FEW_PROGRAMS = 4096, 64
"""Tokens of the vocabulary that a program reads, half of them where there would be no more programs than this."""
_BLOCK = tl.constexpr(256)
_DIGITS = tl.constexpr(16)
_FEW, _MANY = tl.constexpr(4), tl.constexpr(8)
_RULES = tl.constexpr(RULES)
_LOWEST = tl.constexpr(LOWEST)
_ONE = tl.constexpr(-float(2**FRACTION_BITS))
_PLACES, _REST, _UP = (tl.constexpr(one) for one in (FRACTION_BITS, 2**FRACTION_BITS - 1, 32 - FRACTION_BITS))
_LIFT = tl.constexpr(WEIGHT_BITS - 31)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (tl.constexpr(one) for one in POWERS)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_INFINITY = tl.constexpr(float("inf"))
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}
"""Low bits of a logit as float32 that are always 0, in whole digits."""


@triton.jit
def _take_over(early: tl.constexpr):
    """Wait for the kernel before, if this one was started early, and let the next one start."""
    if early:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _read(logits, mask, row, cells, size, stride, words, masked: tl.constexpr, spare: tl.constexpr):
    """Logits as float32, and integers in their order: NaN above all, cells beyond the vocabulary 0, below all."""
    inside = cells < size
    x = tl.load(logits + row * stride + cells, mask=inside, other=float("-inf")).to(tl.float32)
    if masked:
        word = tl.load(mask + row * words + cells // 32, mask=inside, other=0)
        x = tl.where((((word >> (cells % 32)) & 1) == 1) | (x != x), x, float("-inf"))  # noqa: PLR0124 - NaN
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(x != x, 0xFFFFFFFF, key).to(tl.uint32) >> spare  # noqa: PLR0124 - NaN
    return x, tl.where(inside, key, 0).to(tl.uint32)


@triton.jit
def _value(key, spare: tl.constexpr):
    """The logit behind a key."""
    bits = key.to(tl.uint32) << spare
    bits = tl.where((bits >> 31) == 1, bits & 0x7FFFFFFF, (bits | ((1 << spare) - 1)) ^ 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x, top, factor):
    """Power of 2 by which a logit is less likely than the largest."""
    power = (x - top) * factor
    power = tl.where(power > _LOWEST, power, _LOWEST)
    return tl.where(power < 0, power, 0.0)


@triton.jit
def _weigh(power):
    """2 to the power, as `reference.weigh`."""
    fixed = (power * _ONE).to(tl.int32)
    fraction = ((fixed & _REST) << _UP).to(tl.uint32, bitcast=True)
    made = _C5 - tl.umulhi(fraction, tl.zeros_like(fraction) + _C6)
    made = _C4 - tl.umulhi(fraction, made.to(tl.uint32))
    made = _C3 - tl.umulhi(fraction, made.to(tl.uint32))
    made = _C2 - tl.umulhi(fraction, made.to(tl.uint32))
    made = _C1 - tl.umulhi(fraction, made.to(tl.uint32))
    made = _C0 - tl.umulhi(fraction, made.to(tl.uint32))
    return (made.to(tl.int64) << _LIFT) >> (fixed >> _PLACES).to(tl.int64)


@triton.jit
def _narrow(parts, state, row, step, pieces, wanted, cut, tied, shift, padded: tl.constexpr):
    """The bits found before pass `step`, and what lies above them: one digit more than before the pass that filled `parts`.

    `tied` is added to the digit of `cut`, which that pass left out.
    """
    prefix, above = wanted * 0, wanted * 0
    if step > 0:
        before = state + (row * 16 + step - 1) * 2
        prefix, above = tl.load(before), tl.load(before + 1)
        digit, piece = tl.arange(0, _DIGITS), tl.arange(0, padded)
        where = (row * pieces + piece[:, None]) * _DIGITS + digit[None, :]
        found = tl.sum(tl.load(parts + where, mask=piece[:, None] < pieces, other=0).to(tl.int64), 0)
        last = shift + 4
        found += tl.where(((cut >> last) == prefix * 16 + digit) & (tied > 0), tied, 0)
        reached = above + tl.cumsum(found, 0, reverse=True)
        chosen = tl.sum((reached >= wanted).to(tl.int64), 0) - 1
        above += tl.sum(tl.where(digit > chosen, found, 0), 0)
        prefix = prefix * 16 + chosen
    return prefix, above


@triton.jit
def _top(peaks, row, pieces, padded: tl.constexpr, spare: tl.constexpr):
    """The largest logit, and whether it is a number."""
    piece = tl.arange(0, padded)
    top = _value(tl.max(tl.load(peaks + row * pieces + piece, mask=piece < pieces, other=0), 0), spare)
    fine = tl.abs(top) < _INFINITY
    return tl.where(fine, top, 0.0), fine


@triton.jit
def _after_count(counts, count_state, row, steps, pieces, count, padded: tl.constexpr):
    """The last of the `count` most probable tokens: its key, and how many with that key are kept; 0, 0 if all are."""
    cut, tied = count * 0, count * 0
    if count > 0:
        cut, above = _narrow(counts, count_state, row, steps, pieces, count, cut, tied, -4, padded)
        tied = count - above
    return cut, tied


@triton.jit(do_not_specialize=["pieces"])
def _peaks(
    logits, mask, peaks, size, stride, words, pieces, masked: tl.constexpr, spare: tl.constexpr, width: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """The largest key of a piece."""
    _take_over(early)
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, key = _read(logits, mask, row, piece * width + tl.arange(0, width), size, stride, words, masked, spare)
    tl.store(peaks + row * pieces + piece, tl.max(key.to(tl.int64), 0))


@triton.jit(do_not_specialize=["pieces", "step", "shift"])
def _count(
    logits, mask, rules, peaks, counts, out, state, size, stride, words, pieces, step, shift, masked: tl.constexpr,
    spare: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """A pass of the search for top-k: tokens a digit."""
    _take_over(early)
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(rules + row * _RULES + 1).to(tl.int64)
    if count > 0:
        prefix, above = _narrow(counts, state, row, step, pieces, count, count * 0, count * 0, shift, padded)
        if piece == 0:
            tl.store(state + (row * 16 + step) * 2, prefix)
            tl.store(state + (row * 16 + step) * 2 + 1, above)
        digit = tl.arange(0, _DIGITS)
        found = tl.zeros([_DIGITS, _BLOCK], tl.int32)
        if ((tl.load(peaks + row * pieces + piece) >> shift) >> 4) >= prefix:
            for begin in tl.static_range(0, width, _BLOCK):
                cells = piece * width + begin + tl.arange(0, _BLOCK)
                _, key = _read(logits, mask, row, cells, size, stride, words, masked, spare)
                own = tl.where(((key >> shift) >> 4).to(tl.int64) == prefix, ((key >> shift) & 15).to(tl.int32), -1)
                found += (own[None, :] == digit[:, None]).to(tl.int32)
        tl.store(out + (row * pieces + piece) * _DIGITS + digit, tl.sum(found, 1))


@triton.jit
def _enough(sums, target, row, step, pieces, share, tied, padded: tl.constexpr):
    """Chances that top-p keeps: known from the first pass on, which weighed all."""
    enough = tied * 0
    if step == 1:
        digit, piece = tl.arange(0, _DIGITS), tl.arange(0, padded)
        where = (row * pieces + piece[:, None]) * _DIGITS + digit[None, :]
        parts = tl.load(sums + where, mask=piece[:, None] < pieces, other=0)
        part = share * (tl.sum(tl.sum(parts, 0), 0) + tied).to(tl.float64)
        enough = part.to(tl.int64)
        enough += (enough.to(tl.float64) < part).to(tl.int64)
    elif step > 1:
        enough = tl.load(target + row)
    return enough


@triton.jit(do_not_specialize=["pieces", "step", "steps", "shift"])
def _sum(
    logits, mask, rules, peaks, counts, sums, out, count_state, state, cuts, target, size, stride, words, pieces, steps, step,
    shift, masked: tl.constexpr, spare: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """A pass of the search for top-p: chances a digit, of tokens that top-k keeps."""
    _take_over(early)
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    share = tl.load(rules + row * _RULES + 2)
    if share < 1:
        count, factor = tl.load(rules + row * _RULES + 1).to(tl.int64), tl.load(rules + row * _RULES + 3).to(tl.float32)
        if step == 0:
            cut, same = _after_count(counts, count_state, row, steps, pieces, count, padded)
        else:
            cut, same = tl.load(cuts + row * 4), tl.load(cuts + row * 4 + 1)
        top, _ = _top(peaks, row, pieces, padded, spare)
        tied = same * _weigh(_exponent(_value(cut, spare), top, factor))
        enough = _enough(sums, target, row, step, pieces, share, tied, padded)
        prefix, above = _narrow(sums, state, row, step, pieces, enough, cut, tied, shift, padded)
        if piece == 0:
            tl.store(state + (row * 16 + step) * 2, prefix)
            tl.store(state + (row * 16 + step) * 2 + 1, above)
            if step == 0:
                tl.store(cuts + row * 4, cut)
                tl.store(cuts + row * 4 + 1, same)
            if step == 1:
                tl.store(target + row, enough)
        digit = tl.arange(0, _DIGITS)
        found = tl.zeros([_DIGITS, _BLOCK], tl.int64)
        peak = tl.load(peaks + row * pieces + piece)
        if (((peak >> shift) >> 4) >= prefix) & (peak > cut):
            for begin in tl.static_range(0, width, _BLOCK):
                cells = piece * width + begin + tl.arange(0, _BLOCK)
                x, key = _read(logits, mask, row, cells, size, stride, words, masked, spare)
                seen = (((key >> shift) >> 4).to(tl.int64) == prefix) & (key.to(tl.int64) > cut)
                weight = _weigh(_exponent(x, top, factor))
                own = tl.where(seen, ((key >> shift) & 15).to(tl.int32), -1)
                found += tl.where(own[None, :] == digit[:, None], weight[None, :], 0)
        tl.store(out + (row * pieces + piece) * _DIGITS + digit, tl.sum(found, 1))


@triton.jit(do_not_specialize=["pieces", "steps"])
def _share(
    logits, mask, rules, peaks, counts, sums, count_state, state, cuts, target, shares, ties, size, stride, words, pieces, steps,
    masked: tl.constexpr, spare: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """A piece's part of what is kept: chances of tokens above the last key, and tokens with that key."""
    _take_over(early)
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count, share = tl.load(rules + row * _RULES + 1).to(tl.int64), tl.load(rules + row * _RULES + 2)
    factor, least = tl.load(rules + row * _RULES + 3).to(tl.float32), tl.load(rules + row * _RULES + 4).to(tl.float32)
    top, _ = _top(peaks, row, pieces, padded, spare)
    if share < 1:
        cut, same, enough = tl.load(cuts + row * 4), tl.load(cuts + row * 4 + 1), tl.load(target + row)
        tied = same * _weigh(_exponent(_value(cut, spare), top, factor))
        cut, above = _narrow(sums, state, row, steps, pieces, enough, cut, tied, -4, padded)
        one = tl.maximum(_weigh(_exponent(_value(cut, spare), top, factor)), 1)
        same = (enough - above + one - 1) // one
    else:
        cut, same = _after_count(counts, count_state, row, steps, pieces, count, padded)
    if piece == 0:
        tl.store(cuts + row * 4 + 2, cut)
        tl.store(cuts + row * 4 + 3, same)
    found, equal = count * 0, count * 0
    if tl.load(peaks + row * pieces + piece) >= cut:
        cells = piece * width + tl.arange(0, width)
        x, key = _read(logits, mask, row, cells, size, stride, words, masked, spare)
        power = _exponent(x, top, factor)
        found += tl.sum(tl.where((key.to(tl.int64) > cut) & (power >= least), _weigh(power), 0), 0)
        equal += tl.sum((key.to(tl.int64) == cut).to(tl.int64), 0)
    tl.store(shares + row * pieces + piece, found)
    tl.store(ties + row * pieces + piece, equal)


@triton.jit(do_not_specialize=["pieces"])
def _pick(
    logits, mask, rules, peaks, cuts, shares, ties, out, size, stride, words, pieces, masked: tl.constexpr, spare: tl.constexpr,
    width: tl.constexpr, padded: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Draw one sequence's token: first the piece, then the token in it."""
    _take_over(early)
    row, piece = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    uniform, factor = tl.load(rules + row * _RULES), tl.load(rules + row * _RULES + 3).to(tl.float32)
    least = tl.load(rules + row * _RULES + 4).to(tl.float32)
    top, fine = _top(peaks, row, pieces, padded, spare)
    cut, same = tl.load(cuts + row * 4 + 2), tl.load(cuts + row * 4 + 3)
    power = _exponent(_value(cut, spare), top, factor)
    one = tl.where(power >= least, _weigh(power), 0)
    found = tl.load(shares + row * pieces + piece, mask=piece < pieces, other=0)
    equal = tl.load(ties + row * pieces + piece, mask=piece < pieces, other=0)
    room = same - (tl.cumsum(equal, 0) - equal)
    found += one * tl.where(room < 0, 0, tl.where(room < equal, room, equal))
    whole = tl.sum(found, 0)
    wanted = tl.minimum((uniform * whole.to(tl.float64)).to(tl.int64), whole - 1)
    chosen = tl.sum((tl.cumsum(found, 0) <= wanted).to(tl.int64), 0)
    wanted -= tl.sum(tl.where(piece < chosen, found, 0), 0)
    left = same - tl.sum(tl.where(piece < chosen, equal, 0), 0)
    cells = chosen * width + tl.arange(0, width)
    x, key = _read(logits, mask, row, cells, size, stride, words, masked, spare)
    like = (key.to(tl.int64) == cut).to(tl.int64)
    kept = (key.to(tl.int64) > cut) | ((like == 1) & (tl.cumsum(like, 0) <= left))
    power = _exponent(x, top, factor)
    weight = tl.where(kept & (power >= least), _weigh(power), 0)
    token = chosen * width + tl.sum((tl.cumsum(weight, 0) <= wanted).to(tl.int64), 0)
    tl.store(out + row, tl.where(fine, token, _NO_TOKEN))


class _Scratch(NamedTuple):
    """What the passes leave for one another.

    Attributes:
        peaks: int64 `[B, N]`, the largest key of each piece.
        counts: int32 `[2, B, N, 16]`, tokens a digit, of every other pass.
        sums: int64 `[2, B, N, 16]`, chances a digit.
        found: int64 `[2, B, 16, 2]`, for either search: bits known before a pass, and what lies above.
        cuts: int64 `[B, 4]`, last key and how many of it, by top-k, then by both.
        target: int64 `[B]`, chances that top-p keeps.
        shares: int64 `[2, B, N]`, what of a piece is kept: chances above the last key, tokens of it.
    """

    peaks: Tensor
    counts: Tensor
    sums: Tensor
    found: Tensor
    cuts: Tensor
    target: Tensor
    shares: Tensor


def _scratch(batch: int, pieces: int, device: torch.device) -> _Scratch:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    digits = _DIGITS.value
    return _Scratch(
        empty(batch, pieces), empty(2, batch, pieces, digits, dtype=torch.int32), empty(2, batch, pieces, digits),
        empty(2, batch, 16, 2), empty(batch, 4), empty(batch), empty(2, batch, pieces),
    )  # fmt: skip


def choose(
    logits: Tensor,
    rules: Tensor,
    mask: Tensor | None = None,
    *,
    counted: bool = True,
    shared: bool = True,
    piece: int | None = None,
) -> Tensor:
    """Pick a token of each sequence, as `reference.choose` does. Waits for nothing.

    Args:
        logits: `[B, V]` with unit columns.
        rules: as there, contiguous.
        mask: as there, contiguous.
        counted: whether a sequence has a top-k; else it must be 0 in all, and its search is left out.
        shared: whether a sequence has a top-p below 1, likewise.
        piece: tokens of the vocabulary a program reads, a power of two from 256 on; None: as many as suit the batch. No token depends on it.
    """
    (batch, size), spare = logits.shape, _SPARE_BITS[logits.dtype]
    assert logits.stride(1) == 1
    assert rules.is_contiguous()
    assert mask is None or (mask.is_contiguous() and mask.shape[1] * 32 >= size)
    if piece is None:
        piece = PIECE // 2 if batch * triton.cdiv(size, PIECE) <= FEW_PROGRAMS else PIECE
    pieces, steps = triton.cdiv(size, piece), (32 - spare) // 4
    made, out = _scratch(batch, pieces, logits.device), torch.empty(batch, dtype=torch.int64, device=logits.device)
    whole = logits, rules if mask is None else mask
    sizes = size, logits.stride(0), 0 if mask is None else mask.shape[1], pieces
    alike: dict[str, Any] = {"masked": mask is not None, "spare": spare, "width": piece, "enable_fp_fusion": False}
    alike["early"] = alike["launch_pdl"] = starts_early(logits)
    _peaks[pieces, batch](*whole, made.peaks, *sizes, **alike, num_warps=_MANY.value)
    given, alike["padded"] = (*whole, rules, made.peaks), int(triton.next_power_of_2(pieces))
    if counted:
        _passes(steps, made.counts, lambda before, after, place: _count[pieces, batch](
            *given, before, after, made.found[0], *sizes, *place, **alike, num_warps=_FEW.value
        ))  # fmt: skip
    counts, sums = made.counts[steps % 2], made.sums[steps % 2]
    searches = *made.found, made.cuts, made.target
    if shared:
        _passes(steps, made.sums, lambda before, after, place: _sum[pieces, batch](
            *given, counts, before, after, *searches, *sizes, steps, *place, **alike, num_warps=_FEW.value
        ))  # fmt: skip
    _share[pieces, batch](
        *given, counts, sums, *searches, *made.shares, *sizes, steps, **alike, num_warps=_MANY.value
    )  # fmt: skip
    _pick[(batch,)](*given, made.cuts, *made.shares, out, *sizes, **alike, num_warps=_MANY.value)
    return out


def _passes(steps: int, parts: Tensor, launch: Callable[[Tensor, Tensor, tuple[int, int]], None]) -> None:
    """One pass a digit, from the highest. Each reads the parts that the one before it left, and has its number and its shift."""
    before, after = parts.unbind()
    for step in range(steps):
        launch(before, after, (step, 4 * (steps - 1 - step)))
        before, after = after, before
