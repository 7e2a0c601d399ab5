"""Independent prefill and decode controllers, re-stated in our own words from what was published. Used by the study only.

Sources, read on 2026-11-29: ai-dynamo/dynamo, components/planner (planner_core.py at 0761925 for the SLA planner, defaults.py
at fa6702c, the load planner of examples/llm/components/planner.py), docs/design-docs/planner-design.md at 320e674 for the
planner of 1.x; ray-project/ray, python/ray/serve/autoscaling_policy.py at 00590c4. Parameters are their defaults.

What the simulator does not show is replaced in the rule's favour, and said where it is done. All have the budget of the joint
policy, and workers of one GPU count; none of them changes a worker's role.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tandem.sched.observation import Decision, Observation, ScalingPolicy
from tandem.sched.route import Role
from tandem.sim.config import WorkerKind

if TYPE_CHECKING:
    from tandem.study.elastic_cells import Ready

Sizes = dict[Role, int]
WINDOW_S = 10.0
"""How often the rules look: the metric interval of Dynamo's load planner and of Ray Serve."""
ADJUST_S = 180.0
"""Dynamo's default adjustment interval."""
HISTORY = 50
"""Samples that a forecast is fitted on."""
LEAST_SAMPLES = 5
"""Before so many, a forecast is the last value."""
GRACE = 3
"""Adjustments in which a new decode worker is not taken away again, and for which a queue's trend is drawn out."""
PREFILL_UP, PREFILL_DOWN = 5.0, 0.2
"""Requests in the prefill queue."""
KV_UP, KV_DOWN = 0.9, 0.5
"""Share of the decode workers' cache."""
WAITING_KV = 0.02
"""Share of a cache that a waiting request is taken for."""
DOWN_SENSITIVITY = 0.8
"""Dynamo 1.x: workers go when those left would stay under this share of the objective."""
LOOK_BACK_S, UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 30.0, 30.0, 600.0
"""Ray Serve."""
PREFILL_ONGOING = 2.0
"""Ray Serve's default of `target_ongoing_requests`."""


class PoolsRule(Protocol):
    """Sizes that two independent controllers ask for after a window; None: nothing is due."""

    def sizes(self, seen: Observation, there: Sizes) -> Sizes | None:
        """`there`: workers of each role that are up or start."""
        ...


class Apart:
    """A `ScalingPolicy` that carries out a rule: additions at once, removals a window later where both are due, so that no
    worker is flipped: independent controllers cannot."""

    def __init__(self, rule: PoolsRule, max_workers: int) -> None:
        self._rule, self._max = rule, max_workers
        self._removals: Sizes = {}

    def decide(self, observation: Observation) -> Decision:
        """What to aim at after this window."""
        there = present(observation)
        asked = self._rule.sizes(observation, there)
        goal = {**there, **self._removals} if asked is None else self._within(asked, there)
        self._removals = {}
        more = {role: n for role, n in goal.items() if n > there.get(role, 0)}
        fewer = {role: n for role, n in goal.items() if n < there.get(role, 0)}
        if more and fewer:
            self._removals, act = fewer, more
        else:
            act = more or fewer
        if not act:
            return Decision(targets=there, reason="hold")
        text = ", ".join(f"{role} {there.get(role, 0)} to {n}" for role, n in sorted(act.items()))
        return Decision(targets=act, reason=text, changed=True)

    def _within(self, asked: Sizes, there: Sizes) -> Sizes:
        """Never below one worker; additions that the budget has no room for are cut, in decode first."""
        goal = {role: max(1, n) for role, n in asked.items()}
        order: tuple[Role, Role] = ("decode", "prefill")
        for role in order:
            over = sum(goal.values()) - self._max
            if over > 0 and role in goal:
                goal[role] = max(min(goal[role], max(there.get(role, 0), 1)), goal[role] - over)
        return goal


def present(seen: Observation) -> Sizes:
    """Workers of each role that are up or on their way."""
    found: Sizes = {"prefill": 0, "decode": 0}
    for pool in seen.pools:
        found[pool.role] = found.get(pool.role, 0) + pool.up + pool.starting
    return found


def _up(seen: Observation, role: Role) -> int:
    return sum(pool.up for pool in seen.pools if pool.role == role)


