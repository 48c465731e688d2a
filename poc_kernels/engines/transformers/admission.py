"""What a request may ask of continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...service.errors import AdmissionError

RETRY_AFTER = {"Retry-After": "1"}
ENGINE_FAILED = "the engine failed while it served this request; it is being rebuilt, try again"


def engine_unavailable(reason: str) -> AdmissionError:
    """The refusal of a request that may be sent again in a second."""
    return AdmissionError(503, reason, code="engine_unavailable", headers=RETRY_AFTER)


def admitted_new_tokens(
    prompt: Sequence[int], asked: Any, *, vocabulary: int, most_new_tokens: int, most_tokens: int, param: str
) -> int:
    """How many tokens may be generated after ``prompt``.

    Args:
        prompt: token ids.
        asked: the new tokens that the client asked for, or None: then what the limits leave.
        vocabulary: token ids are in [0, vocabulary).
        most_new_tokens: limit of new tokens.
        most_tokens: what one request may have of the model's positions and of the KV cache, prompt and new tokens.
        param: the field that the new tokens are asked for in.

    Raises:
        AdmissionError: 400; continuous batching would die of the request, or never finish it.
    """
    if not prompt:
        raise AdmissionError(400, "the prompt is empty: it must have at least one token")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise AdmissionError(400, f"the prompt has token ids outside [0, {vocabulary})")
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise AdmissionError(400, f"{param} must be an integer of at least 1, got {asked!r}", param)
    if asked is not None and asked > most_new_tokens:
        raise AdmissionError(400, f"{param} must be at most {most_new_tokens}, got {asked}", param)
    room = most_tokens - len(prompt)
    if room < (asked or 1):
        raise AdmissionError(
            400,
            f"a request can have {most_tokens} tokens here, prompt and completion together: "
            f"the prompt has {len(prompt)}, and {asked or 1} more must fit",
            param if asked is not None and room > 0 else None,
            "context_length_exceeded",
        )
    return asked if asked is not None else min(most_new_tokens, room)
