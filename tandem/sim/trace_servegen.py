"""A day of requests drawn from ServeGen's description of one: clients, their rates by window, and their token histograms.

Each client is a renewal process within each window of its rates: gaps of the family and shape that were fitted there, with the
mean that gives the window's rate. A window begins in the middle of a gap, as an observer would find it, so that the mean count
is exactly the rate times the window, however bursty the gaps. Lengths are drawn from the client's histograms, prompt and output
independently, since that is all they tell. Source: Xiang et al., arXiv:2505.09999.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.sim.arrivals import FAMILIES, renewal_times
from tandem.spec.errors import SpecError, TraceError
from tandem.spec.workload import MAX_TOKENS, Trace, open_trace, trace_number

COLUMNS = ("client", "window_start_s", "rate_rps", "family", "shape")
MAX_REQUESTS = 20_000_000
LONGEST_WINDOW_S = 3600.0
SIDES = ("input_tokens", "output_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientWindow:
    """What one client does in one window of the day."""

    client: int
    start_s: float
    rate_rps: float
    family: str
    """Of the gaps: gamma or weibull."""
    shape: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Token counts and the running sum of their probabilities, which ends at 1."""

    tokens: NDArray[np.int64]
    cumulative: NDArray[np.float64]

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """So many token counts."""
        return self.tokens[np.searchsorted(self.cumulative, rng.random(count), side="right")]


