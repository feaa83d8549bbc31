"""The numbers a planner needs of a model: layers, experts, dense bytes, KV bytes, sizes that drive the workspace.

Pure figures, taken from a skeleton. Must not know budgets and devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from expertflow.formats.dtypes import DTYPES
from expertflow.formats.format import TensorSpec
from expertflow.formats.records import StoreLayout
from expertflow.models.attention import (
    EMPTY,
    KEYS_AND_VALUES,
    RECURRENT,
    STEP_FORMS,
    attention_windows,
    by_kernel,
    layer_kinds,
)
from expertflow.models.bounds import describing
from expertflow.models.places import described_by
from expertflow.models.skeleton import Skeleton
from expertflow.types import LARGE
from expertflow.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class KvLayer:
    """Key and value memory of one attention layer.

    Attributes:
        bytes_per_token: of keys and values together, for one sequence.
        read_per_token: the same as the model's own attention reads them: latents are kept as they are and expanded in each pass.
        in_pages: whether they lie in pages, of which a sequence has as many as it needs.
        source_length: whether the layer holds the encoder's tokens (cross-attention) instead of generated ones.
    """

    bytes_per_token: int
    read_per_token: int
    in_pages: bool = False
    source_length: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model needs, apart from how much of it is kept on the device.

    Attributes:
        model_type: as in config.json.
        layers: MoE layers (L).
        experts: experts a layer (E).
        top_k: experts a token uses a layer (K).
        specs: tensors of one expert, as plain numbers.
        records: how they are stored, layer by layer.
        dtype: dtype the model runs in.
        dense_bytes: everything but the experts, buffers included.
        multiplied: elements of the dense matrices that every token is multiplied with; without the output head.
        kv: attention layers of one sequence.
        hidden: hidden size (H).
        expert_width: elements of the widest intermediate of one token in one expert.
        dense_width: width of the widest dense feed-forward block.
        heads: attention heads of the widest layer.
        head_width: elements of one token's queries over all heads.
        vocabulary: tokens of the output head.
        context: longest sequence the model can take, or None if unbounded.
        encoder_decoder: whether there is an encoder.
        scores: whether attention keeps scores in memory (eager attention).
        unplanned: kinds of layers whose state and workspace the planner cannot foresee, such as state-space layers.
        unserved: kinds of layers that no pass of ours over a part of a prompt was tested with.
        in_rows: whether keys and values can be kept in KV rows, so that sequences may join or end at any step.
        windows: tokens each decoder layer sees, the current one included; None: all. Empty where that is not known.
        latent: elements of what is kept of a token's keys and values together, beside the keys' rotary part; 0: they are kept themselves.
        prompt_kernel: whether graph execution has a kernel for the attention of passes over prompts, in all layers.
        decode_kernel: whether it has one for that of decode steps, in all layers.
        expert_format: name of the format that experts are quantised to on loading; empty: they stay as they are stored.
        notes: remarks for the user on how it runs, one sentence each.
    """

    model_type: str
    layers: int
    experts: int
    top_k: int
    specs: tuple[TensorSpec, ...]
    records: StoreLayout
    dtype: str
    dense_bytes: int
    multiplied: int
    kv: tuple[KvLayer, ...]
    hidden: int
    expert_width: int
    dense_width: int
    heads: int
    head_width: int
    vocabulary: int
    context: int | None
    encoder_decoder: bool
    scores: bool
    unplanned: tuple[str, ...]
    unserved: tuple[str, ...]
    in_rows: bool
    windows: tuple[int | None, ...] = ()
    latent: int = 0
    prompt_kernel: bool = False
    decode_kernel: bool = False
    expert_format: str = ""
    notes: tuple[str, ...] = ()

    @property
    def total_experts(self) -> int:
        """Experts in the whole model."""
        return self.layers * self.experts

    def kv_bytes(self, length: int) -> int:
        """Bytes of one sequence's keys and values at `length` tokens, outside pages; every layer keeps all of them, windows or not.

        In KV rows a layer has one more column, which padding writes to; what an encoder has read has none.
        """
        layers = [layer for layer in self.kv if not layer.in_pages]
        spare = [int(self.in_rows and not layer.source_length) for layer in layers]
        return sum(layer.bytes_per_token * (length + more) for layer, more in zip(layers, spare, strict=True))

    def without_pages(self) -> "ModelShape":
        """The figures of a model that is run with a cache of its caller's, which keeps every token."""
        return replace(self, kv=tuple(replace(layer, in_pages=False) for layer in self.kv))


