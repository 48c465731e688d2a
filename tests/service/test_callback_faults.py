"""Callbacks to receivers that are dead, slow or refuse, on loopback."""

import contextlib
import functools
import itertools
import logging
import os
import socket
import threading
import time
import types

import pytest
from callback_receivers import OK, SECONDS, alone, batch, generated, records, verdict
from web import eventually

from poc_kernels.service import callbacks

pytest_plugins = ["callback_receivers"]

# Receivers that are dead or slow.


def test_a_dead_receiver_gets_everything_once_and_in_order_when_it_returns(dead, receivers, senders):
    sender = senders(max_nonces=20)
    sender.start()
    for nonce in range(20):
        generated(sender, dead.url, alone(nonce))
    sender.observer.wait("failed", 5)
    assert sender.pending() == 20
    assert sender.status()["last_error"] == "generated: ConnectError"
    receiver = receivers(port=dead.port)
    sender.observer.wait("delivered", 20)
    assert receiver.contents() == [alone(nonce) for nonce in range(20)]
    status = sender.status()
    pending = status["pending_batches"], status["pending_nonces"], sender.pending_nonces()
    assert (pending, status["dropped_batches"], status["dropped_nonces"]) == ((0, 0, 0), 0, 0)
    assert status["delivered_batches"] == 20
    assert status["failed_attempts"] == len(sender.observer.of("failed"))


def test_beyond_the_bound_the_oldest_are_dropped_with_a_warning(dead, receivers, senders, caplog):
    sender = senders(max_nonces=32)  # ten batches, and two nonces more
    sender.start()
    for nonce in range(25):
        generated(sender, dead.url, batch(nonce, nonce + 100, nonce + 200, block_height=nonce, block_hash=f"h{nonce}"))
    sender.observer.wait("dropped", 15)  # an older one that was in flight has come back by then
    assert (sender.pending(), sender.pending_nonces()) == (10, 30)
    receiver = receivers(port=dead.port)
    sender.observer.wait("delivered", 10)
    assert [nonces[0] for nonces in receiver.nonces()] == list(range(15, 25))
    assert sender.observer.of("dropped") == [("generated", 3)] * 15
    status = sender.status()
    assert (status["dropped_batches"], status["dropped_nonces"], status["delivered_batches"]) == (15, 45, 10)
    said = records(caplog, "callback dropped")
    assert [record.levelno for record in said] == [logging.WARNING] * 15
    by_nonce = sorted(said, key=lambda record: record.first_nonce)
    assert [(r.kind, r.block_hash, r.nonces, r.first_nonce, r.last_nonce) for r in by_nonce] == [
        ("generated", f"h{nonce}", 3, nonce, nonce + 200) for nonce in range(15)
    ]


def test_the_bound_is_on_nonces_not_on_batches(receiver, senders, caplog):
    sender = senders(max_nonces=100)
    for nonce in range(100):
        generated(sender, receiver.url, batch(nonce))
    assert (sender.pending(), sender.pending_nonces()) == (100, 100)
    generated(sender, receiver.url, batch(*range(100, 130)))
    assert (sender.pending(), sender.pending_nonces()) == (71, 100)
    assert sender.observer.of("dropped") == [("generated", 1)] * 30
    (said,) = records(caplog, "callback dropped")
    assert (said.batches, said.nonces, said.first_nonce, said.last_nonce) == (30, 30, 0, 29)
    sender.start()
    sender.observer.wait("delivered", 1)
    assert receiver.nonces() == [list(range(30, 130))]


def test_a_batch_without_nonces_counts_as_one(receiver, senders):
    sender = senders(max_nonces=3)
    for height in range(5):
        generated(sender, receiver.url, batch(block_height=height))
    assert (sender.pending(), sender.pending_nonces()) == (3, 0)
    assert sender.observer.of("dropped") == [("generated", 0)] * 2
    assert (sender.status()["dropped_batches"], sender.status()["dropped_nonces"]) == (2, 0)


