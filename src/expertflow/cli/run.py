"""`expertflow run`: prompts in, text as it is generated, then a summary."""

import json
import signal
import statistics
import sys
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from expertflow.cli.tables import facts_table
from expertflow.config import SamplingParams
from expertflow.engine.inputs import Prompt
from expertflow.engine.llm import LLM, shipped_model
from expertflow.engine.offline import Results, finish, seeded
from expertflow.engine.request import RequestOutput
from expertflow.engine.text import ModelText
from expertflow.errors import ConfigError, NonFiniteError
from expertflow.execution.sampler import draw_seed
from expertflow.models.files.checkpoint import resolve
from expertflow.models.files.identity import ContentHash
from expertflow.progress import Progress
from expertflow.units import format_bytes


def main(
    *,
    model: str | None,
    prompts: list[str],
    engine: dict[str, Any],
    sampling: dict[str, Any],
    results: Path | None,
    as_json: bool,
) -> None:
    """Load, generate, report."""
    params = SamplingParams.from_mapping(sampling)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None and results is None and not as_json:
            raise ConfigError(f"{name}={getattr(params, name)} would not be shown", "Add --json, or --results FILE.")
    transformers_logging.set_verbosity_error()
    console = Console(stderr=True)
    text = ModelText(resolve(shipped_model() if model is None else model), engine.get("tokenizer"))
    read = text.read(prompts)
    wanted = {**text.room_for(read, params), **engine}
    with LLM(text.folder, text=text, progress=True, **wanted) as llm:
        outputs: list[RequestOutput] = []
        interrupted, failed, seed = False, None, params.seed
        try:
            with _Interrupt() as interrupt:
                if results is not None:
                    with Results(results, prompts, params, _identity(llm)) as kept:
                        seed = kept.seed
                        _offline(llm, read, params, kept, outputs, interrupt)
                else:
                    seed = draw_seed() if params.temperature and params.seed is None else params.seed
                    each = seeded(params, seed, range(len(prompts)))
                    _generate(llm, read, each, outputs, interrupt, as_json=as_json)
        except KeyboardInterrupt:
            interrupted = True
        except NonFiniteError as error:  # what the other prompts got is shown first
            failed = error
        if as_json:
            report = _report(llm, outputs, interrupted=interrupted)
            report |= {"error": None if failed is None else str(failed), "seed": seed}
            print(json.dumps(report, ensure_ascii=not _writes_unicode()))  # noqa: T201 - the output
        else:
            _summary(llm, console, outputs, seed if params.temperature else None)
    if interrupted:
        raise KeyboardInterrupt
    if failed is not None:
        raise failed


def _writes_unicode() -> bool:
    """Whether standard output takes every character."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


class _Interrupt:
    """Ctrl-C ends the run after its next token; a second one at once.

    If it were raised where it comes, Python would drop it in a callback of the garbage collector.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _take(self, *_: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def check(self) -> None:
        """Raise it, between two tokens."""
        if self._pressed:
            raise KeyboardInterrupt


def _generate(
    llm: LLM,
    prompts: list[Prompt],
    params: list[SamplingParams],
    outputs: list[RequestOutput],
    interrupt: _Interrupt,
    *,
    as_json: bool,
) -> None:
    """Collect finished requests; show one prompt's text as it comes, several prompts' texts as they finish."""
    live = len(prompts) == 1 and not as_json
    if live:
        sys.stdout.write(prompts[0].text or "")
    for item in llm.stream(prompts, params):
        interrupt.check()
        if live:
            sys.stdout.write(item.text)
            sys.stdout.flush()
        if item.output is None:
            continue
        outputs.append(item.output)
        if live:
            sys.stdout.write("\n")
        elif not as_json:
            sys.stdout.write(f"--- {item.index}\n{item.output.prompt}{item.output.text}\n")
    sys.stdout.flush()


def _identity(llm: LLM) -> str:
    """What the tokens of a results file depend on, beside prompts and sampling."""
    other = llm.config.tokenizer
    tokenizer = [] if other is None else [ContentHash().identity({}, Path(other))]
    return " ".join([llm.identity, llm.plan.shape.dtype, str(llm.plan.max_length), *tokenizer])


def _offline(
    llm: LLM,
    prompts: list[Prompt],
    params: SamplingParams,
    results: Results,
    outputs: list[RequestOutput],
    interrupt: _Interrupt,
) -> None:
    """Collect finished requests, which also go to the results file; skip those that it holds already."""
    with Progress("requests", len(prompts)) as bar:
        bar.update(len(prompts) - len(results.left), len(prompts))
        for item in finish(llm, prompts, params, results):
            if item.output is not None:
                outputs.append(item.output)
                bar.advance(note=f"{llm.stats.tokens_per_second:.0f} tokens/s")
            interrupt.check()


def _report(llm: LLM, outputs: list[RequestOutput], *, interrupted: bool) -> dict[str, Any]:
    stats, plan = llm.stats, llm.plan
    return {
        "outputs": [
            {
                "index": o.index,
                "prompt": o.prompt,
                "text": o.text,
                "token_ids": o.token_ids,
                "finish_reason": o.finish_reason,
                "first_token_seconds": o.first_token_seconds,
                "token_seconds": o.token_seconds,
                "seed": o.seed,
                **{name: found for name in ("logprobs", "prompt_logprobs") if (found := getattr(o, name)) is not None},
            }
            for o in sorted(outputs, key=lambda output: output.index)
        ],
        "interrupted": interrupted,
        "device": plan.device,
        "threads": llm.threads,
        "execution": plan.execution,
        "prompt_attention": plan.prompt_attention,
        "why_host": plan.graph_unavailable_reason,
        "notes": plan.shape.notes,
        "strategy": plan.strategy,
        "budget_bytes": plan.budget,
        "planned_bytes": plan.total,
        "peak_bytes": stats.peak_bytes,
        "resident_bytes": plan.resident_total,
        "slots": plan.slots,
        "experts": plan.competing,
        "predictor": None if llm.predictor is None else llm.predictor.about,
        "predictor_failure": llm.predictor_failure,
        "hit_ratio": stats.cache.hit_ratio,
        "hits": stats.cache.hits,
        "loads": stats.cache.loads,
        "prefetched": stats.cache.prefetched,
        "wasted": stats.cache.wasted,
        "evictions": stats.cache.evictions,
        "bytes_moved": stats.cache.bytes_moved,
        "link_gbps": stats.link_gbps,
        "tokens": stats.tokens,
        "prompt_tokens": stats.prompt_tokens,
        "seconds": stats.seconds,
        "first_token_seconds": stats.first_token_seconds,
        "tokens_per_second": stats.tokens_per_second,
    }


def _predictor(llm: LLM) -> str:
    if llm.predictor is None:
        return "none"
    if llm.predictor_failure is not None:
        return f"[red]switched off[/]: {escape(llm.predictor_failure)}"
    shape, recall = llm.predictor.shape, llm.predictor.about.get("recall")
    found = (
        ""
        if not isinstance(recall, int | float)
        else f", {recall:.0%} of a token's experts among its {shape.top_k} best guesses"
    )
    return f"{llm.predictor.config.kind}{found}"


def _speed(gbps: float) -> str:
    return f"{gbps:.1f} GB/s" if gbps >= 0.1 else f"{gbps * 1e3:.1f} MB/s"


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered) * 1e3:.0f} ms, {ordered[int(0.95 * (len(ordered) - 1))] * 1e3:.0f} ms for 95%"


