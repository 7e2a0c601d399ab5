"""Traffic and what is asked of it: prompt and output lengths, arrivals, and the latency objective."""

from __future__ import annotations

import csv
import gzip
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from tandem.spec.errors import SpecError, TraceError
from tandem.spec.units import require_int, require_number

BUNDLED_TRACES = {
    "azure-code-2023": "azure_code_2023.csv.gz",
    "azure-conversation-2023": "azure_conversation_2023.csv.gz",
}
"""Recordings that ship as CSV; `tandem.sim.traces.BUNDLED` has those of other forms as well."""
MAX_TOKENS = 16_777_216
"""Longest prompt or output that is taken for a real one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """Latency objective; None leaves a side open. `percentile` is the share of requests, in percent, that must meet it."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 50.0

    def __post_init__(self) -> None:
        for field in ("ttft_s", "tpot_s"):
            if getattr(self, field) is not None:
                require_number(field, getattr(self, field), high=86_400.0)
        require_number("percentile", self.percentile, high=100.0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths of the traffic as weighted points (isl, osl), and its request rate where one is known.

    A fixed workload is one point. A trace becomes at most 64 points that keep the trace's token totals exactly, so that
    pricing it costs no more than pricing a few fixed lengths.
    """

    name: str
    isl: tuple[float, ...]
    osl: tuple[float, ...]
    weight: tuple[float, ...]
    requests_per_s: float | None = None

    def __post_init__(self) -> None:
        if not len(self.isl) == len(self.osl) == len(self.weight) >= 1:
            raise SpecError(f"isl has {len(self.isl)}, osl {len(self.osl)}, weight {len(self.weight)} points: need equal, >= 1")
        for field, low in (("isl", 1), ("osl", 1)):
            for value in getattr(self, field):
                if not low <= value <= MAX_TOKENS:
                    raise SpecError(f"{field}={value!r}: must be from {low} to {MAX_TOKENS:,} tokens")
        if abs(sum(self.weight) - 1) > 1e-9 or min(self.weight) <= 0:
            raise SpecError(f"weight sums to {sum(self.weight)!r}: weights must be above 0 and sum to 1")
        if self.requests_per_s is not None:
            require_number("requests_per_s", self.requests_per_s)

    @classmethod
    def fixed(cls, isl: int, osl: int) -> Workload:
        """Every request has the same lengths."""
        require_int("isl", isl, high=MAX_TOKENS)
        require_int("osl", osl, high=MAX_TOKENS)
        return cls(name=f"{isl}/{osl}", isl=(float(isl),), osl=(float(osl),), weight=(1.0,))

    @classmethod
    def from_lengths(
        cls, name: str, isl: Sequence[int], osl: Sequence[int], *, requests_per_s: float | None = None
    ) -> Workload:
        """Summarise observed lengths: 16 groups of equal size by isl, each cut in 4 by osl, each group its means."""
        isl_a, osl_a = np.asarray(isl, dtype=np.float64), np.asarray(osl, dtype=np.float64)
        points = []
        for rows in np.array_split(np.argsort(isl_a, kind="stable"), min(16, len(isl_a))):
            by_osl = rows[np.argsort(osl_a[rows], kind="stable")]
            points += [
                (isl_a[cell].mean(), osl_a[cell].mean(), len(cell) / len(isl_a))
                for cell in np.array_split(by_osl, min(4, len(by_osl)))
            ]
        a, b, w = (tuple(float(x) for x in column) for column in zip(*points, strict=True))
        return cls(name=name, isl=a, osl=b, weight=w, requests_per_s=requests_per_s)

    @property
    def mean_isl(self) -> float:
        """Mean prompt length in tokens."""
        return float(np.dot(self.weight, self.isl))

    @property
    def mean_osl(self) -> float:
        """Mean output length in tokens."""
        return float(np.dot(self.weight, self.osl))

    @property
    def final_context(self) -> float:
        """Mean final length of the sequences found in a decode batch: a request counts for as long as it stays, its osl."""
        w, i, o = (np.asarray(x) for x in (self.weight, self.isl, self.osl))
        return float(np.sum(w * o * (i + o)) / np.sum(w * o))

    @property
    def decode_context(self) -> float:
        """Mean context of the sequences found in a decode batch, halfway through their output."""
        w, i, o = (np.asarray(x) for x in (self.weight, self.isl, self.osl))
        return float(np.sum(w * o * (i + o / 2)) / np.sum(w * o))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests as they arrived: seconds from the first one, prompt and output tokens, in order of arrival."""

    name: str
    arrival_s: NDArray[np.float64]
    isl: NDArray[np.int64]
    osl: NDArray[np.int64]
    client: NDArray[np.int32] | None = None
    """Who asks, as a number for each request; None where it is not known."""
    prefix_hash: NDArray[np.int64] | None = None
    """Hashes of the prompts' blocks of `prefix_block` tokens, all requests' one after another; equal hashes, equal prefixes."""
    prefix_end: NDArray[np.int64] | None = None
    """Where each request's hashes end in `prefix_hash`."""
    prefix_block: int = 512
    note: str = ""
    """What a reader of results should know of how it was read or made, such as stamps that were spread."""

    def __len__(self) -> int:
        return len(self.isl)

    def rows(self, order: NDArray[np.intp] | NDArray[np.bool_]) -> Trace:
        """These requests of it, by their places or by a mask, with the arrival times they have."""
        places = np.flatnonzero(order) if order.dtype == np.bool_ else order
        taken = replace(
            self,
            arrival_s=self.arrival_s[places],
            isl=self.isl[places],
            osl=self.osl[places],
            client=None if self.client is None else self.client[places],
        )
        if self.prefix_hash is None or self.prefix_end is None:
            return taken
        begin = np.concatenate(([0], self.prefix_end[:-1]))[places]
        counts = self.prefix_end[places] - begin
        ends = np.cumsum(counts)
        hashes = self.prefix_hash[np.arange(int(counts.sum())) + np.repeat(begin - ends + counts, counts)]
        return replace(taken, prefix_hash=hashes, prefix_end=ends)

    def workload(self) -> Workload:
        """Its lengths and its mean request rate."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        rate = (len(self.isl) - 1) / span if span > 0 else None
        return Workload.from_lengths(self.name, self.isl.tolist(), self.osl.tolist(), requests_per_s=rate)


class TraceRows:
    """Requests as a reader finds them, put together into a Trace at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._arrival_s, self._isl, self._osl = array("d"), array("q"), array("q")
        self._hashes, self._ends, self._clients = array("q"), array("q"), array("i")
        self._numbers: dict[str, int] = {}
        self.answerless = 0
        """Requests with an answer of 0 tokens, which are taken to have had one of 1."""

    def __len__(self) -> int:
        return len(self._isl)

    @property
    def last_s(self) -> float:
        """Arrival of the latest one added; minus infinity before the first."""
        return self._arrival_s[-1] if self._arrival_s else -np.inf

    def add(
        self, arrival_s: float, isl: int, osl: int, *, hashes: Iterable[int] | None = None, client: str | None = None
    ) -> None:
        """One request whose values are in range; either all have hashes and a client, or none."""
        self._arrival_s.append(arrival_s)
        self._isl.append(isl)
        self._osl.append(max(osl, 1))
        self.answerless += osl == 0
        if hashes is not None:
            self._hashes.extend(hashes)
            self._ends.append(len(self._hashes))
        if client is not None:
            self._clients.append(self._numbers.setdefault(client, len(self._numbers)))

    def trace(self, *, note: str = "", prefix_block: int = 512) -> Trace:
        """All of them in order of arrival, those of the same time as added. TraceError if there are none."""
        if not len(self):
            raise TraceError(f"{self.name}: holds no requests")
        at_s = np.array(self._arrival_s)
        notes = [note] if note else []
        if self.answerless:
            notes.append(f"{self.answerless:,} answers of 0 tokens are taken for 1")
        found = Trace(
            name=self.name, arrival_s=at_s - at_s.min(), isl=np.array(self._isl), osl=np.array(self._osl),
            client=np.array(self._clients, dtype=np.int32) if self._clients else None,
            prefix_hash=np.array(self._hashes) if self._hashes else None,
            prefix_end=np.array(self._ends) if self._hashes else None,
            prefix_block=prefix_block, note="; ".join(notes),
        )  # fmt: skip
        return found if bool((np.diff(at_s) >= 0).all()) else found.rows(np.argsort(at_s, kind="stable"))


def trace_number(value: object, field: str, where: str, *, low: float, high: float = 1e12, whole: bool = False) -> float:
    """A number of a trace's row within [low, high], from text or JSON; TraceError names the row, the field and the value."""
    shown = repr(value) if isinstance(value, str) else str(value)
    try:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool) or (whole and isinstance(value, float)):
            raise ValueError
        number = int(value) if whole else float(value)
    except (ValueError, OverflowError):
        raise TraceError(f"{where}: {field}={shown:.80}: must be a number{', a whole one' if whole else ''}") from None
    if not low <= number <= high:
        raise TraceError(f"{where}: {field}={value!s:.80}: must be at least {low:g} and at most {high:,.0f}")
    return number