def test_a_batch_above_the_bound_is_kept_until_a_newer_one_waits(receiver, senders):
    sender = senders(max_nonces=3)
    generated(sender, receiver.url, batch(1))
    generated(sender, receiver.url, batch(2, 3, 4, 5, block_height=8))
    assert sender.observer.of("dropped") == [("generated", 1)]
    assert (sender.pending(), sender.pending_nonces()) == (1, 4)
    sender.validated(receiver.url, verdict(6))
    assert sender.observer.of("dropped") == [("generated", 1), ("generated", 4)]
    assert (sender.pending(), sender.pending_nonces()) == (1, 1)
    sender.start()
    sender.observer.wait("delivered", 1)
    generated(sender, receiver.url, batch(7, 8, 9, 10))
    sender.observer.wait("delivered", 2)
    assert receiver.nonces() == [[6], [7, 8, 9, 10]]


def test_what_comes_back_is_older_than_what_came_meanwhile(receivers, senders):
    released, reached, calls = threading.Event(), threading.Event(), itertools.count()

    def fail_once(path, content):
        if next(calls) > 0:
            return OK
        reached.set()
        assert released.wait(SECONDS)
        return 500, {}

    receiver = receivers(answer=fail_once)
    sender = senders(max_nonces=4, timeout_seconds=SECONDS)
    generated(sender, receiver.url, batch(1, 2))
    sender.start()
    try:
        assert reached.wait(SECONDS)
        generated(sender, receiver.url, batch(3, 4, 5))
        assert (sender.pending_nonces(), sender.observer.of("dropped")) == (5, [])  # in flight they do not count
    finally:
        released.set()
    sender.observer.wait("delivered", 1)
    assert sender.observer.of("dropped") == [("generated", 2)]
    assert receiver.nonces(status=200) == [[3, 4, 5]]


def test_the_oldest_refused_batch_is_dropped_first(receivers, senders):
    accepts = threading.Event()
    receiver = receivers(answer=lambda path, content: OK if accepts.is_set() else (400, {}))
    sender = senders(max_nonces=3, first_retry_seconds=SECONDS, max_retry_seconds=SECONDS)
    sender.start()
    for nonce in range(6):
        generated(sender, receiver.url, alone(nonce))
        sender.observer.wait("failed", nonce + 1)
    sender.observer.wait("dropped", 3)
    accepts.set()
    sender.close(SECONDS)
    assert sorted(receiver.nonces(status=200)) == [[3], [4], [5]]


def test_the_bound_is_over_all_destinations(receivers, senders):
    one, other = receivers(), receivers()
    sender = senders(max_nonces=2)
    sender.validated(one.url, verdict(1))
    generated(sender, other.url, alone(2))
    generated(sender, other.url, alone(3))
    assert sender.observer.of("dropped") == [("validated", 1)]
    sender.start()
    sender.observer.wait("delivered", 2)
    assert (one.posts, other.nonces()) == ([], [[2], [3]])


def test_a_slow_receiver_delays_neither_the_producer_nor_others(receiver, receivers, senders):
    released, reached = threading.Event(), threading.Event()

    def hang(path, content):
        reached.set()
        assert released.wait(SECONDS)
        return OK

    slow = receivers(answer=hang)
    sender = senders(timeout_seconds=SECONDS)
    sender.start()
    try:
        generated(sender, slow.url, alone(0))
        assert reached.wait(SECONDS)
        begin = time.monotonic()
        for nonce in range(1, 101):
            generated(sender, slow.url, alone(nonce))
            sender.validated(receiver.url, verdict(nonce))
        assert time.monotonic() - begin < 200 * 0.05
        sender.observer.wait("delivered", 100)
        assert receiver.nonces() == [[nonce] for nonce in range(1, 101)]
        assert sender.pending() == 101
    finally:
        released.set()
    sender.observer.wait("delivered", 201)
    assert slow.nonces() == [[nonce] for nonce in range(101)]


