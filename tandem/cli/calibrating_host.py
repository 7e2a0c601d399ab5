"""`tandem calibrate host`: this machine and the engine on it, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any

from tandem.cli.app import emit
from tandem.cli.needed import need
from tandem.spec.errors import SpecError
from tandem.spec.local import host_name, usable_cores
from tandem.spec.units import require_int

if TYPE_CHECKING:
    from tandem.bench.grid import Point
    from tandem.perf.host import HostCalibration, ServedRow
    from tandem.spec.model import ModelSpec

MODELS = ("nano-hybrid", "nano-transformer")
DTYPES = ("float32", "float16", "bfloat16")
TERMS = ("step_s", "sequence_s", "gemm", "attention", "other", "prompt", "prompt_s", "host_s")
SCALES = {"matmul": "gemm", "attention": "attention", "other": "other", "prompt": "prompt"}
"""Of a plain roofline's times, as a table heads them and as a fit names them."""
ERRORS = ("decode_ape", "prefill_ape", "ttft_ape", "tpot_ape")
GRID = {
    split: tuple(
        (isl, *{1: (64, 1, 6), 4: (32, 4, 4), 12: (48, 12, 3)}[c])
        for isl, c in product(lengths, (1, 4, 12))
        if c == 1 or isl != 256
    )
    for split, lengths in ((False, (96, 256, 512)), (True, (160, 256, 512)))
}
GRID[True] += ((160, 128, 12, 2),)
"""The loops that a server is measured with, between pools or not. The last one waits for its decode worker, the other full ones
between pools for the worker that reads: both have to show what they take."""


