"""Bodies of the OpenAI routes: each field of OpenAI's is honoured, refused unless it is off, or without effect.

``python -m poc_kernels.engines.transformers.bodies`` prints the tables of docs/operating.md from these declarations.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, Tag

from ...service.errors import AdmissionError
from .fields import (
    CheckedBody,
    Item,
    Items,
    List,
    NoEffect,
    Options,
    Refused,
    check_encodable,
    declared,
    finite,
    no_constant,
    one_of,
)
from .sampling import MAX_LOGPROBS, Sampling

_MAX_STOPS = 16
_MAX_BIASED_TOKENS = 1024

# ---- messages ----

_Hint = Annotated[Any, NoEffect("a hint for OpenAI's caches")]
_Who = Annotated[Any, NoEffect("says who asks")]
_History = Annotated[Any, NoEffect("part of an earlier answer that models are not shown")]


class _TextPart(Item):
    type: Literal["text", "input_text", "output_text"]
    text: str
    prompt_cache_breakpoint: _Hint = None
    annotations: _History = None
    logprobs: _History = None


class _RefusalPart(Item):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _is_refusal(value: Any) -> str:
    refusal = isinstance(value, dict) and value.get("type") == "refusal"
    return "_refusal" if refusal or isinstance(value, _RefusalPart) else "_text"


_Part = Annotated[Annotated[_TextPart, Tag("_text")] | Annotated[_RefusalPart, Tag("_refusal")], one_of(_is_refusal)]


def _is_text(value: Any) -> str:
    return "_str" if isinstance(value, str) else "_parts"


_Content = Annotated[Annotated[str, Tag("_str")] | Annotated[List[_Part], Tag("_parts")], one_of(_is_text)]


def _text(content: str | list[Any] | None) -> str:
    return content if isinstance(content, str) else " ".join(part.text for part in content or ())


def _json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        value = json.loads(value, parse_constant=no_constant, parse_float=finite) if value.strip() else {}
        check_encodable(value)
    except AdmissionError as error:
        raise ValueError(error.message.removeprefix("the body ")) from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError("must be JSON") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


_Arguments = Annotated[dict[str, Any], BeforeValidator(_json_object)]
_Name = Annotated[str, StringConstraints(min_length=1)]


class _CalledFunction(Item):
    name: str
    arguments: _Arguments


class _ToolCall(Item):
    type: Literal["function"] | None = None
    id: str | None = None
    function: _CalledFunction

    def as_template_takes_it(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


class _Message(Item):
    role: _Name
    content: _Content | None = None
    name: str | None = None
    tool_calls: List[_ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    audio: Annotated[Any, Refused()] = None
    function_call: Annotated[Any, Refused()] = None

    def as_template_takes_it(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": _text(self.content) or self.refusal or ""}
        if self.tool_calls is not None:
            message["tool_calls"] = [call.as_template_takes_it() for call in self.tool_calls]
        kept = ("name", "tool_call_id", "reasoning_content")
        message.update((key, getattr(self, key)) for key in kept if getattr(self, key) is not None)
        return message


class _Function(Item):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Any, NoEffect("the model is shown the schema and not held to it")] = None

    def as_template_takes_it(self) -> dict[str, Any]:
        parameters = self.parameters if self.parameters is not None else {"type": "object", "properties": {}}
        function: dict[str, Any] = {"name": self.name, "parameters": parameters}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class _Tool(Item):
    type: Literal["function"]
    function: _Function

    def as_template_takes_it(self) -> dict[str, Any]:
        return self.function.as_template_takes_it()


class _FlatTool(_Function):
    type: Literal["function"]
    output_schema: Annotated[Any, NoEffect("the model is shown what a function takes")] = None
    allowed_callers: Annotated[Any, Refused(["direct"])] = None
    defer_loading: Annotated[Any, Refused(False)] = None
    not_awaited: Annotated[Any, Refused(False)] = Field(None, alias="async")


# ---- options ----


class _TemplateArguments(Options):
    """What a client may pass to the chat template; others would be arguments of the tokenizer's own method."""

    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class _TextFormat(Options):
    type: Literal["text"]


class _StreamOptions(Options):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, NoEffect("streams are never padded")] = None
    continuous_usage_stats: Annotated[Any, Refused(False)] = None


class _Text(Options):
    format: _TextFormat | None = None
    verbosity: Annotated[Any, Refused("medium")] = None


