"""What the study of alignment asks of the runs, beside what papers print where they print anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from tandem.study.alignment_runs import (
    FINAL,
    AlignmentRun,
    BudgetPoint,
    CoursePoint,
    Question,
    Throughput,
    ThroughputSetting,
    mean,
)
from tandem.study.result import Claim
from tandem.study.seeds import Paired, claim_of_runs, differences, paired, told

Runs = Mapping[str, Mapping[int, AlignmentRun]]
Measure = Callable[[AlignmentRun], float | None]
HYBRID, TRANSFORMER, NO_TRUNCATION = "hybrid", "transformer", "no-truncation"
"""Names of the variants. `no-truncation` is the hybrid's first three stages without thoughts cut off."""
TRUNCATION, INSTRUCTIONS, TOOLS, RLHF, MERGE = "sft-3", "ifeval-grpo", "dpo", "rlhf", "merge"
"""Stages of the recipes nano-align-* that claims are about."""
ON, OFF = ("reasoning", "thinking on"), ("reasoning", "thinking off")
ONE_MARK = 0.99
"""Least share of answers with exactly one closing mark: this project's target; paper A's figure 5 shows no other case."""
SMALL = 0.5
"""A budget is small where it closes at least this share of the thoughts; ours."""
PAR = 0.05
"""What two models on par may at most differ by, as a share of all questions, to the disadvantage of the one claimed; ours."""
PAPER_A = "paper A (arXiv:2508.14444)"


def claims_of(runs: Runs, throughput: Throughput | None) -> tuple[Claim, ...]:
    """Those claims whose runs are there, in order."""
    made = (
        _thinking(runs),
        _stage(
            "A2", runs, INSTRUCTIONS, "instructions", "reinforcement learning on instructions raises instruction following",
            "rises with DPO and GRPO (IFEval)",
        ),
        _stage(
            "A3", runs, TOOLS, "tools", "preferences among the model's own answers raise tool use",
            "rises with DPO and GRPO (BFCL v3)",
        ),
        _budget(runs),
        _one_mark(runs),
        _marks_beside(runs),
        _lengths_beside(runs),
        _reward("A8", runs, INSTRUCTIONS, "the verified reward rises with GRPO on instructions"),
        _reward("A9", runs, RLHF, "the reward model's score rises with GRPO on it"),
        _inside(runs),
        _merge(runs),
        _on_par(runs),
        _faster(throughput),
    )  # fmt: skip
    return tuple(claim for claim in made if claim is not None)


def more(found: Paired) -> bool | None:
    """Whether b is above a: True or False where the whole interval says so, None where it holds both."""
    return True if found.low > 0 else False if found.high <= 0 else None


def no_less(found: Paired, by: float = 0.0) -> bool | None:
    """Whether b is at least a, but for `by`: False where all of the interval is below 0, None where it goes too far down."""
    return False if found.high < 0 else True if found.low >= -by else None


def verdict(holds: bool | None) -> str:
    """What an interval says, in words that follow it."""
    return {True: "that decides it", False: "that refutes it", None: "too few seeds to decide"}[holds]


def accuracy_at(stage: str, question: Question, task: str = "all") -> Measure:
    """Right answers after a stage."""
    return lambda run: run.right(stage, question, task)


def change(runs: Mapping[int, AlignmentRun], stage: str, measure: Callable[[AlignmentRun, str], float | None]) -> Paired | None:
    """What a stage adds to the model that it goes on from; None where the runs have no such stage."""
    here = {seed: run for seed, run in runs.items() if stage in run.after}
    before = {seed: measure(run, run.after[stage]) for seed, run in here.items()}
    return differences(before, {seed: measure(run, stage) for seed, run in here.items()})


def told_points(found: Paired | None) -> str:
    """A difference of shares in points, or that nothing was asked."""
    return "not asked" if found is None else told(found, "points", 1)


