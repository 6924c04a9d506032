"""HTTP in OpenAI's terms: reading bodies, sending answers, and giving every error its shape.

That includes unknown routes, wrong methods and bugs. JSON is sent as ASCII, so that any text a
client sent can be quoted in an error.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from r1ray.errors import ServingError
from r1ray.serving.parsing import error_body

__all__ = ["MAX_BODY_BYTES", "add_error_handlers", "json_response", "read_body", "respond"]

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
RETRY_AFTER_S = 1


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body of `request`.

    Raises:
        ServingError: 413 when it is larger than `max_bytes`, 408 when it takes longer to come
            than BODY_TIMEOUT_S.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise ServingError(
                        f"the request body is larger than {max_bytes} bytes; shorten it",
                        status=413,
                        code="request_too_large",
                    )
    except TimeoutError as error:
        raise ServingError(
            f"the request body did not come within {BODY_TIMEOUT_S:g} s",
            status=408,
            code="timeout",
        ) from error
    return bytes(body)


def json_response(
    body: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`body` as JSON."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


def respond(answer: dict[str, Any] | AsyncIterator[str]) -> Response:
    """A JSON answer, or a stream of server-sent events."""
    if isinstance(answer, dict):
        return json_response(answer)
    return StreamingResponse(
        answer, media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


def add_error_handlers(app: FastAPI) -> None:
    """Make every error that leaves `app` an OpenAI error body."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


async def _on_serving_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return json_response(error_body(error), error.status, _headers(error.status))


def _headers(status: int) -> dict[str, str] | None:
    if status == 401:
        return {"www-authenticate": "Bearer"}
    return {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else None


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        translated = ServingError(f"unknown request URL: {where}", status=404, code="unknown_url")
    elif error.status_code == 405:
        translated = ServingError(
            f"method not allowed: {where}", status=405, code="method_not_supported"
        )
    else:
        translated = ServingError(str(error.detail), status=error.status_code)
    return json_response(error_body(translated), error.status_code, error.headers)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    """Starlette logs what went wrong; the client learns only that something did."""
    bug = ServingError("internal error", status=500, code="internal_error")
    return json_response(error_body(bug), 500)