class DynamoLoad:
    """Dynamo's load-based planner (0.x): thresholds on the prefill queue and the decode workers' cache, one worker at a time.

    The cache's share is that of tokens, or of sequences where the batch is fuller, as it would be for a hybrid.
    """

    def __init__(self, kind: WorkerKind, max_workers: int) -> None:
        self._kind, self._max = kind, max_workers
        self._queue: list[float] = []
        self._kv: list[float] = []
        self._began: Sizes | None = None
        self._began_s = 0.0
        self._grace = 0

    def sizes(self, seen: Observation, there: Sizes) -> Sizes | None:
        """Collects each window; decides once an interval, unless workers came or went meanwhile."""
        up = max(_up(seen, "decode"), 1)
        tokens = seen.decoding_tokens / (up * self._kind.blocks * self._kind.limits.block_size)
        places = seen.decoding / (up * self._kind.limits.max_batch)
        self._queue.append(float(seen.waiting))
        self._kv.append(max(tokens, places) + WAITING_KV * seen.waiting_decode / up)
        now = {role: _up(seen, role) for role in there}
        if any(pool.starting for pool in seen.pools):  # its adjustments last until the new worker is up
            self._queue, self._kv, self._began, self._began_s = [], [], None, seen.at_s
            return None
        began = now if self._began is None else self._began
        self._began = began
        if seen.at_s - self._began_s < ADJUST_S - 1e-6:
            return None
        queue, kv = float(np.mean(self._queue)), float(np.mean(self._kv))
        trend = self._queue[-1] + GRACE * (self._queue[-1] - self._queue[0])
        self._queue, self._kv, self._began, self._began_s = [], [], None, seen.at_s
        if now != began:
            return None
        goal = dict(there)
        if queue < PREFILL_DOWN and goal["prefill"] > 1:
            goal["prefill"] -= 1
        if kv < KV_DOWN and goal["decode"] > 1 and self._grace == 0:
            goal["decode"] -= 1
        if queue > PREFILL_UP and trend > PREFILL_UP and sum(goal.values()) < self._max:
            goal["prefill"] += 1
        if kv > KV_UP and sum(goal.values()) < self._max:
            goal["decode"] += 1
            self._grace = GRACE
        self._grace = max(0, self._grace - 1)
        return goal


def forecast(samples: Sequence[float]) -> float:
    """The next value: the last one of fewer than 5 samples, else an autoregression of order 1 by least squares, which stands
    for the planner's auto-ARIMA."""
    if len(samples) < LEAST_SAMPLES:
        return samples[-1] if samples else 0.0
    y = np.asarray(samples[-HISTORY:], dtype=np.float64)
    before, after = y[:-1], y[1:]
    spread = float(np.var(before))
    if spread <= 1e-12 * max(1.0, float(np.mean(before)) ** 2):
        return float(y[-1])
    slope = float(np.clip(np.mean((before - before.mean()) * (after - after.mean())) / spread, -0.99, 0.99))
    return float(after.mean() + slope * (y[-1] - before.mean()))


def decode_tokens_per_s(kind: WorkerKind, itl_s: float, context: float) -> float:
    """Tokens/s of one worker with the fullest cache whose steps stay within `itl_s`, on a grid of 100 shares of its cache, as
    the planner's decode interpolator looks it up; the lowest share where none does."""
    room = kind.blocks * kind.limits.block_size / max(context, 1.0)
    for i in range(99, -1, -1):
        batch = max(1, min(kind.limits.max_batch, int(i / 99 * room)))
        step_s = kind.times.decode_s(batch, batch * context)
        if step_s <= itl_s or i == 0:
            return batch / step_s
    return 0.0


