"""Where splitting prefill from decode is worth it: the 12B, the 9B and a Transformer of about its size in the same cells, and
up to which answers each of them splits."""

from __future__ import annotations

from collections.abc import Mapping

from tandem.plan.planner import WORTH_SPLITTING, Plan
from tandem.plan.rates import TOLERANCE
from tandem.spec.model import ModelSpec
from tandem.study.joint_claims import Shapes, claim
from tandem.study.joint_space import CHOSEN, WHOLE, Candidate, Cell, Setting, cell_text, cells, plan_of
from tandem.study.result import Claim, Figure, Panel, Series

PROMPTS = (8192, 4096)
ANSWERS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
TURN_TPOT_S = 0.02
Rows = Mapping[str, Mapping[Cell, Plan | None]]


def splits(c: Candidate, cell: Cell) -> bool | None:
    """Whether a split deployment is recommended; None where nothing meets the bounds."""
    mode = c.mode(cell)
    return None if mode is None else mode == "disaggregated"


def gain_text(c: Candidate, cell: Cell) -> str:
    """`1.07 (split)`."""
    if c.mode(cell) is None:
        return "not served"
    gain = c.gain(cell)
    return f"{'-' if gain is None else f'{gain:.2f}'} ({'split' if splits(c, cell) else 'shared'})"


def compression_claim(shapes: Shapes) -> Claim:
    """J4: the 12B beside the 9B."""
    whole, small = shapes[WHOLE], shapes[CHOSEN]
    both = [cell for cell in cells() if splits(whole, cell) is not None and splits(small, cell) is not None]
    flips = [
        f"{cell_text(c)}: {gain_text(whole, c)} to {gain_text(small, c)}" for c in both if splits(whole, c) != splits(small, c)
    ]
    only = [cell_text(c) for c in cells() if (splits(whole, c) is None) != (splits(small, c) is None)]
    return claim(
        "J4", "compressing the 12B to the 9B leaves the decision to split prefill from decode as it was",
        (f"it changes in {len(flips)} of {len(both)} cells" if flips else f"in all {len(both)} cells")
        + (f"; {len(only)} cells only one of them can serve" if only else ""),
        not flips if both else None,
        ("gain of splitting, 12B to 9B: " + "; ".join(flips) if flips else "the gain of splitting moves by little")
        + (f"; served by one alone: {', '.join(only)}" if only else ""),
        flips=flips, served_by_one=only, gains={cell_text(c): [whole.gain(c), small.gain(c)] for c in cells()},
    )  # fmt: skip


def tie(c: Candidate, cell: Cell) -> bool:
    """Whether a gain is nearer to the threshold than the share to which pools are balanced."""
    gain = c.gain(cell)
    return gain is not None and abs(gain / WORTH_SPLITTING - 1) <= TOLERANCE


def transformer_claim(small: Candidate, peers: Mapping[str, Candidate], rows: Rows) -> Claim:
    """J7: the 9B beside the first of these Transformers, and whether the others agree with it where the decision differs."""
    name, other = next(iter(peers.items()))
    both = [cell for cell in cells() if splits(small, cell) is not None and splits(other, cell) is not None]
    flips = [cell for cell in both if splits(small, cell) != splits(other, cell)]
    alone = [cell_text(c) for c in cells() if (splits(small, c) is None) != (splits(other, c) is None)]
    told = " | ".join(
        f"{cell_text(c)}: 9B {gain_text(small, c)}, "
        + ", ".join(f"{title} {gain_text(peer, c)}" for title, peer in peers.items())
        for c in flips
    )
    ties = [cell_text(c) for c in flips if tie(small, c) and tie(other, c)]
    counts = {title: (sum(worth(plan) for plan in row.values()), sum(plan is not None for plan in row.values()))
              for title, row in rows.items()}  # fmt: skip
    why = [_shares(small, other, name, flips), f"{', '.join(ties)} is a tie: both gains are within {TOLERANCE:.0%} of "
           f"{WORTH_SPLITTING}, to which pools are balanced" if ties else "",
           f"over prompts of {' and '.join(map(str, PROMPTS))} and answers of {ANSWERS[0]} to {ANSWERS[-1]} tokens at "
           f"{TURN_TPOT_S * 1e3:.0f} ms splitting is worth it for "
           + ", ".join(f"{title} in {n} of {of}" for title, (n, of) in counts.items())
           + ": whole instances in one budget make a single cell's gain jump, their number is steadier",
           f"{name} has {other.spec.parameters / small.spec.parameters:.2f} of the 9B's parameters"]  # fmt: skip
    return claim(
        "J7", f"a Transformer of about the 9B's size ({name}) is split where the 9B is",
        (f"not in {len(flips)} of {len(both)} cells: {told}" if flips else f"in all {len(both)} cells")
        + (f"; {len(alone)} cells only one of them can serve" if alone else ""),
        not flips if both else None, "; ".join(part for part in why if part),
        flips=[cell_text(c) for c in flips], served_by_one=alone, ties=ties, worth_splitting=counts,
        gains={cell_text(c): {"9B": small.gain(c)} | {title: p.gain(c) for title, p in peers.items()} for c in cells()},
    )  # fmt: skip


