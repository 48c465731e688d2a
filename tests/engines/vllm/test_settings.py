"""Settings of rounds inside vLLM, which come from the environment."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from poc_kernels.engines.vllm.settings import VllmSettings, table


def test_vllm_s_own_bounds_on_users_hold_unless_others_are_set() -> None:
    unset = VllmSettings.from_environment({})
    assert (unset.max_in_flight, unset.max_body_bytes) == (None, None)
    environ = {"POC_KERNELS_MAX_IN_FLIGHT": "3", "POC_KERNELS_MAX_BODY_BYTES": "100"}
    chosen = VllmSettings.from_environment(environ)
    assert (chosen.max_in_flight, chosen.max_body_bytes) == (3, 100)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("VALIDATION_SHARE", "1.5", r"POC_KERNELS_VALIDATION_SHARE must be in \(0, 1\), got 1.5"),
        ("MAX_IN_FLIGHT", "0", "POC_KERNELS_MAX_IN_FLIGHT must be positive, got 0"),
        ("DRAIN_SECONDS", "soon", "POC_KERNELS_DRAIN_SECONDS must be a number, got 'soon'"),
        ("ALLOWED_ORIGINS", "*", "POC_KERNELS_ALLOWED_ORIGINS has no effect in vLLM: use vLLM's --allowed-origins"),
        ("VALIDATION_PACING", "free", "POC_KERNELS_VALIDATION_PACING has no effect in vLLM: .*_SHARE"),
        ("TOKEN", "", "POC_KERNELS_TOKEN must not be empty"),
        ("GUARD_METRICS", "1", "guard_metrics must come with a token, got none: set POC_KERNELS_TOKEN"),
    ],
)
def test_a_wrong_value_is_refused_by_its_variable(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        VllmSettings.from_environment({f"POC_KERNELS_{name}": text})


def test_a_variable_that_is_none_of_a_setting_is_told(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"POC_KERNELS_VALIDATION_SHAR": "0.3", "POC_KERNELS_TOKEN": "t"}
    environ |= {f"POC_KERNELS_{name}": "x" for name in ("BACKEND", "NATIVE", "TRITON_ARITHMETIC", "AMX_MODEL")}
    with caplog.at_level(logging.WARNING, "poc_kernels"):
        assert VllmSettings.from_environment(environ) == VllmSettings(token="t")
    (record,) = caplog.records
    assert record.getMessage() == "no settings in vLLM, and without effect: POC_KERNELS_VALIDATION_SHAR"


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()
    shown = page.partition("<!-- settings: begin")[2].partition("<!-- settings: end -->")[0]

    def rows(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("| `")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    assert rows(shown) == rows(table()), "it is what python -m poc_kernels.engines.vllm.settings prints"


def test_the_table_has_the_settings_with_an_effect() -> None:
    names = {line.split("`")[1] for line in table().splitlines()[2:]}
    assert {"POC_KERNELS_TOKEN", "POC_KERNELS_SLICE_SECONDS", "POC_KERNELS_VALIDATION_SHARE"} <= names
    assert "POC_KERNELS_ALLOWED_ORIGINS" not in names
