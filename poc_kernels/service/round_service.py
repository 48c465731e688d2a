"""RoundService: a node's rounds as one thing, whatever engine computes the proofs and whatever app serves the users."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from ..protocol import PoCConfig, PoCManager, PoCState, Prover
from ..scheduling import AwakeClock
from .callbacks import CallbackSender
from .connections import check_host
from .device import Device
from .metrics import Metrics
from .queue import ValidationJob
from .receivers import CallbackHosts
from .settings import ServiceSettings
from .worker import ProofWorker

MIN_CLOSE_SECONDS = 1.0
"""What each part of a service is given to end, however little is left until the deadline."""


class RoundService:
    """Begins and ends rounds, validates proofs, delivers callbacks, and says how all of that is.

    Args:
        prover: what computes.
        device: shared with users.
        settings: what the operator set.
        troubles: further watches for `troubles`: each returns why something makes no progress, or None. What they
            return is told to clients: the class of an error, not its text.
        loopback: whether users and rounds come from this machine alone: callbacks may then go to it.
        models: names of the served model, the first of which is told; clients that name another one are refused. Empty
            where any name will do.
        engine: name and version of what computes, for clients.
    """

    def __init__(
        self,
        prover: Prover,
        device: Device,
        settings: ServiceSettings,
        troubles: Sequence[Callable[[], str | None]] = (),
        loopback: bool = False,
        models: Sequence[str] = (),
        engine: str = "unknown",
    ) -> None:
        self.settings = settings
        self.models, self.engine = tuple(dict.fromkeys(models)), engine
        self.metrics = Metrics(list(prover.forms.values()))
        self.manager = PoCManager(prover, self.metrics.batch)
        key = None if settings.callback_key is None else settings.callback_key.encode()
        self._hosts = CallbackHosts(settings.callback_hosts, loopback=loopback)
        self.callbacks = CallbackSender(
            key=key,
            hosts=self._hosts,
            max_nonces=settings.callback_nonces,
            max_posts=settings.callback_posts,
            max_urls=settings.callback_urls,
            max_age_seconds=settings.callback_seconds,
            observer=self.metrics,
        )
        self._clock = AwakeClock()
        self.worker = ProofWorker(self.manager, device, self.callbacks, self.metrics, settings, self._clock.now)
        self._prover = prover
        self._device = device
        self._watches = (*troubles, self.worker.trouble)
        self._ignored: list[str] = []
        self.stopping = False
        """Whether the service shuts down: it admits nothing more."""
        watch = self.metrics.watch
        watch("poc_validation_queue_nonces", "Nonces waiting to be validated", lambda: self.worker.queue.nonces)
        watch("poc_validation_queue_batches", "Batches waiting to be validated", lambda: self.worker.queue.batches)
        watch(
            "poc_nonces_exhausted",
            "1 if the round has tried every nonce that validators take, else 0",
            lambda: self.manager.progress()["generation_ended"] is not None,
        )
        watch("poc_callback_queue_batches", "Batches waiting to be delivered", self.callbacks.pending)
        watch("poc_callback_queue_nonces", "Nonces waiting to be delivered", self.callbacks.pending_nonces)

    # ---- from start to end ----

    def start(self) -> None:
        """Start callbacks and the proof worker."""
        self._clock.start()
        self.callbacks.start()
        self.worker.start()

    def begin_shutdown(self) -> None:
        """Admit nothing more, and end the round. Idempotent."""
        self.stopping = True
        self.manager.stop_round()

    def close(self, deadline: float, then: Callable[[float], Any] = lambda seconds: None) -> None:
        """End proofs, then what ``then`` ends, then callbacks. Idempotent.

        Args:
            deadline: of ``time.monotonic()``; each of the three gets at least `MIN_CLOSE_SECONDS`.
            then: given its seconds: what must not end before proofs, as users' inference.
        """
        self.begin_shutdown()
        for end in (self.worker.close, then, self.callbacks.close):
            end(max(deadline - time.monotonic(), MIN_CLOSE_SECONDS))
        self._clock.stop()

    # ---- rounds ----

    def config(self, values: dict[str, Any]) -> PoCConfig:
        """Return the configuration of a round that a client asked for.

        Args:
            values: fields of `PoCConfig`; use_random_projection may be None, for what the operator set.

        Raises:
            TypeError, ValueError: as `PoCConfig`, or batch_size * seq_len is more than the operator allows, or
                callbacks may not go to the host of callback_url.
        """
        if values.get("use_random_projection") is None:
            values = {**values, "use_random_projection": self.settings.random_projection}
        config = PoCConfig(**values)
        tokens, limit = config.positions, self.settings.max_proof_tokens
        if tokens > limit:
            raise ValueError(f"batch_size * seq_len must be at most {limit} on this node, got {tokens}")
        if config.callback_url is not None:
            check_host("callback_url", config.callback_url, self._hosts)
        return config

    def begin(
        self, values: dict[str, Any], state: PoCState, ignored: Sequence[str] = (), *, replace: bool = True
    ) -> None:
        """Begin a round in state IDLE, GENERATING or VALIDATING; errors as `config` and `PoCManager.start_round`.

        Args:
            values: as `config`.
            state: that it begins in.
            ignored: what else the client said, for the status.
            replace: see `PoCManager.start_round`.
        """
        config = self.config(values)
        if state == PoCState.IDLE:
            self.manager.init_round(config)
        else:
            self.manager.start_round(config, state, replace=replace)
        self._ignored = list(ignored)

    def enqueue(self, proof: Any, submitter: str, keep: bool = False, config: PoCConfig | None = None) -> ValidationJob:
        """Queue a proof to be validated: see `ProofWorker.enqueue`."""
        return self.worker.enqueue(proof, submitter, keep, config)

    def refuses_users(self) -> tuple[str, str, int] | None:
        """Return (code, message, Retry-After in seconds) while users are refused, else None."""
        if self.stopping:
            return "shutting_down", "the server is shutting down", 1
        if self.manager.state == PoCState.GENERATING:
            message = "the node proves its compute now and serves again when the round's generating phase ends"
            return "generating", message, self.settings.retry_after_seconds
        return None

    # ---- what is told of it ----

    def status(self) -> dict[str, Any]:
        """Return state and progress of the round, of the validation queue and of the callbacks."""
        config, progress = self.manager.config, self.manager.status()
        return {
            **progress,
            # As the network's clients read it; the model was loaded before the first request.
            "status": progress["state"],
            "is_model_initialized": True,
            "config": None if config is None else told_of(config),
            **self.workload(),
        }

    def workload(self) -> dict[str, Any]:
        """Return what the status says of every wire's rounds: what was ignored, what waits, callbacks."""
        slices, pacing = self._prover.slices, self._device.pacing
        return {
            "ignored": self._ignored,
            "queued_nonces": self.worker.queue.nonces,
            "validation": {
                **self.worker.queue.status(),
                "share": 0.0 if pacing is None else pacing.share,
                "pacing": "paced" if pacing is not None and pacing.paced else "free",
                "slices": None
                if slices is None
                else {"count": len(slices.seconds), "longest_seconds": slices.longest_seconds},
            },
            "callbacks": self.callbacks.status(),
        }

    def troubles(self) -> list[str]:
        """Return why no progress is made: an empty list when it is."""
        if self.stopping:
            return ["the server is shutting down"]
        return [text for watch in self._watches if (text := watch()) is not None]

    def metrics_text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        progress = self.manager.progress()
        self.metrics.state.state(progress["state"])
        self.metrics.rate.set(progress["rate_per_second"])
        return self.metrics.text()


def told_of(config: PoCConfig) -> dict[str, Any]:
    """Return what anybody may know of a configuration: of the callback_url its host alone."""
    told = dataclasses.asdict(config)
    url = told.pop("callback_url")
    if config.proof == PoCConfig.proof:  # older clients know no other
        for name in ("proof", "k_dim", "stronger_rng"):
            del told[name]
    return {**told, "callback_host": None if url is None else urlsplit(url).netloc.rpartition("@")[2]}
