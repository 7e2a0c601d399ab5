"""Ray Serve LLM: one application file for `serve run`, with the builder that fits the deployment."""

from __future__ import annotations

from typing import Any

from tandem.plan.export import vllm
from tandem.plan.export.flags import fields
from tandem.plan.export.job import Instance, Job
from tandem.plan.export.launch import blocked
from tandem.plan.export.manifests import to_yaml, weights
from tandem.plan.export.releases import INSIDE_RAY, RAY

ACCELERATORS = {
    "a10g": "A10G",
    "a100-40gb-sxm": "A100",
    "a100-80gb-sxm": "A100",
    "b200-sxm": "B200",
    "b300-sxm": "B300",
    "gb200": "GB200",
    "gb300": "GB300",
    "h100-pcie": "H100",
    "h100-sxm": "H100",
    "h200-sxm": "H200",
    "l4": "L4",
    "l40s": "L40S",
    "mi300x": "AMD-Instinct-MI300X-OAM",
    "rtx-pro-6000": "RTX-PRO-6000",
}
"""Names that Ray's nodes announce for the GPUs of the catalogue that it knows."""


def llm_config(job: Job, i: Instance) -> dict[str, Any]:
    """The LLMConfig of one pool; Ray counts replicas in whole data-parallel groups."""
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": job.served_name, "model_source": weights(job)},
        "engine_kwargs": fields(vllm.engine_flags(job, i)),
        "deployment_config": {"num_replicas": i.replicas, "max_ongoing_requests": max(2 * i.seqs, 8)},
    }
    accelerator = ACCELERATORS.get(job.plan.hardware.name)
    if accelerator is not None:
        config["accelerator_type"] = accelerator
    environment = vllm.environment(job)
    if environment:
        config["runtime_env"] = {"env_vars": environment}
    return config


def application(job: Job) -> dict[str, Any]:
    """The file that `serve run` takes."""
    if job.split:
        builder = "build_pd_openai_app"
        arguments: dict[str, Any] = {f"{i.role}_config": llm_config(job, i) for i in job.instances}
    else:
        only = job.instances[0]
        builder = "build_dp_openai_app" if only.dp > 1 else "build_openai_app"
        config = llm_config(job, only)
        arguments = {"llm_config": config} if only.dp > 1 else {"llm_configs": [config]}
    app = {"name": job.slug, "route_prefix": "/", "import_path": f"ray.serve.llm:{builder}", "args": arguments}
    return {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": [app]}


def limits(job: Job) -> list[str]:
    """What Ray Serve LLM cannot run as planned, one sentence each."""
    found = vllm.limits(job)
    if job.plan.hardware.name not in ACCELERATORS:
        found.append(f"Ray has no name for {job.plan.hardware.name}: its replicas take any GPU of the cluster")
    return [*found, f"Ray {RAY} demands vLLM {INSIDE_RAY['vllm']}"]


def files(job: Job) -> dict[str, str]:
    """`ray/serve.yaml`."""
    comment = (
        f"Ray Serve LLM {RAY}: pip install 'ray[serve,llm]=={RAY}' on every node of a Ray cluster, then\nserve run serve.yaml"
    )
    comment = "\n".join([comment, *blocked(limits(job))])
    return {"ray/serve.yaml": to_yaml(comment, application(job))}
