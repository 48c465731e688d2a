"""PoCManager: the states of a node's rounds, the nonces that it tries, and its verdicts. A `Prover` computes.

There is no tensor here, and nothing of an engine or a server.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from ..scheduling.slices import Pause
from .config import PoCConfig
from .engine import never
from .form import ProofForm, form_of
from .prover import AHEAD, Outcomes, Prover, Row
from .states import PHASES, IllegalTransitionError, PoCState, RoundEndedError

logger = logging.getLogger("poc_kernels")


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """One forward: its phase ("generate" or "validate"), its outcomes, and the seconds of each part of its work.

    Args:
        form: that it was of.
        outcomes: one per nonce, as the proof form has them.
        valid: how many of them count.
        seconds: all parts together. Pauses do not count; on a CPU, other programs on its cores do.
    """

    form: ProofForm
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
    """Whether it was stopped or another one begun: what was under way then is thrown away."""
    tried: int = 0
    exhausted: bool = False
    """Whether generation ended because every nonce was tried that validators take."""
    generating_since: float | None = None
    generated_seconds: float = 0.0
    total_valid: int = 0
    valid_nonces: list[int] = dataclasses.field(default_factory=list)
    valid_outcomes: list[Any] = dataclasses.field(default_factory=list)

    def seconds_generating(self) -> float:
        """Return how long it was in GENERATING until now."""
        since = self.generating_since
        return self.generated_seconds + (0.0 if since is None else time.monotonic() - since)


@dataclasses.dataclass(eq=False)
class Validation:
    """A proof that is being validated. Whoever schedules the device decides which forwards recompute its nonces.

    Args:
        round: the one that the proof belongs to, however late its forwards are.
        proof: what a node claims.
        outcomes: those recomputed so far, of the first nonces of the proof. `PoCManager.recompute` alone adds to them.
        request: the configuration that it came with, if it is of no round that the node was begun with.
    """

    round: Round
    proof: Any
    outcomes: list[Any] = dataclasses.field(default_factory=list)
    request: PoCConfig | None = None

    @property
    def config(self) -> PoCConfig:
        """The configuration that it is judged by."""
        return self.round.config if self.request is None else self.request

    @property
    def left(self) -> int:
        """Nonces that are still to be recomputed."""
        return len(self.proof) - len(self.outcomes)

    def rows(self, count: int, skipped: int = 0) -> list[Row]:
        """Return the rows of the next ``count`` nonces, after ``skipped`` that come before them."""
        done = len(self.outcomes) + skipped
        return [Row(self.proof.public_key, nonce) for nonce in self.proof.nonces[done : done + count]]


class PoCManager:
    """Runs the rounds of a node on a prover.

    States: `PoCState`. `init_round` and `start_round` begin a round, in place of the one that runs; `set_phase` goes
    between the phases of a round, `stop_round` ends it. A round that has tried every nonce of its node that validators
    take (`ProofForm.max_nonce`) goes from GENERATING to VALIDATING, and generates no more. Methods may be called from
    any thread; forwards run one at a time.

    Args:
        prover: what computes.
        observer: called after every forward, in its thread.
        max_listed: how many valid nonces `status` lists at most: the latest.
    """

    def __init__(
        self, prover: Prover, observer: Callable[[BatchReport], None] | None = None, max_listed: int = 100_000
    ) -> None:
        self.prover = prover
        self._observer = observer
        self._max_listed = max_listed
        self._state = PoCState.IDLE
        self._round: Round | None = None
        self._requested: WeakValueDictionary[Hashable, Round] = WeakValueDictionary()
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

    def form(self, config: PoCConfig | None) -> ProofForm:
        """Return the proof form of a round; the prover's first for None."""
        forms = self.prover.forms
        return next(iter(forms.values())) if config is None else forms[config.proof]

    def check(self, config: PoCConfig) -> ProofForm:
        """Return the proof form of a configuration that the prover can prove.

        Raises:
            ValueError: it does not fit the form or the prover.
        """
        form = form_of(config, self.prover.forms)
        self.prover.check(config)
        return form

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change of the state or the round, in the thread that made it."""
        self._listeners.append(listener)

    def init_round(self, config: PoCConfig) -> None:
        """Begin a round in state IDLE: configured, no phase running.

        What is being computed for another round is thrown away. Where a round of this very configuration was begun and
        not stopped, nothing changes.

        Raises:
            ValueError: the configuration does not fit the prover.
        """
        self._begin(config, PoCState.IDLE, replace=True)

    def start_round(self, config: PoCConfig, phase: PoCState = PoCState.GENERATING, *, replace: bool = True) -> None:
        """Begin a round in ``phase``, GENERATING or VALIDATING.

        What is being computed for another round is thrown away. A round of this very configuration that was begun and
        not stopped goes on, in this phase.

        Args:
            config: of the round.
            phase: that it begins in.
            replace: begin it also while a round generates, of whatever configuration.

        Raises:
            ValueError: the configuration does not fit the prover, or lacks node_id and node_count to generate, or gives
                no nonce that validators take.
            IllegalTransitionError: a round generates, and is not to be replaced; or this one has no nonces left.
        """
        self._begin(config, self._checked_phase(phase), replace)

    def _begin(self, config: PoCConfig, state: PoCState, replace: bool) -> None:
        if not isinstance(config, PoCConfig):
            raise TypeError(f"config must be a PoCConfig, got {type(config).__name__}")
        self.check(config)
        self._check_can_enter(config, state)
        with self._lock:
            current = self._round
            if not replace and self._state == PoCState.GENERATING:
                raise IllegalTransitionError("Already generating")
            if current is None or current.config != config or self._state == PoCState.STOPPED:
                if current is not None:
                    current.ended = True
                self._round = Round(dataclasses.replace(config))  # to a prover, a round is this very object
                self._enter(state)
            elif state in PHASES:
                self._check_has_nonces(current, state)
                self._enter(state)
        self._changed()

    def set_phase(self, phase: PoCState) -> None:
        """Go to another phase of the round; a phase that is running already goes on.

        Raises:
            IllegalTransitionError: no round was begun, or it was stopped, or has no nonces left to generate.
            ValueError: phase is neither GENERATING nor VALIDATING; or the configuration does not allow to generate.
        """
        phase = self._checked_phase(phase)
        with self._lock:
            if self._round is None:
                raise IllegalTransitionError(f"PoC not initialized: phase {phase.value} needs a round, none was begun")
            if self._state == PoCState.STOPPED:
                raise IllegalTransitionError(f"phase {phase.value} needs a round, the state is {self._state.value}")
            self._check_can_enter(self._round.config, phase)
            self._check_has_nonces(self._round, phase)
            self._enter(phase)
        self._changed()

    def stop_round(self) -> None:
        """End the round. What is being computed is thrown away; proofs that come later can still be validated."""
        with self._lock:
            self._enter(PoCState.STOPPED)
            if self._round is not None:
                self._round.ended = True
                self._round = dataclasses.replace(self._round, ended=False)
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
                "generation_ended": self._why_ended(current),
                "r_target": None if current is None else current.config.r_target,
            }

    def status(self) -> dict[str, Any]:
        """Return state and progress: the keys of ``GET /api/v1/pow/status``.

        elapsed_seconds is the time spent in GENERATING, rate_per_second the nonces checked in it; r_target is None
        before the first round, and generation_ended unless every nonce was tried, which it then says.
        """
        with self._lock:
            current, listed_as = self._round, self.form(self.config).listed_as
            told = {**self.progress(), "valid_nonces": [] if current is None else list(current.valid_nonces)}
            if listed_as is not None:
                told[listed_as] = [] if current is None else list(current.valid_outcomes)
            return told

    @staticmethod
    def _checked_phase(phase: object) -> PoCState:
        if phase not in PHASES:
            raise ValueError(f"phase must be GENERATING or VALIDATING, got {phase}")
        return PoCState(phase)  # its text is equal to it

    def _check_can_enter(self, config: PoCConfig, state: PoCState) -> None:
        if state == PoCState.GENERATING and self._count(config) == 0:  # raises where the node does not know its place
            raise ValueError(
                "node_id, node_count, group_id and n_groups must give nonces of at most "
                f"{self.form(config).max_nonce}, got {config.nonce(0)} as the first"
            )

    def _check_has_nonces(self, current: Round, state: PoCState) -> None:
        if state == PoCState.GENERATING and current.exhausted:
            raise IllegalTransitionError(f"phase GENERATING needs another round: {self._why_ended(current)}")

    def _why_ended(self, current: Round | None) -> str | None:
        """Return why a round generates no more; None if it has nonces left."""
        if current is None or not current.exhausted:
            return None
        return f"every nonce of this node up to {self.form(current.config).max_nonce} was tried"

    def _count(self, config: PoCConfig) -> int:
        """Return how many nonces a round can generate."""
        return config.nonces_up_to(self.form(config).max_nonce)

    def _generating(self) -> Round:
        with self._lock:
            if self._round is None or self._state != PoCState.GENERATING:
                why = self._why_ended(self._round)
                text = f"run_batch needs state GENERATING, the state is {self._state.value}"
                raise IllegalTransitionError(text if why is None else f"{text}: {why}")
            return self._round

    # ---- work ----

    def run_batch(self, pause: Pause = never) -> Any:
        """Compute the next nonces of this node and return the proof of them all, valid or not.

        They are batch_size, or what is left of those that validators take; with the last of them, GENERATING ends.

        Raises:
            IllegalTransitionError: the state is not GENERATING.
            RoundEndedError: the round ended meanwhile, or left GENERATING; these nonces do not count.
        """
        return self.advance(pause)[1]

    def upcoming(self, config: PoCConfig, count: int) -> list[list[Row]]:
        """Return the rows of the next ``count`` batches to generate; none while the round generates nothing.

        Args:
            config: none either if the round has another configuration.
            count: how many batches.
        """
        with self._lock:
            current = self._round
            if current is None or current.config != config or self._state != PoCState.GENERATING:
                return []
            return _batches(current, count, self._count(config))

    def advance(self, pause: Pause = never, then: Sequence[Sequence[Row]] | None = None) -> tuple[PoCConfig, Any, Any]:
        """Return the round's configuration, the proof of `run_batch`, and the part of it that is valid.

        Args:
            pause: called between two slices of the forward.
            then: rows of the forwards that are likely to follow, for the prover; by default the next batches.
        """
        current = self._generating()
        config = current.config
        form = self.form(config)

        def check() -> None:
            if current.ended or self._state != PoCState.GENERATING:
                raise RoundEndedError("the round left GENERATING while the batch was computed")

        count = self._count(config)
        with self._compute_lock:
            check()
            rows, *following = _batches(current, 1 + AHEAD, count)
            nonces = [row.nonce for row in rows]
            outcomes = self._prove(current, rows, "generate", pause, check, following if then is None else then)
            with self._lock:
                check()
                current.tried += len(rows)
                proof = form.proof(config, nonces, outcomes)
                valid = form.valid(config, proof)
                current.total_valid += len(valid)
                current.valid_nonces += valid.nonces
                if form.listed_as is not None:
                    current.valid_outcomes += form.outcomes(valid)
                excess = len(current.valid_nonces) - self._max_listed
                if excess > 0:
                    del current.valid_nonces[:excess], current.valid_outcomes[:excess]
                if current.tried == count:
                    current.exhausted = True
                    self._enter(PoCState.VALIDATING)
        if current.exhausted:
            logger.warning("the round generates no more: %s", self._why_ended(current))
            self._changed()
        return config, proof, valid

    def validation(self, proof: Any, config: PoCConfig | None = None) -> Validation:
        """Return what `recompute` and `verdict` take to validate ``proof``.

        Args:
            proof: what a node claims.
            config: what it is validated by, in any state and whatever round comes or ends; None for the round.

        Raises:
            IllegalTransitionError, TypeError, ValueError: as `validate`; or ``config`` does not fit the prover.
        """
        current = self._round if config is None else self._round_of_requests(config)
        if current is None:
            raise IllegalTransitionError("No round configured: validate needs a round, none was begun")
        wanted_of = current.config if config is None else config
        proof_type = self.form(wanted_of).proof_type
        if not isinstance(proof, proof_type):
            raise TypeError(f"batch must be a {proof_type.__name__}, got {type(proof).__name__}")
        for name in ("block_hash", "block_height"):
            wanted, got = getattr(wanted_of, name), getattr(proof, name)
            if got != wanted:
                mismatch = name.replace("_", " ").capitalize()
                raise ValueError(
                    f"{mismatch} mismatch: {name} of the batch must be the round's, {wanted!r}, got {got!r}"
                )
        return Validation(current, proof, request=config)

    def _round_of_requests(self, config: PoCConfig) -> Round:
        """Return the round that all requests share whose rows may share a forward, while there are any."""
        key = self.check(config).forward_key(config)
        with self._lock:
            return self._requested.setdefault(key, Round(dataclasses.replace(config)))

    def recompute(
        self, shares: Sequence[tuple[Validation, int]], pause: Pause = never, then: Sequence[Sequence[Row]] = ()
    ) -> None:
        """Compute one forward for several validations of a round: rows do not depend on each other.

        Args:
            shares: each validation once, with how many of its next nonces to recompute; together 1 to batch_size.
            pause: called between two slices of the forward.
            then: rows of the forwards of this round that are likely to follow, for the prover.

        Raises:
            ValueError: validations are of several rounds, or repeated, or have not that many nonces left.
            RoundEndedError: the round ended meanwhile.
        """
        if len({validation for validation, _ in shares}) != len(shares):
            raise ValueError(f"shares must have each validation once, got {len(shares)} shares with one repeated")
        rounds = {validation.round for validation, _ in shares}
        if len(rounds) != 1:
            raise ValueError(f"shares must be of one round, got {len(rounds)}")
        (current,) = rounds
        total = sum(count for _, count in shares)
        if not all(0 < count <= validation.left for validation, count in shares) or total > current.config.batch_size:
            got = [(count, validation.left) for validation, count in shares]
            raise ValueError(
                f"shares must have 1 to batch_size {current.config.batch_size} nonces, each at most what is left, "
                f"got (nonces, left) {got}"
            )
        rows = [row for validation, count in shares for row in validation.rows(count)]
        with self._compute_lock:
            _check_validating(current)
            computed = iter(self._prove(current, rows, "validate", pause, lambda: _check_validating(current), then))
            for validation, count in shares:
                validation.outcomes += itertools.islice(computed, count)

    def verdict(self, validation: Validation) -> Any:
        """Return the verdict on a proof all of whose nonces were recomputed.

        Raises:
            ValueError: some were not.
            RoundEndedError: the round ended meanwhile.
            NoVerdictError: too many of them gave nothing here: see `judge`.
        """
        if validation.left:
            raise ValueError(f"validation must have no nonces left to recompute, got {validation.left}")
        _check_validating(validation.round)
        config = validation.config
        return self.form(config).verdict(config, validation.proof, validation.outcomes)

    def validate(self, proof: Any) -> Any:
        """Recompute every nonce of ``proof`` and return the verdict. A round that was stopped allows it too.

        Raises:
            IllegalTransitionError: no round was begun.
            TypeError: it is no proof of the round's form.
            ValueError: the proof belongs to another block than the round.
            RoundEndedError: the round ended meanwhile.
            NoVerdictError: too many nonces gave nothing here: see `judge`.
        """
        validation = self.validation(proof)
        while validation.left:
            self.recompute([(validation, min(validation.left, validation.round.config.batch_size))])
        return self.verdict(validation)

    def _prove(
        self,
        current: Round,
        rows: list[Row],
        phase: str,
        pause: Pause,
        check: Callable[[], None],
        then: Sequence[Sequence[Row]],
    ) -> list[Any]:
        def pause_and_check() -> None:
            pause()
            check()

        outcomes: Outcomes = self.prover.prove(current.config, rows, pause_and_check, then)
        if len(outcomes.values) != len(rows):
            raise RuntimeError(f"the prover must give {len(rows)} outcomes, one per row, got {len(outcomes.values)}")
        if self._observer is not None:
            seconds = dict(outcomes.part_seconds)
            form = self.form(current.config)
            valid = form.count_valid(current.config, outcomes.values)
            self._observer(BatchReport(form, phase, outcomes.values, valid, sum(seconds.values()), seconds))
        return outcomes.values


def _batches(of: Round, count: int, nonces: int) -> list[list[Row]]:
    """Return the rows of the next ``count`` batches to generate, or fewer, of a round that has so many nonces."""
    config = of.config
    firsts = range(of.tried, min(of.tried + count * config.batch_size, nonces), config.batch_size)
    return [
        [Row(config.public_key, config.nonce(index)) for index in range(first, min(first + config.batch_size, nonces))]
        for first in firsts
    ]


def _check_validating(of: Round) -> None:
    if of.ended:
        raise RoundEndedError("the round ended while the batch was validated")
