"""From the options of `tandem serve` to a listening server: tokenizer, workers, pools, application."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from fastapi import FastAPI

from tandem.engine.config import EngineConfig, with_share
from tandem.engine.host import host_precision, measure_host
from tandem.model.inputs import known_device
from tandem.model.load import load_model
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.perf.costs import Layout
from tandem.perf.phases import PerfModel
from tandem.sched.route import Role, RoutingLimits, StepTimes
from tandem.sched.times import MeasuredTimes, PredictedTimes
from tandem.serve.app import create_app
from tandem.serve.auth import ApiKeys
from tandem.serve.build import EmbeddedBuilder, EngineBuilder, Transport, resolve_dtype, sweep_states
from tandem.serve.config import ServeConfig
from tandem.serve.hosts import ThreadHost, WorkerHandle
from tandem.serve.metrics import Metrics
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.pool_metrics import PoolMetrics
from tandem.serve.pools import Pools
from tandem.serve.process_host import ProcessHost
from tandem.serve.server import open_socket, run_server
from tandem.spec.catalog import find_weights, load_spec
from tandem.spec.design import Deployment
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
log = logging.getLogger("tandem.serve")
_LOGGERS = {
    "tandem": logging.INFO,
    "uvicorn.error": logging.WARNING,
    "asyncio": logging.WARNING,
    "py.warnings": logging.WARNING,
}
"""Whose lines are shown, from which level on."""
LOCAL_TOKENS = 128
"""Longest uncached prompt that a decode worker prefills itself where there are prefill workers: half a pass. A longer one would
hold up whoever comes to decode meanwhile, whom no prediction knows yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What an operator says; see `tandem serve --help`."""

    model: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    prefill: int = 1
    decode: int = 1
    workers: str = "embedded"
    cluster: str | None = None
    api_keys: Path | None = None
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    max_batch: int | None = None
    max_context: int | None = None
    cache_bytes: int | None = None
    max_waiting: int = 1024
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        require_int("port", self.port, low=0, high=65535)
        require_int("prefill", self.prefill, low=0, high=1024)
        require_int("decode", self.decode, high=1024)
        require_int("max_waiting", self.max_waiting, high=1 << 20)
        if not 0.0 <= self.drain_s <= 86400.0:
            raise SpecError(f"drain={self.drain_s!r}: must be from 0 to 86,400 seconds")
        if not self.name or not self.name.isprintable():
            raise SpecError(f"name={self.name!r}: must be a text of one line")
        if self.threads is not None:
            require_int("threads", self.threads, high=os.cpu_count() or 1)
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise SpecError(f"device={self.device!r}: must be cpu or cuda")
        if self.cluster is None:  # whose nodes may have what this machine has not
            known_device(self.device)
        if self.workers not in ("embedded", "processes"):
            raise SpecError(f"workers={self.workers!r}: must be embedded or processes")
        if self.cluster is not None and self.workers == "processes":
            raise SpecError("workers='processes': leave it out with cluster, whose workers are Ray's actors")

    @property
    def on_gpu(self) -> bool:
        """Whether workers compute on a GPU."""
        return self.device.partition(":")[0] == "cuda"

    @property
    def worker_threads(self) -> int:
        """Threads of each worker: together no more than there are cores."""
        return self.threads or max(1, (os.cpu_count() or 1) // (self.prefill + self.decode))


def as_planned(options: ServeOptions, file: Path) -> ServeOptions:
    """Workers and batch of a deployment that `tandem plan` recommends. Raises SpecError for one that needs what is not here:
    instances of several GPUs."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as wrong:
        raise SpecError(f"plan={str(file)!r}: cannot be read ({' '.join(str(wrong).split())})") from None
    if isinstance(data, dict) and isinstance(data.get("recommended"), dict):
        data = data["recommended"]
    if not isinstance(data, dict):
        raise SpecError(f"plan={str(file)!r}: must be the recommended deployment of `tandem plan --json`")
    try:
        deployment = Deployment.from_json(data)
    except SpecError as wrong:
        raise SpecError(f"plan={str(file)!r}: {wrong}") from None
    pools = {role: pool for role in ("colocated", "prefill", "decode") if (pool := getattr(deployment, role)) is not None}
    for role, pool in pools.items():
        if pool.parallelism.gpus > 1:
            raise SpecError(
                f"plan: {role} instances span {pool.parallelism.gpus} GPUs ({pool.parallelism}); a worker here has one device. "
                "Export the plan for vLLM, SGLang or Dynamo (`tandem plan --export`)"
            )
    serving = pools.get("decode") or pools["colocated"]
    prefill = pools["prefill"].replicas if "prefill" in pools else 0
    return replace(options, prefill=prefill, decode=serving.replicas, max_batch=options.max_batch or serving.batch)


