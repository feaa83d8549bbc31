"""Models of published sizes with random weights, opened through `LLM`: what the full-size benchmarks run on.

Experts lie in page-locked host memory once; models with other slots and strategies are opened beside the first.
Recorded sequences of a trace stand in for text: random weights route every token alike, and a recording has the routes
of a trained model.
"""

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import DeepseekV2Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from expertflow import LLM
from expertflow.bench.shared_host import library_bytes, release
from expertflow.execution.replay import Replay
from expertflow.models.weights.sources import RandomWeights
from expertflow.predict.artifact import load_artifact, save_artifact
from expertflow.trace.format import Trace

SEED = 11
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
WIDE = 60.0
"""Times the deviation of other weights that shape q's embeddings have: routing is then spread, and the cache is measured."""
SPECIAL = 3
"""Random tokens are drawn from here on: the first ones pad, begin and end."""


STAND_IN = "stand-in"
"""Fingerprint of these models where a predictor names none."""


def device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


PACKED: Mapping[str, dict[str, Any]] = MappingProxyType({
    "mxfp4": {"quant_method": "mxfp4"},
    "int4": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}}},
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "nvfp4": {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}}},
    },
})  # fmt: skip
"""`quantization_config` of packed experts, by the name that results have for it; `bf16` has none."""


def make_config(shape: str, *, tiny: bool, packed: str = "bf16") -> PreTrainedConfig:
    """The sizes of a model.

    Args:
        shape: `q`: Qwen3-MoE, 12 layers x 128 experts top-8; `q30`: Qwen3-30B-A3B, 48 layers of them. `g`: gpt-oss-20b, 24 layers x 32
            experts top-4; `g120`: gpt-oss-120b, 36 layers x 128. `d`: DeepSeek-V2-Lite, 27 layers of latent attention, of which 26 have
            64 experts top-6 and two shared ones; without its rotary scaling. `s`: Switch-128's, 12 MoE layers x 128 experts top-1, in the blocks
            of a decoder-only model.
        tiny: small widths, for a CPU; layers, experts and vocabulary stay where a recording or a predictor needs them.
        packed: how experts are stored: `bf16` or a key of `PACKED`.
    """
    more = {} if packed == "bf16" else {"quantization_config": PACKED[packed]}
    return _sizes(shape, more, tiny=tiny)


