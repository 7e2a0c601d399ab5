"""Predictions beside measurements for the explorer: rows that were never fitted, and what was served on this machine."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from typing import Any

from tandem.perf import silicon
from tandem.perf.host import HostFit, load_host
from tandem.perf.host_served import predict_served
from tandem.perf.phases import PerfModel
from tandem.perf.validate import METRICS, predict
from tandem.spec.catalog import load_spec
from tandem.spec.errors import TandemError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.local import host_file

NOTHING = "nothing measured is at hand: the extra [calibrate] has rows of GPUs, `tandem calibrate host` measures this machine"


def measured_rows() -> dict[str, Any]:
    """`rows`: metric, group, what was measured, and both times in seconds; or `error`, one line that says what would do."""
    rows = [*_gpu_rows(), *_host_rows()]
    if not rows:
        return {"error": NOTHING}
    return {"source": "Settings that were fitted are left out, but for this machine's own", "rows": rows}


@lru_cache(maxsize=1)
def _gpu_rows() -> tuple[dict[str, Any], ...]:
    """The validation side of the rows that the extra brings; none where it is not installed."""
    try:
        found = [row for row in silicon.read_rows(silicon.sample_path()) if row.side == "validation"]
    except TandemError:
        return ()
    predicted = predict(found)
    return tuple(
        {
            "metric": metric,
            "group": row.backend,
            "what": f"{row.model.name} on {row.hardware.name}, {row.isl:,} + {row.osl:,} tokens, {row.concurrency:,} in flight",
            "measured": getattr(row, metric),
            "predicted": float(getattr(predicted, metric)[number]),
        }
        for number, row in enumerate(predicted.rows)
        for metric in METRICS
    )


def _host_rows() -> list[dict[str, Any]]:
    """Loops of servers on this machine, as `tandem calibrate host` measured them; models that are gone are left out."""
    try:
        names = list(json.loads(host_file().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []
    rows: list[dict[str, Any]] = []
    for name in names:
        with suppress(TandemError):  # another version may have written it
            calibration = load_host(name)
            for one in () if calibration is None else calibration.fits:
                rows += _loops(name, calibration.hardware, one) if calibration else []
    return rows


def _loops(name: str, hardware: HardwareSpec, one: HostFit) -> list[dict[str, Any]]:
    try:
        model = load_spec(one.model)
    except TandemError:
        return []
    rows = []
    for group, fit, loops in (("this machine", one.fit, one.loops), ("this machine, two pools", one.split, one.split_loops)):
        if fit is None or not loops:
            continue
        perf = PerfModel(model, hardware, one.precision, "tandem", fit, fit is one.split)
        times = dict(zip(("ttft_s", "tpot_s"), predict_served(perf, loops), strict=True))
        rows += [
            {
                "metric": metric,
                "group": group,
                "what": f"{one.model} on {name}, {row.isl} + {row.osl} tokens, {row.concurrency} in flight",
                "measured": getattr(row, metric),
                "predicted": float(times[metric][number]),
            }
            for number, row in enumerate(loops)
            for metric in METRICS
        ]
    return rows
