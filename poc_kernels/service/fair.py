"""Threads in which clients take turns."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class FairThreads:
    """Runs calls in threads of its own.

    Clients that have calls waiting take turns, whatever they have waiting; a client's own are run as they came.

    Args:
        name: of the threads.
        count: how many there are: so many calls run at once.
    """

    def __init__(self, name: str, count: int = 1) -> None:
        self._threads = ThreadPoolExecutor(count, name)
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[_Call]] = OrderedDict()
        """By client; the one whose turn is next comes first."""

    def submit(self, client: str, function: Callable[[], _Result]) -> Future[_Result]:
        """Have a function called, and return the future of what it returns."""
        call = _Call(function)
        with self._lock:
            self._waiting.setdefault(client, deque()).append(call)
        self._threads.submit(self._run_next)
        return call.future

    def _run_next(self) -> None:
        self._next().run()

    def _next(self) -> _Call:
        with self._lock:
            client, calls = self._waiting.popitem(last=False)
            if len(calls) > 1:
                self._waiting[client] = calls  # behind the others
            return calls.popleft()


class _Call:
    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:
            self.future.set_exception(error)
            del self  # or the error, whose traceback has this frame, would keep itself, and all that the call has
        else:
            self.future.set_result(result)
