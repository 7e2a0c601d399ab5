"""What an operator says of a server, checked: the options of `tandem serve`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from tandem.model.inputs import known_device
from tandem.spec.design import Deployment, Parallelism, Pool
from tandem.spec.errors import SpecError
from tandem.spec.files import require_folder
from tandem.spec.local import usable_cores
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Slo

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
EMULATED_BATCH = 256
"""Requests that an emulated worker holds at once, where nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulation:
    """Workers that take the time that `deployment` is predicted to take, and compute nothing. Pools and counts are its own."""

    deployment: Deployment
    context: float = 4096.0
    """Length of a sequence around which step times are tabulated."""
    start_up_s: float | None = None
    """Of workers that are started later; None: as predicted."""
    stride_s: float = 0.0
    """Steps that only decode are told of together, up to so many seconds."""

    def __post_init__(self) -> None:
        require_number("context", self.context)
        if self.start_up_s is not None and not 0.0 <= self.start_up_s <= 86_400.0:
            raise SpecError(f"start_up_s={self.start_up_s!r}: must be from 0 to 86,400 seconds")
        if not 0.0 <= self.stride_s <= 10.0:
            raise SpecError(f"stride_s={self.stride_s!r}: must be from 0 to 10 seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How a controller scales the workers."""

    slo: Slo
    """What it scales for: a bound of TTFT, of TPOT, or both."""
    mode: Literal["fixed", "elastic"] = "elastic"
    """`fixed`: workers change roles only; `elastic`: they come and go too."""
    max_workers: int | None = None
    """None: as many as at first."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    window_s: float = 15.0
    log: Path | None = None
    """Gets what the policy is told, a line of JSON for each window; replayed, it decides the same."""

    def __post_init__(self) -> None:
        if self.mode not in ("fixed", "elastic"):
            raise SpecError(f"scale={self.mode!r}: must be fixed or elastic")
        if self.slo.ttft_s is None and self.slo.tpot_s is None:
            raise SpecError(f"scale={self.mode!r}: needs an objective to scale for; give --ttft, --tpot or both")
        if self.max_workers is not None:
            require_int("max_workers", self.max_workers, high=2048)
            if self.mode == "fixed":
                raise SpecError(f"max_workers={self.max_workers}: changes nothing with scale='fixed'; leave it out")
        require_number("window_s", self.window_s, high=86_400.0)
        require_folder("scale_log", self.log)


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
    emulation: Emulation | None = None
    """None: workers compute."""
    scaling: Scaling | None = None
    """None: workers stay as they are."""

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
            require_int("threads", self.threads, high=usable_cores())
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
        if self.emulation is not None and (self.cluster is not None or self.workers != "embedded"):
            raise SpecError("emulate: emulated workers live in this process; leave workers and cluster out")
        computing = (self.dtype, self.device, self.threads, self.cache_bytes)
        if self.emulation is not None and computing != ("auto", "cpu", None, None):
            raise SpecError("emulate: nothing is computed; leave dtype, device, threads and cache_bytes out")
        most = None if self.scaling is None else self.scaling.max_workers
        if most is not None and most < self.prefill + self.decode:
            raise SpecError(f"max_workers={most}: is less than the {self.prefill + self.decode} workers at the start")

    @property
    def on_gpu(self) -> bool:
        """Whether workers compute on a GPU."""
        return self.device.partition(":")[0] == "cuda"

    @property
    def most_workers(self) -> int:
        """Workers that there may be at once."""
        most = None if self.scaling is None else self.scaling.max_workers
        return most or self.prefill + self.decode

    @property
    def worker_threads(self) -> int:
        """Threads of each worker: together no more than there are cores."""
        return self.threads or max(1, usable_cores() // self.most_workers)


def as_planned(options: ServeOptions, file: Path) -> ServeOptions:
    """Workers and batch of a deployment that `tandem plan` recommends. Raises SpecError for one that needs what is not here:
    instances of several GPUs."""
    deployment = read_plan(file)
    for pool in deployment.pools:
        if pool.parallelism.gpus > 1:
            raise SpecError(
                f"plan: {pool.role} instances span {pool.parallelism.gpus} GPUs ({pool.parallelism}); a worker here has one "
                "device. Export the plan for vLLM, SGLang or Dynamo (`tandem plan --export`)"
            )
    serving = deployment.decode or deployment.colocated
    assert serving is not None
    prefill = 0 if deployment.prefill is None else deployment.prefill.replicas
    return replace(options, prefill=prefill, decode=serving.replicas, max_batch=options.max_batch or serving.batch)


def read_plan(file: Path) -> Deployment:
    """The deployment of a plan's file. Raises SpecError."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as wrong:
        raise SpecError(f"plan={str(file)!r}: cannot be read ({' '.join(str(wrong).split())})") from None
    if isinstance(data, dict) and isinstance(data.get("recommended"), dict):
        data = data["recommended"]
    if not isinstance(data, dict):
        raise SpecError(f"plan={str(file)!r}: must be the recommended deployment of `tandem plan --json`")
    try:
        return Deployment.from_json(data)
    except SpecError as wrong:
        raise SpecError(f"plan={str(file)!r}: {wrong}") from None


def deployment_of(
    model: str,
    hardware: str,
    *,
    prefill: int,
    decode: int,
    max_batch: int | None = None,
    tp: int = 1,
    plan: Path | None = None,
) -> Deployment:
    """What emulated workers are: `plan`'s pools on that hardware, or workers of `tp` GPUs each, of which `prefill` prefill and
    `decode` decode (or do both, where none prefills). Raises SpecError."""
    if plan is not None:
        return replace(read_plan(plan), model=model, hardware=hardware)
    spread, batch = Parallelism(tp=tp), EMULATED_BATCH if max_batch is None else max_batch
    if not prefill:
        pool = Pool(parallelism=spread, batch=batch, replicas=decode, chunk_tokens=2048)
        return Deployment(model=model, hardware=hardware, colocated=pool)
    return Deployment(
        model=model,
        hardware=hardware,
        prefill=Pool(parallelism=spread, batch=1, replicas=prefill, role="prefill"),
        decode=Pool(parallelism=spread, batch=batch, replicas=decode, role="decode"),
    )
