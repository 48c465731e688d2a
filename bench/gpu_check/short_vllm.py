"""``python -m bench.gpu_check.short_vllm DEVICE`` has vLLM serve a small model, and tries proofs on its weights.

The twin is compared with what is served, its rows with each other, on a GPU as captured graphs; chats between proofs
keep their text.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile

import torch

PROMPTS = [[5 + (7 * i + 3 * j) % 500 for j in range(20 + i)] for i in range(4)]


def main(name: str) -> None:
    """Try it on the device of that name; without vLLM say that it is skipped, as pytest does."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        import transformers
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt
    except ImportError as error:
        print(f"SKIPPED [1] proofs in vLLM: {error}")
        return
    from poc_kernels.engines.vllm import compat, trial
    from poc_kernels.engines.vllm.engine import VllmEngine
    from poc_kernels.engines.vllm.memory import lacking_memory
    from poc_kernels.engines.vllm.support import unsupported_version
    from poc_kernels.protocol import EngineProver, PoCConfig, Row

    if (refusal := unsupported_version(compat.version())) is not None:
        print(f"SKIPPED [1] proofs in vLLM: {refusal}")
        return
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if name == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
        llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=512,
            max_num_seqs=8,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
        )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    engine = VllmEngine(worker, slice_seconds=2e-4)

    def answers(prompts: list[list[int]], count: int) -> list[object]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
        return llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)

    def texts() -> list[list[int]]:
        return [trial.scores(answer)[0] for answer in answers(PROMPTS, 16)]

    prover, rows = EngineProver(engine), [Row("key", nonce) for nonce in range(4)]
    assert (said := lacking_memory(engine, prover)) is None, said
    asked = answers(trial.tokens(engine.vocab_size, max_positions=512), trial.ANSWER)
    assert (said := trial.compare(engine, *zip(*map(trial.scores, asked), strict=True))) is None, said
    assert (said := trial.independence(engine, transforms=True)) is None, said
    if name == "cuda":
        assert engine.repeated.captured is not None, "not captured"
    before = texts()
    settings = PoCConfig("0x00ab", 7, "key", 1.4, batch_size=4, seq_len=64, use_random_projection=True)
    for form in prover.forms:
        settings = dataclasses.replace(settings, proof=form)
        with engine.context():
            together = prover.prove(settings, rows).values
            assert [prover.prove(settings, [row]).values[0] for row in rows] == together, "a row depends on the others"
        assert len(set(together)) == len(rows), "rows have the same proofs"
        assert texts() == before, "chats are not what they were"
    print(f"proofs in vLLM {compat.version()} done: {', '.join(prover.forms)}")


if __name__ == "__main__":
    main(sys.argv[1])
