"""Figures of the elastic study as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.study.elastic_ratio import Ratios
from tandem.study.result import Figure, Panel, Series

if TYPE_CHECKING:
    from tandem.study.elastic import CellOutcome


def figures_of(main: Sequence[CellOutcome], split: Ratios) -> dict[str, Figure]:
    """Attainment against GPU hours for each traffic, sizes over time, and fixed ratios."""
    traffics = list(dict.fromkeys(o.cell.split("/")[0] for o in main))
    found = {f"hours-{t}": _hours(t, [o for o in main if o.cell.startswith(f"{t}/")]) for t in traffics}
    first = [o for o in main if o.cell.startswith(f"{traffics[0]}/")]
    return found | {"sizes": _sizes(first), "ratio-tpot": _by_tpot(split), "ratio-mix": _by_mix(split)}


def _hours(traffic: str, outcomes: Sequence[CellOutcome]) -> Figure:
    panels = []
    for o in outcomes:
        sized = o.bound["sized"]
        tried = sorted(o.static, key=lambda row: float(row["gpu_hours"]))
        series = [
            Series(
                name="constant sizes", x=[r["gpu_hours"] / sized for r in tried], y=[r["attainment"] for r in tried],
                text=[r["policy"] for r in tried], style="dash",
            )
        ]  # fmt: skip
        rows = [*o.rows, *([{**o.static_best, "policy": "static best"}] if o.static_best else [])]
        for r in rows:
            text = f"{r['gpu_hours']:.0f} GPU hours, {r['changes']} changes"
            series.append(
                Series(name=r["policy"], x=[r["gpu_hours"] / sized], y=[r["attainment"]], text=[text], style="markers")
            )
        panels.append(Panel(title=o.cell.split("/")[1], series=tuple(series)))
    return Figure(
        title=f"{traffic}: attainment against GPU hours",
        note="Up and to the left is better. 1 is the clairvoyant bound at the utilisation that all sizing uses.",
        x_title="GPU hours over the clairvoyant bound",
        y_title="requests within the objective",
        panels=tuple(panels),
    )


def _sizes(outcomes: Sequence[CellOutcome]) -> Figure:
    panels = []
    for o in outcomes:
        series = []
        for key, name, style in (("elastic", "joint scaling", "line"), ("sized", "clairvoyant", "dash")):
            for role in ("prefill", "decode"):
                c = o.series[key]
                series.append(Series(name=f"{role}, {name}", x=c["at_h"], y=c[role], style=style))  # type: ignore[arg-type]
        panels.append(Panel(title=o.cell.split("/")[1], series=tuple(series)))
    return Figure(
        title="Pool sizes over time",
        note="Workers that are up, and what the clairvoyant has at each minute.",
        x_title="hours",
        y_title="workers",
        panels=tuple(panels),
    )


def _by_tpot(split: Ratios) -> Figure:
    tpots = sorted({s.tpot_s for s in split.by_tpot})
    best = [split.best(split.by_tpot, t) for t in tpots]
    fixed = sorted({b.prefill for b in best} | {max(1, split.workers // 4), split.workers * 3 // 4})
    x = [1e3 * t for t in tpots]
    lines = [
        Series(name=f"{p} of {split.workers} prefill", x=x, y=[split.kept(split.by_tpot, t, p) for t in tpots]) for p in fixed
    ]
    return Figure(
        title="A fixed ratio as the latency target moves (figures 9 and 10 of paper B, simulated)",
        note="DeepSeek-R1, 16,384/2,048: requests/s within the objective, over those of the best split at that target.",
        x_title="TPOT objective, ms",
        y_title="share of the best split's requests/s; share of workers",
        panels=(
            Panel(title="What a fixed split keeps", series=tuple(lines)),
            Panel(
                title="Best share of prefill workers",
                series=(Series(name="best split", x=x, y=[b.prefill / split.workers for b in best]),),
            ),
        ),
    )


def _by_mix(split: Ratios) -> Figure:
    mixes = list(dict.fromkeys(s.mix for s in split.by_mix))
    prefill = sorted({s.prefill for s in split.by_mix})
    return Figure(
        title="A fixed ratio as the traffic moves",
        note="Requests/s within the objective of each split, over those of the best split for that mix of lengths.",
        x_title=f"prefill workers of {split.workers}",
        y_title="share of the best split's requests/s",
        panels=(
            Panel(
                title="TPOT 40 ms",
                series=tuple(
                    Series(name=f"{m[0]}/{m[1]}", x=prefill, y=[split.kept(split.by_mix, m, p) for p in prefill]) for m in mixes
                ),
            ),
        ),
    )
