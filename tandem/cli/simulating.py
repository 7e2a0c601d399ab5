"""`tandem simulate`: traffic, request by request, through a deployment; or through several, with the same arrivals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.spec.errors import SpecError

File = Path | None


def simulate(
    deployment: Annotated[File, typer.Option(help="`recommended` of `tandem plan --json`, as JSON or YAML; or --gpus.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Needed with --gpus; else it must be the file's.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Needed with --gpus; else it must be the file's.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Plan for so many GPUs first, and simulate what that recommends.")] = None,
    trace: Annotated[str | None, typer.Option(help="A bundled trace's name or a file; docs/traffic.md.")] = None,
    trace_format: Annotated[str | None, typer.Option(help="csv, azure, mooncake, vllm, aiperf or servegen.")] = None,
    scale: Annotated[float, typer.Option(help="Times the trace's request rate, or its clients'.")] = 1.0,
    start: Annotated[float, typer.Option(help="Second of the trace at which to begin.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of the trace or of arrivals.")] = None,
    isl: Annotated[int | None, typer.Option(help="Prompt tokens; with --osl and --arrivals instead of --trace.")] = None,
    osl: Annotated[int | None, typer.Option(help="Output tokens.")] = None,
    arrivals: Annotated[str | None, typer.Option(help="poisson:5 is 5 requests/s; or gamma:5:cv=4, ...")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests that arrive; default 1,000.")] = None,
    policy: Annotated[str, typer.Option(help="static, or elastic: workers change roles and numbers.")] = "static",
    max_gpus: Annotated[int | None, typer.Option(help="GPUs that --policy elastic may hold; default: as at first.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Largest time to first token, seconds.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Largest time per output token, seconds.")] = None,
    percentile: Annotated[float, typer.Option(help="Share of requests that must meet both, percent.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn; the same seed, the same answer.")] = 0,
    replications: Annotated[int, typer.Option(help="Runs with other draws of the traffic, for 95 % intervals.")] = 1,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another deployment's file, or a policy; repeat it for several.")
    ] = None,
    requests_out: Annotated[File, typer.Option(help="Write all requests here, .csv or .parquet.")] = None,
    series_out: Annotated[File, typer.Option(help="Write the time series here, .csv.")] = None,
    report: Annotated[File, typer.Option(help="Write a self-contained HTML report here.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Serve traffic with a deployment in simulation: latencies, goodput, GPU hours, price."""
    from tandem.cli import simulated
    from tandem.sim.export import check_requests_file
    from tandem.spec.files import require_folder
    from tandem.spec.workload import Slo

    for option, path in (("--report", report), ("--series-out", series_out)):
        require_folder(option, path)
    check_requests_file(requests_out)
    traffic = simulated.Traffic(
        trace=trace, format=trace_format, scale=scale, start_s=start, duration_s=duration, isl=isl, osl=osl, arrivals=arrivals,
        requests=requests,
    )  # fmt: skip
    if percentile != 50.0 and ttft is None and tpot is None:
        raise refuse("--percentile", percentile, "changes nothing without --ttft or --tpot")
    slo = Slo(ttft_s=ttft, tpot_s=tpot, percentile=percentile) if ttft is not None or tpot is not None else None
    traces = traffic.draw(seed, replications)
    first = simulated.first_variant(deployment, model, hardware, gpus, traces[0].workload(), slo, policy)
    variants = [first, *(simulated.other_variant(text, first) for text in compare or ())]
    outcome = simulated.run_all(variants, traces, slo, max_gpus)
    outcome.write(requests_out, series_out, report)
    if json_out:
        from tandem.cli.app import emit

        return emit(outcome.to_json(seed))
    outcome.show(report)


def refuse(option: str, value: Any, why: str) -> SpecError:
    """One line that names an option, its value and what would do."""
    return SpecError(f"{option}={value!r}: {why}")
