"""What a study hands on: claims with verdicts, figures as plain numbers, assumptions. Reports draw it, nothing here does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tandem.spec.errors import SpecError

Style = Literal["line", "dash", "markers"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim beside our numbers; `printed` is None where nobody has printed one.

    `holds` is the verdict of the study's judging backend, None where its runs are too few to say; `holds_engine` that of the
    second one, None where it was not priced. `why` is arithmetic: what decides, and where the claim does not hold what would
    have to change. `ours_by` is `ours` for each backend, `values` the numbers behind it, in SI units.
    """

    id: str
    title: str
    printed: str | None
    ours: str
    holds: bool | None
    holds_engine: bool | None
    why: str
    source: str
    ours_by: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "title", "printed", "ours", "why", "source"):
            text = getattr(self, name)
            if not (name == "printed" and text is None) and not text.strip():
                raise SpecError(f"claim {self.id or '?'}: {name} is empty; a verdict needs it")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; `role` picks its colour in a report (a mode's name), `text` says what each point is."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    text: Sequence[str] = ()
    role: str | None = None
    style: Style = "line"

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or (self.text and len(self.text) != len(self.x)):
            raise SpecError(f"series {self.name!r}: x has {len(self.x)}, y {len(self.y)}, text {len(self.text)} points")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart of a figure."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels side by side with common axes."""

    title: str
    note: str
    x_title: str
    y_title: str
    panels: tuple[Panel, ...]
    x_labels: tuple[str, ...] = ()
    """Names of x = 0, 1, 2 ..., where x counts cases instead of measuring something."""
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A whole study. `points_evaluated` were priced, `points_considered` includes those that memory refused."""

    study: str
    claims: tuple[Claim, ...]
    figures: Mapping[str, Figure]
    assumptions: tuple[str, ...]
    errata: tuple[str, ...]
    """What the study found that cannot come from the paper's own stated model, with the arithmetic."""
    findings: Mapping[str, Any]
    """Further numbers that the text of the study quotes."""
    backends: Mapping[str, str]
    points_evaluated: int
    points_considered: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `tandem study ... --json` prints."""
        return asdict(self)
