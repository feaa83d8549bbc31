"""A format that only tests know, of the kind of mxfp4: what a new format takes is this file and an entry of the table.

Two 4-bit codes a byte, one uint8 scale for 32 inputs: `(code - 8) * 2 ** (scale - 127)`, exact in bfloat16. Checkpoints hold
adjacent codes in a byte; a record holds codes j and j + 16 of a group of 32 in one, so that a part is repacked.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.table import FORMATS

GROUP = 32


class FourBit(Format):
    """Per projection `<name>_packed` and `<name>_scale`; or, stacked, `<name>_blocks` `[E, N, K / 32, 16]` and `<name>_scales`."""

    ignored = ("_shape",)
    repacked = frozenset({"codes"})

    def __init__(self, name: str, suffixes: Mapping[str, str], *, blocks: bool) -> None:
        self.name, self._suffixes, self._blocks = name, suffixes, blocks
        self.tile_loader = tile_loader()

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        n, k = spec.outputs, spec.inputs
        stored = (n, k // GROUP, GROUP // 2) if self._blocks else (n, k // 2)
        return (
            Part(name="codes", shape=(n, k // 2), dtype="uint8", stored=stored),
            Part(name="scales", shape=(n, k // GROUP), dtype="uint8", stored=(n, k // GROUP)),
        )

    decode_bytes_each = 10  # codes, and two copies in float32

    def numbers(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        n, k = spec.shape
        codes = parts["codes"].view(n, k // GROUP, 1, GROUP // 2)
        both = torch.cat([codes & 15, codes >> 4], dim=2).view(n, k // GROUP, GROUP)
        return numbers(both, parts["scales"], spec.dtype)

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return stored["scales"][0], stored["scales"][1] * GROUP

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        del std  # about .02, whatever is asked for
        codes, scales = (
            torch.randint(low, high, part.shape, generator=generator, dtype=torch.uint8, device=generator.device)
            for part, (low, high) in zip(self.parts(spec), ((0, 256), (119, 121)), strict=True)
        )
        return {"codes": codes, "scales": scales}

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        return (self,) if quantization.get("quant_method") == self.name else ()

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        del stored  # the names say enough
        found = next((suffix for suffix in self._suffixes if key.endswith(suffix)), None)
        return None if found is None else (key.removesuffix(found), self._suffixes[found])

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        del spec
        assert part == "codes"
        pairs = stored.view(stored.shape[0], -1, GROUP // 2, 1)
        in_order = torch.cat([pairs & 15, pairs >> 4], dim=3).view(*pairs.shape[:2], GROUP)
        return (in_order[..., : GROUP // 2] | in_order[..., GROUP // 2 :] << 4).view(stored.shape[0], -1)


def numbers(codes: Tensor, scales: Tensor, dtype: str) -> Tensor:
    """The weight `[N, K]` of codes `[N, K / 32, 32]` and scales `[N, K / 32]`."""
    values = torch.ldexp(codes.float() - 8, scales.int()[..., None] - 127).to(getattr(torch, dtype))
    return values.view(codes.shape[0], -1)


def tile_loader() -> Any:
    """The Triton twin of `decode`; None where there is no Triton."""
    try:
        import four_bit_tile  # noqa: PLC0415 - imports Triton
    except ImportError:
        return None
    return four_bit_tile.load_four_bit


LINEAR = FourBit("four-bit", {"_packed": "codes", "_scale": "scales"}, blocks=False)
STACKED = FourBit("four-bit-stacked", {"_blocks": "codes", "_scales": "scales"}, blocks=True)
TABLE = {**FORMATS, LINEAR.name: LINEAR, STACKED.name: STACKED}
