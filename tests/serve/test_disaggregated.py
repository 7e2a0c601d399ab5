"""Pools over real engines on small random models: the same tokens and texts, however the work is divided."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from pool_cases import DEADLINE_S, Log, read, running, until
from small_models import small_model
from toy_tokenizer import toy_tokenizer

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.types import EngineRequest, Generation, SamplingParams
from tandem.model.load import load_model, save_model
from tandem.model.tokenizer import load_tokenizer
from tandem.sched.route import Role
from tandem.serve.build import EmbeddedBuilder, EngineBuilder
from tandem.serve.hosts import ThreadHost, WorkerHandle
from tandem.serve.pools import Pools
from tandem.serve.process_host import ProcessHost

torch.set_num_threads(1)
CONFIG = EngineConfig(
    max_batch=6,
    step_tokens=64,
    pass_tokens=16,
    block_size=4,
    cache_bytes=1 << 22,
    prefix_cache_bytes=1 << 20,
    threads=1,
    max_context=512,
)
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "c": "colocated"}


@pytest.fixture(scope="module", params=["hybrid", "transformer", "recurrent"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@cache
def checkpoint(kind: str, at: Path) -> Path:
    path = at / kind
    save_model(small_model(kind), path)
    toy_tokenizer().save_pretrained(path)
    return path


def asked(count: int = 24) -> list[EngineRequest]:
    """Greedy and drawn, short and long, some that begin alike, some that stop at a text."""
    random = torch.Generator().manual_seed(5)
    common = torch.randint(3, 259, (70,), generator=random).tolist()
    found = []
    for i in range(count):
        own = torch.randint(3, 259, (1 + (37 * i) % 150,), generator=random).tolist()
        sampling = SamplingParams(
            max_tokens=4 + (11 * i) % 40,
            temperature=0.0 if i % 2 else 1.0,
            top_p=0.9 if i % 4 == 2 else 1.0,
            seed=i,
            repetition_penalty=1.1 if i % 5 == 0 else 1.0,
            stop=("a",) if i % 6 == 0 else (),
            logprobs=2 if i % 7 == 0 else None,
            ignore_eos=i % 3 == 0,
        )
        prompt = tuple([*common, *own] if i % 3 == 0 else own)
        found.append(EngineRequest(id=f"r{i}", prompt_ids=prompt, sampling=sampling))
    return found


def exact(found: list[Generation]) -> list[Generation]:
    """All of them, to the last bit of their logprobs; how much was cached is a matter of where they went."""
    return [replace(generation, cached_tokens=0) for generation in found]


def words(found: list[Generation]) -> list[tuple[object, ...]]:
    """Tokens, text and end: after a retry a prefill computes state that decode steps had computed, and rounds differently."""
    return [(g.token_ids, g.text, g.finish_reason) for g in found]


def alone(folder: Path, requests: list[EngineRequest]) -> list[Generation]:
    """Each by itself, in an engine of its own settings."""
    engine = Engine(load_model(folder), tokenizer=load_tokenizer(folder), config=CONFIG)
    return [engine.generate([r.prompt_ids], r.sampling)[0] for r in requests]


def threads(folder: Path, roles: str) -> list[tuple[WorkerHandle, Role]]:
    build = EmbeddedBuilder(decoder=load_model(folder), tokenizer=load_tokenizer(folder), engine=CONFIG)
    return [(ThreadHost(f"{role}{i}", build), ROLES[role]) for i, role in enumerate(roles)]


def processes(folder: Path, roles: str) -> list[tuple[WorkerHandle, Role]]:
    build = EngineBuilder(model=str(folder), dtype="float32", engine=CONFIG, transport_bytes=1 << 22)
    return [(ProcessHost(f"{role}{i}", build, threads=1), ROLES[role]) for i, role in enumerate(roles)]


async def served(pools: Pools, requests: list[EngineRequest]) -> list[Generation]:
    return [Generation.of(o) for o in await asyncio.gather(*(read(pools, r) for r in requests))]


async def nothing_held(pools: Pools, log: Log) -> None:
    """No request, no state between workers; blocks and slots are free, but for prefixes that are kept and count as such."""
    await until(lambda: not pools.in_flight and not pools.held_states)

    def free(name: str) -> bool:
        stats = log.stats[name]
        e = stats.engine
        return (e.free_blocks, e.free_slots) == (e.blocks, e.slots) and not (stats.held_states or stats.arriving)

    await until(lambda: all(free(name) for name in log.stats))
    await pools.check_integrity(DEADLINE_S)


@pytest.mark.parametrize("roles", ["c", "pd", "ppd"])
def test_tokens_and_texts_are_those_of_a_request_served_alone(folder: Path, roles: str) -> None:
    async def main() -> None:
        log = Log()
        requests = asked()
        async with running(threads(folder, roles), observer=log, prefix_tokens=16) as pools:
            assert exact(await served(pools, requests)) == exact(alone(folder, requests))
            handed = sum(life.transfer_end_s is not None for life in log.lives)
            assert handed >= 20 if "p" in roles else handed == 0
            await nothing_held(pools, log)

    asyncio.run(main())


@pytest.mark.slow
def test_processes_give_the_same_though_both_kinds_of_worker_are_killed(tmp_path: Path) -> None:
    folder = checkpoint("hybrid", tmp_path)

    async def main() -> None:
        log = Log()
        requests = asked(64)
        count = 0

        def seen(output: object) -> None:
            nonlocal count
            count += 1

        async with running(processes(folder, "ppdd"), observer=log, prefix_tokens=16) as pools:
            expected = alone(folder, requests)
            streams = asyncio.ensure_future(asyncio.gather(*(read(pools, r, seen) for r in requests)))
            for victim, mark in (("d2", 100), ("p0", 300)):
                await until(lambda mark=mark: count > mark)
                member = pools.workers[victim]
                assert isinstance(member.handle, ProcessHost)
                assert member.handle.pid is not None
                os.kill(member.handle.pid, signal.SIGKILL)
                await until(lambda member=member: not member.up)
            assert not streams.done()
            assert words([Generation.of(outputs) for outputs in await streams]) == words(expected)
            assert pools.retries
            await until(lambda: all(m.up for m in pools.workers.values()))
            assert exact(await served(pools, requests[:12])) == exact(expected[:12])
            await nothing_held(pools, log)

    asyncio.run(main())


def test_what_decodes_can_move_between_engines(tmp_path: Path) -> None:
    folder = checkpoint("hybrid", tmp_path)

    async def main() -> None:
        log = Log()
        requests = [EngineRequest(id=f"m{i}", prompt_ids=(5, 6, 7 + i), sampling=LONG) for i in range(5)]
        async with running(threads(folder, "pdd"), observer=log) as pools:
            streams = asyncio.ensure_future(served(pools, requests))
            await until(lambda: pools.workers["d1"].records)
            await pools.drain("d1", move=True)
            assert exact(await streams) == exact(alone(folder, requests))
            await nothing_held(pools, log)
            assert log.stats["d1"].taken + log.stats["d2"].taken > 5  # some twice

    asyncio.run(main())


LONG = SamplingParams(max_tokens=400, temperature=0.8, ignore_eos=True)


@pytest.mark.slow
def test_what_decodes_can_move_between_processes(tmp_path: Path) -> None:
    folder = checkpoint("hybrid", tmp_path)

    async def main() -> None:
        log = Log()
        requests = [EngineRequest(id=f"m{i}", prompt_ids=(5, 6, 7 + i), sampling=LONG) for i in range(5)]
        async with running(processes(folder, "dd"), observer=log) as pools:
            streams = asyncio.ensure_future(served(pools, requests))
            await until(lambda: pools.workers["d0"].records)
            await until(lambda: "d0" in log.stats and log.stats["d0"].engine.running)
            await pools.drain("d0", move=True)
            assert exact(await streams) == exact(alone(folder, requests))
            assert any(life.transfer_end_s is not None for life in log.lives)
            await nothing_held(pools, log)

    asyncio.run(main())
