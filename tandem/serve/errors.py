"""Refusals and failures as the OpenAI API words them: one JSON shape, a status, never a stack trace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_FIELD = re.compile(r"[\w.\[\]]+[=:]")


class ApiError(Exception):
    """An answer that is no success. `param` is the field to change, `code` what programs may test for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON object `{"error": {message, type, param, code}}`."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return orjson.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def response(self) -> Response:
        """The whole HTTP answer."""
        return Response(self.body(), status_code=self.status, headers=self.headers, media_type="application/json")


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400. Without `param`, that is what stands before the first `=` or `:` of the message, if it is one word."""
    if param is None:
        head = message.partition(":")[0].partition("=")[0]
        param = head if head and " " not in head and len(head) < 100 else None
    return ApiError(400, message, param=param, code=code)


def refused(message: str) -> ApiError:
    """For what pools and engines say of a request that they do not serve.

    An error about the request begins with its field, as every SpecError does: status 400. Anything else is about them: 503.
    """
    if message.startswith("grammar."):  # which is how engines call what came in one of these fields
        return bad_request(message, param="tools" if message.startswith("grammar.kind=lark") else "response_format")
    if _FIELD.match(message):
        return bad_request(message)
    return ApiError(503, message, code="unavailable", headers={"retry-after": "1"})


def from_validation(errors: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """Status 400 for pydantic's errors: the one that lies deepest, its place written as in `messages[0].content`."""
    # Of what else may stand in a place, the kind of value that was given says most.
    error = max(errors, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    kind, shown = error["type"], _shown(error.get("input"))
    param = _place(error["loc"], body, missing=kind == "missing")
    if kind == "missing":
        return bad_request(f"{param}: is missing", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return bad_request(f"{param}={shown}: is not supported; leave it out", param=param, code="unknown_parameter")
    if kind == "union_tag_invalid":
        context = error["ctx"]
        name = f"{param}.{context['discriminator'].strip(chr(39))}"
        text = f"{name}={context['tag']!r}: must be {context['expected_tags'].replace(chr(39), '')}"
        return bad_request(" ".join(text.split())[:400], param=name, code="invalid_value")
    reason = " ".join(str(error["msg"]).split()).replace("Input should", "must")
    return bad_request(f"{param or 'body'}={shown}: {reason}", param=param, code="invalid_value")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(location: Sequence[str | int], body: object, *, missing: bool) -> str | None:
    """The parts of a location that are keys of the body; pydantic adds names of the types that it tried."""
    text, node = "", body
    for i, key in enumerate(location):
        if isinstance(node, dict) and isinstance(key, str) and (key in node or (missing and i == len(location) - 1)):
            text += f".{key}" if text else key
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            text += f"[{key}]"
            node = node[key]
    return text or None
