"""One life of transformers' continuous batching: its thread, its steps in turns, its outputs delivered."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ...scheduling import PriorityLanes, Turns, TurnsClosed
from .admission import ENGINE_FAILED
from .compat import cache_tokens
from .config import batched_positions, max_positions
from .processors import OwnProcessors, without_processors
from .sampling import BatchSampler, Sampling, sampling_of

logger = logging.getLogger("poc_kernels")

OnOutput = Callable[[Any], None]
"""Takes a request's outputs (`GenerationOutput`), on the event loop that it was registered on."""


class Router(OutputRouter):
    """Gives each output to the request it is for, and drops outputs that nobody waits for.

    The base class keeps such outputs for ever, runs the callbacks of all event loops on one of them, and dies when a
    loop is closed. This router outlives the threads of continuous batching: what is in flight when one dies fails.
    """

    def __init__(self) -> None:
        super().__init__()
        self._idle = threading.Condition(self._lock)

    def register(self, request_id: str, on_output: OnOutput) -> None:
        """Send the outputs of ``request_id`` to ``on_output``, on the running event loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self.result_handlers[request_id] = (on_output, loop)

    def forget(self, request_id: str) -> bool:
        """Drop what comes for ``request_id`` from now on; return whether it was in flight."""
        with self._lock:
            return self._forget(request_id)

    def knows(self, request_id: str) -> bool:
        """Tell whether somebody waits for ``request_id``."""
        with self._lock:
            return request_id in self.result_handlers

    def in_flight(self) -> int:
        """Count the requests whose last output has not come yet."""
        with self._lock:
            return len(self.result_handlers)

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until nothing is in flight; return False if that takes longer."""
        with self._lock:
            return self._idle.wait_for(lambda: not self.result_handlers, timeout_seconds)

    def deliver(self, output: GenerationOutput) -> None:
        """Deliver one output."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Deliver outputs, with one wake-up per event loop."""
        calls: dict[asyncio.AbstractEventLoop, list[tuple[OnOutput, GenerationOutput]]] = defaultdict(list)
        with self._lock:
            for output in outputs:
                entry = self.result_handlers.get(output.request_id)
                if entry is None:
                    continue
                if output.error is not None:
                    self._log_failure(output)
                    output = dataclasses.replace(output, error=ENGINE_FAILED)  # the client learns no internals
                on_output, loop = entry
                calls[loop].append((on_output, output))
                if output.is_finished():
                    self._forget(output.request_id)
        for loop, its_calls in calls.items():
            try:
                loop.call_soon_threadsafe(_run, its_calls)
            except RuntimeError:  # the loop is closed: its clients are gone
                for _, output in its_calls:
                    self.forget(output.request_id)

    def fail_all(self, error: str) -> int:
        """End every request in flight with ``error``; return how many there were."""
        with self._lock:
            requests = list(self.result_handlers)
        self.deliver_batch(
            [GenerationOutput(request, error=error, status=RequestStatus.FAILED) for request in requests]
        )
        return len(requests)

    def _log_failure(self, output: GenerationOutput) -> None:
        logger.warning("request failed", extra={"request_id": output.request_id, "error": output.error})

    def _forget(self, request_id: str) -> bool:
        known = self.result_handlers.pop(request_id, None) is not None
        if not self.result_handlers:
            self._idle.notify_all()
        return known


def _run(calls: list[tuple[OnOutput, GenerationOutput]]) -> None:
    for on_output, output in calls:
        on_output(output)


