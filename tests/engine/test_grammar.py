"""Grammars under models that know nothing: what comes out is valid, ends, and no grammar ends the process."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toys import EOS, byte_tokenizer, vocabulary

from tandem.engine.choose import Chooser, choose
from tandem.engine.grammar import MAX_TEXT
from tandem.engine.types import EngineRequest, Grammar, SamplingParams
from tandem.engine.vocabulary import _GRAMMARS, Vocabulary
from tandem.model.tokenizer import load_tokenizer
from tandem.spec.errors import SpecError

BYTES = vocabulary(byte_tokenizer('{"', '":', '",', "true", "null}", "]]", "12", "}}"))
WORDS = Vocabulary(load_tokenizer("smollm2-135m-instruct"), 49152, (2,))


def write(
    words: Vocabulary, grammar: Grammar, seed: int, *, limit: int = 2000, favoured: tuple[int, ...] = (), **sampling: Any
) -> tuple[str, Chooser, list[int]]:
    """The output of a model whose logits are noise."""
    params = SamplingParams(grammar=grammar, temperature=1.0, seed=seed, max_tokens=limit, **sampling)
    words.check(params)
    chooser, out = Chooser(EngineRequest(id="r", prompt_ids=(5,), sampling=params), words), []
    rng = np.random.default_rng(seed)
    while not chooser.finished_by_grammar and len(out) < limit:
        row = torch.from_numpy(rng.normal(0, 1, (1, words.vocab_size)).astype(np.float32))
        row[0, list(favoured)] = 30.0
        out.append(choose(row, [chooser])[0].token_id)
    return words.spelling.join(t for t in out if t not in words.eos).decode(), chooser, out


leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 120},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"enum": ["red", 7, None, {"a": [1]}]},
        {"const": "é"},
    ]
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "name", "é", "x y"])
    objects = st.dictionaries(names, inner, max_size=3).flatmap(
        lambda parts: st.sets(st.sampled_from(sorted(parts)) if parts else st.nothing()).map(
            lambda needed: {
                "type": "object",
                "properties": parts,
                "required": sorted(needed),
                "additionalProperties": False,
            }
        )
    )
    arrays = inner.map(lambda part: {"type": "array", "items": part, "minItems": 1, "maxItems": 2})
    return objects | arrays | st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts})


schemas = st.recursive(leaves, nested, max_leaves=6)


@settings(max_examples=80, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6))
def test_noise_becomes_json_of_the_schema(schema: dict[str, Any], seed: int) -> None:
    text, chooser, _ = write(BYTES, Grammar(kind="json_schema", text=json.dumps(schema)), seed)
    assert chooser.finished_by_grammar
    assert chooser.error is None
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=12, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6))
def test_also_with_a_real_vocabulary(schema: dict[str, Any], seed: int) -> None:
    text, chooser, _ = write(WORDS, Grammar(kind="json_schema", text=json.dumps(schema)), seed)
    assert chooser.finished_by_grammar
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=80, deadline=None)
@given(
    pattern=st.sampled_from(["[ab]{3}", "(yes|no)", "\\d{2,4}-x", "é+", "a*", "", "a/b", "\\w\n", "(ab|cd){1,3}[^\\n]"]),
    seed=st.integers(0, 10**6),
)
def test_noise_follows_a_regex(pattern: str, seed: int) -> None:
    text, chooser, _ = write(BYTES, Grammar(kind="regex", text=pattern), seed, favoured=(EOS,))
    assert chooser.finished_by_grammar
    assert re.fullmatch(pattern, text)


def test_noise_follows_rules_and_free_json() -> None:
    rules = Grammar(kind="lark", text='start: "(" start ")" | WORD\nWORD: /[a-z]{1,3}/')
    for seed in range(20):
        text, chooser, _ = write(BYTES, rules, seed)
        assert re.fullmatch(r"\(*[a-z]{1,3}\)*", text)
        assert text.count("(") == text.count(")")
        assert chooser.finished_by_grammar
        closing = tuple(t for t in range(BYTES.vocab_size) if BYTES.spelling(t) in (b"}", b'"', b":", b"1"))
        text, chooser, _ = write(BYTES, Grammar(kind="json_object"), seed, favoured=closing)
        assert isinstance(json.loads(text), dict)
        assert chooser.finished_by_grammar


def test_end_tokens_come_only_where_the_text_is_whole() -> None:
    """Both the model's own and the client's, however much the model wants them."""
    digit = next(t for t in range(BYTES.vocab_size) if BYTES.spelling(t) == b"4")
    for stop in ((), (digit,)):
        grammar = Grammar(kind="regex", text="[0-9]{3,}x?")
        text, chooser, out = write(BYTES, grammar, 1, favoured=(EOS, *stop), stop_token_ids=stop)
        assert chooser.finished_by_grammar
        assert out[-1] in (EOS, *stop)
        assert not set(out[:-1]) & {EOS, *stop}
        assert re.fullmatch("[0-9]{3,4}4?", text)


def test_a_grammar_that_needs_an_end_token_gets_it() -> None:
    letter = next(t for t in range(BYTES.vocab_size) if BYTES.spelling(t) == b"b")
    text, chooser, _ = write(BYTES, Grammar(kind="regex", text="abc"), 0, stop_token_ids=(letter,))
    assert text == "abc"
    assert chooser.finished_by_grammar


def test_it_finishes_as_soon_as_nothing_more_can_come() -> None:
    text, chooser, out = write(BYTES, Grammar(kind="regex", text="ab"), 0)
    assert text == "ab"
    assert EOS not in out
    assert chooser.finished_by_grammar


def test_white_space_is_bounded() -> None:
    spaces = tuple(t for t in range(BYTES.vocab_size) if BYTES.spelling(t) in (b" ", b"\n", b"\t"))
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    text, chooser, _ = write(BYTES, Grammar(kind="json_schema", text=json.dumps(schema)), 0, favoured=spaces)
    assert json.loads(text) == {"a": 1}
    assert chooser.finished_by_grammar
    assert len(text) < 400


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "json_schema"),
        ("json_schema", "[]", "must be an object or a boolean"),
        ("json_schema", '{"type": "nope"}', "Invalid type"),
        ("json_schema", '{"$ref": "https://example.org/x"}', "not present"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion|nested"),
        ("json_schema", '{"anyOf": [' * 200 + "{}" + "]}" * 200, "recursion|nested"),
        ("json_schema", "false", "does not compile"),
        ("regex", "a(", "unclosed group"),
        ("regex", "(" * 20_000 + ")" * 20_000, "does not compile"),
        ("lark", "start: nowhere", "unknown name"),
        ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
        ("regex", "a" * (MAX_TEXT + 1), "must be at most 131,072"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_in_one_line(kind: Any, text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as refused:
        BYTES.check(SamplingParams(grammar=Grammar(kind=kind, text=text)))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("links", [100, 4000])
def test_long_chains_of_rules_do_not_end_the_process(links: int) -> None:
    """Compiled on a thread's usual stack, 4000 links overflow it."""
    chain = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(links)) + f'\nr{links}: "b"'
    deep = {
        "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "type": "array"} for i in range(links // 2)}
        | {f"d{links // 2}": {"type": "null"}},
        "$ref": "#/$defs/d0",
    }
    stack = threading.stack_size()
    for grammar in (Grammar(kind="lark", text=chain), Grammar(kind="json_schema", text=json.dumps(deep))):
        fresh = vocabulary(byte_tokenizer())
        text, chooser, _ = write(fresh, grammar, 0, limit=20)
        assert chooser.error is None
        assert text.startswith(("a" * 10, "["))
    assert threading.stack_size() == stack


