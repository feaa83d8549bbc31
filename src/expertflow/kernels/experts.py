"""The expert MLP through slot ids, for the few tokens of a decode step.

Twins of `expert_pairs` and `combine` in `kernels.reference`. What a pair (token, rank) gives depends on its token and
its expert alone, to the bit: every expert's tokens go through the same tiles of tensor-core products. A tile is sixteen
tokens wide, however few there are, and goes along H (then I) in steps of fixed size. The steps of a chunk are summed by themselves, and then the
chunks in their order: so a program may have all chunks or one, and the last one to end adds up what was put by. Slots, residency, waves, the batch
and other users of the expert change which program computes a pair and in which column, and neither enters the
arithmetic.

Each distinct expert is read once. Program (n, p) computes outputs n of the expert of pair p for all pairs that share
its slot. It ends at once unless p is the first of these pairs (or the 17th, ...). So nothing needs to be sorted first.
On Hopper each kernel is put on the device before its predecessor has ended, and waits there. Up waits before anything else, because
it is told the slots by what ran before; so down, which begins behind that, may read slots and records before it waits for up's numbers.
Must not know layers, and which side decides.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.device import room, starts_early
from expertflow.kernels.launching import launch
from expertflow.kernels.mlp import MAX_PAIRS, SHARED_PAIRS, ExpertMlp, Projection, Workspace
from expertflow.kernels.reading.readers import reader
from expertflow.kernels.reading.tiles import touched
from expertflow.kernels.tiling import TILE, Tiling, tilings

_TILE = tl.constexpr(TILE)
COMBINE_BLOCK = 256


@triton.jit
def _leads(slots, first, pairs, padded: tl.constexpr, single: tl.constexpr):
    """Which pairs share the slot of pair `first`, `[padded]`; how many of them are before it; whether it leads a tile.

    `single`: the pairs are of a single token, whose experts differ, so each leads a tile of its own.
    """
    lane = tl.arange(0, padded)
    slot = tl.load(slots + first)
    if single:
        return lane, first, slot >= 0
    same = (tl.load(slots + lane, mask=lane < pairs, other=-1) == slot).to(tl.int32)
    ahead = tl.sum(tl.where(lane < first, same, 0))
    return same, ahead, (slot >= 0) & (ahead % _TILE == 0)


@triton.jit
def _members(same, ahead, first, padded: tl.constexpr, single: tl.constexpr):
    """The pairs of a tile, `[TILE]`, -1 where there is none: those of `same` from place `ahead` on."""
    if single:
        return tl.where(tl.arange(0, _TILE) == 0, first, -1)
    place = tl.cumsum(same, 0) - 1 - ahead
    chosen = (same[:, None] == 1) & (place[:, None] == tl.arange(0, _TILE)[None, :])
    return tl.sum(tl.where(chosen, tl.arange(0, padded)[:, None] + 1, 0), axis=0) - 1


@triton.jit
def _all_chunks(out, sums, counts, members, outs, n: tl.constexpr, chunks: tl.constexpr):
    """Put by the sum of a chunk `[R, TOK]`. Where that was the last one of these outputs, all chunks' sums are added in their order.

    `counts` is how many were there before, 0 again afterwards.

    Returns:
        The sum, and whether that was the last one; if not, the sum is nothing.
    """
    where = sums + (members * chunks * n)[None, :] + outs[:, None]
    inside = (members >= 0)[None, :] & (outs < n)[:, None]
    tl.store(where + tl.program_id(0) % chunks * n, out, mask=inside)
    tl.debug_barrier()  # before one thread makes it known, all have written
    count = counts + tl.program_id(1) * (tl.num_programs(0) // chunks) + tl.program_id(0) // chunks
    last = tl.atomic_add(count, 1) == chunks - 1
    total = tl.zeros_like(out)
    if last:
        tl.store(count, 0)
        for chunk in tl.static_range(chunks):
            total += tl.load(where + chunk * n, mask=inside, other=0.0, cache_modifier=".cg")
    return total, last


@triton.jit
def activate(x, activation: tl.constexpr):
    """The activation of that name in `ACTIVATIONS`."""
    if activation == "silu":
        x = x * tl.sigmoid(x)
    elif activation == "gelu":
        x = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif activation == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(activation == "relu" or activation == "relu2", "this activation has no branch here")  # noqa: PLR1714 - Triton has no sets
        x = tl.maximum(x, 0.0)
        if activation == "relu2":
            x = x * x
    return x


@triton.jit
def up_outputs(begin, block_n: tl.constexpr, i: tl.constexpr, gated: tl.constexpr, interleaved: tl.constexpr):
    """The outputs of the up projection from which inner elements `begin` to `begin + block_n - 1` are made."""
    if interleaved:
        outs = 2 * begin + tl.arange(0, 2 * block_n)
    elif gated:
        both = tl.arange(0, 2 * block_n)
        outs = begin + both % block_n + (both // block_n) * i
    else:
        outs = begin + tl.arange(0, block_n)
    return outs


@triton.jit
def add_bias(out, record, bias: tl.constexpr, outs, n: tl.constexpr):
    """`out` `[R, TOK]` plus the bias of its outputs `[R]`, if there is one."""
    if bias >= 0:  # a product of one step would begin with the bias, and have other bits than one of touched sums
        out = touched(out) + tl.load(record + bias + outs, mask=outs < n, other=0.0).to(tl.float32)[:, None]
    return out


@triton.jit
def activated(
    out, gated: tl.constexpr, interleaved: tl.constexpr, activation: tl.constexpr, alpha: tl.constexpr, limit: tl.constexpr,
    block_n: tl.constexpr,
):  # fmt: skip
    """Inner elements `[block_n, TOK]` of what the up projection gives at `up_outputs`."""
    if gated:
        if interleaved:
            out = tl.permute(tl.reshape(out, [block_n, 2, out.shape[1]]), (0, 2, 1))
        else:
            out = tl.permute(tl.reshape(out, [2, block_n, out.shape[1]]), (1, 2, 0))
        gate, up = tl.split(out)
        if activation == "clamped_swiglu":
            gate = tl.minimum(gate, limit)
            inner = (tl.minimum(tl.maximum(up, -limit), limit) + 1) * (gate * tl.sigmoid(alpha * gate))
        else:
            inner = activate(gate, activation) * up
    else:
        inner = activate(out, activation)
    return inner


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["slots"])
def _up_kernel(
    hidden, slots, pool, inner, sums, counts, pairs, padded: tl.constexpr, top_k: tl.constexpr, h: tl.constexpr, i: tl.constexpr,
    size: tl.constexpr, multiply: tl.constexpr, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr, bias: tl.constexpr, gated: tl.constexpr, interleaved: tl.constexpr,
    transposed: tl.constexpr, activation: tl.constexpr, alpha: tl.constexpr, limit: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr, requested: tl.constexpr, single: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """`inner[p] = activation(up(hidden[p // top_k]))`, a block of inner elements of one expert a program, or a chunk of its sums."""
    if early:  # down reads slots and records before it waits, so it may begin only when they are there
        gdc_wait()
        gdc_launch_dependents()
    first = tl.program_id(1)
    same, ahead, leads = _leads(slots, first, pairs, padded, single)
    if not leads:
        return
    members = _members(same, ahead, first, padded, single)
    record = pool + tl.load(slots + first).to(tl.int64) * size
    begin = tl.program_id(0) // chunks * block_n
    n: tl.constexpr = 2 * i if gated else i
    exact: tl.constexpr = i % block_n == 0
    outs = up_outputs(begin, block_n, i, gated, interleaved)
    inputs = hidden + (members // top_k) * h
    part = tl.program_id(0) % chunks
    out = multiply(
        inputs, members >= 0, record, load, at, about, outs, n, h, transposed, exact, block_k, chunk, chunks > 1, part, requested,
        False,
    )  # fmt: skip
    if chunks > 1:
        out, last = _all_chunks(out, sums, counts, members, outs, n, chunks)
        if not last:
            return
    out = activated(add_bias(out, record, bias, outs, n), gated, interleaved, activation, alpha, limit, block_n)
    cols = begin + tl.arange(0, block_n)
    target = inner + members[None, :] * i + cols[:, None]
    tl.store(target, out.to(inner.dtype.element_ty), mask=(members[None, :] >= 0) & (cols[:, None] < i))


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["slots"])
def _down_kernel(
    inner, slots, pool, parts, sums, counts, pairs, padded: tl.constexpr, h: tl.constexpr, i: tl.constexpr, size: tl.constexpr,
    multiply: tl.constexpr, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr, bias: tl.constexpr,
    transposed: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr,
    requested: tl.constexpr, single: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """`parts[p] = down(inner[p])`, a block of outputs of one expert a program, or a chunk of their sums."""
    if early:
        gdc_launch_dependents()
        # slots and records are read before the wait: nothing older may be left in this multiprocessor's first-level cache
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    first = tl.program_id(1)
    same, ahead, leads = _leads(slots, first, pairs, padded, single)
    begin = tl.program_id(0) // chunks * block_n
    part = tl.program_id(0) % chunks
    if not leads:
        if early:  # what ends has to end behind its predecessor
            gdc_wait()
        return
    members = _members(same, ahead, first, padded, single)
    record = pool + tl.load(slots + first).to(tl.int64) * size
    outs = begin + tl.arange(0, block_n)
    inputs = inner + members * i
    exact: tl.constexpr = h % block_n == 0
    out = multiply(
        inputs, members >= 0, record, load, at, about, outs, h, i, transposed, exact, block_k, chunk, chunks > 1, part, requested,
        early,
    )  # fmt: skip
    if chunks > 1:
        out, last = _all_chunks(out, sums, counts, members, outs, h, chunks)
        if not last:
            return
    out = add_bias(out, record, bias, outs, h)
    target = parts + members[None, :] * h + outs[:, None]
    tl.store(target, out, mask=(members[None, :] >= 0) & (outs[:, None] < h))


@triton.jit(do_not_specialize=["experts"], do_not_specialize_on_alignment=["index", "weights"])
def _combine_kernel(
    parts, index, weights, shared, residual, out, experts, h: tl.constexpr, top_k: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, added: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """`out[t]` = the sum over ranks of weight times part, in ascending order of expert (then of rank), and what is added behind it."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    lane = tl.arange(0, padded)
    mine = tl.load(index + token * top_k + lane, mask=lane < top_k, other=0)
    weight = tl.load(weights + token * top_k + lane, mask=lane < top_k, other=0).to(tl.float32)
    before = (mine[None, :] < mine[:, None]) | ((mine[None, :] == mine[:, None]) & (lane[None, :] < lane[:, None]))
    place = tl.sum((before & (lane[None, :] < top_k)).to(tl.int32), axis=1)
    cols = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for number in tl.static_range(top_k):
        here = (place == number) & (lane < top_k)
        rank = tl.sum(tl.where(here, lane, 0))
        active = tl.sum((here & (mine >= 0) & (mine < experts)).to(tl.int32)) > 0
        part = tl.load(parts + (token * top_k + rank) * h + cols, mask=active & (cols < h), other=0.0)
        total = tl.where(active, total + tl.sum(tl.where(here, weight, 0.0)) * part, total)
    done = total.to(out.dtype.element_ty)
    if added > 1:
        done = (tl.load(shared + token * h + cols, mask=cols < h, other=0.0).to(tl.float32) + done.to(tl.float32)).to(
            out.dtype.element_ty
        )
    if added > 0:
        done = (tl.load(residual + token * h + cols, mask=cols < h, other=0.0).to(tl.float32) + done.to(tl.float32)).to(
            out.dtype.element_ty
        )
    tl.store(out + token * h + cols, done, mask=cols < h)


