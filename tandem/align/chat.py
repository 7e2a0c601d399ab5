"""The chat format of Nemotron Nano 2 (paper A; `chat_template` of nvidia/NVIDIA-Nemotron-Nano-9B-v2), as one Jinja template.

    <SPECIAL_10>System
    {instructions, tools}

    <SPECIAL_11>User
    {question}
    <SPECIAL_11>Assistant
    <think>
    {thoughts}
    </think>

    {answer}

    <TOOLCALL>[{"name": .., "arguments": {..}}]</TOOLCALL>
    <SPECIAL_12>

Thinking is on by default, and then the model's turn begins with an open block; off, it begins with an empty one. The last
`/think` or `/no_think` in a system or user message decides; both are taken out of the text. Results of tools are a user's turn.

Turns since the last user message stand as they were written, thoughts (`reasoning_content`) or empty block included: while
tools are called the model sees its own thoughts, and what it learns from is what it is asked with. Earlier turns have no block.

`nano2.jinja` is what transformers and this project's server render; `{% generation %}` in it marks what the model writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tandem.align.parsers import CLOSE, write_json
from tandem.align.sample import Message, Tool
from tandem.model.generation_tag import BEGIN as BEGIN_VARIABLE
from tandem.model.generation_tag import END as END_VARIABLE
from tandem.model.tokenizer import SETTINGS, TEMPLATE, Tokenizer, copy_tokenizer, load_tokenizer, render_template
from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.train.data.bpe import MARKS

if TYPE_CHECKING:
    from tandem.model.hybrid import Decoder, TokenIds

END = "<SPECIAL_12>"
"""Ends a turn, and so the model's answer."""
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that Unicode leaves to programs, for use inside them."""
_TOGGLES = "/no_think"
"""What the template looks for in users' texts. Control tokens that begin with one of these letters are not kept out of them."""


@lru_cache(maxsize=1)
def nano2_template() -> str:
    """The template, as tokenizers carry it."""
    return Path(__file__).with_name("nano2.jinja").read_text(encoding="utf-8")


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """A conversation as text; see `tandem.align.sample` for messages and tools.

    `enable_thinking` False switches thinking off whatever the messages say. Raises SpecError for a role that the format
    has no place for.
    """
    return _render(messages, tools, enable_thinking, add_generation_prompt, {})


def answer_text(message: Message, *, thinking: bool = True) -> str:
    """What a model writes after the prompt to say an assistant's message, up to where `END` follows.

    With `thinking` it begins inside the open block, so the message needs its `reasoning_content`.
    """
    (_, written, _) = segments([message], enable_thinking=thinking, add_generation_prompt=False)
    return written.text.removesuffix(END)


# --- what is the user's, what is the model's ---


@dataclass(frozen=True, slots=True)
class Controls:
    """Texts of a tokenizer's tokens that steer a conversation: special tokens, think marks, tags of tools."""

    texts: frozenset[str]
    pattern: re.Pattern[str]
    """Finds the first character of each, also where they overlap."""
    first: str
    """Those characters."""


@lru_cache(maxsize=8)
def controls(tokenizer: Tokenizer) -> Controls:
    """What must not come out of a user's text as a token."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    texts = frozenset(token.content for token in added if token.special or token.content in MARKS)
    first = "".join(sorted({text[0] for text in texts}))
    rests = {c: "|".join(re.escape(text[1:]) for text in sorted(texts) if text[0] == c) for c in first}
    # With the character in front, the search for it runs at the speed of memchr.
    pattern = "|".join(f"{re.escape(c)}(?={rest})" for c, rest in rests.items())
    return Controls(texts, re.compile(pattern or "(?!)"), first)


class Segment(NamedTuple):
    """A part of a conversation that is wholly the model's, or not at all."""

    text: str
    learned: bool
    hidden: str
    """The same text with other characters where others than the model and the template wrote one of `Controls.first`."""
    known: Controls | None

    def pieces(self) -> Iterator[str]:
        """The text, cut within what others wrote and a tokenizer would take for a control token: encode them one by one."""
        start = 0
        if self.hidden is not self.text and self.known is not None:
            for found in self.known.pattern.finditer(self.text):
                at = found.start()
                if self.hidden[at] != self.text[at]:
                    yield self.text[start : at + 1]
                    start = at + 1
        yield self.text[start:]


