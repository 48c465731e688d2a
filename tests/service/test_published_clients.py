"""The network's published clients, unchanged: requests byte by byte as the chain's node, its broker and the published
tests of the protocol send them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from blocking import blocked
from callback_receivers import Receiver
from starlette.testclient import TestClient
from tiny_service import TinyNode, distance, tiny_node
from web import TIMEOUT, eventually, serving

from poc_kernels.protocol import PoCConfig

POW = "/api/v1/pow"
INIT: dict[str, Any] = {
    "block_hash": "0xb10c",
    "block_height": 100,
    "public_key": "its-key",
    "batch_size": 8,
    "r_target": 1.398077,
    "fraud_threshold": 1e-7,
    "params": {
        "dim": 1792,
        "n_layers": 64,
        "n_heads": 64,
        "n_kv_heads": 64,
        "vocab_size": 8196,
        "ffn_dim_multiplier": 10.0,
        "multiple_of": 8192,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "use_scaled_rope": False,
        "seq_len": 4,
    },
    "node_id": 1,
    "node_count": 1,
    "url": "",
}
"""What the chain's node sends to /init/*: all of its keys."""
PHASES = ("/phase/generate", "/phase/validate")
INITS = ("/init", "/init/generate", "/init/validate")


class Chain:
    """The chain's node: its base is ``http://host:port``, and it sends JSON without saying so."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))

    def connected(self) -> socket.socket:
        return socket.create_connection(self.address, TIMEOUT)

    def request(self, method: str, path: str, body: bytes | None) -> bytes:
        """As Go's client writes it: no Content-Type."""
        lines = [f"{method} {POW}{path} HTTP/1.1", f"Host: {self.address[0]}:{self.address[1]}"]
        lines += [
            "User-Agent: Go-http-client/1.1",
            *([] if method == "GET" else [f"Content-Length: {len(body or b'')}"]),
        ]
        return "\r\n".join([*lines, "Accept-Encoding: identity", "", ""]).encode() + (body or b"")

    def raw(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        with self.connected() as connection:
            connection.sendall(self.request(method, path, body))
            return answer(connection)

    def post(self, path: str, content: object = None) -> tuple[int, Any]:
        return self.raw("POST", path, None if content is None else json.dumps(content).encode())

    def ok(self, path: str, content: object = None) -> Any:
        status, body = self.post(path, content)
        assert status == 200, body
        return body

    def status(self) -> Any:
        status, body = self.raw("GET", "/status")
        assert status == 200
        return body


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of one answer."""
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        length = 0
        while (line := stream.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return status, json.loads(stream.read(length))


@pytest.fixture
def node() -> Iterator[TinyNode]:
    with tiny_node(shutdown_seconds=1.0) as node:
        yield node


@pytest.fixture
def chain(node: TinyNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(node.app) as url:
        yield Chain(url)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


def claim(nonces: list[int], dist: list[float], **changes: Any) -> dict[str, Any]:
    """A ProofBatch, with all of the keys that the chain's node sends."""
    common = {"public_key": "prover", "block_hash": INIT["block_hash"], "block_height": INIT["block_height"]}
    return {**common, "nonces": nonces, "dist": dist, "node_id": 1, **changes}


def of(nonce: int, public_key: str = "prover") -> float:
    values = {name: INIT[name] for name in ("block_hash", "block_height", "public_key", "r_target")}
    return distance(PoCConfig(**values), public_key, nonce)


# ---- bodies ----


def test_json_needs_no_content_type(chain: Chain) -> None:
    for path in INITS:
        assert chain.ok(path, INIT)["status"] == "OK"
    assert chain.ok("/validate", claim([3], [of(3)]))["distances"] == [of(3)]


@pytest.mark.parametrize("body", [None, b"", b"null", b"{}"])
def test_phases_and_stop_take_no_body_or_an_empty_one(chain: Chain, body: bytes | None) -> None:
    chain.ok("/init", INIT)
    for path in (*PHASES, "/stop"):
        status, content = chain.raw("POST", path, body)
        assert (status, content["status"]) == (200, "OK"), path


def test_the_url_is_the_callback_url(chain: Chain, node: TinyNode, receiver: Receiver) -> None:
    told = chain.ok("/init/generate", {**INIT, "url": receiver.url})["pow_status"]
    assert told["config"]["callback_host"] == f"127.0.0.1:{receiver.port}"
    config = node.service.manager.config
    assert config is not None
    assert (config.callback_url, config.seq_len) == (receiver.url, 4)
    receiver.wait(1)
    path, _, body, *_ = receiver.posts[0]
    assert path == "/generated"
    batch = json.loads(body)
    assert batch["r_target"] == INIT["r_target"]
    assert batch["dist"] == [of(nonce, "its-key") for nonce in batch["nonces"]]
    chain.ok("/stop")


@pytest.mark.parametrize("name", ["url", "callback_url"])
def test_an_empty_url_is_none(chain: Chain, node: TinyNode, name: str) -> None:
    for other in ({}, {"url": None, "callback_url": None}, {"url": "", "callback_url": ""}):
        told = chain.ok("/init/generate", {**INIT, **other, name: ""})["pow_status"]
        assert told["config"]["callback_host"] is None
        assert node.service.manager.config is not None
        assert node.service.manager.config.callback_url is None
    other_name = "callback_url" if name == "url" else "url"
    told = chain.ok("/init", {**INIT, name: "", other_name: "http://127.0.0.1:9/a"})["pow_status"]
    assert told["config"]["callback_host"] == "127.0.0.1:9"


@pytest.mark.parametrize(
    ("changes", "seq_len"),
    [
        ({"params": {"seq_len": 7}}, 7),
        ({"params": {"seq_len": 7}, "seq_len": 7}, 7),
        ({"params": None, "seq_len": 3}, 3),
        ({"params": {}, "seq_len": 3}, 3),
        ({"params": {"seq_len": None}, "seq_len": 3}, 3),
        ({"url": "http://127.0.0.1:9", "callback_url": "http://127.0.0.1:9"}, 4),
    ],
)
def test_two_places_of_one_value_may_agree(chain: Chain, changes: dict[str, Any], seq_len: int) -> None:
    assert chain.ok("/init", {**INIT, **changes})["pow_status"]["config"]["seq_len"] == seq_len


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seq_len": 5}, "seq_len and params.seq_len must be the same where both are given, got 5 and 4"),
        ({"seq_len": 256}, "seq_len and params.seq_len must be the same where both are given, got 256 and 4"),
        (
            {"url": "http://a", "callback_url": "http://b"},
            "callback_url and url must be the same where both are given, got two that differ",
        ),
    ],
)
@pytest.mark.parametrize("path", INITS)
def test_contradictions_are_refused(chain: Chain, path: str, changes: dict[str, Any], names: str) -> None:
    status, body = chain.post(path, {**INIT, **changes})
    assert status == 400
    assert body["detail"].startswith(names)
    assert chain.status()["config"] is None


