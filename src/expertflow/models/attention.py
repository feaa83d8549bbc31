"""Which earlier positions each attention layer of a decoder sees, read off the model's own forward.

Config keys do not show it: some families carry a `sliding_window` that their code ignores, or reads for some layers
only. So the decoder's forward runs with everything but its masks replaced by stand-ins, and the masks that its layers
get are looked at. Must not know KV rows, steps and devices.
"""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

KEYS_AND_VALUES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that keep keys and values only: a prompt can be read in several passes."""
RECURRENT = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of layers that keep a state, which transformers starts anew in every pass of several tokens."""
STATE_ONLY = frozenset({"linear_attention", "conv"})
"""Kinds of layers that keep a state and no keys and values."""
EMPTY = frozenset({"moe", "mlp", "dummy"})
"""Kinds of layers that keep nothing."""
_WIDEST = 256
"""Elements of a head that the kernel of passes over prompts takes at most."""
_WIDEST_LATENT = 512
"""Elements of a latent that the kernels take at most."""
_USUAL, _LONGEST = 1 << 17, 1 << 24
"""Positions that are looked at where the config states no context, and at most; a window of more than these is none."""
_PROBED = (0, 1, 2, 3)
"""Distances before the longest position that are looked at as well: a chunk's length changes there, a window's does not."""


class AttentionForm(Enum):
    """What an attention module gives to the function that attends.

    HEADS: keys and values as they are cached, in heads whose width is a power of two. WIDE: likewise, of more than 256 elements.
    RAGGED: of another width. LATENT: made from cached latents, by one matrix. OTHER: nothing that a kernel takes.
    """

    HEADS = auto()
    WIDE = auto()
    RAGGED = auto()
    LATENT = auto()
    OTHER = auto()


def attention_form(module: nn.Module) -> AttentionForm | None:
    """The form of an attention module; None if it is none that keeps keys and values."""
    if not all(hasattr(module, name) for name in ("config", "layer_idx", "scaling", "is_causal")):
        return None
    latent = getattr(module.config, "kv_lora_rank", None)
    name = "qk_head_dim" if latent else "head_dim" if hasattr(module, "head_dim") else "key_value_proj_dim"
    width = int(getattr(module, name, 0))
    if not latent and width >= 16 and width & (width - 1) == 0:
        return AttentionForm.HEADS if width <= _WIDEST else AttentionForm.WIDE
    if not 0 < width <= _WIDEST:
        return AttentionForm.OTHER
    if not latent:
        return AttentionForm.RAGGED
    return AttentionForm.LATENT if latent <= _WIDEST_LATENT and _from_latents(module) else AttentionForm.OTHER


def _from_latents(module: nn.Module) -> bool:
    """Whether one matrix makes keys and values of what the cache keeps, by a method that can be replaced."""
    matrix: Any = getattr(module, "kv_b_proj", None)
    return isinstance(matrix, nn.Linear) and getattr(matrix, "bias", None) is None and hasattr(module, "expand_kv")


STEP_FORMS = frozenset({AttentionForm.HEADS, AttentionForm.WIDE, AttentionForm.LATENT})
"""Forms that the kernel of decode steps takes."""
PROMPT_FORMS = frozenset({AttentionForm.HEADS, AttentionForm.RAGGED, AttentionForm.LATENT})
"""Forms that the kernel of passes over prompts takes."""


def by_kernel(model: PreTrainedModel, layers: int, taken: Collection[AttentionForm] = PROMPT_FORMS) -> bool:
    """Whether a kernel takes the attention of all of a decoder's layers, so that no mask is needed.

    Args:
        model: a decoder-only model.
        layers: of its decoder.
        taken: forms that the kernel takes; those of the kernel for prompts.
    """
    forms = [form for module in model.get_decoder().modules() if (form := attention_form(module)) is not None]
    return len(forms) == layers and set(taken).issuperset(forms)


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """What transformers keeps for each decoder layer, by its own words, such as `full_attention` or `linear_attention`.

    Layers that share another's keys and values count as well: configs also carry that key where the code ignores it.
    """
    kinds = get_layer_types_and_kwargs(config)[0]
    return tuple(getattr(config, "layer_types", None) or kinds)


def cache_argument(module: nn.Module) -> str:
    """Name under which a transformers forward takes its cache: `past_key_values` up to 5.17 at least, `cache` in 5.24."""
    return "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"


def attention_windows(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[int | None, ...] | None:
    """The tokens that each decoder layer sees, the current one included.

    Args:
        model: a decoder-only model; weights are not read, so it may be on the meta device.
        config: of its decoder.

    Returns:
        A layer's window, or None where it sees every earlier token; None instead of all if some layer's mask is no window.
    """
    decoder = model.get_decoder()
    longest = min(getattr(config, "max_position_embeddings", None) or _USUAL, _LONGEST)
    ends = sorted({max(longest - back, 1) for back in _PROBED})
    seen = [[_reach(mask) for mask in _masks_at(decoder, config, end - 1)] for end in ends]
    windows: list[int | None] = []
    for reaches in zip(*seen, strict=True):
        window = max(reaches)
        if any(reach != min(window, end) for reach, end in zip(reaches, ends, strict=True)):
            return None
        windows.append(None if window >= longest else window)
    return tuple(windows)


def _reach(mask: Tensor | None) -> int:
    """How many of the last positions one query sees, by its additive or boolean mask `[1, 1, 1, N]`; -1 if others as well."""
    if mask is None:
        return -1
    allowed = mask.reshape(-1) if mask.dtype == torch.bool else mask.reshape(-1) >= 0
    count = int(allowed.sum())
    return count if bool(allowed[-count:].all()) else -1


def _masks_at(decoder: Any, config: PreTrainedConfig, position: int) -> list[Tensor | None]:
    """The mask each layer gets for one token at a position, with all before it in the cache."""
    masks: list[Tensor | None] = []
    with torch.device("cpu"), torch.inference_mode(), _stand_ins(decoder, config, masks):
        decoder(
            inputs_embeds=torch.zeros(1, 1, int(config.hidden_size)),
            position_ids=torch.tensor([[position]]),
            use_cache=True,
            **{cache_argument(decoder): Cache(layers=[_Past(position) for _ in decoder.layers])},
        )
    return masks


@contextmanager
def _stand_ins(decoder: Any, config: PreTrainedConfig, masks: list[Tensor | None]) -> Iterator[None]:
    """Make layers only record their mask inside, and the decoder's other parts return what they get."""

    def hand_on(states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states

    def note(states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        masks.append(attention_mask)
        return states

    replaced: list[nn.Module] = [child for child in decoder.children() if not isinstance(child, nn.ModuleList)]
    own = config._attn_implementation  # noqa: SLF001 - transformers offers no other way to read it
    try:
        config._attn_implementation = "eager"  # noqa: SLF001 - the one that always makes a mask
        for module in replaced:
            module.forward = hand_on
        for layer in decoder.layers:
            layer.forward = note
        yield
    finally:
        config._attn_implementation = own  # noqa: SLF001
        for module in (*replaced, *decoder.layers):
            module.__dict__.pop("forward", None)


class _Past(CacheLayerMixin):
    """A cache layer of which only the length is known."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep nothing."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All positions, from the first one on."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the query."""
        return self._length

    def get_max_length(self) -> int:
        """No bound."""
        return -1
