"""The chain's side of callbacks: keeps what is posted to it, each check in a mailbox of its own."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel

from .endpoint import read
from .plan import Plan

_Model = TypeVar("_Model", bound=BaseModel)

_MAX_BODY = 2**24
_MAX_POSTS = 1000
# As the chain's node escapes the names of models: a sender that decodes the path posts elsewhere.
_PATH = "/v2/poc-batches/conform%252Fmodel-"


class Post(NamedTuple):
    """A callback."""

    path: str
    body: bytes
    accepted: bool

    def read(self, model: type[_Model]) -> _Model:
        """Return the body as ``model``, or raise `FailedError`."""
        return read(model, self.body, f"posted to {self.path}")


class Mailbox:
    """Where the callbacks of one check go: at first ``refuse`` of them are answered 503, the others 200.

    Attributes:
        url: what a request names as its ``url``.
    """

    def __init__(self, url: str, refuse: int) -> None:
        self.url = url
        self._refuse = refuse
        self._posts: list[Post] = []
        self._arrived = threading.Condition()

    @property
    def posts(self) -> list[Post]:
        """What was posted so far, including what was refused."""
        with self._arrived:
            return list(self._posts)

    def wait_for(self, predicate: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``predicate``, evaluated whenever a callback arrives, is true; return whether it was in time."""
        with self._arrived:
            return self._arrived.wait_for(predicate, seconds)

    def take(self, path: str, body: bytes) -> int:
        """Keep a callback, and return the status to answer."""
        with self._arrived:
            accepted = self._refuse == 0
            self._refuse -= not accepted
            if len(self._posts) < _MAX_POSTS:
                self._posts.append(Post(path, body, accepted))
            self._arrived.notify_all()
        return 200 if accepted else 503


class Receiver:
    """Makes mailboxes, and finds the one of a callback."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._mailboxes: dict[str, Mailbox] = {}

    def mailbox(self, refuse: int = 0) -> Mailbox:
        """Make a mailbox that refuses that many callbacks at first."""
        name = secrets.token_hex(8)  # nobody else posts there
        self._mailboxes[name] = Mailbox(f"{self._base}{_PATH}{name}", refuse)
        return self._mailboxes[name]

    def take(self, path: str, body: bytes) -> int:
        """Keep what was posted to ``path`` in its mailbox, and return the status to answer."""
        name, slash, rest = path.removeprefix(_PATH).partition("/")
        mailbox = self._mailboxes.get(name) if path.startswith(_PATH) else None
        return 404 if mailbox is None else mailbox.take(slash + rest, body)


@contextlib.contextmanager
def receiving(plan: Plan) -> Iterator[Receiver]:
    """Run a `Receiver` where the endpoint of ``plan`` reaches it.

    Raises:
        OSError: no socket can listen there.
    """
    if plan.callback_host is None:
        host = listens_at = _own_address(plan)
        port = 0
    else:
        host, port = plan.callback_address()
        listens_at = "::" if ":" in host else "0.0.0.0"
    with _Server(listens_at, port) as server:
        shown = f"[{host}]" if ":" in host else host
        receiver = Receiver(f"http://{shown}:{server.server_address[1]}")
        server.take = receiver.take
        thread = threading.Thread(target=server.serve_forever, name="conform-receiver", kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.take: Callable[[str, bytes], int] = lambda path, body: 503
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) <= _MAX_BODY:
            status = self.server.take(self.path, self.rfile.read(int(length)))
        else:
            status, self.close_connection = 413, True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the checks say what came."""


def _own_address(plan: Plan) -> str:
    """Return the address from which this machine reaches the endpoint; nothing is sent. Loopback if it is unknown."""
    parts = urlsplit(plan.url)
    try:
        family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
