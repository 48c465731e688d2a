"""Answers over HTTP: what each honoured field does, whole and streamed, and that the openai package takes them."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from served import NAME
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from web import CHAT, TIMEOUT, chat, error_of, events, eventually, text_of

from poc_kernels.engines.transformers import handlers
from poc_kernels.engines.transformers.answers import TokenTexts
from poc_kernels.engines.transformers.generation import Asked, Generation, _Stops
from poc_kernels.engines.transformers.inference import Inference
from poc_kernels.engines.transformers.prompts import Prompts
from poc_kernels.engines.transformers.sampling import Sampling, TokenLogprob

pytestmark = pytest.mark.usefixtures("nothing_stays_in_flight")

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
# What the network's API node adds to each request of its users.
NODE_ADDS = {
    "logprobs": True,
    "top_logprobs": 5,
    "max_tokens": 6,
    "max_completion_tokens": 6,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "seed": 7,
}


def posted(http: httpx2.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def streamed(http: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True}) as stream:
        return list(events(stream.iter_lines()))


def joined(chunks: list[dict[str, Any]], *path: str) -> list[Any]:
    """All that the first choices of chunks list at ``path``."""
    found: list[Any] = []
    for chunk in chunks:
        value: Any = chunk["choices"][0] if chunk["choices"] else {}
        for name in path:
            value = (value or {}).get(name)
        found += value or []
    return found


def test_what_the_networks_api_node_sends(http: httpx2.Client, inference: Inference) -> None:
    whole = posted(http, CHAT, chat(**NODE_ADDS))
    ChatCompletion.model_validate(whole)
    choice, tokenizer = whole["choices"][0], inference.tokenizer
    told = choice["logprobs"]["content"]
    assert len(told) == len(choice["token_ids"]) == whole["usage"]["completion_tokens"] == 6
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert [each["token"] for each in told] == [tokenizer.decode([token]) for token in choice["token_ids"]]
    assert "".join(each["token"] for each in told) == choice["message"]["content"]
    for each in told:
        assert len(each["top_logprobs"]) == 5
        assert each["top_logprobs"][0] == {key: each[key] for key in ("token", "logprob", "bytes")}  # greedy
        logprobs = [other["logprob"] for other in each["top_logprobs"]]
        assert logprobs == sorted(logprobs, reverse=True)
        assert bytes(each["bytes"]).decode() == each["token"]

    chunks = streamed(http, CHAT, chat(**NODE_ADDS, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert joined(chunks, "logprobs", "content") == told
    assert joined(chunks, "token_ids") == choice["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_usage_of_a_stream(http: httpx2.Client) -> None:
    chunks = streamed(http, CHAT, chat(max_tokens=3, stream_options={"include_usage": False}))
    assert not any("usage" in chunk for chunk in chunks)
    chunks = streamed(http, COMPLETIONS, {"prompt": "a", "max_tokens": 3})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk] == [3]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_logprobs_and_ids_of_completions(http: httpx2.Client, inference: Inference) -> None:
    body = {"prompt": "A proof is", "max_tokens": 6, "logprobs": 2, "return_token_ids": True}
    whole = posted(http, COMPLETIONS, body)
    Completion.model_validate(whole)
    choice = whole["choices"][0]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert [len(choice["text"][:offset]) for offset in told["text_offset"]] == told["text_offset"]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())
    assert choice["prompt_token_ids"] == inference.tokenizer("A proof is")["input_ids"]
    chunks = streamed(http, COMPLETIONS, body)
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert joined(chunks, "logprobs", name) == told[name]
    assert joined(chunks, "token_ids") == choice["token_ids"]
    assert "logprobs" not in posted(http, CHAT, chat(max_tokens=1))["choices"][0]


def test_temperature_and_seed(http: httpx2.Client) -> None:
    greedy = text_of(http.post(CHAT, json=chat(max_tokens=12)))
    drawn = {"max_tokens": 12, "temperature": 1.0}
    bodies = [chat(**drawn, seed=1), chat(**drawn, seed=1), chat(**drawn, seed=2), chat(max_tokens=12, temperature=0)]
    with ThreadPoolExecutor(4) as pool:
        one, again, other, cold = pool.map(lambda body: text_of(http.post(CHAT, json=body)), bodies)
    assert one == again != other
    assert cold == greedy != one
    assert text_of(http.post(CHAT, json=chat(**drawn, seed=5, top_k=1))) == greedy
    assert text_of(http.post(CHAT, json=chat(**drawn, seed=5, top_p=0))) == greedy


def test_a_stop_string_ends_the_answer_and_the_request(http: httpx2.Client) -> None:
    body = {"prompt": "A proof is", "max_tokens": 60}
    whole = posted(http, COMPLETIONS, body)["choices"][0]["text"]
    for stop in (whole[9:14], whole[3:4], whole[20:40]):
        expected = whole[: whole.index(stop)]
        for asked in (stop, ["\x00never", stop]):
            ended = posted(http, COMPLETIONS, {**body, "stop": asked})
            assert ended["choices"][0]["text"] == expected
            assert ended["choices"][0]["finish_reason"] == "stop"
            assert ended["usage"]["completion_tokens"] < 60
        chunks = streamed(http, COMPLETIONS, {**body, "stop": stop})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    # What only begins like a stop string is told in the end.
    nearly = whole[-5:] + "\x00"
    assert posted(http, COMPLETIONS, {**body, "stop": nearly})["choices"][0] == {
        "index": 0,
        "text": whole,
        "logprobs": None,
        "finish_reason": "length",
    }
    content = text_of(http.post(CHAT, json=chat(max_tokens=40)))
    assert (
        text_of(http.post(CHAT, json=chat(max_tokens=40, stop=content[8:12])))
        == content[: content.index(content[8:12])]
    )


@given(stop=st.text("ab", min_size=1, max_size=4), parts=st.lists(st.text("abc", max_size=5), max_size=8))
def test_a_stop_string_is_found_however_the_text_comes(stop: str, parts: list[str]) -> None:
    stops, told, stopped = _Stops([stop]), "", False
    for part in parts:
        text, stopped = stops.feed(part)
        told += text
        assert stop not in told
        if stopped:
            break
    whole, found, _ = "".join(parts).partition(stop)
    assert stopped == bool(found)
    assert told + ("" if stopped else stops.held) == whole


def test_tokens_that_end_an_answer(http: httpx2.Client, inference: Inference) -> None:
    end, special = inference.tokenizer.eos_token_id, inference.tokenizer.all_special_ids
    body = {"prompt": "a", "max_tokens": 3, "return_token_ids": True}

    def ended(token: int, **fields: Any) -> tuple[Any, ...]:
        choice = posted(http, COMPLETIONS, {**body, "logit_bias": {str(token): 100}, **fields})["choices"][0]
        return choice["token_ids"], choice["text"], choice["finish_reason"]

    shown = inference.tokenizer.decode([end])
    assert ended(end) == ([end], "", "stop")
    assert ended(end, skip_special_tokens=False) == ([end], "", "stop")
    assert ended(end, ignore_eos=True) == ([end] * 3, "", "length")
    assert ended(end, ignore_eos=True, skip_special_tokens=False) == ([end] * 3, shown * 3, "length")
    assert ended(9, stop_token_ids=[9]) == ([9], "", "stop")
    other = next(token for token in special if token != end)
    assert ended(other)[1] == ""
    assert ended(other, skip_special_tokens=False)[1] == inference.tokenizer.decode([other]) * 3
    chunks = streamed(http, COMPLETIONS, {**body, "logit_bias": {str(end): 100}, "ignore_eos": True})
    assert joined(chunks, "token_ids") == [end] * 3  # of tokens without text too


def test_tokens_outside_the_vocabulary_are_refused(http: httpx2.Client) -> None:
    for body, param in (
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"prompt": [0, 999999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[2**70]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
    ):
        for echo in (False, True):
            answer = http.post(COMPLETIONS, json={**body, "echo": echo})
            assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_prompts_in_all_their_forms_and_echo(http: httpx2.Client, inference: Inference) -> None:
    ids = inference.tokenizer("A proof is")["input_ids"]
    texts = {
        posted(http, COMPLETIONS, {"prompt": prompt, "max_tokens": 4})["choices"][0]["text"]
        for prompt in ("A proof is", ["A proof is"], ids, [ids])
    }
    (text,) = texts
    for prompt in ("A proof is", [ids]):
        body = {"prompt": prompt, "max_tokens": 4, "echo": True}
        assert posted(http, COMPLETIONS, body)["choices"][0]["text"] == "A proof is" + text
        chunks = streamed(http, COMPLETIONS, body)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "A proof is" + text


def test_responses_are_the_openai_packages(http: httpx2.Client) -> None:
    body = {"input": "What is a proof?", "max_output_tokens": 4, "top_logprobs": 1, "metadata": {"a": "b"}}
    whole = posted(http, RESPONSES, {**body, "include": ["message.output_text.logprobs"]})
    Response.model_validate(whole)
    part = whole["output"][0]["content"][0]
    assert len(part["logprobs"]) == 4
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
    assert (whole["status"], whole["metadata"]) == ("incomplete", {"a": "b"})
    told = streamed(http, RESPONSES, body)
    for event in told:
        RESPONSE_EVENT.validate_python(event)
    assert told[-1]["type"] == "response.incomplete"
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    assert [each for event in deltas for each in event["logprobs"]] == part["logprobs"]
    assert told[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]


def test_the_openai_client(http: httpx2.Client) -> None:
    user = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", timeout=TIMEOUT, max_retries=0)
    messages: Any = [{"role": "user", "content": "What is a proof?"}]
    whole = user.chat.completions.create(model=NAME, messages=messages, logprobs=True, top_logprobs=2, max_tokens=24)
    content, told = whole.choices[0].message.content or "", whole.choices[0].logprobs
    assert told is not None
    assert len(told.content or ()) == 24
    stop = content[10:13]
    chunks = list(user.chat.completions.create(model=NAME, messages=messages, stop=stop, max_tokens=24, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content[: content.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    with user.chat.completions.stream(model=NAME, messages=messages, stop=stop, max_tokens=24) as stream:
        assert stream.get_final_completion().choices[0].message.content == content[: content.index(stop)]
    cut = user.responses.create(model=NAME, input="Hello", max_output_tokens=2)
    assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with user.responses.stream(model=NAME, input="Hello", max_output_tokens=2) as stream_of_response:
        kinds = [event.type for event in stream_of_response]
    assert kinds[-1] == "response.incomplete"
    assert user.completions.create(model=NAME, prompt=["a"], max_tokens=2, echo=True).choices[0].text.startswith("a")
    with pytest.raises(openai.BadRequestError) as refused:
        user.chat.completions.create(model=NAME, messages=messages, response_format={"type": "json_object"})
    assert refused.value.param == "response_format.type"


# ---- answers with reasoning and tool calls, which a random model never gives ----

SAYS = (
    "<think>\nLet me see.\n</think>\n\nSo:\n"
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def says(inference: Inference, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the model say a text."""
    monkeypatch.setattr(inference.model.config, "model_type", "qwen3")

    def say(text: str, finished: bool = True) -> None:
        tokens = inference.tokenizer(text)["input_ids"]
        end = [inference.tokenizer.eos_token_id] if finished else []

        def submit(request_id: str, _: Any, config: Any, streaming: bool, on_output: Any, *__: Any) -> None:
            loop = asyncio.get_running_loop()
            whole = [*tokens, *end]
            for size in range(1 if streaming else len(whole), len(whole) + 1):
                output = SimpleNamespace(
                    generated_tokens=whole[:size],
                    logprobs=[TokenLogprob(-1.0, ())] * size,
                    error=None,
                    is_finished=lambda s=size: s == len(whole),
                )
                loop.call_soon(on_output, output)

        monkeypatch.setattr(inference, "submit", submit)

    return say


