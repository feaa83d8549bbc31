"""The first half of a gated feed-forward block: two products over the same states, and what the activation makes of them.

Twin of `reference.gated`. As `product`, one kernel for a single token and one for more, whose programs make both products of some
outputs. Both are rounded as the module's are before the activation. Must not know modules.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.blocks.given import Norm
from expertflow.kernels.blocks.product import ENOUGH, MOST, TileCut, tile_of
from expertflow.kernels.blocks.rows import dot_rows, halves, load_rows, load_states, scaled
from expertflow.kernels.dense import INTERPRETED, rms_norm
from expertflow.kernels.device import room, starts_early
from expertflow.kernels.experts import activate
from expertflow.kernels.mlp import ACTIVATIONS

_WARPS = 4
"""Of the program of one token."""


@triton.jit
def _joined(gate, up, dtype: tl.constexpr, activation: tl.constexpr):
    """The activation of one sum times the other, rounded where the module rounds."""
    made = activate(gate.to(dtype).to(tl.float32), activation).to(dtype).to(tl.float32)
    return (made * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _gated_row(
    states, weight, gains, out, eps: tl.constexpr, n: tl.constexpr, k: tl.constexpr, rows: tl.constexpr, first: tl.constexpr,
    second: tl.constexpr, activation: tl.constexpr, normed: tl.constexpr, wide: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Some outputs of one token."""
    outs = tl.program_id(0) * rows + tl.arange(0, rows)
    dtype: tl.constexpr = out.dtype.element_ty
    if early:
        gdc_launch_dependents()
    left, right = load_rows(weight, outs, n, k, 0, first), load_rows(weight, outs, n, k, first, second)
    up_left, up_right = (
        load_rows(weight + n * k, outs, n, k, 0, first),
        load_rows(weight + n * k, outs, n, k, first, second),
    )
    if normed:
        left_gains, right_gains = load_states(gains, k, 0, first), load_states(gains, k, first, second)
    if early:  # a weight was there before the kernel that makes the states began
        gdc_wait()
    x, y = load_states(states, k, 0, first), load_states(states, k, first, second)
    if normed:
        root = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / k + eps)
        x, y = scaled(x, root, left_gains, wide, dtype), scaled(y, root, right_gains, wide, dtype)
    done = _joined(
        dot_rows(left, x) + dot_rows(right, y), dot_rows(up_left, x) + dot_rows(up_right, y), dtype, activation
    )
    tl.store(out + outs, done, mask=outs < n)


@triton.jit(do_not_specialize=["tokens"])
def _gated_tile(
    states, weight, out, tokens, n: tl.constexpr, k: tl.constexpr, tile: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    activation: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Some outputs of all tokens."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    outs, token, cell = tl.program_id(0) * block_n + tl.arange(0, block_n), tl.arange(0, tile), tl.arange(0, block_k)
    rows, columns = weight + outs.to(tl.int64)[:, None] * k, states + token[None, :] * k
    gate, up = tl.zeros([block_n, tile], tl.float32), tl.zeros([block_n, tile], tl.float32)
    for begin in range(0, k, block_k):
        here = begin + cell
        inside = (outs < n)[:, None] & (here < k)[None, :]
        part = tl.load(rows + here[None, :], mask=inside, other=0.0)
        other = tl.load(rows + n * k + here[None, :], mask=inside, other=0.0)
        x = tl.load(columns + here[:, None], mask=(token < tokens)[None, :] & (here < k)[:, None], other=0.0)
        if INTERPRETED:
            part, other, x = part.to(tl.float32), other.to(tl.float32), x.to(tl.float32)
        gate = tl.dot(part, x, gate, input_precision="ieee")
        up = tl.dot(other, x, up, input_precision="ieee")
    place = token[None, :] * n + outs[:, None]
    done = _joined(gate, up, out.dtype.element_ty, activation)
    tl.store(out + place, done, mask=(outs < n)[:, None] & (token < tokens)[None, :])


def gated(states: Tensor, weight: Tensor, activation: str, norm: Norm | None = None) -> Tensor:
    """The activation of one product times another. As `reference.gated`."""
    tokens, outputs, early = len(states), len(weight) // 2, starts_early(states)
    assert weight.is_contiguous()
    if tokens > 1 and norm is not None:
        states = rms_norm(states, norm.weight, norm.eps, wide=norm.wide)
    if tokens > MOST:
        gate, up = functional.linear(states, weight).chunk(2, dim=1)
        return ACTIVATIONS[activation](gate) * up
    assert states.is_contiguous()
    out, inputs = states.new_empty(tokens, outputs), weight.shape[1]
    if tokens == 1:
        (first, second), rows = halves(inputs), 2 if outputs >= ENOUGH else 1
        _gated_row[(triton.cdiv(outputs, rows),)](
            states, weight, states if norm is None else norm.weight, out, 0.0 if norm is None else norm.eps, outputs, inputs, rows, first,
            second, activation, normed=norm is not None, wide=norm is not None and norm.wide, early=early, num_warps=_WARPS, launch_pdl=early,
        )  # fmt: skip
        return out
    tile = tile_of(tokens)
    cut = gated_cut(states.dtype, tile, room(states))
    _gated_tile[(triton.cdiv(outputs, cut.block_n),)](
        states, weight, out, tokens, outputs, inputs, tile, cut.block_n, cut.block_k, activation=activation, early=early,
        num_warps=cut.warps, num_stages=cut.stages, launch_pdl=early,
    )  # fmt: skip
    return out


def gated_cut(dtype: torch.dtype, tile: int, space: int) -> TileCut:
    """How the products of more tokens are cut: tiles of so many, in programs that have `space` bytes of shared memory."""
    block_n, block_k, stages = (16, 32, 3) if dtype == torch.float32 else (32, 128, 5)
    step = (2 * block_n + tile) * block_k * dtype.itemsize
    return TileCut(block_n, block_k, 4, max(2, min(stages, space // step)))
