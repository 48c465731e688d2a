"""Metrics as Prometheus reads them."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from poc_kernels.protocol import BatchReport, PoCState
from poc_kernels.protocol.distances.form import DISTANCES
from poc_kernels.protocol.vectors.form import VECTORS
from poc_kernels.service.metrics import Metrics
from poc_kernels.service.queue import JobState


def samples(metrics: Metrics) -> dict[str, float]:
    """Values by name and labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def report(phase: str, *distances: float) -> BatchReport:
    parts = {"inputs": 0.25, "projection": 0.0, "forward": 0.5, "distance": 0.25}
    valid = sum(distance < 1.4 for distance in distances)
    return BatchReport(DISTANCES, phase, list(distances), valid, 1.0, parts)


def test_all_is_there_from_the_start() -> None:
    told = samples(Metrics([DISTANCES]))
    zeros = {name: value for name, value in told.items() if "_created" not in name}
    states = {f"poc_state poc_state={state.value}" for state in PoCState}
    assert set(zeros) >= states
    assert {name for name, value in zeros.items() if value != 0} == {"poc_state poc_state=IDLE"}
    for name in ("poc_nonces_checked_total", "poc_nonces_valid_total", "poc_nonces_without_artifact_total"):
        assert {f"{name} phase=generate", f"{name} phase=validate"} <= set(zeros)
    for outcome in ("done", "failed", "cancelled"):
        assert f"poc_validations_total outcome={outcome}" in zeros
    for name in ("poc_callbacks_delivered_total", "poc_callback_failures_total", "poc_callback_dropped_nonces_total"):
        assert {f"{name} kind=generated", f"{name} kind=validated"} <= set(zeros)


def test_batches() -> None:
    metrics = Metrics([DISTANCES])
    metrics.batch(report("generate", 1.39, 1.4, 1.41, 2.0))
    metrics.batch(report("generate", 1.0))
    metrics.batch(report("validate", math.nan, math.inf))
    told = samples(metrics)
    assert told["poc_nonces_checked_total phase=generate"] == 5
    assert told["poc_nonces_valid_total phase=generate"] == 2  # below the target, not at it
    assert told["poc_nonces_checked_total phase=validate"] == 2
    assert told["poc_nonces_valid_total phase=validate"] == 0
    assert told["poc_distance_count"] == told["poc_distance_bucket le=+Inf"] == 7
    assert told["poc_distance_bucket le=1.4142"] == 4
    assert told["poc_batch_seconds_count phase=generate"] == told["poc_batch_seconds_sum phase=generate"] == 2
    assert told["poc_part_seconds_total part=forward"] == 1.5
    assert told["poc_part_seconds_total part=projection"] == 0


def test_nonces_of_which_the_model_here_gives_nothing() -> None:
    """A validator whose own model is broken abstains: this is where it shows."""
    metrics = Metrics([DISTANCES, VECTORS])
    parts = dict.fromkeys(VECTORS.parts, 0.25)
    metrics.batch(BatchReport(VECTORS, "validate", ["a", None, None], 1, 1.0, parts))
    metrics.batch(BatchReport(VECTORS, "generate", [None], 0, 1.0, parts))
    metrics.batch(report("validate", math.nan, 0.0))
    told = samples(metrics)
    assert told["poc_nonces_without_artifact_total phase=validate"] == 2
    assert told["poc_nonces_without_artifact_total phase=generate"] == 1


def test_events() -> None:
    metrics = Metrics([DISTANCES])
    metrics.batch_failed()
    metrics.fraud()
    metrics.abstained()
    metrics.refused("generating")
    metrics.refused("generating")
    metrics.delivered("generated", 7)
    metrics.failed("validated")
    metrics.dropped("generated", 7, "old")
    metrics.slice(0.0015)
    metrics.waited(0.25)
    metrics.waited(0.5)
    metrics.validation_ended(JobState.DONE, 7.0)
    metrics.validation_ended(JobState.FAILED, 0.0)
    metrics.validation_ended(JobState.CANCELLED, None)
    metrics.rate.set(12.5)
    metrics.state.state("GENERATING")
    told = samples(metrics)
    assert told["poc_batch_failures_total"] == told["poc_frauds_total"] == told["poc_abstentions_total"] == 1
    assert told["poc_gate_refusals_total reason=generating"] == 2
    assert told["poc_callbacks_delivered_total kind=generated"] == 1
    assert told["poc_callback_failures_total kind=validated"] == 1
    assert told["poc_callback_dropped_nonces_total kind=generated"] == 7
    assert told["poc_callbacks_dropped_total kind=generated reason=old"] == 1
    assert told["poc_callbacks_dropped_total kind=generated reason=full"] == 0
    assert told["poc_slice_seconds_bucket le=0.001"] == 0
    assert told["poc_slice_seconds_bucket le=0.002"] == told["poc_slice_seconds_count"] == 1
    assert told["poc_waited_seconds_total"] == 0.75
    assert [told[f"poc_validations_total outcome={name}"] for name in ("done", "failed", "cancelled")] == [1, 1, 1]
    assert told["poc_validation_wait_seconds_count"] == 2  # the third never began
    assert told["poc_validation_wait_seconds_sum"] == 7.0
    assert told["poc_nonces_per_second"] == 12.5
    assert (told["poc_state poc_state=GENERATING"], told["poc_state poc_state=IDLE"]) == (1, 0)


def test_watched_values_are_read_when_they_are_asked_for() -> None:
    metrics, values = Metrics([DISTANCES]), iter([3, 5])
    metrics.watch("poc_queue", "Waiting", lambda: next(values))
    assert [samples(metrics)["poc_queue"] for _ in range(2)] == [3, 5]
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        metrics.watch("poc_queue", "Again", lambda: 0)


def test_nodes_in_one_process_count_apart() -> None:
    first, second = Metrics([DISTANCES]), Metrics([DISTANCES])
    first.fraud()
    assert samples(second)["poc_frauds_total"] == 0
