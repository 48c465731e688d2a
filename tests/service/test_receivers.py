"""URLs of callbacks, what is shown of them, and which hosts they may have."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from poc_kernels.service.outbox import GENERATED, Destination
from poc_kernels.service.receivers import (
    CallbackHosts,
    is_loopback,
    literal_address,
    masked,
    masked_urls,
    receiver_of,
    secrets_of,
    url_below,
)

# ---- URLs ----


@pytest.mark.parametrize(
    ("callback_url", "url"),
    [
        ("http://host", "http://host/generated"),
        ("http://host/", "http://host/generated"),
        ("http://host:80/a/b//", "http://host:80/a/b/generated"),
        ("http://host/cb?token=abc", "http://host/cb/generated?token=abc"),
        ("http://host/cb/?a=1&b=2/", "http://host/cb/generated?a=1&b=2/"),
        ("http://host?a=b?c", "http://host/generated?a=b?c"),
        ("http://host/cb?", "http://host/cb/generated?"),
        ("http://host/cb#part", "http://host/cb/generated"),
        ("http://host/cb?a=b#part?c", "http://host/cb/generated?a=b"),
        ("https://[2001:db8::1]:8443/a%2Fb%3f;c=d", "https://[2001:db8::1]:8443/a%2Fb%3f;c=d/generated"),
        ("http://bücher.example/ü?ü=%C3%BC", "http://bücher.example/ü/generated?ü=%C3%BC"),
        ("http://user:pass@host/x", "http://user:pass@host/x/generated"),
    ],
)
def test_the_kind_goes_on_the_path_and_nothing_else_changes(callback_url: str, url: str) -> None:
    assert url_below(callback_url, "generated") == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:80/a/b", "http://host:80/a/b"),
        ("http://user:secret@host/a", "http://host/a"),
        ("http://us@er:secret@[::1]:9/a@b", "http://[::1]:9/a@b"),
        ("http://host/a?token=secret", "http://host/a?..."),
        ("http://secret@host?token=secret", "http://host?..."),
        ("http://host?url=http://user:secret@other/", "http://host?..."),
        ("no url", "no url"),
    ],
)
def test_user_password_and_query_are_not_shown(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert masked_urls(f"a '{url}' b \"{url}\"") == f"a '{shown}' b \"{shown}\""


@pytest.mark.parametrize(
    ("url", "receiver"),
    [
        ("http://Host/a", "host"),
        ("http://user:p@host:80/a@b?c", "host:80"),
        ("https://[::1]:9?a", "[::1]:9"),
        ("nothing", ""),
    ],
)
def test_receivers_are_told_apart_by_host_and_port(url: str, receiver: str) -> None:
    assert receiver_of(url) == receiver


def test_secrets_that_a_receiver_quotes_are_hidden() -> None:
    url = "http://user:p%40ssword@host/cb/generated?token=s%2Fcret+1&id=7&flag"
    assert secrets_of(url)[0] == "token=s%2Fcret+1&id=7&flag"
    destination = Destination(GENERATED, url, (1.0, 2.0))
    quoted = f"no route {url} for s/cret 1 or s%2Fcret+1 by p@ssword, id 7"
    assert destination.hide_secrets(quoted) == "no route http://...@host/cb/generated?... for ... or ... by ..., id 7"
    assert destination.hide_secrets("plain") == "plain"
    assert secrets_of("http://host/a") == ()


# ---- hosts ----

NEAR = [
    "169.254.169.254",
    "169.254.0.1",
    "0.0.0.0",
    "0.1.2.3",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "ff02::1",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "0xa9fea9fe",
    "2852039166",
    "0251.0376.0251.0376",
    "169.254.43518",
]
LOOPBACK = [
    "127.0.0.1",
    "127.1",
    "127.255.0.3",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "017700000001",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "64:ff9b::7f00:1",
    "localhost",
    "LOCALHOST.",
    "a.localhost",
]
FAR = ["93.184.216.34", "10.0.0.1", "192.168.1.1", "2001:db8::1", "64:ff9b::5db8:d822", "chain.example", "a..b"]


@pytest.mark.parametrize("loopback", [False, True])
@pytest.mark.parametrize("host", NEAR)
def test_hosts_that_only_machines_nearby_can_mean_are_refused(host: str, loopback: bool) -> None:
    assert not CallbackHosts(loopback=loopback).may_allow(host)


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_allowed_where_the_server_listens_on_it(host: str) -> None:
    assert not CallbackHosts().may_allow(host)
    assert CallbackHosts(loopback=True).may_allow(host)


@pytest.mark.parametrize("host", FAR)
def test_other_hosts_are_allowed(host: str) -> None:
    assert CallbackHosts().may_allow(host)
    assert CallbackHosts("*").may_allow(host)


def test_all_forms_are_those_that_the_system_connects_to() -> None:
    for host in (*NEAR, *LOOPBACK):
        literal = literal_address(host)
        if literal is None or "%" in host:
            continue
        resolved = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
        assert {ip_address(end[0]) for *_, end in resolved} == {literal}


@pytest.mark.parametrize(
    ("allowed", "yes", "no"),
    [
        (
            "chain.example",
            ["chain.example", "CHAIN.example."],
            ["example", "a.chain.example", "xchain.example", "1.1.1.1"],
        ),
        ("*.chain.example", ["a.chain.example", "b.a.chain.example"], ["chain.example", "xchain.example", "8.8.8.8"]),
        ("a.example, B.example", ["a.example", "b.example"], ["c.example"]),
        ("10.0.0.0/8", ["10.1.2.3", "::ffff:10.1.2.3", "a.example"], ["11.0.0.1", "127.0.0.1", "localhost"]),
        ("127.0.0.1", ["127.0.0.1", "127.1", "localhost"], ["127.0.0.2", "::1", "8.8.8.8"]),
        ("fd00::/8,*", ["fd00::1", "fd00:ec2::254", "8.8.8.8", "a.example"], ["169.254.169.254", "::1"]),
        ("localhost", [], ["localhost", "127.0.0.1"]),
    ],
)
def test_listed_hosts(allowed: str, yes: list[str], no: list[str]) -> None:
    hosts = CallbackHosts(allowed)
    assert {host: hosts.may_allow(host) for host in (*yes, *no)} == {
        **dict.fromkeys(yes, True),
        **dict.fromkeys(no, False),
    }


def test_a_name_is_judged_by_its_address() -> None:
    listed = CallbackHosts("chain.example, 10.0.0.0/8")
    answers = [
        ("chain.example", "8.8.8.8", True),
        ("chain.example", "127.0.0.1", False),
        ("chain.example", "169.254.169.254", False),
        ("chain.example", "::ffff:127.0.0.1", False),
        ("other.example", "8.8.8.8", False),
        ("other.example", "10.0.0.7", True),
    ]
    assert [listed.allows(host, ip_address(address)) for host, address, _ in answers] == [each[2] for each in answers]


@pytest.mark.parametrize(
    "allowed",
    ["", "a,", "http://a", "a:80", "a/8", "*a", "*..", "a.*", "1.2.3", "0x7f", "300.0.0.0/8", "ü.example", "a b"],
)
def test_entries_that_are_no_hosts(allowed: str) -> None:
    with pytest.raises(ValueError, match=r"hosts must be names, \*\.suffix, addresses or networks, got "):
        CallbackHosts(allowed)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False)],
)
def test_a_server_on_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
