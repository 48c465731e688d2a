"""What every act of the demonstration uses: the server and its clients, checks, states, users who chat."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .client import QUESTIONS, Chatter, NodeClient, Progress, chatting
from .plan import Plan
from .receiver import Receiver
from .results import Band, Check, Results, Sample
from .server import ServerProcess
from .show import Show

MIN_P = 1e-6
"""The p-value down to which a check of a distribution passes: an honest node fails once in a million runs."""
CALLBACK_SECONDS = 30.0
"""How long a callback may take to arrive."""
_POLL_SECONDS = 0.25


@dataclass
class Stage:
    """A server, those who call it, and the results that are filled in.

    Every method that calls raises httpx2.HTTPError or ServerFailedError if the server does not answer, or not with
    success.
    """

    plan: Plan
    server: ServerProcess
    node: NodeClient
    receiver: Receiver
    users: list[Chatter]
    results: Results
    show: Show
    clock: Callable[[], float]
    _state: str = field(default="IDLE", init=False)
    _since: float = field(default=0.0, init=False)
    _recomputed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Record and show whether something that should be true is true."""
        check = Check(name, passed, detail)
        self.results.checks.append(check)
        self.show.check(check)

    def enter(self, state: str, reported: str | None = None) -> None:
        """Record that the node is in ``state`` from now on, and check that it reports that, or ``reported``."""
        self.close_band()
        now = self._since
        self._state, self._recomputed = state, 0
        self.results.samples += [Sample(now), Sample(now, 0, 0, 0)]
        expected, status = reported or state, self.node.status()["status"]
        if status != expected:
            self.check(f"the node is {expected}", False, f"it reports {status}")

    def close_band(self) -> None:
        """Record how long the node has been in its state."""
        now = self.clock()
        self.results.bands.append(Band(self._state, self._since, now))
        self._since = now

    @contextlib.contextmanager
    def chats(self, state: str) -> Iterator[None]:
        """Let users chat while the block runs, and check that all of them are served."""
        before = len(self.results.chats)
        with chatting(self.users, state, self.results.chats):
            yield
        chats = self.results.chats[before:]
        failed = [chat for chat in chats if not chat.served]
        detail = f"{len(chats)} streamed to {len(self.users)} users"
        if failed:
            detail += f", {len(failed)} failed: {failed[0].status} {failed[0].error}"
        self.check(f"chats stream while {state}", bool(chats) and not failed, detail)
        if len(failed) < len(chats):
            text = next(chat.text for chat in chats if chat.served)
            self.show.note(f'the model says: "{" ".join(text.split())[:90]}..."')

    def generate_until(self, seconds: float, proofs: int) -> Progress:
        """Poll /status, and try to chat, until the time is over and there are the proofs; return the last progress."""
        began = next_chat = self.clock()
        with self.show.progress() as update:
            while True:
                self.server.check()
                progress, elapsed = Progress.of(self.node.status()), self.clock() - began
                update(progress)
                self.sample(progress)
                if self.clock() >= next_chat:
                    chat = self.users[0].ask(QUESTIONS[0], "GENERATING")
                    self.results.chats.append(chat)
                    if next_chat == began:
                        self.show.note(f"a user gets {chat.status}, Retry-After {chat.retry_after}: {chat.error}")
                    next_chat = self.clock() + max(1.0, seconds / 6)
                if elapsed >= seconds and progress.valid >= proofs:
                    return progress
                if elapsed > self.plan.max_generate_seconds:
                    name = f"{proofs} proofs are found within {self.plan.max_generate_seconds:.0f} s"
                    self.check(name, False, f"{progress.valid} found")
                    return progress
                time.sleep(_POLL_SECONDS)

    def sample(self, progress: Progress) -> None:
        """Record the progress of a round that generates."""
        self.results.samples.append(Sample(self.clock(), progress.checked, progress.valid))

    def recomputed(self, nonces: int) -> None:
        """Record that a validator had so many nonces recomputed."""
        self._recomputed += nonces
        self.results.samples.append(Sample(self.clock(), recomputed=self._recomputed))

    def batches(self, count: int) -> Iterator[range]:
        """Divide ``count`` into batches of a validator; after two of them, end when the plan's time is over."""
        size, deadline = self.plan.batch_nonces, time.monotonic() + self.plan.validate_seconds
        for start in range(0, count, size):
            if start >= 2 * size and time.monotonic() > deadline:
                return
            yield range(start, min(start + size, count))
