"""Decode steps as graphs: the whole step, routing included, is captured once a shape and replayed.

A step reads its tokens from a fixed buffer and leaves logits and the most probable tokens in others; the predictor, the
plan and the loads of the experts are part of it (`engine.device`); keys and values are in rows that never move
(`engine.rows`). Captured once for each number of rows and of columns looked at, both rounded up to a few sizes; the first
step of a shape runs eagerly and is captured behind. On a CPU every step runs eagerly: the same code without the capture.
Prompts go through the host execution.
Knows the model's forward; refuses to know requests.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from expertflow.engine.dense import DenseParts
from expertflow.engine.device import DeviceExperts
from expertflow.engine.rows import RowCache, step_masks
from expertflow.engine.runner import DecoderBatch
from expertflow.errors import DeviceError
from expertflow.models.skeleton import Skeleton

LEAST_COLUMNS = 128
"""Columns the shortest captured step looks at; longer ones double."""


def round_up(need: int, least: int, most: int) -> int:
    """The size a step is captured for: `least`, doubled until it suffices, but no more than `most`."""
    size = least
    while size < need:
        size *= 2
    return min(size, most)


class GraphDecoder:
    """Runs decode steps of up to `rows` sequences; one a loaded model, used by one batch at a time.

    Args:
        model: loaded model.
        skeleton: of it.
        experts: of the steps.
        rows: sequences at most.
        length: tokens of a sequence at most.
        dense: run attention and norms by our kernels where a module is of a form they know; else by the model's own.

    Attributes:
        busy: whether a batch has its keys and values in the rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        experts: DeviceExperts,
        rows: int,
        length: int,
        *,
        dense: bool = True,
    ) -> None:
        """Make the buffers that graphs point at."""
        config = skeleton.config.get_text_config(decoder=True)
        self.model, self.skeleton, self.experts = model, skeleton, experts
        self._rows, self._length = rows, length
        kinds, options = get_layer_types_and_kwargs(config)
        window = options.get("sliding_window")
        assert skeleton.family is not None
        self._kinds = tuple(dict.fromkeys((*kinds, "full_attention", "sliding_attention")))
        self._windows = tuple(None if kind == "full_attention" else window for kind in self._kinds)
        if skeleton.family.masks == "one":
            self._kinds, self._windows = (kinds[0],), (None if kinds[0] == "full_attention" else window,)
        self.cache = RowCache(len(kinds), rows, length)
        device, dtype = model.device, getattr(torch, skeleton.dtype)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.logits = torch.zeros(rows, int(config.vocab_size), dtype=dtype, device=device)
        self.best = torch.zeros(rows, dtype=torch.long, device=device)
        windows = [None if kind == "full_attention" else window for kind in kinds]
        self._dense = DenseParts(model, skeleton, windows) if dense else None
        self._lengths: list[int] = []
        self._graphs: dict[tuple[int, int, bool, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._whole = True
        self.busy = False

    def begin(self, lengths: Sequence[int]) -> None:
        """The prompts are in the cache, padded on the left to the longest: decode steps come next."""
        width = max(lengths)
        self.cache.pack([width - length for length in lengths], width)
        self._lengths = list(lengths)
        self._place()
        self._whole = True

    @property
    def count(self) -> int:
        """Sequences in the rows."""
        return len(self._lengths)

    def _place(self) -> None:
        count = self.count
        self.positions.zero_()
        self.positions[:count] = torch.tensor(self._lengths, device=self.positions.device)
        self.experts.live.fill_(count)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, ascending."""
        self.cache.keep(rows)
        self._lengths = [self._lengths[row] for row in rows]
        self._place()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "B V"]:
        """Feed one token a row; logits of the next, valid until the next step."""
        count = len(tokens)
        self.experts.begin()
        rows = round_up(count, 1, self._rows)
        columns = round_up(max(self._lengths) + 1, min(LEAST_COLUMNS, self._length), self._length)
        self.tokens[:count].copy_(torch.tensor(tokens))
        self.experts.seat(rows)
        self._whole = False
        self.launch(rows, columns)
        self._lengths = [length + 1 for length in self._lengths]
        self.experts.told()
        self._whole = True
        return self.logits[:count]

    def launch(self, rows: int, columns: int) -> None:
        """Run a step over what the buffers hold: replay its graph, or run it and capture it for the next time."""
        shape = rows, columns, self.experts.fixed, self.experts.predicting
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.replay()
            return
        self.experts.prepare(rows)
        self.experts.attach(self.model, self.skeleton)
        if self._dense is not None:
            self._dense.attach()
        try:
            self._run(rows, columns)
            if self._pool is not None and self.experts.predicting == shape[-1]:  # else it was switched off meanwhile
                self._graphs[shape] = _capture(lambda: self._run(rows, columns), self._pool)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"the device ran out of memory while a decode step of {rows} sequences was made: {error}",
                "State a gpu_memory that leaves more of the device free, or use execution='host'.",
            ) from error
        finally:
            if self._dense is not None:
                self._dense.detach()
            self.experts.detach(self.model, self.skeleton)

    def _run(self, rows: int, columns: int) -> None:
        try:
            self._step(rows, columns)
        except BaseException:
            self.experts.break_off()
            raise

    def _step(self, rows: int, columns: int) -> None:
        positions = self.positions[:rows]
        if self._dense is not None:
            self._dense.positions = positions
        self.cache.decode(positions, columns)
        masks = step_masks(positions, columns, self._windows, self.logits.dtype)
        by_kind = dict(zip(self._kinds, masks, strict=True))
        self.experts.open_step(self.tokens[:rows])
        out: Any = self.model.forward(  # not a call: its hooks begin a step of the host execution
            input_ids=self.tokens[:rows, None],
            attention_mask=by_kind if len(by_kind) > 1 else masks[0],
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.experts.close_step()
        self.logits[:rows].copy_(out.logits[:, -1])
        torch.argmax(self.logits[:rows], dim=-1, out=self.best[:rows])
        positions.add_(1)

    def end(self) -> None:
        """The host decides next: it takes over what is resident, if that is known."""
        if self._whole:
            self.experts.end()
        else:  # a step was broken off: what the slots hold is unknown
            self.experts.abandon()
            self._whole = True

    @property
    def pool_bytes(self) -> int:
        """Device memory that the graphs keep for themselves."""
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) == self._pool)


def _capture(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """What `run` queues, as a graph; nothing is carried out.

    cuBLAS keeps a workspace for each stream for good. Dropped before, so that the graph gets one of its own memory, and
    after, so that this memory goes when the graphs go.
    """
    graph, line = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - as torch's own graph trees do; there is no public way
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    finally:
        torch.cuda.set_stream(line)  # a capture that fails leaves its own behind
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001
    return graph


class GraphBatch:
    """Sequences whose prompts the host execution reads and whose tokens graphs compute; a `runner.Batch`."""

    def __init__(self, decoder: GraphDecoder, prompts: Sequence[Sequence[int]], chunk: int) -> None:
        """Take the decoder's rows."""
        self._decoder, self._lengths = decoder, [len(prompt) for prompt in prompts]
        decoder.cache.restart(len(prompts))
        self._prompts = DecoderBatch(decoder.model, prompts, chunk, decoder.cache)
        self._begun = False
        decoder.busy = True

    def prefill(self) -> Float[Tensor, "B V"]:
        """Run the prompts; logits of each sequence's next token."""
        return self._prompts.prefill()

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Float[Tensor, "B V"]:
        """Run one new token a sequence; logits of the next."""
        if not self._begun:
            self._decoder.begin(self._lengths)
            self._begun = True
        return self._decoder.step(tokens)

    def best(self) -> Int[Tensor, " B"] | None:
        """The most probable next tokens, if the last step has them ready."""
        return self._decoder.best[: self._decoder.count] if self._begun else None

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order."""
        if not self._begun:
            self._decoder.begin(self._lengths)
            self._begun = True
        self._decoder.keep(rows)

    def close(self) -> None:
        """Give the cache back to the host."""
        if self._decoder.busy:
            self._decoder.busy = False
            self._decoder.end()
