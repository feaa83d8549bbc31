"""Attention of passes over prompts in graph execution: right, the same in every cut of a prompt, and without scores in memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertflow import LLM, EngineConfig
from expertflow.engine.plan import make_plan
from expertflow.execution.runner import PromptChunk
from expertflow.kernels import dense_reference
from expertflow.kernels.backend import backend
from expertflow.models.context import Pieces
from expertflow.models.families import FAMILIES
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import build_skeleton
from helpers import DEVICE, DEVICES, ROOT, MakeCheckpoint, load_resident

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
COLUMNS, LASTS = 200, (11, 150)
"""Columns of a KV row; the last token's position of two sequences, the first of which is shorter than the pass."""
CASES = {
    "heads of 64": {"width": 64, "groups": 4},
    "window": {"width": 64, "groups": 8, "window": 30},
    "window and sinks": {"width": 16, "groups": 2, "window": 70, "sinks": True},
    "sinks": {"width": 128, "groups": 1, "sinks": True},
    "latent": {"width": 192, "value_width": 128, "groups": 1},
    "latent, tiny": {"width": 24, "value_width": 16, "groups": 3},
    "width 80": {"width": 80, "groups": 5, "window": 9},
    "softcap": {"width": 32, "groups": 2, "softcap": 3.0},
}
DECODERS = [name for name, family in FAMILIES.items() if not family.no_graph and name != "switch_transformers"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [10, 11, 30], [12]]


class Drawn:
    """Queries of two sequences, and KV rows in which everything that must not be read is no number."""

    def __init__(self, case: str, dtype: torch.dtype, tokens: int = 20) -> None:
        given: dict[str, Any] = dict(CASES[case])
        random = torch.Generator().manual_seed(3)
        width, groups, kv_heads = given["width"], given["groups"], 2
        value_width, self.window = given.get("value_width", width), given.get("window")
        self.order = [2, 0]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(DEVICE, dtype)

        self.query = draw(2, tokens, kv_heads * groups, width).transpose(1, 2)
        self.keys, self.values = (
            draw(3, kv_heads, COLUMNS, width),
            draw(3, COLUMNS, kv_heads, value_width).transpose(1, 2),
        )
        self.more = {
            "sinks": draw(kv_heads * groups) if given.get("sinks") else None, "softcap": given.get("softcap"),
        }  # fmt: skip
        for kept in (self.keys, self.values):
            kept[1] = torch.nan
            for row, last in zip(self.order, LASTS, strict=True):
                kept[row, :, last + 1 :] = torch.nan
                # a kernel reads whole blocks, of 64 columns at most, but none in which no token sees anything
                kept[row, :, : max(0, last - tokens - (self.window or COLUMNS) - 64)] = torch.nan

    def where(self, back: int = 0, mine: slice = slice(0, 2)) -> tuple[Tensor, Tensor]:
        """Rows and last positions; of the second sequence the pass ends so many tokens earlier."""
        lasts = torch.tensor([LASTS[0], LASTS[1] - back], device=DEVICE)
        return torch.tensor(self.order, device=DEVICE)[mine], lasts[mine]


def plainly(drawn: Drawn, place: int) -> Tensor:
    """Attention of one sequence as a textbook writes it, in float64: `[C, Q, V]`."""
    row, last, tokens = drawn.order[place], LASTS[place], drawn.query.shape[2]
    count = min(tokens, last + 1)
    query, keys, values = (
        one.double() for one in (drawn.query[place, :, tokens - count :], drawn.keys[row], drawn.values[row])
    )
    repeat = query.shape[0] // keys.shape[0]
    keys, values = (one[:, : last + 1].nan_to_num().repeat_interleave(repeat, 0) for one in (keys, values))
    scores = query @ keys.transpose(1, 2) * 0.3
    if drawn.more["softcap"]:
        scores = drawn.more["softcap"] * (scores / drawn.more["softcap"]).tanh()
    distance = torch.arange(last - count + 1, last + 1)[:, None] - torch.arange(last + 1)
    seen = (distance >= 0) & (distance < (drawn.window or COLUMNS))
    weights = scores.masked_fill(~seen.to(DEVICE), -torch.inf).exp()
    nothing = 0 if drawn.more["sinks"] is None else drawn.more["sinks"].double().exp()[:, None, None]
    return (weights / (weights.sum(2, keepdim=True) + nothing) @ values).transpose(0, 1)


