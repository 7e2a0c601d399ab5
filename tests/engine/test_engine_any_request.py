"""No request that is accepted stops an engine or disturbs another, whatever its parameters are, as far as they may go."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from toys import byte_tokenizer

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.types import EngineRequest, Generation, Grammar, SamplingParams
from tandem.spec.errors import SpecError

torch.set_num_threads(1)
CONFIG = EngineConfig(max_batch=4, step_tokens=32, pass_tokens=16, block_size=4, cache_bytes=1 << 20, threads=1)
TINY = 5e-324


def up_to(low: float, high: float) -> st.SearchStrategy[float]:
    edges = st.sampled_from([low, high, max(low, TINY), max(low, 1e-300), max(low, 1e-30), max(low, 1e-7)])
    return edges | st.floats(low, high)


TOKENS = st.integers(0, 258)
GRAMMARS = st.sampled_from(
    [
        Grammar(kind="regex", text="[ab]{0,4}"),
        Grammar(kind="regex", text=""),
        Grammar(kind="regex", text="(a|b)*c"),
        Grammar(kind="json_object"),
        Grammar(kind="json_schema", text='{"enum": [1, "x"]}'),
        Grammar(kind="json_schema", text="false"),
        Grammar(kind="lark", text='start: "</think>" start | "q"'),
    ]
)
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12)},
    optional={
        "temperature": up_to(0.0, 100.0),
        "top_p": up_to(TINY, 1.0),
        "top_k": st.integers(1, 300) | st.just(2**31),
        "min_p": up_to(0.0, 1.0),
        "presence_penalty": up_to(-2.0, 2.0),
        "frequency_penalty": up_to(-2.0, 2.0),
        "repetition_penalty": up_to(TINY, 10.0),
        "seed": st.integers(0, 2**63 - 1),
        "logit_bias": st.dictionaries(TOKENS, up_to(-100.0, 100.0), max_size=40),
        "logprobs": st.integers(0, 20),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple),
        "stop_token_ids": st.lists(TOKENS, max_size=3).map(tuple),
        "ignore_eos": st.booleans(),
        "thinking_budget": st.integers(0, 4),
        "grammar": GRAMMARS,
        "skip_special_tokens": st.booleans(),
    },
)


@cache
def the_engine() -> Engine:
    return Engine(small_model("hybrid"), tokenizer=byte_tokenizer(), config=CONFIG)


@cache
def plain() -> Generation:
    engine = Engine(small_model("hybrid"), config=CONFIG)
    return engine.generate([(5,) * 20], SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True))[0]


@given(
    asked=st.lists(st.tuples(SAMPLING, st.lists(TOKENS, min_size=1, max_size=20), st.booleans()), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_whatever_is_asked_the_engine_goes_on(asked: list[tuple[dict[str, Any], list[int], bool]]) -> None:
    engine = the_engine()
    assert not engine.has_work
    engine.add(
        EngineRequest(
            id="plain",
            prompt_ids=(5,) * 20,
            sampling=SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True),
        )
    )
    accepted, refusals = {"plain"}, []
    for i, (parameters, prompt, thinking) in enumerate(asked):
        try:
            sampling = SamplingParams(**parameters)
            engine.add(EngineRequest(id=str(i), prompt_ids=tuple(prompt), sampling=sampling, thinking=thinking))
            accepted.add(str(i))
        except SpecError as wrong:
            refusals.append(str(wrong))
    assert not any("\n" in refusal for refusal in refusals)
    outputs: dict[str, list[Any]] = {name: [] for name in accepted}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    for each in outputs.values():
        assert [output.finish_reason is not None for output in each] == [False] * (len(each) - 1) + [True]
    assert Generation.of(outputs["plain"]).token_ids == plain().token_ids
    engine.check_integrity()
    assert engine.stats.free_slots == engine.stats.slots
