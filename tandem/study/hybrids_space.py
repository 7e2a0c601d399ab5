"""Hybrids beside Transformers of their size: which models, which traffic, and how a variant of the costs is priced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from threading import Lock
from typing import Any, Final, NamedTuple

from tandem.perf.costs import Item
from tandem.perf.efficiency import OpTimer
from tandem.perf.phases import PerfModel
from tandem.perf.step import StepPricer
from tandem.spec.catalog import load_spec
from tandem.spec.mixers import MLP, Attention
from tandem.spec.model import ModelSpec
from tandem.spec.workload import Workload
from tandem.study.sweep import FullLoad, Sweep, Swept

JUDGE, ENGINE = "tandem", "vllm"
"""Kernels only judges (docs/adr/0008); the second opinion is the engine that paper A ran and that hands Mamba state over."""
NODE_GPUS = 8
"""An instance stays inside one NVLink node of H100 or H200."""
PREFILL_HEAVY, DECODE_HEAVY = (8192, 1024), (1024, 8192)
ISLS: Final = (512, 2048, 8192, 32768)
OSLS: Final = (256, 512, 1024, 2048, 4096, 8192, 16384)
TPOTS_S: Final = (0.010, 0.020, 0.050)
SCAN_OPS = ("scan_prefill", "scan_decode", "conv_prefill", "conv_decode")
LLAMA_BLOCKS = 64
"""Blocks of Llama-3.1-70B's 80 that leave a Transformer of Nemotron-H-56B's size."""


class Pair(NamedTuple):
    """A hybrid and the Transformer of its size; `others` are further Transformers that the decisions are checked with."""

    hybrid: str
    transformer: str
    others: tuple[str, ...] = ()


PAIRS: Final = {
    "9B": Pair("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "Qwen/Qwen3-8B", ("meta-llama/Meta-Llama-3.1-8B",)),
    "12B": Pair("nvidia/NVIDIA-Nemotron-Nano-12B-v2", "Mistral-Nemo-12B"),
    "30B-A3B": Pair("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen/Qwen3-30B-A3B"),
    "56B": Pair("nvidia/Nemotron-H-56B-Base-8K", f"Llama-3.1-70B, {LLAMA_BLOCKS} of 80 blocks",
                ("meta-llama/Meta-Llama-3.1-70B",)),
}  # fmt: skip


@cache
def model_of(name: str) -> ModelSpec:
    """A model of the catalogue or one of the two that stand in for a size that the catalogue lacks."""
    if name == "Mistral-Nemo-12B":
        # mistralai/Mistral-Nemo-Base-2407, its published config.json: 40 blocks, grouped queries, gated MLP.
        block = (Attention(num_heads=32, num_kv_heads=8, head_dim=128), MLP(ffn_size=14336, gated=True))
        return ModelSpec(name=name, vocab_size=131072, hidden_size=5120, layers=block * 40, max_context=128000)
    if name.startswith("Llama-3.1-70B, "):
        whole = load_spec("meta-llama/Meta-Llama-3.1-70B")
        return replace(whole, name=name, layers=whole.layers[: 2 * LLAMA_BLOCKS])
    return load_spec(name)


@dataclass(frozen=True)
class ScaledScanPricer(StepPricer):
    """Times steps as if recurrent kernels (scan and convolution) took `scan` times as long."""

    scan: float = 1.0

    @cached_property
    def _scaled(self) -> dict[str, OpTimer]:
        return {}

    def _timer(self, item: Item) -> OpTimer:
        timer = super()._timer(item)
        if item.op not in SCAN_OPS:
            return timer
        if item.op not in self._scaled:
            self._scaled[item.op] = replace(
                timer,
                fit=replace(timer.fit, t0_s=timer.fit.t0_s * self.scan),
                flops_per_s=timer.flops_per_s / self.scan,
                bytes_per_s=timer.bytes_per_s / self.scan,
            )
        return self._scaled[item.op]


@dataclass(frozen=True)
class ScaledScanModel(PerfModel):
    """A performance model with such a pricer."""

    scan: float = 1.0

    @cached_property
    def pricer(self) -> StepPricer:
        """Times the kernels of a step."""
        return ScaledScanPricer(self.model, self.hardware, self.precision, self.scan)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study is priced for: backend, GPU, weights, and what is varied about recurrent layers."""

    backend: str = JUDGE
    hardware: str = "h100-sxm"
    precision: str = "bf16"
    scan: float = 1.0
    """Factor on the time of recurrent kernels."""
    state: str = "fp32"
    """Number format of the recurrent state, in memory and on the wire."""

    def price(self, model: ModelSpec, workload: Workload, max_instance_gpus: int) -> Swept:
        """The priced space of one model under one traffic."""
        sweep = Sweep.of(
            model, self.hardware, workload, precision=self.precision, backend=self.backend, max_instance_gpus=max_instance_gpus
        )
        sweep = replace(sweep, precision=replace(sweep.precision, state=self.state))
        perf = ScaledScanModel(model, sweep.hardware, sweep.precision, self.backend, scan=self.scan)
        space = FullLoad(perf, workload, max_instance_gpus, sweep.percentile)
        space.price_all()
        return Swept(sweep=sweep, space=space)


@dataclass
class HybridSpace:
    """Sweeps of one setting; those of the two mixes of the figures are kept, cells of the traffic grid are not."""

    setting: Setting
    isls: tuple[int, ...] = ISLS
    osls: tuple[int, ...] = OSLS
    max_instance_gpus: int = NODE_GPUS
    progress: Callable[[str], None] = lambda _: None
    kept: dict[tuple[str, tuple[int, int]], Swept] = field(default_factory=dict)
    points_priced: int = 0
    points_considered: int = 0
    counting: Any = field(default_factory=Lock)

    def price(self, model: str, mix: tuple[int, int]) -> Swept:
        """A sweep that is counted and handed out, but not kept."""
        swept = self.setting.price(model_of(model), Workload.fixed(*mix), self.max_instance_gpus)
        with self.counting:
            self.points_priced += sum(len(p.points) for p in swept.space.priced.values())
            self.points_considered += swept.points_evaluated
        return swept

    def get(self, model: str, mix: tuple[int, int]) -> Swept:
        """A sweep that later questions will come back to."""
        if (model, mix) not in self.kept:
            self.kept[model, mix] = self.price(model, mix)
        return self.kept[model, mix]
