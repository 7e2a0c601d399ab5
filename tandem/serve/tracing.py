"""A span for each answer, where OpenTelemetry is installed and a provider of spans has been set; otherwise nothing."""

from __future__ import annotations

import importlib
from typing import Any


class Tracing:
    """Asks OpenTelemetry once, when it is made. Attributes follow the conventions for generative AI (`gen_ai.*`)."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._tracer: Any = None
        try:
            trace = importlib.import_module("opentelemetry.trace")
        except ImportError:
            return
        kind = type(trace.get_tracer_provider()).__name__
        if kind not in ("ProxyTracerProvider", "NoOpTracerProvider"):
            self._tracer = trace.get_tracer("tandem.serve")

    def record(
        self, request_id: str, *, start_ns: int, e2e_s: float, ttft_s: float | None, finish_reason: str, isl: int, osl: int
    ) -> None:
        """One answer that has ended; `start_ns` is when it arrived, in nanoseconds since 1970."""
        if self._tracer is None:
            return
        attributes: dict[str, Any] = {
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.id": request_id,
            "gen_ai.response.finish_reasons": [finish_reason],
            "gen_ai.usage.input_tokens": isl,
            "gen_ai.usage.output_tokens": osl,
        }
        if ttft_s is not None:
            attributes["gen_ai.server.time_to_first_token"] = ttft_s
        span = self._tracer.start_span("generate", start_time=start_ns, attributes=attributes)
        span.end(end_time=start_ns + int(e2e_s * 1e9))
