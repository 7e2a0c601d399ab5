"""What a serving backend makes of the kernels: host time, what graphs hide, how prefill disturbs decode, how prompts wait.

At a fixed number of requests in flight, with g sequences in an attention group and p prompt seconds (work and half the
launches):

    TPOT = step + sequence*g + launch*T0 + gemm*Tg + quantised_gemm*Tq + attention*Ta
         + (moe + i)*Tm + (moe_compute + i)*Tc + network*Tn + other*To + prefill * (g - 1) / (OSL - 1) * p
    TTFT = host + prompt*p + burst*g*p + queue*W + pause*TPOT

T0 are a decode step's fixed kernel seconds, T. its remaining ones by class (Tm: what experts move, Tc: their arithmetic), i the
`imbalance` where ep > 1, W the wait of requests that memory does not hold. With multi-token prediction all but the prefill term
are over the tokens that a step yields. Each coefficient is its physical default times exp(sum of deviations): of the backend,
the backend on a GPU generation, with a model family, and in separate prefill and decode pools, and one factor over all terms
for the backend with a model, and with a model on a GPU in a weight format (docs/adr/0007). `tandem calibrate serving` fits the
deviations.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tandem.spec.design import BACKENDS, Evidence
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.mixers import cost_text
from tandem.spec.model import ModelSpec, MoE

TPOT_TERMS = (
    "step_s",
    "sequence_s",
    "launch",
    "gemm",
    "quantised_gemm",
    "attention",
    "moe",
    "moe_compute",
    "network",
    "other",
    "prefill",
    "imbalance",
)
TTFT_TERMS = ("host_s", "prompt", "burst", "queue", "pause")
TERMS = {"tpot": TPOT_TERMS, "ttft": TTFT_TERMS}
Metric = str


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendFit:
    """Coefficients of one backend for one model, GPU and weight format, and the 10th and 90th percentile of measured /
    predicted. The defaults are what physics expects before any serving row is seen; the fields of DOMAIN say where rows
    stood: a prediction far beyond is `transferred` (`PerfModel.evidence`)."""

    step_s: float = 2e-3
    sequence_s: float = 1e-5
    launch: float = 0.5
    gemm: float = 1.0
    quantised_gemm: float = 1.0
    attention: float = 1.0
    moe: float = 1.0
    moe_compute: float = 1.0
    network: float = 1.0
    other: float = 1.0
    prefill: float = 1.0
    imbalance: float = 0.3
    host_s: float = 0.03
    prompt: float = 1.0
    burst: float = 0.05
    queue: float = 1.0
    pause: float = 1.0
    prompt_s: float = 0.0
    """Of each PASS_TOKENS of a prompt beside their kernels, which those behind wait for too; fitted on this machine only
    (host.py)."""
    beside: float = 0.0
    """Share by which a decode step takes longer while the other pool reads a prompt on the same machine; fitted there only."""
    num_rows: int = 0
    sequences_max: float = 0.0
    isl_max: float = 0.0
    gpus_max: float = 0.0
    pp_max: float = 1.0
    drafts_max: float = 0.0
    tpot_p10: float = 0.5
    tpot_p90: float = 2.0
    ttft_p10: float = 0.5
    ttft_p90: float = 2.0

    def __post_init__(self) -> None:
        for name in (*TPOT_TERMS, *TTFT_TERMS):
            if not getattr(self, name) >= 0:
                raise SpecError(f"{name}={getattr(self, name)}: must be >= 0")


PASS_TOKENS = 256
"""Prompt tokens that Tandem's engine reads at once (tandem.engine.config)."""
PHYSICS = BackendFit()
"""The defaults of every coefficient: what a deviation of 0 means."""

KERNELS_ONLY = BackendFit(step_s=0.0, sequence_s=0.0, launch=1.0, imbalance=0.0, host_s=0.0, burst=0.0, ttft_p90=16.0)
"""No serving software at all: kernels back to back. Evidence says so; TPOT's interval is a factor of two. TTFT at a fixed
concurrency, with all that servers add, is 1.5 to 16 times as much on the calibration rows of three backends."""


def fingerprint(model: ModelSpec) -> str:
    """The same text for models whose steps cost the same, whatever their names and weight formats."""
    counted = Counter(cost_text(layer) for layer in model.layers)
    mixers = "".join(f"({text}, {number}), " for text, number in counted.items())
    mixers = mixers.removesuffix(" " if len(counted) == 1 else ", ")
    return f"{zlib.crc32(f'(({mixers}), {model.hidden_size}, {model.vocab_size})'.encode()):08x}"


