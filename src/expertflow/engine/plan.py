"""Plan a run: options and a model's figures in, every number of the run out.

It is pure: no weights, no device, nothing allocated. The engine builds from the plan, and `expertflow plan` prints it.
The workspace is an upper bound from tensor sizes; tests compare it with measured peaks (law 3).
"""

from dataclasses import dataclass, replace

from expertflow.config import EngineConfig
from expertflow.errors import BudgetError, ConfigError
from expertflow.formats.dtypes import DTYPES
from expertflow.formats.records import StoreLayout
from expertflow.kernels.residency.state import CacheState
from expertflow.memory.slots import SlotPool
from expertflow.models.shape import ModelShape
from expertflow.schedule.cost import StepPrices
from expertflow.units import format_bytes, parse_bytes, parse_slots

DEFAULT_CONTEXT = 4096
"""Longest sequence planned for when the user states none and the model allows it."""
CUDA_LIBRARY_BYTES = 40 * 2**20
"""cuBLAS keeps 32 MiB in the allocator on an H100 (benchmarks/results/host_execution_h100.json), plus 8 MiB of room."""
GRAPH_POOL_BYTES = 64 * 2**20
"""The allocator takes a graph's memory in blocks of 2 and 20 MiB that it does not give back."""
_WORTH = 0.5
"""Share of the host execution's slots that must remain beside captured steps, for execution='auto' to choose them."""
_SLACK = 1.1
"""Factor on counted temporaries: allocators round up, and operators are counted by name, not by trace."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run. Bytes unless stated otherwise.

    Attributes:
        shape: the model's figures.
        device: `cuda` or `cpu`.
        strategy: name of the strategy.
        budget: the stated budget, or None.
        dense: dense weights on the device.
        kv: keys and values of `max_live` sequences of `max_length` tokens.
        workspace: activations of the largest step, logits and sampling.
        record_bytes: one expert of the layers that slots are for, as it is stored; the largest, if they differ.
        slots: number of slots.
        max_batch: sequences of a step.
        max_live: sequences that have keys and values at once.
        max_length: tokens of a sequence.
        prefill_chunk: tokens of a prefill pass.
        host: the expert store in host memory.
        graph: buffers and captured steps of the graph execution; 0 where the host decides.
        predictor: weights, state and working memory of the predictor, where it is on the device.
        schedule: how live sequences that take turns are grouped: `fifo`, `group` or `auto`.
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
    prefill_chunk: int
    host: int
    schedule: str = "fifo"
    graph: int = 0
    predictor: int = 0
    graph_unavailable_reason: str = ""

    @property
    def execution(self) -> str:
        """`graph` or `host`."""
        return "graph" if self.graph else "host"

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
    def least(self) -> int:
        """The smallest budget for which the same run works, with a single slot."""
        return self.fixed + SlotPool.nbytes(self.slot_layout.record_bytes, 1)

    @property
    def resident_total(self) -> int:
        """Device memory the same run takes with every expert resident."""
        return self.fixed + self.competing * self.slot_layout.record_bytes

    @property
    def share(self) -> float:
        """Share that has a slot of the experts that slots are for."""
        return self.slots / self.competing


def make_plan(
    config: EngineConfig, shape: ModelShape, device: str, strategy: str, no_graph: str = "", *, predictor: int = 0
) -> Plan:
    """Turn options into numbers.

    Args:
        config: the options.
        shape: the model's figures.
        device: `cuda` or `cpu`, resolved.
        strategy: name of the strategy, resolved.
        no_graph: why decode steps cannot run as graphs; empty if they can.
        predictor: bytes a predictor takes where it works; in the host execution that is host memory.

    Raises:
        BudgetError: if the budget cannot hold even one slot, or not the stated slots; names the least that works.
        ConfigError: if an option is impossible for this model.
    """
    if config.execution == "graph" and no_graph:
        raise ConfigError(f"execution='graph' cannot be had: {no_graph}", "Use execution='auto' or 'host'.")
    budget = None if config.gpu_memory is None else parse_bytes(config.gpu_memory, "gpu_memory")
    if config.execution == "graph":
        return _plan(config, shape, device, strategy, budget, graph=True, predictor=predictor)
    preferred = config.execution == "auto" and device == "cuda"
    if not preferred or no_graph:
        return replace(
            _plan(config, shape, device, strategy, budget, graph=False),
            graph_unavailable_reason=no_graph if preferred else "",
        )
    host = _plan(config, shape, device, strategy, budget, graph=False)
    try:
        graph = _plan(config, shape, device, strategy, budget, graph=True, predictor=predictor)
    except BudgetError as error:
        return replace(
            host,
            graph_unavailable_reason=f"the budget holds no captured steps, {format_bytes(error.least_bytes)} would",
        )
    if graph.slots < host.slots * _WORTH:
        return replace(host, graph_unavailable_reason=f"captured steps would leave {graph.slots} of {host.slots} slots")
    return graph


def _plan(  # noqa: PLR0913 - two by keyword
    config: EngineConfig,
    shape: ModelShape,
    device: str,
    strategy: str,
    budget: int | None,
    *,
    graph: bool,
    predictor: int = 0,
) -> Plan:
    max_length = sequence_length(config, shape)
    record_bytes = shape.records.record_bytes
    live = _max_live(config, shape)
    kv = shape.kv_bytes(max_length) * live
    # a recurrent state is not carried from pass to pass, so such a prompt runs in one pass
    chunk = max(config.prefill_chunk, config.max_batch * max_length) if shape.unplanned else config.prefill_chunk
    workspace = workspace_bytes(shape, config.max_batch, max_length, chunk, grouped=graph)
    if graph:  # a step whose routing is observed is the host's
        steps_of_host = workspace_bytes(shape, config.max_batch, max_length, config.max_batch, prompts=False)
        workspace = max(workspace, steps_of_host)
    if device == "cuda":
        workspace += CUDA_LIBRARY_BYTES
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
    fixed = shape.dense_bytes + kv + workspace + captured + for_predictor
    slots = _slots(config, shape, slot_layout(shape, device, graph=graph), fixed, budget)
    return Plan(
        shape=shape,
        device=device,
        strategy=strategy,
        budget=budget,
        dense=shape.dense_bytes,
        kv=kv,
        workspace=workspace,
        record_bytes=record_bytes,
        slots=slots,
        max_batch=config.max_batch,
        max_live=live,
        max_length=max_length,
        prefill_chunk=chunk,
        host=shape.records.store_bytes(shape.experts),
        schedule=config.schedule,
        graph=captured,
        predictor=for_predictor,
    )


def slot_layout(shape: ModelShape, device: str, *, graph: bool) -> StoreLayout:
    """Return what slots hold; see `Plan.slot_layout`."""
    return shape.records.decoded if device == "cpu" and not graph else shape.records


def rates(plan: Plan) -> StepPrices:
    """Return the costs of a step, by which live sequences are grouped. Only the proportions matter."""
    link, memory, fixed, divide = _SPEEDS[plan.device]
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


_SPEEDS = {"cuda": (50e9, 3e12, 1e-3, 4e-3), "cpu": (10e9, 10e9, 1e-3, 4e-3)}
"""Bytes a second over the link and in the device's memory (H100: benchmarks/results/kernels_h100.json; a CPU: a guess),
and fixed seconds of a step and of a division into groups."""


def graph_bytes(shape: ModelShape, rows: int, length: int, device: str) -> int:
    """Return an upper bound on the bytes of decode steps as graphs, beside weights, keys and values, and slots.

    The host execution's workspace is not in it: prompts run while the graphs keep their memory.
    """
    pairs = rows * shape.top_k
    state = CacheState.nbytes(shape.layers, shape.experts, shape.total_experts)
    buffers = pairs * (shape.expert_width * DTYPES[shape.dtype].nbytes + shape.hidden * 4)
    buffers += rows * (shape.vocabulary * DTYPES[shape.dtype].nbytes + 16)
    buffers += shape.layers * (shape.experts + 1) * 4
    buffers += rows.bit_length() * 2 * (min(pairs, shape.experts) + 2) * (pairs + 3) * 4
    if device != "cuda":  # an expert is decoded, and computed in float32; so is a token's attention to its past
        attention = length * (4 * shape.heads * 4 + 2 * max((layer.read_per_token for layer in shape.kv), default=0))
        return state + buffers + shape.records.decode_bytes + 3 * shape.expert_width * shape.hidden * 4 + 2 * attention
    captured = workspace_bytes(shape, rows, length, rows, prompts=False)
    return state + buffers + captured + CUDA_LIBRARY_BYTES + GRAPH_POOL_BYTES


def _max_live(config: EngineConfig, shape: ModelShape) -> int:
    live = config.max_live or config.max_batch
    if live > config.max_batch and not shape.in_rows:
        raise ConfigError(
            f"max_live={live} is more than max_batch={config.max_batch}, and sequences of {shape.model_type!r} cannot take "
            "turns: its keys and values are not kept in rows",
            "Leave max_live out, or raise max_batch as well.",
        )
    return live


def sequence_length(config: EngineConfig, shape: ModelShape) -> int:
    """Return the tokens a sequence has room for: those stated, or what most prompts and answers need.

    Raises:
        ConfigError: if the model's context is shorter than stated.
    """
    if config.max_length is None:
        return min(shape.context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if shape.context is not None and config.max_length > shape.context:
        raise ConfigError(
            f"max_length={config.max_length} is more than the model's context of {shape.context} tokens",
            f"Use {shape.context} or less.",
        )
    return config.max_length


def _slots(config: EngineConfig, shape: ModelShape, layout: StoreLayout, fixed: int, budget: int | None) -> int:
    """The slots, which large layers need none of.

    Raises:
        BudgetError: if the budget holds too little.
    """
    slot_bytes, sharing = layout.record_bytes, shape.layers - len(layout.large)
    total, large = sharing * shape.experts, SlotPool.large_nbytes(layout, shape.experts)
    stated = None if config.slots is None else parse_slots(config.slots, sharing, shape.experts)
    taken = f"dense weights, KV and workspace take {format_bytes(fixed)}, "
    if large:
        taken += (
            f"large layers ({', '.join(map(str, layout.large))}), which are always resident, {format_bytes(large)}, "
        )
    fixed += large
    least = fixed + SlotPool.nbytes(slot_bytes, stated or 1)
    if budget is not None and budget < least:
        need = f"{stated} slots" if stated else "a single slot"
        raise BudgetError(
            f"gpu_memory={format_bytes(budget)} is too small: {taken}and {need} of {format_bytes(slot_bytes)} must fit beside them",
            f"The least that works here is {format_bytes(least)} ({least} bytes); a smaller max_batch, max_length or "
            "prefill_chunk lowers it.",
            least,
        )
    if stated is not None:
        return stated
    if budget is None:
        return total
    return min(total, (budget - fixed - SlotPool.nbytes(slot_bytes, 0)) // slot_bytes)


def workspace_bytes(
    shape: ModelShape, batch: int, length: int, chunk: int, *, prompts: bool = True, grouped: bool = False
) -> int:
    """Return an upper bound on the temporary device memory of one step, bytes.

    The phases of a layer follow one another, so the largest counts; tensors that live through all of them are added.

    Args:
        shape: the model's figures.
        batch: sequences.
        length: tokens of a sequence, prompt included.
        chunk: tokens of a prefill pass over all sequences.
        prompts: whether the step may be one over prompts.
        grouped: whether kernels compute the pass, all tokens of an expert at once and attention without scores in memory.
    """
    element = DTYPES[shape.dtype].nbytes
    tokens = max(chunk, batch)
    if shape.encoder_decoder and prompts:
        tokens = max(tokens, batch * length)  # an encoder reads its prompts whole
    columns = max(1, tokens // batch)
    state = tokens * shape.hidden
    linear = grouped and shape.prompt_kernel
    # residual, normed input, positions, masks and what they are made of
    steady = state * element * 6 + state * 4 * 2 + tokens * 8 * 8
    if not linear:
        steady += batch * columns * length * (2 * element + 8)
    attention = _attention(shape, batch, length, columns, linear=linear)
    return int(_SLACK * (steady + max(attention, _moe(shape, tokens, grouped=grouped), _head(shape, batch))))


def _attention(shape: ModelShape, batch: int, length: int, columns: int, *, linear: bool) -> int:
    element = DTYPES[shape.dtype].nbytes
    tokens = batch * columns
    # queries, keys, values and their rotated copies (in float32 while rotating)
    heads = tokens * shape.head_width * (6 * element + 3 * 4)
    if linear:  # rows are read where they lie; only latents are gathered, and expanded to values and to parts of keys that are joined
        expanded = max(
            (layer.read_per_token for layer in shape.kv if layer.read_per_token > layer.bytes_per_token), default=0
        )
        return heads + (expanded + shape.head_width * element) * batch * length * (expanded > 0)
    # a layer's KV rows of the sequences that step are gathered; keys and values are repeated over grouped heads
    cache = max((layer.read_per_token for layer in shape.kv), default=0) * batch * length
    repeated = 3 * batch * length * shape.head_width * element
    scores = batch * shape.heads * columns * length * (4 if not shape.encoder_decoder and not shape.scores else 16)
    return heads + cache + repeated + scores


def _moe(shape: ModelShape, tokens: int, *, grouped: bool) -> int:
    element = DTYPES[shape.dtype].nbytes
    pairs = tokens * shape.top_k
    router = tokens * shape.experts * 4 * 5
    sorting = pairs * 8 * 6 + pairs * 4 * 2
    dense = tokens * shape.dense_width * element * 4
    if grouped:  # what each pair's expert made, and what lies between its projections; then their sum
        between = pairs * (shape.hidden * 4 + shape.expert_width * element)
        return router + sorting + 2 * tokens * shape.hidden * element + max(between, dense)
    parts = pairs * shape.hidden * element + 3 * tokens * shape.hidden * element
    # one expert may get every token: its input (a copy where token rows are not aligned), inner states, output; weighting them
    expert = tokens * (3 * shape.hidden * element + 4 * shape.expert_width * element + shape.hidden * 4)
    return router + sorting + parts + max(expert + shape.records.decode_bytes, dense)


def _head(shape: ModelShape, batch: int) -> int:
    # logits, their float32 copy, probabilities, sorted values, indices and running sums of one sequence at a time
    return batch * shape.vocabulary * (DTYPES[shape.dtype].nbytes + 8) + shape.vocabulary * 40