def _shares(small: Candidate, other: Candidate, name: str, where: list[Cell]) -> str:
    """The share of GPUs that prefill, and what decides it: bytes that a decode step reads a sequence."""
    told = [
        f"{cell_text(c)} {a:.0%} and {b:.0%}"
        for c in where
        if (a := prefill_share(small, c)) is not None and (b := prefill_share(other, c)) is not None
    ]
    if not told:
        return ""
    isl = where[0][0]
    held = ((c.spec.state_bytes_per_sequence() + c.spec.kv_bytes(isl)) / 1e6 for c in (small, other))
    return (
        f"of the GPUs of their best split deployments prefill takes {'; '.join(told)} (9B and {name}): after {isl} tokens a "
        "decode step reads {:,.0f} and {:,.0f} MB a sequence".format(*held)
    )


def prefill_share(c: Candidate, cell: Cell) -> float | None:
    """Share of the GPUs of the best split deployment that prefill."""
    plan = c.plans[cell]
    if plan is None or plan.disaggregated is None:
        return None
    deployment = plan.disaggregated.deployment
    assert deployment.prefill is not None
    return deployment.prefill.gpus / deployment.gpus


def answer_rows(specs: Mapping[str, ModelSpec], setting: Setting) -> Rows:
    """Plans of each model for prompts and answers of many lengths, at one bound."""
    grid = [(isl, osl, TURN_TPOT_S) for isl in PROMPTS for osl in ANSWERS]
    return {title: {cell: plan_of(spec, cell, setting) for cell in grid} for title, spec in specs.items()}


def worth(plan: Plan | None) -> bool:
    """Whether a plan splits."""
    return plan is not None and plan.best.deployment.mode == "disaggregated"


def answers_figure(rows: Rows) -> Figure:
    """Gain against the answers' length, prompt length by prompt length."""
    panels = []
    for isl in PROMPTS:
        series = []
        for title, row in rows.items():
            there = [(cell[1], plan.gain) for cell, plan in row.items() if cell[0] == isl and plan and plan.gain is not None]
            series.append(Series(name=title, x=[float(osl) for osl, _ in there], y=[gain for _, gain in there]))
        level = [float(ANSWERS[0]), float(ANSWERS[-1])]
        series.append(Series(name="worth it", x=level, y=[WORTH_SPLITTING] * 2, role="printed", style="dash"))
        panels.append(Panel(title=f"prompts of {isl:,} tokens at {TURN_TPOT_S * 1e3:.0f} ms", series=tuple(series)))
    return Figure(
        title="Where the answer to splitting turns",
        note="Best split over best shared deployment, against the tokens of an answer.",
        x_title="output tokens",
        y_title="gain",
        panels=tuple(panels),
        x_log=True,
    )


def gains_figure(models: Mapping[str, Candidate]) -> Figure:
    """Gain in every cell, model by model."""
    series = []
    for title, c in models.items():
        there = [(i, gain) for i, cell in enumerate(cells()) if (gain := c.gain(cell)) is not None]
        series.append(Series(name=title, x=[float(i) for i, _ in there], y=[gain for _, gain in there], style="markers"))
    return Figure(
        title="What splitting prefill from decode gains",
        note=f"Best split over best shared deployment; {WORTH_SPLITTING} is worth it.",
        x_title="prompt/answer tokens, ms a token",
        y_title="gain",
        panels=(Panel(title=", ".join(models), series=tuple(series)),),
        x_labels=tuple(f"{isl}/{osl}, {tpot_s * 1e3:.0f}" for isl, osl, tpot_s in cells()),
    )