def _sizes(shape: str, more: dict[str, Any], *, tiny: bool) -> PreTrainedConfig:
    if shape in {"q", "q30"}:
        sizes = {"num_hidden_layers": 12, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
                 "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
                 "intermediate_size": 6144}  # fmt: skip
        sizes |= {"num_hidden_layers": 48, "vocab_size": 151936} if shape == "q30" else {}
        small = {**TINY, "moe_intermediate_size": 32, "num_experts": 16, "head_dim": 16}
        common = {"num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False, **more}
        return Qwen3MoeConfig(max_position_embeddings=4096, **common, **(small if tiny else sizes))
    if shape == "d":
        sizes = {"num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
                 "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "kv_lora_rank": 512,
                 "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400}  # fmt: skip
        small = {**TINY, "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8,
                 "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
        return DeepseekV2Config(
            n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None, topk_method="greedy", n_group=1,
            topk_group=1, max_position_embeddings=4096, pad_token_id=0, tie_word_embeddings=False, **more, **(small if tiny else sizes),
        )  # fmt: skip
    if shape == "s":
        sizes = {"hidden_size": 768, "moe_intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12,
                 "head_dim": 64, "vocab_size": 201088}  # fmt: skip
        small = {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 16, "vocab_size": 201088}  # fmt: skip
        return Qwen3MoeConfig(
            num_hidden_layers=12, num_experts=128, num_experts_per_tok=1, intermediate_size=2048, pad_token_id=0,
            **(small if tiny else sizes),
        )  # fmt: skip
    small = {**TINY, "intermediate_size": 32, "head_dim": 16, "vocab_size": 201088}
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
             "head_dim": 64, "vocab_size": 201088}  # fmt: skip
    layers, experts = (36, 128) if shape == "g120" else (24, 32)
    common = {"num_local_experts": experts, "num_experts_per_tok": 4, "pad_token_id": 0, **more}
    return GptOssConfig(**common, **{**(small if tiny else sizes), "num_hidden_layers": layers})


def resized(config: PreTrainedConfig, sizes: Mapping[str, int]) -> PreTrainedConfig:
    """The config with other sizes; kinds of layers follow from their number."""
    return type(config)(**{**config.to_dict(), "layer_types": None, **sizes})


def random_tokens(vocabulary: int, *shape: int) -> list[Any]:
    """Random tokens, none of them special, the same ones every time."""
    return torch.randint(SPECIAL, vocabulary, shape, generator=torch.Generator().manual_seed(SEED)).tolist()


class Parts(NamedTuple):
    """Parts of a trace's sequences.

    Attributes:
        tokens: ids of each part, 0 where unknown.
        routes: `[n, L, K]` of each part, the experts of every position.
        known: sequences of the trace whose tokens are all known.
    """

    tokens: list[list[int]]
    routes: list[npt.NDArray[np.integer]]
    known: int

    @property
    def replay(self) -> Replay:
        """A recording a part."""
        return Replay(self.routes, self.tokens)


def parts_of(trace: Trace, lengths: Sequence[int]) -> Parts:
    """A part of so many positions for each length: sequences alternate, and each goes on where its last part ended, over and over.

    Sequences whose tokens are known come first.
    """
    numbers = trace.rows.sequence
    rows = [np.flatnonzero(numbers == number) for number in np.unique(numbers[numbers >= 0])]
    rows.sort(key=lambda mine: -trace.rows.tokens[mine].min())
    begins, tokens, routes = [0] * len(rows), [], []
    for place, length in enumerate(lengths):
        mine, which = rows[place % len(rows)], place % len(rows)
        part = mine[(begins[which] + np.arange(length)) % len(mine)]
        begins[which] += length
        tokens.append(np.maximum(trace.rows.tokens[part], 0).tolist())
        routes.append(trace.rows.experts[part])
    return Parts(tokens, routes, sum(trace.rows.tokens[mine].min() >= 0 for mine in rows))


class Opened(NamedTuple):
    """A model that is open beside others.

    Attributes:
        llm: the model.
        others: bytes of device memory that were in use before and stay so.
    """

    llm: LLM
    others: int

    @property
    def peak(self) -> int:
        """Device memory in use at most since it was opened, bytes, of this model alone."""
        return self.llm.stats.peak_bytes - self.others


class StandIn:
    """A model of random weights, whose experts lie in host memory once.

    Args:
        config: the model's sizes.
        embedding: as of `RandomWeights`.
        predictor: folder of a predictor that models opened with it will use; the weights then carry its model's fingerprint.
        options: fields of `EngineConfig` that all models have.
    """

    def __init__(
        self, config: PreTrainedConfig, *, embedding: float = 1.0, predictor: Path | None = None, **options: Any
    ) -> None:
        """Draw the weights; they live as long as this object."""
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        config.save_pretrained(folder)
        self._library = library_bytes(device())
        mark, self.folder, self._predictor = "", folder, "none"
        if predictor is not None:
            artifact = load_artifact(predictor)
            mark, self._predictor = artifact.fingerprint, str(predictor)
            if not mark:  # it was trained from a recording whose model is unknown: this model stands in for that one
                mark, self._predictor = STAND_IN, str(folder / "stand_in_predictor")
                save_artifact(replace(artifact, fingerprint=STAND_IN), Path(self._predictor))
        self._options = {"dtype": "bfloat16", "device": device(), **options}
        weights = RandomWeights(seed=SEED, embedding=embedding, fingerprint=mark)
        small = {**self._options, "max_batch": 1, "max_live": 1, "max_length": 8}
        self.owner = LLM(folder, weights=weights, slots="1/layer", strategy="on-demand", execution="host", predictor="none", **small)  # fmt: skip

    @contextmanager
    def open(self, *, predicted: bool = False, **options: Any) -> Iterator[Opened]:
        """A model beside the others, closed at the end.

        Args:
            predicted: whether it uses the predictor.
            options: of `LLM`.
        """
        release()
        others = torch.cuda.memory_allocated() - self._library if device() == "cuda" else 0
        predictor = self._predictor if predicted else "none"
        llm = LLM(self.folder, beside=self.owner, **{**self._options, "predictor": predictor, **options})
        try:
            yield Opened(llm, others)
            if llm.predictor_failure:
                raise SystemExit(f"the predictor failed: {llm.predictor_failure}")
        finally:
            llm.close()
            del llm
            release()

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the memory."""
        self.owner.close()
        self._scratch.cleanup()
        gc.collect()
        release()
