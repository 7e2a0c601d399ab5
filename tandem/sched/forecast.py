"""Forecasts of a series that comes window by window: exponential smoothing with a damped trend, an optional season, quicker
where it jumps, and how far off it has been. Immutable: an update gives another forecast."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

DAMPING = 0.8
"""What a trend keeps from one window to the next: a rise does not go on for ever."""
SURPRISE = 3.0
"""Standard deviations beyond which a value is no noise: the series has jumped."""
JUMP = 0.8
"""Share of the newest value in the level after a jump."""
SETTLED = 10
"""Values before which nothing is a surprise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Smoothing:
    """How fast a forecast learns; shares of the newest value, in (0, 1]."""

    level: float = 0.3
    trend: float = 0.1
    season: float = 0.2
    spread: float = 0.1
    period: int = 1
    """Windows of a season; 1: none."""

    def __post_init__(self) -> None:
        for name in ("level", "trend", "season", "spread"):
            require_number(name, getattr(self, name), high=1.0)
        require_int("period", self.period)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What has been learned. `level` None: nothing has been seen yet."""

    smoothing: Smoothing = Smoothing()
    level: float | None = None
    trend: float = 0.0
    variance: float = 0.0
    """Of forecasts one window ahead, smoothed."""
    seen: int = 0
    at: int = 0
    """Windows so far, those without a value included."""
    season: tuple[float, ...] = ()

    def _season(self, ahead: int) -> float:
        period = self.smoothing.period
        return self.season[(self.at + ahead) % period] if period > 1 and self.season else 0.0

    def mean(self, ahead: float = 1.0) -> float:
        """The value `ahead` windows on; never below 0. SpecError before the first value."""
        if self.level is None:
            raise SpecError("level=None: nothing to forecast from; update with a value first")
        damped = DAMPING * (1.0 - DAMPING**ahead) / (1.0 - DAMPING)
        return float(max(0.0, self.level + damped * self.trend + self._season(round(ahead) - 1)))

    def upper(self, ahead: float = 1.0, deviations: float = 1.0) -> float:
        """The same with so many standard deviations of its errors on top."""
        return self.mean(ahead) + deviations * float(self.variance**0.5)

    def update(self, value: float | None) -> Forecast:
        """With the value of the next window; None: nobody measured it, so that only time goes on."""
        if value is None:
            return replace(self, at=self.at + 1)
        s = self.smoothing
        if self.level is None:
            none = (0.0,) * s.period if s.period > 1 else ()
            return replace(self, level=value, seen=1, at=self.at + 1, season=none)
        error = value - self.mean(1.0)
        begun = self.level + DAMPING * self.trend
        off = value - self._season(0)
        learned = s.level
        if self.seen >= SETTLED and error * error > SURPRISE**2 * self.variance:
            learned = max(learned, JUMP)
        level = begun + learned * (off - begun)
        trend = DAMPING * self.trend + s.trend * (level - self.level - DAMPING * self.trend)
        season = self.season
        if season:
            place = self.at % s.period
            new = season[place] + s.season * (value - level - season[place])
            season = (*season[:place], new, *season[place + 1 :])
        weight = max(s.spread, 1.0 / (self.seen + 1))
        variance = self.variance + weight * (error * error - self.variance)
        return replace(self, level=level, trend=trend, variance=variance, seen=self.seen + 1, at=self.at + 1, season=season)
