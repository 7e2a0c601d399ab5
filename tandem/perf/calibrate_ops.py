"""Fits the curves of `efficiency` to the public operator measurements that `op_tables` reads.

Loss: soft-L1 of log(measured / predicted), so that twice too slow counts like twice too fast and stray rows pull
little. A row weighs 1/sqrt(rows in its quarter-decade of seconds): the tables hold mostly shapes of a few microseconds,
while a step's time is in the large ones. Efficiencies carry a weak pull to 0.7, which only decides where the data
do not (the arithmetic of an operation bound by memory). The spread is reported over all fitted rows, unweighted.

Rows faster than memory allows were served from a cache, which a model's weights and states never are; they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import date
from importlib import metadata, util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandem.perf import op_tables
from tandem.perf.efficiency import SHARPNESS, OpFit, compute_dtype, overlap
from tandem.perf.op_tables import OpTable
from tandem.perf.ops import NETWORK, OpClass, Result, Work
from tandem.spec.catalog import load_hardware
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.files import write_whole

PACKAGE = "aiconfigurator-core"
SYSTEMS = {
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "b200-sxm": "b200_sxm",
    "b300-sxm": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "a100-80gb-sxm": "a100_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
"""Our GPU names -> the package's."""

MAX_ROWS = 20_000
"""Rows that a fit looks at; of more, every k-th is taken."""

SLOW_SHARE, SLOW_FLOOR = 0.45, 4.0
"""A backend is left out if its large shapes reach less than this share of what the best backend's do, or its small ones
take this many times as long: the kernel is a fallback (FP8 cache unpacked first), or host time was measured."""

_PRIOR, _PULL = 0.7, 0.02
_LOW = np.log([1e-8, 5e-3, 5e-3])
_HIGH = np.log([1e-2, 1.0, 1.0])
_STARTS = ((3e-6, 0.7, 0.7), (2e-5, 0.4, 0.4), (1e-6, 0.9, 0.15))

ASSUMED_LAUNCH_S = 2e-6
ASSUMED_SPREAD = (0.67, 1.5, 0.25)
"""Where nothing was measured: seconds to launch a fused elementwise kernel, and its spread (p10, p90, median error)."""


def predict_s(work: Work, peak: float, wire: float, t0_s: float, ec: float, eb: float, sharpness: int) -> Result:
    """The curve in seconds, for `peak` FLOP/s and `wire` bytes/s; the same as `OpTimer.seconds`."""
    moved_s = np.asarray(work.moved_bytes, float) / (eb * wire)
    took: Result = t0_s + overlap(np.asarray(work.flops, float) / (ec * peak), moved_s, sharpness)
    return took


