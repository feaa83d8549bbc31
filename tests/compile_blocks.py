"""Compiles the building blocks of a decode step for GPUs that are not here, and prints what each takes; run by `test_compile.py`.

A process of its own, because other tests run Triton's interpreter. The arguments of a launch are taken down in place of the launch.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.compiler import ASTSource

from expertflow.kernels import experts
from expertflow.kernels.blocks import attend, gated, latents, product, rotate, route, slots
from expertflow.kernels.blocks.given import (
    Cells,
    Heads,
    LatentHeads,
    Norm,
    Places,
    Rotary,
    Router,
    RouterRule,
    Seen,
)
from registers import compiled, spilled

ROOM = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory of a program, by compute capability (CUDA C++ programming guide, table of technical specifications)."""
WANTED = (80, 86, 90)
"""What a test compiles: 8.9 has the memory of 8.6 and nothing more that these kernels use."""
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
GROUPED = RouterRule(top_k=8, scores="sigmoid", groups=8, kept_groups=4, group_top=2, normalised=True, wide_logits=True)


class Taken:
    """Stands in for a kernel, and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.given = kernel, dict[str, Any]()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        del grid
        return self.take

    def take(self, *args: Any, **named: Any) -> None:
        self.given = {**dict(zip(self.kernel.arg_names, args, strict=False)), **named}

    def compiled(self, arch: int) -> tuple[Any, str]:
        """The kernel as the launch would have compiled it, and what the assembler says of it."""
        given, kernel = self.given, self.kernel
        given["early"] = arch >= 90
        names, constants = kernel.arg_names, [param.name for param in kernel.params if param.is_constexpr]
        kinds = {
            name: POINTERS[given[name].dtype] if isinstance(given[name], torch.Tensor) else "i32" for name in names
        }
        aligned = [
            name for name in names if kinds[name].startswith("*") or (name not in constants and given[name] % 16 == 0)
        ]
        source = ASTSource(
            kernel,
            {name: "constexpr" if name in constants else kinds[name] for name in names},
            {(names.index(name),): given[name] for name in constants},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {name: given[name] for name in OPTIONS if name in given}
        return compiled(source, arch, options)


def cases(
    hidden: int, outputs: int, experts_count: int, rule: RouterRule
) -> dict[str, tuple[Any, str, Callable[[], Any]]]:
    """What is launched: module, kernel's name, launch."""
    states = {tokens: torch.zeros(tokens, hidden, dtype=torch.bfloat16) for tokens in (1, 16, 64)}
    norm, weight = Norm(torch.zeros(hidden), 1e-5, wide=False), torch.zeros(outputs, hidden, dtype=torch.bfloat16)
    bias, heads = torch.zeros(outputs, dtype=torch.bfloat16), Heads(8, 2, 64)
    cells = Cells(*torch.zeros(2, 4, 2, 64, 64, dtype=torch.bfloat16), *torch.zeros(2, 16, dtype=torch.int64))
    rotary = Rotary(*torch.zeros(2, 16, 32, dtype=torch.bfloat16), doubled=False)
    joined = torch.zeros(16, heads.all * 64, dtype=torch.bfloat16)
    seen = Seen(cells.pages, cells.places, torch.zeros(16, 4, dtype=torch.int32), 0.125, 128, bias)
    router = Router(torch.zeros(experts_count, hidden, dtype=torch.bfloat16), None, None, rule)
    counts, index = torch.zeros(16, dtype=torch.int32), torch.zeros(16, 4, dtype=torch.int64)
    share = Router(torch.zeros(experts_count + 1, hidden, dtype=torch.bfloat16), None, None, rule, gated=True)
    wide = Heads(48, 8, 128)
    of_all = Norm(torch.zeros(48 * 128), 1e-5, wide=False), Norm(torch.zeros(8 * 128), 1e-5, wide=False)
    wide_cells = Cells(*torch.zeros(2, 4, 8, 64, 128, dtype=torch.bfloat16), cells.pages, cells.places)
    wide_joined = torch.zeros(16, wide.all * 128, dtype=torch.bfloat16)
    over = LatentHeads(
        16, 128, 64, Norm(torch.zeros(512), 1e-6, wide=False), torch.zeros(16 * 256, 512, dtype=torch.bfloat16)
    )
    asked, kept = torch.zeros(16, 16 * 192, dtype=torch.bfloat16), torch.zeros(16, 576, dtype=torch.bfloat16)
    latent_cells = Cells(
        torch.zeros(4, 1, 64, 512, dtype=torch.bfloat16),
        torch.zeros(4, 1, 64, 64, dtype=torch.bfloat16),
        cells.pages,
        cells.places,
    )
    woven, all_seen = Rotary(*torch.zeros(2, 16, 32), doubled=False, woven=True), seen._replace(window=None, sinks=None)
    return {
        "row": (product, "_row_product", lambda: product.product(states[1], weight, bias, norm, None)),
        "wide tiles": (product, "_tile_product", lambda: product.product(states[64], weight)),
        "tiles": (product, "_tile_product", lambda: product.product(states[16], weight, bias, None, joined.new_zeros(16, outputs))),
        "attend": (attend, "_attend_joined", lambda: attend.attend(joined, heads, rotary, None, cells, seen)),
        "attend all": (attend, "_attend_joined", lambda: attend.attend(wide_joined, wide, rotary, of_all, wide_cells, all_seen)),
        "rotate all": (rotate, "_rotate_joined", lambda: rotate.rotate(wide_joined, wide, rotary, of_all, wide_cells)),
        "ask": (latents, "_ask", lambda: latents.attend_latents(asked, kept, over, woven, latent_cells, all_seen)),
        "gated row": (gated, "_gated_row", lambda: gated.gated(states[1], weight, "silu", norm)),
        "gated tiles": (gated, "_gated_tile", lambda: gated.gated(states[64], weight, "silu")),
        "route with share": (route, "_route", lambda: route.route(states[16], norm, share, counts)),
        "route": (route, "_route", lambda: route.route(states[16], norm, router, counts, Places(counts, counts))),
        "route as recorded": (route, "_route", lambda: route.route(states[16], norm, router, counts, Places(counts, counts), index)),
        "slots": (slots, "_find_slots", lambda: slots.find_slots(counts, index, counts)),
        "sum": (experts, "_combine_kernel", lambda: experts.combine(
            torch.zeros(16, 4, hidden), index, torch.zeros(16, 4), experts_count, states[16], (states[16], states[16]))),
    }  # fmt: skip


