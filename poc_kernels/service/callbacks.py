"""Callbacks: proofs and verdicts posted to the chain's node, in the background and until they are taken.

A batch waits in the line of its destination, one line per kind and url, each served by a task of its own on the
event loop of one thread: a dead or slow receiver holds up its own line alone, and the round never. Delivery is at least
once: a receiver that takes a body and dies before it answers is sent the nonces again.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Literal, Protocol

import httpx2

from .outbox import GENERATED, VALIDATED, Backlog, Batch, Failure, Line, canonical_json, merged

__all__ = ["CallbackObserver", "CallbackSender", "canonical_json", "sign", "verify"]

logger = logging.getLogger("poc_kernels")

SIGNATURE_HEADER = "X-Signature"

_RETRIED_IN_PLACE = (408, 425, 429)
"""Answers below 500 that speak of the moment, not of the body."""
_MAX_ANSWER_BYTES = 65536
_QUOTED_CHARACTERS = 200
_IDLE_CONNECTIONS = 16
_RESOLVER_THREADS = 32
_STOP_SECONDS = 1.0
"""How long `close` waits, after its deadline, for the thread to end."""


def sign(body: bytes, key: bytes) -> str:
    """The value of the header X-Signature: HMAC-SHA256 of body under key, 64 hex digits."""
    return hmac.new(key, body, hashlib.sha256).hexdigest()


def verify(body: bytes, signature: str, key: bytes) -> bool:
    """Whether signature is that of body under key; for receivers. Takes the same time wherever the two differ."""
    return hmac.compare_digest(sign(body, key).encode(), signature.encode(errors="replace"))


class CallbackObserver(Protocol):
    """Told what becomes of callbacks; kind is "generated" or "validated". Called from any thread, with no lock held."""

    def delivered(self, kind: str, nonces: int) -> None:
        """A post with this many nonces was taken."""

    def failed(self, kind: str) -> None:
        """An attempt to post failed."""

    def dropped(self, kind: str, nonces: int) -> None:
        """A batch with this many nonces was given up."""


class CallbackSender:
    """Posts batches to {callback_url}/generated and /validated from a thread of its own.

    A failed attempt (an answer other than 2xx, or none) is repeated without end, with exponential backoff. A body that
    is refused (4xx other than 408, 425, 429) goes to the back of its line, and a merged one is taken apart again.

    Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) are honoured. Where one is set, NO_PROXY must name
    the receivers to reach without it: 127.0.0.1 and localhost for those on loopback.

    Args:
        key: signs every body (`sign`), in the header X-Signature; None sends no such header.
        max_nonces: nonces that may wait, over all destinations, a batch counted with at least one. Beyond it the oldest
            batches are dropped, with a warning; a single batch larger than it is kept until a newer one waits.
        max_nonces_per_post: generated batches are merged up to this many nonces; a single larger one goes as it is.
        flush_seconds: how long a generated batch waits at most for others to merge with.
        first_retry_seconds, max_retry_seconds: the backoff doubles from the one to the other, less up to a quarter at
            random. A Retry-After is kept to, up to max_retry_seconds.
        timeout_seconds: how long a receiver may take over one post.
        observer: told of every post, failure and dropped batch.

    Raises:
        TypeError: key is not bytes.
        ValueError: key is empty, or a number is out of its range.
    """

    def __init__(
        self,
        *,
        key: bytes | None = None,
        max_nonces: int = 100_000,
        max_nonces_per_post: int = 1000,
        flush_seconds: float = 1.0,
        first_retry_seconds: float = 0.5,
        max_retry_seconds: float = 30.0,
        timeout_seconds: float = 10.0,
        observer: CallbackObserver | None = None,
    ) -> None:
        if key is not None and not isinstance(key, bytes):
            raise TypeError(f"key must be bytes or None, got {type(key).__name__}")
        if key == b"":
            raise ValueError("key must be None or at least one byte, got none")
        for name, count in (("max_nonces", max_nonces), ("max_nonces_per_post", max_nonces_per_post)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not flush_seconds >= 0:
            raise ValueError(f"flush_seconds must be at least 0, got {flush_seconds}")
        if not 0 < first_retry_seconds <= max_retry_seconds:
            raise ValueError(
                "first_retry_seconds must be positive and at most max_retry_seconds, "
                f"got {first_retry_seconds} and {max_retry_seconds}"
            )
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        self._key = key
        self._max_nonces_per_post = max_nonces_per_post
        self._flush_seconds = flush_seconds
        self._retry_seconds = (first_retry_seconds, max_retry_seconds)
        self._timeout_seconds = timeout_seconds
        self._observer = observer

        self._lock = threading.Lock()  # held for moments only, never while anything waits
        self._all_sent = threading.Condition(self._lock)
        self._lines: dict[str, Line] = {}  # by url; only those with batches: a line that empties is forgotten
        self._backlog = Backlog(max_nonces)
        self._arrivals = 0
        self._delivered = self._failed = self._dropped = self._dropped_nonces = 0
        self._last_error: str | None = None
        self._flushing = self._closed = False

        self._closing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # None but between start and close
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # One client for all, with as many connections as there are destinations: none waits for another's.
        self._client = httpx2.AsyncClient(
            timeout=timeout_seconds,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=_IDLE_CONNECTIONS),
            headers={"Accept-Encoding": "identity"},
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
        )

    def start(self) -> None:
        """Start the thread. What arrived before is sent now.

        Raises:
            RuntimeError: started before, or closed.
        """
        with self._lock:
            if self._closed or self._thread is not None:
                raise RuntimeError("CallbackSender.start must be called once, before close")
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(loop,), name="poc-callbacks", daemon=True)
            self._loop = loop
            for line in self._lines.values():
                loop.call_soon_threadsafe(self._spawn, line)
            self._thread.start()

    def generated(self, url: str, batch: Mapping[str, Any]) -> None:
        """Send a ProofBatch to {url}/generated; returns at once.

        Args:
            url: the round's callback_url. One that nothing can be posted to fails as a dead receiver does.
            batch: JSON with the lists nonces and dist of one length; consecutive batches that agree in everything else
                may share a post. Copied.

        Raises:
            TypeError, ValueError: url is not a str, or batch not such a batch.
        """
        self._add(GENERATED, url, batch)

    def validated(self, url: str, batch: Mapping[str, Any]) -> None:
        """Send a ValidatedBatch (JSON with the list nonces) to {url}/validated, alone; else as `generated`."""
        self._add(VALIDATED, url, batch)

    def pending(self) -> int:
        """Batches not yet taken: those that wait and those on their way."""
        with self._lock:
            return len(self._backlog)

    def pending_nonces(self) -> int:
        """Nonces not yet taken: those that wait, at most max_nonces but for a larger batch, and those on their way."""
        with self._lock:
            return self._backlog.nonces

    def status(self) -> dict[str, Any]:
        """What is pending, counts since the start, and the last error (None: there was none).

        The error is the kind and the status that was answered, or the class of a transport error: who reads this may
        have chosen the receiver, and is not to read through it what the receiver says. The log has that.
        """
        with self._lock:
            return {
                "pending_batches": len(self._backlog),
                "pending_nonces": self._backlog.nonces,
                "delivered_batches": self._delivered,
                "failed_attempts": self._failed,
                "dropped_batches": self._dropped,
                "dropped_nonces": self._dropped_nonces,
                "last_error": self._last_error,
            }

    def close(self, deadline_seconds: float) -> None:
        """Send at once what waits, retry until deadline_seconds from now, then stop and warn of what was not taken.

        Batches that arrive during this are sent, later ones dropped. Calls after the first do nothing.
        """
        deadline = time.monotonic() + deadline_seconds
        with self._closing:
            with self._lock:
                if self._closed:
                    return
                self._flushing = True
                for line in self._lines.values():  # a receiver that has come back is not missed
                    line.retry.reset()
                    line.refusals.reset()
                    self._wake(line)
                if self._thread is not None:
                    self._all_sent.wait_for(lambda: not self._lines, max(0.0, deadline - time.monotonic()))
                self._closed = True
                unsent = [(line, line.all) for line in self._lines.values()]
                self._lines.clear()
                self._backlog.clear()
                for _, batches in unsent:
                    self._count_dropped(batches)
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._stop.set)
                    self._loop = None
            if self._thread is not None:
                self._thread.join(_STOP_SECONDS)
        for line, batches in unsent:
            self._tell_dropped("callbacks not delivered before the deadline", line, batches)

    def _add(self, kind: str, url: str, content: Mapping[str, Any]) -> None:
        if not isinstance(url, str):
            raise TypeError(f"url must be a str, got {type(url).__name__}")
        batch = Batch(kind, content)
        url = f"{url.rstrip('/')}/{kind}"
        with self._lock:
            batch.arrival = self._arrivals
            batch.due = time.monotonic() + (self._flush_seconds if kind == GENERATED else 0.0)
            self._arrivals += 1
            line = self._lines.get(url)
            if line is not None:
                self._wake(line)
            else:
                line = Line(kind, url, self._retry_seconds)
                if not self._closed:
                    self._lines[url] = line
                    if self._loop is not None:
                        self._loop.call_soon_threadsafe(self._spawn, line)
            line.add(batch)
            if self._closed:
                self._count_dropped([batch])
                dropped = {line: [batch]}
            else:
                self._backlog.add(line, batch)
                dropped = self._keep_bound()
        for dropped_line, batches in dropped.items():
            self._tell_dropped("callback dropped", dropped_line, batches)

    # Called with the lock held.

    def _wake(self, line: Line) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(line.wake.set)

    def _keep_bound(self) -> dict[Line, list[Batch]]:
        dropped = self._backlog.drop_excess()
        for line, batches in dropped.items():
            self._count_dropped(batches)
            self._forget_if_empty(line)
        return dropped

    def _count_dropped(self, batches: list[Batch]) -> None:
        self._dropped += len(batches)
        self._dropped_nonces += sum(len(batch.nonces) for batch in batches)

    def _forget_if_empty(self, line: Line) -> None:
        """The task of a forgotten line ends; the next batch for that destination starts another line."""
        if line.empty and self._lines.pop(line.url, None) is not None:
            self._wake(line)
            if not self._lines:
                self._all_sent.notify_all()

    # Called without the lock.

    def _tell_dropped(self, message: str, line: Line, batches: list[Batch]) -> None:
        logger.warning(message, extra=line.fields(batches))
        for batch in batches:
            self._tell("dropped", line.kind, len(batch.nonces))

    def _tell(self, event: Literal["delivered", "failed", "dropped"], *arguments: Any) -> None:
        """Tell the observer. Its faults must cost neither a proof nor the round."""
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*arguments)
        except Exception:
            logger.exception("callback observer failed")

    # On the thread.

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        # Names are resolved in threads: many, so that names without an answer do not hold up others, and unlike
        # those of asyncio.run not waited for at the end.
        loop.set_default_executor(ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="poc-callbacks-resolver"))
        try:
            loop.run_until_complete(self._serve_until_stopped())
        finally:
            loop.close()

    async def _serve_until_stopped(self) -> None:
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def _spawn(self, line: Line) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(line))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, line: Line) -> None:
        """One post at a time, until the line is empty."""
        while not self._closed:
            line.wake.clear()
            with self._lock:
                if line.empty:
                    return
                now = time.monotonic()
                post, look_again = line.next_post(now, self._max_nonces_per_post, self._flushing)
                self._backlog.sent(post)
            if post:
                await self._post(line, post)
            else:
                alarm = asyncio.get_running_loop().call_later(look_again - now, line.wake.set)
                await line.wake.wait()
                alarm.cancel()

    async def _post(self, line: Line, post: list[Batch]) -> None:
        body = canonical_json(merged(post))
        try:
            failure = await self._attempt(line.url, body)
        except asyncio.TimeoutError:
            failure = Failure("TimeoutError", f"no answer in {self._timeout_seconds} s")
        except Exception as error:  # of whatever kind: the batches stay in the line
            failure = Failure(type(error).__name__, str(error))
        with self._lock:
            if self._closed:
                return
            line.on_the_way = []
            dropped: dict[Line, list[Batch]] = {}
            retry_seconds = 0.0
            if failure is None:
                self._delivered += len(post)
                line.taken(post)
                self._backlog.taken(post)
            else:
                self._failed += 1
                self._last_error = f"{line.kind}: {failure.cause}"
                retry_seconds = line.put_back(post, failure, time.monotonic())
                self._backlog.put_back(post)
                dropped = self._keep_bound()
            self._forget_if_empty(line)
        if failure is None:
            self._tell("delivered", line.kind, sum(len(batch.nonces) for batch in post))
            return
        fields = line.fields(post)
        logger.warning("callback failed", extra={**fields, "error": failure.text, "retry_seconds": retry_seconds})
        self._tell("failed", line.kind)
        for dropped_line, batches in dropped.items():
            self._tell_dropped("callback dropped", dropped_line, batches)

    async def _attempt(self, url: str, body: bytes) -> Failure | None:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers[SIGNATURE_HEADER] = sign(body, self._key)
        request = self._client.build_request("POST", url, content=body, headers=headers)
        # The client's time-outs are between bytes; these are for the whole.
        response = await asyncio.wait_for(self._client.send(request, stream=True), self._timeout_seconds)
        try:
            text = await asyncio.wait_for(_answer(response), self._timeout_seconds)
        except (asyncio.TimeoutError, httpx2.HTTPError) as error:
            text = f"({type(error).__name__} in its answer)"  # the status counts, and that is known
        finally:
            await response.aclose()
        if response.is_success:
            return None
        status = response.status_code
        retry_after = _retry_after(response.headers.get("Retry-After")) if status in (429, 503) else 0.0
        refused = 400 <= status < 500 and status not in _RETRIED_IN_PLACE
        return Failure(f"answered {status}", text, refused, retry_after)


async def _answer(response: httpx2.Response) -> str:
    """The beginning of the answer's text. Read in full where it is short, so that the connection can serve again."""
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > _MAX_ANSWER_BYTES:
            break
    return content.decode(errors="replace")[:_QUOTED_CHARACTERS]


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 for one that is neither."""
    try:
        if value is None or value.isdecimal():
            return float(value or 0)
        date = parsedate_to_datetime(value)
        return (date.replace(tzinfo=date.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, OverflowError):
        return 0.0