def fit_family(model: ModelSpec) -> str:
    """The family whose coefficients a model takes; a hybrid without experts takes after dense models, because the measured
    linear-attention rows are all of a large mixture of experts."""
    has_experts = any(isinstance(m, MoE) for m, _ in model.mixers)
    return "dense" if model.family == "hybrid" and not has_experts else model.family


def group_keys(backend: str, hardware: HardwareSpec, model: ModelSpec, weights: str, split: bool = False) -> tuple[str, ...]:
    """The six groups that a setting belongs to, widest first; the last two have one factor, the others one for each term.

    `split`: prefill and decode in pools of their own; the group "" of the co-located never deviates.
    """
    arch = fingerprint(model)
    return (
        backend,
        f"{backend} on {hardware.generation}",
        f"{backend} with {fit_family(model)}",
        f"{backend} in pools" if split else "",
        f"{backend} with {arch}",
        f"{backend} on {hardware.name} with {arch} in {weights}{' in pools' if split else ''}",
    )


SHARED_LEVELS = 4
"""The first so many of `group_keys` deviate term by term, the rest by one factor over all of a metric's terms."""


def _spread_kind(model: ModelSpec, split: bool) -> str:
    """Whose residuals a prediction takes. Of a hybrid without experts nothing was measured: it takes those of all families."""
    if split:
        return "pools"
    family = fit_family(model)
    return family if family == model.family else "of any family"


DOMAIN = ("sequences_max", "isl_max", "gpus_max", "pp_max", "drafts_max")
"""Fields of BackendFit that say where rows stood."""


