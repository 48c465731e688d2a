"""What a plan takes, the arithmetic of verdicts, and artifacts."""

from __future__ import annotations

import base64
import math
import struct

import numpy as np
import pytest
from scipy.stats import binom

from poc_kernels.conform.artifact import decode, distance, encode, moved, random_artifact, scaled, with_first
from poc_kernels.conform.outcome import FailedError
from poc_kernels.conform.plan import Plan, StatTest

URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url must be http or https with a host.*got '127.0.0.1:8000'"),
        ({"url": "ftp://host"}, "url must be"),
        ({"url": "http://host/?token=1"}, "url must be"),
        ({"url": "http://host:99999"}, "url must be .* a valid port if any.*got 'http://host:99999'"),
        ({"url": "http://[::1"}, "url must be"),
        ({"url": "http://two..dots"}, "url must be"),
        ({"url": "http://a host"}, "url must be"),
        ({"prefix": "/pow"}, "prefix must be one of /api/v1/pow, /api/v1/inference/pow, got '/pow'"),
        ({"proof": "distances"}, "proof must be one of vectors, fingerprint, got 'distances'"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"k_dim": 1}, "k_dim must be at least 2, got 1"),
        ({"queue_limit": 0}, "queue_limit must be at least 1, got 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be positive and finite, got 0.0"),
        ({"max_seconds": math.nan}, "max_seconds must be positive and finite, got nan"),
        ({"token": "a\nsecret"}, "token must be printable text, which a header can carry$"),
        ({"token": " "}, "token must be printable text"),
        ({"callback_host": "http://host"}, "callback_host must be a host, or host:port, got 'http://host'"),
        ({"callback_host": "host:port"}, "callback_host must be"),
        ({"callback_host": "a@host"}, "callback_host must be"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"url": URL, **changes})


@pytest.mark.parametrize(
    ("given", "address"), [("host", ("host", 0)), ("10.0.0.1:9000", ("10.0.0.1", 9000)), ("[::1]:9", ("::1", 9))]
)
def test_where_callbacks_go(given, address):
    assert Plan(url=URL, callback_host=given).callback_address() == address


def test_k_dim_is_the_forms_own_unless_it_is_said():
    assert [Plan(url=URL, proof=proof).form.k_dim for proof in ("vectors", "fingerprint")] == [12, 64]
    assert Plan(url=URL, k_dim=16).form.k_dim == 16


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5])
def test_p_values_are_those_of_the_binomial_test(p):
    test = StatTest(0.02, p, 0.01)
    for n in (1, 8, 200):
        for count in {0, 1, n // 2, n}:
            assert test.p_value(count, n) == pytest.approx(binom.sf(count - 1, n, p), rel=1e-9)


def test_artifacts_are_base64_of_float16():
    values = [0.5, -0.5, 0.5, 0.5]
    text = base64.b64encode(struct.pack("<4e", *values)).decode()
    assert encode(np.array(values)) == text
    assert decode(text, 4).tolist() == values


@pytest.mark.parametrize("k_dim", [2, 12, 64])
def test_forged_artifacts_are_what_they_are_said_to_be(k_dim):
    text = random_artifact("one", k_dim)
    assert text != random_artifact("other", k_dim)
    assert distance(text, text, k_dim) == 0
    for by in (0.02, 0.3, 1.4):
        assert distance(text, moved(text, k_dim, by), k_dim) == pytest.approx(by, abs=2e-3)
    raw = base64.b64decode(scaled(text, k_dim, 1.05))
    assert np.linalg.norm(np.frombuffer(raw, "<f2").astype(float)) == pytest.approx(1.05, abs=2e-3)
    assert math.isnan(struct.unpack("<e", base64.b64decode(with_first(text, k_dim, math.nan))[:2])[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!", "not base64"),
        (encode(np.array([1.0])), "has 2 bytes, 2 float16 are 4"),
        (encode(np.array([math.nan, 1.0])), "a NaN or an infinity"),
        (encode(np.array([math.inf, 1.0])), "a NaN or an infinity"),
        (encode(np.array([1.0, 1.0])), r"has norm 1\.4142, not 1"),
    ],
)
def test_what_is_no_artifact(text, message):
    with pytest.raises(FailedError, match=message):
        decode(text, 2)
