"""Two ranks of a real vLLM, each in a process of its own: their slices and steps stay in one order."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_in_process import apart, save_model

from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.engines.vllm.link import EngineLost
from poc_kernels.engines.vllm.remote import RemoteDevice, RemoteProver, open_engine
from poc_kernels.protocol import EngineProver, PoCConfig, Row

CONFIG = PoCConfig("0x00ab", 7, "key", 1.4, batch_size=4, seq_len=24, use_random_projection=True)
VECTORS, FINGERPRINT = (dataclasses.replace(CONFIG, proof=proof) for proof in ("vectors", "fingerprint"))
PROMPTS = [[5 + (7 * i + 3 * j) % 500 for j in range(12 + 5 * i)] for i in range(4)]
FORWARDS = 4
SECONDS = 550.0
"""Only against hangs: a rank that waits for another in a collective waits for ever."""


def rows(forward: int) -> list[Row]:
    return [Row("key", CONFIG.batch_size * forward + row) for row in range(CONFIG.batch_size)]


def proofs(
    prover: RemoteProver, device: RemoteDevice, config: PoCConfig = CONFIG, forwards: int = FORWARDS
) -> list[list[Any]]:
    device.take()
    return [
        prover.prove(config, rows(forward), device.pause, [rows(forward + 1), rows(forward + 2)]).values
        for forward in range(forwards)
    ]


async def text(client: Any, number: int, count: int = 30) -> list[int]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": PROMPTS[number]}
    answers = [answer async for answer in client.generate(prompt, sampling, os.urandom(8).hex())]
    return list(answers[-1].outputs[0].token_ids)


async def texts(client: Any) -> list[list[int]]:
    return await asyncio.gather(*(text(client, number) for number in range(len(PROMPTS))))


async def fail_on_one_rank(client: Any, prover: RemoteProver, device: RemoteDevice) -> None:
    """Whoever waits is told that the engine died. Else each rank would wait for the other, and all for them."""
    from vllm.v1.engine.exceptions import EngineDeadError

    chats = asyncio.gather(*(text(client, number, 200) for number in range(len(PROMPTS))), return_exceptions=True)
    await client.collective_rpc("poc_kernels_fail_once", args=(1,))
    with pytest.raises(EngineLost, match="vLLM's engine died"):
        await asyncio.to_thread(proofs, prover, device)
    assert {type(answer) for answer in await chats} <= {EngineDeadError, list}


async def serve(folder: Path) -> tuple[dict[str, list[list[Any]]], dict[str, float]]:
    """The proofs of each form that two ranks compute, alone and beside chats, and what they counted."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        disable_log_stats=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        worker_extension_cls="vllm_worker_extension.WorkerExtension",
    )
    client = AsyncLLM.from_engine_args(arguments)
    try:
        prover, device = await open_engine(
            client, share=0.3, slice_seconds=0.002, cuda_graphs=True, answer_seconds=SECONDS
        )
        assert device.ranks == 2
        alone = await texts(client)
        found = await asyncio.to_thread(proofs, prover, device)
        chats = asyncio.gather(*(texts(client) for _ in range(3)))
        assert await asyncio.to_thread(proofs, prover, device) == found
        assert await chats == [alone] * 3
        # And with users paused, whose texts go on afterwards.
        chats = asyncio.gather(texts(client))
        await asyncio.to_thread(device.pause_users)
        assert await asyncio.to_thread(proofs, prover, device) == found
        await asyncio.to_thread(device.resume_users)
        assert await chats == [alone]
        forms = {"distances": found}
        for config in (VECTORS, FINGERPRINT):
            chat = asyncio.create_task(text(client, 0))
            forms[config.proof] = await asyncio.to_thread(proofs, prover, device, config, 1)
            assert await chat == alone[0]
            assert await asyncio.to_thread(proofs, prover, device, config, 1) == forms[config.proof]
        counters = dict(device.counters)
        await fail_on_one_rank(client, prover, device)
        return forms, counters
    finally:
        client.shutdown()


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their proofs are those of transformers, alone and beside chats, whose texts are those alone."""
    support = Path(__file__).parents[2] / "support"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # One thread per rank, wherever there is a core for it: others may be busy, and each rank waits for both.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # vLLM compiles the lookup of embeddings, even of an eager server: a third of the test's time, and not its matter.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    model = save_model("qwen3", tmp_path)
    found, counters = asyncio.run(asyncio.wait_for(serve(tmp_path), SECONDS))
    alone = EngineProver(TransformersEngine(model))
    for config in (CONFIG, VECTORS, FINGERPRINT):
        for forward, values in enumerate(found[config.proof]):
            expected = alone.prove(config, rows(forward)).values
            assert apart(values, expected) < (1e-5 if config is CONFIG else 1e-3)
    assert counters["slices_between_steps"] > 0
