"""Receivers of callbacks on loopback, and senders with short waits: fixtures, for `pytest_plugins`."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from poc_kernels.service.callbacks import CallbackSender

SECONDS = 20  # the longest that any wait may take
KEY = b"shared key"
OK = (200, {})


class Receiver:
    """An HTTP server that keeps every POST; `answer(path, content)` returns status, headers and, if any, text."""

    def __init__(self, port=0, answer=lambda path, content: OK, protocol="HTTP/1.0"):
        self.posts = []  # (path, headers, body, status, time)
        self.clients = set()
        self._arrived = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = protocol

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, *text = answer(self.path, json.loads(body))
                text = "".join(text).encode()
                receiver.clients.add(self.client_address)
                with receiver._arrived:
                    receiver.posts.append((self.path, self.headers, body, status, time.monotonic()))
                    receiver._arrived.notify_all()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the sender does not read long answers to the end
                    self.wfile.write(text)

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # many senders may connect at once

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def wait(self, count):
        """Wait until this many posts have arrived."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.posts) >= count, SECONDS), f"{len(self.posts)} of {count}"

    def contents(self, path=None, status=None):
        return [json.loads(p[2]) for p in self.posts if path in (None, p[0]) and status in (None, p[3])]

    def nonces(self, **which):
        return [content["nonces"] for content in self.contents(**which)]

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(SECONDS)


class Observer:
    """Keeps what a sender tells its observer."""

    def __init__(self):
        self.events = []
        self.reasons = []  # of what was dropped
        self._changed = threading.Condition()

    def _add(self, *event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def delivered(self, kind, nonces):
        self._add("delivered", kind, nonces)

    def failed(self, kind):
        self._add("failed", kind, 0)

    def dropped(self, kind, nonces, reason):
        self._add("dropped", kind, nonces)
        self.reasons.append(reason)

    def of(self, what):
        return [event[1:] for event in self.events if event[0] == what]

    def wait(self, what, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(what)) >= count, SECONDS), self.events


@pytest.fixture
def receivers():
    """Make receivers, which are stopped after the test."""
    made = []

    def make(**options):
        made.append(Receiver(**options))
        return made[-1]

    yield make
    for receiver in made:
        receiver.stop()


@pytest.fixture
def receiver(receivers):
    return receivers()


@pytest.fixture
def dead():
    """A receiver that has stopped: nobody listens on its port."""
    receiver = Receiver()
    receiver.stop()
    return receiver


@pytest.fixture
def senders(monkeypatch):
    """Make senders with short waits; each has an Observer as `observer`."""
    monkeypatch.setenv("NO_PROXY", "*")
    made = []

    def make(**options):
        observer = Observer()
        short = {"flush_seconds": 0.0, "first_retry_seconds": 0.01, "max_retry_seconds": 0.05, "observer": observer}
        made.append(CallbackSender(**{**short, **options}))
        made[-1].observer = observer
        return made[-1]

    yield make
    for sender in made:
        sender.close(0)
        assert sender._thread is None or not sender._thread.is_alive()


def generated(sender, url, body):
    """Send proofs whose per-nonce lists are nonces and distances."""
    sender.generated(url, body, per_nonce=("nonces", "dist"))


def batch(*nonces, **keys):
    """A ProofBatch with a distance for each nonce."""
    common = {"public_key": "key", "block_hash": "0xabc", "block_height": 7, "node_id": 0}
    return {**common, "nonces": list(nonces), "dist": [1 + nonce / 1000 for nonce in nonces], **keys}


def verdict(*nonces, **keys):
    """A ValidatedBatch."""
    result = {"received_dist": [1.0 for _ in nonces], "r_target": 1.3, "fraud_threshold": 0.01, "n_invalid": 0}
    return {**batch(*nonces), **result, "probability_honest": 1.0, "fraud_detected": False, **keys}


def alone(nonce):
    """A batch that merges with no other."""
    return batch(nonce, block_height=nonce)


def records(caplog, message):
    return [record for record in caplog.records if record.getMessage() == message]
