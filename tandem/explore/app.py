"""The explorer over HTTP: the page, and what it asks. None of these paths changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from tandem.explore.answers import Query as Asked
from tandem.explore.answers import answer, catalogue, hardware_choices, model_choices
from tandem.explore.measured import measured_rows
from tandem.explore.page import page
from tandem.explore.turns import Turns
from tandem.spec.errors import SpecError

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""The page is one file and asks only where it came from."""


async def _anybody() -> str:
    return ""


def router(*, prefix: str = "", client_of: Callable[..., Any] = _anybody, live: str | None = None) -> APIRouter:
    """Paths of the explorer below `prefix`. What the page asks passes the dependency `client_of`; `live` is where, from the
    page, a server tells of its workers."""
    routes = APIRouter(prefix=prefix, include_in_schema=False)
    turns = Turns()

    @routes.get("/", response_class=HTMLResponse)
    def index() -> HTMLResponse:
        return HTMLResponse(page(), headers=HEADERS)

    @routes.get("/api/catalogue", dependencies=[Depends(client_of)])
    def everything() -> JSONResponse:
        return JSONResponse(catalogue() | {"live": live})

    @routes.get("/api/plan", dependencies=[Depends(client_of)])
    def plan(
        model: str = Query(max_length=200),
        hardware: str = Query(max_length=100),
        gpus: int = 8,
        isl: int = 1024,
        osl: int = 256,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        backend: str | None = Query(None, max_length=20),
        budget_usd_per_hour: float | None = None,
        rough: bool = False,
        visit: str = Query("", max_length=64),
        move: int = Query(0, ge=0, le=2**53),
    ) -> Response:
        """A plan for where the sliders stand; 400 with one line where none can be. A page gives a `visit` of its own and counts
        its moves: what a later move of it overtakes before its turn has come is answered 204."""
        for name, value, known in (("model", model, model_choices()), ("hardware", hardware, hardware_choices())):
            if value not in known:  # no path of this machine's is among them
                return JSONResponse({"error": f"{name}={value[:80]!r}: not in the catalogue"}, 400)
        try:
            asked = Asked(
                model=model, hardware=hardware, gpus=gpus, isl=isl, osl=osl, ttft_s=ttft_s, tpot_s=tpot_s, backend=backend,
                budget_usd_per_hour=budget_usd_per_hour, rough=rough,
            )  # fmt: skip
        except SpecError as wrong:
            return JSONResponse({"error": str(wrong)}, 400)
        found = turns.take(visit, move, lambda: answer(asked))
        if found is None:
            return Response(status_code=204)
        return JSONResponse(found, 400 if "error" in found else 200)

    @routes.get("/api/measured", dependencies=[Depends(client_of)])
    def nearness() -> JSONResponse:
        return JSONResponse(measured_rows())

    return routes


def create_app() -> FastAPI:
    """The explorer alone."""
    app = FastAPI(title="Tandem explorer", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router())
    return app
