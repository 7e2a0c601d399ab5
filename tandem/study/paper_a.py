"""Paper A (Nemotron Nano 2, arXiv 2508.14444) re-derived: sizes, memory, the search for the 9B, throughput; and what smaller
models that were trained here say of the rest. Read first: paper_a_claims.py (what is asked).

Everything but the re-runs is priced by the performance model without a GPU. One constant, the A10G's bandwidth efficiency, is
fitted to one number of the paper (Table 10, candidate 2); whatever rests on it alone is marked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.study.paper_a_claims import BACKEND, TITLES, claims, largest_batch, rate_at
from tandem.study.result import Claim, Figure, Panel, Series, StudyResult

RERUNS = ("pretraining", "alignment", "compression", "headline")
"""Studies of runs at nano scale whose verdicts may stand beside the re-derived ones."""


def study_paper_a(reruns: Sequence[Path] = (), progress: Callable[[str], None] = lambda _: None) -> StudyResult:
    """Judge the paper's claims. `reruns` are claims.json files of the studies in RERUNS.

    Raises SpecError for a file that is none.
    """
    started = time.perf_counter()
    read = [_claims_in(path) for path in reruns]
    made = claims(progress)
    progress("figures")
    points = 0
    panels = []
    for isl, osl in ((8192, 16_384), (1024, 8192)):
        series = []
        for model, title in TITLES.items():
            batches = [batch for batch in (1, 2, 4, 6, 8, 12, 16, 24, 32) if batch <= largest_batch(model, isl, osl)]
            rates = [rate_at(model, isl, osl, batch) for batch in batches]
            points += len(batches)
            if batches:
                series.append(Series(name=title, x=batches, y=rates, style="line" if len(batches) > 1 else "markers"))
        panels.append(Panel(title=f"{isl:,} + {osl:,} tokens", series=tuple(series)))
    figure = Figure(
        title="Throughput against batch on one A10G",
        note="Each line ends where the cache of one more sequence does not fit.",
        x_title="sequences at once",
        y_title="output tokens/s",
        panels=tuple(panels),
        x_log=True,
    )
    return StudyResult(
        study="paper-a",
        claims=(*made, *(claim for part in read for claim in part)),
        figures={"batch": figure},
        assumptions=ASSUMPTIONS,
        errata=ERRATA,
        findings={"reruns": {str(path): len(part) for path, part in zip(reruns, read, strict=True)}},
        backends={BACKEND: "the performance model; re-runs are models of 4 million parameters, trained here"},
        points_evaluated=points,
        points_considered=points,
        seconds=time.perf_counter() - started,
    )


ASSUMPTIONS = (
    "one GPU's memory is what its driver reports times the share that an engine takes; weights, caches and state are counted "
    "exactly, a framework's workspace is the model's own estimate",
    "the A10G's bandwidth efficiency is fitted to the 156.42 tokens/s of Table 10; ratios and batch sizes do not depend on it",
    "the paper's numbers come from public retellings and NVIDIA's launch scripts; what no source repeats is not judged",
    "accuracies of the 12B and 9B cannot be measured here: what alignment and compression do is judged on models of 4 million "
    "parameters, seed by seed, where such runs are given",
)
ERRATA = (
    "a batch of 768 sequences of 8,192 tokens has 6,291,456 tokens, not the 6,029,312 that section 2.5 prints, which are 736 "
    "sequences; the long-context phase's 12 x 524,288 = 6,291,456 agrees with 768",
    "Table 1's Mamba head dimension of 64 with expansion 2 gives 160 heads; NVIDIA's configurations, and the search space of "
    "112 to 128 heads, have 128 heads of 80",
)


def _claims_in(path: Path) -> list[Claim]:
    """The claims of another study's claims.json, named after it."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["study"] not in RERUNS:
            raise SpecError(f"--with {path}: is a study of {data['study']!r}; must be one of {', '.join(RERUNS)}")
        rows = [{**row, "id": f"{data['study']} {row['id']}", "ours_by": {BACKEND: row["ours"]}} for row in data["claims"]]
        return [Claim(**row) for row in rows]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as wrong:
        raise SpecError(
            f"--with {path}: is no claims.json of `tandem study` ({type(wrong).__name__}: {' '.join(str(wrong).split())})"
        ) from None
