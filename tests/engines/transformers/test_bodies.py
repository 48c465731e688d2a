"""Bodies of the OpenAI routes: what is wrong is named, what has no effect is dropped."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from poc_kernels.engines.transformers import fields
from poc_kernels.engines.transformers.bodies import Body, ChatBody, CompletionBody, ResponseBody
from poc_kernels.engines.transformers.fields import checked, parse
from poc_kernels.engines.transformers.sampling import Sampling
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


def with_item(**fields: Any) -> dict[str, Any]:
    return {"input": [USER, fields]}


WRONG: list[tuple[type[Body], dict[str, Any], str]] = [
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
    (ChatBody, chat(no_such_field=1), "no_such_field"),
    (ChatBody, chat(top_logprobs=2), "top_logprobs"),
    (ChatBody, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (ChatBody, chat(logprobs=2), "logprobs"),
    (ChatBody, chat(response_format={"type": "json_object"}), "response_format.type"),
    (ChatBody, chat(tool_choice="required", tools=[TOOL]), "tool_choice"),
    (ChatBody, chat(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
    (ChatBody, chat(functions=[{"name": "f"}]), "functions"),
    (ChatBody, chat(stream_options={"include_everything": True}), "stream_options.include_everything"),
    (ChatBody, with_message(function_call={"name": "f", "arguments": "{}"}), "messages.0.function_call"),
    (ChatBody, with_message(tool_calls=[{**CALL, "type": "custom"}]), "messages.0.tool_calls.0.type"),
    (ChatBody, chat(presence_penalty=2.5), "presence_penalty"),
    (ChatBody, chat(top_k=-2), "top_k"),
    (ChatBody, chat(min_p=2), "min_p"),
    (ChatBody, chat(repetition_penalty=0), "repetition_penalty"),
    (ChatBody, chat(repetition_penalty=1e39), "repetition_penalty"),
    (ChatBody, chat(repetition_penalty=1e-46), "repetition_penalty"),
    (ChatBody, chat(logit_bias={"a": 1}), "logit_bias.a"),
    (ChatBody, chat(logit_bias={"5": 101}), "logit_bias.5"),
    (ChatBody, chat(stop=[""]), "stop.0"),
    (ChatBody, chat(stop=["a"] * 17), "stop"),
    (ChatBody, chat(tools={}), "tools"),
    (ChatBody, chat(tools=[{"type": "web_search"}]), "tools.0.type"),
    (ChatBody, chat(tools=[{"type": "function"}]), "tools.0.function"),
    (ChatBody, chat(temperature="hot"), "temperature"),
    (ChatBody, chat(temperature=-1), "temperature"),
    (ChatBody, chat(top_p=1.5), "top_p"),
    (ChatBody, chat(seed="x"), "seed"),
    (ChatBody, chat(logit_bias=[1]), "logit_bias"),
    (ChatBody, chat(logit_bias={f"a{place}": 1 for place in range(1025)}), "logit_bias"),
    (ChatBody, chat(stop=5), "stop"),
    (ChatBody, chat(stop=["a", 5]), "stop.1"),
    (ChatBody, chat(generation_config="{}"), "generation_config"),
    (ChatBody, chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template_kwargs.chat_template"),
    (ChatBody, chat(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs.tokenize"),
    (CompletionBody, {}, "prompt"),
    (CompletionBody, {"prompt": ["hello", "you"]}, "prompt"),
    (CompletionBody, {"prompt": [[5], [6]]}, "prompt"),
    (CompletionBody, {"prompt": [5, "a"]}, "prompt.1"),
    (CompletionBody, {"prompt": 5}, "prompt"),
    (CompletionBody, prompt(suffix="x"), "suffix"),
    (CompletionBody, prompt(echo=True, logprobs=1), "logprobs"),
    (CompletionBody, prompt(logprobs=True), "logprobs"),
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
    (ResponseBody, user_input(tools=[{"type": "web_search"}]), "tools.0.type"),
    (ResponseBody, user_input(text={"format": {"type": "json_object"}}), "text.format.type"),
    (ResponseBody, user_input(include=["web_search_call.results"]), "include.0"),
    (ResponseBody, user_input(previous_response_id="resp_1"), "previous_response_id"),
    (ResponseBody, user_input(truncation="auto"), "truncation"),
    (ResponseBody, with_item(type="function_call", call_id="1", name="f", arguments="{"), "input.1.arguments"),
    (ResponseBody, with_item(type="function_call", name="f", arguments="{}"), "input.1.call_id"),
    (ResponseBody, with_item(type="function_call", call_id=5, name="f", arguments="{}"), "input.1.call_id"),
    (ResponseBody, with_item(type="function_call_output", call_id="1", output=None), "input.1.output"),
    (ResponseBody, with_item(type="function_call_output", output="x"), "input.1.call_id"),
    (ResponseBody, with_item(type="item_reference", id="x"), "input.1.type"),
    (ResponseBody, with_item(role="user", content=[{"type": "input_image"}]), "input.1.content.0.type"),
    (ResponseBody, {"input": [USER, 5]}, "input.1"),
]


@pytest.mark.parametrize(("model", "body", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(model: type[Body], body: dict[str, Any], param: str) -> None:
    with pytest.raises(AdmissionError) as caught:
        checked(body, model)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatBody, chat(stream=True, max_tokens=5, n=1, tools=[TOOL], user="me", chat_template_kwargs={})),
        (ChatBody, chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")),
        (ChatBody, chat(tool_choice="auto", parallel_tool_calls=False, response_format={"type": "text"})),
        (ChatBody, chat(logprobs=False, top_logprobs=0, functions=[], verbosity="medium", store=True)),
        (CompletionBody, prompt(suffix="", stream=False, logprobs=False, echo=True, best_of=1)),
        (ResponseBody, user_input(previous_response_id=None, store=False, background=False, truncation="disabled")),
        (ResponseBody, user_input(text={"format": {"type": "text"}}, include=["message.output_text.logprobs"])),
        (ResponseBody, user_input(tools=[{"type": "function", "name": "f", "strict": True}, TOOL], instructions="x")),
    ],
)
def test_what_is_right_is_taken(model: type[Body], body: dict[str, Any]) -> None:
    checked(body, model)


def shown(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a chat template is shown of a body."""
    return checked(body, ChatBody if "messages" in body else ResponseBody).template_messages()


