"""Conversations as tokens: prompts, samples with what is learned of them, and samples put into rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.align.chat import Segment, controls, end_id, prompt_pieces, segments
from tandem.align.parsers import CLOSE, OPEN
from tandem.align.sample import Ask, Message, Pair, Sample
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.packing import IGNORED

_OPEN_ROWS = 32
"""Rows that a sample may still be put into."""


class Encoded(NamedTuple):
    """A sample's tokens, and which of them are learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


def encode_ask(ask: Ask, tokenizer: Tokenizer) -> list[int]:
    """The prompt of a conversation to go on with, up to where the answer begins. A user's text makes no control token."""
    enable = None if ask.thinking else False
    pieces = prompt_pieces(tokenizer, ask.messages, tools=ask.tools, enable_thinking=enable)
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def encode_answer(text: str, tokenizer: Tokenizer, *, finished: bool = True) -> list[int]:
    """What a model wrote after the prompt as the tokens that it wrote, with the end mark where it `finished`.

    Special tokens, which decoding leaves out, stand for nothing in such a text: spelled there, they are letters.
    """
    end = end_id(tokenizer)
    special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    cuts = [m.start() + 1 for m in controls(tokenizer).pattern.finditer(text) if _starts(text, m.start(), special)]
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    return [*ids, end] if finished else ids


def encode_pair(pair: Pair, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a pair's prompt, of the chosen and of the rejected answer, both ended."""
    prompt = encode_ask(pair.ask, tokenizer)
    return prompt, encode_answer(pair.chosen, tokenizer), encode_answer(pair.rejected, tokenizer)


def encode_sample(sample: Sample, tokenizer: Tokenizer) -> Encoded:
    """A conversation's tokens. Learned is what the model writes in its turns since the last user message, to the end mark; the
    turn's header and the opening or empty block are the prompt's. Earlier turns stand without their thoughts, as no model is
    asked for them, so they are read and not learned.

    The last answer's tokens follow exactly those of `encode_ask` for the messages before it. Texts that are not the model's
    make no control tokens. Raises SpecError where the last message is no assistant's, where a turn since the last user
    message should think and states no `reasoning_content`, where messages and `thinking` disagree, and where the model
    would learn to write a control token within its text.
    """
    end_id(tokenizer)
    known = controls(tokenizer)
    messages = sample.messages
    if not messages or messages[-1].get("role") != "assistant":
        raise SpecError(f"messages: end with no turn of an assistant, and {sample.kind} is learned from one; add it")
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            for field, text in _written(message):
                found = known.pattern.search(text)
                if found is not None:
                    token = max((t for t in known.texts if text.startswith(t, found.start())), key=len)
                    raise SpecError(f"messages[{i}].{field}: holds {token}, which would be learned as a token; leave it out")
    enable = None if sample.thinking else False
    parts = segments(messages, tools=sample.tools, enable_thinking=enable, add_generation_prompt=False, tokenizer=tokenizer)
    _check_thinking(sample, parts)
    ids: list[int] = []
    learned: list[bool] = []
    first = len(parts) - 2 * len(_current_turns(messages))
    for i, part in enumerate(parts):
        for piece in part.pieces():
            some = tokenizer.encode(piece, add_special_tokens=False)
            ids += some
            learned += [part.learned and i >= first] * len(some)
    return Encoded(tuple(ids), tuple(learned))


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Samples in rows; arrays are int64 [rows, width], as wide as the fullest row."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token in the same place, which transformers' models shift themselves; `IGNORED` where it is not learned."""
    documents: NDArray[np.int64]
    """Number of the sample within its row, from 0; padding counts as one of its own."""
    samples: tuple[tuple[int, ...], ...]
    """Which samples, by their place in what was given, lie in each row."""
    too_long: tuple[tuple[int, int], ...]
    """Samples that were left out, and how many tokens each has."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """Each token's place within its sample, by which transformers' trainers tell samples apart."""
        rows, width = self.documents.shape
        places = np.broadcast_to(np.arange(width), (rows, width))
        starts = np.where(np.diff(self.documents, axis=1, prepend=-1) != 0, places, 0)
        return places - np.maximum.accumulate(starts, axis=1)


def pack(encoded: Sequence[Encoded], length: int, *, concatenate: bool = True, padding: int = 0) -> Packed:
    """Put samples into rows of at most `length` tokens, each whole and once.

    With `concatenate` each goes into the first row of the latest few that has room; else each has its row. Samples stay in
    the order given, row by row. Those longer than `length` are left out and named. A sample's first token is never learned,
    having nothing before it. `padding` is the token behind a row's last sample.
    """
    require_int("length", length)
    rows: list[list[int]] = []
    room: list[int] = []
    too_long = []
    for i, (ids, _) in enumerate(encoded):
        if len(ids) > length:
            too_long.append((i, len(ids)))
            continue
        first = max(0, len(rows) - _OPEN_ROWS) if concatenate else len(rows)
        row = next((r for r in range(first, len(rows)) if room[r] >= len(ids)), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= len(ids)
    shape = (len(rows), length - min(room, default=length))
    input_ids, labels = np.full(shape, padding, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int64)
    for r, some in enumerate(rows):
        at = 0
        for number, i in enumerate(some):
            ids, learned = encoded[i]
            end = at + len(ids)
            input_ids[r, at:end] = ids
            labels[r, at:end] = np.where(learned, ids, IGNORED)
            labels[r, at : at + 1] = IGNORED
            documents[r, at:end] = number
            at = end
        documents[r, at:] = len(some)
    return Packed(
        input_ids=input_ids,
        labels=labels,
        documents=documents,
        samples=tuple(map(tuple, rows)),
        too_long=tuple(too_long),
    )


def _written(message: Message) -> list[tuple[str, str]]:
    """Fields of an assistant's message that become text which the model learns to write."""
    found = [(field, message.get(field)) for field in ("content", "reasoning_content")]
    found.append(("tool_calls", json.dumps(list(message.get("tool_calls") or ()), ensure_ascii=False)))
    return [(field, text) for field, text in found if isinstance(text, str)]


def _current_turns(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns since the last user message."""
    roles = [message.get("role") for message in messages]
    current = max((i + 1 for i, role in enumerate(roles) if role == "user"), default=0)
    return [i for i in range(current, len(roles)) if roles[i] == "assistant"]


def _check_thinking(sample: Sample, parts: Sequence[Segment]) -> None:
    for i, part in zip(reversed(_current_turns(sample.messages)), reversed(parts[:-1:2]), strict=False):
        if sample.thinking and part.text.endswith(OPEN + CLOSE):
            raise SpecError("thinking=True: the messages say /no_think; take it out, or set thinking=False")
        if sample.thinking and not part.text.endswith(f"{OPEN}\n"):
            raise SpecError(
                f"messages[{i}].reasoning_content={sample.messages[i].get('reasoning_content')!r}: a turn that thinks must "
                "state its thoughts; add them, or set thinking=False"
            )


def _starts(text: str, at: int, tokens: set[str]) -> bool:
    return any(text.startswith(token, at) for token in tokens)
