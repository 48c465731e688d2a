"""Settings of the service, and their environment variables."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from poc_kernels.service.settings import ServiceSettings, variable


def test_without_variables_the_defaults_are_taken() -> None:
    others = {"PATH": "/bin", "POC_KERNELS_BACKEND": "reference", "POC_KERNELS_PORT": "tcp://10.0.0.1:8000"}
    assert ServiceSettings.from_environment(others) == ServiceSettings()


def test_every_setting_has_a_variable() -> None:
    given: dict[str, Any] = {
        field.name: {"bool": True, "int": 7, "int | None": 7, "float": 0.25}.get(str(field.type), "paced")
        for field in dataclasses.fields(ServiceSettings)
    }
    given["allowed_origins"] = "https://a.example,http://localhost:3000"
    environ = {f"POC_KERNELS_{name.upper()}": str(value) for name, value in given.items()}
    assert dataclasses.asdict(ServiceSettings.from_environment(environ)) == given


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("True", True), ("0", False), ("FALSE", False)]
)
def test_booleans(text: str, value: bool) -> None:
    environ = {"POC_KERNELS_RANDOM_PROJECTION": text}
    assert ServiceSettings.from_environment(environ).random_projection is value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("random_projection", "yes", "must be true or false, got 'yes'"),
        ("max_in_flight", "many", "must be an integer, got 'many'"),
        ("max_in_flight", "1.5", "must be an integer, got '1.5'"),
        ("max_in_flight", "", "must be an integer, got ''"),
        ("max_in_flight", "0", "must be positive, got 0"),
        ("body_seconds", "soon", "must be a number, got 'soon'"),
        ("body_seconds", "inf", "must be finite, got inf"),
        ("body_seconds", "nan", "must be finite, got nan"),
        ("drain_seconds", "-1", "must be at least 0, got -1.0"),
        ("validation_share", "1", r"must be in \(0, 1\), got 1.0"),
        ("validation_pacing", "held", "must be auto, paced or free, got held"),
        ("token", "", "must not be empty; leave it out for none"),
        ("token", " \n", "must not be empty; leave it out for none"),
        ("token", "a\nb", "must be printable text, which a header can carry"),
        ("token", "a\x7f", "must be printable text, which a header can carry"),
        ("token", "a\udcff", "must be printable text, which a header can carry"),
        ("callback_key", "a\udcff", "must be text in UTF-8"),
        ("allowed_origins", "", r"must be \* or origins such as https://example.org, separated by commas, got "),
        ("allowed_origins", "a.example", r"must be \* or origins such as .*, got a.example"),
        ("allowed_origins", "https://a.example/", r"must be \* or origins such as .*, got https://a.example/"),
        ("allowed_origins", "https://*.example", r"must be \* or origins such as .*, got https://\*.example"),
        ("allowed_origins", "https://a.example,*", r"must be \* or origins such as .*, got https://a.example,\*"),
        ("callback_key", "", "must not be empty; leave it out for none"),
    ],
)
def test_errors_name_the_variable(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^POC_KERNELS_{name.upper()} {message}$"):
        ServiceSettings.from_environment({variable(name): text})


def test_a_subclass_reads_its_own_settings_too() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Plain(ServiceSettings):
        pass

    settings = Plain.from_environment({"POC_KERNELS_TOKEN": "secret"})
    assert type(settings) is Plain
    assert settings.token == "secret"
    assert "secret" not in repr(settings)


def test_to_guard_the_metrics_takes_a_token() -> None:
    with pytest.raises(ValueError, match=r"^guard_metrics must come with a token, got none: set POC_KERNELS_TOKEN$"):
        ServiceSettings(guard_metrics=True)
    assert ServiceSettings(guard_metrics=True, token="secret").guard_metrics
