"""What a model is scored on, and the folder of a scoring: what each chunk of samples found lies there, whoever read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.model import ModelSpec
from tandem.train.data.packing import IGNORED
from tandem.train.ranks import Ranks

_CLAIM = "scoring.json"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Samples of one length. `labels` are the next tokens, `IGNORED` where none is learned; `documents` as in a decoder."""

    input_ids: Int[Tensor, "samples time"]
    labels: Int[Tensor, "samples time"]
    documents: Int[Tensor, "samples time"] | None = None

    def __post_init__(self) -> None:
        if self.input_ids.dim() != 2 or not self.input_ids.numel():
            raise SpecError(f"input_ids={list(self.input_ids.shape)}: must be samples x tokens, one of each at least")
        for name in ("labels", "documents"):
            beside = getattr(self, name)
            if beside is not None and beside.shape != self.input_ids.shape:
                raise SpecError(f"{name}={list(beside.shape)}: must be shaped as input_ids, {list(self.input_ids.shape)}")

    @classmethod
    def of_rows(cls, rows: Int[Tensor, "samples longer"]) -> Calibration:
        """Rows of running text of one token more than a sample: each token's label is the next one."""
        return cls(input_ids=rows[:, :-1], labels=rows[:, 1:])

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.input_ids.shape[1]

    @property
    def learned(self) -> int:
        """Tokens that have a label."""
        return int((self.labels != IGNORED).sum())

    def rows(self, begin: int, end: int) -> Calibration:
        """Some of the samples."""
        documents = None if self.documents is None else self.documents[begin:end]
        return Calibration(input_ids=self.input_ids[begin:end], labels=self.labels[begin:end], documents=documents)

    @property
    def fingerprint(self) -> str:
        """What sets of samples are told apart by."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.input_ids, self.labels, self.documents):
            if part is not None:
                digest.update(part.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Where chunks of samples are scored: by this process, alone or among ranks that share the folder.

    What a chunk found is kept in `folder`, so that a scoring which was stopped is gone on with, and the sum over chunks is
    taken in their order, so that it is the same to the bit whichever rank had which.
    """

    folder: Path | None = None
    """None keeps nothing: for one process."""
    ranks: Ranks = field(default_factory=Ranks)
    memory_bytes: int | None = None
    """Bounds weights and hidden states that are held at once; None for no bound."""

    def __post_init__(self) -> None:
        if self.folder is None and self.ranks.world > 1:
            raise SpecError("folder=None: ranks meet in a folder; name one")

    def claim(self, what: str, spec: ModelSpec, samples: Calibration, rows: int, **settings: Any) -> None:
        """Take the folder for this scoring, or go on with it. Raises SpecError where another one lies there."""
        if self.folder is None:
            return
        stated: dict[str, Any] = {
            "what": what,
            "model": spec.name,
            "layers": len(spec.layers),
            "samples": samples.fingerprint,
            "rows at once (memory)": rows,
            **settings,
        }
        folder = self.folder

        def claim() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / _CLAIM
            there = read_json(file) if file.is_file() else None
            if there is None:
                return write_whole(file, json.dumps(stated, indent=1) + "\n")
            other = next((name for name in {**stated, **there} if stated.get(name) != there.get(name)), None)
            if other is not None:
                raise SpecError(f"folder={str(folder)!r}: holds a scoring with another {other}; name another folder")

        self.ranks.by_first(claim)

    def chunks(
        self, part: str, samples: int, rows: int, score: Callable[[int, int], dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """What `score(begin, end)` finds in every chunk of `rows` samples, in order; numbers and lists of them."""
        begins = range(0, samples, rows)
        if self.folder is None:
            yield from (score(begin, min(begin + rows, samples)) for begin in begins)
            return
        (self.folder / part).mkdir(parents=True, exist_ok=True)
        files = [self.folder / part / f"{begin:06}-{min(begin + rows, samples):06}.json" for begin in begins]
        for i, (begin, file) in enumerate(zip(begins, files, strict=True)):
            if i % self.ranks.world == self.ranks.rank and not file.is_file():
                write_whole(file, json.dumps(score(begin, min(begin + rows, samples))) + "\n")
        self.ranks.barrier()
        yield from (read_json(file) for file in files)
