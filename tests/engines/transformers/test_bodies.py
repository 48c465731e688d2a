"""Bodies of the OpenAI routes: what is wrong is named, what has no effect is dropped."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from poc_kernels.engines.transformers import bodies
from poc_kernels.engines.transformers.bodies import ChatBody, CompletionBody, ResponseBody, cleaned
from poc_kernels.service.errors import AdmissionError

USER = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], **fields}


def prompt(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", **fields}


def user_input(**fields: Any) -> dict[str, Any]:
    return {"input": "hello", **fields}


def with_message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **fields}]}


WRONG: list[tuple[type[Any], dict[str, Any], str]] = [
    (ChatBody, {}, "messages"),
    (ChatBody, {"messages": "hello"}, "messages"),
    (ChatBody, {"messages": []}, "messages"),
    (ChatBody, {"messages": ["hello"]}, "messages.0"),
    (ChatBody, {"messages": [USER, {"content": "x"}]}, "messages.1.role"),
    (ChatBody, {"messages": [{"role": 1, "content": "x"}]}, "messages.0.role"),
    (ChatBody, with_message(content=5), "messages.0.content"),
    (ChatBody, with_message(content=[{"type": "text"}]), "messages.0.content.0.text"),
    (ChatBody, with_message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content.0.type"),
    (ChatBody, with_message(tool_calls=5), "messages.0.tool_calls"),
    (ChatBody, with_message(tool_calls=[{"function": {"name": "f"}}]), "messages.0.tool_calls.0.function.arguments"),
    (
        ChatBody,
        with_message(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
        "messages.0.tool_calls.0.function.arguments",
    ),
    (
        ChatBody,
        with_message(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "messages.0.tool_calls.0.function.arguments",
    ),
    (ChatBody, with_message(tool_call_id=5), "messages.0.tool_call_id"),
    (ChatBody, chat(stream="yes"), "stream"),
    (ChatBody, chat(stream=1), "stream"),
    (ChatBody, chat(max_tokens="5"), "max_tokens"),
    (ChatBody, chat(max_tokens=5.5), "max_tokens"),
    (ChatBody, chat(max_tokens=True), "max_tokens"),
    (ChatBody, chat(max_completion_tokens=[]), "max_completion_tokens"),
    (ChatBody, chat(n=2), "n"),
    (ChatBody, chat(tools={}), "tools"),
    (ChatBody, chat(tools=[{"type": "web_search"}]), "tools.0.type"),
    (ChatBody, chat(tools=[{"type": "function"}]), "tools.0.function"),
    (ChatBody, chat(temperature="hot"), "temperature"),
    (ChatBody, chat(temperature=-1), "temperature"),
    (ChatBody, chat(top_p=1.5), "top_p"),
    (ChatBody, chat(seed="x"), "seed"),
    (ChatBody, chat(logit_bias=[1]), "logit_bias"),
    (ChatBody, chat(stop=5), "stop"),
    (ChatBody, chat(generation_config="{}"), "generation_config"),
    (ChatBody, chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template_kwargs.chat_template"),
    (ChatBody, chat(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs.tokenize"),
    (CompletionBody, {}, "prompt"),
    (CompletionBody, {"prompt": ["hello"]}, "prompt"),
    (CompletionBody, prompt(suffix=5), "suffix"),
    (CompletionBody, prompt(best_of=2), "best_of"),
    (ResponseBody, {}, "input"),
    (ResponseBody, {"input": 5}, "input"),
    (ResponseBody, {"input": []}, "input"),
    (ResponseBody, {"input": [{"type": "input_image"}]}, "input.0.type"),
    (ResponseBody, {"input": [USER, {"type": "input_text", "text": "x"}]}, "input.1.type"),
    (ResponseBody, user_input(instructions=5), "instructions"),
    (ResponseBody, user_input(parallel_tool_calls="x"), "parallel_tool_calls"),
    (ResponseBody, user_input(max_output_tokens="5"), "max_output_tokens"),
    (ResponseBody, user_input(tools=[{"type": "function"}]), "tools.0.name"),
]


@pytest.mark.parametrize(("model", "body", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(model: type[Any], body: dict[str, Any], param: str) -> None:
    with pytest.raises(AdmissionError) as caught:
        cleaned(body, model)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatBody, chat(stream=True, max_tokens=5, n=1, tools=[TOOL], user="me", chat_template_kwargs={})),
        (ChatBody, chat(chat_template_kwargs={"enable_thinking": False})),
        (ChatBody, with_message(content=[{"type": "text", "text": "x"}])),
        (ChatBody, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}]}),
        (CompletionBody, prompt(suffix="x", stream=False)),
        (ResponseBody, {"input": [USER]}),
        (ResponseBody, {"input": [{"type": "input_text", "text": "x"}]}),
        (ResponseBody, {"input": [USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}]}),
        (ResponseBody, {"input": [USER, {"type": "reasoning", "content": [{"text": "x"}]}]}),
        (ResponseBody, user_input(tools=[{"type": "function", "name": "f"}, TOOL], instructions="x")),
    ],
)
def test_what_is_right_stays(model: type[Any], body: dict[str, Any]) -> None:
    assert cleaned(body, model) == body


def test_nulls_go() -> None:
    message = {**USER, "tool_calls": None, "name": None}
    body = {"messages": [message], "max_tokens": None, "stream": None, "temperature": None}
    assert cleaned(body, ChatBody) == {"messages": [USER]}


def test_fields_without_effect_go_and_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies._warn_ignored.cache_clear()
    given_fields = {
        "seed": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "logit_bias": {"5": 1},
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "stop": ["x"],
    }
    assert set(given_fields) == set(bodies.IGNORED)
    with caplog.at_level(logging.WARNING, "poc_kernels"):
        assert cleaned(chat(**given_fields), ChatBody) == chat()
        assert cleaned(chat(**given_fields), ChatBody) == chat()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(given_fields)
    assert all(any(f"set {field}," in message for message in said) for field in given_fields)


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udfff": 1}', r'{"a": [{"b": ["\ud83d"]}]}'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(AdmissionError, match="surrogate"):
        bodies.check_encodable(json.loads(text))
    bodies.check_encodable({"a": "\U0001f600"})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "messages",
    "prompt",
    "input",
    "role",
    "content",
    "tools",
    "type",
    "text",
    "tool_calls",
    "stream",
    "n",
    "stop",
]


@given(
    model=st.sampled_from([ChatBody, CompletionBody, ResponseBody]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6),
)
def test_any_body_is_cleaned_or_refused(model: type[Any], body: dict[str, Any]) -> None:
    with contextlib.suppress(AdmissionError):
        assert cleaned(body, model).keys() <= body.keys()


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatBody, {"messages": [0] * 200_000}),
        (ChatBody, chat(messages=[{"role": "user", "content": [{}] * 200_000}])),
        (ChatBody, chat(messages=[{"role": "user", "tool_calls": [0] * 200_000}])),
        (ChatBody, chat(tools=[{}] * 200_000)),
        (ChatBody, chat(stop=[0] * 200_000)),
        (ResponseBody, {"input": [{}] * 200_000}),
        (ResponseBody, {"input": "hello", "tools": [0] * 200_000}),
    ],
)
def test_a_body_of_wrong_items_is_refused_at_the_first(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() < 20
    with pytest.raises(AdmissionError):
        cleaned(body, model)
