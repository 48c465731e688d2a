"""The real process, ended by a signal in every state."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from nodes import POW, begin, checked, claim, posted, settings, status
from served import NAME
from server_process import ServerProcess
from web import CHAT, DONE, TIMEOUT, chat, client, eventually

from poc_kernels.node.node import Node
from poc_kernels.node.server import serve

pytest_plugins = ["round_fixtures"]


class Process(ServerProcess):
    """`poc-kernels serve` on a free port; its log is read as it comes, unless it is deaf."""

    def __init__(self, model_dir: Path, *arguments: str, max_descriptors: int | None = None) -> None:
        limited = [] if max_descriptors is None else ["prlimit", f"--nofile={max_descriptors}"]
        serve = [sys.executable, "-m", "poc_kernels.cli", "serve", "--model", str(model_dir), "--served-name", NAME]
        options = ["--port", "0", "--device", "cpu", "--temperature", "0", *arguments]
        super().__init__([*limited, *serve, *options], model_dir, r"listening\W.*port\W+([0-9]+)")


ARGUMENTS = {
    "deaf": ("--log-level", "debug"),
    "idle": ("--head-seconds", "3600"),
    "generating": ("--drain-seconds", "0.05"),
    "validating": ("--shutdown-seconds", "0.5", "--max-new-tokens", "4000"),
    "stopped": ("--shutdown-seconds", "2", "--log-format", "text"),
}


@pytest.fixture(scope="module")
def processes(model_dir: Path) -> Iterator[dict[str, Process]]:
    """A process for each state, all started at once."""
    limits = {"idle": 64}
    processes = {
        name: Process(model_dir, *arguments, max_descriptors=limits.get(name)) for name, arguments in ARGUMENTS.items()
    }
    yield processes
    for process in processes.values():
        process.kill()


class Chat:
    """A chat that is streamed in a thread: its lines."""

    def __init__(self, http: httpx2.Client, max_tokens: int) -> None:
        self.lines: list[str] = []
        self._http, self._body = http, chat(stream=True, max_tokens=max_tokens)
        self._pool = ThreadPoolExecutor(1)
        self._end = self._pool.submit(self._read)
        eventually(lambda: len(self.lines) > 5)

    def _read(self) -> None:
        with self._http.stream("POST", CHAT, json=self._body) as stream:
            self.lines.extend(line for line in stream.iter_lines() if line)

    def events(self) -> list[dict[str, Any]]:
        """All its events; it must have ended in order."""
        self._end.result(TIMEOUT)
        self._pool.shutdown()
        assert self.lines[-1] == DONE
        return [json.loads(line.removeprefix("data: ")) for line in self.lines[:-1]]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_end_nothing(processes: dict[str, Process], number: signal.Signals) -> None:
    process = processes["idle"]
    with client(process.url()) as http:
        streamed = Chat(http, 100)
        process.popen.send_signal(number)
        assert streamed.events()[-1]["choices"][0]["finish_reason"] == "length"
        assert http.get("/health").status_code == 200
    assert process.popen.poll() is None


def test_more_clients_than_descriptors(processes: dict[str, Process]) -> None:
    process = processes["idle"]
    address = ("127.0.0.1", int(process.url().rpartition(":")[2]))
    with contextlib.ExitStack() as clients, client(process.url()) as http:
        for _ in range(200):
            silent = clients.enter_context(socket.create_connection(address, TIMEOUT))
            with contextlib.suppress(OSError):
                silent.sendall(b"GET /health HTTP/1.1\r\nHost: x")
        for _ in range(5):
            assert http.get("/health").status_code == 200
            http.close()
            http = clients.enter_context(client(process.url()))
        metrics = http.get("/metrics").text
    assert float(re.findall(r"^poc_connections (\S+)", metrics, re.MULTILINE)[0]) <= 32
    assert float(re.findall(r'^poc_gate_refusals_total{reason="connections"} (\S+)', metrics, re.MULTILINE)[0]) > 100
    assert sum(len(line) for line in process.log) < 100_000


def test_sigterm_idle(processes: dict[str, Process]) -> None:
    process = processes["idle"]
    with client(process.url()) as http:
        assert http.get("/health").json()["status"] == "ok"
        assert status(http)["state"] == "IDLE"
        assert process.end(signal.SIGTERM, 10) == 0
    records = [json.loads(line) for line in process.logged()]
    assert {"node started", "node closed"} <= {record["message"] for record in records}
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert {record["level"] for record in records} <= {"INFO", "WARNING"}


def test_a_log_that_is_not_read_stops_nothing(processes: dict[str, Process]) -> None:
    process = processes["deaf"]
    with client(process.url()) as http:
        process.deaf.set()
        begin(http, "validate", r_target=0.01)
        for nonce in range(100):  # each is fraud, and a warning of 1 KB
            answer = http.post(f"{POW}/validate", json=claim([nonce], [0.001], public_key="k" * 1000))
            assert answer.json()["fraud_detected"] is True
        assert http.get("/health").status_code == 200
        assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(TIMEOUT) == 0


def test_sigterm_while_generating_lets_a_paused_stream_finish(processes: dict[str, Process]) -> None:
    process = processes["generating"]
    with client(process.url()) as http:
        streamed = Chat(http, 800)
        begin(http)
        checked(http, 40)  # drained, then paused
        assert streamed.lines[-1] != DONE
        assert process.end(signal.SIGTERM, TIMEOUT) == 0
    assert streamed.events()[-1]["choices"][0]["finish_reason"] == "length"
    assert any("requests in flight are paused" in line for line in process.log)


def test_sigterm_while_validating_ends_a_long_stream_in_order(processes: dict[str, Process]) -> None:
    process = processes["validating"]
    with client(process.url()) as http:
        begin(http, "validate")
        streamed = Chat(http, 4000)
        with ThreadPoolExecutor(1) as pool:
            validation = pool.submit(http.post, f"{POW}/validate", json=claim(range(50_000)))
            eventually(lambda: 0 < status(http)["queued_nonces"] <= 50_000)
            began = time.monotonic()
            assert process.end(signal.SIGTERM, 10) == 0
            assert time.monotonic() - began < 5
            assert validation.result(TIMEOUT).status_code == 409
    assert "error" in streamed.events()[-1]


def test_sigint_when_stopped_does_not_wait_for_a_dead_receiver(processes: dict[str, Process]) -> None:
    process = processes["stopped"]
    with client(process.url()) as http:
        with socket.socket() as dead:
            dead.bind(("127.0.0.1", 0))
            begin(http, callback_url=f"http://127.0.0.1:{dead.getsockname()[1]}")
        checked(http, 40)
        assert posted(http, "/stop")["pow_status"]["callbacks"]["pending_batches"] > 0
        assert process.end(signal.SIGINT, 10) == 0
    assert any("callbacks not delivered before the deadline" in line for line in process.log)
    assert process.logged()[-1].endswith("poc_kernels: node closed\n")


# ---- serve(), in this process ----


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signal handlers of this process are afterwards what they were."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_the_node_starts_is_not_lost(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = Node.start, []

    def signalled(self: Node) -> None:
        start(self)
        started.append(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Node, "start", signalled)
    serve(settings(model_dir, port=0))
    assert [node.service.stopping for node in started] == [True]
    assert not started[0].service.worker._thread.is_alive()


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on host 127.0.0.1, port {port}: "):
            serve(settings(Path("/nowhere"), port=port))


@pytest.mark.parametrize("device", ["no such device", "cuda:99"])
def test_a_device_that_is_not_there_is_said(model_dir: Path, device: str) -> None:
    with pytest.raises(ValueError, match="device must be one that torch has here, got "):
        Node(settings(model_dir, device=device))
