"""Rate matching: how many prefill and decode instances balance each other.

Balance is n_p * R_p = n_d * R_d with instance rates in requests/s, so n_p / n_d = R_d / R_p. Paper B's Algorithm 2, as
printed, hands the numerator and denominator of this ratio to the two pools the other way round; its own Figure 9 (the
prefill share falls as interactivity rises) and the vendor's published recipe agree with the balance, so Tandem follows
the balance (facts: paper B, Appendix B and section 1.9).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.units import require_int

TOLERANCE = 0.03
"""Relative mismatch of the pools' rates that counts as balanced (paper B, Appendix B)."""
MAX_UNIT = 1024
"""Largest number of decode instances in one balanced unit; bigger pools are multiples of a unit."""


class Match(NamedTuple):
    """A balanced pair of pools and the requests/s it serves: min(n_p * R_p, n_d * R_d)."""

    num_prefill: int
    num_decode: int
    requests_per_s: float
    imbalance: float
    """Rate of the faster pool over the slower one, less 1."""


def _checked(field: str, value: float) -> None:
    if not (value > 0 and np.isfinite(value)):
        raise SpecError(f"{field}={value!r}: must be a finite number above 0")


def match_rates(
    prefill_rate: float,
    decode_rate: float,
    *,
    prefill_gpus: int = 1,
    decode_gpus: int = 1,
    budget: int,
    tolerance: float = TOLERANCE,
) -> Match | Infeasible:
    """The smallest pools whose rates agree within `tolerance` and whose GPUs stay within `budget`.

    Rates are requests/s of one instance, prefill_gpus and decode_gpus the GPUs of one instance. Smallest means fewest
    GPUs, then the better balance. An Infeasible says how close the budget comes.
    """
    for field, value in (("prefill_rate", prefill_rate), ("decode_rate", decode_rate)):
        _checked(field, value)
    for field, number in (("prefill_gpus", prefill_gpus), ("decode_gpus", decode_gpus), ("budget", budget)):
        require_int(field, number)
    if not 0 <= tolerance < 1:
        raise SpecError(f"tolerance={tolerance!r}: must be from 0 to below 1")
    ratio = min(decode_rate / prefill_rate, 1e12)
    best: Match | None = None
    best_gpus, closest = budget + 1, np.inf
    for num_decode in range(1, (budget - prefill_gpus) // decode_gpus + 1):
        most = (budget - num_decode * decode_gpus) // prefill_gpus
        exact = num_decode * ratio
        fewest = int(exact / (1 + tolerance))  # or one or two more: the fewest instances within the tolerance
        for num_prefill in {min(max(1, n), most) for n in (fewest, fewest + 1, fewest + 2, int(exact), int(exact) + 1)}:
            gpus = num_prefill * prefill_gpus + num_decode * decode_gpus
            rates = num_prefill * prefill_rate, num_decode * decode_rate
            imbalance = max(rates) / min(rates) - 1
            closest = min(closest, imbalance)
            key = (gpus, imbalance)
            if imbalance <= tolerance and (best is None or key < (best_gpus, best.imbalance)):
                best, best_gpus = Match(num_prefill, num_decode, min(rates), imbalance), gpus
    if best is not None:
        return best
    if not np.isfinite(closest):
        return Infeasible(f"one prefill and one decode instance need {prefill_gpus + decode_gpus} GPUs, budget is {budget}")
    return Infeasible(f"no whole numbers of instances within {budget} GPUs balance better than {closest:.1%}")


_CELLS = 1 << 15
"""Pairs times decode pool sizes that are tried at once: few enough for a cache, whatever the pairs."""


class Matches(NamedTuple):
    """Best pools for many pairs of instance kinds; num_prefill is 0 where nothing fits."""

    num_prefill: NDArray[np.int64]
    num_decode: NDArray[np.int64]
    requests_per_s: NDArray[np.float64]
    imbalance: NDArray[np.float64]


def fill_budget(
    prefill_rate: NDArray[np.float64],
    decode_rate: NDArray[np.float64],
    prefill_gpus: NDArray[np.float64],
    decode_gpus: NDArray[np.float64],
    *,
    budget: int,
    tolerance: float | None = TOLERANCE,
) -> Matches:
    """For every pair, the balanced pools that serve the most requests/s within the budget; arrays broadcast.

    A balanced unit is repeated as often as the budget allows. With tolerance None balance is not asked for, and the
    slower pool simply sets the rate: the fallback when a small budget holds no balanced pair.
    """
    shape = np.broadcast_shapes(prefill_rate.shape, decode_rate.shape, prefill_gpus.shape, decode_gpus.shape)
    best_rate, best_gpus = np.zeros(shape), np.full(shape, np.inf)
    best_p, best_d = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    imbalance = np.full(shape, np.inf)
    ratio = decode_rate / prefill_rate
    limit = MAX_UNIT if tolerance is not None else budget
    top = int(min(limit, (budget - np.min(prefill_gpus)) // np.min(decode_gpus)))
    sizes = max(1, _CELLS // max(1, math.prod(shape)))
    for begin in range(1, top + 1, sizes):
        n_d = np.arange(begin, min(begin + sizes, top + 1), dtype=np.float64).reshape(-1, *(1,) * len(shape))
        exact = n_d * ratio
        n_p = np.maximum(np.stack([np.floor(exact), np.ceil(exact)], 1), 1.0)  # [sizes, 2, *shape]
        n_d = n_d[:, None]
        n_p = np.minimum(n_p, np.maximum((budget - n_d * decode_gpus) // prefill_gpus, 1.0))
        unit = n_p * prefill_gpus + n_d * decode_gpus
        copies = budget // unit
        p_rate, d_rate = n_p * prefill_rate, n_d * decode_rate
        slower = np.minimum(p_rate, d_rate)
        off = np.maximum(p_rate, d_rate) / slower - 1.0
        fits = copies >= 1 if tolerance is None else (copies >= 1) & (off <= tolerance)
        rate = np.where(fits, copies * slower, 0.0)
        near = fits & (rate >= np.max(rate, (0, 1)) * (1 - 1e-9))
        gpus = np.where(near, copies * unit, np.inf)
        first = np.argmin(gpus.reshape(-1, *shape), 0)[None]

        def taken(values: NDArray[np.float64], first: NDArray[np.int64] = first) -> NDArray[np.float64]:
            flat = np.broadcast_to(values, (*values.shape[:1], 2, *shape)).reshape(-1, *shape)
            return np.asarray(np.take_along_axis(flat, first, 0)[0])

        found, used = taken(rate), taken(gpus)
        better = (found > best_rate * (1 + 1e-9)) | ((found >= best_rate * (1 - 1e-9)) & (used < best_gpus))
        best_rate, best_gpus = np.where(better, found, best_rate), np.where(better, used, best_gpus)
        best_p = np.where(better, taken(copies * n_p), best_p).astype(np.int64)
        best_d = np.where(better, taken(copies * n_d), best_d).astype(np.int64)
        imbalance = np.where(better, taken(off), imbalance)
    return Matches(best_p, best_d, best_rate, imbalance)
