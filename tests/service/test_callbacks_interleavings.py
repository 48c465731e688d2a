"""Callbacks in every order in which threads that submit, a thread that closes and the thread that posts can run."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from interleaving import Instruments, World, explore
from scenarios import LONG, THOROUGH, Record

from poc_kernels.service import callbacks as callbacks_module
from poc_kernels.service import outbox as outbox_module
from poc_kernels.service.callbacks import CallbackSender
from poc_kernels.service.outbox import GENERATED

Answer = Callable[[int, list[int]], int]
"""The status for a receiver's post with this number, counted from 0, and these nonces."""


class _Jitterless:
    """In place of `random`: the same in every run."""

    @staticmethod
    def uniform(_: float, high: float) -> float:
        return high


async def _no_text() -> AsyncIterator[bytes]:
    yield b""


class Receiver:
    """Answers posts after a second, and keeps what it accepted."""

    def __init__(self, answer: Answer) -> None:
        self.taken: list[list[int]] = []
        self._answer = answer
        self.posts = 0

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        nonces = json.loads(request.content)["nonces"]
        status = self._answer(self.posts, nonces)
        self.posts += 1
        await asyncio.sleep(1.0)
        if status == 200:
            self.taken.append(nonces)
        return httpx2.Response(status, content=_no_text())


class Told:
    """An observer that adds up, by kind."""

    def __init__(self) -> None:
        self.delivered_nonces: Counter[str] = Counter()
        self.dropped_nonces: Counter[str] = Counter()
        self.failures = 0

    def delivered(self, kind: str, nonces: int) -> None:
        self.delivered_nonces[kind] += nonces

    def failed(self, kind: str) -> None:
        self.failures += 1

    def dropped(self, kind: str, nonces: int, reason: str) -> None:
        self.dropped_nonces[kind] += nonces


@pytest.fixture
def posting(instruments: Instruments, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CallbackSender]:
    """Make a sender of stand-ins that posts to a receiver."""
    instruments.patch(monkeypatch, callbacks_module)
    monkeypatch.setattr(callbacks_module.asyncio, "new_event_loop", instruments.EventLoop)
    monkeypatch.setattr(outbox_module, "random", _Jitterless)

    def make(world: World, receiver: Receiver, told: Told, **options: Any) -> CallbackSender:
        with monkeypatch.context() as patch:
            patch.setattr(callbacks_module, "CheckedTransport", lambda *_: httpx2.MockTransport(receiver))
            sender = CallbackSender(observer=told, **{"max_nonces": 10, "flush_seconds": 2.0, **options})

        def bounded() -> None:
            if not sender._lock.locked():
                outbox = sender._outbox
                assert outbox._weight <= outbox._max_nonces or outbox._waiting == 1
                kept = [each for destination in sender._destinations.values() for each in destination.all]
                assert outbox.nonces == sum(len(each.nonces) for each in kept)

        world.observe = bounded
        return sender

    return make


def generated(sender: CallbackSender, url: str, nonce: int) -> None:
    sender.generated(url, {"nonces": [nonce], "dist": [float(nonce)]}, per_nonce=("nonces", "dist"))


def _up(_: int, __: list[int]) -> int:
    return 200


def _down_at_first(post: int, _: list[int]) -> int:
    return 503 if post == 0 else 200


def _refuses_a_merged_one(_: int, nonces: list[int]) -> int:
    return 400 if len(nonces) > 1 else 200


RECEIVERS = [_up, _down_at_first, _refuses_a_merged_one]
PREEMPTIONS = 3 if THOROUGH else 2
"""Destinations' tasks read without a lock whether the sender is closed: no order is skipped as equal to another."""


