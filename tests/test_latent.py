"""Attention over latents: right without keys and values, the same bits in any company, and no more memory than latents take."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.engine.plan import make_plan
from expertflow.engine.planning.workspace import graph_bytes
from expertflow.execution.blocks.attempt import TRIED
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.kernels.backend import backend
from expertflow.kernels.latent import reference
from expertflow.models.context import Pieces
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import build_skeleton
from helpers import DEVICE, ROOT, MakeCheckpoint, load_resident

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
PAGE, LASTS = 64, (0, 69, 200)
"""Tokens of a page, and the positions of three sequences' last tokens."""
CASES = {
    "tiny": (3, 16, 8, 16, 16),
    "heads of two tiles, ragged widths": (17, 24, 8, 12, 40),
}
"""Heads, widths of the plain and the rotary part, of values and of latents."""


def kernels(name: str) -> Any:
    """A module of Triton kernels, run by the interpreter where there is no GPU."""
    return pytest.importorskip(f"expertflow.kernels.latent.{name}", reason="kernels need triton")


class Drawn:
    """Latents of three sequences in pages of a drawn order; what no token may read is no number."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        self.heads, self.plain, rope, self.width, rank = CASES[case]
        random = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        columns = 1 + max(LASTS) // PAGE
        order = torch.randperm(4 * columns, generator=random)[: 3 * columns]
        self.table = order.view(3, columns).int().to(DEVICE)
        kept = [torch.full((4 * columns, 1, PAGE, size), torch.nan, dtype=dtype) for size in (rank, rope)]
        self.lines = [[draw(last + 1, size) for size in (rank, rope)] for last in LASTS]
        self.rows = [2, 0, 1]
        for row, last, lines in zip(self.rows, LASTS, self.lines, strict=True):
            for part, line in zip(kept, lines, strict=True):
                for token in range(last + 1):
                    part[self.table[row, token // PAGE].item(), 0, token % PAGE] = line[token]
        self.kept = kept[0].to(DEVICE), kept[1].to(DEVICE)
        self.weight = (draw(self.heads * (self.plain + self.width), rank) / rank**0.5).to(DEVICE)
        self.draw = lambda tokens: draw(tokens, self.heads, self.plain + rope).to(DEVICE)

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.rows, device=DEVICE), torch.tensor(LASTS, device=DEVICE)

    def plainly(self, place: int, query: Tensor) -> Tensor:
        """Attention of the last tokens of a sequence by keys and values of each head, in float64: `[C, Q, V]`."""
        latents, turned = (line.to(DEVICE).double() for line in self.lines[place])
        made = (latents @ self.weight.double().T).view(len(latents), self.heads, -1)
        rotary = turned[:, None].expand(-1, self.heads, -1)
        keys = torch.cat([made[..., : self.plain], rotary], dim=2)
        scores = torch.einsum("chd,nhd->chn", query.double(), keys) * 0.3
        behind = torch.ones(scores.shape[0], len(latents), device=DEVICE).triu(1 + len(latents) - len(query)) > 0
        shares = scores.masked_fill(behind[:, None], -torch.inf).softmax(dim=2)
        return torch.einsum("chn,nhv->chv", shares, made[..., self.plain :])


def attends(kind: str, what: str) -> Callable[..., Tensor]:
    """The kernel or the reference, of steps or of prompts."""
    name = {"step": "decode_attention", "prompt": "prompt_attention"}[what]
    return getattr(reference if kind == "reference" else kernels({"step": "decode", "prompt": "prompts"}[what]), name)


@pytest.mark.parametrize("kind", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_textbooks(case: str, dtype: torch.dtype, kind: str) -> None:
    """Over one span and several, as keys and values of each head would have it; nothing is read that no token sees."""
    drawn = Drawn(case, dtype)
    query = drawn.draw(3)
    found = attends(kind, "step")(query, drawn.kept, drawn.weight, drawn.where, 0.3, drawn.table)
    for place in range(3):
        expected = drawn.plainly(place, query[place : place + 1])
        torch.testing.assert_close(found[place : place + 1].double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def pieces_of(drawn: Drawn, counts: tuple[int, ...], mine: slice = slice(0, 3)) -> tuple[tuple[Any, ...], dict]:
    """The last tokens of some sequences, as a pass over prompts is given them."""
    ends = [last + 1 for last in LASTS[mine]]
    spans = [(row, end - count, end) for row, end, count in zip(drawn.rows[mine], ends, counts, strict=True)]
    lines = Pieces.of(spans, DEVICE)
    given = drawn.kept, drawn.weight, (lines.rows, lines.lasts), 0.3, drawn.table
    return given, {"pieces": (lines.bounds, lines.longest), "room": (lines.begins, lines.columns)}


@pytest.mark.parametrize("kind", ["kernel", "reference"])
@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.bfloat16) for case in CASES), ("tiny", torch.float32)])
def test_prompts_are_the_textbooks(case: str, dtype: torch.dtype, kind: str) -> None:
    """Unequal pieces of three sequences behind one another."""
    drawn, counts = Drawn(case, dtype), (1, 9, 14)
    query = drawn.draw(sum(counts))
    given, more = pieces_of(drawn, counts)
    found = attends(kind, "prompt")(query.transpose(0, 1)[None], *given, **more)
    assert found.shape == (1, 24, drawn.heads, drawn.width)
    for place, (asked, mine) in enumerate(zip(query.split(counts), found[0].split(counts), strict=True)):
        expected = drawn.plainly(place, asked)
        torch.testing.assert_close(mine.double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_a_steps_bits_depend_on_the_sequence_alone() -> None:
    """Neither other sequences nor the columns that a step is captured for; spans grow with a sequence, whatever the others' are."""
    drawn, decode = Drawn("tiny", torch.bfloat16), kernels("decode")
    query, given = drawn.draw(3), (drawn.kept, drawn.weight)
    for spans in (None, (128, 1)):  # with one at most, the longest sequence's has 256 columns and the others' 128
        together = decode.decode_attention(query, *given, drawn.where, 0.3, drawn.table, spans=spans)
        for place, last in enumerate(LASTS):
            mine, table = slice(place, place + 1), drawn.table[:, : 1 + last // PAGE]
            where = drawn.where[0][mine], drawn.where[1][mine]
            alone = decode.decode_attention(query[mine], *given, where, 0.3, table, spans=spans)
            assert torch.equal(alone, together[mine]), (spans, place)
            expected = drawn.plainly(place, query[mine])
            torch.testing.assert_close(alone.double(), expected, atol=2e-2, rtol=2e-2)


def test_a_prompts_bits_depend_on_the_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on its company, on how it is cut, and on how many heads' keys are made at once."""
    drawn, prompts = Drawn("tiny", torch.bfloat16), kernels("prompts")
    counts = (1, 9, 40)
    query = drawn.draw(sum(counts)).transpose(0, 1)[None]
    given, more = pieces_of(drawn, counts)
    together = prompts.prompt_attention(query, *given, **more)
    made = prompts.heads_at_once(3, 400, 80)
    monkeypatch.setattr(prompts, "EXPANDED", 1)
    assert (made, prompts.heads_at_once(3, 400, 80)) == (3, 1)
    assert torch.equal(prompts.prompt_attention(query, *given, **more), together)
    given, more = pieces_of(drawn, (7,), slice(2, 3))
    alone = prompts.prompt_attention(query[:, :, -7:], *given, **more)
    assert torch.equal(alone, together[:, -7:])


VARIANTS = {
    "deepseek_v2": {"q_lora_rank": None},
    "deepseek_v3": {
        "kv_lora_rank": 40, "v_head_dim": 24, "rope_interleave": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32},
    },
}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("family", VARIANTS)
def test_graph_execution_is_near_stock_and_makes_no_key(
    family: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of prompts and of steps are stock's within 1e-4 in float32, by the kernels, and `expand_kv` is not called."""
    folder = make_checkpoint(family, spread=0.3, **SMALL, **VARIANTS[family])
    tokens = [[5 + (7 + row) * place % 90 for place in range(count)] for row, count in enumerate((70, 9))]
    stock = load_resident(folder)
    with torch.inference_mode():
        expected = [stock(torch.tensor([line])).logits[0] for line in tokens]
    own = type(stock.model.layers[0].self_attn).expand_kv

    def expand_kv(module: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        tried = module.config._attn_implementation == TRIED
        return own(module, *given) if tried else pytest.fail("keys are made")

    monkeypatch.setattr(type(stock.model.layers[0].self_attn), "expand_kv", expand_kv)
    blocks = ("product.product", "gated.gated", "latents.attend_latents", "route.route")
    modules = [one.split(".") for one in blocks]
    chosen = replace(
        backend(DEVICE), latent_attention=attends("kernel", "step"), latent_prompts=attends("kernel", "prompt"),
        **{name: getattr(importlib.import_module(f"expertflow.kernels.blocks.{module}"), name) for module, name in modules},
    )  # fmt: skip
    for place in ("captured.dense", "blocks.layer"):
        monkeypatch.setattr(f"expertflow.execution.{place}.backend", lambda _: chosen)
    options = {"execution": "graph", "max_length": 80, "max_batch": 2, "slots": 1000}
    with LLM(folder, device=DEVICE.type, **options) as llm:
        executor = llm._engine._executor
        executor.prefill([PromptChunk(0, tokens[0][:60], 1, 0, 7)])
        pieces = [PromptChunk(0, tokens[0][60:67], 1, 60), PromptChunk(1, tokens[1][:6], 0, 0)]
        found = [executor.prefill(pieces).clone()]
        for step in range(3):
            fed = [DecodeInput(0, tokens[0][67 + step], 1, 67 + step), DecodeInput(1, tokens[1][6 + step], 0, 6 + step)]
            found.append(executor.decode(fed).clone())
    for step, logits in enumerate(found):
        stocks = torch.stack([expected[0][66 + step], expected[1][5 + step]])
        torch.testing.assert_close(logits.cpu(), stocks, atol=1e-4, rtol=1e-4)


def test_steps_that_the_host_decides_read_latents_too(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """While the routing is recorded, steps are the host's: the same tokens, and no key is made."""
    prompts, params = [[5, 6, 7, 8, 9, 10, 11], [10, 11, 30], [12]], SamplingParams(max_tokens=6, ignore_eos=True)
    options = {"device": "cpu", "execution": "graph", "slots": 9, "max_length": 16, "max_batch": 4}
    with LLM(make_checkpoint("deepseek_v3", spread=0.3), **options) as llm:
        expected, dense, steps = llm.generate(prompts, params), llm._offloaded.handover.prompt_dense(), []
        own = dense._over_latents
        dense._over_latents = lambda *given: (steps.append(1), own(*given))[1]
        with llm.record(tmp_path / "t.trace"):
            found = llm.generate(prompts, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert len(steps) == 5 * 3  # layers


def test_a_plan_counts_latents(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite keeps 576 numbers a token and layer, and no pass or step makes all heads' keys and values of 128k tokens."""
    sizes = {"num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
             "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "moe_intermediate_size": 1408,
             "vocab_size": 102400, "max_position_embeddings": 1 << 17}  # fmt: skip
    AutoConfig.for_model("deepseek_v2", **sizes, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    shape, length = shape_of(build_skeleton(tmp_path, "bfloat16")), 1 << 17
    options = {"max_length": length, "max_batch": 1, "slots": 64, "execution": "graph", "prefill_chunk": 512}
    plan = make_plan(EngineConfig(**options), shape, "cuda", "lru")
    assert plan.kv == 27 * 576 * 2 * (length + 2 * 64) + length // 64 * 4
    keys_and_values = 16 * (192 + 128) * 2 * length
    assert plan.prompt_attention == "kernel"
    assert plan.workspace < keys_and_values * 0.75
    grown = graph_bytes(shape, 1, length, "cuda") - graph_bytes(shape, 1, 1 << 14, "cuda")
    assert 0 <= grown < keys_and_values / 1000  # spans grow longer, not more


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Within the shared memory that each has; Hopper's own products where there are enough heads for them."""
    pytest.importorskip("triton", reason="kernels need triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "compile_latent.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made) == 4
    for arch, case, shared, room, hopper in made:
        assert 0 < shared <= room, (arch, case)
        assert hopper == (arch == 90 and case in {"DeepSeek-V3 attend", "DeepSeek-V3 expand"}), (arch, case)
