"""Recorded routing in place of the router's choice, and recorded tokens in place of the model's.

Measurements run on replays: a recording gives the experts of every token of a sequence, so that random weights are
routed as text is. Routes of the live sequences lie in one device buffer, indexed by KV row and position, so captured
steps read them too. The router still runs, and its weights are kept: rank by rank they go to the recorded experts. A
trace lists experts by weight; where a family's router does not, the largest weights go to other experts than recorded.
Must not know requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from expertflow.errors import ConfigError
from expertflow.models.context import ForwardContext
from expertflow.models.shape import KvLayer, ModelShape
from expertflow.trace.format import Trace

Routes = npt.NDArray[np.integer]
"""`[n, L, K]`, the experts of each position of a sequence."""
_UNKNOWN = -1
"""A position's token that was not recorded; the model's own is taken."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One sequence, prompt and answer.

    Attributes:
        routes: `[n, L, K]`; None: the router decides.
        tokens: int64 `[n]`, -1 where unknown; None: the model decides.
    """

    routes: Routes | None = None
    tokens: npt.NDArray[np.int64] | None = None


class Replay:
    """Recorded sequences. A request replays the recording that its `index` names: the i-th prompt of a call, the i-th recording.

    Args:
        recorded: a trace, whose sequences are recordings in ascending order of their numbers; or arrays `[n, L, K]` of
            the experts of every position, one a sequence. None: only tokens are replayed.
        tokens: the token of every position, prompts included, one sequence of ids a recording; -1 where the model decides. None:
            those of the trace, or the model decides.

    Raises:
        ConfigError: if there is nothing to replay, or routes and tokens are of different sequences.
    """

    def __init__(
        self,
        recorded: Trace | npt.NDArray[np.integer] | Sequence[Routes] | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Split the recordings into sequences."""
        routes: list[Routes] | None = None
        if isinstance(recorded, Trace):
            rows = recorded.rows
            places = [
                np.flatnonzero(rows.sequence == number) for number in np.unique(rows.sequence[rows.sequence >= 0])
            ]
            routes = [rows.experts[mine] for mine in places]
            tokens = [rows.tokens[mine].tolist() for mine in places] if tokens is None else tokens
        elif recorded is not None:
            routes = [np.asarray(one) for one in recorded]
        count = len(routes) if routes is not None else len(tokens or ())
        if not count:
            raise ConfigError("there is nothing to replay", "Give a trace, routes or tokens.")
        if tokens is not None and len(tokens) != count:
            raise ConfigError(
                f"{len(tokens)} token sequences for {count} recordings", "Give one a recording, or leave tokens out."
            )
        self.recordings = tuple(
            Recording(
                routes=None if routes is None else routes[place],
                tokens=None if tokens is None else np.asarray(tokens[place], dtype=np.int64),
            )
            for place in range(count)
        )

    @property
    def has_routes(self) -> bool:
        """Whether the router's choice is replaced."""
        return self.recordings[0].routes is not None

    def counted(self, shape: ModelShape) -> ModelShape:
        """The model's figures, with the routes on the device counted beside keys and values.

        Raises:
            ConfigError: if these recordings are not of such a model, or its sequences do not lie in KV rows.
        """
        if shape.encoder_decoder or not shape.in_rows:
            raise ConfigError(
                f"routing of {shape.model_type!r} cannot be replayed: its sequences do not lie in KV rows",
                "Replay a decoder-only model with an entry in models.families.",
            )
        if not self.has_routes:
            return shape
        self._check_routes(shape)
        size = shape.layers * shape.top_k * _dtype(shape).itemsize
        return replace(shape, kv=(*shape.kv, KvLayer(bytes_per_token=size, read_per_token=0)))

    def _check_routes(self, shape: ModelShape) -> None:
        wanted = shape.layers, shape.top_k
        for number, recording in enumerate(self.recordings):
            routes = recording.routes
            if routes is None:
                continue
            if routes.ndim != 3 or routes.shape[1:] != wanted:
                raise ConfigError(
                    f"recording {number} has routes of shape {routes.shape}, the model needs [n, {wanted[0]}, {wanted[1]}]",
                    "Record this model, or one with the same layers and experts a token.",
                )
            if routes.size and not 0 <= int(routes.min()) <= int(routes.max()) < shape.experts:
                raise ConfigError(
                    f"recording {number} uses experts {routes.min()} to {routes.max()} of {shape.experts}",
                    "Record a model with as many experts a layer.",
                )

    def check_request(self, index: int, positions: int) -> None:
        """Refuse a request that its recording does not cover.

        Args:
            index: of the request.
            positions: tokens that it may feed to the model.

        Raises:
            ConfigError: then.
        """
        if not 0 <= index < len(self.recordings):
            raise ConfigError(
                f"request {index} has no recording, there are {len(self.recordings)}",
                "Give every request the index of one.",
            )
        routes = self.recordings[index].routes
        if routes is not None and len(routes) < positions:
            raise ConfigError(
                f"request {index} runs to {positions} tokens, its recording has {len(routes)}",
                "Generate fewer tokens, or record more.",
            )

    def known(self, index: int, position: int) -> int | None:
        """The token at a position of a recording; None where none was recorded."""
        tokens = self.recordings[index].tokens
        if tokens is None or position >= len(tokens) or tokens[position] == _UNKNOWN:
            return None
        return int(tokens[position])

    def token(self, index: int, position: int, chosen: int) -> int:
        """The token at a position of a recording; `chosen` where none was recorded."""
        found = self.known(index, position)
        return chosen if found is None else found


