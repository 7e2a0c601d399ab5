"""What workers of one kind achieve within an objective: the rates that scaling divides traffic by."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Protocol

from tandem.sched.observation import Lengths
from tandem.sched.route import StepTimes
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

TAIL = 0.01
"""Share of prompts that may queue for longer than the TTFT objective leaves: what objectives usually allow, a twentieth or a
tenth, is used up by the times at which a forecast was wrong."""


class PoolRates(Protocol):
    """Rates of the workers that may be started; a kind of hardware and a parallelism."""

    def prefill_load(self, rate_rps: float, isl: Lengths, dispersion: float = 1.0) -> float:
        """Workers, not rounded, that prefill so many requests/s within the TTFT objective. `dispersion`: variance over mean of
        how many come in a window; 1 where they come one by one."""
        ...

    def prompt_s(self, tokens: float, isl: Lengths) -> float:
        """Seconds in which one worker prefills so many tokens of such prompts."""
        ...

    def link_load(self, rate_rps: float, isl: Lengths) -> float:
        """Workers, not rounded, whose links take in the states of so many prompts a second."""
        ...

    def decode_batch(self, context: float) -> int:
        """Sequences of this mean context that one worker holds within the TPOT objective and its memory; at least 1."""
        ...

    def decode_rps(self, context: float, osl: float) -> float:
        """Requests/s that one worker decodes with that many sequences."""
        ...

    def colocated_rps(self, isl: Lengths, context: float, osl: float) -> float:
        """Requests/s that one worker prefills and decodes."""
        ...


@dataclass(frozen=True, kw_only=True)
class TableRates:
    """`PoolRates` out of step times and what a worker holds."""

    times: StepTimes
    blocks: int
    block_size: int
    max_batch: int
    ttft_s: float | None = None
    """Objective, for all but `TAIL` of the prompts; None: only the load counts."""
    tpot_s: float | None = None
    utilisation: float = 0.85
    """Share of its time or room that a worker is planned to be full."""
    groups: int = 1
    """Attention groups of a worker, each of which prefills prompts of its own at the same time."""
    spread_s: float = 0.0
    """Seconds by which a prompt token in one group lengthens a step of the others."""
    link_s: float = 0.0
    """Seconds that a state takes on a worker's own link, however long its prompt."""
    link_s_per_token: float = 0.0
    """The same for each token of the prompt."""

    def __post_init__(self) -> None:
        for name in ("blocks", "block_size", "max_batch", "groups"):
            require_int(name, getattr(self, name), high=10**12)
        require_number("utilisation", self.utilisation, high=1.0)
        for name in ("ttft_s", "tpot_s"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))

    def _prompt(self, isl: Lengths) -> tuple[float, float, float]:
        """Mean seconds of a prompt, their squared coefficient of variation, and seconds of the 99th percentile."""
        nodes = [max(1, round(q)) for q in (isl.p50, isl.p90, isl.p99)]
        half, long, longest = (self._alone_s(n) for n in nodes)
        mean = max(self._alone_s(max(1, round(isl.mean))), 0.5 * half + 0.4 * (half + long) / 2 + 0.1 * long)
        square = 0.5 * half**2 + 0.4 * (half**2 + long**2) / 2 + 0.1 * (long**2 + longest**2) / 2
        return mean, max(0.0, square / mean**2 - 1.0), longest

    def _alone_s(self, tokens: int) -> float:
        """A prompt in one group, with as much in each of the others."""
        return self.times.prefill_s(tokens, 0) + self.spread_s * (self.groups - 1) * tokens

    def prompt_s(self, tokens: float, isl: Lengths) -> float:
        """Seconds in which one worker prefills so many tokens of such prompts."""
        return self._prompt(isl)[0] * tokens / max(isl.mean, 1.0) / self.groups

    def prefill_load(self, rate_rps: float, isl: Lengths, dispersion: float = 1.0) -> float:
        """Workers, not rounded, that prefill so many requests/s within the TTFT objective. `dispersion`: variance over mean of
        how many come in a window; 1 where they come one by one.

        At least the load over `utilisation`; beyond, as many as keep the queue of all but `TAIL` of the prompts (Sakasegawa's
        form of Kingman's formula, with an exponential tail) within what the objective leaves beside a long prompt.
        """
        mean, variation, long = self._prompt(isl)
        load = rate_rps * mean
        if load <= 0.0:
            return 0.0
        least = load / self.utilisation
        if self.ttft_s is None:
            return least / self.groups
        left_s = max(self.ttft_s - long, 0.1 * self.ttft_s)

        def wait_s(servers: float) -> float:
            rho = load / servers
            if rho >= 1.0:
                return inf
            tail = log(rho / TAIL) if rho > TAIL else 0.0
            queue = rho ** (sqrt(2.0 * (servers + 1.0)) - 1.0) / (max(servers, 1.0) * (1.0 - rho))
            return float(tail * (dispersion + variation) / 2.0 * mean * queue)

        low, high = least, least
        while wait_s(high) > left_s and high < 64.0 * least + 64.0:
            low, high = high, 1.25 * high
        for _ in range(20):
            middle = (low + high) / 2.0
            low, high = (middle, high) if wait_s(middle) > left_s else (low, middle)
        return high / self.groups

    def link_load(self, rate_rps: float, isl: Lengths) -> float:
        """Workers, not rounded, whose links take in the states of so many prompts a second, `utilisation` of the time."""
        return rate_rps * (self.link_s + self.link_s_per_token * isl.mean) / self.utilisation

    def decode_batch(self, context: float) -> int:
        """Sequences of this mean context that one worker holds within the TPOT objective and its memory; at least 1."""
        blocks_each = max(1.0, context / self.block_size + 0.5)
        room = max(1, min(self.max_batch, int(self.blocks / blocks_each)))
        low = 1
        while self.tpot_s is not None and low < room:
            middle = (low + room + 1) // 2
            slow = self.times.decode_s(middle, round(middle * context)) > self.tpot_s
            low, room = (low, middle - 1) if slow else (middle, room)
        return room

    def _decode_rps(self, context: float, osl: float) -> float:
        batch = self.decode_batch(context)
        return batch / (max(osl, 1.0) * self.times.decode_s(batch, round(batch * context)))

    def decode_rps(self, context: float, osl: float) -> float:
        """Requests/s that one worker decodes with that many sequences, `utilisation` of the time."""
        rate = self.utilisation * self._decode_rps(context, osl)
        if rate <= 0.0:
            raise SpecError("times: a decode step takes no time; give step times above 0")
        return rate

    def colocated_rps(self, isl: Lengths, context: float, osl: float) -> float:
        """Requests/s that one worker prefills and decodes, which take turns."""
        mean, _, _ = self._prompt(isl)
        return self.utilisation / (mean / self.groups + 1.0 / self._decode_rps(context, osl))
