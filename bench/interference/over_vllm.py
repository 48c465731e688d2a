"""A real `vllm serve` with rounds in it, over HTTP; the server's Python is that of an environment with vLLM."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.interference import vllm_plugin
from bench.interference.chat import EXACT_MARGIN, Margins, Served, prompts
from bench.interference.load import Condition, DifferenceError, ask_alone
from bench.interference.node_rig import NodeRig, ready
from bench.interference.validation import difference, distances_alone, round_config
from poc_kernels.demo.server import HOST, ServerProcess, free_port

_NAME = "bench"
"""What clients call the model."""
_NEAR = 1e-5
"""How far a distance may lie from that of transformers' engine, whose attention is another kernel; in float32."""
_MAX_REQUESTS = 64
_SUMS = ("steps", "steps_followed", "tokens", "step_seconds", "slices", "slice_seconds", "slices_between_steps")
SITECUSTOMIZE = "import os, time; os.sched_yield = lambda: time.sleep(0)\n"
"""Python's own name for a module that every process of the server imports first."""
_LOOK = """
from importlib.metadata import entry_points
from importlib.util import find_spec
assert find_spec("vllm") is not None, "it has no vLLM"
found = [each.name for each in entry_points(group="vllm.endpoint_plugins")]
assert "poc_kernels" in found, f"it has no installed poc-kernels: its endpoint plugins are {found}"
"""