@dataclass(frozen=True, kw_only=True)
class ServingFits:
    """All fitted deviations: natural logarithms by metric, group and term; the spread of residuals by evidence and group."""

    common: Mapping[Metric, Mapping[str, float]]
    groups: Mapping[str, Mapping[str, Any]]
    spread: Mapping[str, Mapping[str, tuple[float, float]]]
    models: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> ServingFits:
        """A user's own fits from a file; SpecError that names it where it is none."""
        file = Path(path)
        if not file.is_file():
            raise SpecError(f"fits={str(path)!r}: no such file; `tandem calibrate serving --out FILE` writes one")
        try:
            return parse_fits(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise SpecError(f"fits={str(path)!r}: not a text file") from None
        except SpecError as wrong:
            raise SpecError(f"fits={str(path)!r}: {wrong}") from None

    def find(
        self,
        backend: str,
        hardware: HardwareSpec,
        model: ModelSpec,
        weights: str,
        split: bool = False,
        label: Evidence | None = None,
    ) -> tuple[BackendFit, Evidence]:
        """Coefficients for a setting. `calibrated` where rows of this model on this GPU in this format, in pools or not, were
        fitted; `transferred` where only wider groups know it; `roofline` and KERNELS_ONLY for a backend nobody measured.
        The percentiles are those of `label`, for a prediction that rests on less than its setting; without it, of the setting:
        where the model and the GPU generation were measured, only not together, those of rows whose setting was left out.
        """
        keys = group_keys(backend, hardware, model, weights, split)
        if keys[0] not in self.groups:
            return KERNELS_ONLY, "roofline"
        own = self.groups.get(keys[-1])
        evidence: Evidence = "calibrated" if own else "transferred"
        values: dict[str, Any] = {}
        for metric, terms in TERMS.items():
            for term in terms:
                log = self.common[metric].get(term, 0.0)
                for level, key in enumerate(keys):
                    deviation = self.groups.get(key, {}).get(metric, 0.0)
                    log += deviation.get(term, 0.0) if level < SHARED_LEVELS and deviation else deviation or 0.0
                values[term] = getattr(PHYSICS, term) * math.exp(log)
            near = own is None and label is None and keys[1] in self.groups and keys[-2] in self.groups
            group = f"{'near' if near else label or evidence} {backend}"
            if group not in self.spread[metric]:
                group = f"{evidence} {backend}"
            finer = self.spread[metric].get(f"{group} {_spread_kind(model, split)}", self.spread[metric][group])
            values |= dict(zip((f"{metric}_p10", f"{metric}_p90"), finer, strict=True))
        widest = own or self.groups[keys[0]]
        values |= {k: float(widest[k]) for k in DOMAIN} | {"num_rows": int(widest["num_rows"])}
        return BackendFit(**values), evidence


def parse_fits(text: str) -> ServingFits:
    """Fits from the YAML that `tandem calibrate serving --out` writes; SpecError where it is not that.

    Everything that `ServingFits.find` reads is checked here, once, so that looking a setting up cannot fail.
    """
    try:
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        top = _entries("", data)
        common = {m: _deviations(f"common.{m}", _entry(top, "common", m), m) for m in TERMS}
        groups = _entries("groups", top.get("groups"))
        backends = {_check_group(name, group) for name, group in groups.items()}
        if alone := sorted(backends - set(groups)):
            raise SpecError(f"groups: has no {alone[0]!r}, which others deviate from")
        spread = {m: _intervals(m, _entry(top, "spread", m), backends) for m in TERMS}
        kept = {k: _entries(k, top[k]) for k in ("models", "provenance") if top.get(k)}
        return ServingFits(common=common, groups=groups, spread=spread, **kept)
    except (yaml.YAMLError, SpecError, ValueError, RecursionError) as wrong:
        why = " ".join(str(wrong).split())
        raise SpecError(f"serving fits: not what `tandem calibrate serving --out` writes ({why})") from None


MAX_LOG = 10.0
"""Largest deviation that a file may hold: a factor of 22 thousand is no serving backend, it is a slip."""
_SETTING = re.compile(r"(\S+) on .+ with [0-9a-f]{8} in \S+(?: in pools)?")
_ARITHMETIC = re.compile(r"(\S+) with [0-9a-f]{8}")
_SHARED = re.compile(r"(\S+)(?: on .+| with \S+| in pools)?")


def _entries(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{where or 'file'}={str(value)[:40]!r}: must be a mapping of names, and hold some")
    return value


def _entry(top: Mapping[str, Any], section: str, metric: Metric) -> object:
    return _entries(section, top.get(section)).get(metric)


def _require(where: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise SpecError(f"{where}={str(value)[:40]!r}: must be a number from {low:g} to {high:g}")
    return float(value)


def _deviations(where: str, value: object, metric: Metric) -> dict[str, float]:
    terms = _entries(where, value)
    if unknown := [name for name in terms if name not in TERMS[metric]]:
        raise SpecError(f"{where}.{unknown[0]}: no term of {metric}; they are {', '.join(TERMS[metric])}")
    return {name: _require(f"{where}.{name}", log, -MAX_LOG, MAX_LOG) for name, log in terms.items()}


def _check_group(name: str, group: object) -> str:
    """Checks one group as its level (`group_keys`) is read, and names its backend."""
    where, setting = f"groups.{name}", _SETTING.fullmatch(name)
    found = setting or _ARITHMETIC.fullmatch(name) or _SHARED.fullmatch(name)
    if found is None or found[1] not in BACKENDS:
        raise SpecError(f"{where}: no name of a group; it starts with one of {', '.join(BACKENDS)}")
    entry = _entries(where, group)
    for metric in TERMS:
        if found.re is _SHARED:
            _deviations(f"{where}.{metric}", entry.get(metric), metric)
        else:
            _require(f"{where}.{metric}", entry.get(metric), -MAX_LOG, MAX_LOG)
    for key in (*DOMAIN, "num_rows") if setting or name in BACKENDS else ():
        _require(f"{where}.{key}", entry.get(key), 0.0, 1e12)
    return found[1]


def _intervals(metric: Metric, value: object, backends: Iterable[str]) -> dict[str, tuple[float, float]]:
    """10th and 90th percentiles by `evidence backend [family]`."""
    found: dict[str, tuple[float, float]] = {}
    for name, pair in _entries(f"spread.{metric}", value).items():
        where = f"spread.{metric}.{name}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise SpecError(f"{where}={str(pair)[:40]!r}: must be two numbers, [low, high]")
        low, high = (_require(where, end, 1e-6, 1e6) for end in pair)
        if low > high:
            raise SpecError(f"{where}={pair}: the first must not be above the second")
        found[name] = low, high
    for name in (f"{evidence} {backend}" for evidence in ("calibrated", "transferred") for backend in sorted(backends)):
        if name not in found:
            raise SpecError(f"spread.{metric}: has no {name!r}")
    return found


@cache
def load_serving_fits() -> ServingFits:
    """The fits that ship with Tandem."""
    source = resources.files("tandem.perf") / "data" / "serving_fits.yaml"
    return parse_fits(source.read_text(encoding="utf-8"))
