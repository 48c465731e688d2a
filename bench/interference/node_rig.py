"""What rigs over HTTP share: a server in a process of its own, driven on loopback as users and validators see it."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx2

from bench.interference.load import Condition, DifferenceError, Request
from bench.interference.validation import PROOFS, difference
from poc_kernels.demo.server import ServerProcess
from poc_kernels.protocol import PoCConfig, ProofBatch


class NodeRig:
    """The parts of a `Rig` that do not depend on which server it is.

    Args:
        server: in a session of processes of its own, and ready.
        config: the round that proofs are validated in.
        conditions: those that the server can have without a restart.
    """

    slices = step_waits = slice_waits = None

    def __init__(self, server: ServerProcess, config: PoCConfig, conditions: list[Condition]) -> None:
        self.conditions = conditions
        self.prompts = 0
        self.proofs = PROOFS
        self.expected: list[ProofBatch] = []
        """The batches of proofs, with their distances."""
        self.answers: list[Any] = []
        """The answer to each prompt."""
        self.client: Any = None
        self._server, self.config = server, config
        self._tasks: set[asyncio.Task[None]] = set()
        self._done: list[float] = []

    # ---- what differs ----

    def ask(self, prompt: int) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a streaming request."""
        raise NotImplementedError

    def pieces(self, line: str) -> Sequence[Any]:
        """Return the tokens, or what stands for them, in a server-sent event; an error in it raises a KeyError."""
        raise NotImplementedError

    def joined(self, pieces: list[Any]) -> Any:
        """Return the answer of all pieces."""
        raise NotImplementedError

    # ---- from start to end ----

    async def begin_round(self, timeout_seconds: float) -> None:
        """Begin the round, and have every distance computed alone."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx2.AsyncClient(
            base_url=self._server.url, timeout=timeout_seconds, limits=limits, trust_env=False
        )
        config = self.config
        (await self.client.post("/api/v1/pow/init/validate", json=dataclasses.asdict(config))).raise_for_status()
        for index in range(PROOFS):
            nonces = list(range(index * config.batch_size, (index + 1) * config.batch_size))
            batch = ProofBatch(config.public_key, config.block_hash, config.block_height, nonces, [])
            self.expected.append(dataclasses.replace(batch, dist=(await self._validated(batch))["distances"]))

    async def close(self) -> None:
        """Cancel what is under way, and end the server's processes."""
        for task in self._tasks:
            task.cancel()
        if self.client is not None:
            await self.client.aclose()
        end(self._server)

    # ---- Rig ----

    async def switch(self, condition: Condition) -> None:
        """Do nothing: one node has one pacing."""

    async def counters(self) -> dict[str, float] | None:
        """Return None: nothing is counted."""
        return None

    def begin(self, request: Request, ended: Callable[[Request], None]) -> None:
        self._spawn(self._chat(request, ended))

    def validate(self, proof: int, ended: Callable[[BaseException | None], None]) -> None:
        self._spawn(self._validate(self.expected[proof], ended))

    def nonces_between(self, begin: float, end: float) -> float:
        """Return the nonces done between two times, counted by whole batches."""
        batches = bisect.bisect_left(self._done, end) - bisect.bisect_left(self._done, begin)
        return float(batches * self.config.batch_size)

    def trouble(self) -> str | None:
        if self._server.process.poll() is not None:
            return f"its process ended; the end of its log:\n{self._server.end_of_log()}"
        return None

    def check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.error is not None:
                raise RuntimeError(f"a request failed: {request.error}")
            if request.answer != self.answers[request.prompt]:
                raise DifferenceError(
                    f"an answer to prompt {request.prompt} is {request.answer!r}, "
                    f"alone it is {self.answers[request.prompt]!r}"
                )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _chat(self, request: Request, ended: Callable[[Request], None]) -> None:
        loop = asyncio.get_running_loop()
        path, body = self.ask(request.prompt)
        came: list[tuple[float, str]] = []
        try:
            async with self.client.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    request.error = f"{answer.status_code} {(await answer.aread())[:200]!r}"
                else:
                    async for line in answer.aiter_lines():
                        came.append((loop.time(), line))
            pieces = [(at, piece) for at, line in came if line.startswith("data: {") for piece in self.pieces(line)]
            request.times = [at for at, _ in pieces]
            request.answer = self.joined([piece for _, piece in pieces])
            if request.error is None and not request.times:
                request.error = f"an answer without text: {came[-3:]}"
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            request.error = f"{type(error).__name__}: {error}"
        ended(request)

    async def _validate(self, batch: ProofBatch, ended: Callable[[BaseException | None], None]) -> None:
        try:
            verdict = await self._validated(batch)
        except (httpx2.HTTPError, ValueError) as error:
            ended(RuntimeError(f"a batch of proofs failed: {type(error).__name__}: {error}"))
            return
        if verdict["distances"] != batch.dist:
            ended(difference(batch, verdict["distances"]))
        elif verdict["fraud_detected"]:
            ended(DifferenceError("an honest batch was judged fraud"))
        else:
            self._done.append(asyncio.get_running_loop().time())
            ended(None)

    async def _validated(self, batch: ProofBatch) -> dict[str, Any]:
        answer = await self.client.post("/api/v1/pow/validate", json=batch.to_dict())
        answer.raise_for_status()
        verdict: dict[str, Any] = answer.json()
        return verdict


def ready(server: ServerProcess, seconds: float) -> ServerProcess:
    """Return the server once it is ready.

    Raises:
        ServerFailedError: it ended, or was not ready in time; none of its processes is left.
    """
    try:
        server.wait_ready(seconds)
    except BaseException:
        end(server)
        raise
    return server


def end(server: ServerProcess) -> None:
    """End a server that has a session of processes of its own, and whatever it started."""
    server.stop()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
