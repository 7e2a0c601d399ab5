"""Thinking apart from the answer, in a stream of text: `<think>thoughts</think>answer`, its tags cut anywhere."""

from __future__ import annotations

from enum import Enum

OPEN, CLOSE = "<think>", "</think>"
SPACE = " \t\r\n"


def partial_suffix(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` may begin, short of the whole tag."""
    last = text.rfind("<", max(0, len(text) - len(tag) + 1))
    while last >= 0:
        if tag.startswith(text[last:]):
            return len(text) - last
        last = text.rfind("<", max(0, len(text) - len(tag) + 1), last)
    return 0


class _Where(Enum):
    START = 0
    THINKING = 1
    CLOSED = 2
    ANSWER = 3


class ReasoningParser:
    """Splits the text of one output. White space around the thoughts and after the closing tag is dropped.

    `thinking`: the prompt has opened a block already. Otherwise one may begin with the output's first word and nowhere else.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._where = _Where.THINKING if thinking else _Where.START
        self._held = ""
        self._begun = False

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the block."""
        return self._where is _Where.THINKING

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that have become certain through `text`."""
        if self._where is _Where.ANSWER:
            return "", text
        text = self._held + text
        self._held = ""
        if self._where is _Where.START:
            word = text.lstrip(SPACE)
            if OPEN.startswith(word[: len(OPEN)]):
                if len(word) < len(OPEN):
                    self._held = text
                    return "", ""
                self._where, text = _Where.THINKING, word[len(OPEN) :]
            else:
                self._where = _Where.ANSWER
                return "", text
        reasoning = ""
        if self._where is _Where.THINKING:
            at = text.find(CLOSE)
            if at < 0:
                return self._thoughts(text, len(text) - partial_suffix(text, CLOSE)), ""
            reasoning = self._thoughts(text[:at], at)
            self._held, self._where, text = "", _Where.CLOSED, text[at + len(CLOSE) :]
        answer = text.lstrip(SPACE)
        if answer:
            self._where = _Where.ANSWER
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """What was held back when the output ended."""
        held, self._held = self._held, ""
        if self._where is _Where.THINKING:
            return (held.rstrip(SPACE) if self._begun else held.strip(SPACE)), ""
        return "", held

    def _thoughts(self, text: str, end: int) -> str:
        if not self._begun:
            bare = text.lstrip(SPACE)
            end = max(0, end - (len(text) - len(bare)))
            text = bare
        given = text[:end].rstrip(SPACE)
        self._begun = self._begun or bool(given)
        self._held = text[len(given) :]
        return given
