"""This machine as the performance model sees a GPU: what its cores and memory reach in the engine's own products.

`measure_host` is a quick look of about a second, for a first prediction of what the server will do here; `calibrate_host`
measures steps of the engine too, for predictions that can be trusted (tandem.perf.host).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tandem.engine.config import EngineConfig, free_memory_bytes
from tandem.engine.engine import Engine
from tandem.engine.host_rates import FORMATS, handoff_bytes_per_s, peak_rates, product_rates
from tandem.engine.types import EngineRequest, SamplingParams
from tandem.model.hybrid import Decoder
from tandem.model.precision import compute_dtype
from tandem.perf.efficiency import ROOFLINE, find_fit
from tandem.perf.host import HostCalibration, StepRow, fit_steps
from tandem.spec.design import Precision
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.local import usable_cores


def host_precision(weights: torch.dtype) -> Precision:
    """Formats of a model whose linear weights are stored so: windows, keys and values are kept as activations are here."""
    activations = FORMATS[compute_dtype(weights, torch.device("cpu"))]
    return Precision(weights=FORMATS[weights], activations="bf16", kv=activations)


def measure_host(weights: torch.dtype = torch.float32) -> HardwareSpec:
    """Bytes/s that a product with one row reads and FLOP/s of one with 256 rows, with torch's threads as they are set.

    The peak is written so that the reference GPU's efficiency, which an unmeasured system borrows, brings it back to what
    was measured: predictions made with it are `transferred`.
    """
    bytes_per_s, flops = peak_rates(weights)
    efficiency = find_fit(_spec(1.0, 1.0), "gemm", "bf16")[0].compute_efficiency
    return _spec(bytes_per_s, flops / efficiency)


def calibrate_host(
    models: Sequence[Decoder],
    *,
    threads: int,
    name: str,
    tell: Callable[[str], None],
    known: HostCalibration | None = None,
) -> HostCalibration:
    """Peaks of this machine with so many threads, or those that are `known`, and coefficients of the engine for each model.

    Raises SpecError for a model whose context leaves no room to measure at.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if known is None:
            tell("memory and products")
            bytes_per_s, flops = peak_rates(torch.float32)
            cores = usable_cores()
            hardware = replace(
                _spec(bytes_per_s, flops),
                name=name,
                title=f"this machine, {threads} of {cores} threads a worker",
                fits_from=ROOFLINE,
                peak_flops=dict.fromkeys(FORMATS.values(), flops),
                scale_up_gpus=max(1, cores // threads),
            )
            if hardware.scale_up_gpus > 1:
                tell("hand-off")
                hardware = replace(hardware, scale_out_bytes_per_s=handoff_bytes_per_s(models[0].spec))
            products = tuple(product_rates())
        else:
            hardware, products = known.hardware, known.products
        fits = []
        for model in models:
            tell(f"steps of {model.spec.name}")
            weights = next(p.dtype for n, p in model.named_parameters() if n.endswith("_proj.weight"))
            fits.append(fit_steps(model.spec, hardware, host_precision(weights), measure_steps(model)))
        return HostCalibration(hardware=hardware, threads=threads, products=products, fits=tuple(fits))
    finally:
        torch.set_num_threads(before)


def measure_steps(model: Decoder) -> list[StepRow]:
    """Steps of an engine on this model, each the median of some: decoding batches at contexts, and prompts alone."""
    config = EngineConfig(max_batch=max(_BATCHES), threads=torch.get_num_threads())
    room = model.spec.max_context - _STEPS - max(_BATCHES) - 2
    contexts = [length for length in _CONTEXTS if length <= room]
    if len(contexts) < 2:
        raise SpecError(f"model={model.spec.name!r}: its context of {model.spec.max_context} tokens is too short to measure at")
    rows = [StepRow(batch=0, context=0, isl=isl, seconds=_prompt_s(model, config, isl)) for isl in contexts]
    return rows + [_decode_row(model, config, batch, context) for context in contexts for batch in _BATCHES]


_BATCHES, _CONTEXTS = (1, 2, 4, 8, 16, 32), (32, 128, 512, 900)
_STEPS, _PROMPTS = 10, 5
"""Steps and prompts of which a row is the median."""


def _prompt_s(model: Decoder, config: EngineConfig, isl: int) -> float:
    """Seconds from an idle engine's prompt to its first token."""
    seconds = []
    for number in range(_PROMPTS):
        engine = Engine(model, config=replace(config, prefix_cache_bytes=0))
        engine.add(_request(str(number), isl, number, osl=1))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _decode_row(model: Decoder, config: EngineConfig, batch: int, isl: int) -> StepRow:
    """A step in which `batch` sequences decode and nothing else happens."""
    engine = Engine(model, config=config)
    for number in range(batch):
        engine.add(_request(str(number), isl, 0, osl=_STEPS + batch + 1))  # one prompt, which is kept: only the first is read
    tokens: dict[str, int] = {}
    while len(tokens) < batch:
        tokens |= {output.request_id: output.index + len(output.token_ids) for output in engine.step().outputs}
    seconds = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    context = isl + sum(tokens.values()) / batch + _STEPS / 2
    return StepRow(batch=batch, context=round(context), isl=0, seconds=statistics.median(seconds))


def _request(id: str, isl: int, seed: int, *, osl: int) -> EngineRequest:
    drawn = torch.randint(100, 1000, (isl,), generator=torch.Generator().manual_seed(seed)).tolist()
    return EngineRequest(id=id, prompt_ids=tuple(drawn), sampling=SamplingParams(max_tokens=osl, ignore_eos=True))


def _spec(bytes_per_s: float, flops: float) -> HardwareSpec:
    memory = free_memory_bytes(torch.device("cpu"))
    measured = f"measured on this machine with {torch.get_num_threads()} threads (tandem.engine.host)"
    return HardwareSpec(
        name="host",
        title=f"this machine, {usable_cores()} cores",
        vendor="this machine",
        generation="cpu",
        memory_bytes=memory,
        memory_bytes_per_s=bytes_per_s,
        usable_memory_fraction=0.9,
        peak_flops={"bf16": flops, "fp32": flops},
        scale_up_gpus=1,
        scale_up_bytes_per_s=bytes_per_s,
        scale_out_bytes_per_s=bytes_per_s,
        price_per_hour_usd=1e-3,
        fits_from="host",
        bandwidth_efficiency=1.0,
        sources={
            "memory_bytes": "free when the server started",
            "memory_bytes_per_s": measured,
            "usable_memory_fraction": "a tenth is left to the system",
            "peak_flops": measured,
            "scale_up_gpus": "one machine",
            "scale_up_bytes_per_s": "as memory: workers share it",
            "scale_out_bytes_per_s": "as memory, or of a measured hand-off: workers share it",
            "price_per_hour_usd": "none is known; a token price, as a specification needs one",
            "bandwidth_efficiency": "the bandwidth is a measured one",
        },
    )
