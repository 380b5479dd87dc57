"""Figures for Prometheus: what the engine counts, and what its clients wait for."""

from collections.abc import Iterator
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from mpt_eqx.serve.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `Metrics.render` returns."""

PATHS = frozenset({
    "/", "/docs", "/openapi.json", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions",
    "/tokenize", "/detokenize", "/tokenizer_info",
})  # fmt: skip
"""What is told apart; all else is "other", so that a client cannot make as many series as it likes."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

GAUGES = {
    "slots": "Sequences that are decoded at a time.",
    "active": "Sequences that have a slot, or are being prefilled.",
    "queued": "Sequences that wait for a slot.",
    "weight_bytes": "Weights of all models; what they share counts once.",
    "cache_bytes": "KV caches of all slots.",
    "prefix_bytes": "Kept prefixes.",
    "peak_bytes": "The most memory that the process (on a CPU) or the device has had.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were in the cache of prefixes.",
    "new_tokens": "Decoded tokens.",
    "rebuilds": "How often the state was made anew after a failed step.",
}


class Metrics:
    """Figures of one engine and of the requests to it, in a registry of their own.

    The engine's are read at each scrape. Everything else is recorded by an `observe_…` call where it happens, in any
    thread.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(cast(Collector, self))

        def histogram(name: str, about: str, label: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"mpt_eqx_{name}", about, [label], buckets=buckets, registry=self._registry)

        self._requests = Counter(
            "mpt_eqx_requests", "Requests that have ended, by path and status.", ["path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._duration = histogram("request_seconds", "From a request's arrival to its answer's end.", "path", SECONDS)
        self._queue = histogram("queue_seconds", "From a sequence's submission to its slot.", "model", SECONDS)
        self._first = histogram(
            "first_token_seconds", "From a sequence's submission to its first token.", "model", SECONDS
        )
        self._next = histogram("next_token_seconds", "Between two tokens of a sequence.", "model", TOKEN_SECONDS)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Takes note of a request that has ended; `guards.guard` calls it.

        Args:
            path: of its URL, without the query.
            status: of HTTP, 499 where the client went away before there was one.
            seconds: from its arrival to the end of its answer.
        """
        path = path if path in PATHS else "other"
        self._requests.labels(path, str(status)).inc()
        self._duration.labels(path).observe(seconds)

    def observe_queue(self, model: str, seconds: float) -> None:
        """Takes note of a sequence that has got a slot, `seconds` after it was submitted."""
        self._queue.labels(model).observe(seconds)

    def observe_first_token(self, model: str, seconds: float) -> None:
        """Takes note of the first token of a sequence, `seconds` after it was submitted."""
        self._first.labels(model).observe(seconds)

    def observe_next_tokens(self, model: str, count: int, seconds: float) -> None:
        """Takes note of more tokens of a sequence, `seconds` after those before them; they count as evenly spaced."""
        histogram = self._next.labels(model)
        for _ in range(count):
            histogram.observe(seconds / count)

    def describe(self) -> list[Metric]:
        """Returns nothing: what the engine counts is not asked for when this is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the engine's figures of now."""
        stats = self._engine.stats()
        for name, about in GAUGES.items():
            if (value := getattr(stats, name)) is not None:
                yield GaugeMetricFamily(f"mpt_eqx_{name}", about, value)
        for name, about in COUNTERS.items():
            yield CounterMetricFamily(f"mpt_eqx_{name}", about, getattr(stats, name))
        ended = CounterMetricFamily("mpt_eqx_sequences", "Sequences by how they ended.", labels=["reason"])
        for reason, count in stats.ended.items():
            ended.add_metric([reason], count)
        yield ended
        health = self._engine.health()
        yield GaugeMetricFamily("mpt_eqx_ready", "1 while requests are taken, else 0.", float(health == "ready"))

    def render(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self._registry)
