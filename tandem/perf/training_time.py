"""How long an optimiser step takes: its kernels back to back by the fitted curves of `efficiency`, and what ranks exchange.

The curves were measured on forward passes. Here the backward pass is priced by them: a linear's two gradients as products of
their shapes, attention's as 2.5 forward passes, the scan's as 3 (the states between chunks are made again), all that only
moves memory as 2. Gathering weights and scattering gradients overlap with computing, so the longer of the two counts;
tensor and context parallelism do not. Nobody measured such a step, so the evidence is `roofline`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from tandem.perf import ops
from tandem.perf.efficiency import OpTimer, bind
from tandem.perf.ops import OUT, OpClass, Work
from tandem.perf.training import ATTENTION_BACKWARD, LinearFormat, LinearShape, TrainingStep, step_flops
from tandem.perf.training_memory import saved_activation_bytes, working_weight_bytes
from tandem.spec.design import Estimate, Evidence
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import itemsize

ROOFLINE_FACTOR = 2.0
"""Either end of the interval over the value where kernels were added up and no step was measured."""
MEASURED_FACTOR = 1.5
"""The same where passes were measured just before: the machine may have more or less to do beside them later."""
_SCAN_BACKWARD = 3.0
_OPTIMISER_BYTES = 32.0
"""Moved for a weight by clipping and AdamW: gradient twice, weight and two moments read, all three written."""
_LOGIT_BYTES = 16.0
"""Moved for a logit by the loss: written, read for the sum, read and written for its gradient, fp32."""
_CPU_TOUCHES = 6.0
"""Times that a number kept for the backward pass moves on a CPU: written and read, its gradient likewise, and once more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeconds:
    """Seconds of an optimiser step by what takes them, on every rank alike."""

    linears: float = 0.0
    head: float = 0.0
    attention: float = 0.0
    scan: float = 0.0
    memory: float = 0.0
    """Norms, residuals, activations, quantisation, convolution, loss."""
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    sharding: float = 0.0
    """What gathering weights and scattering gradients takes beyond the computing that hides it."""
    optimiser: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    @property
    def computing(self) -> float:
        """Forward and backward pass without any exchange."""
        return self.linears + self.head + self.attention + self.scan + self.memory

    def measured(self, computing_s: float) -> StepSeconds:
        """The same where forward and backward passes were measured to take `computing_s`: their parts in proportion."""
        factor = computing_s / self.computing
        names = ("linears", "head", "attention", "scan", "memory")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    def to_json(self) -> dict[str, float]:
        """Seconds by part."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class CpuRates(NamedTuple):
    """What a machine was measured to reach: products of fp32 results, products within attention and scan, memory."""

    matmul_flops_per_s: float
    bytes_per_s: float


def estimate_of(
    seconds: StepSeconds, model: ModelSpec, step: TrainingStep, peak_flops_per_s: float, evidence: Evidence = "roofline"
) -> Estimate:
    """Seconds of a step with their interval: a factor of two either way, of 1.5 where its passes were measured
    (`calibrated`), but not below the time at the ranks' peak."""
    value = seconds.total
    factor = MEASURED_FACTOR if evidence == "calibrated" else ROOFLINE_FACTOR
    floor = step_flops(model, step).model / (peak_flops_per_s * step.gpus)
    low = min(value, max(value / factor, floor))
    return Estimate(value=value, low=low, high=value * factor, evidence=evidence)


def gpu_step_seconds(model: ModelSpec, step: TrainingStep, hardware: HardwareSpec) -> StepSeconds:
    """Seconds of one optimiser step on GPUs of one kind. Raises SpecError where it has no peak for a format."""
    if step.formats.linears == "fp32" and "fp32" not in hardware.peak_flops:
        raise SpecError(f"precision.linears='fp32': {hardware.name} has no published fp32 peak; plan with bf16 or fp8-block")
    price = _Pricer(model, step, hardware)
    passes = step.passes
    parts = {name: passes * value for name, value in price.one_pass().items()}
    computing = sum(parts.values())
    exchanged = passes * price.gather_s() + price.scatter_s()
    return StepSeconds(
        **parts,
        tensor_parallel=passes * price.tensor_parallel_s(),
        context_parallel=passes * price.context_parallel_s(),
        sharding=max(0.0, exchanged - computing),
        optimiser=price.moved(_OPTIMISER_BYTES * model.parameters / step.gpus),
    )


