"""Paper B re-derived: hundreds of thousands of design points, every finding beside the printed number.

Read first: sweep.py (a priced design space and what one can ask of it), paper_b_space.py (which ones), paper_b_claims.py
(how each claim is judged). docs/adr/0008 says what was fixed before the results were looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tandem.study import paper_b_why as why
from tandem.study.paper_b_claims import FINDINGS
from tandem.study.paper_b_figures import figures
from tandem.study.paper_b_measures import Measures, measure
from tandem.study.paper_b_space import DRAWS, ENGINE, JUDGE, SEED, PaperBSpace
from tandem.study.paper_b_tests import TESTS
from tandem.study.result import StudyResult
from tandem.study.sweep import MAX_INSTANCE_GPUS

ASSUMPTIONS = (
    "GB200, FP4 weights (attention of R1 in BF16, as its published FP4 weights keep it), FP8 cache; instances of 1 to 64 GPUs",
    "full load: GPUs and requests as many as needed, so pools balance exactly",
    "TTFT is the prompt's own time, without a queue; points above 10 s are left out, 300 s for 1M-token prompts",
    "a prompt's state leaves layer by layer while later layers compute; only what cannot hide counts in TTFT",
    "TPOT is a request's mean gap between tokens; in a shared pool stalls by other requests' prompts are part of it",
    "a decode pool does nothing else; co-located means the better of in-flight batching and piggybacking",
    "gain: ratio of areas under the two frontiers, linear axes, step functions",
    f"dynamic traffic: the bundled Azure conversation trace scaled to P50 4096/512; lognormal, {DRAWS:,} draws, seed {SEED}",
)
BACKENDS = {
    JUDGE: "measured kernels back to back, no serving software: judges, as the paper simulates hardware and names no host time",
    ENGINE: "fitted on measured rows of the vendor's engine, host time included: says which claims survive it",
}


def study_paper_b(
    *,
    progress: Callable[[str], None] = lambda _: None,
    engine: bool = True,
    max_instance_gpus: int = MAX_INSTANCE_GPUS,
) -> StudyResult:
    """Run the whole study. `engine` False leaves the second backend out; tests lower `max_instance_gpus`."""
    started = time.perf_counter()
    names = (JUDGE, ENGINE) if engine else (JUDGE,)
    measured = [measure(PaperBSpace(name, max_instance_gpus, progress)) for name in names]
    judging, second = measured[0], measured[1] if engine else None
    drawn = figures(judging)
    return StudyResult(
        study="paper-b",
        claims=tuple(check.claim(judging, second) for check in (*FINDINGS, *TESTS)),
        figures=drawn,
        assumptions=ASSUMPTIONS,
        errata=_errata(judging),
        findings={name: _findings(m) for name, m in zip(names, measured, strict=True)},
        backends={name: BACKENDS[name] for name in names},
        points_evaluated=sum(m.space.points_priced for m in measured),
        points_considered=sum(m.space.points_considered for m in measured),
        seconds=time.perf_counter() - started,
    )


def _findings(m: Measures) -> dict[str, object]:
    """Numbers that the text quotes beyond the claims' own."""
    return {
        "elastic": m.elastic.to_json(),
        "common_range_tokens_per_s_per_user": list(m.common),
        "mapping": {
            model: [
                {"tokens_per_s_per_user": p.at, "gain": p.gain, "split": str(p.split), "split_batch": p.split_batch,
                 "shared": str(p.shared), "shared_batch": p.shared_batch}
                for p in points
            ]
            for model, points in m.mapping.items()
        },
    }  # fmt: skip


def _errata(m: Measures) -> tuple[str, ...]:
    """What cannot come from the paper's own stated model."""
    return (
        "Algorithm 2 gives the numerator of prefill rate over decode rate to the prefill pool, times the decode "
        "instance's GPUs: then the context-to-generation ratio would rise as decode slows down. Balance, Figure 9 and the "
        "vendor's recipe say the "
        "opposite",
        why.kv_equation_arithmetic(m),
        why.million_token_arithmetic(m) + ". Figure 5's 89 s at PP 1 is above the cutoff as well",
        "Figure 10's fixed 3.5 cannot fall below 1/4.5 = 22 % of the optimum at any interactivity, since the decode pool "
        "alone sets the "
        "rate there; its 0.05 is a share of the highest throughput",
        "Figure 5's 30.4 times needs several hundred chunks; against an unchunked PP 1 they cost more than 3 % of throughput",
    )
