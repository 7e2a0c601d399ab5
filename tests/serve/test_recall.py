"""Prompts that have not begun can be had back: from real and emulated engines, from workers whose states lie in the way."""

from __future__ import annotations

import asyncio
import time

import pytest
from fake_engine import FakeEngine, FakeLink
from pool_cases import Log, all_free, read, request, until
from small_models import small_model
from test_emulated import answer, engine, table, text_of
from virtual_loop import now_s, run_virtually

from tandem.engine.config import EngineConfig
from tandem.engine.types import EngineRequest, SamplingParams
from tandem.sched.batch import BatchLimits
from tandem.sched.route import RoutingLimits
from tandem.serve.build import worker_of
from tandem.serve.emulated import EmulatedEngine
from tandem.serve.emulated_host import EmulatedHost
from tandem.serve.messages import Capacity, Export, Outputs, Recall, Returned, Submit
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.pools import Pools
from tandem.serve.worker import Worker


def returned(worker: Worker) -> list[str]:
    batch = worker.step()
    return [] if batch is None else [event.request_id for event in batch.events if isinstance(event, Returned)]


def test_a_real_engine_gives_back_what_it_has_not_begun() -> None:
    worker = worker_of(small_model("hybrid"), None, EngineConfig(max_batch=1, cache_bytes=1 << 22, threads=1))
    for number in range(3):
        prompt = tuple(range(1, 20 + number))
        worker.handle(Submit(EngineRequest(id=f"r{number}", prompt_ids=prompt, sampling=SamplingParams(max_tokens=4))))
    worker.handle(Recall("r2"))  # not even looked at
    assert returned(worker) == ["r2"]
    for name in ("r0", "r1", "r2", "unknown"):
        worker.handle(Recall(name))
    done, back = list[str](), list[str]()
    for _ in range(8):
        batch = worker.step()
        for event in () if batch is None else batch.events:
            if isinstance(event, Outputs):
                done += [output.request_id for output in event.outputs if output.finish_reason == "length"]
            elif isinstance(event, Returned):
                back.append(event.request_id)
    assert (done, back) == (["r0"], ["r1"])
    assert worker.idle
    engine_stats = worker._stats().engine
    assert (engine_stats.waiting, engine_stats.queued_tokens) == (0, 0)
    assert engine_stats.free_slots == engine_stats.slots


def test_what_waits_for_room_for_its_state_is_given_back_too() -> None:
    link, fake = FakeLink(room=1), FakeEngine(pass_tokens=8)
    worker = Worker(fake, fake.capacity(), clock=time.monotonic, link=link)
    for number in range(3):
        worker.handle(Submit(request(number), hand_off=True))
    worker.step()
    assert len(worker._deferred) == 2
    worker.handle(Export("r1"))
    for name in ("r0", "r1", "r2"):
        worker.handle(Recall(name))
    assert returned(worker) == ["r1", "r2"]
    assert not worker._deferred
    assert link.open_sinks == 1
    assert worker._wanted == set()


def host(name: str) -> EmulatedHost:
    def build() -> tuple[EmulatedEngine, Capacity]:
        limits = BatchLimits(max_batch=16, step_tokens=128, pass_tokens=64)
        made = engine(times=table(), limits=limits, blocks=4000, max_context=4000)
        return made, Capacity(max_context=4000, max_batch=16, tokens=64_000)

    return EmulatedHost(name, build, clock=now_s)


@pytest.mark.parametrize("how", ["alone", "added", "drained"])
def test_a_queue_moves_to_the_worker_that_comes_up(how: str) -> None:
    asked = [request(i, isl=1000, osl=3) for i in range(12)]

    async def main() -> tuple[float, list[int]]:
        log = Log()
        limits = PoolLimits(routing=RoutingLimits(max_local_tokens=0), queued_tokens=100_000, held_states=100, prefix_tokens=64)
        pools = Pools(
            [(host("p0"), "prefill"), (host("d0"), "decode")], times=table(), limits=limits, clock=now_s, observer=log
        )
        await pools.start()
        began_s = now_s()
        reading = [asyncio.ensure_future(read(pools, one)) for one in asked]
        await asyncio.sleep(0.05)
        assert len(pools.workers["p0"].records) == 12
        shares = [0, 0]
        if how != "alone":
            await pools.add(host("p1"), "prefill")
            if how == "drained":
                assert await pools.drain("p0", move=True, deadline_s=60.0)
            else:
                await until(lambda: pools.workers["p1"].records)
                await asyncio.sleep(0.001)
            shares = [len(pools.workers[name].records) for name in ("p0", "p1")]
            assert {record.charged for record in pools.records} == {1000}  # nobody has prefilled what begins alike
        answers = await asyncio.gather(*reading)
        assert [answer(outputs) for outputs in answers] == [text_of(one) for one in asked]
        assert pools.retries == 0
        took_s = now_s() - began_s
        await all_free(pools, log)
        await pools.close()
        return took_s, shares

    took_s, shares = run_virtually(main())
    least_s = 12 * 8 * table().prefill_s(128, 0)
    if how == "alone":
        assert took_s > least_s
    elif how == "added":
        assert took_s < 0.65 * least_s
        assert min(shares) >= 4
    else:
        assert shares[0] == 0
        assert shares[1] >= 6