def prompt_tokens_per_s(kind: WorkerKind, isl: float) -> float:
    """Prompt tokens/s of one worker, as a profile under full load has them: its attention groups prefill side by side."""
    tokens = max(1, round(isl))
    groups = max(1, min(kind.times.groups, kind.limits.step_tokens // tokens))
    return groups * tokens / (kind.times.prefill_s(tokens, 0) + kind.times.spread_s * (groups - 1) * tokens)


class _Interval:
    """Sums over the windows of an interval."""

    def __init__(self) -> None:
        self.requests = self.prompts = self.isl = self.ended = self.osl = self.ttft = self.itl = 0.0
        self.batch: list[float] = []

    def add(self, seen: Observation) -> None:
        self.requests += seen.arrived or 0
        if seen.isl is not None:
            self.prompts += seen.isl.count
            self.isl += seen.isl.count * seen.isl.mean
        if seen.osl is not None:
            self.ended += seen.osl.count
            self.osl += seen.osl.count * seen.osl.mean
            self.ttft += seen.osl.count * (seen.ttft_s or 0.0)
            self.itl += seen.osl.count * (seen.tpot_s or 0.0)
        self.batch.append(seen.decoding / max(_up(seen, "decode"), 1))


class DynamoSla:
    """Dynamo's SLA planner (0.x): forecasts of requests and mean lengths, correction factors out of the last interval.

        prefill = ceil(requests * isl / interval * min(1, ttft / expected ttft) / prefill tokens/s of a worker)
        decode  = ceil(requests * osl / interval / tokens/s of a worker whose steps stay within itl / (itl / expected itl))

    The mean TTFT is not observed; the 90th percentile in its place never asks for fewer workers.
    """

    def __init__(self, kind: WorkerKind, itl_s: float, max_workers: int) -> None:
        self._kind, self._itl_s, self._max = kind, itl_s, max_workers
        self._now = _Interval()
        self._began_s = 0.0
        self._requests: list[float] = []
        self._isl: list[float] = []
        self._osl: list[float] = []

    def sizes(self, seen: Observation, there: Sizes) -> Sizes | None:
        """Decides once an interval; skips intervals in which nothing was asked or nothing ended."""
        self._now.add(seen)
        if seen.at_s - self._began_s < ADJUST_S - 1e-6:
            return None
        last, self._now, self._began_s = self._now, _Interval(), seen.at_s
        if not last.prompts or not last.ended:
            return None
        isl, osl = last.isl / last.prompts, last.osl / last.ended
        for samples, value in ((self._requests, last.requests), (self._isl, isl), (self._osl, osl)):
            samples.append(value)
        expected_s = self._kind.times.prefill_s(round(isl), 0) + self._kind.times.first_token_s
        batch = max(1, round(float(np.mean(last.batch))))
        expected_itl_s = self._kind.times.decode_s(batch, batch * (isl + osl / 2.0))
        slower = last.itl / last.ended / expected_itl_s
        return self.replicas(
            forecast(self._requests), forecast(self._isl), forecast(self._osl), last.ttft / last.ended / expected_s, slower
        )

    def replicas(self, requests: float, isl: float, osl: float, ttft_factor: float, itl_factor: float) -> Sizes:
        """Workers for so many requests an interval of these mean lengths."""
        requests, isl, osl = max(requests, 0.0), max(isl, 1.0), max(osl, 1.0)
        prompts = requests * isl / ADJUST_S * min(1.0, ttft_factor)
        worker = prompt_tokens_per_s(self._kind, isl)
        itl_s = self._itl_s / itl_factor if itl_factor > 0 else self._itl_s
        tokens = requests * osl / ADJUST_S
        prefill = max(1, ceil(prompts / worker))
        decode = max(1, ceil(tokens / decode_tokens_per_s(self._kind, itl_s, isl + osl / 2.0)))
        if prefill + decode > self._max:
            prefill = max(1, round(prefill * self._max / (prefill + decode)))
            decode = max(1, self._max - prefill)
        return {"prefill": prefill, "decode": decode}


class DynamoBoth:
    """Dynamo's planner of 1.x with objectives: forecasts give a floor every 180 s, load moves a pool by one above it when
    nothing is on its way.

    A worker's TTFT and ITL are estimated from step times, exactly, where the planner fits them; its pool's mean load stands for
    the condition that all workers are over. It looks every 10 s instead of 5.
    """

    def __init__(self, kind: WorkerKind, ttft_s: float, itl_s: float, max_workers: int) -> None:
        self._kind, self._ttft_s, self._itl_s, self._max = kind, ttft_s, itl_s, max_workers
        self._floor = DynamoSla(kind, itl_s, max_workers)
        self._least: Sizes = {"prefill": 1, "decode": 1}
        self._isl, self._osl = 1.0, 1.0

    def sizes(self, seen: Observation, there: Sizes) -> Sizes | None:
        """After each window."""
        if seen.isl is not None:
            self._isl = seen.isl.mean
        if seen.osl is not None:
            self._osl = seen.osl.mean
        due = self._floor.sizes(seen, there)
        if due is not None:  # without correction factors, which 1.x has no more
            requests, isl, osl = (forecast(s) for s in (self._floor._requests, self._floor._isl, self._floor._osl))
            self._least = self._floor.replicas(requests, isl, osl, 1.0, 1.0)
        goal = {role: max(n, self._least.get(role, 1)) for role, n in there.items()}
        if goal != there:
            return goal
        for role, estimate, objective_s in (
            ("prefill", self._estimated_ttft_s, self._ttft_s),
            ("decode", self._estimated_itl_s, self._itl_s),
        ):
            pools = [pool for pool in seen.pools if pool.role == role]
            up = sum(pool.up for pool in pools)
            if not up or any(pool.starting or pool.draining for pool in pools):
                continue
            n = there[role]  # type: ignore[index]
            if estimate(seen, up) > objective_s and sum(there.values()) < self._max:
                goal[role] = n + 1  # type: ignore[index]
            elif n > self._least[role] and estimate(seen, up - 1) < DOWN_SENSITIVITY * objective_s:  # type: ignore[index]
                goal[role] = n - 1  # type: ignore[index]
        return goal

    def _estimated_ttft_s(self, seen: Observation, workers: int) -> float:
        tokens = sum(pool.queued_tokens for pool in seen.pools if pool.role == "prefill")
        queue_s = tokens / workers / prompt_tokens_per_s(self._kind, self._isl)
        return queue_s + self._kind.times.prefill_s(round(self._isl), 0)

    def _estimated_itl_s(self, seen: Observation, workers: int) -> float:
        batch = max(1, ceil((seen.decoding + seen.waiting_decode) / workers))
        return self._kind.times.decode_s(batch, batch * (self._isl + self._osl / 2.0))


class RayServe:
    """Ray Serve's request-based autoscaler, one for each pool: ongoing requests over a target, averaged over 30 s, after delays
    of 30 s up and 600 s down.

    `decode_ongoing` is what a load test finds, as its guide asks: the default of 2 would hold any such pool at its budget.
    """

    def __init__(self, decode_ongoing: float, max_workers: int) -> None:
        self._targets: dict[Role, float] = {"prefill": PREFILL_ONGOING, "decode": decode_ongoing}
        self._max = max_workers
        self._ongoing: dict[Role, deque[float]] = {role: deque(maxlen=round(LOOK_BACK_S / WINDOW_S)) for role in self._targets}
        self._counter: dict[Role, int] = dict.fromkeys(self._targets, 0)

    def sizes(self, seen: Observation, there: Sizes) -> Sizes | None:
        """After each window."""
        prompts = seen.waiting_tokens / seen.isl.mean if seen.isl is not None else 0.0
        ongoing: dict[Role, float] = {
            "prefill": max(float(seen.waiting), prompts),
            "decode": float(seen.decoding + seen.waiting_decode),
        }
        goal = {}
        for role, target in self._targets.items():
            self._ongoing[role].append(ongoing[role])
            wanted = ceil(float(np.mean(self._ongoing[role])) / target - 1e-9)
            goal[role] = self._delayed(role, max(1, min(self._max - 1, wanted)), there[role])
        return goal

    def _delayed(self, role: Role, wanted: int, now: int) -> int:
        """`wanted` once it was asked for in a row for longer than the delay; `now` until then."""
        counter = self._counter[role]
        if wanted > now:
            counter, due = max(counter, 0) + 1, int(UPSCALE_DELAY_S / WINDOW_S)
        elif wanted < now:
            counter, due = min(counter, 0) - 1, int(DOWNSCALE_DELAY_S / WINDOW_S)
        else:
            counter, due = 0, 0
        acts = abs(counter) > due
        self._counter[role] = 0 if acts else counter
        return wanted if acts else now


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a controller is made for a cell, and how often it looks."""

    make: Callable[[Ready], ScalingPolicy]
    window_s: float
    source: str


def _objective(made: Ready) -> tuple[float, float]:
    inf = float("inf")
    return made.slo.ttft_s or inf, made.slo.tpot_s or inf


def _sla(made: Ready) -> ScalingPolicy:
    return Apart(DynamoSla(made.kind, _objective(made)[1], made.max_workers), made.max_workers)


def _both(made: Ready) -> ScalingPolicy:
    return Apart(DynamoBoth(made.kind, *_objective(made), made.max_workers), made.max_workers)


def _ray(made: Ready) -> ScalingPolicy:
    load_tested = made.rates.utilisation * made.rates.decode_batch(made.context)
    return Apart(RayServe(load_tested, made.max_workers), made.max_workers)


RULES: dict[str, Rule] = {
    "dynamo-load": Rule(
        make=lambda made: Apart(DynamoLoad(made.kind, made.max_workers), made.max_workers),
        window_s=WINDOW_S, source="Dynamo 0.x load-based planner",
    ),
    "dynamo-sla": Rule(make=_sla, window_s=WINDOW_S, source="Dynamo 0.x SLA planner"),
    "dynamo-1x": Rule(make=_both, window_s=WINDOW_S, source="Dynamo 1.x planner, throughput floor and load"),
    "ray-serve": Rule(make=_ray, window_s=WINDOW_S, source="Ray Serve request-based autoscaling"),
}  # fmt: skip