def shape_of(skeleton: Skeleton, layers: Sequence[Sequence[TensorSpec]] | None = None) -> ModelShape:
    """Measure a skeleton.

    Args:
        skeleton: the model.
        layers: the tensors of one expert of each MoE layer, as the checkpoint stores them; None: as plain numbers.
    """
    config = skeleton.config.get_text_config(decoder=True)
    element = DTYPES[skeleton.dtype].nbytes
    heads = int(config.num_attention_heads)
    key_width, value_width, head_width = _head_widths(config, heads)
    unplanned, windows = ((), ()) if skeleton.encoder_decoder else _attention(skeleton, config)
    in_rows = skeleton.family is not None and not unplanned and windows is not None
    paged = in_rows and not skeleton.encoder_decoder
    records = StoreLayout.of(layers or [skeleton.specs] * len(skeleton.expert_modules))
    return ModelShape(
        model_type=skeleton.config.model_type,
        layers=len(skeleton.expert_modules),
        experts=skeleton.experts,
        top_k=skeleton.top_k,
        specs=skeleton.specs,
        records=records,
        dtype=skeleton.dtype,
        dense_bytes=_dense_bytes(skeleton),
        multiplied=_multiplied(skeleton.model),
        kv=_kv_layers(skeleton, (key_width + value_width) * element, element, in_pages=paged),
        hidden=int(config.hidden_size),
        expert_width=max(max(spec.shape) for spec in skeleton.specs),
        dense_width=_dense_width(skeleton.model),
        heads=heads,
        head_width=head_width,
        vocabulary=int(config.vocab_size),
        context=None if skeleton.encoder_decoder else getattr(config, "max_position_embeddings", None),
        encoder_decoder=skeleton.encoder_decoder,
        unplanned=unplanned,
        unserved=() if skeleton.encoder_decoder else _unserved(skeleton, config, unplanned),
        in_rows=in_rows,
        windows=windows or (),
        latent=(getattr(config, "kv_lora_rank", None) or 0) if paged else 0,
        prompt_kernel=paged and by_kernel(skeleton.model, len(windows or ())),
        decode_kernel=paged and by_kernel(skeleton.model, len(windows or ()), STEP_FORMS),
        expert_format="" if skeleton.expert_format is None else skeleton.expert_format.name,
        notes=(
            *skeleton.notes,
            *_notes(skeleton, unplanned, in_rows=in_rows),
            *_record_notes(records, skeleton.experts),
        ),
        scores=skeleton.config._attn_implementation == "eager",  # noqa: SLF001 - transformers has no other attribute for it
    )


def _record_notes(records: StoreLayout, experts: int) -> tuple[str, ...]:
    """What layers with records of several sizes cost: some are large, others leave a part of their slots and of the host's records empty."""
    slot, sizes, notes = records.record_bytes, records.layer_bytes, []
    if records.large:
        notes.append(
            f"records of layers {', '.join(map(str, records.large))} are larger than {LARGE:g} times the median of {format_bytes(median(sizes))}: "
            f"these layers are always resident, {format_bytes(records.large_bytes * experts)} as they are stored"
        )
    if smaller := [size for size in sizes if size < slot]:
        notes.append(
            f"records of {len(smaller)} of {len(sizes)} layers are smaller than a slot of {format_bytes(slot)}: a load moves what they have, "
            f"and {format_bytes(sum(slot - size for size in smaller) * experts)} of the host's records stay empty"
        )
    return tuple(notes)


def _attention(skeleton: Skeleton, config: Any) -> tuple[tuple[str, ...], tuple[int | None, ...] | None]:
    """Kinds of layers that keep other things than keys and values, and the windows of a family in the table.

    Raises:
        CheckpointError: if the config describes layers that the model's own code cannot run.
    """
    name = f"describes attention layers that {config.model_type!r} cannot run"
    with describing(described_by(skeleton.folder), name):
        unplanned = tuple(sorted(set(layer_kinds(config)) - KEYS_AND_VALUES))
        known = skeleton.family is not None and not unplanned
        return unplanned, attention_windows(skeleton.model, config) if known else ()