def _dtype(shape: ModelShape) -> torch.dtype:
    return torch.uint8 if shape.experts <= 256 else torch.int16


def _narrow(dtype: torch.dtype) -> type[np.integer]:
    """The same in NumPy."""
    return np.uint8 if dtype == torch.uint8 else np.int16


class Playback:
    """What an engine replays: the recordings, and the table of their routes on the device.

    Args:
        replay: the recordings.
        table: routes of the live sequences; None: the router decides.
    """

    def __init__(self, replay: Replay, table: "RouteTable | None") -> None:
        """Start with no sequence."""
        self._replay, self._table = replay, table

    def check(self, index: int, positions: int) -> None:
        """Refuse a request that its recording does not cover. See `Replay.check_request`."""
        self._replay.check_request(index, positions)

    def begin(self, index: int, row: int) -> None:
        """Let a sequence replay recording `index` in a KV row, from its beginning."""
        routes = self._replay.recordings[index].routes
        if self._table is not None and routes is not None:
            self._table.write(row, routes)

    def known(self, index: int, position: int) -> int | None:
        """The token at a position of a recording; None where none was recorded."""
        return self._replay.known(index, position)

    def token(self, index: int, position: int, chosen: int) -> int:
        """The token at a position of a recording; `chosen` where none was recorded, or where there is none at all."""
        return chosen if chosen < 0 else self._replay.token(index, position, chosen)


class RouteTable:
    """Routes of the live sequences on the device.

    Args:
        shape: the model's figures.
        context: what the model's passes carry, KV rows and columns among it.
        rows: KV rows.
        length: tokens of a sequence at most.
        device: of the model.
    """

    def __init__(
        self, shape: ModelShape, context: ForwardContext, rows: int, length: int, device: torch.device
    ) -> None:
        """Allocate `[L, rows, length + 1, K]`; the last column is where padding looks."""
        self._context = context
        size = shape.layers, rows, length + 1, shape.top_k
        self._routes = torch.zeros(size, dtype=_dtype(shape), device=device)
        self._step: Tensor | None = None

    def write(self, row: int, routes: Routes) -> None:
        """Write the experts `[n, L, K]` of a sequence that begins in a KV row; positions beyond the row are left out."""
        known = min(len(routes), self._routes.shape[2] - 1)
        narrow = torch.from_numpy(routes[:known].astype(_narrow(self._routes.dtype), order="C"))
        # turned round on the device: the host takes 40 ms for 98,304 tokens
        self._routes[:, row, :known] = narrow.to(self._routes.device).swapaxes(0, 1)

    def choose(self, layer: int) -> Int[Tensor, "T K"] | None:
        """The recorded experts of the running pass's tokens, int64, in place of the router's; None: there is no recording of it.

        A step of one token a sequence looks its routes up once, in its first layer: it is captured, and its kernels count.
        """
        now = self._context.now
        if not len(now.rows):  # a caller's own pass over the model
            return None
        rows = now.rows[:, None] if now.pieces is None else now.rows
        if now.pieces is not None or now.columns.shape[1] > 1:
            return self._routes[layer][rows, now.columns].flatten(0, -2).long()
        if layer == 0:
            self._step = self._routes[:, rows, now.columns].flatten(1, -2).long()
        assert self._step is not None
        return self._step[layer]
