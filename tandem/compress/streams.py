"""Hidden states on their way through the layers: several streams side by side, in memory or, where they do not fit, on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, Mamba2, ModelSpec, MoE

Hidden = Float[Tensor, "rows time hidden"]
_FLOAT = 4


class Streams:
    """Hidden states by name, fp32. With a folder they lie there and only what is asked for is in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, Hidden | torch.Size] = {}

    def __getitem__(self, name: str) -> Hidden:
        held = self._held[name]
        if isinstance(held, Tensor):
            return held
        file = str(self._file(name))
        return torch.from_file(file, size=held.numel(), dtype=torch.float32, shared=False).reshape(held)

    def __setitem__(self, name: str, hidden: Hidden) -> None:
        if self._folder is None:
            self._held[name] = hidden
            return
        file = self._file(name)
        fresh = file.with_suffix(".new")
        fresh.write_bytes(hidden.contiguous().view(-1).view(torch.uint8).numpy().data)
        fresh.replace(file)  # what was read before stays readable
        self._held[name] = hidden.shape

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._held)

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.bin"


@contextmanager
def streams_in(folder: Path | None) -> Iterator[Streams]:
    """Streams in memory, or in a new folder inside `folder` that is removed at the end."""
    if folder is None:
        yield Streams()
        return
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".streams."))
    try:
        yield Streams(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def working_bytes(spec: ModelSpec, tokens: int) -> int:
    """About what one layer holds while it reads so many tokens: its widest numbers a few times over, fp32."""
    widest = max(_width(spec, i) for i in range(len(spec.layers)))
    return tokens * (4 * spec.hidden_size + widest) * _FLOAT


def _width(spec: ModelSpec, number: int) -> int:
    match spec.layers[number]:
        case Mamba2() as m:
            return 2 * m.in_width + 6 * m.d_inner
        case Attention() as m:
            return 3 * (m.q_width + m.kv_width)
        case MoE() as m:
            return 2 * (m.shared_ffn_size or m.ffn_size) + 2 * m.expert_width(spec.hidden_size)
        case other:
            return 2 * int(getattr(other, "up_width", spec.hidden_size))


def rows_within(
    spec: ModelSpec, samples: int, length: int, *, streams: int, held_bytes: int, memory_bytes: int | None
) -> tuple[int, bool]:
    """Samples that go through the layers together, and whether their streams must lie on disk.

    `memory_bytes` bounds weights, streams and what a layer computes with; None for no bound. Raises SpecError where not even
    one sample fits beside the weights, and says what would do.
    """
    stream = length * spec.hidden_size * _FLOAT
    if memory_bytes is None:
        return min(samples, max(1, _COMFORTABLE // (length * spec.hidden_size))), False
    left = memory_bytes - held_bytes
    together = left // (streams * stream + working_bytes(spec, length))
    if together >= 1:
        return min(samples, together), False
    least = 3 * stream + working_bytes(spec, length)  # read, computed, written
    if left >= least:
        return min(samples, left // least), True
    raise SpecError(
        f"memory={memory_bytes:,} bytes: the weights held at once take {held_bytes:,} and one sample of {length:,} tokens "
        f"{least:,}; give {held_bytes + least:,} or shorter samples"
    )


_COMFORTABLE = 2**21
"""Numbers of one stream that go through a layer at once where memory has no bound: enough for fast products."""


def segments_of(documents: Int[Tensor, "rows time"] | None) -> Int[Tensor, "rows time"] | None:
    """Documents numbered from 0 in each row, as `Span` wants them."""
    if documents is None:
        return None
    return torch.cat([torch.zeros_like(documents[:, :1]), (documents.diff(dim=1) != 0).cumsum(1)], 1)
