"""Which attention block a module matches: its own forward runs beside the blocks' compositions, on random numbers.

Attention itself is replaced by a function of everything it gets, and what is kept of a token is compared as well. Must not know loaded
models and layers.
"""

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AttentionInterface

from expertflow.execution.blocks.draws import FAILS, agree, drawn, enlarged, norm_rounding, plain
from expertflow.execution.blocks.forms import (
    AttentionBlock,
    AttentionTensors,
    LatentBlock,
    LatentTensors,
    attention,
    over_latents,
)
from expertflow.execution.blocks.tensors import Tensors, attention_tensors, latent_tensors, rotary_of
from expertflow.kernels.backend import backend
from expertflow.kernels.blocks.given import Cells, Heads, LatentHeads
from expertflow.kernels.blocks.reference import rotate, turn_latents
from expertflow.models.attention import AttentionForm, attention_form
from expertflow.models.experts import Uncopied

TRIED = "expertflow-tried"
"""The attention implementation that modules get while they are tried."""
_FEW = 3
"""Tokens that attention is tried with: each costs as many products as the module has weights."""
_CPU = torch.device("cpu")
_ORDERS = ((True, False), (True, True), (False, False))
"""How pairs may lie before they are turned and afterwards: see `Rotary`."""
_TABLES = ((True, False), (False, True), (False, False))
"""How angles may come: as complex numbers; or each of them twice."""


def attention_block(module: Any, states: Tensor) -> AttentionBlock | LatentBlock | None:
    """The block that an attention module matches.

    Args:
        module: without weights.
        states: `[T, 1, H]`, of which a few are used.
    """
    form, few = attention_form(module), states[:_FEW]
    if form is AttentionForm.LATENT:
        return _latent(module, few)
    return _heads(module, few) if form in (AttentionForm.HEADS, AttentionForm.WIDE) else None


