"""Tile loaders: how the expert kernels read a weight, by the name of its format.

A loader is a Triton function of

    record: pointer to the record's first byte, as a pointer to the model's dtype
    at: byte offsets of the format's parts in the record, `Part` by `Part`
    outs, cols: the outputs `[R]` and inputs `[C]` wanted
    n, k: outputs and inputs of the weight
    transposed: whether plain numbers are input-major
    whole: no output or input lies outside

that gives the tile `[R, C]` in the model's dtype, zero outside, with the numbers that the format's `decode` gives. What is computed
from a tile is the same for every format, so packed weights give the bits of the decoded ones. Must not know experts and slots.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import triton
import triton.language as tl

from expertflow.formats.format import Format
from expertflow.formats.plain import PLAIN


@triton.jit
def load_plain(
    record, at: tl.constexpr, outs, cols, n: tl.constexpr, k: tl.constexpr, transposed: tl.constexpr,
    whole: tl.constexpr,
):  # fmt: skip
    """Plain numbers."""
    weight = record + at[0] // (record.dtype.element_ty.primitive_bitwidth // 8)
    if transposed:
        where, inside = weight + cols[:, None] * n + outs[None, :], (cols[:, None] < k) & (outs[None, :] < n)
    else:
        where, inside = weight + outs[:, None] * k + cols[None, :], (outs[:, None] < n) & (cols[None, :] < k)
    tile = tl.load(where) if whole else tl.load(where, mask=inside, other=0.0)
    return tl.trans(tile) if transposed else tile


TILE_LOADERS: Mapping[str, Any] = MappingProxyType({PLAIN.name: load_plain})
"""Tile loaders by the format's name."""


def has_loader(format_: Format) -> bool:
    """Whether the expert kernels read a format."""
    return format_.tile_loader is not None or format_.name in TILE_LOADERS


def tile_loader(format_: Format) -> Any:
    """The loader of a format: its own, else the table's.

    Raises:
        KeyError: if there is none.
    """
    return format_.tile_loader or TILE_LOADERS[format_.name]
