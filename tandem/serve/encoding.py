"""Texts to token ids, at a cost that the context bounds: whoever sends megabytes must not buy seconds of work."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.model.tokenizer import Tokenizer
from tandem.serve.errors import ApiError, bad_request

MOST_TOKENS = 1 << 30
"""For callers who have no bound."""
_CHARACTERS = 8
"""Of each token that fits, in the first piece that is looked at; most texts that fit are shorter."""


def encode_within(tokenizer: Tokenizer, text: str | Iterable[str], most: int, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, or of pieces each encoded by itself. Raises ApiError once a first part of it alone has twice as
    many tokens as may be.

    Twice, because the end of a part may be cut into more tokens than the same characters within the whole. Texts somewhat too
    long are encoded and returned: the caller counts them.
    """
    ids: list[int] = []
    for piece in [text] if isinstance(text, str) else text:
        if len(ids) > 2 * most:
            raise _too_long(len(ids), most)
        ids += _encode_piece(tokenizer, piece, most, add_special_tokens)
    return ids


def _encode_piece(tokenizer: Tokenizer, text: str, most: int, add_special_tokens: bool) -> list[int]:
    end = _CHARACTERS * most
    while end < len(text):
        tokens = len(tokenizer.encode(text[:end], add_special_tokens=add_special_tokens))
        if tokens > 2 * most:
            raise _too_long(tokens, most)
        end *= 2
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _too_long(tokens: int, most: int) -> ApiError:
    message = f"prompt: has more than {tokens:,} tokens, and there is room for {most:,}; shorten it"
    return bad_request(message, param="prompt", code="context_length_exceeded")
