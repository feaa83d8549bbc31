"""Loads the model that is served, and says how far that is. Imports torch, so it is itself imported in the worker's thread."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from expertflow.config import EngineConfig
from expertflow.engine.llm import LLM, shipped_model
from expertflow.engine.plan import DEFAULT_CONTEXT, Plan, make_plan
from expertflow.engine.planning.length import SHORTEST, longest
from expertflow.engine.prepare import Prepared, predictor_bytes, predictor_load, prepare
from expertflow.engine.text import end_tokens
from expertflow.errors import ConfigError
from expertflow.limits import free_memory
from expertflow.memory.devices import free_bytes, resolve_device
from expertflow.models.files.checkpoint import resolve
from expertflow.models.places import context_of
from expertflow.models.weights.sources import FileWeights
from expertflow.serve.grammar import Grammars
from expertflow.serve.reading import shaper_of
from expertflow.serve.worker import Loading


def load(model: str | None, options: Mapping[str, Any], loading: Loading, share: float | None = None) -> LLM:
    """Load a model to serve.

    Args:
        model: checkpoint folder, GGUF file or Hugging Face id; None: the shipped model.
        options: fields of `EngineConfig`; without `max_length` the longest that the memory affords is chosen.
        loading: is told how far it is.
        share: of the GPU's memory that `gpu_memory` is; None: `gpu_memory` is in `options`, or there is no budget.

    Raises:
        ExpertFlowError: if model, budget, device or host memory cannot do it.
    """
    transformers_logging.set_verbosity_error()
    loading.phase = "reading"
    folder = resolve(shipped_model() if model is None else model)
    if share is not None:
        options = {**options, "gpu_memory": _bytes_of(share, options.get("device", "auto"))}
    config = EngineConfig.from_mapping(options)
    if config.max_length is None:
        shortest = min(SHORTEST, context_of(folder) or SHORTEST)
        config = _lengthened(config, prepare(folder, replace(config, max_length=shortest)))
    loading.phase, lock = "loading", threading.Lock()

    def watch(count: int, total: int) -> None:
        with lock:
            loading.done, loading.total = loading.done + count, total
            if loading.done >= total:
                loading.phase = "preparing"

    chosen = {**options, "max_length": config.max_length, "kv_tokens": config.kv_tokens}
    llm = LLM(folder, weights=FileWeights(watch), progress=True, **chosen)
    assert llm.chat_params  # a generation config that means nothing is an error now, not at the first request
    loading.shaper = shaper_of(llm)
    loading.grammars = Grammars(llm.tokenizer, llm.plan.shape.vocabulary, end_tokens(llm.model))
    loading.link = llm.link_speed()
    return llm


def _bytes_of(share: float, device: str) -> int:
    chosen = resolve_device(device)
    if chosen.type != "cuda":
        raise ConfigError(
            f"gpu_memory_utilization={share} is a share of a GPU's memory, and the model runs on {chosen}",
            "Leave it out.",
        )
    return int(share * torch.cuda.mem_get_info(chosen)[1])


def _lengthened(config: EngineConfig, prepared: Prepared) -> EngineConfig:
    choices, first = prepared.choices, prepared.plan
    reserved = predictor_bytes(choices.predictor, choices.device, *predictor_load(config))

    def plan_of(changed: EngineConfig) -> Plan:
        return make_plan(
            changed, first.shape, choices.device.type, choices.strategy.name, choices.no_graph, predictor=reserved
        )

    beside = first.total - first.kv
    free = free_memory() - first.host - beside if choices.device.type == "cpu" else free_bytes(choices.device) - beside
    served = longest(plan_of, config, first.shape, DEFAULT_CONTEXT, max(0, free))
    return replace(config, max_length=served.max_length, kv_tokens=served.kv_tokens)
