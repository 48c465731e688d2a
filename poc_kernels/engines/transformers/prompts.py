"""From a body to token ids: chat templates, tokenization, and what is refused before either.

Both take seconds for a megabyte of text, so they run in worker threads, and a prompt that cannot fit is not tokenized.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ...service.errors import AdmissionError
from .admission import too_long
from .bodies import ChatBody, CompletionBody, ResponseBody

logger = logging.getLogger("poc_kernels")

_MAX_SHOWN = 300
"""Characters of a template's own words that a client is told."""
_COMPOSED = 4
"""Characters that NFC and NFKC make one of at most, as for a Greek letter with three marks."""


class Prompts:
    """Makes prompts for a model's tokenizer. Its methods are for worker threads.

    Args:
        tokenizer: a fast one, with a chat template or without: then there are no chats, which is logged.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._longest = _longest_token(tokenizer)
        if not tokenizer.chat_template:
            logger.warning("the model has no chat template: only /v1/completions serves it")

    def of_chat(self, body: ChatBody | ResponseBody, max_tokens: int) -> tuple[list[int], list[dict[str, Any]] | None]:
        """Return the prompt's token ids, and the tools that the model is offered.

        Args:
            body: a checked body.
            max_tokens: what a prompt can have at most.

        Raises:
            AdmissionError: 400; there is no template, it refuses or fails on the body, or the prompt cannot fit.
        """
        if not self._tokenizer.chat_template:
            raise AdmissionError(
                400, "the model has no chat template, so it takes no messages: /v1/completions serves it", "messages"
            )
        offered = body.tools if body.tool_choice != "none" else None
        tools = [tool.as_template_takes_it() for tool in offered] if offered else None
        arguments = body.chat_template_kwargs.model_dump(exclude_none=True) if body.chat_template_kwargs else {}
        if body.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", body.reasoning_effort)
        field = "messages" if isinstance(body, ChatBody) else "input"
        text = self._rendered(body.template_messages(), tools, arguments, field)
        return self._tokenized(text, max_tokens, special_tokens=False), tools

    def of_completion(self, body: CompletionBody, max_tokens: int) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            AdmissionError: 400; the prompt cannot fit.
        """
        prompt = body.the_prompt()
        return prompt if isinstance(prompt, list) else self._tokenized(prompt, max_tokens, special_tokens=True)

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        arguments: Mapping[str, Any],
        field: str,
    ) -> str:
        try:
            if not _knows_developers(self._tokenizer.chat_template):
                messages = [
                    {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
                ]
            if any("tool_calls" in message for message in messages) and self._takes_json():
                messages = _with_json_arguments(messages)
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **arguments
            )
            return text
        except Exception as error:  # whatever a template raises, it raises at this body
            deep = isinstance(error, RecursionError)
            words = "the body is nested too deeply" if deep else f"{type(error).__name__}: {error}"[:_MAX_SHOWN]
            logger.info("the chat template refuses a request", extra={"error": words})
            raise AdmissionError(400, f"the chat template refuses the {field}: {words}", field) from error

    def _takes_json(self) -> bool:
        """Tell whether the template takes a call's arguments as OpenAI sends them: a string of JSON, not an object."""
        template = self._tokenizer.chat_template
        return _takes_json(template if isinstance(template, str) else json.dumps(template), self._tokenizer)

    def _tokenized(self, text: str, max_tokens: int, *, special_tokens: bool) -> list[int]:
        if self._longest is not None and len(text) > max_tokens * self._longest:
            raise too_long(max_tokens, f"the prompt's {len(text)} characters are more than {max_tokens} tokens")
        # The ids alone: Python makes its lists of a million numbers while nothing else runs.
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=special_tokens, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return ids


def _knows_developers(template: Any) -> bool:
    return "developer" in str(template)


def _with_json_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def as_json(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**message, "tool_calls": [as_json(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


@functools.lru_cache(maxsize=8)
def _takes_json(template: str, tokenizer: Any) -> bool:
    """Try a template on a conversation with a call: objects first, as most templates take them.

    One that joins strings raises, or shows what Python prints of an object.
    """
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"probe": "a"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00000", "name": "f", "content": "a"},
    ]

    def shown(messages: list[dict[str, Any]]) -> str | None:
        try:
            text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception:
            return None
        return text

    as_object = shown(messages)
    if as_object is not None and "{'probe': 'a'}" not in as_object:
        return False
    as_json = shown(_with_json_arguments(messages))
    return as_json is not None and '{"probe": "a"}' in as_json


def _longest_token(tokenizer: Any) -> int | None:
    """Return how many characters of a prompt one token can stand for at most; None if that has no bound.

    It has one where every byte of a text is in some token, and where the text is not shortened before.
    """
    backend = tokenizer.backend_tokenizer
    normalizers, splitters = _steps(backend.normalizer), _steps(backend.pre_tokenizer)
    kinds = {step["type"] for step in (*normalizers, *splitters)}
    whole = "ByteLevel" in kinds or getattr(backend.model, "byte_fallback", False)
    if not whole or kinds - _KEEP_TEXT or any(step.get("behavior") == "Removed" for step in splitters):
        return None
    if any(_shortens(step) for step in normalizers if step["type"] == "Replace"):
        return None
    longest = max(map(len, tokenizer.get_vocab()))
    return longest * _COMPOSED if kinds & {"NFC", "NFKC"} else longest


_KEEP_TEXT = {"ByteLevel", "Digits", "Metaspace", "NFC", "NFKC", "Prepend", "Replace", "Split"}
"""Steps of tokenizers that drop no text."""


def _steps(component: Any) -> list[dict[str, Any]]:
    """List the steps of a normalizer or a pre-tokenizer, as tokenizers saves them."""
    if component is None:
        return []
    state: dict[str, Any] = json.loads(component.__getstate__())
    steps: list[dict[str, Any]] = state.get("normalizers") or state.get("pretokenizers") or [state]
    return steps


def _shortens(replace: Mapping[str, Any]) -> bool:
    pattern = replace["pattern"].get("String")
    return pattern is None or len(replace["content"]) < len(pattern)
