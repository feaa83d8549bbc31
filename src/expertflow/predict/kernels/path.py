"""A step of the routing path predictor in nine launches: the device twin of `predict.model` and of its calibration.

In torch a step is some 130 small tensor operations whose launches take longer than their work. Here each stage is one
launch: take tokens and routes in and look back (`take_in`), then sum copies up, read, two residual blocks, judge,
decide (`network`). Weights are read where they are. Must not know files, sequences and training. Shapes as in
`predict.model`.
"""

from typing import cast

import torch
import triton
from torch import Tensor, nn

from expertflow.predict.artifact import Artifact
from expertflow.predict.kernels import network
from expertflow.predict.kernels.absorb import absorb
from expertflow.predict.kernels.shared import power_of_two
from expertflow.predict.kernels.take_in import take_in
from expertflow.predict.model import PathPredictor
from expertflow.predict.options import PATH
from expertflow.predict.state import Pieces, State

_PROGRAMS = 4
"""Programs that load the same tile of weights at most, each for its share of the rows."""
_MOST = {
    "experts": 512, "window": 1024, "width": 512, "embedding": 256, "heads": 16, "matches": 32, "key": 32, "top_k": 32,
}  # fmt: skip
"""The largest sizes whose tiles fit in registers."""
_MOST_MARKS = 128
"""Matches times experts a token, at most."""


def serves(artifact: Artifact) -> bool:
    """Whether an artifact is a path predictor of sizes whose tiles fit, in float32."""
    config = artifact.config
    if config.kind != PATH:
        return False
    tensors = [*artifact.model.state_dict().values(), *artifact.memory.state_dict().values(), artifact.calibration]
    return (
        all(getattr(config, name) <= most for name, most in _MOST.items())
        and config.matches * config.top_k <= _MOST_MARKS
        and all(tensor.is_contiguous() for tensor in tensors)
        and all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())
    )


def path_step(artifact: Artifact) -> "PathStep | None":
    """The step of an artifact, on its device; None if it is not served."""
    return PathStep(artifact) if serves(artifact) else None


