"""Train Switch models, record their routing, train their predictors and measure them, all within a deadline.

Run: ``PYTHONPATH=tools:src python -m switch.evaluate --text FILE.xz --out DIR --scratch DIR --deadline 560``

For every size it writes `switch_N.json` (the result of `expertflow bench --preset paper`) and `switch_N_training.json`.
`switch_N_predictor.json` has the predictor's guesses on the bench's prompts, which it was not trained on, beside the
free ones. With `--other NAME=FILE` `switch_N_predictor_NAME.json` has them on text of another domain.
`switch_N_schedule.json` is of the token scheduler, with and without. With `--control` `switch_N_control.json` is of
`plec` with the predictor's chances on wrong experts. `--judge-elsewhere` writes predictor and traces in place of the
guesses, for `expertflow eval-predictor`, which needs no GPU. The bench gets an equal share of the time that remains;
what does not fit is named in the result.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from expertflow import LLM, SamplingParams
from expertflow.bench.measure import measure
from expertflow.bench.presets import make_settings
from expertflow.bench.result import write_result
from expertflow.cli.bench import command_of, show
from expertflow.cli.eval_predictor import Test
from expertflow.cli.eval_predictor import main as eval_predictor
from expertflow.cli.train_predictor import Source
from expertflow.cli.train_predictor import main as train_predictor
from expertflow.predict.online import OnlinePredictor, Prediction
from switch import schedule
from switch.constants import PROMPTS_FILE, REPORT_FILE, TRAINING_PROMPTS_FILE, Recipe
from switch.data import read_text, write_prompts
from switch.train import Text, prepare_text, sizes, train

STARTED = time.perf_counter()
TRACE = "training.trace"


def log(text: str) -> None:
    """A line with the time."""
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


def record(folder: Path, tokens: int, device: str, source: str, trace: str) -> None:
    """The routing of prompts: those to train the predictor with, the bench's, or others."""
    lines = (folder / source).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["tokens"] for line in lines]
    longest = max(map(len, prompts)) + tokens
    with (
        LLM(folder, slots="100%", execution="host", max_batch=32, max_length=longest, device=device) as llm,
        llm.record(folder / trace),
    ):
        llm.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))


def release() -> None:
    """Free memory that no object uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def predictor(folder: Path, epochs: int, device: str) -> None:
    """Train the predictor that belongs to the checkpoint: its folder is found unnamed."""
    source = Source(trace=folder / TRACE, model=str(folder), skip="", leave_out="", validation=0.1)
    options = {"epochs": epochs, "batch": 16, "rate": 2e-3, "seed": 0, "device": device}
    train_predictor(source=source, out=folder / "predictor", kind="path", options=options)


def judge(folder: Path, source: str, out: Path, options: argparse.Namespace) -> None:
    """The predictor on prompts it has not seen, beside free guesses that learned from the same ones as it did."""
    unseen = Path(source).stem + ".trace"
    record(folder, options.tokens, options.device, source, unseen)
    release()
    if options.judge_elsewhere:
        place = options.out / folder.name
        shutil.copytree(folder / "predictor", place / "predictor", dirs_exist_ok=True)
        for trace in (TRACE, unseen):
            shutil.copy(folder / trace, place)
        return
    test = Test(
        trace=folder / unseen, free=folder / TRACE, only="", leave_out="", skip="", cases=(), slots=("25%",), steps=1
    )
    eval_predictor(artifact=folder / "predictor", test=test, plot=None, json_file=out)


def other_prompts(text: Text, files: Sequence[str], recipe: Recipe, folder: Path) -> list[str]:
    """Prompts cut from texts of other domains, given as `NAME=FILE`; the names."""
    names = []
    for given in files:
        name, _, path = given.partition("=")
        ids = text.tokenizer.backend_tokenizer.encode(read_text(Path(path), 1_000_000)).ids
        write_prompts(folder / f"{name}.jsonl", np.asarray(ids), text.corpus.sentinel, recipe, recipe.prompts)
        names.append(name)
    return names


def schedules(folder: Path, out: Path, options: argparse.Namespace) -> bool:
    """The scheduler with and without, at the fewest and the most slots; whether every token was the same."""
    slots = options.slots.split(",")
    rows = [
        schedule.measure(folder, count, batch=options.turn, live=options.live, tokens=options.tokens, repeats=options.repeats, device=options.device)
        for count in dict.fromkeys((slots[0], slots[-1]))
    ]  # fmt: skip
    schedule.write(out, rows, options.device)
    for row in rows:
        speeds = {name: [round(run["tokens_per_second"]) for run in runs] for name, runs in row["schedules"].items()}
        loads = {name: [round(run["loads_per_token"], 2) for run in runs] for name, runs in row["schedules"].items()}
        log(
            f"{row['slots']} slots, {row['live']} live in turns of {row['batch']}: tokens/s {speeds}, loads a token {loads}"
        )
    return all(row["tokens_equal"] for row in rows)


@contextmanager
def misled(seed: int = 0) -> Iterator[None]:
    """Give each layer's predictions to other experts: loads ahead and certainty stay, the knowledge is gone.

    The predictor is never paused for wasted loads, because the value of its knowledge is measured.
    """
    honest, orders = OnlinePredictor.step, {}

    def step(self: OnlinePredictor, rows: Tensor, tokens: Tensor, routes: Tensor) -> Prediction:
        given = honest(self, rows, tokens, routes)
        layers, experts = given.demand.shape[-2:]
        if layers not in orders:
            random = torch.Generator().manual_seed(seed)
            order = torch.stack([torch.randperm(experts, generator=random) for _ in range(layers)])
            orders[layers] = order.to(given.demand.device)
        order = orders[layers]
        return Prediction(given.demand.gather(-1, order.expand_as(given.demand)), given.within.gather(-1, order.expand_as(given.within)))  # fmt: skip

    with patch.object(OnlinePredictor, "step", step), patch("expertflow.live.pacing.JUDGED_PREFETCHES", 1 << 62):
        yield


def bench(folder: Path, out: Path, seconds: float, options: argparse.Namespace) -> bool:
    """The paper's preset on the model; whether every token was exact."""
    given = {
        "model": str(folder), "prompts_file": folder / PROMPTS_FILE, "deadline": round(seconds), "tokens": options.tokens,
        "repeats": options.repeats, "device": options.device,
        "slots": tuple(options.slots.split(",")), "batches": tuple(int(part) for part in options.batches.split(",")),
        "strategies": tuple(options.strategies.split(",")), "long_prompt": options.long_prompt,
        "executions": tuple(options.executions.split(",")),
    }  # fmt: skip
    last = [0.0]

    def report(what: str, done: int, total: int) -> None:
        if time.perf_counter() - last[0] > 10:
            last[0] = time.perf_counter()
            log(f"{done} of {total}: {what}")

    result = measure(make_settings("paper", given), command_of("paper", given, out), report)
    write_result(result, out)
    show(result)
    return all(row.exact is not False for row in result.rows)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="text, plain or .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints, such as one in /dev/shm")
    parser.add_argument("--experts", default="32,128")
    parser.add_argument("--train-seconds", default="50,80", help="time to train, a size")
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds in all")
    parser.add_argument("--epochs", type=int, default=12, help="of the predictors; 0: none")
    parser.add_argument("--strategies", default="on-demand,lru,ring,pregated,next-use,plec")
    parser.add_argument("--slots", default="4/layer,8/layer,16/layer")
    parser.add_argument("--batches", default="4,8,16,32")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--live", type=int, default=32, help="sequences that the scheduler divides")
    parser.add_argument("--turn", type=int, default=8, help="sequences that step together there")
    parser.add_argument("--after", type=float, default=60.0, help="seconds kept for the scheduler, a size")
    parser.add_argument("--control", type=float, default=0.0, help="seconds for a misled predictor, a size; 0: none")
    parser.add_argument("--other", nargs="*", default=[], metavar="NAME=FILE", help="texts of other domains")
    parser.add_argument("--judge-elsewhere", action="store_true", help="only leave what judging the predictors needs")
    parser.add_argument("--executions", default="auto", help="auto, host, graph; several side by side")
    parser.add_argument("--long-prompt", type=int, default=256)
    parser.add_argument("--characters", type=int, default=14_000_000)
    parser.add_argument("--batch", type=int, default=48, help="sequences of a training step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in --scratch")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the script")
    options = parser.parse_args(argv)
    taken = {Path(name).stem for name in (TRACE, PROMPTS_FILE, TRAINING_PROMPTS_FILE)}
    for name, _, path in (given.partition("=") for given in options.other):
        if not name.isidentifier() or name in taken or not path:
            parser.error(f"--other takes NAME=FILE, with a NAME of letters that is none of {', '.join(sorted(taken))}")
    if len(options.experts.split(",")) != len(options.train_seconds.split(",")):
        parser.error("give one --train-seconds for every size")
    return options


