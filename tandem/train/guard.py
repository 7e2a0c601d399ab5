"""When a loss is not to be believed: not a number, or far above what it was."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from tandem.train.recipe import GuardPart


class Guard:
    """Watches the losses of a run, in nats a token."""

    def __init__(self, part: GuardPart, losses: Sequence[float] = ()) -> None:
        self.part = part
        self._losses = deque(losses, maxlen=part.window)

    @property
    def losses(self) -> list[float]:
        """The window, for a checkpoint."""
        return list(self._losses)

    def refuses(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this loss and norm must not be made, or None where it may; then the loss counts as seen."""
        if not math.isfinite(loss):
            return f"loss={loss}: is not a number"
        if not math.isfinite(grad_norm):
            return f"grad_norm={grad_norm}: is not a number"
        if len(self._losses) == self.part.window:
            usual = statistics.median(self._losses)
            if loss > usual + self.part.spike:
                return f"loss={loss:.4g}: a spike over {usual:.4g}, the median of {self.part.window} steps"
        self._losses.append(loss)
        return None
