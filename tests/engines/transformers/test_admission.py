"""Which requests continuous batching gets to see."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poc_kernels.engines.transformers.admission import admitted_new_tokens, engine_unavailable
from poc_kernels.service.errors import AdmissionError

LIMITS: dict[str, Any] = {"vocabulary": 100, "max_new_tokens": 50, "max_tokens": 64, "param": "max_tokens"}


def refusal(prompt: list[int], asked: Any) -> AdmissionError:
    with pytest.raises(AdmissionError) as caught:
        admitted_new_tokens(prompt, asked, **LIMITS)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"
    return caught.value


@given(length=st.integers(0, 80), asked=st.none() | st.integers(-5, 80))
def test_what_fits_is_admitted_and_nothing_else(length: int, asked: int | None) -> None:
    wanted = 1 if asked is None else asked
    if length >= 1 and 1 <= wanted <= 50 and length + wanted <= 64:
        admitted = admitted_new_tokens([0] * length, asked, **LIMITS)
        assert admitted == (min(50, 64 - length) if asked is None else asked)
    else:
        refusal([0] * length, asked)


@pytest.mark.parametrize("asked", [0, -1, True, 1.5, "5"])
def test_new_tokens_are_a_positive_integer(asked: Any) -> None:
    error = refusal([1], asked)
    assert error.param == "max_tokens"
    assert repr(asked) in error.message


def test_more_than_the_limit_is_refused_not_clamped() -> None:
    assert admitted_new_tokens([1], 50, **LIMITS) == 50
    assert "at most 50" in refusal([1], 51).message


@pytest.mark.parametrize("token", [-1, 100])
def test_token_ids_are_in_the_vocabulary(token: int) -> None:
    assert admitted_new_tokens([0, 99], 1, **LIMITS) == 1
    assert "[0, 100)" in refusal([0, token], 1).message


def test_an_empty_prompt_is_refused() -> None:
    assert "empty" in refusal([], None).message


@pytest.mark.parametrize(("length", "asked", "param"), [(64, None, None), (60, 5, "max_tokens"), (70, 1, None)])
def test_what_does_not_fit_says_so(length: int, asked: int | None, param: str | None) -> None:
    error = refusal([1] * length, asked)
    assert error.code == "context_length_exceeded"
    assert error.param == param


def test_an_engine_that_is_away_is_asked_again() -> None:
    error = engine_unavailable("being rebuilt")
    assert (error.status, error.headers) == (503, {"Retry-After": "1"})
    assert error.body()["error"]["type"] == "server_error"
