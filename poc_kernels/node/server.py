"""The process around a node: its socket, its signals, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
from typing import Any

import uvicorn

from ..service.round_service import MIN_CLOSE_SECONDS
from .node import Node
from .settings import TOKEN_VARIABLE, Settings

logger = logging.getLogger("poc_kernels")

_KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than clients keep theirs, or a request meets a connection that closes."""


class _Server(uvicorn.Server):
    """uvicorn, which on SIGTERM tells the node first, then waits for requests in flight up to its deadline.

    What is still in flight then ends in order, with an error, before uvicorn cuts its connection.
    """

    def __init__(self, node: Node) -> None:
        settings = node.settings
        config = uvicorn.Config(
            node.app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds + MIN_CLOSE_SECONDS),
        )
        super().__init__(config)
        self._node = node

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
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
    listener = _bound(settings)  # first: a model takes long to load
    node = Node(settings)
    server = _Server(node)

    def exit_soon(*_: Any) -> None:
        server.should_exit = True

    # While the node starts; and uvicorn raises the signal again once it has shut down: the process must live until the
    # node is closed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_soon)
    with contextlib.closing(node):
        node.start()
        # What lives as long as the process is not looked through again: that would be a gap between users' tokens.
        gc.collect()
        gc.freeze()
        try:
            server.run([listener])
        finally:
            gc.unfreeze()  # or libraries write to standard error, at the end, of what they take to be leaks


def _bound(settings: Settings) -> socket.socket:
    """Return a socket bound to the settings' address; warn if the PoC routes are open to others there."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on host {settings.host}, port {settings.port}: {error}") from error
    if settings.token is None and not listener.getsockname()[0].startswith(("127.", "::1")):
        logger.warning(
            "the PoC routes are open to whoever reaches this address: set a token",
            extra={"host": settings.host, "variable": TOKEN_VARIABLE},
        )
    return listener
