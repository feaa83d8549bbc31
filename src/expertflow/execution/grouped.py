"""The experts of a pass over prompts in graph execution: the host decides, kernels compute all tokens of an expert at once.

Experts that are in slots are computed at once, whichever of them are needed. The routing goes to the host, which the pass waits for
once a layer: meanwhile the device has work. The controller decides, copies run ahead, and the other experts are computed as they
arrive. What each expert gave is kept apart for every token and added in ascending order of expert, as in a captured step. So a token
has the bits that it has in a step, and neither the size of the pass nor what is resident changes one. Must not know attention,
requests, and when the tables change sides (`execution.handover`).
"""

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from expertflow.execution.provider import CachedExperts
from expertflow.kernels.backend import backend
from expertflow.kernels.mlp import ExpertMlp, Workspace
from expertflow.kernels.prompts.pairs import on_host, sort_pairs
from expertflow.memory.slots import SlotPool
from expertflow.models.context import ForwardContext


class PromptExperts:
    """Computes a model's experts layer by layer inside a pass over prompts.

    Args:
        mlps: what a record of each layer holds.
        provider: brings experts to slots.
        pool: the slots.
        context: what the model's passes carry.
    """

    def __init__(
        self, mlps: tuple[ExpertMlp, ...], provider: CachedExperts, pool: SlotPool, context: ForwardContext
    ) -> None:
        """Prepare the kernels; buffers are those of a pass."""
        self._mlps, self._provider, self._pool, self._context = mlps, provider, pool, context
        self._experts = provider.controller.table.experts
        device = pool.buffer.device
        self._kernels = backend(device)
        grouped: dict[int, Any] = {id(mlp): self._kernels.grouped(mlp, device) for mlp in mlps}
        self._grouped = tuple(grouped[id(mlp)] for mlp in mlps)

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute a layer: states `[T, H]`, experts `[T, K]`, weights `[T, K]` to `[T, H]`."""
        now, hidden = self._context.now, hidden.contiguous()
        if now.padding is not None:
            index = index.masked_fill(now.padding[:, None], self._experts)
        tokens, top_k = index.shape
        copy, wait = on_host(index)
        pairs = sort_pairs(index, self._experts)
        work = Workspace.allocate(self._mlps[layer], tokens, top_k, hidden.device, shared=False)
        compute, (records, first) = self._grouped[layer], self._pool.of(layer)
        with self._provider.lend_residents(layer) as residents:
            if residents:
                compute(hidden, pairs, [(expert, slot - first) for expert, slot in residents.items()], records, work)
        wait()  # the one host sync of a layer
        if now.observe is not None:
            now.observe(
                layer, copy.clone(), weights
            )  # an observer may keep what it is given, and the copy is page-locked
        counted, out = pairs.counted(copy.numpy()), torch.empty_like(hidden)
        left = len(counted.needed)
        with closing(self._provider.groups(layer, counted.needed)) as brought:
            for group in brought:
                rest = [(access.expert, access.slot - first) for access in group if access.expert not in residents]
                if rest:
                    compute(hidden, counted, rest, records, work)
                left -= len(group)
                if (
                    not left
                ):  # behind the last group the provider may start more copies, and the device need not wait for that
                    self._kernels.combine(work.parts, index, weights, self._experts, out)
        if not counted.needed:
            out.zero_()
        return out
