"""Whether a model's decode steps can be captured, and what its experts are for the kernels. Pure questions: nothing runs.

Must not know slots, steps and streams.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import Strategy
from expertflow.errors import UnsupportedModelError
from expertflow.execution.rope import by_length
from expertflow.formats.records import ExpertStore, StoreLayout
from expertflow.kernels.backend import backend
from expertflow.kernels.mlp import MAX_PAIRS, ExpertMlp
from expertflow.kernels.residency.state import refusal
from expertflow.models.skeleton import Skeleton
from expertflow.triton_support import HAS_TRITON

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""The kernels' names of transformers' activations."""


def expert_mlps(skeleton: Skeleton, records: StoreLayout) -> tuple[ExpertMlp, ...]:
    """The kernels' description of the experts of each MoE layer.

    Raises:
        ValueError: if they are no MLP that the kernels support.
    """
    assert skeleton.family is not None
    module = skeleton.model.get_submodule(skeleton.expert_modules[0])
    config = skeleton.config.get_text_config(decoder=True)
    name = str(getattr(config, "hidden_act", None) or getattr(config, "dense_act_fn", ""))
    activation = skeleton.family.activation or _ACTIVATIONS.get(name, name)
    transposed = bool(getattr(module, "is_transposed", False))  # the registry's attribute; Switch's experts have none
    interleaved = not getattr(module, "is_concatenated", True)
    made = {
        key: ExpertMlp.of(layout, activation, transposed=transposed, interleaved=interleaved)
        for key, layout in records.distinct.items()
    }
    return tuple(made[id(layout)] for layout in records.layers)


def stored_mlps(skeleton: Skeleton, store: ExpertStore) -> tuple[ExpertMlp, ...]:
    """The same for records that are filled: kernels decode a layer's by the shortest way that is right for all of them.

    Layers that are read alike share one.
    """
    experts = skeleton.experts

    def of_layer(layer: int, mlp: ExpertMlp) -> ExpertMlp:
        return mlp.for_records([store.record(layer * experts + expert) for expert in range(experts)])

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(of_layer, *zip(*enumerate(expert_mlps(skeleton, store.layout)), strict=True)))
    shared = {mlp: mlp for mlp in made}
    return tuple(shared[mlp] for mlp in made)


def graph_refusal(  # noqa: PLR0913 - the last ones by keyword
    skeleton: Skeleton,
    records: StoreLayout,
    strategy: Strategy,
    device: str,
    *,
    rows: int,
    forecast: Forecast | None = None,
    predicted: bool = False,
) -> str:
    """Why decode steps cannot run as graphs; empty if they can.

    Args:
        skeleton: the model.
        records: how its experts are stored.
        strategy: entry of the strategy table.
        device: `cuda` or `cpu`.
        rows: sequences that step together at most.
        forecast: the caller's own, which replaces the strategy's.
        predicted: whether a trained predictor does.
    """
    if device == "cuda" and not HAS_TRITON:
        return "Triton is not installed"
    if unread := _unread(records, device):
        return unread
    if rows * skeleton.top_k > MAX_PAIRS:
        return f"{rows} sequences of {skeleton.top_k} experts a layer are more than the {MAX_PAIRS} pairs a step's kernels take"
    # a caller's class may not have this attribute
    if forecast is not None and not getattr(forecast, "foreknown", False):
        return "the forecast is the caller's own and goes by the facts of steps, which only the host has"
    given = predicted or forecast is not None
    return refusal(strategy.on_device(), given=given) or _model_refusal(skeleton, records)


def _unread(records: StoreLayout, device: str) -> str:
    """Why the kernels do not read the records; empty if they do."""
    for spec in {spec for layout in records.distinct.values() for spec in layout.specs}:
        if not backend(torch.device(device)).reads(spec.format):
            return f"there is no tile loader for experts stored as {spec.format.name}"
        try:
            spec.format.constants(spec)
        except UnsupportedModelError as error:
            return error.what
    return ""


def _model_refusal(skeleton: Skeleton, records: StoreLayout) -> str:
    if skeleton.family is None:
        return f"{skeleton.config.model_type!r} has no entry in the table of families"
    if skeleton.family.no_graph:
        return f"{skeleton.family.title}: {skeleton.family.no_graph}"
    if any(by_length(module) for module in skeleton.model.modules()):
        return "its rotary table depends on each sequence's length, which the host looks up"
    try:
        expert_mlps(skeleton, records)
    except ValueError as error:
        return str(error)
    return ""
