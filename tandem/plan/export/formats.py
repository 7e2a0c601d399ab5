"""Number formats of a plan in an engine's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.plan.export.flags import Flag
from tandem.plan.export.job import Job

STATE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Formats of a recurrent state, named alike by every engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFormats:
    """What an engine calls cache formats, what it can quantise weights to while loading, and its option for the state."""

    title: str
    kv: Mapping[str, str]
    online: Mapping[str, str]
    state_option: str

    def flags(self, job: Job) -> list[Flag]:
        """Options for the formats that are not the checkpoint's own."""
        precision = job.plan.recommended.precision
        flags: list[Flag] = []
        if job.checkpoint.online and job.checkpoint.wanted in self.online:
            flags.append(("--quantization", self.online[job.checkpoint.wanted]))
        kv = self.kv.get(precision.kv)
        if kv == "auto" and precision.weights != "bf16":
            kv = "bfloat16"  # a quantised checkpoint may name a cache format of its own, which auto would take
        if kv is not None and kv != "auto":
            flags.append(("--kv-cache-dtype", kv))
        if job.recurrent and precision.state in STATE_DTYPES:
            flags.append((self.state_option, STATE_DTYPES[precision.state]))
        return flags

    def limits(self, job: Job) -> list[str]:
        """Formats that the engine lacks, one sentence each."""
        precision = job.plan.recommended.precision
        found = []
        if precision.kv not in self.kv:
            found.append(f"{self.title} has no plain {precision.kv} cache: it keeps the model's own format, with more memory")
        if job.recurrent and precision.state not in STATE_DTYPES:
            found.append(f"{self.title} has no {precision.state} recurrent state: it keeps the model's own")
        if job.checkpoint.online and job.checkpoint.wanted not in self.online:
            found.append(f"{self.title} cannot quantise to {job.checkpoint.wanted} while loading: set MODEL to a checkpoint")
        found += [
            f"{i.role}: cpp{i.cpp} becomes {i.cpp} pipeline stages with chunks of {i.step_tokens:,} tokens"
            for i in job.instances
            if i.cpp > 1
        ]
        return found
