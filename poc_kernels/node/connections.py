"""Connections of the server: uvicorn's, with the bounds that uvicorn does not have.

Their number is bounded, and so is the time for the head of a request. The kernel cuts a connection whose client takes
nothing, and each token leaves at once.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..service.clients import client_at

logger = logging.getLogger("poc_kernels.connections")

_MAX_MILLISECONDS = 2**31 - 1


def listener(host: str, port: int, send_seconds: float) -> socket.socket:
    """Return a socket bound to an address, whose connections send without delay and end when nothing is taken.

    Args:
        host, port: the address; an IPv6 address has colons.
        send_seconds: the time for which a connection lives while its client takes none of the bytes that wait for it.

    Raises:
        OSError: the address cannot be had; the text names it.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Linux hands these down to the connections. Without the first, a token waits until the one before is acknowledged.
    milliseconds = min(max(round(send_seconds * 1000), 1), _MAX_MILLISECONDS)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on host {host}, port {port}: {error}") from error
    return listening


def raise_descriptors(wanted: int) -> int:
    """Raise the process's limit on descriptors to ``wanted``, or as far as the system allows; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return max(soft, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


class Connections:
    """The open connections of a server: at most a maximum.

    One more ends one of those that wait for their client: for a request, for the rest of one, or for an answer to be
    taken. It is that of the client with most of them that has waited longest. A client with more than half of all
    connections gives up one of its own, even if none of them waits; so does the one with most where nothing waits
    except for a newcomer of a client with fewer.

    Args:
        maximum: number of connections.
        ended: called for each that is ended.
    """

    def __init__(self, maximum: int, ended: Callable[[], None] = lambda: None) -> None:
        self._maximum = maximum
        self._ended = ended
        # By client, in the order in which they came; and those that wait, in the order in which they began to.
        self._open: dict[str, dict[Connection, None]] = {}
        self._waiting: dict[str, dict[Connection, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, connection: Connection) -> None:
        """Add a connection, which waits; end one if there are too many."""
        self._open.setdefault(connection.of, {})[connection] = None
        self._count += 1
        self.waits(connection, True)
        if self._count > self._maximum:
            one = self._to_end(connection)
            self.remove(one)
            one.transport.abort()
            self._ended()
            logger.warning("too many connections: one was ended")

    def _to_end(self, newcomer: Connection) -> Connection:
        most = max(self._open, key=lambda client: len(self._open[client]))
        count = len(self._open[most])
        others_wait = len(self._waiting) > 1 or len(self._waiting[newcomer.of]) > 1
        if 2 * count <= self._maximum and (others_wait or count <= len(self._open[newcomer.of])):
            most = max(self._waiting, key=lambda client: len(self._waiting[client]))
        return next(iter(self._waiting.get(most) or self._open[most]))

    def waits(self, connection: Connection, waiting: bool) -> None:
        """Say whether an open connection waits for its client."""
        if connection not in self._open.get(connection.of, ()):
            return
        if waiting:
            self._waiting.setdefault(connection.of, {}).setdefault(connection)
        else:
            _discard(self._waiting, connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is no more. Idempotent."""
        _discard(self._waiting, connection)
        self._count -= _discard(self._open, connection)


def _discard(connections: dict[str, dict[Connection, None]], connection: Connection) -> bool:
    """Take a connection out of those of its client; return whether it was there."""
    of_client = connections.get(connection.of, {})
    if connection not in of_client:
        return False
    del of_client[connection]
    if not of_client:
        del connections[connection.of]
    return True


class Connection(H11Protocol):
    """A connection of uvicorn, one of ``connections``, that ends where a head does not come in time.

    Args:
        connections: those of the server.
        head_seconds: the time for the head of a request, from its first byte; of the first one, from the beginning.
        max_unread_bytes: how much of an answer may wait for the client before the app has to wait.
        arguments, named: uvicorn's.

    Attributes:
        of: whose it is: the client at the other end, whatever a proxy says.
    """

    def __init__(
        self, *arguments: Any, connections: Connections, head_seconds: float, max_unread_bytes: int, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._connections = connections
        self._head_seconds, self._max_unread_bytes = head_seconds, max_unread_bytes
        self._head_timer: asyncio.TimerHandle | None = None
        self.of = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.of = client_at(self.client[0]) if self.client else ""
        transport.set_write_buffer_limits(self._max_unread_bytes)
        self._connections.add(self)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.remove(self)
        self._set_head_timer(False)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def _look(self) -> None:
        """Look at what the connection waits for."""
        closing, state = self.transport.is_closing(), self.conn.their_state
        unread = self.flow.write_paused or closing
        self._connections.waits(self, unread or state in (h11.IDLE, h11.SEND_BODY))
        # While it is kept for a next request of which nothing has come, uvicorn's own timer runs.
        begun = self.timeout_keep_alive_task is None or bool(self.conn.trailing_data[0])
        self._set_head_timer(state is h11.IDLE and begun and not closing)

    def _set_head_timer(self, runs: bool) -> None:
        if not runs and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif runs and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_seconds, self.timeout_keep_alive_handler)
