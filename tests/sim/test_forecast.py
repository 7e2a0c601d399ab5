from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.sched.forecast import Forecast, Smoothing
from tandem.spec.errors import SpecError


def fed(values: list[float | None], **smoothing: float) -> Forecast:
    forecast = Forecast(smoothing=Smoothing(**smoothing))  # type: ignore[arg-type]
    for value in values:
        forecast = forecast.update(value)
    return forecast


@given(st.floats(0.1, 1e6), st.integers(1, 50))
def test_a_constant_is_forecast_as_itself_without_doubt(value: float, windows: int) -> None:
    forecast = fed([value] * windows)
    assert math.isclose(forecast.mean(5), value)
    assert forecast.upper(5, 3.0) == pytest.approx(value)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=20), st.integers(0, 10))
def test_gaps_change_nothing_but_time(values: list[float], gap: int) -> None:
    plain, gappy = fed(list(values)), fed([*values, *[None] * gap])
    assert (gappy.level, gappy.trend, gappy.variance, gappy.seen) == (plain.level, plain.trend, plain.variance, plain.seen)


def test_a_ramp_is_run_ahead_of_and_ends() -> None:
    forecast = fed([float(i) for i in range(100)])
    assert forecast.mean(4) > forecast.mean(1) > fed([float(i) for i in range(100)], trend=1e-9).mean(1)
    assert forecast.mean(1e6) < 120


def test_noise_shows_in_the_upper_quantile() -> None:
    draw = np.random.default_rng(1).normal(100, 10, 500)
    forecast = fed(draw.tolist())
    assert 6 < forecast.upper(1, 1.0) - forecast.mean(1) < 18


def test_a_season_is_learned() -> None:
    wave = [100 + 50 * math.sin(2 * math.pi * i / 12) for i in range(240)]
    seasonal, plain = fed(list(wave), period=12), fed(list(wave))
    errors = [abs(f.mean(3) - wave[242 % 12]) for f in (seasonal, plain)]
    assert errors[0] < 5 < errors[1]


def test_nothing_seen_is_told() -> None:
    with pytest.raises(SpecError, match="level=None"):
        Forecast().mean()
