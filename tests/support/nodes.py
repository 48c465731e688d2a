"""What tests of a whole node need: a small model, a node that ends, and the distances that it must give."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from served import NAME, load
from web import TIMEOUT, client, eventually, serving

from poc_kernels.demo import model as demo_model
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.node.node import Node
from poc_kernels.node.settings import Settings
from poc_kernels.protocol import DistanceProver, PoCConfig, PoCManager, ProofBatch

POW = "/api/v1/pow"
JSON = {"content-type": "application/json"}
CALLBACK_KEY = "shared key"
MAX_QUEUED, MAX_POW_BODY, MAX_BODY = 64, 2**14, 2**13
SETTINGS: dict[str, Any] = {
    "callback_key": CALLBACK_KEY,
    "max_queued_nonces": MAX_QUEUED,
    "max_pow_body_bytes": MAX_POW_BODY,
    "body_seconds": 1.0,
    "max_proof_tokens": 8192,
    "drain_seconds": 0.1,
    "shutdown_seconds": 1.0,
}
"""Of the server that tests share."""
ROUND: dict[str, Any] = {
    "block_hash": "0xb10c",
    "block_height": 7,
    "public_key": "its-key",
    "r_target": 1.4,
    "node_id": 0,
    "node_count": 1,
    "batch_size": 4,
    "seq_len": 16,
}
STATUS_KEYS = {
    "state",
    "valid_nonces",
    "valid_distances",
    "total_checked",
    "total_valid",
    "elapsed_seconds",
    "rate_per_second",
    "r_target",
    # As the network's clients read it:
    "status",
    "is_model_initialized",
    # Beyond the protocol's:
    "ignored",
    "generation_ended",
    "queued_nonces",
    "validation",
    "callbacks",
    "config",
}
VALIDATE_KEYS = {
    "status",
    "nonces",
    "distances",
    "computed_distances",
    "valid",
    "fraud_detected",
    "n_invalid",
    "probability_honest",
}


def small_model(directory: Path) -> Path:
    """A model whose steps take a millisecond or two."""
    demo_model.build(directory, hidden_size=64, layers=2, vocab=512)
    return directory


def settings(directory: Path, **changes: Any) -> Settings:
    """Greedy answers, short waits, no callback key."""
    chosen = {"served_name": NAME, "device": "cpu", "temperature": 0, "drain_seconds": 0.1, "shutdown_seconds": 5.0}
    return Settings(model=str(directory), **{**chosen, **changes})


@contextlib.contextmanager
def running(directory: Path, **changes: Any) -> Iterator[tuple[Node, httpx2.Client]]:
    """A node that runs behind a real server, and a client of it; afterwards it has left no thread."""
    before = set(threading.enumerate())
    node = Node(settings(directory, **changes))
    with contextlib.closing(node):
        node.start()
        with serving(node.app) as url, client(url) as http:
            yield node, http
            node.begin_shutdown()  # nothing stays paused
            eventually(lambda: node.app.in_flight == 0)
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in names if name.startswith(("poc-", "inference")) or "generation" in name], names


class Alone:
    """Computes distances on a model of its own, while nothing else runs."""

    def __init__(self, directory: Path) -> None:
        self.model = load(directory)[0]
        self._engine = TransformersEngine(self.model)

    def distances(self, nonces: Iterable[int], **changes: Any) -> list[float]:
        """The distances of nonces, in a round that differs from `ROUND` in ``changes``."""
        config = PoCConfig(**{**ROUND, **changes})
        manager = PoCManager(DistanceProver(self._engine))
        manager.init_round(config)
        batch = ProofBatch(config.public_key, config.block_hash, config.block_height, list(nonces), [])
        return manager.validate(batch).dist


def begin(http: httpx2.Client, phase: str = "generate", **changes: Any) -> dict[str, Any]:
    """Begin a round, whatever went before; its status."""
    posted(http, "/stop")
    return posted(http, "/init" if phase == "init" else f"/init/{phase}", {**ROUND, **changes})["pow_status"]


def posted(http: httpx2.Client, path: str, body: object = None, submitter: str | None = None) -> Any:
    """The answer of a PoC route, which must be 200; to a client at an address that a proxy names."""
    answer = http.post(POW + path, json=body, headers=forwarded(submitter))
    assert answer.status_code == 200, answer.text
    return answer.json()


def forwarded(submitter: str | None) -> dict[str, str]:
    """Headers of a request that a proxy on this machine sends for a client at an address."""
    return {} if submitter is None else {"x-forwarded-for": submitter}


def status(http: httpx2.Client) -> dict[str, Any]:
    """The node's status."""
    answer = http.get(f"{POW}/status")
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    assert result.keys() == STATUS_KEYS
    return result


def claim(nonces: Iterable[int], dist: Iterable[float] = (), **changes: Any) -> dict[str, Any]:
    """A body for /validate."""
    common = {key: ROUND[key] for key in ("block_hash", "block_height", "public_key", "node_id")}
    return {**common, "nonces": list(nonces), "dist": list(dist), **changes}


def queued(http: httpx2.Client, body: dict[str, Any], submitter: str | None = None) -> str:
    """Post a batch whose verdict is asked for later; where."""
    answer = http.post(f"{POW}/validate?wait=false", json=body, headers=forwarded(submitter))
    assert answer.status_code == 202, answer.text
    expected = {"status": answer.json()["status"], "nonces_done": answer.json()["nonces_done"]}
    location: str = answer.headers["location"]
    assert location == f"{POW}/validate/{answer.json()['id']}"
    assert answer.json() == {**expected, "id": answer.json()["id"], "nonces": len(body["nonces"])}
    return location


def polled(http: httpx2.Client, location: str) -> dict[str, Any]:
    """The verdict once it is there."""
    eventually(lambda: http.get(location).status_code != 202)
    answer = http.get(location)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    assert result.keys() == VALIDATE_KEYS
    return result


def checked(http: httpx2.Client, minimum: int) -> dict[str, Any]:
    """The status once at least that many nonces are checked."""
    eventually(lambda: status(http)["total_checked"] >= minimum)
    return status(http)


def slowed(forward: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """``forward``, with a pause before each call."""
    pause = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        pause.wait(seconds)
        return forward(*args, **kwargs)

    return slow


class Blocked:
    """Stands in for a model's forward: each call waits until `release`."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.entered, self._released = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.entered.set()
        assert self._released.wait(TIMEOUT)
        return self._forward(*arguments, **named)

    def release(self) -> None:
        """Let all calls go on, now and later."""
        self._released.set()
