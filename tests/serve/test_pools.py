from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
from fake_engine import expected
from pool_cases import Log, all_free, handle, ids, named, read, request, right, running, times, until

from tandem.sched.route import RoutingLimits
from tandem.serve.pools import Pools
from tandem.spec.errors import SpecError


@pytest.mark.parametrize(
    ("roles", "place"),
    [(roles, "thread") for roles in ("c", "d", "pd", "ppdd", "pcd")] + [pytest.param("pd", "process", marks=pytest.mark.slow)],
)
def test_every_stream_is_whole_whatever_the_pools_look_like(roles: str, place: str) -> None:
    async def main() -> None:
        log = Log()
        async with running(named(roles, place), observer=log) as pools:
            assert pools.ready
            assert pools.max_context == 10_000
            asked = [request(i, isl=1 + 37 * i % 200, osl=1 + 11 * i % 60) for i in range(60)]
            found = await asyncio.gather(*(read(pools, r) for r in asked))
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))
            await all_free(pools, log)
        assert len(log.lives) == 60
        handed = [life for life in log.lives if life.transfer_end_s is not None]
        if roles in ("pd", "ppdd"):
            assert len(handed) == sum(r.sampling.max_tokens > 1 for r in asked)
        elif "p" not in roles:
            assert not handed
        for life in log.lives:
            assert life.prefill_start_s is not None
            assert life.prefill_end_s is not None

    asyncio.run(main())


def test_short_prompts_stay_where_they_decode_and_long_ones_do_not() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("pd", "thread"), observer=log, routing=RoutingLimits(max_local_tokens=16)) as pools:
            for number, isl in enumerate((8, 300)):
                asked = request(number, isl=isl)
                assert right(asked, await read(pools, asked))
        assert [life.transfer_start_s is not None for life in log.lives] == [False, True]

    asyncio.run(main())


@pytest.mark.parametrize("place", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_a_client_that_goes_away_leaves_nothing_behind(place: str) -> None:
    """At any moment: before the first token, between two workers, in mid-answer."""

    async def main() -> None:
        log = Log()
        workers = named("pd", place, max_batch=4, step_s=0.0005)
        async with running(workers, observer=log, held_states=3) as pools:

            async def some(number: int) -> None:
                asked = request(number, osl=200)
                async with aclosing(pools.stream(asked)) as stream:
                    if number % 5:
                        seen = 0
                        async for output in stream:
                            seen += len(output.token_ids)
                            if seen >= number % 37:
                                return

            async def gone(number: int) -> None:
                task = asyncio.ensure_future(read(pools, request(1000 + number, osl=200)))
                for _ in range(2 + 5 * number):  # turns of the loop: some are cancelled in the queue, some in mid-answer
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])

            await asyncio.gather(*(some(i) for i in range(40)), *(gone(i) for i in range(40)))
            await all_free(pools, log)
            asked = request(9999)
            assert right(asked, await read(pools, asked))
            await all_free(pools, log)
        reasons = [life.finish_reason for life in log.lives]
        assert reasons.count("cancelled") >= 50

    asyncio.run(main())


def test_prompts_that_would_make_more_states_than_can_be_held_wait_here() -> None:
    async def main() -> None:
        log = Log()
        workers = [(handle("p", "thread"), "prefill"), (handle("d", "thread", max_batch=1, step_s=0.001), "decode")]
        async with running(workers, observer=log, held_states=2, queued_tokens=64) as pools:  # type: ignore[arg-type]
            most = 0

            def look(output: object) -> None:
                nonlocal most
                most = max(most, pools.held_states)

            asked = [request(i, isl=50, osl=12) for i in range(12)]
            found = await asyncio.gather(*(read(pools, r, look) for r in asked))
            assert all(right(r, outputs) for r, outputs in zip(asked, found, strict=True))
            assert most == 2
            await all_free(pools, log)

    asyncio.run(main())


def test_the_client_that_was_served_least_goes_first() -> None:
    async def main() -> None:
        log = Log()
        workers = named("c", "thread", max_batch=1)
        async with running(workers, observer=log, queued_tokens=1) as pools:
            many = [request(i, client="many", osl=20) for i in range(20)]
            one = request(99, client="one", osl=20)
            await asyncio.gather(*(read(pools, r) for r in [*many, one]))
        order = [life.id for life in log.lives]
        assert order.index("r99") <= 2  # not behind all 20 that came before

    asyncio.run(main())


def test_what_cannot_be_is_told_and_harms_nobody() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("pd", "thread", step_s=0.001), observer=log, max_waiting=2) as pools:
            (failed,) = await read(pools, request(0, isl=10_500))
            assert failed.finish_reason == "error"
            assert failed.error is not None
            assert "10500 tokens" in failed.error
            first = asyncio.ensure_future(read(pools, request(1, osl=500)))
            await until(lambda: pools.in_flight)
            with pytest.raises(SpecError, match="being served already"):
                await read(pools, request(1))
            assert right(request(1, osl=500), await first)
            await all_free(pools, log)

    asyncio.run(main())


def test_more_than_may_wait_are_refused() -> None:
    async def main() -> None:
        async with running(named("c", "thread", step_s=0.001), max_waiting=3, queued_tokens=1) as pools:
            asked = [request(i) for i in range(10)]
            found = await asyncio.gather(*(read(pools, r) for r in asked), return_exceptions=True)
            refused = [f for f in found if isinstance(f, SpecError)]
            assert refused
            assert "wait already" in str(refused[0])
            for r, outputs in zip(asked, found, strict=True):
                assert isinstance(outputs, SpecError) or (isinstance(outputs, list) and right(r, outputs))

    asyncio.run(main())


def test_a_request_that_was_served_elsewhere_goes_on_after_its_tokens() -> None:
    async def main() -> None:
        async with running(named("pd", "thread")) as pools:
            whole = request(0, osl=30)
            part = replace(whole, output_ids=tuple(expected(whole)[:13]))
            assert ids(await read(pools, part)) == expected(whole)[13:]

    asyncio.run(main())


def test_closing_ends_what_runs_with_a_word_and_takes_nothing_new() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("pd", "thread", step_s=0.001), observer=log) as pools:
            quick, slow = request(0, osl=20), request(1, osl=9000)
            tasks = [asyncio.ensure_future(read(pools, r)) for r in (quick, slow)]
            await until(lambda: pools.in_flight == 2)
            closing = asyncio.ensure_future(pools.close(drain_s=0.5))
            await asyncio.sleep(0)
            assert not pools.ready
            with pytest.raises(SpecError, match="shutting down"):
                await read(pools, request(2))
            assert right(quick, await tasks[0])
            outputs = await tasks[1]
            assert outputs[-1].finish_reason == "error"
            assert outputs[-1].error == "the server is shutting down"
            await closing

    asyncio.run(main())


def test_workers_that_cannot_work_together_are_refused() -> None:
    def pools(roles: str, place: str = "thread") -> Pools:
        return Pools(named(roles, place), times=times())

    with pytest.raises(SpecError, match="none of them decodes"):
        pools("pp")
    with pytest.raises(SpecError, match="names of their own"):
        Pools([*named("c", "thread"), *named("c", "thread")], times=times())
    with pytest.raises(SpecError, match="cannot be handed over"):
        Pools([*named("p", "thread"), (handle("d", "process"), "decode")], times=times())
    with pytest.raises(SpecError, match="await start"):
        _ = pools("c").max_context
