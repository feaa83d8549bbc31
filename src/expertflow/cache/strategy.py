"""The table of named strategies. A baseline is a row here; engine, simulator, CLI, docs and tests read the live table.

A row says what is expected (a forecast), what is loaded ahead (the plan's numbers) and who leaves (a policy).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import Rules
from expertflow.cache.forecast import Forecast, LayerOrder, NextGate, Nothing, Recorded, TokenCounts
from expertflow.cache.policy import HIDDEN, Policy, belady, discounted_use, layer_order, lfu, lru, next_use
from expertflow.config import nearest
from expertflow.errors import ConfigError

DEFAULT, PREDICTED_DEFAULT = "next-use", "plec"
"""The strategy that is used when none is named, without and with a trained predictor."""
ALL_LAYERS = 1 << 20
DEVICE_WAVE = 16
"""Loads a wave of the device execution; few waves are few kernels, docs/lab-notes.md has the price in loads."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a forecast may be made from.

    Attributes:
        layers: MoE layers.
        experts: experts a layer.
        future: `[N, L, E]` bool, the routing of the very run that is coming; None unless it was recorded.
        gate_recall: share of a layer's path that the next-layer gate foresees, where it is replayed from a recording.
        reached: the layers that a decode step runs; None: all.
    """

    layers: int
    experts: int
    future: npt.NDArray[np.bool_] | None = None
    gate_recall: float = 0.85
    reached: Sequence[bool] | None = None


MakeForecast = Callable[[Setting], Forecast]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the slots are used.

    Attributes:
        name: as the user writes it.
        summary: one line for tables and docs.
        policy: who leaves when a slot is needed.
        forecast: makes the source of expectations.
        needs_future: whether that source is a recording of the run itself.
        partition: `layer` gives each layer an equal share of the slots, `global` lets all layers compete.
        retain: whether experts stay in their slots after their layer is done.
        prefetch: `none`, a plan `step` by step, or after every `layer`.
        threshold: demand from which an expert is prefetched.
        ahead: layers a prefetch may run ahead.
        wraps: whether a rolling plan goes on into the next step.
        reserve: slots the plan leaves to corrections.
        wave: loads of a layer after which its own slots may be used again within it.
        predicted: whether a trained predictor may take the place of its forecast.
        joint: whether a layer's hits are computed together with its first wave of loads.
    """

    name: str
    summary: str
    policy: Policy
    forecast: MakeForecast = lambda setting: Nothing()  # noqa: ARG005 - a forecast's signature
    needs_future: bool = False
    partition: Literal["layer", "global"] = "global"
    retain: bool = True
    prefetch: Literal["none", "step", "layer"] = "none"
    threshold: float = 0.5
    ahead: int = ALL_LAYERS
    wraps: bool = False
    reserve: int = 4
    wave: int = 1
    predicted: bool = False
    joint: bool = False

    def on_device(self) -> Self:
        """The same row with a layer computed in few large waves, and as many slots left to each: what a CUDA graph can hold."""
        return replace(self, wave=DEVICE_WAVE, reserve=max(self.reserve, DEVICE_WAVE), joint=True)

    def double_buffered(self) -> Self:
        """The same row with turns of two: where copies run beside computation, one slot is filled while one is read."""
        return replace(self, wave=max(self.wave, 2))

    def rules(self, layers: int, slots: int) -> Rules:
        """The numbers the core works with, for a model of `layers` and a pool of `slots`."""
        share = slots // layers if self.partition == "layer" and slots >= layers else slots
        reserve = max(1, min(self.reserve, slots // 2))
        return Rules(
            retain=self.retain,
            prefetch=self.prefetch != "none",
            threshold=self.threshold,
            reserve=reserve,
            ahead=min(self.ahead, layers),
            rolling=self.prefetch == "layer",
            wraps=self.wraps,
            wave=min(self.wave, share if self.prefetch == "none" else reserve),  # a wave never waits for planned slots
            joint=self.joint,
        )

    def check_future(self, future: npt.NDArray[np.bool_] | None) -> None:
        """Refuse to run without a recording if the row needs one.

        Raises:
            ConfigError: then.
        """
        if self.needs_future and future is None:
            raise ConfigError(
                f"strategy {self.name!r} has to know the run's routing in advance",
                "Replay a recorded trace (`expertflow simulate`), or choose a strategy that needs no recording.",
            )

    def make_forecast(self, setting: Setting) -> Forecast:
        """The row's source of expectations.

        Raises:
            ConfigError: if it needs a recording of the run and there is none.
        """
        self.check_future(setting.future)
        return self.forecast(setting)


def _future(setting: Setting) -> npt.NDArray[np.bool_]:
    assert setting.future is not None
    return setting.future


_ROWS = (
    Strategy(
        name="on-demand",
        summary="keeps nothing between layers: every needed expert is loaded when its layer runs",
        policy=lru,
        retain=False,
    ),
    Strategy(
        name="lru",
        summary="an equal share of the slots for each layer, least recently used leaves (the paper's Cache-MoE)",
        policy=lru,
        partition="layer",
    ),
    Strategy(name="lru-global", summary="one pool for all layers, least recently used leaves", policy=lru),
    Strategy(name="lfu", summary="one pool for all layers, least often used since the start leaves", policy=lfu),
    Strategy(
        name="ring",
        summary="whole layers are loaded ahead into a ring of slots, whatever is needed (SE-MoE)",
        policy=layer_order,
        forecast=lambda s: LayerOrder(s.layers, s.experts),
        prefetch="layer",
        wraps=True,
    ),
    Strategy(
        name="pregated",
        summary="the next layer's gate says one layer early what to load; nothing else is foreseen (Pre-gated MoE)",
        policy=lru,
        forecast=lambda s: NextGate(_future(s), s.gate_recall),
        needs_future=True,
        prefetch="layer",
        ahead=1,
    ),
    Strategy(
        name="next-use",
        summary="no prefetch; who is expected latest leaves, expected from faded counts and the place in the layer cycle",
        policy=next_use,
    ),
    Strategy(
        name="plec",
        summary="a demand forecast (a trained predictor, else counts by token id) decides slots, prefetch and retention",
        policy=discounted_use,
        forecast=lambda s: TokenCounts(s.layers, s.experts),
        predicted=True,
        prefetch="step",
        threshold=1 / (1 + HIDDEN),  # below it no load ahead pays, whoever makes room
    ),
    Strategy(
        name="oracle-step",
        summary="this step's true path is loaded ahead wherever there is room, and counts decide beyond it",
        policy=next_use,
        forecast=lambda s: Recorded(_future(s)),
        needs_future=True,
        prefetch="step",
    ),
    Strategy(
        name="oracle",
        summary="Belady: every later use is known, the farthest leaves; no policy loads less",
        policy=belady,
        forecast=lambda s: Recorded(_future(s), horizon=None),
        needs_future=True,
    ),
)
STRATEGIES = {row.name: row for row in _ROWS}


def find_strategy(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        ConfigError: if there is no such row; names the nearest.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}", nearest(name, STRATEGIES))
    return STRATEGIES[name]
