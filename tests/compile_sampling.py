"""Compiles the sampler's kernels for a vocabulary of 201,088 and GPUs that are not here, and prints what each spills; run by `test_compile.py`.

A process of its own, because it takes down launches in place of every kernel's, and other tests run Triton's interpreter.
"""

import json
import sys
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from compile_tables import TYPES, spilled_by
from expertflow.kernels.sampling import likely, select

VOCABULARY = 201_088
TYPES[torch.bfloat16] = "*bf16"


def launches(dtype: torch.dtype, *, masked: bool) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Kernels with the arguments of a launch; of those launched several times, with those of the first."""
    taken: dict[str, tuple[Any, dict[str, Any]]] = {}

    def take(kernel: Any, *values: Any, grid: Any, warmup: bool, **names: Any) -> None:
        del grid, warmup
        given = dict(zip(kernel.arg_names, values, strict=False)) | names
        taken.setdefault(kernel.__name__, (kernel, given))

    JITFunction.run = take
    logits, rules = torch.empty(2, VOCABULARY, dtype=dtype), torch.zeros(2, 5, dtype=torch.float64)
    mask = torch.zeros(2, VOCABULARY // 32, dtype=torch.int32) if masked else None
    select.choose(logits, rules, mask)
    likely.likely(logits, torch.tensor([1]), torch.tensor([5]), 5)
    return taken


def main() -> None:
    taken = launches(torch.bfloat16, masked=True)
    made = [
        (arch, name, spilled_by(kernel, given | {"early": arch >= 90}, arch))
        for arch in (80, 90) for name, (kernel, given) in taken.items()
    ]  # fmt: skip
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
