"""GPTQ, as AutoGPTQ and GPTQModel store it: words of eight inputs, input-major, with zeros that are packed along outputs.

Sources: AutoGPTQ 0.7 and GPTQModel, `checkpoint_format` `gptq` and `gptq_v2`. Order of activation is told by `g_idx` alone:
`desc_act` is true of checkpoints whose groups are of neighbours, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.published.int4 import MIDDLE, Int4, group_size, refuse
from expertflow.formats.words import PER_WORD, as_bytes, nibbles

_ENDINGS = {"qweight": "codes", "scales": "scales", "qzeros": "zeros", "g_idx": "g_idx"}
_LARGEST = 15


@dataclass(frozen=True, kw_only=True)
class Gptq(Int4):
    """`qweight` int32 `[K / 8, N]`, `scales` `[groups, N]`, `qzeros` int32 `[groups, N / 8]`, and `g_idx` int32 `[K]`.

    Bits `4 i` and up of word j are input `8 j + i`, or of zeros output `8 j + i`.

    Attributes:
        added: to a stored zero: 1, or 0 in `gptq_v2`.
        ordered: whether the config says `desc_act`. A checkpoint that says so must have `g_idx`; others may lack it.
    """

    name = "gptq"
    scale_dtype: str = "float16"
    added: int = 1
    ordered: bool = False

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of the method `gptq`, with 4 bits everywhere."""
        if quantization.get("quant_method") != "gptq":
            return ()
        bits, packed_in = quantization.get("bits"), quantization.get("pack_dtype") or "int32"
        layout = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq")
        if bits != 4:
            refuse(f"the checkpoint is quantised by gptq to {bits} bits")
        if layout not in {"gptq", "gptq_v2"} or quantization.get("is_marlin_format") or packed_in != "int32":
            layout = "marlin" if quantization.get("is_marlin_format") else layout
            refuse(f"the checkpoint is quantised by gptq and stored as {layout!r} in {packed_in}")
        _check_overrides(quantization)
        symmetric = quantization.get("sym")
        return (
            replace(
                self,
                group=group_size(quantization.get("group_size"), "gptq"),
                zeros=symmetric is False,
                added=1 if layout == "gptq" else 0,
                ordered=bool(quantization.get("desc_act")),
            ),
        )

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The keys `<name>.qweight` and those beside it."""
        del stored  # the names say enough
        stem, _, end = key.rpartition(".")
        return (f"{stem}.weight", _ENDINGS[end]) if stem and end in _ENDINGS else None

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, scales, zeros (empty in a record if symmetric), and the order of inputs, which is checked."""
        groups, words = self.groups_of(spec), -(-spec.outputs // spec.joined // PER_WORD) * spec.joined
        return (
            *self.word_parts(spec, (spec.inputs // PER_WORD, spec.outputs), (groups, spec.outputs), 1),
            self.zero_part(spec, (groups, words), 1),
            self.order_part(spec, optional=not self.ordered),
        )

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Of the words of codes."""
        return stored["codes"][1], stored["codes"][0] * PER_WORD

    def pairs(self, stored: Tensor) -> Tensor:
        """The bytes of each output's words."""
        return as_bytes(stored.t())

    def by_output(self, stored: Tensor) -> Tensor:
        """Turned round."""
        return stored.t()

    def zero_codes(self, spec: TensorSpec, stored: Tensor) -> Tensor:
        """As they count, not as they are stored.

        The zero of symmetric weights is 8. It is stored as 7, or as 8 by checkpoints of either name.
        """
        zeros = nibbles(stored)[:, : spec.outputs].t()
        if not self.zeros:
            if not any(bool((zeros == one).all()) for one in (MIDDLE - 1, MIDDLE)):
                raise ValueError("the config says that weights are symmetric, and not all stored zeros are 7, or 8")
            return zeros
        if self.added and bool((zeros == _LARGEST).any()):
            raise ValueError("a stored zero is 15, to which 1 is added: it does not fit, and readers differ")
        return zeros + self.added


def _check_overrides(quantization: Mapping[str, Any]) -> None:
    """Refuse other settings for some of the weights; weights that are left plain (`-:`) are known by their keys."""
    dynamic = quantization.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, Mapping) else ():
        for name in ("bits", "group_size", "sym"):
            if str(pattern).startswith("-") or not isinstance(changes, Mapping):
                continue
            if changes.get(name, quantization.get(name)) != quantization.get(name):
                refuse(f"the checkpoint is quantised by gptq with another {name!r} for some weights ({pattern!r})")


GPTQ = Gptq()
