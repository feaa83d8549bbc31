"""Where the experts of a token's pairs lie, looked up where every expert is in its slot for good.

Twin of `find_slots` in `kernels.reference`. Must not know how slots are decided.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.device import starts_early

_BLOCK = 256
"""Pairs of a program."""


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["places", "index", "live"])
def _find_slots(
    places,
    index,
    live,
    slots,
    count,
    top_k: tl.constexpr,
    experts: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """The slots of some pairs."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0) * block + tl.arange(0, block)
    expert = tl.load(index + pair, mask=pair < count, other=experts)
    known = (pair // top_k < tl.load(live)) & (expert >= 0) & (expert < experts)
    tl.store(slots + pair, tl.load(places + expert, mask=known, other=-1), mask=pair < count)


def find_slots(places: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """The slot of each pair's expert. As `kernels.reference.find_slots`; one launch."""
    assert index.is_contiguous()
    slots, early = torch.empty_like(index, dtype=torch.int32), starts_early(index)
    _find_slots[(triton.cdiv(index.numel(), _BLOCK),)](
        places, index, live, slots, index.numel(), top_k=index.shape[1], experts=len(places), block=_BLOCK, early=early,
        num_warps=1, launch_pdl=early,
    )  # fmt: skip
    return slots
