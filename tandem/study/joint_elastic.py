"""Elastic scaling on top of compression: the 12B and the 9B under the same arrivals, with constant and with elastic pools.

Constant pools are the cheapest that keep the objective on these arrivals, found by simulating them: what a planner who knew the
traffic would take. So whatever is saved beside them is saved by compression or by scaling, and not by too large a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tandem.perf.costs import Layout
from tandem.perf.estimate import check_fits, perf_model
from tandem.perf.memory import total_weight_bytes
from tandem.sim.build import LOAD_BYTES_PER_S, PROCESS_S
from tandem.sim.traces import load_trace
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Trace
from tandem.study.elastic_cells import ELASTIC_WINDOW_S, Cell, CellRun, Ready, Service, ours, ready, run_policy
from tandem.study.elastic_static import search_static
from tandem.study.elastic_traffic import Traffic
from tandem.study.joint_claims import claim
from tandem.study.joint_space import LARGE, SMALL, Setting
from tandem.study.result import Claim, Figure, Panel, Series

SLO = Slo(ttft_s=2.0, tpot_s=0.05, percentile=90.0)
WANTED = 0.90
"""Share of the requests that are to meet it."""
ALIKE = 0.01
"""Attainments that are no further apart count as equal."""
MOST_SEQUENCES = 256
TENSOR_PARALLEL = (1, 2, 4, 8)
POINTS = 200
"""Of a drawn time series."""
MODELS = {"12B": LARGE, "9B": SMALL}
BASE, ELASTIC, COMPRESSED, BOTH = "12B, static", "12B, elastic", "9B, static", "9B, elastic"
CASES = (BASE, ELASTIC, COMPRESSED, BOTH)


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """A part of a recorded or drawn traffic, at some times its rate."""

    what: str
    trace: str
    scale: float
    start_s: float = 0.0
    duration_s: float

    def load(self) -> Trace:
        """Its requests."""
        return load_trace(self.trace, start_s=self.start_s, duration_s=self.duration_s, scale=self.scale)


HOUR_S = 3600.0
TRAFFIC: dict[str, Arrivals] = {
    "steady": Arrivals(what="an hour in ten minutes", trace="azure-conversation-2023", scale=6.0, duration_s=HOUR_S),
    "up and down": Arrivals(
        what="09:30 to 13:30", trace="servegen-deepseek-r1", scale=0.4, start_s=9.5 * HOUR_S, duration_s=4 * HOUR_S
    ),
    "falling": Arrivals(
        what="11:00 to 14:00", trace="servegen-deepseek-r1", scale=0.4, start_s=11 * HOUR_S, duration_s=3 * HOUR_S
    ),
}
"""Kinds of traffic between which the answer lies: what is needed hardly moves, rises and falls by half, falls to a third."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with constant or elastic pools on one traffic."""

    gpus: float
    """Mean over the run; constant pools have them throughout."""
    most_gpus: int
    sizes: str
    """`3P2D`: workers that prefill and decode; of elastic pools those at the start."""
    gpu_hours: float
    attainment: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One traffic: what could be simulated of the four cases, and what constant pools take for the elastic ones' attainment."""

    requests: int
    cases: Mapping[str, Case]
    static_as_good: Mapping[str, float | None]
    """GPU hours by model; None where no constant sizes that were tried are as good."""
    series: Mapping[str, Mapping[str, list[float]]]
    """GPUs over time of the elastic cases."""

    def to_json(self) -> dict[str, Any]:
        """Its numbers, for claims.json."""
        return {
            "requests": self.requests,
            "cases": {name: asdict(case) for name, case in self.cases.items()},
            "static_as_good_gpu_hours": dict(self.static_as_good),
        }


def service_of(model: str, setting: Setting, trace: Trace) -> Service | None:
    """The smallest worker on which the model keeps the objective for a mean request alone; None where none of a node does."""
    spec, gpu = load_spec(model), load_hardware(setting.hardware)
    precision, lengths = Precision.parse(None, native=spec.native_precision), trace.workload()
    perf = perf_model(spec, gpu, precision, "vllm")
    for tp in TENSOR_PARALLEL:
        parallelism = Parallelism(tp=tp)
        try:
            check_fits(perf, parallelism)
        except SpecError:
            continue
        layout = Layout.of(parallelism)
        held = int(perf.memory.use(layout, lengths.final_context).max_batch(layout))
        begins_s = float(perf.prefill(layout, 1.0, lengths).ttft_s)
        if held < 1 or begins_s > (SLO.ttft_s or 0.0) or float(perf.decode_tpot_s(layout, 1.0, lengths)) > (SLO.tpot_s or 0.0):
            continue
        return Service(
            name=model,
            model=model,
            hardware=setting.hardware,
            parallelism=parallelism,
            batch=min(MOST_SEQUENCES, held),
            slo=SLO,
            start_up_s=total_weight_bytes(spec, precision) / tp / LOAD_BYTES_PER_S + PROCESS_S,
        )
    return None


def outcomes(setting: Setting, progress: Callable[[str], None] = lambda _: None) -> dict[str, Outcome]:
    """The four cases on every traffic."""
    found = {}
    for name, arrivals in TRAFFIC.items():
        trace = arrivals.load()
        cases: dict[str, Case] = {}
        series: dict[str, dict[str, list[float]]] = {}
        as_good: dict[str, float | None] = {}
        for title, model in MODELS.items():
            progress(f"elastic scaling: {name}, {title}")
            service = service_of(model, setting, trace)
            if service is None:
                continue
            made = ready(Cell(service=service, traffic=Traffic(name=arrivals.trace)), trace=trace)
            moving = run_policy(made, "elastic", ours(made), made.first, ELASTIC_WINDOW_S)
            cases[f"{title}, elastic"] = _case(made, moving, made.first)
            series[title] = _gpus(made, moving)
            constant = search_static(made, WANTED)
            as_good[title] = constant.hours_at(moving.attainment - ALIKE)
            if constant.best is not None:
                cases[f"{title}, static"] = _case(made, constant.best, None)
        found[name] = Outcome(
            requests=len(trace),
            cases={case: cases[case] for case in CASES if case in cases},
            static_as_good=as_good,
            series=series,
        )
    return found


