"""Around the routes: how errors are said, who may ask, how much may be sent.

For: every request alike. Not for: what is asked (`protocol`) and answered (`app`).
"""

import secrets
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffucoder.errors import DiffuCoderError
from diffucoder.serving.engine import BusyError, ClosingError, FailedError, LateError


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}

    @property
    def response(self) -> JSONResponse:
        """What is sent."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: DiffuCoderError) -> ApiError:
    """How an error of ours is said to clients."""
    if isinstance(error, BusyError):
        return ApiError(429, str(error), kind="rate_limit_error", Retry_After=f"{error.retry_after:.0f}")
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), kind="server_error", Retry_After="5")
    if isinstance(error, LateError):
        return ApiError(408, str(error), kind="timeout_error")
    if isinstance(error, FailedError):
        return ApiError(500, str(error), kind="server_error")
    return ApiError(400, str(error), kind="invalid_request_error")


def authorised(key: str) -> Callable[[Request], None]:
    """What lets only those pass who send `key`."""

    async def check(http: Request) -> None:
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, kind="authentication_error", WWW_Authenticate="Bearer")

    return check  # type: ignore[return-value]  # FastAPI awaits it


def add_errors(app: FastAPI) -> None:
    """Say every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def own(_: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(DiffuCoderError)
    async def ours(_: Request, error: DiffuCoderError) -> Response:
        return api_error(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        # pydantic names what it tried as well as where: constrained-str, function-after[...]
        parts = [str(part) for part in found["loc"][1:] if isinstance(part, int) or part.isidentifier()]
        where, told = ".".join(parts), found["msg"].removeprefix("Value error, ")
        if found["type"] == "json_invalid":
            where, message = "", f"the body is no JSON, from byte {found['loc'][-1]} on: {found['ctx']['error']}"
        elif not where and found["type"] in ("missing", "model_attributes_type", "dict_type"):
            message = "the body must be a JSON object, sent with 'Content-Type: application/json'"
        elif found["type"] == "extra_forbidden":
            message = f"{where} is not supported here; leave it out"
        else:
            message = f"{where or 'the request'}: {told}"
        return ApiError(400, message, kind="invalid_request_error", param=where or None).response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return ApiError(500, "the server made a mistake; its log has the reason", kind="server_error").response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        status = error.status_code
        if status == 400:  # FastAPI's, of a body that its parser gave up
            message = "the body cannot be read; send JSON in UTF-8, not too deep, with numbers of sensible length"
        found = ApiError(status, message, kind="invalid_request_error")
        found.headers |= dict(error.headers or {})
        return found.response


class BodyLimit:
    """Reads bodies, and refuses those that are too large, said or sent, before they are read to the end."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = ApiError(413, f"the request is over {self.most:,} bytes; send less", kind="invalid_request_error")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.most:
            await refusal.response(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= self.most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self.most:
            await refusal.response(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, send)
