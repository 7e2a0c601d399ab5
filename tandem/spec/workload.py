"""Traffic and what is asked of it: prompt and output lengths, arrivals, and the latency objective."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from tandem.spec.errors import SpecError, TraceError
from tandem.spec.units import require_int, require_number

BUNDLED_TRACES = {"azure-conversation-2023": "azure_conversation_2023.csv.gz"}
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

    def workload(self) -> Workload:
        """Its lengths and its mean request rate."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        rate = (len(self.isl) - 1) / span if span > 0 else None
        return Workload.from_lengths(self.name, self.isl.tolist(), self.osl.tolist(), requests_per_s=rate)


def read_trace(name_or_path: str | Path) -> Trace:
    """A bundled trace by name, or a CSV file (plain or .gz) with the columns arrival_s, isl, osl.

    Raises TraceError that names the file, the row and what is wrong with it.
    """
    text = str(name_or_path)
    if text in BUNDLED_TRACES:
        source = resources.files("tandem.spec") / "data" / "traces" / BUNDLED_TRACES[text]
        with source.open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8", newline="") as stream:
            return _read_csv(stream, text)
    path = Path(text)
    if not path.is_file():
        raise TraceError(f"trace={text!r}: no such file; bundled traces are {', '.join(BUNDLED_TRACES)}")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            return _read_csv(stream, path.name)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as wrong:
        raise TraceError(f"{path}: not a readable CSV file ({wrong})") from None


def _read_csv(stream: TextIO, name: str) -> Trace:
    reader = csv.DictReader(stream)
    missing = {"arrival_s", "isl", "osl"} - set(reader.fieldnames or ())
    if missing:
        raise TraceError(f"{name}: has no column {', '.join(sorted(missing))}; needs arrival_s, isl, osl")
    rows: list[tuple[float, int, int]] = []
    for line, row in enumerate(reader, start=2):
        rows.append(_read_row(row, f"{name} line {line}"))
        if len(rows) > 1 and rows[-1][0] < rows[-2][0]:
            raise TraceError(f"{name} line {line}: arrival_s={rows[-1][0]}: must not be before the row above ({rows[-2][0]})")
    if not rows:
        raise TraceError(f"{name}: holds no requests")
    arrival, isl, osl = zip(*rows, strict=True)
    return Trace(name=name, arrival_s=np.array(arrival), isl=np.array(isl), osl=np.array(osl))


def _read_row(row: dict[str, str], where: str) -> tuple[float, int, int]:
    if None in row:
        raise TraceError(f"{where}: has more cells than the first line has columns")
    values = []
    for field, kind, low in (("arrival_s", float, 0.0), ("isl", int, 1), ("osl", int, 1)):
        text = row[field]
        try:
            value = kind(text)
        except (TypeError, ValueError):
            raise TraceError(f"{where}: {field}={text!r}: must be a number") from None
        high = MAX_TOKENS if kind is int else 1e12
        if not low <= value <= high:
            raise TraceError(f"{where}: {field}={text}: must be at least {low:g} and at most {high:,.0f}")
        values.append(value)
    return float(values[0]), int(values[1]), int(values[2])
