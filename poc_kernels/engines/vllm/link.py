"""Calls from the threads of rounds to vLLM's engine, through its client, which lives on the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...protocol.engine import never
from ...scheduling import TurnsClosed
from ...scheduling.slices import Pause
from . import compat
from .messages import METHOD

Result = TypeVar("Result")

_DIED = "vLLM's engine died"
_LOOP_ENDED = "the server's event loop has ended"
_LOOK_SECONDS = 0.1
"""Whoever waits for an answer looks that often whether it may still."""


class EngineLost(TurnsClosed):
    """There is no engine any more: it died, or the server shuts down."""


class EngineError(RuntimeError):
    """The engine answered a call with an error."""


async def unless_lost(client: Any, call: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """Return what ``call`` of the engine gives within so many seconds, on the server's loop.

    Raises:
        EngineLost: the engine died meanwhile: vLLM leaves such a call without an answer.
        TimeoutError: it did not answer in time.
    """
    task = asyncio.ensure_future(call)
    deadline = time.monotonic() + seconds
    try:
        while not (await asyncio.wait([task], timeout=_LOOK_SECONDS))[0]:
            if client.errored:
                raise EngineLost(_DIED)
            if time.monotonic() > deadline:
                raise TimeoutError(f"vLLM's engine did not answer within {seconds:g} s")
        return task.result()
    finally:
        task.cancel()


@dataclass(frozen=True)
class UnderWay(Generic[Result]):
    """A call that was made."""

    future: concurrent.futures.Future[Result]
    deadline: float
    """Of its answer, by time.monotonic()."""


class Link:
    """The engine of a server, as threads see it.

    Args:
        client: vLLM's ``EngineClient``.
        loop: the event loop of the server, where its methods are called.
        answer_seconds: how long an answer may take until the call fails.
    """

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop, answer_seconds: float) -> None:
        self.client = client
        self.lost: str | None = None
        """Why there is no engine any more; None while there is one."""
        self._loop = loop
        self._answer_seconds = answer_seconds
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Let whoever waits for the engine go, with `TurnsClosed`: now and from now on."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `EngineLost` if there is no engine any more, and `TurnsClosed` after `cancel`."""
        if self.lost is None and self.client.errored:  # vLLM leaves calls that were under way without an answer
            self._lose(_DIED)
        if self.lost is not None:
            raise EngineLost(self.lost)
        if self._cancelled.is_set():
            raise TurnsClosed("the device was cancelled")

    def sleep(self, seconds: float) -> None:
        """Wait, at most until `cancel`."""
        self._cancelled.wait(seconds)

    def users(self) -> int:
        """Return how many requests of users are in flight."""
        count: int = self.client.get_num_unfinished_requests()
        return count

    def tell(self, command: str, message: Mapping[str, Any], pause: Pause = never) -> list[dict[str, Any]]:
        """Send a command to all workers and return their answers, by rank: as `call`."""
        return self.call(self.command(command, message), pause)

    def command(self, command: str, message: Mapping[str, Any]) -> Callable[[], Coroutine[Any, Any, Any]]:
        """Return what sends a command to all workers, for `call` and `drop`."""
        return lambda: self.client.collective_rpc(METHOD, args=(command, dict(message)))

    def drop(self, method: Callable[[], Coroutine[Any, Any, Any]], wait_seconds: float = 0.0) -> None:
        """Call a coroutine function on the loop. What becomes of it is not told, and waited for at most so long."""

        async def send() -> None:
            try:
                await method()
            except Exception as error:
                self._translated(error)  # the next call tells of it

        if self.lost is None:
            coroutine = send()
            try:
                sent = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            except RuntimeError:  # the loop is closed
                coroutine.close()
            else:
                concurrent.futures.wait([sent], wait_seconds)

    def call(self, method: Callable[[], Coroutine[Any, Any, Result]], pause: Pause = never) -> Result:
        """Call a coroutine function on the loop; return its result: as `start` and `finish`."""
        return self.finish(self.start(method), pause)

    def start(self, method: Callable[[], Coroutine[Any, Any, Result]]) -> UnderWay[Result]:
        """Call a coroutine function on the loop, without waiting for it.

        Raises:
            EngineLost: the engine died, or the server shuts down.
            TurnsClosed: `cancel` was called.
        """
        self.check()

        async def called() -> Result:
            return await method()

        coroutine = called()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:
            coroutine.close()
            raise self._translated(error) from error
        return UnderWay(future, time.monotonic() + self._answer_seconds)

    def finish(self, under_way: UnderWay[Result], pause: Pause = never) -> Result:
        """Wait for the result of a call.

        Args:
            under_way: what `start` returned.
            pause: called now and then; what it raises ends the waiting and comes through. The call itself goes on.

        Raises:
            EngineLost: the engine died, or the server shuts down.
            TurnsClosed: `cancel` was called.
            EngineError: the engine answered with an error.
            TimeoutError: it did not answer in time.
        """
        future = under_way.future
        while not concurrent.futures.wait([future], _LOOK_SECONDS).done:
            if self._loop.is_closed():
                raise self._lose(_LOOP_ENDED)
            self.check()
            pause()  # may take its time
            if time.monotonic() > under_way.deadline and not future.done():
                raise TimeoutError(f"vLLM's engine did not answer within {self._answer_seconds:g} s")
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise self._lose(_LOOP_ENDED) from error
        except Exception as error:
            raise self._translated(error) from error

    def _lose(self, reason: str) -> EngineLost:
        self.lost = self.lost or reason
        return EngineLost(self.lost)

    def _translated(self, error: Exception) -> Exception:
        """Return what a failed call means."""
        if self._loop.is_closed():
            return self._lose(_LOOP_ENDED)
        if compat.is_engine_dead(error):
            return self._lose(_DIED)
        if compat.is_shutting_down(error):
            return self._lose("vLLM shuts down")
        return EngineError(f"{type(error).__name__}: {error}")
