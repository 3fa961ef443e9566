"""What holds for every HTTP request alike: how errors are answered, the API key, the size of a body.

Not for: the fields of a request (`protocol`) or the routes (`app`).
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffucoder.errors import DiffuCoderError
from diffucoder.serving.engine import BusyError, ClosingError, FailedError, LateError

_STATUSES: dict[type, int] = {BusyError: 429, ClosingError: 503, LateError: 408, FailedError: 500}
_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """An error that is answered in OpenAI's form."""

    status: int
    message: str
    param: str | None = None  # the field of the request that is wrong
    headers: dict[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, and of an event in a stream."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


def require_key(key: str) -> Callable[[Request], Awaitable[None]]:
    """Return a FastAPI dependency that rejects requests without this API key."""

    async def check(http: Request) -> None:
        scheme, _, token = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(token.strip().encode(), key.encode()):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})

    return check


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    async def answer(http: Request, error: Exception) -> Response:
        answered = api_error(error, f"{http.method} {http.url.path}")
        return JSONResponse(answered.body, answered.status, answered.headers)

    for kind in (ApiError, DiffuCoderError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def api_error(error: Exception, route: str = "") -> ApiError:
    """Return the answer to an error that a route raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DiffuCoderError):
        headers = {}
        if isinstance(error, BusyError | ClosingError):
            headers["Retry-After"] = f"{error.retry_after:.0f}"
        return ApiError(_STATUSES.get(type(error), 400), str(error), headers=headers)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, HTTPException):
        message = f"{route}: {error.detail}"
        if error.status_code == 400:  # FastAPI raises it for a body that its JSON parser cannot read
            message = "the body cannot be read; send JSON in UTF-8, not too deep, with numbers of sensible length"
        return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return ApiError(500, "the server made a mistake; its log has the reason")


def _invalid_body(error: RequestValidationError) -> ApiError:
    """Describe the first field that does not fit."""
    first = error.errors()[0]
    # pydantic's location also names the types it tried, such as str, constrained-str or list[TextPart]
    path = [str(part) for part in first["loc"][1:]]
    field = ".".join([part for part in path if part.isdigit() or (part.isidentifier() and part != "str")])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON from byte {first['loc'][-1]} on: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported here; leave it out", param=field)
    if not field and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return ApiError(400, "the body must be a JSON object, sent with 'Content-Type: application/json'")
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field or 'the request'}: {reason}", param=field or None)


def limit_body(app: ASGIApp, max_bytes: int) -> ASGIApp:
    """Wrap an application so that a route that reads a larger body gets an HTTPException, answered with 413."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise HTTPException(413, f"the request is over {max_bytes:,} bytes; send less")
            return message

        await app(scope, receive_counted, send)

    return limited
