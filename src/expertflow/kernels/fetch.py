"""Zero-copy fetch: a few programs read rows from page-locked host memory by address and write them into slots.

The copy needs no host decision: how many rows, which ones and where to are read on the device. Twin of
`kernels.reference.fetch_rows`. Knows bytes; refuses to know experts, layers and what a slot held before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = torch.int64
"""What one lane element is: a lane then moves 16 bytes as two of them."""
BLOCK_BYTES = 32768
"""Bytes a program has in flight at a time: four programs cover the link's latency."""
WARPS = 16


# parts of a list start anywhere; a kernel compiled anew for one of them might be compiled during a capture
@triton.jit(do_not_specialize_on_alignment=["src", "dst", "bounds"])
def _fetch_kernel(host, pool, src, dst, bounds, row: tl.constexpr, block: tl.constexpr):
    """Programs take turns at blocks of `block` words; a row is `row` words."""
    begin = tl.load(bounds)
    end = tl.load(bounds + 1)
    blocks = (row + block - 1) // block
    turn = tl.program_id(0)
    while turn < (end - begin) * blocks:  # the interpreter has no `range` over values of the device
        entry = begin + turn // blocks
        at = (turn % blocks) * block + tl.arange(0, block)
        source = host + tl.load(src + entry).to(tl.int64) * row
        target = pool + tl.load(dst + entry).to(tl.int64) * row
        words = tl.load(source + at, mask=at < row, cache_modifier=".cg")
        tl.store(target + at, words, mask=at < row)
        turn += tl.num_programs(0)


def fetch_rows(host: Tensor, pool: Tensor, src: Tensor, dst: Tensor, bounds: Tensor, programs: int = 8) -> None:
    """Copy the rows of list entries `bounds[0] .. bounds[1] - 1` from host memory into slots.

    Queued on the current stream, capturable, and no more than `programs` multiprocessors wide.

    Args:
        host: uint8 `[rows, row_bytes]`, page-locked (allocated so or registered); `row_bytes` a multiple of 256.
        pool: uint8 `[S, row_bytes]` on the device.
        src: int32 `[N]`, rows to read.
        dst: int32 `[N]`, slots to write; distinct among the entries of one call.
        bounds: int32 `[2]` on the device: first entry and one past the last. A list of several layers with its
            offsets `[L + 1]` is walked with `bounds=offsets[layer : layer + 2]`.
        programs: how many programs share the copy.
    """
    launch_fetch(host, pool, (src, dst, bounds), programs, BLOCK_BYTES, WARPS)


def launch_fetch(
    host: Tensor, pool: Tensor, entries: tuple[Tensor, Tensor, Tensor], programs: int, block_bytes: int, warps: int
) -> None:
    """`fetch_rows` with every choice given; entries are src, dst and bounds."""
    row = host.shape[1] // WORD.itemsize
    block = min(block_bytes // WORD.itemsize, int(triton.next_power_of_2(row)))
    _fetch_kernel[(programs,)](host.view(WORD), pool.view(WORD), *entries, row=row, block=block, num_warps=warps)
