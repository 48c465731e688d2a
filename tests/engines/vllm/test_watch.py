"""The watch of vLLM's engine, on a clock of the test's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
from vllm_apps import Client

from poc_kernels.engines.vllm import watch
from poc_kernels.engines.vllm.watch import EngineWatch

STALL = 100.0


class Rig:
    """A watch that runs in a loop of its own, and what it watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "_TICK_SECONDS", 0.001)
        monkeypatch.setattr(watch, "_ASK_SECONDS", 0.001)
        self.client = Client()
        self.now, self.asked = 0.0, 0
        self.waiting = False
        self.deaths: list[int] = []
        self.answer: Callable[[], Awaitable[int]] = self.client.count_steps
        self.watch = EngineWatch(
            self.client, self._steps, lambda: self.waiting, self._died, STALL, clock=lambda: self.now
        )

    async def _steps(self) -> int:
        self.asked += 1
        return await self.answer()

    def _died(self) -> None:
        self.deaths.append(threading.get_ident())

    async def some_rounds(self) -> None:
        """Let it look several times, and ask where it still asks."""
        asked = self.asked
        for _ in range(2000):
            if self.asked >= asked + 3:
                return
            await asyncio.sleep(0.001)
        assert self.answer != self.client.count_steps


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def watched(rig: Rig, scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        running = asyncio.create_task(rig.watch.run())
        await rig.some_rounds()
        await scenario()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_an_engine_that_answers_has_no_trouble_however_long_nobody_asks_for_anything(rig: Rig) -> None:
    async def scenario() -> None:
        for _ in range(3):
            rig.now += STALL + 1
            await rig.some_rounds()
            assert rig.watch.trouble() is None

    watched(rig, scenario)


def test_steps_that_stand_still_while_users_wait_are_told(rig: Rig) -> None:
    async def scenario() -> None:
        rig.waiting = True
        await rig.some_rounds()
        rig.now += STALL - 1
        await rig.some_rounds()
        assert rig.watch.trouble() is None
        rig.now += 2
        await rig.some_rounds()
        assert rig.watch.trouble() == "no step of inference for 101 s"
        rig.client.steps += 1
        await rig.some_rounds()
        assert rig.watch.trouble() is None
        rig.now += STALL + 1
        rig.waiting = False  # they are gone, or paused
        await rig.some_rounds()
        assert rig.watch.trouble() is None

    watched(rig, scenario)


def test_an_engine_that_does_not_answer_is_told(rig: Rig) -> None:
    async def silent() -> int:
        await asyncio.Event().wait()
        return 0

    async def scenario() -> None:
        rig.answer = silent
        await asyncio.sleep(0.02)
        rig.now += STALL + 1
        await asyncio.sleep(0.02)
        assert rig.watch.trouble() == "the engine has not answered for 101 s"

    watched(rig, scenario)


def test_an_engine_that_answers_with_errors_has_not_answered(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def failing() -> int:
        raise RuntimeError("secret")

    async def scenario() -> None:
        rig.answer = failing
        await rig.some_rounds()
        rig.now += STALL + 1
        await rig.some_rounds()
        assert rig.watch.trouble() == "the engine has not answered for 101 s"
        rig.answer = rig.client.count_steps
        await rig.some_rounds()
        assert rig.watch.trouble() is None

    watched(rig, scenario)
    assert "did not say how many steps it has computed: RuntimeError" in caplog.text


def test_a_dead_engine_is_told_and_its_death_answered_once_in_a_thread(rig: Rig) -> None:
    async def run() -> None:
        running = asyncio.create_task(rig.watch.run())
        await rig.some_rounds()
        rig.client.errored = True
        await asyncio.wait_for(running, 20)

    asyncio.run(run())
    assert rig.watch.trouble() == "the engine is dead"
    assert len(rig.deaths) == 1
    assert rig.deaths[0] != threading.get_ident()
