"""YAML documents, and what pods of every orchestrator share."""

from __future__ import annotations

from typing import Any

import yaml

from tandem.plan.export.job import PLACEHOLDER, Instance, Job

TOKEN_SECRET = "hf-token-secret"


def to_yaml(comment: str, *documents: dict[str, Any]) -> str:
    """Documents in one file under a comment."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    parts = [yaml.safe_dump(d, sort_keys=False, width=1000, allow_unicode=True) for d in documents]
    return head + "---\n".join(parts)


def weights(job: Job) -> str:
    """The checkpoint that a manifest names."""
    return job.checkpoint.name or PLACEHOLDER


def gpu_resources(i: Instance) -> dict[str, Any]:
    """GPUs of one pod: a host's share of an instance."""
    return {"limits": {"nvidia.com/gpu": str(i.gpus_here)}, "requests": {"nvidia.com/gpu": str(i.gpus_here)}}


def pairs(environment: dict[str, str]) -> list[dict[str, Any]]:
    """Environment variables as Kubernetes lists them."""
    return [{"name": name, "value": value} for name, value in environment.items()]
