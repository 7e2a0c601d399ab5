"""Scaling of live pools: what a policy says is carried out under load and nothing is lost; people and switches come first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from pool_cases import Log, all_free, handle, named, read, request, right, running, until

from tandem.sched.observation import Decision, Observation
from tandem.sched.route import Role
from tandem.serve.controller import Controller
from tandem.serve.hosts import WorkerHandle
from tandem.serve.observe import of_line, to_line
from tandem.serve.pools import Pools


class Script:
    """Answers with the targets it was given, in turn, the last one for ever."""

    def __init__(self, *targets: Mapping[Role, int]) -> None:
        self.targets, self.seen = list(targets), list[Observation]()

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        targets = self.targets[min(len(self.seen), len(self.targets)) - 1]
        return Decision(targets=targets, reason=f"{observation.arrived} came, {observation.waiting} wait")


def controller(pools: Pools, script: Script, **options: Any) -> Controller:
    return Controller(pools, script, clock=time.monotonic, **options)


def roles(pools: Pools) -> str:
    return "".join(sorted(m.role[0] for m in pools.workers.values() if m.accepting))


def test_workers_change_roles_start_and_leave_under_load_and_nothing_is_lost() -> None:
    names = iter(f"new{i}" for i in range(9))

    async def start(role: Role) -> WorkerHandle:
        return handle(next(names), "thread", step_s=0.0005)

    async def main() -> None:
        log = Log()
        async with running(named("ppd", "thread", step_s=0.0005), observer=log) as pools:
            script = Script({"prefill": 1, "decode": 2}, {"prefill": 2, "decode": 3}, {"prefill": 1, "decode": 1})
            scaled = controller(pools, script, start=start)
            asked = [request(i) for i in range(60)]
            reading = [asyncio.ensure_future(read(pools, r)) for r in asked]
            found = []
            await until(lambda: pools.in_flight)
            for _ in range(3):
                scaled.tick()
                await scaled.settled()
                assert pools.ready
                found.append(roles(pools))
            assert found == ["ddp", "dddpp", "dp"]
            answers = await asyncio.gather(*reading)
            assert all(right(r, outputs) for r, outputs in zip(asked, answers, strict=True))
            assert pools.retries == 0
            assert [len(done.steps) for done in scaled.history] == [1, 2, 3]
            await all_free(pools, log)

    asyncio.run(main())


def test_paused_and_dry_nothing_changes() -> None:
    async def main() -> None:
        async with running(named("ppd", "thread")) as pools:
            script = Script({"prefill": 1, "decode": 2})
            scaled = controller(pools, script, dry_run=True)
            scaled.tick()
            assert scaled.history[-1].steps == ["would turn a prefill worker into decode"]
            scaled.dry_run = False
            scaled.pause()
            assert scaled.tick() is None
            assert len(script.seen) == 1
            assert not scaled.changing
            assert roles(pools) == "dpp"
            scaled.resume()
            scaled.tick()
            await scaled.settled()
            assert roles(pools) == "ddp"

    asyncio.run(main())


def test_a_worker_that_a_person_drained_is_not_touched() -> None:
    async def main() -> None:
        async with running(named("ppdd", "thread")) as pools:
            script = Script({"prefill": 0, "decode": 3})
            scaled = controller(pools, script)
            await pools.drain("p0")
            scaled.tick()
            await scaled.settled()
            assert pools.workers["p0"].draining
            assert pools.workers["p0"].role == "prefill"
            assert pools.workers["p1"].role == "prefill"  # the last that prefills
            assert scaled.history[-1].steps[0].startswith("not done: ")
            seen = {pool.role: (pool.up, pool.draining) for pool in script.seen[-1].pools}
            assert seen == {"prefill": (1, 0), "decode": (2, 0)}

    asyncio.run(main())


def test_observations_replayed_give_the_same_decisions() -> None:
    async def main() -> None:
        lines: list[str] = []
        async with running(named("pd", "thread")) as pools:
            scaled = controller(pools, Script({"prefill": 1, "decode": 1}), record=lines.append)
            for i in range(3):
                asked = request(i, isl=30 + i, osl=20)
                assert right(asked, await read(pools, asked))
                scaled.tick()
            decided = [done.decision for done in scaled.history]
        again = Script({"prefill": 1, "decode": 1})
        assert [again.decide(of_line(line)) for line in lines] == decided
        assert [to_line(seen) for seen in again.seen] == lines
        assert [seen.arrived for seen in again.seen] == [1, 1, 1]
        assert [seen.isl.mean for seen in again.seen if seen.isl] == [30.0, 31.0, 32.0]
        assert [seen.osl.mean for seen in again.seen if seen.osl] == [20.0] * 3

    asyncio.run(main())