@pytest.mark.parametrize("kind", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_textbooks(case: str, dtype: torch.dtype, kind: str) -> None:
    """Rows in any order, reading nothing that no token sees; tokens before a sequence's begin are padding and get zeros."""
    drawn, attend = Drawn(case, dtype), kernel() if kind == "kernel" else dense_reference.prompt_attention
    found = attend(drawn.query, drawn.keys, drawn.values, drawn.where(), 0.3, drawn.window, **drawn.more)
    assert found.shape == (2, 20, drawn.query.shape[1], drawn.values.shape[3])
    for place, last in enumerate(LASTS):
        expected = plainly(drawn, place)
        padding = 20 - len(expected)
        assert padding == max(0, 19 - last)
        assert not found[place, :padding].any()
        torch.testing.assert_close(found[place, padding:].double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def kernel() -> Any:
    """The Triton kernel, in the interpreter where there is no GPU."""
    return pytest.importorskip("expertflow.kernels.prompts.attention", reason="kernels need triton").prompt_attention


@pytest.mark.parametrize("kind", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("case", ["heads of 64", "window and sinks"])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(case: str, dtype: torch.dtype, kind: str) -> None:
    """Pieces of unequal sizes, alone and beside another sequence, give each token the bits of one pass."""
    drawn, attend = Drawn(case, dtype, tokens=70), kernel() if kind == "kernel" else dense_reference.prompt_attention
    for kept in (drawn.keys, drawn.values):
        kept.nan_to_num_()  # of the columns of later pieces
    given, more = (drawn.keys, drawn.values), (0.3, drawn.window)
    whole = attend(drawn.query, *given, drawn.where(), *more, **drawn.more)
    begin = 0
    for size in (1, 31, 7, 31):
        end = begin + size
        mine = slice(0, 2) if end == 32 else slice(1, 2)
        where = drawn.where(70 - end, mine)
        piece = attend(drawn.query[mine, :, begin:end], *given, where, *more, **drawn.more)
        assert torch.equal(piece[-1], whole[1, begin:end]), size
        begin = end
    assert begin == 70


@pytest.mark.parametrize("kind", ["kernel", "reference"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", ["window and sinks", "width 80"])
def test_unequal_pieces_of_one_pass_are_as_alone(case: str, paged: bool, kind: str) -> None:
    """70, 1 and 9 tokens behind one another have the bits that each has alone, and read no other's keys and values."""
    drawn, attend = (
        Drawn(case, torch.bfloat16, tokens=80),
        kernel() if kind == "kernel" else dense_reference.prompt_attention,
    )
    query, given, table = drawn.query[1:].contiguous(), [kept.nan_to_num() for kept in (drawn.keys, drawn.values)], None
    if paged:  # row r's columns 64 m .. 64 m + 63 are page 2 r + m
        given = [kept[:, :, :128].unflatten(2, (2, 64)).transpose(1, 2).flatten(0, 1) for kept in given]
        table = torch.arange(6, dtype=torch.int32, device=DEVICE).view(3, 2)
    pieces = [(2, 50, 120), (0, 0, 1), (1, 9, 18)]
    lines = Pieces.of(pieces, DEVICE)
    assert lines.ends.tolist() == [69, 70, 79]
    more = {**drawn.more, "table": table}
    where = lines.rows, lines.lasts
    joined = attend(query, *given, where, 0.3, drawn.window, **more, pieces=(lines.bounds, lines.longest))
    assert joined.shape == (1, 80, query.shape[1], drawn.values.shape[3])
    begin = 0
    for row, first, end in pieces:
        mine = query[:, :, begin : begin + end - first]
        where = torch.tensor([row], device=DEVICE), torch.tensor([end - 1], device=DEVICE)
        alone = attend(mine, *given, where, 0.3, drawn.window, **more)
        assert torch.equal(joined[:, begin : begin + end - first], alone)
        begin += end - first


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [300, 3000])
def test_bits_on_a_gpu(tokens: int, cuda: torch.device) -> None:
    """With tensor cores too, at the shapes of gpt-oss, Qwen3 and DeepSeek, whole and in pieces of 1 to 700 tokens."""
    for width, value_width, heads, kv_heads, window in ((64, 64, 16, 2, 128), (64, 64, 16, 2, None), (128, 128, 8, 1, None), (192, 128, 4, 4, None)):  # fmt: skip
        query = torch.randn(1, heads, tokens, width, device=cuda, dtype=torch.bfloat16)
        keys, values = (
            torch.randn(1, kv_heads, 4096, w, device=cuda, dtype=torch.bfloat16) for w in (width, value_width)
        )
        row, begin, attend = torch.zeros(1, dtype=torch.long, device=cuda), 0, kernel()
        whole = attend(query, keys, values, (row, row + tokens - 1), 0.1, window)
        for size in (1, 77, 16, 700, tokens):
            end = min(begin + size, tokens)
            if end > begin:
                piece = attend(query[:, :, begin:end], keys, values, (row, row + end - 1), 0.1, window)
                assert torch.equal(piece[0], whole[0, begin:end]), (width, window, size)
            begin = end


def prompt_logits(llm: LLM, cut: int) -> Tensor:
    """Logits behind three prompts, read together, the longest in two pieces."""
    executor, order = llm._engine._executor, (2, 0, 3)
    executor.prefill([PromptChunk(0, PROMPTS[0][:cut], order[0], 0, len(PROMPTS[0]) - cut)])
    pieces = [PromptChunk(0, PROMPTS[0][cut:], order[0], cut)]
    pieces += [PromptChunk(n, PROMPTS[n], order[n], 0) for n in (1, 2)]
    return executor.prefill(pieces).clone()


def open_graph(folder: Path, device: str = "cpu", **options: Any) -> LLM:
    return LLM(folder, **{"device": device, "execution": "graph", "max_length": 32, "max_batch": 4, **options})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", DECODERS)
def test_prompts_are_near_stock(family: str, device: str, make_checkpoint: MakeCheckpoint) -> None:
    """In float32 within 1e-4 of the stock model, whatever is resident, windows shorter than the prompt included."""
    folder = make_checkpoint(family, spread=0.3)
    stock = load_resident(folder)
    with torch.inference_mode():
        expected = torch.cat([stock(torch.tensor([prompt])).logits[:, -1] for prompt in PROMPTS])
    found = []
    for slots in (3 * 8, 5):
        with open_graph(folder, device, slots=slots) as llm:
            assert llm.plan.prompt_attention == "kernel"
            found.append(prompt_logits(llm, 6).cpu())
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("gpt_oss", {}), ("qwen3_moe", {}), ("deepseek_v2", {}), ("qwen3_moe", {"head_dim": 24})],
)
def test_kernel_and_reference_give_a_model_the_same(
    family: str, sizes: dict, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding, through the model's own modules, whose queries, keys and values lie in memory in many ways."""
    found = []
    for attend in (kernel(), dense_reference.prompt_attention):
        chosen = replace(backend(DEVICE), prompt_attention=attend)
        monkeypatch.setattr("expertflow.execution.captured.dense.backend", lambda _, chosen=chosen: chosen)
        with open_graph(make_checkpoint(family, spread=0.3, **sizes), DEVICE.type) as llm:
            found.append(prompt_logits(llm, 6))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_no_mask_is_made_and_no_key_is_copied(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of graph execution asks for no mask, and its attention reads the KV rows themselves; host execution does neither."""
    asked: list[str] = []
    seen: list[Tensor] = []

    def attend(*given: Any, **more: Any) -> Tensor:
        seen.append(given[1])
        return dense_reference.prompt_attention(*given, **more)

    def masks(*given: Any) -> list[Tensor]:
        asked.append(execution)
        return own(*given)

    own = pytest.importorskip("expertflow.execution.kv_rows").step_masks
    monkeypatch.setattr("expertflow.execution.kv_rows.step_masks", masks)
    chosen = replace(backend(DEVICE), prompt_attention=attend)
    monkeypatch.setattr("expertflow.execution.captured.dense.backend", lambda _: chosen)
    for execution in ("graph", "host"):
        with open_graph(make_checkpoint("gpt_oss"), DEVICE.type, execution=execution) as llm:
            prompt_logits(llm, 6)
            rows = {layer.keys.data_ptr() for layer in llm._offloaded.handover.rows.cache.layers}
            if execution == "graph":
                assert {keys.data_ptr() for keys in seen} == rows
                assert len(seen) == 2 * len(rows)
                seen.clear()
    assert asked == ["host", "host"]
    assert not seen


@pytest.mark.parametrize("width", [272, 512])
def test_a_form_that_the_kernel_does_not_take_keeps_its_own(width: int, make_checkpoint: MakeCheckpoint) -> None:
    """Heads wider than the kernel takes are computed by the model, near stock, and the plan says so."""
    folder = make_checkpoint("qwen3_moe", spread=0.3, head_dim=width)
    stock = load_resident(folder)
    with torch.inference_mode():
        expected = torch.cat([stock(torch.tensor([prompt])).logits[:, -1] for prompt in PROMPTS])
    with open_graph(folder) as llm:
        assert llm.plan.prompt_attention == "model"
        torch.testing.assert_close(prompt_logits(llm, 6), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2"])
def test_a_pass_takes_memory_linear_in_length(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """Whole prompts of twice the length take twice the workspace in graph execution, and four times in host execution."""
    shape = shape_of(build_skeleton(make_checkpoint(family, max_position_embeddings=1 << 16), "auto"))
    taken: dict[str, list[int]] = {"graph": [], "host": []}
    for execution, found in taken.items():
        for length in (1 << 14, 1 << 15):
            options = {
                "max_length": length,
                "prefill_chunk": length,
                "max_batch": 1,
                "slots": 4,
                "execution": execution,
            }
            found.append(make_plan(EngineConfig(**options), shape, "cuda", "lru").workspace - (40 << 20))
    assert taken["graph"][1] < 2.1 * taken["graph"][0]
    assert taken["host"][1] > 3.5 * taken["host"][0]
    assert taken["graph"][1] < taken["host"][1] / 20


def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Within the shared memory that each has, and with Hopper's own products on Hopper."""
    pytest.importorskip("triton", reason="kernels need triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "compile_attention.py"), "80", "86", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made) == 6
    for arch, case, shared, room, hopper in made:
        assert 0 < shared <= room, case
        assert hopper == (arch >= 90), case