@contextmanager
def open_trace(source: Path | Traversable, kind: str = "CSV") -> Iterator[TextIO]:
    """A trace file as text, unpacked if it ends in .gz. TraceError where it is not there or not text of this `kind`."""
    if not source.is_file():
        raise TraceError(f"trace={str(source)!r}: no such file; bundled CSV traces are {', '.join(BUNDLED_TRACES)}")
    try:
        with source.open("rb") as raw:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if source.name.endswith(".gz") else raw)
            with TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                yield text
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, csv.Error) as wrong:
        raise TraceError(f"{source}: not a readable {kind} file ({wrong})") from None


def read_trace(name_or_path: str | Path) -> Trace:
    """A bundled CSV trace by name, or a CSV file (plain or .gz) with the columns arrival_s, isl, osl; and, where it has them,
    client (any text) and prefix_hashes (whole numbers between spaces or semicolons). Times count from the first request.

    `tandem.sim.traces.load_trace` reads other forms too. Raises TraceError that names the file, the row and what is wrong.
    """
    text = str(name_or_path)
    bundled = text in BUNDLED_TRACES
    source: Path | Traversable = Path(text)
    if bundled:
        source = resources.files("tandem.spec") / "data" / "traces" / BUNDLED_TRACES[text]
    with open_trace(source) as stream:
        return read_csv(stream, text if bundled else source.name)


