"""What serving costs beside computing: the engine and the server against the raw decoder, transformers' server and limits.

    python benchmarks/serve.py [--only overhead,transformers,handoff,prefix,idle] [--out FILE] [--quick]

SmolLM2-135M-Instruct in float16 on all cores; transformers' server has the same weights in fp32, the same threads and the
same allocator settings. Figures are ratios of one run, taken in turns. overhead: `tandem serve` under 32 concurrent streams
from a thin client and from AIPerf (installed into a venv of its own), in steps in which all 32 decode. Under 9 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALLOCATOR = {  # as in benchmarks/model.py: both sides reuse large temporaries instead of returning them to the system
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import torch  # noqa: E402
from serve_parts import PARTS, Figure, Setting, model_folders  # noqa: E402
from serve_servers import aiperf_program  # noqa: E402


def show(figure: Figure) -> None:
    """One line for people."""
    sign = ">=" if figure.at_least else "<="
    verdict = "" if figure.target is None else f"  target {sign} {figure.target:g}  {'pass' if figure.passes else 'SHORT'}"
    print(f"  {figure.name}: {figure.value:.3g} {figure.unit}{verdict}", flush=True)
    if figure.note:
        print(f"      {figure.note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="of what is measured in turns")
    parser.add_argument("--aiperf", type=Path, help="the program; default: installed into .bench-venv. `none` leaves it out")
    parser.add_argument("--out", type=Path, help="write all figures there, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny counts: whether it runs, not how fast")
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: must be of {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    torch.set_num_threads(options.threads)
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    load = os.getloadavg()[0]
    print(f"{machine}; {options.threads} threads; torch {torch.__version__}; load before {load:.1f}\n")
    result: dict[str, Any] = {"machine": machine, "threads": options.threads, "load_before": load, "parts": {}}
    program = aiperf_program(options.aiperf) if "overhead" in chosen else None
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        ours, peer = model_folders(Path(scratch))
        setting = Setting(
            scratch=Path(scratch), folder=ours, peer_folder=peer, threads=options.threads, aiperf=program,
            rounds=1 if options.quick else options.rounds, quick=options.quick,
        )  # fmt: skip
        for name in chosen:
            start_s = time.monotonic()
            print(name, flush=True)
            figures: list[Figure] = []
            part: dict[str, Any] = {"figures": figures, "details": {}}
            try:
                PARTS[name](setting, figures, part["details"])
            except Exception as wrong:  # the other parts are worth having all the same
                part["failed"], failed = str(wrong), True
                print(f"  FAILED: {wrong}")
            part["seconds"] = time.monotonic() - start_s
            for figure in figures:
                show(figure)
            print(f"  ({part['seconds']:.0f} s)\n", flush=True)
            result["parts"][name] = part | {"figures": [figure.to_json() for figure in figures]}
    took = statistics.fsum(part["seconds"] for part in result["parts"].values())
    short = [f["name"] for part in result["parts"].values() for f in part["figures"] if f["passes"] is False]
    print(f"{took:.0f} s; load after {os.getloadavg()[0]:.1f}; short: {'; '.join(short) or 'nothing'}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
