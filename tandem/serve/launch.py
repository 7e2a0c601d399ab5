"""From the options of `tandem serve` to a listening server: workplace, pools, controller, application."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from tandem.sched.route import LOCAL_TOKENS, Role, RoutingLimits
from tandem.serve.app import MakeRouter, create_app
from tandem.serve.auth import ApiKeys
from tandem.serve.config import ServeConfig
from tandem.serve.controller import Controller
from tandem.serve.emulation import DEFAULT_TOKENS, Emulating
from tandem.serve.metrics import Metrics
from tandem.serve.options import Emulation, Scaling, ServeOptions, as_planned, deployment_of, read_plan
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.pool_metrics import PoolMetrics
from tandem.serve.pools import Pools
from tandem.serve.scaling import make_controller
from tandem.serve.server import open_socket, run_server
from tandem.serve.workplaces import Computing, Workplace
from tandem.spec.errors import SpecError, TandemError

__all__ = [
    "Emulation",
    "Launched",
    "Scaling",
    "ServeOptions",
    "as_planned",
    "deployment_of",
    "log_to_stderr",
    "read_plan",
    "run",
]
log = logging.getLogger("tandem.serve")
_LOGGERS = {
    "tandem": logging.INFO,
    "uvicorn.error": logging.WARNING,
    "asyncio": logging.WARNING,
    "py.warnings": logging.WARNING,
}
"""Whose lines are shown, from which level on."""


def log_to_stderr(*, as_json: bool) -> None:
    """Log lines of the server on stderr, as text or as one JSON object each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name, level in _LOGGERS.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One record as one line."""
        data = {"time_s": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            data["error"] = self.formatException(record.exc_info)
        return json.dumps(data)


class Launched:
    """Workers and application of one server, made from its options. They start and end with the application."""

    def __init__(self, options: ServeOptions, routers: Sequence[MakeRouter] = ()) -> None:
        self.options = o = options
        self._files = ExitStack()
        self.failure: Exception | None = None
        """Why the workers do not start."""
        self.controller: Controller | None = None
        """Scales the workers once they are up; None where nobody asked for that."""
        metrics = Metrics()
        keys = None if o.api_keys is None else ApiKeys.from_file(o.api_keys)
        self.place: Workplace = Computing(o) if o.emulation is None else Emulating(o, o.emulation)
        spec = self.place.spec
        if o.max_context is not None and o.max_context > spec.max_context:
            raise SpecError(f"max_context={o.max_context}: the model's context holds {spec.max_context:,} tokens")
        last: Role = "decode" if o.prefill else "colocated"
        roles: list[Role] = ["prefill"] * o.prefill
        roles += [last] * o.decode
        limits = PoolLimits(max_waiting=o.max_waiting, routing=RoutingLimits(max_local_tokens=LOCAL_TOKENS))
        self.pools = Pools(
            [(self.place.worker(role), role) for role in roles],
            times=self.place.times,
            limits=limits,
            observer=PoolMetrics(metrics),
        )
        tokens = None if o.emulation is None else DEFAULT_TOKENS
        self.app = create_app(
            self.pools,
            model_name=o.name,
            tokenizer=self.place.tokenizer,
            config=ServeConfig(keys=keys, max_in_flight=o.max_waiting, default_max_tokens=tokens),
            metrics=metrics,
            lifespan=self._lifespan,
            workers=self.pools,
            controller=lambda: self.controller,
            routers=routers,
        )

    def ready_line(self, url: str) -> dict[str, Any]:
        """What is printed once clients can connect."""
        o = self.options
        counts: dict[str, Any] = {"prefill": o.prefill, "decode": o.decode, "threads": o.worker_threads}
        if o.emulation is not None:
            counts["emulated"] = o.emulation.deployment.hardware
        return {"url": url, "model": o.name, **counts, "max_context": self.pools.max_context, "pid": os.getpid()}

    def _scale_log(self, scaling: Scaling) -> Callable[[str], None]:
        if scaling.log is None:
            return lambda line: None
        try:
            file = self._files.enter_context(scaling.log.open("a", encoding="utf-8", buffering=1))
        except OSError as wrong:
            self.failure = SpecError(f"scale_log={str(scaling.log)!r}: cannot be written ({wrong.strerror})")
            raise self.failure from None
        return lambda line: print(line, file=file)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            began_s = time.monotonic()
            try:
                await self.pools.start()
            except TandemError as wrong:
                self.failure = wrong
                raise
            if self.options.scaling is not None:
                took_s = time.monotonic() - began_s
                record = self._scale_log(self.options.scaling)
                scaling = self.options.scaling
                self.controller = make_controller(self.pools, self.place, scaling, took_s=took_s, record=record)
                self.controller.run()
            yield
        finally:
            if self.controller is not None:
                await self.controller.close()
            await self.pools.close()
            self.place.close()
            self._files.close()


def run(options: ServeOptions, *, on_ready: Callable[[dict[str, Any]], None], routers: Sequence[MakeRouter] = ()) -> None:
    """Serve until SIGTERM or SIGINT, and return once all is drained; `routers` are more paths (`create_app`)."""
    open_socket(options.host, options.port).close()  # To say so before a model is loaded, if it cannot be had.
    launched = Launched(options, routers)

    def listening(url: str) -> None:
        gc.collect()
        gc.freeze()  # what is there by now stays: looking through it again and again would hold up streams
        on_ready(launched.ready_line(url))

    def starts(_: logging.LogRecord) -> bool:
        return launched.failure is None

    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(starts)
    try:
        run_server(
            launched.app,
            host=options.host,
            port=options.port,
            drain_s=options.drain_s,
            on_listening=listening,
        )
    except SystemExit:
        if launched.failure is None:
            raise
    finally:
        uvicorn_log.removeFilter(starts)
    if launched.failure is not None:
        text = " ".join(str(launched.failure).split())
        named = text.removeprefix("SpecError: ")
        raise SpecError(named if named != text else f"workers={options.workers!r}: do not start ({text})")
