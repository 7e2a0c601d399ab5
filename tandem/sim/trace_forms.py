"""Readers of recorded traffic in the forms that other projects publish; each makes a Trace, row by row.

A reader names the file, the line, the field and its value in what it refuses (TraceError).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from tandem.spec.errors import TraceError
from tandem.spec.workload import MAX_TOKENS, Trace, TraceRows, open_trace, read_csv, trace_number

Source = Path | Traversable
BLOCK = 512
"""Tokens of a block in Mooncake's traces."""
SIDES = ("input", "output")
LEAST_GRID_S = 0.1
"""Stamps that are coarser than this are spread."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LOG = ("arrival_s", "input_tokens", "output_tokens")


def read_csv_form(source: Source, name: str, seed: int) -> Trace:
    """Tandem's own: arrival_s, isl, osl, and client and prefix_hashes where it has them."""
    with open_trace(source) as stream:
        return read_csv(stream, name)


def read_azure(source: Source, name: str, seed: int) -> Trace:
    """TIMESTAMP, ContextTokens, GeneratedTokens of AzurePublicDataset; or the same as arrival_s, input_tokens, output_tokens.
    An answer of 0 tokens is taken for 1, which the note says."""
    with open_trace(source) as stream:
        head = stream.readline().strip().split(",")
        stream.seek(0)
        if set(LOG) <= set(head):
            return read_csv(stream, name, columns=LOG, least_osl=0)
        return read_csv(stream, name, columns=AZURE, stamp=_stamps(), least_osl=0)


def _stamps() -> Callable[[str, str], float]:
    first: list[datetime] = []

    def seconds(cell: str, where: str) -> float:
        try:
            at = datetime.fromisoformat(cell)
            first.append(at) if not first else None
            return (at - first[0]).total_seconds()
        except (ValueError, TypeError):
            raise TraceError(f"{where}: TIMESTAMP={cell!r:.80}: must be a time such as 2023-11-16 18:15:46.680590") from None

    return seconds


def read_mooncake(source: Source, name: str, seed: int) -> Trace:
    """JSON Lines of timestamp in milliseconds, lengths, and hash_ids of blocks of 512 prompt tokens. Stamps on a grid coarser
    than 0.1 s are spread within their steps by `seed` (see `spread`), which the note says."""
    rows = TraceRows(name)
    isl_field, osl_field = (f"{side}_length" for side in SIDES)
    with open_trace(source, "JSON Lines") as stream:
        for row, where in _objects(stream, name):
            at_s = trace_number(row.get("timestamp"), "timestamp", where, low=0.0, high=1e15) / 1000
            if at_s < rows.last_s:
                raise TraceError(f"{where}: timestamp={row['timestamp']}: must not be before the row above")
            hashes = row.get("hash_ids")
            if hashes is not None and not isinstance(hashes, list):
                raise TraceError(f"{where}: hash_ids={hashes!s:.40}: must be a list of whole numbers")
            rows.add(
                at_s,
                int(trace_number(row.get(isl_field), isl_field, where, low=1, high=MAX_TOKENS, whole=True)),
                int(trace_number(row.get(osl_field), osl_field, where, low=0, high=MAX_TOKENS, whole=True)),
                hashes=[int(trace_number(h, "hash_ids", where, low=0, high=2.0**62, whole=True)) for h in hashes or ()],
            )
    return spread(rows.trace(prefix_block=BLOCK), seed)


def grid_of(arrival_s: NDArray[np.float64]) -> float | None:
    """Seconds between the steps of a clock on whose grid these arrivals lie: above 0.1, at least 9 of 10 gaps between distinct
    stamps a multiple of it (within 0.2 % and 3 ms), and a tenth of the requests or more share their stamp. None without one."""
    stamps, counts = np.unique(arrival_s, return_counts=True)
    if len(stamps) < 10 or counts[counts > 1].sum() < 0.1 * len(arrival_s):
        return None
    steps = np.diff(stamps)
    about_s = float(np.percentile(steps, 10))
    if about_s <= LEAST_GRID_S:
        return None
    multiples = np.maximum(np.rint(steps / about_s), 1)
    grid_s = float(np.median(steps / multiples))
    off = np.abs(steps - grid_s * np.maximum(np.rint(steps / grid_s), 1))
    return grid_s if float(np.mean(off <= 0.003 + 0.002 * grid_s)) >= 0.9 else None


def spread(trace: Trace, seed: int) -> Trace:
    """Requests whose stamps lie on a coarse grid, each at a uniform time between its stamp and the next step, in the order they
    had; other traces as they are. The note says what was done."""
    grid_s = grid_of(trace.arrival_s)
    if grid_s is None:
        return trace
    stamps, which = np.unique(trace.arrival_s, return_inverse=True)
    lasts_s = np.minimum(np.append(np.diff(stamps), grid_s), grid_s)
    at_s = trace.arrival_s + np.random.default_rng(seed).random(len(trace)) * lasts_s[which]
    note = f"stamps lie on a grid of {grid_s:g} s and are spread uniformly within its steps, seed {seed}"
    at_s = np.sort(at_s)
    return Trace(
        name=trace.name, arrival_s=at_s - at_s[0], isl=trace.isl, osl=trace.osl, client=trace.client,
        prefix_hash=trace.prefix_hash, prefix_end=trace.prefix_end, prefix_block=trace.prefix_block,
        note="; ".join(filter(None, (trace.note, note))),
    )  # fmt: skip


