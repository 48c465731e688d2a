"""The lines in which callbacks wait: what is posted next, when, and what is given up. No clock, no network in here."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENERATED = "generated"
VALIDATED = "validated"

_PER_NONCE = ("nonces", "dist")


def canonical_json(obj: object) -> bytes:
    """The body of a callback: JSON with sorted keys and compact separators, in UTF-8.

    Parsing these bytes and calling this on the result gives the same bytes.

    Raises:
        TypeError, ValueError: obj is not JSON.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()


def printable(text: str) -> str:
    """text with what is not printable escaped: in a log it stays on its line."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@dataclass
class Failure:
    cause: str
    """The status of the answer, or the class of the error: nothing that the receiver can write."""
    details: str = ""
    """What the receiver or the error says; for logs."""
    refused: bool = False
    """The receiver is there and does not want this body."""
    retry_after: float = 0.0
    """Seconds."""

    @property
    def text(self) -> str:
        """For logs, in one line."""
        return printable(f"{self.cause}: {self.details}" if self.details else self.cause)


class Batch:
    """One batch as it arrived. Times are of time.monotonic."""

    __slots__ = ("arrival", "behind", "common", "due", "per_nonce", "refused", "waiting")

    def __init__(self, kind: str, content: Mapping[str, Any]) -> None:
        if not isinstance(content, Mapping):
            raise TypeError(f"batch must be a mapping, got {type(content).__name__}")
        copy: dict[str, Any] = json.loads(canonical_json(dict(content)))  # that is sure to be JSON
        self.per_nonce = {name: copy.pop(name) for name in _PER_NONCE if name in copy}
        self.common = copy
        for name in _PER_NONCE if kind == GENERATED else _PER_NONCE[:1]:
            if not isinstance(self.per_nonce.get(name), list):
                raise TypeError(f"batch[{name!r}] must be a list, got {type(self.per_nonce.get(name)).__name__}")
        if kind == GENERATED and len(self.per_nonce["dist"]) != len(self.nonces):
            raise ValueError(
                f"batch['dist'] must have one entry per nonce, got {len(self.per_nonce['dist'])} for {len(self.nonces)}"
            )
        self.arrival = 0
        self.due = 0.0
        self.waiting = True
        """Not on its way."""
        self.refused = False
        """A receiver has said no to it, alone or merged; it is not merged again."""
        self.behind = -1
        """Of a refused batch: the arrival of the last batch that goes before it."""

    @property
    def content(self) -> dict[str, Any]:
        return {**self.common, **self.per_nonce}

    @property
    def nonces(self) -> list[Any]:
        nonces: list[Any] = self.per_nonce["nonces"]
        return nonces

    @property
    def weight(self) -> int:
        """Nonces that it counts as: without any it takes memory, too."""
        return max(1, len(self.nonces))


def merged(post: list[Batch]) -> dict[str, Any]:
    if len(post) == 1:
        return post[0].content
    joined = {name: [item for batch in post for item in batch.per_nonce[name]] for name in _PER_NONCE}
    return {**post[0].common, **joined}


class Backoff:
    """When to try again: doubling waits, with a little jitter so that senders do not come all at once."""

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self.reset()

    def reset(self) -> None:
        self._seconds = 0.0
        self.until = 0.0

    def failed(self, now: float, at_least: float = 0.0) -> None:
        self._seconds = min(self._longest, 2 * self._seconds or self._first)
        wait = self._seconds * random.uniform(0.75, 1.0)
        self.until = now + max(wait, min(at_least, self._longest))


class Line:
    """The batches for one destination, in the order in which they are to be tried.

    Args:
        kind: "generated" or "validated".
        url: where they are posted to, whole.
        retry_seconds: first and longest wait of a `Backoff`.
    """

    def __init__(self, kind: str, url: str, retry_seconds: tuple[float, float]) -> None:
        self.kind = kind
        self.url = url
        self.label = printable(re.sub("//[^/]*@", "//", url))  # for logs: no password
        self.batches: deque[Batch] = deque()
        """By arrival, those not refused."""
        self.refused: OrderedDict[int, Batch] = OrderedDict()
        """By arrival as key, in the order in which they are to be tried again."""
        self.on_the_way: list[Batch] = []
        self.retry = Backoff(*retry_seconds)
        """Of the destination."""
        self.refusals = Backoff(*retry_seconds)
        """Of the refused batches, one at a time; the others pass them."""
        self.wake = asyncio.Event()

    @property
    def empty(self) -> bool:
        return not self.batches and not self.refused and not self.on_the_way

    @property
    def all(self) -> list[Batch]:
        return [*self.on_the_way, *self.batches, *self.refused.values()]

    def add(self, batch: Batch) -> None:
        """To the end of the line."""
        if self.batches and self.batches[-1].common == batch.common:
            batch.common = self.batches[-1].common  # held once
        self.batches.append(batch)

    def drop(self, batch: Batch) -> None:
        """Take out a batch that waits; of those not refused, the oldest."""
        if batch.refused:
            del self.refused[batch.arrival]
        else:
            self.batches.popleft()

    def next_post(self, now: float, max_nonces: int, flush: bool) -> tuple[list[Batch], float]:
        """Send these batches on their way; if there are none, look again at this time."""
        if now < self.retry.until:
            return [], self.retry.until
        refused = next(iter(self.refused.values()), None)
        if refused is not None and self.batches and self.batches[0].arrival <= refused.behind:
            refused = None  # not its turn yet
        if refused is not None and now >= self.refusals.until:
            del self.refused[refused.arrival]
            self.on_the_way = [refused]
        else:
            post, complete = self._first_not_refused(max_nonces)
            due = post[0].due if post else math.inf
            if not post or not (complete or flush or now >= due):
                return [], due if refused is None else min(due, self.refusals.until)
            for _ in post:
                self.batches.popleft()
            self.on_the_way = post
        return self.on_the_way, now

    def _first_not_refused(self, max_nonces: int) -> tuple[list[Batch], bool]:
        """The next batches that share a post, and whether no later one could join them."""
        post: list[Batch] = []
        nonces = 0
        for batch in self.batches:
            fits = nonces + len(batch.nonces) <= max_nonces and self.kind == GENERATED
            if post and not (fits and batch.common == post[0].common):
                return post, True
            post.append(batch)
            nonces += len(batch.nonces)
        return post, nonces >= max_nonces

    def taken(self, post: list[Batch]) -> None:
        self.retry.reset()
        if post[0].refused:
            self.refusals.reset()

    def put_back(self, post: list[Batch], failure: Failure, now: float) -> float:
        """To the front of the line, or to its back if the body was refused; gives the seconds until the next try."""
        if not failure.refused:
            if post[0].refused:  # alone, and still its turn
                self.refused[post[0].arrival] = post[0]
                self.refused.move_to_end(post[0].arrival, last=False)
            else:
                self.batches.extendleft(reversed(post))
            self.retry.failed(now, failure.retry_after)
            return self.retry.until - now
        self.retry.reset()
        if post[0].refused or now >= self.refusals.until:  # a newcomer does not put off those refused before it
            self.refusals.failed(now)
        for batch in post:
            batch.refused = True
            batch.behind = self.batches[-1].arrival if self.batches else -1
            self.refused[batch.arrival] = batch
        return self.refusals.until - now

    def fields(self, batches: list[Batch]) -> dict[str, Any]:
        """What a log record says of batches."""
        nonces = [nonce for batch in batches for nonce in batch.nonces]
        return {
            "kind": self.kind,
            "url": self.label,
            "block_hash": printable(", ".join(sorted({str(batch.common.get("block_hash")) for batch in batches}))),
            "batches": len(batches),
            "nonces": len(nonces),
            "first_nonce": nonces[0] if nonces else None,
            "last_nonce": nonces[-1] if nonces else None,
        }


class Backlog:
    """The batches of all lines by age, and the bound on those that wait.

    A batch weighs its nonces, at least one. How long a call takes grows with the batches that it moves and with those
    on their way, not with those that are kept.

    Args:
        max_nonces: the most that waiting batches may weigh, but for the last of them.
    """

    def __init__(self, max_nonces: int) -> None:
        self.nonces = 0
        """Of all batches."""
        self._max_nonces = max_nonces
        self._batches: OrderedDict[int, tuple[Line, Batch]] = OrderedDict()  # by arrival, also those on their way
        self._waiting = self._weight = 0  # batches that wait, and their weight

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, line: Line, batch: Batch) -> None:
        """The newest batch has joined line. Arrivals increase."""
        self._batches[batch.arrival] = (line, batch)
        self.nonces += len(batch.nonces)
        self._wait([batch])

    def sent(self, post: list[Batch]) -> None:
        """These go on their way."""
        self._waiting -= len(post)
        self._weight -= sum(batch.weight for batch in post)
        for batch in post:
            batch.waiting = False

    def put_back(self, post: list[Batch]) -> None:
        """These are back in their line."""
        self._wait(post)

    def taken(self, post: list[Batch]) -> None:
        """These were on their way and have arrived."""
        for batch in post:
            self._forget(batch)

    def drop_excess(self) -> dict[Line, list[Batch]]:
        """Take the oldest waiting batches out of their lines until the others keep to the bound, or one is left."""
        excess, most = self._weight - self._max_nonces, self._waiting - 1
        oldest: list[tuple[Line, Batch]] = []
        for line, batch in self._batches.values():
            if excess <= 0 or len(oldest) >= most:
                break
            if batch.waiting:
                oldest.append((line, batch))
                excess -= batch.weight
        self.sent([batch for _, batch in oldest])
        dropped: dict[Line, list[Batch]] = {}
        for line, batch in oldest:
            line.drop(batch)
            self._forget(batch)
            dropped.setdefault(line, []).append(batch)
        return dropped

    def clear(self) -> None:
        self._batches.clear()
        self.nonces = self._waiting = self._weight = 0

    def _wait(self, batches: list[Batch]) -> None:
        self._waiting += len(batches)
        self._weight += sum(batch.weight for batch in batches)
        for batch in batches:
            batch.waiting = True

    def _forget(self, batch: Batch) -> None:
        del self._batches[batch.arrival]
        self.nonces -= len(batch.nonces)
