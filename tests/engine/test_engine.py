from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from small_models import KINDS, small_model

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.types import EngineRequest, Generation, SamplingParams, TokenOutput
from tandem.model.generate import Sampling, generate_tokens
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError

CONFIG = EngineConfig(
    max_batch=8, step_tokens=32, pass_tokens=16, block_size=4, cache_bytes=1 << 22, prefix_cache_bytes=0, threads=1
)
torch.set_num_threads(1)


def prompts(count: int, *, longest: int = 100, vocabulary: int = 259, seed: int = 0) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [tuple(torch.randint(3, vocabulary, (length,), generator=random).tolist()) for length in lengths]


def run(engine: Engine, requests: list[EngineRequest], *, stagger: int = 0) -> dict[str, Generation]:
    """Outputs of requests that come one every `stagger` steps; integrity is checked after each step."""
    outputs: dict[str, list[TokenOutput]] = {r.id: [] for r in requests}
    left = list(requests)
    while left or engine.has_work:
        for _ in range(1 if stagger else len(left)):
            if left:
                engine.add(left.pop(0))
        for _ in range(max(1, stagger)):
            for output in engine.step().outputs:
                outputs[output.request_id].append(output)
        engine.check_integrity()
    return {name: Generation.of(each) for name, each in outputs.items()}


def all_free(engine: Engine) -> None:
    engine.check_integrity()
    stats = engine.stats
    assert (stats.free_blocks, stats.free_slots) == (stats.blocks, stats.slots)
    assert (stats.waiting, stats.running) == (0, 0)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return small_model(request.param)


def test_greedy_equals_generate(model: Decoder) -> None:
    engine = Engine(model, config=CONFIG)
    given = prompts(6)
    found = engine.generate(given, SamplingParams(max_tokens=24))
    for prompt, generation in zip(given, found, strict=True):
        assert generation.token_ids == tuple(generate_tokens(model, prompt, Sampling(max_tokens=24)))
    all_free(engine)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_results_do_not_depend_on_the_batch(model: Decoder, temperature: float) -> None:
    requests = [
        EngineRequest(
            id=str(i),
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=20, temperature=temperature, top_p=0.9, seed=i, logprobs=3, ignore_eos=True),
        )
        for i, prompt in enumerate(prompts(10))
    ]
    together = run(Engine(model, config=CONFIG), requests)
    for stagger, config in ((1, CONFIG), (3, replace(CONFIG, max_batch=3)), (2, replace(CONFIG, prefix_cache_bytes=1 << 20))):
        assert run(Engine(model, config=config), requests, stagger=stagger) == together
    alone = {r.id: run(Engine(model, config=CONFIG), [r])[r.id] for r in requests[:3]}
    assert alone == {name: together[name] for name in alone}


def test_kept_prefixes_change_nothing_but_the_work(model: Decoder) -> None:
    config = replace(CONFIG, prefix_cache_bytes=1 << 20)
    engine, plain = Engine(model, config=config), Engine(model, config=CONFIG)
    shared = prompts(1, longest=1, seed=7)[0] * 70
    sampling = SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True)
    for i, own in enumerate(prompts(4, longest=40, seed=3)):
        prompt = shared + own
        (found,), (expected,) = engine.generate([prompt], sampling), plain.generate([prompt], sampling)
        assert found.token_ids == expected.token_ids
        assert found.logprobs == expected.logprobs
        if i >= 2:  # the first prompt makes it known, the second shows where they part
            assert found.cached_tokens == 64
    assert engine.stats.prefix_bytes > 0
    all_free(engine)


def test_preempted_requests_go_on_where_they_were() -> None:
    model = small_model("transformer")
    tight = replace(CONFIG, cache_bytes=50 * 4 * 2 * 2 * 2 * 8 * 4)  # 50 blocks
    requests = [
        EngineRequest(id=str(i), prompt_ids=prompt, sampling=SamplingParams(max_tokens=60, ignore_eos=True))
        for i, prompt in enumerate(prompts(8, longest=60, seed=5))
    ]
    engine = Engine(model, config=tight)
    assert engine.stats.blocks == 50
    found = run(engine, requests)
    assert engine.stats.preemptions > 0
    assert found == run(Engine(model, config=CONFIG), requests)
    all_free(engine)


def hand_over(first: Engine, second: Engine, requests: list[EngineRequest]) -> dict[str, Generation]:
    outputs: dict[str, list[TokenOutput]] = {r.id: [] for r in requests}
    before = {r.id: len(r.output_ids) for r in requests}
    for r in requests:
        first.add(r, hand_off=True)
    while first.has_work or second.has_work:
        for engine in (first, second):
            result = engine.step()
            for output in result.outputs:
                assert output.index == before[output.request_id] + len(outputs[output.request_id])
                outputs[output.request_id].append(output)
            for handoff in result.handoffs:
                second.import_state(handoff)
            engine.check_integrity()
    return {name: Generation.of(each) for name, each in outputs.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_handed_over_equals_stayed(model: Decoder, temperature: float) -> None:
    requests = [
        EngineRequest(
            id=str(i),
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=1 + 5 * (i % 5), temperature=temperature, seed=i, logprobs=1),
        )
        for i, prompt in enumerate(prompts(12))
    ]
    first, second = Engine(model, config=replace(CONFIG, prefix_cache_bytes=1 << 20)), Engine(model, config=CONFIG)
    assert hand_over(first, second, requests) == run(Engine(model, config=CONFIG), requests)
    all_free(first)
    all_free(second)


