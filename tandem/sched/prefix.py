"""Which prompts begin alike: hashes of prompt prefixes, and an index of the workers that hold their state.

A prompt is cut into cells of equal size. The hash of a cell covers all tokens before it too, so equal hashes mean equal
prefixes, and a cache needs no tree: the longest prefix held is the last hash found.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from tandem.spec.units import require_int

HASH_BYTES = 8
"""64 bits: among a million prefixes the chance that any two collide is about 3e-8."""


def prefix_hashes(ids: Sequence[int], cell: int) -> tuple[int, ...]:
    """A hash for each full cell of `cell` tokens, chained from the start: hash i stands for all tokens before (i + 1) * cell.

    The same in every process and on every machine. SpecError where `cell` is below 1.
    """
    require_int("cell", cell)
    packed = array("q", ids)
    if packed.itemsize != 8:  # pragma: no cover
        raise RuntimeError("array('q') does not hold 8 bytes on this platform")
    view, width = memoryview(packed).cast("B"), cell * packed.itemsize
    hashes, before = [], cell.to_bytes(8, "little")
    for start in range(0, len(packed) // cell * width, width):
        before = blake2b(view[start : start + width], digest_size=HASH_BYTES, key=before).digest()
        hashes.append(int.from_bytes(before, "little"))
    return tuple(hashes)


class PrefixIndex:
    """What the router remembers of each worker's prefix cache. It may be wrong: a cache may have dropped what is noted here.

    Holds at most `max_entries` pairs of worker and hash; the pair noted or matched longest ago goes first.
    """

    def __init__(self, max_entries: int = 1_000_000) -> None:
        require_int("max_entries", max_entries)
        self._max_entries = max_entries
        self._pairs: OrderedDict[tuple[int, str], None] = OrderedDict()
        self._workers: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def note(self, worker: str, hashes: Iterable[int]) -> None:
        """`worker` holds, or soon will hold, the state of these prefixes."""
        for known in reversed(tuple(hashes)):  # so that a chain loses its end before its beginning
            self._pairs[known, worker] = None
            self._pairs.move_to_end((known, worker))
            self._workers.setdefault(known, set()).add(worker)
        while len(self._pairs) > self._max_entries:
            (oldest, holder), _ = self._pairs.popitem(last=False)
            self._drop(oldest, holder)

    def forget(self, worker: str) -> None:
        """`worker` is gone, or its cache is empty."""
        for pair in [pair for pair in self._pairs if pair[1] == worker]:
            del self._pairs[pair]
            self._drop(*pair)

    def matched(self, hashes: Sequence[int]) -> dict[str, int]:
        """For each worker that holds a beginning of this prompt: how many cells of it, at least 1."""
        cells: dict[str, int] = {}
        for count, known in enumerate(hashes, start=1):
            holders = [worker for worker in self._workers.get(known, ()) if cells.get(worker, 0) == count - 1]
            if not holders:
                break
            cells.update(dict.fromkeys(holders, count))
        for worker, count in cells.items():
            for known in reversed(hashes[:count]):
                self._pairs.move_to_end((known, worker))
        return dict(sorted(cells.items()))

    def _drop(self, known: int, worker: str) -> None:
        holders = self._workers[known]
        holders.remove(worker)
        if not holders:
            del self._workers[known]
