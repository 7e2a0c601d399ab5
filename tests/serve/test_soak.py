"""A long run of pools over real engines: random lengths, clients that go away, requests that are too long; nothing may pile up.

`TANDEM_SOAK_S` is how long, 60 s without it; `TANDEM_SOAK_WORKERS=processes` puts workers into processes of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import aclosing
from pathlib import Path

import pytest
from pool_cases import running, until
from test_disaggregated import Log, checkpoint, nothing_held, processes, threads

from tandem.engine.types import EngineRequest, SamplingParams
from tandem.serve.pools import Pools

SOAK_S = float(os.environ.get("TANDEM_SOAK_S", "60"))
CLIENTS = 24
ROUNDS = 6
GROWTH_BYTES = 24 << 20
"""What may come on top of the first round's memory: arenas of the allocator, and lists of this test."""


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pids(pools: Pools) -> list[int]:
    workers = [m.capacity.pid for m in pools.workers.values() if m.capacity is not None]
    return [os.getpid(), *(pid for pid in workers if pid is not None)]


class Counts:
    def __init__(self) -> None:
        self.complete = self.cancelled = self.refused = self.number = 0


async def client(pools: Pools, chance: random.Random, counts: Counts, end_s: float) -> None:
    while time.monotonic() < end_s:
        counts.number += 1
        kind = chance.random()
        isl = 600 if kind < 0.05 else chance.randint(1, 240)
        sampling = SamplingParams(
            max_tokens=chance.randint(1, 100), temperature=chance.choice((0.0, 0.8)), seed=counts.number, ignore_eos=True
        )
        prompt = tuple(chance.randrange(3, 259) for _ in range(isl))
        if kind > 0.5:
            prompt = (*range(10, 10 + min(isl, 64)), *prompt)[: min(isl + 64, 300)]  # a beginning that many share
        asked = EngineRequest(id=f"s{counts.number}", prompt_ids=prompt, sampling=sampling, client=f"c{counts.number % 5}")
        leave_after = chance.randint(0, 20) if 0.05 <= kind < 0.3 else None
        got = 0
        async with aclosing(pools.stream(asked)) as stream:
            async for output in stream:
                assert output.index == got
                got += len(output.token_ids)
                if output.finish_reason == "error":
                    assert isl == 600
                    counts.refused += 1
                elif output.finish_reason is not None:
                    assert got == sampling.max_tokens
                    counts.complete += 1
                elif leave_after is not None and got >= leave_after:
                    counts.cancelled += 1
                    break


@pytest.mark.slow
def test_memory_stays_flat_and_nothing_leaks(tmp_path: Path) -> None:
    folder = checkpoint("hybrid", tmp_path)
    places = processes if os.environ.get("TANDEM_SOAK_WORKERS") == "processes" else threads

    async def main() -> None:
        log, counts, chance = Log(), Counts(), random.Random(0)
        memory: list[list[int]] = []
        async with running(places(folder, "pdd"), observer=log, prefix_tokens=16, deadline_s=SOAK_S + 120) as pools:
            for _ in range(ROUNDS):
                end_s = time.monotonic() + SOAK_S / ROUNDS
                await asyncio.gather(*(client(pools, chance, counts, end_s) for _ in range(CLIENTS)))
                await nothing_held(pools, log)
                log.lives.clear()
                memory.append([resident_bytes(pid) for pid in pids(pools)])
            assert pools.retries == 0
            await until(lambda: not pools.in_flight)
        print(f"{counts.complete} complete, {counts.cancelled} cancelled, {counts.refused} refused; bytes: {memory}")
        assert min(counts.complete, counts.cancelled, counts.refused) > 0
        for before, after in zip(memory[1], memory[-1], strict=True):
            assert after - before < GROWTH_BYTES

    asyncio.run(main())