def test_reasoning_and_tool_calls(http: httpx2.Client, says: Any) -> None:
    says(SAYS)
    choice = posted(http, CHAT, chat())["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["reasoning_content"].strip() == "Let me see."
    assert message["content"].strip() == "So:"
    called = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert called == [("f", {"a": 1}), ("g", {})]
    chunks = streamed(http, CHAT, chat())
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_message_has_its_own_log_probabilities_whole_and_streamed(http: httpx2.Client, says: Any) -> None:
    says(SAYS)
    body = {"input": "a", "top_logprobs": 1}
    whole = posted(http, RESPONSES, body)
    (message,) = (item for item in whole["output"] if item["type"] == "message")
    told = message["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in told).endswith("So:")
    assert "see" not in "".join(entry["token"] for entry in told)
    (streamed_message,) = (
        item for item in streamed(http, RESPONSES, body)[-1]["response"]["output"] if item["type"] == "message"
    )
    assert streamed_message["content"][0]["logprobs"] == told


def test_one_tool_call_where_several_are_not_wanted(http: httpx2.Client, says: Any) -> None:
    says(SAYS)
    for path, body in ((CHAT, chat()), (RESPONSES, {"input": "a"})):
        body = {**body, "parallel_tool_calls": False}
        if path == CHAT:
            (call,) = posted(http, path, body)["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == "f"
            (call,) = joined(streamed(http, path, body), "delta", "tool_calls")
        else:
            (item,) = (item for item in posted(http, path, body)["output"] if item["type"] == "function_call")
            assert item["name"] == "f"


def test_responses_with_reasoning_and_tool_calls(http: httpx2.Client, says: Any) -> None:
    says(SAYS)
    whole = posted(http, RESPONSES, {"input": "a"})
    Response.model_validate(whole)
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert {item["status"] for item in whole["output"]} == {"completed"}
    told = streamed(http, RESPONSES, {"input": "a"})
    for event in told:
        RESPONSE_EVENT.validate_python(event)
    response = told[-1]["response"]
    assert told[-1]["type"] == "response.completed"
    assert [item["type"] for item in response["output"]] == kinds
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == response["output"]
    # A client sends them back as they are.
    says("Good.")
    again = [
        *whole["output"],
        {"type": "function_call_output", "call_id": whole["output"][2]["call_id"], "output": "1"},
    ]
    posted(http, RESPONSES, {"input": [{"role": "user", "content": "a"}, *again]})


@pytest.mark.parametrize(
    "text", ["<think>\nLet me", 'So\n<tool_call>\n{"name": "f", "argu', "So<tool_call>\n{]\n</tool_call>"]
)
def test_an_answer_that_is_cut_off_or_malformed(http: httpx2.Client, says: Any, text: str) -> None:
    says(text, finished=False)
    choice = posted(http, CHAT, chat())["choices"][0]
    assert choice["finish_reason"] == "length"
    assert streamed(http, CHAT, chat())[-1]["choices"][0]["finish_reason"] == "length"
    whole = posted(http, RESPONSES, {"input": "a"})
    Response.model_validate(whole)
    assert whole["status"] == "incomplete"
    assert whole["output"][-1]["type"] == "message"


# ---- the event loop ----


def test_prompts_are_made_in_worker_threads(
    http: httpx2.Client, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def tokenized(self: Prompts, *arguments: Any, **named: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        result: list[int] = original(self, *arguments, **named)
        return result

    original = Prompts._tokenized
    monkeypatch.setattr(Prompts, "_tokenized", tokenized)
    for path, body in ((CHAT, chat()), (COMPLETIONS, {"prompt": "a"}), (RESPONSES, {"input": "a"})):
        posted(http, path, {**body, "max_tokens" if path != RESPONSES else "max_output_tokens": 1})
    assert len(threads) == 3
    assert all(name.startswith("body") for name in threads)


def test_large_prompts_wait_for_each_other_and_nobody_for_them(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, lock, running, most = threading.Event(), threading.Lock(), [0], [0]

    def tokenized(self: Prompts, text: str, *arguments: Any, **named: Any) -> list[int]:
        if len(text) < 10_000:
            result: list[int] = original(self, text, *arguments, **named)
            return result
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        release.wait(TIMEOUT)
        with lock:
            running[0] -= 1
        return [5]

    original = Prompts._tokenized
    monkeypatch.setattr(Prompts, "_tokenized", tokenized)
    with ThreadPoolExecutor(4) as pool:
        large = {"prompt": "a" * handlers._LARGE_BODY, "max_tokens": 1}
        waiting = [pool.submit(posted, http, COMPLETIONS, large) for _ in range(4)]
        try:
            eventually(lambda: running[0] == 1)
            assert http.get("/v1/models").status_code == 200
            text_of(http.post(CHAT, json=chat(max_tokens=1)))
            assert running[0] == 1
        finally:
            release.set()
        assert [each.result(TIMEOUT)["usage"]["prompt_tokens"] for each in waiting] == [1] * 4
    assert most[0] == 1


def test_clients_take_turns_to_have_large_bodies_read() -> None:
    preparation, free, order = handlers.Preparation(), threading.Event(), []

    def prepared(content: bytes) -> None:
        free.wait(TIMEOUT)
        order.append(content[:1])

    async def read() -> None:
        names = zip("aaab", (b"1", b"2", b"3", b"4"), strict=True)
        runs = [preparation.run(client, prepared, name * handlers._LARGE_BODY) for client, name in names]
        tasks = [asyncio.ensure_future(run) for run in runs]
        await asyncio.sleep(0)  # all are waiting
        free.set()
        await asyncio.gather(*tasks)

    asyncio.run(read())
    assert order == [b"1", b"2", b"4", b"3"]


def test_bodies_that_no_template_or_parser_takes(http: httpx2.Client) -> None:
    digits = http.post(CHAT, content=b'{"seed": %s}' % (b"1" * 5000), headers={"content-type": "application/json"})
    assert (digits.status_code, "digits" in error_of(digits)["message"]) == (400, True)
    parameters: Any = 1
    for _ in range(900):
        parameters = {"a": parameters}
    content = json.dumps(chat(max_tokens=1, tools=[{"type": "function", "function": {"name": "f", "parameters": 0}}]))
    content = content.replace('"parameters": 0', f'"parameters": {json.dumps(parameters)}')
    answer = http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)  # where Python's own bound lies higher, it is served
    plain = http.post(CHAT, content=b'{"messages": []}', headers={"content-type": "text/plain"})
    assert (plain.status_code, "application/json" in error_of(plain)["message"]) == (400, True)


def test_tokens_have_the_text_that_they_have_within_a_text(inference: Inference) -> None:
    texts = TokenTexts(inference.tokenizer)
    for text in ("A proof is a proof.", "  two", "caf\u00e9 \u2581 \U0001f600"):
        ids = inference.tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [texts.of(token) for token in ids]
        if "\ufffd" not in "".join(parts):
            assert "".join(parts) == text
    parts = inference.tokenizer("\U0001f600", add_special_tokens=False)["input_ids"]
    assert len(parts) > 1
    assert bytes(byte for part in parts for byte in texts.entry(part, -1.0)["bytes"]) == "\U0001f600".encode()
    assert texts.entry(10**6, -1.0)["bytes"] == []


def of_bytes() -> Tokenizer:
    """A tokenizer as sentencepiece's: what has no token is spelt in tokens of single bytes."""
    vocabulary = {name: n for n, name in enumerate(["<unk>", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@given(parts=st.lists(st.sampled_from([b"a", b"b", b"A", b"\n", b"\xff", b"\xe2", "\u20ac".encode(), b"\xf0\x9f"])))
def test_bytes_that_are_no_character_end_no_stream(parts: list[bytes]) -> None:
    tokenizer = of_bytes()
    tokens = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in b"".join(parts)]
    tokens = [1 if token == 3 + ord("a") else 2 if token == 3 + ord("b") else token for token in tokens]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    asked = Asked(prompt=[1], new_tokens=None, param="max_tokens", sampling=Sampling())
    generation = Generation(SimpleNamespace(tokenizer=fast), "1", asked)  # type: ignore[arg-type]
    text = "".join(map(generation._decoded, tokens)) + generation._tail()
    known = "".join(char for char in b"".join(parts).decode(errors="ignore") if char.isascii())
    assert "".join(char for char in text if char.isascii()) == known or "\ufffd" in text
    if "\ufffd" not in tokenizer.decode(tokens):
        assert text == tokenizer.decode(tokens)
    texts = TokenTexts(fast)
    assert bytes(byte for token in tokens for byte in texts.entry(token, 0.0)["bytes"]) == b"".join(parts)
