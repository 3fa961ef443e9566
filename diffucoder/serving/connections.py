"""Connections of the server process: uvicorn's, with limits on their number and on how long a client is waited for.

Whatever a client does not do in time, it holds a connection for a bounded time: send a head, send a body, read an
answer, close its side. When there are too many connections, the one whose client is waited for longest is closed, so
that idle ones cannot keep others out.
"""

import asyncio
import select
import time
from collections.abc import Hashable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffucoder.serving.settings import ServerSettings

_FREE_CHUNKS = 1024  # chunks of a body that may be of any size; the mean of the others is at least _SMALLEST_MEAN bytes
_SMALLEST_MEAN = 64
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class _Parser(h11.Connection):
    """Rejects a body in many tiny chunks, each of which costs as much time as a large one."""

    too_small = False  # the chunks of this request
    _chunks = 0
    _size = 0

    def next_event(self) -> Any:  # Any: as h11 has it
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._size = 0
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._size += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._size // _SMALLEST_MEAN:
                self.too_small = True
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class _Transport:
    """A transport that is closed only after what the client still sends was read, or the answer would be lost."""

    def __init__(self, transport: asyncio.Transport, connection: "Connection") -> None:
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:  # Any: an attribute of the transport
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.discards or self._transport.is_closing()

    def close(self) -> None:
        if self._connection.more_is_coming() and not self.is_closing():
            self._connection.discards = True
            try:
                self._transport.write_eof()
            except OSError:  # the client is gone
                self._transport.close()
            self._transport.resume_reading()
        elif not self._connection.discards:
            self._transport.close()


class Connection(H11Protocol):
    """One connection of a client."""

    def __init__(self, *, settings: ServerSettings, most: int, **kwargs: Any) -> None:  # Any: uvicorn's own
        super().__init__(**kwargs)
        self.settings = settings
        self.most = most  # connections of the server
        self.conn: _Parser = _Parser(h11.SERVER)
        self.discards = False  # the answer is complete, and what the client still sends is not looked at
        self.since = time.monotonic()  # when the client began to do what it does now
        self._activity: Hashable = None  # what `waits_for` returned last
        self._reads = 0  # times that the client made room for more of an answer
        self._broken = False  # what the client sent is not HTTP

    def more_is_coming(self) -> bool:
        """Whether the client is in the middle of a body, or of something that is not HTTP."""
        return self._broken or (self.cycle is not None and self.cycle.more_body)

    def waits_for(self) -> Hashable:
        """What the client has to do next, different for each time; None while the server has to answer."""
        if self.transport.is_closing():
            return "end"
        if self.flow.write_paused:
            return "read", self._reads, self.transport.get_write_buffer_size() // 2**16
        if self.cycle is None or self.cycle.response_complete:
            return "head", self.cycle
        if self.cycle.more_body:
            return "body", self.cycle
        return None

    def end_if_late(self) -> None:
        """Close the connection if the client has not done for too long what it has to do. Call this regularly."""
        now = time.monotonic()
        activity = self.waits_for()
        if activity != self._activity:
            self._activity = activity
            self.since = now
        timeout = self.settings.read_timeout
        if self.flow.write_paused:
            timeout = self.settings.write_timeout
        late = activity is not None and now - self.since > timeout
        if late or (self.flow.read_paused and self._has_left()):
            self.transport.abort()

    def _has_left(self) -> bool:
        """Whether the client has closed its side; while nothing is read, the event loop does not notice."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), getattr(select, "POLLRDHUP", 0))  # 0: not on macOS
        return bool(poll.poll(0))

    # --- what uvicorn and the event loop call ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) <= self.most:
            return
        others: set[Any] = self.connections - {self}  # Any: of this class, but uvicorn has several
        idle = [other for other in others if other.waits_for() is not None]
        if idle:
            oldest = min(idle, key=lambda other: other.since)
            self.connections.discard(oldest)
            oldest.transport.abort()
            return
        self._broken = True
        self.transport.write(_BUSY)
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self.discards:
            super().data_received(data)

    def resume_writing(self) -> None:
        self._reads += 1
        super().resume_writing()

    def on_response_complete(self) -> None:
        unread = self.more_is_coming()
        super().on_response_complete()
        if unread:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._broken = True
        if self.conn.too_small:
            msg = "The chunks of the body are too small; send larger ones."
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # an answer has begun
            self.transport.abort()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        """Close the connection, after the answer if a whole request has arrived."""
        if self.more_is_coming():
            self.transport.abort()
        elif not self.transport.is_closing():
            super().shutdown()
