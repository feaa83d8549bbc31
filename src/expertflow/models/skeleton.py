"""A model built from its config alone, on the meta device, with its experts found and emptied.

Everything later steps need to know about a checkpoint's model comes from here: which modules hold experts, what one
expert's tensors are, which class loads the rest. Reads no weights.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from expertflow.errors import CheckpointError, UnsupportedModelError
from expertflow.formats.dtypes import run_dtype
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.table import FORMATS, Formats
from expertflow.models.attention import EMPTY, STATE_ONLY, layer_kinds
from expertflow.models.bounds import check_config, describing
from expertflow.models.experts import is_registry_experts, offload
from expertflow.models.families import FAMILIES, READ_AS, REFUSED, Family
from expertflow.models.files.checkpoint import StoredTensor, read_json
from expertflow.models.gguf.header import is_gguf
from expertflow.models.places import described_by, raw_config, walk
from expertflow.models.refusals import LISTED, no_experts, not_text, refuse_quantised
from expertflow.models.switch import SwitchExperts, mark_switch_experts, swapped_switch_experts

_MODELOPT = "modelopt"
"""The method of checkpoints with a file of its description, `hf_quant_config.json`."""


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model without weights.

    Attributes:
        folder: the checkpoint folder, or a GGUF file.
        config: its parsed config; of the text part, where the folder's config holds one that runs by itself.
        model_class: the transformers class, with experts that hold no parameters.
        model: an instance on the meta device.
        family: its entry in the table, or None for a family that runs by the universal fallback.
        expert_modules: module path of each MoE layer's experts, in order of execution.
        experts: experts a layer.
        top_k: experts a token uses in a layer.
        specs: the tensors of one expert as the module computes with them, plain numbers of `dtype`.
        dtype: dtype the model will run in.
        dtype_source: where that comes from, as the beginning of a sentence.
        packed: the formats that some of its weights are stored in, as its config states.
        expert_format: the format that plain experts are quantised to while they are loaded; None: they stay as they are stored.
        notes: remarks for the user on how it runs, one sentence each.
    """

    folder: Path
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    model: PreTrainedModel
    family: Family | None
    expert_modules: tuple[str, ...]
    experts: int
    top_k: int
    specs: tuple[TensorSpec, ...]
    dtype: str
    dtype_source: str = "the config says"
    packed: tuple[Format, ...] = ()
    expert_format: Format | None = None
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> str:
        """How the model is not the checkpoint's; empty if it is."""
        if self.expert_format is None:
            return ""
        return f"experts are quantised to {self.expert_format.name} on loading: the model's answers change"

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder."""
        return bool(self.config.is_encoder_decoder)

    @property
    def reread_length(self) -> int | None:
        """Tokens at which a growing sequence is read from its beginning again, as transformers does; None: never."""
        key = self.family.rereads_beyond if self.family is not None else ""
        beyond = getattr(self.config, key, None) if key else None
        return None if beyond is None else int(beyond) + 1

    @property
    def reached(self) -> tuple[bool, ...]:
        """For each expert module, whether a decode step runs it: an encoder's are left alone."""
        return tuple("encoder" not in path.split(".") for path in self.expert_modules)


