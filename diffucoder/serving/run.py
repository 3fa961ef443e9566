"""A server process: the application under uvicorn, from the first request to a graceful end.

On SIGTERM or Ctrl-C nothing new is accepted, what was accepted is answered, and the process ends; a second one ends it
at once.
"""

import os
import sys
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from diffucoder.errors import ConfigError


def key_from(file: Path | None) -> str | None:
    """The API key in `file`, else in $DIFFUCODER_API_KEY, else none. Raises ConfigError for a file without one."""
    if file is None:
        return os.environ.get("DIFFUCODER_API_KEY") or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API key file {str(file)!r} cannot be read ({error}); check the path") from None
    if not key:
        raise ConfigError(f"API key file {str(file)!r} is empty; write the key into it")
    return key


def run(app: ASGIApp, *, host: str, port: int) -> None:
    """Serve `app` until told to stop. Raises ConfigError where the address cannot be had."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
    server = _Server(config)
    try:
        server.run()
    except SystemExit as error:
        if server.started:  # it is a signal's, and all was answered
            raise
        # uvicorn has said why it could not listen
        raise ConfigError(f"cannot listen on {host}:{port}; choose another --port, or 0 for any") from error


class _Server(uvicorn.Server):
    """Says where it listens, once it does, and that it was told to stop."""

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # sockets are passed on
        """Begin to listen."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = self.config.host if ":" not in self.config.host else f"[{self.config.host}]"
            print(f"listening on http://{host}:{port}, OpenAI's protocol under /v1", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # passed on
        """Answer what was accepted."""
        print(
            "stopping: nothing new is accepted, what was is answered; again to end at once", file=sys.stderr, flush=True
        )
        await super().shutdown(sockets)  # type: ignore[arg-type]
