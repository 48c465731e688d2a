"""Whether vLLM's engine makes progress: vLLM's own /health says 200 while its steps hang."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ...scheduling import AwakeClock

logger = logging.getLogger("poc_kernels")

_TICK_SECONDS = 0.5  # also keeps the clock awake
_ASK_SECONDS = 5.0


class EngineWatch:
    """Asks the engine for its steps now and then.

    Args:
        client: vLLM's EngineClient.
        steps: asks the workers for the number of steps that they have computed.
        expected: whether users wait for a step.
        died: called, in a thread, when the engine is dead.
        stall_seconds: seconds without an answer, or without a step while users wait, until that is a trouble.
        clock: counts them.
    """

    def __init__(
        self,
        client: Any,
        steps: Callable[[], Awaitable[int]],
        expected: Callable[[], bool],
        died: Callable[[], None],
        stall_seconds: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._client, self._steps, self._expected, self._died = client, steps, expected, died
        self._stall_seconds = stall_seconds
        self._now = clock or AwakeClock().now
        self._answered = self._stepped = self._now()
        self._count = -1

    def trouble(self) -> str | None:
        """Return why the engine makes no progress; None if it does, or has nothing to do."""
        if self._client.errored:
            return "the engine is dead"
        now = self._now()
        if now - self._answered > self._stall_seconds:
            return f"the engine has not answered for {now - self._answered:.0f} s"
        if now - self._stepped > self._stall_seconds:
            return f"no step of inference for {now - self._stepped:.0f} s"
        return None

    async def run(self) -> None:
        """Watch until cancelled, or until the engine is dead."""
        asking = asyncio.ensure_future(self._ask())
        try:
            while not self._client.errored:
                self._now()
                if not self._expected():
                    self._stepped = self._now()
                if asking.done():
                    asking = asyncio.ensure_future(self._ask_later())
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            asking.cancel()
        await asyncio.to_thread(self._died)

    async def _ask_later(self) -> None:
        await asyncio.sleep(min(_ASK_SECONDS, self._stall_seconds / 4))
        await self._ask()

    async def _ask(self) -> None:
        """Note that the engine answers, and whether it computed steps since it was last asked."""
        try:
            count = await self._steps()
        except Exception as error:  # `trouble` tells of it when there is no answer for long
            logger.warning("the engine did not say how many steps it has computed: %s", type(error).__name__)
            return
        self._answered = self._now()
        if count != self._count:
            self._count, self._stepped = count, self._answered
