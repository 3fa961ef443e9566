"""Which HTTP requests reach the routes: Host and Origin, the API key, the size of a body and the time it takes.

For: whatever is decided before a route runs, in the order of cost. Not for: connections (`connections`), the fields of
bodies (`protocol`).

Without a key, a page on another site must not use the server: not by a simple POST (its Origin is another), and not
after its name's address was changed to ours (its Host is another; DNS rebinding).
"""

import asyncio
import ipaddress
import secrets
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffucoder.serving.edge import ApiError
from diffucoder.serving.settings import ServerSettings

OPEN_PATHS = ("/", "/health", "/ready", "/metrics", "/openapi.json")  # they need no key, and the page's files
OPEN_FOLDERS = ("/page/", "/canvas/")

# the browser must not load anything from elsewhere, show the page in another, or guess what a file is
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, for its programs alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Answers what must not reach `app`, and hands it whole bodies, and HEAD as GET (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        whole: list[Message] = []

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check(scope)
            body = await self._read(receive)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send_guarded)
            return
        if body is not None:
            whole.append({"type": "http.request", "body": body, "more_body": False})
            method = "GET" if is_head else scope["method"]
            await self.app({**scope, "method": method, "body_bytes": len(body)}, receive_whole, send_guarded)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request whose head says enough."""
        headers = Headers(scope=scope)
        if self.settings.api_key is None:
            self._check_site(headers, scope)
        elif scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_FOLDERS):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(token.strip().encode(), self.settings.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.settings.max_body:
            raise self._too_large()

    def _check_site(self, headers: Headers, scope: Scope) -> None:
        host = headers.get("host", "localhost").lower()  # only HTTP/1.0 has none, which no browser sends
        name = _name_of(f"//{host}")
        address = (scope.get("server") or ("",))[0]  # an address: no name of a stranger leads there
        if not (is_loopback(name) or name in self.settings.hosts or name == address):
            raise ApiError(
                403,
                f"the host {name[:100]!r} is not one that this server answers to without a key;"
                " serve with a key, or with --allowed-host NAME",
            )
        origin = headers.get("origin")
        if origin is None or origin in self.settings.cors or "*" in self.settings.cors:
            return
        site = _name_of(origin)
        if origin.partition("://")[2] != host and (is_loopback(site) or site not in self.settings.hosts):
            raise ApiError(403, f"pages of {origin[:100]!r} may not use this server; allow them with --cors ORIGIN")

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body; None if the client leaves before its end. Raises ApiError."""
        body = bytearray()
        timeout = self.settings.read_timeout
        try:
            async with asyncio.timeout(timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.settings.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {timeout:g} s; send it faster") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is over {self.settings.max_body:,} bytes; send less")


def _name_of(url: str) -> str:
    """The host of a URL, without its port; empty if there is none, or the port is not a number."""
    try:
        parts = urlsplit(url)
        return (parts.port != 0 and parts.hostname) or ""
    except ValueError:
        return ""
