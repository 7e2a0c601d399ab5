"""States between processes of one machine, through memory that both map.

Each worker has a `SharedMemoryPool`. The sender's pool owns one arena, which stays mapped and whose pages stay: a fresh page
costs more than the copy. The receiver reads in place and sets a word in the state's header when it is done; where the
receiver died, whoever noticed calls `release` on the sender. On Linux the arena has no name in any file system, so that
nothing is left however its owner dies; elsewhere, or where a directory is given, it is a file, and `sweep` removes those of
dead owners. A pool is used by one thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import tempfile
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.engine.transfer import DTYPES, Checksum, OpenedState, StateLayout, StateWriter, verify
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int

_HEADER_BYTES = 64
"""Three words before each state: the arena's token, the state's generation, and that again once it is released."""
_GROW_BYTES = 4 * 1024 * 1024
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python 3.11 has no name for it


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemoryReceipt:
    """Where a state lies and how to tell that it is whole."""

    path: str
    """Opens the arena, while its owner lives."""
    token: int
    """Of the arena: a path may be used again, by another owner."""
    offset: int
    generation: int
    layout_key: str
    tokens: int
    dtype: str
    checksums: tuple[Checksum, ...]
    nbytes: int
    seconds: float
    """Of the sender's copies and checksums."""
    hidden_s: float
    """Of `seconds`, while the prefill still computed."""


@dataclass(slots=True)
class _Lease:
    """Bytes of the arena that hold one state, its header included."""

    offset: int
    size: int
    generation: int


class _Arena:
    """Shared memory of one owner, mapped here."""

    def __init__(self, path: str, fd: int, token: int, size: int) -> None:
        self.path = path
        self.token = token
        self.memory = mmap.mmap(fd, size)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8)

    def header(self, offset: int) -> NDArray[np.uint64]:
        """Token, generation, released generation of the state at an offset."""
        return self.bytes[offset : offset + 24].view(np.uint64)


