"""What the kernels compute, in plain torch, and the words they share: the record of an expert's MLP and the workspace.

Every function here has a twin of the same name and signature in `kernels.fetch` or `kernels.experts`. These are the
ones to read, to run without Triton, and to test the twins against. They compute pair by pair, in the dtype of the
buffer they write to, so that a float64 buffer gives a float64 reference.

Knows rows by slot number; refuses to know layers, residency and who decided.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from expertflow.kernels.ledger import DONE, SRC, TAKEN, Ledger
from expertflow.types import TensorSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UP_NAMES = ("gate_up_proj", "up_proj", "wi")
DOWN_NAMES = ("down_proj", "wo")
MAX_PAIRS = 1024
"""(token, rank) pairs of a call at most: every program of the twin looks at all of them, in its registers."""
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
class ExpertMlp:
    """One expert's feed-forward block as it lies in a row.

    Shapes of one expert, N = 2I with a gate and I without: up `[N, H]` and down `[H, I]`; transposed: up `[H, N]`
    and down `[I, H]`. With a gate, up holds gate and up projections: first all of the gate, then all of up; or,
    interleaved, gate and up of each inner element side by side.

    Attributes:
        hidden: hidden size (H), elements.
        width: expert width (I), elements.
        dtype: a key of `DTYPES`, of all tensors.
        record_bytes: bytes of a row; a multiple of 256.
        up: byte offset of the up (or gate and up) projection in the row.
        down: byte offset of the down projection.
        up_bias: byte offset of the bias `[N]`, or None.
        down_bias: byte offset of the bias `[H]`, or None.
        gated: whether there is a gate.
        interleaved: whether gate and up alternate.
        transposed: whether projections are stored input-major.
        activation: a key of `ACTIVATIONS`, or `CLAMPED_SWIGLU`.
        alpha: of the clamped SwiGLU.
        limit: of the clamped SwiGLU.
    """

    hidden: int
    width: int
    dtype: str
    record_bytes: int
    up: int
    down: int
    up_bias: int | None = None
    down_bias: int | None = None
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    @classmethod
    def of(
        cls,
        specs: Sequence[TensorSpec],
        offsets: Sequence[int],
        record_bytes: int,
        activation: str,
        *,
        transposed: bool = False,
        interleaved: bool = False,
    ) -> Self:
        """Find the projections among a row's tensors by name.

        Args:
            specs: the row's tensors: `gate_up_proj`, `up_proj` or `wi`; `down_proj` or `wo`; biases `<name>_bias`.
            offsets: byte offset of each.
            record_bytes: bytes of a row.
            activation: a key of `ACTIVATIONS`, or `CLAMPED_SWIGLU`.
            transposed: as in the class.
            interleaved: as in the class.

        Raises:
            ValueError: if the row is no such MLP. The caller decides what to do with a family that is not.
        """
        at = {spec.name: (spec, offset) for spec, offset in zip(specs, offsets, strict=True)}
        up_name = next((name for name in UP_NAMES if name in at), None)
        down_name = next((name for name in DOWN_NAMES if name in at), None)
        dtypes = {spec.dtype for spec in specs}
        known = activation in ACTIVATIONS or activation == CLAMPED_SWIGLU
        if up_name is None or down_name is None or len(dtypes) != 1 or not known:
            raise ValueError(f"not an expert MLP the kernels know: tensors {sorted(at)}, activation {activation!r}")
        up, down = at.pop(up_name), at.pop(down_name)
        up_bias, down_bias = at.pop(f"{up_name}_bias", None), at.pop(f"{down_name}_bias", None)
        if at:
            raise ValueError(f"not an expert MLP the kernels know: it also has {sorted(at)}")
        width, hidden = down[0].shape if transposed else down[0].shape[::-1]
        return cls(
            hidden=hidden,
            width=width,
            dtype=dtypes.pop(),
            record_bytes=record_bytes,
            up=up[1],
            down=down[1],
            up_bias=up_bias[1] if up_bias else None,
            down_bias=down_bias[1] if down_bias else None,
            gated=up_name == "gate_up_proj",
            interleaved=interleaved,
            transposed=transposed,
            activation=activation,
        )

    @property
    def inner(self) -> int:
        """Outputs of the up projection (N)."""
        return 2 * self.width if self.gated else self.width

    def tensor(self, row: Tensor, offset: int, *shape: int) -> Tensor:
        """One tensor of a row, without copying."""
        dtype = DTYPES[self.dtype]
        count = torch.Size(shape).numel()
        return row[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


@dataclass(frozen=True)
class Workspace:
    """Buffers of one layer's experts; layers that run one after another share one.

    Attributes:
        inner: what lies between up and down projection, `[T * K, I]` in the dtype of the weights.
        parts: what each (token, rank) pair's expert gave, `[T, K, H]` float32, before the router's weight.
    """

    inner: Tensor
    parts: Tensor

    @classmethod
    def allocate(cls, mlp: ExpertMlp, tokens: int, top_k: int, device: torch.device) -> Self:
        """Buffers for `tokens` tokens of `top_k` experts."""
        return cls(
            torch.empty(tokens * top_k, mlp.width, dtype=DTYPES[mlp.dtype], device=device),
            torch.empty(tokens, top_k, mlp.hidden, dtype=torch.float32, device=device),
        )

    @staticmethod
    def nbytes(mlp: ExpertMlp, tokens: int, top_k: int) -> int:
        """Bytes `allocate` takes: what a planner counts."""
        return tokens * top_k * (mlp.width * DTYPES[mlp.dtype].itemsize + mlp.hidden * 4)


def expert_pairs(mlp: ExpertMlp, hidden: Tensor, slots: Tensor, pool: Tensor, work: Workspace) -> None:
    """Run each pair's expert on its token and keep the results apart: `work.parts[t, k]`.

    Pairs with a negative slot are left untouched: they are computed by another call (another wave), or not at all.

    Args:
        mlp: what a row holds.
        hidden: token states `[T, H]`, in the dtype of the weights.
        slots: int32 `[T, K]`, the slot that holds each pair's expert, or negative.
        pool: uint8 `[S, record_bytes]`.
        work: buffers for at least T tokens of K experts.
    """
    top_k = slots.shape[1]
    for token, ranks in enumerate(slots.tolist()):
        for rank, slot in enumerate(ranks):
            if slot >= 0:
                inner = work.inner[token * top_k + rank]
                inner.copy_(_up(mlp, hidden[token].to(work.parts.dtype), pool[slot]))
                work.parts[token, rank] = _down(mlp, inner.to(work.parts.dtype), pool[slot])


def _up(mlp: ExpertMlp, x: Tensor, row: Tensor) -> Tensor:
    shape = (mlp.hidden, mlp.inner) if mlp.transposed else (mlp.inner, mlp.hidden)
    weight = mlp.tensor(row, mlp.up, *shape).to(x.dtype)
    out = (weight.T if mlp.transposed else weight) @ x
    if mlp.up_bias is not None:
        out = out + mlp.tensor(row, mlp.up_bias, mlp.inner).to(x.dtype)
    if not mlp.gated:
        return ACTIVATIONS[mlp.activation](out)
    gate, up = (out[::2], out[1::2]) if mlp.interleaved else out.chunk(2)
    if mlp.activation == CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
        return gate * torch.sigmoid(mlp.alpha * gate) * (up + 1)
    return ACTIVATIONS[mlp.activation](gate) * up


def _down(mlp: ExpertMlp, x: Tensor, row: Tensor) -> Tensor:
    shape = (mlp.width, mlp.hidden) if mlp.transposed else (mlp.hidden, mlp.width)
    weight = mlp.tensor(row, mlp.down, *shape).to(x.dtype)
    out = (weight.T if mlp.transposed else weight) @ x
    if mlp.down_bias is not None:
        out = out + mlp.tensor(row, mlp.down_bias, mlp.hidden).to(x.dtype)
    return out


def combine(parts: Tensor, index: Tensor, weights: Tensor, experts: int, out: Tensor) -> None:
    """Add each token's weighted results in ascending order of expert, starting from zero.

    The order depends on the token's experts alone, not on the router's order (which `topk` does not promise), on
    slots, waves or other tokens. The sum is in the dtype of `parts` and rounded once.

    Args:
        parts: `[>= T, K, H]` of `expert_pairs`.
        index: integer `[T, K]`, each pair's expert; outside `0 .. experts - 1` means none, and adds nothing.
        weights: the router's `[T, K]`.
        experts: experts a layer.
        out: `[T, H]`, overwritten.
    """
    ascending = index.argsort(dim=1, stable=True)
    rows = torch.arange(len(index), device=parts.device)
    total = torch.zeros_like(parts[rows, 0])
    for rank in ascending.T:
        expert = index[rows, rank]
        active = (expert >= 0) & (expert < experts)
        weighted = weights[rows, rank].to(parts.dtype)[:, None] * parts[rows, rank]
        total = torch.where(active[:, None], total + weighted, total)
    out.copy_(total)


def blocks_of(record_bytes: int) -> int:
    """Blocks that `fetch_records` carries a row in: here it is one."""
    del record_bytes
    return 1


def fetch_records(
    host: Tensor, pool: Tensor, ledger: Ledger, todo: Tensor, bounds: Tensor, programs: int = 8, *, wait: bool = True
) -> None:
    """Carry the loads named by list entries `bounds[0] .. bounds[1] - 1` from host memory into slots.

    Args:
        host: uint8 `[rows, record_bytes]` in host memory, page-locked for the twin.
        pool: uint8 `[S, record_bytes]` on the device.
        ledger: the loads; a load of which blocks have been taken is somebody else's, or was called off.
        todo: int32 `[N]`, entries of the ledger, in order of urgency.
        bounds: int32 `[2]` on the device: first place in `todo` and one past the last. A list of several phases with
            its offsets `[P + 1]` is walked with `bounds=offsets[phase : phase + 2]`.
        programs: how many programs share the copy in the twin; nothing here.
        wait: nothing here: what is carried is there when the call returns.
    """
    del programs, wait
    begin, end = bounds.tolist()
    for entry in todo[begin:end].tolist():
        src, dst, taken = ledger.table[SRC : TAKEN + 1, entry].tolist()
        if not taken:
            pool[dst].copy_(host[src])
            ledger.table[TAKEN : DONE + 1, entry] = 1
