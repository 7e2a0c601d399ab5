"""Elastic scaling: policies compared on the same arrivals. Read first: elastic_cells.py (who serves what), elastic_rules.py
(the independent controllers), elastic_bound.py (what a clairvoyant needs), elastic_claims.py (what is asked)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

from tandem.study.elastic_bound import BOUND_WINDOW_S, Bound, Foreseen, clairvoyant
from tandem.study.elastic_cells import (
    ELASTIC_WINDOW_S,
    SERVICES,
    WINDOW_S,
    CellRun,
    Ready,
    as_row,
    cells,
    ready,
    run_cell,
    run_policy,
)
from tandem.study.elastic_claims import WANTED, claims_of, over_static
from tandem.study.elastic_figures import figures_of
from tandem.study.elastic_ratio import HOLDS, MIXES, TPOTS_S, WORKERS, Ratios, ratios
from tandem.study.elastic_rules import RULES
from tandem.study.elastic_static import search_static
from tandem.study.elastic_traffic import SYNTHETIC, TRAFFIC
from tandem.study.result import StudyResult

SEEDS = (0, 1, 2)
SEEDED = "servegen-deepseek-r1/qwen3-8b"
SEEDED_POLICIES = ("peak", "elastic", "dynamo-1x", "ray-serve")
PROCESSES = 2
MOST_STATIC, MOST_STATIC_HOUR = 5, 10
"""Constant sizes that are tried for a cell, beside static-by-peak: of a day, and of an hour, which takes less to simulate."""
POINTS = 300
"""Points of a drawn time series."""
BACKEND = "vllm"
RELAXED = 0.65
"""Utilisation of a second clairvoyant, whose pools have more room for chance."""


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """A cell, done: rows as `as_row` makes them, in the order of running; plain numbers only, to be sent between processes."""

    cell: str
    seed: int
    requests: int
    tokens: int
    gpus_per_worker: int
    first: tuple[int, int]
    peak: tuple[int, int]
    rows: tuple[dict[str, Any], ...]
    bound: dict[str, float]
    """GPU hours: work, whole, sized."""
    static: tuple[dict[str, Any], ...]
    """Constant sizes that were tried, `peak` among them."""
    static_best: dict[str, Any] | None
    series: dict[str, dict[str, list[float]]]
    """Sizes over time: `elastic` as it was, `sized` as the clairvoyant has them."""

    def row(self, policy: str) -> dict[str, Any]:
        """Of one policy."""
        return next(row for row in self.rows if row["policy"] == policy)


def run_foreseen(made: Ready, bound: Bound, name: str = "clairvoyant") -> CellRun:
    """The clairvoyant's sizes as a policy: workers start in time, drain, and meet real queues."""
    ahead = max(1, int((made.kind.start_up_s + ELASTIC_WINDOW_S) / BOUND_WINDOW_S) + 1)
    sizes = int(bound.prefill[:ahead].max()), int(bound.decode[:ahead].max())
    return run_policy(made, name, Foreseen(bound, made.kind.start_up_s), sizes, ELASTIC_WINDOW_S)


def study_cell(name: str, seed: int = 0, policies: Sequence[str] | None = None, most_static: int = MOST_STATIC) -> CellOutcome:
    """All policies on one cell; `policies` names some of them, without a search for constant sizes and the clairvoyant."""
    made = ready(name, seed=seed)
    bound = clairvoyant(made)
    runs = [run_cell(made, policy) for policy in (policies or ("peak", "elastic", *RULES))]
    series = {run.policy: _sizes(run) for run in runs if run.policy == "elastic"}
    hours = [i * bound.window_s / 3600.0 for i in range(len(bound.prefill))]
    series["sized"] = _thin({"at_h": hours, "prefill": bound.prefill.tolist(), "decode": bound.decode.tolist()})
    static: tuple[dict[str, Any], ...] = ()
    best = None
    if policies is None:
        runs.append(run_foreseen(made, bound))
        runs.append(run_foreseen(made, clairvoyant(made, utilisation=RELAXED), f"clairvoyant {RELAXED:g}"))
        found = search_static(made, WANTED, known=(runs[0],), most_runs=most_static)
        static = tuple(as_row(run) for run in found.runs)
        if found.best is not None:
            best = _beside_static({**as_row(found.best), "policy": f"static best {found.best.policy}"}, static)
    return CellOutcome(
        cell=name,
        seed=seed,
        requests=len(made.trace),
        tokens=int(made.trace.osl.sum()),
        gpus_per_worker=made.kind.gpus,
        first=made.first,
        peak=made.peak,
        rows=tuple(_beside_static(as_row(run), static) for run in runs),
        bound={"work": bound.work, "whole": bound.whole, "sized": bound.sized},
        static=static,
        static_best=best,
        series=series,
    )


