"""What the study of compression asks of the runs, beside what papers print where they print anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tandem.study.alignment_claims import average, faster, longest, more, ratios, setting_named, told_points, verdict
from tandem.study.alignment_runs import Question, Throughput
from tandem.study.compression_runs import TEACHER, CompressionRun, StageResult
from tandem.study.result import Claim
from tandem.study.seeds import Paired, claim_of_runs, differences, paired, told

Runs = Mapping[str, Mapping[int, CompressionRun]]
Measure = Callable[[CompressionRun], float | None]
WHOLE, PRUNED, SCRATCH, CROSS_ENTROPY = "whole", "pruned", "scratch", "cross-entropy"
GROUP_BLIND, DEPTH_ONLY, WIDTH_ONLY = "group-blind", "depth-only", "width-only"
"""Names of the variants. `pruned` is one cut in width and one distillation; three others are it but for one thing."""
PAIRS = ((SCRATCH, PRUNED), (CROSS_ENTROPY, PRUNED), (GROUP_BLIND, PRUNED), (DEPTH_ONLY, WIDTH_ONLY))
"""Variants that are compared: the second is claimed to be the better one."""
EQUAL = 0.01
"""What the bytes of two models of a pair may differ by, as a share; ours."""
NEAR = 0.02
"""How far below its teacher a model may be, as a share of all questions (2 points); this project's target."""
SHARE = 0.7
"""Of the teacher's bytes, at most; this project's target."""
MINITRON = "Minitron (arXiv:2407.14679)"
_FEW = "too few seeds to decide"


def claims_of(runs: Runs, throughput: Throughput | None) -> tuple[Claim, ...]:
    """Those claims whose runs are there, in order."""
    made = (
        _scratch(runs),
        _cross_entropy(runs),
        _groups(runs),
        _depth_or_width(runs),
        _recovery(runs),
        _near(runs),
        _faster(throughput),
        _smaller(runs),
    )
    return tuple(claim for claim in made if claim is not None)


def less(found: Paired) -> bool | None:
    """Whether b is below a: True or False where the whole interval says so, None where it holds both."""
    return True if found.high < 0 else False if found.low >= 0 else None


def within(found: Paired, by: float) -> bool | None:
    """Whether b is at most `by` below a: True or False where the whole interval says so, None where it holds both."""
    return True if found.low >= -by else False if found.high < -by else None


def both(*holds: bool | None) -> bool | None:
    """False where one is refuted, None where one is undecided, else True."""
    return False if False in holds else None if None in holds else True


def comparable(runs: Runs, a: str, b: str) -> tuple[dict[int, CompressionRun], dict[int, CompressionRun]]:
    """Runs of two variants at seeds that both have, with equal tokens and bytes that differ by at most `EQUAL`."""
    left, right = runs.get(a, {}), runs.get(b, {})
    seeds = [seed for seed in left if seed in right and is_fair(left[seed], right[seed])]
    return {seed: left[seed] for seed in seeds}, {seed: right[seed] for seed in seeds}


def is_fair(a: CompressionRun, b: CompressionRun) -> bool:
    """Whether two runs distilled on as many tokens and came to models of the same bytes, up to `EQUAL`."""
    return a.tokens == b.tokens and abs(a.last.total_bytes - b.last.total_bytes) <= EQUAL * a.last.total_bytes


def kl(run: CompressionRun) -> float | None:
    """Distance from the teacher at the end."""
    return run.last.kl


def nll(run: CompressionRun) -> float | None:
    """Loss of the next token at the end."""
    return run.last.nll


def cut_kl(run: CompressionRun) -> float | None:
    """Distance from the teacher right after the last cut."""
    return None if run.last_cut is None else run.last_cut.kl


def overall(run: CompressionRun) -> float | None:
    """Right answers at the end, over all suites."""
    return run.last.overall


def _nats(name: str, found: Paired | None) -> str:
    return f"{name} not judged" if found is None else f"{name} {told(found, 'nats', 4, times=1.0)}"


def _means(name: str, found: Paired | None, a: str, b: str) -> str:
    return f"{name} not judged" if found is None else f"{name} {average(found.a):.4f} ({a}) and {average(found.b):.4f} ({b})"


def _scratch(runs: Runs) -> Claim | None:
    sides = comparable(runs, SCRATCH, PRUNED)
    far, loss = paired(*sides, kl), paired(*sides, nll)
    if far is None or loss is None:
        return None
    holds = both(less(far), less(loss))
    return claim_of_runs(
        "C1", "pruned and distilled beats the same shape from random weights, distilled on as many tokens",
        "MMLU 42.45 with 100 B tokens, 24.36 from scratch with 150 B (4B)", f"{_nats('KL', far)}, {_nats('loss', loss)}", holds,
        f"{_means('KL', far, 'scratch', 'pruned')}, {_means('loss', loss, 'scratch', 'pruned')}; both must be lower; "
        f"{verdict(holds)}; right answers {told_points(paired(*sides, overall))}", MINITRON, kl=far, nll=loss,
    )  # fmt: skip


def _cross_entropy(runs: Runs) -> Claim | None:
    sides = comparable(runs, CROSS_ENTROPY, PRUNED)
    far, loss, right = (paired(*sides, measure) for measure in (kl, nll, overall))
    if far is None:
        return None
    holds = less(far)
    return claim_of_runs(
        "C2", "learning the teacher's distribution beats learning the next token: nearer to the teacher",
        "far better", _nats("KL", far), holds,
        f"{_means('KL', far, 'cross-entropy', 'distilled')}; {verdict(holds)}. KL is what one of them learns and the loss of "
        f"the next token what the other does: {_nats('loss', loss)}; right answers {told_points(right)}", MINITRON,
        kl=far, **{name: value for name, value in (("nll", loss), ("accuracy", right)) if value is not None},
    )  # fmt: skip


