"""`tandem calibrate host`: this machine and the engine on it, measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tandem.cli.app import emit
from tandem.cli.needed import need
from tandem.spec.errors import SpecError
from tandem.spec.local import host_name
from tandem.spec.units import require_int

MODELS = ("nano-hybrid", "nano-transformer")
DTYPES = ("float32", "float16", "bfloat16")
TERMS = ("step_s", "sequence_s", "gemm", "attention", "other", "prompt", "host_s")


def run(models: list[str] | None, dtype: str, threads: list[int] | None, json_out: bool) -> None:
    """Measure, fit, keep; show what came out."""
    need("torch", doing="calibrate host", extra="model")
    need("scipy", doing="calibrate host", extra="calibrate")
    import torch

    from tandem.engine.host import calibrate_host
    from tandem.model.load import load_model
    from tandem.perf.host import keep_host
    from tandem.report import text

    if dtype not in DTYPES:
        raise SpecError(f"--dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    cores = os.cpu_count() or 1
    wanted = threads or sorted({cores, max(1, cores // 2)}, reverse=True)
    for count in wanted:
        require_int("threads", count, high=cores)
    started = time.perf_counter()
    decoders = [load_model(name, dtype=getattr(torch, dtype)) for name in models or MODELS]
    with text.progress("calibrating this machine") as step:
        found = {}
        for count in wanted:
            name = host_name(count, cores)
            found[name] = calibrate_host(decoders, threads=count, name=name, tell=partial(_told, step, name))
    path = keep_host(found)
    seconds = time.perf_counter() - started
    fits = [
        {"hardware": name, "model": one.model, "weights": one.precision.weights, **{t: getattr(one.fit, t) for t in TERMS},
         "decode_ape": one.decode_ape, "prefill_ape": one.prefill_ape}
        for name, calibration in found.items()
        for one in calibration.fits
    ]  # fmt: skip
    if json_out:
        error = {key: max(fit[key] for fit in fits) for key in ("decode_ape", "prefill_ape")}
        machines = {
            name: one.hardware.to_json() | {"handoff_bytes_per_s": one.handoff_bytes_per_s} for name, one in found.items()
        }
        return emit({"fits": fits, "error": error, "hardware": machines, "file": str(path), "seconds": seconds})
    _show(found, fits)
    text.console().print(
        f"{path} in {seconds:.0f} s; now `--hardware host --backend tandem` means this machine", soft_wrap=True
    )


def _told(step: Callable[[str], None], name: str, what: str) -> None:
    step(f"{name}: {what}")


def _show(found: dict[str, Any], fits: list[dict[str, Any]]) -> None:
    from tandem.report import text

    t = text.table("This machine", "!", ">threads", ">workers", ">memory GB/s", ">fp32 GFLOP/s", ">hand-off GB/s")
    for name, one in found.items():
        h = one.hardware
        rates = (h.memory_bytes_per_s, h.peak("fp32"), one.handoff_bytes_per_s)
        t.add_row(name, str(one.threads), str(h.scale_up_gpus), *(f"{rate / 1e9:.1f}" for rate in rates))
    text.console().print(t)
    t = text.table(
        "The engine on it", "!", "model", "weights", ">step", ">a sequence", ">matmul", ">attention", ">other", ">prompt",
        ">error, steps", ">prompts",
    )  # fmt: skip
    for fit in fits:
        t.add_row(
            fit["hardware"], fit["model"], fit["weights"], f"{fit['step_s'] * 1e3:.2f} ms", f"{fit['sequence_s'] * 1e6:.0f} us",
            *(f"{fit[name]:.2f}x" for name in ("gemm", "attention", "other", "prompt")), f"{fit['decode_ape']:.1%}",
            f"{fit['prefill_ape']:.1%}",
        )  # fmt: skip
    text.console().print(t)
