"""SGLang: what `sglang.launch_server` is told, alone or as prefill and decode servers behind sglang-router."""

from __future__ import annotations

import math

from tandem.plan.export import launch
from tandem.plan.export.flags import Flag, Shell, shell
from tandem.plan.export.formats import EngineFormats
from tandem.plan.export.job import Instance, Job
from tandem.plan.export.placement import place
from tandem.plan.export.releases import SGLANG, SGLANG_ROUTER

FORMATS = EngineFormats(
    title="SGLang",
    kv={"bf16": "auto", "fp8": "fp8_e4m3", "fp4": "nvfp4"},
    online={"fp8": "fp8"},
    state_option="--mamba-ssm-dtype",
)
BOOTSTRAP_PORT = 8998
PAGE = 128
"""Tokens of the largest cache page that SGLang's attention backends take: it refuses chunks that are no multiple of a page."""
ATTENTION_DP = "--attn-dp-size"
"""Option of attention data parallelism; releases before 0.5.23 write `--dp-size N --enable-dp-attention`."""


def engine_flags(job: Job, i: Instance, *, attention_dp: bool = True) -> list[Flag]:
    """Options of one instance, whatever starts it. SGLang counts tp over attention groups, and so are batch and chunk.

    `attention_dp` False: the spelling of releases without `--attn-dp-size`.
    """
    flags: list[Flag] = [("--tp-size", str(i.tp * i.dp))]
    if i.stages > 1:
        flags.append(("--pp-size", str(i.stages)))
    if i.dp > 1 and attention_dp:
        flags.append((ATTENTION_DP, str(i.dp)))
    elif i.dp > 1:
        flags += [("--dp-size", str(i.dp)), ("--enable-dp-attention", None)]
    if i.ep > 1:
        flags.append(("--ep-size", str(i.ep)))
    flags.append(("--context-length", str(job.max_model_len)))
    if i.role != "decode":
        tokens = i.step_tokens if i.mixed or i.role == "prefill" else i.step_tokens - i.seqs
        tokens = PAGE * math.ceil(tokens / PAGE) * i.dp
        flags += [("--chunked-prefill-size", str(tokens)), ("--max-prefill-tokens", str(tokens))]
    if i.role == "prefill":
        flags.append(("--prefill-max-requests", str(i.prompts)))
    else:
        flags += [("--max-running-requests", str(i.seqs * i.dp)), ("--cuda-graph-max-bs-decode", str(i.seqs))]
    if i.mixed:
        flags.append(("--enable-mixed-chunk", None))
    flags.append(("--disable-radix-cache", None))
    return [*flags, *FORMATS.flags(job), *transfer_flags(job, i)]


def transfer_flags(job: Job, i: Instance) -> list[Flag]:
    """The role, and NIXL between the pools."""
    if not job.split:
        return []
    return [("--disaggregation-mode", i.role), ("--disaggregation-transfer-backend", "nixl")]


def limits(job: Job) -> list[str]:
    """What SGLang cannot run as planned, one sentence each."""
    found = FORMATS.limits(job)
    if job.split and job.windowed and job.kv_heads is not None and job.instance("prefill").tp != job.instance("decode").tp:
        found.append("will not connect: SGLang moves sliding-window caches only between pools of equal tp")
    found.append("SGLang sizes its memory itself: --mem-fraction-static is left at its default")
    return found


def environment(job: Job) -> dict[str, str]:
    """Environment variables that every instance needs."""
    return {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"} if job.max_model_len > job.model.max_context else {}


def files(job: Job) -> dict[str, str]:
    """`sglang/run-node.sh` for every host and `sglang/router.sh` in front of them."""
    functions = "\n".join(_function(job, i) for i in job.instances)
    return {
        "sglang/run-node.sh": launch.node_script(
            job, launch.Release("SGLang", "sglang", SGLANG), functions, environment(job), limits(job)
        ),
        "sglang/router.sh": _router(job),
    }


def _function(job: Job, i: Instance) -> str:
    flags: list[Flag] = [
        ("--model-path", Shell("$MODEL")),
        ("--served-model-name", job.served_name),
        ("--host", "0.0.0.0"),
        ("--port", Shell("$((API_PORT + slot))")),
        *engine_flags(job, i),
    ]
    if i.nodes > 1:
        flags += [
            ("--nnodes", str(i.nodes)),
            ("--node-rank", Shell("$rank")),
            ("--dist-init-addr", Shell("$leader:$((MASTER_PORT + slot))")),
        ]
    if i.role == "prefill":
        flags.append(("--disaggregation-bootstrap-port", Shell(f"$(({BOOTSTRAP_PORT} + slot))")))
    return (
        f'{launch.function_head(i)}\n  CUDA_VISIBLE_DEVICES="$gpus" exec python3 -m sglang.launch_server \\\n{shell(flags)}\n}}'
    )


def _router(job: Job) -> str:
    places = [p for p in place(job) if p.rank == 0]
    flags: list[Flag] = [("--host", "0.0.0.0"), ("--port", str(launch.ROUTER_PORT)), ("--policy", "round_robin")]
    if job.split:
        flags.append(("--pd-disaggregation", None))
        for p in places:
            flags.append((f"--{p.instance.role}", launch.url(p)))
            if p.instance.role == "prefill":
                flags.append((str(BOOTSTRAP_PORT + p.slot), None))
    else:
        flags.append(("--worker-urls", None))
        flags += [(launch.url(p), None) for p in places]
    return launch.router_script(f"sglang-router=={SGLANG_ROUTER}", "python3 -m sglang_router.launch_router", flags)
