"""From the bytes of a request to a valid body, within limits of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from tandem.serve.errors import ApiError, bad_request, from_validation

Model = TypeVar("Model", bound=BaseModel)
_CLOSE = {"connection": "close"}  # What was not read cannot be told from a next request.


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The body, refused as soon as it is known to be no JSON (400), too long (413) or too slow (408)."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise bad_request(f"content-type={kind[:60]!r}: must be application/json", param="content-type")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if "charset" in parameters.lower() and charset not in ("utf-8", "utf8"):
        raise bad_request(f"content-type={parameters.strip()[:60]!r}: must be utf-8", param="content-type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise bad_request("content-encoding: must be left out; send the body as it is", param="content-encoding")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > max_bytes:
        raise _too_long(max_bytes)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_long(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"body: did not arrive within {timeout_s:g} seconds", code="timeout", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ApiError(400, "body: the connection was closed before it was complete", headers=_CLOSE) from None
    return b"".join(chunks)


def parse_body(model: type[Model], raw: bytes) -> Model:
    """The body as an object. Raises ApiError with status 400 that names the field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as wrong:
        errors = wrong.errors(include_url=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        raise bad_request(f"body: is no JSON in UTF-8 ({first['ctx']['error']})", code="invalid_json")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    raise from_validation(errors, body)


def _too_long(max_bytes: int) -> ApiError:
    message = f"body: is longer than the {max_bytes:,} bytes that this server takes"
    return ApiError(413, message, code="request_too_large", headers=_CLOSE)
