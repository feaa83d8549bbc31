"""Which building blocks compute what a model's modules compute: found by what modules are made of, and tried before it is believed.

Names of families are not looked at. Layers are looked for in the skeleton, which has no weights; one of each kind is tried
(`execution.blocks.trial`). A module that no block matches keeps its own code. Must not know kernels on a device, and which passes use
them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import AutoConfig

from expertflow.execution.blocks.forms import LayerForm
from expertflow.execution.blocks.tensors import tensors_of
from expertflow.execution.blocks.trial import Trial
from expertflow.models.attention import attention_form
from expertflow.models.families import Family
from expertflow.models.skeleton import Skeleton, build_skeleton

_PLAIN = (bool, int, float, str, type(None))
_NUMBERED = "layer_idx"


def find_layers(skeleton: Skeleton) -> dict[str, LayerForm]:
    """The form of every decoder layer that has one, by module path."""
    model, found, known = skeleton.model, dict[str, LayerForm](), dict[Any, LayerForm | None]()
    for path, layer in model.named_modules():
        names = _names(layer)
        if names is None:
            continue
        if (kind := _kind(layer, names[0])) not in known:
            known[kind] = Trial(layer, names).form()
        if (form := known[kind]) is not None:
            found[path] = form
    return found


def family_blocks(family: Family) -> tuple[str, ...]:
    """Which parts of some decoder layer of a family's small model are computed by building blocks.

    Of `attention`, `experts`, `shared expert` and `feed-forward`, which is a second part without experts.
    """
    with TemporaryDirectory() as folder:
        AutoConfig.for_model(family.model_type, **family.tiny).save_pretrained(folder)
        found = find_layers(build_skeleton(Path(folder), "float32")).values()
    parts: dict[str, list[Any]] = {
        "attention": [form.heads for form in found],
        "experts": [form.experts for form in found],
        "shared expert": [form.experts and form.experts.feed for form in found],
        "feed-forward": [form.feed for form in found],
    }
    return tuple(name for name, blocks in parts.items() if any(block is not None for block in blocks))


def is_norm(module: nn.Module) -> bool:
    """Whether a module divides by the root of the mean square, and multiplies by a weight."""
    return hasattr(module, "variance_epsilon") and [name for name, _ in module.named_parameters()] == ["weight"]


def _names(layer: nn.Module) -> tuple[str, str, tuple[str, str]] | None:
    """Names of a layer's attention, second part and two norms, if it has these parts and no other."""
    children = dict(layer.named_children())
    attentions = [name for name, child in children.items() if attention_form(child) is not None]
    norms = [name for name, child in children.items() if is_norm(child)]
    others = [name for name in children if name not in (*attentions, *norms)]
    if len(attentions) != 1 or len(norms) != 2 or len(others) != 1:
        return None
    return attentions[0], others[0], (norms[0], norms[1])


def _kind(layer: nn.Module, attention: str) -> Any:
    """What layers have in common that compute alike: classes, shapes, and every plain attribute but their number.

    What a config lists layer by layer counts as well, because a forward may look it up.
    """
    own = layer.get_submodule(attention)
    number, config = getattr(own, _NUMBERED), own.config
    listed = {
        name: value[number]
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == getattr(config, "num_hidden_layers", 0)
    }
    parts = [(path, type(module), _attributes(module)) for path, module in layer.named_modules()]
    shapes = [(name, tensor.shape) for name, tensor in tensors_of(layer).items()]
    return repr((parts, shapes, listed))


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and values of a module's plain attributes."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if name != _NUMBERED
        and (isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(one, _PLAIN) for one in value)))
    )
