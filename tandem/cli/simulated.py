"""What `tandem simulate` runs: traffic out of options, deployments out of files, and the outcome as JSON, text and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml

from tandem.cli.simulating import refuse
from tandem.sim.api import POLICIES, REQUESTS, SimRun
from tandem.sim.api import simulate as simulate_one
from tandem.sim.arrivals import make_trace, parse_arrivals
from tandem.sim.export import write_requests, write_series
from tandem.sim.policies import PolicyName
from tandem.sim.replicate import deal, intervals, paired, seed_of
from tandem.sim.traces import is_drawn, load_trace
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Deployment
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int
from tandem.spec.workload import Slo, Trace, Workload


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The options that say what arrives."""

    trace: str | None
    format: str | None
    scale: float
    start_s: float
    duration_s: float | None
    isl: int | None
    osl: int | None
    arrivals: str | None
    requests: int | None

    def __post_init__(self) -> None:
        drawn = {"--isl": self.isl, "--osl": self.osl, "--arrivals": self.arrivals, "--requests": self.requests}
        cut = {
            "--trace-format": self.format,
            "--scale": None if self.scale == 1.0 else self.scale,
            "--start": self.start_s or None,
        }
        wrong = drawn if self.trace is not None else cut
        for option, value in wrong.items():
            if value is not None:
                other = "with --trace the trace says it" if self.trace is not None else "changes nothing without --trace"
                raise refuse(option, value, f"{other}; leave it out")
        if self.trace is None:
            if self.requests is not None and self.duration_s is not None:
                raise refuse("--duration", self.duration_s, "cannot be had with --requests; leave one of them out")
            for option, value in list(drawn.items())[:3]:
                if value is None:
                    raise SpecError(f"{option}: must be given with the other two of --isl, --osl and --arrivals, or --trace")

    def draw(self, seed: int, replications: int) -> list[Trace]:
        """One trace a replication: those of a recorded one after the first are dealt anew (tandem.sim.replicate.deal), others
        are drawn from seeds of their own."""
        require_int("replications", replications, high=1000)
        seeds = [seed_of(seed, k) for k in range(replications)]
        try:
            if self.trace is None:
                return [self._drawn(each) for each in seeds]
            if is_drawn(self.trace, self.format):
                return [self._loaded(self.trace, each) for each in seeds]
            recorded = self._loaded(self.trace, seed)
        except SpecError as wrong:
            raise SpecError(_as_options(str(wrong))) from None
        return [recorded, *(deal(recorded, each) for each in seeds[1:])]

    def _drawn(self, seed: int) -> Trace:
        process = parse_arrivals(self.arrivals or "", "--arrivals")
        requests = REQUESTS if self.requests is None and self.duration_s is None else self.requests
        lengths = (cast(int, self.isl), cast(int, self.osl))
        return make_trace(process, lengths, count=requests, duration_s=self.duration_s, seed=seed)

    def _loaded(self, trace: str, seed: int) -> Trace:
        return load_trace(
            trace, format=self.format, seed=seed, scale=self.scale, start_s=self.start_s, duration_s=self.duration_s
        )  # fmt: skip


def _as_options(message: str) -> str:
    names = {"format": "--trace-format", "scale": "--scale", "start_s": "--start", "duration_s": "--duration"}
    field, equals, rest = message.partition("=")
    return f"{names.get(field, field)}{equals}{rest}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A deployment under a policy; `model` and `hardware` replace the catalogue's where the command line gave them."""

    name: str
    deployment: Deployment
    policy: PolicyName
    model: ModelSpec | None = None
    hardware: HardwareSpec | None = None