class PathStep:
    """`PathPredictor.feed` and `Artifact.probabilities` of an artifact that is served.

    Nine launches on the current stream, capturable. Weights are read where they are, also after they change in place.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Copy and compute nothing."""
        self._artifact, self._early = artifact, _early(artifact.calibration)
        self._model = cast("PathPredictor", artifact.model)

    def __call__(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> Tensor:
        """One step.

        Args:
            state: changed in place.
            rows: integer `[B]`, state rows, each at most once, but for a spare one of no sequence.
            tokens: int64 `[B]`, the tokens just sampled; -1 unknown.
            routes: integer `[B, L, K]`, the true routing of each sequence's token before; E where there is none.

        Returns:
            `[B, O, L, E]` float32, probabilities.
        """
        c, early, batch, rows = self._artifact.config, self._early, len(rows), rows.contiguous()
        used, sources, embedded, amounts, places, recalled = take_in(
            self._artifact, state, rows, tokens, routes, early=early
        )
        decays, groups = len(c.decays), 2 * c.heads
        network.pour[(batch, groups, c.layers)](
            rows, state.routes, amounts, places, sources,
            layers=c.layers, experts=c.experts, ep=power_of_two(c.experts), top_k=c.top_k, decays=decays, groups=groups,
            matches=c.matches, window=c.window, early=early, num_warps=1 if c.experts <= 128 else 4, launch_pdl=early,
        )  # fmt: skip
        each = max(1, triton.cdiv(batch, _PROGRAMS))
        z = self._refine(self._read(embedded, used, sources, each), each)
        trust, now, later = self._judge(z, each)
        return self._decide(state, rows, sources, (trust, now, later), recalled, each)

    def update(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> None:
        """Update the state as a step does, in two launches, and compute no probabilities."""
        take_in(self._artifact, state, rows.contiguous(), tokens, routes, early=self._early)
        state.taken.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int64))

    def absorb(self, state: State, pieces: Pieces, tokens: Tensor, routes: Tensor) -> None:
        """`PathPredictor.absorb`: update the state as `update` would, token by token, in three launches."""
        absorb(self._artifact, state, pieces, tokens, routes)

    def _read(self, embedded: Tensor, used: Tensor, sources: Tensor, each: int) -> Tensor:
        """`[B, PARTS, width]`, vectors whose sum is the input of the first residual block."""
        model, c, batch = self._model, self._artifact.config, len(used)
        flat, decays = c.layers * c.experts, len(c.decays)
        parts = model.base.new_empty(batch, network.PARTS, c.width)
        network.read[(triton.cdiv(batch, each), triton.cdiv(c.width, 4), network.PARTS)](
            embedded, used, sources, model.read_tokens.weight, model.read_tokens.bias,
            *(read.weight for read in model.read_routes), parts, batch, each,
            flat=flat, decays=decays, heads=c.heads, slow=min(2, decays - 1), emb=c.embedding, width=c.width, block=4,
            block_emb=min(1024, power_of_two(3 * c.embedding)), block_flat=min(1024, power_of_two(flat)),
            early=self._early, num_warps=4, launch_pdl=self._early,
        )  # fmt: skip
        return parts

    def _refine(self, z: Tensor, each: int) -> Tensor:
        """The residual blocks: `[B, PARTS, width]` to `[B, 1, width]`."""
        c, early, batch = self._artifact.config, self._early, len(z)
        programs, padded = triton.cdiv(batch, each), power_of_two(c.width)
        for block in self._model.blocks:
            norm, up, _, _, down = cast("nn.Sequential", block)
            inner, refined = z.new_empty(batch, 2 * c.width), z.new_empty(batch, 1, c.width)
            network.up[(programs, triton.cdiv(2 * c.width, 8))](
                z, norm.weight, norm.bias, up.weight, up.bias, inner, batch, each, parts=z.shape[1], width=c.width,
                padded=padded, block=8, eps=norm.eps, early=early, num_warps=4, launch_pdl=early,
            )  # fmt: skip
            network.down[(programs, triton.cdiv(c.width, 4))](
                z, inner, down.weight, down.bias, refined, batch, each, parts=z.shape[1], width=c.width,
                padded=padded, block=4, early=early, num_warps=4, launch_pdl=early,
            )  # fmt: skip
            z = refined
        return z

    def _judge(self, z: Tensor, each: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the sources `[B, L O S]`, this step's logits `[B, L E]`, a summary for the later outputs."""
        model, c, batch, block = self._model, self._artifact.config, len(z), 32
        sizes = model.trust.out_features, c.layers * c.experts, model.later.out_features
        trust, now, later = (z.new_empty(batch, size) for size in sizes)
        network.judge[(triton.cdiv(batch, each), sum(triton.cdiv(size, block) for size in sizes))](
            z, model.norm.weight, model.norm.bias, model.trust.weight, model.trust.bias, model.now.weight,
            model.later.weight, model.later.bias, trust, now, later, batch, each,
            trusts=sizes[0], flat=sizes[1], laters=sizes[2], width=c.width, padded=power_of_two(c.width), block=block,
            eps=model.norm.eps, early=self._early, num_warps=4, launch_pdl=self._early,
        )  # fmt: skip
        return trust, now, later

    def _decide(
        self, state: State, rows: Tensor, sources: Tensor, judged: tuple[Tensor, ...], recalled: Tensor, each: int
    ) -> Tensor:
        """Probabilities `[B, O, L, E]`; the tokens count as taken."""
        model, memory, c, batch = self._model, self._artifact.memory, self._artifact.config, len(rows)
        outputs, many = model.base.shape[0], sources.shape[1]
        out = model.base.new_empty(batch, outputs, c.layers, c.experts)
        block = min(128, power_of_two(c.experts))
        network.decide[(triton.cdiv(batch, each), c.layers * triton.cdiv(c.experts, block), outputs)](
            rows, state.taken, sources, *judged, recalled, model.habit, model.base, model.spread.weight,
            self._artifact.calibration, memory.token_odds, memory.pair_odds, out, batch, each,
            layers=c.layers, experts=c.experts, block=block, outputs=outputs, many=many,
            many_padded=power_of_two(many), depth=model.spread.in_features, early=self._early, num_warps=4,
            launch_pdl=self._early,
        )  # fmt: skip
        return out


def _early(tensor: Tensor) -> bool:
    """Whether a kernel may be put on the device while the one before it ends (Hopper's programmatic launch)."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9
