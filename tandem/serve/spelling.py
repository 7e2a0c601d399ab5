"""Tokens as JSON, for log-probabilities: the text of each, and its bytes where they are part of a character."""

from __future__ import annotations

import orjson

from tandem.engine.spelling import Spelling
from tandem.engine.types import Logprobs
from tandem.model.tokenizer import Tokenizer

_LEAST = -9999.0
"""What the OpenAI API writes for a token that could not have come; JSON has no infinity."""


class TokenTexts:
    """Writes log-probabilities; each token's text is looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._spelling = Spelling(tokenizer)
        self._texts: dict[int, str] = {}
        self._chat: dict[int, tuple[bytes, bytes]] = {}

    def text(self, token: int) -> str:
        """The text of one token; what is no whole character becomes U+FFFD."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._spelling(token).decode("utf-8", "replace")
        return text

    def chat(self, entries: tuple[Logprobs, ...]) -> bytes:
        """Entries of `logprobs.content`, without the brackets around them."""
        items = []
        for entry in entries:
            head, tail = self._around(entry.token_id)
            top = b",".join(b"%b%b%b}" % (a, _number(value), b) for (a, b), value in self._top(entry))
            items.append(b'%b%b%b,"top_logprobs":[%b]}' % (head, _number(entry.logprob), tail, top))
        return b",".join(items)

    def plain(self, entries: tuple[Logprobs, ...], offset: int) -> dict[str, list[object]]:
        """The four lists of a completion's `logprobs`; `offset` is how much text stands before them."""
        lists: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            text = self.text(entry.token_id)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(max(entry.logprob, _LEAST))
            lists["top_logprobs"].append({self.text(token): max(value, _LEAST) for token, value in entry.top})
            lists["text_offset"].append(offset)
            offset += len(text)
        return lists

    def _top(self, entry: Logprobs) -> list[tuple[tuple[bytes, bytes], float]]:
        return [(self._around(token), value) for token, value in entry.top]

    def _around(self, token: int) -> tuple[bytes, bytes]:
        around = self._chat.get(token)
        if around is None:
            head = b'{"token":%b,"logprob":' % orjson.dumps(self.text(token))
            tail = b',"bytes":%b' % orjson.dumps(list(self._spelling(token)))
            around = self._chat[token] = head, tail
        return around


def _number(value: float) -> bytes:
    return orjson.dumps(max(value, _LEAST))
