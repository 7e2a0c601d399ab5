"""Workers in processes of their own come and go while others serve, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

import pytest
from pool_cases import Log, all_free, handle, named, read, request, right, running, until

from tandem.serve.hosts import WorkerDied
from tandem.serve.process_host import ProcessHost
from tandem.spec.errors import SpecError


def gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


class BrokenBuild:
    def __call__(self) -> Any:
        raise RuntimeError("no weights here")


@pytest.mark.slow
def test_processes_come_and_go_under_load() -> None:
    async def main() -> None:
        log = Log()
        async with running(named("pd", "process", step_s=0.001), observer=log) as pools:
            asked = [request(i, isl=60, osl=200) for i in range(24)]
            reading = [asyncio.ensure_future(read(pools, one)) for one in asked]
            await until(lambda: any(len(record.tokens) > 5 for record in pools.records))
            await asyncio.gather(
                pools.add(handle("p9", "process", step_s=0.001), "prefill"),
                pools.add(handle("d9", "process", step_s=0.001), "decode"),
            )
            assert list(pools.workers) == ["p0", "d1", "p9", "d9"]
            first: Any = pools.workers["d1"].handle
            pid = first.pid
            assert pid is not None
            assert await pools.drain("d1", move=True, deadline_s=30.0, scaling=True)
            await pools.remove("d1")
            assert pools.ready
            await until(lambda: gone(pid))
            answers = await asyncio.gather(*reading)
            assert all(right(one, outputs) for one, outputs in zip(asked, answers, strict=True))
            assert pools.retries == 0
            assert list(pools.workers) == ["p0", "p9", "d9"]
            await all_free(pools, log)
            with pytest.raises(SpecError, match="d9"):
                await pools.remove("d9")
            with pytest.raises(SpecError, match="names of their own"):
                await pools.add(handle("d9", "process"), "decode")
            with pytest.raises(SpecError, match="handed over"):
                await pools.add(handle("t", "thread"), "decode")
            with pytest.raises(WorkerDied, match="no weights here"):
                await pools.add(ProcessHost("broken", BrokenBuild()), "decode")
            assert list(pools.workers) == ["p0", "p9", "d9"]
            again = request(99, osl=30)
            assert right(again, await read(pools, again))

    asyncio.run(main())
