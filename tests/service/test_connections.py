"""Connections to the receivers of callbacks: where they are made to, by which address, and where not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from callback_receivers import SECONDS, batch, generated

from poc_kernels.service.connections import CheckedTransport, HostNotAllowedError, check_host
from poc_kernels.service.receivers import CallbackHosts

pytest_plugins = ["callback_receivers"]

LOOPBACK = CallbackHosts(loopback=True)


class Names:
    """In place of the system's resolver: answers each name with the next of its lists of addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: Any, port: int, *_: object, **__: object) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        self.asked.append(name)
        if name not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "unknown name")
        answers = self.answers[name]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in each], socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    monkeypatch.setenv("NO_PROXY", "*")
    return Names(monkeypatch)


def posted(url: str, hosts: CallbackHosts | None, times: int = 1) -> list[int]:
    """Post some times over one transport; the statuses."""

    async def post() -> list[int]:
        transport = CheckedTransport(hosts, 4)
        timeouts = httpx2.Timeout(SECONDS).as_dict()
        try:
            statuses = []
            for _ in range(times):
                request = httpx2.Request("POST", url, content=b"{}", extensions={"timeout": timeouts})
                response = await transport.handle_async_request(request)
                await response.aread()
                statuses.append(response.status_code)
            return statuses
        finally:
            await transport.aclose()

    return asyncio.run(post())


