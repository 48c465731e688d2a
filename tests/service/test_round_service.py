"""A round as a service, on an engine of a few lines: no model, no transformers, another app."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import threading
import time
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from callback_receivers import Receiver
from fastapi import HTTPException, Response
from fastapi.exceptions import RequestValidationError
from helpers import run_python
from prometheus_client.parser import text_string_to_metric_families
from tiny_service import ROUND, TinyDevice, TinyNode, TinyProver, distance, tiny_node
from web import CHAT, TIMEOUT, client, eventually, serving

from poc_kernels.protocol import PoCConfig, PoCState, ProofBatch, ProofForm, RoundEndedError
from poc_kernels.protocol.distances import wire
from poc_kernels.protocol.form import GeneratedBody, Histogram
from poc_kernels.scheduling import Pacing, awake
from poc_kernels.service import outbox, round_service
from poc_kernels.service import worker as worker_module
from poc_kernels.service.wires import answers, bodies, older

POW = "/api/v1/pow"


@pytest.fixture
def node() -> Iterator[TinyNode]:
    with tiny_node(shutdown_seconds=1.0, max_queued_nonces=100) as node:
        yield node


@pytest.fixture
def http(node: TinyNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(node.app) as url, client(url) as http:
        yield http


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


def posted(http: httpx2.Client, path: str, body: object = None) -> Any:
    answer = http.post(POW + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def claim(nonces: list[int], dist: list[float]) -> dict[str, Any]:
    common = {key: ROUND[key] for key in ("block_hash", "block_height", "public_key", "node_id")}
    return {**common, "nonces": nonces, "dist": dist}


def of(node: TinyNode, nonce: int) -> float:
    config = node.service.manager.config
    assert config is not None
    return distance(config, "key", nonce)


def test_a_round_from_generating_to_the_verdict(node: TinyNode, http: httpx2.Client, receiver: Receiver) -> None:
    answer = posted(http, "/init/generate", {**ROUND, "callback_url": receiver.url})
    assert answer["pow_status"]["state"] == "GENERATING"
    eventually(lambda: receiver.posts)
    for path in (CHAT, "/invocations"):
        refused = http.post(path, json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "generating")
        assert refused.headers["retry-after"] == "10"
    assert posted(http, "/phase/validate")["pow_status"]["state"] == "VALIDATING"
    status = http.get(f"{POW}/status").json()
    valid = dict(zip(status["valid_nonces"], status["valid_distances"], strict=True))
    assert valid == {n: of(node, n) for n in range(status["total_checked"]) if of(node, n) < 1.0}
    told = lambda: [nonce for _, _, body, *_ in receiver.posts for nonce in json.loads(body)["nonces"]]  # noqa: E731
    eventually(lambda: told() == status["valid_nonces"])

    nonces = [n for n in range(40) if of(node, n) < 1.0]
    honest = posted(http, "/validate", claim(nonces, [of(node, n) for n in nonces]))
    assert honest["distances"] == honest["computed_distances"] == [of(node, n) for n in nonces]
    assert (honest["fraud_detected"], honest["n_invalid"]) == (False, 0)
    forged = posted(http, "/validate", claim(list(range(40)), [0.5] * 40))
    assert forged["fraud_detected"]
    assert forged["valid"] == [of(node, n) < 1.0 for n in range(40)]
    assert posted(http, "/stop")["pow_status"]["state"] == "STOPPED"
    assert node.prover.forwards
    assert max(node.prover.forwards) <= 4


def test_a_process_that_stood_still_has_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    late, entered, go_on = [0.0], threading.Event(), threading.Event()
    monkeypatch.setattr(awake, "time", types.SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    prover = TinyProver()

    def hold() -> None:
        entered.set()
        assert go_on.wait(TIMEOUT)

    prover.before_forward = hold
    with tiny_node(prover, stall_seconds=60.0) as node:
        node.service.begin(ROUND, PoCState.GENERATING)
        assert entered.wait(TIMEOUT)
        for _ in range(3):
            late[0] += 3600.0
            assert node.service.troubles() == []
        go_on.set()
        eventually(lambda: node.service.status()["total_checked"] > 0)
        assert node.service.troubles() == []
    assert "poc-clock" not in {thread.name for thread in threading.enumerate()}


def test_users_are_served_while_proofs_are_validated(node: TinyNode, http: httpx2.Client) -> None:
    posted(http, "/init/validate", ROUND)
    job = http.post(f"{POW}/validate?wait=false", json=claim(list(range(20)), []))
    assert job.status_code == 202
    stream = http.post(CHAT, json={})
    assert stream.text.endswith("data: [DONE]\n\n")
    assert stream.text.count("[DONE]") == 1
    assert http.post("/invocations").json() == "computed"
    eventually(lambda: http.get(job.headers["location"]).status_code == 200)


def test_what_the_prover_refuses(http: httpx2.Client) -> None:
    answer = http.post(f"{POW}/init", json={**ROUND, "seq_len": 9})
    assert (answer.status_code, answer.json()) == (400, {"detail": "seq_len must be at most 8, got 9"})


@pytest.mark.parametrize(
    ("body", "kind", "shown"),
    [
        ({**ROUND, "r_target": "low"}, "float_type", "'low'"),
        ({**ROUND, "block_hash": 7}, "string_type", 7),
        ([1], "model_attributes_type", "[1]"),
        ("text", "model_attributes_type", "'text'"),
    ],
)
def test_a_body_of_wrong_types_is_described_as_fastapi_does_and_its_input_quoted_once(
    http: httpx2.Client, body: object, kind: str, shown: object
) -> None:
    answer = http.post(f"{POW}/init", json=body)
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    assert (detail["type"], detail["input"]) == (kind, shown)


def test_metrics_and_health(node: TinyNode, http: httpx2.Client) -> None:
    posted(http, "/init/validate", ROUND)
    posted(http, "/validate", claim([1, 2, 3], []))
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert samples["poc_nonces_checked_total", "validate"] == 3
    assert samples["poc_state", "VALIDATING"] == 1
    assert samples["poc_distance_count",] == 3
    assert http.get("/health").json() == {"status": "ok", "state": "VALIDATING", "reasons": []}
    node.service.begin_shutdown()
    assert http.get("/health").json()["reasons"] == ["the server is shutting down"]
    assert http.post(f"{POW}/init", json=ROUND).status_code == 503


def test_a_watch_of_the_app_s_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles = ["it hangs"]
    with tiny_node() as node:
        service = round_service.RoundService(
            node.prover, node.service._device, node.service.settings, [lambda: troubles[0]]
        )
        assert service.troubles() == ["it hangs", "the proof thread is not running"]


# ---- what errors tell ----


class SecretError(ValueError):
    """What a library may raise, with whatever it knows."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("secret"), 503),
        (SecretError("secret"), 409),
        (ValueError("secret"), 409),
        (KeyError("secret"), 503),
    ],
)
def test_an_error_of_a_forward_tells_its_class_alone(
    node: TinyNode, http: httpx2.Client, caplog: pytest.LogCaptureFixture, error: Exception, status: int
) -> None:
    def fail() -> None:
        raise error

    posted(http, "/init/validate", ROUND)
    node.prover.before_forward = fail
    waited = http.post(f"{POW}/validate", json=claim([1], []))
    expected = (status, {"detail": f"the batch could not be computed: {type(error).__name__}"})
    assert (waited.status_code, waited.json()) == expected
    asked = http.post(f"{POW}/validate?wait=false", json=claim([2], []))
    eventually(lambda: http.get(asked.headers["location"]).status_code != 202)
    later = http.get(asked.headers["location"])
    assert (later.status_code, later.json()) == expected
    assert "secret" not in http.get("/health").text + http.get(f"{POW}/status").text + http.get("/metrics").text
    assert "secret" in caplog.text


