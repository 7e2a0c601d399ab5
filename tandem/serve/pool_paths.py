"""The paths by which people see the workers, and pause and resume the controller that scales them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response

from tandem.serve import responses
from tandem.serve.controller import Controller, workers_of
from tandem.serve.errors import ApiError
from tandem.serve.pools import Pools
from tandem.serve.recent import Recent


def add_pool_paths(
    app: FastAPI,
    pools: Pools,
    controller: Callable[[], Controller | None],
    *,
    clock: Callable[[], float],
    client_of: Callable[..., Any],
    refusals: dict[int | str, dict[str, Any]],
) -> None:
    """GET /pools, POST /pools/pause and /pools/resume, for those who may ask for answers too."""

    recent = Recent(clock)
    pools.watch(recent)

    def state() -> dict[str, Any]:
        found = controller()
        scaled = {"mode": "off", "changing": False, "decisions": []} if found is None else found.state()
        return {**scaled, "at_s": clock(), "workers": workers_of(pools), "recent": recent.to_json()}

    def scaled() -> Controller:
        found = controller()
        if found is None:
            raise ApiError(409, "scaling: is off; start the server with --scale", code="scaling_off")
        return found

    @app.get("/pools", response_model=responses.PoolState, tags=["pools"], responses=refusals)
    async def show(client: str = Depends(client_of)) -> Response:
        """Workers, and what was decided about their number last."""
        return JSONResponse(state())

    def ours(request: Request) -> None:
        """Refuse what a page of another site has a visitor's browser send; programs send no Origin."""
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise ApiError(403, f"origin={origin[:100]!r}: pages of other sites may change nothing here", code="cross_site")

    @app.post("/pools/pause", response_model=responses.PoolState, tags=["pools"], responses=refusals)
    async def pause(request: Request, client: str = Depends(client_of)) -> Response:
        """Change workers no more; changes under way are finished."""
        ours(request)
        scaled().pause()
        return JSONResponse(state())

    @app.post("/pools/resume", response_model=responses.PoolState, tags=["pools"], responses=refusals)
    async def resume(request: Request, client: str = Depends(client_of)) -> Response:
        """Go on with scaling."""
        ours(request)
        scaled().resume()
        return JSONResponse(state())
