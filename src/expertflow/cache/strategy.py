"""The table of named strategies. Engine, simulator, CLI, docs and tests read this table; a baseline is an entry of it.

An entry names a forecast, the numbers of the prefetch plan, and an eviction policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import Rules
from expertflow.cache.forecast import CountsByToken, Forecast, LayerOrder, NextGate, NoForecast, Recorded
from expertflow.cache.policy import HIDDEN, Policy, belady, discounted_use, layer_order, lfu, lru, next_use
from expertflow.config import nearest
from expertflow.errors import ConfigError

DEFAULT, PREDICTED_DEFAULT = "next-use", "plec"
"""The strategy that is used when none is named, without and with a trained predictor."""
ALL_LAYERS = 1 << 20
"""A reach of prefetches that covers every model."""
DEVICE_WAVE = 16
"""Least loads of a wave of the device execution; few waves are few kernels. docs/lab-notes.md has the price in loads."""
DEVICE_WAVES = 32
"""Waves that fill the pool, at most: with many slots a wave holds more loads, and a layer of many experts is one phase."""
GATE_RECALL = 0.85
"""Share of a layer's path that a replayed next-layer gate predicts, unless stated otherwise."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The facts a forecast is made from.

    Attributes:
        layers: MoE layers.
        experts: experts a layer.
        future: bool `[N, L, E]`, the routing of the coming run; None unless it was recorded.
        gate_recall: share of a layer's path that the next-layer gate predicts, where it is replayed from a recording.
        reached: for each layer, whether a decode step runs it; None: all.
        large: layers whose experts are always resident, outside the slots.
    """

    layers: int
    experts: int
    future: npt.NDArray[np.bool_] | None = None
    gate_recall: float = GATE_RECALL
    reached: Sequence[bool] | None = None
    large: tuple[int, ...] = ()


MakeForecast = Callable[[Setting], Forecast]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the slots are used: an entry of the strategy table.

    Attributes:
        name: as the user writes it.
        summary: one line for tables and docs.
        policy: ranks experts for eviction.
        forecast: makes the forecast.
        needs_future: whether the forecast is a recording of the run itself.
        partition: `layer` gives each layer an equal share of the slots, `global` lets all layers compete.
        retain: whether experts stay in their slots after their layer is done.
        prefetch: `none`, a plan once a `step`, or after every `layer`.
        threshold: the least demand for which an expert is prefetched.
        ahead: layers a prefetch may run ahead.
        wraps: whether a rolling plan continues into the next step.
        reserve: slots the plan keeps free for corrections.
        wave: loads of a layer after which its own slots may be used again within it.
        predicted: whether a trained predictor may replace its forecast.
        waves: waves that fill the pool, at most; larger pools have larger waves, and as large a reserve.
        joint: whether a layer's hits are computed together with its first wave of loads.
        reads_ahead: whether a pass over so many tokens that it needs every expert loads each layer while the one before runs.
    """

    name: str
    summary: str
    policy: Policy
    forecast: MakeForecast = lambda setting: NoForecast()  # noqa: ARG005 - a forecast's signature
    needs_future: bool = False
    partition: Literal["layer", "global"] = "global"
    retain: bool = True
    prefetch: Literal["none", "step", "layer"] = "none"
    threshold: float = 0.5
    ahead: int = ALL_LAYERS
    wraps: bool = False
    reserve: int = 4
    wave: int = 1
    waves: int | None = None
    predicted: bool = False
    joint: bool = False
    reads_ahead: bool = False

    def on_device(self) -> Self:
        """Return the entry with large waves and as many reserved slots, so that a CUDA graph needs few phases."""
        return replace(self, wave=DEVICE_WAVE, waves=DEVICE_WAVES, reserve=max(self.reserve, DEVICE_WAVE), joint=True)

    def double_buffered(self) -> Self:
        """Return the entry with waves of two: where copies run beside computation, one slot is filled while one is read."""
        return replace(self, wave=max(self.wave, 2))

    def rules(self, layers: int, slots: int, large: int = 0) -> Rules:
        """Return the numbers `core` works with, for `layers` MoE layers, so many `large` ones among them, and a pool of `slots`."""
        sharing = layers - large
        share = slots // sharing if self.partition == "layer" and slots >= sharing else slots
        least = slots // self.waves if self.waves else 0
        reserve = max(1, min(max(self.reserve, least), slots // 2))
        return Rules(
            retain=self.retain,
            prefetch=self.prefetch != "none",
            threshold=self.threshold,
            reserve=reserve,
            ahead=min(self.ahead, layers),
            rolling=self.prefetch == "layer",
            wraps=self.wraps,
            wave=min(
                max(self.wave, least), share if self.prefetch == "none" else reserve
            ),  # a wave never waits for planned slots
            joint=self.joint,
        )

    def wide_rules(self, layers: int, slots: int, large: int = 0) -> Rules:
        """Return the rules of a pass that needs every expert: each layer's are loaded while the one before runs."""
        planning = replace(self, prefetch="layer", ahead=1, wraps=False, threshold=0.5)
        return planning.rules(layers, slots, large)

    def check_future(self, future: npt.NDArray[np.bool_] | None) -> None:
        """Refuse to run without a recording if the strategy needs one.

        Args:
            future: the recorded routing, or None.

        Raises:
            ConfigError: if there is none and the strategy needs it.
        """
        if self.needs_future and future is None:
            raise ConfigError(
                f"strategy {self.name!r} has to know the run's routing in advance",
                "Replay a recorded trace (`expertflow simulate`), or choose a strategy that needs no recording.",
            )

    def make_forecast(self, setting: Setting) -> Forecast:
        """Make the strategy's forecast.

        Raises:
            ConfigError: if it needs a recording of the run and there is none.
        """
        self.check_future(setting.future)
        return self.forecast(setting)


def _future(setting: Setting) -> npt.NDArray[np.bool_]:
    assert setting.future is not None
    return setting.future


_ENTRIES = (
    Strategy(
        name="on-demand",
        summary="keeps nothing between layers: every needed expert is loaded when its layer runs",
        policy=lru,
        retain=False,
    ),
    Strategy(
        name="lru",
        summary="an equal share of the slots for each layer, evicts the least recently used expert (the paper's Cache-MoE)",
        policy=lru,
        partition="layer",
    ),
    Strategy(name="lru-global", summary="one pool for all layers, evicts the least recently used expert", policy=lru),
    Strategy(
        name="lfu", summary="one pool for all layers, evicts the expert least often used since the start", policy=lfu
    ),
    Strategy(
        name="ring",
        summary="loads whole layers ahead into a ring of slots, whatever is needed (SE-MoE)",
        policy=layer_order,
        forecast=lambda s: LayerOrder(s.layers, s.experts),
        prefetch="layer",
        wraps=True,
    ),
    Strategy(
        name="pregated",
        summary="loads one layer ahead what the next layer's gate predicts; there is no other forecast (Pre-gated MoE)",
        policy=lru,
        forecast=lambda s: NextGate(_future(s), s.gate_recall),
        needs_future=True,
        prefetch="layer",
        ahead=1,
    ),
    Strategy(
        name="next-use",
        summary="no prefetch; evicts the latest expected next use, from faded counts and the place in the layer cycle",
        policy=next_use,
        reads_ahead=True,
    ),
    Strategy(
        name="plec",
        summary="a demand forecast (a trained predictor, else counts by token id) decides slots, prefetch and retention",
        policy=discounted_use,
        forecast=lambda s: CountsByToken(s.layers, s.experts),
        predicted=True,
        prefetch="step",
        threshold=1 / (1 + HIDDEN),  # below it no load ahead pays, whatever it evicts
        reads_ahead=True,
    ),
    Strategy(
        name="oracle-step",
        summary="loads this step's true path ahead wherever there is room; counts decide beyond it",
        policy=next_use,
        forecast=lambda s: Recorded(_future(s)),
        needs_future=True,
        prefetch="step",
    ),
    Strategy(
        name="oracle",
        summary="Belady: knows every later use and evicts the farthest; no policy loads less",
        policy=belady,
        forecast=lambda s: Recorded(_future(s), horizon=None),
        needs_future=True,
    ),
)
STRATEGIES = {entry.name: entry for entry in _ENTRIES}


def find_strategy(name: str) -> Strategy:
    """Look up a strategy by name.

    Raises:
        ConfigError: if there is no such entry; names the nearest.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}", nearest(name, STRATEGIES))
    return STRATEGIES[name]