class ContinuousBatching:
    """A manager of continuous batching with its cache and its thread, from start to stop; it cannot be started again.

    Its thread is a daemon if the thread that makes it is one.

    Args:
        model: a causal LM in eval mode. The manager may switch its attention implementation; `stop` switches it back.
        generation_config: how requests are sampled that do not say.
        config: the manager's own settings.
        router: takes the outputs.
        turns: every step of the model takes its turn there.
        lanes: steps run on the stream of inference.
        clock: counts the seconds without progress.

    Attributes:
        max_tokens: tokens that one request can have, prompt and completion together.

    Raises:
        what transformers raises when it cannot make the cache or does not take the model.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        config: ContinuousBatchingConfig,
        router: Router,
        turns: Turns,
        lanes: PriorityLanes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._turns = turns
        self._turn = turns.inference(lambda: router.in_flight() > 0)
        self._lanes = lanes
        self._clock = clock
        self._stopping = False
        attention = model.config._attn_implementation
        try:
            self._manager: Any = model.init_continuous_batching(
                generation_config=without_processors(generation_config), continuous_batching_config=config
            )
            self._manager.output_router = router
            self._manager._generation_step = partial(self._step_in_turn, self._manager._generation_step)
            self._manager._generation_loop_body = partial(self._until_no_turns, self._manager._generation_loop_body)
            self._manager._run_generation_loop = partial(self._on_its_stream, self._manager._run_generation_loop)
            # As its warmup() does it: its thread would make the cache some time after start() has returned.
            with torch.no_grad(), lanes.inference():
                self._manager.batch_processor = self._manager._create_batch_processor()
            processors = OwnProcessors(model, generation_config)
            BatchSampler(self._manager.batch_processor, processors if processors.needed else None)
            raised = lanes.prioritise_streams(self._manager.batch_processor)  # before it captures anything
            if raised == 0 and model.device.type == "cuda":
                logger.warning("continuous batching has no stream of its own: it runs on the stream of inference")
            positions = batched_positions(model.config)
            if positions < max_positions(model.config):
                logger.warning(
                    "requests are kept to the positions up to which LongRoPE leaves their neighbours' text alone",
                    extra={"positions": positions, "of": max_positions(model.config)},
                )
            self.max_tokens = cache_tokens(self._manager.batch_processor.cache, positions)
        except BaseException:
            model.set_attn_implementation(attention)  # the manager restores it only after a start
            raise
        self._progress = self._clock()
        self._manager.start()
        self._thread: threading.Thread = self._manager._generation_thread

    def _step_in_turn(self, step: Callable[[], None]) -> None:
        try:
            with self._turn:
                self._progress = self._clock()
                step()
        finally:
            self._progress = self._clock()

    def _until_no_turns(self, body: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        try:
            return body(*args, **kwargs)
        except TurnsClosed:
            return False  # the loop's own way to end; an error would be logged as a fault

    def _on_its_stream(self, loop: Callable[[], None]) -> None:
        """Run the whole thread on the stream, not each step: it begins by clearing the tensors that steps read."""
        with self._lanes.inference():
            loop()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        config: GenerationConfig,
        streaming: bool,
        on_output: OnOutput,
        sampling: Sampling | None = None,
    ) -> bool:
        """Begin a request that was admitted; its outputs go to ``on_output`` on the running event loop.

        It is sampled by ``sampling``, or else as ``config`` says. Where it asks for log probabilities, the ``logprobs``
        of an output have a `TokenLogprob` per token.

        Returns:
            False if continuous batching takes no more requests.
        """
        if self._router.in_flight() == 0:
            self._progress = self._clock()
        # Registered first: a request can be over before add_request returns.
        self._router.register(request_id, on_output)
        taken = self._manager.add_request(
            list(prompt),
            request_id=request_id,
            max_new_tokens=config.max_new_tokens,
            streaming=streaming,
            eos_token_id=config.eos_token_id,
            **BatchSampler.arguments(sampling or sampling_of(config)),
        )
        if taken is None:
            self._router.forget(request_id)
        return taken is not None

    def cancel(self, request_id: str) -> None:
        """End a request whose client is gone."""
        if self._router.forget(request_id):
            self._manager.cancel_request(request_id)

    def died_of(self) -> str | None:
        """Say what the thread died of; None while it lives."""
        if self._stopping or self._turns.closed:
            return None
        error = self._manager.background_thread_status.fatal_error
        if error is not None:
            return f"{type(error).__name__}: {error}"
        return None if self._thread.is_alive() else "its thread ended"

    def stalled_for(self) -> float:
        """Count the seconds since the last progress while requests are in flight; 0 while a step may not begin."""
        paused = self._turns.inference_paused and not self._turn.computing
        if self._turn.waiting or paused or self._router.in_flight() == 0:
            return 0.0
        return self._clock() - self._progress

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread and free the cache. What is in flight fails.

        Returns:
            False if the thread still hangs in a step after ``timeout_seconds``. It ends after that step; the device is
            free for others.
        """
        self._stopping = True
        self._turn.cancel()
        self._manager.stop(block=True, timeout=timeout_seconds, hard_stop=True)
        self._turn.end()
        return not self._thread.is_alive()
