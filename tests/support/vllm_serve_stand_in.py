"""Stands in for `vllm serve` with rounds and the suite's plugin: the same routes, on transformers, one call at a time.

Words behind the options say what goes wrong once a second condition is measured: distance, token.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM

from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.protocol import DistanceProver, PoCConfig, PoCManager, PoCState, ProofBatch

TOKEN_SECONDS = 0.005
COUNTERS = (
    *("steps", "steps_followed", "tokens", "step_seconds", "slices", "slice_seconds", "slices_between_steps"),
    *("seconds_between_steps", "mean_step_seconds"),
)


class Server:
    """The model and the round that are served."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.manager = PoCManager(DistanceProver(TransformersEngine(self.model, cuda_graphs=False)))
        self.counters = dict.fromkeys(COUNTERS, 0.0)
        self.conditions: list = []
        self.answers: dict[tuple[int, ...], list[int]] = {}

    def wrong(self, what: str) -> bool:
        """Whether ``what`` goes wrong now."""
        return len(self.conditions) > 1 and what in sys.argv

    def answer(self, prompt: list[int], count: int) -> list[int]:
        began = time.perf_counter()
        key = (*prompt, count)
        if key not in self.answers:
            self.answers[key] = self.generate(prompt, count)
        self.counters["steps"] += count
        self.counters["steps_followed"] += count - 1
        self.counters["tokens"] += len(prompt) + count
        self.counters["step_seconds"] += time.perf_counter() - began
        return list(self.answers[key])

    def generate(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "eos_token_id": -1}
        with torch.inference_mode():
            text = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **greedy)[0]
        return text[len(prompt) :].tolist()


def app_of(server: Server) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health():
        return {}

    @app.post("/bench/condition")
    async def condition(request: Request):
        server.conditions.append(await request.json())
        return {}

    @app.get("/bench/counters")
    async def counters():
        return server.counters

    @app.post("/api/v1/pow/init/validate")
    async def begin(request: Request):
        server.manager.start_round(PoCConfig(**await request.json()), PoCState.VALIDATING)
        return {}

    @app.post("/api/v1/pow/validate")
    async def validate(request: Request):
        batch = ProofBatch(**{**await request.json(), "dist": []})
        began = time.perf_counter()
        distances = server.manager.validate(batch).dist
        server.counters["slices"] += 1
        server.counters["slice_seconds"] += time.perf_counter() - began
        if server.wrong("distance"):
            distances[-1] *= 1 + 2**-52
        await asyncio.sleep(0)
        return {"distances": distances, "fraud_detected": False}

    @app.post("/v1/completions")
    async def complete(request: Request):
        body = await request.json()
        if not body.get("stream"):
            tokens = sum(map(len, body["prompt"]))
            server.counters["steps"] += 1
            server.counters["tokens"] += tokens
            await asyncio.sleep(0.001)
            return {"usage": {"prompt_tokens": tokens}}
        answer = server.answer(body["prompt"], body["max_tokens"])
        if server.wrong("token"):
            answer[-1] ^= 1

        async def events():
            for token in answer:
                yield f"data: {json.dumps({'choices': [{'text': '', 'token_ids': [token]}]})}\n\n"
                await asyncio.sleep(TOKEN_SECONDS)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events())

    return app


if __name__ == "__main__":
    # vllm serve MODEL ... --port PORT ...
    torch.set_num_threads(1)  # two wait for each other where others want the cores
    uvicorn.run(
        app_of(Server(Path(sys.argv[2]))), port=int(sys.argv[sys.argv.index("--port") + 1]), log_level="warning"
    )