def test_compiled_grammars_are_kept_and_the_oldest_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.engine import grammar as module

    compiled = []
    compile_grammar = module.compile_grammar
    monkeypatch.setattr(module, "compile_grammar", lambda g, t: compiled.append(g) or compile_grammar(g, t))
    words = vocabulary(byte_tokenizer())
    grammars = [Grammar(kind="regex", text=f"a{i}") for i in range(_GRAMMARS + 1)]
    for grammar in grammars[:_GRAMMARS] * 2:
        words.grammar(grammar)
    assert compiled == grammars[:_GRAMMARS]
    words.grammar(grammars[-1])
    words.grammar(grammars[1])
    assert len(compiled) == _GRAMMARS + 1
    words.grammar(grammars[0])
    assert compiled[_GRAMMARS + 1 :] == grammars[:1]


def test_requests_of_one_grammar_do_not_share_their_place() -> None:
    grammar = Grammar(kind="regex", text="(ab){2}")
    first, _, _ = write(BYTES, grammar, 0)
    second, _, _ = write(BYTES, grammar, 1)
    assert first == second == "abab"


def test_tokens_that_do_not_follow_are_an_error_of_that_request() -> None:
    params = SamplingParams(grammar=Grammar(kind="regex", text="[ab]{5}"))
    wrong = Chooser(EngineRequest(id="r", prompt_ids=(5,), sampling=params, output_ids=(EOS,)), BYTES)
    assert wrong.error
    assert wrong.finished_by_grammar
    assert "\n" not in wrong.error


@settings(max_examples=30, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6), data=st.data())
def test_a_request_goes_on_elsewhere_in_its_grammar(schema: dict[str, Any], seed: int, data: st.DataObject) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    _, _, out = write(BYTES, grammar, seed)
    assume(len(out) > 1)
    cut = data.draw(st.integers(0, len(out) - 1))
    params = SamplingParams(grammar=grammar, temperature=1.0, seed=seed, max_tokens=2000)
    there = Chooser(EngineRequest(id="r", prompt_ids=(5,), sampling=params, output_ids=tuple(out[:cut])), BYTES)
    rng = np.random.default_rng(seed)
    rows = [rng.normal(0, 1, (1, BYTES.vocab_size)).astype(np.float32) for _ in out]
    assert [choose(torch.from_numpy(row), [there])[0].token_id for row in rows[cut:]] == out[cut:]
    assert there.finished_by_grammar