class SharedMemoryPool:
    """One worker's end of shared memory: sinks for the states it computes, views of those that others computed.

    `max_bytes` bounds the states that wait to be fetched, `directory` is for files instead of nameless memory (two containers
    may share one). With `background` copies run on a thread of their own, behind the prefill.
    """

    def __init__(
        self,
        prefix: str,
        max_bytes: int,
        *,
        directory: Path | None = None,
        background: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        require_int("max_bytes", max_bytes, low=_GROW_BYTES, high=1 << 46)
        if not re.fullmatch(r"[\w.-]{1,64}", prefix):
            raise SpecError(f"prefix={prefix!r}: must be letters, digits, '-', '_' or '.', at most 64")
        self._prefix = prefix
        self._max_bytes = -(-max_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._directory = directory
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{prefix}-state") if background else None
        self._own: _Arena | None = None
        self._warm = 0
        self._generation = 0
        self._leases: list[_Lease] = []
        self._others: dict[tuple[str, int], _Arena] = {}
        self._remove: Callable[[], Any] = lambda: None

    @property
    def pending(self) -> int:
        """States that were not released yet; a worker with any must not leave, for its memory goes with it."""
        self._reclaim()
        return len(self._leases)

    @property
    def used_bytes(self) -> int:
        """Bytes of those states."""
        self._reclaim()
        return sum(lease.size for lease in self._leases)

    def warm(self, nbytes: int) -> None:
        """Have the first `nbytes` of the arena in memory before a state needs them. Raises SpecError where there are none."""
        refused = self._ensure(min(nbytes, self._max_bytes))
        if refused is not None:
            raise SpecError(f"warm_bytes={nbytes:,}: {refused.reason}")
        assert self._own is not None
        with contextlib.suppress(OSError):  # an older kernel maps page by page, when they are touched
            self._own.memory.madvise(_MADV_POPULATE_WRITE, 0, self._warm)

    def sink(self, layout: StateLayout) -> SharedMemorySink | Infeasible:
        """Where to put a state while it is computed, see `StateTransport.sink`."""
        size = -(-(_HEADER_BYTES + layout.nbytes) // _HEADER_BYTES) * _HEADER_BYTES
        if size > self._max_bytes:
            raise SpecError(f"max_bytes={self._max_bytes:,}: one state of {layout.tokens} tokens takes {size:,}")
        self._reclaim()
        offset = self._gap(size)
        if offset is None:
            return Infeasible(f"{len(self._leases)} states wait to be fetched; none of the gaps between has {size:,} bytes")
        refused = self._ensure(offset + size)
        if refused is not None:
            return refused
        assert self._own is not None
        self._generation += 1
        lease = _Lease(offset, size, self._generation)
        self._leases.append(lease)
        self._leases.sort(key=lambda held: held.offset)
        self._own.header(offset)[:] = (self._own.token, lease.generation, 0)
        begin = offset + _HEADER_BYTES
        target = self._own.bytes[begin : begin + layout.nbytes]
        writer = StateWriter(layout, target, clock=self._clock, executor=self._executor)
        return SharedMemorySink(layout, writer, self._own, lease, partial(self._drop, lease.generation))

    def open(self, receipt: SharedMemoryReceipt, spec: ModelSpec) -> OpenedState:
        """Views of a state that lies in shared memory, checked. Raises SpecError where it is damaged, gone or not of `spec`."""
        started_s = self._clock()
        arena = self._arena_of(receipt)
        header = arena.header(receipt.offset)
        if (int(header[0]), int(header[1])) != (receipt.token, receipt.generation):
            raise SpecError(f"state {receipt.generation} at {receipt.path}: its memory was given to another state")
        release = partial(_mark_released, header, receipt.token, receipt.generation)
        try:
            layout = StateLayout(spec=spec, tokens=receipt.tokens, dtype=DTYPES[receipt.dtype])
            if layout.key != receipt.layout_key:
                raise SpecError(f"state of {receipt.tokens} tokens at {receipt.path}: is of another model than {spec.name}")
            begin = receipt.offset + _HEADER_BYTES
            raw = arena.bytes[begin : begin + layout.nbytes]
            verify(layout, raw, receipt.checksums)
        except SpecError:
            release()
            raise
        state = layout.state(raw.data)
        return OpenedState(state, layout.nbytes, self._clock() - started_s, release)

    def release(self, receipt: SharedMemoryReceipt) -> None:
        """Free a state whose receiver is dead or was never told; a receipt of another owner, or an old one, does nothing."""
        if self._own is not None and receipt.token == self._own.token:
            self._drop(receipt.generation)

    def close(self) -> None:
        """Free the arena. Views of others' states stay readable until they are dropped; ours cannot be opened any more."""
        if self._executor is not None:
            self._executor.shutdown()
        self._leases.clear()
        self._others.clear()
        self._own = None
        self._remove()

    def _drop(self, generation: int) -> None:
        self._leases = [lease for lease in self._leases if lease.generation != generation]

    def _reclaim(self) -> None:
        own = self._own
        if own is not None:
            self._leases = [lease for lease in self._leases if int(own.header(lease.offset)[2]) != lease.generation]

    def _gap(self, size: int) -> int | None:
        """The lowest offset with room: low pages are the ones that are in memory already."""
        begin = 0
        for lease in self._leases:
            if lease.offset - begin >= size:
                return begin
            begin = lease.offset + lease.size
        return begin if self._max_bytes - begin >= size else None

    def _ensure(self, nbytes: int) -> Infeasible | None:
        """Real pages behind the first `nbytes`: writing to pages that the system cannot give would kill the process."""
        if self._own is None:
            self._create()
        if nbytes <= self._warm:
            return None
        until = min(self._max_bytes, -(-nbytes // _GROW_BYTES) * _GROW_BYTES)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, self._warm, until - self._warm)
        except OSError as full:
            return Infeasible(f"no shared memory for {until:,} bytes ({full.strerror})")
        self._warm = until
        return None

    def _create(self) -> None:
        directory = self._directory
        if directory is None and hasattr(os, "memfd_create"):
            self._fd = os.memfd_create(self._prefix)
            path, named = f"/proc/{os.getpid()}/fd/{self._fd}", None
        else:
            named = Path(directory or tempfile.gettempdir()) / f"{self._prefix}-{os.getpid()}-{secrets.token_hex(4)}"
            path = str(named)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._remove = weakref.finalize(self, _remove, self._fd, named, os.getpid())
        os.ftruncate(self._fd, self._max_bytes)
        self._own = _Arena(path, self._fd, secrets.randbits(63), self._max_bytes)

    def _arena_of(self, receipt: SharedMemoryReceipt) -> _Arena:
        if self._own is not None and receipt.token == self._own.token:
            return self._own
        key = (receipt.path, receipt.token)
        known = self._others.get(key)
        if known is not None:
            return known
        for gone in [other for other in self._others if other[0] == receipt.path or not os.path.exists(other[0])]:
            del self._others[gone]
        try:
            fd = os.open(receipt.path, os.O_RDWR)
        except OSError as missing:
            raise SpecError(f"state at {receipt.path}: cannot be opened ({missing.strerror}); its owner is gone") from None
        try:
            size = os.fstat(fd).st_size
            if receipt.offset + _HEADER_BYTES + receipt.nbytes > size:
                raise SpecError(f"state at {receipt.path}: {size:,} bytes do not hold it; its owner is gone")
            self._others[key] = _Arena(receipt.path, fd, receipt.token, size)
        finally:
            os.close(fd)
        return self._others[key]


class SharedMemorySink:
    """Puts one state into an arena; either `close` or `abort` ends it."""

    def __init__(
        self, layout: StateLayout, writer: StateWriter, arena: _Arena, lease: _Lease, drop: Callable[[], None]
    ) -> None:
        self._layout = layout
        self._writer = writer
        self._arena = arena
        self._lease = lease
        self._drop = drop
        self.put = writer.put
        """`StateSink.put`."""

    def close(self) -> SharedMemoryReceipt:
        """Wait for the copies; the state is the receiver's until it is released. Raises SpecError where parts are missing."""
        try:
            written = self._writer.finish()
        except BaseException:
            self.abort()
            raise
        return SharedMemoryReceipt(
            path=self._arena.path,
            token=self._arena.token,
            offset=self._lease.offset,
            generation=self._lease.generation,
            layout_key=self._layout.key,
            tokens=self._layout.tokens,
            dtype=self._layout.dtype_name,
            checksums=written.checksums,
            nbytes=self._layout.nbytes,
            seconds=written.seconds,
            hidden_s=written.hidden_s,
        )

    def abort(self) -> None:
        """Give the memory back; also after `close`, where nobody was told of the receipt."""
        self._writer.stop()
        self._drop()


def sweep(prefix: str, directory: Path | None = None) -> list[Path]:
    """Remove arenas with a file name that their owners left when they were killed; the files removed."""
    removed: list[Path] = []
    for path in Path(directory or tempfile.gettempdir()).glob(f"{prefix}-*"):
        owner = re.fullmatch(re.escape(prefix) + r"-(\d+)-[0-9a-f]{8}", path.name)
        if owner is not None and not _alive(int(owner[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _mark_released(header: NDArray[np.uint64], token: int, generation: int) -> None:
    """Where the owner has already given these bytes to another state, they are not ours to write."""
    if (int(header[0]), int(header[1])) == (token, generation):
        header[2] = generation


def _remove(fd: int, named: Path | None, owner: int) -> None:
    """A forked child has a copy of this finaliser, and neither the file nor its name are its own."""
    if os.getpid() == owner:
        os.close(fd)
        if named is not None:
            named.unlink(missing_ok=True)
