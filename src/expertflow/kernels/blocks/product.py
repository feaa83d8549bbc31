"""Products of the few tokens of a decode step with a weight, read once at the rate of memory.

Twin of `reference.product`. Two kernels. For a single token a program holds some rows of the weight in its registers, as a whole,
and multiplies without tensor cores; it norms the states itself. Rows are requested before the program waits for the kernel that makes the
states, where the chip has programmatic launch. For more tokens tiles go through tensor cores, and the norm is a launch of its own. What a
token gets depends on neither its place nor the other tokens, and no sum is shared among programs. Must not know modules.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.blocks.given import Norm
from expertflow.kernels.blocks.rows import dot_rows, halves, load_rows, load_states, scaled
from expertflow.kernels.dense import INTERPRETED, rms_norm
from expertflow.kernels.device import room, starts_early

MOST = 64
"""Tokens beyond which cuBLAS is better."""
ENOUGH = 1056
"""Outputs of which four a program keep a large GPU busy."""


@dataclass(frozen=True)
class RowCut:
    """How the product of one token is cut.

    Attributes:
        rows: outputs of a program.
        warps: of a program.
    """

    rows: int = 4
    warps: int = 4


@dataclass(frozen=True)
class TileCut:
    """How the product of more tokens is cut; `benchmarks/dense_step.py` compares ways to do it.

    Attributes:
        block_n: outputs of a program.
        block_k: inputs of one step.
        warps: of a program.
        stages: steps in flight.
    """

    block_n: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 5


@triton.jit
def _row_product(
    states, weight, bias, gains, residual, share, out, eps: tl.constexpr, n: tl.constexpr, k: tl.constexpr, rows: tl.constexpr,
    first: tl.constexpr, second: tl.constexpr, biased: tl.constexpr, normed: tl.constexpr, wide: tl.constexpr, added: tl.constexpr,
    shared: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Some outputs of one token."""
    outs = tl.program_id(0) * rows + tl.arange(0, rows)
    dtype: tl.constexpr = out.dtype.element_ty
    if early:
        gdc_launch_dependents()
    left, right = load_rows(weight, outs, n, k, 0, first), load_rows(weight, outs, n, k, first, second)
    if normed:
        left_gains, right_gains = load_states(gains, k, 0, first), load_states(gains, k, first, second)
    if early:  # a weight was there before the kernel that makes the states began
        gdc_wait()
    x, y = load_states(states, k, 0, first), load_states(states, k, first, second)
    if normed:
        root = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / k + eps)
        x, y = scaled(x, root, left_gains, wide, dtype), scaled(y, root, right_gains, wide, dtype)
    total = dot_rows(left, x) + dot_rows(right, y)
    if biased:
        total += tl.load(bias + outs, mask=outs < n, other=0.0).to(tl.float32)
    done = total.to(dtype)
    if shared:
        done = (tl.load(share).to(tl.float32) * done.to(tl.float32)).to(dtype)
    if added:
        done = (tl.load(residual + outs, mask=outs < n, other=0.0).to(tl.float32) + done.to(tl.float32)).to(dtype)
    tl.store(out + outs, done, mask=outs < n)


