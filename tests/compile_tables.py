"""Compiles the cache's tables and the fetch for 48 x 512 experts and GPUs that are not here, and prints what each spills; run by `test_compile.py`.

A process of its own, because it takes down launches in place of every kernel's, and other tests run Triton's interpreter.
"""

import json
import sys
from typing import Any

import torch
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from expertflow.cache.core import make_tables
from expertflow.cache.strategy import STRATEGIES
from expertflow.kernels import fetch
from expertflow.kernels.ledger import Ledger
from expertflow.kernels.residency import driver
from expertflow.kernels.residency.state import CacheState, RoutingOutput, Schedule
from registers import compiled, spilled

LAYERS, EXPERTS, TOP_K, TOKENS = 48, 512, 10, 8
TYPES = {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.float32: "*fp32", torch.float64: "*fp64"}


def launches() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Kernels with the arguments of a launch; of those launched several times, with those of the first."""
    taken: dict[str, tuple[Any, dict[str, Any]]] = {}

    def take(kernel: Any, *values: Any, grid: Any, warmup: bool, **names: Any) -> None:
        del grid, warmup
        taken.setdefault(kernel.__name__, (kernel, dict(zip(kernel.arg_names, values, strict=False)) | names))

    JITFunction.run = take
    strategy = STRATEGIES["plec"].on_device()
    tables = make_tables(LAYERS, EXPERTS, LAYERS * EXPERTS // 2, divided=False)
    state = CacheState.allocate(strategy, tables, torch.device("cpu"), given=True)
    routes = torch.zeros(TOKENS, LAYERS, TOP_K, dtype=torch.int32)
    numbers = torch.zeros(TOKENS, TOP_K, dtype=torch.int64)
    twin = driver.Residency(state, RoutingOutput(routes=routes, state_rows=numbers[:, 0]))
    twin.expect(torch.zeros(1, 5, LAYERS, EXPERTS), numbers[0], numbers[0])
    twin.open_step()
    twin.run_layer(0, numbers, Schedule.allocate(state, TOKENS, TOP_K))
    twin.close_step()
    record, one = torch.zeros(1, 1_638_400, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    fetch.fetch_records(record, record, Ledger.of(one, one), one, one)
    return taken


def spilled_by(kernel: Any, given: dict[str, Any], arch: int) -> int:
    """Bytes a thread of the kernel keeps outside of its registers."""
    signature = {
        p.name: "constexpr" if p.is_constexpr else TYPES[v.dtype] if isinstance(v := given[p.name], torch.Tensor) else "i32"
        for p in kernel.params
    }  # fmt: skip
    constants = {(p.num,): given[p.name] for p in kernel.params if p.is_constexpr}
    options = {name: given[name] for name in ("num_warps", "enable_fp_fusion") if name in given}
    return spilled(compiled(ASTSource(kernel, signature, constants), arch, options)[1])


def main() -> None:
    taken = launches()
    made = [(arch, name, spilled_by(*found, arch)) for arch in (80, 90) for name, found in taken.items()]
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
