"""What a deployment is made of: number formats, parallelism, pools, and the `Estimate` that every prediction is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tandem.spec.errors import SpecError
from tandem.spec.units import BITS, require_int

Mode = Literal["colocated", "piggybacked", "disaggregated"]
Role = Literal["colocated", "prefill", "decode"]
Evidence = Literal["calibrated", "transferred", "roofline"]
BACKENDS = ("vllm", "sglang", "trtllm", "tandem")

_PRESETS = {
    "bf16": ("bf16", "bf16", "bf16"),
    "fp8": ("fp8", "fp8", "fp8"),
    "fp8_block": ("fp8_block", "fp8", "fp8"),
    "fp4": ("fp4", "fp4", "fp8"),
    "mxfp4": ("mxfp4", "bf16", "fp8"),
    "int4": ("int4", "bf16", "bf16"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of weights, matmul inputs, attention cache and recurrent state.

    Embeddings, head, norms, convolutions and routers stay in bf16, as every published FP8 and FP4 checkpoint keeps
    them; 4-bit weights cover the feed-forward layers only where a model has experts (gpt-oss, Kimi, DeepSeek NVFP4),
    every linear layer where it has none.
    """

    weights: str = "bf16"
    activations: str = "bf16"
    kv: str = "bf16"
    state: str = "fp32"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in BITS:
                raise SpecError(f"precision.{field.name}={value!r}: must be one of {', '.join(BITS)}")

    @classmethod
    def parse(cls, text: str | None, *, native: str = "bf16") -> Precision:
        """`bf16`, `fp8`, `fp8_block`, `fp4`, `mxfp4`, `int4`, or `weights/activations/kv` such as `fp8/fp8/bf16`.

        None stands for the model's native format. `fp8` and `fp4` mean the published variant where a model has one:
        fp8_block for DeepSeek-style block scales, mxfp4 for gpt-oss.
        """
        text = (text or native).lower()
        if (text, native) in (("fp8", "fp8_block"), ("fp4", "mxfp4")):
            text = native
        parts = tuple(text.split("/"))
        if len(parts) == 1 and parts[0] in _PRESETS:
            parts = _PRESETS[parts[0]]
        if len(parts) != 3:
            raise SpecError(f"precision={text!r}: use one of {', '.join(_PRESETS)}, or weights/activations/kv")
        return cls(weights=parts[0], activations=parts[1], kv=parts[2])

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}/{self.kv}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """How one instance is spread over GPUs.

    tp  tensor parallelism of attention and dense layers;  pp  pipeline stages
    dp  attention data parallelism: each of dp groups holds its own sequences, experts are shared by all
    ep  expert parallelism: experts are spread over ep groups, each expert cut into `moe_tp` slices
    cpp chunked pipeline parallelism, prefill only: stages that work on successive chunks of one prompt
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    cpp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            require_int(field.name, getattr(self, field.name), high=4096)
        if (self.tp * self.dp) % self.ep:
            raise SpecError(f"ep={self.ep}: must divide tp*dp={self.tp * self.dp}")
        if self.cpp > 1 and self.pp > 1:
            raise SpecError(f"cpp={self.cpp}: combine chunked pipeline parallelism with pp=1, not pp={self.pp}")

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tp * self.pp * self.dp * self.cpp

    @property
    def moe_tp(self) -> int:
        """Slices of each expert."""
        return self.tp * self.dp // self.ep

    def __str__(self) -> str:
        parts = [f"{f.name}{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return " ".join(parts) or "tp1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """`replicas` equal instances that play one role, each with `batch` requests in flight.

    `chunk_tokens` is the token budget of a prefill step (None: a whole prompt at once); in a co-located pool it
    means that prompt chunks ride along with decode steps (piggybacking).
    """

    parallelism: Parallelism
    batch: int
    replicas: int = 1
    role: Role = "colocated"
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        require_int("batch", self.batch)
        require_int("replicas", self.replicas)
        if self.role not in ("colocated", "prefill", "decode"):
            raise SpecError(f"role={self.role!r}: must be colocated, prefill or decode")
        if self.chunk_tokens is not None:
            require_int("chunk_tokens", self.chunk_tokens)

    @property
    def gpus(self) -> int:
        """GPUs of the pool."""
        return self.replicas * self.parallelism.gpus

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pool:
        """Rebuild a pool from its JSON object."""
        try:
            return cls(**{**data, "parallelism": Parallelism(**data["parallelism"])})
        except (KeyError, TypeError) as wrong:
            raise SpecError(f"pool: {str(wrong).replace('Pool.__init__() ', '')}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """One co-located pool, or a prefill pool with a decode pool."""

    model: str
    hardware: str
    backend: str = "vllm"
    precision: Precision = Precision()
    colocated: Pool | None = None
    prefill: Pool | None = None
    decode: Pool | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise SpecError(f"backend={self.backend!r}: must be one of {', '.join(BACKENDS)}")
        roles = {"colocated": self.colocated, "prefill": self.prefill, "decode": self.decode}
        present = [role for role, pool in roles.items() if pool is not None]
        if present not in (["colocated"], ["prefill", "decode"]):
            raise SpecError(f"pools={present}: must be either [colocated] or [prefill, decode]")
        for role, pool in roles.items():
            if pool is not None and pool.role != role:
                raise SpecError(f"{role}.role={pool.role!r}: must be {role!r}")

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Its pools, prefill before decode."""
        return tuple(p for p in (self.colocated, self.prefill, self.decode) if p is not None)

    @property
    def mode(self) -> Mode:
        """How prefill and decode share GPUs."""
        if self.colocated is None:
            return "disaggregated"
        return "colocated" if self.colocated.chunk_tokens is None else "piggybacked"

    @property
    def gpus(self) -> int:
        """GPUs of all pools."""
        return sum(p.gpus for p in self.pools)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with `mode` and `gpus` beside the fields; `from_json` reads it back."""
        data = {k: v for k, v in asdict(self).items() if v is not None}
        return {"mode": self.mode, "gpus": self.gpus, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Deployment:
        """Rebuild a deployment from `to_json` or from the `recommended` object of a plan; other keys are refused."""
        names = {f.name for f in fields(cls)}
        unknown = set(data) - names - {"mode", "gpus", "predicted"}
        if unknown:
            raise SpecError(f"{sorted(unknown)[0]}: unknown in a deployment; it has {', '.join(sorted(names))}")
        values = {k: v for k, v in data.items() if k in names}
        if "precision" in values:
            values["precision"] = Precision(**values["precision"])
        for role in ("colocated", "prefill", "decode"):
            if values.get(role) is not None:
                values[role] = Pool.from_json(values[role])
        try:
            return cls(**values)
        except TypeError as wrong:
            raise SpecError(f"deployment: {str(wrong).replace('Deployment.__init__() ', '')}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A prediction with its 80 % interval and what it rests on.

    `calibrated`: this GPU's own operator fits and this backend's measured rows; `transferred`: efficiencies borrowed
    from the nearest measured GPU or backend; `roofline`: no measurement stands behind it.
    """

    value: float
    low: float
    high: float
    evidence: Evidence

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise SpecError(f"value={self.value}: must lie between low={self.low} and high={self.high}")

    def inverse(self, numerator: float = 1.0) -> Estimate:
        """numerator / self, with the interval turned round: the interactivity of a TPOT."""
        return Estimate(
            value=numerator / self.value,
            low=numerator / self.high,
            high=numerator / self.low,
            evidence=self.evidence,
        )
