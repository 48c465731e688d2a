"""A run: what it does where an endpoint cannot be played with, and what it reports."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest
from conform_stand_in import MODEL, stand_in

from poc_kernels.conform import run
from poc_kernels.conform.outcome import Outcome
from poc_kernels.conform.plan import Plan
from poc_kernels.conform.report import line


@pytest.fixture(scope="module")
def server():
    with stand_in() as server:
        yield server


@contextlib.contextmanager
def answering(handle):
    """A server that answers every request as ``handle(handler)`` does; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            handle(self)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def json_answer(handler, content, status=200):
    body = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def outcomes(report):
    return {result.name: result.outcome for result in report.results}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_nothing_is_played_where_nobody_listens():
    report = run.conform(Plan(url=f"http://127.0.0.1:{free_port()}", model=MODEL))
    first, *others = report.results
    assert (first.name, first.outcome) == ("idle_before", Outcome.FAIL)
    assert "ConnectError" in first.seen
    assert {result.outcome for result in others} == {Outcome.SKIPPED}
    assert not report.conforms()


@pytest.mark.parametrize("state", ["GENERATING", "MIXED", "VALIDATING"])
def test_a_round_that_runs_is_left_alone(state):
    called = []

    def handle(handler):
        called.append(handler.command)
        json_answer(handler, {"status": state})

    with answering(handle) as url:
        report = run.conform(Plan(url=url, model=MODEL))
    assert outcomes(report)["idle_before"] is Outcome.FAIL
    assert "left_idle" not in outcomes(report)
    assert called == ["GET"]


def test_a_server_that_dies_fails_one_check_and_the_others_are_skipped():
    dead = threading.Event()

    def handle(handler):
        if handler.path.endswith("/init/generate"):
            dead.set()
        if dead.is_set():
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            json_answer(handler, {"status": "IDLE"})

    with answering(handle) as url:
        report = run.conform(Plan(url=url, model=MODEL), ["init.starts", "init.malformed", "generate.waits"])
    assert [(result.name, result.outcome.value) for result in report.results] == [
        ("idle_before", "pass"),
        ("init.starts", "fail"),
        ("init.malformed", "skipped"),
        ("generate.waits", "skipped"),
        ("left_idle", "fail"),
    ]
    assert "lost" in report.results[2].seen


@pytest.mark.parametrize(
    ("begins", "trickle"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nx: ", b"x"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    ],
    ids=["silent", "body hangs", "body trickles", "headers trickle", "interim answers"],
)
def test_a_server_that_hangs_costs_its_time_out_and_no_more(begins, trickle):
    over = threading.Event()

    def handle(handler):
        if handler.path.endswith("/versions"):
            handler.close_connection = True
            handler.wfile.write(begins)
            ends = time.monotonic() + 40
            with contextlib.suppress(OSError):  # the client went
                while not over.wait(0.02) and time.monotonic() < ends:
                    handler.wfile.write(trickle)
        else:
            json_answer(handler, {"status": "IDLE"})

    with answering(handle) as url:
        start = time.monotonic()
        report = run.conform(Plan(url=url, model=MODEL, timeout_seconds=1.5), ["versions", "stop.again"])
        seconds = time.monotonic() - start
        over.set()
    assert outcomes(report)["versions"] is Outcome.FAIL
    assert outcomes(report)["stop.again"] is Outcome.FAIL  # it was tried: the status is answered
    assert "status: Input should be 'OK'" in report.results[2].seen
    assert seconds < 30


def test_the_time_for_everything_ends_and_the_endpoint_is_left_idle(server):
    faulty, url = server
    faulty.reset("never_done")
    report = run.conform(
        Plan(url=url, model=MODEL, max_seconds=2.0), ["generate.queues", "generate.waits", "init.starts"]
    )
    found = outcomes(report)
    assert found["generate.queues"] is Outcome.FAIL
    assert found["left_idle"] is Outcome.PASS
    faulty.reset()


def test_answers_of_any_kind_are_failures_and_no_errors():
    kinds = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"status": NaN}', b"[" * 100_000]
    asked = iter(range(10**6))

    def handle(handler):
        if handler.path.endswith("/status"):
            return json_answer(handler, {"status": "IDLE"})
        content = kinds[next(asked) % len(kinds)]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        return handler.wfile.write(content)

    with answering(handle) as url:
        report = run.conform(Plan(url=url, model=MODEL, timeout_seconds=1.5))
    found = outcomes(report)
    assert {name for name, outcome in found.items() if outcome is Outcome.PASS} <= {
        "idle_before",
        "health",
        "left_idle",
    }
    assert found["generate.waits"] is Outcome.FAIL
    assert not [result for result in report.results if result.seen.startswith("unexpected")]


def test_a_model_that_is_not_named_has_to_be_found(server):
    faulty, url = server
    faulty.reset("no_models")
    report = run.conform(Plan(url=url), ["stop.again"])
    assert outcomes(report)["model"] is Outcome.FAIL
    assert outcomes(report)["stop.again"] is Outcome.SKIPPED
    faulty.reset()
    assert run.conform(Plan(url=url), ["stop.again"]).model == MODEL


