"""Structured logs: one JSON object per line, or plain lines for a terminal. Whoever reads them never stops the node."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from transformers.utils import logging as transformers_logging

_NOT_FIELDS = {*RESERVED_ATTRS, "message", "asctime", "color_message", "taskName"}
_LAST_SECONDS = 2.0
"""How long, at the end, the last lines may take to be written."""
_SPARED = ("asyncio", "uvicorn", "poc_kernels.connections")
"""Loggers of what any client can cause as often as it likes."""
_SPARED_SECONDS = 1.0
_MAX_TRACEBACK = 8000
"""Characters of a traceback that are logged: of longer ones, the beginning and the end."""


class _Plain(logging.Formatter):
    """Formats a line for a terminal, with the record's extra fields after the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        fields = [f"{name}={value!r}" for name, value in vars(record).items() if name not in _NOT_FIELDS]
        return " ".join([super().formatMessage(record), *fields])


class _Sparing(logging.Filter):
    """Lets pass, of the loggers of what any client can cause, one record a second for each place in the code."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int, type[BaseException] | None], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(_SPARED):
            return True
        place = (record.pathname, record.lineno, record.exc_info[0] if record.exc_info else None)
        last, left_out = self._last.get(place, (-_SPARED_SECONDS, 0))
        now = time.monotonic()
        if now < last + _SPARED_SECONDS:
            self._last[place] = last, left_out + 1
            return False
        self._last[place] = now, 0
        if left_out:
            record.left_out = left_out
        return True


def _bound_tracebacks(formatter: logging.Formatter) -> None:
    """Have a formatter shorten long tracebacks: a request can cause one of hundreds of kilobytes."""
    whole = formatter.formatException

    def bounded(info: Any) -> str:
        text, half = whole(info), _MAX_TRACEBACK // 2
        left_out = len(text) - 2 * half
        return text if left_out <= 0 else f"{text[:half]}\n[{left_out} characters left out]\n{text[-half:]}"

    formatter.formatException = bounded  # type: ignore[method-assign, assignment]


def configure(level: str, style: str) -> None:
    """Send all records to standard error; warnings of libraries too, in the same form.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "json", where a record's extra fields are keys of their own, or "text".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Sparing())
    if style == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                timestamp="time",  # RFC 3339, in UTC
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],
            )
        )
    else:
        handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    assert handler.formatter is not None
    _bound_tracebacks(handler.formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("transformers", "ContinuousBatchingLogger", "httpx2", "httpcore2"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(max(logging.WARNING, root.level))


@contextlib.contextmanager
def in_background(max_records: int) -> Iterator[Callable[[], int]]:
    """Have a thread write what goes to standard error: records, and all that Python prints there.

    Where its reader stands still, at most ``max_records`` wait, and more are dropped. Yields the function that counts
    these. At the end what waits is written, for at most 2 s. If that was not enough, what the process writes later is
    lost: it could never end.
    """
    before, handlers = sys.stderr, logging.getLogger().handlers
    try:
        descriptor = before.fileno()
    except (AttributeError, OSError):  # no file: nobody can make it stand still
        yield lambda: 0
        return
    stream = _BackgroundStream(descriptor, max_records)
    to_stderr = [each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is before]
    for handler in to_stderr:
        handler.setStream(stream)
    sys.stderr = stream
    try:
        yield lambda: stream.dropped
    finally:
        sys.stderr = before
        for handler in to_stderr:
            handler.setStream(before)
        if not stream.end(_LAST_SECONDS):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


class _BackgroundStream(io.TextIOBase):
    """A text stream that is written to a descriptor by a thread of its own; to write never waits.

    Attributes:
        dropped: number of writes that are lost: too many waited, or the descriptor did not take them.
    """

    def __init__(self, descriptor: int, max_waiting: int) -> None:
        self._descriptor = descriptor
        self._max_waiting = max_waiting
        # Of the queues, the one that signal handlers and destructors may put into at any time.
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.dropped = 0
        self._told = 0
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    encoding = "utf-8"

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._waiting.qsize() >= self._max_waiting:
            self.dropped += 1
        else:
            self._waiting.put(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def end(self, seconds: float) -> bool:
        """Write what waits, for some seconds at most; return whether all of it was written."""
        self._waiting.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            try:
                self._write(data)
            except OSError:  # nobody reads any more
                self.dropped += 1
                continue
            if self.dropped > self._told and self._waiting.empty():
                self._told = self.dropped
                logging.getLogger("poc_kernels").warning(
                    "log records were dropped: standard error was not read", extra={"dropped": self.dropped}
                )

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # a descriptor that others made so
                select.select([], [self._descriptor], [])
