"""llm-d: model servers as Kubernetes Deployments, or LeaderWorkerSets where an instance spans hosts, and the router's values.

No package publishes llm-d's schema. Labels, sidecar, ports and plugins follow its own guide for prefill and decode; tests check
that the manifests fit together.
"""

from __future__ import annotations

from typing import Any

import yaml

from tandem.plan.export import vllm
from tandem.plan.export.flags import Flag, words
from tandem.plan.export.job import Instance, Job
from tandem.plan.export.launch import blocked
from tandem.plan.export.manifests import gpu_resources, pairs, to_yaml, weights
from tandem.plan.export.releases import VLLM

SIDECAR = "ghcr.io/llm-d/llm-d-router-disagg-sidecar:v0.8.0"
CLIENT_PORT, BEHIND_SIDECAR = 8000, 8200
TOKEN_SECRET = "llm-d-hf-token"
KEEP_ALIVE_S = 120
"""Longer than the sidecar keeps idle connections (90 s), or it would reuse one that the server has closed."""
SHM = "64Gi"
LEADER = ("--node-rank=$(LWS_WORKER_INDEX)", "--master-addr=$(LWS_LEADER_ADDRESS)")


def labels(job: Job, role: str) -> dict[str, str]:
    """Labels by which the router finds servers and tells their roles."""
    shown = {"llm-d.ai/inference-serving": "true", "llm-d.ai/guide": job.slug}
    return shown if role == "colocated" else {**shown, "llm-d.ai/role": role}


def server_flags(job: Job, i: Instance) -> list[Flag]:
    """Options of `vllm serve` in a pod; a decode server listens behind the sidecar that asks for remote prefill."""
    port = BEHIND_SIDECAR if i.role == "decode" else CLIENT_PORT
    flags: list[Flag] = [("--served-model-name", job.served_name), ("--host", "0.0.0.0"), ("--port", str(port))]
    return [*flags, *vllm.engine_flags(job, i)]


def _container(job: Job, i: Instance, *, leads: bool) -> dict[str, Any]:
    port = BEHIND_SIDECAR if i.role == "decode" else CLIENT_PORT
    arguments = [weights(job), *words(server_flags(job, i))]
    if i.nodes > 1:
        arguments += ["--nnodes=$(LWS_GROUP_SIZE)", *LEADER] + ([] if leads else ["--headless"])
    host = {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    environment = vllm.environment(job)
    if job.split:
        environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = str(KEEP_ALIVE_S)
    container: dict[str, Any] = {
        "name": "modelserver",
        "image": f"docker.io/vllm/vllm-openai:v{VLLM}",
        "command": ["vllm", "serve"],
        "args": arguments,
        "env": [*pairs(environment), *([host] if job.split else [])],
        "envFrom": [{"secretRef": {"name": TOKEN_SECRET}}],
        "resources": gpu_resources(i),
        "volumeMounts": [{"mountPath": "/dev/shm", "name": "shm"}],
    }
    if leads:
        container["ports"] = [{"name": "modelserver", "containerPort": port, "protocol": "TCP"}]
        container["startupProbe"] = {**_probe("/v1/models"), "periodSeconds": 30, "failureThreshold": 120}
        container["livenessProbe"] = {**_probe("/health"), "periodSeconds": 10, "failureThreshold": 3}
        container["readinessProbe"] = {**_probe("/v1/models"), "periodSeconds": 5, "failureThreshold": 3}
    return container


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "modelserver"}, "timeoutSeconds": 5}


