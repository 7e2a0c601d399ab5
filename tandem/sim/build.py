"""Kinds of workers out of the performance model: every step time that a simulation needs, tabulated once.

What the tables leave out, measured in tests/sim/test_worker_kinds.py: a decode step is the chord between two contexts; a
chunk's attention is counted by pairs, whose price is that of 2,048 tokens in the middle of a prompt; what a chunk adds to a
decode step is what it adds beside half of the largest batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import ServingFits
from tandem.perf.costs import Layout, StepLoad
from tandem.perf.estimate import check_fits, perf_model
from tandem.perf.memory import DEFAULT_STEP_TOKENS, LARGEST_STEP_TOKENS
from tandem.perf.phases import PerfModel
from tandem.sched.batch import BatchLimits
from tandem.sched.route import LOCAL_TOKENS, RoutingLimits
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.times import StepTable
from tandem.spec.design import Deployment, Pool
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import MLA, Attention, GatedDeltaNet, Mamba2, ModelSpec
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Trace, Workload

BLOCK_TOKENS = 16
"""Tokens of a cache block (vLLM's default, and our own engine's)."""
PASS_TOKENS = 256
"""Grid on which our own engine cuts prompts; the other backends cut anywhere."""
LOAD_BYTES_PER_S = 2e9
"""Assumption: weights reach a GPU at this rate from local disk or page cache."""
PROCESS_S = 30.0
"""Assumption: seconds of a start-up beside its weights: container, process, graph capture and warm-up."""
MOST_SEQUENCES = 2048
"""A prefill pool, for which no batch of decoding sequences is planned, holds at most this many sequences."""
PER_OCTAVE = 4
"""Nodes of the chunk tables for each doubling."""


def kind_of(
    perf: PerfModel,
    pool: Pool,
    *,
    name: str = "",
    context: float = 4096.0,
    max_batch: int | None = None,
    step_tokens: int | None = None,
    blocks: int | None = None,
    start_up_s: float | None = None,
    flip_s: float = 2.0,
) -> WorkerKind:
    """The kind of worker that one instance of `pool` is, as `perf` predicts it.

    `context` is the length of a sequence around which chords are laid: the mean of the traffic in mid-output. `max_batch`
    defaults to the pool's batch, as planned, and in a prefill pool to what memory holds of that length; `step_tokens`, of the
    whole instance, to the pool's chunks, or whole prompts up to 16,384 tokens in each group that prefills (2,048 beside those
    that decode in a decode pool); `blocks` to what memory leaves; `start_up_s` to the time of loading the weights and 30 s.
    Raises SpecError where the pool's parallelism does not divide the model, or its batch does not fit.
    """
    check_fits(perf, pool.parallelism)
    require_number("context", context)
    layout = Layout.of(pool.parallelism)
    groups = pool.parallelism.dp * pool.parallelism.pp
    own_tokens = _group_tokens(pool)
    memory = _Memory.of(perf, layout, pool, context)
    if max_batch is None:
        max_batch = pool.batch if pool.role != "prefill" else max(pool.batch, min(memory.sequences(context), MOST_SEQUENCES))
    require_int("max_batch", max_batch, high=2**17)
    if step_tokens is None:
        step_tokens = own_tokens * groups + (max_batch if pool.role != "prefill" and pool.chunk_tokens is None else 0)
    limits = BatchLimits(
        max_batch=max_batch,
        step_tokens=step_tokens,
        pass_tokens=PASS_TOKENS if perf.backend == "tandem" else 1,
        block_size=BLOCK_TOKENS,
    )
    if blocks is None:
        blocks = memory.blocks(max_batch, perf, pool)
    if start_up_s is None:
        start_up_s = float(perf.memory.weight_bytes(layout)) / LOAD_BYTES_PER_S + PROCESS_S
    return WorkerKind(
        name=name or f"{perf.hardware.name} {pool.parallelism}",
        times=step_table(perf, layout, context=context, max_batch=max_batch, chunk_tokens=own_tokens),
        limits=limits,
        blocks=blocks,
        gpus=pool.parallelism.gpus,
        price_per_hour_usd=perf.hardware.price_per_hour_usd * pool.parallelism.gpus,
        start_up_s=start_up_s,
        flip_s=flip_s,
    )


def config_of(
    deployment: Deployment,
    *,
    trace: Trace | None = None,
    perf: PerfModel | None = None,
    context: float | None = None,
    window_s: float = 30.0,
    start_up_s: float | None = None,
    flip_s: float = 2.0,
    routing: RoutingLimits | None = None,
) -> SimConfig:
    """The simulation of a deployment as it was planned. Chords are laid around `context`, by default the mean of the trace's
    sequences in mid-output, else 4,096 tokens. `perf` replaces the model that the deployment's names stand for."""
    if perf is None:
        perf = perf_of(deployment)
    if context is None:
        context = trace.workload().decode_context if trace is not None else 4096.0
    groups = tuple(
        Group(
            kind=kind_of(perf, pool, name=pool.role, context=context, start_up_s=start_up_s, flip_s=flip_s),
            role=pool.role,
            count=pool.replicas,
        )
        for pool in deployment.pools
    )
    if routing is None:
        routing = RoutingLimits(step_tokens=groups[-1].kind.limits.step_tokens, max_local_tokens=LOCAL_TOKENS)
    return SimConfig(groups=groups, routing=routing, window_s=window_s)


