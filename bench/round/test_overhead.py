"""Batches of a round, projection off against on: two managers on one engine take turns.

A case is timed only after its distances have been checked. POC_BENCH_QUICK=1 runs the demonstration's model, all of it
and half of its layers, to try the suite itself.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import poc_kernels
from bench.common import memory, models
from poc_kernels import backends
from poc_kernels.engines.transformers.engine import TransformersEngine
from poc_kernels.protocol import BatchReport, DistanceProver, PoCConfig, PoCManager, ProofBatch

QUICK = os.environ.get("POC_BENCH_QUICK") == "1"
DEFAULT_CASES = {
    "cpu": "demo@16x64,qwen3-0.6b@2x64,qwen3-8b:2@2x64",
    "cuda": "qwen3-0.6b@32x256,qwen3-8b@32x256",
    "quick": "demo@4x16,demo:2@4x16",
}
CASE_SECONDS = {"cpu": 40.0, "cuda": 20.0}
"""Time for the batches of a case, unless the smallest number of rounds takes longer."""
MIN_ROUNDS, MAX_ROUNDS = (6, 6) if QUICK else (6, 40)
"""With fewer than 6 there is no interval that has the median with 95 %."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    device = metafunc.config.getoption("--bench-device")
    text = metafunc.config.getoption("--bench-cases") or DEFAULT_CASES["quick" if QUICK else device]
    try:
        cases = models.parse_cases(text)
    except ValueError as error:
        raise pytest.UsageError(f"--bench-cases: {error}") from error
    metafunc.parametrize("case", cases, ids=str)


class Side:
    """A round with the projection on or off, and the times of its batches."""

    def __init__(self, engine: TransformersEngine, built: models.Built, config: PoCConfig) -> None:
        self.batches: list[dict[str, Any]] = []
        self._clock = built.clock
        self.manager = PoCManager(DistanceProver(engine), self._note)
        self.manager.start_round(config)

    def _note(self, report: BatchReport) -> None:
        layers = None if self._clock is None else self._clock.take()
        self.batches.append({"seconds": report.seconds, "parts": report.part_seconds, "layers": layers})

    def run(self) -> None:
        """Compute one batch."""
        self.manager.run_batch()


def _check(off: Side, on: Side) -> None:
    """Fail unless distances with the projection keep their bits in other rows and differ from those without it."""
    proofs, plain = on.manager.run_batch(), off.manager.run_batch()
    moved = dataclasses.replace(proofs, nonces=proofs.nonces[1:] + proofs.nonces[:1], dist=[])
    again = on.manager.validate(moved)
    assert again.dist == proofs.dist[1:] + proofs.dist[:1], (
        f"distances changed with their position: {again.dist}, moved back from {proofs.dist}"
    )
    assert plain.nonces == proofs.nonces
    for batch in (proofs, plain):
        _check_distances(batch)
    same = [nonce for nonce, a, b in zip(proofs.nonces, proofs.dist, plain.dist, strict=True) if a == b]
    assert not same, f"nonces {same} have the same distance with the projection and without"


def _check_distances(batch: ProofBatch) -> None:
    # Unrelated vectors are sqrt(2) apart; logits that are not finite get 2.
    assert all(1.0 < distance < 1.9 for distance in batch.dist), f"distances of random weights: {batch.dist}"


def _memory(case: models.Case, engine: TransformersEngine, directory: Path) -> dict[str, int]:
    """Return bytes: of the seed, of the first projection's result and workspace, and of both P if they were stored."""
    rows, features = case.batch_size * case.seq_len, engine.hidden_size
    seed = poc_kernels.RandomProjection(0, features).state_dict()
    held = sum(tensor.nbytes for tensor in seed.values())
    return {
        "held": held,
        "result": rows * features * engine.dtype.itemsize,
        "workspace": memory.workspace(rows, features, engine.dtype, engine.device, directory),
        "stored": 2 * features * features * torch.bfloat16.itemsize,
    }


@pytest.mark.benchmark(group="round")
def test_round(
    benchmark: BenchmarkFixture,
    case: models.Case,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = torch.device(request.config.getoption("--bench-device"))
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, request.config.getoption("--bench-dtype") or default_dtype)
    try:
        built = models.build(case, dtype, device, tmp_path / "demo")
    except MemoryError as error:
        pytest.skip(str(error))
    engine = TransformersEngine(built.model)
    config = PoCConfig(
        block_hash="0x00000000000000000001a2b3c4d5e6f7",
        block_height=1,
        public_key="bench",
        r_target=1.4,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
    )
    off = Side(engine, built, config)
    on = Side(engine, built, dataclasses.replace(config, use_random_projection=True))

    _check(off, on)
    if not benchmark.enabled:
        pytest.skip("--benchmark-disable: checked, not timed")
    pair = off.batches[-1]["seconds"] + on.batches[-1]["seconds"]
    rounds = min(max(int(CASE_SECONDS[device.type] / pair), MIN_ROUNDS), MAX_ROUNDS)
    off.batches.clear()
    on.batches.clear()
    benchmark.pedantic(on.run, setup=off.run, rounds=rounds, iterations=1, warmup_rounds=0)
    off.run()  # so that every batch with the projection lies between two without

    benchmark.extra_info.update(
        model=case.model,
        layers=built.layers,
        whole_layers=built.whole_layers,
        parameters=built.parameters,
        hidden_size=engine.hidden_size,
        vocab_size=engine.vocab_size,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        backend=backends.select(engine.device).name,
        threads=torch.get_num_threads(),
        warnings=[record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING],
        off=off.batches,
        on=on.batches,
        memory=_memory(case, engine, tmp_path),
    )
