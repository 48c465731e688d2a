"""PoCManager: a round on an engine. Thin: states, one forward of fixed shape, and the two projections around it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..definition import MAX_FEATURES
from ..projection import RandomProjection
from ..scheduling.slices import Pause
from ..scheduling.stopwatch import Stopwatch
from .config import PoCConfig, PoCState
from .distances.distance import distances, target
from .distances.proofs import ProofBatch, ValidatedBatch, validate_distances
from .engine import Engine, never
from .inputs import nonce_inputs, permutations
from .pieces import Pieces

PARTS = ("inputs", "projection", "forward", "distance")
"""What a batch's time is made of: random numbers, both projections, the model with its logits, the distances."""

_TRANSITIONS = {
    PoCState.IDLE: {PoCState.IDLE, PoCState.GENERATING, PoCState.VALIDATING, PoCState.STOPPED},
    PoCState.GENERATING: {PoCState.GENERATING, PoCState.VALIDATING, PoCState.STOPPED},
    PoCState.VALIDATING: {PoCState.GENERATING, PoCState.VALIDATING, PoCState.STOPPED},
    PoCState.STOPPED: {PoCState.STOPPED},
}
"""What a phase may be followed by within a round; a new round begins from IDLE or STOPPED."""
_VALIDATING_STATES = (PoCState.IDLE, PoCState.GENERATING, PoCState.VALIDATING)


# What a GPU computes between two pauses before it was timed.
_DRAWN_AT_ONCE = 2**24
"""Random numbers."""
_PROJECTED_AT_ONCE = 2**38
"""Products of a projection."""
_LEAST_PROJECTED_ROWS = 256
"""With fewer rows at once, drawing P would take the longer part."""


class IllegalTransitionError(RuntimeError):
    """Something was asked for that the state does not allow."""


class RoundEndedError(RuntimeError):
    """The round was stopped, or another one begun, while a batch was computed; its result is thrown away."""


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """One forward: its phase ("generate" or "validate"), its nonces' distances, and the seconds of each of `PARTS`.

    Seconds do not count pauses; on a processor they do count others that have its cores meanwhile.
    """

    phase: str
    distances: list[float]
    r_target: float
    seconds: float
    part_seconds: dict[str, float]


@dataclasses.dataclass
class _Round:
    config: PoCConfig
    target: Tensor | None = None
    tried: int = 0
    generating_since: float | None = None
    generated_seconds: float = 0.0
    total_valid: int = 0
    valid_nonces: list[int] = dataclasses.field(default_factory=list)
    valid_distances: list[float] = dataclasses.field(default_factory=list)


class _Parts:
    """Seconds of each part of a batch. Pauses are no part of it: `pause` in place of the batch's own."""

    def __init__(self, device: torch.device, pause: Pause) -> None:
        self._watch = Stopwatch(device)
        self._pause = pause

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._watch.begin(name)
        yield
        self._watch.end()

    def pause(self) -> None:
        """To be called inside a part."""
        name = self._watch.end()
        self._pause()
        self._watch.begin(name)

    def seconds(self) -> dict[str, float]:
        """Call it after the batch's results were read: it waits for nothing more, then."""
        totals = dict.fromkeys(PARTS, 0.0)
        for name, seconds in self._watch.spans():
            totals[name] += seconds
        return totals