@pytest.mark.parametrize(
    ("changes", "loc"),
    [({"params": [4]}, ["params"]), ({"params": {"seq_len": "4"}}, ["params", "seq_len"]), ({"url": 5}, ["url"])],
)
def test_other_places_have_types_too(chain: Chain, changes: dict[str, Any], loc: list[str]) -> None:
    status, body = chain.post("/init", {**INIT, **changes})
    assert (status, body["detail"][0]["loc"]) == (422, ["body", *loc])


def test_what_is_ignored_is_told(chain: Chain) -> None:
    """So that a mistyped key is seen; the keys of a model that is not ours are the chain's node's own."""
    mistyped = {**INIT, "callbackUrl": "http://chain", "params": {"seq_len": 4, "dim": 8}, "a\nb": 1}
    told = chain.ok("/init", mistyped)["pow_status"]
    assert told["ignored"] == ["callbackUrl", "a\\nb", "params.dim"]
    assert told["config"]["callback_host"] is None
    assert chain.status()["ignored"] == told["ignored"]
    many = {**INIT, "params": {"seq_len": 4}, **{f"{number:03}{'x' * 100}": 1 for number in range(60)}}
    ignored = chain.ok("/init", many)["pow_status"]["ignored"]
    assert ignored == [*(f"{number:03}{'x' * 61}" for number in range(50)), "and 10 more"]
    assert chain.ok("/init", {**INIT, "params": None, "seq_len": 4})["pow_status"]["ignored"] == []


def test_the_status_shows_nothing_of_the_callback_url_but_its_host(chain: Chain) -> None:
    chain.ok("/init", {**INIT, "url": "https://user:secret@[::1]:8443/secret/path?token=secret"})
    told = chain.status()
    assert told["config"]["callback_host"] == "[::1]:8443"
    assert "secret" not in json.dumps(told)


# ---- rounds ----


@pytest.mark.parametrize("path", INITS)
def test_nodes_are_counted_from_one(chain: Chain, node: TinyNode, path: str) -> None:
    nonces = []
    for node_id in (1, 2, 3):
        chain.ok(path, {**INIT, "node_id": node_id, "node_count": 3})
        config = node.service.manager.config
        assert config is not None
        nonces += [config.nonce(index) for index in range(5)]
    assert sorted(nonces) == list(range(1, 16))


