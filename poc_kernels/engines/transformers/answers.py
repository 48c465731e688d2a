"""How an answer reads on each OpenAI route, whole and as a stream of events."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import anyio
from pydantic_core import to_json
from transformers.cli.serving.utils import ReasoningText, ToolCall
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...service.errors import AdmissionError
from .admission import ENGINE_FAILED
from .bodies import Body, ChatBody, CompletionBody, ResponseBody
from .generation import Generation, Piece
from .sampling import TokenLogprob

logger = logging.getLogger("poc_kernels")

Event = dict[str, Any]
_B = TypeVar("_B", bound=Body)


class TokenTexts:
    """The text of single tokens, as it is within a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer  # a quarter of the time of the tokenizer's own method
        # Alone, some tokenizers' tokens lose the space that they begin with.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._skipped = len(self._tokenizer.decode(self._before))
        self.of = functools.lru_cache(maxsize=65536)(self._of)
        decoder = self._tokenizer.decoder
        of_bytes = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        chars: dict[int, str] = bytes_to_unicode() if of_bytes else {}  # type: ignore[no-untyped-call]
        self._bytes = {char: byte for byte, char in chars.items()}

    def _of(self, token: int) -> str:
        text: str = self._tokenizer.decode([*self._before, token], skip_special_tokens=False)
        return text[self._skipped :]

    def whole(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def entry(self, token: int, logprob: float) -> Event:
        """Return a token with its log probability, as chats and responses have it."""
        text = self.of(token)
        told = self._bytes_of(token) if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": told}

    def _bytes_of(self, token: int) -> list[int] | None:
        """Return the bytes of a token that has parts of characters; None where they are not known."""
        stored = self._tokenizer.id_to_token(token) or ""
        single = re.fullmatch("<0x([0-9A-F]{2})>", stored)
        if single:
            return [int(single[1], 16)]
        known = bool(stored) and all(char in self._bytes for char in stored)
        return [self._bytes[char] for char in stored] if known else None

    def entries(self, piece: Piece) -> list[Event]:
        """Return the tokens of a piece, each with the likeliest ones in its place."""
        return [
            {**self.entry(token, told.logprob), "top_logprobs": [self.entry(*pair) for pair in told.top]}
            for token, told in zip(piece.token_ids, piece.logprobs, strict=True)
        ]


class Answer(ABC, Generic[_B]):
    """The answer to a body, in a route's own form.

    Args:
        request_id: the answer's id.
        model: name of the model for clients.
        body: the checked body.
        generation: the request, begun.
        texts: the text of tokens.
    """

    def __init__(self, request_id: str, model: str, body: _B, generation: Generation, texts: TokenTexts) -> None:
        self.id, self.model, self.body, self.generation, self.texts = request_id, model, body, generation, texts
        self.created = int(time.time())

    async def whole(self) -> bytes:
        """Return the answer when it is complete.

        Raises:
            AdmissionError: 503; the engine failed.
        """
        async with contextlib.aclosing(self.generation.pieces()) as generated:
            pieces = [piece async for piece in generated]
        return await anyio.to_thread.run_sync(lambda: to_json(self.complete(pieces)))

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events. A failure is the last one, without internals."""
        try:
            yield _sent(self.first())
            async with contextlib.aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    events = _sent(self.next(piece))
                    if events:
                        yield events
            yield _sent(self.last())
        except AdmissionError as error:
            yield _sent(self.failed(error))
        except Exception:
            logger.exception("stream failed", extra={"request_id": self.id})
            yield _sent(self.failed(AdmissionError(500, ENGINE_FAILED, code="engine_failed")))

    @abstractmethod
    def complete(self, pieces: Sequence[Piece]) -> Event:
        """Make the whole answer."""

    @abstractmethod
    def first(self) -> Iterator[Event]:
        """Make the events before any token."""

    @abstractmethod
    def next(self, piece: Piece) -> Iterator[Event]:
        """Make the events of a piece."""

    @abstractmethod
    def last(self) -> Iterator[Event]:
        """Make the events of the end."""

    def failed(self, error: AdmissionError) -> Iterator[Event]:
        """Make the events of a failure."""
        yield error.body()

    def usage(self) -> Event:
        """Count the tokens, as chats and completions do."""
        prompt, completion = len(self.generation.asked.prompt), self.generation.token_count
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def usage_of_stream(self, last: Event) -> Iterator[Event]:
        """Add the usage to the last chunk, or after it, or not at all, as ``stream_options`` asks."""
        options = self.body.stream_options
        asked = None if options is None else options.include_usage
        if asked is None:
            yield {**last, "usage": self.usage()}
            return
        yield last
        if asked:
            yield {**last, "choices": [], "usage": self.usage()}


def _joined(pieces: Sequence[Piece]) -> Piece:
    whole = Piece()
    for piece in pieces:
        whole.add(piece)
    return whole


def _sent(events: Iterator[Event]) -> bytes:
    return b"".join(b"data: " + to_json(event) + b"\n\n" for event in events)


class ChatAnswer(Answer[ChatBody]):
    """The answer of /v1/chat/completions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._calls = 0
        self._untold = Piece()

    def complete(self, pieces: Sequence[Piece]) -> Event:
        """See `Answer`."""
        whole = _joined(pieces)
        said = [item for item in whole.items if isinstance(item, str)]
        message: Event = {"role": "assistant", "content": "".join(x for x in said if not isinstance(x, ReasoningText))}
        reasoning = "".join(item for item in said if isinstance(item, ReasoningText))
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = [self._call(item) for item in whole.items if isinstance(item, ToolCall)]
        if calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason(), **self._told(whole)}
        answer = {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = self.generation.asked.prompt
        return answer

    def first(self) -> Iterator[Event]:
        """See `Answer`."""
        chunk = self._chunk({"role": "assistant", "content": ""})
        if self.body.return_token_ids:
            chunk["prompt_token_ids"] = self.generation.asked.prompt
        yield chunk

    def next(self, piece: Piece) -> Iterator[Event]:
        """See `Answer`. Tokens without text come with the next ones that have some."""
        self._untold.add(piece)
        items, self._untold.items = self._untold.items, []
        for n, item in enumerate(items):
            told = {}
            if n == len(items) - 1:
                told, self._untold = self._told(self._untold), Piece()
            if isinstance(item, ToolCall):
                yield self._chunk({"tool_calls": [self._call(item)]}, **told)
            else:
                yield self._chunk({"reasoning_content" if isinstance(item, ReasoningText) else "content": item}, **told)

    def last(self) -> Iterator[Event]:
        """See `Answer`."""
        told = self._told(self._untold) if self._untold.token_ids else {}
        yield from self.usage_of_stream(self._chunk({}, self._finish_reason(), **told))

    def _head(self, kind: str) -> Event:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: Event, finish_reason: str | None = None, **told: Any) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **told}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _told(self, piece: Piece) -> Event:
        """Return what is told of tokens beside their text."""
        told: Event = {}
        if self.body.logprobs:
            told["logprobs"] = {"content": self.texts.entries(piece), "refusal": None}
        if self.body.return_token_ids:
            told["token_ids"] = piece.token_ids
        return told

    def _call(self, call: ToolCall) -> Event:
        index, self._calls = self._calls, self._calls + 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": index, "id": f"{self.id}_tool_call_{index}", "type": "function", "function": function}

    def _finish_reason(self) -> str | None:
        return "tool_calls" if self._calls else self.generation.finish_reason


