"""The expert MLP for all tokens of a pass: the twin of `group_pairs` in `kernels.reference`.

Tokens are sorted by expert. So a program takes up to 128 tokens of one expert, and the weight that it reads serves all of them. A kernel
lists the tiles, so the host need not know the routing: experts that are in slots begin while it waits for that. The product is the one of
`kernels.experts`: along H (then I) in the same steps, with the same epilogues. Only the number of tokens in a tile differs, and a tensor
core adds up each token's column by itself. So a pair has the bits that it has in a decode step, whatever the size of the pass. Must not know layers, and which side decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertflow.kernels.experts import activated, add_bias, read_arguments, up_outputs
from expertflow.kernels.launching import launch, launch_within
from expertflow.kernels.mlp import MAX_PAIRS, ExpertMlp, Projection, Workspace
from expertflow.kernels.prompts.pairs import SortedPairs
from expertflow.kernels.tiling import Tiling, tilings

TILES = (16, 64, 128)
"""Tokens of a tile; the narrowest is the decode step's, and the only one in float32, which is multiplied without tensor cores."""
_OUTPUTS = 128
"""Outputs of a tile at most. Fewer than 64 stay as they are, because Hopper multiplies them by other instructions."""
_LISTED = 8192
"""Comparisons of tile and expert that a program makes to list tiles, at most."""
_ROOM = 96 << 10
"""Shared memory of a program on every device from sm_80 on, bytes."""


@triton.jit
def _place(tiles, begin, end, slot, tok: tl.constexpr):
    """Places `[tok]` in the sorted order of this program's tile, where its tokens end, and its slot.

    All tiles are of the expert in `slot`; if that is negative, `tiles` lists begin, end and slot of each. A tile of none ends at 0.
    """
    tile = tl.program_id(1)
    if slot < 0:
        begin = tl.load(tiles + 3 * tile)
        end = tl.load(tiles + 3 * tile + 1)
        slot = tl.load(tiles + 3 * tile + 2)
    else:
        begin += tile * tok
    return begin + tl.arange(0, tok), end, slot.to(tl.int64)