def test_any_positive_r_target(chain: Chain) -> None:
    chain.ok("/init/validate", {**INIT, "r_target": 10.0})
    verdict = chain.ok("/validate", claim(list(range(20)), [1.99] * 20))
    assert (verdict["valid"], verdict["fraud_detected"]) == ([True] * 20, False)


@pytest.mark.parametrize("state", INITS)
@pytest.mark.parametrize("path", INITS)
def test_init_in_any_state(chain: Chain, node: TinyNode, receiver: Receiver, state: str, path: str) -> None:
    """The same again changes nothing; another replaces the round, whose callbacks stay."""
    first = {**INIT, "url": receiver.url}
    chain.ok(state, first)
    if state == "/init/generate":
        eventually(lambda: chain.status()["total_valid"] > 0)
    before = chain.status()
    after = chain.ok(path, first)["pow_status"]
    states = {"/init": before["state"], "/init/generate": "GENERATING", "/init/validate": "VALIDATING"}
    assert after["state"] == states[path]
    assert after["valid_nonces"][: before["total_valid"]] == before["valid_nonces"]
    chain.ok("/phase/validate")
    found = chain.status()
    states["/init"] = "IDLE"
    another = chain.ok(path, {**first, "block_height": 101})["pow_status"]
    assert (another["state"], another["config"]["block_height"]) == (states[path], 101)
    chain.ok("/stop")

    def delivered() -> list[int]:
        batches = receiver.contents(path="/generated")
        return [nonce for batch in batches if batch["block_height"] == 100 for nonce in batch["nonces"]]

    eventually(lambda: delivered() == found["valid_nonces"])


def test_validate_after_stop(chain: Chain, receiver: Receiver) -> None:
    chain.ok("/init/validate", {**INIT, "url": receiver.url})
    chain.ok("/stop")
    verdict = chain.ok("/validate", claim([1, 2], [of(1), of(2)]))
    assert verdict["distances"] == [of(1), of(2)]
    assert chain.status()["state"] == "STOPPED"
    eventually(lambda: len(receiver.contents(path="/validated")) == 1)


def test_the_status_as_the_broker_reads_it(chain: Chain) -> None:
    told = chain.status()
    assert (told["status"], told["state"], told["is_model_initialized"]) == ("IDLE", "IDLE", True)
    for path, state in (("/init/generate", "GENERATING"), ("/phase/validate", "VALIDATING"), ("/stop", "STOPPED")):
        answered = chain.ok(path, INIT if path.startswith("/init") else None)["pow_status"]
        for each in (answered, chain.status()):
            assert (each["status"], each["state"], each["is_model_initialized"]) == (state, state, True)


def test_texts_that_published_tests_look_for(chain: Chain) -> None:
    body = {key: value for key, value in INIT.items() if key not in ("node_id", "node_count")}

    def refused(path: str, content: object, text: str) -> None:
        status, answered = chain.post(path, content)
        assert (status, text in answered["detail"]) == (400, True), answered

    for path in PHASES:
        refused(path, None, "not initialized")
    refused("/validate", claim([0, 1, 2], [0.3, 0.4, 0.6]), "No round configured")
    for missing in (body, {**body, "node_id": 0}, {**body, "node_count": 1}, {**body, "node_id": -1, "node_count": -1}):
        refused("/init/generate", missing, "Node ID")
    chain.ok("/init", body)
    refused("/phase/generate", None, "Node ID")
    refused("/validate", claim([0], [0.3], block_hash="wrong_hash"), "Block hash mismatch")
    assert chain.ok("/phase/validate")["status"] == "OK"


# ---- proofs ----


