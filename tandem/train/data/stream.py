"""The token stream: batches out of prepared sources, blended by phases, that goes on exactly where it stopped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.train.data.blend import Blend
from tandem.train.data.packing import Batch, Packer, new_batch
from tandem.train.data.shards import Part, read_shard
from tandem.train.recipe import BatchPart, DataPart

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def source_folder(folder: Path, name: str) -> Path:
    """Where a prepared folder has the tokens of a source. Raises SpecError for a name that could be outside it."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"data.sources={name!r}: must be letters, digits, - and _, and dots that are not first")
    return folder / "sources" / name


class TokenStream:
    """Batches of a run. What step n holds follows from folder, settings and seed alone, not from how many ranks share it.

    `folder` is what `prepare` made. Raises SpecError where it lacks a source that a phase asks for.
    """

    def __init__(self, folder: Path, data: DataPart, batch: BatchPart, *, seed: int, part: Part = "train") -> None:
        self._folder = folder
        self._data = data
        self._shape = batch
        self._seed = seed
        self._names = [name for name in data.sources if any(phase.weights.get(name, 0) > 0 for phase in data.phases)]
        self._packers = [self._packer(name, part) for name in self._names]
        self._blend = Blend(data.phases, self._names, batch.steps * batch.sequences)
        self.step = 0
        """Steps taken: the number of the next batch."""

    @property
    def phase(self) -> int:
        """Number of the phase that the next sequence belongs to."""
        return self._blend.phase

    def batch(self, rank: int = 0, world: int = 1) -> Batch:
        """The next step's sequences `rank`, `rank + world`, ... and the stream one step further.

        Every rank asks for its own share of the same step. Raises SpecError for a world that does not divide the sequences.
        """
        rows = self._shape.sequences
        if rows % world or not 0 <= rank < world:
            raise SpecError(f"batch.sequences={rows}: must be a multiple of the {world} ranks, which count from 0 (got {rank})")
        made = new_batch(rows // world, self._shape.sequence_length)
        for row in range(rows):
            packer = self._packers[self._blend.next()]
            pieces = packer.next()
            if row % world == rank:
                packer.fill(pieces, made, row // world)
        self.step += 1
        return made

    def held_out(self, source: str, batches: int, rows: int) -> list[Batch]:
        """Up to `batches` batches of `rows` sequences of a source's held-out documents, always the same.

        Fewer where there are not enough documents: none is repeated, and the last batch is filled up with padding. Documents
        are packed as in training. Raises SpecError for a source that is not there.
        """
        if source not in self._data.sources:
            raise SpecError(f"source={source!r}: not in the recipe; {', '.join(self._data.sources)} are")
        packer = self._packer(source, "held_out", once=True)
        made: list[Batch] = []
        while len(made) < batches and not packer.ended:
            batch = new_batch(rows, self._shape.sequence_length)
            for row in range(rows):
                packer.fill(packer.next(), batch, row)
            made.append(batch)
        return made

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON data; the same on every rank."""
        sources = {name: packer.state() for name, packer in zip(self._names, self._packers, strict=True)}
        return {"step": self.step, "blend": self._blend.state(), "sources": sources}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the token after the last one of `state`. Raises SpecError where it belongs to other sources."""
        if list(state["sources"]) != self._names:
            raise SpecError(f"data.sources={self._names}: the checkpoint was made with {list(state['sources'])}")
        self.step = int(state["step"])
        self._blend.restore(**state["blend"])
        for name, packer in zip(self._names, self._packers, strict=True):
            packer.restore(**state["sources"][name])

    def tokens(self) -> dict[str, int]:
        """Tokens taken from each source so far, over all ranks, padding left out."""
        return {name: packer.tokens for name, packer in zip(self._names, self._packers, strict=True)}

    def padding(self) -> float:
        """Share of all positions so far that held padding."""
        positions = self._blend.position * self._shape.sequence_length
        return 1 - sum(self.tokens().values()) / positions if positions else 0.0

    def _packer(self, name: str, part: Part, *, once: bool = False) -> Packer:
        shard = read_shard(source_folder(self._folder, name), part)
        if not len(shard.documents) and part == "train":
            raise SpecError(f"data.sources.{name}: has no documents left to learn from")
        cut, length = name in self._data.cut, self._shape.sequence_length
        return Packer(shard, name=name, length=length, cut=cut, seed=self._seed, once=once)
