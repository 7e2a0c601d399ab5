"""The paths by which people see the workers, and pause and resume the controller that scales them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI
from starlette.responses import JSONResponse, Response

from tandem.serve import responses
from tandem.serve.controller import Controller, workers_of
from tandem.serve.errors import ApiError
from tandem.serve.pools import Pools


def add_pool_paths(
    app: FastAPI,
    pools: Pools,
    controller: Callable[[], Controller | None],
    *,
    client_of: Callable[..., Any],
    refusals: dict[int | str, dict[str, Any]],
) -> None:
    """GET /pools, POST /pools/pause and /pools/resume, for those who may ask for answers too."""

    def state() -> dict[str, Any]:
        found = controller()
        if found is None:
            return {"mode": "off", "changing": False, "workers": workers_of(pools), "decisions": []}
        return found.state()

    def scaled() -> Controller:
        found = controller()
        if found is None:
            raise ApiError(409, "scaling: is off; start the server with --scale", code="scaling_off")
        return found

    @app.get("/pools", response_model=responses.PoolState, tags=["pools"], responses=refusals)
    async def show(client: str = Depends(client_of)) -> Response:
        """Workers, and what was decided about their number last."""
        return JSONResponse(state())

    @app.post("/pools/pause", response_model=responses.PoolState, tags=["pools"], responses=refusals)
    async def pause(client: str = Depends(client_of)) -> Response:
        """Change workers no more; changes under way are finished."""
        scaled().pause()
        return JSONResponse(state())

    @app.post("/pools/resume", response_model=responses.PoolState, tags=["pools"], responses=refusals)
    async def resume(client: str = Depends(client_of)) -> Response:
        """Go on with scaling."""
        scaled().resume()
        return JSONResponse(state())
