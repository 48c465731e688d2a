"""What a node tells Prometheus."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, generate_latest

from ..protocol import BatchReport, PoCState, ProofForm
from .outbox import DropReason
from .queue import JobState

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_WAIT_BUCKETS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_SLICE_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.5, 1)


class Metrics:
    """The metrics of a node, in a registry of its own; also the observer of its manager and of its callbacks.

    Args:
        forms: of the proofs; outcomes of some have a histogram.
    """

    def __init__(self, forms: Sequence[ProofForm]) -> None:
        self.registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry)
        states = [state.value for state in PoCState]
        self.state = Enum("poc_state", "State of the node", states=states, registry=self.registry)
        self._checked = counter("poc_nonces_checked", "Nonces computed, by phase", ["phase"])
        self._valid = counter("poc_nonces_valid", "Nonces below r_target, or with an artifact, by phase", ["phase"])
        self._without = counter(
            "poc_nonces_without_artifact", "Nonces whose row was not finite in the model here, by phase", ["phase"]
        )
        self.rate = Gauge("poc_nonces_per_second", "Nonces checked per second of the round", registry=self.registry)
        self._outcomes = {
            of.name: histogram(of.name, of.description, buckets=of.buckets)
            for of in (form.histogram for form in forms)
            if of is not None
        }
        self._batch_seconds = histogram(
            "poc_batch_seconds", "Time of a forward of a round", ["phase"], buckets=_SECONDS_BUCKETS
        )
        self._part_seconds = counter("poc_part_seconds", "Time of rounds by part of the work", ["part"])
        self._slice_seconds = histogram(
            "poc_slice_seconds", "Time of a slice of a forward of a round", buckets=_SLICE_BUCKETS
        )
        self._waited = counter("poc_waited_seconds", "Time that slices of a round waited for users")
        self._validations = counter("poc_validations", "Batches to validate that ended, by outcome", ["outcome"])
        self._validation_wait = histogram(
            "poc_validation_wait_seconds", "Time that batches waited for their first forward", buckets=_WAIT_BUCKETS
        )
        self._batch_failures = counter("poc_batch_failures", "Forwards of a round that raised")
        self._frauds = counter("poc_frauds", "Batches judged to be fraud")
        self._abstentions = counter(
            "poc_abstentions", "Batches without a verdict, since too many of their nonces gave nothing here"
        )
        self._refusals = counter("poc_gate_refusals", "Requests refused at the gate", ["reason"])
        self._delivered = counter("poc_callbacks_delivered", "Callbacks delivered", ["kind"])
        self._failures = counter("poc_callback_failures", "Failed attempts at a callback", ["kind"])
        self._dropped = counter("poc_callback_dropped_nonces", "Nonces whose callback was dropped", ["kind"])
        self._given_up = counter("poc_callbacks_dropped", "Callbacks dropped, by reason", ["kind", "reason"])
        for part in dict.fromkeys(part for form in forms for part in form.parts):
            self._part_seconds.labels(part)
        for phase in ("generate", "validate"):
            self._checked.labels(phase)
            self._valid.labels(phase)
            self._without.labels(phase)
        for outcome in (JobState.DONE, JobState.FAILED, JobState.CANCELLED):
            self._validations.labels(outcome.value.lower())
        for kind in ("generated", "validated"):
            self._delivered.labels(kind)
            self._failures.labels(kind)
            self._dropped.labels(kind)
            for reason in get_args(DropReason):
                self._given_up.labels(kind, reason)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when metrics are asked for."""
        Gauge(name, description, registry=self.registry).set_function(value)

    def batch(self, report: BatchReport) -> None:
        """Count a forward: the observer of a `PoCManager`."""
        self._checked.labels(report.phase).inc(len(report.outcomes))
        self._valid.labels(report.phase).inc(report.valid)
        self._without.labels(report.phase).inc(report.outcomes.count(None))
        self._batch_seconds.labels(report.phase).observe(report.seconds)
        for part, seconds in report.part_seconds.items():
            self._part_seconds.labels(part).inc(seconds)
        measured = report.form.histogram
        if measured is not None:
            for value in map(measured.measure, report.outcomes):
                self._outcomes[measured.name].observe(value if math.isfinite(value) else math.inf)

    def slice(self, seconds: float) -> None:
        """Count a slice of a forward."""
        self._slice_seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        """Add the time that a slice waited for its turn."""
        self._waited.inc(seconds)

    def validation_ended(self, outcome: JobState, waited_seconds: float | None) -> None:
        """Count a validation that ended, and the time that it waited: None if none of its forwards had begun."""
        self._validations.labels(outcome.value.lower()).inc()
        if waited_seconds is not None:
            self._validation_wait.observe(waited_seconds)

    def batch_failed(self) -> None:
        """Count a forward of a round that raised."""
        self._batch_failures.inc()

    def fraud(self) -> None:
        """Count a batch judged to be fraud."""
        self._frauds.inc()

    def abstained(self) -> None:
        """Count a batch without a verdict, since too many of its nonces gave nothing here."""
        self._abstentions.inc()

    def refused(self, reason: str) -> None:
        """Count a request that was refused at the gate."""
        self._refusals.labels(reason).inc()

    def delivered(self, kind: str, nonces: int) -> None:
        """Count a callback that was delivered."""
        self._delivered.labels(kind).inc()

    def failed(self, kind: str) -> None:
        """Count a failed attempt at a callback."""
        self._failures.labels(kind).inc()

    def dropped(self, kind: str, nonces: int, reason: DropReason) -> None:
        """Count a callback that was dropped, and its nonces."""
        self._dropped.labels(kind).inc(nonces)
        self._given_up.labels(kind, reason).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
