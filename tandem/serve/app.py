"""The HTTP application: OpenAI's chat, completions and models over whatever serves the model."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from asyncio import to_thread
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem._version import __version__
from tandem.model.tokenizer import Tokenizer
from tandem.serve import responses
from tandem.serve.bodies import parse_body, read_body
from tandem.serve.config import ServeConfig
from tandem.serve.controller import Controller
from tandem.serve.errors import ApiError, bad_request, refused
from tandem.serve.frontend import Frontend
from tandem.serve.generation import Generation, Serving
from tandem.serve.limits import Limits
from tandem.serve.metrics import CONTENT_TYPE, Metrics
from tandem.serve.pool_paths import add_pool_paths
from tandem.serve.pools import Pools
from tandem.serve.requests import Preparer, Work
from tandem.serve.schemas import ChatRequest, CompletionRequest, Sampling
from tandem.serve.tracing import Tracing
from tandem.spec.errors import SpecError

log = logging.getLogger("tandem.serve")
_IN_PLACE_BYTES = 16_384
"""Longer bodies are turned into prompts in a thread, so that the streams of others go on."""
_REFUSALS = {
    400: "A field has a value that will not do; `param` names it.",
    401: "No API key, or one that is not known.",
    404: "The model is not served here.",
    403: "A page of another site asks.",
    409: "There is no controller to pause.",
    408: "The body took too long to arrive.",
    413: "The body is too long.",
    429: "Too much is running or waiting; Retry-After says how long to wait.",
    500: "Something went wrong here.",
    503: "The server is starting or about to stop; Retry-After says how long to wait.",
}
MakeRouter = Callable[[Callable[..., Any]], APIRouter]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def create_app(
    frontend: Frontend,
    *,
    model_name: str,
    tokenizer: Tokenizer,
    config: ServeConfig | None = None,
    metrics: Metrics | None = None,
    clock: Callable[[], float] = time.monotonic,
    lifespan: Lifespan | None = None,
    workers: Pools | None = None,
    controller: Callable[[], Controller | None] = lambda: None,
    routers: Sequence[MakeRouter] = (),
) -> FastAPI:
    """The application; `app.state.serving` is what `run_server` drains. `clock` counts seconds. With `workers` there are paths
    that tell of them, and of the controller that scales them, if there is one. `routers` are more paths, each made with the
    dependency that says who asks.

    Raises SpecError if `config` asks for a chat template that the model does not have.
    """
    config, metrics = config or ServeConfig(), metrics or Metrics()
    known = hashlib.sha256(f"{__version__} {model_name}".encode()).hexdigest()[:12]
    serving = Serving(
        frontend=frontend,
        limits=Limits(config, others=lambda: frontend.in_flight),
        metrics=metrics,
        tracing=Tracing(model_name),
        clock=clock,
        model_name=model_name,
        fingerprint=config.fingerprint or f"fp_{known}",
    )
    preparer = Preparer(model_name=model_name, tokenizer=tokenizer, config=config, max_context=lambda: frontend.max_context)
    app = FastAPI(title="Tandem", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.serving = serving
    app.add_exception_handler(ApiError, _show_refusal)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_middleware(Guard)
    _add_status(app, serving)
    _add_models(app, serving, config)
    _add_generation(app, serving, preparer, config)
    if workers is not None:
        add_pool_paths(app, workers, controller, clock=clock, client_of=_client_of(config), refusals=_refusals(401, 403, 409))
    for pages in routers:
        app.include_router(pages(_client_of(config)))
    _describe(app)
    return app


def _add_status(app: FastAPI, serving: Serving) -> None:
    @app.get("/health", response_model=responses.Status, tags=["status"])
    async def health() -> Response:
        """Whether the process is alive."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=responses.Status, tags=["status"], responses=_refusals(503))
    async def ready() -> Response:
        """Whether requests can be served now."""
        _check_ready(serving)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["status"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(serving.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_models(app: FastAPI, serving: Serving, config: ServeConfig) -> None:
    created, client_of = int(time.time()), _client_of(config)

    def card() -> dict[str, Any]:
        try:
            max_context = serving.frontend.max_context
        except SpecError as wrong:  # Pools know it when their workers are up.
            raise refused(f"the server is not ready ({wrong})") from None
        return {
            "id": serving.model_name,
            "object": "model",
            "created": created,
            "owned_by": "tandem",
            "max_model_len": max_context,
        }

    @app.get("/v1/models", response_model=responses.ModelList, tags=["models"], responses=_refusals(401, 503))
    async def models(client: str = Depends(client_of)) -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}", response_model=responses.ModelCard, tags=["models"], responses=_refusals(401, 404, 503))
    async def model(name: str, client: str = Depends(client_of)) -> Response:
        """One model, by its name."""
        if name != serving.model_name:
            message = f"model={name[:100]!r}: is not served here; {serving.model_name!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(card())


def _add_generation(app: FastAPI, serving: Serving, preparer: Preparer, config: ServeConfig) -> None:
    client_of = _client_of(config)

    async def answer(request: Request, client: str, model: type[Sampling], prepare: Callable[[Any, str], Work]) -> Response:
        _check_ready(serving, wait_s=config.retry_after_s)
        raw = await read_body(request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)

        def work() -> Work:
            body = parse_body(model, raw)
            return prepare(body, client or body.user or "")

        try:
            return Generation(serving, work() if len(raw) <= _IN_PLACE_BYTES else await to_thread(work))
        except SpecError as wrong:
            raise bad_request(str(wrong)) from None

    @app.post("/v1/chat/completions", tags=["generation"], **_described(ChatRequest, responses.ChatCompletion))
    async def chat(request: Request, client: str = Depends(client_of)) -> Response:
        """The next message of a conversation. With `stream`, events whose data are chunks, then `[DONE]`."""
        return await answer(request, client, ChatRequest, preparer.chat)

    @app.post("/v1/completions", tags=["generation"], **_described(CompletionRequest, responses.Completion))
    async def completions(request: Request, client: str = Depends(client_of)) -> Response:
        """How a text goes on. With `stream`, events whose data are chunks, then `[DONE]`."""
        return await answer(request, client, CompletionRequest, preparer.completion)


def _client_of(config: ServeConfig) -> Callable[..., Any]:
    """Who asks: the name of the API key, "" where everybody may ask."""
    if config.keys is None:

        async def anybody() -> str:
            return ""

        return anybody
    keys = config.keys

    async def known(given: HTTPAuthorizationCredentials | None = Depends(HTTPBearer(auto_error=False))) -> str:  # noqa: B008
        name = None if given is None else keys.name_of(given.credentials)
        if name is None:
            message = "authorization: must be 'Bearer' and an API key that this server knows"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return name

    return known


def _check_ready(serving: Serving, *, wait_s: int = 1) -> None:
    if serving.draining or not serving.frontend.ready:
        why = "is about to stop" if serving.draining else "is not ready"
        message = f"the server {why}; try again in {wait_s} s"
        raise ApiError(503, message, code="not_ready", headers={"retry-after": str(wait_s)})


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": responses.ErrorBody, "description": _REFUSALS[status]} for status in statuses}


def _described(body: type[Sampling], whole: type[responses.Answer]) -> dict[str, Any]:
    """What a route says of itself: bodies are read by `read_body`, so FastAPI cannot see them."""
    reference = {"$ref": f"#/components/schemas/{body.__name__}"}
    data = {"type": "string", "description": "JSON of a chunk as OpenAI's API has it, an error, or [DONE]"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    stream = {"text/event-stream": {"schema": event}}
    return {
        "response_model": whole,
        "responses": {200: {"content": stream}, **_refusals(*(status for status in _REFUSALS if status not in (403, 409)))},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}},
    }


def _describe(app: FastAPI) -> None:
    """Add the schemas of request bodies to the OpenAPI description."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            bodies = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
            _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


async def _show_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"{request.url.path[:100]}: there is nothing here", 405: f"{request.method}: is not allowed here"}
    shown = ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=error.headers)
    return shown.response()


class Guard:
    """Answers 500, with a number that the log has too, where anything fails that nobody has foreseen."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted if scope["type"] == "http" else send)
        except Exception:
            if scope["type"] != "http":
                raise
            name = secrets.token_hex(8)
            log.exception("request %s failed", name)
            if not begun:
                error = ApiError(500, f"something went wrong here; the server's log has it as {name}", code="internal")
                await error.response()(scope, receive, send)