def test_health_tells_the_class_of_what_fails(node: TinyNode, http: httpx2.Client) -> None:
    def fail() -> None:
        raise RuntimeError("secret")

    node.prover.before_forward = fail
    posted(http, "/init/generate", ROUND)
    eventually(lambda: http.get("/health").status_code == 503)
    assert http.get("/health").json()["reasons"] == ["proof batches fail: RuntimeError"]
    node.prover.before_forward = lambda: None


@pytest.mark.parametrize(
    "error", [SecretError("secret"), json.JSONDecodeError("secret", "secret", 0), KeyError("secret")]
)
@pytest.mark.parametrize("path", ["/init", "/init/generate", "/validate"])
def test_an_error_that_no_check_raises_tells_nothing(
    node: TinyNode, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, path: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    posted(http, "/init/validate", ROUND)
    posted(http, "/stop")
    monkeypatch.setattr(node.prover, "check", fail)
    monkeypatch.setattr(node.service.worker, "enqueue", fail)
    answer = http.post(POW + path, json=claim([1], []) if path == "/validate" else ROUND)
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")


def test_errors_read_the_same_in_an_app_with_handlers_of_its_own(
    node: TinyNode, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("secret")

    for kind in (HTTPException, RequestValidationError, ValueError, KeyError):
        node.api.exception_handler(kind)(lambda *_: Response("of the app", 418))
    answers = [http.post(f"{POW}/init", json=body) for body in ({}, {**ROUND, "r_target": 0}, ROUND)]
    assert [answer.status_code for answer in answers] == [422, 400, 200]
    assert [answer.json().keys() for answer in answers[:2]] == [{"detail"}] * 2
    monkeypatch.setattr(node.service.manager, "stop_round", fail)
    failed = http.post(f"{POW}/stop")
    assert (failed.status_code, failed.text) == (500, "Internal Server Error")


def test_a_body_that_is_quoted_shows_no_secret_of_a_url(http: httpx2.Client) -> None:
    url = "http://user:secret@host/?token=secret"
    for body in ({"callback_url": url}, [url], {**ROUND, "r_target": url}, {**ROUND, "callback_url": [url]}):
        answer = http.post(f"{POW}/init", json=body)
        assert answer.status_code == 422
        assert "http://host/?..." in answer.text
        assert "secret" not in answer.text


# ---- where callbacks may go ----


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "[::1]", "0x7f.1"])
def test_a_round_whose_callbacks_would_stay_on_this_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with tiny_node(loopback=False) as node, serving(node.app) as url, client(url) as http:
        for path in ("/init", "/init/generate", "/init/validate"):
            answer = http.post(POW + path, json={**ROUND, "callback_url": f"http://{host}:9/cb"})
            assert answer.status_code == 400
            assert answer.json()["detail"].startswith(
                "callback_url must have a host that this node may send callbacks to"
            )
        assert node.service.manager.config is None


