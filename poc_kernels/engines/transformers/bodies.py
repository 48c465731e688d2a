"""Bodies of the OpenAI routes. Their types are checked here: transformers' handlers fail on wrong ones."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...service.errors import AdmissionError

logger = logging.getLogger("poc_kernels")

# Continuous batching samples all requests alike: these fields are checked, then dropped, with one warning each. (`seed`
# would even seed the generators of the whole process.)
IGNORED = ("seed", "temperature", "top_p", "logit_bias", "frequency_penalty", "presence_penalty", "stop")


_T = TypeVar("_T")
# Checking ends at the first wrong item: a body can have a million, each with an error per member of a union.
_List = Annotated[list[_T], Field(fail_fast=True)]
_Items = Annotated[list[_T], Field(min_length=1, fail_fast=True)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _TextPart(_Model):
    type: Literal["text", "input_text", "output_text"]
    text: str


_Content = str | _List[_TextPart] | None


def _json_object(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("must be JSON") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return text


_Arguments = Annotated[str, AfterValidator(_json_object)] | dict[str, Any]


class _CalledFunction(_Model):
    name: str
    arguments: _Arguments


class _ToolCall(_Model):
    function: _CalledFunction


class _Message(_Model):
    role: Annotated[str, Field(min_length=1)]
    content: _Content = None
    tool_calls: _List[_ToolCall] | None = None
    tool_call_id: str | None = None


class _Function(_Model):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Model):
    type: Literal["function"]
    function: _Function


class _FlatTool(_Function):
    type: Literal["function"]


class _TemplateArguments(BaseModel):
    """What a client may pass to the chat template; others would be arguments of the tokenizer's own method."""

    model_config = ConfigDict(strict=True, extra="forbid")
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class _Body(_Model):
    model: str | None = None
    stream: bool | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    logit_bias: dict[str, Any] | None = None
    frequency_penalty: float | None = Field(None, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, allow_inf_nan=False)
    stop: str | _List[str] | None = None


class ChatBody(_Body):
    """The body of POST /v1/chat/completions."""

    messages: _Items[_Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Literal[1] | None = None
    tools: _List[_Tool] | None = None
    chat_template_kwargs: _TemplateArguments | None = None


class CompletionBody(_Body):
    """The body of POST /v1/completions."""

    prompt: str
    max_tokens: int | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    suffix: str | None = None


class _InputMessage(_Model):
    type: Literal["message"] | None = None
    role: Annotated[str, Field(min_length=1)]
    content: _Content = None


class _InputCall(_Model):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: _Arguments


class _InputCallOutput(_Model):
    type: Literal["function_call_output"]
    call_id: str
    output: str | _List[_TextPart]


class _ReasoningText(_Model):
    text: str


class _InputReasoning(_Model):
    type: Literal["reasoning"]
    content: _List[_ReasoningText] | None = None


class ResponseBody(_Body):
    """The body of POST /v1/responses."""

    input: str | _Items[_TextPart] | _Items[_InputMessage | _InputCall | _InputCallOutput | _InputReasoning]
    instructions: str | None = None
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    tools: _List[_FlatTool | _Tool] | None = None


def _without_nones(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if entry is not None}


def check_encodable(body: Mapping[str, Any]) -> None:
    """Refuse a body that has a lone surrogate: JSON can escape one, but no answer, log or tokenizer can encode it.

    Raises:
        AdmissionError: 400; a name or a text has one.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AdmissionError(400, "the body has a lone surrogate, which is no character of UTF-8") from error


def cleaned(body: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Check the types of ``body``, and drop nulls and fields that have no effect.

    Raises:
        AdmissionError: 400, naming the field that is wrong.
    """
    if body.get("generation_config") is not None:
        raise AdmissionError(
            400, "generation_config is the server's and cannot be set by a request", "generation_config"
        )
    try:
        model.model_validate(dict(body))
    except ValidationError as error:
        raise _refusal(error) from error
    result = _without_nones(dict(body))
    for field in IGNORED:
        if result.pop(field, None) is not None:
            _warn_ignored(field)
    if "messages" in result:
        result["messages"] = [_without_nones(message) for message in result["messages"]]
    return result


def _refusal(error: ValidationError) -> AdmissionError:
    # Every member of a union reports errors: those of the member that is meant lie deepest in the value.
    errors = error.errors(include_url=False, include_input=False)
    fields = [[part for part in entry["loc"] if not _names_a_type(part)] for entry in errors]
    deepest = max(fields, key=lambda path: (len(path), [part for part in path if isinstance(part, int)]))
    field = ".".join(map(str, deepest))
    meant = [entry for entry, path in zip(errors, fields, strict=True) if path == deepest]
    if meant[0]["type"] == "missing":
        return AdmissionError(400, f"{field} is missing", field)
    messages = dict.fromkeys(entry["msg"] for entry in meant)
    return AdmissionError(400, f"{field} is wrong: {'; or: '.join(messages)}", field)


def _names_a_type(part: int | str) -> bool:
    """Tell whether a part of pydantic's location is a member of a union (str, list[...], _Message), not a field."""
    return isinstance(part, str) and (part in ("str", "dict") or part.startswith(("_", "list[", "dict[", "function-")))


@functools.cache
def _warn_ignored(field: str) -> None:
    """Warn of a field, once per process."""
    logger.warning("requests set %s, which has no effect here: the server samples all requests alike", field)