def build_skeleton(folder: Path, dtype: str, formats: Formats = FORMATS) -> Skeleton:
    """Read the config, build the model on the meta device, find and empty its experts.

    Args:
        folder: checkpoint folder, or a GGUF file.
        dtype: dtype to run in, or `auto` for the one the config states (if it states none, that of most experts).
        formats: how weights may be stored.

    Raises:
        CheckpointError: if the config cannot be read.
        UnsupportedModelError: if the model is no MoE, is stored in no known format, needs remote code, or its experts cannot be
            run exactly.
    """
    whole = _read_config(folder)
    base_class = _model_class(folder, whole)
    config, notes = _text_part(whole, base_class)
    packed = _packed_formats(folder, (whole, config), formats)
    model_class = _emptied_class(base_class)
    with describing(described_by(folder), "describes no model that can be built"), torch.device("meta"):
        model = model_class(config)
    found = {path: module for path, module in model.named_modules() if _is_experts(module)}
    if not found:
        raise no_experts(folder, config, model)
    _check_layers(folder, config)
    experts, top_k, shapes, transposed = _experts_alike(folder, config, list(found.values()))
    stated = config.dtype or whole.dtype
    runs_in = str(stated).removeprefix("torch.") if dtype == "auto" else dtype
    if dtype == "auto" and stated is None:
        runs_in = _stored_dtype(walk(folder), packed)
        notes = (*notes, f"config.json states no dtype: it runs in {runs_in}, the dtype of most expert weights")
    return Skeleton(
        folder=folder,
        config=config,
        model_class=model_class,
        model=model,
        family=FAMILIES.get(config.model_type),
        expert_modules=tuple(found),
        experts=experts,
        top_k=top_k,
        specs=tuple(plain(name, shape, runs_in, transposed=transposed) for name, shape in shapes),
        dtype=runs_in,
        packed=packed,
        dtype_source="most expert weights are" if dtype == "auto" and stated is None else "the config says",
        notes=notes,
    )


