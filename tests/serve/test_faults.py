from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_engine import POISON, STUCK, builder
from pool_cases import DEADLINE_S, Log, all_free, handle, ids, named, read, request, right, running, times, until

from tandem.engine.types import EngineRequest, TokenOutput
from tandem.serve.hosts import Listener, ThreadHost, WorkerDied
from tandem.serve.messages import Batch, Capacity, Outputs
from tandem.serve.pools import Pools
from tandem.serve.process_host import ProcessHost
from tandem.serve.supervise import Supervision
from tandem.serve.worker import Worker

STREAMS = 64


class Progress:
    """Tokens that have come, over all streams, so that a fault comes in the midst of it."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, output: TokenOutput) -> None:
        self.tokens += len(output.token_ids)


async def whole(pools: Pools, asked: Sequence[EngineRequest], progress: Progress) -> list[list[TokenOutput]]:
    return list(await asyncio.gather(*(read(pools, r, progress) for r in asked)))


def kill(pools: Pools, name: str) -> None:
    host = pools.workers[name].handle
    if isinstance(host, ProcessHost):
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
    else:
        host.kill("given up by a test")


@pytest.mark.parametrize("place", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_64_streams_are_whole_though_decode_and_then_prefill_workers_die(place: str) -> None:
    async def main() -> None:
        log, progress = Log(), Progress()
        workers = named("ppdd", place, max_batch=16, step_s=0.001)
        async with running(workers, observer=log, held_states=8) as pools:
            asked = [request(i, isl=30 + i, osl=60 + i) for i in range(STREAMS)]
            streams = asyncio.ensure_future(whole(pools, asked, progress))
            await until(lambda: progress.tokens > 600)
            assert pools.in_flight > 16
            kill(pools, "d2")
            await until(lambda: pools.retries)
            before = progress.tokens
            await until(lambda: progress.tokens > before + 300)
            kill(pools, "p0")
            found = await streams
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))
            assert len(log.lives) == STREAMS
            assert log.retries
            assert pools.ready  # there was another of each
            await until(lambda: all(m.up for m in pools.workers.values()))
            assert (pools.workers["d2"].lives, pools.workers["p0"].lives) == (2, 2)
            again = request(1000)
            assert right(again, await read(pools, again))
            await all_free(pools, log)

    asyncio.run(main())


def test_workers_that_die_over_and_over_at_random_lose_nothing() -> None:
    async def main() -> None:
        log, progress, chance = Log(), Progress(), random.Random(0)
        workers = named("ppdd", "thread", max_batch=8, step_s=0.0005)
        async with running(workers, observer=log, max_retries=100) as pools:
            asked = [request(i, isl=1 + 29 * i % 150, osl=1 + 13 * i % 80) for i in range(STREAMS)]
            streams = asyncio.ensure_future(whole(pools, asked, progress))
            for deaths in range(1, 25):
                await until(lambda mark=70 * deaths: progress.tokens > mark or streams.done())
                up = [name for name, member in pools.workers.items() if member.up]
                if up:
                    kill(pools, chance.choice(up))
            found = await streams
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))
            assert sum(m.lives for m in pools.workers.values()) > 12
            await all_free(pools, log)

    asyncio.run(main())


def test_the_only_worker_may_die_too() -> None:
    async def main() -> None:
        log, progress = Log(), Progress()
        async with running(named("c", "thread", step_s=0.001), observer=log) as pools:
            asked = [request(i) for i in range(8)]
            streams = asyncio.ensure_future(whole(pools, asked, progress))
            await until(lambda: progress.tokens > 50)
            kill(pools, "c0")
            assert not pools.ready
            found = await streams
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))

    asyncio.run(main())


@pytest.mark.slow
def test_states_on_their_way_are_let_go_when_either_side_dies() -> None:
    """The decode worker takes none, so all states wait between the two."""

    async def main() -> None:
        log = Log()
        workers = [
            (handle("p", "process"), "prefill"),
            (handle("d", "process", max_batch=1, step_s=0.001), "decode"),
        ]
        async with running(workers, observer=log, held_states=4) as pools:  # type: ignore[arg-type]
            long = asyncio.ensure_future(read(pools, request(0, osl=9900)))  # takes all places, until it is cancelled
            asked = [request(i, osl=5) for i in range(1, 13)]
            streams = asyncio.ensure_future(whole(pools, asked[:6], Progress()))
            await until(lambda: pools.held_states == 4)
            kill(pools, "p")
            await until(lambda: pools.retries >= 2)  # those that the decode worker had not been given
            await until(lambda: pools.workers["p"].up)
            more = asyncio.ensure_future(whole(pools, asked[6:], Progress()))
            await until(lambda: pools.held_states == 4)
            kill(pools, "d")
            await until(lambda: any("worker d" in reason for reason in log.retries))
            long.cancel()
            found = [*await streams, *await more]
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))
            await all_free(pools, log)

    asyncio.run(main())


def test_a_request_that_kills_its_workers_fails_and_takes_nobody_with_it() -> None:
    async def main() -> None:
        log, progress = Log(), Progress()
        async with running(named("cc", "thread", step_s=0.001, max_batch=4), observer=log) as pools:
            asked = [request(i, osl=100) for i in range(24)]
            streams = asyncio.ensure_future(whole(pools, asked, progress))
            await until(lambda: progress.tokens > 100)
            (failed,) = await read(pools, request(666, head=POISON))
            assert failed.finish_reason == "error"
            assert failed.error is not None
            assert "tried 4 times" in failed.error
            assert "poison" in failed.error
            found = await streams
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))

    asyncio.run(main())


@pytest.mark.parametrize("place", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_a_worker_that_hangs_is_given_up(place: str) -> None:
    async def main() -> None:
        impatient = Supervision(first_delay_s=0.01, ping_s=0.05, deadline_s=0.5)
        async with running(named("cc", place), supervision=impatient, max_retries=0) as pools:
            hung = asyncio.ensure_future(read(pools, request(0, head=STUCK)))
            asked = [request(i) for i in range(1, 9)]
            (failed,) = await hung
            assert failed.error is not None
            assert "did not answer for 0.5 s" in failed.error
            await until(lambda: pools.ready)
            for r, outputs in zip(asked, await whole(pools, asked, Progress()), strict=True):
                assert right(r, outputs)

    asyncio.run(main())


class Flaky(ThreadHost):
    """Comes up only at some of its starts."""

    def __init__(self, good: Sequence[bool]) -> None:
        super().__init__("f", builder(step_s=0.001))
        self.good, self.starts = list(good), 0

    async def start(self, listener: Listener) -> Capacity:
        self.starts += 1
        if not self.good.pop(0):
            raise WorkerDied("no memory")
        return await super().start(listener)


def test_starts_that_fail_are_repeated() -> None:
    async def main() -> None:
        host = Flaky([True, False, False, True])
        async with running([(host, "colocated")]) as pools:
            stream = asyncio.ensure_future(read(pools, request(0, osl=100)))
            await until(lambda: pools.workers["f"].records)
            kill(pools, "f")
            assert right(request(0, osl=100), await stream)
            assert host.starts == 4

    asyncio.run(main())


def test_when_no_worker_comes_back_requests_end_with_the_reason() -> None:
    async def main() -> None:
        host = Flaky([True] + [False] * 1000)
        rules = Supervision(first_delay_s=0.01, patient_starts=3, longest_delay_s=0.01)
        async with running([(host, "colocated")], supervision=rules) as pools:
            stream = asyncio.ensure_future(read(pools, request(0, osl=9000)))
            await until(lambda: pools.workers["f"].records)
            kill(pools, "f")
            outputs = await stream
            assert outputs[-1].finish_reason == "error"
            assert outputs[-1].error == "no worker is left; f: no memory"
            assert not pools.ready
            later = await read(pools, request(1))
            assert later[-1].finish_reason == "error"

    asyncio.run(main())


def test_a_first_start_that_fails_leaves_nothing_running() -> None:
    async def main() -> None:
        good, bad = ThreadHost("t", builder()), Flaky([False])
        pools = Pools([(good, "colocated"), (bad, "colocated")], times=times())
        with pytest.raises(WorkerDied, match="no memory"):
            await asyncio.wait_for(pools.start(), DEADLINE_S)
        assert not any(m.up for m in pools.workers.values())
        assert not good.alive

    asyncio.run(main())


def test_delays_grow_and_are_bounded() -> None:
    rules = Supervision(first_delay_s=0.5, longest_delay_s=4.0)
    assert [rules.delay_s(n) for n in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert rules.delay_s(10_000) == 4.0


class Liar(Worker):
    """Loses a token, as a worker with a fault would."""

    def step(self) -> Batch | None:
        batch = super().step()
        if batch is None:
            return None
        events = tuple(
            Outputs(tuple(o for o in e.outputs if o.index != 7)) if isinstance(e, Outputs) else e for e in batch.events
        )
        return replace(batch, events=events)


def test_a_gap_in_an_answer_is_an_error_and_never_passed_on() -> None:
    def build() -> Worker:
        worker = builder()()
        worker.__class__ = Liar
        return worker

    async def main() -> None:
        log = Log()
        async with running([(ThreadHost("c", build), "colocated")], observer=log) as pools:
            outputs = await read(pools, request(0))
            assert len(ids(outputs)) == 7
            assert outputs[-1].error is not None
            assert "tokens 7 to 8" in outputs[-1].error
            await all_free(pools, log)

    asyncio.run(main())
