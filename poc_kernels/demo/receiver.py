"""The chain's side of callbacks: a small HTTP server that checks every signature and keeps what it receives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..service.callbacks import SIGNATURE_HEADER, verify
from .results import Callback

_MAX_BODY = 2**24


class Receiver:
    """Keeps what arrived, in order. The first ``refuse`` messages are answered 503, so that they must be sent again."""

    def __init__(self, key: bytes, clock: Callable[[], float], refuse: int = 0) -> None:
        self._key = key
        self._clock = clock
        self._refuse = refuse
        self._calls: list[Callback] = []
        self._arrived = threading.Condition()
        self.url = ""

    @property
    def calls(self) -> list[Callback]:
        """All messages so far, including refused ones."""
        with self._arrived:
            return list(self._calls)

    def nonces(self, path: str, block_hash: str, *, fingerprints: bool = False) -> list[int]:
        """Return the nonces of a block's accepted messages on a path, in order; repeated if they arrived repeatedly.

        Args:
            path: where they were posted.
            block_hash: of the block.
            fingerprints: whether those of messages that have fingerprints, or those of messages that have none.
        """
        return [
            nonce
            for call in self.calls
            if call.path == path and call.block_hash == block_hash and call.answered == 200
            if bool(call.vectors) == fingerprints
            for nonce in call.nonces
        ]

    def fingerprints(self, block_hash: str) -> dict[int, str]:
        """Return the fingerprints of a block's accepted messages, by nonce."""
        return {
            nonce: vector
            for call in self.calls
            if call.block_hash == block_hash and call.answered == 200
            for nonce, vector in zip(call.nonces, call.vectors, strict=False)
        }

    def wait_for(self, predicate: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``predicate``, evaluated whenever a message arrives, is true; return whether it was in time."""
        with self._arrived:
            return self._arrived.wait_for(predicate, seconds)

    def take(self, path: str, body: bytes, signature: str) -> int:
        """Keep one message, and return the status to answer."""
        signed = verify(body, signature, self._key)
        try:
            batch = json.loads(body)
            told = _told(batch)
            block_hash, public_key = str(batch["block_hash"]), str(batch["public_key"])
        except (ValueError, KeyError, TypeError):
            return 400
        fraud: Any = batch.get("fraud_detected")
        with self._arrived:
            status = 503 if self._refuse > 0 else 200 if signed else 401
            self._refuse -= status == 503
            at = self._clock()
            self._calls.append(Callback(at, path, status, signed, block_hash, public_key, fraud_detected=fraud, **told))
            self._arrived.notify_all()
        return status


def _told(batch: Any) -> dict[str, Any]:
    """Return what a message says of nonces: fingerprints, the verdict on some, or a list that has distances beside."""
    if "artifacts" in batch:
        artifacts = batch["artifacts"]
        return {
            "nonces": tuple(int(artifact["nonce"]) for artifact in artifacts),
            "vectors": tuple(str(artifact["vector_b64"]) for artifact in artifacts),
        }
    if "n_total" in batch:
        return {"nonces": (), "total": int(batch["n_total"])}
    return {"nonces": tuple(int(nonce) for nonce in batch["nonces"])}


@contextmanager
def receiving(key: bytes, clock: Callable[[], float], refuse: int = 0) -> Iterator[Receiver]:
    """Run a `Receiver` on a free port of loopback until the block ends; its ``url`` is the callback_url."""
    receiver = Receiver(key, clock, refuse)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = min(int(self.headers.get("Content-Length", 0)), _MAX_BODY)
            status = receiver.take(self.path, self.rfile.read(length), self.headers.get(SIGNATURE_HEADER, ""))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Write nothing: the report lists the messages."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="callback-receiver", kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
