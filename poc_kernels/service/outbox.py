"""The outbox of callbacks: what waits, what is posted next and when, what is dropped. No clock and no network in here.

A `Delivery` is one body as it was handed in, a `Destination` orders the deliveries for one URL, and the `Outbox` bounds
those of all destinations together. A post is one delivery, or several merged ones; one that failed is repeated as it
was, under the same id. Times are of time.monotonic.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, TypeGuard

from .receivers import masked, receiver_of, secrets_of, without

_PIECE = 4096
GENERATED = "generated"
VALIDATED = "validated"
DropReason = Literal["full", "urls", "old", "closed"]
"""Why a delivery is dropped: too many nonces wait, or URLs; it waited for too long; the sender is closed."""


def canonical_json(obj: object) -> bytes:
    """Serialise the body of a callback: JSON with sorted keys and compact separators, in UTF-8.

    Parsing these bytes and calling this on the result gives the same bytes.

    Raises:
        TypeError, ValueError: obj is not JSON.
    """
    return _text(obj).encode()


# By pieces: one call of json with a long list keeps the interpreter from every other thread.


def _text(obj: object) -> str:
    if _has_names(obj):
        return "{" + ",".join(f"{json.dumps(name)}:{_text(obj[name])}" for name in sorted(obj)) + "}"
    if isinstance(obj, list) and len(obj) > _PIECE:
        return "[" + ",".join(_text(obj[at : at + _PIECE])[1:-1] for at in range(0, len(obj), _PIECE)) + "]"
    return json.dumps(obj, sort_keys=True, separators=(",", ":"))


def _copied(obj: Any) -> Any:
    """Return a copy that is guaranteed to be JSON."""
    if _has_names(obj):
        return {name: _copied(value) for name, value in obj.items()}
    if isinstance(obj, list) and len(obj) > _PIECE:
        return [item for at in range(0, len(obj), _PIECE) for item in _copied(obj[at : at + _PIECE])]
    return json.loads(_text(obj))


def _has_names(obj: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(obj, dict) and all(isinstance(name, str) for name in obj)


def printable(text: str) -> str:
    """Escape what is not printable in text, so that it cannot begin another line of a log."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@dataclass
class Failure:
    """Why an attempt to post failed."""

    cause: str
    """The status of the answer, or the class of the error: nothing that the receiver can write."""
    details: str = ""
    """What the receiver or the error says; for logs."""
    refused: bool = False
    """Whether the receiver is there and does not want this body."""
    retry_after: float = 0.0
    """Seconds that the receiver asks to wait."""

    @property
    def text(self) -> str:
        """Cause and details in one line; for logs."""
        return printable(f"{self.cause}: {self.details}" if self.details else self.cause)