def _pod(job: Job, i: Instance, *, leads: bool) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "containers": [_container(job, i, leads=leads)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHM}}],
    }
    if i.role == "decode" and leads:
        spec["initContainers"] = [
            {
                "name": "routing-proxy",
                "image": SIDECAR,
                "args": [
                    f"--port={CLIENT_PORT}",
                    f"--model-server-port={BEHIND_SIDECAR}",
                    "--kv-connector=nixlv2",
                    "--secure-serving=false",
                ],
                "ports": [{"name": "sidecar", "containerPort": CLIENT_PORT, "protocol": "TCP"}],
                "restartPolicy": "Always",
            }
        ]
    # Only leaders answer requests: the router must not find the others.
    shown = labels(job, i.role) if leads else {"llm-d.ai/guide": job.slug, "llm-d.ai/worker-of": i.role}
    return {"metadata": {"labels": shown}, "spec": spec}


def workload(job: Job, i: Instance) -> dict[str, Any]:
    """A pool: a Deployment, or a LeaderWorkerSet of groups of hosts."""
    if i.nodes == 1:
        api, kind = "apps/v1", "Deployment"
        spec: dict[str, Any] = {"selector": {"matchLabels": labels(job, i.role)}, "template": _pod(job, i, leads=True)}
    else:
        api, kind = "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"
        group = {"size": i.nodes, "leaderTemplate": _pod(job, i, leads=True), "workerTemplate": _pod(job, i, leads=False)}
        spec = {"leaderWorkerTemplate": group}
    metadata = {"name": f"{job.slug}-{i.role}", "labels": labels(job, i.role)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": {"replicas": i.replicas, **spec}}


def router_values(job: Job) -> dict[str, Any]:
    """Values of llm-d's router chart: which pods it routes to, and for two pools every request to prefill before decode."""
    least = [{"type": "active-request-scorer"}, {"type": "max-score-picker"}]
    order = [{"pluginRef": p["type"]} for p in least]
    if job.split:
        handler = {"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": "always-disagg-pd-decider"}}}
        plugins = [{"type": "always-disagg-pd-decider"}, handler, {"type": "prefill-filter"}, {"type": "decode-filter"}, *least]
        profiles = [{"name": r, "plugins": [{"pluginRef": f"{r}-filter"}, *order]} for r in ("prefill", "decode")]
    else:
        plugins = [{"type": "single-profile-handler"}, *least]
        profiles = [{"name": "default", "plugins": order}]
    picker = {"apiVersion": "llm-d.ai/v1", "kind": "EndpointPickerConfig", "plugins": plugins, "schedulingProfiles": profiles}
    text = yaml.safe_dump(picker, sort_keys=False)
    file = "tandem.yaml"
    return {
        "router": {
            "extraServicePorts": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8081}],
            "epp": {"replicas": 1, "pluginsConfigFile": file, "pluginsCustomConfig": {file: text}},
            "modelServers": {"matchLabels": {"llm-d.ai/guide": job.slug, "llm-d.ai/inference-serving": "true"}},
        }
    }


def limits(job: Job) -> list[str]:
    """What llm-d cannot run as planned, one sentence each."""
    found = vllm.limits(job)
    for i in job.instances:
        if i.dp > 1 and i.nodes > 1:
            found.append(
                f"{i.role}: dp{i.dp} over {i.nodes} hosts answers through its leader; llm-d's wide-EP guide spreads that"
            )
    return [*found, "no published schema of llm-d was checked; its manifests follow its guide, with images to pin by you"]


def files(job: Job) -> dict[str, str]:
    """`llm-d/model-servers.yaml` and `llm-d/router-values.yaml`."""
    servers = (
        f"Model servers for llm-d with vLLM {VLLM}. A secret {TOKEN_SECRET} must hold HF_TOKEN.\n"
        "kubectl apply -f model-servers.yaml"
    )
    servers = "\n".join([servers, *blocked(limits(job))])
    router = (
        "Values of the llm-d router chart, over the base.values.yaml of its guides:\n"
        f"helm install {job.slug} oci://ghcr.io/llm-d/charts/llm-d-router-standalone -f base.values.yaml -f router-values.yaml"
    )
    return {
        "llm-d/model-servers.yaml": to_yaml(servers, *(workload(job, i) for i in job.instances)),
        "llm-d/router-values.yaml": to_yaml(router, router_values(job)),
    }
