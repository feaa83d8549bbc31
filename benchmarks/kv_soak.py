"""Requests of 1 to 3,000 tokens come and are cancelled at random for 10,000 steps; every answer has the bits that it has alone.

Through `LLM` and its engine, small models in float32 of three families: every token kept, sliding windows, latents. Each draw opens a
model anew: how many sequences step and live, tokens of keys and values (few, so that requests wait), tokens of a pass, slots and
strategy are drawn. Alone is a model of its own with every expert resident, one request at a time.

Logits have to be equal to the bit where a step has one size: with `batch_invariant`, or where sequences take turns one by one.
Elsewhere a library rounds a product by the number of its rows. There tokens have to be equal; one whose two candidates are closer
than `NEAR` is counted as a tie, and the answer is compared up to it. At the end of a draw the longest request runs
once more, which needs every page of it back. The measured peak has to be within the plan.

Usage: python benchmarks/kv_soak.py --out FILE [--steps 10000] [--deadline SECONDS] [--execution host|graph]
       --tiny: 240 steps and requests of at most 200 tokens, for a CPU
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.bench.shared_host import release
from expertflow.models.families import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict[str, dict[str, int]] = {"qwen3_moe": {}, "gpt_oss": {"sliding_window": 100}, "deepseek_v2": {}}
"""By family: what differs from the small model of the family's own."""
VOCABULARY, LONGEST, ANSWER = 384, 3000, 40
TINY_LONGEST, TINY_ANSWER = 200, 12
PROMPTS, WAITING, ARRIVAL, CANCEL = 24, 16, 0.5, 0.015
"""Prompts that requests are drawn from; requests in the engine at most; chances that one comes and that one is cancelled, a step."""
NEAR = 1e-4
"""Of the largest logit: candidates that are closer may change places by rounding."""
IDLE = 2000
"""Steps without a token after which requests hang."""


class Case(NamedTuple):
    """What the bits of an answer may depend on: family, execution, sequences of a step, tokens of a pass, and whether others must not matter."""

    family: str
    execution: str
    batch: int
    chunk: int | None
    invariant: bool

    @property
    def strict(self) -> bool:
        """Whether logits have to be equal to the bit."""
        return self.invariant or self.batch == 1


class Answer(NamedTuple):
    """Tokens, and the logits `[n, V]` that they were chosen from."""

    tokens: list[int]
    logits: Tensor


def make_model(family: str, folder: Path) -> None:
    """A small checkpoint whose tokens depend on all that is seen, in float32."""
    sizes = {**FAMILIES[family].tiny, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, **SIZES[family]}
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1 if "embed" in name else 0.3)
    model.to(torch.float32).save_pretrained(folder)


class Run:
    """Requests of one model.

    Args:
        llm: the model.
    """

    def __init__(self, llm: LLM) -> None:
        """No request yet."""
        self.llm, self.engine = llm, llm.engine
        self.finished = list[tuple[int, Answer]]()
        self._lines: dict[int, list[Tensor]] = {}
        self.engine.watch_logits(self._watch)

    def _watch(self, numbers: Sequence[int], logits: Tensor) -> None:
        for number, line in zip(numbers, logits.to("cpu", copy=True), strict=True):
            self._lines.setdefault(number, []).append(line)

    def add(self, prompt: list[int], limit: int) -> int:
        """Queue a request; its number."""
        return self.engine.add(self.llm.request(prompt, SamplingParams(max_tokens=limit, ignore_eos=True)))

    def step(self) -> tuple[int, list[tuple[int, Answer]]]:
        """Run a pass or step; how many tokens came, and the requests that ended."""
        outputs = self.engine.step()
        ended = [(number, one.output.token_ids) for number, one in outputs if one.output is not None]
        return len(outputs), [
            (number, Answer(list(tokens), torch.stack(self._lines.pop(number)))) for number, tokens in ended
        ]

    def alone(self, prompt: list[int], limit: int) -> Answer:
        """The answer to a request beside no other."""
        self.add(prompt, limit)
        for _ in range(IDLE):
            _, ended = self.step()
            if ended:
                return ended[0][1]
        raise SystemExit(f"a request of {len(prompt)} tokens hangs")

    def together(self, prompts: list[list[int]], answer: int, steps: int, draw: random.Random) -> Counter[str]:
        """Let requests come and be cancelled for so many steps, then end those that are left; fills `finished`."""
        counts, live, idle = Counter[str](), dict[int, int](), 0
        while counts["steps"] < steps or live:
            while counts["steps"] < steps and len(live) < WAITING and draw.random() < ARRIVAL:
                place = draw.randrange(len(prompts))
                live[self.add(prompts[place], draw.randint(1, answer))] = place
            if live and draw.random() < CANCEL:
                number = draw.choice(list(live))
                counts["cancelled"] += self.engine.cancel(number)
                del live[number]
                self._lines.pop(number, None)
            came, ended = self.step()
            self.finished += [(live.pop(number), found) for number, found in ended]
            idle = 0 if came or not live else idle + 1
            if idle > IDLE:
                counts["lost"] = len(live)
                break
            counts["steps"] += 1
        counts["finished"] = len(self.finished)
        return counts


