"""What clients feel, from the times of a request: each measure is defined here, once, for simulator, server and reports.

Seconds throughout; None where it has not happened. Output tokens are counted as the client got them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tandem.sched.request import Request
from tandem.spec.errors import SpecError
from tandem.spec.units import require_number
from tandem.spec.workload import Slo

CHAIN = ("arrival", "prefill_start", "prefill_end", "transfer_start", "transfer_end", "decode_start", "done")
"""Of these times of a request none is before one that stands left of it. Each is that of the first time: what a preempted
request does again has no times of its own."""


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


def ttft_s(request: Request) -> float | None:
    """Time to the first token, from arrival."""
    return _between(request.arrival_s, request.first_token_s)


def tpot_s(request: Request) -> float | None:
    """Mean gap between output tokens after the first, of a finished request. None for fewer than two tokens."""
    seconds = _between(request.first_token_s, request.done_s)
    return None if seconds is None or request.osl < 2 else seconds / (request.osl - 1)


def e2e_s(request: Request) -> float | None:
    """Arrival to the last token."""
    return _between(request.arrival_s, request.done_s)


def queue_s(request: Request) -> float | None:
    """Arrival to the beginning of the prefill."""
    return _between(request.arrival_s, request.prefill_start_s)


def prefill_s(request: Request) -> float | None:
    """The prefill, with all that ran between its chunks."""
    return _between(request.prefill_start_s, request.prefill_end_s)


def transfer_s(request: Request) -> float | None:
    """From the beginning of the state's transfer until the decode worker has it. None where it stayed."""
    return _between(request.transfer_start_s, request.transfer_end_s)


def completed(request: Request) -> bool:
    """Whether the client got its whole answer: not cancelled, no error."""
    return request.finish_reason in ("stop", "length")


def meets(request: Request, slo: Slo) -> bool:
    """Whether a request completed within both bounds. An answer of one token has no TPOT, and so none that is too long."""
    if not completed(request):
        return False
    first, each = ttft_s(request), tpot_s(request)
    in_time = slo.ttft_s is None or (first is not None and first <= slo.ttft_s)
    return in_time and (slo.tpot_s is None or each is None or each <= slo.tpot_s)


def check_causality(request: Request) -> None:
    """Raise SpecError, which names the request, where its times cannot be: one before its cause, or an end with no start."""

    def wrong(field: str, value: object, why: str) -> SpecError:
        return SpecError(f"{field}={value!r}: {why} (request {request.id!r})")

    last, last_name = request.arrival_s, "arrival_s"
    for name in (f"{part}_s" for part in CHAIN[1:]):
        at: float | None = getattr(request, name)
        if at is None:
            continue
        if at < last:
            raise wrong(name, at, f"must not be before {last_name}={last!r}")
        last, last_name = at, name
    for part in ("prefill", "transfer"):
        start, end = getattr(request, f"{part}_start_s"), getattr(request, f"{part}_end_s")
        if end is not None and start is None:
            raise wrong(f"{part}_end_s", end, f"needs a {part}_start_s")
    first = request.first_token_s
    if first is not None:
        for name in ("arrival_s", "prefill_start_s", "prefill_end_s"):
            begin = getattr(request, name)
            if begin is not None and first < begin:
                raise wrong("first_token_s", first, f"must not be before {name}={begin!r}")
        if request.done_s is not None and request.done_s < first:
            raise wrong("done_s", request.done_s, f"must not be before first_token_s={first!r}")
        if request.osl < 1:
            raise wrong("osl", request.osl, "must be at least 1 once there is a first token")
    if (request.done_s is None) != (request.finish_reason is None):
        raise wrong("done_s", request.done_s, f"must be there exactly if finish_reason={request.finish_reason!r} is")
    if completed(request) and first is None:
        raise wrong("first_token_s", first, "must be there for a completed request")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a measure spreads over requests: its mean and percentiles, interpolated linearly between neighbours."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of those values that are there; None when none is."""
        there = np.array([value for value in values if value is not None])
        if not there.size:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(there, (50, 90, 99)))
        return cls(mean=float(there.mean()), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStats:
    """A run in numbers. Counts cover all requests; spreads, rates and goodput those that completed."""

    arrived: int
    completed: int
    cancelled: int
    failed: int
    unfinished: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: Spread | None
    tpot_s: Spread | None
    e2e_s: Spread | None
    queue_s: Spread | None
    prefill_s: Spread | None
    transfer_s: Spread | None
    requests_per_s: float
    tokens_per_s: float
    """Output tokens of completed requests."""
    goodput: float | None
    """Requests per second that met every bound of the objective, each by itself; None without an objective."""
    attainment: float | None
    """Share, from 0 to 1, of the requests that completed or failed which met every bound: whoever gave up is not counted."""
    slo_met: bool | None
    """Whether that share reaches the objective's percentile."""

    def to_json(self) -> dict[str, Any]:
        """As `tandem simulate --json` prints it: the counts under `requests`, all else under its name."""
        rows = asdict(self)
        counts = {name: rows.pop(name) for name in ("arrived", "completed", "cancelled", "failed", "unfinished")}
        return {"requests": counts, **rows}


def summarise(requests: Sequence[Request], duration_s: float, slo: Slo | None = None) -> RunStats:
    """Sum up a run of `duration_s` seconds. SpecError where the duration is not above 0."""
    require_number("duration_s", duration_s)
    whole = [request for request in requests if completed(request)]
    failed = sum(request.finish_reason == "error" for request in requests)
    good = None if slo is None else sum(meets(request, slo) for request in whole)
    judged = len(whole) + failed
    attainment = None if good is None or not judged else good / judged
    output_tokens = sum(request.osl for request in whole)
    return RunStats(
        arrived=len(requests),
        completed=len(whole),
        cancelled=sum(request.finish_reason == "cancelled" for request in requests),
        failed=failed,
        unfinished=sum(request.finish_reason is None for request in requests),
        duration_s=float(duration_s),
        prompt_tokens=sum(request.isl for request in whole),
        output_tokens=output_tokens,
        ttft_s=Spread.of(map(ttft_s, whole)),
        tpot_s=Spread.of(map(tpot_s, whole)),
        e2e_s=Spread.of(map(e2e_s, whole)),
        queue_s=Spread.of(map(queue_s, whole)),
        prefill_s=Spread.of(map(prefill_s, whole)),
        transfer_s=Spread.of(map(transfer_s, whole)),
        requests_per_s=len(whole) / duration_s,
        tokens_per_s=output_tokens / duration_s,
        goodput=None if good is None else good / duration_s,
        attainment=attainment,
        slo_met=None if slo is None or attainment is None else attainment >= slo.percentile / 100 - 1e-12,
    )
