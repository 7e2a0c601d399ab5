"""What the elastic study asks, and its verdicts: targets of the project, and figures 9 and 10 of paper B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.study.elastic_ratio import PAPER_MIX, Ratios
from tandem.study.result import Claim

if TYPE_CHECKING:
    from tandem.study.elastic import CellOutcome

SHARE_OF_PEAK, OVER_BOUND = 0.70, 1.15
"""Targets: GPU hours over those of static-by-peak, and over the clairvoyant bound."""
WANTED = 0.95
"""Share of the requests: the objectives' percentile, and what the static best must attain."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's 97.5 % quantiles by the number of values."""
DAY = "servegen"
BACKEND = "vllm"
Row = Mapping[str, Any]


def better(a: Row, b: Row) -> bool:
    """Whether a dominates b: attainment no lower with fewer GPU hours, or higher with no more."""
    more, less = a["attainment"] - b["attainment"], b["gpu_hours"] - a["gpu_hours"]
    return bool((more >= -1e-12 and less > 1e-9) or (more > 1e-12 and less >= -1e-9))


def over_static(row: Row, static: Sequence[Row]) -> float | None:
    """GPU hours over those of constant sizes with the same attainment, on straight lines between the best of those tried; None
    where none attains as much, or all attain more."""
    frontier: list[tuple[float, float]] = []
    for tried in sorted(static, key=lambda r: (r["gpu_hours"], -r["attainment"])):
        if not frontier or tried["attainment"] > frontier[-1][1]:
            frontier.append((tried["gpu_hours"], tried["attainment"]))
    wanted = row["attainment"]
    if not frontier or not frontier[0][1] <= wanted <= frontier[-1][1]:
        return None
    hours = float(np.interp(wanted, [a for _, a in frontier], [h for h, _ in frontier]))
    return float(row["gpu_hours"]) / hours


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of Student's 95 % interval; infinite for one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("inf")
    return float(np.mean(values)), T_95.get(n, 1.96) * float(np.std(values, ddof=1)) / sqrt(n)


def claims_of(
    main: Sequence[CellOutcome], seeds: Sequence[CellOutcome], split: Ratios, rules: Sequence[str]
) -> tuple[Claim, ...]:
    """All claims with verdicts."""
    days = [o for o in main if o.cell.startswith(DAY)] or list(main)
    return (
        _peak(days),
        _bound(days),
        _controllers(main, rules),
        _frontier(main),
        _objective(main, rules),
        _seeds(seeds),
        _moves(split),
        _fixed(split),
        _mixes(split),
    )


def _claim(id_: str, title: str, printed: str | None, ours: str, holds: bool, why: str, source: str, **values: Any) -> Claim:
    return Claim(
        id=id_, title=title, printed=printed, ours=ours, holds=holds, holds_engine=None, why=why, source=source,
        ours_by={BACKEND: ours}, values=values,
    )  # fmt: skip


def _of(o: CellOutcome, one: str, other: str) -> str:
    a, b = o.row(one), o.row(other)
    return (
        f"{o.cell}: {a['attainment']:.1%} with {a['gpu_hours']:.0f} GPU hours, {other} {b['attainment']:.1%} with "
        f"{b['gpu_hours']:.0f}"
    )


def _peak(days: Sequence[CellOutcome]) -> Claim:
    shares = {o.cell: o.row("elastic")["gpu_hours"] / o.row("peak")["gpu_hours"] for o in days}
    lower = {o.cell: o.row("elastic")["attainment"] - o.row("peak")["attainment"] for o in days}
    ok = [c for c in shares if shares[c] <= SHARE_OF_PEAK and lower[c] >= -1e-12]
    ours = f"holds in {len(ok)} of {len(days)}: " + "; ".join(
        f"{c.split('/')[1]} {shares[c]:.0%} of the hours, {100 * lower[c]:+.1f} points" for c in shares
    )
    return _claim(
        "E1", "over the day, joint scaling attains what static-by-peak does with at most 70 % of its GPU hours", "at most 70 %",
        ours, len(ok) == len(days), ". ".join(_of(o, "elastic", "peak") for o in days), "target of this project",
        share=shares, points=lower,
    )  # fmt: skip


def _bound(days: Sequence[CellOutcome]) -> Claim:
    over = {o.cell: o.row("elastic")["gpu_hours"] / o.bound["sized"] for o in days}
    ok = [c for c, x in over.items() if x <= OVER_BOUND]
    why = ". ".join(
        f"{o.cell}: sized {o.bound['sized']:.0f}, whole {o.bound['whole']:.0f}, work {o.bound['work']:.0f} GPU hours; "
        f"simulated, the clairvoyant's sizes attain {_attained(o, 'clairvoyant')}, at utilisation 0.65 "
        f"{_attained(o, 'clairvoyant 0.65')}, ours {o.row('elastic')['attainment']:.1%} with "
        f"{o.row('elastic')['gpu_hours']:.0f}"
        for o in days
    )
    return _claim(
        "E2", "over the day, joint scaling is within 15 % of the clairvoyant bound at the same utilisation", "at most 1.15",
        f"holds in {len(ok)} of {len(days)}: " + "; ".join(f"{c.split('/')[1]} {x:.2f}" for c, x in over.items()),
        len(ok) == len(days), why, "target of this project", over=over,
    )  # fmt: skip


def _attained(o: CellOutcome, policy: str) -> str:
    rows = [row for row in o.rows if row["policy"] == policy]
    return f"{rows[0]['attainment']:.1%} with {rows[0]['gpu_hours']:.0f}" if rows else "nothing that was run"


def _controllers(main: Sequence[CellOutcome], rules: Sequence[str]) -> Claim:
    counts, lines = {}, []
    for rule in rules:
        won = [o.cell for o in main if better(o.row("elastic"), o.row(rule))]
        lost = [o.cell for o in main if better(o.row(rule), o.row("elastic"))]
        counts[rule] = {"better": len(won), "worse": len(lost), "not comparable": len(main) - len(won) - len(lost)}
        missed = sum(o.row(rule)["attainment"] < WANTED <= o.row("elastic")["attainment"] for o in main)
        counts[rule]["it missed the objective that ours kept"] = missed
        lines += [f"worse than {rule} in {', '.join(lost)}"] if lost else []
        rest = [o for o in main if o.cell not in won and o.cell not in lost]
        lines += [_of(o, "elastic", rule) for o in rest]
    ours = "; ".join(
        f"{rule}: better in {c['better']}, worse in {c['worse']}, not comparable in {c['not comparable']} of {len(main)} "
        f"(it missed the objective that ours kept in {c['it missed the objective that ours kept']})"
        for rule, c in counts.items()
    )
    return _claim(
        "E3", "joint scaling is better than every independent controller on every traffic and service", "every one", ours,
        all(c["better"] == len(main) for c in counts.values()),
        "; ".join(lines) or "attainment is no lower with fewer GPU hours, or higher with no more, everywhere",
        "target of this project", counts=counts,
    )  # fmt: skip


def _frontier(main: Sequence[CellOutcome]) -> Claim:
    shares = {o.cell: over_static(o.row("elastic"), o.static) for o in main}
    judged = {c: x for c, x in shares.items() if x is not None}
    fewer = [c for c, x in judged.items() if x < 1.0]
    ours = f"fewer in {len(fewer)} of {len(judged)} cells: " + "; ".join(f"{c} {x:.0%}" for c, x in judged.items())
    missing = [c for c, x in shares.items() if x is None]
    why = "constant sizes that were tried, straight lines between" + (
        f"; none attains as much in {', '.join(missing)}" if missing else ""
    )
    return _claim(
        "E4", "at equal attainment joint scaling takes fewer GPU hours than constant sizes, which know the traffic",
        None, ours, bool(judged) and len(fewer) == len(judged), why, "this study", shares=shares,
    )  # fmt: skip


def _objective(main: Sequence[CellOutcome], rules: Sequence[str]) -> Claim:
    met = {p: sum(o.row(p)["attainment"] >= WANTED for o in main) for p in ("elastic", "peak", *rules)}
    worst = {p: min(o.row(p)["attainment"] for o in main) for p in met}
    ours = "; ".join(f"{p} in {n} of {len(main)} (least {worst[p]:.1%})" for p, n in met.items())
    misses = ", ".join(
        f"{o.cell} {o.row('elastic')['attainment']:.1%}" for o in main if o.row("elastic")["attainment"] < WANTED
    )
    return _claim(
        "E5", "joint scaling keeps the objective (95 % of the requests) on every traffic and service", None, ours,
        met["elastic"] == len(main), f"missed in {misses}" if misses else "kept everywhere", "this study",
        met=met, least=worst,
    )  # fmt: skip


def _seeds(seeds: Sequence[CellOutcome]) -> Claim:
    shares = [o.row("elastic")["gpu_hours"] / o.row("peak")["gpu_hours"] for o in seeds]
    points = [o.row("elastic")["attainment"] - o.row("peak")["attainment"] for o in seeds]
    (share, share_half), (point, point_half) = interval(shares), interval(points)
    ours = (
        f"{seeds[0].cell}, {len(seeds)} draws: {share:.1%} +- {share_half:.1%} of static-by-peak's hours, "
        f"{100 * point:+.2f} +- {100 * point_half:.2f} points of attainment (95 % intervals)"
    )
    return _claim(
        "E6", "another draw of the day changes neither by much: the interval of the share of hours is within 10 points", None,
        ours, share_half <= 0.10, f"shares {', '.join(f'{x:.3f}' for x in shares)}", "this study", shares=shares, points=points,
    )  # fmt: skip


def _tpots(split: Ratios) -> list[float]:
    return sorted({s.tpot_s for s in split.by_tpot})


def _moves(split: Ratios) -> Claim:
    tpots = _tpots(split)
    best = {t: split.best(split.by_tpot, t) for t in tpots}
    ratio = {t: b.prefill / b.decode for t, b in best.items()}
    ours = f"{PAPER_MIX[0]}/{PAPER_MIX[1]}: " + "; ".join(
        f"TPOT {1e3 * t:.0f} ms {best[t].prefill}:{best[t].decode}, {best[t].rps:.2f} requests/s" for t in tpots
    )
    falls = all(ratio[a] <= ratio[b] + 1e-12 for a, b in pairwise(tpots)) and ratio[tpots[0]] < ratio[tpots[-1]]
    why = "fewer sequences fit a shorter step, so that the same requests need more decode workers"
    if not falls:
        why += f"; but the best split goes {', '.join(f'{x:.2f}' for x in ratio.values())} as TPOT grows, in whole workers"
    return _claim(
        "F9", "as TPOT tightens, a smaller share of the workers should prefill", "3.64 down to 0.056 (figure 9, GPUs, B200)",
        ours, falls, why, "paper B, figure 9", ratio={f"{t:g}": x for t, x in ratio.items()},
    )  # fmt: skip


def _fixed(split: Ratios) -> Claim:
    tpots = _tpots(split)
    ends = [(tpots[-1], tpots[0]), (tpots[0], tpots[-1])]
    kept = {f"{a:g} at {b:g}": split.kept(split.by_tpot, b, split.best(split.by_tpot, a).prefill) for a, b in ends}
    loose, tight = kept.values()
    ours = (
        f"the split for TPOT {1e3 * tpots[-1]:.0f} ms keeps {loose:.0%} at {1e3 * tpots[0]:.0f} ms; that for "
        f"{1e3 * tpots[0]:.0f} ms keeps {tight:.0%} at {1e3 * tpots[-1]:.0f} ms"
    )
    return _claim(
        "F10", "a split that fits one latency target loses half or more of the requests at another",
        "ratio 3.5 keeps 5 % at the tight end, ratio 0.5 43 % at the relaxed one", ours, min(loose, tight) <= 0.5,
        "requests/s within TTFT 10 s and TPOT, over those of the best split there", "paper B, figure 10", kept=kept,
    )  # fmt: skip


def _mixes(split: Ratios) -> Claim:
    mixes = list(dict.fromkeys(s.mix for s in split.by_mix))
    best = {m: split.best(split.by_mix, m) for m in mixes}
    kept = {m: {n: split.kept(split.by_mix, n, best[m].prefill) for n in mixes} for m in mixes}
    least = min(x for row in kept.values() for x in row.values())
    ours = "; ".join(f"{m[0]}/{m[1]} {best[m].prefill}:{best[m].decode}" for m in mixes) + f"; the worst pair keeps {least:.0%}"
    return _claim(
        "F9b", "the split for one traffic mix loses a third or more of the requests of another", None, ours, least <= 2 / 3,
        "; ".join(f"sized for {m[0]}/{m[1]}: " + ", ".join(f"{n[0]}/{n[1]} {x:.0%}" for n, x in row.items())
                  for m, row in kept.items()), "this study",
        kept={f"{m[0]}/{m[1]}": {f"{n[0]}/{n[1]}": x for n, x in row.items()} for m, row in kept.items()},
    )  # fmt: skip