class VllmRig(NodeRig):
    """A `Rig` whose server is stock vLLM with this package as a plugin, and its default settings
    except for the length of slices.

    Args:
        python: of the environment that has vLLM and this package.
        directory: of the model; the log is written there too.
        served: the same model in this process, in float32.
        conditions: see `Condition`; all are possible without a restart.
        new_tokens, prompt_tokens, prompt_count, seed: of requests.
        projection: whether the round uses the random projection.
        slice_seconds: as the server's setting.
        ready_seconds: how long the server may take to start.

    Raises:
        ServerFailedError: the server does not start.
    """

    def __init__(
        self,
        python: Path,
        directory: Path,
        served: Served,
        *,
        conditions: list[Condition],
        new_tokens: int,
        prompt_tokens: int,
        prompt_count: int,
        projection: bool,
        slice_seconds: float,
        seed: int,
        ready_seconds: float,
    ) -> None:
        self._served = served
        self._new_tokens = new_tokens
        self._random = random.Random(seed)
        self._vocabulary = served.model.config.vocab_size
        self._prompts = prompts(prompt_count, prompt_tokens, self._vocabulary, seed)
        self._least_lead = float("inf")
        case = served.case
        port = free_port()
        positions = max(case.seq_len, 3 * prompt_tokens // 2 + new_tokens) + 1
        options = {
            "--served-model-name": _NAME,
            "--host": HOST,
            "--port": port,
            "--dtype": "float32",
            "--max-model-len": positions,
            "--max-num-seqs": _MAX_REQUESTS,
            # A step of prompts alone has as many tokens as a forward of proofs.
            "--max-num-batched-tokens": max(case.batch_size * case.seq_len, _MAX_REQUESTS),
        }
        server = ServerProcess.started(
            [
                *(str(python.with_name("vllm")), "serve", str(directory)),
                *(str(word) for option in options.items() for word in option),
                *("--enforce-eager", "--no-enable-prefix-caching"),
            ],
            {**os.environ, **environment(directory), "POC_KERNELS_SLICE_SECONDS": str(slice_seconds)},
            port,
            directory / "vllm.log",
        )
        super().__init__(ready(server, ready_seconds), round_config(case, projection), conditions)

    async def start(self, timeout_seconds: float) -> None:
        """Begin the round, and have every distance and every answer computed alone.

        Raises:
            DifferenceError: a distance is not near that of an engine in this process.
        """
        await self.begin_round(timeout_seconds)
        for here, there in zip(distances_alone(self._served.model, self.config), self.expected, strict=True):
            if max(abs(one - other) for one, other in zip(here.dist, there.dist, strict=True)) > _NEAR:
                raise difference(here, there.dist)
        margins = Margins(self._served.model)
        every, self._prompts = self._prompts, []
        for prompt in every:
            self._prompts.append(prompt)
            answer = (await ask_alone(self, len(self._prompts) - 1, timeout_seconds)).answer
            if len(answer) != self._new_tokens:
                raise RuntimeError(f"an answer must have {self._new_tokens} tokens, got {len(answer)}")
            lead = margins.lead(prompt, answer)
            if lead < -EXACT_MARGIN:
                raise DifferenceError(f"an answer alone is not that of a plain forward: a token lies {-lead:.3g} under")
            if lead < EXACT_MARGIN:
                self._prompts.pop()
                continue
            self._least_lead = min(self._least_lead, lead)
            self.answers.append(answer)
        if not self.answers:
            raise RuntimeError(f"prompts must have an answer without near ties, none of {len(every)} has")
        self.prompts = len(self.answers)

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the server."""
        return {
            "prompts": self.prompts,
            "parts_per_batch": 1,
            "planned_slices": None,
            "answers_exact": True,
            "answers_near_ties": 0,
            "least_lead": self._least_lead,
        }

    async def prefill(self) -> int:
        """Have vLLM compute a batch of prompts, as many and as long as the inputs of a batch of proofs.

        Returns:
            The number of their tokens.
        """
        case = self._served.case
        tokens = [
            [self._random.randrange(self._vocabulary) for _ in range(case.seq_len)] for _ in range(case.batch_size)
        ]
        body = {"model": _NAME, "prompt": tokens, "max_tokens": 1, "temperature": 0, "detokenize": False}
        answer = await self.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        used: int = answer.json()["usage"]["prompt_tokens"]
        return used

    # ---- NodeRig ----

    async def switch(self, condition: Condition) -> None:
        wanted = {"share": condition.share, "whole_batches": condition.whole_batches}
        (await self.client.post("/bench/condition", json=wanted)).raise_for_status()

    async def counters(self) -> dict[str, float]:
        answer = await self.client.get("/bench/counters")
        answer.raise_for_status()
        return {name: answer.json()[name] for name in (*_SUMS, "seconds_between_steps")}

    def ask(self, prompt: int) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", {
            "model": _NAME,
            "prompt": self._prompts[prompt],
            "max_tokens": self._new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "detokenize": False,
            "return_token_ids": True,
            "stream": True,
        }

    def pieces(self, line: str) -> list[int]:
        choices = json.loads(line.removeprefix("data: "))["choices"]
        return (choices[0]["token_ids"] or []) if choices else []

    def joined(self, pieces: list[int]) -> list[int]:
        return pieces


def environment(directory: Path) -> dict[str, str]:
    """Return the variables of a server that loads this package and the suite's plugin, which comes into ``directory``.

    The plugin has a folder of its own: in the one of the suite, the server would find this package's sources. Beside it
    is what keeps vLLM's polling from starving the load's client: see docs/vllm.md.
    """
    folder = directory / "plugin"
    described = folder / f"{vllm_plugin.NAME}-0.dist-info"
    described.mkdir(parents=True)
    shutil.copy(vllm_plugin.__file__, folder / f"{vllm_plugin.NAME}.py")
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {vllm_plugin.NAME}\nVersion: 0\n")
    entry = f"{vllm_plugin.NAME} = {vllm_plugin.NAME}:{vllm_plugin.BenchEndpoints.__name__}"
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (described / "entry_points.txt").write_text(f"[vllm.endpoint_plugins]\n{entry}\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_PLUGINS": f"poc_kernels,{vllm_plugin.NAME}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def unusable(python: Path) -> str | None:
    """Return why an environment cannot serve, or None."""
    wanted = "the Python of an environment with vLLM and this package, as make .venv-vllm/installed sets one up"
    if not python.with_name("vllm").is_file() or not python.is_file():
        return f"--vllm-python must be {wanted}; {python} is not there, or no vllm beside it"
    done = subprocess.run([str(python), "-c", _LOOK], capture_output=True, text=True, timeout=60, cwd=python.parent)
    if done.returncode != 0:
        return f"--vllm-python must be {wanted}; of {python}: {done.stderr.strip().splitlines()[-1]}"
    return None
