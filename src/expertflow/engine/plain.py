"""`from_pretrained`: an offloaded model as an ordinary transformers model, and what programs may do with it.

A call is refused if dense weights and experts would disagree after it, or if a later pass would fail. Must not know
plans, caches and copies.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertflow.cache.forecast import Forecast
from expertflow.config import EngineConfig, nearest
from expertflow.engine.build import OffloadedModel, load_model
from expertflow.engine.prepare import SHIPPED_MODEL
from expertflow.errors import ConfigError, UnsupportedModelError
from expertflow.execution.passes import unbound
from expertflow.formats.table import FORMATS, Formats
from expertflow.models.experts import Uncopied
from expertflow.models.weights.sources import WeightsSource

ATTENTIONS = ("eager", "sdpa")
"""Attention implementations that were compared with the stock model of the same one."""
_TRAIN = "Train the stock model; this one only runs forward."


def from_pretrained(
    model: str | Path | None = None,
    *,
    forecast: Forecast | None = None,
    attn_implementation: str | None = None,
    weights: WeightsSource | None = None,
    formats: Formats = FORMATS,
    **options: Any,
) -> PreTrainedModel:
    """The ordinary transformers model, its experts offloaded; `.generate()` and everything else work as usual.

    Its logits are those of the stock model with `experts_implementation="eager"`, bit for bit. Plain transformers takes
    grouped experts where that is left out; their sums differ in the last bits. Memory of keys, values and activations
    is then the caller's: `max_batch` and `max_length` state what to keep room for.
    Several threads may call the model: passes run one after the other.

    Args:
        model: checkpoint folder, GGUF file, or Hugging Face id; None: the shipped model.
        forecast: replaces the strategy's own source of expectations, such as a recorded future.
        attn_implementation: `eager` or `sdpa`; None: the family's own, as in transformers.
        weights: where the weights come from (`models.sources`); None: the folder's files.
        formats: how weights may be stored (`formats.table`).
        options: fields of `EngineConfig`.

    Raises:
        ConfigError: for an option that is unknown, of transformers alone, or only of use in `LLM`.
        ExpertFlowError: if model, budget, device or host memory cannot do it; nothing is loaded then.

    Returns:
        The model; its attribute `expertflow` is the `OffloadedModel` (plan, counters, events, `close`).
    """
    config = _plain_config(options)
    if attn_implementation not in (None, *ATTENTIONS):
        raise ConfigError(
            f"attn_implementation={attn_implementation!r} was never compared with the stock model",
            nearest(str(attn_implementation), ATTENTIONS),
        )
    offloaded = load_model(
        SHIPPED_MODEL if model is None else model, config, forecast, weights=weights, formats=formats, own_cache=True
    )
    if attn_implementation is not None:
        try:
            offloaded.model.set_attn_implementation(attn_implementation)
        except ValueError as error:
            offloaded.close()
            raise ConfigError(
                f"attn_implementation={attn_implementation!r} cannot run this family: {str(error).splitlines()[0]}",
                "Leave it out.",
            ) from error
    return make_plain(offloaded)


def _plain_config(options: Mapping[str, Any]) -> EngineConfig:
    """The options of a model whose passes the program calls.

    Raises:
        ConfigError: if they need `LLM`.
    """
    config = EngineConfig.from_mapping({"predictor": "none", **options})
    if config.predictor != "none":
        raise ConfigError(
            f"predictor={config.predictor!r} cannot serve a plain transformers model: which sequence a line of its batch belongs to is unknown",
            "Use LLM, or leave the predictor out.",
        )
    if config.execution == "graph":
        raise ConfigError(
            "execution='graph' cannot run here: the program calls the model, layer by layer",
            "Use `LLM`, or leave the option out.",
        )
    return replace(config, execution="host")


def make_plain(offloaded: OffloadedModel) -> PreTrainedModel:
    """Give a loaded model the class and the guards of a model that a program calls."""
    model = offloaded.model
    for module in {model.base_model, model.get_decoder()} - {model}:
        offloaded.passes.guard(module)
    paths = offloaded.skeleton.expert_modules
    for name, module in model.named_modules():
        below = name and f"{name}."
        inside = tuple(f"{path}.".removeprefix(below) for path in paths if f"{path}.".startswith(below))
        if inside:
            if isinstance(module, PreTrainedModel):
                _change_class(module, offloaded)
            # not bound methods: a module must not keep itself, and with it the expert store, alive
            module._apply = partial(_apply_checked, unbound(module, "_apply"), offloaded)  # noqa: SLF001 - what `to` and the like call
            module.load_state_dict = partial(_load_checked, unbound(module, "load_state_dict"), inside)
    offloaded.let_go_of_model()
    return model


def _change_class(module: PreTrainedModel, offloaded: OffloadedModel) -> None:
    """Make a model, or a part of one that is a model itself, refuse what cannot be done while experts are offloaded."""
    stock: Any = type(module)
    stock = stock.__mro__[1] if module is offloaded.model else stock  # behind the class that was loaded without experts
    own = {"stock": stock, "config_class": stock.config_class, "__module__": stock.__module__}
    module.__class__ = type(stock.__name__, (PlainModel, stock), own)
    module.expertflow = offloaded


class PlainModel(Uncopied, PreTrainedModel):
    """What differs from the stock class, which comes next in the order of bases.

    Attributes:
        stock: that class; making one of this class makes one of that.
        expertflow: plan, counters, events, `close`.
    """

    stock: type[PreTrainedModel]
    expertflow: OffloadedModel

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A stock model: experts are only offloaded by `from_pretrained`."""
        return cls.stock(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - transformers' signature
        """As usual for False.

        Raises:
            UnsupportedModelError: for training.
        """
        if mode:
            _refuse("trained", _TRAIN)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:  # noqa: FBT001, FBT002 - transformers' signature
        """As usual for False: what the model returns is then a constant, such as a teacher's logits.

        Raises:
            UnsupportedModelError: for True.
        """
        if requires_grad:
            _refuse("trained", _TRAIN)
        self.expertflow.passes.frozen = True
        return super().requires_grad_(requires_grad)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, because it is of use in training only."""
        _refuse("trained", _TRAIN)

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name from transformers 5.24 on

    def enable_input_require_grads(self) -> NoReturn:
        """Refused, because it is of use in training only."""
        _refuse("trained", _TRAIN)

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, because the checkpoint folder is there already."""
        _refuse("saved: it holds no experts, so they would be lost", "Copy the checkpoint folder.")

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as `save_pretrained` is."""
        _refuse("saved: it holds no experts, so they would be lost", "Push the checkpoint folder.")

    def set_experts_implementation(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, because experts come through the slots and nothing else can compute them."""
        _refuse(
            "given another experts implementation",
            "Its experts have the bits of 'eager'; load the stock model for any other.",
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The dense weights. Warns once that the experts are not among them."""
        if "destination" not in kwargs and not getattr(self, "_warned", False):  # not as a part of another's
            self._warned = True
            warnings.warn(
                "state_dict() of an offloaded model holds its dense weights only; the experts are in the checkpoint.",
                stacklevel=2,
            )
        return super().state_dict(*args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:  # noqa: FBT001, FBT002 - transformers' signature
        """As of the stock model: experts count, but never as trainable."""
        own: int = super().num_parameters(only_trainable, exclude_embeddings)
        offloaded = self.expertflow
        shape, mine = offloaded.plan.shape, set(self.modules())
        layers = sum(offloaded.model.get_submodule(path) in mine for path in offloaded.skeleton.expert_modules)
        return own if only_trainable else own + layers * shape.experts * sum(prod(spec.shape) for spec in shape.specs)


def _refuse(what: str, remedy: str) -> NoReturn:
    raise UnsupportedModelError(f"an offloaded model cannot be {what}", remedy)


def _apply_checked(
    apply: Callable[..., nn.Module], offloaded: OffloadedModel, change: Callable[[Tensor], Tensor], **options: Any
) -> nn.Module:
    """In place of `Module._apply`: what `to`, `half`, `cuda` and the like do, if dtype and device stay.

    Raises:
        UnsupportedModelError: if they would not.
    """
    dtype, device = getattr(torch, offloaded.skeleton.dtype), offloaded.model.device
    try:
        changed = change(torch.empty(1, dtype=dtype, device=device))
        wanted = f"{changed.dtype} on {changed.device}".removeprefix("torch.")
        same = (changed.dtype, changed.device) == (dtype, device)
    except (RuntimeError, AssertionError) as error:  # torch cannot make such a tensor here
        wanted, same = str(error).splitlines()[0], False
    if not same:
        _refuse(
            f"converted or moved: its experts are {offloaded.skeleton.dtype} on {device}, wanted: {wanted}",
            "Call `from_pretrained` again with `dtype=` and `device=`; `model.expertflow.close()` gives memory back.",
        )
    return apply(change, **options)


def _load_checked(
    load: Callable[..., Any], inside: tuple[str, ...], state_dict: Mapping[str, Any], *args: Any, **options: Any
) -> Any:
    """In place of `Module.load_state_dict`: dense weights are copied in, experts are refused.

    Raises:
        UnsupportedModelError: if the state has weights of experts, or is to be assigned instead of copied.
    """
    if experts := [key for key in state_dict if key.startswith(inside)]:
        _refuse(
            f"given other experts: the state has {len(experts)} tensors of them, first {experts[0]!r}",
            "Load a checkpoint folder with these weights, or leave the experts out of the state.",
        )
    if options.get("assign") or (len(args) > 1 and args[1]):
        _refuse("given other tensors in place of its own", "Leave `assign` out: values are then copied.")
    return load(state_dict, *args, **options)
