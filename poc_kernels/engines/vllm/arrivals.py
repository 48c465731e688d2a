"""Users' requests in the server, as its worker sees them: in a byte of shared memory, since a message comes too late.

An engine that computes nothing looks at its messages only between two calls of its workers. So a worker that computes
proofs in a long call looks at the byte between two slices, and ends the call as soon as a user has come.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

_SHARED = "/dev/shm"
"""Where files are memory, on Linux."""


class Arrivals:
    """Counts the users' requests in a server, on its event loop.

    Attributes:
        path: of the file that a worker of this machine opens, until `opened`.
        count: of the requests that are in the server.
    """

    def __init__(self) -> None:
        file, self.path = tempfile.mkstemp(prefix="poc_kernels-", dir=_SHARED if os.path.isdir(_SHARED) else None)
        try:
            os.write(file, b"\0")  # takes the page: where there is none, this fails, and not a store to it
            self._byte = mmap.mmap(file, 1)
        finally:
            os.close(file)
        self.count = 0

    def opened(self) -> None:
        """Remove the file: whoever has it open keeps the memory. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def counted(self, app: ASGIApp, is_user: Callable[[Scope], bool]) -> ASGIApp:
        """Return ``app`` with its users' requests counted, from their heads to the ends of their answers."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in ("http", "websocket") or not is_user(scope):
                await app(scope, receive, send)
                return
            self._add(1)
            try:
                await app(scope, receive, send)
            finally:
                self._add(-1)

        return serve

    def _add(self, change: int) -> None:
        self.count += change
        self._byte[0] = int(self.count > 0)


class ArrivalsOfServer:
    """What a worker sees of a server's `Arrivals`.

    Args:
        path: theirs.

    Raises:
        OSError: there is no such file here; the server may be on another machine.
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._byte = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)

    def __call__(self) -> bool:
        """Return whether a user's request is in the server."""
        return self._byte[0] != 0


def arrivals_at(path: str | None) -> Callable[[], bool]:
    """Return what tells whether a user's request is in the server; True at all times where that cannot be seen."""
    if path is not None:
        with contextlib.suppress(OSError):
            return ArrivalsOfServer(path)
    return lambda: True