@contextlib.contextmanager
def listening(host: str) -> Iterator[int]:
    """A port on which nothing must connect."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.settimeout(0)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("form", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"])
def test_no_form_of_an_address_that_is_not_allowed_is_connected_to(names: Names, form: str) -> None:
    with listening("127.0.0.1") as port, pytest.raises(HostNotAllowedError):
        posted(f"http://{form}:{port}/x", CallbackHosts())
    assert names.asked == []


@pytest.mark.parametrize("form", ["127.0.0.1", "127.1", "2130706433", "0x7f000001"])
def test_every_form_of_an_allowed_address_is_posted_to(receiver: Any, names: Names, form: str) -> None:
    assert posted(f"http://{form}:{receiver.port}/x", LOOPBACK) == [200]
    assert receiver.posts[0][1]["Host"] == f"{form}:{receiver.port}"


def test_a_name_is_resolved_once_and_led_to_the_address_that_was_checked(receiver: Any, names: Names) -> None:
    names.answers["chain.test"] = [["127.0.0.1"], ["169.254.169.254"]]
    assert posted(f"http://chain.test:{receiver.port}/x", LOOPBACK) == [200]
    assert names.asked == ["chain.test"]
    assert receiver.posts[0][1]["Host"] == f"chain.test:{receiver.port}"


def test_a_name_that_turns_to_an_address_nearby_is_not_followed(receivers: Any, names: Names) -> None:
    receiver = receivers()
    names.answers["chain.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    only = CallbackHosts("127.0.0.1/32")
    url = f"http://chain.test:{receiver.port}/x"
    assert posted(url, only) == [200]
    with pytest.raises(HostNotAllowedError, match="see callback_hosts"):
        posted(url, only)
    assert len(receiver.posts) == 1


def test_of_several_addresses_those_that_are_allowed_are_tried_in_order(
    dead: Any, receivers: Any, names: Names
) -> None:
    receiver = receivers()
    names.answers["chain.test"] = [["169.254.169.254", "127.0.0.9", "127.0.0.1"]]
    assert posted(f"http://chain.test:{receiver.port}/x", LOOPBACK) == [200]
    with pytest.raises(Exception) as failed:  # noqa: PT011 (of httpcore2, as the transport says)
        posted(f"http://chain.test:{dead.port}/x", LOOPBACK)
    assert type(failed.value).__name__ == "ConnectError"


@pytest.mark.parametrize("host", ["unknown.test", "x" * 70 + ".test"])
def test_a_name_that_is_not_known_is_an_error_of_the_connection(names: Names, host: str) -> None:
    with pytest.raises(Exception) as failed:  # noqa: PT011
        posted(f"http://{host}/", None)
    assert type(failed.value).__name__ == "ConnectError"


def test_without_rules_every_host_is_posted_to(receiver: Any, names: Names) -> None:
    names.answers["chain.test"] = [["127.0.0.1"]]
    assert posted(f"http://chain.test:{receiver.port}/x", None) == [200]
    assert posted(receiver.url, None) == [200]


def test_a_connection_is_kept_and_is_its_name_s_alone(receivers: Any, names: Names) -> None:
    receiver = receivers(protocol="HTTP/1.1")
    names.answers["a.test"] = names.answers["b.test"] = [["127.0.0.1"]]
    assert posted(f"http://a.test:{receiver.port}/x", LOOPBACK, times=3) == [200] * 3
    assert posted(f"http://b.test:{receiver.port}/x", LOOPBACK) == [200]
    assert (names.asked, len(receiver.clients)) == (["a.test", "b.test"], 2)


@pytest.mark.parametrize("value", ["{}", "http://{}"])
def test_a_proxy_is_connected_to_wherever_it_is(
    receivers: Any, names: Names, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    proxy, direct = receivers(), receivers()
    names.answers["127.0.0.1"] = [["127.0.0.1"]]
    monkeypatch.setenv("http_proxy", value.format(proxy.url.removeprefix("http://")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("NO_PROXY")
    assert posted("http://chain.test/x?y", CallbackHosts()) == [200]
    assert [post[0] for post in proxy.posts] == ["http://chain.test/x?y"]
    with pytest.raises(HostNotAllowedError):
        posted(direct.url, CallbackHosts())
    assert "chain.test" not in names.asked


def test_for_a_proxy_names_are_judged_without_their_addresses(
    receivers: Any, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = receivers()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "nowhere.test")
    monkeypatch.delenv("NO_PROXY")
    hosts = CallbackHosts("10.0.0.0/8, *.chain.test")
    assert posted("http://a.chain.test/x", hosts) == posted("http://10.0.0.1/x", hosts) == [200]
    for host in ("other.test", "11.0.0.1", "127.0.0.1"):
        with pytest.raises(HostNotAllowedError):
            posted(f"http://{host}/x", hosts)
    assert [post[0] for post in proxy.posts] == ["http://a.chain.test/x", "http://10.0.0.1/x"]


def test_a_sender_says_the_class_alone_and_tries_again(receiver: Any, senders: Any, names: Names) -> None:
    names.answers["chain.test"] = [["169.254.169.254"], ["127.0.0.1"]]
    sender = senders(hosts=LOOPBACK)
    sender.start()
    generated(sender, f"http://chain.test:{receiver.port}", batch(1))
    sender.observer.wait("delivered", 1)
    assert sender.status()["last_error"] == "generated: HostNotAllowedError"


@pytest.mark.parametrize("location", ["http://127.0.0.2:{port}/", "/other"])
def test_a_redirect_leads_nowhere(receivers: Any, senders: Any, location: str) -> None:
    moved = receivers(answer=lambda path, content: (308, {"Location": location.format(port=moved.port)}))
    sender = senders(hosts=LOOPBACK)
    sender.start()
    generated(sender, moved.url, batch(1))
    sender.observer.wait("failed", 2)
    assert {post[0] for post in moved.posts} == {"/generated"}


@pytest.mark.parametrize("url", ["http://host/x", "http://bücher.example", "https://[2001:db8::1]:1/", "http://a..b"])
def test_urls_of_hosts_that_are_allowed(url: str) -> None:
    check_host("callback_url", url, CallbackHosts())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:secret@127.1/?secret", "must have a host that this node may send .* got '127.1'"),
        ("http://[::ffff:7f00:1]/", "must have a host that this node may send .* got '::ffff:7f00:1'"),
        ("http://user:secret@☃.com/?secret", "must have a host that can be connected to, got '☃.com'"),
        ("http://\uff11\uff12\uff17.0.0.1/", "must have a host that can be connected to"),
    ],
)
def test_urls_of_hosts_that_are_not(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^callback_url {message}") as refused:
        check_host("callback_url", url, CallbackHosts())
    assert "secret" not in str(refused.value)
