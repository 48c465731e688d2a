"""Callbacks to a receiver on loopback: what is posted, and when."""

import base64
import datetime
import itertools
import json
import logging
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from callback_receivers import KEY, OK, SECONDS, Observer, alone, batch, generated, records, verdict

from poc_kernels.service import callbacks
from poc_kernels.service.callbacks import CallbackSender, canonical_json, sign, sign_post, verify

pytest_plugins = ["callback_receivers"]

# The body and its signature.


def test_a_body_is_canonical_json():
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'


def test_a_known_signature_of_artifacts():
    """As the first of the network's nodes signed them."""
    known = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())["akup_signature"]
    body = canonical_json(json.loads(known["body"]))
    assert body == known["body"].encode()
    assert sign(body, known["key"].encode()) == known["x_signature"]


def test_signatures_are_hmac_sha256():
    # RFC 4231, case 2.
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert sign(b"what do ya want for nothing?", b"Jefe") == expected
    assert verify(b"what do ya want for nothing?", expected, b"Jefe")
    assert not verify(b"what do ya want for nothing!", expected, b"Jefe")
    assert not verify(b"what do ya want for nothing?", expected, b"jefe")


@pytest.mark.parametrize("signature", ["", "é", "\udcff", "0" * 64])
def test_a_signature_of_any_text_is_judged(signature):
    assert not verify(b"body", signature, KEY)


def test_the_receiver_verifies_raw_and_serialised_again(receiver, senders):
    sender = senders(key=KEY)
    sender.start()
    sent = verdict(3, 5, block_hash='block 块 "\U0001f9f1"', dist=[1.1, 0.1 + 0.2])
    sender.validated(receiver.url, sent)
    receiver.wait(1)
    path, headers, body, *_ = receiver.posts[0]
    assert path == "/validated"
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == sent
    assert body == json.dumps(sent, sort_keys=True, separators=(",", ":")).encode("utf-8")
    assert verify(body, headers["X-Signature"], KEY)
    assert verify(canonical_json(json.loads(body)), headers["X-Signature"], KEY)
    assert not verify(body, headers["X-Signature"], b"another key")


def test_no_key_no_signature(receiver, senders):
    sender = senders()
    sender.start()
    generated(sender, receiver.url, batch(1))
    receiver.wait(1)
    headers = receiver.posts[0][1]
    assert "X-Signature" not in headers
    assert "webhook-signature" not in headers
    assert headers["webhook-id"].startswith("msg_")


