"""A benchmark of the plan's traffic at its number of requests in flight, beside what is predicted for exactly that."""

from __future__ import annotations

import json
import math
import shlex
from importlib import resources

from tandem.plan.export.flags import Flag, Shell, inside, shell
from tandem.plan.export.job import Job
from tandem.plan.export.releases import AIPERF, GUIDELLM

WAVES = 8
"""Requests that every place in flight serves in turn: enough for the first burst to weigh little."""
ARTIFACTS = "artifacts"


def aiperf_flags(job: Job) -> list[Flag]:
    """Options of `aiperf profile`; URL and MODEL stay for the shell."""
    return [
        ("--model", job.served_name),
        ("--tokenizer", Shell("$MODEL")),
        ("--url", Shell("$URL")),
        ("--endpoint-type", "chat"),
        ("--streaming", None),
        *_lengths(job),
        ("--extra-inputs", "ignore_eos:true"),
        ("--concurrency", Shell("$CONCURRENCY")),
        ("--request-count", Shell(f"$(({WAVES} * CONCURRENCY))")),
        ("--warmup-request-count", Shell("$CONCURRENCY")),
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


def guidellm_flags(job: Job) -> list[Flag]:
    """Options of `guidellm run`: the same load from another tool, with the mean lengths where a plan has many."""
    w = job.plan.workload
    return [
        ("--backend", Shell(f"kind=openai_http,target=$URL,model={inside(job.served_name)}")),
        ("--tokenizer", Shell("kind=huggingface_auto,model=$MODEL")),
        ("--data", f"kind=synthetic_text,prompt_tokens={round(w.mean_isl)},output_tokens={round(w.mean_osl)}"),
        ("--profile", Shell("kind=concurrent,streams=$CONCURRENCY")),
        ("--constraint", Shell(f"kind=max_requests,count=$(({WAVES} * CONCURRENCY))")),
        ("--output", "kind=json,path=guidellm.json"),
    ]


def _script(job: Job, package: str, what: str, command: str) -> str:
    return (
        "#!/usr/bin/env bash\n"
        f"# {what} Default URL: http://127.0.0.1:8000\n"
        f"# Needs: pip install '{package}'\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        "source ../nodes.env\n"
        'URL="${1:-http://127.0.0.1:8000}"\n'
        ': "${MODEL:?set it to the weights, for their tokenizer}"\n'
        f'CONCURRENCY="${{CONCURRENCY:-{job.concurrency}}}"\n'
        f"{command}"
    )


def files(job: Job) -> dict[str, str]:
    """`benchmark/run.sh`, what it should measure, and the comparison of both."""
    best = job.expected
    aiperf = f'aiperf profile \\\n{shell(aiperf_flags(job), "  ")}\npython3 compare.py {ARTIFACTS} "$CONCURRENCY"\n'
    expected = (
        f"TTFT {best.ttft_s.value * 1e3:.1f} ms, TPOT {best.tpot_s.value * 1e3:.1f} ms, "
        f"{best.tokens_per_s_per_gpu.value:,.1f} tok/s/GPU over {job.plan.recommended.gpus} GPUs"
    )
    guidellm = f"guidellm run \\\n{shell(guidellm_flags(job), '  ')}\necho {shlex.quote('predicted: ' + expected)}\n"
    compare = resources.files("tandem.plan.export") / "data" / "compare.py.in"
    return {
        "benchmark/run.sh": _script(
            job, f"aiperf=={AIPERF}", "Measures and compares with the prediction. Usage: run.sh [URL]", aiperf
        ),
        "benchmark/guidellm.sh": _script(
            job, f"guidellm=={GUIDELLM}", "Measures with GuideLLM. Usage: guidellm.sh [URL]", guidellm
        ),
        "benchmark/predicted.json": json.dumps(job.predicted(), indent=1) + "\n",
        "benchmark/compare.py": compare.read_text(encoding="utf-8"),
    }
