"""One sequence's state as flat bytes: where each layer lies, and copies into it while the prefill still runs.

A layout follows from the model, the tokens and the dtype, so that the receiver's memory is known before the prefill begins.
SSM states (fp32) come first: with no padding every tensor is then aligned, and the bytes are those of `SequenceState.nbytes`.
Checksums are taken of pieces that the copy has just brought into the core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from tandem.engine.handoff import StateSink
from tandem.model.state import AttentionState, LayerState, MambaState, SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import Attention, Mamba2, ModelSpec
from tandem.spec.units import require_int

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {2: torch.int16, 4: torch.int32}
PIECE_BYTES = 256 * 1024
"""Copied, then hashed: a piece stays in the second-level cache between the two."""
_INLINE_BYTES = 64 * 1024
"""Copying so few takes less time than waking a thread."""


@dataclass(frozen=True, slots=True)
class Region:
    """One tensor of one layer: [outer, rows, inner] numbers from `offset` bytes on. Rows of keys and values are tokens."""

    offset: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        outer, rows, inner = self.shape
        return outer * rows * inner * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StateLayout:
    """Where the state of one sequence of `tokens` tokens lies in `nbytes` bytes."""

    spec: ModelSpec
    tokens: int
    dtype: torch.dtype = torch.float32
    """Of keys, values and convolution windows."""

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens)
        if self.dtype not in _NAMES:
            raise SpecError(f"dtype={self.dtype}: must be one of {', '.join(map(str, _NAMES))}")

    @property
    def dtype_name(self) -> str:
        """`fp32`, `fp16` or `bf16`."""
        return _NAMES[self.dtype]

    @cached_property
    def layers(self) -> tuple[tuple[Region, Region] | None, ...]:
        """Keys and values, or window and SSM state, of each layer; None where it keeps nothing."""
        ssm_at, at = 0, sum(_numbers_of(m) for m in self.spec.layers) * torch.float32.itemsize
        layers: list[tuple[Region, Region] | None] = []
        for m in self.spec.layers:
            match m:
                case Attention():
                    shape = (m.num_kv_heads, self.tokens, m.head_dim)
                    keys = Region(at, shape, self.dtype)
                    layers.append((keys, Region(at + keys.nbytes, shape, self.dtype)))
                    at += 2 * keys.nbytes
                case Mamba2():
                    conv = Region(at, (1, m.conv_width, m.conv_kernel - 1), self.dtype)
                    ssm = Region(ssm_at, (m.num_heads, m.head_dim, m.state_dim), torch.float32)
                    layers.append((conv, ssm))
                    at, ssm_at = at + conv.nbytes, ssm_at + ssm.nbytes
                case _:
                    layers.append(None)
        return tuple(layers)

    @cached_property
    def nbytes(self) -> int:
        """`s0 + k * tokens`: what `SequenceState.nbytes` says of such a state."""
        return sum(region.nbytes for pair in self.layers if pair is not None for region in pair)

    @cached_property
    def key(self) -> str:
        """Equal for layouts that can read each other's bytes, in whatever process."""
        shapes = [pair and [(r.offset, r.shape, str(r.dtype)) for r in pair] for pair in self.layers]
        return xxhash.xxh3_64_hexdigest(repr(shapes).encode())

    def state(self, buffer: Any) -> SequenceState:
        """The one-row state that lies in a writable buffer, or in a flat tensor of bytes on any device, as views of it."""
        if isinstance(buffer, Tensor):
            flat = buffer
        else:
            flat = torch.frombuffer(buffer, dtype=torch.uint8, count=self.nbytes) if self.nbytes else torch.empty(0).byte()

        def view(region: Region) -> Tensor:
            return flat[region.offset : region.offset + region.nbytes].view(region.dtype).view(region.shape)[None]

        layers: list[LayerState] = []
        for m, pair in zip(self.spec.layers, self.layers, strict=True):
            if pair is None:
                layers.append(None)
            elif isinstance(m, Attention):
                layers.append(AttentionState(view(pair[0]), view(pair[1])))
            else:
                layers.append(MambaState(view(pair[0])[:, 0], view(pair[1])))
        return SequenceState(torch.tensor([self.tokens]), tuple(layers))