def test_hundreds_of_batches_of_one_address_are_taken_at_once(chain: Chain, node: TinyNode, receiver: Receiver) -> None:
    """Side by side, of a client that waits for nothing and leaves: the verdicts come to the callback."""
    count = 300
    chain.ok("/init/validate", {**INIT, "url": receiver.url})
    with blocked(node.prover) as entered, contextlib.ExitStack() as connections:
        for number in range(count):
            connection = connections.enter_context(chain.connected())
            body = json.dumps(claim([number], [of(number, f"key {number}")], public_key=f"key {number}")).encode()
            connection.sendall(chain.request("POST", "/validate", body))
        assert entered.wait(TIMEOUT)
        eventually(lambda: node.service.worker.queue.batches == count)
        told = chain.status()["validation"]
        assert (told["queued_batches"], told["queued_nonces"], told["submitters"]) == (count, count, 1)
    receiver.wait(count)
    verdicts = receiver.contents(path="/validated")
    assert {verdict["public_key"]: verdict["dist"] for verdict in verdicts} == {
        f"key {number}": [of(number, f"key {number}")] for number in range(count)
    }
    forwards = node.prover.forwards
    assert sum(forwards) == count
    assert len(forwards) <= 1 + -(-(count - 1) // INIT["batch_size"])  # the first began before the others came


def test_a_client_that_leaves_at_once_is_served(chain: Chain, receiver: Receiver) -> None:
    """Its batch is taken from the moment on that it is there."""
    chain.ok("/init/validate", {**INIT, "url": receiver.url})
    for number in range(20):
        body = json.dumps(claim([number], [of(number)])).encode()
        with chain.connected() as connection:
            connection.sendall(chain.request("POST", "/validate", body))
    receiver.wait(20)
    assert sorted(verdict["nonces"][0] for verdict in receiver.contents(path="/validated")) == list(range(20))


@pytest.mark.parametrize("node_id", [None, -1, 0, 1, 7])
def test_node_ids_in_verdicts_are_numbers_without_a_sign(chain: Chain, receiver: Receiver, node_id: int | None) -> None:
    chain.ok("/init/validate", {**INIT, "url": receiver.url})
    body = claim([1], [of(1)], node_id=node_id)
    chain.ok("/validate", {key: value for key, value in body.items() if value is not None})
    receiver.wait(1)
    assert receiver.contents(path="/validated")[0]["node_id"] == max(node_id or 0, 0)


def test_a_proof_may_come_with_the_keys_of_its_round(chain: Chain) -> None:
    chain.ok("/init/validate", INIT)
    assert chain.ok("/validate", {**INIT, **claim([5], [of(5)])})["computed_distances"] == [of(5)]


def test_many_small_batches_cost_few_forwards(chain: Chain, node: TinyNode) -> None:
    """Of whoever waits for them, too: each gets its own verdict."""
    chain.ok("/init/validate", INIT)
    asked = []
    with contextlib.ExitStack() as connections:
        with blocked(node.prover) as entered:
            for number in range(17):
                connection = connections.enter_context(chain.connected())
                nonces, key = [number, 1000 + number], f"key {number % 3}"
                body = json.dumps(claim(nonces, [], public_key=key)).encode()
                connection.sendall(chain.request("POST", "/validate", body))
                asked.append((connection, nonces, key))
                assert entered.wait(TIMEOUT)  # the first forward began before the others came
            eventually(lambda: node.service.worker.queue.batches == 17)
        for connection, nonces, key in asked:
            status, verdict = answer(connection)
            assert status == 200
            assert (verdict["nonces"], verdict["distances"]) == (nonces, [of(nonce, key) for nonce in nonces])
    assert node.prover.forwards == [2, 8, 8, 8, 8]


def test_who_waits_keeps_no_room_for_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the bodies were: they are gone once the batches are in the queue."""
    monkeypatch.setenv("NO_PROXY", "*")
    size = 2000
    with tiny_node(max_bodies_bytes=8 * size) as node, serving(node.app) as url, contextlib.ExitStack() as connections:
        chain = Chain(url)
        chain.ok("/init/validate", INIT)
        with blocked(node.prover):
            for number in range(30):
                body = json.dumps(claim([number], [of(number)])).encode()
                connection = connections.enter_context(chain.connected())
                connection.sendall(chain.request("POST", "/validate", body + b" " * (size - len(body))))
                eventually(lambda taken=number + 1: node.service.worker.queue.batches == taken)


def test_requests_of_several_event_loops_are_served_side_by_side(
    node: TinyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As starlette's TestClient sends them: each in a loop of its own."""
    begun, release, begin = threading.Event(), threading.Event(), node.service.begin

    def slowly(*arguments: Any) -> None:
        begun.set()
        assert release.wait(TIMEOUT)
        begin(*arguments)

    monkeypatch.setattr(node.service, "begin", slowly)
    body, client = json.dumps(INIT), TestClient(node.app)
    with ThreadPoolExecutor(4) as threads:
        posts = [threads.submit(client.post, f"{POW}/init/validate", content=body) for _ in range(4)]
        assert begun.wait(TIMEOUT)
        eventually(lambda: node.app._bodies.total == 4 * len(body))
        release.set()
        assert [post.result(TIMEOUT).status_code for post in posts] == [200] * 4
