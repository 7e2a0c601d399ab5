"""What compression and deployment do to each other, shape by shape: J1, J2, J3 and J5; and what all claims share."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from tandem.spec.units import GIB
from tandem.study.joint_space import CHOSEN, TRAFFIC, WHOLE, Candidate, Cell, Key, cell_text, cells
from tandem.study.result import Claim

BACKEND = "vllm"
SOURCE = "this study"
NOT_JUDGED = "too few shapes are served in any cell"
Shapes = Mapping[Key, Candidate]


def claim(id: str, title: str, ours: str, holds: bool | None, why: str, **values: Any) -> Claim:
    """One of this study's, of which nobody has printed any."""
    return Claim(
        id=id, title=title, printed=None, ours=ours, holds=holds, holds_engine=None, why=why, source=SOURCE,
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


def winner_claim(shapes: Shapes) -> Claim:
    """J1: among shapes of about the 9B's size, what one GPU at a fixed batch prefers against what a cluster prefers."""
    title = "the shape that one GPU at a fixed batch prefers is the one that a cluster under bounds prefers"
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
    if not wins:
        return claim("J1", title, "not judged", None, NOT_JUDGED)
    other = {text: name for text, name in wins.items() if name != alone.spec.name}
    told = "; ".join(f"{text}: {name}" for text, name in other.items())
    return claim(
        "J1", title,
        f"in {len(wins) - len(other)} of {len(wins)} cells; rank correlation of {len(near)} shapes {mean(correlations):.2f}",
        not other,
        f"within 5 % of the 9B's parameters one A10G at batch 8 prefers {alone.spec.name}"
        + (f"; a cluster prefers {told}" if other else ""),
        wins=wins, correlations=correlations,
    )  # fmt: skip


def service_claim(shapes: Shapes) -> Claim:
    """J2: how much more of a GPU the 9B makes."""
    title = "the 9B serves more a GPU than the 12B by more than it is smaller"
    ratios = {}
    for cell in cells():
        small, whole = shapes[CHOSEN].per_gpu(cell), shapes[WHOLE].per_gpu(cell)
        if small is not None and whole is not None:
            ratios[cell_text(cell)] = small / whole
    if not ratios:
        return claim("J2", title, "not judged", None, NOT_JUDGED)
    lost = shapes[CHOSEN].spec.parameters / shapes[WHOLE].spec.parameters
    low, high = min(ratios, key=lambda k: ratios[k]), max(ratios, key=lambda k: ratios[k])
    return claim(
        "J2", title,
        f"{ratios[low]:.2f} ({low}) to {ratios[high]:.2f} times ({high}); it has {lost:.2f} of the parameters",
        all(ratio > 1 / lost for ratio in ratios.values()),
        f"1 / {lost:.2f} = {1 / lost:.2f} would be in proportion; prompts cost in proportion, decoding less where state and "
        "cache weigh beside weights, and more where a tighter bound leaves fewer sequences to share them", ratios=ratios,
    )  # fmt: skip


def bytes_claim(shapes: Shapes) -> Claim:
    """J3: equal bytes, unequal service, how far apart shapes of one size are."""
    title = "shapes of equal bytes serve alike, so that bytes are enough to search by"
    target = shapes[CHOSEN].total_bytes
    near = [c for c in shapes.values() if abs(c.total_bytes / target - 1) <= 0.03]
    spreads = {}
    for cell in cells():
        rates = [rate for c in near if (rate := c.per_gpu(cell)) is not None]
        if len(rates) > 1:
            spreads[cell_text(cell)] = max(rates) / min(rates) - 1
    if not spreads:
        return claim("J3", title, "not judged", None, NOT_JUDGED)
    widest = max(spreads, key=lambda k: spreads[k])
    return claim(
        "J3", title,
        f"{len(near)} shapes within 3 % of {target / GIB:.1f} GiB: {min(spreads.values()):.1%} to {spreads[widest]:.1%} apart",
        spreads[widest] < 0.05, f"furthest apart at {widest}; layers, heads and FFN size cost a step differently a byte",
        spreads=spreads, shapes=[c.spec.name for c in near],
    )  # fmt: skip


def moved_claim(shapes: Shapes) -> Claim:
    """J5, bytes alone: heads decide s0 of `s0 + k * isl`, attention layers decide k. J8 says what that changes."""
    base = shapes[CHOSEN]
    few = shapes[56, 4480, 15_680, 112]
    deep = shapes[62, 4480, 15_680, 128]
    k = {c.key: c.spec.kv_bytes_per_token() for c in (base, few, deep)}
    saved = base.state_bytes - few.state_bytes
    even = saved / (k[deep.key] - k[base.key])
    return claim(
        "J5", "what a split deployment moves is decided by attention layers, not by Mamba heads",
        f"16 heads fewer save {saved / 1e6:.1f} MB of {base.state_bytes / 1e6:.1f} a request; two attention layers fewer "
        f"{(k[deep.key] - k[base.key]) / 1024:.0f} KiB a token: as much from {even:,.0f} tokens on", even < TRAFFIC[-1][0],
        f"s0 + k * isl with k = {k[base.key] / 1024:.0f} KiB for {base.attention_layers} attention layers and "
        f"{k[deep.key] / 1024:.0f} for {deep.attention_layers}; the shortest prompts here have {TRAFFIC[-1][0]:,} tokens",
        state_bytes={"128 heads": base.state_bytes, "112 heads": few.state_bytes}, break_even_tokens=even,
    )  # fmt: skip