def _unserved(skeleton: Skeleton, config: Any, unplanned: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds of layers whose cache `LLM` cannot serve: of a family in the table, all that keep more than keys and values."""
    served = RECURRENT | EMPTY if skeleton.family is None else frozenset()
    ahead = () if getattr(config, "is_causal", True) else ("bidirectional_attention",)  # read by transformers' masks
    return (*(kind for kind in unplanned if kind not in served), *ahead)


def _notes(skeleton: Skeleton, unplanned: tuple[str, ...], *, in_rows: bool) -> tuple[str, ...]:
    """What is done to experts, and what a family outside the table, or without KV rows, does without."""
    changed = (skeleton.changed,) if skeleton.changed else ()
    return (*changed, *_lacks(skeleton, unplanned, in_rows=in_rows))


def _lacks(skeleton: Skeleton, unplanned: tuple[str, ...], *, in_rows: bool) -> tuple[str, ...]:
    name = skeleton.config.model_type
    if kinds := sorted(set(unplanned) - RECURRENT - EMPTY):
        return (f"{name!r} has layers of kind {', '.join(kinds)}: it runs through expertflow.from_pretrained only",)
    cohorts = "cohorts (sequences start together, and the next ones wait until all have ended)"
    if skeleton.family is None:
        return (
            f"{name!r} is not in the table of families and runs by its own forward: no overlap, no graphs, {cohorts}",
        )
    return () if in_rows else (f"the keys and values of {name!r} are not kept in rows: no graphs, {cohorts}",)


def _head_widths(config: Any, heads: int) -> tuple[int, int, int]:
    """Elements a token of keys, values and queries as attention reads them, over all heads."""
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention, expanded
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        return heads * key, heads * config.v_head_dim, heads * key
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads * head_dim, kv_heads * head_dim, heads * head_dim


def _kv_layers(skeleton: Skeleton, read: int, element: int, *, in_pages: bool) -> tuple[KvLayer, ...]:
    """The decoder's layers, whose attention reads `read` bytes a token.

    Latents are kept one for all heads by the families of the table; other families may keep them expanded, which is more.
    """
    config = skeleton.config.get_text_config(decoder=True)
    if skeleton.encoder_decoder:
        own = KvLayer(bytes_per_token=read, read_per_token=read)
        cross = replace(own, source_length=True)
        return (own, cross) * int(config.num_decoder_layers)
    rank = getattr(config, "kv_lora_rank", None) if skeleton.family is not None else None
    kept = read if rank is None else (rank + config.qk_rope_head_dim) * element
    layer = KvLayer(bytes_per_token=kept, read_per_token=read if rank is None else read + kept, in_pages=in_pages)
    return tuple(layer for _ in layer_kinds(config))


def _dense_bytes(skeleton: Skeleton) -> int:
    """Parameters and buffers that are not experts, in the dtype transformers gives each on loading."""
    model = skeleton.model
    runs_in = getattr(torch, skeleton.dtype)
    wide = model._keep_in_fp32_modules_strict or ()  # noqa: SLF001 - transformers' own loading rule
    if skeleton.dtype == "float16":
        wide = {*wide, *(model._keep_in_fp32_modules or ())}  # noqa: SLF001
    total, buffers = 0, {name for name, _ in model.named_buffers()}
    for name, tensor in unique_tensors(model):
        if not tensor.is_floating_point():
            dtype = tensor.dtype
        elif any(part in name for part in wide) or (name in buffers and tensor.dtype == torch.float32):
            dtype = torch.float32
        else:
            dtype = runs_in
        total += tensor.numel() * dtype.itemsize
    return total


def _multiplied(model: PreTrainedModel) -> int:
    """Elements of all matrices that are no embeddings, and no output head."""
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)] + [model.get_output_embeddings()]
    known = {id(weight) for table in tables for weight in [getattr(table, "weight", None)]}
    return sum(one.numel() for one in model.parameters() if one.ndim > 1 and id(one) not in known)


def unique_tensors(model: PreTrainedModel) -> Sequence[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; tensors the model ties together come once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return [(name, tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name not in tied]


def _dense_width(model: PreTrainedModel) -> int:
    """Output width of the widest linear layer that is no output head."""
    head = model.get_output_embeddings()
    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return max(widths, default=1)
