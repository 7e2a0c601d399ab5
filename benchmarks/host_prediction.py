"""What was predicted for a model served here, beside what its clients felt: TTFT and TPOT over lengths and requests in flight.

    tandem calibrate host
    python benchmarks/host_prediction.py [MODEL] [--requests 4] [--json]

Serves MODEL (nano-hybrid) with one worker of all cores, sends closed loops over HTTP (`tandem bench`), and prices each with
`estimate` on the calibrated host. `--requests` are those for each in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from itertools import product
from statistics import median
from typing import Any

from tandem.bench.client import Target
from tandem.bench.load import Load, fixed_trace
from tandem.bench.run import run
from tandem.cli.served import served
from tandem.perf.estimate import estimate
from tandem.spec.catalog import find_weights, load_spec

ISL, OSL, CONCURRENCY = (64, 256, 640), (32, 128), (1, 4, 16)
PRECISION = "fp32/bf16/fp32"
ASKED = {"tpot_s": 0.10, "ttft_s": 0.20}


def points(model: str, requests: int) -> list[dict[str, Any]]:
    """One row a setting: measured means, predictions, and their errors."""
    spec, rows = load_spec(find_weights(model)), []
    with served(model, ["--dtype", "float32"]) as ready:
        target = Target(url=ready["url"], model=ready["model"])
        for seed, (isl, osl, concurrency) in enumerate(product(ISL, OSL, CONCURRENCY)):
            load = Load(trace=fixed_trace(isl, osl, requests * concurrency), concurrency=concurrency, seed=seed)
            stats = asyncio.run(run(target, load, warmup=1)).stats()
            found = estimate(
                model=spec, hardware="host", isl=isl, osl=osl, concurrency=concurrency, precision=PRECISION, backend="tandem"
            )
            row: dict[str, Any] = {"isl": isl, "osl": osl, "concurrency": concurrency, "evidence": found.evidence}
            for name, spread in (("ttft_s", stats.ttft_s), ("tpot_s", stats.tpot_s)):
                if spread is None:
                    raise SystemExit(f"{isl} + {osl} tokens, {concurrency} in flight: no request completed")
                predicted = getattr(found, name)
                row[name] = {"measured": spread.mean, "predicted": predicted.value, "error": predicted.value / spread.mean - 1}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano-hybrid")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = points(options.model, options.requests)
    errors = {name: median(abs(row[name]["error"]) for row in rows) for name in ASKED}
    if options.json:
        return print(json.dumps({"points": rows, "median_error": errors}))
    for row in rows:
        cells = [
            f"{name[:4].upper()} {row[name]['measured'] * 1e3:8.2f} ms, predicted {row[name]['predicted'] * 1e3:8.2f} "
            f"({row[name]['error']:+.0%})"
            for name in ("ttft_s", "tpot_s")
        ]
        print(f"{row['isl']:5} + {row['osl']:4} tokens, {row['concurrency']:3} in flight: {'; '.join(cells)}")
    for name, error in errors.items():
        print(f"{name}: median error {error:.0%} (asked: at most {ASKED[name]:.0%})")


if __name__ == "__main__":
    main()
