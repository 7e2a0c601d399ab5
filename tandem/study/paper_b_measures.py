"""The numbers of paper B's figures from our sweeps, for one backend: gains, shares, spans, transfer needs, elasticity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from tandem.perf.costs import Layout
from tandem.perf.ops import NETWORK
from tandem.spec.design import Parallelism
from tandem.study.paper_b_elastic import Dynamic, Elastic, Fixed, dynamic_of, elastic_of, fixed_of
from tandem.study.paper_b_space import (
    BALANCED_LONG,
    BALANCED_SHORT,
    CPP_CHUNKS,
    DECODE_HEAVY,
    DYNAMIC,
    EXTREME_DECODE,
    LOGNORMAL_SIGMAS,
    MILLION,
    MODELS,
    PREFILL_HEAVY,
    R1_MIXES,
    SHORT_OUTPUT,
    CppPoint,
    PaperBSpace,
    lognormal,
    trace_shaped,
)
from tandem.study.sweep import Curve, Swept, area_gain, largest_gain

PRINTED_RATIO: Final = {"R1": (3.64, 0.056), "405B": (2.07, 0.20), "70B": (0.94, 0.45), "8B": (0.33, 0.43)}
"""Figure 9, low to high interactivity, measured in pixels by the facts' reviewers."""
MILLION_CUTOFF_S = 300.0
"""No 1M-token prompt is done within 10 s on 64 GPUs; the paper also speaks of TTFT of several minutes: five here."""


class Gain(NamedTuple):
    """What splitting buys: area ratio, the largest ratio of heights and where, and the loads behind it.

    `ratio` is prefill over decode GPUs at the relaxed end, so `ratio / (1 + ratio)` of the GPUs do prefill.
    """

    area: float
    largest: float
    largest_at: float
    ratio: float
    prefill_requests_per_s_per_gpu: float
    decode_tokens_per_s_per_gpu: float


class Span(NamedTuple):
    """Context-to-generation GPU ratios of a model: at its own ends, and at those of the range that all models reach."""

    relaxed: float
    tight: float
    tight_gpus: int
    top: float
    common_relaxed: float
    common_tight: float
    relaxed_tokens_per_s_per_gpu: float

    @property
    def own(self) -> float:
        """Span from end to end of its own frontier."""
        return self.relaxed / self.tight

    @property
    def common(self) -> float:
        """Span over the common range."""
        return self.common_relaxed / self.common_tight


class Piggyback(NamedTuple):
    """Area under the piggybacked frontier over that under plain in-flight batching: best chunk, then each chunk size."""

    best: float
    by_chunk: dict[int, float]


class Mapping(NamedTuple):
    """The decode instance of a split frontier and the shared one at an interactivity (tok/s/user)."""

    at: float
    gain: float
    split: Parallelism
    split_batch: int
    shared: Parallelism
    shared_batch: int


class TensorUse(NamedTuple):
    """Geometric mean of TP over the middle third of the interactivities that both frontiers reach, and mean gains."""

    split_tp: float
    shared_tp: float
    relaxed_gain: float
    middle_gain: float


class Domain(NamedTuple):
    """A 72-GPU domain against one of 8: (interactivity, ratio of split throughputs), the area ratio, and the area of
    B200's own 8-GPU domain over GB200's 72."""

    ratios: list[tuple[float, float]]
    area: float
    b200_area: float


class Need(NamedTuple):
    """Bandwidth need in bytes/s a GPU over a split frontier: lowest and highest of max(egress, ingress)."""

    low: float
    high: float
    egress: float
    ingress_relaxed: float
    ingress_tight: float


@dataclass(frozen=True)
class Measures:
    """Everything that claims are judged by, for one backend."""

    space: PaperBSpace
    gains: dict[tuple[str, tuple[int, int]], Gain]
    cache_gains: dict[str, tuple[float, float]]
    """Format of R1's cache -> area gains at 16k/16k and at 2k/2k."""
    piggyback: dict[tuple[str, bool], Piggyback]
    heights: dict[tuple[int, int], dict[str, float]]
    cpp: dict[int, list[CppPoint]]
    whole_prompt: CppPoint
    common: tuple[float, float]
    spans: dict[str, Span]
    fixed: dict[float, Fixed]
    domain: dict[str, Domain]
    mapping: dict[str, list[Mapping]]
    tensor: dict[str, TensorUse]
    needs: dict[str, Need]
    dynamic: list[Dynamic]
    elastic: Elastic


