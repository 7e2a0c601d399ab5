"""Traffic by name or file, and what can be made of it: a part, a thinner one, one again, several on top of each other."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from math import inf
from pathlib import Path

import numpy as np

from tandem.sim.trace_forms import FORMATS, READERS, SERVEGEN, Source, sniff
from tandem.sim.trace_servegen import MAX_REQUESTS, read_servegen
from tandem.spec.errors import SpecError, TraceError
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Trace

BUNDLED: dict[str, tuple[str, tuple[str, ...]]] = {
    "azure-code-2023": ("csv", ("azure_code_2023.csv.gz",)),
    "azure-conversation-2023": ("csv", ("azure_conversation_2023.csv.gz",)),
    "mooncake-conversation": ("mooncake", ("mooncake_conversation.jsonl.gz",)),
    "servegen-deepseek-r1": (SERVEGEN, ("servegen_deepseek_r1_rates.csv.gz", "servegen_deepseek_r1_lengths.jsonl.gz")),
}
"""Form and files of what ships with Tandem, in tandem/spec/data/traces, whose LICENSES.txt says where it is from."""


def load_trace(
    name_or_path: str | Path,
    *,
    format: str | None = None,
    seed: int = 0,
    scale: float = 1.0,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> Trace:
    """Traffic that ships with Tandem, by its name in BUNDLED, or a file, packed with gzip or not.

    `format`: csv, azure, mooncake, vllm, aiperf or servegen (the file of rates; that of lengths lies beside it); None goes by
    how the file begins. Of a recording, `start_s` and `duration_s` cut a part out, from its first request on, and `scale`
    multiplies its rate by compressing time. Of ServeGen's clients a day is drawn: `seed` says which, the cut is of the day from
    midnight, and `scale` multiplies the rate of each client. Times of the answer count from its first request.
    Raises TraceError that names file, line, field and value, and SpecError for a cut without requests.
    """
    require_int("seed", seed, low=0, high=2**63 - 1)
    require_number("scale", scale, high=1e6)
    if not 0 <= start_s < inf:
        raise SpecError(f"start_s={start_s!r}: must be 0 or more seconds")
    if duration_s is not None:
        require_number("duration_s", duration_s)
    form, sources, name = _source(str(name_or_path), format)
    if form == SERVEGEN:
        rates, lengths = sources
        return read_servegen(rates, lengths, name).draw(seed=seed, scale=scale, start_s=start_s, duration_s=duration_s)
    trace = READERS[form](sources[0], name, seed)
    if start_s or duration_s is not None:
        trace = window(trace, start_s, duration_s)
    return trace if scale == 1.0 else _noted(replace(trace, arrival_s=trace.arrival_s / scale), f"rate times {scale:g}")


def is_drawn(name_or_path: str | Path, format: str | None = None) -> bool:
    """Whether another seed gives other requests, as of ServeGen's clients; or the same, as of a recording."""
    return _source(str(name_or_path), format)[0] == SERVEGEN


