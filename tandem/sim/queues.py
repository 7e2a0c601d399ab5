"""What a simulated worker keeps beside its batch: the order of new prompts, and beginnings of prompts for later ones."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from tandem.sched.fair import FairShare
from tandem.sim.decoding import SimRequest


class Fifo:
    """New prompts of one client, or of nobody known, in order of arrival: a `tandem.sched.batch.NewPrompts`."""

    __slots__ = ("_at", "_queue")

    def __init__(self, queue: deque[SimRequest]) -> None:
        self._queue, self._at = queue, 0

    def pop(self) -> SimRequest | None:
        """The next one; None when there is none. The queue itself stays as it is."""
        if self._at >= len(self._queue):
            return None
        self._at += 1
        return self._queue[self._at - 1]

    def charge(self, client: str, tokens: float) -> None:
        """Nobody to compare with."""


class ClientTurns(FairShare):
    """What clients were served by a worker that takes runs of decode steps at once."""

    def __init__(self) -> None:
        super().__init__()
        self._decoding: Counter[str] = Counter()
        self._charged = 0
        """Steps of the present run that all in it were charged for."""

    def starts(self, client: str) -> None:
        """One more of its sequences decodes."""
        self._decoding[client] += 1

    def stops(self, client: str) -> None:
        """One fewer."""
        self._decoding[client] -= 1
        if not self._decoding[client]:
            del self._decoding[client]

    def comes(self, client: str, steps: int) -> None:
        """A request of `client` comes after so many steps of the present run."""
        self._charge_until(steps)
        self.arrive(client)

    def end_run(self, steps: int) -> None:
        """The run is over after so many steps."""
        self._charge_until(steps)
        self._charged = 0

    def _charge_until(self, steps: int) -> None:
        for client, count in self._decoding.items():
            self.charge(client, count * (steps - self._charged))
        self._charged = steps


class PrefixCache:
    """Hashes of the prompt blocks that a worker holds; the block used longest ago goes first."""

    def __init__(self, tokens: int, block: int) -> None:
        self._room, self._block = tokens // block, block
        self._held: OrderedDict[int, None] = OrderedDict()

    def match(self, hashes: Sequence[int]) -> int:
        """Tokens of a prompt with these blocks whose state is held, from its beginning on."""
        found = 0
        for known in hashes:
            if known not in self._held:
                break
            self._held.move_to_end(known)
            found += 1
        return found * self._block

    def add(self, hashes: Sequence[int]) -> None:
        """A prompt with these blocks was prefilled."""
        for known in reversed(hashes):  # so that a chain loses its end before its beginning
            self._held[known] = None
            self._held.move_to_end(known)
        while len(self._held) > self._room:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """All is lost."""
        self._held.clear()
