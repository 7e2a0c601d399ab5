"""What the study of pre-training asks of the runs, beside what papers print where they print anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from tandem.study.pretraining_runs import TrainingRun
from tandem.study.result import Claim
from tandem.study.seeds import Paired, claim_of_runs, paired, told

Runs = Mapping[str, Mapping[int, TrainingRun]]
Measure = Callable[[TrainingRun], float | None]
GAP = 0.01
"""Largest loss gap of a narrower number format (share of the loss)."""
HYBRID, TRANSFORMER, FP8, FP8_TENSOR, FP32, ONE_BLEND, LONG, SHORT = (
    "hybrid", "transformer", "hybrid-fp8", "hybrid-fp8-tensor", "hybrid-fp32", "one-blend", "long", "short",
)  # fmt: skip
"""Names of the variants. `short` goes on as `long` does, with the same tokens, but without long sequences and documents."""
PAPER_A = "paper A (arXiv:2508.14444), section 2"


def claims_of(runs: Runs) -> tuple[Claim, ...]:
    """Those claims whose runs are there, in order."""
    made = (
        _gap("P1", runs, HYBRID, FP8, "FP8 blocks lose at most 1 % against bf16", "no gap in figures: FP8 is called stable"),
        _gap("P2", runs, FP32, FP8, "FP8 blocks lose at most 1 % against fp32", None),
        _gap("P3", runs, HYBRID, FP8_TENSOR, "FP8 with a scale a tensor loses at most 1 % against bf16", None),
        _hybrid_loss(runs),
        _hybrid_answers(runs),
        _phases_loss(runs),
        _phases_answers(runs),
        _long_loss(runs),
        _long(runs),
        _kept(runs),
    )
    return tuple(claim for claim in made if claim is not None)


def held_out(run: TrainingRun) -> float | None:
    """Held-out loss, mean of the sources."""
    return run.held_out_loss


def answers(run: TrainingRun) -> float | None:
    """Verified answers, mean of the tasks."""
    return run.mean_accuracy


def of_source(name: str) -> Measure:
    """Held-out loss of one source."""
    return lambda run: run.held_out.get(name)


def at_length(length: int) -> Measure:
    """Needles found at one length, mean of the kinds."""
    return lambda run: run.needles_at(length)


def _pair(runs: Runs, a: str, b: str, measure: Measure, *, relative: bool = False) -> Paired | None:
    return paired(runs.get(a, {}), runs.get(b, {}), measure, relative=relative)


def _gap(id: str, runs: Runs, wide: str, narrow: str, title: str, printed: str | None) -> Claim | None:
    held = _pair(runs, wide, narrow, held_out, relative=True)
    trained = _pair(runs, wide, narrow, lambda run: run.final_loss, relative=True)
    if held is None or trained is None:
        return None
    ours = f"held-out loss {told(held)}, training loss of the last twentieth {told(trained)}"
    holds = held.high <= GAP and trained.high <= GAP
    worst = max((held, trained), key=lambda found: found.high)
    why = (
        f"the interval's upper end is {_percent(worst.high)}; pairs share weights and data order, so only number formats differ"
    )
    source = PAPER_A + ".4" if printed else "this study"
    return claim_of_runs(id, title, printed, ours, holds, why, source, held_out=held, training=trained)


def _percent(value: float) -> str:
    return "unknown, one seed having no interval" if value == inf else f"{100 * value:+.2f} %"


def _by_source(runs: Runs, a: str, b: str) -> dict[str, Paired]:
    names = {name for variant in (a, b) for run in runs.get(variant, {}).values() for name in run.held_out}
    found = {name: _pair(runs, a, b, of_source(name), relative=True) for name in sorted(names)}
    return {name: pair for name, pair in found.items() if pair is not None}


def _sources_told(sources: Mapping[str, Paired]) -> str:
    return ", ".join(f"{name} {100 * pair.mean:+.2f} %" for name, pair in sources.items())


def _hybrid_loss(runs: Runs) -> Claim | None:
    found = _pair(runs, TRANSFORMER, HYBRID, held_out, relative=True)
    if found is None:
        return None
    sources = _by_source(runs, TRANSFORMER, HYBRID)
    return claim_of_runs(
        "P4", "at equal tokens and parameters the hybrid's held-out loss is no higher than the Transformer's",
        "on par or better (answers of 8B and 56B)", told(found), found.low <= 0,
        f"by source {_sources_told(sources)}; it fails only where the whole interval is above 0",
        "Nemotron-H (arXiv:2504.03624), abstract", loss=found, sources={k: v.to_json() for k, v in sources.items()},
    )  # fmt: skip


def _hybrid_answers(runs: Runs) -> Claim | None:
    found = _pair(runs, TRANSFORMER, HYBRID, answers)
    if found is None:
        return None
    return claim_of_runs(
        "P5", "at equal tokens and parameters the hybrid answers no fewer problems than the Transformer",
        "on par or better (answers of 8B and 56B)", told(found, "points", 1), found.high >= 0,
        _tasks_told(runs, TRANSFORMER, HYBRID), "Nemotron-H (arXiv:2504.03624), abstract", accuracy=found,
    )  # fmt: skip


def _tasks_told(runs: Runs, a: str, b: str) -> str:
    def task_of(name: str) -> Measure:
        return lambda run: run.accuracy[name]["accuracy"] if name in run.accuracy else None

    names = sorted({name for run in runs.get(b, {}).values() for name in run.accuracy})
    found = {name: _pair(runs, a, b, task_of(name)) for name in names}
    parts = [f"{name} {100 * pair.mean:+.1f} points" for name, pair in found.items() if pair is not None]
    return f"{b} over {a}: {', '.join(parts)}"


def _phases_loss(runs: Runs) -> Claim | None:
    sources = _by_source(runs, ONE_BLEND, HYBRID)
    favoured = sources.get("reasoning")
    if favoured is None:
        return None
    return claim_of_runs(
        "P6", "three phases end with a lower loss on what the last one favours than one blend of the same tokens", None,
        f"reasoning {told(favoured)}", favoured.high < 0,
        f"by source {_sources_told(sources)}: sources that left the blend early are paid with; each source has as many tokens "
        "in both runs", "this study; " + PAPER_A + ", has three phases and no comparison", reasoning=favoured,
        sources={k: v.to_json() for k, v in sources.items()},
    )  # fmt: skip


def _phases_answers(runs: Runs) -> Claim | None:
    found = _pair(runs, ONE_BLEND, HYBRID, answers)
    if found is None:
        return None
    return claim_of_runs(
        "P7", "three phases answer more problems than one blend of the same tokens", None, told(found, "points", 1),
        found.low > 0, _tasks_told(runs, ONE_BLEND, HYBRID), "this study", accuracy=found,
    )  # fmt: skip


def needle_lengths(runs: Runs) -> list[int]:
    """Lengths at which needles were asked for in any run."""
    return sorted({n for by_seed in runs.values() for run in by_seed.values() for by in run.needles.values() for n in by})


QUESTIONS = "long-questions"
"""The source of long documents with questions at their ends."""


def _long_loss(runs: Runs) -> Claim | None:
    def measure(run: TrainingRun) -> float | None:
        return run.long_held_out.get(QUESTIONS)

    found = _pair(runs, HYBRID, LONG, measure, relative=True)
    if found is None:
        return None
    control = _pair(runs, SHORT, LONG, measure, relative=True)
    beside = "" if control is None else f"; beside as many more tokens at the old length {told(control)}"
    return claim_of_runs(
        "P8", "the long-context phase lowers the loss of questions at the end of long documents", None,
        f"{told(found)}{beside}", found.high < 0 and (control is None or control.high < 0),
        f"nats a token {_mean(found.a):.3f} before and {_mean(found.b):.3f} after, on documents that were not learned from; "
        "part of it is the questions' form, which only the long phase has seen: the needles say what was looked up",
        "this study", before=found, **({} if control is None else {"control": control}),
    )  # fmt: skip


def _long(runs: Runs) -> Claim | None:
    lengths = needle_lengths(runs)
    if not lengths:
        return None
    longest = lengths[-1]
    found = _pair(runs, HYBRID, LONG, at_length(longest))
    if found is None:
        return None
    all_lengths = {n: _pair(runs, HYBRID, LONG, at_length(n)) for n in lengths}
    shown = {n: pair for n, pair in all_lengths.items() if pair is not None}
    control = _pair(runs, SHORT, LONG, at_length(longest))
    beside = "" if control is None else f"; over as many more tokens at the old length {told(control, 'points', 1)}"
    return claim_of_runs(
        "P9", "the long-context phase finds needles at lengths that the base model does not",
        "RULER at 128k rises with the phase's length: 73.7 at 128k to 81.0 at 512k",
        f"at {longest:,} tokens {told(found, 'points', 1)}{beside}", found.low > 0 and (control is None or control.low > 0),
        ", ".join(f"{n:,} tokens {_mean(pair.a):.0%} to {_mean(pair.b):.0%}" for n, pair in shown.items()),
        PAPER_A + ", table 4", needles={str(n): pair.to_json() for n, pair in shown.items()},
    )  # fmt: skip


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _kept(runs: Runs) -> Claim | None:
    found = _pair(runs, HYBRID, LONG, answers)
    if found is None:
        return None
    return claim_of_runs(
        "P10", "the long-context phase costs at most 2 points of the short problems", None, told(found, "points", 1),
        found.low >= -0.02, _tasks_told(runs, HYBRID, LONG), "this study", accuracy=found,
    )  # fmt: skip