def main(argv: list[str] | None = None) -> None:
    """Everything for every size."""
    options = arguments(argv)
    logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    counts = [int(part) for part in options.experts.split(",")]
    seconds = [float(part) for part in options.train_seconds.split(",")]
    shape, recipe = sizes(counts[0], tiny=options.tiny, batch=options.batch)
    text = prepare_text(options.text, shape, recipe, options.characters)
    log(f"{len(text.corpus.train)} tokens to train on")
    exact = True
    for number, (experts, time_box) in enumerate(zip(counts, seconds, strict=True)):
        folder = options.scratch / f"switch-{experts}"
        shape, recipe = sizes(experts, tiny=options.tiny, batch=options.batch)
        train(text, shape, recipe, torch.device(options.device), time_box, folder)
        shutil.copy(folder / REPORT_FILE, options.out / f"switch_{experts}_training.json")
        release()
        log(f"Switch-{experts} is written")
        if options.epochs:
            record(folder, options.tokens, options.device, TRAINING_PROMPTS_FILE, TRACE)
            release()
            log("its routing is recorded")
            predictor(folder, options.epochs, options.device)
            log("its predictor is trained")
            judge(folder, PROMPTS_FILE, options.out / f"switch_{experts}_predictor.json", options)
            for name in other_prompts(text, options.other, recipe, folder):
                judge(folder, f"{name}.jsonl", options.out / f"switch_{experts}_predictor_{name}.json", options)
            release()
            log("it is judged")
        left = options.deadline - (time.perf_counter() - STARTED)
        after = options.after if options.epochs else 0.0
        share = (left - sum(seconds[number + 1 :])) / (len(counts) - number) - after - options.control
        log(f"measuring for {share:.0f} s")
        exact &= bench(folder, options.out / f"switch_{experts}.json", max(share, 1.0), options)
        release()
        if options.control and options.epochs:
            with misled():
                only = argparse.Namespace(
                    **vars(options) | {"strategies": "plec", "executions": "auto", "long_prompt": 0}
                )
                exact &= bench(folder, options.out / f"switch_{experts}_control.json", options.control, only)
            release()
        if options.epochs:
            exact &= schedules(folder, options.out / f"switch_{experts}_schedule.json", options)
            release()
        if not options.keep:
            shutil.rmtree(folder)
    log("done")
    if not exact:
        raise SystemExit("tokens differ from the all-resident model's: see the result files")


if __name__ == "__main__":
    main()
