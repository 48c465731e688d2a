"""Logs as they are written."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

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
    assert record.pop("time").startswith("20")
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