def gain_of(swept: Swept) -> Gain:
    """Splitting against the best shared deployment of one sweep."""
    split, shared = swept.split(), swept.shared()
    largest, at = largest_gain(split, shared)
    prefill = swept.space.priced["prefill"]
    assert split.ratio is not None
    assert split.prefill_row is not None
    taken = float(prefill.requests_per_s[split.prefill_row] / prefill.gpus[split.prefill_row])
    decode = float(split.tokens_per_s_per_gpu[0] * (1 + split.ratio[0]))
    return Gain(area_gain(split, shared) or 0.0, largest, at, float(split.ratio[0]), taken, decode)


def _area(space: PaperBSpace, mix: tuple[int, int], kv: str) -> float:
    swept = space.get("R1", mix, kv=kv)
    return area_gain(swept.split(), swept.shared()) or 0.0


def piggyback_of(space: PaperBSpace, model: str, cached_up: bool) -> Piggyback:
    """Piggybacking at 16k/2k, with or without MLA's up-projected keys and values kept between chunks."""
    swept = space.get(model, PREFILL_HEAVY, cached_up=cached_up)
    plain, best = swept.shared(modes=["colocated"]), swept.shared(modes=["piggybacked"])
    top = max(plain.top, best.top)
    by_chunk = {chunk: c.area(top) / plain.area(top) for chunk, c in space.chunk_curves(swept).items()}
    return Piggyback(best.area(top) / plain.area(top), by_chunk)


def relaxed_heights(swept: Swept) -> dict[str, float]:
    """The highest throughput of each mode, tok/s/GPU."""
    curves = {m: swept.shared(modes=[m]) for m in ("colocated", "piggybacked")} | {"disaggregated": swept.split()}
    return {mode: float(c.tokens_per_s_per_gpu[0]) for mode, c in curves.items()}


def common_range(space: PaperBSpace) -> tuple[float, float]:
    """Interactivities that every model's split frontier spans at 16k/2k, tok/s/user."""
    splits = [space.get(m, PREFILL_HEAVY).split() for m in MODELS]
    return max(float(c.tokens_per_s_per_user[0]) for c in splits), min(c.top for c in splits)


def span_of(swept: Swept, common: tuple[float, float]) -> Span:
    """Ratios at the ends of one split frontier and of the common range."""
    split = swept.split()
    assert split.ratio is not None
    ends = [split.ratio_at(x) or 0.0 for x in common]
    relaxed_tokens = float(split.tokens_per_s_per_gpu[0] * (1 + split.ratio[0]))
    last = len(split) - 1
    gpus = swept.parallelism(split, last).gpus
    return Span(float(split.ratio[0]), float(split.ratio[last]), gpus, split.top, ends[0], ends[1], relaxed_tokens)


def domain_of(space: PaperBSpace, model: str) -> Domain:
    """Split frontiers with 72 and with 8 GPUs on the fast link, at every twentieth of the wider one's range."""
    wide = space.get(model, PREFILL_HEAVY).split()
    narrow = space.get(model, PREFILL_HEAVY, domain_gpus=8).split()
    other = space.get(model, PREFILL_HEAVY, hardware="b200-sxm").split()
    points = [float(x) for x in np.linspace(0.05, 0.95, 19) * wide.top]
    ratios = [(x, wide.at(x) / narrow.at(x)) for x in points if narrow.at(x) > 0]
    return Domain(ratios, wide.area(wide.top) / narrow.area(wide.top), other.area(wide.top) / wide.area(wide.top))


def mapping_of(space: PaperBSpace, model: str, count: int = 12) -> list[Mapping]:
    """What the frontiers at 16k/2k are made of, at evenly spaced interactivities that both reach."""
    swept = space.get(model, PREFILL_HEAVY)
    split, shared = swept.split(), swept.shared()
    found = []
    for x in (float(x) for x in np.linspace(0.08, 0.96, count) * min(split.top, shared.top)):
        i, j = int(split.index(x) or 0), int(shared.index(x) or 0)
        instances = swept.parallelism(split, i), swept.batch(split, i), swept.parallelism(shared, j), swept.batch(shared, j)
        found.append(Mapping(x, split.at(x) / shared.at(x), *instances))
    return found


