"""What the checks play with: a round and requests of their own against one endpoint."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from .answers import Artifacts, BackendsStatus, Progress, Queued, Verdict
from .artifact import distance
from .endpoint import Answer, Endpoint
from .outcome import CheckError, FailedError, SkippedError, require
from .plan import Plan
from .receiver import Receiver

_Made = TypeVar("_Made")
_Told = TypeVar("_Told", bound=BaseModel)

NONCES = (3, 0, 1, 7, 12, 100, 4096, 65537)
"""What most requests ask for; in no order, so that an answer cannot be told by its place."""

_POLL_SECONDS = 0.1


class Session:
    """Plays a node, a chain and a validator against an endpoint.

    Attributes:
        plan: what is played.
        endpoint: calls it.
        receiver: takes its callbacks.
        model: name of the served model.
        block_hash, public_key: of this session; nobody had them before.
        may_generate: whether a round of this session may still run.
    """

    def __init__(self, plan: Plan, endpoint: Endpoint, receiver: Receiver, model: str) -> None:
        self.plan, self.endpoint, self.receiver, self.model = plan, endpoint, receiver, model
        self.block_hash = secrets.token_hex(32).upper()
        self.public_key = secrets.token_hex(33)
        self.may_generate = False
        self._made: dict[str, Any] = {}

    # ---- bodies ----

    def params(self, **changes: Any) -> dict[str, Any]:
        """Return ``params`` of a request. The network's clients do not name its own form."""
        proof = {} if self.plan.proof == "vectors" else {"proof": self.plan.proof}
        params = {"model": self.model, "seq_len": self.plan.seq_len, "k_dim": self.plan.form.k_dim, **proof}
        return {**params, **changes}

    def round_body(self, **changes: Any) -> dict[str, Any]:
        """Return a body for /init/generate: as an MLNode sends it, or as the chain's node sends it to an MLNode."""
        groups = {} if self.plan.is_mlnode else {"group_id": 0, "n_groups": 1}
        return {**self._common(), **groups, **changes}

    def request_body(self, nonces: Iterable[int], **changes: Any) -> dict[str, Any]:
        """Return a body for /generate."""
        return {**self._common(), "nonces": list(nonces), **changes}

    def _common(self) -> dict[str, Any]:
        return {
            "block_hash": self.block_hash,
            "block_height": 2_345_678,
            "public_key": self.public_key,
            "node_id": 0,
            "node_count": 1,
            "batch_size": self.plan.batch_size,
            "params": self.params(),
            "url": None,
        }

    # ---- rounds ----

    def begin(self, body: Any) -> Answer:
        """Post /init/generate. A round that began so is ended by `stop`."""
        self.may_generate = True
        answer = self.endpoint.post("/init/generate", body)
        self.may_generate = answer.status < 400
        return answer

    def stop(self) -> Answer:
        """Post /stop."""
        answer = self.endpoint.post("/stop")
        self.may_generate = self.may_generate and answer.status >= 400
        return answer

    @contextlib.contextmanager
    def round(self, **changes: Any) -> Iterator[Answer]:
        """Run a round while the block runs; its answer.

        Raises:
            FailedError: it does not begin, or does not end.
        """
        try:
            yield self.begin(self.round_body(**changes)).expect(200)
        finally:
            if self.may_generate:
                self.stop().expect(200)

    def refused(self, *statuses: int, body: Any) -> Answer:
        """Post /init/generate with a body that must be refused with one of those statuses; the answer."""
        answer = self.begin(body)
        if self.may_generate:
            self.stop()
        return answer.expect(*statuses)

    # ---- requests ----

    def compute(self, nonces: Iterable[int], **changes: Any) -> dict[int, str]:
        """Return the artifacts of nonces from /generate with wait true, or raise `FailedError`."""
        nonces = list(nonces)
        answer = self.endpoint.post("/generate", self.request_body(nonces, wait=True, **changes)).read(Artifacts)
        return by_nonce(answer, nonces)

    def honest(self) -> dict[int, str]:
        """Return the artifacts of `NONCES`."""
        return self.once("the artifacts of POST /generate", lambda: self.compute(NONCES))

    def judge(self, artifacts: Mapping[int, str], test: Mapping[str, float] | None = None, **changes: Any) -> Answer:
        """Have artifacts validated by /generate with wait true; return the answer."""
        return self.endpoint.post("/generate", self.claim(artifacts, test, wait=True, **changes))

    def verdict(self, artifacts: Mapping[int, str], test: Mapping[str, float] | None = None, **changes: Any) -> Verdict:
        """Return the verdict on artifacts, or raise `FailedError`."""
        return self.judge(artifacts, test, **changes).read(Verdict)

    def claim(self, artifacts: Mapping[int, str], test: Mapping[str, float] | None, **changes: Any) -> dict[str, Any]:
        """Return a body for /generate that has artifacts validated."""
        listed = [{"nonce": nonce, "vector_b64": text} for nonce, text in artifacts.items()]
        tested = {} if test is None else {"stat_test": dict(test)}
        return self.request_body(artifacts, validation={"artifacts": listed}, **tested, **changes)

    def queue(self, body: dict[str, Any]) -> Queued:
        """Post /generate with wait false; the answer."""
        return self.endpoint.post("/generate", {**body, "wait": False}).read(Queued)

    def result(self, request_id: str, model: type[_Told]) -> _Told:
        """Ask for a queued request until it is done; return what came of it as ``model``."""
        patience = self.endpoint.seconds_left()
        ends = time.monotonic() + patience
        while True:
            answer = self.endpoint.get(f"/generate/{request_id}")
            progress = answer.read(Progress)
            self.expect_id(progress.request_id, request_id)
            if progress.status not in ("queued", "running"):
                return answer.read(model)
            if time.monotonic() > ends:
                raise FailedError(f"not done in {patience:.0f} s: {answer}")
            time.sleep(_POLL_SECONDS)

    def expect_id(self, told: str | None, request_id: str) -> None:
        """Raise `FailedError` unless an id is that of a request. An MLNode puts a port before what its engines tell."""
        known = (request_id, request_id.rpartition(":")[2]) if self.plan.is_mlnode else (request_id,)
        require(told in known, f"expected request_id {request_id}, got {told}")

    def port(self) -> int:
        """Return the port of an MLNode's first engine."""
        backends = self.endpoint.get("/status").read(BackendsStatus).backends
        if not backends:
            raise SkippedError("the MLNode has no engine")
        return backends[0].port

    # ---- what several checks need ----

    def once(self, what: str, make: Callable[[], _Made]) -> _Made:
        """Return what ``make`` gives, which is called once. If that failed, later checks that need it are skipped."""
        if what not in self._made:
            self._made[what] = SkippedError(f"needs {what}, which failed before")
            self._made[what] = make()
        found: _Made | CheckError = self._made[what]
        if isinstance(found, CheckError):
            raise found
        return found

    def apart(self, one: Mapping[int, str], other: Mapping[int, str]) -> list[float]:
        """Return how far the artifacts of nonces that both have are apart."""
        k_dim = self.plan.form.k_dim
        return [distance(one[nonce], other[nonce], k_dim) for nonce in one.keys() & other.keys()]


def by_nonce(answer: Artifacts, nonces: Iterable[int]) -> dict[int, str]:
    """Return the artifacts of an answer by nonce, if there is one for each of those that were asked for."""
    got, asked = [artifact.nonce for artifact in answer.artifacts], list(nonces)
    require(sorted(got) == sorted(asked), f"asked for nonces {asked}, got artifacts of {got[:20]}")
    return {artifact.nonce: artifact.vector_b64 for artifact in answer.artifacts}
