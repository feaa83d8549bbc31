"""What an expert's feed-forward block is to the kernels: where its projections are in a record, what lies between them.

Must not know layers and slots, and which side decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from expertflow.formats.format import TensorSpec
from expertflow.formats.records import RecordLayout

UP_NAMES = ("gate_up_proj", "up_proj", "wi")
DOWN_NAMES = ("down_proj", "wo")
MAX_PAIRS = 1024
"""(token, rank) pairs of a call at most: every program of the kernels looks at all of them, in its registers."""
CHUNKS = 4
"""Parts at most in which the inputs of a projection are summed, each by itself; programs may share a product by them."""
SHARED_PAIRS = 16
"""(token, rank) pairs of a call up to which they do."""
CLAMPED_SWIGLU = "clamped_swiglu"
"""GPT-OSS: gate clamped above and up clamped on both sides, `gate * sigmoid(alpha * gate) * (up + 1)`."""
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }
)
"""Activations of the plain and the gated MLP, by the name an `ExpertMlp` uses."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of an expert in a record.

    Attributes:
        spec: its weight.
        offsets: byte offset of each part of the weight, in the order of `spec.parts`.
        bias: byte offset of the bias, or None.
    """

    spec: TensorSpec
    offsets: tuple[int, ...]
    bias: int | None


@dataclass(frozen=True, kw_only=True)
class ExpertMlp:
    """One expert's feed-forward block as it lies in a record.

    Shapes of one expert, N = 2I with a gate and I without: up `[N, H]` and down `[H, I]`; transposed: up `[H, N]`
    and down `[I, H]`. With a gate, up holds gate and up projections: first all of the gate, then all of up; or,
    interleaved, gate and up of each inner element side by side.

    Attributes:
        layout: what a record holds.
        hidden: hidden size (H), elements.
        width: expert width (I), elements.
        up: the up (or gate and up) projection.
        down: the down projection.
        gated: whether there is a gate.
        interleaved: whether gate and up alternate.
        transposed: whether projections are input-major.
        activation: a key of `ACTIVATIONS`, or `CLAMPED_SWIGLU`.
        alpha: of the clamped SwiGLU.
        limit: of the clamped SwiGLU.
    """

    layout: RecordLayout
    hidden: int
    width: int
    up: Projection
    down: Projection
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    @classmethod
    def of(cls, layout: RecordLayout, activation: str, *, transposed: bool = False, interleaved: bool = False) -> Self:
        """Find the projections among a record's tensors by name.

        Args:
            layout: of a record: `gate_up_proj`, `up_proj` or `wi`; `down_proj` or `wo`; biases `<name>_bias`.
            activation: a key of `ACTIVATIONS`, or `CLAMPED_SWIGLU`.
            transposed: as in the class.
            interleaved: as in the class.

        Raises:
            ValueError: if the record is no such MLP. The caller decides what to do with such a family.
        """
        at = {spec.name: (spec, offsets) for spec, offsets in zip(layout.specs, layout.offsets, strict=True)}
        up_name = next((name for name in UP_NAMES if name in at), None)
        down_name = next((name for name in DOWN_NAMES if name in at), None)
        dtypes = {spec.dtype for spec in layout.specs}
        known = activation in ACTIVATIONS or activation == CLAMPED_SWIGLU
        if up_name is None or down_name is None or len(dtypes) != 1 or not known:
            raise ValueError(f"not an expert MLP the kernels know: tensors {sorted(at)}, activation {activation!r}")
        up, down = (_take_projection(at, name) for name in (up_name, down_name))
        if at:
            raise ValueError(f"not an expert MLP the kernels know: it also has {sorted(at)}")
        width, hidden = down.spec.shape if transposed else down.spec.shape[::-1]
        return cls(
            layout=layout,
            hidden=hidden,
            width=width,
            up=up,
            down=down,
            gated=up_name == "gate_up_proj",
            interleaved=interleaved,
            transposed=transposed,
            activation=activation,
        )

    def for_records(self, records: Sequence[Tensor]) -> Self:
        """The same, to be decoded by the shortest way that is right for all of the records, uint8 `[record_bytes]` in host memory."""

        def quickened(projection: Projection) -> Projection:
            spec = projection.spec
            if not all(spec.format.in_range(spec, self.layout.parts(record, spec.name)) for record in records):
                return projection
            return replace(projection, spec=replace(spec, format=spec.format.quickened()))

        return replace(self, up=quickened(self.up), down=quickened(self.down))

    @property
    def dtype(self) -> str:
        """Dtype of all tensors, as numbers."""
        return self.up.spec.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def record_bytes(self) -> int:
        """Bytes of a record; a multiple of 256."""
        return self.layout.record_bytes

    @property
    def inner(self) -> int:
        """Outputs of the up projection (N)."""
        return 2 * self.width if self.gated else self.width

    def bias(self, record: Tensor, projection: Projection, outputs: int) -> Tensor:
        """The bias `[outputs]` of a projection that has one, without copying."""
        assert projection.bias is not None
        size = self.torch_dtype.itemsize
        return record[projection.bias : projection.bias + outputs * size].view(self.torch_dtype)


def _take_projection(at: dict[str, tuple[TensorSpec, tuple[int, ...]]], name: str) -> Projection:
    """A projection and its bias, taken out of the tensors that are left.

    Raises:
        ValueError: if the bias is packed.
    """
    spec, offsets = at.pop(name)
    bias = at.pop(f"{name}_bias", None)
    if bias is not None and len(bias[1]) != 1:
        raise ValueError(f"not an expert MLP the kernels know: {name}_bias is stored as {bias[0].format.name}")
    return Projection(spec=spec, offsets=offsets, bias=None if bias is None else bias[1][0])


@dataclass(frozen=True)
class Workspace:
    """Buffers of one layer's experts; layers that run one after another share one.

    Attributes:
        inner: what lies between up and down projection, `[T * K, I]` in the dtype of the weights.
        parts: what each (token, rank) pair's expert gave, `[T, K, H]` float32, before the router's weight.
        sums: of the chunks of a projection that programs share, `[pairs, CHUNKS, outputs]` float32.
        counts: programs of each such product that have ended, int32; 0 between launches.
    """

    inner: Tensor
    parts: Tensor
    sums: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    @classmethod
    def allocate(cls, mlp: ExpertMlp, tokens: int, top_k: int, device: torch.device, *, shared: bool = True) -> Self:
        """Buffers for `tokens` tokens of `top_k` experts; `shared`: for programs that share a product, too."""
        sums, counts = _shared(tokens * top_k if shared else 0, mlp.width, mlp.inner, mlp.hidden)
        return cls(
            torch.empty(tokens * top_k, mlp.width, dtype=mlp.torch_dtype, device=device),
            torch.empty(tokens, top_k, mlp.hidden, dtype=torch.float32, device=device),
            torch.empty(sums, dtype=torch.float32, device=device),
            torch.zeros(counts, dtype=torch.int32, device=device),
        )

    def beside(self) -> Self:
        """Buffers for a call that runs beside those of this one, on other pairs: programs that share a product meet in its own."""
        return replace(self, sums=torch.empty_like(self.sums), counts=torch.zeros_like(self.counts))

    @staticmethod
    def nbytes(pairs: int, width: int, inner: int, hidden: int, itemsize: int) -> int:
        """Bytes `allocate` takes: what a planner counts.

        Args:
            pairs: (token, rank) pairs.
            width: what lies between the projections.
            inner: outputs of the up projection.
            hidden: outputs of the down projection.
            itemsize: bytes of a weight's number.
        """
        return pairs * (width * itemsize + hidden * 4) + Workspace.beside_nbytes(pairs, width, inner, hidden)

    @staticmethod
    def beside_nbytes(pairs: int, width: int, inner: int, hidden: int) -> int:
        """Bytes `beside` takes, likewise."""
        return 4 * sum(_shared(pairs, width, inner, hidden))


def _shared(pairs: int, width: int, inner: int, hidden: int) -> tuple[int, int]:
    """Numbers in `Workspace.sums` and in `counts`, enough for any call of so many pairs or fewer; a program has at least 16 outputs."""
    shared = min(pairs, SHARED_PAIRS)
    return shared * CHUNKS * max(inner, hidden), shared * -(-max(width, hidden) // 16)