def cpu_step_seconds(model: ModelSpec, step: TrainingStep, rates: CpuRates) -> StepSeconds:
    """Seconds of one optimiser step on a machine whose rates were measured; its ranks share them."""
    flops = step_flops(model, step)
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[step.recompute]
    scan_again = again if step.recompute == "full" else float(step.recompute == "selective")
    f, rate = flops.forward, rates.matmul_flops_per_s
    kept = saved_activation_bytes(model, step) * step.passes * step.gpus
    return StepSeconds(
        linears=(3.0 + again) * f.linears / rate,
        head=3.0 * f.head / rate,
        attention=(1.0 + ATTENTION_BACKWARD + again) * f.attention / rate,
        scan=(1.0 + _SCAN_BACKWARD + scan_again) * (f.scan + f.conv) / rate,
        memory=(_CPU_TOUCHES * kept + _LOGIT_BYTES * step.tokens * model.vocab_size) / rates.bytes_per_s,
        optimiser=_OPTIMISER_BYTES * model.parameters / rates.bytes_per_s,
    )


class _Pricer:
    """Prices the parts of one pass of one rank."""

    def __init__(self, model: ModelSpec, step: TrainingStep, hardware: HardwareSpec) -> None:
        self.model, self.step, self.hardware = model, step, hardware
        self.rows = step.rank_tokens
        self.again = 1.0 if step.recompute == "full" else 0.0
        self._timers: dict[tuple[OpClass, str], OpTimer] = {}

    def _timer(self, op: OpClass, dtype: str) -> OpTimer:
        key = (op, dtype)
        if key not in self._timers:
            self._timers[key] = bind(self.hardware, op, dtype)
        return self._timers[key]

    def _seconds(self, op: OpClass, dtype: str, work: Work) -> float:
        timer = self._timer(op, dtype)
        return timer.fit.t0_s + float(timer.work_s(work))

    def moved(self, moved_bytes: float) -> float:
        """Seconds of an elementwise kernel."""
        return self._seconds("memory", "bf16", ops.memory(moved_bytes)) if moved_bytes else 0.0

    def one_pass(self) -> dict[str, float]:
        """Computing seconds of a forward and a backward pass, by the fields of StepSeconds."""
        step, model = self.step, self.model
        kinds = Counter((shape.rows, shape.width, shape.cut, kind) for shape, kind in step.formats.of(model))
        products = sum(n * self._linear_s(*key) for key, n in kinds.items())
        quantised = sum(n * self._quantise_s(*key) for key, n in kinds.items())
        parts = {"linears": products, "attention": 0.0, "scan": 0.0, "memory": quantised}
        for mixer, count in model.mixers:
            for name, seconds in self._inside(mixer):
                parts[name] += count * seconds
        h, passes = model.hidden_size, 3.0 + self.again
        norms = passes * self.moved(5.0 * OUT * h * self.rows / step.tp)
        parts["memory"] += norms * len(model.layers) + passes * self.moved(2.0 * OUT * h * self.rows / step.tp)
        parts["memory"] += self.moved(_LOGIT_BYTES * self.rows * model.vocab_size / step.tp)
        parts["head"] = self._linear_s(model.vocab_size, h, "rows", "bf16", again=0.0)
        return parts

    def _linear_s(self, rows: int, width: int, cut: str, kind: LinearFormat, again: float | None = None) -> float:
        """Output, gradient of the input, gradient of the weight."""
        tp = self.step.tp
        n, k = (rows / tp, float(width)) if cut == "rows" else (float(rows), width / tp)
        w, t = itemsize(kind), self.rows
        forward = self._seconds("gemm", kind, ops.gemm(t, n, k, w, w))
        backward = self._seconds("gemm", kind, ops.gemm(t, k, n, w, w)) + self._seconds("gemm", kind, ops.gemm(n, k, t, w, w))
        return (1.0 + (self.again if again is None else again)) * forward + backward

    def _quantise_s(self, rows: int, width: int, cut: str, kind: LinearFormat) -> float:
        """Inputs and gradients of outputs are read in bf16 and written along both of their axes."""
        if kind not in ("fp8_block", "fp8"):
            return 0.0
        return self.moved((OUT + 2.0 * itemsize(kind)) * self.rows * (rows + width) / self.step.tp)

    def _inside(self, mixer: Mixer) -> Iterator[tuple[str, float]]:
        """Seconds of what a mixer does between its linears, forward and backward, by the fields of StepSeconds."""
        step, t, tp = self.step, self.rows, float(self.step.tp)
        passes = 3.0 + self.again
        match mixer:
            case Attention():
                kv_heads = max(mixer.num_kv_heads / tp, 1.0)
                pairs, queries = step.pairs(mixer.window) / step.cp, step.sequence_length / step.cp
                work = ops.attention_over(
                    float(step.micro), pairs, queries, queries, mixer.num_heads / tp, kv_heads, mixer.head_dim, OUT
                )
                yield "attention", (1.0 + ATTENTION_BACKWARD + self.again) * self._seconds("attention_prefill", "bf16", work)
                if mixer.rope is not None:
                    yield "memory", passes * self.moved(2.0 * OUT * t * (mixer.q_width + mixer.kv_width / 2) / tp)
            case Mamba2():
                again = float(step.recompute != "none")
                groups = max(mixer.groups / tp, 1.0)
                heads, state = mixer.num_heads / tp, mixer.state_dim
                work = ops.scan_prefill(t, float(step.micro), heads, mixer.head_dim, state, groups)
                yield "scan", (1.0 + _SCAN_BACKWARD + again) * self._seconds("scan_prefill", "bf16", work)
                convolved = ops.conv(t, mixer.conv_width / tp, mixer.conv_kernel)
                yield "memory", (3.0 + again) * self._seconds("conv_prefill", "bf16", convolved)
                yield "memory", (3.0 + again) * self.moved(3.0 * OUT * t * mixer.d_inner / tp)
            case MLP():
                yield "memory", passes * self.moved(OUT * t * (mixer.up_width + mixer.ffn_size) / tp)
            case MoE():
                width, matrices = mixer.expert_width(self.model.hidden_size), 3.0 if mixer.gated else 2.0
                flops = 2.0 * t * mixer.top_k * matrices * width * mixer.ffn_size / tp
                weights = matrices * mixer.num_experts * width * mixer.ffn_size * OUT / tp
                one = self._seconds(
                    "moe", "bf16", Work(flops, weights + OUT * t * mixer.top_k * 2.0 * (width + mixer.ffn_size))
                )
                yield "linears", passes * one

    def tensor_parallel_s(self) -> float:
        """One all-reduce of the hidden states a layer and direction, and of embedding and head."""
        step = self.step
        if step.tp == 1:
            return 0.0
        message = ops.allreduce(OUT * self.model.hidden_size * self.rows, float(step.tp))
        times = (len(self.model.layers) + 1.0) * (2.0 + self.again)
        return times * self._network_s("allreduce", message, step.tp)

    def context_parallel_s(self) -> float:
        """Mamba layers turn from tokens to heads and back (all-to-all), attention layers pass keys and values round."""
        step = self.step
        if step.cp == 1:
            return 0.0
        total, group = 0.0, step.tp * step.cp
        for mixer, count in self.model.mixers:
            if isinstance(mixer, Mamba2):
                message = OUT * self.rows * (mixer.in_width + mixer.d_inner) / step.tp
                work = ops.alltoall(message, float(step.cp))
                total += count * (2.0 + float(step.recompute != "none")) * self._network_s("alltoall", work, group)
            elif isinstance(mixer, Attention):
                kv = 2.0 * max(mixer.num_kv_heads / step.tp, 1.0) * mixer.head_dim
                work = ops.send(OUT * self.rows * (step.cp - 1) * kv)
                total += count * (3.0 + self.again) * self._network_s("send", work, group)
        return total

    def gather_s(self) -> float:
        """Every layer's weights before its forward and before its backward pass; embedding and head once."""
        step, model = self.step, self.model
        if step.shards == 1:
            return 0.0
        by_layer: dict[int, list[tuple[LinearShape, LinearFormat]]] = {}
        for shape, kind in step.formats.of(model):
            by_layer.setdefault(shape.layer, []).append((shape, kind))
        whole = sum(working_weight_bytes(model, m, by_layer.get(i, []), step) for i, m in enumerate(model.layers))
        received = (2.0 * whole + OUT * model.embedding_parameters) / step.tp * (step.shards - 1) / step.shards
        return self._network_s("allreduce", ops.send(received), step.gpus)

    def scatter_s(self) -> float:
        """Gradients in fp32, once a step."""
        step = self.step
        if step.shards == 1:
            return 0.0
        sent = 4.0 * self.model.parameters / step.tp * (step.shards - 1) / step.shards
        return self._network_s("allreduce", ops.send(sent), step.gpus)

    def _network_s(self, op: OpClass, work: Work, gpus: int) -> float:
        timer = self._timer(op, "bf16")
        return timer.fit.t0_s + float(timer.work_s(work, self.hardware.link_bytes_per_s(gpus)))