def test_hosts_that_the_operator_lists(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    listed = "127.0.0.0/8, *.chain.example"
    with tiny_node(loopback=False, callback_hosts=listed) as node, serving(node.app) as url, client(url) as http:
        posted(http, "/init/generate", {**ROUND, "callback_url": f"{receiver.url}/cb?token=abc"})
        receiver.wait(1)
        assert receiver.posts[0][0] == "/cb/generated?token=abc"
        posted(http, "/stop")
        answer = http.post(f"{POW}/init", json={**ROUND, "callback_url": "http://[::1]/"})
        assert answer.status_code == 400


# ---- a device of another kind ----


@pytest.mark.parametrize("call", ["drain_users", "pause_users", "resume_users", "take", "pause"])
def test_a_device_whose_calls_fail_is_asked_again(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.01)
    device = TinyDevice()
    with tiny_node(device=device) as node:
        device.failures[call] = 2
        node.service.begin(ROUND, PoCState.GENERATING)
        eventually(lambda: node.service.manager.progress()["total_checked"] >= 8)
        assert device.paused
        node.service.manager.set_phase(PoCState.VALIDATING)
        eventually(lambda: not device.paused)
        assert device.failures[call] == 0
        job = node.service.enqueue(ProofBatch("key", "block", 7, [1, 2], []), "somebody")
        assert job.future.result(TIMEOUT).dist == [of(node, 1), of(node, 2)]
        assert node.service.troubles() == []


def test_what_waits_is_cancelled_though_the_device_fails_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    device = TinyDevice()
    with tiny_node(device=device) as node:
        node.service.begin(ROUND, PoCState.VALIDATING)
        device.failures["resume_users"] = 1000
        node.prover.before_forward = node.service.worker._device.cancel
        job = node.service.enqueue(ProofBatch("key", "block", 7, list(range(20)), []), "somebody")
        with pytest.raises(RoundEndedError):
            job.future.result(TIMEOUT)
        node.service.worker.close(TIMEOUT)
    assert "users could not be resumed when the proof thread ended" in [record.message for record in caplog.records]


# ---- a proof form of another kind ----


@dataclasses.dataclass(frozen=True)
class Words:
    """Nonces, and a word for each."""

    public_key: str
    block_hash: str
    block_height: int
    nonces: list[int]
    words: list[str]
    node_id: int = -1

    def __len__(self) -> int:
        return len(self.nonces)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class WordsVerdict(Words):
    """How many words were wrong."""

    n_invalid: int = 0
    probability_honest: float = 1.0
    fraud_detected: bool = False
    judged = True


def _judged(config: PoCConfig, proof: Words, words: Any) -> WordsVerdict:
    wrong = sum(claimed != word for claimed, word in zip(proof.words, words, strict=True))
    return WordsVerdict(**proof.to_dict(), n_invalid=wrong, fraud_detected=wrong > 0)


WORDS = ProofForm(
    name="words",
    proof_type=Words,
    parts=("words",),
    per_nonce=("nonces", "words"),
    listed_as="words",
    histogram=Histogram("poc_word_length", "Lengths of words", (1.0, 2.0, 4.0), len),
    count_valid=lambda config, words: len(words),
    valid=lambda config, proof: proof,
    verdict=_judged,
    check=lambda config: None,
    generated_body=lambda config, proof: GeneratedBody(proof.to_dict(), ("nonces", "words")),
    validated_body=lambda config, verdict: verdict.to_dict(),
)


class WordsProver(TinyProver):
    forms: Mapping[str, ProofForm] = {"words": WORDS}

    def outcome(self, config: PoCConfig, public_key: str, nonce: int) -> str:
        return f"w{nonce}"


@pytest.mark.parametrize("histogram", [WORDS.histogram, None])
def test_a_form_whose_outcomes_are_words(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, histogram: Histogram | None
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    form = dataclasses.replace(WORDS, histogram=histogram)
    monkeypatch.setattr(WordsProver, "forms", {"words": form})
    monkeypatch.setitem(older.WIRES, "words", wire)
    with tiny_node(WordsProver()) as node:
        service = node.service
        service.begin({**ROUND, "proof": "words", "callback_url": receiver.url}, PoCState.GENERATING)
        eventually(lambda: receiver.posts)
        service.manager.set_phase(PoCState.VALIDATING)
        body = json.loads(receiver.posts[0][2])
        assert body["words"] == [f"w{nonce}" for nonce in body["nonces"]]
        status = service.status()
        assert status["words"] == [f"w{nonce}" for nonce in range(status["total_checked"])]
        forged = Words("key", "block", 7, [5, 6], ["w5", "w7"])
        verdict = service.enqueue(forged, "somebody").future.result(TIMEOUT)
        assert (verdict.n_invalid, verdict.fraud_detected) == (1, True)
        eventually(lambda: any(path.endswith("/validated") for path, *_ in receiver.posts))
        assert (b"poc_word_length_count" in service.metrics_text()) == (histogram is not None)
        with pytest.raises(TypeError, match="batch must be a Words, got ProofBatch"):
            service.enqueue(ProofBatch("key", "block", 7, [1], []), "somebody")


def test_the_status_says_how_slices_share_the_device_now(node: TinyNode) -> None:
    assert node.service.status()["validation"]["pacing"] == "paced"
    node.turns.pacing = Pacing(share=0.5, paced=False)
    validation = node.service.status()["validation"]
    assert (validation["pacing"], validation["share"]) == ("free", 0.5)


# ---- nothing long on the event loop ----


@pytest.fixture
def loop_thread(node: TinyNode, http: httpx2.Client) -> int:
    """The thread of the server's event loop."""
    seen: list[int] = []

    async def look() -> None:
        seen.append(threading.get_ident())

    node.api.get("/loop")(look)
    assert http.get("/loop").status_code == 200
    return seen[0]


@pytest.mark.parametrize("wait", ["true", "false"])
def test_proofs_are_checked_and_answered_in_threads(
    node: TinyNode, http: httpx2.Client, loop_thread: int, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    threads: dict[str, int] = {}

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            threads[name] = threading.get_ident()
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(bodies, "_parse", noted("parse", bodies._parse))
    monkeypatch.setattr(wire.ProofBody, "proof", noted("proof", wire.ProofBody.proof))
    monkeypatch.setattr(wire.ValidateAnswer, "model_dump_json", noted("answer", wire.ValidateAnswer.model_dump_json))
    posted(http, "/init/validate", ROUND)
    answer = http.post(f"{POW}/validate?wait={wait}", json=claim([1, 2], []))
    if wait == "false":
        eventually(lambda: http.get(answer.headers["location"]).status_code == 200)
    assert set(threads) == {"parse", "proof", "answer"}
    assert loop_thread not in threads.values()


def test_the_status_is_written_in_a_thread(
    node: TinyNode, http: httpx2.Client, loop_thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    to_json = answers.to_json

    def noted(content: Any) -> bytes:
        threads.append(threading.get_ident())
        return to_json(content)

    monkeypatch.setattr(answers, "to_json", noted)
    posted(http, "/init/validate", ROUND)
    http.get(f"{POW}/status")
    posted(http, "/stop")
    assert len(threads) == 3
    assert loop_thread not in threads


def test_no_call_of_json_has_a_long_text_or_list(
    node: TinyNode, http: httpx2.Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a call keeps the interpreter from the event loop, whatever thread it is in."""
    count = 20_000
    dumps, loads = json.dumps, json.loads

    def checked_dumps(obj: Any, **options: Any) -> str:
        assert not isinstance(obj, list) or len(obj) <= outbox._PIECE
        return dumps(obj, **options)

    def checked_loads(text: Any) -> Any:
        assert len(text) <= 200_000
        return loads(text)

    pieces = types.SimpleNamespace(dumps=checked_dumps, loads=checked_loads, JSONDecodeError=json.JSONDecodeError)
    monkeypatch.setattr(outbox, "json", pieces)
    monkeypatch.setattr(bodies, "json", pieces)
    node.service.worker.queue._max_nonces = 2 * count
    posted(http, "/init/validate", {**ROUND, "batch_size": 4096, "callback_url": receiver.url})
    proof = claim(list(range(10**12, 10**12 + count)), [0.5] * count)
    assert posted(http, "/validate", proof)["fraud_detected"]
    eventually(lambda: receiver.posts)
    assert loads(receiver.posts[0][2])["nonces"] == proof["nonces"]
    wrong = http.post(f"{POW}/validate", json={**proof, "dist": ["x"] * count})
    assert (wrong.status_code, wrong.json()["detail"][0]["loc"]) == (422, ["body", "dist", 0])


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block.

    json.loads goes down to the limit of recursion before it refuses what is too deep. A collection there runs
    finalizers, and the callbacks that hypothesis has for collections, where they have no stack left; what is made of
    their errors parses source code, at which CPython 3.11.7 fails: "AST constructor recursion depth mismatch".
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("padding", [0, 100_000])
@pytest.mark.parametrize(
    ("content", "content_type", "status", "kind"),
    [
        (b'{"more": "\\ud800", %s', "application/json", 200, None),
        (b"\xef\xbb\xbf{%s", "application/json", 200, None),
        (b'{"more": ' + 250 * b"[" + 250 * b"]" + b", %s", "application/json", 200, None),
        (b'{"more": ' + 100_000 * b"[" + 100_000 * b"]" + b", %s", "application/json", 400, None),
        (100_000 * b"[" + b"%s", "application/json", 400, None),
        (b'{"more": ' + 5000 * b"9" + b", %s", "application/json", 400, None),
        (b'{"more": \xff, %s', "application/json", 400, None),
        (b"{%s,", "application/json", 422, "json_invalid"),
        (b"[%s", "application/json", 422, "json_invalid"),
        (b"{%s", "application/problem+json", 200, None),
        (b"{%s", "text/x+json", 422, "model_attributes_type"),
        (b"{%s", "application/a/b+json", 422, "model_attributes_type"),
        (b"{%s", "", 200, None),
        (b"{%s,", "", 422, "json_invalid"),
        (b"{%s", "application/x-www-form-urlencoded", 422, "model_attributes_type"),
    ],
    ids=itertools.count(),  # not the bodies themselves, of which pytest would make names of 200,000 characters
)
def test_what_bodies_are_taken(
    http: httpx2.Client, content: bytes, content_type: str, status: int, kind: str | None, padding: int
) -> None:
    """Whatever their size: what json.loads takes, sent as JSON."""
    values = json.dumps({**ROUND, "padding": padding * "x"}).encode()[1:]
    with uncollected():
        answer = http.post(f"{POW}/init", content=content % values, headers={"content-type": content_type})
    assert answer.status_code == status, answer.text
    assert kind is None or answer.json()["detail"][0]["type"] == kind
    if status == 200:
        posted(http, "/stop")


def test_bodies_are_parsed_one_at_a_time(node: TinyNode, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a hundred times its bytes, and the threads are needed for what ends a round."""
    parse, parsing, most = bodies._parse, [0], [0]
    entered, release = threading.Semaphore(0), threading.Event()

    def slow(*arguments: Any) -> Any:
        parsing[0] += 1
        most[0] = max(most[0], parsing[0])
        entered.release()
        assert release.wait(TIMEOUT)
        try:
            return parse(*arguments)
        finally:
            parsing[0] -= 1

    monkeypatch.setattr(bodies, "_parse", slow)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http.post, f"{POW}/init", json=ROUND) for _ in range(8)]
        assert entered.acquire(timeout=TIMEOUT)
        assert posted(http, "/stop")["pow_status"]["state"] == "STOPPED"
        release.set()
        assert {each.result().status_code for each in asked} == {200}
    assert most == [1]


def test_the_documentation_of_the_routes_has_the_models_of_bodies(http: httpx2.Client) -> None:
    documentation = http.get("/openapi.json").json()
    assert {"RoundBody", "ProofBody", "HTTPValidationError"} <= documentation["components"]["schemas"].keys()
    paths = {path: entry["post"] for path, entry in documentation["paths"].items() if "post" in entry and POW in path}
    with_body = {path for path, entry in paths.items() if "requestBody" in entry}
    assert with_body == {f"{POW}/{name}" for name in ("init", "init/generate", "init/validate", "validate", "generate")}
    assert {path for path, entry in paths.items() if "422" in entry["responses"]} == with_body


def test_a_large_proof_is_looked_at_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value by value only where one is wrong."""
    from poc_kernels.protocol import checks
    from poc_kernels.protocol.distances import proofs

    looked: list[str] = []
    monkeypatch.setattr(checks, "check_int", lambda name, *_: looked.append(name))
    monkeypatch.setattr(proofs, "check_float", lambda name, *_: looked.append(name))
    ProofBatch("key", "block", 7, list(range(1000)), [1.0] * 1000)
    assert looked == []
    ProofBatch("key", "block", 7, [2, True], [1.0, 1])
    assert looked == ["nonces", "nonces", "dist", "dist"]


def test_metrics_copy_no_list(node: TinyNode, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    posted(http, "/init/validate", ROUND)
    monkeypatch.setattr(node.service.manager, "status", None)
    current = node.service.manager._round
    assert current is not None
    current.valid_nonces = current.valid_outcomes = None  # type: ignore[assignment]
    assert http.get("/metrics").status_code == 200


# ---- without an engine ----


def test_the_service_imports_no_engine(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.append({str(Path(__file__).parents[1] / "support")!r})
sys.modules["transformers"] = None  # to import it fails
from tiny_service import tiny_node
from poc_kernels.protocol import PoCState
with tiny_node() as node:
    node.service.begin({ROUND!r}, PoCState.VALIDATING)
assert not [name for name in sys.modules if name.startswith(("poc_kernels.engines", "poc_kernels.node"))]
print("done")
"""
    assert run_python(code, tmp_path) == "done"


def test_rounds_that_nobody_can_generate_are_refused(node: TinyNode) -> None:
    values = {**ROUND, "node_id": -1, "node_count": -1}
    with pytest.raises(ValueError, match="Node ID and node count must be set"):
        node.service.begin(values, PoCState.GENERATING)