@dataclass(frozen=True, kw_only=True)
class ServeGen:
    """Clients of a day; `draw` makes requests of them."""

    name: str
    windows: tuple[ClientWindow, ...]
    window_s: float
    lengths: Mapping[int, tuple[NDArray[np.float64], list[tuple[Histogram, Histogram]]]]
    """By client: starts of the windows of its histograms, and those of prompts and outputs."""
    empty_bins: int = 0
    """Histograms with a bin of 0 tokens, which is taken for 1."""

    def draw(self, *, seed: int, scale: float = 1.0, start_s: float = 0.0, duration_s: float | None = None) -> Trace:
        """Requests from `start_s` of the day on, every client at `scale` times its rates. Every window of every client has a
        seed of its own, so that a part of a day is the same as that part cut out of the whole day. Times count from the first
        request. Raises SpecError for nothing, or for more than 20 million."""
        end_s = np.inf if duration_s is None else start_s + duration_s
        windows = [w for w in self.windows if w.start_s < end_s and w.start_s + self.window_s > start_s]
        mean = scale * sum(w.rate_rps for w in windows) * self.window_s
        if mean > MAX_REQUESTS:
            raise SpecError(f"scale={scale:g}: would draw about {mean:,.0f} requests; at most {MAX_REQUESTS:,}")
        parts = [self._window(w, seed, scale, start_s, end_s) for w in windows]
        at_s, isl, osl = (np.concatenate([part[i] for part in parts] or [np.empty(0)]) for i in range(3))
        if not len(at_s):
            raise SpecError(f"start_s={start_s:g}: no request of {self.name} arrives between {start_s:g} and {end_s:g} s")
        client = np.repeat([w.client for w in windows], [len(part[0]) for part in parts]).astype(np.int32)
        order = np.argsort(at_s, kind="stable")
        at_s = at_s[order]
        note = f"drawn from {len({w.client for w in windows})} clients' rates and histograms, seed {seed}"
        if scale != 1.0:
            note += f", rates times {scale:g}"
        if start_s or duration_s is not None:
            note += f", from {start_s:g} s of the day" + ("" if duration_s is None else f" for {duration_s:g} s")
        if self.empty_bins:
            note += f"; bins of 0 tokens in {self.empty_bins} histograms are taken for 1"
        return Trace(
            name=self.name, arrival_s=at_s - at_s[0], isl=isl[order], osl=osl[order], client=client[order], note=note
        )  # fmt: skip

    def _window(
        self, window: ClientWindow, seed: int, scale: float, start_s: float, end_s: float
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        rng = np.random.default_rng([seed, window.client, int(window.start_s)])
        rate_rps = window.rate_rps * scale
        at_s = window.start_s + renewal_times(rng, window.family, window.shape, rate_rps, self.window_s)
        starts, histograms = self.lengths[window.client]
        prompts, outputs = histograms[int(np.searchsorted(starts, window.start_s, side="right")) - 1]
        isl, osl = prompts.draw(rng, len(at_s)), outputs.draw(rng, len(at_s))
        inside = (at_s >= start_s) & (at_s < end_s)
        return at_s[inside], isl[inside], osl[inside]


def read_servegen(rates: Path | Traversable, lengths: Path | Traversable, name: str) -> ServeGen:
    """The two files of a day: rates as CSV (client, window_start_s, rate_rps, family, shape), lengths as JSON Lines (client,
    window_start_s, input_tokens and output_tokens as pairs of tokens and probability). TraceError names row and value."""
    with open_trace(rates) as stream:
        windows = tuple(_rates(csv.reader(stream), rates.name))
    if not windows:
        raise TraceError(f"{rates.name}: holds no windows")
    with open_trace(lengths, "JSON Lines") as stream:
        found = [_lengths(line, f"{lengths.name} line {n}") for n, line in enumerate(stream, start=1) if line.strip()]
    by_client: dict[int, dict[float, tuple[Histogram, Histogram]]] = {}
    for client, start_s, sides in found:
        if sides is not None:
            by_client.setdefault(client, {})[start_s] = sides
    ready = {client: (np.array(sorted(own)), [own[at] for at in sorted(own)]) for client, own in by_client.items()}
    for window in windows:
        if window.client not in ready or window.start_s < ready[window.client][0][0]:
            raise TraceError(f"{lengths.name}: has no lengths of client={window.client} at {window.start_s:g} s")
    starts = np.unique([window.start_s for window in windows])
    window_s = float(np.diff(starts).min()) if len(starts) > 1 else 600.0
    empty = sum(int(side.tokens[0] == 0) for _, own in ready.values() for pair in own for side in pair)
    for _, own in ready.values():
        for pair in own:
            for side in pair:
                np.maximum(side.tokens, 1, out=side.tokens)
    return ServeGen(name=name, windows=windows, window_s=min(window_s, LONGEST_WINDOW_S), lengths=ready, empty_bins=empty)


def _rates(reader: Iterator[list[str]], name: str) -> Iterator[ClientWindow]:
    head = next(reader, [])
    missing = [column for column in COLUMNS if column not in head]
    if missing:
        raise TraceError(f"{name}: has no column {', '.join(missing)}; needs {', '.join(COLUMNS)}")
    places = [head.index(column) for column in COLUMNS]
    for line, row in enumerate(reader, start=2):
        if not row:
            continue
        where = f"{name} line {line}"
        if len(row) != len(head):
            raise TraceError(f"{where}: has {len(row)} cells; needs {len(head)}")
        client, start, rate, family, shape = (row[place] for place in places)
        if family.lower() not in FAMILIES:
            raise TraceError(f"{where}: family={family!r}: must be {' or '.join(FAMILIES)}")
        yield ClientWindow(
            client=int(trace_number(client, "client", where, low=0, high=2**31 - 1, whole=True)),
            start_s=trace_number(start, "window_start_s", where, low=0.0),
            rate_rps=trace_number(rate, "rate_rps", where, low=1e-9, high=1e6),
            family=family.lower(),
            shape=trace_number(shape, "shape", where, low=1e-3, high=1e6),
        )


def _lengths(line: str, where: str) -> tuple[int, float, tuple[Histogram, Histogram] | None]:
    try:
        row: Any = json.loads(line)
    except ValueError as wrong:
        raise TraceError(f"{where}: is not JSON ({wrong})") from None
    if not isinstance(row, dict):
        raise TraceError(f"{where}: must be a JSON object")
    client = int(trace_number(row.get("client"), "client", where, low=0, high=2**31 - 1, whole=True))
    start_s = trace_number(row.get("window_start_s"), "window_start_s", where, low=0.0)
    if not any(row.get(field) for field in SIDES):
        return client, start_s, None
    prompts, outputs = (_histogram(row.get(field), f"{where}: {field}") for field in SIDES)
    return client, start_s, (prompts, outputs)


def _histogram(pairs: Any, where: str) -> Histogram:
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TraceError(f"{where}={str(pairs)[:40]}: must be a list of pairs [tokens, probability]")
    tokens = [int(trace_number(pair[0], "tokens", where, low=0, high=MAX_TOKENS, whole=True)) for pair in pairs]
    weight = np.array([trace_number(pair[1], "probability", where, low=0.0, high=1.0) for pair in pairs])
    if tokens != sorted(tokens) or not 0.9 <= weight.sum() <= 1.1:
        raise TraceError(f"{where}: must rise in tokens, with probabilities that sum to about 1 (here {weight.sum():.4g})")
    cumulative = np.cumsum(weight / weight.sum())
    cumulative[-1] = 1.0
    return Histogram(tokens=np.array(tokens, dtype=np.int64), cumulative=cumulative)