def _check_layers(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a model of which transformers' own forward needs an attention layer, and that has none.

    Raises:
        CheckpointError: if the config describes layers that the model's own code cannot run.
        UnsupportedModelError: if no layer is one of attention.
    """
    with describing(described_by(folder), f"describes attention layers that {config.model_type!r} cannot run"):
        kinds = set() if config.is_encoder_decoder else set(layer_kinds(config.get_text_config(decoder=True)))
    if kinds and kinds <= STATE_ONLY | EMPTY:
        raise UnsupportedModelError(
            f"no layer of {config.model_type!r} in {folder} is one of attention, and transformers' own forward needs one",
            "Correct `layer_types` in config.json, or fetch it again.",
        )


def _experts_alike(
    folder: Path, config: PreTrainedConfig, modules: list[nn.Module]
) -> tuple[int, int, tuple[tuple[str, tuple[int, ...]], ...], bool]:
    """Experts a layer, experts a token, name and shape of one expert's tensors, and whether they are input-major.

    Raises:
        CheckpointError: if a token cannot be routed to so many experts.
        UnsupportedModelError: if layers differ.
    """
    counts, top_k = {int(module.num_experts) for module in modules}, _top_k(config)  # type: ignore[arg-type]
    if not 1 <= top_k <= max(counts):
        raise CheckpointError(
            f"{described_by(folder)} routes a token to {top_k} of {max(counts)} experts", "Fetch the config again."
        )
    shapes = {(_shapes(module), bool(getattr(module, "is_transposed", False))) for module in modules}
    if len(shapes) != 1 or len(counts) != 1:
        raise UnsupportedModelError(
            f"the MoE layers of {config.model_type!r} have experts of different sizes",
            "Only equal sizes are supported.",
        )
    named, transposed = shapes.pop()
    return counts.pop(), top_k, named, transposed


def _read_config(folder: Path) -> PreTrainedConfig:
    raw = raw_config(folder)
    check_config(described_by(folder), raw)
    try:
        with describing(described_by(folder), "cannot be used"):
            if is_gguf(folder):
                return AutoConfig.for_model(**raw)
            if family := READ_AS.get(str(raw.get("model_type"))):
                return CONFIG_MAPPING[family].from_dict({**raw, "model_type": family})
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except CheckpointError as error:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{folder} would run code of its own (auto_map), which is never done",
                "Use a checkpoint of a family that transformers itself knows.",
            ) from error
        if "model_type" not in raw or "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"model_type {raw.get('model_type')!r} is unknown to transformers", LISTED
            ) from error
        raise


def _packed_formats(folder: Path, configs: tuple[PreTrainedConfig, ...], formats: Formats) -> tuple[Format, ...]:
    """The formats of a quantised checkpoint. Deletes the configs' entry for them, so the model is built as if decoded.

    Raises:
        UnsupportedModelError: if no format of the table claims it. Several do where weights are stored in several ways.
    """
    quantization = _quantization(folder, configs)
    if not quantization:
        return ()
    about = quantization if isinstance(quantization, Mapping) else {}
    found = tuple(format_ for one in formats.values() for format_ in one.claim(about))
    if not found:
        refuse_quantised(folder, quantization)
    for config in configs:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return found


def _quantization(folder: Path, configs: tuple[PreTrainedConfig, ...]) -> Any:
    """A checkpoint's description of its quantisation, in a config or in a file of its own; empty if none.

    Where a config names modelopt and no more, its file says the rest.
    """
    found = [getattr(config, "quantization_config", None) for config in configs]
    about = next((one for one in found if one), None)
    own_file = folder / "hf_quant_config.json"
    if not own_file.is_file() or (isinstance(about, Mapping) and about.get("quant_method") != _MODELOPT):
        return about
    written = read_json(own_file).get("quantization")
    return {
        **(written if isinstance(written, Mapping) else {}),
        **(about if isinstance(about, Mapping) else {"quant_method": _MODELOPT}),
    }


def _model_class(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if config.model_type in REFUSED:
        raise UnsupportedModelError(f"{config.model_type!r} cannot be run: {REFUSED[config.model_type]}", LISTED)
    try:
        found = mapping[type(config)]
    except KeyError as error:
        raise not_text(folder, config) from error
    return found[0] if isinstance(found, tuple) else found


def _text_part(
    config: PreTrainedConfig, model_class: type[PreTrainedModel]
) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The config its text-generating class is built from, and a note if that is a part of the whole.

    Some configs hold one of a text model beside others; transformers' AutoModelForCausalLM takes that part then.
    """
    if model_class.config_class is not config.sub_configs.get("text_config"):
        return config, ()
    note = f"of this {config.model_type!r} checkpoint the text part runs; its other parts are left out"
    return config.get_text_config(), (note,)


def _stored_dtype(tensors: Mapping[str, StoredTensor], packed: tuple[Format, ...]) -> str:
    """The float dtype of most expert elements of a checkpoint; of all elements if no name contains `expert`.

    Parts of packed tensors, such as scales, do not count.
    """
    plain_ones = {
        key: tensor for key, tensor in tensors.items() if not any(one.split_key(key, tensor.dtype) for one in packed)
    }
    floats = {key: tensor for key, tensor in plain_ones.items() if run_dtype(tensor.dtype)}
    chosen = {key: tensor for key, tensor in floats.items() if ".experts." in key} or floats
    elements = Counter[str]()
    for tensor in chosen.values():
        elements[str(run_dtype(tensor.dtype))] += prod(tensor.shape)
    return elements.most_common(1)[0][0] if elements else "float32"


def _is_experts(module: nn.Module) -> bool:
    return isinstance(module, SwitchExperts) or is_registry_experts(module)


def _emptied_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same model class, whose experts hold no parameters: their checkpoint keys are then never read."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        config._experts_implementation = "eager"  # noqa: SLF001 - transformers offers no public setter before init
        with swapped_switch_experts():
            base.__init__(self, config, *args, **kwargs)
        mark_switch_experts(self)
        for module in self.modules():
            if is_registry_experts(module):
                _empty(module)

    return type(
        base.__name__,  # transformers looks conversions up by class name
        (base,),
        {"__init__": __init__, "__module__": base.__module__},
    )


def _empty(module: nn.Module) -> None:
    shapes = tuple((name, tuple(parameter.shape[1:])) for name, parameter in module.named_parameters(recurse=False))
    for name, _ in shapes:
        delattr(module, name)
    module.expert_shapes = shapes  # type: ignore[assignment]  # plain data on a module
    offload(module)  # whatever implementation the config names
    module._is_hf_initialized = True  # type: ignore[assignment]  # noqa: SLF001 - nothing is left to initialise


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return module.expert_shapes  # type: ignore[return-value]


def _top_k(config: PreTrainedConfig) -> int:
    text = config.get_text_config(decoder=True)
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 1