def test_a_request_moves_while_it_decodes(model: Decoder) -> None:
    request = EngineRequest(id="a", prompt_ids=prompts(1)[0], sampling=SamplingParams(max_tokens=30, ignore_eos=True))
    expected = run(Engine(model, config=CONFIG), [request])["a"]
    engines = [Engine(model, config=CONFIG) for _ in range(2)]
    outputs: list[TokenOutput] = []
    engines[0].add(request)
    while any(engine.has_work for engine in engines):
        here, there = engines
        for _ in range(5):
            outputs += here.step().outputs
        if here.stats.running:
            there.import_state(here.export_state("a"))
        engines.reverse()
    assert Generation.of(outputs) == expected
    for engine in engines:
        all_free(engine)


def test_goes_on_from_tokens_that_were_sent(model: Decoder) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=0.7, seed=4, ignore_eos=True)
    whole = run(Engine(model, config=CONFIG), [EngineRequest(id="a", prompt_ids=(5, 6, 7), sampling=sampling)])["a"]
    for cut in (1, 7, 19):
        rest = EngineRequest(id="b", prompt_ids=(5, 6, 7), sampling=sampling, output_ids=whole.token_ids[:cut])
        assert run(Engine(model, config=CONFIG), [rest])["b"].token_ids == whole.token_ids[cut:]
        moved = hand_over(Engine(model, config=CONFIG), Engine(model, config=CONFIG), [rest])
        assert moved["b"].token_ids == whole.token_ids[cut:]


def test_torch_alone_decodes_the_same(monkeypatch: pytest.MonkeyPatch, model: Decoder) -> None:
    given = prompts(5, seed=9)
    expected = Engine(model, config=CONFIG).generate(given, SamplingParams(max_tokens=15))
    from tandem.engine import runner
    from tandem.spec.errors import Infeasible

    monkeypatch.setattr(runner, "program_for", lambda model: Infeasible("as on a GPU"))
    engine = Engine(model, config=CONFIG)
    assert engine.generate(given, SamplingParams(max_tokens=15)) == expected
    all_free(engine)


def test_cancelling_frees_everything_at_any_time(model: Decoder) -> None:
    config = replace(CONFIG, prefix_cache_bytes=1 << 20)
    for steps in range(12):
        engine = Engine(model, config=config)
        for i, prompt in enumerate(prompts(6)):
            engine.add(EngineRequest(id=str(i), prompt_ids=prompt), hand_off=i % 2 == 0)
        for _ in range(steps):
            engine.step()
        for i in range(6):
            engine.cancel(str(i))
        assert not engine.cancel("0")
        assert not engine.has_work
        all_free(engine)


def test_a_state_that_waits_for_room_can_be_cancelled() -> None:
    model = small_model("hybrid")
    released = []
    first, second = Engine(model, config=CONFIG), Engine(model, config=replace(CONFIG, max_batch=1))
    for name in "ab":
        first.add(EngineRequest(id=name, prompt_ids=(5,) * 9), hand_off=True)
    for handoff in first.step().handoffs:
        handoff.release = lambda name=handoff.request.id: released.append(name)  # type: ignore[misc]
        second.import_state(handoff)
    second.step()
    assert (second.stats.running, second.stats.waiting, released) == (1, 1, ["a"])
    assert second.cancel("b")
    assert released == ["a", "b"]
    second.cancel("a")
    all_free(second)


def test_two_engines_of_different_settings_live_side_by_side() -> None:
    models = small_model("hybrid", seed=1), small_model("transformer", seed=2)
    configs = CONFIG, replace(CONFIG, block_size=8, pass_tokens=32, max_batch=3, threads=1, prefix_cache_bytes=1 << 20)
    requests = [EngineRequest(id=str(i), prompt_ids=p, sampling=SamplingParams(max_tokens=9)) for i, p in enumerate(prompts(5))]
    alone = [run(Engine(m, config=c), requests) for m, c in zip(models, configs, strict=True)]
    engines = [Engine(m, config=c) for m, c in zip(models, configs, strict=True)]
    outputs: list[dict[str, list[TokenOutput]]] = [{r.id: [] for r in requests} for _ in engines]
    for engine in engines:
        for r in requests:
            engine.add(r)
    while any(engine.has_work for engine in engines):
        for engine, found in zip(engines, outputs, strict=True):
            for output in engine.step().outputs:
                found[output.request_id].append(output)
    assert [{name: Generation.of(each) for name, each in found.items()} for found in outputs] == alone