def test_messages_as_templates_take_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert shown(with_message(content=parts)) == [{"role": "user", "content": "a b"}]
    assert shown({"messages": [{**USER, "name": "me", "tool_calls": None}]}) == [{**USER, "name": "me"}]
    assert shown(with_message(refusal="no")) == [{"role": "user", "content": "no"}]
    for arguments, value in (('{"a": 1}', {"a": 1}), ("", {}), (" ", {}), ({"b": 2}, {"b": 2})):
        call = {**CALL, "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": "so", "tool_calls": [call], "reasoning_content": "hm"}
        expected = {**message, "tool_calls": [{**call, "function": {"name": "f", "arguments": value}}]}
        assert shown({"messages": [message]}) == [expected]
    tool = {"role": "tool", "tool_call_id": "1", "content": "x"}
    assert shown({"messages": [tool]}) == [tool]


def test_items_of_a_response_become_messages() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    items = [
        USER,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "content": [{"text": "oh"}]},
        call,
    ]
    assert shown({"input": items, "instructions": "Be brief."}) == [
        {"role": "system", "content": "Be brief."},
        USER,
        {
            "role": "assistant",
            "content": "so",
            "reasoning_content": "hm",
            "tool_calls": [called, {**called, "id": "2"}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "assistant", "content": "", "reasoning_content": "oh", "tool_calls": [called]},
    ]
    assert shown({"input": [{"type": "input_text", "text": "a"}]}) == [{"role": "user", "content": "a"}]
    for role in ("system", "developer"):  # neither is dropped
        both = shown({"input": [{"role": role, "content": "Rhyme."}, USER], "instructions": "Be brief."})
        assert both == [{"role": role, "content": "Be brief.\n\nRhyme."}, USER]
    assert shown({"input": [{"role": "system", "content": ""}], "instructions": "a"})[0]["content"] == "a"


@pytest.mark.parametrize(
    ("given", "taken"), [("a", "a"), (["a"], "a"), ([5, 6], [5, 6]), ([[5, 6]], [5, 6]), ([[]], []), ("", "")]
)
def test_one_prompt_in_any_of_its_forms(given: Any, taken: Any) -> None:
    assert checked({"prompt": given}, CompletionBody).the_prompt() == taken


def test_sampling_is_the_bodys_and_else_the_servers() -> None:
    server = Sampling(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert checked(chat(), ChatBody).sampling(server) == server
    asked = checked(
        chat(temperature=0, top_k=-1, seed=3, logit_bias={"5": -2}, logprobs=True, top_logprobs=5, min_p=None), ChatBody
    )
    expected = Sampling(temperature=0, top_k=0, repetition_penalty=1.1, seed=3, logit_bias={5: -2}, logprobs=5)
    assert asked.sampling(server) == expected
    assert checked(prompt(logprobs=0), CompletionBody).asked_logprobs() == 0
    assert checked(prompt(logprobs=False), CompletionBody).asked_logprobs() is None
    assert checked(user_input(top_logprobs=2), ResponseBody).asked_logprobs() == 2
    assert checked(user_input(include=["message.output_text.logprobs"]), ResponseBody).asked_logprobs() == 0
    assert checked(user_input(), ResponseBody).asked_logprobs() is None


def test_of_two_bounds_the_smaller_holds() -> None:
    assert checked(chat(max_tokens=4, max_completion_tokens=4), ChatBody).new_tokens()[0] == 4
    assert checked(chat(max_tokens=5, max_completion_tokens=4), ChatBody).new_tokens() == (4, "max_completion_tokens")
    assert checked(chat(max_completion_tokens=None), ChatBody).new_tokens() == (None, "max_tokens")


def test_fields_without_effect_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    fields._say_no_effect.cache_clear()
    with caplog.at_level(logging.INFO, "poc_kernels"):
        checked(chat(user="me", store=None), ChatBody)
        checked(chat(user="you", service_tier="auto"), ChatBody)
    said = [record.getMessage().split()[2] for record in caplog.records]
    assert said == ["user,", "service_tier,"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"seed": %s}' % (b"1" * 5000), "too many digits"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"top_p": NaN}', "no NaN"),
        (b'{"top_p": -Infinity}', "no -Infinity"),
        (b'{"messages": [{"role": "user"}], "metadata": [-1e400]}', "has a number that is too large: -1e400$"),
        (b'{"messages": [{"role": "user"}], "top_p": 1e400, "user": 1e400}', "^top_p is wrong"),
        (b'{"a": 1', "line 1 column"),
        (b"\xff", "UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b'{"messages": [{"role": "\\ud800"}]}', "surrogate"),
    ],
)
def test_a_body_that_is_no_json_says_why(content: bytes, words: str) -> None:
    with pytest.raises(AdmissionError, match=words) as refused:
        parse(content, ChatBody)
    assert refused.value.status == 400
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("depth", [200, 300, 600, 900, 100_000])
def test_depth_is_bounded_wherever_it_lies(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    arguments = '{"a": ' + deep + "}"
    parameters = {"a": "DEEP"}
    for model, body in (
        (ChatBody, chat(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])),
        (ChatBody, with_message(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])),
        (ResponseBody, user_input(tools=[{"type": "function", "name": "f", "parameters": parameters}])),
        (ResponseBody, user_input(metadata="DEEP")),
    ):
        content = json.dumps(body).replace('"DEEP"', deep).encode()
        if depth == 200:
            parse(content, model)
            continue
        with pytest.raises(AdmissionError, match="nested too deeply") as refused:
            parse(content, model)
        assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (r'{"a": "\ud800"}', "has a lone surrogate"),
        ('{"a": NaN}', "has no NaN"),
        ('{"a": 1e400}', "has a number that is too large: 1e400"),
        ('{"a": ' + "1" * 5000 + "}", "must be JSON"),
        ("[]", "must be a JSON object"),
    ],
)
def test_arguments_of_a_call_are_checked_as_bodies_are(arguments: str, words: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(AdmissionError, match=f"arguments is wrong: .*{words}") as refused:
        checked({"messages": [{"role": "assistant", "tool_calls": [call]}]}, ChatBody)
    assert refused.value.param == "messages.0.tool_calls.0.function.arguments"


def test_a_refusal_does_not_repeat_all_that_was_sent() -> None:
    for body in ({"a" * 10**6: 1}, chat(logit_bias={"b" * 10**6: 1})):
        with pytest.raises(AdmissionError) as refused:
            checked(body, ChatBody)
        assert len(refused.value.message) + len(refused.value.param or "") < 1500


@pytest.mark.parametrize("field", ["stream_options", "logit_bias"])
def test_of_much_that_is_wrong_a_few_errors_are_made(field: str) -> None:
    """An error of each of a hundred thousand keys would keep all other threads waiting for a second."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate(chat(**{field: {f"key{place}": "a" for place in range(2000)}}))
    assert 1 <= caught.value.error_count() <= 20


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udfff": 1}', r'{"a": [{"b": ["\ud83d"]}]}'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(AdmissionError, match="surrogate"):
        fields.check_encodable(json.loads(text))
    fields.check_encodable({"a": "\U0001f600"})


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
def test_any_body_is_taken_or_refused(model: type[Body], body: dict[str, Any]) -> None:
    with contextlib.suppress(AdmissionError):
        checked(body, model)


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
def test_a_body_of_wrong_items_is_refused_at_the_first(model: type[Body], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() < 20
    with pytest.raises(AdmissionError):
        checked(body, model)
