"""200 emulated workers behind the live server, under open-loop traffic: how long the router takes, whether anything is lost.

    python benchmarks/emulated.py [--rate 500] [--seconds 60] [--json]

Requests arrive by exponential gaps, whatever has been answered, over connections that are kept; answers come whole, not as
streams. Workers are H100s with Qwen3-8B (or as given) that take the predicted time. One process serves, workers included, and
another asks.
Target: 99 % of decisions within 5 ms at 500 requests/s offered for a minute, and all answers whole.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TARGET_S = 0.005


def plan(rate: float, seconds: float, isl: tuple[int, int], osl: tuple[int, int], seed: int) -> list[str]:
    """Lines for the client."""
    draw, at, lines = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        tokens = draw.randint(*osl)
        text = f"{draw.getrandbits(64):016x}" + "x" * (draw.randint(*isl) - 16)  # of its own, so that no prefix is known
        lines.append(json.dumps([at, tokens, {"model": "emulated", "prompt": text, "max_tokens": tokens}]))
    return lines


def spread(values: list[float]) -> dict[str, float]:
    """Count and quantiles."""
    if not values:
        return {"count": 0}
    p50, p99, p999 = (float(v) for v in np.percentile(values, (50, 99, 99.9)))
    return {"count": len(values), "p50_s": p50, "p99_s": p99, "p99.9_s": p999, "max_s": max(values)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run: server, traffic, end."""
    lines = plan(options.rate, options.seconds, tuple(options.isl), tuple(options.osl), options.seed)
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        words = [sys.executable, str(HERE / "emulated_times.py"), str(notes), "serve", options.model, "--name", "emulated"]
        words += ["--emulate", options.hardware, "--prefill", str(options.prefill), "--decode", str(options.decode)]
        words += ["--port", "0", "--max-waiting", "16384", "--emulate-stride", str(options.stride)]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            client = [sys.executable, str(HERE / "emulated_client.py"), f"{ready['url']}/v1/completions"]
            time.sleep(2.0)  # the processor time of the start is not that of serving
            asked = subprocess.run(client, input="\n".join(lines), capture_output=True, text=True, check=True)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30.0)
        told = json.loads(notes.read_text())
    found = json.loads(asked.stdout)
    cpu = np.diff(np.array(told["cpu"]).reshape(-1, 2), axis=0)
    busy = cpu[:, 1] / cpu[:, 0]
    decisions = told["prompt"] + told["state"]
    return {
        "workers": {"prefill": options.prefill, "decode": options.decode, "model": options.model, "on": options.hardware},
        "stride_s": options.stride,
        "offered_rps": len(lines) / options.seconds,
        "sent": found["sent"],
        "answered": found["answered"],
        "errors": found["errors"],
        "most_open": found["most_open"],
        "sending_s": found["sending_s"],
        "request": spread(found["took_s"]),
        "sent_late": spread(found["late_s"]),
        "decision": spread(decisions),
        "own": spread(told["own"]),
        "prompt": spread(told["prompt"]),
        "state": spread(told["state"]),
        "round": spread(told["round"]),
        "loop_late": spread(told["lag"]),
        "server_cpu": float(np.quantile(busy, 0.75)),
        "met": found["answered"] == found["sent"] and spread(decisions).get("p99_s", 1.0) <= TARGET_S,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--hardware", default="h100")
    parser.add_argument("--prefill", type=int, default=40)
    parser.add_argument("--decode", type=int, default=160)
    parser.add_argument("--rate", type=float, default=500.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--isl", type=int, nargs=2, default=(200, 800), metavar=("LEAST", "MOST"))
    parser.add_argument("--osl", type=int, nargs=2, default=(16, 64), metavar=("LEAST", "MOST"))
    parser.add_argument("--stride", type=float, default=0.1, help="seconds of decode steps that are told of together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{found['answered']} of {found['sent']} answered in full at {found['offered_rps']:.0f} requests/s; {found['errors']}"
    )
    for name in ("decision", "own", "prompt", "state", "round", "loop_late", "request", "sent_late"):
        s = found[name]
        if s["count"]:
            print(f"{name:>10} {s['count']:>8}  p50 {s['p50_s'] * 1e3:9.3f} ms  p99 {s['p99_s'] * 1e3:9.3f} ms  "
                  f"max {s['max_s'] * 1e3:9.1f} ms")  # fmt: skip
    print(f"server: about {found['server_cpu']:.2f} processor seconds a second; target {'met' if found['met'] else 'missed'}")


if __name__ == "__main__":
    main()
