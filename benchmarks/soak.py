"""Ten thousand decode steps with budgets, strategies and batches drawn at random: every logit the all-resident run's.

Through `LLM` and its engine. A small Qwen3-MoE with random bf16 weights, and a predictor with random weights, the worst
there is: it may cost loads, never a bit. Each draw opens the model anew inside a budget and feeds in the tokens of the
all-resident run. The logits of every step are compared bit for bit, and the measured peak with the budget. Halfway,
some draws lose sequences.

Usage: python benchmarks/soak.py [--steps 10000] [--out FILE]
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.cache.strategy import STRATEGIES
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.execution.replay import Replay
from expertflow.kernels.residency.state import refusal
from expertflow.predict.artifact import Artifact, save_artifact
from expertflow.predict.counts import SOURCES, remember
from expertflow.predict.dataset import Shape
from expertflow.predict.kinds import make
from expertflow.predict.model import OUTPUTS, PredictorConfig

SEED, PROMPT, TOKENS, BATCHES = 5, 12, 250, (1, 4)
NAMES = [name for name, row in STRATEGIES.items() if not row.needs_future and not refusal(row, given=row.predicted)]
LAYERS, EXPERTS, VOCABULARY = 6, 16, 512


def make_model(folder: Path) -> None:
    """A small checkpoint."""
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        num_hidden_layers=LAYERS, hidden_size=128, moe_intermediate_size=64, num_experts=EXPERTS, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY, intermediate_size=128,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def make_predictor(model: Path, folder: Path) -> None:
    """A predictor that was not trained."""
    prepared = prepare(model, EngineConfig(device="cpu", predictor="none"))
    network = make(
        PredictorConfig(layers=LAYERS, experts=EXPERTS, top_k=2, vocabulary=VOCABULARY, width=32, embedding=16)
    )
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    network.vocabulary.learn(torch.arange(VOCABULARY))
    artifact = Artifact(
        model=network.eval(), memory=remember((), Shape(LAYERS, EXPERTS, 2), VOCABULARY, 0),
        calibration=torch.ones(2 + SOURCES, OUTPUTS, LAYERS, 1), fingerprint=prepared.fingerprint, made_for="soak",
    )  # fmt: skip
    save_artifact(artifact, folder)


def run(llm: LLM, prompts: list[list[int]], keep: int) -> tuple[list[list[int]], list[list[Tensor]]]:
    """Tokens of each sequence, and its logits `[V]` step by step. The last `keep` steps lose a sequence."""
    engine, params = llm.engine, SamplingParams(max_tokens=TOKENS + 1, ignore_eos=True)
    numbers = [engine.add(llm.request(prompt, params, index=index)) for index, prompt in enumerate(prompts)]
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]

    def watch(stepped: Sequence[int], found: Tensor) -> None:
        for number, row in zip(stepped, found.to("cpu", copy=True), strict=True):
            logits[numbers.index(number)].append(row)

    engine.watch_logits(watch)
    while engine.unfinished:
        for _, output in engine.step():
            tokens[output.index].append(output.token_id)
        if len(tokens[0]) == TOKENS - keep + 1 and len(prompts) > 1 and engine.knows(numbers[1]):
            engine.cancel(numbers[1])
    engine.watch_logits(None)
    return tokens, logits


def main() -> None:
    """Draw, run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, random = time.perf_counter(), np.random.default_rng(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as place:
        model, predictor = Path(place) / "model", Path(place) / "predictor"
        make_model(model)
        make_predictor(model, predictor)
        settings = {"device": device, "execution": "graph", "max_length": 512, "max_batch": 4, "prefill_chunk": 32}
        truth = {}
        with LLM(model, predictor="none", **settings) as llm:
            for count in BATCHES:
                prompts = random.integers(3, VOCABULARY, (count, PROMPT)).tolist()
                truth[count] = prompts, *run(llm, prompts, 0)
        done, wrong, over, drawn = 0, 0, 0, Counter()
        while done < options.steps:
            name, count = str(random.choice(NAMES)), int(random.choice(BATCHES))
            prompts, tokens, logits = truth[count]
            chosen = {"strategy": name, "predictor": str(predictor) if name == "plec" else "none"}
            least = prepare(model, EngineConfig(**settings, **chosen, slots=1)).plan
            most = least.fixed + LAYERS * EXPERTS * least.record_bytes
            budget = int(random.integers(least.total, most + 1)) if random.random() < 0.8 else least.total
            fed = Replay(tokens=[[*prompt, *more] for prompt, more in zip(prompts, tokens, strict=True)])
            with LLM(model, gpu_memory=budget, routing=fed, **settings, **chosen) as llm:
                keep = TOKENS // 2 if random.random() < 0.5 else 0
                _, found = run(llm, prompts, keep)
                for mine, theirs in zip(found, logits, strict=True):
                    wrong += sum(not torch.equal(one, other) for one, other in zip(mine, theirs, strict=False))
                assert [len(mine) for mine in found] == [TOKENS + 1 - keep * (place == 1) for place in range(count)]
                over += llm.stats.peak_bytes > budget
                assert llm.predictor_failure is None
                drawn[name] += 1
                done += TOKENS
                print(f"{time.perf_counter() - began:4.0f} s {done:6d} steps  {name:11s} B={count} slots {llm.plan.slots:3d} of {LAYERS * EXPERTS}, keep {keep}: "
                      f"{'exact' if not wrong else f'{wrong} WRONG'}, peak {llm.stats.peak_bytes} {'<=' if not over else '>'} {budget}", flush=True)  # fmt: skip
    result = {
        **about(device)._asdict(), "benchmark": "soak", "seed": SEED, "steps": done, "draws": dict(drawn),
        "steps_with_other_logits": wrong, "draws_over_budget": over, "seconds": time.perf_counter() - began,
        "config": {"layers": LAYERS, "experts": EXPERTS, "batches": BATCHES, "tokens_a_draw": TOKENS, "dtype": "bfloat16"},
    }  # fmt: skip
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if wrong or over:
        raise SystemExit("not exact, or over budget")


if __name__ == "__main__":
    main()
