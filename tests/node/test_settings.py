"""Settings that no node could run with are refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from poc_kernels.node.settings import Settings

NUMBERS = [field.name for field in dataclasses.fields(Settings) if field.type in ("int", "float", "int | None")]
SECONDS = [name for name in NUMBERS if name.endswith("_seconds") and name != "retry_after_seconds"]
MAY_BE_ZERO = {"port", "drain_seconds", "shutdown_seconds", "validation_wait_seconds"}
SHARES = {"validation_share"}


def test_the_defaults_are_taken() -> None:
    assert Settings(model="m") == Settings(model="m", host="127.0.0.1", random_projection=False, token=None)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in SHARES])
def test_numbers_that_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got -1$"):
        Settings(model="m", **{name: -1})
    if name in MAY_BE_ZERO:
        assert getattr(Settings(model="m", **{name: 0}), name) == 0
    else:
        with pytest.raises(ValueError, match=f"^{name} must be positive, got 0$"):
            Settings(model="m", **{name: 0})
    assert getattr(Settings(model="m", **{name: 1}), name) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*SECONDS, *SHARES, "temperature", "kv_memory"])
def test_numbers_must_be_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be finite, got {value}$"):
        Settings(model="m", **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got int8"),
        ({"validation_pacing": "fast"}, "validation_pacing must be auto, held or free, got fast"),
        ({"port": 65536}, r"port must be in \[0, 65536\), got 65536"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"validation_share": 0.0}, r"validation_share must be in \(0, 1\), got 0.0"),
        ({"validation_share": 1.0}, r"validation_share must be in \(0, 1\), got 1.0"),
        ({"kv_memory": 0.0}, r"kv_memory must be in \(0, 1\), got 0.0"),
        ({"kv_memory": 1.0}, r"kv_memory must be in \(0, 1\), got 1.0"),
        ({"token": ""}, "token must not be empty"),
        ({"callback_key": ""}, "callback_key must not be empty"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(model="m", **changes)


def test_they_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(model="m").port = 1  # type: ignore[misc]


@pytest.mark.parametrize("lowers_threads", [False, True])
def test_slices_are_held_back_where_nothing_else_protects_users(lowers_threads: bool) -> None:
    chosen = {
        pacing: Settings(model="m", validation_pacing=pacing).paced(lowers_threads)
        for pacing in ("auto", "held", "free")
    }
    assert chosen == {"auto": not lowers_threads, "held": True, "free": False}
