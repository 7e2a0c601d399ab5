"""Which model, deployed how? Paper A's compression candidates, each with the best deployment that a search as paper B's finds.

Neither paper asks this. Read first: joint_space.py (which shapes, which traffic). What a shape is worth in accuracy is not
known here: its parameters stand for it, which order models of one family and training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

from tandem.plan.planner import WORTH_SPLITTING, Plan
from tandem.sim.api import simulate
from tandem.sim.policies import PolicyName
from tandem.sim.traces import load_trace
from tandem.spec.design import Deployment
from tandem.spec.units import GIB
from tandem.spec.workload import Slo
from tandem.study.joint_space import (
    CHOSEN,
    DEPTHS,
    GPUS,
    HARDWARE,
    TPOTS_S,
    TRAFFIC,
    TTFT_S,
    WHOLE,
    Candidate,
    Cell,
    Key,
    candidates,
    cell_text,
    cells,
)
from tandem.study.result import Claim, Figure, Panel, Series, StudyResult

BACKEND = "vllm"
SOURCE = "this study"
TRACE, SECONDS, SCALE = "azure-conversation-2023", 600.0, 6.0
"""Ten minutes of a recorded trace at some times its rate, for elastic scaling."""
ELASTIC_CELL = (4096, 512, 0.05)
ELASTIC_SLO = Slo(ttft_s=2.0, tpot_s=0.05, percentile=90.0)
Shapes = Mapping[Key, Candidate]


def study_joint(progress: Callable[[str], None] = lambda _: None) -> StudyResult:
    """Judge what compression and deployment do to each other."""
    started = time.perf_counter()
    shapes = candidates(progress)
    progress("elastic scaling")
    runs = elastic(shapes)
    points = sum(plan.points_evaluated for c in shapes.values() for plan in c.plans.values() if plan is not None)
    claims = (
        _same_winner(shapes),
        _smaller_serves_more(shapes),
        _bytes(shapes),
        _flips(shapes),
        _moved(shapes),
        _elastic(runs),
    )
    return StudyResult(
        study="joint",
        claims=claims,
        figures={"plane": _plane(shapes), "gain": _gains(shapes)},
        assumptions=ASSUMPTIONS,
        errata=(),
        findings={"shapes": [_row(c) for c in shapes.values()], "elastic": runs},
        backends={BACKEND: "fitted on measured rows of the engine that paper A ran; none is of a Mamba-2 hybrid"},
        points_evaluated=points,
        points_considered=points,
        seconds=time.perf_counter() - started,
    )


ASSUMPTIONS = (
    f"{HARDWARE}, {GPUS} GPUs, BF16, prompts and outputs of "
    + ", ".join(f"{isl}/{osl}" for isl, osl in TRAFFIC)
    + f" tokens, TTFT up to {TTFT_S:g} s and TPOT up to {', '.join(f'{t * 1e3:g}' for t in TPOTS_S)} ms; full load",
    f"shapes: the paper's grid of hidden size, FFN size and Mamba heads at {' and '.join(map(str, DEPTHS))} layers of the 12B",
    "parameters stand for quality: they order models of one family, and say nothing of what a point of accuracy is worth",
    "no serving row of a Mamba-2 hybrid was ever measured, so all of this is transferred; ratios of shapes of one family are "
    "surer than numbers",
    f"elastic: {SECONDS:.0f} s of {TRACE} at {SCALE:g} times its rate, simulated request by request with the joint policy",
)


def _claim(id: str, title: str, ours: str, holds: bool | None, why: str, printed: str | None = None, **values: Any) -> Claim:
    return Claim(
        id=id, title=title, printed=printed, ours=ours, holds=holds, holds_engine=None, why=why, source=SOURCE,
        ours_by={BACKEND: ours}, values=values,
    )  # fmt: skip


def best_in(shapes: Shapes, cell: Cell) -> Candidate | None:
    """The shape that serves most a GPU in a cell."""
    there = [(rate, c) for c in shapes.values() if (rate := c.per_gpu(cell)) is not None]
    return max(there, key=lambda pair: pair[0])[1] if there else None


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    order = [[sorted(side).index(value) for value in side] for side in (a, b)]
    centred = [[rank - mean(side) for rank in side] for side in order]
    norm = (sum(x * x for x in centred[0]) * sum(y * y for y in centred[1])) ** 0.5
    return sum(x * y for x, y in zip(*centred, strict=True)) / norm if norm else 1.0


def _same_winner(shapes: Shapes) -> Claim:
    """Among shapes of about the 9B's size: what one GPU at a fixed batch prefers against what a cluster prefers."""
    target = shapes[CHOSEN].spec.parameters
    near = {key: c for key, c in shapes.items() if abs(c.spec.parameters / target - 1) <= 0.05 and c.fixed_batch is not None}
    alone = max(near.values(), key=lambda c: c.fixed_batch or 0.0)
    wins, correlations = {}, []
    for cell in cells():
        there = [
            (c.fixed_batch, rate) for c in near.values() if (rate := c.per_gpu(cell)) is not None and c.fixed_batch is not None
        ]
        best = best_in(near, cell)
        if best is None or len(there) < 3:
            continue
        wins[cell_text(cell)] = best.spec.name
        correlations.append(rank_correlation([a for a, _ in there], [b for _, b in there]))
    other = {text: name for text, name in wins.items() if name != alone.spec.name}
    told = "; ".join(f"{text}: {name}" for text, name in other.items())
    return _claim(
        "J1", "the shape that one GPU at a fixed batch prefers is the one that a cluster under bounds prefers",
        f"in {len(wins) - len(other)} of {len(wins)} cells; rank correlation of {len(near)} shapes {mean(correlations):.2f}",
        not other,
        f"within 5 % of the 9B's parameters one A10G at batch 8 prefers {alone.spec.name}"
        + (f"; a cluster prefers {told}" if other else ""),
        wins=wins, correlations=correlations,
    )  # fmt: skip


