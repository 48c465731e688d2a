"""Structured logs: one JSON object per line, or plain lines for a terminal."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from transformers.utils import logging as transformers_logging

_NOT_FIELDS = {*RESERVED_ATTRS, "message", "asctime", "color_message", "taskName"}


class _Plain(logging.Formatter):
    """Formats a line for a terminal, with the record's extra fields after the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        fields = [f"{name}={value!r}" for name, value in vars(record).items() if name not in _NOT_FIELDS]
        return " ".join([super().formatMessage(record), *fields])


def configure(level: str, style: str) -> None:
    """Send all records to standard error; warnings of libraries too, in the same form.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "json", where a record's extra fields are keys of their own, or "text".
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