def _source(text: str, format: str | None) -> tuple[str, tuple[Source, ...], str]:
    if format is not None and format not in FORMATS:
        raise SpecError(f"format={format!r}: must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if text in BUNDLED:
        form, files = BUNDLED[text]
        if format not in (None, form):
            raise SpecError(f"format={format!r}: {text} is {form}; leave it out")
        folder = resources.files("tandem.spec") / "data" / "traces"
        return form, tuple(folder / file for file in files), text
    path = Path(text)
    if not path.is_file():
        raise TraceError(f"trace={text!r}: no such file; bundled traces are {', '.join(BUNDLED)}")
    form = sniff(path) if format is None else format
    return form, (path, _beside(path)) if form == SERVEGEN else (path,), path.name


def _beside(rates: Path) -> Traversable:
    stem = rates.name.removesuffix(".gz")
    if not stem.endswith("rates.csv"):
        raise TraceError(f"{rates}: must be called ...rates.csv, so that its ...lengths.jsonl can be found")
    lengths = rates.with_name(stem.removesuffix("rates.csv") + "lengths.jsonl")
    packed = lengths.with_name(lengths.name + ".gz")
    if not lengths.is_file() and not packed.is_file():
        raise TraceError(f"{lengths}: no such file, nor {packed.name}; lengths lie beside the rates")
    return lengths if lengths.is_file() else packed


def window(trace: Trace, start_s: float, duration_s: float | None = None) -> Trace:
    """The requests from `start_s` after the first one on, those of `duration_s` seconds. SpecError if there are none."""
    end_s = inf if duration_s is None else start_s + duration_s
    since_s = trace.arrival_s - trace.arrival_s[0]
    inside = (since_s >= start_s) & (since_s < end_s)
    if not inside.any():
        raise SpecError(f"start_s={start_s:g}: no request of {trace.name} arrives between {start_s:g} and {end_s:g} s")
    note = f"from {start_s:g} s on" if duration_s is None else f"from {start_s:g} to {end_s:g} s"
    return _noted(_from_zero(trace.rows(inside)), note)


def thin(trace: Trace, factor: float, seed: int = 0) -> Trace:
    """Each request with probability `factor`, independent of the others. SpecError for one outside (0, 1], or if none stays."""
    require_number("factor", factor, high=1.0)
    stay = np.random.default_rng(seed).random(len(trace)) < factor
    if not stay.any():
        raise SpecError(f"factor={factor:g}: leaves none of {len(trace):,} requests; take a larger one")
    return _noted(_from_zero(trace.rows(stay)), f"thinned to {factor:g}, seed {seed}")


def repeat(trace: Trace, times: int) -> Trace:
    """The trace so many times, one after another, a mean gap between them. The same clients come again, with their prefixes."""
    _copies(trace, times)
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    each_s = span_s + span_s / max(len(trace) - 1, 1)
    again = trace.rows(np.tile(np.arange(len(trace)), times))
    begin_s = np.repeat(np.arange(times) * each_s, len(trace))
    return _noted(replace(again, arrival_s=again.arrival_s + begin_s), f"{times} times, one after another")


def superpose(trace: Trace, copies: int, seed: int = 0, jitter_s: float = 60.0) -> Trace:
    """The traffic of `copies` populations like this one at once: the first as it is; of the others each request is moved by up
    to `jitter_s` either way, and clients and prefixes are their own. Times stay within those of the trace (reflected at both
    ends), so the rate is `copies` times as high throughout, but the copies do not burst in step."""
    _copies(trace, copies)
    if jitter_s != 0:
        require_number("jitter_s", jitter_s)
    n, span_s = len(trace), float(trace.arrival_s[-1] - trace.arrival_s[0])
    since_s = np.tile(trace.arrival_s - trace.arrival_s[0], copies)
    moved_s = np.abs(since_s[n:] + np.random.default_rng(seed).uniform(-1, 1, n * (copies - 1)) * min(jitter_s, span_s))
    since_s[n:] = span_s - np.abs(span_s - moved_s)
    every = trace.rows(np.tile(np.arange(n), copies))
    copy = np.repeat(np.arange(copies), n)
    client = prefix_hash = None
    if every.client is not None:
        client = (every.client + copy * (int(every.client.max()) + 1)).astype(np.int32)
    if every.prefix_hash is not None:
        _, plain = np.unique(every.prefix_hash, return_inverse=True)
        prefix_hash = plain + np.repeat(np.arange(copies), len(plain) // copies) * (int(plain.max(initial=0)) + 1)
    every = replace(every, arrival_s=since_s, client=client, prefix_hash=prefix_hash)
    note = f"{copies} copies at once, moved by up to {jitter_s:g} s, seed {seed}"
    return _noted(_from_zero(every.rows(np.argsort(since_s, kind="stable"))), note)


def _copies(trace: Trace, copies: int) -> None:
    require_int("copies", copies, high=10**6)
    if copies * len(trace) > MAX_REQUESTS:
        raise SpecError(f"copies={copies}: of {len(trace):,} requests are more than {MAX_REQUESTS:,}")


def _from_zero(trace: Trace) -> Trace:
    return replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])


def _noted(trace: Trace, what: str) -> Trace:
    return replace(trace, note="; ".join(filter(None, (trace.note, what))))
