"""Should prefill and decode of a hybrid be split? Four Mamba-2 hybrids beside Transformers of their size.

Read first: hybrids_space.py (who, which traffic), hybrids_cells.py (split or not, and the law behind it),
hybrids_claims.py (what is asked). Nobody has published this study, so most claims have no printed number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tandem.study.hybrids_claims import CHECKS, flip_claim, steady_claim
from tandem.study.hybrids_figures import figures
from tandem.study.hybrids_measures import HybridMeasures, Variants, measure, variants_of
from tandem.study.hybrids_space import (
    ENGINE,
    ISLS,
    JUDGE,
    NODE_GPUS,
    OSLS,
    PAIRS,
    TPOTS_S,
    HybridSpace,
    Setting,
    model_of,
)  # fmt: skip
from tandem.study.result import StudyResult

BACKENDS = {
    JUDGE: "measured kernels back to back, no serving software: judges, as in the study of paper B",
    ENGINE: "fitted on measured rows of the engine that paper A ran; none of them is of a Mamba-2 hybrid: evidence transferred",
}


def assumptions() -> tuple[str, ...]:
    """What the study rests on, sizes of the models included."""
    sizes = []
    for pair in PAIRS.values():
        names = (pair.hybrid, pair.transformer, *pair.others)
        sizes.append(", ".join(f"{n.rsplit('/', 1)[-1]} {model_of(n).parameters / 1e9:.2f} B" for n in names))
    return (
        "no public serving grid of a Mamba-2 hybrid exists, and no table of Mamba-2's own scan: the measured kernels of Gated "
        f"DeltaNet stand in for it. Evidence: backend {ENGINE} `transferred`, {JUDGE} (kernels alone) `roofline`; H9 and H13 "
        "vary what that could change",
        "pairs, hybrid first: " + "; ".join(sizes),
        "Mistral-Nemo-12B (its published configuration) stands in for a 12B Transformer, which the catalogue lacks; "
        "Llama-3.1-70B is cut to 64 of its 80 blocks, and also priced whole. The closest of size differ by 8 % (9B) to 1 %",
        "Nemotron-H-56B was published for 8k tokens and Qwen3 for 40k: longer cells are arithmetic about such layers",
        f"H100, BF16 weights and cache, recurrent state in fp32, instances of 1 to {NODE_GPUS} GPUs inside a node",
        "full load, exact balance, TTFT up to 10 s without a queue, state leaves layer by layer; co-located means the better "
        "of in-flight batching and piggybacking",
        f"traffic grid: ISL {', '.join(map(str, ISLS))} x OSL {', '.join(map(str, OSLS))} x TPOT "
        f"{', '.join(f'{t * 1e3:.0f}' for t in TPOTS_S)} ms",
        "measured split deployments reach 75 to 100 % of such curves: read a gain below 1.33 as unproven",
    )


def study_hybrids(
    *,
    progress: Callable[[str], None] = lambda _: None,
    engine: bool = True,
    isls: tuple[int, ...] = ISLS,
    osls: tuple[int, ...] = OSLS,
    max_instance_gpus: int = NODE_GPUS,
) -> StudyResult:
    """Run the whole study; tests leave the engine out and thin the grid."""
    started = time.perf_counter()
    names = (JUDGE, ENGINE) if engine else (JUDGE,)
    measured = [
        measure(HybridSpace(Setting(backend=n), isls, osls, max_instance_gpus, progress), others=n == JUDGE) for n in names
    ]
    judging, second = measured[0], measured[1] if engine else None
    variants = variants_of(judging, second)
    claims = [check.claim(judging, second) for check in CHECKS]
    claims += [flip_claim(judging, variants), steady_claim(judging, variants)]
    return StudyResult(
        study="hybrids",
        claims=tuple(sorted(claims, key=lambda c: int(c.id[1:]))),
        figures=figures(judging),
        assumptions=assumptions(),
        errata=(),
        findings={n: _findings(m) for n, m in zip(names, measured, strict=True)} | {"variants": _varied(judging, variants)},
        backends={n: BACKENDS[n] for n in names},
        points_evaluated=sum(m.space.points_priced for m in measured) + variants.points_priced,
        points_considered=sum(m.space.points_considered for m in measured) + variants.points_considered,
        seconds=time.perf_counter() - started,
    )


def _findings(m: HybridMeasures) -> dict[str, Any]:
    """Numbers behind the text, by model: both mixes, the state, and every cell of the traffic grid."""
    return {
        "sides": {f"{model} {mix[0]}/{mix[1]}": s._asdict() for (model, mix), s in m.sides.items()},
        "states": {model: s._asdict() for model, s in m.states.items()},
        "cells": {
            model: [
                {"isl": k[0], "osl": k[1], "tpot_s": k[2], "split_tokens_per_s_per_gpu": c.split,
                 "shared_tokens_per_s_per_gpu": c.shared, "gain": c.gain, "loads": c.loads._asdict() if c.loads else None}
                for k, c in cells.items()
            ]
            for model, cells in m.cells.items()
        },
    }  # fmt: skip


def _varied(base: HybridMeasures, variants: Variants) -> dict[str, Any]:
    """Cells in which only one of two models is worth splitting: (hybrid, Transformer, compared), by variant and pair."""
    found: dict[str, Any] = {}
    for name in variants.cells:
        flips = {n: variants.flips(name, p, base) for n, p in PAIRS.items()}
        found[name] = {n: (len(f.hybrid), len(f.transformer), f.compared) for n, f in flips.items()}
    return found
