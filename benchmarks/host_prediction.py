"""What was predicted for a model served here, beside what its clients felt: TTFT and TPOT over lengths and requests in flight.

    tandem calibrate host
    python benchmarks/host_prediction.py [MODEL] [--requests 8] [--json]

Serves MODEL (nano-hybrid) with one worker of all cores, then with one that prefills and one that decodes, half of the cores
each; sends closed loops over HTTP and prices each with `estimate` and `estimate_disaggregated` on the calibrated host. Lengths
and numbers in flight are others than those that were fitted. `--requests` are those for each in flight.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from statistics import median
from typing import Any

from tandem.cli.calibrating_host import serve_grid
from tandem.perf.closed_loop import PER_PLACE
from tandem.perf.estimate import EstimateResult, Instances, estimate, estimate_disaggregated
from tandem.spec.catalog import find_weights, load_spec
from tandem.spec.design import Parallelism
from tandem.spec.local import host_name, usable_cores
from tandem.spec.model import ModelSpec

LENGTHS = {False: (64, 256, 640), True: (192, 384, 640)}
"""Prompt tokens of one worker and of two: shorter ones decode workers may read themselves (tandem.sched.route)."""
OSL, CONCURRENCY = (32, 128), (1, 4, 16)
ASKED = {"tpot_s": 0.10, "ttft_s": 0.20}


def predicted(spec: ModelSpec, split: bool, isl: int, osl: int, concurrency: int) -> EstimateResult:
    """By the public functions, as a user would ask."""
    common = {
        "model": spec,
        "isl": isl,
        "osl": osl,
        "concurrency": concurrency,
        "precision": "fp32/bf16/fp32",
        "backend": "tandem",
    }
    if not split:
        return estimate(hardware="host", **common)
    cores = usable_cores()
    one = Instances(parallelism=Parallelism(), batch=1)
    decode = Instances(parallelism=Parallelism(), batch=concurrency)
    return estimate_disaggregated(hardware=host_name(max(1, cores // 2), cores), prefill=one, decode=decode, **common)


def points(model: str, requests: int, split: bool) -> list[dict[str, Any]]:
    """One row a setting: measured means, predictions, and their errors."""
    spec, cores = load_spec(find_weights(model)), usable_cores()
    threads = max(1, cores // 2) if split else cores
    rows = []
    grid = tuple((*point, requests) for point in product(LENGTHS[split], OSL, CONCURRENCY))
    for measured in serve_grid(model, "float32", threads, split=split, grid=grid, seed=1000):
        found = predicted(spec, split, measured.isl, measured.osl, measured.concurrency)
        row: dict[str, Any] = asdict(measured) | {"pools": "1:1" if split else "one worker", "evidence": found.evidence}
        for name in ASKED:
            value = getattr(found, name).value
            row[name] = {"measured": row[name], "predicted": value, "error": value / row[name] - 1}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano-hybrid")
    parser.add_argument("--requests", type=int, default=PER_PLACE)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for split in (False, True) for row in points(options.model, options.requests, split)]
    errors = {
        pools: {name: median(abs(row[name]["error"]) for row in rows if row["pools"] == pools) for name in ASKED}
        for pools in dict.fromkeys(row["pools"] for row in rows)
    }
    if options.json:
        return print(json.dumps({"points": rows, "median_error": errors}))
    for row in rows:
        cells = [
            f"{name[:4].upper()} {row[name]['measured'] * 1e3:8.2f} ms, predicted {row[name]['predicted'] * 1e3:8.2f} "
            f"({row[name]['error']:+.0%})"
            for name in ("ttft_s", "tpot_s")
        ]
        where = f"{row['isl']:5} + {row['osl']:4} tokens, {row['concurrency']:3} in flight, {row['pools']:10}"
        print(f"{where}: {'; '.join(cells)}")
    for pools, found in errors.items():
        for name, error in found.items():
            print(f"{pools}, {name}: median error {error:.0%} (asked: at most {ASKED[name]:.0%})")


if __name__ == "__main__":
    main()
