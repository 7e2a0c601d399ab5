"""`tandem serve`: an OpenAI-compatible endpoint over prefill and decode workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.spec.errors import SpecError

SCALE_WINDOW_S = 15.0


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file or the name of an installed model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all, and then give --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any that is free.")] = 8000,
    prefill: Annotated[int, typer.Option(help="Prefill workers; 0 lets the decode workers prefill too.")] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers.")] = 1,
    workers: Annotated[str, typer.Option(help="embedded (threads of this process) or processes.")] = "embedded",
    cluster: Annotated[str | None, typer.Option(help="ray, or ray://HOST:PORT: workers are actors (extra `[ray]`).")] = None,
    plan: Annotated[Path | None, typer.Option(help="Deployment of `tandem plan --json`: says workers and batch.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File of name:sha256 lines; without it everybody may ask.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: as given.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (float16, on GPUs bfloat16), float32, float16, bfloat16 or int8.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of each worker; default: cores / workers.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Requests that a worker holds at once; default 32.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and output; default: the model's.")] = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Of each worker's cache; default: a quarter of free memory.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that run or wait; more are told to come back (429).")] = 1024,
    emulate: Annotated[str | None, typer.Option(help="Hardware whose time workers take without computing; no weights.")] = None,
    emulate_tp: Annotated[int, typer.Option(help="GPUs of each emulated worker (tensor parallelism).")] = 1,
    emulate_stride: Annotated[float, typer.Option(help="Seconds of decode steps that are told of together.")] = 0.0,
    scale: Annotated[str | None, typer.Option(help="fixed: workers change roles; elastic: they come and go too.")] = None,
    max_workers: Annotated[int | None, typer.Option(help="Most workers of --scale elastic; default: as at first.")] = None,
    scale_dry_run: Annotated[bool, typer.Option(help="Only say what --scale would change.")] = False,
    scale_window: Annotated[float, typer.Option(help="Seconds between two decisions of --scale.")] = SCALE_WINDOW_S,
    scale_log: Annotated[Path | None, typer.Option(help="Append what --scale is told to this file, as lines of JSON.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Largest time to first token that --scale aims at, seconds.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Largest time per output token that --scale aims at, seconds.")] = None,
    drain: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    explore: Annotated[bool, typer.Option(help="Serve the explorer too, at /explore/, with a view of these workers.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Log in JSON lines on stderr.")] = False,
) -> None:
    """Serve a model through OpenAI's HTTP API (extra `[serve]`). One JSON line with the url says that it is ready."""
    from tandem.spec.catalog import find_weights, load_spec
    from tandem.spec.workload import Slo

    if emulate is None and (emulate_tp != 1 or emulate_stride != 0.0):
        raise SpecError("--emulate-tp, --emulate-stride: change nothing without --emulate")
    if plan is not None and emulate_tp != 1:
        raise SpecError(f"--emulate-tp={emulate_tp}: the plan says it; leave it out")
    bounds = (max_workers, scale_log, ttft, tpot)
    if scale is None and (scale_dry_run or scale_window != SCALE_WINDOW_S or any(bound is not None for bound in bounds)):
        options = "--max-workers, --scale-dry-run, --scale-window, --scale-log, --ttft, --tpot"
        raise SpecError(f"{options}: change nothing without --scale")
    if emulate is None and find_weights(model).is_dir():
        load_spec(model)  # names what is wrong with a folder that is no checkpoint
    launch = _launch()
    emulation = None
    if emulate is not None:
        deployment = launch.deployment_of(
            model, emulate, prefill=prefill, decode=decode, max_batch=max_batch, tp=emulate_tp, plan=plan
        )
        prefill = 0 if deployment.prefill is None else deployment.prefill.replicas
        decode = (deployment.decode or deployment.colocated).replicas
        emulation = launch.Emulation(deployment=deployment, stride_s=emulate_stride)
    scaling = None
    if scale is not None:
        scaling = launch.Scaling(
            slo=Slo(ttft_s=ttft, tpot_s=tpot),
            mode=scale,
            max_workers=max_workers,
            dry_run=scale_dry_run,
            window_s=scale_window,
            log=scale_log,
        )
    options = launch.ServeOptions(
        model=model,
        name=model if name is None else name,
        host=host,
        port=port,
        prefill=prefill,
        decode=decode,
        workers=workers,
        cluster=cluster,
        api_keys=api_keys,
        dtype=dtype,
        device=device,
        threads=threads,
        max_batch=max_batch,
        max_context=max_context,
        cache_bytes=cache_bytes,
        max_waiting=max_waiting,
        drain_s=drain,
        emulation=emulation,
        scaling=scaling,
    )
    if plan is not None and emulate is None:
        options = launch.as_planned(options, plan)
    launch.log_to_stderr(as_json=json_out)
    launch.run(options, on_ready=_print_ready, routers=[_explorer] if explore else [])


def _explorer(client_of: Any) -> Any:
    """The explorer's paths; its questions need a key where answers do."""
    from tandem.explore.app import router

    return router(prefix="/explore", client_of=client_of, live="../pools")


def _print_ready(data: dict[str, Any]) -> None:
    from tandem.cli.app import emit

    emit(data)
    sys.stdout.flush()


def _launch() -> Any:
    """The module that needs the extra; one line that says what to install where a package is missing."""
    try:
        from tandem.serve import launch
    except ModuleNotFoundError as missing:
        raise SpecError(f"{missing.name} is not installed, and serving needs it; `pip install 'tandem-lm[serve]'`") from None
    return launch
