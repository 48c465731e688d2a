"""Prompts: what templates are shown, what they raise, and what is never tokenized."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from poc_kernels.engines.transformers import prompts
from poc_kernels.engines.transformers.bodies import ChatBody, CompletionBody, ResponseBody
from poc_kernels.engines.transformers.fields import checked
from poc_kernels.engines.transformers.prompts import Prompts
from poc_kernels.service.errors import AdmissionError

USER = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
TOOL = {"type": "function", "function": {"name": "now"}}
SHOWS_ARGUMENTS = "{%% for m in messages %%}{%% if m.tool_calls %%}%s{%% endif %%}{%% endfor %%}"


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def tokenizer(loaded: Any) -> Any:
    return copy.copy(loaded)


def prompt_of(tokenizer: Any, template: str, max_tokens: int = 4096, **fields: Any) -> str:
    """The text of the prompt that a template makes of a chat."""
    tokenizer.chat_template = template
    body = checked({"messages": [USER], **fields}, ChatBody)
    ids, _ = Prompts(tokenizer).of_chat(body, max_tokens)
    text: str = tokenizer.decode(ids)
    return text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("{{ m.tool_calls[0].function.arguments | tojson }}", '{"a": 1}'),
        ("{% for k, v in m.tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{{ 'call ' + m.tool_calls[0].function.arguments }}", 'call {"a": 1}'),
        ("{{ m.tool_calls[0]['function']['arguments'] }}", '{"a": 1}'),
    ],
)
def test_arguments_come_as_the_template_takes_them(tokenizer: Any, shown: str, expected: str) -> None:
    assert prompt_of(tokenizer, SHOWS_ARGUMENTS % shown, messages=CALLED) == expected


def test_a_tool_without_parameters_takes_nothing(tokenizer: Any) -> None:
    template = "{% for t in tools or [] %}{{ t.function.parameters | tojson }}{% endfor %}."
    assert prompt_of(tokenizer, template, tools=[TOOL]) == '{"type": "object", "properties": {}}.'
    assert prompt_of(tokenizer, template, tools=[TOOL], tool_choice="none") == "."
    assert prompt_of(tokenizer, template) == "."


def test_developers_are_the_system_where_a_template_knows_none(tokenizer: Any) -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert prompt_of(tokenizer, "{{ messages[0].role }}", messages=messages) == "system"
    knows = "{% if messages[0].role == 'developer' %}yes{% endif %}"
    assert prompt_of(tokenizer, knows, messages=messages) == "yes"


def test_the_template_is_handed_effort_and_thinking(tokenizer: Any) -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }}"
    kwargs = {"enable_thinking": False}
    assert prompt_of(tokenizer, template, reasoning_effort="low", chat_template_kwargs=kwargs) == "low False"
    body = checked({"input": "a", "reasoning": {"effort": "high"}}, ResponseBody)
    assert tokenizer.decode(Prompts(tokenizer).of_chat(body, 4096)[0]).startswith("high")


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ messages[5].role }}", "UndefinedError"),
        ("{{ {}['a'].b }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1] }}", "SecurityError"),
        ("{{ raise_exception(messages[0].content * 100000) }}", "hellohello"),
        ("{{ tools | tojson }}", "nested too deeply"),
    ],
)
def test_what_a_template_raises_is_the_clients_fault(tokenizer: Any, template: str, words: str) -> None:
    deep = {"name": "f", "parameters": nested(3000)}
    with pytest.raises(AdmissionError, match=words) as refused:
        prompt_of(tokenizer, template, tools=[{"type": "function", "function": deep}] if "tools" in template else [])
    assert (refused.value.status, refused.value.param) == (400, "messages")
    assert len(refused.value.message) < 400


def test_a_model_without_a_template_says_so_once_and_serves_completions(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = None
    with caplog.at_level(logging.WARNING, "poc_kernels"):
        made = Prompts(tokenizer)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    for body in (checked({"messages": [USER]}, ChatBody), checked({"input": "a"}, ResponseBody)):
        with pytest.raises(AdmissionError, match=r"no chat template.*/v1/completions") as refused:
            made.of_chat(body, 100)
        assert refused.value.status == 400
    assert made.of_completion(checked({"prompt": "hello"}, CompletionBody), 100) == tokenizer("hello")["input_ids"]
    assert made.of_completion(checked({"prompt": [[1, 2]]}, CompletionBody), 100) == [1, 2]


def test_a_prompt_that_cannot_fit_is_never_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(map(len, tokenizer.get_vocab()))
    tokenized: list[int] = []
    made = Prompts(tokenizer)

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **arguments: Any) -> Any:
            tokenized.append(len(text))
            return tokenizer(text, **arguments)

    made._tokenizer = Counted()
    for length, fits in ((8 * longest, True), (8 * longest + 1, False)):
        body = checked({"prompt": "a" * length}, CompletionBody)
        if fits:
            made.of_completion(body, 8)
            continue
        with pytest.raises(AdmissionError) as refused:
            made.of_completion(body, 8)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    with pytest.raises(AdmissionError, match=f"{10**6}|characters"):
        made.of_chat(checked({"messages": [{**USER, "content": "a" * 10**6}]}, ChatBody), 8)
    assert tokenized == [8 * longest]


def backend(model: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Any:
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return SimpleNamespace(backend_tokenizer=made, get_vocab=lambda: {"a": 0, "four": 1})


BYTES = pre_tokenizers.ByteLevel()
UNKNOWN = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [
        (backend(models.BPE(), None, BYTES), 4),
        (backend(models.BPE(), None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES])), 4),
        (backend(models.BPE(), normalizers.NFC(), BYTES), 16),
        (backend(models.BPE(byte_fallback=True), normalizers.Replace(" ", "\u2581")), 4),
        (
            backend(
                models.BPE(byte_fallback=True),
                normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
            ),
            4,
        ),
        # A token may stand for any number of characters, or the text is shortened first.
        (backend(UNKNOWN, None, pre_tokenizers.Whitespace()), None),
        (backend(models.BPE()), None),
        (backend(models.BPE(), normalizers.Strip(), BYTES), None),
        (backend(models.BPE(), normalizers.Replace("  ", " "), BYTES), None),
        (backend(models.BPE(), normalizers.Replace(Regex(" +"), " "), BYTES), None),
        (
            backend(models.BPE(), None, pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTES])),
            None,
        ),
    ],
)
def test_how_many_characters_a_token_can_stand_for(tokenizer: Any, longest: int | None) -> None:
    assert prompts._longest_token(tokenizer) == longest
