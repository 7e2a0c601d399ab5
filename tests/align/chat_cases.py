"""What tests of the chat format share: a small tokenizer with Nano 2's tokens, and conversations of any kind."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tandem.align.chat import save_chat_tokenizer
from tandem.align.sample import Sample
from tandem.model.tokenizer import Tokenizer
from tandem.train.data.bpe import CONTROL, MARKS, save_tokenizer, train_bpe

TOOLS = (
    {"name": "f", "description": "é", "parameters": {"type": "object"}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {"a": {}}}}},
)
CONTROLS = (*CONTROL, *MARKS)
plain = st.text(max_size=12).filter(lambda text: not any(token in text for token in CONTROLS))
words = st.sampled_from(
    ["What is 1 + 2?", "3", "two  lines\nof text", " x ", "", "é – 漢字", "/think", "/no_think", "a/think.py"]
)
spoken = plain | words
smuggled = st.lists(
    st.sampled_from([*CONTROLS, "<th/thinkink>", "<", "think>", "/think", "</", "SPECIAL_11>", "Assistant\n", " a ", "\ufdd0"]),
    max_size=5,
).map("".join)
arguments = st.dictionaries(plain, st.none() | st.integers() | plain | st.lists(st.booleans(), max_size=2), max_size=2)
calls = st.lists(
    st.builds(lambda name, a: {"function": {"name": name, "arguments": a}}, st.sampled_from(["f", "g"]), arguments), max_size=2
)


@lru_cache(maxsize=1)
def base_tokenizer() -> Tokenizer:
    return train_bpe(["What is 1 + 2? It is 3. Let me think about the answer. User Assistant System"] * 3, 320)


def chat_tokenizer(folder: Path) -> Tokenizer:
    """With the chat template, in `folder`."""
    save_tokenizer(base_tokenizer(), folder / "base")
    return save_chat_tokenizer(folder / "base", folder / "chat")


@st.composite
def turns(draw: st.DrawFn, *, said: st.SearchStrategy[str], reasoning: st.SearchStrategy[str | None]) -> list[dict[str, Any]]:
    """A question, calls with their results, an answer."""
    found: list[dict[str, Any]] = [{"role": "user", "content": draw(said)}]
    for _ in range(draw(st.integers(0, 2))):
        some = draw(calls)
        found.append({"role": "assistant", "content": draw(plain), "reasoning_content": draw(reasoning), "tool_calls": some})
        found += [{"role": "tool", "content": draw(said)} for _ in range(draw(st.integers(0, 2)))]
    found.append({"role": "assistant", "content": draw(plain), "reasoning_content": draw(reasoning)})
    return found


@st.composite
def conversations(
    draw: st.DrawFn,
    *,
    said: st.SearchStrategy[str] = spoken,
    reasoning: st.SearchStrategy[str | None] = st.none() | plain,  # noqa: B008
) -> list[dict[str, Any]]:
    """Messages, of a system or not, of one or several questions, up to an answer."""
    found: list[dict[str, Any]] = [{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        found += draw(turns(said=said, reasoning=reasoning))
    return found


@st.composite
def learnable(draw: st.DrawFn, *, said: st.SearchStrategy[str] = plain) -> Sample:
    """Samples that can be encoded. Nothing said in them switches thinking off."""
    thinking = draw(st.booleans())
    if thinking:
        said = said.map(lambda text: text.replace("/no_think", ""))
    messages = draw(conversations(said=said, reasoning=plain if thinking else st.none() | plain))
    tools = draw(st.sampled_from([(), TOOLS, TOOLS[:1]]))
    return Sample(kind="test", messages=tuple(messages), tools=tools, thinking=thinking)
