"""Pre-training at nano scale: FP8 beside bf16 and fp32, the hybrid beside a Transformer, three phases beside one blend, and the
long-context phase before and after. Read first: pretraining_runs.py (what a run leaves), pretraining_claims.py (what is asked).

Nothing is trained here: `benchmarks/pretraining_runs.py` makes the runs, hours of them, and this module compares them."""

from __future__ import annotations

import time
from pathlib import Path

from tandem.study.pretraining_claims import LONG, SHORT, Runs, claims_of
from tandem.study.pretraining_figures import NAMES, figures_of
from tandem.study.pretraining_runs import as_row, read_runs
from tandem.study.result import StudyResult
from tandem.study.seeds import BACKEND, lacking

WANTED = tuple(NAMES)
"""Variants that the whole study takes."""
SEEDS = 3
"""Seeds that each variant should have at least."""


def study_pretraining(folder: Path) -> StudyResult:
    """Compare the finished runs in a folder (`FOLDER/<variant>/seed-<k>`); what is missing is named in the findings.

    Raises SpecError where the folder holds no finished run or one that cannot be read.
    """
    started = time.perf_counter()
    runs = read_runs(folder)
    rows = [as_row(run) for by_seed in runs.values() for run in by_seed.values()]
    return StudyResult(
        study="pretraining",
        claims=claims_of(runs),
        figures=figures_of(runs),
        assumptions=assumptions(runs),
        errata=(),
        findings={"runs": rows, "missing": lacking(runs, WANTED, SEEDS)},
        backends={BACKEND: "trained runs of the recipes nano-hybrid, nano-transformer and nano-long, and variants of them"},
        points_evaluated=len(rows),
        points_considered=sum(row["tokens"] for row in rows),
        seconds=time.perf_counter() - started,
    )


def assumptions(runs: Runs) -> tuple[str, ...]:
    """What the comparisons rest on."""
    tokens = sorted(
        {run.tokens[-1] for variant, by_seed in runs.items() for run in by_seed.values() if variant not in (LONG, SHORT)}
    )
    said = " to ".join(f"{n / 1e6:.2f}" for n in sorted({tokens[0], tokens[-1]})) if tokens else "no"
    return (
        f"each base run has {said} M positions; a seed sets initial weights, order of documents and blend, and is the same "
        "for all variants, so differences are taken seed by seed and their mean has Student's 95 % interval",
        "held-out loss is the mean over the sources of the loss of a learned token on documents that were never learned from; "
        "answers are greedy, verified by their tasks, and about problems that do not occur in training",
        "FP8 is emulated: operands are rounded to E4M3 exactly as hardware does and multiplied in a wider format, so sums are "
        "more exact than those of hardware that adds in fewer bits",
        "hybrid and Transformer have parameters, tokens and order of data in common, not time; neither was tuned on its own",
        "one blend has the three phases' tokens of each source, evenly over the run",
        "a model of 3.6 million parameters and a few million tokens shows whether the machinery does what it should; it does "
        "not show what 12 billion parameters and 20 trillion tokens do",
    )
