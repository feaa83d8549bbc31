"""The live page: its two routes, what an event says, and that residency and uses are what the cache's tables say."""

import asyncio
import base64
import json
import re
import time
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from expertflow import LLM, SamplingParams
from expertflow.cache.core import make_tables
from expertflow.cache.policy import Usage
from expertflow.cache.strategy import STRATEGIES
from expertflow.events import EventKind
from expertflow.execution.captured.view import StateCopy
from expertflow.execution.observe import StepObserver
from expertflow.kernels.ledger import DONE, SRC
from expertflow.kernels.residency.state import BLOCKS, CacheState
from expertflow.serve.app import make_app
from expertflow.serve.guard import Rules
from expertflow.serve.live import routes, snapshots
from helpers import DEVICES, MakeCheckpoint
from serving import NAMES, Leaving, until

if TYPE_CHECKING:
    from serving import Served

PROMPT, TOKENS = [5, 6, 7, 8, 9, 10, 11], 6


class Uses(StepObserver):
    """Counts the steps that used each expert, from the routing itself."""

    def __init__(self) -> None:
        self.count: Counter[tuple[int, int]] = Counter()

    def begin(self, tokens: object) -> None:
        pass

    def observe(self, layer: int, routes: np.ndarray, weights: object) -> None:  # noqa: ARG002 - its signature
        self.count.update((layer, expert) for expert in np.unique(routes).tolist())


def opened(folder: Path, execution: str, device: str = "cpu") -> LLM:
    return LLM(folder, device=device, execution=execution, max_length=32, slots=9, strategy="lru")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["host", "graph"])
