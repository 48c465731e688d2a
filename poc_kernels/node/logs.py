"""Structured logs: one JSON object a line, or plain lines for a terminal."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from transformers.utils import logging as transformers_logging

_NOT_FIELDS = {*RESERVED_ATTRS, "message", "asctime", "color_message", "taskName"}


class _Plain(logging.Formatter):
    """A line for a terminal, with the event's fields behind the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        fields = [f"{name}={value!r}" for name, value in vars(record).items() if name not in _NOT_FIELDS]
        return " ".join([super().formatMessage(record), *fields])


def configure(level: str, style: str) -> None:
    """Send the root logger's records to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "json", with a record's extra fields as keys of their own, or "text".
    """
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                timestamp=False,
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],
            )
        )
    else:
        handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("transformers", "ContinuousBatchingLogger", "httpx2", "httpcore2"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(max(logging.WARNING, root.level))
