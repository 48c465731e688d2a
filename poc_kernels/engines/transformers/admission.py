"""What a request may ask of continuous batching, and how its refusal reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...service.errors import AdmissionError

_MAX_SHOWN = 300
"""Characters of a name that a refusal repeats at most."""
ENGINE_FAILED = "the engine failed while it served this request; it is being rebuilt, try again"


def engine_unavailable(reason: str) -> AdmissionError:
    """Make the refusal of a request that may be sent again in a second."""
    return AdmissionError(503, reason, code="engine_unavailable", headers={"Retry-After": "1"})


def no_such_model(name: str) -> AdmissionError:
    """Make the refusal of a request for a model that is not served here."""
    return AdmissionError(404, f"the model {name[:_MAX_SHOWN]!r} does not exist here", "model", "model_not_found")


def too_long(max_tokens: int, why: str, param: str | None = None) -> AdmissionError:
    """Make the refusal of a request that has more tokens than one can have."""
    message = f"a request can have {max_tokens} tokens here, prompt and completion together: {why}"
    return AdmissionError(400, message, param, "context_length_exceeded")


def check_prompt(prompt: Sequence[int], vocabulary: int, param: str | None = None) -> None:
    """Check token ids.

    Args:
        prompt: token ids.
        vocabulary: they have to be in [0, vocabulary).
        param: the field of the body that has them; None if its text is in several.

    Raises:
        AdmissionError: 400; there are none, or others.
    """
    if not prompt:
        raise AdmissionError(400, "the prompt is empty: it must have at least one token", param)
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise AdmissionError(400, f"the prompt has token ids outside [0, {vocabulary})", param)


def admitted_new_tokens(
    prompt: Sequence[int], asked: Any, *, vocabulary: int, max_new_tokens: int, max_tokens: int, param: str
) -> int:
    """Decide how many tokens may be generated after ``prompt``.

    Args:
        prompt: token ids.
        asked: the number of new tokens that the client asked for; None for as many as the limits leave.
        vocabulary: token ids are in [0, vocabulary).
        max_new_tokens: limit of new tokens.
        max_tokens: limit of prompt and new tokens together, from the model's positions and the KV cache.
        param: the field of the body that asks for new tokens.

    Raises:
        AdmissionError: 400; continuous batching would die of the request, or never finish it.
    """
    check_prompt(prompt, vocabulary)
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise AdmissionError(400, f"{param} must be an integer of at least 1, got {asked!r}", param)
    if asked is not None and asked > max_new_tokens:
        raise AdmissionError(400, f"{param} must be at most {max_new_tokens}, got {asked}", param)
    room = max_tokens - len(prompt)
    if room < (asked or 1):
        why = f"the prompt has {len(prompt)}, and {asked or 1} more must fit"
        raise too_long(max_tokens, why, param if asked is not None and room > 0 else None)
    return asked if asked is not None else min(max_new_tokens, room)
