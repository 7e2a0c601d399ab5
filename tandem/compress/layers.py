"""Where a pass through a model takes its layers from: a decoder in memory, or a checkpoint read one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from torch import nn

from tandem.model.checkpoint import Filling, fill, placed_tensors
from tandem.model.hybrid import Decoder, Layer
from tandem.model.linear import Linear
from tandem.model.memory import return_freed_memory
from tandem.model.naming import check_format
from tandem.model.norm import RMSNorm
from tandem.spec.catalog import find_weights, load_spec, read_json
from tandem.spec.errors import SpecError
from tandem.spec.model import ModelSpec

_EMBEDDINGS, _HEAD, _NORM = "backbone.embeddings.", "lm_head.", "backbone.norm_f."


class Layers(Protocol):
    """The parts of a model, each held while it is used."""

    @property
    def spec(self) -> ModelSpec:
        """What they are parts of."""
        ...

    @property
    def held_bytes(self) -> int:
        """Most bytes of weights that are in memory at once."""
        ...

    def embeddings(self) -> AbstractContextManager[nn.Embedding]:
        """The token embedding."""
        ...

    def layer(self, number: int) -> AbstractContextManager[Layer]:
        """One layer with its norm."""
        ...

    def head(self) -> AbstractContextManager[tuple[RMSNorm, Linear]]:
        """The final norm and the head."""
        ...


class LoadedLayers:
    """Parts of a decoder that is in memory."""

    def __init__(self, decoder: Decoder) -> None:
        self.spec, self._decoder = decoder.spec, decoder
        self.held_bytes = sum(p.nbytes for p in decoder.parameters())

    @contextmanager
    def embeddings(self) -> Iterator[nn.Embedding]:
        """The decoder's own."""
        yield self._decoder.backbone.embeddings

    @contextmanager
    def layer(self, number: int) -> Iterator[Layer]:
        """The decoder's own."""
        found = self._decoder.backbone.layers[number]
        assert isinstance(found, Layer)
        yield found

    @contextmanager
    def head(self) -> Iterator[tuple[RMSNorm, Linear]]:
        """The decoder's own."""
        yield self._decoder.backbone.norm_f, self._decoder.lm_head


class StreamedLayers:
    """Parts of a checkpoint folder, read when they are used and let go afterwards; weights keep their stored format."""

    def __init__(self, name_or_path: str | Path) -> None:
        """Raises SpecError for what has no safetensors weights, or others than the model's."""
        self.folder = checkpoint_folder(name_or_path)
        self.spec = load_spec(self.folder)
        self._placed = placed_tensors(
            self.spec, check_format(read_json(self.folder / "config.json").get("model_type")), self.folder
        )
        parts: list[tuple[str, ...]] = [(self._prefix(i),) for i in range(len(self.spec.layers))]
        self.held_bytes = max(
            sum(place.size for place, stored in self._placed if stored.parameter.startswith(prefixes))
            for prefixes in (*parts, (_EMBEDDINGS,), (_HEAD, _NORM))
        )
        self._decoder = Decoder(self.spec, device="meta")

    @contextmanager
    def embeddings(self) -> Iterator[nn.Embedding]:
        """Read; all rows at once."""
        with self._filled(_EMBEDDINGS):
            yield self._decoder.backbone.embeddings

    @contextmanager
    def layer(self, number: int) -> Iterator[Layer]:
        """Read."""
        with self._filled(self._prefix(number)):
            found = self._decoder.backbone.layers[number]
            assert isinstance(found, Layer)
            yield found

    @contextmanager
    def head(self) -> Iterator[tuple[RMSNorm, Linear]]:
        """Read; the embedding where it is tied."""
        tied = self.spec.tied_embeddings
        with self._filled(_NORM), self._filled(_EMBEDDINGS if tied else _HEAD):
            if tied:
                self._decoder.lm_head.weight = self._decoder.backbone.embeddings.weight
            yield self._decoder.backbone.norm_f, self._decoder.lm_head
            if tied:
                self._decoder.lm_head.to("meta")

    @staticmethod
    def _prefix(number: int) -> str:
        return f"backbone.layers.{number}."

    @contextmanager
    def _filled(self, prefix: str) -> Iterator[None]:
        fill(
            Filling(self._decoder, None, "cpu"),
            [(place, stored) for place, stored in self._placed if stored.parameter.startswith(prefix)],
        )
        try:
            yield
        finally:
            self._decoder.get_submodule(prefix.rstrip(".")).to("meta")
            return_freed_memory()


def checkpoint_folder(name_or_path: str | Path) -> Path:
    """The folder of a model's safetensors weights. Raises SpecError for a model whose weights are one file of another kind."""
    folder = find_weights(name_or_path)
    if not folder.is_dir():
        raise SpecError(f"model={str(name_or_path)!r}: is no checkpoint folder; write one with tandem.save_model")
    return folder
