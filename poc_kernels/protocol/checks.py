"""Checks of a round's arguments: each error names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..definition import encoded

MAX_NONCE = 2**63 - 1
_MAX_TEXT = 1024
_MAX_URL = 2048


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise a TypeError unless the argument ``name`` is an int, a ValueError unless it lies in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def check_float(name: str, value: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a number, a ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an int beyond every float") from None
    if not finite:
        raise ValueError(f"{name} must be finite, got {value}")


def check_bool(name: str, value: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_probability(name: str, value: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a number, a ValueError unless it lies in [0, 1]."""
    check_float(name, value)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be a probability in [0, 1], got {value}")


def check_text(name: str, value: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a str, a ValueError unless UTF-8 of 1 to 1024 characters."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if not 1 <= len(value) <= _MAX_TEXT:
        raise ValueError(f"{name} must have 1 to {_MAX_TEXT} characters, got {len(value)}")
    encoded(name, value)


def check_url(name: str, url: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a str, a ValueError unless an http or https URL.

    The error does not quote the URL: its user, password and query can be secrets.
    """
    if not isinstance(url, str):
        raise TypeError(f"{name} must be a str or None, got {type(url).__name__}")
    fault = _fault_of_url(url)
    if fault is not None:
        raise ValueError(
            f"{name} must be an http or https URL of at most {_MAX_URL} characters, with a host, a valid port if any, "
            f"and no fragment, got {fault}"
        )


def _fault_of_url(url: str) -> str | None:
    if len(url) > _MAX_URL:
        return f"{len(url)} characters"
    if not url.isprintable() or " " in url or "\\" in url:
        return "one with a space, a backslash or a character that is not printable"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "one whose host or port is not valid"
    if parts.scheme not in ("http", "https"):
        return f"the scheme {parts.scheme!r}" if parts.scheme else "one without a scheme"
    if not parts.hostname:
        return "one without a host"
    if port == 0:
        return "port 0"
    return "one with a fragment" if "#" in url else None


# Lists of a batch can have a hundred thousand values: the whole list is looked at by built-ins, and value by value only
# where it is wrong, to say which value is.


def check_ints(name: str, values: Sequence[int], low: int, high: int) -> None:
    """Raise a TypeError unless the list ``name`` holds ints alone, a ValueError unless all lie in [low, high]."""
    if values and not (set(map(type, values)) == {int} and low <= min(values) and max(values) <= high):
        for value in values:
            check_int(name, value, low, high)


def check_distinct(name: str, values: Sequence[int]) -> None:
    """Raise a ValueError if a value of the list ``name`` is repeated."""
    repeated = len(values) - len(set(values))
    if repeated:
        raise ValueError(f"{name} must be distinct, got {repeated} repeated")


def check_list(name: str, values: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a list."""
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list, got {type(values).__name__}")