class Delivery:
    """The body of a callback as it was handed in, and where it stands.

    Args:
        body: JSON; copied.
        per_nonce: names of the lists in body that have one value per nonce.
        nonces: of the body, where it has no list of them; by default the list "nonces", the first of per_nonce.

    Raises:
        TypeError, ValueError: body is not JSON, one of the lists is missing or has another length than the nonces, or
            per_nonce does not begin with "nonces" though nonces is None.
    """

    __slots__ = (
        "arrival",
        "arrived",
        "common",
        "due",
        "goes_after",
        "nonces",
        "per_nonce",
        "post_id",
        "refused",
        "waiting",
    )

    def __init__(
        self, body: Mapping[str, Any], per_nonce: tuple[str, ...], nonces: Sequence[int] | None = None
    ) -> None:
        if not isinstance(body, Mapping):
            raise TypeError(f"body must be a mapping, got {type(body).__name__}")
        if not isinstance(per_nonce, tuple) or (nonces is None and per_nonce[:1] != ("nonces",)):
            raise ValueError(f'per_nonce must be a tuple of names that begins with "nonces", got {per_nonce!r}')
        self.common: dict[str, Any] = _copied(dict(body))
        self.per_nonce: dict[str, list[Any]] = {name: self.common.pop(name, None) for name in per_nonce}
        for name, values in self.per_nonce.items():
            if not isinstance(values, list):
                raise TypeError(f"body[{name!r}] must be a list, got {type(values).__name__}")
        listed = self.per_nonce.get("nonces")
        self.nonces: list[Any] = list(nonces or ()) if listed is None else listed
        """Nonces of the body."""
        for name, values in self.per_nonce.items():
            if len(values) != len(self.nonces):
                raise ValueError(
                    f"body[{name!r}] must have {len(self.nonces)} values, one per nonce, got {len(values)}"
                )
        self.arrival = 0
        """A number that grows from one delivery to the next."""
        self.arrived = 0.0
        """When it arrived."""
        self.due = 0.0
        """When it is sent even if nothing was merged with it."""
        self.waiting = True
        """False while it is in flight."""
        self.refused = False
        """Whether a receiver has refused it, alone or merged; it is then posted alone."""
        self.goes_after = -1
        """If refused: the arrival of the last delivery that goes before it."""
        self.post_id = ""
        """The id of the post that it was last part of, if that may be repeated: with the same deliveries."""

    @property
    def weight(self) -> int:
        """The nonces that it counts as: at least one, because a delivery without nonces takes memory too."""
        return max(1, len(self.nonces))

    def merges_with(self, other: Delivery) -> bool:
        """Check that the two differ only in what they say of each nonce."""
        return self.per_nonce.keys() == other.per_nonce.keys() and self.common == other.common


def merged(post: list[Delivery]) -> dict[str, Any]:
    """Join deliveries that merge into one body."""
    joined = {name: [value for each in post for value in each.per_nonce[name]] for name in post[0].per_nonce}
    return {**post[0].common, **joined}


