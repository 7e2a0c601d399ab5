"""Plans of every form that an export can take; helpers of the tests of exports."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from tandem.plan.planner import Plan, find_plan
from tandem.spec.design import Deployment, Parallelism, Pool
from tandem.spec.workload import Slo, Workload

R1, NANO, LLAMA = "deepseek-ai/DeepSeek-R1", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", "meta-llama/Meta-Llama-3.1-70B"


def pool(role: str, batch: int, replicas: int, chunk: int | None = None, **axes: int) -> Pool:
    return Pool(parallelism=Parallelism(**axes), batch=batch, replicas=replicas, role=role, chunk_tokens=chunk)  # type: ignore[arg-type]


# The plan gives traffic and prediction, the pools say what is to be exported: every form that a plan can take.
CASES: dict[str, tuple[str, str, str | None, str, dict[str, Pool]]] = {
    "dense": (LLAMA, "h100-sxm", None, "vllm", {"colocated": pool("colocated", 40, 3, tp=4)}),
    "dense piggybacked": (LLAMA, "h100-sxm", "fp8", "sglang", {"colocated": pool("colocated", 600, 2, 1024, tp=4)}),
    "dense split": (
        "Qwen/Qwen3-8B", "h100-sxm", "fp8", "vllm",
        {"prefill": pool("prefill", 2, 6, tp=1), "decode": pool("decode", 64, 5, tp=2)},
    ),
    "dense pipelines": (
        LLAMA, "h100-sxm", "fp8", "trtllm",
        {"prefill": pool("prefill", 1, 4, 4096, tp=1, cpp=4), "decode": pool("decode", 64, 2, tp=4, pp=2)},
    ),
    "experts": (R1, "h200-sxm", None, "sglang", {"colocated": pool("colocated", 256, 4, tp=1, dp=8, ep=8)}),
    "experts split": (
        R1, "h200-sxm", None, "vllm",
        {"prefill": pool("prefill", 2, 4, 8192, tp=4, dp=2, ep=8), "decode": pool("decode", 448, 1, tp=2, dp=16, ep=32)},
    ),
    "experts fp4 on a rack": (
        R1, "gb200", "fp4", "vllm",
        {"prefill": pool("prefill", 8, 9, tp=1, dp=4, ep=2), "decode": pool("decode", 1376, 1, tp=1, dp=32, ep=32)},
    ),
    "hybrid": (NANO, "a10g", None, "vllm", {"colocated": pool("colocated", 44, 8, 512, tp=2)}),
    "hybrid split": (
        NANO, "h100-sxm", "fp8", "vllm",
        {"prefill": pool("prefill", 8, 6, tp=1), "decode": pool("decode", 61, 5, tp=2)},
    ),
    "windows split": (
        "openai/gpt-oss-120b", "b200-sxm", None, "sglang",
        {"prefill": pool("prefill", 2, 4, tp=1, pp=2), "decode": pool("decode", 528, 1, tp=2, dp=2)},
    ),
}  # fmt: skip


@cache
def base_plan(model: str, hardware: str, precision: str | None, backend: str) -> Plan:
    return find_plan(
        model=model, hardware=hardware, gpus=8 if hardware != "a10g" else 2, workload=Workload.fixed(2048, 256),
        slo=Slo(), precision=precision, backend=backend,
    )  # fmt: skip


@cache
def plan_of(case: str) -> Plan:
    """A plan whose recommended deployment has the pools of the case, and so whatever number a plan may give."""
    model, hardware, precision, backend, pools = CASES[case]
    plan = base_plan(model, hardware, precision, backend)
    old = plan.recommended
    deployment = Deployment(model=old.model, hardware=old.hardware, backend=backend, precision=old.precision, **pools)
    return replace(plan, best=replace(plan.best, deployment=deployment))