class CompletionAnswer(Answer[CompletionBody]):
    """The answer of /v1/completions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._untold = Piece()
        self._offset = 0

    def complete(self, pieces: Sequence[Piece]) -> Event:
        """See `Answer`."""
        whole = _joined(pieces)
        told = self._told(whole)
        if self.body.return_token_ids:
            told["prompt_token_ids"] = self.generation.asked.prompt
        text = self._echo() + "".join(whole.items)
        return {**self._chunk(text, self.generation.finish_reason, **told), "usage": self.usage()}

    def first(self) -> Iterator[Event]:
        """See `Answer`."""
        echo = self._echo()
        if echo or self.body.return_token_ids:
            told: Event = {}
            if self.body.return_token_ids:
                told["prompt_token_ids"] = self.generation.asked.prompt
            yield self._chunk(echo, **told)

    def next(self, piece: Piece) -> Iterator[Event]:
        """See `Answer`. Tokens without text come with the next ones that have some."""
        self._untold.add(piece)
        if self._untold.items:
            untold, self._untold = self._untold, Piece()
            yield self._chunk("".join(untold.items), **self._told(untold))

    def last(self) -> Iterator[Event]:
        """See `Answer`."""
        told = self._told(self._untold) if self._untold.token_ids else {}
        yield from self.usage_of_stream(self._chunk("", self.generation.finish_reason, **told))

    def _echo(self) -> str:
        if not self.body.echo:
            return ""
        prompt = self.body.the_prompt()
        return prompt if isinstance(prompt, str) else self.texts.whole(prompt)

    def _chunk(self, text: str, finish_reason: str | None = None, **told: Any) -> Event:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason, **told}
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "choices": [choice]}

    def _told(self, piece: Piece) -> Event:
        told: Event = {}
        if self.body.asked_logprobs() is not None:
            told["logprobs"] = self._logprobs(piece)
        if self.body.return_token_ids:
            told["token_ids"] = piece.token_ids
        return told

    def _logprobs(self, piece: Piece) -> Event:
        tokens = [self.texts.of(token) for token in piece.token_ids]
        offsets = []
        for text in tokens:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [told.logprob for told in piece.logprobs],
            "top_logprobs": [self._top(told) for told in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, told: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in told.top:  # of tokens with the same text, the likeliest
            top.setdefault(self.texts.of(token), logprob)
        return top


class ResponseAnswer(Answer[ResponseBody]):
    """The answer of /v1/responses. The whole one is the response of the last event."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._numbers = itertools.count()
        self._output: list[Event] = []
        self._open: Event | None = None  # the last one, a message or reasoning, while text is added to it
        self._untold = Piece()

    def complete(self, pieces: Sequence[Piece]) -> Event:
        """See `Answer`."""
        for piece in pieces:
            for _ in self.next(piece):
                pass
        *_, end = self.last()
        response: Event = end["response"]
        return response

    def first(self) -> Iterator[Event]:
        """See `Answer`."""
        yield self._event("created", response=self._response("in_progress"))
        yield self._event("in_progress", response=self._response("in_progress"))

    def next(self, piece: Piece) -> Iterator[Event]:
        """See `Answer`. Tokens without text come with the next ones that have some."""
        self._untold.add(piece)
        items, self._untold.items = self._untold.items, []
        for item in items:
            if isinstance(item, ToolCall):
                yield from self._close("completed")
                yield from self._called(item)
            elif isinstance(item, ReasoningText):
                yield from self._said(item, "reasoning", "reasoning_text")
                self._untold = Piece()  # only messages tell log probabilities
            else:
                yield from self._said(item, "message", "output_text")

    def last(self) -> Iterator[Event]:
        """See `Answer`."""
        complete = self.generation.finish_reason != "length"
        status = "completed" if complete else "incomplete"
        if not any(item["type"] != "reasoning" for item in self._output):
            yield from self._close("completed")
            yield from self._said("", "message", "output_text")
        yield from self._close(status)
        details = None if complete else {"reason": "max_output_tokens"}
        yield self._event(status, response=self._response(status, usage=self._usage(), incomplete_details=details))

    def failed(self, error: AdmissionError) -> Iterator[Event]:
        """See `Answer`."""
        yield {"type": "error", "sequence_number": next(self._numbers), "code": error.code, "message": error.message}
        failure = {"code": "server_error", "message": error.message}
        yield self._event("failed", response=self._response("failed", error=failure))

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **fields}

    def _response(self, status: str, **fields: Any) -> Event:
        body = self.body
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "output": list(self._output) if status != "in_progress" else [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.echoed_tools(),
            "text": {"format": {"type": "text"}},
            "store": False,
            **fields,
        }

    def _usage(self) -> Event:
        tokens = self.usage()
        return {
            "input_tokens": tokens["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": tokens["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens["total_tokens"],
        }

    def _said(self, text: str, item_type: str, part_type: str) -> Iterator[Event]:
        """Add text to the open item, which is closed if it is of another type."""
        if self._open is None or self._open["type"] != item_type:
            yield from self._close("completed")
            yield from self._opened(item_type, part_type)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        fields: Event = {}
        if part_type == "output_text":
            fields["logprobs"] = []
            if self.body.asked_logprobs() is not None:
                untold, self._untold = self._untold, Piece()
                fields["logprobs"] = self.texts.entries(untold)
                part["logprobs"] += fields["logprobs"]
        if text:
            yield self._event(f"{part_type}.delta", **self._place(), delta=str(text), **fields)

    def _opened(self, item_type: str, part_type: str) -> Iterator[Event]:
        prefix = "msg" if item_type == "message" else "rs"
        item: Event = {"id": f"{prefix}_{self.id}_{len(self._output)}", "type": item_type, "status": "in_progress"}
        if item_type == "message":
            item["role"] = "assistant"
        else:
            item["summary"] = []
        self._output.append(item)
        yield self._event("output_item.added", output_index=len(self._output) - 1, item={**item, "content": []})
        part: Event = {"type": part_type, "text": ""}
        if part_type == "output_text":
            part |= {"annotations": [], "logprobs": []}
        item["content"] = [part]
        self._open = item
        if part_type == "output_text":
            yield self._event("content_part.added", **self._place(), part=dict(part))

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        item, place = self._open, self._place()
        part = item["content"][0]
        logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._event(f"{part['type']}.done", **place, text=part["text"], **logprobs)
        if logprobs:
            yield self._event("content_part.done", **place, part=part)
        item["status"] = status
        yield self._event("output_item.done", output_index=place["output_index"], item=item)
        self._open = None

    def _called(self, call: ToolCall) -> Iterator[Event]:
        index = len(self._output)
        name = f"{self.id}_tool_call_{sum(item['type'] == 'function_call' for item in self._output)}"
        item = {"id": name, "call_id": name, "type": "function_call", "name": call.name, "arguments": call.arguments}
        self._output.append({**item, "status": "completed"})
        yield self._event(
            "output_item.added", output_index=index, item={**item, "arguments": "", "status": "in_progress"}
        )
        place = {"item_id": name, "output_index": index}
        yield self._event("function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        yield self._event("output_item.done", output_index=index, item=self._output[-1])

    def _place(self) -> Event:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1, "content_index": 0}
