"""A logits processor for vLLM with which users choose how long steps are, so that a test can act between them."""

from __future__ import annotations

import time

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class SlowSteps(AdapterLogitsProcessor):
    """Sleeps in each step of a request with `vllm_xargs` of ``step_seconds``; changes no logits.

    Without, a step of so small a model takes 2 ms, and a whole answer may be computed before a test has acted on the
    first of it.
    """

    def is_argmax_invariant(self) -> bool:
        return False  # those that are get skipped where answers are greedy

    def new_req_logits_processor(self, params: SamplingParams):  # type: ignore[no-untyped-def]
        seconds = float((params.extra_args or {}).get("step_seconds", 0))

        def slow(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return logits

        return slow if seconds else None
