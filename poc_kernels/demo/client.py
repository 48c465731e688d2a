"""Clients of the server: `NodeClient` for the chain's node and a validator, `Chatter` for a user with timed chats."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx2
import openai
from prometheus_client.parser import text_string_to_metric_families

from .results import Chat

_TIMEOUT_SECONDS = 120.0
QUESTIONS = (
    "Tell me how a computer adds two numbers.",
    "Please write a short story about a quiet village near the sea.",
    "What is the difference between a promise and a proof?",
    "Describe the colour of the morning sky in winter.",
    "Give three reasons to check the work of others.",
)


class Progress(NamedTuple):
    """Nonces of a round so far: checked, those of them that count as proofs, and checked per second."""

    checked: int
    valid: int
    rate: float

    @classmethod
    def of(cls, status: dict[str, Any]) -> Progress:
        """Return the progress in a status: of fingerprints, all of which count, or of distances."""
        stats = status.get("stats")
        if stats is not None:
            return cls(stats["total_processed"], stats["total_processed"], stats["nonces_per_second"])
        return cls(status["total_checked"], status["total_valid"], status["rate_per_second"])


class NodeClient:
    """Calls the routes of a round under /api/v1/pow, and /metrics.

    Methods raise ``httpx2.HTTPStatusError`` for an answer other than 2xx, except `refusal`.
    """

    def __init__(self, url: str) -> None:
        self._http = httpx2.Client(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _call(self, method: str, path: str, body: object | None = None) -> dict[str, Any]:
        answer = self._http.request(method, f"/api/v1/pow{path}", json=body)
        content: dict[str, Any] = answer.raise_for_status().json()
        return content

    def status(self) -> dict[str, Any]:
        """Return state and progress of the round."""
        return self._call("GET", "/status")

    def begin(self, name: str, config: dict[str, Any]) -> None:
        """Begin a round in the phase ``name``: "generate" or "validate". Its form is that of the configuration."""
        self._call("POST", f"/init/{name}", config)

    def phase(self, name: str) -> None:
        """Switch the round to the phase ``name``: "generate" or "validate"."""
        self._call("POST", f"/phase/{name}")

    def stop(self) -> None:
        """End the round."""
        self._call("POST", "/stop")

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have fingerprints computed, and judged if the request claims some; return them or the verdict."""
        return self._call("POST", "/generate", request)

    def validate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Have a ProofBatch recomputed, and return the verdict."""
        return self._call("POST", "/validate", batch)

    def refusal(self, batch: dict[str, Any]) -> tuple[int, str]:
        """Return status and reason of the answer to a ProofBatch that should be refused."""
        answer = self._http.post("/api/v1/pow/validate", json=batch)
        return answer.status_code, str(answer.json()["detail"] if answer.is_client_error else answer.text[:300])

    def metrics(self, name: str) -> dict[str, float]:
        """Return a metric's values by the value of its one label, or by "" if it has no label."""
        answer = self._http.get("/metrics").raise_for_status()
        return {
            ",".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.name == name
        }


class Chatter:
    """A user who asks questions and records when the pieces of each answer arrive.

    Args:
        url: the server's URL.
        model: the name that the server knows the model by.
        clock: returns seconds.
        max_tokens: maximum number of tokens of an answer.
    """

    def __init__(self, url: str, model: str, clock: Callable[[], float], max_tokens: int) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=_TIMEOUT_SECONDS,
            http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy for loopback
        )
        self._model = model
        self._clock = clock
        self._max_tokens = max_tokens

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, question: str, state: str) -> Chat:
        """Stream one chat, and return its record, also if it was refused or failed."""
        arrivals: list[float] = []
        pieces: list[str] = []
        status, retry_after, error = 200, None, ""
        began = self._clock()
        try:
            with self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": question}],
                max_tokens=self._max_tokens,
                stream=True,
            ) as stream:
                for chunk in stream:
                    piece = chunk.choices[0].delta.content if chunk.choices else None
                    if piece:
                        arrivals.append(self._clock())
                        pieces.append(piece)
        except openai.APIStatusError as refusal:
            status, error = refusal.status_code, refusal.message
            retry_after = refusal.response.headers.get("retry-after")
        except openai.APIError as failure:  # no answer, or an error in the stream
            status, error = 0, failure.message
        return Chat(state, began, self._clock(), tuple(arrivals), "".join(pieces), status, retry_after, error)


@contextmanager
def chatting(chatters: Sequence[Chatter], state: str, chats: list[Chat]) -> Iterator[None]:
    """Let all users chat at the same time while the block runs, and append the records to ``chats``.

    Each user asks one question after the other. The end of the block waits for the answers that are being written.
    """
    over = threading.Event()

    def talk(number: int) -> None:
        turn = number
        while not over.is_set():
            chats.append(chatters[number].ask(QUESTIONS[turn % len(QUESTIONS)], state))
            turn += 1

    threads = [threading.Thread(target=talk, args=(number,), daemon=True) for number in range(len(chatters))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
