"""Where what threads read from a checkpoint is packed: on the processor, or on the model's GPU where a format can.

A core packs about half a GB of codes a second. On a GPU each part takes some launches, which threads queue one after another.
Must not know files and records.
"""

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from expertflow.formats.format import Part, TensorSpec
from expertflow.formats.words import forget_tables
from expertflow.models.files.checkpoint import StoredTensor
from expertflow.models.weights.dense import pack_part

_PLACES = 6
"""Parts that are on the GPU at once: some come, one is packed, some go."""
_LEAST = 1 << 18
"""Bytes of a part that are worth the way to the GPU."""


class Packing:
    """Packs what threads have read, and gives each a place to read it to.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is taken yet."""
        self._device, self._mine = device, threading.local()
        # every operation asks for Python's lock: threads that queue theirs at the same time mostly wait for it
        self._turn = threading.Lock()
        self._places = queue.SimpleQueue[_Place]()
        for _ in range(_PLACES if device.type == "cuda" else 0):
            self._places.put(_Place(device))

    def landing(self, nbytes: int) -> Tensor:
        """Where the thread reads as many bytes, uint8; what it read before is lost.

        Memory is taken once, because the pages of new memory cost as much as reading.
        """
        memory: Tensor | None = getattr(self._mine, "memory", None)
        if memory is None or len(memory) < nbytes:
            memory = torch.empty(nbytes, dtype=torch.uint8)
            self._mine.memory = memory
        return memory[:nbytes]

    def pack(
        self, spec: TensorSpec, part: Part, source: StoredTensor, stored: Tensor, target: Callable[[], Tensor]
    ) -> None:
        """Pack a part into its record. See `pack_part`.

        Args:
            spec: the tensor; one of them where several are joined.
            part: the part.
            source: the checkpoint tensor that its numbers come from.
            stored: as in the checkpoint.
            target: gives where it goes, flat, in the part's dtype.

        Raises:
            CheckpointError: if it cannot be decoded.
        """
        far = self._device.type == "cuda" and part.name in spec.format.packed_anywhere
        if not far or stored.nbytes < _LEAST:
            target().copy_(pack_part(spec, part, source, stored))
            return
        place = self._places.get()
        try:
            place.take(stored)
            with self._turn, torch.cuda.stream(place.stream):
                packed = place.bring(pack_part(spec, part, source, place.send(stored)))
                where = target()
            place.stream.synchronize()
            where.copy_(packed)
        finally:
            place.stream.synchronize()  # after an error: the next one's numbers go where a copy may still read
            self._places.put(place)

    def close(self) -> None:
        """Give the GPU its memory back."""
        while not self._places.empty():
            self._places.get()
        if self._device.type == "cuda":
            forget_tables()
            torch.cuda.empty_cache()


class _Place:
    """A stream of the GPU, and page-locked memory for what goes there and comes back."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self._device = torch.cuda.Stream(device), device
        self._out = self._back = torch.empty(0, dtype=torch.uint8)

    def take(self, stored: Tensor) -> None:
        """Copy numbers of host memory to where the GPU reads them."""
        if len(self._out) < stored.nbytes:
            self._out = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=True)
        self._out[: stored.nbytes].view(stored.dtype).view(stored.shape).copy_(stored)

    def send(self, stored: Tensor) -> Tensor:
        """What was taken, on the GPU; queued, and until the next call."""
        sent = self._out[: stored.nbytes].to(self._device, non_blocking=True)
        return sent.view(stored.dtype).view(stored.shape)

    def bring(self, packed: Tensor) -> Tensor:
        """Numbers of the GPU in host memory, as soon as what is queued has ended and until the next call."""
        raw = packed.reshape(-1).view(torch.uint8)
        if len(self._back) < len(raw):
            self._back = torch.empty(len(raw), dtype=torch.uint8, pin_memory=True)
        target = self._back[: len(raw)]
        target.copy_(raw, non_blocking=True)
        return target.view(packed.dtype)
