"""Logs as they are written."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest
from web import TIMEOUT, eventually

from poc_kernels.node import logs

LIBRARIES = ("transformers", "ContinuousBatchingLogger", "httpx2", "httpcore2")
logger = logging.getLogger("poc_kernels")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, *LIBRARIES)]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    yield
    for each, (each.handlers, level, each.propagate) in zip(loggers, before, strict=True):
        each.setLevel(level)


def test_json_has_the_fields_as_keys(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logger.warning("fraud %s", "detected", extra={"nonces": 32, "public_key": "k\n\ud800"})
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    record = json.loads(line)
    assert datetime.fromisoformat(record.pop("time")).utcoffset() is not None
    assert record == {
        "level": "WARNING",
        "logger": "poc_kernels",
        "message": "fraud detected",
        "nonces": 32,
        "public_key": "k\n\ud800",
    }


def test_json_has_the_traceback_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        raise ValueError("no memory left")
    except ValueError:
        logger.exception("a proof batch failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: no memory left" in json.loads(line)["exc_info"]


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_long_traceback_is_shortened_to_its_ends(capsys: pytest.CaptureFixture[str], style: str) -> None:
    logs.configure("info", style)
    try:
        raise ValueError("x" * 10**6 + "its end")
    except ValueError:
        logger.exception("a proof batch failed")
    line = capsys.readouterr().err
    assert "Traceback (most recent call last)" in line
    assert "characters left out" in line
    assert "its end" in line
    assert len(line) < 10_000


def test_text_has_the_fields_behind_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logger.info("node started", extra={"device": "cpu", "hidden_size": 64})
    line = capsys.readouterr().err
    assert line.endswith(" INFO poc_kernels: node started device='cpu' hidden_size=64\n")


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(capsys: pytest.CaptureFixture[str], level: str, shown: int) -> None:
    logs.configure(level, "json")
    for method in (logger.debug, logger.info, logger.warning, logger.error):
        method("said")
    assert len(capsys.readouterr().err.splitlines()) == shown


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_say_warnings_once_and_in_the_same_form(capsys: pytest.CaptureFixture[str], name: str) -> None:
    logs.configure("info", "json")
    logs.configure("info", "json")  # in place of the first
    library = logging.getLogger(name)
    library.info("chatter")
    library.warning("trouble")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["logger"] == name
    logs.configure("error", "json")
    library.warning("trouble")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "UTC", "America/St_Johns"])
def test_times_say_their_offset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        logs.configure("info", "json")
        before = datetime.now(timezone.utc)
        logger.info("said")
        told = datetime.fromisoformat(json.loads(capsys.readouterr().err)["time"])
        assert before <= told <= datetime.now(timezone.utc)
    finally:
        monkeypatch.undo()
        time.tzset()


# ---- what clients can cause ----


@pytest.mark.parametrize("name", ["asyncio", "uvicorn.error", "poc_kernels.connections"])
def test_what_any_client_can_cause_is_said_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    logs.configure("info", "json")
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    said = logging.getLogger(name)

    def say() -> None:
        for error in (None, OSError("no descriptors"), None, OSError("none yet"), ValueError("another")):
            said.error("trouble", exc_info=error)

    for _ in range(1000):
        say()
    now += 1.0
    say()
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    records = [record for record in told if record["message"] == "trouble"]  # threads of other tests may say more
    assert [record.get("exc_info", "").splitlines()[-1:] for record in records] == [
        [],
        ["OSError: no descriptors"],
        ["ValueError: another"],
    ] * 2
    assert [record.get("left_out") for record in records] == [None, None, None, 1999, 1999, 999]


def test_what_the_node_says_is_all_said(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    for _ in range(100):
        logger.warning("fraud")
    assert len(capsys.readouterr().err.splitlines()) == 100


# ---- readers of the log ----


class Pipe:
    """A pipe as standard error, which is read when the test does."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self._before = sys.stderr

    def __enter__(self) -> Pipe:
        self._stream = sys.stderr = os.fdopen(self.write_end, "w", closefd=False)
        logs.configure("info", "json")
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._before
        os.close(self.read_end)
        with contextlib.suppress(BrokenPipeError):
            self._stream.close()
        os.close(self.write_end)

    def records(self, count: int) -> list[dict[str, object]]:
        """The next records."""
        with os.fdopen(os.dup(self.read_end), "rb", buffering=0) as lines:
            return [json.loads(lines.readline()) for _ in range(count)]

    def fill(self) -> int:
        """Write until nothing more fits; return how many bytes there are."""
        os.set_blocking(self.write_end, False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                count += os.write(self.write_end, bytes(select.PIPE_BUF))
        os.set_blocking(self.write_end, True)
        return count


def flood(count: int, begin: int = 0) -> None:
    for index in range(begin, count):
        logger.info("said", extra={"index": index, "filler": "x" * 1000})


def test_nobody_waits_for_a_reader_that_stands_still() -> None:
    with Pipe() as pipe, logs.in_background(1000) as dropped:
        full = pipe.fill()
        flood(1)
        eventually(sys.stderr._waiting.empty)  # type: ignore[attr-defined]
        flood(3000, begin=1)
        kept, lost = 1001, dropped()  # one is being written, the others wait
        assert lost == 3000 - kept
        print("as tracebacks are", file=sys.stderr)  # nor does whoever prints
        while full:
            full -= len(os.read(pipe.read_end, full))
        indices = [record["index"] for record in pipe.records(kept)]
        assert indices == list(range(kept))
        (told,) = pipe.records(1)
        assert told["message"] == "log records were dropped: standard error was not read"
        assert told["dropped"] == dropped() >= lost
        logger.info("it flows again")
        assert pipe.records(1)[0]["message"] == "it flows again"


def test_the_last_records_are_written() -> None:
    with Pipe() as pipe:
        stderr = sys.stderr
        with logs.in_background(1000):
            assert sys.stderr is not stderr
            logger.info("last")
            traceback.print_exception(ZeroDivisionError("division by zero"))
        assert sys.stderr is stderr
        logger.info("in the foreground")
        text = os.read(pipe.read_end, 2**16).decode()
    assert json.loads(text.splitlines()[0])["message"] == "last"
    assert "ZeroDivisionError: division by zero" in text
    assert json.loads(text.splitlines()[-1])["message"] == "in the foreground"


def test_the_end_does_not_wait_for_a_reader_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_LAST_SECONDS", 0.05)
    ended: list[bool] = []

    def run() -> None:
        with logs.in_background(1000):
            flood(500)
        flood(500)  # what comes later is lost
        ended.append(True)

    with Pipe() as pipe:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(TIMEOUT)
        while os.read(pipe.read_end, 2**16):  # the thread that writes goes on, and ends: the pipe has no writer then
            pass
    assert ended == [True]
    eventually(lambda: "logs" not in [each.name for each in threading.enumerate()])


def test_a_reader_that_is_gone() -> None:
    with Pipe() as pipe, logs.in_background(1000) as dropped:
        reader, pipe.read_end = pipe.read_end, os.open(os.devnull, os.O_RDONLY)
        os.close(reader)
        flood(10)
        eventually(lambda: dropped() >= 10)


def test_a_descriptor_that_does_not_block() -> None:
    with Pipe() as pipe, logs.in_background(1000) as dropped:
        os.set_blocking(pipe.write_end, False)
        flood(200)
        assert [record["index"] for record in pipe.records(200)] == list(range(200))
        assert dropped() == 0


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("info", "text")
    with logs.in_background(10) as dropped:
        assert sys.stderr is stream
        logger.info("said")
        assert stream.getvalue().endswith("said\n")
        assert dropped() == 0
