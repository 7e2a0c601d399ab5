"""Tokens on disk: one folder per source, memory-mapped when read.

tokens.bin       all documents one after the other, uint16 or uint32 (little-endian)
train.npy        [n, 3] int64: where each document starts, its length, and how many of its tokens are prompt
held_out.npy     the same for those that are never learned from
shard.json       dtype and counts
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.document import Document

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")
_TOKENS, _ABOUT = "tokens.bin", "shard.json"
_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One source's tokens."""

    tokens: NDArray[np.unsignedinteger]
    """All documents one after the other."""
    documents: NDArray[np.int64]
    """[n, 3]: start, length, tokens of the prompt."""


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[list[int], int]]:
    """Ids of each document, between begin and end of text, and how many of them are prompt (begin of text counts as one).

    Prompt and rest are encoded apart, so a model meets in training what it is given when it is asked. Of special tokens that
    stand in a text only the letters count (`encode_plain`). Raises SpecError where the tokenizer has no end of text.
    """
    bos, eos = (tokenizer.backend.token_to_id(tokenizer.special.get(name, "")) for name in ("bos_token", "eos_token"))
    if eos is None:
        raise SpecError("data.tokenizer: has no eos_token in its tokenizer_config.json, which ends a document")
    begin = [] if bos is None else [bos]
    prompts = encode_plain(tokenizer, [document.text[: document.prompt_chars] for document in documents])
    rests = encode_plain(tokenizer, [document.text[document.prompt_chars :] for document in documents])
    return [([*begin, *prompt, *rest, eos], len(begin) + len(prompt)) for prompt, rest in zip(prompts, rests, strict=True)]


def encode_plain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, nothing added: `</s>` in it is four characters and ends no document.

    Added tokens that are not special, such as `<think>` of `train_bpe`, stay one token.
    """
    backend = tokenizer.backend
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def write_shard(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, held_out: NDArray[np.bool_]) -> None:
    """Encode a source's documents into a new folder; `held_out` [n] says which of them are not learned from."""
    encoded = (pair for some in _chunks(documents) for pair in encode_documents(tokenizer, some))
    write_encoded(folder, encoded, tokenizer.backend.get_vocab_size(), held_out)


def write_encoded(
    folder: Path, documents: Iterable[tuple[Sequence[int], int]], vocabulary: int, held_out: NDArray[np.bool_]
) -> None:
    """`write_shard` of documents that are tokens already, each with the number of its first ones that are prompt."""
    folder.mkdir(parents=True)
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    table: list[tuple[int, int, int]] = []
    at = 0
    with (folder / _TOKENS).open("wb") as stream:
        for ids, prompt in documents:
            stream.write(np.array(ids, dtype=dtype).tobytes())
            table.append((at, len(ids), prompt))
            at += len(ids)
    whole = np.array(table, dtype=np.int64).reshape(-1, 3)
    np.save(folder / "train.npy", whole[~held_out])
    np.save(folder / "held_out.npy", whole[held_out])
    about = {
        "dtype": dtype.str,
        "tokens": at,
        "vocab_size": vocabulary,
        "documents": len(table),
        "held_out": int(held_out.sum()),
    }
    (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_shard(folder: Path, part: Part) -> Shard:
    """A source's tokens, mapped into memory. Raises SpecError where the folder holds none or parts of them."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        documents = np.load(folder / f"{part}.npy")
        dtype, size = np.dtype(about["dtype"]), int(about["tokens"])
        file = folder / _TOKENS
        if file.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{_TOKENS} does not have {size} tokens")
        tokens = np.memmap(file, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)
    except (OSError, KeyError, ValueError) as wrong:
        raise SpecError(
            f"{folder}: holds no prepared source ({' '.join(str(wrong).split())}); prepare the data again"
        ) from None
    return Shard(tokens=tokens, documents=documents)


def _chunks(documents: Iterable[Document]) -> Iterable[list[Document]]:
    some: list[Document] = []
    for document in documents:
        some.append(document)
        if len(some) == _AT_ONCE:
            yield some
            some = []
    if some:
        yield some
