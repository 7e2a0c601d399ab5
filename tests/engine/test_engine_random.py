"""Whatever comes in whatever order: nothing leaks, nothing is lost, every request ends as it would have alone."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, small_model

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.handoff import Handoff
from tandem.engine.types import EngineRequest, SamplingParams
from tandem.model.hybrid import Decoder
from tandem.sched.metrics import check_causality

torch.set_num_threads(1)
model_of = cache(small_model)
SHARED = tuple(range(10, 60))


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[int, ...], SamplingParams]:
    prompt = SHARED[: draw(st.integers(0, 50))] + tuple(draw(st.lists(st.integers(3, 258), min_size=1, max_size=20)))
    sampling = SamplingParams(
        max_tokens=draw(st.integers(1, 12)), temperature=draw(st.sampled_from([0.0, 1.0])), seed=draw(st.integers(0, 3))
    )
    return prompt, sampling


@cache
def alone(kind: str, prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    engine = Engine(model_of(kind), config=EngineConfig(cache_bytes=1 << 20, pass_tokens=16, block_size=4, threads=1))
    return engine.generate([prompt], sampling)[0].token_ids


def engine_of(model: Decoder, blocks: int, batch: int) -> Engine:
    slot = 2 * (64 + 2 * 2 * 8) * 3 * 4 + 2 * 4 * 8 * 8 * 4  # more than any of the models needs
    return Engine(
        model,
        config=EngineConfig(
            max_batch=batch, step_tokens=24, pass_tokens=16, block_size=4, cache_bytes=batch * slot + blocks * 1024, threads=1
        ),
    )


@given(
    kind=st.sampled_from(KINDS),
    blocks=st.integers(24, 40),
    batch=st.integers(1, 5),
    script=st.lists(
        st.one_of(requests(), st.sampled_from(["step", "step", "step", "cancel", "move"])), min_size=5, max_size=40
    ),
)
@settings(deadline=None, max_examples=60)
def test_any_order_of_events(kind: str, blocks: int, batch: int, script: list[object]) -> None:
    model = model_of(kind)
    engines = engine_of(model, blocks, batch), engine_of(model, blocks, batch)
    tokens: dict[str, list[int]] = {}
    wanted: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
    finished: set[str] = set()
    cancelled: set[str] = set()

    def step() -> None:
        for engine, other in zip(engines, reversed(engines), strict=True):
            moving: list[Handoff] = []
            result = engine.step()
            for output in result.outputs:
                assert output.index == len(tokens[output.request_id])
                assert output.request_id not in finished | cancelled
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    finished.add(output.request_id)
            moving += result.handoffs
            for life in result.finished:
                check_causality(life)
            for handoff in moving:
                other.import_state(handoff)
            engine.check_integrity()

    for number, action in enumerate(script):
        if isinstance(action, tuple):
            name = str(number)
            wanted[name], tokens[name] = action, []
            engines[number % 2].add(
                EngineRequest(id=name, prompt_ids=action[0], sampling=action[1], client=str(number % 3)),
                hand_off=number % 3 == 0,
            )
        elif action == "step":
            step()
        elif action == "cancel" and wanted:
            name = list(wanted)[number % len(wanted)]
            gone = [engine.cancel(name) for engine in engines]
            if any(gone):
                cancelled.add(name)
        elif action == "move":
            running = [name for name in wanted if name in engines[0]._running]
            if running:
                engines[1].import_state(engines[0].export_state(running[0]))
    for _ in range(2000):
        if not any(engine.has_work for engine in engines):
            break
        step()
    assert finished | cancelled == set(wanted)
    for name, (prompt, sampling) in wanted.items():
        if name in finished:
            assert tuple(tokens[name]) == alone(kind, prompt, sampling)
    for engine in engines:
        engine.check_integrity()
        stats = engine.stats
        assert (stats.free_blocks, stats.free_slots) == (stats.blocks if stats.blocks else stats.free_blocks, stats.slots)