def test_what_needs_a_check_that_failed_is_skipped_and_says_so(server):
    faulty, url = server
    faulty.reset("drops_a_nonce")
    report = run.conform(Plan(url=url, model=MODEL), ["generate.waits", "verdict.honest"])
    assert outcomes(report)["generate.waits"] is Outcome.FAIL
    assert report.results[2].outcome is Outcome.SKIPPED
    assert "failed before" in report.results[2].seen
    faulty.reset()


def test_only_takes_names_of_checks(server):
    with pytest.raises(ValueError, match=r"only must be names of checks \(health, .*\), got nope"):
        run.conform(Plan(url=server[1]), ["nope"])


def test_a_host_that_no_connection_can_be_made_to_is_named():
    with pytest.raises(ValueError, match="url must have a host that can be connected to, got 'http://☃"):
        run.conform(Plan(url="http://☃.example"))


@pytest.mark.parametrize("given", ["secret", " secret\n"])  # a file ends with a line end
def test_a_token_is_sent_and_not_reported(given):
    sent = []

    def handle(handler):
        sent.append(handler.headers["authorization"])
        json_answer(handler, {"status": "IDLE"})

    with answering(handle) as url:
        report = run.conform(Plan(url=url, model=MODEL, token=given), ["stop.again"])
    assert set(sent) == {"Bearer secret"}
    assert "secret" not in report.to_json()


def test_a_token_of_any_letters_is_sent_as_a_node_takes_it():
    sent = []

    def handle(handler):
        sent.append(handler.headers["authorization"].encode("latin-1").decode())
        json_answer(handler, {"status": "IDLE"})

    with answering(handle) as url:
        run.conform(Plan(url=url, model=MODEL, token="gehëim"), ["stop.again"])
    assert set(sent) == {"Bearer gehëim"}


def test_the_report_as_json_and_as_lines(server):
    faulty, url = server
    faulty.reset("not_finite_agrees", "unhealthy")
    told = []
    report = run.conform(Plan(url=url, model=MODEL), ["health", "stop.again", "verdict.nan"], told.append)
    faulty.reset()
    assert told == list(report.results)
    content = json.loads(report.to_json())
    assert content.keys() == {"schema", "plan", "began", "seconds", "counts", "checks"}
    assert content["schema"] == 1
    assert (content["plan"]["url"], content["plan"]["model"], content["plan"]["k_dim"]) == (url, MODEL, 12)
    assert content["counts"] == {"pass": 3, "fail": 1, "skipped": 0, "hole": 1}
    by_name = {each["name"]: each for each in content["checks"]}
    assert by_name["health"].keys() == {"name", "section", "says", "outcome", "seen", "seconds"}
    assert (by_name["health"]["outcome"], by_name["verdict.nan"]["outcome"]) == ("fail", "hole")
    lines = [line(result, 20) for result in report.results]
    assert lines[1].startswith("fail     health                expected 200, got 503")
    assert "\n" in lines[1]
    assert "the wire says" not in lines[2]
    assert report.summary().endswith(": 3 pass, 1 fail, 0 skipped, 1 hole")


def test_holes_count_as_failures_where_that_is_asked_for(server):
    faulty, url = server
    faulty.reset("empty_agrees")
    report = run.conform(Plan(url=url, model=MODEL), ["verdict.empty"])
    faulty.reset()
    assert report.conforms()
    assert not report.conforms(strict=True)


def test_no_character_of_an_endpoint_reaches_the_terminal_that_is_not_printable():
    with answering(lambda handler: json_answer(handler, "\x1b[2J\n\x07", 500)) as url:
        report = run.conform(Plan(url=url, model=MODEL))
    with answering(lambda handler: handler.wfile.write(b"HTTP/1.1 500 x\r\nContent-Length: 4\r\n\r\n\x1b[2J")) as url:
        raw = run.conform(Plan(url=url, model=MODEL))
    for result in (report.results[0], raw.results[0]):
        assert result.outcome is Outcome.FAIL
        assert result.seen.isprintable()


def test_names_and_ids_of_an_endpoint_are_told_in_part_and_printable():
    name = "\x1b[2J\n" + 10_000 * "x"
    answers = {
        "/status": {"status": "IDLE"},
        "/models": {"data": [{"id": name}]},
        "/generate": {"status": "queued", "request_id": name, "queued_count": 1},
    }

    def handle(handler):
        json_answer(handler, answers.get(handler.path[handler.path.rindex("/") :], {}))

    with answering(handle) as url:
        report = run.conform(Plan(url=url, timeout_seconds=1.0), ["generate.wait_is_false"])
    found = {result.name: result for result in report.results}
    assert report.model == name
    assert found["model"].outcome is Outcome.PASS
    assert found["generate.wait_is_false"].outcome is Outcome.FAIL
    for result in report.results:
        assert result.seen.isprintable()
        assert len(result.seen) < 1100