def test_the_signature_of_a_post_is_that_of_standard_webhooks():
    # The example that the libraries of Standard Webhooks are tested with.
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign_post("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', key)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_post_is_signed_with_its_id_and_its_time(receiver, senders):
    sender = senders(key=KEY)
    sender.start()
    before = int(time.time())
    for nonce in (1, 2):
        sender.validated(receiver.url, verdict(nonce))
    sender.observer.wait("delivered", 2)
    ids = set()
    for _, headers, body, *_ in receiver.posts:
        post_id, timestamp = headers["webhook-id"], int(headers["webhook-timestamp"])
        assert headers["webhook-signature"] == sign_post(post_id, timestamp, body, KEY)
        assert before <= timestamp <= time.time()
        ids.add(post_id)
    assert len(ids) == 2


def test_an_attempt_that_is_repeated_has_the_same_id_and_body_and_a_time_of_its_own(receivers, senders, monkeypatch):
    class Clock(datetime.datetime):
        seconds = itertools.count(1_700_000_000, 1000)

        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(next(cls.seconds), tz)

    monkeypatch.setattr(callbacks, "datetime", Clock)
    calls = itertools.count()
    receiver = receivers(answer=lambda path, content: (500, {}) if next(calls) < 2 else OK)
    sender = senders(key=KEY)
    generated(sender, receiver.url, batch(1))
    generated(sender, receiver.url, batch(2))
    sender.start()
    sender.observer.wait("failed", 1)
    generated(sender, receiver.url, batch(3))
    sender.observer.wait("delivered", 2)
    posts = [(json.loads(body)["nonces"], headers) for _, headers, body, *_ in receiver.posts]
    assert [nonces for nonces, _ in posts] == [[1, 2], [1, 2], [1, 2], [3]]
    ids = [headers["webhook-id"] for _, headers in posts]
    assert ids == [ids[0]] * 3 + [ids[3]]
    assert ids[0] != ids[3]
    assert [int(headers["webhook-timestamp"]) for _, headers in posts[:3]] == [
        1_700_000_000,
        1_700_001_000,
        1_700_002_000,
    ]
    assert len({headers["webhook-signature"] for _, headers in posts}) == 4
    assert len({headers["X-Signature"] for _, headers in posts[:3]}) == 1


@pytest.fixture(scope="module")
def receiving():
    """What docs/protocol.md shows a receiver to do."""
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def is_new(" in each]
    return lambda: exec(code, names := {}) or names["is_new"]


def test_the_receiver_of_the_documentation_takes_each_post_once(receiver, senders, receiving):
    sender = senders(key=KEY)
    sender.start()
    for nonce in (1, 2):
        sender.validated(receiver.url, verdict(nonce))
    sender.observer.wait("delivered", 2)
    is_new = receiving()
    posts = [(headers, body) for _, headers, body, *_ in receiver.posts]
    assert [is_new(*post, KEY) for post in posts] == [True, True]
    assert [is_new(*post, KEY) for post in posts] == [False, False]  # replayed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda headers, body: (headers, body + b" "), "signature"),
        (lambda headers, body: ({**headers, "webhook-id": "msg_other"}, body), "signature"),
        (lambda headers, body: ({**headers, "webhook-timestamp": str(int(time.time()) - 1)}, body), "signature"),
        (lambda headers, body: ({**headers, "webhook-signature": "v1,"}, body), "signature"),
        (lambda headers, body: (signed(headers, body, int(time.time()) - 400), body), "time"),
        (lambda headers, body: (signed(headers, body, int(time.time()) + 400), body), "time"),
    ],
)
def test_the_receiver_of_the_documentation_refuses_what_is_forged_or_old(receiving, change, reason):
    headers, body = change(signed({"webhook-id": "msg_1"}, b"{}", int(time.time())), b"{}")
    with pytest.raises(ValueError, match=reason):
        receiving()(headers, body, KEY)


