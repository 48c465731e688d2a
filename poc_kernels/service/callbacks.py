"""Callbacks: proofs and verdicts posted to the chain's node, in the background and until they are accepted.

There is one destination per kind and URL, each served by its own task on the event loop of one thread; `Slots` bound
the posts under way so that a dead or slow receiver delays only its own deliveries, and never the round. Each delivery
is made at least once: a receiver that takes a body and dies before it answers is sent the body again, under the same
id.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol

import httpx2

from .connections import CheckedTransport
from .outbox import GENERATED, VALIDATED, Delivery, Destination, DropReason, Failure, Outbox, canonical_json, merged
from .receivers import CallbackHosts, url_below
from .slots import Slots

__all__ = ["CallbackObserver", "CallbackSender", "canonical_json", "sign", "sign_post", "verify"]

logger = logging.getLogger("poc_kernels")

SIGNATURE_HEADER = "X-Signature"
# Those of Standard Webhooks, https://www.standardwebhooks.com: libraries of many languages check them.
POST_ID_HEADER = "webhook-id"
POST_TIME_HEADER = "webhook-timestamp"
POST_SIGNATURE_HEADER = "webhook-signature"

_RETRIED_IN_PLACE = (408, 425, 429)
"""Answers below 500 that say that the receiver cannot take a body now, not that it does not want this one."""
_MAX_ANSWER_BYTES = 65536
_QUOTED_CHARACTERS = 200
_RESOLVER_THREADS_PER_POST = 4
"""A name without an answer keeps its thread for some time after its post was given up."""
_STOP_SECONDS = 1.0
"""How long `close` waits for the thread to end, after its deadline."""

_Dropped = tuple[DropReason, Destination, list[Delivery]]


def sign(body: bytes, key: bytes) -> str:
    """Return the value of the header X-Signature: HMAC-SHA256 of body under key, 64 hex digits."""
    return hmac.new(key, body, hashlib.sha256).hexdigest()


def verify(body: bytes, signature: str, key: bytes) -> bool:
    """Check in constant time whether signature is that of body under key; for receivers."""
    return hmac.compare_digest(sign(body, key).encode(), signature.encode(errors="replace"))


def sign_post(post_id: str, timestamp: int, body: bytes, key: bytes) -> str:
    """Return the value of the header webhook-signature, in which a replay shows.

    Args:
        post_id: the header webhook-id: the same in every attempt at this post.
        timestamp: the header webhook-timestamp: seconds since 1970 at this attempt.
    """
    content = b"%s.%d.%s" % (post_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(key, content, "sha256")).decode()


class CallbackObserver(Protocol):
    """Learns what becomes of callbacks, from any thread, while no lock is taken; kind is "generated" or "validated"."""

    def delivered(self, kind: str, nonces: int) -> None:
        """Note that a post with this many nonces was accepted."""

    def failed(self, kind: str) -> None:
        """Note that an attempt to post failed."""

    def dropped(self, kind: str, nonces: int, reason: DropReason) -> None:
        """Note that a delivery with this many nonces was dropped."""


class CallbackSender:
    """Posts proofs and verdicts to {callback_url}/generated and /validated from a thread of its own.

    A failed attempt (an answer other than 2xx, or none) is repeated until the deliveries are too old, with exponential
    backoff. A body that is refused (4xx other than 408, 425, 429) goes behind the others of its destination, and a
    merged one is taken apart again. Redirects are not followed.

    Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) are honoured. Where one is set, NO_PROXY must name
    the receivers to reach without it: 127.0.0.1 and localhost for those on loopback.

    Args:
        key: signs every body (`sign`), in the header X-Signature, and every post (`sign_post`), in the header
            webhook-signature; None sends no such headers.
        hosts: which hosts are posted to; None for all.
        max_nonces: nonces that may wait, over all destinations; a delivery counts as at least one. Beyond it the oldest
            deliveries are dropped, with a warning; a single larger one is kept until a newer one waits.
        max_nonces_per_post: proofs are merged up to this many nonces; a single larger delivery is posted whole.
        max_posts: posts under way, and connections; see `Slots`.
        max_urls: destinations with deliveries. Beyond it the deliveries of the one to which nothing was added for the
            longest time are dropped, except those in flight.
        max_age_seconds: how long a delivery is kept; then it is dropped.
        flush_seconds: how long proofs wait at most for others to merge with.
        first_retry_seconds, max_retry_seconds: the backoff doubles from the first to the second, less up to a quarter
            at random. A Retry-After is respected, up to max_retry_seconds.
        timeout_seconds: how long a receiver may take over one post.
        observer: learns of every post, every failure and every dropped delivery.

    Raises:
        TypeError: key is not bytes.
        ValueError: key is empty, or a number is out of its range.
    """

    def __init__(
        self,
        *,
        key: bytes | None = None,
        hosts: CallbackHosts | None = None,
        max_nonces: int = 100_000,
        max_nonces_per_post: int = 1000,
        max_posts: int = 32,
        max_urls: int = 256,
        max_age_seconds: float = 6 * 3600.0,
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
        counts = {
            "max_nonces": max_nonces,
            "max_nonces_per_post": max_nonces_per_post,
            "max_posts": max_posts,
            "max_urls": max_urls,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not flush_seconds >= 0:
            raise ValueError(f"flush_seconds must be at least 0, got {flush_seconds}")
        if not 0 < first_retry_seconds <= max_retry_seconds:
            raise ValueError(
                "first_retry_seconds must be positive and at most max_retry_seconds, "
                f"got {first_retry_seconds} and {max_retry_seconds}"
            )
        for name, seconds in (("max_age_seconds", max_age_seconds), ("timeout_seconds", timeout_seconds)):
            if not seconds > 0:
                raise ValueError(f"{name} must be positive, got {seconds}")
        self._key = key
        self._max_nonces_per_post = max_nonces_per_post
        self._max_urls = max_urls
        self._max_age_seconds = max_age_seconds
        self._flush_seconds = flush_seconds
        self._retry_seconds = (first_retry_seconds, max_retry_seconds)
        self._timeout_seconds = timeout_seconds
        self._observer = observer

        self._lock = threading.Lock()  # taken for moments only, never while anything waits
        self._all_sent = threading.Condition(self._lock)
        # By URL; only those with deliveries, those first to which nothing was added for the longest time.
        self._destinations: OrderedDict[str, Destination] = OrderedDict()
        self._outbox = Outbox(max_nonces)
        self._arrivals = 0
        self._delivered = self._failed = self._dropped = self._dropped_nonces = 0
        self._last_error: str | None = None
        self._flushing = self._closed = False

        self._closing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # None except between start and close
        self._stop = asyncio.Event()
        self._tasks: dict[Destination, asyncio.Task[None]] = {}
        self._slots = Slots(max_posts)
        self._resolver_threads = _RESOLVER_THREADS_PER_POST * max_posts
        self._transport: httpx2.AsyncBaseTransport = CheckedTransport(hosts, max_posts)

    def start(self) -> None:
        """Start the thread, which sends what is already there.

        Raises:
            RuntimeError: it was started before, or is closed.
        """
        with self._lock:
            if self._closed or self._thread is not None:
                raise RuntimeError("CallbackSender.start must be called once, before close")
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(loop,), name="poc-callbacks", daemon=True)
            self._loop = loop
            for destination in self._destinations.values():
                self._soon(self._spawn, destination)
            self._thread.start()

    def generated(
        self, url: str, body: Mapping[str, Any], *, per_nonce: tuple[str, ...], nonces: Sequence[int] | None = None
    ) -> None:
        """Send proofs to {url}/generated; returns at once.

        Consecutive deliveries may share a post if their bodies differ in nothing except the lists named by per_nonce.

        Args:
            url: the round's callback_url. One that nothing can be posted to is treated like a dead receiver.
            body: JSON; copied.
            per_nonce: names of the lists in body that have one value per nonce, as the proof form has them.
            nonces: of the body, where it has no list of them; by default the list "nonces", the first of per_nonce.

        Raises:
            TypeError, ValueError: url is not a str, or body and per_nonce do not fit (see `Delivery`).
        """
        self._add(GENERATED, url, Delivery(body, per_nonce, nonces))

    def validated(self, url: str, body: Mapping[str, Any], nonces: Sequence[int] | None = None) -> None:
        """Send a verdict to {url}/validated, alone; otherwise like `generated`."""
        self._add(VALIDATED, url, Delivery(body, ("nonces",) if nonces is None else (), nonces))

    def pending(self) -> int:
        """Return the number of deliveries not yet accepted, including those in flight."""
        return len(self._outbox)

    def pending_nonces(self) -> int:
        """Return the number of nonces not yet accepted, including those in flight."""
        return self._outbox.nonces

    def status(self) -> dict[str, Any]:
        """Return what is pending, counts since the start, and the last error (None if there was none).

        The error is the kind and the status of the answer, or the class of a transport error. It has nothing that the
        receiver wrote, because whoever reads this may have chosen the receiver; the log has that.
        """
        with self._lock:
            return {
                "pending_batches": len(self._outbox),
                "pending_nonces": self._outbox.nonces,
                "delivered_batches": self._delivered,
                "failed_attempts": self._failed,
                "dropped_batches": self._dropped,
                "dropped_nonces": self._dropped_nonces,
                "last_error": self._last_error,
            }

    def close(self, deadline_seconds: float) -> None:
        """Send at once what waits, retry until deadline_seconds from now, then stop and warn of what was not delivered.

        What arrives meanwhile is sent, what arrives later is dropped. Calls after the first do nothing.
        """
        deadline = time.monotonic() + deadline_seconds
        with self._closing:
            with self._lock:
                if self._closed:
                    return
                self._flushing = True
                for destination in self._destinations.values():  # a receiver may be back: try now
                    destination.retry.reset()
                    destination.refusals.reset()
                    self._soon(destination.wake.set)
                if self._thread is not None:
                    self._all_sent.wait_for(lambda: not self._destinations, max(0.0, deadline - time.monotonic()))
                self._closed = True
                unsent = [(destination, destination.all) for destination in self._destinations.values()]
                self._destinations.clear()
                self._outbox.clear()
                for _, deliveries in unsent:
                    self._count_dropped(deliveries)
                self._soon(self._stop.set)
                self._loop = None
            if self._thread is not None:
                self._thread.join(_STOP_SECONDS)
        for destination, deliveries in unsent:
            self._report_dropped("callbacks not delivered before the deadline", "closed", destination, deliveries)

    def _add(self, kind: str, url: str, delivery: Delivery) -> None:
        if not isinstance(url, str):
            raise TypeError(f"url must be a str, got {type(url).__name__}")
        url = url_below(url, kind)
        with self._lock:
            now = time.monotonic()
            delivery.arrival, delivery.arrived = self._arrivals, now
            delivery.due = now + (self._flush_seconds if kind == GENERATED else 0.0)
            self._arrivals += 1
            destination = self._destinations.get(url) or Destination(kind, url, self._retry_seconds)
            if self._closed:
                self._count_dropped([delivery])
                dropped: list[_Dropped] = [("closed", destination, [delivery])]
            else:
                if url in self._destinations:
                    self._soon(destination.wake.set)
                else:
                    self._destinations[url] = destination
                    self._soon(self._spawn, destination)
                self._destinations.move_to_end(url)
                destination.add(delivery)
                self._outbox.add(destination, delivery)
                dropped = self._drop_excess(now)
        self._report_all(dropped)

    # Called under the lock.

    def _soon(self, call: Callable[..., object], *arguments: Any) -> None:
        """Have something called on the thread, unless it is not started or about to end."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(call, *arguments)

    def _drop_excess(self, now: float) -> list[_Dropped]:
        """Drop what is too old, and what is too much."""
        older, excess = self._outbox.drop_older(now - self._max_age_seconds), self._outbox.drop_excess()
        dropped: list[_Dropped] = [("old", *entry) for entry in older.items()]
        dropped += [("full", *entry) for entry in excess.items()]
        for _, destination, _ in dropped:
            self._forget_if_empty(destination)
        if len(self._destinations) > self._max_urls:
            dropped += self._drop_least_recent()
        for _, _, deliveries in dropped:
            self._count_dropped(deliveries)
        return dropped

    def _drop_least_recent(self) -> list[_Dropped]:
        """Drop what waits for the URLs that are too many; those in flight are left."""
        dropped: list[_Dropped] = []
        for destination in list(self._destinations.values()):
            if len(self._destinations) <= self._max_urls:
                break
            deliveries = self._outbox.drop_all(destination)
            if deliveries:
                dropped.append(("urls", destination, deliveries))
                self._forget_if_empty(destination)
        return dropped

    def _count_dropped(self, deliveries: list[Delivery]) -> None:
        self._dropped += len(deliveries)
        self._dropped_nonces += sum(len(each.nonces) for each in deliveries)

    def _forget_if_empty(self, destination: Destination) -> None:
        """Forget a destination without deliveries, which ends its task; the next delivery makes a new one."""
        if destination.empty and self._destinations.pop(destination.url, None) is not None:
            self._soon(self._end, destination)
            if not self._destinations:
                self._all_sent.notify_all()

    # Called without the lock.

    def _report_all(self, dropped: list[_Dropped]) -> None:
        for reason, destination, deliveries in dropped:
            self._report_dropped("callback dropped", reason, destination, deliveries)

    def _report_dropped(
        self, message: str, reason: DropReason, destination: Destination, deliveries: list[Delivery]
    ) -> None:
        logger.warning(message, extra={**destination.fields(deliveries), "reason": reason})
        for each in deliveries:
            self._tell("dropped", destination.kind, len(each.nonces), reason)

    def _tell(self, event: Literal["delivered", "failed", "dropped"], *arguments: Any) -> None:
        """Call the observer, whose errors must cost neither a proof nor the round."""
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*arguments)
        except Exception:
            logger.exception("callback observer failed")

    # On the thread.

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        # Names are resolved in many threads, so that names without an answer do not delay others. Unlike those of
        # asyncio.run, these threads are not waited for at the end.
        resolvers = ThreadPoolExecutor(self._resolver_threads, thread_name_prefix="poc-callbacks-resolver")
        loop.set_default_executor(resolvers)
        try:
            loop.run_until_complete(self._serve_until_stopped())
        finally:
            loop.close()

    async def _serve_until_stopped(self) -> None:
        await self._stop.wait()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._transport.aclose()

    def _spawn(self, destination: Destination) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(destination))
        self._tasks[destination] = task
        task.add_done_callback(lambda _: self._tasks.pop(destination))

    def _end(self, destination: Destination) -> None:
        """End the task of a destination that was forgotten, whatever it waits for."""
        if destination in self._tasks:
            self._tasks[destination].cancel()

    async def _serve(self, destination: Destination) -> None:
        """Post to destination, one post at a time, until it has no deliveries."""
        while not self._closed:
            destination.wake.clear()
            with self._lock:
                now = time.monotonic()
                dropped = self._drop_excess(now)
                empty = destination.empty
                ready_at = destination.ready_at(now, self._max_nonces_per_post, self._flushing)
            self._report_all(dropped)
            if empty:
                return
            if ready_at <= now:
                async with self._slots.one(destination.receiver):
                    await self._post_next(destination)
            else:
                alarm = asyncio.get_running_loop().call_later(ready_at - now, destination.wake.set)
                try:
                    await destination.wake.wait()
                finally:
                    alarm.cancel()

    async def _post_next(self, destination: Destination) -> None:
        """Make the next post, unless what waited was dropped meanwhile."""
        with self._lock:
            post = destination.next_post(time.monotonic(), self._max_nonces_per_post, self._flushing)
            self._outbox.sent(post)
        if not post:
            return
        failure = await self._attempt(destination, post)
        with self._lock:
            if self._closed:
                return
            destination.in_flight = []
            dropped: list[_Dropped] = []
            retry_seconds = 0.0
            if failure is None:
                self._delivered += len(post)
                destination.delivered(post)
                self._outbox.delivered(post)
            else:
                now = time.monotonic()
                self._failed += 1
                self._last_error = f"{destination.kind}: {failure.cause}"
                retry_seconds = destination.put_back(post, failure, now)
                self._outbox.wait(post)
                dropped = self._drop_excess(now)
            self._forget_if_empty(destination)
        if failure is None:
            self._tell("delivered", destination.kind, sum(len(each.nonces) for each in post))
            return
        fields = {**destination.fields(post), "error": destination.hide_secrets(failure.text)}
        logger.warning("callback failed", extra={**fields, "retry_seconds": retry_seconds})
        self._tell("failed", destination.kind)
        self._report_all(dropped)

    async def _attempt(self, destination: Destination, post: list[Delivery]) -> Failure | None:
        """Make a post, and note whether the receiver answered; return why it failed, if it did."""
        answered = False
        try:
            request = self._request(destination.url, post[0].post_id, canonical_json(merged(post)))
            # The request's timeouts are between bytes; these are for the whole.
            response = await asyncio.wait_for(self._transport.handle_async_request(request), self._timeout_seconds)
            answered = True
            try:
                text = await asyncio.wait_for(_answer(response), self._timeout_seconds)
            except Exception as error:
                text = f"({type(error).__name__} in its answer)"  # the status is known, and only that counts
            finally:
                await response.aclose()
        except asyncio.TimeoutError:
            return Failure("TimeoutError", f"no answer in {self._timeout_seconds} s")
        except Exception as error:  # whatever it is: the deliveries are kept
            return Failure(type(error).__name__, str(error))
        finally:
            self._slots.note(destination.receiver, answered)
        if response.is_success:
            return None
        status = response.status_code
        retry_after = _retry_after(response.headers.get("Retry-After")) if status in (429, 503) else 0.0
        refused = 400 <= status < 500 and status not in _RETRIED_IN_PLACE
        return Failure(f"answered {status}", text, refused, retry_after)

    def _request(self, url: str, post_id: str, body: bytes) -> httpx2.Request:
        timestamp = int(datetime.now(timezone.utc).timestamp())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "poc-kernels",
            POST_ID_HEADER: post_id,
            POST_TIME_HEADER: str(timestamp),
        }
        if self._key is not None:
            headers[SIGNATURE_HEADER] = sign(body, self._key)
            headers[POST_SIGNATURE_HEADER] = sign_post(post_id, timestamp, body, self._key)
        timeouts = httpx2.Timeout(self._timeout_seconds).as_dict()
        request = httpx2.Request("POST", url, content=body, headers=headers, extensions={"timeout": timeouts})
        if request.url.userinfo:
            next(httpx2.BasicAuth(request.url.username, request.url.password).auth_flow(request))  # sets its header
        return request


async def _answer(response: httpx2.Response) -> str:
    """Return the beginning of the answer's text; a short one is read in full so that the connection can be reused."""
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > _MAX_ANSWER_BYTES:
            break
    return content.decode(errors="replace")[:_QUOTED_CHARACTERS]


def _retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header, which is a number or a date; 0 for one that is neither."""
    try:
        if value is None or value.isdecimal():
            return float(value or 0)
        date = parsedate_to_datetime(value)
        return (date.replace(tzinfo=date.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, OverflowError):
        return 0.0
