"""A causal LM served by a way of generation that is proved to give its text, and is rebuilt when it fails."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from ...scheduling import AwakeClock, PriorityLanes, Turns
from .admission import admitted_new_tokens, engine_unavailable
from .batching import ContinuousBatching, OnOutput, Router
from .config import InferenceLimits, batching_config, generation_config, given_tokens, trial_batching_config
from .eager import EagerGeneration
from .sampling import Sampling, sampling_of
from .trial import Generation, Start, Trial, TrialFailedError

logger = logging.getLogger("poc_kernels")

_POLL_SECONDS = 0.1
_STOP_SECONDS = 5.0
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.5, 30.0


class Inference:
    """A model served under one name.

    Before anything is served, a `Trial` proves that continuous batching gives the model's text. A model that it serves
    wrongly is served by plain generation, one request at a time, if that passes the trial. A supervisor rebuilds the
    way of generation when its thread dies or stalls; the weights stay.

    Args:
        model: a causal LM (``PreTrainedModel``) in eval mode, on its device. Until `stop`, continuous batching may set
            its attention implementation.
        tokenizer: the model's tokenizer (a fast one).
        name: the model's id for clients.
        turns: every step of the model takes its turn there; paused inference pauses what is in flight.
        limits: bounds of what is served.
        temperature: of requests that set none. None samples as the model's generation config says, 0 takes the
            likeliest token, more samples with that temperature.
        lanes: steps run on the stream of inference; by default, lanes of the model's device.

    Attributes:
        batched: whether requests are computed together, by continuous batching; decided by `start`.
        restarts: how many times the way of generation was rebuilt.
        sampling: how requests are sampled that do not say.
        vocabulary: token ids are in [0, vocabulary).

    Raises:
        ValueError: a negative temperature.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        turns: Turns,
        limits: InferenceLimits,
        temperature: float | None = None,
        lanes: PriorityLanes | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.batched = True
        self.restarts = 0
        self._turns = turns
        self._lanes = lanes or PriorityLanes(model.device)
        self._limits = limits
        self.vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self._generation_config = generation_config(self.model, self.tokenizer, temperature)
        self.sampling = sampling_of(self._generation_config)
        self._config = batching_config(self._limits, self.model.device.type)
        self._start: Start = self._batching_with(self._config)
        self._clock = AwakeClock()
        self._causal = model.config.get_text_config().__dict__.get("is_causal")
        self._router = Router()
        # Guards _batching: a request reaches a live one, or is in flight when the requests of a dead one are failed.
        self._lock = threading.Lock()
        self._batching: Generation | None = None
        self._trouble: str | None = "inference is not started"
        self._max_tokens = 0
        self._stop = threading.Event()
        self._supervisor: threading.Thread | None = None

    def start(self) -> None:
        """Prove a way of generation, start it and its supervisor.

        Raises:
            RuntimeError: it was started before.
            ValueError: no way of generation gives the model's text, or there is no room for a KV cache of these limits.
        """
        if self._supervisor is not None:
            raise RuntimeError("inference can be started once")
        built: Future[None] = Future()
        # Threads of a daemon are daemons: a step that hangs keeps the thread of generation, not the process.
        self._supervisor = threading.Thread(
            target=self._supervise, args=(built,), name="inference-supervisor", daemon=True
        )
        self._supervisor.start()
        built.result()

    def stop(self, timeout_seconds: float) -> None:
        """End generation and its supervisor; what is in flight fails. Idempotent.

        A step that hangs for longer than ``timeout_seconds`` is logged and left behind.
        """
        deadline = time.monotonic() + timeout_seconds
        self._stop.set()
        with self._lock:
            batching, self._batching = self._batching, None
            self._trouble = "inference is stopped"
        self._end(batching, "the server stops", timeout_seconds)
        if self._supervisor is not None:
            self._supervisor.join(max(0.0, deadline - time.monotonic()) + _POLL_SECONDS)
            if self._supervisor.is_alive():
                logger.error("the supervisor of inference did not end in %.1f s", timeout_seconds)
        self._clock.stop()
        self._restore_causal()

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no request is in flight; return False if that takes longer."""
        return self._router.wait_idle(timeout_seconds)

    def trouble(self) -> str | None:
        """Say what keeps inference from making progress; None while it is healthy, as it is while paused."""
        with self._lock:
            if self._trouble is not None or self._batching is None:
                return self._trouble
            fault = self._fault(self._batching)
            return None if fault is None else _told(fault)

    def _restore_causal(self) -> None:
        """Undo what a step that hung may have left: transformers sets this for a forward, and takes no two at once."""
        config = self.model.config.get_text_config()
        if self._causal is None:
            config.__dict__.pop("is_causal", None)
        else:
            config.is_causal = self._causal

    # ---- for the app's handlers ----

    @property
    def max_tokens(self) -> int:
        """Tokens that one request can have, prompt and completion together.

        Raises:
            AdmissionError: 503; the engine was never built.
        """
        if self._max_tokens == 0:
            raise engine_unavailable("the engine is not started")
        return self._max_tokens

    def generation_config(self, new_tokens: int | None) -> GenerationConfig:
        """Copy the server's generation config for a request that asks for ``new_tokens``."""
        config = copy.deepcopy(self._generation_config)
        config.max_new_tokens = new_tokens
        return config

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        config: GenerationConfig,
        streaming: bool,
        on_output: OnOutput,
        param: str,
        sampling: Sampling | None = None,
    ) -> None:
        """Admit a request and begin it; there is no other way in.

        Args:
            request_id: unique.
            prompt: token ids.
            config: its max_new_tokens is what the client asked for, or None; set to what the request is granted.
            streaming: whether there is an output per token, or only one at the end.
            on_output: takes the outputs, on the running event loop.
            param: the field of the body that asks for new tokens.
            sampling: how its tokens are chosen; by default as those of requests that do not say.

        Raises:
            AdmissionError: the request is refused, or generation is being rebuilt.
        """
        config.max_new_tokens = admitted_new_tokens(
            prompt,
            config.max_new_tokens,
            vocabulary=self.vocabulary,
            max_new_tokens=self._limits.max_new_tokens,
            max_tokens=self.max_tokens,
            param=param,
        )
        with self._lock:
            batching = self._batching
            if batching is None or not batching.submit(request_id, prompt, config, streaming, on_output, sampling):
                raise engine_unavailable("the engine is being rebuilt")

    def cancel(self, request_id: str) -> None:
        """End a request whose client is gone."""
        with self._lock:
            if self._batching is None:
                self._router.forget(request_id)
            else:
                self._batching.cancel(request_id)

    # ---- the supervisor's thread ----

    def _supervise(self, built: Future[None]) -> None:
        self._clock.start()  # a forward of the trial may take longer than what it takes for standing still
        try:
            self._choose()
            self._build_first()
        except BaseException as error:
            self._clock.stop()
            built.set_exception(error)
            return
        built.set_result(None)
        while not self._stop.wait(_POLL_SECONDS):
            with self._lock:
                batching = self._batching
                fault = None if batching is None else self._fault(batching)
                if batching is None or fault is None:
                    continue
                self._batching = None
                self._trouble = f"generation is being rebuilt: {_told(fault)}"
            logger.error("generation failed and is rebuilt", extra={"fault": fault})
            try:
                self._end(batching, fault, _STOP_SECONDS)
            except Exception:
                logger.exception("the generation that failed did not end well")
            self._rebuild(fault)

    def _choose(self) -> None:
        """Choose a way of generation by trial.

        Raises:
            ValueError: none gives the model's text.
        """
        trial = Trial(self.model, self._generation_config, self.tokenizer.all_special_ids, self._clock.now)
        small = trial_batching_config(self._config, tokens=trial.tokens, requests=trial.requests)
        try:
            trial.prove(self._batching_with(small))
            return
        except TrialFailedError as error:
            reason = str(error)
        try:
            trial.prove(self._eager)
        except TrialFailedError as error:
            raise ValueError(
                f"model must be one that transformers can serve with its own text, {type(self.model).__name__} is not: "
                f"continuous batching failed its trial ({reason}), and so did plain generation ({error})"
            ) from error
        self.batched, self._start = False, self._eager
        logger.warning(
            "requests are served one at a time, by plain generation: others wait meanwhile, and many users get far "
            "fewer tokens per second than with continuous batching, which failed its trial with this model",
            extra={"model": self.name, "reason": reason},
        )

    def _batching_with(self, config: ContinuousBatchingConfig) -> Start:
        def start(model: Any, sampling: GenerationConfig, router: Router, turns: Turns) -> Generation:
            return ContinuousBatching(model, sampling, config, router, turns, self._lanes, self._clock.now)

        return start

    def _eager(self, model: Any, sampling: GenerationConfig, router: Router, turns: Turns) -> Generation:
        return EagerGeneration(model, router, turns, self._lanes, self._clock.now, given_tokens(self._config))

    def _build_first(self) -> None:
        try:
            self._build()
        except (RuntimeError, MemoryError, ValueError) as error:  # the trial's smaller cache could be made
            raise ValueError(f"continuous batching cannot be started with these settings: {error}") from error

    def _fault(self, batching: Generation) -> str | None:
        died_of = batching.died_of()
        if died_of is not None:
            return died_of
        seconds = batching.stalled_for()
        if seconds > self._limits.stall_seconds:
            return f"no progress for {seconds:.0f} s with {self._router.in_flight()} requests in flight"
        return None

    def _build(self) -> None:
        batching = self._start(self.model, self._generation_config, self._router, self._turns)
        with self._lock:
            if not self._stop.is_set():
                self._batching, self._trouble = batching, None
                self._max_tokens = batching.max_tokens
                return
        batching.stop(_STOP_SECONDS)

    def _rebuild(self, fault: str) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while not self._stop.is_set():
            try:
                self._build()
            except Exception as error:
                logger.exception("generation cannot be rebuilt", extra={"retry_seconds": backoff})
                with self._lock:
                    if not self._stop.is_set():
                        then = type(error).__name__
                        self._trouble = f"generation is being rebuilt: {_told(fault)}; then {then}"
                self._stop.wait(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
            else:
                self.restarts += 1
                return

    def _end(self, batching: Generation | None, reason: str, timeout_seconds: float) -> None:
        failed = self._router.fail_all(reason)
        if failed:
            logger.warning("requests in flight failed", extra={"requests": failed, "reason": reason})
        if batching is not None and not batching.stop(timeout_seconds):
            logger.error("a step of the model hangs", extra={"waited_seconds": timeout_seconds})


def _told(fault: str) -> str:
    """Return what clients may know of a fault: of an exception its class, as its text can hold anything."""
    return fault.partition(": ")[0]