@dataclass(frozen=True, slots=True)
class Checksum:
    """xxh3 of tokens begin..end of a layer's keys and values, or of its window and SSM state."""

    layer: int
    begin: int
    end: int
    digest: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a whole state took: its checksums and the seconds of its copies, of which `hidden_s` behind the prefill."""

    checksums: tuple[Checksum, ...]
    seconds: float
    hidden_s: float


class StateTransport(Protocol):
    """Moves states between workers: shared memory on one machine, Ray's object store between machines. One a worker."""

    def sink(self, layout: StateLayout) -> StateSink | Infeasible:
        """Where to put a state while it is computed; Infeasible while states that nobody has fetched yet take the room.
        Raises SpecError where it can never fit."""
        ...

    def open(self, receipt: Any, spec: ModelSpec) -> OpenedState:
        """The state of a receipt, checked. Raises SpecError where it is damaged, gone or of another model."""
        ...

    def release(self, receipt: Any) -> None:
        """Free a state of which the receiver is dead or was never told. The receiver must not be reading it."""
        ...

    @property
    def pending(self) -> int:
        """States that were not released yet; a worker with any must not leave."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(slots=True)
class OpenedState:
    """A state that another worker computed, in memory that is not ours: copy it, then `release` it."""

    state: SequenceState
    nbytes: int
    seconds: float
    """Of mapping or fetching it and of checking it."""
    _release: Callable[[], None]

    def release(self) -> None:
        """The sender may use the memory again: nothing may read `state` from here on. A second call does nothing."""
        release, self._release = self._release, _nothing
        release()


class StateWriter:
    """Copies the state of one sequence into `buffer` as its prefill goes on, on `executor`'s thread where there is one.

    Each layer with keys must come in order from token 0 on, also what a prefix cache gave; layers in any order.
    """

    def __init__(
        self, layout: StateLayout, buffer: NDArray[np.uint8], *, clock: Callable[[], float], executor: Executor | None = None
    ) -> None:
        self._layout = layout
        self._flat = buffer.data
        self._targets = [pair and [_numbers(buffer, region) for region in pair] for pair in layout.layers]
        self._clock = clock
        self._executor = executor
        self._copies: list[Future[tuple[Checksum, float]]] = []
        self._done: list[tuple[Checksum, float]] = []
        self._until = [0] * len(layout.layers)

    def put(self, layer: int, state: LayerState, begin: int, end: int, *, final: bool) -> None:
        """Copy what is new of a layer, see `StateSink.put`. The tensors' slots must stay as they are until `finish`."""
        pair = self._layout.layers[layer]
        if pair is None or state is None or (isinstance(state, MambaState) and not final):
            return
        if isinstance(state, MambaState):
            begin = 0
        if begin != self._until[layer] or end > self._layout.tokens or (final and end != self._layout.tokens):
            raise SpecError(
                f"tokens {begin}..{end} of layer {layer}: must go on from {self._until[layer]} and end at {self._layout.tokens}"
            )
        if begin >= end:
            return
        held = self._targets[layer]
        assert held is not None
        if isinstance(state, AttentionState):
            sources = [_host(tensor, begin, end) for tensor in state.tensors]
            targets = [numbers[:, begin:end] for numbers in held]
        else:
            sources, targets = [_host(state.conv[None]), _host(state.ssm)], held
        for source, target in zip(sources, targets, strict=True):
            if source.shape != target.shape or source.itemsize != target.itemsize:
                found, wanted = f"{source.itemsize}-byte {list(source.shape)}", f"{target.itemsize}-byte {list(target.shape)}"
                raise SpecError(f"state of layer {layer} is {found}: {wanted} was laid out")
        self._until[layer] = end
        pairs = list(zip(sources, targets, pair, strict=True))
        if self._executor is not None and sum(target.nbytes for target in targets) > _INLINE_BYTES:
            self._copies.append(self._executor.submit(self._copy, layer, begin, end, pairs))
        else:
            self._done.append(self._copy(layer, begin, end, pairs))

    def finish(self) -> Written:
        """Wait for the copies. Raises SpecError where a part of the state never came."""
        asked_s = self._clock()
        copied = [copy.result() for copy in self._copies]
        waited_s = self._clock() - asked_s
        tokens = self._layout.tokens
        for layer, pair in enumerate(self._layout.layers):
            if pair is not None and self._until[layer] != tokens:
                raise SpecError(f"state of layer {layer} ends at token {self._until[layer]}: {tokens} were laid out")
        behind_s = sum(seconds for _, seconds in copied)
        done = copied + self._done
        checksums = tuple(sorted((c for c, _ in done), key=lambda c: (c.layer, c.begin)))
        return Written(checksums, sum(seconds for _, seconds in done), max(0.0, behind_s - waited_s))

    def stop(self) -> None:
        """Drop copies that have not begun and wait for the one that has: then the buffer is free."""
        for copy in self._copies:
            copy.cancel()
        wait(self._copies)

    def _copy(
        self, layer: int, begin: int, end: int, pairs: list[tuple[NDArray[Any], NDArray[Any], Region]]
    ) -> tuple[Checksum, float]:
        started_s = self._clock()
        digest = xxhash.xxh3_64()
        for source, target, region in pairs:
            for outer, rows, spans in _pieces(region, begin, begin + target.shape[1]):
                np.copyto(target[outer, rows], source[outer, rows])
                for span in spans:
                    digest.update(self._flat[span])
        return Checksum(layer, begin, end, digest.intdigest()), self._clock() - started_s