def average(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return sum(values) / len(values)


def _thinking(runs: Runs) -> Claim | None:
    def gain(variant: str) -> Paired | None:
        by_seed = runs.get(variant, {})
        return differences(
            {seed: run.right(FINAL, OFF) for seed, run in by_seed.items()},
            {seed: run.right(FINAL, ON) for seed, run in by_seed.items()},
        )

    found = gain(HYBRID)
    if found is None:
        return None
    holds = more(found)
    return claim_of_runs(
        "A1", "the aligned model answers more reasoning problems with thinking on than off", None, told_points(found), holds,
        f"{average(found.a):.1%} off and {average(found.b):.1%} on, {verdict(holds)}; the Transformer's gain: "
        f"{told_points(gain(TRANSFORMER))}", "this study", accuracy=found,
    )  # fmt: skip


def _stage(id: str, runs: Runs, stage: str, suite: str, title: str, printed: str) -> Claim | None:
    found = change(runs.get(HYBRID, {}), stage, lambda run, at: run.suite(at, suite))
    if found is None:
        return None
    beside = change(runs.get(HYBRID, {}), stage, lambda run, at: run.right(at, ON))
    holds = more(found)
    return claim_of_runs(
        id, title, printed, told_points(found), holds,
        f"{average(found.a):.1%} before {stage} and {average(found.b):.1%} after, with and without thinking; "
        f"{verdict(holds)}. Reasoning meanwhile: {told_points(beside)}", f"{PAPER_A}, figure 6", accuracy=found,
    )  # fmt: skip


def points_at(runs: Mapping[int, AlignmentRun], stage: str) -> dict[int, dict[int, BudgetPoint]]:
    """By seed and budget: those budgets that all runs were asked at, of runs that were asked at any."""
    asked = {seed: {point.budget: point for point in run.budgets[stage]} for seed, run in runs.items() if stage in run.budgets}
    common = set.intersection(*(set(points) for points in asked.values())) if asked else set()
    return {seed: {budget: points[budget] for budget in sorted(common)} for seed, points in asked.items()} if common else {}


def _budget(runs: Runs) -> Claim | None:
    asked = points_at(runs.get(HYBRID, {}), FINAL)
    budgets = sorted(next(iter(asked.values()))) if asked else []
    if len(budgets) < 2:
        return None

    def step(low: int, high: int) -> Paired:
        found = differences(*({seed: points[at].accuracy for seed, points in asked.items()} for at in (low, high)))
        assert found is not None
        return found

    found = step(budgets[0], budgets[-1])
    falls = [(low, high) for low, high in pairwise(budgets) if step(low, high).high < 0]
    curve = [(at, average([points[at].accuracy for points in asked.values()])) for at in budgets]
    holds = False if falls else more(found)
    fallen = "".join(f"; falls from {low} to {high}" for low, high in falls)
    return claim_of_runs(
        "A4", "accuracy rises with the thinking budget, and no step of the curve is a fall", "a rising curve",
        f"{budgets[0]} to {budgets[-1]} tokens: {told_points(found)}", holds,
        ", ".join(f"{at} tokens {share:.1%}" for at, share in curve) + f"; {verdict(holds)}{fallen}",
        f"{PAPER_A}, figure 5", accuracy=found, curve=[list(point) for point in curve],
    )  # fmt: skip


def small_budgets(asked: Mapping[int, Mapping[int, BudgetPoint]]) -> list[int]:
    """Budgets that close at least half of the thoughts, over the seeds; the smallest one where none does."""
    budgets = sorted(next(iter(asked.values()))) if asked else []
    forced = {at: mean([points[at].forced for points in asked.values()]) for at in budgets}
    return [at for at, share in forced.items() if share is not None and share >= SMALL] or budgets[:1]


def at_small(
    points: Mapping[int, Mapping[int, BudgetPoint]], budgets: Sequence[int], value: Callable[[BudgetPoint], float | None]
) -> dict[int, float | None]:
    """Mean over the small budgets, by seed; None where one of them was not asked."""
    found: dict[int, float | None] = {}
    for seed, by_budget in points.items():
        values = [value(by_budget[at]) if at in by_budget else None for at in budgets]
        found[seed] = None if None in values else mean(values)
    return found


def _one_mark_of(point: BudgetPoint) -> float | None:
    return point.one_mark


def _answer_tokens_of(point: BudgetPoint) -> float | None:
    return point.answer_tokens


def _named(budgets: Sequence[int]) -> str:
    return "budgets of " + ", ".join(map(str, budgets)) + " tokens"


def _one_mark(runs: Runs) -> Claim | None:
    def beside(stage: str) -> tuple[list[int], Paired | None]:
        asked = points_at(runs.get(HYBRID, {}), stage)
        small = small_budgets(asked)
        shares = at_small(asked, small, _one_mark_of)
        return small, differences(dict.fromkeys(shares, ONE_MARK), shares)

    small, found = beside(TRUNCATION)
    if found is None:
        return None
    holds = no_less(found)
    _, final = beside(FINAL)
    last = "not asked" if final is None else f"{average(final.b):.2%}"
    return claim_of_runs(
        "A5", f"after the truncation stage at least {ONE_MARK:.0%} of answers at small budgets have exactly one closing mark",
        "exactly one", f"{average(found.b):.2%}; over {ONE_MARK:.0%}: {told(found, 'points', 2)}", holds,
        f"{_named(small)}, the model left alone after the mark; {verdict(holds)}; by seed "
        f"{', '.join(f'{share:.2%}' for share in found.b)}; of the last model {last}",
        f"{PAPER_A}, section 3.4 and figure 5; the target is this project's", over=found,
    )  # fmt: skip


def _truncated_beside(
    runs: Runs, value: Callable[[BudgetPoint], float | None], *, relative: bool
) -> tuple[list[int], Paired | None]:
    """What truncation adds at small budgets after the same stage: those that are small with it."""
    with_, without = (points_at(runs.get(name, {}), TRUNCATION) for name in (HYBRID, NO_TRUNCATION))
    small = small_budgets(with_)
    return small, differences(at_small(without, small, value), at_small(with_, small, value), relative=relative)


def _marks_beside(runs: Runs) -> Claim | None:
    small, found = _truncated_beside(runs, _one_mark_of, relative=False)
    if found is None:
        return None
    holds = more(found)
    return claim_of_runs(
        "A6", "thoughts cut off in training raise the share of answers with exactly one closing mark at small budgets",
        "malformed without", told_points(found), holds,
        f"{_named(small)}: {average(found.a):.2%} without and {average(found.b):.2%} with, after the same stage; "
        f"{verdict(holds)}", f"{PAPER_A}, section 3.4 and figure 5", one_mark=found,
    )  # fmt: skip


def _lengths_beside(runs: Runs) -> Claim | None:
    small, found = _truncated_beside(runs, _answer_tokens_of, relative=True)
    if found is None:
        return None
    holds = True if found.high < 0 else False if found.low >= 0 else None
    return claim_of_runs(
        "A7", "thoughts cut off in training keep answers at small budgets shorter", "answers grow without", told(found, "%", 1),
        holds, f"{_named(small)}: {average(found.a):.1f} tokens without and {average(found.b):.1f} with; {verdict(holds)}",
        f"{PAPER_A}, section 3.4 and figure 5", answer_tokens=found,
    )  # fmt: skip


def _reward(id: str, runs: Runs, stage: str, title: str) -> Claim | None:
    def ends(run: AlignmentRun) -> tuple[Sequence[CoursePoint], Sequence[CoursePoint]]:
        course = run.courses[stage]
        quarter = max(1, len(course) // 4)
        return course[:quarter], course[-quarter:]

    here = {seed: ends(run) for seed, run in runs.get(HYBRID, {}).items() if len(run.courses.get(stage, ())) > 1}
    found = differences(*({seed: mean([p.reward for p in pair[i]]) for seed, pair in here.items()} for i in (0, 1)))
    if found is None:
        return None
    kl = mean([point.kl for _, last in here.values() for point in last])
    holds = more(found)
    stated = "not measured" if kl is None else f"{kl:.4f} nats a token"
    return claim_of_runs(
        id, title, "not printed", told(found, "", 3, times=1.0), holds,
        f"{average(found.a):.3f} in the first quarter of the steps and {average(found.b):.3f} in the last; {verdict(holds)}; "
        f"KL to the model before the stage in the last quarter: {stated}", f"this study, stage {stage}", reward=found, kl=kl,
    )  # fmt: skip


def _inside(runs: Runs) -> Claim | None:
    sweeps = {seed: run.sweeps[MERGE] for seed, run in runs.get(HYBRID, {}).items() if len(run.sweeps.get(MERGE, ())) > 2}
    found = differences(
        {seed: max(sweep[0][1], sweep[-1][1]) for seed, sweep in sweeps.items()},
        {seed: max(share for _, share in sweep[1:-1]) for seed, sweep in sweeps.items()},
    )
    if found is None:
        return None
    best = [max(sweep[1:-1], key=lambda row: row[1])[0] for sweep in sweeps.values()]
    chosen = ", ".join(f"{alpha:g}" for alpha in best)
    first = next(iter(sweeps.values()))
    holds = more(found)
    return claim_of_runs(
        "A10", "the best merge lies inside of the sweep", "about a half",
        f"alpha {chosen}; over the better end {told_points(found)}", holds,
        f"ends at alpha {first[0][0]:g} and {first[-1][0]:g}; {verdict(holds)}; the best of {len(first) - 2} is a little too "
        "good on the questions that chose it", f"{PAPER_A}, section 3", over_ends=found, alphas=best,
    )  # fmt: skip


def _merge(runs: Runs) -> Claim | None:
    here = {seed: run for seed, run in runs.get(HYBRID, {}).items() if MERGE in run.merged}
    after = {seed: run.overall(MERGE) for seed, run in here.items()}
    beside = [differences({s: run.overall(run.merged[MERGE][i]) for s, run in here.items()}, after) for i in (0, 1)]
    first, second = beside
    if first is None or second is None:
        return None
    verdicts = [no_less(one, PAR) for one in (first, second)]
    holds = False if False in verdicts else None if None in verdicts else True
    return claim_of_runs(
        "A11", "the merged model is no worse than either of the two on held-out questions", "balances them",
        f"over the first {told_points(first)}, over the second {told_points(second)}", holds,
        f"all suites; first {average(first.a):.1%}, second {average(second.a):.1%}, merged {average(first.b):.1%}; no "
        f"worse: the interval is not below 0 and reaches no further down than {PAR:.0%}; {verdict(holds)}",
        f"{PAPER_A}, section 3 and figure 6", over_first=first, over_second=second,
    )  # fmt: skip


def _on_par(runs: Runs) -> Claim | None:
    both = runs.get(TRANSFORMER, {}), runs.get(HYBRID, {})
    at = _last_of_both(*both)
    found = paired(*both, lambda run: run.overall(at))
    if found is None:
        return None
    asked = list(dict.fromkeys(question for run in both[1].values() for question in run.accuracy[at]))
    parts = [f"{suite}, {mode}: {told_points(paired(*both, accuracy_at(at, (suite, mode))))}" for suite, mode in asked]
    holds = no_less(found, PAR)
    return claim_of_runs(
        "A12", "at equal parameters and conversations the aligned hybrid is on par with the aligned Transformer or better",
        "on par or better", told_points(found), holds, f"after {at}: {'; '.join(parts)}; {verdict(holds)}", PAPER_A,
        accuracy=found,
    )  # fmt: skip


def _last_of_both(*sides: Mapping[int, AlignmentRun]) -> str:
    """The last model where both variants end alike, else the last stage that all of their runs have."""
    every = [run for side in sides for run in side.values()]
    if len({run.after.get(FINAL) for run in every}) <= 1:
        return FINAL
    return [stage for stage in every[0].stages if all(stage in run.accuracy for run in every) and stage != FINAL][-1]


def longest(throughput: Throughput, *names: str) -> ThroughputSetting | None:
    """The setting with the most tokens a sequence, of those that have all models of these names."""
    both = [one for one in throughput.settings if all(one.of(name) for name in names)]
    return max(both, key=lambda one: one.prompt_tokens + one.output_tokens, default=None)


def faster(one: ThroughputSetting, a: str, b: str) -> Paired | None:
    """What `b` generates over `a`, as a share of a's tokens a second, round by round."""
    return differences(dict(one.of(a)), dict(one.of(b)), relative=True)


def setting_named(one: ThroughputSetting) -> str:
    """`batch 32, 64 + 256 tokens`."""
    return f"batch {one.batch}, {one.prompt_tokens} + {one.output_tokens} tokens"


def ratios(throughput: Throughput, a: str, b: str) -> list[str]:
    """What `b` generates over `a` in every setting that has both."""
    pairs = [(one, faster(one, a, b)) for one in throughput.settings]
    return [f"{setting_named(one)}: {1 + pair.mean:.2f}x" for one, pair in pairs if pair is not None]


def _faster(throughput: Throughput | None) -> Claim | None:
    judged = None if throughput is None else longest(throughput, TRANSFORMER, HYBRID)
    if throughput is None or judged is None:
        return None

    found = faster(judged, TRANSFORMER, HYBRID)
    if found is None:
        return None
    parts = ratios(throughput, TRANSFORMER, HYBRID)
    holds = more(found)
    return claim_of_runs(
        "A13", "the aligned hybrid generates more tokens a second in our engine than the aligned Transformer",
        "6.3x (9B against Qwen3-8B, 8k + 16k tokens, one A10G)",
        f"{1 + found.mean:.2f}x ({setting_named(judged)}): {average(found.b):,.0f} to {average(found.a):,.0f} a second",
        holds,
        f"{'; '.join(parts)}; {len(found.seeds)} rounds in turns on {throughput.machine}; a cache of this length is small "
        "beside weights and state, so what the paper gains at long outputs cannot show here", f"{PAPER_A}, figure 1",
        ratio=found,
    )  # fmt: skip
