"""What building blocks are given besides states: small bundles of tensors and numbers. Must not know modules and kernels."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """An RMS norm.

    Attributes:
        weight: `[H]`.
        eps: added to the mean square.
        wide: multiply by the weight before rounding (GPT-OSS) instead of after (Llama and most others).
    """

    weight: Tensor
    eps: float
    wide: bool


class Heads(NamedTuple):
    """Heads of an attention layer, as they lie in the product of queries, keys and values.

    Attributes:
        queries: of queries (Q).
        keys: of keys, and as many of values (G).
        width: elements of one (D), a power of two.
    """

    queries: int
    keys: int
    width: int

    @property
    def all(self) -> int:
        """Heads of queries, keys and values."""
        return self.queries + 2 * self.keys

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and their width of what is kept of a token: of keys, and of values."""
        return (self.keys, self.width), (self.keys, self.width)


class LatentHeads(NamedTuple):
    """Heads of latent attention, and what makes of a token's latent what is kept.

    Attributes:
        queries: of queries (Q); all share a token's latent.
        plain: elements of a query without positions.
        rope: rotary ones behind them (R).
        norm: of latents, `[rank]`.
        weight: `[Q * (plain + V), rank]`, contiguous: of each head what makes keys of latents, then what makes values.
    """

    queries: int
    plain: int
    rope: int
    norm: Norm
    weight: Tensor

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """As of `Heads`: latents come as keys, and the keys' rotary part as values."""
        return (1, len(self.norm.weight)), (1, self.rope)


class Rotary(NamedTuple):
    """Rotary tables of a pass's tokens.

    Attributes:
        cos: `[T, R]`, as the model's rotary embedding gives it.
        sin: `[T, R]`.
        doubled: whether each angle is there twice, for the first and for the second of a pair: R elements are turned, else 2R.
        woven: whether the two of a pair are neighbours; else the first ones of all pairs come before the second ones.
        parted: whether they are put apart in that way once turned, though they were neighbours.
    """

    cos: Tensor
    sin: Tensor
    doubled: bool
    woven: bool = False
    parted: bool = False

    @property
    def half(self) -> int:
        """Pairs that are turned."""
        return self.cos.shape[1] // 2 if self.doubled else self.cos.shape[1]


class Cells(NamedTuple):
    """Where a pass's keys and values go.

    Attributes:
        keys: `[P, G, page, D]`.
        values: likewise, of the same strides.
        pages: int64 `[T]`, page of each token.
        places: int64 `[T]`, its place in the page.
    """

    keys: Tensor
    values: Tensor
    pages: Tensor
    places: Tensor


class Seen(NamedTuple):
    """What a pass's tokens attend to, themselves included.

    Attributes:
        rows: int64 `[T]`, row of each token's sequence in the page table.
        positions: int64 `[T]`, of each token.
        table: int32 `[R, m]` with unit columns, pages of each row.
        scale: of the scores.
        window: columns seen, the token's own included; None: all.
        sinks: `[Q]`, a score a head gives to nothing; None: no such.
    """

    rows: Tensor
    positions: Tensor
    table: Tensor
    scale: float
    window: int | None
    sinks: Tensor | None


class Places(NamedTuple):
    """Where a layer's experts lie, where every one of them is in its slot for good.

    Attributes:
        slots: int32 `[>= E]`, the slot of each expert.
        live: int32 `[1]`, how many of the tokens count; the rest has no experts.
    """

    slots: Tensor
    live: Tensor


class Known(NamedTuple):
    """What is known of a layer's experts before its router has chosen.

    Attributes:
        places: where they lie; None: that is decided later.
        recorded: which ones the tokens get in place of the router's choice, int64 `[T, K]`; None: that choice.
    """

    places: Places | None = None
    recorded: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How a router chooses experts and weighs them.

    Attributes:
        top_k: experts of a token (K).
        scores: what logits become: `softmax`, `sigmoid` or `logits`.
        groups: groups of experts, of which only the best ones are looked at; 1: all experts are one.
        kept_groups: how many are the best ones.
        group_top: how many of its best experts make a group's score.
        over_chosen: whether the weights are a softmax over the logits of the chosen.
        normalised: whether the weights are divided by their sum.
        scale: what weights are multiplied by in the end.
        wide_logits: whether logits are float32, else of the model's dtype.
        wide_weights: whether weights are float32, else of the model's dtype.
    """

    top_k: int
    scores: str = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_top: int = 1
    over_chosen: bool = False
    normalised: bool = False
    scale: float = 1.0
    wide_logits: bool = False
    wide_weights: bool = False


class Router(NamedTuple):
    """A router.

    Attributes:
        weight: `[E, H]`, and one row more if it is `gated`.
        bias: `[E]`, added to logits, or None.
        correction: `[E]`, added to scores for the choice alone, or None.
        rule: how it chooses.
        gated: whether the last row of the weight gives the share of a shared expert: the sigmoid of its product.
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    rule: RouterRule
    gated: bool = False

    @property
    def experts(self) -> int:
        """How many there are (E)."""
        return len(self.weight) - self.gated


class Routed(NamedTuple):
    """What a router gives.

    Attributes:
        normed: states `[T, H]`.
        chosen: experts int64 `[T, K]`, from the best one on, the lower one among equals.
        weights: of them `[T, K]`.
        slots: of them int32 `[T, K]`, -1 where there is none; None where places are not known.
        share: of a shared expert `[T, 1]`; None without a gate.
    """

    normed: Tensor
    chosen: Tensor
    weights: Tensor
    slots: Tensor | None
    share: Tensor | None
