"""Why a model that transformers knows cannot run here, and what turns it into one that can.

Makes errors from configs and headers. Must not know how a model is loaded or run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from expertflow.errors import CheckpointError, ExpertFlowError, UnsupportedModelError
from expertflow.models.files.foreign import lines

LISTED = "`expertflow models` lists the families that run."
_ELSEWHERE = f"Run it with transformers itself, which keeps every expert in memory; {LISTED}"


def refuse_quantised(folder: Path, quantization: Any) -> NoReturn:
    """Refuse a quantised checkpoint that no format claims.

    Args:
        folder: the checkpoint.
        quantization: the config's `quantization_config`.

    Raises:
        UnsupportedModelError: always.
    """
    about = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method, stored_as = str(about.get("quant_method", "unknown")), _first_format(about)
    raise UnsupportedModelError(
        f"{folder} holds a checkpoint quantised with {method!r}{stored_as and f' in the format {stored_as!r}'}, which is not "
        "decoded here",
        "Fetch the model in bfloat16 or in another format, or decode it with its publisher's own tool and take "
        "`quantization_config` out of config.json.",
    )


def _first_format(about: Mapping[str, Any]) -> str:
    """The format that a compressed-tensors config states, in a group or for all; empty: none."""
    groups = about.get("config_groups")
    listed = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    return next((str(group["format"]) for group in listed if group.get("format")), str(about.get("format") or ""))


def lost_experts(folder: Path, key: str) -> CheckpointError:
    """A dequantised model that transformers saved in its default way, which keeps one layer's experts of all."""
    return CheckpointError(
        f"{folder} was saved by a transformers that writes a dequantised model's experts of all layers under one name, "
        f"{key!r}, so that all but one layer's are lost",
        "Convert the quantised checkpoint again, with `model.save_pretrained(..., save_original_format=False)`.",
    )


def not_text(folder: Path, config: PreTrainedConfig) -> ExpertFlowError:
    """A config of which transformers makes no text-generating model: the text part is named if there is one."""
    text = config.get_text_config(decoder=True)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or text is config:
        return UnsupportedModelError(f"{config.model_type!r} is not a text-generating model", LISTED)
    what = f"{config.model_type!r} reads images and text, and only models of text run"
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return UnsupportedModelError(f"{what}; its text part {text.model_type!r} has no model of its own", _ELSEWHERE)
    return UnsupportedModelError(
        what,
        f"Take its text part out, which is of the family {text.model_type!r}, and give the new folder:\n"
        + lines(
            "from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer",
            f"whole = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, dtype='auto')",
            "model = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)",
            "model.config.tie_word_embeddings = whole.config.tie_word_embeddings",
            "model.model, model.lm_head = whole.model.language_model, whole.lm_head",
            "model.save_pretrained('text', save_original_format=False)",
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained('text')",
        ),
    )


def no_experts(folder: Path, config: PreTrainedConfig, model: nn.Module) -> ExpertFlowError:
    """A model without experts that can be offloaded: because it has none, or because of the class they are in."""
    names = sorted({type(module).__name__ for module in model.modules() if any(True for _ in module.parameters())})
    own = [
        name for word in ("Experts", "SparseMLP", "SparseMoe", "MoE", "Moe") for name in names if name.endswith(word)
    ]
    if not own:
        return UnsupportedModelError(
            f"{config.model_type!r} in {folder} has no experts: it is no Mixture-of-Experts model",
            f"Give a Mixture-of-Experts checkpoint; {LISTED}",
        )
    return UnsupportedModelError(
        f"the experts of {config.model_type!r} are in a class of their own ({own[0]}), outside transformers' experts "
        "registry, through which experts are offloaded",
        _ELSEWHERE,
    )


def converted_experts(key: str, names: str) -> ExpertFlowError:
    """Experts whose stored tensors transformers computes others from."""
    return UnsupportedModelError(
        f"expert tensor {key!r} is stored in a way that transformers converts by {names}, which is not done here",
        _ELSEWHERE,
    )
