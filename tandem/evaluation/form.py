"""How a model is asked: by its chat template, or, a base model, by the beginning of a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem.align.chat import nano2_template, prompt_pieces
from tandem.align.sample import Message, Tool
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import OPEN
from tandem.train.evaluate import prompt_ids

_PROBE = "1 + 1 = ?"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to go on from."""

    ids: tuple[int, ...]
    thinking: bool
    """Whether they end inside an open thinking block."""


class Form:
    """How one model is asked.

    A base model has no template: it goes on with `question`, a line, `<think>`, as documents of pre-training do, and can not
    be told not to think.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self._tokenizer = name, tokenizer
        self.chat = tokenizer.template is not None
        self.own = tokenizer.template == nano2_template()
        """Whether the template is that of Nemotron Nano 2, in whose format calls of tools are read."""
        self.modes: tuple[str, ...] = ("on",)
        """on, off or both: what the template knows."""
        if self.chat:
            on, off = (self._render([{"role": "user", "content": _PROBE}], (), thinking) for thinking in (True, False))
            self.modes = ("on", "off") if on != off else ("on",) if _opens(on) else ("off",)

    def wanted(self, thinking: str) -> tuple[str, ...]:
        """The modes to ask in. Raises SpecError where the model has none that is asked for."""
        modes = tuple(mode for mode in self.modes if thinking in (mode, "both"))
        if not modes:
            why = "its template does not know thinking" if self.chat else "it has no chat template and always thinks"
            raise SpecError(f"thinking={thinking!r}: {self.name} cannot be asked so, for {why}; use thinking={self.modes[0]}")
        return modes

    def question(self, text: str, mode: str) -> Prompt:
        """A question on its own."""
        if self.chat:
            return self.conversation([{"role": "user", "content": text}], (), mode)
        return Prompt(tuple(prompt_ids(self._tokenizer, f"{text}\n{OPEN}\n")), True)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool], mode: str) -> Prompt:
        """A conversation by the model's template, with the beginning of the answer."""
        pieces = self._pieces(messages, tools, mode == "on")
        ids = (token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False))
        return Prompt(tuple(ids), _opens("".join(pieces)))

    def _pieces(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> list[str]:
        """The text in parts to be encoded one by one: by our own template, a user's words make no control token."""
        if not self.own:
            return [self._render(messages, tools, thinking)]
        enable = None if thinking else False
        return prompt_pieces(self._tokenizer, messages, tools=tools, enable_thinking=enable)

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> str:
        variables: dict[str, Any] = {"enable_thinking": thinking}
        if tools:
            variables["tools"] = list(tools)
        return self._tokenizer.chat([dict(message) for message in messages], **variables)


def _opens(text: str) -> bool:
    return text.rstrip().endswith(OPEN)
