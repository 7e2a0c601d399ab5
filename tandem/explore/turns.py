"""Who is planned for next, where several pages ask and each of them faster than answers are found."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Condition
from typing import TypeVar

Found = TypeVar("Found")
MAX_VISITS = 1000
"""Pages whose last move is remembered."""


class Turns:
    """One plan at a time, in the order of asking. What a later move of the same visit has overtaken is not begun."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._queue: deque[object] = deque()  # The first one is being planned, or is about to be.
        self._last_move: OrderedDict[str, int] = OrderedDict()

    def take(self, visit: str, move: int, plan: Callable[[], Found]) -> Found | None:
        """What `plan` returns when its turn has come; None where it was overtaken before. The visit "" overtakes nothing."""
        ticket = object()
        with self._changed:
            self._note(visit, move)
            self._queue.append(ticket)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue[0] is ticket or self._overtaken(visit, move))
            if self._overtaken(visit, move):
                self._leave(ticket)
                return None
        try:
            return plan()
        finally:
            with self._changed:
                self._leave(ticket)

    def _note(self, visit: str, move: int) -> None:
        if not visit:
            return
        self._last_move[visit] = max(move, self._last_move.get(visit, move))
        self._last_move.move_to_end(visit)
        if len(self._last_move) > MAX_VISITS:
            self._last_move.popitem(last=False)

    def _overtaken(self, visit: str, move: int) -> bool:
        return self._last_move.get(visit, move) > move

    def _leave(self, ticket: object) -> None:
        self._queue.remove(ticket)
        self._changed.notify_all()
