"""What the application counts is what happened."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_frontend import FakeFrontend, byte_tokenizer
from live_server import MODEL
from prometheus_client.parser import text_string_to_metric_families

from tandem.engine.types import EngineRequest, EngineStats, TokenOutput
from tandem.sched.request import Request
from tandem.serve import tracing
from tandem.serve.app import create_app
from tandem.serve.messages import WorkerStats
from tandem.serve.metrics import Metrics
from tandem.serve.pool_metrics import PoolMetrics


def values(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = ",".join(sample.labels[key] for key in sorted(sample.labels) if key != "le")
            if "le" not in sample.labels:
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


class Ticking:
    """A clock that outputs move."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(frontend: FakeFrontend, clock: Ticking, metrics: Metrics, *bodies: dict[str, Any]) -> None:
    app = create_app(frontend, model_name=MODEL, tokenizer=byte_tokenizer(), metrics=metrics, clock=clock)

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            for body in bodies:
                await client.post("/v1/completions", json={"model": MODEL, "prompt": "abcde", **body})

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_times_and_tokens_of_requests(stream: bool) -> None:
    clock, metrics = Ticking(), Metrics()

    class Slow(FakeFrontend):
        def outputs(self, request: EngineRequest) -> Any:
            for i, output in enumerate(super().outputs(request)):
                clock.now_s += 2.0 if i == 0 else 0.5
                yield output

    run(
        Slow("abc"),
        clock,
        metrics,
        {"stream": stream},
        {"stream": stream, "max_tokens": 2, "n": 2},
        {"stream": stream, "n": 999},
    )
    found = values(metrics)
    assert found["tandem_request_total{stop}"] == 1
    assert found["tandem_request_total{length}"] == 2
    assert found["tandem_prompt_tokens_total"] == 15
    assert found["tandem_generation_tokens_total"] == 7
    assert found["tandem_prefix_cache_queries_total"] == 15
    assert found["tandem_prefix_cache_hits_total"] == 12
    assert found["tandem_time_to_first_token_seconds_count"] == 3
    assert found["tandem_inter_token_latency_seconds_count"] == 4
    assert found["tandem_e2e_request_latency_seconds_count"] == 3
    one = Metrics()
    run(Slow("abc"), clock, one, {"stream": stream})
    found = values(one)
    assert found["tandem_time_to_first_token_seconds_sum"] == pytest.approx(2.0)
    assert found["tandem_inter_token_latency_seconds_sum"] == pytest.approx(1.0)
    assert found["tandem_time_per_output_token_seconds_sum"] == pytest.approx(0.5)
    assert found["tandem_e2e_request_latency_seconds_sum"] == pytest.approx(3.0)


def test_gaps_are_shared_by_the_tokens_that_came_together() -> None:
    metrics = Metrics()
    metrics.observe_tokens(0.6, 3)
    assert values(metrics)["tandem_inter_token_latency_seconds_sum"] == pytest.approx(0.2)
    assert values(metrics)["tandem_generation_tokens_total"] == 3


def test_two_applications_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.observe_handoff(0.5)
    first.count_handoff_bytes(100)
    first.observe_queue("prefill", 0.25)
    first.observe_retry()
    found = values(first)
    assert found["tandem_handoff_bytes_total"] == 100
    assert found["tandem_handoffs_total"] == 1
    assert found["tandem_request_queue_time_seconds_sum{prefill}"] == 0.25
    assert found["tandem_request_retries_total"] == 1
    assert values(second)["tandem_handoff_bytes_total"] == 0


def stats(**fields: Any) -> EngineStats:
    return EngineStats(**dict.fromkeys(EngineStats.__slots__, 0) | fields)


def test_pools_are_the_sum_of_their_workers() -> None:
    metrics = Metrics()
    metrics.set_pool(
        "decode",
        [
            stats(waiting=1, running=2, blocks=10, free_blocks=4, slots=3, free_slots=1, last_step_rows=2, prefix_bytes=7),
            stats(waiting=2, running=3, blocks=10, free_blocks=9, slots=3, free_slots=3, last_step_rows=3),
        ],
        waiting=5,
    )
    metrics.set_pool("prefill", [])
    found = values(metrics)
    assert found["tandem_num_requests_waiting{decode}"] == 8
    assert found["tandem_num_requests_running{decode}"] == 5
    assert found["tandem_cache_blocks_used{decode}"] == 7
    assert found["tandem_cache_slots_used{decode}"] == 2
    assert found["tandem_batch_size{decode}"] == 5
    assert found["tandem_kv_cache_usage_perc{decode}"] == pytest.approx(0.35)
    assert found["tandem_workers{decode}"] == 2
    assert found["tandem_workers{prefill}"] == found["tandem_kv_cache_usage_perc{prefill}"] == 0


