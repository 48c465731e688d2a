"""Validation while users are served: engine, manager and worker as a node has them, and without priorities."""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from bench.interference.load import OUTSTANDING_PROOFS, DifferenceError
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.protocol import (
    BatchReport,
    DistanceProver,
    PoCConfig,
    PoCManager,
    PoCState,
    ProofBatch,
    ValidatedBatch,
)
from poc_kernels.scheduling import PriorityLanes, Turns
from poc_kernels.scheduling.slices import MEASURED_FORWARDS
from poc_kernels.service.device import TurnsDevice
from poc_kernels.service.settings import ServiceSettings
from poc_kernels.service.worker import ProofWorker

BLOCK_HASH, PUBLIC_KEY = "0x00000000000000000001a2b3c4d5e6f7", "bench"
PROOFS = 4
"""Batches of proofs, which come again and again."""


class EqualLanes(PriorityLanes):
    """Lanes of one priority: what two threads do that know nothing of each other."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.lowers_threads = False

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        if self.inference_stream is None:
            yield
            return
        priority = self.inference_stream.priority
        with torch.cuda.stream(torch.cuda.Stream(self.device, priority=priority)):
            yield


class Recorder:
    """Records what the worker and the manager report; stands in place of the node's metrics.

    Args:
        slices: gets the seconds of each slice.
        slice_waits: gets the seconds that each slice waited.
    """

    def __init__(self, slices: list[float], slice_waits: list[float]) -> None:
        self.slices, self.slice_waits = slices, slice_waits
        self.parts: list[float] = []
        """The time at which each slice was done."""
        self.batches: list[int] = []
        """The number of slices that were done at the end of each batch."""
        self.failures = 0
        self.frauds = 0

    def slice(self, seconds: float) -> None:
        self.slices.append(seconds)
        self.parts.append(time.monotonic())

    def waited(self, seconds: float) -> None:
        self.slice_waits.append(seconds)

    def validation_ended(self, state: Any, seconds: float) -> None:
        """Do nothing: every batch's outcome is checked where it was submitted."""

    def batch(self, report: BatchReport) -> None:
        self.batches.append(len(self.parts) + 1)  # the last slice ends after its batch

    def batch_failed(self) -> None:
        self.failures += 1

    def fraud(self) -> None:
        self.frauds += 1


class _NoCallbacks:
    """Fails if a callback is sent: a round without a callback URL has none."""

    def generated(self, url: str, batch: dict[str, Any], **options: Any) -> None:
        raise AssertionError(f"a callback to {url}")

    validated = generated


def round_config(case: Any, projection: bool) -> PoCConfig:
    """Return the round that proofs are validated in: every distance is valid, so no honest batch is judged fraud."""
    return PoCConfig(
        block_hash=BLOCK_HASH,
        block_height=1,
        public_key=PUBLIC_KEY,
        r_target=2.0,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        use_random_projection=projection,
    )


def _manager(prover: DistanceProver, config: PoCConfig, *options: Any) -> PoCManager:
    manager = PoCManager(prover, *options)
    manager.start_round(config, PoCState.VALIDATING)
    return manager


def _worker(
    manager: PoCManager,
    turns: Turns,
    lanes: PriorityLanes,
    recorder: Recorder,
    config: PoCConfig,
    slices_in_flight: int,
) -> ProofWorker:
    device = TurnsDevice(
        turns,
        lanes,
        drain=lambda seconds: True,  # nothing is generated
        max_slices_in_flight=slices_in_flight,
        low_priority=True,  # where the lanes have it so
    )
    sinks: Any = (_NoCallbacks(), recorder)
    room = 2 * OUTSTANDING_PROOFS * config.batch_size  # of which one submitter takes half
    settings = ServiceSettings(drain_seconds=0.0, max_queued_nonces=room, stall_seconds=600.0)
    return ProofWorker(manager, device, *sinks, settings)


def distances_alone(model: Any, config: PoCConfig) -> list[ProofBatch]:
    """Return batches with the distances that another engine computes in one slice, with nothing else on the device."""
    manager = _manager(DistanceProver(TransformersEngine(model, cuda_graphs=False, slice_seconds=1e9)), config)
    batches = []
    for index in range(PROOFS):
        nonces = list(range(index * config.batch_size, (index + 1) * config.batch_size))
        computed = manager.validate(ProofBatch(PUBLIC_KEY, BLOCK_HASH, 1, nonces, [])).dist
        batches.append(ProofBatch(PUBLIC_KEY, BLOCK_HASH, 1, nonces, computed))
    manager.stop_round()
    return batches


class Validation:
    """Validates the proofs of a round in one kind of lanes. Of several, one computes at a time.

    Args:
        model: whose weights compute.
        turns: the device, shared with inference.
        lanes: where the worker computes.
        slices, slice_waits: get the seconds of slices, and those that slices waited.
        config: the round.
        slice_seconds, slices_in_flight: as the settings of a node.
    """

    def __init__(
        self,
        model: Any,
        turns: Turns,
        lanes: PriorityLanes,
        slices: list[float],
        slice_waits: list[float],
        config: PoCConfig,
        *,
        slice_seconds: float,
        slices_in_flight: int,
    ) -> None:
        self.engine = TransformersEngine(model, slice_seconds=slice_seconds, alone=turns.alone)
        self._recorder = Recorder(slices, slice_waits)
        prover = DistanceProver(self.engine, slice_seconds=slice_seconds)
        self._manager = _manager(prover, config, self._recorder.batch)
        self._worker = _worker(self._manager, turns, lanes, self._recorder, config, slices_in_flight)
        self.parts_per_batch = 0
        self.nonces_per_part = 0.0

    def start(self, batches: Sequence[ProofBatch], timeout_seconds: float) -> None:
        """Have slices measured and the forward captured, while nothing else computes.

        Raises:
            DifferenceError: a distance in slices is not that of one slice.
        """
        self._worker.start()
        for index in range(MEASURED_FORWARDS + 2):  # those that measure, one that captures, one as all later ones
            batch = batches[index % len(batches)]
            computed = self.submit(batch).result(timeout_seconds).dist
            if computed != batch.dist:
                raise difference(batch, computed)
        ends = self._recorder.batches
        self.parts_per_batch = ends[-1] - ends[-2]
        self.nonces_per_part = len(batches[0]) / self.parts_per_batch

    def submit(self, batch: ProofBatch) -> Future[ValidatedBatch]:
        return self._worker.enqueue(batch, "bench").future

    def nonces_between(self, begin: float, end: float) -> float:
        """Return the nonces done between two times, counted slice by slice."""
        parts = self._recorder.parts
        return (bisect.bisect_left(parts, end) - bisect.bisect_left(parts, begin)) * self.nonces_per_part

    def trouble(self) -> str | None:
        return self._worker.trouble()

    def check(self) -> None:
        """Raise if a batch failed or an honest one was judged a fraud."""
        if self._recorder.failures or self._recorder.frauds:
            raise DifferenceError(
                f"{self._recorder.failures} batches failed, {self._recorder.frauds} honest ones were judged fraud"
            )

    def close(self, timeout_seconds: float) -> None:
        self._manager.stop_round()
        self._worker.close(timeout_seconds)


def difference(expected: ProofBatch, computed: Sequence[float]) -> DifferenceError:
    """Return the error that names the first distance that is not the one computed alone."""
    for nonce, alone, other in zip(expected.nonces, expected.dist, computed, strict=False):
        if alone != other:
            return DifferenceError(f"the distance of nonce {nonce} is {other!r}, alone it is {alone!r}")
    return DifferenceError(f"{len(computed)} distances came for {len(expected.nonces)} nonces")
