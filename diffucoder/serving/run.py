"""A server process: the application under uvicorn, and what is checked before a model is loaded for it.

On SIGTERM or Ctrl-C it accepts nothing new, answers what it has accepted, and ends with status 0. A second signal ends
it at once.
"""

import asyncio
import ctypes
import errno
import gc
import logging
import os
import re
import resource
import secrets
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffucoder.errors import ConfigError
from diffucoder.serving.connections import Connection
from diffucoder.serving.guard import is_loopback
from diffucoder.serving.settings import ServerSettings

_LOG = logging.getLogger("uvicorn.error")
_ACCESS = logging.getLogger("diffucoder.access")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#]+", re.IGNORECASE)
_NO_DESCRIPTOR = "socket.accept() out of system resource"  # asyncio's own words
_MOST_UNREAD = 2**28  # bytes of answers that clients have not read yet
_ARENA_MAX = -8  # the parameter of glibc's `mallopt`
_ARENAS = 2  # for the engine, and for everything else
_TRIMMED_EVERY = 10.0  # seconds
_KEY_BYTES = 4096  # a larger file is not a key


def read_api_key(file: Path | None) -> str | None:
    """Return the API key in `file`, else in $DIFFUCODER_API_KEY, else None. Raises ConfigError for a bad file."""
    if file is None:
        key = os.environ.get("DIFFUCODER_API_KEY")
        if key is not None and not key.strip():
            raise ConfigError("$DIFFUCODER_API_KEY is empty; set it to the key, or unset it to serve without one")
        return key
    try:
        with file.open("rb") as opened:
            key = opened.read(_KEY_BYTES).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"API key file {str(file)!r} cannot be read ({reason}); check the path") from None
    if not key:
        raise ConfigError(f"API key file {str(file)!r} is empty; write the key into it")
    return key


def check_exposure(host: str, settings: ServerSettings, no_key: bool) -> None:
    """Raise ConfigError if others than this machine's users could use the server without a key, or by a mistake."""
    if settings.api_key is not None and no_key:
        raise ConfigError("--no-key, but there is a key; leave out one of them ($DIFFUCODER_API_KEY is one too)")
    if settings.api_key is None and not no_key and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines use the server, and there is no key; give one by --api-key-file or"
            " $DIFFUCODER_API_KEY, or add --no-key"
        )


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen at this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:
        way_out = "give --host an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            way_out = "choose another --port, or 0 for any"
        reason = getattr(error, "strerror", None) or "not a host name"
        raise ConfigError(f"cannot listen on {host}:{port} ({reason.partition(' (')[0]}); {way_out}") from None


def check_origins(origins: tuple[str, ...]) -> None:
    """Raise ConfigError for a --cors that no browser could send as its Origin."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors {origin!r} is not an origin; write scheme and host, as in https://example.org, or *"
            )


class AccessLog:
    """An application that logs a line for each request: method, route, status, time and id. No text, and no key."""

    def __init__(self, app: Any) -> None:  # Any: an application with routes
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        name = secrets.token_hex(4)
        status = "closed"  # by the client, before an answer began

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            milliseconds = 1000 * (time.perf_counter() - start)
            matching = (route.path for route in self.app.routes if route.matches(scope)[0] != Match.NONE)
            route = next(matching, "(no route)")  # not the path, in which a client may have put anything
            _ACCESS.info("%s %s %s %.0f ms %s", scope["method"], route, status, milliseconds, name)


def run(app: ASGIApp, settings: ServerSettings, *, host: str, port: int, log_level: str = "error") -> None:
    """Serve `app` until a signal ends it. Raises ConfigError if the address is not available.

    With `log_level` "info" or "debug" each request is logged.
    """
    limit_arenas()
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        descriptors = 2**20
    most = settings.max_connections or max(512, 2 * (settings.engine.max_batch + settings.engine.max_waiting))
    connection = partial(Connection, settings=settings, most=min(most, descriptors // 2))
    level = getattr(logging, log_level.upper())
    config = uvicorn.Config(
        AccessLog(app) if level <= logging.INFO else app,
        host=host,
        port=port,
        http=connection,  # type: ignore[arg-type]  # makes one for each connection
        ws="none",
        backlog=max(1, min(128, descriptors // 8)),  # asyncio accepts as many at once
        proxy_headers=False,
        log_level="critical",  # until it listens: the error of an address is ours
        access_log=False,
        timeout_graceful_shutdown=int(settings.engine.deadline) + 1,
    )
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    _ACCESS.setLevel(level)
    server = _Server(config)
    try:
        server.run()
    except SystemExit:
        if not server.started:
            check_address(host, port)
        raise


def limit_arenas() -> None:
    """Let all threads share few arenas: glibc keeps what a thread used once in an arena of its own, up to 8 a core."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, _ARENAS)


def return_memory() -> None:
    """Give memory that nothing uses back to the system. Else a server stays as large as at its largest requests."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def announce(host: str, port: int) -> None:
    """Print the address on standard error; scripts wait for this line."""
    if ":" in host:
        host = f"[{host}]"
    print(f"listening on http://{host}:{port}, OpenAI's protocol under /v1", file=sys.stderr, flush=True)


def restore_signals() -> None:
    """Let the next SIGTERM or Ctrl-C end the process at once, whatever it does."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)


class _Server(uvicorn.Server):
    """Prints where it listens and that it is stopping, and closes connections of clients that are too slow."""

    _reported = -60.0  # when a lack of descriptors was reported

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # sockets: unused
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        _LOG.setLevel(_ACCESS.level)
        asyncio.get_running_loop().set_exception_handler(self._report)
        gc.freeze()  # else each body of many small values makes the collector look at all of torch's objects
        self._watcher = asyncio.create_task(self._watch())
        announce(self.config.host, self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # unused
        print("stopping: accepted requests are still answered; a second signal stops at once", file=sys.stderr)
        await super().shutdown(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        restore_signals()

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:  # Any: as asyncio has it
        """Report an error of the event loop; a lack of descriptors in one line now and then."""
        if context["message"] != _NO_DESCRIPTOR:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._reported > 60:
            self._reported = time.monotonic()
            _LOG.error("no descriptor is free for a connection; raise the limit (ulimit -n)")

    async def _watch(self) -> None:
        trimmed = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            if time.monotonic() - trimmed > _TRIMMED_EVERY:
                await asyncio.to_thread(return_memory)
                trimmed = time.monotonic()
            unread = {}
            for connection in tuple(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.end_if_late()
                unread[connection] = connection.transport.get_write_buffer_size()
            if sum(unread.values()) > _MOST_UNREAD:
                max(unread, key=unread.__getitem__).transport.abort()
