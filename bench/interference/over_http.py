"""The node of this package in a process of its own, over HTTP."""

from __future__ import annotations

import importlib.resources
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.interference.chat import EXACT_MARGIN, Margins, Served
from bench.interference.load import Condition, ask_alone
from bench.interference.node_rig import NodeRig, ready
from bench.interference.validation import difference, distances_alone, round_config
from poc_kernels.demo.server import HOST, ServerProcess, free_port, with_this_package

_SERVE = """
import json, sys
from poc_kernels.node.logs import configure
from poc_kernels.node.server import serve
from poc_kernels.node.settings import Settings
configure("warning", "text")
serve(Settings(**json.loads(sys.argv[1])))
"""


class HttpRig(NodeRig):
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
        self._served, self._device, self._directory = served, device, directory
        self._new_tokens = new_tokens
        self._questions = _questions(prompt_count, prompt_words, seed)
        port = free_port()
        wanted = {
            "model": str(directory),
            "device": device,
            "dtype": "float32",
            "temperature": 0.0,
            "host": HOST,
            "port": port,
            "random_projection": projection,
        }
        server = ServerProcess.started(
            [sys.executable, "-c", _SERVE, json.dumps(wanted)],
            {**with_this_package(), "HF_HUB_OFFLINE": "1"},
            port,
            directory / "node.log",
        )
        super().__init__(ready(server, ready_seconds), round_config(served.case, projection), conditions)

    async def start(self, timeout_seconds: float) -> None:
        """Begin the round, and have every distance and every answer computed alone.

        Raises:
            DifferenceError: on a CPU, a distance is not that of an engine in this process.
        """
        await self.begin_round(timeout_seconds)
        if self._device == "cpu":
            for here, there in zip(distances_alone(self._served.model, self.config), self.expected, strict=True):
                if here.dist != there.dist:
                    raise difference(here, there.dist)
        every, self._questions = self._untied(self._questions), []
        for question in every:
            self._questions.append(question)
            self.answers.append((await ask_alone(self, len(self._questions) - 1, timeout_seconds)).answer)
        self.prompts = len(self.answers)

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

    # ---- NodeRig ----

    def ask(self, prompt: int) -> tuple[str, dict[str, Any]]:
        messages = [{"role": "user", "content": self._questions[prompt]}]
        return "/v1/chat/completions", {"messages": messages, "max_tokens": self._new_tokens, "stream": True}

    def pieces(self, line: str) -> list[str]:
        choices = json.loads(line.removeprefix("data: "))["choices"]
        text = choices[0]["delta"].get("content") if choices else None
        return [text] if text else []

    def joined(self, pieces: list[str]) -> str:
        return "".join(pieces)


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