def test_many_dead_destinations_do_not_delay_another(receiver, receivers, senders):
    released = threading.Event()
    slow = receivers(answer=lambda path, content: OK if released.wait(SECONDS) else (500, {}))
    sender = senders(timeout_seconds=SECONDS)
    sender.start()
    try:
        for number in range(120):  # more than an HTTP client's usual pool of connections
            generated(sender, f"{slow.url}/{number}", batch(number))
        generated(sender, receiver.url, batch(1))
        receiver.wait(1)
    finally:
        released.set()
    sender.observer.wait("delivered", 121)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def silent_receivers(count=1):
    """The URLs of receivers that take connections, and never answer."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024)) for _ in range(count)]
        yield [f"http://127.0.0.1:{server.getsockname()[1]}" for server in servers]


@pytest.mark.parametrize("count", [1, 40])
def test_silent_receivers_with_many_urls_take_few_descriptors_and_delay_nobody(receivers, senders, count):
    receiver = receivers(protocol="HTTP/1.1")
    sender = senders(timeout_seconds=SECONDS, max_posts=16, max_urls=100)
    sender.start()
    generated(sender, receiver.url, batch(0))
    sender.observer.wait("delivered", 1)
    before = descriptors()
    with silent_receivers(count) as urls:
        for number in range(1, 301):
            generated(sender, f"{urls[number % count]}/{number}", batch(number))
            if number % 50 == 0:  # one that answers has its turn meanwhile
                sender.validated(receiver.url, verdict(number))
                sender.observer.wait("delivered", 1 + number // 50)
            assert len(sender._destinations) <= 100 + 16
            assert len(sender._slots._waiting) <= 100 + 16 + 50  # nobody waits for a destination that was forgotten
        assert descriptors() - before <= count + 16 + 8  # of the receivers, of posts, and of the test's own receiver
        dropped = sender.observer.of("dropped")
        assert 300 - 100 - 16 <= len(dropped) <= 300 - 100 + 6  # of the six, each takes the place of one
        assert set(sender.observer.reasons) == {"urls"}
        assert sender.pending() == 300 - len(dropped)


def test_beyond_the_bound_on_urls_the_one_that_was_used_least_recently_loses_its_deliveries(receivers, senders, caplog):
    receiver = receivers()
    sender = senders(max_urls=2)
    for path in ("/a", "/b", "/a", "/c"):
        generated(sender, receiver.url + path, batch(1))
    assert sender.observer.of("dropped") == [("generated", 1)]
    (said,) = records(caplog, "callback dropped")
    assert (said.url, said.reason) == (f"{receiver.url}/b/generated", "urls")
    sender.start()
    sender.observer.wait("delivered", 2)
    assert {post[0] for post in receiver.posts} == {"/a/generated", "/c/generated"}


def test_what_is_too_old_is_given_up_and_counted(dead, receivers, senders, monkeypatch, caplog):
    clock = types.SimpleNamespace(passed=0.0)
    clock.monotonic = lambda: time.monotonic() + clock.passed
    monkeypatch.setattr(callbacks, "time", clock)
    sender = senders(max_age_seconds=3600.0)
    sender.start()
    generated(sender, dead.url, batch(1, 2))
    sender.observer.wait("failed", 2)
    clock.passed = 3000.0
    generated(sender, dead.url, alone(3))
    failed = len(sender.observer.of("failed"))
    sender.observer.wait("failed", failed + 2)
    assert (sender.pending(), sender.observer.of("dropped")) == (2, [])
    clock.passed = 3700.0
    sender.observer.wait("dropped", 1)
    assert (sender.observer.of("dropped"), sender.observer.reasons) == ([("generated", 2)], ["old"])
    (said,) = records(caplog, "callback dropped")
    assert (said.reason, said.nonces) == ("old", 2)
    receiver = receivers(port=dead.port)
    sender.observer.wait("delivered", 1)
    assert receiver.nonces() == [[3]]
    assert sender.status()["dropped_nonces"] == 2


def test_no_answer_in_time_is_a_failure(receivers, senders):
    released, calls = threading.Event(), itertools.count()
    receiver = receivers(answer=lambda path, content: released.wait(SECONDS) and OK if next(calls) == 0 else OK)
    sender = senders(timeout_seconds=0.2)
    sender.start()
    try:
        generated(sender, receiver.url, batch(1))
        sender.observer.wait("delivered", 1)
    finally:
        released.set()
    assert sender.observer.of("failed")
    assert sender.status()["last_error"] in ("generated: TimeoutError", "generated: ReadTimeout")
    assert receiver.nonces()[0] == [1]


def test_a_2xx_counts_even_if_its_body_never_ends(receivers, senders):
    receiver = receivers(answer=lambda path, content: (200, {"Content-Length": "10"}), protocol="HTTP/1.1")
    sender = senders(timeout_seconds=0.2)
    sender.start()
    for nonce in (1, 2):
        generated(sender, receiver.url, alone(nonce))
    sender.observer.wait("delivered", 2)
    assert receiver.nonces() == [[1], [2]]
    assert not sender.observer.of("failed")


def test_a_connection_is_used_again(receivers, senders):
    receiver = receivers(protocol="HTTP/1.1")
    sender = senders()
    sender.start()
    for nonce in range(5):
        generated(sender, receiver.url, batch(nonce))
        sender.observer.wait("delivered", nonce + 1)
    assert len(receiver.clients) == 1


def test_a_round_that_lost_its_receiver_for_a_moment_keeps_merging(dead, receivers, senders):
    sender = senders()
    sender.start()
    for nonce in range(30):
        generated(sender, dead.url, batch(nonce))
    sender.observer.wait("failed", 2)
    receiver = receivers(port=dead.port)
    eventually(lambda: sender.pending() == 0)
    assert receiver.nonces()[0][:1] == [0]
    assert [nonce for nonces in receiver.nonces() for nonce in nonces] == list(range(30))
    assert len(receiver.posts) < 30


@pytest.mark.parametrize(
    "url", ["", "node:80", "ftp://node", "http://", "http://[::1", "http://1.2.3.999", "http://a..b"]
)
def test_a_url_that_nothing_can_be_posted_to_is_a_dead_receiver(receiver, senders, url):
    sender = senders()
    sender.start()
    generated(sender, url, batch(1))
    sender.observer.wait("failed", 2)
    generated(sender, receiver.url, batch(2))
    sender.observer.wait("delivered", 1)
    assert sender.pending() == 1


# Receivers that answer otherwise than 2xx.


@pytest.mark.parametrize("status", [500, 503, 302, 408, 425, 429])
def test_a_failed_attempt_is_repeated_before_the_others_go(receivers, senders, caplog, status):
    calls = itertools.count()
    receiver = receivers(answer=lambda path, content: (status, {}) if next(calls) < 3 else OK)
    sender = senders()
    for nonce in (1, 2):
        generated(sender, receiver.url, alone(nonce))
    sender.start()
    sender.observer.wait("delivered", 2)
    assert receiver.nonces() == [[1], [1], [1], [1], [2]]
    assert sender.observer.of("failed") == [("generated", 0)] * 3
    assert sender.status()["last_error"] == f"generated: answered {status}"
    said = records(caplog, "callback failed")
    assert [record.error for record in said] == [f"answered {status}"] * 3
    assert said[0].url == f"{receiver.url}/generated"
    assert 0 < said[0].retry_seconds <= 0.05


@pytest.mark.parametrize("status", [500, 200])
def test_long_answers_are_read_and_quoted_in_part(receivers, senders, caplog, status):
    calls = itertools.count()
    receiver = receivers(answer=lambda path, content: (status if next(calls) == 0 else 200, {}, "why " * 10**6))
    sender = senders()
    sender.start()
    generated(sender, receiver.url, batch(1))
    sender.observer.wait("delivered", 1)
    assert receiver.nonces(status=200) == [[1]]
    quoted = [record.error for record in records(caplog, "callback failed")]
    assert quoted == ([] if status == 200 else [f"answered 500: {'why ' * 50}"])


@pytest.mark.parametrize("status", [500, 404])
@pytest.mark.parametrize("kind", ["generated", "validated"])
def test_what_a_receiver_answers_is_not_to_be_read_in_the_status(receivers, senders, caplog, kind, status):
    text = "secret\nWARNING forged\r\x1b[2J\u2028\x85é"
    receiver = receivers(answer=lambda path, content: (status, {"X-Header": "secret"}, text))
    sender = senders()
    sender.start()
    submit = {"generated": functools.partial(generated, sender), "validated": sender.validated}[kind]
    submit(f"{receiver.url}/path", verdict(1))
    sender.observer.wait("failed", 1)
    assert sender.status()["last_error"] == f"{kind}: answered {status}"
    sender.close(0)
    assert "secret" not in str(sender.status())
    error = records(caplog, "callback failed")[0].error
    assert error == f"answered {status}: secret\\nWARNING forged\\r\\x1b[2J\\u2028\\x85é"


def test_what_is_no_http_is_not_to_be_read_in_the_status(senders, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SECONDS)

        def greet():
            with server.accept()[0] as connection:
                connection.settimeout(SECONDS)
                connection.recv(65536)
                connection.sendall(b"220 secret\nforged\n\n")

        thread = threading.Thread(target=greet)
        thread.start()
        sender = senders(first_retry_seconds=SECONDS, max_retry_seconds=SECONDS)
        sender.start()
        generated(sender, f"http://127.0.0.1:{server.getsockname()[1]}", batch(1))
        sender.observer.wait("failed", 1)
        thread.join(SECONDS)
    assert sender.status()["last_error"] == "generated: RemoteProtocolError"
    assert "\n" not in records(caplog, "callback failed")[0].error


@pytest.mark.parametrize("status", [301, 307, 308])
def test_redirects_are_not_followed(receiver, receivers, senders, status):
    moved = receivers(answer=lambda path, content: (status, {"Location": receiver.url}))
    sender = senders()
    sender.start()
    generated(sender, moved.url, batch(1))
    sender.observer.wait("failed", 2)
    assert receiver.posts == []
    assert sender.pending() == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept_to_up_to_the_longest_wait(receivers, senders, status):
    calls = itertools.count()
    receiver = receivers(answer=lambda path, content: (status, {"Retry-After": "3600"}) if next(calls) == 0 else OK)
    sender = senders(first_retry_seconds=0.001, max_retry_seconds=0.4)
    sender.start()
    generated(sender, receiver.url, batch(1))
    receiver.wait(2)
    assert receiver.posts[1][-1] - receiver.posts[0][-1] >= 0.39


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        (None, 0, 0),
        ("7", 7, 7),
        ("9" * 5000, 1e9, float("inf")),
        ("Fri, 31 Dec 1999 23:59:59 GMT", -float("inf"), 0),
        ("Fri, 31 Dec 2999 23:59:59 -0000", 1e9, float("inf")),
        ("Fri, 31 Dec 2999 23:59:59 +99999999999", 0, float("inf")),
        ("soon", 0, 0),
        ("", 0, 0),
        ("-5", 0, 0),
        ("nan", 0, 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(value, low, high):
    assert low <= callbacks._retry_after(value) <= high


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refused_body_goes_behind_the_others(receivers, senders, status):
    calls = itertools.count()
    receiver = receivers(answer=lambda path, content: (status, {}) if next(calls) == 0 else OK)
    sender = senders()
    for nonce in (13, 1, 2, 3):
        generated(sender, receiver.url, alone(nonce))
    sender.start()
    sender.observer.wait("delivered", 4)
    assert receiver.nonces() == [[13], [1], [2], [3], [13]]


def test_a_body_refused_for_ever_lets_the_others_pass(receivers, senders):
    receiver = receivers(answer=lambda path, content: (400, {}) if 13 in content["nonces"] else OK)
    sender = senders(first_retry_seconds=3600, max_retry_seconds=3600)
    sender.start()
    generated(sender, receiver.url, alone(13))
    sender.observer.wait("failed", 1)
    for nonce in range(3):
        generated(sender, receiver.url, alone(nonce))
        sender.observer.wait("delivered", nonce + 1)
    assert receiver.nonces() == [[13], [0], [1], [2]]
    assert sender.pending() == 1


def test_refused_bodies_are_tried_again_without_end(receivers, senders):
    accepts = threading.Event()
    receiver = receivers(answer=lambda path, content: OK if accepts.is_set() else (403, {}))
    sender = senders()
    for nonce in range(5):
        generated(sender, receiver.url, alone(nonce))
    sender.start()
    sender.observer.wait("failed", 12)
    assert sorted(receiver.nonces()[:5]) == sorted(receiver.nonces()[5:10]) == [[nonce] for nonce in range(5)]
    accepts.set()
    sender.observer.wait("delivered", 5)
    assert sorted(receiver.nonces(status=200)) == [[nonce] for nonce in range(5)]


def test_a_merged_body_that_is_refused_is_taken_apart(receivers, senders):
    receiver = receivers(answer=lambda path, content: (422, {}) if 13 in content["nonces"] else OK)
    sender = senders()
    for nonce in (1, 13, 2):
        generated(sender, receiver.url, batch(nonce))
    sender.start()
    sender.observer.wait("delivered", 2)
    assert receiver.nonces()[0] == [1, 13, 2]
    assert receiver.nonces(status=200) == [[1], [2]]
    assert sender.pending() == 1


def test_cookies_are_not_kept(receivers, senders):
    receiver = receivers(answer=lambda path, content: (200, {"Set-Cookie": "a=b; Path=/"}))
    sender = senders()
    sender.start()
    for nonce in range(2):
        generated(sender, receiver.url, alone(nonce))
    sender.observer.wait("delivered", 2)
    assert [headers["Cookie"] for _, headers, *_ in receiver.posts] == [None, None]


# The end.


def test_close_tries_once_more_without_waiting_for_the_backoff(dead, receivers, senders):
    sender = senders(first_retry_seconds=3600, max_retry_seconds=3600)
    sender.start()
    generated(sender, dead.url, batch(1))
    sender.observer.wait("failed", 1)
    receiver = receivers(port=dead.port)
    sender.close(SECONDS)
    assert receiver.nonces() == [[1]]


@pytest.mark.parametrize("hangs", [False, True], ids=["refuses connections", "hangs"])
def test_close_returns_by_the_deadline_and_says_what_is_lost(dead, receivers, senders, caplog, hangs):
    released = threading.Event()
    url = receivers(answer=lambda path, content: released.wait(SECONDS) and OK).url if hangs else dead.url
    sender = senders(timeout_seconds=SECONDS)
    sender.start()
    try:
        for nonce in range(3):
            generated(sender, url, alone(nonce))
        sender.validated(url, verdict(7, 8))
        begin = time.monotonic()
        sender.close(0.3)
        assert 0.3 <= time.monotonic() - begin < 0.3 + 1.5
    finally:
        released.set()
    assert not sender._thread.is_alive()
    said = {record.kind: record for record in records(caplog, "callbacks not delivered before the deadline")}
    assert (said["generated"].batches, said["generated"].nonces) == (3, 3)
    assert (said["generated"].first_nonce, said["generated"].last_nonce) == (0, 2)
    assert (said["validated"].batches, said["validated"].nonces) == (1, 2)
    assert said["validated"].block_hash == "0xabc"
    status = sender.status()
    assert (status["pending_batches"], status["dropped_batches"], status["dropped_nonces"]) == (0, 4, 5)
    assert status["pending_nonces"] == sender.pending_nonces() == 0
    assert sorted(sender.observer.of("dropped")) == [("generated", 1)] * 3 + [("validated", 2)]
