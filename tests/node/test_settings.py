"""Settings that no node could run with are refused by name; README has the table of what there is."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h11
import pytest

from poc_kernels.engines.transformers import openai_app
from poc_kernels.node import logs, server
from poc_kernels.node.settings import LIMITS, OPTIONS, SECRETS, Settings, described, table
from poc_kernels.protocol import checks, config, limits
from poc_kernels.service import gate

README = Path(__file__).parents[2] / "README.md"
OPERATING = README.parent / "docs" / "operating.md"
FIELDS = dataclasses.fields(Settings)
NUMBERS = [field.name for field in FIELDS if field.type in ("int", "float", "int | None")]
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
        ({"validation_pacing": "fast"}, "validation_pacing must be auto, paced or free, got fast"),
        ({"log_level": "trace"}, "log_level must be debug, info, warning or error, got trace"),
        ({"log_format": "xml"}, "log_format must be json or text, got xml"),
        ({"port": 65536}, r"port must be in \[0, 65536\), got 65536"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"validation_share": 0.0}, r"validation_share must be in \(0, 1\), got 0.0"),
        ({"validation_share": 1.0}, r"validation_share must be in \(0, 1\), got 1.0"),
        ({"kv_memory": 0.0}, r"kv_memory must be in \(0, 1\), got 0.0"),
        ({"kv_memory": 1.0}, r"kv_memory must be in \(0, 1\), got 1.0"),
        ({"token": ""}, "token must not be empty"),
        ({"callback_key": ""}, "callback_key must not be empty"),
        ({"token": "a\nb"}, "token must be printable text, which a header can carry$"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(model="m", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 8000.0}, "port must be an integer, got 8000.0"),
        ({"port": True}, "port must be an integer, got True"),
        ({"port": None}, "port must be an integer, got None"),
        ({"kv_blocks": "7"}, "kv_blocks must be an integer, got '7'"),
        ({"drain_seconds": "5"}, "drain_seconds must be a number, got '5'"),
        ({"kv_memory": False}, "kv_memory must be a number, got False"),
        ({"cuda_graphs": 1}, "cuda_graphs must be true or false, got 1"),
        ({"model": Path("m")}, r"model must be a string, got PosixPath\('m'\)"),
        ({"dtype": None}, "dtype must be a string, got None"),
        ({"token": b"secret"}, "token must be a string, got a value of type bytes"),
    ],
)
def test_values_of_another_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        Settings(**{"model": "m", **changes})


def test_a_model_is_required() -> None:
    with pytest.raises(TypeError, match="'model'"):
        Settings()


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(Settings(model="m", token="secret", callback_key="secret"))


def test_they_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(model="m").port = 1  # type: ignore[misc]


@pytest.mark.parametrize("lowers_threads", [False, True])
def test_slices_are_paced_where_nothing_else_protects_users(lowers_threads: bool) -> None:
    chosen = {
        pacing: Settings(model="m", validation_pacing=pacing).paced(lowers_threads)
        for pacing in ("auto", "paced", "free")
    }
    assert chosen == {"auto": not lowers_threads, "paced": True, "free": False}


# ---- the declarations ----


def test_every_field_is_an_option_or_a_secret() -> None:
    assert sorted(each.name for each in (*OPTIONS, *SECRETS)) == sorted(field.name for field in FIELDS)
    assert [each.name for each in SECRETS] == ["token", "callback_key"]


@pytest.mark.parametrize("name", NUMBERS)
def test_help_says_the_unit(name: str) -> None:
    (help,) = [each.help for each in OPTIONS if each.name == name]
    units = [
        unit for unit in ("seconds", "bytes", "tokens", "nonces", "blocks", "SMs", "slices") if unit.lower() in name
    ]
    assert all(unit in help for unit in units)


def test_a_boolean_s_option_reverses_it() -> None:
    shown = {each.name: described(each) for each in OPTIONS if each.kind is bool}
    assert {name: row[:2] for name, row in shown.items()} == {
        "cuda_graphs": ("--no-cuda-graphs", "off"),
        "random_projection": ("--random-projection", "off"),
        "guard_metrics": ("--guard-metrics", "off"),
    }
    assert shown["cuda_graphs"][2].startswith("do not replay")


def rows(text: str) -> list[list[str]]:
    """The rows of a table, however its columns are padded and ruled."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not all(set(cell) <= set("-:") for cell in row)]


def between(page: Path, name: str) -> str:
    """What a page has between the two comments of a table."""
    _, begun, after = page.read_text().partition(f"<!-- {name}: begin")
    block, ended, _ = after.partition(f"<!-- {name}: end -->")
    assert begun
    assert ended
    return block


def test_readme_has_the_table() -> None:
    printed = rows(table())
    assert rows(between(README, "settings")) == printed, "it is what python -m poc_kernels.node.settings prints"


def test_the_documentation_has_every_limit() -> None:
    printed = rows(table(LIMITS))
    assert rows(between(OPERATING, "limits")) == printed, "it is what python -m poc_kernels.node.settings limits prints"
    assert {"max_in_flight", "body_seconds", "callback_nonces", "max_connections"} <= {each.name for each in LIMITS}


def test_the_documentation_has_the_limits_without_a_setting() -> None:
    fixed = dict(rows(OPERATING.read_text().partition("What no setting changes:")[2].partition("##")[0])[1:])
    assert list(fixed.values()) == [
        str(h11.Connection(h11.SERVER)._max_incomplete_event_size),
        str(gate._MAX_SMALL_BODY),
        str(openai_app._MAX_REQUEST_ID_LENGTH),
        str(server._BACKLOG),
        str(config.MAX_BATCH_SIZE),
        str(config.MAX_SEQ_LEN),
        str(limits.SERVER_BOUNDS.logits),
        str(limits.SERVER_BOUNDS.signs),
        f"{checks._MAX_TEXT}, {checks._MAX_URL}",
        f"{logs._LAST_SECONDS:g}",
    ]


def test_readme_s_command_sets_a_token_that_can_be_used_and_guessed_by_nobody() -> None:
    (line,) = re.findall(r"^export POC_KERNELS_TOKEN=.*$", README.read_text(), re.MULTILINE)
    command = ["bash", "-c", f'{line}\nprintf %s "$POC_KERNELS_TOKEN"']
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first != second
    assert len(Settings(model="m", token=first).token or "") >= 24


def test_the_table_has_a_row_of_three_cells_per_setting() -> None:
    header, *body = rows(table())
    assert len(body) == len(FIELDS)
    assert {len(row) for row in (header, *body)} == {3}
    assert max(map(len, table().splitlines())) <= 120
    assert ["`--port`", "8000", "port to listen on; 0 for a free one"] in body
    assert ["`--model`", "required"] in [row[:2] for row in body]
    assert ["`--temperature`", "the model's"] in [row[:2] for row in body]
    assert ["`--body-seconds`", "30"] in [row[:2] for row in body]
    assert ["`POC_KERNELS_TOKEN`", "none"] in [row[:2] for row in body]


def test_the_module_prints_the_table() -> None:
    command = [sys.executable, "-m", "poc_kernels.node.settings"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{table()}\n"