class Backoff:
    """Doubling waits, shortened by up to a quarter at random so that senders do not all retry at the same moment."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds, self._max_seconds = first_seconds, max_seconds
        self.reset()

    def reset(self) -> None:
        """Let the next attempt be made at once, and the next wait be the first again."""
        self._seconds = 0.0
        self.until = 0.0

    def failed(self, now: float, min_seconds: float = 0.0) -> None:
        """Set `until` after a failure: at least min_seconds from now, except that max_seconds is never exceeded."""
        self._seconds = min(self._max_seconds, 2 * self._seconds or self._first_seconds)
        wait = self._seconds * random.uniform(0.75, 1.0)
        self.until = now + max(wait, min(min_seconds, self._max_seconds))


class Destination:
    """The deliveries for one URL, in the order in which they are tried.

    Args:
        kind: "generated" or "validated".
        url: the complete URL that they are posted to.
        retry_seconds: first and longest wait of a `Backoff`.
    """

    def __init__(self, kind: str, url: str, retry_seconds: tuple[float, float]) -> None:
        self.kind = kind
        self.url = url
        self.receiver = receiver_of(url)
        self._label = printable(masked(url))
        self._secrets = secrets_of(url)
        self.fresh: deque[Delivery] = deque()
        """Waiting deliveries that were never refused, by arrival."""
        self.refused: OrderedDict[int, Delivery] = OrderedDict()
        """Waiting deliveries that were refused, by arrival as key, in the order in which they are tried again."""
        self.in_flight: list[Delivery] = []
        """Deliveries of the post that is being sent."""
        self.retry = Backoff(*retry_seconds)
        """Waits of the whole destination."""
        self.refusals = Backoff(*retry_seconds)
        """Waits of the refused deliveries, which are tried one at a time; the fresh ones pass them."""
        self.wake = asyncio.Event()
        """Set when there may be something to do."""

    @property
    def empty(self) -> bool:
        """Whether nothing waits here or is in flight."""
        return not self.fresh and not self.refused and not self.in_flight

    @property
    def all(self) -> list[Delivery]:
        """All deliveries that wait here or are in flight."""
        return [*self.in_flight, *self.fresh, *self.refused.values()]

    def add(self, delivery: Delivery) -> None:
        """Append a new delivery."""
        if self.fresh and self.fresh[-1].common == delivery.common:
            delivery.common = self.fresh[-1].common  # retained once
        self.fresh.append(delivery)

    def drop(self, delivery: Delivery) -> None:
        """Remove a waiting delivery; of the fresh ones, only the oldest."""
        if delivery.refused:
            del self.refused[delivery.arrival]
            return
        self.fresh.popleft()
        if delivery.post_id:  # what is left of its post is another one
            for each in takewhile(lambda each: each.post_id == delivery.post_id, self.fresh):
                each.post_id = ""

    def ready_at(self, now: float, max_nonces: int, flush: bool) -> float:
        """Return when there is a post to send: now, or a later time; infinity if nothing waits."""
        if now < self.retry.until:
            return self.retry.until
        if self._refused_in_turn(now) is not None:
            return now
        post, complete = self._first_fresh(max_nonces)
        due = math.inf if not post else now if complete or flush else max(now, post[0].due)
        return due if not self.refused or self._others_first() else min(due, self.refusals.until)

    def next_post(self, now: float, max_nonces: int, flush: bool) -> list[Delivery]:
        """Put the deliveries of the next post in flight, and return them: none if `ready_at` is later than now.

        Deliveries are merged up to max_nonces; flush also posts those that are not due.
        """
        if self.ready_at(now, max_nonces, flush) > now:
            return []
        refused = self._refused_in_turn(now)
        if refused is not None:
            del self.refused[refused.arrival]
            self.in_flight = [refused]
        else:
            self.in_flight, _ = self._first_fresh(max_nonces)
            for _ in self.in_flight:
                self.fresh.popleft()
        post_id = self.in_flight[0].post_id or f"msg_{uuid.uuid4().hex}"
        for each in self.in_flight:
            each.post_id = post_id
        return self.in_flight

    def _others_first(self) -> bool:
        """Return whether fresh deliveries go before the refused one that is next."""
        return bool(self.fresh) and self.fresh[0].arrival <= next(iter(self.refused.values())).goes_after

    def _refused_in_turn(self, now: float) -> Delivery | None:
        if not self.refused or self._others_first() or now < self.refusals.until:
            return None
        return next(iter(self.refused.values()))

    def _first_fresh(self, max_nonces: int) -> tuple[list[Delivery], bool]:
        """Return the next fresh deliveries that share a post, and whether no later one could join them."""
        repeated = self.fresh[0].post_id if self.fresh else ""
        if repeated:
            return list(takewhile(lambda each: each.post_id == repeated, self.fresh)), True
        post: list[Delivery] = []
        nonces = 0
        for delivery in self.fresh:
            fits = nonces + len(delivery.nonces) <= max_nonces and self.kind == GENERATED
            if post and not (fits and delivery.merges_with(post[0])):
                return post, True
            post.append(delivery)
            nonces += len(delivery.nonces)
        return post, nonces >= max_nonces

    def delivered(self, post: list[Delivery]) -> None:
        """End the waits that the post's success makes needless."""
        self.retry.reset()
        if post[0].refused:
            self.refusals.reset()

    def put_back(self, post: list[Delivery], failure: Failure, now: float) -> float:
        """Put a failed post before the others, or behind them if it was refused; return the seconds until a retry."""
        if not failure.refused:
            if post[0].refused:  # alone, and still its turn
                self.refused[post[0].arrival] = post[0]
                self.refused.move_to_end(post[0].arrival, last=False)
            else:
                self.fresh.extendleft(reversed(post))
            self.retry.failed(now, failure.retry_after)
            return self.retry.until - now
        self.retry.reset()
        if post[0].refused or now >= self.refusals.until:  # a new refusal does not delay those refused before it
            self.refusals.failed(now)
        for delivery in post:
            delivery.refused = True
            if len(post) > 1:
                delivery.post_id = ""  # it is posted alone from now on
            delivery.goes_after = self.fresh[-1].arrival if self.fresh else -1
            self.refused[delivery.arrival] = delivery
        return self.refusals.until - now

    def hide_secrets(self, text: str) -> str:
        """Return a text, such as an answer, without the secrets of the URL."""
        return without(self._secrets, text)

    def fields(self, deliveries: list[Delivery]) -> dict[str, Any]:
        """Return what a log record says of deliveries."""
        nonces = [nonce for each in deliveries for nonce in each.nonces]
        return {
            "kind": self.kind,
            "url": self._label,
            "block_hash": printable(", ".join(sorted({str(each.common.get("block_hash")) for each in deliveries}))),
            "batches": len(deliveries),
            "nonces": len(nonces),
            "first_nonce": nonces[0] if nonces else None,
            "last_nonce": nonces[-1] if nonces else None,
        }


