from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
from fake_engine import POISON, builder, expected
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.types import EngineRequest, SamplingParams
from tandem.serve.frames import Unpacker, packed
from tandem.serve.hosts import ThreadHost, WorkerDied, WorkerHandle
from tandem.serve.messages import Batch, Event, HandedOff, Outputs, Ping, Pong, Submit
from tandem.serve.process_host import ProcessHost
from tandem.serve.worker import Worker

DEADLINE_S = 30.0


class Heard:
    """A listener that can be waited on."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.deaths: list[str] = []
        self._news = asyncio.Event()

    def on_events(self, batch: Batch) -> None:
        self.events.extend(batch.events)
        self._news.set()

    def on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self._news.set()

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not what():
                self._news.clear()
                await self._news.wait()

    def tokens(self, name: str) -> list[int]:
        outputs = [o for e in self.events if isinstance(e, Outputs) for o in e.outputs if o.request_id == name]
        return [t for o in outputs for t in o.token_ids]


def broken() -> Worker:
    raise OSError("no such model\nhere")


def handles(build: Callable[[], Worker]) -> list[WorkerHandle]:
    return [ThreadHost("t", build), ProcessHost("p", build, threads=1)]


def request(name: str = "a", *, osl: int = 20) -> EngineRequest:
    return EngineRequest(id=name, prompt_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=osl))


@given(st.lists(st.one_of(st.binary(max_size=300), st.integers(), st.text(max_size=20)), max_size=8), st.data())
def test_messages_survive_any_cut(messages: list[object], data: st.DataObject) -> None:
    stream, unpacker, found = b"".join(map(packed, messages)), Unpacker(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found.extend(unpacker.feed(stream[:size]))
        stream = stream[size:]
    assert found == messages


@pytest.mark.parametrize("place", [0, 1], ids=["thread", "process"])
def test_a_worker_serves_wherever_it_lives_and_can_be_started_again(place: int) -> None:
    async def main() -> None:
        handle = handles(builder())[place]

        async def live() -> None:
            heard = Heard()
            capacity = await handle.start(heard)
            assert handle.alive
            assert capacity.max_batch == 16
            assert (capacity.pid is None) == handle.by_reference
            handle.send(Submit(request()))
            handle.send(Ping(1))
            await heard.until(lambda: heard.tokens("a") == expected(request()))
            await heard.until(lambda: Pong(1) in heard.events)
            await handle.stop(DEADLINE_S)
            assert not handle.alive
            assert heard.deaths == []
            handle.send(Ping(2))  # dropped

        await live()
        await live()

    asyncio.run(main())


def test_uvloop_carries_processes_too() -> None:
    """It is the server's event loop, and its transports are of classes of their own."""
    import uvloop

    async def main() -> None:
        heard = Heard()
        handle = ProcessHost("p", builder(), threads=1)
        await handle.start(heard)
        handle.send(Submit(request()))
        await heard.until(lambda: heard.tokens("a") == expected(request()))
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGKILL)
        await heard.until(lambda: heard.deaths)
        await handle.start(Heard())
        await handle.stop(DEADLINE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("place", [0, 1], ids=["thread", "process"])
def test_what_cannot_be_built_is_told_in_one_line(place: int) -> None:
    async def main() -> None:
        heard = Heard()
        with pytest.raises(WorkerDied, match=r"^OSError: no such model here$"):
            await handles(broken)[place].start(heard)
        assert heard.deaths == []

    asyncio.run(main())


@pytest.mark.parametrize("place", [0, 1], ids=["thread", "process"])
def test_an_error_in_a_step_is_a_death_with_its_reason(place: int) -> None:
    async def main() -> None:
        heard = Heard()
        handle = handles(builder())[place]
        await handle.start(heard)
        handle.send(Submit(EngineRequest(id="a", prompt_ids=(POISON,))))
        await heard.until(lambda: heard.deaths)
        assert heard.deaths == ["RuntimeError: the poison has been eaten"]
        assert not handle.alive
        await handle.start(Heard())
        await handle.stop(DEADLINE_S)

    asyncio.run(main())


@pytest.mark.parametrize("place", [0, 1], ids=["thread", "process"])
def test_giving_a_worker_up_silences_it(place: int) -> None:
    async def main() -> None:
        heard = Heard()
        handle = handles(builder(step_s=0.001))[place]
        await handle.start(heard)
        handle.send(Submit(request(osl=5000)))
        await heard.until(lambda: heard.tokens("a"))
        handle.kill("it said nothing")
        await heard.until(lambda: heard.deaths)
        assert heard.deaths == ["it said nothing"]
        count = len(heard.events)
        await handle.start(Heard())  # another life, and nothing of the old one comes
        assert len(heard.events) == count
        await handle.stop(DEADLINE_S)

    asyncio.run(main())


def test_a_killed_process_is_noticed_at_once_and_swept_after() -> None:
    async def main() -> None:
        heard, swept = Heard(), []
        handle = ProcessHost("p", builder(), threads=1, sweep=lambda: swept.append(1))
        await handle.start(heard)
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGKILL)
        await heard.until(lambda: heard.deaths)
        assert heard.deaths == ["its process was ended by signal 9"]
        assert swept == [1]

    asyncio.run(main())


def test_signals_to_the_group_leave_workers_to_their_server() -> None:
    async def main() -> None:
        heard = Heard()
        handle = ProcessHost("p", builder(), threads=1)
        await handle.start(heard)
        assert handle.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(handle.pid, number)
        handle.send(Submit(request(), hand_off=True))
        await heard.until(lambda: any(isinstance(e, HandedOff) for e in heard.events))
        await handle.stop(DEADLINE_S)
        assert heard.deaths == []

    asyncio.run(main())


def test_a_process_whose_server_is_killed_ends() -> None:
    code = textwrap.dedent("""
        import asyncio, os
        from fake_engine import builder
        from test_processes import Heard, request
        from tandem.serve.messages import Submit
        from tandem.serve.process_host import ProcessHost

        async def main():
            handle, heard = ProcessHost("p", builder(), threads=1), Heard()
            await handle.start(heard)
            handle.send(Submit(request(osl=5000)))
            print(handle.pid, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        worker = os.pidfd_open(int(server.stdout.readline()))
        server.kill()
    try:
        import select

        readable, _, _ = select.select([worker], [], [], DEADLINE_S)
        assert readable
    finally:
        os.close(worker)
