"""`tandem bench`: requests to a running server, or to one that is started for it, and what their clients felt."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli.needed import need
from tandem.spec.errors import SpecError

if TYPE_CHECKING:
    from tandem.bench.client import Target
    from tandem.bench.load import Load
    from tandem.bench.run import BenchRun

KEY = "OPENAI_API_KEY"


def bench(
    server: Annotated[str, typer.Argument(metavar="URL-or-MODEL", help="A running server, or a model to be served meanwhile.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- SERVE OPTIONS]", help="Options of `tandem serve` for a model.")
    ] = None,
    isl: Annotated[int | None, typer.Option(help="Prompt tokens.")] = None,
    osl: Annotated[int | None, typer.Option(help="Output tokens.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: so many requests at any time.")] = None,
    arrivals: Annotated[str | None, typer.Option(help="Open loop: poisson:5 is 5 requests/s; or gamma:5:cv=4, ...")] = None,
    trace: Annotated[str | None, typer.Option(help="A bundled trace's name or a file, instead of --isl and --osl.")] = None,
    trace_format: Annotated[str | None, typer.Option(help="csv, azure, mooncake, vllm, aiperf or servegen.")] = None,
    scale: Annotated[float, typer.Option(help="Times the trace's request rate, or its clients'.")] = 1.0,
    start: Annotated[float, typer.Option(help="Second of the trace at which to begin.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of the trace or of arrivals.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests; default of a closed loop: 8 for each in flight.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Served name, where a server has several.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Largest time to first token, seconds.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Largest time per output token, seconds.")] = None,
    percentile: Annotated[float, typer.Option(help="Share of requests that must meet both, percent.")] = 50.0,
    warmup: Annotated[int, typer.Option(help="Requests before each run that are not counted.")] = 1,
    repeats: Annotated[int, typer.Option(help="Runs with other draws, for 95 % intervals.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn; the same seed, the same requests.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")] = 600.0,
    learn: Annotated[Path | None, typer.Option(help="Add what was measured to this file for `calibrate serving`.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Measure a server: TTFT, TPOT, throughput and goodput under a closed or an open loop or a trace (extra `[bench]`).

    The key of a server that wants one is read from OPENAI_API_KEY.
    """
    from tandem.spec.files import require_folder
    from tandem.spec.units import require_int, require_number
    from tandem.spec.workload import Slo

    need("aiohttp", doing="bench")
    from tandem.bench.learn import check_rows_file, learn_from
    from tandem.cli.bench_load import loads_of

    for option, path in (("--report", report), ("--learn", learn)):
        require_folder(option, path)
    if percentile != 50.0 and ttft is None and tpot is None:
        raise SpecError(f"--percentile={percentile!r}: changes nothing without --ttft or --tpot")
    require_int("warmup", warmup, low=0, high=1000)
    require_number("timeout", timeout, high=1e6)
    if learn is not None:
        if concurrency is None or trace is not None:
            raise SpecError(
                f"--learn={str(learn)!r}: calibration learns from a fixed length at a fixed number in flight; give --isl, "
                "--osl and --concurrency"
            )
        if osl is not None and osl < 2:
            raise SpecError(f"--osl={osl}: calibration learns TPOT too; with --learn, let answers have two tokens or more")
        if report is not None and report.resolve() == learn.resolve():
            raise SpecError(f"--report={str(report)!r}: is the file of --learn; name another")
        check_rows_file(learn)
    slo = Slo(ttft_s=ttft, tpot_s=tpot, percentile=percentile) if ttft is not None or tpot is not None else None
    loads = loads_of(
        concurrency=concurrency, arrivals=arrivals, trace=trace, trace_format=trace_format, scale=scale, start_s=start,
        duration_s=duration, isl=isl, osl=osl, requests=requests, seed=seed, repeats=repeats,
    )  # fmt: skip
    started = datetime.now(UTC)
    with _reached(server, options or []) as url:
        target, runs, broken = asyncio.run(_measure(url, model, timeout, loads, warmup))
    _tell(target, loads, runs, slo, report, json_out)
    if broken is not None:
        raise broken
    if learn is not None and isl is not None and osl is not None and concurrency is not None:
        line = learn_from(learn, target.model, isl, osl, concurrency, runs, started)
        print(line, file=sys.stderr if json_out else sys.stdout)


@contextmanager
def _reached(server: str, options: list[str]) -> Iterator[str]:
    """The address of a server: the one that is named, or of a model's that lives as long as this lasts."""
    scheme, mark, rest = server.partition("://")
    if mark:
        if scheme.lower() not in ("http", "https"):
            raise SpecError(f"{server!r}: must be an address that begins with http:// or https://, or a model")
        if options:
            raise SpecError(f"{' '.join(options)}: options of `tandem serve` change no server that runs; leave them out")
        yield f"{scheme.lower()}://{rest.rstrip('/').removesuffix('/v1')}"
        return
    from tandem.cli.served import served

    with served(server, options) as ready:
        yield ready["url"]


async def _measure(
    url: str, model: str | None, timeout_s: float, loads: list[Load], warmup: int
) -> tuple[Target, list[BenchRun], SpecError | None]:
    """The server, the runs, and why there are fewer of them than loads. Raises SpecError where there would be none."""
    from dataclasses import replace

    from tandem.bench.client import Target, served_model, session
    from tandem.bench.run import run
    from tandem.cli.bench_progress import Progress

    target = Target(url=url, model=model or "", api_key=os.environ.get(KEY), timeout_s=timeout_s)
    if model is None:
        async with session(target) as http:
            target = replace(target, model=await served_model(http, url))
    runs: list[BenchRun] = []
    with Progress() as progress:
        for number, load in enumerate(loads):
            listen = progress.run(number, len(loads), len(load.trace))
            try:
                runs.append(await run(target, load, warmup=warmup, listen=listen))
            except SpecError as wrong:
                if not runs:
                    raise
                return target, runs, SpecError(f"run {number + 1} of {len(loads)} was not measured: {wrong}")
    return target, runs, None


def _tell(target: Target, loads: list[Load], runs: list[BenchRun], slo: Any, report: Path | None, json_out: bool) -> None:
    """What was measured, before any file is written of it."""
    from tandem.sim.replicate import intervals

    rows = [run.to_json(slo) for run in runs]
    found = intervals(rows) if len(rows) > 1 else {}
    if json_out:
        from tandem.cli.app import emit

        load = {"name": loads[0].trace.name, "requests": len(loads[0].trace), "concurrency": loads[0].concurrency}
        emit({"url": target.url, "model": target.model, "load": load, **rows[0], "runs": rows, "intervals": found})
    else:
        _show(target, loads, runs, slo, found)
    if report is not None:
        from tandem.report.bench_html import bench_page
        from tandem.spec.files import write_whole

        write_whole(report, bench_page(target.url, target.model, loads[0], runs, slo, found))
        if not json_out:
            print(f"report: {report}")


def _show(target: Target, loads: list[Load], runs: list[BenchRun], slo: Any, found: dict[str, Any]) -> None:
    from rich.text import Text

    from tandem.report import text
    from tandem.report.bench_text import bench_lines, bench_table

    out = text.console()
    table = bench_table(target.model, loads[0], runs[0].stats(slo), found)
    table.title = Text(str(table.title), style=table.title_style or "")  # names are no markup
    out.print(table)
    lines = bench_lines(target.url, loads, runs, slo, None)
    for number, run in enumerate(runs[1:], start=2):
        lines += [f"run {number}: {count:,} failed: {why}" for why, count in run.failures.items()]
    for line in lines:
        out.print(line, soft_wrap=True, markup=False)