class Outbox:
    """The deliveries of all destinations by age, and the bound on those that wait.

    A delivery weighs its nonces, at least one. A call takes time in proportion to the deliveries that it moves and to
    those in flight, not to those that are retained.

    Args:
        max_nonces: maximum weight of all waiting deliveries together; a single one that waits may weigh more.
    """

    def __init__(self, max_nonces: int) -> None:
        self.nonces = 0
        """Nonces of all deliveries, including those in flight."""
        self._max_nonces = max_nonces
        # By arrival, including those in flight.
        self._deliveries: OrderedDict[int, tuple[Destination, Delivery]] = OrderedDict()
        self._waiting = self._weight = 0  # deliveries that wait, and their weight

    def __len__(self) -> int:
        return len(self._deliveries)

    def add(self, destination: Destination, delivery: Delivery) -> None:
        """Add the newest delivery, which was added to destination; arrivals grow."""
        self._deliveries[delivery.arrival] = (destination, delivery)
        self.nonces += len(delivery.nonces)
        self.wait([delivery])

    def sent(self, post: list[Delivery]) -> None:
        """Note that these deliveries no longer wait."""
        self._waiting -= len(post)
        self._weight -= sum(each.weight for each in post)
        for each in post:
            each.waiting = False

    def wait(self, deliveries: list[Delivery]) -> None:
        """Note that these deliveries wait in their destination, for the first time or again."""
        self._waiting += len(deliveries)
        self._weight += sum(each.weight for each in deliveries)
        for each in deliveries:
            each.waiting = True

    def delivered(self, post: list[Delivery]) -> None:
        """Forget these deliveries, which were in flight."""
        for each in post:
            self._forget(each)

    def drop_excess(self) -> dict[Destination, list[Delivery]]:
        """Drop the oldest waiting deliveries until the others keep to the bound, or only one waits; return them."""
        excess, max_dropped = self._weight - self._max_nonces, self._waiting - 1
        oldest: list[tuple[Destination, Delivery]] = []
        for destination, delivery in self._deliveries.values():
            if excess <= 0 or len(oldest) >= max_dropped:
                break
            if delivery.waiting:
                oldest.append((destination, delivery))
                excess -= delivery.weight
        return self._drop(oldest)

    def drop_older(self, arrived: float) -> dict[Destination, list[Delivery]]:
        """Drop the waiting deliveries that arrived before a time, and return them."""
        older = takewhile(lambda entry: entry[1].arrived < arrived, self._deliveries.values())
        return self._drop([(destination, delivery) for destination, delivery in older if delivery.waiting])

    def drop_all(self, destination: Destination) -> list[Delivery]:
        """Drop the waiting deliveries of a destination, and return them."""
        waiting = [each for each in destination.all if each.waiting]
        self._drop([(destination, each) for each in waiting])
        return waiting

    def _drop(self, entries: list[tuple[Destination, Delivery]]) -> dict[Destination, list[Delivery]]:
        self.sent([delivery for _, delivery in entries])
        dropped: dict[Destination, list[Delivery]] = {}
        for destination, delivery in entries:
            destination.drop(delivery)
            self._forget(delivery)
            dropped.setdefault(destination, []).append(delivery)
        return dropped

    def clear(self) -> None:
        """Forget every delivery."""
        self._deliveries.clear()
        self.nonces = self._waiting = self._weight = 0

    def _forget(self, delivery: Delivery) -> None:
        del self._deliveries[delivery.arrival]
        self.nonces -= len(delivery.nonces)