def _groups(runs: Runs) -> Claim | None:
    sides = comparable(runs, GROUP_BLIND, PRUNED)
    far, begun, loss = (paired(*sides, measure) for measure in (kl, cut_kl, nll))
    if far is None:
        return None
    judged = {"kl": far} | ({} if begun is None else {"kl_after_cut": begun})
    holds = both(*(less(found) for found in judged.values()))
    return claim_of_runs(
        "C3", "Mamba heads ranked inside their groups beat heads ranked all together, after the cut and after distillation",
        "group-aware is better", f"{_nats('KL after the cut', begun)}, {_nats('after distillation', far)}", holds,
        f"{_means('after the cut', begun, 'blind', 'aware')}, {_means('after distillation', far, 'blind', 'aware')}; what is "
        f"judged must all be lower; {verdict(holds)}; {_nats('loss', loss)}", "Minitron-SSM (arXiv:2504.11409)", **judged,
    )  # fmt: skip


def _depth_or_width(runs: Runs) -> Claim | None:
    sides = comparable(runs, DEPTH_ONLY, WIDTH_ONLY)
    far, begun, loss = (paired(*sides, measure) for measure in (kl, cut_kl, nll))
    if far is None:
        return None
    holds = less(far)
    first = None if begun is None else less(begun)
    nearer = {True: "width is nearer", False: "depth is nearer", None: _FEW}[first]
    return claim_of_runs(
        "C4", "at equal bytes a cut in width beats one in depth once distilled", "width, after some retraining only",
        f"{_nats('KL', far)}", holds,
        f"{_means('after distillation', far, 'depth', 'width')}, {_means('right after the cut', begun, 'depth', 'width')}: "
        f"there {nearer}; {verdict(holds)}; {_nats('loss', loss)}; bytes {_shares(sides[0])} (depth) and "
        f"{_shares(sides[1])} (width) of the teacher's", MINITRON, kl=far, **({} if begun is None else {"kl_after_cut": begun}),
    )  # fmt: skip


def _shares(runs: Mapping[int, CompressionRun]) -> str:
    return ", ".join(f"{run.share:.1%}" for run in runs.values())


def _recovery(runs: Runs) -> Claim | None:
    courses = {seed: run.last.course for seed, run in runs.get(PRUNED, {}).items() if len(run.last.course) > 2}
    start, half, end = ({seed: course[at * (len(course) - 1) // 2][1] for seed, course in courses.items()} for at in range(3))
    first, second = differences(start, half), differences(half, end)
    if first is None or second is None:
        return None
    holds = both(less(first), less(second))
    return claim_of_runs(
        "C5", "the distance from the teacher falls with tokens, in the first half of them and in the second", None,
        f"{_nats('first half', first)}, {_nats('second half', second)}", holds,
        f"KL {average(first.a):.4f}, {average(first.b):.4f} at half, {average(second.b):.4f} at the end; {verdict(holds)}",
        "this study", first=first, second=second,
    )  # fmt: skip


def _near(runs: Runs) -> Claim | None:
    here = runs.get(WHOLE, {})

    def beside(measure: Callable[[StageResult], float | None]) -> Paired | None:
        teachers = {seed: measure(run.teacher) for seed, run in here.items()}
        return differences(teachers, {seed: measure(run.last) for seed, run in here.items()})

    def answered(question: Question) -> str:
        return f"{', '.join(question)}: {told_points(beside(lambda model: model.right(question)))}"

    found = beside(lambda model: model.overall)
    if found is None:
        return None
    each = [answered(question) for question in dict.fromkeys(q for run in here.values() for q in run.teacher.accuracy)]
    holds = within(found, NEAR)
    return claim_of_runs(
        "C6", f"the compressed model answers within {100 * NEAR:.0f} points of its teacher, over all suites", None,
        told_points(found), holds,
        f"teacher {average(found.a):.1%}, compressed {average(found.b):.1%}; {verdict(holds)}; {'; '.join(each)}",
        "this study; the target is this project's", accuracy=found,
    )  # fmt: skip


def _faster(throughput: Throughput | None) -> Claim | None:
    judged = None if throughput is None else longest(throughput, TEACHER, WHOLE)
    found = None if judged is None else faster(judged, TEACHER, WHOLE)
    if throughput is None or judged is None or found is None:
        return None
    holds = more(found)
    return claim_of_runs(
        "C7", "the compressed model generates more tokens a second in our engine than its teacher", None,
        f"{1 + found.mean:.2f}x ({setting_named(judged)}): {average(found.b):,.0f} to {average(found.a):,.0f} a second", holds,
        f"{'; '.join(ratios(throughput, TEACHER, WHOLE))}; {len(found.seeds)} rounds in turns on {throughput.machine}; "
        f"{verdict(holds)}", "this study", ratio=found,
    )  # fmt: skip


def _smaller(runs: Runs) -> Claim | None:
    shares = {seed: run.share for seed, run in runs.get(WHOLE, {}).items()}
    if not shares:
        return None
    largest = max(shares.values())
    return claim_of_runs(
        "C8", f"the compressed model takes at most {SHARE:.0%} of its teacher's bytes", None, f"{largest:.1%} at most",
        largest <= SHARE,
        f"weights, caches and state at the budget's context and batch, counted and no estimate: {_shares(runs[WHOLE])}",
        "this study; the target is this project's", shares=list(shares.values()),
    )  # fmt: skip