def expert_pairs(mlp: ExpertMlp, hidden: Tensor, slots: Tensor, pool: Tensor, work: Workspace) -> None:
    """Run each pair's expert on its token and keep the results apart: `work.parts[t, k]`.

    As `kernels.reference.expert_pairs`, for at most `MAX_PAIRS` pairs; two launches on the current stream, capturable.
    """
    assert hidden.is_contiguous()
    assert slots.is_contiguous()
    assert hidden.dtype == mlp.torch_dtype
    assert slots.numel() <= MAX_PAIRS
    up, down = tilings(mlp, slots.numel(), room(pool), early=starts_early(pool))
    launch_up(mlp, hidden, slots, pool, work, up)
    launch_down(mlp, slots, pool, work, down)


def launch_up(mlp: ExpertMlp, hidden: Tensor, slots: Tensor, pool: Tensor, work: Workspace, cut: Tiling) -> None:
    """The first half of `expert_pairs`, cut as given."""
    size, early = mlp.torch_dtype.itemsize, starts_early(pool)
    pairs, top_k = slots.numel(), slots.shape[1]
    assert not cut.split or pairs <= SHARED_PAIRS
    _up_kernel[(cut.programs(mlp.width, mlp.hidden), pairs)](
        hidden, slots, pool.view(mlp.torch_dtype), work.inner, work.sums, work.counts, pairs, padded=_padded(pairs), top_k=top_k,
        h=mlp.hidden, i=mlp.width, size=mlp.record_bytes // size, **read_arguments(mlp.up),
        bias=-1 if mlp.up.bias is None else mlp.up.bias // size, gated=mlp.gated, interleaved=mlp.interleaved,
        transposed=mlp.transposed, activation=mlp.activation, alpha=mlp.alpha, limit=mlp.limit,
        block_n=cut.block_n, block_k=cut.block_k, chunk=cut.chunk, chunks=cut.chunks(mlp.hidden) if cut.split else 1,
        requested=cut.ahead, single=len(slots) == 1, early=early, num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
        launch_pdl=early,
    )  # fmt: skip


