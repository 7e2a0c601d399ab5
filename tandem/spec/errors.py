"""What can go wrong, as one tree.

    TandemError
    ├── SpecError      an impossible or unknown value: names the field, the value and what would do
    ├── TraceError     a trace or case file with a bad row: names the file, the row and the reason
    └── NoPlanError    no deployment meets the request: carries the reasons, counted

`Infeasible` is not an error but an answer: "no, because". Searches carry it instead of skipping.
"""

from __future__ import annotations

from dataclasses import dataclass


class TandemError(ValueError):
    """Base of every error that Tandem raises on bad input. Its text is one line."""


class SpecError(TandemError):
    """A value that cannot be: the message names the field, the value and what would be accepted."""


class TraceError(TandemError):
    """A row of a trace or a case file that cannot be read; the message names file, row and reason."""


class NoPlanError(TandemError):
    """No deployment in the space meets the request; the message says what stood in the way."""


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A refusal with its reason; falsy, so that `if not answer` reads naturally."""

    reason: str

    def __bool__(self) -> bool:
        return False