def test_what_pools_tell_is_counted_by_role() -> None:
    metrics = Metrics()
    observer = PoolMetrics(metrics)
    one, two = (SimpleNamespace(id=name, role="decode", up=True, lives=1) for name in "ab")
    three = SimpleNamespace(id="c", role="prefill", up=True, lives=1)
    observer.on_stats(one, WorkerStats(handled=1, engine=stats(running=2), free_tokens=0, deferred=1, taken_bytes=100))
    observer.on_stats(one, WorkerStats(handled=1, engine=stats(running=3), free_tokens=0, arriving=1, taken_bytes=150))
    observer.on_stats(two, WorkerStats(handled=1, engine=stats(running=4), free_tokens=0, taken_bytes=7))
    observer.on_stats(three, WorkerStats(handled=1, engine=stats(waiting=5), free_tokens=0))
    found = values(metrics)
    assert found["tandem_num_requests_running{decode}"] == 7
    assert found["tandem_num_requests_waiting{decode}"] == 1
    assert found["tandem_num_requests_waiting{prefill}"] == 5
    assert found["tandem_handoff_bytes_total"] == 157
    two.up = False
    one.lives, one.role = 2, "prefill"
    observer.on_stats(one, WorkerStats(handled=1, engine=stats(running=1), free_tokens=0, taken_bytes=10))
    found = values(metrics)
    assert found["tandem_workers{decode}"] == found["tandem_num_requests_running{decode}"] == 0
    assert found["tandem_num_requests_running{prefill}"] == 1
    assert found["tandem_handoff_bytes_total"] == 167


def test_queues_and_hand_offs_are_taken_from_the_lives_of_requests() -> None:
    metrics = Metrics()
    observer = PoolMetrics(metrics)
    life = Request(id="x", isl=3, max_tokens=2, arrival_s=1.0)
    observer.on_finish(life)
    life.prefill_start_s, life.prefill_end_s, life.decode_start_s = 1.5, 2.0, 2.25
    observer.on_finish(life)
    life.transfer_start_s, life.transfer_end_s, life.decode_start_s = 2.0, 2.5, 4.5
    observer.on_finish(life)
    observer.on_retry(life, "died")
    found = values(metrics)
    assert found["tandem_request_queue_time_seconds_count{prefill}"] == 1
    assert found["tandem_request_queue_time_seconds_count{colocated}"] == 1
    assert found["tandem_request_queue_time_seconds_sum{prefill}"] == pytest.approx(0.5)
    assert found["tandem_request_queue_time_seconds_sum{decode}"] == pytest.approx(2.0)
    assert found["tandem_handoffs_total"] == 1
    assert found["tandem_handoff_seconds_sum"] == pytest.approx(0.5)
    assert found["tandem_request_retries_total"] == 1


def test_spans_only_where_a_provider_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[dict[str, Any]] = []

    class Provider:
        pass

    def start_span(name: str, **fields: Any) -> Any:
        spans.append({"name": name, **fields})
        return SimpleNamespace(end=lambda end_time: spans[-1].update(end_time=end_time))

    module = SimpleNamespace(get_tracer_provider=Provider, get_tracer=lambda name: SimpleNamespace(start_span=start_span))
    output = TokenOutput("x", 0, (1,), "a", finish_reason="stop")
    assert output.finish_reason == "stop"
    run(FakeFrontend("ab"), Ticking(), Metrics(), {})
    assert spans == []
    monkeypatch.setattr(tracing.importlib, "import_module", lambda name: module)
    run(FakeFrontend("ab"), Ticking(), Metrics(), {})
    assert len(spans) == 1
    assert spans[0]["attributes"]["gen_ai.usage.output_tokens"] == 2
    assert spans[0]["attributes"]["gen_ai.response.finish_reasons"] == ["stop"]
    assert spans[0]["end_time"] == spans[0]["start_time"]

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(tracing.importlib, "import_module", missing)
    run(FakeFrontend("ab"), Ticking(), Metrics(), {})
    assert len(spans) == 1