def perf_of(
    deployment: Deployment,
    *,
    model: ModelSpec | None = None,
    hardware: HardwareSpec | None = None,
    fits: ServingFits | None = None,
) -> PerfModel:
    """The performance model of a deployment; `model` and `hardware` stand for its names, `fits` for the shipped ones."""
    names = model or deployment.model, hardware or deployment.hardware
    perf = perf_model(*names, deployment.precision, deployment.backend, fits)
    return replace(perf, split=True) if deployment.mode == "disaggregated" else perf


def step_table(perf: PerfModel, layout: Layout, *, context: float, max_batch: int, chunk_tokens: int) -> StepTable:
    """Step times of one instance up to `max_batch` sequences, with chunks of up to `chunk_tokens` tokens in each group that
    prefills."""
    low, high = _chord(context)
    batches = np.arange(1.0, max(max_batch, 1) + 1.0)
    low_s, high_s = decode_step_s(perf, layout, batches, low), decode_step_s(perf, layout, batches, high)
    per_token_s = np.maximum(high_s - low_s, 0.0) / (batches * (high - low))
    base_s = low_s - per_token_s * batches * low
    per_pair_s = _pair_s(perf, layout, context, chunk_tokens)
    nodes = _nodes(chunk_tokens)
    own_pairs_s = per_pair_s * nodes * (nodes + 1.0) / 2.0
    chunk_s = _prompt_s(perf, layout, nodes, np.zeros_like(nodes)) - own_pairs_s
    spread_s = _spread_s(perf, layout, chunk_tokens)
    mixed_s = _beside_s(perf, layout, nodes, max(1.0, max_batch / 2.0), context) - own_pairs_s
    mixed_s = mixed_s - (layout.dp - 1.0) * spread_s * nodes  # `_beside_s` has a chunk in each attention group
    floor_s = chunk_s[0]
    last = 1.0 / max(1, sum(count for mixer, count in perf.model.mixers if _keeps_state(mixer)))
    state_low, state_high = (float(perf.memory.sequence_bytes(layout, c)) for c in (low, high))
    per_token_bytes = (state_high - state_low) / (high - low)
    fill_s = 0.0
    if layout.cpp > 1:
        # The pipeline of chunks: a prompt leaves only when its last chunk has gone through the other stages as well.
        whole = np.array([min(float(chunk_tokens), context)])
        fill_s = float((layout.cpp - 1.0) * _prompt_s(perf, layout, whole, np.zeros(1))[0])
    return StepTable(
        base_s=[0.0, *np.maximum(base_s, 0.0).tolist()],
        per_token_s=[0.0, *per_token_s.tolist()],
        chunk_tokens=nodes.tolist(),
        chunk_s=np.maximum(chunk_s, floor_s).tolist(),
        mixed_s=np.maximum(mixed_s, 0.0).tolist(),
        per_pair_s=per_pair_s,
        groups=int(layout.dp * layout.pp),
        spread_s=float(spread_s / layout.pp),
        state_bytes=max(state_low - per_token_bytes * low, 0.0),
        state_bytes_per_token=per_token_bytes,
        link_bytes_per_s=perf.hardware.scale_out_bytes_per_s,
        first_token_s=perf.backend_fit.host_s + fill_s,
        last_layer=last,
    )


def decode_step_s(perf: PerfModel, layout: Layout, batch: NDArray[np.float64], context: float) -> NDArray[np.float64]:
    """Seconds between two tokens of every sequence, for batches of `context` tokens a sequence, straight from the model."""
    length = max(context - 0.5, 1.0)  # an output of one token: the context in mid-output is that of the step
    lengths = Workload(name="step", isl=(length,), osl=(1.0,), weight=(1.0,))
    return np.asarray(perf.decode_tpot_s(layout, batch, lengths) + np.zeros_like(batch))


def _chord(context: float) -> tuple[float, float]:
    return max(context / 2.0, 2.0), max(context * 1.5, 4.0)


def _nodes(chunk_tokens: int) -> NDArray[np.float64]:
    octaves = int(np.ceil(np.log2(max(chunk_tokens, 2))))
    powers = np.round(2.0 ** (np.arange(PER_OCTAVE * octaves + 1) / PER_OCTAVE))
    return np.unique(np.concatenate((powers[powers < chunk_tokens], [1.0, float(max(chunk_tokens, 2))])))


def _keeps_state(mixer: object) -> bool:
    return isinstance(mixer, (Attention, MLA, Mamba2, GatedDeltaNet))


def _load(tokens: NDArray[np.float64], prior: NDArray[np.float64]) -> StepLoad:
    """One chunk of `tokens` tokens after `prior` others in each group."""
    isl = 2.0 * prior + tokens  # a prompt whose mean chunk has just this much before it
    return StepLoad(prefill_seqs=np.ones_like(tokens), isl=isl, chunks=isl / tokens)