def _ratios(shapes: Shapes) -> dict[str, float]:
    found = {}
    for cell in cells():
        small, whole = shapes[CHOSEN].per_gpu(cell), shapes[WHOLE].per_gpu(cell)
        if small is not None and whole is not None:
            found[cell_text(cell)] = small / whole
    return found


def _smaller_serves_more(shapes: Shapes) -> Claim:
    ratios = _ratios(shapes)
    lost = shapes[CHOSEN].spec.parameters / shapes[WHOLE].spec.parameters
    low, high = min(ratios, key=lambda k: ratios[k]), max(ratios, key=lambda k: ratios[k])
    return _claim(
        "J2", "the 9B serves more a GPU than the 12B by more than it is smaller",
        f"{ratios[low]:.2f} ({low}) to {ratios[high]:.2f} times ({high}); it has {lost:.2f} of the parameters",
        all(ratio > 1 / lost for ratio in ratios.values()),
        f"1 / {lost:.2f} = {1 / lost:.2f} would be in proportion; prompts cost in proportion, decoding less where state and "
        "cache weigh beside weights, and more where a tighter bound leaves fewer sequences to share them", ratios=ratios,
    )  # fmt: skip


def _bytes(shapes: Shapes) -> Claim:
    """Equal bytes, unequal service: how far apart shapes of one size are."""
    target = shapes[CHOSEN].total_bytes
    near = [c for c in shapes.values() if abs(c.total_bytes / target - 1) <= 0.03]
    spreads = {}
    for cell in cells():
        rates = [rate for c in near if (rate := c.per_gpu(cell)) is not None]
        if len(rates) > 1:
            spreads[cell_text(cell)] = max(rates) / min(rates) - 1
    widest = max(spreads, key=lambda k: spreads[k])
    return _claim(
        "J3", "shapes of equal bytes serve alike, so that bytes are enough to search by",
        f"{len(near)} shapes within 3 % of {target / GIB:.1f} GiB: {min(spreads.values()):.1%} to {spreads[widest]:.1%} apart",
        spreads[widest] < 0.05, f"furthest apart at {widest}; layers, heads and FFN size cost a step differently a byte",
        spreads=spreads, shapes=[c.spec.name for c in near],
    )  # fmt: skip


