"""Plan a run: options and a model's figures in, every number of the run out.

It is pure: no weights, no device, nothing allocated. The engine builds from the plan, and `expertflow plan` prints it.
What a step and keys and values take: `engine.planning`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from expertflow.config import EngineConfig
from expertflow.engine.planning.kv import Sequences, max_live, plan_kv
from expertflow.engine.planning.pass_size import (
    ALL_RESIDENT,
    SMALLEST,
    PassWork,
    largest_pass,
    longest_pass,
    pace_of,
    pass_tokens,
    token_flops,
)
from expertflow.engine.planning.prefix import PrefixPlan, buffer_bytes, plan_prefix
from expertflow.engine.planning.slots import least_slots, plan_slots
from expertflow.engine.planning.speeds import SPEEDS, pass_speeds
from expertflow.engine.planning.workspace import CUDA_LIBRARY_BYTES, graph_bytes, workspace_bytes
from expertflow.errors import BudgetError, ConfigError
from expertflow.execution.kv.layout import PAGE, Layout, pages_of
from expertflow.formats.records import StoreLayout
from expertflow.memory.slots import SlotPool
from expertflow.models.shape import ModelShape
from expertflow.schedule.cost import StepPrices
from expertflow.schedule.portions import Pace
from expertflow.units import format_bytes, parse_bytes

DEFAULT_CONTEXT = 4096
"""Longest sequence planned for when the user states none and the model allows it."""
_ROUNDS = 8
"""Sizes of a pass that are tried at most."""
_WORTH = 0.5
"""Share of the host execution's slots that must remain beside captured steps, for execution='auto' to choose them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run. Bytes unless stated otherwise.

    Attributes:
        shape: the model's figures.
        device: `cuda` or `cpu`.
        strategy: name of the strategy.
        budget: the stated budget, or None.
        dense: dense weights on the device.
        kv: keys and values of `kv_tokens` tokens, and tables of their pages.
        workspace: activations of the largest step, logits and sampling.
        record_bytes: one expert of the layers that slots are for, as it is stored; the largest, if they differ.
        slots: number of slots.
        max_batch: sequences of a step.
        max_live: sequences that have keys and values at once.
        max_length: tokens of a sequence.
        kv_tokens: tokens of keys and values of all live sequences together.
        prefill_chunk: tokens of a prefill pass.
        host: the expert store in host memory.
        prefix: keys and values of earlier prompts in host memory.
        prefix_unavailable_reason: why prefix_memory='auto' is none; empty otherwise.
        graph: buffers and captured steps of the graph execution; 0 where the host decides.
        predictor: weights, state and working memory of the predictor, where it is on the device.
        schedule: how live sequences that take turns are grouped: `fifo`, `group` or `auto`.
        least: the smallest budget for which the same options work: with a single slot, the least keys and values, and the least tokens a pass.
        kv_layout: how keys and values lie in pages; None: they lie in rows, or in the model's own cache.
        batch_invariant: whether no bit of an answer depends on other requests.
        paced: whether passes over prompts become smaller behind long contexts, so that others do not wait longer than for copies.
        graph_unavailable_reason: why execution='auto' fell back to the host; empty otherwise.
    """

    shape: ModelShape
    device: str
    strategy: str
    budget: int | None
    dense: int
    kv: int
    workspace: int
    record_bytes: int
    slots: int
    max_batch: int
    max_live: int
    max_length: int
    kv_tokens: int
    prefill_chunk: int
    host: int
    prefix: int = 0
    prefix_unavailable_reason: str = ""
    schedule: str = "fifo"
    graph: int = 0
    predictor: int = 0
    least: int = 0
    kv_layout: Layout | None = None
    batch_invariant: bool = False
    paced: bool = False
    graph_unavailable_reason: str = ""

    @property
    def execution(self) -> str:
        """`graph` or `host`."""
        return "graph" if self.graph else "host"

    @property
    def prefix_piece(self) -> int:
        """Tokens of a block of a prompt that is kept: a page, or a whole pass where the size of passes must not change a bit."""
        return self.prefill_chunk if self.batch_invariant else PAGE

    @property
    def prompt_attention(self) -> str:
        """What computes attention of passes over prompts: `kernel`, in memory linear in length, or the `model` itself."""
        return "kernel" if self.graph and self.shape.prompt_kernel else "model"

    @property
    def slot_layout(self) -> StoreLayout:
        """What slots hold: records as they are stored; where the host computes on a CPU, experts decoded once when they are loaded."""
        return slot_layout(self.shape, self.device, graph=self.execution == "graph")

    @property
    def slot_bytes(self) -> int:
        """Device memory of all slots, without large layers."""
        return SlotPool.nbytes(self.slot_layout.record_bytes, self.slots)

    @property
    def unequal_bytes(self) -> tuple[int, ...]:
        """Bytes of one record of each layer; empty if all have `record_bytes`."""
        return () if self.shape.records.equal else self.shape.records.layer_bytes

    @property
    def least_load(self) -> int:
        """Bytes that a load moves at least."""
        large = self.slot_layout.large
        return min(size for layer, size in enumerate(self.shape.records.layer_bytes) if layer not in large)

    @property
    def large(self) -> int:
        """Device memory of large layers, whose experts are always resident."""
        return SlotPool.large_nbytes(self.slot_layout, self.shape.experts)

    @property
    def competing(self) -> int:
        """Experts that slots are for: all but those of large layers."""
        return self.shape.total_experts - len(self.slot_layout.large) * self.shape.experts

    @property
    def fixed(self) -> int:
        """Device memory of everything but the slots."""
        return self.dense + self.kv + self.workspace + self.graph + self.predictor + self.large

    @property
    def total(self) -> int:
        """Device memory of the whole run."""
        return self.fixed + self.slot_bytes

    @property
    def resident_total(self) -> int:
        """Device memory the same run takes with every expert resident."""
        return self.fixed + self.competing * self.slot_layout.record_bytes

    @property
    def share(self) -> float:
        """Share that has a slot of the experts that slots are for."""
        return self.slots / self.competing

    @property
    def pass_work(self) -> PassWork:
        """What a pass over prompts copies, if it uses every expert, and computes for each token."""
        large = self.slot_layout.large
        sizes = [size for layer, size in enumerate(self.shape.records.layer_bytes) if layer not in large]
        return PassWork((self.competing - self.slots) * sum(sizes) // max(1, len(sizes)), token_flops(self.shape))

    @property
    def copies_seconds(self) -> float | None:
        """What the copies of a pass over prompts take alone; None on a CPU, where nothing is known of it."""
        return self.pass_work.copied / pass_speeds(self.shape).link if self.device == "cuda" else None

    @property
    def pace(self) -> Pace | None:
        """How passes over prompts become smaller behind long contexts while sequences wait; None: all have `prefill_chunk` tokens."""
        return self._pace if self.paced else None

    @property
    def _pace(self) -> Pace:
        return pace_of(self.shape, self.pass_work, pass_speeds(self.shape), self.prefill_chunk)

    @property
    def stall_seconds(self) -> float | None:
        """How long a pass over prompts keeps other sequences waiting at most, behind a longest prompt; None as of `copies_seconds`."""
        copies = self.copies_seconds
        if copies is None:
            return None
        return longest_pass(self._pace, copies, self.prefill_chunk, self.max_length, bounded=self.paced)


class _Wanted(NamedTuple):
    """What a plan is made from; `predictor` is bytes."""

    config: EngineConfig
    shape: ModelShape
    device: str
    strategy: str
    budget: int | None
    graph: bool
    predictor: int = 0
    prefix: PrefixPlan = PrefixPlan(0)


def make_plan(  # noqa: PLR0913 - the last ones by keyword
    config: EngineConfig,
    shape: ModelShape,
    device: str,
    strategy: str,
    no_graph: str = "",
    *,
    predictor: int = 0,
    no_prefix: str = "",
) -> Plan:
    """Turn options into numbers.

    Args:
        config: the options.
        shape: the model's figures.
        device: `cuda` or `cpu`, resolved.
        strategy: name of the strategy, resolved.
        no_graph: why decode steps cannot run as graphs; empty if they can.
        predictor: bytes a predictor takes where it works; in the host execution that is host memory.
        no_prefix: why no beginning of a prompt can be used again; empty if it can.

    Raises:
        BudgetError: if the budget cannot hold even one slot, or not the stated slots; names the least that works.
        ConfigError: if an option is impossible for this model.
    """
    if config.execution == "graph" and no_graph:
        raise ConfigError(f"execution='graph' cannot be had: {no_graph}", "Use execution='auto' or 'host'.")
    budget = None if config.gpu_memory is None else parse_bytes(config.gpu_memory, "gpu_memory")
    prefix = plan_prefix(config, shape, sequence_length(config, shape), no_prefix)
    host = _Wanted(config, shape, device, strategy, budget, graph=False, prefix=prefix)
    plan = _chosen(host, host._replace(graph=True, predictor=predictor), no_graph)
    if config.batch_invariant and plan.execution == "host":
        reason = no_graph or plan.graph_unavailable_reason or "this is host execution"
        raise ConfigError(
            f"batch_invariant cannot be had: {reason}", "Use execution='graph', or leave batch_invariant out."
        )
    return plan


def _chosen(host: _Wanted, captured: _Wanted, no_graph: str) -> Plan:
    """The plan of the stated execution, or of the one that 'auto' takes."""
    config, device = host.config, host.device
    if config.execution == "graph":
        return _sized(captured)
    preferred = config.execution == "auto" and device == "cuda"
    if not preferred or no_graph:
        return replace(_sized(host), graph_unavailable_reason=no_graph if preferred else "")
    found: list[Plan | BudgetError] = []
    for wanted in (host, captured):
        try:
            found.append(_sized(wanted))
        except BudgetError as error:
            found.append(error)
    return _better(*found)


def _better(host: Plan | BudgetError, graph: Plan | BudgetError) -> Plan:
    """What execution='auto' takes: captured steps, unless they leave too few slots.

    Raises:
        BudgetError: if the budget holds neither, by the smaller need.
    """
    if isinstance(host, BudgetError):  # such as the scores of long prompts, which a kernel needs no memory for
        if isinstance(graph, BudgetError):
            raise min(host, graph, key=lambda error: error.least_bytes)
        return graph
    if isinstance(graph, BudgetError):
        reason = f"the budget holds no captured steps, {format_bytes(graph.least_bytes)} would"
        return replace(host, graph_unavailable_reason=reason)
    least = min(host.least, graph.least)
    if graph.slots < host.slots * _WORTH:
        return replace(
            host,
            least=least,
            graph_unavailable_reason=f"captured steps would leave {graph.slots} of {host.slots} slots",
        )
    return replace(graph, least=least)


def _sized(wanted: _Wanted) -> Plan:
    """The plan with the stated tokens a pass, or with those that the plan asks for itself.

    More tokens leave fewer slots, and fewer slots ask for more tokens: sizes grow from the smallest one until that ends.
    """
    config, shape, device, _, budget, graph, *_ = wanted
    length = sequence_length(config, shape)
    # no pass has more tokens than its prompts, nor more than are kept
    together = length if config.batch_invariant else config.max_batch * length
    if config.kv_tokens is not None:
        together = min(together, pages_of(config.kv_tokens, PAGE) * PAGE)
    if config.prefill_chunk is not None:
        found = _plan(wanted, min(config.prefill_chunk, together))
        return replace(_kept(wanted, found), least=found.least)
    one = pages_of(length, PAGE) * PAGE if config.kv_tokens is None and None in shape.windows else SMALLEST
    smallest = _plan(wanted, min(SMALLEST, together, one))
    found = _grown(wanted, smallest, min(SMALLEST, together))
    if device != "cuda" or shape.unplanned or shape.encoder_decoder:  # the last two read prompts whole
        return found
    memory = None if budget is None else (budget, smallest.least)
    if memory is None and not (graph and shape.prompt_kernel):  # scores are kept, and nothing bounds their memory
        together = min(together, ALL_RESIDENT)
    limit = largest_pass(lambda chunk: _workspace(config, shape, length, chunk, graph=graph), memory, together)
    for _ in range(_ROUNDS):
        before, tokens = found, pass_tokens(found.pass_work, pass_speeds(found.shape), limit)
        found = _grown(wanted, before, tokens)
        if found is before:
            break
    return replace(found, paced=shape.in_rows and not config.batch_invariant)


def _kept(wanted: _Wanted, plan: Plan) -> Plan:
    """The plan, or one with smaller passes where fewer tokens are kept than a pass may have: a pass keeps all of its tokens."""
    bounded = None in plan.shape.windows and plan.kv_tokens < plan.prefill_chunk
    return _plan(wanted, plan.kv_tokens) if bounded else plan


def _grown(wanted: _Wanted, plan: Plan, tokens: int) -> Plan:
    """The plan with passes of more tokens, as far as they are kept; itself where that is not more, or the budget holds no such plan."""
    if tokens <= plan.prefill_chunk:
        return plan
    try:
        found = _kept(wanted, _plan(wanted, tokens))
    except BudgetError:  # also by pages of windows, which grow with the pass
        return plan
    return replace(found, least=plan.least) if found.prefill_chunk > plan.prefill_chunk else plan


def _plan(wanted: _Wanted, chunk: int) -> Plan:
    """The plan with passes of `chunk` tokens."""
    config, shape, device, strategy, budget, graph, predictor, prefix = wanted
    max_length = sequence_length(config, shape)
    live = max_live(config, shape)
    if shape.unplanned:  # a recurrent state is not carried from pass to pass, so such a prompt runs in one pass
        chunk = max(chunk, config.max_batch * max_length)
    workspace = _workspace(config, shape, max_length, chunk, graph=graph)
    if device == "cuda":
        workspace += CUDA_LIBRARY_BYTES + (buffer_bytes(shape) if prefix.nbytes else 0)
    if budget is not None and shape.unplanned:
        raise ConfigError(
            f"gpu_memory={format_bytes(budget)} cannot be promised: the memory of {', '.join(shape.unplanned)} layers of "
            f"{shape.model_type!r} is not planned",
            "Leave the budget out and state slots.",
        )
    captured = graph_bytes(shape, config.max_batch, max_length, device) if graph else 0
    for_predictor = (
        predictor + CUDA_LIBRARY_BYTES if predictor and graph and device == "cuda" else 0
    )  # on a stream of its own
    beside, layout = shape.dense_bytes + workspace + captured + for_predictor, slot_layout(shape, device, graph=graph)
    left = None if budget is None else budget - beside - least_slots(config, shape, layout)
    kv = plan_kv(config, shape, Sequences(live, max_length, chunk), left)
    slots = plan_slots(config, shape, layout, beside + kv.nbytes, budget)
    return Plan(
        shape=shape,
        device=device,
        strategy=strategy,
        budget=budget,
        dense=shape.dense_bytes,
        kv=kv.nbytes,
        workspace=workspace,
        record_bytes=shape.records.record_bytes,
        slots=slots,
        max_batch=config.max_batch,
        max_live=live,
        max_length=max_length,
        kv_tokens=kv.tokens,
        prefill_chunk=chunk,
        host=shape.records.store_bytes(shape.experts),
        prefix=prefix.nbytes,
        prefix_unavailable_reason=prefix.reason,
        schedule=config.schedule,
        batch_invariant=config.batch_invariant,
        graph=captured,
        predictor=for_predictor,
        least=beside
        + kv.least
        + SlotPool.nbytes(layout.record_bytes, 1)
        + SlotPool.large_nbytes(layout, shape.experts),
        kv_layout=kv.layout,
    )


def _workspace(config: EngineConfig, shape: ModelShape, length: int, chunk: int, *, graph: bool) -> int:
    """Workspace of the largest of all passes and steps, without cuBLAS."""
    linear = graph and shape.prompt_kernel
    return workspace_bytes(shape, config.max_batch, length, chunk, grouped=graph, linear=linear)


def slot_layout(shape: ModelShape, device: str, *, graph: bool) -> StoreLayout:
    """Return what slots hold; see `Plan.slot_layout`."""
    return shape.records.decoded if device == "cpu" and not graph else shape.records


def rates(plan: Plan) -> StepPrices:
    """Return the costs of a step, by which live sequences are grouped. Only the proportions matter."""
    link, memory, fixed, divide = SPEEDS[plan.device]
    records, large = plan.shape.records, plan.slot_layout.large
    load = tuple(size / link for size in records.layer_bytes)
    return StepPrices(
        slots=plan.slots,
        load=load if large or not records.equal else load[0],
        large=large,
        step=fixed + plan.dense / memory,
        expert=sum(records.layer_bytes) / len(records.layers) / memory,
        divide=divide,
    )


def sequence_length(config: EngineConfig, shape: ModelShape) -> int:
    """Return the tokens a sequence has room for: those stated, or what most prompts and answers need.

    Raises:
        ConfigError: if the model's context is shorter than stated.
    """
    if config.max_length is None:
        return min(shape.context or DEFAULT_CONTEXT, DEFAULT_CONTEXT, config.kv_tokens or DEFAULT_CONTEXT)
    if shape.context is not None and config.max_length > shape.context:
        raise ConfigError(
            f"max_length={config.max_length} is more than the model's context of {shape.context} tokens",
            f"Use {shape.context} or less.",
        )
    return config.max_length