def run(models: list[str] | None, dtype: str, threads: list[int] | None, json_out: bool) -> None:
    """Measure, fit, keep; show what came out."""
    need("torch", doing="calibrate host", extra="model")
    need("scipy", doing="calibrate host", extra="calibrate")
    import torch

    from tandem.engine.host import calibrate_host
    from tandem.model.load import load_model
    from tandem.perf.host import keep_host, known_host
    from tandem.report import text

    if dtype not in DTYPES:
        raise SpecError(f"--dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    cores = usable_cores()
    wanted = threads or sorted({cores, max(1, cores // 2)}, reverse=True)
    for count in wanted:
        require_int("threads", count, high=cores)
    started = time.perf_counter()
    names = models or list(MODELS)
    decoders = [load_model(name, dtype=getattr(torch, dtype)) for name in names]
    with text.progress("calibrating this machine") as step:
        found = {}
        for count in wanted:
            name = host_name(count, cores)
            tell = partial(_told, step, name)
            known = known_host(name) if models else None  # a model is added to what is known; without one all is measured anew
            engine = calibrate_host(decoders, threads=count, name=name, tell=tell, known=known)
            served = with_server(engine, names, [d.spec for d in decoders], dtype, tell) if can_serve() else engine
            found[name] = served.beside(known)
    path = keep_host(found)
    seconds = time.perf_counter() - started
    fits = [
        {"hardware": name, "model": one.model, "weights": one.precision.weights, **{t: getattr(one.fit, t) for t in TERMS},
         "decode_ape": one.decode_ape, "prefill_ape": one.prefill_ape, "ttft_ape": one.ttft_ape, "tpot_ape": one.tpot_ape}
        for name, calibration in found.items()
        for one in calibration.fits
    ]  # fmt: skip
    if json_out:
        error = {key: max((fit[key] for fit in fits if fit[key] is not None), default=None) for key in ERRORS}
        machines = {
            name: one.hardware.to_json() | {"products": [asdict(rate) for rate in one.products]} for name, one in found.items()
        }
        return emit({"fits": fits, "error": error, "hardware": machines, "file": str(path), "seconds": seconds})
    _show(found, fits)
    text.console().print(f"{path} in {seconds:.0f} s; now `--hardware host` means this machine", soft_wrap=True)


def can_serve() -> bool:
    """Whether the extras are here that serving and asking a server need."""
    return all(find_spec(name) is not None for name in ("fastapi", "uvicorn", "aiohttp"))


def with_server(
    engine: HostCalibration, names: Sequence[str], specs: Sequence[ModelSpec], dtype: str, tell: Callable[[str], None]
) -> HostCalibration:
    """The same with what a server of each model adds to the engine: with one worker, and where cores allow with one that
    prefills and one that decodes."""
    from tandem.perf.host_served import fit_served
    from tandem.perf.phases import PerfModel

    fits = []
    for name, spec, fit in zip(names, specs, engine.fits, strict=True):
        perf = PerfModel(spec, engine.hardware, fit.precision, backend="tandem", given_fit=fit.fit)
        tell(f"{spec.name}, served by one worker")
        loops = serve_grid(name, dtype, engine.threads, split=False, grid=GRID[False])
        served = fit_served(perf, loops)
        pools, split_loops = None, []
        if engine.hardware.scale_up_gpus > 1:
            tell(f"{spec.name}, served by two workers")
            split_loops = serve_grid(name, dtype, engine.threads, split=True, grid=GRID[True])
            pools = fit_served(replace(perf, split=True), split_loops)
        ttft, tpot = (max(getattr(one, key) for one in (served, pools or served)) for key in ("ttft_ape", "tpot_ape"))
        split = None if pools is None else pools.fit
        fits.append(
            replace(
                fit,
                fit=served.fit,
                split=split,
                ttft_ape=ttft,
                tpot_ape=tpot,
                loops=tuple(loops),
                split_loops=tuple(split_loops),
            )
        )
    return replace(engine, fits=tuple(fits))


def serve_grid(model: str, dtype: str, threads: int, *, split: bool, grid: Sequence[Point], seed: int = 0) -> list[ServedRow]:
    """The grid's loops against a server that is started for them: one worker of so many threads, or split two."""
    from tandem.bench.client import Target
    from tandem.bench.grid import measure_grid
    from tandem.cli.served import served

    options = ["--dtype", dtype, "--threads", str(threads), "--prefill", str(int(split)), "--decode", "1"]
    options += ["--workers", "processes"] if split else []
    with served(model, options) as ready:
        return measure_grid(Target(url=ready["url"], model=ready["model"]), grid, seed=seed)


def _told(step: Callable[[str], None], name: str, what: str) -> None:
    step(f"{name}: {what}")


def _show(found: dict[str, Any], fits: list[dict[str, Any]]) -> None:
    from tandem.report import text

    t = text.table("This machine", "!", ">threads", ">workers", ">memory GB/s", ">fp32 GFLOP/s", ">hand-off GB/s")
    for name, one in found.items():
        h = one.hardware
        rates = (h.memory_bytes_per_s, h.peak("fp32"), h.scale_out_bytes_per_s)
        t.add_row(name, str(one.threads), str(h.scale_up_gpus), *(f"{rate / 1e9:.1f}" for rate in rates))
    text.console().print(t)
    rows = sorted({rate.rows for one in found.values() for rate in one.products})
    t = text.table("Products, GFLOP/s by rows", "!", "weights", *(f">{count}" for count in rows))
    for name, one in found.items():
        for weights in dict.fromkeys(rate.weights for rate in one.products):
            by = {rate.rows: rate.flops_per_s for rate in one.products if rate.weights == weights}
            t.add_row(name, weights, *(f"{by[count] / 1e9:.1f}" for count in rows))
    text.console().print(t)
    t = text.table("The engine on it", "!", "model", "weights", ">step", ">a sequence", *(f">{name}" for name in SCALES))
    near = text.table("Median errors of the fits", "!", "model", ">steps", ">prompts", ">TTFT, served", ">TPOT, served")
    for fit in fits:
        times = f"{fit['step_s'] * 1e3:.2f} ms", f"{fit['sequence_s'] * 1e6:.0f} us"
        t.add_row(fit["hardware"], fit["model"], fit["weights"], *times, *(f"{fit[name]:.2f}x" for name in SCALES.values()))
        errors = ("-" if fit[name] is None else f"{fit[name]:.1%}" for name in ERRORS)
        near.add_row(fit["hardware"], fit["model"], *errors)
    text.console().print(t)
    text.console().print(near)
