"""Pools of Ray's actors: tokens are those of threads, and no client sees an actor die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from fake_engine import builder
from pool_cases import Log, all_free, ids, read, request, right, running, until
from ray_cases import actor, worker

from tandem.engine.types import EngineRequest, SamplingParams
from tandem.sched.route import Role
from tandem.serve.hosts import ThreadHost
from tandem.serve.pools import Pools
from tandem.serve.ray_cluster import RayCluster
from tandem.serve.ray_host import RayHost

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster("ray", object_store_bytes=200 << 20)
    yield cluster
    cluster.close()


def test_streams_are_not_broken_while_actors_are_killed() -> None:
    async def main() -> None:
        log = Log()
        roles: list[Role] = ["prefill", "decode", "decode"]
        hosts = [actor(f"{role}{i}", builder(by_reference=False, step_s=0.002)) for i, role in enumerate(roles)]
        async with running(list(zip(hosts, roles, strict=True)), observer=log) as pools:
            asked = [request(number, osl=80) for number in range(32)]
            seen = 0

            def count(_: object) -> None:
                nonlocal seen
                seen += 1

            streams = [asyncio.create_task(read(pools, one, count)) for one in asked]
            for victim, at in (("decode1", 200), ("prefill0", 400)):
                await until(lambda at=at: seen >= at)
                capacity = pools.workers[victim].capacity
                assert capacity is not None
                assert capacity.pid is not None
                os.kill(capacity.pid, signal.SIGKILL)
            for one, stream in zip(asked, streams, strict=True):
                assert right(one, await stream)
            assert log.retries
            await all_free(pools, log)

    asyncio.run(main())


def test_tokens_of_actors_are_those_of_threads() -> None:
    asked = [
        EngineRequest(
            id=f"r{i}",
            prompt_ids=tuple((7 * i + 3 * j) % 250 + 3 for j in range(30 + 40 * i)),
            sampling=SamplingParams(max_tokens=24, temperature=0.0 if i % 2 else 0.9, seed=i),
        )
        for i in range(8)
    ]

    async def served(pools: Pools) -> list[list[int]]:
        return [ids(outputs) for outputs in await asyncio.gather(*(read(pools, one) for one in asked))]

    async def main() -> None:
        async with running([(ThreadHost("c", partial(worker, True)), "colocated")]) as pools:
            wanted = await served(pools)
        assert all(len(tokens) == 24 for tokens in wanted)
        actors: list[tuple[RayHost, Role]] = [
            (actor("p", partial(worker, False), threads=1), "prefill"),
            (actor("d", partial(worker, False), threads=1), "decode"),
        ]
        log = Log()
        async with running(actors, observer=log) as pools:
            assert await served(pools) == wanted
            await until(lambda: log.stats["d"].taken == 8)
            await all_free(pools, log)

    asyncio.run(main())
