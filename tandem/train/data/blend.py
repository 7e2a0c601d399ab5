"""Which source the next sequence comes from, so that shares are kept at every moment."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tandem.train.recipe import PhasePart


class Blend:
    """Sequences handed out to sources by their shares, phase after phase.

    Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): among the sources that may come next
    without getting ahead, the one that must come soonest. In every phase, after any number n of sequences, each source has had
    its share of n to less than one; over any window inside a phase, to less than two.
    """

    def __init__(self, phases: Sequence[PhasePart], sources: Sequence[str], total: int) -> None:
        self.ends = [math.floor(phase.until * total + 0.5) for phase in phases]
        """Sequences of the run after which each phase is over; the last goes on for as long as more are asked for."""
        self._shares = [[phase.weights.get(s, 0.0) / sum(phase.weights.values()) for s in sources] for phase in phases]
        self.position = 0
        """Sequences handed out in the whole run."""
        self._phase = 0
        self._used = [0] * len(sources)
        self._skip_ended()

    @property
    def phase(self) -> int:
        """Number of the phase that the next sequence belongs to."""
        return self._phase

    def next(self) -> int:
        """Number of the source of the next sequence."""
        shares = self._shares[self._phase]
        n = sum(self._used) + 1
        active = [i for i, share in enumerate(shares) if share > 0]
        slack = 1 / (2 * len(active) - 2) if len(active) > 1 else 0.0
        ready = [i for i in active if shares[i] * n - self._used[i] >= slack - 1e-12] or active
        chosen = min(ready, key=lambda i: ((1 - slack - (shares[i] * n - self._used[i])) / shares[i], i))
        self._used[chosen] += 1
        self.position += 1
        self._skip_ended()
        return chosen

    def state(self) -> dict[str, object]:
        """What `restore` goes on from, as JSON data."""
        return {"position": self.position, "phase": self._phase, "used": list(self._used)}

    def restore(self, position: int, phase: int, used: Sequence[int]) -> None:
        """Go on where `state` was taken."""
        self.position, self._phase, self._used = position, phase, list(used)

    def _skip_ended(self) -> None:
        while self._phase + 1 < len(self.ends) and self.position >= self.ends[self._phase]:
            self._phase += 1
            self._used = [0] * len(self._used)
