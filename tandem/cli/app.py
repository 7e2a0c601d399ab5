"""The command `tandem`: parse, call one function, print. Exit 0 on success, 2 on bad input with one line that helps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Never

import typer

from tandem.cli import (
    aligning,
    benching,
    compressing,
    evaluating,
    exploring,
    generating,
    serving,
    simulating,
    studies,
    training,
)
from tandem.spec.errors import SpecError, TandemError

app = typer.Typer(
    name="tandem",
    help="Which model, deployed how, serves this traffic best within this budget?",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Hub id, short name, config.json or checkpoint folder.")]
HardwareName = Annotated[str, typer.Option("--hardware", help="GPU name (`tandem hardware` lists them) or a YAML file.")]
Backend = Annotated[
    str | None, typer.Option(help="vllm, sglang, trtllm or tandem. Default: vllm, and tandem on a calibrated host.")
]
Fits = Annotated[Path | None, typer.Option(help="Your own fits, which `tandem calibrate serving --rows --out` wrote.")]
PrecisionText = Annotated[str | None, typer.Option("--precision", help="bf16, fp8, fp8_block, fp4, mxfp4, int4 or weights/activations/kv; default: the published weights' format.")]  # fmt: skip  # noqa: E501


ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""Base of every usage error: click's own class, or that of the copy which newer typer carries inside."""


def emit(data: dict[str, Any]) -> None:
    """Print one JSON object; infinities and NaN are a bug, so they raise."""
    sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")


def main() -> Never:
    """Entry point of the console script."""
    code = 0
    try:
        code = app(standalone_mode=False) or 0  # typer gives 130 for an interrupt
    except ClickError as wrong:
        if type(wrong).__name__ != "NoArgsIsHelpError":
            _fail(_usage_text(wrong))
        print(wrong)
    except (TandemError, OSError) as wrong:
        _fail(str(wrong))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code)


def _usage_text(wrong: Any) -> str:
    """What is wrong with the command line, the refused text (newer typer leaves it out) and where the options are listed."""
    text = wrong.format_message().rstrip(".")
    errors = getattr(wrong.__cause__, "errors", None)
    given = f"{errors()[0]['input']!r}: " if errors else ""
    command = wrong.ctx.command_path if getattr(wrong, "ctx", None) else "tandem"
    return f"{given}{text}; see `{command} --help`"


def _fail(message: str) -> Never:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        from tandem._version import __version__

        print(f"tandem {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Plan, simulate, train, compress and serve hybrid language models."""


@app.command()
def models(json_out: Json = False) -> None:
    """List the models of the catalogue."""
    from tandem.report import text
    from tandem.spec.catalog import load_spec, model_names, released_names

    specs, refused = [], []
    for name in (*model_names(), *released_names()):
        try:
            specs.append(load_spec(name))
        except SpecError as why:
            refused.append({"name": name, "refused": str(why)})
    if json_out:
        items: list[dict[str, Any]] = [
            {
                "name": s.name,
                "family": s.family,
                "layers": len(s.layers),
                "parameters": s.parameters,
                "active_parameters": s.active_parameters,
                "kv_bytes_per_token": s.kv_bytes_per_token(),
                "state_bytes_per_sequence": s.state_bytes_per_sequence(),
                "max_context": s.max_context,
                "native_precision": s.native_precision,
                "omitted": list(s.omitted),
            }
            for s in specs
        ]
        return emit({"items": items, "refused": refused})
    out = text.console()
    out.print(text.models_table(specs))
    for item in refused:
        out.print(f"refused: {item['refused']}")


@app.command()
def hardware(json_out: Json = False) -> None:
    """List the GPUs of the catalogue."""
    from tandem.report import text
    from tandem.spec.catalog import hardware_names, load_hardware

    specs = [load_hardware(name) for name in hardware_names()]
    if json_out:
        return emit({"items": [s.to_json() for s in specs]})
    text.console().print(text.hardware_table(specs))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, short name, config.json, checkpoint folder or GGUF file.")],
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 131072,
    batch: Annotated[int, typer.Option(help="Sequences held at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Format of weights and cache, as --precision elsewhere.")] = "bf16",
    json_out: Json = False,
) -> None:
    """Show what a model is made of and what it needs in memory."""
    from tandem.perf.memory import inspect_model
    from tandem.report import text
    from tandem.spec.catalog import load_spec

    spec = load_spec(model)
    data = inspect_model(spec, context=context, batch=batch, dtype=dtype)
    data["stored"] = generating.stored_weights(model, spec)
    if json_out:
        return emit(data)
    text.console().print(text.inspect_table(spec, data))