def read_deployment(option: str, file: Path) -> Deployment:
    """A deployment file: the `recommended` object of `tandem plan --json`, or the whole of what that printed."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as wrong:
        raise refuse(option, str(file), f"cannot be read ({' '.join(str(wrong).split())})") from None
    if isinstance(data, dict) and isinstance(data.get("recommended"), dict):
        data = data["recommended"]
    if not isinstance(data, dict):
        raise refuse(option, str(file), "must be the recommended deployment of `tandem plan --json`")
    try:
        return Deployment.from_json(data)
    except (SpecError, TypeError) as wrong:
        raise refuse(option, str(file), str(wrong).replace("Precision.__init__() ", "precision: ")) from None


def first_variant(
    file: Path | None,
    model: str | None,
    hardware: str | None,
    gpus: int | None,
    workload: Workload,
    slo: Slo | None,
    policy: str,
) -> Variant:
    """What --deployment says, or what a plan for --gpus recommends. SpecError unless it is one of the two."""
    if policy not in POLICIES:
        raise refuse("--policy", policy, f"must be {' or '.join(POLICIES)}")
    if (file is None) == (gpus is None):
        raise SpecError("--deployment or --gpus: give one of them, a deployment or the GPUs to plan for")
    spec = None if model is None else load_spec(model)
    gpu = None if hardware is None else load_hardware(hardware)
    chosen = cast(PolicyName, policy)
    if file is None:
        for option, value in (("--model", spec), ("--hardware", gpu)):
            if value is None:
                raise SpecError(f"{option}: must be given with --gpus")
        from tandem.plan.planner import find_plan

        assert spec is not None
        assert gpu is not None
        assert gpus is not None
        planned = find_plan(model=spec, hardware=gpu, gpus=gpus, workload=workload, slo=slo).recommended
        return Variant(name=f"plan for {gpus} GPUs", deployment=planned, policy=chosen, model=spec, hardware=gpu)
    deployment = read_deployment("--deployment", file)
    for option, given, own in (("--model", spec, deployment.model), ("--hardware", gpu, deployment.hardware)):
        known = load_spec(own).name if option == "--model" and given is None else own
        if given is not None and given.name != known:
            raise refuse(option, given.name, f"the deployment is of {own}; leave it out, or give that one")
    return Variant(name=file.stem, deployment=deployment, policy=chosen, model=spec, hardware=gpu)


def other_variant(text: str, first: Variant) -> Variant:
    """A policy's name: the first deployment under that one; else the file of another deployment, under the first's policy."""
    if text in POLICIES:
        return replace(first, name=text, policy=cast(PolicyName, text))
    return Variant(name=Path(text).stem, deployment=read_deployment("--compare", Path(text)), policy=first.policy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All runs: one list of replications a variant."""

    variants: tuple[Variant, ...]
    runs: tuple[tuple[SimRun, ...], ...]

    @property
    def first(self) -> SimRun:
        """The first variant's first replication, which tables and files are of."""
        return self.runs[0][0]

    def intervals(self, variant: int = 0) -> dict[str, Any] | None:
        """Of a variant's measures; None without replications."""
        rows = [run.to_json() for run in self.runs[variant]]
        return intervals(rows) if len(rows) > 1 else None

    def against_first(self, variant: int) -> dict[str, Any]:
        """A variant's measures minus the first's; intervals where there are replications."""
        return paired(*([run.to_json() for run in self.runs[k]] for k in (0, variant)))

    def to_json(self, seed: int) -> dict[str, Any]:
        """What --json prints. The numbers of a variant are those of its first replication."""
        trace = self.first.trace
        data = self._variant_json(0)
        data["trace"] = {"name": trace.name, "requests": len(trace), "note": trace.note}
        data["seed"], data["replications"] = seed, len(self.runs[0])
        if len(self.runs) > 1:
            others = range(1, len(self.runs))
            data["compare"] = [{**self._variant_json(k), "difference": self.against_first(k)} for k in others]
        return data

    def _variant_json(self, variant: int) -> dict[str, Any]:
        data = self.runs[variant][0].to_json()
        data |= {"name": self.variants[variant].name, "deployment": self.runs[variant][0].deployment.to_json()}
        found = self.intervals(variant)
        return data if found is None else {**data, "intervals": found}

    def rows(self) -> list[tuple[str, SimRun, dict[str, Any] | None]]:
        """Name, first run and difference of each variant, for the reports."""
        names = [variant.name for variant in self.variants]
        return [(names[k], self.runs[k][0], self.against_first(k) if k else None) for k in range(len(names))]

    def write(self, requests: Path | None, series: Path | None, report: Path | None) -> None:
        """The files that were asked for, each whole or not at all."""
        if requests is not None:
            write_requests(self.first.result, requests)
        if series is not None:
            write_series(self.first.result, series)
        if report is not None:
            from tandem.report.simulate_html import simulate_page

            write_whole(report, simulate_page(self.rows(), self.intervals()))

    def show(self, report: Path | None) -> None:
        """Tables and sentences on standard output."""
        from tandem.report import simulate_text, text

        out, rows = text.console(), self.rows()
        out.print(simulate_text.latency_table(self.first, self.intervals()))
        if len(rows) > 1:
            out.print(simulate_text.variants_table(rows))
        for line in (*simulate_text.sentences(self.first), *simulate_text.difference_sentences(rows)):
            out.print(f"- {line}", markup=False)
        if report is not None:
            out.print(f"report: {report.resolve()}", markup=False, soft_wrap=True)


def run_all(variants: Sequence[Variant], traces: Sequence[Trace], slo: Slo | None, max_gpus: int | None) -> Outcome:
    """Every variant with every trace."""
    scaled = [variant for variant in variants if variant.policy == "elastic"]
    if max_gpus is not None and not scaled:
        raise refuse("--max-gpus", max_gpus, "changes nothing without --policy elastic or --compare elastic")
    runs = tuple(
        tuple(
            simulate_one(
                deployment=v.deployment, workload=trace, policy=v.policy, slo=slo, model=v.model, hardware=v.hardware,
                max_gpus=max_gpus if v.policy == "elastic" else None,
            )
            for trace in traces
        )
        for v in variants
    )  # fmt: skip
    return Outcome(variants=tuple(variants), runs=runs)
