"""Weights of several products over the same states as one, without further memory. Must not know modules."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_ALIGNED = {"cpu": 64, "cuda": 16}
"""Bytes at which a weight has to begin, so that products of it alone keep their bits."""
LARGE = 64 << 20
"""Bytes of joined weights beyond which parts go by way of the host: a plan keeps as much for graphs, none of which is there yet."""


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parts, one after the other; the parts become views of them.

    Args:
        parts: parameters `[N, ...]`, alike but for N.

    Returns:
        `[sum of N, ...]`; None if a part would begin where products of it alone have other bits, or would be of another number type.
    """
    first = parts[0]
    shape = (sum(map(len, parts)), *first.shape[1:])
    counts = [part.numel() for part in parts]
    bounds: list[int] = list(accumulate(counts, initial=int(first.storage_offset())))
    if all(_lies(part, first, begin) for part, begin in zip(parts, bounds, strict=False)):
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    sizes = [(begin - bounds[0]) * first.element_size() for begin in bounds[:-1]]
    unlike = any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts)
    if unlike or any(size % _ALIGNED.get(first.device.type, 16) for size in sizes):
        return None
    with torch.inference_mode(mode=False), torch.no_grad():
        held = [part.data for part in parts]
        if sum(counts) * first.element_size() > LARGE:
            held = [part.cpu() for part in held]
            for part in parts:
                part.data = part.data.new_empty(0)
        device = first.device
        try:
            whole = torch.empty(shape, dtype=first.dtype, device=device)
        except BaseException:
            for part, one in zip(parts, held, strict=True):
                part.data = one.to(device)
            raise
        rows = list(accumulate(map(len, held), initial=0))
        for part, one, (begin, end) in zip(parts, held, pairwise(rows), strict=True):
            part.data = whole[begin:end].copy_(one)
    return whole


def _lies(part: Tensor, first: Tensor, begin: int) -> bool:
    """Whether a part begins so many elements from the beginning of the first one's memory."""
    same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    return same and part.storage_offset() == begin and part.is_contiguous() and part.dtype == first.dtype
