"""What the kernels compute, in plain torch.

Every function here has a twin of the same name and signature in `kernels.fetch`, `kernels.experts` or `kernels.prompts.grouped`. Read these first;
they run without Triton, and tests compare the twins with them. They compute pair by pair, in the dtype of the buffer
they write to, so that a float64 buffer gives a float64 reference.

Must not know layers and residency, and which side decides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertflow.formats.format import Format
from expertflow.kernels.ledger import DONE, LINE, SRC, TAKEN, Ledger
from expertflow.kernels.mlp import ACTIVATIONS, CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.kernels.prompts.pairs import SortedPairs


def reads(format_: Format) -> bool:
    """Whether experts stored in a format can be computed: always, by its `decode`."""
    del format_
    return True


def expert_pairs(mlp: ExpertMlp, hidden: Tensor, slots: Tensor, pool: Tensor, work: Workspace) -> None:
    """Run each pair's expert on its token and keep the results apart: `work.parts[t, k]`.

    Pairs with a negative slot are left untouched: they are computed by another call (another wave), or not at all.

    Args:
        mlp: what a record holds.
        hidden: token states `[T, H]`, in the dtype of the weights.
        slots: int32 `[T, K]`, the slot that holds each pair's expert, or negative.
        pool: uint8 `[S, record_bytes]`.
        work: buffers for at least T tokens of K experts.
    """
    for token, ranks in enumerate(slots.tolist()):
        for rank, slot in enumerate(ranks):
            if slot >= 0:
                _run_expert(mlp, hidden, pool[slot], [token * slots.shape[1] + rank], work)


def group_pairs(
    mlp: ExpertMlp,
    hidden: Tensor,
    pairs: SortedPairs,
    group: Sequence[tuple[int, int]],
    pool: Tensor,
    work: Workspace,
) -> None:
    """Run some experts on all their tokens, and keep the results apart: `work.parts[t, k]`, as `expert_pairs` gives them.

    Args:
        mlp: what a record holds.
        hidden: token states `[T, H]`, in the dtype of the weights.
        pairs: the pairs of these tokens.
        group: experts that have pairs, each with the slot that holds it.
        pool: uint8 `[S, record_bytes]`.
        work: buffers for at least T tokens of K experts.
    """
    edges = pairs.edges.tolist()
    for expert, slot in group:
        mine = pairs.order[edges[expert] : edges[expert + 1]]
        _run_expert(mlp, hidden, pool[slot], mine.tolist(), work)


def _run_expert(mlp: ExpertMlp, hidden: Tensor, record: Tensor, pairs: Sequence[int], work: Workspace) -> None:
    """Run an expert on each of these pairs by itself: a product with several tokens at once would have other bits."""
    dtype, top_k = work.parts.dtype, work.parts.shape[1]
    up, down = (mlp.layout.tensor(record, one.spec.name).to(dtype) for one in (mlp.up, mlp.down))
    for pair in pairs:
        token, rank = divmod(pair, top_k)
        inner = work.inner[pair]
        inner.copy_(_up(mlp, hidden[token].to(dtype), record, up))
        work.parts[token, rank] = _down(mlp, inner.to(dtype), record, down)


def _up(mlp: ExpertMlp, x: Tensor, record: Tensor, weight: Tensor) -> Tensor:
    out = (weight.T if mlp.transposed else weight) @ x
    if mlp.up.bias is not None:
        out = out + mlp.bias(record, mlp.up, mlp.inner).to(x.dtype)
    if not mlp.gated:
        return ACTIVATIONS[mlp.activation](out)
    gate, up = (out[::2], out[1::2]) if mlp.interleaved else out.chunk(2)
    if mlp.activation == CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
        return gate * torch.sigmoid(mlp.alpha * gate) * (up + 1)
    return ACTIVATIONS[mlp.activation](gate) * up


def _down(mlp: ExpertMlp, x: Tensor, record: Tensor, weight: Tensor) -> Tensor:
    out = (weight.T if mlp.transposed else weight) @ x
    if mlp.down.bias is not None:
        out = out + mlp.bias(record, mlp.down, mlp.hidden).to(x.dtype)
    return out


def combine(
    parts: Tensor, index: Tensor, weights: Tensor, experts: int, out: Tensor, added: Sequence[Tensor] = ()
) -> None:
    """Add each token's weighted results in ascending order of expert, starting from zero, then what is `added`.

    The order depends on the token's experts alone, not on the router's order (which `topk` does not promise), on
    slots, waves or other tokens. The sum is in the dtype of `parts` and rounded once, and so is every sum with an `added` one.

    Args:
        parts: `[>= T, K, H]` of `expert_pairs`.
        index: integer `[T, K]`, each pair's expert; outside `0 .. experts - 1` means none, and adds nothing.
        weights: the router's `[T, K]`.
        experts: experts a layer.
        out: `[T, H]`, overwritten.
        added: at most two of `[T, H]`, in this order: what shared experts gave, and the residual.
    """
    ascending = index.argsort(dim=1, stable=True)
    tokens = torch.arange(len(index), device=parts.device)
    total = torch.zeros_like(parts[tokens, 0])
    for rank in ascending.T:
        expert = index[tokens, rank]
        active = (expert >= 0) & (expert < experts)
        weighted = weights[tokens, rank].to(parts.dtype)[:, None] * parts[tokens, rank]
        total = torch.where(active[:, None], total + weighted, total)
    out.copy_(total)
    for one in added:
        out.add_(one)


def find_slots(places: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """The slot of each pair's expert, int32 `[T, K]`, -1 where there is none.

    Args:
        places: int32 `[E]`, the slot of each expert.
        index: integer `[T, K]`, outside `0 .. E - 1` means none.
        live: int32 `[1]`, how many of the tokens count; the rest has none.
    """
    known = (torch.arange(len(index), device=index.device)[:, None] < live) & (index >= 0) & (index < len(places))
    return torch.where(known, places[index.clamp(0, len(places) - 1)], -1)


def blocks_of(record_bytes: int) -> int:
    """Blocks that `fetch_records` carries a record in: here it is one."""
    del record_bytes
    return 1


def fetch_records(
    host: Tensor, pool: Tensor, ledger: Ledger, todo: Tensor, bounds: Tensor, programs: int = 8, *, wait: bool = True
) -> None:
    """Carry the loads named by list entries `bounds[0] .. bounds[1] - 1` from host memory into slots.

    Args:
        host: uint8 `[N, record_bytes]` in host memory, page-locked for the twin.
        pool: uint8 `[S, record_bytes]` on the device.
        ledger: the loads; a load of which blocks have been taken is carried by another call, or was called off.
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
            size = host.shape[1] if ledger.lines is None else int(ledger.lines[src]) * LINE
            pool[dst, :size].copy_(host[src, :size])
            ledger.table[TAKEN : DONE + 1, entry] = 1