def signed(headers, body, timestamp):
    signature = sign_post(headers["webhook-id"], timestamp, body, KEY)
    return {**headers, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,AAAA {signature}"}


# What shares a post, and when it goes.


def test_consecutive_batches_of_a_round_share_a_post(receiver, senders):
    sender = senders()
    for nonces in ((1, 2), (3,), (4, 5)):
        generated(sender, receiver.url, batch(*nonces))
    sender.start()
    sender.observer.wait("delivered", 1)
    assert receiver.contents() == [batch(1, 2, 3, 4, 5)]
    assert sender.observer.events == [("delivered", "generated", 5)]
    assert sender.status()["delivered_batches"] == 3


def test_the_lists_that_the_proof_form_names_are_joined(receiver, senders):
    sender = senders()
    for nonces in ((1, 2), (3,)):
        body = {"block_hash": "b", "nonces": list(nonces), "artifacts": [f"a{nonce}" for nonce in nonces]}
        sender.generated(receiver.url, body, per_nonce=("nonces", "artifacts"))
    sender.start()
    sender.observer.wait("delivered", 1)
    assert receiver.contents() == [{"block_hash": "b", "nonces": [1, 2, 3], "artifacts": ["a1", "a2", "a3"]}]


def test_nonces_may_stand_in_no_list_of_their_own(receiver, senders):
    """They are counted and logged all the same, and what is said of each is merged."""
    sender = senders(flush_seconds=60.0)
    for nonces in ([1, 2], [5]):
        body = {"public_key": "key", "artifacts": [{"nonce": nonce, "vector_b64": "AAA="} for nonce in nonces]}
        sender.generated(receiver.url, body, per_nonce=("artifacts",), nonces=nonces)
    sender.validated(receiver.url, {"n_total": 3, "n_mismatch": 0}, [1, 2, 5])
    assert (sender.pending(), sender.pending_nonces()) == (3, 6)
    sender.start()
    sender.close(SECONDS)
    told = [{"nonce": nonce, "vector_b64": "AAA="} for nonce in (1, 2, 5)]
    assert receiver.contents(path="/generated") == [{"public_key": "key", "artifacts": told}]
    assert receiver.contents(path="/validated") == [{"n_total": 3, "n_mismatch": 0}]
    assert sorted(sender.observer.of("delivered")) == [("generated", 3), ("validated", 3)]


def test_lists_of_another_length_than_the_nonces_are_refused(senders):
    with pytest.raises(ValueError, match=r"body\['artifacts'\] must have 2 values, one per nonce, got 1"):
        senders().generated("http://127.0.0.1:1", {"artifacts": [1]}, per_nonce=("artifacts",), nonces=[1, 2])


def test_proofs_with_other_per_nonce_lists_are_not_merged(receiver, senders):
    sender = senders()
    bodies = [
        {"block_hash": "b", "nonces": [1]},
        {"block_hash": "b", "nonces": [2], "dist": [1.0]},
        {"block_hash": "b", "nonces": [3], "artifacts": ["a"]},
    ]
    for body in bodies:
        sender.generated(receiver.url, body, per_nonce=tuple(body)[1:])
    sender.start()
    sender.observer.wait("delivered", 3)
    assert receiver.contents() == bodies


@pytest.mark.parametrize("key", ["public_key", "block_hash", "block_height", "node_id", "group_id"])
def test_batches_that_differ_are_not_merged_and_keep_their_order(receiver, senders, key):
    sender = senders()
    first, second, third = batch(1, **{key: 1}), batch(2, **{key: 2}), batch(3, **{key: 1})
    for each in (first, second, third):
        generated(sender, receiver.url, each)
    sender.start()
    sender.observer.wait("delivered", 3)
    assert receiver.contents() == [first, second, third]


def test_posts_are_filled_up_to_the_nonces_allowed(receiver, senders):
    sender = senders(max_nonces_per_post=4)
    for nonces in ((1, 2), (3, 4), (5,), (6,), (10, 11, 12, 13, 14), (20,)):
        generated(sender, receiver.url, batch(*nonces))
    sender.start()
    sender.observer.wait("delivered", 4)
    assert receiver.nonces() == [[1, 2, 3, 4], [5, 6], [10, 11, 12, 13, 14], [20]]


def test_verdicts_are_never_merged_and_do_not_wait(receiver, senders):
    sender = senders(flush_seconds=3600)
    for nonce in (1, 2, 3):
        sender.validated(receiver.url, verdict(nonce))
    sender.start()
    sender.observer.wait("delivered", 3)
    assert receiver.contents("/validated") == [verdict(1), verdict(2), verdict(3)]


def test_rounds_of_different_receivers_are_kept_apart(receiver, senders):
    sender = senders()
    for nonce, path in enumerate(("/a", "/b", "/a/", "/b")):
        generated(sender, receiver.url + path, batch(nonce))
    sender.start()
    sender.observer.wait("delivered", 2)
    assert receiver.nonces(path="/a/generated") == [[0, 2]]
    assert receiver.nonces(path="/b/generated") == [[1, 3]]


def test_a_batch_waits_for_others_up_to_the_flush_time(receiver, senders):
    sender = senders(flush_seconds=0.3)
    sender.start()
    begin = time.monotonic()
    generated(sender, receiver.url, batch(1))
    generated(sender, receiver.url, batch(2))
    receiver.wait(1)
    assert receiver.nonces() == [[1, 2]]
    assert receiver.posts[0][-1] - begin >= 0.3


def test_a_post_that_can_not_grow_does_not_wait(receiver, senders):
    sender = senders(flush_seconds=3600, max_nonces_per_post=3)
    sender.start()
    generated(sender, receiver.url, batch(1, 2))
    generated(sender, receiver.url, batch(3))  # full
    sender.observer.wait("delivered", 1)
    generated(sender, receiver.url, batch(4))
    generated(sender, receiver.url, batch(5, node_id=1))  # followed by another
    sender.observer.wait("delivered", 2)
    assert receiver.nonces() == [[1, 2, 3], [4]]
    assert (sender.pending(), sender.pending_nonces()) == (1, 1)


def test_a_batch_is_copied(receiver, senders):
    sender = senders()
    mine = batch(1, 2)
    generated(sender, receiver.url, mine)
    mine["nonces"].append(3)
    mine["node_id"] = 9
    sender.start()
    receiver.wait(1)
    assert receiver.contents() == [batch(1, 2)]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_proxies_of_the_environment_are_honoured(receivers, senders, monkeypatch, variable):
    for name in ("http_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy, direct = receivers(), receivers()
    monkeypatch.setenv(variable, proxy.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    sender = senders()
    sender.start()
    generated(sender, "http://node.test", batch(1))
    generated(sender, direct.url, batch(2))
    sender.observer.wait("delivered", 2)
    assert [post[0] for post in proxy.posts] == ["http://node.test/generated"]
    assert direct.nonces(path="/generated") == [[2]]


# The sender as a whole.


def test_many_producers_and_a_receiver_that_fails_now_and_then(receivers, senders):
    calls = itertools.count()
    receiver = receivers(answer=lambda path, content: (500, {}) if next(calls) % 3 == 0 else OK)
    sender = senders(first_retry_seconds=0.001, max_retry_seconds=0.001, max_nonces_per_post=7)
    sender.start()

    def produce(node_id):
        for nonce in range(40):
            generated(sender, receiver.url, batch(nonce, node_id=node_id))
            sender.validated(receiver.url, verdict(nonce, node_id=node_id))

    producers = [threading.Thread(target=produce, args=(node_id,)) for node_id in range(4)]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join(SECONDS)
    sender.close(SECONDS)
    assert (sender.pending(), sender.status()["delivered_batches"]) == (0, 320)
    for path in ("/generated", "/validated"):
        for node_id in range(4):
            contents = [each for each in receiver.contents(path, status=200) if each["node_id"] == node_id]
            assert [nonce for each in contents for nonce in each["nonces"]] == list(range(40))


def test_a_destination_without_deliveries_is_forgotten(receiver, senders):
    sender = senders()
    sender.start()
    for number in range(50):
        generated(sender, f"{receiver.url}/{number}", batch(number))
    sender.observer.wait("delivered", 50)
    assert sender._destinations == {}
    deadline = time.monotonic() + SECONDS
    while sender._tasks and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not sender._tasks
    assert Counter(path for path, *_ in receiver.posts) == Counter(f"/{number}/generated" for number in range(50))


def test_an_observer_that_raises_costs_nothing(receiver, senders, caplog):
    class Broken(Observer):
        def delivered(self, kind, nonces):
            super().delivered(kind, nonces)
            raise RuntimeError("broken")

    observer = Broken()
    sender = senders(observer=observer)
    sender.start()
    for nonce in range(3):
        generated(sender, receiver.url, alone(nonce))
    observer.wait("delivered", 3)
    assert receiver.nonces() == [[0], [1], [2]]
    sender.close(SECONDS)
    assert len(records(caplog, "callback observer failed")) == 3


def test_an_observer_is_not_needed(receiver, senders):
    sender = senders(observer=None)
    sender.start()
    generated(sender, receiver.url, batch(1))
    sender.close(SECONDS)
    assert sender.status()["delivered_batches"] == 1


@pytest.mark.parametrize("hangs", [False, True])
def test_no_password_and_no_query_in_logs_or_status(receivers, senders, caplog, hangs):
    caplog.set_level(logging.DEBUG)
    released = threading.Event()
    why = "Cannot POST /cb/generated?token=secret%2f1 of user:secret, secret/1"
    receiver = receivers(answer=lambda path, content: (hangs and released.wait(SECONDS) and None) or (404, {}, why))
    sender = senders(timeout_seconds=0.2 if hangs else SECONDS)
    sender.start()
    generated(sender, receiver.url.replace("http://", "http://user:secret@") + "/cb?token=secret%2f1", batch(1))
    sender.observer.wait("failed", 1)
    released.set()
    sender.close(0)
    receiver.wait(1)
    path, headers, *_ = receiver.posts[0]
    assert path == "/cb/generated?token=secret%2f1"
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"user:secret").decode()
    said = records(caplog, "callback failed")
    assert said[0].url == f"{receiver.url}/cb/generated?..."
    told = [(record.getMessage(), vars(record)) for record in caplog.records]
    assert "secret" not in str(told) + str(sender.status())


@pytest.mark.parametrize(
    ("tail", "path"),
    [
        ("/cb?token=abc", "/cb/generated?token=abc"),
        ("/cb/?a=1&b=%2F", "/cb/generated?a=1&b=%2F"),
        ("?a", "/generated?a"),
        ("/a%2Fb%20c/", "/a%2Fb%20c/generated"),
        ("/cb#part", "/cb/generated"),
    ],
)
def test_the_kind_is_added_to_the_path(receiver, senders, tail, path):
    sender = senders()
    sender.start()
    generated(sender, receiver.url + tail, batch(1))
    sender.observer.wait("delivered", 1)
    assert [post[0] for post in receiver.posts] == [path]


def test_close_sends_what_waits(receiver, senders):
    sender = senders(flush_seconds=3600)
    sender.start()
    for nonce in range(3):
        generated(sender, receiver.url, batch(nonce))
    assert receiver.posts == []
    sender.close(SECONDS)
    assert receiver.nonces() == [[0, 1, 2]]
    assert (sender.pending(), sender.status()["delivered_batches"]) == (0, 3)


def test_close_again_does_nothing_and_what_comes_later_is_dropped(receiver, senders, caplog):
    sender = senders()
    sender.start()
    sender.close(SECONDS)
    sender.close(SECONDS)
    generated(sender, receiver.url, batch(1, 2))
    assert sender.observer.events == [("dropped", "generated", 2)]
    assert (sender.pending(), receiver.posts) == (0, [])
    assert [record.nonces for record in records(caplog, "callback dropped")] == [2]
    with pytest.raises(RuntimeError, match="once, before close"):
        sender.start()


def test_close_of_a_sender_that_never_started_says_what_is_lost(receiver, senders, caplog):
    sender = senders()
    generated(sender, receiver.url, batch(1))
    sender.close(3600)
    assert [record.nonces for record in records(caplog, "callbacks not delivered before the deadline")] == [1]
    assert receiver.posts == []


def test_start_is_called_once(senders):
    sender = senders()
    sender.start()
    with pytest.raises(RuntimeError, match="once"):
        sender.start()


# Arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "text"}, TypeError, "key must be bytes or None, got str"),
        ({"key": b""}, ValueError, "key must be None or at least one byte"),
        ({"max_nonces": 0}, ValueError, "max_nonces must be at least 1, got 0"),
        ({"max_nonces_per_post": -1}, ValueError, "max_nonces_per_post must be at least 1, got -1"),
        ({"flush_seconds": -1.0}, ValueError, "flush_seconds must be at least 0, got -1.0"),
        ({"first_retry_seconds": 0.0}, ValueError, "first_retry_seconds must be positive"),
        ({"first_retry_seconds": 2.0, "max_retry_seconds": 1.0}, ValueError, "got 2.0 and 1.0"),
        ({"timeout_seconds": float("nan")}, ValueError, "timeout_seconds must be positive, got nan"),
        ({"max_posts": 0}, ValueError, "max_posts must be at least 1, got 0"),
        ({"max_urls": 0}, ValueError, "max_urls must be at least 1, got 0"),
        ({"max_age_seconds": 0.0}, ValueError, "max_age_seconds must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_named(options, error, message):
    with pytest.raises(error, match=message):
        CallbackSender(**options)


def test_a_url_that_is_no_text_is_refused_at_once(senders):
    sender = senders()
    with pytest.raises(TypeError, match="url must be a str, got NoneType"):
        generated(sender, None, batch(1))
    assert sender.pending() == 0


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ([1], TypeError, "body must be a mapping, got list"),
        ({"dist": []}, TypeError, r"body\['nonces'\] must be a list, got NoneType"),
        ({"nonces": [1]}, TypeError, r"body\['dist'\] must be a list, got NoneType"),
        ({"nonces": [1], "dist": 1.0}, TypeError, r"body\['dist'\] must be a list, got float"),
        ({"nonces": [1], "dist": []}, ValueError, r"body\['dist'\] must have 1 values, one per nonce, got 0"),
        ({"nonces": [1], "dist": [object()]}, TypeError, "not JSON serializable"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_at_once(senders, body, error, message):
    sender = senders()
    with pytest.raises(error, match=message):
        generated(sender, "http://127.0.0.1:1", body)
    assert sender.pending() == 0


@pytest.mark.parametrize("body", [[1], {"dist": [1.0]}, {"nonces": 1}])
def test_a_verdict_needs_nonces(senders, body):
    sender = senders()
    with pytest.raises(TypeError, match=r"body.* must be a (mapping|list)"):
        sender.validated("http://127.0.0.1:1", body)
    assert sender.pending() == 0


@pytest.mark.parametrize("per_nonce", [(), ("dist",), ("dist", "nonces"), ["nonces", "dist"], "nonces", None])
def test_names_that_do_not_begin_with_the_nonces_are_refused_at_once(senders, per_nonce):
    sender = senders()
    with pytest.raises(ValueError, match='per_nonce must be a tuple of names that begins with "nonces", got '):
        sender.generated("http://127.0.0.1:1", batch(1), per_nonce=per_nonce)
    assert sender.pending() == 0
