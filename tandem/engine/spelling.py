"""What each token of a vocabulary stands for: the bytes of its text, as the tokenizer's decoder makes them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import decoders, pre_tokenizers

from tandem.model.tokenizer import Tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""


def _byte_symbols() -> dict[str, int]:
    """The byte of each character of byte-level BPE (GPT-2): printable ones stand for themselves, others for 256 and up."""
    alphabet = {chr(c): c for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    rest = sorted(set(range(256)) - set(alphabet.values()))
    alphabet |= {chr(256 + i): c for i, c in enumerate(rest)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


class Spelling:
    """Bytes of tokens, looked up once each. For byte-level tokenizers the text of many tokens is their bytes together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self.byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        added = tokenizer.backend.get_added_tokens_decoder()
        self.special: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        """Tokens that a decoder leaves out of the text where it is told to."""
        self._known: dict[int, bytes] = {}
        self._symbols = _byte_symbols()
        decoder = tokenizer.backend.decoder
        settings = json.loads(decoder.__getstate__()) if decoder is not None else {}
        kinds = {part.get("type") for part in (settings, *settings.get("decoders", ()))}
        self._fallback = "ByteFallback" in kinds
        self._metaspace = bool(kinds & {"Metaspace", "Replace"})
        self._added = frozenset(added)

    def __call__(self, token: int) -> bytes:
        """The bytes of one token; none for an id that the tokenizer does not know."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._spell(token)
        return known

    def join(self, tokens: Iterable[int]) -> bytes:
        """The bytes of several tokens."""
        return b"".join(map(self, tokens))

    def _spell(self, token: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self.byte_level:
            symbols = self._symbols
            return bytes(symbols[c] for c in piece) if all(c in symbols for c in piece) else piece.encode()
        if token in self._added:
            return piece.encode()
        if self._fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return (piece.replace(_SPACE, " ") if self._metaspace else piece).encode()
