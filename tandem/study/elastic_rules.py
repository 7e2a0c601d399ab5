"""Independent prefill and decode controllers, re-stated from their published rules. Used by the study only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.sched.observation import ScalingPolicy

if TYPE_CHECKING:
    from tandem.study.elastic_cells import Ready


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a controller is made for a cell, and how often it looks."""

    make: Callable[[Ready], ScalingPolicy]
    window_s: float


RULES: dict[str, Rule] = {}