class _Reasoning(Options):
    effort: str | None = None
    summary: Annotated[Any, Refused("auto")] = None
    generate_summary: Annotated[Any, Refused("auto")] = None
    context: Annotated[Any, Refused("auto")] = None
    mode: Annotated[Any, Refused("standard")] = None


class _CacheOptions(Options):
    mode: _Hint = None
    ttl: _Hint = None
    comparison_response_id: _Hint = None
    prewarm: Annotated[Any, Refused(False)] = None


# ---- bodies ----


def _token_id(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value


def _few_biased(value: Any) -> Any:
    # Before the entries are looked at: an error of each would keep all other threads waiting.
    if isinstance(value, dict) and len(value) > _MAX_BIASED_TOKENS:
        raise ValueError(f"it may bias at most {_MAX_BIASED_TOKENS} tokens, got {len(value)}")
    return value


_TokenId = Annotated[int, BeforeValidator(_token_id), Field(ge=0)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Body(CheckedBody):
    """What the bodies of all OpenAI routes have in common, with vLLM's extensions that choose tokens."""

    max_tokens_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)
    """Fields that bound the number of new tokens."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None  # keeps every logit finite
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: (
        Annotated[dict[_TokenId, _Bias], Field(max_length=_MAX_BIASED_TOKENS), BeforeValidator(_few_biased)] | None
    ) = None
    stop: Annotated[list[_Stop], Field(max_length=_MAX_STOPS, fail_fast=True), BeforeValidator(_listed)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    user: _Who = None
    generation_config: Annotated[Any, Refused()] = None
    include_stop_str_in_output: Annotated[Any, Refused(False)] = None
    min_tokens: Annotated[Any, Refused(0)] = None
    prompt_logprobs: Annotated[Any, Refused()] = None
    use_beam_search: Annotated[Any, Refused(False)] = None

    def new_tokens(self) -> tuple[int | None, str]:
        """Return how many new tokens the client asks for, None if it does not say, and the field that says so."""
        asked = [(getattr(self, field), field) for field in self.max_tokens_fields if getattr(self, field) is not None]
        return min(asked, default=(None, self.max_tokens_fields[0]))

    def sampling(self, default: Sampling) -> Sampling:
        """Return how the answer's tokens are chosen: as the body says, and by ``default`` where it does not."""
        names = {each.name for each in dataclasses.fields(Sampling)} - {"logprobs"}
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "top_k" in asked:
            asked["top_k"] = max(asked["top_k"], 0)  # -1: all
        return dataclasses.replace(default, **asked, logprobs=self.asked_logprobs())

    def asked_logprobs(self) -> int | None:
        """Return how many log probabilities are told beside the chosen token's; None for none at all."""
        raise NotImplementedError


_TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class _ConversationBody(Body):
    """What the bodies that a chat template renders have in common."""

    top_logprobs: _TopLogprobs | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: _TemplateArguments | None = None
    metadata: _Who = None
    safety_identifier: _Who = None
    prompt_cache_key: _Hint = None
    prompt_cache_retention: _Hint = None
    prompt_cache_options: _CacheOptions | None = None
    service_tier: Annotated[Any, NoEffect("there is one tier")] = None
    store: Annotated[Any, NoEffect("nothing is stored")] = None
    moderation: Annotated[Any, Refused()] = None


class ChatBody(_ConversationBody):
    """The body of POST /v1/chat/completions."""

    max_tokens_fields = ("max_tokens", "max_completion_tokens")

    messages: Items[_Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    tools: List[_Tool] | None = None
    response_format: _TextFormat | None = None
    reasoning_effort: str | None = None
    prediction: Annotated[Any, NoEffect("at most it makes an answer quicker")] = None
    audio: Annotated[Any, Refused()] = None
    function_call: Annotated[Any, Refused("none", "auto")] = None
    functions: Annotated[Any, Refused([])] = None
    modalities: Annotated[Any, Refused(["text"])] = None
    n: Annotated[Any, Refused(1)] = None
    verbosity: Annotated[Any, Refused("medium")] = None
    web_search_options: Annotated[Any, Refused()] = None

    def asked_logprobs(self) -> int | None:
        """See `Body`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """See `Body`."""
        if self.top_logprobs and not self.logprobs:
            raise AdmissionError(400, "top_logprobs needs logprobs to be true", "top_logprobs")

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates take them."""
        return [message.as_template_takes_it() for message in self.messages]


class CompletionBody(Body):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("_str")]
        | Annotated[Annotated[list[str], Field(min_length=1, max_length=1, fail_fast=True)], Tag("_strs")]
        | Annotated[List[int], Tag("_ids")]
        | Annotated[Annotated[list[List[int]], Field(min_length=1, max_length=1, fail_fast=True)], Tag("_lists")],
        one_of(lambda value: _kind_of_prompt(value)),
    ]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: _TopLogprobs | Literal[False] | None = None
    n: Annotated[Any, Refused(1)] = None
    best_of: Annotated[Any, Refused(1)] = None
    suffix: Annotated[Any, Refused("")] = None

    def asked_logprobs(self) -> int | None:
        """See `Body`."""
        return None if self.logprobs is False else self.logprobs

    def check(self) -> None:
        """See `Body`."""
        if self.echo and self.asked_logprobs() is not None:
            raise AdmissionError(400, "logprobs cannot be had with echo: a prompt has none here", "logprobs")

    def the_prompt(self) -> str | list[int]:
        """Return the one prompt: its text or its token ids."""
        prompt: Any = self.prompt
        the_prompt: str | list[int] = prompt[0] if _kind_of_prompt(prompt) in ("_strs", "_lists") else prompt
        return the_prompt


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "_str"
    first = value[0] if value else 0
    return "_strs" if isinstance(first, str) else "_lists" if isinstance(first, list) else "_ids"


