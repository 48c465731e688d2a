"""The process around a node: its socket, its signals, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import math
import signal
import socket
from typing import Any

import uvicorn

from ..service.round_service import MIN_CLOSE_SECONDS
from . import logs
from .connections import Connection, Connections, listener, raise_descriptors
from .node import Node
from .settings import TOKEN_VARIABLE, Settings

logger = logging.getLogger("poc_kernels")

_BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""
_MAX_ACCEPTED = 128
"""Connections that are accepted at once, before those that are too many are ended."""
_NO_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that are ignored: a terminal that closes, a reload (there is nothing to reload), and what is not ours."""


class _Server(uvicorn.Server):
    """uvicorn, which on SIGTERM tells the node first, then waits for requests in flight up to its deadline.

    What is still in flight then ends in order, with an error, before uvicorn cuts its connection.

    Args:
        node: what is served.
        listening: the socket of `listener`.
    """

    def __init__(self, node: Node, listening: socket.socket) -> None:
        settings, metrics = node.settings, node.service.metrics
        # Twice as many as connections: for the model's files, callbacks, and connections that are about to be ended.
        descriptors = raise_descriptors(2 * settings.max_connections)
        connections = Connections(
            min(settings.max_connections, descriptors // 2), lambda: metrics.refused("connections")
        )
        metrics.watch("poc_connections", "Open connections", lambda: len(connections))
        connection = functools.partial(
            Connection,
            connections=connections,
            head_seconds=settings.head_seconds,
            max_unread_bytes=settings.max_unread_bytes,
        )
        config = uvicorn.Config(
            node.app,
            http=connection,  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=min(max(descriptors // 64, 1), _MAX_ACCEPTED),  # asyncio accepts as many in a turn of its loop
            timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
            timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds + MIN_CLOSE_SECONDS),
        )
        super().__init__(config)
        self._node, self._listening = node, listening

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._listening.listen(_BACKLOG)  # what asyncio accepts at once is another number
        host, port, *_ = self.servers[0].sockets[0].getsockname()  # uvicorn does not log it of sockets it is given
        logger.info("listening", extra={"host": host, "port": port})

    async def shutdown(self, sockets: Any = None) -> None:
        self._node.begin_shutdown()
        ending = asyncio.create_task(self._end_inference())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_inference(self) -> None:
        await asyncio.sleep(self._node.settings.shutdown_seconds)
        await asyncio.to_thread(self._node.inference.stop, MIN_CLOSE_SECONDS)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        OSError, ValueError: the address cannot be had, the model cannot be loaded, or cannot compute proofs.
    """
    for number in _NO_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with logs.in_background(settings.max_log_records) as dropped, contextlib.closing(_bound(settings)) as listening:
        node = Node(settings)
        node.service.metrics.watch("poc_log_records_dropped", "Log records that could not be written", dropped)
        server = _Server(node, listening)

        def exit_soon(*_: Any) -> None:
            server.should_exit = True

        # While the node starts; and uvicorn raises the signal again once it has shut down: the process must live until
        # the node is closed.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, exit_soon)
        with contextlib.closing(node):
            node.start()
            # What lives as long as the process is not looked through again: that would be a gap between users' tokens.
            gc.collect()
            gc.freeze()
            try:
                server.run([listening])
            finally:
                gc.unfreeze()  # or libraries write to standard error, at the end, of what they take to be leaks


def _bound(settings: Settings) -> socket.socket:
    """Return the listening socket, bound first: a model takes long to load. Warn if the PoC routes are open there."""
    listening = listener(settings.host, settings.port, settings.send_seconds)
    if settings.token is None and not listening.getsockname()[0].startswith(("127.", "::1")):
        logger.warning(
            "the PoC routes are open to whoever reaches this address: set a token",
            extra={"host": settings.host, "variable": TOKEN_VARIABLE},
        )
    return listening
