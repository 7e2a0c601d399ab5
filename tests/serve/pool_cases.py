"""What tests of pools share: pools over fake engines, streams that are read to their end, and what must be so afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fake_engine import builder, expected

from tandem.engine.types import EngineRequest, SamplingParams, TokenOutput
from tandem.sched.metrics import check_causality
from tandem.sched.request import Request
from tandem.sched.route import Role, RoutingLimits
from tandem.sched.times import MeasuredTimes
from tandem.serve.hosts import ThreadHost, WorkerHandle
from tandem.serve.members import Member
from tandem.serve.messages import WorkerStats
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.pools import Pools
from tandem.serve.process_host import ProcessHost
from tandem.serve.supervise import Supervision

DEADLINE_S = 60.0
QUICK = Supervision(first_delay_s=0.01, longest_delay_s=0.05, ping_s=0.05, deadline_s=20.0)
PREFILL_ELSEWHERE = RoutingLimits(max_local_tokens=0)
"""Every prompt goes through a prefill worker, however short."""


class Log:
    """An observer that keeps everything and checks every life."""

    def __init__(self) -> None:
        self.lives: list[Request] = []
        self.stats: dict[str, WorkerStats] = {}
        self.retries: list[str] = []

    def on_finish(self, life: Request) -> None:
        check_causality(life)
        self.lives.append(life)

    def on_stats(self, member: Member, stats: WorkerStats) -> None:
        self.stats[member.id] = stats

    def on_retry(self, life: Request, reason: str) -> None:
        self.retries.append(reason)


def times() -> MeasuredTimes:
    return MeasuredTimes(prefill_s_per_token=1e-4, decode_s_per_step=1e-3, decode_s_per_sequence=1e-5)


def handle(name: str, place: str, **options: Any) -> WorkerHandle:
    if place == "thread":
        return ThreadHost(name, builder(**options))
    return ProcessHost(name, builder(by_reference=False, **options), threads=1)


def named(roles: str, place: str, **options: Any) -> list[tuple[WorkerHandle, Role]]:
    """`p`, `d`, `c` for each worker: "ppd" is two for prefill, `p0` and `p1`, and one for decode, `d2`."""
    full: dict[str, Role] = {"p": "prefill", "d": "decode", "c": "colocated"}
    return [(handle(f"{role}{i}", place, **options), full[role]) for i, role in enumerate(roles)]


@asynccontextmanager
async def running(
    workers: Sequence[tuple[WorkerHandle, Role]],
    *,
    observer: Log | None = None,
    supervision: Supervision = QUICK,
    deadline_s: float = DEADLINE_S,
    **limits: Any,
) -> AsyncIterator[Pools]:
    limits.setdefault("routing", PREFILL_ELSEWHERE)
    pools = Pools(workers, times=times(), limits=PoolLimits(**limits), supervision=supervision, observer=observer)
    async with asyncio.timeout(deadline_s):
        await pools.start()
        try:
            yield pools
        finally:
            await pools.close()


def request(number: int, *, isl: int = 40, osl: int = 50, client: str = "", head: int | None = None) -> EngineRequest:
    first = number + 1000 if head is None else head
    ids = (first, *(7 * number + i for i in range(1, isl)))
    return EngineRequest(id=f"r{number}", prompt_ids=ids, sampling=SamplingParams(max_tokens=osl, seed=number), client=client)


async def read(
    pools: Pools, asked: EngineRequest, seen: Callable[[TokenOutput], None] = lambda output: None
) -> list[TokenOutput]:
    """The whole stream; each output goes on from where the last one ended, and carries the client's own id."""
    outputs: list[TokenOutput] = []
    at = len(asked.output_ids)
    async with aclosing(pools.stream(asked)) as stream:
        async for output in stream:
            assert output.request_id == asked.id
            assert output.index == at
            at += len(output.token_ids)
            outputs.append(output)
            seen(output)
    assert outputs[-1].finish_reason is not None
    assert all(output.finish_reason is None for output in outputs[:-1])
    return outputs


def ids(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def right(asked: EngineRequest, outputs: Sequence[TokenOutput]) -> bool:
    return ids(outputs) == expected(asked) and outputs[-1].finish_reason == "length"


async def until(what: Callable[[], object]) -> None:
    """Wait on a condition of the pools, which change only as the event loop turns."""
    async with asyncio.timeout(DEADLINE_S):
        while not what():
            await asyncio.sleep(0.001)


async def all_free(pools: Pools, observer: Log) -> None:
    """Nothing is left of anything: no request, no state between workers, nothing at the workers."""
    assert (pools.in_flight, pools.waiting) == (0, 0)
    await until(lambda: not pools.held_states)
    await until(lambda: all(not m.up or idle(m.stats) for m in pools.workers.values()))
    await pools.check_integrity()


def idle(stats: WorkerStats | None) -> bool:
    if stats is None:
        return True
    e = stats.engine
    everything = (e.waiting, e.running, e.queued_tokens, stats.held_states, stats.arriving, stats.deferred)
    return not any(everything) and (e.free_blocks, e.free_slots) == (e.blocks, e.slots)
