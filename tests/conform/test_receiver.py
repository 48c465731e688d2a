"""The receiver of callbacks."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

import httpx2
import pytest

from poc_kernels.conform.answers import Queued
from poc_kernels.conform.outcome import FailedError
from poc_kernels.conform.plan import Plan
from poc_kernels.conform.receiver import receiving

PLAN = Plan(url="http://127.0.0.1:9")
QUEUED = {"status": "queued", "request_id": "x", "queued_count": 1}


def post(url, **options):
    return httpx2.post(url, timeout=10, trust_env=False, **options).status_code


def test_each_mailbox_keeps_its_own_posts_and_refuses_its_first():
    with receiving(PLAN) as receiver:
        one, other = receiver.mailbox(refuse=1), receiver.mailbox()
        statuses = [post(one.url + "/generated", json=QUEUED) for _ in range(2)]
        assert post(other.url + "/validated", content=b"no JSON") == 200
        assert other.wait_for(lambda: len(other.posts) == 1, 0)
        assert not other.wait_for(lambda: len(other.posts) == 2, 0)
    assert statuses == [503, 200]
    assert [(each.path, each.accepted, each.read(Queued).queued_count) for each in one.posts] == [
        ("/generated", False, 1),
        ("/generated", True, 1),
    ]
    with pytest.raises(FailedError, match=r"posted to /validated: the body: Invalid JSON.*no JSON"):
        other.posts[0].read(Queued)


def test_what_is_posted_elsewhere_is_not_taken():
    with receiving(PLAN) as receiver:
        url = receiver.mailbox().url
        assert post(url.replace("%252F", "%2F") + "/generated", json=QUEUED) == 404
        assert post(url + "1/generated", json=QUEUED) == 404
        parts = urlsplit(url)
        with contextlib.closing(socket.create_connection((parts.hostname, parts.port), 10)) as raw:
            raw.sendall(f"POST {parts.path}/generated HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n".encode())
            assert b"413" in raw.recv(100)


def test_it_listens_where_it_is_told_to():
    with receiving(Plan(url=PLAN.url, callback_host="localhost")) as receiver:
        assert urlsplit(receiver.mailbox().url).hostname == "localhost"
        port = urlsplit(receiver.mailbox().url).port
        with pytest.raises(OSError, match="in use"), receiving(Plan(url=PLAN.url, callback_host=f"localhost:{port}")):
            pass


def test_an_endpoint_whose_name_is_unknown_is_met_at_loopback():
    with receiving(Plan(url="http://nowhere.invalid")) as receiver:
        assert urlsplit(receiver.mailbox().url).hostname == "127.0.0.1"
