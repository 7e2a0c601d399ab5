"""Paper B's design space: its models, traffic mixes and hardware as sweeps, each priced once for each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from tandem.perf.costs import Layout
from tandem.spec.workload import Workload, read_trace
from tandem.study.sweep import MAX_INSTANCE_GPUS, Curve, Sweep, Swept

JUDGE, ENGINE = "tandem", "trtllm"
"""Kernels only, as the paper's simulator, judges; the vendor's measured engine is the second opinion (docs/adr/0008)."""
MODELS: Final = {
    "R1": "deepseek-ai/DeepSeek-R1",
    "405B": "meta-llama/Meta-Llama-3.1-405B",
    "70B": "meta-llama/Meta-Llama-3.1-70B",
    "8B": "meta-llama/Meta-Llama-3.1-8B",
}
PREFILL_HEAVY, BALANCED_LONG, BALANCED_SHORT, DECODE_HEAVY = (16384, 2048), (16384, 16384), (2048, 2048), (2048, 16384)
R1_MIXES: Final = (PREFILL_HEAVY, BALANCED_LONG, BALANCED_SHORT, DECODE_HEAVY)
"""Figure 8."""
EXTREME_DECODE, SHORT_OUTPUT, DYNAMIC, MILLION = (1024, 32768), (4096, 256), (4096, 512), (1 << 20, 2048)
"""Figures 1, 7, 14 and 12."""
CPP_ISL, CPP_GPUS, CPP_STAGES = 262_144, 64, (1, 2, 4, 8, 16, 32)
CPP_CHUNKS: Final = (512, 1024, 2048, 4096, 8192, 16384)
LOGNORMAL_SIGMAS: Final = (0.3, 0.5, 1.0)
SEED, DRAWS = 0, 20_000
TRACE = "azure-conversation-2023"


class CppPoint(NamedTuple):
    """A prefill instance of CPP_GPUS GPUs with this many pipeline stages; tokens are prompt tokens."""

    stages: int
    ttft_s: float
    prompt_tokens_per_s_per_gpu: float


@dataclass
class PaperBSpace:
    """Sweeps of one backend, priced when first asked for. `max_instance_gpus` is lowered by tests only."""

    backend: str
    max_instance_gpus: int = MAX_INSTANCE_GPUS
    progress: Callable[[str], None] = lambda _: None
    swept: dict[tuple[object, ...], Swept] = field(default_factory=dict)
    extra_points: int = 0

    def get(
        self,
        model: str,
        mix: tuple[int, int] | Workload,
        *,
        hardware: str = "gb200",
        domain_gpus: int | None = None,
        cached_up: bool = False,
        kv: str = "fp8",
    ) -> Swept:
        """The sweep of a model of MODELS under a traffic mix."""
        workload = mix if isinstance(mix, Workload) else Workload.fixed(*mix)
        key = (model, workload.name, hardware, domain_gpus, cached_up, kv)
        if key not in self.swept:
            self.progress(f"{model} {workload.name}, {self.backend}")
            self.swept[key] = Sweep.of(
                MODELS[model],
                hardware,
                workload,
                precision=f"fp4/fp4/{kv}",
                backend=self.backend,
                domain_gpus=domain_gpus,
                max_instance_gpus=self.max_instance_gpus,
                cached_up=cached_up,
            ).price()
        return self.swept[key]

    @property
    def points_priced(self) -> int:
        """Design points that fit in memory and have a price."""
        return self.extra_points + sum(len(p.points) for s in self.swept.values() for p in s.space.priced.values())

    @property
    def points_considered(self) -> int:
        """Design points looked at, those that memory refused included."""
        return self.extra_points + sum(s.points_evaluated for s in self.swept.values())

    def chunked_pipeline(self, chunk_tokens: float) -> list[CppPoint]:
        """Figure 5: R1, one 256k prompt in each attention group, EP x PP = 64 GPUs, the same chunk for every PP.

        Attention is data-parallel over the EP GPUs of a stage, as in the paper's high-throughput regime: PP = 1 holds 64
        prompts, PP = 32 two.
        """
        perf = self.get("R1", PREFILL_HEAVY).perf
        stages = np.array([float(n) for n in CPP_STAGES])
        groups, ones = CPP_GPUS / stages, np.ones_like(stages)
        layout = Layout(tp=ones, pp=ones, ep=groups, dp=groups, cpp=stages)
        done = perf.prefill(layout, groups, Workload.fixed(CPP_ISL, 256), np.full_like(stages, chunk_tokens))
        self.extra_points += len(stages)
        per_gpu = done.requests_per_s * CPP_ISL / CPP_GPUS
        return [CppPoint(n, float(t), float(r)) for n, t, r in zip(CPP_STAGES, done.ttft_s, per_gpu, strict=True)]

    def chunk_curves(self, swept: Swept) -> dict[int, Curve]:
        """The piggybacked frontier of each chunk size."""
        table = swept.space.priced["piggybacked"].points.chunk_tokens
        return {
            int(chunk): swept.shared(modes=["piggybacked"], only={"piggybacked": np.flatnonzero(table == chunk)})
            for chunk in np.unique(table)
        }


def mix_name(mix: tuple[int, int]) -> str:
    """`16384/2048`."""
    return f"{mix[0]}/{mix[1]}"


def trace_shaped(isl: int, osl: int) -> Workload:
    """The lengths of the bundled Azure conversation trace, scaled so that its medians are isl and osl."""
    trace = read_trace(TRACE)
    prompts = np.maximum(1, np.round(trace.isl * isl / np.median(trace.isl))).astype(int)
    outputs = np.maximum(1, np.round(trace.osl * osl / np.median(trace.osl))).astype(int)
    return Workload.from_lengths(f"{TRACE} scaled to P50 {isl}/{osl}", prompts.tolist(), outputs.tolist())


def lognormal(isl: int, osl: int, sigma: float) -> Workload:
    """DRAWS independent lognormal lengths with these medians and a standard deviation of the logarithm of sigma."""
    draws = np.random.default_rng(SEED).standard_normal((2, DRAWS))
    prompts, outputs = (
        np.maximum(2, np.round(m * np.exp(sigma * d))).astype(int) for m, d in zip((isl, osl), draws, strict=True)
    )
    return Workload.from_lengths(f"lognormal {sigma:g} around {isl}/{osl}", prompts.tolist(), outputs.tolist())
