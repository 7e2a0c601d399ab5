"""A benchmark that measures what the plan predicts: its traffic, its number of requests in flight, its units."""

from __future__ import annotations

import json
import math
from importlib import resources

from tandem.plan.export.flags import Flag, shell
from tandem.plan.export.job import Job
from tandem.plan.export.releases import AIPERF

WAVES = 8
"""Requests that every place in flight serves in turn: enough for the first burst to weigh little."""
ARTIFACTS = "artifacts"


def aiperf_flags(job: Job) -> list[Flag]:
    """Options of `aiperf profile`; URL and MODEL stay for the shell."""
    return [
        ("--model", job.served_name),
        ("--tokenizer", "$MODEL"),
        ("--url", "$URL"),
        ("--endpoint-type", "chat"),
        ("--streaming", None),
        *_lengths(job),
        ("--extra-inputs", "ignore_eos:true"),
        ("--concurrency", "$CONCURRENCY"),
        ("--request-count", f"$(({WAVES} * CONCURRENCY))"),
        ("--warmup-request-count", "$CONCURRENCY"),
        ("--random-seed", "0"),
        ("--output-artifact-dir", ARTIFACTS),
    ]


def _lengths(job: Job) -> list[Flag]:
    """One pair of lengths, or the weighted pairs that stand for a trace."""
    w = job.plan.workload
    if len(w.isl) == 1:
        isl, osl = round(w.isl[0]), round(w.osl[0])
        return [
            ("--synthetic-input-tokens-mean", str(isl)),
            ("--synthetic-input-tokens-stddev", "0"),
            ("--output-tokens-mean", str(osl)),
            ("--output-tokens-stddev", "0"),
        ]
    percents = [math.floor(weight * 10_000) / 100 for weight in w.weight]
    percents[0] = round(100 - sum(percents[1:]), 2)  # the percentages must sum to 100 exactly
    pairs = ";".join(f"{round(i)},{round(o)}:{p:g}" for i, o, p in zip(w.isl, w.osl, percents, strict=True))
    return [("--sequence-distribution", pairs)]


def files(job: Job) -> dict[str, str]:
    """`benchmark/run.sh`, what it should measure, and the comparison of both."""
    script = (
        "#!/usr/bin/env bash\n"
        f"# Measures the deployment and sets it beside the prediction. Usage: run.sh [URL] (default http://127.0.0.1:8000)\n"
        f"# Needs: pip install 'aiperf=={AIPERF}'\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        "source ../nodes.env\n"
        'URL="${1:-http://127.0.0.1:8000}"\n'
        ': "${MODEL:?set it to the weights, for their tokenizer}"\n'
        f'CONCURRENCY="${{CONCURRENCY:-{job.concurrency}}}"\n'
        f"aiperf profile \\\n{shell(aiperf_flags(job), '  ')}\n"
        f"python3 compare.py {ARTIFACTS}\n"
    )
    compare = resources.files("tandem.plan.export") / "data" / "compare.py"
    return {
        "benchmark/run.sh": script,
        "benchmark/predicted.json": json.dumps(job.predicted(), indent=1) + "\n",
        "benchmark/compare.py": compare.read_text(encoding="utf-8"),
    }