@triton.jit(do_not_specialize=["experts", "count"])
def _list_kernel(edges, slots, tiles, experts, count, tok: tl.constexpr, padded: tl.constexpr, block: tl.constexpr):
    """List the tiles of experts that have a slot: first place, end of the expert's places, slot; zeros behind the last tile."""
    expert = tl.arange(0, padded)
    known = expert < experts
    begin = tl.load(edges + expert, mask=known, other=0)
    end = tl.load(edges + expert + 1, mask=known, other=0)
    has = known & (tl.load(slots + expert, mask=known, other=-1) >= 0)
    behind = tl.cumsum(tl.where(has, (end - begin + tok - 1) // tok, 0), 0)
    tile = tl.program_id(0) * block + tl.arange(0, block)
    over = behind[None, :] <= tile[:, None]
    mine = tl.sum(over.to(tl.int32), 1)
    within = mine < experts
    first = tl.max(tl.where(over, behind[None, :], 0), 1)
    begin = tl.load(edges + mine, mask=within, other=0) + (tile - first) * tok
    end = tl.load(edges + mine + 1, mask=within, other=0)
    slot = tl.load(slots + mine, mask=within, other=0)
    listed = tile < count
    tl.store(tiles + 3 * tile, tl.where(within, begin, 0), mask=listed)
    tl.store(tiles + 3 * tile + 1, end, mask=listed)
    tl.store(tiles + 3 * tile + 2, slot, mask=listed)


@triton.jit(do_not_specialize=["begin", "end", "slot"])
def _up_kernel(
    hidden, order, pool, inner, tiles, begin, end, slot, tok: tl.constexpr, top_k: tl.constexpr,
    h: tl.constexpr, i: tl.constexpr, size: tl.constexpr, multiply: tl.constexpr, load: tl.constexpr, at: tl.constexpr,
    about: tl.constexpr, bias: tl.constexpr, gated: tl.constexpr, interleaved: tl.constexpr, transposed: tl.constexpr,
    activation: tl.constexpr, alpha: tl.constexpr, limit: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """`inner[place] = activation(up(hidden[order[place] // top_k]))`, a block of inner elements of a tile of tokens a program."""
    place, end, slot = _place(tiles, begin, end, slot, tok)
    if end == 0:
        return
    valid = place < end
    inputs = hidden + (tl.load(order + place, mask=valid, other=0) // top_k) * h
    record = pool + slot * size
    first = tl.program_id(0) * block_n
    n: tl.constexpr = 2 * i if gated else i
    exact: tl.constexpr = i % block_n == 0
    outs = up_outputs(first, block_n, i, gated, interleaved)
    out = multiply(
        inputs, valid, record, load, at, about, outs, n, h, transposed, exact, block_k, chunk, False, 0, 0, False
    )
    out = activated(add_bias(out, record, bias, outs, n), gated, interleaved, activation, alpha, limit, block_n)
    cols = first + tl.arange(0, block_n)
    target = inner + place.to(tl.int64)[None, :] * i + cols[:, None]
    tl.store(target, out.to(inner.dtype.element_ty), mask=valid[None, :] & (cols[:, None] < i))


@triton.jit(do_not_specialize=["begin", "end", "slot"])
def _down_kernel(
    inner, order, pool, parts, tiles, begin, end, slot, tok: tl.constexpr, h: tl.constexpr,
    i: tl.constexpr, size: tl.constexpr, multiply: tl.constexpr, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr,
    bias: tl.constexpr, transposed: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """`parts[order[place]] = down(inner[place])`, a block of outputs of a tile of tokens a program."""
    place, end, slot = _place(tiles, begin, end, slot, tok)
    if end == 0:
        return
    valid = place < end
    pairs = tl.load(order + place, mask=valid, other=0)
    record = pool + slot * size
    outs = tl.program_id(0) * block_n + tl.arange(0, block_n)
    inputs = inner + place.to(tl.int64) * i
    out = multiply(
        inputs, valid, record, load, at, about, outs, h, i, transposed, h % block_n == 0, block_k, chunk, False, 0, 0, False,
    )  # fmt: skip
    out = add_bias(out, record, bias, outs, h)
    tl.store(parts + pairs[None, :] * h + outs[:, None], out, mask=valid[None, :] & (outs[:, None] < h))


KERNELS, LIST_KERNEL = (_up_kernel, _down_kernel), _list_kernel
"""What `launches` gives arguments for, and what lists their tiles."""


class GroupedMlp:
    """Runs some experts of a layer on all their tokens, and keeps the results apart: `work.parts[t, k]`.

    As `kernels.reference.group_pairs`; two launches on the current stream, and a small copy and a third launch to list the tiles, if the
    group has several experts or the host does not know how many pairs they have.

    Args:
        mlp: what a record holds.
        device: where it runs.
    """

    def __init__(self, mlp: ExpertMlp, device: torch.device) -> None:
        """Launch nothing yet."""
        self._mlp, self._room = mlp, _ROOM
        self._unlisted = torch.zeros(3, dtype=torch.int32, device=device)
        if device.type == "cuda":
            properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the attribute
            self._room = int(properties.shared_memory_per_block_optin)
        self._arguments: dict[tuple[int, tuple[Tiling, Tiling] | None], tuple[Launch, Launch]] = {}

    def __call__(
        self, hidden: Tensor, pairs: SortedPairs, group: Sequence[tuple[int, int]], pool: Tensor, work: Workspace
    ) -> None:
        """Run the experts of `group`, each with its slot."""
        self.launch(hidden, pairs, group, pool, work, tile=tile_for(self._mlp, pairs.mean))

    def launch(
        self,
        hidden: Tensor,
        pairs: SortedPairs,
        group: Sequence[tuple[int, int]],
        pool: Tensor,
        work: Workspace,
        *,
        tile: int,
        cuts: tuple[Tiling, Tiling] | None = None,
    ) -> None:
        """Run the experts in tiles of `tile` tokens; `cuts` are the tilings of up and down projection, None: `wider_tilings`."""
        assert hidden.is_contiguous()
        assert hidden.dtype == self._mlp.torch_dtype
        if (tile, cuts) not in self._arguments:
            chosen = cuts or wider_tilings(self._mlp, tile, self._room)
            self._arguments[tile, cuts] = launches(self._mlp, tile, chosen)
        up, down = self._arguments[tile, cuts]
        count, span = pairs.tiles(group, tile), pairs.span(group[0][0]) if len(group) == 1 else None
        if span is not None:
            where: tuple[Any, ...] = (self._unlisted, *span, group[0][1])
        else:
            where = (list_tiles(pairs, group, tile, count), 0, 0, -1)
        records = pool.view(self._mlp.torch_dtype)
        up.run(_up_kernel, count, (hidden, pairs.order, records, work.inner, *where), top_k=pairs.top_k)
        down.run(_down_kernel, count, (work.inner, pairs.order, records, work.parts, *where))


@dataclass(frozen=True)
class Launch:
    """What is the same in every launch of a kernel: programs along the outputs, and arguments."""

    blocks: int
    arguments: dict[str, Any]

    def run(self, kernel: Any, tiles: int, given: tuple[Any, ...], **more: Any) -> None:
        """Launch for some tiles of tokens, with fewer steps in flight from now on if the device has no room for as many."""
        every = {**self.arguments, **more}
        stages = launch_within(kernel, (self.blocks, tiles), given, every.pop("num_stages"), **every)
        self.arguments["num_stages"] = stages


def launches(mlp: ExpertMlp, tile: int, cuts: tuple[Tiling, Tiling]) -> tuple[Launch, Launch]:
    """What is the same in every launch of the up and of the down kernel, but for `top_k` of the first."""
    size, (up, down) = mlp.torch_dtype.itemsize, cuts

    def both(projection: Projection, cut: Tiling) -> dict[str, Any]:
        return {
            "tok": tile, "h": mlp.hidden, "i": mlp.width, "size": mlp.record_bytes // size, "transposed": mlp.transposed,
            "bias": -1 if projection.bias is None else projection.bias // size, **read_arguments(projection),
            "block_n": cut.block_n, "block_k": cut.block_k, "chunk": cut.chunk, "num_warps": cut.warps, "num_stages": cut.stages,
        }  # fmt: skip

    between = {
        "gated": mlp.gated, "interleaved": mlp.interleaved, "activation": mlp.activation, "alpha": mlp.alpha,
        "limit": mlp.limit,
    }  # fmt: skip
    return (
        Launch(triton.cdiv(mlp.width, up.block_n), {**both(mlp.up, up), **between}),
        Launch(triton.cdiv(mlp.hidden, down.block_n), both(mlp.down, down)),
    )


def list_tiles(pairs: SortedPairs, group: Sequence[tuple[int, int]], tile: int, count: int) -> Tensor:
    """The tiles of a group by expert, int32 `[count, 3]` on the device: first place, end of the expert's places, slot; zeros behind them."""
    slots = [-1] * pairs.experts
    for expert, slot in group:
        slots[expert] = slot
    edges = pairs.edges
    given = torch.tensor(slots, dtype=torch.int32).to(edges.device, non_blocking=True)
    tiles = torch.empty((count, 3), dtype=torch.int32, device=edges.device)
    padded = triton.next_power_of_2(pairs.experts)
    block = max(1, min(64, _LISTED // padded))
    arguments, options = (edges, given, tiles, pairs.experts, count), {"tok": tile, "padded": padded, "block": block}
    launch(_list_kernel, (triton.cdiv(count, block),), arguments, **options)
    return tiles


def tile_for(mlp: ExpertMlp, tokens: float) -> int:
    """Tokens of a tile, for experts of so many tokens on average. It does not enter the arithmetic."""
    if mlp.dtype == "float32":
        return TILES[0]
    return next((size for size in TILES if size >= tokens), TILES[-1])


def wider_tilings(mlp: ExpertMlp, tile: int, room: int) -> tuple[Tiling, Tiling]:
    """How up and down projection are cut for tiles of `tile` tokens and `room` bytes of shared memory.

    `block_k` is the decode step's, so that the arithmetic is.
    """
    up, down = tilings(mlp, MAX_PAIRS, room)
    if tile == TILES[0] or mlp.dtype == "float32":
        return up, down
    return _wider(up, 2 if mlp.gated else 1, tile, room), _wider(down, 1, tile, room)


def _wider(cut: Tiling, outputs: int, tile: int, room: int) -> Tiling:
    """A tiling for more tokens; `outputs` of the weight make one of `block_n`."""
    rows = cut.block_n * outputs
    if rows >= 64:
        rows = _OUTPUTS if room > 2 * _ROOM or tile < TILES[-1] else 64
    step = (rows + tile) * cut.block_k * 2
    stages = max(1, min(cut.stages, room // step))
    return Tiling(rows // outputs, cut.block_k, 8 if rows * tile > 64 * 128 else 4, stages, cut.chunk)
