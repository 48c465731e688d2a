"""PoCManager: the states of a node's rounds, the nonces that it tries, and its verdicts. A `Prover` computes.

There is no tensor here, and nothing of an engine or a server.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..scheduling.slices import Pause
from .config import PoCConfig
from .engine import never
from .prover import Outcomes, Prover
from .states import PHASES, IllegalTransitionError, PoCState, RoundEndedError

logger = logging.getLogger("poc_kernels")

_VALIDATING_STATES = (PoCState.IDLE, *PHASES)


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """One forward: its phase ("generate" or "validate"), its outcomes, and the seconds of each part of its work.

    Args:
        outcomes: one per nonce, as the proof form has them.
        valid: how many of them count.
        seconds: all parts together. Pauses do not count; on a CPU, other programs on its cores do.
    """

    phase: str
    outcomes: list[Any]
    valid: int
    seconds: float
    part_seconds: dict[str, float]


@dataclasses.dataclass(eq=False)
class Round:
    """A round that was begun, and how far this node is in it. Its manager alone changes it."""

    config: PoCConfig
    ended: bool = False
    """Whether it was stopped or another one begun: nothing more is computed for it."""
    tried: int = 0
    generating_since: float | None = None
    generated_seconds: float = 0.0
    total_valid: int = 0
    valid_nonces: list[int] = dataclasses.field(default_factory=list)
    valid_outcomes: list[Any] = dataclasses.field(default_factory=list)

    def seconds_generating(self) -> float:
        """Return how long it was in GENERATING until now."""
        since = self.generating_since
        return self.generated_seconds + (0.0 if since is None else time.monotonic() - since)


class Validation(Iterator[Any]):
    """A proof that is being validated: gives None after each forward except the last, then the verdict.

    Whoever schedules the device decides when each forward runs. The proof belongs to ``round``, however late its
    forwards are.
    """

    def __init__(self, of: Round, forwards: Iterator[Any]) -> None:
        self.round = of
        self._forwards = forwards

    def __next__(self) -> Any:
        return next(self._forwards)


class PoCManager:
    """Runs the rounds of a node on a prover.

    States: `PoCState`. `init_round` and `start_round` begin a round from IDLE or STOPPED, `set_phase` goes between
    the phases of a round, `stop_round` ends it. Methods may be called from any thread; forwards run one at a time.

    Args:
        prover: what computes.
        observer: called after every forward, in its thread.
        max_listed: how many valid nonces `status` lists at most: the latest.
    """

    def __init__(
        self, prover: Prover, observer: Callable[[BatchReport], None] | None = None, max_listed: int = 100_000
    ) -> None:
        self.prover = prover
        self._form = prover.form
        self._observer = observer
        self._max_listed = max_listed
        self._state = PoCState.IDLE
        self._round: Round | None = None
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._compute_lock = threading.Lock()

    # ---- states ----

    @property
    def state(self) -> PoCState:
        """The state now."""
        return self._state

    @property
    def config(self) -> PoCConfig | None:
        """The round's configuration; None before the first round."""
        current = self._round
        return None if current is None else current.config

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change of the state or the round, in the thread that made it."""
        self._listeners.append(listener)

    def init_round(self, config: PoCConfig) -> None:
        """Begin a round in state IDLE: configured, no phase running.

        Raises:
            IllegalTransitionError: a phase of another round is running.
            ValueError: the configuration does not fit the prover.
        """
        self._begin(config, PoCState.IDLE)

    def start_round(self, config: PoCConfig, phase: PoCState = PoCState.GENERATING) -> None:
        """Begin a round in ``phase``, GENERATING or VALIDATING.

        Raises:
            IllegalTransitionError: a phase of another round is running.
            ValueError: the configuration does not fit the prover, or lacks node_id and node_count to generate.
        """
        self._check_phase(phase)
        self._begin(config, phase)

    def _begin(self, config: PoCConfig, state: PoCState) -> None:
        if not isinstance(config, PoCConfig):
            raise TypeError(f"config must be a PoCConfig, got {type(config).__name__}")
        self.prover.check(config)
        self._check_can_enter(config, state)
        with self._lock:
            if self._state in PHASES:
                raise IllegalTransitionError(
                    f"a round begins in state IDLE or STOPPED, the state is {self._state.value}"
                )
            if self._round is not None:
                self._round.ended = True
            self._round = Round(config)
            self._enter(state)
        self._changed()

    def set_phase(self, phase: PoCState) -> None:
        """Go to another phase of the round; a phase that is running already goes on.

        Raises:
            IllegalTransitionError: no round was begun, or it was stopped.
            ValueError: phase is neither GENERATING nor VALIDATING, or node_id and node_count are not set to generate.
        """
        self._check_phase(phase)
        with self._lock:
            if self._round is None:
                raise IllegalTransitionError(f"phase {phase.value} needs a round, none was begun")
            if self._state == PoCState.STOPPED:
                raise IllegalTransitionError(f"phase {phase.value} needs a round, the state is {self._state.value}")
            self._check_can_enter(self._round.config, phase)
            self._enter(phase)
        self._changed()

    def stop_round(self) -> None:
        """End the round. What is being computed is finished and thrown away. Idempotent."""
        with self._lock:
            if self._round is not None:
                self._round.ended = True
            self._enter(PoCState.STOPPED)
        self._changed()

    def _enter(self, state: PoCState) -> None:
        now, current = time.monotonic(), self._round
        if current is not None:
            if current.generating_since is not None:
                current.generated_seconds += now - current.generating_since
            current.generating_since = now if state == PoCState.GENERATING else None
        self._state = state

    def _changed(self) -> None:
        for listener in self._listeners:
            try:
                listener()
            except Exception:  # a listener's fault is neither the round's nor another listener's
                logger.exception("a change of the round could not be told")

    def progress(self) -> dict[str, Any]:
        """Return the state and the numbers of the round: `status` without its lists."""
        with self._lock:
            current = self._round
            elapsed = 0.0 if current is None else current.seconds_generating()
            checked = 0 if current is None else current.tried
            return {
                "state": self._state.value,
                "total_checked": checked,
                "total_valid": 0 if current is None else current.total_valid,
                "elapsed_seconds": elapsed,
                "rate_per_second": checked / elapsed if elapsed > 0 else 0.0,
                "r_target": None if current is None else current.config.r_target,
            }

    def status(self) -> dict[str, Any]:
        """Return state and progress: the keys of ``GET /api/v1/pow/status``.

        elapsed_seconds is the time spent in GENERATING, rate_per_second the nonces checked in it; r_target is None
        before the first round.
        """
        with self._lock:
            current = self._round
            return {
                **self.progress(),
                "valid_nonces": [] if current is None else list(current.valid_nonces),
                self._form.listed_as: [] if current is None else list(current.valid_outcomes),
            }

    @staticmethod
    def _check_phase(phase: object) -> None:
        if phase not in PHASES:
            raise ValueError(f"phase must be GENERATING or VALIDATING, got {phase}")

    @staticmethod
    def _check_can_enter(config: PoCConfig, state: PoCState) -> None:
        if state == PoCState.GENERATING:
            config.nonce(0)  # raises where the node does not know its place

    def _current(self, doing: str, states: Sequence[PoCState]) -> Round:
        with self._lock:
            if self._round is None:
                raise IllegalTransitionError(f"{doing} needs a round, none was begun")
            if self._state not in states:
                wanted = " or ".join(state.value for state in states)
                raise IllegalTransitionError(f"{doing} needs state {wanted}, the state is {self._state.value}")
            return self._round

    # ---- work ----

    def run_batch(self, pause: Pause = never) -> Any:
        """Compute the next batch_size nonces of this node and return the proof of them all, valid or not.

        Raises:
            IllegalTransitionError: the state is not GENERATING.
            RoundEndedError: the round ended meanwhile, or left GENERATING; these nonces do not count.
        """
        return self.advance(pause)[1]

    def advance(self, pause: Pause = never) -> tuple[PoCConfig, Any, Any]:
        """Return the round's configuration, the proof of `run_batch`, and the part of it that is valid."""
        current = self._current("run_batch", (PoCState.GENERATING,))
        config = current.config

        def check() -> None:
            if current.ended or self._state != PoCState.GENERATING:
                raise RoundEndedError("the round left GENERATING while the batch was computed")

        with self._compute_lock:
            first = current.tried
            nonces = [config.nonce(first + index) for index in range(config.batch_size)]
            outcomes = self._prove(current, config.public_key, nonces, "generate", pause, check)
            with self._lock:
                check()
                current.tried = first + config.batch_size
                proof = self._form.proof(config, nonces, outcomes)
                valid = self._form.valid(config, proof)
                current.total_valid += len(valid)
                current.valid_nonces += valid.nonces
                current.valid_outcomes += self._form.outcomes(valid)
                excess = len(current.valid_nonces) - self._max_listed
                if excess > 0:
                    del current.valid_nonces[:excess], current.valid_outcomes[:excess]
        return config, proof, valid

    def validation(self, proof: Any, pause: Pause = never) -> Validation:
        """Validate ``proof`` forward by forward, each of them slice by slice as ``pause`` lets it.

        Raises:
            IllegalTransitionError, TypeError, ValueError: by this call, as `validate`.
            RoundEndedError: by the forwards, as `validate`.
        """
        current = self._current("validate", _VALIDATING_STATES)
        if not isinstance(proof, self._form.proof_type):
            raise TypeError(f"batch must be a {self._form.proof_type.__name__}, got {type(proof).__name__}")
        for name in ("block_hash", "block_height"):
            wanted, got = getattr(current.config, name), getattr(proof, name)
            if got != wanted:
                raise ValueError(f"{name} of the batch must be the round's, {wanted!r}, got {got!r}")
        return Validation(current, self._forwards(current, proof, pause))

    def _forwards(self, current: Round, proof: Any, pause: Pause) -> Iterator[Any]:
        def check() -> None:
            if current.ended:
                raise RoundEndedError("the round ended while the batch was validated")

        config = current.config
        recomputed: list[Any] = []
        for start in range(0, len(proof), config.batch_size):
            if start > 0:
                yield None
            check()
            nonces = proof.nonces[start : start + config.batch_size]
            with self._compute_lock:
                recomputed += self._prove(current, proof.public_key, nonces, "validate", pause, check)
        check()
        yield self._form.verdict(config, proof, recomputed)

    def validate(self, proof: Any) -> Any:
        """Recompute every nonce of ``proof`` and return the verdict. Allowed in every state of a round but STOPPED.

        Raises:
            IllegalTransitionError: no round was begun, or it was stopped.
            TypeError: it is no proof of the prover's form.
            ValueError: the proof belongs to another block than the round.
            RoundEndedError: the round ended meanwhile.
        """
        return next(verdict for verdict in self.validation(proof) if verdict is not None)

    def _prove(
        self, current: Round, public_key: str, nonces: list[int], phase: str, pause: Pause, check: Callable[[], None]
    ) -> list[Any]:
        def pause_and_check() -> None:
            pause()
            check()

        outcomes: Outcomes = self.prover.prove(current.config, public_key, nonces, pause_and_check)
        if self._observer is not None:
            seconds = dict(outcomes.part_seconds)
            valid = self._form.count_valid(current.config, outcomes.values)
            self._observer(BatchReport(phase, outcomes.values, valid, sum(seconds.values()), seconds))
        return outcomes.values