def _beside_static(row: dict[str, Any], static: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {**row, "over_static": over_static(row, static)}


def _sizes(run: CellRun) -> dict[str, list[float]]:
    series = run.result.series
    names = {"prefill": "prefill_workers", "decode": "decode_workers"}
    return _thin({"at_h": (series["at_s"] / 3600.0).tolist()} | {k: series[v].tolist() for k, v in names.items()})


def _thin(columns: dict[str, list[float]]) -> dict[str, list[float]]:
    step = max(1, len(columns["at_h"]) // POINTS)
    return {name: values[::step] for name, values in columns.items()}


def _most_static(name: str) -> int:
    return MOST_STATIC if TRAFFIC[name.split("/")[0]].drawn else MOST_STATIC_HOUR


def assumptions() -> tuple[str, ...]:
    """What the study rests on."""
    services = "; ".join(
        f"{s.name}: {s.parallelism} on {s.hardware}, up to {s.batch} sequences, TTFT {s.slo.ttft_s:g} s, TPOT "
        f"{1e3 * (s.slo.tpot_s or 0):g} ms, a start takes {s.start_up_s:g} s"
        for s in SERVICES.values()
    )
    scales = "; ".join(
        f"{t.name}: " + ", ".join(f"{n} {x:g}" for n, x in t.scale.items()) for t in TRAFFIC.values() if t.name != SYNTHETIC
    )
    return (
        f"workers of one kind in both pools, so that roles can change: {services}",
        f"traffic, times the recorded rate: {scales}. A recording is made denser by copies within 2 s that take lengths of "
        "requests near by, so bursts last as long as they did; a ServeGen day is thinned by its clients' rates",
        "a policy pays for a worker from the decision to start it until it has drained; all start with the sizes that the "
        f"first {WINDOW_S / 60:g} minutes need, and may take up to twice static-by-peak",
        f"static-by-peak: the largest needs of any {WINDOW_S / 60:g} minutes by the sizing functions of the joint policy "
        "(utilisation 0.85, Kingman's formula for TTFT)",
        "clairvoyant bound (sized): the same functions, minute by minute, arrivals and lengths known, changes free. It is a "
        "bound for policies that keep that utilisation and whole workers of one role a minute, not for hotter ones: `whole` "
        "is the same at full utilisation, `work` without whole workers",
        "independent controllers as published, with their defaults; where the simulator shows less than they read, the rule is "
        "favoured (module docstrings); Ray Serve's decode target is a load test's, since its default of 2 fills any budget",
        "better: attainment no lower with fewer GPU hours, or higher with no more; else two policies are not comparable",
    )


def study_elastic(*, progress: Callable[[str], None] = lambda _: None, quick: bool = False) -> StudyResult:
    """Run the whole study, cells in two processes; `quick` runs one short synthetic cell and few splits, in seconds."""
    started = time.perf_counter()
    names = [f"{SYNTHETIC}/qwen3-8b"] if quick else [n for n in cells() if not n.startswith(SYNTHETIC)]
    jobs: list[tuple[Any, ...]] = [(name, 0, None, 3 if quick else _most_static(name)) for name in names]
    seeded = f"{SYNTHETIC}/qwen3-8b" if quick else SEEDED
    jobs += [(seeded, seed, SEEDED_POLICIES, 0) for seed in SEEDS[1:]]
    if quick:
        outcomes = [study_cell(*job) for job in jobs]
        split = ratios(workers=3, tpots_s=TPOTS_S[1:3], mixes=MIXES[1:], holds=0.5)
    else:
        outcomes, split = _in_processes(jobs, progress)
    main = [o for o in outcomes if o.seed == 0]
    seeds = [next(o for o in main if o.cell == seeded), *(o for o in outcomes if o.seed != 0)]
    return StudyResult(
        study="elastic",
        claims=claims_of(main, seeds, split, list(RULES)),
        figures=figures_of(main, split),
        assumptions=assumptions(),
        errata=(),
        findings={
            "cells": {o.cell: asdict(o) for o in main},
            "seeds": [asdict(o) for o in seeds],
            "ratios": asdict(split),
            "sources": {name: rule.source for name, rule in RULES.items()},
        },
        backends={BACKEND: "step times with the host time of its measured rows; every policy is simulated request by request"},
        points_evaluated=sum(len(o.rows) + max(0, len(o.static) - 1) for o in outcomes),
        points_considered=sum(o.requests * (len(o.rows) + max(0, len(o.static) - 1)) for o in outcomes),
        seconds=time.perf_counter() - started,
    )


def _in_processes(jobs: list[tuple[Any, ...]], progress: Callable[[str], None]) -> tuple[list[CellOutcome], Ratios]:
    done = 0
    with ProcessPoolExecutor(PROCESSES) as pool:
        found = {pool.submit(study_cell, *job): i for i, job in enumerate(jobs)}
        split = pool.submit(ratios, workers=WORKERS, holds=HOLDS)
        outcomes: dict[int, CellOutcome] = {}
        for future in as_completed(found):
            outcomes[found[future]] = future.result()
            done += 1
            progress(f"{done} of {len(jobs)} cells")
        return [outcomes[i] for i in range(len(jobs))], split.result()
