"""What tests of a served model need: an Inference that ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from web import TIMEOUT

from poc_kernels.engines.transformers.config import InferenceLimits
from poc_kernels.engines.transformers.inference import Inference
from poc_kernels.scheduling import Turns

NAME = "tiny/model"
MAX_NEW = 64


def load(directory: Path) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def limits_of(**changes: Any) -> InferenceLimits:
    """Small enough for a tiny model, and in no hurry."""
    return InferenceLimits(**{"max_new_tokens": 1024, "stall_seconds": 60.0, **changes})


@contextlib.contextmanager
def started(model: Any, tokenizer: Any, **limits: Any) -> Iterator[Inference]:
    """A greedy Inference that runs, and afterwards leaves no thread."""
    before = set(threading.enumerate())
    turns = Turns()
    inference = Inference(model, tokenizer, NAME, turns, limits_of(**limits), temperature=0)
    inference.start()
    try:
        yield inference
    finally:
        turns.close()
        inference.stop(TIMEOUT)
    ours = [thread for thread in set(threading.enumerate()) - before if thread.name != "tqdm_monitor"]
    assert not [thread for thread in ours if "generation" in thread.name or "inference" in thread.name], ours