def log_to_stderr(*, as_json: bool) -> None:
    """Log lines of the server on stderr, as text or as one JSON object each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name, level in _LOGGERS.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One record as one line."""
        data = {"time_s": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            data["error"] = self.formatException(record.exc_info)
        return json.dumps(data)


class Launched:
    """Workers and application of one server, made from its options. They start and end with the application."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self._cluster: Any = None
        self.failure: Exception | None = None
        """Why the workers do not start."""
        tokenizer, metrics = load_tokenizer(options.model), Metrics()
        keys = None if options.api_keys is None else ApiKeys.from_file(options.api_keys)
        torch.set_num_threads(options.worker_threads)
        spec, hosts = self._workers(tokenizer)
        if options.max_context is not None and options.max_context > spec.max_context:
            raise SpecError(f"max_context={options.max_context}: the model's context holds {spec.max_context:,} tokens")
        self.times = step_times(spec, options)
        limits = PoolLimits(max_waiting=options.max_waiting, routing=RoutingLimits(max_local_tokens=LOCAL_TOKENS))
        self.pools = Pools(hosts, times=self.times, limits=limits, observer=PoolMetrics(metrics))
        self.app = create_app(
            self.pools,
            model_name=options.name,
            tokenizer=tokenizer,
            config=ServeConfig(keys=keys, max_in_flight=options.max_waiting),
            metrics=metrics,
            lifespan=self._lifespan,
        )

    def ready_line(self, url: str) -> dict[str, Any]:
        """What is printed once clients can connect."""
        o = self.options
        counts = {"prefill": o.prefill, "decode": o.decode, "threads": o.worker_threads}
        return {"url": url, "model": o.name, **counts, "max_context": self.pools.max_context, "pid": os.getpid()}

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            try:
                await self.pools.start()
            except TandemError as wrong:
                self.failure = wrong
                raise
            yield
        finally:
            await self.pools.close()
            if self._cluster is not None:
                self._cluster.close()

    def _workers(self, tokenizer: Tokenizer) -> tuple[ModelSpec, list[tuple[WorkerHandle, Role]]]:
        o = self.options
        last: Role = "decode" if o.prefill else "colocated"
        roles: list[Role] = ["prefill"] * o.prefill
        roles += [last] * o.decode
        names = [f"{role}-{i}" for i, role in enumerate(roles)]
        if o.cluster is None and o.workers == "embedded":
            decoder = load_model(o.model, dtype=resolve_dtype(o.dtype, o.device), device=o.device)
            build = EmbeddedBuilder(decoder=decoder, tokenizer=tokenizer, engine=self._engine())
            return decoder.spec, [(ThreadHost(name, build), role) for name, role in zip(names, roles, strict=True)]
        transport: Transport = "shared-memory"
        if o.cluster is not None:
            transport = "ray-tensors" if o.on_gpu else "ray"
        apart = EngineBuilder(model=o.model, dtype=o.dtype, device=o.device, engine=self._engine(), transport=transport)
        hosts = [self._host(name, i, apart) for i, name in enumerate(names)]
        return load_spec(find_weights(o.model)), list(zip(hosts, roles, strict=True))

    def _host(self, name: str, number: int, build: EngineBuilder) -> WorkerHandle:
        o = self.options
        if o.cluster is None:
            return ProcessHost(name, build, threads=o.worker_threads, sweep=sweep_states)
        from tandem.serve.ray_cluster import RayCluster
        from tandem.serve.ray_host import RayHost

        if self._cluster is None:
            self._cluster = RayCluster(o.cluster)
        nodes, gpu = self._cluster.nodes, o.on_gpu
        node = nodes[number % len(nodes)] if nodes else None
        return RayHost(name, build, threads=o.worker_threads, num_gpus=int(gpu), node=node, tensor_transport=gpu)

    def _engine(self) -> EngineConfig:
        o = self.options
        config = EngineConfig(max_context=o.max_context, cache_bytes=o.cache_bytes, threads=o.worker_threads)
        if o.max_batch is not None:
            config = replace(config, max_batch=o.max_batch)
        return with_share(config, torch.device(o.device), o.prefill + o.decode) if o.cluster is None else config


def step_times(spec: ModelSpec, options: ServeOptions) -> StepTimes:
    """What steps take on this machine, for routing: predicted from a quick measure of it; on a GPU from round numbers."""
    if options.on_gpu:
        return MeasuredTimes(prefill_s_per_token=1e-4, decode_s_per_step=2e-2)
    dtype = resolve_dtype(options.dtype, options.device)
    weights = torch.int8 if dtype == "int8" else getattr(torch, dtype)
    perf = PerfModel(spec, measure_host(weights), host_precision(weights), backend="tandem")
    return PredictedTimes(perf, Layout(1.0, 1.0, 1.0, 1.0, 1.0), step_tokens=EngineConfig().pass_tokens)


def run(options: ServeOptions, *, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or SIGINT, and return once all is drained."""
    open_socket(options.host, options.port).close()  # To say so before a model is loaded, if it cannot be had.
    launched = Launched(options)

    def starts(_: logging.LogRecord) -> bool:
        return launched.failure is None

    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(starts)
    try:
        run_server(
            launched.app,
            host=options.host,
            port=options.port,
            drain_s=options.drain_s,
            on_listening=lambda url: on_ready(launched.ready_line(url)),
        )
    except SystemExit:
        if launched.failure is None:
            raise
    finally:
        uvicorn_log.removeFilter(starts)
    if launched.failure is not None:
        text = " ".join(str(launched.failure).split())
        named = text.removeprefix("SpecError: ")
        raise SpecError(named if named != text else f"workers={options.workers!r}: do not start ({text})")
