"""Threads in which clients take turns."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from poc_kernels.service.fair import FairThreads

TIMEOUT = 60


@pytest.fixture
def thread() -> FairThreads:
    return FairThreads("fair")


@pytest.fixture
def busy(thread: FairThreads) -> Iterator[threading.Event]:
    """The thread has a call until the event is set."""
    free = threading.Event()
    thread.submit("first", free.wait)
    yield free
    free.set()


def test_clients_take_turns(thread: FairThreads, busy: threading.Event) -> None:
    ran: list[str] = []
    calls = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]
    futures = [thread.submit(client, lambda name=name: ran.append(name)) for client, name in calls]
    busy.set()
    for future in futures:
        future.result(TIMEOUT)
    assert ran == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_errors_are_the_caller_s(thread: FairThreads) -> None:
    def failing() -> None:
        raise ValueError("no")

    assert isinstance(thread.submit("a", failing).exception(TIMEOUT), ValueError)
    assert thread.submit("a", lambda: 1).result(TIMEOUT) == 1


def test_what_failed_is_not_kept(thread: FairThreads) -> None:
    class Body:
        pass

    def failing(body: Body) -> None:
        raise ValueError("no")

    body = Body()
    kept = weakref.ref(body)
    gc.disable()  # a circle would keep it until the next collection
    try:
        future = thread.submit("a", lambda body=body: failing(body))
        del body
        future.exception(TIMEOUT)
        thread.submit("a", int).result(TIMEOUT)
        del future
        assert kept() is None
    finally:
        gc.enable()


def test_a_call_that_was_cancelled_is_not_made(thread: FairThreads, busy: threading.Event) -> None:
    ran: list[int] = []
    assert thread.submit("a", lambda: ran.append(1)).cancel()
    last = thread.submit("a", lambda: ran.append(2))
    busy.set()
    last.result(TIMEOUT)
    assert ran == [2]


def test_as_many_calls_run_at_once_as_there_are_threads() -> None:
    threads, meeting = FairThreads("fair", 3), threading.Barrier(3)
    ran = [threads.submit(client, lambda: meeting.wait(TIMEOUT)) for client in ("a", "a", "b")]
    assert sorted(each.result(TIMEOUT) for each in ran) == [0, 1, 2]
