"""Too little room for everybody: shared prefixes, snapshots, preemption, moves, cancellation, requests served before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, small_model
from toys import byte_tokenizer

from tandem.engine.config import EngineConfig, size_cache
from tandem.engine.engine import Engine
from tandem.engine.handoff import Handoff
from tandem.engine.types import EngineRequest, SamplingParams, TokenOutput
from tandem.model.state import AttentionState, LayerState, MambaState, SequenceState
from tandem.sched.metrics import check_causality
from tandem.sched.request import Request

torch.set_num_threads(1)
model_of = cache(small_model)
TOKENIZER = byte_tokenizer()
TREE = (tuple(range(10, 70)), tuple(range(10, 42)) + tuple(range(100, 128)), tuple(range(200, 240)))
"""Prompts begin like one of these; the first two part after four passes."""
SMALLEST = EngineConfig(max_batch=1, pass_tokens=8, block_size=4, cache_bytes=1 << 20)


def engine_of(kind: str, *, batch: int = 4, blocks: int = 1 << 10, prefix_bytes: int = 0) -> Engine:
    size = size_cache(model_of(kind).spec, SMALLEST, torch.float32, free_bytes=0)
    config = EngineConfig(
        max_batch=batch,
        step_tokens=20,
        pass_tokens=8,
        block_size=4,
        cache_bytes=batch * size.slot_bytes + max(1, blocks * size.block_bytes),
        prefix_cache_bytes=prefix_bytes,
        threads=1,
    )
    return Engine(model_of(kind), tokenizer=TOKENIZER, config=config)


@cache
def alone(kind: str, prompt: tuple[int, ...], sampling: SamplingParams) -> list[TokenOutput]:
    engine = engine_of(kind)
    engine.add(EngineRequest(id="", prompt_ids=prompt, sampling=sampling))
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step().outputs
    return outputs


@dataclass
class Sink:
    """Rebuilds a state from what is put, and knows how it ended."""

    kind: str
    parts: dict[int, list[LayerState]] = field(default_factory=dict)
    until: dict[int, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def put(self, layer: int, state: LayerState, begin: int, end: int, *, final: bool) -> None:
        assert not self.ended
        if isinstance(state, AttentionState):
            assert begin == self.until.get(layer, 0)
            part = AttentionState(*(t[:, :, begin:end].clone() for t in state.tensors))
            self.parts.setdefault(layer, []).append(part)
        elif isinstance(state, MambaState) and final:
            self.parts[layer] = [MambaState(*(t.clone() for t in state.tensors))]
        self.until[layer] = end

    def close(self) -> SequenceState:
        self.ended.append("closed")
        layers: list[LayerState] = []
        for i in range(len(model_of(self.kind).spec.layers)):
            parts = [part.tensors for part in self.parts.get(i, ()) if part is not None]
            if not parts:
                layers.append(None)
            elif isinstance(self.parts[i][0], AttentionState):
                layers.append(AttentionState(*(torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))))
            else:
                layers.append(MambaState(*parts[0]))
        return SequenceState(torch.tensor([max(self.until.values())]), tuple(layers))

    def abort(self) -> None:
        self.ended.append("aborted")


@dataclass
class Pair:
    """Two engines with states on their way between them."""

    kind: str
    engines: tuple[Engine, Engine]
    asked: dict[str, EngineRequest] = field(default_factory=dict)
    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)
    lives: dict[str, Request] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    moving: list[tuple[Handoff, Engine]] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    releases: list[list[str]] = field(default_factory=list)

    def add(self, request: EngineRequest, engine: Engine, *, hand_off: bool, with_sink: bool) -> None:
        sink = Sink(self.kind) if with_sink and hand_off else None
        engine.add(request, hand_off=hand_off, sink=sink)
        if sink is not None:
            self.sinks.append(sink)
        self.asked[request.id], self.outputs[request.id] = request, []

    def send(self, handoff: Handoff, to: Engine) -> None:
        assert (handoff.state is None) != (handoff.receipt is None)
        if handoff.receipt is not None:
            handoff.state = handoff.receipt
        released: list[str] = []
        self.releases.append(released)
        handoff.release = lambda: released.append(handoff.request.id)
        self.moving.append((handoff, to))

    def deliver(self, most: int) -> None:
        for _ in range(min(most, len(self.moving))):
            handoff, to = self.moving.pop(0)
            to.import_state(handoff)

    def cancel(self, name: str) -> None:
        here = [engine.cancel(name) for engine in self.engines]
        for pair in [pair for pair in self.moving if pair[0].request.id == name]:
            self.moving.remove(pair)
            pair[0].done()
            here.append(True)
        if any(here):
            assert here.count(True) == 1
            self.cancelled.add(name)

    def step(self) -> None:
        for engine, other in zip(self.engines, reversed(self.engines), strict=True):
            before, working = engine.stats, engine.has_work
            result = engine.step()
            after = engine.stats
            if working:
                assert after.last_step_rows + after.last_step_tokens + after.preemptions > before.preemptions
            for output in result.outputs:
                request, known = self.asked[output.request_id], self.outputs[output.request_id]
                assert output.index == len(request.output_ids) + len(known)
                assert output.request_id not in self.cancelled
                assert output.request_id not in self.lives or output.finish_reason is not None
                known.append(output)
            for life in result.finished:
                check_causality(life)
                assert life.id not in self.lives
                self.lives[life.id] = life
            for handoff in result.handoffs:
                self.send(handoff, other)
            engine.check_integrity()

    def check_end(self) -> None:
        assert set(self.lives) | self.cancelled == set(self.asked)
        for name, life in self.lives.items():
            request = self.asked[name]
            expected = alone(self.kind, request.prompt_ids, request.sampling)[len(request.output_ids) :]
            found = self.outputs[name]
            assert [(o.token_ids, o.text, o.finish_reason) for o in found] == [
                (o.token_ids, o.text, o.finish_reason) for o in expected
            ]
            if not life.preemptions and not request.output_ids:  # else decoded tokens were read again, by other kernels
                assert [o.logprobs for o in found] == [o.logprobs for o in expected]
        assert all(len(sink.ended) == 1 for sink in self.sinks)
        assert all(len(released) == 1 for released in self.releases)
        for engine in self.engines:
            engine.check_integrity()
            stats = engine.stats
            assert (stats.free_blocks, stats.free_slots) == (stats.blocks, stats.slots)
            assert (stats.waiting, stats.running, stats.context_tokens, stats.queued_tokens) == (0, 0, 0, 0)


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[int, ...], SamplingParams, int]:
    start = draw(st.sampled_from(TREE))
    own = draw(st.lists(st.integers(3, 258), max_size=12))
    prompt = start[: draw(st.integers(8, len(start)))] + tuple(own)
    sampling = SamplingParams(
        max_tokens=draw(st.sampled_from([1, 12, 20])),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 2)),
        logprobs=1,
        stop=draw(st.sampled_from([(), ("a", "\u00e4b")])),
        frequency_penalty=draw(st.sampled_from([0.0, 1.5])),
    )
    return prompt, sampling, draw(st.sampled_from([0, 0, 1, 3]))


ACTIONS = st.sampled_from(["step"] * 4 + ["deliver", "cancel", "move"])


@given(
    kind=st.sampled_from(KINDS),
    blocks=st.tuples(st.integers(24, 30), st.integers(24, 30)),
    batch=st.integers(3, 6),
    prefix_bytes=st.sampled_from([0, 1, 3000, 9000, 1 << 30]),
    script=st.lists(st.one_of(requests(), requests(), ACTIONS), min_size=24, max_size=40),
    choices=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=10)
@pytest.mark.slow
def test_whatever_is_short_nothing_is_wrong(
    kind: str, blocks: tuple[int, int], batch: int, prefix_bytes: int, script: list[Any], choices: Any
) -> None:
    first, second = (engine_of(kind, batch=batch, blocks=each, prefix_bytes=prefix_bytes) for each in blocks)
    pair = Pair(kind, (first, second))
    act: dict[str, Callable[[], None]] = {
        "step": pair.step,
        "deliver": lambda: pair.deliver(choices.randint(1, 4)),
        "cancel": lambda: pair.cancel(choices.choice(sorted(pair.asked))) if pair.asked else None,
    }
    for number, action in enumerate(script):
        if action == "move":
            engine, other = choices.sample(pair.engines, 2)
            for name in list(engine._running)[:1]:
                pair.send(engine.export_state(name), other)
        elif isinstance(action, str):
            act[action]()
        else:
            prompt, sampling, cut = action
            tokens = [token for output in alone(kind, prompt, sampling) for token in output.token_ids]
            request = EngineRequest(
                id=f"{number}",
                prompt_ids=prompt,
                sampling=sampling,
                client=choices.choice("abc"),
                output_ids=tuple(tokens[: min(cut, len(tokens) - 1)]),
            )
            pair.add(
                request,
                choices.choice(pair.engines),
                hand_off=choices.random() < 0.5,
                with_sink=choices.random() < 0.5,
            )
    for _ in range(3000):
        if not pair.moving and not any(engine.has_work for engine in pair.engines):
            break
        pair.step()
        pair.deliver(2)
    pair.check_end()