def _case(made: Ready, run: CellRun, first: tuple[int, int] | None) -> Case:
    hours = run.result.duration_s / HOUR_S
    over_time = _gpus(made, run)["gpus"]
    return Case(
        gpus=run.gpu_hours / hours,
        most_gpus=int(max(over_time)),
        sizes=run.policy if first is None else f"{first[0]}P{first[1]}D",
        gpu_hours=run.gpu_hours,
        attainment=run.attainment,
    )


def _gpus(made: Ready, run: CellRun) -> dict[str, list[float]]:
    """GPUs held over time, thinned for a figure but for their largest number."""
    series = run.result.series
    gpus = series["gpus"].tolist()
    step = max(1, len(gpus) // POINTS)
    at_h = (series["at_s"] / HOUR_S).tolist()
    return {"at_h": at_h[::step], "gpus": [max(gpus[i : i + step]) for i in range(0, len(gpus), step)]}


def verdict(cases: Mapping[str, Case]) -> bool | None:
    """Whether compression and scaling together take fewer GPU hours than either alone, keep the objective, and keep it at least
    as well as either, within ALIKE; None where a case is missing."""
    if not {ELASTIC, COMPRESSED, BOTH} <= cases.keys():
        return None
    both, alone = cases[BOTH], (cases[ELASTIC], cases[COMPRESSED])
    return both.attainment >= WANTED and all(
        both.gpu_hours < one.gpu_hours and both.attainment >= one.attainment - ALIKE for one in alone
    )


def saved(cases: Mapping[str, Case], name: str) -> float | None:
    """Share of the GPU hours of the 12B's constant pools that a case saves."""
    if BASE not in cases or name not in cases:
        return None
    return 1 - cases[name].gpu_hours / cases[BASE].gpu_hours


def elastic_claim(found: Mapping[str, Outcome]) -> Claim:
    """J6, over all kinds of traffic."""
    verdicts = {name: verdict(outcome.cases) for name, outcome in found.items()}
    short = {ELASTIC: "scaling", COMPRESSED: "compression", BOTH: "both"}
    told, why = [], []
    for name, outcome in found.items():
        shares = {label: saved(outcome.cases, case) for case, label in short.items()}
        parts = [f"{label} {-share:+.0%}" for label, share in shares.items() if share is not None]
        if parts:
            told.append(f"{name}: {', '.join(parts)} of the 12B's static hours ({_said(verdicts[name])})")
        why.append(f"{name}: " + (", ".join(_told(case, run) for case, run in outcome.cases.items()) or "not simulated"))
        good = [f"{title} {hours:.2f} h" for title, hours in outcome.static_as_good.items() if hours is not None]
        if good:
            why[-1] += f"; static pools that attain what elastic ones do: {', '.join(good)}"
    judged = list(verdicts.values())
    pools = [
        outcome.cases[name].most_gpus for outcome in found.values() for name in (BASE, COMPRESSED) if name in outcome.cases
    ]
    grain = f", one of them {1 / max(pools):.0%} to {1 / min(pools):.0%} of such a pool" if pools else ""
    return claim(
        "J6", "compression and elastic scaling together take fewer GPU hours than either alone, and serve as well",
        "; ".join(told) or "not simulated",
        None if not judged or None in judged else all(judged),
        f"{' | '.join(why)}. To serve as well: {WANTED:.0%} in time, and no case alone more than {ALIKE:.0%} better. Static "
        f"sizes are whole GPUs{grain}, and known in hindsight; the joint policy keeps room for what may come",
        verdicts=verdicts, cases={name: outcome.to_json() for name, outcome in found.items()},
    )  # fmt: skip


def _said(holds: bool | None) -> str:
    return "not judged" if holds is None else "adds up" if holds else "does not add up"


def _told(name: str, run: Case) -> str:
    gpus = f"{run.gpus:.0f} GPUs" if "static" in name else f"{run.gpus:.1f} GPUs on average, at most {run.most_gpus}"
    return f"{name} {gpus}, {run.gpu_hours:.2f} h, {run.attainment:.1%} in time"


def elastic_figure(found: Mapping[str, Outcome]) -> Figure:
    """GPUs over time, traffic by traffic: elastic pools beside the constant ones that suffice."""
    panels = []
    for name, outcome in found.items():
        series = []
        for title, line in outcome.series.items():
            series.append(Series(name=f"{title}, elastic", x=line["at_h"], y=line["gpus"]))
            static = outcome.cases.get(f"{title}, static")
            if static is not None:
                ends = [line["at_h"][0], line["at_h"][-1]]
                series.append(Series(name=f"{title}, static", x=ends, y=[float(static.most_gpus)] * 2, style="dash"))
        panels.append(Panel(title=f"{name}: {TRAFFIC[name].trace}, {TRAFFIC[name].what}", series=tuple(series)))
    return Figure(
        title="GPUs over time",
        note=f"Static pools are the cheapest that keep {WANTED:.0%} of these requests within the objective.",
        x_title="hours",
        y_title="GPUs",
        panels=tuple(panels),
    )
