"""States between Ray's actors: as NumPy arrays through its object store, or from GPU to GPU by its tensor transport (NIXL).

A state goes layer by layer into memory of ours while it is computed; what is handed to Ray at the end is one flat array, which
costs one copy. (Torch tensors in the object store are pickled, which takes 40 times longer.)
"""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError
from torch import Tensor

from tandem.engine.handoff import StateSink
from tandem.engine.transfer import DTYPES, Checksum, OpenedState, StateLayout, StateWriter, verify
from tandem.model.state import AttentionState, LayerState, MambaState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int

FETCH_S = 60.0
"""A state that has not come within this time counts as gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayReceipt:
    """A reference to a state in Ray's hands, and how to tell that it is whole. It lives while somebody holds a reference."""

    ref: Any
    owner: str
    number: int
    """Of the owner's states."""
    layout_key: str
    tokens: int
    dtype: str
    checksums: tuple[Checksum, ...] | None
    """None from GPU to GPU, where nothing passes through a CPU that could sum."""
    nbytes: int
    seconds: float
    """Of the sender's copies and checksums, and of handing over to Ray."""
    hidden_s: float
    """Of `seconds`, while the prefill still computed."""


class _RayStates:
    """What both ways share: how much waits to be fetched, and what a receipt must agree with."""

    def __init__(self, max_bytes: int, *, clock: Callable[[], float], put: Callable[[Any], Any], get: Callable[[Any], Any]):
        self._max_bytes = require_int("max_bytes", max_bytes, high=1 << 46)
        self._clock, self._put, self._get = clock, put, get
        self._owner = secrets.token_hex(8)
        self._number = 0
        self._waiting: dict[int, int] = {}

    @property
    def pending(self) -> int:
        """States that were not released yet; they are lost when this process ends."""
        return len(self._waiting)

    def release(self, receipt: RayReceipt) -> None:
        """Count a state as fetched. Its memory comes free with the last reference: drop the receipt."""
        if receipt.owner == self._owner:
            self._drop(receipt.number)

    def _reserve(self, layout: StateLayout) -> int | Infeasible:
        if layout.nbytes > self._max_bytes:
            raise SpecError(f"max_bytes={self._max_bytes:,}: one state of {layout.tokens} tokens takes {layout.nbytes:,}")
        if sum(self._waiting.values()) + layout.nbytes > self._max_bytes:
            return Infeasible(f"{len(self._waiting)} states wait to be fetched and leave less than {layout.nbytes:,} bytes")
        self._number += 1
        self._waiting[self._number] = layout.nbytes
        return self._number

    def _drop(self, number: int) -> None:
        self._waiting.pop(number, None)

    def _fetch(self, receipt: RayReceipt, spec: ModelSpec) -> tuple[StateLayout, Any]:
        layout = StateLayout(spec=spec, tokens=receipt.tokens, dtype=DTYPES[receipt.dtype])
        if layout.key != receipt.layout_key:
            raise SpecError(f"state of {receipt.tokens} tokens: is of another model than {spec.name}")
        try:
            return layout, self._get(receipt.ref)
        except RayError as gone:
            raise SpecError(f"state of {receipt.tokens} tokens: cannot be fetched ({type(gone).__name__})") from None

    def _receipt(
        self,
        layout: StateLayout,
        number: int,
        ref: Any,
        checksums: tuple[Checksum, ...] | None,
        seconds: float,
        hidden_s: float,
    ) -> RayReceipt:
        return RayReceipt(
            ref=ref,
            owner=self._owner,
            number=number,
            layout_key=layout.key,
            tokens=layout.tokens,
            dtype=layout.dtype_name,
            checksums=checksums,
            nbytes=layout.nbytes,
            seconds=seconds,
            hidden_s=hidden_s,
        )