class Soak:
    """Draws so far.

    Args:
        place: folder for the models.
        seed: of all that is drawn.
        sizes: tokens of the longest request, and of the longest answer.
    """

    def __init__(self, place: Path, seed: int, sizes: tuple[int, int]) -> None:
        """Nothing is drawn yet."""
        self.draw, self.place, (self.longest, self.answer) = random.Random(seed), place, sizes
        self.total, self.wrong, self.drawn = Counter[str](), list[str](), Counter[str]()
        self.largest = 0.0
        self._truths: dict[Case, list[Answer]] = {}
        self.prompts = self._prompts()

    def _prompts(self) -> list[list[int]]:
        """Of one token, around a page's end, of the longest request, and half of them short."""
        most = self.longest - self.answer
        lengths = [length for length in (1, 2, 63, 64, 65, 128) if length <= most] + [most]
        while len(lengths) < PROMPTS:
            short = self.draw.random() < 0.5
            lengths.append(int(most ** self.draw.random()) if short else self.draw.randint(1, most))
        return [[self.draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]

    def folder(self, family: str) -> Path:
        """The family's model, made once."""
        folder = self.place / family
        if not folder.exists():
            make_model(family, folder)
        return folder

    def options(self, case: Case) -> dict[str, Any]:
        """What an answer's bits may depend on."""
        return {
            "device": DEVICE, "predictor": "none", "max_length": self.longest, "execution": case.execution,
            "max_batch": case.batch, "prefill_chunk": case.chunk, "batch_invariant": case.invariant,
        }  # fmt: skip

    def truth(self, case: Case) -> list[Answer]:
        """The longest answer to each prompt, alone and resident; computed once."""
        if case not in self._truths:
            with LLM(self.folder(case.family), slots="100%", **self.options(case)) as llm:
                run = Run(llm)
                self._truths[case] = [run.alone(prompt, self.answer) for prompt in self.prompts]
            release()
        return self._truths[case]

    def case(self, execution: str) -> Case:
        """Draw what bits may depend on."""
        draw, invariant = self.draw, execution == "graph" and self.draw.random() < 0.5
        family = list(SIZES)[self.drawn.total() % len(SIZES)]
        return Case(family, execution, draw.choice([1, 4]), draw.choice([96, 512]), invariant)

    def once(self, execution: str, steps: int) -> str:
        """Draw a model and requests, run them, compare; a line that says what was found."""
        case, draw, began = self.case(execution), self.draw, time.perf_counter()
        truth = self.truth(case)
        more = {
            "max_live": draw.choice([case.batch, 6, 12]), "kv_tokens": int(self.longest * draw.uniform(1.03, 3)),
            "slots": draw.choice([3, 9, "50%", "100%"]), "strategy": draw.choice(["next-use", "lru-global", "ring"]),
            "schedule": "fifo", "admission": draw.choice(["at once", "pays"]),
        }  # fmt: skip
        more["max_live"] = max(more["max_live"], case.batch)
        with LLM(self.folder(case.family), **self.options(case), **more) as llm:
            run = Run(llm)
            counts = run.together(self.prompts, self.answer, steps, draw)
            longest = max(range(len(self.prompts)), key=lambda place: len(self.prompts[place]))
            run.finished.append((longest, run.alone(self.prompts[longest], self.answer)))
            counts["over"] += llm.stats.peak_bytes > llm.plan.total
            for place, answer in run.finished:
                self.compare(case, place, answer, truth[place], counts)
        release()
        self.total += counts
        self.drawn.update([f"{case.family} {case.execution}{' invariant' if case.invariant else ''}"])
        shown = ", ".join(f"{name} {value}" for name, value in counts.items() if value)
        return f"{time.perf_counter() - began:4.1f} s  {' '.join(map(str, case))} {more}: {shown}"

    def compare(self, case: Case, place: int, found: Answer, truth: Answer, counts: Counter[str]) -> None:
        """Count what differs, and note what may not."""
        length, expected = len(found.tokens), truth.tokens[: len(found.tokens)]
        where = f"{case} prompt of {len(self.prompts[place])} tokens, answer of {length}"
        same = next((at for at, two in enumerate(zip(found.tokens, expected, strict=True)) if two[0] != two[1]), length)
        read = min(length, same + 1)  # logits of the same tokens
        mine, theirs = found.logits[:read], truth.logits[:read]
        equal = (mine == theirs).all(-1)
        counts.update(lines=read, equal_lines=int(equal.sum()), tokens=length)
        self.largest = max(self.largest, float((mine - theirs).abs().max() / theirs.abs().max()))
        if case.strict and not (same == length and bool(equal.all())):
            self.wrong.append(f"{where}: other bits from token {int(equal.int().argmin())} on")
        elif same < length:
            line = theirs[same]
            if line[expected[same]] - line[found.tokens[same]] <= NEAR * line.abs().max():
                counts.update(ties=1)
            else:
                self.wrong.append(f"{where}: another token at {same}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: 10,000; 240 with --tiny")
    parser.add_argument("--of-a-draw", type=int, help="steps of one draw; default: 800; 60 with --tiny")
    parser.add_argument("--execution", choices=["host", "graph"], default="graph" if DEVICE == "cuda" else "host")
    parser.add_argument("--deadline", type=float, default=1e9, help="draw no more after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Draw, run, compare, write, print."""
    options, began = read_options(), time.perf_counter()
    sizes = (TINY_LONGEST, TINY_ANSWER) if options.tiny else (LONGEST, ANSWER)
    usual = (240, 60) if options.tiny else (10_000, 800)
    steps, of_a_draw = options.steps or usual[0], options.of_a_draw or usual[1]
    with tempfile.TemporaryDirectory() as place:
        soak = Soak(Path(place), options.seed, sizes)
        while soak.total["steps"] < steps and time.perf_counter() - began < options.deadline:
            print(soak.once(options.execution, min(of_a_draw, steps - soak.total["steps"])), flush=True)
    row = {
        **soak.total, "lost": soak.total["lost"], "over": soak.total["over"], "ties": soak.total["ties"], "wrong": soak.wrong,
        "largest_difference": soak.largest, "seconds": time.perf_counter() - began, "complete": soak.total["steps"] >= steps,
        "drawn": dict(soak.drawn),
    }  # fmt: skip
    result = {
        **about(DEVICE)._asdict(), "benchmark": "kv_soak", "seed": options.seed, "rows": [row],
        "config": {"execution": options.execution, "longest": sizes[0], "answer": sizes[1], "tiny": options.tiny, "steps_of_a_draw": of_a_draw},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{name} {value}" for name, value in row.items()))
    if soak.wrong or row["lost"] or row["over"]:
        raise SystemExit("not exact, not complete, or not within the plan")


if __name__ == "__main__":
    main()
