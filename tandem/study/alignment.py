"""Alignment at nano scale: what each stage is worth, thinking and its budget, truncated thoughts, reinforcement learning,
merging, and the hybrid beside a Transformer. Read first: alignment_runs.py (what a run leaves), alignment_claims.py (what is
asked).

Nothing is trained here: `benchmarks/alignment_runs.py` makes the runs, hours of them, and this module compares them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.study.alignment_claims import HYBRID, TRANSFORMER, TRUNCATION, Runs, change, claims_of, faster, setting_named
from tandem.study.alignment_figures import NAMES, figures_of
from tandem.study.alignment_runs import AlignmentRun, Throughput, as_row, read_runs, read_throughput
from tandem.study.result import StudyResult
from tandem.study.seeds import BACKEND, lacking

SEEDS = 3
"""Seeds that each variant should have at least."""


def study_alignment(folder: Path) -> StudyResult:
    """Compare the finished runs in a folder (`FOLDER/<variant>/seed-<k>`); what is missing is named in the findings.

    Raises SpecError where the folder holds no finished run or one that cannot be read.
    """
    started = time.perf_counter()
    runs, throughput = read_runs(folder), read_throughput(folder)
    rows = [as_row(run) for by_seed in runs.values() for run in by_seed.values()]
    return StudyResult(
        study="alignment",
        claims=claims_of(runs, throughput),
        figures=figures_of(runs, throughput),
        assumptions=assumptions(runs, throughput),
        errata=(),
        findings={
            "runs": rows,
            "missing": missing(runs, throughput),
            "changes": changes(runs),
            "throughput": rates(throughput),
        },
        backends={BACKEND: "runs of the recipes nano-align-hybrid and nano-align-transformer, and variants of them"},
        points_evaluated=len(rows),
        points_considered=sum(len(run.stages) for by_seed in runs.values() for run in by_seed.values()),
        seconds=time.perf_counter() - started,
    )


def missing(runs: Runs, throughput: Throughput | None) -> dict[str, int]:
    """How many seeds each variant lacks, and what else is not there: answers at budgets after the truncation stage, rates."""
    found = lacking(runs, tuple(NAMES), SEEDS)
    asked = [run for name in NAMES if name != TRANSFORMER for run in runs.get(name, {}).values()]
    without = sum(TRUNCATION not in run.budgets for run in asked)
    found |= {f"budgets after {TRUNCATION}": without} if without else {}
    return found | ({"throughput": 1} if throughput is None else {})


def changes(runs: Runs) -> list[dict[str, Any]]:
    """What each stage adds to what it goes on from, question by question; a mean of None where that was not asked."""
    found = []
    for variant, by_seed in runs.items():
        stages = list(dict.fromkeys(stage for run in by_seed.values() for stage in run.after))
        alike = one_model(by_seed)
        for stage in stages:
            asked = list(dict.fromkeys(q for run in by_seed.values() for q in run.accuracy.get(stage, {})))
            for question in asked:

                def right(run: AlignmentRun, at: str, question: tuple[str, str] = question) -> float | None:
                    return run.right(at, question)

                pair = change(by_seed, stage, right)
                after = [share for run in by_seed.values() if (share := right(run, stage)) is not None]
                numbers = {"b": after, "mean": None, "half": None} if pair is None else pair.to_json()
                if stage in alike:
                    numbers |= {"half": None}
                found.append({"variant": variant, "stage": stage, "question": ", ".join(question), **numbers})
    return found


def one_model(by_seed: Mapping[int, AlignmentRun]) -> tuple[str, ...]:
    """Stages after which several seeds answer exactly alike: they were taken over from one run and have no interval."""
    every = list(by_seed.values())
    return tuple(
        stage
        for stage in every[0].after
        if len(every) > 1 and all(run.accuracy.get(stage) == every[0].accuracy.get(stage) for run in every)
    )


def rates(throughput: Throughput | None, a: str = TRANSFORMER, b: str = HYBRID) -> list[dict[str, Any]]:
    """Tokens a second of both models and those of `b` over those of `a`, for every setting that was measured."""
    rows = []
    for one in () if throughput is None else throughput.settings:
        pair = faster(one, a, b)
        if pair is not None:
            rows.append({"setting": setting_named(one), **pair.to_json()})
    return rows


def assumptions(runs: Runs, throughput: Throughput | None) -> tuple[str, ...]:
    """What the comparisons rest on."""
    alike = list(dict.fromkeys(stage for by_seed in runs.values() for stage in one_model(by_seed)))
    shared = (f"all seeds have the same model after {', '.join(alike)}: what another would change is not in the intervals",)
    rates_of = "it was not measured" if throughput is None else f"measured on {throughput.machine}"
    return (
        "a seed sets conversations, their order and every draw of a run, alike for all variants; differences are taken seed "
        "by seed and their mean has Student's 95 % interval, so with three seeds 2.5 standard deviations to either side",
        "a claim holds or fails where the whole interval says so; where it does not, the runs are too few to say",
        "all seeds of a variant begin from the same base model unless the runs were made with bases of their own, so what "
        "another pre-training would change is not in the intervals",
        *(shared if alike else ()),
        "held-out questions are greedy and verified by programs; they come from the generators that training uses too, with "
        "problems that training leaves out",
        "up to the truncation stage both variants see as many conversations in as many steps; only the cut thoughts differ",
        "the merge is chosen on one draw of questions and judged on another",
        f"throughput: both aligned models in one process in turns, fp32, every answer of the full length; {rates_of}",
        "a model of 4 million parameters shows whether the machinery does what it should; it does not show what 12 billion "
        "parameters do",
    )
