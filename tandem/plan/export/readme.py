"""The README of an export: what each file is, how to run it, what it should reach, and what a backend cannot express."""

from __future__ import annotations

from tandem.plan.export import dynamo, llmd, ray, sglang, vllm
from tandem.plan.export.job import TEMPLATE_TOKENS, Instance, Job
from tandem.plan.export.placement import num_nodes, place
from tandem.plan.export.releases import AIPERF, DYNAMO, RAY, SGLANG, SGLANG_ROUTER, VLLM, VLLM_ROUTER
from tandem.spec.design import Estimate

NAMES = {"colocated": "serving", "prefill": "prefill", "decode": "decode"}
STEPS = {
    "vLLM": f"""1. Put the hosts' addresses into `nodes.env`.
2. On every host: `pip install vllm=={VLLM}` (two pools: `nixl` too), then `bash vllm/run-node.sh HOST_NUMBER`.
3. On the first: `pip install vllm-router=={VLLM_ROUTER}`, then `bash vllm/router.sh`. Clients use port 8000.""",
    "SGLang": f"""1. Put the hosts' addresses into `nodes.env`.
2. On every host: `pip install sglang=={SGLANG}` (two pools: `nixl` too), then `bash sglang/run-node.sh HOST_NUMBER`.
3. On the first: `pip install sglang-router=={SGLANG_ROUTER}`, then `bash sglang/router.sh`. Clients use port 8000.""",
    "NVIDIA Dynamo": f"""1. In a cluster with Dynamo {DYNAMO}'s operator and a secret `hf-token-secret` that holds `HF_TOKEN`:
   `kubectl apply -f dynamo/graph.yaml`.
2. `kubectl port-forward` the frontend's service to port 8000.""",
    "llm-d": """1. In a cluster with llm-d's prerequisites and a secret `llm-d-hf-token` that holds `HF_TOKEN`:
   `kubectl apply -f llm-d/model-servers.yaml`. An instance over several hosts needs the LeaderWorkerSet controller.
2. Install llm-d's router chart with `llm-d/router-values.yaml` over its base values; the command is in the file.""",
    "Ray Serve LLM": f"""1. On a Ray cluster whose nodes have `pip install 'ray[serve,llm]=={RAY}'`: `serve run ray/serve.yaml`.
2. Clients use port 8000.""",
}


def text(job: Job) -> str:
    """The whole README."""
    plan, places = job.plan, place(job)
    hosts = num_nodes(places)
    each = job.instances[0].gpus_per_node
    lines = [
        f"# {job.model.name} on {plan.recommended.gpus} x {plan.hardware.title}",
        "",
        f"The deployment that Tandem recommends, ready to run on five backends; the plan is for {plan.recommended.backend}.",
        f"It takes {plan.recommended.gpus} GPUs on {_count(hosts, 'host')} of {each}.",
        "",
        *_pools(job),
        "",
        *_prediction(job),
        "",
        *_files(),
    ]
    modules = {"vLLM": vllm, "SGLang": sglang, "NVIDIA Dynamo": dynamo, "llm-d": llmd, "Ray Serve LLM": ray}
    for name, module in modules.items():
        lines += ["", f"## {name}", "", STEPS[name]]
        found = module.limits(job)
        if found:
            lines += ["", "What it cannot express, or does otherwise:", "", *(f"- {limit}" for limit in found)]
    lines += ["", *_measure(job)]
    if job.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in job.notes)]
    return "\n".join(lines) + "\n"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _pools(job: Job) -> list[str]:
    rows = [
        "| pool | instances | GPUs each | hosts each | parallelism | requests in flight each | tokens a step |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [_pool(i) for i in job.instances]
    if any(i.role != "decode" and not i.mixed for i in job.instances):
        rows += ["", f"Steps that take prompts have room for {TEMPLATE_TOKENS} tokens a prompt that a chat template adds."]
    return rows


def _pool(i: Instance) -> str:
    axes = {"tp": i.tp, "pp": i.pp, "dp": i.dp, "ep": i.ep, "cpp": i.cpp}
    layout = " ".join(f"{k}{v}" for k, v in axes.items() if v > 1) or "tp1"
    step = f"{i.step_tokens:,}{', prompts ride with decode steps' if i.mixed else ''}"
    return f"| {NAMES[i.role]} | {i.replicas} | {i.gpus} | {i.nodes} | {layout} | {i.batch:,} | {step} |"


def _prediction(job: Job) -> list[str]:
    plan, slo, expected = job.plan.best, job.plan.slo, job.expected
    bounds = [f"{n} <= {v * 1e3:g} ms" for n, v in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)) if v is not None]
    return [
        f"Predicted with {job.plan.workload.mean_isl:,.0f} tokens in, {job.plan.workload.mean_osl:,.0f} out"
        f"{' (asked: ' + ', '.join(bounds) + ')' if bounds else ''}; 80 % intervals:",
        "",
        f"| | planned, in steady traffic | the benchmark, {_count(job.concurrency, 'request')} in flight |",
        "|---|---|---|",
        f"| TTFT | {_show(plan.ttft_s, 1e3, 'ms')} | {_show(expected.ttft_s, 1e3, 'ms')} |",
        f"| TPOT | {_show(plan.tpot_s, 1e3, 'ms')} | {_show(expected.tpot_s, 1e3, 'ms')} |",
        f"| tok/s/GPU | {_show(plan.tokens_per_s_per_gpu, 1)} | {_show(expected.tokens_per_s_per_gpu, 1)} |",
        f"| evidence | {plan.tpot_s.evidence} | {expected.tpot_s.evidence} |",
        "",
        f"The benchmark's column is {expected.how}.",
    ]


def _show(e: Estimate, factor: float, unit: str = "") -> str:
    return f"{e.value * factor:,.1f}{' ' * bool(unit)}{unit} ({e.low * factor:,.1f} to {e.high * factor:,.1f})"


def _files() -> list[str]:
    return [
        "| file | what it is |",
        "|---|---|",
        "| `nodes.env` | addresses of the hosts and the weights to load: edit this first |",
        "| `vllm/`, `sglang/` | `run-node.sh` starts the instances of one host, `router.sh` the router in front of all |",
        "| `dynamo/graph.yaml` | a DynamoGraphDeployment |",
        "| `llm-d/` | model servers, and values of llm-d's router chart |",
        "| `ray/serve.yaml` | an application for `serve run` |",
        "| `benchmark/` | measures the deployment and sets it beside the prediction |",
        "| `plan.json` | the deployment as data, with its prediction |",
        "| `tandem-export.json` | what this export wrote; a new export replaces only what is listed here and untouched |",
    ]


def _measure(job: Job) -> list[str]:
    return [
        "## Does it do what was predicted?",
        "",
        f"`pip install aiperf=={AIPERF}`, then `bash benchmark/run.sh URL`. It sends the planned traffic with "
        f"{_count(job.concurrency, 'request')} in flight, and prints measured and predicted TTFT, TPOT and tok/s/GPU.",
        "The prediction is the benchmark's column of the table above; `benchmark/predicted.json` holds both.",
        "Prefix caching is off in every file, because the prediction counts none: turn it on once you have measured.",
        "Only the backend that was planned for is predicted; the others carry other overheads.",
    ]
