"""Simulated decode tokens a second on one core, beside the Rust replay of ai-dynamo-runtime on the same machine.

    python benchmarks/sim.py [--large] [--json FILE]

4 prefill and 4 decode workers, and 8 co-located ones: 10,000 requests of 4,000 and 1,000 tokens, Poisson. The peer
(ai-dynamo and ai-dynamo-runtime 1.6.1, both ways, its own step times) runs in an environment of its own, `.bench-venv-sim`,
made by `python -m venv .bench-venv-sim && .bench-venv-sim/bin/pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
&& .bench-venv-sim/bin/pip install typing_extensions`; without it only ours is measured. `--large` grows workers and requests
together, up to 1,000 and 1,000,000.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tandem.sched.batch import BatchLimits
from tandem.sched.route import RoutingLimits
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.simulate import run
from tandem.sim.times import StepTable
from tandem.spec.workload import Trace

ISL, OSL, REQUESTS = 4000, 1000, 10_000
MAX_BATCH, STEP_TOKENS, BLOCKS = 256, 8192, 60_000
RATE_RPS = 28.0
ROUNDS = 5
PEER = Path(__file__).parents[1] / ".bench-venv-sim" / "bin" / "python"
PEER_CODE = f"""
import sys, time
from dynamo.replay import run_synthetic_trace_replay as replay

def engine(role):
    limits = dict(num_gpu_blocks={BLOCKS}, block_size=16, max_num_seqs={MAX_BATCH}, max_num_batched_tokens={STEP_TOKENS})
    return dict(engine=dict(limits, enable_prefix_caching=False, enable_chunked_prefill=True, worker_type=role, backend="vllm"))

split = dict(num_prefill_workers=4, num_decode_workers=4)
split |= dict(prefill_engine_args=engine("prefill"), decode_engine_args=engine("decode"))
options = dict(split=split, shared=dict(num_workers=8))[sys.argv[1]]
best = 1e9
for _ in range(2):
    began = time.perf_counter()
    replay({ISL}, {OSL}, {REQUESTS}, request_rate={RATE_RPS}, **options)
    best = min(best, time.perf_counter() - began)
print(best)
"""


def kind() -> WorkerKind:
    """Step times of an 8B model on an H100, roughly: what they are does not change the work."""
    times = StepTable(
        base_s=[0.0, *(0.008 + 2e-5 * batch for batch in range(1, MAX_BATCH + 1))],
        per_token_s=[0.0, *[2e-9] * MAX_BATCH],
        chunk_tokens=[1, 512, 2048, 16384],
        chunk_s=[0.008, 0.02, 0.06, 0.45],
        mixed_s=[0.001, 0.015, 0.05, 0.44],
        per_pair_s=1e-10,
        state_bytes_per_token=1e5,
        link_bytes_per_s=5e10,
        last_layer=1 / 32,
    )
    limits = BatchLimits(max_batch=MAX_BATCH, step_tokens=STEP_TOKENS, pass_tokens=1)
    return WorkerKind(name="8b", times=times, limits=limits, blocks=BLOCKS)


def config(prefill: int, decode: int, colocated: int) -> SimConfig:
    """So many workers of one kind."""
    counts = {"prefill": prefill, "decode": decode, "colocated": colocated}
    groups = tuple(Group(kind=kind(), role=role, count=count) for role, count in counts.items() if count)  # type: ignore[arg-type]
    return SimConfig(groups=groups, routing=RoutingLimits(max_local_tokens=128))


def trace(requests: int, rate_rps: float) -> Trace:
    """Poisson arrivals of fixed lengths."""
    arrival_s = np.cumsum(np.random.default_rng(0).exponential(1 / rate_rps, requests))
    return Trace(name="fixed", arrival_s=arrival_s, isl=np.full(requests, ISL), osl=np.full(requests, OSL))


def measure(name: str, told: SimConfig, traffic: Trace, rounds: int) -> dict[str, Any]:
    """The best of some rounds."""
    seconds, events = float("inf"), 0
    for _ in range(rounds):
        began = time.perf_counter()
        result = run(told, traffic)
        seconds, events = min(seconds, time.perf_counter() - began), result.events
        assert result.requests.completed.all()
    row = {
        "case": name,
        "requests": len(traffic),
        "seconds": seconds,
        "tokens_per_s": result.simulated_tokens / seconds,
        "us_per_request": seconds / len(traffic) * 1e6,
        "events": events,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(
        f"{name:34} {row['tokens_per_s'] / 1e6:6.1f} M tokens/s {row['us_per_request']:6.1f} us a request "
        f"{seconds:7.2f} s {row['peak_mib']:6.0f} MiB"
    )
    return row


def peer(case: str) -> float | None:
    """Tokens a second of the Rust replay: `split` with 4 + 4 workers of the same limits, or `shared` with 8 as they come; None
    where it is not installed."""
    if not PEER.exists():
        return None
    found = subprocess.run([str(PEER), "-c", PEER_CODE, case], capture_output=True, text=True, timeout=300, check=True)
    return OSL * REQUESTS / float(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="up to 1,000 workers and 1,000,000 requests; minutes")
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    rows = [
        measure("4 prefill + 4 decode", config(4, 4, 0), trace(REQUESTS, RATE_RPS), ROUNDS),
        measure("8 co-located", config(0, 0, 8), trace(REQUESTS, RATE_RPS), ROUNDS),
    ]
    for row, case in zip(list(rows), ("split", "shared"), strict=True):
        rust = peer(case)
        if rust is None:
            print(f"the peer is not installed ({PEER}); see --help", file=sys.stderr)
            break
        ratio = row["tokens_per_s"] / rust
        print(f"{'Rust replay, ' + row['case']:34} {rust / 1e6:6.1f} M tokens/s; ours {ratio:.1f} times as fast")
        rows.append({"case": f"peer, {row['case']}", "tokens_per_s": rust, "ratio": ratio})
    if asked.large:
        for workers in (10, 100, 1000):
            half = workers // 2
            traffic = trace(workers * 1000, half * 7.0)
            rows.append(measure(f"{half} prefill + {half} decode", config(half, half, 0), traffic, 1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
