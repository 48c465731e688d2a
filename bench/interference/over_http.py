"""The real node in a process of its own, driven over HTTP on loopback, as its users and validators see it."""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import importlib.resources
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoTokenizer

import poc_kernels
from bench.interference.chat import EXACT_MARGIN, Margins, Served
from bench.interference.load import Condition, DifferenceError, Request, ask_alone
from bench.interference.validation import PROOFS, difference, distances_alone, round_config
from poc_kernels.demo.server import HOST, ServerProcess, free_port
from poc_kernels.protocol import ProofBatch

_SERVE = """
import json, sys
from poc_kernels.node.logs import configure
from poc_kernels.node.server import serve
from poc_kernels.node.settings import Settings
configure("warning", "text")
serve(Settings(**json.loads(sys.argv[1])))
"""


class HttpRig:
    """A `Rig` whose node has the default settings, except that its answers are greedy.

    Args:
        directory: of the model; the log is written there too.
        served: the same model in this process.
        device: where the node computes.
        conditions: those that one node can have without a restart.
        new_tokens, prompt_words, prompt_count, seed: of requests.
        projection: whether the round uses the random projection.
        ready_seconds: how long the node may take to start.

    Raises:
        ServerFailedError: the node does not start.
    """

    def __init__(
        self,
        directory: Path,
        served: Served,
        *,
        device: str,
        conditions: list[Condition],
        new_tokens: int,
        prompt_words: int,
        prompt_count: int,
        projection: bool,
        seed: int,
        ready_seconds: float,
    ) -> None:
        self.conditions = conditions
        self._served, self._device, self._directory = served, device, directory
        self._config = round_config(served.case, projection)
        self._new_tokens = new_tokens
        self._questions = _questions(prompt_count, prompt_words, seed)
        self._answers: list[str] = []
        self._expected: list[ProofBatch] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: str | None = None
        self._client: Any = None
        self.prompts = 0
        self.proofs = PROOFS
        self._done: list[float] = []
        self.slices = self.step_waits = self.slice_waits = None
        port, log = free_port(), directory / "node.log"
        wanted = {
            "model": str(directory),
            "device": device,
            "dtype": "float32",
            "temperature": 0.0,
            "host": HOST,
            "port": port,
            "random_projection": projection,
        }
        package = str(Path(poc_kernels.__file__).parents[1])  # the one that this process measures with
        search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, json.dumps(wanted)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        self._server = ServerProcess(process, f"http://{HOST}:{port}", log)
        try:
            self._server.wait_ready(ready_seconds)
        except BaseException:
            self._server.stop()
            raise

    async def start(self, timeout_seconds: float) -> None:
        """Begin the round, and have every distance and every answer computed alone.

        Raises:
            DifferenceError: on a CPU, a distance is not that of an engine in this process.
        """
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(
            base_url=self._server.url, timeout=timeout_seconds, limits=limits, trust_env=False
        )
        config = self._config
        (await self._client.post("/api/v1/pow/init/validate", json=dataclasses.asdict(config))).raise_for_status()
        for index in range(PROOFS):
            nonces = list(range(index * config.batch_size, (index + 1) * config.batch_size))
            batch = ProofBatch(config.public_key, config.block_hash, config.block_height, nonces, [])
            self._expected.append(dataclasses.replace(batch, dist=(await self._validated(batch))["distances"]))
        if self._device == "cpu":
            for here, there in zip(distances_alone(self._served.model, config), self._expected, strict=True):
                if here.dist != there.dist:
                    raise difference(here, there.dist)
        every, self._questions = self._untied(self._questions), []
        for question in every:
            self._questions.append(question)
            self._answers.append((await ask_alone(self, len(self._questions) - 1, timeout_seconds)).answer)
        self.prompts = len(self._answers)

    def _untied(self, questions: list[str]) -> list[str]:
        """Return those whose answer has no token near a tie, by the model in this process."""
        model, tokenizer = self._served.model, AutoTokenizer.from_pretrained(self._directory)
        margins, chosen = Margins(model), []
        for question in questions:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([prompt])
            text = model.generate(ids, attention_mask=torch.ones_like(ids), **_greedy(self._new_tokens))[0]
            if margins.lead(prompt, text[len(prompt) :].tolist()) >= EXACT_MARGIN:
                chosen.append(question)
        if not chosen:
            raise RuntimeError(f"prompts must have an answer without near ties, none of {len(questions)} has")
        return chosen

    async def close(self) -> None:
        """Cancel what is under way, and end the node's process."""
        for task in self._tasks:
            task.cancel()
        if self._client is not None:
            await self._client.aclose()
        self._server.stop()

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the node."""
        return {
            "prompts": self.prompts,
            "parts_per_batch": 1,
            "planned_slices": None,
            "answers_exact": True,
            "answers_near_ties": 0,
            "least_lead": EXACT_MARGIN,
        }

    # ---- Rig ----

    def switch(self, condition: Condition) -> None:
        """Do nothing: one node has one pacing."""

    def begin(self, request: Request, ended: Callable[[Request], None]) -> None:
        self._spawn(self._chat(request, ended))

    def validate(self, proof: int, ended: Callable[[BaseException | None], None]) -> None:
        self._spawn(self._validate(self._expected[proof], ended))

    def nonces_between(self, begin: float, end: float) -> float:
        """Return the nonces done between two times, counted by whole batches."""
        batches = bisect.bisect_left(self._done, end) - bisect.bisect_left(self._done, begin)
        return float(batches * self._served.case.batch_size)

    def trouble(self) -> str | None:
        if self._server.process.poll() is not None:
            return f"its process ended; the end of its log:\n{self._server.end_of_log()}"
        return self._failure

    def check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.error is not None:
                raise RuntimeError(f"a request failed: {request.error}")
            if request.answer != self._answers[request.prompt]:
                raise DifferenceError(
                    f"an answer to prompt {request.prompt} is {request.answer!r}, "
                    f"alone it is {self._answers[request.prompt]!r}"
                )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _chat(self, request: Request, ended: Callable[[Request], None]) -> None:
        loop = asyncio.get_running_loop()
        body = {
            "messages": [{"role": "user", "content": self._questions[request.prompt]}],
            "max_tokens": self._new_tokens,
            "stream": True,
        }
        came: list[tuple[float, str]] = []
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    request.error = f"{answer.status_code} {(await answer.aread())[:200]!r}"
                else:
                    async for line in answer.aiter_lines():
                        came.append((loop.time(), line))
            pieces = [(at, _piece(line)) for at, line in came if line.startswith("data: {")]
            request.times = [at for at, piece in pieces if piece]
            request.answer = "".join(piece for _, piece in pieces)
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
        answer = await self._client.post("/api/v1/pow/validate", json=batch.to_dict())
        answer.raise_for_status()
        verdict: dict[str, Any] = answer.json()
        return verdict


def _piece(line: str) -> str:
    """Return the text in a server-sent event of a chat; an error in it raises a KeyError."""
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""


def _greedy(new_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }


def _questions(count: int, words: int, seed: int) -> list[str]:
    """Draw passages of the demonstration's prose, of half to one and a half times ``words`` words."""
    prose = importlib.resources.files("poc_kernels.demo").joinpath("prose.txt").read_text(encoding="utf-8").split()
    generator = random.Random(seed)
    chosen = []
    for _ in range(count):
        length = generator.randint(max(1, words // 2), 3 * words // 2)
        start = generator.randrange(max(1, len(prose) - length))
        chosen.append(" ".join(prose[start : start + length]))
    return chosen
