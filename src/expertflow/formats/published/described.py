"""What a checkpoint's config states about its weights, as compressed-tensors and NVIDIA's Model Optimizer write it.

Must not know how formats are decoded. Source: compressed-tensors' `QuantizationConfig`; modelopt's `export_hf_checkpoint`, which
writes `quantization_config` or `hf_quant_config.json`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from expertflow.errors import UnsupportedModelError

ELSEWHERE = "Fetch the model in bfloat16 or in another format."
"""The remedy where a variant is not decoded."""
_MODELOPT = frozenset({"modelopt", "modelopt_fp4"})
"""Methods of the Model Optimizer."""
_ALGORITHMS = frozenset({"FP8", "NVFP4", "W4A16_NVFP4"})
"""Of it, those whose weights some format here reads."""
_DECODED = frozenset(
    {"dense", "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized"}
)
"""Formats of groups that some format here reads; `dense` is plain numbers."""


def weight_groups(quantization: Mapping[str, Any], formats: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """What a config says of the weights of each group that is stored in one of the given formats.

    Args:
        quantization: a checkpoint's `quantization_config`.
        formats: names, as the library has them.

    Raises:
        UnsupportedModelError: if the weights of a group, or of all, are stored in a way that is not decoded.
    """
    if quantization.get("quant_method") != "compressed-tensors":
        return
    groups = quantization.get("config_groups")
    for name, group in (groups if isinstance(groups, Mapping) else {}).items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        stored_as = group.get("format") or quantization.get("format")
        if stored_as not in _DECODED:
            raise UnsupportedModelError(
                f"the weights of {name!r} in quantization_config are stored as {stored_as!r}, which is not decoded",
                ELSEWHERE,
            )
        if stored_as in formats:
            _check_whole(quantization)
            yield weights


def _check_whole(quantization: Mapping[str, Any]) -> None:
    """Refuse what is done to weights beside storing them in groups."""
    sparsity = quantization.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else "dense"
    if sparse != "dense":
        raise UnsupportedModelError(
            f"quantization_config has sparse weights, stored as {sparse!r}, which are not decoded", ELSEWHERE
        )
    transforms = quantization.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise UnsupportedModelError(
            "quantization_config has a transform_config: activations would have to be rotated, which is not done",
            ELSEWHERE,
        )


def require(weights: Mapping[str, Any], wanted: Mapping[str, Collection[Any]]) -> None:
    """Check what is said of a group's weights; what is not said is right.

    Args:
        weights: of the group.
        wanted: values that are decoded, by key.

    Raises:
        UnsupportedModelError: if another value is said.
    """
    for key, values in wanted.items():
        if key in weights and weights[key] not in values:
            decoded = " or ".join(repr(value) for value in values)
            raise UnsupportedModelError(
                f"weights with {key} {weights[key]!r} in quantization_config are not decoded, only those with {decoded}",
                ELSEWHERE,
            )


def algorithms(quantization: Mapping[str, Any]) -> frozenset[str]:
    """The algorithms by which a checkpoint's weights are quantised; empty if it is of another kind, or says none.

    Args:
        quantization: its `quantization_config`, or the content of its `hf_quant_config.json` with the method beside it.

    Raises:
        UnsupportedModelError: if one is not decoded.
    """
    if quantization.get("quant_method") not in _MODELOPT:
        return frozenset()
    nested = quantization.get("quantization")
    about = {**nested, **quantization} if isinstance(nested, Mapping) else quantization
    stated = about.get("quant_algo")
    if stated is None:
        return frozenset()
    found = {str(stated)}
    if stated == "MIXED_PRECISION":
        layers = about.get("quantized_layers")
        each = layers.values() if isinstance(layers, Mapping) else ()
        found = {str(layer.get("quant_algo")) for layer in each if isinstance(layer, Mapping)} or found
    if unknown := sorted(found - _ALGORITHMS):
        raise UnsupportedModelError(
            f"weights quantised by modelopt with quant_algo {unknown[0]!r} are not decoded",
            ELSEWHERE,
        )
    if (group := about.get("group_size", 16)) != 16 and found - {"FP8"}:
        raise UnsupportedModelError(
            f"NVFP4 weights with group_size {group!r} are not decoded, only those with 16",
            ELSEWHERE,
        )
    return frozenset(found)
