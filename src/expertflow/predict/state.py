"""What a predictor remembers of live sequences, and how tokens of several sequences are laid out to be taken in.

Shapes: B sequences, N tokens, L layers, E experts, K experts a token, A heads, W window, D key width, R decays. Must not know
networks.
"""

from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertflow.memory.devices import locked


class StateSizes(Protocol):
    """The sizes of a state; fields as in `network.PredictorConfig`."""

    @property
    def layers(self) -> int:
        """L."""

    @property
    def experts(self) -> int:
        """E."""

    @property
    def top_k(self) -> int:
        """K."""

    @property
    def heads(self) -> int:
        """A."""

    @property
    def key(self) -> int:
        """D."""

    @property
    def window(self) -> int:
        """W."""

    @property
    def decays(self) -> tuple[float, ...]:
        """R of them."""


class State(NamedTuple):
    """What is remembered of C sequences; the first dimension of every tensor is the state row.

    Attributes:
        taken: `[C]` int64, tokens taken in.
        tokens: `[C, W]` int64, the last W tokens as a ring, token number n at n % W; -1 unknown or none.
        before: `[C, W]` int64, the token before each of them.
        keys: `[C, A, W, D]` float32, their retrieval keys.
        routes: `[C, W, L, K]` uint8 or int16, their experts; E none.
        faded: `[C, R, L, E]` float32, faded averages of past routing.
    """

    taken: Tensor
    tokens: Tensor
    before: Tensor
    keys: Tensor
    routes: Tensor
    faded: Tensor

    def clear(self, rows: Int[Tensor, " B"], experts: int) -> None:
        """Forget the sequences of these rows."""
        for column, empty in zip(self, (0, -1, -1, 0.0, experts, 0.0), strict=True):
            column[rows] = empty


def to_device(values: npt.NDArray[np.integer], device: torch.device, dtype: type[np.integer] = np.int64) -> Tensor:
    """Copy integers to a device, of the given type. The copy to a GPU is from page-locked memory and is not waited for."""
    given = torch.from_numpy(values.astype(dtype))
    if device.type != "cuda":
        return given.to(device)
    return locked(given).to(device, non_blocking=True)


class Pieces(NamedTuple):
    """Which sequence each of N tokens belongs to, and its place there. A *piece* is the tokens of one sequence; pieces lie end to end.

    Attributes:
        rows: int64 `[B]`, state row of each piece's sequence, each once.
        counts: int64 `[B]`, tokens of each piece, at least 1.
        begins: int64 `[B]`, place of each piece's first token among the N.
        owner: int64 `[N]`, which of the B pieces a token belongs to.
        place: int64 `[N]`, number of tokens of its piece before it.
        left: int64 `[N]`, number of tokens of its piece behind it.
        newest: int64 `[N']` or None, which tokens a ring of W places keeps; None: all.
    """

    rows: Tensor
    counts: Tensor
    begins: Tensor
    owner: Tensor
    place: Tensor
    left: Tensor
    newest: Tensor | None

    @classmethod
    def of(cls, rows: npt.ArrayLike, counts: npt.ArrayLike, window: int, device: torch.device) -> Self:
        """Lay tokens out on the host, and copy the layout to the device at once.

        Args:
            rows: state rows, each once.
            counts: tokens of each, at least 1.
            window: W, places of a ring.
            device: where the layout is copied to.
        """
        whose, many = np.asarray(rows, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        begins = np.cumsum(many) - many
        owner = np.repeat(np.arange(len(many)), many)
        place = np.arange(len(owner)) - begins[owner]
        left = many[owner] - 1 - place
        newest = np.flatnonzero(left < window)
        parts = (whose, many, begins, owner, place, left, newest)
        there = to_device(np.concatenate(parts), device).split([len(part) for part in parts])
        whose, many, begins, owner, place, left, newest = there
        return cls(whose, many, begins, owner, place, left, newest if len(newest) < len(owner) else None)

    def shifted(self, column: Tensor, first: Tensor) -> Tensor:
        """`[N, ...]`: each token's value is that of the token before it; for the first token of a piece it is in `first` `[B, ...]`."""
        moved = column.roll(1, 0)
        moved[self.begins] = first.to(column.dtype)
        return moved


def empty_state(config: StateSizes, rows: int, device: torch.device) -> State:
    """Allocate a state for `rows` sequences, none of which is known yet."""
    c, dtype = config, torch.uint8 if config.experts < 256 else torch.int16
    return State(
        taken=torch.zeros(rows, dtype=torch.int64, device=device),
        tokens=torch.full((rows, c.window), -1, dtype=torch.int64, device=device),
        before=torch.full((rows, c.window), -1, dtype=torch.int64, device=device),
        keys=torch.zeros(rows, c.heads, c.window, c.key, device=device),
        routes=torch.full((rows, c.window, c.layers, c.top_k), c.experts, dtype=dtype, device=device),
        faded=torch.zeros(rows, len(c.decays), c.layers, c.experts, device=device),
    )


def fade_in(state: State, pieces: Pieces, used: Float[Tensor, "N L E"], rates: Float[Tensor, " R"]) -> None:
    """Update each piece's faded averages with its tokens, in place."""
    mine = torch.arange(len(pieces.rows), device=used.device)[:, None, None] == pieces.owner
    weight = torch.where(mine, (1 - rates[:, None]) * rates[:, None] ** pieces.left, 0.0)  # [B, R, N]
    fresh = (weight.flatten(0, 1) @ used.flatten(1)).view(-1, len(rates), *used.shape[1:])
    kept = rates ** pieces.counts[:, None]
    state.faded[pieces.rows] = state.faded[pieces.rows] * kept[..., None, None] + fresh
