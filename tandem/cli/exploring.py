"""`tandem explore`: the planner behind sliders, on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.needed import need

NINE_B = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"


def explore(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8050,
    export: Annotated[Path | None, typer.Option(help="Write the page with answers inside here, and serve nothing.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Of the exported page.")] = NINE_B,
    hardware: Annotated[str, typer.Option(help="Of the exported page.")] = "h100-sxm",
    gpus: Annotated[int, typer.Option(help="Of the exported page.")] = 8,
    ttft: Annotated[float | None, typer.Option(help="Largest time to first token of the exported page, seconds.")] = 2.0,
    backend: Annotated[
        str | None,
        typer.Option(help="Of the exported page: vllm (default), sglang, trtllm, tandem (default of a calibrated host)."),
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout when it is ready.")] = False,
) -> None:
    """Explore deployments on a page: model, GPU, traffic and bounds as controls, answered by the planner (extra [explore])."""
    from tandem.cli.app import emit
    from tandem.report import text
    from tandem.spec.files import require_folder, write_whole
    from tandem.spec.units import require_int

    if export is not None:
        from tandem.explore.answers import Query, exported
        from tandem.explore.page import exported_page
        from tandem.spec.catalog import load_hardware, load_spec

        require_folder("--export", export)
        spec, gpu = load_spec(model), load_hardware(hardware)
        asked = Query(model=spec.name, hardware=gpu.name, gpus=gpus, isl=1024, osl=128, ttft_s=ttft, backend=backend)
        with text.progress("pricing"):
            found = exported(asked, model=spec, hardware=gpu)
        write_whole(export, exported_page(found))
        answered = sum("error" not in each for each in found["answers"].values())
        if json_out:
            return emit({"file": str(export), "answers": len(found["answers"]), "answered": answered})
        return text.console().print(
            f"{export}: {answered} of {len(found['answers'])} combinations can be served", soft_wrap=True, markup=False
        )
    require_int("port", port, low=0, high=65535)
    need("fastapi", "uvicorn", doing="explore", extra="explore")
    import socket

    import uvicorn

    from tandem.explore.app import create_app

    listening = socket.create_server((host, port))
    url = f"http://{host}:{listening.getsockname()[1]}/"
    if json_out:
        emit({"url": url})
    else:
        text.console().print(f"{url} (Ctrl-C ends it)", soft_wrap=True, markup=False)
    server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning", access_log=False))
    server.run(sockets=[listening])
