"""How errors are answered, by every route alike.

Not for: which requests are let in (`guard`), the fields of a request (`protocol`) or the routes (`app`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

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
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"  # which `Guard` turns into a GET
        return ApiError(error.status_code, message, headers=headers)
    return ApiError(500, "the server made a mistake; its log has the reason")


def _invalid_body(error: RequestValidationError) -> ApiError:
    details = error.errors()
    # an unknown name first: if it is misspelt, it is the reason why another is missing
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    field = ".".join(map(str, _path(first)))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON from byte {first['loc'][-1]} on: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported here; leave it out", param=field)
    if not field and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return ApiError(400, "the body must be a JSON object, sent with 'Content-Type: application/json'")
    rivals = _closest(first, details)
    field = ".".join(map(str, _path(rivals[0])))
    reasons = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in rivals)
    return ApiError(400, f"{field or 'the request'}: {', or '.join(reasons)}", param=field or None)


Detail = dict[str, Any]  # Any: an error as pydantic describes it


def _is_field(part: str | int) -> bool:
    """Whether a part of a location is a field or an index, not a type that was tried, such as str or list[TextPart]."""
    return isinstance(part, int) or (part.isidentifier() and part != "str")


def _path(detail: Detail) -> list[str | int]:
    return [part for part in detail["loc"][1:] if _is_field(part)]


def _closest(first: Detail, details: Sequence[Detail]) -> list[Detail]:
    """The errors of the type that fits best, if the field of the `first` error may have several types."""
    tried = [number for number, part in enumerate(first["loc"]) if not _is_field(part)]
    if not tried:
        return [first]
    where = first["loc"][: tried[0]]
    rivals = [detail for detail in details if detail["loc"][: tried[0]] == where]

    def reach(detail: Detail) -> tuple[int, list[int]]:
        path = _path(detail)
        return len(path), [part for part in path if isinstance(part, int)]

    furthest = max(map(reach, rivals))
    rivals = [detail for detail in rivals if reach(detail) == furthest]
    return [detail for detail in rivals if not detail["type"].endswith("_type")] or rivals
