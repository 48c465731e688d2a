"""The demonstration from beginning to end, and how it ends when it cannot continue."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from browser import assert_readable, needs_chromium
from rich.console import Console

from poc_kernels.demo import model as small_model
from poc_kernels.demo import run as demo
from poc_kernels.demo.plan import Plan
from poc_kernels.demo.results import Check
from poc_kernels.demo.server import ServerFailedError, free_port
from poc_kernels.demo.show import Show

SEARCH = os.pathsep.join([str(Path(demo.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """What the demonstration shows; temporary directories are made in a folder that is empty again afterwards."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield io.StringIO()
    assert list(scratch.iterdir()) == []


class Kept(Show):
    """Keeps the results that it shows."""

    def summary(self, results):
        self.results = results
        super().summary(results)

    def text(self):
        return self._console.file.getvalue()


@pytest.fixture(scope="module")
def real_round(tmp_path_factory):
    """A round on the real server: its exit status, results, report and what was shown."""
    report = tmp_path_factory.mktemp("report") / "report.html"
    plan = Plan(
        warm_up_seconds=0.2,
        idle_seconds=0.5,
        generate_seconds=0.5,
        older_seconds=0.5,
        fingerprints=48,
        compared=32,
        proofs=40,
        survey=64,
        batch_nonces=16,
        seq_len=32,
        users=2,
        max_tokens=6,
    )
    show = Kept(Console(file=io.StringIO(), width=120))
    status = demo.run(report=report, plan=plan, show=show)
    return status, show.results, report.read_text(encoding="utf-8"), show.text()


def test_a_round_on_the_real_server(real_round):
    status, results, report, text = real_round
    assert status == 0, text
    assert "all 28 checks passed" in text
    assert "All 28 checks of the round passed." in report
    assert results.vocab_size == 2048
    assert (results.retained_bytes, results.stored_bytes) == (8, 2 * 256 * 256 * 4)
    assert set(results.parts) == {"inputs", "projection", "forward", "mix"}
    assert 0 < results.projection_share < 0.5
    assert results.generating_rate > 0
    assert results.validating_rate > 0
    assert (results.accepted, results.caught) == (1, 7)
    assert results.dist_threshold < 0.3
    assert min(len(wait.milliseconds) for wait in results.latencies()) > 1


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 480])
def test_its_report_is_readable(real_round, tmp_path, width, dark):
    assert_readable(real_round[2], tmp_path, width, dark=dark, plots=4)


@contextlib.contextmanager
def no_server(*_args, **_arguments):
    yield None


def quick(monkeypatch, play, server=no_server):
    """The demonstration without a server and cheats: ``play`` takes the place of the rounds."""
    monkeypatch.setattr(demo, "_claims", lambda *_: [])
    monkeypatch.setattr(demo, "serving", server)
    monkeypatch.setattr(demo, "_play", play)


def test_a_check_that_failed_is_the_exit_status(monkeypatch, shown, tmp_path):
    def play(server, key, plan, claims, results, show):
        results.checks += [Check("a", True), Check("b", False)]

    quick(monkeypatch, play)
    report = tmp_path / "report.html"
    assert demo.run(report=report, show=Show(Console(file=shown))) == 1
    assert "1 of 2 checks FAILED" in shown.getvalue()
    assert "FAILED" in report.read_text(encoding="utf-8")


def test_a_model_that_is_given_is_named_and_needs_a_survey(monkeypatch, shown, tmp_path):
    model = tmp_path / "given"
    small_model.build(model, hidden_size=64, layers=1, vocab=512)
    known = []
    quick(monkeypatch, lambda server, key, plan, claims, results, show: known.append(results))
    demo.run(model=str(model), report=tmp_path / "report.html", show=Show(Console(file=shown)))
    assert known[0].about["model"] == f"{model}: qwen3, hidden size 64, 1 layers, vocabulary 512"
    assert not known[0].geometric


def test_a_server_that_fails_is_reported(monkeypatch, shown, tmp_path):
    @contextlib.contextmanager
    def dead(*_args, **_arguments):
        raise ServerFailedError("the server ended with status 3")
        yield

    quick(monkeypatch, None, dead)
    assert demo.run(report=tmp_path / "report.html", show=Show(Console(file=shown))) == 1
    assert "The demonstration failed: the server ended with status 3" in shown.getvalue()
    assert not (tmp_path / "report.html").exists()


def test_an_answer_that_never_comes_is_reported_with_the_servers_log(monkeypatch, shown, tmp_path):
    class Logging:
        def end_of_log(self):
            return "its last words"

    @contextlib.contextmanager
    def silent(*_args, **_arguments):
        yield Logging()

    def play(server, key, plan, claims, results, show):
        raise httpx2.ReadTimeout("no answer")

    quick(monkeypatch, play, silent)
    assert demo.run(report=tmp_path / "report.html", show=Show(Console(file=shown))) == 1
    assert "no answer; the end of the server's log:\nits last words" in shown.getvalue()


def test_a_missing_model_is_reported(shown, tmp_path):
    show = Show(Console(file=shown, width=500))
    assert demo.run(model=str(tmp_path / "no-model"), report=tmp_path / "report.html", show=show) == 1
    assert "no-model" in shown.getvalue()


def test_it_runs_outside_the_main_thread(monkeypatch, shown, tmp_path):
    quick(monkeypatch, lambda server, key, plan, claims, results, show: results.checks.append(Check("a", True)))
    statuses = []
    show = Show(Console(file=shown))
    thread = threading.Thread(target=lambda: statuses.append(demo.run(report=tmp_path / "report.html", show=show)))
    thread.start()
    thread.join(60)
    assert statuses == [0]


def test_sigterm_unwinds_as_ctrl_c_does(monkeypatch, shown, tmp_path):
    ended = []

    @contextlib.contextmanager
    def server(*_args, **_arguments):
        try:
            yield None
        finally:
            ended.append(True)

    def play(server, key, plan, claims, results, show):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)

    quick(monkeypatch, play, server)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        demo.run(report=tmp_path / "report.html", show=Show(Console(file=shown)))
    assert stopped.value.code == 143
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_ends_the_server_and_leaves_nothing(tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "poc_kernels.cli", "demo", "--port", str(port), "--report", str(tmp_path / "r.html")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SEARCH, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    watchdog = threading.Timer(400, process.kill)  # only against hangs
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("IDLE"):
                break
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130, rest
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(30)
        process.stdout.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    assert [path for path in tmp_path.iterdir() if "poc-kernels-demo" in path.name or path.name == "r.html"] == []