class PoCManager:
    """Runs the rounds of a node on an engine.

    States: `PoCState`. `init_round` and `start_round` begin a round from IDLE or STOPPED, `set_phase` goes between
    the phases of a round, `stop_round` ends it. Methods may be called from any thread; forwards run one at a time.

    Every forward has the round's shape, [batch_size, seq_len]: a batch with fewer nonces is filled with rows that are
    thrown away. So a nonce's distance depends neither on its place in a batch nor on its neighbours.

    Args:
        engine: the model that serves users.
        observer: called after every forward, in its thread.
        max_listed: valid nonces that `status` lists: the latest so many.
        slice_seconds: how long to compute between two pauses, outside the engine's forward.

    Raises:
        ValueError: the engine's hidden size is not one that projections take, or slice_seconds is not positive.
    """

    def __init__(
        self,
        engine: Engine,
        observer: Callable[[BatchReport], None] | None = None,
        max_listed: int = 100_000,
        slice_seconds: float = 0.002,
    ) -> None:
        if not slice_seconds > 0:
            raise ValueError(f"slice_seconds must be positive, got {slice_seconds}")
        if not 1 <= engine.hidden_size <= MAX_FEATURES:
            raise ValueError(f"engine must have a hidden size in [1, {MAX_FEATURES}], got {engine.hidden_size}")
        self.engine = engine
        self._observer = observer
        self._max_listed = max_listed
        self._pieces = Pieces(engine.device, slice_seconds)
        self._state = PoCState.IDLE
        self._round: _Round | None = None
        self._lock = threading.RLock()
        self._compute_lock = threading.Lock()
        self._projection = RandomProjection(0, engine.hidden_size, device=engine.device)
        self._projected_hash: str | None = None

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

    def init_round(self, config: PoCConfig) -> None:
        """Begin a round in state IDLE: configured, no phase running.

        Raises:
            IllegalTransitionError: a phase of another round is running.
            ValueError: the configuration does not fit the engine.
        """
        self._begin(config, PoCState.IDLE)

    def start_round(self, config: PoCConfig, phase: PoCState = PoCState.GENERATING) -> None:
        """Begin a round in ``phase``, GENERATING or VALIDATING. Of the projections, only the 8-byte seed changes.

        Raises:
            IllegalTransitionError: a phase of another round is running.
            ValueError: the configuration does not fit the engine, or lacks node_id and node_count to generate.
        """
        self._check_phase(phase)
        self._begin(config, phase)

    def _begin(self, config: PoCConfig, state: PoCState) -> None:
        if not isinstance(config, PoCConfig):
            raise TypeError(f"config must be a PoCConfig, got {type(config).__name__}")
        if config.seq_len > self.engine.max_positions:
            raise ValueError(
                f"seq_len must be at most the {self.engine.max_positions} positions of the model, got {config.seq_len}"
            )
        self._check_can_enter(config, state)
        with self._lock:
            if self._state in (PoCState.GENERATING, PoCState.VALIDATING):
                raise IllegalTransitionError(
                    f"a round begins in state IDLE or STOPPED, the state is {self._state.value}"
                )
            self._round = _Round(config)
            self._enter(state)

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
            if phase not in _TRANSITIONS[self._state]:
                raise IllegalTransitionError(f"phase {phase.value} needs a round, the state is {self._state.value}")
            self._check_can_enter(self._round.config, phase)
            self._enter(phase)

    def stop_round(self) -> None:
        """End the round. What is being computed is finished and thrown away. Stopping twice is harmless."""
        with self._lock:
            self._enter(PoCState.STOPPED)

    def _enter(self, state: PoCState) -> None:
        now, current = time.monotonic(), self._round
        if current is not None:
            if current.generating_since is not None:
                current.generated_seconds += now - current.generating_since
            current.generating_since = now if state == PoCState.GENERATING else None
        self._state = state

    def status(self) -> dict[str, Any]:
        """State and progress: the keys of ``GET /api/v1/pow/status``.

        elapsed_seconds is the time spent in GENERATING, rate_per_second the nonces checked in it; r_target is None
        before the first round.
        """
        with self._lock:
            current = self._round
            elapsed = 0.0
            if current is not None:
                since = current.generating_since
                elapsed = current.generated_seconds + (time.monotonic() - since if since is not None else 0.0)
            checked = 0 if current is None else current.tried
            return {
                "state": self._state.value,
                "valid_nonces": [] if current is None else list(current.valid_nonces),
                "valid_distances": [] if current is None else list(current.valid_distances),
                "total_checked": checked,
                "total_valid": 0 if current is None else current.total_valid,
                "elapsed_seconds": elapsed,
                "rate_per_second": checked / elapsed if elapsed > 0 else 0.0,
                "r_target": None if current is None else current.config.r_target,
            }

    @staticmethod
    def _check_phase(phase: object) -> None:
        if phase not in (PoCState.GENERATING, PoCState.VALIDATING):
            raise ValueError(f"phase must be GENERATING or VALIDATING, got {phase}")

    @staticmethod
    def _check_can_enter(config: PoCConfig, state: PoCState) -> None:
        if state == PoCState.GENERATING:
            config.nonce(0)  # raises where the node does not know its place

    def _current(self, doing: str, states: Sequence[PoCState]) -> _Round:
        with self._lock:
            if self._round is None:
                raise IllegalTransitionError(f"{doing} needs a round, none was begun")
            if self._state not in states:
                wanted = " or ".join(state.value for state in states)
                raise IllegalTransitionError(f"{doing} needs state {wanted}, the state is {self._state.value}")
            return self._round

    # ---- work ----

    def run_batch(self, pause: Pause = never) -> ProofBatch:
        """Compute the next batch_size nonces of this node: all of them, valid or not (`ProofBatch.below`).

        Raises:
            IllegalTransitionError: the state is not GENERATING.
            RoundEndedError: the round ended meanwhile, or left GENERATING; these nonces do not count.
        """
        return self.advance(pause)[1]

    def advance(self, pause: Pause = never) -> tuple[PoCConfig, ProofBatch]:
        """`run_batch`, and the configuration of the round that the batch belongs to."""
        current = self._current("run_batch", (PoCState.GENERATING,))
        config = current.config
        with self._compute_lock:
            first = current.tried
            nonces = [config.nonce(first + index) for index in range(config.batch_size)]

            def pause_and_check() -> None:
                pause()
                self._check_generates(current)

            computed = self._compute(current, config.public_key, nonces, "generate", pause_and_check)
            with self._lock:
                self._check_generates(current)
                current.tried = first + config.batch_size
                batch = ProofBatch(
                    config.public_key, config.block_hash, config.block_height, nonces, computed, config.node_id
                )
                valid = batch.below(config.r_target)
                current.total_valid += len(valid)
                current.valid_nonces += valid.nonces
                current.valid_distances += valid.dist
                excess = len(current.valid_nonces) - self._max_listed
                if excess > 0:
                    del current.valid_nonces[:excess], current.valid_distances[:excess]
        return config, batch

    def _check_generates(self, current: _Round) -> None:
        with self._lock:
            if self._round is not current or self._state != PoCState.GENERATING:
                raise RoundEndedError("the round left GENERATING while the batch was computed")

    def check_batch(self, batch: ProofBatch) -> PoCConfig:
        """The configuration of the round in which ``batch`` can be validated now.

        Raises:
            IllegalTransitionError: no round was begun, or it was stopped.
            ValueError: the batch belongs to another block than the round.
        """
        config = self._current("validate", _VALIDATING_STATES).config
        self._check_belongs(batch, config)
        return config

    @staticmethod
    def _check_belongs(batch: ProofBatch, config: PoCConfig) -> None:
        if not isinstance(batch, ProofBatch):
            raise TypeError(f"batch must be a ProofBatch, got {type(batch).__name__}")
        for name in ("block_hash", "block_height"):
            wanted, got = getattr(config, name), getattr(batch, name)
            if got != wanted:
                raise ValueError(f"{name} of the batch must be the round's, {wanted!r}, got {got!r}")

    def validation(self, batch: ProofBatch, pause: Pause = never) -> Iterator[ValidatedBatch | None]:
        """Recompute ``batch`` forward by forward: None after each but the last, the verdict after the last.

        So whoever schedules the device decides when each forward runs, and by ``pause`` when each slice of it does. The
        batch belongs to the round of this call, however late its steps are taken. Errors as `validate`, the first two
        raised by this call.
        """
        current = self._current("validate", _VALIDATING_STATES)
        self._check_belongs(batch, current.config)
        return self._validation(current, batch, pause)

    def _validation(self, current: _Round, batch: ProofBatch, pause: Pause) -> Iterator[ValidatedBatch | None]:
        def pause_and_check() -> None:
            pause()
            self._check_goes_on(current)

        config = current.config
        recomputed: list[float] = []
        for start in range(0, len(batch), config.batch_size):
            if start > 0:
                yield None
            self._check_goes_on(current)
            nonces = batch.nonces[start : start + config.batch_size]
            with self._compute_lock:
                recomputed += self._compute(current, batch.public_key, nonces, "validate", pause_and_check)
        self._check_goes_on(current)
        yield validate_distances(batch, recomputed, config.r_target, config.fraud_threshold)

    def _check_goes_on(self, current: _Round) -> None:
        with self._lock:
            if self._round is not current or self._state == PoCState.STOPPED:
                raise RoundEndedError("the round ended while the batch was validated")

    def validate(self, batch: ProofBatch) -> ValidatedBatch:
        """Recompute every distance of ``batch`` and judge it. Allowed in every state of a round but STOPPED.

        Raises:
            IllegalTransitionError: no round was begun, or it was stopped.
            ValueError: the batch belongs to another block than the round.
            RoundEndedError: the round ended meanwhile.
        """
        return next(verdict for verdict in self.validation(batch) if verdict is not None)

    @torch.inference_mode()
    def _compute(
        self, current: _Round, public_key: str, nonces: list[int], phase: str, pause: Pause = never
    ) -> list[float]:
        config, engine = current.config, self.engine
        self._pieces.forget_unread()
        parts = _Parts(engine.device, pause)
        rows = nonces + [nonces[-1]] * (config.batch_size - len(nonces))
        with parts.part("inputs"):
            if current.target is None:
                current.target = target(config.block_hash, engine.vocab_size, engine.device)
            x, permutation = self._draw(config, public_key, rows, parts.pause)
        if config.use_random_projection:
            with parts.part("projection"):
                self._project_inputs(config, x, parts.pause)
        with parts.part("forward"):
            hidden = engine.forward(x, parts.pause)[:, -1].contiguous()
            parts.pause()
        if config.use_random_projection:
            with parts.part("projection"):
                hidden = self._projection.post(hidden)
        with parts.part("forward"):
            logits = engine.compute_logits(hidden)
            parts.pause()
        with parts.part("distance"):
            computed: list[float] = distances(logits, permutation, current.target).tolist()[: len(nonces)]
        self._pieces.read()
        if self._observer is not None:
            seconds = parts.seconds()
            self._observer(BatchReport(phase, computed, config.r_target, sum(seconds.values()), seconds))
        return computed

    def _draw(self, config: PoCConfig, public_key: str, rows: list[int], pause: Pause) -> tuple[Tensor, Tensor]:
        """Inputs and permutations of nonces, some rows at a time: no number depends on the others."""
        engine, block_hash = self.engine, config.block_hash
        length, vocab_size = config.seq_len * engine.hidden_size, engine.vocab_size
        x = torch.empty(len(rows), config.seq_len, engine.hidden_size, dtype=engine.dtype, device=engine.device)
        permutation = torch.empty(len(rows), vocab_size, dtype=torch.int64, device=engine.device)
        for some in self._pieces.of("inputs", len(rows), length, pause, at_once=_DRAWN_AT_ONCE // length):
            x[some] = nonce_inputs(
                block_hash, public_key, rows[some], config.seq_len, engine.hidden_size, engine.device, engine.dtype
            )
        for some in self._pieces.of("permutations", len(rows), vocab_size, pause, at_once=_DRAWN_AT_ONCE // vocab_size):
            permutation[some] = permutations(block_hash, public_key, rows[some], vocab_size, engine.device)
        return x, permutation

    def _project_inputs(self, config: PoCConfig, x: Tensor, pause: Pause) -> None:
        """The projection before the model, some rows at a time: a row's bits do not depend on the others.

        In place: a second tensor of this size makes a processor's forward slower, by its allocations.
        """
        if self._projected_hash != config.block_hash:
            self._projection.set_block_hash(config.block_hash)
            self._projected_hash = config.block_hash
        flat, width = x.view(-1, x.shape[-1]), x.shape[-1]
        pieces = self._pieces.of(
            "projection", len(flat), width, pause, at_once=_PROJECTED_AT_ONCE // width**2, least=_LEAST_PROJECTED_ROWS
        )
        for some in pieces:
            flat[some] = self._projection.pre(flat[some])