def segments(
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    tokenizer: Tokenizer | None = None,
) -> list[Segment]:
    """`render`'s text in parts, in turn not the model's and the model's (its end mark included).

    With a `tokenizer`, nothing that stands in messages of system, user and tools or in the descriptions of tools becomes a
    control token of it, whatever the template makes of those texts: encoded piece by piece, `<SPECIAL_11>` there is letters.
    """
    known = controls(tokenizer) if tokenizer is not None else None
    used = "".join([*_texts(messages), *_texts(tools)])
    free = [c for c in _NONCHARACTERS if c not in used]
    first = [c for c in known.first if c not in _TOGGLES] if known else []
    if len(free) < len(first) + 3:
        raise SpecError("messages: hold too many of the noncharacters U+FDD0 to U+FDEF; leave them out")
    begin, end, slash, *marks = free
    # The template would read `/think` in `</think>`.
    hide = [(CLOSE, CLOSE.replace("/", slash)), *zip(first, marks, strict=False)] if any(c in used for c in first) else []
    if hide:
        messages = [m if m.get("role") == "assistant" else _replaced(m, hide) for m in messages]
        tools = [_replaced(tool, hide) for tool in tools]
    text = _render(messages, tools, enable_thinking, add_generation_prompt, {BEGIN_VARIABLE: begin, END_VARIABLE: end})
    parts = re.split(f"[{begin}{end}]", text)
    show = [(slash, "/"), *((mark, c) for c, mark in hide[1:])] if hide else []
    return [Segment(_replaced(part, show), i % 2 == 1, part, known) for i, part in enumerate(parts)]


def prompt_pieces(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Tool] = (), enable_thinking: bool | None = None
) -> list[str]:
    """A conversation up to where the answer begins, in pieces to be encoded one by one; see `segments`."""
    found = segments(messages, tools=tools, enable_thinking=enable_thinking, tokenizer=tokenizer)
    return [piece for segment in found for piece in segment.pieces()]


def _replaced(value: Any, pairs: Sequence[tuple[str, str]]) -> Any:
    """The same data with the first of each pair replaced by the second in all texts of it."""
    if isinstance(value, str):
        for old, new in pairs:
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, pairs): _replaced(item, pairs) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, pairs) for item in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _render(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    enable_thinking: bool | None,
    add_generation_prompt: bool,
    variables: Mapping[str, str],
) -> str:
    given = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        return render_template(
            nano2_template(),
            messages=[_with_json(message) for message in messages],
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            **given,
            **variables,
        )
    except SpecError as wrong:
        raise SpecError(str(wrong).removeprefix("chat_template: ")) from None


def _with_json(message: Message) -> Message:
    """Arguments of calls as text: JSON that any encoder takes, which the template's own might not be."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function", call))
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = write_json(function.get("arguments", {}))
        calls.append({"function": function})
    return {**message, "tool_calls": calls}


# --- tokenizers and models ---


def end_id(tokenizer: Tokenizer) -> int:
    """The token that ends a turn. Raises SpecError for a tokenizer without it."""
    found: int | None = tokenizer.backend.token_to_id(END)
    if found is None or END not in controls(tokenizer).texts:
        raise SpecError(f"tokenizer: has no special token {END}, which ends a turn; take one with Nemotron Nano 2's tokens")
    return found


def save_chat_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Put the tokenizer of a checkpoint folder or GGUF file into another folder, with this chat template and `END` as its end.

    transformers and `load_tokenizer` read it. Raises SpecError for a tokenizer without the token.
    """
    end_id(load_tokenizer(source))
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(source, folder)
    file = folder / SETTINGS
    settings = read_json(file) if file.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("chat_template", None)
    write_whole(file, json.dumps({**settings, "eos_token": END}, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / TEMPLATE, nano2_template())
    return load_tokenizer(folder)


def chat_token_ids(tokenizer: Tokenizer, token_ids: TokenIds) -> TokenIds:
    """Special tokens of a model that ends its answers with `END`, which engines and generation_config.json go by."""
    return replace(token_ids, eos=(end_id(tokenizer),))


def make_chat_model(decoder: Decoder, folder: Path) -> Tokenizer:
    """Let a decoder end turns with `END` and be saved with the chat tokenizer, which is put into `folder`.

    `save_model` takes tokenizer and end tokens from the decoder, so what it writes from now on is a chat model. Raises
    SpecError for a decoder that was not read from a checkpoint with a tokenizer.
    """
    if decoder.source is None:
        raise SpecError("decoder.source=None: has no checkpoint whose tokenizer could be taken; load it from a folder")
    tokenizer = save_chat_tokenizer(decoder.source, folder)
    decoder.token_ids = chat_token_ids(tokenizer, decoder.token_ids)
    decoder.source = folder
    return tokenizer
