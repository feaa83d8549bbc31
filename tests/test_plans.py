"""Plans as a whole: random budgets, lengths, formats and families, pure; and random plans carried out on a CPU."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers import SwitchTransformersConfig as SwitchConfig

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.engine.plan import Plan, make_plan
from expertflow.engine.prepare import prepare
from expertflow.errors import BudgetError
from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import PLAIN
from expertflow.formats.records import StoreLayout
from expertflow.models.families import FAMILIES
from expertflow.models.shape import ModelShape
from expertflow.models.weights.sources import RandomWeights
from helpers import MakeCheckpoint

EXAMPLES = 340
"""Each makes six plans or more."""
PAGE, SPARE, ALIGNMENT, FULL = 64, 2, 256, None
"""What the documents say of pages and slots, written down again."""
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}}},
}  # fmt: skip
QWEN3 = {
    "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
LITE = {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "num_hidden_layers": 27,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "vocab_size": 102400, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 32768,
}  # fmt: skip


class Known(NamedTuple):
    """A model, and what its published figures say: bytes of a token's keys and values a layer, windows, bytes of an expert (0: not known)."""

    config: PreTrainedConfig
    kv: int
    windows: tuple[int | None, ...]
    expert: int


KNOWN: Mapping[str, Known] = {
    "Qwen3-30B": Known(Qwen3MoeConfig(**QWEN3), 2 * 4 * 128 * 2, (FULL,) * 48, 3 * 2048 * 768 * 2),
    "Qwen3-30B fp8": Known(Qwen3MoeConfig(**QWEN3, quantization_config=FP8), 2 * 4 * 128 * 2, (FULL,) * 48, 0),
    "Qwen3-30B int4": Known(Qwen3MoeConfig(**QWEN3, quantization_config=INT4), 2 * 4 * 128 * 2, (FULL,) * 48, 0),
    "gpt-oss": Known(GptOssConfig(), 2 * 8 * 64 * 2, (128, FULL) * 18, (3 * 2880 * 2880 + 3 * 2880) * 2),
    "gpt-oss mxfp4": Known(
        GptOssConfig(quantization_config={"quant_method": "mxfp4"}), 2 * 8 * 64 * 2, (128, FULL) * 18,
        3 * 2880 * 2880 // 32 * 17 + 3 * 2880 * 2,
    ),
    "Mixtral": Known(MixtralConfig(), 2 * 8 * 128 * 2, (FULL,) * 32, 3 * 4096 * 14336 * 2),
    "DeepSeek-V2-Lite": Known(DeepseekV2Config(**LITE), (512 + 64) * 2, (FULL,) * 27, 3 * 2048 * 1408 * 2),
    "Switch": Known(SwitchConfig(num_experts=128), 0, (), 2 * 768 * 2048 * 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelShape]:
    """Figures of published sizes, from configs alone; one with a layer that is a little larger, and one that is large."""
    found = {}
    options = EngineConfig(device="cpu", slots=1, max_length=64, dtype="bfloat16", predictor="none")
    for name, known in KNOWN.items():
        folder = tmp_path_factory.mktemp("config")
        known.config.save_pretrained(folder)
        found[name] = prepare(folder, options, weights=RandomWeights()).plan.shape
    base = found["Qwen3-30B int4"]
    packed = base.records.layers[0].specs
    extra = TensorSpec(name="extra", shape=(256, 1024), dtype="bfloat16", format=PLAIN)
    mixed = [base.specs, *[packed] * 40, *[(*packed, extra)] * 7]
    found["Qwen3-30B mixed"] = replace(base, records=StoreLayout.of(mixed))
    return found


NAMES = [*KNOWN, "Qwen3-30B mixed"]
WISHES = st.fixed_dictionaries({
    "name": st.sampled_from(NAMES), "device": st.sampled_from(["cpu", "cuda", "cuda"]),
    "execution": st.sampled_from(["host", "graph", "auto"]), "batch": st.integers(1, 16), "live": st.integers(1, 4),
    "length": st.integers(2, 24000), "kept": st.none() | st.floats(0, 1), "chunk": st.none() | st.integers(1, 9000),
    "slots": st.none() | st.sampled_from([1, "3/layer", "25%", "100%"]), "predictor": st.sampled_from([0, 50 << 20]),
    "share": st.floats(0, 1.1), "more": st.floats(0, 0.3),
})  # fmt: skip


class Wish:
    """Options without a budget, and the plans that budgets make of them."""

    def __init__(self, shape: ModelShape, drawn: Mapping[str, Any]) -> None:
        self.shape, self.device, self.predictor = shape, drawn["device"], drawn["predictor"]
        length, live = drawn["length"], drawn["batch"] * drawn["live"]
        kept = None if drawn["kept"] is None or not shape.windows else length + int(drawn["kept"] * (live - 1) * length)
        self.options = {
            "execution": drawn["execution"], "max_batch": drawn["batch"], "max_live": live, "max_length": length,
            "kv_tokens": kept, "prefill_chunk": drawn["chunk"], "slots": drawn["slots"], "device": self.device,
        }  # fmt: skip

    @property
    def only_slots_depend_on_budgets(self) -> bool:
        stated = [name for name in ("prefill_chunk", "kv_tokens") if self.options[name] is not None]
        enough = "prefill_chunk" in stated and (len(stated) == 2 or not self.shape.windows)
        return enough and self.options["slots"] is None and self.options["execution"] != "auto"

    def plan(self, budget: int | None = None, **changed: Any) -> Plan:
        config = EngineConfig(gpu_memory=budget, **{**self.options, **changed})
        return make_plan(config, self.shape, self.device, "next-use", predictor=self.predictor)

    def least(self, **changed: Any) -> int:
        with pytest.raises(BudgetError) as refused:
            self.plan(1, **changed)
        return refused.value.least_bytes


def kv_bytes(plan: Plan, known: Known) -> int:
    """Pages of each layer times 64 tokens, as few as the longest reach of a window and a pass need, and four bytes an entry of each table."""
    rows, length, chunk = plan.max_live, plan.max_length, plan.prefill_chunk
    columns, total, kinds = -(-length // PAGE), 0, set()
    for window in known.windows:
        pages, whole = plan.kv_tokens // PAGE, rows * columns
        if window is not None and window < length:
            # tokens before the one that is computed lie in so many pages at most, and it in one more
            behind = -(-(window - 1) // PAGE) + 1
            # a pass gives a page's first token to each of its pieces, the rest fills pages
            pieces = min(rows, chunk)
            whole = min(whole, rows * behind + (chunk + pieces * (PAGE - 2)) // PAGE)
        kinds.add(window if window is not None and window < length else None)
        total += (SPARE + min(pages, whole)) * PAGE * known.kv
    return total + 4 * len(kinds) * rows * columns


def check(plan: Plan, known: Known | None) -> None:
    """The parts add up, keys and values and slots are those of the published sizes, and options keep their bounds."""
    shape, options = plan.shape, plan
    if known is not None:
        assert plan.kv == (kv_bytes(plan, known) if known.windows else plan.kv)
        if known.expert and not (plan.device == "cpu" and plan.execution == "host"):
            assert known.expert <= plan.record_bytes <= 1.01 * known.expert
    large = [
        size for size in shape.records.layer_bytes if size > 1.25 * sorted(shape.records.layer_bytes)[shape.layers // 2]
    ]
    decoded = plan.device == "cpu" and plan.execution == "host"
    numbers = [sum(-(-spec_bytes(spec) // ALIGNMENT) * ALIGNMENT for spec in one.specs) for one in shape.records.layers]
    slot = max(numbers) if decoded else shape.records.record_bytes
    always = 0 if decoded else shape.experts * sum(large) + len(large) * ALIGNMENT
    beside = plan.dense + plan.kv + plan.workspace + plan.graph + plan.predictor + always
    assert plan.total == beside + plan.slots * slot + ALIGNMENT
    experts = shape.experts * (shape.layers - (0 if decoded else len(large)))
    assert 1 <= plan.slots <= experts
    whole = -(-plan.max_length // PAGE) * PAGE
    if shape.windows:
        assert whole <= plan.kv_tokens
        assert plan.kv_tokens % PAGE == 0
    kept = plan.kv_tokens if None in shape.windows else options.max_batch * plan.max_length
    assert 1 <= plan.prefill_chunk <= min(kept, options.max_batch * plan.max_length)


def spec_bytes(spec: TensorSpec) -> int:
    count = 2  # bytes of a number
    for size in spec.shape:
        count *= size
    return count


@settings(max_examples=EXAMPLES)
@given(drawn=WISHES)
def test_every_plan_keeps_its_budget(drawn: dict[str, Any], shapes: dict[str, ModelShape]) -> None:
    """Any budget: the parts fit, slots are as many as fit; the least budget stated works, and a byte less does not."""
    wish = Wish(shapes[drawn["name"]], drawn)
    least = wish.least()
    smallest, known = wish.plan(least), KNOWN.get(drawn["name"])
    assert smallest.total <= least
    assert wish.least() == least
    with pytest.raises(BudgetError) as refused:
        wish.plan(least - 1)
    assert refused.value.least_bytes == least
    all_resident = wish.plan(slots="100%").resident_total
    budget = least + int(drawn["share"] * max(0, all_resident - least))
    plan = wish.plan(budget)
    for one in (smallest, plan):
        check(one, known)
    assert plan.total <= budget
    if drawn["slots"] is None and plan.slots < plan.competing:
        assert plan.total + plan.slot_layout.record_bytes > budget
    assert plan.least <= least
    if wish.only_slots_depend_on_budgets:
        assert wish.plan(plan.total).slots == plan.slots
        if plan.slots > 1:
            assert wish.plan(plan.total - 1).slots == plan.slots - 1
    more = wish.plan(budget + int(drawn["more"] * budget))
    if more.execution == plan.execution:
        # a pass whose size the plan chooses, or that few tokens are kept for, may grow; nothing else takes slots or tokens away
        grown, grows = more.workspace - plan.workspace + more.kv - plan.kv, more.prefill_chunk > plan.prefill_chunk
        assert more.slots >= plan.slots - (max(0, grown) // plan.slot_layout.record_bytes + 1) * (
            drawn["chunk"] is None or grows
        )
        assert more.kv_tokens >= plan.kv_tokens or more.prefill_chunk > plan.prefill_chunk


@settings(max_examples=EXAMPLES // 4)
@given(drawn=WISHES, longer=st.integers(1, 8192))
def test_longer_sequences_need_more(drawn: dict[str, Any], longer: int, shapes: dict[str, ModelShape]) -> None:
    """Longer sequences, more of them, or a larger pass: the least budget and what is taken beside slots never shrink."""
    wish, number = Wish(shapes[drawn["name"]], drawn), drawn["batch"]
    least, fixed = wish.least(), wish.plan().fixed
    length = drawn["length"] + longer
    kept = wish.options["kv_tokens"]
    changes = [{"max_length": length, "kv_tokens": kept and kept + number * drawn["live"] * longer}]
    changes += [] if kept is None else [{"kv_tokens": kept + longer}]
    changes += [] if drawn["chunk"] is None else [{"prefill_chunk": drawn["chunk"] + longer}]
    for changed in changes:
        assert wish.least(**changed) >= least
        if drawn["execution"] != "auto":
            assert wish.plan(**changed).fixed >= fixed


class Drawn(NamedTuple):
    """A small model, options without memory, and what is drawn of the rest."""

    folder: Path
    options: dict[str, Any]
    draw: random.Random


def drawn_run(seed: int, make_checkpoint: MakeCheckpoint) -> Drawn:
    """Families take turns; a fifth of the runs are captured steps, and some experts are quantised."""
    draw = random.Random(seed)
    family = list(FAMILIES)[seed % len(FAMILIES)]
    graph = seed % 5 == 1 and not FAMILIES[family].no_graph
    batch, length = draw.choice([1, 2, 3]), draw.randint(8, 80)
    live = batch * draw.choice([1, 2])
    paged = family != "switch_transformers"
    options = {
        "device": "cpu", "execution": "graph" if graph else "host", "max_batch": batch, "max_live": live, "max_length": length,
        "kv_tokens": draw.randint(length, live * length) if paged and draw.random() < 0.5 else None,
        "prefill_chunk": draw.choice([None, draw.randint(3, 200)]), "strategy": draw.choice(["next-use", "lru-global", "ring"]),
        "batch_invariant": graph and draw.random() < 0.5, "expert_format": "mxfp4" if family in {"mixtral", "qwen3_moe", "gpt_oss"} and draw.random() < 0.7 else None,
    }  # fmt: skip
    return Drawn(make_checkpoint(family, draw.choice(["float32", "bfloat16"])), options, draw)


def prompts_of(plan: Plan, draw: random.Random) -> list[list[int]]:
    """Random lengths, then the longest ones that pages have room for, until a step is full."""
    most = plan.max_length - (0 if plan.shape.encoder_decoder else 2)
    lengths, tokens = [draw.randint(1, most) for _ in range(plan.max_batch)], plan.kv_tokens
    while len(lengths) < 2 * plan.max_batch and tokens > 2:
        lengths.append(min(most, tokens - 2))
        tokens -= -(-(lengths[-1] + 2) // PAGE) * PAGE
    return [[draw.randrange(3, plan.shape.vocabulary) for _ in range(length)] for length in lengths]


@pytest.mark.filterwarnings("ignore:experts are quantised")
@pytest.mark.parametrize("seed", range(40))
def test_a_random_plan_is_kept(seed: int, make_checkpoint: MakeCheckpoint) -> None:
    """Carried out on a CPU: the measured peak is within the plan, the plan within the budget, and much of it is used.

    The meter sees no temporaries inside operators, and few pages keep a step from being full: then nothing is said of what is used.
    """
    folder, options, draw = drawn_run(seed, make_checkpoint)
    bare = prepare(folder, EngineConfig(**options)).plan
    budget = bare.least + int(draw.choice([0, draw.random()]) * (bare.resident_total - bare.least))
    with LLM(folder, gpu_memory=budget, predictor="none", **options) as llm:
        plan, params = llm.plan, {"max_tokens": 2, "top_p": 0.9, "ignore_eos": True, "seed": 1}
        assert plan.total <= budget
        for temperature in (0.0, 0.8):
            llm.generate(prompts_of(plan, draw), SamplingParams(temperature=temperature, **params))
        peak = llm.stats.peak_bytes
    assert peak <= plan.total
    if plan.kv_tokens >= plan.max_batch * plan.max_length:
        assert peak >= 0.3 * plan.total