def _flips(shapes: Shapes) -> Claim:
    whole, small = shapes[WHOLE], shapes[CHOSEN]
    flips = []
    for cell in cells():
        a, b = whole.gain(cell), small.gain(cell)
        if a is not None and b is not None and (a >= WORTH_SPLITTING) != (b >= WORTH_SPLITTING):
            flips.append(f"{cell_text(cell)}: {a:.2f} to {b:.2f}")
    only = [cell_text(cell) for cell in cells() if (whole.plans[cell] is None) != (small.plans[cell] is None)]
    return _claim(
        "J4", "compressing the 12B to the 9B leaves the decision to split prefill from decode as it was",
        (f"it changes in {len(flips)} of {len(cells())} cells" if flips else f"in all {len(cells())} cells")
        + (f"; {len(only)} cells only one of them can serve" if only else ""),
        not flips,
        ("gain of splitting, 12B to 9B: " + "; ".join(flips) if flips else "the gain of splitting moves by little")
        + (f"; served by one alone: {', '.join(only)}" if only else ""),
        flips=flips, served_by_one=only,
        gains={cell_text(c): [whole.gain(c), small.gain(c)] for c in cells()},
    )  # fmt: skip


def _moved(shapes: Shapes) -> Claim:
    """`s0 + k * isl`: heads decide s0, attention layers decide k."""
    base = shapes[CHOSEN]
    few = shapes[56, 4480, 15_680, 112]
    deep = shapes[62, 4480, 15_680, 128]
    k = {c.key: c.spec.kv_bytes_per_token() for c in (base, few, deep)}
    saved = base.state_bytes - few.state_bytes
    even = saved / (k[deep.key] - k[base.key])
    return _claim(
        "J5", "what a split deployment moves is decided by attention layers, not by Mamba heads",
        f"16 heads fewer save {saved / 1e6:.1f} MB of {base.state_bytes / 1e6:.1f} a request; two attention layers fewer "
        f"{(k[deep.key] - k[base.key]) / 1024:.0f} KiB a token: as much from {even:,.0f} tokens on", even < TRAFFIC[-1][0],
        f"s0 + k * isl with k = {k[base.key] / 1024:.0f} KiB for {base.attention_layers} attention layers and "
        f"{k[deep.key] / 1024:.0f} for {deep.attention_layers}; the shortest prompts here have {TRAFFIC[-1][0]:,} tokens",
        state_bytes={"128 heads": base.state_bytes, "112 heads": few.state_bytes}, break_even_tokens=even,
    )  # fmt: skip


def with_equal_workers(plan: Plan) -> Deployment | None:
    """The best split deployment of a frontier whose workers are all of one size, so that they can change roles."""
    bound_s = plan.slo.tpot_s
    there = [
        option
        for option in plan.frontier
        if option.deployment.mode == "disaggregated"
        and len({pool.parallelism.gpus for pool in option.deployment.pools}) == 1
        and (bound_s is None or option.tpot_s.value <= bound_s)
    ]
    return max(there, key=lambda option: option.tokens_per_s).deployment if there else None