def _latencies(llm: LLM, outputs: list[RequestOutput]) -> list[tuple[str, str]]:
    """How long requests waited, if they were several."""
    if len(outputs) < 2:
        return []
    plan, later = llm.plan, [o.token_seconds for o in outputs if len(o.token_ids) > 1]
    turns = (
        f", {plan.max_live} live in turns of {plan.max_batch} ({plan.schedule})"
        if plan.max_live > plan.max_batch
        else ""
    )
    rows = [
        ("requests", f"{len(outputs)} finished{turns}"),
        ("first token", _spread([o.first_token_seconds for o in outputs])),
    ]
    return [*rows, ("later tokens", _spread(later))] if later else rows


def _summary(llm: LLM, console: Console, outputs: list[RequestOutput], seed: int | None) -> None:
    stats, plan = llm.stats, llm.plan
    step = llm.engine.step_seconds
    budget = "none stated" if plan.budget is None else format_bytes(plan.budget)
    rows: list[tuple[str, str]] = [
        ("budget", f"{budget} on {plan.device}"),
        (
            "measured peak",
            f"{format_bytes(stats.peak_bytes)} (all experts resident: {format_bytes(plan.resident_total)})",
        ),
        ("execution", f"{plan.execution}{plan.graph_unavailable_reason and ': ' + plan.graph_unavailable_reason}"),
        ("attention of prompts", f"by the {plan.prompt_attention}"),
        *[("note", escape(note)) for note in plan.shape.notes],
        ("threads", str(llm.threads)),
        ("slots", f"{plan.slots} of {plan.competing} experts ({plan.share:.1%}), strategy {plan.strategy}"),
        ("predictor", _predictor(llm)),
        ("hit ratio", f"{stats.cache.hit_ratio:.1%} of {stats.cache.accesses} accesses"),
        (
            "loads",
            f"{stats.cache.loads} corrections when needed, {stats.cache.prefetched} ahead ({stats.cache.wasted} in vain)",
        ),
        ("link", f"{format_bytes(stats.cache.bytes_moved)} moved, {_speed(stats.link_gbps)} over the whole run"),
        (
            "speed",
            f"{stats.tokens} tokens in {stats.seconds:.2f} s: {stats.tokens_per_second:.1f} tokens/s, the first after {stats.first_token_seconds:.2f} s",
        ),
        *([("decode step", f"{step * 1e3:.2f} ms, the median of the last ones")] if step else []),
        *_latencies(llm, outputs),
        *([("seed", str(seed))] if seed is not None else []),
    ]
    if plan.budget is not None and stats.peak_bytes > plan.budget:
        over = f"by {format_bytes(stats.peak_bytes - plan.budget)}: please report this"
        rows.append(("[red]over budget[/]", over))
    table = facts_table()
    for name, value in rows:
        table.add_row(name, value)
    console.print()
    console.print(table)
