"""`tandem plan`: read the traffic, find the plan, print or write it."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.app import emit
from tandem.perf.backend import ServingFits
from tandem.plan.export.folder import check_folder, export_plan
from tandem.plan.planner import find_plan
from tandem.report import html, text
from tandem.sim.traces import load_trace
from tandem.spec.errors import SpecError
from tandem.spec.files import require_folder, write_whole
from tandem.spec.workload import Slo, Workload


def read_workload(isl: int | None, osl: int | None, trace: str | None) -> Workload:
    """Fixed lengths or a trace, exactly one of them."""
    if (trace is None) == (isl is None and osl is None):
        raise SpecError("--isl/--osl or --trace: give either both lengths or a trace")
    if trace is not None:
        return load_trace(trace).workload()
    if isl is None or osl is None:
        raise SpecError(f"--{'isl' if isl is None else 'osl'}: must be given with the other length")
    return Workload.fixed(isl, osl)


def run(
    *,
    model: str,
    hardware: str,
    gpus: int,
    workload: Workload,
    bounds: tuple[float | None, float | None, float],
    precision: str | None,
    backend: str | None,
    fits: Path | None,
    report: Path | None,
    export: Path | None,
    json_out: bool,
) -> None:
    """Find a plan and print it; report and export are each written whole or not at all."""
    require_folder("--report", report)
    if export is not None:
        check_folder(export)
    slo = Slo(ttft_s=bounds[0], tpot_s=bounds[1], percentile=bounds[2])
    with text.progress("planning") as step:
        plan = find_plan(
            model=model,
            hardware=hardware,
            gpus=gpus,
            workload=workload,
            slo=slo,
            precision=precision,
            backend=backend,
            fits=ServingFits.read(fits) if fits else None,
            progress=step,
        )
    if report is not None:
        write_whole(report, html.plan_page(plan))
    if export is not None:
        export_plan(plan, export)
    if json_out:
        return emit(plan.to_json())
    out = text.console()
    out.print(text.plan_table(plan))
    for line in (*text.plan_sentences(plan), *text.change_sentences(plan)):
        out.print(f"- {line}", markup=False)
    if report is not None:
        out.print(f"report: {report.resolve()}")
    if export is not None:
        out.print(f"export: {export.resolve()}; its README.md says how to run it", markup=False)
