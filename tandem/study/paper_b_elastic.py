"""What moves when traffic moves: fixed GPU ratios against re-matched ones, constant lengths against real spreads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tandem.plan.search import PAPER_TTFT_CUTOFF_S
from tandem.spec.workload import Slo, Workload
from tandem.study.paper_b_space import DYNAMIC, MODELS, PREFILL_HEAVY, R1_MIXES, PaperBSpace, mix_name
from tandem.study.sweep import Swept, area_gain

ELASTIC_TOKENS_PER_S_PER_USER = 50.0
"""The service at which traffic mixes are compared: that of the vendor's own published example (facts, section 1.9)."""

BUDGETS = (16, 32, 64, 128, 256, 512)


class Fixed(NamedTuple):
    """A fixed ratio against the matched one: heights at the relaxed end over the optimum, at 0.99 of the range over the
    optimum there and over the frontier's highest point, and areas."""

    ratio: float
    relaxed: float
    tight: float
    tight_of_highest: float
    area: float


class Whole(NamedTuple):
    """What whole numbers of instances cost R1 16k/2k in a budget: throughput of the planner's best pools there, idle GPUs
    included, over the exactly balanced frontier."""

    gpus: int
    kept: float
    imbalance: float


class Dynamic(NamedTuple):
    """A constant traffic against a dynamic one: area ratios of the better of both modes' frontiers, P50 and mean lengths."""

    name: str
    mean_isl: float
    mean_osl: float
    p50: float
    mean: float
    p50_split: float
    mean_split: float


class Elastic(NamedTuple):
    """What re-matching buys. `kept[a][b]` is the share of mix b's best throughput that pools sized for mix a reach."""

    best_fixed: dict[str, tuple[float, float]]
    """Model -> (the best single ratio over its whole frontier, the share of the matched area that it keeps)."""
    mixes: list[str]
    ratios: list[float]
    kept: list[list[float]]
    best_mix_ratio: float
    best_mix_kept: float
    """The best single ratio for the four mixes, and the mean share of their matched throughputs that it keeps."""
    whole: list[Whole]

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return self._asdict() | {"whole": [w._asdict() for w in self.whole]}


def fixed_of(swept: Swept, ratio: float) -> Fixed:
    """One fixed ratio against the matched frontier of the same sweep."""
    split, fixed = swept.split(), swept.fixed_ratio(ratio)
    relaxed, tight = float(split.tokens_per_s_per_user[0]), 0.99 * split.top
    return Fixed(
        ratio,
        fixed.at(relaxed) / split.at(relaxed),
        fixed.at(tight) / split.at(tight),
        fixed.at(tight) / float(split.tokens_per_s_per_gpu[0]),
        fixed.area(split.top) / split.area(split.top),
    )


def whole_of(swept: Swept) -> list[Whole]:
    """The planner's split deployments in growing budgets at ELASTIC_TOKENS_PER_S_PER_USER, where one exists."""
    asked = Slo(ttft_s=PAPER_TTFT_CUTOFF_S, tpot_s=1.0 / ELASTIC_TOKENS_PER_S_PER_USER)
    ideal = swept.split().at(ELASTIC_TOKENS_PER_S_PER_USER)
    found = []
    for gpus in BUDGETS:
        choice = swept.space.disaggregated(asked, gpus)
        if choice is not None:
            per_gpu = choice.requests_per_s * swept.sweep.workload.mean_osl / gpus
            found.append(Whole(gpus, per_gpu / ideal, choice.imbalance))
    return found


def dynamic_of(space: PaperBSpace, traffic: Workload) -> Dynamic:
    """Constant 4096/512, and constant means, against traffic whose medians are 4096/512 (Llama-70B, Figure 14)."""
    found, constant = space.get("70B", traffic), space.get("70B", DYNAMIC)
    means = round(traffic.mean_isl), round(traffic.mean_osl)
    at_means = space.get("70B", means)

    def ratios(a: Swept) -> tuple[float, float]:
        return _best_area(a) / _best_area(found), area_gain(a.split(), found.split()) or 0.0

    (p50, p50_split), (mean, mean_split) = ratios(constant), ratios(at_means)
    return Dynamic(traffic.name, traffic.mean_isl, traffic.mean_osl, p50, mean, p50_split, mean_split)


def _best_area(swept: Swept) -> float:
    """Area under the upper envelope of shared and split frontiers."""
    split, shared = swept.split(), swept.shared()
    edges = np.unique(np.concatenate([split.tokens_per_s_per_user, shared.tokens_per_s_per_user]))
    heights = [max(split.at(float(x)), shared.at(float(x))) for x in edges]
    return float(np.sum(np.diff(np.concatenate([[0.0], edges])) * heights))


def elastic_of(space: PaperBSpace) -> Elastic:
    """Fixed against re-matched: over every model's own frontier, and over R1's four mixes at one interactivity."""
    best_fixed = {}
    for model in MODELS:
        swept = space.get(model, PREFILL_HEAVY)
        split = swept.split()
        assert split.ratio is not None
        tried = [fixed_of(swept, float(r)) for r in np.geomspace(float(split.ratio[-1]), float(split.ratio[0]), 48)]
        top = max(tried, key=lambda f: f.area)
        best_fixed[model] = (top.ratio, top.area)
    sweeps = [space.get("R1", mix) for mix in R1_MIXES]
    x = ELASTIC_TOKENS_PER_S_PER_USER
    ratios = [s.split().ratio_at(x) or 0.0 for s in sweeps]
    best = [s.split().at(x) for s in sweeps]
    kept = [[s.fixed_ratio(r).at(x) / b for s, b in zip(sweeps, best, strict=True)] for r in ratios]
    tries = np.geomspace(min(ratios), max(ratios), 64)
    means = [float(np.mean([s.fixed_ratio(float(r)).at(x) / b for s, b in zip(sweeps, best, strict=True)])) for r in tries]
    top_i = int(np.argmax(means))
    return Elastic(
        best_fixed, [mix_name(m) for m in R1_MIXES], ratios, kept, float(tries[top_i]), means[top_i], whole_of(sweeps[0])
    )