COLUMNS = ("arrival_s", "isl", "osl")


def read_csv(
    stream: TextIO,
    name: str,
    *,
    columns: tuple[str, str, str] = COLUMNS,
    stamp: Callable[[str, str], float] | None = None,
    least_osl: int = 1,
    in_order: bool = True,
    note: str = "",
) -> Trace:
    """Requests of a CSV file, row by row: `columns` hold arrival, isl and osl; others than client and prefix_hashes are left.

    `stamp(cell, where)` turns an arrival that is no number into seconds. Rows that are not `in_order` of arrival are sorted.
    Raises TraceError that names the row, the column and the value.
    """
    reader = csv.reader(stream)
    head = next(reader, [])
    missing = [column for column in columns if column not in head]
    if missing:
        raise TraceError(f"{name}: has no column {', '.join(sorted(missing))}; needs {', '.join(columns)}")
    places = [head.index(column) for column in columns]
    client, prefixes = (head.index(field) if field in head else None for field in ("client", "prefix_hashes"))
    rows = TraceRows(name)
    for line, row in enumerate(reader, start=2):
        if not row:
            continue
        where = f"{name} line {line}"
        if len(row) > len(head):
            raise TraceError(f"{where}: has more cells than the first line has columns")
        cells = row if len(row) == len(head) else [*row, *[None] * (len(head) - len(row))]
        at, isl, osl = (cells[place] for place in places)
        at_s = stamp(at or "", where) if stamp else trace_number(at, columns[0], where, low=0.0)
        if in_order and at_s < rows.last_s:
            raise TraceError(f"{where}: {columns[0]}={at_s}: must not be before the row above ({rows.last_s})")
        rows.add(
            at_s,
            int(trace_number(isl, columns[1], where, low=1, high=MAX_TOKENS, whole=True)),
            int(trace_number(osl, columns[2], where, low=least_osl, high=MAX_TOKENS, whole=True)),
            hashes=None if prefixes is None else _hashes(cells[prefixes], where),
            client=None if client is None else _client(cells[client], where),
        )
    return rows.trace(note=note)


def _client(cell: str | None, where: str) -> str:
    if not cell:
        raise TraceError(f"{where}: client={cell!r}: must not be empty")
    return cell


def _hashes(cell: str | None, where: str) -> list[int]:
    return [
        int(trace_number(each, "prefix_hashes", where, low=-(2.0**62), high=2.0**62, whole=True))
        for each in (cell or "").replace(";", " ").split()
    ]
