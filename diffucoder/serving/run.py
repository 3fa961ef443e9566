"""A server process: the application under uvicorn.

On SIGTERM or Ctrl-C it accepts nothing new, answers what it has accepted, and ends. A second signal ends it at once.
"""

import os
import sys
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from diffucoder.errors import ConfigError


def read_api_key(file: Path | None) -> str | None:
    """Return the API key in `file`, else in $DIFFUCODER_API_KEY, else None. Raises ConfigError for a bad file."""
    if file is None:
        return os.environ.get("DIFFUCODER_API_KEY") or None
    try:
        key = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API key file {str(file)!r} cannot be read ({error}); check the path") from None
    if not key:
        raise ConfigError(f"API key file {str(file)!r} is empty; write the key into it")
    return key


def run(app: ASGIApp, *, host: str, port: int) -> None:
    """Serve `app` until a signal ends it. Raises ConfigError if the address is not available."""
    server = _Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
    try:
        server.run()
    except SystemExit as error:
        if server.started:
            raise
        # uvicorn has printed why it could not listen
        raise ConfigError(f"cannot listen on {host}:{port}; choose another --port, or 0 for any") from error


def announce(host: str, port: int) -> None:
    """Print the address on standard error; scripts wait for this line."""
    if ":" in host:
        host = f"[{host}]"
    print(f"listening on http://{host}:{port}, OpenAI's protocol under /v1", file=sys.stderr, flush=True)


class _Server(uvicorn.Server):
    """Prints where it listens, and that it is stopping."""

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # sockets: unused
        """Begin to listen."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            announce(self.config.host, self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # unused
        """Answer what was accepted."""
        print("stopping: accepted requests are still answered; a second signal stops at once", file=sys.stderr)
        await super().shutdown(sockets)  # type: ignore[arg-type]