@pytest.mark.parametrize("answer", RECEIVERS, ids=lambda answer: answer.__name__.strip("_"))
def test_what_is_submitted_while_the_sender_starts_and_closes(
    instruments: Instruments,
    posting: Callable[..., CallbackSender],
    record_property: Record,
    answer: Answer,
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        receiver, told = Receiver(answer), Told()
        sender = posting(world, receiver, told, flush_seconds=LONG)
        generated(sender, "http://chain", 0)

        def submit() -> None:
            generated(sender, "http://chain", 1)
            world.sleep(1.0)  # when a post is answered, perhaps the last before the end
            generated(sender, "http://chain", 2)

        def start_and_close() -> None:
            sender.start()
            sender.close(LONG)

        world.spawn("submit", submit)
        world.spawn("control", start_and_close)

        def check() -> None:
            taken = [nonce for nonces in receiver.taken for nonce in nonces]
            assert len(set(taken)) == len(taken), "sent twice"
            assert set(taken) in ({0}, {0, 1}, {0, 1, 2}), "only what arrived after the end is not sent"
            if answer is not _refuses_a_merged_one:
                assert taken == sorted(taken)
            assert told.delivered_nonces[GENERATED] == len(taken)
            assert told.dropped_nonces[GENERATED] == 3 - len(taken)
            status = sender.status()
            assert (status["delivered_batches"], status["dropped_batches"]) == (len(taken), 3 - len(taken))
            assert status["failed_attempts"] == told.failures
            assert (status["pending_batches"], status["pending_nonces"]) == (0, 0)
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    record_property("interleavings", explore(instruments, scenario, max_preemptions=PREEMPTIONS))


def test_a_post_that_is_answered_when_the_time_to_close_is_over(
    instruments: Instruments, posting: Callable[..., CallbackSender], record_property: Record
) -> None:
    outcomes = set()

    def scenario(world: World) -> Callable[[], None]:
        receiver, told = Receiver(_up), Told()
        sender = posting(world, receiver, told, flush_seconds=LONG)
        generated(sender, "http://chain", 0)

        def start_and_close() -> None:
            sender.start()
            sender.close(1.0)

        world.spawn("control", start_and_close)

        def check() -> None:
            assert receiver.posts == 1, "what waited to be merged is sent at once"
            outcomes.add((told.delivered_nonces[GENERATED], told.dropped_nonces[GENERATED]))
            status = sender.status()
            assert (status["delivered_batches"], status["dropped_batches"]) in ((1, 0), (0, 1))
            assert (status["delivered_batches"], status["dropped_batches"]) in outcomes

        return check

    record_property("interleavings", explore(instruments, scenario, max_preemptions=PREEMPTIONS))
    assert outcomes == {(1, 0), (0, 1)}, "taken or dropped, told once"


def test_two_submitters_to_two_receivers_of_which_one_is_dead(
    instruments: Instruments, posting: Callable[..., CallbackSender], record_property: Record
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        receiver, told = Receiver(lambda _, nonces: 503 if nonces[0] >= 100 else 200), Told()
        sender = posting(world, receiver, told)
        sender.start()

        def submit() -> None:
            generated(sender, "http://alive", 0)
            generated(sender, "http://alive", 1)

        def close() -> None:
            submitter.join()
            other.join()
            sender.close(5.0)

        submitter = world.spawn("submit", submit)
        other = world.spawn("submit to the dead", lambda: generated(sender, "http://dead", 100))
        world.spawn("close", close)

        def check() -> None:
            assert [nonce for nonces in receiver.taken for nonce in nonces] == [0, 1]
            assert (told.delivered_nonces[GENERATED], told.dropped_nonces[GENERATED]) == (2, 1)
            assert (sender.pending(), sender.pending_nonces()) == (0, 0)

        return check

    record_property("interleavings", explore(instruments, scenario, max_preemptions=PREEMPTIONS))


def test_the_oldest_make_room_while_the_receiver_is_down(
    instruments: Instruments, posting: Callable[..., CallbackSender], record_property: Record
) -> None:
    def scenario(world: World) -> Callable[[], None]:
        receiver, told = Receiver(_down_at_first), Told()
        sender = posting(world, receiver, told, max_nonces=2, flush_seconds=0.0)
        sender.start()

        def submit() -> None:
            for nonce in range(4):
                generated(sender, "http://chain", nonce)

        def close() -> None:
            submitter.join()
            sender.close(LONG)

        submitter = world.spawn("submit", submit)
        world.spawn("close", close)

        def check() -> None:
            taken = [nonce for nonces in receiver.taken for nonce in nonces]
            assert taken == sorted(set(taken))
            assert taken[-2:] == [2, 3], "the newest are kept"
            assert told.delivered_nonces[GENERATED] == len(taken)
            assert told.dropped_nonces[GENERATED] == 4 - len(taken)
            assert told.failures == 1
            assert world.now < LONG, "somebody slept until a deadline: a wake-up is missing"

        return check

    record_property("interleavings", explore(instruments, scenario, max_preemptions=PREEMPTIONS))