def read_vllm(source: Source, name: str, seed: int) -> Trace:
    """A log of served requests as CSV (arrival_s, input_tokens, output_tokens), or what `vllm bench serve --save-result
    --save-detailed` writes: one JSON object, which is read as a whole and whose failed requests are left out, as the note
    says."""
    with open_trace(source, "CSV or JSON") as stream:
        if stream.read(1) != "{":
            stream.seek(0)
            return read_csv(stream, name, columns=LOG, in_order=False)
        stream.seek(0)
        rows, failed = TraceRows(name), 0
        for row, where in _objects(stream, name):
            failed += _detailed(row, where, rows)
    return rows.trace(note=f"{failed} requests that failed are left out" if failed else "")


def _detailed(row: dict[str, Any], where: str, rows: TraceRows) -> int:
    isl_field, osl_field = (f"{side}_lens" for side in SIDES)
    columns = [row.get(field) for field in ("start_times", isl_field, osl_field)]
    for field, column in zip(("start_times", isl_field, osl_field), columns, strict=True):
        if not isinstance(column, list):
            raise TraceError(f"{where}: {field}: must be a list; write the result with --save-detailed")
        if len(column) != len(columns[0] or ()):
            raise TraceError(f"{where}: {field}: has {len(column)} entries; start_times has {len(columns[0] or ())}")
    errors = row.get("errors") or [""] * len(columns[0] or ())
    if not isinstance(errors, list) or len(errors) != len(columns[0] or ()):
        raise TraceError(f"{where}: errors: must be a list with an entry for each of the {len(columns[0] or ())} start_times")
    failed = 0
    for n, (at, isl, osl, error) in enumerate(zip(*columns, errors, strict=True)):  # type: ignore[arg-type]
        if error or osl == 0:
            failed += 1
            continue
        entry = f"{where} request {n}"
        rows.add(
            trace_number(at, "start_times", entry, low=0.0),
            int(trace_number(isl, isl_field, entry, low=1, high=MAX_TOKENS, whole=True)),
            int(trace_number(osl, osl_field, entry, low=1, high=MAX_TOKENS, whole=True)),
        )
    return failed


def read_aiperf(source: Source, name: str, seed: int) -> Trace:
    """AIPerf's profile_export.jsonl, a record a request: those of its warm-up and those that failed or were cancelled are left
    out, which the note says; conversations are the clients."""
    rows, warm_up, failed = TraceRows(name), 0, 0
    with open_trace(source, "JSON Lines") as stream:
        for row, where in _objects(stream, name):
            about, metrics = row.get("metadata"), row.get("metrics")
            if not isinstance(about, dict) or not isinstance(metrics, dict):
                raise TraceError(f"{where}: must have the objects metadata and metrics, as in AIPerf's profile_export.jsonl")
            if about.get("benchmark_phase", "profiling") != "profiling":
                warm_up += 1
            elif row.get("error") or about.get("was_cancelled"):
                failed += 1
            else:
                isl, osl = (_metric(metrics, f"{side}_sequence_length", where) for side in SIDES)
                at_s = trace_number(about.get("request_start_ns"), "request_start_ns", where, low=0.0, high=1e20) / 1e9
                rows.add(at_s, isl, osl, client=str(about.get("conversation_id") or about.get("x_request_id") or where))
    notes = [f"{n} requests {what} are left out" for n, what in ((warm_up, "of the warm-up"), (failed, "that failed")) if n]
    return rows.trace(note="; ".join(notes))


def _metric(metrics: dict[str, Any], field: str, where: str) -> int:
    metric = metrics.get(field)
    value = metric.get("value") if isinstance(metric, dict) else metric
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int(trace_number(value, field, where, low=1, high=MAX_TOKENS, whole=True))


def _objects(stream: TextIO, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        where = f"{name} line {line}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as wrong:
            raise TraceError(f"{where}: is not JSON ({wrong})") from None
        if not isinstance(row, dict):
            raise TraceError(f"{where}: must be a JSON object")
        yield row, where


READERS: dict[str, Callable[[Source, str, int], Trace]] = {
    "csv": read_csv_form, "azure": read_azure, "mooncake": read_mooncake, "vllm": read_vllm, "aiperf": read_aiperf,
}  # fmt: skip
"""By the name of the form."""
SERVEGEN = "servegen"
FORMATS = (*READERS, SERVEGEN)


def sniff(source: Source) -> str:
    """The form of a file by how it begins; `csv` where nothing else fits, whose reader then says what is missing."""
    try:
        with open_trace(source) as stream:
            begin = stream.read(8192)
    except TraceError:
        if not source.is_file():
            raise
        return "csv"
    if begin.lstrip().startswith("{"):
        return _sniff_json(begin, source)
    head = set(begin.partition("\n")[0].strip().split(","))
    if {"window_start_s", "rate_rps"} <= head:
        return SERVEGEN
    if set(AZURE) <= head:
        return "azure"
    return "vllm" if set(LOG) <= head else "csv"


def _sniff_json(begin: str, source: Source) -> str:
    if '"window_start_s"' in begin and f'"{SIDES[0]}_tokens"' in begin:
        raise TraceError(f"{source}: holds the lengths of ServeGen's clients; give the file of their rates, which names both")
    if f'"{SIDES[0]}_length"' in begin or '"hash_ids"' in begin:
        return "mooncake"
    if '"metadata"' in begin and '"metrics"' in begin:
        return "aiperf"
    if '"backend"' in begin or '"start_times"' in begin or '"num_prompts"' in begin:
        return "vllm"
    raise TraceError(f"{source}: is JSON of no form that is known; name it with --trace-format {' or '.join(FORMATS)}")