app.command()(generating.generate)
app.command()(serving.serve)
app.command()(benching.bench)
app.command()(exploring.explore)
app.command()(simulating.simulate)
app.command()(training.train)
app.command()(aligning.align)
app.command()(compressing.compress)
app.command()(evaluating.evaluate)


@app.command()
def estimate(
    ctx: typer.Context,
    model: ModelName = "",
    hardware: HardwareName = "",
    isl: Annotated[int | None, typer.Option(help="Prompt tokens.")] = None,
    osl: Annotated[int | None, typer.Option(help="Output tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests in flight in one instance.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight in the whole deployment.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests/s that arrive, instead of a number in flight.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallelism.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallelism.")] = 1,
    dp: Annotated[int, typer.Option(help="Attention data parallelism.")] = 1,
    cpp: Annotated[int, typer.Option(help="Chunked pipeline parallelism (prefill).")] = 1,
    precision: PrecisionText = None,
    backend: Backend = None,
    mode: Annotated[str, typer.Option(help="colocated or piggybacked.")] = "colocated",
    draft_tokens: Annotated[int, typer.Option(help="Tokens that multi-token prediction proposes in each step.")] = 0,
    acceptance: Annotated[float, typer.Option(help="Probability that a proposed token holds.")] = 0.7,
    fits: Fits = None,
    cases: Annotated[Path | None, typer.Option(help="A CSV of cases instead of one.")] = None,
    json_out: Json = False,
) -> None:
    """Predict TTFT, TPOT and throughput of one deployment, or of every row of a CSV."""
    from tandem.cli import estimating

    given = _named(ctx, cases=cases, fits=fits, json_out=json_out)
    if cases is not None:
        if given:
            name, value = next(iter(given.items()))
            raise SpecError(f"{name}={value!r}: describes one case; leave it out, each row of --cases says its own")
        return estimating.run_cases(cases, fits, json_out)
    from tandem.perf.estimate import Draft
    from tandem.spec.design import Parallelism

    for name, value in (("--model", model), ("--hardware", hardware), ("--isl", isl), ("--osl", osl)):
        if not value and value != 0:
            raise SpecError(f"{name}: must be given (or --cases FILE)")
    if "--acceptance" in given and not draft_tokens:
        raise SpecError(f"--acceptance={acceptance!r}: changes nothing without --draft-tokens; give both, or neither")
    layout = Parallelism(tp=tp, pp=pp, ep=ep, dp=dp, cpp=cpp)
    estimating.run_one(
        json_out,
        model=model,
        hardware=hardware,
        isl=isl,
        osl=osl,
        batch=batch,
        concurrency=concurrency,
        requests_per_s=rate,
        parallelism=layout,
        precision=precision,
        backend=backend,
        mode=mode,
        draft=Draft(tokens=draft_tokens, acceptance=acceptance),
        fits=fits,
    )


def _named(ctx: typer.Context, **but: object) -> dict[str, object]:
    """Options that the command line names, with their values; without those of `but`."""
    found: dict[str, object] = {}
    for parameter in ctx.command.params:
        name, source = parameter.name or "", ctx.get_parameter_source(parameter.name or "")
        if name not in but and source is not None and source.name == "COMMANDLINE":
            found[f"--{name.replace('_', '-')}"] = ctx.params[name]
    return found


@app.command()
def plan(
    model: ModelName,
    hardware: HardwareName,
    gpus: Annotated[int, typer.Option(help="GPU budget.")],
    isl: Annotated[int | None, typer.Option(help="Prompt tokens; with --osl.")] = None,
    osl: Annotated[int | None, typer.Option(help="Output tokens; with --isl.")] = None,
    trace: Annotated[str | None, typer.Option(help="A bundled trace's name or a file; docs/traffic.md.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Largest time to first token, seconds; without it 10.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Largest time per output token, seconds.")] = None,
    percentile: Annotated[float, typer.Option(help="Share of prompts that TTFT must hold for, percent.")] = 50.0,
    precision: PrecisionText = None,
    backend: Backend = None,
    fits: Fits = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write runnable deployments and a benchmark into this folder.")] = None,
    json_out: Json = False,
) -> None:
    """Find the deployment that serves this traffic best within the GPU budget."""
    from tandem.cli import planning

    workload = planning.read_workload(isl, osl, trace)
    planning.run(
        model=model,
        hardware=hardware,
        gpus=gpus,
        workload=workload,
        bounds=(ttft, tpot, percentile),
        precision=precision,
        backend=backend,
        fits=fits,
        report=report,
        export=export,
        json_out=json_out,
    )


