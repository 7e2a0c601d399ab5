"""Sets what AIPerf measured beside what Tandem predicted, and writes comparison.json beside AIPerf's own files.

Usage: compare.py ARTIFACT_FOLDER [REQUESTS_IN_FLIGHT]
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPORT = "profile_export_aiperf.json"
ROWS = (
    # name, AIPerf's metric, its statistic, key of the prediction, factor to the shown unit
    ("TTFT, mean (ms)", "time_to_first_token", "avg", "ttft_s", 1e3),
    ("TPOT, mean (ms)", "inter_token_latency", "avg", "tpot_s", 1e3),
    ("tok/s/GPU", "output_token_throughput", "avg", "tokens_per_s_per_gpu", 1.0),
)


def find_export(folder: Path) -> Path:
    """AIPerf's JSON export, wherever under its artifact folder it lies; the newest of several."""
    found = sorted(folder.rglob(EXPORT), key=lambda p: p.stat().st_mtime)
    if not found:
        sys.exit(f"{folder}: holds no {EXPORT}; run the benchmark first")
    return found[-1]


def compare(measured: dict[str, Any], predicted: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each predicted number; measured values in the units shown."""
    rows = []
    for name, metric, statistic, key, factor in ROWS:
        value = measured.get(metric, {}).get(statistic)
        if value is None:
            sys.exit(f"{EXPORT}: has no {metric}.{statistic}; was the benchmark run with --streaming?")
        if metric == "output_token_throughput":
            value /= predicted["gpus"]
        p = {k: predicted[key][k] * factor for k in ("value", "low", "high")}
        row = {"name": name, "measured": value, "predicted": p["value"], "low": p["low"], "high": p["high"]}
        rows.append({**row, "error": p["value"] / value - 1, "inside": p["low"] <= value <= p["high"]})
    return rows


def main() -> None:
    """Print the table and write it beside AIPerf's own files."""
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: compare.py ARTIFACT_FOLDER [REQUESTS_IN_FLIGHT]")
    export = find_export(Path(sys.argv[1]))
    predicted = json.loads((HERE / "predicted.json").read_text())
    rows = compare(json.loads(export.read_text()), predicted)
    in_flight = int(sys.argv[2]) if len(sys.argv) == 3 else predicted["concurrency"]
    print(f"{predicted['model']}, {predicted['gpus']} x {predicted['hardware']}, {in_flight} in flight")
    if in_flight != predicted["concurrency"]:
        print(f"not comparable: the prediction is for {predicted['concurrency']} in flight")
    print(f"{'':<18}{'measured':>12}{'predicted':>12}{'error':>9}   80 % interval")
    for r in rows:
        numbers = f"{r['measured']:>12,.1f}{r['predicted']:>12,.1f}{r['error']:>9.1%}"
        interval = f"{r['low']:,.1f} to {r['high']:,.1f}: {'inside' if r['inside'] else 'outside'}"
        print(f"{r['name']:<18}{numbers}   {interval}")
    export.with_name("comparison.json").write_text(
        json.dumps({"in_flight": in_flight, "predicted": predicted, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