def launch_down(mlp: ExpertMlp, slots: Tensor, pool: Tensor, work: Workspace, cut: Tiling) -> None:
    """The second half of `expert_pairs`, cut as given. Nothing may come between: it reads `slots` before it waits."""
    size = mlp.torch_dtype.itemsize
    pairs, early = slots.numel(), starts_early(pool)
    assert not cut.split or pairs <= SHARED_PAIRS
    _down_kernel[(cut.programs(mlp.hidden, mlp.width), pairs)](
        work.inner, slots, pool.view(mlp.torch_dtype), work.parts, work.sums, work.counts, pairs, padded=_padded(pairs),
        h=mlp.hidden, i=mlp.width, size=mlp.record_bytes // size, **read_arguments(mlp.down),
        bias=-1 if mlp.down.bias is None else mlp.down.bias // size, transposed=mlp.transposed,
        block_n=cut.block_n, block_k=cut.block_k, chunk=cut.chunk, chunks=cut.chunks(mlp.width) if cut.split else 1,
        requested=cut.ahead, single=len(slots) == 1, early=early, num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
        launch_pdl=early,
    )  # fmt: skip


def read_arguments(projection: Projection) -> dict[str, Any]:
    """Arguments by which a kernel reads a projection's weight."""
    found = reader(projection.spec.format)
    assert found is not None, "a model of such experts has no graph execution"
    constants = projection.spec.format.constants(projection.spec)
    return {"multiply": found.multiply, "load": found.load, "at": projection.offsets, "about": constants}


def _padded(pairs: int) -> int:
    return max(int(triton.next_power_of_2(pairs)), 16)


def combine(
    parts: Tensor, index: Tensor, weights: Tensor, experts: int, out: Tensor, added: Sequence[Tensor] = ()
) -> None:
    """Add each token's weighted results in ascending order of expert, starting from zero, then what is `added`.

    As `kernels.reference.combine`; one launch.
    """
    tokens, top_k = index.shape
    hidden, early = out.shape[1], starts_early(out)
    assert all(one.is_contiguous() for one in added)
    shared, residual = (added[0] if added else out), (added[-1] if added else out)
    launch(
        _combine_kernel, (tokens, triton.cdiv(hidden, COMBINE_BLOCK)),
        (parts, index.contiguous(), weights.contiguous(), shared, residual, out, experts), h=hidden, top_k=top_k,
        padded=triton.next_power_of_2(top_k), block=COMBINE_BLOCK, added=len(added), early=early, launch_pdl=early,
    )  # fmt: skip
