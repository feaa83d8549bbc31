"""Which building blocks a model gets: found by what modules compute, so that a module that computes something else gets none."""

from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from expertflow import LLM
from expertflow.engine.llm import shipped_model
from expertflow.execution.blocks.forms import AttentionBlock, LatentBlock, LayerForm
from expertflow.execution.blocks.match import find_layers
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.models.families import FAMILIES
from expertflow.models.skeleton import build_skeleton
from helpers import ROOT, MakeCheckpoint

LATENT = {"deepseek_v2", "deepseek_v3"}
OWN_LAYERS = {"phimoe", "switch_transformers"}
"""Those of which not even the layer's sums are a block's: norms with a bias, and T5's layers."""
SHARED = {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}


class Halved(NamedTuple):
    """A cache in which latents are kept halved."""

    cache: Any

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache.update(keys / 2, values, layer)
        return 2 * keys, values


def forms(model_type: str, make_checkpoint: MakeCheckpoint, **overrides: object) -> list[LayerForm]:
    return list(find_layers(build_skeleton(make_checkpoint(model_type, **overrides), "auto")).values())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_get_the_blocks_their_modules_match(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """Attention, and a router with experts wherever there are experts; by each architecture's description."""
    found = forms(model_type, make_checkpoint)
    layers = FAMILIES[model_type].tiny.get("num_hidden_layers", 0)
    assert len(found) == (0 if model_type in OWN_LAYERS else layers)
    assert all(isinstance(form.heads, LatentBlock if model_type in LATENT else AttentionBlock) for form in found)
    routed = [form.experts for form in found if form.experts is not None]
    if model_type not in OWN_LAYERS:
        plain = FAMILIES[model_type].tiny.get("first_k_dense_replace", 1 if model_type == "ernie4_5_moe" else 0)
        assert [form.feed for form in found] == ["silu"] * plain + [None] * (layers - plain)
        assert len(routed) == layers - plain
    assert all((block.shared is not None) == (model_type in SHARED) for block in routed)
    assert all(block.feed == ("silu" if block.shared else None) for block in routed)


def test_attention_gets_what_its_source_says(make_checkpoint: MakeCheckpoint) -> None:
    """Neighbours are turned together in ERNIE and DeepSeek, and put apart in V3 alone; V2's angles are complex."""
    found = {
        name: forms(name, make_checkpoint)[0].heads for name in ("ernie4_5_moe", "deepseek_v2", "deepseek_v3", "olmoe")
    }
    assert found["ernie4_5_moe"].woven
    assert found["olmoe"].normed
    assert not found["olmoe"].woven
    v2, v3 = found["deepseek_v2"], found["deepseek_v3"]
    assert (v2.paired, v2.woven, v2.parted) == (True, True, False)
    assert (v3.paired, v3.doubled, v3.woven, v3.parted) == (False, True, True, True)
    plain = forms("deepseek_v3", make_checkpoint, rope_interleave=False, q_lora_rank=None)[0].heads
    assert (plain.woven, plain.parted) == (False, False)


def test_routers_get_the_rules_of_their_papers(make_checkpoint: MakeCheckpoint) -> None:
    """What no shape shows: groups and a correction in DeepSeek-V3, weights in float32 in Mixtral, no division in Qwen2-MoE."""
    rule = {
        name: forms(name, make_checkpoint)[-1].experts for name in ("deepseek_v3", "mixtral", "qwen2_moe", "gpt_oss")
    }
    v3 = rule["deepseek_v3"].rule
    assert (v3.scores, v3.groups, v3.kept_groups, v3.group_top, v3.normalised) == ("sigmoid", 4, 3, 2, True)
    assert (v3.wide_logits, rule["deepseek_v3"].correction) == (True, "gate.e_score_correction_bias")
    assert (rule["mixtral"].rule.normalised, rule["mixtral"].rule.wide_weights) == (True, True)
    assert (rule["qwen2_moe"].rule.normalised, rule["qwen2_moe"].rule.wide_weights) == (False, False)
    assert rule["gpt_oss"].rule.normalised or rule["gpt_oss"].rule.over_chosen


def test_what_computes_something_else_keeps_its_code(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that is scaled, a rotation the other way round, a router or a feed-forward block that doubles, latents kept otherwise.

    Each costs its block and no other.
    """
    assert not forms("granitemoe", make_checkpoint, residual_multiplier=0.5)

    def other_way(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return turn(q, k, cos, -sin)

    turn = qwen3_moe.apply_rotary_pos_emb
    with monkeypatch.context() as patched:
        patched.setattr(qwen3_moe, "apply_rotary_pos_emb", other_way)
        found = forms("qwen3_moe", make_checkpoint)
        assert found
        assert all(form.heads is None and form.experts is not None for form in found)
    turn_woven = deepseek_v3.apply_rotary_pos_emb_interleave
    with monkeypatch.context() as patched:
        patched.setattr(deepseek_v3, "apply_rotary_pos_emb_interleave", lambda q, k, c, s: turn_woven(q, k, c, -s))
        assert all(form.heads is None for form in forms("deepseek_v3", make_checkpoint))
    attend, feed = deepseek_v3.DeepseekV3Attention.forward, deepseek_v3.DeepseekV3MLP.forward
    with monkeypatch.context() as patched:
        patched.setattr(
            deepseek_v3.DeepseekV3Attention, "forward",
            lambda self, states, past_key_values=None, **more: attend(self, states, past_key_values=Halved(past_key_values), **more),
        )  # fmt: skip
        patched.setattr(deepseek_v3.DeepseekV3MLP, "forward", lambda self, states: 2 * feed(self, states))
        found = forms("deepseek_v3", make_checkpoint)
        assert all(form.heads is None and form.feed is None for form in found)
        assert [form.experts.feed for form in found[1:]] == [None] * (len(found) - 1)
    own = qwen3_moe.Qwen3MoeTopKRouter.forward

    def doubled(self: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = own(self, states)
        return logits, 2 * weights, index

    monkeypatch.setattr(qwen3_moe.Qwen3MoeTopKRouter, "forward", doubled)
    assert all(form.heads is not None and form.experts is None for form in forms("qwen3_moe", make_checkpoint))


def test_what_clamps_is_no_block(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the numbers that modules are tried with stay inside: queries, keys and values of OLMoE, a plain layer."""
    for clip, heads in ((None, True), (8.0, False), (100.0, False)):
        assert all((form.heads is not None) == heads for form in forms("olmoe", make_checkpoint, clip_qkv=clip)), clip
    feed = deepseek_v3.DeepseekV3MLP.forward
    monkeypatch.setattr(deepseek_v3.DeepseekV3MLP, "forward", lambda self, states: feed(self, states).clamp(-99, 99))
    assert all(form.feed is None for form in forms("deepseek_v3", make_checkpoint))


@pytest.mark.parametrize("told_by", ["attribute", "config"])
def test_layers_of_one_class_are_told_apart(
    told_by: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second layer rotates nothing, by an attribute of its attention or by a list in the config: those alone keep their code."""
    begin, run = qwen3_moe.Qwen3MoeAttention.__init__, qwen3_moe.Qwen3MoeAttention.forward

    def begun(self: torch.nn.Module, config: object, layer_idx: int) -> None:
        begin(self, config, layer_idx)
        if told_by == "attribute":
            self.use_rope = layer_idx % 2 == 0
        else:
            config.rotating = [place % 2 == 0 for place in range(config.num_hidden_layers)]

    def forward(
        self: torch.nn.Module, hidden_states: torch.Tensor, position_embeddings: tuple, *args: object, **more: object
    ) -> tuple:
        rotates = self.use_rope if told_by == "attribute" else self.config.rotating[self.layer_idx]
        cos, sin = position_embeddings
        angles = (cos, sin) if rotates else (torch.ones_like(cos), torch.zeros_like(sin))
        return run(self, hidden_states, angles, *args, **more)

    monkeypatch.setattr(qwen3_moe.Qwen3MoeAttention, "__init__", begun)
    monkeypatch.setattr(qwen3_moe.Qwen3MoeAttention, "forward", forward)
    assert [form.heads is not None for form in forms("qwen3_moe", make_checkpoint)] == [True, False, True]


def test_blocks_round_no_worse_than_modules() -> None:
    """The shipped model over a text, token by token: in bfloat16 blocks are no farther from float32 than the modules' own code is."""
    rows, found = 4, {}
    ids = AutoTokenizer.from_pretrained(shipped_model())((ROOT / "LICENSE").read_text()[:2000])["input_ids"]
    tokens = torch.tensor(ids[: rows * 16]).view(rows, 16)
    for dtype, blocks in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
        options = {"max_length": 16, "max_batch": rows, "max_live": rows, "slots": "100%", "predictor": "none"}
        with LLM(shipped_model(), device="cpu", execution="graph", dtype=dtype, **options) as llm:
            executor = llm._engine._executor
            executor.prefill([PromptChunk(row, tokens[row, :2].tolist(), row, 0) for row in range(rows)])
            decoder, said = llm._offloaded.handover.next_decoder(), []
            assert len(decoder._blocks.layers) == llm.plan.shape.layers
            if not blocks:
                decoder._dense = decoder._blocks = None
            for place in range(2, 15):
                fed = [DecodeInput(row, int(tokens[row, place]), row, place) for row in range(rows)]
                shares = executor.decode(fed).float().log_softmax(1)
                said.append(shares.gather(1, tokens[:, place + 1 :][:, :1]))
            found[dtype, blocks] = torch.cat(said)
    torch.testing.assert_close(found["float32", True], found["float32", False], atol=1e-4, rtol=0)
    apart = {blocks: (found["bfloat16", blocks] - found["float32", False]).abs().mean() for blocks in (False, True)}
    assert 0 < apart[True] < 1.5 * apart[False]
