"""NVIDIA Dynamo: one DynamoGraphDeployment for its Kubernetes operator, with vLLM workers, or SGLang where that was planned."""

from __future__ import annotations

from typing import Any

from tandem.plan.export import sglang, vllm
from tandem.plan.export.flags import Flag, words
from tandem.plan.export.job import Instance, Job
from tandem.plan.export.launch import blocked
from tandem.plan.export.manifests import TOKEN_SECRET, gpu_resources, pairs, to_yaml, weights
from tandem.plan.export.releases import DYNAMO, INSIDE_DYNAMO

API = "nvidia.com/v1beta1"
TYPES = {"prefill": "prefill", "decode": "decode", "colocated": "worker"}


def engine(job: Job) -> str:
    """The engine inside: the plan's, or vLLM where Dynamo's graph is not written for it here."""
    return "sglang" if job.plan.recommended.backend == "sglang" else "vllm"


def worker_flags(job: Job, i: Instance) -> list[Flag]:
    """Options of `python3 -m dynamo.vllm` or `dynamo.sglang`: the engine's own and the role."""
    if engine(job) == "sglang":
        flags = [("--model-path", weights(job)), ("--served-model-name", job.served_name), ("--host", "0.0.0.0")]
        return [*flags, *sglang.engine_flags(job, i, attention_dp=False)]
    role: list[Flag] = [("--disaggregation-mode", i.role)] if job.split else []
    return [("--model", weights(job)), ("--served-model-name", job.served_name), *vllm.engine_flags(job, i), *role]


def graph(job: Job) -> dict[str, Any]:
    """The graph deployment: a frontend and one component for each pool."""
    image = f"nvcr.io/nvidia/ai-dynamo/{engine(job)}-runtime:{DYNAMO}"
    frontend = _component(
        "Frontend", "frontend", 1, {"image": image, "command": ["python3"], "args": ["-m", "dynamo.frontend"]}
    )
    workers = [_worker(job, i, image) for i in job.instances]
    return {
        "apiVersion": API,
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": job.slug},
        "spec": {"components": [frontend, *workers]},
    }


def _worker(job: Job, i: Instance, image: str) -> dict[str, Any]:
    environment = (sglang if engine(job) == "sglang" else vllm).environment(job)
    container: dict[str, Any] = {
        "image": image,
        "command": ["python3", "-m", f"dynamo.{engine(job)}"],
        "args": words(worker_flags(job, i)),
        "resources": gpu_resources(i),
    }
    if environment:
        container["env"] = pairs(environment)
    component = _component(i.role, TYPES[i.role], i.replicas, container)
    if i.nodes > 1:
        component["multinode"] = {"nodeCount": i.nodes}
    return component


def _component(name: str, kind: str, replicas: int, container: dict[str, Any]) -> dict[str, Any]:
    main = {"name": "main", **container, "envFrom": [{"secretRef": {"name": TOKEN_SECRET}}]}
    return {"name": name, "type": kind, "replicas": replicas, "podTemplate": {"spec": {"containers": [main]}}}


def limits(job: Job) -> list[str]:
    """What Dynamo cannot run as planned, one sentence each."""
    inside = engine(job)
    found = (sglang if inside == "sglang" else vllm).limits(job)
    if job.plan.recommended.backend not in ("vllm", "sglang"):
        found.append(f"the graph runs vLLM, the plan is for {job.plan.recommended.backend}")
    return [*found, f"Dynamo {DYNAMO} carries {inside} {INSIDE_DYNAMO[inside]}"]


def files(job: Job) -> dict[str, str]:
    """`dynamo/graph.yaml`."""
    comment = (
        f"Dynamo {DYNAMO}. Its operator must run in the cluster, and a secret {TOKEN_SECRET} must hold HF_TOKEN.\n"
        "kubectl apply -f graph.yaml; the frontend serves port 8000."
    )
    comment = "\n".join([comment, *blocked(limits(job))])
    return {"dynamo/graph.yaml": to_yaml(comment, graph(job))}
