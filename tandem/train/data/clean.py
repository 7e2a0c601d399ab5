"""Text in one form: NFC, no control characters, plain line ends, no blanks at the ends of lines."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

from tandem.train.data.document import Document

_LINE_ENDS = re.compile("\r\n|[\r\u2028\u2029\x0b\x0c\x85]")
_GONE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")
_BLANKS = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_TRAILING = re.compile(r"[ \t]+(?=\n)")
_EMPTY_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """The same text without what no reader sees; a second time changes nothing more.

    Unicode in NFC; control characters, byte-order marks and invisible separators gone; every line end one "\\n", every blank
    one space; at most one empty line in a row; none at the beginning or the end.
    """
    return _inner(text).strip()


def clean_document(document: Document) -> Document:
    """A document in clean text. The border between prompt and what is learned stays where it was."""
    if not document.prompt_chars:
        return replace(document, text=clean_text(document.text))
    prompt = _inner(document.text[: document.prompt_chars]).lstrip()
    text = prompt + _inner(document.text[document.prompt_chars :]).rstrip()
    return replace(document, text=text, prompt_chars=len(prompt))


def _inner(text: str) -> str:
    text = _BLANKS.sub(" ", _GONE.sub("", _LINE_ENDS.sub("\n", text)))
    text = unicodedata.normalize("NFC", text)
    return _EMPTY_LINES.sub("\n\n", _TRAILING.sub("", text))
