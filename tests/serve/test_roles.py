from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from pool_cases import DEADLINE_S, Log, all_free, named, read, request, right, running, until

from tandem.engine.types import EngineRequest
from tandem.sched.route import Role
from tandem.serve.pools import Pools
from tandem.spec.errors import SpecError


async def load(pools: Pools, asked: Sequence[EngineRequest]) -> None:
    found = await asyncio.gather(*(read(pools, r) for r in asked))
    assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))


def test_a_drained_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("pdd", "thread", step_s=0.0005), observer=log) as pools:
            first = asyncio.ensure_future(load(pools, [request(i, osl=150) for i in range(20)]))
            await until(lambda: pools.workers["d1"].records and pools.workers["d2"].records)
            assert await pools.drain("d1")
            assert not pools.ready
            assert not pools.workers["d1"].records
            await until(lambda: log.stats["d1"].engine.running == 0)
            steps = log.stats["d1"].engine.steps
            await first
            await load(pools, [request(100 + i) for i in range(20)])
            assert log.stats["d1"].engine.steps == steps
            pools.resume("d1")
            assert pools.ready
            await load(pools, [request(200 + i) for i in range(20)])
            assert log.stats["d1"].engine.steps > steps
            assert not pools.retries
            await all_free(pools, log)

    asyncio.run(main())


def test_what_a_worker_decodes_can_be_moved_so_that_it_is_empty_at_once() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("pdd", "thread", step_s=0.001), observer=log) as pools:
            streams = asyncio.ensure_future(load(pools, [request(i, osl=400) for i in range(12)]))
            await until(lambda: len(pools.workers["d1"].records) >= 4)
            await pools.drain("d1", move=True)
            assert pools.in_flight == 12  # nobody has finished, and yet it is empty
            await streams
            await all_free(pools, log)

    asyncio.run(main())


def test_roles_flip_under_load_only_when_drained() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("ppdd", "thread", step_s=0.0005), observer=log) as pools:
            streams = asyncio.ensure_future(load(pools, [request(i, isl=20 + 3 * i, osl=40 + i) for i in range(64)]))
            await until(lambda: pools.workers["d2"].records)
            with pytest.raises(SpecError, match="'d2' is not drained; await drain"):
                pools.set_role("d2", "prefill")
            flips: list[tuple[str, Role]] = [("d2", "prefill"), ("p0", "decode"), ("d3", "colocated"), ("p1", "decode")]
            for name, role in flips:
                assert await pools.drain(name, deadline_s=DEADLINE_S)
                assert not pools.workers[name].records
                pools.set_role(name, role)
                assert pools.workers[name].role == role
                assert pools.ready
            await streams
            await load(pools, [request(100 + i) for i in range(32)])
            assert not pools.retries
            assert log.stats["d2"].engine.prompt_tokens > 0
            await all_free(pools, log)

    asyncio.run(main())


def test_the_last_of_a_needed_role_stays() -> None:
    async def main() -> None:
        async with running(named("pdd", "thread")) as pools:
            with pytest.raises(SpecError, match="no other worker for prefill"):
                await pools.drain("p0")
            assert await pools.drain("d1")
            with pytest.raises(SpecError, match="no other worker for decode"):
                await pools.drain("d2")
            pools.set_role("d1", "prefill")
            with pytest.raises(SpecError, match="no other worker for decode"):
                await pools.drain("d2")
            assert await pools.drain("p0")
            pools.set_role("p0", "colocated")
            assert await pools.drain("d2")
            with pytest.raises(SpecError, match="role='x': must be prefill"):
                pools.set_role("d2", "x")  # type: ignore[arg-type]
            with pytest.raises(SpecError, match="unknown; there are p0, d1, d2"):
                await pools.drain("y")

    asyncio.run(main())


def test_a_role_is_refused_that_leaves_another_without_workers() -> None:
    async def main() -> None:
        async with running(named("pd", "thread")) as pools:
            pools.workers["d1"].draining = True  # as after a drain that was allowed while others were there
            with pytest.raises(SpecError, match="no worker would be left for decode"):
                pools.set_role("d1", "prefill")
            pools.set_role("d1", "colocated")

    asyncio.run(main())


def test_a_drain_that_takes_too_long_says_so_and_goes_on() -> None:
    async def main() -> None:
        async with running(named("cc", "thread", step_s=0.001)) as pools:
            streams = asyncio.ensure_future(load(pools, [request(i, osl=300) for i in range(8)]))
            await until(lambda: pools.workers["c0"].records)
            assert not await pools.drain("c0", deadline_s=0.01)
            assert pools.workers["c0"].records
            assert await pools.drain("c0")
            await streams

    asyncio.run(main())
