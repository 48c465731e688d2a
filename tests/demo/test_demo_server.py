"""The server process: ready, dead, silent, stopped; small programs stand in for the server."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest

from poc_kernels.demo import server
from poc_kernels.demo.server import ServerFailedError, ServerProcess, serving

ANSWERS = """
    import http.server, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({status})
            self.end_headers()
            self.wfile.write(b"not yet")
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEAF = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def started(tmp_path):
    running = []

    def start(script: str) -> ServerProcess:
        port = server.free_port()
        log = tmp_path / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script), str(port)], stdout=output, stderr=subprocess.STDOUT
            )
        running.append(process)
        return ServerProcess(process, f"http://127.0.0.1:{port}", log)

    yield start
    for process in running:
        process.kill()
        process.wait(20)


def test_ready_when_health_says_so(started):
    ready = started(ANSWERS.format(status=200))
    ready.wait_ready(30)
    ready.check()
    ready.stop()
    with pytest.raises(ServerFailedError, match="the server ended with status -15"):
        ready.check()
    ready.stop()
    assert ready.process.returncode == -15


def test_a_dead_server_is_reported_with_the_end_of_its_log(started):
    dead = started("print('\\n'.join(f'line {n}' for n in range(100))); raise SystemExit(3)")
    with pytest.raises(ServerFailedError, match=r"(?s)status 3.*line 75\n.*line 99") as raised:
        dead.wait_ready(30)
    assert "line 74\n" not in str(raised.value)


def test_a_server_that_is_not_ready_in_time_is_reported(started):
    slow = started(ANSWERS.format(status=503))
    with pytest.raises(ServerFailedError, match="not ready after 3 s, /health answered 503 not yet"):
        slow.wait_ready(3)


def test_a_server_that_ignores_sigterm_is_killed(started, monkeypatch):
    monkeypatch.setattr(server, "_SHUTDOWN_SECONDS", 0.5)
    deaf = started(DEAF)
    deadline = time.monotonic() + 30
    while "deaf" not in deaf.end_of_log():
        deaf.check()
        assert time.monotonic() < deadline
    deaf.stop()
    assert deaf.process.returncode == -9


def test_a_model_that_is_not_there_ends_the_server_with_a_reason(tmp_path):
    given = {"device": "cpu", "dtype": None, "port": 0, "callback_key": "k", "ready_seconds": 60.0, "offline": True}
    with (
        pytest.raises(ServerFailedError, match="status 1"),
        serving(str(tmp_path / "no-model"), log=tmp_path / "server.log", **given),
    ):
        pytest.fail("the server became ready")
