"""What Prometheus reads at `/metrics`: names and meanings of vLLM's with our prefix, and what only an expert cache has.

Times are measured where outputs reach the event loop. Totals of the engine and its cache are read between two steps, at
most once a second, and only if somebody asks. Must not know HTTP.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from expertflow.engine.request import RequestOutput, StreamOutput
    from expertflow.serve.worker import Ticket, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "expertflow"
_FIRST = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_BETWEEN = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_WHOLE = (.1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
_RECENT = 200
"""First tokens that the live page tells of."""
_STEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counts what clients get.

    Args:
        model: name of the model, a label of every metric.

    Attributes:
        first_tokens: seconds to the first token of the last requests that got one.
    """

    def __init__(self, model: str) -> None:
        """Start at zero."""
        self._labels = {"model_name": model, "engine": "0"}
        self._registry = CollectorRegistry()
        self._times: dict[Ticket, tuple[float, float]] = {}  # of the first and the last token so far
        self.first_tokens: deque[float] = deque(maxlen=_RECENT)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts whose first token came.").labels(
            **self._labels
        )
        self._generated = self._counter("generation_tokens", "Generated tokens.").labels(**self._labels)
        self._success = self._counter("request_success", "Requests that ended with a result.", "finished_reason")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _BETWEEN)
        self._each = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request's later tokens.", _BETWEEN
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the first pass over the prompt.", _WHOLE
        )
        self._prefill = self._histogram("request_prefill_time_seconds", "From that pass to the first token.", _WHOLE)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last one.", _WHOLE)
        self._asked = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _SIZES)
        self._said = self._histogram("request_generation_tokens", "Generated tokens of a request.", _SIZES)
        self._step = self._histogram("iteration_tokens_total", "Generated tokens of a pass or step.", _STEP)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, [*self._labels, *more], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"{_PREFIX}_{name}", text, list(self._labels), registry=self._registry, buckets=buckets)
        found: Histogram = made.labels(**self._labels)
        return found

    def output(self, ticket: "Ticket", output: "StreamOutput") -> None:
        """Count an output that came; called before its ticket is no longer waiting."""
        if output.error is not None:
            self.forget([ticket])
            return
        now = time.perf_counter()
        first, before = self._times.get(ticket, (now, None))
        self._generated.inc()
        if before is None:
            begun = ticket.request.begun or now
            self._first.observe(now - ticket.came)
            self._queue.observe(begun - ticket.came)
            self._prefill.observe(now - begun)
            self.first_tokens.append(now - ticket.came)
            self._prompt.inc(len(ticket.request.prompt_token_ids))
        else:
            self._between.observe(now - before)
        self._times[ticket] = first, now
        if output.output is not None:
            self._finish(output.output, now - ticket.came, now - first)
            self.forget([ticket])

    def _finish(self, output: "RequestOutput", whole: float, decode: float) -> None:
        tokens = len(output.token_ids)
        self._success.labels(**self._labels, finished_reason=output.finish_reason).inc()
        self._whole.observe(whole)
        self._decode.observe(decode)
        self._asked.observe(len(output.prompt_token_ids))
        self._said.observe(tokens)
        if tokens > 1:
            self._each.observe(output.token_seconds)

    def step(self, tokens: int) -> None:
        """Count the tokens of a pass or step."""
        self._step.observe(tokens)

    def forget(self, tickets: "Sequence[Ticket]") -> None:
        """Keep nothing of sequences that are over."""
        for ticket in tickets:
            self._times.pop(ticket, None)

    async def text(self, worker: "Worker") -> bytes:
        """All metrics in Prometheus's text format."""
        await worker.snapshot()
        engine = CollectorRegistry()
        engine.register(_Engine(worker, self._labels))
        return generate_latest(self._registry) + generate_latest(engine)


class _Engine(Collector):
    """The engine's side at the moment of a scrape."""

    def __init__(self, worker: "Worker", labels: dict[str, str]) -> None:
        self._worker, self._labels = worker, labels

    def collect(self) -> Iterator[Metric]:
        worker, snapshot = self._worker, self._worker.latest
        yield self._gauge("num_requests_running", "Sequences that have a token and are not over.", worker.running)
        yield self._gauge("num_requests_waiting", "Sequences that have no token yet.", worker.waiting)
        refused = self._counters("admission_rejections", "Requests that were refused, by reason.", "reason")
        for reason, count in worker.refused.items():
            refused.add_metric([*self._labels.values(), reason], count)
        yield refused
        if snapshot is None:
            return
        stats, plan = snapshot.stats, snapshot.plan
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the pages of keys and values in use, 0 to 1.", snapshot.kv_share
        )
        accesses = self._counters("expert_accesses", "Distinct experts needed, by layer and step.", "result")
        accesses.add_metric([*self._labels.values(), "hit"], stats.cache.hits)
        accesses.add_metric([*self._labels.values(), "miss"], stats.cache.loads)
        yield accesses
        loads = self._counters("expert_loads", "Experts loaded: when needed (correction), or ahead.", "kind")
        loads.add_metric([*self._labels.values(), "correction"], stats.cache.loads)
        loads.add_metric([*self._labels.values(), "ahead"], stats.cache.prefetched)
        yield loads
        forecasts = self._counters(
            "expert_forecasts", "Experts needed where a forecast was given: foreseen, or not.", "result"
        )
        forecasts.add_metric([*self._labels.values(), "foreseen"], stats.cache.foreseen)
        forecasts.add_metric([*self._labels.values(), "unforeseen"], stats.cache.forecast - stats.cache.foreseen)
        yield forecasts
        for name, text, value in (
            ("prefix_cache_queries", "Tokens of prompts whose beginnings were looked up.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Of these, tokens that were not read again.", stats.prefix_cache_hits),
            ("expert_loads_ahead_used", "Loads ahead whose expert was used.", stats.cache.prefetch_hits),
            ("expert_loads_wasted", "Loads ahead whose expert was not used.", stats.cache.wasted),
            ("expert_evictions", "Experts that left their slots.", stats.cache.evictions),
            ("expert_loaded_bytes", "Bytes of experts moved.", stats.cache.bytes_moved),
            ("decode_steps", "Steps and passes of the model.", stats.cache.steps),
            ("clean_steps", "Of these, steps that found every needed expert in its slot.", stats.cache.clean_steps),
            ("busy_seconds", "Time in steps and passes.", stats.seconds),
        ):
            family = self._counters(name, text)
            family.add_metric([*self._labels.values()], value)
            yield family
        for name, text, value in (
            ("expert_link_bytes_per_second", "What loads reach alone, measured at the start.", worker.loading.link),
            ("experts_resident", "Experts in slots, or on their way there.", int(snapshot.view.resident.sum())),
            ("expert_slots", "Slots for experts.", plan.slots),
            ("experts", "Experts that share them.", plan.competing),
            ("memory_planned_bytes", "Device memory that the plan counts.", plan.total),
            ("memory_peak_bytes", "Measured peak of device memory.", stats.peak_bytes),
            ("memory_budget_bytes", "The stated budget; 0: none.", plan.budget or 0),
            ("predictor_works", "1 if a predictor is at work.", int(snapshot.predictor == "works")),
        ):
            yield self._gauge(name, text, value)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counters(self, name: str, text: str, *more: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=[*self._labels, *more])
