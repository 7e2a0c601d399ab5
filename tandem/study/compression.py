"""Compression at nano scale: pruning beside the same shape from scratch, the teacher's distribution beside the next token,
group-aware ranking, depth beside width, recovery against tokens, and the compressed model beside its teacher. Read first:
compression_runs.py (what a run leaves), compression_claims.py (what is asked).

Nothing is trained here: `benchmarks/compression_runs.py` makes the runs, hours of them, and this module compares them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tandem.study.alignment import SEEDS, rates
from tandem.study.alignment_runs import Throughput, read_throughput
from tandem.study.compression_claims import EQUAL, PAIRS, WHOLE, Runs, claims_of, comparable, cut_kl, is_fair, kl, nll, overall
from tandem.study.compression_figures import NAMES, figures_of
from tandem.study.compression_runs import TEACHER, as_row, read_runs
from tandem.study.result import StudyResult
from tandem.study.seeds import BACKEND, lacking, paired

MEASURES = {
    "KL after the cut": cut_kl,
    "KL": kl,
    "loss of the next token": nll,
    "right answers": overall,
}
"""What variants are compared by: nats a learned token, and a share."""


def study_compression(folder: Path) -> StudyResult:
    """Compare the finished runs in a folder (`FOLDER/<variant>/seed-<k>`); what is missing is named in the findings.

    Raises SpecError where the folder holds no finished run or one that cannot be read.
    """
    started = time.perf_counter()
    runs, throughput = read_runs(folder), read_throughput(folder)
    rows = [as_row(run) for by_seed in runs.values() for run in by_seed.values()]
    return StudyResult(
        study="compression",
        claims=claims_of(runs, throughput),
        figures=figures_of(runs, throughput),
        assumptions=assumptions(throughput),
        errata=(),
        findings={
            "runs": rows,
            "missing": missing(runs, throughput),
            "pairs": pairs(runs),
            "throughput": rates(throughput, TEACHER, WHOLE),
        },
        backends={BACKEND: "runs of the recipe nano-compress and variants of it"},
        points_evaluated=len(rows),
        points_considered=sum(len(run.stages) for by_seed in runs.values() for run in by_seed.values()),
        seconds=time.perf_counter() - started,
    )


def missing(runs: Runs, throughput: Throughput | None) -> dict[str, int]:
    """How many seeds each variant lacks, seeds at which a pair is not compared as it is unequal, and rates."""
    found = lacking(runs, tuple(NAMES), SEEDS)
    for a, b in PAIRS:
        left, right = runs.get(a, {}), runs.get(b, {})
        unequal = sum(not is_fair(left[seed], right[seed]) for seed in left if seed in right)
        found |= {f"{b} as large as {a}, on as many tokens": unequal} if unequal else {}
    return found | ({"throughput": 1} if throughput is None else {})


def pairs(runs: Runs) -> list[dict[str, Any]]:
    """What the better of two variants is claimed to have over the other, by every measure that both have."""
    rows = []
    for a, b in PAIRS:
        sides = comparable(runs, a, b)
        for name, measure in MEASURES.items():
            found = paired(*sides, measure)
            if found is not None:
                rows.append({"a_variant": a, "b_variant": b, "measure": name, **found.to_json()})
    return rows


def assumptions(throughput: Throughput | None) -> tuple[str, ...]:
    """What the comparisons rest on."""
    rates_of = "it was not measured" if throughput is None else f"measured on {throughput.machine}"
    return (
        "a seed sets text, its order and random weights, alike for all variants; differences are taken seed by seed and their "
        "mean has Student's 95 % interval, so with three seeds 2.5 standard deviations to either side",
        "a claim holds or fails where the whole interval says so; where it does not, the runs are too few to say",
        f"variants of a pair distil on as many tokens and take the same bytes, up to {EQUAL:.0%}; other seeds are left out",
        "all seeds have the same teacher, so what another one would change is not in the intervals",
        "KL and the loss of the next token are nats a learned token of held-out text, in the shares of the blend that is "
        "distilled on",
        "held-out questions are greedy and verified by programs; the teacher is asked the same ones",
        "learning rate and schedule are the recipe's for all variants; random weights or the next token alone might do better "
        "with others",
        f"throughput: teacher and compressed model in one process in turns, fp32, every answer of the full length; {rates_of}",
        "a model of 4 million parameters shows whether the machinery does what it should; it does not show what 12 billion "
        "parameters do",
    )
