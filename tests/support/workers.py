"""A proof worker on an engine of a few lines, and what it works with."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from small_engine import SmallEngine
from web import TIMEOUT, eventually

from poc_kernels.protocol import DistanceProver, PoCConfig, PoCManager, PoCState, ProofBatch, ValidatedBatch
from poc_kernels.scheduling import Pacing, PriorityLanes, Turns
from poc_kernels.service import worker as worker_module
from poc_kernels.service.device import TurnsDevice
from poc_kernels.service.metrics import Metrics
from poc_kernels.service.settings import ServiceSettings
from poc_kernels.service.worker import ProofWorker

BATCH = 4
PATIENT = Pacing(share=1e-6, max_wait_seconds=3600.0)
"""No step, however long, owes a slice: while one runs, proofs wait."""


class Posted:
    """Stands in for the sender of callbacks."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, str, dict[str, Any]]] = []

    def generated(self, url: str, batch: dict[str, Any], *, per_nonce: tuple[str, ...], nonces: list[int]) -> None:
        self.batches.append(("generated", url, batch))

    def validated(self, url: str, batch: dict[str, Any], nonces: list[int]) -> None:
        self.batches.append(("validated", url, batch))

    def nonces(self) -> list[int]:
        return [nonce for kind, _, batch in self.batches if kind == "generated" for nonce in batch["nonces"]]


class Parts:
    """A worker, and what it works with."""

    def __init__(self, turns: Turns | None = None, **options: Any) -> None:
        self.engine = SmallEngine()
        prover = DistanceProver(self.engine)
        self.metrics = Metrics(list(prover.forms.values()))
        self.manager = PoCManager(prover, self.metrics.batch)
        self.turns = turns or Turns()
        self.callbacks = Posted()
        of_device = {name: options.pop(name) for name in ("low_priority", "max_slices_in_flight") if name in options}
        drain = options.pop("drain", lambda seconds: True)
        self.device = TurnsDevice(self.turns, PriorityLanes("cpu"), drain, **of_device)
        defaults: dict[str, Any] = {"drain_seconds": 0.0, "max_queued_nonces": 200, "stall_seconds": 60.0}
        self.worker = ProofWorker(
            self.manager,
            self.device,
            self.callbacks,  # type: ignore[arg-type]
            self.metrics,
            ServiceSettings(**{**defaults, **options}),
        )

    def submit(self, batch: ProofBatch, submitter: str = "this process") -> Future[ValidatedBatch]:
        return self.worker.enqueue(batch, submitter).future

    def begin(self, phase: PoCState = PoCState.GENERATING, **changes: Any) -> None:
        self.manager.start_round(config(**changes), phase)

    def stop(self) -> None:
        self.manager.stop_round()

    def checked(self, minimum: int) -> None:
        eventually(lambda: self.manager.status()["total_checked"] >= minimum)

    def ended(self) -> bool:
        return not self.worker._thread.is_alive()


def config(**changes: Any) -> PoCConfig:
    defaults = {"batch_size": BATCH, "seq_len": 3, "r_target": 1.4, "callback_url": "http://chain"}
    return PoCConfig(**{"block_hash": "block", "block_height": 1, "public_key": "key", **defaults, **changes})


def proof(count: int, dist: float | None = None, **changes: Any) -> ProofBatch:
    claimed = [] if dist is None else [dist] * count
    common = {"public_key": "key", "block_hash": "block", "block_height": 1}
    return ProofBatch(**{**common, "nonces": list(range(count)), "dist": claimed, **changes})


def alone(count: int, **changes: Any) -> list[float]:
    manager = PoCManager(DistanceProver(SmallEngine()))
    manager.init_round(config(**changes))
    return manager.validate(proof(count)).dist


def failing(*times: int) -> Callable[[], None]:
    """Fails that many times; without end if no number is given."""
    errors = itertools.repeat(RuntimeError("out of memory"), *times)

    def fail() -> None:
        for error in errors:
            raise error

    return fail


@contextlib.contextmanager
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Parts]]:
    """Makes workers that have started and try again at once; none outlives the block."""
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.01)
    made: list[Parts] = []

    def make(start: bool = True, **options: Any) -> Parts:
        made.append(Parts(**options))
        if start:
            made[-1].worker.start()
        return made[-1]

    yield make
    for parts in made:
        parts.worker.close(TIMEOUT)
        assert parts.ended()
