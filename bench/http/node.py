"""A node of the demonstration's model, in a process of its own on loopback."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from poc_kernels.demo.server import ServerProcess, free_port, with_this_package

_SERVE = """
import json, socket, sys
if sys.argv[2] == "nagle":
    listen = socket.socket.listen
    def nagled(self, *arguments):
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        return listen(self, *arguments)
    socket.socket.listen = nagled
from poc_kernels.node.logs import configure
from poc_kernels.node.server import serve
from poc_kernels.node.settings import Settings
configure("warning", "text")
serve(Settings(**json.loads(sys.argv[1])))
"""


@contextlib.contextmanager
def served(directory: Path, *, nagle: bool = False, ready_seconds: float = 300.0) -> Iterator[int]:
    """Serve the model in a folder with the default settings; the port.

    Args:
        directory: of the model; the log is written there too.
        nagle: whether Nagle's algorithm delays small packets, as it did before the node turned it off.
        ready_seconds: how long the node may take to start.
    """
    port, log = free_port(), directory / f"node-{nagle}.log"
    settings = {"model": str(directory), "served_name": "m", "device": "cpu", "temperature": 0.0, "port": port}
    command = [sys.executable, "-c", _SERVE, json.dumps(settings), "nagle" if nagle else ""]
    server = ServerProcess.started(command, {**with_this_package(), "HF_HUB_OFFLINE": "1"}, port, log)
    try:
        server.wait_ready(ready_seconds)
        yield port
    finally:
        server.stop()
