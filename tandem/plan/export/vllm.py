"""vLLM: what `vllm serve` is told, alone or with prefill and decode joined by NIXL and vllm-router."""

from __future__ import annotations

import json

from tandem.plan.export import launch
from tandem.plan.export.flags import Flag, Shell, shell
from tandem.plan.export.formats import EngineFormats
from tandem.plan.export.job import Instance, Job
from tandem.plan.export.placement import place
from tandem.plan.export.releases import VLLM, VLLM_ROUTER

GRAPHS_MAX = 512
"""Largest batch that vLLM captures CUDA graphs for unless told otherwise."""
FORMATS = EngineFormats(
    title="vLLM",
    kv={"bf16": "auto", "fp8": "fp8", "fp4": "nvfp4"},
    online={"fp8": "fp8", "fp8_block": "fp8_per_block"},
    state_option="--mamba-ssm-cache-dtype",
)
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
NIXL_PORT = 5600
NIXL_PORTS = 64
"""Side-channel ports set apart for one instance: vLLM takes one for each data-parallel rank."""


def engine_flags(job: Job, i: Instance) -> list[Flag]:
    """Options of one instance, whatever starts it: parallelism, batch, step budget, formats, transfer."""
    flags: list[Flag] = [("--tensor-parallel-size", str(i.tp))]
    if i.stages > 1:
        flags.append(("--pipeline-parallel-size", str(i.stages)))
    if i.dp > 1:
        flags.append(("--data-parallel-size", str(i.dp)))
    if i.ep > 1:
        flags.append(("--enable-expert-parallel", None))
    flags += [
        ("--max-num-seqs", str(i.seqs)),
        ("--max-num-batched-tokens", str(i.step_tokens)),
        ("--max-model-len", str(job.max_model_len)),
        ("--gpu-memory-utilization", f"{job.plan.hardware.usable_memory_fraction:g}"),
        ("--no-enable-prefix-caching", None),
    ]
    if i.seqs > GRAPHS_MAX and i.role != "prefill":
        flags.append(("--max-cudagraph-capture-size", str(i.seqs)))
    return [*flags, *FORMATS.flags(job), *transfer_flags(job, i)]


def transfer_flags(job: Job, i: Instance) -> list[Flag]:
    """NIXL between the pools."""
    if not job.split:
        return []
    return [("--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": ROLES[i.role]}))]


def environment(job: Job) -> dict[str, str]:
    """Environment variables that every instance needs."""
    found = {}
    if job.split and job.recurrent:
        found["VLLM_SSM_CONV_STATE_LAYOUT"] = "DS"  # NIXL cuts the convolution's window by channel
    if job.max_model_len > job.model.max_context:
        found["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return found


def limits(job: Job) -> list[str]:
    """What vLLM cannot run as planned, one sentence each."""
    found = FORMATS.limits(job)
    for i in job.instances:
        if 1 < i.ep < i.tp * i.dp:
            found.append(
                f"{i.role}: vLLM spreads experts over all {i.tp * i.dp} GPUs of tp x dp or over none; "
                f"ep{i.ep} with experts cut {i.tp * i.dp // i.ep} ways becomes ep{i.tp * i.dp}"
            )
    if job.split:
        found += _split_limits(job, job.instance("prefill"), job.instance("decode"))
    return found


def _split_limits(job: Job, p: Instance, d: Instance) -> list[str]:
    found = []
    if d.stages > 1:
        found.append(f"will not start: NIXL takes no pipeline stages in the decode pool (pp{d.stages})")
    if p.stages > 1 and job.recurrent:
        found.append(f"will not start: NIXL carries no recurrent state out of a pipeline of {p.stages} stages")
    elif p.stages > 1 and job.windowed:
        found.append("will not start: NixlConnector refuses pipeline stages with sliding windows; NixlPushConnector takes them")
    if job.kv_heads is not None and not job.recurrent and p.tp > max(d.tp, job.kv_heads):
        found.append(f"will not connect: NIXL cannot read {job.kv_heads} KV heads copied over prefill tp{p.tp} into tp{d.tp}")
    return found


def files(job: Job) -> dict[str, str]:
    """`vllm/run-node.sh` for every host and `vllm/router.sh` in front of them."""
    functions = "\n".join(_function(job, i) for i in job.instances)
    return {
        "vllm/run-node.sh": launch.node_script(
            job, launch.Release("vLLM", "vllm", VLLM), functions, environment(job), limits(job)
        ),
        "vllm/router.sh": _router(job),
    }


def _function(job: Job, i: Instance) -> str:
    flags: list[Flag] = [
        ("--served-model-name", job.served_name),
        ("--host", "0.0.0.0"),
        ("--port", Shell("$((API_PORT + slot))")),
        *engine_flags(job, i),
    ]
    lines = [launch.function_head(i)]
    if i.nodes > 1:
        flags += [("--nnodes", str(i.nodes)), ("--node-rank", Shell("$rank")), ("--master-addr", Shell("$leader"))]
        flags += [("--master-port", Shell("$((MASTER_PORT + slot))"))]
        lines += ["  local headless=()", '  if [ "$rank" -gt 0 ]; then headless=(--headless); fi']
    if job.split:
        lines += [
            '  export VLLM_NIXL_SIDE_CHANNEL_HOST="$here"',
            f'  export VLLM_NIXL_SIDE_CHANNEL_PORT="$(({NIXL_PORT} + {NIXL_PORTS} * slot))"',
        ]
    tail = ' \\\n    "${headless[@]}"' if i.nodes > 1 else ""
    lines += [f'  CUDA_VISIBLE_DEVICES="$gpus" exec vllm serve "$MODEL" \\\n{shell(flags)}{tail}', "}"]
    return "\n".join(lines)


def _router(job: Job) -> str:
    places = [p for p in place(job) if p.rank == 0]
    flags: list[Flag] = [("--host", "0.0.0.0"), ("--port", str(launch.ROUTER_PORT)), ("--policy", "round_robin")]
    if job.split:
        flags.append(("--vllm-pd-disaggregation", None))
        flags += [(f"--{p.instance.role}", launch.url(p)) for p in places]
    else:
        flags.append(("--worker-urls", None))
        flags += [(launch.url(p), None) for p in places]
    return launch.router_script(f"vllm-router=={VLLM_ROUTER}", "vllm-router", flags)
