"""Eight threads on one `LLM` for a minute: every request has to get the tokens it gets alone.

They generate, stream, drop streams and cancel, at random, over 24 requests of which half are sampled. In float32, where
tokens do not depend on other sequences.

Usage: python benchmarks/threads.py --device cpu --out FILE
"""

import argparse
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about

SEED, THREADS, REQUESTS = 0, 8, 24


def main() -> None:
    """Run alone, run together, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; default: the shipped model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("threads.json"))
    options = parser.parse_args()
    draw, done, wrong = random.Random(SEED), Counter(), []
    settings = {
        "slots": "25%",
        "dtype": "float32",
        "max_length": 96,
        "max_batch": 4,
        "max_live": 6,
        "prefill_chunk": 64,
    }
    with LLM(options.model, device=options.device, **settings) as llm:
        vocabulary = llm.plan.shape.vocabulary
        prompts = [[draw.randrange(3, vocabulary) for _ in range(draw.randrange(2, 40))] for _ in range(REQUESTS)]
        params = [
            SamplingParams(max_tokens=draw.randrange(2, 12), ignore_eos=True, temperature=0.8 * (i % 2), seed=i)
            for i in range(REQUESTS)
        ]
        alone = [llm.generate(prompt, one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]
        end = time.monotonic() + options.seconds

        def work(number: int) -> None:
            mine = random.Random(number)
            while time.monotonic() < end:
                i, kind = mine.randrange(REQUESTS), mine.choice(["generate", "stream", "drop", "cancel"])
                done[kind] += 1
                if kind == "drop":
                    next(llm.stream([prompts[i], prompts[0]], params[i]))
                elif kind == "cancel":
                    llm.engine.cancel(llm.engine.add(llm.request(prompts[i], params[i]), lambda _: None))
                elif kind == "stream":
                    wrong.extend([i] * (tuple(item.token_id for item in llm.stream(prompts[i], params[i])) != alone[i]))
                else:
                    wrong.extend([i] * (llm.generate(prompts[i], params[i])[0].token_ids != alone[i]))

        with ThreadPoolExecutor(THREADS) as pool:
            for job in [pool.submit(work, number) for number in range(THREADS)]:
                job.result()
        again = [llm.generate(prompt, one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]
        result = {
            **about(llm.plan.device)._asdict(), "benchmark": "threads", "seed": SEED,
            "config": {**settings, "threads": THREADS, "requests": REQUESTS, "seconds": options.seconds},
            "execution": llm.plan.execution, "calls": dict(done), "wrong": len(wrong), "same_afterwards": again == alone,
            "left_over": llm.engine.unfinished,
        }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("execution", "calls", "wrong", "same_afterwards", "left_over")}))
    if wrong or again != alone or result["left_over"]:
        raise SystemExit("threads changed tokens, or left requests behind")


if __name__ == "__main__":
    main()