def waits(ptx: str) -> list[int]:
    """Loads of 16 bytes a thread before the wait for the kernel before, and behind it."""
    before, _, behind = ptx.partition("griddepcontrol.wait")
    return [part.count("ld.global.v4") + part.count("ld.global.L1") for part in (before, behind)]


def main() -> None:
    """Print architecture, case, shared memory, room, spilled bytes, and loads before and behind the wait."""
    made, said = [], dict[str, str]()
    for arch in map(int, sys.argv[1:] or WANTED):
        product.room = gated.room = lambda _, arch=arch: ROOM[arch]
        latents.over_latents = lambda *_: None  # launches kernels that `compile_latent.py` compiles
        for sizes in ((2880, 5120, 32, RouterRule(top_k=4)), (7168, 2048, 256, GROUPED)):
            for name, (module, kernel, launch) in cases(*sizes).items():
                taken = Taken(getattr(module, kernel))
                setattr(module, kernel, taken)
                try:
                    launch()
                finally:
                    setattr(module, kernel, taken.kernel)
                program, log = taken.compiled(arch)
                said.setdefault(program.hash, log)  # some are the same in both sizes
                spill, ptx = spilled(said[program.hash]), program.asm["ptx"]
                made.append((arch, f"{name} {sizes[0]}", program.metadata.shared, ROOM[arch], spill, waits(ptx)))
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