@triton.jit(do_not_specialize=["tokens"])
def _tile_product(
    states, weight, bias, residual, share, out, tokens, n: tl.constexpr, k: tl.constexpr, tile: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, biased: tl.constexpr, added: tl.constexpr, shared: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Some outputs of all tokens."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    outs, token, cell = tl.program_id(0) * block_n + tl.arange(0, block_n), tl.arange(0, tile), tl.arange(0, block_k)
    inside = (outs < n)[:, None] & (token < tokens)[None, :]
    rows, columns = weight + outs.to(tl.int64)[:, None] * k, states + token[None, :] * k
    total = tl.zeros([block_n, tile], tl.float32)
    for begin in range(0, k, block_k):
        here = begin + cell
        part = tl.load(rows + here[None, :], mask=(outs < n)[:, None] & (here < k)[None, :], other=0.0)
        x = tl.load(columns + here[:, None], mask=(token < tokens)[None, :] & (here < k)[:, None], other=0.0)
        if INTERPRETED:
            part, x = part.to(tl.float32), x.to(tl.float32)
        total = tl.dot(part, x, total, input_precision="ieee")
    if biased:
        total += tl.load(bias + outs, mask=outs < n, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    place = token[None, :] * n + outs[:, None]
    done = total.to(dtype)
    if shared:
        part = tl.load(share + token, mask=token < tokens, other=0.0).to(tl.float32)
        done = (part[None, :] * done.to(tl.float32)).to(dtype)
    if added:
        done = (tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + done.to(tl.float32)).to(dtype)
    tl.store(out + place, done, mask=inside)


def row_cut(outputs: int) -> RowCut:
    """How the product of one token with a weight of so many outputs is cut."""
    return RowCut() if outputs >= ENOUGH else RowCut(rows=1)


def tile_cut(dtype: torch.dtype, tile: int, space: int) -> TileCut:
    """How the product of more tokens is cut: tiles of so many, in programs that have `space` bytes of shared memory."""
    cut = TileCut(16, 64, 4, 3) if dtype == torch.float32 else TileCut()
    step = (cut.block_n + tile) * cut.block_k * dtype.itemsize
    return replace(cut, stages=max(2, min(cut.stages, space // step)))


def product(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    share: Tensor | None = None,
    *,
    most: int = MOST,
) -> Tensor:
    """Multiply states, perhaps normed before, scale the product and add it to the residual.

    As `reference.product`. More than `most` tokens are left to cuBLAS: passes over prompts give 0, so that no kernel is compiled
    for a size that comes once.
    """
    tokens, (outputs, _) = len(states), weight.shape
    if tokens == 1 and most:
        return launch_rows(states, weight, bias, norm, (residual, share), row_cut(outputs))
    if norm is not None:
        states = rms_norm(states, norm.weight, norm.eps, wide=norm.wide)
    if tokens > most:
        out = functional.linear(states, weight, bias)
        out = out if share is None else share * out
        return out if residual is None else residual + out
    return launch_tiles(states, weight, bias, (residual, share), tile_cut(states.dtype, tile_of(tokens), room(states)))


def tile_of(tokens: int) -> int:
    """Tokens of a tile of tensor cores."""
    return max(16, int(triton.next_power_of_2(tokens)))


def launch_rows(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    more: tuple[Tensor | None, Tensor | None],
    cut: RowCut,
) -> Tensor:
    """`product` of one token, with residual and share as `more`, cut as given."""
    residual, share = more
    (outputs, inputs), early = weight.shape, starts_early(states)
    assert states.is_contiguous()
    assert weight.is_contiguous()
    out, (first, second) = states.new_empty(len(states), outputs), halves(inputs)
    _row_product[(triton.cdiv(outputs, cut.rows),)](
        states, weight, states if bias is None else bias, states if norm is None else norm.weight,
        states if residual is None else residual, states if share is None else share, out, 0.0 if norm is None else norm.eps, outputs,
        inputs, cut.rows, first, second, biased=bias is not None, normed=norm is not None, wide=norm is not None and norm.wide,
        added=residual is not None, shared=share is not None, early=early, num_warps=cut.warps, launch_pdl=early,
    )  # fmt: skip
    return out


def launch_tiles(
    states: Tensor, weight: Tensor, bias: Tensor | None, more: tuple[Tensor | None, Tensor | None], cut: TileCut
) -> Tensor:
    """`product` of at most `MOST` tokens without a norm, with residual and share as `more`, cut as given."""
    residual, share = more
    (outputs, inputs), early = weight.shape, starts_early(states)
    assert states.is_contiguous()
    assert weight.is_contiguous()
    out = states.new_empty(len(states), outputs)
    _tile_product[(triton.cdiv(outputs, cut.block_n),)](
        states, weight, states if bias is None else bias, states if residual is None else residual, states if share is None else share, out,
        len(states), outputs, inputs, tile_of(len(states)), cut.block_n, cut.block_k, biased=bias is not None, added=residual is not None,
        shared=share is not None, early=early, num_warps=cut.warps, num_stages=cut.stages, launch_pdl=early,
    )  # fmt: skip
    return out