def tensor_use(space: PaperBSpace, model: str) -> TensorUse:
    """TP of split and shared frontiers in the middle third, and gains of the first and middle thirds, at 96 points."""
    points = mapping_of(space, model, 96)
    middle = points[32:64]
    split, shared = (float(np.exp2(np.mean([np.log2(p.tp) for p in side]))) for side in
                     ([p.split for p in middle], [p.shared for p in middle]))  # fmt: skip
    return TensorUse(split, shared, float(np.mean([p.gain for p in points[:32]])), float(np.mean([p.gain for p in middle])))


def need_of(swept: Swept, cutoff_s: float | None = None) -> Need:
    """Bandwidth that moving state takes along a split frontier, bytes/s a GPU."""
    split = swept.split() if cutoff_s is None else swept.split(ttft_cutoff_s=cutoff_s)
    moved = swept.transfer(split)
    need = moved.need_bytes_per_s
    ends = moved.ingress_bytes_per_s
    return Need(float(need.min()), float(need.max()), float(moved.egress_bytes_per_s[0]), float(ends[0]), float(ends[-1]))


class StepParts(NamedTuple):
    """Seconds of one decode step by what takes them; together they are the step with kernels only."""

    weights: float
    cache: float
    compute: float
    network: float
    launches: float


def step_parts(swept: Swept, curve: Curve, i: int) -> StepParts:
    """Where the time of a point's decode step goes, kernels only: bytes of weights (and activations), bytes of attention
    cache, arithmetic, bytes on links, and fixed kernel times."""
    p, batch = swept.parallelism(curve, i), float(swept.batch(curve, i))
    layout = Layout.of(p)
    classes = swept.perf.pricer.breakdown(layout, swept.perf.decode_load(layout, batch, swept.sweep.workload))
    cache = sum(c["moved"] for k, c in classes.items() if k in ("attention_decode", "mla_decode"))
    network = sum(c["seconds"] - c["fixed"] for k, c in classes.items() if k in NETWORK)
    moved = sum(c["moved"] for k, c in classes.items() if k not in NETWORK)
    return StepParts(
        moved - cache, cache, sum(c["compute"] for c in classes.values()), network, sum(c["fixed"] for c in classes.values())
    )


def measure(space: PaperBSpace) -> Measures:
    """Price the whole study for one backend and read off its numbers."""
    gains = {("R1", mix): gain_of(space.get("R1", mix)) for mix in (*R1_MIXES, EXTREME_DECODE)}
    gains |= {(m, SHORT_OUTPUT): gain_of(space.get(m, SHORT_OUTPUT)) for m in ("8B", "70B", "405B")}
    gains |= {(m, PREFILL_HEAVY): gain_of(space.get(m, PREFILL_HEAVY)) for m in ("8B", "70B", "405B")}
    common = common_range(space)
    spans = {m: span_of(space.get(m, PREFILL_HEAVY), common) for m in MODELS}
    r1 = space.get("R1", PREFILL_HEAVY)
    scale = spans["R1"].relaxed / PRINTED_RATIO["R1"][0]
    traffics = [trace_shaped(*DYNAMIC), *(lognormal(*DYNAMIC, sigma) for sigma in LOGNORMAL_SIGMAS)]
    needs = {m: need_of(space.get(m, PREFILL_HEAVY)) for m in MODELS}
    return Measures(
        space=space,
        gains=gains,
        cache_gains={kv: (_area(space, BALANCED_LONG, kv), _area(space, BALANCED_SHORT, kv)) for kv in ("bf16", "fp8", "fp4")},
        piggyback={(m, c): piggyback_of(space, m, c) for m, c in (("R1", False), ("R1", True), ("70B", False))},
        heights={mix: relaxed_heights(space.get("R1", mix)) for mix in (*R1_MIXES, EXTREME_DECODE)}
        | {(0, 0): relaxed_heights(space.get("70B", DECODE_HEAVY))},
        cpp={chunk: space.chunked_pipeline(float(chunk)) for chunk in CPP_CHUNKS},
        whole_prompt=space.chunked_pipeline(float("inf"))[0],
        common=common,
        spans=spans,
        fixed={r: fixed_of(r1, r) for r in (3.5, 0.5, 3.5 * scale, 0.5 * scale)},
        domain={m: domain_of(space, m) for m in ("R1", "70B")},
        mapping={m: mapping_of(space, m) for m in MODELS},
        tensor={m: tensor_use(space, m) for m in ("70B", "405B")},
        needs=needs | {"R1 at 1M": need_of(space.get("R1", MILLION), MILLION_CUTOFF_S)},
        dynamic=[dynamic_of(space, w) for w in traffics],
        elastic=elastic_of(space),
    )
