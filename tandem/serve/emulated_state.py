"""What emulated engines give: answers of letters, states that are sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.engine.handoff import Handoff
from tandem.engine.types import TokenOutput
from tandem.sched.request import Request
from tandem.spec.errors import SpecError


@dataclass(frozen=True, slots=True)
class EmulatedState:
    """Stands for keys, values and recurrent states of `tokens` tokens; of no model, so of no layers."""

    tokens: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Letters:
    """What answers are made of: token ids and the text of each."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.ids or len(self.ids) != len(self.texts):
            raise SpecError(f"ids has {len(self.ids)}, texts {len(self.texts)} entries: need equal, >= 1")


@dataclass(slots=True)
class EmulatedStep:
    """What one step brought."""

    outputs: list[TokenOutput] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