def test_what_can_never_be_served_is_refused() -> None:
    engine = Engine(small_model("transformer", context=64), config=replace(CONFIG, cache_bytes=20 * 1024))
    engine.add(EngineRequest(id="a", prompt_ids=(5,), sampling=SamplingParams(max_tokens=8)))
    for request, word in (
        (EngineRequest(id="a", prompt_ids=(5,)), "being served already"),
        (EngineRequest(id="b", prompt_ids=()), "has no tokens"),
        (EngineRequest(id="b", prompt_ids=(5,) * 64), "fewer than 64"),
        (EngineRequest(id="b", prompt_ids=(259,)), "from 0 to 258"),
        (EngineRequest(id="b", prompt_ids=(5,), sampling=SamplingParams(stop=("x",))), "no tokenizer"),
    ):
        with pytest.raises(SpecError, match=word):
            engine.add(request)
    small = Engine(small_model("transformer"), config=replace(CONFIG, cache_bytes=20 * 1024))
    with pytest.raises(SpecError, match="fewer than 80"):
        small.add(EngineRequest(id="b", prompt_ids=(5,) * 80))
    assert not small.has_work
    (longest,) = small.generate([(5,) * 70], SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(longest.token_ids), longest.finish_reason) == (10, "length")
    with pytest.raises(SpecError, match="cache_bytes=100"):
        Engine(small_model("hybrid"), config=replace(CONFIG, cache_bytes=100))
    with pytest.raises(SpecError, match="multiple of block_size"):
        EngineConfig(pass_tokens=100, block_size=16)


def test_what_outgrew_this_engine_is_refused_as_it_comes() -> None:
    model = small_model("transformer")
    large, small = Engine(model, config=CONFIG), Engine(model, config=replace(CONFIG, max_context=40))
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    large.add(EngineRequest(id="a", prompt_ids=(5,) * 30, sampling=sampling))
    while large.stats.context_tokens < 39:
        large.step()
    fits = large.export_state("a")
    small.import_state(fits)
    (last,) = small.step().outputs
    assert (last.index, last.finish_reason) == (9, "length")
    all_free(small)
    large.add(EngineRequest(id="b", prompt_ids=(5,) * 30, sampling=sampling))
    while large.stats.context_tokens < 40:
        large.step()
    handoff = large.export_state("b")
    with pytest.raises(SpecError, match="40 tokens; this server goes on from fewer than 40"):
        small.import_state(handoff)
    with pytest.raises(SpecError, match="fewer than 40"):
        small.add(handoff.request)
    assert not small.has_work
    all_free(small)


def test_a_step_counts_what_it_computed_and_not_what_was_kept() -> None:
    engine = Engine(small_model("transformer"), config=replace(CONFIG, prefix_cache_bytes=1 << 20))
    computed = []
    for name in "ab":
        engine.add(EngineRequest(id=name, prompt_ids=(5,) * 30, sampling=SamplingParams(max_tokens=1)))
        engine.step()
        computed.append(engine.stats.last_step_tokens)
    assert computed == [30, 14]


def test_numbers_that_overflow_end_their_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small_model("hybrid"), config=CONFIG)
    requests = [EngineRequest(id=str(i), prompt_ids=p, sampling=SamplingParams(max_tokens=6)) for i, p in enumerate(prompts(3))]
    expected = run(Engine(engine.model, config=CONFIG), requests)
    decode = engine._runner.decode

    def overflowing(ids: list[int], lengths: list[int], slots: list[int], blocks: object) -> torch.Tensor:
        logits = decode(ids, lengths, slots, blocks)  # type: ignore[arg-type]
        for row, length in enumerate(lengths):
            if length == len(requests[1].prompt_ids) + 2:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "decode", overflowing)
    assert len({len(r.prompt_ids) + 2 for r in requests}) == 3
    found = run(engine, requests)
    assert (found["0"], found["2"]) == (expected["0"], expected["2"])
    assert (found["1"].finish_reason, found["1"].token_ids[:3]) == ("error", expected["1"].token_ids[:3])
    all_free(engine)


def test_a_state_that_left_is_held_by_nobody(model: Decoder) -> None:
    first, second = Engine(model, config=CONFIG), Engine(model, config=CONFIG)
    first.add(
        EngineRequest(id="a", prompt_ids=(5,) * 40, sampling=SamplingParams(max_tokens=30, ignore_eos=True)), hand_off=True
    )
    handoffs = []
    while first.has_work:
        handoffs += first.step().handoffs
    (handoff,) = handoffs
    assert handoff.state is not None
    tensors = [weakref.ref(t) for layer in handoff.state.layers if layer is not None for t in layer.tensors]
    assert all(tensor() is not None for tensor in tensors)
    second.import_state(handoff)
    second.step()
    assert second.stats.running == 1
    assert all(tensor() is None for tensor in tensors)
    second.add(EngineRequest(id="b", prompt_ids=(5,) * 40, sampling=SamplingParams(max_tokens=2, ignore_eos=True)))
    second.step()
    state = second._waiting["b"].state
    assert state is not None
    tensors = [weakref.ref(t) for layer in state.layers if layer is not None for t in layer.tensors]
    del state
    second.cancel("b")
    assert all(tensor() is None for tensor in tensors)
