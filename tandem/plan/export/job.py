"""What an export writes down, once for all backends: the model to load, the instances to start, and the prediction to meet."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from tandem.perf.memory import DEFAULT_STEP_TOKENS, LARGEST_STEP_TOKENS
from tandem.plan.export.expected import Expected, expect
from tandem.plan.planner import Plan
from tandem.spec._aliases import SIBLINGS
from tandem.spec.design import Pool, Role
from tandem.spec.model import MLA, Attention, GatedDeltaNet, Mamba2, ModelSpec

TEMPLATE_TOKENS = 256
"""Room beside the planned lengths for what a chat template adds, so that it never costs a second step or a refusal."""
TRACE_SPREAD = 4
"""The longest request of a trace over the longest mean of its groups, at most; the server refuses longer ones."""
TRAY_GPUS = 4
"""GPUs that one host of a rack-scale NVLink domain has (GB200 and GB300 NVL72: 18 trays of 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The weights to load: a hub id, or None where the user must name some; `online` says that loading quantises them."""

    name: str | None
    wanted: str
    online: bool = False
    note: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One instance of a pool as a serving engine takes it: token budgets and sequences are those of one attention group."""

    role: Role
    replicas: int
    tp: int
    pp: int
    dp: int
    ep: int
    cpp: int
    batch: int
    seqs: int
    step_tokens: int
    prompts: int
    mixed: bool
    gpus_per_node: int

    @property
    def stages(self) -> int:
        """Pipeline stages; engines run chunked pipeline parallelism as a pipeline with chunked prefill."""
        return self.pp * self.cpp

    @property
    def gpus(self) -> int:
        """GPUs of the instance."""
        return self.tp * self.stages * self.dp

    @property
    def nodes(self) -> int:
        """Hosts of the instance."""
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def gpus_here(self) -> int:
        """GPUs of the instance on each of its hosts."""
        return self.gpus // self.nodes


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the files of an export say."""

    plan: Plan
    checkpoint: Checkpoint
    instances: tuple[Instance, ...]
    max_model_len: int
    concurrency: int
    notes: tuple[str, ...]

    @property
    def model(self) -> ModelSpec:
        """The model that was planned for."""
        return self.plan.model

    @property
    def split(self) -> bool:
        """Whether prefill and decode have pools of their own."""
        return len(self.instances) > 1

    @property
    def served_name(self) -> str:
        """The name under which clients ask for the model, the same in every backend."""
        return self.model.name

    @property
    def slug(self) -> str:
        """The model's name as Kubernetes takes names: lower case letters, digits and hyphens, at most 40."""
        text = "".join(c if c.isalnum() else "-" for c in self.model.name.rpartition("/")[2].lower())
        return text[:40].strip("-") or "model"

    @property
    def recurrent(self) -> bool:
        """Whether sequences hold a recurrent state beside their attention cache."""
        return any(isinstance(m, (Mamba2, GatedDeltaNet)) for m, _ in self.model.mixers)

    @property
    def windowed(self) -> bool:
        """Whether some attention layers keep only a window."""
        return any(isinstance(m, Attention) and m.window is not None for m, _ in self.model.mixers)

    @property
    def kv_heads(self) -> int | None:
        """KV heads of the attention layers; None for latent attention or none."""
        heads = [m.num_kv_heads for m, _ in self.model.mixers if isinstance(m, Attention)]
        return None if any(isinstance(m, MLA) for m, _ in self.model.mixers) else min(heads, default=None)

    def instance(self, role: str) -> Instance:
        """The instance of a role."""
        return next(i for i in self.instances if i.role == role)

    @cached_property
    def expected(self) -> Expected:
        """What the benchmark should measure."""
        return expect(self.plan, self.concurrency)

    def predicted(self) -> dict[str, Any]:
        """What the benchmark should measure, and beside it under `plan` what was planned in steady traffic, in SI units."""
        best, expected = self.plan.best, self.expected
        return {
            "model": self.model.name,
            "hardware": self.plan.hardware.name,
            "backend": self.plan.recommended.backend,
            "mode": self.plan.recommended.mode,
            "gpus": self.plan.recommended.gpus,
            "isl": self.plan.workload.mean_isl,
            "osl": self.plan.workload.mean_osl,
            "concurrency": self.concurrency,
            "how": expected.how,
            "requests_per_s": expected.requests_per_s,
            "ttft_s": asdict(expected.ttft_s),
            "tpot_s": asdict(expected.tpot_s),
            "tokens_per_s_per_gpu": asdict(expected.tokens_per_s_per_gpu),
            "plan": {
                "requests_per_s": best.requests_per_s,
                "ttft_s": asdict(best.ttft_s),
                "ttft_percentile": self.plan.slo.percentile,
                "tpot_s": asdict(best.tpot_s),
                "tokens_per_s_per_gpu": asdict(best.tokens_per_s_per_gpu),
            },
        }


def make_job(plan: Plan) -> Job:
    """Translate a plan's recommended deployment into what serving engines are told."""
    longest = max(i + o for i, o in zip(plan.workload.isl, plan.workload.osl, strict=True))
    fixed = len(plan.workload.isl) == 1
    wanted = math.ceil(longest) + TEMPLATE_TOKENS if fixed else 1024 * math.ceil(TRACE_SPREAD * longest / 1024)
    limit = plan.model.max_context
    checkpoint = find_checkpoint(plan.model, plan.recommended.precision.weights)
    notes = [checkpoint.note] if checkpoint.note else []
    if not fixed:
        notes.append(
            f"the plan knows this traffic by the means of {len(plan.workload.isl)} groups: servers take up to "
            f"{min(wanted, max(limit, math.ceil(longest))):,} tokens a request and refuse longer ones"
        )
    if plan.workload.mean_isl > LARGEST_STEP_TOKENS:
        notes.append(f"prompts enter in steps of at most {LARGEST_STEP_TOKENS:,} tokens, as memory was planned for")
    return Job(
        plan=plan,
        checkpoint=checkpoint,
        instances=tuple(_instance(plan, pool) for pool in plan.recommended.pools),
        max_model_len=min(wanted, limit) if longest <= limit else wanted,
        concurrency=_concurrency(plan),
        notes=(*notes, *plan.notes),
    )


def _instance(plan: Plan, pool: Pool) -> Instance:
    p = pool.parallelism
    seqs = math.ceil(pool.batch / p.dp)
    prompts = math.ceil(pool.batch / (p.dp * p.pp)) if pool.role == "prefill" else 1
    isl = math.ceil(max(plan.workload.isl))
    if pool.role == "decode":
        tokens = max(DEFAULT_STEP_TOKENS, seqs)
    elif pool.role == "prefill":
        tokens = _prefill_step(prompts, isl, pool.chunk_tokens)
    elif pool.chunk_tokens is not None:
        tokens = pool.chunk_tokens
    else:
        tokens = _prefill_step(1, isl, None) + seqs
    return Instance(
        role=pool.role,
        replicas=pool.replicas,
        tp=p.tp,
        pp=p.pp,
        dp=p.dp,
        ep=p.ep,
        cpp=p.cpp,
        batch=pool.batch,
        seqs=seqs,
        step_tokens=tokens,
        prompts=prompts,
        mixed=pool.role == "colocated" and pool.chunk_tokens is not None,
        gpus_per_node=host_gpus(plan.hardware.scale_up_gpus),
    )


def _prefill_step(prompts: int, isl: int, chunk_tokens: int | None) -> int:
    """Tokens of a prefill step: the planned chunk, or more where the prompts with what chat templates add would need one more
    step than the bare prompts."""
    chunk = chunk_tokens or min(prompts * isl, LARGEST_STEP_TOKENS)
    steps = math.ceil(prompts * isl / chunk)
    return max(chunk, math.ceil(prompts * (isl + TEMPLATE_TOKENS) / steps))


def host_gpus(scale_up_gpus: int) -> int:
    """GPUs of one host: a scale-up domain of up to 8 is one, a larger one is a rack of trays."""
    return scale_up_gpus if scale_up_gpus <= 8 else TRAY_GPUS


def _concurrency(plan: Plan) -> int:
    """Requests in flight that the plan comes to and the benchmark keeps: full batches, or by Little's law over both pools."""
    pool = plan.recommended.colocated
    if pool is not None:
        return pool.batch * pool.replicas
    best = plan.best
    in_system_s = best.ttft_s.value + best.tpot_s.value * (plan.workload.mean_osl - 1)
    return max(1, round(best.requests_per_s * in_system_s))


def find_checkpoint(model: ModelSpec, weights: str) -> Checkpoint:
    """The published checkpoint in that weight format: the model itself, a sibling, or the model quantised while loading."""
    hub = "/" in model.name
    if weights == model.native_precision and hub:
        return Checkpoint(name=model.name, wanted=weights)
    base = SIBLINGS[model.name].of if model.name in SIBLINGS else model.name
    siblings = [name for name, s in SIBLINGS.items() if s.of == base and s.native_precision == weights]
    same = [n for n in siblings if n.rpartition("/")[2].startswith(model.name.rpartition("/")[2])]
    if same:
        note = f"{same[0]} is the published {weights} checkpoint of {model.name}; the servers load that one"
        return Checkpoint(name=same[0], wanted=weights, note=note)
    if model.native_precision == "bf16" and weights in ("fp8", "fp8_block") and hub:
        note = (
            f"no published {weights} checkpoint of {model.name} is known here: servers quantise the bf16 weights while loading"
        )
        return Checkpoint(name=model.name, wanted=weights, online=True, note=note)
    name = f"a checkpoint of {model.name} in {weights}"
    return Checkpoint(
        name=None, wanted=weights, note=f"name {name} yourself: set MODEL, or replace {PLACEHOLDER} in the YAML files"
    )


PLACEHOLDER = "SET-MODEL-CHECKPOINT"
"""Stands in YAML files for weights that the user must name."""
