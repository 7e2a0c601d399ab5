"""Where a server's workers come from: engines that compute, in this process or outside it, or emulated ones.

A workplace makes workers that are not up yet; each call of `worker` gives one with a name of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch

from tandem.engine.config import EngineConfig, with_share
from tandem.engine.host import host_precision, measure_host
from tandem.model.load import load_model
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.perf.costs import Layout
from tandem.perf.host import known_host
from tandem.perf.phases import PerfModel
from tandem.sched.route import Role, StepTimes
from tandem.sched.scale_rates import PoolRates, TableRates
from tandem.sched.times import MeasuredTimes, PredictedTimes
from tandem.serve.build import EmbeddedBuilder, EngineBuilder, Transport, resolve_dtype, sweep_states
from tandem.serve.hosts import ThreadHost, WorkerHandle
from tandem.serve.messages import Capacity
from tandem.serve.options import ServeOptions
from tandem.serve.process_host import ProcessHost
from tandem.spec.catalog import find_weights, load_spec
from tandem.spec.local import host_name, usable_cores
from tandem.spec.model import ModelSpec
from tandem.spec.workload import Slo

BLOCK_TOKENS = 16
"""Tokens of a cache block of our own engine."""


class Workplace(Protocol):
    """Makes the workers of one server."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model that is served."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """Of the model that is served."""
        ...

    @property
    def times(self) -> StepTimes:
        """What steps take, for routing."""
        ...

    def worker(self, role: Role, *, late: bool = False) -> WorkerHandle:
        """One more worker; `late` where it comes while others serve."""
        ...

    def rates(self, slo: Slo, capacity: Capacity) -> PoolRates:
        """What workers achieve within an objective, for scaling; `capacity` is that of one that is up."""
        ...

    def start_up_s(self, took_s: float) -> float:
        """Seconds that a late worker takes to come up; those of the start took `took_s`."""
        ...

    def close(self) -> None:
        """The workers have ended."""
        ...


class Computing:
    """Workers that compute: threads of this process, processes, or actors of a Ray cluster."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = o = options
        self._cluster: Any = None
        self._count = 0
        self.tokenizer = load_tokenizer(o.model)
        torch.set_num_threads(o.worker_threads)
        if o.cluster is None and o.workers == "embedded":
            decoder = load_model(o.model, dtype=resolve_dtype(o.dtype, o.device), device=o.device)
            self._embedded = EmbeddedBuilder(decoder=decoder, tokenizer=self.tokenizer, engine=self._engine())
            self.spec = decoder.spec
        else:
            transport: Transport = "shared-memory"
            if o.cluster is not None:
                transport = "ray-tensors" if o.on_gpu else "ray"
            self._apart = EngineBuilder(
                model=o.model, dtype=o.dtype, device=o.device, engine=self._engine(), transport=transport
            )
            self.spec = load_spec(find_weights(o.model))
        self.times = step_times(self.spec, o)

    def worker(self, role: Role, *, late: bool = False) -> WorkerHandle:
        """One more worker."""
        o, number = self._options, self._count
        self._count += 1
        name = f"{role}-{number}"
        if o.cluster is None and o.workers == "embedded":
            return ThreadHost(name, self._embedded)
        if o.cluster is None:
            return ProcessHost(name, self._apart, threads=o.worker_threads, sweep=sweep_states)
        from tandem.serve.ray_cluster import RayCluster
        from tandem.serve.ray_host import RayHost

        if self._cluster is None:
            self._cluster = RayCluster(o.cluster)
        nodes, gpu = self._cluster.nodes, o.on_gpu
        node = nodes[number % len(nodes)] if nodes else None
        return RayHost(name, self._apart, threads=o.worker_threads, num_gpus=int(gpu), node=node, tensor_transport=gpu)

    def rates(self, slo: Slo, capacity: Capacity) -> PoolRates:
        """From the step times that the router goes by."""
        return TableRates(
            times=self.times,
            blocks=max(1, capacity.tokens // BLOCK_TOKENS),
            block_size=BLOCK_TOKENS,
            max_batch=capacity.max_batch,
            ttft_s=slo.ttft_s,
            tpot_s=slo.tpot_s,
        )

    def start_up_s(self, took_s: float) -> float:
        """As long as the others took."""
        return max(took_s, 1.0)

    def close(self) -> None:
        """Leave the cluster, if there is one."""
        if self._cluster is not None:
            self._cluster.close()

    def _engine(self) -> EngineConfig:
        o = self._options
        config = EngineConfig(max_context=o.max_context, cache_bytes=o.cache_bytes, threads=o.worker_threads)
        if o.max_batch is not None:
            config = replace(config, max_batch=o.max_batch)
        return with_share(config, torch.device(o.device), o.most_workers) if o.cluster is None else config


def step_times(spec: ModelSpec, options: ServeOptions) -> StepTimes:
    """What steps take on this machine, for routing: as `tandem calibrate host` found with so many threads a worker, else
    predicted from a quick measure of it; on a GPU from round numbers."""
    if options.on_gpu:
        return MeasuredTimes(prefill_s_per_token=1e-4, decode_s_per_step=2e-2)
    dtype = resolve_dtype(options.dtype, options.device)
    weights = torch.int8 if dtype == "int8" else getattr(torch, dtype)
    known = known_host(host_name(options.worker_threads, usable_cores()))
    hardware = measure_host(weights) if known is None else known.hardware
    perf = PerfModel(spec, hardware, host_precision(weights), backend="tandem")
    return PredictedTimes(perf, Layout(1.0, 1.0, 1.0, 1.0, 1.0), step_tokens=EngineConfig().pass_tokens)
