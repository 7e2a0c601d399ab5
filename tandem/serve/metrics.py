"""Numbers for Prometheus, of one application: a registry of its own, so that two in one process stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tandem.engine.types import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = tuple(2**i for i in range(18))


class Metrics:
    """What is counted. Times are seconds; `pool` is the pool's name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.before_text: list[Callable[[], None]] = []
        """Called before each reading, to set what is only worth setting then."""
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token in seconds.", _TTFT_S)
        self._gap = self._histogram("inter_token_latency_seconds", "Time between output tokens in seconds.", _GAP_S)
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time per output token after the first, of a request.", _GAP_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "End-to-end request latency in seconds.", _WHOLE_S)
        self._queue = self._histogram("request_queue_time_seconds", "Time a request waited in seconds.", _WHOLE_S, "pool")
        self._isl = self._histogram("request_prompt_tokens", "Prefill tokens of a request.", _TOKENS)
        self._osl = self._histogram("request_generation_tokens", "Generation tokens of a request.", _TOKENS)
        self._requests = self._counter("request", "Finished requests by the reason of their end.", "finished_reason")
        self._prompt = self._counter("prompt_tokens", "Prefill tokens processed.")
        self._output = self._counter("generation_tokens", "Generation tokens processed.")
        self._asked = self._counter("prefix_cache_queries", "Prompt tokens looked up in prefix caches.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in prefix caches.")
        self._handoffs = self._counter("handoffs", "Requests handed from prefill to decode.")
        self._handoff_bytes = self._counter("handoff_bytes", "Bytes of state handed from prefill to decode.")
        self._handoff_s = self._histogram("handoff_seconds", "Time of one hand-off in seconds.", _TTFT_S)
        self._retries = self._counter("request_retries", "Requests that went on elsewhere after a worker's death.")
        self._gauges = {
            name: Gauge(f"tandem_{name}", text, ("pool",), registry=self.registry)
            for name, text in {
                "workers": "Workers that are up.",
                "num_requests_waiting": "Requests waiting to be processed.",
                "num_requests_running": "Requests that hold state.",
                "batch_size": "Rows of the last decode step.",
                "queued_tokens": "Prompt tokens waiting to be computed.",
                "context_tokens": "Tokens of context of running requests.",
                "cache_blocks": "Blocks of keys and values.",
                "cache_blocks_used": "Blocks of keys and values in use.",
                "cache_slots": "Slots of recurrent state.",
                "cache_slots_used": "Slots of recurrent state in use.",
                "prefix_cache_bytes": "Bytes that the prefix cache holds.",
                "kv_cache_usage_perc": "Share of blocks in use. 1 means 100 percent.",
            }.items()
        }

    def observe_first_token(self, ttft_s: float) -> None:
        """The first token of an answer has come."""
        self._ttft.observe(ttft_s)

    def observe_tokens(self, gap_s: float, tokens: int) -> None:
        """`tokens` more of an answer have come, `gap_s` after those before them."""
        self._output.inc(tokens)
        self._gap.observe(gap_s / tokens)

    def observe_request(
        self, finish_reason: str, *, isl: int, osl: int, cached: int, ttft_s: float | None, e2e_s: float
    ) -> None:
        """An answer has ended. `ttft_s` None: before its first token."""
        self._requests.labels(finish_reason).inc()
        if ttft_s is None:
            return
        self._e2e.observe(e2e_s)
        self._isl.observe(isl)
        self._osl.observe(osl)
        self._prompt.inc(isl)
        self._asked.inc(isl)
        self._hits.inc(cached)
        if osl > 1:
            self._tpot.observe((e2e_s - ttft_s) / (osl - 1))

    def count_first_tokens(self, tokens: int) -> None:
        """Tokens that came with the first output, for which there is no gap."""
        self._output.inc(tokens)

    def observe_queue(self, pool: str, queue_s: float) -> None:
        """A request was taken from a pool's queue."""
        self._queue.labels(pool).observe(queue_s)

    def observe_handoff(self, seconds: float) -> None:
        """A state has arrived where its request goes on, so long after it was offered."""
        self._handoffs.inc()
        self._handoff_s.observe(seconds)

    def count_handoff_bytes(self, num_bytes: int) -> None:
        """So many bytes more of states have arrived."""
        self._handoff_bytes.inc(num_bytes)

    def observe_retry(self) -> None:
        """A worker has died and one of its requests goes on elsewhere."""
        self._retries.inc()

    def set_pool(self, pool: str, workers: Iterable[EngineStats], *, waiting: int = 0) -> None:
        """How a pool stands now: the sum over its workers, and `waiting` requests that none of them has yet."""
        stats = list(workers)
        blocks = sum(s.blocks for s in stats)
        used = blocks - sum(s.free_blocks for s in stats)
        values: dict[str, float] = {
            "workers": len(stats),
            "num_requests_waiting": waiting + sum(s.waiting for s in stats),
            "num_requests_running": sum(s.running for s in stats),
            "batch_size": sum(s.last_step_rows for s in stats),
            "queued_tokens": sum(s.queued_tokens for s in stats),
            "context_tokens": sum(s.context_tokens for s in stats),
            "cache_blocks": blocks,
            "cache_blocks_used": used,
            "cache_slots": sum(s.slots for s in stats),
            "cache_slots_used": sum(s.slots - s.free_slots for s in stats),
            "prefix_cache_bytes": sum(s.prefix_bytes for s in stats),
            "kv_cache_usage_perc": used / blocks if blocks else 0.0,
        }
        for name, value in values.items():
            self._gauges[name].labels(pool).set(value)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        for refresh in self.before_text:
            refresh()
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"tandem_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_{name}", text, labels, registry=self.registry)
