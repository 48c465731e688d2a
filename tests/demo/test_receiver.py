"""The receiver of callbacks."""

from __future__ import annotations

import json
import threading

import httpx2
import pytest

from poc_kernels.demo.receiver import receiving
from poc_kernels.service.callbacks import canonical_json, sign

KEY = b"a shared key"
BATCH = {"block_hash": "0xabc", "public_key": "node", "nonces": [3, 5], "dist": [1.25, 1.5]}


@pytest.fixture
def receiver():
    with receiving(KEY, lambda: 7.0) as running:
        yield running


def post(receiver, batch, path="/generated", key=KEY):
    body = canonical_json(batch)
    headers = {"X-Signature": sign(body, key)} if key else {}
    return httpx2.post(receiver.url + path, content=body, headers=headers, timeout=10, trust_env=False).status_code


def test_what_is_signed_is_taken_and_kept_in_order(receiver):
    assert post(receiver, BATCH) == 200
    assert post(receiver, {**BATCH, "fraud_detected": True}, "/validated") == 200
    first, second = receiver.calls
    assert (first.at, first.path, first.answered, first.signed) == (7.0, "/generated", 200, True)
    assert (first.block_hash, first.public_key, first.nonces, first.fraud_detected) == ("0xabc", "node", (3, 5), None)
    assert (second.path, second.fraud_detected) == ("/validated", True)
    assert receiver.nonces("/generated", "0xabc") == [3, 5]
    assert receiver.nonces("/generated", "0xdef") == []


def test_fingerprints_and_verdicts_on_them_are_kept(receiver):
    told = {"block_hash": "0xabc", "public_key": "node", "encoding": {}}
    artifacts = [{"nonce": 4, "vector_b64": "AAAA"}, {"nonce": 6, "vector_b64": "BBBB"}]
    assert post(receiver, {**told, "artifacts": artifacts}) == 200
    assert post(receiver, {**told, "artifacts": [{"nonce": 8, "vector_b64": "CCCC"}]}, key=b"another key") == 401
    assert post(receiver, {**told, "n_total": 7, "fraud_detected": True}, "/validated") == 200
    assert post(receiver, BATCH) == 200
    assert receiver.fingerprints("0xabc") == {4: "AAAA", 6: "BBBB"}
    assert receiver.fingerprints("0xdef") == {}
    assert receiver.nonces("/generated", "0xabc", fingerprints=True) == [4, 6]
    assert receiver.nonces("/generated", "0xabc") == [3, 5]
    assert [call.count for call in receiver.calls] == [2, 1, 7, 2]


@pytest.mark.parametrize("key", [None, b"another key"])
def test_a_wrong_signature_is_refused_and_noted(receiver, key):
    assert post(receiver, BATCH, key=key) == 401
    assert [call.signed for call in receiver.calls] == [False]
    assert receiver.nonces("/generated", "0xabc") == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", json.dumps({**BATCH, "nonces": "x"}).encode(), b'{"artifacts": [{}]}']
)
def test_what_is_no_batch_is_refused(receiver, body):
    headers = {"X-Signature": sign(body, KEY)}
    answer = httpx2.post(receiver.url + "/generated", content=body, headers=headers, timeout=10, trust_env=False)
    assert answer.status_code == 400
    assert receiver.calls == []


def test_the_first_messages_are_refused_so_that_they_are_sent_again():
    with receiving(KEY, lambda: 0.0, refuse=2) as receiver:
        assert [post(receiver, BATCH) for _ in range(3)] == [503, 503, 200]
        assert receiver.nonces("/generated", "0xabc") == [3, 5]
        assert [call.answered for call in receiver.calls] == [503, 503, 200]


def test_waiting_ends_with_the_message_or_the_time(receiver):
    assert not receiver.wait_for(lambda: bool(receiver.calls), 0.01)
    sender = threading.Timer(0.05, post, (receiver, BATCH))
    sender.start()
    assert receiver.wait_for(lambda: bool(receiver.calls), 20)
    sender.join(20)


def test_nobody_listens_afterwards():
    with receiving(KEY, lambda: 0.0) as receiver:
        assert post(receiver, BATCH) == 200
    with pytest.raises(httpx2.TransportError):
        post(receiver, BATCH)
