"""Emulated workers: times of tables, schedules of the simulator, streams that lose nothing, a server over HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from fake_frontend import FakeFrontend
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Live
from pool_cases import QUICK, Log, all_free, read, request, running, until

from tandem.engine.types import EngineRequest, Grammar, SamplingParams, TokenOutput
from tandem.sched.batch import BatchLimits
from tandem.sched.request import Request
from tandem.sched.route import Role
from tandem.serve.emulated import EmulatedEngine
from tandem.serve.emulated_host import EmulatedHost
from tandem.serve.emulated_state import Letters
from tandem.serve.hosts import WorkerHandle
from tandem.serve.launch import Emulation, Launched, ServeOptions, deployment_of
from tandem.serve.messages import Capacity
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.simulate import run
from tandem.sim.times import StepTable
from tandem.spec.errors import SpecError
from tandem.spec.workload import Trace

WORD = "abcdefg"
LETTERS = Letters(ids=tuple(range(100, 107)), texts=tuple(WORD))
LIMITS = BatchLimits(max_batch=6, step_tokens=96, pass_tokens=32, block_size=16)


def table(scale: float = 1.0) -> StepTable:
    return StepTable(
        base_s=[0.0, *(scale * (0.004 + 0.0003 * b) for b in range(1, 33))],
        per_token_s=[0.0, *(scale * 2e-6 for _ in range(32))],
        chunk_tokens=[1.0, 32.0, 128.0],
        chunk_s=[scale * 0.003, scale * 0.006, scale * 0.02],
        mixed_s=[scale * 0.001, scale * 0.004, scale * 0.018],
        per_pair_s=scale * 1e-8,
        state_bytes=1e6,
        state_bytes_per_token=1e4,
        link_bytes_per_s=1e9 / scale,
    )


def engine(**options: Any) -> EmulatedEngine:
    settled = {"times": table(), "limits": LIMITS, "blocks": 40, "max_context": 600, "letters": LETTERS, **options}
    return EmulatedEngine(**settled)


def ask(number: int, isl: int, osl: int, seed: int = 0) -> EngineRequest:
    prompt = tuple(1000 * number + i for i in range(isl))
    return EngineRequest(id=f"r{number:03}", prompt_ids=prompt, sampling=SamplingParams(max_tokens=osl, seed=seed))


def text_of(asked: EngineRequest) -> str:
    begin = asked.sampling.seed + len(asked.prompt_ids)
    return "".join(WORD[(begin + i) % len(WORD)] for i in range(asked.sampling.max_tokens))


def alone(emulated: EmulatedEngine, arrivals: Sequence[tuple[float, EngineRequest]]) -> tuple[list[Request], dict[str, str]]:
    """All requests through one engine, on its own clock."""
    left, lives, texts = list(arrivals), list[Request](), dict[str, str]()
    while left or emulated.has_work:
        if not emulated.has_work:
            emulated.now_s = max(emulated.now_s, left[0][0])
        while left and left[0][0] <= emulated.now_s:
            arrival_s, asked = left.pop(0)
            emulated.add(asked, arrival_s=arrival_s)
        result = emulated.step()
        lives += result.finished
        for output in result.outputs:
            assert len(texts.get(output.request_id, "")) == output.index
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
    emulated.check_integrity()
    assert emulated.stats.free_blocks == 40
    return sorted(lives, key=lambda life: life.id), texts


@pytest.mark.parametrize(("seed", "preempts"), [(0, False), (1, False), (2, True), (3, True), (4, True)])
def test_a_worker_takes_the_time_that_the_simulator_gives_it(seed: int, preempts: bool) -> None:
    draw = random.Random(seed)
    arrivals = np.cumsum([draw.expovariate(20.0) for _ in range(40)])
    arrivals -= arrivals[0]
    isl = np.array([draw.randint(1, 200) for _ in range(40)])
    osl = np.array([draw.randint(1, 180 if preempts else 20) for _ in range(40)])
    asked = [(float(at), ask(i, int(n), int(m))) for i, (at, n, m) in enumerate(zip(arrivals, isl, osl, strict=True))]
    lives, texts = alone(engine(), asked)
    kind = WorkerKind(name="toy", times=table(), limits=LIMITS, blocks=40)
    config = SimConfig(groups=(Group(kind=kind, role="colocated", count=1),))
    found = run(config, Trace(name="t", arrival_s=arrivals, isl=isl, osl=osl)).requests
    assert texts == {r.id: text_of(r) for _, r in asked}
    assert [life.preemptions for life in lives] == found.preemptions.tolist()
    assert (found.preemptions.sum() > 0) == preempts
    for name in ("prefill_start_s", "prefill_end_s", "first_token_s", "done_s"):
        mine = np.array([getattr(life, name) for life in lives])
        np.testing.assert_allclose(mine, getattr(found, name), rtol=0.0, atol=5e-3 * np.mean(found.e2e_s), err_msg=name)
    np.testing.assert_allclose([(life.done_s or 0.0) - life.arrival_s for life in lives], found.e2e_s, rtol=0.005)


def test_steps_told_together_take_the_same_time() -> None:
    asked = [(0.0, ask(1, 20, 50)), (0.0, ask(2, 30, 35)), (1.0, ask(3, 10, 20))]
    plain, texts = alone(engine(), asked)
    outputs = []
    coarse = engine(stride_s=0.05)
    coarse.add(asked[0][1], arrival_s=0.0)
    while coarse.has_work:
        outputs += coarse.step().outputs
    assert 5 < len(outputs) < 12
    strided, texts_too = alone(engine(stride_s=0.05), asked)
    assert texts_too == texts
    for one, other in zip(plain, strided, strict=True):
        assert one.first_token_s == pytest.approx(other.first_token_s)
        assert one.done_s == pytest.approx(other.done_s)


def test_a_known_beginning_is_not_computed_again() -> None:
    emulated = engine(prefix_tokens=512, cell_tokens=32)
    prompt = tuple(range(150))
    first = EngineRequest(id="a", prompt_ids=prompt, sampling=SamplingParams(max_tokens=1))
    longer = EngineRequest(id="b", prompt_ids=(*prompt[:100], *range(900, 950)), sampling=SamplingParams(max_tokens=1))
    again = EngineRequest(id="c", prompt_ids=prompt, sampling=SamplingParams(max_tokens=1))
    seconds, cached = [], []
    for one in (first, longer, again):
        began_s = emulated.now_s
        emulated.add(one)
        while emulated.has_work:
            for output in emulated.step().outputs:
                cached.append(output.cached_tokens)
        seconds.append(emulated.now_s - began_s)
    assert cached == [0, 96, 128]
    assert seconds[2] < seconds[1] < seconds[0]
    assert emulated.stats.prompt_tokens == 450
    assert emulated.stats.prefix_tokens == 224
    emulated.check_integrity()


def test_a_state_comes_when_its_transfer_has_had_its_time() -> None:
    source, target = engine(), engine()
    source.add(ask(1, 40, 9), hand_off=True)
    (handoff,) = [h for _ in range(2) for h in source.step().handoffs]
    source.check_integrity()
    target.now_s = source.now_s
    released: list[float] = []
    handoff.release = lambda: released.append(target.now_s)
    target.import_state(handoff)
    due_s = source.now_s + table().transfer_s(40)
    assert target.next_state_s == pytest.approx(due_s)
    assert not target.step().outputs
    target.now_s = due_s
    text, life = "", None
    while target.has_work:
        result = target.step()
        text += "".join(output.text for output in result.outputs)
        life = next(iter(result.finished), None)
    assert released == [due_s]
    assert life is not None
    assert (life.transfer_start_s, life.transfer_end_s) == (source.now_s, due_s)
    assert text == text_of(ask(1, 40, 9))[1:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 120), st.integers(1, 40)), max_size=60))
def test_whatever_happens_nothing_leaks_and_texts_go_on_where_they_were(
    events: list[tuple[int, int, int]],
) -> None:
    pair = [engine(), engine(stride_s=0.02)]
    asked: dict[str, EngineRequest] = {}
    texts: dict[str, str] = {}
    gone: set[str] = set()

    def step(emulated: EmulatedEngine, other: EmulatedEngine) -> None:
        due_s = emulated.next_state_s
        if due_s is not None and not emulated.stats.running:
            emulated.now_s = max(emulated.now_s, due_s)
        result = emulated.step()
        for output in result.outputs:
            take(output)
        for handoff in result.handoffs:
            other.now_s = max(other.now_s, emulated.now_s)
            other.import_state(handoff)

    def take(output: TokenOutput) -> None:
        text = texts.get(output.request_id, "")
        assert output.index == len(text)
        texts[output.request_id] = text + output.text

    for what, isl, osl in events:
        number = len(asked)
        if what <= 1:
            one = asked[f"r{number:03}"] = ask(number, isl, osl, seed=isl)
            pair[number % 2].add(one, hand_off=what == 1)
        elif what == 2 and asked:
            name = sorted(asked)[isl % number]
            found = [emulated.cancel(name) for emulated in pair]
            gone |= {name} if any(found) else set()
        elif what == 3 and asked:
            name, (source, target) = sorted(asked)[isl % number], (pair if osl % 2 else pair[::-1])
            try:
                moved = source.export_state(name)
            except SpecError:
                continue
            target.now_s = max(target.now_s, source.now_s)
            target.import_state(moved)
        else:
            step(*(pair if isl % 2 else pair[::-1]))
    for _ in range(20_000):
        if not any(emulated.has_work for emulated in pair):
            break
        step(*pair)
        step(*pair[::-1])
    for emulated in pair:
        emulated.check_integrity()
        assert (emulated.stats.free_blocks, emulated.stats.free_slots) == (40, 6)
    for name, one in asked.items():
        whole = text_of(one)
        assert texts.get(name, "") == whole or (name in gone and whole.startswith(texts.get(name, "")))


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("response_format", {"grammar": Grammar(kind="json_object")}),
        ("logprobs", {"logprobs": 2}),
        ("prompt", {"max_tokens": 590}),
    ],
)
def test_what_needs_a_model_or_more_room_is_refused_by_name(field: str, asked: dict[str, Any]) -> None:
    emulated = engine(blocks=20)
    with pytest.raises(SpecError, match=f"^{field}: "):
        emulated.add(EngineRequest(id="x", prompt_ids=(1, 2), sampling=SamplingParams(**asked)))
    assert not emulated.has_work


# On an event loop, in real time.


def hosts(roles: str, **options: Any) -> list[tuple[WorkerHandle, Role]]:
    def build() -> tuple[EmulatedEngine, Capacity]:
        made = engine(times=table(0.05), blocks=4000, max_context=2000, limits=BatchLimits(max_batch=32, step_tokens=512))
        return made, Capacity(max_context=2000, max_batch=32, tokens=64_000)

    full: dict[str, Role] = {"p": "prefill", "d": "decode", "c": "colocated"}
    return [(EmulatedHost(f"{role}{i}", build, **options), full[role]) for i, role in enumerate(roles)]


def answer(outputs: list[TokenOutput]) -> str:
    assert outputs[-1].finish_reason == "length"
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("roles", ["ppdd", "cc", "pd"])
def test_pools_over_emulated_workers_lose_nothing(roles: str) -> None:
    async def main() -> None:
        log = Log()
        async with running(hosts(roles), observer=log) as pools:
            asked = [request(i, isl=20 + 7 * i, osl=5 + i) for i in range(40)]
            answers = await asyncio.gather(*(read(pools, one) for one in asked))
            assert [answer(outputs) for outputs in answers] == [text_of(one) for one in asked]
            assert pools.retries == 0
            assert sum(life.transfer_end_s is not None for life in log.lives) == (40 if "p" in roles else 0)
            await all_free(pools, log)

    asyncio.run(main())


def test_a_killed_worker_comes_back_and_streams_go_on() -> None:
    async def main() -> None:
        log = Log()
        async with running(hosts("pdd", start_up_s=0.01), observer=log, supervision=QUICK) as pools:
            asked = [request(i, isl=30, osl=400) for i in range(8)]
            reading = [asyncio.ensure_future(read(pools, one)) for one in asked]
            await until(lambda: pools.workers["d1"].records)
            await until(lambda: any(len(r.tokens) > 20 for r in pools.workers["d1"].records.values()))
            pools.workers["d1"].handle.kill("by the test")
            answers = await asyncio.gather(*reading)
            assert [answer(outputs) for outputs in answers] == [text_of(one) for one in asked]
            assert pools.retries > 0
            await until(lambda: pools.workers["d1"].up)
            await all_free(pools, log)

    asyncio.run(main())


def test_a_client_that_leaves_frees_its_worker() -> None:
    async def main() -> None:
        log = Log()
        async with running(hosts("pd"), observer=log) as pools:
            stream = pools.stream(request(1, osl=1500))
            await anext(stream)
            await cast("Any", stream).aclose()
            await all_free(pools, log)

    asyncio.run(main())


def test_a_catalogue_model_is_served_over_http_without_weights() -> None:
    deployment = deployment_of("qwen3-8b", "h100", prefill=2, decode=3, max_batch=64)
    options = ServeOptions(
        model="qwen3-8b", name="q", prefill=2, decode=3, emulation=Emulation(deployment=deployment, stride_s=0.05)
    )
    launched = Launched(options)
    live = Live(cast("FakeFrontend", launched.pools), launched.app, 1.0)
    live.start()
    try:
        body = {"model": "q", "prompt": [7] * 3000, "max_tokens": 40, "seed": 1}
        whole = live.http.post("/v1/completions", json=body).json()
        assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (3000, 40)
        assert whole["choices"][0]["finish_reason"] == "length"
        chunks = list(
            live.client.chat.completions.create(
                model="q", messages=[{"role": "user", "content": "Hi"}], stream=True, seed=3, max_completion_tokens=20
            )
        )
        assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == 20
        refused = live.http.post("/v1/completions", json={**body, "logprobs": 1})
        assert "logprobs" in refused.json()["error"]["message"]
        state = live.http.get("/pools").json()
        assert state["mode"] == "off"
        assert [worker["role"] for worker in state["workers"]] == ["prefill"] * 2 + ["decode"] * 3
        assert launched.ready_line("u")["emulated"] == "h100"
    finally:
        live.close()