def fit_op(
    work: Work,
    seconds: NDArray[np.float64],
    peak: float,
    wire: float,
    choices: Sequence[int] = SHARPNESS,
    *,
    system: str = "",
    op: OpClass = "gemm",
    dtype: str = "bf16",
) -> OpFit:
    """The curve through measured `seconds`, for a peak in FLOP/s and a memory or link speed in bytes/s."""
    optimize = op_tables.extra("scipy.optimize")
    step = -(-len(seconds) // MAX_ROWS)
    part = Work(*(np.asarray(x, float)[::step] for x in work))
    target = np.log(seconds[::step])
    bins = np.unique(np.floor(4 * target / np.log(10)), return_inverse=True)[1]
    weight = np.bincount(bins)[bins] ** -0.5
    weight = np.sqrt(weight / weight.sum())

    best: tuple[float, NDArray[np.float64], int] | None = None
    for sharpness in choices if part.flops.any() else choices[:1]:

        def residuals(logs: NDArray[np.float64], p: int = sharpness) -> NDArray[np.float64]:
            t0_s, ec, eb = np.exp(logs)
            misses = weight * _soft(target - np.log(predict_s(part, peak, wire, t0_s, ec, eb, p)))
            return np.append(misses, _PULL * (logs[1:] - np.log(_PRIOR)))

        for start in _STARTS:
            found = optimize.least_squares(residuals, np.log(start), bounds=(_LOW, _HIGH), x_scale=1.0)
            if best is None or found.cost < best[0] * (1 - 1e-6):
                best = float(found.cost), found.x, sharpness
    assert best is not None
    t0_s, ec, eb = np.exp(best[1]).tolist()
    ratio = seconds / predict_s(work, peak, wire, t0_s, ec, eb, best[2])
    p10, p90 = np.quantile(ratio, [0.1, 0.9])
    return OpFit(
        system=system,
        op=op,
        dtype=dtype,
        num_rows=len(seconds),
        t0_s=t0_s,
        compute_efficiency=min(ec, 1.0),
        bandwidth_efficiency=min(eb, 1.0),
        sharpness=best[2],
        ratio_p10=float(p10),
        ratio_p90=float(p90),
        median_ape=float(np.median(np.abs(1 / ratio - 1))),
    )


def _soft(miss: NDArray[np.float64], scale: float = 0.1) -> NDArray[np.float64]:
    """Residuals whose squares are soft-L1: quadratic below `scale`, then linear."""
    size: NDArray[np.float64] = scale * np.sqrt(2 * (np.sqrt(1 + (miss / scale) ** 2) - 1))
    return np.copysign(size, miss)


def calibrate_ops(systems: Sequence[str] | None, progress: Callable[[str], None]) -> list[OpFit]:
    """Fit every operation of the named GPUs (None: all in SYSTEMS) to the tables of the installed package."""
    unknown = [name for name in systems or () if name not in SYSTEMS]
    if unknown:
        raise SpecError(f"systems={unknown[0]!r}: no operator tables; use any of {', '.join(SYSTEMS)}")
    op_tables.extra("scipy.optimize")
    folder = systems_dir()
    fits: list[OpFit] = []
    for name in systems or SYSTEMS:
        own = list(fit_system(op_tables.read_tables(folder, SYSTEMS[name]), name, progress))
        fits += own + list(_assumed(own))
    return fits


def systems_dir() -> Path:
    """Where the installed package keeps its tables."""
    found = util.find_spec("aiconfigurator_core")
    if found is None or found.origin is None:
        raise TandemError(op_tables.MISSING)
    return Path(found.origin).parent / "systems"


def fit_system(tables: Iterable[OpTable], name: str, progress: Callable[[str], None]) -> Iterator[OpFit]:
    """One curve for each (operation, format) of one GPU, pooled over its tables."""
    hardware = load_hardware(name)
    pools: dict[tuple[OpClass, str], dict[str, list[OpTable]]] = {}
    for table in tables:
        pools.setdefault((table.op, table.dtype), {}).setdefault(table.name, []).append(table)
    for (op, dtype), pool in pools.items():
        peak = hardware.peak(compute_dtype(op, dtype))
        wire = hardware.scale_up_bytes_per_s if op in NETWORK else hardware.memory_bytes_per_s
        usable = _usable([_join(parts) for parts in pool.values()], peak, wire, progress)
        if usable:
            rows = _join(usable)
            choices = (1,) if op == "moe" else SHARPNESS  # a backend's fit scales the two parts of experts apart (step.py)
            fit = fit_op(rows.work, rows.seconds, peak, wire, choices, system=name, op=op, dtype=dtype)
            progress(f"{name} {op} {dtype}: {fit.num_rows:,} rows, median error {fit.median_ape:.0%}")
            yield fit


def _join(tables: Sequence[OpTable]) -> OpTable:
    flops, moved = (np.concatenate([t.work[i] for t in tables]) for i in (0, 1))
    return tables[0]._replace(work=Work(flops, moved), seconds=np.concatenate([t.seconds for t in tables]))


def _usable(tables: Sequence[OpTable], peak: float, wire: float, progress: Callable[[str], None]) -> list[OpTable]:
    """Tables of one operation with possible rates, less the backends that no one would choose and the cached rows."""
    known: list[tuple[OpTable, float, float]] = []
    for table in tables:
        try:
            reached = op_tables.check_rates(table, peak, wire)
        except TandemError as error:
            progress(f"refused: {error}")
        else:
            known.append((table, reached, float(np.quantile(table.seconds, 0.05))))
    usable = []
    for table, reached, floor_s in known:
        most, least_s = max(k[1] for k in known), min(k[2] for k in known)
        if reached < SLOW_SHARE * most or floor_s > SLOW_FLOOR * least_s:
            progress(
                f"left out: {table.name} ({table.op}, {table.dtype}): {reached:.0%} of the peak, small shapes "
                f"{floor_s * 1e6:.0f} us; another backend {most:.0%}, {least_s * 1e6:.0f} us"
            )
            continue
        if table.op not in (*NETWORK, "moe"):  # what these two move is an expectation, not a count
            real = op_tables.ideal_s(table, peak, wire) <= table.seconds
            table = table._replace(work=Work(*(x[real] for x in table.work)), seconds=table.seconds[real])
        usable.append(table)
    return usable


def _assumed(fits: Sequence[OpFit]) -> Iterator[OpFit]:
    """Elementwise passes of a GPU where none was timed: the bandwidth share of its bf16 matmuls."""
    if any(fit.op == "memory" for fit in fits):
        return
    p10, p90, error = ASSUMED_SPREAD
    for fit in fits:
        if (fit.op, fit.dtype) == ("gemm", "bf16"):
            yield OpFit(
                system=fit.system,
                op="memory",
                dtype="bf16",
                num_rows=0,
                t0_s=ASSUMED_LAUNCH_S,
                compute_efficiency=_PRIOR,
                bandwidth_efficiency=fit.bandwidth_efficiency,
                sharpness=1,
                ratio_p10=p10,
                ratio_p90=p90,
                median_ape=error,
            )


def write_fits(fits: Sequence[OpFit], path: Path) -> None:
    """Write the CSV that `efficiency.parse_fits` reads, with its provenance on top; replaces `path` in one move."""
    names = [field.name for field in fields(OpFit)]
    lines = [f"# {line}" for line in _provenance(fits)] + [",".join(names)]
    for fit in sorted(fits, key=lambda f: (list(SYSTEMS).index(f.system) if f.system in SYSTEMS else -1, f.op, f.dtype)):
        values = (getattr(fit, name) for name in names)
        lines.append(",".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in values))
    write_whole(path, "\n".join(lines) + "\n")


def _provenance(fits: Sequence[OpFit]) -> Iterator[str]:
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        version = "unknown"
    rows, systems = sum(fit.num_rows for fit in fits), len({fit.system for fit in fits})
    yield f"Operator efficiencies: {len(fits)} curves of {systems} GPUs fitted to {rows:,} kernel timings."
    yield f"Timings: measured by NVIDIA, published in {PACKAGE} {version} (Apache-2.0); facts only, no table is copied."
    yield f"Fitted by Tandem on {date.today()}: tandem calibrate ops. Units and readings: tandem/perf/op_tables.py."
    yield "Curve: t0_s + ((F/(compute_efficiency P))^p + (B/(bandwidth_efficiency W))^p)^(1/p), p = sharpness."
    yield "Loss: soft-L1 of log(measured/predicted), a row weighs 1/sqrt(rows in its quarter-decade of seconds)."
    yield "ratio_p10, ratio_p90: measured/predicted over the fitted rows. num_rows 0: assumed, not measured."
    yield "scan_*: gated delta rule kernels; Mamba-2's scan was not measured."
    yield "moe: tokens spread by power_law_1.2 up to ep 8, balanced beyond."
    yield "Left out: backends far slower than the best one, and rows faster than memory allows (they sat in a cache)."