def verify(layout: StateLayout, buffer: NDArray[np.uint8], checksums: tuple[Checksum, ...]) -> None:
    """Raise SpecError unless these checksums cover the whole state that lies in `buffer` and agree with it."""
    until = [0] * len(layout.layers)
    flat = buffer.data
    for check in checksums:
        pair = layout.layers[check.layer] if 0 <= check.layer < len(until) else None
        if pair is None or check.begin != until[check.layer] or not check.begin < check.end <= layout.tokens:
            raise SpecError(f"checksum of layer {check.layer}, tokens {check.begin}..{check.end}: no such part of the state")
        until[check.layer] = check.end
        digest = xxhash.xxh3_64()
        for region in pair:
            tokens = isinstance(layout.spec.layers[check.layer], Attention)
            for _, _, spans in _pieces(region, check.begin, check.end if tokens else region.shape[1]):
                for span in spans:
                    digest.update(flat[span])
        if digest.intdigest() != check.digest:
            raise SpecError(f"state of layer {check.layer}, tokens {check.begin}..{check.end}: damaged; send the state again")
    for layer, pair in enumerate(layout.layers):
        if pair is not None and until[layer] != layout.tokens:
            raise SpecError(f"state of layer {layer}: has no checksum from token {until[layer]} on")


def _pieces(region: Region, begin: int, end: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Rows begin..end of a region in parts of about PIECE_BYTES: outer numbers, rows from `begin` on, spans of bytes."""
    outer, rows, inner = region.shape
    row_bytes = inner * region.dtype.itemsize
    block_bytes = (end - begin) * row_bytes

    def at(i: int, row: int) -> int:
        return region.offset + (i * rows + row) * row_bytes

    if block_bytes > PIECE_BYTES:
        step = max(1, PIECE_BYTES // row_bytes)
        for i in range(outer):
            for row in range(begin, end, step):
                stop = min(end, row + step)
                yield slice(i, i + 1), slice(row - begin, stop - begin), [slice(at(i, row), at(i, stop))]
        return
    group = PIECE_BYTES // block_bytes if block_bytes else outer
    for i in range(0, outer, group):
        j = min(outer, i + group)
        whole = end - begin == rows
        spans = [slice(at(i, 0), at(j, 0))] if whole else [slice(at(k, begin), at(k, end)) for k in range(i, j)]
        yield slice(i, j), slice(0, end - begin), spans


def _numbers(buffer: NDArray[np.uint8], region: Region) -> NDArray[Any]:
    """A region of a buffer as integers of its dtype's size: numpy has no bf16, and a copy needs none."""
    raw = buffer[region.offset : region.offset + region.nbytes]
    return raw.view(np.int16 if region.dtype.itemsize == 2 else np.int32).reshape(region.shape)


def _host(tensor: Tensor, begin: int = 0, end: int | None = None) -> NDArray[Any]:
    """The first row's slots begin..end as integers of the same bits, in this machine's memory: a view of a CPU's tensor."""
    if not tensor.is_cpu:
        return _host(tensor[:, :, begin:end].cpu())
    numbers: NDArray[Any] = tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()
    return numbers[0, :, begin:end]


def _numbers_of(mixer: Any) -> int:
    """Values of a layer's SSM state."""
    return mixer.num_heads * mixer.head_dim * mixer.state_dim if isinstance(mixer, Mamba2) else 0


def _nothing() -> None:
    return None