calibrate = typer.Typer(help="Fit the performance model to measurements.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(calibrate, name="calibrate")


@calibrate.command("ops")
def calibrate_ops(
    system: Annotated[list[str] | None, typer.Option(help="GPU to fit; repeat it for several. Default: all measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the fits to this CSV file.")] = None,
    json_out: Json = False,
) -> None:
    """Refit operator efficiencies from the tables of aiconfigurator-core (extra `[calibrate]`)."""
    from tandem.cli import calibrating

    calibrating.run_ops(system, out, json_out)


Rows = Annotated[list[Path] | None, typer.Option("--rows", help="Your own measurements: a cases CSV with ttft_s and tpot_s (or ttft_ms, tpot_ms), or AIPerf's profile_export_aiperf.json or .csv; repeat it for several.")]  # fmt: skip  # noqa: E501
RowsModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Model of rows that name none; as all below, with --rows.")
]
RowsHardware = Annotated[str | None, typer.Option("--hardware", help="GPU of rows that name none.")]
RowsBackend = Annotated[str | None, typer.Option("--backend", help="vllm, sglang, trtllm or tandem.")]
RowsNumber = Annotated[int | None, typer.Option(help="Of rows that say none.")]


def _one_blas_thread() -> None:
    """Fits solve hundreds of small systems: threads of the linear algebra library only wait for one another, on a busy
    machine up to 40 times as long as the arithmetic takes. It reads this when numpy is first imported."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _given(**cells: str | int | None) -> dict[str, str]:
    return {name: str(value) for name, value in cells.items() if value is not None}


@calibrate.command("serving")
def calibrate_serving(
    rows: Rows = None,
    model: RowsModel = None,
    hardware: RowsHardware = None,
    backend: RowsBackend = None,
    precision: PrecisionText = None,
    tp: RowsNumber = None,
    pp: RowsNumber = None,
    ep: RowsNumber = None,
    dp: RowsNumber = None,
    concurrency: RowsNumber = None,
    out: Annotated[Path | None, typer.Option(help="Write the fits to this YAML file.")] = None,
    json_out: Json = False,
) -> None:
    """Refit backend overheads from the calibration side of the measured serving rows, and your own (extra `[calibrate]`)."""
    _one_blas_thread()
    from tandem.cli import calibrating

    given = _given(model=model, hardware=hardware, backend=backend, precision=precision, concurrency=concurrency)
    calibrating.run_serving(rows, given | _given(tp=tp, pp=pp, ep=ep, dp=dp), out, json_out)


@calibrate.command("host")
def calibrate_host(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model to measure steps of; repeat it. Default: nano-hybrid and nano-transformer."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Format of weights: float32, float16 or bfloat16.")] = "float32",
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads of a worker; repeat it. Default: all cores, and half of them.")
    ] = None,
    json_out: Json = False,
) -> None:
    """Measure this machine and Tandem's engine on it, so that `--hardware host` predicts what is served here."""
    from tandem.cli import calibrating_host

    calibrating_host.run(model, dtype, threads, json_out)


@app.command()
def validate(
    rows: Rows = None,
    model: RowsModel = None,
    hardware: RowsHardware = None,
    backend: RowsBackend = None,
    precision: PrecisionText = None,
    tp: RowsNumber = None,
    pp: RowsNumber = None,
    ep: RowsNumber = None,
    dp: RowsNumber = None,
    concurrency: RowsNumber = None,
    against: Annotated[str | None, typer.Option(help="Ask another predictor about the same rows: aiconfigurator.")] = None,
    peer_python: Annotated[Path | None, typer.Option(help="Python of the environment that it is installed in.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    json_out: Json = False,
) -> None:
    """Compare predictions with measured serving rows that no fit has seen (extra `[calibrate]`), or with your own."""
    _one_blas_thread()
    from tandem.cli import calibrating

    given = _given(model=model, hardware=hardware, backend=backend, precision=precision, concurrency=concurrency)
    calibrating.run_validate(rows, given | _given(tp=tp, pp=pp, ep=ep, dp=dp), against, peer_python, report, json_out)


app.add_typer(studies.study, name="study")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the HTML report.")] = Path("out/demo"),
    json_out: Json = False,
) -> None:
    """Tell the story of both papers on real inputs, and write it down as one HTML page."""
    from tandem.cli import demonstrating

    demonstrating.run(out, json_out)
