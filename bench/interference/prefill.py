"""How fast proofs are beside the server's own work on as many tokens: proofs alone and prompts alone, in turn."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import numpy as np

from bench.interference.load import OUTSTANDING_PROOFS, Condition, Rig, run_block, wait_for

RESAMPLES = 1000


class PrefillRig(Rig, Protocol):
    """A rig that can have its server compute prompts alone, of the shape of proofs."""

    async def prefill(self) -> int:
        """Have a batch of prompts computed; return the number of their tokens."""


async def prefill_tokens_per_second(rig: PrefillRig, seconds: float, timeout_seconds: float) -> dict[str, float]:
    """Measure prompts alone for a while: tokens per second, and tokens per step of the engine.

    As many batches are outstanding as of proofs, so that no step waits for a request.
    """
    loop = asyncio.get_running_loop()
    ended: list[tuple[float, int]] = []
    end = float("inf")

    async def ask() -> None:
        while loop.time() < end:
            tokens = await rig.prefill()
            ended.append((loop.time(), tokens))

    tasks = [loop.create_task(ask()) for _ in range(OUTSTANDING_PROOFS)]
    try:
        while not ended and not any(task.done() for task in tasks):  # the first fills the pipeline
            await wait_for(rig, asyncio.sleep(0.001), timeout_seconds)
        before, begin = await rig.counters(), loop.time()
        end = begin + seconds
        await wait_for(rig, asyncio.gather(*tasks), seconds + timeout_seconds)
    finally:
        for task in tasks:
            task.cancel()
    after = await rig.counters()
    assert before is not None
    assert after is not None
    last = ended[-1][0]
    return {
        "tokens_per_second": sum(tokens for at, tokens in ended if at > begin) / (last - begin),
        "tokens_per_step": (after["tokens"] - before["tokens"]) / (after["steps"] - before["steps"]),
    }


async def measure_prefill(
    rig: PrefillRig, solo: Condition, seq_len: int, rounds: int, seconds: float, timeout_seconds: float
) -> dict[str, Any]:
    """Measure proofs alone over prompts alone, in tokens per second.

    Args:
        solo: the condition of proofs alone.
        seq_len: tokens per nonce.
        rounds: turns of each; which comes first alternates.
        seconds: of a turn.
        timeout_seconds: limit for each thing that is waited for.
    """
    pairs = []
    for turn in range(rounds):
        pair: dict[str, Any] = {}
        for kind in ("proofs", "prefill") if turn % 2 == 0 else ("prefill", "proofs"):
            if kind == "proofs":
                block = await run_block(rig, solo, [], seconds, max_in_flight=1, timeout_seconds=timeout_seconds)
                pair["proof_tokens_per_second"] = block.nonces * seq_len / block.seconds
            else:
                pair |= await prefill_tokens_per_second(rig, seconds, timeout_seconds)
        pairs.append(pair)
    return {"seconds": seconds, "rounds": pairs, "ratio": ratio_of(pairs)}


def ratio_of(pairs: list[dict[str, float]]) -> list[float]:
    """Return the median of the rounds' ratios, and its interval of 95 %, from rounds drawn again."""
    ratios = np.array([pair["proof_tokens_per_second"] / pair["tokens_per_second"] for pair in pairs])
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return [float(np.median(ratios)), float(low), float(high)]