def _heads(module: Any, states: Tensor) -> AttentionBlock | None:
    """The block of attention over heads."""
    tensors = drawn(module)
    normed = "q_norm.weight" in tensors
    wide = normed and norm_rounding(module.q_norm)
    if wide is None:
        return None
    block = AttentionBlock(doubled=True, normed=normed, wide=wide)
    if (given := attention_tensors(module, block, tensors)) is None:
        return None
    turned, does = (module.head_dim, module.head_dim // 2, module.head_dim // 4), _Own(module, tensors, states)
    for woven, width, doubled in product((False, True), turned, (True, False)):
        block = replace(block, doubled=doubled, woven=woven)
        if _attends(module, block, given, does(width, block)):
            large = enlarged(tensors)
            own = _Own(module, large, states)(width, block)
            return block if _attends(module, block, attention_tensors(module, block, large), own) else None
    return None


def _latent(module: Any, states: Tensor) -> LatentBlock | None:
    """The block of attention over latents."""
    norms = [getattr(module, name, None) for name in ("kv_a_layernorm", "q_a_layernorm")]
    roundings, tensors = {norm_rounding(norm) for norm in norms if norm is not None}, drawn(module)
    if len(roundings) != 1 or (wide := roundings.pop()) is None:
        return None
    block = LatentBlock(wide=wide)
    if (given := latent_tensors(module, block, tensors)) is None:
        return None
    does = _Own(module, tensors, states)
    for (paired, doubled), (woven, parted) in product(_TABLES, _ORDERS):
        block = replace(block, paired=paired, doubled=doubled, woven=woven, parted=parted)
        if _attends(module, block, given, does(given.heads.rope, block)):
            large = enlarged(tensors)
            own = _Own(module, large, states)(given.heads.rope, block)
            return block if _attends(module, block, latent_tensors(module, block, large), own) else None
    return None


class _Does(NamedTuple):
    """What a module's own forward does.

    Attributes:
        states: `[T, 1, H]`, what it was given.
        angles: likewise.
        out: what it gave.
        kept: what it kept.
    """

    states: Tensor
    angles: Any
    out: Any
    kept: tuple[Tensor, Tensor]


class _Own:
    """A module's own forward, run once for all blocks that are given angles alike.

    Args:
        module: it is tried.
        tensors: random ones.
        states: `[T, 1, H]`.
    """

    def __init__(self, module: Any, tensors: Tensors, states: Tensor) -> None:
        """Nothing was run yet."""
        self._module, self._tensors, self._states = module, tensors, states
        self._done: dict[tuple[int, bool, bool], _Does | None] = {}

    def __call__(self, turned: int, block: AttentionBlock | LatentBlock) -> _Does | None:
        """What it does with angles of `turned` elements of a head; None if it does not take them."""
        key = turned, block.doubled, isinstance(block, LatentBlock) and block.paired
        if key not in self._done:
            self._done[key] = self._run(_angles(turned, block))
        return self._done[key]

    def _run(self, angles: Any) -> _Does | None:
        module, own, kept = self._module, self._module.config, _Kept()
        given = {"hidden_states": self._states, "position_embeddings": angles}
        module.config = _Config(own)
        try:
            more = {**given, "attention_mask": None, "past_key_values": kept}
            out = plain(functional_call(module, self._tensors, (), more))
        except FAILS:
            return None
        finally:
            module.config = own
        return _Does(self._states, angles, out, kept.given)


def _attends(
    module: Any,
    block: AttentionBlock | LatentBlock,
    given: AttentionTensors | LatentTensors | None,
    does: _Does | None,
) -> bool:
    """Whether the attention does as its block, and keeps the same."""
    if does is None or given is None:
        return False
    states = does.states[:, 0]
    cells, rotary, kernels = _cells(given.heads), rotary_of(block, does.angles), backend(_CPU)
    if isinstance(given, LatentTensors):
        heads = given.heads

        def read(queries: Tensor, latents: Tensor) -> Tensor:
            asked = turn_latents(queries, latents, heads, rotary, cells)
            made = (cells.keys @ heads.weight.T).view(len(asked), heads.queries, 1, -1)
            plainly, values = made.split([heads.plain, made.shape[3] - heads.plain], dim=3)
            keys = torch.cat([plainly, cells.values.expand(*plainly.shape[:3], -1)], dim=3)
            return _mix(module, asked[:, :, None], keys, values, None, module.scaling)[0][:, 0]

        mine = over_latents(kernels, given, states, read)
    else:
        tensors_of_heads = given

        def attend(joined: Tensor) -> Tensor:
            queries = rotate(joined, tensors_of_heads.heads, rotary, tensors_of_heads.norms, cells)
            return _mix(module, queries[:, :, None], *cells[:2], None, module.scaling)[0][:, 0]

        mine = attention(kernels, given, states, attend)
    return agree(mine[:, None], does.out) and all(map(agree, cells[:2], does.kept))


def _cells(heads: Heads | LatentHeads) -> Cells:
    """A page of one place for each token."""
    place = torch.arange(_FEW)
    keys, values = (torch.zeros(_FEW, count, 1, width) for count, width in heads.kept)
    return Cells(keys, values, place, torch.zeros_like(place))


def _angles(turned: int, block: AttentionBlock | LatentBlock) -> Any:
    """Random angles for `turned` elements of a head, as layers are given them."""
    angles = 6 * torch.rand(_FEW, 1, turned // 2, generator=torch.Generator().manual_seed(2))
    if isinstance(block, LatentBlock) and block.paired:
        return torch.polar(torch.ones_like(angles), angles)
    angles = torch.cat([angles, angles], dim=2) if block.doubled else angles
    return angles.cos(), angles.sin()


class _Kept:
    """A cache that keeps what a module gives it."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self.given = torch.zeros(0), torch.zeros(0)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep a pass's keys and values, and hand them back."""
        self.given = keys, values
        return keys, values


class _Config(Uncopied):
    """An attention module's config, which names the implementation under which it is tried."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self._attn_implementation = TRIED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _mix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """In place of attention: something that depends on every number of queries, keys, values, and on the scale."""
    del module, attention_mask
    if any(more.get(name) is not None for name in ("position_bias", "softcap")):
        raise NotImplementedError
    if query.shape[3] != value.shape[3]:
        folds = torch.randn(query.shape[3], value.shape[3], generator=torch.Generator().manual_seed(4))
        query, key = query @ folds, key @ folds
    groups = query.shape[1] // key.shape[1]
    mixed = (
        torch.tanh(query * scaling * 8) + key.repeat_interleave(groups, 1) - 0.5 * value.repeat_interleave(groups, 1)
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register(TRIED, _mix)
