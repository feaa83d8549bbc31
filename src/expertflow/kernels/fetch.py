"""Zero-copy fetch: a few programs read records from page-locked host memory by address and write them into slots.

The host decides nothing: the device reads from the step's `kernels.ledger` how many records to copy, which ones and
where to. Programs take blocks of records from it, so several calls on several streams may carry one list. Twin of
`kernels.reference.fetch_records`. Must not know experts, layers and the former content of a slot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertflow.kernels.ledger import BLOCK_BYTES, CARRIED, DONE, DST, LINE, PRIOR, SRC, TAKEN, Ledger

WORD = torch.int64
"""Element of a copy; a lane moves 16 bytes as two of them."""
WARPS = 16
_LINE = tl.constexpr(LINE // WORD.itemsize)
_SRC, _DST, _TAKEN, _DONE, _PRIOR, _CARRIED = (tl.constexpr(place) for place in (SRC, DST, TAKEN, DONE, PRIOR, CARRIED))


@triton.jit
def _until(counter, enough):
    """Wait until a counter reaches `enough`; writes made before it was raised are then visible."""
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < enough:
        seen = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def _take(taken, urgent, busy, gives_way: tl.constexpr):
    """The next block of a load. A call that `gives_way` first waits, if `busy`, until no program carries what a layer waits for."""
    if gives_way:
        while busy > 0:
            busy = tl.atomic_add(urgent, 0, sem="relaxed")
    return tl.atomic_add(taken, 1, sem="relaxed")


@triton.jit
def _count_urgent(urgent, begin, end, change: tl.constexpr):
    """Say that a program has begun or ended to carry what a layer waits for, if there is anything."""
    if begin < end:
        tl.atomic_add(urgent, change, sem="relaxed")


# parts of a list start at any address; specializing on them might compile a kernel anew during a capture
@triton.jit(do_not_specialize=["entries"], do_not_specialize_on_alignment=["todo", "bounds", "urgent"])
def _fetch_kernel(  # noqa: C901 - most branches are known when compiling
    host, pool, ledger, todo, bounds, urgent, lines, entries,
    record: tl.constexpr, block: tl.constexpr, wait: tl.constexpr, unequal: tl.constexpr,
):  # fmt: skip
    """Take blocks of at most `block` words from the entries, one after the other; rows are `record` words, a record no more."""
    begin = tl.load(bounds)
    end = tl.load(bounds + 1)
    blocks: tl.constexpr = (record + block - 1) // block
    if wait:
        _count_urgent(urgent, begin, end, 1)
    place = begin
    while place < end:  # the interpreter has no `range` over values of the device
        entry = ledger + tl.load(todo + place)
        before = tl.load(entry + _PRIOR * entries)
        if before >= 0:  # a load into the same slot was called off: wait for its blocks under way
            _until(ledger + _DONE * entries + before, tl.minimum(tl.load(ledger + _CARRIED * entries + before), blocks))
        src = tl.load(entry + _SRC * entries)
        words, step = record, block
        if unequal:  # as many blocks, but smaller ones, of whole lines
            words = tl.load(lines + src) * _LINE
            step = tl.cdiv(tl.load(lines + src), blocks) * _LINE
        source = host + src.to(tl.int64) * record
        target = pool + tl.load(entry + _DST * entries).to(tl.int64) * record
        busy = tl.full([], 1, tl.int32)
        part = _take(entry + _TAKEN * entries, urgent, busy, not wait)
        while part < blocks:
            inside = tl.arange(0, block)
            at = part * step + inside
            mask = at < words
            if unequal:
                mask = mask & (inside < step)
            moved = tl.load(source + at, mask=mask, cache_modifier=".cg")
            if not wait:  # asked while the block moves; threads that loaded the number might see different ones
                busy = tl.atomic_add(urgent, 0, sem="relaxed")
            tl.store(target + at, moved, mask=mask)
            tl.debug_barrier()  # the whole program has written
            tl.atomic_add(entry + _DONE * entries, 1, sem="release")
            part = _take(entry + _TAKEN * entries, urgent, busy, not wait)
        place += 1
    if wait:  # what is left are blocks under way
        _count_urgent(urgent, begin, end, -1)
        if tl.program_id(0) == 0:
            place = begin
            while place < end:
                _until(ledger + tl.load(todo + place) + _DONE * entries, blocks)
                place += 1


def blocks_of(record_bytes: int) -> int:
    """Return the number of blocks in which `fetch_records` carries a record."""
    record = record_bytes // WORD.itemsize
    return int(triton.cdiv(record, _block(record, BLOCK_BYTES)))


def _block(record: int, block_bytes: int) -> int:
    """Return the words of a block of a record of `record` words."""
    return min(block_bytes // WORD.itemsize, int(triton.next_power_of_2(record)))


def fetch_records(
    host: Tensor, pool: Tensor, ledger: Ledger, todo: Tensor, bounds: Tensor, programs: int = 8, *, wait: bool = True
) -> None:
    """Carry the loads named by list entries `bounds[0] .. bounds[1] - 1` from host memory into slots.

    Queued on the current stream, capturable, and no more than `programs` multiprocessors wide. Blocks that another
    call is carrying are left to it. A call that does not wait gives way to those that do.

    Args:
        host: uint8 `[records, record_bytes]`, page-locked (allocated so or registered); `record_bytes` a multiple of 256.
        pool: uint8 `[S, record_bytes]` on the device.
        ledger: the loads.
        todo: int32 `[N]`, entries of the ledger, in order of urgency.
        bounds: int32 `[2]` on the device: first place in `todo` and one past the last. A list of several phases with
            its offsets `[P + 1]` is walked with `bounds=offsets[phase : phase + 2]`.
        programs: how many programs share the copy.
        wait: end only when all of these records have arrived, whichever call carries them.
    """
    launch_fetch(host, pool, (ledger, todo, bounds), programs, BLOCK_BYTES, WARPS, wait=wait)


def launch_fetch(
    host: Tensor,
    pool: Tensor,
    loads: tuple[Ledger, Tensor, Tensor],
    programs: int,
    block_bytes: int,
    warps: int,
    *,
    wait: bool = True,
) -> None:
    """Run `fetch_records` with every choice given; `loads` are ledger, todo and bounds."""
    record = host.shape[1] // WORD.itemsize
    block = _block(record, block_bytes)
    ledger, todo, bounds = loads
    _fetch_kernel[(programs,)](
        host.view(WORD), pool.view(WORD), ledger.table, todo, bounds, ledger.urgent, todo if ledger.lines is None else ledger.lines,
        ledger.entries, record=record, block=block, wait=wait, unequal=ledger.lines is not None, num_warps=warps,
    )  # fmt: skip