def elastic(shapes: Shapes) -> dict[str, dict[str, float | None]]:
    """GPU hours and attainment of the 12B and the 9B under the same arrivals, with constant and with elastic pools."""
    trace = load_trace(TRACE, duration_s=SECONDS * SCALE, scale=SCALE)
    found: dict[str, dict[str, float | None]] = {}
    for title, key in (("12B", WHOLE), ("9B", CHOSEN)):
        plan = shapes[key].plans[ELASTIC_CELL]
        deployment = None if plan is None else with_equal_workers(plan)
        if deployment is None:
            continue
        policies: tuple[PolicyName, ...] = ("static", "elastic")
        for policy in policies:
            run = simulate(deployment=deployment, workload=trace, policy=policy, slo=ELASTIC_SLO, model=shapes[key].spec)
            found[f"{title}, {policy}"] = {"gpu_hours": run.gpu_hours, "attainment": run.stats.attainment}
    return found


def _elastic(runs: Mapping[str, Mapping[str, float | None]]) -> Claim:
    def hours(name: str) -> float | None:
        return runs.get(name, {}).get("gpu_hours")

    def saved(title: str) -> float | None:
        static, moving = hours(f"{title}, static"), hours(f"{title}, elastic")
        return None if static is None or moving is None or not static else 1 - moving / static

    whole, small = saved("12B"), saved("9B")
    both = None if (a := hours("12B, static")) is None or (b := hours("9B, elastic")) is None else 1 - b / a
    told = ", ".join(
        f"{name} {run['gpu_hours']:.2f} GPU h, {run['attainment']:.0%} in time"
        for name, run in runs.items()
        if run["gpu_hours"] is not None and run["attainment"] is not None
    )
    return _claim(
        "J6", "compression and elastic scaling save GPU hours on top of one another",
        told or "not simulated", None if whole is None or small is None or both is None else both > max(whole, 0.0),
        f"elastic pools save {'-' if whole is None else f'{whole:.0%}'} of the 12B's hours and "
        f"{'-' if small is None else f'{small:.0%}'} of the 9B's; both together {'-' if both is None else f'{both:.0%}'}",
        runs=dict(runs),
    )  # fmt: skip


def _row(c: Candidate) -> dict[str, Any]:
    layers, hidden, ffn, heads = c.key
    return {
        "layers": layers, "hidden_size": hidden, "ffn_size": ffn, "mamba_heads": heads, "parameters": c.spec.parameters,
        "total_bytes": c.total_bytes, "a10g_tokens_per_s": c.fixed_batch,
        "per_gpu": {cell_text(cell): c.per_gpu(cell) for cell in cells()},
        "gain": {cell_text(cell): c.gain(cell) for cell in cells()},
    }  # fmt: skip


def _plane(shapes: Shapes) -> Figure:
    panels = []
    for cell in cells():
        series = []
        for depth in DEPTHS:
            there = [(c, rate) for c in shapes.values() if c.key[0] == depth and (rate := c.per_gpu(cell)) is not None]
            x, y = [c.total_bytes / GIB for c, _ in there], [rate for _, rate in there]
            series.append(Series(name=f"{depth} layers", x=x, y=y, text=[c.spec.name for c, _ in there], style="markers"))
        panels.append(Panel(title=cell_text(cell), series=tuple(series)))
    return Figure(
        title="Bytes against service",
        note="Each point is a shape with its best deployment; bytes of weights, cache and state at 128k tokens.",
        x_title="GiB at 128k tokens",
        y_title="output tokens/s a GPU",
        panels=tuple(panels),
    )


def _gains(shapes: Shapes) -> Figure:
    names = [cell_text(cell) for cell in cells()]
    series = []
    for title, key in (("12B", WHOLE), ("9B", CHOSEN)):
        there = [(i, gain) for i, cell in enumerate(cells()) if (gain := shapes[key].gain(cell)) is not None]
        series.append(Series(name=title, x=[float(i) for i, _ in there], y=[gain for _, gain in there], style="markers"))
    return Figure(
        title="What splitting prefill from decode gains",
        note=f"Best split over best shared deployment; {WORTH_SPLITTING} is worth it.",
        x_title="traffic and bound",
        y_title="gain",
        panels=(Panel(title="12B and 9B", series=tuple(series)),),
        x_labels=tuple(names),
    )
