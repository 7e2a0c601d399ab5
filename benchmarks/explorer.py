"""How fast the explorer answers, over seeded draws of where the sliders may stand, and how soon its page is painted first.

    OMP_NUM_THREADS=1 python benchmarks/explorer.py [--draws 60] [--json FILE]

A draw is 1 to 256 GPUs (powers of two), a prompt's and an answer's length, and both bounds; what cannot be served is an answer
too. Each is asked whole and rough (a slow model's first look), and what was kept is forgotten before. The first contentful
paint is Chromium's own, of a fresh tab (median of five), and needs aiohttp (the extra `[bench]`); where either is missing it is
left out and says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tandem.explore import answers
from tandem.explore.answers import Query, answer

CASES = [
    ("nemotron-nano-9b-v2", "a10g"),
    ("qwen3-8b", "h100-sxm"),
    ("gpt-oss-120b", "h100-sxm"),
    ("deepseek-r1", "h200"),
]
ISL, OSL = (512, 1000, 2048, 4096, 8192, 20_000, 32_768), (64, 128, 256, 512, 1024, 2048, 8192)
TTFT_S, TPOT_S = (None, 0.5, 1.0, 2.0, 5.0), (None, 0.01, 0.02, 0.03, 0.05, 0.1)
DOUBLINGS = 8
ASKED_S = 0.1
"""What 95 of 100 answers were to take."""
TABS = 5
BROWSER = Path(__file__).resolve().parents[1] / "tests" / "explore"


def draws(model: str, hardware: str, count: int) -> list[Query]:
    """Where the sliders stand, the same for every model."""
    drawn = random.Random(0)
    return [
        Query(
            model=model,
            hardware=hardware,
            gpus=2 ** drawn.randint(0, DOUBLINGS),
            isl=drawn.choice(ISL),
            osl=drawn.choice(OSL),
            ttft_s=drawn.choice(TTFT_S),
            tpot_s=drawn.choice(TPOT_S),
        )
        for _ in range(count)
    ]


def answer_times(queries: list[Query]) -> dict[str, Any]:
    """Seconds of the median, the 95th of 100 and the slowest answer, and how many were served."""
    answer(replace(queries[0], gpus=8, isl=4096, osl=512))  # what is read once: specifications, fits
    seconds, served = [], 0
    for query in queries:
        answers._kept.cache_clear()
        start = time.perf_counter()
        found = answer(query)
        seconds.append(time.perf_counter() - start)
        served += "error" not in found
    seconds.sort()
    p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
    return {"median_s": median(seconds), "p95_s": p95, "max_s": seconds[-1], "served": served, "draws": len(seconds)}


def first_paint_s() -> float | str:
    """Median seconds from asking for the page to its first contentful paint; or why it was not measured."""
    sys.path.insert(0, str(BROWSER))
    try:
        from browser import CHROMIUM, Browser
    except ModuleNotFoundError as missing:
        return f"{missing.name} is not installed"
    if CHROMIUM is None:
        return "no Chromium is installed"
    words = [sys.executable, "-m", "tandem.cli", "explore", "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server, tempfile.TemporaryDirectory() as profile:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            with Browser(Path(profile)) as browser:
                return median(paint_s(browser, url) for _ in range(TABS))
        finally:
            server.terminate()


def paint_s(browser: Any, url: str) -> float:
    """Of one fresh tab."""
    tab = browser.open(url)
    entry = "performance.getEntriesByName('first-contentful-paint')[0]"
    tab.until(entry)
    found = float(tab.value(f"{entry}.startTime")) / 1e3
    tab.close()
    return found


def measure(count: int) -> dict[str, Any]:
    """Everything, as one object."""
    rows = []
    for model, hardware in CASES:
        queries = draws(model, hardware, count)
        for rough in (False, True):
            timed = answer_times([replace(query, rough=rough) for query in queries])
            rows.append({"model": model, "hardware": hardware, "rough": rough, **timed})
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "answers": rows,
        "asked_s": ASKED_S,
        "first_contentful_paint_s": first_paint_s(),
    }


def show(found: dict[str, Any]) -> None:
    """The table."""
    machine = found["machine"]
    print(f"{machine['cores']} cores, Python {machine['python']}, NumPy {machine['numpy']}, {found['date']}\n")
    print(f"{'answer, ms':<38}{'':<8}{'median':>8}{'p95':>8}{'max':>8}{'served':>12}")
    for row in found["answers"]:
        name, how = f"{row['model']} on {row['hardware']}", "rough" if row["rough"] else "whole"
        times = "".join(f"{1e3 * row[key]:>8,.0f}" for key in ("median_s", "p95_s", "max_s"))
        print(f"{name:<38}{how:<8}{times}{row['served']:>6} of {row['draws']}")
    paint = found["first_contentful_paint_s"]
    print(f"\nasked of p95: {1e3 * found['asked_s']:.0f} ms")
    print(f"first contentful paint: {paint if isinstance(paint, str) else f'{1e3 * paint:.0f} ms'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=60, metavar="N", help="places of the sliders for each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    arguments = parser.parse_args()
    if arguments.draws < 1:
        parser.error("--draws must be at least 1")
    found = measure(arguments.draws)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
