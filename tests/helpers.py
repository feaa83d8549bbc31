"""What several test modules share: checkpoints run whole, made-up traces and predictors, commands run in this process.

Fixtures are in `conftest.py`, which sets the environment before this module imports torch.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from typer.testing import CliRunner

from expertflow.cli.main import app
from expertflow.models.families import FAMILIES
from expertflow.models.skeleton import build_skeleton
from expertflow.predict.artifact import Artifact
from expertflow.predict.counts import SOURCES, Memory, remember
from expertflow.predict.dataset import Passage, Shape
from expertflow.predict.kinds import make
from expertflow.predict.network import OUTPUTS, PredictorConfig
from expertflow.trace.format import DECODE, Header, Rows, Trace

ROOT = Path(__file__).parents[1]
"""The repository."""
EXCERPT = ROOT / "tests" / "data" / "gpt_oss_20b_excerpt" / "routing.trace"
"""A recorded trace of gpt-oss-20b."""
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DEVICE = torch.device(DEVICES[-1])
"""Where kernels run: the CUDA device, or the CPU in Triton's interpreter."""
GUARD = 120
"""Seconds after which something hangs."""
PREDICTOR_SIZES = {
    "layers": 3, "experts": 8, "top_k": 2, "vocabulary": 20, "embedding": 8, "width": 16, "matches": 4, "key": 4,
}  # fmt: skip
"""Of a random predictor, where a test states no other."""

MakeCheckpoint = Callable[..., Path]
"""Type of the fixture `make_checkpoint`."""
MakePredictor = Callable[..., Path]
"""Type of the fixture `make_predictor`."""


def model_class(config: object) -> type[PreTrainedModel]:
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config)]


def save_checkpoint(
    folder: Path,
    model_type: str,
    dtype: str,
    overrides: Mapping[str, object],
    *,
    seed: int,
    shard: str = "5GB",
    spread: float = 0,
) -> None:
    """Save a small random model of a family, with a tokenizer.

    `spread`: standard deviation of the weights, wide enough that tokens depend on all that is seen; 0: as drawn.
    """
    tiny = FAMILIES[model_type].tiny if model_type in FAMILIES else {}
    config = AutoConfig.for_model(model_type, **{**tiny, **overrides})
    torch.manual_seed(seed)
    model = model_class(config)(config)
    for name, parameter in model.named_parameters() if spread else ():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1 if "embed" in name else spread)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    _save_tokenizer(folder, config.get_text_config(decoder=True).vocab_size)


def _save_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer of printable characters, enough to read prompts and show text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [chr(code) for code in range(33, 127)]
    words = ["<pad>", "<s>", "</s>", *printable, *(c for c in alphabet if c not in printable)][:size]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def load_resident(folder: Path) -> PreTrainedModel:
    """The stock model with every expert in memory, running its family's own eager code."""
    config = AutoConfig.from_pretrained(folder)
    # Switch is outside the experts registry and has no other implementation than its own
    options = {} if config.model_type == "switch_transformers" else {"experts_implementation": "eager"}
    model = model_class(config).from_pretrained(folder, dtype="auto", **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # out of the memory map, whose alignment would change the bits of a GEMM
    return model


def random_future(folder: Path) -> np.ndarray:
    """A recording of some other run: whatever a strategy predicts, the output must not change."""
    skeleton = build_skeleton(folder, "auto")
    return np.random.default_rng(0).random((40, len(skeleton.expert_modules), skeleton.experts)) < 0.3


def make_trace(rows: int, layers: int = 2, experts: int = 8, top_k: int = 2, seed: int = 0) -> Trace:
    random = np.random.default_rng(seed)
    ids = random.permuted(np.tile(np.arange(experts), (rows, layers, 1)), axis=2)[..., :top_k]
    columns = Rows(
        ids.astype(np.uint8 if experts < 256 else np.uint16),
        random.random((rows, layers, top_k)).astype(np.float16),
        random.integers(-1, 50, rows).astype(np.int32),
        np.full(rows, DECODE, dtype=np.uint8),
        np.sort(random.integers(0, 4, rows)).astype(np.int32),
        np.arange(rows, dtype=np.int32),
    )
    header = Header(layers=layers, experts=experts, top_k=top_k, model="made up")
    return Trace(
        header=header,
        rows=columns,
        sequences=tuple({"sequence": s} for s in range(4)),
        vocabulary=tuple(map(str, range(50))),
    )


def random_predictor(kind: str = "path", seed: int = 0, **sizes: int) -> torch.nn.Module:
    """Random weights everywhere, the gates of the sources included."""
    torch.manual_seed(seed)
    model = make(
        PredictorConfig(kind=kind, **{**PREDICTOR_SIZES, "window": 256 if kind == "t5" else 16, **sizes})
    ).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.vocabulary.learn(torch.arange(sizes.get("vocabulary", 20) - 3))  # three ids were never seen
    return model


def random_artifact(kind: str = "path", **sizes: int) -> Artifact:
    model = random_predictor(kind, **sizes)
    torch.manual_seed(1)
    weights = torch.randn(2 + SOURCES, OUTPUTS, model.config.layers, 1) * 0.5
    weights[0] += 1
    return Artifact(
        model=model, memory=random_memory(model.config), calibration=weights, fingerprint="feed", made_for="made up"
    )


def random_memory(config: PredictorConfig) -> Memory:
    """Of a text in which every token is followed by the next number."""
    random = np.random.default_rng(0)
    tokens = np.arange(200) % config.vocabulary
    every = np.tile(np.arange(config.experts), (200, config.layers, 1))
    routes = random.permuted(every, axis=2)[..., : config.top_k]
    shape = Shape(config.layers, config.experts, config.top_k)
    return remember([Passage(tokens, routes, np.arange(200), {})], shape, config.vocabulary, 3000)


class Done(NamedTuple):
    """What a command wrote."""

    stdout: str
    stderr: str


def run(*words: object) -> Done:
    """Run a command in this process; its error, if any, is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Done(result.stdout, result.stderr)


def commands(group: Any, before: str = "") -> Iterator[str]:
    """Names of all commands, those of groups after the group's."""
    for name, command in group.commands.items():
        yield from commands(command, f"{before}{name} ") if hasattr(command, "commands") else [before + name]