def _prompt_s(
    perf: PerfModel,
    layout: Layout,
    tokens: NDArray[np.float64],
    prior: NDArray[np.float64],
    busy_groups: float | None = None,
) -> NDArray[np.float64]:
    """A step that prefills one chunk, with its host time, in a share `busy_groups` of the attention groups (default: in one);
    the stages of a chunk pipeline share it."""
    load, share = _load(tokens, prior), float(1.0 / layout.dp) if busy_groups is None else busy_groups
    kernels_s = perf.prefill_kernels_s(layout, 1.0, load.isl, load.chunks, busy_groups=share) / load.chunks
    fit = perf.backend_fit
    return np.asarray((perf.prompt_cost * kernels_s + fit.step_s + fit.sequence_s) / layout.cpp)


def _spread_s(perf: PerfModel, layout: Layout, chunk_tokens: int) -> float:
    """What a prompt token in one attention group adds to a step that is full in another: the experts serve all of them."""
    if layout.dp <= 1:
        return 0.0
    tokens, none = np.array([float(chunk_tokens)]), np.zeros(1)
    one, all_s = (float(_prompt_s(perf, layout, tokens, none, share)[0]) for share in (None, 1.0))
    return max(all_s - one, 0.0) / ((float(layout.dp) - 1.0) * chunk_tokens)


def _beside_s(
    perf: PerfModel, layout: Layout, tokens: NDArray[np.float64], batch: float, context: float
) -> NDArray[np.float64]:
    """What a chunk in each group adds to a decode step of the instance's `batch` sequences."""
    decode = perf.decode_load(layout, np.full_like(tokens, batch), Workload.fixed(max(1, round(context)), 1))
    chunk = _load(tokens, np.zeros_like(tokens))
    mixed = decode._replace(prefill_seqs=chunk.prefill_seqs, isl=chunk.isl, chunks=chunk.chunks)
    alone, together = (perf.pricer.kernels(layout, load) for load in (decode, mixed))
    shown = (together.launch_s - alone.launch_s) * 0.5 + together.work_s - alone.work_s
    return np.asarray((perf.prompt_cost * np.maximum(shown, 0.0) + perf.backend_fit.sequence_s) / layout.cpp)


def _pair_s(perf: PerfModel, layout: Layout, context: float, chunk_tokens: int) -> float:
    """Seconds of one pair of a prompt token and one before it, from a chunk at the start and one after `context` tokens."""
    tokens = np.array([float(min(chunk_tokens, DEFAULT_STEP_TOKENS))])
    first, later = (_prompt_s(perf, layout, tokens, np.array([prior])) for prior in (0.0, context))
    return float(max(later[0] - first[0], 0.0) / (tokens[0] * context))


def _group_tokens(pool: Pool) -> int:
    if pool.chunk_tokens is not None:
        return pool.chunk_tokens
    return DEFAULT_STEP_TOKENS if pool.role == "decode" else LARGEST_STEP_TOKENS


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """Bytes on the fullest GPU of an instance that weights and workspace leave, and what a sequence takes of them."""

    spare: float
    state: float
    per_token: float
    groups: int

    @classmethod
    def of(cls, perf: PerfModel, layout: Layout, pool: Pool, context: float) -> _Memory:
        """Workspace is what the plan kept free (tandem.plan.search): of a co-located pool without chunks 2,048 tokens."""
        groups = pool.parallelism.dp * pool.parallelism.pp
        tokens = {
            "prefill": float(_group_tokens(pool)),
            "decode": float(-(-pool.batch // groups)),
            "colocated": float(min(_group_tokens(pool), DEFAULT_STEP_TOKENS)),
        }[pool.role]
        low, high = _chord(context)
        use = perf.memory.use(layout, low, tokens)
        per_token = (float(perf.memory.sequence_bytes(layout, high)) - float(use.sequence_bytes)) / (high - low)
        return cls(
            spare=use.usable_bytes - float(use.weight_bytes) - float(use.workspace_bytes),
            state=max(float(use.sequence_bytes) - per_token * low, 0.0),
            per_token=per_token,
            groups=pool.parallelism.dp,
        )

    def sequences(self, context: float) -> int:
        """Sequences of `context` tokens that the instance holds."""
        return max(0, int(self.spare / max(self.state + self.per_token * context, 1.0))) * self.groups

    def blocks(self, max_batch: int, perf: PerfModel, pool: Pool) -> int:
        """Blocks of the instance beside the states of `max_batch` sequences."""
        left = self.spare - self.state * -(-max_batch // self.groups)
        found = int(left / max(self.per_token * BLOCK_TOKENS, 1e-3)) * self.groups
        if left <= 0 or found < 1:
            raise SpecError(
                f"max_batch={max_batch}: {perf.model.name} on {perf.hardware.name} ({pool.parallelism}) has {self.spare:,.0f} "
                "B a GPU beside its weights, too few for the states of so many sequences and one block; use more GPUs or fewer"
            )
        return min(found, 10**9)
