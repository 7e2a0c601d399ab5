"""Workers as Ray's actors: what they do in a thread and in a process they do there, and nobody sees one die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from fake_engine import POISON, builder, expected
from pool_cases import request, until
from ray_cases import actor
from test_processes import DEADLINE_S, Heard, broken
from test_ray_states import SMALL, random_state, send

from tandem.engine.types import EngineRequest
from tandem.serve.hosts import WorkerDied
from tandem.serve.messages import Capacity, Ping, Pong, Submit
from tandem.serve.ray_cluster import RayCluster
from tandem.serve.ray_states import RayObjectStates
from tandem.spec.errors import SpecError

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster("ray", object_store_bytes=200 << 20)
    yield cluster
    cluster.close()


def test_a_cluster_has_nodes_and_a_second_connection_shares_it(cluster: RayCluster) -> None:
    assert len(cluster.nodes) == 1
    assert cluster.gpus == 0
    RayCluster("ray").close()
    assert len(cluster.nodes) == 1


def test_an_actor_serves_and_can_be_started_again(cluster: RayCluster) -> None:
    async def main() -> None:
        handle = actor("r", builder(), threads=1, node=cluster.nodes[0])

        async def live() -> None:
            heard = Heard()
            capacity = await handle.start(heard)
            assert handle.alive
            assert capacity.pid not in (None, os.getpid())
            asked = request(1)
            for number in range(50):
                handle.send(Ping(number))
                if number % 10 == 0:
                    await asyncio.sleep(0)  # so that they go in several calls
            handle.send(Submit(asked))
            await heard.until(lambda: heard.tokens(asked.id) == expected(asked))
            assert [e.number for e in heard.events if isinstance(e, Pong)] == list(range(50))
            await handle.stop(DEADLINE_S)
            assert not handle.alive
            assert heard.deaths == []
            handle.send(Ping(2))  # dropped

        await live()
        await live()

    asyncio.run(main())


def test_what_cannot_be_built_is_told_in_one_line() -> None:
    async def main() -> None:
        heard = Heard()
        with pytest.raises(WorkerDied, match=r"^OSError: no such model here$"):
            await actor("r", broken).start(heard)
        with pytest.raises(WorkerDied, match=r"^was not up within 0.5 s: the cluster has no place for it"):
            await actor("r", builder(), num_gpus=64, start_s=0.5).start(heard)
        assert heard.deaths == []

    asyncio.run(main())


def test_deaths_are_told_once_with_their_reason_and_ray_prints_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG", logger="tandem.serve")

    async def main() -> None:
        handle = actor("r", builder(step_s=0.001))

        async def dies(how: Callable[[Capacity], None]) -> list[str]:
            heard = Heard()
            capacity = await handle.start(heard)
            handle.send(Submit(request(1, osl=5000)))
            await heard.until(lambda: heard.tokens("r1"))
            how(capacity)
            await heard.until(lambda: heard.deaths)
            assert not handle.alive
            return heard.deaths

        poison = EngineRequest(id="a", prompt_ids=(POISON,))
        assert await dies(lambda _: handle.send(Submit(poison))) == ["RuntimeError: the poison has been eaten"]
        assert await dies(lambda _: handle.kill("it said nothing")) == ["it said nothing"]
        [reason] = await dies(lambda capacity: os.kill(capacity.pid or 0, signal.SIGKILL))
        assert reason.startswith("its actor is gone (")
        assert "\n" not in reason
        await until(lambda: "ray: A worker died or was killed" in caplog.text)

    asyncio.run(main())
    assert capfd.readouterr() == ("", "")


def test_addresses_that_cannot_be_are_refused() -> None:
    for address in ("", "raw", "ray:/x:1", "host", "host:port"):
        with pytest.raises(SpecError, match=r"must be ray, auto, host:port or ray://host:port"):
            RayCluster(address)


def test_a_cluster_that_is_not_there_is_one_line(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        for scheme in ("", "ray://"):
            address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(SpecError, match=r"^cluster='.*': cannot be joined \(ConnectionRefusedError: .*\)$"):
                RayCluster(address)
    with pytest.raises(SpecError, match="cannot be joined"):
        RayCluster("127.0.0.1:99999")


def test_states_go_through_the_real_object_store(cluster: RayCluster) -> None:
    states = RayObjectStates(1 << 30)
    for tokens in (7, 20_000):
        state = random_state(SMALL, tokens)
        receipt = send(states, SMALL, state)
        opened = states.open(receipt, SMALL)  # without torch's warning of memory that must not be written to
        assert opened.state.to_bytes() == state.to_bytes()
        states.release(receipt)
    states.close()