class _InputMessage(_Message):
    type: Literal["message"] | None = None
    id: _History = None
    status: _History = None
    phase: _History = None


class _FromCaller(Item):
    id: _History = None
    status: _History = None
    caller: Annotated[Any, Refused({"type": "direct"})] = None
    namespace: Annotated[Any, Refused()] = None


class _InputCall(_FromCaller):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: _Arguments
    not_awaited: Annotated[Any, Refused(False)] = Field(None, alias="async")

    def as_template_takes_it(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class _InputCallOutput(_FromCaller):
    type: Literal["function_call_output"]
    call_id: str
    output: _Content
    name: Annotated[Any, NoEffect("of an output: its call has it, too")] = None


class _ReasoningText(Item):
    type: Literal["reasoning_text"] | None = None
    text: str


class _InputReasoning(Item):
    type: Literal["reasoning"]
    content: List[_ReasoningText] | None = None
    id: _History = None
    status: _History = None
    summary: _History = None
    encrypted_content: Annotated[Any, Refused()] = None


class _UnknownInput(Item):
    type: Literal["message", "function_call", "function_call_output", "reasoning"]


_INPUTS = {
    "message": "_message",
    "function_call": "_call",
    "function_call_output": "_output",
    "reasoning": "_reasoning",
}


def _kind_of_item(value: Any) -> str:
    if not isinstance(value, dict):
        return "_message"
    kind = value.get("type")
    kind = "message" if kind is None and "role" in value else kind
    return _INPUTS.get(kind, "_unknown") if isinstance(kind, str) else "_unknown"


def _kind_of_input(value: Any) -> str:
    if not isinstance(value, list):
        return "_str"
    parts = bool(value) and isinstance(value[0], dict) and "role" not in value[0]
    return "_parts" if parts and value[0].get("type") in ("text", "input_text") else "_items"


_InputItem = Annotated[
    Annotated[_InputMessage, Tag("_message")]
    | Annotated[_InputCall, Tag("_call")]
    | Annotated[_InputCallOutput, Tag("_output")]
    | Annotated[_InputReasoning, Tag("_reasoning")]
    | Annotated[_UnknownInput, Tag("_unknown")],
    one_of(_kind_of_item),
]


def _kind_of_tool(value: Any) -> str:
    return "_nested" if isinstance(value, dict) and "function" in value else "_flat"


_INCLUDED_LOGPROBS = "message.output_text.logprobs"


class ResponseBody(_ConversationBody):
    """The body of POST /v1/responses."""

    max_tokens_fields = ("max_output_tokens",)

    input: Annotated[
        Annotated[str, Tag("_str")]
        | Annotated[Items[_Part], Tag("_parts")]
        | Annotated[Items[_InputItem], Tag("_items")],
        one_of(_kind_of_input),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    include: List[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    tools: (
        List[Annotated[Annotated[_FlatTool, Tag("_flat")] | Annotated[_Tool, Tag("_nested")], one_of(_kind_of_tool)]]
        | None
    ) = None
    reasoning: _Reasoning | None = None
    text: _Text | None = None
    image: Annotated[Any, NoEffect("there are no images")] = None
    max_tool_calls: Annotated[Any, NoEffect("it bounds OpenAI's own tools, which are refused")] = None
    access_programs: Annotated[Any, Refused()] = None
    background: Annotated[Any, Refused(False)] = None
    background_options: Annotated[Any, Refused()] = None
    context_management: Annotated[Any, Refused([])] = None
    conversation: Annotated[Any, Refused()] = None
    previous_response_id: Annotated[Any, Refused()] = None
    prompt: Annotated[Any, Refused()] = None
    truncation: Annotated[Any, Refused("disabled")] = None

    def asked_logprobs(self) -> int | None:
        """See `Body`."""
        asked = self.top_logprobs is not None or _INCLUDED_LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if asked else None

    @property
    def reasoning_effort(self) -> str | None:
        """The effort, where chat completions have it."""
        return None if self.reasoning is None else self.reasoning.effort

    def template_messages(self) -> list[dict[str, Any]]:
        """Return instructions and input as the messages that chat templates take."""
        messages: list[dict[str, Any]] = []
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        elif isinstance(self.input[0], (_TextPart, _RefusalPart)):
            messages.append({"role": "user", "content": _text(self.input)})
        else:
            messages.extend(_messages_of(self.input))
        if self.instructions:
            # Before what the input itself begins with, in one message: many templates take no two.
            first = messages[0] if messages and messages[0]["role"] in ("system", "developer") else None
            if first is not None and first["content"]:
                first["content"] = f"{self.instructions}\n\n{first['content']}"
            elif first is not None:
                first["content"] = self.instructions
            else:
                messages.insert(0, {"role": "system", "content": self.instructions})
        return messages

    def echoed_tools(self) -> list[dict[str, Any]]:
        """Return the tools as an answer repeats them."""
        functions = [tool.function if isinstance(tool, _Tool) else tool for tool in self.tools or ()]
        return [
            {
                "type": "function",
                "name": function.name,
                "description": function.description,
                "parameters": function.parameters,
                "strict": function.strict if isinstance(function.strict, bool) else None,
            }
            for function in functions
        ]


def _messages_of(items: list[Any]) -> Iterator[dict[str, Any]]:
    """Join what an assistant thought, said and called, which are items of their own, into messages."""
    open_message: dict[str, Any] | None = None  # an assistant's, which takes calls
    reasoning = ""
    for item in items:
        if isinstance(item, _InputReasoning):
            reasoning += "".join(part.text for part in item.content or ())
            continue
        if isinstance(item, _InputCall):
            if open_message is None:
                open_message = {"role": "assistant", "content": ""}
                if reasoning:
                    open_message["reasoning_content"], reasoning = reasoning, ""
            open_message.setdefault("tool_calls", []).append(item.as_template_takes_it())
            continue
        if open_message is not None:
            yield open_message
            open_message = None
        if isinstance(item, _InputCallOutput):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            continue
        message = item.as_template_takes_it()
        if message["role"] != "assistant":
            yield message
            continue
        if reasoning:
            message["reasoning_content"], reasoning = reasoning, ""
        open_message = message
    if open_message is not None:
        yield open_message


ROUTES: Mapping[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponseBody,
}


def tables() -> str:
    """Make the lists of docs/operating.md: fields that are honoured, refused, and without effect."""
    marks: dict[str, dict[str, Refused | NoEffect | None]] = {}
    for route, model in ROUTES.items():
        for path, mark in declared(model):
            marks.setdefault(path, {})[route.removeprefix("/v1/")] = mark

    def rows(kind: type, cell: Callable[[Any], str]) -> list[str]:
        of_kind = {
            path: {route: mark for route, mark in by_route.items() if isinstance(mark, kind)}
            for path, by_route in sorted(marks.items())
        }
        return [
            f"| `{path}` | {', '.join(by_route)} | {cell(next(iter(by_route.values())))} |"
            for path, by_route in of_kind.items()
            if by_route
        ]

    def honoured(route: str) -> list[str]:
        names = [
            f"`{path}`" for path, by in sorted(marks.items()) if by.get(route, ...) is None and path.isidentifier()
        ]
        return textwrap.wrap(f"- {route}: {', '.join(names)}", 120, subsequent_indent="  ", break_long_words=False)

    refused = rows(Refused, lambda mark: ", ".join(f"`{json.dumps(off)}`" for off in mark.off))
    without = rows(NoEffect, lambda mark: mark.why)
    head = "| -- | -- | -- |"
    lines = [
        *(
            "Fields that are honoured:",
            "",
            *(line for route in ROUTES for line in honoured(route.removeprefix("/v1/"))),
        ),
        *("", "| field that is refused | of | unless it is null or |", head, *refused),
        *("", "| field without effect | of | why that does no harm |", head, *without),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
