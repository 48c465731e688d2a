"""Models served by vLLM in this process, one after the other: their weights are small, seeded, and in a folder.

Import it before vLLM: vLLM reads the environment once.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # other tests of this process have the cores too
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="",
)

import numpy as np
import torch

VOCABULARY = 512
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention takes no smaller one on CPUs
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_WIDE = {**_SMALL, "hidden_size": 128, "head_dim": None}
_GEMMA = {**_SMALL, "sliding_window": 16, "query_pre_attn_scalar": 32}
_EXPERTS = {**_SMALL, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 24},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "phi3": _WIDE,
    "qwen2": _WIDE,
    "qwen3": _SMALL,
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64},
}


def save_model(kind: str, folder: Path, seed: int = 0) -> Any:
    """Make a model of transformers with seeded weights, no token of which ends a text; save it, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in CONFIGS[kind].items() if value is not None}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=1, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.08)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def apart(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """How far proofs are from others at most: distances, or unit vectors, whose numbers are rounded to float16."""

    def numbers(proofs: Sequence[Any]) -> Any:
        return np.array(
            [np.frombuffer(base64.b64decode(x), "<f2") if isinstance(x, str) else [x] for x in proofs], "f4"
        )

    return float(np.linalg.norm(numbers(found) - numbers(expected), axis=1).max())


class Served:
    """A model that vLLM serves in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm: Any = llm
        self.worker: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def close(self) -> None:
        """End it, and let go of it: what vLLM does when it is collected must not meet the next one."""
        self.llm.llm_engine.engine_core.engine_core.shutdown()
        self.llm = self.worker = None

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        """vLLM's answers to prompts of token ids."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return self.llm.generate(asked, SamplingParams(detokenize=False, **sampling), use_tqdm=False)

    def texts(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The likeliest tokens after each of ``prompts``, which are asked together."""
        answers = self.generate(prompts, temperature=0, max_tokens=count, ignore_eos=True)
        return [list(answer.outputs[0].token_ids) for answer in answers]


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Served]:
    """Have vLLM serve the model in ``folder`` inside the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, **options}
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        disable_log_stats=True,
        **options,
    )
    served = Served(llm)
    del llm
    try:
        yield served
    finally:
        served.close()
        cleanup_dist_env_and_memory()
