"""Decode steps as graphs: the whole step, routing included, is captured once a shape and replayed.

A step reads tokens, rows and positions from fixed buffers, and writes logits and the most probable tokens to others.
The predictor, the plan and the loads of the experts are part of it (`execution.captured.experts`). Keys and values, and the
tables of their pages, are in buffers that never move (`execution.kv`). A step is captured once for each number of sequences and of columns
looked at, both rounded up to a few sizes. It is captured once more for a predictor that is paused. The first step of a
shape runs eagerly and is captured afterwards. On a CPU every step runs eagerly: the same code without the capture. Must
not know requests, and which side decides (`execution.handover`).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertflow.errors import DeviceError
from expertflow.execution.blocks.forms import LayerForm
from expertflow.execution.blocks.layer import LayerBlocks
from expertflow.execution.captured.capture import capture, graph_pool, kept_bytes
from expertflow.execution.captured.dense import DenseParts
from expertflow.execution.captured.experts import DeviceExperts
from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.kv.layout import WASTE
from expertflow.execution.kv_rows import DecodeInput, ForwardInput, RowModel
from expertflow.execution.passes import stock_forward
from expertflow.execution.sampler import most_probable
from expertflow.memory.devices import send

LEAST_COLUMNS = 128
"""Columns the shortest captured step looks at; longer ones double."""
TOKENS, ROWS, POSITIONS, COLUMNS, CELLS = range(5)
"""Places in `GraphDecoder.inputs`."""


def round_up(need: int, least: int, most: int) -> int:
    """The size a step is captured for: `least`, doubled until it suffices, but no more than `most`."""
    size = least
    while size < need:
        size *= 2
    return min(size, most)


class GraphDecoder:
    """Runs decode steps of up to `batch` sequences; one a loaded model.

    Args:
        rows: the model over its rows of keys and values.
        experts: of the steps.
        batch: sequences of a step at most.
        forms: of the decoder layers that building blocks run, by module path.
        one_size: run every step for `batch` sequences and all columns, so that the bits of one do not depend on the others.

    Attributes:
        inputs: int64 `[4 + K, batch]` on the device, what the next step is fed: tokens, rows, positions, columns, and K lines of
            cells, see `ForwardInput`.
        logits: `[batch, V]` of the last step.
        best: int64 `[batch]`, its most probable next tokens, as `sampler.most_probable` finds them.
    """

    def __init__(
        self,
        rows: RowModel | EncoderDecoderRows,
        experts: DeviceExperts,
        batch: int,
        forms: Mapping[str, LayerForm],
        *,
        one_size: bool = False,
    ) -> None:
        """Make the buffers that graphs point at."""
        self.rows, self.experts, self._batch = rows, experts, batch
        self._least = (batch, rows.nowhere) if one_size else (1, min(LEAST_COLUMNS, rows.nowhere))
        device, length = rows.model.device, rows.nowhere
        self._staged = torch.zeros(CELLS + rows.cell_lines, batch, dtype=torch.long)
        self._staged[COLUMNS] = length
        self.inputs = self._staged.to(device, copy=True)
        vocabulary = int(rows.skeleton.config.get_text_config(decoder=True).vocab_size)
        dtype = getattr(torch, rows.skeleton.dtype)
        self.logits = torch.zeros(batch, vocabulary, dtype=dtype, device=device)
        self.best = torch.zeros(batch, dtype=torch.long, device=device)
        self._dense = DenseParts(rows.model, rows.skeleton, rows.windows, rows.context)
        self._blocks = LayerBlocks(rows.model, forms, rows.context, batch, experts.places)
        self._graphs: dict[tuple[int, int, int, bool, bool, bool], torch.cuda.CUDAGraph] = {}
        self._reach = 0
        self._pool = graph_pool(device)

    @torch.inference_mode()
    def step(self, fed: Sequence[DecodeInput], tokens: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B V"]:
        """Feed one token a sequence; logits of the next, valid until the next step.

        Call `DeviceExperts.begin` for this step first.

        Args:
            fed: a token of each sequence.
            tokens: on the device, in place of those in `fed`; 0 is fed where one is negative.
        """
        count, length = len(fed), self.rows.nowhere
        _, given, rows, positions = map(list, zip(*fed, strict=True))
        batch, columns, self._reach = self._size(rows, positions, max(count, self.experts.updated))
        staged = self._staged.numpy()
        staged[:, count:] = 0
        staged[TOKENS, :count], staged[ROWS, :count], staged[POSITIONS, :count] = given, rows, positions
        staged[COLUMNS, :count], staged[COLUMNS, count:] = positions, length
        staged[CELLS:-1, count:] = WASTE
        self.rows.step_cells(rows, positions, staged[CELLS:, :count])
        send(self._staged, self.inputs)
        if tokens is not None:
            torch.clamp(tokens, min=0, out=self.inputs[TOKENS, :count])
            self.experts.feed(self.inputs[TOKENS, :count])
        self.launch(batch, columns)
        return self.logits[:count]

    def _size(self, rows: Sequence[int], positions: Sequence[int], need: int) -> tuple[int, int, int]:
        """Sequences, columns and encoder tokens that a step is captured for, rounded up."""
        (least, least_columns), length, reach = self._least, self.rows.nowhere, self.rows.reach(rows)
        columns = round_up(max(positions) + 1, least_columns, length)
        return (
            round_up(need, least, self._batch),
            columns,
            round_up(reach, least_columns, length) if reach else 0,
        )

    def ready(self, fed: Sequence[DecodeInput]) -> bool:
        """Whether such a step only has to be queued: its size was captured, or is never."""
        size = self._size([one.row for one in fed], [one.position for one in fed], len(fed))
        shape = *size, self.experts.fixed, self.experts.predicting
        return self._pool is None or all((*shape, paused) in self._graphs for paused in self.experts.variants)

    def launch(self, batch: int, columns: int) -> None:
        """Run a step over what the buffers hold: replay its graph, or run it and capture it for the next time."""
        shape = batch, columns, self._reach, self.experts.fixed, self.experts.predicting
        graph = self._graphs.get((*shape, self.experts.paused))
        if graph is not None:
            graph.replay()
            return
        self.experts.prepare(batch)
        try:
            self._run(batch, columns)
            if self._pool is not None and self.experts.predicting == shape[-1]:  # else it was switched off meanwhile
                for _ in self.experts.capture_variants():
                    run = capture(lambda: self._run(batch, columns), self._pool)
                    self._graphs[*shape, self.experts.paused] = run
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"the device ran out of memory while a decode step of {batch} sequences was made: {error}",
                "State a gpu_memory that leaves more of the device free, or use execution='host'.",
            ) from error

    def _run(self, batch: int, columns: int) -> None:
        try:
            self._step(batch, columns)
        except BaseException:
            self.experts.break_off()
            raise

    def _step(self, batch: int, columns: int) -> None:
        tokens, rows, positions, where = (self.inputs[place, :batch] for place in range(CELLS))
        cells = self.inputs[CELLS:, :batch, None]
        self.experts.open_step(batch)  # padding attends to whatever lies in row 0; what it gives is not read
        with self.rows.context.carry(experts=self.experts.run, dense=self._dense, blocks=self._blocks):
            logits = self.rows.forward(
                stock_forward(self.rows.model),  # a pass would begin a step of the host execution
                ForwardInput(tokens[:, None], rows, positions[:, None], where[:, None], columns, self._reach, cells),
            )
        self.experts.close_step()
        self.logits[:batch].copy_(logits)
        self.best[:batch].copy_(most_probable(self.logits[:batch]))

    def drop(self) -> None:
        """Free the captured steps' memory."""
        self._graphs.clear()

    @property
    def pool_bytes(self) -> int:
        """Device memory that the graphs keep for themselves."""
        return kept_bytes(self._pool)
