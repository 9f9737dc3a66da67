"""What Prometheus reads: requests, their times, tokens, and the model loop's counts."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from respkv.batching.stats import LoopStats
from respkv.gateway.generation import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_GAUGES = {
    "running": "Sequences that are computed now.",
    "waiting": "Sequences that wait for their turn.",
    "tokens_in_flight": "Tokens of the sequences that are computed now.",
}
_COUNTERS = {
    "submitted": "Sequences that were taken.",
    "finished": "Sequences that were finished.",
    "cancelled": "Sequences whose client went away, or that ended at a stop string.",
    "failed": "Sequences that the model failed.",
    "rejected": "Sequences that found no room in the queue.",
    "preemptions": "Times that a sequence made room for others.",
    "steps": "Forward passes of the model.",
    "tokens_generated": "Tokens that were generated.",
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_computed": "Tokens of prompts that were computed.",
    "prefix_hits": "Sequences of whose prompt something was found.",
    "prefix_misses": "Sequences of whose prompt nothing was found.",
    "prefix_tokens_saved": "Tokens of prompts that were not computed.",
    "local_tokens_saved": "Of those, the ones from this process's own memory.",
    "load_errors": "Times that something cached could not be loaded.",
}


class Metrics:
    """The registry of one gateway. loop_stats: asks the model loop; None while there is none."""

    def __init__(self, loop_stats: Callable[[], LoopStats | None]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "respkv_gateway_requests",
            "Answered requests.",
            ["method", "path", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "respkv_gateway_request_seconds",
            "From a request's head to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "respkv_gateway_ttft_seconds",
            "From a request's head to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "respkv_gateway_requests_in_flight", "Requests under way.", registry=registry
        )
        registry.register(_Loop(loop_stats))

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request. path: of the route, not as the client wrote it."""
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def generated(self, generation: Generation) -> None:
        """Note when the first token of a generation was there."""
        times = [each.first_s for each in generation.answers if each.first_s]
        if times:
            self._first.observe(min(times) - generation.job.started)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry)


class _Loop(Collector):
    """The model loop's own counts, read when they are asked for."""

    def __init__(self, loop_stats: Callable[[], LoopStats | None]) -> None:
        self._loop_stats = loop_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._loop_stats()
        yield GaugeMetricFamily(
            "respkv_gateway_ready", "Whether the model is loaded.", value=stats is not None
        )
        if stats is None:
            return
        for name, about in _GAUGES.items():
            yield GaugeMetricFamily(f"respkv_gateway_{name}", about, value=getattr(stats, name))
        for name, about in _COUNTERS.items():
            yield CounterMetricFamily(f"respkv_gateway_{name}", about, value=getattr(stats, name))
