"""Joint scaling of prefill and decode workers: a pure decision for each window, and `Scaler`, which keeps its memory.

What is needed follows from forecast traffic and from what is there now: queues to drain, sequences in flight. Needs above
the present targets act at once; needs below them only when they stayed below for a while (the largest need of the last
`hold_s`, longer while objectives are missed). Under a budget the split minimises the larger shortfall of the two pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, exp
from statistics import pstdev

from tandem.sched.forecast import Forecast, Smoothing
from tandem.sched.observation import Decision, Lengths, Observation
from tandem.sched.route import Role
from tandem.sched.scale_kinds import Kind, pays
from tandem.sched.scale_rates import PoolRates
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

CONTEXT_LEARNING = 0.1
"""Share that a window has in what the context of those that decode is taken to be."""

LITTLE = 0.05
"""Share of a worker that nobody is started for, or kept."""
ENOUGH = 20
"""Answers that must begin, or end, in a window to say whether its objective was met."""
MEMORY = 1000
"""Requests that count as much as those of a new window together."""
KEEP = 15.0
"""At most so many times `hold_s` are workers kept where objectives are missed."""
MORE = 1.25
"""Workers for those that did not suffice."""

Targets = tuple[tuple[Role, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleLimits:
    """Bounds and costs of changes. Counts are workers, seconds on the observations' clock."""

    max_gpus: int
    gpus_per_worker: int = 1
    fixed: bool = False
    """Only flips: the workers that are there are all there will be."""
    min_workers: int = 1
    """Of each role that is served; one at least while there is work."""
    ttft_s: float | None = None
    """Objective: windows whose 90th percentile is above it had too few workers, whatever they should have done."""
    tpot_s: float | None = None
    """The same of a window's mean."""
    attainment: float | None = None
    """Share of requests that should meet the objective; while fewer do, workers are kept for longer. None: not asked for."""
    start_up_s: float = 60.0
    dwell_s: float = 120.0
    """Least time between a change and one in the other direction, and for which changes by hand are left alone."""
    down_s: float | None = None
    """How long needs must have been lower before workers go, where objectives are met. None: twice their start-up, for then
    keeping one has cost as much as starting it."""
    warm_s: float = 60.0
    """Before so much has been seen, nothing changes."""
    margin: float = 0.1
    """A flip must shrink the larger shortfall by this share, another kind take fewer GPUs by it."""
    deviations: float = 1.0
    """Standard deviations of forecasts that are planned for."""

    def __post_init__(self) -> None:
        require_int("max_gpus", self.max_gpus)
        require_int("gpus_per_worker", self.gpus_per_worker, high=self.max_gpus)
        require_int("min_workers", self.min_workers, low=0)
        for name in ("ttft_s", "tpot_s"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if self.attainment is not None:
            require_number("attainment", self.attainment, high=1.0)
        for name in ("start_up_s", "dwell_s", "hold_s", "warm_s", "margin", "deviations"):
            if getattr(self, name) != 0:
                require_number(name, getattr(self, name))

    @property
    def hold_s(self) -> float:
        """`down_s`, or what stands for it."""
        return 2.0 * self.start_up_s if self.down_s is None else self.down_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleState:
    """What a policy remembers; the first decision begins with an empty one."""

    rate: Forecast = field(default_factory=lambda: Forecast(smoothing=Smoothing(spread=0.02)))
    isl: Lengths | None = None
    osl: float | None = None
    tokens: Forecast = field(default_factory=Forecast)
    """Of output tokens/s, where they are measured."""
    prompts: Forecast = field(default_factory=Forecast)
    """Of prompt tokens/s that arrive."""
    peak: float = 0.0
    """Prompt tokens/s of the densest window of late; it fades as workers go."""
    context: float | None = None
    """Mean tokens of those that decode, smoothed."""
    began_s: float | None = None
    targets: Targets | None = None
    changed_s: float = float("-inf")
    """When targets last changed."""
    by_hand_s: float = float("-inf")
    met: float = 1.0
    """Share of requests that met the objective, smoothed."""
    needs: tuple[tuple[float, tuple[float, ...]], ...] = ()
    """Of late, as long as workers may be kept: when, and workers needed of each role in the order of `targets`."""
    kind: int = 0
    """Which of the kinds that workers may be they are, or are becoming."""
    gpus: tuple[tuple[int, ...], ...] = ()
    """Beside `needs`: the GPUs that each kind would have taken."""


def _there(observation: Observation) -> dict[Role, int]:
    counts: dict[Role, int] = {}
    for pool in observation.pools:
        counts[pool.role] = counts.get(pool.role, 0) + pool.up + pool.starting
    return {role: counts[role] for role in sorted(counts)}


def _by_hand(there: Mapping[Role, int], asked: Mapping[Role, int], draining: int) -> bool:
    """Whether counts differ from what was asked for, and workers that drain, which may be to change role, do not say why."""
    missing = sum(max(0, n - there.get(role, 0)) for role, n in asked.items())
    return missing > draining or any(n > asked.get(role, 0) for role, n in there.items())


def _mixed(old: Lengths | None, new: Lengths | None) -> Lengths | None:
    """Lengths smoothed: a window counts by its samples, against a memory of a thousand, for a few prompts in a hundred may be
    most of the work."""
    if old is None or new is None:
        return new or old
    w = new.count / (new.count + min(old.count, MEMORY))
    mean, p50, p90, p99 = (
        a + w * (b - a) for a, b in ((old.mean, new.mean), (old.p50, new.p50), (old.p90, new.p90), (old.p99, new.p99))
    )
    return Lengths(count=min(old.count + new.count, 100_000), mean=mean, p50=p50, p90=p90, p99=p99)


def _output(old: float | None, seen: Observation) -> float | None:
    """Mean output expected. Those that decode have at least what they have: in a steady state they are halfway on average, so
    that twice their mean is a bound that shows longer answers before the first of them ends."""
    osl = old
    if seen.osl is not None:
        w = seen.osl.count / (seen.osl.count + 100.0)
        osl = seen.osl.mean if old is None else old + w * (seen.osl.mean - old)
    if osl is None:
        return None if seen.decoded is None else 2.0 * seen.decoded.mean
    return osl if seen.decoded is None else max(osl, seen.decoded.p50)


def _learn(state: ScaleState, seen: Observation, limits: ScaleLimits) -> ScaleState:
    rate = None if seen.arrived is None else seen.arrived / seen.window_s
    tokens = None if seen.generated is None else seen.generated / seen.window_s
    prompts, peak = state.prompts, state.peak
    if seen.arrived is not None:
        came = 0.0 if seen.isl is None else seen.isl.mean * seen.arrived / seen.window_s
        faded = exp(-seen.window_s / _hold_s(state, limits)) if limits.hold_s else 0.0
        peak = max(came, (prompts.level or 0.0) + (peak - (prompts.level or 0.0)) * faded)
        prompts = prompts.update(came)
    context = state.context
    if seen.decoding:
        now = seen.decoding_tokens / seen.decoding
        context = now if context is None else context + CONTEXT_LEARNING * (now - context)
    met = state.met
    if seen.attainment is not None and seen.osl is not None:
        met += (seen.attainment - met) * seen.osl.count / (seen.osl.count + MEMORY)
    return replace(
        state,
        rate=state.rate.update(rate),
        met=met,
        tokens=state.tokens.update(tokens),
        prompts=prompts,
        peak=peak,
        context=context,
        isl=_mixed(state.isl, seen.isl),
        osl=_output(state.osl, seen),
        began_s=seen.at_s - seen.window_s if state.began_s is None else state.began_s,
    )


def _prefill_load(state: ScaleState, ahead: float, window_s: float, perf: PoolRates, isl: Lengths) -> float:
    """Workers that prefill what is to come as unevenly as it has come; no more than serves the densest window of late as if it
    went on. Of prompts it is the tokens that are forecast, for their number says little of the work."""
    mean = state.rate.mean()
    dispersion = max(1.0, state.rate.variance * window_s / mean) if mean > 0.0 else 1.0
    rate = state.prompts.mean(ahead) / isl.mean
    return min(perf.prefill_load(rate, isl, dispersion), perf.prefill_load(max(rate, state.peak / isl.mean), isl))


def _needs(seen: Observation, state: ScaleState, perf: PoolRates, limits: ScaleLimits, roles: tuple[Role, ...]) -> list[float]:
    """Workers needed of each role, not rounded: for the forecast, and for what waits and decodes now."""
    if state.isl is None or state.osl is None:
        return [0.0] * len(roles)
    isl, osl = state.isl, state.osl
    ahead = max(1.0, limits.start_up_s / seen.window_s)
    rate = state.rate.mean(ahead)
    # What comes out says more of answers than how many came and how long a few were: hundreds are in it, each by its length.
    tokens_s = rate * osl if state.tokens.level is None else state.tokens.upper(ahead, limits.deviations)
    context = isl.mean + osl / 2.0 if state.context is None else state.context
    deadline_s = max(limits.start_up_s, seen.window_s)
    # What a queue of one prompt or so holds is ordinary; all else is to be gone by the deadline.
    backlog_s = max(0.0, perf.prompt_s(seen.waiting_tokens, isl) - 2.0 * perf.prompt_s(isl.mean, isl))
    held = (seen.decoding + seen.waiting_decode) / perf.decode_batch(context)
    drained = backlog_s / deadline_s
    each = tokens_s / max(rate, 1e-9)
    prompts = _prefill_load(state, ahead, seen.window_s, perf, isl)
    late, slow = _missed(seen, limits)
    decode = (
        max(rate / perf.decode_rps(context, each), perf.link_load(max(rate, state.peak / isl.mean), isl), held)
        if rate > 0.0
        else held
    )
    found: dict[Role, float] = {
        "prefill": max(prompts + drained, late),
        "decode": max(decode, slow),
        "colocated": max(max(rate / perf.colocated_rps(isl, context, each), prompts, held) + drained, late, slow),
    }
    return [found[role] for role in roles]


def _missed(seen: Observation, limits: ScaleLimits) -> tuple[float, float]:
    """Workers that would have been needed to start, and to go on, in time in a window that did not: some more than were up."""
    first = sum(pool.up for pool in seen.pools if pool.role != "decode")
    rest = sum(pool.up for pool in seen.pools if pool.role != "prefill")
    late = limits.ttft_s is not None and seen.ttft_s is not None and seen.ttft_s > limits.ttft_s
    late = late and seen.first_tokens >= ENOUGH
    slow = limits.tpot_s is not None and seen.tpot_s is not None and seen.tpot_s > limits.tpot_s
    slow = slow and seen.osl is not None and seen.osl.count >= ENOUGH
    return (MORE * first if late else 0.0), (MORE * rest if slow else 0.0)


def _gpus(
    observation: Observation, state: ScaleState, kinds: Sequence[Kind], limits: ScaleLimits, roles: tuple[Role, ...]
) -> tuple[tuple[int, ...], ...]:
    """What is remembered of the GPUs that each kind would have taken, with this window."""
    row = []
    for kind in kinds:
        needs = _needs(observation, state, kind.rates, limits, roles)
        row.append(kind.gpus * sum(max(limits.min_workers, ceil(need - LITTLE)) for need in needs))
    return (*state.gpus, tuple(row))


def _hold_s(state: ScaleState, limits: ScaleLimits) -> float:
    """How long needs must have been lower before workers go: longer by as much as more requests miss the objective than may."""
    if limits.attainment is None:
        return limits.hold_s
    return limits.hold_s * min(KEEP, max(1.0, (1.0 - state.met) / max(1.0 - limits.attainment, 1e-9)))


def _high(needs: Sequence[float]) -> float:
    """The largest need of late, and what needs vary by on top, so that a worker that went is not missed in the next window."""
    return max(needs) + max(0.1, pstdev(needs)) if max(needs) > LITTLE else 0.0


def _split(needs: list[float], workers: int, least: int) -> list[int]:
    """`workers` shared between pools so that the largest need per worker is smallest."""
    counts = [min(least, max(1, workers // len(needs)))] * len(needs)
    for _ in range(workers - sum(counts)):
        worst = max(range(len(needs)), key=lambda i: (needs[i] / counts[i], -i))
        counts[worst] += 1
    return counts


def _shortfall(needs: list[float], counts: list[int]) -> float:
    return max(need / max(n, 1e-9) for need, n in zip(needs, counts, strict=True))


def _wanted(
    now: list[int], needs: list[float], high: list[float], limits: ScaleLimits, least: int, settled: bool, lower: bool
) -> tuple[list[int], str]:
    """Counts to aim at. `high` are the largest needs of late; `settled`: workers may flip; `lower`: workers may go."""
    budget = sum(now) if limits.fixed else max(limits.max_gpus // limits.gpus_per_worker, 1)
    up = [max(least, ceil(need - LITTLE)) for need in needs]
    down = [max(least, ceil(need)) for need in high]
    aim = [max(n, u) if u > n else (min(n, d) if lower else n) for n, u, d in zip(now, up, down, strict=True)]
    if not limits.fixed and sum(aim) <= budget:
        return aim, "as needed"
    if len(now) == 1:
        return ([min(aim[0], budget)] if not limits.fixed else now), "as far as the budget goes"
    spare = max(0, budget - sum(now))
    if not settled or budget < len(now):
        room = list(now)
        for i in sorted(range(len(now)), key=lambda i: -needs[i] / max(now[i], 1e-9)):
            added = min(spare, max(0, aim[i] - now[i]))
            room[i], spare = now[i] + added, spare - added
        return room, "as far as the budget goes until a flip is due"
    short = _shortfall(needs, now) > 1.0
    split = _split(needs if short else high, budget, max(1, least))
    if short and (spare or _shortfall(needs, split) < (1.0 - limits.margin) * _shortfall(needs, now)):
        return split, "the budget split by need"
    return now, "no other split is better by the margin"


def _other_kind(
    observation: Observation, state: ScaleState, kinds: Sequence[Kind], limits: ScaleLimits, roles: tuple[Role, ...]
) -> tuple[int, list[int]] | None:
    """A kind to change to, and workers of each role of it; None where none pays, or none can start beside those there."""
    at_s, budget = observation.at_s, limits.max_gpus - sum(p.gpus_per_worker * (p.up + p.starting) for p in observation.pools)
    paying = [
        (max(row[i] for row in state.gpus), i)
        for i, kind in enumerate(kinds)
        if i != state.kind
        and kind.gpus * len(roles) <= budget
        and pays(state.gpus, state.kind, i, margin=limits.margin, start_up_s=limits.start_up_s, held_s=at_s - state.needs[0][0])
    ]
    if not paying:
        return None
    best = min(paying)[1]
    needs = _needs(observation, state, kinds[best].rates, limits, roles)
    aim = [max(limits.min_workers, ceil(need * (1.0 + limits.margin) - LITTLE)) for need in needs]
    most = limits.max_gpus // kinds[best].gpus
    return best, aim if sum(aim) <= most else _split(needs, most, max(1, limits.min_workers))


def decide(
    observation: Observation, state: ScaleState, perf: PoolRates, limits: ScaleLimits, kinds: Sequence[Kind] = ()
) -> tuple[Decision, ScaleState]:
    """Targets after this window, and what to remember. Pure. SpecError if no worker is observed and none was asked for.

    `kinds`: what workers may be replaced by, the first one what they are in the beginning, of which `perf` are the rates.
    """
    if kinds:
        perf, limits = kinds[state.kind].rates, replace(limits, gpus_per_worker=kinds[state.kind].gpus)
    there = _there(observation)
    asked = dict(state.targets or ())
    if not there and not asked:
        raise SpecError("pools=(): no role to scale; observe pools with at least one role")
    draining = sum(pool.draining for pool in observation.pools)
    at_s = observation.at_s
    state = _learn(state, observation, limits)
    base = asked or there
    others = [p for p in observation.pools if kinds and p.kind != kinds[state.kind].name]
    rolling = any(p.up or p.starting or p.draining for p in others)
    if asked and not rolling and _by_hand(there, asked, draining):
        state = replace(state, by_hand_s=at_s, needs=())
        base = {role: there.get(role, 0) for role in sorted({*there, *asked})}
    roles = tuple(sorted(base))
    now = [base[role] for role in roles]
    state = replace(state, targets=tuple(zip(roles, now, strict=True)))

    def hold(why: str) -> tuple[Decision, ScaleState]:
        return Decision(targets=dict(zip(roles, now, strict=True)), reason=f"hold: {why}"), state

    if rolling:
        return hold(f"workers are being replaced by {kinds[state.kind].name}")
    if observation.arrived is None:
        return hold("arrivals were not measured")
    if at_s - (state.began_s or 0.0) <= limits.warm_s:
        return hold(f"{at_s - (state.began_s or 0.0):.0f} s seen, {limits.warm_s:.0f} s needed")
    if at_s - state.by_hand_s < limits.dwell_s:
        return hold(f"workers were changed by hand {at_s - state.by_hand_s:.0f} s ago")
    if state.isl is None or state.osl is None:
        return hold("no lengths of prompts or answers seen yet")
    needs = _needs(observation, state, perf, limits, roles)
    kept = (*((t, n) for t, n in state.needs if t > at_s - KEEP * limits.hold_s), (at_s, tuple(needs)))
    state = replace(state, needs=kept, gpus=_gpus(observation, state, kinds, limits, roles)[-len(kept) :])
    hold_s = _hold_s(state, limits)
    high = [_high([n[i] for t, n in kept if t >= at_s - hold_s]) for i in range(len(roles))]
    settled = at_s - state.changed_s >= limits.dwell_s
    lower = settled and at_s - hold_s >= max(state.began_s or 0.0, state.by_hand_s)
    work = observation.arrived or observation.waiting or observation.decoding or observation.waiting_decode
    least = max(limits.min_workers, 1 if work else 0)
    if kinds and lower and (found := _other_kind(observation, state, kinds, limits, roles)) is not None:
        kind, aim = found
        was, worst = kinds[state.kind].name, [max(row[i] for row in state.gpus) for i in (state.kind, kind)]
        targets = dict(zip(roles, aim, strict=True))
        state = replace(state, targets=tuple(targets.items()), changed_s=at_s, kind=kind, needs=(), gpus=())
        reason = f"{kinds[kind].name} instead of {was}: {worst[1]} GPUs instead of {worst[0]} for the traffic of late"
        return Decision(targets=targets, reason=reason, changed=True, kind=kinds[kind].name), state
    aim, how = _wanted(now, needs, high, limits, least, settled, lower)
    numbers = ", ".join(f"{role} needs {need:.2f} has {n}" for role, need, n in zip(roles, needs, now, strict=True))
    if aim == now:
        return hold(f"{numbers}; {how}")
    targets = dict(zip(roles, aim, strict=True))
    state = replace(state, targets=tuple(targets.items()), changed_s=at_s)
    to = ", ".join(f"{role} {n}" for role, n in targets.items())
    reason = f"{to}: {numbers} at {state.rate.mean():.3g} requests/s, {observation.waiting_tokens} tokens wait; {how}"
    return Decision(targets=targets, reason=reason, changed=True), state


class Scaler:
    """A `ScalingPolicy` that scales jointly."""

    def __init__(self, perf: PoolRates, limits: ScaleLimits, kinds: Sequence[Kind] = ()) -> None:
        self.perf, self.limits, self.kinds, self.state = perf, limits, tuple(kinds), ScaleState()

    def decide(self, observation: Observation) -> Decision:
        """What to aim at after this window."""
        decision, self.state = decide(observation, self.state, self.perf, self.limits, self.kinds)
        return decision
