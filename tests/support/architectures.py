"""Tiny causal models of many architectures of transformers, and what the plain model of each says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from poc_kernels.engines.transformers.inference import Inference

VOCABULARY = 2048
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_GEMMA = {**_SMALL, "head_dim": 16, "sliding_window": 8}
_STATES = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
_DEEPSEEK = {
    **_SMALL,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_MIXTRAL = {**_SMALL, "num_local_experts": 4}
_NEO = {
    "hidden_size": 64,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "num_heads": 4,
    "window_size": 8,
    "max_position_embeddings": 256,
}
_OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
_BART = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 6.4,
    "original_max_position_embeddings": 40,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bart": {**_BART, "max_position_embeddings": 256},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 8},
    "deepseek_v3": _DEEPSEEK,
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma2": _GEMMA,
    "gpt2": _GPT,
    "gpt_neo": _NEO,
    "gptj": {**_GPT, "rotary_dim": 8},
    "llama": _SMALL,
    "llama4_text": {**_SMALL, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2},
    "mamba": _STATES,
    "mixtral": _MIXTRAL,
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "nemotron": _SMALL,
    "openai-gpt": _GPT,
    "opt": {**_OPT, "max_position_embeddings": 256},
    "qwen3": {**_SMALL, "head_dim": 16},
    "phi3": {**_SMALL, "pad_token_id": 0, "original_max_position_embeddings": 40, "rope_parameters": _LONG_ROPE},
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
    "stablelm": _SMALL,
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
}

ONLY_PROVED: dict[str, dict[str, Any]] = {"gpt_neox": _SMALL, "phi": _SMALL}
"""More of them, which no test serves to users."""


def tiny(kind: str, std: float = 0.08, dtype: torch.dtype = torch.float32) -> Any:
    """A causal model of an architecture, in eval mode, with seeded random weights; no token of it ends a text."""
    settings = {**ARCHITECTURES, **ONLY_PROVED}[kind]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, std)
    model.generation_config.eos_token_id = -1
    return model.to(dtype)


@torch.no_grad()
def plain_tokens(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens after ``prompt``, one by one, by forwards of the plain model without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def served_tokens(inference: Inference, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The tokens after each of ``prompts``, which are asked together."""

    async def ask_all() -> list[Any]:
        loop = asyncio.get_running_loop()
        answers = []
        for number, prompt in enumerate(prompts):
            answer = loop.create_future()
            config = inference.generation_config(count)
            inference.submit(f"{number}", prompt, config, False, answer.set_result, "max_tokens")
            answers.append(answer)
        return await asyncio.wait_for(asyncio.gather(*answers), 60)

    answers = asyncio.run(ask_all())
    assert [answer.error for answer in answers] == [None] * len(prompts)
    return [answer.generated_tokens for answer in answers]
