"""One request while it is generated: tokens become text, and text ends at a stop string."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

from .admission import engine_unavailable
from .inference import Inference
from .sampling import Sampling, TokenLogprob

logger = logging.getLogger("poc_kernels")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for, after its body was checked.

    Attributes:
        prompt: token ids.
        new_tokens: how many tokens may be generated; None for as many as there is room for.
        param: the field of the body that says so.
        sampling: how tokens are chosen.
        stop: strings that end the answer, and are not part of it.
        stop_token_ids: tokens that end the answer, beside those of the model.
        ignore_eos: whether the model's own tokens that end an answer do not.
        special_tokens: whether special tokens are part of the text, except one that ends it.
        one_tool_call: whether the answer ends after its first tool call.
        parser: takes the text apart into reasoning, content and tool calls; None leaves it as it is.
    """

    prompt: Sequence[int]
    new_tokens: int | None
    param: str
    sampling: Sampling
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    special_tokens: bool = False
    one_tool_call: bool = False
    parser: Any = None


@dataclass
class Piece:
    """What some tokens said.

    Attributes:
        items: str for content, ``ReasoningText``, or ``ToolCall``.
        token_ids: the tokens, including those without text.
        logprobs: one per token, if they were asked for.
    """

    items: list[Any] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Add what the next tokens said."""
        for item in piece.items:
            same = self.items and type(self.items[-1]) is type(item) and isinstance(item, str)
            if same:
                item = type(item)(self.items.pop() + item)
            self.items.append(item)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs


class Generation:
    """A request in flight: `begin` it, then read `pieces` to their end.

    Attributes:
        asked: what the request asks for.
        token_count: tokens that were generated so far.
        finish_reason: "stop" or "length", once it is over.
    """

    def __init__(self, inference: Inference, request_id: str, asked: Asked) -> None:
        self.asked = asked
        self.token_count = 0
        self.finish_reason: str | None = None
        self._inference = inference
        self._request_id = request_id
        self._parser = asked.parser
        self._skips_special = self._parser is None and not asked.special_tokens
        self._decoder = DecodeStream([], skip_special_tokens=self._skips_special)
        self._undecoded: list[int] = []
        self._stops = _Stops(asked.stop)
        self._ends: set[int] = set()
        self._after_reasoning = False
        self._latest: Any = None  # outputs hold all tokens so far: only the latest one counts
        self._arrived = asyncio.Event()

    def begin(self, streaming: bool) -> None:
        """Submit the request.

        Raises:
            AdmissionError: it is refused, or the engine is being rebuilt.
        """
        config = self._inference.generation_config(self.asked.new_tokens)
        own = config.eos_token_id
        ends = [] if own is None or self.asked.ignore_eos else [own] if isinstance(own, int) else list(own)
        config.eos_token_id = [*ends, *self.asked.stop_token_ids]
        self._ends = set(config.eos_token_id)
        step_by_step = streaming or bool(self.asked.stop) or self.asked.one_tool_call  # it may end between two steps
        self._inference.submit(
            self._request_id,
            self.asked.prompt,
            config,
            step_by_step,
            self._on_output,
            self.asked.param,
            self.asked.sampling,
        )

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield what is said as it comes; a request that nobody reads to its end is cancelled.

        Raises:
            AdmissionError: 503; the engine failed.
        """
        try:
            if self._parser is not None:
                items = self._without_lead(response_events_to_chunks(self._parser.initial_events))
                if items:
                    yield Piece(items)
            while self.finish_reason is None:
                await self._arrived.wait()
                self._arrived.clear()
                if self._latest.error is not None:
                    raise engine_unavailable(self._latest.error)
                for piece in self._taken(self._latest):
                    yield piece
        finally:
            self._inference.cancel(self._request_id)

    def _on_output(self, output: Any) -> None:
        self._latest = output
        self._arrived.set()

    def _taken(self, output: Any) -> list[Piece]:
        """Return what an output adds. Reasoning, content and calls are pieces of their own, as are their tokens."""
        pieces = [Piece()]
        for token in output.generated_tokens[self.token_count :]:
            piece = self._take(token, output)
            said = pieces[-1].items
            if said and not (piece.items and type(piece.items[0]) is type(said[-1])):
                pieces.append(Piece())
            pieces[-1].add(piece)
            if self.finish_reason is not None:
                return pieces
        if output.is_finished():
            last = output.generated_tokens[-1] if output.generated_tokens else None
            text, stopped = self._stops.feed(self._tail())
            rest = self._parsed(text if stopped else text + self._stops.held)
            pieces.append(Piece([*rest, *self._flushed()]))
            self.finish_reason = "stop" if stopped or last in self._ends else "length"
        return pieces

    def _take(self, token: int, output: Any) -> Piece:
        """Take the next token of an output."""
        piece = Piece(token_ids=[token])
        if self.asked.sampling.logprobs is not None:
            piece.logprobs.append(output.logprobs[self.token_count])
        self.token_count += 1
        text, stopped = self._stops.feed(self._decoded(token))
        piece.items.extend(self._parsed(text))
        calls = [n for n, item in enumerate(piece.items) if isinstance(item, ToolCall)]
        if calls and self.asked.one_tool_call:
            del piece.items[calls[0] + 1 :]
            self.finish_reason = "stop"
        elif stopped:
            piece.items.extend(self._flushed())
            self.finish_reason = "stop"
        return piece

    def _decoded(self, token: int) -> str:
        if self._parser is None and token in self._ends:
            return ""  # no part of the text, whatever it is
        self._undecoded.append(token)
        tokenizer = self._inference.tokenizer._tokenizer
        text: str | None
        try:
            text = self._decoder.step(tokenizer, token)
        except Exception:  # has no class of its own
            # Tokens of single bytes: bytes that are no character take those before with them, which were told.
            text = tokenizer.decode(self._undecoded, skip_special_tokens=self._skips_special)
            self._decoder = DecodeStream(self._undecoded.copy(), skip_special_tokens=self._skips_special)
        if text is None:
            return ""
        self._undecoded.clear()
        return text

    def _tail(self) -> str:
        """Return the text of tokens that a character was not completed by."""
        tail, self._undecoded = self._undecoded, []
        text: str = self._inference.tokenizer.decode(tail, skip_special_tokens=self._skips_special) if tail else ""
        return text

    def _parsed(self, text: str) -> list[Any]:
        if not text:
            return []
        if self._parser is None:
            return [text]
        try:
            return self._without_lead(response_events_to_chunks(self._parser.feed(text)))
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            return self._unparsed(error, [text])

    def _flushed(self) -> list[Any]:
        if self._parser is None:
            return []
        try:
            return self._without_lead(response_events_to_chunks(self._parser.finalize()[1]))
        except (ValueError, RuntimeError, KeyError, TypeError) as error:  # cut off within a tool call, say
            return self._unparsed(error, [])

    def _unparsed(self, error: Exception, items: list[Any]) -> list[Any]:
        logger.info("an answer does not have its model's form and is told as it is: %.200s", error)
        self._parser = None
        return items

    def _without_lead(self, items: list[Any]) -> list[Any]:
        """Drop the white space between reasoning and content."""
        kept = []
        for item in items:
            if isinstance(item, str) and not isinstance(item, ReasoningText) and self._after_reasoning:
                item = item.lstrip()
                if not item:
                    continue
            self._after_reasoning = isinstance(item, ReasoningText)
            kept.append(item)
        return kept


class _Stops:
    """Looks for stop strings in a text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take a piece of text; return what may be told, and whether a stop string followed it."""
        if not self._stops:
            return text, False
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are a beginning of ``stop``."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