class RayObjectStates(_RayStates):
    """One worker's end of Ray's object store; a `StateTransport`. `max_bytes` bounds what waits to be fetched."""

    def __init__(
        self,
        max_bytes: int,
        *,
        background: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        put: Callable[[Any], Any] = ray.put,
        get: Callable[[Any], Any] = lambda ref: ray.get(ref, timeout=FETCH_S),
    ) -> None:
        super().__init__(max_bytes, clock=clock, put=put, get=get)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ray-state") if background else None
        self._free: list[NDArray[np.uint8]] = []

    def sink(self, layout: StateLayout) -> StateSink | Infeasible:
        """Where to put a state while it is computed, see `StateTransport.sink`."""
        number = self._reserve(layout)
        if isinstance(number, Infeasible):
            return number
        buffer = self._buffer(layout.nbytes)
        target = buffer[: layout.nbytes]
        writer = StateWriter(layout, target, clock=self._clock, executor=self._executor)

        def close() -> RayReceipt:
            written = writer.finish()
            started_s = self._clock()
            ref = self._put(target)
            taken_s = self._clock() - started_s
            return self._receipt(layout, number, ref, written.checksums, written.seconds + taken_s, written.hidden_s)

        def end(*, failed: bool) -> None:
            writer.stop()
            self._free.append(buffer)
            if failed:
                self._drop(number)

        return _Sink(writer.put, close, end)

    def open(self, receipt: RayReceipt, spec: ModelSpec) -> OpenedState:
        """Views of a state in this node's object store, which Ray brings here first. Raises SpecError where it is damaged,
        gone or not of `spec`."""
        started_s = self._clock()
        layout, raw = self._fetch(receipt, spec)
        if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8 or raw.size != layout.nbytes:
            raise SpecError(f"state of {receipt.tokens} tokens: its bytes are not {layout.nbytes:,}")
        verify(layout, raw, receipt.checksums or ())
        state = layout.state(_unguarded(raw))
        return OpenedState(state, layout.nbytes, self._clock() - started_s, lambda: None)

    def close(self) -> None:
        """Free the buffers."""
        if self._executor is not None:
            self._executor.shutdown()
        self._free.clear()
        self._waiting.clear()

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory that was used before, where there is any: fresh pages cost more than the copy."""
        self._free.sort(key=len)
        for i, buffer in enumerate(self._free):
            if len(buffer) >= nbytes:
                return self._free.pop(i)
        if self._free:
            self._free.pop(0)
        return np.empty(1 << max(16, (nbytes - 1).bit_length()), np.uint8)


class RayTensorStates(_RayStates):
    """States of a model on a GPU, which Ray's NIXL transport moves without a CPU; a `StateTransport`.

    The worker's actor needs `enable_tensor_transport`. `put` and `get` are Ray's, or stand-ins.
    """

    def __init__(
        self,
        max_bytes: int,
        device: torch.device,
        *,
        clock: Callable[[], float] = time.perf_counter,
        put: Callable[[Any], Any] = lambda tensor: ray.put(tensor, _tensor_transport="nixl"),
        get: Callable[[Any], Any] = lambda ref: ray.get(ref, timeout=FETCH_S),
    ) -> None:
        super().__init__(max_bytes, clock=clock, put=put, get=get)
        self._device = device

    def sink(self, layout: StateLayout) -> StateSink | Infeasible:
        """Where to put a state while it is computed, see `StateTransport.sink`. Copies queue on the GPU's current stream."""
        number = self._reserve(layout)
        if isinstance(number, Infeasible):
            return number
        flat = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        views = layout.state(flat)
        tokens = [0] * len(layout.layers)

        def put(layer: int, state: LayerState, begin: int, end: int, *, final: bool) -> None:
            target = views.layers[layer]
            if isinstance(state, AttentionState) and isinstance(target, AttentionState):
                for ours, theirs in zip(target.tensors, state.tensors, strict=True):
                    ours[:, :, begin:end] = theirs[:, :, begin:end]
                tokens[layer] += end - begin
            elif final and isinstance(state, MambaState) and isinstance(target, MambaState):
                for ours, theirs in zip(target.tensors, state.tensors, strict=True):
                    ours.copy_(theirs)
                tokens[layer] += layout.tokens

        def close() -> RayReceipt:
            for layer, pair in enumerate(layout.layers):
                if pair is not None and tokens[layer] != layout.tokens:
                    raise SpecError(f"state of layer {layer} has {tokens[layer]} tokens: {layout.tokens} were laid out")
            started_s = self._clock()
            if flat.is_cuda:
                torch.cuda.current_stream(flat.device).synchronize()
            ref = self._put(flat)
            return self._receipt(layout, number, ref, None, self._clock() - started_s, 0.0)

        def end(*, failed: bool) -> None:
            if failed:
                self._drop(number)

        return _Sink(put, close, end)

    def open(self, receipt: RayReceipt, spec: ModelSpec) -> OpenedState:
        """The state in this GPU's memory. Raises SpecError where it is gone or not of `spec`."""
        started_s = self._clock()
        layout, flat = self._fetch(receipt, spec)
        if not isinstance(flat, Tensor) or flat.dtype != torch.uint8 or flat.numel() != layout.nbytes:
            raise SpecError(f"state of {receipt.tokens} tokens: its bytes are not {layout.nbytes:,}")
        return OpenedState(layout.state(flat), layout.nbytes, self._clock() - started_s, lambda: None)

    def close(self) -> None:
        """Nothing is kept."""
        self._waiting.clear()


class _Sink:
    """Puts one state; either `close` or `abort` ends it."""

    def __init__(self, put: Callable[..., None], close: Callable[[], RayReceipt], end: Callable[..., None]) -> None:
        self.put = put
        """`StateSink.put`."""
        self._close, self._end = close, end
        self._ended = False

    def close(self) -> RayReceipt:
        """Hand the state to Ray. Raises SpecError where parts are missing."""
        receipt: RayReceipt | None = None
        try:
            receipt = self._close()
        finally:
            self._finish(failed=receipt is None)
        return receipt

    def abort(self) -> None:
        """Give the memory back."""
        self._finish(failed=True)

    def _finish(self, *, failed: bool) -> None:
        if not self._ended:
            self._ended = True
            self._end(failed=failed)


def _unguarded(raw: NDArray[np.uint8]) -> Any:
    """The bytes of an array that Ray marks as read-only, for torch, which has no such mark and warns. Nobody writes there."""
    whole = type("Kept", (ctypes.c_char * max(1, raw.size),), {}).from_address(raw.ctypes.data)  # type: ignore[attr-defined]
    whole.kept = raw
    return whole
