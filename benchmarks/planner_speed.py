"""How fast Tandem prices and plans, beside aiconfigurator 0.12.0 asked the same in the same run.

Prints a table and, with --json FILE, writes it. Times are medians of five; what matters are the ratios. The peer is
installed from the package registry into benchmarks/.peer-venv; without it, its columns stay empty and say why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import tandem
from tandem.perf.phases import PerfModel
from tandem.plan.search import Searched, price_blocks
from tandem.plan.space import Points, grid, parallelisms
from tandem.spec.design import Precision

HERE = Path(__file__).resolve().parent
PEER = "aiconfigurator==0.12.0"
PEER_VENV = HERE / ".peer-venv"
PEER_S = 8
REPEATS = 5
POINTS = 400_000
CASES = [  # model, GPU, the peer's names of both, and a layout of the peer
    ("deepseek-r1", "h200-sxm", "deepseek-ai/DeepSeek-R1", "h200_sxm", 8, 8),
    ("llama-3.1-70b", "h100-sxm", "meta-llama/Meta-Llama-3.1-70B", "h100_sxm", 4, 1),
    ("nano-9b-v2", "h100-sxm", None, None, 0, 0),
]
QUESTION = "plan -m deepseek-r1 --hardware h200-sxm --gpus 64 --isl 4096 --osl 1024 --ttft 2 --tpot 0.03"
PEER_QUESTION = (
    "cli default --model-path deepseek-ai/DeepSeek-R1 --system h200_sxm --total-gpus 64 "
    "--isl 4096 --osl 1024 --ttft 2000 --tpot 30"
)


def points_per_s(model: str, hardware: str) -> tuple[int, float]:
    """Distinct co-located points with memory, TTFT, TPOT and rate, and how many a second (median)."""
    spec = tandem.load_spec(model)
    perf = PerfModel(spec, tandem.load_hardware(hardware), Precision.parse(None, native=spec.native_precision))
    searched = Searched(perf, tandem.Workload.fixed(4096, 1024), 64, 50.0)
    layouts = parallelisms(spec, 64, phase="decode")
    points = grid(layouts, np.arange(1.0, POINTS // len(layouts) + 2), np.array([np.inf]))

    def price(p: Points) -> tuple[np.ndarray, ...]:
        return searched.memory_use("colocated", p).max_batch(p.layout), *searched._colocated(p)

    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        columns = price_blocks(price, points)
        seconds.append(time.perf_counter() - start)
        assert all(len(column) == len(points) for column in columns)
    return len(points), len(points) / statistics.median(seconds)


def run(words: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a process."""
    start = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


def median_run(words: list[str]) -> tuple[float, int]:
    """Medians of the wall seconds and peak bytes of a process."""
    runs = [run(words) for _ in range(REPEATS)]
    return statistics.median(r[0] for r in runs), round(statistics.median(r[1] for r in runs))


def peer_python() -> Path | None:
    """The peer's interpreter, installed on the first call; None where the registry cannot be reached."""
    python = PEER_VENV / "bin" / "python"
    if not (PEER_VENV / "bin" / "aiconfigurator").is_file():
        subprocess.run([sys.executable, "-m", "venv", PEER_VENV], check=True)
        done = subprocess.run([python, "-m", "pip", "-q", "install", PEER], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"{PEER} could not be installed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
    return python


def peer_points_per_s(python: Path, path: str, system: str, tp: int, ep: int) -> float:
    """Unique points a second of the peer, one process on each core, each with points of its own."""
    cores = os.cpu_count() or 1

    def shard(seed: int) -> float:
        words = [python, HERE / "peer_points.py", path, system, tp, ep, seed, PEER_S]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{PEER}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        return float(found["points"] / found["seconds"])

    with ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(shard, range(cores)))


def measure() -> dict[str, Any]:
    """Everything, as one object."""
    python = peer_python()
    pricing = []
    for model, hardware, path, system, tp, ep in CASES:
        count, rate = points_per_s(model, hardware)
        peer = peer_points_per_s(python, path, system, tp, ep) if python and path and system else None
        pricing.append({"model": model, "hardware": hardware, "points": count, "points_per_s": rate, "peer_points_per_s": peer})
    ours = str(Path(sys.executable).parent / "tandem")
    plan_s, plan_bytes = median_run([ours, *QUESTION.split()])
    peer_plan = run([str(PEER_VENV / "bin" / "aiconfigurator"), *PEER_QUESTION.split()]) if python else (None, None)
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "pricing": pricing,
        "plan": {"command": " ".join(QUESTION), "wall_s": plan_s, "peak_bytes": plan_bytes},
        "peer_plan": {"command": " ".join(PEER_QUESTION), "wall_s": peer_plan[0], "peak_bytes": peer_plan[1]},
        "help_s": median_run([ours, "plan", "--help"])[0],
        "bare_python_s": median_run([sys.executable, "-c", "pass"])[0],
    }


def cpu_name() -> str:
    """The processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def show(found: dict[str, Any]) -> None:
    """The table."""
    machine = found["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {found['date']}; peer: {PEER}\n")
    print(f"{'priced worker points':<32}{'points':>10}{'points/s':>14}{'peer points/s':>16}{'ratio':>8}")
    for row in found["pricing"]:
        peer, name = row["peer_points_per_s"], f"{row['model']} on {row['hardware']}"
        beside = f"{peer:>16,.0f}{row['points_per_s'] / peer:>8,.0f}" if peer else f"{'no data for it':>16}"
        print(f"{name:<32}{row['points']:>10,}{row['points_per_s']:>14,.0f}{beside}")
    plan, peer = found["plan"], found["peer_plan"]
    print(f"\n{'plan of DeepSeek-R1 on 64 H200':<32}{plan['wall_s']:>8.2f} s{plan['peak_bytes'] / 2**20:>8.0f} MiB")
    if peer["wall_s"]:
        print(f"{'the peer, same question':<32}{peer['wall_s']:>8.2f} s{peer['peak_bytes'] / 2**20:>8.0f} MiB", end="")
        print(f"   ratio {peer['wall_s'] / plan['wall_s']:.0f}")
    print(f"{'tandem plan --help':<32}{found['help_s']:>8.2f} s   (bare python {found['bare_python_s']:.2f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    arguments = parser.parse_args()
    found = measure()
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
