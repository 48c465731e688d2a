"""The lines in which callbacks wait: what is posted next, and when. No clock and no network in here."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections import deque
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


@dataclass
class Failure:
    text: str
    refused: bool = False
    """The receiver is there and does not want this body."""
    retry_after: float = 0.0
    """Seconds."""


class Batch:
    """One batch as it arrived. Times are of time.monotonic."""

    arrival: int
    due: float
    refused = False
    """A receiver has said no to it, alone or merged; it is not merged again."""

    def __init__(self, kind: str, content: Mapping[str, Any]) -> None:
        if not isinstance(content, Mapping):
            raise TypeError(f"batch must be a mapping, got {type(content).__name__}")
        self.content: dict[str, Any] = json.loads(canonical_json(dict(content)))  # a copy that is sure to be JSON
        self.common = {name: value for name, value in self.content.items() if name not in _PER_NONCE}
        for name in _PER_NONCE if kind == GENERATED else _PER_NONCE[:1]:
            if not isinstance(self.content.get(name), list):
                raise TypeError(f"batch[{name!r}] must be a list, got {type(self.content.get(name)).__name__}")
        if kind == GENERATED and len(self.content["dist"]) != len(self.nonces):
            raise ValueError(
                f"batch['dist'] must have one entry per nonce, got {len(self.content['dist'])} for {len(self.nonces)}"
            )

    @property
    def nonces(self) -> list[Any]:
        nonces: list[Any] = self.content["nonces"]
        return nonces


def merged(post: list[Batch]) -> dict[str, Any]:
    if len(post) == 1:
        return post[0].content
    joined = {name: [item for batch in post for item in batch.content[name]] for name in _PER_NONCE}
    return {**post[0].content, **joined}


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
        self.label = re.sub("//[^/]*@", "//", url)  # for logs: no password
        self.batches: deque[Batch] = deque()
        self.on_the_way: list[Batch] = []
        self.retry = Backoff(*retry_seconds)
        """Of the destination."""
        self.refusals = Backoff(*retry_seconds)
        """Of the refused batches, one at a time; the others pass them."""
        self.wake = asyncio.Event()

    @property
    def empty(self) -> bool:
        return not self.batches and not self.on_the_way

    def next_post(self, now: float, max_nonces: int, flush: bool) -> tuple[list[Batch], float]:
        """Send these batches on their way; if there are none, look again at this time."""
        if now < self.retry.until:
            return [], self.retry.until
        if self.batches[0].refused and now >= self.refusals.until:
            self.on_the_way = [self.batches[0]]
        else:
            post, complete = self._first_not_refused(max_nonces)
            due = post[0].due if post else math.inf
            if not post or not (complete or flush or now >= due):
                return [], min(due, self.refusals.until) if self.batches[0].refused else due
            self.on_the_way = post
        going = set(self.on_the_way)
        self.batches = deque(batch for batch in self.batches if batch not in going)
        return self.on_the_way, now

    def _first_not_refused(self, max_nonces: int) -> tuple[list[Batch], bool]:
        """The next batches that share a post, and whether no later one could join them."""
        post: list[Batch] = []
        nonces = 0
        for batch in self.batches:
            if batch.refused:
                continue
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
            self.batches.extendleft(reversed(post))
            self.retry.failed(now, failure.retry_after)
            return self.retry.until - now
        self.retry.reset()
        if post[0].refused or now >= self.refusals.until:  # a newcomer does not put off those refused before it
            self.refusals.failed(now)
        for batch in post:
            batch.refused = True
        self.batches.extend(post)
        return self.refusals.until - now

    def fields(self, batches: list[Batch]) -> dict[str, Any]:
        """What a log record says of batches."""
        nonces = [nonce for batch in batches for nonce in batch.nonces]
        return {
            "kind": self.kind,
            "url": self.label,
            "block_hash": ", ".join(sorted({str(batch.content.get("block_hash")) for batch in batches})),
            "batches": len(batches),
            "nonces": len(nonces),
            "first_nonce": nonces[0] if nonces else None,
            "last_nonce": nonces[-1] if nonces else None,
        }