def test_a_look_is_what_the_tables_and_the_routing_say(
    execution: str, device: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Begun behind token n and taken behind token n + 1, it shows token n's step, or the next if that has begun; no other result follows."""
    folder, params = make_checkpoint("mixtral", spread=0.3), SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    with opened(folder, "host", device) as llm:  # the routing of each step, and what n tokens leave in the slots
        uses, wanted, evicted = Uses(), [], [0]
        llm._offloaded.watch(uses)
        llm.events.subscribe(lambda event: evicted.append(event.kind is EventKind.EVICT))
        for _ in llm.stream([PROMPT], params):
            slots = llm._offloaded.controller.table.slot_of
            wanted.append((dict(uses.count), (slots >= 0).tolist(), sum(evicted)))
    with opened(folder, execution, device) as llm:
        stream, found = llm.stream([PROMPT], params), []
        next(stream)
        for token in range(TOKENS - 1):
            coming, totals, begun = llm.look(), llm.stats, llm.engine.ahead.begun is not None
            next(stream)
            assert coming.ready(), "behind the next step nothing is waited for"
            stats, view = coming.result()
            assert coming.result()[0] == stats == totals
            assert view.counters == stats.cache
            counts, resident, gone = wanted[token + begun]
            assert {(layer, e): n for (layer, e), n in np.ndenumerate(view.uses) if n} == counts
            assert view.resident.tolist() == resident
            assert (stats.cache.evictions, stats.cache.accesses) == (gone, sum(counts.values()))
            found.append(view)
        assert (llm._offloaded.handover.decoder is not None) == (execution == "graph")
        assert np.any(found[0].slot_of != found[-1].slot_of), "each is a copy of its own moment"
        list(stream)
        assert llm.look().result()[1].counters == llm.stats.cache, "without requests the host has it all"


def test_a_look_counts_bytes_as_totals_do_where_records_are_unequal() -> None:
    """Lines of each load's own record, beside what was counted before; a look changes neither."""
    tables, strategy = make_tables(3, 4, 5, divided=False), STRATEGIES["next-use"].on_device()
    state = CacheState.allocate(strategy, tables, torch.device("cpu"), layer_bytes=(256, 512, 1280))
    state.copy_from(tables, Usage(layers=3, experts=4))
    state.tally[BLOCKS] = 40
    state.ledger.table[SRC, :3], state.ledger.table[DONE, :3] = torch.tensor([[1, 7, 8], [3, 1, 2]])
    copied = StateCopy(state)
    state.ledger.table[DONE] = 0
    state.tally[BLOCKS] = 0
    assert copied.tally[BLOCKS] == 40 + 3 * 1 + 1 * 2 + 2 * 5, "it is of the moment when it was begun"
    assert copied.tally == copied.tally


def test_the_link_is_measured_before_the_first_request_only(make_checkpoint: MakeCheckpoint) -> None:
    """Answers do not change by it, and slots in use are left alone."""
    folder, params = make_checkpoint("mixtral"), SamplingParams(max_tokens=3)
    with opened(folder, "host") as llm:
        tokens = llm.generate([PROMPT], params)[0].token_ids
        assert llm.link_speed() == 0
    with opened(folder, "host") as llm:
        assert llm.link_speed() > 0
        assert llm._offloaded.controller.table.resident == 0
        assert llm.generate([PROMPT], params)[0].token_ids == tokens


def test_the_page_is_one_file_that_needs_nothing_from_outside(served: "Served") -> None:
    """It comes without a key, under 12 kB, and asks only for `live`; foreign pages get neither."""
    app = make_app(served.service, Rules(keys=["secret"]))
    found = served.send("/", app=app)
    assert found.status_code == 200
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert len(found.content) < 12_000
    assert not re.findall(r"https?:|//\w|@import|\bsrc=|url\(", found.text)
    assert re.findall(r"fetch\(\"(\w+)\"", found.text) == ["live"]
    assert set(re.findall(r'<link rel="\w+" href="([^"]*)"', found.text)) == {"data:,"}
    assert served.send("/live", app=app).status_code == 401
    assert not {"/", "/live"} & set(served.send("/openapi.json").json()["paths"]), "a stream without end is no API"
    for path in ("/", "/live"):
        assert served.send(path, app=app, headers={"host": "evil.example", "x-api-key": "secret"}).status_code == 403


def test_the_page_uses_every_field_that_events_have(served: "Served") -> None:
    """What it reads of an event is there, and what an event says is shown."""
    found = routes.event(served.service, asyncio.run(served.worker.snapshot()), None)
    text = routes.PAGE.read_text()
    read = set(re.findall(r"\bd\.([a-z_]\w*)", text)) | set(re.findall(r'between\(\w+,"(\w+)"\)', text))
    read |= set(re.findall(r"\bnow\.(\w+)", text)) | set(re.findall(r"[ab]\.(time)\b", text))
    unread = {"busy", "prompt_tokens"}  # for programs
    assert read == set(found) - unread


def events_of(text: str) -> list[dict]:
    return [json.loads(frame.removeprefix("data: ")) for frame in text.split("\n\n") if frame]


def test_events_tell_what_the_engine_does(served: "Served", monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and then each second: totals, queue, times, and a byte an expert: 128 in a slot, plus its use since the last event."""
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)
    monkeypatch.setattr(routes, "SECONDS", 0.05)
    body = {"prompt": ["one", "two"], "max_tokens": 40, "ignore_eos": True, "temperature": 0}

    async def main() -> list[dict]:
        watching = Leaving(served.app, "/live", None, method="GET")
        await until(lambda: len(events_of(watching.text)) >= 1)
        client = Leaving(served.app, "/v1/completions", {**body, "max_tokens": 400})
        await until(lambda: any(one["running"] == 2 for one in events_of(watching.text)))
        client.leave()
        await client.task
        await until(lambda: events_of(watching.text)[-1]["running"] == 0)
        seen = len(events_of(watching.text))
        await until(lambda: len(events_of(watching.text)) >= seen + 2)
        watching.leave()
        await watching.task
        return events_of(watching.text)

    found = asyncio.run(main())
    stats, plan = served.llm.stats, served.llm.plan
    first, last = found[0], found[-1]
    assert {one["model"] for one in found} == {NAMES[0]}
    assert (last["layers"], last["experts"], last["slots"]) == (plan.shape.layers, plan.shape.experts, plan.slots)
    names = {
        "tokens": stats.tokens,
        "hits": stats.cache.hits,
        "corrections": stats.cache.loads,
        "bytes": stats.cache.bytes_moved,
    }
    assert {name: last[name] for name in names} == names
    assert last["tokens"] > first["tokens"]
    assert last["time"] > first["time"]
    assert last["memory"] == {"planned": plan.total, "peak": stats.peak_bytes, "budget": None}
    assert 0 < last["first_token"]["p50"] <= last["first_token"]["p95"]
    cells = np.frombuffer(base64.b64decode(last["map"]), dtype=np.uint8).reshape(plan.shape.layers, plan.shape.experts)
    assert ((cells >= 128) == (served.llm._offloaded.residency() >= 0)).all()
    assert (cells & 127 == 0).all(), "nothing ran since the event before"
    busy = [np.frombuffer(base64.b64decode(one["map"]), dtype=np.uint8) & 127 for one in found]
    assert max(one.max() for one in busy) > 100


def test_a_loading_or_ending_server_has_a_page_too(served: "Served", monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an engine an event says how far loading is; the stream ends when the server begins to."""
    found = routes.event(served.service, None, None)
    assert set(found) == {"model", "phase", "loaded", "running", "waiting", "refused", "first_token"}
    monkeypatch.setattr(served.worker, "_draining", True)
    assert served.send("/live").content == b""


def scraped(served: "Served") -> dict[str, float]:
    """Every sample of `/metrics`, by name and the labels that not all have."""
    families = text_string_to_metric_families(served.send("/metrics").text)
    return {
        " ".join(
            [
                sample.name.removeprefix("expertflow_"),
                *(sample.labels[name] for name in sample.labels if name not in ("model_name", "engine")),
            ]
        ): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_divide_a_requests_time_and_tell_of_the_cache(
    served: "Served", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting and the prompt's passes are the time to the first token, with the rest the whole; totals are the engine's."""
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)
    before = scraped(served)
    with served.halted():
        sending = Thread(
            target=served.send, args=("/v1/completions", {"prompt": "x", "max_tokens": 8, "ignore_eos": True})
        )
        sending.start()
        while not served.worker.waiting:
            time.sleep(0.001)
        time.sleep(0.1)
    sending.join()
    after = scraped(served)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    queue, prefill, decode = (grown[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode"))
    assert queue >= 0.1
    assert prefill > 0
    assert queue + prefill == pytest.approx(grown["time_to_first_token_seconds_sum"])
    assert queue + prefill + decode == pytest.approx(grown["e2e_request_latency_seconds_sum"])
    stats, plan = served.llm.stats, served.llm.plan
    cache = stats.cache
    wanted = {
        "expert_loads_total ahead": cache.prefetched, "expert_loads_ahead_used_total": cache.prefetch_hits,
        "clean_steps_total": cache.steps - cache.late_steps, "decode_steps_total": cache.steps,
        "expert_forecasts_total foreseen": cache.foreseen,
        "expert_forecasts_total unforeseen": cache.forecast - cache.foreseen,
        "expert_loads_wasted_total": cache.wasted, "expert_evictions_total": cache.evictions,
        "expert_loaded_bytes_total": cache.bytes_moved, "expert_link_bytes_per_second": served.worker.loading.link,
        "experts_resident": int((served.llm._offloaded.residency() >= 0).sum()), "memory_budget_bytes": plan.budget or 0,
        "prefix_cache_queries_total": stats.prefix_cache_queries, "prefix_cache_hits_total": stats.prefix_cache_hits,
    }  # fmt: skip
    assert {name: after[name] for name in wanted} == wanted
    assert after["expert_link_bytes_per_second"] > 0


@pytest.mark.parametrize(
    ("values", "median", "most"), [([3.0], 3, 3), ([1, 2], 1, 2), (list(range(1, 101)), 50, 95), ([], None, None)]
)
def test_quantiles(values: list[float], median: float | None, most: float | None) -> None:
    """The smallest value that so large a share does not exceed."""
    assert (routes._quantile(values, 0.5), routes._quantile(values, 0.95)) == (median, most)


def test_recording_rules_name_what_metrics_have(served: "Served") -> None:
    """Every metric, label and label value of the shipped rules is in `/metrics`; no rule is made twice."""
    text = (Path(__file__).parents[1] / "deploy" / "recording_rules.yml").read_text()
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    served.send("/v1/completions", {"prompt": "x", "max_tokens": 2, "ignore_eos": True})
    families = list(text_string_to_metric_families(served.send("/metrics").text))
    samples: dict[str, list[dict[str, str]]] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    counters = {sample.name for family in families if family.type == "counter" for sample in family.samples}
    for rule in rules:
        assert re.fullmatch(r"instance:expertflow_\w+:\w+", rule["record"])
        for name, pick in re.findall(r"(expertflow_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            assert name in samples, rule
            for label, value in re.findall(r'(\w+)="(\w+)"', pick):
                assert any(labels.get(label) == value for labels in samples[name]), rule
        for label, name in re.findall(r"without \((\w+)\) \(rate\((\w+)", rule["expr"]):
            assert all(label in labels for labels in samples[name]), rule
        for name in re.findall(r"rate\((\w+)", rule["expr"]):
            assert name in counters or name.endswith("_bucket"), rule
    names = [rule["record"] for rule in rules]
    assert len(set(names)) == len(names) > 10
